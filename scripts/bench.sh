#!/usr/bin/env bash
# Measures nightowls on a throwaway server, each thing beside something to compare it with, and writes it into benches/README.md.
# usage: [QUICK=1] [PART='append fold'] scripts/bench.sh
#
# A part is a file benches/<part>.sh; PART chooses, else all run. QUICK=1 takes short rounds and never replaces the figures of a
# full run. What is compared takes turns in short rounds, so that a slow minute of the machine hits all of it: trust the ratios.
#
# To add a part, add benches/<part>.sh. It is sourced and defines bench_<part>, which
#   - says its title with `title`, and what a reader must know with `out`;
#   - has databases `extension` and `plain` of its own, with what benches/prepare.sql puts into them, and makes further ones with
#     new_database; settings that need a new start are set with restart_server. All of that is gone after the part;
#   - names what takes turns with candidate, runs it with group and prints it with table; or measures by itself, and says
#     judge <what> <figure> <shown> <bar> <bar shown> (under a bar that is a limit: judge_at_most) and out <line of Markdown>…
# Functions and variables of a part begin with its name, so that parts do not meet.
source "$(dirname "$0")/common.sh"

if [ -n "${QUICK:-}" ]; then
  mode=quick rounds=3 length=1
else
  mode=full rounds=5 length=3
fi

source "$root/scripts/bench/server.sh"
source "$root/scripts/bench/figures.sh"
source "$root/scripts/bench/page.sh"

mapfile -t all_parts < <(cd "$root/benches" && for file in *.sh; do printf '%s\n' "${file%.sh}"; done)
read -ra parts <<<"${PART:-${all_parts[*]}}"
for part in "${parts[@]}"; do
  [ -e "$root/benches/$part.sh" ] || die "no part \"$part\"; there are: ${all_parts[*]}"
done

started=$SECONDS
busy_before=$(processor_in_use)
warn_if_busy "$busy_before"
stage 'set-up'
"$root/scripts/setup.sh" bench
bin=$("$root/scripts/server.sh" tree)
psql=$bin/psql
"$psql" --version >/dev/null 2>&1 || psql=$(command -v psql) || die 'no psql found'
[ -x "$bin/pgbench" ] || die "no pgbench in $bin"
make_folder
trap remove_server EXIT
trap 'exit 130' INT TERM
export PGHOST=$socket PGPORT=$port PGUSER=postgres PGCLIENTENCODING=UTF8
unset PGDATABASE PGSERVICE PGHOSTADDR PGPASSWORD PGOPTIONS PGSSLMODE PGAPPNAME
start_server
make_templates

for part in "${parts[@]}"; do
  # shellcheck source=/dev/null
  source "$root/benches/$part.sh"
  begin_part
  "bench_$part"
  end_part
done

stage 'the bars'
cat "$home"/results/*.bars | sed -E 's/^\| //; s/ \|$//' | awk -F ' \\| ' '{printf "    %-72s %-24s %-10s %s\n", $1, $2, $3, $4}'
write_page
note "all of it in $(elapsed) minutes"
