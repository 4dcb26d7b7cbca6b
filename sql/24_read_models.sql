-- Read models: projections into the user's own table, and materialized views.

create function nightowls.create_table_projection(
  name           text,
  aggregate_type text,
  target         text,
  handler        text,
  org            uuid default null
)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org        uuid := nightowls.current_org(create_table_projection.org);
  v_target     regclass := to_regclass(create_table_projection.target);
  v_definition nightowls.projections;
begin
  perform nightowls._check_projection_name(create_table_projection.name);
  if octet_length(create_table_projection.aggregate_type) not between 1 and 255
     or create_table_projection.aggregate_type is null then
    perform nightowls._refuse_names(create_table_projection.aggregate_type, 'any', 'any');
  end if;
  if v_target is null then
    raise exception 'table "%" does not exist', left(create_table_projection.target, 128)
      using errcode = 'undefined_table', hint = 'Give schema.table.';
  elsif not exists (
          select from pg_class c
           where c.oid = v_target and c.relkind = 'r' and not c.relispartition and not c.relhassubclass
             and c.relnamespace not in (select n.oid from pg_namespace n
                                         where n.nspname in ('nightowls', 'pg_catalog', 'information_schema'))) then
    raise exception '"%" cannot be a projection''s table', v_target
      using errcode = 'wrong_object_type', detail = 'It must be an ordinary table of the user''s, without partitions or children.';
  end if;

  v_definition.org_id := v_org;
  v_definition.name := create_table_projection.name;
  v_definition.kind := 'table';
  v_definition.aggregate_type := create_table_projection.aggregate_type;
  v_definition.handler := (nightowls._resolve_handler(create_table_projection.handler, array['(nightowls.events)'])).name;
  v_definition.target := (
    select format('%I.%I', n.nspname, c.relname)
      from pg_class c join pg_namespace n on n.oid = c.relnamespace
     where c.oid = v_target);

  if not nightowls._has_org_id(v_definition.target)
     and exists (select from nightowls.projections p
                  where p.kind = 'table' and p.target = v_definition.target and p.org_id <> v_org) then
    raise exception 'table % is kept by a projection of another org', v_definition.target
      using errcode = 'object_in_use', hint = 'A table that several orgs share needs a column org_id.';
  end if;

  -- Appends that are open do not know of it: they end first, and new ones wait.
  perform nightowls._await_appends();
  if nightowls._register_projection(v_definition) then
    perform nightowls._touch_org(v_org);
    if not exists (
         select from pg_trigger t
          where t.tgrelid = v_target and t.tgfoid = 'nightowls._refuse_write()'::regprocedure) then
      execute format(
        'create trigger nightowls_projection_only before insert or update or delete or truncate on %s '
        'for each statement execute function nightowls._refuse_write()', v_definition.target);
    end if;
    perform nightowls._rebuild_table(v_definition);
  end if;
end;
$$;

comment on function nightowls.create_table_projection(text, text, text, text, uuid) is
  'Makes a read model in a table of the user''s. name: unique in the org; aggregate_type: whose events; target: schema.table; handler: '
  'schema.name of a function (event nightowls.events) returning void that writes to it, called for each event in version order, in the '
  'transaction that appends, as the role that appends; org: the tenant. From then on the table refuses every other write (NW008). What is in '
  'the log is handled before this returns; the table is emptied first. Waits for open appends, and keeps new ones waiting until the '
  'transaction ends. The handler must not append to the aggregate type it handles (0A000). Runs DDL: owner only. '
  'Raises 42P01 if the table, 42883 if the handler does not exist, 42809 if the target is no table, 42710 if the projection exists with '
  'another definition, 25001 above read committed, NW010 if there is no org.';

revoke all on function nightowls.create_table_projection(text, text, text, text, uuid) from public;

-- Waits for every open append, and keeps new ones waiting until this transaction ends: each append reads _append_targets.
-- Definer: the table is closed.
create function nightowls._await_appends()
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  lock table nightowls._append_targets in access exclusive mode;
end;
$$;

