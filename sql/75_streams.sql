-- Streams: joins of events, projections and tables inside a window, each an ordinary view that its reader's rights guard.
--
-- In a join of events the left side leads: each of its events looks for its partners in an index of the right side. The
-- partners stand in a lateral subquery with "offset 0", so that no statistics turn this into a scan of the log.

create table nightowls.streams (
  org_id     uuid        not null,
  name       text        collate "C" not null,
  kind       text        not null,
  definition jsonb       not null,
  view_name  text        not null,
  indexes    text[]      not null,
  created_at timestamptz not null default clock_timestamp(),
  constraint streams_pkey primary key (org_id, name),
  constraint streams_kind_check check (kind in ('stream_join', 'enrichment', 'table_join'))
);

comment on table nightowls.streams is 'The streams there are: what they join, the view that shows it, the indexes that serve it.';
comment on column nightowls.streams.org_id is 'The tenant whose list it stands in.';
comment on column nightowls.streams.name is 'The stream''s name.';
comment on column nightowls.streams.kind is 'stream_join: events with events; enrichment: events with rows or states; table_join: projections or tables.';
comment on column nightowls.streams.definition is 'The arguments it was made with.';
comment on column nightowls.streams.view_name is 'The view, nightowls.stream_<name>.';
comment on column nightowls.streams.indexes is 'Indexes on the log that it uses; streams of the same types share them.';
comment on column nightowls.streams.created_at is 'When it was made.';

-- The table of a name as schema.table. kinds: what it may be.
create function nightowls._resolve_relation(relation text, kinds text)
  returns regclass
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_table regclass;
begin
  if _resolve_relation.relation is null then
    raise exception 'a table must be named' using errcode = 'null_value_not_allowed';
  end if;
  begin
    v_table := to_regclass(_resolve_relation.relation);
  exception when syntax_error or invalid_name or feature_not_supported then
    v_table := null;
  end;
  if v_table is null then
    raise exception 'table "%" does not exist', left(_resolve_relation.relation, 128)
      using errcode = 'undefined_table', hint = 'Give schema.table.';
  elsif not exists (
          select from pg_class c where c.oid = v_table and strpos(_resolve_relation.kinds, c.relkind::text) > 0) then
    raise exception '"%" is not a relation of the right kind', v_table
      using errcode = 'wrong_object_type', hint = 'Give an ordinary table.';
  end if;
  return v_table;
end;
$$;

revoke all on function nightowls._resolve_relation(text, text) from public;

create function nightowls._relation_name(relation regclass)
  returns text
  language sql
  stable
  parallel safe
  return (
    select pg_catalog.format('%I.%I', n.nspname, c.relname)
      from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
     where c.oid = relation);

revoke all on function nightowls._relation_name(regclass) from public;

-- A time as ISO 8601 writes it, with its offset; null for anything else. It never raises, as it stands in indexes on the log, and
-- depends on no setting: such a text means the same everywhere.
create function nightowls._time_of(value text)
  returns timestamptz
  language plpgsql
  immutable
  strict
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_part text[] := regexp_match(
    _time_of.value, '^(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d)(?::(\d\d)(?:[.]\d{1,9})?)?(?:Z|[+-](\d\d):?(\d\d)?)$');
begin
  if v_part is null or v_part[1] = '0000' or v_part[2]::int not between 1 and 12 or v_part[3]::int < 1
     or v_part[4]::int > 23 or v_part[5]::int > 59 or coalesce(v_part[6]::int, 0) > 59
     or coalesce(v_part[7]::int, 0) > 14 or coalesce(v_part[8]::int, 0) > 59
     or v_part[3]::int > (case when v_part[2] in ('04', '06', '09', '11') then 30
                              when v_part[2] <> '02' then 31
                              when v_part[1]::int % 4 = 0 and (v_part[1]::int % 100 <> 0 or v_part[1]::int % 400 = 0) then 29
                              else 28 end) then
    return null;
  end if;
  return _time_of.value::timestamptz;
end;
$$;

revoke all on function nightowls._time_of(text) from public;

-- The version an aggregate was at, at a position: null before its first event, and where that event is deleted. Versions rise with
-- positions, also in the archive, so it is found in as many probes as its number of versions has binary digits.
create function nightowls._version_at(org uuid, aggregate_type text, aggregate_id text, at bigint)
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
  v_low      bigint;
  v_high     bigint;
  v_middle   bigint;
  v_position bigint;
begin
  select e.version, e."position" into v_high, v_position
    from nightowls.events e
   where e.org_id = _version_at.org and e.aggregate_type = _version_at.aggregate_type and e.aggregate_id = _version_at.aggregate_id
   order by e.version desc
   limit 1;
  if v_position <= _version_at.at or v_high is null then
    return v_high;
  end if;
  select e.version, e."position" into v_low, v_position
    from nightowls.events_archive e
   where e.org_id = _version_at.org and e.aggregate_type = _version_at.aggregate_type and e.aggregate_id = _version_at.aggregate_id
   order by e.version
   limit 1;
  if not found then
    select e.version, e."position" into v_low, v_position
      from nightowls.events e
     where e.org_id = _version_at.org and e.aggregate_type = _version_at.aggregate_type and e.aggregate_id = _version_at.aggregate_id
     order by e.version
     limit 1;
  end if;
  if v_position > _version_at.at then
    return null;
  end if;
  -- low is at or below, high above.
  while v_high - v_low > 1 loop
    v_middle := (v_low + v_high) / 2;
    v_position := coalesce(
      (select e."position"
         from nightowls.events e
        where e.org_id = _version_at.org and e.aggregate_type = _version_at.aggregate_type
          and e.aggregate_id = _version_at.aggregate_id and e.version = v_middle),
      (select e."position"
         from nightowls.events_archive e
        where e.org_id = _version_at.org and e.aggregate_type = _version_at.aggregate_type
          and e.aggregate_id = _version_at.aggregate_id and e.version = v_middle));
    if v_position <= _version_at.at then
      v_low := v_middle;
    else
      v_high := v_middle;
    end if;
  end loop;
  return v_low;
