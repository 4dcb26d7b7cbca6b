-- pgbench: append.sql for message-db, in one category or in several.
\set n :n + 1
\set stream :n / :per
\set category random(1, :categories)
select write_message(gen_random_uuid()::varchar, :kind || :category || '-' || :run || '-' || :client_id || '-' || :stream,
                     :event_type, :payload);
