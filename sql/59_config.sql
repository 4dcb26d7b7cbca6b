-- Configuration: values that the parts of an application share, for one org or for all; secrets among them are kept elsewhere.

create table nightowls.app_config (
  org_id     uuid        not null,
  config     jsonb       not null default '{}',
  updated_at timestamptz not null default clock_timestamp(),
  constraint app_config_pkey primary key (org_id)
);

comment on table nightowls.app_config is 'Shared settings, one row an org and one for all. Kept by set_config_value.';
comment on column nightowls.app_config.org_id is 'The tenant; 00000000-0000-0000-0000-000000000000 for all.';
comment on column nightowls.app_config.config is
  'The values by key: a text; of a secret an object that says where it is kept: {"secret": "vault"} or {"secret": "table"}.';
comment on column nightowls.app_config.updated_at is 'When a value was last set.';

-- Secrets where there is no Vault. No role is granted anything on it.
create table nightowls._config_secrets (
  org_id uuid not null,
  key    text collate "C" not null,
  value  text not null,
  constraint _config_secrets_pkey primary key (org_id, key)
);

-- Whether Vault is here and lets the owner use it; in this order, as a look at what is in a schema without USAGE raises.
create function nightowls._has_vault()
  returns boolean
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if to_regnamespace('vault') is null then
    return false;
  elsif not has_schema_privilege('vault', 'usage') then
    return false;
  end if;
  return coalesce(has_table_privilege(to_regclass('vault.decrypted_secrets'), 'select'), false)
     and 2 = (select count(distinct p.proname)
                from pg_proc p
               where p.pronamespace = to_regnamespace('vault') and p.proname in ('create_secret', 'update_secret')
                 and has_function_privilege(p.oid, 'execute'));
end;
$$;

revoke all on function nightowls._has_vault() from public;

create function nightowls._check_config_key(key text)
  returns void
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if _check_config_key.key is null then
    raise exception 'key must not be null' using errcode = 'null_value_not_allowed';
  elsif _check_config_key.key = '' or _check_config_key.key ~ '[\x01-\x1f\x7f]' then
    raise exception 'key must not be empty or hold control characters' using errcode = 'invalid_parameter_value';
  elsif octet_length(_check_config_key.key) > 255 then
    raise exception 'key is too long' using errcode = 'program_limit_exceeded', detail = 'It has at most 255 bytes.';
  end if;
end;
$$;

revoke all on function nightowls._check_config_key(text) from public;

-- Definer: nobody else may write to the tables; services need no right on Vault.
create function nightowls._set_config_value(org uuid, key text, value text, secret boolean)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_name text := 'nightowls/' || _set_config_value.org || '/' || _set_config_value.key;
  v_id   uuid;
  v_old  jsonb;
begin
  perform nightowls._check_config_key(_set_config_value.key);
  if _set_config_value.secret is null then
    raise exception 'secret must not be null' using errcode = 'null_value_not_allowed';
  elsif _set_config_value.value ~ '[\x01-\x1f\x7f]' then
    raise exception 'the value of "%" holds control characters', left(_set_config_value.key, 64)
      using errcode = 'invalid_parameter_value', hint = 'A line break at its end, often: it does not belong to the value.';
  elsif octet_length(_set_config_value.value) > 65536 then
    raise exception 'the value of "%" is too long', left(_set_config_value.key, 64)
      using errcode = 'program_limit_exceeded', detail = 'It has at most 65536 bytes.';
  elsif _set_config_value.org <> '00000000-0000-0000-0000-000000000000' then
    perform nightowls._refuse_no_org(_set_config_value.org);
  end if;

  -- The row first: who sets a value of the same org waits here.
  insert into nightowls.app_config (org_id) values (_set_config_value.org)
  on conflict (org_id) do update set updated_at = clock_timestamp();
  select c.config -> _set_config_value.key into v_old from nightowls.app_config c where c.org_id = _set_config_value.org;
  if v_old ->> 'secret' = 'table' then
    delete from nightowls._config_secrets s where s.org_id = _set_config_value.org and s.key = _set_config_value.key;
  end if;
  if nightowls._has_vault() then
    execute format('select s.id from %s s where s.name = $1', to_regclass('vault.decrypted_secrets')) into v_id using v_name;
    if v_id is not null and (_set_config_value.value is null or not _set_config_value.secret) then
      -- Vault has no function that removes a secret.
      execute format('select %s.update_secret($1, $2)', to_regnamespace('vault')) using v_id, 'unset';
    end if;
  end if;

  if _set_config_value.value is null then
    update nightowls.app_config c set config = c.config - _set_config_value.key where c.org_id = _set_config_value.org;
    return;
  elsif not _set_config_value.secret then
    update nightowls.app_config c
       set config = c.config || jsonb_build_object(_set_config_value.key, _set_config_value.value)
     where c.org_id = _set_config_value.org;
    return;
  end if;

  if nightowls._has_vault() then
    if v_id is null then
      execute format('select %s.create_secret($1, $2, $3)', to_regnamespace('vault'))
        using _set_config_value.value, v_name, 'set by nightowls.set_config_value()';
    else
      execute format('select %s.update_secret($1, $2)', to_regnamespace('vault')) using v_id, _set_config_value.value;
    end if;
  else
    insert into nightowls._config_secrets (org_id, key, value)
    values (_set_config_value.org, _set_config_value.key, _set_config_value.value);
  end if;
  update nightowls.app_config c
     set config = c.config || jsonb_build_object(
           _set_config_value.key, jsonb_build_object('secret', case when nightowls._has_vault() then 'vault' else 'table' end))
   where c.org_id = _set_config_value.org;
