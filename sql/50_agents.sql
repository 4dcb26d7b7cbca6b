-- Agents: their versions, of which none is ever changed, the head, and the record of who changed what.

-- Append-only: what services and people did to what agents are.
create table nightowls.audit_log (
  org_id     uuid        not null,
  audit_id   bigint      not null generated always as identity,
  action     text        not null,
  subject    text        collate "C" not null,
  actor_type text        not null,
  actor_id   text,
  detail     jsonb       not null default '{}',
  created_at timestamptz not null default clock_timestamp(),
  constraint audit_log_pkey primary key (org_id, audit_id)
);

create index audit_log_subject_idx on nightowls.audit_log (org_id, subject, audit_id);

comment on table nightowls.audit_log is 'Who published and rolled back which agent. Append-only, kept by the functions.';
comment on column nightowls.audit_log.org_id is 'The tenant.';
comment on column nightowls.audit_log.audit_id is 'The entry''s number, rising with gaps.';
comment on column nightowls.audit_log.action is 'publish or rollback.';
comment on column nightowls.audit_log.subject is 'What it was done to: the agent''s slug.';
comment on column nightowls.audit_log.actor_type is 'What did it: user, service or another word, never agent.';
comment on column nightowls.audit_log.actor_id is 'Who did it; null: a service that has no name.';
comment on column nightowls.audit_log.detail is 'The version that came of it, and the one it restores.';
comment on column nightowls.audit_log.created_at is 'The clock when it was done.';

create table nightowls.agents (
  org_id     uuid        not null,
  slug       text        collate "C" not null,
  version    bigint      not null,
  actor_type text        not null,
  actor_id   text,
  created_at timestamptz not null default clock_timestamp(),
  updated_at timestamptz not null default clock_timestamp(),
  constraint agents_pkey primary key (org_id, slug)
) with (fillfactor = 70);

comment on table nightowls.agents is 'The agents there are, each with the version that counts. Kept by publish_agent_version and rollback_agent_version.';
comment on column nightowls.agents.org_id is 'The tenant.';
comment on column nightowls.agents.slug is 'The agent''s name, unique within the org.';
comment on column nightowls.agents.version is 'The head: the version that counts, which is always the newest.';
comment on column nightowls.agents.actor_type is 'What made it the head: user, service or another word, never agent.';
comment on column nightowls.agents.actor_id is 'Who made it the head; null: a service that has no name.';
comment on column nightowls.agents.created_at is 'When the agent was first published.';
comment on column nightowls.agents.updated_at is 'When its head was last set.';

create table nightowls.agent_versions (
  org_id        uuid        not null,
  slug          text        collate "C" not null,
  version       bigint      not null,
  content       jsonb       not null,
  actor_type    text        not null,
  actor_id      text,
  restored_from bigint,
  published_at  timestamptz not null default clock_timestamp(),
  constraint agent_versions_pkey primary key (org_id, slug, version)
);

comment on table nightowls.agent_versions is 'Every version of every agent, as it was published. A version is never changed.';
comment on column nightowls.agent_versions.org_id is 'The tenant.';
comment on column nightowls.agent_versions.slug is 'The agent.';
comment on column nightowls.agent_versions.version is '1, 2, 3 … without a gap.';
comment on column nightowls.agent_versions.content is
  'What the agent is: instructions, model_id, capabilities, skill_names, delegate_slugs, and whatever else was published.';
comment on column nightowls.agent_versions.actor_type is 'What published it: user, service or another word, never agent.';
comment on column nightowls.agent_versions.actor_id is 'Who published it; null: a service that has no name.';
comment on column nightowls.agent_versions.restored_from is 'The version that a rollback made this one of; null: published anew.';
comment on column nightowls.agent_versions.published_at is 'The clock when it was published.';

-- The agent bar --------------------------------------------------------------------------------------

