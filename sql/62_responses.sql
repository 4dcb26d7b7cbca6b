-- Responses: what came of requests, and what follows from it.

create table nightowls.responses (
  org_id      uuid        not null,
  response_id bigint      not null generated always as identity,
  endpoint_id int         not null,
  request_id  bigint      not null,
  webhook_id  text        not null,
  attempt     int         not null,
  result      text        not null,
  status      int,
  error       text,
  headers     jsonb,
  body        text,
  truncated   boolean     not null default false,
  took_ms     int,
  enqueued_at timestamptz,
  received_at timestamptz not null default clock_timestamp(),
  "position"  bigint,
  constraint responses_pkey primary key (org_id, response_id)
);

create index responses_request_id_idx on nightowls.responses (org_id, endpoint_id, request_id);
create index responses_received_at_idx on nightowls.responses (org_id, endpoint_id, received_at);

comment on table nightowls.responses is 'What came of each attempt to send a request, for the endpoint''s retention. Secrets in a response are replaced by [redacted].';
comment on column nightowls.responses.org_id is 'The tenant.';
comment on column nightowls.responses.response_id is 'Its number.';
comment on column nightowls.responses.endpoint_id is 'The endpoint.';
comment on column nightowls.responses.request_id is 'The request, as enqueue_request returned it.';
comment on column nightowls.responses.webhook_id is 'The request''s id as the receiver sees it.';
comment on column nightowls.responses.attempt is 'Which attempt it was: 1, 2, 3 …';
comment on column nightowls.responses.result is
  'delivered; retry: it is sent again; dead: it is a dead letter; late: its lease had run out, so nothing followed.';
comment on column nightowls.responses.status is 'The HTTP status; null: there was no response.';
comment on column nightowls.responses.error is 'What was wrong.';
comment on column nightowls.responses.headers is 'Some of the response''s headers: content-type, retry-after, location and what names a request.';
comment on column nightowls.responses.body is 'The response''s body, as text.';
comment on column nightowls.responses.truncated is 'Whether there was more of it.';
comment on column nightowls.responses.took_ms is 'How long it took, in milliseconds.';
comment on column nightowls.responses.enqueued_at is 'When the request was put in.';
comment on column nightowls.responses.received_at is 'When the response was written down.';
comment on column nightowls.responses."position" is 'The event that the request was made of.';

-- What came of a request, as its sender says it.
create type nightowls._request_outcome as (
  org_id      uuid,
  endpoint_id int,
  request_id  bigint,
  receipt     uuid,
  attempt     int,
  webhook_id  text,
  status      int,
  headers     jsonb,
  body        text,
  truncated   boolean,
  error       text,
  retryable   boolean,
  blameless   boolean,
  took_ms     int,
  enqueued_at timestamptz,
  "position"  bigint
);

-- Seconds that Retry-After asks for, at most a day; null if it says nothing that can be understood.
create function nightowls._retry_after(value text)
  returns int
  language plpgsql
  volatile
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_parts text[];
begin
  if btrim(_retry_after.value) ~ '^[0-9]{1,18}$' then
    return least(btrim(_retry_after.value)::bigint, 86400);
  end if;
  v_parts := regexp_match(_retry_after.value, '([0-9]{2}) (Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec) ([0-9]{4}) ([0-9:]{8}) GMT$');
  if v_parts is null then
    return null;
  end if;
  return least(greatest(ceil(extract(epoch from
           format('%s-%s-%s %s+00', v_parts[3], lpad((strpos('JanFebMarAprMayJunJulAugSepOctNovDec', v_parts[2]) / 3 + 1)::text, 2, '0'), v_parts[1],
                  v_parts[4])::timestamptz - clock_timestamp())), 0), 86400)::int;
exception when datetime_field_overflow or invalid_datetime_format then
  return null;
end;
$$;

revoke all on function nightowls._retry_after(text) from public;

-- A text without secrets. What is shorter than 6 bytes is none.
create function nightowls._scrub(content text, secrets text[])
  returns text
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_secret text;
begin
  foreach v_secret in array coalesce(_scrub.secrets, '{}') loop
    if octet_length(v_secret) >= 6 then
      _scrub.content := replace(_scrub.content, v_secret, '[redacted]');
    end if;
  end loop;
  return _scrub.content;
end;
$$;

revoke all on function nightowls._scrub(text, text[]) from public;

