-- The log: the table, its append-only guard, the horizon, and the rules every append obeys.
--
-- The horizon. A position is drawn at insert and seen at commit, so 7 can appear after 8. Before a transaction
-- draws its first position it takes a shared advisory lock whose key is the last position drawn so far (the
-- hold); a reader stops at the smallest key held (the safe position). Everything at or below it is committed
-- or gone for good. docs/architecture.md has the argument.

create table nightowls.events (
  org_id         uuid        not null default nightowls.current_org(),
  "position"     bigint      not null generated always as identity,
  aggregate_type text        collate "C" not null,
  aggregate_id   text        collate "C" not null,
  version        bigint      not null,
  event_type     text        collate "C" not null,
  payload        jsonb       not null default '{}',
  metadata       jsonb       not null default '{}',
  event_id       uuid,
  created_at     timestamptz not null default clock_timestamp(),
  constraint events_pkey primary key (org_id, "position"),
  constraint events_aggregate_key unique (org_id, aggregate_type, aggregate_id, version)
);

create unique index events_event_id_key on nightowls.events (org_id, event_id) where event_id is not null;

comment on table nightowls.events is
  'The log: one row an event, append-only (NW008). Append with append_event, append_events or append_many; a plain insert '
  'is an append too, without idempotency, expectation or fence. Read it forwards with read_events: a plain select by '
  'position can miss events that commit late.';
comment on column nightowls.events.org_id is 'The tenant.';
comment on column nightowls.events."position" is 'The order of all events, rising, with gaps; drawn at insert.';
comment on column nightowls.events.aggregate_type is 'What kind of thing the event is about, such as order.';
comment on column nightowls.events.aggregate_id is 'Which one.';
comment on column nightowls.events.version is 'The event''s number within its aggregate: 1, 2, 3 … without gaps.';
comment on column nightowls.events.event_type is 'What happened, such as order_paid.';
comment on column nightowls.events.payload is 'The facts, any JSON of at most 100 levels and 16 MB.';
comment on column nightowls.events.metadata is
  'About the event: actor_id, request_id, trace_id, causation_id, correlation_id and what else the caller adds.';
comment on column nightowls.events.event_id is
  'The caller''s idempotency key, unique within the org; event_id_for() makes one from a foreign id.';
comment on column nightowls.events.created_at is 'The clock at insert; not always rising with position.';

-- What an append of an aggregate type sets off.
create table nightowls.routes (
  org_id         uuid not null,
  aggregate_type text collate "C" not null,
  kind           text collate "C" not null,
  name           text collate "C" not null,
  constraint routes_pkey primary key (org_id, aggregate_type, kind, name),
  constraint routes_kind_check check (kind in ('reducer', 'handler', 'queue'))
);

comment on table nightowls.routes is
  'What an append sets off: one row for each projection of an aggregate type, and for each queue that is bound to it. Kept by the functions that '
  'make projections and bindings.';
comment on column nightowls.routes.org_id is 'The tenant.';
comment on column nightowls.routes.aggregate_type is 'The aggregate type whose events go there; empty: all types.';
comment on column nightowls.routes.kind is 'reducer: folded by the owner; handler: the user''s function, run as the one who appends; queue: sent as messages.';
comment on column nightowls.routes.name is 'The projection, or the queue.';

-- A restoring session is known by row_security = off, which every dump sets, and the table owner's rights.
create function nightowls._is_restoring()
  returns boolean
  language sql
  stable
  parallel safe
  return current_setting('row_security') = 'off'
     and pg_has_role(current_user, (select c.relowner from pg_class c where c.oid = 'nightowls.events'::regclass), 'usage');

revoke all on function nightowls._is_restoring() from public;

-- The append-only guard ---------------------------------------------------------------------------

-- nightowls.door says that one of our functions is at work in the transaction it names: <xid>|project… or <xid>|maintain.
-- It is shut before the function returns, and counts for the log only in a function of the owner's: a setting can be set
-- by anybody.
create function nightowls._open_door(purpose text)
  returns text
  language sql
  volatile
  parallel unsafe
  return set_config('nightowls.door', pg_current_xact_id()::text || '|' || purpose, true);

