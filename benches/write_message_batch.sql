-- pgbench: append_batch.sql for message-db, which takes one message a call: the calls of one commit in one statement.
\set n :n + 1
\set category random(1, :categories)
select write_message(gen_random_uuid()::varchar, :kind || :category || '-' || :run || '-' || :client_id || '-' || :n,
                     :event_type, :payload)
  from generate_series(1, :batch_size);
