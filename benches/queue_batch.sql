-- pgbench: send, read and ack of 100 messages; a commit each.
select count(*) from nightowls.send_batch('jobs', array_fill(:payload::jsonb, array[100]));
select array_agg(msg_id)::text as ids, array_agg(receipt)::text as receipts from nightowls.read('jobs', 60, 100) \gset
select count(*) from nightowls.ack_many('jobs', :ids::bigint[], :receipts::uuid[]);
