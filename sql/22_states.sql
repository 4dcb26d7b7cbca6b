-- Making projections, asking for states, building them anew and checking them.

create function nightowls._projection(name text, org uuid)
  returns nightowls.projections
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_projection nightowls.projections;
begin
  select p.* into v_projection
    from nightowls.projections p
   where p.org_id = _projection.org and p.name = _projection.name;
  if not found then
    perform nightowls._refuse_unknown('projection', _projection.name, array(
      select p.name from nightowls.projections p where p.org_id = _projection.org));
  end if;
  return v_projection;
end;
$$;

revoke all on function nightowls._projection(text, uuid) from public;

-- A function's qualified name, from a name as the user writes it. arguments: the lists it may take, best first; which
-- of them it takes comes back as taken.
create function nightowls._resolve_handler(handler text, arguments text[], out name text, out taken int)
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_oid oid;
begin
  if _resolve_handler.handler ~ '^[^().]+\.[^().]+$' then
    for i in 1 .. cardinality(_resolve_handler.arguments) loop
      v_oid := to_regprocedure(_resolve_handler.handler || _resolve_handler.arguments[i]);
      if v_oid is not null then
        select format('%I.%I', n.nspname, p.proname), i
          into _resolve_handler.name, _resolve_handler.taken
          from pg_proc p join pg_namespace n on n.oid = p.pronamespace
         where p.oid = v_oid;
        return;
      end if;
    end loop;
  end if;
  raise exception 'handler "%" is not a function that fits', left(_resolve_handler.handler, 128)
    using errcode = 'undefined_function',
          hint = format('Give schema.name of a function that takes %s.', array_to_string(_resolve_handler.arguments, ' or '));
end;
$$;

revoke all on function nightowls._resolve_handler(text, text[]) from public;

create function nightowls._check_projection_name(name text)
  returns void
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if _check_projection_name.name is null then
    raise exception 'name must not be null' using errcode = 'null_value_not_allowed';
  elsif _check_projection_name.name = '' then
    raise exception 'name must not be empty' using errcode = 'invalid_parameter_value';
  elsif octet_length(_check_projection_name.name) > 255 then
    raise exception 'name is too long'
      using errcode = 'program_limit_exceeded', detail = 'A projection''s name has at most 255 bytes.';
  end if;
end;
$$;

revoke all on function nightowls._check_projection_name(text) from public;

-- Writes a projection down, unless it is there with the same definition (false). Definer: the table is closed.
-- Only what runs no code of the owner's can be written here by others: reducers and handlers.
create function nightowls._register_projection(definition nightowls.projections)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_found nightowls.projections;
begin
  perform nightowls._refuse_no_org((_register_projection.definition).org_id);
  insert into nightowls.projections
         (org_id, name, kind, aggregate_type, reducer, handler, target, query, refresh_every, mode, lagging_from)
  select (_register_projection.definition).org_id, (_register_projection.definition).name,
         (_register_projection.definition).kind, (_register_projection.definition).aggregate_type,
         (_register_projection.definition).reducer, (_register_projection.definition).handler,
         (_register_projection.definition).target, (_register_projection.definition).query,
         (_register_projection.definition).refresh_every, coalesce((_register_projection.definition).mode, 'inline'), (_register_projection.definition).lagging_from
  on conflict do nothing;
  if not found then
    select p.* into v_found
      from nightowls.projections p
     where p.org_id = (_register_projection.definition).org_id and p.name = (_register_projection.definition).name;
    if (v_found.kind, v_found.mode, v_found.aggregate_type, v_found.reducer, v_found.handler, v_found.target, v_found.query)
         is distinct from
       ((_register_projection.definition).kind, coalesce((_register_projection.definition).mode, 'inline'),
        (_register_projection.definition).aggregate_type,
        (_register_projection.definition).reducer, (_register_projection.definition).handler,
        (_register_projection.definition).target, (_register_projection.definition).query) then
      raise exception 'projection "%" exists already with another definition', v_found.name
        using errcode = 'duplicate_object',
              hint = 'Change it with nightowls.alter_projection(), or drop it with nightowls.drop_projection().';
    end if;
    return false;
  end if;

  if (_register_projection.definition).kind <> 'view' and coalesce((_register_projection.definition).mode, 'inline') = 'inline' then
    perform nightowls._lock_history((_register_projection.definition).org_id, (_register_projection.definition).aggregate_type, false);
    perform nightowls._refuse_without_history((_register_projection.definition).org_id,
                                              (_register_projection.definition).aggregate_type,
                                              (_register_projection.definition).name);
    insert into nightowls.routes (org_id, aggregate_type, kind, name)
    values ((_register_projection.definition).org_id, (_register_projection.definition).aggregate_type,
            case (_register_projection.definition).kind when 'reducer' then 'reducer' else 'handler' end,
            (_register_projection.definition).name);
  end if;
  return true;
