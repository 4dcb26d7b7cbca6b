-- pgbench: the same with pgmq.
select pgmq.send('jobs', :payload::jsonb);
select msg_id from pgmq.read('jobs', 60, 1) \gset
select pgmq.delete('jobs', :msg_id::bigint);
