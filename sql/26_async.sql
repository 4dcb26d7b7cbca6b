-- Async projections: their states are kept by a consumer instead of the appends, whenever somebody calls run_projections. An
-- append does nothing for them. A state that is behind is never wrong: whoever asks for it folds the rest.

-- The newest row of the consumer of an async projection, locked until the transaction ends; null if somebody else has it and
-- wait is false. Definer: the tables are closed.
create function nightowls._lock_async(org uuid, projection text, wait boolean)
  returns nightowls._consumer_offsets
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_name  text := 'projection:' || _lock_async.projection;
  v_state nightowls._consumer_offsets;
begin
  if nightowls._lock_share(_lock_async.org, v_name, 0, _lock_async.wait) then
    select s.* into v_state
      from nightowls.consumers c
     cross join lateral nightowls._share_states(c) s
     where c.org_id = _lock_async.org and c.name = v_name;
  end if;
  return v_state;
end;
$$;

revoke all on function nightowls._lock_async(uuid, text, boolean) from public;

-- Where the consumer of an async projection goes on: at the mark of a build, which has seen everything up to there. It is made
-- by the first build. Its caller has it locked. Definer: the tables are closed.
create function nightowls._restart_async(org uuid, projection text, mark bigint)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_name       text := 'projection:' || _restart_async.projection;
  v_projection nightowls.projections;
begin
  select p.* into strict v_projection
    from nightowls.projections p
   where p.org_id = _restart_async.org and p.name = _restart_async.projection and p.mode = 'async';
  perform nightowls._register_consumer(
    _restart_async.org, v_name, jsonb_build_object('aggregate_types', jsonb_build_array(v_projection.aggregate_type)),
    0, 1, 5, interval '1 second');
  delete from nightowls._consumer_failures f where f.org_id = _restart_async.org and f.consumer = v_name;
  perform nightowls._begin_shares(_restart_async.org, v_name, 1, greatest(_restart_async.mark, 0));
  -- What is behind is known by the offset.
  update nightowls.projections p
     set lagging_from = null
   where p.org_id = _restart_async.org and p.name = _restart_async.projection;
end;
$$;

revoke all on function nightowls._restart_async(uuid, text, bigint) from public;

-- Moves the consumer of an async projection on, never back. Its caller has it locked. Definer: the tables are closed.
create function nightowls._advance_async(org uuid, projection text, up_to bigint)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_state nightowls._consumer_offsets := nightowls._lock_async(_advance_async.org, _advance_async.projection, true);
begin
  if _advance_async.up_to > v_state."offset" then
    v_state."offset" := _advance_async.up_to;
    perform nightowls._write_share(v_state);
  end if;
end;
$$;

revoke all on function nightowls._advance_async(uuid, text, bigint) from public;

