//! Sending as Postgres calls it, where there is no worker.

use std::cell::RefCell;
use std::time::Duration;

use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use serde_json::Value;

use super::pool::Pool;
use super::{job, settings};
use crate::error::internal;

thread_local! {
    /// What came of the last batch, until SQL takes it.
    static OUTCOMES: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Whether `http` or `private` targets are allowed.
#[pg_extern(sql = false)]
fn allows(what: &str) -> bool {
    let policy = settings::policy();
    match what {
        "http" => policy.allow_http,
        "private" => policy.allow_private,
        _ => false,
    }
}

/// Commits, then sends what was leased, holding no snapshot and no transaction id, and keeps what came of it for [`sent_outcomes`].
///
/// # Errors
///
/// SQLSTATE 2D000 in a transaction block, those of an interrupt, and 55000 if the client cannot be made.
#[pg_extern(sql = false)]
fn send_requests(fcinfo: pg_sys::FunctionCallInfo) -> Result<(), ErrorReport> {
    // SAFETY: declared as _send_requests(text). The argument is read before the commit, which frees what it points at.
    unsafe {
        let leased = match pgrx::fcinfo::pg_getarg::<String>(fcinfo, 0) {
            Some(leased) => leased,
            None => return Err(crate::error::null_argument("requests")),
        };
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
        let jobs = job::parse(&leased).map_err(internal)?;
        let client = settings::client().map_err(crate::error::not_ready)?;
        if pg_sys::SPI_connect_ext(options) != pg_sys::SPI_OK_CONNECT as i32 {
            return Err(internal("SPI_connect failed"));
        }
        pg_sys::SPI_commit();

        let policy = settings::policy();
        let pool = Pool::new(None);
        let count = jobs.len();
        for job in jobs {
            pool.send(job, &client, policy);
        }
        let mut outcomes = Vec::with_capacity(count);
        while outcomes.len() < count {
            pgrx::check_for_interrupts!();
            pool.wait(Duration::from_millis(20));
            for done in pool.take_done() {
                outcomes.push(done.job.outcome(&done.answer, done.took));
            }
        }
        OUTCOMES.set(Some(Value::Array(outcomes).to_string()));
        if pg_sys::SPI_finish() != pg_sys::SPI_OK_FINISH as i32 {
            return Err(internal("SPI_finish failed"));
        }
    }
    Ok(())
}

/// What came of the requests that [`send_requests`] has sent last; null when it was taken before.
#[pg_extern(sql = false)]
fn sent_outcomes() -> Option<String> {
    OUTCOMES.take()
}