revoke all on function nightowls._open_door(text) from public;

create function nightowls._shut_door()
  returns text
  language sql
  volatile
  parallel unsafe
  return set_config('nightowls.door', '', true);

revoke all on function nightowls._shut_door() from public;

-- Nobody is ever given this one: to have the right is to be the owner, or a function of the owner's.
create function nightowls._owner()
  returns void
  language sql
  immutable
  parallel safe
  return null;

revoke all on function nightowls._owner() from public;

-- Compaction, restoring and erasure change the log through this door; nothing truncates it.
create function nightowls._is_maintaining()
  returns boolean
  language sql
  volatile
  parallel unsafe
  return coalesce(current_setting('nightowls.door', true), '') = pg_current_xact_id()::text || '|maintain'
     and has_function_privilege('nightowls._owner()'::regprocedure, 'execute');

revoke all on function nightowls._is_maintaining() from public;

create function nightowls._refuse_change()
  returns trigger
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if tg_op <> 'TRUNCATE' and nightowls._is_maintaining() then
    return null;
  end if;
  raise exception '%.% is append-only', tg_table_schema, tg_table_name
    using errcode = 'NW008',
          detail = format('%s is refused, whoever asks.', tg_op),
          hint = 'Append an event that says what changed.';
end;
$$;

revoke all on function nightowls._refuse_change() from public;

create trigger t05_append_only
  before update or delete or truncate on nightowls.events
  for each statement execute function nightowls._refuse_change();

-- The horizon -------------------------------------------------------------------------------------

-- Advisory lock classes, one range for all of nightowls: base + 0..255 one org's appends (by hash),
-- base + 256 a direct insert (any org), base + 257 an aggregate, base + 258 an org.
create function nightowls._lock_class(number int)
  returns int
  language sql
  immutable
  strict
  parallel safe
  return 1852798720 + number;

revoke all on function nightowls._lock_class(int) from public;

-- How many advisory locks this transaction has.
create function nightowls._locks_held()
  returns bigint
  language sql
  volatile
  parallel unsafe
  return (select count(*) from pg_catalog.pg_locks l where l.locktype = 'advisory' and l.pid = pg_backend_pid());

revoke all on function nightowls._locks_held() from public;

create function nightowls._org_class(org uuid)
  returns int
  language sql
  immutable
  strict
  parallel safe
  return uuid_hash(org) & 255;

revoke all on function nightowls._org_class(uuid) from public;

-- A key is the low 32 bits of a position, as a signed integer.
create function nightowls._lock_key(number bigint)
  returns int
  language sql
  immutable
  strict
  parallel safe
  return number::bit(32)::int;

revoke all on function nightowls._lock_key(bigint) from public;

-- The last position drawn. Never null, also on a sequence nobody has drawn from yet: lower than the truth does no harm.
create function nightowls._last_position()
  returns bigint
  language sql
  volatile
  parallel unsafe
  return coalesce(pg_sequence_last_value('nightowls.events_position_seq'::regclass), 0);

revoke all on function nightowls._last_position() from public;

-- The hold, taken before a position is drawn and kept until the transaction ends. The second one of a transaction is remembered in
-- nightowls.held, and serves those after it: <xid>|<class>:<last position>|…#<locks on aggregates>; a rolled-back savepoint
-- takes lock and memory together. After 32 classes comes the one that is held against all. org: null for all.
-- It runs in functions of the owner's, which have pinned the search_path.
create function nightowls._hold_again(org uuid)
  returns boolean
  language plpgsql
  volatile
  parallel unsafe
as $$
#variable_conflict use_column
declare
  v_class int := coalesce(nightowls._org_class(_hold_again.org), 256);
  v_held  text := current_setting('nightowls.held', true);
  v_last  bigint := nightowls._last_position();
  v_mark  bigint;
