-- The queue: its tables, its lines, and the marks that keep reading flat. Sending, reading and settling have files of their own.
--
-- One static set of tables serves all queues. A message that can be read stands in the ready line of its priority, in the order
-- of line numbers; one that cannot be read yet stands in the delayed line, in the order of time. Reading starts at a mark, so
-- that it does not walk over what is dead but still there. docs/architecture.md says why a mark hides nothing.

create table nightowls.queues (
  org_id            uuid        not null,
  name              text        collate "C" not null,
  queue_id          int         not null generated always as identity,
  vt                int         not null default 30,
  max_attempts      int,
  dead_letter_queue text        collate "C",
  backoff           interval    not null default '1 second',
  max_backoff       interval    not null default '1 hour',
  dedup_for         interval,
  on_other_body     text        not null default 'raise',
  archive_acked     boolean     not null default false,
  retention         interval    not null default '30 days',
  paused_at         timestamptz,
  created_at        timestamptz not null default clock_timestamp(),
  notify            boolean     not null default false,
  constraint queues_pkey primary key (org_id, name),
  constraint queues_queue_id_key unique (org_id, queue_id),
  constraint queues_on_other_body_check check (on_other_body in ('raise', 'report'))
);

comment on table nightowls.queues is 'The queues there are and their policies. Kept by create_queue, alter_queue, pause_queue and drop_queue.';
comment on column nightowls.queues.org_id is 'The tenant.';
comment on column nightowls.queues.name is 'The queue''s name, unique within the org, ASCII letters in lower case.';
comment on column nightowls.queues.queue_id is 'Its number; never used again after the queue is dropped.';
comment on column nightowls.queues.vt is 'Seconds for which a reader that names none has a message to itself.';
comment on column nightowls.queues.max_attempts is 'How often a message is delivered before it is a dead letter; null: without limit.';
comment on column nightowls.queues.dead_letter_queue is
  'The queue that dead letters are moved to; null: they stay here, unread, until redrive or purge_queue.';
comment on column nightowls.queues.backoff is 'The pause after the first failure; it doubles with each further one.';
comment on column nightowls.queues.max_backoff is 'The longest pause after a failure.';
comment on column nightowls.queues.dedup_for is 'How long a dedup key counts where send names no time; null: until the message is done.';
comment on column nightowls.queues.on_other_body is
  'What send does with a known dedup key and another message: raise NW002, or report it as a warning and return the first id.';
comment on column nightowls.queues.archive_acked is 'Whether ack archives messages instead of deleting them.';
comment on column nightowls.queues.retention is 'How long purge_archive keeps archived messages where it names no time.';
comment on column nightowls.queues.paused_at is 'Since when nothing is delivered; null: it is not paused.';
comment on column nightowls.queues.created_at is 'When the queue was made.';
comment on column nightowls.queues.notify is 'Whether who listens on channel nightowls_queues is told of messages.';

-- The numbers of messages and of their places in line; one sequence for all. Every draw follows _hold_line() in its transaction.
create sequence nightowls.queue_line_no as bigint cache 1;

comment on sequence nightowls.queue_line_no is 'Numbers messages and their places in line.';

-- No check constraints: each is parsed anew by every statement that writes, and nobody but our functions does.
-- What a claim changes is in no index and no predicate, and pages are more than half empty: so claims are heap-only updates even while
-- an old snapshot keeps every version.
create table nightowls.queue_messages (
  org_id       uuid        not null,
  queue_id     int         not null,
  priority     smallint    not null default 0,
  state        "char"      not null default 'r',
  msg_id       bigint      not null,
  line_no      bigint      not null,
  due_at       timestamptz not null default clock_timestamp(),
  enqueued_at  timestamptz not null default clock_timestamp(),
  read_ct      int         not null default 0,
  lease_until  timestamptz,
  last_read_at timestamptz,
  receipt      uuid,
  group_key    text        collate "C",
  dedup_key    text        collate "C",
  last_error   text,
  source       jsonb,
  headers      jsonb,
  message      jsonb       not null,
  constraint queue_messages_pkey primary key (org_id, queue_id, msg_id)
) with (
  fillfactor = 42, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0,
  autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 10000,
  autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 20000
);

create index queue_messages_ready_idx on nightowls.queue_messages (org_id, queue_id, priority, line_no) where state = 'r';
create index queue_messages_delayed_idx on nightowls.queue_messages (org_id, queue_id, due_at) where state in ('d', 's', 'x');
-- One message of a group at a time is at its head: this makes sure of it.
create unique index queue_messages_head_key on nightowls.queue_messages (org_id, queue_id, group_key)
  where group_key is not null and state in ('r', 'd');
