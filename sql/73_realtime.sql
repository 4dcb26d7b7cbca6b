-- Realtime: the events of runs, broadcast to those who watch them, where Supabase's Realtime is.
--
-- An append of a run's events has 'broadcast' among what follows it (_append_targets), if schema realtime is there when that is worked out, or
-- enable_realtime() was called: so who appends elsewhere pays nothing. A broadcast is a hint and never the record: nothing that goes wrong
-- with it is an append's concern, and a client that missed one reads list_run_events().

-- Whether appends are to look for Realtime: what enable_realtime() and disable_realtime() have said, else whether its schema is there.
create function nightowls._wants_broadcast()
  returns boolean
  language sql
  stable
  parallel safe
  return coalesce((select s.value = 'true' from nightowls.settings s where s.name = 'realtime'), to_regnamespace('realtime') is not null);

revoke all on function nightowls._wants_broadcast() from public;

-- realtime.send(), if it is there and may be called; null if not. In this order: to_regprocedure() raises without USAGE.
-- It will run as the owner of nightowls, so it must be Supabase's, or belong to who could do as he likes anyhow.
create function nightowls._realtime_send()
  returns oid
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_schema   oid := to_regnamespace('realtime');
  v_function oid;
begin
  if v_schema is null then
    return null;
  elsif has_schema_privilege(v_schema, 'usage') is not true then
    return null;
  end if;
  v_function := to_regprocedure('realtime.send(jsonb,text,text,boolean)');
  if v_function is null then
    return null;
  elsif has_function_privilege(v_function, 'execute') is not true then
    return null;
  end if;
  return (
    select p.oid
      from pg_proc p
      join pg_roles r on r.oid = p.proowner
     where p.oid = v_function
       and (r.rolsuper or r.rolname in ('supabase_realtime_admin', 'supabase_admin', current_user)));
end;
$$;

revoke all on function nightowls._realtime_send() from public;

-- The topic of a run. A run's id is unique within its org only, so that orgs other than the default one stand in their runs' topics.
create function nightowls._run_topic(org uuid, run_id text)
  returns text
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set jit to off
as $$
#variable_conflict use_column
begin
  if _run_topic.run_id !~ '^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}:'
     and exists (
           select from nightowls._append_targets t
            where t.org_id = '00000000-0000-0000-0000-000000000000' and t.target = _run_topic.org) then
    return 'run:' || _run_topic.run_id;
  end if;
  return 'run:' || _run_topic.org || ':' || _run_topic.run_id;
end;
$$;

revoke all on function nightowls._run_topic(uuid, text) from public;

-- Broadcasts the events at these positions that are a run's: one message a run, with the events as members may see them, or with where they are
-- if they are too large. A lock that somebody has on Realtime's table is not waited for.
-- Definer: events, rules and configuration are closed to those who append, and Realtime's table may be.
create function nightowls._broadcast(org uuid, positions bigint[])
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
  set lock_timeout to '100ms'
  set enable_seqscan to off
  set enable_bitmapscan to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
declare
  v_send    oid := nightowls._realtime_send();
  v_before  text := current_setting('realtime.topic', true);
  v_max     int := 200000;
  v_text    text;
  v_rules   jsonb;
  v_run     record;
  v_payload jsonb;