begin
  if starts_with(v_held, pg_current_xact_id()::text || '|') is not true then
    -- A session's setting is not ours.
    v_held := pg_current_xact_id()::text || '|#0';
  elsif strpos(v_held, '|256:') > 0 or length(v_held) - length(replace(v_held, ':', '')) >= 32 then
    v_class := 256;
  end if;
  v_mark := nullif(split_part(split_part(v_held, '|' || v_class || ':', 2), '|', 1), '')::bigint;
  if v_mark <= v_last then
    -- Asked for again, which costs nothing when it is held: a setting can be forged, a lock cannot.
    return pg_advisory_xact_lock_shared(nightowls._lock_class(v_class), nightowls._lock_key(v_mark)) is not null;
  end if;
  return pg_advisory_xact_lock_shared(nightowls._lock_class(v_class), nightowls._lock_key(v_last)) is not null
     and set_config('nightowls.held', replace(v_held, '#', v_class || ':' || v_last || '|#'), true) <> ''
     and nightowls._wake_readers(v_class);
end;
$$;

revoke all on function nightowls._hold_again(uuid) from public;

-- The hold of a transaction that has written nothing yet, mostly its only one, in an expression. It is not remembered: by the
-- transaction's id the next one knows that it is not the first. Who calls this then writes. class: _org_class(org).
create function nightowls._hold(org uuid, class int)
  returns boolean
  language sql
  volatile
  parallel unsafe
  return case
    when pg_current_xact_id_if_assigned() is not null then nightowls._hold_again(org)
    else pg_advisory_xact_lock_shared(nightowls._lock_class(class), nightowls._lock_key(nightowls._last_position())) is not null
         and nightowls._wake_readers(class)
  end;

revoke all on function nightowls._hold(uuid, int) from public;

-- Definer: reading the sequence needs rights that callers lack.
create function nightowls._hold_against_all()
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform nightowls._hold_again(null);
end;
$$;

revoke all on function nightowls._hold_against_all() from public;

-- Whether one of our functions that append is at work. They, and no others, have pg_append at the end of their search_path:
-- there is no such schema, nor can there be one. With the owner's rights it is the mark by which the triggers let them
-- pass. It costs nothing to put up and to take down, as a search_path is pinned anyhow, and it ends with the function, however
-- that ends. Anybody can set a search_path, nobody else has the role.
create function nightowls._is_append()
  returns boolean
  language sql
  stable
  parallel safe
  return current_setting('search_path') = 'pg_catalog, pg_temp, pg_append'
     and has_function_privilege('nightowls._owner()'::regprocedure, 'execute');

revoke all on function nightowls._is_append() from public;

-- Before a direct insert, of whatever org: held against all. Our functions have taken the hold of their org.
-- It pins no search_path, as every append of ours pays for it too: all it names is qualified. The same test in a "when" of the
-- trigger would cost more, for it is planned anew by each insert. new is null here, and costs less than an expression.
create function nightowls._before_insert()
  returns trigger
  language plpgsql
  volatile
  parallel unsafe
as $$
#variable_conflict use_column
begin
  if not nightowls._is_append() then
    perform nightowls._hold_against_all();
  end if;
  return new;
end;
$$;

revoke all on function nightowls._before_insert() from public;

create trigger t10_hold
  before insert on nightowls.events
  for each statement execute function nightowls._before_insert();

-- The lowest key held by an append that concerns an org, decoded against the last position drawn; null if none is.
create function nightowls._lowest_hold(org uuid, last bigint)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return (
    select min(_lowest_hold.last - ((_lowest_hold.last - l.objid::bigint) & 4294967295))
      from pg_locks l
     where l.locktype = 'advisory'
       and l.objsubid = 2
       and l.database = (select d.oid from pg_database d where d.datname = current_database())
       and l.classid::bigint in (nightowls._lock_class(nightowls._org_class(_lowest_hold.org)), nightowls._lock_class(256)));
end;
$$;

revoke all on function nightowls._lowest_hold(uuid, bigint) from public;

-- The last position at or below which nothing can appear any more for this org. What has been drawn and what
-- is held must be read in this order, each in a statement of its own, hence volatile: a stable function would see both
-- with its caller's older snapshot, and the reader would skip. Nothing after the cursor: the locks are not looked at.
-- Definer: reading the sequence needs rights that callers lack.
create function nightowls._safe_position(org uuid, after bigint)
  returns bigint
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
  v_last bigint;
