-- Dispatch where requests leave by pg_net, and what is to be seen of all of it. The worker and run_dispatch are in src/ and extension/.

-- Requests that were handed to pg_net and have no answer yet. Looked at by time, so what is dead and old costs nothing.
create table nightowls._net_requests (
  org_id      uuid        not null,
  net_id      bigint      not null,
  endpoint_id int         not null,
  request_id  bigint      not null,
  receipt     uuid        not null,
  attempt     int         not null,
  webhook_id  text        not null,
  timeout_ms  int         not null,
  keep_bytes  int         not null,
  enqueued_at timestamptz not null,
  sent_at     timestamptz not null default clock_timestamp(),
  "position"  bigint,
  constraint _net_requests_pkey primary key (org_id, net_id)
);

create index _net_requests_sent_at_idx on nightowls._net_requests (org_id, sent_at);

-- Whether pg_net is here and lets the owner use it; in this order, as a look at what is in a schema without USAGE raises.
-- Definer: it is the owner's rights that count.
create function nightowls._has_net()
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
  return coalesce(has_function_privilege(to_regprocedure('net.http_post(text,jsonb,jsonb,jsonb,integer)'), 'execute'), false)
     and coalesce(has_table_privilege(to_regclass('net._http_response'), 'select'), false);
end;
$$;

revoke all on function nightowls._has_net() from public;

-- Whether the worker of this database runs: it has this lock for as long as it lives. role: 0 sends, 1 is the clock.
create function nightowls._worker_runs(role int default 0)
  returns boolean
  language sql
  stable
  parallel restricted
  return exists (
    select from pg_catalog.pg_locks l
     where l.locktype = 'advisory' and l.objsubid = 2 and l.granted and l.mode = 'ExclusiveLock'
       and l.classid::bigint = nightowls._lock_class(273) and l.objid::bigint = role
       and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = pg_catalog.current_database()));

revoke all on function nightowls._worker_runs(int) from public;

-- What Standard Webhooks asks for: HMAC-SHA256 by hand, as pgcrypto may be missing.
create function nightowls._hmac_sha256(key bytea, content bytea)
  returns bytea
  language plpgsql
  immutable
  strict
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_key   bytea := case when octet_length(_hmac_sha256.key) > 64 then sha256(_hmac_sha256.key) else _hmac_sha256.key end;
  v_inner bytea;
  v_outer bytea;
