-- Floors: one holder at a time for each container, first come first served, and a fence that shuts out who has lost it.
--
-- A floor is one row; who holds it stands there. Waiters have tickets, drawn under the row's lock. A ticket above the floor's is
-- waiting, one below it has been passed over: to skip somebody is to grant a later ticket, so the row of a silent waiter is never
-- written by others. Time is the database's clock, and silence counts by itself: a holder or waiter that was silent for too
-- long has lost its place, whether or not anybody has taken it.
--
-- Locks on the floor's row: a guarded write takes FOR KEY SHARE, heartbeat, release and the drawing of a ticket an ordinary
-- update's lock, which does not meet it; a grant takes FOR UPDATE, which does. So the next grant comes after the commit of every
-- guarded write of the one before, while a holder's heartbeat never waits for its own open transaction.

create table nightowls.floors (
  org_id       uuid        not null,
  container    text        collate "C" not null,
  fence        bigint      not null default 0,
  ticket       bigint      not null default 0,
  holder       text        collate "C",
  granted_at   timestamptz,
  heartbeat_at timestamptz,
  released_at  timestamptz,
  max_hold_ms  int,
  max_total_ms int,
  constraint floors_pkey primary key (org_id, container),
  constraint floors_holder_check check (
    holder is null or granted_at is not null and heartbeat_at is not null and max_hold_ms is not null)
) with (fillfactor = 50);

comment on table nightowls.floors is
  'The floors there are: one row for each container that was ever asked for, with its holder. Kept by the functions; '
  'floor_status shows it with the clock taken into account.';
comment on column nightowls.floors.org_id is 'The tenant.';
comment on column nightowls.floors.container is 'What only one may act on at a time.';
comment on column nightowls.floors.fence is 'The fence of the last grant; rises with every grant, never used again.';
comment on column nightowls.floors.ticket is 'The ticket of the last grant; tickets above it are waiting.';
comment on column nightowls.floors.holder is 'Who holds it, unless silent for too long; null: nobody.';
comment on column nightowls.floors.granted_at is 'When it was last granted.';
comment on column nightowls.floors.heartbeat_at is 'The holder''s last sign of life that was written down.';
comment on column nightowls.floors.released_at is 'When it was released; null while it is held, or after a holder that never did.';
comment on column nightowls.floors.max_hold_ms is 'Milliseconds of silence after which the holder has lost it.';
comment on column nightowls.floors.max_total_ms is 'Milliseconds after which the holder has lost it, silent or not; null: never.';

create table nightowls.floor_tickets (
  org_id       uuid        not null,
  container    text        collate "C" not null,
  ticket       bigint      not null,
  holder       text        collate "C" not null,
  request_id   text        collate "C",
  max_hold_ms  int         not null,
  max_total_ms int,
  poll_ms      int         not null,
  requested_at timestamptz not null default clock_timestamp(),
  polled_at    timestamptz not null default clock_timestamp(),
  fence        bigint,
  holding      boolean     not null default false,
  left_at      timestamptz,
  constraint floor_tickets_pkey primary key (org_id, container, ticket)
) with (fillfactor = 50);

-- One holder, whatever the functions do.
create unique index floor_tickets_holding_key on nightowls.floor_tickets (org_id, container) where holding;
create unique index floor_tickets_request_id_key on nightowls.floor_tickets (org_id, container, request_id) where request_id is not null;
create index floor_tickets_holder_idx on nightowls.floor_tickets (org_id, container, holder, ticket) where request_id is null;

comment on table nightowls.floor_tickets is
  'The lines: one row for each request of a floor. Waiting are those above the floor''s ticket; one that was granted has a fence. '
  'Finished ones are kept for a day where they have a request_id, so that a late retry is known.';
comment on column nightowls.floor_tickets.org_id is 'The tenant.';
comment on column nightowls.floor_tickets.container is 'The floor.';
comment on column nightowls.floor_tickets.ticket is 'The place in the line: 1, 2, 3 … in the order of asking.';
comment on column nightowls.floor_tickets.holder is 'Who asks.';
comment on column nightowls.floor_tickets.request_id is 'The caller''s name for this request; null: the holder''s name stands for it.';
comment on column nightowls.floor_tickets.max_hold_ms is 'Milliseconds of silence after which the holder loses the floor.';
comment on column nightowls.floor_tickets.max_total_ms is 'Milliseconds after which it loses the floor, silent or not; null: never.';
comment on column nightowls.floor_tickets.poll_ms is 'How often it means to ask again, in milliseconds.';
comment on column nightowls.floor_tickets.requested_at is 'When it asked first.';
comment on column nightowls.floor_tickets.polled_at is 'When it last asked, as far as that was written down.';
comment on column nightowls.floor_tickets.fence is 'The fence it was granted with; null: not granted.';
comment on column nightowls.floor_tickets.holding is 'Whether it has the floor: one in a container at most.';
comment on column nightowls.floor_tickets.left_at is 'When it left the line by leave_floor; null: it did not.';

-- What is left of floors that were removed: no fence may come again.
create table nightowls.floor_marks (
  org_id uuid   not null,
  fence  bigint not null,
  constraint floor_marks_pkey primary key (org_id)
);

comment on table nightowls.floor_marks is 'The highest fence of the floors that were removed, as nobody had asked for them for a day.';
comment on column nightowls.floor_marks.org_id is 'The tenant.';
comment on column nightowls.floor_marks.fence is 'No later grant has this fence or a lower one.';

alter table nightowls.floors enable row level security;
alter table nightowls.floors force row level security;
create policy service_all on nightowls.floors
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));

alter table nightowls.floor_tickets enable row level security;
alter table nightowls.floor_tickets force row level security;
create policy service_all on nightowls.floor_tickets
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));

alter table nightowls.floor_marks enable row level security;
alter table nightowls.floor_marks force row level security;
create policy service_all on nightowls.floor_marks
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));

create type nightowls.floor_answer as (
  granted     boolean,
  ticket      bigint,
  ahead       bigint,
  fence       bigint,
  retry_in_ms int,
  skipped     boolean
);

comment on type nightowls.floor_answer is
  'The answer to a request of a floor. granted: it is the caller''s; ticket: its place; ahead: how many come before, the holder '
  'counted; fence: what guarded writes must give, once granted; retry_in_ms: when to ask again, null once granted; skipped: an '
  'earlier ticket was lost by silence, and from request_floor this is a new one at the end of the line.';

-- The clock -------------------------------------------------------------------------------------------

