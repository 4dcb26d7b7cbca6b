-- Requests: put in, bound to events, leased to who sends them.

-- A request's id as the receiver sees it: the same with each attempt, so that it can tell a repetition.
create function nightowls._webhook_id(org uuid, queue_id int, msg_id bigint, headers jsonb)
  returns text
  language sql
  immutable
  parallel safe
  return 'msg_' || coalesce(replace(headers ->> 'webhook_id', '-', ''), md5(concat(org, '/', queue_id, '/', msg_id)));

revoke all on function nightowls._webhook_id(uuid, int, bigint, jsonb) from public;

-- W3C trace context from what a header or an event's metadata says; null if that is nothing of the kind.
create function nightowls._traceparent(headers jsonb, metadata jsonb, webhook_id text)
  returns text
  language sql
  immutable
  parallel safe
  return case
    when coalesce(headers ->> 'traceparent', metadata ->> 'traceparent') ~ '^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$'
      then coalesce(headers ->> 'traceparent', metadata ->> 'traceparent')
    when replace(metadata ->> 'trace_id', '-', '') ~ '^[0-9a-f]{32}$' and replace(metadata ->> 'trace_id', '-', '') !~ '^0+$'
      then concat('00-', replace(metadata ->> 'trace_id', '-', ''), '-', left(md5(webhook_id), 16), '-01')
  end;

revoke all on function nightowls._traceparent(jsonb, jsonb, text) from public;

create function nightowls._enqueue_requests(
  org         uuid,
  endpoint    text,
  bodies      jsonb[],
  dedup_keys  text[],
  run_at      timestamptz,
  traceparent text
)
  returns bigint[]
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_delay   numeric := 0;
  v_headers jsonb[];
begin
  if _enqueue_requests.bodies is null then
    raise exception 'bodies must not be null' using errcode = 'null_value_not_allowed';
  elsif _enqueue_requests.run_at is not null then
    v_delay := case when isfinite(_enqueue_requests.run_at)
                    then greatest(ceil(extract(epoch from _enqueue_requests.run_at - clock_timestamp())), 0) end;
    if v_delay is null or v_delay > 2147483647 then
      raise exception 'run_at is too far away' using errcode = 'invalid_parameter_value', hint = 'At most 68 years.';
    end if;
  end if;
  if _enqueue_requests.traceparent !~ '^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$' then
    raise exception 'traceparent is not valid' using errcode = 'invalid_parameter_value', hint = 'As W3C Trace Context writes it: 00-…-…-01.';
  end if;
  if not exists (
       select from nightowls.endpoints e
        where e.org_id = _enqueue_requests.org and e.name = nightowls._queue_name(_enqueue_requests.endpoint)) then
    perform nightowls._endpoint(_enqueue_requests.org, _enqueue_requests.endpoint);
  end if;
  v_headers := array(
    select jsonb_strip_nulls(jsonb_build_object('webhook_id', gen_random_uuid(), 'traceparent', _enqueue_requests.traceparent))
      from unnest(_enqueue_requests.bodies));
  if v_delay = 0 then
    perform nightowls._wake('dispatch', 1);
  end if;
  return nightowls._send_batch(
    _enqueue_requests.org, nightowls._endpoint_queue(_enqueue_requests.endpoint), _enqueue_requests.bodies, v_delay::int, v_headers,
    _enqueue_requests.dedup_keys, null, null, 0);
end;
$$;

revoke all on function nightowls._enqueue_requests(uuid, text, jsonb[], text[], timestamptz, text) from public;

create function nightowls.enqueue_request(
  endpoint    text,
  body        jsonb,
  dedup_key   text default null,
  run_at      timestamptz default null,
  traceparent text default null,
  org         uuid default null
)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return (nightowls._enqueue_requests(
    nightowls.current_org(enqueue_request.org), enqueue_request.endpoint, array[enqueue_request.body],
    case when enqueue_request.dedup_key is not null then array[enqueue_request.dedup_key] end, enqueue_request.run_at,
    enqueue_request.traceparent))[1];
end;
$$;

