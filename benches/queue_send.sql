-- pgbench: one message sent.
select nightowls.send('jobs', :payload);