-- All that an endpoint sends as a secret: header values, also without the scheme before them, and the key that it signs with, longest first.
-- Definer: secrets are closed.
create function nightowls._endpoint_secret_texts(endpoint nightowls.endpoints)
  returns text[]
  language plpgsql
  stable
  parallel restricted
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_call record;
begin
  if (_endpoint_secret_texts.endpoint).secrets_in is null and (_endpoint_secret_texts.endpoint).bearer is null then
    return '{}';
  end if;
  select c.* into v_call
    from nightowls._endpoint_call((_endpoint_secret_texts.endpoint).org_id, (_endpoint_secret_texts.endpoint).name) c;
  return array(
    select s.secret
      from (select h.value as secret from jsonb_each_text(v_call.headers) as h (name, value)
             union
            select regexp_replace(h.value, '^[A-Za-z]+ +', '') from jsonb_each_text(v_call.headers) as h (name, value)
             union
            select v_call.secret
             union
            select regexp_replace(v_call.secret, '^whsec_', '')) s
     where s.secret <> ''
     order by length(s.secret) desc);
end;
$$;

revoke all on function nightowls._endpoint_secret_texts(nightowls.endpoints) from public;

-- Sends a response to the queue that wants it, once for a request. Returns what was wrong, if anything.
create function nightowls._reply(endpoint nightowls.endpoints, outcome nightowls._request_outcome, body text, retention interval)
  returns text
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_body  jsonb := to_jsonb(_reply.body);
  v_error text;
begin
  if (_reply.outcome).truncated is not true and _reply.body ~ '^\s*[\[{"0-9tfn-]' then
    begin
      v_body := _reply.body::jsonb;
      if nightowls._is_too_deep(jsonb_build_object('body', v_body)) then
        v_body := to_jsonb(_reply.body);
      end if;
    exception when others then
      v_body := to_jsonb(_reply.body);
    end;
  end if;
  begin
    perform nightowls._send_batch(
      (_reply.endpoint).org_id, (_reply.endpoint).reply_queue,
      array[jsonb_build_object(
        'endpoint', (_reply.endpoint).name, 'request_id', (_reply.outcome).request_id, 'webhook_id', (_reply.outcome).webhook_id,
        'status', (_reply.outcome).status, 'body', v_body, 'truncated', coalesce((_reply.outcome).truncated, false),
        'attempt', (_reply.outcome).attempt)],
      0, case when (_reply.outcome)."position" is not null then array[jsonb_build_object('nightowls_reply', (_reply.outcome)."position")] end,
      array[(_reply.outcome).webhook_id], greatest(_reply.retention, interval '1 day'), null, 0);
  exception when sqlstate 'NW007' or sqlstate 'NW002' or program_limit_exceeded then
    get stacked diagnostics v_error = message_text;
  end;
  return v_error;
end;
$$;

revoke all on function nightowls._reply(nightowls.endpoints, nightowls._request_outcome, text, interval) from public;

-- What came of requests of one endpoint. What was delivered is done whoever has it leased meanwhile; anything else counts only while the lease holds.
create function nightowls._settle_endpoint(endpoint nightowls.endpoints, outcomes nightowls._request_outcome[])
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
declare
  v_queue    nightowls.queues := nightowls._queue((_settle_endpoint.endpoint).org_id, nightowls._endpoint_queue((_settle_endpoint.endpoint).name));
  v_state    nightowls._endpoint_states;
  v_before   nightowls._endpoint_states;
  v_outcome  nightowls._request_outcome;
  v_secrets  text[] := nightowls._endpoint_secret_texts(_settle_endpoint.endpoint);
  v_done     bigint[] := '{}';
  v_results  text[] := '{}';
  v_errors   text[] := '{}';
  v_bodies   text[] := '{}';
  v_result   text;
  v_error    text;
  v_body     text;
  v_pause    int;
  v_erased   bigint[] := '{}';
  v_count    bigint := 0;