begin
  if v_send is null then
    return;
  end if;
  begin
    v_text := nightowls._get_config_value(_broadcast.org, 'broadcast_max_bytes', true);
    if v_text ~ '^[0-9]{1,9}$' then
      v_max := v_text::int;
    end if;
    v_rules := nightowls._redaction_rules(_broadcast.org);
    for v_run in
      select e.aggregate_id as run_id, min(e."position") as first, max(e."position") as last, max(e.version) as version,
             sum(pg_column_size(e.payload) + pg_column_size(e.metadata)) as size,
             array_agg(e."position" order by e."position") as positions
        from unnest(_broadcast.positions) as u ("position")
       cross join lateral (
               select x.* from nightowls.events x where x.org_id = _broadcast.org and x."position" = u."position" offset 0) e
       where e.aggregate_type = 'run'
       group by e.aggregate_id
       order by e.aggregate_id
    loop
      v_payload := jsonb_build_object(
        'org_id', _broadcast.org, 'run_id', v_run.run_id, 'first', v_run.first, 'position', v_run.last, 'version', v_run.version);
      if v_run.size <= v_max then
        v_payload := v_payload || jsonb_build_object('events', (
          select jsonb_agg(jsonb_build_object(
                   'position', e."position", 'version', e.version, 'event_type', e.event_type,
                   'payload', nightowls.redact(e.payload, v_rules), 'metadata', nightowls.redact(e.metadata, v_rules),
                   'event_id', e.event_id, 'created_at', e.created_at) order by e."position")
            from unnest(v_run.positions) as u ("position")
           cross join lateral (
                   select x.* from nightowls.events x where x.org_id = _broadcast.org and x."position" = u."position" offset 0) e));
      end if;
      if not v_payload ? 'events' or octet_length(v_payload::text) > v_max then
        v_payload := v_payload - 'events' || '{"truncated": true}';
      end if;
      execute format('select %s($1, $2, $3, true)', v_send::regproc)
        using v_payload, 'events', nightowls._run_topic(_broadcast.org, v_run.run_id);
    end loop;
    -- send() leaves its topic for the rest of the transaction, where policies would go by it.
    perform set_config('realtime.topic', coalesce(v_before, ''), true);
  exception when others or assert_failure then
    raise warning 'the events of a run could not be broadcast' using detail = format('%s: %s', sqlstate, sqlerrm);
  end;
end;
$$;

revoke all on function nightowls._broadcast(uuid, bigint[]) from public;

-- Whether the caller may join a topic, as a member of the org whose run it is. It answers false to whatever it does not know, and never raises: permissive policies
-- are tried together, so that one which raises would close every private channel of the project.
-- Definer: it looks at the membership of the caller of the setting or JWT, and into a table that is closed to members.
create function nightowls._may_receive(topic text)
  returns boolean
  language plpgsql
  stable
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set jit to off
as $$
#variable_conflict use_column
declare
  v_org text;
begin
  if starts_with(_may_receive.topic, 'run:') is not true then
    return false;
  end if;
  v_org := substring(_may_receive.topic from '^run:([0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}):');
  if v_org is null then
    v_org := (select t.target from nightowls._append_targets t where t.org_id = '00000000-0000-0000-0000-000000000000');
  end if;
  return coalesce(nightowls._is_member(v_org::uuid), false);
exception when others or assert_failure then
  return false;
end;
$$;

revoke all on function nightowls._may_receive(text) from public;

-- Makes our policies on Realtime's table, and says of each what came of it.
create function nightowls._make_realtime_policies(role text)
  returns table (step text, outcome text)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_table  oid;
  v_policy record;
begin
  if to_regnamespace('realtime') is not null and has_schema_privilege('realtime', 'usage') then
    v_table := to_regclass('realtime.messages');
  end if;
  for v_policy in
    values ('members_receive_run_events', 'select', 'using (extension in (''broadcast'', ''presence'') and %s)'),
           ('members_track_run_presence', 'insert', 'with check (extension = ''presence'' and %s)')
  loop
    step := 'policy ' || v_policy.column1;
    if v_table is null then
      outcome := 'not made: there is no table realtime.messages';
    elsif not exists (select from pg_roles r where r.rolname = _make_realtime_policies.role) then
      outcome := format('not made: role "%s" does not exist', left(_make_realtime_policies.role, 64));
    elsif exists (select from pg_policy p where p.polrelid = v_table and p.polname = v_policy.column1) then
      outcome := 'there already';
    else
      begin
        execute format('create policy %I on realtime.messages for %s to %I ' || v_policy.column3, v_policy.column1, v_policy.column2,
                       _make_realtime_policies.role, 'nightowls._may_receive((select realtime.topic()))');
        outcome := 'made';
      exception when insufficient_privilege or undefined_function or undefined_column then
        outcome := 'not made: ' || sqlerrm;
      end;
    end if;
    return next;
  end loop;
end;
$$;

revoke all on function nightowls._make_realtime_policies(text) from public;

