-- Members: who belongs to an org, who may change that, and what the policies of all tables ask.
--
-- A member is known by the user id (the sub of the JWT, or the setting nightowls.user_id), never by the role: all members come as
-- one role, that of grant_member(). Functions that members call are either of the caller's rights, under the policies, or
-- check the membership themselves: in a function of the owner's _is_service() is always true.

-- The orgs of the caller, for policies: (select nightowls._member_orgs()) is evaluated once a statement.
-- Definer: it must read the memberships before any policy can let the caller read them.
create function nightowls._member_orgs()
  returns uuid[]
  language plpgsql
  stable
  parallel safe
  security definer
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_bitmapscan to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
begin
  return array(select m.org_id from nightowls.org_members m where m.user_id = nightowls._user_id());
end;
$$;

revoke all on function nightowls._member_orgs() from public;

create function nightowls._refuse_member(org uuid, needed text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  raise exception 'permission denied for org %', _refuse_member.org
    using errcode = 'insufficient_privilege', hint = _refuse_member.needed;
end;
$$;

revoke all on function nightowls._refuse_member(uuid, text) from public;

-- An org that has an owner keeps one, whoever writes: the service too. An org that is gone needs none.
-- Definer: who may delete one row need not see the others.
create function nightowls._keep_an_owner()
  returns trigger
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if tg_op = 'UPDATE' then
    if new.role = 'owner' and new.org_id = old.org_id then
      return null;
    end if;
  end if;
  -- Locked, so that two who each take away another owner do not both find one left.
  perform
     from nightowls.org_members m
    where m.org_id = old.org_id and m.role = 'owner'
    order by m.user_id
    limit 1
      for share;
  if found or not exists (select from nightowls.orgs o where o.org_id = old.org_id) then
    return null;
  end if;
  raise exception 'user "%" is the last owner of org %', left(old.user_id, 64), old.org_id
    using errcode = 'object_not_in_prerequisite_state', hint = 'Make somebody else an owner first.';
end;
$$;

revoke all on function nightowls._keep_an_owner() from public;

create trigger t20_keep_an_owner
  after update or delete on nightowls.org_members
  for each row when (old.role = 'owner') execute function nightowls._keep_an_owner();

-- Adds, changes or removes a member and says whether anything had to be done. change: add, change or remove.
-- Definer: members may not write to the table.
create function nightowls._write_member(org uuid, user_id text, role text, change text)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_role text;
begin
  if _write_member.user_id is null or _write_member.role is null and _write_member.change <> 'remove' then
    raise exception 'user_id and role must not be null' using errcode = 'null_value_not_allowed';
  elsif _write_member.user_id = '' or _write_member.role not in ('owner', 'admin', 'member', 'viewer') then
    raise exception 'user_id must not be empty, and role is owner, admin, member or viewer'
      using errcode = 'invalid_parameter_value';
  elsif octet_length(_write_member.user_id) > 255 then
    raise exception 'user_id is too long' using errcode = 'program_limit_exceeded', detail = 'It has at most 255 bytes.';
  end if;
  perform nightowls._refuse_no_org(_write_member.org);

  -- All that the rules look at, in one order.
  perform
     from nightowls.org_members m
    where m.org_id = _write_member.org and (m.role = 'owner' or m.user_id = _write_member.user_id)
    order by m.user_id
      for update;
  if _write_member.change = 'add' then
    insert into nightowls.org_members (org_id, user_id, role)
    values (_write_member.org, _write_member.user_id, _write_member.role)
    on conflict do nothing;
    if not found then
      select m.role into v_role
        from nightowls.org_members m
       where m.org_id = _write_member.org and m.user_id = _write_member.user_id;
      if v_role is distinct from _write_member.role then
        raise exception 'user "%" is a member already, as %', left(_write_member.user_id, 64), v_role
          using errcode = 'duplicate_object', hint = 'Change it with nightowls.change_member().';
      end if;
      return false;
    end if;
    return true;
  elsif _write_member.change = 'remove' then
    delete from nightowls.org_members m
     where m.org_id = _write_member.org and m.user_id = _write_member.user_id;
    return found;
  end if;

  select m.role into v_role
    from nightowls.org_members m
   where m.org_id = _write_member.org and m.user_id = _write_member.user_id;
  if not found then
    perform nightowls._refuse_unknown(
      'member', _write_member.user_id,
      array(select m.user_id from nightowls.org_members m where m.org_id = _write_member.org order by m.user_id limit 100),
      'Add it with nightowls.add_member().');
  end if;
  update nightowls.org_members m
     set role = _write_member.role
   where m.org_id = _write_member.org and m.user_id = _write_member.user_id and m.role <> _write_member.role;
  return v_role <> _write_member.role;
end;
$$;

revoke all on function nightowls._write_member(uuid, text, text, text) from public;

-- The same for a member: an owner may do everything, an admin what concerns no owner, and everybody may leave.
-- Definer: it looks at the memberships and writes them, for the caller of the setting or JWT only.
create function nightowls._manage_member(org uuid, user_id text, role text, change text)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_caller text := nightowls._user_id();
  v_own    text;
  v_other  text;
begin
  -- In the order of _write_member(), and kept until the end: nobody changes meanwhile what this rests on.
  perform
     from nightowls.org_members m
    where m.org_id = _manage_member.org and (m.role = 'owner' or m.user_id in (v_caller, _manage_member.user_id))
    order by m.user_id
      for update;
  select m.role into v_own from nightowls.org_members m where m.org_id = _manage_member.org and m.user_id = v_caller;
  select m.role into v_other
    from nightowls.org_members m
   where m.org_id = _manage_member.org and m.user_id = _manage_member.user_id;
  if (v_own = 'owner'
      or v_own = 'admin' and v_other is distinct from 'owner' and _manage_member.role is distinct from 'owner'
      or v_own is not null and _manage_member.change = 'remove' and _manage_member.user_id = v_caller) is not true then
    perform nightowls._refuse_member(
      _manage_member.org, 'An owner of the org may change its members, an admin those who are no owners; everybody may leave.');
  end if;
  return nightowls._write_member(_manage_member.org, _manage_member.user_id, _manage_member.role, _manage_member.change);
end;
$$;

revoke all on function nightowls._manage_member(uuid, text, text, text) from public;

create function nightowls.add_member(user_id text, role text default 'member', org uuid default null)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org uuid := nightowls.current_org(add_member.org);
begin
  if nightowls._is_service() then
    return nightowls._write_member(v_org, add_member.user_id, add_member.role, 'add');
  end if;
  return nightowls._manage_member(v_org, add_member.user_id, add_member.role, 'add');
end;
$$;

comment on function nightowls.add_member(text, text, uuid) is
  'Makes a user a member of an org; true if it was none, false if it was one in this role already. user_id: the sub of its JWT, any text of at most 255 '
  'bytes; role: owner, admin, member or viewer; org: the tenant. For services, owners, and admins (who make no owners). Waits for open changes of '
  'the same member or the org''s owners. Raises 42501 for who may not, 42710 if the user is a member in another role, 22004, 22023 or 54000 for an '
  'argument that is null, not valid or too long, NW010 if there is no org.';

revoke all on function nightowls.add_member(text, text, uuid) from public;

create function nightowls.change_member(user_id text, role text, org uuid default null)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org uuid := nightowls.current_org(change_member.org);
begin
  if nightowls._is_service() then
    return nightowls._write_member(v_org, change_member.user_id, change_member.role, 'change');
  end if;
  return nightowls._manage_member(v_org, change_member.user_id, change_member.role, 'change');
end;
$$;

comment on function nightowls.change_member(text, text, uuid) is
  'Gives a member of an org another role; false if it has that role already. user_id: the member; role: owner, admin, member or viewer; org: the tenant. '
  'For services, owners, and admins (who change no owners and make none). Waits for open changes of the same member or the org''s owners. Raises 42501 for '
  'who may not, 55000 if an org with owners would be left without one, NW007 if the user is no member, 22004, 22023 or 54000 for an argument that is '
  'null, not valid or too long, NW010 if there is no org.';

revoke all on function nightowls.change_member(text, text, uuid) from public;

create function nightowls.remove_member(user_id text, org uuid default null)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org uuid := nightowls.current_org(remove_member.org);
begin
  if nightowls._is_service() then
    return nightowls._write_member(v_org, remove_member.user_id, null, 'remove');
  end if;
  return nightowls._manage_member(v_org, remove_member.user_id, null, 'remove');
end;
$$;

comment on function nightowls.remove_member(text, uuid) is
  'Takes a user out of an org; false if it was no member. user_id: the member; org: the tenant. What the user wrote stays. For services, owners, admins '
  '(who remove no owners), and for a member itself, who leaves. Waits for open changes of the same member or the org''s owners. Raises 42501 for who may '
  'not, 55000 if an org with owners would be left without one, 22004, 22023 or 54000 for a user_id that is null, empty or too long, NW010 if there is no org.';

revoke all on function nightowls.remove_member(text, uuid) from public;

create policy member_read on nightowls.orgs for select
  using (org_id = any ((select nightowls._member_orgs())::uuid[]));

create policy member_read on nightowls.org_members for select
  using (org_id = any ((select nightowls._member_orgs())::uuid[]));
