//! The launcher: keeps the processes of each database that is listed and there.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CStr;
use std::time::{Duration, Instant};

use pgrx::bgworkers::{
    BackgroundWorker, BackgroundWorkerBuilder, BackgroundWorkerStatus, DynamicBackgroundWorker,
};
use pgrx::prelude::*;

use super::session::{attach_signals, obey, sleep, stops, transaction};
use super::{CLOCK, SENDER};
use crate::dispatch::settings;

/// How often it looks which databases there are.
const LOOK: Duration = Duration::from_secs(5);
/// What a process is left alone for that has ended by itself.
const PAUSE: Duration = Duration::from_secs(2);

/// Begun by the server.
#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn nightowls_launcher(_argument: pg_sys::Datum) {
    attach_signals(true);
    // To no database: the catalog of databases is shared.
    BackgroundWorker::connect_worker_to_spi(None, None);
    let mut processes: BTreeMap<(String, &'static str), Process> = BTreeMap::new();
    let mut full = false;
    while !stops() {
        obey();
        let listed = settings::databases();
        processes.retain(|(database, _), process| {
            if listed.contains(database) {
                return true;
            }
            // No longer listed: it stops, and is forgotten.
            if let Some(handle) = process.handle.take() {
                let _ = handle.terminate();
            }
            false
        });
        let existing = existing();
        for database in listed {
            for kind in [SENDER, CLOCK] {
                let process = processes.entry((database.clone(), kind)).or_default();
                if process.runs() || !process.is_due() || !existing.contains(&database) {
                    continue;
                }
                match start(&database, kind) {
                    Some(handle) => {
                        process.handle = Some(handle);
                        full = false;
                    }
                    None if !full => {
                        full = true;
                        log!(
                            "nightowls: no process is free for database \"{database}\"; raise max_worker_processes"
                        );
                    }
                    None => (),
                }
            }
        }
        if !stops() {
            sleep(LOOK);
        }
    }
}

/// A process of a database, running or not.
#[derive(Default)]
struct Process {
    handle: Option<DynamicBackgroundWorker>,
    ended: Option<Instant>,
}

impl Process {
    fn runs(&mut self) -> bool {
        let Some(handle) = &self.handle else {
            return false;
        };
        match handle.pid() {
            Ok(_) | Err(BackgroundWorkerStatus::NotYetStarted) => true,
            Err(_) => {
                self.handle = None;
                self.ended = Some(Instant::now());
                false
            }
        }
    }

    fn is_due(&self) -> bool {
        self.ended.is_none_or(|ended| ended.elapsed() >= PAUSE)
    }
}

fn start(database: &str, kind: &'static str) -> Option<DynamicBackgroundWorker> {
    let function = if kind == SENDER {
        "nightowls_sender"
    } else {
        "nightowls_clock"
    };
    // SAFETY: the process's own number.
    let me = unsafe { pg_sys::MyProcPid };
    BackgroundWorkerBuilder::new(
        &format!("{kind}: {database}")
            .chars()
            .take(60)
            .collect::<String>(),
    )
    .set_type(kind)
    .set_library("nightowls")
    .set_function(function)
    .set_extra(database)
    .enable_spi_access()
    // The launcher starts it again.
    .set_restart_time(None)
    .set_notify_pid(me)
    .load_dynamic()
    .ok()
}

/// The names of the databases that can be connected to. Read as the launcher of autovacuum does, from the heap: who is connected to no database
/// may find no index described.
fn existing() -> BTreeSet<String> {
    let read = || {
        let mut names = BTreeSet::new();
        // SAFETY: the catalog is locked while it is read, in a transaction; each tuple is valid until the next is asked for.
        unsafe {
            let lock = pg_sys::AccessShareLock as i32;
            let relation = pg_sys::table_open(pg_sys::DatabaseRelationId, lock);
            let scan = pg_sys::table_beginscan_catalog(relation, 0, std::ptr::null_mut());
            loop {
                let tuple = pg_sys::heap_getnext(scan, pg_sys::ScanDirection::ForwardScanDirection);
                if tuple.is_null() {
                    break;
                }
                let database = pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_database>();
                if (*database).datallowconn {
                    let name = CStr::from_ptr((&raw const (*database).datname.data).cast());
                    names.insert(name.to_string_lossy().into_owned());
                }
            }
            pg_sys::heap_endscan(scan);
            pg_sys::table_close(relation, lock);
        }
        names
    };
    transaction("nightowls: looks which databases there are", read).unwrap_or_default()
}
