//! The background worker. A launcher, started with the server, keeps two processes for each database of `nightowls.databases`: one
//! that sends requests ([`sender`]) and one that runs the clock ([`clock`]), so that neither waits for the other.

mod clock;
mod launcher;
mod sender;
mod session;

use std::time::Duration;

use pgrx::bgworkers::BackgroundWorkerBuilder;
use pgrx::prelude::*;

/// How pg_stat_activity calls them, in `backend_type`.
const LAUNCHER: &str = "nightowls launcher";
const SENDER: &str = "nightowls sender";
const CLOCK: &str = "nightowls clock";

/// Registers the launcher, if the server is just starting.
pub fn init() {
    // SAFETY: both are read while the postmaster has one thread.
    if unsafe { !pg_sys::process_shared_preload_libraries_in_progress || pg_sys::IsBinaryUpgrade } {
        return;
    }
    BackgroundWorkerBuilder::new(LAUNCHER)
        .set_type(LAUNCHER)
        .set_library("nightowls")
        .set_function("nightowls_launcher")
        .enable_spi_access()
        .set_restart_time(Some(Duration::from_secs(5)))
        .load();
}
