#!/usr/bin/env bash
# Measures append, projections, reads and the fold on a throwaway server, each beside something to compare it with.
# usage: [QUICK=1] scripts/bench.sh
#
# What is compared takes turns in short rounds, so that a slow minute of the machine hits all of it: trust the ratios.
# Writes benches/README.md. QUICK=1 takes under three minutes and never replaces the figures of a full run.
source "$(dirname "$0")/common.sh"

started=$SECONDS
load_at_start=$(cut -d ' ' -f 1-3 /proc/loadavg)
home=$target/bench
port=55416

if [ -n "${QUICK:-}" ]; then
  mode=quick rounds=3 length=1 clients_measured=(4) history=200000 fold_events=50000
else
  mode=full rounds=5 length=3 clients_measured=(1 4 16) history=1000000 fold_events=200000
fi
batch_size=100
aggregates=1000

org=00000000-0000-4000-8000-00000000b0b0
payload='{"amount": 12.34, "sku": "s1", "note": "hello world", "actor": "u-17", "reference": "invoice 2041"}'
reducer='{"initial": {"total": 0, "count": 0, "largest": null, "status": "new", "last": null},
  "on": {"order_paid": [{"op": "add", "path": "total", "value": "$.amount"}, {"op": "add", "path": "count"},
                        {"op": "max", "path": "largest", "value": "$.amount"}, {"op": "set", "path": "last", "value": "$.sku"}]}}'

elapsed() { printf '%d:%02d' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)); }
stage() { say "[$(elapsed)] $*"; }
busy() { awk -v load="${load_at_start%% *}" 'BEGIN {exit !(load > 0.5)}'; }

# --- the server ----------------------------------------------------------------------------------

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
  } | as_server tee -a "$place/data/postgresql.conf" >/dev/null
  : >"$home/server.log"
  if [ "$(id -u)" = 0 ]; then chown "$server_user:" "$home/server.log"; fi
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
  local status=$? pid waited=0
  if pid=$(head -n 1 "$place/data/postmaster.pid" 2>/dev/null); then
    kill -INT "$pid" 2>/dev/null || true
    while [ -e "$place/data/postmaster.pid" ] && [ "$waited" -lt 300 ]; do
      sleep 0.1
      waited=$((waited + 1))
    done
    if [ -e "$place/data/postmaster.pid" ]; then kill -QUIT "$pid" 2>/dev/null || true; fi
    wait 2>/dev/null || true
  fi
  rm -rf "$place" "$socket"
  exit "$status"
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

prepare() { # <database> <owner>
  sql "$1" "$2" -v "org=$org" -v "aggregates=$aggregates" -v "batch=$(batch 5)" -v "reducer=$reducer" -f "$root/benches/prepare.sql"
}

make_databases() {
  sql postgres postgres -c 'create role bench_service login' -c 'create role bench_owner login createdb createrole bypassrls' \
    -c 'create database extension' -c 'create database indexed' -c 'create database plain owner bench_owner'
  local file database
  for database in extension indexed; do
    sql "$database" postgres -c 'create extension nightowls'
    prepare "$database" postgres
  done
  sql indexed postgres -c 'select nightowls.create_type_index()' >/dev/null
  "$root/scripts/migrations.sh" "$home/results/migrations" >/dev/null 2>"$home/migrations.log" || die "no migrations: $home/migrations.log"
  find "$home/results/migrations" -name '*.sql' | sort >"$home/results/migrations.list"
  while IFS= read -r file; do
    PGOPTIONS='-c client_min_messages=warning' sql plain bench_owner --single-transaction -f "$file" </dev/null >/dev/null
  done <"$home/results/migrations.list"
  prepare plain bench_owner
}

# message-db's SQL comes from its npm package and stays out of this repository.
make_message_db() {
  local package=@eventide/message-db@1.3.1 folder=$home/message-db
  if [ ! -d "$folder/node_modules/@eventide/message-db/database" ]; then
    if ! command -v npm >/dev/null; then
      skip "message-db (no npm to get $package with)"
      return 1
    fi
    note "getting $package"
    if ! npm install --silent --no-audit --no-fund --ignore-scripts --prefix "$folder" "$package" >"$home/message-db.log" 2>&1; then
      skip "message-db ($package cannot be had here)"
      return 1
    fi
  fi
  if ! PATH=$bin:$PATH PGUSER=postgres DATABASE_NAME=message_db \
    bash "$folder/node_modules/@eventide/message-db/database/install.sh" >"$home/message-db.log" 2>&1; then
    skip "message-db (its install failed: ${home#"$root"/}/message-db.log)"
    return 1
  fi
}

