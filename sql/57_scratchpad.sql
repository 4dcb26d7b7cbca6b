-- Scratchpads, which agents share, and followups, which are work for later.

create table nightowls.scratchpad (
  org_id     uuid        not null,
  scope      text        collate "C" not null,
  key        text        collate "C" not null,
  value      jsonb,
  version    bigint      not null,
  updated_at timestamptz not null default clock_timestamp(),
  constraint scratchpad_pkey primary key (org_id, scope, key)
) with (fillfactor = 70);

comment on table nightowls.scratchpad is 'What agents put by and look up: values by scope and key. Kept by scratchpad_put and scratchpad_delete.';
comment on column nightowls.scratchpad.org_id is 'The tenant.';
comment on column nightowls.scratchpad.scope is 'What the keys belong to; run:<id>, thread:<id> and user:<id> are erased with these.';
comment on column nightowls.scratchpad.key is 'The key within the scope.';
comment on column nightowls.scratchpad.value is 'The value, any JSON; SQL''s null: it was deleted, and the version goes on from there.';
comment on column nightowls.scratchpad.version is 'How often it was put or deleted.';
comment on column nightowls.scratchpad.updated_at is 'When it was last put or deleted.';

-- What the clock takes away for good.
create index scratchpad_deleted_idx on nightowls.scratchpad (org_id, updated_at) where value is null;

create table nightowls.scratchpad_marks (
  org_id  uuid   not null,
  version bigint not null,
  constraint scratchpad_marks_pkey primary key (org_id)
);

comment on table nightowls.scratchpad_marks is 'Where the versions of new keys begin, since the clock has taken away keys that were deleted.';
comment on column nightowls.scratchpad_marks.org_id is 'The tenant.';
comment on column nightowls.scratchpad_marks.version is 'The highest version that a key had which was taken away.';

-- Puts a value, or deletes it if that is null; returns the new version, null if there was nothing to delete. A row that is deleted stays for
-- 30 days, and new keys begin above what was taken away then, so that no version comes twice.
-- Definer: nobody else may write to the table.
create function nightowls._scratchpad_write(org uuid, scope text, key text, value jsonb, expected_version bigint)
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
  v_found nightowls.scratchpad;
  v_first bigint := 1;
begin
  perform nightowls._check_text('scope', _scratchpad_write.scope, true);
  perform nightowls._check_text('key', _scratchpad_write.key, true);
  perform nightowls._check_json('value', _scratchpad_write.value, null, false);
  if _scratchpad_write.expected_version < 0 then
    raise exception 'expected_version must be 0 or more' using errcode = 'invalid_parameter_value';
  end if;
  if _scratchpad_write.value is not null and coalesce(_scratchpad_write.expected_version, 0) = 0 then
    v_first := 1 + coalesce((select m.version from nightowls.scratchpad_marks m where m.org_id = _scratchpad_write.org), 0);
    insert into nightowls.scratchpad as s (org_id, scope, key, value, version)
    values (_scratchpad_write.org, _scratchpad_write.scope, _scratchpad_write.key, _scratchpad_write.value, v_first)
    on conflict (org_id, scope, key) do update
       set value = excluded.value, version = s.version + 1, updated_at = clock_timestamp()
     where _scratchpad_write.expected_version is null or s.value is null
    returning s.* into v_found;
  else
    update nightowls.scratchpad s
       set value = _scratchpad_write.value, version = s.version + 1, updated_at = clock_timestamp()
     where s.org_id = _scratchpad_write.org and s.scope = _scratchpad_write.scope and s.key = _scratchpad_write.key and s.value is not null
       and (_scratchpad_write.expected_version is null or s.version = _scratchpad_write.expected_version)
    returning s.* into v_found;
  end if;
  if found then
    if v_found.version = v_first then
      perform nightowls._refuse_no_org(_scratchpad_write.org);
      -- It may have waited for the clock to take the key away.
      update nightowls.scratchpad s
         set version = m.version + 1
        from nightowls.scratchpad_marks m
       where m.org_id = _scratchpad_write.org and m.version >= v_first
         and s.org_id = _scratchpad_write.org and s.scope = _scratchpad_write.scope and s.key = _scratchpad_write.key
      returning s.* into v_found;
      return coalesce(v_found.version, v_first);
    end if;
    return v_found.version;
  elsif _scratchpad_write.expected_version is null then
    return null;
  end if;
  select s.* into v_found
    from nightowls.scratchpad s
   where s.org_id = _scratchpad_write.org and s.scope = _scratchpad_write.scope and s.key = _scratchpad_write.key and s.value is not null;
  raise exception '"%" of scratchpad "%" is at version %, not %', left(_scratchpad_write.key, 64), left(_scratchpad_write.scope, 64),
      coalesce(v_found.version, 0), _scratchpad_write.expected_version
    using errcode = 'NW001',
          detail = format('Expected version %s, actual version %s.', _scratchpad_write.expected_version, coalesce(v_found.version, 0)),
          hint = 'Get it again, decide again, then retry.';
