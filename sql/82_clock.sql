-- The clock: what is due is done by parts, whoever calls it: pg_cron, the worker, owl, or anybody.

create table nightowls.clock_parts (
  part      text        collate "C" not null,
  ran_at    timestamptz,
  took_ms   int,
  did       bigint      not null default 0,
  total     bigint      not null default 0,
  failures  bigint      not null default 0,
  error     text,
  failed_at timestamptz,
  constraint clock_parts_pkey primary key (part)
) with (fillfactor = 50);

comment on table nightowls.clock_parts is 'The parts of the clock and how they fared: tick and run_tick. The one that has waited longest comes first.';
comment on column nightowls.clock_parts.part is 'The part.';
comment on column nightowls.clock_parts.ran_at is 'When it last ran, or began to if took_ms is null; null: it has never run.';
comment on column nightowls.clock_parts.took_ms is 'How many milliseconds that took; null: it is running, or whoever ran it came to an end with it.';
comment on column nightowls.clock_parts.did is 'How much it did then: messages, events, rows, as the part counts.';
comment on column nightowls.clock_parts.total is 'How much it has ever done.';
comment on column nightowls.clock_parts.failures is 'How often it has ever failed.';
comment on column nightowls.clock_parts.error is 'Why it failed when it last ran; null: it did not.';
comment on column nightowls.clock_parts.failed_at is 'When it last failed.';

-- What a tick knows of itself, from one part to the next.
create type nightowls._tick_state as (
  until   timestamptz,
  parts   text[],
  again   text[],
  part    text,
  ms      int,
  did     bigint,
  took_ms int,
  detail  jsonb,
  error   text
);

