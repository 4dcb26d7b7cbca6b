# shellcheck shell=bash disable=SC2034,SC2154
# A part of make bench (scripts/bench.sh): appends that a projection follows.

bench_projections() {
  title 'Appends with an inline projection'
  out '' '- 4 ops an event, a state of 5 keys.'
  local install
  for install in extension plain; do
    candidate "existing_$install" "$install, $aggregates aggregates in turn" "$install" bench_service append_existing.sql 1 \
      -D kind=order -D aggregates=$aggregates
    candidate "new_$install" "$install, each to a new aggregate" "$install" bench_service append.sql 1 -D kind=order -D per=1
  done
  candidate insert 'plain insert' extension bench_service insert.sql 1 -D kind=account -D per=10
  stage 'single append with an inline projection, clients: 4'
  group projected 4 existing_extension new_extension insert new_plain existing_plain
  table projected 'Single append with an inline projection' events/s \
    existing_extension new_extension existing_plain new_plain insert -- \
    existing_extension/insert=0.4='append with a projection, extension, existing aggregates: × plain insert' \
    new_extension/insert=0.4='append with a projection, extension, new aggregates: × plain insert' \
    existing_plain/insert=0.4='append with a projection, plain, existing aggregates: × plain insert' \
    new_plain/insert=0.4='append with a projection, plain, new aggregates: × plain insert'
}
