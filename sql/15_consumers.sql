-- Consumers: readers of the log that keep their place in it, alone or in a group of members.
--
-- A consumer's events are dealt to as many shares as it has members, by aggregate. A share has an offset (everything
-- of it at or below is done) and a lease (who works on what comes next), both in the newest of its rows in _consumer_offsets:
-- insert-only, so that finding it stays one probe while an old snapshot keeps the replaced rows alive. Whoever writes such a row
-- holds the share's advisory lock until the transaction ends. docs/consumers.md has the argument.

create table nightowls.consumers (
  org_id          uuid        not null,
  name            text        collate "C" not null,
  filter          jsonb,
  aggregate_types text[]      collate "C",
  event_types     text[]      collate "C",
  members         int         not null default 1,
  generation      bigint      not null,
  drain_to        bigint,
  next_members    int,
  max_attempts    int         not null default 5,
  retry_pause     interval    not null default '1 second',
  created_at      timestamptz not null default clock_timestamp(),
  constraint consumers_pkey primary key (org_id, name),
  constraint consumers_members_check check (members between 1 and 32 and next_members between 1 and 32)
);

comment on table nightowls.consumers is
  'The consumers there are: what they read, in how many members. Those named projection:… keep async projections. '
  'How far they are is in consumer_lag.';
comment on column nightowls.consumers.org_id is 'The tenant.';
comment on column nightowls.consumers.name is 'The consumer''s name, unique within the org.';
comment on column nightowls.consumers.filter is 'Which events it wants, as given; null for all.';
comment on column nightowls.consumers.aggregate_types is 'The aggregate types of the filter; null for all.';
comment on column nightowls.consumers.event_types is
  'The event types of the filter, and nightowls.erased, which no filter keeps out; null for all.';
comment on column nightowls.consumers.members is 'How many members share the events; they are numbered from 0.';
comment on column nightowls.consumers.generation is 'Which generation of shares is at work; seek and another number of members make the next.';
comment on column nightowls.consumers.drain_to is
  'While the number of members changes: the position up to which the old shares still work. null otherwise.';
comment on column nightowls.consumers.next_members is 'While the number of members changes: the number to come. null otherwise.';
comment on column nightowls.consumers.max_attempts is 'After how many failed attempts an event is parked.';
comment on column nightowls.consumers.retry_pause is 'How long a share rests after a failed attempt; twice as long after each further one, at most 5 minutes.';
comment on column nightowls.consumers.created_at is 'When the consumer was made.';

-- Drawn for each generation and never used again: what belongs to a dropped consumer is never taken for the next one's.
create sequence nightowls.consumer_generations as bigint cache 1;

comment on sequence nightowls.consumer_generations is 'Numbers the generations of consumers'' shares.';

create table nightowls._consumer_offsets (
  org_id        uuid        not null,
  consumer      text        collate "C" not null,
  generation    bigint      not null,
  share         int         not null,
  seq           bigint      not null,
  "offset"      bigint      not null,
  fence         bigint      not null,
  member        int,
  last_position bigint,
  scanned_to    bigint,
  replaying     boolean     not null default false,
  lease_until   timestamptz,
  paused_until  timestamptz,
  created_at    timestamptz not null default clock_timestamp(),
  constraint _consumer_offsets_pkey primary key (org_id, consumer, generation, share, seq)
);

comment on table nightowls._consumer_offsets is
  'Offset and lease of each share of each consumer: a new row a change, the one with the highest seq counts.';
comment on column nightowls._consumer_offsets.org_id is 'The tenant.';
comment on column nightowls._consumer_offsets.consumer is 'The consumer.';
comment on column nightowls._consumer_offsets.generation is 'The generation of shares it belongs to.';
comment on column nightowls._consumer_offsets.share is 'Which share of the events, from 0.';
comment on column nightowls._consumer_offsets.seq is 'The number of the change.';
comment on column nightowls._consumer_offsets."offset" is 'Every event of the share at or below this position is done or parked.';
comment on column nightowls._consumer_offsets.fence is 'The last fence given out for the share.';
comment on column nightowls._consumer_offsets.member is 'Who holds the lease; null when nobody does.';
comment on column nightowls._consumer_offsets.last_position is 'The last event given out under the lease.';
comment on column nightowls._consumer_offsets.scanned_to is 'Between last_position and here there is no event of the share.';
comment on column nightowls._consumer_offsets.replaying is 'Whether the lease is for parked events that are replayed.';
comment on column nightowls._consumer_offsets.lease_until is
  'When the lease ends; after it was given back, until when only the member whose share it is may take it.';
comment on column nightowls._consumer_offsets.paused_until is 'Until when the share rests after a failed attempt.';
comment on column nightowls._consumer_offsets.created_at is 'When the row was written.';

create table nightowls._consumer_failures (
  org_id     uuid        not null,
  consumer   text        collate "C" not null,
  "position" bigint      not null,
  attempts   int         not null default 0,
  error      text,
  failed_at  timestamptz not null default clock_timestamp(),
  parked_at  timestamptz,
  replay     boolean     not null default false,
  fence      bigint,
  constraint _consumer_failures_pkey primary key (org_id, consumer, "position")
);

create index _consumer_failures_parked_idx on nightowls._consumer_failures (org_id, consumer, "position")
  where parked_at is not null or replay;

comment on table nightowls._consumer_failures is 'Events that a consumer failed on: how often, with what error, whether they are parked.';
comment on column nightowls._consumer_failures.org_id is 'The tenant.';
comment on column nightowls._consumer_failures.consumer is 'The consumer.';
comment on column nightowls._consumer_failures."position" is 'The event.';
comment on column nightowls._consumer_failures.attempts is 'How many attempts failed.';
comment on column nightowls._consumer_failures.error is 'What the last one failed with, as the consumer told it.';
comment on column nightowls._consumer_failures.failed_at is 'When that was.';
comment on column nightowls._consumer_failures.parked_at is 'When the event was parked; null when it is not.';
comment on column nightowls._consumer_failures.replay is 'Whether the event is to be given out once more.';
comment on column nightowls._consumer_failures.fence is 'The fence under which it was given out for replay.';

-- Which share an aggregate belongs to. The hash must be the same on every version and machine, as offsets outlive both.
create function nightowls._share(aggregate_type text, aggregate_id text, members int)
  returns int
  language sql
  immutable
  parallel safe
  return case
    when members = 1 then 0
    else ('x' || left(md5(aggregate_type || '/' || aggregate_id), 7))::bit(28)::int % members
  end;

revoke all on function nightowls._share(text, text, int) from public;

create function nightowls._consumer(name text, org uuid)
  returns nightowls.consumers
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_consumer nightowls.consumers;
begin
  select c.* into v_consumer
    from nightowls.consumers c
   where c.org_id = _consumer.org and c.name = _consumer.name;
  if not found then
    perform nightowls._refuse_unknown('consumer', _consumer.name, array(
      select c.name from nightowls.consumers c where c.org_id = _consumer.org and c.name not like 'projection:%'));
  end if;
  return v_consumer;
end;
$$;

revoke all on function nightowls._consumer(text, uuid) from public;

create function nightowls._refuse_snapshot(what text)
  returns void
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
    raise exception '% is not possible at isolation level %', _refuse_snapshot.what, current_setting('transaction_isolation')
      using errcode = 'active_sql_transaction',
            detail = 'The snapshot may be older than the newest lease.',
            hint = 'Use read committed.';
  end if;
end;
$$;

revoke all on function nightowls._refuse_snapshot(text) from public;

-- The lock of a share, until the transaction ends; with wait => false it says whether it could be had at once.
create function nightowls._lock_share(org uuid, consumer text, share int, wait boolean)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_key int := hashtext(_lock_share.org::text || '/' || _lock_share.share || '/' || _lock_share.consumer);
begin
  if _lock_share.wait then
    perform pg_advisory_xact_lock(nightowls._lock_class(261), v_key);
    return true;
  end if;
  return pg_try_advisory_xact_lock(nightowls._lock_class(261), v_key);
end;
$$;

revoke all on function nightowls._lock_share(uuid, text, int, boolean) from public;

