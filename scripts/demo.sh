#!/usr/bin/env bash
# The tour: a throwaway server in .demo/, the git history of a repository as events, and the proof against git.
# usage: [REPO=path] [PROOFS=3] scripts/demo.sh
#
# REPO    the repository to read, by default this one; its HEAD and first parents are what counts
# PROOFS  how many earlier commits are compared with git
#
# A second run takes in what is new only. scripts/demo-clean.sh removes all of it.
source "$(dirname "$0")/common.sh"
source "$(dirname "$0")/demo-server.sh"
source "$(dirname "$0")/demo-floors.sh"
source "$(dirname "$0")/demo-swarm.sh"

started=$SECONDS
proofs=${PROOFS:-3}
[[ $proofs =~ ^[0-9]{1,6}$ ]] || die "PROOFS must be a number, not \"$proofs\""

if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then
  bold=$'\e[1m' dim=$'\e[2m' green=$'\e[32m' red=$'\e[31m' off=$'\e[0m'
else
  bold='' dim='' green='' red='' off=''
fi
[ -t 1 ] && live=yes || live=
if [ "$(locale charmap 2>/dev/null)" = UTF-8 ]; then
  bar=█ lines=unicode
else
  bar='#' lines=ascii
fi

title() { printf '\n%s%s%s\n' "$bold" "$*" "$off"; }
line() { printf '  %s\n' "$*"; }
commas() { sed -E ':a; s/^([0-9]+)([0-9]{3})/\1,\2/; ta' <<<"$1"; }
seconds() { printf '%d.%d' $(($1 / 1000)) $(($1 % 1000 / 100)); }
now() { date +%s%3N; }

# --- the repository ------------------------------------------------------------------------------

# The git of a hook that runs this must not lead us elsewhere.
unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_OBJECT_DIRECTORY GIT_COMMON_DIR GIT_PREFIX GIT_NAMESPACE

# The configuration of whoever runs this is left out, so that it changes nothing; a repository of another user may be
# read, as nothing in it is run. Paths with unusual bytes come quoted as in C, always.
read_git() {
  GIT_CONFIG_GLOBAL=$home/gitconfig GIT_CONFIG_NOSYSTEM=1 GIT_OPTIONAL_LOCKS=0 \
    git -c core.quotePath=true -C "$repo" "$@"
}

find_repository() {
  printf '[safe]\n\tdirectory = *\n' >"$home/gitconfig"
  if [ -n "${REPO:-}" ]; then
    [ -d "$REPO" ] || die "REPO=$REPO is not a folder; clone the repository first"
    repo=$(cd "$REPO" && pwd)
    read_git rev-parse --git-dir >/dev/null || die "REPO=$REPO is not a git repository that can be read"
    read_git rev-parse --quiet --verify 'HEAD^{commit}' >/dev/null || die "REPO=$REPO has no commits yet"
    repo=$(read_git rev-parse --show-toplevel 2>/dev/null || printf '%s\n' "$repo")
    about=$repo
  else
    repo=$(cd "$root" && pwd -P)
    about="this repository"
    if [ "$(read_git rev-parse --show-toplevel 2>/dev/null)" != "$repo" ] ||
      ! read_git rev-parse --quiet --verify 'HEAD^{commit}' >/dev/null; then
      repo=$home/recorded.git
      about="a small recorded history (there is no git history here; REPO=path names one)"
      rm -rf "$repo"
      git init --quiet --bare --initial-branch=main "$repo"
      read_git fast-import --quiet <"$root/demo/recorded.fi"
    fi
  fi
  head=$(read_git rev-parse 'HEAD^{commit}')
  # The main line: each commit with its first parent, oldest first.
  read_git rev-list --first-parent --reverse --parents "$head" | cut -d ' ' -f 1,2 >"$home/chain"
  commits=$(wc -l <"$home/chain")
  if [ "$(read_git rev-parse --is-shallow-repository)" = true ]; then
    about="$about (a shallow clone: its oldest commit adds all the files there were)"
  fi
}

# The database for a repository: demo, or demo_<name of its folder>.
database_for() {
  if [ "$repo" = "$(cd "$root" && pwd -P)" ] || [ "$repo" = "$home/recorded.git" ]; then
    printf 'demo\n'
    return
  fi
  local name
  name=$(basename "$repo" .git | LC_ALL=C sed 's/.*/\L&/; s/[^a-z0-9]/_/g' | cut -c 1-40)
  printf 'demo_%s\n' "$name"
}