begin
  v_key := v_key || decode(repeat('00', 64 - octet_length(v_key)), 'hex');
  v_inner := v_key;
  v_outer := v_key;
  for v_nth in 0 .. 63 loop
    v_inner := set_byte(v_inner, v_nth, get_byte(v_key, v_nth) # 54);
    v_outer := set_byte(v_outer, v_nth, get_byte(v_key, v_nth) # 92);
  end loop;
  return sha256(v_outer || sha256(v_inner || _hmac_sha256.content));
end;
$$;

revoke all on function nightowls._hmac_sha256(bytea, bytea) from public;

-- The key of a secret: what follows whsec_ is base64; a secret in no such form is taken by its bytes.
create function nightowls._webhook_key(secret text)
  returns bytea
  language plpgsql
  immutable
  strict
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if _webhook_key.secret ~ '^whsec_([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$' then
    return decode(substr(_webhook_key.secret, 7), 'base64');
  end if;
  return convert_to(_webhook_key.secret, 'UTF8');
end;
$$;

revoke all on function nightowls._webhook_key(text) from public;

create function nightowls._webhook_signature(secret text, id text, "timestamp" bigint, body text)
  returns text
  language sql
  immutable
  strict
  parallel safe
  return 'v1,' || encode(nightowls._hmac_sha256(nightowls._webhook_key(secret), convert_to(concat(id, '.', "timestamp", '.', body), 'UTF8')), 'base64');

revoke all on function nightowls._webhook_signature(text, text, bigint, text) from public;

-- Settles what pg_net has answers to, or has lost: it forgets what it had when the server crashes.
-- Definer: the tables are closed.
create function nightowls._settle_net(max_requests int)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
  set jit to off
as $$
#variable_conflict use_column
declare
  v_now      timestamptz := clock_timestamp();
  v_outcomes jsonb;
  v_ids      bigint[];
begin
  -- Named at run time, as it may be missing.
  execute format($query$
    select jsonb_agg(o.outcome order by o.created), array_agg(o.net_id)
      from (select n.net_id, coalesce(r.created, n.sent_at) as created,
                   jsonb_build_object(
                     'org_id', n.org_id, 'endpoint_id', n.endpoint_id, 'request_id', n.request_id, 'receipt', n.receipt, 'attempt', n.attempt,
                     'webhook_id', n.webhook_id, 'status', r.status_code,
                     'headers', (select jsonb_object_agg(lower(h.name), h.value) from jsonb_each(r.headers) as h (name, value)),
                     'body', convert_from(nightowls._cut_utf8(convert_to(r.content, 'UTF8'), n.keep_bytes), 'UTF8'),
                     'truncated', octet_length(r.content) > n.keep_bytes,
                     'error', case when r.status_code is not null then null
                                   when r.id is null then 'pg_net has no answer'
                                   when r.timed_out then format('no answer within %%s ms', n.timeout_ms)
                                   else 'pg_net: ' || coalesce(r.error_msg, 'the request failed') end,
                     'retryable', true, 'enqueued_at', n.enqueued_at, 'position', n."position") as outcome
              from (select e.org_id from nightowls.endpoints e group by e.org_id) o
             cross join lateral (
                     select x.* from nightowls._net_requests x
                      where x.org_id = o.org_id and x.sent_at > $1 - interval '10 minutes'
                     offset 0) n
              left join %s r on r.id = n.net_id and r.created > $1 - interval '15 minutes'
             where r.id is not null or n.sent_at + make_interval(secs => n.timeout_ms / 1000.0 + 10) < $1
             limit $2) o
    $query$, to_regclass('net._http_response'))
     into v_outcomes, v_ids
    using v_now, _settle_net.max_requests;
  if v_ids is null then
    return 0;
  end if;
  delete from nightowls._net_requests n
   where n.org_id in (select e.org_id from nightowls.endpoints e) and n.net_id = any (v_ids);
  return nightowls._settle_requests(v_outcomes);
end;
$$;

revoke all on function nightowls._settle_net(int) from public;

-- The first bytes of a text in UTF-8, not cut through a letter.
create function nightowls._cut_utf8(content bytea, bytes int)
  returns bytea
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_end int := _cut_utf8.bytes;
begin
  if octet_length(_cut_utf8.content) <= v_end or _cut_utf8.content is null then
    return _cut_utf8.content;
  end if;
  while v_end > 0 and get_byte(_cut_utf8.content, v_end) & 192 = 128 loop
    v_end := v_end - 1;
  end loop;
  return substr(_cut_utf8.content, 1, v_end);
end;
$$;

revoke all on function nightowls._cut_utf8(bytea, int) from public;

-- Hands requests to pg_net, which sends them when this transaction has committed. Definer: the tables are closed, and they hold secrets.
create function nightowls._send_net(max_requests int)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
  set jit to off
as $$
#variable_conflict use_column
declare
  v_now     bigint := extract(epoch from clock_timestamp())::bigint;
  v_flights jsonb;
  v_request nightowls._leased_request;
  v_headers jsonb;
  v_id      bigint;
  v_count   bigint := 0;
begin
  select coalesce(jsonb_object_agg(f.endpoint_id::text, f.qty), '{}') into v_flights
    from (select n.endpoint_id, count(*) as qty
            from (select e.org_id from nightowls.endpoints e group by e.org_id) o
           cross join lateral (
                   select x.endpoint_id from nightowls._net_requests x
                    where x.org_id = o.org_id and x.sent_at > clock_timestamp() - interval '10 minutes'
                   offset 0) n
           group by n.endpoint_id) f;
  for v_request in select l.* from nightowls._lease_requests(_send_net.max_requests, v_flights) l loop
    v_headers := v_request.headers || jsonb_build_object('webhook-timestamp', v_now::text);
    if v_request.secret is not null then
      v_headers := v_headers || jsonb_build_object(
        'webhook-signature', nightowls._webhook_signature(v_request.secret, v_request.webhook_id, v_now, v_request.body));
    end if;
    execute format('select %s.http_post($1, $2::jsonb, ''{}''::jsonb, $3, $4)', to_regnamespace('net'))
       into v_id using v_request.url, v_request.body, v_headers, v_request.timeout_ms;
    insert into nightowls._net_requests
           (org_id, net_id, endpoint_id, request_id, receipt, attempt, webhook_id, timeout_ms, keep_bytes, enqueued_at, "position")
    values (v_request.org_id, v_id, v_request.endpoint_id, v_request.request_id, v_request.receipt, v_request.attempt, v_request.webhook_id,
            v_request.timeout_ms, v_request.max_response_bytes, v_request.enqueued_at, v_request."position");
    v_count := v_count + 1;
  end loop;
  return v_count;
end;
$$;

revoke all on function nightowls._send_net(int) from public;

-- Settles what pg_net has answered and hands it what is to be sent; null where there is no pg_net, or somebody else is at it.
create function nightowls._dispatch_net(max_requests int)
  returns table (settled bigint, sent bigint)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if nightowls._has_net() and pg_try_advisory_xact_lock(nightowls._lock_class(274), 0) then
    settled := nightowls._settle_net(_dispatch_net.max_requests);
    sent := nightowls._send_net(_dispatch_net.max_requests);
    return next;
  end if;
end;
$$;

revoke all on function nightowls._dispatch_net(int) from public;

-- What run_dispatch is made of: it commits, so it has no search_path of its own, and calls functions that have.
create function nightowls._check_dispatch(max_requests int, max_ms int)
  returns void
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if _check_dispatch.max_requests is null or _check_dispatch.max_ms is null then
    raise exception 'max_requests and max_ms must not be null' using errcode = 'null_value_not_allowed';
  elsif _check_dispatch.max_requests < 1 or _check_dispatch.max_ms < 1 then
    raise exception 'max_requests and max_ms must be 1 or more' using errcode = 'invalid_parameter_value';
  end if;
end;
$$;

revoke all on function nightowls._check_dispatch(int, int) from public;

create function nightowls._in_ms(ms int)
  returns timestamptz
  language sql
  volatile
  parallel safe
  return clock_timestamp() + make_interval(secs => ms / 1000.0);

revoke all on function nightowls._in_ms(int) from public;

create function nightowls._is_over(until timestamptz, qty_left int)
  returns boolean
  language sql
  volatile
  parallel safe
  return qty_left <= 0 or clock_timestamp() >= until;

revoke all on function nightowls._is_over(timestamptz, int) from public;

create function nightowls._next(nth int)
  returns int
  language sql
  immutable
  parallel safe
  return nth + 1;

revoke all on function nightowls._next(int) from public;

create function nightowls._lease_batch(qty int, in_flight text default '{}')
  returns text
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return (select jsonb_agg(to_jsonb(l))::text from nightowls._lease_requests(_lease_batch.qty, _lease_batch.in_flight::jsonb) l);
end;
$$;

revoke all on function nightowls._lease_batch(int, text) from public;

create function nightowls._minus_batch(qty int, requests text)
  returns int
  language sql
  immutable
  parallel safe
  return qty - jsonb_array_length(requests::jsonb);

revoke all on function nightowls._minus_batch(int, text) from public;

create function nightowls._settle_batch(outcomes text)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return nightowls._settle_requests(_settle_batch.outcomes::jsonb);
end;
$$;

revoke all on function nightowls._settle_batch(text) from public;

-- A step of run_dispatch by pg_net: how many requests it may still hand over, and whether there is a reason to come again.
create function nightowls._dispatch_batch(qty int)
  returns table (left_over int, more boolean)
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_done record;
begin
  if not nightowls._has_net() then
    perform nightowls._refuse_no_sender();
  end if;
  select d.* into v_done from nightowls._dispatch_net(greatest(least(_dispatch_batch.qty, 64), 0)) d;
  left_over := _dispatch_batch.qty - coalesce(v_done.sent, 0);
  more := v_done.settled > 0 or v_done.sent > 0 or exists (
    select from nightowls._net_requests n
     where n.org_id in (select e.org_id from nightowls.endpoints e) and n.sent_at > clock_timestamp() - interval '10 minutes');
  return next;
end;
$$;

revoke all on function nightowls._dispatch_batch(int) from public;

create function nightowls._refuse_no_sender()
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  raise exception 'nothing here sends requests'
    using errcode = 'object_not_in_prerequisite_state',
          hint = 'Name this database in nightowls.databases (the worker), or call run_dispatch (the extension), or install pg_net.';
end;
$$;

revoke all on function nightowls._refuse_no_sender() from public;

create function nightowls.dispatch(max_requests int default 100, max_ms int default 1000)
  returns table (sender text, settled bigint, sent bigint)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_done record;
begin
  perform nightowls._check_dispatch(dispatch.max_requests, dispatch.max_ms);
  settled := 0;
  sent := 0;
  if nightowls._worker_runs() then
    sender := 'worker';
    perform nightowls._wake('dispatch', 1);
    return next;
    return;
  elsif not nightowls._has_net() then
    perform nightowls._refuse_no_sender();
  end if;
  sender := 'net';
  select d.* into v_done from nightowls._dispatch_net(dispatch.max_requests) d;
  settled := coalesce(v_done.settled, 0);
  sent := coalesce(v_done.sent, 0);
  return next;
end;
$$;

comment on function nightowls.dispatch(int, int) is
  'Lets requests leave, of all orgs in turn: by the worker, which it wakes, or by pg_net, whose answers it settles first (those to what it sends now come with the next call). Returns by '
  'what (worker, net), how many answers were settled and how many requests were handed over. max_requests: at most so many of each; max_ms: kept for the clock, a call is one '
  'bounded transaction. Nothing is sent before this transaction commits. For services. Waits for nobody. Raises 55000 if there is neither worker nor pg_net, 22004 or 22023 for an argument '
  'that is null or less than 1, 25001 above read committed.';

revoke all on function nightowls.dispatch(int, int) from public;

-- The clock's part.
create function nightowls._tick_dispatch(max_ms int)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_count bigint := nightowls._prune_responses(_tick_dispatch.max_ms);
  v_done  record;
begin
  if not nightowls._worker_runs() and nightowls._has_net() then
    select d.* into v_done from nightowls._dispatch_net(200) d;
    v_count := v_count + coalesce(v_done.settled, 0) + coalesce(v_done.sent, 0);
  end if;
  return v_count;
end;
$$;

revoke all on function nightowls._tick_dispatch(int) from public;

-- Seeing ------------------------------------------------------------------------------------------

create view nightowls.requests
  with (security_invoker = true)
as
  select m.org_id, e.name as endpoint, m.msg_id as request_id, nightowls._webhook_id(m.org_id, m.queue_id, m.msg_id, m.headers) as webhook_id,
         case when m.state = 'x' then 'dead'
              when m.lease_until > pg_catalog.clock_timestamp() then 'in flight'
              when m.read_ct > 0 then 'retrying'
              else 'waiting' end as status,
         m.read_ct as attempts, m.enqueued_at, case when m.state <> 'x' then m.due_at end as due_at, null::timestamptz as delivered_at, m.last_error,
         m.message as body
    from nightowls.endpoints e
    join nightowls.queue_messages m on m.org_id = e.org_id and m.queue_id = - e.endpoint_id and m.state <> 's'
   union all
  select a.org_id, e.name, a.msg_id, nightowls._webhook_id(a.org_id, a.queue_id, a.msg_id, a.headers), 'delivered',
         a.read_ct, a.enqueued_at, null, a.archived_at, a.last_error, a.message
    from nightowls.endpoints e
    join nightowls.queue_archive a on a.org_id = e.org_id and a.queue_id = - e.endpoint_id;

comment on view nightowls.requests is 'The requests of all endpoints: those that wait, those under way, dead letters, and those that were delivered, for the endpoint''s retention.';
comment on column nightowls.requests.org_id is 'The tenant.';
comment on column nightowls.requests.endpoint is 'The endpoint.';
comment on column nightowls.requests.request_id is 'The request, as enqueue_request returned it.';
comment on column nightowls.requests.webhook_id is 'Its id as the receiver sees it.';
comment on column nightowls.requests.status is 'waiting, in flight, retrying, dead or delivered.';
comment on column nightowls.requests.attempts is 'How often it was sent.';
comment on column nightowls.requests.enqueued_at is 'When it was put in.';
comment on column nightowls.requests.due_at is 'When it may be sent, or might be.';
comment on column nightowls.requests.delivered_at is 'When it was delivered.';
comment on column nightowls.requests.last_error is 'What was wrong last.';
comment on column nightowls.requests.body is 'The body.';

-- What an endpoint lacks, in words without secrets; null: nothing. Definer: secrets are closed.
create function nightowls._endpoint_fault(org uuid, endpoint text)
  returns text
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
  select c.* into v_call from nightowls._endpoint_call(_endpoint_fault.org, _endpoint_fault.endpoint) c;
  return coalesce(v_call.missing || ' is missing', nightowls._url_fault(v_call.url));
end;
$$;

revoke all on function nightowls._endpoint_fault(uuid, text) from public;

create view nightowls.dispatch_status
  with (security_invoker = true)
as
  select e.org_id, e.name as endpoint,
         case when pg_catalog.starts_with(e.url, '/') then e.url else pg_catalog.substring(e.url, '^[^/]*//[^/?]*') end as target,
         q.paused_at is not null as paused, nightowls._endpoint_fault(e.org_id, e.name) as fault,
         m.queue_visible_length as waiting, m.leased as in_flight, m.delayed as retrying, m.dead_letters as dead, m.oldest_msg_age_sec as oldest_age_sec,
         s.failures, case when s.open_until > pg_catalog.clock_timestamp() then s.open_until end as open_until,
         r.received_at as last_response_at, r.status as last_status, r.error as last_error, r.took_ms as last_took_ms
    from nightowls.endpoints e
    join nightowls.queues q on q.org_id = e.org_id and q.queue_id = - e.endpoint_id
   cross join lateral (select (nightowls._measure(q, 10001)).metric as metric offset 0) x
   cross join lateral (select (x.metric).*) m
   cross join lateral nightowls._endpoint_state(e.org_id, e.endpoint_id) s
    left join lateral (
           select p.received_at, p.status, p.error, p.took_ms
             from nightowls.responses p
            where p.org_id = e.org_id and p.endpoint_id = e.endpoint_id
            order by p.received_at desc
            limit 1) r on true;

comment on view nightowls.dispatch_status is 'Each endpoint: what waits for it, what is under way, what failed, whether it is left alone, and its last response.';
comment on column nightowls.dispatch_status.org_id is 'The tenant.';
comment on column nightowls.dispatch_status.endpoint is 'The endpoint.';
comment on column nightowls.dispatch_status.target is 'Where it is: scheme, host and port, or the path behind project_url.';
comment on column nightowls.dispatch_status.paused is 'Whether it is paused.';
comment on column nightowls.dispatch_status.fault is 'Why nothing can be sent: a missing secret, a URL that is not allowed; null: it can.';
comment on column nightowls.dispatch_status.waiting is 'Requests that could be sent now.';
comment on column nightowls.dispatch_status.in_flight is 'Requests that a sender has.';
comment on column nightowls.dispatch_status.retrying is 'Requests that are not due yet: to be sent again, or later.';
comment on column nightowls.dispatch_status.dead is 'Dead letters.';
comment on column nightowls.dispatch_status.oldest_age_sec is 'The age of the oldest request that is not done, in seconds.';
comment on column nightowls.dispatch_status.failures is 'Failures in a row.';
comment on column nightowls.dispatch_status.open_until is 'Until when nothing is sent, because of failures or because the receiver asked for it.';
comment on column nightowls.dispatch_status.last_response_at is 'When the last response came, or failed to.';
comment on column nightowls.dispatch_status.last_status is 'Its HTTP status.';
comment on column nightowls.dispatch_status.last_error is 'What was wrong.';
comment on column nightowls.dispatch_status.last_took_ms is 'How long it took, in milliseconds.';

create function nightowls._health_dispatch()
  returns table (concern text, name text, ok boolean, value text, hint text)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_any     boolean := exists (select from nightowls.endpoints);
  v_sender  text := case when nightowls._worker_runs() then 'the worker' when nightowls._has_net() then 'pg_net' end;
  v_waits   boolean;
  v_missing text;
  v_open    text;
  v_dead    text;
  v_bearer  text;
begin
  select bool_or(s.waiting > 0 and s.oldest_age_sec > 600 and not s.paused and s.open_until is null),
         string_agg(format('%s: %s', s.endpoint, s.fault), ', ' order by s.endpoint) filter (where s.fault is not null),
         string_agg(format('%s until %s', s.endpoint, s.open_until), ', ' order by s.endpoint) filter (where s.open_until is not null),
         string_agg(format('%s: %s', s.endpoint, s.dead), ', ' order by s.endpoint) filter (where s.dead > 0)
    into v_waits, v_missing, v_open, v_dead
    from nightowls.dispatch_status s;
  select string_agg(e.name, ', ' order by e.name) into v_bearer from nightowls.endpoints e where nightowls._bearer_is_no_jwt(e);
  concern := 'dispatch';

  name := 'sender';
  ok := not v_any or v_waits is not true;
  value := coalesce(v_sender, case when v_any then 'neither the worker nor pg_net' else 'no endpoints' end);
  hint := case when not ok then 'Requests wait for 10 minutes: name this database in nightowls.databases, or have pg_cron call run_dispatch, or install pg_net.' end;
  return next;
  name := 'secrets';
  ok := v_missing is null;
  value := coalesce(v_missing, 'all that endpoints need is there');
  hint := case when not ok then 'Nothing is sent and nothing is lost until it is put right: store the secret in Vault or by set_config_value(…, secret => true), or alter_endpoint.' end;
  return next;
  name := 'bearers';
  ok := v_bearer is null;
  value := coalesce('no JWT: ' || v_bearer, 'bearers of edge functions are JWTs');
  hint := case when not ok then 'Edge functions refuse it with 401: store the service role''s JWT, or deploy with --no-verify-jwt.' end;
  return next;
  name := 'failing';
  ok := v_open is null;
  value := coalesce('left alone: ' || v_open, 'no endpoint is left alone');
  hint := case when not ok then 'View dispatch_status has the last error. It is tried again by itself; redrive_requests(endpoint) tries at once.' end;
  return next;
  name := 'dead_letters';
  ok := v_dead is null;
  value := coalesce(v_dead, 'none');
  hint := case when not ok then 'View requests has their last_error; redrive_requests(endpoint) sends them again, purge_queue deletes them.' end;
  return next;
end;
$$;

revoke all on function nightowls._health_dispatch() from public;

create function nightowls._metrics_dispatch()
  returns table (metric text, kind text, help text, labels jsonb, value numeric)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_row record;
begin
  for v_row in select s.* from nightowls.dispatch_status s order by s.org_id, s.endpoint loop
    return query
      select x.metric, 'gauge', x.help, jsonb_build_object('org', v_row.org_id, 'endpoint', v_row.endpoint), x.value
        from (values ('dispatch_waiting', 'Requests that could be sent now.', v_row.waiting::numeric),
                      ('dispatch_in_flight', 'Requests under way.', v_row.in_flight::numeric),
                      ('dispatch_retrying', 'Requests that are not due yet.', v_row.retrying::numeric),
                      ('dispatch_dead', 'Dead letters.', v_row.dead::numeric),
                      ('dispatch_open', 'Whether nothing is sent for a while.', (v_row.open_until is not null)::int::numeric)) as x (metric, help, value);
  end loop;
end;
$$;

revoke all on function nightowls._metrics_dispatch() from public;

alter table nightowls._net_requests enable row level security;
alter table nightowls._net_requests force row level security;
create policy service_all on nightowls._net_requests
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));
