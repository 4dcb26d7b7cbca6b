-- pgbench: the same with pgmq.
select * from pgmq.pop('jobs');
