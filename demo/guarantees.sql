-- What the log promises, tried on the events that are there. Run by scripts/demo.sh; stops at the first that is broken.
\set VERBOSITY verbose
\set SHOW_CONTEXT never

-- Of the files there are, the one with the longest history.
select f.file, f.version
  from (values (1)) one
  left join (
    select s.aggregate_id as file, s.version
      from nightowls.projection_states s
     where s.org_id = nightowls.current_org() and s.projection = 'files' and s.state is not null
     order by s.aggregate_id like '"%', s.version desc, s.aggregate_id
     limit 1) f on true
\gset
\if :{?file}
\else
  \echo
  \echo 'There is no file at the end of this history: nothing more to show.'
  \quit
\endif

\echo
\echo :bold'One file''s history':off
\echo 'read_aggregate, of type file and id' :'file'
select e.version, e.event_type, left(e.payload ->> 'commit', 8) as commit, e.payload ->> 'mode' as mode,
       left(e.payload ->> 'blob', 8) as blob, e.metadata ->> 'actor_id' as by, left(e.metadata ->> 'authored_at', 10) as on
  from nightowls.read_aggregate('file', :'file', from_version => greatest(1, :version - 4)) e
 order by e.version;

\echo :bold'The same file at any version, from the projection':off
select v.version, left(nightowls.state_at('files', :'file', v.version)::text, 100) as "state_at('files', …, version)"
  from (select distinct unnest(array[1, (1 + :version) / 2, :version]::bigint[]) as version) v
 order by v.version;

\echo :bold'An append that expects what is no longer so is refused: NW001':off
\set ON_ERROR_STOP off
\set ECHO queries
select nightowls.append_event('file', :'file', 'file_modified', expected_version => 0);
\set ECHO none
\set got :LAST_ERROR_SQLSTATE
\set ON_ERROR_STOP on
select case when :'got' <> 'NW001' then 'no ' || :'got' end as fault \gset
\if :{?fault}
  do $$ begin raise exception 'the append was not refused with NW001'; end $$;
\endif

\echo
\echo :bold'What is in the log stays as it is: NW008':off
\set ON_ERROR_STOP off
\set ECHO queries
update nightowls.events set payload = '{}' where version = 1;
\set ECHO none
\set got :LAST_ERROR_SQLSTATE
\set ON_ERROR_STOP on
select case when :'got' <> 'NW008' then 'no ' || :'got' end as fault \gset
\if :{?fault}
  do $$ begin raise exception 'the update was not refused with NW008'; end $$;
\endif

-- The newest commit of a size that reads well.
select c.no, left(c.commit, 8) as commit, count(*) as size
  from demo.commits c
  join nightowls.events e
    on e.org_id = nightowls.current_org() and e."position" <= c."position"
   and e."position" > coalesce((select p."position" from demo.commits p where p.no = c.no - 1), 0)
 where c.no > (select max(x.no) from demo.commits x) - 50
 group by c.no, c.commit
 order by count(*) not between 2 and 8, c.no desc
 limit 1
\gset
select count(*) as events from nightowls.events \gset
\echo
\echo :bold'A retry changes nothing: commit' :commit 'is appended once more, as it was':off
create temporary table retried as select * from nightowls.append_many(demo.appends_of(:no));
select r.aggregate_type, left(demo.path_quoted(r.aggregate_id), 50) as aggregate_id, r."position", r.version
  from retried r
 order by r."position"
 limit 8;
select :size as "events in the call", count(*) as "first results returned", :events as "in the log before",
       (select count(*) from nightowls.events) as "and after"
  from retried r
  join nightowls.events e
    on e.org_id = nightowls.current_org() and e."position" = r."position"
   and e.aggregate_type = r.aggregate_type and e.aggregate_id = r.aggregate_id and e.version = r.version;
do $$
begin
  if (select count(*) from retried) = 0
     or (select max(r."position") from retried r) > (select max(c."position") from demo.commits c)
     or exists (select from retried r
                 where not exists (select from nightowls.events e
                                    where e.org_id = nightowls.current_org() and e."position" = r."position"
                                      and e.aggregate_id = r.aggregate_id and e.version = r.version)) then
    raise exception 'the retry did not return the first results';
  end if;
end;
$$;

\echo :bold'Every state against a replay of its events':off
create temporary table differing as
  select p.name, v.aggregate_id
    from (values ('files'), ('authors')) p (name)
   cross join lateral nightowls.verify_projection(p.name) v;
select p.name as "verify_projection", count(distinct s.aggregate_id) as "states compared",
       (select count(*) from differing d where d.name = p.name) as differ
  from (values ('files'), ('authors')) p (name)
  left join nightowls.projection_states s on s.org_id = nightowls.current_org() and s.projection = p.name
 group by p.name
 order by p.name desc;
do $$
begin
  if exists (select from differing) then
    raise exception 'states differ from a replay of their events'
      using hint = 'select * from nightowls.verify_projection(''files'') shows them.';
  end if;
end;
$$;
