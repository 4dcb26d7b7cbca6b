# shellcheck shell=bash disable=SC2034,SC2154
# A part of make bench (scripts/bench.sh): the queue beside pgmq, with backlogs, delayed messages and groups, and while a snapshot is held.

# pgmq's SQL comes from its crate and stays out of this repository.
queue_get_pgmq() {
  local package=0.34.0-alpha.7 folder=$home/pgmq source
  mkdir -p "$folder/src"
  : >"$folder/src/lib.rs"
  printf '%s\n' '[package]' 'name = "pgmq-sql"' 'version = "0.0.0"' 'edition = "2024"' '[workspace]' '[dependencies]' \
    "pgmq = { version = \"=$package\", default-features = false }" >"$folder/Cargo.toml"
  if ! cargo fetch --quiet --manifest-path "$folder/Cargo.toml" >"$home/pgmq.log" 2>&1; then
    skip "pgmq (its crate $package cannot be had here)"
    return 1
  fi
  for source in "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/"pgmq-$package"/src/install/embedded/sql/pgmq.sql; do
    if [ -f "$source" ]; then queue_pgmq_sql=$source; fi
  done
  [ -n "${queue_pgmq_sql:-}" ]
}

queue_new_pgmq() { # <database>
  sql postgres postgres -c "create database $1"
  part_databases+=("$1")
  sql "$1" postgres -f "$queue_pgmq_sql" >/dev/null
  sql "$1" postgres -c "select pgmq.create(q) from unnest('{jobs,grouped}'::text[]) q" -c 'grant usage on schema pgmq to bench_service' \
    -c 'grant all on all tables in schema pgmq to bench_service' -c 'grant all on all sequences in schema pgmq to bench_service' >/dev/null
}

queue_new() { # <database> <install>: with the queues
  if [ "$1" != "$2" ]; then new_database "$1" "$2"; fi
  sql "$1" bench_service -c "select nightowls.create_queue(q) from unnest('{jobs,grouped}'::text[]) q" >/dev/null
}

queue_fill() { # <database> <messages> [<delay>]: in as many transactions as there are thousands
  if [[ $1 == *pgmq* ]]; then
    sql "$1" postgres -c "select count(*) from generate_series(1, $2 / 1000), pgmq.send_batch('jobs', array_fill('$payload'::jsonb, array[1000]), ${3:-0})" >/dev/null
    sql "$1" postgres -c 'vacuum analyze pgmq.q_jobs'
  else
    sql "$1" bench_service -c "select count(*) from generate_series(1, $2 / 1000), nightowls.send_batch('jobs', array_fill('$payload'::jsonb, array[1000]), ${3:-0})" >/dev/null
    sql "$1" postgres -c 'vacuum analyze nightowls.queue_messages'
  fi
}

queue_compare() { # <group> <script> <how many> <clients> <heading> <unit> <bar> <what>: both installs and pgmq
  local name=$1 file=$2 size=$3 clients=$4 heading=$5 unit=$6 bar=$7 what=$8 asked=() pairs=() install
  for install in extension plain; do
    candidate "$name$install" "$install" "$install" bench_service "queue_$file.sql" "$size"
    asked+=("$name$install")
    if [ -n "$queue_pgmq" ]; then pairs+=("$name$install/${name}pgmq=$bar${bar:+=$what, $install: × pgmq}"); fi
  done
  if [ -n "$queue_pgmq" ]; then
    candidate "${name}pgmq" pgmq pgmq bench_service "queue_${file}_pgmq.sql" "$size"
    asked+=("${name}pgmq")
  fi
  stage "$heading, clients: $clients"
  group "$name" "$clients" "${asked[@]}"
  table "$name" "$heading" "$unit" "${asked[@]}" -- "${pairs[@]}"
}

queue_flush() { # on or off
  sql postgres postgres -c "alter system set synchronous_commit = $1" -c 'select pg_reload_conf()' >/dev/null
  sleep 0.3
}