begin
  if current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
    raise exception 'the log cannot be read forwards at isolation level %', current_setting('transaction_isolation')
      using errcode = 'active_sql_transaction',
            detail = 'A snapshot taken before the read began would make it skip events.',
            hint = 'Use read committed.';
  elsif pg_is_in_recovery() then
    raise exception 'the log cannot be read forwards on a standby'
      using errcode = 'object_not_in_prerequisite_state',
            detail = 'A standby does not know which appends are still open.',
            hint = 'Read from the primary.';
  end if;

  select case when s.is_called then s.last_value else s.last_value - 1 end
    into v_last
    from nightowls.events_position_seq s;
  if (select e."position"
        from nightowls.events e
       where e.org_id = _safe_position.org and e."position" > _safe_position.after
       order by e."position"
       limit 1) is null then
    return _safe_position.after;
  end if;
  return least(v_last, nightowls._lowest_hold(_safe_position.org, v_last));
end;
$$;

revoke all on function nightowls._safe_position(uuid, bigint) from public;

-- What an append looks into -----------------------------------------------------------------------

-- What an append must know of its org, in one row, so that it looks into one more table only.
create table nightowls._append_targets (
  org_id  uuid  not null,
  target  uuid  not null,
  class   int   not null generated always as (nightowls._org_class(target)) stored,
  follows jsonb not null default '{}',
  constraint _append_targets_pkey primary key (org_id)
);

comment on table nightowls._append_targets is
  'Which org an append is for and what follows it: a row for each org, and one under the zero uuid for calls that name none. '
  'Kept by triggers on orgs, settings and routes.';
comment on column nightowls._append_targets.org_id is 'The org that a call names; the zero uuid if it names none.';
comment on column nightowls._append_targets.target is 'The org.';
comment on column nightowls._append_targets.class is 'Its class of holds.';
comment on column nightowls._append_targets.follows is
  'For each aggregate type that has any the kinds of its routes and of those for all types; with the name, if that is one reducer: '
  '{"order": "reducer:orders", "cart": "handler,queue", "run": "broadcast,queue", "": "queue"}. broadcast, of runs, where Realtime is.';

-- Keeps the rows of one org. Who changes what follows in an org takes turns with others who do, and looks when it is their turn.
create function nightowls._keep_target(org uuid)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set jit to off
as $$
#variable_conflict use_column
declare
  v_broadcast boolean := nightowls._wants_broadcast();
begin
  insert into nightowls._append_targets (org_id, target)
  select o.org_id, o.org_id from nightowls.orgs o where o.org_id = _keep_target.org
  on conflict do nothing;
  perform from nightowls._append_targets t where t.org_id = _keep_target.org for update;
  update nightowls._append_targets t
     set follows = coalesce((
           select jsonb_object_agg(a.aggregate_type, (
                    select string_agg(distinct r.kind, ',')
                           || case when count(*) = 1 and min(r.kind) = 'reducer' then ':' || min(r.name) else '' end
                      from (select r.kind, r.name
                              from nightowls.routes r
                             where r.org_id = _keep_target.org and r.aggregate_type in ('', a.aggregate_type)
                             union all
                            select 'broadcast', '' where v_broadcast and a.aggregate_type = 'run') r))
             from (select r.aggregate_type from nightowls.routes r where r.org_id = _keep_target.org
                    union
                   select 'run' where v_broadcast) a), '{}')
   where t.org_id in (_keep_target.org, '00000000-0000-0000-0000-000000000000') and t.target = _keep_target.org;
  delete from nightowls._append_targets t
   where t.org_id in (_keep_target.org, '00000000-0000-0000-0000-000000000000') and t.target = _keep_target.org
     and not exists (select from nightowls.orgs o where o.org_id = t.target);
end;
$$;

revoke all on function nightowls._keep_target(uuid) from public;

