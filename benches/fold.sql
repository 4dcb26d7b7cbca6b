-- How fast the fold is: four ops an event, a state of five keys, small payloads.
-- For psql, in a database with nightowls that may be thrown away:
--
--   psql --no-psqlrc --quiet --tuples-only --no-align --file benches/fold.sql
--
-- Prints a line for each figure, `name|value|unit`. Runs in one transaction that
-- is rolled back. Events per run: --set events=200000; runs, of which the best
-- counts: --set runs=3.
\set ON_ERROR_STOP on
\if :{?events} \else \set events 200000 \endif
\if :{?runs} \else \set runs 3 \endif
begin;
set local max_parallel_workers_per_gather to 0;
set local client_min_messages to warning;

select nightowls.create_org('fold bench') as org \gset

\set reducer '{"initial": {"total": 0, "count": 0, "largest": null, "status": "new", "last": null}, "on": {"order_paid": [{"op": "add", "path": "total", "value": "$.amount"}, {"op": "add", "path": "count"}, {"op": "set", "path": "status", "value": "paid"}, {"op": "set", "path": "last", "value": "$.sku"}], "item_added": [{"op": "add", "path": "total", "value": "$.amount"}, {"op": "add", "path": "count"}, {"op": "max", "path": "largest", "value": "$.amount"}, {"op": "set", "path": "last", "value": "@.version"}]}}'

insert into nightowls.events (org_id, aggregate_type, aggregate_id, version, event_type, payload)
select :'org', 'order', 'o-1', i, case i % 2 when 0 then 'order_paid' else 'item_added' end,
       jsonb_build_object('amount', trunc((i % 1000)::numeric / 100, 2), 'sku', 's' || i % 10, 'note', 'hello world')
  from generate_series(1, :events) i;

create function pg_temp.best(runs integer, query text) returns numeric language plpgsql as $$
declare
  v_best  numeric;
  v_start timestamptz;
begin
  for v_run in 1 .. runs loop
    v_start := clock_timestamp();
    execute query;
    v_best := least(v_best, extract(epoch from clock_timestamp() - v_start));
  end loop;
  return v_best;
end
$$;

create function pg_temp.one_event(org uuid, reducer jsonb, events integer) returns void language plpgsql as $$
declare
  v_state  jsonb := '{"total": 999000.00, "count": 200000, "largest": 9.99, "status": "paid", "last": "s0"}';
  v_folded record;
begin
  for v_version in 1 .. events loop
    v_folded := nightowls._fold_tail(one_event.org, one_event.reducer, v_state, 'order', 'o-1', v_version, v_version);
  end loop;
end
$$;

select 'fold_tail', round(:events / pg_temp.best(:runs, format(
         'select nightowls._fold_tail(%L, %L, ''{}'', ''order'', ''o-1'', 1, null)', :'org', :'reducer'))), 'events/s';

select 'fold_events', round(:events / pg_temp.best(:runs, format(
         'select nightowls.fold_events(%L, e order by e.version) from nightowls.events e
           where e.org_id = %L and e.aggregate_type = ''order'' and e.aggregate_id = ''o-1''', :'reducer', :'org'))), 'events/s';

select 'fold_one', round(1000000 * pg_temp.best(:runs, format(
         'select pg_temp.one_event(%L, %L, 5000)', :'org', :'reducer')) / 5000, 1), 'us/event';

rollback;
