-- Replay: archived messages sent again.

-- Definer: nobody else may write to the queue's tables.
create function nightowls._replay(org uuid, name text, since timestamptz, until timestamptz, into_queue text, max_messages int)
  returns bigint
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
  v_from nightowls.queues := nightowls._queue(_replay.org, _replay.name);
  v_into nightowls.queues;
  v_rows record;
begin
  if (_replay.max_messages between 1 and 100000) is not true then
    raise exception 'max_messages must be 1 to 100000'
      using errcode = case when _replay.max_messages is null then 'null_value_not_allowed' else 'invalid_parameter_value' end;
  elsif _replay.since > _replay.until then
    raise exception 'since must not be later than until' using errcode = 'invalid_parameter_value';
  elsif current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
    raise exception 'messages cannot be replayed at isolation level %', current_setting('transaction_isolation')
      using errcode = 'active_sql_transaction',
            detail = 'An older snapshot would bring back what was erased.', hint = 'Use read committed.';
  end if;
  v_into := nightowls._queue(_replay.org, coalesce(_replay.into_queue, _replay.name));
  -- What an erasure takes out meanwhile would come back.
  perform nightowls._share_erasure(_replay.org);
  select count(*) as count, array_agg(x.message order by x.msg_id) as messages, array_agg(x.headers order by x.msg_id) as headers,
         array_agg(x.group_key order by x.msg_id) as groups, array_agg(x.priority order by x.msg_id) as priorities,
         array_agg(x.source order by x.msg_id) as sources
    into v_rows
    from (select a.msg_id, a.message, a.headers, a.group_key, a.priority,
                 jsonb_build_object('replay', jsonb_build_object(
                   'queue_id', a.queue_id, 'msg_id', a.msg_id, 'enqueued_at', a.enqueued_at, 'archived_at', a.archived_at, 'source', a.source)) as source
            from nightowls.queue_archive a
           where a.org_id = _replay.org and a.queue_id = v_from.queue_id
             and a.archived_at >= coalesce(_replay.since, '-infinity') and a.archived_at < coalesce(_replay.until, 'infinity')
           order by a.archived_at
           limit _replay.max_messages + 1) x;
  if v_rows.count > _replay.max_messages then
    raise exception 'more than % messages were archived in that time', _replay.max_messages
      using errcode = 'program_limit_exceeded', detail = 'Nothing was sent.',
            hint = 'Take a shorter time after the other, or raise max_messages, to 100000 at most.';
  elsif v_rows.count > 0 then
    perform nightowls._enqueue(v_into, v_rows.messages, v_rows.headers, v_rows.groups, v_rows.priorities, v_rows.sources);
  end if;
  return v_rows.count;
end;
$$;

revoke all on function nightowls._replay(uuid, text, timestamptz, timestamptz, text, int) from public;

create function nightowls.replay(
  queue        text,
  since        timestamptz default null,
  until        timestamptz default null,
  into_queue   text default null,
  max_messages int default 10000,
  org          uuid default null
)
  returns bigint
  language sql
  volatile
  parallel unsafe
  return nightowls._replay(nightowls.current_org(replay.org), replay.queue, replay.since, replay.until, replay.into_queue, replay.max_messages);

comment on function nightowls.replay(text, timestamptz, timestamptz, text, int, uuid) is
  'Sends archived messages of a queue again and returns how many: as new messages, with new ids, in the order in which they were first sent, with their message, headers, group and '
  'priority, without their dedup keys; the archive keeps the old ones. source says where each came from. queue: whose archive; since, until: archived '
  'from then on and before then, null without limit; into_queue: where to, by default the same queue; max_messages: if there are more, nothing is sent; org: the tenant. '
  'All or none, and each call sends anew: to have it once whatever is retried, say where nightowls.once(''replay'', …). Waits for an '
  'erasure, and for nobody else. Raises NW007 if a queue does not exist, 54000 if there are more than max_messages, 25001 above read committed, NW010 if there is no org, 22004 or 22023 for '
  'an argument that is null or not valid.';

revoke all on function nightowls.replay(text, timestamptz, timestamptz, text, int, uuid) from public;