-- All shares of a consumer, for what changes them all: at most 32 locks.
create function nightowls._lock_shares(org uuid, consumer text)
  returns nightowls.consumers
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_consumer nightowls.consumers;
begin
  perform nightowls._refuse_snapshot('changing a consumer');
  loop
    v_consumer := nightowls._consumer(_lock_shares.consumer, _lock_shares.org);
    for i in 0 .. v_consumer.members - 1 loop
      perform nightowls._lock_share(_lock_shares.org, _lock_shares.consumer, i, true);
    end loop;
    -- There may be more of them since.
    exit when v_consumer.members >= (nightowls._consumer(_lock_shares.consumer, _lock_shares.org)).members;
  end loop;
  return nightowls._consumer(_lock_shares.consumer, _lock_shares.org);
end;
$$;

revoke all on function nightowls._lock_shares(uuid, text) from public;

-- The newest row of each share of a consumer's generation.
create function nightowls._share_states(consumer nightowls.consumers)
  returns setof nightowls._consumer_offsets
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
begin
  return query
    select s.*
      from generate_series(0, (_share_states.consumer).members - 1) as n (share)
     cross join lateral (
             select o.*
               from nightowls._consumer_offsets o
              where o.org_id = (_share_states.consumer).org_id
                and o.consumer = (_share_states.consumer).name
                and o.generation = (_share_states.consumer).generation
                and o.share = n.share
              order by o.seq desc
              limit 1) s;
end;
$$;

revoke all on function nightowls._share_states(nightowls.consumers) from public;

-- Begins a new generation of shares at an offset, and forgets the one before. Its caller has all shares locked, or knows that
-- they are drained. Runs in functions of the owner's.
create function nightowls._begin_shares(org uuid, consumer text, members int, start bigint)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_old        bigint := (select c.generation from nightowls.consumers c
                           where c.org_id = _begin_shares.org and c.name = _begin_shares.consumer);
  v_generation bigint := nextval('nightowls.consumer_generations');
begin
  insert into nightowls._consumer_offsets (org_id, consumer, generation, share, seq, "offset", fence)
  select _begin_shares.org, _begin_shares.consumer, v_generation, n.share, 1, _begin_shares.start,
         -- Above every fence of the generation before, and this share's.
         coalesce((select max(o.fence) / 32 * 32 + 32
                     from nightowls._consumer_offsets o
                    where o.org_id = _begin_shares.org and o.consumer = _begin_shares.consumer
                      and o.generation = v_old), 0) + n.share
    from generate_series(0, _begin_shares.members - 1) as n (share);
  update nightowls.consumers c
     set generation = v_generation, members = _begin_shares.members, drain_to = null, next_members = null
   where c.org_id = _begin_shares.org and c.name = _begin_shares.consumer;
  delete from nightowls._consumer_offsets o
   where o.org_id = _begin_shares.org and o.consumer = _begin_shares.consumer and o.generation = v_old;
  perform nightowls._wake('events/' || nightowls._org_class(_begin_shares.org));
end;
$$;

revoke all on function nightowls._begin_shares(uuid, text, int, bigint) from public;

-- Writes a consumer down, unless it is there with the same definition (false). Definer: the tables are closed.
create function nightowls._register_consumer(
  org          uuid,
  name         text,
  filter       jsonb,
  start        bigint,
  members      int,
  max_attempts int,
  retry_pause  interval
)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_found  nightowls.consumers;
  v_filter record := nightowls._parse_filter(_register_consumer.filter);
begin
  perform nightowls._refuse_no_org(_register_consumer.org);
  insert into nightowls.consumers
         (org_id, name, filter, aggregate_types, event_types, members, generation, max_attempts, retry_pause)
  values (_register_consumer.org, _register_consumer.name, _register_consumer.filter, v_filter.aggregate_types,
          -- Who handles some events of a subject must hear that it was erased.
          case when v_filter.event_types is not null then v_filter.event_types || 'nightowls.erased'::text end, _register_consumer.members, 0, _register_consumer.max_attempts,
          _register_consumer.retry_pause)
  on conflict do nothing;
  if not found then
    v_found := nightowls._consumer(_register_consumer.name, _register_consumer.org);
    if (v_found.filter, coalesce(v_found.next_members, v_found.members), v_found.max_attempts, v_found.retry_pause)
         is distinct from
       (_register_consumer.filter, _register_consumer.members, _register_consumer.max_attempts, _register_consumer.retry_pause) then
      raise exception 'consumer "%" exists already with another definition', v_found.name
        using errcode = 'duplicate_object',
              hint = 'Change it with nightowls.alter_consumer(), or drop it with nightowls.drop_consumer().';
    end if;
    return false;
  end if;
  perform nightowls._begin_shares(_register_consumer.org, _register_consumer.name, _register_consumer.members,
                                      _register_consumer.start);
  return true;
end;
$$;

revoke all on function nightowls._register_consumer(uuid, text, jsonb, bigint, int, int, interval) from public;

create function nightowls._check_consumer(members int, max_attempts int, retry_pause interval)
  returns void
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if _check_consumer.members not between 1 and 32 then
    raise exception 'members must be between 1 and 32' using errcode = 'invalid_parameter_value';
  elsif _check_consumer.max_attempts < 1 then
    raise exception 'max_attempts must be 1 or more' using errcode = 'invalid_parameter_value';
  elsif _check_consumer.retry_pause < interval '0' then
    raise exception 'retry_pause must be 0 or more' using errcode = 'invalid_parameter_value';
  end if;
end;
$$;

revoke all on function nightowls._check_consumer(int, int, interval) from public;

create function nightowls.create_consumer(
  name         text,
  filter       jsonb default null,
  start        text default 'beginning',
  members      int default 1,
  max_attempts int default 5,
  retry_pause  interval default '1 second',
  org          uuid default null
)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org   uuid := nightowls.current_org(create_consumer.org);
  v_start bigint := 0;
begin
  if create_consumer.name is null or create_consumer.start is null or create_consumer.members is null
     or create_consumer.max_attempts is null or create_consumer.retry_pause is null then
    raise exception 'name, start, members, max_attempts and retry_pause must not be null' using errcode = 'null_value_not_allowed';
  elsif create_consumer.name = '' then
    raise exception 'name must not be empty' using errcode = 'invalid_parameter_value';
  elsif octet_length(create_consumer.name) > 255 then
    raise exception 'name is too long'
      using errcode = 'program_limit_exceeded', detail = 'A consumer''s name has at most 255 bytes.';
  elsif starts_with(create_consumer.name, 'projection:') then
    raise exception 'names that begin with "projection:" are those of async projections' using errcode = 'invalid_parameter_value';
  elsif create_consumer.start not in ('beginning', 'end') then
    raise exception 'start must be beginning or end'
      using errcode = 'invalid_parameter_value',
            hint = 'For another place, make the consumer and call nightowls.seek() or nightowls.seek_time().';
  end if;
  perform nightowls._check_consumer(create_consumer.members, create_consumer.max_attempts, create_consumer.retry_pause);
  if create_consumer.start = 'end' then
    -- Appends that are open now are after it.
    v_start := greatest(nightowls._safe_position(v_org, -1), 0);
  end if;
  perform nightowls._register_consumer(
    v_org, create_consumer.name, create_consumer.filter, v_start, create_consumer.members,
    create_consumer.max_attempts, create_consumer.retry_pause);
end;
$$;

comment on function nightowls.create_consumer(text, jsonb, text, int, int, interval, uuid) is
  'Makes a consumer: a reader of the log that keeps its place. name: unique in the org; filter: {"aggregate_types": […], '
  '"event_types": […]}, null for all events; start: beginning, or end for what is appended from now on (seek and seek_time go '
  'elsewhere); members: how many share the events by aggregate, 1 to 32; max_attempts: after how many failed attempts (fail_event) an '
  'event is parked; retry_pause: how long a share rests after a failed attempt, doubled by each further one; org: the tenant. The same '
  'definition again changes nothing, whatever start says. Locks nothing. Raises 42710 if it exists with another definition, 22004 or 22023 for an '
  'argument that is null or not valid, 54000 for a name above 255 bytes, 25001 above read committed with start end, NW010 if there is no org.';

