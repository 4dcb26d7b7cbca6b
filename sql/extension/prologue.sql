\echo Use "create extension nightowls" to load this file. \quit

-- The schema is made by create extension, from the control file. One that is there already must be empty.
do $$
declare
  v_owner   pg_catalog.pg_roles;
  v_objects bigint;
  v_example text;
begin
  if pg_catalog.to_regprocedure('nightowls.version()') is not null then
    raise exception 'nightowls is installed in this database already, by migrations'
      using errcode = 'duplicate_object',
            hint = 'A database has one install: keep to migrations here, or create the extension in another database.';
  end if;

  select pg_catalog.count(*), pg_catalog.min(o.type || ' ' || o.identity)
    into v_objects, v_example
    from pg_catalog.pg_depend d
   cross join lateral pg_catalog.pg_identify_object(d.classid, d.objid, 0) o
   where d.refclassid = 'pg_catalog.pg_namespace'::pg_catalog.regclass
     and d.refobjid = pg_catalog.to_regnamespace('nightowls')
     and d.classid <> 'pg_catalog.pg_extension'::pg_catalog.regclass
     and d.deptype = 'n';
  if v_objects > 0 then
    raise exception 'schema "nightowls" holds objects that are not of this nightowls'
      using errcode = 'duplicate_schema',
            detail = pg_catalog.format('Objects in it: %s. The first is %s.', v_objects, v_example),
            hint = 'Run "alter schema nightowls rename to nightowls_v1", install again, then bring the data over as docs/moving.md says.';
  end if;

  -- Its owner may put things beside ours, and ours run with the rights of who installs them.
  select r.* into v_owner
    from pg_catalog.pg_namespace n
    join pg_catalog.pg_roles r on r.oid = n.nspowner
   where n.nspname = 'nightowls';
  if not v_owner.rolsuper and v_owner.rolname <> current_user then
    raise exception 'schema "nightowls" belongs to role "%"', v_owner.rolname
      using errcode = 'insufficient_privilege',
            hint = pg_catalog.format('Run "alter schema nightowls owner to %I", or rename the schema.', current_user);
  end if;
end;
$$;

comment on schema nightowls is
  'A durable core for swarms of AI agents: event log, projections, queue, floors and swarm state.';
