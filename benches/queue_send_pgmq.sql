-- pgbench: the same with pgmq.
select pgmq.send('jobs', :payload::jsonb);