end;
$$;

revoke all on function nightowls._scratchpad_write(uuid, text, text, jsonb, bigint) from public;

create function nightowls.scratchpad_put(scope text, key text, value jsonb, expected_version bigint default null, org uuid default null)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if scratchpad_put.value is null then
    raise exception 'value must not be null' using errcode = 'null_value_not_allowed', hint = 'To remove it, use nightowls.scratchpad_delete().';
  end if;
  return nightowls._scratchpad_write(
    nightowls.current_org(scratchpad_put.org), scratchpad_put.scope, scratchpad_put.key, scratchpad_put.value, scratchpad_put.expected_version);
end;
$$;

comment on function nightowls.scratchpad_put(text, text, jsonb, bigint, uuid) is
  'Puts a value into a scratchpad and returns its version, which rises with every put and delete. scope, key: where, at most 255 bytes each; value: any JSON; '
  'expected_version: null any, 0 it must not be there, n it must be at version n (compare and set); org: the tenant. For services. Waits for an open change of '
  'the same key. Raises NW001 if the expectation is missed, 22004 or 22023 for an argument that is null or not valid, 54000 for one that is too '
  'long, too large or too deep, NW010 if there is no org, 40001 above read committed when somebody else was quicker.';

revoke all on function nightowls.scratchpad_put(text, text, jsonb, bigint, uuid) from public;

create function nightowls.scratchpad_delete(scope text, key text, expected_version bigint default null, org uuid default null)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if scratchpad_delete.expected_version < 1 then
    raise exception 'expected_version must be 1 or more' using errcode = 'invalid_parameter_value';
  end if;
  return nightowls._scratchpad_write(
    nightowls.current_org(scratchpad_delete.org), scratchpad_delete.scope, scratchpad_delete.key, null,
    scratchpad_delete.expected_version) is not null;
end;
$$;

comment on function nightowls.scratchpad_delete(text, text, bigint, uuid) is
  'Takes a key out of a scratchpad; false if it was not there. scope, key: where; expected_version: null any, n it must be at version n; org: the tenant. A '
  'later put goes on with the next version, so that a late compare and set cannot hit it. For services. Waits for an open change of the same key. Raises '
  'NW001 if the expectation is missed, 22004, 22023 or 54000 for an argument that is null, not valid or too long, NW010 if there is no org, 40001 '
  'above read committed when somebody else was quicker.';

revoke all on function nightowls.scratchpad_delete(text, text, bigint, uuid) from public;

create function nightowls.scratchpad_get(scope text, key text, org uuid default null)
  returns table (value jsonb, version bigint, updated_at timestamptz)
  language plpgsql
  stable
  parallel safe
  rows 1
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_bitmapscan to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
declare
  v_org uuid := nightowls.current_org(scratchpad_get.org);
begin
  if scratchpad_get.scope is null or scratchpad_get.key is null then
    raise exception 'scope and key must not be null' using errcode = 'null_value_not_allowed';
  end if;
  return query
    select s.value, s.version, s.updated_at
      from nightowls.scratchpad s
     where s.org_id = v_org and s.scope = scratchpad_get.scope and s.key = scratchpad_get.key and s.value is not null;
end;
$$;

comment on function nightowls.scratchpad_get(text, text, uuid) is
  'What a scratchpad has under a key: value, version, updated_at; no row if it is not there. scope, key: where; org: the tenant. For services. Locks '
  'nothing. Raises 22004 if scope or key is null, NW010 if there is no org.';

revoke all on function nightowls.scratchpad_get(text, text, uuid) from public;

