-- Taking secrets out of JSON, in Rust: src/redact. sql/plain/redact.sql is its twin.

create function nightowls.redact(payload jsonb, rules jsonb default null)
  returns jsonb
  language c
  immutable
  parallel safe
as 'MODULE_PATHNAME', 'redact_wrapper';

comment on function nightowls.redact(jsonb, jsonb) is
  'A payload with every secret replaced by "[redacted]", at any depth: what stands under a name such as password, token, api_key, authorization, '
  'cookie (also as name=value or name: value in a text, and as {"name": …, "value": …}), and what looks like a secret: keys of well-known services, JWTs, '
  'bearer tokens, URLs with a password, private keys. null, true and false stay. rules: {"keys": […], "words": […], "allow": […]}: further names, further looks of a '
  'word, and names that are no secrets; * stands for any text, ? for one character; in names case, - _ . and blanks do not count. Neither waits nor locks. '
  'Raises 22023 if the rules are not valid, 54000 if the payload is nested deeper than 100 levels.';

revoke all on function nightowls.redact(jsonb, jsonb) from public;
