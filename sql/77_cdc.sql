-- Changes to the outside and from it: the log as a publication, changes of a user's tables as events, tables for Realtime.

create function nightowls.enable_cdc()
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_publication pg_publication;
begin
  select p.* into v_publication from pg_publication p where p.pubname = 'nightowls_events';
  if not found then
    create publication nightowls_events for table only nightowls.events with (publish = 'insert');
    return;
  elsif v_publication.puballtables then
    raise exception 'publication "nightowls_events" exists already with another definition'
      using errcode = 'duplicate_object',
            detail = 'It is for all tables.',
            hint = 'Rename it, and call nightowls.enable_cdc() again.';
  end if;
  if not v_publication.pubinsert or v_publication.pubupdate or v_publication.pubdelete or v_publication.pubtruncate then
    alter publication nightowls_events set (publish = 'insert');
  end if;
  -- As after a restore: pg_dump leaves the members of an extension out of publications.
  if not exists (
       select from pg_publication_rel r
        where r.prpubid = v_publication.oid and r.prrelid = 'nightowls.events'::regclass) then
    alter publication nightowls_events add table only nightowls.events;
  end if;
end;
$$;

comment on function nightowls.enable_cdc() is
  'Makes the publication nightowls_events: every event that is appended, as an insert, for logical replication (pgoutput; wal2json and others '
  'need no publication). Compaction and erasure in place are not published; an erasure arrives as the event it appends. Called again, it puts '
  'right what is missing, as after the restore of an extension install, where the publication comes back empty. Nothing is streamed before a '
  'slot is made, and only with wal_level = logical. Owner only. Waits for nobody. Raises 42710 if a publication of this name is for all tables, '
  '42501 without the right to make publications in this database.';

revoke all on function nightowls.enable_cdc() from public;

create function nightowls.disable_cdc()
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if exists (select from pg_publication p where p.pubname = 'nightowls_events') then
    drop publication nightowls_events;
  end if;
end;
$$;

comment on function nightowls.disable_cdc() is
  'Drops the publication nightowls_events; without one it changes nothing. Slots and subscriptions stay: drop them where they were made, '
  'as a slot that nobody reads keeps the server''s log for ever. Owner only. Raises 42501 if the publication is somebody else''s.';

revoke all on function nightowls.disable_cdc() from public;

-- Whether the publication is there and does not have what enable_cdc gives it.
create function nightowls._is_cdc_broken()
  returns boolean
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return exists (
    select from pg_publication p
     where p.pubname = 'nightowls_events' and not p.puballtables
       and (not p.pubinsert or p.pubupdate or p.pubdelete or p.pubtruncate
            or not exists (select from pg_publication_rel r where r.prpubid = p.oid and r.prrelid = 'nightowls.events'::regclass)));
end;
$$;

revoke all on function nightowls._is_cdc_broken() from public;

-- The clock's part of it: puts right what is broken, where the caller may; health says it where nobody has. Returns 1 if it did.
create function nightowls._repair_cdc()
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if nightowls._is_cdc_broken()
     and pg_has_role(current_user, (select p.pubowner from pg_publication p where p.pubname = 'nightowls_events'), 'usage')
     and pg_has_role(current_user, (select c.relowner from pg_class c where c.oid = 'nightowls.events'::regclass), 'usage') then
    perform nightowls.enable_cdc();
    return 1;
  end if;
  return 0;
end;
$$;

revoke all on function nightowls._repair_cdc() from public;

-- Changes of a user's table as events ---------------------------------------------------------------
--
-- Three triggers a registration, which fire one after the other for each row. The first evaluates the user's expressions
-- as the one who writes, and leaves the result in the transaction's setting nightowls.change. The second appends it, as the
-- owner, whose code it is alone: of the row it sees nothing, and type, org and table are the registration's. The third
-- calls handlers, as the one who writes. So the writer needs no right on nightowls, and no code of a user's runs as the owner.

create table nightowls.published_changes (
  org_id                  uuid        not null,
  source_table            text        collate "C" not null,
  event_type              text        collate "C" not null,
  aggregate_type          text        collate "C" not null,
  aggregate_id_expression text        not null,
  condition               text        not null,
  payload_expression      text        not null,
  operations              text[]      not null,
  by_row                  boolean     not null,
  trigger_name            text        not null,
  created_at              timestamptz not null default clock_timestamp(),
  constraint published_changes_pkey primary key (org_id, source_table, event_type)
);

