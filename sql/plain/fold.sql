-- The fold in SQL: the twin of sql/extension/fold.sql and src/fold, with the
-- same signatures, answers and errors, for servers that cannot load the library.
--
-- check_reducer() reads a reducer with care and says what is wrong with it. What
-- runs afterwards trusts it: _fold_step() compiles a list of ops when the first
-- event of its type comes by, keeps it, and runs it on each event.

-- One op, ready to run. Paths are lists of segments, and shown is the path as
-- errors show it. A source says where the value (or the key) comes from:
-- 'payload' and 'envelope' by the path in ref, 'literal' from here.
create type nightowls._fold_op as (
  op         text,
  shown      text,
  path       text[],
  depth      integer,
  source     text,
  value      jsonb,
  ref        text[],
  key_source text,
  key        text,
  key_ref    text[]
);

-- What an aggregate carries from row to row: the state, and the lists compiled so
-- far. ops[firsts[i] .. lasts[i]] belong to types[i]; a null type is "otherwise".
create type nightowls._fold_progress as (
  state   jsonb,
  reducer jsonb,
  initial jsonb,
  types   text[],
  firsts  integer[],
  lasts   integer[],
  ops     nightowls._fold_op[]
);

-- A JSON value's type with its article, as messages want it.
create function nightowls._fold_kind(value jsonb)
  returns text
  language sql
  immutable
  parallel safe
return case jsonb_typeof(_fold_kind.value)
  when 'null' then 'null'
  when 'array' then 'an array'
  when 'object' then 'an object'
  else 'a ' || jsonb_typeof(_fold_kind.value)
end;

revoke all on function nightowls._fold_kind(jsonb) from public;

-- Reads a path, given as a string or as an array. One that cannot be read has a
-- fault instead of segments; element is then the array's element at fault.
create function nightowls._fold_path(
  path         jsonb,
  out segments text[],
  out fault    text,
  out element  integer
)
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_segments text[] := '{}';
  v_rest     text;
  v_match    text[];
  v_index    integer;
begin
  case jsonb_typeof(_fold_path.path)
    when 'array' then
      for v_index in 0 .. jsonb_array_length(_fold_path.path) - 1 loop
        if jsonb_typeof(_fold_path.path -> v_index) <> 'string' then
          element := v_index;
          fault := 'Expected a string, found ' || nightowls._fold_kind(_fold_path.path -> v_index) || '.';
          return;
        elsif _fold_path.path ->> v_index = '' then
          element := v_index;
          fault := 'A segment of a path must not be empty.';
          return;
        end if;
        v_segments := v_segments || (_fold_path.path ->> v_index);
      end loop;
    when 'string' then
      v_rest := _fold_path.path #>> '{}';
      loop
        if starts_with(v_rest, '"') then
          v_match := regexp_match(v_rest, '^"((?:[^"\\]|\\["\\])*)"(?:$|(\.)(.*)$)');
          if v_match is null then
            fault := 'A quoted segment ends with a double quote, then comes a dot or nothing; inside it \" and \\ are the only escapes.';
            return;
          end if;
          v_match[1] := regexp_replace(v_match[1], '\\(.)', '\1', 'g');
        else
          v_match := regexp_match(v_rest, '^([^.]*)(?:$|(\.)(.*)$)');
          if strpos(v_match[1], '"') > 0 then
            fault := 'A double quote may only begin a segment, or be escaped inside a quoted one.';
            return;
          elsif v_match[1] <> btrim(v_match[1], E' \t\n\x0b\f\r') then
            fault := 'A segment that begins or ends with white space needs double quotes.';
            return;
          end if;
        end if;
        if v_match[1] = '' then
          fault := 'A segment of a path must not be empty.';
          return;
        end if;
        v_segments := v_segments || v_match[1];
        exit when v_match[2] is null;
        v_rest := v_match[3];
      end loop;
    else
      fault := 'Expected a string or an array of strings, found ' || nightowls._fold_kind(_fold_path.path) || '.';
      return;
  end case;

  if cardinality(v_segments) not between 1 and 32 then
    fault := 'A path has 1 to 32 segments, this one has ' || cardinality(v_segments) || '.';
    return;
  end if;
  segments := v_segments;
end;
$$;

revoke all on function nightowls._fold_path(jsonb) from public;

-- Refuses a reducer, naming the place in it.
create function nightowls._fold_refuse(place text, detail text, hint text default null)
  returns void
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if _fold_refuse.hint is null then
    raise exception 'reducer is not valid at %', _fold_refuse.place
      using errcode = 'invalid_parameter_value', detail = _fold_refuse.detail;
  end if;
  raise exception 'reducer is not valid at %', _fold_refuse.place
    using errcode = 'invalid_parameter_value', detail = _fold_refuse.detail, hint = _fold_refuse.hint;
end;
$$;

revoke all on function nightowls._fold_refuse(text, text, text) from public;

