# shellcheck shell=bash disable=SC2034,SC2154
# A part of make bench (scripts/bench.sh): reading the log as a consumer, while an old snapshot is open and while none is.

bench_consumers() {
  title 'Consumers'
  local install one held seconds median least most events=400000 turns=15 late=5
  if [ "$mode" = quick ]; then events=60000 turns=3 late=2; fi
  out '' "- A cycle is \`fetch_events\` of 5 events and \`commit_offset\` in one transaction, of a log with $(thousands "$events") events to come." \
    '- "held": another session has a REPEATABLE READ transaction open in that database all the while; "free": nobody has. The two take turns, in' \
    '  databases of the same making on one server. What is held grows by the rows that each cycle leaves behind, so the last rounds count by themselves too.'

  stage "a log of $(thousands "$events") events for each"
  new_database extension_held extension
  new_database plain_held plain
  for install in extension plain; do
    for one in "$install" "${install}_held"; do
      sql "$one" postgres -v "org=$org" -v "payload=$payload" -v "events=$events" -f "$root/benches/backlog.sql"
    done
    candidate "free_$install" "$install, free" "$install" bench_service consume.sql 5 -D consumer=mail -D max_events=5
    candidate "held_$install" "$install, held" "${install}_held" bench_service consume.sql 5 -D consumer=mail -D max_events=5
  done

  stage 'fetch_events and commit_offset, with and without a snapshot held, clients: 1'
  hold_snapshots extension_held plain_held
  rounds=$turns group flat 1 free_extension held_extension free_plain held_plain
  read -r held seconds <<<"$(snapshots_held)"
  [ "$held" = 2 ] || die 'a snapshot was not held open'
  release_snapshots
  # Who has come to the end has measured nothing.
  for install in extension plain; do
    for one in "$install" "${install}_held"; do
      [ "$(sql "$one" postgres -c "select lag_events > 0 from nightowls.consumer_lag where consumer = 'mail'")" = t ] ||
        die "$one: the consumer has come to the end of the log"
    done
  done
  table flat "Cycles of 5 events, $turns rounds of $length s each, a snapshot held for $seconds s at the end" events/s \
    free_extension held_extension free_plain held_plain -- \
    held_extension/free_extension=0.9="consumer with a snapshot held for $seconds s, extension: × without" \
    held_plain/free_plain=0.9="consumer with a snapshot held for $seconds s, plain: × without"
  for install in extension plain; do
    read -r median least most <<<"$(ratio flat "held_$install" "free_$install" "$late")"
    judge "the last $late rounds of it, $install: × without" "$median" "$median ($least–$most)" 0.9 '≥ 0.9'
  done
}
