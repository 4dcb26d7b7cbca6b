create function nightowls.migration_files()
  returns table (version text, name text, sql text)
  language c
  immutable
  strict
  parallel safe
as 'MODULE_PATHNAME', 'migration_files_wrapper';

comment on function nightowls.migration_files() is
  'Returns the plain install as migrations, one row a file, in the order in which they must be applied: the version, '
  'the name without its number, and the text. '
  'Waits for nothing and locks nothing. '
  'Only in the extension.';

revoke all on function nightowls.migration_files() from public;
