-- The backfill: requests to the endpoints that make vectors, and what becomes of the answers.
--
-- A request is begun (its rows claimed, and what it will hold written down), sent, and ended (its answer saved), each in a transaction of its own where
-- that can be: by the worker, by run_backfill(), or by pg_net. If nobody ends it, its rows' claims run out.

create table nightowls._embedding_requests (
  org_id     uuid        not null,
  request_id bigint      not null generated always as identity,
  source     text        collate "C" not null,
  claim      uuid        not null,
  keys       text[]      not null,
  chunks     int[],
  net_id     bigint,
  expires_at timestamptz not null,
  constraint _embedding_requests_pkey primary key (org_id, request_id)
);

-- Notes that a source's requests fail, and when to try again: after what the endpoint asks for, or after a pause that grows.
create function nightowls._fail_source(definition nightowls.embedding_sources, error text, wait_s double precision default null)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  update nightowls._embedding_states t
     set failures = t.failures + 1, last_error = left(_fail_source.error, 1000), failed_at = clock_timestamp(),
         retry_at = clock_timestamp() + interval '1 second'
                    * least(3600, greatest(coalesce(_fail_source.wait_s, 0), least(300, 0.25 * power(2, least(t.failures, 12))) * (0.75 + random() / 2)))
   where t.org_id = (_fail_source.definition).org_id and t.source = (_fail_source.definition).name;
end;
$$;

revoke all on function nightowls._fail_source(nightowls.embedding_sources, text, double precision) from public;

