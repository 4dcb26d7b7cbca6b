-- pgbench: one append a commit, always to the same aggregate.
select "position", version
  from nightowls.append_event(:kind, :aggregate, :event_type, :payload);