end;
$$;

revoke all on function nightowls._version_at(uuid, text, text, bigint) from public;

-- The state of an aggregate as it was at a position (null: now), for the views of enrichments; null where there is none, also
-- where the reader's org has no such projection.
create function nightowls._state_as_of(org uuid, projection text, aggregate_id text, at bigint)
  returns jsonb
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_projection nightowls.projections;
  v_version    bigint;
begin
  select p.* into v_projection
    from nightowls.projections p
   where p.org_id = _state_as_of.org and p.name = _state_as_of.projection and p.kind in ('reducer', 'handler');
  if not found or _state_as_of.aggregate_id is null then
    return null;
  end if;
  if _state_as_of.at is not null then
    v_version := nightowls._version_at(_state_as_of.org, v_projection.aggregate_type, _state_as_of.aggregate_id, _state_as_of.at);
    if v_version is null then
      return null;
    end if;
  end if;
  return nightowls._state(v_projection, _state_as_of.aggregate_id, v_version);
end;
$$;

revoke all on function nightowls._state_as_of(uuid, text, text, bigint) from public;

-- From arguments to SQL ----------------------------------------------------------------------------
--
-- No text of the caller's becomes SQL: names pass through %I, everything else through %L.

create function nightowls._refuse_path(path text, allowed text)
  returns text
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  raise exception 'path "%" is not valid', left(_refuse_path.path, 128)
    using errcode = 'invalid_parameter_value', hint = format('Give %s.', _refuse_path.allowed);
end;
$$;

revoke all on function nightowls._refuse_path(text, text) from public;

-- What a path means in an event, as text.
create function nightowls._event_part(path text, alias text)
  returns text
  language sql
  volatile
  parallel unsafe
  return case
    when path ~ '^\$([.][^.]+)+$'
      then pg_catalog.format('(%s.payload #>> %L::text[])', alias, pg_catalog.string_to_array(pg_catalog.substr(path, 3), '.')::text)
    when path ~ '^@[.]metadata([.][^.]+)+$'
      then pg_catalog.format('(%s.metadata #>> %L::text[])', alias, pg_catalog.string_to_array(pg_catalog.substr(path, 12), '.')::text)
    when path in ('@.event_type', '@.aggregate_type', '@.aggregate_id')
      then pg_catalog.format('%s.%I', alias, pg_catalog.substr(path, 3))
    when path in ('@.version', '@.position', '@.event_id')
      then pg_catalog.format('(%s.%I)::text', alias, pg_catalog.substr(path, 3))
    else nightowls._refuse_path(path, '$.key… (payload), @.metadata.key…, @.aggregate_id, @.aggregate_type, @.event_type, @.version, @.position or @.event_id')
  end;

revoke all on function nightowls._event_part(text, text) from public;

-- When an event happened: created_at, or what a path names.
create function nightowls._event_time(path text, alias text)
  returns text
  language sql
  volatile
  parallel unsafe
  return case
    when path is null then pg_catalog.format('%s.created_at', alias)
    when path ~ '^(\$|@[.]metadata)[.]' then pg_catalog.format('nightowls._time_of(%s)', nightowls._event_part(path, alias))
    else nightowls._refuse_path(path, 'nothing for created_at, $.key… (payload) or @.metadata.key…')
  end;

revoke all on function nightowls._event_time(text, text) from public;

-- Several parts of a key in one text; null if one is null, as null matches nothing.
create function nightowls._key(parts text[])
  returns text
  language sql
  immutable
  parallel safe
  return (
    select '(' || pg_catalog.string_agg(pg_catalog.format('(%s) collate pg_catalog."C"', p.part), E' || E''\\x1f'' || ' order by p.no) || ')'
      from pg_catalog.unnest(parts) with ordinality as p (part, no));

revoke all on function nightowls._key(text[]) from public;

-- The paths of one side of join_on.
create function nightowls._join_paths(join_on jsonb, side text)
  returns text[]
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_left  jsonb := _join_paths.join_on -> 'left';
  v_right jsonb := _join_paths.join_on -> 'right';
begin
  if jsonb_typeof(v_left) = 'string' and jsonb_typeof(v_right) = 'string' then
    v_left := jsonb_build_array(v_left);
    v_right := jsonb_build_array(v_right);
  end if;
  if jsonb_typeof(_join_paths.join_on) = 'object'
     and _join_paths.join_on - '{left,right}'::text[] = '{}'
     and jsonb_typeof(v_left) = 'array' and jsonb_typeof(v_right) = 'array'
     and not jsonb_path_exists(jsonb_build_array(v_left, v_right), 'lax $[*][*] ? (@.type() != "string")') then
    if jsonb_array_length(v_left) = jsonb_array_length(v_right) and jsonb_array_length(v_left) between 1 and 8 then
      return array(
        select p.path
          from jsonb_array_elements_text(case _join_paths.side when 'left' then v_left else v_right end) with ordinality as p (path, no)
         order by p.no);
    end if;
  end if;
  raise exception 'join_on is not valid'
    using errcode = 'invalid_parameter_value',
          hint = 'It is {"left": path, "right": path}, or lists of up to 8 paths of the same length.';
end;
$$;

revoke all on function nightowls._join_paths(jsonb, text) from public;

