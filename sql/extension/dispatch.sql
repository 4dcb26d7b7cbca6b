-- Sending without a worker: src/dispatch. sql/plain/dispatch.sql is its twin, by pg_net.

-- Whether targets are allowed that are not by themselves: http (no TLS), private (addresses of the inside). Settings of the server.
create function nightowls._allows(what text)
  returns boolean
  language c
  stable
  strict
  parallel restricted
as 'MODULE_PATHNAME', 'allows_wrapper';

revoke all on function nightowls._allows(text) from public;

-- Commits, then sends what _lease_requests gave, with neither snapshot nor transaction id; for procedures.
create procedure nightowls._send_requests(requests text)
  language c
as 'MODULE_PATHNAME', 'send_requests_wrapper';

revoke all on procedure nightowls._send_requests(text) from public;

-- What came of it, for _settle_requests.
create function nightowls._sent_outcomes()
  returns text
  language c
  volatile
  parallel restricted
as 'MODULE_PATHNAME', 'sent_outcomes_wrapper';

revoke all on function nightowls._sent_outcomes() from public;

-- With a path of its own it could not commit.
create procedure nightowls.run_dispatch(max_requests int default 1000, max_ms int default 25000)
  language plpgsql
as $$
#variable_conflict use_column
declare
  v_until    timestamptz;
  v_left     int := run_dispatch.max_requests;
  v_requests text;
begin
  perform nightowls._check_dispatch(run_dispatch.max_requests, run_dispatch.max_ms);
  if nightowls._worker_runs() then
    perform nightowls._wake('dispatch', 1);
    return;
  end if;
  v_until := nightowls._in_ms(run_dispatch.max_ms);
  loop
    v_requests := nightowls._lease_batch(least(v_left, 64));
    exit when v_requests is null;
    v_left := nightowls._minus_batch(v_left, v_requests);
    call nightowls._send_requests(v_requests);
    perform nightowls._settle_batch(nightowls._sent_outcomes());
    commit;
    exit when nightowls._is_over(v_until, v_left);
  end loop;
end;
$$;

comment on procedure nightowls.run_dispatch(int, int) is
  'Sends requests of all orgs in turn from this session, in batches of at most 64: leases them and commits, sends them while it holds neither snapshot nor transaction id, settles '
  'them and commits. It ends when there is nothing more to send, or after max_requests, or max_ms and the longest timeout of a batch. Where the worker runs it is woken '
  'instead; in the plain install requests leave by pg_net. It is what cron jobs call: call nightowls.run_dispatch(). For services. Waits for nobody but receivers. Raises 2D000 in a '
  'transaction block, 22004 or 22023 for an argument that is null or less than 1, 55000 if there is nothing to send by.';

revoke all on procedure nightowls.run_dispatch(int, int) from public;