end;
$$;

revoke all on function nightowls._register_projection(nightowls.projections) from public;

-- Where a build begins: events at or below are all visible to the statements that follow.
create function nightowls._build_mark(org uuid)
  returns bigint
  language sql
  volatile
  parallel unsafe
  return nightowls._safe_position(org, -1);

revoke all on function nightowls._build_mark(uuid) from public;

-- Begins a generation: removes what the build before this one replaced, which nobody reads any more, and carries over the
-- snapshots that a replay has proven, unless the projection folds otherwise from now on. A handler's code can have changed without
-- our knowing: of its snapshots only those are carried over whose events are gone.
-- Definer: nobody else may write states and snapshots.
create function nightowls._begin_generation(definition nightowls.projections, build bigint, carried boolean)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_live nightowls.projections;
begin
  select p.* into strict v_live
    from nightowls.projections p
   where p.org_id = (_begin_generation.definition).org_id and p.name = (_begin_generation.definition).name;
  perform nightowls._open_door('project');
  delete from nightowls._projection_states s
   where s.org_id = v_live.org_id and s.projection = v_live.name
     and s.generation < _begin_generation.build and s.generation <> v_live.generation;
  delete from nightowls.snapshots s
   where s.org_id = v_live.org_id and s.projection = v_live.name
     and s.generation < _begin_generation.build and s.generation <> v_live.generation;
  delete from nightowls._replays r
   where r.org_id = v_live.org_id and r.projection = v_live.name
     and r.generation < _begin_generation.build and r.generation <> v_live.generation;
  if _begin_generation.carried then
    insert into nightowls.snapshots
           (org_id, projection, generation, aggregate_id, version, "position", state, latest_at, proven, created_at)
    select s.org_id, s.projection, _begin_generation.build, s.aggregate_id, s.version, s."position", s.state, s.latest_at,
           s.proven, s.created_at
      from nightowls.snapshots s
     where s.org_id = v_live.org_id and s.projection = v_live.name and s.generation = v_live.generation and s.proven
       and (v_live.kind = 'reducer' or exists (
              select from nightowls.compactions c
               where c.org_id = s.org_id and c.aggregate_type = v_live.aggregate_type and c.aggregate_id = s.aggregate_id
                 and c.deleted_to > 0))
    on conflict do nothing;
  end if;
  perform nightowls._shut_door();
end;
$$;

revoke all on function nightowls._begin_generation(nightowls.projections, bigint, boolean) from public;

-- Fills a generation with the states of all aggregates of the type, from events as they are, then makes it the live one.
-- Nobody waits for this: appends go on with the generation they see, and those that end meanwhile are folded in later
-- (lagging_from). Definer: nobody else may write states. Reducers only: it runs as the owner.
create function nightowls._build_states(org uuid, name text, build bigint, mark bigint, anew boolean)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
declare
  v_projection nightowls.projections;
