-- What is in the queues: counted where there is little, the clock's last count where there is much.

-- Counts of one queue. Times, not ages: they are kept.
create type nightowls._queue_count as (
  visible      bigint,
  leased       bigint,
  delayed      bigint,
  waiting      bigint,
  dead_letters bigint,
  oldest_at    timestamptz,
  newest_at    timestamptz
);

-- The clock's counts of the queues that are too long to be counted at each look.
create table nightowls._queue_counts (
  org_id     uuid not null,
  queue_id   int not null,
  counts     nightowls._queue_count,
  counted_at timestamptz,
  before     nightowls._queue_count,
  before_at  timestamptz,
  so_far     nightowls._queue_count,
  after      bigint,
  constraint _queue_counts_pkey primary key (org_id, queue_id)
);

comment on table nightowls._queue_counts is 'The last complete count of each long queue, and the one that is under way.';
comment on column nightowls._queue_counts.org_id is 'The tenant.';
comment on column nightowls._queue_counts.queue_id is 'The queue.';
comment on column nightowls._queue_counts.counts is 'The last complete count; null: there was none yet.';
comment on column nightowls._queue_counts.counted_at is 'When that was complete.';
comment on column nightowls._queue_counts.before is 'An earlier count, by which health sees whether the queue grows.';
comment on column nightowls._queue_counts.before_at is 'When that was complete.';
comment on column nightowls._queue_counts.so_far is 'What the count that is under way has found.';
comment on column nightowls._queue_counts.after is 'The last message it has looked at; null: none is under way.';

create type nightowls.queue_metric as (
  org_id               uuid,
  queue_name           text,
  queue_length         bigint,
  queue_visible_length bigint,
  leased               bigint,
  delayed              bigint,
  waiting              bigint,
  dead_letters         bigint,
  newest_msg_age_sec   int,
  oldest_msg_age_sec   int,
  estimated            boolean,
  counted_at           timestamptz,
  paused               boolean,
  scrape_time          timestamptz
);

comment on type nightowls.queue_metric is
  'What is in a queue. queue_length: the messages that are not done: queue_visible_length, which a read would find, leased, delayed, and waiting '
  'behind another of their group; dead_letters lie beside them; ages in seconds are those of messages that are not done; estimated: there is too '
  'much to be counted at each look, and these are the figures of counted_at, or, where that is null, at least so many.';

-- Looks at up to max_rows messages, from the marks on, and counts them: the ready line, then the delayed line, then who waits in groups.
-- looked_at = max_rows: there may be more. One statement, so that a message is counted once.
-- Definer: under the caller's row security the marks would not be index conditions, and what is done but still there would be walked over.
create function nightowls._count_queue(org uuid, queue_id int, max_rows int, out counts nightowls._queue_count, out looked_at bigint)
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
declare
  v_now timestamptz := clock_timestamp();
