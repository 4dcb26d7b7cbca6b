-- Reading a queue: claims, what is due, dead letters.

-- Makes a dead letter of a message, which this transaction has locked.
create function nightowls._bury(queue nightowls.queues, msg_id bigint, error text)
  returns void
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
  v_to      nightowls.queues;
  v_id      bigint;
begin
  select m.* into v_message
    from nightowls.queue_messages m
   where m.org_id = (_bury.queue).org_id and m.queue_id = (_bury.queue).queue_id and m.msg_id = _bury.msg_id
     and m.state in ('r', 'd');
  if not found then
    return;
  end if;
  if (_bury.queue).dead_letter_queue is null then
    update nightowls.queue_messages m
       set state = 'x', due_at = 'infinity', lease_until = null, receipt = null,
           last_error = coalesce(_bury.error, m.last_error)
     where m.org_id = v_message.org_id and m.queue_id = v_message.queue_id and m.msg_id = v_message.msg_id;
  else
    v_to := nightowls._queue((_bury.queue).org_id, (_bury.queue).dead_letter_queue);
    perform nightowls._use_priority(v_to.org_id, v_to.queue_id, v_message.priority);
    perform nightowls._hold_line(v_to.org_id, nightowls._last_line());
    v_id := nextval('nightowls.queue_line_no');
    update nightowls.queue_messages m
       set queue_id = v_to.queue_id, state = 'r', line_no = v_id, due_at = clock_timestamp(), lease_until = null, receipt = null,
           -- Ids are unique, but for those that were taken over from elsewhere.
           msg_id = case when exists (
                           select from nightowls.queue_messages o
                            where o.org_id = v_to.org_id and o.queue_id = v_to.queue_id and o.msg_id = v_message.msg_id)
                         then v_id else m.msg_id end,
           group_key = null, read_ct = 0, last_error = coalesce(_bury.error, m.last_error),
           source = jsonb_build_object(
             'queue_id', m.queue_id, 'msg_id', m.msg_id, 'group_key', m.group_key, 'read_ct', m.read_ct, 'source', m.source,
             'origin', coalesce(m.source -> 'origin', jsonb_build_object('queue_id', m.queue_id, 'msg_id', m.msg_id)))
     where m.org_id = v_message.org_id and m.queue_id = v_message.queue_id and m.msg_id = v_message.msg_id;
    perform nightowls._announce(v_to.org_id, v_to.queue_id, 1);
  end if;
  if v_message.group_key is not null then
    perform nightowls._go_on(v_message.org_id, v_message.queue_id, v_message.group_key);
  end if;
end;
$$;

revoke all on function nightowls._bury(nightowls.queues, bigint, text) from public;

