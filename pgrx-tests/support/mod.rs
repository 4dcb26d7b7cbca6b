//! The same test on both installs, on a server of its own.
//!
//! [`on_each_install`] gives a closure a fresh database with nightowls in it:
//! once as an extension, once as plain migrations. [`on_each_route`] does so
//! through PgBouncer in transaction mode as well. [`own_cluster`] is for tests
//! that crash, reconfigure or restore into a server. A [`Session`] speaks the
//! simple query protocol only, so the same test runs on every route.

// Not every helper is in use at every time.
#![allow(dead_code, unused_imports)]

mod cluster;
mod database;
pub mod peer;
mod pooler;
mod session;

use std::fmt::{self, Write as _};
use std::fs::OpenOptions;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{Duration, Instant};

pub use cluster::{
    Cluster, WORKER, free_port, kill, own_cluster, own_cluster_with, preloaded_server, server,
    supabase_server, worker_server,
};
pub use database::Db;
pub use session::{Refusal, Session, patience};

/// The superuser, and the owner of the extension.
pub const SUPERUSER: &str = "postgres";
/// Owns the plain install: login createdb createrole bypassrls, no superuser.
pub const OWNER: &str = "owl_owner";
/// Has the service's rights, by `grant_service`.
pub const SERVICE: &str = "owl_service";
/// Has the members' rights, by `grant_member`; who it is says `nightowls.user_id`.
pub const MEMBER: &str = "owl_member";
/// May log in; nothing was ever granted to it.
pub const STRANGER: &str = "owl_stranger";
/// An ordinary role that may create functions and tables in schema public.
pub const APP: &str = "owl_app";

/// Whether the stresses have the full sizes of what is promised; else a share that takes seconds.
pub fn full() -> bool {
    std::env::var_os("NIGHTOWLS_FULL").is_some()
}

/// How nightowls came into a database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Install {
    /// `create extension nightowls`, by a superuser.
    Extension,
    /// The migrations, applied by [`OWNER`].
    Plain,
}

impl Install {
    /// Both, in the order in which tests run.
    pub const ALL: [Install; 2] = [Install::Extension, Install::Plain];

    /// The role that owns the install.
    pub fn owner(self) -> &'static str {
        match self {
            Install::Extension => SUPERUSER,
            Install::Plain => OWNER,
        }
    }
}

impl fmt::Display for Install {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Install::Extension => "extension",
            Install::Plain => "plain",
        })
    }
}

/// The way a database's sessions take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// Straight to the server.
    Direct,
    /// Through PgBouncer in transaction mode.
    Pooled,
}

/// Runs `test` on a fresh database of each install. Both are tried even if the
/// first fails; the report says which did.
pub fn on_each_install(test: impl Fn(&Db)) {
    on_each(&[Route::Direct], test);
}

/// As [`on_each_install`], and once more through PgBouncer in transaction mode.
pub fn on_each_route(test: impl Fn(&Db)) {
    if pooler_or_skip() {
        on_each(&[Route::Direct, Route::Pooled], test);
    } else {
        on_each(&[Route::Direct], test);
    }
}

/// Runs `test` on a fresh database of one install.
pub fn on_install(install: Install, test: impl FnOnce(&Db)) {
    test(&server().database(install));
}

fn on_each(routes: &[Route], test: impl Fn(&Db)) {
    let server = server();
    let mut failed = String::new();
    let mut first = None;
    for install in Install::ALL {
        for route in routes {
            let run = AssertUnwindSafe(|| test(&server.database(install).by(*route)));
            if let Err(panic) = catch_unwind(run) {
                let by = match route {
                    Route::Direct => "",
                    Route::Pooled => " through PgBouncer",
                };
                writeln!(failed, "failed on: {install}{by}").expect("a string takes all");
                first.get_or_insert(panic);
            }
        }
    }
    if let Some(panic) = first {
        eprint!("{failed}");
        resume_unwind(panic);
    }
}

/// Whether PgBouncer is there. Where it is not, the test counts as skipped.
pub fn pooler_or_skip() -> bool {
    let there = pooler::program().is_some();
    if !there {
        skip("pgbouncer");
    }
    there
}

/// Says that this test, or a part of it, cannot run here. The test then counts
/// as skipped in the summary of `make test`, not as passed.
pub fn skip(reason: &str) {
    eprintln!("skip: {reason}");
    if let Some(path) = std::env::var_os("NIGHTOWLS_SKIPS") {
        let thread = std::thread::current();
        let test = thread.name().unwrap_or("a test");
        OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .and_then(|mut file| file.write_all(format!("{test}\t{reason}\n").as_bytes()))
            .expect("the file in NIGHTOWLS_SKIPS takes a line");
    }
}

/// Waits until `condition` holds.
///
/// # Panics
///
/// If it does not within `timeout`; the message says what was waited for.
pub fn wait_until(what: &str, timeout: Duration, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(
            start.elapsed() < timeout,
            "waited {timeout:?} in vain: {what}"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// `text` as an SQL literal.
pub fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}
