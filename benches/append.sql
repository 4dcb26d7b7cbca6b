-- pgbench: one append a commit. Each aggregate gets :per events, then the next one begins.
\set n :n + 1
\set aggregate :n / :per
select "position", version
  from nightowls.append_event(:kind, :run || '-' || :client_id || '-' || :aggregate, :event_type, :payload);
