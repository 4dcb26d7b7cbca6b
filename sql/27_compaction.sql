-- Compaction: the older events of an aggregate are moved out of the live log, into the archive or for good, once every
-- projection has a snapshot that a replay has proven and every consumer has passed.
--
-- Of an aggregate versions 1..d are deleted, d+1..a archived and a+1.. live, d <= a; d and a are mostly 0. The newest event is always
-- live: it is the head that appends look for. Who needs the history reads all_events in one statement, which sees each
-- event exactly once, whatever is being moved.

create table nightowls.events_archive (
  org_id         uuid        not null,
  "position"     bigint      not null,
  aggregate_type text        collate "C" not null,
  aggregate_id   text        collate "C" not null,
  version        bigint      not null,
  event_type     text        collate "C" not null,
  payload        jsonb       not null,
  metadata       jsonb       not null,
  event_id       uuid,
  created_at     timestamptz not null,
  archived_at    timestamptz not null default clock_timestamp(),
  constraint events_archive_pkey primary key (org_id, "position"),
  constraint events_archive_aggregate_key unique (org_id, aggregate_type, aggregate_id, version)
);

create unique index events_archive_event_id_key on nightowls.events_archive (org_id, event_id) where event_id is not null;

comment on table nightowls.events_archive is
  'Events that compaction has moved out of the log, as they were. Read-only (NW008): read them with read_aggregate(include_archived => true) '
  'or in all_events, put them back with restore_aggregate.';
comment on column nightowls.events_archive.org_id is 'The tenant.';
comment on column nightowls.events_archive."position" is 'The event''s position in the log.';
comment on column nightowls.events_archive.aggregate_type is 'What kind of thing the event is about.';
comment on column nightowls.events_archive.aggregate_id is 'Which one.';
comment on column nightowls.events_archive.version is 'The event''s number within its aggregate.';
comment on column nightowls.events_archive.event_type is 'What happened.';
comment on column nightowls.events_archive.payload is 'The facts.';
comment on column nightowls.events_archive.metadata is 'About the event.';
comment on column nightowls.events_archive.event_id is 'The caller''s idempotency key; it cannot be used again.';
comment on column nightowls.events_archive.created_at is 'When the event was appended.';
comment on column nightowls.events_archive.archived_at is 'When it was moved here.';

-- As the log itself, and what is not moved here cannot be put here either. A restore fills it.
create function nightowls._refuse_archive_change()
  returns trigger
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if tg_op <> 'TRUNCATE' and nightowls._is_maintaining()
     or tg_op = 'INSERT' and nightowls._is_restoring() then
    return null;
  end if;
  raise exception '%.% is append-only', tg_table_schema, tg_table_name
    using errcode = 'NW008',
          detail = format('%s is refused, whoever asks.', tg_op),
          hint = 'Move events with nightowls.compact_aggregate() and nightowls.restore_aggregate().';
end;
$$;

revoke all on function nightowls._refuse_archive_change() from public;

create trigger t05_append_only
  before insert or update or delete or truncate on nightowls.events_archive
  for each statement execute function nightowls._refuse_archive_change();

create view nightowls.all_events
  with (security_invoker = true)
as
  select a.org_id, a."position", a.aggregate_type, a.aggregate_id, a.version, a.event_type, a.payload, a.metadata, a.event_id,
         a.created_at
    from nightowls.events_archive a
   union all
  select e.org_id, e."position", e.aggregate_type, e.aggregate_id, e.version, e.event_type, e.payload, e.metadata, e.event_id,
         e.created_at
    from nightowls.events e;

comment on view nightowls.all_events is
  'The log with its archive: every event that was not deleted, each once. For queries over the whole history, such as a view '
  'projection''s; as with the log itself, feed consumers from read_events.';
comment on column nightowls.all_events.org_id is 'The tenant.';
comment on column nightowls.all_events."position" is 'The event''s position in the log.';
comment on column nightowls.all_events.aggregate_type is 'What kind of thing the event is about.';
comment on column nightowls.all_events.aggregate_id is 'Which one.';
comment on column nightowls.all_events.version is 'The event''s number within its aggregate.';
comment on column nightowls.all_events.event_type is 'What happened.';
comment on column nightowls.all_events.payload is 'The facts.';
comment on column nightowls.all_events.metadata is 'About the event.';
comment on column nightowls.all_events.event_id is 'The caller''s idempotency key.';
comment on column nightowls.all_events.created_at is 'When the event was appended.';

create table nightowls.compactions (
  org_id         uuid        not null,
  aggregate_type text        collate "C" not null,
  aggregate_id   text        collate "C" not null,
  compacted_to   bigint      not null default 0,
  deleted_to     bigint      not null default 0,
  operation      text        collate "C",
  target         bigint,
  refused        text,
  started_at     timestamptz not null default clock_timestamp(),
  updated_at     timestamptz not null default clock_timestamp(),
  constraint compactions_pkey primary key (org_id, aggregate_type, aggregate_id),
  constraint compactions_operation_check check (operation in ('archive', 'delete', 'restore'))
);

create index compactions_deleted_idx on nightowls.compactions (org_id, aggregate_type) where deleted_to > 0;
create index compactions_open_idx on nightowls.compactions (org_id, aggregate_type) where operation is not null or refused is not null;

comment on table nightowls.compactions is 'Where the live history of a compacted aggregate begins, and the compaction or restore that is under way.';
comment on column nightowls.compactions.org_id is 'The tenant.';
comment on column nightowls.compactions.aggregate_type is 'What kind of thing it is.';
comment on column nightowls.compactions.aggregate_id is 'Which one.';
comment on column nightowls.compactions.compacted_to is 'The last version that is no longer in the live log.';
comment on column nightowls.compactions.deleted_to is 'The last version that is gone for good; what lies between the two is archived.';
comment on column nightowls.compactions.operation is 'What is under way: archive, delete or restore; null if nothing is.';
comment on column nightowls.compactions.target is 'The last version it will move; the first it will leave archived, of a restore.';
comment on column nightowls.compactions.refused is 'Why the sweep could not compact it last time; null if it could.';
comment on column nightowls.compactions.started_at is 'When the run began.';
comment on column nightowls.compactions.updated_at is 'When it last got on.';

create table nightowls.compaction_policies (
  org_id         uuid        not null,
  aggregate_type text        collate "C" not null,
  keep           bigint      not null,
  mode           text        collate "C" not null,
  min_events     bigint      not null,
  created_at     timestamptz not null default clock_timestamp(),
  constraint compaction_policies_pkey primary key (org_id, aggregate_type),
  constraint compaction_policies_mode_check check (mode in ('archive', 'delete')),
  constraint compaction_policies_keep_check check (keep >= 1),
  constraint compaction_policies_min_events_check check (min_events >= 1)
);

comment on table nightowls.compaction_policies is 'Which aggregate types compact() compacts, and how. set_compaction and drop_compaction keep it.';
comment on column nightowls.compaction_policies.org_id is 'The tenant.';
comment on column nightowls.compaction_policies.aggregate_type is 'The aggregate type.';
comment on column nightowls.compaction_policies.keep is 'How many of the newest events stay in the live log.';
comment on column nightowls.compaction_policies.mode is 'archive or delete.';
comment on column nightowls.compaction_policies.min_events is 'How many events of an aggregate must be ready to go before it is compacted.';
comment on column nightowls.compaction_policies.created_at is 'When the policy was made.';

-- How far the replay that is to prove an aggregate's snapshots has got: it can take several calls. The state at the target is kept
-- until the replay has reached a snapshot that the projection took by itself, and equals it.
create table nightowls._replays (
  org_id       uuid        not null,
  projection   text        collate "C" not null,
  generation   bigint      not null,
  aggregate_id text        collate "C" not null,
  target       bigint      not null,
  version      bigint      not null,
  "position"   bigint,
  state        jsonb,
  latest_at    timestamptz,
  target_position bigint,
  target_state jsonb,
  target_latest_at timestamptz,
  constraint _replays_pkey primary key (org_id, projection, generation, aggregate_id)
);

