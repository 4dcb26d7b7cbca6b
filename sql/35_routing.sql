-- Routing: events that become messages in the transaction that appends them, and topics.
--
-- A binding stands in queue_bindings; for each aggregate type it wants there is a row in routes, which every append knows of
-- (type '' for all of them). So who appends what nobody is bound to pays for nothing but that look.

create table nightowls.queue_bindings (
  org_id          uuid        not null,
  queue_id        int         not null,
  filter          jsonb       not null,
  aggregate_types text[]      collate "C",
  event_types     text[]      collate "C",
  group_by        text        not null,
  created_at      timestamptz not null default clock_timestamp(),
  constraint queue_bindings_pkey primary key (org_id, queue_id, filter),
  constraint queue_bindings_group_by_check check (group_by in ('aggregate', 'none'))
);

comment on table nightowls.queue_bindings is 'Which events become messages of which queue. Kept by bind and unbind.';
comment on column nightowls.queue_bindings.org_id is 'The tenant.';
comment on column nightowls.queue_bindings.queue_id is 'The queue.';
comment on column nightowls.queue_bindings.filter is 'Which events: {"aggregate_types", "event_types"}, sorted; {} for all.';
comment on column nightowls.queue_bindings.aggregate_types is 'The aggregate types of the filter; null for all.';
comment on column nightowls.queue_bindings.event_types is 'The event types of the filter, and nightowls.erased, which no filter keeps out; null for all.';
comment on column nightowls.queue_bindings.group_by is
  'aggregate: the events of an aggregate are a group of messages, delivered in order, one at a time; none: they are not.';
comment on column nightowls.queue_bindings.created_at is 'When the binding was made.';

create table nightowls.topic_bindings (
  org_id     uuid        not null,
  pattern    text        collate "C" not null,
  queue_id   int         not null,
  regex      text        not null,
  created_at timestamptz not null default clock_timestamp(),
  constraint topic_bindings_pkey primary key (org_id, pattern, queue_id)
);

comment on table nightowls.topic_bindings is 'Which topics go to which queue. Kept by bind_topic and unbind_topic.';
comment on column nightowls.topic_bindings.org_id is 'The tenant.';
comment on column nightowls.topic_bindings.pattern is 'The topics: words with dots between; * is one word, # any number of words, or none.';
comment on column nightowls.topic_bindings.queue_id is 'The queue.';
comment on column nightowls.topic_bindings.regex is 'The pattern as a regular expression.';
comment on column nightowls.topic_bindings.created_at is 'When the binding was made.';

-- Puts messages into a queue, without any of the checks of send: what they are made of has been through others. Each array has one element a
-- message, or is null. Nobody is waited for: a worker that has acked the head of a group has it locked until it commits, and whoever appends, perhaps
-- with a key that the worker is about to wait for, must not wait for it. Where the lock cannot be had, word is left. (A send waits, so that numbers of
-- a group are drawn in the order of commits. Events of an aggregate are in that order anyhow: their key sees to it.)
create function nightowls._enqueue(
  queue      nightowls.queues,
  messages   jsonb[],
  headers    jsonb[],
  group_keys text[],
  priorities smallint[],
  sources    jsonb[]
)
  returns bigint[]
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
  v_org      uuid := (_enqueue.queue).org_id;
  v_queue    int := (_enqueue.queue).queue_id;
  v_groups   text[] := '{}';
  v_group    text;
  v_priority int;
  v_ids      bigint[];
  v_alone    int := cardinality(_enqueue.messages);
begin
  if array_remove(_enqueue.group_keys, null) <> '{}' then
    v_groups := array(
      select distinct u.group_key from unnest(_enqueue.group_keys) as u (group_key) where u.group_key is not null order by u.group_key);
    v_alone := v_alone - cardinality(array_remove(_enqueue.group_keys, null));
  end if;
  if _enqueue.priorities is not null then
    foreach v_priority in array array(select distinct u.priority from unnest(_enqueue.priorities) as u (priority) where u.priority > 0) loop
      perform nightowls._use_priority(v_org, v_queue, v_priority);
    end loop;
  end if;

  perform nightowls._hold_line(v_org, nightowls._last_line());
  with sent as (
    insert into nightowls.queue_messages
           (org_id, queue_id, priority, state, msg_id, line_no, group_key, source, headers, message)
    select v_org, v_queue, coalesce(u.priority, 0), case when u.group_key is null then 'r' else 'w' end::"char", u.line_no, u.line_no,
           u.group_key, u.source, u.headers, u.message
      from (select n.*, nextval('nightowls.queue_line_no') as line_no
              from unnest(_enqueue.messages, _enqueue.headers, _enqueue.group_keys, _enqueue.priorities, _enqueue.sources)
                     as n (message, headers, group_key, priority, source)
            offset 0) u
    returning msg_id
  )
  select array_agg(s.msg_id) into v_ids from sent s;
  perform nightowls._announce(v_org, v_queue, v_alone);
  foreach v_group in array v_groups loop
    perform nightowls._go_on(v_org, v_queue, v_group);
  end loop;
  return v_ids;
