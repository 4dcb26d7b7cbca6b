-- The run that scripts/demo-swarm.sh has led, as a timeline. Variables: thread, slug. Stops if it is not as promised.
\set VERBOSITY verbose
\set SHOW_CONTEXT never

create temporary table told as
select e.created_at, e.aggregate_type, e.event_type, e.payload, e.version
  from nightowls.events e
 where e.org_id = nightowls.current_org()
   and (e.aggregate_type in ('run', 'floor', 'process') and e.aggregate_id = :'thread' or e.aggregate_type = 'agent' and e.aggregate_id = :'slug')
union all
select m.created_at, 'message', 'said', m.content || jsonb_build_object('by', m.author_id), m.seq
  from nightowls.list_messages(:'thread') m;

\echo
select to_char(extract(epoch from t.created_at - min(t.created_at) over ()), 'FM990.00') as s,
       case when t.aggregate_type = 'agent' then t.payload -> 'actor' ->> 'id'
            when t.aggregate_type = 'floor' then t.payload ->> 'holder'
            when t.aggregate_type = 'run' then t.payload ->> 'runner'
            else t.payload ->> 'by' end as who,
       case t.event_type
         when 'agent_published' then format('publishes %s, version %s', :'slug', t.payload ->> 'version')
         when 'agent_rolled_back' then format('takes %s back to version %s, as version %s', :'slug', t.payload ->> 'restored_from', t.payload ->> 'version')
         when 'said' then format('"%s"', t.payload ->> 'text')
         when 'floor_granted' then format('gets the floor, fence %s', t.payload ->> 'fence')
         when 'run_queued' then format('starts the run with %s, version %s', :'slug', t.payload ->> 'agent_version')
         when 'run_running' then case t.payload ->> 'before' when 'suspended' then 'goes on from the snapshot' else 'is at work' end
         when 'run_suspended' then 'suspends the run, with a snapshot, and lets go'
         when 'run_completed' then format('completes the run: %s', t.payload ->> 'output')
         when 'refused' then 'tries to publish itself: refused, NW004'
         else format('is %s', t.event_type) end as "what happens"
  from told t
 order by t.created_at;

do $$
begin
  if array(select t.event_type from told t where t.aggregate_type = 'run' order by t.version)
     <> '{run_queued,run_running,run_suspended,run_running,run_completed}' then
    raise exception 'the run did not go the way it should';
  elsif array(select t.payload ->> 'runner' from told t where t.aggregate_type = 'run' order by t.version) <> '{one,one,one,two,two}' then
    raise exception 'the run was not resumed in the other process';
  elsif array(select t.payload ->> 'holder' from told t where t.event_type = 'floor_granted' order by t.version) <> '{one,two}' then
    raise exception 'the floor did not go from one to two';
  elsif array(select t.event_type from told t where t.aggregate_type = 'agent' order by t.version)
        <> '{agent_published,agent_published,agent_rolled_back}' then
    raise exception 'the agent has other versions';
  elsif (select count(*) from told t where t.aggregate_type = 'message') <> 4 then
    raise exception 'messages are missing';
  end if;
end;
$$;
