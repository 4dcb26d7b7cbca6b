-- Making, changing and dropping queues; dead letters back to work; the archive's end.

-- Says what is wrong with a queue's policies, if anything is.
create function nightowls._check_policies(queue nightowls.queues)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if (_check_policies.queue).vt < 0 or (_check_policies.queue).max_attempts < 0 then
    raise exception 'vt and max_attempts must be 0 or more' using errcode = 'invalid_parameter_value';
  elsif (_check_policies.queue).backoff < interval '0' or (_check_policies.queue).max_backoff < interval '0'
     or (_check_policies.queue).retention < interval '0' then
    raise exception 'backoff, max_backoff and retention must be 0 or more' using errcode = 'invalid_parameter_value';
  elsif (_check_policies.queue).dedup_for <= interval '0' then
    raise exception 'dedup_for must be more than 0' using errcode = 'invalid_parameter_value';
  elsif (_check_policies.queue).on_other_body not in ('raise', 'report') then
    raise exception 'on_other_body must be raise or report' using errcode = 'invalid_parameter_value';
  elsif (_check_policies.queue).dead_letter_queue = (_check_policies.queue).name then
    raise exception 'a queue cannot be its own dead letter queue'
      using errcode = 'invalid_parameter_value', hint = 'Leave dead_letter_queue out to keep dead letters in the queue itself.';
  elsif (_check_policies.queue).dead_letter_queue is not null then
    perform nightowls._queue((_check_policies.queue).org_id, (_check_policies.queue).dead_letter_queue);
  end if;
end;
$$;

revoke all on function nightowls._check_policies(nightowls.queues) from public;

-- Definer: nobody else may write to the queue's tables.
create function nightowls._create_queue(queue nightowls.queues)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_name  text := nightowls._queue_name((_create_queue.queue).name);
  v_found nightowls.queues;
begin
  if v_name is null then
    raise exception 'name must not be null' using errcode = 'null_value_not_allowed';
  elsif v_name = '' or v_name ~ '[\x01-\x1f\x7f]' or v_name ~ '^\s|\s$' then
    raise exception 'a queue''s name must not be empty, begin or end with a blank, or hold control characters'
      using errcode = 'invalid_parameter_value';
  elsif octet_length(v_name) > 63 then
    raise exception 'the name of a queue is too long' using errcode = 'program_limit_exceeded', detail = 'It has at most 63 bytes.';
  elsif row ((_create_queue.queue).vt, (_create_queue.queue).backoff, (_create_queue.queue).max_backoff,
             (_create_queue.queue).on_other_body, (_create_queue.queue).archive_acked, (_create_queue.queue).retention,
             (_create_queue.queue).notify)
        is not null is not true then
    raise exception 'vt, backoff, max_backoff, on_other_body, archive_acked, retention and notify must not be null'
      using errcode = 'null_value_not_allowed';
  end if;
  _create_queue.queue.name := v_name;
  _create_queue.queue.max_attempts := nullif((_create_queue.queue).max_attempts, 0);
  _create_queue.queue.dead_letter_queue := nightowls._queue_name(nullif((_create_queue.queue).dead_letter_queue, ''));
  perform nightowls._check_policies(_create_queue.queue);
  perform nightowls._refuse_no_org((_create_queue.queue).org_id);

  insert into nightowls.queues
         (org_id, name, vt, max_attempts, dead_letter_queue, backoff, max_backoff, dedup_for, on_other_body, archive_acked, retention,
          notify)
  select q.org_id, q.name, q.vt, q.max_attempts, q.dead_letter_queue, q.backoff, q.max_backoff, q.dedup_for, q.on_other_body,
         q.archive_acked, q.retention, q.notify
    from (select (_create_queue.queue).*) q
  on conflict (org_id, name) do nothing;
  if not found then
    v_found := nightowls._queue((_create_queue.queue).org_id, v_name);
    if (to_jsonb(v_found) - '{queue_id,created_at,paused_at}'::text[])
       <> (to_jsonb(_create_queue.queue) - '{queue_id,created_at,paused_at}'::text[]) then
      raise exception 'queue "%" exists already with other policies', v_name
        using errcode = 'duplicate_object', hint = 'Change it with nightowls.alter_queue().';
    end if;
  end if;
