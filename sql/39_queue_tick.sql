-- What the clock does for queues: what is due, what has expired.

-- One queue's turn, bounded. Nobody is waited for: what somebody else is at is left to them. what: due (messages that were found due,
-- leases that have run out in the delayed line, groups that are to go on), marks, keys (dedup keys), archived.
-- Definer: nobody else may write to the queue's tables.
create function nightowls._tick_queue(org uuid, name text)
  returns table (what text, qty bigint)
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
  v_queue nightowls.queues;
  v_found bigint;
begin
  select q.* into v_queue from nightowls.queues q where q.org_id = _tick_queue.org and q.name = _tick_queue.name;
  if not found then
    return;
  end if;

  what := 'due';
  qty := 0;
  for v_round in 1 .. 10 loop
    select count(*) into v_found
      from (select m.ctid
              from nightowls.queue_messages m
             where m.org_id = v_queue.org_id and m.queue_id = v_queue.queue_id and m.state in ('d', 's', 'x')
               and m.due_at <= clock_timestamp()
               and m.due_at >= coalesce((
                     select x.mark
                       from nightowls.queue_due_marks x
                      where x.org_id = v_queue.org_id and x.queue_id = v_queue.queue_id
                      order by x.mark desc
                      limit 1), '-infinity')
             order by m.due_at
             limit 100) d;
    exit when v_found = 0 or not nightowls._promote(v_queue.org_id, v_queue.name);
    qty := qty + v_found;
  end loop;
  if qty > 0 then
    return next;
  end if;

  -- Below the greatest mark that is seen nobody looks any more. A row for a priority stays: it says that it is in use.
  what := 'marks';
  delete from nightowls.queue_marks k
   where k.ctid = any (array(
           select o.ctid
             from nightowls.queue_marks o
            where o.org_id = v_queue.org_id and o.queue_id = v_queue.queue_id
              and exists (
                    select from nightowls.queue_marks n
                     where n.org_id = o.org_id and n.queue_id = o.queue_id and n.priority = o.priority and n.mark > o.mark)
            limit 1000
              for update skip locked));
  get diagnostics qty = row_count;
  delete from nightowls.queue_due_marks k
   where k.ctid = any (array(
           select o.ctid
             from nightowls.queue_due_marks o
            where o.org_id = v_queue.org_id and o.queue_id = v_queue.queue_id
              and exists (
                    select from nightowls.queue_due_marks n
                     where n.org_id = o.org_id and n.queue_id = o.queue_id and n.mark > o.mark)
            limit 1000
              for update skip locked));
  get diagnostics v_found = row_count;
  qty := qty + v_found;
  if qty > 0 then
    return next;
  end if;

  what := 'keys';
  delete from nightowls.queue_dedup d
   where d.ctid = any (array(
           select o.ctid
             from nightowls.queue_dedup o
            where o.org_id = v_queue.org_id and o.queue_id = v_queue.queue_id and o.expires_at <= clock_timestamp()
            order by o.expires_at
            limit 1000
              for update skip locked));
  get diagnostics qty = row_count;
  if qty > 0 then
    return next;
  end if;

  what := 'archived';
  delete from nightowls.queue_archive a
   where a.ctid = any (array(
           select o.ctid
             from nightowls.queue_archive o
            where o.org_id = v_queue.org_id and o.queue_id = v_queue.queue_id
              and o.archived_at <= clock_timestamp() - v_queue.retention
            order by o.archived_at
            limit 1000
              for update skip locked));
  get diagnostics qty = row_count;
  if qty > 0 then
    return next;
  end if;
end;
$$;

revoke all on function nightowls._tick_queue(uuid, text) from public;

-- What belongs to an org and no queue: keys of once that have expired, and what was sent to a queue while it was dropped.
-- Definer: as _tick_queue.
create function nightowls._tick_org_queues(org uuid)
  returns table (what text, qty bigint)
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
  v_gone int[];
