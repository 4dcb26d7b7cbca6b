-- pgbench: append.sql with an idempotency key.
\set n :n + 1
\set aggregate :n / :per
select "position", version
  from nightowls.append_event(:kind, :run || '-' || :client_id || '-' || :aggregate, :event_type, :payload,
                              event_id => gen_random_uuid());
