-- Endpoints: where requests go, how often and with which secrets.
--
-- An endpoint has a queue of its own, endpoint/<name>, whose number is that of the endpoint below zero. So dedup keys, retries, dead letters,
-- groups, the archive, marks and the clock's part are the queue's; what is here is what only HTTP needs.

create table nightowls.endpoints (
  org_id             uuid        not null,
  name               text        collate "C" not null,
  endpoint_id        int         not null generated always as identity,
  url                text        not null,
  header_names       text[]      not null default '{}',
  signed             boolean     not null default false,
  secrets_in         text,
  bearer             text,
  timeout_ms         int         not null default 30000,
  max_in_flight      int         not null default 16,
  rate_limit         int,
  rate_interval      interval    not null default '1 second',
  region             text,
  region_in          text        not null default 'header',
  region_fallback    boolean     not null default true,
  reply_queue        text        collate "C",
  max_response_bytes int         not null default 65536,
  break_after        int         not null default 10,
  break_for          interval    not null default '30 seconds',
  created_at         timestamptz not null default clock_timestamp(),
  constraint endpoints_pkey primary key (org_id, name),
  constraint endpoints_endpoint_id_key unique (org_id, endpoint_id)
);

comment on table nightowls.endpoints is
  'Where requests go. Kept by create_endpoint, alter_endpoint and drop_endpoint. Attempts, pauses and retention are policies of its queue, endpoint/<name>.';
comment on column nightowls.endpoints.org_id is 'The tenant.';
comment on column nightowls.endpoints.name is 'The endpoint''s name, unique within the org, ASCII letters in lower case.';
comment on column nightowls.endpoints.endpoint_id is 'Its number; below zero that of its queue.';
comment on column nightowls.endpoints.url is 'The URL; a path that begins with / is put behind the secret project_url.';
comment on column nightowls.endpoints.header_names is 'The names of the headers that are sent with each request; their values are secrets.';
comment on column nightowls.endpoints.signed is 'Whether requests are signed.';
comment on column nightowls.endpoints.secrets_in is 'Where its secrets are: vault or table; null: it has none.';
comment on column nightowls.endpoints.bearer is 'The name of the secret that is sent as authorization: Bearer.';
comment on column nightowls.endpoints.timeout_ms is 'How long a request may take, in milliseconds.';
comment on column nightowls.endpoints.max_in_flight is 'How many requests a sender has under way at once.';
comment on column nightowls.endpoints.rate_limit is 'How many requests are begun in rate_interval at most; null: any number.';
comment on column nightowls.endpoints.rate_interval is 'The time that rate_limit is for.';
comment on column nightowls.endpoints.region is 'The region where an edge function is to run.';
comment on column nightowls.endpoints.region_in is 'How the region is said: header (x-region) or query (forceFunctionRegion).';
comment on column nightowls.endpoints.region_fallback is 'Whether the region is left out after two failures of a request.';
comment on column nightowls.endpoints.reply_queue is 'The queue that answers are sent to.';
comment on column nightowls.endpoints.max_response_bytes is 'How much of an answer is kept.';
comment on column nightowls.endpoints.break_after is 'After how many failures in a row nothing is sent for a while; 0: never.';
comment on column nightowls.endpoints.break_for is 'How long that is at first; it doubles with each further failure, up to 32 times.';
comment on column nightowls.endpoints.created_at is 'When the endpoint was made.';

-- Secrets where there is no Vault. No role is granted anything on it.
create table nightowls._endpoint_secrets (
  org_id      uuid  not null,
  endpoint_id int   not null,
  content     jsonb not null,
  constraint _endpoint_secrets_pkey primary key (org_id, endpoint_id)
);

-- What sending has learnt about an endpoint. Insert-only, the newest counts: an old snapshot that is open makes no look longer.
create table nightowls._endpoint_states (
  org_id       uuid        not null,
  endpoint_id  int         not null,
  state_id     bigint      not null generated always as identity,
  failures     int         not null default 0,
  breaks       int         not null default 0,
  open_until   timestamptz,
  probing      boolean     not null default false,
  window_used  int         not null default 0,
  last_sent_at timestamptz,
  constraint _endpoint_states_pkey primary key (org_id, endpoint_id, state_id)
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);

comment on table nightowls._endpoint_states is 'Of each endpoint: failures in a row, until when it is left alone, what its rate has used. The newest row counts.';
comment on column nightowls._endpoint_states.org_id is 'The tenant.';
comment on column nightowls._endpoint_states.endpoint_id is 'The endpoint.';
comment on column nightowls._endpoint_states.state_id is 'The greatest counts.';
comment on column nightowls._endpoint_states.failures is 'How many requests have failed since one went through.';
comment on column nightowls._endpoint_states.breaks is 'How often it was left alone since then.';
comment on column nightowls._endpoint_states.open_until is 'Until when nothing is sent.';
comment on column nightowls._endpoint_states.probing is 'Whether one request has gone ahead to see whether it is well again.';
comment on column nightowls._endpoint_states.window_used is 'How many were sent in the interval of its rate.';
comment on column nightowls._endpoint_states.last_sent_at is 'When the last of them was.';

-- Names and URLs ----------------------------------------------------------------------------------

create function nightowls._endpoint_queue(endpoint text)
  returns text
  language sql
  immutable
  parallel safe
  return 'endpoint/' || nightowls._queue_name(endpoint);

