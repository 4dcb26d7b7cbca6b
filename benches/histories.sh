# shellcheck shell=bash disable=SC2034,SC2154
# A part of make bench (scripts/bench.sh): appends to an aggregate with a long history.

bench_histories() {
  title 'Long histories'
  out '' '- The bars hold at 1 client: a second appender to one aggregate waits for the first one'"'"'s commit.'
  local install held seconds history=1000000
  if [ "$mode" = quick ]; then history=200000; fi
  stage "an aggregate of $(thousands "$history") events"
  for install in extension plain; do
    sql "$install" postgres -v "org=$org" -v "payload=$payload" -v "events=$history" -f "$root/benches/long_history.sql"
    candidate "long_$install" "$install, to the long aggregate" "$install" bench_service append_one.sql 1 -D kind=ledger -D aggregate=long
    candidate "short_$install" "$install, each to a new aggregate" "$install" bench_service append.sql 1 -D kind=ledger -D per=1
  done
  group long 1 long_extension short_extension long_plain short_plain
  table long "Append to an aggregate of $(thousands "$history") events" events/s long_extension short_extension long_plain short_plain -- \
    long_extension/short_extension=0.8="append to $(thousands "$history") events, extension: × to a new aggregate" \
    long_plain/short_plain=0.8="append to $(thousands "$history") events, plain: × to a new aggregate"

  stage 'the same while another session holds a snapshot open'
  hold_snapshots extension plain
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
  release_snapshots
}
