//! Waiting as Postgres calls it.

use std::cell::Cell;
use std::ffi::c_void;
use std::time::{Duration, Instant};

use pgrx::fcinfo::pg_getarg_datum;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use pgrx::varlena_to_byte_slice;

use super::board::Board;
use super::pending::{Pending, Wake};
use super::shared::{board, known_board, my_number};
use super::{LONGEST_NAP, pause, readers};
use crate::error::internal;

thread_local! {
    /// Whom the current transaction will wake when it has committed.
    static PENDING: Pending = const { Pending::new() };
    /// Which readers of the log it holds up: they are woken however it ends.
    static HELD_UP: Pending = const { Pending::new() };
    /// Whom it will wake if it, or a part of it, is rolled back.
    static UNDONE: Pending = const { Pending::new() };
    /// Whether Postgres knows what to call when a transaction ends.
    static TELLS_AT_COMMIT: Cell<bool> = const { Cell::new(false) };
    /// Whether Postgres knows what to call when this backend ends.
    static RISES_AT_EXIT: Cell<bool> = const { Cell::new(false) };
    /// The key that this backend has lain down for; 0 while it is up.
    static ASLEEP_FOR: Cell<u64> = const { Cell::new(0) };
}

/// Whether this server can wake a waiter.
#[pg_extern(sql = false)]
fn can_wake() -> bool {
    board().is_some()
}

/// How often a key was woken, or 0 where nothing can wake.
#[pg_extern(sql = false)]
fn wake_count(fcinfo: pg_sys::FunctionCallInfo) -> i64 {
    // SAFETY: declared as _wake_count(text), strict.
    let key = unsafe { key(fcinfo) };
    match (board(), key) {
        (Some(board), Some(key)) => board.count(key) as i64,
        _ => 0,
    }
}

/// Remembers to wake those who sleep for a key when this transaction has
/// committed and its locks are gone.
///
/// # Errors
///
/// SQLSTATE 25000 in a parallel operation.
#[pg_extern(sql = false)]
fn wake(fcinfo: pg_sys::FunctionCallInfo) -> bool {
    // SAFETY: declared as _wake(text, integer).
    unsafe {
        let limit = pg_getarg_datum(fcinfo, 1).map_or(i32::MAX, |limit| limit.value() as i32);
        if let (Some(_), Some(key)) = (board(), key(fcinfo)) {
            tell_at_end();
            PENDING.with(|pending| pending.remember(key, limit.max(0).unsigned_abs()));
        }
    }
    true
}

/// Remembers to wake those who sleep for a key if this transaction is rolled back,
/// or a subtransaction of it: what it took is free again then.
///
/// # Errors
///
/// As [`wake`].
#[pg_extern(sql = false)]
fn wake_undone(fcinfo: pg_sys::FunctionCallInfo) -> bool {
    // SAFETY: declared as _wake_undone(text, integer).
    unsafe {
        let limit = pg_getarg_datum(fcinfo, 1).map_or(i32::MAX, |limit| limit.value() as i32);
        if let (Some(_), Some(key)) = (board(), key(fcinfo)) {
            tell_at_end();
            UNDONE.with(|pending| pending.remember(key, limit.max(0).unsigned_abs()));
        }
    }
    true
}

/// Remembers to wake the readers of a class of holds when this transaction has
/// ended, or a subtransaction was rolled back: that lets go of holds too.
///
/// # Errors
///
/// As [`wake`].
#[pg_extern(sql = false)]
fn wake_readers(fcinfo: pg_sys::FunctionCallInfo) -> bool {
    // SAFETY: declared as _wake_readers(integer).
    unsafe {
        if let (Some(_), Some(class)) = (board(), pg_getarg_datum(fcinfo, 0)) {
            tell_at_end();
            let class = (class.value() as i32).max(0).unsigned_abs();
            let readers = readers(pg_sys::MyDatabaseId.to_u32(), class.into());
            HELD_UP.with(|pending| pending.remember(readers, u32::MAX));
        }
    }
    true
}

/// Says once in a backend that [`tell`] is to be called.
fn tell_at_end() {
    // SAFETY: Postgres keeps the callback, and calls it in this thread.
    unsafe {
        // A worker's transaction ends before the one that it works for.
        pg_sys::PreventCommandIfParallelMode(c"nightowls._wake()".as_ptr());
        if !TELLS_AT_COMMIT.replace(true) {
            pg_sys::RegisterResourceReleaseCallback(Some(tell), std::ptr::null_mut());
        }
    }
}

