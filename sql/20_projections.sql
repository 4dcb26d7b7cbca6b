-- Projections: state derived from events. Here: what they are, the states, and the work an append does for them.
--
-- A stored state is the fold of versions 1..version of its aggregate, never anything else. It can be behind (a
-- projection made or rebuilt while appends were open); whoever needs it folds the rest, so it is never wrong.

-- How often a projection that is made now takes snapshots.
create function nightowls._default_snapshot_every()
  returns int
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_value jsonb;
begin
  select s.value into v_value from nightowls.settings s where s.name = 'snapshot_every';
  if not found then
    return 1000;
  elsif v_value in ('null', '0') then
    return null;
  elsif jsonb_typeof(v_value) = 'number' and v_value::numeric between 1 and 2147483647 and v_value::numeric % 1 = 0 then
    return v_value::int;
  end if;
  raise exception 'setting snapshot_every is not a whole number: %', left(v_value::text, 64)
    using errcode = 'invalid_parameter_value',
          hint = 'It is the number of events between two snapshots; 0 or null for none.';
end;
$$;

revoke all on function nightowls._default_snapshot_every() from public;

create table nightowls.projections (
  org_id         uuid        not null,
  name           text        collate "C" not null,
  kind           text        not null,
  aggregate_type text        collate "C",
  reducer        jsonb,
  handler        text,
  target         text,
  query          text,
  refresh_every  interval,
  mode           text        not null default 'inline',
  generation     bigint      not null default 0,
  lagging_from   bigint,
  snapshot_every int         default nightowls._default_snapshot_every(),
  created_at     timestamptz not null default clock_timestamp(),
  refreshed_at   timestamptz,
  constraint projections_pkey primary key (org_id, name),
  constraint projections_kind_check check (kind in ('reducer', 'handler', 'table', 'view')),
  constraint projections_mode_check check (mode in ('inline', 'async')),
  constraint projections_snapshot_every_check check (snapshot_every > 0)
);

comment on table nightowls.projections is 'The projections there are: what they read, how they fold, where the state is.';
comment on column nightowls.projections.org_id is 'The tenant.';
comment on column nightowls.projections.name is 'The projection''s name, unique within the org.';
comment on column nightowls.projections.kind is
  'reducer: state folded by a reducer; handler: by a function of the user''s; table: a read model in the user''s own table; '
  'view: a materialized view.';
comment on column nightowls.projections.aggregate_type is 'The aggregate type it reads; null for a view.';
comment on column nightowls.projections.reducer is 'The reducer, of kind reducer.';
comment on column nightowls.projections.handler is 'The function, by its qualified name, looked up at each call.';
comment on column nightowls.projections.target is 'The user''s table (kind table) or the materialized view (kind view), by its qualified name.';
comment on column nightowls.projections.query is 'The query of a view.';
comment on column nightowls.projections.refresh_every is 'How often the clock refreshes a view.';
comment on column nightowls.projections.mode is 'inline: kept in the transaction that appends; async: by run_projections.';
comment on column nightowls.projections.generation is 'Which generation of states is the live one; a rebuild makes the next.';
comment on column nightowls.projections.lagging_from is
  'After a build beside open appends: stored states of aggregates with events above this position may be behind '
  'until refresh_projection(name). state() is exact all the same. null: none is behind.';
comment on column nightowls.projections.snapshot_every is
  'After how many events of an aggregate a snapshot of its state is taken; null: never. set_snapshot_policy changes it.';
comment on column nightowls.projections.created_at is 'When the projection was made.';
comment on column nightowls.projections.refreshed_at is 'When it was last built or refreshed.';

-- Drawn by each build and never used again: an append that knew an older projection of the same name writes to that
-- one's generation, which nobody reads.
create sequence nightowls.projection_generations as bigint cache 1;

comment on sequence nightowls.projection_generations is 'Numbers the builds of projections.';