revoke all on function nightowls._endpoint_queue(text) from public;

create function nightowls._endpoint(org uuid, name text)
  returns nightowls.endpoints
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
as $$
#variable_conflict use_column
declare
  v_endpoint nightowls.endpoints;
begin
  select e.* into v_endpoint
    from nightowls.endpoints e
   where e.org_id = _endpoint.org and e.name = nightowls._queue_name(_endpoint.name);
  if not found then
    perform nightowls._refuse_unknown(
      'endpoint', _endpoint.name,
      array(select e.name::text from nightowls.endpoints e where e.org_id = _endpoint.org order by e.name));
  end if;
  return v_endpoint;
end;
$$;

revoke all on function nightowls._endpoint(uuid, text) from public;

-- What is wrong with a URL, in words that hold nothing of it; null: nothing. Addresses are looked at again by who connects, names only then
-- (src/http/address.rs).
create function nightowls._url_fault(url text)
  returns text
  language plpgsql
  stable
  parallel restricted
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_host text;
begin
  if octet_length(_url_fault.url) > 4096 then
    return 'the URL has more than 4096 bytes';
  elsif _url_fault.url !~ '^[\x21-\x7e]+$' then
    return 'the URL is empty or holds blanks, control characters or letters beyond ASCII';
  elsif _url_fault.url ~ '[\\<>"^`{|}]' then
    return 'the URL holds characters that must be percent-encoded';
  elsif strpos(_url_fault.url, '#') > 0 then
    return 'the URL has a fragment';
  elsif _url_fault.url !~* '^https?://' then
    return 'the URL is not http or https';
  elsif _url_fault.url ~* '^http:' and not nightowls._allows('http') then
    return 'the URL is not https, and http is not allowed';
  elsif substring(_url_fault.url from '^[^/]*//([^/?]*)') ~ '@' then
    return 'the URL holds credentials';
  elsif _url_fault.url !~* '^https?://(\[[0-9a-f:.]+\]|[a-z0-9._~-]+)(:0*[1-9][0-9]{0,4})?([/?]|$)' then
    return 'the URL has no valid host or port';
  end if;
  v_host := lower(substring(_url_fault.url from '^[^/]*//(\[[^]]*\]|[^/?:]*)'));
  if not nightowls._allows('private') and nightowls._is_inside(v_host) then
    return 'the URL is of an address that is loopback, private, link-local or reserved, and these are not allowed';
  end if;
  return null;
end;
$$;

revoke all on function nightowls._url_fault(text) from public;

-- Whether a host, as it stands in a URL, is an address of the inside, or a number that some programs take for one.
create function nightowls._is_inside(host text)
  returns boolean
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_host text := rtrim(btrim(lower(_is_inside.host), '[]'), '.');
begin
  if v_host = 'localhost' or v_host like '%.localhost' then
    return true;
  elsif v_host ~ '^(0x[0-9a-f]*|[0-9]+)([.](0x[0-9a-f]*|[0-9]+))*$' and v_host !~ '^(0|[1-9][0-9]{0,2})([.](0|[1-9][0-9]{0,2})){3}$' then
    return true;
  elsif strpos(v_host, ':') = 0 and v_host !~ '^[0-9.]+$' then
    return false;
  end if;
  begin
    if family(v_host::inet) = 4 then
      return v_host::inet <<= any ('{0.0.0.0/8,10.0.0.0/8,100.64.0.0/10,127.0.0.0/8,169.254.0.0/16,172.16.0.0/12,192.0.0.0/24,192.0.2.0/24,'
        '192.88.99.0/24,192.168.0.0/16,198.18.0.0/15,198.51.100.0/24,203.0.113.0/24,224.0.0.0/4,240.0.0.0/4}'::inet[]);
    end if;
    return not v_host::inet <<= '2000::/3'
        or v_host::inet <<= any ('{2001::/23,2001:db8::/32,2002::/16,3fff::/20}'::inet[]);
  exception when invalid_text_representation then
    return true;
  end;
end;
$$;

revoke all on function nightowls._is_inside(text) from public;

-- What is wrong with headers, without a word of their values; null: nothing.
create function nightowls._headers_fault(headers jsonb)
  returns text
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if jsonb_typeof(_headers_fault.headers) <> 'object' then
    return 'headers must be a JSON object';
  elsif pg_column_size(_headers_fault.headers) > 65536 then
    return 'the headers have more than 16384 bytes';
  end if;
  return coalesce(
    (select min(case
              when h.name !~ '^[!#$%&''*+.^_`|~0-9A-Za-z-]+$' then format('the name of header "%s" is not valid', left(h.name, 64))
              when lower(h.name) in ('connection', 'content-length', 'expect', 'host', 'keep-alive', 'proxy-authorization', 'proxy-connection', 'te',
                                     'trailer', 'transfer-encoding', 'upgrade', 'webhook-id', 'webhook-timestamp', 'webhook-signature')
                then format('header "%s" must not be given', left(h.name, 64))
              when jsonb_typeof(h.value) = 'object'
                then case when jsonb_typeof(h.value -> 'secret') is distinct from 'string' or h.value - '{secret,prefix}'::text[] <> '{}'
                               or coalesce(jsonb_typeof(h.value -> 'prefix'), 'string') <> 'string'
                          then format('the value of header "%s" must be a text or {"secret": name, "prefix": text}', left(h.name, 64)) end
              when jsonb_typeof(h.value) <> 'string'
                then format('the value of header "%s" must be a text or {"secret": name, "prefix": text}', left(h.name, 64))
              when h.value #>> '{}' !~ '^[\x20-\x7e\t]*$'
                then format('the value of header "%s" holds control characters or letters beyond ASCII', left(h.name, 64))
            end)
       from jsonb_each(_headers_fault.headers) as h (name, value)),
    (select case when sum(octet_length(h.name) + octet_length(h.value) + 4) > 16384 then 'the headers have more than 16384 bytes' end
       from jsonb_each_text(_headers_fault.headers) as h (name, value)),
    (select format('header "%s" stands there twice', min(lower(h.name)))
       from jsonb_object_keys(_headers_fault.headers) as h (name)
      group by lower(h.name)
     having count(*) > 1
      limit 1));
