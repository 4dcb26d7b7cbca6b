-- Seeing whether all is well: what the log, its consumers and the queues say of themselves, for the view health.

-- Guards of our tables that somebody has switched off, and who holds up reading and cleaning up.
create function nightowls._health_log()
  returns setof nightowls._check
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_found text;
begin
  select string_agg(format('%s of %s', t.tgname, t.tgrelid::regclass), ', ' order by t.tgrelid::regclass::text, t.tgname) into v_found
    from pg_trigger t
    join pg_class c on c.oid = t.tgrelid
   where c.relnamespace = 'nightowls'::regnamespace and not t.tgisinternal and t.tgenabled not in ('O', 'A');
  return query
    select 'log', 'guards', v_found is null, coalesce('switched off: ' || v_found, 'all triggers are on'),
           case when v_found is not null
                then 'The log can be changed, and projections and queues miss events. Switch them on: alter table … enable trigger all.' end;

  select string_agg(c.oid::regclass::text, ', ' order by c.oid::regclass::text) into v_found
    from pg_class c
   where c.relnamespace = 'nightowls'::regnamespace and c.relkind in ('r', 'p') and not (c.relrowsecurity and c.relforcerowsecurity);
  return query
    select 'log', 'row_security', v_found is null, coalesce('not forced on: ' || v_found, 'enabled and forced on all tables'),
           case when v_found is not null then 'Tenants are not kept apart. alter table … enable row level security, force row level security.' end;

  select string_agg(concat_ws(', ', 'role ' || r.rolname, 'database ' || d.datname, case when s.setdatabase = 0 and s.setrole = 0 then 'all' end),
                    '; ' order by r.rolname, d.datname) into v_found
    from pg_db_role_setting s
    left join pg_roles r on r.oid = s.setrole
    left join pg_database d on d.oid = s.setdatabase
   where (s.setdatabase = 0 or d.datname = current_database())
     and exists (select from unnest(s.setconfig) as c (setting)
                  where c.setting ~* '^session_replication_role=' and c.setting !~* '=(origin|local)$');
  if current_setting('session_replication_role') = 'replica' then
    v_found := concat_ws('; ', v_found, 'this session');
  end if;
  return query
    select 'log', 'replication_role', v_found is null, coalesce('session_replication_role is replica for ' || v_found, 'origin'),
           case when v_found is not null
                then 'In such sessions triggers do not fire: what they write is in no projection and no queue. alter … reset session_replication_role.' end;

  select string_agg(h.holder, ', ' order by h.holder) into v_found
    from (select distinct format('process %s, for %s s', a.pid, floor(extract(epoch from clock_timestamp() - a.xact_start))) as holder
            from pg_locks l
            join pg_stat_activity a on a.pid = l.pid
           where l.locktype = 'advisory' and l.objsubid = 2
             and l.database = (select d.oid from pg_database d where d.datname = current_database())
             and (l.classid::bigint between nightowls._lock_class(0) and nightowls._lock_class(256)
                  or l.classid::bigint between nightowls._lock_class(512) and nightowls._lock_class(768))
             and a.xact_start < clock_timestamp() - interval '1 minute') h;
  return query
    select 'log', 'horizon', v_found is null, coalesce('open appends or sends: ' || v_found, 'no append or send is open for a minute'),
           case when v_found is not null
                then 'Readers of the log in its orgs wait for them, and queues'' marks stand still. End it: pg_terminate_backend(pid).' end;

  select string_agg(h.holder, ', ' order by h.holder) into v_found
    from (select format('process %s, for %s s', a.pid, floor(extract(epoch from clock_timestamp() - a.xact_start))) as holder
            from pg_stat_activity a
           where a.backend_xmin is not null and a.datname = current_database() and a.pid <> pg_backend_pid()
             and a.xact_start < clock_timestamp() - interval '30 minutes'
           union all
          select format('prepared transaction %s, for %s s', p.gid, floor(extract(epoch from clock_timestamp() - p.prepared)))
            from pg_prepared_xacts p
           where p.database = current_database() and p.prepared < clock_timestamp() - interval '30 minutes'
           union all
          select format('replication slot %s, %s transactions behind', s.slot_name, greatest(age(s.xmin), age(s.catalog_xmin)))
            from pg_replication_slots s
           where greatest(age(s.xmin), age(s.catalog_xmin)) > 1000000) h;
  return query
    select 'log', 'xmin', v_found is null, coalesce('dead rows are kept for ' || v_found, 'nobody keeps dead rows for long'),
           case when v_found is not null
                then 'Tables grow until it ends: pg_terminate_backend(pid), commit or rollback prepared, or drop the slot.' end;
end;
$$;

revoke all on function nightowls._health_log() from public;

create function nightowls._health_consumers()
  returns setof nightowls._check
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_stalled text;
  v_parked  text;