-- The row of calls that name no org. An append that finds none asks for the default org itself.
create function nightowls._keep_default_target()
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set jit to off
as $$
#variable_conflict use_column
declare
  v_none constant uuid := '00000000-0000-0000-0000-000000000000';
  v_text text := (select s.value #>> '{}' from nightowls.settings s where s.name = 'default_org');
  v_org  uuid := case when v_text ~ '^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$' then v_text::uuid end;
begin
  perform from nightowls._append_targets t where t.org_id = v_org for update;
  delete from nightowls._append_targets t where t.org_id = v_none and t.target is distinct from v_org;
  insert into nightowls._append_targets (org_id, target, follows)
  select v_none, t.target, t.follows from nightowls._append_targets t where t.org_id = v_org and t.org_id <> v_none
  on conflict (org_id) do update set follows = excluded.follows;
end;
$$;

revoke all on function nightowls._keep_default_target() from public;

-- Definer: who may change orgs and settings may not see the rest.
create function nightowls._keep_targets()
  returns trigger
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if nightowls._is_restoring() then
    return null; -- The rows come from the dump.
  elsif tg_table_name = 'settings' then
    perform nightowls._keep_default_target();
    return null;
  end if;
  if tg_op <> 'INSERT' then
    perform nightowls._keep_target(old.org_id);
  end if;
  if tg_op <> 'DELETE' then
    perform nightowls._keep_target(new.org_id);
  end if;
  if tg_table_name = 'orgs' then
    perform nightowls._keep_default_target();
  end if;
  return null;
end;
$$;

revoke all on function nightowls._keep_targets() from public;

create trigger t10_targets
  after insert or update or delete on nightowls.routes
  for each row execute function nightowls._keep_targets();
create trigger t10_targets
  after insert or delete on nightowls.orgs
  for each row execute function nightowls._keep_targets();
create trigger t11_targets
  after update on nightowls.orgs
  for each row when (old.org_id <> new.org_id) execute function nightowls._keep_targets();
create trigger t10_targets_inserted
  after insert on nightowls.settings
  for each row when (new.name = 'default_org') execute function nightowls._keep_targets();
create trigger t11_targets_updated
  after update on nightowls.settings
  for each row when ('default_org' in (old.name, new.name)) execute function nightowls._keep_targets();
create trigger t12_targets_deleted
  after delete on nightowls.settings
  for each row when (old.name = 'default_org') execute function nightowls._keep_targets();

-- The rules of an append --------------------------------------------------------------------------

-- A direct insert may leave the version out. Writers to one aggregate take turns: up to 60 aggregates a transaction by
-- a lock each, beyond that by one for the org, as the lock table is the whole server's. (One of the many and one of the few
-- that meet in an aggregate end in 23505, as two that are not told apart do.)
-- Definer: it draws positions.
create function nightowls._fill_version(event nightowls.events)
  returns nightowls.events
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
  v_held     text := current_setting('nightowls.held', true);
  v_count    int := split_part(v_held, '#', 2)::int;
  v_head     bigint;
  v_position bigint;
begin
  if v_count < 60 then
    perform pg_advisory_xact_lock(
      nightowls._lock_class(257),
      hashtext(_fill_version.event.org_id::text || '/' || _fill_version.event.aggregate_type || '/'
               || _fill_version.event.aggregate_id));
    perform set_config('nightowls.held', split_part(v_held, '#', 1) || '#' || v_count + 1, true);
  else
    perform pg_advisory_xact_lock(nightowls._lock_class(258), uuid_hash(_fill_version.event.org_id));
  end if;
  select e.version, e."position" into v_head, v_position
    from nightowls.events e
   where e.org_id = _fill_version.event.org_id
     and e.aggregate_type = _fill_version.event.aggregate_type
     and e.aggregate_id = _fill_version.event.aggregate_id
   order by e.version desc
   limit 1;
  _fill_version.event.version := coalesce(v_head, 0) + 1;
  if v_position >= _fill_version.event."position"
     and _fill_version.event."position" > split_part(split_part(v_held, '|', 2), ':', 2)::bigint then
    -- Drawn before the turn was ours: versions must rise with positions. A chosen one is left to be refused.
    _fill_version.event."position" := nextval('nightowls.events_position_seq');
  end if;
  return _fill_version.event;
end;
$$;

revoke all on function nightowls._fill_version(nightowls.events) from public;

create function nightowls._next_version()
  returns trigger
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  new := nightowls._fill_version(new);
  return new;
end;
$$;

revoke all on function nightowls._next_version() from public;

create trigger t15_next_version
  before insert on nightowls.events
  for each row when (new.version is null) execute function nightowls._next_version();

