# shellcheck shell=bash disable=SC2034,SC2154
# A part of make bench (scripts/bench.sh): reading the end of the log.

bench_reads() {
  title 'Reads'
  local install after history=1000000
  if [ "$mode" = quick ]; then history=200000; fi
  stage 'reading the last 1,000 events, clients: 1'
  for install in extension plain; do
    sql "$install" postgres -v "org=$org" -v "payload=$payload" -v "events=$history" -f "$root/benches/long_history.sql"
    after=$(sql "$install" postgres -c "select e.\"position\" from nightowls.events e where e.org_id = '$org' order by e.\"position\" desc offset 1000 limit 1")
    candidate "read_$install" "read_events, $install" "$install" bench_service read_events.sql 1000 -D max_events=1000 -D "after=$after"
    if [ "$install" = extension ]; then
      candidate read_select 'plain select' extension bench_service select_events.sql 1000 -D max_events=1000 -D "after=$after"
    fi
  done
  group read 1 read_extension read_plain read_select
  table read 'The last 1,000 events' events/s read_extension read_plain read_select -- read_extension/read_select read_plain/read_select
}