-- Whether a holder is within its time.
create function nightowls._is_fresh(granted_at timestamptz, heartbeat_at timestamptz, max_hold_ms int, max_total_ms int)
  returns boolean
  language sql
  volatile
  parallel unsafe
  return clock_timestamp() < heartbeat_at + max_hold_ms * interval '1 ms'
     and (max_total_ms is null or clock_timestamp() < granted_at + max_total_ms * interval '1 ms');

revoke all on function nightowls._is_fresh(timestamptz, timestamptz, int, int) from public;

-- How long a waiter may be silent: max(10 polls, 5 s).
create function nightowls._silence(poll_ms int)
  returns interval
  language sql
  immutable
  parallel safe
  return greatest(poll_ms::bigint * 10, 5000) * interval '1 ms';

revoke all on function nightowls._silence(int) from public;

-- Whether a waiter is still there. Its polls are written down once in a fifth of its silence, and that much is allowed for.
create function nightowls._is_waiting(polled_at timestamptz, poll_ms int)
  returns boolean
  language sql
  volatile
  parallel unsafe
  return clock_timestamp() < polled_at + nightowls._silence(poll_ms) * 1.2;

revoke all on function nightowls._is_waiting(timestamptz, int) from public;

-- Arguments -------------------------------------------------------------------------------------------

