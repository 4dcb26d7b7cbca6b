-- Sending to a queue: one message or a batch, with dedup keys, groups, delays and priorities.

-- Says what is wrong with what is to be sent, if anything is.
create function nightowls._check_send(
  messages   jsonb[],
  delay      int,
  headers    jsonb[],
  dedup_keys text[],
  dedup_for  interval,
  group_keys text[],
  priority   int
)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_count int := cardinality(_check_send.messages);
begin
  if _check_send.messages is null then
    raise exception 'messages must not be null' using errcode = 'null_value_not_allowed';
  elsif _check_send.delay is null or _check_send.priority is null then
    raise exception 'delay and priority must not be null' using errcode = 'null_value_not_allowed';
  elsif _check_send.delay < 0 then
    raise exception 'delay must be 0 or more' using errcode = 'invalid_parameter_value';
  elsif _check_send.priority not between 0 and 9 then
    raise exception 'priority must be 0 to 9' using errcode = 'invalid_parameter_value';
  elsif cardinality(_check_send.headers) <> v_count or cardinality(_check_send.dedup_keys) <> v_count
     or cardinality(_check_send.group_keys) <> v_count then
    raise exception 'headers, dedup_keys and group_keys must have one element for each of % messages', v_count
      using errcode = 'invalid_parameter_value';
  elsif '' = any (_check_send.dedup_keys) or '' = any (_check_send.group_keys) then
    raise exception 'a dedup_key or group_key must not be empty'
      using errcode = 'invalid_parameter_value', hint = 'Leave it out for none.';
  elsif exists (select from unnest(_check_send.dedup_keys || _check_send.group_keys) as k (key) where octet_length(k.key) > 255) then
    raise exception 'a dedup_key or group_key is too long'
      using errcode = 'program_limit_exceeded', detail = 'It has at most 255 bytes.';
  elsif _check_send.dedup_for <= interval '0' then
    raise exception 'dedup_for must be more than 0' using errcode = 'invalid_parameter_value';
  end if;
  perform nightowls._check_message(u.message, u.headers) from unnest(_check_send.messages, _check_send.headers) as u (message, headers);
end;
$$;

revoke all on function nightowls._check_send(jsonb[], int, jsonb[], text[], interval, text[], int) from public;

-- Refuses a message or headers that cannot be sent; else true.
create function nightowls._check_message(message jsonb, headers jsonb)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if _check_message.message is null then
    raise exception 'a message must not be null'
      using errcode = 'null_value_not_allowed', hint = 'A JSON null is ''null''::jsonb.';
  elsif jsonb_typeof(_check_message.headers) <> 'object' then
    raise exception 'headers must be a JSON object' using errcode = 'invalid_parameter_value';
  elsif nightowls._is_too_large(_check_message.message) or nightowls._is_too_large(_check_message.headers) then
    raise exception 'message or headers are too large'
      using errcode = 'program_limit_exceeded', detail = 'At most 16777216 bytes are kept.',
            hint = 'Store the large part elsewhere and send a reference to it.';
  elsif nightowls._is_too_deep(_check_message.message) or nightowls._is_too_deep(_check_message.headers) then
    raise exception 'message or headers are nested too deeply'
      using errcode = 'program_limit_exceeded', detail = 'At most 100 levels of objects and arrays are kept.';
  end if;
  return true;
end;
$$;

revoke all on function nightowls._check_message(jsonb, jsonb) from public;

-- The ids of messages that were sent before under these keys; null for each that was not, and for those without a key. A known
-- key with another message is refused or reported. It writes nothing.
create function nightowls._known_keys(queue nightowls.queues, messages jsonb[], dedup_keys text[])
  returns bigint[]
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_sort to off
  set enable_bitmapscan to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
declare
  v_ids bigint[];
  v_key text;
  v_id  bigint;
