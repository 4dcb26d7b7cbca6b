-- The twin of src/embed.

create function nightowls.slice_utf16(content text, start int default 0, stop int default null)
  returns text
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_wide   constant text := '[\U00010000-\U0010FFFF]';
  v_filler constant text := chr(1);
  v_text   text := slice_utf16.content;
  v_length bigint;
  v_from   bigint;
  v_to     bigint;
  v_is_wide boolean;
begin
  if v_text is null then
    return null;
  end if;
  -- Two units each: then a unit is a character. No other filler follows a wide character, but its own.
  v_is_wide := getdatabaseencoding() = 'UTF8' and v_text ~ v_wide;
  if v_is_wide then
    v_text := regexp_replace(v_text, '(' || v_wide || ')', '\1' || v_filler, 'g');
  end if;
  v_length := length(v_text);
  v_from := coalesce(slice_utf16.start, 0);
  v_from := least(case when v_from < 0 then greatest(v_length + v_from, 0) else v_from end, v_length);
  v_to := coalesce(slice_utf16.stop, v_length);
  v_to := least(case when v_to < 0 then greatest(v_length + v_to, 0) else v_to end, v_length);
  if v_to <= v_from then
    return '';
  elsif not v_is_wide then
    return substr(v_text, v_from::int + 1, (v_to - v_from)::int);
  end if;
  if substr(v_text, v_from::int, 1) ~ v_wide and v_from > 0 then
    v_from := v_from + 1;
  end if;
  if substr(v_text, v_to::int, 1) ~ v_wide then
    v_to := v_to - 1;
  end if;
  if v_to <= v_from then
    return '';
  end if;
  return regexp_replace(substr(v_text, v_from::int + 1, (v_to - v_from)::int), '(' || v_wide || ')' || v_filler, '\1', 'g');
end;
$$;

comment on function nightowls.slice_utf16(text, int, int) is
  'The part of a text from one place up to another, counted in UTF-16 units as JavaScript''s slice(start, stop) does: negative places count from '
  'the end, null is the end. Where a place lies within a surrogate pair, the pair is left out, as half of one is no text; so the part is never longer than '
  'JavaScript''s. content: the text, null gives null; start: the first unit, null is 0; stop: the unit after the last. Neither waits nor locks.';

revoke all on function nightowls.slice_utf16(text, int, int) from public;

-- Runs one statement as the owner of a table, with the parameter $1 = arguments, and returns the first column of its first row. PL/pgSQL cannot take
-- another role's rights away from what it calls, so only the owner of a table who could become the owner of nightowls is served.
create function nightowls._run_as_owner(source regclass, statement text, arguments text[])
  returns text
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_cursor refcursor;
  v_owner  oid;
  v_answer text;
begin
  select c.relowner into v_owner from pg_class c where c.oid = _run_as_owner.source;
  if not found then
    raise exception 'table % does not exist', _run_as_owner.source using errcode = 'undefined_table';
  elsif not pg_has_role(v_owner, current_user, 'member') then
    raise exception 'table % belongs to another role', _run_as_owner.source
      using errcode = 'insufficient_privilege',
            detail = format('Its triggers would run with the rights of "%s".', current_user),
            hint = format('alter table %s owner to %I, or install nightowls as an extension.', _run_as_owner.source, current_user);
  end if;
  open v_cursor for execute _run_as_owner.statement using _run_as_owner.arguments;
  fetch v_cursor into v_answer;
  close v_cursor;
  return v_answer;
end;
$$;

revoke all on function nightowls._run_as_owner(regclass, text, text[]) from public;

-- SQL sends nothing by itself: pg_net does, where it is.
create function nightowls._can_http()
  returns boolean
  language sql
  stable
  parallel safe
  return false;

revoke all on function nightowls._can_http() from public;

create function nightowls._refuse_http()
  returns text
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  raise exception 'this install cannot send requests'
    using errcode = 'feature_not_supported', hint = 'Install nightowls as an extension, or pg_net; or let a worker claim_embeddings and save_embedding.';
end;
$$;

revoke all on function nightowls._refuse_http() from public;

create function nightowls._http_post_all(requests text, max_ms int)
  returns text
  language sql
  volatile
  strict
  parallel unsafe
  return nightowls._refuse_http();

revoke all on function nightowls._http_post_all(text, int) from public;

create procedure nightowls._http_exchange(requests text, max_ms int)
  language sql
begin atomic
  select nightowls._refuse_http();
end;

revoke all on procedure nightowls._http_exchange(text, int) from public;

create function nightowls._http_answers()
  returns text
  language sql
  volatile
  parallel unsafe
  return nightowls._refuse_http();

revoke all on function nightowls._http_answers() from public;
