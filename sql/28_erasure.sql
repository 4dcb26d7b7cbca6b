-- Making one subject forgotten: what is about one aggregate of one org is taken out of every table of this schema.
--
-- Its events keep their places (position, version, id, time) and lose what they say. Then one event of type nightowls.erased is
-- appended: the record of the erasure, and what consumers and projections learn it from. It takes the aggregate's next version, so every append
-- that was open has ended before it, and its event is erased too; whoever appends later begins anew.

-- For each table of this schema either the function that erases a subject from it, or why it holds none. A table that is
-- added is added here: a test compares. An eraser takes (org uuid, aggregate_type text, aggregate_id text), returns
-- nothing, and is called as the owner when the record is in.
create function nightowls._subject_tables()
  returns table (table_name text, eraser text, reason text)
  language sql
  immutable
  parallel safe
begin atomic
  values ('settings', null, 'about the installation'),
         ('orgs', null, 'about tenants'),
         ('org_members', null, 'who belongs to an org, which its members change'),
         ('events', '_erase_log', null),
         ('consumers', null, 'definitions'),
         ('_consumer_offsets', null, 'places and leases'),
         ('_consumer_failures', '_erase_failures', null),
         ('imports', null, 'how far a source was taken: a place, no content'),
         ('routes', null, 'names of projections and queues'),
         ('_append_targets', null, 'names of aggregate types'),
         ('projections', null, 'definitions'),
         ('_projection_states', '_erase_states', null),
         ('snapshots', '_erase_states', null),
         ('_sweeps', null, 'places: the id of an aggregate'),
         ('events_archive', '_erase_log', null),
         ('compactions', '_erase_compactions', null),
         ('compaction_policies', null, 'settings'),
         ('_replays', '_erase_states', null),
         ('queues', null, 'definitions'),
         ('queue_messages', '_erase_messages', null),
         ('queue_marks', null, 'places'),
         ('queue_due_marks', null, 'places'),
         ('queue_dedup', null, 'keys and hashes of what somebody sent'),
         ('queue_archive', '_erase_messages', null),
         ('queue_bindings', null, 'definitions'),
         ('topic_bindings', null, 'definitions'),
         ('once_keys', null, 'hashes of keys, until they expire'),
         ('_queue_counts', null, 'counts'),
         ('endpoints', null, 'definitions'),
         ('_endpoint_secrets', null, 'settings'),
         ('_endpoint_states', null, 'counts'),
         ('responses', '_erase_responses', null),
         ('_net_requests', null, 'numbers, while an answer is waited for'),
         ('floors', null, 'who holds what, while it is held'),
         ('floor_tickets', null, 'who waits for what, while they wait'),
         ('floor_marks', null, 'numbers'),
         ('published_changes', null, 'definitions'),
         ('streams', null, 'definitions'),
         ('embedding_sources', null, 'definitions'),
         ('_embedding_states', null, 'places: the key of a row of a user''s table'),
         ('_embedding_pending', null, 'keys of rows of a user''s table, until they are embedded'),
         ('_embedding_marks', null, 'places'),
         ('_embedding_requests', null, 'keys of rows of a user''s table, while they are embedded'),
         ('embedding_chunks', null, 'texts of rows of a user''s table, which go when the row or its text does'),
         ('agents', null, 'names and places'),
         ('agent_versions', '_erase_agent', null),
         ('audit_log', null, 'who changed what, without its content: the record that is kept'),
         ('vector_indexes', null, 'definitions'),
         ('_mastra_roles', null, 'rights'),
         ('mastra_agent_versions', null, 'Mastra''s, and of no thread, run, resource or user'),
         ('mastra_agents', '_erase_mastra', null),
         ('mastra_ai_spans', '_erase_mastra', null),
         ('mastra_background_tasks', '_erase_mastra', null),
         ('mastra_channel_config', null, 'Mastra''s, and of no thread, run, resource or user'),
         ('mastra_channel_installations', null, 'Mastra''s, and of no thread, run, resource or user'),
         ('mastra_dataset_items', null, 'Mastra''s, and of no thread, run, resource or user'),
         ('mastra_dataset_versions', null, 'Mastra''s, and of no thread, run, resource or user'),
         ('mastra_datasets', null, 'Mastra''s, and of no thread, run, resource or user'),
         ('mastra_experiment_results', null, 'Mastra''s, and of no thread, run, resource or user'),
         ('mastra_experiments', null, 'Mastra''s, and of no thread, run, resource or user'),
         ('mastra_favorites', '_erase_mastra', null),
         ('mastra_knowledge_activity', '_erase_mastra', null),
         ('mastra_knowledge_cursors', '_erase_mastra', null),
         ('mastra_knowledge_mentions', null, 'Mastra''s, and of no thread, run, resource or user'),
         ('mastra_knowledge_nodes', null, 'Mastra''s, and of no thread, run, resource or user'),
         ('mastra_knowledge_records', '_erase_mastra', null),
         ('mastra_knowledge_semantic_outbox', null, 'Mastra''s, and of no thread, run, resource or user'),
         ('mastra_mcp_client_versions', null, 'Mastra''s, and of no thread, run, resource or user'),
         ('mastra_mcp_clients', '_erase_mastra', null),
         ('mastra_mcp_server_versions', null, 'Mastra''s, and of no thread, run, resource or user'),
         ('mastra_mcp_servers', '_erase_mastra', null),
         ('mastra_messages', '_erase_mastra', null),
         ('mastra_notifications', '_erase_mastra', null),
         ('mastra_observational_memory', '_erase_mastra', null),
         ('mastra_prompt_block_versions', null, 'Mastra''s, and of no thread, run, resource or user'),
         ('mastra_prompt_blocks', '_erase_mastra', null),
         ('mastra_resources', '_erase_mastra', null),
         ('mastra_schedule_triggers', '_erase_mastra', null),
         ('mastra_schedules', null, 'Mastra''s, and of no thread, run, resource or user'),
         ('mastra_scorer_definition_versions', null, 'Mastra''s, and of no thread, run, resource or user'),
         ('mastra_scorer_definitions', '_erase_mastra', null),
         ('mastra_scorers', '_erase_mastra', null),
         ('mastra_skill_blobs', null, 'Mastra''s, and of no thread, run, resource or user'),
         ('mastra_skill_versions', null, 'Mastra''s, and of no thread, run, resource or user'),
         ('mastra_skills', '_erase_mastra', null),
         ('mastra_thread_state', '_erase_mastra', null),
         ('mastra_threads', '_erase_mastra', null),
         ('mastra_tool_provider_connections', '_erase_mastra', null),
         ('mastra_workflow_definitions', '_erase_mastra', null),
         ('mastra_workflow_snapshot', '_erase_mastra', null),
         ('mastra_workspace_versions', null, 'Mastra''s, and of no thread, run, resource or user'),
         ('mastra_workspaces', '_erase_mastra', null),
         ('redaction_rules', null, 'settings'),
         ('app_config', null, 'settings'),
         ('_config_secrets', null, 'settings'),
         ('threads', '_erase_swarm', null),
         ('runs', '_erase_swarm', null),
         ('run_snapshots', '_erase_swarm', null),
         ('messages', '_erase_swarm', null),
         ('scratchpad', '_erase_swarm', null),
         ('scratchpad_marks', null, 'numbers'),
         ('clock_parts', null, 'the parts of the clock'),
         ('_samples', null, 'figures'),
         ('followups', '_erase_swarm', null);
