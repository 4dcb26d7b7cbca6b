# shellcheck shell=bash disable=SC2034,SC2154
# A part of make bench (scripts/bench.sh): the outbox. benches/dispatch.rs is the client and the receiver.

declare -A dispatch_figure
dispatch_measure() { # <argument of benches/dispatch.rs>…: its figures are in dispatch_figure
  local name value said
  dispatch_figure=()
  said=$("$target/release/examples/dispatch" "$socket" "$port" extension bench_service "$@" 2>"$home/dispatch.log") ||
    die "benches/dispatch.rs $*: $(tail -n 1 "$home/dispatch.log")"
  while IFS='|' read -r name value; do dispatch_figure[$name]=$value; done <<<"$said"
  note "$*: $(tr '\n' ' ' <<<"$said")"
}

bench_dispatch() {
  title 'The outbox'
  local count=20000 single=300 seconds=30 waited=0
  if [ "$mode" = quick ]; then count=4000 single=100 seconds=10; fi
  stage 'the outbox'
  (cd "$root" && cargo build --quiet --release --example dispatch) || die 'benches/dispatch.rs does not build'
  restart_server "shared_preload_libraries = 'nightowls'" "nightowls.databases = 'extension'" 'nightowls.allow_http = on' 'nightowls.allow_private = on'
  until [ "$(sql extension postgres -c 'select nightowls._worker_runs()')" = t ]; do
    sleep 0.1
    waited=$((waited + 1))
    [ "$waited" -lt 300 ] || die "the worker does not start: $home/server.log"
  done
  sql extension postgres -c "grant pg_monitor to bench_service" >/dev/null

  out '' '- The receiver is a process on the same machine that answers 200 at once, over connections that are kept; requests are signed; 64 are under way at most.' \
    '- Requests a second: from the commit of the enqueuing to the settlement of the last one. enqueue → arrival: from sending the statement, which commits by itself,' \
    '  with nothing else to do, to the arrival of the request.' '' '| the worker | |' '| --- | ---: |'
  dispatch_measure rate "$count"
  out "| requests a second, sent and settled | $(thousands "${dispatch_figure[rate]}") |"
  judge 'requests a second, 64 in flight' "${dispatch_figure[rate]}" "$(thousands "${dispatch_figure[rate]}")" 1000 '≥ 1,000'
  dispatch_measure latency "$single" 20
  out "| enqueue → arrival, p50 ms | ${dispatch_figure[p50]} |" "| enqueue → arrival, p99 ms | ${dispatch_figure[p99]} |"
  judge_at_most 'enqueue → arrival, p50 ms' "${dispatch_figure[p50]}" "${dispatch_figure[p50]} (p99 ${dispatch_figure[p99]})" 5 '< 5'
  dispatch_measure idle "$seconds"
  out "| idle, ${dispatch_figure[processes]} processes, % of a core | ${dispatch_figure[cpu]} |"
  judge_at_most 'idle worker, % of a core' "${dispatch_figure[cpu]}" "${dispatch_figure[cpu]}" 0.1 '< 0.1'
}