end;
$$;

revoke all on function nightowls._create_queue(nightowls.queues) from public;

create function nightowls.create_queue(
  name              text,
  vt                int default 30,
  max_attempts      int default 0,
  dead_letter_queue text default null,
  backoff           interval default '1 second',
  max_backoff       interval default '1 hour',
  dedup_for         interval default null,
  on_other_body     text default 'raise',
  archive_acked     boolean default false,
  retention         interval default '30 days',
  notify            boolean default false,
  org               uuid default null
)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_queue nightowls.queues;
begin
  v_queue.org_id := nightowls.current_org(create_queue.org);
  v_queue.name := create_queue.name;
  v_queue.vt := create_queue.vt;
  v_queue.max_attempts := create_queue.max_attempts;
  v_queue.dead_letter_queue := create_queue.dead_letter_queue;
  v_queue.backoff := create_queue.backoff;
  v_queue.max_backoff := create_queue.max_backoff;
  v_queue.dedup_for := create_queue.dedup_for;
  v_queue.on_other_body := create_queue.on_other_body;
  v_queue.archive_acked := create_queue.archive_acked;
  v_queue.retention := create_queue.retention;
  v_queue.notify := create_queue.notify;
  perform nightowls._create_queue(v_queue);
end;
$$;

comment on function nightowls.create_queue(text, int, int, text, interval, interval, interval, text, boolean, interval, boolean, uuid) is
  'Makes a queue; again with the same policies it changes nothing. It runs no DDL. name: at most 63 bytes; ASCII letters count in lower case, '
  'so CaseQ and caseq are one queue; vt: seconds for which a reader that names none has a message; max_attempts: deliveries before a message is '
  'a dead letter, 0 without limit; dead_letter_queue: an existing queue they are moved to, by default they stay in this one, unread, until '
  'redrive; backoff, max_backoff: the pause after a failure, doubled each time, and its limit; dedup_for: how long dedup keys count, by '
  'default until the message is done; on_other_body: raise (NW002) or report (a warning) when a key comes again with another message; '
  'archive_acked: whether ack archives; retention: how long purge_archive keeps; notify: whether who listens on channel nightowls_queues '
  'gets "<org>:<queue>" once for each transaction that brings messages, after its commit (it cannot be prepared then); org: the tenant. Raises 42710 if it exists with other '
  'policies, NW007 if dead_letter_queue does not exist, NW010 if there is no org, 22004 or 22023 for an argument that is null or not valid, '
  '54000 if the name is too long.';

revoke all on function nightowls.create_queue(text, int, int, text, interval, interval, interval, text, boolean, interval, boolean, uuid)
  from public;

-- Definer: nobody else may write to the queue's tables.
create function nightowls._alter_queue(queue nightowls.queues)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform nightowls._check_policies(_alter_queue.queue);
  update nightowls.queues q
     set vt = (_alter_queue.queue).vt, max_attempts = (_alter_queue.queue).max_attempts,
         dead_letter_queue = (_alter_queue.queue).dead_letter_queue, backoff = (_alter_queue.queue).backoff,
         max_backoff = (_alter_queue.queue).max_backoff, dedup_for = (_alter_queue.queue).dedup_for,
         on_other_body = (_alter_queue.queue).on_other_body, archive_acked = (_alter_queue.queue).archive_acked,
         retention = (_alter_queue.queue).retention, paused_at = (_alter_queue.queue).paused_at, notify = (_alter_queue.queue).notify
   where q.org_id = (_alter_queue.queue).org_id and q.queue_id = (_alter_queue.queue).queue_id;
  -- What was paused can be read again, say.
  perform nightowls._announce((_alter_queue.queue).org_id, (_alter_queue.queue).queue_id, 2147483647);
