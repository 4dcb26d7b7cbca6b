-- pgbench: the rows of read_events.sql by a plain select, which could miss events that commit late.
select *
  from nightowls.events e
 where e.org_id = :org and e."position" > :after
 order by e."position"
 limit :max_events;
