-- Claiming pending rows and saving their vectors: for workers outside and for the backfill.

-- Looks at the next slices of a table that is being passed over, until so many pending rows are found; at most 10 slices of 1,000 rows. Who finds
-- somebody else at it leaves it to them. What is the table's runs as its owner.
create function nightowls._scan_embeddings(definition nightowls.embedding_sources, qty int)
  returns int
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_source nightowls.embedding_sources := _scan_embeddings.definition;
  v_state  nightowls._embedding_states;
  v_slice  jsonb;
  v_sql    text;
  v_found  int := 0;
  v_count  int;
begin
  select t.* into v_state
    from nightowls._embedding_states t
   where t.org_id = v_source.org_id and t.source = v_source.name and t.scan is not null
     for update skip locked;
  if not found then
    return 0;
  end if;
  perform nightowls._hold_embeddings();
  for v_nth in 1 .. 10 loop
    v_sql := format(
      'select t.%1$I as nightowls_key, t.%1$I::text as nightowls_text, (%2$s%3$s) as nightowls_is_due from %4$s t%5$s order by t.%1$I limit 1000',
      v_source.key_column,
      case when v_source.by_row then format('t.org_id = %L::uuid and ', v_source.org_id) else '' end,
      case v_state.scan when 'all' then 'true' else format('t.%I is null', v_source.target_column) end,
      v_source.source_table,
      case when v_state.after_key is null then '' else format(' where t.%I > ($1)[1]::%s', v_source.key_column, v_source.key_type) end);
    if v_state.scan = 'all' then
      -- Those that had a vector are noted by the trigger, the others below.
      v_sql := format(
        'with s as materialized (%1$s), u as (update %2$s t set %3$I = null from s where t.%4$I = s.nightowls_key and s.nightowls_is_due and t.%3$I is not null '
        'returning t.%4$I::text as nightowls_text) '
        'select jsonb_build_object(''last'', (array_agg(s.nightowls_text))[count(*)], ''count'', count(*), ''nulled'', (select count(*) from u), ''keys'', '
        'jsonb_agg(s.nightowls_text) filter (where s.nightowls_is_due and s.nightowls_text not in (select u.nightowls_text from u)))::text from s',
        v_sql, v_source.source_table, v_source.target_column, v_source.key_column);
    else
      v_sql := format(
        'select jsonb_build_object(''last'', (array_agg(s.nightowls_text))[count(*)], ''count'', count(*), ''nulled'', 0, ''keys'', '
        'jsonb_agg(s.nightowls_text) filter (where s.nightowls_is_due))::text from (%s) s', v_sql);
    end if;
    v_slice := nightowls._run_as_owner(v_source.source_table::regclass, v_sql, array[v_state.after_key])::jsonb;
    insert into nightowls._embedding_pending (org_id, source, key, due_at)
    select v_source.org_id, v_source.name, k.key, clock_timestamp()
      from jsonb_array_elements_text(case jsonb_typeof(v_slice -> 'keys') when 'array' then v_slice -> 'keys' else '[]' end) as k (key)
     where not exists (
             select from nightowls._embedding_pending p
              where p.org_id = v_source.org_id and p.source = v_source.name and p.key = k.key and p.due_at < 'infinity');
    get diagnostics v_count = row_count;
    v_found := v_found + v_count + (v_slice ->> 'nulled')::int;
    v_state.after_key := v_slice ->> 'last';
    if (v_slice ->> 'count')::int < 1000 then
      v_state.scan := null;
      v_state.after_key := null;
    end if;
    exit when v_state.scan is null or v_found >= _scan_embeddings.qty;
  end loop;
  update nightowls._embedding_states t
     set scan = v_state.scan, after_key = v_state.after_key
   where t.org_id = v_source.org_id and t.source = v_source.name;
  return v_found;
end;
$$;

revoke all on function nightowls._scan_embeddings(nightowls.embedding_sources, int) from public;

-- A text in pieces of so many UTF-16 units, each of which has so many in common with the one before.
create function nightowls._chunks(content text, chunk_chars int, overlap int)
  returns text[]
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_chunks text[] := '{}';
  v_from   int := 0;
  v_units  int;
  v_part   text;