begin
  select r.looked_at - r.leased + d.visible, r.leased + d.leased, d.delayed, w.looked_at, d.dead_letters,
         least(r.oldest_at, d.oldest_at, w.oldest_at), greatest(r.newest_at, d.newest_at, w.newest_at),
         r.looked_at + d.looked_at + w.looked_at
    into counts.visible, counts.leased, counts.delayed, counts.waiting, counts.dead_letters, counts.oldest_at, counts.newest_at, looked_at
    from (select count(*) as looked_at, count(*) filter (where m.lease_until > v_now) as leased,
                 min(m.enqueued_at) as oldest_at, max(m.enqueued_at) as newest_at
            from (select o.lease_until, o.enqueued_at
                    from (select p.priority, k.mark
                            from unnest('{0,1,2,3,4,5,6,7,8,9}'::smallint[]) as p (priority)
                           cross join lateral (
                                   select max(x.mark) as mark
                                     from (select i.mark
                                             from nightowls.queue_marks i
                                            where i.org_id = _count_queue.org and i.queue_id = _count_queue.queue_id
                                              and i.priority = p.priority
                                            order by i.mark desc
                                            limit 1) x) k
                          offset 0) l
                   cross join lateral (
                           select i.lease_until, i.enqueued_at
                             from nightowls.queue_messages i
                            where i.org_id = _count_queue.org and i.queue_id = _count_queue.queue_id and i.state = 'r'
                              and i.priority = l.priority and i.line_no >= coalesce(l.mark, 0)
                              and (l.priority = 0 or l.mark is not null)
                            order by i.line_no
                            limit _count_queue.max_rows) o
                   limit _count_queue.max_rows) m) r
   cross join lateral (
           select count(*) as looked_at,
                  count(*) filter (where m.state = 'd' and m.lease_until > v_now) as leased,
                  count(*) filter (where m.state = 'd' and (m.lease_until > v_now) is not true and m.due_at <= v_now) as visible,
                  count(*) filter (where m.state = 'd' and (m.lease_until > v_now) is not true and m.due_at > v_now) as delayed,
                  count(*) filter (where m.state = 'x') as dead_letters,
                  min(m.enqueued_at) filter (where m.state = 'd') as oldest_at,
                  max(m.enqueued_at) filter (where m.state = 'd') as newest_at
             from (select i.state, i.lease_until, i.due_at, i.enqueued_at
                     from nightowls.queue_messages i
                    where i.org_id = _count_queue.org and i.queue_id = _count_queue.queue_id and i.state in ('d', 's', 'x')
                      and i.due_at >= coalesce((
                            select k.mark
                              from nightowls.queue_due_marks k
                             where k.org_id = _count_queue.org and k.queue_id = _count_queue.queue_id
                             order by k.mark desc
                             limit 1), '-infinity')
                    order by i.due_at
                    limit _count_queue.max_rows - r.looked_at) m) d
   cross join lateral (
           select count(*) as looked_at, min(m.enqueued_at) as oldest_at, max(m.enqueued_at) as newest_at
             from (select i.enqueued_at
                     from nightowls.queue_messages i
                    where i.org_id = _count_queue.org and i.queue_id = _count_queue.queue_id and i.state = 'w'
                    order by i.group_key, i.msg_id
                    limit _count_queue.max_rows - r.looked_at - d.looked_at) m) w;
end;
$$;

revoke all on function nightowls._count_queue(uuid, int, int) from public;

-- What metrics says of a queue after looking at up to max_rows of its messages.
create function nightowls._measure(queue nightowls.queues, max_rows int, out metric nightowls.queue_metric, out looked_at bigint)
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set plan_cache_mode to force_generic_plan
as $$
#variable_conflict use_column
declare
  v_now    timestamptz := clock_timestamp();
  v_look   record := nightowls._count_queue((_measure.queue).org_id, (_measure.queue).queue_id, _measure.max_rows);
  v_counts nightowls._queue_count := v_look.counts;
  v_last   record;
begin
  looked_at := v_look.looked_at;
  metric.estimated := looked_at >= _measure.max_rows;
  if metric.estimated then
    select c.counts, c.counted_at into v_last
      from nightowls._queue_counts c
     where c.org_id = (_measure.queue).org_id and c.queue_id = (_measure.queue).queue_id and c.counted_at is not null;
    if (v_last.counts).visible + (v_last.counts).leased + (v_last.counts).delayed + (v_last.counts).waiting
       + (v_last.counts).dead_letters >= looked_at then
      v_counts := v_last.counts;
      metric.counted_at := v_last.counted_at;
    end if;
  else
    metric.counted_at := v_now;
  end if;
  metric.org_id := (_measure.queue).org_id;
  metric.queue_name := (_measure.queue).name;
  metric.queue_length := v_counts.visible + v_counts.leased + v_counts.delayed + v_counts.waiting;
  metric.queue_visible_length := v_counts.visible;
  metric.leased := v_counts.leased;
  metric.delayed := v_counts.delayed;
  metric.waiting := v_counts.waiting;
  metric.dead_letters := v_counts.dead_letters;
  -- A clock may have been set back.
  if v_counts.oldest_at is not null then
    metric.newest_msg_age_sec := greatest(floor(extract(epoch from v_now - v_counts.newest_at)), 0);
    metric.oldest_msg_age_sec := greatest(floor(extract(epoch from v_now - v_counts.oldest_at)), 0);
  end if;
  metric.paused := (_measure.queue).paused_at is not null;
  metric.scrape_time := v_now;
