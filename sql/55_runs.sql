-- Threads and runs: what agents work on, how far they are, and the snapshots that let another process go on.
--
-- Each change of a run is one row and one event of aggregate run, in one transaction: the row first, by the owner, then the event, as the
-- caller, whose handlers it may call. Locks: the floor's row (the fence), then the run's row, then the append's.

create table nightowls.threads (
  org_id      uuid        not null,
  thread_id   text        collate "C" not null,
  resource_id text        collate "C",
  title       text,
  metadata    jsonb       not null default '{}',
  created_at  timestamptz not null default clock_timestamp(),
  constraint threads_pkey primary key (org_id, thread_id)
);

create index threads_resource_id_idx on nightowls.threads (org_id, resource_id, created_at) where resource_id is not null;

comment on table nightowls.threads is 'Conversations: what messages and runs belong to. Kept by create_thread.';
comment on column nightowls.threads.org_id is 'The tenant.';
comment on column nightowls.threads.thread_id is 'The thread''s id, any text.';
comment on column nightowls.threads.resource_id is 'Whom or what it is about, such as a customer; null: nobody.';
comment on column nightowls.threads.title is 'A title for people.';
comment on column nightowls.threads.metadata is 'What else is known of it: a JSON object.';
comment on column nightowls.threads.created_at is 'When it was made.';

create table nightowls.runs (
  org_id        uuid        not null,
  run_id        text        collate "C" not null,
  thread_id     text        collate "C",
  parent_run_id text        collate "C",
  agent         text        collate "C",
  agent_version bigint,
  runner        text,
  resource_id   text        collate "C",
  status        text        collate "C" not null default 'queued',
  input         jsonb,
  output        jsonb,
  error         jsonb,
  metadata      jsonb       not null default '{}',
  created_at    timestamptz not null default clock_timestamp(),
  updated_at    timestamptz not null default clock_timestamp(),
  started_at    timestamptz,
  finished_at   timestamptz,
  constraint runs_pkey primary key (org_id, run_id),
  constraint runs_status_check check (status in ('queued', 'running', 'suspended', 'completed', 'failed', 'cancelled'))
) with (fillfactor = 60);

create index runs_thread_id_idx on nightowls.runs (org_id, thread_id, created_at) where thread_id is not null;
create index runs_unfinished_idx on nightowls.runs (org_id, created_at) where finished_at is null;

comment on table nightowls.runs is 'What agents do or did, one row a run. Kept by start_run and set_run_status.';
comment on column nightowls.runs.org_id is 'The tenant.';
comment on column nightowls.runs.run_id is 'The run''s id, any text; its events are those of aggregate run with this id.';
comment on column nightowls.runs.thread_id is 'The thread it belongs to; null: none.';
comment on column nightowls.runs.parent_run_id is 'The run that delegated to it; null: none.';
comment on column nightowls.runs.agent is 'The agent, by its slug; null: one that is not published here.';
comment on column nightowls.runs.agent_version is 'The agent''s version, the head when the run was started.';
comment on column nightowls.runs.runner is 'Who runs it: a process, a service.';
comment on column nightowls.runs.resource_id is 'Whom or what it is about; by default that of its thread.';
comment on column nightowls.runs.status is 'queued, running, suspended, completed, failed or cancelled.';
comment on column nightowls.runs.input is 'What it was given.';
comment on column nightowls.runs.output is 'What came of it.';
comment on column nightowls.runs.error is 'Why it failed.';
comment on column nightowls.runs.metadata is 'What else is known of it: a JSON object.';
comment on column nightowls.runs.created_at is 'When it was queued.';
comment on column nightowls.runs.updated_at is 'When its status last changed.';
comment on column nightowls.runs.started_at is 'When it first ran.';
comment on column nightowls.runs.finished_at is 'When it was completed, failed or cancelled; null: not yet.';

create table nightowls.run_snapshots (
  org_id     uuid        not null,
  run_id     text        collate "C" not null,
  version    bigint      not null,
  snapshot   jsonb       not null,
  created_at timestamptz not null default clock_timestamp(),
  constraint run_snapshots_pkey primary key (org_id, run_id, version)
);