begin
  select array_agg(k.msg_id order by u.nth), min(u.dedup_key) filter (where k.body <> sha256(convert_to(u.message::text, 'UTF8')))
    into v_ids, v_key
    from unnest(_known_keys.messages, _known_keys.dedup_keys) with ordinality as u (message, dedup_key, nth)
    left join lateral (
           select d.msg_id, d.body
             from nightowls.queue_dedup d
            where d.org_id = (_known_keys.queue).org_id and d.queue_id = (_known_keys.queue).queue_id
              and d.dedup_key = u.dedup_key
              and (d.expires_at is null or d.expires_at > clock_timestamp())
           offset 0) k on true;
  if v_key is not null then
    select d.msg_id into v_id
      from nightowls.queue_dedup d
     where d.org_id = (_known_keys.queue).org_id and d.queue_id = (_known_keys.queue).queue_id and d.dedup_key = v_key;
    perform nightowls._differs(_known_keys.queue, v_key, v_id);
  end if;
  return v_ids;
end;
$$;

revoke all on function nightowls._known_keys(nightowls.queues, jsonb[], text[]) from public;

-- A key that is known came with another message.
create function nightowls._differs(queue nightowls.queues, dedup_key text, msg_id bigint)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if (_differs.queue).on_other_body = 'report' then
    raise warning 'dedup key "%" is known with another message', _differs.dedup_key
      using errcode = 'NW002', detail = format('It is that of message %s; this one was not sent.', _differs.msg_id);
    return;
  end if;
  raise exception 'dedup key "%" is known with another message', _differs.dedup_key
    using errcode = 'NW002', detail = format('It is that of message %s.', _differs.msg_id),
          hint = 'One key names one message; use a new one for a new message.';
end;
$$;

revoke all on function nightowls._differs(nightowls.queues, text, bigint) from public;