end;
$$;

revoke all on function nightowls._alter_queue(nightowls.queues) from public;

create function nightowls.alter_queue(
  name              text,
  vt                int default null,
  max_attempts      int default null,
  dead_letter_queue text default null,
  backoff           interval default null,
  max_backoff       interval default null,
  dedup_for         interval default null,
  on_other_body     text default null,
  archive_acked     boolean default null,
  retention         interval default null,
  notify            boolean default null,
  org               uuid default null
)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_queue nightowls.queues := nightowls._queue(nightowls.current_org(alter_queue.org), alter_queue.name);
begin
  v_queue.vt := coalesce(alter_queue.vt, v_queue.vt);
  v_queue.max_attempts := nullif(coalesce(alter_queue.max_attempts, v_queue.max_attempts), 0);
  v_queue.dead_letter_queue := nightowls._queue_name(nullif(coalesce(alter_queue.dead_letter_queue, v_queue.dead_letter_queue), ''));
  v_queue.backoff := coalesce(alter_queue.backoff, v_queue.backoff);
  v_queue.max_backoff := coalesce(alter_queue.max_backoff, v_queue.max_backoff);
  v_queue.dedup_for := nullif(coalesce(alter_queue.dedup_for, v_queue.dedup_for), interval '0');
  v_queue.on_other_body := coalesce(alter_queue.on_other_body, v_queue.on_other_body);
  v_queue.archive_acked := coalesce(alter_queue.archive_acked, v_queue.archive_acked);
  v_queue.retention := coalesce(alter_queue.retention, v_queue.retention);
  v_queue.notify := coalesce(alter_queue.notify, v_queue.notify);
  perform nightowls._alter_queue(v_queue);
end;
$$;