revoke all on function nightowls.create_consumer(text, jsonb, text, int, int, interval, uuid) from public;

-- Changes a consumer. Another number of members begins where all that was given out ends: until there the old shares
-- go on, so that nothing is given out twice and no aggregate by two at once. Definer: the tables are closed.
create function nightowls._alter_consumer(
  org          uuid,
  name         text,
  filter       jsonb,
  members      int,
  max_attempts int,
  retry_pause  interval
)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_consumer nightowls.consumers := nightowls._lock_shares(_alter_consumer.org, _alter_consumer.name);
  v_filter   record;
  v_done_to  bigint;
  v_drain_to bigint;
begin
  v_filter := nightowls._parse_filter(_alter_consumer.filter);
  update nightowls.consumers c
     set filter = coalesce(_alter_consumer.filter, c.filter),
         aggregate_types = case when _alter_consumer.filter is null then c.aggregate_types else v_filter.aggregate_types end,
         event_types = case when _alter_consumer.filter is null then c.event_types
                            when v_filter.event_types is not null then v_filter.event_types || 'nightowls.erased'::text end,
         max_attempts = coalesce(_alter_consumer.max_attempts, c.max_attempts),
         retry_pause = coalesce(_alter_consumer.retry_pause, c.retry_pause)
   where c.org_id = _alter_consumer.org and c.name = _alter_consumer.name;
  if _alter_consumer.members is null
     or _alter_consumer.members = coalesce(v_consumer.next_members, v_consumer.members) then
    return;
  elsif v_consumer.drain_to is not null then
    update nightowls.consumers c
       set next_members = _alter_consumer.members
     where c.org_id = _alter_consumer.org and c.name = _alter_consumer.name;
    return;
  end if;

  select min(s."offset"), max(case when s.member is null or s.replaying then s."offset" else s.scanned_to end)
    into v_done_to, v_drain_to
    from nightowls._share_states(v_consumer) s;
  if v_done_to = v_drain_to then
    perform nightowls._begin_shares(_alter_consumer.org, _alter_consumer.name, _alter_consumer.members, v_done_to);
  else
    update nightowls.consumers c
       set drain_to = v_drain_to, next_members = _alter_consumer.members
     where c.org_id = _alter_consumer.org and c.name = _alter_consumer.name;
  end if;
end;
$$;

revoke all on function nightowls._alter_consumer(uuid, text, jsonb, int, int, interval) from public;

create function nightowls.alter_consumer(
  name         text,
  filter       jsonb default null,
  members      int default null,
  max_attempts int default null,
  retry_pause  interval default null,
  org          uuid default null
)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org uuid := nightowls.current_org(alter_consumer.org);
begin
  perform nightowls._check_consumer(alter_consumer.members, alter_consumer.max_attempts, alter_consumer.retry_pause);
  perform nightowls._refuse_projection(alter_consumer.name);
  perform nightowls._alter_consumer(v_org, alter_consumer.name, alter_consumer.filter, alter_consumer.members,
                                    alter_consumer.max_attempts, alter_consumer.retry_pause);
end;
$$;

comment on function nightowls.alter_consumer(text, jsonb, int, int, interval, uuid) is
  'Changes a consumer; null leaves a thing as it is. name: the consumer; filter: for the events that come next, {} for all; '
  'members: the shares at work go on until they have done all that had been given out, each by whoever fetches, then the events are '
  'dealt anew: nothing is given out twice, and the order within an aggregate is kept; max_attempts, retry_pause: as in '
  'create_consumer; org: the tenant. Waits for open transactions that have fetched or committed for this consumer. Raises NW007 if '
  'it does not exist, 22023 for an argument that is not valid, 25001 above read committed, NW010 if there is no org.';

revoke all on function nightowls.alter_consumer(text, jsonb, int, int, interval, uuid) from public;

-- An async projection's consumer is kept by the projection's functions.
create function nightowls._refuse_projection(name text)
  returns void
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if starts_with(_refuse_projection.name, 'projection:') then
    raise exception 'consumer "%" keeps an async projection', left(_refuse_projection.name, 64)
      using errcode = 'invalid_parameter_value',
            hint = 'Use nightowls.run_projections(), rebuild_projection() or drop_projection().';
  end if;
end;
$$;

revoke all on function nightowls._refuse_projection(text) from public;