end;
$$;

revoke all on function nightowls._set_config_value(uuid, text, text, boolean) from public;

create function nightowls.set_config_value(
  key      text,
  value    text,
  secret   boolean default false,
  for_all  boolean default false,
  org      uuid default null
)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if set_config_value.for_all is null then
    raise exception 'for_all must not be null' using errcode = 'null_value_not_allowed';
  end if;
  perform nightowls._set_config_value(
    case when set_config_value.for_all then '00000000-0000-0000-0000-000000000000' else nightowls.current_org(set_config_value.org) end,
    set_config_value.key, set_config_value.value, set_config_value.secret);
end;
$$;

comment on function nightowls.set_config_value(text, text, boolean, boolean, uuid) is
  'Sets a value of the application''s configuration. key: its name; value: a text without control characters, null to unset it; secret: whether members must not '
  'see it: then it is kept in Vault where that is, else in a table that no role may read; for_all: for all orgs, where they have none of their own; org: the tenant. '
  'For services. Waits for who is setting a value of the same org. Raises 22023 if key or value hold control characters or key is empty, 22004 if an argument '
  'other than value is null, 54000 if key or value is too long, NW010 if there is no org.';

revoke all on function nightowls.set_config_value(text, text, boolean, boolean, uuid) from public;

-- Definer: members may not read the tables, nor services Vault. with_secrets: whether secrets are given out, or refused.
-- Whoever calls it has checked the org.
create function nightowls._get_config_value(org uuid, key text, with_secrets boolean)
  returns text
  language plpgsql
  stable
  parallel safe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_row   record;
  v_value text;
begin
  perform nightowls._check_config_key(_get_config_value.key);
  select c.org_id, c.config -> _get_config_value.key as value into v_row
    from nightowls.app_config c
   where c.org_id in (_get_config_value.org, '00000000-0000-0000-0000-000000000000') and c.config ? _get_config_value.key
   order by c.org_id = _get_config_value.org desc
   limit 1;
  if not found then
    return null;
  elsif jsonb_typeof(v_row.value) = 'string' then
    return v_row.value #>> '{}';
  elsif not _get_config_value.with_secrets then
    raise exception 'permission denied for the secret "%"', left(_get_config_value.key, 64)
      using errcode = 'insufficient_privilege', hint = 'A service reads secrets.';
  elsif v_row.value ->> 'secret' = 'table' then
    return (select s.value from nightowls._config_secrets s where s.org_id = v_row.org_id and s.key = _get_config_value.key);
  elsif nightowls._has_vault() then
    execute format('select s.decrypted_secret from %s s where s.name = $1', to_regclass('vault.decrypted_secrets'))
       into v_value using 'nightowls/' || v_row.org_id || '/' || _get_config_value.key;
    return v_value;
  end if;
  return null;
end;
$$;

revoke all on function nightowls._get_config_value(uuid, text, boolean) from public;

-- Definer: it looks at the membership of the caller of the setting or JWT, and gives no secret out.
create function nightowls._my_config_value(org uuid, key text)
  returns text
  language plpgsql
  stable
  parallel safe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if not nightowls._is_member(_my_config_value.org) then
    perform nightowls._refuse_member(_my_config_value.org, 'Members of the org read its configuration.');
  end if;
  return nightowls._get_config_value(_my_config_value.org, _my_config_value.key, false);
end;
$$;

revoke all on function nightowls._my_config_value(uuid, text) from public;

create function nightowls.get_config_value(key text, org uuid default null)
  returns text
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org uuid := nightowls.current_org(get_config_value.org);
begin
  if nightowls._is_service() then
    return nightowls._get_config_value(v_org, get_config_value.key, true);
  end if;
  return nightowls._my_config_value(v_org, get_config_value.key);
end;
$$;

comment on function nightowls.get_config_value(text, uuid) is
  'A value of the application''s configuration: the org''s own, else the one for all; null if it is not set. key: its name; org: the tenant. For services; for '
  'members of the org what is no secret. Locks nothing. Raises 42501 for a secret that the caller may not read, 22004, 22023 or 54000 for a key that is null, '
  'not valid or too long, NW010 if there is no org.';

revoke all on function nightowls.get_config_value(text, uuid) from public;

alter table nightowls.app_config enable row level security;
alter table nightowls.app_config force row level security;
create policy service_all on nightowls.app_config
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));

alter table nightowls._config_secrets enable row level security;
alter table nightowls._config_secrets force row level security;
