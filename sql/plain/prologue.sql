-- The schema, and what must hold before there is one: every later file relies on it.
do $$
declare
  v_schema  oid := pg_catalog.to_regnamespace('nightowls');
  v_objects bigint;
  v_example text;
begin
  if pg_catalog.current_setting('server_version_num')::int < 150000 then
    raise exception 'nightowls needs PostgreSQL 15 or later'
      using errcode = 'feature_not_supported',
            detail = pg_catalog.format('This server is PostgreSQL %s.', pg_catalog.current_setting('server_version'));
  end if;

  -- Its functions serve every org, and row level security is forced on their owner too.
  if not exists (
    select from pg_catalog.pg_roles r
     where r.rolname = current_user and (r.rolsuper or r.rolbypassrls)
  ) then
    raise exception 'role "%" may not bypass row level security', current_user
      using errcode = 'insufficient_privilege',
            detail = 'nightowls belongs to the role that installs it, and its functions serve every org.',
            hint = pg_catalog.format('Install as a role that has bypassrls, or let a superuser run: alter role %I bypassrls.',
                                     current_user);
  end if;

  if exists (select from pg_catalog.pg_extension e where e.extname = 'nightowls') then
    raise exception 'nightowls is installed in this database as an extension'
      using errcode = 'duplicate_object',
            hint = 'A database has one install: remove these files from the migrations, and upgrade with "alter extension nightowls update".';
  end if;

  if pg_catalog.to_regprocedure('nightowls.version()') is not null then
    raise exception 'nightowls is installed in this database already'
      using errcode = 'duplicate_object',
            hint = 'Files that were applied by hand are told to the Supabase CLI by "supabase migration repair --status applied".';
  end if;

  select pg_catalog.count(*), pg_catalog.min(o.type || ' ' || o.identity)
    into v_objects, v_example
    from pg_catalog.pg_depend d
   cross join lateral pg_catalog.pg_identify_object(d.classid, d.objid, 0) o
   where d.refclassid = 'pg_catalog.pg_namespace'::pg_catalog.regclass
     and d.refobjid = v_schema
     and d.deptype = 'n';
  if v_objects > 0 then
    raise exception 'schema "nightowls" holds objects that are not of this nightowls'
      using errcode = 'duplicate_schema',
            detail = pg_catalog.format('Objects in it: %s. The first is %s.', v_objects, v_example),
            hint = 'Run "alter schema nightowls rename to nightowls_v1", install again, then bring the data over as docs/moving.md says.';
  elsif v_schema is not null then
    raise exception 'schema "nightowls" exists already'
      using errcode = 'duplicate_schema',
            hint = 'It is empty: run "drop schema nightowls" and install again.';
  end if;
end;
$$;

create schema nightowls;

comment on schema nightowls is
  'A durable core for swarms of AI agents: event log, projections, queue, floors and swarm state.';
