-- pgbench: one append a commit, in turn to aggregates that are there. Each client has its own, so that none waits.
\set n :n + 1
\set aggregate :n % (:aggregates / :clients) * :clients + :client_id + 1
select "position", version
  from nightowls.append_event(:kind, 'existing-' || :aggregate, :event_type, :payload);
