-- Messages: what was said in a thread, numbered in the order of commits.

create table nightowls.messages (
  org_id      uuid        not null,
  thread_id   text        collate "C" not null,
  seq         bigint      not null,
  message_id  text        collate "C",
  role        text        collate "C" not null,
  author_type text        not null,
  author_id   text        collate "C",
  run_id      text        collate "C",
  content     jsonb       not null,
  metadata    jsonb       not null default '{}',
  created_at  timestamptz not null default clock_timestamp(),
  constraint messages_pkey primary key (org_id, thread_id, seq),
  constraint messages_role_check check (role in ('user', 'assistant', 'system', 'tool'))
);

create unique index messages_message_id_key on nightowls.messages (org_id, message_id) where message_id is not null;
create index messages_run_id_idx on nightowls.messages (org_id, run_id) where run_id is not null;

comment on table nightowls.messages is 'What was said, by people and agents. Kept by append_message; read by list_messages.';
comment on column nightowls.messages.org_id is 'The tenant.';
comment on column nightowls.messages.thread_id is 'The thread.';
comment on column nightowls.messages.seq is '1, 2, 3 … within the thread, in the order of commits.';
comment on column nightowls.messages.message_id is 'The caller''s id, so that a retry is known; null: none.';
comment on column nightowls.messages.role is 'user, assistant, system or tool.';
comment on column nightowls.messages.author_type is 'Who says it: user, agent, service or another word.';
comment on column nightowls.messages.author_id is 'Its name; null: a service that has none.';
comment on column nightowls.messages.run_id is 'The run it was said in; null: none.';
comment on column nightowls.messages.content is 'What was said: any JSON.';
comment on column nightowls.messages.metadata is 'What else is known of it: a JSON object.';
comment on column nightowls.messages.created_at is 'The clock when it was appended.';

-- Posters to one thread follow each other at its row, which is locked and not written to.
-- Definer: nobody else may write to the table.
create function nightowls._append_message(message nightowls.messages)
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
  v_found nightowls.messages;
begin
  perform nightowls._check_text('thread_id', (_append_message.message).thread_id, true);
  perform nightowls._check_text('message_id', (_append_message.message).message_id, false);
  perform nightowls._check_text('run_id', (_append_message.message).run_id, false);
  perform nightowls._check_text('the author''s type', (_append_message.message).author_type, true);
  perform nightowls._check_text('the author''s id', (_append_message.message).author_id, false);
  perform nightowls._check_json('content', (_append_message.message).content, null, true);
  perform nightowls._check_json('metadata', (_append_message.message).metadata, 'object', true);
  if (_append_message.message).role is null then
    raise exception 'role must not be null' using errcode = 'null_value_not_allowed';
  elsif (_append_message.message).role not in ('user', 'assistant', 'system', 'tool') then
    raise exception 'there is no role "%"', left((_append_message.message).role, 64)
      using errcode = 'invalid_parameter_value', hint = 'A message''s role is user, assistant, system or tool.';
  end if;
  perform
     from nightowls.threads t
    where t.org_id = (_append_message.message).org_id and t.thread_id = (_append_message.message).thread_id
      for no key update;
  if not found then
    perform nightowls._refuse_thread((_append_message.message).thread_id);
  end if;
  if (_append_message.message).run_id is not null and not exists (
       select from nightowls.runs r
        where r.org_id = (_append_message.message).org_id and r.run_id = (_append_message.message).run_id) then
    perform nightowls._refuse_run((_append_message.message).run_id);
  end if;

  insert into nightowls.messages as m
         (org_id, thread_id, seq, message_id, role, author_type, author_id, run_id, content, metadata)
  select n.org_id, n.thread_id,
         coalesce((select x.seq
                     from nightowls.messages x
                    where x.org_id = n.org_id and x.thread_id = n.thread_id
                    order by x.seq desc
                    limit 1), 0) + 1,
         n.message_id, n.role, n.author_type, n.author_id, n.run_id, n.content, n.metadata
    from (select (_append_message.message).*) n
  on conflict do nothing
  returning m.seq into v_found.seq;
  if found then
    return v_found.seq;
  end if;
  select m.* into v_found
    from nightowls.messages m
   where m.org_id = (_append_message.message).org_id and m.message_id = (_append_message.message).message_id;
  if not found then
    raise exception 'somebody else has posted to thread "%"', left((_append_message.message).thread_id, 64)
      using errcode = 'serialization_failure', hint = 'Retry the transaction.';
  elsif row (v_found.thread_id, v_found.role, v_found.author_type, v_found.author_id, v_found.run_id, v_found.content)
        is distinct from row ((_append_message.message).thread_id, (_append_message.message).role, (_append_message.message).author_type,
                              (_append_message.message).author_id, (_append_message.message).run_id, (_append_message.message).content) then
    raise exception 'message "%" exists already with another body', left((_append_message.message).message_id, 64)
      using errcode = 'NW002', hint = 'One message_id names one message; use a new one for a new message.';
  end if;
  return v_found.seq;
