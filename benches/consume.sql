-- pgbench: a consumer's cycle, the next :max_events events and their commit, a commit each.
with batch as materialized (
  select f.fence, f."position" from nightowls.fetch_events(:consumer, :max_events) f
)
select nightowls.commit_offset(:consumer, max(b."position"), max(b.fence)) from batch b having count(*) > 0;
