-- Followups: work to be done later for a thread. A row says what; a delayed message of queue "followups", sent in the same transaction, says when.

create table nightowls.followups (
  org_id      uuid        not null,
  followup_id bigint      not null generated always as identity,
  thread_id   text        collate "C" not null,
  agent       text        collate "C",
  payload     jsonb       not null default '{}',
  due_at      timestamptz not null,
  msg_id      bigint      not null,
  status      text        collate "C" not null default 'pending',
  created_at  timestamptz not null default clock_timestamp(),
  finished_at timestamptz,
  constraint followups_pkey primary key (org_id, followup_id),
  constraint followups_status_check check (status in ('pending', 'done', 'cancelled'))
);

create index followups_thread_id_idx on nightowls.followups (org_id, thread_id, due_at);
create index followups_finished_idx on nightowls.followups (org_id, finished_at) where finished_at is not null;

comment on table nightowls.followups is 'Work to be done later for a thread. Kept by create_followup, finish_followup and cancel_followup.';
comment on column nightowls.followups.org_id is 'The tenant.';
comment on column nightowls.followups.followup_id is 'The followup''s number.';
comment on column nightowls.followups.thread_id is 'The thread it is for.';
comment on column nightowls.followups.agent is 'Who is to do it, by slug; null: whoever takes it.';
comment on column nightowls.followups.payload is 'What is to be done: any JSON.';
comment on column nightowls.followups.due_at is 'When it is due.';
comment on column nightowls.followups.msg_id is 'Its message in queue "followups".';
comment on column nightowls.followups.status is 'pending, done or cancelled.';
comment on column nightowls.followups.created_at is 'When it was made.';
comment on column nightowls.followups.finished_at is 'When it was done or cancelled; 30 days later the clock removes it.';

-- Definer: nobody else may write to the table.
create function nightowls._create_followup(org uuid, thread_id text, agent text, payload jsonb, due_at timestamptz)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_delay numeric := case when isfinite(_create_followup.due_at)
                          then greatest(ceil(extract(epoch from _create_followup.due_at - clock_timestamp())), 0) end;
  v_id    bigint;
begin
  perform nightowls._check_text('thread_id', _create_followup.thread_id, true);
  perform nightowls._check_text('agent', _create_followup.agent, false);
  perform nightowls._check_json('payload', _create_followup.payload, null, true);
  if _create_followup.due_at is null then
    raise exception 'due_at must not be null' using errcode = 'null_value_not_allowed';
  elsif v_delay is null or v_delay > 2147483647 then
    raise exception 'due_at is too far away' using errcode = 'invalid_parameter_value', hint = 'At most 68 years.';
  elsif not exists (
       select from nightowls.threads t where t.org_id = _create_followup.org and t.thread_id = _create_followup.thread_id) then
    perform nightowls._refuse_thread(_create_followup.thread_id);
  elsif not exists (select from nightowls.queues q where q.org_id = _create_followup.org and q.name = 'followups') then
    perform nightowls.create_queue('followups', vt => 60, org => _create_followup.org);
  end if;
  v_id := nextval('nightowls.followups_followup_id_seq');
  insert into nightowls.followups (org_id, followup_id, thread_id, agent, payload, due_at, msg_id)
  overriding system value
  values (_create_followup.org, v_id, _create_followup.thread_id, _create_followup.agent, _create_followup.payload, _create_followup.due_at,
          nightowls._send(_create_followup.org, 'followups', jsonb_build_object('followup_id', v_id), v_delay::int, null, null, null, null, 0));
  return v_id;
end;
$$;

revoke all on function nightowls._create_followup(uuid, text, text, jsonb, timestamptz) from public;

create function nightowls.create_followup(
  thread_id text,
  due_at    timestamptz,
  payload   jsonb default '{}',
  agent     text default null,
  org       uuid default null
)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return nightowls._create_followup(
    nightowls.current_org(create_followup.org), create_followup.thread_id, create_followup.agent, create_followup.payload, create_followup.due_at);
end;
$$;

comment on function nightowls.create_followup(text, timestamptz, jsonb, text, uuid) is
  'Puts work for later on a thread and returns its number; claim_followups gives it out when it is due. It is a delayed message of queue "followups", '
  'which is made where it is missing. thread_id: the thread; due_at: when, to the second above; payload: what is to be done; agent: who is to do it; org: the tenant. For '
  'services. Waits for nobody. Raises NW007 if there is no such thread, 22004 or 22023 for an argument that is null or not valid, 54000 for one that is too '
  'long, too large or too deep, NW010 if there is no org.';

