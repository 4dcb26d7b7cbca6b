-- What is left of floors that nobody asks for any more: a sweep for the clock.

-- One slice of an org's floors, in the order of their names: finished tickets of a day ago go, and floors that nobody has held or
-- asked for since. At most 10,000 tickets go at a time; more: there were more of them. last_container: where to go on; null: that was all.
-- Definer: nobody else may write floors.
create function nightowls._prune_floors_of(
  org                uuid,
  after_container    text,
  max_floors         int,
  out floors         bigint,
  out tickets        bigint,
  out looked         int,
  out more           boolean,
  out last_container text
)
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
  set enable_bitmapscan to off
  set enable_hashjoin to off
  set enable_mergejoin to off
  set plan_cache_mode to force_generic_plan
  set jit to off
as $$
#variable_conflict use_column
declare
  v_names text[];
  v_idle  text[];
  v_since timestamptz := clock_timestamp() - interval '1 day';
  v_rest  bigint;
begin
  select array_agg(f.container order by f.container), count(*)
    into v_names, looked
    from (select x.container
            from nightowls.floors x
           where x.org_id = _prune_floors_of.org and x.container > _prune_floors_of.after_container
           order by x.container
           limit _prune_floors_of.max_floors) f;
  if looked = _prune_floors_of.max_floors then
    last_container := v_names[looked];
  end if;

  delete from nightowls.floor_tickets d
   where d.ctid = any (array(
           select t.ctid
             from nightowls.floors f
             join nightowls.floor_tickets t on t.org_id = f.org_id and t.container = f.container and t.ticket <= f.ticket
            where f.org_id = _prune_floors_of.org and f.container = any (v_names) and t.polled_at < v_since and not t.holding
            limit 10000
              for update of t skip locked));
  get diagnostics tickets = row_count;
  more := tickets = 10000;

  -- Nobody draws a ticket of what is locked; so what is looked for in a statement of its own stays as it is.
  v_idle := array(
    select f.container
      from nightowls.floors f
     where f.org_id = _prune_floors_of.org and f.container = any (v_names)
       and coalesce(greatest(f.granted_at, f.heartbeat_at, f.released_at), '-infinity') < v_since
       and (f.holder is null or not nightowls._is_fresh(f.granted_at, f.heartbeat_at, f.max_hold_ms, f.max_total_ms))
       for update skip locked);
  v_idle := array(
    select n.container
      from unnest(v_idle) as n (container)
     where not exists (
             select from nightowls.floor_tickets t
              where t.org_id = _prune_floors_of.org and t.container = n.container and t.polled_at >= v_since)
       and not exists (
             select from nightowls.floors f
               join nightowls.floor_tickets t on t.org_id = f.org_id and t.container = f.container and t.ticket < f.ticket
              where f.org_id = _prune_floors_of.org and f.container = n.container));
  floors := cardinality(v_idle);
  if floors = 0 then
    return;
  end if;
  insert into nightowls.floor_marks (org_id, fence)
  select _prune_floors_of.org, max(f.fence)
    from nightowls.floors f
   where f.org_id = _prune_floors_of.org and f.container = any (v_idle)
  on conflict (org_id) do update set fence = greatest(floor_marks.fence, excluded.fence);
  delete from nightowls.floor_tickets t
   where t.org_id = _prune_floors_of.org and t.container = any (v_idle);
  get diagnostics v_rest = row_count;
  tickets := tickets + v_rest;
  delete from nightowls.floors f
   where f.org_id = _prune_floors_of.org and f.container = any (v_idle);
end;
$$;

revoke all on function nightowls._prune_floors_of(uuid, text, int) from public;

-- Removes tickets that were finished, and floors that nobody has held or asked for, for a day: of all orgs in turn, the one that has
-- waited longest first. max_floors: how many floors to look at; max_ms: begin nothing new after so many milliseconds. A row for each org
-- of which something went. What somebody has locked stays; two at once: the second has nothing to do.
create function nightowls._prune_floors(max_floors int default 1000, max_ms int default 1000)
  returns table (org_id uuid, floors bigint, tickets bigint)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_until timestamptz := clock_timestamp() + _prune_floors.max_ms * interval '1 ms';
  v_left  int := _prune_floors.max_floors;
  v_turn  record;
  v_slice record;
  v_end   timestamptz;
  v_after text;
begin
  if not nightowls._begin_sweep('floors') then
    return;
  end if;
  for v_turn in
    select o.org_id, coalesce(w.after_id, '') as after_id
      from nightowls.orgs o
      left join nightowls._sweeps w on w.org_id = o.org_id and w.sweep = 'floors' and w.name = ''
     where exists (select from nightowls.floors f where f.org_id = o.org_id)
     order by w.swept_at nulls first, o.org_id
     limit 100
  loop
    org_id := v_turn.org_id;
    floors := 0;
    tickets := 0;
    -- A turn is a quarter of the call.
    v_end := least(v_until, clock_timestamp() + _prune_floors.max_ms * interval '1 ms' / 4);
    v_after := v_turn.after_id;
    loop
      v_slice := nightowls._prune_floors_of(v_turn.org_id, v_after, least(v_left, greatest(_prune_floors.max_floors / 4, 1)));
      floors := floors + v_slice.floors;
      tickets := tickets + v_slice.tickets;
      exit when not v_slice.more and (v_slice.looked > 0 or v_after = '') or clock_timestamp() >= v_end;
      if v_slice.looked = 0 then
        -- Behind the last place there is nothing any more.
        v_after := '';
      end if;
    end loop;
    perform nightowls._end_turn(v_turn.org_id, 'floors', '',
                                case when v_slice.more then v_after else coalesce(v_slice.last_container, '') end);
    if floors > 0 or tickets > 0 then
      return next;
    end if;
    v_left := v_left - v_slice.looked;
    exit when v_left <= 0 or clock_timestamp() >= v_until;
  end loop;
end;
$$;

revoke all on function nightowls._prune_floors(int, int) from public;
