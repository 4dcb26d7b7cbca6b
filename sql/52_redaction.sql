-- Each org's own rules of what members may not see, on top of the built-in ones. redact() itself is in extension/ and plain/.

create table nightowls.redaction_rules (
  org_id     uuid        not null,
  rules      jsonb       not null,
  updated_at timestamptz not null default clock_timestamp(),
  constraint redaction_rules_pkey primary key (org_id)
);

comment on table nightowls.redaction_rules is 'What else is a secret in an org, and what is none. Kept by set_redaction_rules.';
comment on column nightowls.redaction_rules.org_id is 'The tenant.';
comment on column nightowls.redaction_rules.rules is 'The rules, as redact() takes them.';
comment on column nightowls.redaction_rules.updated_at is 'When they were last set.';

create function nightowls._redaction_rules(org uuid)
  returns jsonb
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_bitmapscan to off
as $$
#variable_conflict use_column
begin
  return (select r.rules from nightowls.redaction_rules r where r.org_id = _redaction_rules.org);
end;
$$;

revoke all on function nightowls._redaction_rules(uuid) from public;

-- Definer: nobody else may write to the table.
create function nightowls._set_redaction_rules(org uuid, rules jsonb)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  -- Refuses rules that are not valid.
  perform nightowls.redact('null', _set_redaction_rules.rules);
  if pg_column_size(_set_redaction_rules.rules) > 65536 then
    raise exception 'rules are too large' using errcode = 'program_limit_exceeded', detail = 'They have at most 65536 bytes.';
  end if;
  perform nightowls._refuse_no_org(_set_redaction_rules.org);
  if _set_redaction_rules.rules is null then
    delete from nightowls.redaction_rules r where r.org_id = _set_redaction_rules.org;
    return;
  end if;
  insert into nightowls.redaction_rules (org_id, rules)
  values (_set_redaction_rules.org, _set_redaction_rules.rules)
  on conflict (org_id) do update set rules = excluded.rules, updated_at = clock_timestamp();
end;
$$;

revoke all on function nightowls._set_redaction_rules(uuid, jsonb) from public;

create function nightowls.set_redaction_rules(rules jsonb, org uuid default null)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform nightowls._set_redaction_rules(nightowls.current_org(set_redaction_rules.org), set_redaction_rules.rules);
end;
$$;

comment on function nightowls.set_redaction_rules(jsonb, uuid) is
  'Says what else is a secret in an org, and what is none: members see what redact(payload, rules) leaves. rules: {"keys": […], "words": […], "allow": '
  '[…]}; null: only the built-in ones; org: the tenant. Counts from the next statement on, for what was written before too. For services. Waits for who is '
  'setting the same org''s. Raises 22023 if the rules are not valid, 54000 if they are too large, NW010 if there is no org.';

revoke all on function nightowls.set_redaction_rules(jsonb, uuid) from public;

alter table nightowls.redaction_rules enable row level security;
alter table nightowls.redaction_rules force row level security;
create policy service_all on nightowls.redaction_rules
  using ((select nightowls._is_service())) with check ((select nightowls._is_service()));