-- Which events a side has, as a condition. Types are named always: a join of everything with everything is a mistake.
create function nightowls._event_condition(filter jsonb, alias text)
  returns text
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_types text[];
  v_kinds text[];
begin
  select f.aggregate_types, f.event_types into v_types, v_kinds from nightowls._parse_filter(_event_condition.filter) f;
  if coalesce(cardinality(v_types), 0) + coalesce(cardinality(v_kinds), 0) = 0 then
    raise exception 'filter of a stream names no types'
      using errcode = 'invalid_parameter_value',
            hint = 'A filter is {"aggregate_types": [text, …], "event_types": [text, …]}, with at least one type.';
  end if;
  return concat_ws(' and ',
    case when cardinality(v_types) > 0
         then format('%s.aggregate_type = any (%L::text[])', _event_condition.alias,
                     array(select distinct t collate "C" from unnest(v_types) t order by 1)::text) end,
    case when cardinality(v_kinds) > 0
         then format('%s.event_type = any (%L::text[])', _event_condition.alias,
                     array(select distinct t collate "C" from unnest(v_kinds) t order by 1)::text) end);
end;
$$;

revoke all on function nightowls._event_condition(jsonb, text) from public;

-- How long a window is, as a text that interval reads. Days have 24 hours here, and months no length.
create function nightowls._window_length(within interval, kind text)
  returns text
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_within interval := coalesce(
    _window_length.within, case _window_length.kind when 'tumbling' then interval '5 minutes' when 'sliding' then interval '1 minute' end);
begin
  if _window_length.kind is null or _window_length.kind not in ('tumbling', 'sliding', 'session') then
    raise exception 'kind must be tumbling, sliding or session' using errcode = 'invalid_parameter_value';
  elsif v_within is null then
    raise exception 'a session needs within'
      using errcode = 'invalid_parameter_value', hint = 'Give the gap that ends a session, such as within => ''30 minutes''.';
  elsif extract(month from v_within) <> 0 or extract(year from v_within) <> 0 then
    raise exception 'within must not have months or years'
      using errcode = 'invalid_parameter_value', hint = 'They have no fixed length; give days.';
  elsif extract(epoch from v_within) not between 0.001 and 3155760000 then
    raise exception 'within must be between a millisecond and a hundred years' using errcode = 'invalid_parameter_value';
  end if;
  return trim_scale(extract(epoch from v_within)) || ' seconds';
end;
$$;

revoke all on function nightowls._window_length(interval, text) from public;

-- The beginning of a time's tumbling window. Windows of a week begin on Monday, UTC.
create function nightowls._window_of(within text, at text)
  returns text
  language sql
  immutable
  parallel safe
  return pg_catalog.format('pg_catalog.date_bin(%L::interval, %s, %L::timestamptz)', within, at, '2000-01-03 00:00:00+00');

revoke all on function nightowls._window_of(text, text) from public;

-- An index on the log, as its name and what it is on, of some columns and those events only that a side has.
create function nightowls._stream_index(condition text, columns text[])
  returns text[]
  language sql
  immutable
  parallel safe
  return array[
    'stream_' || pg_catalog.to_hex(pg_catalog.hashtextextended(condition || '|' || columns::text, 0)) || '_idx',
    pg_catalog.format('(org_id, (%s)) where %s', pg_catalog.array_to_string(columns, '), ('), condition)];

revoke all on function nightowls._stream_index(text, text[]) from public;

-- The columns of an event in a view.
create function nightowls._event_columns(alias text, prefix text)
  returns text
  language sql
  immutable
  parallel safe
  return (
    select pg_catalog.string_agg(pg_catalog.format('%s.%I as %I', alias, c.name, prefix || c.name), ', ' order by c.no)
      from pg_catalog.unnest('{position,event_type,aggregate_type,aggregate_id,version,payload,metadata}'::text[]) with ordinality as c (name, no));

revoke all on function nightowls._event_columns(text, text) from public;

-- Makes or finds a stream: its row, its view, its indexes. indexes: name and definition of each. Runs as the owner, who calls.
create function nightowls._make_stream(org uuid, name text, kind text, definition jsonb, query text, indexes text[])
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_view  text := format('nightowls.%I', 'stream_' || _make_stream.name);
  v_found nightowls.streams;
  v_role  text;
begin
  if _make_stream.name is null then
    raise exception 'name must not be null' using errcode = 'null_value_not_allowed';
  elsif _make_stream.name = '' then
    raise exception 'name must not be empty' using errcode = 'invalid_parameter_value';
  elsif octet_length(_make_stream.name) > 40 then
    raise exception 'name is too long'
      using errcode = 'program_limit_exceeded', detail = 'A stream''s name has at most 40 bytes.';
  end if;
  perform nightowls._refuse_no_org(_make_stream.org);
  insert into nightowls.streams (org_id, name, kind, definition, view_name, indexes)
  values (_make_stream.org, _make_stream.name, _make_stream.kind, _make_stream.definition, v_view,
          array(select distinct _make_stream.indexes[i][1] from generate_subscripts(_make_stream.indexes, 1) i order by 1))
  on conflict do nothing;
  if found and to_regclass(v_view) is not null then
    raise exception 'view % exists already', v_view
      using errcode = 'duplicate_table', hint = 'A stream''s view serves all orgs: its name is unique among them. Choose another.';
  end if;
  select s.* into v_found from nightowls.streams s where s.org_id = _make_stream.org and s.name = _make_stream.name;
  if (v_found.kind, v_found.definition) is distinct from (_make_stream.kind, _make_stream.definition) then
    raise exception 'stream "%" exists already with another definition', v_found.name
      using errcode = 'duplicate_object', hint = 'Drop it with nightowls.drop_stream(), or choose another name.';
  end if;

  for i in 1 .. coalesce(array_length(_make_stream.indexes, 1), 0) loop
    if to_regclass('nightowls.' || quote_ident(_make_stream.indexes[i][1])) is null then
      execute format('create index %I on nightowls.events %s', _make_stream.indexes[i][1], _make_stream.indexes[i][2]);
    end if;
  end loop;
  if to_regclass(v_view) is not null then
    return;
  end if;
  execute format('create view %s with (security_invoker = true) as %s', v_view, _make_stream.query);
  execute format('alter view %s owner to %I', v_view, (
    select r.rolname from pg_namespace n join pg_roles r on r.oid = n.nspowner where n.nspname = 'nightowls'));
  execute format('comment on view %s is %L', v_view,
                 format('Stream %s (%s): the reader''s org only, with the reader''s rights.', _make_stream.name, _make_stream.kind));
  -- Who may read the log may read its joins.
  for v_role in
    select r.rolname
      from pg_class c
     cross join lateral aclexplode(c.relacl) a
      join pg_roles r on r.oid = a.grantee
     where c.oid = 'nightowls.events'::regclass and a.privilege_type = 'SELECT' and a.grantee <> c.relowner
  loop
    execute format('grant select on %s to %I', v_view, v_role);
  end loop;