create function nightowls._check_floor_names(container text, holder text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if _check_floor_names.container is null or _check_floor_names.holder is null then
    raise exception 'container and holder must not be null' using errcode = 'null_value_not_allowed';
  elsif _check_floor_names.container = '' or _check_floor_names.holder = '' then
    raise exception 'container and holder must not be empty' using errcode = 'invalid_parameter_value';
  elsif octet_length(_check_floor_names.container) > 1024 or octet_length(_check_floor_names.holder) > 255 then
    raise exception 'container or holder is too long'
      using errcode = 'program_limit_exceeded', detail = 'A container has at most 1024 bytes, a holder 255.';
  end if;
end;
$$;

revoke all on function nightowls._check_floor_names(text, text) from public;

create function nightowls._check_floor_request(
  container    text,
  holder       text,
  max_hold_ms  int,
  poll_ms      int,
  request_id   text,
  max_total_ms int
)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform nightowls._check_floor_names(_check_floor_request.container, _check_floor_request.holder);
  if _check_floor_request.max_hold_ms is null or _check_floor_request.poll_ms is null then
    raise exception 'max_hold_ms and poll_ms must not be null' using errcode = 'null_value_not_allowed';
  elsif _check_floor_request.max_hold_ms < 1 or _check_floor_request.max_total_ms < 1 then
    raise exception 'max_hold_ms and max_total_ms must be 1 or more' using errcode = 'invalid_parameter_value';
  elsif _check_floor_request.poll_ms not between 1 and 60000 then
    raise exception 'poll_ms must be between 1 and 60000' using errcode = 'invalid_parameter_value';
  elsif _check_floor_request.request_id = '' then
    raise exception 'request_id must not be empty' using errcode = 'invalid_parameter_value', hint = 'Leave it out for none.';
  elsif octet_length(_check_floor_request.request_id) > 255 then
    raise exception 'request_id is too long'
      using errcode = 'program_limit_exceeded', detail = 'A request_id has at most 255 bytes.';
  end if;
end;
$$;

revoke all on function nightowls._check_floor_request(text, text, int, int, text, int) from public;

create function nightowls._refuse_floor_isolation()
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
    raise exception 'a floor cannot be requested at isolation level %', current_setting('transaction_isolation')
      using errcode = 'active_sql_transaction',
            detail = 'A snapshot taken before would not show who has it.',
            hint = 'Use read committed.';
  end if;
end;
$$;

revoke all on function nightowls._refuse_floor_isolation() from public;

create function nightowls._refuse_lost_request(container text, ticket bigint, fence bigint)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  raise exception 'ticket % of floor "%" has had its turn', _refuse_lost_request.ticket, left(_refuse_lost_request.container, 64)
    using errcode = 'NW003',
          detail = case when _refuse_lost_request.fence is null then 'It left the line.'
                        else format('It was granted with fence %s and is held no more.', _refuse_lost_request.fence) end,
          hint = 'Request the floor with a new request_id; what was read under the old fence may be out of date.';
end;
$$;

revoke all on function nightowls._refuse_lost_request(text, bigint, bigint) from public;

-- The fence -------------------------------------------------------------------------------------------

-- Locks the floor against the next grant until the transaction ends, if it is held with this fence.
-- Definer: the row's lock needs rights that callers lack.
create function nightowls._assert_fence(org uuid, container text, fence bigint)
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
  v_floor nightowls.floors;
begin
  if _assert_fence.container is null or _assert_fence.fence is null then
    raise exception 'container and fence must be given together'
      using errcode = 'null_value_not_allowed';
  end if;
  -- Asked again of the row as it is once the lock is ours.
  perform
     from nightowls.floors f
    where f.org_id = _assert_fence.org
      and f.container = _assert_fence.container
      and f.fence = _assert_fence.fence
      and f.holder is not null
      and nightowls._is_fresh(f.granted_at, f.heartbeat_at, f.max_hold_ms, f.max_total_ms)
      for key share;
  if found then
    return;
  end if;

  select f.* into v_floor
    from nightowls.floors f
   where f.org_id = _assert_fence.org
     and f.container = _assert_fence.container;
  raise exception 'floor "%" is not held with fence %', left(_assert_fence.container, 64), _assert_fence.fence
    using errcode = 'NW003',
          detail = case
            when v_floor.fence is distinct from _assert_fence.fence and v_floor.fence > 0
              then format('Its last fence is %s.', v_floor.fence)
            when v_floor.fence is distinct from _assert_fence.fence then 'Nobody has it.'
            when v_floor.holder is null then 'It was released.'
            else format('Its holder''s time is over: %s ms since the last heartbeat, %s since the grant.',
                        floor(extract(epoch from clock_timestamp() - v_floor.heartbeat_at) * 1000),
                        floor(extract(epoch from clock_timestamp() - v_floor.granted_at) * 1000)) end,
          hint = 'Request the floor again; what was read under the old fence may be out of date.';
end;
$$;

revoke all on function nightowls._assert_fence(uuid, text, bigint) from public;

-- The fence of an append. A retry writes nothing, so it may come late: it is told its first result, or NW002.
create function nightowls._guard_append(org uuid, container text, fence bigint, event_ids uuid[])
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if _guard_append.container is null or _guard_append.fence is null
     or not nightowls._is_any_known(_guard_append.org, array_remove(_guard_append.event_ids, null)) then
    perform nightowls._assert_fence(_guard_append.org, _guard_append.container, _guard_append.fence);
  end if;
end;
$$;

revoke all on function nightowls._guard_append(uuid, text, bigint, uuid[]) from public;

create function nightowls.assert_floor(container text, fence bigint, org uuid default null)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform nightowls._assert_fence(nightowls.current_org(assert_floor.org), assert_floor.container, assert_floor.fence);
end;
$$;

comment on function nightowls.assert_floor(text, bigint, uuid) is
  'Makes sure that a floor is held with this fence, and that nobody else is granted it before this transaction ends: whatever '
  'the transaction writes afterwards is guarded, plain inserts too. container: the floor; fence: from its grant; org: the tenant. '
  'Waits for a grant that is under way, for nothing else, and keeps the next grant waiting until commit, so keep the transaction '
  'short. Raises NW003 if the floor is not held with this fence or its holder''s time is over, 22004 if an argument is null, '
  'NW010 if there is no org, 40001 above read committed when the floor has been granted since the snapshot.';

revoke all on function nightowls.assert_floor(text, bigint, uuid) from public;

-- The line --------------------------------------------------------------------------------------------

-- A floor and one ticket of it in one look: the given one, else that of the request, else the holder's newest. mark: the last
-- granted ticket; waiters: how many are there before the ticket, if it is waiting and counted; before: whether there is one.
-- changes_at: when that may change though nobody does anything: who waits behind somebody watches the next before it, which
-- watches the one before that, and the first of them the holder.
create function nightowls._see_floor(
  org            uuid,
  container      text,
  holder         text,
  request_id     text,
  ticket         bigint,
  counted        boolean,
  out mark       bigint,
  out fence      bigint,
  out held       boolean,
  out mine       bigint,
  out my_holder  text,
  out my_fence   bigint,
  out gone       boolean,
  out poll_ms    int,
  out polled_at  timestamptz,
  out written_by text,
  out present    boolean,
  out waiters    bigint,
  out before     boolean,
  out changes_at timestamptz
)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_bitmapscan to off
  set enable_hashjoin to off
  set enable_mergejoin to off
  set enable_sort to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
begin
  select f.ticket, f.fence,
         f.holder is not null and nightowls._is_fresh(f.granted_at, f.heartbeat_at, f.max_hold_ms, f.max_total_ms),
         t.ticket, t.holder, t.fence, t.left_at is not null, t.poll_ms, t.polled_at, t.xmin::text,
         t.left_at is null and nightowls._is_waiting(t.polled_at, t.poll_ms), w.waiters, b.lost_at is not null,
         case when b.lost_at is not null then b.lost_at
              when f.holder is not null then
                least(f.heartbeat_at + f.max_hold_ms * interval '1 ms', f.granted_at + f.max_total_ms * interval '1 ms') end
    into mark, fence, held, mine, my_holder, my_fence, gone, poll_ms, polled_at, written_by, present, waiters, before, changes_at
    from nightowls.floors f
    left join nightowls.floor_tickets t
      on t.org_id = f.org_id
     and t.container = f.container
     and t.ticket = case
           when _see_floor.ticket is not null then _see_floor.ticket
           when _see_floor.request_id is not null then (
             select x.ticket
               from nightowls.floor_tickets x
              where x.org_id = _see_floor.org and x.container = _see_floor.container and x.request_id = _see_floor.request_id)
           else (
             select x.ticket
               from nightowls.floor_tickets x
              where x.org_id = _see_floor.org and x.container = _see_floor.container and x.holder = _see_floor.holder
                and x.request_id is null
              order by x.ticket desc
              limit 1) end
    left join lateral (
           select count(*) as waiters
             from nightowls.floor_tickets x
            where _see_floor.counted and x.org_id = f.org_id and x.container = f.container
              and x.ticket > f.ticket and x.ticket < t.ticket
              and x.left_at is null and nightowls._is_waiting(x.polled_at, x.poll_ms)) w on t.ticket > f.ticket
    left join lateral (
           select x.polled_at + nightowls._silence(x.poll_ms) * 1.2 as lost_at
             from nightowls.floor_tickets x
            where x.org_id = f.org_id and x.container = f.container
              and x.ticket > f.ticket and x.ticket < t.ticket
              and x.left_at is null and nightowls._is_waiting(x.polled_at, x.poll_ms)
            order by x.ticket desc
            limit 1) b on t.ticket > f.ticket
   where f.org_id = _see_floor.org
     and f.container = _see_floor.container;
end;
$$;

revoke all on function nightowls._see_floor(uuid, text, text, text, bigint, boolean) from public;

create function nightowls._end_ticket(org uuid, container text, ticket bigint)
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
begin
  delete from nightowls.floor_tickets t
   where t.org_id = _end_ticket.org and t.container = _end_ticket.container and t.ticket = _end_ticket.ticket
     and t.request_id is null;
  if not found then
    update nightowls.floor_tickets t
       set holding = false
     where t.org_id = _end_ticket.org and t.container = _end_ticket.container and t.ticket = _end_ticket.ticket;
  end if;
end;
$$;

revoke all on function nightowls._end_ticket(uuid, text, bigint) from public;

create function nightowls._floor_event(event_type text, payload jsonb)
  returns jsonb
  language sql
  immutable
  parallel safe
  return jsonb_build_object('event_type', event_type, 'payload', payload);

revoke all on function nightowls._floor_event(text, jsonb) from public;

-- What a waiter sleeps on: its own ticket, so that a release wakes the next in line and nobody else.
create function nightowls._floor_key(org uuid, container text, ticket bigint)
  returns text
  language sql
  immutable
  parallel safe
  return 'floor/' || org || '/' || ticket || '/' || container;

revoke all on function nightowls._floor_key(uuid, text, bigint) from public;

-- Wakes the first who waits behind a ticket, if it sleeps.
create function nightowls._wake_next(org uuid, container text, ticket bigint)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_bitmapscan to off
  set enable_sort to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
begin
  if nightowls._can_wake() then
    perform nightowls._wake(nightowls._floor_key(_wake_next.org, _wake_next.container, n.ticket))
       from (select t.ticket
               from nightowls.floor_tickets t
              where t.org_id = _wake_next.org and t.container = _wake_next.container and t.ticket > _wake_next.ticket
                and t.left_at is null and nightowls._is_waiting(t.polled_at, t.poll_ms)
              order by t.ticket
              limit 1) n;
  end if;
end;
$$;

revoke all on function nightowls._wake_next(uuid, text, bigint) from public;

-- Grants the floor to a waiting ticket if it is free and nobody is there before it. Null: not now. Nobody is waited for: a floor
-- that is locked is being granted, or a guarded write of the last holder is still open.
create function nightowls._grant_floor(org uuid, container text, ticket bigint, out fence bigint, out events jsonb)
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
  v_floor nightowls.floors;
  v_mine  nightowls.floor_tickets;
  v_mark  bigint;
begin
  select f.* into v_floor
    from nightowls.floors f
   where f.org_id = _grant_floor.org
     and f.container = _grant_floor.container
     for update skip locked;
  if not found
     or v_floor.ticket >= _grant_floor.ticket
     or v_floor.holder is not null
        and nightowls._is_fresh(v_floor.granted_at, v_floor.heartbeat_at, v_floor.max_hold_ms, v_floor.max_total_ms) then
    return;
  end if;

  -- Those who have been silent for too long are passed over by the very grant of a later ticket. One that has left is not there.
  select coalesce(jsonb_agg(nightowls._floor_event('floor_skipped', jsonb_build_object(
             'holder', t.holder, 'ticket', t.ticket,
             'silent_ms', floor(extract(epoch from clock_timestamp() - t.polled_at) * 1000))) order by t.ticket)
           filter (where t.ticket < _grant_floor.ticket), '[]')
    into events
    from nightowls.floor_tickets t
   where t.org_id = _grant_floor.org
     and t.container = _grant_floor.container
     and t.ticket > v_floor.ticket
     and t.ticket <= _grant_floor.ticket
     and t.left_at is null
  having bool_or(t.ticket = _grant_floor.ticket)
     and bool_and(t.ticket = _grant_floor.ticket or not nightowls._is_waiting(t.polled_at, t.poll_ms));
  if events is null then
    return;
  end if;

  if v_floor.granted_at is null then
    -- There may have been a floor of this name before.
    select m.fence into v_mark
      from nightowls.floor_marks m
     where m.org_id = _grant_floor.org;
  end if;
  fence := greatest(v_floor.fence + 1, v_mark + 1,
                    (extract(epoch from clock_timestamp() - timestamptz '2020-01-01 00:00:00+00') * 1000)::bigint);
  if v_floor.holder is not null then
    events := nightowls._floor_event('floor_reclaimed', jsonb_build_object(
                'holder', v_floor.holder, 'ticket', v_floor.ticket, 'fence', v_floor.fence, 'new_fence', fence,
                'silent_ms', floor(extract(epoch from clock_timestamp() - v_floor.heartbeat_at) * 1000),
                'held_ms', floor(extract(epoch from clock_timestamp() - v_floor.granted_at) * 1000))) || events;
    perform nightowls._end_ticket(_grant_floor.org, _grant_floor.container, v_floor.ticket);
  end if;
  update nightowls.floor_tickets t
     set fence = _grant_floor.fence, holding = true
   where t.org_id = _grant_floor.org and t.container = _grant_floor.container and t.ticket = _grant_floor.ticket
  returning t.* into v_mine;
  update nightowls.floors f
     set fence = _grant_floor.fence, ticket = v_mine.ticket, holder = v_mine.holder, granted_at = clock_timestamp(),
         heartbeat_at = clock_timestamp(), released_at = null, max_hold_ms = v_mine.max_hold_ms,
         max_total_ms = v_mine.max_total_ms
   where f.org_id = _grant_floor.org and f.container = _grant_floor.container;
  events := events || nightowls._floor_event('floor_granted', jsonb_strip_nulls(jsonb_build_object(
              'holder', v_mine.holder, 'ticket', v_mine.ticket, 'fence', fence, 'request_id', v_mine.request_id,
              'waited_ms', floor(extract(epoch from clock_timestamp() - v_mine.requested_at) * 1000),
              'previous_fence', nullif(v_floor.fence, 0), 'previous_released_at', v_floor.released_at)));

  -- A fence that somebody has been told of must be there after a crash.
  if current_setting('synchronous_commit') = 'off' then
    perform set_config('synchronous_commit', 'on', true);
  end if;

  -- Who is first in line now looks at the new holder's time.
  perform nightowls._wake_next(_grant_floor.org, _grant_floor.container, v_mine.ticket);

  -- Now and then what is long finished goes.
  if v_mine.ticket % 32 = 0 then
    delete from nightowls.floor_tickets t
     where t.org_id = _grant_floor.org
       and t.container = _grant_floor.container
       and t.ticket < v_mine.ticket
       and t.polled_at < clock_timestamp() - interval '1 day'
       and not t.holding;
  end if;
end;
$$;

revoke all on function nightowls._grant_floor(uuid, text, bigint) from public;

-- When to ask again: those further back need not ask as often.
create function nightowls._retry_in(poll_ms int, ahead bigint)
  returns int
  language sql
  immutable
  parallel safe
  return (poll_ms * least(greatest(ahead, 1), 4))::int;

revoke all on function nightowls._retry_in(int, bigint) from public;

-- Writes down the holder's sign of life, at most 20 times in max_hold_ms and once a second.
create function nightowls._beat(org uuid, container text, holder text, fence bigint)
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
  v_due boolean;
begin
  select clock_timestamp() >= f.heartbeat_at + least(f.max_hold_ms / 20, 1000) * interval '1 ms'
    into v_due
    from nightowls.floors f
   where f.org_id = _beat.org and f.container = _beat.container and f.fence = _beat.fence and f.holder = _beat.holder
     and nightowls._is_fresh(f.granted_at, f.heartbeat_at, f.max_hold_ms, f.max_total_ms);
  if v_due is not true then
    return v_due is not null;
  end if;
  update nightowls.floors f
     set heartbeat_at = clock_timestamp()
   where f.org_id = _beat.org and f.container = _beat.container and f.fence = _beat.fence and f.holder = _beat.holder
     and nightowls._is_fresh(f.granted_at, f.heartbeat_at, f.max_hold_ms, f.max_total_ms);
  return found;
end;
$$;

revoke all on function nightowls._beat(uuid, text, text, bigint) from public;

-- The answer, and the events that the caller is to append: handlers of those are the caller's to run.
-- Definer: nobody else may write floors.
create function nightowls._request_floor(
  org          uuid,
  container    text,
  holder       text,
  max_hold_ms  int,
  poll_ms      int,
  request_id   text,
  max_total_ms int,
  out answer   nightowls.floor_answer,
  out events   jsonb
)
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
  v_seen    record;
  v_ticket  bigint;
  v_last    bigint;
  v_waiters bigint;
  v_granted jsonb;
  v_locked  boolean := false;
begin
  answer.granted := false;
  answer.skipped := false;
  loop
    v_seen := nightowls._see_floor(_request_floor.org, _request_floor.container, _request_floor.holder,
                                   _request_floor.request_id, null, true);
    if v_seen.my_holder <> _request_floor.holder then
      raise exception 'request "%" of floor "%" is another holder''s', left(_request_floor.request_id, 64),
          left(_request_floor.container, 64)
        using errcode = 'NW002', hint = 'One request_id names one request; use a new one for a new request.';
    elsif v_seen.mine = v_seen.mark and v_seen.held then
      -- A request that was granted is a sign of life of the holder.
      perform nightowls._beat(_request_floor.org, _request_floor.container, _request_floor.holder, v_seen.fence);
      answer := (true, v_seen.mine, 0, v_seen.fence, null, false)::nightowls.floor_answer;
      return;
    elsif v_seen.mine <= v_seen.mark and v_seen.my_fence is not null and _request_floor.request_id is not null then
      perform nightowls._refuse_lost_request(_request_floor.container, v_seen.mine, v_seen.my_fence);
    elsif v_seen.gone and _request_floor.request_id is not null then
      perform nightowls._refuse_lost_request(_request_floor.container, v_seen.mine, null);
    elsif v_seen.mine > v_seen.mark and v_seen.present then
      v_ticket := v_seen.mine;
      v_waiters := v_seen.waiters;
      _request_floor.poll_ms := v_seen.poll_ms;
      if clock_timestamp() > v_seen.polled_at + nightowls._silence(v_seen.poll_ms) * 0.2 then
        update nightowls.floor_tickets t
           set polled_at = clock_timestamp()
         where t.org_id = _request_floor.org and t.container = _request_floor.container and t.ticket = v_ticket;
      end if;
      exit;
    elsif v_locked then
      exit;
    end if;

    -- A new ticket, drawn under the floor's lock: whoever comes later gets a later one and cannot be granted before.
    loop
      perform
         from nightowls.floors f
        where f.org_id = _request_floor.org and f.container = _request_floor.container
          for no key update;
      exit when found;
      perform nightowls._refuse_no_org(_request_floor.org);
      insert into nightowls.floors (org_id, container)
      values (_request_floor.org, _request_floor.container)
      on conflict do nothing;
    end loop;
    v_locked := true;
  end loop;

  if v_ticket is null then
    if v_seen.mine is not null and v_seen.my_fence is null and not v_seen.gone then
      -- Silent for too long. Who was passed over by a grant has its event already.
      answer.skipped := true;
      if v_seen.mine > v_seen.mark then
        events := jsonb_build_array(nightowls._floor_event('floor_skipped', jsonb_build_object(
                    'holder', _request_floor.holder, 'ticket', v_seen.mine,
                    'silent_ms', floor(extract(epoch from clock_timestamp() - v_seen.polled_at) * 1000))));
      end if;
    end if;
    select max(t.ticket), count(*) filter (where t.left_at is null and nightowls._is_waiting(t.polled_at, t.poll_ms))
      into v_last, v_waiters
      from nightowls.floor_tickets t
     where t.org_id = _request_floor.org and t.container = _request_floor.container and t.ticket > v_seen.mark;
    v_ticket := greatest(v_last, v_seen.mark) + 1;
    if answer.skipped then
      delete from nightowls.floor_tickets t
       where t.org_id = _request_floor.org and t.container = _request_floor.container and t.ticket = v_seen.mine;
    end if;
    insert into nightowls.floor_tickets (org_id, container, ticket, holder, request_id, max_hold_ms, max_total_ms, poll_ms)
    values (_request_floor.org, _request_floor.container, v_ticket, _request_floor.holder, _request_floor.request_id,
            _request_floor.max_hold_ms, _request_floor.max_total_ms, _request_floor.poll_ms);
    -- Who is first in line may have found the floor free and its row locked by this drawing: it looks again after the commit.
    if v_waiters > 0 and not v_seen.held then
      perform nightowls._wake_next(_request_floor.org, _request_floor.container, v_seen.mark);
    end if;
  end if;

  if not v_seen.held and v_waiters = 0 then
    select g.fence, g.events into answer.fence, v_granted
      from nightowls._grant_floor(_request_floor.org, _request_floor.container, v_ticket) g;
    if v_granted is not null then
      events := coalesce(events, '[]') || v_granted;
      answer.granted := true;
    end if;
  end if;
  answer.ticket := v_ticket;
  answer.ahead := case when answer.granted then 0 else greatest(v_waiters + v_seen.held::int, 1) end;
  answer.retry_in_ms := case when not answer.granted then nightowls._retry_in(_request_floor.poll_ms, answer.ahead) end;
end;
$$;

revoke all on function nightowls._request_floor(uuid, text, text, int, int, text, int) from public;

-- Appends what happened to a floor, as the caller.
create function nightowls._append_floor_events(org uuid, container text, events jsonb)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if jsonb_array_length(_append_floor_events.events) = 1 then
    perform nightowls.append_event('floor', _append_floor_events.container, _append_floor_events.events -> 0 ->> 'event_type',
                                   _append_floor_events.events -> 0 -> 'payload', org => _append_floor_events.org);
  else
    perform nightowls.append_events('floor', _append_floor_events.container, _append_floor_events.events,
                                    org => _append_floor_events.org);
  end if;
end;
$$;

revoke all on function nightowls._append_floor_events(uuid, text, jsonb) from public;

create function nightowls.request_floor(
  container    text,
  holder       text,
  max_hold_ms  int default 180000,
  poll_ms      int default 250,
  request_id   text default null,
  max_total_ms int default null,
  org          uuid default null
)
  returns nightowls.floor_answer
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org  uuid := nightowls.current_org(request_floor.org);
  v_done record;
begin
  perform nightowls._check_floor_request(request_floor.container, request_floor.holder, request_floor.max_hold_ms,
                                         request_floor.poll_ms, request_floor.request_id, request_floor.max_total_ms);
  perform nightowls._refuse_floor_isolation();
  v_done := nightowls._request_floor(v_org, request_floor.container, request_floor.holder, request_floor.max_hold_ms,
                                     request_floor.poll_ms, request_floor.request_id, request_floor.max_total_ms);
  if v_done.events is not null then
    perform nightowls._append_floor_events(v_org, request_floor.container, v_done.events);
  end if;
  return v_done.answer;
end;
$$;

comment on function nightowls.request_floor(text, text, int, int, text, int, uuid) is
  'Asks for a floor, and asks again: the first call draws a ticket, each later one is a sign of life and grants the floor when its '
  'turn has come. container: what only one may act on; holder: who asks; max_hold_ms: after so many milliseconds without a '
  'heartbeat it is lost; poll_ms: how often the caller means to ask, who is silent for max(10 * poll_ms, 5000) ms loses its place; '
  'request_id: names this request, so that a retry keeps its place and a late one is known; without it a holder has one request at a '
  'time; max_total_ms: after so many milliseconds it is lost, heartbeats or not; org: the tenant. Later calls change none of these. '
  'Returns a floor_answer. Call it in a transaction of its own. '
  'Waits for another request of the floor that is under way, not for its holder. Raises NW003 if the floor was granted to '
  'this request_id and is held no more, NW002 if the request_id is another holder''s, NW010 if there is no org, 22004, 22023 or '
  '54000 for an argument that is null, not valid or too long, 25001 above read committed.';

revoke all on function nightowls.request_floor(text, text, int, int, text, int, uuid) from public;

-- One look of a waiter, and how long it may sleep before the next one: nap_ms, null if there is none. It must ask again before
-- its last committed poll counts no more.
-- Definer: nobody else may write floors.
create function nightowls._await_step(
  org        uuid,
  container  text,
  holder     text,
  ticket     bigint,
  until      timestamptz,
  first      boolean,
  out answer nightowls.floor_answer,
  out events jsonb,
  out nap_ms int
)
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_seen record;
  v_base bigint := pg_snapshot_xmax(pg_current_snapshot())::text::bigint;
  v_end  timestamptz;
begin
  v_seen := nightowls._see_floor(_await_step.org, _await_step.container, null, null, _await_step.ticket, false);
  if v_seen.mine is null or v_seen.my_holder <> _await_step.holder
     -- Visible and yet in progress: written by this very transaction, which does not change while it waits.
     or _await_step.first
        and pg_xact_status((v_base + nightowls._lock_key(v_seen.written_by::bigint - v_base))::text::xid8) = 'in progress' then
    raise exception 'ticket % of floor "%" is not a committed one of holder "%"', _await_step.ticket,
        left(_await_step.container, 64), left(_await_step.holder, 64)
      using errcode = 'object_not_in_prerequisite_state',
            detail = 'A ticket that nobody else sees has no place in the line.',
            hint = 'Call request_floor first, in a transaction of its own, or call acquire_floor.';
  end if;

  answer := (false, v_seen.mine, null, null, 0, false)::nightowls.floor_answer;
  if v_seen.mine = v_seen.mark and v_seen.held then
    answer := (true, v_seen.mine, 0, v_seen.fence, null, false)::nightowls.floor_answer;
    return;
  elsif v_seen.my_fence is not null or v_seen.gone then
    perform nightowls._refuse_lost_request(_await_step.container, v_seen.mine, v_seen.my_fence);
  elsif v_seen.mine <= v_seen.mark or not v_seen.present then
    answer.skipped := true;
    return;
  end if;

  v_end := least(_await_step.until, v_seen.polled_at + nightowls._silence(v_seen.poll_ms));
  if v_seen.before or v_seen.held then
    nap_ms := greatest(extract(epoch from least(v_seen.changes_at, v_end) - clock_timestamp()) * 1000, 1);
  else
    select g.fence, g.events into answer.fence, events
      from nightowls._grant_floor(_await_step.org, _await_step.container, _await_step.ticket) g;
    if events is not null then
      answer := (true, v_seen.mine, 0, answer.fence, null, false)::nightowls.floor_answer;
      return;
    end if;
    -- A guarded write of the last holder is open, or another's look: it will not tell when it is done.
    nap_ms := least(20, greatest(extract(epoch from v_end - clock_timestamp()) * 1000, 1));
  end if;
  if clock_timestamp() >= v_end then
    nap_ms := null;
    v_seen := nightowls._see_floor(_await_step.org, _await_step.container, null, null, _await_step.ticket, true);
    answer.ahead := greatest(coalesce(v_seen.waiters, 0) + coalesce(v_seen.held, false)::int, 1);
  end if;
end;
$$;

revoke all on function nightowls._await_step(uuid, text, text, bigint, timestamptz, boolean) from public;

-- A look, and the events that follow from it.
create function nightowls._await_turn(
  org        uuid,
  container  text,
  holder     text,
  ticket     bigint,
  until      timestamptz,
  first      boolean,
  out answer nightowls.floor_answer,
  out nap_ms int
)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_step record;
begin
  v_step := nightowls._await_step(_await_turn.org, _await_turn.container, _await_turn.holder, _await_turn.ticket, _await_turn.until,
                                   _await_turn.first);
  if v_step.events is not null then
    perform nightowls._append_floor_events(_await_turn.org, _await_turn.container, v_step.events);
  end if;
  answer := v_step.answer;
  nap_ms := v_step.nap_ms;
end;
$$;

revoke all on function nightowls._await_turn(uuid, text, text, bigint, timestamptz, boolean) from public;

create function nightowls.await_floor(
  container   text,
  holder      text,
  ticket      bigint,
  max_wait_ms int default 4000,
  org         uuid default null
)
  returns nightowls.floor_answer
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org   uuid := nightowls.current_org(await_floor.org);
  v_until timestamptz := nightowls._floor_deadline(await_floor.max_wait_ms);
  v_key   text := nightowls._floor_key(v_org, await_floor.container, await_floor.ticket);
  v_seen  bigint;
  v_turn  record;
  v_nth   int := 0;
begin
  perform nightowls._check_floor_names(await_floor.container, await_floor.holder);
  if await_floor.ticket is null then
    raise exception 'ticket must not be null' using errcode = 'null_value_not_allowed';
  end if;
  perform nightowls._refuse_floor_isolation();

  v_seen := nightowls._wake_count(v_key);
  loop
    v_turn := nightowls._await_turn(v_org, await_floor.container, await_floor.holder, await_floor.ticket, v_until, v_nth = 0);
    exit when v_turn.nap_ms is null;
    v_seen := nightowls._nap(v_key, v_seen, v_nth, v_turn.nap_ms);
    v_nth := v_nth + 1;
  end loop;
  return v_turn.answer;
end;
$$;

comment on function nightowls.await_floor(text, text, bigint, int, uuid) is
  'Waits for the turn of a ticket that request_floor has drawn and that is committed, and returns a floor_answer like it. '
  'container, holder, ticket: as requested and returned; max_wait_ms: how many milliseconds to wait; it returns earlier when the '
  'waiter must ask again to keep its place, max(10 * poll_ms, 5000) ms after its last request_floor; org: the tenant. Not granted: '
  'call request_floor again at once. skipped: the ticket was lost by silence. '
  'Waits, and needs a connection of its own meanwhile; writes and locks nothing before the turn has come. Raises 55000 if the '
  'ticket is not the holder''s or not committed, NW003 if it has had its turn, NW010 if there is no org, 22004, 22023 or 54000 for '
  'an argument that is null, not valid or too long, 25001 above read committed.';

revoke all on function nightowls.await_floor(text, text, bigint, int, uuid) from public;

create function nightowls._floor_deadline(max_wait_ms int)
  returns timestamptz
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if _floor_deadline.max_wait_ms is null then
    raise exception 'max_wait_ms must not be null' using errcode = 'null_value_not_allowed';
  elsif _floor_deadline.max_wait_ms < 0 then
    raise exception 'max_wait_ms must be 0 or more' using errcode = 'invalid_parameter_value';
  end if;
  return clock_timestamp() + _floor_deadline.max_wait_ms * interval '1 ms';
end;
$$;

revoke all on function nightowls._floor_deadline(int) from public;

create function nightowls._is_over(until timestamptz)
  returns boolean
  language sql
  volatile
  parallel unsafe
  return clock_timestamp() >= until;

revoke all on function nightowls._is_over(timestamptz) from public;

-- It pins no search_path, as a procedure that does may not commit: all it names is qualified.
create procedure nightowls.acquire_floor(
  container     text,
  holder        text,
  max_hold_ms   int default 180000,
  poll_ms       int default 250,
  request_id    text default null,
  max_total_ms  int default null,
  max_wait_ms   int default 30000,
  org           uuid default null,
  inout granted boolean default null,
  inout ticket  bigint default null,
  inout ahead   bigint default null,
  inout fence   bigint default null
)
  language plpgsql
as $$
#variable_conflict use_column
declare
  v_org    uuid := nightowls.current_org(acquire_floor.org);
  v_until  timestamptz := nightowls._floor_deadline(acquire_floor.max_wait_ms);
  v_answer nightowls.floor_answer;
  v_key    text;
  v_seen   bigint;
  v_turn   record;
  v_nth    int := 0;
begin
  <<asking>>
  loop
    v_answer := nightowls.request_floor(
      acquire_floor.container, acquire_floor.holder, acquire_floor.max_hold_ms, acquire_floor.poll_ms,
      acquire_floor.request_id, acquire_floor.max_total_ms, v_org);
    commit;
    exit when v_answer.granted;
    v_key := nightowls._floor_key(v_org, acquire_floor.container, v_answer.ticket);
    loop
      v_seen := nightowls._wake_count(v_key);
      v_turn := nightowls._await_turn(v_org, acquire_floor.container, acquire_floor.holder, v_answer.ticket, v_until, false);
      v_answer := v_turn.answer;
      commit;
      exit asking when v_answer.granted or v_turn.nap_ms is null and nightowls._is_over(v_until);
      exit when v_turn.nap_ms is null;
      call nightowls._nap_without_snapshot(v_key, v_seen, v_nth, v_turn.nap_ms);
      v_nth := v_nth operator(pg_catalog.+) 1;
    end loop;
  end loop;
  granted := v_answer.granted;
  ticket := v_answer.ticket;
  ahead := v_answer.ahead;
  fence := v_answer.fence;
end;
$$;

comment on procedure nightowls.acquire_floor(text, text, int, int, text, int, int, uuid, boolean, bigint, bigint, bigint) is
  'Requests a floor, commits, and waits for it, all in one CALL; returns granted, ticket, ahead and fence. container … max_total_ms, '
  'org: as in request_floor; max_wait_ms: how many milliseconds to wait; granted, ticket, ahead, fence: leave them out. Not granted in '
  'time: the ticket keeps its place for max(10 * poll_ms, 5000) ms, CALL again. '
  'Waits, with a connection of its own and no snapshot older than 250 ms. Raises 2D000 inside a transaction block or function, 22004 '
  'or 22023 for max_wait_ms, and what request_floor raises.';

revoke all on procedure nightowls.acquire_floor(text, text, int, int, text, int, int, uuid, boolean, bigint, bigint, bigint)
  from public;

-- Ends a ticket that waits or holds, and the event to append. The floor is locked first, as by a grant: what is waiting then is
-- not being granted.
-- Definer: nobody else may write floors.
create function nightowls._leave_floor(
  org       uuid,
  container text,
  holder    text,
  ticket    bigint,
  out done  boolean,
  out events jsonb
)
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
  v_floor nightowls.floors;
begin
  done := false;
  select f.* into v_floor
    from nightowls.floors f
   where f.org_id = _leave_floor.org and f.container = _leave_floor.container
     for no key update;
  if not found then
    return;
  elsif v_floor.ticket = _leave_floor.ticket then
    done := nightowls._release_floor(_leave_floor.org, _leave_floor.container, _leave_floor.holder, v_floor.fence);
    return;
  end if;
  update nightowls.floor_tickets t
     set left_at = clock_timestamp()
   where t.org_id = _leave_floor.org and t.container = _leave_floor.container and t.ticket = _leave_floor.ticket
     and t.holder = _leave_floor.holder and t.ticket > v_floor.ticket and t.left_at is null
     and nightowls._is_waiting(t.polled_at, t.poll_ms)
  returning jsonb_build_array(nightowls._floor_event('floor_left', jsonb_build_object(
              'holder', t.holder, 'ticket', t.ticket,
              'waited_ms', floor(extract(epoch from clock_timestamp() - t.requested_at) * 1000))))
    into events;
  if found then
    done := true;
    perform nightowls._wake_next(_leave_floor.org, _leave_floor.container, _leave_floor.ticket);
  end if;
end;
$$;

revoke all on function nightowls._leave_floor(uuid, text, text, bigint) from public;

create function nightowls.leave_floor(container text, holder text, ticket bigint, org uuid default null)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org  uuid := nightowls.current_org(leave_floor.org);
  v_done record;
begin
  perform nightowls._check_floor_names(leave_floor.container, leave_floor.holder);
  if leave_floor.ticket is null then
    raise exception 'ticket must not be null' using errcode = 'null_value_not_allowed';
  end if;
  v_done := nightowls._leave_floor(v_org, leave_floor.container, leave_floor.holder, leave_floor.ticket);
  if v_done.events is not null then
    perform nightowls._append_floor_events(v_org, leave_floor.container, v_done.events);
  end if;
  return v_done.done;
end;
$$;

comment on function nightowls.leave_floor(text, text, bigint, uuid) is
  'Gives up a ticket: leaves the line, or gives the floor back if the ticket was granted meanwhile. True if it was waiting or held; '
  'false if it was not, was skipped, or is another holder''s, and then nothing is changed. container, holder, ticket: as requested and '
  'returned; org: the tenant. A late retry of a request that has left gets NW003 where it has a request_id. '
  'Waits for a request or grant of the floor that is under way. Raises NW010 if there is no org, 22004, 22023 or 54000 for an '
  'argument that is null, empty or too long.';

revoke all on function nightowls.leave_floor(text, text, bigint, uuid) from public;

-- Holding -------------------------------------------------------------------------------------------

create function nightowls._check_floor_fence(container text, holder text, fence bigint)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform nightowls._check_floor_names(_check_floor_fence.container, _check_floor_fence.holder);
  if _check_floor_fence.fence is null then
    raise exception 'fence must not be null' using errcode = 'null_value_not_allowed';
  end if;
end;
$$;

revoke all on function nightowls._check_floor_fence(text, text, bigint) from public;

create function nightowls.heartbeat_floor(container text, holder text, fence bigint, org uuid default null)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform nightowls._check_floor_fence(heartbeat_floor.container, heartbeat_floor.holder, heartbeat_floor.fence);
  return nightowls._beat(nightowls.current_org(heartbeat_floor.org), heartbeat_floor.container, heartbeat_floor.holder,
                         heartbeat_floor.fence);
end;
$$;

comment on function nightowls.heartbeat_floor(text, text, bigint, uuid) is
  'The holder''s sign of life: true while the floor is held with this fence, false if it is lost, and then nothing is changed. '
  'container, holder, fence: as granted; org: the tenant. Call it several times in max_hold_ms. It is written down at most 20 '
  'times in max_hold_ms and once a second, so the last twentieth of max_hold_ms (at most a second) is not to be counted on. '
  'Does not wait for guarded writes. Raises NW010 if there is no org, 22004, 22023 or 54000 for an argument that is null, empty or '
  'too long.';

revoke all on function nightowls.heartbeat_floor(text, text, bigint, uuid) from public;

-- Definer: nobody else may write floors.
create function nightowls._release_floor(org uuid, container text, holder text, fence bigint)
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
  v_ticket bigint;
begin
  update nightowls.floors f
     set holder = null, released_at = clock_timestamp()
   where f.org_id = _release_floor.org and f.container = _release_floor.container and f.fence = _release_floor.fence
     and f.holder = _release_floor.holder
     and nightowls._is_fresh(f.granted_at, f.heartbeat_at, f.max_hold_ms, f.max_total_ms)
  returning f.ticket into v_ticket;
  if not found then
    return false;
  end if;
  perform nightowls._end_ticket(_release_floor.org, _release_floor.container, v_ticket);
  perform nightowls._wake_next(_release_floor.org, _release_floor.container, v_ticket);
  return true;
end;
$$;

revoke all on function nightowls._release_floor(uuid, text, text, bigint) from public;

create function nightowls.release_floor(container text, holder text, fence bigint, org uuid default null)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform nightowls._check_floor_fence(release_floor.container, release_floor.holder, release_floor.fence);
  return nightowls._release_floor(nightowls.current_org(release_floor.org), release_floor.container, release_floor.holder,
                                  release_floor.fence);
end;
$$;

comment on function nightowls.release_floor(text, text, bigint, uuid) is
  'Gives the floor back: true if it was held with this fence, false if it was lost or released before, and then nothing is '
  'changed. container, holder, fence: as granted; org: the tenant. In the transaction of the last guarded write both commit together. '
  'Does not wait for guarded writes, but the next grant does. Raises NW010 if there is no org, 22004, 22023 or 54000 for an '
  'argument that is null, empty or too long.';

revoke all on function nightowls.release_floor(text, text, bigint, uuid) from public;

-- Seeing ----------------------------------------------------------------------------------------------

create view nightowls.floor_status
  with (security_invoker = true)
as
  select f.org_id, f.container,
         case when f.holder is null then 'free'
              when nightowls._is_fresh(f.granted_at, f.heartbeat_at, f.max_hold_ms, f.max_total_ms) then 'held'
              else 'stale' end as status,
         f.holder, f.ticket, f.fence, f.granted_at, f.heartbeat_at,
         case when f.holder is not null then
           least(f.heartbeat_at + f.max_hold_ms * interval '1 ms', f.granted_at + f.max_total_ms * interval '1 ms') end as expires_at,
         f.released_at, w.waiting, w.waiting_since
    from nightowls.floors f
   cross join lateral (
           select count(*) as waiting, min(t.requested_at) as waiting_since
             from nightowls.floor_tickets t
            where t.org_id = f.org_id and t.container = f.container and t.ticket > f.ticket
              and t.left_at is null and nightowls._is_waiting(t.polled_at, t.poll_ms)) w;

comment on view nightowls.floor_status is 'Who has which floor, until when, and how many are waiting.';
comment on column nightowls.floor_status.org_id is 'The tenant.';
comment on column nightowls.floor_status.container is 'The floor.';
comment on column nightowls.floor_status.status is 'free, held, or stale: its holder''s time is over, the next to ask gets it.';
comment on column nightowls.floor_status.holder is 'Who has it; null when free.';
comment on column nightowls.floor_status.ticket is 'The ticket of the last grant.';
comment on column nightowls.floor_status.fence is 'The fence of the last grant.';
comment on column nightowls.floor_status.granted_at is 'When it was last granted.';
comment on column nightowls.floor_status.heartbeat_at is 'The holder''s last sign of life that was written down.';
comment on column nightowls.floor_status.expires_at is 'When the holder loses it if nothing is heard of it; null when free.';
comment on column nightowls.floor_status.released_at is 'When it was released.';
comment on column nightowls.floor_status.waiting is 'How many are in line.';
comment on column nightowls.floor_status.waiting_since is 'When the longest waiting of them asked first.';