-- Checks the value or the key of an op. kinds are the JSON types it may have when
-- it is no reference, expected is how to say so.
create function nightowls._fold_check_value(value jsonb, place text, kinds text[], expected text)
  returns void
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_literal jsonb := _fold_check_value.value;
  v_text    text;
  v_path    record;
begin
  if jsonb_typeof(_fold_check_value.value) = 'string' then
    v_text := _fold_check_value.value #>> '{}';
    if v_text = '$' then
      return;
    elsif left(v_text, 2) in ('$.', '@.') then
      v_path := nightowls._fold_path(to_jsonb(substr(v_text, 3)));
      if v_path.fault is null and left(v_text, 1) = '@'
        and (v_path.segments[1] <> all (array['event_type', 'aggregate_type', 'aggregate_id', 'version', 'position',
                                              'event_id', 'created_at', 'metadata'])
             or v_path.segments[1] <> 'metadata' and cardinality(v_path.segments) > 1) then
        v_path.fault := 'The envelope has @.event_type, @.aggregate_type, @.aggregate_id, @.version, @.position, '
          '@.event_id, @.created_at and @.metadata; only @.metadata goes deeper.';
      end if;
      if v_path.fault is not null then
        perform nightowls._fold_refuse(_fold_check_value.place, v_path.fault,
          'To mean the string itself, write {"literal": "…"}.');
      end if;
      return;
    elsif left(v_text, 1) in ('$', '@') then
      perform nightowls._fold_refuse(_fold_check_value.place,
        'A string that begins with $ or @ is a reference: $ or $.path into the payload, @.field of the envelope.',
        'To mean the string itself, write {"literal": "…"}.');
    end if;
  elsif jsonb_typeof(_fold_check_value.value) = 'object' and _fold_check_value.value ? 'literal'
    and _fold_check_value.value - 'literal' = '{}' then
    v_literal := _fold_check_value.value -> 'literal';
  end if;

  if jsonb_typeof(v_literal) <> all (_fold_check_value.kinds) then
    perform nightowls._fold_refuse(_fold_check_value.place,
      'Expected ' || _fold_check_value.expected || ' or a reference, found ' || nightowls._fold_kind(v_literal) || '.');
  end if;
end;
$$;

revoke all on function nightowls._fold_check_value(jsonb, text, text[], text) from public;

-- Checks one list of ops.
create function nightowls._fold_check_ops(ops jsonb, place text)
  returns void
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_op       jsonb;
  v_name     text;
  v_place    text;
  v_keys     text[];
  v_required text[];
  v_key      text;
  v_path     record;
begin
  if jsonb_typeof(_fold_check_ops.ops) <> 'array' then
    perform nightowls._fold_refuse(_fold_check_ops.place,
      'Expected an array of ops, found ' || nightowls._fold_kind(_fold_check_ops.ops) || '.');
  end if;

  for v_index in 0 .. jsonb_array_length(_fold_check_ops.ops) - 1 loop
    v_op := _fold_check_ops.ops -> v_index;
    v_place := _fold_check_ops.place || '[' || v_index || ']';
    if jsonb_typeof(v_op) <> 'object' then
      perform nightowls._fold_refuse(v_place, 'Expected an object, found ' || nightowls._fold_kind(v_op) || '.');
    elsif not v_op ? 'op' then
      perform nightowls._fold_refuse(v_place, 'The key "op" is missing.');
    end if;

    v_name := case when jsonb_typeof(v_op -> 'op') = 'string' then v_op ->> 'op' end;
    case v_name
      when 'merge' then
        v_keys := array['op', 'path', 'value'];
        v_required := array['value'];
      when 'add' then
        v_keys := array['op', 'path', 'value'];
        v_required := array['path'];
      when 'set', 'min', 'max', 'push' then
        v_keys := array['op', 'path', 'value'];
        v_required := array['path', 'value'];
      when 'put' then
        v_keys := array['op', 'path', 'key', 'value'];
        v_required := array['path', 'key', 'value'];
      when 'drop' then
        v_keys := array['op', 'path', 'key'];
        v_required := array['path', 'key'];
      when 'remove' then
        v_keys := array['op', 'path'];
        v_required := array['path'];
      when 'tombstone' then
        v_keys := array['op'];
        v_required := '{}';
      else
        perform nightowls._fold_refuse(v_place || '.op',
          'Expected one of merge, set, add, min, max, push, put, drop, remove, tombstone.');
    end case;

    for v_key in select k.key from jsonb_object_keys(v_op) k (key) loop
      if v_key <> all (v_keys) then
        perform nightowls._fold_refuse(v_place || '.' || nightowls._fold_name(v_key),
          'The op "' || v_name || '" takes no such key, only ' || array_to_string(v_keys, ', ') || '.');
      end if;
    end loop;
    foreach v_key in array v_required loop
      if not v_op ? v_key then
        perform nightowls._fold_refuse(v_place, 'The op "' || v_name || '" needs the key "' || v_key || '".');
      end if;
    end loop;

    if v_op ? 'path' then
      v_path := nightowls._fold_path(v_op -> 'path');
      if v_path.fault is not null then
        perform nightowls._fold_refuse(v_place || '.path' || coalesce('[' || v_path.element || ']', ''), v_path.fault);
      end if;
    end if;
    if v_op ? 'value' then
      case v_name
        when 'add' then
          perform nightowls._fold_check_value(v_op -> 'value', v_place || '.value', array['number'], 'a number');
        when 'min', 'max' then
          perform nightowls._fold_check_value(v_op -> 'value', v_place || '.value', array['number', 'string'],
            'a number, a string');
        when 'merge' then
          perform nightowls._fold_check_value(v_op -> 'value', v_place || '.value', array['object'], 'an object');
        else
          perform nightowls._fold_check_value(v_op -> 'value', v_place || '.value',
            array['null', 'boolean', 'number', 'string', 'array', 'object'], 'any value');
      end case;
    end if;
    if v_op ? 'key' then
      perform nightowls._fold_check_value(v_op -> 'key', v_place || '.key', array['string', 'number', 'boolean'],
        'a string, a number, a boolean');
    end if;
  end loop;