# --- what is measured ----------------------------------------------------------------------------

# A candidate: its label, database, user and script; what pgbench is told besides; how many things one transaction does.
declare -A label database user script options each
candidate() { # <name> <label> <database> <user> <script> <each> [<option of pgbench>…]
  local name=$1
  label[$name]=$2 database[$name]=$3 user[$name]=$4 script[$name]=$5 each[$name]=$6
  shift 6
  options[$name]=$(printf '%q ' "$@")
}

define_candidates() {
  local install service=bench_service rows=(-D kind=account -D per=10)
  for install in extension plain indexed; do
    candidate "$install" "append_event, $install" "$install" $service append.sql 1 "${rows[@]}"
  done
  label[indexed]='append_event, extension, with the type index'
  candidate insert 'plain insert' extension $service insert.sql 1 "${rows[@]}"
  candidate extension_id 'append_event, extension' extension $service append_id.sql 1 "${rows[@]}"
  candidate insert_id 'plain insert' extension $service insert_id.sql 1 "${rows[@]}"
  candidate message_db 'message-db, one category' message_db message_store write_message.sql 1 "${rows[@]}" -D categories=1
  candidate message_db_50 'message-db, 50 categories' message_db message_store write_message.sql 1 "${rows[@]}" -D categories=50

  candidate batch_extension 'append_events, extension' extension $service append_batch.sql $batch_size -D kind=account -D "batch=$(batch $batch_size)"
  candidate batch_plain 'append_events, plain' plain $service append_batch.sql $batch_size -D kind=account -D "batch=$(batch $batch_size)"
  insert_batch >"$home/results/insert_batch.sql"
  candidate batch_insert 'plain multi-row insert' extension $service "$home/results/insert_batch.sql" $batch_size -D kind=account
  candidate batch_message_db 'message-db, one category' message_db message_store write_message_batch.sql $batch_size \
    -D kind=account -D categories=1 -D batch_size=$batch_size

  for install in extension plain; do
    candidate "existing_$install" "$install, $aggregates aggregates in turn" "$install" $service append_existing.sql 1 -D kind=order -D aggregates=$aggregates
    candidate "new_$install" "$install, each to a new aggregate" "$install" $service append.sql 1 -D kind=order -D per=1
    candidate "long_$install" "$install, to the long aggregate" "$install" $service append_one.sql 1 -D kind=ledger -D aggregate=long
    candidate "short_$install" "$install, each to a new aggregate" "$install" $service append.sql 1 -D kind=ledger -D per=1
  done
  candidate read_extension 'read_events, extension' extension $service read_events.sql 1000 -D max_events=1000
  candidate read_plain 'read_events, plain' plain $service read_events.sql 1000 -D max_events=1000
  candidate read_select 'plain select' extension $service select_events.sql 1000 -D max_events=1000
}

# The rows of append_batch.sql as one insert, each with parameters of its own (pgbench takes 255 of them).
insert_batch() {
  local i
  head -n 3 "$root/benches/append_batch.sql"
  printf '%s\n' 'insert into bench.events (org_id, aggregate_type, aggregate_id, version, event_type, payload)' 'values'
  for ((i = 1; i <= batch_size; i++)); do
    printf "  ('%s', 'account', :id, %s, 'order_paid', :payload)%s\n" "$org" "$i" "$([ "$i" = "$batch_size" ] && echo ';' || echo ,)"
  done
}

round_of() { # <group> <candidate> <clients> <round>: one round; its rate is in $rate
  local group=$1 name=$2 clients=$3 round=$4 said file folder=$home/results/$1 threads more
  file=${script[$name]}
  case $file in /*) ;; *) file=$root/benches/$file ;; esac
  threads=$((clients < 2 ? 1 : 2))
  eval "more=(${options[$name]})"
  rm -f "$folder"/log.*
  if ! said=$("$bin/pgbench" --no-vacuum --protocol=prepared --client="$clients" --jobs="$threads" --time="$length" \
    --log --log-prefix="$folder/log" --file="$file" -U "${user[$name]}" -D "org=$org" -D "run=${name:0:1}$group$round" -D n=-1 \
    -D "round=$round" -D "clients=$clients" -D event_type=order_paid -D "payload=$payload" "${more[@]}" "${database[$name]}" 2>&1); then
    printf '%s\n' "$said" | tail -n 5 >&2
    die "pgbench failed on ${label[$name]}"
  fi
  cat "$folder"/log.* | cut -d ' ' -f 3 >>"$folder/$name.latency"
  rate=$(sed -n 's/^tps = \([0-9.]*\).*/\1/p' <<<"$said" | awk -v each="${each[$name]}" '{printf "%.1f", $1 * each}')
  [ -n "$rate" ] || die "pgbench gave no rate for ${label[$name]}"
  printf '%s\n' "$rate" >>"$folder/$name.rate"
}

