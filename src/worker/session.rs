//! What the processes of the worker have in common: signals, transactions, waiting.

use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pgrx::bgworkers::BackgroundWorker;
use pgrx::pg_sys::panic::CaughtError;
use pgrx::prelude::*;

/// Whether SIGTERM has come.
static STOP: AtomicBool = AtomicBool::new(false);
/// Whether it may end a transaction that is under way.
static MAY_BREAK_OFF: AtomicBool = AtomicBool::new(true);

unsafe extern "C-unwind" fn on_sigterm(_: i32) {
    STOP.store(true, Ordering::SeqCst);
    // SAFETY: what Postgres' own handler does; both are meant to be written by handlers.
    unsafe {
        if MAY_BREAK_OFF.load(Ordering::SeqCst) {
            (&raw mut pg_sys::ProcDiePending).write_volatile(1);
            (&raw mut pg_sys::InterruptPending).write_volatile(1);
        }
        pg_sys::SetLatch(pg_sys::MyLatch);
    }
}

unsafe extern "C-unwind" fn on_sighup(_: i32) {
    // SAFETY: as in on_sigterm.
    unsafe {
        (&raw mut pg_sys::ConfigReloadPending).write_volatile(1);
        pg_sys::SetLatch(pg_sys::MyLatch);
    }
}

/// Sets the handlers and lets signals in.
pub fn attach_signals(may_break_off: bool) {
    MAY_BREAK_OFF.store(may_break_off, Ordering::SeqCst);
    // SAFETY: the handlers do nothing but set flags and the latch.
    unsafe {
        #[cfg(not(feature = "pg18"))]
        {
            pg_sys::pqsignal(pg_sys::SIGTERM as i32, Some(on_sigterm));
            pg_sys::pqsignal(pg_sys::SIGHUP as i32, Some(on_sighup));
        }
        #[cfg(feature = "pg18")]
        {
            pg_sys::pqsignal_be(pg_sys::SIGTERM as i32, Some(on_sigterm));
            pg_sys::pqsignal_be(pg_sys::SIGHUP as i32, Some(on_sighup));
        }
        pg_sys::BackgroundWorkerUnblockSignals();
    }
}

/// Whether the process is to stop.
pub fn stops() -> bool {
    STOP.load(Ordering::SeqCst)
}

/// Does what signals ask for: absorbs barriers, reads the configuration again.
pub fn obey() {
    pgrx::check_for_interrupts!();
    // SAFETY: the process is between two transactions.
    unsafe {
        if (&raw const pg_sys::ConfigReloadPending).read_volatile() != 0 {
            (&raw mut pg_sys::ConfigReloadPending).write_volatile(0);
            pg_sys::ProcessConfigFile(pg_sys::GucContext::PGC_SIGHUP);
        }
    }
}

/// Connects to the database that this process is for.
pub fn connect(database: &str) {
    BackgroundWorker::connect_worker_to_spi(Some(database), None);
    // What the database's settings may say otherwise.
    for (name, value) in [
        (c"search_path", c"pg_catalog"),
        (c"default_transaction_isolation", c"read committed"),
        (c"default_transaction_read_only", c"off"),
        (c"row_security", c"on"),
        (c"session_replication_role", c"origin"),
        // Less than deadlock_timeout: it is this process that gives way, say to a DROP EXTENSION.
        (c"lock_timeout", c"400ms"),
        (c"statement_timeout", c"0"),
        (c"idle_in_transaction_session_timeout", c"0"),
        (c"jit", c"off"),
    ] {
        // SAFETY: the names and values are Postgres' own.
        unsafe {
            pg_sys::SetConfigOption(
                name.as_ptr(),
                value.as_ptr(),
                pg_sys::GucContext::PGC_SUSET,
                pg_sys::GucSource::PGC_S_SESSION,
            );
        }
    }
}

