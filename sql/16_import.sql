-- Taking over the rows of an append-only table that was there before.
--
-- Rows are taken in the order of one column (id order). In a table that is being written to, that is not the order of commits: a row
-- with a lower id can appear after one with a higher. Before a batch is read, the writers that were at work when its end was
-- chosen have ended; whoever comes later draws a higher id. So the place reached never passes a row.

create table nightowls.imports (
  org_id     uuid        not null,
  source     text        collate "C" not null,
  order_by   text        not null,
  place      text,
  imported   bigint      not null default 0,
  updated_at timestamptz not null default clock_timestamp(),
  constraint imports_pkey primary key (org_id, source)
);

comment on table nightowls.imports is 'How far import_events has come with each source.';
comment on column nightowls.imports.org_id is 'The tenant.';
comment on column nightowls.imports.source is 'The table or view, by its qualified name.';
comment on column nightowls.imports.order_by is 'The column whose order it is taken in.';
comment on column nightowls.imports.place is 'That column''s value in the last row taken, as text; null: none yet.';
comment on column nightowls.imports.imported is 'How many events it has brought.';
comment on column nightowls.imports.updated_at is 'When it was last called.';

-- What a mapping says about one field, as an SQL expression over the source's row s; null if it says nothing.
create function nightowls._mapped(mapping jsonb, field text)
  returns text
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_value jsonb := _mapped.mapping -> _mapped.field;
  v_body  boolean := _mapped.field in ('payload', 'metadata');