create index queue_messages_waiting_idx on nightowls.queue_messages (org_id, queue_id, group_key, msg_id) where state = 'w';

comment on table nightowls.queue_messages is
  'The messages of all queues that are not done. Written by the functions of the queue only: a row changed by hand can be lost.';
comment on column nightowls.queue_messages.org_id is 'The tenant.';
comment on column nightowls.queue_messages.queue_id is 'The queue, by its number.';
comment on column nightowls.queue_messages.priority is '0 to 9; 9 is read first.';
comment on column nightowls.queue_messages.state is
  'r: in the ready line, leased or not; d: in the delayed line; w: waits behind another message of its group; x: a dead letter; '
  's: done, but its group has yet to go on.';
comment on column nightowls.queue_messages.msg_id is 'The message''s id: rising with gaps; kept for life.';
comment on column nightowls.queue_messages.line_no is 'Its place in the ready line; a new one each time it joins the line.';
comment on column nightowls.queue_messages.due_at is 'When it may be read, in the delayed line (infinity: a dead letter); when it was due, in the ready line.';
comment on column nightowls.queue_messages.enqueued_at is 'The clock when it was sent.';
comment on column nightowls.queue_messages.read_ct is 'How often it was delivered.';
comment on column nightowls.queue_messages.lease_until is 'Until when its reader has it to itself.';
comment on column nightowls.queue_messages.last_read_at is 'When it was last delivered.';
comment on column nightowls.queue_messages.receipt is 'What its reader shows to settle it; random with each delivery.';
comment on column nightowls.queue_messages.group_key is 'Messages of one group are delivered in order, one at a time.';
comment on column nightowls.queue_messages.dedup_key is 'The key it was sent with.';
comment on column nightowls.queue_messages.last_error is 'What nack said last.';
comment on column nightowls.queue_messages.source is 'Of a dead letter that was moved here: where it came from; replay: of one that was sent again.';
comment on column nightowls.queue_messages.headers is 'What the sender says about the message.';
comment on column nightowls.queue_messages.message is 'The message, any JSON of at most 100 levels and 16 MB.';

-- Where reading begins, per queue and priority: the greatest row counts. Insert-only, so that finding it stays one probe
-- while an old snapshot keeps the rows before. A row with a priority above 0 also says that this priority is in use.
create table nightowls.queue_marks (
  org_id   uuid        not null,
  queue_id int         not null,
  priority smallint    not null,
  mark     bigint      not null,
  mark_id  uuid        not null default gen_random_uuid(),
  made_at  timestamptz not null default clock_timestamp(),
  constraint queue_marks_pkey primary key (org_id, queue_id, priority, mark, mark_id)
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);

comment on table nightowls.queue_marks is
  'Where reading a queue begins: below the greatest mark of a priority nothing can be read any more, whatever still commits.';
comment on column nightowls.queue_marks.org_id is 'The tenant.';
comment on column nightowls.queue_marks.queue_id is 'The queue.';
comment on column nightowls.queue_marks.priority is 'The priority it is for.';
comment on column nightowls.queue_marks.mark is 'The line number where reading begins.';
comment on column nightowls.queue_marks.mark_id is 'Tells rows apart, so that nobody waits for another to write the same mark.';
comment on column nightowls.queue_marks.made_at is 'When it was made.';

-- The same for the delayed line.
create table nightowls.queue_due_marks (
  org_id   uuid        not null,
  queue_id int         not null,
  mark     timestamptz not null,
  mark_id  uuid        not null default gen_random_uuid(),
  constraint queue_due_marks_pkey primary key (org_id, queue_id, mark, mark_id)
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);

comment on table nightowls.queue_due_marks is 'Where looking for messages that are due begins: at the latest mark.';
comment on column nightowls.queue_due_marks.org_id is 'The tenant.';
comment on column nightowls.queue_due_marks.queue_id is 'The queue.';
comment on column nightowls.queue_due_marks.mark is 'Before this time nothing is waiting in the delayed line.';
comment on column nightowls.queue_due_marks.mark_id is 'Tells rows apart, so that nobody waits for another to write the same mark.';

create table nightowls.queue_dedup (
  org_id     uuid        not null,
  queue_id   int         not null,
  dedup_key  text        collate "C" not null,
  msg_id     bigint      not null,
  body       bytea       not null,
  expires_at timestamptz,
  constraint queue_dedup_pkey primary key (org_id, queue_id, dedup_key)
);

