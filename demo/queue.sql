-- The queue: a key that is sent once, groups, a worker that is too late, dead letters. Run by scripts/demo.sh; made anew each time.
\set VERBOSITY verbose
\set SHOW_CONTEXT never

\echo
\echo :bold'A queue: what is sent commits with its sender, and is done once':off

do $$
begin
  if exists (select from nightowls.list_queues() q where q.name = 'letters') then
    perform nightowls.drop_queue('letters');
  end if;
  perform nightowls.create_queue('letters', max_attempts => 2);
end;
$$;

\echo
\echo 'A dedup key is sent once, whoever tries again; letters of one group go out in order, one at a time:'
select count(distinct s.id) as "ids of 3 sends"
  from (select nightowls.send('letters', '{"to": "ann", "about": "the invoice"}', dedup_key => 'invoice 17 to ann') as id
          from generate_series(1, 3)) s;
select count(nightowls.send('letters', jsonb_build_object('to', 'bob', 'page', n), group_key => 'bob')) as "pages to bob"
  from generate_series(1, 3) n;
select r.message, r.read_ct from nightowls.read('letters', 60, 10) r;

\echo 'A worker whose time is over is told so, and changes nothing:'
create temp table claims as
  select m.msg_id, m.receipt, m.message from nightowls.queue_messages m
    join nightowls.queues q on q.org_id = m.org_id and q.queue_id = m.queue_id
   where q.org_id = nightowls.current_org() and q.name = 'letters' and m.lease_until is not null;
select nightowls.set_vt('letters', c.msg_id, 0) from claims c
\g /dev/null
create temp table later as select r.* from nightowls.read('letters', 60, 10) r;
select c.message ->> 'to' as letter, nightowls.ack('letters', c.msg_id, c.receipt) as "ack of the first worker",
       nightowls.nack('letters', l.msg_id, l.receipt, 'the printer burns', 0) as "nack of the second"
  from claims c
  join later l using (msg_id)
 order by 1;

\echo 'That was the second delivery of two: dead letters, until redrive sends them back. The group went on:'
select m.queue_length, m.queue_visible_length, m.waiting, m.dead_letters from nightowls.metrics('letters') m;
select nightowls.redrive('letters') as redriven;

do $$
declare
  v_done    text[] := '{}';
  v_message record;
begin
  loop
    select * into v_message from nightowls.read('letters', 60, 1);
    exit when not found;
    v_done := v_done || coalesce(v_message.message ->> 'page', 'invoice');
    if not nightowls.ack('letters', v_message.msg_id, v_message.receipt) then
      raise exception 'an ack in time was refused';
    end if;
  end loop;
  if array(select d.page from unnest(v_done) as d (page) order by 1) <> '{1,2,3,invoice}'
     or (select m.queue_length + m.dead_letters from nightowls.metrics('letters') m) <> 0 then
    raise exception 'letters are lost or there twice: %', v_done;
  end if;
end;
$$;
\echo 'Each letter was worked on once more, and the queue is empty.'
