-- Waiting without polling: src/wait. sql/plain/wait.sql is its twin. A waiter's loop, in a volatile function at read
-- committed, where each look is a statement of its own:
--
--   v_seen := nightowls._wake_count(key);
--   loop
--     <look; exit when found or late>
--     v_seen := nightowls._nap(key, v_seen, v_nth, <milliseconds left>);
--     v_nth := v_nth + 1;
--   end loop;
--
-- It looks once more after its last nap. A writer calls _wake(key) in its transaction.

-- Whether a waiter is woken here. If not, _nap sleeps for a pause that grows with nth, as the twin does.
create function nightowls._can_wake()
  returns boolean
  language c
  stable
  parallel restricted
as 'MODULE_PATHNAME', 'can_wake_wrapper';

revoke all on function nightowls._can_wake() from public;

-- How often a key was woken: to be read before looking.
create function nightowls._wake_count(key text)
  returns bigint
  language c
  volatile
  strict
  parallel restricted
as 'MODULE_PATHNAME', 'wake_count_wrapper';

revoke all on function nightowls._wake_count(text) from public;

-- Sleeps until the key's count is no longer seen, at most max_ms and at most 20 s, as a commit prepared wakes nobody.
-- nth: how many naps this wait has had. Returns the count. May also return early.
create function nightowls._nap(key text, seen bigint, nth int, max_ms int)
  returns bigint
  language c
  volatile
  strict
  parallel unsafe
as 'MODULE_PATHNAME', 'nap_wrapper';

revoke all on function nightowls._nap(text, bigint, int, int) from public;

-- Wakes who naps for the key, at most so many, when this transaction has committed and its locks are free. A rolled-back
-- transaction wakes nobody, a rolled-back savepoint somebody who finds nothing. Beyond 64 keys everybody is woken.
-- Always true, so that it can stand in an expression.
create function nightowls._wake(key text, waiters int default 2147483647)
  returns boolean
  language c
  volatile
  parallel unsafe
as 'MODULE_PATHNAME', 'wake_wrapper';

revoke all on function nightowls._wake(text, int) from public;

-- As _wake, but when this transaction, or the subtransaction that it is called in, is rolled back, and only then: what was taken is free
-- again. Always true.
create function nightowls._wake_undone(key text, waiters int default 2147483647)
  returns boolean
  language c
  volatile
  parallel unsafe
as 'MODULE_PATHNAME', 'wake_undone_wrapper';

revoke all on function nightowls._wake_undone(text, int) from public;

-- Wakes who naps for 'events/<class>', a class of holds (256: all of them), when this transaction has ended, however it does:
-- then its hold lets readers go on. Always true.
create function nightowls._wake_readers(class int)
  returns boolean
  language c
  volatile
  parallel unsafe
as 'MODULE_PATHNAME', 'wake_readers_wrapper';

revoke all on function nightowls._wake_readers(int) from public;

-- Commits, then naps as _nap does, and holds no snapshot meanwhile: for procedures that wait long.
create procedure nightowls._nap_without_snapshot(key text, seen bigint, nth int, max_ms int)
  language c
as 'MODULE_PATHNAME', 'nap_without_snapshot_wrapper';

revoke all on procedure nightowls._nap_without_snapshot(text, bigint, int, int) from public;