declare -A clients_of
group() { # <group> <clients> <candidate>…: all rounds of a comparison
  local name=$1 clients=$2 round one i line order
  shift 2
  clients_of[$name]=$clients
  mkdir -p "$home/results/$name"
  sql postgres postgres -c checkpoint
  for ((round = 1; round <= rounds; round++)); do
    line=
    # There and back, so that none always follows the same other.
    order=("$@")
    if [ $((round % 2)) = 0 ]; then
      order=()
      for ((i = $#; i >= 1; i--)); do order+=("${!i}"); done
    fi
    for one in "${order[@]}"; do
      round_of "$name" "$one" "$clients" "$round"
      line="$line  $one ${rate%.*}"
    done
    note "round $round of $rounds:$line"
  done
}

# --- the figures ---------------------------------------------------------------------------------

quantile() { # <share> of the numbers in standard input
  sort -g | awk -v share="$1" '{n[NR] = $1} END {if (NR) {i = share * (NR - 1) + 1; f = int(i);
    printf "%.6f", n[f] + (f < NR ? (i - f) * (n[f + 1] - n[f]) : 0)}}'
}

thousands() { printf '%.0f' "$1" | sed -E ':a; s/^([0-9]+)([0-9]{3})/\1,\2/; ta'; }

# The ratio of two candidates, round by round: median, least, greatest.
ratio() { # <group> <candidate> <other>
  paste "$home/results/$1/$2.rate" "$home/results/$1/$3.rate" | awk '{printf "%.6f\n", $1 / $2}' >"$home/results/ratios"
  printf '%.2f %.2f %.2f\n' "$(quantile 0.5 <"$home/results/ratios")" "$(quantile 0 <"$home/results/ratios")" "$(quantile 1 <"$home/results/ratios")"
}

verdict() { awk -v ratio="$1" -v bar="$2" 'BEGIN {print (ratio >= bar ? "ok" : "BELOW")}'; }

bars=()
judge() { # <what> <figure> <shown> <bar> <shown>
  bars+=("| $1 | $3 | $5 | $(verdict "$2" "$4") |")
}

out() { printf '%s\n' "$@" >>"$home/results/body.md"; }

