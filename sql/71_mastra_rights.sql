-- Mastra's tables beyond the package: who may use them, how they are erased, and rows that were elsewhere before.

create function nightowls.grant_mastra(role text, org uuid default null)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org   uuid := nightowls.current_org(grant_mastra.org);
  v_role  pg_roles;
  v_there uuid;
  v_name  name;
begin
  if grant_mastra.role is null then
    raise exception 'role must not be null' using errcode = 'null_value_not_allowed';
  end if;
  select r.* into v_role from pg_roles r where r.rolname = grant_mastra.role;
  if not found then
    raise exception 'role "%" does not exist', left(grant_mastra.role, 64) using errcode = 'undefined_object';
  elsif v_role.rolsuper or v_role.rolbypassrls then
    raise exception 'role "%" bypasses row level security', grant_mastra.role
      using errcode = 'invalid_parameter_value',
            detail = 'It sees the rows of every org, whatever is granted.',
            hint = format('Make another: create role %I login.', left(grant_mastra.role, 50) || '_app');
  end if;
  perform nightowls._refuse_no_org(v_org);

  lock table nightowls._mastra_roles in share row exclusive mode;
  select m.org_id into v_there from nightowls._mastra_roles m where m.role_name = grant_mastra.role;
  if v_there <> v_org then
    raise exception 'role "%" is Mastra''s for another org already', grant_mastra.role
      using errcode = 'duplicate_object', hint = 'Take it away with nightowls.revoke_mastra(), or make another role.';
  elsif v_there is null then
    insert into nightowls._mastra_roles (org_id, role_name) values (v_org, grant_mastra.role);
  end if;

  execute format('grant usage on schema nightowls to %I', grant_mastra.role);
  execute format('grant execute on function nightowls._mastra_org(), nightowls._role_org(text) to %I', grant_mastra.role);
  for v_name in select t.table_name from nightowls._mastra_tables(v_org) t loop
    execute format('grant select, insert, update, delete on nightowls.%I to %I', v_name, grant_mastra.role);
  end loop;
end;
$$;

comment on function nightowls.grant_mastra(text, uuid) is
  'Gives a role the rights that Mastra''s store and vectors need, in one org: rows of that org in the tables mastra_… and those of create_vector_index(), and nothing else. '
  'Nothing in a session says which org it is: it is the role''s, so that pooled connections cannot mix them up. Again with the same org it grants what is '
  'new. role: its name; org: the tenant. Owner only. Waits for who is granting or revoking it. Raises 42704 if the role does not exist, 22023 if it bypasses '
  'row level security or the org does not exist, 42710 if it is for another org, 22004 if it is null, NW010 if there is no org.';

revoke all on function nightowls.grant_mastra(text, uuid) from public;