create function nightowls._refuse_depth()
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  raise exception 'payload or metadata is nested too deeply'
    using errcode = 'program_limit_exceeded', detail = 'At most 100 levels of objects and arrays are kept.';
end;
$$;

revoke all on function nightowls._refuse_depth() from public;

create function nightowls._refuse_size()
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  raise exception 'payload or metadata is too large'
    using errcode = 'program_limit_exceeded', detail = 'At most 16777216 bytes are kept.',
          hint = 'Store the large part elsewhere and append a reference to it.';
end;
$$;

revoke all on function nightowls._refuse_size() from public;

-- Whether a JSON value has more than 100 levels of objects and arrays.
create function nightowls._is_too_deep(value jsonb)
  returns boolean
  language sql
  immutable
  parallel safe
  return jsonb_path_exists(value, 'strict $.**{100} ? (@.type() == "object" || @.type() == "array")');

revoke all on function nightowls._is_too_deep(jsonb) from public;

-- Whether a JSON value has more than 16 MB; one that comes compressed is measured as text. Stable, as pg_column_compression
-- is: called immutable it would not be inlined.
create function nightowls._is_too_large(value jsonb)
  returns boolean
  language sql
  stable
  parallel safe
  return pg_column_size(value) > 16777216
      or pg_column_compression(value) is not null and octet_length(value::text) > 16777216;

revoke all on function nightowls._is_too_large(jsonb) from public;

-- What is wrong with an event's payload or metadata: null if nothing is.
create function nightowls._body_fault(payload jsonb, metadata jsonb)
  returns text
  language sql
  stable
  parallel safe
  return case
    when nightowls._is_too_large(payload) or nightowls._is_too_large(metadata) then 'large'
    when nightowls._is_too_deep(payload) or nightowls._is_too_deep(metadata) then 'deep'
    when jsonb_typeof(metadata) <> 'object' then 'metadata'
  end;

revoke all on function nightowls._body_fault(jsonb, jsonb) from public;

-- Whether one of these event ids is in the archive: they are not to be used again. A probe for each.
create function nightowls._is_any_archived(org uuid, event_ids uuid[])
  returns boolean
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
  return exists (
    select from unnest(_is_any_archived.event_ids) as i (event_id)
     where (select true
              from nightowls.events_archive a
             where a.org_id = _is_any_archived.org and a.event_id = i.event_id));
end;
$$;

revoke all on function nightowls._is_any_archived(uuid, uuid[]) from public;

-- Refuses a direct insert that breaks the log's rules; our functions keep them by their making.
-- Definer: orgs and the sequence are closed to those who append.
create function nightowls._check_append(
  org             uuid,
  aggregate_types text[],
  aggregate_ids   text[],
  versions        bigint[],
  positions       bigint[],
  event_types     text[],
  event_ids       uuid[],
  body_fault      text
)
  returns void
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
  -- The lowest position held by this transaction: it has drawn nothing at or below it.
  v_low    bigint := split_part(split_part(current_setting('nightowls.held', true), '|', 2), ':', 2)::bigint;
  v_fault  text;
  v_type   text;
  v_id     text;
  v_number bigint;