comment on table nightowls.published_changes is 'Which changes of users'' tables are appended as events: publish_changes().';
comment on column nightowls.published_changes.org_id is 'The tenant whose list it stands in, and whose events they are unless by_row.';
comment on column nightowls.published_changes.source_table is 'The table, by its qualified name.';
comment on column nightowls.published_changes.event_type is 'The type of the events.';
comment on column nightowls.published_changes.aggregate_type is 'The aggregate type of the events.';
comment on column nightowls.published_changes.aggregate_id_expression is 'SQL over new and old: the aggregate''s id.';
comment on column nightowls.published_changes.condition is 'SQL over new and old: whether there is an event.';
comment on column nightowls.published_changes.payload_expression is 'SQL over new and old: the payload.';
comment on column nightowls.published_changes.operations is 'insert, update, delete.';
comment on column nightowls.published_changes.by_row is 'The table has a column org_id: each event is the org''s that its row names.';
comment on column nightowls.published_changes.trigger_name is
  'What the names of its three triggers begin with; they fire in name order, so that registrations of one table come in the order they were made.';
comment on column nightowls.published_changes.created_at is 'When it was registered.';

-- Evaluates as the writer, who may have no rights on nightowls: it names nothing of ours.
-- Arguments: event type, condition, aggregate_id_expression, payload_expression, whether the row names the org.
create function nightowls._evaluate_change()
  returns trigger
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_row    text := case tg_op when 'DELETE' then 'old' else 'new' end;
  v_sql    text;
  v_change record;
begin
  perform set_config('nightowls.change', '', true);
  if current_setting('row_security') = 'off'
     and pg_has_role(current_user, (select c.relowner from pg_class c where c.oid = tg_relid), 'usage') then
    return null; -- A restore: what was appended before the dump is in the dump.
  end if;

  v_sql := format(
    E'select w.nightowls_wanted as wanted, case when w.nightowls_wanted then (%s\n)::text end as id, '
    'case when w.nightowls_wanted then (%s\n)::jsonb end as payload, %s as org from %s '
    'cross join lateral (select (%s\n)::boolean as nightowls_wanted offset 0) w',
    tg_argv[2],
    case when tg_op = 'DELETE' and tg_argv[3] = 'to_jsonb(new)' then 'to_jsonb(old)' else tg_argv[3] end,
    case when tg_argv[4]::boolean then v_row || '.org_id::text' else 'null::text' end,
    case tg_op when 'INSERT' then '(select ($1).*) as new left join (select ($1).* where false) as old on true'
               when 'DELETE' then '(select ($2).*) as old left join (select ($2).* where false) as new on true'
               else '(select ($1).*) as new cross join (select ($2).*) as old' end,
    tg_argv[1]);
  if tg_op = 'INSERT' then
    execute v_sql into v_change using new, new;
  elsif tg_op = 'DELETE' then
    execute v_sql into v_change using old, old;
  else
    execute v_sql into v_change using new, old;
  end if;
  if v_change.wanted is not true then
    return null;
  elsif v_change.id is null or v_change.payload is null then
    raise exception '% of the changes of %.% is null', case when v_change.id is null then 'aggregate_id_expression' else 'payload_expression' end,
        tg_table_schema, tg_table_name
      using errcode = 'null_value_not_allowed',
            detail = format('Event type "%s", operation %s.', tg_argv[0], lower(tg_op)),
            hint = 'Of an insert old is null, of a delete new is; leave rows out by the condition.';
  end if;
  perform set_config('nightowls.change',
                     jsonb_build_object('id', v_change.id, 'payload', v_change.payload, 'org', v_change.org)::text, true);
  return null;
end;
$$;

revoke all on function nightowls._evaluate_change() from public;

-- Appends what _evaluate_change left, and nothing that is not registered. Arguments: org, table, event type, trigger name.
-- Definer: the writer has no right to append. It touches neither new nor old, so that no cast or operator of a user's type runs.
create function nightowls._append_change()
  returns trigger
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_change       jsonb := nullif(current_setting('nightowls.change', true), '')::jsonb;
  v_registration nightowls.published_changes;
  v_org          uuid;
  v_done         nightowls.append_result;
  v_handle       json;