end;

revoke all on function nightowls._subject_tables() from public;

-- Takes the content out of the events that are there, archived ones too, and returns how many had any. Nobody moves them meanwhile:
-- compaction shares the lock. Definer: the log is append-only to all but such functions.
create function nightowls._erase_log(org uuid, aggregate_type text, aggregate_id text)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_bitmapscan to off
as $$
#variable_conflict use_column
declare
  v_door     text := coalesce(current_setting('nightowls.door', true), '');
  v_count    bigint;
  v_archived bigint;
begin
  perform nightowls._open_door('maintain');
  update nightowls.events e
     set event_type = 'nightowls.erased', payload = '{}', metadata = '{}'
   where e.org_id = _erase_log.org
     and e.aggregate_type = _erase_log.aggregate_type
     and e.aggregate_id = _erase_log.aggregate_id
     and e.event_type <> 'nightowls.erased';
  get diagnostics v_count = row_count;
  update nightowls.events_archive e
     set event_type = 'nightowls.erased', payload = '{}', metadata = '{}'
   where e.org_id = _erase_log.org
     and e.aggregate_type = _erase_log.aggregate_type
     and e.aggregate_id = _erase_log.aggregate_id
     and e.event_type <> 'nightowls.erased';
  get diagnostics v_archived = row_count;
  perform set_config('nightowls.door', v_door, true);
  return v_count + v_archived;
end;
$$;

revoke all on function nightowls._erase_log(uuid, text, text) from public;