end;
$$;

revoke all on function nightowls._make_stream(uuid, text, text, jsonb, text, text[]) from public;

-- The key of an event by some paths, and the condition that two events' keys are the same. The hash is what an index can hold: a
-- key may be longer than a page.
create function nightowls._event_key(paths text[], alias text)
  returns text
  language sql
  volatile
  parallel unsafe
  return nightowls._key(array(
    select nightowls._event_part(p.path, alias) from pg_catalog.unnest(paths) with ordinality as p (path, no) order by p.no));

revoke all on function nightowls._event_key(text[], text) from public;

create function nightowls._hash_of(key text)
  returns text
  language sql
  immutable
  parallel safe
  return pg_catalog.format('pg_catalog.hashtextextended(%s, 0)', key);

revoke all on function nightowls._hash_of(text) from public;

-- That an event's key is the one that k has (see create_stream_join).
create function nightowls._same_key(key text)
  returns text
  language sql
  immutable
  parallel safe
  return pg_catalog.format('%s = k.hash and %s = k.key', nightowls._hash_of(key), key);

revoke all on function nightowls._same_key(text) from public;

-- The time at which the session of event l begins (direction -1) or ends (1): in jumps over the events of both sides with its key, each to
-- the farthest within the gap, until there is none. So it reads the session, whatever else the log holds.
create function nightowls._session_edge(
  direction    int,
  within       text,
  left_filter  jsonb,
  right_filter jsonb,
  left_paths   text[],
  right_paths  text[],
  left_time    text,
  right_time   text
)
  returns text
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_filter jsonb;
  v_paths  text[];
  v_time   text;
  v_jumps  text[];
begin
  for v_filter, v_paths, v_time in
    values (_session_edge.left_filter, _session_edge.left_paths, _session_edge.left_time),
           (_session_edge.right_filter, _session_edge.right_paths, _session_edge.right_time)
  loop
    v_jumps := v_jumps || format(
      case _session_edge.direction
        when 1 then '(select %1$s from nightowls.events p where p.org_id = l.org_id and %2$s and %3$s and %1$s > w.at and %1$s <= w.far order by %1$s desc limit 1)'
        else '(select %1$s from nightowls.events p where p.org_id = l.org_id and %2$s and %3$s and %1$s < w.at and %1$s >= w.far order by %1$s limit 1)' end,
      nightowls._event_time(v_time, 'p'), nightowls._event_condition(v_filter, 'p'), nightowls._same_key(nightowls._event_key(v_paths, 'p')));
  end loop;
  return format(
    '(with recursive w (at, far) as (select k.at, k.at %1$s %2$L::interval union all select n.at, n.at %1$s %2$L::interval from w cross join lateral ('
    'select %3$s(%4$s) as at offset 0) n where n.at is not null) select %5$s(w.at) as at from w)',
    case _session_edge.direction when 1 then '+' else '-' end, _session_edge.within,
    case _session_edge.direction when 1 then 'greatest' else 'least' end, array_to_string(v_jumps, ', '),
    case _session_edge.direction when 1 then 'max' else 'min' end);
end;
$$;

revoke all on function nightowls._session_edge(int, text, jsonb, jsonb, text[], text[], text, text) from public;

create function nightowls.create_stream_join(
  name         text,
  left_filter  jsonb,
  right_filter jsonb,
  join_on      jsonb,
  within       interval default null,
  kind         text default 'tumbling',
  left_time    text default null,
  right_time   text default null,
  org          uuid default null
)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org       uuid := nightowls.current_org(create_stream_join.org);
  v_within    text := nightowls._window_length(create_stream_join.within, create_stream_join.kind);
  v_l_paths   text[] := nightowls._join_paths(create_stream_join.join_on, 'left');
  v_r_paths   text[] := nightowls._join_paths(create_stream_join.join_on, 'right');
  v_l_where   text := nightowls._event_condition(create_stream_join.left_filter, 'events');
  v_r_where   text := nightowls._event_condition(create_stream_join.right_filter, 'events');
  v_l_time    text := nightowls._event_time(create_stream_join.left_time, 'events');
  v_r_time    text := nightowls._event_time(create_stream_join.right_time, 'events');
  v_l_at      text := nightowls._event_time(create_stream_join.left_time, 'l');
  v_r_at      text := nightowls._event_time(create_stream_join.right_time, 'r');
  v_bin       text := nightowls._window_of(v_within, v_l_at);
  v_start     text;
  v_low       text;
  v_high      text;
  v_between   text;
  v_edges     text := '';
  v_indexes   text[];