comment on table nightowls._replays is 'Replays that compaction has begun.';
comment on column nightowls._replays.org_id is 'The tenant.';
comment on column nightowls._replays.projection is 'The projection.';
comment on column nightowls._replays.generation is 'The build it belongs to.';
comment on column nightowls._replays.aggregate_id is 'The aggregate.';
comment on column nightowls._replays.target is 'The version compaction wants to reach.';
comment on column nightowls._replays.version is 'The last version replayed.';
comment on column nightowls._replays."position" is 'That event''s position.';
comment on column nightowls._replays.state is 'The state replayed so far.';
comment on column nightowls._replays.latest_at is 'The latest created_at so far.';
comment on column nightowls._replays.target_position is 'The position at the target.';
comment on column nightowls._replays.target_state is 'The state at the target.';
comment on column nightowls._replays.target_latest_at is 'The latest created_at up to the target.';

create trigger t05_projection_only
  before insert or update or delete or truncate on nightowls._replays
  for each statement execute function nightowls._refuse_write();

-- Reading a history that is not all live ----------------------------------------------------------

-- An event that should follow version from_version - 1 does not: the events between were deleted. Where they were erased as
-- well that is no matter, as an erased event begins anew.
create function nightowls._check_gap(event nightowls.events, from_version bigint)
  returns void
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if _check_gap.event.event_type <> 'nightowls.erased' then
    raise exception 'events of % "%" up to version % were deleted', (_check_gap.event).aggregate_type,
        (_check_gap.event).aggregate_id, (_check_gap.event).version - 1
      using errcode = 'NW006',
            detail = format('They are needed from version %s on.', _check_gap.from_version),
            hint = 'Compaction in mode delete has removed them for good; the states from the version it went to on can be had.';
  end if;
end;
$$;

revoke all on function nightowls._check_gap(nightowls.events, bigint) from public;

