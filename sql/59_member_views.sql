-- What members see: rows of their orgs by policy, and of the contents what redact() leaves.
--
-- Members have no right to the columns that hold contents. The views run with the caller's rights, find rows under the policies, and have
-- the contents from functions of the owner's, which look at the membership once more.

create policy member_read on nightowls.threads for select
  using (org_id = any ((select nightowls._member_orgs())::uuid[]));

create policy member_read on nightowls.runs for select
  using (org_id = any ((select nightowls._member_orgs())::uuid[]));

create policy member_read on nightowls.messages for select
  using (org_id = any ((select nightowls._member_orgs())::uuid[]));

-- Definer, as the next four: members may not read the contents. Each answers for orgs of the caller's only, by the setting or JWT.
create function nightowls._my_thread(org uuid, thread_id text)
  returns table (title text, metadata jsonb)
  language plpgsql
  stable
  parallel safe
  security definer
  rows 1
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_bitmapscan to off
as $$
#variable_conflict use_column
begin
  if nightowls._is_member(_my_thread.org) then
    return query
      select nightowls.redact(to_jsonb(t.title), nightowls._redaction_rules(t.org_id)) #>> '{}',
             nightowls.redact(t.metadata, nightowls._redaction_rules(t.org_id))
        from nightowls.threads t
       where t.org_id = _my_thread.org and t.thread_id = _my_thread.thread_id;
  end if;
end;
$$;

revoke all on function nightowls._my_thread(uuid, text) from public;

create function nightowls._my_run(org uuid, run_id text)
  returns table (input jsonb, output jsonb, error jsonb, metadata jsonb)
  language plpgsql
  stable
  parallel safe
  security definer
  rows 1
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_bitmapscan to off
as $$
#variable_conflict use_column
declare
  v_rules jsonb := nightowls._redaction_rules(_my_run.org);
begin
  if nightowls._is_member(_my_run.org) then
    return query
      select nightowls.redact(r.input, v_rules), nightowls.redact(r.output, v_rules), nightowls.redact(r.error, v_rules),
             nightowls.redact(r.metadata, v_rules)
        from nightowls.runs r
       where r.org_id = _my_run.org and r.run_id = _my_run.run_id;
  end if;
end;
$$;

revoke all on function nightowls._my_run(uuid, text) from public;

create function nightowls._my_message(org uuid, thread_id text, seq bigint)
  returns table (content jsonb, metadata jsonb)
  language plpgsql
  stable
  parallel safe
  security definer
  rows 1
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_bitmapscan to off
as $$
#variable_conflict use_column
declare
  v_rules jsonb := nightowls._redaction_rules(_my_message.org);
begin
  if nightowls._is_member(_my_message.org) then
    return query
      select nightowls.redact(m.content, v_rules), nightowls.redact(m.metadata, v_rules)
        from nightowls.messages m
       where m.org_id = _my_message.org and m.thread_id = _my_message.thread_id and m.seq = _my_message.seq;
  end if;
end;
$$;

revoke all on function nightowls._my_message(uuid, text, bigint) from public;

create function nightowls._my_run_events(org uuid, run_id text, after bigint, max_events int)
  returns table (
    "position" bigint, version bigint, event_type text, payload jsonb, metadata jsonb, event_id uuid, created_at timestamptz)
  language plpgsql
  stable
  parallel safe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_rules jsonb := nightowls._redaction_rules(_my_run_events.org);
begin
  if nightowls._is_member(_my_run_events.org) then
    return query
      select e."position", e.version, e.event_type, nightowls.redact(e.payload, v_rules), nightowls.redact(e.metadata, v_rules),
             e.event_id, e.created_at
        from nightowls.read_aggregate(
               'run', _my_run_events.run_id,
               coalesce(nightowls._version_at(_my_run_events.org, 'run', _my_run_events.run_id, _my_run_events.after), 0) + 1,
               _my_run_events.max_events, org => _my_run_events.org) e;
  end if;
end;
$$;

revoke all on function nightowls._my_run_events(uuid, text, bigint, int) from public;

create view nightowls.my_threads
  with (security_invoker = true) as
select t.org_id, t.thread_id, t.resource_id, s.title, s.metadata, t.created_at
  from nightowls.threads t
 cross join lateral nightowls._my_thread(t.org_id, t.thread_id) s;