begin
  select string_agg(format('%s: %s events behind', c.consumer, case when c.lag_events >= 10000 then '10,000 or more' else c.lag_events::text end),
                    ', ' order by c.consumer) filter (
           where c.lag_events > 0 and c.oldest < clock_timestamp() - interval '10 minutes'
             and (c.lease_until is null or c.lease_until <= clock_timestamp())),
         string_agg(format('%s: %s', c.consumer, c.parked), ', ' order by c.consumer) filter (where c.parked > 0)
    into v_stalled, v_parked
    from (select l.consumer, max(l.lag_events) as lag_events, max(l.lease_until) as lease_until, max(l.parked) as parked,
                 min((select e.created_at
                        from nightowls.events e
                       where e.org_id = l.org_id and e."position" > l."offset"
                       order by e."position"
                       limit 1)) as oldest
            from nightowls.consumer_lag l
           group by l.org_id, l.consumer) c;
  return query
    select 'consumers', 'stalled', v_stalled is null, coalesce(v_stalled, 'none is behind without somebody at work'),
           case when v_stalled is not null
                then 'Nobody has fetched what has been there for 10 minutes: start its members, or drop_consumer; for projection:… run_projections.' end
     union all
    select 'consumers', 'parked', v_parked is null, coalesce('parked events: ' || v_parked, 'no events are parked'),
           case when v_parked is not null then 'View parked_events has their errors; replay_parked or drop_parked settles them.' end;
end;
$$;

revoke all on function nightowls._health_consumers() from public;

-- Since when the first message of a queue waits that could be delivered, or whose reader has not settled it.
-- Definer: as _count_queue.
create function nightowls._oldest_due(org uuid, queue_id int)
  returns timestamptz
  language plpgsql
  stable
  parallel safe
  security definer
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_sort to off
  set enable_bitmapscan to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
begin
  return least(
    (select min(m.due_at)
       from (select p.priority, k.mark
               from unnest('{0,1,2,3,4,5,6,7,8,9}'::smallint[]) as p (priority)
              cross join lateral (
                      select max(x.mark) as mark
                        from (select i.mark
                                from nightowls.queue_marks i
                               where i.org_id = _oldest_due.org and i.queue_id = _oldest_due.queue_id and i.priority = p.priority
                               order by i.mark desc
                               limit 1) x) k
             offset 0) l
      cross join lateral (
              select i.due_at
                from nightowls.queue_messages i
               where i.org_id = _oldest_due.org and i.queue_id = _oldest_due.queue_id and i.state = 'r'
                 and i.priority = l.priority and i.line_no >= coalesce(l.mark, 0) and (l.priority = 0 or l.mark is not null)
               order by i.line_no
               limit 1) m),
    (select i.due_at
       from nightowls.queue_messages i
      where i.org_id = _oldest_due.org and i.queue_id = _oldest_due.queue_id and i.state in ('d', 's', 'x')
        and i.due_at <= clock_timestamp()
        and i.due_at >= coalesce((
              select k.mark
                from nightowls.queue_due_marks k
               where k.org_id = _oldest_due.org and k.queue_id = _oldest_due.queue_id
               order by k.mark desc
               limit 1), '-infinity')
      order by i.due_at
      limit 1));
end;
$$;

revoke all on function nightowls._oldest_due(uuid, int) from public;

create function nightowls._health_queues()
  returns setof nightowls._check
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_old     text;
  v_dead    text;
  v_growing text;
  v_paused  text;
begin
  select string_agg(format('%s: %s s', q.name, floor(extract(epoch from clock_timestamp() - o.since))), ', ' order by q.name)
           filter (where q.paused_at is null and o.since < clock_timestamp() - interval '1 hour'),
         string_agg(format('%s: since %s', q.name, q.paused_at), ', ' order by q.name)
           filter (where q.paused_at < clock_timestamp() - interval '1 hour'),
         string_agg(format('%s: %s, %s of them since %s', q.name, (c.counts).visible, (c.counts).visible - (c.before).visible, c.before_at), ', '
                    order by q.name)
           filter (where (c.counts).visible > (c.before).visible * 1.1)
    into v_old, v_paused, v_growing
    from nightowls.queues q
   cross join lateral nightowls._oldest_due(q.org_id, q.queue_id) as o (since)
    left join nightowls._queue_counts c on c.org_id = q.org_id and c.queue_id = q.queue_id;

  select string_agg(format('%s: %s%s', m.queue_name, case when m.estimated and m.counted_at is null then 'at least ' end, m.dead), ', '
                    order by m.queue_name) filter (where m.dead > 0)
    into v_dead
    from (select a.queue_name, a.estimated, a.counted_at,
                 a.dead_letters + case when exists (
                   select from nightowls.queues u where u.org_id = a.org_id and u.dead_letter_queue = a.queue_name)
                   then a.queue_length else 0 end as dead
            from nightowls.metrics_all() a) m;

  return query
    select 'queues', 'oldest_unacknowledged', v_old is null, coalesce(v_old, 'nothing waits for an hour'),
           case when v_old is not null then 'Nobody reads, or readers do not settle what they read: look at the workers.' end
     union all
    select 'queues', 'dead_letters', v_dead is null, coalesce(v_dead, 'none'),
           case when v_dead is not null then 'Their last_error says why; redrive(queue) sends them back to work, purge_queue deletes them.' end
     union all
    select 'queues', 'backlog', v_growing is null, coalesce(v_growing, 'no long queue grows'),
           case when v_growing is not null then 'More is sent than is done: more workers, larger batches, or fewer messages.' end
     union all
    select 'queues', 'paused', v_paused is null, coalesce(v_paused, 'none for an hour'),
           case when v_paused is not null then 'resume_queue(queue) ends a pause.' end;
end;
$$;

revoke all on function nightowls._health_queues() from public;