bench_queue() {
  title 'The queue'
  local install one held seconds median least most clients asked=() backlog=1000000 many=400000 turns=15
  if [ "$mode" = quick ]; then backlog=100000 many=100000 turns=3; fi
  queue_pgmq=
  if queue_get_pgmq; then
    queue_pgmq=yes
    queue_new_pgmq pgmq
  fi
  out '' "- A cycle is \`send\`, \`read\` and \`ack\` (pgmq: \`delete\`) of one message, each in a transaction of its own, beside 1,000 messages that wait." \
    '- pgmq is 1.13.0, from the crate pgmq 0.34.0-alpha.7, by plain SQL. It has no receipts and looks at nobody'"'"'s org.'
  for install in extension plain; do queue_new "$install" "$install"; done
  for one in extension plain ${queue_pgmq:+pgmq}; do queue_fill "$one" 1000; done

  queue_flush off
  for clients in 4 1 16; do
    one=
    if [ "$clients" = 4 ]; then one=1.5; fi
    queue_compare "cycle$clients" cycle 1 "$clients" 'Cycles, synchronous_commit off' cycles/s "$one" 'a cycle, synchronous_commit off'
  done
  queue_compare send send 1 4 'Sends, synchronous_commit off' messages/s '' ''
  queue_compare batch batch 100 4 'Cycles of 100 messages, synchronous_commit off' messages/s 3 'cycles of 100 messages'
  queue_flush on
  queue_compare flushed cycle 1 4 'Cycles, each commit flushed' cycles/s 1 'a cycle, each commit flushed'
  queue_flush off
  for one in extension plain ${queue_pgmq:+pgmq}; do queue_fill "$one" $many; done
  queue_compare pop pop 1 4 'pop, synchronous_commit off' messages/s 2 pop

  stage "$(thousands $backlog) messages that wait, and as many that are put off"
  for install in extension plain; do
    for one in backlog delayed; do queue_new "${install}_$one" "$install"; done
    queue_fill "${install}_backlog" $backlog
    queue_fill "${install}_delayed" $backlog 86400
    queue_fill "${install}_delayed" 1000
    queue_new "${install}_few" "$install"
    queue_fill "${install}_few" 1000
    for one in few backlog delayed; do candidate "${one}_$install" "$install, $one" "${install}_$one" bench_service queue_cycle.sql 1; done
  done
  group waiting 1 {few,backlog,delayed}_extension {few,backlog,delayed}_plain
  table waiting "Cycles with 1,000 messages waiting (few), with $(thousands $backlog) (backlog), with $(thousands $backlog) put off (delayed)" cycles/s \
    {few,backlog,delayed}_extension {few,backlog,delayed}_plain -- \
    backlog_extension/few_extension=0.77="a cycle beside $(thousands $backlog) messages, extension: × beside 1,000" \
    delayed_extension/few_extension=0.67="a cycle with $(thousands $backlog) put off, extension: × with none" \
    backlog_plain/few_plain=0.77="a cycle beside $(thousands $backlog) messages, plain: × beside 1,000" \
    delayed_plain/few_plain=0.67="a cycle with $(thousands $backlog) put off, plain: × with none"

  stage '100,000 messages in 1,000 groups'
  for install in extension plain; do
    sql "$install" bench_service -c "select count(*) from generate_series(1, 100), nightowls.send_batch('grouped', array_fill('1'::jsonb, array[1000]),
      group_keys => array(select 'g' || i from generate_series(1, 1000) i))" >/dev/null
    candidate "groups_$install" "$install" "$install" bench_service queue_groups.sql 1
  done
  asked=(groups_extension groups_plain)
  if [ -n "$queue_pgmq" ]; then
    sql pgmq postgres -c "select count(*) from generate_series(1, 100), pgmq.send_batch('grouped', array_fill('1'::jsonb, array[1000]),
      array(select jsonb_build_object('x-pgmq-group', 'g' || i) from generate_series(1, 1000) i))" >/dev/null
    candidate groups_pgmq 'pgmq, read_grouped_head' pgmq bench_service queue_groups_pgmq.sql 1
    asked+=(groups_pgmq)
  fi
  group groups 1 "${asked[@]}"
  table groups '10 messages of 100,000 in 1,000 groups, read and rolled back' reads/s "${asked[@]}" --
  for install in extension plain; do
    median=$(awk '{print $1 / 1000}' "$home/results/$part/groups/groups_$install.latency" | quantile 0.5)
    judge_at_most "10 of 100,000 messages in 1,000 groups, $install, ms" "$median" "$(printf '%.2f' "$median")" 5 '≤ 5'
  done

  stage 'a snapshot held, clients: 4'
  for install in extension plain; do
    queue_new "${install}_held" "$install"
    queue_fill "${install}_held" 1000
    sql "${install}_few" postgres -c 'vacuum nightowls.queue_messages'
    candidate "free_$install" "$install, free" "${install}_few" bench_service queue_cycle.sql 1
    candidate "held_$install" "$install, held" "${install}_held" bench_service queue_cycle.sql 1
  done
  asked=(free_extension held_extension free_plain held_plain)
  local holders=(extension_held plain_held)
  if [ -n "$queue_pgmq" ]; then
    queue_new_pgmq pgmq_held
    queue_fill pgmq_held 1000
    queue_new_pgmq pgmq_few
    queue_fill pgmq_few 1000
    candidate free_pgmq 'pgmq, free' pgmq_few bench_service queue_cycle_pgmq.sql 1
    candidate held_pgmq 'pgmq, held' pgmq_held bench_service queue_cycle_pgmq.sql 1
    asked+=(free_pgmq held_pgmq)
    holders+=(pgmq_held)
  fi
  hold_snapshots "${holders[@]}"
  rounds=$turns group held 4 "${asked[@]}"
  read -r held seconds <<<"$(snapshots_held)"
  [ "$held" = ${#holders[@]} ] || die 'a snapshot was not held open'
  release_snapshots
  table held "Cycles, a snapshot held for $seconds s at the end" cycles/s "${asked[@]}" -- \
    held_extension/free_extension=0.9="cycles with a snapshot held for $seconds s, extension: × without" \
    held_plain/free_plain=0.9="cycles with a snapshot held for $seconds s, plain: × without" ${queue_pgmq:+held_pgmq/free_pgmq}
  for install in extension plain ${queue_pgmq:+pgmq}; do
    read -r median least most <<<"$(ratio held "held_$install" "free_$install" 5)"
    if [ "$install" = pgmq ]; then
      out '' "The last 5 rounds of pgmq with the snapshot held: $median × without ($least–$most)."
    else
      judge "the last 5 rounds of it, $install: × without" "$median" "$median ($least–$most)" 0.9 '≥ 0.9'
    fi
  done
  sql postgres postgres -c 'alter system reset synchronous_commit' -c 'select pg_reload_conf()' >/dev/null
}
