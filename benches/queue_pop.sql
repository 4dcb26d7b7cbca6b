-- pgbench: one message out of many, read and deleted at once.
select * from nightowls.pop('jobs');
