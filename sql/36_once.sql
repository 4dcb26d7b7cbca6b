-- Once: what has been done is not done again.

-- Insert-only. The key is kept as a hash: it can be long, and may name somebody who is to be forgotten.
create table nightowls.once_keys (
  org_id     uuid        not null,
  scope      text        collate "C" not null,
  key_hash   bytea       not null,
  expires_at timestamptz not null,
  made_at    timestamptz not null default clock_timestamp(),
  constraint once_keys_pkey primary key (org_id, scope, key_hash)
);

create index once_keys_expires_at_idx on nightowls.once_keys (org_id, expires_at);

comment on table nightowls.once_keys is 'What once has said true to.';
comment on column nightowls.once_keys.org_id is 'The tenant.';
comment on column nightowls.once_keys.scope is 'What the key is for.';
comment on column nightowls.once_keys.key_hash is 'SHA-256 of the key.';
comment on column nightowls.once_keys.expires_at is 'Until when it is kept at least.';
comment on column nightowls.once_keys.made_at is 'The clock when it was first said.';

-- Definer: nobody else may write the table.
create function nightowls._once(org uuid, scope text, key text, keep interval)
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
  v_hash bytea := sha256(convert_to(_once.key, 'UTF8'));
begin
  if _once.scope is null or _once.key is null or _once.keep is null then
    raise exception 'scope, key and keep must not be null' using errcode = 'null_value_not_allowed';
  elsif _once.scope = '' or _once.key = '' then
    raise exception 'scope and key must not be empty' using errcode = 'invalid_parameter_value';
  elsif octet_length(_once.scope) > 255 then
    raise exception 'scope is too long' using errcode = 'program_limit_exceeded', detail = 'It has at most 255 bytes.';
  elsif octet_length(_once.key) > 65536 then
    raise exception 'key is too long' using errcode = 'program_limit_exceeded', detail = 'It has at most 65536 bytes.';
  elsif _once.keep <= interval '0' then
    raise exception 'keep must be more than 0' using errcode = 'invalid_parameter_value';
  end if;
  -- A known key is found without writing anything. (An insert that meets one writes nothing either, unless two meet.)
  if exists (
       select from nightowls.once_keys k where k.org_id = _once.org and k.scope = _once.scope and k.key_hash = v_hash) then
    return false;
  end if;
  insert into nightowls.once_keys (org_id, scope, key_hash, expires_at)
  values (_once.org, _once.scope, v_hash,
          case when _once.keep > interval '100 years' then 'infinity' else clock_timestamp() + _once.keep end)
  on conflict do nothing;
  if found then
    perform nightowls._refuse_no_org(_once.org);
    return true;
  end if;
  return false;
end;
$$;

revoke all on function nightowls._once(uuid, text, text, interval) from public;

create function nightowls.once(scope text, key text, keep interval default '30 days', org uuid default null)
  returns boolean
  language sql
  volatile
  parallel unsafe
  return nightowls._once(nightowls.current_org(once.org), once.scope, once.key, once.keep);

comment on function nightowls.once(text, text, interval, uuid) is
  'Returns true the first time that it is called with this scope and key, and false from then on; in the caller''s transaction, so that what is '
  'done if it is true commits with it, or neither does. scope: what the key is for, such as a queue or a consumer; key: what was done, such as '
  'the id of a message; keep: how long it is remembered at least; it is kept for longer while a queue of the org has a message, done and archived or not, that '
  'was sent before the key was made, as that can be delivered again; beyond 100 years: for ever; org: the tenant. A call that finds '
  'the key writes nothing. Waits for an open transaction that has said true to the same: if it rolls back, true. Raises NW010 if there is no org, 22004 or 22023 for an argument '
  'that is null, empty or not above 0, 54000 for one that is too long, 40001 above read committed when somebody else was first.';

revoke all on function nightowls.once(text, text, interval, uuid) from public;

-- Deletes expired keys of an org, at most so many, but none that was made since the oldest message was sent that can still be delivered: one that
-- is not done, or that is in the archive, from where replay can send it again. Nobody is waited for.
create function nightowls._prune_once(org uuid, max_keys int)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_bitmapscan to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
declare
  v_oldest timestamptz;
  v_count  bigint;
begin
  -- Ids rise with the time of sending.
  select min(least(m.enqueued_at, a.enqueued_at)) - interval '1 minute' into v_oldest
    from nightowls.queues q
    left join lateral (
           select x.enqueued_at
             from nightowls.queue_messages x
            where x.org_id = q.org_id and x.queue_id = q.queue_id
            order by x.msg_id
            limit 1) m on true
    left join lateral (
           select x.enqueued_at
             from nightowls.queue_archive x
            where x.org_id = q.org_id and x.queue_id = q.queue_id
            order by x.msg_id
            limit 1) a on true
   where q.org_id = _prune_once.org;
  delete from nightowls.once_keys k
   where k.ctid = any (array(
           select x.ctid
             from nightowls.once_keys x
            where x.org_id = _prune_once.org and x.expires_at <= clock_timestamp()
              and (v_oldest is null or x.made_at < v_oldest)
            order by x.expires_at
            limit _prune_once.max_keys
              for update skip locked));
  get diagnostics v_count = row_count;
  return v_count;
end;
$$;

revoke all on function nightowls._prune_once(uuid, int) from public;

alter table nightowls.once_keys enable row level security;
alter table nightowls.once_keys force row level security;
create policy service_all on nightowls.once_keys
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));
