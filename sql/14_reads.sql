-- Reading the log: one aggregate, the whole of it forwards behind the horizon, the newest first.

-- A filter is {"aggregate_types": […], "event_types": […]}; null, or an absent key, lets everything through.
create function nightowls._parse_filter(
  filter              jsonb,
  out aggregate_types text[],
  out event_types     text[]
)
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if _parse_filter.filter is null then
    return;
  elsif jsonb_typeof(_parse_filter.filter) <> 'object'
     or _parse_filter.filter - '{aggregate_types,event_types}'::text[] <> '{}'
     or jsonb_path_exists(_parse_filter.filter, 'strict $.* ? (@.type() != "array")')
     or jsonb_path_exists(_parse_filter.filter, 'strict $.*[*] ? (@.type() != "string")', silent => true) then
    raise exception 'filter is not valid'
      using errcode = 'invalid_parameter_value',
            hint = 'A filter is {"aggregate_types": [text, …], "event_types": [text, …]}; both keys are optional.';
  end if;
  if _parse_filter.filter ? 'aggregate_types' then
    _parse_filter.aggregate_types := array(select jsonb_array_elements_text(_parse_filter.filter -> 'aggregate_types'));
  end if;
  if _parse_filter.filter ? 'event_types' then
    _parse_filter.event_types := array(select jsonb_array_elements_text(_parse_filter.filter -> 'event_types'));
  end if;
end;
$$;

revoke all on function nightowls._parse_filter(jsonb) from public;

create function nightowls._check_max_events(max_events int)
  returns void
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if _check_max_events.max_events is null then
    raise exception 'max_events must not be null' using errcode = 'null_value_not_allowed';
  elsif _check_max_events.max_events < 1 then
    raise exception 'max_events must be 1 or more' using errcode = 'invalid_parameter_value';
  end if;
end;
$$;

revoke all on function nightowls._check_max_events(int) from public;

create function nightowls.read_aggregate(
  aggregate_type   text,
  aggregate_id     text,
  from_version     bigint default 1,
  max_events       int default 1000,
  include_archived boolean default false,
  org              uuid default null
)
  returns setof nightowls.events
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
  v_org uuid := nightowls.current_org(read_aggregate.org);
begin
  perform nightowls._check_max_events(read_aggregate.max_events);
  if read_aggregate.aggregate_type is null or read_aggregate.aggregate_id is null or read_aggregate.from_version is null
     or read_aggregate.include_archived is null then
    raise exception 'aggregate_type, aggregate_id, from_version and include_archived must not be null'
      using errcode = 'null_value_not_allowed';
  end if;
  if read_aggregate.include_archived then
    return query
      select e.*
        from nightowls.all_events e
       where e.org_id = v_org
         and e.aggregate_type = read_aggregate.aggregate_type
         and e.aggregate_id = read_aggregate.aggregate_id
         and e.version >= read_aggregate.from_version
       order by e.version
       limit read_aggregate.max_events;
    return;
  end if;
  return query
    select e.*
      from nightowls.events e
     where e.org_id = v_org
       and e.aggregate_type = read_aggregate.aggregate_type
       and e.aggregate_id = read_aggregate.aggregate_id
       and e.version >= read_aggregate.from_version
     order by e.version
     limit read_aggregate.max_events;
end;
$$;

comment on function nightowls.read_aggregate(text, text, bigint, int, boolean, uuid) is
  'The events of one aggregate in order, from from_version (1 is the first), at most max_events of them; none if the aggregate '
  'does not exist. include_archived: whether to read those that compaction has archived too; deleted ones are gone. org: the tenant. Locks nothing. Raises NW010 if there is no org, 22004 or 22023 for an argument that is null '
  'or not valid.';

revoke all on function nightowls.read_aggregate(text, text, bigint, int, boolean, uuid) from public;

create function nightowls.read_events(
  after      bigint default 0,
  max_events int default 1000,
  filter     jsonb default null,
  org        uuid default null
)
  returns setof nightowls.events
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
  v_org    uuid := nightowls.current_org(read_events.org);
  v_types  text[];
  v_kinds  text[];
  v_safe   bigint;
