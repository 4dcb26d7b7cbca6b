-- pgbench: the same with pgmq.
select count(*) from pgmq.send_batch('jobs', array_fill(:payload::jsonb, array[100]));
select array_agg(msg_id)::text as ids from pgmq.read('jobs', 60, 100) \gset
select count(*) from pgmq.delete('jobs', :ids::bigint[]);
