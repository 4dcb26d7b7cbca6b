# shellcheck shell=bash
# shellcheck disable=SC2154 # root comes from common.sh, bin from demo.sh
# The demo's throwaway server: source it after common.sh. Everything of it is under .demo/; it listens on a socket
# there and nowhere else, so that it meets no other server. NIGHTOWLS_DEMO_HOME names another folder than .demo/.

home=${NIGHTOWLS_DEMO_HOME:-$root/.demo}
port=55415

# Postgres refuses to run as root: then it runs as postgres, or nobody.
if [ "$(id -u)" = 0 ]; then
  server_user=$(id -un postgres 2>/dev/null || echo nobody)
  as_server() { (cd / && exec setpriv --reuid="$server_user" --regid="$(id -g "$server_user")" --clear-groups "$@"); }
else
  server_user=$(id -un)
  as_server() { (cd / && exec "$@"); }
fi

make_home() {
  local elsewhere
  if [ ! -e "$home" ]; then
    rm -f "$home"
    mkdir "$home"
    if ! as_server test -x "$home"; then
      # A checkout under /root, say, where the server's user cannot go.
      elsewhere=$(mktemp -d "/var/tmp/nightowls-demo-XXXXXX")
      chmod 755 "$elsewhere"
      rmdir "$home"
      ln -s "$elsewhere" "$home"
      note ".demo/ is a link to $elsewhere, as user $server_user may not enter $root"
    fi
    printf 'nightowls demo\n' >"$home/.nightowls-demo"
  fi
  home=$(cd "$home" && pwd -P)
  data=$home/data
  if [ -e "$data" ] && [ "$(stat -c %U "$data")" != "$server_user" ]; then
    die ".demo/ belongs to user $(stat -c %U "$data"); run this as that user (root for a server of user postgres), or remove it with make demo-clean"
  fi
  socket=$home/socket
  # A socket's path has at most 107 bytes.
  if [ $((${#socket} + 20)) -gt 107 ]; then
    if [ ! -e "$home/socket-folder" ]; then mktemp -d /tmp/nightowls-demo-XXXXXX >"$home/socket-folder"; fi
    socket=$(cat "$home/socket-folder")
  fi
}

# The server's psql, or the machine's.
find_psql() {
  psql=$bin/psql
  "$psql" --version >/dev/null 2>&1 || psql=$(command -v psql) || die 'no psql found'
}

# The process of the server, if it runs: the one the data folder names, and at home there.
server_pid() {
  local pid
  pid=$(head -n 1 "$home/data/postmaster.pid" 2>/dev/null) || return 1
  [ "$(readlink "/proc/$pid/cwd" 2>/dev/null)" = "$home/data" ] || return 1
  printf '%s\n' "$pid"
}

stop_server() {
  local pid waited=0
  pid=$(server_pid) || return 0
  kill -INT "$pid"
  while kill -0 "$pid" 2>/dev/null && [ -e "/proc/$pid/cwd" ]; do
    sleep 0.1
    waited=$((waited + 1))
    if [ "$waited" = 200 ]; then kill -QUIT "$pid"; fi
    if [ "$waited" -gt 300 ]; then die "the server (process $pid) does not stop"; fi
  done
}

start_server() {
  local pid
  if pid=$(server_pid) && [ "$(readlink "/proc/$pid/exe")" != "$(readlink -f "$bin/postgres")" ]; then
    stop_server
  fi
  if [ -e "$data/PG_VERSION" ] && [ "$(cat "$data/PG_VERSION")" != "$("$bin/pg_config" --version | sed 's/^PostgreSQL \([0-9]*\).*/\1/')" ]; then
    note 'the server is of another version than last time: starting afresh'
    stop_server
    rm -rf "$data"
  fi
  export PGHOST=$socket PGPORT=$port PGUSER=postgres PGCLIENTENCODING=UTF8 PGCONNECT_TIMEOUT=10
  unset PGDATABASE PGSERVICE PGHOSTADDR PGPASSWORD PGOPTIONS PGSSLMODE PGAPPNAME
  if server_pid >/dev/null; then
    wait_for_server
    return
  fi

  mkdir -p "$socket"
  if [ "$(id -u)" = 0 ]; then chown "$server_user:" "$socket"; fi
  chmod 700 "$socket"
  if [ ! -e "$data/PG_VERSION" ]; then
    rm -rf "$data"
    install -d -m 700 "$data"
    if [ "$(id -u)" = 0 ]; then chown "$server_user:" "$data"; fi
    as_server env LC_ALL=C "$bin/initdb" -D "$data" -U postgres -A trust -E UTF8 --locale=C --no-sync >"$home/initdb.log" 2>&1 ||
      { cat "$home/initdb.log" >&2; rm -rf "$data"; die 'initdb failed'; }
    printf "include 'demo.conf'\n" | as_server tee -a "$data/postgresql.conf" >/dev/null
  fi
  as_server tee "$data/demo.conf" >/dev/null <<CONF
cluster_name = 'nightowls demo'
listen_addresses = ''
port = $port
unix_socket_directories = '${socket//\'/\'\'}'
unix_socket_permissions = 0700
# A throwaway server: the last commits before a crash may be lost.
synchronous_commit = off
max_wal_size = '2GB'
jit = off
logging_collector = off
CONF
  # Its log is opened by the server's user; the lock of this script is not for it.
  : >>"$home/server.log"
  if [ "$(id -u)" = 0 ]; then chown "$server_user:" "$home/server.log"; fi
  as_server env LC_ALL=C "$bin/pg_ctl" start --silent --no-wait -D "$data" -l "$home/server.log" 8>&- </dev/null >/dev/null
  wait_for_server
}

wait_for_server() {
  local waited=0
  until "$psql" -X -q -d postgres -c 'select' >/dev/null 2>&1; do
    sleep 0.1
    waited=$((waited + 1))
    if [ "$waited" -gt 600 ]; then
      tail -n 20 "$home/server.log" >&2
      die 'the server does not start'
    fi
  done
}

# .demo/psql: the client with the server's address, for people.
write_psql_command() {
  command=$home/psql
  local shown=psql
  command -v psql >/dev/null || shown=$psql
  cat >"$command" <<COMMAND
#!/bin/sh
# psql on the demo's server: .demo/psql [database] [options of psql]; --print says the command itself.
[ "\$1" != --print ] || { echo $(printf '%q' "$(printf '%q -h %q -p %s -U postgres' "$shown" "$socket" "$port")") "\${2:-demo}"; exit; }
export PGDATABASE=\${PGDATABASE:-demo}
exec $(printf '%q -h %q -p %s -U postgres' "$psql" "$socket" "$port") "\$@"
COMMAND
  chmod 755 "$command"
}