begin
  perform pg_advisory_xact_lock(nightowls._lock_class(272), (_settle_endpoint.endpoint).endpoint_id);
  v_before := nightowls._endpoint_state((_settle_endpoint.endpoint).org_id, (_settle_endpoint.endpoint).endpoint_id);
  v_state := v_before;

  v_done := nightowls._finish_many(
    v_queue.org_id, v_queue.name,
    array(select distinct o.request_id from unnest(_settle_endpoint.outcomes) o where o.status between 200 and 299 order by 1), null, false, null);
  -- Of an event that is erased, or is being, nothing is kept.
  if exists (select from unnest(_settle_endpoint.outcomes) o where o."position" is not null) then
    if nightowls._try_share_erasure(v_queue.org_id) then
      v_erased := array(
        select e."position"
          from unnest(_settle_endpoint.outcomes) o
         cross join lateral (
                 select a."position"
                   from nightowls.all_events a
                  where a.org_id = v_queue.org_id and a."position" = o."position" and a.event_type = 'nightowls.erased'
                 offset 0) e);
    else
      v_erased := array(select o."position" from unnest(_settle_endpoint.outcomes) o);
    end if;
  end if;

  foreach v_outcome in array _settle_endpoint.outcomes loop
    v_error := v_outcome.error;
    v_body := case when v_outcome."position" = any (v_erased) then null else nightowls._scrub(v_outcome.body, v_secrets) end;
    v_pause := null;
    if v_outcome.status between 200 and 299 then
      v_result := case when v_outcome.request_id = any (v_done) then 'delivered' else 'late' end;
      v_done := array_remove(v_done, v_outcome.request_id);
      if v_result = 'delivered' and (_settle_endpoint.endpoint).reply_queue is not null then
        v_error := nightowls._reply(_settle_endpoint.endpoint, v_outcome, v_body, v_queue.retention);
        v_error := 'the reply was not sent: ' || v_error;
      end if;
      v_state.failures := 0;
      v_state.breaks := 0;
      if v_state.probing then
        v_state.open_until := null;
        v_state.probing := false;
      end if;
    else
      v_error := coalesce(
        nightowls._scrub(v_error, v_secrets),
        'HTTP ' || v_outcome.status || case when v_outcome.status between 300 and 399 then ': redirects are not followed' else '' end);
      if v_outcome.status is null and v_outcome.retryable is not false
         or v_outcome.status in (408, 425, 429) or v_outcome.status >= 500 then
        v_pause := case when v_outcome.status in (429, 503) then nightowls._retry_after(v_outcome.headers ->> 'retry-after') end;
        v_result := case when nightowls._nack(v_queue.org_id, v_queue.name, v_outcome.request_id, v_outcome.receipt, v_error,
                                              case when v_outcome.blameless then 0 else v_pause end) then 'retry' else 'late' end;
        if v_outcome.blameless is not true then
          v_state.failures := v_state.failures + 1;
          if (_settle_endpoint.endpoint).break_after > 0 and v_state.failures >= (_settle_endpoint.endpoint).break_after
             and (v_state.open_until is null or v_state.open_until <= clock_timestamp() or v_state.probing) then
            v_state.open_until := clock_timestamp() + (_settle_endpoint.endpoint).break_for * power(2, least(v_state.breaks, 5));
            v_state.breaks := v_state.breaks + 1;
            v_state.probing := false;
          end if;
          if v_outcome.status = 429 and v_pause > 0 then
            -- It is the sender that is asked to wait, not one request.
            v_state.open_until := greatest(v_state.open_until, clock_timestamp() + make_interval(secs => least(v_pause, 3600)));
          end if;
        end if;
      else
        v_result := case when nightowls._bury_request(v_queue, v_outcome.request_id, v_outcome.receipt, v_error) then 'dead' else 'late' end;
        if v_outcome.status is not null then
          -- It is there, and answers.
          v_state.failures := 0;
          v_state.breaks := 0;
          if v_state.probing then
            v_state.open_until := null;
            v_state.probing := false;
          end if;
        end if;
      end if;
    end if;
    v_count := v_count + (v_result <> 'late')::int;
    v_results := v_results || v_result;
    v_errors := v_errors || v_error;
    v_bodies := v_bodies || v_body;
  end loop;

  insert into nightowls.responses
         (org_id, endpoint_id, request_id, webhook_id, attempt, result, status, error, headers, body, truncated, took_ms, enqueued_at, "position")
  select o.org_id, o.endpoint_id, o.request_id, o.webhook_id, o.attempt,
         -- The last attempt makes a dead letter.
         case when r.result = 'retry' and o.attempt >= v_queue.max_attempts then 'dead' else r.result end,
         o.status, left(r.error, 1024),
         (select jsonb_object_agg(h.name, nightowls._scrub(left(h.value, 1024), v_secrets))
            from jsonb_each_text(o.headers) as h (name, value)
           where h.name in ('content-type', 'retry-after', 'location', 'x-request-id', 'x-amzn-requestid', 'cf-ray', 'traceparent')),
         r.body, coalesce(o.truncated, false), o.took_ms, o.enqueued_at, o."position"
    from unnest(_settle_endpoint.outcomes) with ordinality as o
   cross join lateral (select v_results[o.ordinality] as result, v_errors[o.ordinality] as error, v_bodies[o.ordinality] as body offset 0) r;

  if v_state is distinct from v_before then
    perform nightowls._set_endpoint_state(v_state);
  end if;
  return v_count;
