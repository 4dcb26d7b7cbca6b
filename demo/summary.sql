-- What is in the log now, as small tables and a chart. Run by scripts/demo.sh, which sets bold, off and bar.
\pset format aligned

\echo
\echo :bold'Events and aggregates':off
select coalesce(e.aggregate_type, 'all') as aggregate_type, e.event_type, count(*) as events,
       count(distinct (e.aggregate_type, e.aggregate_id)) as aggregates
  from nightowls.events e
 where e.org_id = nightowls.current_org()
 group by grouping sets ((e.aggregate_type, e.event_type), ())
 order by e.aggregate_type nulls last, e.event_type;

-- What stands in the log under another name than its path.
select count(*) > 0 as quoted from nightowls.projection_states s where s.projection = 'files' and s.aggregate_id like '"%' \gset
\if :quoted
  \echo 'A path that is no UTF-8 or begins with a double quote has the id that git writes, such as "caf\\351"; one of more than'
  \echo '1024 bytes has the id "sha256 … and its path in its events.'
  \echo
\endif

\echo :bold'Taken in so far':off
select to_char(r.at, 'YYYY-MM-DD HH24:MI') as at, r.commits, r.events, round(r.seconds, 1) as seconds,
       round(r.events / greatest(r.seconds, 0.001)) as "events/s"
  from (select * from demo.runs order by at desc limit 5) r
 order by r.at;

-- A projection may come later than its events: it is built from the log. Made again, it changes nothing.
select from nightowls.create_projection('authors', 'author', '{
  "initial": {"commits": 0, "changes": 0},
  "on": {
    "commit_made": [
      {"op": "add", "path": "commits"},
      {"op": "add", "path": "changes", "value": "$.changes"},
      {"op": "min", "path": "first", "value": "@.metadata.authored_at"},
      {"op": "max", "path": "last", "value": "@.metadata.authored_at"}
    ]
  }
}')
\g /dev/null

\echo :bold'Projections':off
select p.name as projection, p.aggregate_type as "of", count(*) as aggregates,
       count(*) filter (where s.state is not null) as states, count(*) filter (where s.state is null) as removed
  from nightowls.projections p
  join nightowls.projection_states s on s.org_id = p.org_id and s.projection = p.name
 where p.org_id = nightowls.current_org()
 group by p.name, p.aggregate_type
 order by p.name;

\echo :bold'Who (projection authors, kept by add, min and max)':off
select left(s.aggregate_id, 30) as author, (s.state ->> 'commits')::bigint as commits, (s.state ->> 'changes')::bigint as changes,
       left(s.state ->> 'first', 10) as first, left(s.state ->> 'last', 10) as last
  from nightowls.projection_states s
 where s.org_id = nightowls.current_org() and s.projection = 'authors'
 order by commits desc, s.aggregate_id
 limit 6;

-- By hour, day, week, month or year, whichever gives at most some forty rows.
select case
         when max(c.authored_at) - min(c.authored_at) < interval '40 hours' then 'hour'
         when max(c.authored_at) - min(c.authored_at) < interval '40 days' then 'day'
         when max(c.authored_at) - min(c.authored_at) < interval '280 days' then 'week'
         when max(c.authored_at) - min(c.authored_at) < interval '1200 days' then 'month'
         else 'year'
       end as unit
  from demo.commits c
\gset
\echo :bold'Changes by' :unit '(author''s time, UTC)':off
with counted as (
  select date_trunc(:'unit', (e.metadata ->> 'authored_at')::timestamp) as at, count(*) filter (where e.aggregate_type = 'file') as changes
    from nightowls.events e
   where e.org_id = nightowls.current_org()
   group by 1
), bars as (
  select b.at, coalesce(c.changes, 0) as changes, max(c.changes) over () as most
    from (select generate_series(min(c.at), max(c.at), ('1 ' || :'unit')::interval) as at from counted c) b
    left join counted c on c.at = b.at
)
select to_char(b.at, case :'unit' when 'hour' then 'MM-DD HH24:00' when 'month' then 'YYYY-MM' when 'year' then 'YYYY' else 'YYYY-MM-DD' end) as " ",
       rpad(repeat(:'bar', ceil(40.0 * b.changes / greatest(b.most, 1))::int), 40) as "                                        ",
       b.changes
  from bars b
 where b.changes > 0 or :'unit' <> 'year'
 order by b.at desc
 limit 60
\g (tuples_only=on border=0)