comment on function nightowls.enqueue_request(text, jsonb, text, timestamptz, text, uuid) is
  'Puts a request in an endpoint''s outbox and returns its number: a POST of the body as JSON, sent when this transaction has committed, at least once, always with '
  'the same webhook-id, until an answer of 2xx or until it is a dead letter. endpoint: its name; body: any JSON; dedup_key: a key that is known, within the endpoint''s '
  'dedup_for, sends nothing and returns the first number; run_at: not before then, to the second above; traceparent: sent as that header; org: the tenant. For services. Waits for '
  'nobody but who sends with the same dedup_key. Raises NW007 if the endpoint does not exist, NW002 if the dedup_key is known with another body, 22004 if body is null, 22023 for an argument '
  'that is not valid, 54000 for one that is too long, too large or too deep, NW010 if there is no org.';

revoke all on function nightowls.enqueue_request(text, jsonb, text, timestamptz, text, uuid) from public;

create function nightowls.enqueue_requests(
  endpoint   text,
  bodies     jsonb[],
  dedup_keys text[] default null,
  run_at     timestamptz default null,
  org        uuid default null
)
  returns setof bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return query
    select u.request_id
      from unnest(nightowls._enqueue_requests(
             nightowls.current_org(enqueue_requests.org), enqueue_requests.endpoint, enqueue_requests.bodies, enqueue_requests.dedup_keys,
             enqueue_requests.run_at, null)) as u (request_id);
end;
$$;

comment on function nightowls.enqueue_requests(text, jsonb[], text[], timestamptz, uuid) is
  'As enqueue_request, for many bodies at once: returns their numbers, in order. dedup_keys: one for each body, or left out. Raises what enqueue_request raises, and 22023 for '
  'arrays of different lengths.';

revoke all on function nightowls.enqueue_requests(text, jsonb[], text[], timestamptz, uuid) from public;

create function nightowls.bind_endpoint(endpoint text, filter jsonb default null, ordered boolean default false, org uuid default null)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org uuid := nightowls.current_org(bind_endpoint.org);
begin
  if bind_endpoint.ordered is null then
    raise exception 'ordered must not be null' using errcode = 'null_value_not_allowed';
  end if;
  perform nightowls._bind(
    v_org, nightowls._endpoint_queue((nightowls._endpoint(v_org, bind_endpoint.endpoint)).name), bind_endpoint.filter,
    case when bind_endpoint.ordered then 'aggregate' else 'none' end);
end;
$$;

comment on function nightowls.bind_endpoint(text, jsonb, boolean, uuid) is
  'From now on events that match become requests of an endpoint, in the transaction that appends them: both commit or neither. The body is {"position", "aggregate_type", '
  '"aggregate_id", "version", "event_type", "payload", "metadata", "event_id", "created_at"}; the event''s traceparent or trace_id goes out as header traceparent. What bind says of '
  'queues is true of it. endpoint: its name; filter: {"aggregate_types": […], "event_types": […]}, null for all events; ordered: events of one aggregate are sent in their order, one at a '
  'time, so one that fails holds up those behind it; org: the tenant. For services. Binding again changes nothing. Waits for another change of the endpoint''s bindings, and for open '
  'appends above read committed. Raises NW007 if the endpoint does not exist, 42710 if it is bound to the same events otherwise, 22004, 22023 or 54000 for an argument that is null, '
  'not valid or too long, NW010 if there is no org.';

revoke all on function nightowls.bind_endpoint(text, jsonb, boolean, uuid) from public;

create function nightowls.unbind_endpoint(endpoint text, filter jsonb default null, org uuid default null)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org uuid := nightowls.current_org(unbind_endpoint.org);
begin
  return nightowls._unbind(
    v_org, nightowls._endpoint_queue((nightowls._endpoint(v_org, unbind_endpoint.endpoint)).name), unbind_endpoint.filter);
end;
$$;

comment on function nightowls.unbind_endpoint(text, jsonb, uuid) is
  'Ends what bind_endpoint began, and returns how many bindings are gone; requests that wait are sent. endpoint: its name; filter: that of the binding, {} for the one of all '
  'events; null takes off every binding; org: the tenant. For services. Waits for another change of the endpoint''s bindings. Raises NW007 if the endpoint does not exist, 22023 if the '
  'filter is not valid, NW010 if there is no org.';