end;
$$;

revoke all on function nightowls._measure(nightowls.queues, int) from public;

create function nightowls.metrics(queue text, org uuid default null)
  returns nightowls.queue_metric
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return (nightowls._measure(nightowls._queue(nightowls.current_org(metrics.org), metrics.queue), 10001)).metric;
end;
$$;

comment on function nightowls.metrics(text, uuid) is
  'What is in a queue, as one row: lengths by what the messages wait for, dead letters, ages in seconds. Exact, in one snapshot, up to 10,000 '
  'messages; above that it is the clock''s last count, and estimated says so. queue: its name; org: the tenant. Locks nothing. Raises NW007 if the '
  'queue does not exist, NW010 if there is no org.';

revoke all on function nightowls.metrics(text, uuid) from public;

create function nightowls.metrics_all()
  returns setof nightowls.queue_metric
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_queue nightowls.queues;
  v_look  record;
  v_left  bigint := 200000;
begin
  for v_queue in select q.* from nightowls.queues q order by q.org_id, q.name loop
    v_look := nightowls._measure(v_queue, greatest(least(v_left, 10001), 1)::int);
    v_left := v_left - v_look.looked_at;
    return next v_look.metric;
  end loop;
end;
$$;

comment on function nightowls.metrics_all() is
  'metrics of every queue of every org, by org and name. It looks at no more than 200,000 messages in all: what comes after that is '
  'the clock''s last count, and estimated says so. Locks nothing.';

revoke all on function nightowls.metrics_all() from public;

create view nightowls.queue_metrics
  with (security_invoker = true)
as
  select m.org_id, m.queue_name, m.queue_length, m.queue_visible_length, m.leased, m.delayed, m.waiting, m.dead_letters,
         m.newest_msg_age_sec, m.oldest_msg_age_sec, m.estimated, m.counted_at, m.paused, m.scrape_time
    from nightowls.metrics_all() m;

comment on view nightowls.queue_metrics is 'What is in the queues of all orgs: metrics_all().';
comment on column nightowls.queue_metrics.org_id is 'The tenant.';
comment on column nightowls.queue_metrics.queue_name is 'The queue.';
comment on column nightowls.queue_metrics.queue_length is 'The messages that are not done, dead letters apart.';
comment on column nightowls.queue_metrics.queue_visible_length is 'Those that a read would find, were the queue not paused.';
comment on column nightowls.queue_metrics.leased is 'Those that a reader has.';
comment on column nightowls.queue_metrics.delayed is 'Those that are not due yet.';
comment on column nightowls.queue_metrics.waiting is 'Those that wait behind another of their group.';
comment on column nightowls.queue_metrics.dead_letters is 'Dead letters that lie in the queue itself.';
comment on column nightowls.queue_metrics.newest_msg_age_sec is 'Seconds since the newest message that is not done was sent.';
comment on column nightowls.queue_metrics.oldest_msg_age_sec is 'Seconds since the oldest message that is not done was sent.';
comment on column nightowls.queue_metrics.estimated is
  'Whether there is too much to be counted at each look: then these are the figures of counted_at.';
comment on column nightowls.queue_metrics.counted_at is 'When this was counted; null: nobody has counted it all yet, there is at least so much.';
comment on column nightowls.queue_metrics.paused is 'Whether the queue is paused.';
comment on column nightowls.queue_metrics.scrape_time is 'The clock.';

