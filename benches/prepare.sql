-- psql, as the owner, in a new database with nightowls: an org, the role that appends, the table of plain inserts, a
-- projection and the aggregates with short histories that it keeps.
\set ON_ERROR_STOP on
select nightowls.create_org('bench', null, :'org') is not null as made \gset
select nightowls.set_default_org(:'org') is null as chosen \gset
select nightowls.grant_service('bench_service') is null as granted \gset

create schema bench;
create table bench.events (like nightowls.events including all);
grant usage on schema bench to bench_service;
grant insert on bench.events to bench_service;

select count(*) as appended
  from generate_series(1, :aggregates) a
 cross join lateral nightowls.append_events('order', 'existing-' || a, :'batch') \gset
select nightowls.create_projection('orders', 'order', :'reducer') is null as made \gset