create function nightowls.scratchpad_list(
  scope       text,
  after       text default '',
  max_entries int default 100,
  org         uuid default null
)
  returns table (key text, value jsonb, version bigint, updated_at timestamptz)
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_bitmapscan to off
  set enable_sort to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
declare
  v_org uuid := nightowls.current_org(scratchpad_list.org);
begin
  if scratchpad_list.scope is null or scratchpad_list.after is null or scratchpad_list.max_entries is null then
    raise exception 'scope, after and max_entries must not be null' using errcode = 'null_value_not_allowed';
  elsif scratchpad_list.max_entries < 1 then
    raise exception 'max_entries must be 1 or more' using errcode = 'invalid_parameter_value';
  end if;
  return query
    select s.key, s.value, s.version, s.updated_at
      from nightowls.scratchpad s
     where s.org_id = v_org and s.scope = scratchpad_list.scope and s.key > scratchpad_list.after and s.value is not null
     order by s.key
     limit scratchpad_list.max_entries;
end;
$$;

comment on function nightowls.scratchpad_list(text, text, int, uuid) is
  'What a scratchpad has, by key in the order of bytes: key, value, version, updated_at; at most max_entries after the key after: pass the last one to go on. '
  'scope: the scratchpad; org: the tenant. For services. Locks nothing. Raises 22004 or 22023 for an argument that is null or not valid, NW010 if there is no org.';

revoke all on function nightowls.scratchpad_list(text, text, int, uuid) from public;

alter table nightowls.scratchpad enable row level security;
alter table nightowls.scratchpad force row level security;
create policy service_all on nightowls.scratchpad
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));

alter table nightowls.scratchpad_marks enable row level security;
alter table nightowls.scratchpad_marks force row level security;
create policy service_all on nightowls.scratchpad_marks
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));

-- Takes away keys of an org that were deleted before a time, 1,000 at most, and returns how many. What somebody has locked stays.
-- Definer: nobody else may write to the tables.
create function nightowls._prune_scratchpads_of(org uuid, before timestamptz)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_bitmapscan to off
  set enable_sort to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
declare
  v_count   bigint;
  v_version bigint;
begin
  with gone as (
    delete from nightowls.scratchpad d
     where d.ctid = any (array(
             select s.ctid
               from nightowls.scratchpad s
              where s.org_id = _prune_scratchpads_of.org and s.value is null and s.updated_at < _prune_scratchpads_of.before
              order by s.updated_at
              limit 1000
                for update skip locked))
    returning d.version
  )
  select count(*), max(g.version) into v_count, v_version from gone g;
  if v_count > 0 then
    insert into nightowls.scratchpad_marks (org_id, version) values (_prune_scratchpads_of.org, v_version)
    on conflict (org_id) do update set version = greatest(scratchpad_marks.version, excluded.version);
  end if;
  return v_count;
end;
$$;

revoke all on function nightowls._prune_scratchpads_of(uuid, timestamptz) from public;

-- The clock's part of it, of all orgs in turn: keys that were deleted 30 days ago. Returns how many went.
create function nightowls._prune_scratchpads(max_ms int)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_until  timestamptz := clock_timestamp() + _prune_scratchpads.max_ms * interval '1 millisecond';
  v_before timestamptz := clock_timestamp() - interval '30 days';
  v_org    uuid;
  v_count  bigint;
  v_done   bigint := 0;
begin
  if not nightowls._begin_sweep('scratchpads') then
    return 0;
  end if;
  for v_org in
    select o.org_id
      from nightowls.orgs o
      left join nightowls._sweeps w on w.org_id = o.org_id and w.sweep = 'scratchpads' and w.name = ''
     where exists (
             select from nightowls.scratchpad s where s.org_id = o.org_id and s.value is null and s.updated_at < v_before)
     order by w.swept_at nulls first, o.org_id
  loop
    loop
      v_count := nightowls._prune_scratchpads_of(v_org, v_before);
      v_done := v_done + v_count;
      exit when v_count < 1000 or clock_timestamp() >= v_until;
    end loop;
    perform nightowls._end_turn(v_org, 'scratchpads', '', '');
    exit when clock_timestamp() >= v_until;
  end loop;
  return v_done;
end;
$$;

revoke all on function nightowls._prune_scratchpads(int) from public;