comment on table nightowls.run_snapshots is 'What a process needs to go on with a run: the newest snapshots of each. Kept by save_run_snapshot.';
comment on column nightowls.run_snapshots.org_id is 'The tenant.';
comment on column nightowls.run_snapshots.run_id is 'The run.';
comment on column nightowls.run_snapshots.version is '1, 2, 3 … in the order of saving.';
comment on column nightowls.run_snapshots.snapshot is 'Whatever the process put there.';
comment on column nightowls.run_snapshots.created_at is 'When it was saved.';

-- Checks that concerns of the swarm share -------------------------------------------------------------

create function nightowls._check_text(what text, value text, required boolean)
  returns void
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if _check_text.value is null then
    if _check_text.required then
      raise exception '% must not be null', _check_text.what using errcode = 'null_value_not_allowed';
    end if;
  elsif _check_text.value = '' then
    raise exception '% must not be empty', _check_text.what using errcode = 'invalid_parameter_value';
  elsif octet_length(_check_text.value) > 255 then
    raise exception '% is too long', _check_text.what using errcode = 'program_limit_exceeded', detail = 'It has at most 255 bytes.';
  end if;
end;
$$;

revoke all on function nightowls._check_text(text, text, boolean) from public;

-- kind: object, or null for any JSON.
create function nightowls._check_json(what text, value jsonb, kind text, required boolean)
  returns void
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if _check_json.value is null then
    if _check_json.required then
      raise exception '% must not be null', _check_json.what using errcode = 'null_value_not_allowed';
    end if;
  elsif jsonb_typeof(_check_json.value) <> _check_json.kind then
    raise exception '% must be a JSON %', _check_json.what, _check_json.kind using errcode = 'invalid_parameter_value';
  elsif nightowls._is_too_large(_check_json.value) or nightowls._is_too_deep(_check_json.value) then
    raise exception '% is too large or too deep', _check_json.what
      using errcode = 'program_limit_exceeded', detail = 'It has at most 16777216 bytes and 100 levels.';
  end if;
end;
$$;

revoke all on function nightowls._check_json(text, jsonb, text, boolean) from public;