revoke all on function nightowls.unbind_endpoint(text, jsonb, uuid) from public;

-- Leasing -----------------------------------------------------------------------------------------

-- The newest state of an endpoint; one of nulls and zeroes if there is none.
create function nightowls._endpoint_state(org uuid, endpoint_id int)
  returns nightowls._endpoint_states
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_sort to off
  set enable_bitmapscan to off
  set plan_cache_mode to force_generic_plan
as $$
#variable_conflict use_column
declare
  v_state nightowls._endpoint_states;
begin
  select s.* into v_state
    from nightowls._endpoint_states s
   where s.org_id = _endpoint_state.org and s.endpoint_id = _endpoint_state.endpoint_id
   order by s.state_id desc
   limit 1;
  v_state.org_id := _endpoint_state.org;
  v_state.endpoint_id := _endpoint_state.endpoint_id;
  v_state.failures := coalesce(v_state.failures, 0);
  v_state.breaks := coalesce(v_state.breaks, 0);
  v_state.probing := coalesce(v_state.probing, false);
  v_state.window_used := coalesce(v_state.window_used, 0);
  return v_state;
end;
$$;

revoke all on function nightowls._endpoint_state(uuid, int) from public;

-- Writes a new state and removes the one it was made of without waiting for anybody. The endpoint is locked (class 272).
create function nightowls._set_endpoint_state(state nightowls._endpoint_states)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_sort to off
  set enable_bitmapscan to off
  set plan_cache_mode to force_generic_plan
as $$
#variable_conflict use_column
begin
  insert into nightowls._endpoint_states (org_id, endpoint_id, failures, breaks, open_until, probing, window_used, last_sent_at)
  values ((_set_endpoint_state.state).org_id, (_set_endpoint_state.state).endpoint_id, (_set_endpoint_state.state).failures,
          (_set_endpoint_state.state).breaks, (_set_endpoint_state.state).open_until, (_set_endpoint_state.state).probing, (_set_endpoint_state.state).window_used,
          (_set_endpoint_state.state).last_sent_at);
  -- The one before, by its key: a walk would meet all that an old snapshot keeps.
  delete from nightowls._endpoint_states s
   where s.ctid = any (array(
           select o.ctid
             from nightowls._endpoint_states o
            where o.org_id = (_set_endpoint_state.state).org_id and o.endpoint_id = (_set_endpoint_state.state).endpoint_id
              and o.state_id = (_set_endpoint_state.state).state_id
              for update skip locked));
end;
$$;

revoke all on function nightowls._set_endpoint_state(nightowls._endpoint_states) from public;

-- Whether there is anything in an endpoint's queue that could be sent now.
create function nightowls._has_requests(org uuid, queue_id int)
  returns boolean
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
begin
  return coalesce(
    (select true
       from nightowls.queue_messages m
      where m.org_id = _has_requests.org and m.queue_id = _has_requests.queue_id and m.state = 'r' and m.priority = 0
        and m.line_no >= coalesce((
              select k.mark
                from nightowls.queue_marks k
               where k.org_id = _has_requests.org and k.queue_id = _has_requests.queue_id and k.priority = 0
               order by k.mark desc
               limit 1), 0)
        and (m.lease_until is null or m.lease_until <= clock_timestamp())
      order by m.line_no
      limit 1),
    (select true
       from nightowls.queue_messages m
      where m.org_id = _has_requests.org and m.queue_id = _has_requests.queue_id and m.state in ('d', 's', 'x')
        and m.due_at <= clock_timestamp()
        and m.due_at >= coalesce((
              select k.mark
                from nightowls.queue_due_marks k
               where k.org_id = _has_requests.org and k.queue_id = _has_requests.queue_id
               order by k.mark desc
               limit 1), '-infinity')
      order by m.due_at
      limit 1),
    false);
end;
$$;

revoke all on function nightowls._has_requests(uuid, int) from public;