/// Wakes whom the transaction was to wake, once what it wrote can be seen and its
/// locks are free. Nothing here may fail. A prepared transaction comes here when
/// it is prepared: who is woken then finds nothing.
unsafe extern "C-unwind" fn tell(
    phase: pg_sys::ResourceReleasePhase::Type,
    is_commit: bool,
    is_top_level: bool,
    _: *mut c_void,
) {
    if phase != pg_sys::ResourceReleasePhase::RESOURCE_RELEASE_AFTER_LOCKS {
        return;
    }
    let Some(board) = known_board() else { return };
    let hold = |wake| match wake {
        Wake::Key(readers, _) => board.wake_readers(readers, rouse),
        Wake::All => board.wake_all(rouse),
    };
    let wake = |wake| match wake {
        Wake::Key(key, limit) => board.wake(key, limit, rouse),
        Wake::All => board.wake_all(rouse),
    };
    if !is_top_level {
        if !is_commit {
            HELD_UP.with(|pending| pending.repeat(hold));
            UNDONE.with(|pending| pending.repeat(wake));
        }
        return;
    }
    HELD_UP.with(|pending| pending.deliver(hold));
    let (due, not_due) = if is_commit {
        (&PENDING, &UNDONE)
    } else {
        (&UNDONE, &PENDING)
    };
    not_due.with(Pending::forget);
    due.with(|pending| pending.deliver(wake));
}

/// Ends a sleep. Its owner may be gone: then whoever has the latch now looks once
/// in vain, as every user of a latch does.
fn rouse(latch: usize) {
    // SAFETY: the latches of backends lie in shared memory, at the same address in
    // each, until the server stops.
    unsafe { pg_sys::SetLatch(latch as *mut pg_sys::Latch) }
}

/// Sleeps until a key's count is no longer `seen`, but not longer than `max_ms`
/// nor than the longest nap; returns the count.
///
/// # Errors
///
/// Those of an interrupt: SQLSTATE 57014 when cancelled, 57P01 when terminated.
#[pg_extern(sql = false)]
fn nap(fcinfo: pg_sys::FunctionCallInfo) -> i64 {
    // SAFETY: declared as _nap(text, bigint, integer, integer), strict.
    unsafe { Nap::argument(fcinfo) }.map_or(0, |nap| nap.take() as i64)
}

/// As [`nap`], in a procedure: commits first, and holds no snapshot meanwhile.
///
/// # Errors
///
/// SQLSTATE 2D000 in a transaction block, and those of [`nap`] and of a commit.
#[pg_extern(sql = false)]
fn nap_without_snapshot(fcinfo: pg_sys::FunctionCallInfo) -> Result<(), ErrorReport> {
    // SAFETY: declared as _nap_without_snapshot(text, bigint, integer, integer).
    // The arguments are read before the commit, which frees what they point at.
    unsafe {
        let nap = Nap::argument(fcinfo);
        // Only what a CALL outside of a transaction block has called may commit.
        let context = (*fcinfo).context.cast::<pg_sys::CallContext>();
        let atomic = context.is_null()
            || (*context).type_ != pg_sys::NodeTag::T_CallContext
            || (*context).atomic;
        let options = if atomic {
            0
        } else {
            pg_sys::SPI_OPT_NONATOMIC as i32
        };
        if pg_sys::SPI_connect_ext(options) != pg_sys::SPI_OK_CONNECT as i32 {
            return Err(internal("SPI_connect failed"));
        }
        pg_sys::SPI_commit();
        if let Some(nap) = nap {
            nap.take();
        }
        if pg_sys::SPI_finish() != pg_sys::SPI_OK_FINISH as i32 {
            return Err(internal("SPI_finish failed"));
        }
    }
    Ok(())
}

/// A nap to take.
struct Nap {
    key: u64,
    seen: u64,
    nth: i32,
    longest: Duration,
}

impl Nap {
    /// The nap of a call's arguments; none if one of them is null.
    ///
    /// # Safety
    ///
    /// `fcinfo` must be that of a call with (text, bigint, integer, integer).
    unsafe fn argument(fcinfo: pg_sys::FunctionCallInfo) -> Option<Self> {
        // SAFETY: by this function's own condition.
        unsafe {
            let number = |place| pg_getarg_datum(fcinfo, place).map(|datum| datum.value());
            let max_ms = number(3)? as i32;
            Some(Self {
                key: key(fcinfo)?,
                seen: number(1)? as u64,
                nth: number(2)? as i32,
                longest: Duration::from_millis(max_ms.max(0).unsigned_abs().into()),
            })
        }
    }

    /// Sleeps; returns the key's count.
    fn take(&self) -> u64 {
        let Some(board) = board() else {
            sleep(self.longest.min(pause(self.nth)), || false);
            return 0;
        };
        let bed = Bed::lie_down(board, self.key);
        if board.count(self.key) == self.seen {
            sleep(self.longest.min(LONGEST_NAP), || board.is_woken(bed.number));
        }
        bed.rise();
        board.count(self.key)
    }
}

/// How often a key was woken in this process's database, or 0 where nothing can wake.
pub fn count_of(key: &str) -> u64 {
    // SAFETY: written once, when the process connects.
    let database = unsafe { pg_sys::MyDatabaseId.to_u32() };
    board().map_or(0, |board| board.count(super::key(database, key.as_bytes())))
}