/// Runs `work` in a transaction; an error rolls it back and is returned as its message.
pub fn transaction<T>(what: &str, work: impl FnOnce() -> T) -> Result<T, String> {
    report(pg_sys::BackendState::STATE_RUNNING, what);
    let result = PgTryBuilder::new(AssertUnwindSafe(|| {
        // SAFETY: the process is connected and in no transaction.
        unsafe {
            pg_sys::SetCurrentStatementStartTimestamp();
            pg_sys::StartTransactionCommand();
            pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
        }
        let result = work();
        // SAFETY: they are those from above.
        unsafe {
            pg_sys::PopActiveSnapshot();
            pg_sys::CommitTransactionCommand();
        }
        Ok(result)
    }))
    .catch_others(|error| {
        Err(match error {
            CaughtError::PostgresError(report) | CaughtError::ErrorReport(report) => {
                report.message().to_owned()
            }
            CaughtError::RustPanic { ereport, .. } => ereport.message().to_owned(),
        })
    })
    .execute();
    // SAFETY: ends the transaction that has failed; the error's own memory is gone with it.
    unsafe {
        if result.is_err() {
            pg_sys::AbortCurrentTransaction();
        }
        pg_sys::pgstat_report_stat(false);
    }
    report(pg_sys::BackendState::STATE_IDLE, "");
    result
}

/// Says in pg_stat_activity what the process does.
fn report(state: pg_sys::BackendState::Type, what: &str) {
    let what = std::ffi::CString::new(what).unwrap_or_default();
    // SAFETY: the text is copied.
    unsafe { pg_sys::pgstat_report_activity(state, what.as_ptr()) };
}

/// The text that a statement returns in its only row and column, in a transaction.
///
/// # Panics
///
/// By the statement's error.
pub fn value(statement: &str, arguments: &[pgrx::datum::DatumWithOid<'_>]) -> Option<String> {
    Spi::get_one_with_args::<String>(statement, arguments).unwrap_or_else(|error| panic!("{error}"))
}

/// Sleeps until the latch is set or for so long.
pub fn sleep(longest: Duration) {
    let events = pg_sys::WL_LATCH_SET | pg_sys::WL_TIMEOUT | pg_sys::WL_EXIT_ON_PM_DEATH;
    // SAFETY: a process may wait on its own latch.
    unsafe {
        pg_sys::WaitLatch(
            pg_sys::MyLatch,
            events as i32,
            longest.as_millis() as i64,
            pg_sys::PG_WAIT_EXTENSION,
        );
        pg_sys::ResetLatch(pg_sys::MyLatch);
    }
}

/// Takes the lock that says to everybody that this process runs, and keeps it for its life; false if another has it.
pub fn take_role(role: i32) -> Result<bool, String> {
    transaction("nightowls: starts", || {
        let statement = format!(
            "select pg_catalog.pg_try_advisory_lock({}, {role})::text",
            LOCK_BASE + 273
        );
        value(&statement, &[]).as_deref() == Some("true")
    })
}

/// As _lock_class() in SQL.
const LOCK_BASE: i32 = 1_852_798_720;

/// Whether this database has nightowls as an extension whose functions this process may run: they are a superuser's, as it is.
/// With which of `signatures`.
pub fn finds(signatures: &[&str]) -> Vec<bool> {
    let list: Vec<String> = signatures
        .iter()
        .map(|signature| format!("'{signature}'"))
        .collect();
    let statement = format!(
        "select pg_catalog.string_agg(case when p.oid is null then '0' else '1' end, '' order by s.nth) \
           from unnest(array[{}]::text[]) with ordinality as s (signature, nth) \
           left join pg_catalog.pg_extension e on e.extname = 'nightowls' \
           left join pg_catalog.pg_roles r on r.oid = e.extowner and r.rolsuper \
           left join pg_catalog.pg_proc p on p.oid = pg_catalog.to_regprocedure(s.signature) and p.proowner = r.oid",
        list.join(", ")
    );
    transaction("nightowls: looks for the extension", || {
        value(&statement, &[])
    })
    .ok()
    .flatten()
    .map(|found| found.bytes().map(|byte| byte == b'1').collect())
    .unwrap_or_else(|| vec![false; signatures.len()])
}
