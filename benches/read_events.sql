-- pgbench: the last :max_events events, as a consumer gets them.
select * from nightowls.read_events(:after, :max_events);