end;
$$;

revoke all on function nightowls._enqueue(nightowls.queues, jsonb[], jsonb[], text[], smallint[], jsonb[]) from public;

-- The group of an aggregate's events. A key has 255 bytes: of a longer one its hash stands there.
create function nightowls._event_group(aggregate_type text, aggregate_id text)
  returns text
  language sql
  immutable
  parallel safe
  return case when octet_length(aggregate_type) + octet_length(aggregate_id) < 255 then concat(aggregate_type, '/', aggregate_id)
              else 'sha256:' || encode(sha256(convert_to(concat(aggregate_type, '/', aggregate_id), 'UTF8')), 'hex') end;

revoke all on function nightowls._event_group(text, text) from public;

-- Makes messages of the events that queues are bound to, in the transaction that has appended them. An event that several bindings of
-- one queue want goes there once. The header tells erasure that the message is an event (_erase_messages).
-- Definer: events, routes and the queue's tables are closed to those who append.
create function nightowls._route_events(org uuid, aggregate_types text[], positions bigint[])
  returns void
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
  v_queue nightowls.queues;
  v_rows  record;
begin
  for v_queue in
    select q.*
      from nightowls.queues q
     where q.org_id = _route_events.org
       and q.name in (
             select r.name
               from nightowls.routes r
              where r.org_id = _route_events.org and r.aggregate_type = any (array_append(_route_events.aggregate_types, '') collate "C")
                and r.kind = 'queue')
     order by q.queue_id
  loop
    select array_agg(m.message order by m."position") as messages,
           array_agg(case when v_queue.queue_id < 0
                          then jsonb_build_object('nightowls_event', m."position", 'webhook_id', gen_random_uuid())
                          else jsonb_build_object('nightowls_event', m."position") end order by m."position") as headers,
           array_agg(m.group_key order by m."position") as groups
      into v_rows
      from (select e."position",
                   jsonb_build_object(
                     'position', e."position", 'aggregate_type', e.aggregate_type, 'aggregate_id', e.aggregate_id, 'version', e.version,
                     'event_type', e.event_type, 'payload', e.payload, 'metadata', e.metadata, 'event_id', e.event_id,
                     'created_at', e.created_at) as message,
                   case when b.grouped then nightowls._event_group(e.aggregate_type, e.aggregate_id) end as group_key
              from (select e.*
                      from unnest(_route_events.positions) as u ("position")
                     cross join lateral (
                             select x.* from nightowls.events x
                              where x.org_id = _route_events.org and x."position" = u."position" offset 0) e
                    offset 0) e
             cross join lateral (
                     select bool_or(b.group_by = 'aggregate') as grouped
                       from nightowls.queue_bindings b
                      where b.org_id = _route_events.org and b.queue_id = v_queue.queue_id
                        and (b.aggregate_types is null or e.aggregate_type = any (b.aggregate_types))
                        and (b.event_types is null or e.event_type = any (b.event_types))) b
             where b.grouped is not null) m;
    if v_rows.messages is not null then
      perform nightowls._enqueue(v_queue, v_rows.messages, v_rows.headers, v_rows.groups, null, null);
    end if;
  end loop;
end;
$$;

revoke all on function nightowls._route_events(uuid, text[], bigint[]) from public;

-- The same for one event, the usual case: what it is bound to, the hold, the numbers and the messages in one statement.
-- Definer: as _route_events.
create function nightowls._route_event(org uuid, "position" bigint)
  returns void
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
  v_sent  record;
  v_queue int;
  v_group text;