-- Removes what is stored of states before the record, in every generation: the live one, those that nobody reads any more, and those of
-- projections that are gone; so snapshots, and replays that are under way. An id of another type's projection is another aggregate's.
-- Definer: nobody else may write states.
create function nightowls._erase_states(org uuid, aggregate_type text, aggregate_id text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_bitmapscan to off
  set enable_sort to off
as $$
#variable_conflict use_column
declare
  v_door  text := coalesce(current_setting('nightowls.door', true), '');
  v_head  bigint := (nightowls._heads(_erase_states.org, array[_erase_states.aggregate_type], array[_erase_states.aggregate_id]))[1];
  v_table text;
begin
  perform nightowls._open_door('project');
  foreach v_table in array array['_projection_states', 'snapshots', '_replays'] loop
    -- From one generation to the next by the key, as there is none by aggregate.
    execute format($query$
      with recursive g (projection, generation) as (
        (select s.projection, s.generation
           from nightowls.%1$I s
          where s.org_id = $1
          order by s.org_id, s.projection, s.generation
          limit 1)
        union all
        select n.projection, n.generation
          from g
         cross join lateral (
                 select s.projection, s.generation
                   from nightowls.%1$I s
                  where s.org_id = $1 and (s.projection, s.generation) > (g.projection, g.generation)
                  order by s.org_id, s.projection, s.generation
                  limit 1) n
      )
      delete from nightowls.%1$I s
       using g
       where s.org_id = $1 and s.projection = g.projection and s.generation = g.generation
         and s.aggregate_id = $3 and s.version < $4
         and not exists (
               select from nightowls.projections p
                where p.org_id = $1 and p.name = g.projection and p.generation <= g.generation and p.aggregate_type <> $2)
      $query$, v_table)
      using _erase_states.org, _erase_states.aggregate_type, _erase_states.aggregate_id, v_head;
  end loop;
  perform set_config('nightowls.door', v_door, true);
end;
$$;

revoke all on function nightowls._erase_states(uuid, text, text) from public;

-- Forgets why an aggregate could not be compacted, which a handler may have said. Definer: the table is closed.
create function nightowls._erase_compactions(org uuid, aggregate_type text, aggregate_id text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  update nightowls.compactions c
     set refused = null
   where c.org_id = _erase_compactions.org and c.aggregate_type = _erase_compactions.aggregate_type
     and c.aggregate_id = _erase_compactions.aggregate_id and c.refused is not null;
end;
$$;

revoke all on function nightowls._erase_compactions(uuid, text, text) from public;

-- Forgets what consumers told of events that failed. Definer: the table is closed.
create function nightowls._erase_failures(org uuid, aggregate_type text, aggregate_id text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  update nightowls._consumer_failures f
     set error = null
   where f.org_id = _erase_failures.org and f.error is not null
     and exists (
           select from nightowls.all_events e
            where e.org_id = f.org_id and e."position" = f."position"
              and e.aggregate_type = _erase_failures.aggregate_type and e.aggregate_id = _erase_failures.aggregate_id);
end;
$$;

revoke all on function nightowls._erase_failures(uuid, text, text) from public;

-- Calls the erasers of all tables but the log's. Definer: they are the owner's.
create function nightowls._erase_traces(org uuid, aggregate_type text, aggregate_id text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_eraser text;
begin
  for v_eraser in
    select distinct t.eraser from nightowls._subject_tables() t where t.eraser <> '_erase_log' order by t.eraser
  loop
    execute format('select nightowls.%I($1, $2, $3)', v_eraser)
      using _erase_traces.org, _erase_traces.aggregate_type, _erase_traces.aggregate_id;
  end loop;
end;
$$;

revoke all on function nightowls._erase_traces(uuid, text, text) from public;

-- Refreshes the view projections: each has rows of all orgs, computed from whatever its query reads. Alone, so that no refresh that
-- began before can bring old rows back. Definer: other orgs' views are closed.
create function nightowls._erase_views()
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_view record;
begin
  perform pg_advisory_xact_lock(nightowls._lock_class(263), 0);
  for v_view in
    select p.org_id, p.name from nightowls.projections p where p.kind = 'view' order by p.org_id, p.name
  loop
    perform nightowls._refresh_view(v_view.org_id, v_view.name);
  end loop;
end;
$$;

revoke all on function nightowls._erase_views() from public;

create function nightowls.erase(
  aggregate_type text,
  aggregate_id   text,
  reason         text,
  org            uuid default null
)
  returns bigint
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org   uuid := nightowls.current_org(erase.org);
  v_head  bigint;
  v_count bigint := 0;
  v_done  record;
begin
  if not nightowls._is_service() then
    raise exception 'permission denied to erase' using errcode = 'insufficient_privilege', hint = 'A service erases.';
  elsif octet_length(erase.aggregate_type) not between 1 and 255 or octet_length(erase.aggregate_id) not between 1 and 1024
     or erase.aggregate_type is null or erase.aggregate_id is null then
    perform nightowls._refuse_names(erase.aggregate_type, erase.aggregate_id, 'any');
  elsif erase.reason is null then
    raise exception 'reason must not be null' using errcode = 'null_value_not_allowed';
  elsif erase.reason = '' then
    raise exception 'reason must not be empty' using errcode = 'invalid_parameter_value';
  elsif octet_length(erase.reason) > 1024 then
    raise exception 'reason is too long' using errcode = 'program_limit_exceeded', detail = 'It has at most 1024 bytes.';
  elsif current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
    raise exception 'nothing can be erased at isolation level %', current_setting('transaction_isolation')
      using errcode = 'active_sql_transaction',
            detail = 'A snapshot taken before the call began would leave events behind.', hint = 'Use read committed.';
  end if;
  perform nightowls._refuse_no_org(v_org);
  perform pg_advisory_xact_lock(nightowls._lock_class(263), uuid_hash(v_org));

  loop
    v_head := (nightowls._heads(v_org, array[erase.aggregate_type], array[erase.aggregate_id]))[1];
    v_count := v_count + nightowls._erase_log(v_org, erase.aggregate_type, erase.aggregate_id);
    exit when v_count = 0;
    begin
      -- After the head that was seen, or somebody's event would come between.
      v_done := nightowls._append_batch(
        v_org, array[erase.aggregate_type], array[erase.aggregate_id], array[v_head], array[1], array['nightowls.erased'],
        array[jsonb_build_object('events', v_count, 'reason', erase.reason)],
        array[jsonb_build_object('actor_id', coalesce(nightowls._user_id(), current_user))], array[null::uuid]);
      exit;
    exception when sqlstate 'NW001' then
      null; -- An open append has committed meanwhile: its event is erased too.
    end;
  end loop;

  if v_count = 0 then
    -- Nothing is left, or was ever there. What an erasure before could not know of goes now.
    perform nightowls._erase_traces(v_org, erase.aggregate_type, erase.aggregate_id);
    return 0;
  end if;

  if v_done.handled then
    -- Handlers are user code and run as the one who erases.
    perform nightowls._call_handlers(v_org, array[erase.aggregate_type], v_done.positions);
  end if;
  perform nightowls._erase_traces(v_org, erase.aggregate_type, erase.aggregate_id);
  perform nightowls._erase_views();
  return v_count;
end;
$$;

comment on function nightowls.erase(text, text, text, uuid) is
  'Makes one aggregate of one org forgotten, and returns how many of its events had to be erased. Events keep position, version, event_id and '
  'created_at; their type becomes nightowls.erased, payload and metadata {}; archived ones too. States and snapshots, of all generations, are '
  'removed, view projections refreshed, and one event nightowls.erased with {"events", "reason"} is appended: the record, which consumers and handlers '
  'get; every state is null after it, and a later event begins anew. Erasing again changes nothing and returns 0. reason: why, at most 1024 '
  'bytes, kept in the record; org: the tenant. Ids are kept (docs/erasure.md: what else is). For services. Waits for open appends to the aggregate '
  'and for builds and refreshes of projections of the org; these wait for it until its transaction ends. Raises 42501 for who is no service, 22004 or '
  '22023 for an argument that is null or empty, 54000 for one that is too long, 25001 above read committed, NW010 if there is no org.';

revoke all on function nightowls.erase(text, text, text, uuid) from public;

-- Proof ------------------------------------------------------------------------------------------

-- A text as a JSON string holds it, without the quotes; in_ascii: as programs write it that keep to ASCII, with digits in lower or
-- upper case.
create function nightowls._json_escaped(content text, in_ascii boolean, in_upper boolean)
  returns text
  language sql
  immutable
  strict
  parallel safe
  return (
    select string_agg(
             case when ascii(c.c) < 128 or not in_ascii then c.c
                  else (select '\u' || case when in_upper then replace(upper(x.hex), '\U', '\u') else x.hex end)
             end, '' order by c.no)
      from regexp_split_to_table(substr(to_json(content)::text, 2, length(to_json(content)::text) - 2), '') with ordinality as c (c, no)
     cross join lateral (
             select case when ascii(c.c) < 65536 then lpad(to_hex(ascii(c.c)), 4, '0')
                         else to_hex(55296 + (ascii(c.c) - 65536) / 1024) || '\u' || to_hex(56320 + (ascii(c.c) - 65536) % 1024)
                    end as hex) x);

revoke all on function nightowls._json_escaped(text, boolean, boolean) from public;

-- The ways in which a text can stand in another one: as it is, in JSON, in JSON in a string of JSON and so on, in SQL.
create function nightowls._forms(content text)
  returns text[]
  language plpgsql
  immutable
  strict
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_all  text[] := array[_forms.content, replace(_forms.content, '''', '''''')];
  v_last text[] := array[_forms.content];
begin
  for v_level in 1 .. 3 loop
    v_last := array(
      select distinct replace(f.form, case when s.slash then '/' else '' end, '\/')
        from unnest(v_last) as l (form)
       cross join lateral (
               values (nightowls._json_escaped(l.form, false, false)),
                      (nightowls._json_escaped(l.form, true, false)),
                      (nightowls._json_escaped(l.form, true, true))) as f (form)
       cross join (values (false), (v_level = 1)) as s (slash));
    v_all := v_all || v_last;
  end loop;
  return array(select distinct f.form from unnest(v_all) as f (form));
end;
$$;

revoke all on function nightowls._forms(text) from public;

create function nightowls.scan_for(content text)
  returns table (table_name text, column_name text, org_id uuid, qty bigint, places tid[])
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_forms text[] := nightowls._forms(scan_for.content);
  v_bytes bytea[];
  v_table record;
begin
  if scan_for.content is null then
    raise exception 'content must not be null' using errcode = 'null_value_not_allowed';
  elsif scan_for.content = '' then
    raise exception 'content must not be empty' using errcode = 'invalid_parameter_value';
  end if;
  v_bytes := array(select convert_to(f.form, 'UTF8') from unnest(v_forms) as f (form));

  for v_table in
    -- Each column as t<number>: arrays and rows as JSON, whose escapes are known.
    select c.oid::regclass as id, c.relname::text as name, bool_or(a.attname = 'org_id' and a.atttypid = 'uuid'::regtype) as has_org,
           string_agg(format(case
             when a.atttypid in ('bytea'::regtype, 'bytea[]'::regtype) then 'x.%1$I as t%2$s'
             when t.typcategory = 'A' or t.typtype in ('c', 'r', 'm') then 'to_jsonb(x.%1$I)::text as t%2$s'
             else 'x.%1$I::text as t%2$s' end, a.attname, a.attnum), ', ') as texts,
           string_agg(format('(%L, (select true from %s limit 1))', a.attname, format(case a.atttypid
             when 'bytea'::regtype then 'unnest($2) f where position(f in r.t%s) > 0'
             when 'bytea[]'::regtype then 'unnest($2) f cross join unnest(r.t%s) b where position(f in b) > 0'
             else 'unnest($1) f where strpos(r.t%s collate "C", f) > 0' end, a.attnum)), ', ') as columns
      from pg_class c
      join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
      join pg_type t on t.oid = a.atttypid
     where c.relnamespace = 'nightowls'::regnamespace and c.relkind in ('r', 'm')
     group by c.oid, c.relname
     order by c.relname
  loop
    return query execute format(
      'select %L, v.name, r.org, count(*), (array_agg(r.place))[1:10] '
      'from (select x.ctid as place, %s as org, %s from %s x) r cross join lateral (values %s) as v (name, hit) '
      'where v.hit group by 2, 3 order by 2, 3',
      v_table.name, case when v_table.has_org then 'x.org_id' else 'null::uuid' end, v_table.texts, v_table.id, v_table.columns)
      using v_forms, v_bytes;
  end loop;
end;
$$;

comment on function nightowls.scan_for(text) is
  'Looks for a text in every column of every table and materialized view of this schema, of all orgs, and returns where it is: the table, the column, the '
  'org, how many rows, and the places (ctid) of ten of them; no rows: nowhere. content: what to look for, to the letter; it is found in JSON too, whatever '
  'its escapes (quotes, backslashes, \u), in JSON inside strings of JSON, in arrays and in bytea (as UTF-8). It reads every row there is, so it takes its '
  'time. Locks nothing. For services. Raises 22004 or 22023 if content is null or empty.';

revoke all on function nightowls.scan_for(text) from public;