-- Whether the JWT says that the caller is an agent; its user may not write app_metadata.
create function nightowls._is_agent()
  returns boolean
  language sql
  stable
  parallel safe
  return coalesce(
    coalesce(nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'actor_type',
             nullif(current_setting('request.jwt.claims', true), '')::jsonb -> 'app_metadata' ->> 'actor_type') = 'agent', false);

revoke all on function nightowls._is_agent() from public;

create function nightowls._refuse_agent()
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  raise exception 'an agent may not publish or roll back agents'
    using errcode = 'NW004', hint = 'A person or a service does it; no agent changes what agents are.';
end;
$$;

revoke all on function nightowls._refuse_agent() from public;

-- Stands before the three tables. Only our functions write there, by the door; and whoever says that it is an agent, or whose JWT
-- does, is told so first, on every way there is. It calls nothing of ours, so that it answers a role that has no right but to write.
create function nightowls._guard_agents()
  returns trigger
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_claims jsonb := nullif(current_setting('request.jwt.claims', true), '');
  v_agent  boolean := coalesce(coalesce(v_claims ->> 'actor_type', v_claims -> 'app_metadata' ->> 'actor_type') = 'agent', false);
begin
  if tg_op <> 'TRUNCATE' then
    if tg_op = 'INSERT' and current_setting('row_security') = 'off'
       and pg_has_role(current_user, (select c.relowner from pg_class c where c.oid = tg_relid), 'usage') then
      return new;
    end if;
    if tg_op <> 'DELETE' then
      v_agent := v_agent or new.actor_type ~* '^\s*agent\s*$';
    end if;
    if not v_agent and has_function_privilege('nightowls._owner()'::regprocedure, 'execute')
       and current_setting('nightowls.door', true) = pg_current_xact_id_if_assigned()::text
           || (case when tg_op = 'INSERT' or tg_op = 'UPDATE' and tg_table_name = 'agents' then '|agents' else '|maintain' end) then
      return coalesce(new, old);
    end if;
  end if;
  if v_agent then
    raise exception 'an agent may not publish or roll back agents'
      using errcode = 'NW004', hint = 'A person or a service does it; no agent changes what agents are.';
  end if;
  raise exception '%.% is kept by functions', tg_table_schema, tg_table_name
    using errcode = 'NW008',
          detail = format('%s is refused, whoever asks.', tg_op),
          hint = 'Use nightowls.publish_agent_version() or nightowls.rollback_agent_version().';
end;
$$;

revoke all on function nightowls._guard_agents() from public;

create trigger t05_guard before insert or update or delete on nightowls.agents
  for each row execute function nightowls._guard_agents();
create trigger t06_guard before truncate on nightowls.agents
  for each statement execute function nightowls._guard_agents();
create trigger t05_guard before insert or update or delete on nightowls.agent_versions
  for each row execute function nightowls._guard_agents();
create trigger t06_guard before truncate on nightowls.agent_versions
  for each statement execute function nightowls._guard_agents();
create trigger t05_guard before insert or update or delete on nightowls.audit_log
  for each row execute function nightowls._guard_agents();
create trigger t06_guard before truncate on nightowls.audit_log
  for each statement execute function nightowls._guard_agents();

-- Publishing -----------------------------------------------------------------------------------------