begin
  with sent as (
    insert into nightowls.queue_messages (org_id, queue_id, state, msg_id, line_no, group_key, headers, message)
    select _route_event.org, n.queue_id, case when n.grouped then 'w' else 'r' end::"char", n.line_no, n.line_no,
           case when n.grouped then nightowls._event_group(n.aggregate_type, n.aggregate_id) end,
           -- Below zero are the queues of endpoints: a request keeps its id, however often it is sent.
           case when n.queue_id < 0 then jsonb_build_object('nightowls_event', n."position", 'webhook_id', gen_random_uuid())
                else jsonb_build_object('nightowls_event', n."position") end,
           jsonb_build_object(
             'position', n."position", 'aggregate_type', n.aggregate_type, 'aggregate_id', n.aggregate_id, 'version', n.version,
             'event_type', n.event_type, 'payload', n.payload, 'metadata', n.metadata, 'event_id', n.event_id,
             'created_at', n.created_at)
      from (select m.*, nextval('nightowls.queue_line_no') as line_no
              from (select q.queue_id, q.name, q.notify, b.grouped, e.*, nightowls._last_line() as last
                      from nightowls.events e
                     cross join lateral (
                             select distinct r.name
                               from nightowls.routes r
                              where r.org_id = e.org_id and r.aggregate_type in ('', e.aggregate_type) and r.kind = 'queue'
                             offset 0) r
                     cross join lateral (
                             select x.queue_id, x.name, x.notify
                               from nightowls.queues x
                              where x.org_id = e.org_id and x.name = r.name
                             offset 0) q
                     cross join lateral (
                             select bool_or(x.group_by = 'aggregate') as grouped
                               from nightowls.queue_bindings x
                              where x.org_id = e.org_id and x.queue_id = q.queue_id
                                and (x.aggregate_types is null or e.aggregate_type = any (x.aggregate_types))
                                and (x.event_types is null or e.event_type = any (x.event_types))) b
                     where e.org_id = _route_event.org and e."position" = _route_event."position" and b.grouped is not null
                     order by q.queue_id
                    offset 0) m
             where nightowls._hold_line(_route_event.org, m.last)
               and (m.grouped or nightowls._wake(case when m.queue_id < 0 then 'dispatch' else 'queue/' || m.queue_id end, 1) and (not m.notify or nightowls._notify_queue(m.org_id, m.name)))
            offset 0) n
    returning queue_id, group_key
  )
  select array_agg(s.queue_id) as queues, array_agg(s.group_key) as groups into v_sent from sent s where s.group_key is not null;
  if v_sent.queues is not null then
    for v_queue, v_group in select u.queue_id, u.group_key from unnest(v_sent.queues, v_sent.groups) as u (queue_id, group_key) loop
      perform nightowls._go_on(_route_event.org, v_queue, v_group);
    end loop;
  end if;
end;
$$;

revoke all on function nightowls._route_event(uuid, bigint) from public;

-- Makes the rows of routes those of a queue's bindings. The queue is locked.
create function nightowls._reroute(queue nightowls.queues)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  delete from nightowls.routes r
   where r.org_id = (_reroute.queue).org_id and r.kind = 'queue' and r.name = (_reroute.queue).name;
  insert into nightowls.routes (org_id, aggregate_type, kind, name)
  select distinct b.org_id, t.aggregate_type, 'queue', (_reroute.queue).name
    from nightowls.queue_bindings b
   cross join lateral unnest(coalesce(b.aggregate_types, '{""}')) as t (aggregate_type)
   where b.org_id = (_reroute.queue).org_id and b.queue_id = (_reroute.queue).queue_id
  on conflict do nothing;
end;
$$;

revoke all on function nightowls._reroute(nightowls.queues) from public;

-- A queue, locked against others who change it or its bindings.
create function nightowls._locked_queue(org uuid, name text)
  returns nightowls.queues
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_queue nightowls.queues;
begin
  select q.* into v_queue
    from nightowls.queues q
   where q.org_id = _locked_queue.org and q.name = nightowls._queue_name(_locked_queue.name)
     for no key update;
  if not found then
    perform nightowls._refuse_queue(_locked_queue.org, _locked_queue.name);
  end if;
  return v_queue;
end;
$$;

revoke all on function nightowls._locked_queue(uuid, text) from public;

