# shellcheck shell=bash disable=SC2034,SC2154
# A part of make bench (scripts/bench.sh): how fast events are folded into states.

bench_fold() {
  title 'The fold'
  local install name figure unit bar events=200000
  declare -A fold
  if [ "$mode" = quick ]; then events=50000; fi
  stage 'the fold, native and twin'
  for install in extension plain; do
    while IFS='|' read -r name figure unit; do
      fold[$install,$name]=$figure
      note "$install: $name $(printf '%.0f' "$figure") $unit"
    done < <(sql "$install" postgres -v "events=$events" -v runs=3 -f "$root/benches/fold.sql" | grep '|')
  done
  [ -n "${fold[plain,fold_one]:-}" ] || die 'benches/fold.sql gave no figures'
  out '' '### The fold: 4 ops an event, a state of 5 keys; one backend' '' '| | native (extension) | twin (plain) | native × twin |' '| --- | ---: | ---: | ---: |'
  for name in fold_tail fold_events; do
    out "| \`$name\`, events/s | $(thousands "${fold[extension,$name]}") | $(thousands "${fold[plain,$name]}") | $(awk -v a="${fold[extension,$name]}" -v b="${fold[plain,$name]}" 'BEGIN {printf "%.1f", a / b}') |"
  done
  out "| one event through \`_fold_tail\`, µs | ${fold[extension,fold_one]} | ${fold[plain,fold_one]} | $(awk -v a="${fold[extension,fold_one]}" -v b="${fold[plain,fold_one]}" 'BEGIN {printf "%.1f", b / a}') |"
  for install in extension plain; do
    bar=$([ "$install" = extension ] && echo 300000 || echo 80000)
    judge "the fold, $([ "$install" = extension ] && echo native || echo twin), events/s" "${fold[$install,fold_tail]}" \
      "$(thousands "${fold[$install,fold_tail]}")" "$bar" "≥ $(thousands "$bar")"
  done
}