create function nightowls._rekeep_targets()
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org uuid;
begin
  for v_org in select o.org_id from nightowls.orgs o order by o.org_id loop
    perform nightowls._keep_target(v_org);
  end loop;
end;
$$;

revoke all on function nightowls._rekeep_targets() from public;

create function nightowls.enable_realtime(role text default 'authenticated')
  returns table (step text, outcome text)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if enable_realtime.role is null then
    raise exception 'role must not be null' using errcode = 'null_value_not_allowed';
  end if;
  insert into nightowls.settings (name, value) values ('realtime', 'true')
  on conflict (name) do update set value = excluded.value;
  perform nightowls._rekeep_targets();
  step := 'broadcast';
  outcome := case when nightowls._realtime_send() is not null then 'on'
                  else 'on, as soon as realtime.send(jsonb, text, text, boolean) is there, is Supabase''s, and may be called' end;
  return next;
  return query select p.step, p.outcome from nightowls._make_realtime_policies(enable_realtime.role) p;
end;
$$;

comment on function nightowls.enable_realtime(text) is
  'Has appends broadcast the events of runs by Supabase''s Realtime, and lets members receive them: policies members_receive_run_events and '
  'members_track_run_presence on realtime.messages. Where Realtime is there when nightowls is installed, this is done already; again it makes what is '
  'missing. One row for each step, with what came of it. role: the role that members come as, which grant_member() has been called for. Owner only, as '
  'it runs DDL. Waits for who is changing what follows appends. Raises 22004 if role is null.';

revoke all on function nightowls.enable_realtime(text) from public;

create function nightowls.disable_realtime()
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_policy text;
begin
  insert into nightowls.settings (name, value) values ('realtime', 'false')
  on conflict (name) do update set value = excluded.value;
  perform nightowls._rekeep_targets();
  for v_policy in
    select p.polname
      from pg_policy p
      join pg_class c on c.oid = p.polrelid
     where c.relname = 'messages' and c.relnamespace = to_regnamespace('realtime')
       and p.polname in ('members_receive_run_events', 'members_track_run_presence')
  loop
    execute format('drop policy %I on realtime.messages', v_policy);
  end loop;
end;
$$;

comment on function nightowls.disable_realtime() is
  'Ends what enable_realtime() began: no append broadcasts any more, and the two policies on realtime.messages are dropped. Owner only, as it runs DDL. '
  'Waits for who is changing what follows appends, and for who uses realtime.messages. Raises 42501 if the policies are not the caller''s to drop.';

revoke all on function nightowls.disable_realtime() from public;

create function nightowls._health_realtime()
  returns table (concern text, name text, ok boolean, value text, hint text)
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_schema boolean := to_regnamespace('realtime') is not null;
  v_fault  text;
begin
  concern := 'realtime';
  name := 'broadcast';
  if nightowls._wants_broadcast() and nightowls._realtime_send() is null then
    v_fault := case when v_schema then 'realtime.send() is not there, not Supabase''s, or may not be called' else 'there is no schema realtime' end;
  end if;
  ok := v_fault is null;
  value := coalesce(v_fault, case when nightowls._wants_broadcast() then 'on' else 'off' end);
  hint := case when v_fault is not null
               then 'Events of runs are appended, and nobody is told. Give the owner of nightowls USAGE and EXECUTE, or call nightowls.disable_realtime().' end;
  return next;

  if v_schema and nightowls._wants_broadcast() then
    name := 'policies';
    select string_agg(w.name, ', ' order by w.name) into v_fault
      from (values ('members_receive_run_events'), ('members_track_run_presence')) as w (name)
     where not exists (
             select from pg_policy p
               join pg_class c on c.oid = p.polrelid
              where p.polname = w.name and c.relname = 'messages' and c.relnamespace = to_regnamespace('realtime'));
    ok := v_fault is null;
    value := coalesce('missing: ' || v_fault, 'members may receive');
    hint := case when v_fault is not null then 'Members cannot join the channels of runs. The owner calls nightowls.enable_realtime().' end;
    return next;
  end if;
end;
$$;

revoke all on function nightowls._health_realtime() from public;