comment on view nightowls.my_threads is 'The threads of the orgs that the caller is a member of, secrets taken out. For members.';
comment on column nightowls.my_threads.org_id is 'The tenant.';
comment on column nightowls.my_threads.thread_id is 'The thread''s id.';
comment on column nightowls.my_threads.resource_id is 'Whom or what it is about.';
comment on column nightowls.my_threads.title is 'Its title.';
comment on column nightowls.my_threads.metadata is 'What else is known of it.';
comment on column nightowls.my_threads.created_at is 'When it was made.';

create view nightowls.my_runs
  with (security_invoker = true) as
select r.org_id, r.run_id, r.thread_id, r.parent_run_id, r.agent, r.agent_version, r.resource_id, r.status, s.input, s.output, s.error,
       s.metadata, r.created_at, r.updated_at, r.started_at, r.finished_at
  from nightowls.runs r
 cross join lateral nightowls._my_run(r.org_id, r.run_id) s;

comment on view nightowls.my_runs is 'The runs of the orgs that the caller is a member of, secrets taken out. For members.';
comment on column nightowls.my_runs.org_id is 'The tenant.';
comment on column nightowls.my_runs.run_id is 'The run''s id.';
comment on column nightowls.my_runs.thread_id is 'The thread it belongs to.';
comment on column nightowls.my_runs.parent_run_id is 'The run that delegated to it.';
comment on column nightowls.my_runs.agent is 'The agent''s slug.';
comment on column nightowls.my_runs.agent_version is 'The agent''s version.';
comment on column nightowls.my_runs.resource_id is 'Whom or what it is about.';
comment on column nightowls.my_runs.status is 'queued, running, suspended, completed, failed or cancelled.';
comment on column nightowls.my_runs.input is 'What it was given.';
comment on column nightowls.my_runs.output is 'What came of it.';
comment on column nightowls.my_runs.error is 'Why it failed.';
comment on column nightowls.my_runs.metadata is 'What else is known of it.';
comment on column nightowls.my_runs.created_at is 'When it was queued.';
comment on column nightowls.my_runs.updated_at is 'When its status last changed.';
comment on column nightowls.my_runs.started_at is 'When it first ran.';
comment on column nightowls.my_runs.finished_at is 'When it was over.';

create view nightowls.my_messages
  with (security_invoker = true) as
select m.org_id, m.thread_id, m.seq, m.message_id, m.role, m.author_type, m.author_id, m.run_id, s.content, s.metadata, m.created_at
  from nightowls.messages m
 cross join lateral nightowls._my_message(m.org_id, m.thread_id, m.seq) s;

comment on view nightowls.my_messages is
  'The messages of the orgs that the caller is a member of, secrets taken out. For members; list_messages pages through one thread.';
comment on column nightowls.my_messages.org_id is 'The tenant.';
comment on column nightowls.my_messages.thread_id is 'The thread.';
comment on column nightowls.my_messages.seq is '1, 2, 3 … within the thread.';
comment on column nightowls.my_messages.message_id is 'The id it was posted with.';
comment on column nightowls.my_messages.role is 'user, assistant, system or tool.';
comment on column nightowls.my_messages.author_type is 'Who says it: user, agent, service or another word.';
comment on column nightowls.my_messages.author_id is 'Its name.';
comment on column nightowls.my_messages.run_id is 'The run it was said in.';
comment on column nightowls.my_messages.content is 'What was said.';
comment on column nightowls.my_messages.metadata is 'What else is known of it.';
comment on column nightowls.my_messages.created_at is 'When it was appended.';

create view nightowls.my_run_events
  with (security_invoker = true) as
select r.org_id, r.run_id, e."position", e.version, e.event_type, e.payload, e.metadata, e.created_at
  from nightowls.runs r
 cross join lateral nightowls._my_run_events(r.org_id, r.run_id, 0, 2147483647) e;

comment on view nightowls.my_run_events is
  'The events of the runs of the orgs that the caller is a member of, secrets taken out. For members; it reads all events of a run, list_run_events pages.';
comment on column nightowls.my_run_events.org_id is 'The tenant.';
comment on column nightowls.my_run_events.run_id is 'The run.';
comment on column nightowls.my_run_events."position" is 'Its place in the log.';
comment on column nightowls.my_run_events.version is '1, 2, 3 … within the run.';
comment on column nightowls.my_run_events.event_type is 'What happened.';
comment on column nightowls.my_run_events.payload is 'The facts.';
comment on column nightowls.my_run_events.metadata is 'Who did it, and why.';
comment on column nightowls.my_run_events.created_at is 'The clock when it was appended.';
