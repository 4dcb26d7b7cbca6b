-- pgbench: the rows of append.sql by a plain insert into a table with the same columns and indexes.
\set n :n + 1
\set aggregate :n / :per
\set version :n % :per + 1
insert into bench.events (org_id, aggregate_type, aggregate_id, version, event_type, payload)
values (:org, :kind, :run || '-' || :client_id || '-' || :aggregate, :version, :event_type, :payload);