end;
$$;

revoke all on function nightowls._headers_fault(jsonb) from public;

-- Secrets -----------------------------------------------------------------------------------------

-- Where an endpoint's secrets are in Vault.
create function nightowls._endpoint_vault_name(org uuid, endpoint_id int)
  returns text
  language sql
  immutable
  parallel safe
  return concat('nightowls/', org, '/endpoint/', endpoint_id);

revoke all on function nightowls._endpoint_vault_name(uuid, int) from public;

-- A secret by its name: in Vault, else in the configuration. Null if there is none.
-- Definer: services have no right on Vault.
create function nightowls._named_secret(org uuid, name text)
  returns text
  language plpgsql
  stable
  parallel safe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_value text;
begin
  if nightowls._has_vault() then
    execute format('select s.decrypted_secret from %s s where s.name = $1', to_regclass('vault.decrypted_secrets'))
       into v_value using _named_secret.name;
  end if;
  return coalesce(nullif(v_value, ''), nullif(nightowls._get_config_value(_named_secret.org, _named_secret.name, true), ''));
end;
$$;

revoke all on function nightowls._named_secret(uuid, text) from public;

-- {"secret": …, "headers": {…}} of an endpoint.
-- Definer: the table is closed, and services have no right on Vault.
create function nightowls._endpoint_content(endpoint nightowls.endpoints)
  returns jsonb
  language plpgsql
  stable
  parallel safe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_text text;
begin
  if (_endpoint_content.endpoint).secrets_in = 'table' then
    return (select s.content from nightowls._endpoint_secrets s
             where s.org_id = (_endpoint_content.endpoint).org_id and s.endpoint_id = (_endpoint_content.endpoint).endpoint_id);
  elsif (_endpoint_content.endpoint).secrets_in = 'vault' and nightowls._has_vault() then
    execute format('select s.decrypted_secret from %s s where s.name = $1', to_regclass('vault.decrypted_secrets'))
       into v_text
      using nightowls._endpoint_vault_name((_endpoint_content.endpoint).org_id, (_endpoint_content.endpoint).endpoint_id);
    return v_text::jsonb;
  elsif (_endpoint_content.endpoint).secrets_in is null then
    return '{}';
  end if;
  return null;
end;
$$;

revoke all on function nightowls._endpoint_content(nightowls.endpoints) from public;

-- Keeps an endpoint's secrets, in Vault where that is; returns where. Null: they go.
create function nightowls._keep_endpoint_content(org uuid, endpoint_id int, content jsonb)
  returns text
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_name text := nightowls._endpoint_vault_name(_keep_endpoint_content.org, _keep_endpoint_content.endpoint_id);
  v_id   uuid;
begin
  delete from nightowls._endpoint_secrets s
   where s.org_id = _keep_endpoint_content.org and s.endpoint_id = _keep_endpoint_content.endpoint_id;
  if nightowls._has_vault() then
    execute format('select s.id from %s s where s.name = $1', to_regclass('vault.decrypted_secrets')) into v_id using v_name;
    if v_id is not null then
      -- Vault has no function that removes a secret.
      execute format('select %s.update_secret($1, $2)', to_regnamespace('vault'))
        using v_id, coalesce(_keep_endpoint_content.content::text, '{}');
    elsif _keep_endpoint_content.content is not null then
      execute format('select %s.create_secret($1, $2, $3)', to_regnamespace('vault'))
        using _keep_endpoint_content.content::text, v_name, 'kept by nightowls.create_endpoint()';
    end if;
    return case when _keep_endpoint_content.content is not null then 'vault' end;
  elsif _keep_endpoint_content.content is null then
    return null;
  end if;
  insert into nightowls._endpoint_secrets (org_id, endpoint_id, content)
  values (_keep_endpoint_content.org, _keep_endpoint_content.endpoint_id, _keep_endpoint_content.content);
  return 'table';
end;
$$;

revoke all on function nightowls._keep_endpoint_content(uuid, int, jsonb) from public;

-- All that calls of an endpoint have in common, secrets put in. missing: what must be there before anything can be sent.
-- Definer: secrets are closed. It is for what sends, and its result is for no view.
create function nightowls._endpoint_call(org uuid, endpoint text)
  returns table (url text, headers jsonb, timeout_ms int, secret text, missing text)
  language plpgsql
  stable
  parallel restricted
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_endpoint nightowls.endpoints := nightowls._endpoint(_endpoint_call.org, _endpoint_call.endpoint);
  v_content  jsonb := nightowls._endpoint_content(v_endpoint);
  v_header   record;
  v_value    text;