commit_at() { sed -n "$1p" "$home/chain" | cut -d ' ' -f 1; }

# --- the database --------------------------------------------------------------------------------

sql() { "$psql" -X -q -v ON_ERROR_STOP=1 -d "$database" "$@"; }
value() { sql -At -c "$1"; }

# What the database was made with: it is made anew when the extension or the demo has changed.
made_with() {
  cat "$bin/postgres" "$("$bin/pg_config" --pkglibdir)/nightowls.so" \
    "$("$bin/pg_config" --sharedir)"/extension/nightowls* "$root"/demo/{history,long}.sql | sha256sum | cut -c 1-16
}

make_database() {
  local why='' known=0 last strangers
  strangers="select exists (
    select from nightowls.events e
     where e.aggregate_type in ('file', 'author')
       and not exists (select from demo.commits c where c.commit = e.payload ->> 'commit'))"
  stamp=$(made_with)
  if [ "$("$psql" -XqAt -d postgres -c "select shobj_description(oid, 'pg_database') from pg_database where datname = '$database'")" = "nightowls demo $stamp" ]; then
    known=$(value 'select count(*) from demo.commits')
    last=$(value 'select commit from demo.commits order by no desc limit 1')
    if [ "$known" -gt 0 ] && [ "$(commit_at "$known")" != "$last" ]; then
      why='what was taken in last time is not in this history'
    elif [ "$(value "$strangers")" = t ]; then
      why='there are file events that git did not bring'
    fi
  elif [ -n "$("$psql" -XqAt -d postgres -c "select 1 from pg_database where datname = '$database'")" ]; then
    why='the code has changed since last time'
  else
    why=new
  fi
  taken=$known
  if [ -z "$why" ]; then return; fi

  [ "$why" = new ] || line "$why: starting afresh"
  taken=0
  "$psql" -X -q -v ON_ERROR_STOP=1 -d postgres -c "drop database if exists $database with (force)" -c "create database $database" 2>/dev/null
  sql -c 'create extension nightowls' -f "$root/demo/history.sql" >/dev/null
  sql -c "comment on database $database is 'nightowls demo $stamp'"
}

# --- taking it in --------------------------------------------------------------------------------

# git says each commit as a line `@<id> <time> <author> <subject>` (tabs between) and its changes to the first parent as
# lines `:<modes> <blobs> <letter> <path>`. It is read as Latin-1, in which any bytes are text.
read_history() {
  tail -n "+$((taken + 1))" "$home/chain" |
    read_git diff-tree --stdin --always -r --root --no-renames --no-abbrev --no-relative \
      --ignore-submodules=none --encoding=UTF-8 --format='@%H%x09%at%x09%an%x09%s' |
    LC_ALL=C tr -d '\001\002\r' | LC_ALL=C grep -a '^[@:]' |
    sql -c 'truncate demo.lines' \
      -c "copy demo.lines (line) from stdin with (format csv, delimiter e'\\x01', quote e'\\x02', encoding 'LATIN1')"
}

# Shows `progress <done> <total> <events> <rate>` as a bar where there is a terminal, else a line now and then.
show_progress() {
  local text so_far total events rate width=30 filled told=$SECONDS
  while IFS= read -r text; do
    if [[ $text != 'INFO:  progress '* ]]; then
      printf '%s\n' "$text" >&2
      continue
    fi
    read -r so_far total events rate <<<"${text#INFO:  progress }"
    filled=$((so_far * width / total))
    printf -v text '%s / %s commits  %s events  %s/s' "$(commas "$so_far")" "$(commas "$total")" "$(commas "$events")" "$(commas "$rate")"
    if [ -n "$live" ]; then
      printf '\r\e[K  %s%*s %s' "$(printf "%${filled}s" '' | sed "s/ /$bar/g")" $((width - filled)) '' "$text"
      [ "$so_far" -lt "$total" ] || printf '\n'
    elif [ "$so_far" = "$total" ] || [ $((SECONDS - told)) -ge 5 ]; then
      told=$SECONDS
      line "$text"
    fi
  done
}

