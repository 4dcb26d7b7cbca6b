#!/usr/bin/env bash
# What can be checked without a server running.
source "$(dirname "$0")/common.sh"

"$root/scripts/setup.sh" build
cd "$root"
failed=0

check() {
  local what=$1
  shift
  say "$what"
  if "$@"; then return; fi
  printf 'failed: %s\n' "$what" >&2
  failed=$((failed + 1))
}

files() { # every file of the project that matches one of the patterns
  if git rev-parse --git-dir >/dev/null 2>&1; then
    git ls-files --cached --others --exclude-standard -- "$@" | while read -r file; do
      if [ -f "$file" ]; then printf '%s\n' "$file"; fi
    done
  else
    local pattern
    for pattern in "$@"; do find . -path ./target -prune -o -path "./$pattern" -type f -print; done
  fi | sort -u
}

# none <why> <grep arguments…>: fails, with the lines, where there is a match.
none() {
  local why=$1 found
  shift
  found=$(grep -nE "$@" /dev/null) || return 0
  printf '%s\n' "$why:" "$found" >&2
  return 1
}

# The SQL without its comments, line numbers kept.
code_of() { sed -e 's/--.*//' "$1"; }

rules_for_sql() {
  local file status=0 statement
  mapfile -t all < <(files 'sql/*.sql')
  none 'tabs' $'\t' "${all[@]}" || status=1
  none 'white space at the end of a line' ' +$' "${all[@]}" || status=1
  for file in "${all[@]}"; do
    statement=$(code_of "$file")
    if grep -nE '\b(SELECT|INSERT INTO|UPDATE|DELETE FROM|CREATE|ALTER|DROP|FROM|WHERE|RETURNS|BEGIN|END|NULL|AND)\b' \
      <<<"$(sed -e "s/'[^']*'//g" <<<"$statement")" >&2; then
      printf '%s: upper-case SQL above\n' "$file" >&2
      status=1
    fi
    case $file in
      sql/nightowls--*) continue ;; # an upgrade script may replace functions
    esac
    if grep -niE '^ *create +or +replace\b|^ *(create|alter|drop) .*\bif +(not +)?exists\b' <<<"$statement" >&2; then
      printf '%s: install files say create, never `or replace` or `if not exists`\n' "$file" >&2
      status=1
    fi
    case $file in
      sql/extension/*) continue ;; # psql never reads these
    esac
    if grep -nE '^(begin|commit|rollback)( transaction| work)?;|^\\|@extschema' <<<"$statement" >&2; then
      printf '%s: no transaction control, backslash command or @extschema@ in install files\n' "$file" >&2
      status=1
    fi
  done
  return "$status"
}

# Nothing of one machine: its paths, or the hosts it gets packages from.
portable() {
  local status=0
  mapfile -t all < <(files '*' | grep -vE '^(scripts/lint\.sh|Cargo\.lock|.*\.(png|gz|xz|svg))$')
  none 'a path of one machine' '(^|[^[:alnum:]_./-])/(work|root|home)/[[:alnum:]]' "${all[@]}" || status=1
  if grep -n '^source = ' Cargo.lock | grep -v '"registry+https://github.com/rust-lang/crates.io-index"' >&2; then
    printf 'Cargo.lock: a crate that does not come from crates.io\n' >&2
    status=1
  fi
  mapfile -t all < <(files '*package-lock.json')
  if [ ${#all[@]} -gt 0 ] && grep -n '"resolved": ' "${all[@]}" /dev/null |
    grep -v '"https://registry\.npmjs\.org/' >&2; then
    printf 'package-lock.json: a package that does not come from registry.npmjs.org\n' >&2
    status=1
  fi
  mapfile -t all < <(files '.cargo/*' '*.npmrc' '*pip.conf' '*requirements*.txt')
  if [ ${#all[@]} -gt 0 ]; then
    none 'a package registry of its own' -i 'index-url|registry *=|replace-with' "${all[@]}" || status=1
  fi
  return "$status"
}

shell_scripts() {
  if ! command -v shellcheck >/dev/null; then
    skip 'shellcheck (not installed)'
    return 0
  fi
  mapfile -t all < <(files 'scripts/*.sh' 'benches/*.sh' '.ci/run')
  shellcheck --external-sources --source-path=SCRIPTDIR --severity=warning "${all[@]}" || return 1
  mapfile -t all < <(files 'pgrx-tests/*.sh')
  shellcheck --severity=warning --shell=sh "${all[@]}"
}

pg=$("$root/scripts/server.sh" default)
PGRX_PG_CONFIG_PATH=$("$root/scripts/server.sh" pg_config "$pg")
export PGRX_PG_CONFIG_PATH

check 'format' cargo fmt --check
check 'clippy, without Postgres' cargo clippy --all-targets -- -D warnings
check "clippy, for PostgreSQL $pg" cargo clippy --all-targets --features "pg$pg" -- -D warnings
check 'Rust documentation' env RUSTDOCFLAGS='-D warnings' cargo doc --no-deps --lib --features "pg$pg"
check 'rules for SQL' rules_for_sql
check 'nothing of one machine' portable
check 'shell scripts' shell_scripts

if [ "$failed" -gt 0 ]; then
  printf '\n%s of the checks failed\n' "$failed" >&2
  exit 1
fi
say 'lint is clean'