end;
$$;

revoke all on function nightowls._settle_endpoint(nightowls.endpoints, nightowls._request_outcome[]) from public;

-- Makes a dead letter of a request, if its sender still has it.
create function nightowls._bury_request(queue nightowls.queues, request_id bigint, receipt uuid, error text)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_bitmapscan to off
  set plan_cache_mode to force_generic_plan
as $$
#variable_conflict use_column
begin
  perform from nightowls.queue_messages m
    where m.org_id = (_bury_request.queue).org_id and m.queue_id = (_bury_request.queue).queue_id and m.msg_id = _bury_request.request_id
      and m.receipt = _bury_request.receipt and m.lease_until > clock_timestamp()
      for update;
  if not found then
    return false;
  end if;
  perform nightowls._bury(_bury_request.queue, _bury_request.request_id, _bury_request.error);
  return true;
end;
$$;

revoke all on function nightowls._bury_request(nightowls.queues, bigint, uuid, text) from public;

-- Settles what senders have sent: delivered, to be sent again, or dead. outcomes: an array of _request_outcome, in the order in which they came, of no
-- more than 24 endpoints, as each is locked. Returns how many counted; of an endpoint that is gone none do.
-- Definer: the tables are closed.
create function nightowls._settle_requests(outcomes jsonb)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
declare
  v_all      nightowls._request_outcome[];
  v_endpoint nightowls.endpoints;
  v_count    bigint := 0;
begin
  if current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
    raise exception 'nothing can be settled at isolation level %', current_setting('transaction_isolation')
      using errcode = 'active_sql_transaction', hint = 'Use read committed.';
  end if;
  v_all := array(
    select jsonb_populate_record(null::nightowls._request_outcome, u.outcome)
      from jsonb_array_elements(_settle_requests.outcomes) with ordinality as u (outcome, nth)
     order by u.nth);
  for v_endpoint in
    select e.*
      from (select distinct o.org_id, o.endpoint_id from unnest(v_all) o) o
     cross join lateral (
             select x.* from nightowls.endpoints x where x.org_id = o.org_id and x.endpoint_id = o.endpoint_id offset 0) e
     order by e.endpoint_id
  loop
    v_count := v_count + nightowls._settle_endpoint(
      v_endpoint, array(select o from unnest(v_all) o where o.endpoint_id = v_endpoint.endpoint_id));
  end loop;
  return v_count;
end;
$$;

revoke all on function nightowls._settle_requests(jsonb) from public;

-- Dead letters ------------------------------------------------------------------------------------

-- Definer: the tables are closed.
create function nightowls._redrive_requests(org uuid, endpoint text, qty int)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_endpoint nightowls.endpoints := nightowls._endpoint(_redrive_requests.org, _redrive_requests.endpoint);
  v_state    nightowls._endpoint_states;
begin
  perform pg_advisory_xact_lock(nightowls._lock_class(272), v_endpoint.endpoint_id);
  v_state := nightowls._endpoint_state(v_endpoint.org_id, v_endpoint.endpoint_id);
  if v_state.failures > 0 or v_state.open_until is not null then
    v_state.failures := 0;
    v_state.breaks := 0;
    v_state.open_until := null;
    v_state.probing := false;
    perform nightowls._set_endpoint_state(v_state);
  end if;
  return nightowls._redrive(v_endpoint.org_id, nightowls._endpoint_queue(v_endpoint.name), _redrive_requests.qty);
end;
$$;

revoke all on function nightowls._redrive_requests(uuid, text, int) from public;

create function nightowls.redrive_requests(endpoint text, qty int default null, org uuid default null)
  returns bigint
  language sql
  volatile
  parallel unsafe
  return nightowls._redrive_requests(nightowls.current_org(redrive_requests.org), redrive_requests.endpoint, redrive_requests.qty);