begin
  loop
    v_part := nightowls.slice_utf16(_chunks.content, v_from, v_from + _chunks.chunk_chars);
    v_chunks := v_chunks || v_part;
    -- What begins within a pair has lost a unit at its beginning.
    v_units := length(v_part) + case when getdatabaseencoding() = 'UTF8'
                                     then length(regexp_replace(v_part, '[^\U00010000-\U0010FFFF]', '', 'g')) else 0 end;
    exit when nightowls.slice_utf16(_chunks.content, v_from + _chunks.chunk_chars) = ''
          and nightowls.slice_utf16(_chunks.content, v_from + v_units, v_from + v_units + 2) = '';
    v_from := v_from + v_units - _chunks.overlap;
  end loop;
  return v_chunks;
end;
$$;

revoke all on function nightowls._chunks(text, int, int) from public;

-- What a look at rows asks for: key and text. condition: which rows.
create function nightowls._input_query(definition nightowls.embedding_sources, condition text)
  returns text
  language sql
  stable
  parallel safe
  return pg_catalog.format(
    E'select %1$s.%2$I::text as nightowls_key, cast((%3$s\n) as text) as nightowls_input from %4$s where %5$s and %1$s.%6$I is null%7$s',
    (definition).source_table, (definition).key_column, (definition).input_expression, (definition).source_table, condition,
    (definition).target_column,
    case when (definition).by_row then pg_catalog.format(' and %s.org_id = %L::uuid', (definition).source_table, (definition).org_id) else '' end);

revoke all on function nightowls._input_query(nightowls.embedding_sources, text) from public;

-- The texts of rows that are pending, by key; a row whose expression fails has an error instead.
create function nightowls._read_inputs(definition nightowls.embedding_sources, keys text[])
  returns table (key text, input text, error text)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_source nightowls.embedding_sources := _read_inputs.definition;
  v_table  regclass := v_source.source_table::regclass;
  v_query  text := format(
    'select jsonb_agg(jsonb_build_array(q.nightowls_key, q.nightowls_input))::text from (%s) q',
    nightowls._input_query(v_source, format('%s.%I = any (($1)::%s[])', v_source.source_table, v_source.key_column, v_source.key_type)));
  v_rows   jsonb;
begin
  begin
    v_rows := nightowls._run_as_owner(v_table, v_query, _read_inputs.keys)::jsonb;
  exception when data_exception or raise_exception or program_limit_exceeded then
    if cardinality(_read_inputs.keys) = 1 then
      return query select _read_inputs.keys[1], null::text, sqlerrm;
    else
      -- One of them: each alone.
      return query
        select r.key, r.input, r.error
          from unnest(_read_inputs.keys) as k (key)
         cross join lateral nightowls._read_inputs(_read_inputs.definition, array[k.key]) r;
    end if;
    return;
  end;
  return query
    select r.value ->> 0, r.value ->> 1, null::text
      from jsonb_array_elements(v_rows) as r (value);
end;
$$;

revoke all on function nightowls._read_inputs(nightowls.embedding_sources, text[]) from public;

create function nightowls._input_hash(input text)
  returns text
  language sql
  immutable
  parallel safe
  return pg_catalog.encode(pg_catalog.sha256(pg_catalog.convert_to(input, 'UTF8')), 'hex');

revoke all on function nightowls._input_hash(text) from public;

