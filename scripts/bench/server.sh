# shellcheck shell=bash disable=SC2034,SC2154
# The throwaway server of scripts/bench.sh and its databases: sourced by it.

home=$target/bench
port=55416
org=00000000-0000-4000-8000-00000000b0b0
payload='{"amount": 12.34, "sku": "s1", "note": "hello world", "actor": "u-17", "reference": "invoice 2041"}'
reducer='{"initial": {"total": 0, "count": 0, "largest": null, "status": "new", "last": null},
  "on": {"order_paid": [{"op": "add", "path": "total", "value": "$.amount"}, {"op": "add", "path": "count"},
                        {"op": "max", "path": "largest", "value": "$.amount"}, {"op": "set", "path": "last", "value": "$.sku"}]}}'
# How many aggregates of type order the databases begin with, 5 events each.
aggregates=1000

# Postgres refuses to run as root: then it runs as postgres, or nobody.
if [ "$(id -u)" = 0 ]; then
  server_user=$(id -un postgres 2>/dev/null || echo nobody)
  as_server() { (cd / && exec setpriv --reuid="$server_user" --regid="$(id -g "$server_user")" --clear-groups "$@"); }
else
  server_user=$(id -un)
  as_server() { (cd / && exec "$@"); }
fi

make_folder() {
  mkdir -p "$home"
  home=$(cd "$home" && pwd -P)
  exec 7>"$home/lock"
  flock -n 7 || die 'another make bench is at work here'
  place=$home/server
  rm -rf "$place" "$home/results"
  mkdir -p "$place" "$home/results"
  if ! as_server test -x "$place"; then
    # A checkout under /root, say, where the server's user cannot go.
    rmdir "$place"
    place=$(mktemp -d /var/tmp/nightowls-bench-XXXXXX)
  fi
  chmod 755 "$place"
  # A socket's path has at most 107 bytes.
  socket=$place/socket
  if [ $((${#socket} + 20)) -gt 107 ]; then socket=$(mktemp -d /tmp/nightowls-bench-XXXXXX); fi
  mkdir -p "$socket" "$place/data"
  chmod 700 "$socket" "$place/data"
  if [ "$(id -u)" = 0 ]; then chown "$server_user:" "$socket" "$place/data"; fi
}

settings() {
  cat <<CONF
fsync = on
synchronous_commit = on
full_page_writes = on
shared_buffers = '512MB'
max_wal_size = '16GB'
checkpoint_timeout = '1h'
max_connections = 50
CONF
}

start_server() {
  as_server env LC_ALL=C "$bin/initdb" -D "$place/data" -U postgres -A trust -E UTF8 --locale=C >"$home/initdb.log" 2>&1 ||
    die "initdb failed: $home/initdb.log"
  {
    settings
    printf "cluster_name = 'nightowls bench'\nlisten_addresses = ''\nport = %s\n" "$port"
    printf "unix_socket_directories = '%s'\n" "${socket//\'/\'\'}"
    printf "include_if_exists = 'part.conf'\n"
  } | as_server tee -a "$place/data/postgresql.conf" >/dev/null
  : >"$home/server.log"
  if [ "$(id -u)" = 0 ]; then chown "$server_user:" "$home/server.log"; fi
  launch
}

launch() {
  # The lock of this script is not for the server.
  (exec 7>&- && as_server env LC_ALL=C "$bin/postgres" -D "$place/data" >>"$home/server.log" 2>&1 </dev/null) &
  local waited=0
  until "$psql" -XqAt -d postgres -c 'select' >/dev/null 2>&1; do
    sleep 0.1
    waited=$((waited + 1))
    [ "$waited" -lt 300 ] || die "the server does not start: $home/server.log"
  done
}

stop_server() {
  local pid waited=0
  if pid=$(head -n 1 "$place/data/postmaster.pid" 2>/dev/null); then
    kill -INT "$pid" 2>/dev/null || true
    while [ -e "$place/data/postmaster.pid" ] && [ "$waited" -lt 300 ]; do
      sleep 0.1
      waited=$((waited + 1))
    done
    if [ -e "$place/data/postmaster.pid" ]; then kill -QUIT "$pid" 2>/dev/null || true; fi
    wait 2>/dev/null || true
  fi
}

remove_server() {
  local status=$?
  stop_server
  rm -rf "$place" "$socket"
  exit "$status"
}

# restart_server ['<line of postgresql.conf>'…]: with these settings until the part ends.
extra_settings=()
# shellcheck disable=SC2120
restart_server() {
  stop_server
  extra_settings=("$@")
  if [ $# -gt 0 ]; then printf '%s\n' "$@"; fi | as_server tee "$place/data/part.conf" >/dev/null
  launch
}

sql() { # <database> <user> <argument of psql>…
  local database=$1 user=$2
  shift 2
  "$psql" -XqAt -v ON_ERROR_STOP=1 -d "$database" -U "$user" "$@"
}

# --- the databases -------------------------------------------------------------------------------

batch() { # <size>: the events of one batch, as JSON
  local event i all=''
  event="{\"event_type\": \"order_paid\", \"payload\": $payload}"
  for ((i = 0; i < $1; i++)); do all="$all, $event"; done
  printf '[%s]' "${all#, }"
}

make_templates() {
  local file install
  sql postgres postgres -c 'create role bench_service login' -c 'create role bench_owner login createdb createrole bypassrls' \
    -c 'create database base_extension' -c 'create database base_plain owner bench_owner'
  sql base_extension postgres -c 'create extension nightowls'
  "$root/scripts/migrations.sh" "$home/results/migrations" >/dev/null 2>"$home/migrations.log" || die "no migrations: $home/migrations.log"
  find "$home/results/migrations" -name '*.sql' | sort >"$home/results/migrations.list"
  while IFS= read -r file; do
    PGOPTIONS='-c client_min_messages=warning' sql base_plain bench_owner --single-transaction -f "$file" </dev/null >/dev/null
  done <"$home/results/migrations.list"
  for install in extension plain; do
    sql "base_$install" "$(owner_of "$install")" -v "org=$org" -v "aggregates=$aggregates" -v "batch=$(batch 5)" -v "reducer=$reducer" \
      -f "$root/benches/prepare.sql"
  done
}

owner_of() { # <install>
  if [ "$1" = extension ]; then echo postgres; else echo bench_owner; fi
}

part_databases=()
new_database() { # <name> <extension or plain>
  sql postgres postgres -c "create database $1 template base_$2 owner $(owner_of "$2")"
  part_databases+=("$1")
}

begin_part() {
  mkdir -p "$home/results/$part"
  : >"$home/results/$part.md"
  : >"$home/results/$part.bars"
  part_started=$SECONDS
  part_databases=()
  new_database extension extension
  new_database plain plain
}

end_part() {
  local one
  if [ ${#extra_settings[@]} -gt 0 ]; then restart_server; fi
  for one in "${part_databases[@]}"; do sql postgres postgres -c "drop database $one with (force)"; done
  end_block
}

# --- open snapshots ------------------------------------------------------------------------------

hold_snapshots() { # <database>…: a session in each that holds a snapshot open, until release_snapshots
  local one waited=0
  for one in "$@"; do
    PGAPPNAME='bench snapshot' sql "$one" postgres -c 'begin isolation level repeatable read' \
      -c 'select count(*) from pg_class' -c 'select pg_sleep(3600)' >/dev/null 2>&1 7>&- &
  done
  until [[ $(snapshots_held) == "$# "* ]]; do
    sleep 0.1
    waited=$((waited + 1))
    [ "$waited" -lt 100 ] || die 'a snapshot is not held open'
  done
}

snapshots_held() { # how many, and for how many seconds at least
  sql postgres postgres -F ' ' -c "select count(*), coalesce(floor(min(extract(epoch from clock_timestamp() - xact_start))), 0)
    from pg_stat_activity where application_name = 'bench snapshot' and backend_xmin is not null and state = 'active' and query like '%pg_sleep%'"
}

release_snapshots() {
  sql postgres postgres -c "select pg_terminate_backend(pid, 10000) from pg_stat_activity where application_name = 'bench snapshot'" >/dev/null
}