-- Definer: the tables are closed.
create function nightowls._drop_consumer(org uuid, name text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform nightowls._lock_shares(_drop_consumer.org, _drop_consumer.name);
  delete from nightowls.consumers c where c.org_id = _drop_consumer.org and c.name = _drop_consumer.name;
  delete from nightowls._consumer_offsets o where o.org_id = _drop_consumer.org and o.consumer = _drop_consumer.name;
  delete from nightowls._consumer_failures f where f.org_id = _drop_consumer.org and f.consumer = _drop_consumer.name;
end;
$$;

revoke all on function nightowls._drop_consumer(uuid, text) from public;

create function nightowls.drop_consumer(name text, org uuid default null)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org uuid := nightowls.current_org(drop_consumer.org);
begin
  perform nightowls._refuse_projection(drop_consumer.name);
  perform nightowls._drop_consumer(v_org, drop_consumer.name);
end;
$$;

comment on function nightowls.drop_consumer(text, uuid) is
  'Forgets a consumer, its offsets and what it has parked; the events stay. A consumer made later under the same name begins anew, '
  'and fences of the old one count for nothing. name: the consumer; org: the tenant. Waits for open transactions that have '
  'fetched or committed for it. Raises NW007 if it does not exist, 22023 for an async projection''s, 25001 above read committed, NW010 if '
  'there is no org.';

revoke all on function nightowls.drop_consumer(text, uuid) from public;

-- Writes the next row of a share. Every 64th time it removes the rows before, but the last: always of the same small range,
-- for a search from the beginning would walk what an old snapshot keeps. What a rolled-back transaction leaves over
-- is for _prune_consumers. Runs in functions of the owner's.
create function nightowls._write_share(state nightowls._consumer_offsets)
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
  _write_share.state.seq := (_write_share.state).seq + 1;
  _write_share.state.created_at := clock_timestamp();
  insert into nightowls._consumer_offsets select (_write_share.state).*;
  if (_write_share.state).seq % 64 = 0 then
    delete from nightowls._consumer_offsets o
     where o.org_id = (_write_share.state).org_id
       and o.consumer = (_write_share.state).consumer
       and o.generation = (_write_share.state).generation
       and o.share = (_write_share.state).share
       and o.seq between (_write_share.state).seq - 65 and (_write_share.state).seq - 2;
  end if;
end;
$$;

revoke all on function nightowls._write_share(nightowls._consumer_offsets) from public;

-- What fetch_events does once. A share is looked at without a lock first, and again with it; nobody is waited for. A lease that is
-- held keeps everybody off, its member included: two processes that run as one member do not take turns stealing from each
-- other. One that was given back keeps the others off until it would have ended, so that a member that is at work keeps
-- its share, and one that has died leaves it.
-- Definer: the tables are closed, and a member of the org may not read the log.
create function nightowls._fetch(org uuid, consumer text, max_events int, member int, lease interval)
  returns table (fence bigint, event nightowls.events)
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
  v_consumer  nightowls.consumers;
  v_state     nightowls._consumer_offsets;
  v_replays   boolean;
  v_open      int;
  v_share     int;
  v_locked    boolean;
  v_safe      bigint;
  v_parked    bigint[];
  v_positions bigint[];
  v_from      bigint;
  v_upper     bigint;
  v_count     int;
begin
  <<anew>>
  loop
    v_consumer := nightowls._consumer(_fetch.consumer, _fetch.org);
    if _fetch.member >= greatest(v_consumer.members, v_consumer.next_members) then
      raise exception 'consumer "%" has no member %', v_consumer.name, _fetch.member
        using errcode = 'invalid_parameter_value',
              detail = format('It has %s, numbered from 0.', greatest(v_consumer.members, v_consumer.next_members)),
              hint = 'Change their number with nightowls.alter_consumer(name, members => …).';
    end if;
    v_replays := exists (
      select from nightowls._consumer_failures f
       where f.org_id = _fetch.org and f.consumer = v_consumer.name and (f.parked_at is not null or f.replay));
    v_open := 0;

    <<shares>>
    for v_no in 0 .. v_consumer.members - 1 loop
      -- The member's own share first, then what others have left.
      v_share := (_fetch.member + v_no) % v_consumer.members;
      v_locked := false;
      loop
        select o.* into strict v_state
          from nightowls._consumer_offsets o
         where o.org_id = _fetch.org and o.consumer = v_consumer.name and o.generation = v_consumer.generation and o.share = v_share
         order by o.seq desc
         limit 1;
        continue shares when v_state."offset" >= v_consumer.drain_to;
        v_open := v_open + (not v_locked)::int;
        continue shares when v_state.paused_until > clock_timestamp()
          or v_state.lease_until > clock_timestamp() and (v_state.member is not null or v_share <> _fetch.member);
        exit when v_locked;
        v_safe := least(nightowls._safe_position(_fetch.org, v_state."offset"), v_consumer.drain_to);
        continue shares when not v_replays and v_safe <= v_state."offset"
          or not nightowls._lock_share(_fetch.org, v_consumer.name, v_share, false);
        -- Somebody may have been faster.
        v_locked := true;
        v_replays := exists (
          select from nightowls._consumer_failures f
           where f.org_id = _fetch.org and f.consumer = v_consumer.name and (f.parked_at is not null or f.replay));
        continue anew when (nightowls._consumer(_fetch.consumer, _fetch.org)) is distinct from v_consumer;
      end loop;
      v_safe := greatest(v_safe, v_state."offset");

      -- In units of 8 microseconds since 2020, above the one before, with the share as its lowest five bits.
      v_state.fence := greatest((extract(epoch from clock_timestamp() - timestamptz '2020-01-01 00:00:00Z') * 125000)::bigint,
                                v_state.fence / 32 + 1) * 32 + v_share;
      v_state.member := _fetch.member;
      v_state.lease_until := clock_timestamp() + _fetch.lease;
      v_state.paused_until := null;
      v_state.replaying := v_replays;
      v_count := 0;
      fence := v_state.fence;

      if v_replays then
        v_positions := '{}';
        for event in
          select e.*
            from nightowls._consumer_failures f
            join nightowls.events e on e.org_id = f.org_id and e."position" = f."position"
           where f.org_id = _fetch.org and f.consumer = v_consumer.name and (f.parked_at is not null or f.replay) and f.replay
             and nightowls._share(e.aggregate_type, e.aggregate_id, v_consumer.members) = v_share
           order by f."position"
           limit _fetch.max_events
        loop
          v_positions := v_positions || (event)."position";
          return next;
        end loop;
        if v_positions <> '{}' then
          update nightowls._consumer_failures f
             set fence = v_state.fence
           where f.org_id = _fetch.org and f.consumer = v_consumer.name and f."position" = any (v_positions);
          v_state.last_position := v_positions[cardinality(v_positions)];
          v_state.scanned_to := v_state.last_position;
          perform nightowls._write_share(v_state);
          return;
        end if;
        v_state.replaying := false;
        v_parked := array(
          select f."position"
            from nightowls._consumer_failures f
           where f.org_id = _fetch.org and f.consumer = v_consumer.name and (f.parked_at is not null or f.replay)
             and f."position" > v_state."offset" and f."position" <= v_safe);
      end if;

      -- The second time is for what may have moved while the end of a long search was looked for.
      v_from := v_state."offset";
      v_upper := v_safe;
      for v_pass in 1 .. 2 loop
        for event in
          select e.*
            from (select x.*
                    from nightowls.events x
                   where x.org_id = _fetch.org and x."position" > v_from and x."position" <= v_upper
                   order by x."position"
                   limit case v_pass when 1 then 50000 end) e
           where (v_consumer.aggregate_types is null or e.aggregate_type = any (v_consumer.aggregate_types))
             and (v_consumer.event_types is null or e.event_type = any (v_consumer.event_types))
             and (v_parked is null or e."position" <> all (v_parked))
             and (v_consumer.members = 1
                  or nightowls._share(e.aggregate_type, e.aggregate_id, v_consumer.members) = v_share)
           order by e."position"
           limit _fetch.max_events - v_count
        loop
          v_count := v_count + 1;
          v_from := (event)."position";
          return next;
        end loop;
        exit when v_count >= _fetch.max_events or v_safe - v_state."offset" <= 50000 or v_pass = 2;
        v_upper := coalesce((
          select x."position"
            from nightowls.events x
           where x.org_id = _fetch.org and x."position" > v_state."offset" and x."position" <= v_safe
           order by x."position"
          offset 49999
           limit 1), v_safe);
      end loop;

      if v_count > 0 then
        v_state.last_position := v_from;
        v_state.scanned_to := case when v_count >= _fetch.max_events then v_from else v_upper end;
        perform nightowls._write_share(v_state);
        return;
      elsif v_upper > v_state."offset" then
        -- Nothing in it for this share: that far it need not be searched again. No fence was given out.
        v_state."offset" := v_upper;
        v_state.member := null;
        v_state.lease_until := null;
        v_state.last_position := null;
        v_state.scanned_to := null;
        perform nightowls._write_share(v_state);
        v_open := v_open - (v_upper >= v_consumer.drain_to is true)::int;
      end if;
    end loop;

    if v_consumer.drain_to is not null and v_open = 0 then
      perform from nightowls.consumers c
        where c.org_id = _fetch.org and c.name = v_consumer.name and c.generation = v_consumer.generation
          for update skip locked;
      if found then
        perform nightowls._begin_shares(_fetch.org, v_consumer.name, v_consumer.next_members, v_consumer.drain_to);
        continue;
      end if;
    end if;
    return;
  end loop;
end;
$$;

revoke all on function nightowls._fetch(uuid, text, int, int, interval) from public;

-- How many milliseconds fetch_events may sleep for new events. Whose share others have now, or have failed with, looks more
-- often: nobody says when that is over.
-- Definer: the tables are closed.
create function nightowls._fetch_nap(org uuid, consumer text)
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
  v_consumer nightowls.consumers := nightowls._consumer(_fetch_nap.consumer, _fetch_nap.org);
begin
  if v_consumer.members > 1 or v_consumer.drain_to is not null
     or exists (select from nightowls._share_states(v_consumer) s
                 where s.lease_until > clock_timestamp() or s.paused_until > clock_timestamp()) then
    return 250;
  end if;
  return 20000;
end;
$$;

revoke all on function nightowls._fetch_nap(uuid, text) from public;

create function nightowls.fetch_events(
  consumer   text,
  max_events int default 1000,
  member     int default 0,
  lease      interval default '30 seconds',
  max_wait   interval default '0',
  org        uuid default null
)
  returns table (
    fence          bigint,
    "position"     bigint,
    aggregate_type text,
    aggregate_id   text,
    version        bigint,
    event_type     text,
    payload        jsonb,
    metadata       jsonb,
    event_id       uuid,
    created_at     timestamptz
  )
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org   uuid := nightowls.current_org(fetch_events.org);
  v_until timestamptz := clock_timestamp() + fetch_events.max_wait;
  v_key   text := 'events/' || nightowls._org_class(v_org);
  v_seen  bigint := nightowls._wake_count(v_key);
  v_nth   int := 0;
begin
  perform nightowls._check_max_events(fetch_events.max_events);
  if fetch_events.member is null or fetch_events.lease is null or fetch_events.max_wait is null then
    raise exception 'member, lease and max_wait must not be null' using errcode = 'null_value_not_allowed';
  elsif fetch_events.member < 0 then
    raise exception 'member must be 0 or more' using errcode = 'invalid_parameter_value';
  elsif fetch_events.lease <= interval '0' then
    raise exception 'lease must be more than 0' using errcode = 'invalid_parameter_value';
  elsif fetch_events.max_wait not between interval '0' and interval '1 minute' then
    raise exception 'max_wait must be between 0 and 1 minute'
      using errcode = 'invalid_parameter_value', hint = 'Call again to wait longer.';
  end if;
  perform nightowls._refuse_snapshot('fetching');
  perform nightowls._refuse_projection(fetch_events.consumer);
  loop
    return query
      select f.fence, (f.event)."position", (f.event).aggregate_type, (f.event).aggregate_id, (f.event).version,
             (f.event).event_type, (f.event).payload, (f.event).metadata, (f.event).event_id, (f.event).created_at
        from nightowls._fetch(v_org, fetch_events.consumer, fetch_events.max_events, fetch_events.member, fetch_events.lease) f;
    exit when found or clock_timestamp() >= v_until;
    v_seen := nightowls._nap(v_key, v_seen, v_nth, least(nightowls._fetch_nap(v_org, fetch_events.consumer),
                                                         ceil(extract(epoch from v_until - clock_timestamp()) * 1000)::int));
    v_nth := v_nth + 1;
  end loop;
end;
$$;

comment on function nightowls.fetch_events(text, int, int, interval, interval, uuid) is
  'The next events of a consumer, in order, at most max_events, each with the fence under which they are given out; none if there are '
  'none, or if somebody else is at work on them. Commit with commit_offset, in the transaction that has the effects. consumer: its name; '
  'member: which of its members asks, from 0; lease: how long nobody else gets them; after that whoever asks does, and this fence counts for '
  'nothing; max_wait: how long to wait for events, at most 1 minute, holding a connection; org: the tenant. No event is ever skipped, whatever commits late. '
  'Looks at no more than 50,000 events a call and remembers how far it got. Locks the share it takes until the transaction ends, '
  'and waits for nobody. Raises NW007 if the consumer does not exist, 22004 or 22023 for an argument that is null or not valid, 25001 '
  'above read committed, 55000 on a standby, NW010 if there is no org.';

revoke all on function nightowls.fetch_events(text, int, int, interval, interval, uuid) from public;

-- The newest row of the share a fence is for, locked; NW003 unless that fence is the last one given out and its member
-- holds the lease. That the lease has ended does not matter as long as nobody has taken it over.
-- Definer: the tables are closed.
create function nightowls._held_share(org uuid, consumer text, fence bigint, member int)
  returns nightowls._consumer_offsets
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
  v_consumer nightowls.consumers;
  v_state    nightowls._consumer_offsets;
begin
  perform nightowls._refuse_snapshot('working for a consumer');
  perform nightowls._refuse_projection(_held_share.consumer);
  v_consumer := nightowls._consumer(_held_share.consumer, _held_share.org);
  if _held_share.fence is null or _held_share.member is null then
    raise exception 'fence and member must not be null' using errcode = 'null_value_not_allowed';
  end if;
  perform nightowls._lock_share(_held_share.org, _held_share.consumer, (_held_share.fence & 31)::int, true);
  v_consumer := nightowls._consumer(_held_share.consumer, _held_share.org);
  select o.* into v_state
    from nightowls._consumer_offsets o
   where o.org_id = _held_share.org and o.consumer = v_consumer.name and o.generation = v_consumer.generation
     and o.share = (_held_share.fence & 31)::int
   order by o.seq desc
   limit 1;
  if v_state.fence = _held_share.fence and v_state.member = _held_share.member then
    return v_state;
  end if;
  raise exception 'consumer "%" is not held with fence %', v_consumer.name, _held_share.fence
    using errcode = 'NW003',
          detail = case
            when v_state.fence = _held_share.fence and v_state.member is not null
              then format('Member %s holds it with this fence, not %s.', v_state.member, _held_share.member)
            when v_state.fence = _held_share.fence then 'What was fetched with it is committed, or was given back.'
            else format('The last fence given out is %s.', v_state.fence) end,
          hint = 'Roll back and fetch again: the events are with somebody else, or done.';
end;
$$;

revoke all on function nightowls._held_share(uuid, text, bigint, int) from public;

-- Definer: the tables are closed.
create function nightowls._commit_offset(org uuid, consumer text, up_to bigint, fence bigint, member int)
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
  v_state nightowls._consumer_offsets :=
    nightowls._held_share(_commit_offset.org, _commit_offset.consumer, _commit_offset.fence, _commit_offset.member);
  v_known boolean;
begin
  if v_state.replaying then
    delete from nightowls._consumer_failures f
     where f.org_id = _commit_offset.org and f.consumer = _commit_offset.consumer
       and (f.parked_at is not null or f.replay) and f.replay
       and f.fence = _commit_offset.fence and f."position" <= _commit_offset.up_to;
    v_known := found;
  else
    v_known := _commit_offset.up_to > v_state."offset";
  end if;
  if not v_known then
    raise exception 'offset % of consumer "%" is not above what is committed', _commit_offset.up_to, _commit_offset.consumer
      using errcode = 'invalid_parameter_value',
            detail = case when v_state.replaying then 'The events fetched are parked ones that are replayed.'
                          else format('Committed is %s.', v_state."offset") end,
            hint = 'To go back, use nightowls.seek().';
  elsif _commit_offset.up_to > v_state.scanned_to then
    raise exception 'offset % of consumer "%" is beyond what was fetched', _commit_offset.up_to, _commit_offset.consumer
      using errcode = 'invalid_parameter_value',
            detail = format('The last event fetched is at %s.', v_state.last_position);
  end if;

  if not v_state.replaying then
    -- Behind the last event fetched the search has found no other.
    v_state."offset" := case when _commit_offset.up_to >= v_state.last_position then v_state.scanned_to else _commit_offset.up_to end;
  end if;
  if _commit_offset.up_to >= v_state.last_position then
    v_state.member := null;
    v_state.last_position := null;
    v_state.scanned_to := null;
    v_state.replaying := false;
  end if;
  perform nightowls._write_share(v_state);
end;
$$;

revoke all on function nightowls._commit_offset(uuid, text, bigint, bigint, int) from public;

create function nightowls.commit_offset(
  consumer text,
  up_to    bigint,
  fence    bigint,
  member   int default 0,
  org      uuid default null
)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org uuid := nightowls.current_org(commit_offset.org);
begin
  if commit_offset.up_to is null then
    raise exception 'up_to must not be null' using errcode = 'null_value_not_allowed';
  end if;
  perform nightowls._commit_offset(v_org, commit_offset.consumer, commit_offset.up_to, commit_offset.fence, commit_offset.member);
end;
$$;

comment on function nightowls.commit_offset(text, bigint, bigint, int, uuid) is
  'Says that a consumer is done with the events up to a position, in the caller''s transaction: what they have brought about there and '
  'the offset are committed together or not at all. consumer: its name; up_to: the position of the last event that is done; when it is the last one '
  'that was fetched, the lease is given back; fence, member: as fetched; org: the tenant. Waits for an open transaction that '
  'works on the same share. Raises NW003 if somebody has fetched since or the lease was given back, 22023 if up_to is not above what is committed or '
  'beyond what was fetched, NW007 if the consumer does not exist, 22004 for a null argument, 25001 above read committed, NW010 if there is no org.';

revoke all on function nightowls.commit_offset(text, bigint, bigint, int, uuid) from public;

-- Definer: the tables are closed.
create function nightowls._renew_lease(org uuid, consumer text, fence bigint, lease interval, member int)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_state nightowls._consumer_offsets :=
    nightowls._held_share(_renew_lease.org, _renew_lease.consumer, _renew_lease.fence, _renew_lease.member);
begin
  v_state.lease_until := clock_timestamp() + _renew_lease.lease;
  if _renew_lease.lease = interval '0' then
    v_state.member := null;
    v_state.last_position := null;
    v_state.scanned_to := null;
    v_state.replaying := false;
  end if;
  perform nightowls._write_share(v_state);
end;
$$;

revoke all on function nightowls._renew_lease(uuid, text, bigint, interval, int) from public;

create function nightowls.renew_lease(
  consumer text,
  fence    bigint,
  lease    interval default '30 seconds',
  member   int default 0,
  org      uuid default null
)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org uuid := nightowls.current_org(renew_lease.org);
begin
  if renew_lease.lease is null then
    raise exception 'lease must not be null' using errcode = 'null_value_not_allowed';
  elsif renew_lease.lease < interval '0' then
    raise exception 'lease must be 0 or more' using errcode = 'invalid_parameter_value';
  end if;
  perform nightowls._renew_lease(v_org, renew_lease.consumer, renew_lease.fence, renew_lease.lease, renew_lease.member);
end;
$$;

comment on function nightowls.renew_lease(text, bigint, interval, int, uuid) is
  'Lets a lease end later (or earlier): from now on it lasts as long as lease says; 0 gives it back, and what is not committed can be '
  'fetched at once, by any member. consumer, fence, member: as fetched; org: the tenant. Waits for an open transaction that works on the same '
  'share. Raises NW003 if somebody has fetched since or the lease was given back, NW007 if the consumer does not exist, 22004 or 22023 for '
  'an argument that is null or not valid, 25001 above read committed, NW010 if there is no org.';

revoke all on function nightowls.renew_lease(text, bigint, interval, int, uuid) from public;

-- Notes that an event could not be handled; returns whether it is parked. park: at once, and the lease goes on; otherwise the attempt
-- is counted and the lease given back. Whoever had fetched and failed in one transaction has lost the lease with it: its fence is
-- above the last one recorded, and is good as long as nobody else has a lease.
-- Definer: the tables are closed.
create function nightowls._fail_event(
  org            uuid,
  consumer       text,
  event_position bigint,
  error          text,
  fence          bigint,
  member         int,
  park           boolean
)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_consumer nightowls.consumers;
  v_state    nightowls._consumer_offsets;
  v_known    boolean;
  v_attempts int;
begin
  perform nightowls._refuse_snapshot('working for a consumer');
  perform nightowls._refuse_projection(_fail_event.consumer);
  v_consumer := nightowls._consumer(_fail_event.consumer, _fail_event.org);
  if _fail_event.fence is null or _fail_event.member is null or _fail_event.event_position is null then
    raise exception 'event_position, fence and member must not be null' using errcode = 'null_value_not_allowed';
  end if;
  perform nightowls._lock_share(_fail_event.org, _fail_event.consumer, (_fail_event.fence & 31)::int, true);
  v_consumer := nightowls._consumer(_fail_event.consumer, _fail_event.org);
  select o.* into v_state
    from nightowls._consumer_offsets o
   where o.org_id = _fail_event.org and o.consumer = v_consumer.name and o.generation = v_consumer.generation
     and o.share = (_fail_event.fence & 31)::int
   order by o.seq desc
   limit 1;
  if _fail_event.park or v_state.fence is null or _fail_event.fence <= v_state.fence
     or v_state.member is not null and v_state.lease_until > clock_timestamp() then
    v_state := nightowls._held_share(_fail_event.org, _fail_event.consumer, _fail_event.fence, _fail_event.member);
  else
    v_state.fence := _fail_event.fence;
    v_state.last_position := null;
  end if;

  -- Parked and replayed, or not done yet.
  v_known := exists (
       select from nightowls._consumer_failures f
        where f.org_id = _fail_event.org and f.consumer = v_consumer.name and f."position" = _fail_event.event_position and f.replay)
    or _fail_event.event_position > v_state."offset"
       and (v_state.last_position is null or _fail_event.event_position <= v_state.last_position);
  if not v_known or not exists (
       select from nightowls.events e
        where e.org_id = _fail_event.org and e."position" = _fail_event.event_position
          and nightowls._share(e.aggregate_type, e.aggregate_id, v_consumer.members) = v_state.share) then
    raise exception 'event % is not one that consumer "%" has fetched and not committed', _fail_event.event_position, v_consumer.name
      using errcode = 'invalid_parameter_value';
  end if;

  -- What is told of an erased event may tell what was erased.
  perform nightowls._share_erasure(_fail_event.org);
  if exists (
       select from nightowls.events e
        where e.org_id = _fail_event.org and e."position" = _fail_event.event_position
          and e.event_type = 'nightowls.erased' and e.payload = '{}') then
    _fail_event.error := null;
  end if;
  insert into nightowls._consumer_failures as f (org_id, consumer, "position", attempts, error)
  values (_fail_event.org, v_consumer.name, _fail_event.event_position, 1, _fail_event.error)
  on conflict (org_id, consumer, "position") do update
    set attempts = f.attempts + 1, error = excluded.error, failed_at = clock_timestamp()
  returning f.attempts into v_attempts;
  if _fail_event.park or v_attempts >= v_consumer.max_attempts then
    update nightowls._consumer_failures f
       set parked_at = clock_timestamp(), replay = false
     where f.org_id = _fail_event.org and f.consumer = v_consumer.name and f."position" = _fail_event.event_position;
  end if;
  if not _fail_event.park then
    v_state.member := null;
    v_state.last_position := null;
    v_state.scanned_to := null;
    v_state.replaying := false;
    v_state.lease_until := null;
    if v_attempts < v_consumer.max_attempts then
      v_state.paused_until := clock_timestamp()
        + least(v_consumer.retry_pause * (2 ^ least(v_attempts - 1, 16)), interval '5 minutes');
    end if;
    perform nightowls._write_share(v_state);
  end if;
  return _fail_event.park or v_attempts >= v_consumer.max_attempts;
end;
$$;

revoke all on function nightowls._fail_event(uuid, text, bigint, text, bigint, int, boolean) from public;

create function nightowls.fail_event(
  consumer       text,
  event_position bigint,
  error          text,
  fence          bigint,
  member         int default 0,
  org            uuid default null
)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return nightowls._fail_event(nightowls.current_org(fail_event.org), fail_event.consumer, fail_event.event_position, fail_event.error,
                               fail_event.fence, fail_event.member, false);
end;
$$;

comment on function nightowls.fail_event(text, bigint, text, bigint, int, uuid) is
  'Says that an event could not be handled, after the consumer''s transaction was rolled back, and in one of its own: the attempt is counted, the '
  'lease given back, and the share rests for retry_pause, doubled by each attempt, before it can be fetched again. Returns whether the event is '
  'parked, which happens at the consumer''s max_attempts: then the consumer goes on without it. consumer: its name; event_position: the event; '
  'error: what went wrong, kept beside it; fence, member: as fetched, also when the fetch was rolled back with the rest; org: the tenant. Waits for an open '
  'transaction that works on the same share. Raises NW003 if somebody has fetched since, 22023 if the event is not one that was fetched and is '
  'not committed, NW007 if the consumer does not exist, 22004 for a null position, fence or member, 25001 above read committed, NW010 if there is no org.';

revoke all on function nightowls.fail_event(text, bigint, text, bigint, int, uuid) from public;

create function nightowls.park_event(
  consumer       text,
  event_position bigint,
  error          text,
  fence          bigint,
  member         int default 0,
  org            uuid default null
)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform nightowls._fail_event(nightowls.current_org(park_event.org), park_event.consumer, park_event.event_position, park_event.error,
                                park_event.fence, park_event.member, true);
end;
$$;

comment on function nightowls.park_event(text, bigint, text, bigint, int, uuid) is
  'Parks an event at once, with its error, in the caller''s transaction: the lease goes on, and commit_offset may pass the event. For what '
  'no further attempt can change. consumer: its name; event_position: the event; error: kept beside it; fence, member: as fetched; org: the '
  'tenant. Waits for an open transaction that works on the same share. Raises NW003 if somebody has fetched since or the lease was given back, 22023 if the '
  'event is not one that was fetched and is not committed, NW007 if the consumer does not exist, 22004 for a null position, fence or member, 25001 '
  'above read committed, NW010 if there is no org.';

revoke all on function nightowls.park_event(text, bigint, text, bigint, int, uuid) from public;

-- Lets parked events be given out once more (replay) or forgets them; returns how many.
-- Definer: the tables are closed.
create function nightowls._settle_parked(org uuid, consumer text, event_position bigint, replay boolean)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_consumer  nightowls.consumers := nightowls._lock_shares(_settle_parked.org, _settle_parked.consumer);
  v_positions bigint[] := array(
    select f."position"
      from nightowls._consumer_failures f
     where f.org_id = _settle_parked.org and f.consumer = v_consumer.name and f.parked_at is not null
       and (_settle_parked.event_position is null or f."position" = _settle_parked.event_position));
begin
  if v_positions = '{}' and _settle_parked.event_position is not null then
    raise exception 'consumer "%" has parked no event %', v_consumer.name, _settle_parked.event_position
      using errcode = 'NW007', hint = 'View nightowls.parked_events lists them.';
  end if;
  if _settle_parked.replay then
    update nightowls._consumer_failures f
       set parked_at = null, replay = true, attempts = 0, fence = null
     where f.org_id = _settle_parked.org and f.consumer = v_consumer.name and f."position" = any (v_positions);
    -- One that the offset has not passed comes in its order.
    delete from nightowls._consumer_failures f
     using nightowls.events e, nightowls._share_states(v_consumer) s
     where f.org_id = _settle_parked.org and f.consumer = v_consumer.name and f."position" = any (v_positions)
       and e.org_id = f.org_id and e."position" = f."position"
       and s.share = nightowls._share(e.aggregate_type, e.aggregate_id, v_consumer.members)
       and f."position" > case when s.member is null or s.replaying then s."offset" else s.scanned_to end;
    perform nightowls._wake('events/' || nightowls._org_class(_settle_parked.org));
  else
    -- What lies before the offset is done; the rest must not come again.
    delete from nightowls._consumer_failures f
     using nightowls.events e, nightowls._share_states(v_consumer) s
     where f.org_id = _settle_parked.org and f.consumer = v_consumer.name and f."position" = any (v_positions)
       and e.org_id = f.org_id and e."position" = f."position"
       and s.share = nightowls._share(e.aggregate_type, e.aggregate_id, v_consumer.members)
       and f."position" <= s."offset";
    get diagnostics v_consumer.members = row_count;
    if v_consumer.members < cardinality(v_positions) then
      raise exception 'consumer "%" has not passed a parked event yet', v_consumer.name
        using errcode = 'object_not_in_prerequisite_state',
              hint = 'Let it fetch and commit first: a parked event that is forgotten before would be given out again.';
    end if;
  end if;
  return cardinality(v_positions);
end;
$$;

revoke all on function nightowls._settle_parked(uuid, text, bigint, boolean) from public;

create function nightowls.replay_parked(consumer text, event_position bigint default null, org uuid default null)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org uuid := nightowls.current_org(replay_parked.org);
begin
  perform nightowls._refuse_projection(replay_parked.consumer);
  return nightowls._settle_parked(v_org, replay_parked.consumer, replay_parked.event_position, true);
end;
$$;

comment on function nightowls.replay_parked(text, bigint, uuid) is
  'Lets parked events be given out once more: the next fetch_events returns them, by themselves and before all others, later than events of '
  'the same aggregate that have been handled meanwhile. Returns how many. consumer: its name; event_position: which one, null for all of them; org: the '
  'tenant. Waits for open transactions that have fetched or committed for this consumer. Raises NW007 if the consumer or a parked event at '
  'that position does not exist, 22023 for an async projection''s consumer, 25001 above read committed, NW010 if there is no org.';

revoke all on function nightowls.replay_parked(text, bigint, uuid) from public;

create function nightowls.drop_parked(consumer text, event_position bigint default null, org uuid default null)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org uuid := nightowls.current_org(drop_parked.org);
begin
  perform nightowls._refuse_projection(drop_parked.consumer);
  return nightowls._settle_parked(v_org, drop_parked.consumer, drop_parked.event_position, false);
end;
$$;

comment on function nightowls.drop_parked(text, bigint, uuid) is
  'Forgets parked events: they will not be handled. Returns how many. consumer: its name; event_position: which one, null for all of them; '
  'org: the tenant. Waits for open transactions that have fetched or committed for this consumer. Raises NW007 if the consumer or a parked event '
  'at that position does not exist, 55000 if the consumer has not committed past it yet, 22023 for an async projection''s consumer, 25001 above '
  'read committed, NW010 if there is no org.';

revoke all on function nightowls.drop_parked(text, bigint, uuid) from public;

-- Puts all shares at an offset; every lease is lost. What was parked after it comes again in its order.
-- Definer: the tables are closed.
create function nightowls._seek(org uuid, consumer text, after bigint)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_consumer nightowls.consumers := nightowls._lock_shares(_seek.org, _seek.consumer);
  v_last     bigint := (
    select case when s.is_called then s.last_value else s.last_value - 1 end from nightowls.events_position_seq s);
begin
  if _seek.after > v_last then
    raise exception 'position % is beyond the end of the log', _seek.after
      using errcode = 'invalid_parameter_value',
            detail = format('The last position drawn is %s.', v_last),
            hint = 'Events to come would be skipped.';
  end if;
  delete from nightowls._consumer_failures f
   where f.org_id = _seek.org and f.consumer = v_consumer.name and f."position" > _seek.after;
  perform nightowls._begin_shares(_seek.org, v_consumer.name, coalesce(v_consumer.next_members, v_consumer.members), _seek.after);
end;
$$;

revoke all on function nightowls._seek(uuid, text, bigint) from public;

create function nightowls.seek(consumer text, after bigint, org uuid default null)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org uuid := nightowls.current_org(seek.org);
begin
  if seek.after is null then
    raise exception 'after must not be null'
      using errcode = 'null_value_not_allowed', hint = 'Use 0 to begin anew.';
  elsif seek.after < 0 then
    raise exception 'after must be 0 or more' using errcode = 'invalid_parameter_value';
  end if;
  perform nightowls._refuse_projection(seek.consumer);
  perform nightowls._seek(v_org, seek.consumer, seek.after);
end;
$$;

comment on function nightowls.seek(text, bigint, uuid) is
  'Lets a consumer go on after a position, forwards or backwards: all its members. 0: from the beginning. Leases are lost: what was fetched before can no '
  'longer be committed; what was parked after the position comes again. consumer: its name; after: a position that has been drawn; org: the '
  'tenant. Waits for open transactions that have fetched or committed for this consumer. Raises NW007 if it does not exist, 22004 or 22023 for a '
  'position that is null, negative or beyond the end of the log, 25001 above read committed, NW010 if there is no org.';

revoke all on function nightowls.seek(text, bigint, uuid) from public;

create function nightowls.seek_time(consumer text, since timestamptz, org uuid default null)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_sort to off
  set enable_bitmapscan to off
as $$
#variable_conflict use_column
declare
  v_org   uuid := nightowls.current_org(seek_time.org);
  v_after bigint;
begin
  if seek_time.since is null then
    raise exception 'since must not be null' using errcode = 'null_value_not_allowed';
  end if;
  perform nightowls._refuse_projection(seek_time.consumer);
  -- Times are not always rising with positions: everything before the first event that is late enough is left out, no more.
  v_after := greatest(nightowls._safe_position(v_org, -1), 0);
  v_after := coalesce((
    select e."position" - 1
      from nightowls.events e
     where e.org_id = v_org and e."position" <= v_after and e.created_at >= seek_time.since
     order by e."position"
     limit 1), v_after);
  perform nightowls._seek(v_org, seek_time.consumer, v_after);
  return v_after;
end;
$$;

comment on function nightowls.seek_time(text, timestamptz, uuid) is
  'Lets a consumer go on with the first event created at a time or later, and returns the position before it; if there is none yet, with what is '
  'appended from now on. Clocks are not always right, so older events can follow; none that is late enough is left out. Reads the log up to that event. '
  'consumer: its name; since: the time; org: the tenant. Waits for open transactions that have fetched or committed for this consumer. '
  'Raises NW007 if it does not exist, 22004 for a null time, 25001 above read committed, 55000 on a standby, NW010 if there is no org.';

revoke all on function nightowls.seek_time(text, timestamptz, uuid) from public;

-- The consumer that holds back the compaction of an aggregate type: the one with the lowest offset of those that can want its
-- events, and that offset; both null if there is none. A parked event holds back as one that is not done.
create function nightowls._slowest_consumer(
  org            uuid,
  aggregate_type text,
  out consumer   text,
  out "offset"   bigint
)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  select c.name, least(
           (select min(s."offset") from nightowls._share_states(c) s),
           (select min(f."position") - 1
              from nightowls._consumer_failures f
              join nightowls.events e on e.org_id = f.org_id and e."position" = f."position"
             where f.org_id = c.org_id and f.consumer = c.name and (f.parked_at is not null or f.replay)
               and e.aggregate_type = _slowest_consumer.aggregate_type))
    into _slowest_consumer.consumer, _slowest_consumer."offset"
    from nightowls.consumers c
   where c.org_id = _slowest_consumer.org
     and (c.aggregate_types is null or _slowest_consumer.aggregate_type = any (c.aggregate_types))
   order by 2, 1
   limit 1;
end;
$$;

revoke all on function nightowls._slowest_consumer(uuid, text) from public;

-- Removes rows that no longer count, of all orgs, for about max_ms, and returns how many. It takes no lock and waits for nobody.
-- Definer: the tables are closed.
create function nightowls._prune_consumers(max_ms int default 60000)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_until timestamptz := clock_timestamp() + _prune_consumers.max_ms * interval '1 millisecond';
  v_count bigint;
  v_done  bigint := 0;
begin
  loop
    delete from nightowls._consumer_offsets o
     where o.ctid = any (array(
             select x.ctid
               from nightowls._consumer_offsets x
              where not exists (
                      select from nightowls.consumers c
                       where c.org_id = x.org_id and c.name = x.consumer and c.generation = x.generation)
                 or exists (
                      select from nightowls._consumer_offsets n
                       where n.org_id = x.org_id and n.consumer = x.consumer and n.generation = x.generation and n.share = x.share
                         and n.seq > x.seq)
              limit 5000
                for update skip locked));
    get diagnostics v_count = row_count;
    v_done := v_done + v_count;
    exit when v_count < 5000 or clock_timestamp() >= v_until;
  end loop;
  -- Attempts that failed on events that are done since.
  delete from nightowls._consumer_failures f
   where f.ctid = any (array(
           select x.ctid
             from nightowls._consumer_failures x
             left join nightowls.consumers c on c.org_id = x.org_id and c.name = x.consumer
            where c.name is null
               or x.parked_at is null and not x.replay
              and x."position" <= (select min(s."offset") from nightowls._share_states(c) s)
            limit 5000
              for update of x skip locked));
  get diagnostics v_count = row_count;
  return v_done + v_count;
end;
$$;

revoke all on function nightowls._prune_consumers(int) from public;

-- Who holds the horizon of an org: the oldest append that is still open, by its process, or, once prepared, by its gid.
-- Definer: reading the sequence needs rights that callers lack.
create function nightowls._horizon_holder(org uuid, out pid int, out gid text)
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_last bigint := (
    select case when s.is_called then s.last_value else s.last_value - 1 end from nightowls.events_position_seq s);
begin
  select l.pid, p.gid
    into _horizon_holder.pid, _horizon_holder.gid
    from pg_locks l
    left join pg_locks t on l.pid is null and t.pid is null and t.locktype = 'transactionid' and t.virtualtransaction = l.virtualtransaction
    left join pg_prepared_xacts p on p.transaction = t.transactionid
   where l.locktype = 'advisory'
     and l.objsubid = 2
     and l.database = (select d.oid from pg_database d where d.datname = current_database())
     and l.classid::bigint in (nightowls._lock_class(nightowls._org_class(_horizon_holder.org)), nightowls._lock_class(256))
   order by (v_last - l.objid::bigint) & 4294967295 desc
   limit 1;
end;
$$;

revoke all on function nightowls._horizon_holder(uuid) from public;

create view nightowls.consumer_lag
  with (security_invoker = true)
as
  select c.org_id, c.name as consumer, s.share as member, s."offset",
         greatest(coalesce((select e."position"
                              from nightowls.events e
                             where e.org_id = c.org_id
                             order by e."position" desc
                             limit 1), 0) - s."offset", 0) as lag_positions,
         (select count(*)
            from (select
                    from nightowls.events e
                   where e.org_id = c.org_id and e."position" > s."offset"
                   order by e."position"
                   limit 10000) n) as lag_events,
         s.member as lease_member,
         case when s.member is not null then s.lease_until end as lease_until,
         s.fence, s.paused_until,
         (select count(*)
            from nightowls._consumer_failures f
           where f.org_id = c.org_id and f.consumer = c.name and (f.parked_at is not null or f.replay)) as parked,
         c.next_members,
         h.pid as horizon_pid, h.gid as horizon_gid
    from nightowls.consumers c
   cross join lateral nightowls._share_states(c) s
   cross join lateral nightowls._horizon_holder(c.org_id) h;

comment on view nightowls.consumer_lag is
  'How far each member''s share of each consumer is, who works on it, and who holds everybody back. Consumers named projection:… are those of '
  'async projections.';
comment on column nightowls.consumer_lag.org_id is 'The tenant.';
comment on column nightowls.consumer_lag.consumer is 'The consumer.';
comment on column nightowls.consumer_lag.member is 'Whose share of the events, from 0.';
comment on column nightowls.consumer_lag."offset" is 'Every event of the share at or below this position is done or parked.';
comment on column nightowls.consumer_lag.lag_positions is 'How far the org''s newest event lies ahead, in positions, which have gaps.';
comment on column nightowls.consumer_lag.lag_events is
  'How many events of the org come after the offset, wanted or not; 10000 stands for that many or more.';
comment on column nightowls.consumer_lag.lease_member is 'The member that holds the lease, which may be another; null when nobody does.';
comment on column nightowls.consumer_lag.lease_until is 'When the lease ends; what is past may be taken over.';
comment on column nightowls.consumer_lag.fence is 'The last fence given out.';
comment on column nightowls.consumer_lag.paused_until is 'Until when the share rests after a failed attempt.';
comment on column nightowls.consumer_lag.parked is 'How many events the consumer, all members together, has parked.';
comment on column nightowls.consumer_lag.next_members is 'The number of members to come, while it changes.';
comment on column nightowls.consumer_lag.horizon_pid is
  'The process of the oldest append of the org that is still open: events after it are not given out until it ends.';
comment on column nightowls.consumer_lag.horizon_gid is 'The same for a prepared transaction, which has no process: its gid.';

create view nightowls.parked_events
  with (security_invoker = true)
as
  select f.org_id, f.consumer, f."position", f.attempts, f.error, f.failed_at, f.parked_at, f.replay,
         e.aggregate_type, e.aggregate_id, e.version, e.event_type, e.payload, e.metadata, e.event_id, e.created_at
    from nightowls._consumer_failures f
    left join nightowls.events e on e.org_id = f.org_id and e."position" = f."position"
   where f.parked_at is not null or f.replay;

comment on view nightowls.parked_events is
  'Events that a consumer has parked, with their errors; replay_parked gives them out once more, drop_parked forgets them.';
comment on column nightowls.parked_events.org_id is 'The tenant.';
comment on column nightowls.parked_events.consumer is 'The consumer.';
comment on column nightowls.parked_events."position" is 'The event''s position.';
comment on column nightowls.parked_events.attempts is 'How many attempts failed.';
comment on column nightowls.parked_events.error is 'What the last one failed with, as the consumer told it.';
comment on column nightowls.parked_events.failed_at is 'When that was.';
comment on column nightowls.parked_events.parked_at is 'When the event was parked; null once it is to be replayed.';
comment on column nightowls.parked_events.replay is 'Whether it waits to be given out once more.';
comment on column nightowls.parked_events.aggregate_type is 'The event''s aggregate type.';
comment on column nightowls.parked_events.aggregate_id is 'Its aggregate.';
comment on column nightowls.parked_events.version is 'Its number within the aggregate.';
comment on column nightowls.parked_events.event_type is 'What happened.';
comment on column nightowls.parked_events.payload is 'The facts.';
comment on column nightowls.parked_events.metadata is 'About the event.';
comment on column nightowls.parked_events.event_id is 'The caller''s idempotency key.';
comment on column nightowls.parked_events.created_at is 'The clock at insert.';

alter table nightowls.consumers enable row level security;
alter table nightowls.consumers force row level security;
create policy service_all on nightowls.consumers
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));

alter table nightowls._consumer_offsets enable row level security;
alter table nightowls._consumer_offsets force row level security;
create policy service_all on nightowls._consumer_offsets
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));

alter table nightowls._consumer_failures enable row level security;
alter table nightowls._consumer_failures force row level security;
create policy service_all on nightowls._consumer_failures
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));
