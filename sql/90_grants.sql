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
  execute format('grant select on nightowls.published_changes, nightowls.streams to %I', grant_service.role);
  execute format('grant select on nightowls.snapshots, nightowls._sweeps, nightowls.events_archive, nightowls.all_events, '
                 'nightowls.compactions, nightowls.compaction_policies, nightowls._replays, nightowls.progress to %I', grant_service.role);
  execute format('grant select on nightowls.queues, nightowls.queue_messages, nightowls.queue_marks, nightowls.queue_due_marks, '
                 'nightowls.queue_dedup, nightowls.queue_archive, nightowls.queue_bindings, nightowls.topic_bindings, nightowls.once_keys to %I', grant_service.role);
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
               'grant_service', '_owner_functions', '_owner', 'create_type_index', 'create_table_projection', 'create_view_projection',
               'migration_files', '_await_appends', 'import_events', '_read_source', '_refuse_row', '_import_rows'];

revoke all on function nightowls._owner_functions() from public;

do $$
begin
  if exists (select from pg_catalog.pg_roles r where r.rolname = 'service_role') then
    perform nightowls.grant_service('service_role');
  end if;
end;
$$;