/// Sleeps until a key's count is no longer `seen`, until `bell` (a descriptor, or -1) can be read, until a signal comes, or
/// for so long. For processes of ours, between two transactions; it may also return early.
pub fn doze(key: &str, seen: u64, longest: Duration, bell: i32) {
    let mut events = pg_sys::WL_LATCH_SET | pg_sys::WL_TIMEOUT | pg_sys::WL_EXIT_ON_PM_DEATH;
    if bell >= 0 {
        events |= pg_sys::WL_SOCKET_READABLE;
    }
    let event = wait_event();
    // Rounded up: less than a millisecond is no reason to spin.
    let longest = longest.as_micros().div_ceil(1_000) as i64;
    let wait = || {
        // SAFETY: a process may wait on its own latch; the descriptor is open.
        unsafe {
            pg_sys::WaitLatchOrSocket(pg_sys::MyLatch, events as i32, bell, longest, event);
            pg_sys::ResetLatch(pg_sys::MyLatch);
        }
    };
    let Some(board) = board() else {
        return wait();
    };
    // SAFETY: as in count_of.
    let key = super::key(unsafe { pg_sys::MyDatabaseId.to_u32() }, key.as_bytes());
    let bed = Bed::lie_down(board, key);
    if board.count(key) == seen {
        wait();
    }
    bed.rise();
}

/// Sleeps until `done` or for so long. It can be interrupted, and ends with the
/// postmaster.
fn sleep(longest: Duration, done: impl Fn() -> bool) {
    let until = Instant::now() + longest;
    let events = pg_sys::WL_LATCH_SET | pg_sys::WL_TIMEOUT | pg_sys::WL_EXIT_ON_PM_DEATH;
    let event = wait_event();
    loop {
        // A latch that is set after this is set when it is waited for.
        pgrx::check_for_interrupts!();
        if done() {
            return;
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        // Rounded up: a nap of less than a millisecond is no reason to spin.
        let left = left.as_micros().div_ceil(1_000) as i64;
        // SAFETY: a backend may wait on its own latch.
        unsafe {
            pg_sys::WaitLatch(pg_sys::MyLatch, events as i32, left, event);
            pg_sys::ResetLatch(pg_sys::MyLatch);
        }
    }
}

/// How pg_stat_activity shows a sleeper.
#[cfg(any(feature = "pg17", feature = "pg18"))]
fn wait_event() -> u32 {
    thread_local! {
        static EVENT: Cell<u32> = const { Cell::new(0) };
    }
    if EVENT.get() == 0 {
        // SAFETY: the name is copied.
        EVENT.set(unsafe { pg_sys::WaitEventExtensionNew(c"NightowlsNap".as_ptr()) });
    }
    EVENT.get()
}

/// How pg_stat_activity shows a sleeper: before PostgreSQL 17 as any extension.
#[cfg(not(any(feature = "pg17", feature = "pg18")))]
fn wait_event() -> u32 {
    pg_sys::PG_WAIT_EXTENSION
}

/// This backend's bed while it lies in it. Left by an error, it passes on a
/// wake-up that nobody else may have got.
struct Bed {
    board: &'static Board,
    number: usize,
}

impl Bed {
    fn lie_down(board: &'static Board, key: u64) -> Self {
        if !RISES_AT_EXIT.replace(true) {
            // SAFETY: the callback is called in this thread, before the memory goes.
            unsafe { pg_sys::before_shmem_exit(Some(rise_at_exit), pg_sys::Datum::null()) };
        }
        let number = my_number();
        ASLEEP_FOR.set(key);
        // SAFETY: every backend has a latch.
        board.lie_down(number, key, unsafe { pg_sys::MyLatch } as usize);
        Self { board, number }
    }

    /// Gets up to look.
    fn rise(self) {
        ASLEEP_FOR.set(0);
        self.board.rise(self.number);
        std::mem::forget(self);
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        rise_in_vain(self.board, self.number);
    }
}

/// Gets up without looking: by an error, or because the backend ends.
fn rise_in_vain(board: &Board, number: usize) {
    let key = ASLEEP_FOR.replace(0);
    if key != 0 && board.rise(number) {
        board.wake(key, 1, rouse);
    }
}

/// A backend that is terminated leaves its bed here: no destructor runs.
unsafe extern "C-unwind" fn rise_at_exit(_: i32, _: pg_sys::Datum) {
    if let Some(board) = known_board() {
        rise_in_vain(board, my_number());
    }
}

/// The first argument's hash; none if it is null.
///
/// # Safety
///
/// `fcinfo` must be that of a call whose first argument is a text.
unsafe fn key(fcinfo: pg_sys::FunctionCallInfo) -> Option<u64> {
    // SAFETY: by this function's own condition; detoasting gives a valid varlena.
    unsafe {
        let key = pg_getarg_datum(fcinfo, 0)?;
        let key = varlena_to_byte_slice(pg_sys::pg_detoast_datum_packed(key.cast_mut_ptr()));
        Some(super::key(pg_sys::MyDatabaseId.to_u32(), key))
    }
}