begin
  select p.* into strict v_projection
    from nightowls.projections p
   where p.org_id = _build_states.org and p.name = _build_states.name;
  perform nightowls._begin_generation(v_projection, _build_states.build, not _build_states.anew);
  perform nightowls._open_door('project');
  insert into nightowls._projection_states (org_id, projection, generation, aggregate_id, version, "position", state)
  select _build_states.org, v_projection.name, _build_states.build, a.aggregate_id, coalesce(f.version, b.version),
         coalesce(f."position", b."position"), f.state
    from (select distinct e.aggregate_id
            from nightowls.events e
           where e.org_id = _build_states.org and e.aggregate_type = v_projection.aggregate_type) a
    left join lateral (
           select s.version, s."position", s.state
             from nightowls.snapshots s
            where s.org_id = _build_states.org and s.projection = v_projection.name
              and s.generation = _build_states.build and s.aggregate_id = a.aggregate_id
            order by s.version desc
            limit 1) b on true
   cross join lateral nightowls._fold_tail(
           _build_states.org, v_projection.reducer,
           case when b.version is null then coalesce(v_projection.reducer -> 'initial', '{}') else b.state end,
           v_projection.aggregate_type, a.aggregate_id, coalesce(b.version, 0) + 1, null) f
   where coalesce(f.version, b.version) is not null
  on conflict do nothing;

  -- Those that have one by now get it at once, so that none has to be made of a long history later.
  insert into nightowls.snapshots (org_id, projection, generation, aggregate_id, version, "position", state, latest_at)
  select s.org_id, s.projection, s.generation, s.aggregate_id, s.version, s."position", s.state, (
           select max(e.created_at)
             from nightowls.all_events e
            where e.org_id = _build_states.org and e.aggregate_type = v_projection.aggregate_type
              and e.aggregate_id = s.aggregate_id and e.version <= s.version)
    from nightowls._projection_states s
   where s.org_id = _build_states.org and s.projection = v_projection.name and s.generation = _build_states.build
     and s.version >= v_projection.snapshot_every
  on conflict do nothing;

  update nightowls.projections p
     set generation = _build_states.build, lagging_from = _build_states.mark, refreshed_at = clock_timestamp()
   where p.org_id = _build_states.org and p.name = _build_states.name;
  perform nightowls._shut_door();
end;
$$;

revoke all on function nightowls._build_states(uuid, text, bigint, bigint, boolean) from public;

-- The same for a handler's states, as the caller.
create function nightowls._build_by_handler(projection nightowls.projections, build bigint)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_id     text;
  v_base   record;
  v_folded record;
begin
  for v_id in
    select distinct e.aggregate_id
      from nightowls.events e
     where e.org_id = (_build_by_handler.projection).org_id
       and e.aggregate_type = (_build_by_handler.projection).aggregate_type
  loop
    select s.version, s."position", s.state into v_base
      from nightowls.snapshots s
     where s.org_id = (_build_by_handler.projection).org_id and s.projection = (_build_by_handler.projection).name
       and s.generation = _build_by_handler.build and s.aggregate_id = v_id
     order by s.version desc
     limit 1;
    select f.state, coalesce(f.version, v_base.version) as version, coalesce(f."position", v_base."position") as "position"
      into v_folded
      from nightowls._fold_by_handler(
             (_build_by_handler.projection).org_id, (_build_by_handler.projection).handler, v_base.state,
             (_build_by_handler.projection).aggregate_type, v_id, coalesce(v_base.version, 0) + 1, null) f;
    if v_folded.version is not null then
      perform nightowls._save_state(
        (_build_by_handler.projection).org_id, (_build_by_handler.projection).name, _build_by_handler.build, v_id, null,
        v_folded.version, v_folded."position", v_folded.state);
      if v_folded.version >= (_build_by_handler.projection).snapshot_every then
        perform nightowls._save_snapshot(
          (_build_by_handler.projection).org_id, (_build_by_handler.projection).name, _build_by_handler.build, v_id,
          v_folded.version, v_folded."position", v_folded.state);
      end if;
    end if;
  end loop;
end;
$$;

revoke all on function nightowls._build_by_handler(nightowls.projections, bigint) from public;

-- Makes a generation built by a handler the live one. Definer: the table is closed.
create function nightowls._go_live(org uuid, name text, build bigint, mark bigint)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  update nightowls.projections p
     set generation = _go_live.build, lagging_from = _go_live.mark, refreshed_at = clock_timestamp()
   where p.org_id = _go_live.org and p.name = _go_live.name;
end;
$$;

revoke all on function nightowls._go_live(uuid, text, bigint, bigint) from public;

