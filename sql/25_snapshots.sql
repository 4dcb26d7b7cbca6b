-- Snapshots: states as they were at a version, so that a state is made of the nearest one and the events after it.
--
-- A snapshot belongs to a generation of its projection: a build begins with none but those that a replay has proven
-- (compaction), so one that was made by another reducer or handler is never used.

create table nightowls.snapshots (
  org_id       uuid        not null,
  projection   text        collate "C" not null,
  generation   bigint      not null,
  aggregate_id text        collate "C" not null,
  version      bigint      not null,
  "position"   bigint      not null,
  state        jsonb,
  latest_at    timestamptz,
  proven       boolean     not null default false,
  created_at   timestamptz not null default clock_timestamp(),
  constraint snapshots_pkey primary key (org_id, projection, generation, aggregate_id, version)
);

comment on table nightowls.snapshots is
  'States as they were at a version. The nearest one and the events after it make any state. Read-only (NW008): create_snapshot '
  'and appends write them.';
comment on column nightowls.snapshots.org_id is 'The tenant.';
comment on column nightowls.snapshots.projection is 'The projection.';
comment on column nightowls.snapshots.generation is 'The build of the projection it belongs to; those of other builds are not used.';
comment on column nightowls.snapshots.aggregate_id is 'The aggregate.';
comment on column nightowls.snapshots.version is 'The last version folded in.';
comment on column nightowls.snapshots."position" is 'That event''s position.';
comment on column nightowls.snapshots.state is 'The state; null after a tombstone.';
comment on column nightowls.snapshots.latest_at is 'The latest created_at of the events folded in; null if that was not looked for.';
comment on column nightowls.snapshots.proven is 'Whether it is a replay of all events that equals a state kept by the projection: compaction''s.';
comment on column nightowls.snapshots.created_at is 'When the snapshot was written.';

create trigger t05_projection_only
  before insert or update or delete or truncate on nightowls.snapshots
  for each statement execute function nightowls._refuse_write();

-- Where the sweeps go on, one row for each thing they go through in turn.
create table nightowls._sweeps (
  org_id    uuid        not null,
  sweep     text        collate "C" not null,
  name      text        collate "C" not null,
  after_id  text        collate "C" not null,
  swept_at  timestamptz not null default clock_timestamp(),
  constraint _sweeps_pkey primary key (org_id, sweep, name)
);

comment on table nightowls._sweeps is 'How far the sweeps got: create_snapshots, compact and the parts of the clock that serve orgs in turn.';
comment on column nightowls._sweeps.org_id is 'The tenant.';
comment on column nightowls._sweeps.sweep is 'snapshots, compaction, queues, floors, views, scratchpads or followups.';
comment on column nightowls._sweeps.name is 'The projection, or the aggregate type; empty where the sweep is of a whole org.';
comment on column nightowls._sweeps.after_id is 'The last aggregate or floor looked at; empty: from the beginning.';
comment on column nightowls._sweeps.swept_at is 'When it had its last turn.';

-- Writes a snapshot and removes those that are too dense: of the older ones about as many stay at each distance, twice as far
-- apart at twice the distance, so that they take little room however long the history and any earlier state is not far
-- from one. Those that a replay has proven stay. Nobody waits: what somebody else is removing is left to them. It runs in functions
-- of the owner's. An unknown latest_at is looked for in so many events at most.
create function nightowls._store_snapshot(
  definition   nightowls.projections,
  aggregate_id text,
  version      bigint,
  at           bigint,
  state        jsonb,
  max_events   bigint default 20000
)
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
  v_door   text := coalesce(current_setting('nightowls.door', true), '');
  v_every  bigint := coalesce((_store_snapshot.definition).snapshot_every, 1000);
  v_before bigint;
  v_latest timestamptz;
