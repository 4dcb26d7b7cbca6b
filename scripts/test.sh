#!/usr/bin/env bash
# Everything that is tested: Rust units, then the suite (both installs, directly
# and through PgBouncer) on each PostgreSQL, then pgrx's own packaging.
# usage: [PG="15 17 18"] scripts/test.sh [<filter for the suite>]
#
# The last line is the sum: `N passed, N failed, N skipped`.
source "$(dirname "$0")/common.sh"

cd "$root"
start=$SECONDS
logs=$target/test-logs
rm -rf "$logs"
mkdir -p "$logs"
passed=0 failed=0 skipped=0
limit=1800 # seconds that a stage may take
servers=() failures=() skips=()
export RUST_BACKTRACE=0
# Two at least: a lone test prints its name before its output, in one line.
export RUST_TEST_THREADS=${RUST_TEST_THREADS:-$(($(nproc) > 1 ? $(nproc) : 2))}

elapsed() { printf '%d:%02d' $(((SECONDS - start) / 60)) $(((SECONDS - start) % 60)); }

stage() { say "[$(elapsed)] $*"; }

# leave_out <what>: a part of all this that cannot be done here.
leave_out() {
  skip "$1"
  skips+=("$1")
  skipped=$((skipped + 1))
}

# count <log> <file of skips>: adds up what the runs of libtest in a log say. A
# test that said `skip` did not fail, but it does not count as passed.
count() {
  local log=$1 skipping=$2 passing gone
  passing=$(grep -c '^test .* \.\.\. ok$' "$log") || true
  gone=0
  if [ -s "$skipping" ]; then
    gone=$(cut -f 1 "$skipping" | sort -u | grep -cxFf <(sed -n 's/^test \(.*\) \.\.\. ok$/\1/p' "$log")) || true
    while IFS= read -r reason; do skips+=("$reason"); done < <(sort -u "$skipping" | cut -f 2- | sort | uniq -c |
      sed -E 's/^ *([0-9]+) (.*)/\2 (in \1 tests)/; s/\(in 1 tests\)/(in 1 test)/')
  fi
  passed=$((passed + passing - gone))
  failed=$((failed + $(grep -c '^test .* \.\.\. FAILED$' "$log" || true)))
  skipped=$((skipped + gone + $(grep -c '^test .* \.\.\. ignored' "$log" || true)))
}

# run <name> <command…>: shows its output and counts its tests. What fails
# before or beside them (a build, a time-out) is one failure of its own.
run() {
  local name=$1 log before=$failed status=0 running
  shift
  log=$logs/${name//[^[:alnum:]]/-}.log
  export NIGHTOWLS_SKIPS=$log.skips
  : >"$NIGHTOWLS_SKIPS"
  # The longest stage takes minutes: what takes this long hangs, and is stopped with all that it started. Its output goes to a
  # file, not through a pipe, which a process that it leaves behind would keep open.
  timeout -k 10 "$limit" "$@" >"$log" 2>&1 </dev/null &
  running=$!
  trap 'kill "$running"; exit 130' INT TERM
  tail -n +1 -s 0.2 -f --pid="$running" "$log" | grep --line-buffered -vE '^(running [0-9]+ tests?|)$' || true
  wait "$running" || status=$?
  trap - INT TERM
  unset NIGHTOWLS_SKIPS
  count "$log" "$log.skips"
  if [ "$status" != 0 ]; then
    if [ "$status" = 124 ]; then name="$name, stopped after $((limit / 60)) minutes"; fi
    failures+=("$name (its log: ${log#"$root"/})")
    if [ "$failed" = "$before" ]; then failed=$((failed + 1)); fi
  fi
  return 0
}

stage 'set-up'
scripts/setup.sh test

first=$(scripts/server.sh default)
if [ -n "${PG:-}" ]; then
  wanted=$PG
else
  wanted=$first
  if [ "$first" = 17 ] || scripts/server.sh pg_config 17 >/dev/null; then
    [ "$first" = 17 ] || wanted="$wanted 17"
  else
    leave_out 'PostgreSQL 17 (no pg_config of it here)'
  fi
fi

stage 'Rust units, without Postgres'
run 'units' cargo test --lib --bins -- --format pretty
# What no other server changes: the clients' libraries and tools, and the longest stresses. The first server has had them.
again=(--skip orm:: --skip supabase:: --skip readme:: --skip floor_history:: --skip queue_stress:: --skip the_worked_example)
if [ $# -gt 0 ] || [ "${wanted#* }" = "$wanted" ]; then again=(); fi

for major in $wanted; do
  fewer=()
  stage "PostgreSQL $major"
  if [ "$major" != "${wanted%% *}" ] && [ ${#again[@]} -gt 0 ]; then
    fewer=("${again[@]}")
    note "without what PostgreSQL ${wanted%% *} has had and no other server changes; all of it: make test PG=$major"
  fi
  if ! bin=$(scripts/server.sh tree "$major"); then
    failed=$((failed + 1))
    failures+=("PostgreSQL $major: no server with nightowls")
    continue
  fi
  servers+=("$("$bin/postgres" --version | sed 's/^postgres (PostgreSQL) //')")
  run "suite on $major" env "NIGHTOWLS_SERVER=$bin" cargo test --test suite -- --format pretty "${fewer[@]}" "$@"
done

if cargo pgrx --version >/dev/null 2>&1 || [ "${CI:-}" = true ]; then
  stage 'packaging with cargo-pgrx'
  run 'packaging' env "PG=$first" scripts/test-package.sh "$logs/package"
else
  leave_out 'cargo pgrx package (cargo-pgrx is not installed)'
fi

stage 'the demo'
run 'demo' scripts/test-demo.sh "$target/demo-test"

version_of() { # <program>: its version in a word, or nothing
  PATH=$PATH:/usr/sbin "$1" --version 2>/dev/null | grep -oE '[0-9]+(\.[0-9]+)+' | head -n 1
}
{
  printf '\nran for %s on %s, %s cores\n' "$(elapsed)" "$(. /etc/os-release && echo "$PRETTY_NAME")" "$(nproc)"
  printf '  servers   PostgreSQL %s\n' "$(IFS=,; echo "${servers[*]:-none}" | sed 's/,/, /g')"
  printf '  installs  extension (library), plain (migrations, owner is no superuser)\n'
  printf '  routes    direct%s\n' "$([ -z "$(version_of pgbouncer)" ] || echo ', PgBouncer in transaction mode')"
  printf '  tools     rustc %s' "$(version_of rustc)"
  for tool in pgbouncer node npm python3; do
    found=$(version_of "$tool") || true
    if [ -n "$found" ]; then printf ', %s %s' "$tool" "$found"; fi
  done
  printf '\n'
  if [ ${#skips[@]} -gt 0 ]; then
    printf '%s\n' "${skips[@]}" | sort | uniq -c | sed -E 's/^ *[0-9]+ /  skipped   /'
  fi
  if [ ${#failures[@]} -gt 0 ]; then printf '  failed    %s\n' "${failures[@]}"; fi
  sed -n 's/^test \(.*\) \.\.\. FAILED$/\1/p' "$logs"/*.log | sort | uniq -c | sed -E 's/^ *([0-9]+) (.*)/  failed    \2 (\1 times)/; s/\(1 times\)/(once)/'
} 2>/dev/null
printf '%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
[ "$failed" = 0 ]