begin
  case create_stream_join.kind
  when 'tumbling' then
    v_start := v_bin;
    v_low := v_bin;
    v_high := format('%s + %L::interval', v_bin, v_within);
    v_between := format('%s >= k.low and %1$s < k.high', v_r_at);
  when 'sliding' then
    v_start := format('%s - %L::interval', v_l_at, v_within);
    v_low := v_start;
    v_high := format('%s + %L::interval', v_l_at, v_within);
    v_between := format('%s >= k.low and %1$s <= k.high', v_r_at);
  else
    v_start := 's.at';
    v_low := 'null::timestamptz';
    v_high := 'null::timestamptz';
    v_between := format('%s >= s.at and %1$s <= t.at', v_r_at);
    v_edges := format(
      ' cross join lateral %s s cross join lateral %s t',
      nightowls._session_edge(-1, v_within, create_stream_join.left_filter, create_stream_join.right_filter, v_l_paths, v_r_paths,
                              create_stream_join.left_time, create_stream_join.right_time),
      nightowls._session_edge(1, v_within, create_stream_join.left_filter, create_stream_join.right_filter, v_l_paths, v_r_paths,
                              create_stream_join.left_time, create_stream_join.right_time));
  end case;

  -- By key and time for the partners; by time alone for the reader's range, and for a reader behind row level security, from whom
  -- Postgres keeps indexes on expressions (their functions are not leakproof).
  v_indexes := array[
    nightowls._stream_index(v_r_where, array[nightowls._hash_of(nightowls._event_key(v_r_paths, 'events')), v_r_time]),
    nightowls._stream_index(v_r_where, array[v_r_time]),
    nightowls._stream_index(v_l_where, array[v_l_time])];
  if create_stream_join.kind = 'tumbling' then
    v_indexes := v_indexes || array[nightowls._stream_index(v_l_where, array[nightowls._window_of(v_within, v_l_time)])];
  elsif create_stream_join.kind = 'session' then
    v_indexes := v_indexes || array[
      nightowls._stream_index(v_l_where, array[nightowls._hash_of(nightowls._event_key(v_l_paths, 'events')), v_l_time])];
  end if;

  perform nightowls._make_stream(
    v_org, create_stream_join.name, 'stream_join',
    jsonb_build_object(
      'left_filter', create_stream_join.left_filter, 'right_filter', create_stream_join.right_filter,
      'join_on', create_stream_join.join_on, 'within', v_within, 'kind', create_stream_join.kind,
      'left_time', create_stream_join.left_time, 'right_time', create_stream_join.right_time),
    -- k: what is looked for, as columns: behind row level security a comparison with a column may use an index, one with an
    -- expression may not.
    format(
      'select l.org_id, %s as window_start, %s, %s as left_at, r.* from nightowls.events l '
      'cross join lateral (select k.key, %s as hash, k.at, k.low, k.high from (select %s as key, %3$s as at, %6$s as low, %7$s as high offset 0) k offset 0) k'
      '%s cross join lateral ('
      'select %s, %s as right_at from nightowls.events r where r.org_id = l.org_id and %s and %s and %s and r."position" <> l."position" offset 0) r '
      'where l.org_id = (select nightowls.current_org()) and %s',
      v_start, nightowls._event_columns('l', 'left_'), v_l_at,
      nightowls._hash_of('k.key'), nightowls._event_key(v_l_paths, 'l'), v_low, v_high, v_edges,
      nightowls._event_columns('r', 'right_'), v_r_at, nightowls._event_condition(create_stream_join.right_filter, 'r'),
      nightowls._same_key(nightowls._event_key(v_r_paths, 'r')), v_between,
      nightowls._event_condition(create_stream_join.left_filter, 'l')),
    v_indexes);
end;
$$;

comment on function nightowls.create_stream_join(text, jsonb, jsonb, jsonb, interval, text, text, text, uuid) is
  'Makes the view nightowls.stream_<name>: pairs of events with the same key in the same window. name: at most 40 bytes, unique among all orgs; '
  'left_filter, right_filter: {"aggregate_types": […], "event_types": […]}, with at least one type; join_on: {"left": path, "right": path}, or lists '
  'of paths: $.key… (payload), @.metadata.key…, @.aggregate_id and other columns, compared as text; within and kind: tumbling (default; windows of 5 '
  'minutes side by side), sliding (at most 1 minute apart), session (events of either side follow each other with gaps of at most within, which '
  'is required); left_time, right_time: where an event has its time, $.key… or @.metadata.key… as ISO 8601 with offset, by default created_at; org: whose list '
  'it stands in. The view shows the reader''s org with the reader''s rights, '
  'window_start and both events; read it by a range of left_at or left_position (window_start where tumbling), which the indexes serve '
  'that this makes on the log, of these types only: each of their appends pays for them. Made again with the same definition it changes nothing, but makes '
  'an index or view that is missing. Runs DDL: owner only. Waits for open appends, and holds up new ones while an index is built. Raises 22023 for an argument '
  'that is not valid, 22004 for a null name, 54000 for one that is too long, 42710 or 42P07 if the name exists with another definition or in another '
  'org, NW010 if there is no org.';

revoke all on function nightowls.create_stream_join(text, jsonb, jsonb, jsonb, interval, text, text, text, uuid) from public;