# A table of a group; `<candidate>/<other>=<bar>=<what>` asks for a ratio, with a bar if it has one.
table() { # <group> <title> <unit> <candidate>… -- <ratio>…
  local name=$1 title=$2 unit=$3 one pair bar what median least most shown cells names=() pairs=() folder=$home/results/$1
  shift 3
  while [ "$1" != -- ]; do
    names+=("$1")
    shift
  done
  shift
  pairs=("$@")
  printf '\n  %s; %s client%s\n' "$title" "${clients_of[$name]}" "$([ "${clients_of[$name]}" = 1 ] || echo s)"
  out '' "### $title; ${clients_of[$name]} client$([ "${clients_of[$name]}" = 1 ] || echo s)" '' "| | $unit | p50 ms | p99 ms | ratios |" '| --- | ---: | ---: | ---: | --- |'
  for one in "${names[@]}"; do
    cells=
    for pair in "${pairs[@]}"; do
      [ "${pair%%/*}" = "$one" ] || continue
      IFS='=' read -r pair bar what <<<"$pair="
      read -r median least most <<<"$(ratio "$name" "$one" "${pair#*/}")"
      shown="$median × ${label[${pair#*/}]} ($least–$most)"
      if [ -n "$bar" ]; then
        judge "${what%=}" "$median" "$median ($least–$most)" "$bar" "≥ $bar"
        shown="$shown, bar $bar: $(verdict "$median" "$bar")"
      fi
      cells="$cells${cells:+; }$shown"
    done
    set -- "${label[$one]}" "$(thousands "$(quantile 0.5 <"$folder/$one.rate")")" \
      "$(awk '{print $1 / 1000}' "$folder/$one.latency" | quantile 0.5)" "$(awk '{print $1 / 1000}' "$folder/$one.latency" | quantile 0.99)" "$cells"
    printf '    %-45s %9s %s  p50 %.2f ms  p99 %.2f ms  %s\n' "$1" "$2" "$unit" "$3" "$4" "${5:+  $5}"
    out "$(printf '| %s | %s | %.2f | %.2f | %s |' "$1" "$2" "$3" "$4" "$5")"
  done
}

# --- the parts -----------------------------------------------------------------------------------

with_message_db() { # the arguments, without those of message-db where there is none
  local one
  kept=()
  for one in "$@"; do
    if [ -n "$message_db" ] || [[ $one != *message_db* ]]; then kept+=("$one"); fi
  done
}

appends() {
  local clients asked
  for clients in "${clients_measured[@]}"; do
    stage "single append, clients: $clients"
    asked=(extension plain insert message_db message_db_50)
    if [ "$clients" = 4 ]; then asked+=(indexed); fi
    with_message_db "${asked[@]}"
    group "single$clients" "$clients" "${kept[@]}"
    if [ "$clients" = 4 ]; then
      with_message_db "${asked[@]}" -- \
        extension/insert=0.6='single append, extension: × plain insert' extension/message_db=2='single append, extension: × message-db' \
        plain/insert=0.6='single append, plain: × plain insert' plain/message_db=2='single append, plain: × message-db' \
        extension/message_db_50 plain/message_db_50 indexed/extension
    else
      with_message_db "${asked[@]}" -- extension/insert extension/message_db extension/message_db_50 plain/insert plain/message_db plain/message_db_50
    fi
    table "single$clients" 'Single append' events/s "${kept[@]}"
  done

  stage 'single append with an event_id, clients: 4'
  group id 4 extension_id insert_id
  table id 'Single append with an event_id' events/s extension_id insert_id -- extension_id/insert_id

  for clients in "${clients_measured[@]}"; do
    stage "batch of $batch_size, clients: $clients"
    asked=(batch_extension batch_plain batch_insert)
    if [ "$clients" = 4 ]; then asked+=(batch_message_db); fi
    with_message_db "${asked[@]}"
    group "batch$clients" "$clients" "${kept[@]}"
    if [ "$clients" = 4 ]; then
      with_message_db "${asked[@]}" -- batch_extension/batch_insert=0.75="batch of $batch_size, extension: × multi-row insert" \
        batch_plain/batch_insert=0.75="batch of $batch_size, plain: × multi-row insert" batch_extension/batch_message_db batch_plain/batch_message_db
    else
      with_message_db "${asked[@]}" -- batch_extension/batch_insert batch_plain/batch_insert
    fi
    table "batch$clients" "Batch of $batch_size" events/s "${kept[@]}"
  done
}

projections() {
  stage 'single append with an inline projection, clients: 4'
  group projected 4 existing_extension new_extension insert new_plain existing_plain
  table projected 'Single append with an inline projection (4 ops, a state of 5 keys)' events/s \
    existing_extension new_extension existing_plain new_plain insert -- \
    existing_extension/insert=0.4='append with a projection, extension, existing aggregates: × plain insert' \
    new_extension/insert=0.4='append with a projection, extension, new aggregates: × plain insert' \
    existing_plain/insert=0.4='append with a projection, plain, existing aggregates: × plain insert' \
    new_plain/insert=0.4='append with a projection, plain, new aggregates: × plain insert'
}

# A session that holds a snapshot open, in each of the databases.
hold_snapshots() {
  local one
  for one in extension plain; do
    PGAPPNAME='bench snapshot' sql "$one" postgres -c 'begin isolation level repeatable read' \
      -c 'select count(*) from pg_class' -c 'select pg_sleep(3600)' >/dev/null 2>&1 7>&- &
  done
  sleep 1
}

snapshots_held() { # how many, and for how many seconds at least
  sql postgres postgres -F ' ' -c "select count(*), coalesce(floor(min(extract(epoch from clock_timestamp() - xact_start))), 0)
    from pg_stat_activity where application_name = 'bench snapshot' and backend_xmin is not null"
}

long_histories() {
  local one held=0 seconds=0
  stage "an aggregate of $(thousands "$history") events"
  for one in extension plain; do
    sql "$one" postgres -v "org=$org" -v "payload=$payload" -v "events=$history" -f "$root/benches/long_history.sql"
  done
  group long 1 long_extension short_extension long_plain short_plain
  table long "Append to an aggregate of $(thousands "$history") events" events/s long_extension short_extension long_plain short_plain -- \
    long_extension/short_extension=0.8="append to $(thousands "$history") events, extension: × to a new aggregate" \
    long_plain/short_plain=0.8="append to $(thousands "$history") events, plain: × to a new aggregate"

  stage 'the same while another session holds a snapshot open'
  hold_snapshots
  group snapshot 1 long_extension short_extension long_plain short_plain
  read -r held seconds <<<"$(snapshots_held)"
  [ "$held" = 2 ] || die 'a snapshot was not held open'
  table snapshot "The same while another session holds a REPEATABLE READ snapshot ($seconds s at the end)" events/s \
    long_extension short_extension long_plain short_plain -- \
    long_extension/short_extension=0.8='the same with a snapshot held, extension: × to a new aggregate' \
    long_plain/short_plain=0.8='the same with a snapshot held, plain: × to a new aggregate'

  stage 'the same with an inline projection, the snapshot still held'
  sql extension postgres -c "select nightowls.create_projection('ledgers', 'ledger', '$reducer')" >/dev/null
  group kept 1 long_extension short_extension
  read -r held seconds <<<"$(snapshots_held)"
  [ "$held" = 2 ] || die 'a snapshot was not held open'
  table kept "The same with an inline projection and the snapshot held ($seconds s at the end)" events/s long_extension short_extension -- \
    long_extension/short_extension
  sql postgres postgres -c "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'bench snapshot'" >/dev/null
}

reads() {
  local one after
  stage 'reading the last 1,000 events, clients: 1'
  for one in extension plain; do
    after=$(sql "$one" postgres -c "select e.\"position\" from nightowls.events e where e.org_id = '$org' order by e.\"position\" desc offset 1000 limit 1")
    options[read_$one]="${options[read_$one]} -D after=$after"
    if [ "$one" = extension ]; then options[read_select]="${options[read_select]} -D after=$after"; fi
  done
  group read 1 read_extension read_plain read_select
  table read 'The last 1,000 events' events/s read_extension read_plain read_select -- read_extension/read_select read_plain/read_select
}

folds() {
  local one name figure unit bar
  declare -A fold
  stage 'the fold, native and twin'
  for one in extension plain; do
    while IFS='|' read -r name figure unit; do
      fold[$one,$name]=$figure
      note "$one: $name $(printf '%.0f' "$figure") $unit"
    done < <(sql "$one" postgres -v "events=$fold_events" -v runs=3 -f "$root/benches/fold.sql" | grep '|')
  done
  [ -n "${fold[plain,fold_one]:-}" ] || die 'benches/fold.sql gave no figures'
  out '' '### The fold: 4 ops an event, a state of 5 keys; one backend' '' '| | native (extension) | twin (plain) | native × twin |' '| --- | ---: | ---: | ---: |'
  for name in fold_tail fold_events; do
    out "| \`$name\`, events/s | $(thousands "${fold[extension,$name]}") | $(thousands "${fold[plain,$name]}") | $(awk -v a="${fold[extension,$name]}" -v b="${fold[plain,$name]}" 'BEGIN {printf "%.1f", a / b}') |"
  done
  out "| one event through \`_fold_tail\`, µs | ${fold[extension,fold_one]} | ${fold[plain,fold_one]} | $(awk -v a="${fold[extension,fold_one]}" -v b="${fold[plain,fold_one]}" 'BEGIN {printf "%.1f", b / a}') |"
  for one in extension plain; do
    bar=$([ "$one" = extension ] && echo 300000 || echo 80000)
    judge "the fold, $([ "$one" = extension ] && echo native || echo twin), events/s" "${fold[$one,fold_tail]}" "$(thousands "${fold[$one,fold_tail]}")" "$bar" "≥ $(thousands "$bar")"
    printf '    %-45s %9s events/s, bar %s: %s\n' "the fold, $one" "$(thousands "${fold[$one,fold_tail]}")" "$(thousands "$bar")" "$(verdict "${fold[$one,fold_tail]}" "$bar")"
  done
}

# --- the page ------------------------------------------------------------------------------------

machine() {
  local cpu memory disk
  cpu=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)
  memory=$(awk '/^MemTotal/ {printf "%.0f", $2 / 1048576}' /proc/meminfo)
  disk=$(df --output=fstype "$place" | tail -n 1)
  printf '%s, %s cores, %s GB, %s; %s, Linux %s' "${cpu:-$(uname -m)}" "$(nproc)" "$memory" "$disk" \
    "$(. /etc/os-release && printf '%s' "$PRETTY_NAME")" "$(uname -r | sed 's/^\([0-9]*\.[0-9]*\).*/\1/')"
}

