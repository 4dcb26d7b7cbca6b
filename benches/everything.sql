-- Something to do for every part of the clock, for as long as benches/clock.sh measures: as the superuser, with :org and :scale.
select set_config('nightowls.org_id', :'org', false);
select nightowls.create_queue('late' || i) from generate_series(1, 4) i;
select count(*) from generate_series(1, 4) i, nightowls.send_batch('late' || i, array_fill('1'::jsonb, array[(10000 * :scale)::int]), delay => 600);
select nightowls.create_consumer('busy');
select nightowls.create_projection('followed' || i, 'thing', '{"otherwise": [{"op": "add", "path": "n"}]}', mode => 'async') from generate_series(1, 5) i;
select nightowls.create_projection('snapped', 'thing', '{"otherwise": [{"op": "add", "path": "n"}]}');
select nightowls.set_snapshot_policy('snapped', null);
select count(*) from generate_series(1, (500 * :scale)::int) i, nightowls.append_events('thing', i::text,
         (select jsonb_agg('{"event_type": "noted"}'::jsonb) from generate_series(1, 20)));
select nightowls.set_snapshot_policy('snapped', 1);
select nightowls.set_compaction('thing', keep => 1, min_events => 1);
select nightowls.seek('busy', (select max(position) from nightowls.events));
select nightowls.create_view_projection('counts' || i, 'select e.org_id, e.aggregate_type, count(*) as n from nightowls.events e group by 1, 2', '1 second')
  from generate_series(1, 3) i;
set session_replication_role = replica;
update nightowls.queue_messages set due_at = now() - interval '1 second' where state = 'd';
insert into nightowls.floors (org_id, container, ticket, fence, released_at)
select :'org', 'f' || i, 1, i, now() - interval '2 days' from generate_series(1, 10000 * :scale) i on conflict do nothing;
insert into nightowls.scratchpad (org_id, scope, key, version, updated_at)
select :'org', 's', i::text, 2, now() - interval '31 days' from generate_series(1, 20000 * :scale) i;
insert into nightowls.followups (org_id, thread_id, due_at, msg_id, status, finished_at)
select :'org', 't', now(), i, 'done', now() - interval '31 days' from generate_series(1, 20000 * :scale) i;
reset session_replication_role;
vacuum analyze;
