# shellcheck shell=bash disable=SC2034,SC2154
# A part of make bench (scripts/bench.sh): appends, one by one and in batches, beside a plain insert and message-db.

append_batch_size=100

bench_append() {
  title 'Append'
  out '' "- The bars hold at 4 clients." \
    '- A plain insert goes into `create table … (like nightowls.events including all)`.' \
    "- An event has a payload of ${#payload} bytes and, if not said otherwise, no event_id. Aggregates get 10 events each; a batch goes to a new one." \
    "- A batch of $append_batch_size counts as $append_batch_size events, its times are for the whole batch." \
    "- message-db 1.3.1 (\`write_message\`) writes one message a call, so its batch is $append_batch_size calls in one statement. Its rows always have an id and another" \
    '  set of indexes. It lets one transaction at a time write to a category; most users have a handful of categories.'
  local measured=(1 4 16) clients asked
  if [ "$mode" = quick ]; then measured=(4); fi
  new_database indexed extension
  sql indexed postgres -c 'select nightowls.create_type_index()' >/dev/null
  append_message_db=
  if append_make_message_db; then append_message_db=yes; fi
  append_candidates

  for clients in "${measured[@]}"; do
    stage "single append, clients: $clients"
    asked=(extension plain insert message_db message_db_50)
    if [ "$clients" = 4 ]; then asked+=(indexed); fi
    append_with_message_db "${asked[@]}"
    group "single$clients" "$clients" "${kept[@]}"
    if [ "$clients" = 4 ]; then
      append_with_message_db "${asked[@]}" -- \
        extension/insert=0.6='single append, extension: × plain insert' extension/message_db=2='single append, extension: × message-db' \
        plain/insert=0.6='single append, plain: × plain insert' plain/message_db=2='single append, plain: × message-db' \
        extension/message_db_50 plain/message_db_50 indexed/extension
    else
      append_with_message_db "${asked[@]}" -- extension/insert extension/message_db extension/message_db_50 plain/insert plain/message_db plain/message_db_50
    fi
    table "single$clients" 'Single append' events/s "${kept[@]}"
  done

  stage 'single append with an event_id, clients: 4'
  group id 4 extension_id insert_id
  table id 'Single append with an event_id' events/s extension_id insert_id -- extension_id/insert_id

  for clients in "${measured[@]}"; do
    stage "batch of $append_batch_size, clients: $clients"
    asked=(batch_extension batch_plain batch_insert)
    if [ "$clients" = 4 ]; then asked+=(batch_message_db); fi
    append_with_message_db "${asked[@]}"
    group "batch$clients" "$clients" "${kept[@]}"
    if [ "$clients" = 4 ]; then
      append_with_message_db "${asked[@]}" -- batch_extension/batch_insert=0.75="batch of $append_batch_size, extension: × multi-row insert" \
        batch_plain/batch_insert=0.75="batch of $append_batch_size, plain: × multi-row insert" batch_extension/batch_message_db batch_plain/batch_message_db
    else
      append_with_message_db "${asked[@]}" -- batch_extension/batch_insert batch_plain/batch_insert
    fi
    table "batch$clients" "Batch of $append_batch_size" events/s "${kept[@]}"
  done
}

append_candidates() {
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

  candidate batch_extension 'append_events, extension' extension $service append_batch.sql $append_batch_size -D kind=account \
    -D "batch=$(batch $append_batch_size)"
  candidate batch_plain 'append_events, plain' plain $service append_batch.sql $append_batch_size -D kind=account -D "batch=$(batch $append_batch_size)"
  append_insert_batch >"$home/results/insert_batch.sql"
  candidate batch_insert 'plain multi-row insert' extension $service "$home/results/insert_batch.sql" $append_batch_size -D kind=account
  candidate batch_message_db 'message-db, one category' message_db message_store write_message_batch.sql $append_batch_size \
    -D kind=account -D categories=1 -D batch_size=$append_batch_size
}

# The rows of append_batch.sql as one insert, each with parameters of its own (pgbench takes 255 of them).
append_insert_batch() {
  local i
  head -n 3 "$root/benches/append_batch.sql"
  printf '%s\n' 'insert into bench.events (org_id, aggregate_type, aggregate_id, version, event_type, payload)' 'values'
  for ((i = 1; i <= append_batch_size; i++)); do
    printf "  ('%s', 'account', :id, %s, 'order_paid', :payload)%s\n" "$org" "$i" "$([ "$i" = "$append_batch_size" ] && echo ';' || echo ,)"
  done
}

# message-db's SQL comes from its npm package and stays out of this repository.
append_make_message_db() {
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
  part_databases+=(message_db)
}

append_with_message_db() { # the arguments, without those of message-db where there is none
  local one
  kept=()
  for one in "$@"; do
    if [ -n "$append_message_db" ] || [[ $one != *message_db* ]]; then kept+=("$one"); fi
  done
}
