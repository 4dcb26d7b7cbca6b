//! Runs the clock of one database: tick once a minute where no cron job does, and the backfill of embeddings.

use std::time::{Duration, Instant};

use serde_json::Value;

use pgrx::bgworkers::BackgroundWorker;
use pgrx::prelude::*;

use super::session::{attach_signals, connect, finds, obey, stops, take_role, transaction, value};
use crate::dispatch::settings;
use crate::http::{Client, Request};
use crate::wait;

/// Wakes it before its time.
const KEY: &str = "clock";
/// How often it ticks.
const EVERY: Duration = Duration::from_secs(60);
/// How long a tick may take.
const TICK_MS: i32 = 20_000;
const TICK: &str = "nightowls._cron_ticks()";
/// How often it looks for embeddings that are missing, if nobody says so.
const LOOK: Duration = Duration::from_secs(5);
const BACKFILL: [&str; 2] = [
    "nightowls._begin_backfill(integer)",
    "nightowls._end_backfill(uuid,bigint,integer,jsonb,text,text)",
];
/// 2,048 vectors of 4,096 numbers have less.
const MAX_ANSWER: usize = 128 * 1_024 * 1_024;

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
    let mut held_up = 0_u32;
    let mut client = None;
    while !stops() {
        obey();
        let seen = wait::count_of(KEY);
        let found = finds(&[TICK, BACKFILL[0], BACKFILL[1]]);
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
        let mut longest = due.saturating_duration_since(Instant::now());
        if found[1] && found[2] {
            longest = longest.min(LOOK);
            match backfill(&mut client, due) {
                Ok(()) => held_up = 0,
                Err(error) => {
                    held_up += 1;
                    if held_up.is_power_of_two() {
                        log!("nightowls: the backfill is held up: {error}");
                    }
                }
            }
        }
        if !longest.is_zero() {
            wait::doze(KEY, seen, longest, -1);
        }
    }
}

/// One tick, unless a job of pg_cron does it.
fn tick() -> Result<(), String> {
    let cron = transaction("nightowls: looks for a cron job", || {
        value("select nightowls._cron_ticks()::text", &[])
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

/// Asks for the embeddings that are missing, until none is or the next tick is due: claims them in one transaction, sends with none
/// open, saves in another.
fn backfill(client: &mut Option<Client>, until: Instant) -> Result<(), String> {
    while !stops() && Instant::now() < until {
        let role = role()?;
        let begun = transaction("nightowls: begins a backfill", || {
            let _as_role = role.map(AsRole::new);
            value(
                "select pg_catalog.jsonb_agg(pg_catalog.to_jsonb(b))::text from nightowls._begin_backfill($1) b",
                &[50.into()],
            )
        })?;
        let Some(begun) = begun else { return Ok(()) };
        let begun: Vec<Value> =
            serde_json::from_str(&begun).map_err(|_| "what was claimed is no array".to_owned())?;
        if client.is_none() {
            *client = Some(settings::client()?);
        }
        let client = client.as_ref().expect("it was made above");
        for one in begun {
            let answer = request_of(&one)
                .ok_or_else(|| "it lacks a URL, a body or a time".to_owned())
                .and_then(|request| {
                    client
                        .send_aside(request, || {
                            pgrx::check_for_interrupts!();
                        })
                        .map_err(|failure| failure.message)
                })
                .and_then(|answer| {
                    if answer.truncated {
                        Err("the answer is too large".to_owned())
                    } else {
                        Ok(answer)
                    }
                });
            let text = |name: &str| {
                one.get(name).map(|value| match value {
                    Value::String(text) => text.clone(),
                    other => other.to_string(),
                })
            };
            let (status, headers, body, failure) = match answer {
                Ok(answer) => {
                    let headers: serde_json::Map<String, Value> = answer
                        .headers
                        .iter()
                        .map(|(name, value)| (name.clone(), value.replace('\0', "").into()))
                        .collect();
                    let body = String::from_utf8_lossy(&answer.body).replace('\0', "\u{fffd}");
                    (
                        Some(i32::from(answer.status)),
                        Some(Value::Object(headers).to_string()),
                        Some(body),
                        None,
                    )
                }
                Err(failure) => (None, None, None, Some(failure)),
            };
            transaction("nightowls: ends a backfill", || {
                let _as_role = role.map(AsRole::new);
                value(
                    "select nightowls._end_backfill($1::uuid, $2::bigint, $3, $4::jsonb, $5, $6)::text",
                    &[
                        text("org_id").into(),
                        text("request_id").into(),
                        status.into(),
                        headers.into(),
                        body.into(),
                        failure.into(),
                    ],
                )
            })?;
        }
    }
    Ok(())
}

fn request_of(begun: &Value) -> Option<Request> {
    Some(Request {
        method: "POST",
        url: begun.get("url")?.as_str()?.to_owned(),
        headers: begun
            .get("headers")?
            .as_object()?
            .iter()
            .map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned())))
            .collect::<Option<_>>()?,
        body: begun.get("body")?.as_str()?.as_bytes().to_vec(),
        timeout: Duration::from_millis(begun.get("timeout_ms")?.as_u64()?),
        max_body: MAX_ANSWER,
        policy: settings::policy(),
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