begin
  select s.version, s.latest_at into v_before, v_latest
    from nightowls.snapshots s
   where s.org_id = (_store_snapshot.definition).org_id and s.projection = (_store_snapshot.definition).name
     and s.generation = (_store_snapshot.definition).generation and s.aggregate_id = _store_snapshot.aggregate_id
     and s.version <= _store_snapshot.version and s.latest_at is not null
   order by s.version desc
   limit 1;
  if _store_snapshot.version - coalesce(v_before, 0) <= _store_snapshot.max_events then
    select greatest(v_latest, max(e.created_at)) into v_latest
      from nightowls.all_events e
     where e.org_id = (_store_snapshot.definition).org_id
       and e.aggregate_type = (_store_snapshot.definition).aggregate_type
       and e.aggregate_id = _store_snapshot.aggregate_id
       and e.version > coalesce(v_before, 0)
       and e.version <= _store_snapshot.version;
  else
    v_latest := null;
  end if;

  perform nightowls._open_door('project');
  insert into nightowls.snapshots (org_id, projection, generation, aggregate_id, version, "position", state, latest_at)
  values ((_store_snapshot.definition).org_id, (_store_snapshot.definition).name, (_store_snapshot.definition).generation,
          _store_snapshot.aggregate_id, _store_snapshot.version, _store_snapshot.at, _store_snapshot.state, v_latest)
  on conflict do nothing;
  delete from nightowls.snapshots s
   where s.ctid = any (array(
           select x.ctid
             from nightowls.snapshots x
            where x.org_id = (_store_snapshot.definition).org_id and x.projection = (_store_snapshot.definition).name
              and x.generation = (_store_snapshot.definition).generation and x.aggregate_id = _store_snapshot.aggregate_id
              and x.version < _store_snapshot.version and not x.proven
              and _store_snapshot.version / v_every - x.version / v_every
                  >= 4 * ((x.version / v_every) & -(x.version / v_every))
              for update skip locked));
  perform set_config('nightowls.door', v_door, true);
end;
$$;

revoke all on function nightowls._store_snapshot(nightowls.projections, text, bigint, bigint, jsonb, bigint) from public;