-- Who does it, as {"type", "id"}: the argument, else the JWT's subject, else a service.
create function nightowls._actor(actor jsonb)
  returns jsonb
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if nightowls._is_agent() then
    perform nightowls._refuse_agent();
  elsif _actor.actor is null then
    return case when nightowls._user_id() is null then '{"type": "service", "id": null}'
                else jsonb_build_object('type', 'user', 'id', nightowls._user_id()) end;
  elsif jsonb_typeof(_actor.actor) <> 'object' or _actor.actor - '{type,id}'::text[] <> '{}'
     or jsonb_typeof(_actor.actor -> 'type') is distinct from 'string'
     or coalesce(jsonb_typeof(_actor.actor -> 'id'), 'null') not in ('string', 'null') then
    raise exception 'actor is not valid'
      using errcode = 'invalid_parameter_value', hint = 'An actor is {"type": text, "id": text}, such as {"type": "user", "id": "ann"}.';
  elsif _actor.actor ->> 'type' ~* '^\s*agent\s*$' then
    perform nightowls._refuse_agent();
  elsif octet_length(_actor.actor ->> 'type') not between 1 and 64 or octet_length(_actor.actor ->> 'id') > 255 then
    raise exception 'the actor''s type or id is empty or too long'
      using errcode = 'program_limit_exceeded', detail = 'A type has 1 to 64 bytes, an id at most 255.';
  end if;
  return jsonb_build_object('type', _actor.actor -> 'type', 'id', _actor.actor -> 'id');
end;
$$;

revoke all on function nightowls._actor(jsonb) from public;

-- The content with the keys we know in snake_case, after saying what is wrong with it.
create function nightowls._agent_content(content jsonb)
  returns jsonb
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_content jsonb := _agent_content.content;
  v_key     record;
begin
  if v_content is null then
    raise exception 'content must not be null' using errcode = 'null_value_not_allowed';
  elsif jsonb_typeof(v_content) <> 'object' then
    raise exception 'content must be a JSON object'
      using errcode = 'invalid_parameter_value',
            hint = 'Such as {"instructions": "…", "model_id": "…", "skill_names": ["…"], "delegate_slugs": ["…"]}.';
  elsif nightowls._is_too_large(v_content) or nightowls._is_too_deep(v_content) then
    raise exception 'content is too large or too deep'
      using errcode = 'program_limit_exceeded', detail = 'It has at most 16777216 bytes and 100 levels.';
  end if;
  for v_key in
    select k.snake, k.camel
      from (values ('model_id', 'modelId'), ('skill_names', 'skillNames'), ('delegate_slugs', 'delegateSlugs')) as k (snake, camel)
  loop
    if v_content ? v_key.camel then
      if v_content ? v_key.snake and v_content -> v_key.snake <> v_content -> v_key.camel then
        raise exception 'content has both "%" and "%"', v_key.snake, v_key.camel
          using errcode = 'invalid_parameter_value', hint = 'They mean the same: give one.';
      end if;
      v_content := (v_content - v_key.camel) || jsonb_build_object(v_key.snake, v_content -> v_key.camel);
    end if;
  end loop;
  for v_key in
    select k.name, k.type
      from (values ('instructions', 'string'), ('model_id', 'string'), ('skill_names', 'array'), ('delegate_slugs', 'array')) as k (name, type)
     where coalesce(jsonb_typeof(v_content -> k.name), 'null') not in (k.type, 'null')
        or k.type = 'array' and jsonb_path_exists(v_content, format('strict $.%s[*] ? (@.type() != "string")', k.name)::jsonpath, silent => true)
  loop
    raise exception 'content has no valid "%"', v_key.name
      using errcode = 'invalid_parameter_value',
            hint = case v_key.type when 'array' then 'It is an array of texts.' else 'It is a text.' end;
  end loop;
  return v_content;
end;
$$;

revoke all on function nightowls._agent_content(jsonb) from public;