begin
  url := v_endpoint.url;
  timeout_ms := v_endpoint.timeout_ms;
  headers := '{}';
  if v_content is null then
    missing := 'its own secrets (in Vault)';
    return next;
    return;
  end if;
  secret := v_content ->> 'secret';
  if v_endpoint.signed and secret is null then
    missing := 'the signing secret';
  end if;
  if starts_with(url, '/') then
    v_value := nightowls._named_secret(v_endpoint.org_id, 'project_url');
    if v_value is null then
      missing := 'secret "project_url"';
    end if;
    url := rtrim(v_value, '/') || url;
  end if;
  if v_endpoint.bearer is not null then
    v_value := nightowls._named_secret(v_endpoint.org_id, v_endpoint.bearer);
    if v_value is null then
      missing := format('secret "%s"', v_endpoint.bearer);
    end if;
    headers := headers || jsonb_build_object('authorization', 'Bearer ' || v_value);
  end if;
  for v_header in select lower(h.name) as name, h.value from jsonb_each(coalesce(v_content -> 'headers', '{}')) as h (name, value) loop
    v_value := v_header.value #>> '{}';
    if jsonb_typeof(v_header.value) = 'object' then
      v_value := nightowls._named_secret(v_endpoint.org_id, v_header.value ->> 'secret');
      if v_value is null then
        missing := format('secret "%s"', v_header.value ->> 'secret');
      end if;
      v_value := coalesce(v_header.value ->> 'prefix', '') || v_value;
    end if;
    headers := headers || jsonb_build_object(v_header.name, v_value);
  end loop;
  return next;
end;
$$;

revoke all on function nightowls._endpoint_call(uuid, text) from public;

-- Making and changing -----------------------------------------------------------------------------

