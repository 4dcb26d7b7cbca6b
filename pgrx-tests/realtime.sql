-- Supabase's Realtime as its migrations of 2026 leave it in a project's database, as far as a broadcast from the database goes: a table
-- partitioned by day with row level security, functions that belong to supabase_realtime_admin and run with the caller's rights, and a send() that
-- turns whatever goes wrong into a warning. The server's side, which reads the table and delivers, is not here.
do $$
begin
  lock table pg_catalog.pg_authid in share row exclusive mode;
  if to_regrole('supabase_realtime_admin') is null then
    create role supabase_realtime_admin noinherit nologin;
  end if;
end;
$$;

drop schema if exists realtime cascade;
create schema realtime;

create table realtime.messages (
  topic          text not null,
  extension      text not null,
  payload        jsonb,
  event          text,
  private        boolean default false,
  updated_at     timestamp not null default now(),
  inserted_at    timestamp not null default now(),
  id             uuid not null default gen_random_uuid(),
  binary_payload bytea,
  primary key (id, inserted_at)
) partition by range (inserted_at);

create table realtime.messages_today partition of realtime.messages
  for values from (date_trunc('day', now())::timestamp - interval '1 day') to (date_trunc('day', now())::timestamp + interval '3 days');

create function realtime.topic()
  returns text
  language sql
  stable
as $$ select nullif(current_setting('realtime.topic', true), '')::text $$;

create function realtime.send(payload jsonb, event text, topic text, private boolean default true)
  returns void
  language plpgsql
as $$
declare
  new_id uuid := gen_random_uuid();
begin
  begin
    execute format('set local realtime.topic to %L', topic);
    insert into realtime.messages (id, payload, event, topic, private, extension)
    values (new_id, case when payload ? 'id' then payload else jsonb_set(payload, '{id}', to_jsonb(new_id)) end, event, topic, private, 'broadcast');
  exception when others then
    raise warning 'WarnSendingBroadcastMessage: %', sqlerrm;
  end;
end;
$$;

alter table realtime.messages enable row level security;
alter table realtime.messages owner to supabase_realtime_admin;
alter table realtime.messages_today owner to supabase_realtime_admin;
alter function realtime.topic() owner to supabase_realtime_admin;
alter function realtime.send(jsonb, text, text, boolean) owner to supabase_realtime_admin;