-- One build at a time for a projection; the generation it is to make. Definer: the sequence is closed.
create function nightowls._begin_build(org uuid, name text)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform nightowls._share_erasure(_begin_build.org);
  perform pg_advisory_xact_lock(
    nightowls._lock_class(259), hashtext(_begin_build.org::text || '/' || _begin_build.name));
  perform nightowls._lock_history(p.org_id, p.aggregate_type, false)
     from nightowls.projections p
    where p.org_id = _begin_build.org and p.name = _begin_build.name;
  return nextval('nightowls.projection_generations');
end;
$$;

revoke all on function nightowls._begin_build(uuid, text) from public;

create function nightowls.create_projection(
  name           text,
  aggregate_type text,
  reducer        jsonb default null,
  handler        text default null,
  mode           text default 'inline',
  org            uuid default null
)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org        uuid := nightowls.current_org(create_projection.org);
  v_definition nightowls.projections;
  v_taken      int;
  v_mark       bigint;
begin
  perform nightowls._check_projection_name(create_projection.name);
  if octet_length(create_projection.aggregate_type) not between 1 and 255 or create_projection.aggregate_type is null then
    perform nightowls._refuse_names(create_projection.aggregate_type, 'any', 'any');
  end if;
  if (create_projection.reducer is null) = (create_projection.handler is null) then
    raise exception 'a projection needs a reducer or a handler, not both'
      using errcode = 'invalid_parameter_value';
  elsif (create_projection.mode in ('inline', 'async')) is not true then
    raise exception 'mode must be inline or async' using errcode = 'invalid_parameter_value';
  end if;

  v_definition.org_id := v_org;
  v_definition.name := create_projection.name;
  v_definition.aggregate_type := create_projection.aggregate_type;
  v_definition.mode := create_projection.mode;
  if create_projection.reducer is not null then
    perform nightowls.check_reducer(create_projection.reducer);
    v_definition.kind := 'reducer';
    v_definition.reducer := create_projection.reducer;
  else
    v_definition.kind := 'handler';
    v_definition.handler := (nightowls._resolve_handler(
      create_projection.handler, array['(jsonb, nightowls.events)'])).name;
  end if;

  v_mark := nightowls._build_mark(v_org);
  v_definition.lagging_from := v_mark;
  if not nightowls._register_projection(v_definition) then
    return;
  end if;
  perform nightowls._rebuild_states(v_definition.name, v_org, v_mark, true);
end;
$$;

comment on function nightowls.create_projection(text, text, jsonb, text, text, uuid) is
  'Makes a projection: a state for each aggregate of aggregate_type, by default kept in the transaction that appends. name: unique in the org. '
  'Give one of reducer (JSON, see docs/projections.md) and handler (schema.name of a function (state jsonb, event nightowls.events) '
  'returns jsonb, run as the one who appends); mode: inline, or async: kept by run_projections() instead, so that appends do nothing for it, and '
  'state() is exact all the same; org: the tenant. What is in the log is folded in before this returns; '
  'nobody waits for that. The same definition again changes nothing. Raises 22023 for a reducer that is not valid, with the '
  'path at fault, 42710 if the projection exists with another definition, 42883 if the handler does not exist, '
  '25001 above read committed, 22004 for a null name, NW010 if there is no org.';

revoke all on function nightowls.create_projection(text, text, jsonb, text, text, uuid) from public;

-- Builds the next generation of a projection's states beside the live one. anew: it folds otherwise than before.
create function nightowls._rebuild_states(name text, org uuid, mark bigint, anew boolean)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_build      bigint := nightowls._begin_build(_rebuild_states.org, _rebuild_states.name);
  v_projection nightowls.projections := nightowls._projection(_rebuild_states.name, _rebuild_states.org);
begin
  if v_projection.mode = 'async' then
    -- What it folds meanwhile would go into the old generation.
    perform nightowls._lock_share(_rebuild_states.org, 'projection:' || _rebuild_states.name, 0, true);
  end if;
  if _rebuild_states.anew then
    perform nightowls._refuse_without_history(_rebuild_states.org, v_projection.aggregate_type, _rebuild_states.name);
  end if;
  if v_projection.kind = 'reducer' then
    perform nightowls._build_states(
      _rebuild_states.org, _rebuild_states.name, v_build, _rebuild_states.mark, _rebuild_states.anew);
  else
    perform nightowls._begin_generation(v_projection, v_build, not _rebuild_states.anew);
    perform nightowls._build_by_handler(v_projection, v_build);
    perform nightowls._go_live(_rebuild_states.org, _rebuild_states.name, v_build, _rebuild_states.mark);
  end if;
  if v_projection.mode = 'async' then
    perform nightowls._restart_async(_rebuild_states.org, _rebuild_states.name, _rebuild_states.mark);
  end if;
