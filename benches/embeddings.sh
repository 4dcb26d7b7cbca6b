# shellcheck shell=bash disable=SC2034,SC2154
# A part of make bench (scripts/bench.sh): what it costs to look for rows to embed when there are none.

bench_embeddings() {
  title 'Embeddings'
  local install what rows=100000 p50
  if [ "$mode" = quick ]; then rows=10000; fi
  out '' "- A table of $rows rows that all have their vector, noted and claimed before; one client." \
    '- `backfill_embeddings` is the extension'"'"'s (the plain one needs pg_net), `claim_embeddings` what a worker outside calls.'
  printf '%s\n' 'select nightowls.backfill_embeddings();' >"$home/embeddings_backfill.sql"
  printf '%s\n' "select nightowls.claim_embeddings('docs');" >"$home/embeddings_claim.sql"
  for install in extension plain; do
    stage "embedding $rows rows, $install"
    sql "$install" "$(owner_of "$install")" -v "rows=$rows" -v "org=$org" -f "$root/benches/embeddings.sql" >/dev/null
    candidate "embeddings_claim_$install" "claim_embeddings, $install" "$install" bench_service "$home/embeddings_claim.sql" 1
  done
  candidate embeddings_backfill 'backfill_embeddings, extension' extension bench_service "$home/embeddings_backfill.sql" 1
  stage 'idle calls, clients: 1'
  group idle 1 embeddings_backfill embeddings_claim_extension embeddings_claim_plain
  table idle 'Idle calls' calls/s embeddings_backfill embeddings_claim_extension embeddings_claim_plain --
  for what in embeddings_backfill embeddings_claim_extension embeddings_claim_plain; do
    p50=$(quantile 0.5 <"$home/results/$part/idle/$what.latency")
    judge_at_most "an idle call of ${label[$what]}, p50" "$p50" "$(awk -v us="$p50" 'BEGIN {printf "%.2f ms", us / 1000}')" 1000 '1 ms'
  done
}
