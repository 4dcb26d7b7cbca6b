-- What several concerns share: errors in the same words, and a row of health.

-- How many single characters must be put in, taken out or exchanged to make one word of another (Levenshtein).
create function nightowls._distance(one text, other text)
  returns int
  language plpgsql
  immutable
  strict
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_row  int[] := array(select generate_series(0, length(_distance.other)));
  v_next int[];
begin
  for i in 1 .. length(_distance.one) loop
    v_next := array[i];
    for j in 1 .. length(_distance.other) loop
      v_next[j + 1] := least(
        v_next[j] + 1, v_row[j + 1] + 1,
        v_row[j] + (substr(_distance.one, i, 1) <> substr(_distance.other, j, 1))::int);
    end loop;
    v_row := v_next;
  end loop;
  return v_row[length(_distance.other) + 1];
end;
$$;

revoke all on function nightowls._distance(text, text) from public;

-- what: the kind of thing, such as projection; candidates: the names there are, of which at most 100 are compared; otherwise:
-- the hint when no name is near, by default that create_<what>() makes one.
create function nightowls._refuse_unknown(what text, name text, candidates text[], otherwise text default null)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_near text;
begin
  if _refuse_unknown.name is null then
    raise exception '% must not be null', _refuse_unknown.what using errcode = 'null_value_not_allowed';
  end if;
  select c.name into v_near
    from unnest(_refuse_unknown.candidates[1:100]) as c (name)
   where nightowls._distance(lower(left(c.name, 64)), lower(left(_refuse_unknown.name, 64))) <= 1 + length(_refuse_unknown.name) / 4
   order by nightowls._distance(lower(left(c.name, 64)), lower(left(_refuse_unknown.name, 64))), c.name
   limit 1;
  raise exception '% "%" does not exist', _refuse_unknown.what, left(_refuse_unknown.name, 64)
    using errcode = 'NW007',
          hint = case when v_near is not null then format('Did you mean "%s"?', v_near)
                      else coalesce(_refuse_unknown.otherwise, format('Make it with nightowls.create_%s().', _refuse_unknown.what)) end;
end;
$$;

revoke all on function nightowls._refuse_unknown(text, text, text[], text) from public;

-- A row of the view health: what a concern says of itself, hint null when all is well.
create type nightowls._check as (
  concern text,
  name    text,
  ok      boolean,
  value   text,
  hint    text
);