begin
  if v_change is null then
    return null;
  end if;
  perform set_config('nightowls.change', '', true);
  select c.* into v_registration
    from nightowls.published_changes c
   where c.org_id = tg_argv[0]::uuid and c.source_table = tg_argv[1] and c.event_type = tg_argv[2]
     and c.trigger_name = tg_argv[3];
  if not found then
    return null; -- Unpublished by who may not drop the triggers.
  end if;
  v_org := case when v_registration.by_row then (v_change ->> 'org')::uuid else v_registration.org_id end;
  if v_org is null then
    raise exception 'org_id of a row of % is null', v_registration.source_table
      using errcode = 'null_value_not_allowed', hint = 'The event belongs to the org that the row names; leave such rows out by the condition.';
  end if;
  v_done := nightowls._append_one(
    v_org, v_registration.aggregate_type, v_change ->> 'id', v_registration.event_type, v_change -> 'payload', null, null,
    jsonb_strip_nulls(jsonb_build_object('actor_id', nightowls._user_id(), 'source_table', v_registration.source_table,
                                         'operation', lower(tg_op))),
    null, null);
  if v_done is null then
    -- A handler waits: for the next trigger, as nobody may be called from here but by the owner.
    v_handle := current_setting('nightowls.handle');
    perform set_config('nightowls.change',
                       jsonb_build_object('org', v_handle ->> 0, 'type', v_handle ->> 1, 'position', v_handle ->> 2)::text, true);
  end if;
  return null;
end;
$$;

revoke all on function nightowls._append_change() from public;

-- Handlers are user code and run as the one who writes.
create function nightowls._handle_change()
  returns trigger
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_change jsonb := nullif(current_setting('nightowls.change', true), '')::jsonb;
begin
  if v_change is null then
    return null;
  end if;
  perform set_config('nightowls.change', '', true);
  if not has_schema_privilege('nightowls', 'usage') then
    raise exception 'permission denied to call the handlers of aggregate type "%"', v_change ->> 'type'
      using errcode = 'insufficient_privilege',
            detail = 'A handler runs as the one who writes, inside the same transaction.',
            hint = 'Give the role the rights of a service, or keep the projection by a reducer.';
  end if;
  perform nightowls._call_handlers((v_change ->> 'org')::uuid, array[v_change ->> 'type'], array[(v_change ->> 'position')::bigint]);
  return null;
end;
$$;

revoke all on function nightowls._handle_change() from public;

create function nightowls.publish_changes(
  source_table            text,
  event_type              text,
  aggregate_type          text,
  aggregate_id_expression text,
  condition               text default 'true',
  payload_expression      text default 'to_jsonb(new)',
  operations              text[] default '{insert,update}',
  org                     uuid default null
)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org     uuid := nightowls.current_org(publish_changes.org);
  v_table   regclass;
  v_name    text;
  v_trigger text;
  v_by_row  boolean;
  v_ops     text[];
  v_found   nightowls.published_changes;
  v_part    text;
