-- The fold in Rust: src/fold. sql/plain/fold.sql is its twin.

create function nightowls.check_reducer(reducer jsonb)
  returns void
  language c
  immutable
  parallel safe
as 'MODULE_PATHNAME', 'check_reducer_wrapper';

comment on function nightowls.check_reducer(jsonb) is
  'Accepts a reducer, {"initial": object, "on": {event_type: [op, …]}, "otherwise": [op, …]}, or refuses it, '
  'naming the place at fault. Returns nothing; neither waits nor locks. '
  'Raises 22023 if the reducer is not valid, 22004 if it is null, 54000 if it is nested deeper than 100 levels.';

revoke all on function nightowls.check_reducer(jsonb) from public;

create function nightowls.fold_state(reducer jsonb, state jsonb, events jsonb)
  returns jsonb
  language c
  immutable
  parallel safe
as 'MODULE_PATHNAME', 'fold_state_wrapper';

comment on function nightowls.fold_state(jsonb, jsonb, jsonb) is
  'Folds an array of events into a state and returns the new state: a dry run that reads and writes no table. '
  'An event is an object with event_type and, as wanted, payload, metadata, aggregate_type, aggregate_id, version, '
  'position, event_id and created_at; a null state starts from the reducer''s "initial". Neither waits nor locks. '
  'Raises 22023 if an argument is not valid or an event does not fit the state; 22003 if a number overflows; '
  '22004 if reducer or events is null; 54000 if something is nested too deeply.';

revoke all on function nightowls.fold_state(jsonb, jsonb, jsonb) from public;

create function nightowls._fold_end(progress internal)
  returns jsonb
  language c
  immutable
  strict
  parallel safe
as 'MODULE_PATHNAME', 'fold_end_wrapper';

revoke all on function nightowls._fold_end(internal) from public;

create function nightowls._fold_events_step(progress internal, reducer jsonb, event nightowls.events)
  returns internal
  language c
  immutable
  parallel safe
as 'MODULE_PATHNAME', 'fold_events_step_wrapper';

revoke all on function nightowls._fold_events_step(internal, jsonb, nightowls.events) from public;

create aggregate nightowls.fold_events(reducer jsonb, event nightowls.events) (
  sfunc = nightowls._fold_events_step,
  stype = internal,
  finalfunc = nightowls._fold_end,
  parallel = safe
);

comment on aggregate nightowls.fold_events(jsonb, nightowls.events) is
  'Folds events into state: fold_events(reducer, e order by e.version). Starts from the reducer''s "initial"; '
  'returns null for no events, and after a tombstone. Null events are skipped. Neither waits nor locks. '
  'Raises 22023 if the reducer is not valid or changes, or an event does not fit the state; 22003 if a number overflows; '
  '22004 if the reducer is null; 54000 if something is nested too deeply.';

revoke all on function nightowls.fold_events(jsonb, nightowls.events) from public;

-- Folds one event. The first call starts the progress at base, where null is a
-- tombstone.
create function nightowls._fold_rows_step(
  progress       internal,
  reducer        jsonb,
  base           jsonb,
  event_type     text,
  aggregate_type text,
  aggregate_id   text,
  version        bigint,
  "position"     bigint,
  event_id       uuid,
  created_at     timestamptz,
  payload        jsonb,
  metadata       jsonb
)
  returns internal
  language c
  immutable
  parallel safe
as 'MODULE_PATHNAME', 'fold_rows_step_wrapper';

revoke all on function nightowls._fold_rows_step(
  internal, jsonb, jsonb, text, text, text, bigint, bigint, uuid, timestamptz, jsonb, jsonb) from public;

-- Folds one row, given column by column, into base.
create function nightowls._fold_row(
  reducer        jsonb,
  base           jsonb,
  event_type     text,
  aggregate_type text,
  aggregate_id   text,
  version        bigint,
  "position"     bigint,
  event_id       uuid,
  created_at     timestamptz,
  payload        jsonb,
  metadata       jsonb
)
  returns jsonb
  language c
  immutable
  parallel safe
as 'MODULE_PATHNAME', 'fold_row_wrapper';

revoke all on function nightowls._fold_row(
  jsonb, jsonb, text, text, text, bigint, bigint, uuid, timestamptz, jsonb, jsonb) from public;

-- Folds rows, given in version order and column by column, from base.
create aggregate nightowls._fold_rows(
  reducer        jsonb,
  base           jsonb,
  event_type     text,
  aggregate_type text,
  aggregate_id   text,
  version        bigint,
  "position"     bigint,
  event_id       uuid,
  created_at     timestamptz,
  payload        jsonb,
  metadata       jsonb
) (
  sfunc = nightowls._fold_rows_step,
  stype = internal,
  finalfunc = nightowls._fold_end,
  parallel = safe
);

revoke all on function nightowls._fold_rows(
  jsonb, jsonb, text, text, text, bigint, bigint, uuid, timestamptz, jsonb, jsonb) from public;

-- Folds the versions from_version to to_version (null: to the head) of one
-- aggregate into base, where null is a tombstone. version and position are those
-- of the last event folded; both are null, and state is base, if there was none.
create function nightowls._fold_tail(
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
  v_first bigint;
begin
  -- One event, as most appends bring it, needs no aggregate.
  if _fold_tail.from_version = _fold_tail.to_version then
    select nightowls._fold_row(_fold_tail.reducer, _fold_tail.base, e.event_type, e.aggregate_type, e.aggregate_id,
             e.version, e."position", e.event_id, e.created_at, e.payload, e.metadata),
           e.version, e."position"
      into state, version, "position"
      from nightowls.events e
     where e.org_id = _fold_tail.org
       and e.aggregate_type = _fold_tail.aggregate_type
       and e.aggregate_id = _fold_tail.aggregate_id
       and e.version = _fold_tail.from_version;
  else
    select nightowls._fold_rows(_fold_tail.reducer, _fold_tail.base, e.event_type, e.aggregate_type, e.aggregate_id,
             e.version, e."position", e.event_id, e.created_at, e.payload, e.metadata),
           max(e.version), max(e."position"), min(e.version)
      into state, version, "position", v_first
      from (select e.*
              from nightowls.events e
             where e.org_id = _fold_tail.org
               and e.aggregate_type = _fold_tail.aggregate_type
               and e.aggregate_id = _fold_tail.aggregate_id
               and e.version >= _fold_tail.from_version
               and e.version <= coalesce(_fold_tail.to_version, 9223372036854775807)
             order by e.version) e;
  end if;
  if v_first > _fold_tail.from_version or version is null and _fold_tail.to_version >= _fold_tail.from_version then
    -- The live log begins later: the rest is in the archive.
    select h.state, h.version, h."position" into state, version, "position"
      from nightowls._fold_history(
             _fold_tail.org, _fold_tail.reducer, _fold_tail.base, _fold_tail.aggregate_type, _fold_tail.aggregate_id,
             _fold_tail.from_version, _fold_tail.to_version) h;
  end if;

  if version is null then
    state := _fold_tail.base;
  end if;
end;
$$;

revoke all on function nightowls._fold_tail(uuid, jsonb, jsonb, text, text, bigint, bigint) from public;