create type nightowls._leased_request as (
  org_id             uuid,
  endpoint_id        int,
  request_id         bigint,
  receipt            uuid,
  attempt            int,
  webhook_id         text,
  url                text,
  headers            jsonb,
  secret             text,
  body               text,
  timeout_ms         int,
  max_response_bytes int,
  enqueued_at        timestamptz,
  "position"         bigint
);

-- Leases requests that can be sent now, at most max_requests, of all endpoints of all orgs: in random order, each at first its share, so that a
-- busy one starves nobody. in_flight: how many requests the caller has under way by endpoint_id. An endpoint that somebody else is leasing from is left
-- to them; one that is left alone, has used up its rate, or lacks a secret gets none. The leases hold for the timeout and 15 seconds.
-- Definer: the tables are closed, and it gives out secrets: to who sends only.
create function nightowls._lease_requests(max_requests int, in_flight jsonb default '{}')
  returns setof nightowls._leased_request
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
  v_ids   int[];
  v_id    int;
  v_orgs  uuid[];
  v_left  int := _lease_requests.max_requests;
  v_done  int := 0;
  v_locks int := 0;
  v_round int;
  v_count int;
begin
  if current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
    raise exception 'nothing can be leased at isolation level %', current_setting('transaction_isolation')
      using errcode = 'active_sql_transaction', hint = 'Use read committed.';
  end if;
  select array_agg(e.org_id order by e.at), array_agg(e.endpoint_id order by e.at) into v_orgs, v_ids
    from (select x.org_id, x.endpoint_id, random() as at
            from nightowls.endpoints x
           where coalesce((_lease_requests.in_flight ->> x.endpoint_id::text)::int, 0) < x.max_in_flight
          offset 0) e
   where nightowls._has_requests(e.org_id, -e.endpoint_id);
  -- First to each its share, then to whoever has more. No more than 24 locks of endpoints.
  for v_round in 1 .. 2 loop
    for v_nth in 1 .. coalesce(cardinality(v_ids), 0) loop
      exit when v_left <= 0 or v_locks >= 24;
      v_id := v_ids[v_nth];
      continue when v_round = 1 and not pg_try_advisory_xact_lock(nightowls._lock_class(272), v_id);
      v_locks := v_locks + case v_round when 1 then 1 else 0 end;
      return query
        select l.*
          from nightowls._lease_from(
                 v_orgs[v_nth], v_id,
                 case when v_round = 1 then greatest(ceil(v_left::numeric / (cardinality(v_ids) - v_nth + 1))::int, 1) else v_left end,
                 coalesce((_lease_requests.in_flight ->> v_id::text)::int, 0)) l;
      get diagnostics v_count = row_count;
      v_left := v_left - v_count;
      _lease_requests.in_flight := _lease_requests.in_flight || jsonb_build_object(
        v_id::text, coalesce((_lease_requests.in_flight ->> v_id::text)::int, 0) + v_count);
    end loop;
    exit when v_left <= 0 or v_locks < coalesce(cardinality(v_ids), 0) or cardinality(v_ids) = 1;
  end loop;
end;
$$;

revoke all on function nightowls._lease_requests(int, jsonb) from public;

-- Of one endpoint, which is locked (class 272). Definer: as _lease_requests.
create function nightowls._lease_from(org uuid, endpoint_id int, qty int, in_flight int)
  returns setof nightowls._leased_request
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
  v_now      timestamptz := clock_timestamp();
  v_endpoint nightowls.endpoints;
  v_state    nightowls._endpoint_states;
  v_call     record;
  v_qty      int;
  v_lease    int;
  v_count    int;
