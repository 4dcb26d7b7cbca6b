-- pgbench: the same with pgmq.
begin;
select count(*) from pgmq.read_grouped_head('grouped', 60, 10);
rollback;
