-- psql, as a superuser: an aggregate with a long history. Triggers are off, as this is not what is measured.
\set ON_ERROR_STOP on
set session_replication_role to replica;
insert into nightowls.events (org_id, aggregate_type, aggregate_id, version, event_type, payload)
select :'org', 'ledger', 'long', v, 'order_paid', :'payload'
  from generate_series(1, :events) v;
reset session_replication_role;
vacuum analyze nightowls.events;
checkpoint;
