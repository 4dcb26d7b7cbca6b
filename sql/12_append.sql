-- Appending: one event, a batch for one aggregate, several aggregates at once.

create type nightowls.append_result as ("position" bigint, version bigint);

comment on type nightowls.append_result is 'Where an appended event stands: its position in the log, its version in the aggregate.';

create function nightowls._refuse_names(aggregate_type text, aggregate_id text, event_type text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if _refuse_names.aggregate_type is null or _refuse_names.aggregate_id is null or _refuse_names.event_type is null then
    raise exception 'aggregate_type, aggregate_id and event_type must not be null'
      using errcode = 'null_value_not_allowed';
  elsif _refuse_names.aggregate_type = '' or _refuse_names.aggregate_id = '' or _refuse_names.event_type = '' then
    raise exception 'aggregate_type, aggregate_id and event_type must not be empty'
      using errcode = 'invalid_parameter_value';
  end if;
  raise exception 'aggregate_type, aggregate_id or event_type is too long'
    using errcode = 'program_limit_exceeded',
          detail = 'An aggregate_type or event_type has at most 255 bytes, an aggregate_id 1024.';
end;
$$;

revoke all on function nightowls._refuse_names(text, text, text) from public;

create function nightowls._refuse_reserved()
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  raise exception 'event types that begin with nightowls. are nightowls'' own'
    using errcode = 'invalid_parameter_value', hint = 'Choose another name; to erase, call nightowls.erase().';
end;
$$;

revoke all on function nightowls._refuse_reserved() from public;

create function nightowls._refuse_erased(event_id uuid)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  raise exception 'event % has been erased', _refuse_erased.event_id
    using errcode = 'NW009',
          detail = 'It was appended before, and what it said is forgotten.',
          hint = 'Do not retry. A new event takes a new event_id.';
end;
$$;

revoke all on function nightowls._refuse_erased(uuid) from public;

create function nightowls._refuse_version(aggregate_type text, aggregate_id text, expected bigint, actual bigint)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  raise exception 'aggregate % "%" is at version %, not %', _refuse_version.aggregate_type, _refuse_version.aggregate_id,
      _refuse_version.actual, case _refuse_version.expected when -1 then 'above 0' else _refuse_version.expected::text end
    using errcode = 'NW001',
          detail = format('Expected version %s, actual version %s.', _refuse_version.expected, _refuse_version.actual),
          hint = 'Read the aggregate again, decide again, then retry.';
end;
$$;

revoke all on function nightowls._refuse_version(text, text, bigint, bigint) from public;

-- The versions some aggregates are at, 0 for those that are not there.
create function nightowls._heads(org uuid, aggregate_types text[], aggregate_ids text[])
  returns bigint[]
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
  return array(
    select coalesce((
             select e.version
               from nightowls.events e
              where e.org_id = _heads.org
                and e.aggregate_type = a.aggregate_type
                and e.aggregate_id = a.aggregate_id
              order by e.version desc
              limit 1), 0)
      from unnest(_heads.aggregate_types, _heads.aggregate_ids) as a (aggregate_type, aggregate_id));
end;
$$;

revoke all on function nightowls._heads(uuid, text[], text[]) from public;

create function nightowls._refuse_no_org(org uuid)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if not exists (select from nightowls.orgs o where o.org_id = _refuse_no_org.org) then
    raise exception 'org % does not exist', _refuse_no_org.org
      using errcode = 'invalid_parameter_value', hint = 'Make it with nightowls.create_org(name).';
  end if;
end;
$$;

revoke all on function nightowls._refuse_no_org(uuid) from public;

-- Says what is wrong with the arguments of _append_one, if anything is.
create function nightowls._check_append_arguments(
  aggregate_type   text,
  aggregate_id     text,
  event_type       text,
  payload          jsonb,
  expected_version bigint,
  metadata         jsonb
)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if _check_append_arguments.payload is null then
    raise exception 'payload must not be null'
      using errcode = 'null_value_not_allowed', hint = 'Leave it out for an empty payload.';
  elsif _check_append_arguments.expected_version < -1 then
    raise exception 'expected_version must be -1 or more' using errcode = 'invalid_parameter_value';
  elsif jsonb_typeof(_check_append_arguments.metadata) <> 'object' then
    raise exception 'metadata must be a JSON object' using errcode = 'invalid_parameter_value';
  elsif starts_with(_check_append_arguments.event_type, 'nightowls.') then
    perform nightowls._refuse_reserved();
  elsif nightowls._is_too_large(_check_append_arguments.payload)
     or nightowls._is_too_large(_check_append_arguments.metadata) then
    perform nightowls._refuse_size();
  elsif nightowls._is_too_deep(_check_append_arguments.payload) or nightowls._is_too_deep(_check_append_arguments.metadata) then
    perform nightowls._refuse_depth();
  end if;
  if (octet_length(_check_append_arguments.aggregate_type) between 1 and 255
      and octet_length(_check_append_arguments.aggregate_id) between 1 and 1024
      and octet_length(_check_append_arguments.event_type) between 1 and 255) is not true then
    perform nightowls._refuse_names(_check_append_arguments.aggregate_type, _check_append_arguments.aggregate_id,
                                    _check_append_arguments.event_type);
  end if;
end;
$$;

revoke all on function nightowls._check_append_arguments(text, text, text, jsonb, bigint, jsonb) from public;

-- Whether a payload and metadata are neither too large nor too deep. Not an SQL function: it is not to be taken in where most
-- events are small.
create function nightowls._is_bounded(payload jsonb, metadata jsonb)
  returns boolean
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return (nightowls._is_too_large(_is_bounded.payload) or nightowls._is_too_large(_is_bounded.metadata)
          or nightowls._is_too_deep(_is_bounded.payload) or nightowls._is_too_deep(_is_bounded.metadata)) is not true;
end;
$$;

revoke all on function nightowls._is_bounded(jsonb, jsonb) from public;

-- Whether arguments of _append_one need no closer look. What is small cannot be too deep: a level takes 8 bytes; in an array
-- nothing is compressed.
create function nightowls._is_simple(aggregate_type text, aggregate_id text, event_type text, payload jsonb, metadata jsonb)
  returns boolean
  language sql
  stable
  parallel safe
  return '' <> all (array[aggregate_type, aggregate_id, event_type])
     and not starts_with(event_type, 'nightowls.')
     and pg_column_size(array[aggregate_type, aggregate_id, event_type]) < 256
     and payload is not null
     and (pg_column_size(array[payload, metadata]) < 800 or nightowls._is_bounded(payload, metadata))
     and (metadata @> '{}') is not false;

revoke all on function nightowls._is_simple(text, text, text, jsonb, jsonb) from public;

-- The append itself. One statement holds the arguments against the rules, finds the org, takes the hold, finds the head, holds it
-- against the expectation, inserts, and looks whether anything is to follow. The head comes from the key, not from a counter row:
-- that stays fast while old snapshots are open. The version is right by its making, so the checks of direct inserts are left out.
-- The result is null when handlers wait for the event: they are user code, and _handle_append() calls them as the one
-- who appends.
-- Definer: it draws positions and looks into _append_targets.
create function nightowls._append_one(
  org              uuid,
  aggregate_type   text,
  aggregate_id     text,
  event_type       text,
  payload          jsonb,
  expected_version bigint,
  event_id         uuid,
  metadata         jsonb,
  container        text,
  fence            bigint
)
  returns nightowls.append_result
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp, pg_append
  set enable_seqscan to off
  set plan_cache_mode to force_generic_plan
as $$
#variable_conflict use_column
declare
  v_org      uuid;
  v_position bigint;
  v_version  bigint;
  v_created  timestamptz;
  v_follows  text;
  v_known    nightowls.events;
  v_head     bigint;
  v_lost     bigint;
  v_checked  boolean;
begin
  loop
    if _append_one.event_id is not null or _append_one.container is not null or _append_one.fence is not null then
      if nightowls._is_simple(_append_one.aggregate_type, _append_one.aggregate_id, _append_one.event_type,
                              _append_one.payload, _append_one.metadata) is not true or _append_one.expected_version < -1 then
        perform nightowls._check_append_arguments(
          _append_one.aggregate_type, _append_one.aggregate_id, _append_one.event_type, _append_one.payload,
          _append_one.expected_version, _append_one.metadata);
      end if;
      v_checked := true;
      _append_one.org := coalesce(
        _append_one.org, (select (s.value #>> '{}')::uuid from nightowls.settings s where s.name = 'default_org'),
        nightowls._refuse_no_default());
      if _append_one.container is not null or _append_one.fence is not null then
        perform nightowls._guard_append(_append_one.org, _append_one.container, _append_one.fence, array[_append_one.event_id]);
      end if;
      select e.* into v_known
        from nightowls.all_events e
       where e.org_id = _append_one.org
         and e.event_id = _append_one.event_id;
      if found then
        if v_known.aggregate_type = _append_one.aggregate_type and v_known.aggregate_id = _append_one.aggregate_id
           and v_known.event_type = _append_one.event_type and v_known.payload = _append_one.payload then
          return (v_known."position", v_known.version)::nightowls.append_result;
        elsif v_known.event_type = 'nightowls.erased' then
          perform nightowls._refuse_erased(_append_one.event_id);
        end if;
        raise exception 'event % exists already with another body', _append_one.event_id
          using errcode = 'NW002',
                detail = format('It is version %s of aggregate %s "%s".',
                                v_known.version, v_known.aggregate_type, v_known.aggregate_id),
                hint = 'One event_id names one event; use a new one for a new event.';
      end if;

      with h as materialized (
        select t.target as org, coalesce(t.follows ->> _append_one.aggregate_type, t.follows ->> '') as follows,
               coalesce((
                 select x.version
                   from nightowls.events x
                  where x.org_id = t.target
                    and x.aggregate_type = _append_one.aggregate_type
                    and x.aggregate_id = _append_one.aggregate_id
                  order by x.version desc
                  limit 1), 0) as version
          from nightowls._append_targets t
         where t.org_id = _append_one.org
           and nightowls._hold(t.target, t.class)
      )
      insert into nightowls.events as e
             (org_id, aggregate_type, aggregate_id, version, event_type, payload, metadata, event_id)
      select h.org, _append_one.aggregate_type, _append_one.aggregate_id, h.version + 1, _append_one.event_type,
             _append_one.payload, coalesce(_append_one.metadata, '{}'), _append_one.event_id
        from h
       where _append_one.expected_version is null
          or _append_one.expected_version = h.version
          or _append_one.expected_version = -1 and h.version > 0
      on conflict do nothing
      returning e.org_id, e."position", e.version, e.created_at, (select h.follows from h)
           into v_org, v_position, v_version, v_created, v_follows;
    else
      -- The same without an event_id: one key settles a race, and nobody looks into the others.
      with h as materialized (
        select t.target as org, coalesce(t.follows ->> _append_one.aggregate_type, t.follows ->> '') as follows,
               coalesce((
                 select x.version
                   from nightowls.events x
                  where x.org_id = t.target
                    and x.aggregate_type = _append_one.aggregate_type
                    and x.aggregate_id = _append_one.aggregate_id
                  order by x.version desc
                  limit 1), 0) as version
          from nightowls._append_targets t
         where t.org_id = coalesce(_append_one.org, '00000000-0000-0000-0000-000000000000')
           and nightowls._hold(t.target, t.class)
      )
      insert into nightowls.events as e
             (org_id, aggregate_type, aggregate_id, version, event_type, payload, metadata)
      select h.org, _append_one.aggregate_type, _append_one.aggregate_id, h.version + 1, _append_one.event_type,
             _append_one.payload, coalesce(_append_one.metadata, '{}')
        from h
       where (_append_one.expected_version is null
              or _append_one.expected_version = h.version
              or _append_one.expected_version = -1 and h.version > 0)
         -- Not a condition of its own, which would get a plan node of its own.
         and case when h.version is not null
               then v_checked
                    or nightowls._is_simple(_append_one.aggregate_type, _append_one.aggregate_id, _append_one.event_type,
                                            _append_one.payload, _append_one.metadata) end
      on conflict (org_id, aggregate_type, aggregate_id, version) do nothing
      returning e.org_id, e."position", e.version, e.created_at, (select h.follows from h)
           into v_org, v_position, v_version, v_created, v_follows;
    end if;
    if v_version is not null and v_follows is null and current_setting('transaction_isolation') = 'read committed' then
      return (v_position, v_version)::nightowls.append_result;
    elsif starts_with(v_follows, 'reducer:') and current_setting('transaction_isolation') = 'read committed'
          and nightowls._project_one(
                v_org, substr(v_follows, 9), _append_one.aggregate_type, _append_one.aggregate_id, v_version, v_position, _append_one.event_type,
                _append_one.payload, coalesce(_append_one.metadata, '{}'), _append_one.event_id, v_created) then
      return (v_position, v_version)::nightowls.append_result;
    end if;
    exit when v_version is not null;

    -- Nothing came of it: an argument will not do or must be looked at more closely, or there is no org (all of which raise), or the
    -- expectation is missed, or somebody else's append has taken the version, or brought this event_id, and has committed.
    if v_checked is not true then
      perform nightowls._check_append_arguments(
        _append_one.aggregate_type, _append_one.aggregate_id, _append_one.event_type, _append_one.payload,
        _append_one.expected_version, _append_one.metadata);
      v_checked := true;
    end if;
    _append_one.org := coalesce(_append_one.org, nightowls._resolve_org());
    if not exists (select from nightowls._append_targets t where t.org_id = _append_one.org) then
      if v_lost is not null then
        raise exception 'could not serialize access: the org was made known to appends since the snapshot'
          using errcode = 'serialization_failure', hint = 'Retry the transaction.';
      end if;
      perform nightowls._refuse_no_org(_append_one.org);
      perform nightowls._keep_target(_append_one.org);
    end if;
    v_head := (nightowls._heads(_append_one.org, array[_append_one.aggregate_type], array[_append_one.aggregate_id]))[1];
    if _append_one.event_id is not null
       and exists (select from nightowls.events e where e.org_id = _append_one.org and e.event_id = _append_one.event_id) then
      continue;
    elsif _append_one.expected_version <> v_head and (_append_one.expected_version >= 0 or v_head = 0) then
      perform nightowls._refuse_version(_append_one.aggregate_type, _append_one.aggregate_id,
                                        _append_one.expected_version, v_head);
    elsif _append_one.event_id is not null and v_head = v_lost then
      raise exception 'a unique index of the user''s on nightowls.events refuses the event'
        using errcode = 'unique_violation';
    end if;
    v_lost := v_head;
  end loop;

  if current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
    perform nightowls._refuse_older_snapshot(v_org);
  end if;
  v_follows := split_part(v_follows, ':', 1);
  if v_follows like '%reducer%' then
    perform nightowls._project(v_org, array[_append_one.aggregate_type], array[_append_one.aggregate_id], array[v_version]);
  end if;
  if starts_with(v_follows, 'broadcast') then
    perform nightowls._broadcast(v_org, array[v_position]);
  end if;
  if v_follows like '%queue%' then
    perform nightowls._route_event(v_org, v_position);
  end if;
  if v_follows like '%handler%' then
    perform set_config('nightowls.handle', json_build_array(v_org, _append_one.aggregate_type, v_position, v_version)::text, true);
    return null;
  end if;
  return (v_position, v_version)::nightowls.append_result;
end;
$$;

revoke all on function nightowls._append_one(uuid, text, text, text, jsonb, bigint, uuid, jsonb, text, bigint) from public;

-- Calls the handlers that wait for the event of _append_one(), and returns what that would have.
create function nightowls._handle_append()
  returns nightowls.append_result
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_event json := current_setting('nightowls.handle');
begin
  perform nightowls._call_handlers((v_event ->> 0)::uuid, array[v_event ->> 1], array[(v_event ->> 2)::bigint]);
  return ((v_event ->> 2)::bigint, (v_event ->> 3)::bigint)::nightowls.append_result;
end;
$$;

revoke all on function nightowls._handle_append() from public;

-- An expression, so that it is inlined and costs no call of its own. Each argument stands in it once: a volatile one, such as a
-- new event_id, would forbid that.
create function nightowls.append_event(
  aggregate_type   text,
  aggregate_id     text,
  event_type       text,
  payload          jsonb default '{}',
  expected_version bigint default null,
  event_id         uuid default null,
  metadata         jsonb default null,
  container        text default null,
  fence            bigint default null,
  org              uuid default null
)
  returns nightowls.append_result
  language sql
  volatile
  parallel unsafe
  return coalesce(
    nightowls._append_one(
      nightowls._caller_org(org), aggregate_type, aggregate_id, event_type, payload, expected_version, event_id, metadata,
      container, fence),
    nightowls._handle_append());

comment on function nightowls.append_event(text, text, text, jsonb, bigint, uuid, jsonb, text, bigint, uuid) is
  'Appends one event and returns its position and version. aggregate_type, aggregate_id: what it is about; event_type: what '
  'happened; payload: the facts; expected_version: null any, 0 the aggregate must not exist, n it must be at version n, '
  '-1 it must exist; event_id: idempotency key, a retry returns the first result whatever it expects; metadata: actor_id, '
  'request_id, trace_id and so on; container and fence: only while this floor is held with this fence; org: the tenant. '
  'Waits for an open append to the same aggregate, for nothing else. Raises NW001 if the expectation is missed, NW002 if '
  'the event_id exists with another body, NW009 if its event was erased, NW003 if the fence is too old, NW010 if there is no org, 22004 or 22023 for an '
  'argument that is null, empty or not valid, 54000 for one that is too long, too large or too deep.';

revoke all on function nightowls.append_event(text, text, text, jsonb, bigint, uuid, jsonb, text, bigint, uuid) from public;

-- The first result of a batch whose event_ids are known, some or all: all of them, in this aggregate, in this order,
-- with these bodies, or NW002.
create function nightowls._known_batch(
  org             uuid,
  aggregate_types text[],
  aggregate_ids   text[],
  aggregate_nos   int[],
  event_types     text[],
  payloads        jsonb[],
  event_ids       uuid[]
)
  returns table (aggregate_type text, aggregate_id text, "position" bigint, version bigint)
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_good   bigint;
  v_erased uuid;
begin
  -- Where each aggregate's part of the batch began, by the first of its events that is known.
  return query
    with b as (
      select u.aggregate_no, u.event_type, u.payload, u.event_id,
             row_number() over (partition by u.aggregate_no order by u.no) as nth
        from unnest(_known_batch.aggregate_nos, _known_batch.event_types, _known_batch.payloads, _known_batch.event_ids)
               with ordinality as u (aggregate_no, event_type, payload, event_id, no)
    ), s as (
      select distinct on (b.aggregate_no) b.aggregate_no, e.aggregate_type, e.aggregate_id, e.version - b.nth as base
        from b
        join nightowls.all_events e on e.org_id = _known_batch.org and e.event_id = b.event_id
       order by b.aggregate_no, b.nth
    )
    select e.aggregate_type, e.aggregate_id, e."position", e.version
      from b
      join s on s.aggregate_no = b.aggregate_no
            and s.aggregate_type = _known_batch.aggregate_types[b.aggregate_no]
            and s.aggregate_id = _known_batch.aggregate_ids[b.aggregate_no]
      join nightowls.all_events e
        on e.org_id = _known_batch.org
       and e.aggregate_type = s.aggregate_type
       and e.aggregate_id = s.aggregate_id
       and e.version = s.base + b.nth
     where e.event_id is not distinct from b.event_id
       and e.event_type = b.event_type
       and e.payload = b.payload
     order by e."position";
  get diagnostics v_good = row_count;
  if v_good < cardinality(_known_batch.event_ids) then
    select e.event_id into v_erased
      from unnest(_known_batch.event_ids) as i (event_id)
      join nightowls.all_events e on e.org_id = _known_batch.org and e.event_id = i.event_id
     where e.event_type = 'nightowls.erased'
     limit 1;
    if found then
      perform nightowls._refuse_erased(v_erased);
    end if;
    raise exception 'event ids of this call exist already with another body'
      using errcode = 'NW002',
            detail = format('Of %s events %s are there in this aggregate, in this order, with this body.',
                            cardinality(_known_batch.event_ids), v_good),
            hint = 'Retry with exactly the events of the first call, or use new ids for new events.';
  end if;
end;
$$;

revoke all on function nightowls._known_batch(uuid, text[], text[], int[], text[], jsonb[], uuid[]) from public;

-- Whether one of these event ids is there. A probe for each, whatever the planner thinks of the table.
create function nightowls._is_any_known(org uuid, event_ids uuid[])
  returns boolean
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
begin
  return exists (
    select from unnest(_is_any_known.event_ids) as i (event_id)
     where (select true
              from nightowls.all_events e
             where e.org_id = _is_any_known.org and e.event_id = i.event_id));
end;
$$;

revoke all on function nightowls._is_any_known(uuid, uuid[]) from public;

-- Events for several aggregates, in flat arrays: the aggregates, then the events, each with its aggregate's number.
-- Rows go in by key order, so that two calls in reversed order wait for each other but never in a circle.
-- Definer: it draws positions and looks into orgs and routes.
create function nightowls._append_batch(
  org             uuid,
  aggregate_types text[],
  aggregate_ids   text[],
  expected        bigint[],
  aggregate_nos   int[],
  event_types     text[],
  payloads        jsonb[],
  metadatas       jsonb[],
  event_ids       uuid[],
  out types       text[],
  out ids         text[],
  out positions   bigint[],
  out versions    bigint[],
  out handled     boolean
)
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp, pg_append
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
declare
  v_ids   uuid[] := array_remove(_append_batch.event_ids, null);
  v_heads bigint[];
  v_no    bigint;
  v_table text;
  v_key   text;
begin
  loop
    if v_ids <> '{}' and nightowls._is_any_known(_append_batch.org, v_ids) then
      select array_agg(k.aggregate_type), array_agg(k.aggregate_id), array_agg(k."position"), array_agg(k.version)
        into types, ids, positions, versions
        from nightowls._known_batch(
               _append_batch.org, _append_batch.aggregate_types, _append_batch.aggregate_ids, _append_batch.aggregate_nos,
               _append_batch.event_types, _append_batch.payloads, _append_batch.event_ids) k;
      return;
    end if;

    perform nightowls._hold(_append_batch.org, nightowls._org_class(_append_batch.org));

    v_heads := nightowls._heads(_append_batch.org, _append_batch.aggregate_types, _append_batch.aggregate_ids);
    select a.no into v_no
      from unnest(_append_batch.expected, v_heads) with ordinality as a (expected, head, no)
     where a.expected <> a.head and (a.expected >= 0 or a.head = 0)
     limit 1;
    if found then
      -- These very events may have been committed between the two looks.
      continue when v_ids <> '{}' and nightowls._is_any_known(_append_batch.org, v_ids);
      perform nightowls._refuse_version(_append_batch.aggregate_types[v_no], _append_batch.aggregate_ids[v_no],
                                        _append_batch.expected[v_no], v_heads[v_no]);
    end if;
    perform nightowls._refuse_no_org(_append_batch.org);

    begin
      if cardinality(v_heads) = 1 then
        -- One aggregate, the usual case: nothing to number or to sort.
        with inserted as (
          insert into nightowls.events as e
                 (org_id, aggregate_type, aggregate_id, version, event_type, payload, metadata, event_id)
          select _append_batch.org, _append_batch.aggregate_types[1], _append_batch.aggregate_ids[1], v_heads[1] + u.no,
                 u.event_type, u.payload, coalesce(u.metadata, '{}'), u.event_id
            from unnest(_append_batch.event_types, _append_batch.payloads, _append_batch.metadatas, _append_batch.event_ids)
                   with ordinality as u (event_type, payload, metadata, event_id, no)
          returning e."position", e.version
        )
        select array_agg(i."position"), array_agg(i.version) into positions, versions from inserted i;
      else
        with inserted as (
          insert into nightowls.events as e
                 (org_id, aggregate_type, aggregate_id, version, event_type, payload, metadata, event_id)
          select _append_batch.org, n.aggregate_type, n.aggregate_id, n.version, n.event_type, n.payload,
                 coalesce(n.metadata, '{}'), n.event_id
            from (select _append_batch.aggregate_types[u.aggregate_no] collate "C" as aggregate_type,
                         _append_batch.aggregate_ids[u.aggregate_no] collate "C" as aggregate_id,
                         v_heads[u.aggregate_no] + row_number() over (partition by u.aggregate_no order by u.no) as version,
                         u.event_type, u.payload, u.metadata, u.event_id
                    from unnest(_append_batch.aggregate_nos, _append_batch.event_types, _append_batch.payloads,
                                _append_batch.metadatas, _append_batch.event_ids)
                           with ordinality as u (aggregate_no, event_type, payload, metadata, event_id, no)) n
           order by n.aggregate_type, n.aggregate_id, n.version
          returning e.aggregate_type, e.aggregate_id, e."position", e.version
        )
        select array_agg(i.aggregate_type), array_agg(i.aggregate_id), array_agg(i."position"), array_agg(i.version)
          into types, ids, positions, versions
          from inserted i;
      end if;
      exit;
    exception when unique_violation then
      get stacked diagnostics v_table = table_name, v_key = constraint_name;
      if v_table is distinct from 'events' or v_key not in ('events_aggregate_key', 'events_event_id_key', 'events_pkey') then
        raise;
      elsif cardinality(v_ids) > (select count(distinct u.id) from unnest(v_ids) as u (id)) then
        raise exception 'an event_id stands in this call twice'
          using errcode = 'invalid_parameter_value', hint = 'One event_id names one event.';
      elsif current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
        raise exception 'could not serialize access: somebody else appended'
          using errcode = 'serialization_failure', hint = 'Retry the transaction.';
      end if;
      -- Somebody else's append took a version, or brought these ids, and has committed: look again.
    end;
  end loop;

  handled := nightowls._after_append(_append_batch.org, _append_batch.aggregate_types, _append_batch.aggregate_ids, null, positions);
end;
$$;

revoke all on function nightowls._append_batch(uuid, text[], text[], bigint[], int[], text[], jsonb[], jsonb[], uuid[])
  from public;

-- One batch's events as arrays. Names the first element that will not do.
create function nightowls._parse_events(
  events          jsonb,
  path            text,
  out event_types text[],
  out payloads    jsonb[],
  out metadatas   jsonb[],
  out event_ids   uuid[]
)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
declare
  v_uuid     constant text := '^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$';
  v_good     boolean;
  v_long     boolean;
  v_reserved boolean;
  v_fault    text;
begin
  if _parse_events.events is null then
    raise exception '% must not be null', _parse_events.path using errcode = 'null_value_not_allowed';
  elsif jsonb_typeof(_parse_events.events) <> 'array' or _parse_events.events = '[]' then
    raise exception '% must be a JSON array of at least one event', _parse_events.path
      using errcode = 'invalid_parameter_value';
  end if;

  -- What is good is found out for all at once; what is wrong with which one is looked for only when something is.
  select array_agg(x.event_type), array_agg(coalesce(x.payload, '{}')), array_agg(nullif(x.metadata, 'null')),
         array_agg(case when x.event_id ~ v_uuid then x.event_id::uuid end),
         bool_and((jsonb_typeof(x.e -> 'event_type') = 'string' and x.event_type <> ''
                   and (x.metadata is null or jsonb_typeof(x.metadata) in ('object', 'null'))
                   and (x.event_id is null or x.event_id ~ v_uuid)
                   and x.e - '{event_type,payload,metadata,event_id}'::text[] = '{}') is true),
         max(octet_length(x.event_type)) > 255, bool_or(starts_with(x.event_type, 'nightowls.'))
    into _parse_events.event_types, _parse_events.payloads, _parse_events.metadatas, _parse_events.event_ids, v_good, v_long,
         v_reserved
    from (select u.e, u.e ->> 'event_type' as event_type, u.e -> 'payload' as payload, u.e -> 'metadata' as metadata,
                 u.e ->> 'event_id' as event_id
            from jsonb_array_elements(_parse_events.events) with ordinality as u (e, no)
           where jsonb_typeof(u.e) = 'object'
          offset 0) x;
  if v_good is not true or cardinality(_parse_events.event_types) < jsonb_array_length(_parse_events.events) then
    select format('%s[%s] %s', _parse_events.path, u.no - 1, case
             when jsonb_typeof(u.e) <> 'object' then 'is not an object'
             when jsonb_typeof(u.e -> 'event_type') is distinct from 'string' then 'has no event_type'
             when u.e ->> 'event_type' = '' then 'has an empty event_type'
             when jsonb_typeof(u.e -> 'metadata') not in ('object', 'null') then 'has metadata that is not an object'
             when u.e ->> 'event_id' !~ v_uuid then 'has an event_id that is not a uuid'
             else 'has an unknown key' end)
      into v_fault
      from jsonb_array_elements(_parse_events.events) with ordinality as u (e, no)
     where (jsonb_typeof(u.e) = 'object'
            and jsonb_typeof(u.e -> 'event_type') = 'string' and u.e ->> 'event_type' <> ''
            and coalesce(jsonb_typeof(u.e -> 'metadata'), 'null') in ('object', 'null')
            and coalesce(u.e ->> 'event_id' ~ v_uuid, true)
            and case when jsonb_typeof(u.e) = 'object'
                     then u.e - '{event_type,payload,metadata,event_id}'::text[] = '{}' end) is not true
     order by u.no
     limit 1;
    raise exception '%', v_fault
      using errcode = 'invalid_parameter_value',
            hint = 'An event is {"event_type": text, "payload": any, "metadata": object, "event_id": uuid}; only event_type is required.';
  elsif v_long then
    perform nightowls._refuse_names('any', 'any', repeat('x', 256));
  elsif v_reserved then
    perform nightowls._refuse_reserved();
  elsif jsonb_path_exists(_parse_events.events, 'strict $.**{102} ? (@.type() == "object" || @.type() == "array")') then
    perform nightowls._refuse_depth();
  elsif nightowls._is_too_large(_parse_events.events)
        and exists (select from unnest(_parse_events.payloads || _parse_events.metadatas) as u (body)
                     where nightowls._is_too_large(u.body) or octet_length(u.body::text) > 16777216) then
    perform nightowls._refuse_size();
  end if;
end;
$$;

revoke all on function nightowls._parse_events(jsonb, text) from public;

-- A batch for one aggregate, as most are, in two statements straight from the JSON. Whatever is unusual about it ends it, without a
-- row or in an error that append_events() catches: an element that is not valid (its event_type is null, which the table refuses) or
-- has an event_id, a missed expectation, somebody else's append. The long way by _parse_events() and _append_batch() then finds
-- out what it is. nightowls.handle says whether handlers wait, for _handle_list().
-- Definer: it draws positions and looks into _append_targets.
create function nightowls._append_list(
  org              uuid,
  aggregate_type   text,
  aggregate_id     text,
  events           jsonb,
  expected_version bigint
)
  returns setof nightowls.append_result
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp, pg_append
  set enable_seqscan to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
declare
  v_org       uuid;
  v_head      bigint;
  v_follows   text;
  v_handle    text;
  v_positions bigint[];
begin
  select t.target, split_part(coalesce(t.follows ->> _append_list.aggregate_type, t.follows ->> ''), ':', 1),
         coalesce((
           select x.version
             from nightowls.events x
            where x.org_id = t.target
              and x.aggregate_type = _append_list.aggregate_type
              and x.aggregate_id = _append_list.aggregate_id
            order by x.version desc
            limit 1), 0)
    into v_org, v_follows, v_head
    from nightowls._append_targets t
   where t.org_id = coalesce(_append_list.org, '00000000-0000-0000-0000-000000000000')
     and nightowls._hold(t.target, t.class);
  if v_org is null or _append_list.expected_version <> v_head and (_append_list.expected_version >= 0 or v_head = 0) then
    return;
  end if;

  return query
    insert into nightowls.events as e (org_id, aggregate_type, aggregate_id, version, event_type, payload, metadata)
    select v_org, _append_list.aggregate_type, _append_list.aggregate_id, v_head + x.no,
           case when jsonb_typeof(x.event -> 'event_type') = 'string' and octet_length(x.event_type) between 1 and 255
                     and not starts_with(x.event_type, 'nightowls.')
                     and (x.metadata is null or jsonb_typeof(x.metadata) in ('object', 'null'))
                     -- No other key: of two objects the one with more keys is the greater one. (What has as many is not
                     -- less than one whose first keys are the least there can be.)
                     and x.event < case when x.payload is null and x.metadata is null then '{"": null, "\u0001": null}'::jsonb
                                        when x.payload is null or x.metadata is null
                                          then '{"": null, "\u0001": null, "\u0002": null}'
                                        else '{"": null, "\u0001": null, "\u0002": null, "\u0003": null}' end
                     -- Small is not deep: a level takes 8 bytes.
                     and (pg_column_size(x.event) < 800
                          or not jsonb_path_exists(x.event, 'strict $.**{101} ? (@.type() == "object" || @.type() == "array")'))
             then x.event_type end,
           coalesce(x.payload, '{}'), coalesce(nullif(x.metadata, 'null'), '{}')
      from (select u.no, u.event, u.event ->> 'event_type' as event_type, u.event -> 'payload' as payload,
                   u.event -> 'metadata' as metadata
              from jsonb_array_elements(_append_list.events) with ordinality as u (event, no)
            offset 0) x
    returning e."position", e.version;

  if current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
    perform nightowls._refuse_older_snapshot(v_org);
  end if;
  if v_follows is not null then
    if v_follows like '%reducer%' then
      perform nightowls._project(v_org, array[_append_list.aggregate_type], array[_append_list.aggregate_id], null);
    end if;
    if v_follows like '%queue%' or v_follows like '%broadcast%' then
      v_positions := array(
        select e."position"
          from nightowls.events e
         where e.org_id = v_org
           and e.aggregate_type = _append_list.aggregate_type
           and e.aggregate_id = _append_list.aggregate_id
           and e.version > v_head);
      if v_follows like '%broadcast%' then
        perform nightowls._broadcast(v_org, v_positions);
      end if;
      if v_follows like '%queue%' then
        perform nightowls._route_events(v_org, array[_append_list.aggregate_type], v_positions);
      end if;
    end if;
  end if;
  v_handle := set_config('nightowls.handle', case when v_follows like '%handler%'
    then json_build_array(v_org, _append_list.aggregate_type, _append_list.aggregate_id, v_head)::text else '' end, true);
end;
$$;

revoke all on function nightowls._append_list(uuid, text, text, jsonb, bigint) from public;

-- Calls the handlers that wait for the events of _append_list().
create function nightowls._handle_list()
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_batch json := current_setting('nightowls.handle');
begin
  perform nightowls._call_handlers((v_batch ->> 0)::uuid, array[v_batch ->> 1], array(
    select e."position"
      from nightowls.events e
     where e.org_id = (v_batch ->> 0)::uuid
       and e.aggregate_type = v_batch ->> 1
       and e.aggregate_id = v_batch ->> 2
       and e.version > (v_batch ->> 3)::bigint));
end;
$$;

revoke all on function nightowls._handle_list() from public;

create function nightowls.append_events(
  aggregate_type   text,
  aggregate_id     text,
  events           jsonb,
  expected_version bigint default null,
  container        text default null,
  fence            bigint default null,
  org              uuid default null
)
  returns setof nightowls.append_result
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org     uuid := nightowls._caller_org(append_events.org);
  v_batch   record;
  v_done    record;
  v_is_done boolean;
begin
  if octet_length(append_events.aggregate_type) not between 1 and 255
     or octet_length(append_events.aggregate_id) not between 1 and 1024
     or append_events.aggregate_type is null or append_events.aggregate_id is null then
    perform nightowls._refuse_names(append_events.aggregate_type, append_events.aggregate_id, 'any');
  elsif append_events.expected_version < -1 then
    raise exception 'expected_version must be -1 or more' using errcode = 'invalid_parameter_value';
  end if;
  if append_events.container is not null or append_events.fence is not null then
    v_org := coalesce(v_org, nightowls.current_org());
    v_batch := nightowls._parse_events(append_events.events, 'events');
    perform nightowls._guard_append(v_org, append_events.container, append_events.fence, v_batch.event_ids);
  end if;

  if jsonb_typeof(append_events.events) = 'array' and append_events.events <> '[]'
     and not (append_events.events -> 0) ? 'event_id' and not nightowls._is_too_large(append_events.events) then
    begin
      return query
        select l."position", l.version
          from nightowls._append_list(
                 v_org, append_events.aggregate_type, append_events.aggregate_id, append_events.events,
                 append_events.expected_version) l;
      v_is_done := found;
    exception when unique_violation or not_null_violation then
      v_is_done := false;
    end;
    if v_is_done then
      if current_setting('nightowls.handle') <> '' then
        perform nightowls._handle_list();
      end if;
      return;
    end if;
  end if;

  v_org := coalesce(v_org, nightowls.current_org());
  v_batch := nightowls._parse_events(append_events.events, 'events');
  v_done := nightowls._append_batch(
    v_org, array[append_events.aggregate_type], array[append_events.aggregate_id], array[append_events.expected_version],
    array_fill(1, array[cardinality(v_batch.event_types)]), v_batch.event_types, v_batch.payloads, v_batch.metadatas,
    v_batch.event_ids);
  if v_done.handled then
    perform nightowls._call_handlers(v_org, array[append_events.aggregate_type], v_done.positions);
  end if;
  return query select u.* from unnest(v_done.positions, v_done.versions) u;
end;
$$;

comment on function nightowls.append_events(text, text, jsonb, bigint, text, bigint, uuid) is
  'Appends a batch of events to one aggregate, all or nothing, and returns the position and version of each, in order. '
  'events: a JSON array of {"event_type", "payload", "metadata", "event_id"}; the other arguments as in append_event. A retry '
  'whose event ids are all known, in this order and with these bodies, returns the first result. '
  'Waits for an open append to the same aggregate, for nothing else. Raises NW001 if the expectation is missed, NW002 if some '
  'event ids exist and some do not or with another body, NW009 if one''s event was erased, NW003 if the fence is too old, NW010 if there is no org, 22004 or '
  '22023 for an argument that is null or not valid, 54000 for one that is too long, too large or too deep, '
  '40001 above read committed when somebody else appended.';

revoke all on function nightowls.append_events(text, text, jsonb, bigint, text, bigint, uuid) from public;

create function nightowls.append_many(appends jsonb, org uuid default null)
  returns table (aggregate_type text, aggregate_id text, "position" bigint, version bigint)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org      uuid := nightowls.current_org(append_many.org);
  v_fault    text;
  v_twice    text;
  v_types    text[];
  v_ids      text[];
  v_expected bigint[];
  v_nos      int[];
  v_batch    record;
  v_done     record;
begin
  if append_many.appends is null then
    raise exception 'appends must not be null' using errcode = 'null_value_not_allowed';
  elsif jsonb_typeof(append_many.appends) <> 'array' or append_many.appends = '[]' then
    raise exception 'appends must be a JSON array of at least one append' using errcode = 'invalid_parameter_value';
  end if;

  select min(format('appends[%s] %s', x.no - 1, x.fault)) filter (where x.fault is not null),
         array_agg(x.aggregate_type order by x.no), array_agg(x.aggregate_id order by x.no),
         array_agg(case when x.fault is null then x.expected::bigint end order by x.no)
    into v_fault, v_types, v_ids, v_expected
    from (select u.no,
                 u.a ->> 'aggregate_type' as aggregate_type,
                 u.a ->> 'aggregate_id' as aggregate_id,
                 case when jsonb_typeof(u.a -> 'expected_version') = 'number' then (u.a ->> 'expected_version')::numeric
                 end as expected,
                 case
                   when jsonb_typeof(u.a) <> 'object' then 'is not an object'
                   when jsonb_typeof(u.a -> 'aggregate_type') is distinct from 'string' then 'has no aggregate_type'
                   when u.a ->> 'aggregate_type' = '' then 'has an empty aggregate_type'
                   when jsonb_typeof(u.a -> 'aggregate_id') is distinct from 'string' then 'has no aggregate_id'
                   when u.a ->> 'aggregate_id' = '' then 'has an empty aggregate_id'
                   when jsonb_typeof(u.a -> 'events') is distinct from 'array' or u.a -> 'events' = '[]'
                     then 'has no events: a JSON array of at least one'
                   when jsonb_typeof(u.a -> 'expected_version') not in ('number', 'null')
                     or jsonb_typeof(u.a -> 'expected_version') = 'number'
                        and ((u.a ->> 'expected_version')::numeric not between -1 and 9223372036854775807
                             or (u.a ->> 'expected_version')::numeric % 1 <> 0)
                     then 'has an expected_version that is not a whole number, -1 or more'
                   when u.a - '{aggregate_type,aggregate_id,events,expected_version}'::text[] <> '{}' then 'has an unknown key'
                 end as fault
            from jsonb_array_elements(append_many.appends) with ordinality as u (a, no)) x;
  if v_fault is not null then
    raise exception '%', v_fault
      using errcode = 'invalid_parameter_value',
            hint = 'An append is {"aggregate_type": text, "aggregate_id": text, "events": […], "expected_version": number or null}.';
  end if;

  if exists (select from unnest(v_types, v_ids) as a (aggregate_type, aggregate_id)
              where octet_length(a.aggregate_type) > 255 or octet_length(a.aggregate_id) > 1024) then
    perform nightowls._refuse_names(repeat('x', 256), 'any', 'any');
  end if;
  select format('%s "%s"', a.aggregate_type, a.aggregate_id) into v_twice
    from unnest(v_types, v_ids) as a (aggregate_type, aggregate_id)
   group by a.aggregate_type, a.aggregate_id
  having count(*) > 1
   limit 1;
  if found then
    raise exception 'aggregate % stands in appends twice', v_twice
      using errcode = 'invalid_parameter_value', hint = 'Put all its events into one append.';
  end if;

  select array_agg(u.no::int order by u.no, e.no), jsonb_agg(e.event order by u.no, e.no)
    into v_nos, append_many.appends
    from jsonb_array_elements(append_many.appends) with ordinality as u (a, no)
    cross join lateral jsonb_array_elements(u.a -> 'events') with ordinality as e (event, no);
  v_batch := nightowls._parse_events(append_many.appends, 'appends[].events');

  v_done := nightowls._append_batch(
    v_org, v_types, v_ids, v_expected, v_nos, v_batch.event_types, v_batch.payloads, v_batch.metadatas, v_batch.event_ids);
  if v_done.handled then
    perform nightowls._call_handlers(v_org, v_types, v_done.positions);
  end if;
  -- With one aggregate its name does not come back with each row.
  return query
    select coalesce(u.aggregate_type, v_types[1]), coalesce(u.aggregate_id, v_ids[1]), u."position", u.version
      from unnest(v_done.types, v_done.ids, v_done.positions, v_done.versions)
             as u (aggregate_type, aggregate_id, "position", version);
end;
$$;

comment on function nightowls.append_many(jsonb, uuid) is
  'Appends to several aggregates at once, all or nothing, and returns the position and version of each event in the order of '
  'the log, which is by aggregate_type, aggregate_id and version. appends: a JSON array of {"aggregate_type", "aggregate_id", '
  '"events", "expected_version"}, events as in append_events; org: the tenant. Each aggregate has its own expectation. '
  'Waits for open appends to the same aggregates; two calls in reversed order do not deadlock. Errors as in append_events, '
  'and 22023 if an aggregate stands there twice.';

revoke all on function nightowls.append_many(jsonb, uuid) from public;

-- The uuid v5 (RFC 9562, SHA-1) of a name; Postgres itself has no SHA-1.
create function nightowls._uuid_v5(namespace uuid, name text)
  returns uuid
  language plpgsql
  immutable
  strict
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_mask constant bigint := 4294967295;
  v_data bytea := uuid_send(_uuid_v5.namespace) || convert_to(_uuid_v5.name, 'UTF8');
  v_size bigint := octet_length(v_data);
  v_hash bigint[] := array[1732584193, 4023233417, 2562383102, 271733878, 3285377520]::bigint[];
  v_w    bigint[];
  a bigint; b bigint; c bigint; d bigint; e bigint; f bigint; k bigint; v_next bigint;
begin
  -- Padding: a one bit, zeros, the length in bits.
  v_data := v_data || '\x80'::bytea || decode(repeat('00', ((119 - v_size % 64) % 64)::int), 'hex') || int8send(v_size * 8);

  for v_block in 0 .. octet_length(v_data) / 64 - 1 loop
    for i in 0 .. 15 loop
      v_w[i] := (get_byte(v_data, v_block * 64 + i * 4)::bigint << 24)
              | (get_byte(v_data, v_block * 64 + i * 4 + 1) << 16)
              | (get_byte(v_data, v_block * 64 + i * 4 + 2) << 8)
              | get_byte(v_data, v_block * 64 + i * 4 + 3);
    end loop;
    for i in 16 .. 79 loop
      v_next := v_w[i - 3] # v_w[i - 8] # v_w[i - 14] # v_w[i - 16];
      v_w[i] := ((v_next << 1) | (v_next >> 31)) & v_mask;
    end loop;

    a := v_hash[1]; b := v_hash[2]; c := v_hash[3]; d := v_hash[4]; e := v_hash[5];
    for i in 0 .. 79 loop
      if i < 20 then
        f := d # (b & (c # d)); k := 1518500249;
      elsif i < 40 then
        f := b # c # d; k := 1859775393;
      elsif i < 60 then
        f := (b & c) | (d & (b | c)); k := 2400959708;
      else
        f := b # c # d; k := 3395469782;
      end if;
      v_next := ((((a << 5) | (a >> 27)) & v_mask) + f + e + k + v_w[i]) & v_mask;
      e := d; d := c; c := ((b << 30) | (b >> 2)) & v_mask; b := a; a := v_next;
    end loop;
    v_hash := array[(v_hash[1] + a) & v_mask, (v_hash[2] + b) & v_mask, (v_hash[3] + c) & v_mask,
                    (v_hash[4] + d) & v_mask, (v_hash[5] + e) & v_mask];
  end loop;

  v_data := substr(int8send(v_hash[1]), 5) || substr(int8send(v_hash[2]), 5)
         || substr(int8send(v_hash[3]), 5) || substr(int8send(v_hash[4]), 5);
  v_data := set_byte(v_data, 6, (get_byte(v_data, 6) & 15) | 80);
  v_data := set_byte(v_data, 8, (get_byte(v_data, 8) & 63) | 128);
  return encode(v_data, 'hex')::uuid;
end;
$$;

revoke all on function nightowls._uuid_v5(uuid, text) from public;

create function nightowls.event_id_for(source text, external_id text)
  returns uuid
  language sql
  immutable
  strict
  parallel safe
  return nightowls._uuid_v5(nightowls._uuid_v5('6e696768-746f-5c77-8c73-2e6576656e74', source), external_id);

comment on function nightowls.event_id_for(text, text) is
  'An event_id made of a foreign id, such as Stripe''s evt_…: always the same uuid for the same source and id, so that a webhook '
  'that arrives twice is appended once. It is the uuid v5 of external_id in the namespace that is the uuid v5 of source in '
  '6e696768-746f-5c77-8c73-2e6576656e74. null if an argument is null.';

revoke all on function nightowls.event_id_for(text, text) from public;