create index queue_dedup_expires_at_idx on nightowls.queue_dedup (org_id, queue_id, expires_at) where expires_at is not null;

comment on table nightowls.queue_dedup is 'The dedup keys that count, and the message each was first sent with.';
comment on column nightowls.queue_dedup.org_id is 'The tenant.';
comment on column nightowls.queue_dedup.queue_id is 'The queue.';
comment on column nightowls.queue_dedup.dedup_key is 'The sender''s key.';
comment on column nightowls.queue_dedup.msg_id is 'The message it was first sent with.';
comment on column nightowls.queue_dedup.body is 'SHA-256 of that message.';
comment on column nightowls.queue_dedup.expires_at is 'Until when the key counts; null: until the message is done.';

create table nightowls.queue_archive (
  org_id       uuid        not null,
  queue_id     int         not null,
  msg_id       bigint      not null,
  priority     smallint    not null,
  read_ct      int         not null,
  enqueued_at  timestamptz not null,
  last_read_at timestamptz,
  archived_at  timestamptz not null default clock_timestamp(),
  group_key    text        collate "C",
  dedup_key    text        collate "C",
  last_error   text,
  source       jsonb,
  headers      jsonb,
  message      jsonb       not null,
  constraint queue_archive_pkey primary key (org_id, queue_id, msg_id)
);

create index queue_archive_archived_at_idx on nightowls.queue_archive (org_id, queue_id, archived_at);

comment on table nightowls.queue_archive is 'Messages that are done and were kept, until purge_archive.';
comment on column nightowls.queue_archive.org_id is 'The tenant.';
comment on column nightowls.queue_archive.queue_id is 'The queue.';
comment on column nightowls.queue_archive.msg_id is 'The message''s id.';
comment on column nightowls.queue_archive.priority is 'Its priority.';
comment on column nightowls.queue_archive.read_ct is 'How often it was delivered.';
comment on column nightowls.queue_archive.enqueued_at is 'When it was sent.';
comment on column nightowls.queue_archive.last_read_at is 'When it was last delivered.';
comment on column nightowls.queue_archive.archived_at is 'When it was archived.';
comment on column nightowls.queue_archive.group_key is 'Its group.';
comment on column nightowls.queue_archive.dedup_key is 'The key it was sent with.';
comment on column nightowls.queue_archive.last_error is 'What nack said last.';
comment on column nightowls.queue_archive.source is 'Of a dead letter: where it came from; replay: of one that was sent again.';
comment on column nightowls.queue_archive.headers is 'What the sender said about the message.';
comment on column nightowls.queue_archive.message is 'The message.';

create type nightowls.queue_message as (
  msg_id       bigint,
  read_ct      int,
  enqueued_at  timestamptz,
  last_read_at timestamptz,
  vt           timestamptz,
  message      jsonb,
  headers      jsonb,
  receipt      uuid
);

comment on type nightowls.queue_message is
  'A message as a reader gets it: its id, how often and when it was delivered, until when the reader has it to itself (vt), what '
  'was sent, and the receipt that settles it.';

-- Names -------------------------------------------------------------------------------------------

-- A queue's name as it is kept: ASCII letters in lower case, everything else as it is.
create function nightowls._queue_name(name text)
  returns text
  language sql
  immutable
  parallel safe
  return lower(name collate "C");

revoke all on function nightowls._queue_name(text) from public;