comment on function nightowls.alter_queue(text, int, int, text, interval, interval, interval, text, boolean, interval, boolean, uuid) is
  'Changes policies of a queue: those that are given, the others stay. The arguments are those of create_queue; max_attempts 0: without '
  'limit; dead_letter_queue '''': dead letters stay in the queue; dedup_for 0: until the message is done. What is in the queue stays there. '
  'Waits for another change of the same queue. Raises NW007 if the queue or the dead letter queue does not exist, NW010 if there is no org, '
  '22023 for an argument that is not valid.';

revoke all on function nightowls.alter_queue(text, int, int, text, interval, interval, interval, text, boolean, interval, boolean, uuid)
  from public;

create function nightowls.pause_queue(queue text, org uuid default null)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_queue nightowls.queues := nightowls._queue(nightowls.current_org(pause_queue.org), pause_queue.queue);
begin
  if v_queue.paused_at is null then
    v_queue.paused_at := clock_timestamp();
    perform nightowls._alter_queue(v_queue);
  end if;
end;
$$;

comment on function nightowls.pause_queue(text, uuid) is
  'From now on read and pop find nothing in a queue; sending goes on, and what is being worked on can be settled. queue: its name; org: the '
  'tenant. Waits for another change of the same queue. Raises NW007 if the queue does not exist, NW010 if there is no org.';

revoke all on function nightowls.pause_queue(text, uuid) from public;

create function nightowls.resume_queue(queue text, org uuid default null)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_queue nightowls.queues := nightowls._queue(nightowls.current_org(resume_queue.org), resume_queue.queue);
begin
  if v_queue.paused_at is not null then
    v_queue.paused_at := null;
    perform nightowls._alter_queue(v_queue);
  end if;
end;
$$;

comment on function nightowls.resume_queue(text, uuid) is
  'Ends a queue''s pause. queue: its name; org: the tenant. Waits for another change of the same queue. Raises NW007 if the queue does not '
  'exist, NW010 if there is no org.';

revoke all on function nightowls.resume_queue(text, uuid) from public;

create function nightowls.list_queues(org uuid default null)
  returns setof nightowls.queues
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return query
    select q.* from nightowls.queues q where q.org_id = nightowls.current_org(list_queues.org) order by q.name;
end;
$$;

comment on function nightowls.list_queues(uuid) is
  'The queues of an org and their policies, by name. org: the tenant. Locks nothing. Raises NW010 if there is no org.';

revoke all on function nightowls.list_queues(uuid) from public;

-- Definer: nobody else may write to the queue's tables. dropped: the queue goes too, with all that belongs to it.
create function nightowls._purge_queue(org uuid, name text, dropped boolean)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_queue nightowls.queues := nightowls._queue(_purge_queue.org, _purge_queue.name);
  v_user  text;
  v_count bigint;
begin
  if current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
    raise exception 'a queue cannot be emptied at isolation level %', current_setting('transaction_isolation')
      using errcode = 'active_sql_transaction', detail = 'An older snapshot does not see all that is in it.',
            hint = 'Use read committed.';
  end if;
  if _purge_queue.dropped then
    if v_queue.queue_id < 0 and exists (
         select from nightowls.endpoints e where e.org_id = v_queue.org_id and e.endpoint_id = -v_queue.queue_id) then
      raise exception 'queue "%" is that of an endpoint', v_queue.name
        using errcode = 'dependent_objects_still_exist', hint = 'Drop the endpoint with nightowls.drop_endpoint().';
    end if;
    select min(q.name) into v_user
      from nightowls.queues q
     where q.org_id = _purge_queue.org and q.dead_letter_queue = v_queue.name;
    if v_user is not null then
      raise exception 'queue "%" is the dead letter queue of "%"', v_queue.name, v_user
        using errcode = 'dependent_objects_still_exist',
              hint = 'Give that queue another one with nightowls.alter_queue(), or drop it first.';
    end if;
    perform nightowls._forget_bindings(v_queue);
    delete from nightowls.queues q where q.org_id = _purge_queue.org and q.queue_id = v_queue.queue_id;
    delete from nightowls.queue_archive a where a.org_id = _purge_queue.org and a.queue_id = v_queue.queue_id;
    delete from nightowls.queue_marks k where k.org_id = _purge_queue.org and k.queue_id = v_queue.queue_id;
    delete from nightowls.queue_due_marks k where k.org_id = _purge_queue.org and k.queue_id = v_queue.queue_id;
  end if;

  -- Whoever is sending to a group has seen its head, which goes now.
  perform nightowls._lock_all_groups(_purge_queue.org, v_queue.queue_id);
  with gone as (
    delete from nightowls.queue_messages m
     where m.org_id = _purge_queue.org and m.queue_id = v_queue.queue_id
    returning m.state, m.dedup_key, m.msg_id, m.source
  ), forgotten as (
    delete from nightowls.queue_dedup d
     using gone g
     where g.dedup_key is not null and d.org_id = _purge_queue.org
       and d.queue_id = coalesce((g.source #>> '{origin,queue_id}')::int, v_queue.queue_id)
       and d.dedup_key = g.dedup_key
       and d.msg_id = coalesce((g.source #>> '{origin,msg_id}')::bigint, g.msg_id)
       and d.expires_at is null
  )
  select count(*) filter (where g.state <> 's') into v_count from gone g;
  if _purge_queue.dropped then
    delete from nightowls.queue_dedup d where d.org_id = _purge_queue.org and d.queue_id = v_queue.queue_id;
  end if;
  return v_count;
end;
$$;

revoke all on function nightowls._purge_queue(uuid, text, boolean) from public;

create function nightowls.purge_queue(queue text, org uuid default null)
  returns bigint
  language sql
  volatile
  parallel unsafe
  return nightowls._purge_queue(nightowls.current_org(purge_queue.org), purge_queue.queue, false);

comment on function nightowls.purge_queue(text, uuid) is
  'Deletes every message of a queue, whoever has it, dead letters too, and returns how many; the archive stays. queue: its name; org: the '
  'tenant. Waits for open sends to groups of the queue, and for who has messages locked. Raises NW007 if the queue does not exist, 25001 above '
  'read committed, NW010 if there is no org.';

revoke all on function nightowls.purge_queue(text, uuid) from public;

create function nightowls.drop_queue(name text, org uuid default null)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform nightowls._purge_queue(nightowls.current_org(drop_queue.org), drop_queue.name, true);
end;
$$;

comment on function nightowls.drop_queue(text, uuid) is
  'Drops a queue with its messages, its archive and its dedup keys; dead letters in another queue stay there. name: the queue; org: the tenant. '
  'A message that is being sent meanwhile is lost with it. Waits as purge_queue does. Raises NW007 if the queue does not exist, 2BP01 if it is '
  'the dead letter queue of another or that of an endpoint, 25001 above read committed, NW010 if there is no org.';

revoke all on function nightowls.drop_queue(text, uuid) from public;

-- A dead letter goes back to work, in the queue it died in.
create function nightowls._revive(message nightowls.queue_messages)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_to    int := coalesce(((_revive.message).source ->> 'queue_id')::int, (_revive.message).queue_id);
  v_group text := coalesce((_revive.message).source ->> 'group_key', (_revive.message).group_key);
  v_id    bigint := coalesce(((_revive.message).source ->> 'msg_id')::bigint, (_revive.message).msg_id);
begin
  if not exists (select from nightowls.queues q where q.org_id = (_revive.message).org_id and q.queue_id = v_to) then
    return false;
  end if;
  if v_group is not null then
    perform nightowls._lock_group((_revive.message).org_id, v_to, v_group, true);
  end if;
  perform nightowls._use_priority((_revive.message).org_id, v_to, (_revive.message).priority);
  perform nightowls._hold_line((_revive.message).org_id, nightowls._last_line());
  update nightowls.queue_messages m
     set queue_id = v_to, msg_id = v_id, group_key = v_group, state = case when v_group is null then 'r' else 'w' end::"char",
         line_no = n.line_no, due_at = clock_timestamp(), lease_until = null, receipt = null, read_ct = 0,
         source = nullif(m.source -> 'source', 'null')
    from (select nextval('nightowls.queue_line_no') as line_no offset 0) n
   where m.org_id = (_revive.message).org_id and m.queue_id = (_revive.message).queue_id and m.msg_id = (_revive.message).msg_id;
  if v_group is not null then
    perform nightowls._go_on((_revive.message).org_id, v_to, v_group);
  else
    perform nightowls._announce((_revive.message).org_id, v_to, 1);
  end if;
  return true;
end;
$$;

revoke all on function nightowls._revive(nightowls.queue_messages) from public;

-- Definer: nobody else may write to the queue's tables.
create function nightowls._redrive(org uuid, name text, qty int)
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
  v_queue nightowls.queues := nightowls._queue(_redrive.org, _redrive.name);
  v_row   nightowls.queue_messages;
  v_count bigint := 0;
begin
  if _redrive.qty < 0 then
    raise exception 'qty must be 0 or more' using errcode = 'invalid_parameter_value';
  end if;
  -- Its own dead letters, those of it that lie in another queue, and those of others that lie in it.
  for v_row in
    select m.*
      from nightowls.queue_messages m
     where m.ctid = any (array(
             select d.ctid
               from nightowls.queue_messages d
              where d.org_id = _redrive.org and d.queue_id = v_queue.queue_id and d.state in ('d', 's', 'x')
                and d.due_at = 'infinity' and d.state = 'x') || array(
             select d.ctid
               from nightowls.queue_messages d
              where d.org_id = _redrive.org and d.source -> 'msg_id' is not null and d.state in ('r', 'd', 'x')
                and (d.queue_id = v_queue.queue_id
                     or d.queue_id = (select q.queue_id from nightowls.queues q
                                       where q.org_id = _redrive.org and q.name = v_queue.dead_letter_queue)
                        and (d.source ->> 'queue_id')::int = v_queue.queue_id)))
       and (m.lease_until is null or m.lease_until <= clock_timestamp())
       and m.state in ('r', 'd', 'x')
     order by m.msg_id
     limit _redrive.qty
       for update skip locked
  loop
    if nightowls._revive(v_row) then
      v_count := v_count + 1;
    end if;
  end loop;
  return v_count;
end;
$$;

revoke all on function nightowls._redrive(uuid, text, int) from public;

create function nightowls.redrive(queue text, qty int default null, org uuid default null)
  returns bigint
  language sql
  volatile
  parallel unsafe
  return nightowls._redrive(nightowls.current_org(redrive.org), redrive.queue, redrive.qty);

comment on function nightowls.redrive(text, int, uuid) is
  'Sends dead letters back to work and returns how many: those of a queue, whether they lie in it or in its dead letter queue; of a dead letter '
  'queue, each to where it came from. They keep id, headers and last error, and are counted from 0 again; one of a group waits behind '
  'those of the group that are there. One that somebody has leased stays. queue: its name; qty: at most so many, the oldest first, by default '
  'all; org: the tenant. Waits for open sends to the same group. Raises NW007 if the queue does not exist, NW010 if there is no org, 22023 if '
  'qty is negative.';

revoke all on function nightowls.redrive(text, int, uuid) from public;

-- Definer: nobody else may write to the queue's tables.
create function nightowls._purge_archive(org uuid, name text, older_than interval)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_queue nightowls.queues := nightowls._queue(_purge_archive.org, _purge_archive.name);
  v_count bigint;
begin
  if _purge_archive.older_than < interval '0' then
    raise exception 'older_than must be 0 or more' using errcode = 'invalid_parameter_value';
  end if;
  delete from nightowls.queue_archive a
   where a.org_id = _purge_archive.org and a.queue_id = v_queue.queue_id
     and a.archived_at <= clock_timestamp() - coalesce(_purge_archive.older_than, v_queue.retention);
  get diagnostics v_count = row_count;
  return v_count;
end;
$$;

revoke all on function nightowls._purge_archive(uuid, text, interval) from public;

create function nightowls.purge_archive(queue text, older_than interval default null, org uuid default null)
  returns bigint
  language sql
  volatile
  parallel unsafe
  return nightowls._purge_archive(nightowls.current_org(purge_archive.org), purge_archive.queue, purge_archive.older_than);

comment on function nightowls.purge_archive(text, interval, uuid) is
  'Deletes archived messages that were archived longer ago than older_than, by default the queue''s retention, and returns how many. Messages '
  'that are not done are never touched. queue: its name; org: the tenant. Raises NW007 if the queue does not exist, NW010 if there is no org, '
  '22023 if older_than is negative.';

revoke all on function nightowls.purge_archive(text, interval, uuid) from public;

alter table nightowls.queues enable row level security;
alter table nightowls.queues force row level security;
create policy service_all on nightowls.queues
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));

alter table nightowls.queue_messages enable row level security;
alter table nightowls.queue_messages force row level security;
create policy service_all on nightowls.queue_messages
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));

alter table nightowls.queue_marks enable row level security;
alter table nightowls.queue_marks force row level security;
create policy service_all on nightowls.queue_marks
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));

alter table nightowls.queue_due_marks enable row level security;
alter table nightowls.queue_due_marks force row level security;
create policy service_all on nightowls.queue_due_marks
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));

alter table nightowls.queue_dedup enable row level security;
alter table nightowls.queue_dedup force row level security;
create policy service_all on nightowls.queue_dedup
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));

alter table nightowls.queue_archive enable row level security;
alter table nightowls.queue_archive force row level security;
create policy service_all on nightowls.queue_archive
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));