write_page() {
  local page=$home/README.md
  {
    cat <<PAGE
<!-- Written by make bench ($mode run); change scripts/bench.sh instead. -->
# Benchmarks

| | |
| --- | --- |
| Date | $(date -u '+%Y-%m-%d %H:%M UTC'), nightowls $version, a $mode run of $(elapsed) minutes |
| Machine | $(machine) |
| PostgreSQL | $("$bin/postgres" --version | sed 's/^postgres (PostgreSQL) //'); $(settings | paste -sd ';' | sed 's/;/; /g') |
| Load before | $load_at_start (1, 5, 15 minutes)$(busy && printf ' — **the machine was busy: do not quote these figures**') |
| Compared with | a plain insert into \`create table … (like nightowls.events including all)\`$([ -n "$message_db" ] && printf ', and message-db 1.3.1 (`write_message`)' || printf '; message-db: skipped') |

\`make bench\` writes this page anew; \`make bench QUICK=1\` is a short run that does not replace a full one's figures.

## The bars

The bars hold at 4 clients, those for long histories at 1 (a second appender to one aggregate waits for the first one's commit).

| | measured | bar | |
| --- | --- | --- | --- |
PAGE
    printf '%s\n' "${bars[@]}"
    cat <<PAGE

## How to read this

- What stands in one table took turns on one server: $rounds rounds of $length s each, there and back. A ratio is the median of the
  rounds' ratios, with the least and the greatest behind it. Trust ratios; the rates belong to this machine's disk.
- Rates are medians of the rounds; p50 and p99 are over all transactions of all rounds. A batch of $batch_size counts as $batch_size events, its times are for the whole batch.
- Every figure is with the commit flushed to disk. With one client the disk decides; with 16 clients the commits share
  flushes and the processor decides, which the client (pgbench, prepared protocol) and the server share.
- "extension" and "plain" are the two installs; who appends is a role with \`grant_service\`, without an org in the call (the default org).
- An event has a payload of ${#payload} bytes and, if not said otherwise, no event_id. Aggregates get 10 events each; a batch goes to a new one.
- message-db writes one message a call, so its batch is $batch_size calls in one statement. Its rows always have an id and another set of indexes.
  It lets one transaction at a time write to a category; most users have a handful of categories.

## Figures
PAGE
    cat "$home/results/body.md"
    cat <<PAGE

## What is not measured

A network between client and server, a pooler, other settings of the disk or of commits, more cores, more orgs, large payloads, \`append_many\`, handlers and
table projections, readers beside writers, logs that do not fit into memory, checkpoints (none falls into a round).
PAGE
  } >"$page"
  if [ "$mode" = quick ] && [ -e "$root/benches/README.md" ] && ! grep -q '^<!-- .*(quick run)' "$root/benches/README.md"; then
    note "benches/README.md keeps the figures of a full run; these are in ${page#"$root"/}"
  else
    cp "$page" "$root/benches/README.md"
    note 'wrote benches/README.md'
  fi
}

if busy; then
  printf 'warning: the machine is busy (load %s): the figures will be noisy, and the ratios less sharp\n' "$load_at_start" >&2
fi
stage 'set-up'
"$root/scripts/setup.sh" bench
bin=$("$root/scripts/server.sh" tree)
psql=$bin/psql
"$psql" --version >/dev/null 2>&1 || psql=$(command -v psql) || die 'no psql found'
[ -x "$bin/pgbench" ] || die "no pgbench in $bin"
make_folder
trap stop_server EXIT
trap 'exit 130' INT TERM
export PGHOST=$socket PGPORT=$port PGUSER=postgres PGCLIENTENCODING=UTF8
unset PGDATABASE PGSERVICE PGHOSTADDR PGPASSWORD PGOPTIONS PGSSLMODE PGAPPNAME
start_server
make_databases
message_db=
if make_message_db; then message_db=yes; fi
define_candidates
: >"$home/results/body.md"
appends
projections
long_histories
reads
folds
stage 'the bars'
printf '%s\n' "${bars[@]}" | sed -E 's/^\| //; s/ \|$//' | awk -F ' \\| ' '{printf "    %-72s %-24s %-10s %s\n", $1, $2, $3, $4}'
if busy; then note "measured on a busy machine (load $load_at_start)"; fi
write_page
note "all of it in $(elapsed) minutes"
