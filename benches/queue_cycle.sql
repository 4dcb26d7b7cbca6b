-- pgbench: send, read, ack; a commit each. There is always a message to read.
select nightowls.send('jobs', :payload);
select msg_id, receipt from nightowls.read('jobs', 60, 1) \gset
select nightowls.ack('jobs', :msg_id, :receipt);