-- A projection or table to be joined: what to select from, under an alias, the condition on its rows, its columns in a view, its time.
create function nightowls._join_relation(
  relation   text,
  org        uuid,
  alias      text,
  at         text,
  out source text,
  out rows   text,
  out shown  text,
  out "time" text,
  out oid    regclass,
  out name   text
)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_projection nightowls.projections;
begin
  select p.* into v_projection
    from nightowls.projections p
   where p.org_id = _join_relation.org and p.name = _join_relation.relation;
  if v_projection.kind in ('reducer', 'handler') then
    _join_relation.oid := 'nightowls.projection_states'::regclass;
    _join_relation.rows := format('%s.projection = %L', _join_relation.alias, v_projection.name);
    _join_relation.name := v_projection.name;
  elsif strpos(coalesce(v_projection.target, _join_relation.relation), '.') = 0 then
    perform nightowls._refuse_unknown(
      'projection', _join_relation.relation,
      array(select p.name from nightowls.projections p where p.org_id = _join_relation.org),
      'Give a projection''s name, or schema.table.');
  else
    _join_relation.oid := nightowls._resolve_relation(coalesce(v_projection.target, _join_relation.relation), 'rpvmf');
    _join_relation.name := coalesce(v_projection.name, nightowls._relation_name(_join_relation.oid));
  end if;
  _join_relation.source := nightowls._relation_name(_join_relation.oid) || ' ' || _join_relation.alias;
  if exists (select from pg_attribute a
              where a.attrelid = _join_relation.oid and a.attname = 'org_id' and a.atttypid = 'uuid'::regtype) then
    _join_relation.rows := concat_ws(' and ', _join_relation.rows,
                                     format('%s.org_id = (select nightowls.current_org())', _join_relation.alias));
  end if;
  _join_relation.rows := coalesce(_join_relation.rows, 'true');
  _join_relation.shown := (
    select string_agg(format('%s.%I as %I', _join_relation.alias, a.attname,
                             case _join_relation.alias when 'l' then 'left_' else 'right_' end || a.attname), ', ' order by a.attnum)
      from pg_attribute a
     where a.attrelid = _join_relation.oid and a.attnum > 0 and not a.attisdropped
       and a.attname <> 'org_id' and (a.attname <> 'projection' or v_projection.kind is null));
  _join_relation."time" := (
    select format('%s.%I', _join_relation.alias, a.attname)
      from pg_attribute a
     where a.attrelid = _join_relation.oid and a.attnum > 0 and not a.attisdropped and a.atttypid = 'timestamptz'::regtype
       and case when _join_relation.at is null then a.attname in ('updated_at', 'created_at') else a.attname = _join_relation.at end
     order by a.attname desc
     limit 1);
  if _join_relation."time" is null then
    raise exception '% has no column % of type timestamptz', _join_relation.name, coalesce(quote_ident(_join_relation.at), 'updated_at or created_at')
      using errcode = 'undefined_column', hint = 'A join needs a time: name the column with left_time or right_time.';
  end if;
end;
$$;

revoke all on function nightowls._join_relation(text, uuid, text, text) from public;

-- What a path means in a row, as text: a column, or column.key… inside one of type json or jsonb.
create function nightowls._row_part(relation regclass, path text, alias text)
  returns text
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_column text := (
    select a.attname
      from pg_attribute a
     where a.attrelid = _row_part.relation and a.attnum > 0 and not a.attisdropped
       and (a.attname = _row_part.path
            or a.attname = split_part(_row_part.path, '.', 1) and a.atttypid in ('json'::regtype, 'jsonb'::regtype)
               and _row_part.path ~ '^[^.]+([.][^.]+)+$')
     order by a.attname = _row_part.path desc
     limit 1);
begin
  if v_column is null then
    raise exception 'column "%" of % does not exist', left(_row_part.path, 128), nightowls._relation_name(_row_part.relation)
      using errcode = 'undefined_column', hint = 'Give a column, or column.key… inside one of type jsonb.';
  elsif v_column = _row_part.path then
    return format('(%s.%I)::text', _row_part.alias, v_column);
  end if;
  return format('(%s.%I #>> %L::text[])', _row_part.alias, v_column,
                (string_to_array(_row_part.path, '.'))[2:]::text);
end;
$$;

revoke all on function nightowls._row_part(regclass, text, text) from public;

-- The condition that a row's column or path is what an event's part says. Of common types the part is made one of them, so that
-- an index of the table's can be used; what cannot be one matches nothing, as it would as text.
create function nightowls._same_row(relation regclass, path text, part text)
  returns text
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  case (select a.atttypid::regtype
          from pg_attribute a
         where a.attrelid = _same_row.relation and a.attname = _same_row.path and a.attnum > 0 and not a.attisdropped)
  when 'text'::regtype then
    return format('r.%I = (%s)', _same_row.path, _same_row.part);
  when 'uuid'::regtype then
    return format('r.%I = case when %s ~ ''^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$'' then (%2$s)::uuid end', _same_row.path, _same_row.part);
  when 'smallint'::regtype, 'integer'::regtype, 'bigint'::regtype then
    return format('r.%I = case when %s ~ ''^(0|-?[1-9][0-9]{0,17})$'' then (%2$s)::bigint end', _same_row.path, _same_row.part);
  else
    return format('%s = (%s)', nightowls._row_part(_same_row.relation, _same_row.path, 'r'), _same_row.part);
  end case;
end;
$$;

revoke all on function nightowls._same_row(regclass, text, text) from public;

create function nightowls.create_enrichment(
  name            text,
  filter          jsonb,
  reference_table text,
  join_on         jsonb,
  at              text default 'now',
  within          interval default null,
  event_time      text default null,
  org             uuid default null
)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org        uuid := nightowls.current_org(create_enrichment.org);
  v_within     text := nightowls._window_length(create_enrichment.within, 'tumbling');
  v_l_paths    text[] := nightowls._join_paths(create_enrichment.join_on, 'left');
  v_r_paths    text[] := nightowls._join_paths(create_enrichment.join_on, 'right');
  v_where      text := nightowls._event_condition(create_enrichment.filter, 'events');
  v_time       text := nightowls._event_time(create_enrichment.event_time, 'events');
  v_at         text := nightowls._event_time(create_enrichment.event_time, 'l');
  v_projection nightowls.projections;
  v_table      regclass;
  v_reference  text;
  v_shown      text;