-- A new row a change, newest wins, so that a lookup stays one probe while an old snapshot keeps the
-- replaced rows alive. The one that replaces a row deletes it.
create table nightowls._projection_states (
  org_id       uuid        not null,
  projection   text        collate "C" not null,
  generation   bigint      not null,
  aggregate_id text        collate "C" not null,
  version      bigint      not null,
  "position"   bigint      not null,
  state        jsonb,
  updated_at   timestamptz not null default clock_timestamp(),
  constraint _projection_states_pkey primary key (org_id, projection, generation, aggregate_id, version)
) with (autovacuum_vacuum_scale_factor = 0.05);

comment on table nightowls._projection_states is 'Storage of projection_states, all generations.';
comment on column nightowls._projection_states.org_id is 'The tenant.';
comment on column nightowls._projection_states.projection is 'The projection.';
comment on column nightowls._projection_states.generation is 'The build it belongs to.';
comment on column nightowls._projection_states.aggregate_id is 'The aggregate.';
comment on column nightowls._projection_states.version is 'The last version folded in.';
comment on column nightowls._projection_states."position" is 'That event''s position.';
comment on column nightowls._projection_states.state is 'The state; null after a tombstone.';
comment on column nightowls._projection_states.updated_at is 'When the row was written.';

create view nightowls.projection_states
  with (security_invoker = true)
as
  select distinct on (s.org_id, s.projection, s.aggregate_id)
         s.org_id, s.projection, s.aggregate_id, s.version, s."position", s.state, s.updated_at
    from nightowls._projection_states s
    join nightowls.projections p on p.org_id = s.org_id and p.name = s.projection and p.generation = s.generation
   order by s.org_id, s.projection, s.aggregate_id, s.version desc;

comment on view nightowls.projection_states is
  'The stored state of each aggregate, one row an aggregate and projection; state is null after a tombstone. '
  'Read-only (NW008): states come from events.';
comment on column nightowls.projection_states.org_id is 'The tenant.';
comment on column nightowls.projection_states.projection is 'The projection.';
comment on column nightowls.projection_states.aggregate_id is 'The aggregate.';
comment on column nightowls.projection_states.version is 'The last version folded in.';
comment on column nightowls.projection_states."position" is 'That event''s position.';
comment on column nightowls.projection_states.state is 'The state; null after a tombstone.';
comment on column nightowls.projection_states.updated_at is 'When the state was stored.';

-- Refuses a write that is not a projection's own. It calls nothing of ours, as it also guards tables of
-- users who may call nothing of ours.
create function nightowls._refuse_write()
  returns trigger
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if starts_with(current_setting('nightowls.door', true), pg_current_xact_id_if_assigned()::text || '|project') then
    return coalesce(new, old);
  elsif current_setting('row_security') = 'off'
        and pg_has_role(current_user, (select c.relowner from pg_class c where c.oid = tg_relid), 'usage') then
    return coalesce(new, old);
  end if;
  raise exception '%.% is kept by a projection', tg_table_schema, tg_table_name
    using errcode = 'NW008',
          detail = format('%s is refused, whoever asks.', tg_op),
          hint = 'Append an event; to make the state anew, use nightowls.rebuild_projection(name).';
end;
$$;

revoke all on function nightowls._refuse_write() from public;

