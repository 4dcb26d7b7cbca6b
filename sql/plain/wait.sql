-- The twin of src/wait: nobody can be woken without the library, so a waiter sleeps for a pause and looks again.

create function nightowls._can_wake()
  returns boolean
  language sql
  stable
  parallel restricted
  return false;

revoke all on function nightowls._can_wake() from public;

create function nightowls._wake_count(key text)
  returns bigint
  language sql
  volatile
  strict
  parallel restricted
  return 0;

revoke all on function nightowls._wake_count(text) from public;

-- 5, 10, 20 and 40 ms, then 50, and after five seconds slowly up to 250.
create function nightowls._nap_pause(nth int)
  returns int
  language sql
  immutable
  strict
  parallel safe
  return least(greatest(least(5 << least(greatest(nth, 0), 4), 50), nth / 2), 250);

revoke all on function nightowls._nap_pause(int) from public;

create function nightowls._nap(key text, seen bigint, nth int, max_ms int)
  returns bigint
  language plpgsql
  volatile
  strict
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform pg_sleep(least(nightowls._nap_pause(_nap.nth), _nap.max_ms) / 1000.0);
  return 0;
end;
$$;

revoke all on function nightowls._nap(text, bigint, int, int) from public;

-- A constant for the planner: who writes pays nothing for it.
create function nightowls._wake(key text, waiters int default 2147483647)
  returns boolean
  language sql
  volatile
  parallel unsafe
  return true;

revoke all on function nightowls._wake(text, int) from public;

create function nightowls._wake_undone(key text, waiters int default 2147483647)
  returns boolean
  language sql
  volatile
  parallel unsafe
  return true;

revoke all on function nightowls._wake_undone(text, int) from public;

create function nightowls._wake_readers(class int)
  returns boolean
  language sql
  volatile
  parallel unsafe
  return true;

revoke all on function nightowls._wake_readers(int) from public;

-- What sleeps in PL/pgSQL holds a snapshot, here one no older than the nap. With a path of its own it could not commit.
create procedure nightowls._nap_without_snapshot(key text, seen bigint, nth int, max_ms int)
  language plpgsql
as $$
#variable_conflict use_column
begin
  commit;
  perform pg_catalog.pg_sleep(
            least(nightowls._nap_pause(_nap_without_snapshot.nth), _nap_without_snapshot.max_ms) operator(pg_catalog./) 1000.0);
end;
$$;

revoke all on procedure nightowls._nap_without_snapshot(text, bigint, int, int) from public;