begin
  if num_nulls(publish_changes.source_table, publish_changes.aggregate_id_expression, publish_changes.condition,
               publish_changes.payload_expression, publish_changes.operations) > 0 then
    raise exception 'source_table, aggregate_id_expression, condition, payload_expression and operations must not be null'
      using errcode = 'null_value_not_allowed';
  elsif octet_length(publish_changes.aggregate_type) between 1 and 255 is not true
     or octet_length(publish_changes.event_type) between 1 and 255 is not true then
    perform nightowls._refuse_names(publish_changes.aggregate_type, 'any', publish_changes.event_type);
  elsif starts_with(publish_changes.event_type, 'nightowls.') then
    raise exception 'event types that begin with "nightowls." are reserved' using errcode = 'invalid_parameter_value';
  end if;
  v_ops := array(select o.name from unnest('{insert,update,delete}'::text[]) with ordinality as o (name, no)
                  where o.name = any (publish_changes.operations) order by o.no);
  if v_ops = '{}' or not publish_changes.operations <@ v_ops then
    raise exception 'operations must be some of insert, update, delete' using errcode = 'invalid_parameter_value';
  end if;
  v_table := nightowls._resolve_relation(publish_changes.source_table, 'rp');
  v_name := nightowls._relation_name(v_table);
  if exists (select from pg_class c where c.oid = v_table and c.relnamespace = 'nightowls'::regnamespace) then
    raise exception 'table % is of nightowls itself', v_name
      using errcode = 'wrong_object_type', hint = 'Its changes are in the log already; read it with a consumer.';
  end if;
  v_by_row := exists (
    select from pg_attribute a
     where a.attrelid = v_table and a.attname = 'org_id' and a.atttypid = 'uuid'::regtype and not a.attisdropped);

  -- Parsed, never run: planning would already call what an expression names, and here that would be as the owner.
  foreach v_part in array array[
    format(E'select (%s\n)::boolean', publish_changes.condition),
    format(E'select (%s\n)::text', publish_changes.aggregate_id_expression),
    format(E'select (%s\n)::jsonb', publish_changes.payload_expression)] loop
    execute format('prepare nightowls_check as %s from (select (null::%s).*) as new cross join (select (null::%s).*) as old',
                   v_part, v_name, v_name);
    execute 'deallocate nightowls_check';
  end loop;

  perform nightowls._refuse_no_org(v_org);
  if v_by_row and exists (
       select from nightowls.published_changes c
        where c.source_table = v_name and c.event_type = publish_changes.event_type and c.org_id <> v_org) then
    raise exception 'changes of % are published as "%" by another org already', v_name, publish_changes.event_type
      using errcode = 'duplicate_object',
            detail = 'The table has a column org_id, so that one registration serves all orgs.';
  end if;
  insert into nightowls.published_changes
         (org_id, source_table, event_type, aggregate_type, aggregate_id_expression, condition, payload_expression, operations, by_row,
          trigger_name)
  values (v_org, v_name, publish_changes.event_type, publish_changes.aggregate_type, publish_changes.aggregate_id_expression,
          publish_changes.condition, publish_changes.payload_expression, v_ops, v_by_row,
          format('nightowls_%s_%s',
                 lpad((select coalesce(max(split_part(c.trigger_name, '_', 2)::int), 0) + 1
                         from nightowls.published_changes c where c.source_table = v_name)::text, 4, '0'),
                 left(replace(gen_random_uuid()::text, '-', ''), 16)))
  on conflict do nothing;
  select c.* into v_found
    from nightowls.published_changes c
   where c.org_id = v_org and c.source_table = v_name and c.event_type = publish_changes.event_type;
  if (v_found.aggregate_type, v_found.aggregate_id_expression, v_found.condition, v_found.payload_expression, v_found.operations,
      v_found.by_row)
       is distinct from
     (publish_changes.aggregate_type collate "C", publish_changes.aggregate_id_expression, publish_changes.condition,
      publish_changes.payload_expression, v_ops, v_by_row) then
    raise exception 'changes of % are published as "%" already with another definition', v_name, publish_changes.event_type
      using errcode = 'duplicate_object',
            hint = 'Use another event type, or nightowls.unpublish_changes() first.';
  end if;

  v_trigger := v_found.trigger_name;
  if exists (select from pg_trigger t where t.tgrelid = v_table and t.tgname = v_trigger || '_3') then
    return;
  end if;
  execute format('create trigger %I after %s on %s for each row execute function nightowls._evaluate_change(%L, %L, %L, %L, %L)',
                 v_trigger || '_1', array_to_string(v_ops, ' or '), v_name, publish_changes.event_type, publish_changes.condition,
                 publish_changes.aggregate_id_expression, publish_changes.payload_expression, v_by_row);
  execute format('create trigger %I after %s on %s for each row execute function nightowls._append_change(%L, %L, %L, %L)',
                 v_trigger || '_2', array_to_string(v_ops, ' or '), v_name, v_org, v_name, publish_changes.event_type, v_trigger);
  execute format('create trigger %I after %s on %s for each row execute function nightowls._handle_change()',
                 v_trigger || '_3', array_to_string(v_ops, ' or '), v_name);
end;
$$;

comment on function nightowls.publish_changes(text, text, text, text, text, text, text[], uuid) is
  'Appends an event for each changed row of a table, in the transaction that changes it: both commit or neither. source_table: schema.table, also '
  'one of another owner''s where the caller has the TRIGGER right; event_type, aggregate_type: of the events; aggregate_id_expression, condition, '
  'payload_expression: SQL over new and old (of an insert old is null, of a delete new is), names qualified by schema, evaluated as the '
  'one who writes, who needs no right on nightowls; an event is appended where the condition is true; of a delete the default payload is to_jsonb(old); '
  'operations: insert, update, delete; org: the tenant. In a table with a column org_id uuid each event belongs to the org of its row. '
  'Metadata: actor_id (the JWT''s sub), source_table, operation. The same again changes nothing but makes triggers that are missing. Runs DDL: owner '
  'only. Waits for open writes to the table. Raises 42P01 or 42809 for a table that is not there or cannot be used, 42601, 42703 or 42883 for an '
  'expression that is not valid, 42710 if the table''s changes are published under this event_type with another definition, 42501 without the '
  'right to make triggers, 22004 or 22023 for an argument that is null or not valid, NW010 if there is no org. The write itself raises 22004 if an id or '
  'payload is null, 42501 if a handler waits for the events and the writer may not call it, and as append_event.';