begin
  if create_enrichment.at is null or create_enrichment.at not in ('now', 'event') then
    raise exception 'at must be now or event' using errcode = 'invalid_parameter_value';
  end if;
  select p.* into v_projection
    from nightowls.projections p
   where p.org_id = v_org and p.name = create_enrichment.reference_table;

  if v_projection.kind in ('reducer', 'handler') then
    if v_r_paths <> array['aggregate_id'] then
      raise exception 'a state is found by aggregate_id alone'
        using errcode = 'invalid_parameter_value', hint = 'Give join_on => {"left": path, "right": "aggregate_id"}.';
    end if;
    v_reference := format(
      'left join lateral (select %1$s as reference_id, nightowls._state_as_of(l.org_id, %2$L, %1$s, %3$s) as reference_state) r on true',
      nightowls._event_part(v_l_paths[1], 'l'), v_projection.name,
      case create_enrichment.at when 'event' then 'l."position"' else 'null' end);
    v_shown := 'r.reference_id, r.reference_state';
  elsif create_enrichment.at = 'event' then
    perform nightowls._refuse_unknown(
      'projection', create_enrichment.reference_table,
      array(select p.name from nightowls.projections p where p.org_id = v_org and p.kind in ('reducer', 'handler')),
      'A row has no past; only a projection that keeps states can be read as it was at the event.');
  else
    v_table := nightowls._resolve_relation(coalesce(v_projection.target, create_enrichment.reference_table), 'rpvmf');
    v_reference := format(
      'left join %s r on %s%s', nightowls._relation_name(v_table),
      (select string_agg(nightowls._same_row(v_table, v_r_paths[i], nightowls._event_part(v_l_paths[i], 'l')), ' and ' order by i)
         from generate_subscripts(v_l_paths, 1) i),
      case when exists (select from pg_attribute a
                         where a.attrelid = v_table and a.attname = 'org_id' and a.atttypid = 'uuid'::regtype)
           then ' and r.org_id = l.org_id' else '' end);
    v_shown := (
      select string_agg(format('r.%I as %I', a.attname, 'reference_' || a.attname), ', ' order by a.attnum)
        from pg_attribute a
       where a.attrelid = v_table and a.attnum > 0 and not a.attisdropped and a.attname <> 'org_id');
  end if;

  perform nightowls._make_stream(
    v_org, create_enrichment.name, 'enrichment',
    jsonb_build_object(
      'filter', create_enrichment.filter,
      'reference_table', coalesce(v_projection.name, nightowls._relation_name(v_table)), 'join_on', create_enrichment.join_on,
      'at', create_enrichment.at, 'within', v_within, 'event_time', create_enrichment.event_time),
    format('select l.org_id, %s as window_start, %s, %s as event_at, %s from nightowls.events l %s '
           'where l.org_id = (select nightowls.current_org()) and %s',
           nightowls._window_of(v_within, v_at), nightowls._event_columns('l', ''), v_at, v_shown, v_reference,
           nightowls._event_condition(create_enrichment.filter, 'l')),
    array[nightowls._stream_index(v_where, array[v_time]),
          nightowls._stream_index(v_where, array[nightowls._window_of(v_within, v_time)])]);
end;
$$;

comment on function nightowls.create_enrichment(text, jsonb, text, jsonb, text, interval, text, uuid) is
  'Makes the view nightowls.stream_<name>: events, each with the row or state it refers to, or nulls. name: at most 40 bytes, unique among all orgs; '
  'filter: {"aggregate_types": […], "event_types": […]}, with at least one type; reference_table: schema.table, or a projection; join_on: {"left": '
  'path in the event, "right": column of the table}, or lists, compared as text; of a projection the right is aggregate_id; at: now, the row or state as it is, '
  'or event, a projection''s state as it was at the event''s position; within: the length of the windows that window_start names, 5 minutes by '
  'default; event_time: where an event has its time, by default created_at; org: whose list it stands in. The view shows the reader''s org with the reader''s '
  'rights, of a table with a column org_id that org''s rows; read it by a range of event_at, window_start or position. It makes indexes on the log, of these types. '
  'Made again with the same definition it changes nothing, but makes an index or view that is missing. Runs DDL: owner only. Waits for open appends, and holds up new ones '
  'while an index is built. Raises 22023 for an argument that is not valid, 22004 for a null name, 54000 for one that is too long, 42P01, 42809 or 42703 if the table '
  'or column is not there or cannot be used, NW007 if at is event and there is no such projection, 42710 or 42P07 if the name exists with another definition or in another org, '
  'NW010 if there is no org.';

revoke all on function nightowls.create_enrichment(text, jsonb, text, jsonb, text, interval, text, uuid) from public;