begin
  case _check_append.body_fault
  when 'deep' then
    perform nightowls._refuse_depth();
  when 'large' then
    perform nightowls._refuse_size();
  when 'metadata' then
    raise exception 'metadata must be a JSON object' using errcode = 'invalid_parameter_value';
  else
    null;
  end case;

  -- Each row's predecessor must be there, at a lower position: with the unique keys this makes versions
  -- 1, 2, 3 … in the order of positions. Scalar subqueries, so that the plan is an index probe a row, always.
  select max(f.fault)
    into v_fault
    from (select case
                   when n.aggregate_type = '' or n.aggregate_id = '' or n.event_type = '' then 'empty'
                   when octet_length(n.aggregate_type) > 255 or octet_length(n.aggregate_id) > 1024
                     or octet_length(n.event_type) > 255 then 'long'
                   when starts_with(n.event_type, 'nightowls.') then 'reserved'
                   when n.position <= coalesce(v_low, 9223372036854775807)
                     or n.position > (select s.last_value from nightowls.events_position_seq s)
                     or n.position > currval('nightowls.events_position_seq') then 'position'
                   when n.version < 1 then 'version'
                   when n.version = 1 then
                     -- The first of an aggregate that is there already, though its first event may be archived.
                     case when (select p.position
                                  from nightowls.events p
                                 where p.org_id = _check_append.org
                                   and p.aggregate_type = n.aggregate_type
                                   and p.aggregate_id = n.aggregate_id
                                 order by p.version desc
                                 limit 1) < n.position then 'version' end
                   when coalesce((
                          select p.position
                            from nightowls.events p
                           where p.org_id = _check_append.org
                             and p.aggregate_type = n.aggregate_type
                             and p.aggregate_id = n.aggregate_id
                             and p.version = n.version - 1), n.position) >= n.position then 'version'
                 end as fault
            from unnest(_check_append.aggregate_types, _check_append.aggregate_ids, _check_append.versions,
                        _check_append.positions, _check_append.event_types)
                   as n (aggregate_type, aggregate_id, version, position, event_type)) f;

  if v_fault is null and _check_append.event_ids <> '{}' and nightowls._is_any_archived(_check_append.org, _check_append.event_ids) then
    raise exception 'an event with this event_id is in the archive'
      using errcode = 'unique_violation', hint = 'One event_id names one event; use a new one for a new event.';
  elsif v_fault is null and exists (select from nightowls.orgs o where o.org_id = _check_append.org) then
    return;
  end if;

  case v_fault
  when 'empty' then
    raise exception 'aggregate_type, aggregate_id and event_type must not be empty'
      using errcode = 'invalid_parameter_value';
  when 'long' then
    raise exception 'aggregate_type, aggregate_id or event_type is too long'
      using errcode = 'program_limit_exceeded',
            detail = 'An aggregate_type or event_type has at most 255 bytes, an aggregate_id 1024.';
  when 'reserved' then
    perform nightowls._refuse_reserved();
  when 'position' then
    raise exception 'a position cannot be chosen'
      using errcode = 'invalid_parameter_value',
            hint = 'Leave position out: it is drawn when the event is inserted.';
  when 'version' then
    select n.aggregate_type, n.aggregate_id, n.version
      into v_type, v_id, v_number
      from unnest(_check_append.aggregate_types, _check_append.aggregate_ids, _check_append.versions,
                  _check_append.positions) as n (aggregate_type, aggregate_id, version, position)
     where n.version < 1
        or n.version = 1 and (
             select p.position
               from nightowls.events p
              where p.org_id = _check_append.org
                and p.aggregate_type = n.aggregate_type
                and p.aggregate_id = n.aggregate_id
              order by p.version desc
              limit 1) < n.position
        or n.version > 1 and coalesce((
             select p.position
               from nightowls.events p
              where p.org_id = _check_append.org
                and p.aggregate_type = n.aggregate_type
                and p.aggregate_id = n.aggregate_id
                and p.version = n.version - 1), n.position) >= n.position
     limit 1;
    raise exception 'version % does not follow in aggregate % "%"', v_number, v_type, v_id
      using errcode = 'invalid_parameter_value',
            detail = 'Versions are 1, 2, 3 … without gaps, in the order of positions.',
            hint = 'Leave version out, or append with nightowls.append_event.';
  else
    raise exception 'org % does not exist', _check_append.org
      using errcode = 'invalid_parameter_value', hint = 'Make it with nightowls.create_org(name).';
  end case;
end;
$$;

revoke all on function nightowls._check_append(uuid, text[], text[], bigint[], bigint[], text[], uuid[], text) from public;

-- An append above read committed may have a snapshot that is older than a table projection, which it would then not feed;
-- making one writes to the org, so that this raises 40001.
create function nightowls._refuse_older_snapshot(org uuid)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform from nightowls.orgs o where o.org_id = _refuse_older_snapshot.org for share;
end;
$$;

revoke all on function nightowls._refuse_older_snapshot(uuid) from public;