revoke all on function nightowls.publish_changes(text, text, text, text, text, text, text[], uuid) from public;

create function nightowls.unpublish_changes(source_table text, event_type text, org uuid default null)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org     uuid := nightowls.current_org(unpublish_changes.org);
  v_name    text := coalesce(nightowls._relation_name(to_regclass(unpublish_changes.source_table)), unpublish_changes.source_table);
  v_trigger text;
  v_part    record;
begin
  delete from nightowls.published_changes c
   where c.org_id = v_org and c.source_table = v_name and c.event_type = unpublish_changes.event_type
  returning c.trigger_name into v_trigger;
  if not found then
    perform nightowls._refuse_unknown(
      'published change', v_name || ' ' || unpublish_changes.event_type,
      array(select c.source_table || ' ' || c.event_type from nightowls.published_changes c where c.org_id = v_org),
      'Make it with nightowls.publish_changes().');
  end if;
  -- By their name alone: the table may have got another one.
  for v_part in
    select t.tgname, t.tgrelid::regclass as source
      from pg_trigger t
     where t.tgname in (v_trigger || '_1', v_trigger || '_2', v_trigger || '_3') and t.tgparentid = 0
  loop
    begin
      execute format('drop trigger %I on %s', v_part.tgname, v_part.source);
    exception when insufficient_privilege then
      raise notice 'trigger "%" stays on table %, where it appends nothing any more', v_part.tgname, v_part.source
        using hint = 'Only the table''s owner may drop it.';
    end;
  end loop;
end;
$$;

comment on function nightowls.unpublish_changes(text, text, uuid) is
  'Ends what publish_changes began: no more events of this event_type from this table; those appended stay. Where the table is somebody '
  'else''s, the triggers stay and append nothing (a notice says so). source_table: schema.table; org: the tenant. Runs DDL: owner only. Waits for open '
  'writes to the table. Raises NW007 if nothing is published like this, NW010 if there is no org.';

revoke all on function nightowls.unpublish_changes(text, text, uuid) from public;

create function nightowls.publish_table(relation text, full_identity boolean default false)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_table       regclass := nightowls._resolve_relation(publish_table.relation, 'rp');
  v_publication pg_publication;
begin
  select p.* into v_publication from pg_publication p where p.pubname = 'supabase_realtime';
  if not found then
    raise exception 'publication "supabase_realtime" does not exist'
      using errcode = 'undefined_object',
            detail = 'Supabase Realtime makes it; elsewhere nobody would listen to it.',
            hint = 'On a plain server make a publication of your own, or read the log with a consumer.';
  end if;
  if not v_publication.puballtables
     and not exists (select from pg_publication_rel r where r.prpubid = v_publication.oid and r.prrelid = v_table) then
    execute format('alter publication supabase_realtime add table only %s', nightowls._relation_name(v_table));
  end if;
  if publish_table.full_identity
     and not exists (select from pg_class c where c.oid = v_table and c.relreplident = 'f') then
    execute format('alter table %s replica identity full', nightowls._relation_name(v_table));
  end if;
end;
$$;

comment on function nightowls.publish_table(text, boolean) is
  'Adds a table to the publication supabase_realtime, so that Realtime''s postgres_changes sees its rows, under the table''s own row level '
  'security. relation: schema.table; full_identity: log whole old rows too, so that updates and deletes carry all columns. Called again, it changes nothing. '
  'Runs DDL: owner only, of the table and of the publication. Raises 42704 if there is no such publication, 42P01 or 42809 if there is no such table, '
  '42501 for somebody else''s, 22004 if relation is null.';

revoke all on function nightowls.publish_table(text, boolean) from public;

alter table nightowls.published_changes enable row level security;
alter table nightowls.published_changes force row level security;
create policy service_all on nightowls.published_changes
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));