create function nightowls.revoke_mastra(role text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_name name;
begin
  if revoke_mastra.role is null then
    raise exception 'role must not be null' using errcode = 'null_value_not_allowed';
  end if;
  lock table nightowls._mastra_roles in share row exclusive mode;
  delete from nightowls._mastra_roles m where m.role_name = revoke_mastra.role;
  if not exists (select from pg_roles r where r.rolname = revoke_mastra.role) then
    return;
  end if;
  execute format('revoke execute on function nightowls._mastra_org(), nightowls._role_org(text) from %I', revoke_mastra.role);
  for v_name in select t.table_name from nightowls._mastra_tables() t loop
    execute format('revoke select, insert, update, delete on nightowls.%I from %I', v_name, revoke_mastra.role);
  end loop;
end;
$$;

comment on function nightowls.revoke_mastra(text) is
  'Takes from a role what grant_mastra() gave it; from one that has nothing, or is gone, it takes nothing. (A role that is a service keeps its org by the '
  'setting, JWT or default; call grant_service() for it again.) role: its name. Owner only. Waits for who is granting or revoking it. Raises 22004 if role is null.';

revoke all on function nightowls.revoke_mastra(text) from public;

-- Erasure -------------------------------------------------------------------------------------------

-- Removes the rows of a thread, run, resource or user; what a user has made stays, without the name. Definer: as the others that erase.
create function nightowls._erase_mastra(org uuid, aggregate_type text, aggregate_id text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_columns text[] := case _erase_mastra.aggregate_type
    when 'thread' then array['threadId', 'thread_id', 'sourceThreadId', 'mastra_threads.id']
    when 'run' then array['runId', 'run_id']
    when 'resource' then array['resourceId', 'resource_id', 'mastra_resources.id']
    when 'user' then array['userId', 'mastra_tool_provider_connections.authorId', 'authorId'] end;
  v_column  record;
begin
  -- The threads of a resource are its own, with all that belongs to them.
  if _erase_mastra.aggregate_type = 'resource' then
    for v_column in
      select t.id from nightowls.mastra_threads t
       where t.org_id = _erase_mastra.org and t."resourceId" = _erase_mastra.aggregate_id
    loop
      perform nightowls._erase_mastra(_erase_mastra.org, 'thread', v_column.id);
    end loop;
  elsif _erase_mastra.aggregate_type = 'thread' then
    delete from nightowls.mastra_workflow_snapshot w
     where w.org_id = _erase_mastra.org
       and coalesce(
             jsonb_path_query_first(
               w.snapshot, '$.context.* ? (@.status == "suspended").suspendPayload.__streamState.messageList.memoryInfo.threadId') #>> '{}',
             w.snapshot #>> '{context,input,messageListState,memoryInfo,threadId}') = _erase_mastra.aggregate_id;
  end if;
  -- What is said of a vector is its user's; these are the names that Mastra's memory gives.
  for v_column in
    select c.relname
      from nightowls.vector_indexes v
      join pg_class c on c.relname = v.name and c.relnamespace = 'nightowls'::regnamespace and c.relkind = 'r'
     where v.org_id = _erase_mastra.org
  loop
    execute format('delete from nightowls.%I t where exists (select from unnest($1) as k (name) where t.metadata ->> k.name = $2)', v_column.relname)
      using v_columns, _erase_mastra.aggregate_id;
  end loop;
  for v_column in
    select c.relname, a.attname, a.attname = 'authorId' and c.relname <> 'mastra_tool_provider_connections' as is_author
      from pg_class c
      join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
     where c.relnamespace = 'nightowls'::regnamespace and c.relkind = 'r' and c.relname ~ '^mastra_'
       and (a.attname = any (v_columns) or c.relname || '.' || a.attname = any (v_columns))
     order by c.relname, a.attnum
  loop
    if v_column.is_author then
      execute format('update nightowls.%I t set %I = null where t.org_id = $1 and t.%2$I = $2', v_column.relname, v_column.attname)
        using _erase_mastra.org, _erase_mastra.aggregate_id;
    elsif v_column.relname = 'mastra_ai_spans' then
      -- With the spans beside and beneath it.
      execute format('delete from nightowls.mastra_ai_spans s where s.org_id = $1 and s."traceId" in ('
                     'select t."traceId" from nightowls.mastra_ai_spans t where t.org_id = $1 and t.%I = $2)', v_column.attname)
        using _erase_mastra.org, _erase_mastra.aggregate_id;
    else
      execute format('delete from nightowls.%I t where t.org_id = $1 and t.%I = $2', v_column.relname, v_column.attname)
        using _erase_mastra.org, _erase_mastra.aggregate_id;
    end if;
  end loop;
end;
$$;

revoke all on function nightowls._erase_mastra(uuid, text, text) from public;

-- Adoption ------------------------------------------------------------------------------------------

create function nightowls.adopt_mastra(source_schema text default 'nightowls_v1', org uuid default null)
  returns table (table_name text, adopted bigint, outcome text)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
  set row_security to off
as $$
#variable_conflict use_column
declare
  v_org     uuid := nightowls.current_org(adopt_mastra.org);
  v_schema  oid := to_regnamespace(quote_ident(adopt_mastra.source_schema));
  v_table   record;
  v_columns record;
  v_rows    bigint;
begin
  if adopt_mastra.source_schema is null then
    raise exception 'source_schema must not be null' using errcode = 'null_value_not_allowed';
  elsif v_schema is null then
    raise exception 'schema "%" does not exist', left(adopt_mastra.source_schema, 64) using errcode = 'invalid_schema_name';
  elsif adopt_mastra.source_schema = 'nightowls' then
    raise exception 'schema "nightowls" is nightowls'' own' using errcode = 'invalid_parameter_value', hint = 'Name the schema that Mastra''s tables are in.';
  end if;
  perform nightowls._refuse_no_org(v_org);

  for v_table in
    select c.oid, c.relname, to_regclass(format('nightowls.%I', c.relname)) as target
      from pg_class c
     where c.relnamespace = v_schema and c.relkind = 'r' and c.relname ~ '^mastra_'
     order by c.relname
  loop
    table_name := v_table.relname;
    adopted := 0;
    if v_table.target is null then
      execute format('select count(*) from %I.%I', adopt_mastra.source_schema, v_table.relname) into v_rows;
      outcome := case when v_rows = 0 then 'left where it is: it is empty, and this version of Mastra has no such table'
                      else format('left where it is, with %s rows: this version of Mastra has no such table', v_rows) end;
      return next;
      continue;
    end if;
    -- Nobody writes meanwhile.
    execute format('lock table %I.%I in share mode', adopt_mastra.source_schema, v_table.relname);

    select string_agg(quote_ident(a.attname), ', ' order by a.attnum) filter (where b.attname is not null) as names,
           string_agg(case when a.atttypid = b.atttypid then format('s.%I', a.attname)
                           else format('s.%I::text::%s', a.attname, format_type(b.atttypid, b.atttypmod)) end, ', ' order by a.attnum)
             filter (where b.attname is not null) as own,
           string_agg(format('(%L, s.%I is not null)', a.attname, a.attname), ', ' order by a.attnum) filter (where b.attname is null) as others
      into v_columns
      from pg_attribute a
      left join pg_attribute b on b.attrelid = v_table.target and b.attname = a.attname and b.attnum > 0 and not b.attisdropped
                              and b.attname <> 'org_id'
     where a.attrelid = v_table.oid and a.attnum > 0 and not a.attisdropped;
    if v_columns.others is not null then
      execute format('select string_agg(distinct v.name, '', '') from %I.%I s cross join lateral (values %s) as v (name, used) where v.used',
                     adopt_mastra.source_schema, v_table.relname, v_columns.others)
         into outcome;
      if outcome is not null then
        raise exception 'table %.% has columns that this version of Mastra does not have: %', quote_ident(adopt_mastra.source_schema), v_table.relname, outcome
          using errcode = 'invalid_parameter_value',
                detail = 'There are values in them, which would be lost.',
                hint = 'Let @mastra/pg 1.27.1 bring the tables up to date first (init()), or take the values elsewhere and drop the columns.';
      end if;
    end if;

    begin
      execute format('insert into nightowls.%1$I (%2$s, org_id) select x.*, $1 from (select %3$s from %4$I.%1$I s except all '
                     'select %2$s from nightowls.%1$I t where t.org_id = $1) x',
                     v_table.relname, v_columns.names, v_columns.own, adopt_mastra.source_schema)
        using v_org;
      get diagnostics adopted = row_count;
    exception when unique_violation then
      raise exception 'a row of %.% has a key that is taken in nightowls.%', quote_ident(adopt_mastra.source_schema), v_table.relname, v_table.relname
        using errcode = 'unique_violation', detail = sqlerrm, hint = 'Nothing has been adopted. Remove or rename it on one side.';
    end;
    execute format('select count(*) from %I.%I', adopt_mastra.source_schema, v_table.relname) into v_rows;
    outcome := case when adopted = v_rows then 'adopted' else format('adopted; %s were there already', v_rows - adopted) end;
    return next;
  end loop;
  if table_name is null then
    raise exception 'schema "%" has no tables of Mastra''s', left(adopt_mastra.source_schema, 64)
      using errcode = 'invalid_parameter_value', hint = 'Their names begin with mastra_.';
  end if;
end;
$$;

comment on function nightowls.adopt_mastra(text, uuid) is
  'Copies the rows of tables that @mastra/pg has made in another schema, with their times, into those of nightowls: one row for each table, with how many. All or '
  'nothing; what is there already with the same contents is left, so that it can be called again. A table made by an older version may lack columns; one '
  'that has values in columns which this version does not know is refused. source_schema: the schema, which stays as it is; org: the tenant whose rows they '
  'become. Owner only. Waits for who is writing to the tables, and lets nobody write to them until the end of the transaction. Raises 3F000 if the schema does not exist, 22023 if '
  'it has no such tables, columns would be lost or the org does not exist, 23505 if a key is taken, 22004 if source_schema is null, NW010 if there is no org.';

revoke all on function nightowls.adopt_mastra(text, uuid) from public;