-- How many seconds Retry-After asks for: a number, or a time; null for neither.
create function nightowls._retry_after(headers jsonb)
  returns double precision
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_value text := (select h.value #>> '{}' from jsonb_each(_retry_after.headers) as h (name, value) where lower(h.name) = 'retry-after' limit 1);
begin
  if v_value ~ '^\s*[0-9]{1,9}(\.[0-9]{1,9})?\s*$' then
    return v_value::double precision;
  elsif v_value ~* '^\s*[a-z]{3},? [0-9]{2}[ -][a-z]{3}[ -][0-9]{2,4} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT\s*$' then
    return greatest(extract(epoch from v_value::timestamptz - clock_timestamp()), 0);
  end if;
  return null;
exception when data_exception then
  return null;
end;
$$;

revoke all on function nightowls._retry_after(jsonb) from public;

-- What is sent for texts of a source, and where.
create function nightowls._embedding_url(definition nightowls.embedding_sources, url text)
  returns text
  language sql
  immutable
  parallel safe
  return case
    when url ~ '^[A-Za-z]+://[^/?#]+/?$' and (definition).shape <> 'edge'
      then rtrim(url, '/') || case (definition).shape when 'ollama' then '/api/embed' else '/v1/embeddings' end
    else url
  end;

revoke all on function nightowls._embedding_url(nightowls.embedding_sources, text) from public;

create function nightowls._embedding_body(definition nightowls.embedding_sources, texts text[])
  returns text
  language sql
  stable
  parallel safe
  return ((definition).options || pg_catalog.jsonb_build_object(
    'model', (definition).model,
    'input', case (definition).shape when 'edge' then pg_catalog.to_jsonb(texts[1]) else pg_catalog.to_jsonb(texts) end))::text;

revoke all on function nightowls._embedding_body(nightowls.embedding_sources, text[]) from public;

-- The vectors of an answer, in the order of the texts; raises 22023 if it has not one of the right length for each.
create function nightowls._embedding_vectors(definition nightowls.embedding_sources, body text, texts int)
  returns jsonb
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_body    jsonb;
  v_vectors jsonb;
begin
  begin
    v_body := _embedding_vectors.body::jsonb;
    v_vectors := case (_embedding_vectors.definition).shape
      when 'openai' then (select jsonb_agg(d.value -> 'embedding' order by coalesce((d.value ->> 'index')::int, d.no - 1))
                            from jsonb_array_elements(v_body -> 'data') with ordinality as d (value, no))
      when 'ollama' then v_body -> 'embeddings'
      else jsonb_build_array(v_body -> 'embedding') end;
    if jsonb_typeof(v_vectors) is distinct from 'array' or jsonb_array_length(v_vectors) <> _embedding_vectors.texts
       or exists (select from jsonb_array_elements(v_vectors) as v (value)
                   where jsonb_typeof(v.value) <> 'array' or v.value = '[]' or jsonb_path_exists(v.value, '$[*] ? (@.type() != "number")')) then
      v_vectors := null;
    end if;
  exception when data_exception or program_limit_exceeded then
    v_vectors := null;
  end;
  if v_vectors is null then
    raise exception 'the answer does not hold % vectors as the shape "%" has them', _embedding_vectors.texts, (_embedding_vectors.definition).shape
      using errcode = 'invalid_parameter_value';
  end if;
  if exists (select from jsonb_array_elements(v_vectors) as v (value) where jsonb_array_length(v.value) > (_embedding_vectors.definition).dimensions) then
    raise exception 'the answer''s vectors have % dimensions, not %', (select max(jsonb_array_length(v.value)) from jsonb_array_elements(v_vectors) as v (value)),
        (_embedding_vectors.definition).dimensions
      using errcode = 'invalid_parameter_value';
  end if;
  return v_vectors;
end;
$$;

revoke all on function nightowls._embedding_vectors(nightowls.embedding_sources, text, int) from public;

-- A JSON array of numbers, or of such arrays, as real[]. Numbers too small for real are zero.
create function nightowls._reals(numbers jsonb)
  returns real[]
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return translate(_reals.numbers::text, '[] ', '{}')::real[];
exception when numeric_value_out_of_range then
  if jsonb_typeof(_reals.numbers -> 0) = 'array' then
    return (select array_agg(nightowls._reals(v.value) order by v.no) from jsonb_array_elements(_reals.numbers) with ordinality as v (value, no));
  end if;
  return array(
    select case when abs(n.value::numeric) < 1.2e-38 then 0 else n.value::numeric end::real
      from jsonb_array_elements_text(_reals.numbers) with ordinality as n (value, no)
     order by n.no);
end;
$$;

revoke all on function nightowls._reals(jsonb) from public;

-- Begins requests for up to so many rows, of whichever sources have something due. What comes back is to be sent by POST, and then ended.
-- Definer: secrets and what is kept of rows are closed. Services only.
create function nightowls._begin_backfill(max_rows int default 50)
  returns table (org_id uuid, request_id bigint, url text, headers jsonb, body text, timeout_ms int)
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_left   int := _begin_backfill.max_rows;
  v_source nightowls.embedding_sources;
  v_call   record;
  v_row    record;
  v_texts  text[];
  v_keys   text[];
  v_chunks int[];
  v_claim  uuid;
  v_lease  interval;
begin
  for v_source in select (d).* from nightowls._due_sources(null, null, true) d loop
    begin
      select c.* into v_call from nightowls._endpoint_call(v_source.org_id, v_source.endpoint) c;
      if v_call.missing is not null then
        raise exception '% is missing', v_call.missing using errcode = 'object_not_in_prerequisite_state';
      end if;
      url := nightowls._embedding_url(v_source, v_call.url);
      headers := v_call.headers || '{"content-type": "application/json"}';
      timeout_ms := v_call.timeout_ms;
      org_id := v_source.org_id;
      v_lease := (timeout_ms + 120000) * interval '1 millisecond';
      v_texts := '{}';
      v_keys := '{}';
      v_chunks := '{}';
      for v_row in
        select c.key, c.claim, coalesce(c.chunks, array[c.input]) as texts, c.alone or v_source.shape = 'edge' as alone
          from nightowls._claim_embeddings(v_source.org_id, v_source.name, least(v_left, 1000), v_lease) c
         union all
        select null, null, '{}', true
      loop
        -- What is ready goes before a row that would make it too large, before and after one that goes alone, and at the end.
        if v_keys <> '{}' and (v_row.alone or cardinality(v_texts) + cardinality(v_row.texts) > v_source.batch_size) then
          insert into nightowls._embedding_requests (org_id, source, claim, keys, chunks, expires_at)
          values (v_source.org_id, v_source.name, v_claim, v_keys, case when v_source.chunk_chars is not null then v_chunks end,
                  clock_timestamp() + v_lease)
          returning _embedding_requests.request_id into _begin_backfill.request_id;
          body := nightowls._embedding_body(v_source, v_texts);
          return next;
          v_texts := '{}';
          v_keys := '{}';
          v_chunks := '{}';
        end if;
        exit when v_row.key is null;
        v_left := v_left - 1;
        v_claim := v_row.claim;
        v_texts := v_texts || v_row.texts;
        v_keys := v_keys || v_row.key;
        v_chunks := v_chunks || cardinality(v_row.texts);
        if v_row.alone then
          insert into nightowls._embedding_requests (org_id, source, claim, keys, chunks, expires_at)
          values (v_source.org_id, v_source.name, v_claim, v_keys, case when v_source.chunk_chars is not null then v_chunks end,
                  clock_timestamp() + v_lease)
          returning _embedding_requests.request_id into _begin_backfill.request_id;
          body := nightowls._embedding_body(v_source, v_texts);
          return next;
          v_texts := '{}';
          v_keys := '{}';
          v_chunks := '{}';
        end if;
      end loop;
    exception when others then
      if sqlstate like '40%' then
        raise;
      end if;
      -- One source that is broken stops no other: its table or endpoint is gone, a secret is missing.
      perform nightowls._fail_source(v_source, sqlerrm);
    end;
    exit when v_left <= 0;
  end loop;
end;
$$;

revoke all on function nightowls._begin_backfill(int) from public;

-- Ends a request: saves the vectors of its answer, or puts its rows back. Returns how many rows were saved. status: of the answer; failure: why there is
-- none. Definer: as _begin_backfill. Services only.
create function nightowls._end_backfill(org uuid, request_id bigint, status int, headers jsonb, body text, failure text)
  returns int
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_request nightowls._embedding_requests;
  v_source  nightowls.embedding_sources;
  v_failure text := _end_backfill.failure;
  v_vectors jsonb;
  v_vector  real[];
  v_place   int := 0;
  v_count   int;
  v_saved   int := 0;
begin
  delete from nightowls._embedding_requests r
   where r.org_id = _end_backfill.org and r.request_id = _end_backfill.request_id
  returning r.* into v_request;
  if not found then
    return 0;
  end if;
  select s.* into v_source from nightowls.embedding_sources s where s.org_id = v_request.org_id and s.name = v_request.source;
  if not found then
    return 0;
  end if;

  if v_failure is null and _end_backfill.status between 200 and 299 then
    begin
      v_vectors := nightowls._embedding_vectors(
        v_source, _end_backfill.body, coalesce((select sum(c)::int from unnest(v_request.chunks) as u (c)), cardinality(v_request.keys)));
    exception when invalid_parameter_value then
      v_failure := sqlerrm;
    end;
  end if;
  if v_vectors is not null then
    perform nightowls._hold_embeddings();
    for v_nth in 1 .. cardinality(v_request.keys) loop
      v_count := coalesce(v_request.chunks[v_nth], 1);
      begin
        v_vector := nightowls._reals(case
          when v_request.chunks is null then v_vectors -> v_place
          else jsonb_path_query_array(v_vectors, '$[$from to $to]', jsonb_build_object('from', v_place, 'to', v_place + v_count - 1)) end);
        v_saved := v_saved + nightowls._save_embedding(v_source.org_id, v_source.name, v_request.keys[v_nth], v_request.claim, v_vector)::int;
      exception when others then
        if sqlstate in ('40001', '40P01', '55P03') then
          -- Somebody else has the row: in a while.
          update nightowls._embedding_pending p
             set claim = null, input_hash = null, due_at = clock_timestamp() + interval '5 seconds', attempts = greatest(p.attempts - 1, 0),
                 error = sqlerrm
           where p.org_id = v_source.org_id and p.source = v_source.name and p.key = v_request.keys[v_nth] and p.claim = v_request.claim;
        else
          -- The table's own triggers or constraints, or the vector: this row's fault.
          perform nightowls._fail_pending(v_source, p.pending_id, sqlerrm)
             from nightowls._embedding_pending p
            where p.org_id = v_source.org_id and p.source = v_source.name and p.key = v_request.keys[v_nth] and p.claim = v_request.claim;
        end if;
      end;
      v_place := v_place + v_count;
    end loop;
    update nightowls._embedding_states t
       set failures = 0, retry_at = null
     where t.org_id = v_source.org_id and t.source = v_source.name and t.failures > 0;
    return v_saved;
  end if;

  -- An answer may repeat what it was sent.
  v_failure := coalesce(
    v_failure,
    format('HTTP %s: %s', _end_backfill.status, nightowls.redact(to_jsonb(left(coalesce(_end_backfill.body, ''), 500))) #>> '{}'));
  perform nightowls._hold_embeddings();
  if _end_backfill.status in (400, 413, 422) and cardinality(v_request.keys) = 1 then
    -- This text is what is not wanted. If it is the same with one after the other, it is not the texts.
    update nightowls._embedding_states t
       set failures = t.failures + 1, last_error = left(v_failure, 1000), failed_at = clock_timestamp(),
           retry_at = case when t.failures > 3 then clock_timestamp() + least(300, power(2, least(t.failures, 12)) / 4) * interval '1 second' end
     where t.org_id = v_source.org_id and t.source = v_source.name;
    perform nightowls._fail_pending(v_source, p.pending_id, v_failure)
       from nightowls._embedding_pending p
      where p.org_id = v_source.org_id and p.source = v_source.name and p.key = v_request.keys[1] and p.claim = v_request.claim;
    return 0;
  end if;
  -- The rows are not to blame, or it is not known which: that is found out one by one.
  update nightowls._embedding_pending p
     set claim = null, input_hash = null, due_at = clock_timestamp(), attempts = greatest(p.attempts - 1, 0), error = left(v_failure, 1000),
         alone = p.alone or _end_backfill.status in (400, 413, 422) is true
   where p.org_id = v_source.org_id and p.source = v_source.name and p.key = any (v_request.keys) and p.claim = v_request.claim;
  if _end_backfill.status in (400, 413, 422) is not true then
    perform nightowls._fail_source(v_source, v_failure, nightowls._retry_after(_end_backfill.headers));
  end if;
  return 0;
end;
$$;

revoke all on function nightowls._end_backfill(uuid, bigint, int, jsonb, text, text) from public;

-- Begins requests as one JSON array; null: nothing is due.
create function nightowls._backfill_requests(max_rows int)
  returns text
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return (select jsonb_agg(to_jsonb(b)) from nightowls._begin_backfill(_backfill_requests.max_rows) b);
end;
$$;

revoke all on function nightowls._backfill_requests(int) from public;

-- Ends them, with the answers in the same order; returns how many rows were saved.
create function nightowls._backfill_answers(requests text, answers text)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_saved bigint := 0;
  v_one   record;
begin
  for v_one in
    select r.value as request, a.value as answer
      from jsonb_array_elements(_backfill_answers.requests::jsonb) with ordinality as r (value, no)
      join jsonb_array_elements(_backfill_answers.answers::jsonb) with ordinality as a (value, no) on a.no = r.no
     order by r.no
  loop
    v_saved := v_saved + nightowls._end_backfill(
      (v_one.request ->> 'org_id')::uuid, (v_one.request ->> 'request_id')::bigint, (v_one.answer ->> 'status')::int, v_one.answer -> 'headers',
      v_one.answer ->> 'body', v_one.answer ->> 'failure');
  end loop;
  return v_saved;
end;
$$;

revoke all on function nightowls._backfill_answers(text, text) from public;

-- By pg_net -------------------------------------------------------------------------------------------------------

-- Whether pg_net is here and lets the owner use it; in this order, as a look at what is in a schema without USAGE raises.
-- Definer: whether the owner may is asked.
create function nightowls._can_net()
  returns boolean
  language plpgsql
  stable
  parallel safe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if to_regnamespace('net') is null then
    return false;
  elsif not has_schema_privilege('net', 'usage') then
    return false;
  end if;
  return coalesce(has_function_privilege(to_regprocedure('net.http_post(text, jsonb, jsonb, jsonb, integer)'), 'execute'), false)
     and coalesce(has_table_privilege(to_regclass('net._http_response'), 'select'), false);
end;
$$;

revoke all on function nightowls._can_net() from public;

-- Ends requests whose answers have come; begins new ones, which leave when this commits. in_flight: how many are still under way.
-- Definer: pg_net and its answers are the owner's.
create function nightowls._backfill_by_net(max_rows int, max_ms int, out saved bigint, out in_flight bigint)
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_until   timestamptz := clock_timestamp() + _backfill_by_net.max_ms * interval '1 millisecond';
  v_one     record;
  v_id      bigint;
  v_org     uuid;
  v_request bigint;
  v_status  int;
  v_headers jsonb;
  v_content text;
  v_failure text;
begin
  saved := 0;
  for v_org, v_request, v_status, v_headers, v_content, v_failure in execute format(
    'select r.org_id, r.request_id, n.status_code, n.headers, n.content, '
    'case when n.status_code is null then coalesce(n.error_msg, ''no answer'') end as failure '
    'from nightowls._embedding_requests r join %s n on n.id = r.net_id '
    'order by r.request_id limit 1000', to_regclass('net._http_response'))
  loop
    exit when clock_timestamp() > v_until;
    saved := saved + nightowls._end_backfill(v_org, v_request, v_status, v_headers, v_content, v_failure);
  end loop;
  -- pg_net forgets what it was to send when the server crashes.
  delete from nightowls._embedding_requests r where r.expires_at < clock_timestamp();
  if clock_timestamp() <= v_until then
    for v_one in select b.* from nightowls._begin_backfill(_backfill_by_net.max_rows) b loop
      execute format('select %s.http_post(url => $1, body => $2, headers => $3, timeout_milliseconds => $4)', to_regnamespace('net'))
         into v_id using v_one.url, v_one.body::jsonb, v_one.headers, v_one.timeout_ms;
      update nightowls._embedding_requests r
         set net_id = v_id
       where r.org_id = v_one.org_id and r.request_id = v_one.request_id;
    end loop;
  end if;
  in_flight := (select count(*) from nightowls._embedding_requests);
end;
$$;

revoke all on function nightowls._backfill_by_net(int, int) from public;

create function nightowls._check_backfill(max_rows int, max_ms int)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if _check_backfill.max_rows is null or _check_backfill.max_ms is null then
    raise exception 'max_rows and max_ms must not be null' using errcode = 'null_value_not_allowed';
  elsif _check_backfill.max_rows not between 1 and 100000 or _check_backfill.max_ms not between 1 and 3600000 then
    raise exception 'max_rows must be between 1 and 100000, max_ms between 1 and 3600000' using errcode = 'invalid_parameter_value';
  elsif nightowls._can_http() then
    return true;
  elsif not nightowls._can_net() then
    raise exception 'this install cannot send requests'
      using errcode = 'feature_not_supported',
            hint = 'Install nightowls as an extension, or pg_net; or let a worker claim_embeddings and save_embedding.';
  end if;
  return false;
end;
$$;

revoke all on function nightowls._check_backfill(int, int) from public;

create function nightowls.backfill_embeddings(max_rows int default 50, max_ms int default 25000)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_requests text;
begin
  if not nightowls._check_backfill(backfill_embeddings.max_rows, backfill_embeddings.max_ms) then
    return (nightowls._backfill_by_net(backfill_embeddings.max_rows, backfill_embeddings.max_ms)).saved;
  end if;
  v_requests := nightowls._backfill_requests(backfill_embeddings.max_rows);
  if v_requests is null then
    return 0;
  end if;
  return nightowls._backfill_answers(v_requests, nightowls._http_post_all(v_requests, backfill_embeddings.max_ms));
end;
$$;

comment on function nightowls.backfill_embeddings(int, int) is
  'Embeds rows that are pending, of all orgs'' sources that have an endpoint, in turn; returns how many vectors were stored. max_rows: how many rows at most; max_ms: for how many milliseconds it may wait for '
  'answers. With the library it sends and waits inside this transaction: run_backfill does not. In the plain install it saves what pg_net has brought for earlier calls, and '
  'hands it new requests, which leave when this commits: call it again. A source whose requests fail is left out for a while (Retry-After is honoured); a row that its endpoint refuses is tried alone, then given '
  'up after max_attempts. For services. Waits for answers, and for open writes to rows it saves. Raises 0A000 in a plain install without pg_net, 22023 or 22004 for an argument that is not valid or null.';

revoke all on function nightowls.backfill_embeddings(int, int) from public;

-- Whether a time is over, and how many milliseconds are left; for procedures, whose operators are the caller's.
create function nightowls._left_ms(until timestamptz)
  returns int
  language sql
  volatile
  parallel safe
  return greatest(0, extract(epoch from until - pg_catalog.clock_timestamp()) * 1000)::int;

revoke all on function nightowls._left_ms(timestamptz) from public;

create function nightowls._after_ms(milliseconds int)
  returns timestamptz
  language sql
  volatile
  parallel safe
  return pg_catalog.clock_timestamp() + milliseconds * interval '1 millisecond';

revoke all on function nightowls._after_ms(int) from public;

-- How many rows the next round is for: 0 when so many are saved, or the time is over.
create function nightowls._next_round(max_rows int, saved bigint, until timestamptz)
  returns int
  language sql
  volatile
  parallel safe
  return case when pg_catalog.clock_timestamp() >= until then 0 else greatest(0, least(400, max_rows - saved))::int end;

revoke all on function nightowls._next_round(int, bigint, timestamptz) from public;

-- It pins no search_path, as a procedure that does may not commit: all it names is qualified.
create procedure nightowls.run_backfill(max_rows int default 1000, max_ms int default 25000)
  language plpgsql
as $$
#variable_conflict use_column
declare
  v_until    timestamptz := nightowls._after_ms(run_backfill.max_ms);
  v_native   boolean := nightowls._check_backfill(run_backfill.max_rows, run_backfill.max_ms);
  v_saved    bigint := 0;
  v_rows     int;
  v_requests text;
  v_net      record;
begin
  loop
    v_rows := nightowls._next_round(run_backfill.max_rows, v_saved, v_until);
    exit when v_rows operator(pg_catalog.=) 0;
    if v_native then
      v_requests := nightowls._backfill_requests(v_rows);
      commit;
      exit when v_requests is null;
      call nightowls._http_exchange(v_requests, nightowls._left_ms(v_until));
      v_saved := v_saved operator(pg_catalog.+) nightowls._backfill_answers(v_requests, nightowls._http_answers());
      commit;
    else
      v_net := nightowls._backfill_by_net(v_rows, nightowls._left_ms(v_until));
      v_saved := v_saved operator(pg_catalog.+) v_net.saved;
      commit;
      exit when v_net.in_flight operator(pg_catalog.=) 0;
      perform pg_catalog.pg_sleep(0.05);
      commit;
    end if;
  end loop;
end;
$$;

comment on procedure nightowls.run_backfill(int, int) is
  'As backfill_embeddings, over and over, and commits between claiming, sending and saving, so that no transaction is open meanwhile: what pg_cron or a CALL from outside runs. It ends when nothing is due, when '
  'max_rows rows were saved, or after max_ms milliseconds. max_rows, max_ms: as said. For services. Waits for answers, and for open writes to rows it saves. Raises 2D000 inside a '
  'transaction block or function, 0A000 in a plain install without pg_net, 22023 or 22004 for an argument that is not valid or null.';

revoke all on procedure nightowls.run_backfill(int, int) from public;

-- Definer: secrets are closed. The caller has checked the org.
create function nightowls._embed(org uuid, source text, input text, max_ms int)
  returns real[]
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_source nightowls.embedding_sources;
  v_call   record;
  v_text   text;
  v_answer jsonb;
begin
  select s.* into v_source from nightowls.embedding_sources s where s.org_id = _embed.org and s.name = _embed.source;
  if not found then
    perform nightowls._refuse_no_source(_embed.org, _embed.source);
  elsif v_source.endpoint is null then
    raise exception 'embedding source "%" has no endpoint', v_source.name
      using errcode = 'object_not_in_prerequisite_state', hint = 'Workers outside make its vectors; give it one with nightowls.alter_embedding_source().';
  end if;
  v_text := nightowls.slice_utf16(_embed.input, 0, coalesce(v_source.chunk_chars, v_source.max_chars));
  if (v_text ~ '\S') is not true then
    raise exception 'input must not be null or blank' using errcode = case when v_text is null then '22004' else '22023' end;
  end if;
  select c.* into v_call from nightowls._endpoint_call(v_source.org_id, v_source.endpoint) c;
  if v_call.missing is not null then
    raise exception '% of endpoint "%" is missing', v_call.missing, v_source.endpoint
      using errcode = 'object_not_in_prerequisite_state', hint = 'Set it, as docs/dispatch.md says.';
  end if;
  v_answer := nightowls._http_post_all(
    jsonb_build_array(jsonb_build_object(
      'url', nightowls._embedding_url(v_source, v_call.url), 'headers', v_call.headers || '{"content-type": "application/json"}',
      'body', nightowls._embedding_body(v_source, array[v_text]), 'timeout_ms', least(v_call.timeout_ms, _embed.max_ms)))::text,
    _embed.max_ms)::jsonb -> 0;
  if v_answer ->> 'failure' is not null then
    raise exception 'endpoint "%" gave no answer', v_source.endpoint
      using errcode = 'system_error', detail = v_answer ->> 'failure';
  elsif (v_answer ->> 'status')::int = 429 then
    raise exception 'endpoint "%" asks for a pause', v_source.endpoint
      using errcode = 'configuration_limit_exceeded',
            detail = coalesce(format('It asks for %s seconds.', nightowls._retry_after(v_answer -> 'headers')), 'It does not say how long.');
  elsif (v_answer ->> 'status')::int not between 200 and 299 then
    raise exception 'endpoint "%" answers HTTP %', v_source.endpoint, v_answer ->> 'status'
      using errcode = 'system_error', detail = nightowls.redact(to_jsonb(left(v_answer ->> 'body', 500))) #>> '{}';
  end if;
  begin
    return nightowls._fit_vector(nightowls._reals(nightowls._embedding_vectors(v_source, v_answer ->> 'body', 1) -> 0), v_source.dimensions);
  exception when data_exception then
    raise exception 'endpoint "%" answers something else than a vector', v_source.endpoint using errcode = 'system_error', detail = sqlerrm;
  end;
end;
$$;

revoke all on function nightowls._embed(uuid, text, text, int) from public;

create function nightowls.embed(source text, input text, max_ms int default 5000, org uuid default null)
  returns real[]
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org uuid := nightowls.current_org(embed.org);
begin
  if not nightowls._can_http() then
    raise exception 'this install cannot send requests while a query waits'
      using errcode = 'feature_not_supported',
            hint = 'Have the query embedded by an edge function or your server, by the same model, and pass the vector; or install nightowls as an extension.';
  elsif embed.max_ms is null then
    raise exception 'max_ms must not be null' using errcode = 'null_value_not_allowed';
  elsif embed.max_ms not between 1 and 600000 then
    raise exception 'max_ms must be between 1 and 600000' using errcode = 'invalid_parameter_value';
  end if;
  return nightowls._embed(v_org, embed.source, embed.input, embed.max_ms);
end;
$$;

comment on function nightowls.embed(text, text, int, uuid) is
  'The vector of a text by a source''s endpoint and model, for a search: as long as the stored ones. source: the embedding source; input: the text, cut as the source''s are; max_ms: for how many milliseconds it may wait; '
  'org: the tenant. In a query put it into a subselect, (select nightowls.embed(…)), so that it is asked once. Extension only. For services. Waits for the answer, in this transaction. Raises 0A000 in the plain install, '
  '53400 if the endpoint answers 429, 58000 if it answers anything else but a vector, or nothing in time, 55000 if the source has no endpoint or a secret is missing, 22023 or 22004 for an argument that is not '
  'valid, blank or null, NW007 if there is no such source or endpoint, NW010 if there is no org.';

revoke all on function nightowls.embed(text, text, int, uuid) from public;

-- For the clock: without HTTP where the worker or run_backfill sends, by pg_net where that does.
create function nightowls._tick_embeddings(max_ms int)
  returns table (did bigint, detail jsonb)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_net record;
begin
  did := nightowls._expire_requests();
  detail := '{}';
  if not nightowls._can_http() and nightowls._can_net() then
    v_net := nightowls._backfill_by_net(200, _tick_embeddings.max_ms);
    did := did + v_net.saved;
    detail := jsonb_build_object('in_flight', v_net.in_flight);
  end if;
  return next;
end;
$$;

revoke all on function nightowls._tick_embeddings(int) from public;

-- Forgets requests that nobody ended, as their rows' claims have run out, and moves the marks of all lines. Definer: nobody else may write to the tables.
create function nightowls._expire_requests()
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
  delete from nightowls._embedding_requests r
   where (r.org_id, r.request_id) in (
           select x.org_id, x.request_id from nightowls._embedding_requests x where x.expires_at < clock_timestamp() for update skip locked);
  get diagnostics v_count = row_count;
  perform nightowls._move_embedding_mark(s.org_id, s.name) from nightowls.embedding_sources s;
  return v_count;
end;
$$;

revoke all on function nightowls._expire_requests() from public;

create function nightowls._health_embeddings()
  returns setof nightowls._check
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
  v_failing  text;
  v_given_up text;
  v_guards   text;
begin
  select string_agg(format('%s: %s', t.source, t.last_error), '; ' order by t.source) filter (where t.failures >= 3) into v_failing
    from nightowls._embedding_states t;
  select string_agg(format('%s: %s', x.source, case when x.rows > 1000 then 'more than 1000' else x.rows::text end), ', ' order by x.source) into v_given_up
    from (select s.name as source,
                 (select count(*) from (select from nightowls._embedding_pending p
                                         where p.org_id = s.org_id and p.source = s.name and p.due_at = 'infinity' order by p.due_at limit 1001) c) as rows
            from nightowls.embedding_sources s) x
   where x.rows > 0;
  select string_agg(s.name, ', ' order by s.name) into v_guards
    from nightowls.embedding_sources s
   where (select count(*) from pg_trigger t
           where t.tgrelid = to_regclass(s.source_table) and t.tgenabled in ('O', 'A') and t.tgparentid = 0
             and t.tgname in (s.trigger_name || '_1', s.trigger_name || '_2', s.trigger_name || '_3')) < 3;
  return query
    select 'embeddings', 'requests', v_failing is null, coalesce(v_failing, 'the last requests of all sources were answered'),
           case when v_failing is not null then 'They are tried again, less and less often; retry_embeddings(source) tries at once.' end
     union all
    select 'embeddings', 'given_up', v_given_up is null, coalesce('rows given up: ' || v_given_up, 'no rows were given up'),
           case when v_given_up is not null then 'View failed_embeddings says why; retry_embeddings(source) tries again.' end
     union all
    select 'embeddings', 'triggers', v_guards is null, coalesce('missing or switched off: ' || v_guards, 'all are there'),
           case when v_guards is not null
                then 'Changes are not noticed. Switch them on (alter table … enable trigger all), or drop the source and make it again; then rescan_embeddings(source).' end;
end;
$$;

revoke all on function nightowls._health_embeddings() from public;

create function nightowls._metrics_embeddings()
  returns table (metric text, kind text, help text, labels jsonb, value numeric)
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_bitmapscan to off
  set enable_sort to off
as $$
#variable_conflict use_column
begin
  return query
    select m.metric, 'gauge', m.help, jsonb_build_object('org', s.org_id, 'source', s.name), m.value
      from nightowls.embedding_sources s
      left join nightowls._embedding_states t on t.org_id = s.org_id and t.source = s.name
     cross join lateral (
       values ('embeddings_pending', 'Rows that are to be embedded; 10001 stands for more than 10000.',
               (select count(*) from (select from nightowls._embedding_pending p
                                       where p.org_id = s.org_id and p.source = s.name and p.due_at < 'infinity'
                                         and p.due_at >= nightowls._embedding_mark(s.org_id, s.name) order by p.due_at limit 10001) c)::numeric),
              ('embeddings_given_up', 'Rows that could not be embedded; 10001 stands for more than 10000.',
               (select count(*) from (select from nightowls._embedding_pending p
                                       where p.org_id = s.org_id and p.source = s.name and p.due_at = 'infinity' order by p.due_at limit 10001) c)::numeric),
              ('embeddings_failures', 'Requests that failed since one was answered.', coalesce(t.failures, 0)::numeric)) m (metric, help, value)
     order by m.metric, s.org_id, s.name;
end;
$$;

revoke all on function nightowls._metrics_embeddings() from public;

alter table nightowls._embedding_requests enable row level security;
alter table nightowls._embedding_requests force row level security;
create policy service_all on nightowls._embedding_requests
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));