-- The next messages of a queue, by their ids, added to a count.
create function nightowls._count_on(
  org          uuid,
  queue_id     int,
  so_far       nightowls._queue_count,
  after        bigint,
  max_rows     int,
  out counts   nightowls._queue_count,
  out last     bigint,
  out finished boolean
)
  language plpgsql
  stable
  parallel safe
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
  select coalesce((_count_on.so_far).visible, 0)
           + count(*) filter (where m.state in ('r', 'd') and not m.leased and (m.state = 'r' or m.due_at <= v_now)),
         coalesce((_count_on.so_far).leased, 0) + count(*) filter (where m.state in ('r', 'd') and m.leased),
         coalesce((_count_on.so_far).delayed, 0) + count(*) filter (where m.state = 'd' and not m.leased and m.due_at > v_now),
         coalesce((_count_on.so_far).waiting, 0) + count(*) filter (where m.state = 'w'),
         coalesce((_count_on.so_far).dead_letters, 0) + count(*) filter (where m.state = 'x'),
         least((_count_on.so_far).oldest_at, min(m.enqueued_at) filter (where m.state in ('r', 'd', 'w'))),
         greatest((_count_on.so_far).newest_at, max(m.enqueued_at) filter (where m.state in ('r', 'd', 'w'))),
         max(m.msg_id), count(*) < _count_on.max_rows
    into counts.visible, counts.leased, counts.delayed, counts.waiting, counts.dead_letters, counts.oldest_at, counts.newest_at,
         last, finished
    from (select i.msg_id, i.state, i.due_at, i.enqueued_at, (i.lease_until > v_now) is true as leased
            from nightowls.queue_messages i
           where i.org_id = _count_on.org and i.queue_id = _count_on.queue_id and i.msg_id > _count_on.after
           order by i.msg_id
           limit _count_on.max_rows) m;
end;
$$;

revoke all on function nightowls._count_on(uuid, int, nightowls._queue_count, bigint, int) from public;

-- Counts the queues that are too long for metrics, for about max_ms, beginning anywhere; the count of a very long one goes on at
-- the next call. Returns how many counts were completed. While one counts, another has nothing to do (lock class base + 279).
-- Definer: nobody else may write to the queue's tables.
create function nightowls._count_queues(max_ms int default 1000)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_until timestamptz := clock_timestamp() + make_interval(secs => _count_queues.max_ms / 1000.0);
  v_first uuid := gen_random_uuid();
  v_queue record;
  v_count record;
  v_step  record;
  v_done  bigint := 0;
begin
  if not pg_try_advisory_xact_lock(nightowls._lock_class(279), 0) then
    return 0;
  end if;
  delete from nightowls._queue_counts c
   where not exists (select from nightowls.queues q where q.org_id = c.org_id and q.queue_id = c.queue_id);
  for v_queue in
    select q.org_id, q.queue_id
      from nightowls.queues q
     -- Anywhere, and round: an order that is different each time, in which no queue is always last.
     order by md5(q.org_id::text || q.queue_id || v_first)
  loop
    exit when clock_timestamp() >= v_until;
    if (nightowls._count_queue(v_queue.org_id, v_queue.queue_id, 10001)).looked_at < 10001 then
      delete from nightowls._queue_counts c where c.org_id = v_queue.org_id and c.queue_id = v_queue.queue_id;
      continue;
    end if;
    insert into nightowls._queue_counts (org_id, queue_id) values (v_queue.org_id, v_queue.queue_id) on conflict do nothing;
    select c.so_far, c.after, c.before_at is null or c.before_at < clock_timestamp() - interval '10 minutes' as older into v_count
      from nightowls._queue_counts c
     where c.org_id = v_queue.org_id and c.queue_id = v_queue.queue_id;
    loop
      v_step := nightowls._count_on(v_queue.org_id, v_queue.queue_id, v_count.so_far, coalesce(v_count.after, 0), 10000);
      if v_step.finished then
        update nightowls._queue_counts c
           set counts = v_step.counts, counted_at = clock_timestamp(), so_far = null, after = null,
               before = case when v_count.older then c.counts else c.before end,
               before_at = case when v_count.older then c.counted_at else c.before_at end
         where c.org_id = v_queue.org_id and c.queue_id = v_queue.queue_id;
        v_done := v_done + 1;
        exit;
      end if;
      v_count.so_far := v_step.counts;
      v_count.after := v_step.last;
      if clock_timestamp() >= v_until then
        update nightowls._queue_counts c
           set so_far = v_count.so_far, after = v_count.after
         where c.org_id = v_queue.org_id and c.queue_id = v_queue.queue_id;
        exit;
      end if;
    end loop;
  end loop;
  return v_done;
end;
$$;

revoke all on function nightowls._count_queues(int) from public;

alter table nightowls._queue_counts enable row level security;
alter table nightowls._queue_counts force row level security;
create policy service_all on nightowls._queue_counts
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));
