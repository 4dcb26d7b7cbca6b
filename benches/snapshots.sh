# shellcheck shell=bash disable=SC2034,SC2154
# A part of make bench (scripts/bench.sh): a long history loaded from a snapshot, and moved out of the log in slices.

bench_snapshots() {
  title 'Snapshots and compaction'
  local install history=1000000 short=1000 what slices longest all moved events
  if [ "$mode" = quick ]; then history=100000; fi
  events="(select jsonb_agg(jsonb_build_object('event_type', 'order_paid', 'payload', '$payload'::jsonb)) from generate_series(1, $short))"
  out '' "- An aggregate of $(thousands "$history") events with a snapshot at $(thousands $((history - short))), and one of $(thousands "$short") without any. Both are loaded at" \
    "  their last version but one, for which no state is stored, so that each load folds $((short - 1)) events."

  for install in extension plain; do
    stage "aggregates of $(thousands "$history") and of $(thousands "$short") events, $install"
    sql "$install" postgres -v "org=$org" -v "payload=$payload" -v "events=$((history - short))" -f "$root/benches/long_history.sql"
    # The build takes a snapshot of the long one, the appends go on without.
    sql "$install" "$(owner_of "$install")" -c "select nightowls.create_projection('ledgers', 'ledger', '$reducer')" \
      -c "select nightowls.create_snapshot('ledgers', 'long')" -c "select nightowls.set_snapshot_policy('ledgers', null)" \
      -c "select count(*) from nightowls.append_events('ledger', 'long', $events)" \
      -c "select count(*) from nightowls.append_events('ledger', 'short', $events)" >/dev/null
    candidate "long_$install" "$install, the long one" "$install" bench_service load.sql 1 -D aggregate=long -D "version=$((history - 1))"
    candidate "short_$install" "$install, the short one" "$install" bench_service load.sql 1 -D aggregate=short -D "version=$((short - 1))"
  done
  stage 'loading them, clients: 1'
  group load 1 long_extension short_extension long_plain short_plain
  table load 'Loading a state' loads/s long_extension short_extension long_plain short_plain -- \
    long_extension/short_extension=0.67="loading $(thousands "$history") events with a snapshot, extension: × $(thousands "$short") (0.67: at most 1.5 times the cost)" \
    long_plain/short_plain=0.67="loading $(thousands "$history") events with a snapshot, plain: × $(thousands "$short") (0.67: at most 1.5 times the cost)"

  out '' "### The $(thousands "$history") events moved: compact_aggregate with its defaults, called until there is no more to do" '' \
    '| | events moved | transactions | longest, s | all, s |' '| --- | ---: | ---: | ---: | ---: |'
  for install in extension plain; do
    for what in archive restore delete; do
      stage "$what, $install"
      # The states that a replay has proven for the archive are those that a deletion needs, so it has less to do.
      snapshots_slices "$install" "$what" >"$home/results/slices"
      read -r slices longest all moved <<<"$(awk -F '|' '{n++; all += $1; if ($1 > most) most = $1; moved += $2}
        END {printf "%d %.2f %.1f %d", n, most, all, moved}' "$home/results/slices")"
      note "$install: $what, $moved events in $slices slices, the longest $longest s, $all s in all"
      out "| $what, $install | $(thousands "$moved") | $slices | $longest | $all |"
      judge_at_most "the longest transaction of $what, $install, s" "$longest" "$longest" 2 '≤ 2'
    done
  done
}

# Calls until there is nothing more to move: seconds|events moved, a line a transaction.
snapshots_slices() { # <install> <archive, restore or delete>
  local call before after said=t
  case $2 in
    restore) call="nightowls.restore_aggregate('ledger', 'long')" ;;
    *) call="nightowls.compact_aggregate('ledger', 'long', mode => '$2')" ;;
  esac
  while [ "${said##*|}" = t ]; do
    before=$(date +%s.%N)
    said=$(sql "$1" bench_service -c "select c.moved, c.more from $call c")
    after=$(date +%s.%N)
    printf '%s|%s\n' "$(awk -v a="$after" -v b="$before" 'BEGIN {printf "%.3f", a - b}')" "${said%%|*}"
  done
}