-- The parts whose functions are there. statement: with the milliseconds it may take as $1, it returns what it did (a bigint) and a
-- detail (jsonb, or null); a key "error" in that is a failure that undoes nothing. locks: how many advisory locks it may
-- take, whatever the transaction has already: some stop when that is too much. by_owner: it needs
-- the owner's rights, and runs no code of users'.
create function nightowls._clock_parts()
  returns table (part text, signature text, statement text, locks int, by_owner boolean)
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return query
    select p.part, p.signature, p.statement, p.locks, p.by_owner
      from (values
        ('queues', 'nightowls._tick_queues(integer)',
         'select coalesce(sum(x.qty), 0)::bigint, jsonb_object_agg(x.what, x.qty)
            from (select t.what, sum(t.qty) as qty from nightowls._tick_queues($1) t group by t.what) x', 27, false),
        ('dispatch', 'nightowls._tick_dispatch(integer)', 'select nightowls._tick_dispatch($1), null::jsonb', 8, false),
        ('embeddings', 'nightowls._tick_embeddings(integer)', 'select t.did, t.detail from nightowls._tick_embeddings($1) t', 2, false),
        ('projections', 'nightowls.run_projections(integer,integer)',
         'select coalesce(sum(r.events), 0)::bigint,
                 jsonb_strip_nulls(jsonb_build_object(''projections'', count(*), ''parked'', count(*) filter (where r.error is not null and r.events > 0),
                   ''error'', min(r.projection || '': '' || r.error) filter (where r.events = 0)))
            from nightowls.run_projections(1000000, $1) r', 4, false),
        ('views', 'nightowls._refresh_views(integer)', 'select r.did, r.detail from nightowls._refresh_views($1) r', 1, false),
        ('snapshots', 'nightowls.create_snapshots(integer,integer)',
         'select count(*) filter (where s.error is null),
                 jsonb_strip_nulls(jsonb_build_object(''error'', min(s.projection || '' of '' || s.aggregate_id || '': '' || s.error)))
            from nightowls.create_snapshots(100000, $1) s', 25, false),
        ('compaction', 'nightowls.compact(integer,integer)',
         'select coalesce(sum(c.moved), 0)::bigint,
                 jsonb_build_object(''aggregates'', count(*), ''held'', count(c.held_by), ''refused'', count(c.error))
            from nightowls.compact(100000, $1) c', 26, false),
        ('queue_counts', 'nightowls._count_queues(integer)', 'select nightowls._count_queues($1), null::jsonb', 1, false),
        ('consumers', 'nightowls._prune_consumers(integer)', 'select nightowls._prune_consumers($1), null::jsonb', 0, false),
        ('floors', 'nightowls._prune_floors(integer,integer)',
         'select coalesce(sum(f.floors + f.tickets), 0)::bigint, jsonb_build_object(''floors'', coalesce(sum(f.floors), 0), ''tickets'', coalesce(sum(f.tickets), 0))
            from nightowls._prune_floors(20000, $1) f', 1, false),
        ('scratchpads', 'nightowls._prune_scratchpads(integer)', 'select nightowls._prune_scratchpads($1), null::jsonb', 1, false),
        ('followups', 'nightowls._prune_followups(integer)', 'select nightowls._prune_followups($1), null::jsonb', 1, false),
        ('samples', 'nightowls._take_samples(integer)', 'select nightowls._take_samples($1), null::jsonb', 1, false),
        ('copy', 'nightowls.resume_from_copy()', 'select count(*), null::jsonb from nightowls.resume_from_copy()', 4, true),
        ('cdc', 'nightowls._repair_cdc()', 'select nightowls._repair_cdc(), null::jsonb', 0, true)
      ) as p (part, signature, statement, locks, by_owner)
     where to_regprocedure(p.signature) is not null;
end;
$$;

revoke all on function nightowls._clock_parts() from public;

-- Rows for parts that have none, unless somebody is at it (lock class base + 270).
-- Definer: nobody else may write to the table.
create function nightowls._seed_parts()
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if exists (select from nightowls._clock_parts() p where not exists (select from nightowls.clock_parts c where c.part = p.part))
     and pg_try_advisory_xact_lock(nightowls._lock_class(270), 0) then
    insert into nightowls.clock_parts (part) select p.part from nightowls._clock_parts() p on conflict do nothing;
  end if;
end;
$$;

revoke all on function nightowls._seed_parts() from public;

-- Takes a part for this transaction, false if another one works on it. begins: note that it begins, so that one that ends its session
-- each time is not first in line for ever.
-- Definer: nobody else may write to the table.
create function nightowls._claim_part(part text, begins boolean)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform from nightowls.clock_parts c where c.part = _claim_part.part for update skip locked;
  if not found then
    return false;
  elsif _claim_part.begins then
    update nightowls.clock_parts c set ran_at = clock_timestamp(), took_ms = null where c.part = _claim_part.part;
  end if;
  return true;
end;
$$;

revoke all on function nightowls._claim_part(text, boolean) from public;

-- How a part fared, whose row is locked. Definer: nobody else may write to the table.
create function nightowls._note_part(part text, took_ms int, did bigint, error text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  update nightowls.clock_parts c
     set ran_at = clock_timestamp(), took_ms = _note_part.took_ms, did = _note_part.did, total = c.total + _note_part.did,
         error = _note_part.error,
         failures = c.failures + case when _note_part.error is null then 0 else 1 end,
         failed_at = case when _note_part.error is null then c.failed_at else clock_timestamp() end
   where c.part = _note_part.part;
end;
$$;

revoke all on function nightowls._note_part(text, int, bigint, text) from public;

create function nightowls._start_tick(max_ms int)
  returns nightowls._tick_state
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_state nightowls._tick_state;
begin
  if _start_tick.max_ms is null then
    raise exception 'max_ms must not be null' using errcode = 'null_value_not_allowed';
  elsif _start_tick.max_ms < 1 then
    raise exception 'max_ms must be 1 or more' using errcode = 'invalid_parameter_value';
  elsif pg_is_in_recovery() then
    raise exception 'the clock does not run on a standby'
      using errcode = 'object_not_in_prerequisite_state', hint = 'Run it on the primary.';
  end if;
  perform nightowls._refuse_snapshot('running the clock');
  v_state.until := clock_timestamp() + _start_tick.max_ms * interval '1 millisecond';
  perform nightowls._seed_parts();
  v_state.parts := array(
    select p.part
      from nightowls._clock_parts() p
      left join nightowls.clock_parts c on c.part = p.part
     order by c.ran_at nulls first, p.part);
  v_state.again := '{}';
  return v_state;
end;
$$;

revoke all on function nightowls._start_tick(int) from public;

-- The next part, and its share of the time that is left; those that used up theirs come again when all have had a turn. part null: it is over.
create function nightowls._next_part(state nightowls._tick_state)
  returns nightowls._tick_state
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_state nightowls._tick_state := _next_part.state;
  v_left  numeric := extract(epoch from v_state.until - clock_timestamp()) * 1000;
begin
  v_state.part := null;
  v_state.did := 0;
  v_state.detail := null;
  v_state.error := null;
  if v_state.parts = '{}' then
    v_state.parts := v_state.again;
    v_state.again := '{}';
  end if;
  -- The first one has its turn however short the time is.
  if (v_left >= 1 or v_state.ms is null) and v_state.parts <> '{}' then
    v_state.part := v_state.parts[1];
    v_state.ms := greatest(v_left / cardinality(v_state.parts), 1)::int;
    v_state.parts := v_state.parts[2:];
  end if;
  return v_state;
end;
$$;

revoke all on function nightowls._next_part(nightowls._tick_state) from public;

-- Gives a part its turn. What it raises becomes its error; a lock is waited for no longer than the turn lasts.
create function nightowls._run_part(state nightowls._tick_state)
  returns nightowls._tick_state
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_state   nightowls._tick_state := _run_part.state;
  v_began   timestamptz := clock_timestamp();
  v_timeout text := current_setting('lock_timeout');
  v_part    record;
begin
  select p.statement, p.locks into v_part from nightowls._clock_parts() p where p.part = v_state.part;
  if not found or nightowls._locks_held() + v_part.locks > 64 or not nightowls._claim_part(v_state.part, false) then
    return v_state;
  end if;
  begin
    perform set_config('lock_timeout', greatest(v_state.ms, 100) || 'ms', true);
    execute v_part.statement into v_state.did, v_state.detail using v_state.ms;
    perform set_config('lock_timeout', v_timeout, true);
    v_state.did := coalesce(v_state.did, 0);
    v_state.error := left(v_state.detail ->> 'error', 1000);
  exception when others then
    v_state.did := 0;
    v_state.detail := null;
    v_state.error := left(sqlstate || ' ' || sqlerrm, 1000);
  end;
  v_state.took_ms := extract(epoch from clock_timestamp() - v_began) * 1000;
  perform nightowls._note_part(v_state.part, v_state.took_ms, v_state.did, v_state.error);
  if v_state.did > 0 and v_state.error is null and v_state.took_ms * 2 >= v_state.ms then
    v_state.again := v_state.again || v_state.part;
  end if;
  return v_state;
end;
$$;

revoke all on function nightowls._run_part(nightowls._tick_state) from public;

create function nightowls.tick(max_ms int default 10000)
  returns table (part text, did bigint, took_ms int, detail jsonb, error text)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_state nightowls._tick_state := nightowls._start_tick(tick.max_ms);
begin
  loop
    v_state := nightowls._next_part(v_state);
    exit when v_state.part is null;
    v_state := nightowls._run_part(v_state);
    if v_state.did > 0 or v_state.error is not null then
      part := v_state.part;
      did := v_state.did;
      took_ms := v_state.took_ms;
      detail := v_state.detail;
      error := v_state.error;
      return next;
    end if;
  end loop;
end;
$$;

comment on function nightowls.tick(int) is
  'Does what is due, of all orgs: delayed messages and leases, async projections, view refreshes, snapshots, compaction, what has expired, and the '
  'other parts of clock_parts. To be called about once a minute, by run_tick where that can be. max_ms: begin nothing new after so many milliseconds; '
  'the refresh of a view takes as long as its query does. The part that has waited longest comes first, each has an equal share of the time that is left, '
  'and those that need more go on when all have had a turn. Returns a row for each turn that did something or failed: part, did (as the part counts), '
  'took_ms, detail, error. A part that fails is undone, stops no other and shows in health. No part begins that could bring the transaction above 64 '
  'advisory locks: what is left out comes first in the next call. Two calls at once do no harm: each leaves out what the other one is at. Handlers run as '
  'the caller. Waits for nobody longer than a part''s share. Service only. Raises 22004 or 22023 if max_ms is null or below 1, 25001 above '
  'read committed, 55000 on a standby.';

revoke all on function nightowls.tick(int) from public;

-- For one part the clock becomes another role, until the transaction ends.
create function nightowls._become(role text, part text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if _become.role is not null
     and not exists (select from nightowls._clock_parts() p where p.part = _become.part and p.by_owner) then
    perform set_config('role', _become.role, true);
  end if;
end;
$$;

revoke all on function nightowls._become(text, text) from public;

-- The milliseconds that are left for what comes after the parts; null where the part embeddings does it all, or nothing can.
create function nightowls._backfill_ms(state nightowls._tick_state)
  returns int
  language sql
  volatile
  parallel unsafe
  return case when nightowls._can_http()
              then greatest(extract(epoch from ("state").until - clock_timestamp()) * 1000, 1000)::int end;

revoke all on function nightowls._backfill_ms(nightowls._tick_state) from public;

-- It pins no search_path, as a procedure that does may not commit: all it names is qualified.
create procedure nightowls.run_tick(max_ms int default 50000, run_as text default null)
  language plpgsql
as $$
#variable_conflict use_column
declare
  v_state nightowls._tick_state;
  v_ms    int;
begin
  perform nightowls._become(run_tick.run_as, '');
  v_state := nightowls._start_tick(run_tick.max_ms);
  commit;
  loop
    v_state := nightowls._next_part(v_state);
    exit when v_state.part is null;
    if nightowls._claim_part(v_state.part, true) then
      commit;
      perform nightowls._become(run_tick.run_as, v_state.part);
      v_state := nightowls._run_part(v_state);
    end if;
    commit;
  end loop;
  -- It talks to the network with no transaction open, so it commits by itself, and comes last, as what it raises ends the call.
  v_ms := nightowls._backfill_ms(v_state);
  if v_ms is not null then
    perform nightowls._become(run_tick.run_as, '');
    call nightowls.run_backfill(50, v_ms);
  end if;
end;
$$;

comment on procedure nightowls.run_tick(int, text) is
  'As tick, but commits after each part, so that no lock and no snapshot is kept from one to the next: what schedule gives to pg_cron. max_ms: begin nothing '
  'new after so many milliseconds; run_as: the role as which the parts run, one that the caller may become, by default the caller: so that no handler runs as '
  'the owner. What the parts did stands in clock_parts. Service only. Raises 2D000 inside a transaction block or function, 22023 or 42501 for run_as, and what '
  'tick raises.';

revoke all on procedure nightowls.run_tick(int, text) from public;

-- pg_cron ------------------------------------------------------------------------------------------

-- The schedule of pg_cron for an interval. seconds: whether pg_cron knows seconds.
create function nightowls._cron_schedule(every interval, seconds boolean)
  returns text
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_seconds numeric := extract(epoch from _cron_schedule.every);
begin
  if v_seconds is null then
    raise exception 'every must not be null' using errcode = 'null_value_not_allowed';
  elsif v_seconds = 60 then
    return '* * * * *';
  elsif v_seconds between 120 and 1800 and mod(3600, v_seconds) = 0 and mod(v_seconds, 60) = 0 then
    return format('*/%s * * * *', trunc(v_seconds / 60));
  elsif v_seconds = 3600 then
    return '0 * * * *';
  elsif v_seconds between 7200 and 43200 and mod(86400, v_seconds) = 0 and mod(v_seconds, 3600) = 0 then
    return format('0 */%s * * *', trunc(v_seconds / 3600));
  elsif v_seconds = 86400 then
    return '0 0 * * *';
  elsif v_seconds between 1 and 59 and v_seconds = trunc(v_seconds) and _cron_schedule.seconds then
    return format('%s seconds', trunc(v_seconds));
  end if;
  raise exception 'every is nothing that pg_cron can keep'
    using errcode = 'invalid_parameter_value',
          hint = 'Use minutes that divide an hour, hours that divide a day, or, with pg_cron 1.5 or later, 1 to 59 seconds.';
end;
$$;

revoke all on function nightowls._cron_schedule(interval, boolean) from public;

create function nightowls.schedule(every interval default '1 minute')
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_version text := (select e.extversion from pg_extension e where e.extname = 'pg_cron');
  v_home    text;
  v_when    text := nightowls._cron_schedule(
    schedule.every, coalesce(string_to_array(substring(v_version from '^[0-9]+\.[0-9]+'), '.')::int[] >= '{1,5}', true));
  v_owner   oid := (select n.nspowner from pg_namespace n where n.nspname = 'nightowls');
  v_run_as  text;
  v_command text;
  v_job     bigint;
begin
  begin
    v_home := current_setting('cron.database_name', true);
  exception when insufficient_privilege then
    -- It is loaded, and its home is shown to superusers only.
    v_home := '';
  end;
  -- What runs is not the owner, whom handlers could use: the role of a service, if one is known that the owner may become.
  if pg_has_role(current_user, v_owner, 'usage') then
    select r.rolname into v_run_as
      from pg_proc p
     cross join lateral aclexplode(p.proacl) a
      join pg_roles r on r.oid = a.grantee
     where p.oid = 'nightowls._service()'::regprocedure and a.privilege_type = 'EXECUTE' and a.grantee <> v_owner
       and pg_has_role(current_user, r.oid, 'member')
     order by r.rolname = 'service_role' desc, r.rolname
     limit 1;
  end if;
  v_command := format('call nightowls.run_tick(%s%s)', least(extract(epoch from schedule.every) * 800, 50000)::int,
                      case when v_run_as is null then '' else format(', run_as => %L', v_run_as) end);

  if v_version is null and not exists (select from pg_available_extensions a where a.name = 'pg_cron') then
    raise exception 'pg_cron is not there'
      using errcode = 'feature_not_supported',
            hint = 'Load nightowls with shared_preload_libraries, so that its worker runs the clock, or let "owl tick --every 60s" or any other scheduler do it.';
  elsif v_version is null and v_home is null then
    raise exception 'pg_cron is available but not loaded'
      using errcode = 'object_not_in_prerequisite_state',
            hint = format('Add pg_cron to shared_preload_libraries, set cron.database_name to "%s", restart the server, create extension pg_cron, and '
                          'call nightowls.schedule() again.', current_database());
  elsif v_version is null and v_home <> current_database() then
    raise exception 'pg_cron is at home in %', case when v_home = '' then 'the database of cron.database_name' else format('database "%s"', v_home) end
      using errcode = 'object_not_in_prerequisite_state',
            hint = format('There, as a superuser: create extension if not exists pg_cron; and, if it is not this database: select cron.schedule_in_database(''nightowls'', %L, %L, %L, %L);',
                          v_when, v_command, current_database(), current_user);
  elsif v_version is null then
    raise exception 'pg_cron is available but not created'
      using errcode = 'object_not_in_prerequisite_state', hint = 'create extension pg_cron; then call nightowls.schedule() again.';
  end if;

  execute format('select %s.schedule($1, $2, $3)', to_regnamespace('cron')) into v_job using 'nightowls', v_when, v_command;
  insert into nightowls.settings (name, value) values ('clock_every', to_jsonb(extract(epoch from schedule.every)::int))
  on conflict (name) do update set value = excluded.value;
  return v_job;
end;
$$;

comment on function nightowls.schedule(interval) is
  'Lets pg_cron run the clock: makes its job "nightowls", or changes it, and returns its number. every: how often: minutes that divide an hour, hours '
  'that divide a day, with pg_cron 1.5 or later also 1 to 59 seconds. The job calls run_tick as the caller; the owner''s as the service that is known, so that '
  'handlers do not run as the owner. Waits for nobody. Raises 55000 where pg_cron is available but not loaded or created, or at home in another '
  'database, 0A000 where it is not available, each with what to do, 42501 without rights on pg_cron, 22004 or 22023 if every is null or nothing that pg_cron can keep.';

revoke all on function nightowls.schedule(interval) from public;

create function nightowls.unschedule()
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_jobs bigint[] := '{}';
  v_job  bigint;
begin
  if exists (select from pg_extension e where e.extname = 'pg_cron') then
    execute format('select coalesce(array_agg(j.jobid), ''{}'') from %s j where j.jobname = $1 and j.database = current_database()', to_regclass('cron.job'))
       into v_jobs using 'nightowls';
  end if;
  foreach v_job in array v_jobs loop
    execute format('select %s.unschedule($1)', to_regnamespace('cron')) using v_job;
  end loop;
  delete from nightowls.settings s where s.name = 'clock_every';
  return v_jobs <> '{}';
end;
$$;

comment on function nightowls.unschedule() is
  'Takes the job "nightowls" out of pg_cron; false if there was none that the caller sees. One that runs at this moment runs to its end. Waits for nobody. '
  'Raises 42501 without rights on pg_cron.';

revoke all on function nightowls.unschedule() from public;

-- Whether a job of pg_cron is the clock here, so that the worker need not be.
create function nightowls._cron_ticks()
  returns boolean
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_ticks boolean := false;
begin
  if exists (select from pg_extension e where e.extname = 'pg_cron') then
    execute format('select exists (select from %s j where j.jobname = $1 and j.active and j.database = current_database())', to_regclass('cron.job'))
       into v_ticks using 'nightowls';
  end if;
  return v_ticks;
end;
$$;

revoke all on function nightowls._cron_ticks() from public;

-- Seeing it ----------------------------------------------------------------------------------------

create function nightowls._health_clock()
  returns setof nightowls._check
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_late   interval := greatest(interval '10 minutes', 3 * coalesce((
    select (s.value #>> '{}')::int from nightowls.settings s where s.name = 'clock_every'), 0) * interval '1 second');
  v_last   timestamptz := (select max(c.ran_at) from nightowls.clock_parts c);
  v_runs   boolean := coalesce(v_last > clock_timestamp() - v_late, false);
  v_failed text;
begin
  select string_agg(format('%s: %s', c.part,
           case when c.error is not null then c.error
                when c.took_ms is null then format('began %s and did not come to an end', c.ran_at)
                else format('last ran %s', c.ran_at) end), '; ' order by c.part) into v_failed
    from nightowls.clock_parts c
   where c.error is not null or v_runs and c.ran_at < clock_timestamp() - v_late;
  return query
    select 'clock', 'running', v_runs,
           case when v_last is null then 'it has never run'
                else format('last ran %s s ago', greatest(floor(extract(epoch from clock_timestamp() - v_last)), 0)) end,
           case when not v_runs
                then 'Nothing is tidied up and nothing runs by itself: select nightowls.schedule() with pg_cron, or owl tick --every 60s.' end
     union all
    select 'clock', 'parts', v_failed is null, coalesce(v_failed, 'no part failed when it last ran'),
           case when v_failed is not null
                then 'The other parts go on. Mend what the error says; select * from nightowls.tick() tries again, clock_parts has all.' end;
end;
$$;

revoke all on function nightowls._health_clock() from public;

alter table nightowls.clock_parts enable row level security;
alter table nightowls.clock_parts force row level security;
create policy service_all on nightowls.clock_parts
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));