create function nightowls._refuse_queue(org uuid, name text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform nightowls._refuse_unknown(
    'queue', _refuse_queue.name,
    array(select q.name::text from nightowls.queues q where q.org_id = _refuse_queue.org order by q.name));
end;
$$;

revoke all on function nightowls._refuse_queue(uuid, text) from public;

-- The queue of that name.
create function nightowls._queue(org uuid, name text)
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
   where q.org_id = _queue.org and q.name = nightowls._queue_name(_queue.name);
  if not found then
    perform nightowls._refuse_queue(_queue.org, _queue.name);
  end if;
  return v_queue;
end;
$$;

revoke all on function nightowls._queue(uuid, text) from public;

-- Holds and locks ---------------------------------------------------------------------------------

-- Lock classes: base + 264 a group of a queue, base + 267 all groups of a queue, base + 512..767 a hold of line numbers by org
-- (by hash), base + 768 such a hold against all orgs.
--
-- nightowls.line remembers what the transaction holds: <xid>|<class>:<line number>|…#<key of a group>,…; a rolled-back savepoint
-- takes locks and memory together.

-- The last line number drawn. Never null, also before the first draw: lower than the truth does no harm.
create function nightowls._last_line()
  returns bigint
  language sql
  volatile
  parallel unsafe
  return coalesce(pg_sequence_last_value('nightowls.queue_line_no'::regclass), 0);

revoke all on function nightowls._last_line() from public;

-- The hold, taken before a line number is drawn, as an append takes it for positions. After 8 classes comes the one that is held
-- against all. last: _last_line(), read before. It runs in functions of the owner's, which have pinned the search_path.
create function nightowls._hold_line_again(org uuid, last bigint)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
as $$
#variable_conflict use_column
declare
  v_class int := nightowls._org_class(_hold_line_again.org);
  v_held  text := current_setting('nightowls.line', true);
  v_mark  bigint;
begin
  if starts_with(v_held, pg_current_xact_id()::text || '|') is not true then
    -- A session's setting is not ours.
    v_held := pg_current_xact_id()::text || '|#';
  elsif strpos(v_held, '|256:') > 0 or length(v_held) - length(replace(v_held, ':', '')) >= 8 then
    v_class := 256;
  end if;
  v_mark := nullif(split_part(split_part(v_held, '|' || v_class || ':', 2), '|', 1), '')::bigint;
  if v_mark <= _hold_line_again.last then
    -- Asked for again, which costs nothing when it is held: a setting can be forged, a lock cannot.
    return pg_advisory_xact_lock_shared(nightowls._lock_class(512 + v_class), nightowls._lock_key(v_mark)) is not null;
  end if;
  return pg_advisory_xact_lock_shared(nightowls._lock_class(512 + v_class), nightowls._lock_key(_hold_line_again.last)) is not null
     and set_config('nightowls.line', replace(v_held, '#', v_class || ':' || _hold_line_again.last || '|#'), true) <> '';
end;
$$;

revoke all on function nightowls._hold_line_again(uuid, bigint) from public;

-- The first hold of a transaction, mostly the only one, in an expression.
create function nightowls._hold_line(org uuid, last bigint)
  returns boolean
  language sql
  volatile
  parallel unsafe
  return case
    when current_setting('nightowls.line', true) <> '' then nightowls._hold_line_again(org, last)
    else pg_advisory_xact_lock_shared(nightowls._lock_class(512 + nightowls._org_class(org)), nightowls._lock_key(last)) is not null
         and set_config('nightowls.line',
                        concat(pg_current_xact_id()::text, '|', nightowls._org_class(org), ':', last, '|#'), true) is not null
  end;

revoke all on function nightowls._hold_line(uuid, bigint) from public;

-- The last line number drawn, and the last at or below which no row of anybody else's can appear any more for this org. Read in
-- this order, each in a statement of its own. What this transaction has drawn, its own statements see.
create function nightowls._safe_line(org uuid, out last bigint, out safe bigint)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  select case when s.is_called then s.last_value else s.last_value - 1 end into last from nightowls.queue_line_no s;
  safe := least(last, (
    select min(last - ((last - l.objid::bigint) & 4294967295))
      from pg_locks l
     where l.locktype = 'advisory'
       and l.objsubid = 2
       and l.pid is distinct from pg_backend_pid()
       and l.database = (select d.oid from pg_database d where d.datname = current_database())
       and l.classid::bigint in (nightowls._lock_class(512 + nightowls._org_class(_safe_line.org)), nightowls._lock_class(768))));
end;
$$;

revoke all on function nightowls._safe_line(uuid) from public;

-- Locks a group of a queue until the transaction ends: whoever sends to it, or lets it go on, has it. With wait false: or says
-- that somebody else has it. A transaction that has locked 24 groups locks all groups of the queue from then on.
create function nightowls._lock_group(org uuid, queue_id int, group_key text, wait boolean)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_all  int := hashtext(_lock_group.org::text || '/' || _lock_group.queue_id);
  v_one  int := hashtext(_lock_group.org::text || '/' || _lock_group.queue_id || '/' || _lock_group.group_key);
  v_held text := current_setting('nightowls.line', true);
  v_many boolean;
begin
  if not coalesce(starts_with(v_held, pg_current_xact_id()::text || '|'), false) then
    v_held := pg_current_xact_id()::text || '|#';
  end if;
  v_many := strpos(v_held, '#' || v_one || ',') = 0 and strpos(v_held, ',' || v_one || ',') = 0
            and length(v_held) - length(replace(v_held, ',', '')) >= 24;
  if _lock_group.wait then
    if v_many then
      perform pg_advisory_xact_lock(nightowls._lock_class(267), v_all);
      return true;
    end if;
    perform pg_advisory_xact_lock_shared(nightowls._lock_class(267), v_all);
    perform pg_advisory_xact_lock(nightowls._lock_class(264), v_one);
  elsif v_many then
    return pg_try_advisory_xact_lock(nightowls._lock_class(267), v_all);
  elsif not pg_try_advisory_xact_lock_shared(nightowls._lock_class(267), v_all)
     or not pg_try_advisory_xact_lock(nightowls._lock_class(264), v_one) then
    return false;
  end if;
  if strpos(v_held, '#' || v_one || ',') = 0 and strpos(v_held, ',' || v_one || ',') = 0 then
    perform set_config('nightowls.line', v_held || v_one || ',', true);
  end if;
  return true;
end;
$$;

revoke all on function nightowls._lock_group(uuid, int, text, boolean) from public;

create function nightowls._lock_all_groups(org uuid, queue_id int)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform pg_advisory_xact_lock(nightowls._lock_class(267), hashtext(_lock_all_groups.org::text || '/' || _lock_all_groups.queue_id));
end;
$$;

revoke all on function nightowls._lock_all_groups(uuid, int) from public;

-- Waking ------------------------------------------------------------------------------------------

-- A waiting reader naps for 'queue/<queue_id>' (_read_nap). Whoever puts a message into the ready line or, for its time, into the
-- delayed one wakes as many as there are messages.

-- Tells who listens, once a transaction and queue, as Postgres drops repetitions. Nobody waits for it but at commit.
create function nightowls._notify_queue(org uuid, name text)
  returns boolean
  language sql
  volatile
  parallel unsafe
  return pg_notify('nightowls_queues', concat(org, ':', name)) is not null;

revoke all on function nightowls._notify_queue(uuid, text) from public;

create function nightowls._announce(org uuid, queue_id int, qty int)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set plan_cache_mode to force_generic_plan
as $$
#variable_conflict use_column
begin
  -- Below zero are the queues of endpoints, from which senders read.
  if _announce.qty > 0
     and nightowls._wake(case when _announce.queue_id < 0 then 'dispatch' else 'queue/' || _announce.queue_id end, _announce.qty) then
    perform nightowls._notify_queue(q.org_id, q.name)
       from nightowls.queues q
      where q.org_id = _announce.org and q.queue_id = _announce.queue_id and q.notify;
  end if;
end;
$$;

revoke all on function nightowls._announce(uuid, int, int) from public;

-- Marks -------------------------------------------------------------------------------------------

-- Says that a priority is in use in a queue, if nobody has yet.
create function nightowls._use_priority(org uuid, queue_id int, priority int)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if _use_priority.priority > 0 then
    insert into nightowls.queue_marks (org_id, queue_id, priority, mark)
    select _use_priority.org, _use_priority.queue_id, _use_priority.priority, 0
     where not exists (
             select from nightowls.queue_marks k
              where k.org_id = _use_priority.org and k.queue_id = _use_priority.queue_id and k.priority = _use_priority.priority);
  end if;
end;
$$;

revoke all on function nightowls._use_priority(uuid, int, int) from public;

-- Moves the mark of a priority up to the first message that is still there, in the reader's own transaction: rolled back,
-- it goes with the acks it relied on. Messages that a slow worker has had for five seconds leave the line first, so that
-- neither mark nor readers stick behind them; they keep their receipts. It looks at one message, or, where that one is slow, at the
-- thousand that follow: never at the whole line.
create function nightowls._move_mark(org uuid, queue_id int, priority int)
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
  v_mark  bigint;
  v_safe  bigint;
  v_first record;
  v_tids  tid[];
begin
  if current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
    -- Its snapshot is older than what it would read now.
    return;
  end if;
  v_mark := coalesce((
    select k.mark
      from nightowls.queue_marks k
     where k.org_id = _move_mark.org and k.queue_id = _move_mark.queue_id and k.priority = _move_mark.priority
     order by k.mark desc
     limit 1), 0);

  loop
    -- Each in a statement of its own: what is safe, then what is there.
    v_safe := (nightowls._safe_line(_move_mark.org)).safe;
    select m.line_no,
           m.lease_until > clock_timestamp() and m.last_read_at < clock_timestamp() - interval '5 seconds' as slow
      into v_first
      from nightowls.queue_messages m
     where m.org_id = _move_mark.org and m.queue_id = _move_mark.queue_id and m.priority = _move_mark.priority
       and m.state = 'r' and m.line_no >= v_mark
     order by m.line_no
     limit 1;
    exit when v_first.slow is not true or v_tids is not null;
    v_tids := array(
      select m.ctid
        from nightowls.queue_messages m
       where m.org_id = _move_mark.org and m.queue_id = _move_mark.queue_id and m.priority = _move_mark.priority
         and m.state = 'r' and m.line_no >= v_first.line_no
         and m.line_no < coalesce((
               select o.line_no
                 from nightowls.queue_messages o
                where o.org_id = _move_mark.org and o.queue_id = _move_mark.queue_id and o.priority = _move_mark.priority
                  and o.state = 'r' and o.line_no >= v_first.line_no
                order by o.line_no
               offset 1000
                limit 1), 9223372036854775807)
         and m.lease_until > clock_timestamp() and m.last_read_at < clock_timestamp() - interval '5 seconds'
       order by m.line_no
         for update skip locked);
    if v_tids <> '{}' and nightowls._hold_line(_move_mark.org, nightowls._last_line()) then
      update nightowls.queue_messages m
         set state = 'd', due_at = m.lease_until, line_no = n.line_no
        from (select t.tid, nextval('nightowls.queue_line_no') as line_no from unnest(v_tids) as t (tid) offset 0) n
       where m.ctid = n.tid and m.lease_until > clock_timestamp();
    end if;
  end loop;

  if least(v_first.line_no, v_safe + 1) > v_mark + 16 then
    insert into nightowls.queue_marks (org_id, queue_id, priority, mark)
    values (_move_mark.org, _move_mark.queue_id, _move_mark.priority, least(v_first.line_no, v_safe + 1));
    delete from nightowls.queue_marks k
     where k.ctid = any (array(
             select o.ctid
               from nightowls.queue_marks o
              where o.org_id = _move_mark.org and o.queue_id = _move_mark.queue_id and o.priority = _move_mark.priority
                and o.mark < v_mark
              order by o.mark desc
              limit 8
                for update skip locked));
  end if;
end;
$$;

revoke all on function nightowls._move_mark(uuid, int, int) from public;

-- The same for each priority that is in use.
create function nightowls._move_marks(org uuid, queue_id int)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_priority int;
begin
  foreach v_priority in array array(
    select 0
     union
    select k.priority
      from nightowls.queue_marks k
     where k.org_id = _move_marks.org and k.queue_id = _move_marks.queue_id)
  loop
    perform nightowls._move_mark(_move_marks.org, _move_marks.queue_id, v_priority);
  end loop;
end;
$$;

revoke all on function nightowls._move_marks(uuid, int) from public;

-- Moves the mark of the delayed line up to the first message in it. A message joins that line after it has drawn a number,
-- and is due later than that; so when nobody holds a number below the last one drawn, whoever joins from now on is due after now.
create function nightowls._move_due_mark(org uuid, queue_id int)
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
  -- A clock that is set back by less than a minute hides nothing.
  v_now   timestamptz := clock_timestamp() - interval '1 minute';
  v_line  record;
  v_mark  timestamptz;
  v_first timestamptz;
begin
  if current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
    return;
  end if;
  v_line := nightowls._safe_line(_move_due_mark.org);
  if v_line.safe < v_line.last then
    return;
  end if;
  v_mark := coalesce((
    select k.mark
      from nightowls.queue_due_marks k
     where k.org_id = _move_due_mark.org and k.queue_id = _move_due_mark.queue_id
     order by k.mark desc
     limit 1), '-infinity');
  select m.due_at into v_first
    from nightowls.queue_messages m
   where m.org_id = _move_due_mark.org and m.queue_id = _move_due_mark.queue_id
     and m.state in ('d', 's', 'x') and m.due_at >= v_mark
   order by m.due_at
   limit 1;
  if least(v_first, v_now) > v_mark then
    insert into nightowls.queue_due_marks (org_id, queue_id, mark)
    values (_move_due_mark.org, _move_due_mark.queue_id, least(v_first, v_now));
    delete from nightowls.queue_due_marks k
     where k.ctid = any (array(
             select o.ctid
               from nightowls.queue_due_marks o
              where o.org_id = _move_due_mark.org and o.queue_id = _move_due_mark.queue_id and o.mark < v_mark
              order by o.mark desc
              limit 8
                for update skip locked));
  end if;
end;
$$;

revoke all on function nightowls._move_due_mark(uuid, int) from public;