-- Notes that the state of an aggregate cannot be folded on (error), or can again (null). Definer: the tables are closed.
create function nightowls._note_async(projection nightowls.projections, ids text[], error text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_name text := 'projection:' || (_note_async.projection).name;
begin
  delete from nightowls._consumer_failures f
   using nightowls.events e
   where f.org_id = (_note_async.projection).org_id and f.consumer = v_name
     and e.org_id = f.org_id and e."position" = f."position" and e.aggregate_id = any (_note_async.ids);
  if _note_async.error is not null then
    -- The first event that is not in the stored state holds the rest back.
    insert into nightowls._consumer_failures (org_id, consumer, "position", attempts, error, parked_at)
    select e.org_id, v_name, e."position", 1, _note_async.error, clock_timestamp()
      from unnest(_note_async.ids) as i (aggregate_id)
     cross join lateral (
             select x.org_id, x."position"
               from nightowls.events x
              where x.org_id = (_note_async.projection).org_id
                and x.aggregate_type = (_note_async.projection).aggregate_type
                and x.aggregate_id = i.aggregate_id
                and x.version > coalesce((
                      select s.version
                        from nightowls._projection_states s
                       where s.org_id = x.org_id and s.projection = (_note_async.projection).name
                         and s.generation = (_note_async.projection).generation and s.aggregate_id = i.aggregate_id
                       order by s.version desc
                       limit 1), 0)
              order by x.version
              limit 1) e
        on conflict do nothing;
  end if;
end;
$$;

revoke all on function nightowls._note_async(nightowls.projections, text[], text) from public;

-- Folds what is new of some aggregates into their stored states. Definer: nobody else may write states. Reducers only: it runs as the owner.
create function nightowls._project_async(org uuid, projection text, ids text[])
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_sort to off
  set enable_bitmapscan to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
declare
  v_door       text := coalesce(current_setting('nightowls.door', true), '');
  v_projection nightowls.projections;
  v_id         text;
  v_old        record;
  v_new        record;
begin
  select p.* into strict v_projection
    from nightowls.projections p
   where p.org_id = _project_async.org and p.name = _project_async.projection and p.kind = 'reducer' and p.mode = 'async';
  perform nightowls._open_door('project');
  foreach v_id in array _project_async.ids loop
    select s.ctid, s.version, s.state
      into v_old
      from nightowls._projection_states s
     where s.org_id = v_projection.org_id and s.projection = v_projection.name and s.generation = v_projection.generation
       and s.aggregate_id = v_id
     order by s.version desc
     limit 1;
    v_new := nightowls._fold_tail(
      v_projection.org_id, v_projection.reducer,
      case when v_old.version is null then coalesce(v_projection.reducer -> 'initial', '{}') else v_old.state end,
      v_projection.aggregate_type, v_id, coalesce(v_old.version, 0) + 1, null);
    continue when v_new.version is null;
    if v_old.version is not null then
      delete from nightowls._projection_states s
       where s.ctid = any (array(
               select x.ctid from nightowls._projection_states x where x.ctid = v_old.ctid for update skip locked));
    end if;
    insert into nightowls._projection_states (org_id, projection, generation, aggregate_id, version, "position", state)
    values (v_projection.org_id, v_projection.name, v_projection.generation, v_id, v_new.version, v_new."position", v_new.state)
    on conflict do nothing;
    if v_new.version / v_projection.snapshot_every > coalesce(v_old.version, 0) / v_projection.snapshot_every then
      perform nightowls._snapshot_stored(v_projection.org_id, array[v_projection.name], array[v_projection.generation], array[v_id]);
    end if;
  end loop;
  perform set_config('nightowls.door', v_door, true);
end;
$$;

revoke all on function nightowls._project_async(uuid, text, text[]) from public;

-- Folds some aggregates of a projection on; handlers as the caller.
create function nightowls._fold_async(projection nightowls.projections, ids text[])
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_id text;
begin
  if (_fold_async.projection).kind = 'reducer' then
    perform nightowls._project_async((_fold_async.projection).org_id, (_fold_async.projection).name, _fold_async.ids);
  else
    foreach v_id in array _fold_async.ids loop
      perform nightowls._project_by_handler(_fold_async.projection, v_id);
    end loop;
  end if;
end;
$$;

revoke all on function nightowls._fold_async(nightowls.projections, text[]) from public;

-- Folds some aggregates on, and leaves out those whose events do not fit: what stops one must not stop the others.
-- Returns the last error, null if there was none. What will pass by itself (a conflict, a lock, a shutdown) is raised.
create function nightowls._try_fold_async(projection nightowls.projections, ids text[])
  returns text
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_passing constant text := '^(08|25|40|53|55|57|58|XX)';
  v_failed  text[];
  v_id      text;
  v_error   text;
begin
  begin
    perform nightowls._fold_async(_try_fold_async.projection, _try_fold_async.ids);
    v_failed := '{}';
  exception when others then
    if sqlstate ~ v_passing then
      raise;
    end if;
    v_failed := _try_fold_async.ids;
  end;
  foreach v_id in array v_failed loop
    begin
      perform nightowls._fold_async(_try_fold_async.projection, array[v_id]);
      v_failed := array_remove(v_failed, v_id);
    exception when others then
      if sqlstate ~ v_passing then
        raise;
      end if;
      v_error := format('%s %s', sqlstate, sqlerrm);
      perform nightowls._note_async(_try_fold_async.projection, array[v_id], v_error);
    end;
  end loop;
  if exists (
       select from nightowls._consumer_failures f
        where f.org_id = (_try_fold_async.projection).org_id and f.consumer = 'projection:' || (_try_fold_async.projection).name) then
    perform nightowls._note_async(
      _try_fold_async.projection, array(select unnest(_try_fold_async.ids) except select unnest(v_failed)), null);
  end if;
  return v_error;
end;
$$;

revoke all on function nightowls._try_fold_async(nightowls.projections, text[]) from public;

-- Takes one async projection on by at most max_events events of the log. events: how many were looked at, null when somebody
-- else is at it or there is nothing new. With wait => false nobody is waited for, and locks says how many of them it has taken.
create function nightowls._run_async(
  org          uuid,
  name         text,
  max_events   int,
  wait         boolean,
  out events   bigint,
  out "offset" bigint,
  out error    text,
  out locks    int
)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_bitmapscan to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
declare
  v_state      nightowls._consumer_offsets;
  v_projection nightowls.projections;
  v_safe       bigint;
  v_seen       record;
begin
  locks := 0;
  if _run_async.wait then
    -- A build takes its locks in this order.
    perform nightowls._share_erasure(_run_async.org);
  end if;
  v_state := nightowls._lock_async(_run_async.org, _run_async.name, _run_async.wait);
  if v_state."offset" is null then
    return;
  end if;
  locks := 1;
  if not _run_async.wait then
    -- The other way round is no deadlock where neither is waited for, and what somebody else is at costs no lock.
    if not nightowls._try_share_erasure(_run_async.org) then
      return;
    end if;
    locks := 2;
  end if;
  -- With the lock held no build can put another generation in its place.
  v_projection := nightowls._projection(_run_async.name, _run_async.org);
  v_safe := nightowls._safe_position(_run_async.org, v_state."offset");
  "offset" := v_state."offset";
  if v_safe <= v_state."offset" then
    return;
  end if;
  select count(*) as events, max(w."position") as last_position,
         array_agg(distinct w.aggregate_id) filter (where w.aggregate_type = v_projection.aggregate_type) as ids
    into v_seen
    from (select e."position", e.aggregate_type, e.aggregate_id
            from nightowls.events e
           where e.org_id = _run_async.org and e."position" > v_state."offset" and e."position" <= v_safe
           order by e."position"
           limit _run_async.max_events) w;
  if v_seen.ids is not null then
    error := nightowls._try_fold_async(v_projection, v_seen.ids);
  end if;
  events := v_seen.events;
  "offset" := case when v_seen.events < _run_async.max_events then v_safe else v_seen.last_position end;
  perform nightowls._advance_async(_run_async.org, _run_async.name, "offset");
end;
$$;

revoke all on function nightowls._run_async(uuid, text, int, boolean) from public;

-- Brings an async projection up to what is in the log now, and tries again what had failed.
create function nightowls._refresh_async(projection nightowls.projections)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_until bigint := nightowls._safe_position((_refresh_async.projection).org_id, -1);
  v_run   record;
  v_ids   text[];
begin
  loop
    v_run := nightowls._run_async((_refresh_async.projection).org_id, (_refresh_async.projection).name, 10000, true);
    exit when v_run.events is null or v_run."offset" >= v_until;
  end loop;
  select array_agg(distinct e.aggregate_id) into v_ids
    from nightowls._consumer_failures f
    join nightowls.events e on e.org_id = f.org_id and e."position" = f."position"
   where f.org_id = (_refresh_async.projection).org_id and f.consumer = 'projection:' || (_refresh_async.projection).name;
  if v_ids is not null then
    perform nightowls._try_fold_async(
      nightowls._projection((_refresh_async.projection).name, (_refresh_async.projection).org_id), v_ids);
  end if;
end;
$$;

revoke all on function nightowls._refresh_async(nightowls.projections) from public;

create function nightowls.run_projections(max_events int default 10000, max_ms int default 5000)
  returns table (org_id uuid, projection text, events bigint, "offset" bigint, error text)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_until  timestamptz := clock_timestamp() + run_projections.max_ms * interval '1 ms';
  v_left   bigint := run_projections.max_events;
  v_locks  int := 0;
  v_erased uuid[] := '{}';
  v_run    record;
begin
  perform nightowls._check_max_events(run_projections.max_events);
  if run_projections.max_ms is null then
    raise exception 'max_ms must not be null' using errcode = 'null_value_not_allowed';
  elsif run_projections.max_ms < 1 then
    raise exception 'max_ms must be 1 or more' using errcode = 'invalid_parameter_value';
  end if;
  perform nightowls._refuse_snapshot('keeping projections');

  -- Who was served longest ago comes first, and gets a part; so a busy org starves nobody.
  for org_id, projection in
    select c.org_id, substr(c.name, length('projection:') + 1)
      from nightowls.consumers c
     cross join lateral nightowls._share_states(c) s
     where starts_with(c.name, 'projection:')
     order by s.created_at, c.org_id, c.name
  loop
    -- Each that is taken on keeps two locks until the transaction ends; who is left out now comes first in the next call.
    exit when v_left <= 0 or v_locks >= 50 or clock_timestamp() >= v_until;
    continue when org_id = any (v_erased);
    events := 0;
    error := null;
    "offset" := (
      select s."offset"
        from nightowls.consumers c
       cross join lateral nightowls._share_states(c) s
       where c.org_id = run_projections.org_id and c.name = 'projection:' || run_projections.projection);
    continue when "offset" is null or nightowls._safe_position(org_id, "offset") <= "offset";
    -- The transaction may have had locks before, as the clock's has.
    exit when v_locks > 0 and nightowls._locks_held() >= 60;
    begin
      loop
        v_run := nightowls._run_async(org_id, projection, least(v_left, 1000)::int, false);
        exit when v_run.events is null;
        events := events + v_run.events;
        "offset" := v_run."offset";
        error := coalesce(v_run.error, error);
        v_left := v_left - v_run.events;
        exit when v_left <= 0 or clock_timestamp() >= v_until or events >= greatest(run_projections.max_events / 4, 1000);
      end loop;
      v_locks := v_locks + v_run.locks;
      if v_run.locks = 1 then
        -- Something of this org is being erased: its other projections would cost a lock each.
        v_erased := v_erased || org_id;
      end if;
    exception when others then
      -- It will pass, and is tried again by the next call: nothing of it is kept, its locks neither.
      v_left := v_left + events;
      events := 0;
      error := format('%s %s', sqlstate, sqlerrm);
    end;
    if events > 0 or error is not null then
      return next;
    end if;
  end loop;
end;
$$;

comment on function nightowls.run_projections(int, int) is
  'Keeps the projections of mode async, of all orgs in turn: to be called by a cron job or a worker, as often as their stored states are to be fresh. '
  'max_events: how many events of the log to look at, all together; max_ms: begin nothing new after so many milliseconds. The one served longest ago '
  'comes first, none gets more than a quarter of max_events (or 1000), and a call takes on 25 projections at most, as each keeps two locks until the transaction '
  'ends: whoever was left out comes first in the next call, so call again at once while rows come. Returns a row for each projection that was taken on: '
  'org, name, the events looked at, the offset reached, and the last error if the events of an aggregate do not fit the reducer or the handler raised: that '
  'aggregate stays behind, and is in parked_events, until its next event or refresh_projection(); the others go on. An error that will pass (a conflict, a '
  'lock) undoes what this call did for that projection, 0 events, and stops no other. No rows: nothing to do. Handlers run as the caller. Waits for '
  'nobody: it leaves alone what another call or a build is at, and the orgs in which something is being erased. Raises 22004 or 22023 for an argument that is null or below 1, '
  '25001 above read committed, 55000 on a standby.';

revoke all on function nightowls.run_projections(int, int) from public;
