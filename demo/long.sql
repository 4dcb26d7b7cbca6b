-- A long history: what loading a state of it costs without a snapshot, with one and compacted, and how fast a consumer
-- takes it in. Run by scripts/demo.sh; made and measured once, shown again afterwards.
\set VERBOSITY verbose
\set SHOW_CONTEXT never
\set length 50000

select to_regclass('demo.measured') is not null as made \gset
\if :made
  \echo
  \echo 'The long history is there from an earlier run; what was measured then:'
\else

create table demo.measured (
  no     int     generated always as identity,
  what   text    not null,
  events bigint  not null,
  ms     numeric not null
);

-- Loads a state as it was at a version, thrice, and keeps the fastest: the first has to warm up what the others find warm.
create function demo.load(what text, events bigint, version bigint)
  returns void
  language plpgsql
as $$
declare
  v_began timestamptz;
  v_best  numeric;
begin
  for i in 1 .. 3 loop
    v_began := clock_timestamp();
    if (nightowls.state_at('visits', 'owl', version) ->> 'visits')::bigint <> version then
      raise exception 'the state at version % has not counted all visits', version;
    end if;
    v_best := least(v_best, extract(epoch from clock_timestamp() - v_began) * 1000);
  end loop;
  insert into demo.measured (what, events, ms) values (what, events, v_best);
end;
$$;

-- Takes in everything a consumer has before it; each step's offset is committed with it.
create procedure demo.take(consumer text)
  language plpgsql
as $$
declare
  v_began  timestamptz := clock_timestamp();
  v_fence  bigint;
  v_last   bigint;
  v_events bigint;
  v_all    bigint := 0;
begin
  loop
    select max(e.fence), max(e."position"), count(*) into v_fence, v_last, v_events from nightowls.fetch_events(consumer) e;
    exit when v_events = 0;
    v_all := v_all + v_events;
    perform nightowls.commit_offset(consumer, v_last, v_fence);
    commit;
  end loop;
  insert into demo.measured (what, events, ms)
  values ('a consumer: fetch_events and commit_offset, 1,000 at a time', v_all, extract(epoch from clock_timestamp() - v_began) * 1000);
end;
$$;

-- Compacts until nothing more may go; each slice is a transaction.
create procedure demo.compact()
  language plpgsql
as $$
declare
  v_began timestamptz := clock_timestamp();
  v_slice record;
  v_all   bigint := 0;
begin
  loop
    v_slice := nightowls.compact_aggregate('visitor', 'owl');
    v_all := v_all + v_slice.moved;
    commit;
    exit when not v_slice.more;
  end loop;
  insert into demo.measured (what, events, ms)
  values ('compact_aggregate: proven by a replay, then moved to the archive', v_all, extract(epoch from clock_timestamp() - v_began) * 1000);
end;
$$;

-- Appends take a snapshot every 1,000 versions by themselves; not here, so that the first one is seen.
select nightowls.create_projection('visits', 'visitor', '{"on": {"visited": [
  {"op": "add", "path": "visits"}, {"op": "add", "path": "spent", "value": "$.spent"}, {"op": "set", "path": "last", "value": "$.page"}]}}')
\g /dev/null
select nightowls.set_snapshot_policy('visits', null)
\g /dev/null
select nightowls.create_consumer('tour', '{"aggregate_types": ["visitor"]}')
\g /dev/null
do $$
begin
  for i in 0 .. 49 loop
    perform nightowls.append_events('visitor', 'owl', (
      select jsonb_agg(jsonb_build_object(
               'event_type', 'visited', 'payload', jsonb_build_object('page', '/' || n % 97, 'spent', n % 13 + 0.25)))
        from generate_series(i * 1000 + 1, (i + 1) * 1000) n));
    commit;
  end loop;
end;
$$;

select demo.load('state_at without a snapshot: every event is folded', :length - 1, :length - 1)
\g /dev/null
select nightowls.create_snapshot('visits', 'owl')
\g /dev/null
select nightowls.append_event('visitor', 'owl', 'visited', jsonb_build_object('page', '/new', 'spent', n))
  from generate_series(1, 10) n
\g /dev/null
select demo.load('state_at with a snapshot: it, and what came after', 9, :length + 9)
\g /dev/null
call demo.take('tour');
call demo.compact();
select demo.load('state_at after the compaction', 9, :length + 9)
\g /dev/null
select demo.load('state_at of a version that lies in the archive', :length - 1, :length - 1)
\g /dev/null

\endif

\echo
\echo :bold'A long history: one visitor''s 50,010 events':off
select m.what, m.events, round(m.ms, 1) as ms, case when m.ms > 20 then round(m.events / m.ms * 1000) end as "events/s"
  from demo.measured m
 order by m.no;
select (select count(*) from nightowls.events e where e.org_id = nightowls.current_org() and e.aggregate_type = 'visitor') as "events in the live log",
       (select count(*) from nightowls.events_archive a where a.org_id = nightowls.current_org() and a.aggregate_type = 'visitor') as "in the archive",
       nightowls.state('visits', 'owl') as state;

do $$
begin
  if exists (select from nightowls.verify_projection('visits')) then
    raise exception 'the state of the long history differs from a replay';
  end if;
end;
$$;