comment on function nightowls.redrive_requests(text, int, uuid) is
  'Sends an endpoint''s dead letters again and returns how many. They keep their webhook-id and are counted from 0 again; if nothing was sent because of failures, that ends. '
  'endpoint: its name; qty: at most so many, the oldest first, by default all; org: the tenant. For services. Waits for who leases from the endpoint or settles it. Raises NW007 if the endpoint does '
  'not exist, 22023 if qty is negative, NW010 if there is no org.';

revoke all on function nightowls.redrive_requests(text, int, uuid) from public;

-- Erasure and retention ---------------------------------------------------------------------------

-- What was answered to requests that were made of an erased aggregate's events.
-- Definer: the table is closed.
create function nightowls._erase_responses(org uuid, aggregate_type text, aggregate_id text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  update nightowls.responses r
     set body = null, error = null, headers = null
   where r.org_id = _erase_responses.org and r."position" is not null and (r.body is not null or r.error is not null or r.headers is not null)
     and exists (
           select from nightowls.all_events e
            where e.org_id = r.org_id and e."position" = r."position"
              and e.aggregate_type = _erase_responses.aggregate_type and e.aggregate_id = _erase_responses.aggregate_id);
  -- Answers that went to queues.
  update nightowls.queue_messages m
     set message = m.message || '{"body": null}', last_error = null
   where m.org_id = _erase_responses.org and m.headers ? 'nightowls_reply'
     and exists (
           select from nightowls.all_events e
            where e.org_id = m.org_id and e."position" = (m.headers ->> 'nightowls_reply')::bigint
              and e.aggregate_type = _erase_responses.aggregate_type and e.aggregate_id = _erase_responses.aggregate_id);
  update nightowls.queue_archive a
     set message = a.message || '{"body": null}', last_error = null
   where a.org_id = _erase_responses.org and a.headers ? 'nightowls_reply'
     and exists (
           select from nightowls.all_events e
            where e.org_id = a.org_id and e."position" = (a.headers ->> 'nightowls_reply')::bigint
              and e.aggregate_type = _erase_responses.aggregate_type and e.aggregate_id = _erase_responses.aggregate_id);
end;
$$;

revoke all on function nightowls._erase_responses(uuid, text, text) from public;

-- Removes responses whose time is over, at most 1,000 of an endpoint at a time, and old states. Definer: the tables are closed.
create function nightowls._prune_responses(max_ms int)
  returns bigint
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
  v_until    timestamptz := clock_timestamp() + make_interval(secs => _prune_responses.max_ms / 1000.0);
  v_endpoint record;
  v_count    bigint;
  v_total    bigint := 0;
begin
  for v_endpoint in
    select e.org_id, e.endpoint_id, q.retention
      from (select x.org_id, x.endpoint_id from nightowls.endpoints x order by random()) e
     cross join lateral (
             select x.retention from nightowls.queues x where x.org_id = e.org_id and x.queue_id = -e.endpoint_id offset 0) q
  loop
    loop
      delete from nightowls.responses r
       where r.ctid = any (array(
               select o.ctid
                 from nightowls.responses o
                where o.org_id = v_endpoint.org_id and o.endpoint_id = v_endpoint.endpoint_id
                  and o.received_at <= clock_timestamp() - v_endpoint.retention
                order by o.received_at
                limit 1000
                  for update skip locked));
      get diagnostics v_count = row_count;
      v_total := v_total + v_count;
      exit when v_count < 1000 or clock_timestamp() > v_until;
    end loop;
    delete from nightowls._endpoint_states s
     where s.ctid = any (array(
             select o.ctid
               from nightowls._endpoint_states o
              where o.org_id = v_endpoint.org_id and o.endpoint_id = v_endpoint.endpoint_id
                and exists (
                      select from nightowls._endpoint_states n
                       where n.org_id = o.org_id and n.endpoint_id = o.endpoint_id and n.state_id > o.state_id)
              limit 1000
                for update skip locked));
    exit when clock_timestamp() > v_until;
  end loop;
  return v_total;
end;
$$;

revoke all on function nightowls._prune_responses(int) from public;

alter table nightowls.responses enable row level security;
alter table nightowls.responses force row level security;
create policy service_all on nightowls.responses
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));