revoke all on function nightowls._await_appends() from public;

-- Whether a table keeps orgs apart by a column org_id.
create function nightowls._has_org_id(target text)
  returns boolean
  language sql
  stable
  parallel safe
  return exists (
    select from pg_catalog.pg_attribute a
     where a.attrelid = pg_catalog.to_regclass(target) and a.attname = 'org_id' and not a.attisdropped);

revoke all on function nightowls._has_org_id(text) from public;

-- Says to appends above read committed whose snapshot is older that they do not know of a table projection (_after_append).
-- Definer: orgs is closed.
create function nightowls._touch_org(org uuid)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  update nightowls.orgs o set org_id = o.org_id where o.org_id = _touch_org.org;
end;
$$;

revoke all on function nightowls._touch_org(uuid) from public;

-- Empties the target of this org's rows and calls the handlers of all projections that write to it, for every event in
-- order, as the caller. With the target alone: an append that has handled its events has committed, so they are read here;
-- one that has not handles them afterwards. Nothing is left out or handled twice.
create function nightowls._rebuild_table(projection nightowls.projections)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org  uuid := (_rebuild_table.projection).org_id;
  v_call record;
begin
  -- Above read committed the events committed since the snapshot would be lost to the table: 25001.
  perform nightowls._safe_position(v_org, -1);
  perform nightowls._lock_target((_rebuild_table.projection).target, true);
  perform nightowls._open_door('project');
  if nightowls._has_org_id((_rebuild_table.projection).target) then
    execute format('delete from %s where org_id = $1', (_rebuild_table.projection).target) using v_org;
  else
    execute format('delete from %s', (_rebuild_table.projection).target);
  end if;

  for v_call in
    select row (e.*)::nightowls.events as event, p.handler, p.name
      from nightowls.all_events e
      join nightowls.projections p
        on p.org_id = e.org_id and p.aggregate_type = e.aggregate_type
       and p.kind = 'table' and p.target = (_rebuild_table.projection).target
     where e.org_id = v_org
     order by e."position", p.name
  loop
    perform nightowls._open_door('project|' || md5(v_call.name));
    execute 'select ' || v_call.handler || '($1)' using v_call.event;
  end loop;
  perform nightowls._shut_door();
end;
$$;

revoke all on function nightowls._rebuild_table(nightowls.projections) from public;

create function nightowls.create_view_projection(
  name          text,
  query         text,
  refresh_every interval default '5 minutes',
  key_columns   text[] default null,
  org           uuid default null
)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org        uuid := nightowls.current_org(create_view_projection.org);
  v_definition nightowls.projections;
  v_data       text := format('nightowls.%I', '_view_' || create_view_projection.name);
  v_view       text := format('nightowls.%I', 'view_' || create_view_projection.name);
  v_columns    text[];