-- What follows an append, for the events of one org: keeps reducer projections, sends to queues, and returns whether handlers wait, which
-- the caller must call as itself. versions: the newest of each aggregate, null where the caller does not know it; positions: the events,
-- null if queues are not to get them. A function of its own, so that it can be called where triggers cannot run.
-- Definer: targets and states are closed to those who append.
create function nightowls._after_append(
  org             uuid,
  aggregate_types text[],
  aggregate_ids   text[],
  versions        bigint[],
  positions       bigint[]
)
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
  v_follows jsonb;
  v_kinds   text;
begin
  if current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
    perform nightowls._refuse_older_snapshot(_after_append.org);
  end if;
  select t.follows into v_follows from nightowls._append_targets t where t.org_id = _after_append.org;
  if not found then
    perform nightowls._keep_target(_after_append.org);
    select t.follows into v_follows from nightowls._append_targets t where t.org_id = _after_append.org;
  end if;
  if not v_follows ?| array_append(_after_append.aggregate_types, '') then
    return false;
  end if;
  v_kinds := (
    select string_agg(split_part(coalesce(v_follows ->> t.name, v_follows ->> ''), ':', 1), ',')
      from unnest(_after_append.aggregate_types) as t (name));
  if v_kinds like '%reducer%' then
    perform nightowls._project(
      _after_append.org, _after_append.aggregate_types, _after_append.aggregate_ids, _after_append.versions);
  end if;
  if v_kinds like '%broadcast%' and _after_append.positions is not null then
    perform nightowls._broadcast(_after_append.org, _after_append.positions);
  end if;
  if v_kinds like '%queue%' and cardinality(_after_append.positions) = 1 then
    perform nightowls._route_event(_after_append.org, _after_append.positions[1]);
  elsif v_kinds like '%queue%' and _after_append.positions is not null then
    perform nightowls._route_events(_after_append.org, _after_append.aggregate_types, _after_append.positions);
  end if;
  return v_kinds like '%handler%';
end;
$$;

revoke all on function nightowls._after_append(uuid, text[], text[], bigint[], bigint[]) from public;

-- After a direct insert. Invoker: handlers are user code and run as the one who appends. No search_path, as in _before_insert.
create function nightowls._after_insert()
  returns trigger
  language plpgsql
  volatile
  parallel unsafe
as $$
#variable_conflict use_column
declare
  v_org  uuid;
  v_rows record;
begin
  if nightowls._is_append() then
    return new;
  elsif nightowls._is_restoring() then
    -- What was projected and sent before the dump is not to be done again.
    return new;
  end if;

  -- No statement of what follows touches two orgs.
  for v_org in select n.org_id from inserted n group by n.org_id loop
    select pg_catalog.array_agg(n.aggregate_type) as types, pg_catalog.array_agg(n.aggregate_id) as ids,
           pg_catalog.array_agg(n.version) as versions, pg_catalog.array_agg(n."position") as positions,
           pg_catalog.array_agg(n.event_type) as kinds,
           coalesce(pg_catalog.array_agg(n.event_id) filter (where n.event_id is not null), '{}') as event_ids,
           pg_catalog.max(nightowls._body_fault(n.payload, n.metadata)) as fault
      into v_rows
      from inserted n
     where n.org_id operator(pg_catalog.=) v_org;
    perform nightowls._check_append(v_org, v_rows.types, v_rows.ids, v_rows.versions, v_rows.positions, v_rows.kinds,
                                    v_rows.event_ids, v_rows.fault);
    if nightowls._after_append(v_org, v_rows.types, v_rows.ids, v_rows.versions, v_rows.positions) then
      perform nightowls._call_handlers(v_org, v_rows.types, v_rows.positions);
    end if;
  end loop;
  return null;
end;
$$;

revoke all on function nightowls._after_insert() from public;

create trigger t20_after_insert
  after insert on nightowls.events
  referencing new table as inserted
  for each statement execute function nightowls._after_insert();

alter table nightowls.events enable row level security;
alter table nightowls.events force row level security;
create policy service_all on nightowls.events
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));

alter table nightowls.routes enable row level security;
alter table nightowls.routes force row level security;
create policy service_all on nightowls.routes
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));

alter table nightowls._append_targets enable row level security;
alter table nightowls._append_targets force row level security;
create policy service_all on nightowls._append_targets
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));