end;
$$;

revoke all on function nightowls._fold_check_ops(jsonb, text) from public;

-- A key as a place shows it: quoted unless it is plain.
create function nightowls._fold_name(key text)
  returns text
  language sql
  immutable
  parallel safe
return case
  when _fold_name.key collate "C" ~ '^[A-Za-z0-9_-]+$' then _fold_name.key
  else '"' || replace(replace(_fold_name.key, '\', '\\'), '"', '\"') || '"'
end;

revoke all on function nightowls._fold_name(text) from public;

create function nightowls.check_reducer(reducer jsonb)
  returns void
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_key text;
begin
  if check_reducer.reducer is null then
    raise exception 'reducer must not be null' using errcode = 'null_value_not_allowed';
  elsif jsonb_path_exists(check_reducer.reducer, 'strict $.**{101}') then
    raise exception 'reducer is nested too deeply'
      using errcode = 'program_limit_exceeded', detail = 'At most 100 levels are allowed.';
  elsif jsonb_typeof(check_reducer.reducer) <> 'object' then
    perform nightowls._fold_refuse('the root',
      'Expected an object, found ' || nightowls._fold_kind(check_reducer.reducer) || '.');
  end if;

  for v_key in select k.key from jsonb_object_keys(check_reducer.reducer) k (key) loop
    if v_key not in ('initial', 'on', 'otherwise') then
      perform nightowls._fold_refuse(nightowls._fold_name(v_key), 'A reducer has the keys initial, on and otherwise.');
    end if;
  end loop;
  foreach v_key in array array['initial', 'on'] loop
    if jsonb_typeof(check_reducer.reducer -> v_key) <> 'object' then
      perform nightowls._fold_refuse(v_key,
        'Expected an object, found ' || nightowls._fold_kind(check_reducer.reducer -> v_key) || '.');
    end if;
  end loop;

  for v_key in select k.key from jsonb_object_keys(check_reducer.reducer -> 'on') k (key) loop
    if v_key = 'nightowls.erased' then
      perform nightowls._fold_refuse('on.' || nightowls._fold_name(v_key), 'An erased event ends the state, always.');
    end if;
    perform nightowls._fold_check_ops(check_reducer.reducer -> 'on' -> v_key, 'on.' || nightowls._fold_name(v_key));
  end loop;
  if check_reducer.reducer ? 'otherwise' then
    perform nightowls._fold_check_ops(check_reducer.reducer -> 'otherwise', 'otherwise');
  end if;
end;
$$;

comment on function nightowls.check_reducer(jsonb) is
  'Accepts a reducer, {"initial": object, "on": {event_type: [op, …]}, "otherwise": [op, …]}, or refuses it, '
  'naming the place at fault. Returns nothing; neither waits nor locks. '
  'Raises 22023 if the reducer is not valid, 22004 if it is null, 54000 if it is nested deeper than 100 levels.';

revoke all on function nightowls.check_reducer(jsonb) from public;

-- Where the value or the key of a checked op comes from.
create function nightowls._fold_source(
  value       jsonb,
  out source  text,
  out literal jsonb,
  out ref     text[]
)
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_text text;
begin
  source := 'literal';
  literal := _fold_source.value;
  if jsonb_typeof(_fold_source.value) = 'string' then
    v_text := _fold_source.value #>> '{}';
    if left(v_text, 1) not in ('$', '@') then
      return;
    end if;
    source := case when left(v_text, 1) = '$' then 'payload' else 'envelope' end;
    if v_text = '$' then
      ref := '{}';
    elsif strpos(v_text, '"') = 0 then
      ref := string_to_array(substr(v_text, 3), '.');
    else
      ref := (nightowls._fold_path(to_jsonb(substr(v_text, 3)))).segments;
    end if;
  elsif jsonb_typeof(_fold_source.value) = 'object' and _fold_source.value ? 'literal'
    and _fold_source.value - 'literal' = '{}' then
    literal := _fold_source.value -> 'literal';
  end if;
end;
$$;

revoke all on function nightowls._fold_source(jsonb) from public;

-- Makes a checked list of ops ready to run.
create function nightowls._fold_compile(list jsonb)
  returns nightowls._fold_op[]
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_json   jsonb;
  v_op     nightowls._fold_op;
  v_ops    nightowls._fold_op[] := '{}';
  v_source record;
begin
  for v_index in 0 .. jsonb_array_length(_fold_compile.list) - 1 loop
    v_json := _fold_compile.list -> v_index;
    v_op := null;
    v_op.op := v_json ->> 'op';

    if not v_json ? 'path' then
      v_op.path := '{}';
    elsif jsonb_typeof(v_json -> 'path') = 'string' and strpos(v_json ->> 'path', '"') = 0 then
      v_op.path := string_to_array(v_json ->> 'path', '.');
    else
      v_op.path := (nightowls._fold_path(v_json -> 'path')).segments;
    end if;
    v_op.depth := cardinality(v_op.path);
    v_op.shown := array_to_string(v_op.path, '.');

    if v_json ? 'value' then
      v_source := nightowls._fold_source(v_json -> 'value');
      v_op.source := v_source.source;
      v_op.value := v_source.literal;
      v_op.ref := v_source.ref;
    elsif v_op.op = 'add' then
      v_op.source := 'literal';
      v_op.value := '1';
    end if;

    if v_json ? 'key' then
      v_source := nightowls._fold_source(v_json -> 'key');
      v_op.key_source := v_source.source;
      v_op.key_ref := v_source.ref;
      if v_source.source = 'literal' then
        v_op.key := v_source.literal #>> '{}';
      end if;
    end if;

    v_ops := v_ops || v_op;
  end loop;
  return v_ops;
end;
$$;

revoke all on function nightowls._fold_compile(jsonb) from public;

-- What a reference reads from the envelope; null where there is nothing. Not
-- immutable only because to_char() is not: it is inlined where it is called.
create function nightowls._fold_envelope(
  ref            text[],
  event_type     text,
  aggregate_type text,
  aggregate_id   text,
  version        bigint,
  "position"     bigint,
  event_id       uuid,
  created_at     timestamptz,
  metadata       jsonb
)
  returns jsonb
  language sql
  stable
  parallel safe
return case _fold_envelope.ref[1]
  when 'event_type' then to_jsonb(_fold_envelope.event_type)
  when 'aggregate_type' then to_jsonb(_fold_envelope.aggregate_type)
  when 'aggregate_id' then to_jsonb(_fold_envelope.aggregate_id)
  when 'version' then to_jsonb(_fold_envelope.version)
  when 'position' then to_jsonb(_fold_envelope."position")
  when 'event_id' then coalesce(to_jsonb(_fold_envelope.event_id), 'null')
  when 'created_at' then
    to_jsonb(to_char(_fold_envelope.created_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'))
  else nullif(_fold_envelope.metadata, 'null') #> _fold_envelope.ref[2:]
end;

revoke all on function nightowls._fold_envelope(text[], text, text, text, bigint, bigint, uuid, timestamptz, jsonb)
  from public;

-- Refuses an event whose op does not fit the state.
create function nightowls._fold_fail(
  op         nightowls._fold_op,
  reason     text,
  event_type text,
  version    bigint
)
  returns void
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  raise exception 'cannot % at %: %', (_fold_fail.op).op,
    case when (_fold_fail.op).depth = 0 then 'the root' else '"' || (_fold_fail.op).shown || '"' end,
    _fold_fail.reason
    using errcode = 'invalid_parameter_value',
      detail = 'Event "' || _fold_fail.event_type || '"' || coalesce(', version ' || _fold_fail.version, '') || '.';
end;
$$;

revoke all on function nightowls._fold_fail(nightowls._fold_op, text, text, bigint) from public;

-- RFC 7396: a null removes, an object merges, anything else replaces.
create function nightowls._fold_merge(target jsonb, patch jsonb)
  returns jsonb
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_result jsonb := _fold_merge.target;
  v_member record;
begin
  if not jsonb_path_exists(_fold_merge.patch, 'strict $.* ? (@ == null || @.type() == "object")') then
    return _fold_merge.target || _fold_merge.patch;
  end if;

  for v_member in select m.key, m.value from jsonb_each(_fold_merge.patch) m loop
    case jsonb_typeof(v_member.value)
      when 'null' then
        v_result := v_result - v_member.key;
      when 'object' then
        v_result := jsonb_set(v_result, array[v_member.key], nightowls._fold_merge(
          case when jsonb_typeof(v_result -> v_member.key) = 'object' then v_result -> v_member.key else '{}' end,
          v_member.value));
      else
        v_result := jsonb_set(v_result, array[v_member.key], v_member.value);
    end case;
  end loop;
  return v_result;
end;
$$;

revoke all on function nightowls._fold_merge(jsonb, jsonb) from public;

-- Folds one event. The first call starts the progress at base, where null is a
-- tombstone. It runs once an event and so sets no search_path of its own: all who
-- call it have set theirs.
create function nightowls._fold_step(
  progress       nightowls._fold_progress,
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
  returns nightowls._fold_progress
  language plpgsql
  immutable
  parallel safe
as $$
#variable_conflict use_column
declare
  v_state jsonb;
  v_type  text;
  v_list  integer;
  v_ops   nightowls._fold_op[];
  v_op    nightowls._fold_op;
  v_path  text[];
  v_value jsonb;
  v_key   jsonb;
  v_old   jsonb;
  v_kind  text;
begin
  if _fold_step.progress.types is null then
    _fold_step.progress.state := _fold_step.base;
    _fold_step.progress.reducer := _fold_step.reducer;
    _fold_step.progress.initial := coalesce(_fold_step.reducer -> 'initial', '{}');
    _fold_step.progress.types := '{}';
    _fold_step.progress.ops := '{}';
  end if;
  if _fold_step.event_type = 'nightowls.erased' then
    _fold_step.progress.state := null;
    return _fold_step.progress;
  end if;

  v_list := array_position(_fold_step.progress.types, _fold_step.event_type);
  if v_list is null then
    v_type := case when _fold_step.reducer -> 'on' ? _fold_step.event_type then _fold_step.event_type end;
    v_list := array_position(_fold_step.progress.types, v_type);
  end if;
  if v_list is null then
    v_list := cardinality(_fold_step.progress.types) + 1;
    v_ops := nightowls._fold_compile(
      coalesce(_fold_step.reducer -> 'on' -> v_type, _fold_step.reducer -> 'otherwise', '[]'));
    _fold_step.progress.types[v_list] := v_type;
    _fold_step.progress.firsts[v_list] := cardinality(_fold_step.progress.ops) + 1;
    _fold_step.progress.ops := _fold_step.progress.ops || v_ops;
    _fold_step.progress.lasts[v_list] := cardinality(_fold_step.progress.ops);
  end if;

  v_state := _fold_step.progress.state;
  for v_index in _fold_step.progress.firsts[v_list] .. _fold_step.progress.lasts[v_list] loop
    v_op := _fold_step.progress.ops[v_index];

    if v_state is null then
      continue when v_op.op = 'tombstone';
      v_state := _fold_step.progress.initial;
    end if;

    if v_op.source = 'payload' then
      v_value := _fold_step.payload #> v_op.ref;
      continue when v_value is null;
    elsif v_op.source = 'literal' then
      v_value := v_op.value;
    elsif v_op.source = 'envelope' then
      v_value := nightowls._fold_envelope(v_op.ref, _fold_step.event_type, _fold_step.aggregate_type,
        _fold_step.aggregate_id, _fold_step.version, _fold_step."position", _fold_step.event_id, _fold_step.created_at,
        _fold_step.metadata);
      continue when v_value is null;
    elsif v_op.op = 'tombstone' then
      v_state := null;
      continue;
    end if;

    -- The most frequent ops, short.
    if v_op.depth = 1 then
      if v_op.op = 'set' then
        v_state := jsonb_set(v_state, v_op.path, v_value);
        continue;
      elsif v_op.op = 'add' then
        v_old := v_state -> v_op.shown;
        if jsonb_typeof(v_old) = 'number' and jsonb_typeof(v_value) = 'number' then
          v_state := jsonb_set(v_state, v_op.path, to_jsonb(v_old::numeric + v_value::numeric));
          continue;
        end if;
      end if;
    end if;

    v_path := v_op.path;
    if v_op.key_source is not null then
      if v_op.key_source = 'literal' then
        v_path := v_path || v_op.key;
      else
        v_key := case v_op.key_source when 'payload' then _fold_step.payload #> v_op.key_ref
          else nightowls._fold_envelope(v_op.key_ref, _fold_step.event_type, _fold_step.aggregate_type,
            _fold_step.aggregate_id, _fold_step.version, _fold_step."position", _fold_step.event_id,
            _fold_step.created_at, _fold_step.metadata) end;
        v_kind := jsonb_typeof(v_key);
        continue when v_kind is null or v_kind = 'null';
        if v_kind in ('object', 'array') then
          perform nightowls._fold_fail(v_op, 'the key is ' || nightowls._fold_kind(v_key), _fold_step.event_type,
            _fold_step.version);
        end if;
        v_path := v_path || (v_key #>> '{}');
      end if;
    end if;

    -- A value of the wrong type fails before the state is looked at.
    if v_op.op in ('add', 'min', 'max', 'merge') then
      v_kind := jsonb_typeof(v_value);
      if v_op.op = 'merge' then
        if v_kind <> 'object' then
          perform nightowls._fold_fail(v_op, 'the value is ' || nightowls._fold_kind(v_value), _fold_step.event_type,
            _fold_step.version);
        end if;
      elsif v_kind <> 'number' then
        continue when v_kind = 'null';
        if v_op.op = 'add' or v_kind <> 'string' then
          perform nightowls._fold_fail(v_op, 'the value is ' || nightowls._fold_kind(v_value), _fold_step.event_type,
            _fold_step.version);
        end if;
      end if;
    end if;

    -- What is at the path now. "->" by text sees objects only, unlike "#>".
    v_old := v_state;
    for v_level in 1 .. cardinality(v_path) loop
      v_old := v_old -> v_path[v_level];
      exit when v_old is null;
    end loop;

    if v_op.op in ('remove', 'drop') then
      if v_old is not null then
        v_state := v_state #- v_path;
      end if;
      continue;
    end if;

    if v_old is null then
      -- Make the objects on the way.
      v_old := v_state;
      for v_level in 1 .. cardinality(v_path) - 1 loop
        v_old := v_old -> v_path[v_level];
        v_kind := jsonb_typeof(v_old);
        if v_kind is null or v_kind = 'null' then
          v_old := '{}';
          v_state := jsonb_set(v_state, v_path[:v_level], v_old);
        elsif v_kind <> 'object' then
          perform nightowls._fold_fail(v_op, 'the state holds ' || nightowls._fold_kind(v_old)
            || case when v_level = v_op.depth then ' there'
                 else ' at "' || array_to_string(v_path[:v_level], '.') || '"' end,
            _fold_step.event_type, _fold_step.version);
        end if;
      end loop;
      v_old := null;
    elsif jsonb_typeof(v_old) = 'null' then
      v_old := null;
    end if;

    case v_op.op
      when 'set', 'put' then
        null;
      when 'add' then
        if jsonb_typeof(v_old) = 'number' then
          v_value := to_jsonb(v_old::numeric + v_value::numeric);
        elsif v_old is not null then
          perform nightowls._fold_fail(v_op, 'the state holds ' || nightowls._fold_kind(v_old) || ' there',
            _fold_step.event_type, _fold_step.version);
        end if;
      when 'push' then
        if v_old is null then
          v_value := jsonb_build_array(v_value);
        elsif jsonb_typeof(v_old) = 'array' then
          v_value := v_old || jsonb_build_array(v_value);
        else
          perform nightowls._fold_fail(v_op, 'the state holds ' || nightowls._fold_kind(v_old) || ' there',
            _fold_step.event_type, _fold_step.version);
        end if;
      when 'merge' then
        if v_old is not null and jsonb_typeof(v_old) <> 'object' then
          perform nightowls._fold_fail(v_op, 'the state holds ' || nightowls._fold_kind(v_old) || ' there',
            _fold_step.event_type, _fold_step.version);
        end if;
        v_value := nightowls._fold_merge(coalesce(v_old, '{}'), v_value);
        if v_op.depth = 0 then
          v_state := v_value;
          continue;
        end if;
      else
        if v_old is null then
          null;
        elsif jsonb_typeof(v_old) not in ('number', 'string') then
          perform nightowls._fold_fail(v_op, 'the state holds ' || nightowls._fold_kind(v_old) || ' there',
            _fold_step.event_type, _fold_step.version);
        elsif jsonb_typeof(v_old) <> v_kind then
          perform nightowls._fold_fail(v_op, 'the state holds ' || nightowls._fold_kind(v_old)
            || ' there, the value is ' || nightowls._fold_kind(v_value), _fold_step.event_type, _fold_step.version);
        elsif v_kind = 'number' then
          continue when case v_op.op when 'min' then v_old::numeric <= v_value::numeric
            else v_old::numeric >= v_value::numeric end;
        else
          continue when case v_op.op when 'min' then (v_old #>> '{}') collate "C" <= (v_value #>> '{}')
            else (v_old #>> '{}') collate "C" >= (v_value #>> '{}') end;
        end if;
    end case;

    v_state := jsonb_set(v_state, v_path, v_value);
  end loop;

  _fold_step.progress.state := v_state;
  return _fold_step.progress;
end;
$$;

revoke all on function nightowls._fold_step(
  nightowls._fold_progress, jsonb, jsonb, text, text, text, bigint, bigint, uuid, timestamptz, jsonb, jsonb) from public;

create function nightowls._fold_final(progress nightowls._fold_progress)
  returns jsonb
  language sql
  immutable
  strict
  parallel safe
return (_fold_final.progress).state;

revoke all on function nightowls._fold_final(nightowls._fold_progress) from public;

-- Folds one row, given column by column, into base. It runs once an append and so sets no search_path of its own: all who
-- call it have set theirs.
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
  language plpgsql
  immutable
  parallel safe
as $$
#variable_conflict use_column
declare
  v_list  jsonb := coalesce(_fold_row.reducer -> 'on' -> _fold_row.event_type, _fold_row.reducer -> 'otherwise', '[]');
  v_state jsonb := _fold_row.base;
  v_op    jsonb;
  v_name  text;
  v_path  text;
  v_text  text;
  v_value jsonb;
  v_old   jsonb;
begin
  if _fold_row.event_type = 'nightowls.erased' then
    return null;
  end if;

  -- Simple ops are done here, one by one: to compile a list, as _fold_step() does, takes longer than to run it once. They set or
  -- compare a key of the state itself and take their value from the payload, or have it. At the first op that is not simple, or
  -- does not fit the state, _fold_step() does it all from the beginning.
  for v_index in 0 .. jsonb_array_length(v_list) - 1 loop
    v_op := v_list -> v_index;
    v_name := v_op ->> 'op';
    v_path := v_op ->> 'path';
    v_text := v_op ->> 'value';
    if v_state is null or v_name <> all (array['set', 'add', 'min', 'max']) or v_path like any (array['%.%', '%"%', '[%'])
      or v_text like any (array['@%', '$', '$.%.%', '%"%', '{%', '[%']) then
      v_list := null;
      exit;
    end if;
    v_value := case when v_text like '$.%' then _fold_row.payload #> array[substr(v_text, 3)]
      else coalesce(v_op -> 'value', '1') end;
    continue when v_value is null;
    if v_name <> 'set' then
      v_old := nullif(v_state -> v_path, 'null');
      if jsonb_typeof(v_value) <> 'number' or jsonb_typeof(v_old) <> 'number' then
        v_list := null;
        exit;
      elsif v_old is not null then
        v_value := case v_name
          when 'add' then to_jsonb(v_old::numeric + v_value::numeric)
          when 'max' then case when v_old::numeric >= v_value::numeric then v_old else v_value end
          else case when v_old::numeric <= v_value::numeric then v_old else v_value end
        end;
      end if;
    end if;
    v_state := jsonb_set(v_state, array[v_path], v_value);
  end loop;
  if v_list is not null then
    return v_state;
  end if;
  return (nightowls._fold_step(null, _fold_row.reducer, _fold_row.base, _fold_row.event_type, _fold_row.aggregate_type,
    _fold_row.aggregate_id, _fold_row.version, _fold_row."position", _fold_row.event_id, _fold_row.created_at,
    _fold_row.payload, _fold_row.metadata)).state;
end;
$$;

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
  sfunc = nightowls._fold_step,
  stype = nightowls._fold_progress,
  finalfunc = nightowls._fold_final,
  parallel = safe
);

revoke all on function nightowls._fold_rows(
  jsonb, jsonb, text, text, text, bigint, bigint, uuid, timestamptz, jsonb, jsonb) from public;

create function nightowls._fold_event_step(
  progress nightowls._fold_progress,
  reducer  jsonb,
  event    nightowls.events
)
  returns nightowls._fold_progress
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if (_fold_event_step.event).event_type is null then
    return _fold_event_step.progress;
  elsif (_fold_event_step.progress).reducer is null then
    perform nightowls.check_reducer(_fold_event_step.reducer);
  elsif not record_image_eq(row(_fold_event_step.reducer), row((_fold_event_step.progress).reducer))
    and _fold_event_step.reducer is distinct from (_fold_event_step.progress).reducer then
    raise exception 'reducer must be the same for every event' using errcode = 'invalid_parameter_value';
  end if;

  return nightowls._fold_step(_fold_event_step.progress, _fold_event_step.reducer,
    coalesce(_fold_event_step.reducer -> 'initial', '{}'),
    (_fold_event_step.event).event_type, (_fold_event_step.event).aggregate_type, (_fold_event_step.event).aggregate_id,
    (_fold_event_step.event).version, (_fold_event_step.event)."position", (_fold_event_step.event).event_id,
    (_fold_event_step.event).created_at, (_fold_event_step.event).payload, (_fold_event_step.event).metadata);
end;
$$;

revoke all on function nightowls._fold_event_step(nightowls._fold_progress, jsonb, nightowls.events) from public;

create aggregate nightowls.fold_events(reducer jsonb, event nightowls.events) (
  sfunc = nightowls._fold_event_step,
  stype = nightowls._fold_progress,
  finalfunc = nightowls._fold_final,
  parallel = safe
);

comment on aggregate nightowls.fold_events(jsonb, nightowls.events) is
  'Folds events into state: fold_events(reducer, e order by e.version). Starts from the reducer''s "initial"; '
  'returns null for no events, and after a tombstone. Null events are skipped. Neither waits nor locks. '
  'Raises 22023 if the reducer is not valid or changes, or an event does not fit the state; 22003 if a number overflows; '
  '22004 if the reducer is null; 54000 if something is nested too deeply.';

revoke all on function nightowls.fold_events(jsonb, nightowls.events) from public;

-- Refuses an event of a dry run, naming the place in it.
create function nightowls._fold_refuse_event(place text, detail text)
  returns void
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  raise exception 'event is not valid at %', _fold_refuse_event.place
    using errcode = 'invalid_parameter_value', detail = _fold_refuse_event.detail;
end;
$$;

revoke all on function nightowls._fold_refuse_event(text, text) from public;

create function nightowls.fold_state(reducer jsonb, state jsonb, events jsonb)
  returns jsonb
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_base     jsonb := coalesce(fold_state.state, fold_state.reducer -> 'initial', '{}');
  v_progress nightowls._fold_progress;
  v_event    jsonb;
  v_place    text;
  v_key      text;
  v_kind     text;
  v_match    text[];
begin
  perform nightowls.check_reducer(fold_state.reducer);
  if fold_state.events is null then
    raise exception 'events must not be null' using errcode = 'null_value_not_allowed';
  elsif jsonb_path_exists(fold_state.state, 'strict $.**{201}') then
    raise exception 'state is nested too deeply'
      using errcode = 'program_limit_exceeded', detail = 'At most 200 levels are allowed.';
  elsif jsonb_typeof(fold_state.state) <> 'object' then
    raise exception 'state must be a JSON object' using errcode = 'invalid_parameter_value',
      detail = 'Found ' || nightowls._fold_kind(fold_state.state) || '.';
  elsif jsonb_path_exists(fold_state.events, 'strict $.**{201}') then
    raise exception 'events is nested too deeply'
      using errcode = 'program_limit_exceeded', detail = 'At most 200 levels are allowed.';
  elsif jsonb_typeof(fold_state.events) <> 'array' then
    raise exception 'events must be a JSON array' using errcode = 'invalid_parameter_value',
      detail = 'Found ' || nightowls._fold_kind(fold_state.events) || '.';
  end if;

  for v_index in 0 .. jsonb_array_length(fold_state.events) - 1 loop
    v_event := fold_state.events -> v_index;
    v_place := 'events[' || v_index || ']';
    if jsonb_typeof(v_event) <> 'object' then
      perform nightowls._fold_refuse_event(v_place, 'Expected an object, found ' || nightowls._fold_kind(v_event) || '.');
    elsif not v_event ? 'event_type' then
      perform nightowls._fold_refuse_event(v_place, 'The key "event_type" is missing.');
    elsif jsonb_typeof(v_event -> 'event_type') <> 'string' then
      perform nightowls._fold_refuse_event(v_place || '.event_type',
        'Expected a string, found ' || nightowls._fold_kind(v_event -> 'event_type') || '.');
    end if;
    foreach v_key in array array['aggregate_type', 'aggregate_id', 'version', 'position', 'event_id', 'created_at'] loop
      v_kind := jsonb_typeof(v_event -> v_key);
      continue when v_kind is null or v_kind = 'null';
      if v_key in ('version', 'position') then
        if v_kind <> 'number' or v_event ->> v_key !~ '^-?[0-9]{1,18}$' then
          perform nightowls._fold_refuse_event(v_place || '.' || v_key, 'Expected a whole number of at most 18 digits.');
        end if;
      elsif v_kind <> 'string' then
        perform nightowls._fold_refuse_event(v_place || '.' || v_key,
          'Expected a string, found ' || nightowls._fold_kind(v_event -> v_key) || '.');
      elsif v_key = 'event_id' and v_event ->> v_key
        !~ '^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}$' then
        perform nightowls._fold_refuse_event(v_place || '.event_id', 'Expected a UUID.');
      elsif v_key = 'created_at' then
        v_match := regexp_match(v_event ->> v_key,
          '^((?!0000)[0-9]{4})-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])[T ]([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]'
          '(?:\.[0-9]{1,6})?(?:Z|[+-](?:0[0-9]|1[0-5])(?::[0-5][0-9])?)$');
        if v_match is null or v_match[3]::integer > extract(day from
          make_date(v_match[1]::integer, v_match[2]::integer, 1) + interval '1 month' - interval '1 day') then
          perform nightowls._fold_refuse_event(v_place || '.created_at',
            'Expected a time with its zone, such as "2030-01-31T12:00:00Z".');
        end if;
      end if;
    end loop;

    v_progress := nightowls._fold_step(v_progress, fold_state.reducer, v_base, v_event ->> 'event_type',
      v_event ->> 'aggregate_type', v_event ->> 'aggregate_id', (v_event ->> 'version')::bigint,
      (v_event ->> 'position')::bigint, (v_event ->> 'event_id')::uuid, (v_event ->> 'created_at')::timestamptz,
      coalesce(v_event -> 'payload', '{}'), v_event -> 'metadata');
  end loop;

  return case when v_progress.reducer is null then v_base else v_progress.state end;
end;
$$;

comment on function nightowls.fold_state(jsonb, jsonb, jsonb) is
  'Folds an array of events into a state and returns the new state: a dry run that reads and writes no table. '
  'An event is an object with event_type and, as wanted, payload, metadata, aggregate_type, aggregate_id, version, '
  'position, event_id and created_at; a null state starts from the reducer''s "initial". Neither waits nor locks. '
  'Raises 22023 if an argument is not valid or an event does not fit the state; 22003 if a number overflows; '
  '22004 if reducer or events is null; 54000 if something is nested too deeply.';

revoke all on function nightowls.fold_state(jsonb, jsonb, jsonb) from public;

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