create function nightowls._refuse_thread(thread_id text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform nightowls._refuse_unknown('thread', _refuse_thread.thread_id, '{}');
end;
$$;

revoke all on function nightowls._refuse_thread(text) from public;

create function nightowls._refuse_run(run_id text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform nightowls._refuse_unknown('run', _refuse_run.run_id, '{}', 'Start it with nightowls.start_run().');
end;
$$;

revoke all on function nightowls._refuse_run(text) from public;

-- Threads ---------------------------------------------------------------------------------------------

-- Definer: nobody else may write to the table.
create function nightowls._create_thread(org uuid, thread_id text, resource_id text, title text, metadata jsonb)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform nightowls._check_text('thread_id', _create_thread.thread_id, true);
  perform nightowls._check_text('resource_id', _create_thread.resource_id, false);
  perform nightowls._check_json('metadata', _create_thread.metadata, 'object', true);
  if octet_length(_create_thread.title) > 1024 then
    raise exception 'title is too long' using errcode = 'program_limit_exceeded', detail = 'It has at most 1024 bytes.';
  end if;
  perform nightowls._refuse_no_org(_create_thread.org);
  insert into nightowls.threads (org_id, thread_id, resource_id, title, metadata)
  values (_create_thread.org, _create_thread.thread_id, _create_thread.resource_id, _create_thread.title, _create_thread.metadata)
  on conflict do nothing;
  if not found and not exists (
       select from nightowls.threads t
        where t.org_id = _create_thread.org and t.thread_id = _create_thread.thread_id
          and row (t.resource_id, t.title, t.metadata)
              is not distinct from row (_create_thread.resource_id, _create_thread.title, _create_thread.metadata)) then
    raise exception 'thread "%" exists already with another definition', left(_create_thread.thread_id, 64)
      using errcode = 'duplicate_object', hint = 'Choose another thread_id, or post to the one that is there.';
  end if;
end;
$$;

revoke all on function nightowls._create_thread(uuid, text, text, text, jsonb) from public;

create function nightowls.create_thread(
  thread_id   text default null,
  resource_id text default null,
  title       text default null,
  metadata    jsonb default '{}',
  org         uuid default null
)
  returns text
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_thread_id text := coalesce(create_thread.thread_id, gen_random_uuid()::text);
begin
  perform nightowls._create_thread(
    nightowls.current_org(create_thread.org), v_thread_id, create_thread.resource_id, create_thread.title, create_thread.metadata);
  return v_thread_id;
end;
$$;

comment on function nightowls.create_thread(text, text, text, jsonb, uuid) is
  'Makes a thread and returns its id; again with the same definition it changes nothing. thread_id: by default a new uuid; resource_id: whom or what it is '
  'about; title: for people; metadata: a JSON object; org: the tenant. For services. Waits for who is making the same one. Raises 42710 if it exists with '
  'another definition, 22004 or 22023 for an argument that is null or not valid, 54000 for one that is too long, too large or too deep, NW010 if there is '
  'no org.';

revoke all on function nightowls.create_thread(text, text, text, jsonb, uuid) from public;

-- Runs ------------------------------------------------------------------------------------------------

-- Returns the new run, with what was left out filled in; null if it is there already, where it must be the same.
-- Definer: nobody else may write to the table.
create function nightowls._start_run(run nightowls.runs)
  returns nightowls.runs
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_found nightowls.runs;
begin
  perform nightowls._check_text('run_id', (_start_run.run).run_id, true);
  perform nightowls._check_text('thread_id', (_start_run.run).thread_id, false);
  perform nightowls._check_text('agent', (_start_run.run).agent, false);
  perform nightowls._check_text('runner', (_start_run.run).runner, false);
  perform nightowls._check_text('resource_id', (_start_run.run).resource_id, false);
  perform nightowls._check_text('parent_run_id', (_start_run.run).parent_run_id, false);
  perform nightowls._check_json('input', (_start_run.run).input, null, false);
  perform nightowls._check_json('metadata', (_start_run.run).metadata, 'object', true);
  perform nightowls._refuse_no_org((_start_run.run).org_id);

  select r.* into v_found
    from nightowls.runs r
   where r.org_id = (_start_run.run).org_id and r.run_id = (_start_run.run).run_id;
  if not found then
    if (_start_run.run).thread_id is not null then
      select coalesce((_start_run.run).resource_id, t.resource_id) into _start_run.run.resource_id
        from nightowls.threads t
       where t.org_id = (_start_run.run).org_id and t.thread_id = (_start_run.run).thread_id;
      if not found then
        perform nightowls._refuse_thread((_start_run.run).thread_id);
      end if;
    end if;
    if (_start_run.run).parent_run_id is not null and not exists (
         select from nightowls.runs r
          where r.org_id = (_start_run.run).org_id and r.run_id = (_start_run.run).parent_run_id) then
      perform nightowls._refuse_run((_start_run.run).parent_run_id);
    end if;
    if (_start_run.run).agent is not null then
      _start_run.run.agent_version := (nightowls.get_agent(
        (_start_run.run).agent, (_start_run.run).agent_version, (_start_run.run).org_id)).version;
    elsif (_start_run.run).agent_version is not null then
      raise exception 'agent_version is given without an agent' using errcode = 'invalid_parameter_value';
    end if;

    insert into nightowls.runs
           (org_id, run_id, thread_id, parent_run_id, agent, agent_version, runner, resource_id, input, metadata)
    select r.org_id, r.run_id, r.thread_id, r.parent_run_id, r.agent, r.agent_version, r.runner, r.resource_id, r.input, r.metadata
      from (select (_start_run.run).*) r
    on conflict do nothing;
    if found then
      return _start_run.run;
    end if;
    select r.* into v_found
      from nightowls.runs r
     where r.org_id = (_start_run.run).org_id and r.run_id = (_start_run.run).run_id;
    if not found then
      raise exception 'run "%" was started meanwhile', left((_start_run.run).run_id, 64)
        using errcode = 'serialization_failure', hint = 'Retry the transaction.';
    end if;
  end if;

  if row (v_found.thread_id, v_found.parent_run_id, v_found.agent, v_found.input)
       is distinct from row ((_start_run.run).thread_id, (_start_run.run).parent_run_id, (_start_run.run).agent, (_start_run.run).input)
     or v_found.agent_version <> (_start_run.run).agent_version then
    raise exception 'run "%" exists already with another definition', left((_start_run.run).run_id, 64)
      using errcode = 'NW002',
            detail = format('It is %s since %s.', v_found.status, v_found.updated_at),
            hint = 'One run_id names one run; use a new one for a new run.';
  end if;
  return null;
end;
$$;

revoke all on function nightowls._start_run(nightowls.runs) from public;

create function nightowls.start_run(
  run_id        text default null,
  thread_id     text default null,
  agent         text default null,
  input         jsonb default null,
  runner        text default null,
  agent_version bigint default null,
  resource_id   text default null,
  parent_run_id text default null,
  metadata      jsonb default '{}',
  org           uuid default null
)
  returns text
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_run     nightowls.runs;
  v_started nightowls.runs;
begin
  v_run.org_id := nightowls.current_org(start_run.org);
  v_run.run_id := coalesce(start_run.run_id, gen_random_uuid()::text);
  v_run.thread_id := start_run.thread_id;
  v_run.agent := start_run.agent;
  v_run.input := start_run.input;
  v_run.runner := start_run.runner;
  v_run.agent_version := start_run.agent_version;
  v_run.resource_id := start_run.resource_id;
  v_run.parent_run_id := start_run.parent_run_id;
  v_run.metadata := start_run.metadata;
  v_started := nightowls._start_run(v_run);
  if v_started.run_id is not null then
    perform nightowls.append_event(
      'run', v_run.run_id, 'run_queued',
      jsonb_strip_nulls(jsonb_build_object(
        'status', 'queued', 'thread_id', v_started.thread_id, 'agent', v_started.agent, 'agent_version', v_started.agent_version,
        'runner', v_started.runner, 'resource_id', v_started.resource_id, 'parent_run_id', v_started.parent_run_id))
      || case when v_started.input is null then '{}' else jsonb_build_object('input', v_started.input) end,
      metadata => jsonb_strip_nulls(jsonb_build_object('actor_id', nightowls._user_id())), org => v_run.org_id);
  end if;
  return v_run.run_id;
end;
$$;

comment on function nightowls.start_run(text, text, text, jsonb, text, bigint, text, text, jsonb, uuid) is
  'Queues a run and returns its id; it is one row of runs, with status queued, and one event run_queued of aggregate run. Again with the same '
  'run_id, thread, agent, input and parent it changes nothing: a retry is safe. run_id: by default a new uuid; thread_id: the thread it belongs to; agent: a '
  'published agent, by slug; input: what it is given; runner: who runs it; agent_version: by default the head; resource_id: whom it is about, by default '
  'that of the thread; parent_run_id: the run that delegates; metadata: a JSON object; org: the tenant. For services. Waits for who is starting the '
  'same one. Raises NW002 if the run exists with another definition, NW007 if thread, agent, version or parent do not exist, 22004 or 22023 for an argument '
  'that is null or not valid, 54000 for one that is too long, too large or too deep, NW010 if there is no org, 40001 above read committed when '
  'somebody else was quicker.';

revoke all on function nightowls.start_run(text, text, text, jsonb, text, bigint, text, text, jsonb, uuid) from public;

create function nightowls._legal_statuses(status text)
  returns text[]
  language sql
  immutable
  parallel safe
  return case status
    when 'queued' then '{running,failed,cancelled}'::text[]
    when 'running' then '{suspended,completed,failed,cancelled}'::text[]
    when 'suspended' then '{running,failed,cancelled}'::text[]
    else '{}'::text[]
  end;

revoke all on function nightowls._legal_statuses(text) from public;

-- Changes the row and returns the status before. Two who change one run follow each other at its row.
-- Definer: nobody else may write to the table.
create function nightowls._set_run_status(org uuid, run_id text, status text, patch jsonb, container text, fence bigint)
  returns text
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
  v_status text;
begin
  if _set_run_status.run_id is null or _set_run_status.status is null then
    raise exception 'run_id and status must not be null' using errcode = 'null_value_not_allowed';
  elsif _set_run_status.status not in ('queued', 'running', 'suspended', 'completed', 'failed', 'cancelled') then
    raise exception 'there is no status "%"', left(_set_run_status.status, 64)
      using errcode = 'invalid_parameter_value', hint = 'A run is queued, running, suspended, completed, failed or cancelled.';
  elsif jsonb_typeof(_set_run_status.patch) <> 'object' or _set_run_status.patch - '{output,error,runner,metadata}'::text[] <> '{}'
     or coalesce(jsonb_typeof(_set_run_status.patch -> 'metadata'), 'object') <> 'object'
     or coalesce(jsonb_typeof(_set_run_status.patch -> 'runner'), 'null') not in ('string', 'null') then
    raise exception 'patch is not valid'
      using errcode = 'invalid_parameter_value',
            hint = 'A patch is {"output": …, "error": …, "runner": text, "metadata": {…}}; all keys are optional.';
  end if;
  perform nightowls._check_json('patch', _set_run_status.patch, 'object', false);
  perform nightowls._check_text('runner', nullif(_set_run_status.patch ->> 'runner', ''), false);
  if _set_run_status.container is not null or _set_run_status.fence is not null then
    perform nightowls._assert_fence(_set_run_status.org, _set_run_status.container, _set_run_status.fence);
  end if;

  select r.status into v_status
    from nightowls.runs r
   where r.org_id = _set_run_status.org and r.run_id = _set_run_status.run_id
     for no key update;
  if not found then
    perform nightowls._refuse_run(_set_run_status.run_id);
  elsif _set_run_status.status <> all (nightowls._legal_statuses(v_status)) then
    raise exception 'run "%" is % and cannot become %', left(_set_run_status.run_id, 64), v_status, _set_run_status.status
      using errcode = 'NW005',
            detail = format('From %s a run goes on to: %s.', v_status,
                            coalesce(nullif(array_to_string(nightowls._legal_statuses(v_status), ', '), ''), 'nothing, it is over')),
            hint = 'Read the run again, decide again.';
  end if;
  update nightowls.runs r
     set status = _set_run_status.status,
         output = case when _set_run_status.patch ? 'output' then _set_run_status.patch -> 'output' else r.output end,
         error = case when _set_run_status.patch ? 'error' then _set_run_status.patch -> 'error' else r.error end,
         runner = case when _set_run_status.patch ? 'runner' then nullif(_set_run_status.patch ->> 'runner', '') else r.runner end,
         metadata = r.metadata || coalesce(_set_run_status.patch -> 'metadata', '{}'),
         updated_at = clock_timestamp(),
         started_at = case when _set_run_status.status = 'running' then coalesce(r.started_at, clock_timestamp()) else r.started_at end,
         finished_at = case when _set_run_status.status in ('completed', 'failed', 'cancelled') then clock_timestamp() end
   where r.org_id = _set_run_status.org and r.run_id = _set_run_status.run_id;
  return v_status;
end;
$$;

revoke all on function nightowls._set_run_status(uuid, text, text, jsonb, text, bigint) from public;

create function nightowls.set_run_status(
  run_id    text,
  status    text,
  patch     jsonb default null,
  container text default null,
  fence     bigint default null,
  org       uuid default null
)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org    uuid := nightowls.current_org(set_run_status.org);
  v_before text;
begin
  v_before := nightowls._set_run_status(
    v_org, set_run_status.run_id, set_run_status.status, set_run_status.patch, set_run_status.container, set_run_status.fence);
  return (nightowls.append_event(
    'run', set_run_status.run_id, 'run_' || set_run_status.status,
    coalesce(set_run_status.patch, '{}') || jsonb_build_object('status', set_run_status.status, 'before', v_before),
    metadata => jsonb_strip_nulls(jsonb_build_object('actor_id', nightowls._user_id())), org => v_org)).version;
end;
$$;

comment on function nightowls.set_run_status(text, text, jsonb, text, bigint, uuid) is
  'Changes a run''s status and returns the version of the event that says so: the row of runs and one event run_<status> of aggregate run are written '
  'in the same transaction, or neither. Legal are queued to running, failed, cancelled; running to suspended, completed, failed, cancelled; suspended to '
  'running, failed, cancelled. run_id: the run; status: what it becomes; patch: {"output", "error", "runner", "metadata"}, of which metadata is merged, the '
  'others replaced; container and fence: only while this floor is held with this fence; org: the tenant. For services. Waits for an open change of the '
  'same run. Raises NW005 if the change is not legal, NW007 if there is no such run, NW003 if the fence is too old, 22004 or 22023 for an argument that is '
  'null or not valid, 54000 for one that is too large or too deep, NW010 if there is no org, 40001 above read committed when somebody else was quicker.';

revoke all on function nightowls.set_run_status(text, text, jsonb, text, bigint, uuid) from public;

-- Snapshots -------------------------------------------------------------------------------------------

-- Definer: nobody else may write to the table.
create function nightowls._save_run_snapshot(
  org uuid, run_id text, snapshot jsonb, expected_version bigint, keep int, container text, fence bigint)
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
  v_version bigint;
begin
  if _save_run_snapshot.run_id is null or _save_run_snapshot.keep is null then
    raise exception 'run_id and keep must not be null' using errcode = 'null_value_not_allowed';
  elsif _save_run_snapshot.keep < 1 or _save_run_snapshot.expected_version < 0 then
    raise exception 'keep must be 1 or more, expected_version 0 or more' using errcode = 'invalid_parameter_value';
  end if;
  perform nightowls._check_json('snapshot', _save_run_snapshot.snapshot, null, true);
  if _save_run_snapshot.container is not null or _save_run_snapshot.fence is not null then
    perform nightowls._assert_fence(_save_run_snapshot.org, _save_run_snapshot.container, _save_run_snapshot.fence);
  end if;
  -- Savers of one run follow each other: this locks the row and writes nothing to it.
  perform
     from nightowls.runs r
    where r.org_id = _save_run_snapshot.org and r.run_id = _save_run_snapshot.run_id
      for no key update;
  if not found then
    perform nightowls._refuse_run(_save_run_snapshot.run_id);
  end if;
  v_version := coalesce((
    select s.version
      from nightowls.run_snapshots s
     where s.org_id = _save_run_snapshot.org and s.run_id = _save_run_snapshot.run_id
     order by s.version desc
     limit 1), 0);
  if _save_run_snapshot.expected_version <> v_version then
    raise exception 'the snapshot of run "%" is at version %, not %', left(_save_run_snapshot.run_id, 64), v_version,
        _save_run_snapshot.expected_version
      using errcode = 'NW001',
            detail = format('Expected version %s, actual version %s.', _save_run_snapshot.expected_version, v_version),
            hint = 'Load the snapshot again, decide again, then retry.';
  end if;
  insert into nightowls.run_snapshots (org_id, run_id, version, snapshot)
  values (_save_run_snapshot.org, _save_run_snapshot.run_id, v_version + 1, _save_run_snapshot.snapshot)
  on conflict do nothing;
  if not found then
    raise exception 'somebody else has saved a snapshot of run "%"', left(_save_run_snapshot.run_id, 64)
      using errcode = 'serialization_failure', hint = 'Retry the transaction.';
  end if;
  delete from nightowls.run_snapshots s
   where s.org_id = _save_run_snapshot.org and s.run_id = _save_run_snapshot.run_id
     and s.version <= v_version + 1 - _save_run_snapshot.keep;
  return v_version + 1;
end;
$$;

revoke all on function nightowls._save_run_snapshot(uuid, text, jsonb, bigint, int, text, bigint) from public;

create function nightowls.save_run_snapshot(
  run_id           text,
  snapshot         jsonb,
  expected_version bigint default null,
  keep             int default 20,
  container        text default null,
  fence            bigint default null,
  org              uuid default null
)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return nightowls._save_run_snapshot(
    nightowls.current_org(save_run_snapshot.org), save_run_snapshot.run_id, save_run_snapshot.snapshot,
    save_run_snapshot.expected_version, save_run_snapshot.keep, save_run_snapshot.container, save_run_snapshot.fence);
end;
$$;

comment on function nightowls.save_run_snapshot(text, jsonb, bigint, int, text, bigint, uuid) is
  'Saves what a process needs to go on with a run, as the next version, and returns that: 1, 2, 3 … run_id: the run; snapshot: any JSON; expected_version: '
  'null any, 0 there must be none yet, n the newest must be n: so that who loads, changes and saves loses nobody else''s change; keep: how many of the newest '
  'to keep; container and fence: only while this floor is held with this fence; org: the tenant. For services. Waits for an open change of the same run. '
  'Raises NW001 if the expectation is missed, NW007 if there is no such run, NW003 if the fence is too old, 22004 or 22023 for an argument that is null or '
  'not valid, 54000 for one that is too large or too deep, NW010 if there is no org, 40001 above read committed when somebody else was quicker.';

revoke all on function nightowls.save_run_snapshot(text, jsonb, bigint, int, text, bigint, uuid) from public;

create function nightowls.load_run_snapshot(run_id text, version bigint default null, org uuid default null)
  returns setof nightowls.run_snapshots
  language plpgsql
  stable
  parallel safe
  rows 1
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_bitmapscan to off
  set enable_sort to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
declare
  v_org uuid := nightowls.current_org(load_run_snapshot.org);
begin
  if load_run_snapshot.run_id is null then
    raise exception 'run_id must not be null' using errcode = 'null_value_not_allowed';
  end if;
  return query
    select s.*
      from nightowls.run_snapshots s
     where s.org_id = v_org and s.run_id = load_run_snapshot.run_id
       and s.version <= coalesce(load_run_snapshot.version, 9223372036854775807)
       and s.version >= coalesce(load_run_snapshot.version, 0)
     order by s.version desc
     limit 1;
end;
$$;

comment on function nightowls.load_run_snapshot(text, bigint, uuid) is
  'What was saved last of a run: one row of run_snapshots, none if there is none. run_id: the run; version: an earlier one that is still kept; org: the '
  'tenant. For services. Locks nothing. Raises 22004 if run_id is null, NW010 if there is no org.';

revoke all on function nightowls.load_run_snapshot(text, bigint, uuid) from public;

-- A run's events --------------------------------------------------------------------------------------

-- redacted: for a member, whom _my_run_events() looks at; else whoever calls it has checked the org.
-- Definer: members may not read the log, nor wait for whatever they like.
create function nightowls._list_run_events(
  org uuid, run_id text, after bigint, max_events int, max_wait interval, redacted boolean)
  returns table (
    "position" bigint, version bigint, event_type text, payload jsonb, metadata jsonb, event_id uuid, created_at timestamptz)
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_until timestamptz := clock_timestamp() + _list_run_events.max_wait;
  v_key   text := 'events/' || nightowls._org_class(_list_run_events.org);
  v_seen  bigint;
  v_nth   int := 0;
begin
  perform nightowls._check_max_events(_list_run_events.max_events);
  if _list_run_events.run_id is null or _list_run_events.after is null or _list_run_events.max_wait is null then
    raise exception 'run_id, after and max_wait must not be null' using errcode = 'null_value_not_allowed';
  elsif _list_run_events.max_wait not between interval '0' and interval '1 minute' then
    raise exception 'max_wait must be between 0 and 1 minute'
      using errcode = 'invalid_parameter_value', hint = 'Call again to wait longer.';
  elsif _list_run_events.max_wait > interval '0' then
    perform nightowls._refuse_snapshot('waiting for events');
    v_seen := nightowls._wake_count(v_key);
  end if;
  loop
    if _list_run_events.redacted then
      return query
        select e.*
          from nightowls._my_run_events(
                 _list_run_events.org, _list_run_events.run_id, _list_run_events.after, _list_run_events.max_events) e;
    else
      return query
        select e."position", e.version, e.event_type, e.payload, e.metadata, e.event_id, e.created_at
          from nightowls.read_aggregate(
                 'run', _list_run_events.run_id,
                 coalesce(nightowls._version_at(_list_run_events.org, 'run', _list_run_events.run_id, _list_run_events.after), 0) + 1,
                 _list_run_events.max_events, org => _list_run_events.org) e;
    end if;
    exit when found or clock_timestamp() >= v_until;
    v_seen := nightowls._nap(v_key, v_seen, v_nth, ceil(extract(epoch from v_until - clock_timestamp()) * 1000)::int);
    v_nth := v_nth + 1;
  end loop;
end;
$$;

revoke all on function nightowls._list_run_events(uuid, text, bigint, int, interval, boolean) from public;

-- Definer: for members, as the above; it looks at the membership of the caller of the setting or JWT.
create function nightowls._list_my_run_events(org uuid, run_id text, after bigint, max_events int, max_wait interval)
  returns table (
    "position" bigint, version bigint, event_type text, payload jsonb, metadata jsonb, event_id uuid, created_at timestamptz)
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if not nightowls._is_member(_list_my_run_events.org) then
    perform nightowls._refuse_member(_list_my_run_events.org, 'Members of the org read its runs.');
  end if;
  return query
    select e.*
      from nightowls._list_run_events(
             _list_my_run_events.org, _list_my_run_events.run_id, _list_my_run_events.after, _list_my_run_events.max_events,
             _list_my_run_events.max_wait, true) e;
end;
$$;

revoke all on function nightowls._list_my_run_events(uuid, text, bigint, int, interval) from public;

create function nightowls.list_run_events(
  run_id     text,
  after      bigint default 0,
  max_events int default 1000,
  max_wait   interval default '0',
  org        uuid default null
)
  returns table (
    "position" bigint, version bigint, event_type text, payload jsonb, metadata jsonb, event_id uuid, created_at timestamptz)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org uuid := nightowls.current_org(list_run_events.org);
begin
  if nightowls._is_service() then
    return query
      select e.*
        from nightowls._list_run_events(
               v_org, list_run_events.run_id, list_run_events.after, list_run_events.max_events, list_run_events.max_wait, false) e;
    return;
  end if;
  return query
    select e.*
      from nightowls._list_my_run_events(
             v_org, list_run_events.run_id, list_run_events.after, list_run_events.max_events, list_run_events.max_wait) e;
end;
$$;

comment on function nightowls.list_run_events(text, bigint, int, interval, uuid) is
  'The events of a run in order, at most max_events of them, after a position: keep the last position you got and pass it as after to go on; none is ever '
  'missed. run_id: the run; after: 0 from the beginning; max_wait: how long to wait for an event, at most 1 minute, holding a connection; org: the tenant. '
  'For services, and for members of the org, for whom secrets are taken out (redact). Locks nothing. Raises 22004 or 22023 for an argument that is null or not valid, 25001 for a max_wait above read committed, NW010 if there is no org.';

revoke all on function nightowls.list_run_events(text, bigint, int, interval, uuid) from public;

alter table nightowls.threads enable row level security;
alter table nightowls.threads force row level security;
create policy service_all on nightowls.threads
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));

alter table nightowls.runs enable row level security;
alter table nightowls.runs force row level security;
create policy service_all on nightowls.runs
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));

alter table nightowls.run_snapshots enable row level security;
alter table nightowls.run_snapshots force row level security;
create policy service_all on nightowls.run_snapshots
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));
