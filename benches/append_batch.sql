-- pgbench: a batch a commit, each to a new aggregate; :batch is the JSON array of events.
\set n :n + 1
\set id (:clients * 100 + :round) * 100000000 + :n * 100 + :client_id
select "position", version
  from nightowls.append_events(:kind, :id, :batch);