begin
  select e.* into v_endpoint
    from nightowls.endpoints e
   where e.org_id = _lease_from.org and e.endpoint_id = _lease_from.endpoint_id;
  if not found then
    return;
  end if;
  v_qty := least(_lease_from.qty, v_endpoint.max_in_flight - _lease_from.in_flight);
  v_state := nightowls._endpoint_state(v_endpoint.org_id, v_endpoint.endpoint_id);
  if v_state.open_until > v_now then
    return;
  elsif v_endpoint.break_after > 0 and v_state.failures >= v_endpoint.break_after then
    -- One goes ahead to see whether it is well again.
    v_qty := least(v_qty, 1 - _lease_from.in_flight);
  end if;
  if v_endpoint.rate_limit is not null then
    if v_state.last_sent_at + v_endpoint.rate_interval <= v_now then
      v_state.window_used := 0;
    end if;
    v_qty := least(v_qty, v_endpoint.rate_limit - v_state.window_used);
  end if;
  if v_qty <= 0 then
    return;
  end if;
  select c.* into v_call from nightowls._endpoint_call(v_endpoint.org_id, v_endpoint.name) c;
  if v_call.missing is not null or nightowls._url_fault(v_call.url) is not null then
    return; -- A line of health says so.
  end if;

  v_lease := v_endpoint.timeout_ms / 1000 + 16;
  return query
    select v_endpoint.org_id, v_endpoint.endpoint_id, r.msg_id, r.receipt, r.read_ct, w.webhook_id,
           v_call.url || case when v_endpoint.region_in = 'query' and g.region is not null
                              then case when strpos(v_call.url, '?') > 0 then '&' else '?' end || 'forceFunctionRegion=' || g.region else '' end,
           '{"content-type": "application/json"}' || v_call.headers
             || jsonb_strip_nulls(jsonb_build_object(
                  'x-region', case when v_endpoint.region_in = 'header' then g.region end,
                  'traceparent', nightowls._traceparent(r.headers, case when r.headers ? 'nightowls_event' then r.message -> 'metadata' end, w.webhook_id),
                  'webhook-id', w.webhook_id)),
           v_call.secret, r.message::text, v_endpoint.timeout_ms, v_endpoint.max_response_bytes, r.enqueued_at,
           (r.headers ->> 'nightowls_event')::bigint
      from nightowls.read(nightowls._endpoint_queue(v_endpoint.name), v_lease, v_qty, v_endpoint.org_id) r
     cross join lateral (select nightowls._webhook_id(v_endpoint.org_id, -v_endpoint.endpoint_id, r.msg_id, r.headers) as webhook_id) w
     cross join lateral (select case when r.read_ct <= 2 or not v_endpoint.region_fallback then v_endpoint.region end as region) g;
  get diagnostics v_count = row_count;
  if v_count > 0 and (v_endpoint.rate_limit is not null or v_endpoint.break_after > 0 and v_state.failures >= v_endpoint.break_after) then
    v_state.window_used := v_state.window_used + v_count;
    v_state.last_sent_at := clock_timestamp();
    if v_endpoint.break_after > 0 and v_state.failures >= v_endpoint.break_after then
      v_state.open_until := v_now + make_interval(secs => v_lease);
      v_state.probing := true;
    end if;
    perform nightowls._set_endpoint_state(v_state);
  end if;
end;
$$;

revoke all on function nightowls._lease_from(uuid, int, int, int) from public;

-- In how many milliseconds there may be something to send that is not there now, at most max_ms: what is due later, who is left alone, whose rate
-- is used up. Definer: the tables are closed.
create function nightowls._next_request_ms(max_ms int)
  returns int
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_sort to off
  set enable_bitmapscan to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
declare
  v_now  timestamptz := clock_timestamp();
  v_next timestamptz;
begin
  select min(least(
           case when s.open_until > v_now then s.open_until end,
           case when e.rate_limit is not null and s.window_used >= e.rate_limit and s.last_sent_at + e.rate_interval > v_now
                then s.last_sent_at + e.rate_interval end,
           (select m.due_at
              from nightowls.queue_messages m
             where m.org_id = e.org_id and m.queue_id = -e.endpoint_id and m.state in ('d', 's', 'x') and m.due_at > v_now
             order by m.due_at
             limit 1)))
    into v_next
    from nightowls.endpoints e
   cross join lateral nightowls._endpoint_state(e.org_id, e.endpoint_id) s
    join nightowls.queues q on q.org_id = e.org_id and q.queue_id = -e.endpoint_id and q.paused_at is null;
  return case when v_next is null or v_next >= v_now + make_interval(secs => _next_request_ms.max_ms / 1000.0) then _next_request_ms.max_ms
              else greatest(ceil(extract(epoch from v_next - v_now) * 1000), 1)::int end;
end;
$$;

revoke all on function nightowls._next_request_ms(int) from public;
