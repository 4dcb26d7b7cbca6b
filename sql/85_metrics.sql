-- Figures for others to keep and to draw: metrics_text() in OpenMetrics, and a sample a minute of our own for owl report.

-- The last position drawn. Definer: the sequence is closed.
create function nightowls._positions_drawn()
  returns bigint
  language plpgsql
  stable
  parallel safe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return (select case when s.is_called then s.last_value else s.last_value - 1 end from nightowls.events_position_seq s);
end;
$$;

revoke all on function nightowls._positions_drawn() from public;

-- Every figure. metric: its name without the prefix nightowls_; kind: gauge or counter; labels: "org" is the tenant's id.
-- What could be endless is bounded, and how much was left out is a figure too: 1,000 queues and 200,000 of their messages, 1,000 shares of consumers,
-- 100,000 floors.
create function nightowls._metrics()
  returns table (metric text, kind text, help text, labels jsonb, value numeric)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
  set jit to off
as $$
#variable_conflict use_column
declare
  v_now      timestamptz := clock_timestamp();
  v_queue    nightowls.queues;
  v_look     record;
  v_left     bigint := 200000;
  v_queues   bigint := (select count(*) from nightowls.queues q where q.queue_id > 0);
  v_shares   bigint;
  v_function text;
begin
  return query
    select 'build', 'info', 'The version of nightowls.', jsonb_build_object('version', nightowls.version()), 1::numeric
     union all
    select 'positions', 'counter', 'Positions of the log that were drawn: events, and those that were rolled back.', '{}', nightowls._positions_drawn()::numeric
     union all
    select 'healthy', 'gauge', 'Whether a check of the view health is well: 1, or 0.',
           jsonb_build_object('concern', h.concern, 'check', h.name), h.ok::int::numeric
      from nightowls.health h;

  -- Those of endpoints have figures of their own.
  for v_queue in select q.* from nightowls.queues q where q.queue_id > 0 order by q.org_id, q.name limit 1000 loop
    v_look := nightowls._measure(v_queue, greatest(least(v_left, 10001), 1)::int);
    v_left := v_left - v_look.looked_at;
    return query
      select 'queue_messages', 'gauge', 'Messages that are not done, by what they wait for.',
             jsonb_build_object('org', v_queue.org_id, 'queue', v_queue.name, 'state', s.state), s.value::numeric
        from (values ('visible', ((v_look.metric).queue_visible_length)), ('leased', ((v_look.metric).leased)),
                     ('delayed', ((v_look.metric).delayed)), ('waiting', ((v_look.metric).waiting)),
                     ('dead', ((v_look.metric).dead_letters))) as s (state, value)
       union all
      select 'queue_oldest_seconds', 'gauge', 'Age of the oldest message that is not done.',
             jsonb_build_object('org', v_queue.org_id, 'queue', v_queue.name), coalesce((v_look.metric).oldest_msg_age_sec, 0)::numeric
       union all
      select 'queue_paused', 'gauge', 'Whether the queue is paused: 1, or 0.',
             jsonb_build_object('org', v_queue.org_id, 'queue', v_queue.name), (v_look.metric).paused::int::numeric
       union all
      select 'queue_estimated', 'gauge', 'Whether the queue is too long to be counted at each look, and these are the clock''s last figures: 1, or 0.',
             jsonb_build_object('org', v_queue.org_id, 'queue', v_queue.name), (v_look.metric).estimated::int::numeric;
  end loop;

  select count(*) into v_shares from nightowls.consumers c cross join lateral nightowls._share_states(c) s;
  return query
    with shares as materialized (
      select c.org_id, c.name, s.share, s."offset"
        from nightowls.consumers c
       cross join lateral nightowls._share_states(c) s
       order by c.org_id, c.name, s.share
       limit 1000
    )
    select 'consumer_lag_positions', 'gauge', 'How far the newest event of the org lies ahead of a consumer, in positions, which have gaps.',
           jsonb_build_object('org', s.org_id, 'consumer', s.name, 'member', s.share::text),
           greatest(coalesce((select e."position" from nightowls.events e where e.org_id = s.org_id order by e."position" desc limit 1), 0) - s."offset", 0)::numeric
      from shares s
     union all
    select 'consumer_lag_seconds', 'gauge', 'Age of the first event that a consumer has not passed.',
           jsonb_build_object('org', s.org_id, 'consumer', s.name, 'member', s.share::text),
           coalesce((
             select greatest(round(extract(epoch from v_now - e.created_at), 3), 0)
               from nightowls.events e
              where e.org_id = s.org_id and e."position" > s."offset"
              order by e."position"
              limit 1), 0)
      from shares s
     union all
    select 'consumer_parked_events', 'gauge', 'Events that a consumer has parked.',
           jsonb_build_object('org', f.org_id, 'consumer', f.consumer), count(*)::numeric
      from nightowls._consumer_failures f
     where f.parked_at is not null or f.replay
     group by f.org_id, f.consumer;

  return query
    with floors as materialized (
      select f.org_id, f.status, f.waiting from nightowls.floor_status f where f.holder is not null or f.waiting > 0 limit 100000
    )
    select 'floors', 'gauge', 'Floors that somebody holds (held, or stale: silent for too long) or waits for (free).',
           jsonb_build_object('org', f.org_id, 'status', f.status), count(*)::numeric
      from floors f
     group by f.org_id, f.status
     union all
    select 'floor_waiters', 'gauge', 'Who is in line for floors.', jsonb_build_object('org', f.org_id), sum(f.waiting)
      from floors f
     group by f.org_id
     union all
    select 'view_age_seconds', 'gauge', 'Time since a view projection was last refreshed.',
           jsonb_build_object('org', p.org_id, 'projection', p.name),
           greatest(round(extract(epoch from v_now - coalesce(p.refreshed_at, p.created_at)), 3), 0)
      from nightowls.projections p
     where p.kind = 'view'
     union all
    select 'compactions_refused', 'gauge', 'Aggregates that the sweep could not compact.', jsonb_build_object('org', c.org_id), count(*)::numeric
      from nightowls.compactions c
     where c.refused is not null
     group by c.org_id
     union all
    select 'series_left_out', 'gauge', 'What there is too much of to be shown.', jsonb_build_object('of', o.name), o.value::numeric
      from (values ('queues', greatest(v_queues - 1000, 0)), ('consumers', greatest(v_shares - 1000, 0))) as o (name, value);

  return query
    select x.metric, x.kind, x.help, jsonb_build_object('part', c.part), x.value
      from nightowls.clock_parts c
     cross join lateral (
             values ('clock_last_run_timestamp_seconds', 'gauge', 'When a part of the clock last ran.', round(extract(epoch from c.ran_at), 3)),
                    ('clock_took_seconds', 'gauge', 'How long it took then.', c.took_ms / 1000.0),
                    ('clock_done', 'counter', 'How much a part of the clock has done, as it counts.', c.total::numeric),
                    ('clock_failures', 'counter', 'How often a part of the clock has failed.', c.failures::numeric),
                    ('clock_failing', 'gauge', 'Whether a part of the clock failed when it last ran: 1, or 0.', (c.error is not null)::int::numeric)
           ) as x (metric, kind, help, value)
     where x.value is not null
     union all
    select x.metric, 'gauge', x.help, jsonb_build_object('table', c.relname), x.value
      from pg_class c
     cross join lateral (
             values ('table_bytes', 'Size of a table on disk, indexes and all.', pg_total_relation_size(c.oid)::numeric),
                    ('table_dead_rows', 'Dead rows of a table, as Postgres estimates them.', pg_stat_get_dead_tuples(c.oid)::numeric)) as x (metric, help, value)
     where c.relnamespace = 'nightowls'::regnamespace and c.relkind = 'r';

  -- What other concerns have, where they are there.
  foreach v_function in array array['_metrics_dispatch', '_metrics_embeddings', '_metrics_realtime'] loop
    if to_regprocedure(format('nightowls.%I()', v_function)) is not null then
      return query execute format('select m.metric, m.kind, m.help, m.labels, m.value from nightowls.%I() m', v_function);
    end if;
  end loop;