-- As _fold_tail, over the archive and the live log.
create function nightowls._fold_history(
  org            uuid,
  reducer        jsonb,
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
  v_first nightowls.events;
begin
  select e.* into v_first
    from nightowls.all_events e
   where e.org_id = _fold_history.org
     and e.aggregate_type = _fold_history.aggregate_type
     and e.aggregate_id = _fold_history.aggregate_id
     and e.version >= _fold_history.from_version
   order by e.version
   limit 1;
  if v_first.version > _fold_history.from_version then
    perform nightowls._check_gap(v_first, _fold_history.from_version);
  end if;
  select nightowls._fold_rows(_fold_history.reducer, _fold_history.base, e.event_type, e.aggregate_type, e.aggregate_id,
           e.version, e."position", e.event_id, e.created_at, e.payload, e.metadata),
         max(e.version), max(e."position")
    into state, version, "position"
    from (select e.*
            from nightowls.all_events e
           where e.org_id = _fold_history.org
             and e.aggregate_type = _fold_history.aggregate_type
             and e.aggregate_id = _fold_history.aggregate_id
             and e.version >= _fold_history.from_version
             and e.version <= coalesce(_fold_history.to_version, 9223372036854775807)
           order by e.version) e;
end;
$$;

revoke all on function nightowls._fold_history(uuid, jsonb, jsonb, text, text, bigint, bigint) from public;

-- Locks -------------------------------------------------------------------------------------------

-- Keeps compactions and restores of an aggregate apart, until the transaction ends. There are 16 keys, so that no transaction
-- takes many; two aggregates that share one wait for each other.
create function nightowls._lock_aggregate(org uuid, aggregate_type text, aggregate_id text, waits boolean default true)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_key int := hashtext(_lock_aggregate.org::text || '/' || _lock_aggregate.aggregate_type || '/' || _lock_aggregate.aggregate_id)
               & 15;
begin
  if not _lock_aggregate.waits then
    return pg_try_advisory_xact_lock(nightowls._lock_class(262), v_key);
  end if;
  perform pg_advisory_xact_lock(nightowls._lock_class(262), v_key);
  return true;
end;
$$;

revoke all on function nightowls._lock_aggregate(uuid, text, text, boolean) from public;

-- Builds share the history of an aggregate type; what deletes from it has it alone (false if it cannot).
create function nightowls._lock_history(org uuid, aggregate_type text, alone boolean)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_key int := 16 + (hashtext(_lock_history.org::text || '/' || _lock_history.aggregate_type) & 7);
begin
  if _lock_history.alone then
    return pg_try_advisory_xact_lock(nightowls._lock_class(262), v_key);
  end if;
  perform pg_advisory_xact_lock_shared(nightowls._lock_class(262), v_key);
  return true;
end;
$$;

revoke all on function nightowls._lock_history(uuid, text, boolean) from public;

-- A projection that folds otherwise needs the whole history.
create function nightowls._refuse_without_history(org uuid, aggregate_type text, name text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_gone nightowls.compactions;
begin
  select c.* into v_gone
    from nightowls.compactions c
   where c.org_id = _refuse_without_history.org and c.aggregate_type = _refuse_without_history.aggregate_type and c.deleted_to > 0
   limit 1;
  if found then
    raise exception 'projection "%" cannot be made of events that were deleted', _refuse_without_history.name
      using errcode = 'NW006',
            detail = format('Of %s "%s" versions 1 to %s are gone.', v_gone.aggregate_type, v_gone.aggregate_id, v_gone.deleted_to),
            hint = 'Compact in mode archive what later projections may need.';
  end if;
end;
$$;

revoke all on function nightowls._refuse_without_history(uuid, text, text) from public;

-- What may go ---------------------------------------------------------------------------------------

create function nightowls._refuse_compaction(aggregate_type text, aggregate_id text, reason text, advice text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  raise exception '% "%" cannot be compacted: %', _refuse_compaction.aggregate_type, left(_refuse_compaction.aggregate_id, 64),
      _refuse_compaction.reason
    using errcode = 'NW006', hint = _refuse_compaction.advice;
end;
$$;

revoke all on function nightowls._refuse_compaction(text, text, text, text) from public;

-- The first and the last version of an aggregate that are in the live log, and the first in the archive. Null if there is none.
-- Where compactions says that nothing is it does not look: there lie the rows that were moved and are not vacuumed yet.
create function nightowls._extent(
  org            uuid,
  aggregate_type text,
  aggregate_id   text,
  out archived   bigint,
  out first      bigint,
  out last       bigint
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
  select (select a.version
            from nightowls.events_archive a
           where a.org_id = _extent.org and a.aggregate_type = _extent.aggregate_type and a.aggregate_id = _extent.aggregate_id
             and a.version > h.deleted_to
           order by a.version
           limit 1),
         (select e.version
            from nightowls.events e
           where e.org_id = _extent.org and e.aggregate_type = _extent.aggregate_type and e.aggregate_id = _extent.aggregate_id
             and e.version > h.compacted_to
           order by e.version
           limit 1),
         (select e.version
            from nightowls.events e
           where e.org_id = _extent.org and e.aggregate_type = _extent.aggregate_type and e.aggregate_id = _extent.aggregate_id
           order by e.version desc
           limit 1)
    into archived, first, last
    from (select coalesce(max(c.compacted_to), 0) as compacted_to, coalesce(max(c.deleted_to), 0) as deleted_to
            from nightowls.compactions c
           where c.org_id = _extent.org and c.aggregate_type = _extent.aggregate_type and c.aggregate_id = _extent.aggregate_id) h;
end;
$$;

revoke all on function nightowls._extent(uuid, text, text) from public;

-- The last version of an aggregate in the live log at or below a position; versions rise with positions, so it is looked for by halves.
-- null if there is none.
create function nightowls._version_at_position(org uuid, aggregate_type text, aggregate_id text, first bigint, last bigint, at bigint)
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
  v_low  bigint := _version_at_position.first - 1;
  v_high bigint := _version_at_position.last;
  v_half bigint;
begin
  while v_low < v_high loop
    v_half := (v_low + v_high + 1) / 2;
    if (select e."position"
          from nightowls.events e
         where e.org_id = _version_at_position.org and e.aggregate_type = _version_at_position.aggregate_type
           and e.aggregate_id = _version_at_position.aggregate_id and e.version = v_half) <= _version_at_position.at then
      v_low := v_half;
    else
      v_high := v_half - 1;
    end if;
  end loop;
  return nullif(v_low, _version_at_position.first - 1);
end;
$$;

revoke all on function nightowls._version_at_position(uuid, text, text, bigint, bigint, bigint) from public;

-- Up to which version an aggregate may be compacted now, and who holds the rest back; refuses when nothing may go though there is
-- something. upto is null if there is nothing to do.
-- Definer: consumers and projections are closed.
create function nightowls._compactable(
  org            uuid,
  aggregate_type text,
  aggregate_id   text,
  keep           bigint,
  mode           text,
  out upto       bigint,
  out held_by    text
)
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_extent     record := nightowls._extent(_compactable.org, _compactable.aggregate_type, _compactable.aggregate_id);
  v_first      bigint := case _compactable.mode when 'delete' then coalesce(v_extent.archived, v_extent.first) else v_extent.first end;
  v_consumer   record;
  v_version    bigint;
  v_projection nightowls.projections;
begin
  upto := v_extent.last - _compactable.keep;
  if upto is null or upto < v_first then
    upto := null;
    return;
  end if;

  v_consumer := nightowls._slowest_consumer(_compactable.org, _compactable.aggregate_type);
  if v_consumer.consumer is not null then
    v_version := coalesce(
      nightowls._version_at_position(_compactable.org, _compactable.aggregate_type, _compactable.aggregate_id, v_extent.first,
                                     v_extent.last, v_consumer."offset"),
      -- What is archived has been passed by all.
      v_extent.first - 1);
    if v_version < upto then
      upto := v_version;
      held_by := format('consumer "%s"', v_consumer.consumer);
    end if;
    if upto < v_first then
      perform nightowls._refuse_compaction(
        _compactable.aggregate_type, _compactable.aggregate_id, format('%s has not passed version %s', held_by, v_first),
        'Let it catch up, or drop it with nightowls.drop_consumer().');
    end if;
  end if;

  for v_projection in
    select p.*
      from nightowls.projections p
     where p.org_id = _compactable.org and p.aggregate_type = _compactable.aggregate_type
     order by p.name
  loop
    if v_projection.kind = 'table' then
      if _compactable.mode = 'delete' then
        perform nightowls._refuse_compaction(
          _compactable.aggregate_type, _compactable.aggregate_id,
          format('table projection "%s" could not be made again without its events', v_projection.name),
          'Use mode archive.');
      end if;
      continue;
    end if;
    select max(s.version) into v_version
      from nightowls.snapshots s
     where s.org_id = _compactable.org and s.projection = v_projection.name and s.generation = v_projection.generation
       and s.aggregate_id = _compactable.aggregate_id;
    if coalesce(v_version, 0) < upto then
      upto := coalesce(v_version, 0);
      held_by := format('projection "%s"', v_projection.name);
    end if;
    if upto < v_first then
      perform nightowls._refuse_compaction(
        _compactable.aggregate_type, _compactable.aggregate_id,
        case when v_version is null then format('projection "%s" has no snapshot of it', v_projection.name)
             else format('the newest snapshot of projection "%s" is of version %s', v_projection.name, v_version) end,
        format('Take one with nightowls.create_snapshot(%L, %L).', v_projection.name, _compactable.aggregate_id));
    end if;
  end loop;
end;
$$;

revoke all on function nightowls._compactable(uuid, text, text, bigint, text) from public;

-- The proof ---------------------------------------------------------------------------------------

-- The newest version of which a replay has proven the state.
create function nightowls._proven_to(definition nightowls.projections, aggregate_id text)
  returns bigint
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return coalesce((
    select max(s.version)
      from nightowls.snapshots s
     where s.org_id = (_proven_to.definition).org_id and s.projection = (_proven_to.definition).name
       and s.generation = (_proven_to.definition).generation and s.aggregate_id = _proven_to.aggregate_id and s.proven), 0);
end;
$$;

revoke all on function nightowls._proven_to(nightowls.projections, text) from public;

-- What a replay has to fold next, at most so many events; proven when it is through: then there is a proven snapshot of the target.
-- Definer: nobody else may write snapshots. It runs no code of the user's.
create function nightowls._next_replay(
  org              uuid,
  projection       text,
  aggregate_id     text,
  target           bigint,
  max_events       bigint,
  out base         jsonb,
  out from_version bigint,
  out to_version   bigint,
  out proven       boolean
)
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_door       text := coalesce(current_setting('nightowls.door', true), '');
  v_projection nightowls.projections;
  v_replay     nightowls._replays;
  v_goal       record;
begin
  proven := false;
  select p.* into v_projection
    from nightowls.projections p
   where p.org_id = _next_replay.org and p.name = _next_replay.projection and p.kind in ('reducer', 'handler');
  if not found or nightowls._proven_to(v_projection, _next_replay.aggregate_id) >= _next_replay.target then
    proven := true;
    return;
  end if;

  perform nightowls._open_door('project');
  delete from nightowls._replays r
   where r.org_id = _next_replay.org and r.projection = _next_replay.projection and r.generation = v_projection.generation
     and r.aggregate_id = _next_replay.aggregate_id and r.target <> _next_replay.target;
  select r.* into v_replay
    from nightowls._replays r
   where r.org_id = _next_replay.org and r.projection = _next_replay.projection and r.generation = v_projection.generation
     and r.aggregate_id = _next_replay.aggregate_id;
  if not found then
    -- From what an earlier one has proven, or else from the beginning.
    insert into nightowls._replays as r
           (org_id, projection, generation, aggregate_id, target, version, "position", state, latest_at)
    select _next_replay.org, v_projection.name, v_projection.generation, _next_replay.aggregate_id, _next_replay.target,
           coalesce(b.version, 0), b."position",
           case when b.version is not null then b.state
                when v_projection.kind = 'reducer' then coalesce(v_projection.reducer -> 'initial', '{}') end,
           b.latest_at
      from (select) one
      left join lateral (
             select s.version, s."position", s.state, s.latest_at
               from nightowls.snapshots s
              where s.org_id = _next_replay.org and s.projection = v_projection.name and s.generation = v_projection.generation
                and s.aggregate_id = _next_replay.aggregate_id and s.proven and s.version <= _next_replay.target
              order by s.version desc
              limit 1) b on true
    returning r.* into v_replay;
  end if;

  if v_replay.version = v_replay.target and v_replay.target_position is null then
    update nightowls._replays r
       set target_position = r."position", target_state = r.state, target_latest_at = r.latest_at
     where r.org_id = v_replay.org_id and r.projection = v_replay.projection and r.generation = v_replay.generation
       and r.aggregate_id = v_replay.aggregate_id
    returning r.* into v_replay;
  end if;
  from_version := v_replay.version + 1;
  base := v_replay.state;
  if v_replay.version < v_replay.target then
    to_version := least(v_replay.version + _next_replay.max_events, v_replay.target);
    perform set_config('nightowls.door', v_door, true);
    return;
  end if;

  -- At the target or beyond: the first snapshot there is what it is held against.
  select s.version, s.state into v_goal
    from nightowls.snapshots s
   where s.org_id = _next_replay.org and s.projection = v_projection.name and s.generation = v_projection.generation
     and s.aggregate_id = _next_replay.aggregate_id and s.version >= v_replay.version
   order by s.version
   limit 1;
  if v_goal.version is null then
    perform nightowls._refuse_compaction(
      v_projection.aggregate_type, _next_replay.aggregate_id, format('projection "%s" has no snapshot of it', v_projection.name),
      format('Take one with nightowls.create_snapshot(%L, %L).', v_projection.name, _next_replay.aggregate_id));
  elsif v_goal.version > v_replay.version then
    to_version := least(v_replay.version + _next_replay.max_events, v_goal.version);
    perform set_config('nightowls.door', v_door, true);
    return;
  elsif v_goal.state::text is distinct from v_replay.state::text then
    perform nightowls._refuse_compaction(
      v_projection.aggregate_type, _next_replay.aggregate_id,
      format('a replay differs from the snapshot of projection "%s" at version %s', v_projection.name, v_goal.version),
      format('Make the states anew with nightowls.rebuild_projection(%L); a handler must always give the same answer.',
             v_projection.name));
  end if;

  insert into nightowls.snapshots
         (org_id, projection, generation, aggregate_id, version, "position", state, latest_at, proven)
  values (_next_replay.org, v_projection.name, v_projection.generation, _next_replay.aggregate_id, v_replay.target,
          v_replay.target_position, v_replay.target_state, v_replay.target_latest_at, true)
  on conflict (org_id, projection, generation, aggregate_id, version)
  do update set proven = true, latest_at = excluded.latest_at;
  -- Those before it are proven no longer, and so will be thinned out: it takes their place.
  update nightowls.snapshots s
     set proven = false
   where s.org_id = _next_replay.org and s.projection = v_projection.name and s.generation = v_projection.generation
     and s.aggregate_id = _next_replay.aggregate_id and s.proven and s.version < v_replay.target
     and not exists (
           select from nightowls.compactions c
            where c.org_id = s.org_id and c.aggregate_type = v_projection.aggregate_type and c.aggregate_id = s.aggregate_id
              and c.deleted_to > 0);
  delete from nightowls._replays r
   where r.org_id = v_replay.org_id and r.projection = v_replay.projection and r.generation = v_replay.generation
     and r.aggregate_id = v_replay.aggregate_id;
  perform set_config('nightowls.door', v_door, true);
  proven := true;
end;
$$;

revoke all on function nightowls._next_replay(uuid, text, text, bigint, bigint) from public;

-- Notes what a replay has folded. It runs in functions of the owner's.
create function nightowls._note_replay(
  definition   nightowls.projections,
  aggregate_id text,
  version      bigint,
  at           bigint,
  state        jsonb
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
  v_door text := coalesce(current_setting('nightowls.door', true), '');
begin
  perform nightowls._open_door('project');
  update nightowls._replays r
     set version = _note_replay.version, "position" = _note_replay.at, state = _note_replay.state,
         latest_at = greatest(r.latest_at, (
           select max(e.created_at)
             from nightowls.all_events e
            where e.org_id = r.org_id and e.aggregate_type = (_note_replay.definition).aggregate_type
              and e.aggregate_id = r.aggregate_id and e.version > r.version and e.version <= _note_replay.version))
   where r.org_id = (_note_replay.definition).org_id and r.projection = (_note_replay.definition).name
     and r.generation = (_note_replay.definition).generation and r.aggregate_id = _note_replay.aggregate_id;
  perform set_config('nightowls.door', v_door, true);
end;
$$;

revoke all on function nightowls._note_replay(nightowls.projections, text, bigint, bigint, jsonb) from public;

-- The same for a replay by a handler, for no other kind of projection. Definer: the table is closed.
create function nightowls._save_replay(org uuid, projection text, aggregate_id text, version bigint, at bigint, state jsonb)
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
   where p.org_id = _save_replay.org and p.name = _save_replay.projection and p.kind = 'handler';
  if not found then
    raise exception 'projection "%" is not replayed by a handler', _save_replay.projection
      using errcode = 'NW008', hint = 'Use nightowls.compact_aggregate().';
  end if;
  perform nightowls._note_replay(v_definition, _save_replay.aggregate_id, _save_replay.version, _save_replay.at, _save_replay.state);
end;
$$;

revoke all on function nightowls._save_replay(uuid, text, text, bigint, bigint, jsonb) from public;

-- So many events next time, that a step takes about a fiftieth of a second to a tenth.
create function nightowls._next_step(step bigint, since timestamptz)
  returns bigint
  language sql
  volatile
  parallel safe
  return case
    when clock_timestamp() - since < interval '20 milliseconds' then least(step * 2, 50000)
    when clock_timestamp() - since > interval '100 milliseconds' then greatest(step / 2, 50)
    else step
  end;

revoke all on function nightowls._next_step(bigint, timestamptz) from public;

-- Replays a reducer projection's history of one aggregate, as the owner, until it is proven up to the target or time is up (false).
-- Definer: nobody else may write snapshots.
create function nightowls._prove_reduced(org uuid, projection text, aggregate_id text, target bigint, until timestamptz)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_definition nightowls.projections;
  v_next       record;
  v_folded     record;
  v_since      timestamptz;
  v_step       bigint := 500;
begin
  select p.* into v_definition
    from nightowls.projections p
   where p.org_id = _prove_reduced.org and p.name = _prove_reduced.projection and p.kind = 'reducer';
  loop
    v_since := clock_timestamp();
    v_next := nightowls._next_replay(_prove_reduced.org, _prove_reduced.projection, _prove_reduced.aggregate_id,
                                     _prove_reduced.target, v_step);
    if v_next.proven then
      return true;
    end if;
    v_folded := nightowls._fold_tail(
      _prove_reduced.org, v_definition.reducer, v_next.base, v_definition.aggregate_type, _prove_reduced.aggregate_id,
      v_next.from_version, v_next.to_version);
    perform nightowls._note_replay(v_definition, _prove_reduced.aggregate_id, v_folded.version, v_folded."position",
                                   v_folded.state);
    if clock_timestamp() > _prove_reduced.until then
      return false;
    end if;
    v_step := nightowls._next_step(v_step, v_since);
  end loop;
end;
$$;

revoke all on function nightowls._prove_reduced(uuid, text, text, bigint, timestamptz) from public;

-- The same for any projection that keeps states. Invoker: handlers are run as the caller.
create function nightowls._prove(definition nightowls.projections, aggregate_id text, target bigint, until timestamptz)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_next   record;
  v_folded record;
  v_since  timestamptz;
  v_step   bigint := 200;
begin
  if (_prove.definition).kind = 'reducer' then
    return nightowls._prove_reduced((_prove.definition).org_id, (_prove.definition).name, _prove.aggregate_id, _prove.target,
                                    _prove.until);
  end if;
  loop
    v_since := clock_timestamp();
    v_next := nightowls._next_replay((_prove.definition).org_id, (_prove.definition).name, _prove.aggregate_id, _prove.target,
                                     v_step);
    if v_next.proven then
      return true;
    end if;
    v_folded := nightowls._fold_by_handler(
      (_prove.definition).org_id, (_prove.definition).handler, v_next.base, (_prove.definition).aggregate_type,
      _prove.aggregate_id, v_next.from_version, v_next.to_version);
    perform nightowls._save_replay((_prove.definition).org_id, (_prove.definition).name, _prove.aggregate_id, v_folded.version,
                                   v_folded."position", v_folded.state);
    if clock_timestamp() > _prove.until then
      return false;
    end if;
    v_step := nightowls._next_step(v_step, v_since);
  end loop;
end;
$$;

revoke all on function nightowls._prove(nightowls.projections, text, bigint, timestamptz) from public;

-- Moving ------------------------------------------------------------------------------------------

-- Begins a run, or goes on with one: the version it goes to. What it was to reach stays, as its replays are on the way there.
-- Definer: the table is closed.
create function nightowls._begin_run(org uuid, aggregate_type text, aggregate_id text, operation text, upto bigint)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_target bigint;
begin
  insert into nightowls.compactions as c (org_id, aggregate_type, aggregate_id, operation, target)
  values (_begin_run.org, _begin_run.aggregate_type, _begin_run.aggregate_id, _begin_run.operation, _begin_run.upto)
  on conflict (org_id, aggregate_type, aggregate_id)
  do update set operation = excluded.operation, refused = null, updated_at = clock_timestamp(),
                started_at = case when c.operation = excluded.operation then c.started_at else clock_timestamp() end,
                target = case when c.operation = excluded.operation then least(c.target, excluded.target) else excluded.target end
  returning c.target into v_target;
  return v_target;
end;
$$;

revoke all on function nightowls._begin_run(uuid, text, text, text, bigint) from public;

-- Notes how a run stands: where the live log begins, what is gone, and that it is through.
-- Definer: the table is closed.
create function nightowls._end_run(org uuid, aggregate_type text, aggregate_id text, ended boolean)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_extent record := nightowls._extent(_end_run.org, _end_run.aggregate_type, _end_run.aggregate_id);
begin
  update nightowls.compactions c
     set compacted_to = v_extent.first - 1, deleted_to = coalesce(v_extent.archived, v_extent.first) - 1,
         operation = case when not _end_run.ended then c.operation end, target = case when not _end_run.ended then c.target end,
         updated_at = clock_timestamp()
   where c.org_id = _end_run.org and c.aggregate_type = _end_run.aggregate_type and c.aggregate_id = _end_run.aggregate_id;
  -- What nobody would ask for again.
  delete from nightowls.compactions c
   where c.org_id = _end_run.org and c.aggregate_type = _end_run.aggregate_type and c.aggregate_id = _end_run.aggregate_id
     and c.operation is null and c.compacted_to = 0;
  return v_extent.first - 1;
end;
$$;

revoke all on function nightowls._end_run(uuid, text, text, boolean) from public;

-- Moves at most so many events, the oldest first, and returns how many. It looks for itself whether they may go: it can be called
-- by any service.
-- Definer: nobody else may change the log.
create function nightowls._move_events(org uuid, aggregate_type text, aggregate_id text, upto bigint, mode text, qty bigint)
  returns bigint
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
  v_door   text := coalesce(current_setting('nightowls.door', true), '');
  v_extent record := nightowls._extent(_move_events.org, _move_events.aggregate_type, _move_events.aggregate_id);
  v_last   bigint;
  v_unproven text;
  v_moved  bigint := 0;
begin
  if _move_events.upto > coalesce((
       nightowls._compactable(_move_events.org, _move_events.aggregate_type, _move_events.aggregate_id, 1, _move_events.mode)).upto, 0) then
    perform nightowls._refuse_compaction(_move_events.aggregate_type, _move_events.aggregate_id,
                                         format('version %s may not go', _move_events.upto), 'Use nightowls.compact_aggregate().');
  end if;
  select p.name into v_unproven
    from nightowls.projections p
   where p.org_id = _move_events.org and p.aggregate_type = _move_events.aggregate_type and p.kind in ('reducer', 'handler')
     and (nightowls._proven_to(p, _move_events.aggregate_id) < _move_events.upto
          or _move_events.mode = 'delete' and coalesce((nightowls._base(p, _move_events.aggregate_id, null)).version, 0) < _move_events.upto)
   order by p.name
   limit 1;
  if found then
    perform nightowls._refuse_compaction(
      _move_events.aggregate_type, _move_events.aggregate_id, format('no replay has proven projection "%s"', v_unproven),
      'Use nightowls.compact_aggregate().');
  end if;

  perform nightowls._open_door('maintain');
  if _move_events.mode = 'archive' then
    v_last := least(_move_events.upto, v_extent.first + _move_events.qty - 1);
    with moved as (
      delete from nightowls.events e
       where e.org_id = _move_events.org and e.aggregate_type = _move_events.aggregate_type
         and e.aggregate_id = _move_events.aggregate_id and e.version between v_extent.first and v_last
      returning e.*
    )
    insert into nightowls.events_archive
           (org_id, "position", aggregate_type, aggregate_id, version, event_type, payload, metadata, event_id, created_at)
    select m.org_id, m."position", m.aggregate_type, m.aggregate_id, m.version, m.event_type, m.payload, m.metadata, m.event_id,
           m.created_at
      from moved m;
    get diagnostics v_moved = row_count;
  elsif v_extent.archived <= _move_events.upto then
    v_last := least(_move_events.upto, v_extent.archived + _move_events.qty - 1, v_extent.first - 1);
    delete from nightowls.events_archive a
     where a.org_id = _move_events.org and a.aggregate_type = _move_events.aggregate_type
       and a.aggregate_id = _move_events.aggregate_id and a.version between v_extent.archived and v_last;
    get diagnostics v_moved = row_count;
  else
    v_last := least(_move_events.upto, v_extent.first + _move_events.qty - 1);
    delete from nightowls.events e
     where e.org_id = _move_events.org and e.aggregate_type = _move_events.aggregate_type
       and e.aggregate_id = _move_events.aggregate_id and e.version between v_extent.first and v_last;
    get diagnostics v_moved = row_count;
  end if;
  update nightowls.compactions c
     set compacted_to = greatest(c.compacted_to, v_last),
         deleted_to = case _move_events.mode when 'delete' then greatest(c.deleted_to, v_last) else c.deleted_to end
   where c.org_id = _move_events.org and c.aggregate_type = _move_events.aggregate_type and c.aggregate_id = _move_events.aggregate_id;
  perform set_config('nightowls.door', v_door, true);
  return v_moved;
end;
$$;

revoke all on function nightowls._move_events(uuid, text, text, bigint, text, bigint) from public;

create function nightowls._check_compaction(aggregate_type text, keep bigint, mode text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if octet_length(_check_compaction.aggregate_type) not between 1 and 255 or _check_compaction.aggregate_type is null then
    perform nightowls._refuse_names(_check_compaction.aggregate_type, 'any', 'any');
  elsif _check_compaction.keep is null or _check_compaction.mode is null then
    raise exception 'keep and mode must not be null' using errcode = 'null_value_not_allowed';
  elsif _check_compaction.keep < 1 then
    raise exception 'keep must be 1 or more'
      using errcode = 'invalid_parameter_value', detail = 'The newest event of an aggregate always stays.';
  elsif _check_compaction.mode not in ('archive', 'delete') then
    raise exception 'mode must be archive or delete' using errcode = 'invalid_parameter_value';
  end if;
end;
$$;

revoke all on function nightowls._check_compaction(text, bigint, text) from public;

-- One slice of the compaction of an aggregate, whose lock the caller has. Invoker: handlers are run as the caller.
create function nightowls._compact(
  org              uuid,
  aggregate_type   text,
  aggregate_id     text,
  keep             bigint,
  mode             text,
  until            timestamptz,
  out moved        bigint,
  out compacted_to bigint,
  out more         boolean,
  out held_by      text
)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_plan       record;
  v_projection nightowls.projections;
  v_target     bigint;
  v_since      timestamptz;
  v_step       bigint := 500;
  v_moved      bigint;
begin
  moved := 0;
  more := false;
  perform nightowls._share_erasure(_compact.org);
  if _compact.mode = 'delete' then
    if current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
      raise exception 'events cannot be deleted at isolation level %', current_setting('transaction_isolation')
        using errcode = 'active_sql_transaction',
              detail = 'A projection made since the snapshot was taken would not be seen.',
              hint = 'Use read committed.';
    elsif not nightowls._lock_history(_compact.org, _compact.aggregate_type, true) then
      perform nightowls._refuse_compaction(
        _compact.aggregate_type, _compact.aggregate_id, 'a projection is being made or another compaction deletes',
        'Try again when it is done.');
    end if;
  end if;

  v_plan := nightowls._compactable(_compact.org, _compact.aggregate_type, _compact.aggregate_id, _compact.keep, _compact.mode);
  held_by := v_plan.held_by;
  if v_plan.upto is null then
    compacted_to := coalesce(nightowls._end_run(_compact.org, _compact.aggregate_type, _compact.aggregate_id, true), 0);
    return;
  end if;
  v_target := nightowls._begin_run(_compact.org, _compact.aggregate_type, _compact.aggregate_id, _compact.mode, v_plan.upto);

  for v_projection in
    select p.*
      from nightowls.projections p
     where p.org_id = _compact.org and p.aggregate_type = _compact.aggregate_type and p.kind in ('reducer', 'handler')
     order by p.name
  loop
    if not nightowls._prove(v_projection, _compact.aggregate_id, v_target, _compact.until) then
      more := true;
      compacted_to := nightowls._end_run(_compact.org, _compact.aggregate_type, _compact.aggregate_id, false);
      return;
    end if;
  end loop;

  loop
    v_since := clock_timestamp();
    v_moved := nightowls._move_events(_compact.org, _compact.aggregate_type, _compact.aggregate_id, v_target, _compact.mode, v_step);
    moved := moved + v_moved;
    more := nightowls._has_to_go(_compact.org, _compact.aggregate_type, _compact.aggregate_id, v_target, _compact.mode);
    exit when not more or clock_timestamp() > _compact.until;
    v_step := nightowls._next_step(v_step, v_since);
  end loop;
  compacted_to := nightowls._end_run(_compact.org, _compact.aggregate_type, _compact.aggregate_id, not more);
  -- What has become free meanwhile is for the next call.
  more := more or v_target < v_plan.upto;
end;
$$;

revoke all on function nightowls._compact(uuid, text, text, bigint, text, timestamptz) from public;

-- Whether there is still something up to a version.
create function nightowls._has_to_go(org uuid, aggregate_type text, aggregate_id text, upto bigint, mode text)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_extent record := nightowls._extent(_has_to_go.org, _has_to_go.aggregate_type, _has_to_go.aggregate_id);
begin
  return coalesce(case _has_to_go.mode when 'delete' then v_extent.archived end, v_extent.first) <= _has_to_go.upto;
end;
$$;

revoke all on function nightowls._has_to_go(uuid, text, text, bigint, text) from public;

create function nightowls.compact_aggregate(
  aggregate_type   text,
  aggregate_id     text,
  keep             bigint default 1,
  mode             text default 'archive',
  max_ms           int default 1000,
  org              uuid default null,
  out moved        bigint,
  out compacted_to bigint,
  out more         boolean,
  out held_by      text
)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org uuid := nightowls.current_org(compact_aggregate.org);
begin
  perform nightowls._check_compaction(compact_aggregate.aggregate_type, compact_aggregate.keep, compact_aggregate.mode);
  if compact_aggregate.aggregate_id is null or compact_aggregate.max_ms is null then
    raise exception 'aggregate_id and max_ms must not be null' using errcode = 'null_value_not_allowed';
  elsif compact_aggregate.max_ms < 1 then
    raise exception 'max_ms must be 1 or more' using errcode = 'invalid_parameter_value';
  end if;
  perform nightowls._lock_aggregate(v_org, compact_aggregate.aggregate_type, compact_aggregate.aggregate_id);
  select c.moved, c.compacted_to, c.more, c.held_by
    into moved, compacted_to, more, held_by
    from nightowls._compact(
           v_org, compact_aggregate.aggregate_type, compact_aggregate.aggregate_id, compact_aggregate.keep, compact_aggregate.mode,
           clock_timestamp() + compact_aggregate.max_ms * interval '1 millisecond') c;
end;
$$;

comment on function nightowls.compact_aggregate(text, text, bigint, text, int, uuid) is
  'Moves the older events of one aggregate out of the live log: those that every projection of its type has a snapshot of, every consumer '
  'has passed, and of which a replay equals the snapshot. aggregate_type, aggregate_id: which one; keep: how many of the newest '
  'events stay, at least 1; mode: archive (into events_archive) or delete (for good); max_ms: milliseconds after which it stops and leaves the '
  'rest to the next call; org: the tenant. Returns moved, how many events this call moved; compacted_to, the last version that is not in the '
  'live log; more, whether to call again; held_by, the consumer or projection that keeps it from going further. Versions and positions '
  'never change, and states are the same before, during and after. Handlers are replayed as the caller. Waits for another compaction '
  'of the aggregate, not for appends, nor do they wait for it. Raises NW006 with the reason if something is to go and nothing may, 25001 in mode delete above '
  'read committed, 22004 or 22023 for an argument that is null or not valid, 54000 for one that is too long, NW010 if there is no org.';

revoke all on function nightowls.compact_aggregate(text, text, bigint, text, int, uuid) from public;

-- Puts archived events back, the newest first, so that what is live has no gap; how many.
-- Definer: nobody else may change the log.
create function nightowls._put_back(org uuid, aggregate_type text, aggregate_id text, qty bigint)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp, pg_append
  set enable_seqscan to off
  set enable_sort to off
  set enable_bitmapscan to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
declare
  v_door  text := coalesce(current_setting('nightowls.door', true), '');
  v_last  bigint;
  v_moved bigint := 0;
begin
  select a.version into v_last
    from nightowls.events_archive a
   where a.org_id = _put_back.org and a.aggregate_type = _put_back.aggregate_type and a.aggregate_id = _put_back.aggregate_id
     and a.version <= (
           select c.compacted_to
             from nightowls.compactions c
            where c.org_id = _put_back.org and c.aggregate_type = _put_back.aggregate_type
              and c.aggregate_id = _put_back.aggregate_id)
   order by a.version desc
   limit 1;
  if v_last is null then
    return 0;
  end if;
  insert into nightowls.events
         (org_id, "position", aggregate_type, aggregate_id, version, event_type, payload, metadata, event_id, created_at)
  overriding system value
  select a.org_id, a."position", a.aggregate_type, a.aggregate_id, a.version, a.event_type, a.payload, a.metadata, a.event_id,
         a.created_at
    from nightowls.events_archive a
   where a.org_id = _put_back.org and a.aggregate_type = _put_back.aggregate_type and a.aggregate_id = _put_back.aggregate_id
     and a.version between v_last - _put_back.qty + 1 and v_last;
  perform nightowls._open_door('maintain');
  delete from nightowls.events_archive a
   where a.org_id = _put_back.org and a.aggregate_type = _put_back.aggregate_type and a.aggregate_id = _put_back.aggregate_id
     and a.version between v_last - _put_back.qty + 1 and v_last;
  get diagnostics v_moved = row_count;
  update nightowls.compactions c
     set compacted_to = v_last - v_moved
   where c.org_id = _put_back.org and c.aggregate_type = _put_back.aggregate_type and c.aggregate_id = _put_back.aggregate_id;
  perform set_config('nightowls.door', v_door, true);
  return v_moved;
end;
$$;

revoke all on function nightowls._put_back(uuid, text, text, bigint) from public;

create function nightowls.restore_aggregate(
  aggregate_type   text,
  aggregate_id     text,
  max_ms           int default 1000,
  org              uuid default null,
  out moved        bigint,
  out compacted_to bigint,
  out more         boolean
)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org    uuid := nightowls.current_org(restore_aggregate.org);
  v_until  timestamptz := clock_timestamp() + restore_aggregate.max_ms * interval '1 millisecond';
  v_extent record;
  v_since  timestamptz;
  v_step   bigint := 500;
begin
  if restore_aggregate.aggregate_type is null or restore_aggregate.aggregate_id is null or restore_aggregate.max_ms is null then
    raise exception 'aggregate_type, aggregate_id and max_ms must not be null' using errcode = 'null_value_not_allowed';
  elsif restore_aggregate.max_ms < 1 then
    raise exception 'max_ms must be 1 or more' using errcode = 'invalid_parameter_value';
  end if;
  perform nightowls._lock_aggregate(v_org, restore_aggregate.aggregate_type, restore_aggregate.aggregate_id);
  perform nightowls._share_erasure(v_org);
  moved := 0;
  loop
    v_extent := nightowls._extent(v_org, restore_aggregate.aggregate_type, restore_aggregate.aggregate_id);
    more := v_extent.archived is not null;
    if moved = 0 and more then
      perform nightowls._begin_run(v_org, restore_aggregate.aggregate_type, restore_aggregate.aggregate_id, 'restore',
                                   v_extent.archived - 1);
    end if;
    exit when not more or moved > 0 and clock_timestamp() > v_until;
    v_since := clock_timestamp();
    moved := moved + nightowls._put_back(v_org, restore_aggregate.aggregate_type, restore_aggregate.aggregate_id, v_step);
    v_step := nightowls._next_step(v_step, v_since);
  end loop;
  compacted_to := coalesce(
    nightowls._end_run(v_org, restore_aggregate.aggregate_type, restore_aggregate.aggregate_id, not more), 0);
end;
$$;

comment on function nightowls.restore_aggregate(text, text, int, uuid) is
  'Puts the archived events of one aggregate back into the log, as they were, at their positions. aggregate_type, aggregate_id: which '
  'one; max_ms: milliseconds after which it stops and leaves the rest to the next call; org: the tenant. Returns moved, how many events this call '
  'moved; compacted_to, the last version that is not in the live log; more, whether to call again. Consumers that are past the '
  'positions do not see them again, unless they seek back. A policy of set_compaction compacts them again. Waits for a compaction of the aggregate. Raises '
  '22004 or 22023 for an argument that is null or not valid, NW010 if there is no org.';

revoke all on function nightowls.restore_aggregate(text, text, int, uuid) from public;

-- Policies and the sweep --------------------------------------------------------------------------

-- Definer: the table is closed.
create function nightowls._save_compaction(policy nightowls.compaction_policies, dropped boolean)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if _save_compaction.dropped then
    delete from nightowls.compaction_policies c
     where c.org_id = (_save_compaction.policy).org_id and c.aggregate_type = (_save_compaction.policy).aggregate_type;
    return found;
  end if;
  perform nightowls._refuse_no_org((_save_compaction.policy).org_id);
  insert into nightowls.compaction_policies (org_id, aggregate_type, keep, mode, min_events)
  values ((_save_compaction.policy).org_id, (_save_compaction.policy).aggregate_type, (_save_compaction.policy).keep,
          (_save_compaction.policy).mode, (_save_compaction.policy).min_events)
  on conflict (org_id, aggregate_type)
  do update set keep = excluded.keep, mode = excluded.mode, min_events = excluded.min_events;
  return true;
end;
$$;

revoke all on function nightowls._save_compaction(nightowls.compaction_policies, boolean) from public;

create function nightowls.set_compaction(
  aggregate_type text,
  keep           bigint default 1,
  mode           text default 'archive',
  min_events     bigint default 1000,
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
  v_policy nightowls.compaction_policies;
begin
  v_policy.org_id := nightowls.current_org(set_compaction.org);
  perform nightowls._check_compaction(set_compaction.aggregate_type, set_compaction.keep, set_compaction.mode);
  if set_compaction.min_events is null then
    raise exception 'min_events must not be null' using errcode = 'null_value_not_allowed';
  elsif set_compaction.min_events < 1 then
    raise exception 'min_events must be 1 or more' using errcode = 'invalid_parameter_value';
  end if;
  v_policy.aggregate_type := set_compaction.aggregate_type;
  v_policy.keep := set_compaction.keep;
  v_policy.mode := set_compaction.mode;
  v_policy.min_events := set_compaction.min_events;
  perform nightowls._save_compaction(v_policy, false);
end;
$$;

comment on function nightowls.set_compaction(text, bigint, text, bigint, uuid) is
  'Lets compact() compact the aggregates of a type; without this it touches none. aggregate_type: which; keep and mode: as in '
  'compact_aggregate; min_events: how many events of an aggregate must be ready to go before it is compacted; org: the tenant. '
  'Again, it replaces what was set. Raises 22004 or 22023 for an argument that is null or not valid, 54000 for one that is too long, NW010 '
  'if there is no org.';

revoke all on function nightowls.set_compaction(text, bigint, text, bigint, uuid) from public;

create function nightowls.drop_compaction(aggregate_type text, org uuid default null)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_policy nightowls.compaction_policies;
begin
  v_policy.org_id := nightowls.current_org(drop_compaction.org);
  if drop_compaction.aggregate_type is null then
    raise exception 'aggregate_type must not be null' using errcode = 'null_value_not_allowed';
  end if;
  v_policy.aggregate_type := drop_compaction.aggregate_type;
  return nightowls._save_compaction(v_policy, true);
end;
$$;

comment on function nightowls.drop_compaction(text, uuid) is
  'Takes back what set_compaction said of an aggregate type; what is compacted stays so. true if there was something to take back. '
  'aggregate_type: which; org: the tenant. Raises 22004 for a null argument, NW010 if there is no org.';

revoke all on function nightowls.drop_compaction(text, uuid) from public;

-- The next aggregate of a type, after one, and how many live events it has. Null if there is none.
create function nightowls._next_aggregate(org uuid, aggregate_type text, after_id text, out aggregate_id text, out live bigint)
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
  v_extent record;
begin
  select e.aggregate_id into aggregate_id
    from nightowls.events e
   where e.org_id = _next_aggregate.org and e.aggregate_type = _next_aggregate.aggregate_type
     and e.aggregate_id > _next_aggregate.after_id
   order by e.aggregate_id
   limit 1;
  if aggregate_id is not null then
    v_extent := nightowls._extent(_next_aggregate.org, _next_aggregate.aggregate_type, aggregate_id);
    live := v_extent.last - v_extent.first + 1;
  end if;
end;
$$;

revoke all on function nightowls._next_aggregate(uuid, text, text) from public;

-- Notes why the sweep could not compact an aggregate. Definer: the table is closed.
create function nightowls._note_refusal(org uuid, aggregate_type text, aggregate_id text, reason text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  insert into nightowls.compactions as c (org_id, aggregate_type, aggregate_id, refused)
  values (_note_refusal.org, _note_refusal.aggregate_type, _note_refusal.aggregate_id, _note_refusal.reason)
  on conflict (org_id, aggregate_type, aggregate_id)
  do update set refused = excluded.refused, updated_at = clock_timestamp();
end;
$$;

revoke all on function nightowls._note_refusal(uuid, text, text, text) from public;

-- One aggregate of the sweep: takes the snapshots that are missing, then a slice.
create function nightowls._compact_by_policy(
  policy           nightowls.compaction_policies,
  aggregate_id     text,
  until            timestamptz,
  out moved        bigint,
  out compacted_to bigint,
  out more         boolean,
  out held_by      text
)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_projection nightowls.projections;
  v_goal       bigint := (nightowls._extent((_compact_by_policy.policy).org_id, (_compact_by_policy.policy).aggregate_type,
                                            _compact_by_policy.aggregate_id)).last - (_compact_by_policy.policy).keep;
begin
  perform nightowls._share_erasure((_compact_by_policy.policy).org_id);
  for v_projection in
    select p.*
      from nightowls.projections p
     where p.org_id = (_compact_by_policy.policy).org_id and p.aggregate_type = (_compact_by_policy.policy).aggregate_type
       and p.kind in ('reducer', 'handler')
       and not exists (
             select from nightowls.snapshots s
              where s.org_id = p.org_id and s.projection = p.name and s.generation = p.generation
                and s.aggregate_id = _compact_by_policy.aggregate_id
                and s.version >= v_goal - (_compact_by_policy.policy).min_events)
     order by p.name
  loop
    perform nightowls._snapshot(v_projection, _compact_by_policy.aggregate_id);
  end loop;
  select c.moved, c.compacted_to, c.more, c.held_by
    into moved, compacted_to, more, held_by
    from nightowls._compact(
           (_compact_by_policy.policy).org_id, (_compact_by_policy.policy).aggregate_type, _compact_by_policy.aggregate_id,
           (_compact_by_policy.policy).keep, (_compact_by_policy.policy).mode, _compact_by_policy.until) c;
end;
$$;

revoke all on function nightowls._compact_by_policy(nightowls.compaction_policies, text, timestamptz) from public;

create function nightowls.compact(max_aggregates int default 100, max_ms int default 1000)
  returns table (org_id uuid, aggregate_type text, aggregate_id text, moved bigint, compacted_to bigint, more boolean,
                 held_by text, error text)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_until  timestamptz := clock_timestamp() + compact.max_ms * interval '1 millisecond';
  v_slice  timestamptz;
  v_policy nightowls.compaction_policies;
  v_turn   record;
  v_next   record;
  v_done   record;
  v_after  text;
  v_looked int;
  v_left   int := compact.max_aggregates;
  v_orgs   uuid[] := '{}';
  v_first  boolean := true;
  v_more   boolean;
  v_full   boolean := false;
  v_before bigint;
begin
  perform nightowls._check_sweep(compact.max_aggregates, compact.max_ms);
  if not nightowls._begin_sweep('compaction') then
    return;
  end if;
  v_before := nightowls._locks_held();
  loop
    v_more := false;
    -- Each aggregate type of each org in turn, the one that has waited longest first; then those that are not through.
    <<turns>>
    for v_turn in
      select p as policy, coalesce(w.after_id, '') as after_id
        from nightowls.compaction_policies p
        left join nightowls._sweeps w on w.org_id = p.org_id and w.sweep = 'compaction' and w.name = p.aggregate_type
       where v_first or w.after_id <> ''
       order by w.swept_at nulls first, p.org_id, p.aggregate_type
    loop
      v_policy := v_turn.policy;
      v_after := v_turn.after_id;
      -- A turn is 1,000 aggregates or a quarter of the time.
      v_slice := least(v_until, clock_timestamp() + compact.max_ms * interval '1 millisecond' / 4);
      v_looked := 0;
      loop
        v_next := nightowls._next_aggregate(v_policy.org_id, v_policy.aggregate_type, v_after);
        if v_next.aggregate_id is null then
          v_after := '';
          exit;
        end if;
        v_looked := v_looked + 1;
        if v_next.live - v_policy.keep >= v_policy.min_events
           or nightowls._is_running(v_policy.org_id, v_policy.aggregate_type, v_next.aggregate_id) then
          if v_policy.org_id <> all (v_orgs) then
            -- Each org is a lock that is kept until the transaction ends: who is left out has not had its turn and comes first in the next call.
            -- Its aggregates and histories are up to 24 locks more, and the transaction may have had some before, as the clock's has.
            v_full := cardinality(v_orgs) = 24 or v_orgs <> '{}' and v_before > 16 and nightowls._locks_held() >= 38;
            exit turns when v_full;
            -- An erasure is not waited for: the others would wait too.
            continue turns when not nightowls._try_share_erasure(v_policy.org_id);
            v_orgs := v_orgs || v_policy.org_id;
          end if;
          compact.org_id := v_policy.org_id;
          compact.aggregate_type := v_policy.aggregate_type;
          compact.aggregate_id := v_next.aggregate_id;
          if nightowls._lock_aggregate(v_policy.org_id, v_policy.aggregate_type, v_next.aggregate_id, false) then
            begin
              select c.moved, c.compacted_to, c.more, c.held_by, null
                into compact.moved, compact.compacted_to, compact.more, compact.held_by, compact.error
                from nightowls._compact_by_policy(v_policy, v_next.aggregate_id, v_slice) c;
            exception when others then
              -- One that cannot be compacted does not stop the rest; it comes back with the reason, and stands in progress.
              compact.moved := 0;
              compact.compacted_to := null;
              compact.more := false;
              compact.held_by := null;
              compact.error := sqlstate || ' ' || sqlerrm;
            end;
            if compact.error is not null then
              perform nightowls._note_refusal(v_policy.org_id, v_policy.aggregate_type, v_next.aggregate_id, compact.error);
            end if;
            return next;
            v_left := v_left - 1;
            -- What is not through is gone on with in the next turn.
            exit when compact.more;
          end if;
        end if;
        v_after := v_next.aggregate_id;
        exit when v_left = 0 or v_looked = 1000 or clock_timestamp() > v_slice;
      end loop;
      v_more := v_more or v_after <> '' or coalesce(compact.more, false);
      perform nightowls._end_turn(v_policy.org_id, 'compaction', v_policy.aggregate_type, v_after);
      if v_left = 0 or clock_timestamp() > v_until then
        return;
      end if;
    end loop;
    exit when not v_more or v_full;
    v_first := false;
  end loop;
end;
$$;

comment on function nightowls.compact(int, int) is
  'Compacts what the policies of set_compaction ask for, of all orgs and aggregate types in turn, and takes the snapshots that needs: for '
  'cron. max_aggregates: how many at most; max_ms: milliseconds after which it stops: the next call goes on from there. The type that has waited longest comes '
  'first, a turn is at most 1,000 aggregates and a quarter of the time, and a call works for 24 orgs at most, as each is a lock until the transaction ends: '
  'those left out come first in the next call. Returns a row for each aggregate '
  'it took: moved, compacted_to, more and held_by as compact_aggregate does, or the error for which nothing was moved, which stands in '
  'progress too. Handlers are replayed as the caller. Waits for nobody: an aggregate that somebody else is compacting is left out, and an org in which something '
  'is being erased. Returns nothing while another call runs. Service only. Raises 22004 or 22023 for an argument that is null or below 1.';

revoke all on function nightowls.compact(int, int) from public;

-- Whether a compaction of an aggregate is under way.
create function nightowls._is_running(org uuid, aggregate_type text, aggregate_id text)
  returns boolean
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return exists (
    select from nightowls.compactions c
     where c.org_id = _is_running.org and c.aggregate_type = _is_running.aggregate_type
       and c.aggregate_id = _is_running.aggregate_id and c.operation in ('archive', 'delete'));
end;
$$;

revoke all on function nightowls._is_running(uuid, text, text) from public;

create view nightowls.progress
  with (security_invoker = true)
as
  select c.org_id,
         case when c.operation = 'restore' then 'restore' else 'compaction' end as operation,
         c.aggregate_type || ' ' || c.aggregate_id as subject,
         case when c.operation = 'restore' then 'putting back'
              when c.operation is null then 'refused'
              when r.version is not null then 'proving'
              else 'moving' end as phase,
         case when c.operation = 'restore' then null when r.version is not null then least(r.version, c.target) else c.compacted_to end as done,
         c.target as total,
         c.refused as reason,
         c.started_at,
         c.updated_at,
         null::int as pid
    from nightowls.compactions c
    left join lateral (
           select min(x.version) as version
             from nightowls.projections p
             join nightowls._replays x
               on x.org_id = p.org_id and x.projection = p.name and x.generation = p.generation
            where p.org_id = c.org_id and p.aggregate_type = c.aggregate_type and x.aggregate_id = c.aggregate_id) r on true
   where c.operation is not null or c.refused is not null
   union all
  select p.org_id, 'build', p.name, case when l.granted then 'building' else 'waiting' end, null, null, null, a.xact_start, null, l.pid
    from pg_catalog.pg_locks l
    join nightowls.projections p
      on l.objid::bigint = (pg_catalog.hashtext(p.org_id::text || '/' || p.name)::bigint & 4294967295)
    left join pg_catalog.pg_stat_activity a on a.pid = l.pid
   where l.locktype = 'advisory' and l.objsubid = 2 and l.classid::bigint = nightowls._lock_class(259)
     and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = pg_catalog.current_database());

comment on view nightowls.progress is
  'What takes long and is not through: compactions and restores that the next call goes on with, compactions that the sweep could not do, '
  'and builds of projections that run at this moment.';
comment on column nightowls.progress.org_id is 'The tenant.';
comment on column nightowls.progress.operation is 'compaction, restore or build.';
comment on column nightowls.progress.subject is 'The aggregate''s type and id, or the projection.';
comment on column nightowls.progress.phase is 'proving, moving or refused; putting back; building or waiting (for another build of it).';
comment on column nightowls.progress.done is 'The last version proven or moved.';
comment on column nightowls.progress.total is 'The version it goes to.';
comment on column nightowls.progress.reason is 'Why it was refused.';
comment on column nightowls.progress.started_at is 'When it began.';
comment on column nightowls.progress.updated_at is 'When it last got on; null of a build, which is one transaction.';
comment on column nightowls.progress.pid is 'The process that builds.';

alter table nightowls.events_archive enable row level security;
alter table nightowls.events_archive force row level security;
create policy service_all on nightowls.events_archive
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));

alter table nightowls.compactions enable row level security;
alter table nightowls.compactions force row level security;
create policy service_all on nightowls.compactions
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));

alter table nightowls.compaction_policies enable row level security;
alter table nightowls.compaction_policies force row level security;
create policy service_all on nightowls.compaction_policies
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));

alter table nightowls._replays enable row level security;
alter table nightowls._replays force row level security;
create policy service_all on nightowls._replays
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));