begin
  case jsonb_typeof(v_value)
  when 'string' then
    return format(case when v_body then 'to_jsonb(s.%I)' else 's.%I::text' end, v_value #>> '{}');
  when 'array' then
    if v_body and v_value <> '[]' and not jsonb_path_exists(v_value, 'strict $[*] ? (@.type() != "string")') then
      return format('jsonb_build_object(%s)', (
        select string_agg(format('%L, s.%I', c.name, c.name), ', ' order by c.no)
          from jsonb_array_elements_text(v_value) with ordinality as c (name, no)));
    end if;
  when 'object' then
    if v_value - 'literal' = '{}' and v_value ? 'literal' then
      return case when v_body then format('%L::jsonb', v_value -> 'literal') else format('%L', v_value ->> 'literal') end;
    elsif v_value - 'expression' = '{}' and jsonb_typeof(v_value -> 'expression') = 'string' then
      -- The line break ends a comment in it.
      return format(case when v_body then E'to_jsonb(%s\n)' else E'(%s\n)::text' end, v_value ->> 'expression');
    end if;
  else
    if v_value is null or v_value = 'null' then
      return null;
    end if;
  end case;
  raise exception 'mapping is not valid at %', _mapped.field
    using errcode = 'invalid_parameter_value',
          detail = 'A field is a column''s name, {"literal": any} or {"expression": "SQL"}; payload and metadata can be arrays of '
                   'columns'' names as well.';
end;
$$;

revoke all on function nightowls._mapped(jsonb, text) from public;

-- Waits until those who are writing to a table, or to what a view reads, have ended; not for those who come later.
create function nightowls._await_writers(relation regclass)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_until     timestamptz := clock_timestamp()
                           + coalesce(nullif(current_setting('lock_timeout')::interval, interval '0'), interval '10 seconds');
  v_relations oid[];
  v_writers   text[];
  v_pid       int;
begin
  with recursive r (id) as (
    select _await_writers.relation::oid
    union
    select n.id
      from r
     cross join lateral (
             select i.inhrelid as id from pg_inherits i where i.inhparent = r.id
             union all
             select d.refobjid
               from pg_rewrite w
               join pg_depend d on d.classid = 'pg_rewrite'::regclass and d.objid = w.oid and d.refclassid = 'pg_class'::regclass
              where w.ev_class = r.id) n
  )
  select array_agg(r.id) into v_relations from r;

  v_writers := array(
    select l.virtualtransaction
      from pg_locks l
     where l.locktype = 'relation' and l.granted and l.relation = any (v_relations)
       and l.database = (select d.oid from pg_database d where d.datname = current_database())
       and l.mode in ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock')
       and l.pid is distinct from pg_backend_pid());
  loop
    select l.pid into v_pid
      from pg_locks l
     where l.virtualtransaction = any (v_writers)
       and l.locktype = 'relation' and l.relation = any (v_relations)
       and l.database = (select d.oid from pg_database d where d.datname = current_database())
       and l.mode in ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock')
     limit 1;
    exit when not found;
    if clock_timestamp() > v_until then
      raise exception '% is being written to', _await_writers.relation
        using errcode = 'lock_not_available',
              detail = format('Process %s has had a transaction open on it all the time.', coalesce(v_pid::text, 'of a prepared transaction')),
              hint = 'Nothing was taken. Try again when that transaction has ended, or with a longer lock_timeout.';
    end if;
    perform pg_sleep(0.01);
  end loop;
end;
$$;

revoke all on function nightowls._await_writers(regclass) from public;

-- Runs the query of a batch. In UTC, so that a timestamp without time zone means the same whoever calls, and so does a date as text.
create function nightowls._read_source(
  query         text,
  max_events    bigint,
  out keys      text[],
  out types     text[],
  out ids       text[],
  out kinds     text[],
  out payloads  jsonb[],
  out metadatas jsonb[],
  out event_ids text[],
  out times     timestamptz[]
)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
  set timezone to 'UTC'
  set datestyle to 'ISO'
as $$
#variable_conflict use_column
begin
  execute format(
    'select array_agg(x.key), array_agg(x.type), array_agg(x.id), array_agg(x.kind), array_agg(x.payload), array_agg(x.metadata), '
    'array_agg(x.event_id), array_agg(x.at) from (%s limit $1) x', _read_source.query)
     into keys, types, ids, kinds, payloads, metadatas, event_ids, times
    using _read_source.max_events;
end;
$$;

revoke all on function nightowls._read_source(text, bigint) from public;

-- Finds the row whose fields cannot be read, and raises what is wrong with it.
create function nightowls._refuse_row(source text, order_by text, keys_query text, query text, max_events bigint)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_key     text;
  v_state   text;
  v_message text;
begin
  for v_key in execute _refuse_row.keys_query || ' limit $1' using _refuse_row.max_events loop
    begin
      perform nightowls._read_source(format(_refuse_row.query, format('s.%I = %L', _refuse_row.order_by, v_key)), 1);
    exception when data_exception then
      get stacked diagnostics v_state = returned_sqlstate, v_message = message_text;
      raise exception 'row with % = % of % cannot be taken: %', _refuse_row.order_by, left(v_key, 64), _refuse_row.source, v_message
        using errcode = v_state;
    end;
  end loop;
end;
$$;

revoke all on function nightowls._refuse_row(text, text, text, text, bigint) from public;

-- Appends the rows that are not there yet, in their order, and returns their positions; and the aggregates they are of. The owner's:
-- nobody else gets through the door.
create function nightowls._import_rows(
  org            uuid,
  types          text[],
  ids            text[],
  kinds          text[],
  payloads       jsonb[],
  metadatas      jsonb[],
  event_ids      uuid[],
  times          timestamptz[],
  out agg_types  text[],
  out agg_ids    text[],
  out positions  bigint[]
)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp, pg_append
  set enable_seqscan to off
  set jit to off
as $$
#variable_conflict use_column
declare
  v_new   bigint[];
  v_heads bigint[];
  v_key   text;
begin
  perform nightowls._hold(_import_rows.org, nightowls._org_class(_import_rows.org));
  loop
    -- Of several with one id the first.
    v_new := array(
      select min(u.no)
        from unnest(_import_rows.event_ids) with ordinality as u (id, no)
       where not nightowls._is_any_known(_import_rows.org, array[u.id])
       group by u.id);
    if v_new = '{}' then
      positions := '{}';
      return;
    end if;
    select array_agg(a.type), array_agg(a.id)
      into agg_types, agg_ids
      from (select distinct u.type, u.id
              from unnest(_import_rows.types, _import_rows.ids) with ordinality as u (type, id, no)
              join unnest(v_new) as n (no) on n.no = u.no) a;
    v_heads := nightowls._heads(_import_rows.org, agg_types, agg_ids);

    begin
      with inserted as (
        insert into nightowls.events as e
               (org_id, aggregate_type, aggregate_id, version, event_type, payload, metadata, event_id, created_at)
        select _import_rows.org, u.type, u.id, h.head + row_number() over (partition by u.type, u.id order by u.no), u.kind,
               coalesce(u.payload, '{}'), coalesce(nullif(u.metadata, 'null'), '{}'), u.event_id, u.at
          from unnest(_import_rows.types, _import_rows.ids, _import_rows.kinds, _import_rows.payloads, _import_rows.metadatas,
                      _import_rows.event_ids, _import_rows.times)
                 with ordinality as u (type, id, kind, payload, metadata, event_id, at, no)
          join unnest(v_new) as n (no) on n.no = u.no
          join unnest(agg_types, agg_ids, v_heads) as h (type, id, head) on h.type = u.type and h.id = u.id
         order by u.no
        returning e."position"
      )
      select array_agg(i."position") into positions from inserted i;
      return;
    exception when unique_violation then
      get stacked diagnostics v_key = constraint_name;
      if v_key not in ('events_aggregate_key', 'events_event_id_key', 'events_pkey') then
        raise;
      end if;
      -- Somebody appended to one of these aggregates and has committed: look again.
    end;
  end loop;
end;
$$;

revoke all on function nightowls._import_rows(uuid, text[], text[], text[], jsonb[], jsonb[], uuid[], timestamptz[]) from public;

create function nightowls.import_events(
  source     regclass,
  mapping    jsonb,
  max_events int default 5000,
  restart    boolean default false,
  org        uuid default null
)
  returns table (imported bigint, skipped bigint, more boolean)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_uuid   constant text := '^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$';
  v_org    uuid := nightowls.current_org(import_events.org);
  v_name   text;
  v_column text;
  v_type   text;
  v_place  text;
  v_fault  text;
  v_from   text;
  v_last   text;
  v_query  text;
  v_key    text;
  v_null   boolean;
  v_rows   record;
  v_space  uuid;
  v_ids    uuid[];
  v_done   record;
  v_limit  boolean;
  v_after  boolean[];
begin
  if import_events.source is null or import_events.mapping is null then
    raise exception 'source and mapping must not be null' using errcode = 'null_value_not_allowed';
  elsif jsonb_typeof(import_events.mapping) <> 'object' then
    raise exception 'mapping must be a JSON object' using errcode = 'invalid_parameter_value';
  elsif (import_events.max_events between 1 and 100000) is not true then
    raise exception 'max_events must be 1 to 100000' using errcode = 'invalid_parameter_value';
  elsif current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
    raise exception 'events cannot be imported at isolation level %', current_setting('transaction_isolation')
      using errcode = 'active_sql_transaction',
            detail = 'A snapshot taken before the call began would make it skip rows.', hint = 'Use read committed.';
  end if;
  select format('%I.%I', n.nspname, c.relname) into v_name
    from pg_class c join pg_namespace n on n.oid = c.relnamespace
   where c.oid = import_events.source and c.relkind in ('r', 'p', 'v', 'm', 'f') and n.nspname <> 'nightowls';
  if not found then
    raise exception '"%" cannot be imported', import_events.source
      using errcode = 'wrong_object_type', detail = 'A source is a table or view of the user''s.';
  end if;
  select k.key into v_key
    from jsonb_object_keys(import_events.mapping) as k (key)
   where k.key not in ('aggregate_type', 'aggregate_id', 'event_type', 'payload', 'metadata', 'event_id', 'created_at', 'order_by', 'condition')
   limit 1;
  if found then
    raise exception 'mapping is not valid at %', left(v_key, 64)
      using errcode = 'invalid_parameter_value',
            detail = 'A mapping has aggregate_type, aggregate_id and event_type, and can have payload, metadata, event_id, created_at, '
                     'order_by and condition.';
  end if;
  foreach v_key in array array['aggregate_type', 'aggregate_id', 'event_type'] loop
    if nightowls._mapped(import_events.mapping, v_key) is null then
      raise exception 'mapping does not say where % comes from', v_key using errcode = 'invalid_parameter_value';
    end if;
  end loop;
  if jsonb_typeof(import_events.mapping -> 'condition') not in ('string', 'null') then
    raise exception 'mapping is not valid at condition'
      using errcode = 'invalid_parameter_value', detail = 'A condition is an SQL expression over the columns of the source.';
  elsif jsonb_typeof(import_events.mapping -> 'order_by') not in ('string', 'null') then
    raise exception 'mapping is not valid at order_by'
      using errcode = 'invalid_parameter_value', detail = 'It names a column of the source that rises with each row and is unique.';
  end if;
  perform nightowls._refuse_no_org(v_org);

  v_column := import_events.mapping ->> 'order_by';
  if v_column is null then
    select a.attname into v_column
      from pg_index i join pg_attribute a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
     where i.indrelid = import_events.source and i.indisprimary and i.indnkeyatts = 1;
    if not found then
      raise exception 'mapping does not say which column % is ordered by', v_name
        using errcode = 'invalid_parameter_value',
              hint = 'Name one as order_by: unique, and rising with each row, such as the id. It is the primary key if that is one column.';
    end if;
  end if;
  select format_type(a.atttypid, a.atttypmod) into v_type
    from pg_attribute a
   where a.attrelid = import_events.source and a.attname = v_column and a.attnum > 0 and not a.attisdropped;
  if not found then
    raise exception 'column "%" of % does not exist', left(v_column, 64), v_name using errcode = 'undefined_column';
  end if;

  -- One import of a source at a time; who comes second goes on where the first has ended.
  insert into nightowls.imports (org_id, source, order_by) values (v_org, v_name, v_column) on conflict do nothing;
  select case when i.order_by = v_column and not coalesce(import_events.restart, false) then i.place end
    into v_place
    from nightowls.imports i
   where i.org_id = v_org and i.source = v_name
     for update;

  v_from := format(
    E'from %s s where (%s\n)%s', v_name, coalesce(import_events.mapping ->> 'condition', 'true'),
    case when v_place is not null then format(' and s.%I > %L::%s', v_column, v_place, v_type) end);
  -- As JSON writes it, so that the session's settings do not matter.
  execute format('select to_jsonb(x.key) #>> ''{}'' from (select s.%1$I as key %2$s order by s.%1$I limit $1) x order by x.key desc limit 1',
                 v_column, v_from)
     into v_last using import_events.max_events;
  if v_last is null then
    execute format(E'select true from %s s where (%s\n) and s.%I is null limit 1',
                   v_name, coalesce(import_events.mapping ->> 'condition', 'true'), v_column) into v_null;
    if v_null then
      raise exception 'column % of % is null in some rows, which have no place', v_column, v_name
        using errcode = 'null_value_not_allowed';
    end if;
    update nightowls.imports i set updated_at = clock_timestamp() where i.org_id = v_org and i.source = v_name;
    imported := 0;
    skipped := 0;
    more := false;
    return next;
    return;
  end if;
  perform nightowls._await_writers(import_events.source);

  v_from := v_from || format(' and s.%I <= %L::%s', v_column, v_last, v_type);
  v_query := format(
    'select to_jsonb(s.%1$I) #>> ''{}'' as key, %2$s as type, %3$s as id, %4$s as kind, %5$s as payload, %6$s as metadata, %7$s as event_id, '
    '%8$s as at %9$s',
    v_column,
    nightowls._mapped(import_events.mapping, 'aggregate_type'), nightowls._mapped(import_events.mapping, 'aggregate_id'),
    nightowls._mapped(import_events.mapping, 'event_type'),
    coalesce(nightowls._mapped(import_events.mapping, 'payload'), 'null::jsonb'),
    coalesce(nightowls._mapped(import_events.mapping, 'metadata'), 'null::jsonb'),
    coalesce(nightowls._mapped(import_events.mapping, 'event_id'), 'null::text'),
    coalesce(nightowls._mapped(import_events.mapping, 'created_at') || '::timestamptz', 'clock_timestamp()'),
    v_from);
  begin
    v_rows := nightowls._read_source(format('%s order by s.%I', v_query, v_column), import_events.max_events);
  exception when data_exception then
    perform nightowls._refuse_row(
      v_name, v_column, format('select to_jsonb(s.%1$I) #>> ''{}'' %2$s order by s.%1$I', v_column, v_from),
      replace(v_query, '%', '%%') || ' and %s', import_events.max_events);
    raise;
  end;
  v_last := v_rows.keys[cardinality(v_rows.keys)];

  select format('row with %s = %s of %s %s', v_column, left(u.key, 64), v_name, u.fault),
         u.fault ~ ' (long|large|deep)$'
    into v_fault, v_limit
    from (select x.no, x.key, case
                   when x.type is null then 'has no aggregate_type'
                   when x.id is null then 'has no aggregate_id'
                   when x.kind is null then 'has no event_type'
                   when x.type = '' or x.id = '' or x.kind = '' then 'has an empty aggregate_type, aggregate_id or event_type'
                   when starts_with(x.kind, 'nightowls.') then 'has an event_type that begins with nightowls.'
                   when octet_length(x.type) > 255 or octet_length(x.id) > 1024 or octet_length(x.kind) > 255
                     then 'has an aggregate_type, aggregate_id or event_type that is too long'
                   when x.at is null then 'has no created_at'
                   when x.key = lag(x.key) over (order by x.no) then format('is not alone with its %s', v_column)
                   else case nightowls._body_fault(coalesce(x.payload, '{}'), coalesce(nullif(x.metadata, 'null'), '{}'))
                          when 'large' then 'has a payload or metadata that is too large'
                          when 'deep' then 'has a payload or metadata that is too deep'
                          when 'metadata' then 'has metadata that is not an object'
                        end
                 end as fault
            from unnest(v_rows.keys, v_rows.types, v_rows.ids, v_rows.kinds, v_rows.payloads, v_rows.metadatas, v_rows.times)
                   with ordinality as x (key, type, id, kind, payload, metadata, at, no)) u
   where u.fault is not null
   order by u.no
   limit 1;
  if v_limit then
    raise exception '%', v_fault
      using errcode = 'program_limit_exceeded',
            detail = 'A type has at most 255 bytes, an aggregate_id 1024, payload and metadata 16 MB and 100 levels.';
  elsif v_fault is not null then
    raise exception '%', v_fault using errcode = 'invalid_parameter_value';
  end if;

  -- Known by the id that the source gives, if that is a uuid, else by the one made of it, or of the row's place.
  v_space := nightowls._uuid_v5('6e696768-746f-5c77-8c73-2e6576656e74', v_name);
  v_ids := array(
    select case when u.id ~ v_uuid then u.id::uuid else nightowls._uuid_v5(v_space, coalesce(u.id, u.key)) end
      from unnest(v_rows.event_ids, v_rows.keys) with ordinality as u (id, key, no)
     order by u.no);

  v_done := nightowls._import_rows(
    v_org, v_rows.types, v_rows.ids, v_rows.kinds, v_rows.payloads, v_rows.metadatas, v_ids, v_rows.times);
  -- What happened elsewhere is not sent to queues.
  if v_done.positions <> '{}' and nightowls._after_append(v_org, v_done.agg_types, v_done.agg_ids, null, null) then
    perform nightowls._call_handlers(v_org, v_done.agg_types, v_done.positions);
  end if;
  imported := cardinality(v_done.positions);
  skipped := cardinality(v_ids) - imported;
  update nightowls.imports i
     set order_by = v_column, place = v_last, imported = i.imported + import_events.imported, updated_at = clock_timestamp()
   where i.org_id = v_org and i.source = v_name;

  execute format(E'select array_agg(x.key = %2$L::%3$s) from (select s.%1$I as key from %4$s s where (%5$s\n) and s.%1$I >= %2$L::%3$s '
                 'order by s.%1$I limit 2) x',
                 v_column, v_last, v_type, v_name, coalesce(import_events.mapping ->> 'condition', 'true')) into v_after;
  if v_after[2] then
    raise exception 'row with % = % of % is not alone with its %', v_column, left(v_last, 64), v_name, v_column
      using errcode = 'invalid_parameter_value', hint = 'Name a unique column as order_by.';
  end if;
  more := cardinality(v_after) = 2;
  return next;
end;
$$;

comment on function nightowls.import_events(regclass, jsonb, int, boolean, uuid) is
  'Takes rows of an append-only table over as events, in the order of its id, and returns how many events it imported, how many it '
  'skipped because they were there, and whether there is more: call it again until there is not. It goes on where it '
  'was, and never takes a row twice. source: the table or view; mapping: an object that says where aggregate_type, aggregate_id, event_type, '
  'payload, metadata, event_id and created_at come from, each a column''s name, {"literal": any} or {"expression": "SQL"}, the two '
  'bodies also an array of columns; order_by names the unique, rising column of the order, by default the primary key; condition is an '
  'SQL expression that chooses rows (docs/moving.md); max_events: how many rows a call takes, 1 to 100000; restart: begin at the first row '
  'again and take what is not there; org: the tenant. created_at is kept; versions follow each aggregate''s; projections are kept. '
  'It waits for transactions that write to the source, at most lock_timeout or 10 seconds, for open appends to the same aggregates, and for '
  'another import of the source. Owner only: expressions are run, and handlers of projections called, as the caller. Raises 22023 for a '
  'mapping or a row that will not do, naming the row, or the code that reading it raises; 54000 for a row that is too long, too large or '
  'too deep; 22004 for a null; 42703 for a column that is not there; 42809 for a source that is no table; 55P03 if a writer does not '
  'end; 25001 above read committed; NW010 if there is no org.';

revoke all on function nightowls.import_events(regclass, jsonb, int, boolean, uuid) from public;

alter table nightowls.imports enable row level security;
alter table nightowls.imports force row level security;
create policy service_all on nightowls.imports
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));
