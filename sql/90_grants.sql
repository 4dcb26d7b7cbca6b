-- Every grant, and the only file that names a role.

create function nightowls.grant_service(role text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_function regprocedure;
  v_view     text;
begin
  if grant_service.role is null then
    raise exception 'role must not be null' using errcode = 'null_value_not_allowed';
  elsif not exists (select from pg_roles r where r.rolname = grant_service.role) then
    raise exception 'role "%" does not exist', left(grant_service.role, 64) using errcode = 'undefined_object';
  end if;

  execute format('grant usage on schema nightowls to %I', grant_service.role);
  execute format('grant select on nightowls.events, nightowls.routes, nightowls.projections, nightowls._projection_states, '
                 'nightowls.projection_states, nightowls.imports, nightowls.settings, nightowls.orgs, nightowls.org_members to %I', grant_service.role);
  execute format('grant select on nightowls.floors, nightowls.floor_tickets, nightowls.floor_marks, nightowls.floor_status to %I', grant_service.role);
  execute format('grant select on nightowls.consumers, nightowls._consumer_offsets, nightowls._consumer_failures, nightowls.consumer_lag, '
                 'nightowls.parked_events to %I', grant_service.role);
  execute format('grant select on nightowls.embedding_sources, nightowls._embedding_states, nightowls._embedding_pending, nightowls._embedding_marks, '
                 'nightowls.embedding_chunks, nightowls._embedding_requests, nightowls.failed_embeddings to %I', grant_service.role);
  execute format('grant select on nightowls.published_changes, nightowls.streams to %I', grant_service.role);
  execute format('grant select on nightowls.snapshots, nightowls._sweeps, nightowls.events_archive, nightowls.all_events, '
                 'nightowls.compactions, nightowls.compaction_policies, nightowls._replays, nightowls.progress to %I', grant_service.role);
  execute format('grant select on nightowls.queues, nightowls.queue_messages, nightowls.queue_marks, nightowls.queue_due_marks, '
                 'nightowls.queue_dedup, nightowls.queue_archive, nightowls.queue_bindings, nightowls.topic_bindings, nightowls.once_keys to %I', grant_service.role);
  execute format('grant select on nightowls.agents, nightowls.agent_versions, nightowls.audit_log, nightowls.threads, nightowls.runs, '
                 'nightowls.run_snapshots, nightowls.messages, nightowls.scratchpad, nightowls.scratchpad_marks, nightowls.followups, nightowls.redaction_rules, nightowls.app_config to %I', grant_service.role);
  execute format('grant select on nightowls.endpoints, nightowls._endpoint_states, nightowls.responses, nightowls.requests, nightowls.dispatch_status to %I', grant_service.role);
  -- So that a direct write is told why it is refused.
  execute format('grant insert, update on nightowls.agents, nightowls.agent_versions to %I', grant_service.role);
  execute format('grant select on nightowls._queue_counts, nightowls.queue_metrics, nightowls.clock_parts, nightowls._samples, nightowls.health to %I', grant_service.role);
  execute format('grant select on nightowls.vector_indexes to %I', grant_service.role);
  -- Of one org at a time: that of the call.
  for v_view in select t.table_name from nightowls._mastra_tables() t loop
    execute format('grant select, insert, update, delete on nightowls.%I to %I', v_view, grant_service.role);
  end loop;
  for v_view in select s.view_name from nightowls.streams s where to_regclass(s.view_name) is not null loop
    execute format('grant select on %s to %I', v_view, grant_service.role);
  end loop;
  -- Neither position nor created_at: they are not the caller's to choose.
  execute format('grant insert (org_id, aggregate_type, aggregate_id, version, event_type, payload, metadata, event_id) '
                 'on nightowls.events to %I', grant_service.role);
  execute format('grant insert, update, delete on nightowls.orgs, nightowls.org_members, nightowls.settings to %I', grant_service.role);

  for v_function in
    select p.oid::regprocedure
      from pg_proc p
     where p.pronamespace = 'nightowls'::regnamespace
       and p.proname not in (select unnest(nightowls._owner_functions()))
  loop
    execute format('grant execute on routine %s to %I', v_function, grant_service.role);
  end loop;
end;
$$;

comment on function nightowls.grant_service(text) is
  'Gives a role the rights of a service: it may call everything but what runs DDL, for every org. role: its name. Owner only. '
  'Raises 42704 if the role does not exist, 22004 if role is null.';

revoke all on function nightowls.grant_service(text) from public;

-- What runs DDL or gives rights away is the owner's.
create function nightowls._owner_functions()
  returns text[]
  language sql
  immutable
  parallel safe
  return array['create_stream_join', 'create_enrichment', 'create_table_join', 'drop_stream', '_make_stream',
               'enable_cdc', 'disable_cdc', 'publish_changes', 'unpublish_changes', 'publish_table', '_append_change',
               'grant_mastra', 'revoke_mastra', 'adopt_mastra', 'trigger_set_timestamps', 'create_vector_index', 'drop_vector_index',
               'enable_realtime', 'disable_realtime', '_make_realtime_policies', '_rekeep_targets',
               'create_embedding_source', 'alter_embedding_source', 'drop_embedding_source', '_fit_embedding_source', '_check_input',
               '_make_embedding_triggers', '_drop_embedding_triggers', '_note_embedding', '_drop_embedding_chunks', '_run_as_owner',
               'install_rpc', '_serve', 'install_pgmq', 'adopt_pgmq', '_take_pgmq', '_pgmq_last_id',
               'schedule', 'unschedule', 'grant_service', 'grant_member', 'grant_monitor', '_owner_functions', '_member_functions', '_owner', 'create_type_index', 'create_table_projection', 'create_view_projection',
               'migration_files', '_await_appends', 'import_events', '_read_source', '_refuse_row', '_import_rows'];

revoke all on function nightowls._owner_functions() from public;

-- What members may call: each of these runs with the caller's rights under the policies, or checks by itself that the caller is a
-- member of the org it touches.
create function nightowls._member_functions()
  returns text[]
  language sql
  immutable
  parallel safe
  return array['version', 'current_org', 'add_member', 'change_member', 'remove_member', 'append_message', 'list_messages',
               'list_run_events', 'get_config_value', '_my_config_value', '_post_message', '_list_messages_redacted',
               '_list_my_run_events', '_my_thread', '_my_run', '_my_message', '_my_run_events',
               '_is_service', '_is_member', '_user_id', '_resolve_org', '_member_orgs', '_manage_member', '_may_receive'];

revoke all on function nightowls._member_functions() from public;

create function nightowls.grant_member(role text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_function regprocedure;
begin
  if grant_member.role is null then
    raise exception 'role must not be null' using errcode = 'null_value_not_allowed';
  elsif not exists (select from pg_roles r where r.rolname = grant_member.role) then
    raise exception 'role "%" does not exist', left(grant_member.role, 64) using errcode = 'undefined_object';
  end if;

  execute format('grant usage on schema nightowls to %I', grant_member.role);
  execute format('grant select on nightowls.orgs, nightowls.org_members, nightowls.my_threads, nightowls.my_runs, nightowls.my_messages, '
                 'nightowls.my_run_events to %I', grant_member.role);
  -- What the views need, and none of the contents.
  execute format('grant select (org_id, thread_id, resource_id, created_at) on nightowls.threads to %I', grant_member.role);
  execute format('grant select (org_id, run_id, thread_id, parent_run_id, agent, agent_version, resource_id, status, created_at, updated_at, '
                 'started_at, finished_at) on nightowls.runs to %I', grant_member.role);
  execute format('grant select (org_id, thread_id, seq, message_id, role, author_type, author_id, run_id, created_at) '
                 'on nightowls.messages to %I', grant_member.role);

  for v_function in
    select p.oid::regprocedure
      from pg_proc p
     where p.pronamespace = 'nightowls'::regnamespace and p.proname = any (nightowls._member_functions())
  loop
    execute format('grant execute on routine %s to %I', v_function, grant_member.role);
  end loop;
end;
$$;

comment on function nightowls.grant_member(text) is
  'Gives a role the rights of members: who comes as this role reads and does, in the orgs that its user id is a member of, what docs/security.md lists, '
  'and nothing elsewhere. role: its name. The user id is the sub of the JWT, else the setting nightowls.user_id: so give it to a role that an API or server '
  'of yours uses, which sets these, and not to one that users log in with. Owner only. Raises 42704 if the role does not exist, 22004 if role is null.';

revoke all on function nightowls.grant_member(text) from public;

create function nightowls.grant_monitor(role text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if grant_monitor.role is null then
    raise exception 'role must not be null' using errcode = 'null_value_not_allowed';
  elsif not exists (select from pg_roles r where r.rolname = grant_monitor.role) then
    raise exception 'role "%" does not exist', left(grant_monitor.role, 64) using errcode = 'undefined_object';
  end if;
  execute format('grant usage on schema nightowls to %I', grant_monitor.role);
  execute format('grant execute on function nightowls.metrics_text(), nightowls._metrics_totals(), nightowls._is_service() to %I', grant_monitor.role);
end;
$$;

comment on function nightowls.grant_monitor(text) is
  'Lets a role read metrics_text, with totals over all orgs, and nothing else: for what scrapes metrics. role: its name. Owner only. Raises 42704 if the role does '
  'not exist, 22004 if role is null.';

revoke all on function nightowls.grant_monitor(text) from public;

do $$
begin
  if exists (select from pg_catalog.pg_roles r where r.rolname = 'service_role') then
    perform nightowls.grant_service('service_role');
  end if;
  if exists (select from pg_catalog.pg_roles r where r.rolname = 'authenticated') then
    perform nightowls.grant_member('authenticated');
    if pg_catalog.to_regnamespace('realtime') is not null then
      perform nightowls._make_realtime_policies('authenticated');
    end if;
  end if;
end;
$$;
