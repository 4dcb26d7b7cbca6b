-- The view health: what every concern says of itself.

-- Keys of the configuration whose secret is not where it should be. Definer: services may not look into Vault, nor into the table of secrets.
create function nightowls._missing_secrets()
  returns text[]
  language plpgsql
  stable
  parallel safe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_missing text[];
  v_vault   text[] := '{}';
begin
  select coalesce(array_agg(e.key order by e.key) filter (where e.value ->> 'secret' = 'table' and s.key is null), '{}'),
         coalesce(array_agg('nightowls/' || c.org_id || '/' || e.key order by e.key) filter (where e.value ->> 'secret' = 'vault'), '{}')
    into v_missing, v_vault
    from nightowls.app_config c
   cross join lateral jsonb_each(c.config) e
    left join nightowls._config_secrets s on s.org_id = c.org_id and s.key = e.key
   where jsonb_typeof(e.value) = 'object';
  if v_vault <> '{}' and nightowls._has_vault() then
    execute format('select coalesce(array_agg(u.name), ''{}'') from unnest($1) as u (name)
                     where not exists (select from %s d where d.name = u.name)', to_regclass('vault.decrypted_secrets'))
       into v_vault using v_vault;
  end if;
  return v_missing || array(select regexp_replace(u.name, '^nightowls/[^/]*/', '') from unnest(v_vault) as u (name));
end;
$$;

revoke all on function nightowls._missing_secrets() from public;

create function nightowls._health_config()
  returns setof nightowls._check
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_missing text[] := nightowls._missing_secrets();
  v_org     text := (
    select s.value #>> '{}'
      from nightowls.settings s
     where s.name = 'default_org' and not exists (select from nightowls.orgs o where o.org_id::text = s.value #>> '{}'));
begin
  return query
    select 'config', 'secrets', v_missing = '{}',
           case when v_missing = '{}' then 'no secret is missing' else array_to_string(v_missing[:20], ', ') end,
           case when v_missing <> '{}'
                then 'Vault, or the table of secrets, does not have them (any more): set_config_value(key, value, secret => true).' end
     union all
    select 'config', 'default_org', v_org is null, coalesce('org ' || v_org || ' does not exist', 'it exists, or none is set'),
           case when v_org is not null then 'Calls that name no org fail: set_default_org(org).' end
     union all
    select 'cdc', 'publication', not b.broken, case when b.broken then 'nightowls_events does not have the log, as after a restore' else 'whole, or not made' end,
           case when b.broken then 'Subscribers get nothing: select nightowls.enable_cdc() as the owner, or disable_cdc() if nobody subscribes.' end
      from nightowls._is_cdc_broken() as b (broken);
end;
$$;

revoke all on function nightowls._health_config() from public;

create function nightowls._health_projections()
  returns setof nightowls._check
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_late    text;
  v_refused text;
begin
  select string_agg(format('%s: %s', p.name, coalesce('last refreshed ' || p.refreshed_at, 'never refreshed')), ', ' order by p.name) into v_late
    from nightowls.projections p
   where p.kind = 'view' and coalesce(p.refreshed_at, p.created_at) + 3 * p.refresh_every < clock_timestamp() - interval '10 minutes';
  select max(format('%s %s: %s', c.aggregate_type, c.aggregate_id, c.refused)) || case when count(*) > 1 then format(', and %s more', count(*) - 1) else '' end
    into v_refused
    from nightowls.compactions c
   where c.refused is not null;
  return query
    select 'projections', 'views', v_late is null, coalesce(v_late, 'none is long overdue'),
           case when v_late is not null
                then 'They show what was true then. Does the clock run, and does refresh_projection(name) go through? Else give them a longer refresh_every.' end
     union all
    select 'projections', 'compaction', v_refused is null, coalesce(v_refused, 'no aggregate is refused'),
           case when v_refused is not null
                then 'It stays as it is. compact_aggregate says why and what to do first; view progress has them all.' end;
end;
$$;

revoke all on function nightowls._health_projections() from public;

create function nightowls._health_floors()
  returns setof nightowls._check
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_long text;
begin
  select string_agg(format('%s: %s since %s, %s waiting', f.container, f.holder, f.granted_at, f.waiting), ', ' order by f.container) into v_long
    from nightowls.floor_status f
   where f.status = 'held' and f.granted_at < clock_timestamp() - interval '1 hour' and f.waiting > 0;
  return query
    select 'floors', 'held_long', v_long is null, coalesce(v_long, 'nobody waits behind a holder of an hour'),
           case when v_long is not null
                then 'The holder keeps beating. If it should not: release_floor(container, holder, fence) for it, and give max_total_ms when requesting.' end;
end;
$$;

revoke all on function nightowls._health_floors() from public;

-- What other concerns say of themselves, where they are there.
create function nightowls._health_others()
  returns setof nightowls._check
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_function text;
begin
  foreach v_function in array array['_health_dispatch', '_health_embeddings', '_health_realtime'] loop
    if to_regprocedure(format('nightowls.%I()', v_function)) is not null then
      return query execute format('select c.concern, c.name, c.ok, c.value, c.hint from nightowls.%I() c', v_function);
    end if;
  end loop;
end;
$$;

revoke all on function nightowls._health_others() from public;

create view nightowls.health
  with (security_invoker = true)
as
  select c.concern, c.name, c.ok, c.value, c.hint from nightowls._health_log() c
   union all
  select c.concern, c.name, c.ok, c.value, c.hint from nightowls._health_consumers() c
   union all
  select c.concern, c.name, c.ok, c.value, c.hint from nightowls._health_projections() c
   union all
  select c.concern, c.name, c.ok, c.value, c.hint from nightowls._health_queues() c
   union all
  select c.concern, c.name, c.ok, c.value, c.hint from nightowls._health_floors() c
   union all
  select c.concern, c.name, c.ok, c.value, c.hint from nightowls._health_others() c
   union all
  select c.concern, c.name, c.ok, c.value, c.hint from nightowls._health_config() c
   union all
  select c.concern, c.name, c.ok, c.value, c.hint from nightowls._health_clock() c;

comment on view nightowls.health is
  'One row for each check: whether all is well, what was found, and what to do; docs/operations.md has more on each. It looks at all orgs. Other sessions '
  'are seen by those who may see them: superusers and members of pg_monitor.';
comment on column nightowls.health.concern is 'What it is about: log, consumers, projections, queues, floors, dispatch, embeddings, config, cdc, clock.';
comment on column nightowls.health.name is 'The check.';
comment on column nightowls.health.ok is 'Whether all is well.';
comment on column nightowls.health.value is 'What was found.';
comment on column nightowls.health.hint is 'What it means and what to do; null when all is well.';
