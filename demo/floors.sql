-- The log of the conversation that scripts/demo-floors.sh has led: who held the floor when. Stops if it is not as promised.
\set VERBOSITY verbose
\set SHOW_CONTEXT never

select e.aggregate_id as container
  from nightowls.recent_events(max_events => 1, filter => '{"aggregate_types": ["conversation"]}') e
\gset
select set_config('demo.container', :'container', false)
\g /dev/null

create temporary table told as
with log as (
  select e.position, e.created_at, e.aggregate_type, e.event_type, e.payload,
         count(*) filter (where e.event_type = 'floor_granted') over (order by e.position) as turn
    from nightowls.events e
   where e.org_id = nightowls.current_org() and e.aggregate_type in ('floor', 'conversation')
     and e.aggregate_id = current_setting('demo.container')
)
select l.position, l.created_at, l.event_type, l.payload, g.payload ->> 'holder' as holder, g.payload ->> 'fence' as fence
  from log l
  left join log g on g.turn = l.turn and g.event_type = 'floor_granted';

\echo
\echo 'events of aggregates floor and conversation, both with id' :'container'
select to_char(extract(epoch from t.created_at - min(t.created_at) over ()), 'FM990.00') as s,
       t.holder as "has the floor",
       case t.event_type
         when 'floor_granted' then format('%s gets the floor, fence %s', t.holder, t.fence)
         when 'floor_reclaimed' then format('%s was silent for %s ms and loses it', t.payload ->> 'holder', t.payload ->> 'silent_ms')
         when 'said' then format('%s: "%s"', t.payload ->> 'by', t.payload ->> 'text')
         when 'refused' then format('%s speaks with its old fence: refused, NW003', t.payload ->> 'by')
         else format('%s is %s', t.payload ->> 'by', t.event_type) end as "what happens"
  from told t
 order by t.position;

do $$
begin
  if (select array_agg(t.holder order by t.position) from told t where t.event_type = 'floor_granted') <> '{ann,bob,cat,bob}' then
    raise exception 'the floor did not go from ann to bob to cat to bob';
  elsif (select array_agg(t.payload ->> 'by' order by t.position) from told t where t.event_type = 'said') <> '{ann,bob,cat,cat,bob}' then
    raise exception 'not everybody spoke in turn';
  elsif exists (
    select from told t
     where t.event_type = 'said' and (t.payload ->> 'by' <> t.holder or t.payload ->> 'fence' <> t.fence)) then
    raise exception 'somebody spoke who did not have the floor';
  end if;
end;
$$;
