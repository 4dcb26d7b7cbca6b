-- The main functions where an API looks for them: wrappers in the schema that PostgREST serves.

create function nightowls._rpc_functions()
  returns text[]
  language sql
  immutable
  parallel safe
  return array['pop_queue', 'ack_message',
               'send', 'send_batch', 'send_topic', 'once', 'read', 'read_with_poll', 'pop', 'ack', 'ack_many', 'nack', 'nack_many', 'extend', 'extend_many',
               'append_event', 'append_events', 'append_many', 'read_aggregate', 'read_events', 'recent_events', 'last_event', 'state',
               'fetch_events', 'commit_offset',
               'request_floor', 'await_floor', 'heartbeat_floor', 'release_floor', 'leave_floor',
               'publish_agent_version', 'rollback_agent_version', 'list_agent_versions', 'get_agent',
               'create_thread', 'start_run', 'set_run_status', 'save_run_snapshot', 'load_run_snapshot', 'list_run_events',
               'append_message', 'list_messages', 'scratchpad_put', 'scratchpad_get', 'scratchpad_list', 'scratchpad_delete',
               'create_followup', 'claim_followups', 'finish_followup', 'cancel_followup'];

revoke all on function nightowls._rpc_functions() from public;

-- Takes the rights to a function from everybody but its owner and gives them to the services: default privileges may have given
-- them to anybody.
create function nightowls._serve(function regprocedure)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_grantee oid;
begin
  for v_grantee in
    select a.grantee
      from pg_proc p
     cross join lateral aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
     where p.oid = _serve.function and a.grantee <> p.proowner
  loop
    execute format('revoke all on function %s from %s', _serve.function,
                   case when v_grantee = 0 then 'public' else v_grantee::regrole::text end);
  end loop;
  for v_grantee in select s.role from nightowls._service_roles() s (role) loop
    execute format('grant execute on function %s to %s', _serve.function, v_grantee::regrole);
  end loop;
end;
$$;

revoke all on function nightowls._serve(regprocedure) from public;

-- The roles that grant_service has made services.
create function nightowls._service_roles()
  returns setof oid
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return query
    select distinct a.grantee
      from pg_proc p
     cross join lateral aclexplode(p.proacl) a
     where p.oid = 'nightowls._service()'::regprocedure and a.grantee not in (0, p.proowner);
end;
$$;

revoke all on function nightowls._service_roles() from public;

create function nightowls.install_rpc(target_schema text default 'public')
  returns table (function_name text, outcome text)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_schema   oid := to_regnamespace(quote_ident(install_rpc.target_schema));
  v_function record;
  v_found    record;
  v_made     text;
  v_comment  text;
begin
  if install_rpc.target_schema is null then
    raise exception 'target_schema must not be null' using errcode = 'null_value_not_allowed';
  elsif v_schema is null then
    raise exception 'schema "%" does not exist', left(install_rpc.target_schema, 64) using errcode = 'invalid_schema_name';
  elsif install_rpc.target_schema in ('nightowls', 'pg_catalog', 'information_schema') or starts_with(install_rpc.target_schema, 'pg_') then
    raise exception 'schema "%" is not one for wrappers', install_rpc.target_schema
      using errcode = 'invalid_parameter_value', hint = 'Name the one that your API serves, such as public.';
  end if;

  for v_function in
    select p.oid, p.proname, p.proretset or t.typtype = 'c' or p.prorettype = 'record'::regtype as wide,
           case p.provolatile when 'v' then 'volatile' when 's' then 'stable' else 'immutable' end as volatility,
           array_to_string(array(
             select format('%I => $%s', a.name, row_number() over (order by a.nth))
               from unnest(p.proargnames, p.proargmodes) with ordinality as a (name, mode, nth)
              where coalesce(a.mode, 'i') in ('i', 'b')
              order by a.nth), ', ') as given
      from pg_proc p
      join pg_type t on t.oid = p.prorettype
     where p.pronamespace = 'nightowls'::regnamespace and p.proname = any (nightowls._rpc_functions())
     order by array_position(nightowls._rpc_functions(), p.proname::text)
  loop
    function_name := v_function.proname;
    v_made := format(
      'create function %I.%I(%s) returns %s language sql %s parallel unsafe security invoker set search_path to '''' as %L',
      install_rpc.target_schema, v_function.proname, pg_get_function_arguments(v_function.oid), pg_get_function_result(v_function.oid),
      v_function.volatility,
      format('select %snightowls.%I(%s)', case when v_function.wide then '* from ' end, v_function.proname, v_function.given));
    v_comment := format('Calls nightowls.%s(), with the caller''s rights; made by nightowls.install_rpc(): %s',
                        v_function.proname, md5(v_made));
    select count(*) as others, max(p.oid::regprocedure::text) as signature,
           bool_and(p.proowner = current_user::regrole and d.text like 'Calls nightowls.%; made by nightowls.install_rpc(): %') as ours,
           bool_and(d.text = v_comment) as same
      into v_found
      from pg_proc p
     cross join lateral obj_description(p.oid, 'pg_proc') d (text)
     where p.pronamespace = v_schema and p.proname = v_function.proname;
    if v_found.others > 0 and v_found.ours is not true then
      outcome := 'left alone: there is another function of this name';
      return next;
      continue;
    elsif v_found.same then
      outcome := 'there already';
    else
      outcome := 'made';
      if v_found.others > 0 then
        outcome := 'made anew';
        execute format('drop function %s', v_found.signature);
      end if;
      execute v_made;
    end if;
    select max(p.oid::regprocedure::text) into v_found.signature
      from pg_proc p
     where p.pronamespace = v_schema and p.proname = v_function.proname;
    execute format('comment on function %s is %L', v_found.signature, v_comment);
    perform nightowls._serve(v_found.signature::regprocedure);
    return next;
  end loop;
  -- PostgREST reads the schema anew.
  perform pg_notify('pgrst', 'reload schema');
end;
$$;

comment on function nightowls.install_rpc(text) is
  'Makes a wrapper of each main function (pop_queue, ack_message, send, read, append_event, request_floor, start_run, append_message and their like) in a schema that '
  'an API serves, so that supabase.rpc finds it without .schema(). One row for each: its name and what was done. A function of that name that '
  'is there already is left alone, whatever its arguments. Wrappers run with the caller''s rights; only services may call them. Again it '
  'makes what is missing or has changed, and gives the rights to roles that have become services since. target_schema: the schema. Owner only, as '
  'it runs DDL. Raises 3F000 if the schema does not exist, 22004 or 22023 if it is null or not one for wrappers.';

revoke all on function nightowls.install_rpc(text) from public;
