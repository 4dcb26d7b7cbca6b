-- Embedding sources: which column of which table of a user's holds the vectors of which text.
--
-- A row is pending while its target is null. Triggers on the table null the target when what the input is made of changes, and note the
-- keys of rows that are pending; rows that were there before are found by a pass over the table, slice by slice. What is a user's
-- (expressions, the table's own triggers) runs as the table's owner: _run_as_owner().

create table nightowls.embedding_sources (
  org_id           uuid        not null,
  name             text        collate "C" not null,
  source_table     text        collate "C" not null,
  key_column       text        not null,
  key_type         text        not null,
  input_expression text        not null,
  input_columns    text[]      not null,
  target_column    text        not null,
  target_type      text        not null,
  model_column     text,
  by_row           boolean     not null,
  endpoint         text,
  shape            text        not null,
  model            text        not null,
  dimensions       int         not null,
  max_chars        int         not null,
  chunk_chars      int,
  overlap          int         not null,
  batch_size       int         not null,
  max_attempts     int         not null,
  options          jsonb       not null,
  paused           boolean     not null default false,
  trigger_name     text        not null,
  created_at       timestamptz not null default clock_timestamp(),
  constraint embedding_sources_pkey primary key (org_id, name)
);

comment on table nightowls.embedding_sources is 'Which text of which table is embedded, by which model, and where the vectors go: create_embedding_source().';
comment on column nightowls.embedding_sources.org_id is 'The tenant.';
comment on column nightowls.embedding_sources.name is 'The source''s name.';
comment on column nightowls.embedding_sources.source_table is 'The table, by its qualified name.';
comment on column nightowls.embedding_sources.key_column is 'The column that names a row: unique and never null.';
comment on column nightowls.embedding_sources.key_type is 'Its type.';
comment on column nightowls.embedding_sources.input_expression is 'SQL over the row: the text.';
comment on column nightowls.embedding_sources.input_columns is 'The columns that the text depends on.';
comment on column nightowls.embedding_sources.target_column is 'The column that holds the vector; null: pending.';
comment on column nightowls.embedding_sources.target_type is 'Its type: real[], double precision[], or pgvector''s vector or halfvec.';
comment on column nightowls.embedding_sources.model_column is 'The column that is told the model''s name with each vector, if any.';
comment on column nightowls.embedding_sources.by_row is 'The table has a column org_id: the source takes the rows of its own org only.';
comment on column nightowls.embedding_sources.endpoint is 'The endpoint that makes vectors; null: workers outside do.';
comment on column nightowls.embedding_sources.shape is 'How the endpoint is asked: openai, ollama or edge.';
comment on column nightowls.embedding_sources.model is 'The model''s name.';
comment on column nightowls.embedding_sources.dimensions is 'How long stored vectors are; shorter ones are padded with zeros.';
comment on column nightowls.embedding_sources.max_chars is 'How much of the text is embedded, in UTF-16 units.';
comment on column nightowls.embedding_sources.chunk_chars is 'How long a chunk is, in UTF-16 units; null: the text is one.';
comment on column nightowls.embedding_sources.overlap is 'How many units a chunk has in common with the one before.';
comment on column nightowls.embedding_sources.batch_size is 'How many texts one request holds at most.';
comment on column nightowls.embedding_sources.max_attempts is 'After how many attempts a row is given up.';
comment on column nightowls.embedding_sources.options is 'What else a request''s body says.';
comment on column nightowls.embedding_sources.paused is 'Whether nothing is claimed.';
comment on column nightowls.embedding_sources.trigger_name is 'What the names of its triggers begin with.';
comment on column nightowls.embedding_sources.created_at is 'When it was made.';

-- What changes about a source. scan: null, or what a pass over the table is after: pending rows, or all.
create table nightowls._embedding_states (
  org_id     uuid        not null,
  source     text        collate "C" not null,
  scan       text,
  after_key  text,
  failures   int         not null default 0,
  retry_at   timestamptz,
  last_error text,
  failed_at  timestamptz,
  constraint _embedding_states_pkey primary key (org_id, source),
  constraint _embedding_states_scan_check check (scan in ('pending', 'all'))
) with (fillfactor = 50);

-- One row for each time that a row became pending. A writer inserts and never waits; who claims a key removes the others.
-- due_at: when it may be claimed; while it is claimed, when the lease ends; infinity: given up.
create table nightowls._embedding_pending (
  org_id     uuid        not null,
  source     text        collate "C" not null,
  pending_id bigint      not null generated always as identity,
  key        text        collate "C" not null,
  due_at     timestamptz not null,
  claim      uuid,
  attempts   int         not null default 0,
  alone      boolean     not null default false,
  input_hash text,
  chunks     int,
  error      text,
  constraint _embedding_pending_pkey primary key (org_id, source, pending_id)
) with (fillfactor = 70);

create index _embedding_pending_due_idx on nightowls._embedding_pending (org_id, source, due_at);
create index _embedding_pending_key_idx on nightowls._embedding_pending (org_id, source, key);

-- The line begins here: nothing is due before it. Insert-only, the greatest counts.
create table nightowls._embedding_marks (
  org_id uuid        not null,
  source text        collate "C" not null,
  mark   timestamptz not null,
  constraint _embedding_marks_pkey primary key (org_id, source, mark)
);

create table nightowls.embedding_chunks (
  org_id     uuid        not null,
  source     text        collate "C" not null,
  key        text        collate "C" not null,
  chunk      int         not null,
  content    text        not null,
  embedding  real[]      not null,
  model      text        not null,
  created_at timestamptz not null default clock_timestamp(),
  constraint embedding_chunks_pkey primary key (org_id, source, key, chunk)
);

comment on table nightowls.embedding_chunks is
  'The chunks of texts that are embedded in pieces, with their vectors. They go with their row and with its text; the new ones come together.';
comment on column nightowls.embedding_chunks.org_id is 'The tenant.';
comment on column nightowls.embedding_chunks.source is 'The embedding source.';
comment on column nightowls.embedding_chunks.key is 'The row''s key, as text.';
comment on column nightowls.embedding_chunks.chunk is 'The chunk''s number in its row, from 0.';
comment on column nightowls.embedding_chunks.content is 'The chunk.';
comment on column nightowls.embedding_chunks.embedding is 'Its vector, padded; with pgvector: embedding::vector(n).';
comment on column nightowls.embedding_chunks.model is 'The model that made it.';
comment on column nightowls.embedding_chunks.created_at is 'When it was saved.';

-- The line of pending rows -----------------------------------------------------------------------------

-- Before a time is written into the line: a lock whose key is when this transaction began, in seconds. What it writes is due later than that, so that
-- who looks at the locks knows from when on somebody may still add to the line. One lock a transaction.
create function nightowls._hold_embeddings()
  returns void
  language sql
  volatile
  parallel unsafe
begin atomic
  select pg_catalog.pg_advisory_xact_lock_shared(
    nightowls._lock_class(275), (pg_catalog.floor(extract(epoch from pg_catalog.now())) - 1577836800)::int);
end;

revoke all on function nightowls._hold_embeddings() from public;

create function nightowls._embedding_mark(org uuid, source text)
  returns timestamptz
  language sql
  stable
  parallel safe
  return coalesce((
    select m.mark from nightowls._embedding_marks m where m.org_id = org and m.source = _embedding_mark.source order by m.mark desc limit 1),
    '-infinity');

revoke all on function nightowls._embedding_mark(uuid, text) from public;

-- Moves the mark up to the first row of the line, but not beyond what somebody may still add: as _move_due_mark.
create function nightowls._move_embedding_mark(org uuid, source text)
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
  -- A clock that is set back by less than a minute hides nothing.
  v_safe  timestamptz := clock_timestamp() - interval '1 minute';
  v_held  bigint;
  v_mark  timestamptz;
  v_first timestamptz;
begin
  if current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
    return;
  end if;
  select min(l.objid::bigint) into v_held
    from pg_locks l
   where l.locktype = 'advisory' and l.objsubid = 2 and l.classid::bigint = nightowls._lock_class(275)
     and l.pid is distinct from pg_backend_pid()
     and l.database = (select d.oid from pg_database d where d.datname = current_database());
  v_safe := least(v_safe, to_timestamp(v_held + 1577836800));
  v_mark := nightowls._embedding_mark(_move_embedding_mark.org, _move_embedding_mark.source);
  select p.due_at into v_first
    from nightowls._embedding_pending p
   where p.org_id = _move_embedding_mark.org and p.source = _move_embedding_mark.source and p.due_at >= v_mark
   order by p.due_at
   limit 1;
  v_safe := least(v_first, v_safe);
  if v_safe > v_mark + interval '1 minute' then
    insert into nightowls._embedding_marks (org_id, source, mark)
    values (_move_embedding_mark.org, _move_embedding_mark.source, v_safe)
    on conflict do nothing;
    delete from nightowls._embedding_marks k
     where k.ctid = any (array(
             select o.ctid
               from nightowls._embedding_marks o
              where o.org_id = _move_embedding_mark.org and o.source = _move_embedding_mark.source and o.mark < v_mark
              order by o.mark desc
              limit 8
                for update skip locked));
  end if;
end;
$$;

revoke all on function nightowls._move_embedding_mark(uuid, text) from public;

-- Triggers on users' tables --------------------------------------------------------------------------------

-- The text has changed: the vector is of another. Runs as the one who writes. Argument: the target column.
create function nightowls._forget_embedding()
  returns trigger
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  -- The other columns are taken over as they are.
  return jsonb_populate_record(new, jsonb_build_object(tg_argv[0], null));
end;
$$;

revoke all on function nightowls._forget_embedding() from public;

-- The row is pending. Arguments: org, source, trigger name, key column. The key is of a type of Postgres's own, and cannot be made one of a user's
-- while the trigger's condition names it.
-- Definer: the writer has no right on our tables. It runs nothing of the table's but the output of the key.
create function nightowls._note_embedding()
  returns trigger
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform nightowls._hold_embeddings();
  execute format(
    'insert into nightowls._embedding_pending (org_id, source, key, due_at) '
    'select s.org_id, s.name, ($1).%I::text, clock_timestamp() from nightowls.embedding_sources s '
    'where s.org_id = $2 and s.name = $3 and s.trigger_name = $4', tg_argv[3])
    using new, tg_argv[0]::uuid, tg_argv[1], tg_argv[2];
  perform nightowls._wake('clock', 1);
  return null;
end;
$$;

revoke all on function nightowls._note_embedding() from public;

-- The row or its text is gone: so are its chunks. Arguments: as _note_embedding. Definer: as there.
create function nightowls._drop_embedding_chunks()
  returns trigger
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if tg_op = 'TRUNCATE' then
    delete from nightowls.embedding_chunks c
     where c.org_id = tg_argv[0]::uuid and c.source = tg_argv[1];
  else
    execute format(
      'delete from nightowls.embedding_chunks c where c.org_id = $2 and c.source = $3 and c.key = ($1).%I::text', tg_argv[3])
      using old, tg_argv[0]::uuid, tg_argv[1];
  end if;
  return null;
end;
$$;

revoke all on function nightowls._drop_embedding_chunks() from public;

-- Drops a source's triggers, wherever its table is now.
create function nightowls._drop_embedding_triggers(trigger_name text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_part record;
begin
  for v_part in
    select t.tgname, t.tgrelid::regclass as source
      from pg_trigger t
     where t.tgname ~ ('^' || _drop_embedding_triggers.trigger_name || '_[0-9]$') and t.tgparentid = 0
  loop
    begin
      execute format('drop trigger %I on %s', v_part.tgname, v_part.source);
    exception when insufficient_privilege then
      raise notice 'trigger "%" stays on table %', v_part.tgname, v_part.source using hint = 'Only the table''s owner may drop it.';
    end;
  end loop;
end;
$$;

revoke all on function nightowls._drop_embedding_triggers(text) from public;

-- Makes a source's triggers. They are the last of their kind to fire, so that they see what others make of the row.
create function nightowls._make_embedding_triggers(definition nightowls.embedding_sources)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_source  nightowls.embedding_sources := _make_embedding_triggers.definition;
  v_own     text := case when v_source.by_row then format('(new.org_id = %L::uuid) and ', v_source.org_id) else '' end;
  v_args    text := format('%L, %L, %L, %L', v_source.org_id, v_source.name, v_source.trigger_name, v_source.key_column);
  v_cast    text := '';
  v_changed text;
begin
  loop
    v_changed := (select string_agg(format('old.%1$I%2$s is distinct from new.%1$I%2$s', c.name, v_cast), ' or ')
                    from unnest(v_source.input_columns) as c (name));
    begin
      execute format(
        'create trigger %I before update on %s for each row when (%s(new.%I is not null) and (%s)) execute function nightowls._forget_embedding(%L)',
        v_source.trigger_name || '_1', v_source.source_table, v_own, v_source.target_column, v_changed, v_source.target_column);
      exit;
    exception when undefined_function then
      -- A type without an operator =, such as json: its text will do.
      if v_cast <> '' then
        raise;
      end if;
      v_cast := '::text';
    end;
  end loop;
  execute format(
    'create trigger %I after insert on %s for each row when (%s(new.%I is null) and (new.%I is not null)) execute function nightowls._note_embedding(%s)',
    v_source.trigger_name || '_2', v_source.source_table, v_own, v_source.target_column, v_source.key_column, v_args);
  execute format(
    'create trigger %I after update on %s for each row when (%s(new.%I is null) and (old.%I is not null or old.%I is distinct from new.%I or %s%s)) '
    'execute function nightowls._note_embedding(%s)',
    v_source.trigger_name || '_3', v_source.source_table, v_own, v_source.target_column, v_source.target_column, v_source.key_column,
    v_source.key_column, case when v_source.by_row then 'old.org_id is distinct from new.org_id or ' else '' end, v_changed, v_args);
  if v_source.chunk_chars is not null then
    execute format(
      'create trigger %I after delete on %s for each row when (%s(old.%I is not null)) execute function nightowls._drop_embedding_chunks(%s)',
      v_source.trigger_name || '_4', v_source.source_table, replace(v_own, 'new.', 'old.'), v_source.key_column, v_args);
    execute format(
      'create trigger %I after update on %s for each row when ((old.%I is not null) and (old.%I is distinct from new.%I or old.%I is not null and new.%I is null)) '
      'execute function nightowls._drop_embedding_chunks(%s)',
      v_source.trigger_name || '_5', v_source.source_table, v_source.key_column, v_source.key_column, v_source.key_column,
      v_source.target_column, v_source.target_column, v_args);
    execute format(
      'create trigger %I after truncate on %s for each statement execute function nightowls._drop_embedding_chunks(%s)',
      v_source.trigger_name || '_6', v_source.source_table, v_args);
  end if;
end;
$$;

revoke all on function nightowls._make_embedding_triggers(nightowls.embedding_sources) from public;

-- Making sources -----------------------------------------------------------------------------------------------

-- The columns that an expression over a table's row depends on; refuses what is no text of that row alone. The expression is parsed and looked at, never
-- planned or run.
create function nightowls._check_input(relation regclass, expression text, target text)
  returns text[]
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
  set check_function_bodies to on
  set standard_conforming_strings to on
as $$
#variable_conflict use_column
declare
  v_name    text := nightowls._relation_name(_check_input.relation);
  v_form    text;
  v_tree    text;
  v_view    oid;
  v_columns text[];
  v_bad     text;
begin
  begin
    -- As bodies of functions, which are parsed and not run: what passes in both brackets closes neither, so it is one expression.
    foreach v_form in array array[E'select cast(%s\n as text) from %s', E'select array[%s\n] from %s'] loop
      execute format('create function nightowls._input_check() returns void language sql as %L',
                     format(v_form, _check_input.expression, v_name));
      drop function nightowls._input_check();
    end loop;
    execute format(E'create view nightowls._input_check as select cast((%s\n) as text) as input from %s', _check_input.expression, v_name);
    v_view := to_regclass('nightowls._input_check');
    select r.ev_action::text into v_tree from pg_rewrite r where r.ev_class = v_view;
    v_columns := array(
      select distinct a.attname::text
        from pg_rewrite r
        join pg_depend d on d.classid = 'pg_rewrite'::regclass and d.objid = r.oid and d.refclassid = 'pg_class'::regclass
                        and d.refobjid = _check_input.relation and d.refobjsubid > 0
        join pg_attribute a on a.attrelid = d.refobjid and a.attnum = d.refobjsubid
       where r.ev_class = v_view
       order by 1);
    -- Undoes what was made.
    raise sqlstate 'NWX00';
  exception when sqlstate 'NWX00' then
    null;
  end;

  select string_agg(distinct p.oid::regprocedure::text, ', ') into v_bad
    from regexp_matches(v_tree, ':(?:funcid|opfuncid|aggfnoid|winfnoid) ([0-9]+)', 'g') as f (found)
    join pg_proc p on p.oid = f.found[1]::oid
   where p.provolatile = 'v'
      or p.oid in ('now()'::regprocedure, 'statement_timestamp()'::regprocedure, 'transaction_timestamp()'::regprocedure);
  if v_tree ~ ':(hasSubLinks|hasAggs|hasWindowFuncs|hasTargetSRFs) true' then
    raise exception 'input_expression must not have subqueries, aggregates, window functions or functions that return rows'
      using errcode = 'invalid_parameter_value', hint = 'It makes one text of one row. Keep what comes from elsewhere in a column of the table.';
  elsif v_bad is not null or v_tree ~ '\{SQLVALUEFUNCTION' then
    raise exception 'input_expression must not change by itself'
      using errcode = 'invalid_parameter_value',
            detail = coalesce('Volatile: ' || v_bad || '.', 'It asks for the time, the user or the like.'),
            hint = 'Two looks at one row must find the same text.';
  elsif v_tree ~ '\{VAR :varno [0-9]+ :varattno (0|-[0-9]+) ' then
    raise exception 'input_expression must not use the row as a whole or a system column'
      using errcode = 'invalid_parameter_value', hint = 'Name its columns: with the whole row the vector would be part of its own input.';
  elsif _check_input.target = any (v_columns) then
    raise exception 'input_expression must not use the target column "%"', _check_input.target using errcode = 'invalid_parameter_value';
  elsif v_columns = '{}' then
    raise exception 'input_expression must use a column of the table' using errcode = 'invalid_parameter_value';
  end if;

  -- A generated column changes with what it is made of, and is not there yet when the trigger looks.
  v_columns := array(
    select distinct c.name
      from (select u.name
              from unnest(v_columns) as u (name)
              join pg_attribute a on a.attrelid = _check_input.relation and a.attname = u.name and a.attgenerated = ''
             union all
            select b.attname::text
              from unnest(v_columns) as u (name)
              join pg_attribute a on a.attrelid = _check_input.relation and a.attname = u.name and a.attgenerated <> ''
              join pg_attrdef e on e.adrelid = a.attrelid and e.adnum = a.attnum
              join pg_depend d on d.classid = 'pg_attrdef'::regclass and d.objid = e.oid and d.refclassid = 'pg_class'::regclass
                              and d.refobjid = a.attrelid and d.refobjsubid > 0 and d.refobjsubid <> a.attnum
              join pg_attribute b on b.attrelid = d.refobjid and b.attnum = d.refobjsubid) c (name)
     order by 1);
  if _check_input.target = any (v_columns) then
    raise exception 'input_expression must not use the target column "%"', _check_input.target using errcode = 'invalid_parameter_value';
  end if;
  return v_columns;
end;
$$;

revoke all on function nightowls._check_input(regclass, text, text) from public;

-- Whether a source's numbers and texts can be; the table is not looked at.
create function nightowls._check_embedding_source(definition nightowls.embedding_sources)
  returns void
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_source nightowls.embedding_sources := _check_embedding_source.definition;
begin
  if num_nulls(v_source.name, v_source.source_table, v_source.key_column, v_source.input_expression, v_source.target_column, v_source.model,
               v_source.dimensions, v_source.max_chars, v_source.overlap, v_source.shape, v_source.batch_size, v_source.max_attempts,
               v_source.options) > 0 then
    raise exception 'no argument but endpoint, chunk_chars, model_column and org may be null' using errcode = 'null_value_not_allowed';
  elsif v_source.name = '' or v_source.model = '' or v_source.endpoint = '' then
    raise exception 'name, model and endpoint must not be empty' using errcode = 'invalid_parameter_value';
  elsif octet_length(v_source.name) > 255 or octet_length(v_source.model) > 255 or octet_length(v_source.input_expression) > 10000 then
    raise exception 'name, model or input_expression is too long'
      using errcode = 'program_limit_exceeded', detail = 'A name has at most 255 bytes, an expression 10000.';
  elsif v_source.shape not in ('openai', 'ollama', 'edge') then
    raise exception 'shape must be openai, ollama or edge' using errcode = 'invalid_parameter_value';
  elsif v_source.dimensions not between 1 and 16000 then
    raise exception 'dimensions must be between 1 and 16000' using errcode = 'invalid_parameter_value';
  elsif v_source.max_chars not between 1 and 262144 then
    raise exception 'max_chars must be between 1 and 262144' using errcode = 'invalid_parameter_value';
  elsif v_source.batch_size not between 1 and 2048 or v_source.max_attempts not between 1 and 100 then
    raise exception 'batch_size must be between 1 and 2048, max_attempts between 1 and 100' using errcode = 'invalid_parameter_value';
  elsif v_source.overlap < 0 or v_source.overlap > coalesce(v_source.chunk_chars, 0) / 2 or v_source.chunk_chars < 4 then
    raise exception 'chunk_chars must be at least 4, and overlap between 0 and half of it' using errcode = 'invalid_parameter_value';
  elsif v_source.chunk_chars is not null and v_source.shape = 'edge' then
    raise exception 'chunk_chars needs the shape openai or ollama'
      using errcode = 'invalid_parameter_value', detail = 'An edge function is asked for one vector at a time.';
  elsif v_source.max_chars::numeric / (v_source.chunk_chars - v_source.overlap - 1) > 1000 then
    raise exception 'a text would have more than 1000 chunks'
      using errcode = 'program_limit_exceeded', hint = 'Make chunk_chars greater, or max_chars or overlap smaller.';
  elsif jsonb_typeof(v_source.options) <> 'object' or v_source.options ?| '{model,input}' then
    raise exception 'options must be a JSON object without model and input' using errcode = 'invalid_parameter_value';
  end if;
end;
$$;

revoke all on function nightowls._check_embedding_source(nightowls.embedding_sources) from public;

-- A definition with what the table says of it; refuses what does not fit.
create function nightowls._fit_embedding_source(definition nightowls.embedding_sources)
  returns nightowls.embedding_sources
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_source nightowls.embedding_sources := _fit_embedding_source.definition;
  v_table  regclass := nightowls._resolve_relation(v_source.source_table, 'rp');
  v_class  pg_class;
  v_role   pg_roles;
  v_key    pg_attribute;
  v_target pg_attribute;
  v_base   text;
  v_near   text;
begin
  v_source.source_table := nightowls._relation_name(v_table);
  select c.* into v_class from pg_class c where c.oid = v_table;
  select r.* into v_role from pg_roles r where r.oid = v_class.relowner;
  if v_class.relnamespace = 'nightowls'::regnamespace then
    raise exception 'table % is of nightowls itself', v_source.source_table using errcode = 'wrong_object_type';
  elsif v_class.relrowsecurity and v_class.relforcerowsecurity and not (v_role.rolsuper or v_role.rolbypassrls) then
    raise exception 'row level security of % is forced on its owner', v_source.source_table
      using errcode = 'object_not_in_prerequisite_state',
            detail = 'Rows are read and written as the table''s owner, who would not see all of them.',
            hint = format('alter table %s no force row level security, or give "%s" bypassrls.', v_source.source_table, v_role.rolname);
  end if;
  foreach v_near in array array_remove(array[v_source.key_column, v_source.target_column, v_source.model_column], null) loop
    if not exists (select from pg_attribute a where a.attrelid = v_table and a.attname = v_near and a.attnum > 0 and not a.attisdropped) then
      raise exception 'column "%" of % does not exist', left(v_near, 64), v_source.source_table using errcode = 'undefined_column';
    end if;
  end loop;

  select a.* into v_key from pg_attribute a where a.attrelid = v_table and a.attname = v_source.key_column and not a.attisdropped;
  if v_key.atttypid not in ('int2'::regtype, 'int4'::regtype, 'int8'::regtype, 'uuid'::regtype, 'text'::regtype, 'varchar'::regtype) then
    raise exception 'key column "%" cannot be of type %', v_source.key_column, format_type(v_key.atttypid, v_key.atttypmod)
      using errcode = 'datatype_mismatch', hint = 'A key is a smallint, integer, bigint, uuid, text or varchar.';
  elsif not exists (
          select from pg_index i
           where i.indrelid = v_table and i.indisunique and i.indisvalid and i.indimmediate and i.indpred is null
             and i.indnkeyatts = 1 and i.indkey[0] = v_key.attnum) then
    raise exception 'key column "%" of % is not unique', v_source.key_column, v_source.source_table
      using errcode = 'invalid_parameter_value', hint = 'Name the column of a primary key, or of a unique index of one column.';
  end if;
  v_source.key_type := format_type(v_key.atttypid, null);

  select a.* into v_target from pg_attribute a where a.attrelid = v_table and a.attname = v_source.target_column and not a.attisdropped;
  select t.typname into v_base from pg_type t where t.oid = v_target.atttypid;
  if v_target.atttypid not in ('real[]'::regtype, 'double precision[]'::regtype)
     and not (v_base in ('vector', 'halfvec')
              and exists (select from pg_depend d join pg_extension e on e.oid = d.refobjid and d.refclassid = 'pg_extension'::regclass
                           where d.classid = 'pg_type'::regclass and d.objid = v_target.atttypid and e.extname = 'vector')) then
    raise exception 'target column "%" cannot be of type %', v_source.target_column, format_type(v_target.atttypid, v_target.atttypmod)
      using errcode = 'datatype_mismatch', hint = 'A vector goes into real[], double precision[], or pgvector''s vector or halfvec.';
  elsif v_target.atttypid not in ('real[]'::regtype, 'double precision[]'::regtype)
        and v_target.atttypmod > 0 and v_target.atttypmod <> v_source.dimensions then
    raise exception 'target column "%" takes % dimensions, not %', v_source.target_column, v_target.atttypmod, v_source.dimensions
      using errcode = 'invalid_parameter_value';
  elsif v_target.attnotnull or v_target.attgenerated <> '' then
    raise exception 'target column "%" can never be null, or is generated', v_source.target_column
      using errcode = 'invalid_parameter_value', hint = 'Null says that the row is still to be embedded: alter column … drop not null.';
  elsif v_target.attnum = v_key.attnum then
    raise exception 'key_column and target_column must differ' using errcode = 'invalid_parameter_value';
  end if;
  v_source.target_type := format_type(v_target.atttypid, null);
  if v_source.model_column is not null then
    if v_source.model_column in (v_source.key_column, v_source.target_column) then
      raise exception 'model_column must be a column of its own' using errcode = 'invalid_parameter_value';
    elsif not exists (select from pg_attribute a where a.attrelid = v_table and a.attname = v_source.model_column
                         and a.atttypid in ('text'::regtype, 'varchar'::regtype) and a.attgenerated = '') then
      raise exception 'model column "%" must be of type text', v_source.model_column using errcode = 'datatype_mismatch';
    end if;
  end if;

  v_source.input_columns := nightowls._check_input(v_table, v_source.input_expression, v_source.target_column);
  if v_source.model_column = any (v_source.input_columns) then
    raise exception 'input_expression must not use the model column "%"', v_source.model_column using errcode = 'invalid_parameter_value';
  end if;
  if v_source.endpoint is not null then
    perform from nightowls._endpoint_call(v_source.org_id, v_source.endpoint);
  end if;
  v_source.by_row := exists (
    select from pg_attribute a
     where a.attrelid = v_table and a.attname = 'org_id' and a.atttypid = 'uuid'::regtype and not a.attisdropped);
  -- What a look at a row will be: so that it is refused now, whose owner it cannot run as.
  perform nightowls._run_as_owner(v_table, format('select 1::text from %s where false', v_source.source_table), '{}');
  return v_source;
end;
$$;

revoke all on function nightowls._fit_embedding_source(nightowls.embedding_sources) from public;

create function nightowls.create_embedding_source(
  name             text,
  source_table     text,
  key_column       text,
  input_expression text,
  target_column    text,
  endpoint         text,
  model            text,
  dimensions       int,
  max_chars        int default 8000,
  shape            text default 'openai',
  chunk_chars      int default null,
  overlap          int default 0,
  batch_size       int default 50,
  model_column     text default null,
  options          jsonb default '{}',
  max_attempts     int default 8,
  org              uuid default null
)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org    uuid := nightowls.current_org(create_embedding_source.org);
  v_source nightowls.embedding_sources;
  v_found  nightowls.embedding_sources;
  v_other  text;
begin
  v_source.org_id := v_org;
  v_source.name := create_embedding_source.name;
  v_source.source_table := create_embedding_source.source_table;
  v_source.key_column := create_embedding_source.key_column;
  v_source.input_expression := create_embedding_source.input_expression;
  v_source.target_column := create_embedding_source.target_column;
  v_source.model_column := create_embedding_source.model_column;
  v_source.endpoint := create_embedding_source.endpoint;
  v_source.shape := create_embedding_source.shape;
  v_source.model := create_embedding_source.model;
  v_source.dimensions := create_embedding_source.dimensions;
  v_source.max_chars := create_embedding_source.max_chars;
  v_source.chunk_chars := create_embedding_source.chunk_chars;
  v_source.overlap := create_embedding_source.overlap;
  v_source.batch_size := create_embedding_source.batch_size;
  v_source.max_attempts := create_embedding_source.max_attempts;
  v_source.options := create_embedding_source.options;
  perform nightowls._check_embedding_source(v_source);
  perform nightowls._refuse_no_org(v_org);
  v_source := nightowls._fit_embedding_source(v_source);

  select s.name into v_other
    from nightowls.embedding_sources s
   where s.source_table = v_source.source_table and s.target_column = v_source.target_column
     and (s.org_id, s.name) <> (v_org, v_source.name) and (s.org_id = v_org or not v_source.by_row)
   limit 1;
  if found then
    raise exception 'column "%" of % is the target of embedding source "%" already', v_source.target_column, v_source.source_table, v_other
      using errcode = 'duplicate_object';
  end if;
  v_source.paused := false;
  v_source.trigger_name := 'zz_nightowls_embedding_' || left(replace(gen_random_uuid()::text, '-', ''), 16);
  v_source.created_at := clock_timestamp();
  insert into nightowls.embedding_sources select v_source.* on conflict do nothing;
  if not found then
    select s.* into v_found from nightowls.embedding_sources s where s.org_id = v_org and s.name = v_source.name;
    v_source.trigger_name := v_found.trigger_name;
    v_source.created_at := v_found.created_at;
    v_source.paused := v_found.paused;
    if v_found is distinct from v_source then
      raise exception 'embedding source "%" exists already with another definition', left(v_source.name, 64)
        using errcode = 'duplicate_object', hint = 'Change it with nightowls.alter_embedding_source(), or drop it first.';
    end if;
    return;
  end if;
  insert into nightowls._embedding_states (org_id, source, scan) values (v_org, v_source.name, 'pending');
  perform nightowls._make_embedding_triggers(v_source);
end;
$$;

comment on function nightowls.create_embedding_source(text, text, text, text, text, text, text, int, int, text, int, int, int, text, jsonb, int, uuid) is
  'Keeps a column of vectors up to date with a text: rows whose target is null are embedded, and a change of what the text is made of nulls the target. '
  'name: the source''s; source_table: schema.table, with a column org_id uuid only the rows of this org; key_column: unique, a whole number, uuid or text; '
  'input_expression: SQL over the row''s columns, names qualified by schema, no subqueries, nothing volatile; target_column: real[], double precision[], or pgvector''s vector or '
  'halfvec; endpoint: of create_endpoint, null if workers outside claim; model: its name; dimensions: the length of a vector, shorter ones are padded with zeros; max_chars: how many '
  'UTF-16 units of the text are embedded; shape: openai, ollama or edge; chunk_chars, overlap: embed pieces of that length into embedding_chunks, and their mean into the target; '
  'batch_size: texts in a request; model_column: a text column that gets the model''s name with each vector; options: more for a request''s body; max_attempts: of a row, before it is given '
  'up; org: the tenant. The same again changes nothing. Runs DDL (triggers): owner only. Waits for open writes to the table. Raises 42P01, 42703, 42804 or 42809 for a table or column that is not there '
  'or does not fit, 42601, 42703 or 42883 for an expression that is not valid, 22023, 22004 or 54000 for an argument that is not valid, null or too long, 42710 if there is a source of '
  'this name or target with another definition, 55000 if row level security is forced on the table''s owner, 42501 if the plain install may not act for it, NW007 if there is no such endpoint, NW010 if there is no org.';

revoke all on function nightowls.create_embedding_source(text, text, text, text, text, text, text, int, int, text, int, int, int, text, jsonb, int, uuid)
  from public;

create function nightowls._refuse_no_source(org uuid, name text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform nightowls._refuse_unknown(
    'embedding source', _refuse_no_source.name,
    array(select s.name from nightowls.embedding_sources s where s.org_id = _refuse_no_source.org order by s.name limit 100),
    'Make it with nightowls.create_embedding_source().');
end;
$$;

revoke all on function nightowls._refuse_no_source(uuid, text) from public;

create function nightowls.alter_embedding_source(
  name             text,
  input_expression text default null,
  endpoint         text default null,
  model            text default null,
  max_chars        int default null,
  shape            text default null,
  chunk_chars      int default null,
  overlap          int default null,
  batch_size       int default null,
  options          jsonb default null,
  max_attempts     int default null,
  paused           boolean default null,
  org              uuid default null
)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org   uuid := nightowls.current_org(alter_embedding_source.org);
  v_old   nightowls.embedding_sources;
  v_new   nightowls.embedding_sources;
  v_again boolean;
begin
  select s.* into v_old from nightowls.embedding_sources s where s.org_id = v_org and s.name = alter_embedding_source.name for update;
  if not found then
    perform nightowls._refuse_no_source(v_org, alter_embedding_source.name);
  end if;
  v_new := v_old;
  v_new.input_expression := coalesce(alter_embedding_source.input_expression, v_old.input_expression);
  v_new.endpoint := nullif(coalesce(alter_embedding_source.endpoint, v_old.endpoint), '');
  v_new.model := coalesce(alter_embedding_source.model, v_old.model);
  v_new.max_chars := coalesce(alter_embedding_source.max_chars, v_old.max_chars);
  v_new.shape := coalesce(alter_embedding_source.shape, v_old.shape);
  v_new.chunk_chars := nullif(coalesce(alter_embedding_source.chunk_chars, v_old.chunk_chars), 0);
  v_new.overlap := case when v_new.chunk_chars is null then 0 else coalesce(alter_embedding_source.overlap, v_old.overlap) end;
  v_new.batch_size := coalesce(alter_embedding_source.batch_size, v_old.batch_size);
  v_new.options := coalesce(alter_embedding_source.options, v_old.options);
  v_new.max_attempts := coalesce(alter_embedding_source.max_attempts, v_old.max_attempts);
  v_new.paused := coalesce(alter_embedding_source.paused, v_old.paused);
  perform nightowls._check_embedding_source(v_new);
  v_new := nightowls._fit_embedding_source(v_new);
  if v_new is not distinct from v_old then
    return false;
  end if;
  update nightowls.embedding_sources s
     set (input_expression, input_columns, endpoint, model, max_chars, shape, chunk_chars, overlap, batch_size, options, max_attempts, paused, by_row,
          key_type, target_type)
       = (select v_new.input_expression, v_new.input_columns, v_new.endpoint, v_new.model, v_new.max_chars, v_new.shape, v_new.chunk_chars,
                 v_new.overlap, v_new.batch_size, v_new.options, v_new.max_attempts, v_new.paused, v_new.by_row, v_new.key_type, v_new.target_type)
   where s.org_id = v_org and s.name = v_old.name;
  if (v_new.input_columns, v_new.chunk_chars is null, v_new.by_row) is distinct from (v_old.input_columns, v_old.chunk_chars is null, v_old.by_row) then
    perform nightowls._drop_embedding_triggers(v_old.trigger_name);
    perform nightowls._make_embedding_triggers(v_new);
  end if;
  v_again := (v_new.input_expression, v_new.model, v_new.max_chars, v_new.chunk_chars, v_new.overlap, v_new.options, v_new.by_row)
               is distinct from
             (v_old.input_expression, v_old.model, v_old.max_chars, v_old.chunk_chars, v_old.overlap, v_old.options, v_old.by_row);
  if v_again then
    -- What is under way is of the old definition.
    perform nightowls._hold_embeddings();
    update nightowls._embedding_pending p
       set claim = null, input_hash = null, due_at = clock_timestamp()
     where p.org_id = v_org and p.source = v_old.name and p.claim is not null;
  end if;
  update nightowls._embedding_states t
     set scan = case when v_again then 'all' else t.scan end, after_key = case when v_again then null else t.after_key end,
         failures = 0, retry_at = null
   where t.org_id = v_org and t.source = v_old.name;
  return true;
end;
$$;

comment on function nightowls.alter_embedding_source(text, text, text, text, int, text, int, int, int, jsonb, int, boolean, uuid) is
  'Changes an embedding source; false if nothing changed. name: the source''s; the others as in create_embedding_source, null: as it was, an endpoint ''''; none, chunk_chars 0: '
  'no chunks; paused: claim nothing; org: the tenant. With another input_expression, model, max_chars, chunk_chars, overlap or options all rows are embedded anew, slice by slice: a target is nulled shortly before '
  'its turn. For another length of vectors drop the source and make it again. Runs DDL (triggers): owner only. Waits for open writes to the table if its triggers change. Raises NW007 if there '
  'is no such source, NW010 if there is no org, and as create_embedding_source.';

revoke all on function nightowls.alter_embedding_source(text, text, text, text, int, text, int, int, int, jsonb, int, boolean, uuid) from public;

create function nightowls.drop_embedding_source(name text, org uuid default null)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org     uuid := nightowls.current_org(drop_embedding_source.org);
  v_trigger text;
begin
  delete from nightowls.embedding_sources s
   where s.org_id = v_org and s.name = drop_embedding_source.name
  returning s.trigger_name into v_trigger;
  if not found then
    perform nightowls._refuse_no_source(v_org, drop_embedding_source.name);
  end if;
  perform nightowls._drop_embedding_triggers(v_trigger);
  delete from nightowls._embedding_states t where t.org_id = v_org and t.source = drop_embedding_source.name;
  delete from nightowls._embedding_pending p where p.org_id = v_org and p.source = drop_embedding_source.name;
  delete from nightowls._embedding_requests r where r.org_id = v_org and r.source = drop_embedding_source.name;
  delete from nightowls._embedding_marks m where m.org_id = v_org and m.source = drop_embedding_source.name;
  delete from nightowls.embedding_chunks c where c.org_id = v_org and c.source = drop_embedding_source.name;
end;
$$;

comment on function nightowls.drop_embedding_source(text, uuid) is
  'Ends an embedding source: its triggers, what was noted and its chunks go, the vectors in the table stay. name: the source''s; org: the tenant. Runs DDL: owner only. Waits for open writes to the '
  'table. Raises NW007 if there is no such source, NW010 if there is no org.';

revoke all on function nightowls.drop_embedding_source(text, uuid) from public;

create function nightowls.list_embedding_sources(org uuid default null)
  returns table (
    name         text,
    source_table text,
    endpoint     text,
    model        text,
    dimensions   int,
    paused       boolean,
    scanning     boolean,
    pending      bigint,
    given_up     bigint,
    failures     int,
    last_error   text,
    retry_at     timestamptz
  )
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_bitmapscan to off
  set enable_sort to off
as $$
#variable_conflict use_column
declare
  v_org uuid := nightowls.current_org(list_embedding_sources.org);
begin
  return query
    select s.name, s.source_table, s.endpoint, s.model, s.dimensions, s.paused, t.scan is not null,
           (select count(*)
              from (select from nightowls._embedding_pending p
                     where p.org_id = v_org and p.source = s.name and p.due_at < 'infinity'
                       and p.due_at >= nightowls._embedding_mark(v_org, s.name)
                     order by p.due_at
                     limit 10001) x),
           (select count(*)
              from (select from nightowls._embedding_pending p
                     where p.org_id = v_org and p.source = s.name and p.due_at = 'infinity' order by p.due_at limit 10001) x),
           coalesce(t.failures, 0), t.last_error, case when t.retry_at > clock_timestamp() then t.retry_at end
      from nightowls.embedding_sources s
      left join nightowls._embedding_states t on t.org_id = s.org_id and t.source = s.name
     where s.org_id = v_org
     order by s.name;
end;
$$;

comment on function nightowls.list_embedding_sources(uuid) is
  'The embedding sources of an org and how they are: scanning: a pass over the table is under way, which finds rows that were there before; pending: rows noted or claimed, and given_up: rows that failed '
  'max_attempts times (10001 stands for more than 10000; failed_embeddings has them); failures: of requests, since one succeeded; last_error: of the last that failed; retry_at: until when none is sent. '
  'org: the tenant. Waits for nobody. Raises 42501 for who is no service, NW010 if there is no org.';

revoke all on function nightowls.list_embedding_sources(uuid) from public;

create view nightowls.failed_embeddings
  with (security_invoker = true)
as
  select p.org_id, p.source, p.key, p.attempts, p.error
    from nightowls._embedding_pending p
   where p.due_at = 'infinity';

comment on view nightowls.failed_embeddings is 'Rows that could not be embedded and were given up; retry_embeddings() tries again.';
comment on column nightowls.failed_embeddings.org_id is 'The tenant.';
comment on column nightowls.failed_embeddings.source is 'The embedding source.';
comment on column nightowls.failed_embeddings.key is 'The row''s key, as text.';
comment on column nightowls.failed_embeddings.attempts is 'How often it was tried.';
comment on column nightowls.failed_embeddings.error is 'Why the last attempt failed.';

-- Definer: nobody else may write to the tables. The caller has checked the org.
create function nightowls._retry_embeddings(org uuid, source text)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_count bigint;
begin
  if not exists (select from nightowls.embedding_sources s where s.org_id = _retry_embeddings.org and s.name = _retry_embeddings.source) then
    perform nightowls._refuse_no_source(_retry_embeddings.org, _retry_embeddings.source);
  end if;
  perform nightowls._hold_embeddings();
  update nightowls._embedding_pending p
     set due_at = clock_timestamp(), claim = null, attempts = 0
   where p.org_id = _retry_embeddings.org and p.source = _retry_embeddings.source and p.due_at = 'infinity';
  get diagnostics v_count = row_count;
  update nightowls._embedding_states t
     set retry_at = null, failures = 0
   where t.org_id = _retry_embeddings.org and t.source = _retry_embeddings.source and t.retry_at is not null;
  return v_count;
end;
$$;

revoke all on function nightowls._retry_embeddings(uuid, text) from public;

create function nightowls.retry_embeddings(source text, org uuid default null)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return nightowls._retry_embeddings(nightowls.current_org(retry_embeddings.org), retry_embeddings.source);
end;
$$;

comment on function nightowls.retry_embeddings(text, uuid) is
  'Tries rows that were given up once more, at once, and a source whose requests fail too; returns how many rows. source: the embedding source; org: the tenant. For services. Waits for who is claiming the same rows. '
  'Raises NW007 if there is no such source, NW010 if there is no org.';

revoke all on function nightowls.retry_embeddings(text, uuid) from public;

-- Definer: as _retry_embeddings.
create function nightowls._rescan_embeddings(org uuid, source text, all_rows boolean)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if _rescan_embeddings.all_rows is null then
    raise exception 'all_rows must not be null' using errcode = 'null_value_not_allowed';
  elsif not exists (select from nightowls.embedding_sources s where s.org_id = _rescan_embeddings.org and s.name = _rescan_embeddings.source) then
    perform nightowls._refuse_no_source(_rescan_embeddings.org, _rescan_embeddings.source);
  end if;
  update nightowls._embedding_states t
     set scan = case when _rescan_embeddings.all_rows or t.scan = 'all' then 'all' else 'pending' end, after_key = null
   where t.org_id = _rescan_embeddings.org and t.source = _rescan_embeddings.source;
end;
$$;

revoke all on function nightowls._rescan_embeddings(uuid, text, boolean) from public;

create function nightowls.rescan_embeddings(source text, all_rows boolean default false, org uuid default null)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform nightowls._rescan_embeddings(nightowls.current_org(rescan_embeddings.org), rescan_embeddings.source, rescan_embeddings.all_rows);
end;
$$;

comment on function nightowls.rescan_embeddings(text, boolean, uuid) is
  'Begins a pass over a source''s table, which goes on with each claim and backfill: it finds pending rows whose triggers did not fire (written under session_replication_role = replica, or '
  'while triggers were off). source: the embedding source; all_rows: embed every row anew; org: the tenant. For services. Waits for a pass that is just being advanced. Raises NW007 if there is no such source, '
  '22004 if all_rows is null, NW010 if there is no org.';

revoke all on function nightowls.rescan_embeddings(text, boolean, uuid) from public;

alter table nightowls.embedding_sources enable row level security;
alter table nightowls.embedding_sources force row level security;
create policy service_all on nightowls.embedding_sources
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));

alter table nightowls._embedding_states enable row level security;
alter table nightowls._embedding_states force row level security;
create policy service_all on nightowls._embedding_states
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));

alter table nightowls._embedding_pending enable row level security;
alter table nightowls._embedding_pending force row level security;
create policy service_all on nightowls._embedding_pending
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));

alter table nightowls._embedding_marks enable row level security;
alter table nightowls._embedding_marks force row level security;
create policy service_all on nightowls._embedding_marks
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));

alter table nightowls.embedding_chunks enable row level security;
alter table nightowls.embedding_chunks force row level security;
create policy service_all on nightowls.embedding_chunks
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));