create function nightowls.create_table_join(
  name           text,
  left_relation  text,
  right_relation text,
  join_on        jsonb,
  within         interval default null,
  kind           text default 'tumbling',
  left_time      text default null,
  right_time     text default null,
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
  v_org    uuid := nightowls.current_org(create_table_join.org);
  v_within text := nightowls._window_length(create_table_join.within, create_table_join.kind);
  v_left   record := nightowls._join_relation(create_table_join.left_relation, v_org, 'l', create_table_join.left_time);
  v_right  record := nightowls._join_relation(create_table_join.right_relation, v_org, 'r', create_table_join.right_time);
  v_l_key  text;
  v_r_key  text;
  v_query  text;
begin
  v_l_key := nightowls._key(array(
    select nightowls._row_part(v_left.oid, p.path, 'l')
      from unnest(nightowls._join_paths(create_table_join.join_on, 'left')) with ordinality as p (path, no) order by p.no));
  v_r_key := nightowls._key(array(
    select nightowls._row_part(v_right.oid, p.path, 'r')
      from unnest(nightowls._join_paths(create_table_join.join_on, 'right')) with ordinality as p (path, no) order by p.no));
  v_query := format('select (select nightowls.current_org()) as org_id, %%s as window_start, %s, %s from %s join %s on %s = %s and %%s where %s and %s',
                    replace(v_left.shown, '%', '%%'), replace(v_right.shown, '%', '%%'), replace(v_left.source, '%', '%%'),
                    replace(v_right.source, '%', '%%'), replace(v_l_key, '%', '%%'), replace(v_r_key, '%', '%%'),
                    replace(v_left.rows, '%', '%%'), replace(v_right.rows, '%', '%%'));
  case create_table_join.kind
  when 'tumbling' then
    v_query := format(v_query, nightowls._window_of(v_within, v_left."time"),
                      nightowls._window_of(v_within, v_left."time") || ' = ' || nightowls._window_of(v_within, v_right."time"));
  when 'sliding' then
    v_query := format(v_query, format('%s - %L::interval', v_left."time", v_within),
                      format('%s between %s - %3$L::interval and %2$s + %3$L::interval', v_right."time", v_left."time", v_within));
  else
    -- Sessions are numbered once, over the times of both sides; then each side finds its own by key and time.
    v_query := format(
      'with s as materialized (select n.key, n.at, n.no, min(n.at) over (partition by n.key, n.no) as window_start from ('
      'select g.key, g.at, sum(g.gap) over (partition by g.key order by g.at) as no from ('
      'select u.key, u.at, case when u.at - lag(u.at) over (partition by u.key order by u.at) <= %L::interval then 0 else 1 end as gap from ('
      'select %s as key, %s as at from %s where %s union select %s, %s from %s where %s) u '
      'where u.key is not null and u.at is not null) g) n) ',
      v_within, v_l_key, v_left."time", v_left.source, v_left.rows, v_r_key, v_right."time", v_right.source, v_right.rows)
      || format(v_query, 'a.window_start', format(
           'true join s a on a.key = %s and a.at = %s join s b on b.key = %s and b.at = %s and b.no = a.no',
           v_l_key, v_left."time", v_r_key, v_right."time"));
  end case;

  perform nightowls._make_stream(
    v_org, create_table_join.name, 'table_join',
    jsonb_build_object(
      'left_relation', v_left.name, 'right_relation', v_right.name, 'join_on', create_table_join.join_on, 'within', v_within,
      'kind', create_table_join.kind, 'left_time', create_table_join.left_time, 'right_time', create_table_join.right_time),
    v_query, null);
end;
$$;

comment on function nightowls.create_table_join(text, text, text, jsonb, interval, text, text, text, uuid) is
  'Makes the view nightowls.stream_<name>: rows of two projections or tables with the same key whose times are in the same window. name: at most 40 bytes, '
  'unique among all orgs; left_relation, right_relation: a projection''s name, or schema.table; join_on: {"left": column, "right": column}, or lists; column.key… '
  'goes into a jsonb column, such as state.customer of a projection; compared as text; within and kind as in create_stream_join; left_time, right_time: the columns (timestamptz) '
  'that have the times, by default updated_at, else created_at; org: whose list it stands in. The view shows the reader''s org of what has a column org_id, with the reader''s rights; '
  'columns are prefixed left_ and right_. It makes no indexes on tables of users. Made again with the same definition it changes nothing, but makes the view if '
  'it is missing. Runs DDL: owner only. Raises 22023 for an argument that is not valid, 22004 for a null name, 54000 for one that is too long, NW007, 42P01 or 42809 if a projection or table '
  'is not there or cannot be used, 42703 for a column that is not there or a time that is none, 42710 or 42P07 if the name exists with another definition or in another org, NW010 '
  'if there is no org.';

revoke all on function nightowls.create_table_join(text, text, text, jsonb, interval, text, text, text, uuid) from public;

create function nightowls.drop_stream(name text, org uuid default null)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org    uuid := nightowls.current_org(drop_stream.org);
  v_stream nightowls.streams;
  v_index  text;
begin
  delete from nightowls.streams s
   where s.org_id = v_org and s.name = drop_stream.name
  returning s.* into v_stream;
  if not found then
    perform nightowls._refuse_unknown(
      'stream', drop_stream.name, array(select s.name from nightowls.streams s where s.org_id = v_org),
      'Make it with nightowls.create_stream_join(), create_enrichment() or create_table_join().');
  end if;
  execute format('drop view if exists %s', v_stream.view_name);
  foreach v_index in array v_stream.indexes loop
    if not exists (select from nightowls.streams s where v_index = any (s.indexes)) then
      execute format('drop index if exists nightowls.%I', v_index);
    end if;
  end loop;
end;
$$;

comment on function nightowls.drop_stream(text, uuid) is
  'Drops a stream: its view, and the indexes on the log that no other stream uses. name: the stream; org: the tenant. Runs DDL: owner only. Waits for open '
  'appends if an index goes. Raises NW007 if there is no such stream, 2BP01 if something depends on its view, NW010 if there is no org.';

revoke all on function nightowls.drop_stream(text, uuid) from public;

alter table nightowls.streams enable row level security;
alter table nightowls.streams force row level security;
create policy service_all on nightowls.streams
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));
