-- pgmq's functions over our queues, for programs that were written for pgmq; and its messages, taken over.

-- The group of a message that pgmq's header names. A longer name than a group key may have is its hash.
create function nightowls._pgmq_group(headers jsonb)
  returns text
  language sql
  immutable
  parallel safe
  return case
    when octet_length(headers ->> 'x-pgmq-group') > 255 then encode(sha256(convert_to(headers ->> 'x-pgmq-group', 'UTF8')), 'hex')
    else nullif(headers ->> 'x-pgmq-group', '')
  end;

revoke all on function nightowls._pgmq_group(jsonb) from public;

create function nightowls._pgmq_create(name text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org uuid := nightowls.current_org();
begin
  if _pgmq_create.name ~ '\$|;|--|''' then
    raise exception 'queue name contains invalid characters: $, ;, --, or \''' using errcode = 'invalid_parameter_value';
  elsif length(_pgmq_create.name) > 47 then
    raise exception 'queue name is too long, maximum length is 47 characters' using errcode = 'program_limit_exceeded';
  elsif not exists (select from nightowls.queues q where q.org_id = v_org and q.name = nightowls._queue_name(_pgmq_create.name)) then
    -- Its archives are kept until somebody empties them.
    perform nightowls.create_queue(_pgmq_create.name, retention => interval '1000 years', org => v_org);
  end if;
end;
$$;

revoke all on function nightowls._pgmq_create(text) from public;

create function nightowls._pgmq_drop(name text)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org uuid := nightowls.current_org();
begin
  if not exists (select from nightowls.queues q where q.org_id = v_org and q.name = nightowls._queue_name(_pgmq_drop.name)) then
    raise notice 'pgmq queue `%` does not exist', _pgmq_drop.name;
    return false;
  end if;
  perform nightowls.drop_queue(_pgmq_drop.name, v_org);
  return true;
end;
$$;

revoke all on function nightowls._pgmq_drop(text) from public;

-- Moves the time at which messages can be read to what the caller said, which may lie between two seconds.
-- Definer: nobody else may write to the queue's tables.
create function nightowls._set_due(org uuid, name text, msg_ids bigint[], due timestamptz)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
as $$
#variable_conflict use_column
begin
  update nightowls.queue_messages m
     set due_at = case when m.state in ('d', 'w') then _set_due.due else m.due_at end,
         lease_until = case when m.lease_until is not null then _set_due.due end
   where m.org_id = _set_due.org and m.queue_id = (nightowls._queue(_set_due.org, _set_due.name)).queue_id
     and m.msg_id = any (_set_due.msg_ids) and m.state in ('r', 'd', 'w');
end;
$$;

revoke all on function nightowls._set_due(uuid, text, bigint[], timestamptz) from public;

-- Seconds from now until a time, rounded up; 0 for what is past, 68 years for what is further.
create function nightowls._seconds_until(due timestamptz)
  returns int
  language sql
  volatile
  parallel safe
  return least(greatest(ceil(extract(epoch from due - clock_timestamp())), 0), 2147483647)::int;

revoke all on function nightowls._seconds_until(timestamptz) from public;

-- delay in seconds, else due. A message that is null is JSON's null, as pgmq's clients send it.
create function nightowls._pgmq_send(name text, messages jsonb[], headers jsonb[], delay int, due timestamptz)
  returns setof bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org      uuid := nightowls.current_org();
  v_ids      bigint[];
  v_name     text := nightowls._queue_name(_pgmq_send.name);
  v_notifies boolean;
begin
  if coalesce(cardinality(_pgmq_send.messages), 0) = 0 then
    raise exception 'msgs cannot be NULL or empty' using errcode = 'invalid_parameter_value';
  elsif cardinality(_pgmq_send.headers) <> cardinality(_pgmq_send.messages) then
    raise exception 'headers array length (%) must match msgs array length (%)', cardinality(_pgmq_send.headers),
                    cardinality(_pgmq_send.messages) using errcode = 'invalid_parameter_value';
  elsif _pgmq_send.delay is null and _pgmq_send.due is null then
    raise exception 'delay must not be null' using errcode = 'null_value_not_allowed';
  end if;
  v_ids := array(
    select s.msg_id
      from nightowls.send_batch(
             v_name,
             array(select coalesce(u.message, 'null') from unnest(_pgmq_send.messages) with ordinality as u (message, nth) order by u.nth),
             case when _pgmq_send.due is null then greatest(_pgmq_send.delay, 0) else nightowls._seconds_until(_pgmq_send.due) end,
             case when _pgmq_send.headers is not null then array(
               select nullif(u.headers, 'null') from unnest(_pgmq_send.headers) with ordinality as u (headers, nth) order by u.nth) end,
             group_keys => case when _pgmq_send.headers is not null then array(
               select nightowls._pgmq_group(u.headers)
                 from unnest(_pgmq_send.headers) with ordinality as u (headers, nth) order by u.nth) end,
             org => v_org) with ordinality as s (msg_id, nth)
     order by s.nth);
  if _pgmq_send.due > clock_timestamp() then
    perform nightowls._set_due(v_org, v_name, v_ids, _pgmq_send.due);
  end if;
  -- One for each queue and transaction: the server drops what is said twice.
  execute format('select exists (select from %s t where t.org_id = $1 and t.queue_name = $2)', to_regclass('pgmq.notify_insert_throttle'))
     into v_notifies using v_org, v_name;
  if v_notifies then
    perform pg_notify('pgmq.q_' || v_name || '.INSERT', '');
  end if;
  return query select * from unnest(v_ids);
end;
$$;

revoke all on function nightowls._pgmq_send(text, jsonb[], jsonb[], int, timestamptz) from public;

-- Reads messages that contain something: looks at all that can be read, in their order.
-- Definer: nobody else may write to the queue's tables.
create function nightowls._read_where(org uuid, name text, vt int, qty int, conditional jsonb)
  returns setof nightowls.queue_message
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
declare
  v_queue   nightowls.queues := nightowls._queue(_read_where.org, _read_where.name);
  v_now     timestamptz;
  v_receipt uuid := gen_random_uuid();
  v_tids    tid[];
begin
  perform nightowls._check_read(_read_where.vt, _read_where.qty);
  if v_queue.paused_at is not null then
    return;
  end if;
  while nightowls._promote(_read_where.org, _read_where.name) loop
    null;
  end loop;
  loop
    v_now := clock_timestamp();
    v_tids := array(
      select m.ctid
        from nightowls.queue_messages m
       where m.org_id = _read_where.org and m.queue_id = v_queue.queue_id and m.state = 'r'
         and (m.lease_until is null or m.lease_until <= v_now) and m.message @> _read_where.conditional
       order by m.priority desc, m.line_no
       limit _read_where.qty
         for update skip locked);
    exit when not nightowls._bury_claimed(_read_where.org, _read_where.name, v_tids);
  end loop;
  return query
    update nightowls.queue_messages m
       set lease_until = v_now + make_interval(secs => _read_where.vt), receipt = v_receipt, read_ct = m.read_ct + 1, last_read_at = v_now
      from unnest(v_tids) as t (tid)
     where m.ctid = t.tid
    returning m.msg_id, m.read_ct, m.enqueued_at, m.last_read_at, m.lease_until, m.message, m.headers, m.receipt;
end;
$$;

revoke all on function nightowls._read_where(uuid, text, int, int, jsonb) from public;

-- qty null: all; conditional null: nothing.
create function nightowls._pgmq_read(name text, vt int, qty int, conditional jsonb)
  returns setof nightowls.queue_message
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_qty int := coalesce(_pgmq_read.qty, 2147483647);
begin
  if _pgmq_read.vt is null then
    raise exception 'vt must not be null' using errcode = 'null_value_not_allowed';
  elsif _pgmq_read.conditional = '{}' then
    return query select r.* from nightowls.read(_pgmq_read.name, greatest(_pgmq_read.vt, 0), v_qty) r;
  elsif _pgmq_read.conditional is not null then
    return query
      select r.*
        from nightowls._read_where(nightowls.current_org(), _pgmq_read.name, greatest(_pgmq_read.vt, 0), v_qty,
                                   _pgmq_read.conditional) r;
  end if;
end;
$$;

revoke all on function nightowls._pgmq_read(text, int, int, jsonb) from public;

create function nightowls._pgmq_poll(name text, vt int, qty int, max_poll_seconds int, poll_interval_ms int, conditional jsonb)
  returns setof nightowls.queue_message
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_until timestamptz := clock_timestamp() + make_interval(secs => coalesce(_pgmq_poll.max_poll_seconds, 0));
begin
  if _pgmq_poll.conditional = '{}' and _pgmq_poll.vt is not null then
    return query
      select r.*
        from nightowls.read_with_poll(
               _pgmq_poll.name, greatest(_pgmq_poll.vt, 0), coalesce(_pgmq_poll.qty, 2147483647),
               make_interval(secs => greatest(_pgmq_poll.max_poll_seconds, 0))) r;
    return;
  end if;
  loop
    return query
      select r.* from nightowls._pgmq_read(_pgmq_poll.name, _pgmq_poll.vt, _pgmq_poll.qty, _pgmq_poll.conditional) r;
    exit when found or clock_timestamp() >= v_until;
    perform pg_sleep(least(greatest(_pgmq_poll.poll_interval_ms, 1) / 1000.0, extract(epoch from v_until - clock_timestamp())));
  end loop;
end;
$$;

revoke all on function nightowls._pgmq_poll(text, int, int, int, int, jsonb) from public;

-- vt in seconds, else due.
create function nightowls._pgmq_set_vt(name text, msg_ids bigint[], vt int, due timestamptz)
  returns setof nightowls.queue_message
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org  uuid := nightowls.current_org();
  v_id   bigint;
  v_row  nightowls.queue_message;
begin
  if _pgmq_set_vt.vt is null and _pgmq_set_vt.due is null then
    raise exception 'vt must not be null' using errcode = 'null_value_not_allowed';
  end if;
  perform nightowls._queue(v_org, _pgmq_set_vt.name);
  for v_id in select distinct u.msg_id from unnest(_pgmq_set_vt.msg_ids) as u (msg_id) where u.msg_id is not null order by 1 loop
    for v_row in
      select r.*
        from nightowls.set_vt(_pgmq_set_vt.name, v_id,
                              case when _pgmq_set_vt.due is null then greatest(_pgmq_set_vt.vt, 0)
                                   else nightowls._seconds_until(_pgmq_set_vt.due) end, v_org) r
    loop
      if _pgmq_set_vt.due is not null then
        if _pgmq_set_vt.due > clock_timestamp() then
          perform nightowls._set_due(v_org, _pgmq_set_vt.name, array[v_id], _pgmq_set_vt.due);
        end if;
        v_row.vt := _pgmq_set_vt.due;
      end if;
      return next v_row;
    end loop;
  end loop;
end;
$$;

revoke all on function nightowls._pgmq_set_vt(text, bigint[], int, timestamptz) from public;

-- delete or archive by ids, whoever has the messages. Ids that are null or unknown do nothing.
create function nightowls._pgmq_finish(name text, msg_ids bigint[], archived boolean)
  returns setof bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org uuid := nightowls.current_org();
begin
  return query
    select u.msg_id
      from unnest(nightowls._finish_many(
             v_org, _pgmq_finish.name, array_remove(coalesce(_pgmq_finish.msg_ids, '{}'), null), null, false,
             _pgmq_finish.archived)) as u (msg_id)
     order by u.msg_id;
end;
$$;

revoke all on function nightowls._pgmq_finish(text, bigint[], boolean) from public;

-- What is wrong with a topic's pattern, or a routing key; null when nothing is.
create function nightowls._pgmq_topic_fault(what text, word text, pattern boolean)
  returns text
  language sql
  immutable
  parallel safe
  return case
    when coalesce(word, '') = '' then format('%s cannot be NULL or empty', what)
    when length(word) > 255 then format('%s length cannot exceed 255 characters, got %s characters', what, length(word))
    when not pattern and word !~ '^[a-zA-Z0-9._-]+$' then
      format('%s contains invalid characters. Only alphanumeric, dots, hyphens, and underscores are allowed. Got: %s', what, word)
    when word !~ '^[a-zA-Z0-9._\-*#]+$' then
      format('%s contains invalid characters. Only alphanumeric, dots, hyphens, underscores, *, and # are allowed. Got: %s', what, word)
    when word ~ '^\.' then format('%s cannot start with a dot. Got: %s', what, word)
    when word ~ '\.$' then format('%s cannot end with a dot. Got: %s', what, word)
    when word ~ '\.\.' then format('%s cannot contain consecutive dots. Got: %s', what, word)
    when word ~ '\*\*' then
      format('%s cannot contain consecutive stars (**). Use # for multi-segment matching. Got: %s', what, word)
    when word ~ '##' then
      format('%s cannot contain consecutive hashes (##). A single # already matches zero or more segments. Got: %s', what, word)
    when word ~ '\*#|#\*' then
      format('%s cannot contain adjacent wildcards (*# or #*). Separate wildcards with dots. Got: %s', what, word)
  end;

revoke all on function nightowls._pgmq_topic_fault(text, text, boolean) from public;

create function nightowls._pgmq_check_topic(what text, word text, pattern boolean)
  returns boolean
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_fault text := nightowls._pgmq_topic_fault(_pgmq_check_topic.what, _pgmq_check_topic.word, _pgmq_check_topic.pattern);
begin
  if v_fault is not null then
    raise exception '%', v_fault using errcode = 'invalid_parameter_value';
  end if;
  return true;
end;
$$;

revoke all on function nightowls._pgmq_check_topic(text, text, boolean) from public;

create function nightowls._pgmq_bind(pattern text, name text)
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
  perform nightowls._pgmq_check_topic('pattern', _pgmq_bind.pattern, true);
  v_queue := nightowls._queue(nightowls.current_org(), _pgmq_bind.name);
  execute format('insert into %s (org_id, pattern, queue_name) values ($1, $2, $3) on conflict do nothing',
                 to_regclass('pgmq.topic_bindings'))
    using v_queue.org_id, _pgmq_bind.pattern, v_queue.name;
end;
$$;

revoke all on function nightowls._pgmq_bind(text, text) from public;

-- The queues that a routing key leads to, by name.
create function nightowls._pgmq_routes(routing_key text)
  returns table (pattern text, queue_name text, compiled_regex text)
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org uuid := nightowls.current_org();
begin
  perform nightowls._pgmq_check_topic('routing_key', _pgmq_routes.routing_key, false);
  return query execute format(
    'select b.pattern, b.queue_name, b.compiled_regex
       from %s b
       join nightowls.queues q on q.org_id = b.org_id and q.name = b.queue_name
      where b.org_id = $1 and $2 ~ b.compiled_regex
      order by b.pattern, b.queue_name', to_regclass('pgmq.topic_bindings'))
    using v_org, _pgmq_routes.routing_key;
end;
$$;

revoke all on function nightowls._pgmq_routes(text) from public;

create function nightowls._pgmq_send_topic(routing_key text, messages jsonb[], headers jsonb[], delay int, due timestamptz)
  returns table (queue_name text, msg_id bigint)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_name text;
begin
  if _pgmq_send_topic.delay < 0 then
    raise exception 'delay cannot be negative, got: %', _pgmq_send_topic.delay using errcode = 'invalid_parameter_value';
  end if;
  for v_name in select distinct r.queue_name from nightowls._pgmq_routes(_pgmq_send_topic.routing_key) r order by 1 loop
    return query
      select v_name, s.msg_id
        from nightowls._pgmq_send(v_name, _pgmq_send_topic.messages, _pgmq_send_topic.headers, _pgmq_send_topic.delay,
                                  _pgmq_send_topic.due) as s (msg_id);
  end loop;
end;
$$;

revoke all on function nightowls._pgmq_send_topic(text, jsonb[], jsonb[], int, timestamptz) from public;

create function nightowls._pgmq_notify(name text, throttle_interval_ms int, there boolean)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_queue     nightowls.queues := nightowls._queue(nightowls.current_org(), _pgmq_notify.name);
  v_throttles regclass := to_regclass('pgmq.notify_insert_throttle');
  v_known     boolean;
begin
  execute format('select exists (select from %s t where t.org_id = $1 and t.queue_name = $2)', v_throttles)
     into v_known using v_queue.org_id, v_queue.name;
  if _pgmq_notify.throttle_interval_ms is null then
    raise exception 'throttle_interval_ms must not be null' using errcode = 'null_value_not_allowed';
  elsif _pgmq_notify.throttle_interval_ms < 0 then
    raise exception 'throttle_interval_ms must be non-negative, got: %', _pgmq_notify.throttle_interval_ms
      using errcode = 'invalid_parameter_value';
  elsif _pgmq_notify.there and not v_known then
    raise exception 'Queue "%" does not have notify_insert enabled. Enable it first using pgmq.enable_notify_insert()', v_queue.name
      using errcode = 'object_not_in_prerequisite_state';
  end if;
  execute format('insert into %s (org_id, queue_name, throttle_interval_ms) values ($1, $2, $3)
                  on conflict (org_id, queue_name) do update set throttle_interval_ms = excluded.throttle_interval_ms', v_throttles)
    using v_queue.org_id, v_queue.name, _pgmq_notify.throttle_interval_ms;
end;
$$;

revoke all on function nightowls._pgmq_notify(text, int, boolean) from public;

-- Says something to the caller, and nothing else.
create function nightowls._pgmq_say(text text, level text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if _pgmq_say.level = 'warning' then
    raise warning '%', _pgmq_say.text;
  else
    raise notice '%', _pgmq_say.text;
  end if;
end;
$$;

revoke all on function nightowls._pgmq_say(text, text) from public;

-- pgmq's public functions, as of version 1.11, each with a statement over ours.
create function nightowls._pgmq_functions()
  returns table (signature text, returns text, statement text)
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_row   constant text := 'select r.msg_id, r.read_ct, r.enqueued_at, r.last_read_at, r.vt, r.message, r.headers from nightowls.';
  v_metric constant text :=
    'select m.queue_name, m.queue_length + m.dead_letters, m.newest_msg_age_sec, m.oldest_msg_age_sec,
            m.queue_length + m.dead_letters
              + (select count(*) from nightowls.queue_archive a where a.org_id = q.org_id and a.queue_id = q.queue_id),
            m.scrape_time, m.queue_visible_length
       from nightowls.list_queues() q
      cross join lateral nightowls.metrics(q.name, q.org_id) m';
begin
  return query
    select f.*
      from (values
        ('acquire_queue_lock(queue_name text)', 'void', 'select pg_advisory_xact_lock(hashtext(''pgmq.queue_'' || $1))'),
        ('create(queue_name text)', 'void', 'select nightowls._pgmq_create($1)'),
        ('create_non_partitioned(queue_name text)', 'void', 'select nightowls._pgmq_create($1)'),
        ('create_unlogged(queue_name text)', 'void', 'select nightowls._pgmq_create($1)'),
        ('create_partitioned(queue_name text, partition_interval text default ''10000'', retention_interval text default ''100000'')', 'void',
         'select nightowls._pgmq_create($1)'),
        ('convert_archive_partitioned(table_name text, partition_interval text default ''10000'', '
         'retention_interval text default ''100000'', leading_partition int default 10)', 'void',
         'select nightowls._pgmq_say(''the archives of nightowls have no partitions: nothing was done'', ''notice'')'),
        ('drop_queue(queue_name text)', 'boolean',
         'delete from pgmq.topic_bindings b where b.org_id = nightowls.current_org() and b.queue_name = nightowls._queue_name($1);
          delete from pgmq.notify_insert_throttle t where t.org_id = nightowls.current_org() and t.queue_name = nightowls._queue_name($1);
          select nightowls._pgmq_drop($1)'),
        ('drop_queue(queue_name text, partitioned boolean)', 'boolean',
         'select nightowls._pgmq_say(''drop_queue(queue_name, partitioned) is deprecated. Use drop_queue(queue_name) instead'', ''warning'');
          select pgmq.drop_queue($1);
          select true'),
        ('detach_archive(queue_name text)', 'void',
         'select nightowls._pgmq_say(''detach_archive(queue_name) is deprecated and is a no-op'', ''warning'')'),
        ('purge_queue(queue_name text)', 'bigint', 'select nightowls.purge_queue($1)'),
        ('list_queues()', 'setof pgmq.queue_record', 'select m.queue_name, m.is_partitioned, m.is_unlogged, m.created_at from pgmq.meta m'),
        ('metrics(queue_name text)', 'pgmq.metrics_result',
         'select nightowls._queue(nightowls.current_org(), $1); ' || v_metric || ' where q.name = nightowls._queue_name($1)'),
        ('metrics_all()', 'setof pgmq.metrics_result', v_metric),

        ('send(queue_name text, msg jsonb)', 'setof bigint', 'select nightowls._pgmq_send($1, array[$2], null, 0, null)'),
        ('send(queue_name text, msg jsonb, headers jsonb)', 'setof bigint',
         'select nightowls._pgmq_send($1, array[$2], array[$3], 0, null)'),
        ('send(queue_name text, msg jsonb, delay int)', 'setof bigint', 'select nightowls._pgmq_send($1, array[$2], null, $3, null)'),
        ('send(queue_name text, msg jsonb, delay timestamptz)', 'setof bigint',
         'select nightowls._pgmq_send($1, array[$2], null, null, $3)'),
        ('send(queue_name text, msg jsonb, headers jsonb, delay int)', 'setof bigint',
         'select nightowls._pgmq_send($1, array[$2], array[$3], $4, null)'),
        ('send(queue_name text, msg jsonb, headers jsonb, delay timestamptz)', 'setof bigint',
         'select nightowls._pgmq_send($1, array[$2], array[$3], null, $4)'),
        ('send_batch(queue_name text, msgs jsonb[])', 'setof bigint', 'select nightowls._pgmq_send($1, $2, null, 0, null)'),
        ('send_batch(queue_name text, msgs jsonb[], headers jsonb[])', 'setof bigint', 'select nightowls._pgmq_send($1, $2, $3, 0, null)'),
        ('send_batch(queue_name text, msgs jsonb[], delay int)', 'setof bigint', 'select nightowls._pgmq_send($1, $2, null, $3, null)'),
        ('send_batch(queue_name text, msgs jsonb[], delay timestamptz)', 'setof bigint',
         'select nightowls._pgmq_send($1, $2, null, null, $3)'),
        ('send_batch(queue_name text, msgs jsonb[], headers jsonb[], delay int)', 'setof bigint',
         'select nightowls._pgmq_send($1, $2, $3, $4, null)'),
        ('send_batch(queue_name text, msgs jsonb[], headers jsonb[], delay timestamptz)', 'setof bigint',
         'select nightowls._pgmq_send($1, $2, $3, null, $4)'),

        ('read(queue_name text, vt int, qty int, conditional jsonb default ''{}'')', 'setof pgmq.message_record',
         v_row || '_pgmq_read($1, $2, $3, $4) r'),
        ('read_with_poll(queue_name text, vt int, qty int, max_poll_seconds int default 5, poll_interval_ms int default 100, '
         'conditional jsonb default ''{}'')', 'setof pgmq.message_record', v_row || '_pgmq_poll($1, $2, $3, $4, $5, $6) r'),
        ('read_grouped(queue_name text, vt int, qty int)', 'setof pgmq.message_record', v_row || '_pgmq_read($1, $2, $3, ''{}'') r'),
        ('read_grouped_rr(queue_name text, vt int, qty int)', 'setof pgmq.message_record', v_row || '_pgmq_read($1, $2, $3, ''{}'') r'),
        ('read_grouped_head(queue_name text, vt int, qty int)', 'setof pgmq.message_record', v_row || '_pgmq_read($1, $2, $3, ''{}'') r'),
        ('read_grouped_with_poll(queue_name text, vt int, qty int, max_poll_seconds int default 5, poll_interval_ms int default 100)',
         'setof pgmq.message_record', v_row || '_pgmq_poll($1, $2, $3, $4, $5, ''{}'') r'),
        ('read_grouped_rr_with_poll(queue_name text, vt int, qty int, max_poll_seconds int default 5, poll_interval_ms int default 100)',
         'setof pgmq.message_record', v_row || '_pgmq_poll($1, $2, $3, $4, $5, ''{}'') r'),
        ('pop(queue_name text, qty int default 1)', 'setof pgmq.message_record',
         -- There a popped message is one that nobody has read.
         'select r.msg_id, r.read_ct - 1, r.enqueued_at, case when r.read_ct > 1 then r.last_read_at end, r.vt, r.message, r.headers
            from nightowls.pop($1, coalesce($2, 2147483647)) r'),
        ('archive(queue_name text, msg_id bigint)', 'boolean', 'select exists (select from nightowls._pgmq_finish($1, array[$2], true))'),
        ('archive(queue_name text, msg_ids bigint[])', 'setof bigint', 'select nightowls._pgmq_finish($1, $2, true)'),
        ('delete(queue_name text, msg_id bigint)', 'boolean', 'select exists (select from nightowls._pgmq_finish($1, array[$2], false))'),
        ('delete(queue_name text, msg_ids bigint[])', 'setof bigint', 'select nightowls._pgmq_finish($1, $2, false)'),
        ('set_vt(queue_name text, msg_id bigint, vt int)', 'setof pgmq.message_record', v_row || '_pgmq_set_vt($1, array[$2], $3, null) r'),
        ('set_vt(queue_name text, msg_id bigint, vt timestamptz)', 'setof pgmq.message_record',
         v_row || '_pgmq_set_vt($1, array[$2], null, $3) r'),
        ('set_vt(queue_name text, msg_ids bigint[], vt int)', 'setof pgmq.message_record', v_row || '_pgmq_set_vt($1, $2, $3, null) r'),
        ('set_vt(queue_name text, msg_ids bigint[], vt timestamptz)', 'setof pgmq.message_record',
         v_row || '_pgmq_set_vt($1, $2, null, $3) r'),

        ('create_fifo_index(queue_name text)', 'void', 'select nightowls._queue(nightowls.current_org(), $1)'),
        ('create_fifo_indexes_all()', 'void', 'select nightowls.current_org()'),
        ('enable_notify_insert(queue_name text, throttle_interval_ms int default 250)', 'void', 'select nightowls._pgmq_notify($1, $2, false)'),
        ('update_notify_insert(queue_name text, throttle_interval_ms int)', 'void', 'select nightowls._pgmq_notify($1, $2, true)'),
        ('disable_notify_insert(queue_name text)', 'void',
         'delete from pgmq.notify_insert_throttle t where t.org_id = nightowls.current_org() and t.queue_name = nightowls._queue_name($1)'),
        ('list_notify_insert_throttles()', 'table (queue_name text, throttle_interval_ms int, last_notified_at timestamptz)',
         'select t.queue_name, t.throttle_interval_ms, t.last_notified_at
            from pgmq.notify_insert_throttle t where t.org_id = nightowls.current_org() order by t.queue_name'),

        ('bind_topic(pattern text, queue_name text)', 'void', 'select nightowls._pgmq_bind($1, $2)'),
        ('unbind_topic(pattern text, queue_name text)', 'boolean',
         'with gone as (
            delete from pgmq.topic_bindings b
             where b.org_id = nightowls.current_org() and b.pattern = $1 and b.queue_name = nightowls._queue_name($2)
            returning 1)
          select exists (select from gone)'),
        ('test_routing(routing_key text)', 'table (pattern text, queue_name text, compiled_regex text)',
         'select r.pattern, r.queue_name, r.compiled_regex from nightowls._pgmq_routes($1) r'),
        ('list_topic_bindings()', 'table (pattern text, queue_name text, bound_at timestamptz, compiled_regex text)',
         'select b.pattern, b.queue_name, b.bound_at, b.compiled_regex
            from pgmq.topic_bindings b where b.org_id = nightowls.current_org() order by b.bound_at desc, b.pattern, b.queue_name'),
        ('list_topic_bindings(queue_name text)', 'table (pattern text, queue_name text, bound_at timestamptz, compiled_regex text)',
         'select b.pattern, b.queue_name, b.bound_at, b.compiled_regex
            from pgmq.topic_bindings b where b.org_id = nightowls.current_org() and b.queue_name = nightowls._queue_name($1)
           order by b.bound_at desc, b.pattern'),
        ('send_topic(routing_key text, msg jsonb)', 'int',
         'select count(*)::int from nightowls._pgmq_send_topic($1, array[$2], null, 0, null)'),
        ('send_topic(routing_key text, msg jsonb, delay int)', 'int',
         'select count(*)::int from nightowls._pgmq_send_topic($1, array[$2], null, $3, null)'),
        ('send_topic(routing_key text, msg jsonb, headers jsonb, delay int)', 'int',
         'select count(*)::int from nightowls._pgmq_send_topic($1, array[$2], array[$3], $4, null)'),
        ('send_batch_topic(routing_key text, msgs jsonb[])', 'table (queue_name text, msg_id bigint)',
         'select * from nightowls._pgmq_send_topic($1, $2, null, 0, null)'),
        ('send_batch_topic(routing_key text, msgs jsonb[], headers jsonb[])', 'table (queue_name text, msg_id bigint)',
         'select * from nightowls._pgmq_send_topic($1, $2, $3, 0, null)'),
        ('send_batch_topic(routing_key text, msgs jsonb[], delay int)', 'table (queue_name text, msg_id bigint)',
         'select * from nightowls._pgmq_send_topic($1, $2, null, $3, null)'),
        ('send_batch_topic(routing_key text, msgs jsonb[], delay timestamptz)', 'table (queue_name text, msg_id bigint)',
         'select * from nightowls._pgmq_send_topic($1, $2, null, null, $3)'),
        ('send_batch_topic(routing_key text, msgs jsonb[], headers jsonb[], delay int)', 'table (queue_name text, msg_id bigint)',
         'select * from nightowls._pgmq_send_topic($1, $2, $3, $4, null)'),
        ('send_batch_topic(routing_key text, msgs jsonb[], headers jsonb[], delay timestamptz)', 'table (queue_name text, msg_id bigint)',
         'select * from nightowls._pgmq_send_topic($1, $2, $3, null, $4)'),
        ('validate_routing_key(routing_key text)', 'boolean', 'select nightowls._pgmq_check_topic(''routing_key'', $1, false)'),
        ('validate_topic_pattern(pattern text)', 'boolean', 'select nightowls._pgmq_check_topic(''pattern'', $1, true)'),

        ('format_table_name(queue_name text, prefix text)', 'text', 'select lower($2 || ''_'' || $1)'),
        ('validate_queue_name(queue_name text)', 'void', null),
        ('notify_queue_listeners()', 'trigger', null)
      ) as f (signature, returns, statement);
end;
$$;

revoke all on function nightowls._pgmq_functions() from public;

create function nightowls.install_pgmq()
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_ours     constant text := 'pgmq''s functions over the queues of nightowls; made by nightowls.install_pgmq(): ';
  v_comment  text := v_ours || (select md5(string_agg(f::text, E'\n' order by f.signature)) from nightowls._pgmq_functions() f);
  v_found    text := obj_description(to_regnamespace('pgmq'), 'pg_namespace');
  v_function record;
  v_role     oid;
begin
  if v_found = v_comment then
    v_found := null;
  elsif to_regnamespace('pgmq') is not null or exists (select from pg_extension e where e.extname = 'pgmq') then
    raise exception 'schema "pgmq" exists already'
      using errcode = 'duplicate_schema',
            detail = case when starts_with(v_found, v_ours) then 'It is that of another version of nightowls.'
                          else 'It is not one that nightowls has made.' end,
            hint = case when starts_with(v_found, v_ours)
                        then 'Its queues and messages are those of nightowls: "drop schema pgmq cascade" loses bindings of topics only.'
                        else 'Bring its messages over with nightowls.adopt_pgmq(), drop it, and call this again.' end;
  else
    create schema pgmq;
    execute format('comment on schema pgmq is %L', v_comment);
    create type pgmq.message_record as (
      msg_id bigint, read_ct int, enqueued_at timestamptz, last_read_at timestamptz, vt timestamptz, message jsonb, headers jsonb);
    create type pgmq.queue_record as (queue_name varchar, is_partitioned boolean, is_unlogged boolean, created_at timestamptz);
    create type pgmq.metrics_result as (
      queue_name text, queue_length bigint, newest_msg_age_sec int, oldest_msg_age_sec int, total_messages bigint,
      scrape_time timestamptz, queue_visible_length bigint);
    -- Every queue of the org is logged and has no partitions.
    create view pgmq.meta with (security_invoker = true) as
      select q.name::varchar as queue_name, false as is_partitioned, false as is_unlogged, q.created_at
        from nightowls.list_queues() q;
    create table pgmq.topic_bindings (
      org_id         uuid        not null,
      pattern        text        not null,
      queue_name     text        collate "C" not null,
      bound_at       timestamptz not null default clock_timestamp(),
      compiled_regex text        not null generated always as (
        '^' || replace(replace(regexp_replace(pattern, '([.+?{}()|\[\]\\^$])', '\\\1', 'g'), '*', '[^.]+'), '#', '.*') || '$') stored,
      constraint topic_bindings_pkey primary key (org_id, pattern, queue_name)
    );
    create table pgmq.notify_insert_throttle (
      org_id               uuid        not null,
      queue_name           text        collate "C" not null,
      throttle_interval_ms int         not null,
      last_notified_at     timestamptz not null default to_timestamp(0),
      constraint notify_insert_throttle_pkey primary key (org_id, queue_name)
    );
    for v_function in select f.* from nightowls._pgmq_functions() f where f.statement is not null loop
      execute format('create function pgmq.%s returns %s language sql volatile set search_path to pg_catalog, pg_temp as %L',
                     v_function.signature, v_function.returns, v_function.statement);
    end loop;
    create function pgmq.validate_queue_name(queue_name text)
      returns void
      language plpgsql
      set search_path to pg_catalog, pg_temp
    as $validate$
    begin
      if length($1) > 47 then
        raise exception 'queue name is too long, maximum length is 47 characters' using errcode = 'program_limit_exceeded';
      end if;
    end;
    $validate$;
    create function pgmq.notify_queue_listeners()
      returns trigger
      language plpgsql
      set search_path to pg_catalog, pg_temp
    as $trigger$
    begin
      raise exception 'pgmq.notify_queue_listeners() is no trigger of nightowls'
        using errcode = 'feature_not_supported', hint = 'pgmq.enable_notify_insert(queue_name) makes pgmq.send notify.';
    end;
    $trigger$;
  end if;

  for v_function in select p.oid::regprocedure as name from pg_proc p where p.pronamespace = to_regnamespace('pgmq') loop
    perform nightowls._serve(v_function.name);
  end loop;
  for v_role in select s.role from nightowls._service_roles() s (role) loop
    execute format('grant usage on schema pgmq to %s', v_role::regrole);
    execute format('grant select on pgmq.meta to %s', v_role::regrole);
    execute format('grant select, insert, update, delete on pgmq.topic_bindings, pgmq.notify_insert_throttle to %s', v_role::regrole);
  end loop;
end;
$$;

comment on function nightowls.install_pgmq() is
  'Makes a schema pgmq with the public functions of pgmq 1.11 over the queues of the caller''s org, so that programs written for pgmq run '
  'with these queues; docs/queue.md says what differs. Only services may call them. Again it changes nothing, but gives the rights to roles '
  'that have become services since. Owner only, as it runs DDL. Raises 42P06 if there is a pgmq already, or one that another version made.';

revoke all on function nightowls.install_pgmq() from public;

-- Takes up to max_rows rows out of one of pgmq's tables, by their ids in order, as JSON: its columns differ by version. What
-- somebody else has locked is left for the next call.
create function nightowls._take_pgmq(source regclass, max_rows int)
  returns jsonb[]
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_rows jsonb[];
begin
  execute format(
    'with gone as (
       delete from %1$s m
        where m.msg_id = any (array(select o.msg_id from %1$s o order by o.msg_id limit $1 for update skip locked))
       returning m.msg_id, to_jsonb(m) as body
     )
     select array_agg(g.body order by g.msg_id) from gone g', _take_pgmq.source)
    into v_rows
    using _take_pgmq.max_rows;
  return coalesce(v_rows, '{}');
end;
$$;

revoke all on function nightowls._take_pgmq(regclass, int) from public;

-- The greatest id that a queue of pgmq has given out, as far as it can be seen.
create function nightowls._pgmq_last_id(queue regclass, archive regclass)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_last bigint;
begin
  execute format('select greatest((select max(q.msg_id) from %s q), (select max(a.msg_id) from %s a), pg_sequence_last_value($1), 0)',
                 _pgmq_last_id.queue, _pgmq_last_id.archive)
    into v_last
    using pg_get_serial_sequence(_pgmq_last_id.queue::text, 'msg_id')::regclass;
  return v_last;
end;
$$;

revoke all on function nightowls._pgmq_last_id(regclass, regclass) from public;

create function nightowls.adopt_pgmq(
  queue        text,
  max_messages int default 10000,
  into_queue   text default null,
  org          uuid default null
)
  returns table (messages bigint, archived bigint, more boolean)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
as $$
#variable_conflict use_column
declare
  v_org     uuid := nightowls.current_org(adopt_pgmq.org);
  v_name    text := nightowls._queue_name(coalesce(adopt_pgmq.into_queue, adopt_pgmq.queue));
  v_source  regclass := to_regclass('pgmq.' || quote_ident(lower('q_' || adopt_pgmq.queue)));
  v_archive regclass := to_regclass('pgmq.' || quote_ident(lower('a_' || adopt_pgmq.queue)));
  v_queue   nightowls.queues;
  v_names   text[] := '{}';
  v_gap     bigint;
  v_rows    jsonb[];
  v_group   text;
begin
  messages := 0;
  archived := 0;
  if adopt_pgmq.queue is null or adopt_pgmq.max_messages is null then
    raise exception 'queue and max_messages must not be null' using errcode = 'null_value_not_allowed';
  elsif adopt_pgmq.max_messages < 1 then
    raise exception 'max_messages must be 1 or more' using errcode = 'invalid_parameter_value';
  elsif current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
    raise exception 'a queue cannot be adopted at isolation level %', current_setting('transaction_isolation')
      using errcode = 'active_sql_transaction', detail = 'An older snapshot does not see all that is in it.', hint = 'Use read committed.';
  elsif v_source is null or v_archive is null then
    v_names := array(
      select substr(c.relname, 3) from pg_class c
       where c.relnamespace = to_regnamespace('pgmq') and c.relkind in ('r', 'p') and c.relname ~ '^q_' order by 1);
    perform nightowls._refuse_unknown('pgmq queue', adopt_pgmq.queue, v_names, 'pgmq.list_queues() shows those there are.');
  end if;
  if not exists (select from nightowls.queues q where q.org_id = v_org and q.name = v_name) then
    perform nightowls.create_queue(v_name, retention => interval '1000 years', org => v_org);
  end if;
  v_queue := nightowls._queue(v_org, v_name);

  -- Ids are kept: ours must lie above them from now on. Drawn, not set, as others draw meanwhile; a tenth of a second for a million.
  v_gap := nightowls._pgmq_last_id(v_source, v_archive) - nightowls._last_line();
  if v_gap > 0 and nightowls._hold_line(v_org, nightowls._last_line()) then
    perform count(nextval('nightowls.queue_line_no')) from generate_series(1, least(v_gap, 10000000));
    if v_gap > 10000000 then
      more := true;
      return next;
      return;
    end if;
  end if;

  v_rows := nightowls._take_pgmq(v_archive, adopt_pgmq.max_messages);
  archived := cardinality(v_rows);
  insert into nightowls.queue_archive
         (org_id, queue_id, msg_id, priority, read_ct, enqueued_at, last_read_at, archived_at, group_key, headers, message)
  select v_org, v_queue.queue_id, (r.body ->> 'msg_id')::bigint, 0, (r.body ->> 'read_ct')::int, (r.body ->> 'enqueued_at')::timestamptz,
         (r.body ->> 'last_read_at')::timestamptz, (r.body ->> 'archived_at')::timestamptz, nightowls._pgmq_group(r.body -> 'headers'),
         nullif(r.body -> 'headers', 'null'), coalesce(r.body -> 'message', 'null')
    from unnest(v_rows) as r (body);

  if archived < adopt_pgmq.max_messages then
    -- Whoever reads or sends to a group meanwhile must not see half of it.
    perform nightowls._lock_all_groups(v_org, v_queue.queue_id);
    v_rows := nightowls._take_pgmq(v_source, adopt_pgmq.max_messages - archived::int);
    messages := cardinality(v_rows);
    perform nightowls._hold_line(v_org, nightowls._last_line());
    insert into nightowls.queue_messages
           (org_id, queue_id, state, msg_id, line_no, due_at, enqueued_at, read_ct, lease_until, last_read_at, receipt, group_key, headers,
            message)
    select v_org, v_queue.queue_id,
           case when r.group_key is not null then 'w' when r.vt > clock_timestamp() then 'd' else 'r' end::"char",
           (r.body ->> 'msg_id')::bigint, r.line_no,
           case when r.vt > clock_timestamp() then r.vt else clock_timestamp() end, (r.body ->> 'enqueued_at')::timestamptz,
           (r.body ->> 'read_ct')::int,
           -- Whoever has read it there may settle it here by its id; a receipt nobody has.
           case when r.leased then r.vt end, (r.body ->> 'last_read_at')::timestamptz, case when r.leased then gen_random_uuid() end,
           r.group_key, nullif(r.body -> 'headers', 'null'), coalesce(r.body -> 'message', 'null')
      from (select n.body, (n.body ->> 'vt')::timestamptz as vt, nightowls._pgmq_group(n.body -> 'headers') as group_key,
                   (n.body ->> 'read_ct')::int > 0 and (n.body ->> 'vt')::timestamptz > clock_timestamp() as leased,
                   nextval('nightowls.queue_line_no') as line_no
              from unnest(v_rows) with ordinality as n (body, nth)
            offset 0) r;
    for v_group in
      select distinct nightowls._pgmq_group(r.body -> 'headers') from unnest(v_rows) as r (body) order by 1
    loop
      if v_group is not null then
        perform nightowls._advance_group(v_org, v_queue.queue_id, v_group);
      end if;
    end loop;
  end if;

  perform nightowls._announce(v_org, v_queue.queue_id, messages::int);
  execute format('select exists (select from %s) or exists (select from %s)', v_source, v_archive) into more;
  return next;
end;
$$;

comment on function nightowls.adopt_pgmq(text, int, text, uuid) is
  'Moves messages of a real pgmq''s queue into ours, its archive first: ids, counts, times, headers and delays are kept, and what '
  'somebody there has read and not done stays invisible as long as there. They leave pgmq''s tables in the same transaction, so that nothing is '
  'lost or there twice, whatever happens; call it until more is false, and what is sent there meanwhile comes with the next call. Returns how many '
  'messages and archived ones were moved, and whether there are more; what others have locked there is left for the next call. queue: the name '
  'there; max_messages: at most so many in this call; into_queue: the name here, by default the same, made if it does not exist; org: the tenant. '
  'The header x-pgmq-group becomes the group. Owner only: it reads and empties another schema. Waits for open sends to groups of the queue. Raises '
  'NW007 if pgmq has no such queue, 23505 if a message with this id is in our queue already, 25001 above read committed, NW010 if there is no '
  'org, 22004 or 22023 for an argument that is null or not positive.';

revoke all on function nightowls.adopt_pgmq(text, int, text, uuid) from public;