end;
$$;

revoke all on function nightowls._append_message(nightowls.messages) from public;

-- The same for a member, who posts as itself; a viewer does not.
-- Definer: it looks at the membership and writes the message, for the caller of the setting or JWT only.
create function nightowls._post_message(message nightowls.messages)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if not exists (
       select from nightowls.org_members m
        where m.org_id = (_post_message.message).org_id and m.user_id = nightowls._user_id()
          and m.role in ('owner', 'admin', 'member')) then
    perform nightowls._refuse_member((_post_message.message).org_id, 'Owners, admins and members of the org post messages.');
  elsif (_post_message.message).role is distinct from 'user'
        or (_post_message.message).author_type is distinct from 'user'
        or (_post_message.message).author_id is distinct from nightowls._user_id() then
    perform nightowls._refuse_member((_post_message.message).org_id, 'A member posts as itself, in the role user.');
  end if;
  return nightowls._append_message(_post_message.message);
end;
$$;

revoke all on function nightowls._post_message(nightowls.messages) from public;

create function nightowls.append_message(
  thread_id  text,
  content    jsonb,
  role       text default 'user',
  author     jsonb default null,
  run_id     text default null,
  message_id text default null,
  metadata   jsonb default '{}',
  org        uuid default null
)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_user    text := nightowls._user_id();
  v_message nightowls.messages;
begin
  v_message.org_id := nightowls.current_org(append_message.org);
  if jsonb_typeof(append_message.author) <> 'object' or append_message.author - '{type,id}'::text[] <> '{}'
     or append_message.author is not null and jsonb_typeof(append_message.author -> 'type') is distinct from 'string'
     or coalesce(jsonb_typeof(append_message.author -> 'id'), 'null') not in ('string', 'null') then
    raise exception 'author is not valid'
      using errcode = 'invalid_parameter_value', hint = 'An author is {"type": text, "id": text}, such as {"type": "agent", "id": "sage"}.';
  end if;
  v_message.thread_id := append_message.thread_id;
  v_message.content := append_message.content;
  v_message.role := append_message.role;
  v_message.author_type := coalesce(append_message.author ->> 'type', case when v_user is null then 'service' else 'user' end);
  v_message.author_id := case when append_message.author is null then v_user else append_message.author ->> 'id' end;
  v_message.run_id := append_message.run_id;
  v_message.message_id := append_message.message_id;
  v_message.metadata := append_message.metadata;
  if nightowls._is_service() then
    return nightowls._append_message(v_message);
  end if;
  return nightowls._post_message(v_message);
end;
$$;

comment on function nightowls.append_message(text, jsonb, text, jsonb, text, text, jsonb, uuid) is
  'Appends a message to a thread and returns its number there: 1, 2, 3 … in the order of commits. thread_id: the thread; content: any JSON; role: user, '
  'assistant, system or tool; author: {"type", "id"}, by default the JWT''s user, else a service; run_id: the run it was said in; message_id: the caller''s id: '
  'a retry returns the first number; metadata: a JSON object; org: the tenant. For services, and for members of the org, who post as themselves in the role '
  'user; viewers do not. Waits for an open message to the same thread. Raises NW007 if there is no such thread or run, NW002 if the message_id is known '
  'with another body, 42501 for who may not, 22004 or 22023 for an argument that is null or not valid, 54000 for one that is too long, too large or too '
  'deep, NW010 if there is no org, 40001 above read committed when somebody else was quicker.';

revoke all on function nightowls.append_message(text, jsonb, text, jsonb, text, text, jsonb, uuid) from public;

