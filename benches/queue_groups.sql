-- pgbench: ten messages of a thousand groups, and back.
begin;
select count(*) from nightowls.read('grouped', 60, 10);
rollback;
