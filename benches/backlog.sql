-- psql, as a superuser: :events events in 1,000 aggregates, and a consumer of theirs. Triggers are off, as this is not what is measured.
\set ON_ERROR_STOP on
set session_replication_role to replica;
insert into nightowls.events (org_id, aggregate_type, aggregate_id, version, event_type, payload)
select :'org', 'parcel', 'p' || n % 1000, 1 + n / 1000, 'order_paid', :'payload'
  from generate_series(0, :events - 1) n;
reset session_replication_role;
select nightowls.create_consumer('mail', '{"aggregate_types": ["parcel"]}') is null as made \gset
vacuum analyze nightowls.events;
