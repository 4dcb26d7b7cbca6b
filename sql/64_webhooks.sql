-- Webhooks that come in: whether they are from who they say they are from.

-- A header, whatever the case of its name. Frameworks give some headers as arrays.
create function nightowls._header(headers jsonb, name text)
  returns text
  language sql
  immutable
  parallel safe
  return (
    select case jsonb_typeof(h.value) when 'array' then h.value ->> 0 else h.value #>> '{}' end
      from jsonb_each(case when jsonb_typeof(headers) = 'object' then headers else '{}' end) as h (name, value)
     where lower(h.name) = _header.name
     limit 1);

revoke all on function nightowls._header(jsonb, text) from public;

-- Compares by hashes with a nonce, so that the time it takes says nothing.
create function nightowls._same_secret(one bytea, other bytea)
  returns boolean
  language plpgsql
  volatile
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_nonce bytea := uuid_send(gen_random_uuid());
begin
  return coalesce(sha256(v_nonce || _same_secret.one) = sha256(v_nonce || _same_secret.other), false);
end;
$$;

revoke all on function nightowls._same_secret(bytea, bytea) from public;

create function nightowls.verify_webhook(
  headers   jsonb,
  body      text,
  secret    text,
  scheme    text default 'standard',
  tolerance interval default '5 minutes'
)
  returns boolean
  language plpgsql
  volatile
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_signature text;
  v_time      text;
  v_given     text;
  v_expected  bytea;
begin
  if verify_webhook.headers is null or verify_webhook.body is null or verify_webhook.secret is null or verify_webhook.scheme is null
     or verify_webhook.tolerance is null then
    raise exception 'headers, body, secret, scheme and tolerance must not be null' using errcode = 'null_value_not_allowed';
  elsif verify_webhook.secret = '' then
    raise exception 'secret must not be empty' using errcode = 'invalid_parameter_value';
  elsif verify_webhook.scheme not in ('standard', 'stripe', 'github') then
    raise exception 'scheme must be standard, stripe or github' using errcode = 'invalid_parameter_value';
  elsif jsonb_typeof(verify_webhook.headers) <> 'object' then
    raise exception 'headers must be a JSON object' using errcode = 'invalid_parameter_value';
  end if;

  if verify_webhook.scheme = 'github' then
    v_signature := substring(nightowls._header(verify_webhook.headers, 'x-hub-signature-256') from '^sha256=([0-9a-f]{64})$');
    return v_signature is not null and nightowls._same_secret(
      nightowls._hmac_sha256(convert_to(verify_webhook.secret, 'UTF8'), convert_to(verify_webhook.body, 'UTF8')), decode(v_signature, 'hex'));
  end if;

  if verify_webhook.scheme = 'standard' then
    -- Svix's own names are as old as the standard.
    v_time := coalesce(nightowls._header(verify_webhook.headers, 'webhook-timestamp'), nightowls._header(verify_webhook.headers, 'svix-timestamp'));
  else
    v_signature := nightowls._header(verify_webhook.headers, 'stripe-signature');
    v_time := substring(',' || replace(v_signature, ' ', '') from ',t=([0-9]+)(?:,|$)');
  end if;
  if v_time is null or v_time !~ '^[0-9]{1,12}$'
     or abs(extract(epoch from clock_timestamp()) - v_time::bigint) > extract(epoch from verify_webhook.tolerance) then
    return false;
  end if;

  if verify_webhook.scheme = 'stripe' then
    v_expected := nightowls._hmac_sha256(convert_to(verify_webhook.secret, 'UTF8'), convert_to(concat(v_time, '.', verify_webhook.body), 'UTF8'));
    for v_given in select (regexp_matches(',' || replace(v_signature, ' ', ''), ',v1=([0-9a-f]{64})(?=,|$)', 'g'))[1] limit 10 loop
      if nightowls._same_secret(v_expected, decode(v_given, 'hex')) then
        return true;
      end if;
    end loop;
    return false;
  end if;

  v_expected := nightowls._hmac_sha256(
    nightowls._webhook_key(verify_webhook.secret),
    convert_to(concat(coalesce(nightowls._header(verify_webhook.headers, 'webhook-id'), nightowls._header(verify_webhook.headers, 'svix-id')), '.',
                      v_time, '.', verify_webhook.body), 'UTF8'));
  for v_given in
    select s.signature
      from regexp_split_to_table(
             coalesce(nightowls._header(verify_webhook.headers, 'webhook-signature'), nightowls._header(verify_webhook.headers, 'svix-signature')), ' ')
             as s (signature)
     limit 10
  loop
    if v_given ~ '^v1,[A-Za-z0-9+/]{43}=$' and nightowls._same_secret(v_expected, decode(substr(v_given, 4), 'base64')) then
      return true;
    end if;
  end loop;
  return false;
end;
$$;

comment on function nightowls.verify_webhook(jsonb, text, text, text, interval) is
  'Whether a webhook that came in is signed with a secret and not too old. headers: those of the request, {name: value}, in any case; body: the request''s body, to the byte; '
  'secret: the shared secret; scheme: standard (Standard Webhooks and Svix, secret whsec_…), stripe or github; tolerance: how far its time may be from the clock (github signs '
  'none). False for whatever is missing or malformed. Neither waits nor locks. Raises 22004 or 22023 for an argument that is null, or a scheme that is none of these.';

revoke all on function nightowls.verify_webhook(jsonb, text, text, text, interval) from public;
