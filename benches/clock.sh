# shellcheck shell=bash disable=SC2034,SC2154
# A part of make bench (scripts/bench.sh): whether tick keeps to its time while there is a backlog of everything.

bench_clock() {
  title 'The clock'
  local install scale=10 ms before after took off rest
  local bounds=(1000 3000)
  if [ "$mode" = quick ]; then scale=3 bounds=(1000); fi
  out '' "- A backlog of everything: $(thousands $((40000 * scale))) messages that are due, $(thousands $((10000 * scale))) events for five async projections, snapshots, compaction," \
    "  views, floors, keys and followups to remove. tick is called with each bound in turn; the time is the client's." '' \
    '| | max_ms | took, ms | deviation | parts that are late |' '| --- | ---: | ---: | ---: | ---: |'
  for install in extension plain; do
    stage "a backlog of everything, $install"
    sql "$install" postgres -v "org=$org" -v "scale=$scale" -f "$root/benches/everything.sql" >/dev/null
    for ms in "${bounds[@]}"; do
      before=$(date +%s%N)
      sql "$install" bench_service -c "select count(*) from nightowls.tick($ms)" >/dev/null
      after=$(date +%s%N)
      took=$(((after - before) / 1000000))
      off=$(awk -v t="$took" -v m="$ms" 'BEGIN {d = t / m - 1; printf "%.2f", d < 0 ? -d : d}')
      rest=$(sql "$install" bench_service -c "select count(*) from nightowls.clock_parts where ran_at is null")
      note "$install: tick($ms) took $took ms"
      out "| $install | $ms | $took | $off | $rest |"
      judge_at_most "tick($ms) with a backlog of everything, $install: off its bound by" "$off" "$off" 0.2 '≤ 0.20'
    done
  done
}