-- A snapshot of a state that a handler made, for no other kind of projection. Definer: nobody else may write snapshots.
create function nightowls._save_snapshot(
  org          uuid,
  projection   text,
  generation   bigint,
  aggregate_id text,
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
  v_definition nightowls.projections;
begin
  select p.* into v_definition
    from nightowls.projections p
   where p.org_id = _save_snapshot.org and p.name = _save_snapshot.projection and p.kind = 'handler';
  if not found then
    raise exception 'snapshots of projection "%" are not made by a handler', _save_snapshot.projection
      using errcode = 'NW008', hint = 'Use nightowls.create_snapshot().';
  end if;
  v_definition.generation := _save_snapshot.generation;
  perform nightowls._store_snapshot(v_definition, _save_snapshot.aggregate_id, _save_snapshot.version, _save_snapshot.at,
                                    _save_snapshot.state);
end;
$$;

revoke all on function nightowls._save_snapshot(uuid, text, bigint, text, bigint, bigint, jsonb) from public;

-- What the state of an aggregate at a version (null: now) is made from: the stored state, or else the newest snapshot that is
-- not newer than that, or else the beginning, version 0. The rest is the tail. Stable, so that the tail, folded in the same
-- statement, is read from the log as it was at this moment.
create function nightowls._base(
  definition   nightowls.projections,
  aggregate_id text,
  to_version   bigint,
  out version  bigint,
  out "position" bigint,
  out state    jsonb
)
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
begin
  select s.version, s."position", s.state into version, "position", state
    from nightowls._projection_states s
   where s.org_id = (_base.definition).org_id
     and s.projection = (_base.definition).name
     and s.generation = (_base.definition).generation
     and s.aggregate_id = _base.aggregate_id
   order by s.version desc
   limit 1;
  if version <= coalesce(_base.to_version, version) then
    return;
  end if;

  select s.version, s."position", s.state into version, "position", state
    from nightowls.snapshots s
   where s.org_id = (_base.definition).org_id
     and s.projection = (_base.definition).name
     and s.generation = (_base.definition).generation
     and s.aggregate_id = _base.aggregate_id
     and s.version <= coalesce(_base.to_version, 9223372036854775807)
   order by s.version desc
   limit 1;
  if version is null then
    version := 0;
    state := case (_base.definition).kind when 'reducer' then coalesce((_base.definition).reducer -> 'initial', '{}') end;
  end if;
end;
$$;

revoke all on function nightowls._base(nightowls.projections, text, bigint) from public;

-- The state of one aggregate at a version (null: now), and the version and position it is of: null if there was none.
-- Invoker: handlers are run as the caller.
create function nightowls._load(
  definition   nightowls.projections,
  aggregate_id text,
  to_version   bigint,
  out state    jsonb,
  out version  bigint,
  out "position" bigint
)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_base   record;
  v_failed bigint;
begin
  if (_load.definition).kind = 'reducer' then
    select f.state, nullif(coalesce(f.version, b.version), 0), coalesce(f."position", b."position")
      into state, version, "position"
      from nightowls._base(_load.definition, _load.aggregate_id, _load.to_version) b
     cross join lateral nightowls._fold_tail(
             (_load.definition).org_id, (_load.definition).reducer, b.state, (_load.definition).aggregate_type,
             _load.aggregate_id, b.version + 1, _load.to_version) f;
  else
    loop
      v_base := nightowls._base(_load.definition, _load.aggregate_id, _load.to_version);
      begin
        select f.state, nullif(coalesce(f.version, v_base.version), 0), coalesce(f."position", v_base."position")
          into state, version, "position"
          from nightowls._fold_by_handler(
                 (_load.definition).org_id, (_load.definition).handler, v_base.state, (_load.definition).aggregate_type,
                 _load.aggregate_id, v_base.version + 1, _load.to_version) f;
        exit;
      exception when sqlstate 'NW006' then
        -- The tail was deleted between the two statements: then there is a newer base by now.
        if v_base.version = v_failed then
          raise;
        end if;
        v_failed := v_base.version;
      end;
    end loop;
  end if;
  if version is null then
    state := null;
  end if;
end;
$$;

revoke all on function nightowls._load(nightowls.projections, text, bigint) from public;

create function nightowls._refuse_stateless(definition nightowls.projections)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  raise exception 'projection "%" is of kind % and keeps no states', (_refuse_stateless.definition).name,
      (_refuse_stateless.definition).kind
    using errcode = 'invalid_parameter_value',
          hint = format('Read %s.', (_refuse_stateless.definition).target);
end;
$$;

revoke all on function nightowls._refuse_stateless(nightowls.projections) from public;

-- A snapshot of a reducer projection, as the owner; its version. Definer: nobody else may write snapshots.
create function nightowls._snapshot_reduced(org uuid, projection text, aggregate_id text)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_definition nightowls.projections;
  v_loaded     record;
begin
  select p.* into v_definition
    from nightowls.projections p
   where p.org_id = _snapshot_reduced.org and p.name = _snapshot_reduced.projection and p.kind = 'reducer';
  if found then
    v_loaded := nightowls._load(v_definition, _snapshot_reduced.aggregate_id, null);
    if v_loaded.version is not null then
      perform nightowls._store_snapshot(v_definition, _snapshot_reduced.aggregate_id, v_loaded.version, v_loaded."position",
                                        v_loaded.state, 9223372036854775807);
    end if;
  end if;
  return v_loaded.version;
end;
$$;

revoke all on function nightowls._snapshot_reduced(uuid, text, text) from public;

-- Invoker: handlers are run as the caller.
create function nightowls._snapshot(definition nightowls.projections, aggregate_id text)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_loaded record;
begin
  -- What is stored here later than the events were appended must not bring back what is being erased.
  perform nightowls._share_erasure((_snapshot.definition).org_id);
  if (_snapshot.definition).kind = 'reducer' then
    return nightowls._snapshot_reduced((_snapshot.definition).org_id, (_snapshot.definition).name, _snapshot.aggregate_id);
  end if;
  v_loaded := nightowls._load(_snapshot.definition, _snapshot.aggregate_id, null);
  if v_loaded.version is not null then
    perform nightowls._save_snapshot(
      (_snapshot.definition).org_id, (_snapshot.definition).name, (_snapshot.definition).generation, _snapshot.aggregate_id,
      v_loaded.version, v_loaded."position", v_loaded.state);
  end if;
  return v_loaded.version;
end;
$$;

revoke all on function nightowls._snapshot(nightowls.projections, text) from public;

create function nightowls.create_snapshot(projection text, aggregate_id text, org uuid default null)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_definition nightowls.projections :=
    nightowls._projection(create_snapshot.projection, nightowls.current_org(create_snapshot.org));
begin
  if v_definition.kind not in ('reducer', 'handler') then
    perform nightowls._refuse_stateless(v_definition);
  elsif create_snapshot.aggregate_id is null then
    raise exception 'aggregate_id must not be null' using errcode = 'null_value_not_allowed';
  end if;
  return nightowls._snapshot(v_definition, create_snapshot.aggregate_id);
end;
$$;

comment on function nightowls.create_snapshot(text, text, uuid) is
  'Takes a snapshot of one aggregate''s state in a projection as it is now and returns the version it is of; null if the aggregate does '
  'not exist. projection: its name; aggregate_id: which one; org: the tenant. Appends take snapshots by themselves '
  '(set_snapshot_policy). A newer one always counts before an older one, whichever is written last. A handler is run as the caller. '
  'Waits only for another snapshot of the same version. Raises NW007 if the projection does not exist, 22023 for a table or view '
  'projection, 22004 for a null argument, NW006 if events it needs were deleted, 40001 above read committed when somebody else has '
  'taken the same one meanwhile, NW010 if there is no org.';

revoke all on function nightowls.create_snapshot(text, text, uuid) from public;

-- Definer: the table is closed.
create function nightowls._set_snapshot_every(org uuid, projection text, snapshot_every int)
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
     set snapshot_every = _set_snapshot_every.snapshot_every
   where p.org_id = _set_snapshot_every.org and p.name = _set_snapshot_every.projection;
end;
$$;

revoke all on function nightowls._set_snapshot_every(uuid, text, int) from public;

create function nightowls.set_snapshot_policy(projection text, snapshot_every int, org uuid default null)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org        uuid := nightowls.current_org(set_snapshot_policy.org);
  v_definition nightowls.projections := nightowls._projection(set_snapshot_policy.projection, v_org);
begin
  if v_definition.kind not in ('reducer', 'handler') then
    perform nightowls._refuse_stateless(v_definition);
  elsif set_snapshot_policy.snapshot_every < 1 then
    raise exception 'snapshot_every must be 1 or more'
      using errcode = 'invalid_parameter_value', hint = 'Use null for no snapshots.';
  end if;
  perform nightowls._set_snapshot_every(v_org, v_definition.name, set_snapshot_policy.snapshot_every);
end;
$$;

comment on function nightowls.set_snapshot_policy(text, int, uuid) is
  'Says after how many events of an aggregate a projection takes a snapshot of it: the append that passes a multiple writes it in its own '
  'transaction, and create_snapshots takes what is missing. projection: its name; snapshot_every: a number of events, null for no '
  'snapshots but those of create_snapshot; org: the tenant. A new projection has the setting snapshot_every, 1000 if it is not set. '
  'Waits for a build of the same projection that is open. Raises NW007 if the projection does not exist, 22023 for a table or view '
  'projection or a number below 1, NW010 if there is no org.';

revoke all on function nightowls.set_snapshot_policy(text, int, uuid) from public;

-- The sweeps --------------------------------------------------------------------------------------

-- Takes the lock of a sweep, false if another one has it.
create function nightowls._begin_sweep(sweep text)
  returns boolean
  language sql
  volatile
  parallel unsafe
  return pg_try_advisory_xact_lock(nightowls._lock_class(262), hashtext('sweep/' || sweep));

revoke all on function nightowls._begin_sweep(text) from public;

-- Says how far a sweep got. Definer: the table is closed.
create function nightowls._end_turn(org uuid, sweep text, name text, after_id text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  insert into nightowls._sweeps (org_id, sweep, name, after_id)
  values (_end_turn.org, _end_turn.sweep, _end_turn.name, _end_turn.after_id)
  on conflict (org_id, sweep, name) do update set after_id = excluded.after_id, swept_at = clock_timestamp();
end;
$$;

revoke all on function nightowls._end_turn(uuid, text, text, text) from public;

create function nightowls._check_sweep(max_aggregates int, max_ms int)
  returns void
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if _check_sweep.max_aggregates is null or _check_sweep.max_ms is null then
    raise exception 'max_aggregates and max_ms must not be null' using errcode = 'null_value_not_allowed';
  elsif _check_sweep.max_aggregates < 1 or _check_sweep.max_ms < 1 then
    raise exception 'max_aggregates and max_ms must be 1 or more' using errcode = 'invalid_parameter_value';
  end if;
end;
$$;

revoke all on function nightowls._check_sweep(int, int) from public;

-- The next aggregates of a projection, after one: which of them have run too far from their last snapshot, and the last one
-- looked at (null: there are no more).
create function nightowls._stale_snapshots(
  definition   nightowls.projections,
  after_id     text,
  max_states   int,
  out ids      text[],
  out last_id  text
)
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_bitmapscan to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
begin
  select array_agg(a.aggregate_id order by a.aggregate_id) filter (where a.version >= (_stale_snapshots.definition).snapshot_every + coalesce((
           select s.version
             from nightowls.snapshots s
            where s.org_id = (_stale_snapshots.definition).org_id and s.projection = (_stale_snapshots.definition).name
              and s.generation = (_stale_snapshots.definition).generation and s.aggregate_id = a.aggregate_id
            order by s.version desc
            limit 1), 0)),
         case when count(*) = _stale_snapshots.max_states then max(a.aggregate_id) end
    into ids, last_id
    from (select x.aggregate_id, x.version
            from nightowls._projection_states x
           where x.org_id = (_stale_snapshots.definition).org_id and x.projection = (_stale_snapshots.definition).name
             and x.generation = (_stale_snapshots.definition).generation and x.aggregate_id > _stale_snapshots.after_id
           order by x.aggregate_id
           limit _stale_snapshots.max_states) a;
  ids := coalesce(ids, '{}');
end;
$$;

revoke all on function nightowls._stale_snapshots(nightowls.projections, text, int) from public;

create function nightowls.create_snapshots(max_aggregates int default 1000, max_ms int default 1000)
  returns table (org_id uuid, projection text, aggregate_id text, version bigint, error text)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_until      timestamptz := clock_timestamp() + create_snapshots.max_ms * interval '1 millisecond';
  v_turn       record;
  v_definition nightowls.projections;
  v_stale      record;
  v_after      text;
  v_more       boolean;
  v_first      boolean := true;
  v_left       int := create_snapshots.max_aggregates;
  v_orgs       uuid[] := '{}';
begin
  perform nightowls._check_sweep(create_snapshots.max_aggregates, create_snapshots.max_ms);
  if not nightowls._begin_sweep('snapshots') then
    return;
  end if;
  loop
    v_more := false;
    -- Each projection of each org in turn, the one that has waited longest first; then those that are not through.
    for v_turn in
      select p.org_id, p.name, coalesce(w.after_id, '') as after_id
        from nightowls.projections p
        left join nightowls._sweeps w on w.org_id = p.org_id and w.sweep = 'snapshots' and w.name = p.name
       where p.kind in ('reducer', 'handler') and p.snapshot_every is not null
         and (v_first or w.after_id <> '')
       order by w.swept_at nulls first, p.org_id, p.name
    loop
      select p.* into v_definition
        from nightowls.projections p
       where p.org_id = v_turn.org_id and p.name = v_turn.name;
      continue when not found;
      v_stale := nightowls._stale_snapshots(v_definition, v_turn.after_id, 1000);
      v_after := coalesce(v_stale.last_id, '');
      if v_stale.ids <> '{}' and v_turn.org_id <> all (v_orgs) then
        -- Each org is a lock: the others have their turn in the next call.
        exit when cardinality(v_orgs) = 24;
        -- An erasure is not waited for: the others would wait too.
        continue when not nightowls._try_share_erasure(v_turn.org_id);
        v_orgs := v_orgs || v_turn.org_id;
      end if;
      v_more := v_more or v_after <> '';
      foreach create_snapshots.aggregate_id in array v_stale.ids loop
        create_snapshots.org_id := v_turn.org_id;
        create_snapshots.projection := v_turn.name;
        create_snapshots.version := null;
        create_snapshots.error := null;
        begin
          create_snapshots.version := nightowls._snapshot(v_definition, create_snapshots.aggregate_id);
        exception when others then
          -- One that cannot be folded does not stop the rest; it comes back with its error.
          create_snapshots.error := sqlstate || ' ' || sqlerrm;
        end;
        return next;
        v_left := v_left - 1;
        if v_left = 0 or clock_timestamp() > v_until then
          v_after := create_snapshots.aggregate_id;
          exit;
        end if;
      end loop;
      perform nightowls._end_turn(v_turn.org_id, 'snapshots', v_turn.name, v_after);
      if v_left = 0 or clock_timestamp() > v_until then
        return;
      end if;
    end loop;
    exit when not v_more or cardinality(v_orgs) = 24;
    v_first := false;
  end loop;
end;
$$;

comment on function nightowls.create_snapshots(int, int) is
  'Takes the snapshots that are missing by the policy of their projection, of all orgs and projections in turn, and returns them, or the '
  'error of one that could not be taken: for cron. Appends take their own; this is for projections that follow later and for '
  'a policy that has changed. max_aggregates: how many at most; max_ms: milliseconds after which no other one is begun: the next call goes on '
  'from there. The projection that has waited longest comes first, a turn is at most 1,000 aggregates, and a call works for 24 orgs at most: those left out come '
  'first in the next call. Handlers are run as the caller. Waits for nobody: it leaves out the orgs in which something is being erased. Returns nothing while '
  'another call runs. '
  'Service only. Raises 22004 or 22023 for an argument that is null or below 1.';

revoke all on function nightowls.create_snapshots(int, int) from public;

alter table nightowls.snapshots enable row level security;
alter table nightowls.snapshots force row level security;
create policy service_all on nightowls.snapshots
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));

alter table nightowls._sweeps enable row level security;
alter table nightowls._sweeps force row level security;
create policy service_all on nightowls._sweeps
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));
