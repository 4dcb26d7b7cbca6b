-- Orgs: the tenants, who belongs to them, and which one a call is for.

create function nightowls.version()
  returns text
  language sql
  immutable
  parallel safe
  return '0.1.0';

comment on function nightowls.version() is
  'The version of nightowls that is installed, such as 0.1.0.';

revoke all on function nightowls.version() from public;

-- No row is written at install: a dump that carries the rows would then meet them again.
create table nightowls.settings (
  name  text not null,
  value jsonb not null,
  constraint settings_pkey primary key (name)
);

comment on table nightowls.settings is
  'Settings of the whole installation, one row each; an absent row means the default. '
  'default_org: the org of a call that names none. snapshot_every: after how many events of an aggregate new projections take a '
  'snapshot, 1000 by default, 0 for never. clock_every: how many seconds lie between two runs of the clock, as schedule said.';
comment on column nightowls.settings.name is 'The setting''s name.';
comment on column nightowls.settings.value is 'Its value.';

create table nightowls.orgs (
  org_id      uuid not null default gen_random_uuid(),
  name        text not null,
  external_id text,
  created_at  timestamptz not null default clock_timestamp(),
  constraint orgs_pkey primary key (org_id),
  constraint orgs_external_id_key unique (external_id),
  constraint orgs_name_check check (name <> '')
);

comment on table nightowls.orgs is 'The tenants. Everything else belongs to one of them.';
comment on column nightowls.orgs.org_id is 'The tenant''s id, the first column of every other key.';
comment on column nightowls.orgs.name is 'A name for people.';
comment on column nightowls.orgs.external_id is
  'The id another system (the sign-in provider) gives this org; a JWT''s org_id that is no uuid is looked up here.';
comment on column nightowls.orgs.created_at is 'When the org was made.';

-- No foreign key between our tables: pg_restore -j loads an extension's tables in any order.
create table nightowls.org_members (
  org_id     uuid not null,
  user_id    text not null,
  role       text not null default 'member',
  created_at timestamptz not null default clock_timestamp(),
  constraint org_members_pkey primary key (org_id, user_id),
  constraint org_members_role_check check (role in ('owner', 'admin', 'member', 'viewer'))
);

create index org_members_user_id_idx on nightowls.org_members (user_id, org_id);

comment on table nightowls.org_members is 'Which user belongs to which org, and as what.';
comment on column nightowls.org_members.org_id is 'The org.';
comment on column nightowls.org_members.user_id is
  'The user: the sub of the JWT, which need not be a uuid; on a plain server the setting nightowls.user_id.';
comment on column nightowls.org_members.role is 'owner, admin, member or viewer.';
comment on column nightowls.org_members.created_at is 'When the membership was made.';

-- The right to execute this function is what makes a role a service: grant_service() gives it, policies
-- and current_org() ask for it. The owner and superusers have it by nature.
create function nightowls._service()
  returns void
  language sql
  immutable
  parallel safe
  return null;

revoke all on function nightowls._service() from public;

create function nightowls._is_service()
  returns boolean
  language sql
  stable
  parallel safe
  return has_function_privilege('nightowls._service()'::regprocedure, 'execute');

revoke all on function nightowls._is_service() from public;

create function nightowls._user_id()
  returns text
  language sql
  stable
  parallel safe
  return coalesce(
    nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub',
    nullif(current_setting('nightowls.user_id', true), ''));

revoke all on function nightowls._user_id() from public;

-- Definer: it must read the memberships of a caller who may read none. It answers for the caller only.
create function nightowls._is_member(org uuid)
  returns boolean
  language plpgsql
  stable
  parallel safe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return exists (
    select from nightowls.org_members m
     where m.org_id = _is_member.org
       and m.user_id = nightowls._user_id());
end;
$$;

revoke all on function nightowls._is_member(uuid) from public;

create function nightowls._refuse_no_default()
  returns uuid
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  raise exception 'no org'
    using errcode = 'NW010',
          detail = 'The call names no org, nor does the transaction, the JWT or the installation''s default.',
          hint = 'Pass org => …, or choose a default with nightowls.set_default_org(org).';
end;
$$;

revoke all on function nightowls._refuse_no_default() from public;

-- Definer: settings and orgs are closed to members. It gives back one id and nothing else.
create function nightowls._resolve_org()
  returns uuid
  language plpgsql
  stable
  parallel safe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_uuid   constant text := '^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$';
  v_text   text;
  v_claims jsonb;
  v_org    uuid;
