-- Dresses a database of a test cluster as a Supabase project: the roles, schemas and functions that a project finds
-- there, as far as nightowls looks at them. Written from what Supabase documents; only for tests.
--
-- Run as a superuser, once a database. The setting shim.host names the role that stands for the project's "postgres",
-- which owns what migrations make and is no superuser. Roles belong to the whole cluster, so use a cluster of its own.
--
-- Unlike the real thing: realtime.messages has no partitions and no server that reads it, vault keeps secrets in the
-- clear, net records requests and sends none, and there is no sign-in.

begin;

-- Several databases may be dressed at once.
lock table pg_catalog.pg_authid in share row exclusive mode;

do $$
declare
  v_role record;
begin
  for v_role in
    select *
      from (values
             ('anon',                    'nologin noinherit'),
             ('authenticated',           'nologin noinherit'),
             ('service_role',            'nologin noinherit bypassrls'),
             ('authenticator',           'login noinherit'),
             ('supabase_admin',          'nologin bypassrls createrole'),
             ('supabase_realtime_admin', 'nologin noinherit'),
             (current_setting('shim.host'), 'login createdb createrole bypassrls')
           ) as r (name, options)
     where not exists (select from pg_catalog.pg_roles p where p.rolname = r.name)
  loop
    execute format('create role %I %s', v_role.name, v_role.options);
  end loop;

  grant anon, authenticated, service_role to authenticator;
  execute format('grant anon, authenticated, service_role to %I with admin option', current_setting('shim.host'));
  -- A project may add policies to realtime.messages; there, supautils lets it.
  execute format('grant supabase_realtime_admin to %I', current_setting('shim.host'));
  execute format('grant create on database %I to %I', current_database(), current_setting('shim.host'));
  execute format('alter database %I set search_path to "$user", public, extensions', current_database());
end;
$$;

alter role anon set statement_timeout to '3s';
alter role authenticated set statement_timeout to '8s';

-- What is made in public is open to the API's roles.
grant usage on schema public to anon, authenticated, service_role;
do $$
begin
  execute format('grant usage, create on schema public to %I', current_setting('shim.host'));
  execute format('alter default privileges for role %I in schema public grant all on tables to anon, authenticated, service_role', current_setting('shim.host'));
  execute format('alter default privileges for role %I in schema public grant all on sequences to anon, authenticated, service_role', current_setting('shim.host'));
  execute format('alter default privileges for role %I in schema public grant all on functions to anon, authenticated, service_role', current_setting('shim.host'));
end;
$$;

create schema extensions;
grant usage on schema extensions to public;

-- auth: PostgREST sets request.jwt.claims for each request's transaction.
create schema auth;
grant usage on schema auth to public;

create function auth.jwt() returns jsonb language sql stable
  return nullif(pg_catalog.current_setting('request.jwt.claims', true), '')::jsonb;

create function auth.uid() returns uuid language sql stable
  return (auth.jwt() ->> 'sub')::uuid;

create function auth.role() returns text language sql stable
  return auth.jwt() ->> 'role';

create table auth.users (
  id                uuid primary key default gen_random_uuid(),
  email             text unique,
  raw_app_meta_data jsonb not null default '{}',
  created_at        timestamptz not null default now()
);
alter table auth.users enable row level security;

-- realtime: a failed send is a warning, and the sender's transaction goes on.
create schema realtime;
grant usage on schema realtime to public;
grant create on schema realtime to supabase_realtime_admin;

create table realtime.messages (
  id          uuid not null default gen_random_uuid(),
  topic       text not null,
  extension   text not null,
  event       text,
  payload     jsonb,
  private     boolean not null default false,
  inserted_at timestamp not null default now(),
  primary key (id, inserted_at)
);
alter table realtime.messages owner to supabase_realtime_admin;
alter table realtime.messages enable row level security;
grant select, insert on realtime.messages to anon, authenticated, service_role;

create function realtime.topic() returns text language sql stable
  return nullif(pg_catalog.current_setting('realtime.topic', true), '');

create function realtime.send(payload jsonb, event text, topic text, private boolean default true)
  returns void
  language plpgsql
as $$
begin
  perform set_config('realtime.topic', send.topic, true);
  insert into realtime.messages (topic, extension, event, payload, private)
  values (send.topic, 'broadcast', send.event,
          jsonb_build_object('id', gen_random_uuid()) || send.payload, send.private);
exception
  when others then
    raise warning 'WarnSendingBroadcastMessage: %', sqlerrm;
end;
$$;

create publication supabase_realtime;

-- vault
create schema vault;
create table vault.secrets (
  id          uuid primary key default gen_random_uuid(),
  name        text unique,
  description text not null default '',
  secret      text not null,
  created_at  timestamptz not null default now()
);
create view vault.decrypted_secrets as
  select s.id, s.name, s.description, s.secret as decrypted_secret, s.created_at
    from vault.secrets s;

create function vault.create_secret(new_secret text, new_name text default null, new_description text default '')
  returns uuid
  language sql
  security definer
  set search_path to ''
as $$
  insert into vault.secrets (secret, name, description) values ($1, $2, $3) returning id
$$;
revoke all on function vault.create_secret(text, text, text) from public;

-- net (pg_net): a request is a row of the caller's transaction; a test reads the queue and writes the answers.
create schema net;
grant usage on schema net to anon, authenticated, service_role;
create unlogged table net.http_request_queue (
  id                   bigint primary key generated always as identity,
  method               text not null,
  url                  text not null,
  headers              jsonb not null,
  body                 bytea,
  timeout_milliseconds integer not null
);
create unlogged table net._http_response (
  id          bigint,
  status_code integer,
  headers     jsonb,
  content     text,
  timed_out   boolean,
  error_msg   text,
  created     timestamptz not null default now()
);

create function net.http_post(
  url                  text,
  body                 jsonb default '{}',
  params               jsonb default '{}',
  headers              jsonb default '{"Content-Type": "application/json"}',
  timeout_milliseconds integer default 5000
)
  returns bigint
  language sql
  security definer
  set search_path to pg_catalog
as $$
  insert into net.http_request_queue (method, url, headers, body, timeout_milliseconds)
  values ('POST', $1, $4, convert_to($2::text, 'UTF8'), $5)
  returning id
$$;

do $$
begin
  execute format('grant usage on schema vault to service_role, %I', current_setting('shim.host'));
  execute format('grant select, delete on vault.secrets, vault.decrypted_secrets to service_role, %I', current_setting('shim.host'));
  execute format('grant execute on function vault.create_secret to service_role, %I', current_setting('shim.host'));
  execute format('grant usage on schema net to %I', current_setting('shim.host'));
  execute format('grant select, insert, update, delete on net.http_request_queue, net._http_response to service_role, %I', current_setting('shim.host'));
  execute format('grant select, insert on realtime.messages to %I', current_setting('shim.host'));
end;
$$;

commit;
