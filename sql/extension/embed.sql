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