begin
  if current_setting('nightowls.org_id', true) <> '' or current_setting('request.jwt.claims', true) <> '' then
    v_text := nullif(current_setting('nightowls.org_id', true), '');
    if v_text is not null then
      if v_text !~ v_uuid then
        raise exception 'setting nightowls.org_id is not a uuid: "%"', left(v_text, 64)
          using errcode = 'invalid_parameter_value',
                hint = 'Set it with set_config(''nightowls.org_id'', org_id::text, true).';
      end if;
      return v_text::uuid;
    end if;

    v_claims := nullif(current_setting('request.jwt.claims', true), '')::jsonb;
    if v_claims is not null then
      -- Never user_metadata: the user writes that.
      v_text := coalesce(v_claims ->> 'org_id', v_claims -> 'app_metadata' ->> 'org_id');
      if v_text ~ v_uuid then
        return v_text::uuid;
      elsif v_text is not null then
        select o.org_id into v_org from nightowls.orgs o where o.external_id = v_text;
        if v_org is null then
          raise exception 'no org has the external id "%"', left(v_text, 64)
            using errcode = 'NW010',
                  hint = 'The JWT names this org. Make it with nightowls.create_org(name, external_id).';
        end if;
        return v_org;
      end if;
    end if;
  end if;

  return coalesce(
    (select (s.value #>> '{}')::uuid from nightowls.settings s where s.name = 'default_org'), nightowls._refuse_no_default());
end;
$$;

revoke all on function nightowls._resolve_org() from public;

create function nightowls.current_org(org uuid default null)
  returns uuid
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org uuid := coalesce(current_org.org, nightowls._resolve_org());
begin
  if nightowls._is_service() or nightowls._is_member(v_org) then
    return v_org;
  end if;
  raise exception 'permission denied for org %', v_org
    using errcode = 'insufficient_privilege',
          hint = 'The caller is neither a service nor a member of this org.';
end;
$$;

comment on function nightowls.current_org(uuid) is
  'The org a call is for: the argument; else the transaction''s setting nightowls.org_id; else the JWT''s org_id, also '
  'under app_metadata (one that is no uuid is looked up in orgs.external_id); else the default org. Locks nothing. '
  'Raises NW010 if none of these names an org, 42501 if the caller is neither a service nor a member of it, '
  '22023 if the setting is not a uuid.';

revoke all on function nightowls.current_org(uuid) from public;

-- The same in an expression, for the hot path: null means the default org, which a service need not look up itself.
create function nightowls._caller_org(org uuid)
  returns uuid
  language sql
  stable
  parallel safe
  return case
    when nightowls._is_service()
         and ('' <> any (array[current_setting('nightowls.org_id', true), current_setting('request.jwt.claims', true)])) is not true
      then org
    else nightowls.current_org(org)
  end;

revoke all on function nightowls._caller_org(uuid) from public;

create function nightowls.create_org(
  name        text,
  external_id text default null,
  org         uuid default null
)
  returns uuid
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org   uuid := coalesce(create_org.org, gen_random_uuid());
  v_found nightowls.orgs;
begin
  if create_org.name is null then
    raise exception 'name must not be null' using errcode = 'null_value_not_allowed';
  elsif create_org.name = '' then
    raise exception 'name must not be empty' using errcode = 'invalid_parameter_value';
  end if;

  insert into nightowls.orgs (org_id, name, external_id)
  values (v_org, create_org.name, create_org.external_id)
  on conflict do nothing;
  if found then
    return v_org;
  end if;

  select o.* into v_found
    from nightowls.orgs o
   where o.org_id = v_org
      or o.external_id = create_org.external_id
   order by o.org_id = v_org desc
   limit 1;
  if v_found.name = create_org.name
     and v_found.external_id is not distinct from create_org.external_id
     and v_found.org_id = coalesce(create_org.org, v_found.org_id) then
    return v_found.org_id;
  end if;
  raise exception 'org % exists already with another definition', v_found.org_id
    using errcode = 'duplicate_object',
          detail = format('Its name is "%s", its external id %s.',
                          v_found.name, coalesce(format('"%s"', v_found.external_id), 'null')),
          hint = 'Change it with update nightowls.orgs, or choose another id.';
end;
$$;

comment on function nightowls.create_org(text, text, uuid) is
  'Makes an org and returns its id. name: for people; external_id: the sign-in provider''s id, unique; org: the id to use, '
  'by default a new one. An org with this id or external id and the same definition is returned as it is. '
  'Raises 42710 if its definition differs, 22004 or 22023 if name is null or empty.';

revoke all on function nightowls.create_org(text, text, uuid) from public;

create function nightowls.set_default_org(org uuid)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if set_default_org.org is null then
    delete from nightowls.settings s where s.name = 'default_org';
    return;
  end if;
  if not exists (select from nightowls.orgs o where o.org_id = set_default_org.org) then
    raise exception 'org % does not exist', set_default_org.org
      using errcode = 'NW007', hint = 'Make it with nightowls.create_org(name).';
  end if;
  insert into nightowls.settings (name, value)
  values ('default_org', to_jsonb(set_default_org.org))
  on conflict (name) do update set value = excluded.value;
end;
$$;

comment on function nightowls.set_default_org(uuid) is
  'Makes an org the default of the installation: the one of a call that names none. null: no default. '
  'Raises NW007 if the org does not exist.';

revoke all on function nightowls.set_default_org(uuid) from public;

alter table nightowls.settings enable row level security;
alter table nightowls.settings force row level security;
create policy service_all on nightowls.settings
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));

alter table nightowls.orgs enable row level security;
alter table nightowls.orgs force row level security;
create policy service_all on nightowls.orgs
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));

alter table nightowls.org_members enable row level security;
alter table nightowls.org_members force row level security;
create policy service_all on nightowls.org_members
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));