end;
$$;

revoke all on function nightowls._metrics() from public;

-- The figures in OpenMetrics. With orgs: one series each; without: what could tell one tenant from another, names of their things too, is summed up,
-- and of times the longest counts.
create function nightowls._metrics_text(with_orgs boolean)
  returns text
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
  set jit to off
as $$
#variable_conflict use_column
begin
  return (
    with figures as materialized (
      select m.metric, m.kind, min(m.help) as help, l.labels,
             case when m.kind = 'gauge' and m.metric like '%\_seconds' then max(m.value)
                  when m.kind = 'gauge' and m.metric = 'healthy' then min(m.value)
                  else sum(m.value) end as value
        from nightowls._metrics() m
       cross join lateral (
               select coalesce(jsonb_object_agg(e.key, e.value), '{}') as labels
                 from jsonb_each_text(m.labels) e
                where _metrics_text.with_orgs
                   or e.key in ('version', 'concern', 'check', 'part', 'state', 'status', 'table', 'of', 'outcome', 'le')) l
       where m.value is not null
       group by m.metric, m.kind, l.labels
    ),
    families as (
      select f.metric,
             format(E'# TYPE nightowls_%1$s %2$s\n# HELP nightowls_%1$s %3$s\n', f.metric, f.kind,
                    replace(replace(min(f.help), E'\\', E'\\\\'), E'\n', E'\\n'))
               || string_agg(
                    format(E'nightowls_%s%s%s %s\n', f.metric, case f.kind when 'counter' then '_total' when 'info' then '_info' else '' end,
                           case when f.labels <> '{}' then '{' || (
                             select string_agg(format('%s="%s"', e.key, replace(replace(replace(e.value, E'\\', E'\\\\'), '"', E'\\"'), E'\n', E'\\n')), ','
                                               order by e.key)
                               from jsonb_each_text(f.labels) e) || '}' else '' end,
                           trim_scale(f.value)), '' order by f.labels::text) as text
        from figures f
       group by f.metric, f.kind
    )
    select string_agg(f.text, '' order by f.metric) || E'# EOF\n' from families f);