revoke all on function nightowls.create_followup(text, timestamptz, jsonb, text, uuid) from public;

create function nightowls.claim_followups(qty int default 1, vt int default 60, org uuid default null)
  returns table (
    followup_id bigint, thread_id text, agent text, payload jsonb, due_at timestamptz, read_ct int, receipt uuid)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org uuid := nightowls.current_org(claim_followups.org);
begin
  if not exists (select from nightowls.queues q where q.org_id = v_org and q.name = 'followups') then
    return;
  end if;
  return query
    select f.followup_id, f.thread_id, f.agent, f.payload, f.due_at, m.read_ct, m.receipt
      from nightowls.read('followups', claim_followups.vt, claim_followups.qty, v_org) m
      join nightowls.followups f on f.org_id = v_org and f.followup_id = (m.message ->> 'followup_id')::bigint;
end;
$$;

comment on function nightowls.claim_followups(int, int, uuid) is
  'Gives out followups that are due, each to one worker for a while: followup_id, thread_id, agent, payload, due_at, read_ct (how often it was given out), '
  'receipt. qty: how many at most; vt: seconds until it is given out again, if finish_followup has not been called; org: the tenant. For services. Waits for nobody. '
  'Raises 22004 or 22023 for an argument that is null or not valid, NW010 if there is no org.';

revoke all on function nightowls.claim_followups(int, int, uuid) from public;

-- Definer: nobody else may write to the table.
create function nightowls._end_followup(org uuid, followup_id bigint, receipt uuid, cancelled boolean)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_followup nightowls.followups;
begin
  if _end_followup.followup_id is null or _end_followup.receipt is null and not _end_followup.cancelled then
    raise exception 'followup_id and receipt must not be null' using errcode = 'null_value_not_allowed';
  end if;
  select f.* into v_followup
    from nightowls.followups f
   where f.org_id = _end_followup.org and f.followup_id = _end_followup.followup_id
     for no key update;
  if not found then
    perform nightowls._refuse_unknown('followup', _end_followup.followup_id::text, '{}');
  elsif v_followup.status <> 'pending' then
    return false;
  elsif _end_followup.cancelled then
    perform nightowls._finish_one(_end_followup.org, 'followups', v_followup.msg_id, null, false, false);
  elsif not nightowls._ack(_end_followup.org, 'followups', v_followup.msg_id, _end_followup.receipt) then
    return false;
  end if;
  update nightowls.followups f
     set status = case when _end_followup.cancelled then 'cancelled' else 'done' end, finished_at = clock_timestamp()
   where f.org_id = _end_followup.org and f.followup_id = _end_followup.followup_id;
  return true;
end;
$$;

revoke all on function nightowls._end_followup(uuid, bigint, uuid, boolean) from public;

create function nightowls.finish_followup(followup_id bigint, receipt uuid, org uuid default null)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return nightowls._end_followup(nightowls.current_org(finish_followup.org), finish_followup.followup_id, finish_followup.receipt, false);
end;
$$;

comment on function nightowls.finish_followup(bigint, uuid, uuid) is
  'Says that a followup is done; false, and nothing changes, if it is over already or was given to somebody else since. followup_id, receipt: as claimed; '
  'org: the tenant. In the caller''s transaction: effects and this commit together. For services. Waits for who is ending the same one. Raises NW007 if there '
  'is no such followup, 22004 if an argument is null, NW010 if there is no org.';

revoke all on function nightowls.finish_followup(bigint, uuid, uuid) from public;

create function nightowls.cancel_followup(followup_id bigint, org uuid default null)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return nightowls._end_followup(nightowls.current_org(cancel_followup.org), cancel_followup.followup_id, null, true);
end;
$$;

comment on function nightowls.cancel_followup(bigint, uuid) is
  'Takes back a followup that is not over, also one that a worker has: that worker''s finish_followup is then false. Returns whether it was pending. '
  'followup_id: its number; org: the tenant. For services. Waits for who is ending the same one. Raises NW007 if there is no such followup, 22004 if '
  'followup_id is null, NW010 if there is no org.';

revoke all on function nightowls.cancel_followup(bigint, uuid) from public;

alter table nightowls.followups enable row level security;
alter table nightowls.followups force row level security;
create policy service_all on nightowls.followups
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));

