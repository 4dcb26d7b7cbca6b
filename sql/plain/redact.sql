-- The twin of src/redact: the same secrets, in PL/pgSQL.

-- A pattern of ours as LIKE has it.
create function nightowls._like_pattern(pattern text)
  returns text
  language sql
  immutable
  strict
  parallel safe
  return translate(replace(replace(replace(pattern, '\', '\\'), '%', '\%'), '_', '\_'), '*?', '%_');

revoke all on function nightowls._like_pattern(text) from public;

-- A name as it is compared: in lower case, of ASCII, without what separates its parts.
create function nightowls._plain_name(name text)
  returns text
  language sql
  immutable
  strict
  parallel safe
  return translate(lower(name collate "C"), '-_. ', '');

revoke all on function nightowls._plain_name(text) from public;

create function nightowls._is_secret_name(name text, names text[], allowed text[])
  returns boolean
  language sql
  immutable
  parallel safe
  return coalesce(
    nightowls._plain_name(name) collate "C" like any (names) and not nightowls._plain_name(name) collate "C" like any (allowed), false);

revoke all on function nightowls._is_secret_name(text, text[], text[]) from public;

create function nightowls._redact_text(content text, names text[], words text[], allowed text[])
  returns text
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_part   record;
  v_out    text;
  v_before text := '';
  v_scheme text;
begin
  if strpos(_redact_text.content, '-----BEGIN') > 0 and strpos(_redact_text.content, 'PRIVATE KEY-----') > 0 then
    return '[redacted]';
  end if;
  v_out := substring(_redact_text.content from $re$^[ \t\n\r"'`,;()\[\]{}<>&=|?]*$re$);
  for v_part in
    select m[1] as word, m[2] as after
      from regexp_matches(_redact_text.content,
                          $re$([^ \t\n\r"'`,;()\[\]{}<>&=|?]+)([ \t\n\r"'`,;()\[\]{}<>&=|?]*)$re$, 'g') as m
  loop
    v_scheme := lower(v_part.word collate "C");
    v_scheme := case when v_scheme in ('bearer', 'basic') then v_scheme else '' end;
    if v_part.word <> 'redacted'
       and (v_before = 'bearer' and octet_length(convert_to(v_part.word, 'UTF8')) >= 5
            or v_before = 'basic' and octet_length(convert_to(v_part.word, 'UTF8')) >= 8 and v_part.word collate "C" ~ '[0-9A-Z]'
            or v_before = 'name' and v_scheme = ''
            or v_part.word collate "C" like any (_redact_text.words)) then
      v_out := v_out || '[redacted]' || v_part.after;
    else
      v_out := v_out || v_part.word || v_part.after;
    end if;
    v_before := case
      when v_scheme <> '' then v_scheme
      when (starts_with(v_part.after, '=') or right(v_part.word, 1) = ':')
           and nightowls._is_secret_name(rtrim(v_part.word, ':'), _redact_text.names, _redact_text.allowed) then 'name'
      else '' end;
  end loop;
  return v_out;
end;
$$;

revoke all on function nightowls._redact_text(text, text[], text[], text[]) from public;

create function nightowls._redact_value(value jsonb, names text[], words text[], allowed text[])
  returns jsonb
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_pair boolean;
begin
  case jsonb_typeof(_redact_value.value)
    when 'string' then
      return to_jsonb(nightowls._redact_text(_redact_value.value #>> '{}', _redact_value.names, _redact_value.words, _redact_value.allowed));
    when 'array' then
      return (select coalesce(jsonb_agg(nightowls._redact_value(e.value, _redact_value.names, _redact_value.words, _redact_value.allowed) order by e.no), '[]')
                from jsonb_array_elements(_redact_value.value) with ordinality as e (value, no));
    when 'object' then
      v_pair := jsonb_typeof(_redact_value.value -> 'name') = 'string'
                and nightowls._is_secret_name(_redact_value.value ->> 'name', _redact_value.names, _redact_value.allowed)
             or jsonb_typeof(_redact_value.value -> 'key') = 'string'
                and nightowls._is_secret_name(_redact_value.value ->> 'key', _redact_value.names, _redact_value.allowed);
      return (select coalesce(jsonb_object_agg(m.key, case
                       when jsonb_typeof(m.value) not in ('null', 'boolean')
                            and (nightowls._is_secret_name(m.key, _redact_value.names, _redact_value.allowed)
                                 or coalesce(v_pair, false) and m.key = 'value') then '"[redacted]"'
                       else nightowls._redact_value(m.value, _redact_value.names, _redact_value.words, _redact_value.allowed) end), '{}')
                from jsonb_each(_redact_value.value) as m (key, value));
    else
      return _redact_value.value;
  end case;
end;
$$;

revoke all on function nightowls._redact_value(jsonb, text[], text[], text[]) from public;

create function nightowls.redact(payload jsonb, rules jsonb default null)
  returns jsonb
  language plpgsql
  immutable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_names   text[] := '{%password,%passwords,%passwd,%pwd,%passphrase,%secret,%secrets,%token,%apikey,%apikeys,%privatekey,%secretkey,%accesskey,'
                      '%accesskeyid,%signingkey,%encryptionkey,%authorization,%cookie,%cookies,%credential,%credentials}';
  v_words   text[] := array['sk-________________%', 'sk\_live\_%', 'sk\_test\_%', 'rk\_live\_%', 'rk\_test\_%', 'whsec\_%', 'ghp\_%',
                            'gho\_%', 'ghu\_%', 'ghs\_%', 'ghr\_%', 'github\_pat\_%', 'glpat-%', 'xox_-%', 'AKIA________________',
                            'ASIA________________', 'AIza____________________%', 'eyJ%.eyJ%.%', 'sbp\_________________%',
                            'sb\_secret\_%', 'npm\_____________________%', 'hf\_____________________%', '%://%:%@%'];
  v_allowed text[] := '{}';
  v_text    text;
begin
  if redact.rules is not null then
    if jsonb_typeof(redact.rules) <> 'object' or redact.rules - '{keys,words,allow}'::text[] <> '{}'
       or jsonb_path_exists(redact.rules, 'strict $.* ? (@.type() != "array")')
       or jsonb_path_exists(redact.rules, 'strict $.*[*] ? (@.type() != "string" || @ == "")', silent => true) then
      raise exception 'rules are not valid'
        using errcode = 'invalid_parameter_value',
              hint = 'Rules are {"keys": [text, …], "words": [text, …], "allow": [text, …]}; all keys are optional, no text is empty.';
    end if;
    v_names := v_names || array(select nightowls._like_pattern(nightowls._plain_name(k)) from jsonb_array_elements_text(redact.rules -> 'keys') k);
    v_words := v_words || array(select nightowls._like_pattern(w) from jsonb_array_elements_text(redact.rules -> 'words') w);
    v_allowed := array(select nightowls._like_pattern(nightowls._plain_name(a)) from jsonb_array_elements_text(redact.rules -> 'allow') a);
  end if;
  if redact.payload is null then
    return null;
  end if;
  v_text := redact.payload::text;
  if length(v_text) > 100 and jsonb_path_exists(redact.payload, 'strict $.**{101}') then
    raise exception 'payload is nested too deeply'
      using errcode = 'program_limit_exceeded', detail = 'At most 100 levels of objects and arrays are redacted.';
  end if;
  -- Most payloads hold nothing that even resembles a secret: one look at the whole is a tenth of a walk.
  if redact.rules is null
     and translate(lower(v_text collate "C"), '-_. ', '')
         !~ '(passw|pwd|passphrase|secret|token|apikey|privatekey|accesskey|signingkey|encryptionkey|authorization|cookie|credential|bearer|basic)'
     and v_text collate "C"
         !~ '(sk-|[sr]k_live_|[sr]k_test_|whsec_|gh[opusr]_|github_pat_|glpat-|xox|AKIA|ASIA|AIza|eyJ|sbp_|npm_|hf_|://)' then
    return redact.payload;
  end if;
  return nightowls._redact_value(redact.payload, v_names, v_words, v_allowed);
end;
$$;
comment on function nightowls.redact(jsonb, jsonb) is
  'A payload with every secret replaced by "[redacted]", at any depth: what stands under a name such as password, token, api_key, authorization, '
  'cookie (also as name=value or name: value in a text, and as {"name": …, "value": …}), and what looks like a secret: keys of well-known services, JWTs, '
  'bearer tokens, URLs with a password, private keys. null, true and false stay. rules: {"keys": […], "words": […], "allow": […]}: further names, further looks of a '
  'word, and names that are no secrets; * stands for any text, ? for one character; in names case, - _ . and blanks do not count. Neither waits nor locks. '
  'Raises 22023 if the rules are not valid, 54000 if the payload is nested deeper than 100 levels.';

revoke all on function nightowls.redact(jsonb, jsonb) from public;
