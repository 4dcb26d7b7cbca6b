-- pgbench: the rows of append_id.sql by a plain insert.
\set n :n + 1
\set aggregate :n / :per
\set version :n % :per + 1
insert into bench.events (org_id, aggregate_type, aggregate_id, version, event_type, payload, event_id)
values (:org, :kind, :run || '-' || :client_id || '-' || :aggregate, :version, :event_type, :payload, gen_random_uuid());