-- Removes followups of an org that were over before a time, 1,000 at most, and returns how many. What somebody has locked stays.
-- Definer: nobody else may write to the table.
create function nightowls._prune_followups_of(org uuid, before timestamptz)
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
  v_count bigint;
begin
  delete from nightowls.followups d
   where d.ctid = any (array(
           select f.ctid
             from nightowls.followups f
            where f.org_id = _prune_followups_of.org and f.finished_at < _prune_followups_of.before
            order by f.finished_at
            limit 1000
              for update skip locked));
  get diagnostics v_count = row_count;
  return v_count;
end;
$$;

revoke all on function nightowls._prune_followups_of(uuid, timestamptz) from public;

-- The clock's part of it, of all orgs in turn: what was over 30 days ago. Returns how many went.
create function nightowls._prune_followups(max_ms int)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_until  timestamptz := clock_timestamp() + _prune_followups.max_ms * interval '1 millisecond';
  v_before timestamptz := clock_timestamp() - interval '30 days';
  v_org    uuid;
  v_count  bigint;
  v_done   bigint := 0;
begin
  if not nightowls._begin_sweep('followups') then
    return 0;
  end if;
  for v_org in
    select o.org_id
      from nightowls.orgs o
      left join nightowls._sweeps w on w.org_id = o.org_id and w.sweep = 'followups' and w.name = ''
     where exists (select from nightowls.followups f where f.org_id = o.org_id and f.finished_at < v_before)
     order by w.swept_at nulls first, o.org_id
  loop
    loop
      v_count := nightowls._prune_followups_of(v_org, v_before);
      v_done := v_done + v_count;
      exit when v_count < 1000 or clock_timestamp() >= v_until;
    end loop;
    perform nightowls._end_turn(v_org, 'followups', '', '');
    exit when clock_timestamp() >= v_until;
  end loop;
  return v_done;
end;
$$;

revoke all on function nightowls._prune_followups(int) from public;

-- A subject of the swarm --------------------------------------------------------------------------------

-- Forgets what is about one subject: a run (also what was said in it), a thread (with its runs), a user (what it said), a resource (its
-- threads' titles and runs), and the scratchpad <type>:<id> of whatever it is.
-- Definer: the tables are closed.
create function nightowls._erase_swarm(org uuid, aggregate_type text, aggregate_id text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_runs    text[] := '{}';
  v_threads text[] := '{}';
begin
  delete from nightowls.scratchpad s
   where s.org_id = _erase_swarm.org and s.scope = _erase_swarm.aggregate_type || ':' || _erase_swarm.aggregate_id;
  if _erase_swarm.aggregate_type not in ('run', 'thread', 'user', 'resource') then
    return;
  elsif _erase_swarm.aggregate_type = 'run' then
    v_runs := array[_erase_swarm.aggregate_id];
  elsif _erase_swarm.aggregate_type = 'thread' then
    v_threads := array[_erase_swarm.aggregate_id];
  elsif _erase_swarm.aggregate_type = 'resource' then
    v_threads := array(select t.thread_id from nightowls.threads t where t.org_id = _erase_swarm.org and t.resource_id = _erase_swarm.aggregate_id);
    v_runs := array(select r.run_id from nightowls.runs r where r.org_id = _erase_swarm.org and r.resource_id = _erase_swarm.aggregate_id);
  end if;
  v_runs := v_runs || array(select r.run_id from nightowls.runs r where r.org_id = _erase_swarm.org and r.thread_id = any (v_threads));
  update nightowls.threads t
     set title = null, metadata = '{}'
   where t.org_id = _erase_swarm.org and t.thread_id = any (v_threads);
  update nightowls.runs r
     set input = null, output = null, error = null, metadata = '{}'
   where r.org_id = _erase_swarm.org and r.run_id = any (v_runs);
  delete from nightowls.run_snapshots s where s.org_id = _erase_swarm.org and s.run_id = any (v_runs);
  update nightowls.followups f
     set payload = '{}'
   where f.org_id = _erase_swarm.org and f.thread_id = any (v_threads);
  update nightowls.messages m
     set content = '{}', metadata = '{}'
   where m.org_id = _erase_swarm.org and (m.thread_id = any (v_threads) or m.run_id = any (v_runs))
      or m.org_id = _erase_swarm.org and m.author_id = _erase_swarm.aggregate_id and m.author_type = _erase_swarm.aggregate_type;
end;
$$;

revoke all on function nightowls._erase_swarm(uuid, text, text) from public;