begin
  perform nightowls._check_projection_name(create_view_projection.name);
  if octet_length(create_view_projection.name) > 40 then
    raise exception 'name is too long'
      using errcode = 'program_limit_exceeded', detail = 'A view projection''s name has at most 40 bytes.';
  elsif create_view_projection.query is null then
    raise exception 'query must not be null' using errcode = 'null_value_not_allowed';
  elsif create_view_projection.refresh_every is null or create_view_projection.refresh_every <= interval '0' then
    raise exception 'refresh_every must be more than 0' using errcode = 'invalid_parameter_value';
  end if;

  v_definition.org_id := v_org;
  v_definition.name := create_view_projection.name;
  v_definition.kind := 'view';
  v_definition.target := v_view;
  v_definition.query := create_view_projection.query;
  v_definition.refresh_every := create_view_projection.refresh_every;
  if not nightowls._register_projection(v_definition) then
    return;
  elsif to_regclass(v_data) is not null or to_regclass(v_view) is not null then
    raise exception 'view % exists already', v_view
      using errcode = 'duplicate_table', hint = 'A view projection serves all orgs: its name is unique among them. Choose another.';
  end if;

  perform nightowls._share_erasure(null);
  execute format('create materialized view %s as %s', v_data, create_view_projection.query);
  select array_agg(a.attname::text order by a.attnum) into v_columns
    from pg_attribute a
   where a.attrelid = to_regclass(v_data) and a.attnum > 0;
  if not exists (
       select from pg_attribute a
        where a.attrelid = to_regclass(v_data) and a.attname = 'org_id' and a.atttypid = 'uuid'::regtype) then
    raise exception 'the query of a view projection must have a column org_id of type uuid'
      using errcode = 'invalid_parameter_value', hint = 'It keeps the tenants apart; select e.org_id, … group by e.org_id, ….';
  elsif not coalesce(create_view_projection.key_columns, v_columns) <@ v_columns then
    raise exception 'key_columns names a column that the query does not have'
      using errcode = 'undefined_column', detail = format('It has %s.', array_to_string(v_columns, ', '));
  end if;
  -- A refresh beside its readers needs a unique key over all rows.
  execute format('create unique index on %s (%s)', v_data, (
    select string_agg(format('%I', c.name), ', ' order by c.no)
      from unnest(coalesce(create_view_projection.key_columns, v_columns)) with ordinality as c (name, no)));
  execute format('revoke all on %s from public', v_data);
  execute format('create view %s with (security_barrier = true) as select * from %s '
                 'where org_id = (select nightowls.current_org())', v_view, v_data);
  -- The schema's owner refreshes it.
  execute format('alter materialized view %s owner to %I', v_data, (
    select r.rolname from pg_namespace n join pg_roles r on r.oid = n.nspowner where n.nspname = 'nightowls'));
  execute format('alter view %s owner to %I', v_view, (
    select r.rolname from pg_namespace n join pg_roles r on r.oid = n.nspowner where n.nspname = 'nightowls'));
  execute format('comment on materialized view %s is %L', v_data, 'Data of a view projection, of all orgs: granted to nobody.');
  execute format('comment on view %s is %L', v_view, 'View projection ' || create_view_projection.name || ', the caller''s org only.');
end;
$$;

comment on function nightowls.create_view_projection(text, text, interval, text[], uuid) is
  'Makes a materialized view over events or states and the view nightowls.view_<name> that shows the caller''s org of it. name: at most '
  '40 bytes, unique among all orgs; query: it must have a column org_id uuid, and names must be qualified by schema; refresh_every: how often the clock refreshes it; '
  'key_columns: columns that are unique together, by default all; org: whose list of projections it stands in. Grant select on the view '
  'to those who may read it. Runs DDL: owner only. Raises 22023 without org_id or for an interval that is not positive, 23505 if the key '
  'is not unique, 42703 for a key column that is not there, 42710 or 42P07 if it exists with another definition, NW010 if there is no org.';

revoke all on function nightowls.create_view_projection(text, text, interval, text[], uuid) from public;

