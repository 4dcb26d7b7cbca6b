-- Settling what was read: ack, nack, extend, delete, archive, set_vt, dead letters and their return.

-- One message that is done, or is to go. receipt null: whoever has it. archived: whether it is kept in the archive. Returns whether
-- it was there, and the caller's.
create function nightowls._finish(queue nightowls.queues, msg_id bigint, receipt uuid, fenced boolean, archived boolean)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_bitmapscan to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
declare
  v_message nightowls.queue_messages;
begin
  delete from nightowls.queue_messages m
   where m.org_id = (_finish.queue).org_id and m.queue_id = (_finish.queue).queue_id and m.msg_id = _finish.msg_id
     and m.state <> 's'
     and (not _finish.fenced or m.receipt = _finish.receipt and m.lease_until > clock_timestamp())
  returning m.* into v_message;
  if not found then
    return false;
  end if;
  if _finish.archived then
    perform nightowls._archive(v_message);
  end if;
  if v_message.dedup_key is not null then
    delete from nightowls.queue_dedup d
     where d.org_id = v_message.org_id
       and d.queue_id = coalesce((v_message.source #>> '{origin,queue_id}')::int, v_message.queue_id)
       and d.dedup_key = v_message.dedup_key
       and d.msg_id = coalesce((v_message.source #>> '{origin,msg_id}')::bigint, v_message.msg_id)
       and d.expires_at is null;
  end if;
  if v_message.group_key is not null and v_message.state in ('r', 'd') then
    perform nightowls._go_on(v_message.org_id, v_message.queue_id, v_message.group_key);
  end if;
  return true;
end;
$$;

revoke all on function nightowls._finish(nightowls.queues, bigint, uuid, boolean, boolean) from public;

create function nightowls._archive(message nightowls.queue_messages)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  insert into nightowls.queue_archive
         (org_id, queue_id, msg_id, priority, read_ct, enqueued_at, last_read_at, group_key, dedup_key, last_error, source, headers,
          message)
  select m.org_id, m.queue_id, m.msg_id, m.priority, m.read_ct, m.enqueued_at, m.last_read_at, m.group_key, m.dedup_key, m.last_error,
         m.source, m.headers, m.message
    from (select (_archive.message).*) m;
end;
$$;

revoke all on function nightowls._archive(nightowls.queue_messages) from public;

create function nightowls._check_settle(msg_id bigint, receipt uuid)
  returns void
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if _check_settle.msg_id is null or _check_settle.receipt is null then
    raise exception 'msg_id and receipt must not be null'
      using errcode = 'null_value_not_allowed', hint = 'Both come with the message when it is read.';
  end if;
end;
$$;

revoke all on function nightowls._check_settle(bigint, uuid) from public;

-- Acks one message; the usual case in one statement.
-- Definer: nobody else may write to the queue's tables.
create function nightowls._ack(org uuid, name text, msg_id bigint, receipt uuid)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set plan_cache_mode to force_generic_plan
as $$
#variable_conflict use_column
declare
  v_queue nightowls.queues;
begin
  delete from nightowls.queue_messages m
   using (select q.org_id, q.queue_id
            from nightowls.queues q
           where q.org_id = coalesce(_ack.org, (
                   select (s.value #>> '{}')::uuid from nightowls.settings s where s.name = 'default_org'))
             and q.name = nightowls._queue_name(_ack.name) and not q.archive_acked
          offset 0) q
   where m.org_id = q.org_id and m.queue_id = q.queue_id and m.msg_id = _ack.msg_id
     and m.receipt = _ack.receipt and m.lease_until > clock_timestamp() and m.group_key is null and m.dedup_key is null;
  if found then
    return true;
  end if;
  _ack.org := coalesce(_ack.org, nightowls._resolve_org());
  perform nightowls._check_settle(_ack.msg_id, _ack.receipt);
  v_queue := nightowls._queue(_ack.org, _ack.name);
  return nightowls._finish(v_queue, _ack.msg_id, _ack.receipt, true, v_queue.archive_acked);
end;
$$;

revoke all on function nightowls._ack(uuid, text, bigint, uuid) from public;

-- The org of an ack that a floor guards, which is locked against the next grant.
create function nightowls._guard_ack(org uuid, container text, fence bigint)
  returns uuid
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  _guard_ack.org := nightowls.current_org(_guard_ack.org);
  perform nightowls._assert_fence(_guard_ack.org, _guard_ack.container, _guard_ack.fence);
  return _guard_ack.org;
end;
$$;

revoke all on function nightowls._guard_ack(uuid, text, bigint) from public;

-- Without a fence the planner leaves nothing of the case.
create function nightowls.ack(
  queue     text,
  msg_id    bigint,
  receipt   uuid,
  container text default null,
  fence     bigint default null,
  org       uuid default null
)
  returns boolean
  language sql
  volatile
  parallel unsafe
  return nightowls._ack(
    case when ack.container is null and ack.fence is null then nightowls._caller_org(ack.org)
         else nightowls._guard_ack(ack.org, ack.container, ack.fence) end,
    ack.queue, ack.msg_id, ack.receipt);

comment on function nightowls.ack(text, bigint, uuid, text, bigint, uuid) is
  'Says that a message is done: it is deleted, or archived if the queue was made so. Returns true; false, and changes nothing, when the '
  'lease has run out, or somebody else has the message, or it is gone. queue, msg_id, receipt: as it was read; container and fence: only while '
  'this floor is held with this fence; org: the tenant. In the '
  'caller''s transaction: effects and ack commit together. Waits for nobody but who has the same message locked, and with a fence for a grant '
  'of the floor that is under way. Raises NW003 if the fence is too old, whatever became of the message, NW007 if the queue '
  'does not exist, NW010 if there is no org, 22004 for an argument that is null, or of container and fence only one.';

revoke all on function nightowls.ack(text, bigint, uuid, text, bigint, uuid) from public;

create function nightowls.ack_message(message_id text, org uuid default null)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org  uuid := nightowls.current_org(ack_message.org);
  v_name text;
begin
  if ack_message.message_id is null then
    raise exception 'message_id must not be null' using errcode = 'null_value_not_allowed';
  elsif ack_message.message_id !~ '^[0-9]{1,9}[.][0-9]{1,18}[.][0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$' then
    raise exception 'message_id is not one that pop_queue returned: "%"', left(ack_message.message_id, 64)
      using errcode = 'invalid_parameter_value';
  end if;
  select q.name into v_name
    from nightowls.queues q
   where q.org_id = v_org and q.queue_id = split_part(ack_message.message_id, '.', 1)::int;
  return found and nightowls._ack(
    v_org, v_name, split_part(ack_message.message_id, '.', 2)::bigint, split_part(ack_message.message_id, '.', 3)::uuid);
end;
$$;

comment on function nightowls.ack_message(text, uuid) is
  'As ack, of a message that pop_queue returned. message_id: its id; org: the tenant. Returns false, and changes nothing, when the lease '
  'has run out, or somebody else has the message, or it is gone with its queue. Raises NW010 if there is no org, 22004 or 22023 if '
  'message_id is null or none of pop_queue''s.';

revoke all on function nightowls.ack_message(text, uuid) from public;

-- Definer: nobody else may write to the queue's tables. fenced: the receipts must be given and good.
create function nightowls._finish_one(org uuid, name text, msg_id bigint, receipt uuid, fenced boolean, archived boolean)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if _finish_one.msg_id is null then
    raise exception 'msg_id must not be null' using errcode = 'null_value_not_allowed';
  end if;
  return nightowls._finish(nightowls._queue(_finish_one.org, _finish_one.name), _finish_one.msg_id, _finish_one.receipt,
                           _finish_one.fenced, _finish_one.archived);
end;
$$;

revoke all on function nightowls._finish_one(uuid, text, bigint, uuid, boolean, boolean) from public;

-- Many at once: what is neither grouped nor keyed in one statement, the rest one by one. archived null: as the queue's acks are. Org and
-- queue come with each id, so that no plan can begin with the queue.
-- Definer: nobody else may write to the queue's tables.
create function nightowls._finish_many(
  org      uuid,
  name     text,
  msg_ids  bigint[],
  receipts uuid[],
  fenced   boolean,
  archived boolean
)
  returns bigint[]
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_bitmapscan to off
  set enable_hashjoin to off
  set enable_mergejoin to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
declare
  v_queue nightowls.queues;
  v_done  bigint[];
  v_row   record;
begin
  if _finish_many.msg_ids is null or _finish_many.fenced and _finish_many.receipts is null then
    raise exception '% must not be null', case when _finish_many.msg_ids is null then 'msg_ids' else 'receipts' end
      using errcode = 'null_value_not_allowed';
  elsif cardinality(_finish_many.receipts) <> cardinality(_finish_many.msg_ids) then
    raise exception 'receipts must have one element for each of % msg_ids', cardinality(_finish_many.msg_ids)
      using errcode = 'invalid_parameter_value';
  end if;
  v_queue := nightowls._queue(_finish_many.org, _finish_many.name);
  if coalesce(_finish_many.archived, v_queue.archive_acked) then
    with gone as (
      delete from nightowls.queue_messages m
       using (select _finish_many.org as org_id, v_queue.queue_id, u.msg_id, u.receipt
                from unnest(_finish_many.msg_ids, _finish_many.receipts) as u (msg_id, receipt)
               order by u.msg_id
              offset 0) u
       where m.org_id = u.org_id and m.queue_id = u.queue_id and m.msg_id = u.msg_id
         and m.state <> 's' and m.group_key is null and m.dedup_key is null
         and (not _finish_many.fenced or m.receipt = u.receipt and m.lease_until > clock_timestamp())
      returning m.*
    ), kept as (
      insert into nightowls.queue_archive
             (org_id, queue_id, msg_id, priority, read_ct, enqueued_at, last_read_at, group_key, dedup_key, last_error, source,
              headers, message)
      select g.org_id, g.queue_id, g.msg_id, g.priority, g.read_ct, g.enqueued_at, g.last_read_at, g.group_key, g.dedup_key,
             g.last_error, g.source, g.headers, g.message
        from gone g
    )
    select coalesce(array_agg(g.msg_id), '{}') into v_done from gone g;
  else
    with gone as (
      delete from nightowls.queue_messages m
       using (select _finish_many.org as org_id, v_queue.queue_id, u.msg_id, u.receipt
                from unnest(_finish_many.msg_ids, _finish_many.receipts) as u (msg_id, receipt)
               order by u.msg_id
              offset 0) u
       where m.org_id = u.org_id and m.queue_id = u.queue_id and m.msg_id = u.msg_id
         and m.state <> 's' and m.group_key is null and m.dedup_key is null
         and (not _finish_many.fenced or m.receipt = u.receipt and m.lease_until > clock_timestamp())
      returning m.msg_id
    )
    select coalesce(array_agg(g.msg_id), '{}') into v_done from gone g;
  end if;
  if cardinality(v_done) < cardinality(_finish_many.msg_ids) then
    for v_row in
      select u.msg_id, u.receipt
        from unnest(_finish_many.msg_ids, _finish_many.receipts) as u (msg_id, receipt)
       where exists (
               select from nightowls.queue_messages m
                where m.org_id = _finish_many.org and m.queue_id = v_queue.queue_id and m.msg_id = u.msg_id
                  and (m.group_key is not null or m.dedup_key is not null)
               offset 0)
       order by u.msg_id
    loop
      if nightowls._finish(v_queue, v_row.msg_id, v_row.receipt, _finish_many.fenced,
                           coalesce(_finish_many.archived, v_queue.archive_acked)) then
        v_done := v_done || v_row.msg_id;
      end if;
    end loop;
  end if;
  return v_done;
end;
$$;

revoke all on function nightowls._finish_many(uuid, text, bigint[], uuid[], boolean, boolean) from public;

create function nightowls.ack_many(
  queue     text,
  msg_ids   bigint[],
  receipts  uuid[],
  container text default null,
  fence     bigint default null,
  org       uuid default null
)
  returns setof bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return query
    select u.msg_id
      from unnest(nightowls._finish_many(
             case when ack_many.container is null and ack_many.fence is null then nightowls.current_org(ack_many.org)
                  else nightowls._guard_ack(ack_many.org, ack_many.container, ack_many.fence) end,
             ack_many.queue, ack_many.msg_ids, ack_many.receipts, true, null)) as u (msg_id);
end;
$$;

comment on function nightowls.ack_many(text, bigint[], uuid[], text, bigint, uuid) is
  'As ack, for several messages: returns the ids of those that were the caller''s and are done now. msg_ids, receipts: one of each for '
  'every message; queue, container, fence and org as in ack. Raises NW003 if the fence is too old, NW007 if the queue does not exist, NW010 if '
  'there is no org, 22004 or 22023 for arrays that are null or of different lengths, 22004 if of container and fence only one is given.';

revoke all on function nightowls.ack_many(text, bigint[], uuid[], text, bigint, uuid) from public;

create function nightowls.delete(queue text, msg_id bigint, receipt uuid default null, org uuid default null)
  returns boolean
  language sql
  volatile
  parallel unsafe
  return nightowls._finish_one(nightowls.current_org(delete.org), delete.queue, delete.msg_id, delete.receipt,
                               delete.receipt is not null, false);

comment on function nightowls.delete(text, bigint, uuid, uuid) is
  'Deletes a message, whoever has it; given its receipt, only if it is still the caller''s. Returns whether it was there. queue, msg_id, '
  'receipt: as it was read; org: the tenant. Raises NW007 if the queue does not exist, NW010 if there is no org, 22004 if msg_id is null.';

revoke all on function nightowls.delete(text, bigint, uuid, uuid) from public;

create function nightowls.delete_many(queue text, msg_ids bigint[], receipts uuid[] default null, org uuid default null)
  returns setof bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return query
    select u.msg_id
      from unnest(nightowls._finish_many(nightowls.current_org(delete_many.org), delete_many.queue, delete_many.msg_ids,
                                         delete_many.receipts, delete_many.receipts is not null, false)) as u (msg_id);
end;
$$;

comment on function nightowls.delete_many(text, bigint[], uuid[], uuid) is
  'As delete, for several messages: returns the ids of those that were deleted. msg_ids; receipts: one for each, or left out; queue and org '
  'as in delete. Raises NW007 if the queue does not exist, NW010 if there is no org, 22004 or 22023 for arrays that are null or of '
  'different lengths.';

revoke all on function nightowls.delete_many(text, bigint[], uuid[], uuid) from public;

create function nightowls.archive(queue text, msg_id bigint, receipt uuid default null, org uuid default null)
  returns boolean
  language sql
  volatile
  parallel unsafe
  return nightowls._finish_one(nightowls.current_org(archive.org), archive.queue, archive.msg_id, archive.receipt,
                               archive.receipt is not null, true);

comment on function nightowls.archive(text, bigint, uuid, uuid) is
  'Moves a message to queue_archive, whoever has it; given its receipt, only if it is still the caller''s. Returns whether it was there. It '
  'stays there until purge_archive. queue, msg_id, receipt: as it was read; org: the tenant. Raises NW007 if the queue does not exist, NW010 '
  'if there is no org, 22004 if msg_id is null.';

revoke all on function nightowls.archive(text, bigint, uuid, uuid) from public;

create function nightowls.archive_many(queue text, msg_ids bigint[], receipts uuid[] default null, org uuid default null)
  returns setof bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return query
    select u.msg_id
      from unnest(nightowls._finish_many(nightowls.current_org(archive_many.org), archive_many.queue, archive_many.msg_ids,
                                         archive_many.receipts, archive_many.receipts is not null, true)) as u (msg_id);
end;
$$;

comment on function nightowls.archive_many(text, bigint[], uuid[], uuid) is
  'As archive, for several messages: returns the ids of those that were archived. msg_ids; receipts: one for each, or left out; queue and '
  'org as in archive. Raises NW007 if the queue does not exist, NW010 if there is no org, 22004 or 22023 for arrays that are null or of '
  'different lengths.';

revoke all on function nightowls.archive_many(text, bigint[], uuid[], uuid) from public;

-- Definer: nobody else may write to the queue's tables.
create function nightowls._nack(org uuid, name text, msg_id bigint, receipt uuid, error text, delay int)
  returns boolean
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
  v_queue   nightowls.queues;
  v_message record;
  v_pause   interval := make_interval(secs => _nack.delay);
begin
  perform nightowls._check_settle(_nack.msg_id, _nack.receipt);
  if _nack.delay < 0 then
    raise exception 'delay must be 0 or more' using errcode = 'invalid_parameter_value';
  end if;
  v_queue := nightowls._queue(_nack.org, _nack.name);
  select m.state, m.read_ct into v_message
    from nightowls.queue_messages m
   where m.org_id = _nack.org and m.queue_id = v_queue.queue_id and m.msg_id = _nack.msg_id
     and m.receipt = _nack.receipt and m.lease_until > clock_timestamp()
     for update;
  if not found then
    return false;
  elsif v_message.read_ct >= v_queue.max_attempts then
    perform nightowls._bury(v_queue, _nack.msg_id, _nack.error);
    return true;
  end if;

  v_pause := coalesce(v_pause, least(v_queue.backoff * power(2, least(v_message.read_ct, 32) - 1), v_queue.max_backoff)
                               * (0.5 + random() / 2));
  if v_message.state = 'r' and v_pause <= interval '0' then
    -- It has kept its place in line.
    update nightowls.queue_messages m
       set lease_until = null, receipt = null, last_error = coalesce(_nack.error, m.last_error)
     where m.org_id = _nack.org and m.queue_id = v_queue.queue_id and m.msg_id = _nack.msg_id;
    perform nightowls._announce(_nack.org, v_queue.queue_id, 1);
    return true;
  end if;
  perform nightowls._hold_line(_nack.org, nightowls._last_line());
  update nightowls.queue_messages m
     set state = case when v_pause > interval '0' then 'd' else 'r' end::"char", line_no = n.line_no,
         due_at = clock_timestamp() + v_pause, lease_until = null, receipt = null, last_error = coalesce(_nack.error, m.last_error)
    from (select nextval('nightowls.queue_line_no') as line_no offset 0) n
   where m.org_id = _nack.org and m.queue_id = v_queue.queue_id and m.msg_id = _nack.msg_id;
  perform nightowls._announce(_nack.org, v_queue.queue_id, 1);
  return true;
end;
$$;

revoke all on function nightowls._nack(uuid, text, bigint, uuid, text, int) from public;

create function nightowls.nack(
  queue   text,
  msg_id  bigint,
  receipt uuid,
  error   text default null,
  delay   int default null,
  org     uuid default null
)
  returns boolean
  language sql
  volatile
  parallel unsafe
  return nightowls._nack(nightowls.current_org(nack.org), nack.queue, nack.msg_id, nack.receipt, nack.error, nack.delay);

comment on function nightowls.nack(text, bigint, uuid, text, int, uuid) is
  'Gives a message back: it is delivered again after a pause, or becomes a dead letter if it was delivered max_attempts times. Returns true; '
  'false, and changes nothing, when the lease has run out, or somebody else has the message, or it is gone. queue, msg_id, receipt: as it was '
  'read; error: why, kept with the message; delay: the pause in seconds, 0 at once and at its old place, by default the queue''s backoff, '
  'doubled with each delivery, half of it random; org: the tenant. Raises NW007 if the queue does not exist, NW010 if there is no org, '
  '22004 or 22023 for an argument that is null or negative.';

revoke all on function nightowls.nack(text, bigint, uuid, text, int, uuid) from public;

create function nightowls.nack_many(
  queue    text,
  msg_ids  bigint[],
  receipts uuid[],
  error    text default null,
  delay    int default null,
  org      uuid default null
)
  returns setof bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org uuid := nightowls.current_org(nack_many.org);
begin
  perform nightowls._check_many(nack_many.msg_ids, nack_many.receipts);
  perform nightowls._queue(v_org, nack_many.queue);
  return query
    select u.msg_id
      from (select x.* from unnest(nack_many.msg_ids, nack_many.receipts) as x (msg_id, receipt) order by x.msg_id) u
     where nightowls._nack(v_org, nack_many.queue, u.msg_id, u.receipt, nack_many.error, nack_many.delay);
end;
$$;

comment on function nightowls.nack_many(text, bigint[], uuid[], text, int, uuid) is
  'As nack, for several messages: returns the ids of those that were the caller''s. msg_ids, receipts: one of each for every message; '
  'queue, error, delay and org as in nack. Raises NW007 if the queue does not exist, NW010 if there is no org, 22004 or 22023 for arrays '
  'that are null or of different lengths, or a negative delay.';

revoke all on function nightowls.nack_many(text, bigint[], uuid[], text, int, uuid) from public;

create function nightowls._check_many(msg_ids bigint[], receipts uuid[])
  returns void
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if _check_many.msg_ids is null or _check_many.receipts is null then
    raise exception 'msg_ids and receipts must not be null' using errcode = 'null_value_not_allowed';
  elsif cardinality(_check_many.receipts) <> cardinality(_check_many.msg_ids) then
    raise exception 'receipts must have one element for each of % msg_ids', cardinality(_check_many.msg_ids)
      using errcode = 'invalid_parameter_value';
  end if;
end;
$$;

revoke all on function nightowls._check_many(bigint[], uuid[]) from public;

-- Definer: nobody else may write to the queue's tables.
create function nightowls._extend_many(org uuid, name text, msg_ids bigint[], receipts uuid[], vt int)
  returns bigint[]
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_bitmapscan to off
  set enable_hashjoin to off
  set enable_mergejoin to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
declare
  v_queue nightowls.queues;
  v_done  bigint[];
begin
  if _extend_many.vt < 0 then
    raise exception 'vt must be 0 or more' using errcode = 'invalid_parameter_value';
  end if;
  v_queue := nightowls._queue(_extend_many.org, _extend_many.name);
  -- In the delayed line it is due when the lease runs out.
  with extended as (
    update nightowls.queue_messages m
       set lease_until = n.lease_until,
           due_at = case when m.state = 'd' then n.lease_until else m.due_at end
      from (select _extend_many.org as org_id, v_queue.queue_id, u.msg_id, u.receipt,
                   clock_timestamp() + make_interval(secs => coalesce(_extend_many.vt, v_queue.vt)) as lease_until
              from unnest(_extend_many.msg_ids, _extend_many.receipts) as u (msg_id, receipt)
             order by u.msg_id
            offset 0) n
     where m.org_id = n.org_id and m.queue_id = n.queue_id and m.msg_id = n.msg_id
       and m.receipt = n.receipt and m.lease_until > clock_timestamp()
    returning m.msg_id
  )
  select coalesce(array_agg(e.msg_id), '{}') into v_done from extended e;
  return v_done;
end;
$$;

revoke all on function nightowls._extend_many(uuid, text, bigint[], uuid[], int) from public;

create function nightowls.extend(queue text, msg_id bigint, receipt uuid, vt int default null, org uuid default null)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform nightowls._check_settle(extend.msg_id, extend.receipt);
  return nightowls._extend_many(nightowls.current_org(extend.org), extend.queue, array[extend.msg_id], array[extend.receipt], extend.vt)
         <> '{}';
end;
$$;

comment on function nightowls.extend(text, bigint, uuid, int, uuid) is
  'Keeps a message for the caller for another vt seconds from now, by default the queue''s. Returns true; false, and changes nothing, when the '
  'lease has run out, or somebody else has the message, or it is gone. queue, msg_id, receipt: as it was read; org: the tenant. Raises NW007 if '
  'the queue does not exist, NW010 if there is no org, 22004 or 22023 for an argument that is null or negative.';

revoke all on function nightowls.extend(text, bigint, uuid, int, uuid) from public;

create function nightowls.extend_many(
  queue    text,
  msg_ids  bigint[],
  receipts uuid[],
  vt       int default null,
  org      uuid default null
)
  returns setof bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform nightowls._check_many(extend_many.msg_ids, extend_many.receipts);
  return query
    select u.msg_id
      from unnest(nightowls._extend_many(nightowls.current_org(extend_many.org), extend_many.queue, extend_many.msg_ids,
                                         extend_many.receipts, extend_many.vt)) as u (msg_id);
end;
$$;

comment on function nightowls.extend_many(text, bigint[], uuid[], int, uuid) is
  'As extend, for several messages: returns the ids of those that are still the caller''s. msg_ids, receipts: one of each for every message; '
  'queue, vt and org as in extend. Raises NW007 if the queue does not exist, NW010 if there is no org, 22004 or 22023 for arrays that are null '
  'or of different lengths, or a negative vt.';

revoke all on function nightowls.extend_many(text, bigint[], uuid[], int, uuid) from public;

-- Definer: nobody else may write to the queue's tables.
create function nightowls._set_vt(org uuid, name text, msg_id bigint, vt int)
  returns setof nightowls.queue_message
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
  v_queue   nightowls.queues;
  v_message record;
  v_leased  boolean;
begin
  if _set_vt.msg_id is null or _set_vt.vt is null then
    raise exception 'msg_id and vt must not be null' using errcode = 'null_value_not_allowed';
  elsif _set_vt.vt < 0 then
    raise exception 'vt must be 0 or more' using errcode = 'invalid_parameter_value';
  end if;
  v_queue := nightowls._queue(_set_vt.org, _set_vt.name);
  select m.state, m.lease_until > clock_timestamp() as leased into v_message
    from nightowls.queue_messages m
   where m.org_id = _set_vt.org and m.queue_id = v_queue.queue_id and m.msg_id = _set_vt.msg_id
     and m.state in ('r', 'd', 'w')
     for update;
  if not found then
    return;
  end if;
  v_leased := v_message.leased is true and _set_vt.vt > 0;
  if v_message.state = 'w' or v_message.state = 'r' and (v_leased or _set_vt.vt = 0) then
    -- It keeps its place.
    update nightowls.queue_messages m
       set due_at = case when m.state = 'w' then n.at else m.due_at end,
           lease_until = case when v_leased then n.at end, receipt = case when v_leased then m.receipt end
      from (select clock_timestamp() + make_interval(secs => _set_vt.vt) as at) n
     where m.org_id = _set_vt.org and m.queue_id = v_queue.queue_id and m.msg_id = _set_vt.msg_id;
  else
    perform nightowls._hold_line(_set_vt.org, nightowls._last_line());
    update nightowls.queue_messages m
       set state = case when _set_vt.vt > 0 then 'd' else 'r' end::"char", line_no = n.line_no, due_at = n.at,
           lease_until = case when v_leased then n.at end, receipt = case when v_leased then m.receipt end
      from (select l.line_no, clock_timestamp() + make_interval(secs => _set_vt.vt) as at
              from (select nextval('nightowls.queue_line_no') as line_no offset 0) l
            offset 0) n
     where m.org_id = _set_vt.org and m.queue_id = v_queue.queue_id and m.msg_id = _set_vt.msg_id;
  end if;
  perform nightowls._announce(_set_vt.org, v_queue.queue_id, 1);
  return query
    select m.msg_id, m.read_ct, m.enqueued_at, m.last_read_at, coalesce(m.lease_until, m.due_at), m.message, m.headers, m.receipt
      from nightowls.queue_messages m
     where m.org_id = _set_vt.org and m.queue_id = v_queue.queue_id and m.msg_id = _set_vt.msg_id;
end;
$$;

revoke all on function nightowls._set_vt(uuid, text, bigint, int) from public;

create function nightowls.set_vt(queue text, msg_id bigint, vt int, org uuid default null)
  returns setof nightowls.queue_message
  language plpgsql
  volatile
  parallel unsafe
  rows 1
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return query
    select r.* from nightowls._set_vt(nightowls.current_org(set_vt.org), set_vt.queue, set_vt.msg_id, set_vt.vt) r;
end;
$$;

comment on function nightowls.set_vt(text, bigint, int, uuid) is
  'Sets when a message can be read again: vt seconds from now, 0 at once. Whoever has it keeps it until then; with 0 it is taken away. Returns '
  'the message; no row if there is none. A worker that wants to keep its own message uses extend, which is fenced. queue, msg_id: the message; '
  'org: the tenant. Raises NW007 if the queue does not exist, NW010 if there is no org, 22004 or 22023 for an argument that is null or negative.';

revoke all on function nightowls.set_vt(text, bigint, int, uuid) from public;