create function nightowls._refuse_agent_slug(org uuid, slug text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform nightowls._refuse_unknown(
    'agent', _refuse_agent_slug.slug,
    array(select a.slug from nightowls.agents a where a.org_id = _refuse_agent_slug.org order by a.slug limit 100),
    'Publish it with nightowls.publish_agent_version().');
end;
$$;

revoke all on function nightowls._refuse_agent_slug(uuid, text) from public;

-- Makes the next version and the head of it, and returns what is to be told as an event. Publishers of one agent wait for each
-- other at its row. content null: that of the version restored_from. expected null: any.
-- Definer: nobody else may write to these tables.
create function nightowls._publish_agent(org uuid, slug text, content jsonb, actor jsonb, expected bigint, restored_from bigint)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_bitmapscan to off
as $$
#variable_conflict use_column
declare
  v_door    text := coalesce(current_setting('nightowls.door', true), '');
  v_actor   jsonb := nightowls._actor(_publish_agent.actor);
  v_content jsonb;
  v_version bigint;
begin
  if _publish_agent.slug is null then
    raise exception 'slug must not be null' using errcode = 'null_value_not_allowed';
  elsif octet_length(_publish_agent.slug) not between 1 and 255 then
    raise exception 'slug is empty or too long' using errcode = 'program_limit_exceeded', detail = 'It has 1 to 255 bytes.';
  end if;
  perform nightowls._open_door('agents');
  if _publish_agent.restored_from is null then
    v_content := nightowls._agent_content(_publish_agent.content);
    perform nightowls._refuse_no_org(_publish_agent.org);
    -- Waits for who is making the same one.
    insert into nightowls.agents (org_id, slug, version, actor_type, actor_id)
    values (_publish_agent.org, _publish_agent.slug, 0, v_actor ->> 'type', v_actor ->> 'id')
    on conflict (org_id, slug) do nothing;
  end if;
  select a.version + 1 into v_version
    from nightowls.agents a
   where a.org_id = _publish_agent.org and a.slug = _publish_agent.slug
     for no key update;
  if not found then
    perform nightowls._refuse_agent_slug(_publish_agent.org, _publish_agent.slug);
  elsif _publish_agent.expected <> v_version then
    raise exception 'agent "%" goes on with version %, not %', left(_publish_agent.slug, 64), v_version, _publish_agent.expected
      using errcode = 'NW001',
            detail = format('Expected version %s, actual version %s.', _publish_agent.expected - 1, v_version - 1),
            hint = 'Read the agent again, decide again, then retry; or leave version out.';
  elsif _publish_agent.restored_from is not null then
    select v.content into v_content
      from nightowls.agent_versions v
     where v.org_id = _publish_agent.org and v.slug = _publish_agent.slug and v.version = _publish_agent.restored_from;
    if not found then
      raise exception 'agent "%" has no version %', left(_publish_agent.slug, 64), _publish_agent.restored_from
        using errcode = 'NW007', hint = format('It has versions 1 to %s.', v_version - 1);
    end if;
  end if;

  insert into nightowls.agent_versions (org_id, slug, version, content, actor_type, actor_id, restored_from)
  values (_publish_agent.org, _publish_agent.slug, v_version, v_content, v_actor ->> 'type', v_actor ->> 'id',
          _publish_agent.restored_from);
  update nightowls.agents a
     set version = v_version, actor_type = v_actor ->> 'type', actor_id = v_actor ->> 'id', updated_at = clock_timestamp()
   where a.org_id = _publish_agent.org and a.slug = _publish_agent.slug;
  insert into nightowls.audit_log (org_id, action, subject, actor_type, actor_id, detail)
  values (_publish_agent.org, case when _publish_agent.restored_from is null then 'publish' else 'rollback' end, _publish_agent.slug,
          v_actor ->> 'type', v_actor ->> 'id',
          jsonb_strip_nulls(jsonb_build_object('version', v_version, 'restored_from', _publish_agent.restored_from)));
  perform set_config('nightowls.door', v_door, true);
  -- Delivered after the commit, once a transaction and agent.
  perform pg_notify('nightowls_agents', _publish_agent.org || ':' || _publish_agent.slug);
  return v_version;
end;
$$;

revoke all on function nightowls._publish_agent(uuid, text, jsonb, jsonb, bigint, bigint) from public;

-- The event of a change, appended as the caller, whose handlers it may call.
create function nightowls._tell_agent(org uuid, slug text, version bigint, restored_from bigint, actor jsonb)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_actor jsonb := nightowls._actor(_tell_agent.actor);
begin
  perform nightowls.append_event(
    'agent', _tell_agent.slug, case when _tell_agent.restored_from is null then 'agent_published' else 'agent_rolled_back' end,
    jsonb_strip_nulls(jsonb_build_object('version', _tell_agent.version, 'restored_from', _tell_agent.restored_from, 'actor', v_actor)),
    metadata => jsonb_strip_nulls(jsonb_build_object('actor_id', v_actor -> 'id')), org => _tell_agent.org);
end;
$$;

revoke all on function nightowls._tell_agent(uuid, text, bigint, bigint, jsonb) from public;

create function nightowls.publish_agent_version(
  slug    text,
  content jsonb,
  actor   jsonb default null,
  version bigint default null,
  org     uuid default null
)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org     uuid := nightowls.current_org(publish_agent_version.org);
  v_version bigint;
begin
  v_version := nightowls._publish_agent(
    v_org, publish_agent_version.slug, publish_agent_version.content, publish_agent_version.actor, publish_agent_version.version, null);
  perform nightowls._tell_agent(v_org, publish_agent_version.slug, v_version, null, publish_agent_version.actor);
  return v_version;
end;
$$;

comment on function nightowls.publish_agent_version(text, jsonb, jsonb, bigint, uuid) is
  'Publishes the next version of an agent, makes it the head and returns its number: 1, 2, 3 … without a gap. slug: the agent, made if it is new; '
  'content: a JSON object: instructions, model_id, capabilities, skill_names, delegate_slugs and whatever else; modelId, skillNames, '
  'delegateSlugs are kept as these; actor: {"type", "id"}, by default the JWT''s user, else the service; version: the number it must get; org: the '
  'tenant. It is an entry of audit_log, an event agent_published of aggregate agent, and after the commit a notification org:slug on channel '
  'nightowls_agents. For services. Waits for an open publication of the same agent. Raises NW004 if the actor, or the caller by its JWT, is an agent, NW001 '
  'if version is not the next one, 22004 or 22023 for an argument that is null or not valid, 54000 for one that is too long, too large or too deep, '
  'NW010 if there is no org.';

revoke all on function nightowls.publish_agent_version(text, jsonb, jsonb, bigint, uuid) from public;

create function nightowls.rollback_agent_version(
  slug       text,
  to_version bigint,
  actor      jsonb default null,
  org        uuid default null
)
  returns table (version bigint, restored_from bigint)
  language plpgsql
  volatile
  parallel unsafe
  rows 1
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org uuid := nightowls.current_org(rollback_agent_version.org);
begin
  if rollback_agent_version.to_version is null then
    raise exception 'to_version must not be null' using errcode = 'null_value_not_allowed';
  end if;
  rollback_agent_version.version := nightowls._publish_agent(
    v_org, rollback_agent_version.slug, null, rollback_agent_version.actor, null, rollback_agent_version.to_version);
  rollback_agent_version.restored_from := rollback_agent_version.to_version;
  perform nightowls._tell_agent(
    v_org, rollback_agent_version.slug, rollback_agent_version.version, rollback_agent_version.to_version, rollback_agent_version.actor);
  return next;
end;
$$;

comment on function nightowls.rollback_agent_version(text, bigint, jsonb, uuid) is
  'Publishes what an agent was in an earlier version once more, as its next version and head; returns the new version and the one it restores. slug: the '
  'agent; to_version: the version to restore; actor: {"type", "id"}, by default the JWT''s user, else the service; org: the tenant. It is an entry of '
  'audit_log, an event agent_rolled_back of aggregate agent, and after the commit a notification org:slug on channel nightowls_agents. For services. '
  'Waits for an open publication of the same agent. Raises NW004 if the actor, or the caller by its JWT, is an agent, NW007 if there is no such agent or '
  'version, 22004 or 22023 for an argument that is null or not valid, 54000 for one that is too long, NW010 if there is no org.';

revoke all on function nightowls.rollback_agent_version(text, bigint, jsonb, uuid) from public;

-- Reading ---------------------------------------------------------------------------------------------

create function nightowls.list_agent_versions(slug text, org uuid default null)
  returns table (version bigint, is_head boolean, content jsonb, actor jsonb, restored_from bigint, published_at timestamptz)
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_bitmapscan to off
  set enable_sort to off
as $$
#variable_conflict use_column
declare
  v_org uuid := nightowls.current_org(list_agent_versions.org);
begin
  if list_agent_versions.slug is null then
    raise exception 'slug must not be null' using errcode = 'null_value_not_allowed';
  end if;
  return query
    select v.version, v.version = a.version, v.content, jsonb_build_object('type', v.actor_type, 'id', v.actor_id), v.restored_from,
           v.published_at
      from nightowls.agents a
      join nightowls.agent_versions v on v.org_id = a.org_id and v.slug = a.slug
     where a.org_id = v_org and a.slug = list_agent_versions.slug
     order by v.version;
end;
$$;

comment on function nightowls.list_agent_versions(text, uuid) is
  'The versions of an agent, the oldest first: version, is_head (whether it counts now), content, actor, restored_from (of a rollback), published_at; '
  'no rows for an agent that does not exist. slug: the agent; org: the tenant. For services. Locks nothing. Raises 22004 if slug is null, NW010 if '
  'there is no org.';

revoke all on function nightowls.list_agent_versions(text, uuid) from public;

create function nightowls.get_agent(slug text, version bigint default null, org uuid default null)
  returns setof nightowls.agent_versions
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
  v_org uuid := nightowls.current_org(get_agent.org);
begin
  return query
    select v.*
      from nightowls.agents a
      join nightowls.agent_versions v
        on v.org_id = a.org_id and v.slug = a.slug and v.version = coalesce(get_agent.version, a.version)
     where a.org_id = v_org and a.slug = get_agent.slug;
  if not found then
    if not exists (select from nightowls.agents a where a.org_id = v_org and a.slug = get_agent.slug) then
      perform nightowls._refuse_agent_slug(v_org, get_agent.slug);
    end if;
    raise exception 'agent "%" has no version %', left(get_agent.slug, 64), get_agent.version
      using errcode = 'NW007', hint = 'See nightowls.list_agent_versions().';
  end if;
end;
$$;

comment on function nightowls.get_agent(text, bigint, uuid) is
  'What an agent is: one row of agent_versions. slug: the agent; version: by default the head; org: the tenant. For services. Locks nothing. Raises '
  'NW007 if there is no such agent or version, 22004 if slug is null, NW010 if there is no org.';

revoke all on function nightowls.get_agent(text, bigint, uuid) from public;

-- Forgets what an agent was, in every version; who changed it when stays on record. Definer: the versions are closed.
create function nightowls._erase_agent(org uuid, aggregate_type text, aggregate_id text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_door text := coalesce(current_setting('nightowls.door', true), '');
begin
  if _erase_agent.aggregate_type <> 'agent' then
    return;
  end if;
  perform nightowls._open_door('maintain');
  update nightowls.agent_versions v
     set content = '{}'
   where v.org_id = _erase_agent.org and v.slug = _erase_agent.aggregate_id and v.content <> '{}';
  perform set_config('nightowls.door', v_door, true);
end;
$$;

revoke all on function nightowls._erase_agent(uuid, text, text) from public;

alter table nightowls.audit_log enable row level security;
alter table nightowls.audit_log force row level security;
create policy service_all on nightowls.audit_log
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));

alter table nightowls.agents enable row level security;
alter table nightowls.agents force row level security;
create policy service_all on nightowls.agents
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));

alter table nightowls.agent_versions enable row level security;
alter table nightowls.agent_versions force row level security;
create policy service_all on nightowls.agent_versions
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));
