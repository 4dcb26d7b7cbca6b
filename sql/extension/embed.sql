-- What embeddings need of Rust: src/embed. sql/plain/embed.sql is its twin.

create function nightowls.slice_utf16(content text, start int default 0, stop int default null)
  returns text
  language c
  immutable
  parallel safe
as 'MODULE_PATHNAME', 'slice_utf16_wrapper';

comment on function nightowls.slice_utf16(text, int, int) is
  'The part of a text from one place up to another, counted in UTF-16 units as JavaScript''s slice(start, stop) does: negative places count from '
  'the end, null is the end. Where a place lies within a surrogate pair, the pair is left out, as half of one is no text; so the part is never longer than '
  'JavaScript''s. content: the text, null gives null; start: the first unit, null is 0; stop: the unit after the last. Neither waits nor locks.';

revoke all on function nightowls.slice_utf16(text, int, int) from public;

-- Runs one statement as the owner of a table, with the parameter $1 = arguments, and returns the first column of its first row: so the code of
-- the table's owner (expressions, triggers, casts) runs with no more rights than that owner has. Settings that it changes are put back.
create function nightowls._run_as_owner(source regclass, statement text, arguments text[])
  returns text
  language c
  volatile
  parallel unsafe
as 'MODULE_PATHNAME', 'run_as_owner_wrapper';

revoke all on function nightowls._run_as_owner(regclass, text, text[]) from public;

-- Whether this install sends requests by itself.
create function nightowls._can_http()
  returns boolean
  language c
  stable
  parallel safe
as 'MODULE_PATHNAME', 'can_http_wrapper';

revoke all on function nightowls._can_http() from public;

-- Sends a JSON array of {url, headers, body, timeout_ms} by POST, several at once, and returns one of {status, headers, body, failure} in the
-- same order. Nothing takes longer than max_ms.
create function nightowls._http_post_all(requests text, max_ms int)
  returns text
  language c
  volatile
  strict
  parallel unsafe
as 'MODULE_PATHNAME', 'http_post_all_wrapper';

revoke all on function nightowls._http_post_all(text, int) from public;

-- As _http_post_all, but commits first and holds no snapshot meanwhile; _http_answers() has the answers, once.
create procedure nightowls._http_exchange(requests text, max_ms int)
  language c
as 'MODULE_PATHNAME', 'http_exchange_wrapper';

revoke all on procedure nightowls._http_exchange(text, int) from public;

create function nightowls._http_answers()
  returns text
  language c
  volatile
  parallel unsafe
as 'MODULE_PATHNAME', 'http_answers_wrapper';

revoke all on function nightowls._http_answers() from public;