take_in() {
  local new=$((commits - taken)) at
  title "The history of $about"
  if [ "$new" = 0 ]; then
    line "nothing new: the whole main line is in the log (commits: $(commas "$commits"))"
    return
  fi
  if [ "$taken" = 0 ]; then
    line "commits on the main line, up to $(read_git log -1 --format=%h "$head"): $(commas "$commits"); each is one append_many:"
  else
    line "new commits on the main line: $(commas "$new") of $(commas "$commits"); each is one append_many:"
  fi
  line 'one event for its author, one for each path it changed (file_added, file_modified, file_removed)'
  at=$(now)
  read_history
  line "git read in $(seconds $(($(now) - at))) s"
  at=$(now)
  sql -c 'set jit to off' -c 'call demo.stage()'
  line "made into $(commas "$(value 'select coalesce(sum(jsonb_array_length(appends)), 0) from demo.staged')") events in $(seconds $(($(now) - at))) s"
  at=$(now)
  sql -c 'call demo.ingest()' 2>&1 >/dev/null | show_progress
  line "appended in $(seconds $(($(now) - at))) s (synchronous_commit is off on this throwaway server)"
}

# --- the proof -----------------------------------------------------------------------------------

# compare <commit> <what> <query of a listing>: byte for byte with what git prints, in one order.
compare() {
  local id=$1 what=$2 query=$3 count
  read_git ls-tree -r --full-tree "$id" | LC_ALL=C sort >"$home/git.list"
  sql -At -c "$query" | LC_ALL=C sort >"$home/projected.list"
  count=$(wc -l <"$home/git.list")
  if cmp -s "$home/git.list" "$home/projected.list"; then
    printf '  %s=%s %-52s %9s files  %s%s%s\n' "$green" "$off" "$what" "$(commas "$count")" \
      "$dim" "$(sha256sum <"$home/git.list" | cut -c 1-16)" "$off"
    return
  fi
  printf '  %sNOT EQUAL%s: %s\n' "$red" "$off" "$what" >&2
  printf '  git ls-tree -r %s says (-), the projection says (+):\n' "$id" >&2
  diff --unified=0 "$home/git.list" "$home/projected.list" | sed -n 's/^[-+][0-9]/    &/p' | head -n 20 >&2 || true
  die "the projection is not what git says ($home/git.list and $home/projected.list are the listings)"
}

prove() {
  local n no id last=$commits earlier=()
  title 'Proof: the projection against git ls-tree -r (the whole listings, compared byte for byte)'
  compare "$head" "the states, and HEAD $(read_git log -1 --format=%h "$head")" 'select * from demo.listing()'
  for ((n = proofs; n >= 1; n--)); do
    no=$((commits * n / (proofs + 1)))
    if [ "$no" -ge 1 ] && [ "$no" -lt "$last" ]; then
      earlier+=("$no")
      last=$no
    fi
  done
  for no in "${earlier[@]}"; do
    id=$(commit_at "$no")
    compare "$id" "state_at, and commit $(read_git log -1 --format=%h "$id") ($(commas "$no") of $(commas "$commits"))" \
      "select * from demo.listing_at($no)"
  done
  if [ ${#earlier[@]} -lt "$proofs" ]; then
    line "no more earlier commits than these ${#earlier[@]} to compare: the history is short"
  fi
}

# --- the tour ------------------------------------------------------------------------------------

tour() { # <file of demo/> <options of psql…>
  local file=$1
  shift
  sql -v "bar=$bar" -P "linestyle=$lines" -P border=1 -P footer=off -P pager=off -P null=- \
    -v "bold=$bold" -v "off=$off" "$@" -f "$root/demo/$file" 2>&1 |
    sed -u -E -e '/^LOCATION: /d' -e 's/^psql:[^ ]+:[0-9]+: //' -e 's/^./  &/' || die "something above is not as it should be (demo/$file)"
}

say 'set-up (installs what is missing, builds)'
"$root/scripts/setup.sh" demo
command -v git >/dev/null || die 'git is needed, and it could not be installed'
bin=$("$root/scripts/server.sh" tree)
find_psql
make_home
exec 8>"$home/lock"
flock -n 8 || die 'another make demo is at work here'
find_repository
database=$(database_for)
start_server
write_psql_command

title "A server of its own: PostgreSQL $("$bin/postgres" --version | sed 's/^[^0-9]*\([0-9.]*\).*/\1/') in .demo/, by socket only"
make_database
line "create extension nightowls, version $(value 'select nightowls.version()'), in database $database"
take_in
tour summary.sql
prove
tour guarantees.sql
tour long.sql
tour queue.sql
floors
swarm

title 'Go on'
line "$("$command" --print "$database")"
line "${dim}or, shorter:${off} .demo/psql $database"
sed 's/^./  &/' "$root/demo/next.sql"
printf '\n'
line "all of it in $((SECONDS - started)) s; make demo again takes in new commits, make demo-clean removes it all"
