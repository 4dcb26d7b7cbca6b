//! Runs the clock of one database: tick once a minute where no cron job does, and the backfill of embeddings.

use std::time::{Duration, Instant};

use pgrx::bgworkers::BackgroundWorker;
use pgrx::prelude::*;

use super::session::{attach_signals, connect, finds, obey, stops, take_role, transaction, value};
use crate::dispatch::settings;
use crate::wait;

/// Wakes it before its time.
const KEY: &str = "clock";
/// How often it ticks.
const EVERY: Duration = Duration::from_secs(60);
/// How long a tick may take.
const TICK_MS: i32 = 20_000;
const TICK: &str = "nightowls.tick(integer)";

/// Begun by the launcher.
#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn nightowls_clock(_argument: pg_sys::Datum) {
    attach_signals(true);
    let database = BackgroundWorker::get_extra().to_owned();
    connect(&database);
    match take_role(1) {
        Ok(true) => (),
        Ok(false) => return,
        Err(error) => return log!("nightowls: {error}"),
    }
    let mut due = Instant::now() + Duration::from_secs(5);
    let mut failures = 0_u32;
    while !stops() {
        obey();
        let seen = wait::count_of(KEY);
        let found = finds(&[TICK]);
        if Instant::now() >= due {
            due = Instant::now() + EVERY;
            if found[0] {
                match tick() {
                    Ok(()) => failures = 0,
                    Err(error) => {
                        failures += 1;
                        if failures.is_power_of_two() {
                            log!("nightowls: tick failed: {error}");
                        }
                    }
                }
            }
        }
        let longest = due.saturating_duration_since(Instant::now());
        if !longest.is_zero() {
            wait::doze(KEY, seen, longest, -1);
        }
    }
}

/// One tick, unless a job of pg_cron does it.
fn tick() -> Result<(), String> {
    let cron = transaction("nightowls: looks for a cron job", || {
        value(
            "select case when pg_catalog.to_regclass('cron.job') is null then 'f' \
                         else (pg_catalog.xpath('/table/row/found/text()', pg_catalog.query_to_xml( \
                                'select exists (select from cron.job where jobname = ''nightowls'' and active \
                                 and database = pg_catalog.current_database()) as found', false, false, '')))[1]::text end",
            &[],
        )
    })?;
    if cron.is_some_and(|found| found.starts_with('t')) {
        return Ok(());
    }
    let role = role()?;
    let statement = format!("select 1 from nightowls.tick({TICK_MS}) t");
    transaction("nightowls: tick", || {
        let _as_role = role.map(AsRole::new);
        Spi::run(&statement).unwrap_or_else(|error| panic!("{error}"));
    })
}

/// The role to tick as: user code runs in it (handlers, conditions), which must not be a superuser's because a service wrote it. None if
/// nobody but superusers is a service.
fn role() -> Result<Option<pg_sys::Oid>, String> {
    let wanted = settings::clock_role();
    let found = transaction("nightowls: looks for its role", || {
        value(
            "select r.oid::text \
               from pg_catalog.pg_proc p \
              cross join lateral pg_catalog.aclexplode(p.proacl) a \
               join pg_catalog.pg_roles r on r.oid = a.grantee and not r.rolsuper \
              where p.oid = pg_catalog.to_regprocedure('nightowls._service()') and a.privilege_type = 'EXECUTE' \
                and ($1 is null or r.rolname = $1) \
              order by r.rolname <> 'service_role', r.rolname \
              limit 1",
            &[wanted.clone().into()],
        )
    })?;
    match (found.and_then(|oid| oid.parse::<u32>().ok()), wanted) {
        (Some(oid), _) => Ok(Some(pg_sys::Oid::from(oid))),
        (None, Some(name)) => Err(format!("nightowls.clock_role: \"{name}\" is no service")),
        (None, None) => Ok(None),
    }
}

/// While it lives the transaction has the rights of a role, and no code in it can take others.
struct AsRole {
    user: pg_sys::Oid,
    context: i32,
}

impl AsRole {
    fn new(role: pg_sys::Oid) -> Self {
        let mut before = Self {
            user: pg_sys::InvalidOid,
            context: 0,
        };
        // SAFETY: as Postgres does for functions of another's; put back when this is dropped, or by the end of the transaction.
        unsafe {
            pg_sys::GetUserIdAndSecContext(&mut before.user, &mut before.context);
            pg_sys::SetUserIdAndSecContext(
                role,
                before.context | pg_sys::SECURITY_LOCAL_USERID_CHANGE as i32,
            );
        }
        before
    }
}

impl Drop for AsRole {
    fn drop(&mut self) {
        // SAFETY: they are what was there before.
        unsafe { pg_sys::SetUserIdAndSecContext(self.user, self.context) };
    }
}