end;
$$;

revoke all on function nightowls._metrics_text(boolean) from public;

-- For those who may see totals only. Definer: they may read no table.
create function nightowls._metrics_totals()
  returns text
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return nightowls._metrics_text(false);
end;
$$;

revoke all on function nightowls._metrics_totals() from public;

create function nightowls.metrics_text()
  returns text
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if nightowls._is_service() then
    return nightowls._metrics_text(true);
  end if;
  return nightowls._metrics_totals();
end;
$$;

comment on function nightowls.metrics_text() is
  'All figures in the OpenMetrics format, as Prometheus and its like read it: the log, queues, consumers, floors, projections, requests, the clock, sizes and what '
  'health says. To services with a series for each org, queue and consumer; to a role that has had grant_monitor with totals over all orgs, and no name of theirs. '
  'It looks at 1,000 queues, 200,000 messages and 1,000 consumers at most; nightowls_series_left_out says what was left out. Locks nothing.';

revoke all on function nightowls.metrics_text() from public;

-- A sample a minute, for two days --------------------------------------------------------------------

create table nightowls._samples (
  org_id     uuid        not null,
  metric     text        collate "C" not null,
  name       text        collate "C" not null,
  sampled_at timestamptz not null,
  value      double precision not null,
  constraint _samples_pkey primary key (org_id, metric, name, sampled_at)
);

create index _samples_sampled_at_idx on nightowls._samples (sampled_at);

comment on table nightowls._samples is 'Figures of the last two days, one sample a minute while the clock runs: what owl report draws.';
comment on column nightowls._samples.org_id is 'The tenant; 00000000-0000-0000-0000-000000000000: the installation.';
comment on column nightowls._samples.metric is 'The metric, as metrics_text has it without the prefix.';
comment on column nightowls._samples.name is 'What it is of: the other labels, separated by blanks.';
comment on column nightowls._samples.sampled_at is 'When.';
comment on column nightowls._samples.value is 'The figure.';

-- The clock's part of it: one sample if the last one is almost a minute old, of 300 figures at most, the greatest, and what is older than
-- two days goes. Returns how many figures it took.
-- Definer: nobody else may write to the table.
create function nightowls._take_samples(max_ms int)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
  set jit to off
as $$
#variable_conflict use_column
declare
  v_now   timestamptz := clock_timestamp();
  v_until timestamptz := clock_timestamp() + _take_samples.max_ms * interval '1 millisecond';
  v_done  bigint;
  v_gone  bigint;
begin
  if not nightowls._begin_sweep('samples')
     or exists (select from nightowls._samples s where s.sampled_at > v_now - interval '50 seconds') then
    return 0;
  end if;
  insert into nightowls._samples (org_id, metric, name, sampled_at, value)
  select coalesce((m.labels ->> 'org')::uuid, '00000000-0000-0000-0000-000000000000'), m.metric,
         coalesce((select string_agg(e.value, ' ' order by e.key) from jsonb_each_text(m.labels - 'org') e), ''), v_now, sum(m.value)
    from nightowls._metrics() m
   where m.value is not null
     and (m.metric = 'positions' or m.metric like 'queue\_%' and m.metric <> 'queue_estimated' or m.metric like 'consumer\_%' or m.metric like 'dispatch\_%'
          or m.metric like 'embedding%' or m.metric in ('healthy', 'floors', 'floor_waiters'))
   group by 1, 2, 3
   order by m.metric in ('positions', 'healthy') desc, sum(m.value) desc, 1, 2, 3
   limit 300;
  get diagnostics v_done = row_count;
  loop
    delete from nightowls._samples s
     where s.ctid = any (array(
             select o.ctid
               from nightowls._samples o
              where o.sampled_at < v_now - interval '2 days'
              order by o.sampled_at
              limit 5000));
    get diagnostics v_gone = row_count;
    exit when v_gone < 5000 or clock_timestamp() >= v_until;
  end loop;
  return v_done;
end;
$$;

revoke all on function nightowls._take_samples(int) from public;

alter table nightowls._samples enable row level security;
alter table nightowls._samples force row level security;
create policy service_all on nightowls._samples
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));