end;
$$;

revoke all on function nightowls._rebuild_states(text, uuid, bigint, boolean) from public;

-- Puts a changed reducer or handler in place. Definer: the table is closed.
create function nightowls._redefine_projection(org uuid, name text, reducer jsonb, handler text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  update nightowls.projections p
     set reducer = _redefine_projection.reducer, handler = _redefine_projection.handler
   where p.org_id = _redefine_projection.org and p.name = _redefine_projection.name
     and p.kind in ('reducer', 'handler');
end;
$$;

revoke all on function nightowls._redefine_projection(uuid, text, jsonb, text) from public;

create function nightowls.alter_projection(
  name    text,
  reducer jsonb default null,
  handler text default null,
  org     uuid default null
)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org        uuid := nightowls.current_org(alter_projection.org);
  v_projection nightowls.projections := nightowls._projection(alter_projection.name, v_org);
  v_handler    text;
  v_mark       bigint;
begin
  if v_projection.kind = 'reducer' and alter_projection.reducer is not null and alter_projection.handler is null then
    perform nightowls.check_reducer(alter_projection.reducer);
  elsif v_projection.kind = 'handler' and alter_projection.handler is not null and alter_projection.reducer is null then
    v_handler := (nightowls._resolve_handler(alter_projection.handler, array['(jsonb, nightowls.events)'])).name;
  else
    raise exception 'projection "%" is of kind %: that cannot be changed so', v_projection.name, v_projection.kind
      using errcode = 'invalid_parameter_value',
            hint = 'Give a reducer for kind reducer, a handler for kind handler; drop and make the others anew.';
  end if;
  v_mark := nightowls._build_mark(v_org);
  perform nightowls._redefine_projection(v_org, v_projection.name, alter_projection.reducer, v_handler);
  perform nightowls._rebuild_states(v_projection.name, v_org, v_mark,
                                    (v_projection.reducer, v_projection.handler) is distinct from (alter_projection.reducer, v_handler));
end;
$$;

comment on function nightowls.alter_projection(text, jsonb, text, uuid) is
  'Gives a projection another reducer or handler and builds its states anew beside the old ones, then swaps them; nobody waits. '
  'name: the projection; reducer or handler: as in create_projection; org: the tenant. Waits for another build of the same projection. '
  'Raises NW007 if the projection does not exist, 22023 for a reducer that is not valid or does not fit its kind, 42883 if the '
  'handler does not exist, 25001 above read committed, NW010 if there is no org.';

revoke all on function nightowls.alter_projection(text, jsonb, text, uuid) from public;

-- The state of one aggregate at a version (null: now).
create function nightowls._state(projection nightowls.projections, aggregate_id text, to_version bigint)
  returns jsonb
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if (_state.projection).kind not in ('reducer', 'handler') then
    perform nightowls._refuse_stateless(_state.projection);
  elsif _state.aggregate_id is null then
    raise exception 'aggregate_id must not be null' using errcode = 'null_value_not_allowed';
  end if;
  return (nightowls._load(_state.projection, _state.aggregate_id, _state.to_version)).state;
end;
$$;

revoke all on function nightowls._state(nightowls.projections, text, bigint) from public;

create function nightowls.state(projection text, aggregate_id text, org uuid default null)
  returns jsonb
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return nightowls._state(
    nightowls._projection(state.projection, nightowls.current_org(state.org)), state.aggregate_id, null);
end;
$$;

comment on function nightowls.state(text, text, uuid) is
  'The state of one aggregate in a projection: what is stored and the events after it. null if the aggregate does not exist or '
  'was tombstoned. projection: its name; aggregate_id: which one; org: the tenant. Locks nothing. Raises NW007 if the projection does '
  'not exist, 22023 for a table or view projection, 22004 for a null argument, NW010 if there is no org.';

revoke all on function nightowls.state(text, text, uuid) from public;

create function nightowls.state_at(projection text, aggregate_id text, version bigint, org uuid default null)
  returns jsonb
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_projection nightowls.projections :=
    nightowls._projection(state_at.projection, nightowls.current_org(state_at.org));
begin
  if state_at.version is null then
    raise exception 'version must not be null' using errcode = 'null_value_not_allowed', hint = 'For the newest use nightowls.state().';
  elsif state_at.version < 0 then
    raise exception 'version must be 0 or more' using errcode = 'invalid_parameter_value';
  end if;
  return nightowls._state(v_projection, state_at.aggregate_id, state_at.version);
end;
$$;

comment on function nightowls.state_at(text, text, bigint, uuid) is
  'The state of one aggregate in a projection as it was at a version; above the newest version, the newest state. null if the aggregate '
  'did not exist then or was tombstoned. projection: its name; org: the tenant. Locks nothing. Raises as state(), and 22023 for a '
  'negative version.';

revoke all on function nightowls.state_at(text, text, bigint, uuid) from public;

-- The last version before the first event that was created after a time; null if there is no such event. Times are not
-- always rising with versions, so it is looked for in version order, beginning with the newest snapshot that holds nothing later.
create function nightowls._version_at_time(definition nightowls.projections, aggregate_id text, at timestamptz)
  returns bigint
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_sort to off
  set enable_bitmapscan to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
declare
  v_base bigint := coalesce((
    select s.version
      from nightowls.snapshots s
     where s.org_id = (_version_at_time.definition).org_id
       and s.projection = (_version_at_time.definition).name
       and s.generation = (_version_at_time.definition).generation
       and s.aggregate_id = _version_at_time.aggregate_id
       and s.latest_at <= _version_at_time.at
     order by s.version desc
     limit 1), 0);
begin
  return (
    select e.version - 1
      from nightowls.all_events e
     where e.org_id = (_version_at_time.definition).org_id
       and e.aggregate_type = (_version_at_time.definition).aggregate_type
       and e.aggregate_id = _version_at_time.aggregate_id
       and e.created_at > _version_at_time.at
       and e.version > v_base
     order by e.version
     limit 1);
end;
$$;

revoke all on function nightowls._version_at_time(nightowls.projections, text, timestamptz) from public;

create function nightowls.state_at_time(projection text, aggregate_id text, at timestamptz, org uuid default null)
  returns jsonb
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_projection nightowls.projections :=
    nightowls._projection(state_at_time.projection, nightowls.current_org(state_at_time.org));
  v_version    bigint;
begin
  if state_at_time.at is null then
    raise exception 'at must not be null' using errcode = 'null_value_not_allowed';
  end if;
  v_version := nightowls._version_at_time(v_projection, state_at_time.aggregate_id, state_at_time.at);
  return nightowls._state(v_projection, state_at_time.aggregate_id, v_version);
end;
$$;

comment on function nightowls.state_at_time(text, text, timestamptz, uuid) is
  'The state of one aggregate in a projection as it was at a time: up to the last version before the first event created after it. '
  'null if the aggregate did not exist then or was tombstoned. projection: its name; org: the tenant. Reads the aggregate''s events up to '
  'that one, from the newest snapshot that holds nothing later. Locks nothing. Raises as state().';

revoke all on function nightowls.state_at_time(text, text, timestamptz, uuid) from public;

-- The aggregates whose stored state may be behind, and the position up to which the caller is to settle them (null: all,
-- as with nothing held at this moment every append that did not know of the build has ended). In this order, as the safe
-- position is found.
-- Definer: the sequence is closed.
create function nightowls._lagging(
  projection nightowls.projections,
  out ids    text[],
  out upto   bigint
)
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_last bigint := (
    select case when s.is_called then s.last_value else s.last_value - 1 end from nightowls.events_position_seq s);
  v_held bigint := nightowls._lowest_hold((_lagging.projection).org_id, v_last);
begin
  if v_held is not null then
    upto := least(v_last, v_held);
  end if;
  ids := array(
    select distinct e.aggregate_id
      from nightowls.events e
     where e.org_id = (_lagging.projection).org_id
       and e."position" > (_lagging.projection).lagging_from
       and e.aggregate_type = (_lagging.projection).aggregate_type);
end;
$$;

revoke all on function nightowls._lagging(nightowls.projections) from public;

-- Says that a projection is settled up to a position, unless it has been built anew meanwhile, and removes what two writers
-- left side by side. Definer: the tables are closed.
create function nightowls._settle(projection nightowls.projections, ids text[], upto bigint)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform nightowls._open_door('project');
  delete from nightowls._projection_states s
   where s.ctid = any (array(
           select x.ctid
             from nightowls._projection_states x
            where x.org_id = (_settle.projection).org_id and x.projection = (_settle.projection).name
              and x.generation = (_settle.projection).generation and x.aggregate_id = any (_settle.ids)
              and exists (
                    select from nightowls._projection_states n
                     where n.org_id = x.org_id and n.projection = x.projection and n.generation = x.generation
                       and n.aggregate_id = x.aggregate_id and n.version > x.version)
              for update skip locked));
  perform nightowls._shut_door();
  update nightowls.projections p
     set lagging_from = _settle.upto, refreshed_at = clock_timestamp()
   where p.org_id = (_settle.projection).org_id and p.name = (_settle.projection).name
     and p.generation = (_settle.projection).generation;
end;
$$;

revoke all on function nightowls._settle(nightowls.projections, text[], bigint) from public;

create function nightowls.refresh_projection(name text, org uuid default null)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org        uuid := nightowls.current_org(refresh_projection.org);
  v_projection nightowls.projections := nightowls._projection(refresh_projection.name, v_org);
  v_lagging    record;
  v_id         text;
begin
  if v_projection.kind = 'view' then
    perform nightowls._refresh_view(v_org, v_projection.name);
    return;
  elsif v_projection.mode = 'async' then
    perform nightowls._refresh_async(v_projection);
    return;
  elsif v_projection.lagging_from is null or v_projection.kind = 'table' then
    return; -- Kept by each append and not behind.
  end if;

  perform nightowls._share_erasure(v_org);
  v_lagging := nightowls._lagging(v_projection);
  if v_projection.kind = 'reducer' then
    if v_lagging.ids <> '{}' then
      perform nightowls._project(
        v_org, array_fill(v_projection.aggregate_type, array[cardinality(v_lagging.ids)]), v_lagging.ids, null);
    end if;
  else
    foreach v_id in array v_lagging.ids loop
      perform nightowls._project_by_handler(v_projection, v_id);
    end loop;
  end if;
  perform nightowls._settle(v_projection, v_lagging.ids, v_lagging.upto);
end;
$$;

comment on function nightowls.refresh_projection(text, uuid) is
  'Brings a projection up to date: a view is refreshed (concurrently: readers do not wait); stored states that a build beside open '
  'appends left behind are folded on; an async projection is taken to the end of the log. name: the projection; org: the tenant. Waits for another refresh of the same projection. '
  'Raises NW007 if the projection does not exist, 25001 above read committed, NW010 if there is no org.';

revoke all on function nightowls.refresh_projection(text, uuid) from public;

create function nightowls.rebuild_projection(name text, org uuid default null)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org        uuid := nightowls.current_org(rebuild_projection.org);
  v_projection nightowls.projections := nightowls._projection(rebuild_projection.name, v_org);
begin
  case v_projection.kind
  when 'view' then
    perform nightowls._refresh_view(v_org, v_projection.name);
  when 'table' then
    perform nightowls._rebuild_table(v_projection);
  else
    perform nightowls._rebuild_states(v_projection.name, v_org, nightowls._build_mark(v_org), false);
  end case;
end;
$$;

comment on function nightowls.rebuild_projection(text, uuid) is
  'Makes a projection anew from the whole log, beside the live one, then swaps them. Readers and writers never wait; only a table '
  'projection, whose rows are the user''s, keeps appends of its aggregate type waiting until it is done (readers do not wait). Appends '
  'open at the swap are folded in by their aggregate''s next event, by refresh_projection, and by state() when it is asked. '
  'name: the projection; org: the tenant. Waits for another build of the same projection. Raises NW007 if it does not exist, 25001 '
  'above read committed, NW010 if there is no org.';

revoke all on function nightowls.rebuild_projection(text, uuid) from public;

create function nightowls.verify_projection(name text, sample int default null, org uuid default null)
  returns table (aggregate_id text, version bigint, state jsonb, replayed jsonb)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org        uuid := nightowls.current_org(verify_projection.org);
  v_projection nightowls.projections := nightowls._projection(verify_projection.name, v_org);
begin
  if v_projection.kind not in ('reducer', 'handler') then
    perform nightowls._refuse_stateless(v_projection);
  elsif verify_projection.sample < 1 then
    raise exception 'sample must be 1 or more' using errcode = 'invalid_parameter_value';
  end if;

  -- What is stored at a version is held against the replay up to that version, which nobody can change any more; the
  -- head is read after it, so that an append in between is no difference.
  for aggregate_id, version in
    select x.aggregate_id, max(x.version)
      from nightowls._projection_states x
     where x.org_id = v_org and x.projection = v_projection.name and x.generation = v_projection.generation
     group by x.aggregate_id
     order by case when verify_projection.sample is not null then random() end, x.aggregate_id
     limit verify_projection.sample
  loop
    select x.state into state
      from nightowls._projection_states x
     where x.org_id = v_org and x.projection = v_projection.name and x.generation = v_projection.generation
       and x.aggregate_id = verify_projection.aggregate_id and x.version = verify_projection.version;
    continue when not found; -- Replaced meanwhile.
    replayed := nightowls._replay(v_projection, aggregate_id, version);
    if state::text is distinct from replayed::text or not exists (
         select from nightowls.all_events e
          where e.org_id = v_org and e.aggregate_type = v_projection.aggregate_type
            and e.aggregate_id = verify_projection.aggregate_id and e.version = verify_projection.version) then
      return next;
    end if;
  end loop;
end;
$$;

comment on function nightowls.verify_projection(text, int, uuid) is
  'Compares each stored state with a full replay of its events, archived ones too (of deleted ones: from the snapshot that was proven '
  'before they went), and returns every aggregate whose state differs, with both and the version they are of; no rows is good. '
  'name: the projection; sample: how many aggregates to look at, chosen at random, null for all; org: the tenant. Locks nothing. '
  'Raises NW007 if the projection does not exist, 22023 for one that keeps no states or a sample below 1, NW010 if there is no org.';

revoke all on function nightowls.verify_projection(text, int, uuid) from public;

-- The fold of an aggregate's whole history up to a version: the archive and the live log. Where events are deleted it begins with
-- the first snapshot that was proven before they went.
create function nightowls._replay(projection nightowls.projections, aggregate_id text, to_version bigint)
  returns jsonb
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_version bigint;
  v_state   jsonb;
begin
  select s.version, s.state into v_version, v_state
    from nightowls.compactions c
    join nightowls.snapshots s
      on s.org_id = c.org_id and s.projection = (_replay.projection).name and s.generation = (_replay.projection).generation
     and s.aggregate_id = c.aggregate_id and s.proven and s.version between c.deleted_to and _replay.to_version
   where c.org_id = (_replay.projection).org_id and c.aggregate_type = (_replay.projection).aggregate_type
     and c.aggregate_id = _replay.aggregate_id and c.deleted_to > 0
   order by s.version
   limit 1;
  if not found then
    if not exists (
         select from nightowls.events e
          where e.org_id = (_replay.projection).org_id and e.aggregate_type = (_replay.projection).aggregate_type
            and e.aggregate_id = _replay.aggregate_id) then
      return null;
    end if;
    v_version := 0;
    v_state := case (_replay.projection).kind when 'reducer' then coalesce((_replay.projection).reducer -> 'initial', '{}') end;
  end if;
  if (_replay.projection).kind = 'handler' then
    return (nightowls._fold_by_handler(
      (_replay.projection).org_id, (_replay.projection).handler, v_state, (_replay.projection).aggregate_type,
      _replay.aggregate_id, v_version + 1, _replay.to_version)).state;
  end if;
  return (nightowls._fold_tail(
    (_replay.projection).org_id, (_replay.projection).reducer, v_state, (_replay.projection).aggregate_type,
    _replay.aggregate_id, v_version + 1, _replay.to_version)).state;
end;
$$;

revoke all on function nightowls._replay(nightowls.projections, text, bigint) from public;