create function nightowls._check_state_write(table_schema text, table_name text, operation text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if starts_with(current_setting('nightowls.door', true), pg_current_xact_id_if_assigned()::text || '|project')
     or nightowls._is_restoring() then
    return;
  end if;
  raise exception '%.% is kept by a projection', _check_state_write.table_schema, _check_state_write.table_name
    using errcode = 'NW008',
          detail = format('%s is refused, whoever asks.', _check_state_write.operation),
          hint = 'Append an event; to make the state anew, use nightowls.rebuild_projection(name).';
end;
$$;

revoke all on function nightowls._check_state_write(text, text, text) from public;

-- The same for the states, where an append needs no door: its mark will do. It pins no search_path, as every append with a
-- projection pays for it.
create function nightowls._refuse_state_write()
  returns trigger
  language plpgsql
  volatile
  parallel unsafe
as $$
#variable_conflict use_column
begin
  if not nightowls._is_append() then
    perform nightowls._check_state_write(tg_table_schema::text, tg_table_name::text, tg_op);
  end if;
  return new;
end;
$$;

revoke all on function nightowls._refuse_state_write() from public;

create trigger t05_projection_only
  before insert or update or delete or truncate on nightowls._projection_states
  for each statement execute function nightowls._refuse_state_write();

create trigger t05_projection_only
  instead of insert or update or delete on nightowls.projection_states
  for each row execute function nightowls._refuse_write();

-- Who stores what it derives from events in a transaction of its own, not that of their append, calls this in a statement before it reads
-- them: it keeps erasures of the org waiting (org null: all orgs' erasures, where views are refreshed), or it could write back
-- what was erased meanwhile.
create function nightowls._share_erasure(org uuid)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform pg_advisory_xact_lock_shared(nightowls._lock_class(263), coalesce(uuid_hash(_share_erasure.org), 0));
end;
$$;

revoke all on function nightowls._share_erasure(uuid) from public;

-- The same for a sweep, which leaves out what it would have to wait for: false.
create function nightowls._try_share_erasure(org uuid)
  returns boolean
  language sql
  volatile
  parallel unsafe
  return pg_try_advisory_xact_lock_shared(nightowls._lock_class(263), uuid_hash(org));

revoke all on function nightowls._try_share_erasure(uuid) from public;

-- Takes snapshots of states just stored, those that passed a multiple of snapshot_every. It runs in functions of the owner's.
create function nightowls._snapshot_stored(org uuid, projections text[], generations bigint[], aggregate_ids text[])
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_sort to off
  set enable_bitmapscan to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
declare
  v_definition nightowls.projections;
  v_state      record;
begin
  for i in 1 .. cardinality(_snapshot_stored.projections) loop
    select p.* into v_definition
      from nightowls.projections p
     where p.org_id = _snapshot_stored.org and p.name = _snapshot_stored.projections[i];
    continue when not found;
    v_definition.generation := _snapshot_stored.generations[i];
    select s.version, s."position", s.state into v_state
      from nightowls._projection_states s
     where s.org_id = _snapshot_stored.org and s.projection = v_definition.name and s.generation = v_definition.generation
       and s.aggregate_id = _snapshot_stored.aggregate_ids[i]
     order by s.version desc
     limit 1;
    if found then
      perform nightowls._store_snapshot(v_definition, _snapshot_stored.aggregate_ids[i], v_state.version, v_state."position",
                                        v_state.state);
    end if;
  end loop;
end;
$$;

revoke all on function nightowls._snapshot_stored(uuid, text[], bigint[], text[]) from public;

-- Folds what is new of some aggregates, up to a version (null: the head), into the stored states of their reducer
-- projections.
-- Definer: nobody else may write states.
create function nightowls._project(org uuid, aggregate_types text[], aggregate_ids text[], versions bigint[])
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_bitmapscan to off
  set enable_hashjoin to off
  set enable_mergejoin to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
declare
  v_door        text := current_setting('nightowls.door', true);
  v_names       text[];
  v_generations bigint[];
  v_ids         text[];
begin
  perform nightowls._open_door('project');
  with folded as materialized (
    select p.name, p.generation, a.aggregate_id, o.ctid as replaced, f.version, f."position", f.state,
           f.version / p.snapshot_every > coalesce(o.version, 0) / p.snapshot_every as snapped
      from (select u.aggregate_type collate "C" as aggregate_type, u.aggregate_id collate "C" as aggregate_id,
                   max(u.version) as version
              from unnest(_project.aggregate_types, _project.aggregate_ids, _project.versions)
                     as u (aggregate_type, aggregate_id, version)
             group by u.aggregate_type, u.aggregate_id) a
     cross join lateral (
             select x.name
               from nightowls.routes x
              where x.org_id = _project.org and x.aggregate_type = a.aggregate_type and x.kind = 'reducer'
             offset 0) r
     cross join lateral (
             select x.name, x.generation, x.reducer, x.snapshot_every
               from nightowls.projections x
              where x.org_id = _project.org and x.name = r.name
             offset 0) p
      left join lateral (
             select s.ctid, s.version, s.state
               from nightowls._projection_states s
              where s.org_id = _project.org and s.projection = p.name and s.generation = p.generation
                and s.aggregate_id = a.aggregate_id
              order by s.version desc
              limit 1) o on true
     cross join lateral nightowls._fold_tail(
             _project.org, p.reducer,
             case when o.version is null then coalesce(p.reducer -> 'initial', '{}') else o.state end,
             a.aggregate_type, a.aggregate_id, coalesce(o.version, 0) + 1, a.version) f
     where f.version is not null
  ), removed as (
    -- By place, so that nothing is searched for; one that somebody else is replacing is left to them.
    delete from nightowls._projection_states s
     where s.ctid = any (array(
             select x.ctid
               from nightowls._projection_states x
              where x.ctid = any (array(select f.replaced from folded f))
                for update skip locked))
  ), stored as (
    insert into nightowls._projection_states (org_id, projection, generation, aggregate_id, version, "position", state)
    select _project.org, f.name, f.generation, f.aggregate_id, f.version, f."position", f.state
      from folded f
     order by f.name, f.aggregate_id
    on conflict do nothing
  )
  select array_agg(f.name), array_agg(f.generation), array_agg(f.aggregate_id)
    into v_names, v_generations, v_ids
    from folded f
   where f.snapped;
  if v_names is not null then
    perform nightowls._snapshot_stored(_project.org, v_names, v_generations, v_ids);
  end if;
  perform set_config('nightowls.door', coalesce(v_door, ''), true);
end;
$$;

revoke all on function nightowls._project(uuid, text[], text[], bigint[]) from public;

-- The same for the usual case: one event, and one projection of the type, whose state is that of the event before it. False if it is
-- another one, a snapshot is due, or somebody else has the row: then it is _project()'s. The row that is replaced becomes the new one, which
-- for who looks for the newest is the same as if it were deleted and another one inserted.
-- It runs in functions of the owner's that append: they have pinned the search_path, by whose mark _refuse_state_write() lets it pass.
create function nightowls._project_one(
  org            uuid,
  projection     text,
  aggregate_type text,
  aggregate_id   text,
  version        bigint,
  at             bigint,
  event_type     text,
  payload        jsonb,
  metadata       jsonb,
  event_id       uuid,
  created_at     timestamptz
)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
as $$
#variable_conflict use_column
begin
  if _project_one.version > 1 then
    update nightowls._projection_states s
       set version = _project_one.version, "position" = _project_one.at, updated_at = clock_timestamp(),
           state = nightowls._fold_row(
             p.reducer, o.state, _project_one.event_type, _project_one.aggregate_type, _project_one.aggregate_id,
             _project_one.version, _project_one.at, _project_one.event_id, _project_one.created_at, _project_one.payload,
             _project_one.metadata)
      from nightowls.projections p
     cross join lateral (
             select x.ctid as place, x.state
               from nightowls._projection_states x
              where x.org_id = p.org_id
                and x.projection = p.name
                and x.generation = p.generation
                and x.aggregate_id = _project_one.aggregate_id
                and x.version = _project_one.version - 1
                for update skip locked) o
     where p.org_id = _project_one.org
       and p.name = _project_one.projection
       and (_project_one.version % p.snapshot_every = 0) is not true
       and s.ctid = o.place;
  else
    insert into nightowls._projection_states (org_id, projection, generation, aggregate_id, version, "position", state)
    select p.org_id, p.name, p.generation, _project_one.aggregate_id, _project_one.version, _project_one.at,
           nightowls._fold_row(
             p.reducer, coalesce(p.reducer -> 'initial', '{}'), _project_one.event_type, _project_one.aggregate_type,
             _project_one.aggregate_id, _project_one.version, _project_one.at, _project_one.event_id, _project_one.created_at,
             _project_one.payload, _project_one.metadata)
      from nightowls.projections p
     where p.org_id = _project_one.org
       and p.name = _project_one.projection
       and p.snapshot_every is distinct from 1
    on conflict do nothing;
  end if;
  return found;
end;
$$;

revoke all on function nightowls._project_one(uuid, text, text, text, bigint, bigint, text, jsonb, jsonb, uuid, timestamptz) from public;

-- Stores a state that a handler made, for no other kind of projection. Definer: nobody else may write states.
create function nightowls._save_state(
  org          uuid,
  projection   text,
  generation   bigint,
  aggregate_id text,
  old_version  bigint,
  version      bigint,
  at           bigint,
  state        jsonb
)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_door text := current_setting('nightowls.door', true);
begin
  if not exists (
       select from nightowls.projections p
        where p.org_id = _save_state.org and p.name = _save_state.projection and p.kind = 'handler') then
    raise exception 'states of projection "%" are not kept by a handler', _save_state.projection
      using errcode = 'NW008', hint = 'Append an event instead.';
  end if;
  perform nightowls._open_door('project');
  delete from nightowls._projection_states s
   where s.ctid = any (array(
           select x.ctid
             from nightowls._projection_states x
            where x.org_id = _save_state.org and x.projection = _save_state.projection
              and x.generation = _save_state.generation and x.aggregate_id = _save_state.aggregate_id
              and x.version = _save_state.old_version
              for update skip locked));
  insert into nightowls._projection_states (org_id, projection, generation, aggregate_id, version, "position", state)
  values (_save_state.org, _save_state.projection, _save_state.generation, _save_state.aggregate_id, _save_state.version,
          _save_state.at, _save_state.state)
  on conflict do nothing;
  perform set_config('nightowls.door', coalesce(v_door, ''), true);
end;
$$;

revoke all on function nightowls._save_state(uuid, text, bigint, text, bigint, bigint, bigint, jsonb) from public;

-- Folds one aggregate with a handler, as the caller: (state, event) → state.
create function nightowls._fold_by_handler(
  org            uuid,
  handler        text,
  base           jsonb,
  aggregate_type text,
  aggregate_id   text,
  from_version   bigint,
  to_version     bigint,
  out state      jsonb,
  out version    bigint,
  out "position" bigint
)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_sort to off
  set enable_bitmapscan to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
declare
  v_event nightowls.events;
begin
  _fold_by_handler.state := _fold_by_handler.base;
  for v_event in
    select e.*
      from nightowls.all_events e
     where e.org_id = _fold_by_handler.org
       and e.aggregate_type = _fold_by_handler.aggregate_type
       and e.aggregate_id = _fold_by_handler.aggregate_id
       and e.version >= _fold_by_handler.from_version
       and (_fold_by_handler.to_version is null or e.version <= _fold_by_handler.to_version)
     order by e.version
  loop
    if _fold_by_handler.version is null and v_event.version > _fold_by_handler.from_version then
      perform nightowls._check_gap(v_event, _fold_by_handler.from_version);
    end if;
    if v_event.event_type = 'nightowls.erased' then
      _fold_by_handler.state := null; -- Ends a state, whatever the handler; the next event begins anew.
    else
      execute 'select ' || _fold_by_handler.handler || '($1, $2)'
         into _fold_by_handler.state
        using _fold_by_handler.state, v_event;
    end if;
    _fold_by_handler.version := v_event.version;
    _fold_by_handler."position" := v_event."position";
  end loop;
  if _fold_by_handler.version is null and _fold_by_handler.to_version >= _fold_by_handler.from_version then
    -- Nothing there: beyond the head, or deleted.
    select e.* into v_event
      from nightowls.all_events e
     where e.org_id = _fold_by_handler.org
       and e.aggregate_type = _fold_by_handler.aggregate_type
       and e.aggregate_id = _fold_by_handler.aggregate_id
       and e.version >= _fold_by_handler.from_version
     order by e.version
     limit 1;
    if v_event.version > _fold_by_handler.from_version then
      perform nightowls._check_gap(v_event, _fold_by_handler.from_version);
    end if;
  end if;
end;
$$;

revoke all on function nightowls._fold_by_handler(uuid, text, jsonb, text, text, bigint, bigint) from public;

-- Folds what is new of one aggregate into the state that a handler keeps, as the caller.
create function nightowls._project_by_handler(projection nightowls.projections, aggregate_id text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_old    bigint;
  v_state  jsonb;
  v_folded record;
begin
  select s.version, s.state into v_old, v_state
    from nightowls._projection_states s
   where s.org_id = (_project_by_handler.projection).org_id
     and s.projection = (_project_by_handler.projection).name
     and s.generation = (_project_by_handler.projection).generation
     and s.aggregate_id = _project_by_handler.aggregate_id
   order by s.version desc
   limit 1;
  v_folded := nightowls._fold_by_handler(
    (_project_by_handler.projection).org_id, (_project_by_handler.projection).handler, v_state,
    (_project_by_handler.projection).aggregate_type, _project_by_handler.aggregate_id, coalesce(v_old, 0) + 1, null);
  if v_folded.version is not null then
    perform nightowls._save_state(
      (_project_by_handler.projection).org_id, (_project_by_handler.projection).name,
      (_project_by_handler.projection).generation, _project_by_handler.aggregate_id, v_old, v_folded.version,
      v_folded."position", v_folded.state);
    if v_folded.version / (_project_by_handler.projection).snapshot_every
         > coalesce(v_old, 0) / (_project_by_handler.projection).snapshot_every then
      perform nightowls._save_snapshot(
        (_project_by_handler.projection).org_id, (_project_by_handler.projection).name,
        (_project_by_handler.projection).generation, _project_by_handler.aggregate_id, v_folded.version, v_folded."position",
        v_folded.state);
    end if;
  end if;
end;
$$;

revoke all on function nightowls._project_by_handler(nightowls.projections, text) from public;

-- Appends share a table projection's target; a build has it alone. The shared lock is asked for again by who has it without waiting.
create function nightowls._lock_target(target text, alone boolean)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if _lock_target.alone then
    perform pg_advisory_xact_lock(nightowls._lock_class(260), hashtext(_lock_target.target));
  else
    perform pg_advisory_xact_lock_shared(nightowls._lock_class(260), hashtext(_lock_target.target));
  end if;
end;
$$;

revoke all on function nightowls._lock_target(text, boolean) from public;

-- Calls the handlers that wait for these events, as the one who appends: never as the owner.
create function nightowls._call_handlers(org uuid, aggregate_types text[], positions bigint[])
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_door       text := coalesce(current_setting('nightowls.door', true), '');
  v_projection nightowls.projections;
  v_event      nightowls.events;
  v_id         text;
begin
  for v_projection in
    select p.*
      from nightowls.routes r
      join nightowls.projections p on p.org_id = r.org_id and p.name = r.name
     where r.org_id = _call_handlers.org
       and r.aggregate_type = any (_call_handlers.aggregate_types)
       and r.kind = 'handler'
     order by p.name
  loop
    if v_projection.kind = 'handler' then
      foreach v_id in array array(
        select distinct e.aggregate_id
          from nightowls.events e
         where e.org_id = _call_handlers.org
           and e."position" = any (_call_handlers.positions)
           and e.aggregate_type = v_projection.aggregate_type)
      loop
        perform nightowls._project_by_handler(v_projection, v_id);
      end loop;
      continue;
    end if;

    -- The door names the handlers at work, so that none is called again by its own append, out of order.
    if strpos(v_door, '|' || md5(v_projection.name)) > 0 then
      raise exception 'the handler of projection "%" appends to the aggregate type it handles', v_projection.name
        using errcode = 'feature_not_supported',
              detail = 'Its events would be handled out of order.',
              hint = 'Append to another aggregate type.';
    end if;
    perform nightowls._lock_target(v_projection.target, false);
    for v_event in
      select e.*
        from nightowls.events e
       where e.org_id = _call_handlers.org
         and e."position" = any (_call_handlers.positions)
         and e.aggregate_type = v_projection.aggregate_type
       order by e."position"
    loop
      perform nightowls._open_door(case when v_door ~ '^\d+[|]project' then substr(v_door, strpos(v_door, '|') + 1) else 'project' end
                                   || '|' || md5(v_projection.name));
      execute 'select ' || v_projection.handler || '($1)' using v_event;
      perform set_config('nightowls.door', v_door, true);
    end loop;
  end loop;
end;
$$;

revoke all on function nightowls._call_handlers(uuid, text[], bigint[]) from public;

alter table nightowls.projections enable row level security;
alter table nightowls.projections force row level security;
create policy service_all on nightowls.projections
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));

alter table nightowls._projection_states enable row level security;
alter table nightowls._projection_states force row level security;
create policy service_all on nightowls._projection_states
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));