-- A group's head has gone: the next one follows now, or when a reader finds the word left for it.
create function nightowls._go_on(org uuid, queue_id int, group_key text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if current_setting('transaction_isolation') not in ('repeatable read', 'serializable')
     and nightowls._lock_group(_go_on.org, _go_on.queue_id, _go_on.group_key, false) then
    perform nightowls._advance_group(_go_on.org, _go_on.queue_id, _go_on.group_key);
  else
    perform nightowls._leave_word(_go_on.org, _go_on.queue_id, _go_on.group_key);
  end if;
end;
$$;

revoke all on function nightowls._go_on(uuid, int, text) from public;

-- What is due goes from the delayed line into the ready line, at most 100 at a time. Returns whether there was anything.
create function nightowls._promote(org uuid, name text)
  returns boolean
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
  v_queue nightowls.queues := nightowls._queue(_promote.org, _promote.name);
  v_mark  timestamptz;
  v_tids  tid[];
  v_ids   bigint[];
  v_row   record;
begin
  if random() < 0.125 then
    perform nightowls._move_due_mark(_promote.org, v_queue.queue_id);
  end if;
  v_mark := coalesce((
    select k.mark
      from nightowls.queue_due_marks k
     where k.org_id = _promote.org and k.queue_id = v_queue.queue_id
     order by k.mark desc
     limit 1), '-infinity');
  -- Most join the line; what is left over is looked at one by one.
  select array_agg(x.tid) filter (where x.joins), array_agg(x.msg_id order by x.msg_id) filter (where not x.joins)
    into v_tids, v_ids
    from (select m.ctid as tid, m.msg_id, m.state = 'd' and (m.read_ct >= v_queue.max_attempts) is not true as joins
            from nightowls.queue_messages m
           where m.org_id = _promote.org and m.queue_id = v_queue.queue_id
             and m.state in ('d', 's', 'x') and m.due_at >= v_mark and m.due_at <= clock_timestamp()
           order by m.due_at
           limit 100
             for update skip locked) x;
  if v_tids is null and v_ids is null then
    return false;
  end if;
  perform nightowls._hold_line(_promote.org, nightowls._last_line());
  update nightowls.queue_messages m
     set state = 'r', line_no = n.line_no, lease_until = null, receipt = null
    from (select t.tid, nextval('nightowls.queue_line_no') as line_no from unnest(v_tids) as t (tid) offset 0) n
   where m.ctid = n.tid;
  perform nightowls._announce(_promote.org, v_queue.queue_id, cardinality(v_tids));
  if v_ids is not null then
    for v_row in
      select u.msg_id, m.state, m.group_key
        from unnest(v_ids) as u (msg_id)
       cross join lateral (
               select o.state, o.group_key
                 from nightowls.queue_messages o
                where o.org_id = _promote.org and o.queue_id = v_queue.queue_id and o.msg_id = u.msg_id
               offset 0) m
       where m.state in ('d', 's')
    loop
      if v_row.state = 'd' then
        perform nightowls._bury(v_queue, v_row.msg_id, 'the lease ran out');
      elsif current_setting('transaction_isolation') not in ('repeatable read', 'serializable')
            and nightowls._lock_group(_promote.org, v_queue.queue_id, v_row.group_key, false) then
        delete from nightowls.queue_messages m
         where m.org_id = _promote.org and m.queue_id = v_queue.queue_id and m.msg_id = v_row.msg_id;
        perform nightowls._advance_group(_promote.org, v_queue.queue_id, v_row.group_key);
      else
        -- Somebody is sending to the group, and may be for long: look again later.
        update nightowls.queue_messages m
           set due_at = clock_timestamp() + interval '100 milliseconds', line_no = nextval('nightowls.queue_line_no')
         where m.org_id = _promote.org and m.queue_id = v_queue.queue_id and m.msg_id = v_row.msg_id;
      end if;
    end loop;
  end if;
  return true;
end;
$$;

revoke all on function nightowls._promote(uuid, text) from public;

-- The places of the messages to be read next in a queue with priorities, the highest first.
create function nightowls._claim_by_priority(org uuid, queue_id int, qty int)
  returns tid[]
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
  v_now timestamptz := clock_timestamp();
begin
  return (
    select array_agg(c.tid)
      from (select m.tid
              from (select p.priority, k.mark
                      from unnest('{9,8,7,6,5,4,3,2,1,0}'::smallint[]) as p (priority)
                     cross join lateral (
                             select max(x.mark) as mark
                               from (select o.mark
                                       from nightowls.queue_marks o
                                      where o.org_id = _claim_by_priority.org
                                        and o.queue_id = _claim_by_priority.queue_id and o.priority = p.priority
                                      order by o.mark desc
                                      limit 1) x) k
                    offset 0) l
             cross join lateral (
                     select o.ctid as tid
                       from nightowls.queue_messages o
                      where o.org_id = _claim_by_priority.org and o.queue_id = _claim_by_priority.queue_id
                        and o.state = 'r' and o.priority = l.priority and o.line_no >= coalesce(l.mark, 0)
                        and (o.lease_until is null or o.lease_until <= v_now)
                        and (l.priority = 0 or l.mark is not null)
                      order by o.line_no
                      limit _claim_by_priority.qty
                        for update skip locked) m
             limit _claim_by_priority.qty) c);
end;
$$;

revoke all on function nightowls._claim_by_priority(uuid, int, int) from public;

create function nightowls._check_read(vt int, qty int)
  returns void
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if _check_read.qty is null then
    raise exception 'qty must not be null' using errcode = 'null_value_not_allowed';
  elsif _check_read.qty < 0 then
    raise exception 'qty must be 0 or more' using errcode = 'invalid_parameter_value';
  elsif _check_read.vt < 0 then
    raise exception 'vt must be 0 or more' using errcode = 'invalid_parameter_value';
  end if;
end;
$$;

revoke all on function nightowls._check_read(int, int) from public;

-- Makes dead letters of what a claim has found that was delivered too often already. Returns whether there was any.
create function nightowls._bury_claimed(org uuid, name text, tids tid[])
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
declare
  v_queue nightowls.queues := nightowls._queue(_bury_claimed.org, _bury_claimed.name);
  v_ids   bigint[];
  v_id    bigint;
begin
  v_ids := array(
    select m.msg_id
      from nightowls.queue_messages m
     where m.ctid = any (_bury_claimed.tids) and m.read_ct >= v_queue.max_attempts
     order by m.msg_id);
  foreach v_id in array v_ids loop
    perform nightowls._bury(v_queue, v_id, 'the lease ran out');
  end loop;
  return v_ids <> '{}';
end;
$$;

revoke all on function nightowls._bury_claimed(uuid, text, tid[]) from public;

-- What read does in a queue with priorities, or one that is paused, or when a message was delivered too often.
create function nightowls._read_slowly(org uuid, name text, lease interval, qty int)
  returns setof nightowls.queue_message
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_sort to off
  set plan_cache_mode to force_generic_plan
as $$
#variable_conflict use_column
declare
  v_now     timestamptz;
  v_receipt uuid := gen_random_uuid();
  v_queue   nightowls.queues := nightowls._queue(_read_slowly.org, _read_slowly.name);
  v_qty     int := _read_slowly.qty;
  v_tids    tid[];
begin
  if v_queue.paused_at is not null then
    return;
  end if;
  loop
    v_tids := nightowls._claim_by_priority(_read_slowly.org, v_queue.queue_id, v_qty);
    continue when nightowls._bury_claimed(_read_slowly.org, _read_slowly.name, v_tids);
    v_now := clock_timestamp();
    return query
      update nightowls.queue_messages m
         set lease_until = v_now + _read_slowly.lease, receipt = v_receipt, read_ct = m.read_ct + 1, last_read_at = v_now
        from unnest(v_tids) as t (tid)
       where m.ctid = t.tid
      returning m.msg_id, m.read_ct, m.enqueued_at, m.last_read_at, m.lease_until, m.message, m.headers, m.receipt;
    v_qty := v_qty - coalesce(cardinality(v_tids), 0);
    -- What is due joins the end of the line; where there is enough before it, now and then will do.
    exit when v_qty = 0 and random() > 0.125 or v_tids is not null and _read_slowly.lease <= interval '0';
    exit when not nightowls._promote(_read_slowly.org, _read_slowly.name) or v_qty = 0;
  end loop;
  if random() < 0.0625 then
    perform nightowls._move_marks(_read_slowly.org, v_queue.queue_id);
  end if;
end;
$$;

revoke all on function nightowls._read_slowly(uuid, text, interval, int) from public;

-- What a read does beyond the usual: it makes dead letters, fetches what is due into the line, moves the mark, looks whether the queue
-- is there, paused, or has priorities. A read that got all it wanted asks for it now and then, with qty 0.
create function nightowls._read_more(org uuid, name text, vt int, qty int)
  returns setof nightowls.queue_message
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_sort to off
  set plan_cache_mode to force_generic_plan
as $$
#variable_conflict use_column
declare
  v_now   timestamptz := clock_timestamp();
  v_claim record;
begin
  loop
    select q.org_id, q.queue_id, q.paused_at, k.priority, k.mark, c.*,
           v_now + make_interval(secs => coalesce(_read_more.vt, q.vt)) as until, gen_random_uuid() as receipt,
           (select f.line_no
              from nightowls.queue_messages f
             where f.org_id = q.org_id and f.queue_id = q.queue_id and f.state = 'r' and f.priority = 0
               and f.line_no >= coalesce(k.mark, 0)
             order by f.line_no
             limit 1) as first,
           (select true
              from nightowls.queue_messages d
             where d.org_id = q.org_id and d.queue_id = q.queue_id and d.state in ('d', 's', 'x') and d.due_at <= v_now
               and d.due_at >= coalesce((
                     select x.mark
                       from nightowls.queue_due_marks x
                      where x.org_id = q.org_id and x.queue_id = q.queue_id
                      order by x.mark desc
                      limit 1), '-infinity')
             order by d.due_at
             limit 1) as due
      into v_claim
      from nightowls.queues q
      left join lateral (
             select x.priority, x.mark
               from nightowls.queue_marks x
              where x.org_id = q.org_id and x.queue_id = q.queue_id
              order by x.priority desc, x.mark desc
              limit 1) k on true
     cross join lateral (
             select array_agg(x.tid) as tids, count(*) as found, bool_or(x.dead) as dead
               from (select m.ctid as tid, m.line_no, m.read_ct >= q.max_attempts as dead
                       from nightowls.queue_messages m
                      where m.org_id = q.org_id and m.queue_id = q.queue_id and m.state = 'r' and m.priority = 0
                        and m.line_no >= coalesce(k.mark, 0)
                        and (m.lease_until is null or m.lease_until <= v_now)
                        and q.paused_at is null and (k.priority > 0) is not true
                      order by m.line_no
                      limit _read_more.qty
                        for update skip locked) x) c
     where q.org_id = _read_more.org and q.name = nightowls._queue_name(_read_more.name);
    if v_claim.org_id is null then
      perform nightowls._refuse_queue(_read_more.org, _read_more.name);
    elsif v_claim.dead or v_claim.priority > 0 or v_claim.paused_at is not null then
      return query
        select r.* from nightowls._read_slowly(v_claim.org_id, _read_more.name, v_claim.until - v_now, _read_more.qty) r;
      return;
    end if;

    if v_claim.found > 0 then
      return query
        update nightowls.queue_messages m
           set lease_until = v_claim.until, receipt = v_claim.receipt, read_ct = m.read_ct + 1, last_read_at = v_now
          from unnest(v_claim.tids) as t (tid)
         where m.ctid = t.tid
        returning m.msg_id, m.read_ct, m.enqueued_at, m.last_read_at, m.lease_until, m.message, m.headers, m.receipt;
    end if;

    _read_more.qty := _read_more.qty - v_claim.found;
    -- What is leased for no time could be claimed once more by the next round.
    exit when v_claim.due is not true or v_claim.found > 0 and v_claim.until <= v_now
           or not nightowls._promote(v_claim.org_id, _read_more.name) or _read_more.qty = 0;
  end loop;

  if v_claim.first > coalesce(v_claim.mark, 0) + 32
     or v_claim.first is null and pg_sequence_last_value('nightowls.queue_line_no') > coalesce(v_claim.mark, 0) + 64 and random() < 0.125 then
    perform nightowls._move_mark(v_claim.org_id, v_claim.queue_id, 0);
  end if;
end;
$$;

revoke all on function nightowls._read_more(uuid, text, int, int) from public;

-- The usual case is one statement: it finds the org, the queue, its mark and the messages, and claims them by their places. It cannot be
-- planned as a walk over the queue. What was claimed by somebody else between its snapshot and its lock, it passes over.
-- Definer: nobody else may write to the queue's tables. That it may be executed is the right to read: a function of its own
-- that looks who calls would be a third of a read.
create function nightowls.read(queue text, vt int default null, qty int default 1, org uuid default null)
  returns setof nightowls.queue_message
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_sort to off
  set plan_cache_mode to force_generic_plan
as $$
#variable_conflict use_column
declare
  v_count int;
begin
  return query
    update nightowls.queue_messages m
       set lease_until = c.now + c.lease, receipt = c.receipt, read_ct = m.read_ct + 1, last_read_at = c.now
      from (select q.now, q.lease, q.receipt, x.tid
              from (select q.org_id, q.queue_id, q.max_attempts, k.mark, clock_timestamp() as now, gen_random_uuid() as receipt,
                           make_interval(secs => coalesce(read.vt, q.vt)) as lease
                      from nightowls.queues q
                      left join lateral (
                             select x.priority, x.mark
                               from nightowls.queue_marks x
                              where x.org_id = q.org_id and x.queue_id = q.queue_id
                              order by x.priority desc, x.mark desc
                              limit 1) k on true
                     where q.org_id = case
                             when current_setting('nightowls.org_id', true) <> '' or current_setting('request.jwt.claims', true) <> ''
                               then coalesce(read.org, nightowls._resolve_org())
                             else coalesce(read.org, (
                               select (s.value #>> '{}')::uuid from nightowls.settings s where s.name = 'default_org')) end
                       and q.name = nightowls._queue_name(read.queue)
                       and q.paused_at is null and (k.priority > 0) is not true and (read.qty < 0 or read.vt < 0) is not true
                    offset 0) q
             cross join lateral (
                     select o.ctid as tid
                       from nightowls.queue_messages o
                      where o.org_id = q.org_id and o.queue_id = q.queue_id and o.state = 'r' and o.priority = 0
                        and o.line_no >= coalesce(q.mark, 0)
                        and (o.lease_until is null or o.lease_until <= q.now)
                        and (o.read_ct >= q.max_attempts) is not true
                      order by o.line_no
                      limit case when read.qty > 0 then read.qty else 0 end
                        for update skip locked) x
            offset 0) c
     where m.ctid = c.tid
    returning m.msg_id, m.read_ct, m.enqueued_at, m.last_read_at, m.lease_until, m.message, m.headers, m.receipt;
  get diagnostics v_count = row_count;
  if v_count = read.qty and random() > 0.0625 then
    return;
  end if;
  perform nightowls._check_read(read.vt, read.qty);
  read.org := coalesce(read.org, nightowls._resolve_org());
  -- What is leased for no time could be claimed again at once: no message comes twice in one call.
  return query
    select r.*
      from nightowls._read_more(
             read.org, read.queue, read.vt,
             case when v_count > 0 and coalesce(read.vt, (nightowls._queue(read.org, read.queue)).vt) = 0 then 0
                  else read.qty - v_count end) r;
end;
$$;

comment on function nightowls.read(text, int, int, uuid) is
  'Delivers up to qty messages of a queue, those of the highest priority first, then in the order in which they joined the line. Each is '
  'the reader''s alone for vt seconds, by default the queue''s; settle it within that time with ack, nack or archive and its receipt (the '
  'messages of one call share one), or ask for more with extend; else it is delivered again. A message that was delivered max_attempts times '
  'becomes a dead letter instead. queue: its name; org: the tenant. Waits for nobody: what another transaction is claiming is passed over. '
  'Raises NW007 if the queue does not exist, NW010 if there is no org, 22004 or 22023 for an argument that is null or negative, 40001 above '
  'read committed when somebody else was quicker.';

revoke all on function nightowls.read(text, int, int, uuid) from public;

-- How many milliseconds a reader that has found nothing may sleep: until the first message that is put off or leased is there again, as far
-- as a short look tells, and not longer than most, as nobody says when a lease ends that was taken meanwhile.
-- Definer: the tables are closed.
create function nightowls._read_nap(org uuid, queue_id int, most interval)
  returns int
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_sort to off
  set enable_bitmapscan to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
declare
  v_now  timestamptz := clock_timestamp();
  v_next timestamptz;
begin
  v_next := least(
    (select d.due_at
       from nightowls.queue_messages d
      where d.org_id = _read_nap.org and d.queue_id = _read_nap.queue_id and d.state in ('d', 's', 'x')
        and d.due_at >= coalesce((
              select x.mark
                from nightowls.queue_due_marks x
               where x.org_id = _read_nap.org and x.queue_id = _read_nap.queue_id
               order by x.mark desc
               limit 1), '-infinity')
      order by d.due_at
      limit 1),
    (select min(l.lease_until)
       from (select m.lease_until
               from nightowls.queue_messages m
              where m.org_id = _read_nap.org and m.queue_id = _read_nap.queue_id and m.state = 'r' and m.priority = 0
                and m.line_no >= coalesce((
                      select k.mark
                        from nightowls.queue_marks k
                       where k.org_id = _read_nap.org and k.queue_id = _read_nap.queue_id and k.priority = 0
                       order by k.mark desc
                       limit 1), 0)
              order by m.line_no
              limit 20) l
      where l.lease_until > v_now),
    v_now + _read_nap.most);
  -- What is due and yet was not found has been claimed by somebody who has not committed, or waits for a lock.
  return case when v_next <= v_now then 100 else ceil(extract(epoch from v_next - v_now) * 1000)::int end;
end;
$$;

revoke all on function nightowls._read_nap(uuid, int, interval) from public;

-- One look of a waiting reader: a read that is undone if it has found nothing and is not the last. It may have locked groups, words left for them, and
-- dead letters, and its transaction is to sleep: two that sleep with what the other one needs would keep a group waiting.
create function nightowls._look(queue text, vt int, qty int, org uuid, until timestamptz)
  returns setof nightowls.queue_message
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return query
    select r.* from nightowls.read(_look.queue, _look.vt, _look.qty, _look.org) r;
  if not found and clock_timestamp() < _look.until then
    raise no_data_found;
  end if;
exception when no_data_found then
  return;
end;
$$;

revoke all on function nightowls._look(text, int, int, uuid, timestamptz) from public;

create function nightowls.read_with_poll(
  queue    text,
  vt       int default null,
  qty      int default 1,
  max_wait interval default '5 seconds',
  org      uuid default null
)
  returns setof nightowls.queue_message
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org   uuid := nightowls.current_org(read_with_poll.org);
  v_queue int := (nightowls._queue(v_org, read_with_poll.queue)).queue_id;
  v_key   text := 'queue/' || v_queue;
  v_until timestamptz := clock_timestamp() + read_with_poll.max_wait;
  v_seen  bigint := nightowls._wake_count(v_key);
  v_nth   int := 0;
  v_found bigint;
  v_watch boolean := false;
  v_again boolean := false;
  v_before bigint;
  v_nap   int;
begin
  if read_with_poll.max_wait is null then
    raise exception 'max_wait must not be null' using errcode = 'null_value_not_allowed';
  elsif read_with_poll.max_wait < interval '0' then
    raise exception 'max_wait must be 0 or more' using errcode = 'invalid_parameter_value';
  elsif read_with_poll.max_wait > interval '0' and current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
    raise exception 'nobody can wait for messages at isolation level %', current_setting('transaction_isolation')
      using errcode = 'active_sql_transaction', detail = 'Its snapshot never shows what is sent meanwhile.',
            hint = 'Use read committed, or a max_wait of 0.';
  end if;
  loop
    return query
      select r.* from nightowls._look(read_with_poll.queue, read_with_poll.vt, read_with_poll.qty, v_org, v_until) r;
    get diagnostics v_found = row_count;
    if v_watch and (v_found > 0 or clock_timestamp() >= v_until) then
      -- Another watches from now on.
      perform nightowls._wake(v_key, 1);
    end if;
    if v_found > 0 then
      -- Rolled back, what it has taken is there for the next.
      perform nightowls._wake_undone(v_key, v_found::int);
      return;
    end if;
    exit when clock_timestamp() >= v_until or read_with_poll.qty = 0;
    -- One of those who wait looks once a second, and takes what is there again; the others sleep, and where nobody has woken them
    -- they only look whether somebody still watches. It blocks nobody.
    loop
      v_watch := v_watch or pg_try_advisory_xact_lock(nightowls._lock_class(271), v_queue);
      v_nap := case when v_again and not v_watch then 20000
                    else nightowls._read_nap(v_org, v_queue, case when v_watch then interval '1 second' else interval '20 seconds' end) end;
      v_again := not v_watch and v_nap >= 20000 and nightowls._can_wake();
      v_before := v_seen;
      v_seen := nightowls._nap(
        v_key, v_seen, v_nth,
        least(v_nap, extract(epoch from least(v_until - clock_timestamp(), interval '1 minute')) * 1000 + 1)::int);
      v_nth := v_nth + 1;
      exit when not v_again or v_seen <> v_before or clock_timestamp() >= v_until;
    end loop;
    v_again := false;
  end loop;
end;
$$;

comment on function nightowls.read_with_poll(text, int, int, interval, uuid) is
  'As read, but waits up to max_wait for a message if there is none. With the library it sleeps until a message is sent, comes back or is '
  'due: a send wakes as many waiters as it sends messages, when it has committed; the end of a lease that was taken meanwhile is seen within a '
  'second by one of those who wait, and at their next call where that one has returned and its transaction goes on. Without the library, or where it cannot wake (docs/queue.md), it looks again after pauses of 5 to 50, later up to 250 milliseconds. '
  'It needs a connection and keeps its snapshot while it waits: for long waits call it again rather than wait longer. It can be '
  'cancelled. queue, vt, qty and org as in read. Raises NW007 if the queue does not exist, 25001 above read committed, NW010 if there is no org, '
  '22004 or 22023 for an argument that is null or negative.';

revoke all on function nightowls.read_with_poll(text, int, int, interval, uuid) from public;

create function nightowls._pop_slowly(org uuid, name text, qty int)
  returns setof nightowls.queue_message
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_messages nightowls.queue_message[];
begin
  v_messages := array(select r from nightowls._read_more(_pop_slowly.org, _pop_slowly.name, 60, _pop_slowly.qty) r);
  if v_messages <> '{}' then
    perform nightowls._finish_many(
      _pop_slowly.org, _pop_slowly.name, array(select m.msg_id from unnest(v_messages) m), null, false, false);
  end if;
  return query select * from unnest(v_messages);
end;
$$;

revoke all on function nightowls._pop_slowly(uuid, text, int) from public;

-- As read, but it deletes. Of what needs more than that, and of what stands behind such a message, it leaves all to _pop_slowly().
-- Definer: nobody else may write to the queue's tables; executing it is the right to it, as with read.
create function nightowls.pop(queue text, qty int default 1, org uuid default null)
  returns setof nightowls.queue_message
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_sort to off
  set plan_cache_mode to force_generic_plan
as $$
#variable_conflict use_column
declare
  v_count int;
begin
  return query
    delete from nightowls.queue_messages m
     using (select q.now, x.tid, bool_or(x.odd) over () as odd
              from (select q.org_id, q.queue_id, q.max_attempts, k.mark, clock_timestamp() as now
                      from nightowls.queues q
                      left join lateral (
                             select x.priority, x.mark
                               from nightowls.queue_marks x
                              where x.org_id = q.org_id and x.queue_id = q.queue_id
                              order by x.priority desc, x.mark desc
                              limit 1) k on true
                     where q.org_id = case
                             when current_setting('nightowls.org_id', true) <> '' or current_setting('request.jwt.claims', true) <> ''
                               then coalesce(pop.org, nightowls._resolve_org())
                             else coalesce(pop.org, (
                               select (s.value #>> '{}')::uuid from nightowls.settings s where s.name = 'default_org')) end
                       and q.name = nightowls._queue_name(pop.queue)
                       and q.paused_at is null and (k.priority > 0) is not true
                    offset 0) q
             cross join lateral (
                     select o.ctid as tid, o.group_key is not null or o.dedup_key is not null or o.read_ct >= q.max_attempts as odd
                       from nightowls.queue_messages o
                      where o.org_id = q.org_id and o.queue_id = q.queue_id and o.state = 'r' and o.priority = 0
                        and o.line_no >= coalesce(q.mark, 0)
                        and (o.lease_until is null or o.lease_until <= q.now)
                      order by o.line_no
                      limit case when pop.qty > 0 then pop.qty else 0 end
                        for update skip locked) x
            offset 0) c
     where m.ctid = c.tid and c.odd is not true
    returning m.msg_id, m.read_ct + 1, m.enqueued_at, c.now, m.due_at, m.message, m.headers, null::uuid;
  get diagnostics v_count = row_count;
  if v_count = pop.qty and random() > 0.0625 then
    return;
  end if;
  perform nightowls._check_read(0, pop.qty);
  -- Groups go on, keys are free again, and so on.
  return query
    select r.msg_id, r.read_ct, r.enqueued_at, r.last_read_at, r.vt, r.message, r.headers, null::uuid
      from nightowls._pop_slowly(coalesce(pop.org, nightowls._resolve_org()), pop.queue, pop.qty - v_count) r;
end;
$$;

comment on function nightowls.pop(text, int, uuid) is
  'Delivers up to qty messages of a queue and deletes them at once: what the caller then fails to do is lost, so use read where that '
  'matters. The rows have no receipt. queue: its name; org: the tenant. Waits for nobody. Raises NW007 if the queue does not exist, NW010 if '
  'there is no org, 22004 or 22023 if qty is null or negative.';

revoke all on function nightowls.pop(text, int, uuid) from public;

create function nightowls.pop_queue(
  queue_name         text,
  batch_size         int default 1,
  visibility_timeout int default 30,
  org                uuid default null
)
  returns table (id text, payload jsonb, read_ct int, enqueued_at timestamptz, vt timestamptz, headers jsonb)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org   uuid := nightowls.current_org(pop_queue.org);
  v_queue int := (nightowls._queue(v_org, pop_queue.queue_name)).queue_id;
begin
  return query
    select v_queue || '.' || r.msg_id || '.' || r.receipt, r.message, r.read_ct, r.enqueued_at, r.vt, r.headers
      from nightowls.read(pop_queue.queue_name, pop_queue.visibility_timeout, pop_queue.batch_size, v_org) r;
end;
$$;

comment on function nightowls.pop_queue(text, int, int, uuid) is
  'As read, in the words of a worker that calls it over PostgREST: up to batch_size messages, each the caller''s for visibility_timeout '
  'seconds. id: give it to ack_message when the work is done; payload: the message. queue_name: the queue; org: the tenant. Raises NW007 if '
  'the queue does not exist, NW010 if there is no org, 22004 or 22023 for an argument that is null or negative.';

revoke all on function nightowls.pop_queue(text, int, int, uuid) from public;