create function nightowls._check_endpoint(endpoint nightowls.endpoints, headers jsonb, secret text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_fault text;
begin
  if (_check_endpoint.endpoint).name is null or (_check_endpoint.endpoint).url is null then
    raise exception '% must not be null', case when (_check_endpoint.endpoint).name is null then 'name' else 'url' end
      using errcode = 'null_value_not_allowed';
  elsif row ((_check_endpoint.endpoint).timeout_ms, (_check_endpoint.endpoint).max_in_flight, (_check_endpoint.endpoint).rate_interval,
             (_check_endpoint.endpoint).region_in, (_check_endpoint.endpoint).region_fallback, (_check_endpoint.endpoint).max_response_bytes,
             (_check_endpoint.endpoint).break_after, (_check_endpoint.endpoint).break_for) is not null is not true then
    raise exception 'timeout, max_in_flight, rate_interval, region_in, region_fallback, max_response_bytes, break_after and break_for must not be null'
      using errcode = 'null_value_not_allowed';
  elsif octet_length((_check_endpoint.endpoint).name) > 54 then
    raise exception 'the name of an endpoint is too long' using errcode = 'program_limit_exceeded', detail = 'It has at most 54 bytes.';
  elsif (_check_endpoint.endpoint).name = '' or (_check_endpoint.endpoint).name ~ '[\x01-\x1f\x7f]'
     or (_check_endpoint.endpoint).name ~ '^\s|\s$' then
    raise exception 'an endpoint''s name must not be empty, begin or end with a blank, or hold control characters'
      using errcode = 'invalid_parameter_value';
  end if;
  -- A path stands behind a URL that is a secret: it is looked at when that is known.
  v_fault := coalesce(
    nightowls._url_fault(case when starts_with((_check_endpoint.endpoint).url, '/')
                              then 'https://project.example' || (_check_endpoint.endpoint).url else (_check_endpoint.endpoint).url end),
    nightowls._headers_fault(_check_endpoint.headers));
  if v_fault is not null then
    raise exception '%', v_fault
      using errcode = 'invalid_parameter_value',
            hint = 'docs/dispatch.md says which URLs and headers are let through, and how an owner allows more.';
  elsif (_check_endpoint.endpoint).timeout_ms not between 100 and 300000 then
    raise exception 'timeout must be 100 milliseconds to 5 minutes' using errcode = 'invalid_parameter_value';
  elsif (_check_endpoint.endpoint).max_in_flight not between 1 and 1000 then
    raise exception 'max_in_flight must be 1 to 1000' using errcode = 'invalid_parameter_value';
  elsif (_check_endpoint.endpoint).rate_limit < 1 or (_check_endpoint.endpoint).rate_interval <= interval '0' then
    raise exception 'rate_limit must be 1 or more, rate_interval more than 0' using errcode = 'invalid_parameter_value';
  elsif (_check_endpoint.endpoint).region_in not in ('header', 'query') then
    raise exception 'region_in must be header or query' using errcode = 'invalid_parameter_value';
  elsif (_check_endpoint.endpoint).region !~ '^[A-Za-z0-9-]{1,64}$' then
    raise exception 'region is not valid' using errcode = 'invalid_parameter_value', hint = 'Such as eu-central-1.';
  elsif (_check_endpoint.endpoint).max_response_bytes not between 0 and 1048576 then
    raise exception 'max_response_bytes must be 0 to 1048576' using errcode = 'invalid_parameter_value';
  elsif (_check_endpoint.endpoint).break_after < 0 or (_check_endpoint.endpoint).break_for <= interval '0' then
    raise exception 'break_after must be 0 or more, break_for more than 0' using errcode = 'invalid_parameter_value';
  elsif (_check_endpoint.endpoint).bearer is not null and _check_endpoint.headers ?| '{authorization,Authorization}'::text[] then
    raise exception 'bearer and a header authorization are both given' using errcode = 'invalid_parameter_value';
  elsif octet_length(_check_endpoint.secret) > 1024 or _check_endpoint.secret !~ '^[\x21-\x7e]{8,}$' then
    raise exception 'secret must be 8 to 1024 characters of ASCII without blanks'
      using errcode = 'invalid_parameter_value', hint = 'Standard Webhooks writes it whsec_ and 24 to 64 bytes in base64.';
  elsif (_check_endpoint.endpoint).bearer is not null then
    perform nightowls._check_config_key((_check_endpoint.endpoint).bearer);
  end if;
  if (_check_endpoint.endpoint).reply_queue is not null then
    perform nightowls._queue((_check_endpoint.endpoint).org_id, (_check_endpoint.endpoint).reply_queue);
  end if;
end;
$$;

revoke all on function nightowls._check_endpoint(nightowls.endpoints, jsonb, text) from public;

-- An edge function wants a JWT; what is none is refused there with 401. Definer: secrets are closed.
create function nightowls._warn_of_bearer(endpoint nightowls.endpoints)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if nightowls._bearer_is_no_jwt(_warn_of_bearer.endpoint) then
    raise warning 'secret "%" is no JWT, which edge functions ask for', (_warn_of_bearer.endpoint).bearer
      using hint = 'Store the service role''s JWT under this name, or deploy the function with --no-verify-jwt.';
  end if;
end;
$$;

revoke all on function nightowls._warn_of_bearer(nightowls.endpoints) from public;

-- Definer: secrets are closed; it says yes or no.
create function nightowls._bearer_is_no_jwt(endpoint nightowls.endpoints)
  returns boolean
  language plpgsql
  stable
  parallel safe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return (_bearer_is_no_jwt.endpoint).bearer is not null and (_bearer_is_no_jwt.endpoint).url ~ '/functions/v1/'
     and coalesce(nightowls._named_secret((_bearer_is_no_jwt.endpoint).org_id, (_bearer_is_no_jwt.endpoint).bearer)
                  !~ '^[A-Za-z0-9_-]+[.][A-Za-z0-9_-]+[.][A-Za-z0-9_-]+$', false);
end;
$$;

revoke all on function nightowls._bearer_is_no_jwt(nightowls.endpoints) from public;

-- Definer: nobody else may write to the tables.
create function nightowls._create_endpoint(endpoint nightowls.endpoints, queue nightowls.queues, headers jsonb, secret text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_content jsonb;
  v_found   nightowls.endpoints;
  v_queue   nightowls.queues;
  v_id      int;
begin
  _create_endpoint.endpoint.name := nightowls._queue_name((_create_endpoint.endpoint).name);
  _create_endpoint.endpoint.reply_queue := nightowls._queue_name((_create_endpoint.endpoint).reply_queue);
  if (_create_endpoint.endpoint).url ~ '/functions/v1/' and starts_with((_create_endpoint.endpoint).url, '/')
     and (_create_endpoint.endpoint).bearer is null and not coalesce(_create_endpoint.headers ?| '{authorization,Authorization}'::text[], false) then
    _create_endpoint.endpoint.bearer := 'service_role_key';
  end if;
  perform nightowls._check_endpoint(_create_endpoint.endpoint, _create_endpoint.headers, _create_endpoint.secret);
  perform nightowls._refuse_no_org((_create_endpoint.endpoint).org_id);
  v_content := nullif(jsonb_strip_nulls(jsonb_build_object(
    'secret', _create_endpoint.secret, 'headers', nullif(_create_endpoint.headers, '{}'))), '{}');
  _create_endpoint.endpoint.header_names := array(
    select lower(h.name) from jsonb_object_keys(coalesce(_create_endpoint.headers, '{}')) as h (name) order by 1);
  _create_endpoint.endpoint.signed := _create_endpoint.secret is not null;
  _create_endpoint.queue.name := nightowls._endpoint_queue((_create_endpoint.endpoint).name);
  _create_endpoint.queue.vt := 60;
  _create_endpoint.queue.on_other_body := 'raise';
  _create_endpoint.queue.archive_acked := true;
  _create_endpoint.queue.notify := false;
  _create_endpoint.queue.max_attempts := nullif((_create_endpoint.queue).max_attempts, 0);
  if row ((_create_endpoint.queue).backoff, (_create_endpoint.queue).max_backoff, (_create_endpoint.queue).retention) is not null is not true then
    raise exception 'backoff, max_backoff and retention must not be null' using errcode = 'null_value_not_allowed';
  end if;
  perform nightowls._check_policies(_create_endpoint.queue);

  -- Who makes the same one meanwhile is waited for here.
  insert into nightowls.endpoints
         (org_id, name, url, header_names, signed, bearer, timeout_ms, max_in_flight, rate_limit, rate_interval, region, region_in,
          region_fallback, reply_queue, max_response_bytes, break_after, break_for)
  select e.org_id, e.name, e.url, e.header_names, e.signed, e.bearer, e.timeout_ms, e.max_in_flight, e.rate_limit, e.rate_interval, e.region,
         e.region_in, e.region_fallback, e.reply_queue, e.max_response_bytes, e.break_after, e.break_for
    from (select (_create_endpoint.endpoint).*) e
  on conflict (org_id, name) do nothing
  returning endpoint_id into v_id;
  if v_id is null then
    v_found := nightowls._endpoint((_create_endpoint.endpoint).org_id, (_create_endpoint.endpoint).name);
    v_queue := nightowls._queue(v_found.org_id, nightowls._endpoint_queue(v_found.name));
    if (to_jsonb(v_found) - '{endpoint_id,created_at,secrets_in}'::text[])
       <> (to_jsonb(_create_endpoint.endpoint) - '{endpoint_id,created_at,secrets_in}'::text[])
       or (to_jsonb(v_queue) - '{queue_id,created_at,paused_at}'::text[])
       <> (to_jsonb(_create_endpoint.queue) - '{queue_id,created_at,paused_at}'::text[])
       or coalesce(nightowls._endpoint_content(v_found), '{}') <> coalesce(v_content, '{}') then
      raise exception 'endpoint "%" exists already with another definition', v_found.name
        using errcode = 'duplicate_object', hint = 'Change it with nightowls.alter_endpoint().';
    end if;
    return;
  end if;
  insert into nightowls.queues
         (org_id, name, queue_id, vt, max_attempts, backoff, max_backoff, dedup_for, on_other_body, archive_acked, retention, notify)
  overriding system value
  select q.org_id, q.name, -v_id, q.vt, q.max_attempts, q.backoff, q.max_backoff, q.dedup_for, q.on_other_body, q.archive_acked, q.retention, q.notify
    from (select (_create_endpoint.queue).*) q
  on conflict (org_id, name) do nothing;
  if not found then
    raise exception 'there is a queue "%" already', (_create_endpoint.queue).name
      using errcode = 'duplicate_object', hint = 'Such names are those of endpoints: drop that queue, or choose another name.';
  end if;
  update nightowls.endpoints e
     set secrets_in = nightowls._keep_endpoint_content(e.org_id, e.endpoint_id, v_content)
   where e.org_id = (_create_endpoint.endpoint).org_id and e.endpoint_id = v_id and v_content is not null;
end;
$$;

revoke all on function nightowls._create_endpoint(nightowls.endpoints, nightowls.queues, jsonb, text) from public;

create function nightowls.create_endpoint(
  name               text,
  url                text,
  headers            jsonb default null,
  secret             text default null,
  timeout            interval default '30 seconds',
  max_attempts       int default 16,
  max_in_flight      int default 16,
  region             text default null,
  bearer             text default null,
  reply_queue        text default null,
  rate_limit         int default null,
  rate_interval      interval default '1 second',
  backoff            interval default '5 seconds',
  max_backoff        interval default '6 hours',
  dedup_for          interval default '30 days',
  retention          interval default '30 days',
  max_response_bytes int default 65536,
  break_after        int default 10,
  break_for          interval default '30 seconds',
  region_in          text default 'header',
  region_fallback    boolean default true,
  org                uuid default null
)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_endpoint nightowls.endpoints;
  v_queue    nightowls.queues;
begin
  v_endpoint.org_id := nightowls.current_org(create_endpoint.org);
  v_endpoint.name := create_endpoint.name;
  v_endpoint.url := create_endpoint.url;
  v_endpoint.bearer := create_endpoint.bearer;
  v_endpoint.timeout_ms := nightowls._milliseconds(create_endpoint.timeout);
  v_endpoint.max_in_flight := create_endpoint.max_in_flight;
  v_endpoint.rate_limit := create_endpoint.rate_limit;
  v_endpoint.rate_interval := create_endpoint.rate_interval;
  v_endpoint.region := create_endpoint.region;
  v_endpoint.region_in := create_endpoint.region_in;
  v_endpoint.region_fallback := create_endpoint.region_fallback;
  v_endpoint.reply_queue := create_endpoint.reply_queue;
  v_endpoint.max_response_bytes := create_endpoint.max_response_bytes;
  v_endpoint.break_after := create_endpoint.break_after;
  v_endpoint.break_for := create_endpoint.break_for;
  v_queue.org_id := v_endpoint.org_id;
  v_queue.max_attempts := create_endpoint.max_attempts;
  v_queue.backoff := create_endpoint.backoff;
  v_queue.max_backoff := create_endpoint.max_backoff;
  v_queue.dedup_for := create_endpoint.dedup_for;
  v_queue.retention := create_endpoint.retention;
  perform nightowls._create_endpoint(v_endpoint, v_queue, create_endpoint.headers, create_endpoint.secret);
  perform nightowls._warn_of_bearer(nightowls._endpoint(v_endpoint.org_id, v_endpoint.name));
end;
$$;

comment on function nightowls.create_endpoint(
  text, text, jsonb, text, interval, int, int, text, text, text, int, interval, interval, interval, interval, interval, int, int, interval, text, boolean, uuid) is
  'Makes an endpoint, where requests can be sent; again with the same definition it changes nothing. name: at most 54 bytes; ASCII letters count in lower case; '
  'url: https, or a path such as /functions/v1/notify, which is put behind the secret project_url; headers: {name: value} sent with each request, a value being a '
  'text, which is kept as a secret, or {"secret": name, "prefix": text}; secret: requests are signed with it (Standard Webhooks); bearer: the name of a secret, in Vault or '
  'the configuration, sent as authorization: Bearer, for edge functions service_role_key by default; timeout: for one request, 100 ms to 5 minutes; max_attempts: sendings '
  'before a request is a dead letter, 0 without limit; backoff, max_backoff: the pause after a failure, doubled each time, half of it random; max_in_flight: at '
  'once, for each sender; rate_limit: at most so many in any rate_interval; region: where an edge function is to run, said by region_in: header (x-region) or query '
  '(forceFunctionRegion), left out after two failures of a request with region_fallback; reply_queue: an existing queue that answers are sent to; dedup_for: how long '
  'dedup keys count; retention: how long requests that were delivered and responses are kept; max_response_bytes: how much of a response is; break_after: after so many '
  'failures in a row nothing is sent for break_for, doubled with each further one, 0 for never; org: the tenant. Waits for who makes the same one. For services. Warns if an edge '
  'function''s bearer is no JWT. Raises 42710 if it exists with another definition, 22023 for a URL, header or number that is not allowed, 22004 for an argument that must not be '
  'null, 54000 for a name that is too long, NW007 if reply_queue does not exist, NW010 if there is no org.';

revoke all on function nightowls.create_endpoint(
  text, text, jsonb, text, interval, int, int, text, text, text, int, interval, interval, interval, interval, interval, int, int, interval, text, boolean, uuid) from public;

-- An interval in whole milliseconds, at most what an int holds.
create function nightowls._milliseconds(span interval)
  returns int
  language sql
  immutable
  strict
  parallel safe
  return least(greatest(ceil(extract(epoch from span) * 1000), -1), 2147483647)::int;

revoke all on function nightowls._milliseconds(interval) from public;

-- Definer: nobody else may write to the tables.
create function nightowls._alter_endpoint(
  org       uuid,
  name      text,
  changes   jsonb,
  policies  jsonb,
  headers   jsonb,
  secret    text,
  paused    boolean
)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_endpoint nightowls.endpoints;
  v_queue    nightowls.queues;
  v_content  jsonb;
  v_new      jsonb;
begin
  select e.* into v_endpoint
    from nightowls.endpoints e
   where e.org_id = _alter_endpoint.org and e.name = nightowls._queue_name(_alter_endpoint.name)
     for no key update;
  if not found then
    v_endpoint := nightowls._endpoint(_alter_endpoint.org, _alter_endpoint.name);
  end if;
  v_content := coalesce(nightowls._endpoint_content(v_endpoint), '{}');
  v_new := v_content || jsonb_strip_nulls(jsonb_build_object(
    'secret', nullif(_alter_endpoint.secret, ''), 'headers', _alter_endpoint.headers));
  if _alter_endpoint.secret = '' then
    v_new := v_new - 'secret';
  end if;
  if v_new -> 'headers' = '{}' then
    v_new := v_new - 'headers';
  end if;
  v_endpoint := jsonb_populate_record(v_endpoint, jsonb_strip_nulls(_alter_endpoint.changes));
  v_endpoint.bearer := nullif(v_endpoint.bearer, '');
  v_endpoint.region := nullif(v_endpoint.region, '');
  v_endpoint.reply_queue := nightowls._queue_name(nullif(v_endpoint.reply_queue, ''));
  v_endpoint.rate_limit := nullif(v_endpoint.rate_limit, 0);
  v_endpoint.signed := v_new ? 'secret';
  v_endpoint.header_names := array(
    select lower(h.name) from jsonb_object_keys(coalesce(v_new -> 'headers', '{}')) as h (name) order by 1);
  perform nightowls._check_endpoint(v_endpoint, v_new -> 'headers', v_new ->> 'secret');
  if v_new <> v_content then
    v_endpoint.secrets_in := nightowls._keep_endpoint_content(v_endpoint.org_id, v_endpoint.endpoint_id, nullif(v_new, '{}'));
  end if;
  update nightowls.endpoints e
     set url = v_endpoint.url, header_names = v_endpoint.header_names, signed = v_endpoint.signed, secrets_in = v_endpoint.secrets_in,
         bearer = v_endpoint.bearer, timeout_ms = v_endpoint.timeout_ms, max_in_flight = v_endpoint.max_in_flight, rate_limit = v_endpoint.rate_limit,
         rate_interval = v_endpoint.rate_interval, region = v_endpoint.region, region_in = v_endpoint.region_in,
         region_fallback = v_endpoint.region_fallback, reply_queue = v_endpoint.reply_queue, max_response_bytes = v_endpoint.max_response_bytes,
         break_after = v_endpoint.break_after, break_for = v_endpoint.break_for
   where e.org_id = v_endpoint.org_id and e.endpoint_id = v_endpoint.endpoint_id;

  v_queue := nightowls._queue(v_endpoint.org_id, nightowls._endpoint_queue(v_endpoint.name));
  v_queue := jsonb_populate_record(v_queue, jsonb_strip_nulls(_alter_endpoint.policies));
  v_queue.max_attempts := nullif(v_queue.max_attempts, 0);
  if _alter_endpoint.paused then
    v_queue.paused_at := coalesce(v_queue.paused_at, clock_timestamp());
  elsif not _alter_endpoint.paused then
    v_queue.paused_at := null;
  end if;
  perform nightowls._alter_queue(v_queue);
end;
$$;

revoke all on function nightowls._alter_endpoint(uuid, text, jsonb, jsonb, jsonb, text, boolean) from public;

create function nightowls.alter_endpoint(
  name               text,
  url                text default null,
  headers            jsonb default null,
  secret             text default null,
  timeout            interval default null,
  max_attempts       int default null,
  max_in_flight      int default null,
  region             text default null,
  bearer             text default null,
  reply_queue        text default null,
  rate_limit         int default null,
  rate_interval      interval default null,
  backoff            interval default null,
  max_backoff        interval default null,
  dedup_for          interval default null,
  retention          interval default null,
  max_response_bytes int default null,
  break_after        int default null,
  break_for          interval default null,
  region_in          text default null,
  region_fallback    boolean default null,
  paused             boolean default null,
  org                uuid default null
)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org uuid := nightowls.current_org(alter_endpoint.org);
begin
  perform nightowls._alter_endpoint(
    v_org, alter_endpoint.name,
    jsonb_build_object(
      'url', alter_endpoint.url, 'timeout_ms', nightowls._milliseconds(alter_endpoint.timeout), 'max_in_flight', alter_endpoint.max_in_flight,
      'region', alter_endpoint.region, 'bearer', alter_endpoint.bearer, 'reply_queue', alter_endpoint.reply_queue,
      'rate_limit', alter_endpoint.rate_limit, 'rate_interval', alter_endpoint.rate_interval,
      'max_response_bytes', alter_endpoint.max_response_bytes, 'break_after', alter_endpoint.break_after, 'break_for', alter_endpoint.break_for,
      'region_in', alter_endpoint.region_in, 'region_fallback', alter_endpoint.region_fallback),
    jsonb_build_object(
      'max_attempts', alter_endpoint.max_attempts, 'backoff', alter_endpoint.backoff, 'max_backoff', alter_endpoint.max_backoff,
      'dedup_for', alter_endpoint.dedup_for, 'retention', alter_endpoint.retention),
    alter_endpoint.headers, alter_endpoint.secret, alter_endpoint.paused);
  perform nightowls._warn_of_bearer(nightowls._endpoint(v_org, alter_endpoint.name));
end;
$$;

comment on function nightowls.alter_endpoint(
  text, text, jsonb, text, interval, int, int, text, text, text, int, interval, interval, interval, interval, interval, int, int, interval, text, boolean, boolean, uuid) is
  'Changes an endpoint: what is given, the rest stays. The arguments are those of create_endpoint; headers: all of them anew, {} for none; secret, region, bearer, reply_queue: '
  ''''' for none; rate_limit, max_attempts: 0 for no limit; paused: true, and nothing is sent until false. Requests that wait are sent as the endpoint is then. For services. '
  'Waits for another change of it. Raises NW007 if the endpoint or reply_queue does not exist, 22023 for a URL, header or number that is not allowed, NW010 if there is no org.';

revoke all on function nightowls.alter_endpoint(
  text, text, jsonb, text, interval, int, int, text, text, text, int, interval, interval, interval, interval, interval, int, int, interval, text, boolean, boolean, uuid) from public;

-- Definer: nobody else may write to the tables.
create function nightowls._drop_endpoint(org uuid, name text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_endpoint nightowls.endpoints := nightowls._endpoint(_drop_endpoint.org, _drop_endpoint.name);
begin
  perform nightowls._keep_endpoint_content(v_endpoint.org_id, v_endpoint.endpoint_id, null);
  delete from nightowls.endpoints e where e.org_id = v_endpoint.org_id and e.endpoint_id = v_endpoint.endpoint_id;
  delete from nightowls._endpoint_states s where s.org_id = v_endpoint.org_id and s.endpoint_id = v_endpoint.endpoint_id;
  delete from nightowls.responses r where r.org_id = v_endpoint.org_id and r.endpoint_id = v_endpoint.endpoint_id;
  perform nightowls._purge_queue(v_endpoint.org_id, nightowls._endpoint_queue(v_endpoint.name), true);
end;
$$;

revoke all on function nightowls._drop_endpoint(uuid, text) from public;

create function nightowls.drop_endpoint(name text, org uuid default null)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform nightowls._drop_endpoint(nightowls.current_org(drop_endpoint.org), drop_endpoint.name);
end;
$$;

comment on function nightowls.drop_endpoint(text, uuid) is
  'Drops an endpoint with its requests, those that wait too, its responses, bindings and secrets. A request that is under way is '
  'still sent. name: the endpoint; org: the tenant. For services. Waits as purge_queue does. Raises NW007 if the endpoint does not exist, 25001 above read committed, '
  'NW010 if there is no org.';

revoke all on function nightowls.drop_endpoint(text, uuid) from public;

alter table nightowls.endpoints enable row level security;
alter table nightowls.endpoints force row level security;
create policy service_all on nightowls.endpoints
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));

alter table nightowls._endpoint_secrets enable row level security;
alter table nightowls._endpoint_secrets force row level security;

alter table nightowls._endpoint_states enable row level security;
alter table nightowls._endpoint_states force row level security;
create policy service_all on nightowls._endpoint_states
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));