begin
  perform nightowls._check_max_events(read_events.max_events);
  if read_events.after is null then
    raise exception 'after must not be null'
      using errcode = 'null_value_not_allowed', hint = 'Use 0 to read from the beginning.';
  end if;
  select f.aggregate_types, f.event_types into v_types, v_kinds from nightowls._parse_filter(read_events.filter) f;

  -- The safe position first, in statements of its own; the rows after it, with a newer snapshot.
  v_safe := nightowls._safe_position(v_org, read_events.after);
  return query
    select e.*
      from nightowls.events e
     where e.org_id = v_org
       and e."position" > read_events.after
       and e."position" <= v_safe
       and (v_types is null or e.aggregate_type = any (v_types))
       and (v_kinds is null or e.event_type = any (v_kinds))
     order by e."position"
     limit read_events.max_events;
end;
$$;

comment on function nightowls.read_events(bigint, int, jsonb, uuid) is
  'The events of an org in the order of the log, after a position, at most max_events of them: keep the last position you '
  'got and pass it as after to go on. No event is ever missed or seen twice, whatever commits late: only rows returned here are '
  'safe, so do not join them to nightowls.events in the same statement to find more. filter: {"aggregate_types": […], '
  '"event_types": […]}; org: the tenant. Locks nothing and waits for nobody; stops below the appends of this org that are still open. '
  'Raises 25001 above read committed, 55000 on a standby, NW010 if there is no org, 22004 or 22023 for an argument that is null '
  'or not valid.';

revoke all on function nightowls.read_events(bigint, int, jsonb, uuid) from public;

create function nightowls.recent_events(
  before     bigint default null,
  max_events int default 100,
  filter     jsonb default null,
  org        uuid default null
)
  returns setof nightowls.events
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
  v_org    uuid := nightowls.current_org(recent_events.org);
  v_before bigint := coalesce(recent_events.before, 9223372036854775807);
  v_types  text[];
  v_kinds  text[];
begin
  perform nightowls._check_max_events(recent_events.max_events);
  select f.aggregate_types, f.event_types into v_types, v_kinds from nightowls._parse_filter(recent_events.filter) f;
  return query
    select e.*
      from nightowls.events e
     where e.org_id = v_org
       and e."position" < v_before
       and (v_types is null or e.aggregate_type = any (v_types))
       and (v_kinds is null or e.event_type = any (v_kinds))
     order by e."position" desc
     limit recent_events.max_events;
end;
$$;

comment on function nightowls.recent_events(bigint, int, jsonb, uuid) is
  'The newest events of an org first, below the position before (null: from the end), at most max_events of them: for screens '
  'that page backwards. Shows what is committed now; an event that commits late can still appear between two of these, so feed '
  'consumers from read_events. filter and org as there. Locks nothing. Raises NW010 if there is no org, 22004 or 22023 for an '
  'argument that is null or not valid.';

revoke all on function nightowls.recent_events(bigint, int, jsonb, uuid) from public;

create function nightowls.last_event(
  aggregate_type text,
  aggregate_id   text,
  event_type     text default null,
  org            uuid default null
)
  returns setof nightowls.events
  language plpgsql
  stable
  parallel safe
  rows 1
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_sort to off
  set enable_bitmapscan to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
declare
  v_org uuid := nightowls.current_org(last_event.org);
begin
  if last_event.aggregate_type is null or last_event.aggregate_id is null then
    raise exception 'aggregate_type and aggregate_id must not be null' using errcode = 'null_value_not_allowed';
  end if;
  return query
    select e.*
      from nightowls.events e
     where e.org_id = v_org
       and e.aggregate_type = last_event.aggregate_type
       and e.aggregate_id = last_event.aggregate_id
       and (last_event.event_type is null or e.event_type = last_event.event_type)
     order by e.version desc
     limit 1;
end;
$$;

comment on function nightowls.last_event(text, text, text, uuid) is
  'The newest event of one aggregate, of one event_type if given; no row if there is none. org: the tenant. Locks nothing. '
  'Raises NW010 if there is no org, 22004 if aggregate_type or aggregate_id is null.';

revoke all on function nightowls.last_event(text, text, text, uuid) from public;

create function nightowls.create_type_index()
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if to_regclass('nightowls.events_event_type_idx') is null then
    create index events_event_type_idx on nightowls.events (org_id, event_type, "position");
  end if;
end;
$$;

comment on function nightowls.create_type_index() is
  'Makes the index (org_id, event_type, position) on the log, for those who query it by type; each append pays for it '
  '(benches/README.md says how much). Owner only. Waits for open appends and holds up new ones while it builds; on a large log run '
  'create index concurrently events_event_type_idx on nightowls.events (org_id, event_type, position) instead. '
  'Made again, it changes nothing. It is not part of a dump of an extension install: make it again after a restore. '
  'Raises 42501 for anybody but the owner.';

revoke all on function nightowls.create_type_index() from public;