create type nightowls.message as (
  seq bigint, message_id text, role text, author_type text, author_id text, run_id text, content jsonb, metadata jsonb, created_at timestamptz);

comment on type nightowls.message is 'A message as list_messages gives it out: to members with secrets taken out of content and metadata.';

-- Definer: members may not read the content. Whoever calls it has checked the org.
create function nightowls._list_messages(org uuid, thread_id text, after bigint, max_messages int, before bigint)
  returns setof nightowls.message
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
  if _list_messages.thread_id is null or _list_messages.after is null or _list_messages.max_messages is null then
    raise exception 'thread_id, after and max_messages must not be null' using errcode = 'null_value_not_allowed';
  elsif _list_messages.max_messages < 1 then
    raise exception 'max_messages must be 1 or more' using errcode = 'invalid_parameter_value';
  elsif _list_messages.before is null then
    return query
      select m.seq, m.message_id, m.role, m.author_type, m.author_id, m.run_id, m.content, m.metadata, m.created_at
        from nightowls.messages m
       where m.org_id = _list_messages.org and m.thread_id = _list_messages.thread_id and m.seq > _list_messages.after
       order by m.seq
       limit _list_messages.max_messages;
    return;
  end if;
  return query
    select x.*
      from (select m.seq, m.message_id, m.role, m.author_type, m.author_id, m.run_id, m.content, m.metadata, m.created_at
              from nightowls.messages m
             where m.org_id = _list_messages.org and m.thread_id = _list_messages.thread_id and m.seq > _list_messages.after
               and m.seq < _list_messages.before
             order by m.seq desc
             limit _list_messages.max_messages) x
     order by x.seq;
end;
$$;

revoke all on function nightowls._list_messages(uuid, text, bigint, int, bigint) from public;

-- Definer: it looks at the membership of the caller of the setting or JWT, and takes out what members may not see.
create function nightowls._list_messages_redacted(org uuid, thread_id text, after bigint, max_messages int, before bigint)
  returns setof nightowls.message
  language plpgsql
  stable
  parallel safe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_rules jsonb;
begin
  if not nightowls._is_member(_list_messages_redacted.org) then
    perform nightowls._refuse_member(_list_messages_redacted.org, 'Members of the org read its messages.');
  end if;
  v_rules := nightowls._redaction_rules(_list_messages_redacted.org);
  return query
    select m.seq, m.message_id, m.role, m.author_type, m.author_id, m.run_id, nightowls.redact(m.content, v_rules),
           nightowls.redact(m.metadata, v_rules), m.created_at
      from nightowls._list_messages(
             _list_messages_redacted.org, _list_messages_redacted.thread_id, _list_messages_redacted.after,
             _list_messages_redacted.max_messages, _list_messages_redacted.before) m;
end;
$$;

revoke all on function nightowls._list_messages_redacted(uuid, text, bigint, int, bigint) from public;

create function nightowls.list_messages(
  thread_id    text,
  after        bigint default 0,
  max_messages int default 50,
  before       bigint default null,
  org          uuid default null
)
  returns setof nightowls.message
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org uuid := nightowls.current_org(list_messages.org);
begin
  if nightowls._is_service() then
    return query
      select m.*
        from nightowls._list_messages(
               v_org, list_messages.thread_id, list_messages.after, list_messages.max_messages, list_messages.before) m;
    return;
  end if;
  return query
    select m.*
      from nightowls._list_messages_redacted(
             v_org, list_messages.thread_id, list_messages.after, list_messages.max_messages, list_messages.before) m;
end;
$$;

comment on function nightowls.list_messages(text, bigint, int, bigint, uuid) is
  'The messages of a thread in order, at most max_messages of them: those after the number after; with before the newest ones below that number. To page '
  'forwards pass the last seq as after, to page backwards the first as before (9223372036854775807 for the newest page). None is missed or seen twice, '
  'whatever commits late. None if there is no such thread. org: the tenant. For services, and for members of the org, for whom secrets are taken out '
  '(redact). Locks nothing. Raises 42501 for who may not, 22004 or 22023 for an argument that is null or not valid, NW010 if there is no org.';

revoke all on function nightowls.list_messages(text, bigint, int, bigint, uuid) from public;

alter table nightowls.messages enable row level security;
alter table nightowls.messages force row level security;
create policy service_all on nightowls.messages
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));