-- Definer: nobody else may write to the queue's tables and routes.
create function nightowls._bind(org uuid, name text, filter jsonb, group_by text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_queue  nightowls.queues;
  v_parsed record;
  v_filter jsonb;
  v_known  text;
begin
  if _bind.group_by is null then
    raise exception 'group_by must not be null' using errcode = 'null_value_not_allowed';
  elsif _bind.group_by not in ('aggregate', 'none') then
    raise exception 'group_by must be aggregate or none' using errcode = 'invalid_parameter_value';
  end if;
  v_parsed := nightowls._sorted_filter(_bind.filter);
  v_filter := v_parsed.sorted;
  if v_parsed.aggregate_types = '{}' or v_parsed.event_types = '{}' then
    raise exception 'filter lets nothing through'
      using errcode = 'invalid_parameter_value', hint = 'Leave a key out to let all types through.';
  end if;
  v_queue := nightowls._locked_queue(_bind.org, _bind.name);
  insert into nightowls.queue_bindings (org_id, queue_id, filter, aggregate_types, event_types, group_by)
  values (_bind.org, v_queue.queue_id, v_filter, v_parsed.aggregate_types,
          case when v_parsed.event_types is not null then v_parsed.event_types || 'nightowls.erased'::text end, _bind.group_by)
  on conflict do nothing;
  if not found then
    select b.group_by into v_known
      from nightowls.queue_bindings b
     where b.org_id = _bind.org and b.queue_id = v_queue.queue_id and b.filter = v_filter;
    if v_known <> _bind.group_by then
      raise exception 'queue "%" is bound to these events already with group_by %', v_queue.name, v_known
        using errcode = 'duplicate_object', hint = 'Take that binding off first with nightowls.unbind().';
    end if;
    return;
  end if;
  perform nightowls._reroute(v_queue);
  -- An append above read committed whose snapshot is older would not see it: 40001.
  perform nightowls._touch_org(_bind.org);
end;
$$;

revoke all on function nightowls._bind(uuid, text, jsonb, text) from public;

-- A filter in the one form in which it is kept, so that two ways to write it are one binding.
create function nightowls._sorted_filter(filter jsonb, out aggregate_types text[], out event_types text[], out sorted jsonb)
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  select f.aggregate_types, f.event_types into aggregate_types, event_types from nightowls._parse_filter(_sorted_filter.filter) f;
  if '' = any (aggregate_types) or '' = any (event_types) then
    raise exception 'a type must not be empty' using errcode = 'invalid_parameter_value';
  elsif exists (select from unnest(aggregate_types || event_types) as t (type) where octet_length(t.type) > 255) then
    raise exception 'a type is too long' using errcode = 'program_limit_exceeded', detail = 'It has at most 255 bytes.';
  elsif cardinality(aggregate_types) > 100 or cardinality(event_types) > 100 then
    raise exception 'a filter names too many types' using errcode = 'program_limit_exceeded', detail = 'At most 100 of each are kept.';
  end if;
  if aggregate_types is not null then
    aggregate_types := array(select distinct t.type collate "C" from unnest(aggregate_types) as t (type) order by 1);
  end if;
  if event_types is not null then
    event_types := array(select distinct t.type collate "C" from unnest(event_types) as t (type) order by 1);
  end if;
  sorted := jsonb_strip_nulls(jsonb_build_object('aggregate_types', to_jsonb(aggregate_types), 'event_types', to_jsonb(event_types)));
end;
$$;

revoke all on function nightowls._sorted_filter(jsonb) from public;

create function nightowls.bind(queue text, filter jsonb default null, group_by text default 'aggregate', org uuid default null)
  returns void
  language sql
  volatile
  parallel unsafe
  return nightowls._bind(nightowls.current_org(bind.org), bind.queue, bind.filter, bind.group_by);

comment on function nightowls.bind(text, jsonb, text, uuid) is
  'From now on events that match become messages of a queue, in the transaction that appends them: both commit or neither. One queue for each '
  'group of workers that is to see all of them. A message is {"position", "aggregate_type", "aggregate_id", "version", "event_type", "payload", '
  '"metadata", "event_id", "created_at"}; an event is sent to a queue once, however many of its bindings match, and a retried append sends nothing. '
  'Every append counts, a plain insert too; imported events, those that are restored and those that were there before are not sent, '
  'and nightowls.erased passes every filter by event_types. queue: its name; filter: {"aggregate_types": […], "event_types": […]}, null for all '
  'events; group_by: aggregate, so that the events of one aggregate are delivered in order, one at a time, or none; org: the tenant. Binding again '
  'changes nothing. Waits for another change of the queue, and for open appends above read committed. Other open appends are not waited for: they send what '
  'they append after the commit. Raises NW007 if the queue does not exist, 42710 if it is bound to the same events with another group_by, NW010 if there is no org, '
  '22004, 22023 or 54000 for an argument that is null, not valid or too long.';

revoke all on function nightowls.bind(text, jsonb, text, uuid) from public;

-- Definer: as _bind.
create function nightowls._unbind(org uuid, name text, filter jsonb)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_filter jsonb := (nightowls._sorted_filter(_unbind.filter)).sorted;
  v_queue  nightowls.queues := nightowls._locked_queue(_unbind.org, _unbind.name);
  v_count  bigint;
begin
  delete from nightowls.queue_bindings b
   where b.org_id = _unbind.org and b.queue_id = v_queue.queue_id and (_unbind.filter is null or b.filter = v_filter);
  get diagnostics v_count = row_count;
  if v_count > 0 then
    perform nightowls._reroute(v_queue);
  end if;
  return v_count;
end;
$$;

revoke all on function nightowls._unbind(uuid, text, jsonb) from public;

create function nightowls.unbind(queue text, filter jsonb default null, org uuid default null)
  returns bigint
  language sql
  volatile
  parallel unsafe
  return nightowls._unbind(nightowls.current_org(unbind.org), unbind.queue, unbind.filter);

comment on function nightowls.unbind(text, jsonb, uuid) is
  'Ends what bind began, and returns how many bindings are gone; what was sent stays in the queue. queue: its name; filter: that of the binding, '
  '{} for the one of all events; null takes off every binding of the queue; org: the tenant. Waits for another change of the queue. Raises NW007 '
  'if the queue does not exist, NW010 if there is no org, 22023 if the filter is not valid.';

revoke all on function nightowls.unbind(text, jsonb, uuid) from public;

create function nightowls.list_bindings(queue text default null, org uuid default null)
  returns table (queue_name text, filter jsonb, topic text, group_by text, created_at timestamptz)
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org  uuid := nightowls.current_org(list_bindings.org);
  v_only int;
begin
  if list_bindings.queue is not null then
    v_only := (nightowls._queue(v_org, list_bindings.queue)).queue_id;
  end if;
  return query
    select q.name::text, b.filter, b.topic, b.group_by, b.created_at
      from (select e.org_id, e.queue_id, e.filter, null::text as topic, e.group_by, e.created_at from nightowls.queue_bindings e
             union all
            select t.org_id, t.queue_id, null, t.pattern, null, t.created_at from nightowls.topic_bindings t) b
      join nightowls.queues q on q.org_id = b.org_id and q.queue_id = b.queue_id
     where b.org_id = v_org and (v_only is null or b.queue_id = v_only)
     order by q.name, b.created_at;
end;
$$;

comment on function nightowls.list_bindings(text, uuid) is
  'What sends to queues: bindings to events, with filter and group_by, and to topics, with their pattern as topic. queue: only those of this one; org: the '
  'tenant. Locks nothing. Raises NW007 if the queue does not exist, NW010 if there is no org.';

revoke all on function nightowls.list_bindings(text, uuid) from public;

-- Takes a queue that is dropped out of routes and bindings. Called as the owner.
create function nightowls._forget_bindings(queue nightowls.queues)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  -- Who is binding it has it locked.
  perform nightowls._locked_queue((_forget_bindings.queue).org_id, (_forget_bindings.queue).name);
  delete from nightowls.queue_bindings b
   where b.org_id = (_forget_bindings.queue).org_id and b.queue_id = (_forget_bindings.queue).queue_id;
  delete from nightowls.topic_bindings t
   where t.org_id = (_forget_bindings.queue).org_id and t.queue_id = (_forget_bindings.queue).queue_id;
  perform nightowls._reroute(_forget_bindings.queue);
end;
$$;

revoke all on function nightowls._forget_bindings(nightowls.queues) from public;

-- Takes the content out of an erased aggregate's messages, wherever they are; like its events they keep their places, so that groups and
-- leases go on. The record of the erasure is a message too, and stays. Who has a message locked is waited for; who archives or buries one
-- meanwhile is found in the next statement. Those that were routed are known by their header, and so are copies that keep it.
-- Definer: nobody else may write to the queue's tables.
create function nightowls._erase_messages(org uuid, aggregate_type text, aggregate_id text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  update nightowls.queue_messages m
     set message = m.message || '{"event_type": "nightowls.erased", "payload": {}, "metadata": {}}',
         headers = jsonb_strip_nulls(jsonb_build_object(
           'nightowls_event', m.headers -> 'nightowls_event', 'webhook_id', m.headers -> 'webhook_id')), last_error = null
   where m.org_id = _erase_messages.org and m.headers ? 'nightowls_event'
     and m.message ->> 'aggregate_type' = _erase_messages.aggregate_type and m.message ->> 'aggregate_id' = _erase_messages.aggregate_id
     and (m.message ->> 'event_type' <> 'nightowls.erased' or m.last_error is not null);
  update nightowls.queue_archive a
     set message = a.message || '{"event_type": "nightowls.erased", "payload": {}, "metadata": {}}',
         headers = jsonb_strip_nulls(jsonb_build_object(
           'nightowls_event', a.headers -> 'nightowls_event', 'webhook_id', a.headers -> 'webhook_id')), last_error = null
   where a.org_id = _erase_messages.org and a.headers ? 'nightowls_event'
     and a.message ->> 'aggregate_type' = _erase_messages.aggregate_type and a.message ->> 'aggregate_id' = _erase_messages.aggregate_id
     and (a.message ->> 'event_type' <> 'nightowls.erased' or a.last_error is not null);
end;
$$;

revoke all on function nightowls._erase_messages(uuid, text, text) from public;

-- Topics ------------------------------------------------------------------------------------------

create function nightowls._check_topic(topic text, what text)
  returns void
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if _check_topic.topic is null then
    raise exception '% must not be null', _check_topic.what using errcode = 'null_value_not_allowed';
  elsif octet_length(_check_topic.topic) > 255 then
    raise exception '% is too long', _check_topic.what using errcode = 'program_limit_exceeded', detail = 'It has at most 255 bytes.';
  elsif _check_topic.what = 'topic' and _check_topic.topic !~ '^[A-Za-z0-9_-]+([.][A-Za-z0-9_-]+)*$' then
    raise exception 'topic is not valid: "%"', left(_check_topic.topic, 64)
      using errcode = 'invalid_parameter_value', hint = 'A topic is words of A-Z, a-z, 0-9, _ and -, with dots between, such as order.paid.eu.';
  elsif _check_topic.what = 'pattern' and _check_topic.topic !~ '^([A-Za-z0-9_-]+|[*]|#)([.]([A-Za-z0-9_-]+|[*]|#))*$' then
    raise exception 'pattern is not valid: "%"', left(_check_topic.topic, 64)
      using errcode = 'invalid_parameter_value',
            hint = 'A pattern is a topic in which a word can be * (any one word) or # (any number of words, or none), such as order.*.eu or order.#.';
  end if;
end;
$$;

revoke all on function nightowls._check_topic(text, text) from public;

-- A pattern as a regular expression over the topic with a dot at its end, so that each word is one with its dot.
create function nightowls._topic_regex(pattern text)
  returns text
  language sql
  immutable
  strict
  parallel safe
  return (
    select '^' || string_agg(case w.word when '*' then '[^.]+[.]' when '#' then '([^.]+[.])*' else w.word || '[.]' end, '' order by w.no) || '$'
      from regexp_split_to_table(pattern, '[.]') with ordinality as w (word, no));

revoke all on function nightowls._topic_regex(text) from public;

-- The queues a topic goes to, each once, in the order of their numbers.
create function nightowls._topic_queues(org uuid, topic text)
  returns setof nightowls.queues
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform nightowls._check_topic(_topic_queues.topic, 'topic');
  return query
    select q.*
      from nightowls.queues q
     where q.org_id = _topic_queues.org
       and q.queue_id in (
             select t.queue_id
               from nightowls.topic_bindings t
              where t.org_id = _topic_queues.org and (_topic_queues.topic || '.') ~ t.regex)
     order by q.queue_id;
end;
$$;

revoke all on function nightowls._topic_queues(uuid, text) from public;

-- Definer: nobody else may write to the queue's tables.
create function nightowls._bind_topic(org uuid, pattern text, name text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_queue nightowls.queues;
begin
  perform nightowls._check_topic(_bind_topic.pattern, 'pattern');
  v_queue := nightowls._locked_queue(_bind_topic.org, _bind_topic.name);
  insert into nightowls.topic_bindings (org_id, pattern, queue_id, regex)
  values (_bind_topic.org, _bind_topic.pattern, v_queue.queue_id, nightowls._topic_regex(_bind_topic.pattern))
  on conflict do nothing;
end;
$$;

revoke all on function nightowls._bind_topic(uuid, text, text) from public;

create function nightowls.bind_topic(pattern text, queue text, org uuid default null)
  returns void
  language sql
  volatile
  parallel unsafe
  return nightowls._bind_topic(nightowls.current_org(bind_topic.org), bind_topic.pattern, bind_topic.queue);

comment on function nightowls.bind_topic(text, text, uuid) is
  'From now on send_topic sends to a queue what has a topic that matches. pattern: a topic in which a word can be * (any one word) or # (any number of '
  'words, or none); queue: its name; org: the tenant. Binding again changes nothing. Waits for another change of the queue. Raises NW007 if the queue '
  'does not exist, NW010 if there is no org, 22004, 22023 or 54000 if the pattern is null, not valid or too long.';

revoke all on function nightowls.bind_topic(text, text, uuid) from public;

-- Definer: as _bind_topic.
create function nightowls._unbind_topic(org uuid, pattern text, name text)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_queue nightowls.queues;
begin
  perform nightowls._check_topic(_unbind_topic.pattern, 'pattern');
  v_queue := nightowls._queue(_unbind_topic.org, _unbind_topic.name);
  delete from nightowls.topic_bindings t
   where t.org_id = _unbind_topic.org and t.pattern = _unbind_topic.pattern and t.queue_id = v_queue.queue_id;
  return found;
end;
$$;

revoke all on function nightowls._unbind_topic(uuid, text, text) from public;

create function nightowls.unbind_topic(pattern text, queue text, org uuid default null)
  returns boolean
  language sql
  volatile
  parallel unsafe
  return nightowls._unbind_topic(nightowls.current_org(unbind_topic.org), unbind_topic.pattern, unbind_topic.queue);

comment on function nightowls.unbind_topic(text, text, uuid) is
  'Ends what bind_topic began; returns whether there was such a binding. What was sent stays in the queue. pattern, queue and org as there. Raises NW007 '
  'if the queue does not exist, NW010 if there is no org, 22004, 22023 or 54000 if the pattern is null, not valid or too long.';

revoke all on function nightowls.unbind_topic(text, text, uuid) from public;

create function nightowls.send_topic(
  topic     text,
  message   jsonb,
  delay     int default 0,
  headers   jsonb default null,
  dedup_key text default null,
  dedup_for interval default null,
  group_key text default null,
  priority  int default 0,
  org       uuid default null
)
  returns table (queue text, msg_id bigint)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org   uuid := nightowls.current_org(send_topic.org);
  v_queue nightowls.queues;
begin
  perform nightowls._check_send(
    array[send_topic.message], send_topic.delay, array[send_topic.headers], array[send_topic.dedup_key], send_topic.dedup_for,
    array[send_topic.group_key], send_topic.priority);
  for v_queue in select q.* from nightowls._topic_queues(v_org, send_topic.topic) q loop
    queue := v_queue.name;
    msg_id := nightowls._send(
      v_org, v_queue.name, send_topic.message, send_topic.delay, send_topic.headers, send_topic.dedup_key, send_topic.dedup_for,
      send_topic.group_key, send_topic.priority);
    return next;
  end loop;
end;
$$;

comment on function nightowls.send_topic(text, jsonb, int, jsonb, text, interval, text, int, uuid) is
  'Sends a message to every queue that is bound to its topic, once each, and returns the queues and the ids; no row: nobody is. topic: words with '
  'dots between, such as order.paid.eu; the other arguments as in send, for each queue by itself. All or none. Waits as send does, queue after queue in the order '
  'of their making. Raises NW002 if the key is known with another message, NW010 if there is no org, 22004 or 22023 for an argument that is null '
  'or not valid, 54000 for one that is too long, too large or too deep.';

revoke all on function nightowls.send_topic(text, jsonb, int, jsonb, text, interval, text, int, uuid) from public;

alter table nightowls.queue_bindings enable row level security;
alter table nightowls.queue_bindings force row level security;
create policy service_all on nightowls.queue_bindings
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));

alter table nightowls.topic_bindings enable row level security;
alter table nightowls.topic_bindings force row level security;
create policy service_all on nightowls.topic_bindings
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));