begin
  what := 'once';
  qty := nightowls._prune_once(_tick_org_queues.org, 1000);
  if qty > 0 then
    return next;
  end if;

  what := 'dropped';
  with recursive u (queue_id) as (
    (select m.queue_id from nightowls.queue_messages m where m.org_id = _tick_org_queues.org order by m.queue_id limit 1)
    union all
    select (select m.queue_id
              from nightowls.queue_messages m
             where m.org_id = _tick_org_queues.org and m.queue_id > u.queue_id
             order by m.queue_id
             limit 1)
      from u
     where u.queue_id is not null
  )
  select array_agg(u.queue_id) into v_gone
    from u
   where u.queue_id is not null
     and not exists (select from nightowls.queues q where q.org_id = _tick_org_queues.org and q.queue_id = u.queue_id);
  if v_gone is not null then
    delete from nightowls.queue_dedup d where d.org_id = _tick_org_queues.org and d.queue_id = any (v_gone);
    delete from nightowls.queue_marks k where k.org_id = _tick_org_queues.org and k.queue_id = any (v_gone);
    delete from nightowls.queue_due_marks k where k.org_id = _tick_org_queues.org and k.queue_id = any (v_gone);
    delete from nightowls.queue_messages m
     where m.ctid = any (array(
             select o.ctid
               from nightowls.queue_messages o
              where o.org_id = _tick_org_queues.org and o.queue_id = any (v_gone)
              limit 1000
                for update skip locked));
    get diagnostics qty = row_count;
    if qty > 0 then
      return next;
    end if;
  end if;
end;
$$;

revoke all on function nightowls._tick_org_queues(uuid) from public;

-- The sweep of tick: every queue of every org in turn, the org that has waited longest first, until max_ms are over; the next call goes on
-- from there. What a queue has more than a turn takes comes in the next round. Returns what was done. Nothing while another call runs.
create function nightowls._tick_queues(max_ms int)
  returns table (org_id uuid, queue text, what text, qty bigint)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_until timestamptz := clock_timestamp() + _tick_queues.max_ms * interval '1 millisecond';
  v_org   record;
  v_name  text;
  v_done  record;
  v_more  boolean;
  v_first boolean := true;
begin
  perform nightowls._check_sweep(1, _tick_queues.max_ms);
  if not nightowls._begin_sweep('queues') then
    return;
  end if;
  loop
    v_more := false;
    for v_org in
      select o.org_id, coalesce(w.after_id, '') as after_id
        from nightowls.orgs o
        left join nightowls._sweeps w on w.org_id = o.org_id and w.sweep = 'queues' and w.name = ''
       where exists (select from nightowls.queues q where q.org_id = o.org_id)
          or exists (select from nightowls.once_keys k where k.org_id = o.org_id)
       order by w.swept_at nulls first, o.org_id
    loop
      _tick_queues.org_id := v_org.org_id;
      for v_name in
        select q.name from nightowls.queues q where q.org_id = v_org.org_id and q.name > v_org.after_id order by q.name
      loop
        _tick_queues.queue := v_name;
        for v_done in select t.what, t.qty from nightowls._tick_queue(v_org.org_id, v_name) t loop
          _tick_queues.what := v_done.what;
          _tick_queues.qty := v_done.qty;
          v_more := v_more or v_done.qty >= 1000;
          return next;
        end loop;
        -- Groups are locks, and the lock table is the whole server's.
        if clock_timestamp() > v_until
           or (select count(*) from pg_locks l where l.locktype = 'advisory' and l.pid = pg_backend_pid()) > 40 then
          perform nightowls._end_turn(v_org.org_id, 'queues', '', v_name);
          return;
        end if;
      end loop;
      _tick_queues.queue := null;
      for v_done in select t.what, t.qty from nightowls._tick_org_queues(v_org.org_id) t loop
        _tick_queues.what := v_done.what;
        _tick_queues.qty := v_done.qty;
        v_more := v_more or v_done.qty >= 1000;
        return next;
      end loop;
      if v_first or v_org.after_id <> '' then
        perform nightowls._end_turn(v_org.org_id, 'queues', '', '');
      end if;
      -- Those of its queues that come before the one where it began are still to have their turn.
      v_more := v_more or v_org.after_id <> '';
      if clock_timestamp() > v_until then
        return;
      end if;
    end loop;
    exit when not v_more;
    v_first := false;
  end loop;
end;
$$;

revoke all on function nightowls._tick_queues(int) from public;
