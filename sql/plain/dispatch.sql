-- The twin of src/dispatch: requests leave by pg_net.

create function nightowls._allows(what text)
  returns boolean
  language sql
  stable
  strict
  parallel restricted
  return coalesce((select s.value = 'true' from nightowls.settings s where s.name = concat('allow_', what)), false);

revoke all on function nightowls._allows(text) from public;

-- With a path of its own it could not commit.
create procedure nightowls.run_dispatch(max_requests int default 1000, max_ms int default 25000)
  language plpgsql
as $$
#variable_conflict use_column
declare
  v_until timestamptz;
  v_left  int := run_dispatch.max_requests;
  v_nth   int := 0;
  v_more  boolean;
begin
  perform nightowls._check_dispatch(run_dispatch.max_requests, run_dispatch.max_ms);
  v_until := nightowls._in_ms(run_dispatch.max_ms);
  loop
    select d.left_over, d.more into v_left, v_more from nightowls._dispatch_batch(v_left) d;
    commit;
    exit when not v_more or nightowls._is_over(v_until, 1);
    call nightowls._nap_without_snapshot('dispatch', 0, v_nth, 250);
    v_nth := nightowls._next(v_nth);
  end loop;
end;
$$;

comment on procedure nightowls.run_dispatch(int, int) is
  'Sends requests of all orgs in turn from this session, in batches of at most 64: leases them and commits, sends them while it holds neither snapshot nor transaction id, settles '
  'them and commits. It ends when there is nothing more to send, or after max_requests, or max_ms and the longest timeout of a batch. Where the worker runs it is woken '
  'instead; in the plain install requests leave by pg_net. It is what cron jobs call: call nightowls.run_dispatch(). For services. Waits for nobody but receivers. Raises 2D000 in a '
  'transaction block, 22004 or 22023 for an argument that is null or less than 1, 55000 if there is nothing to send by.';

revoke all on procedure nightowls.run_dispatch(int, int) from public;