-- Puts a claimed row off, or gives it up when it has been tried often enough.
create function nightowls._fail_pending(definition nightowls.embedding_sources, pending_id bigint, error text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform nightowls._hold_embeddings();
  update nightowls._embedding_pending p
     set claim = null, input_hash = null, error = left(_fail_pending.error, 1000),
         due_at = case when p.attempts >= (_fail_pending.definition).max_attempts then 'infinity'
                       else clock_timestamp() + least(3600, power(2, p.attempts)) * interval '1 second' end
   where p.org_id = (_fail_pending.definition).org_id and p.source = (_fail_pending.definition).name and p.pending_id = _fail_pending.pending_id;
end;
$$;

revoke all on function nightowls._fail_pending(nightowls.embedding_sources, bigint, text) from public;

-- Claims up to so many rows of one source. A row whose text is null or blank has nothing to embed and is pending no more.
-- Definer: nobody else may write to the tables; what is the table's runs as its owner. Services only.
create function nightowls._claim_embeddings(org uuid, source text, qty int, lease interval)
  returns table (pending_id bigint, key text, claim uuid, input text, chunks text[], alone boolean)
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_sort to off
  set enable_bitmapscan to off
  set enable_hashjoin to off
  set enable_mergejoin to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
declare
  v_source nightowls.embedding_sources;
  v_claim  uuid := gen_random_uuid();
  v_mark   timestamptz;
  v_now    timestamptz;
  v_ids    bigint[];
  v_picked bigint[];
  v_keys   text[];
  v_tries  int := 0;
  v_row    record;
  v_cut    text;
  v_done    bigint[] := '{}';
  v_claimed bigint[] := '{}';
  v_hashes  text[] := '{}';
  v_counts  int[] := '{}';
begin
  select s.* into v_source
    from nightowls.embedding_sources s
   where s.org_id = _claim_embeddings.org and s.name = _claim_embeddings.source and not s.paused;
  if not found then
    return;
  end if;
  loop
    v_mark := nightowls._embedding_mark(v_source.org_id, v_source.name);
    v_now := clock_timestamp();
    v_ids := array(
      select p.pending_id
        from nightowls._embedding_pending p
       where p.org_id = v_source.org_id and p.source = v_source.name and p.due_at >= v_mark and p.due_at <= v_now
       order by p.due_at
       limit _claim_embeddings.qty
         for update skip locked);
    exit when cardinality(v_ids) >= _claim_embeddings.qty or v_tries > 0;
    v_tries := 1;
    exit when nightowls._scan_embeddings(v_source, _claim_embeddings.qty - cardinality(v_ids)) = 0;
  end loop;
  if v_ids = '{}' then
    perform nightowls._move_embedding_mark(v_source.org_id, v_source.name);
    return;
  end if;

  -- One row for each key, the newest: it stands for all that were noted before its text is read.
  select array_agg(x.pending_id), array_agg(x.key)
    into v_picked, v_keys
    from (select p.key, max(p.pending_id) as pending_id
            from unnest(v_ids) as i (id)
            join nightowls._embedding_pending p on p.org_id = v_source.org_id and p.source = v_source.name and p.pending_id = i.id
           group by p.key) x;
  delete from nightowls._embedding_pending d
   where d.ctid = any (array(
           select p.ctid
             from unnest(v_keys) as k (key)
             join nightowls._embedding_pending p on p.org_id = v_source.org_id and p.source = v_source.name and p.key = k.key
            where p.pending_id <> all (v_picked) and (p.claim is null or p.pending_id = any (v_ids))
              for update of p skip locked));

  -- Read in a statement of its own, which sees what was committed before.
  perform nightowls._hold_embeddings();
  for v_row in
    select i.id, p.key, p.attempts, p.alone, p.claim, r.key is not null as is_there, r.input, r.error
      from unnest(v_picked) as i (id)
      join nightowls._embedding_pending p on p.org_id = v_source.org_id and p.source = v_source.name and p.pending_id = i.id
      left join nightowls._read_inputs(v_source, v_keys) r on r.key = p.key
     order by i.id
  loop
    v_cut := nightowls.slice_utf16(v_row.input, 0, v_source.max_chars);
    if v_row.attempts >= v_source.max_attempts then
      perform nightowls._fail_pending(v_source, v_row.id, 'claimed, and nothing came back within the lease');
    elsif v_row.error is not null then
      update nightowls._embedding_pending p
         set attempts = p.attempts + 1
       where p.org_id = v_source.org_id and p.source = v_source.name and p.pending_id = v_row.id;
      perform nightowls._fail_pending(v_source, v_row.id, v_row.error);
    elsif not v_row.is_there or v_cut !~ '\S' is not false then
      v_done := v_done || v_row.id;
    else
      pending_id := v_row.id;
      key := v_row.key;
      claim := v_claim;
      input := v_cut;
      chunks := case when v_source.chunk_chars is not null then nightowls._chunks(v_cut, v_source.chunk_chars, v_source.overlap) end;
      alone := v_row.alone;
      v_claimed := v_claimed || v_row.id;
      v_hashes := v_hashes || nightowls._input_hash(v_row.input);
      v_counts := v_counts || coalesce(cardinality(chunks), 0);
      return next;
    end if;
  end loop;
  delete from nightowls._embedding_pending p
   using unnest(v_done) as i (id)
   where p.org_id = v_source.org_id and p.source = v_source.name and p.pending_id = i.id;
  update nightowls._embedding_pending p
     set claim = v_claim, due_at = clock_timestamp() + _claim_embeddings.lease, attempts = p.attempts + 1,
         input_hash = c.input_hash, chunks = nullif(c.chunks, 0)
    from unnest(v_claimed, v_hashes, v_counts) as c (id, input_hash, chunks)
   where p.org_id = v_source.org_id and p.source = v_source.name and p.pending_id = c.id;
  -- Now that these are due later.
  if cardinality(v_ids) < _claim_embeddings.qty then
    perform nightowls._move_embedding_mark(v_source.org_id, v_source.name);
  end if;
end;
$$;

revoke all on function nightowls._claim_embeddings(uuid, text, int, interval) from public;

create function nightowls.claim_embeddings(
  source text default null,
  qty    int default 50,
  lease  interval default '120 seconds',
  org    uuid default null
)
  returns table (org_id uuid, source_name text, key text, claim uuid, input text, chunks text[], model text, dimensions int)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org    uuid;
  v_source nightowls.embedding_sources;
  v_left   int := claim_embeddings.qty;
  v_row    record;
begin
  if claim_embeddings.qty is null or claim_embeddings.lease is null then
    raise exception 'qty and lease must not be null' using errcode = 'null_value_not_allowed';
  elsif claim_embeddings.qty not between 1 and 1000 then
    raise exception 'qty must be between 1 and 1000' using errcode = 'invalid_parameter_value';
  elsif claim_embeddings.lease <= interval '0' or claim_embeddings.lease > interval '1 day' then
    raise exception 'lease must be positive and at most a day' using errcode = 'invalid_parameter_value';
  end if;
  if claim_embeddings.source is not null then
    v_org := nightowls.current_org(claim_embeddings.org);
    if not exists (select from nightowls.embedding_sources s where s.org_id = v_org and s.name = claim_embeddings.source) then
      perform nightowls._refuse_no_source(v_org, claim_embeddings.source);
    end if;
  elsif claim_embeddings.org is not null then
    v_org := nightowls.current_org(claim_embeddings.org);
  end if;
  for v_source in
    select (d).*
      from nightowls._due_sources(v_org, claim_embeddings.source, false) d
  loop
    for v_row in select c.* from nightowls._claim_embeddings(v_source.org_id, v_source.name, v_left, claim_embeddings.lease) c loop
      org_id := v_source.org_id;
      source_name := v_source.name;
      key := v_row.key;
      claim := v_row.claim;
      input := v_row.input;
      chunks := v_row.chunks;
      model := v_source.model;
      dimensions := v_source.dimensions;
      v_left := v_left - 1;
      return next;
    end loop;
    exit when v_left <= 0;
  end loop;
end;
$$;

comment on function nightowls.claim_embeddings(text, int, interval, uuid) is
  'Hands rows that are pending out to a worker: a row each, with the text to embed. source: the embedding source; null: any, of all orgs in turn or of the one given; qty: how many, 1 to 1000; lease: how long '
  'nobody else is given them; org: the tenant. Returns org_id, source_name, key, claim (for save_embedding), input (cut to max_chars), chunks (its pieces, where the source has chunk_chars, else null), model, dimensions. '
  'A row comes again when the lease ends, and is given up after max_attempts. Rows with no text are left alone. For services; the expression runs as the table''s owner. Waits for nobody: what is being claimed is '
  'passed over. Raises NW007 if there is no such source, 22023 or 22004 for an argument that is not valid or null, 42P01 or 42703 if the table or a column is gone, NW010 if there is no org.';

revoke all on function nightowls.claim_embeddings(text, int, interval, uuid) from public;

-- The sources that have something due, in an order that is another each time, so that a busy one starves nobody. with_endpoint: that the backfill may serve now.
create function nightowls._due_sources(org uuid, source text, with_endpoint boolean)
  returns setof nightowls.embedding_sources
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_bitmapscan to off
  set enable_sort to off
  set enable_hashjoin to off
  set enable_mergejoin to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
declare
  v_now timestamptz := clock_timestamp();
begin
  return query
    select s.*
      from nightowls.embedding_sources s
      join nightowls._embedding_states t on t.org_id = s.org_id and t.source = s.name
     where (_due_sources.org is null or s.org_id = _due_sources.org) and (_due_sources.source is null or s.name = _due_sources.source)
       and not s.paused
       and (not _due_sources.with_endpoint or s.endpoint is not null and (t.retry_at is null or t.retry_at <= v_now))
       and (t.scan is not null
            or (select true
                  from nightowls._embedding_pending p
                 where p.org_id = s.org_id and p.source = s.name
                   and p.due_at >= nightowls._embedding_mark(s.org_id, s.name) and p.due_at <= v_now
                 order by p.due_at
                 limit 1))
     order by random();
end;
$$;

revoke all on function nightowls._due_sources(uuid, text, boolean) from public;

-- Saving ---------------------------------------------------------------------------------------------------------

-- A vector as it is stored; refuses what is none.
create function nightowls._fit_vector(vector real[], dimensions int)
  returns real[]
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_length int := cardinality(_fit_vector.vector);
begin
  if _fit_vector.vector is null or array_position(_fit_vector.vector, null) is not null then
    raise exception 'vector must not be null or hold nulls' using errcode = 'null_value_not_allowed';
  elsif v_length = 0 or v_length > _fit_vector.dimensions then
    raise exception 'vector has % dimensions, not %', v_length, _fit_vector.dimensions
      using errcode = 'invalid_parameter_value', hint = 'A shorter one is padded with zeros; one that is longer or empty is of another model.';
  elsif 'NaN' = any (_fit_vector.vector) or 'Infinity' = any (_fit_vector.vector) or '-Infinity' = any (_fit_vector.vector) then
    raise exception 'vector holds numbers that are not finite' using errcode = 'invalid_parameter_value';
  elsif v_length < _fit_vector.dimensions then
    return _fit_vector.vector || array_fill(0::real, array[_fit_vector.dimensions - v_length]);
  end if;
  return _fit_vector.vector;
end;
$$;

revoke all on function nightowls._fit_vector(real[], int) from public;

-- The mean of vectors of one length, scaled to length 1 (unless it is zero): what stands for a text in pieces.
create function nightowls._mean_vector(vectors real[])
  returns real[]
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_sums double precision[];
  v_norm double precision;
begin
  v_sums := array(
    select sum((_mean_vector.vectors)[i][j]::double precision)
      from generate_subscripts(_mean_vector.vectors, 2) as j
     cross join generate_subscripts(_mean_vector.vectors, 1) as i
     group by j
     order by j);
  v_norm := (select sqrt(sum(s * s)) from unnest(v_sums) as u (s));
  return array(select case when v_norm > 0 then u.s / v_norm else 0 end::real from unnest(v_sums) with ordinality as u (s, no) order by u.no);
end;
$$;

revoke all on function nightowls._mean_vector(real[]) from public;

-- Saves the vector of a claimed row, or says that it is too late: false. Definer: nobody else may write to the tables; the row is
-- written as the table's owner. Services only; the caller has checked the org.
create function nightowls._save_embedding(org uuid, source text, key text, claim uuid, vector real[])
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_bitmapscan to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
declare
  v_source  nightowls.embedding_sources;
  v_pending nightowls._embedding_pending;
  v_target  real[];
  v_table   regclass;
  v_answer  text;
  v_chunks  text[];
begin
  select s.* into v_source from nightowls.embedding_sources s where s.org_id = _save_embedding.org and s.name = _save_embedding.source;
  if not found then
    perform nightowls._refuse_no_source(_save_embedding.org, _save_embedding.source);
  end if;
  if _save_embedding.key is null or _save_embedding.claim is null then
    raise exception 'key and claim must not be null' using errcode = 'null_value_not_allowed';
  end if;
  select p.* into v_pending
    from nightowls._embedding_pending p
   where p.org_id = v_source.org_id and p.source = v_source.name and p.key = _save_embedding.key and p.claim = _save_embedding.claim;
  if not found or v_pending.due_at <= clock_timestamp() then
    return false;
  end if;
  if v_pending.chunks is null then
    if array_ndims(_save_embedding.vector) <> 1 then
      raise exception 'vector must be one array of numbers' using errcode = 'invalid_parameter_value';
    end if;
    v_target := nightowls._fit_vector(_save_embedding.vector, v_source.dimensions);
  else
    if array_ndims(_save_embedding.vector) is distinct from 2 or array_length(_save_embedding.vector, 1) <> v_pending.chunks then
      raise exception 'vector must be an array of % arrays of numbers, one for each chunk', v_pending.chunks using errcode = 'invalid_parameter_value';
    end if;
    perform nightowls._fit_vector(array(select unnest(_save_embedding.vector[1:1])), v_source.dimensions);
    if array_position(array(select unnest(_save_embedding.vector)), null) is not null then
      raise exception 'vector must not hold nulls' using errcode = 'null_value_not_allowed';
    end if;
    v_target := nightowls._fit_vector(nightowls._mean_vector(_save_embedding.vector), v_source.dimensions);
  end if;

  v_table := v_source.source_table::regclass;
  begin
    -- The row first, which may be locked by who writes to it, then what is noted of it: in the order of a writer's trigger. The condition is looked at
    -- again when a writer is waited for.
    v_answer := nightowls._run_as_owner(
      v_table,
      format(E'with u as (update %1$s set %2$I = ($1)[3]::real[]::%3$s%4$s where %1$s.%5$I = ($1)[1]::%6$s and %1$s.%2$I is null%7$s '
             'and encode(sha256(convert_to(cast((%8$s\n) as text), ''UTF8'')), ''hex'') = ($1)[2] '
             'returning %1$s.%2$I is not null as nightowls_saved, cast((%8$s\n) as text) as nightowls_input) '
             'select jsonb_build_array(u.nightowls_saved, u.nightowls_input)::text from u',
             v_source.source_table, v_source.target_column, v_source.target_type,
             case when v_source.model_column is null then '' else format(', %I = ($1)[4]', v_source.model_column) end,
             v_source.key_column, v_source.key_type,
             case when v_source.by_row then format(' and %s.org_id = %L::uuid', v_source.source_table, v_source.org_id) else '' end,
             v_source.input_expression),
      array[_save_embedding.key, v_pending.input_hash, v_target::text, v_source.model]);
    if (v_answer::jsonb ->> 0)::boolean is not true then
      -- Another text, or saved by another; or the table's own triggers undo it.
      raise sqlstate 'NWX00';
    end if;
    delete from nightowls._embedding_pending p
     where p.org_id = v_source.org_id and p.source = v_source.name and p.pending_id = v_pending.pending_id
       and p.claim = _save_embedding.claim and p.due_at > clock_timestamp();
    if not found then
      v_pending := null;
      raise sqlstate 'NWX00';
    end if;
    if v_source.chunk_chars is not null then
      v_chunks := nightowls._chunks(nightowls.slice_utf16(v_answer::jsonb ->> 1, 0, v_source.max_chars), v_source.chunk_chars, v_source.overlap);
      delete from nightowls.embedding_chunks c
       where c.org_id = v_source.org_id and c.source = v_source.name and c.key = _save_embedding.key;
      insert into nightowls.embedding_chunks (org_id, source, key, chunk, content, embedding, model)
      select v_source.org_id, v_source.name, _save_embedding.key, n - 1, v_chunks[n],
             nightowls._fit_vector(array(select unnest(_save_embedding.vector[n:n])), v_source.dimensions), v_source.model
        from generate_series(1, v_pending.chunks) as n;
    end if;
    return true;
  exception when sqlstate 'NWX00' then
    if v_pending.pending_id is not null then
      -- It is looked at anew: then it is claimed with its new text, or found to be pending no more.
      if v_answer is null then
        perform nightowls._hold_embeddings();
        update nightowls._embedding_pending p
           set claim = null, input_hash = null, due_at = clock_timestamp()
         where p.org_id = v_source.org_id and p.source = v_source.name and p.pending_id = v_pending.pending_id and p.claim = _save_embedding.claim;
      else
        perform nightowls._fail_pending(v_source, v_pending.pending_id, 'the table''s own triggers change the text or the target when it is saved');
      end if;
    end if;
    return false;
  end;
end;
$$;

revoke all on function nightowls._save_embedding(uuid, text, text, uuid, real[]) from public;

create function nightowls.save_embedding(source text, key text, claim uuid, vector real[], org uuid default null)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return nightowls._save_embedding(
    nightowls.current_org(save_embedding.org), save_embedding.source, save_embedding.key, save_embedding.claim, save_embedding.vector);
end;
$$;

comment on function nightowls.save_embedding(text, text, uuid, real[], uuid) is
  'Stores the vector of a row that claim_embeddings gave out; false if it came too late: the claim has ended or is somebody else''s, the text has changed meanwhile, or the row is gone or has a vector; then nothing is '
  'written, and what is still pending is given out again. source, key, claim: as claimed; vector: the numbers, at most dimensions of them (shorter ones are padded with zeros); of a text in chunks an array of such arrays, in '
  'their order; org: the tenant. For services; the row is written as the table''s owner. Waits for open writes to the row. Raises NW007 if there is no such source, 22023 or 22004 for a vector or an argument that is '
  'not valid or null, 42P01 or 42703 if the table or a column is gone, what the table''s own triggers raise, NW010 if there is no org.';

revoke all on function nightowls.save_embedding(text, text, uuid, real[], uuid) from public;