-- Definer: a refresh is the owner's; the name is looked up, nothing of the caller's is run.
create function nightowls._refresh_view(org uuid, name text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if exists (
       select from nightowls.projections p
        where p.org_id = _refresh_view.org and p.name = _refresh_view.name and p.kind = 'view') then
    perform nightowls._share_erasure(null);
    execute format('refresh materialized view concurrently nightowls.%I', '_view_' || _refresh_view.name);
    update nightowls.projections p
       set refreshed_at = clock_timestamp()
     where p.org_id = _refresh_view.org and p.name = _refresh_view.name;
  end if;
end;
$$;

revoke all on function nightowls._refresh_view(uuid, text) from public;

-- The clock's part of it: refreshes the views that are due, of all orgs, the one that has waited longest first, and begins no other after max_ms. A view
-- that cannot be refreshed does not stop the others. Nothing while something is being erased. did: how many were refreshed; detail: the last error.
create function nightowls._refresh_views(max_ms int, out did bigint, out detail jsonb)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_until timestamptz := clock_timestamp() + _refresh_views.max_ms * interval '1 millisecond';
  v_view  record;
begin
  did := 0;
  for v_view in
    select p.org_id, p.name
      from nightowls.projections p
      left join nightowls._sweeps w on w.org_id = p.org_id and w.sweep = 'views' and w.name = p.name
     where p.kind = 'view' and (p.refreshed_at is null or p.refreshed_at + p.refresh_every <= clock_timestamp())
     order by w.swept_at nulls first, p.org_id, p.name
  loop
    exit when clock_timestamp() >= v_until
           or not pg_try_advisory_xact_lock_shared(nightowls._lock_class(263), 0);
    begin
      perform nightowls._refresh_view(v_view.org_id, v_view.name);
      did := did + 1;
    exception when others then
      detail := jsonb_build_object('error', format('%s: %s %s', v_view.name, sqlstate, sqlerrm));
    end;
    perform nightowls._end_turn(v_view.org_id, 'views', v_view.name, '');
  end loop;
end;
$$;

revoke all on function nightowls._refresh_views(int) from public;

-- Forgets a projection and its states. Definer: the tables are closed.
create function nightowls._forget_projection(org uuid, name text)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if exists (
       select from nightowls.consumers c
        where c.org_id = _forget_projection.org and c.name = 'projection:' || _forget_projection.name) then
    perform nightowls._drop_consumer(_forget_projection.org, 'projection:' || _forget_projection.name);
  end if;
  delete from nightowls.routes r
   where r.org_id = _forget_projection.org and r.name = _forget_projection.name and r.kind <> 'queue';
  delete from nightowls.projections p where p.org_id = _forget_projection.org and p.name = _forget_projection.name;
  perform nightowls._open_door('project');
  delete from nightowls._projection_states s
   where s.org_id = _forget_projection.org and s.projection = _forget_projection.name;
  delete from nightowls.snapshots s
   where s.org_id = _forget_projection.org and s.projection = _forget_projection.name;
  delete from nightowls._replays r
   where r.org_id = _forget_projection.org and r.projection = _forget_projection.name;
  perform nightowls._shut_door();
end;
$$;

revoke all on function nightowls._forget_projection(uuid, text) from public;

create function nightowls.drop_projection(name text, org uuid default null)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org        uuid := nightowls.current_org(drop_projection.org);
  v_projection nightowls.projections := nightowls._projection(drop_projection.name, v_org);
begin
  if v_projection.kind = 'table'
     and not pg_has_role(current_user, (select c.relowner from pg_class c where c.oid = to_regclass(v_projection.target)), 'usage') then
    raise exception 'must be owner of table %', v_projection.target using errcode = 'insufficient_privilege';
  end if;
  perform nightowls._forget_projection(v_org, v_projection.name);
  if v_projection.kind = 'view' then
    execute format('drop view nightowls.%I', 'view_' || v_projection.name);
    execute format('drop materialized view nightowls.%I', '_view_' || v_projection.name);
  elsif v_projection.kind = 'table' and to_regclass(v_projection.target) is not null
        and not exists (select from nightowls.projections p where p.kind = 'table' and p.target = v_projection.target) then
    execute format('drop trigger if exists nightowls_projection_only on %s', v_projection.target);
  end if;
end;
$$;

comment on function nightowls.drop_projection(text, uuid) is
  'Forgets a projection and its states; the events stay. A table projection''s table stays with its rows and may be written to again; '
  'a view projection''s views are dropped. name: the projection; org: the tenant. For a table or view it runs DDL: owner only. '
  'Raises NW007 if the projection does not exist, 42501 for a table or view of somebody else''s, NW010 if there is no org.';

revoke all on function nightowls.drop_projection(text, uuid) from public;