-- The next message of a group goes to its head, if there is none. The group is locked.
create function nightowls._advance_group(org uuid, queue_id int, group_key text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_sort to off
  set enable_bitmapscan to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
declare
  v_next bigint;
begin
  -- Asked for by range and in the order of keys, which only the groups' own indexes have: by the primary key it would be a walk
  -- over the queue, and without statistics that looks as cheap.
  loop
    exit when (
      select true
        from nightowls.queue_messages m
       where m.org_id = _advance_group.org and m.queue_id = _advance_group.queue_id
         and m.group_key >= _advance_group.group_key and m.group_key <= _advance_group.group_key and m.state in ('r', 'd')
       order by m.group_key
       limit 1);
    select m.msg_id into v_next
      from nightowls.queue_messages m
     where m.org_id = _advance_group.org and m.queue_id = _advance_group.queue_id
       and m.group_key >= _advance_group.group_key and m.group_key <= _advance_group.group_key and m.state = 'w'
     order by m.group_key, m.msg_id
     limit 1;
    exit when not found;
    perform nightowls._hold_line(_advance_group.org, nightowls._last_line());
    update nightowls.queue_messages m
       set state = case when m.due_at > n.now then 'd' else 'r' end::"char", line_no = n.line_no,
           due_at = case when m.due_at > n.now then m.due_at else n.now end
      from (select s.line_no, clock_timestamp() as now
              from (select nextval('nightowls.queue_line_no') as line_no offset 0) s
            offset 0) n
     where m.org_id = _advance_group.org and m.queue_id = _advance_group.queue_id and m.msg_id = v_next
       -- As text, so that nobody thinks of the index of those that wait, where the id stands behind the group.
       and m.state::text = 'w';
    if found then
      perform nightowls._announce(_advance_group.org, _advance_group.queue_id, 1);
      exit;
    end if;
    -- Somebody has deleted it meanwhile: look for the next.
  end loop;
end;
$$;

revoke all on function nightowls._advance_group(uuid, int, text) from public;

-- Leaves word that a group is to go on, for the next reader: where its lock could not be had, or the snapshot is too old to
-- see who else is in it.
create function nightowls._leave_word(org uuid, queue_id int, group_key text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform nightowls._hold_line(_leave_word.org, nightowls._last_line());
  insert into nightowls.queue_messages (org_id, queue_id, state, msg_id, line_no, due_at, group_key, message)
  select _leave_word.org, _leave_word.queue_id, 's', n.line_no, n.line_no, clock_timestamp(), _leave_word.group_key, 'null'
    from (select nextval('nightowls.queue_line_no') as line_no offset 0) n;
  perform nightowls._announce(_leave_word.org, _leave_word.queue_id, 1);
end;
$$;

revoke all on function nightowls._leave_word(uuid, int, text) from public;

-- Everything a send can be. Groups are locked in the order of their keys, then numbers are drawn, then dedup keys are claimed in
-- theirs: so no two calls wait for each other in a circle.
-- Definer: nobody else may write to the queue's tables.
create function nightowls._send_batch(
  org        uuid,
  name       text,
  messages   jsonb[],
  delay      int,
  headers    jsonb[],
  dedup_keys text[],
  dedup_for  interval,
  group_keys text[],
  priority   int
)
  returns bigint[]
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
  v_queue  nightowls.queues;
  v_groups text[];
  v_group  text;
  v_ids    bigint[];
  v_known  bigint[];
  v_key    record;
  v_id     bigint;
  v_same   boolean;
begin
  -- What is most usual in one statement, as in _send().
  if (row (_send_batch.dedup_keys, _send_batch.group_keys, _send_batch.dedup_for) is null
      and _send_batch.priority = 0 and _send_batch.delay >= 0
      and (_send_batch.headers is null or cardinality(_send_batch.headers) = cardinality(_send_batch.messages))) is true then
    with sent as (
      insert into nightowls.queue_messages (org_id, queue_id, state, msg_id, line_no, due_at, headers, message)
      select n.org_id, n.queue_id, n.state, n.line_no, n.line_no, n.due_at, n.headers, n.message
        from (select o.org_id, o.queue_id, o.state, clock_timestamp() + o.pause as due_at,
                     nextval('nightowls.queue_line_no') as line_no, u.message, u.headers
                from (select q.org_id, q.queue_id, make_interval(secs => _send_batch.delay) as pause,
                             case when _send_batch.delay > 0 then 'd' else 'r' end::"char" as state
                        from (select q.org_id, q.queue_id, q.name, q.notify, nightowls._last_line() as last
                                from nightowls.queues q
                               where q.org_id = _send_batch.org and q.name = nightowls._queue_name(_send_batch.name)
                              offset 0) q
                       where nightowls._hold_line(q.org_id, q.last)
                         and nightowls._wake('queue/' || q.queue_id, cardinality(_send_batch.messages))
                         and (not q.notify or nightowls._notify_queue(q.org_id, q.name))
                      offset 0) o
               cross join unnest(_send_batch.messages, _send_batch.headers) as u (message, headers)
               -- What is small cannot be too deep: a level takes 8 bytes.
               where (pg_column_size(u.message) < 800 and u.headers is null) is true
                  or nightowls._check_message(u.message, u.headers)
              offset 0) n
      returning msg_id
    )
    select array_agg(s.msg_id) into v_ids from sent s;
    if v_ids is not null then
      return v_ids;
    end if;
  end if;
  perform nightowls._check_send(_send_batch.messages, _send_batch.delay, _send_batch.headers, _send_batch.dedup_keys,
                                _send_batch.dedup_for, _send_batch.group_keys, _send_batch.priority);
  v_queue := nightowls._queue(_send_batch.org, _send_batch.name);
  if _send_batch.messages = '{}' then
    return '{}';
  end if;

  if array_remove(_send_batch.dedup_keys, null) <> '{}' then
    v_known := nightowls._known_keys(v_queue, _send_batch.messages, _send_batch.dedup_keys);
    if array_position(v_known, null) is null then
      return v_known;
    end if;
  end if;
  if _send_batch.priority > 0 then
    perform nightowls._use_priority(_send_batch.org, v_queue.queue_id, _send_batch.priority);
  end if;

  v_groups := array(
    select distinct u.group_key
      from unnest(_send_batch.group_keys, v_known) as u (group_key, known)
     where u.group_key is not null and u.known is null
     order by u.group_key);
  if cardinality(v_groups) > 24 then
    perform nightowls._lock_all_groups(_send_batch.org, v_queue.queue_id);
  else
    foreach v_group in array v_groups loop
      perform nightowls._lock_group(_send_batch.org, v_queue.queue_id, v_group, true);
    end loop;
  end if;

  -- Numbers of a group are drawn under its lock, so that their order is that of the commits.
  perform nightowls._hold_line(_send_batch.org, nightowls._last_line());
  v_ids := array(
    select case when u.known is null then nextval('nightowls.queue_line_no') end
      from unnest(_send_batch.messages, v_known) as u (message, known));
  for v_key in
    select u.dedup_key, sha256(convert_to(u.message::text, 'UTF8')) as body, u.nth
      from unnest(_send_batch.messages, _send_batch.dedup_keys, v_known) with ordinality as u (message, dedup_key, known, nth)
     where u.dedup_key is not null and u.known is null
     order by u.dedup_key collate "C", u.nth
  loop
    loop
      insert into nightowls.queue_dedup as d (org_id, queue_id, dedup_key, msg_id, body, expires_at)
      values (_send_batch.org, v_queue.queue_id, v_key.dedup_key, v_ids[v_key.nth], v_key.body,
              clock_timestamp() + coalesce(_send_batch.dedup_for, v_queue.dedup_for))
      on conflict (org_id, queue_id, dedup_key) do update
            set msg_id = excluded.msg_id, body = excluded.body, expires_at = excluded.expires_at
          where d.expires_at <= clock_timestamp();
      exit when found;
      -- Somebody else was first, or the batch has this key twice.
      select d.msg_id, d.body = v_key.body into v_id, v_same
        from nightowls.queue_dedup d
       where d.org_id = _send_batch.org and d.queue_id = v_queue.queue_id and d.dedup_key = v_key.dedup_key;
      if found then
        if not v_same then
          perform nightowls._differs(v_queue, v_key.dedup_key, v_id);
        end if;
        v_known[v_key.nth] := v_id;
        v_ids[v_key.nth] := null;
        exit;
      end if;
    end loop;
  end loop;

  insert into nightowls.queue_messages
         (org_id, queue_id, priority, state, msg_id, line_no, due_at, group_key, dedup_key, headers, message)
  select _send_batch.org, v_queue.queue_id, _send_batch.priority,
         case when u.group_key is not null then 'w' when _send_batch.delay > 0 then 'd' else 'r' end::"char",
         u.msg_id, u.msg_id, clock_timestamp() + make_interval(secs => _send_batch.delay), u.group_key, u.dedup_key,
         u.headers, u.message
    from unnest(v_ids, _send_batch.messages, _send_batch.headers, _send_batch.dedup_keys, _send_batch.group_keys)
           as u (msg_id, message, headers, dedup_key, group_key)
   where u.msg_id is not null;
  perform nightowls._announce(_send_batch.org, v_queue.queue_id, (
            select count(*) from unnest(v_ids, _send_batch.group_keys) as u (msg_id, group_key)
             where u.msg_id is not null and u.group_key is null)::int);
  foreach v_group in array v_groups loop
    if current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
      -- The snapshot is too old to see who else is in the group.
      perform nightowls._leave_word(_send_batch.org, v_queue.queue_id, v_group);
    else
      perform nightowls._advance_group(_send_batch.org, v_queue.queue_id, v_group);
    end if;
  end loop;
  return array(select coalesce(u.msg_id, u.known) from unnest(v_ids, v_known) as u (msg_id, known));
end;
$$;

revoke all on function nightowls._send_batch(uuid, text, jsonb[], int, jsonb[], text[], interval, text[], int) from public;

-- One message; the usual case in one statement, which finds the org and the queue, takes the hold and draws the number, in this
-- order.
-- Definer: nobody else may write to the queue's tables.
create function nightowls._send(
  org       uuid,
  name      text,
  message   jsonb,
  delay     int,
  headers   jsonb,
  dedup_key text,
  dedup_for interval,
  group_key text,
  priority  int
)
  returns bigint
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
  v_id bigint;
begin
  -- What is small cannot be too deep: a level takes 8 bytes. In an array nothing is compressed.
  if (pg_column_size(array[_send.message]) < 800 and _send.message is not null and _send.delay = 0 and _send.priority = 0
      and row (_send.headers, _send.dedup_key, _send.dedup_for, _send.group_key) is null) is not true then
    return (nightowls._send_batch(
      coalesce(_send.org, nightowls._resolve_org()), _send.name, array[_send.message], _send.delay,
      case when _send.headers is not null then array[_send.headers] end,
      case when _send.dedup_key is not null then array[_send.dedup_key] end, _send.dedup_for,
      case when _send.group_key is not null then array[_send.group_key] end, _send.priority))[1];
  end if;
  insert into nightowls.queue_messages (org_id, queue_id, msg_id, line_no, message)
  select n.org_id, n.queue_id, n.line_no, n.line_no, _send.message
    from (select o.org_id, o.queue_id, nextval('nightowls.queue_line_no') as line_no
            from (select q.org_id, q.queue_id, nightowls._last_line() as last
                    from nightowls.queues q
                   where q.org_id = coalesce(_send.org, (
                           select (s.value #>> '{}')::uuid from nightowls.settings s where s.name = 'default_org'))
                     and q.name = nightowls._queue_name(_send.name) and not q.notify
                  offset 0) o
           where nightowls._hold_line(o.org_id, o.last)
             and nightowls._wake('queue/' || o.queue_id, 1)
          offset 0) n
  returning msg_id into v_id;
  if v_id is null then
    -- The queue notifies, or there is none.
    return (nightowls._send_batch(
      coalesce(_send.org, nightowls._resolve_org()), _send.name, array[_send.message], 0, null, null, null, null, 0))[1];
  end if;
  return v_id;
end;
$$;

revoke all on function nightowls._send(uuid, text, jsonb, int, jsonb, text, interval, text, int) from public;

-- An expression, so that it is inlined and costs no call of its own.
create function nightowls.send(
  queue     text,
  message   jsonb,
  delay     int default 0,
  headers   jsonb default null,
  dedup_key text default null,
  dedup_for interval default null,
  group_key text default null,
  priority  int default 0,
  org       uuid default null
)
  returns bigint
  language sql
  volatile
  parallel unsafe
  return nightowls._send(
    nightowls._caller_org(send.org), send.queue, send.message, send.delay, send.headers, send.dedup_key, send.dedup_for,
    send.group_key, send.priority);

comment on function nightowls.send(text, jsonb, int, jsonb, text, interval, text, int, uuid) is
  'Sends one message and returns its id. queue: its name; message: any JSON; delay: seconds until it can be read; headers: a JSON '
  'object about it; dedup_key: a key that is sent once: again with the same message it writes nothing and returns the first id; '
  'dedup_for: how long the key counts, infinity for ever, by default the queue''s dedup_for, else until the message is done; '
  'group_key: messages of one group are delivered in the order of commits, one at a time; priority: 0 to 9, 9 is read first (not within '
  'a group); org: the tenant. It is sent when the caller''s transaction commits. Waits for an open send with the same dedup key or to the '
  'same group, for nothing else. Raises NW007 if the queue does not exist, NW002 if the key is known with another message, NW010 if '
  'there is no org, 22004 or 22023 for an argument that is null or not valid, 54000 for one that is too long, too large or too deep.';

revoke all on function nightowls.send(text, jsonb, int, jsonb, text, interval, text, int, uuid) from public;

create function nightowls.send_batch(
  queue      text,
  messages   jsonb[],
  delay      int default 0,
  headers    jsonb[] default null,
  dedup_keys text[] default null,
  dedup_for  interval default null,
  group_keys text[] default null,
  priority   int default 0,
  org        uuid default null
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
      from unnest(nightowls._send_batch(
             nightowls.current_org(send_batch.org), send_batch.queue, send_batch.messages, send_batch.delay, send_batch.headers,
             send_batch.dedup_keys, send_batch.dedup_for, send_batch.group_keys, send_batch.priority)) as u (msg_id);
end;
$$;

comment on function nightowls.send_batch(text, jsonb[], int, jsonb[], text[], interval, text[], int, uuid) is
  'Sends several messages, all or none, and returns their ids in the same order. queue: its name; messages: any JSON each; headers, '
  'dedup_keys, group_keys: one element for each message, null for none, or left out; delay, dedup_for, priority and org as in send. An '
  'empty array sends nothing. Two batches with the same keys or groups in another order wait for each other, never in a circle. '
  'Raises NW007 if the queue does not exist, NW002 if a key is known with another message, NW010 if there is no org, 22004 or 22023 '
  'for an argument that is null or not valid, 54000 for one that is too long, too large or too deep.';

revoke all on function nightowls.send_batch(text, jsonb[], int, jsonb[], text[], interval, text[], int, uuid) from public;
