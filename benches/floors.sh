# shellcheck shell=bash disable=SC2034,SC2154
# A part of make bench (scripts/bench.sh): floors, and waiting for them and for messages. pgbench cannot measure what one session
# waits for another, so benches/waiting.rs does.

declare -A floors_figure
floors_measure() { # <database> <role> <argument of benches/waiting.rs>…: its figures are in floors_figure
  local name value install=$1 role=$2 said
  shift 2
  floors_figure=()
  said=$("$target/release/examples/waiting" "$socket" "$port" "$install" "$role" "$@" 2>"$home/waiting.log") ||
    die "benches/waiting.rs $*: $(tail -n 1 "$home/waiting.log")"
  while IFS='|' read -r name value; do floors_figure[$name]=$value; done <<<"$said"
  note "$install, $*: $(tr '\n' ' ' <<<"$said")"
}

# pgmq's SQL comes from its crate and stays out of this repository; cargo fetches it as it fetches any crate.
floors_make_pgmq() {
  local crate=pgmq@0.34.0-alpha.7 folder found
  cargo info --quiet --registry crates-io "$crate" >/dev/null 2>"$home/pgmq.log" || cargo info --quiet "$crate" >/dev/null 2>>"$home/pgmq.log" || true
  folder=${CARGO_HOME:-$HOME/.cargo}/registry/src
  found=$(find "$folder" -path '*/pgmq-0.34.0-alpha.7/*' -name 'pgmq.sql' 2>/dev/null | head -n 1)
  if [ -z "$found" ]; then
    skip "pgmq (the crate $crate cannot be had here)"
    return 1
  fi
  new_database pgmq extension
  sql pgmq postgres -f "$found" -c 'grant usage on schema pgmq to bench_service' >/dev/null 2>"$home/pgmq.log" || {
    skip "pgmq (its install failed: ${home#"$root"/}/pgmq.log)"
    return 1
  }
}

bench_floors() {
  title 'Floors, and waiting'
  local flush two p50 p99 waiters install rounds=300 slow=80 seconds=4 minute=60 pause=60 pgmq=
  if [ "$mode" = quick ]; then rounds=60 slow=15 seconds=1 minute=6; fi
  stage 'floors and waiting'
  (cd "$root" && cargo build --quiet --release --example waiting) || die 'benches/waiting.rs does not build'
  restart_server "shared_preload_libraries = 'nightowls'" 'max_connections = 600'

  floors_measure extension bench_service flush
  flush=${floors_figure[flush]}
  two=$(awk -v flush="$flush" 'BEGIN {printf "%.3f", 2 * flush}')
  out '' "- Hand-over: from the moment a holder sends its release to the moment the next one's \`await_floor\` returns, both committed: the time holds two" \
    "  flushes of the log, of $flush ms each (the median of the smallest write with synchronous_commit on, less that with off, in the same run)." \
    '- Who has released asks again at once, so that the line is always as long as said; each holds the floor for 5 ms (twin: 100 ms).' \
    "- send → receive: from sending to the return of a reader that waits in \`read_with_poll\`, by default of its intervals, $pause ms to $((2 * pause)) ms after the last." \
    '' '| hand-over | p50 ms | p99 ms |' '| --- | ---: | ---: |'
  for waiters in 2 10 50; do
    floors_measure extension bench_service handover "$waiters" "$rounds" 5
    out "| native, $waiters waiters | ${floors_figure[p50]} | ${floors_figure[p99]} |"
    if [ "$waiters" = 10 ]; then
      judge_at_most 'native hand-over at 10 waiters, p50 ms' "${floors_figure[p50]}" "${floors_figure[p50]}" \
        "$(awk -v two="$two" 'BEGIN {print 2 + two}')" "< 2 + two flushes ($two)"
      judge_at_most 'native hand-over at 10 waiters, p99 ms' "${floors_figure[p99]}" "${floors_figure[p99]}" \
        "$(awk -v two="$two" 'BEGIN {print 10 + two}')" "< 10 + two flushes ($two)"
    fi
  done
  for waiters in 1 10; do
    floors_measure plain bench_service handover "$waiters" "$slow" 100
    out "| twin, $waiters waiter$([ "$waiters" = 1 ] || echo s) | ${floors_figure[p50]} | ${floors_figure[p99]} |"
    if [ "$waiters" = 1 ]; then
      judge_at_most 'twin hand-over at 1 waiter, p50 ms' "${floors_figure[p50]}" "${floors_figure[p50]} (p99 ${floors_figure[p99]})" 60 '< 60'
    fi
  done

  out '' '| acquire and release, nobody else asks | a second |' '| --- | ---: |'
  for install in extension plain; do
    for waiters in 1 4; do
      floors_measure "$install" bench_service uncontended "$waiters" "$seconds"
      out "| $install, clients: $waiters | $(thousands "${floors_figure[rate]}") |"
    done
  done

  out '' '| send → receive | p50 ms | p99 ms |' '| --- | ---: | ---: |'
  for install in extension plain; do
    floors_measure "$install" bench_service receive nightowls "$((rounds / 2))" "$pause"
    out "| $([ "$install" = extension ] && echo native || echo twin) | ${floors_figure[p50]} | ${floors_figure[p99]} |"
    if [ "$install" = extension ]; then
      judge_at_most 'native send → receive, p50 ms' "${floors_figure[p50]}" "${floors_figure[p50]} (p99 ${floors_figure[p99]})" \
        "$(awk -v two="$two" 'BEGIN {print 2 + two}')" "< 2 + two flushes ($two)"
    fi
  done
  if floors_make_pgmq; then
    floors_measure pgmq postgres receive pgmq "$((rounds / 2))" "$pause"
    out "| pgmq (the SQL of its crate 0.34.0-alpha.7; its long poll looks every 100 ms) | ${floors_figure[p50]} | ${floors_figure[p99]} |"
  fi

  out '' "| 50 pollers, each every 250 ms, for $minute s; one holder that beats | statements | WAL, kB | rows written, HOT | dead rows at the end | growth, kB |" \
    '| --- | ---: | ---: | ---: | ---: | ---: |'
  for install in extension plain; do
    floors_measure "$install" bench_service pollers 50 250 "$minute"
    out "| $install | $(thousands "${floors_figure[statements]}") | $((floors_figure[wal] / 1024)) | $(thousands "${floors_figure[updates]}"), $(thousands "${floors_figure[hot]}") | ${floors_figure[dead]} | $((floors_figure[growth] / 1024)) |"
  done

  out '' '| 500 who wait in `acquire_floor` for one floor, native | CPU of their backends, % of a core |' '| --- | ---: |'
  for waiters in 250 2500 60000; do
    floors_measure extension bench_service waiters 500 "$waiters" "$([ "$mode" = quick ] && echo 6 || echo 20)"
    out "| poll_ms $waiters: a sign of life every $(awk -v ms="$waiters" 'BEGIN {s = ms / 100; print (s < 5 ? 5 : s)}') s | ${floors_figure[cpu]} |"
  done

  floors_measure extension bench_service crowd 170 "$([ "$mode" = quick ] && echo 6 || echo 30)"
  out '' '| 510 who wait in one call each, native | CPU of their backends, % of a core |' '| --- | ---: |' \
    "| 170 in \`await_floor\` | ${floors_figure[floor]} |" "| 170 in \`read_with_poll\` | ${floors_figure[queue]} |" \
    "| 170 in \`fetch_events\` | ${floors_figure[events]} |"
  judge_at_most '510 who wait, % of a core' "${floors_figure[cpu]}" "${floors_figure[cpu]}" 1 '< 1'
}
