//! Floors: waiting, leaving, sweeping, tenants and bad input; the guarantees are in
//! floor_guarantees.rs. Where a test needs time to pass, it sets the clock of a
//! row back.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::fixture::{default_org, lines, org_apart_from};
use crate::orm;
use crate::projections::text;
use crate::support::{
    Db, Refusal, SERVICE, SUPERUSER, Session, on_each_install, on_each_route, pooler_or_skip,
    quote, wait_until,
};
use crate::wait::{on_each_server, on_each_that_wakes};

/// Opens a session of the service.
pub type Open<'a> = &'a (dyn Fn() -> Session + Sync);

/// On both installs, straight to the server and through a PgBouncer with two connections.
pub fn on_each_pool(test: impl Fn(&Db, Open)) {
    on_each_install(|db| {
        default_org(db);
        test(db, &|| db.service());
    });
    if pooler_or_skip() {
        on_each_install(|db| {
            default_org(db);
            test(db, &|| db.pooled_by(2, SERVICE));
        });
    }
}

/// What `request_floor` and `await_floor` answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub granted: bool,
    pub ticket: i64,
    pub ahead: Option<i64>,
    pub fence: Option<i64>,
    pub retry_in_ms: Option<i64>,
    pub skipped: bool,
}

pub fn number(text: &Option<String>) -> Option<i64> {
    text.as_ref().map(|text| text.parse().expect("a number"))
}

pub fn answer(row: &[Option<String>]) -> Answer {
    Answer {
        granted: row[0].as_deref() == Some("t"),
        ticket: number(&row[1]).expect("a ticket"),
        ahead: number(&row[2]),
        fence: number(&row[3]),
        retry_in_ms: number(&row[4]),
        skipped: row[5].as_deref() == Some("t"),
    }
}

pub fn try_call(session: &mut Session, call: &str) -> Result<Answer, Refusal> {
    session
        .try_rows(&format!("select * from nightowls.{call}"))
        .map(|rows| answer(&rows[0]))
}

#[track_caller]
pub fn call(session: &mut Session, call: &str) -> Answer {
    try_call(session, call).unwrap_or_else(|refusal| panic!("{call}: {refusal}"))
}

#[track_caller]
pub fn request(session: &mut Session, container: &str, holder: &str) -> Answer {
    call(
        session,
        &format!("request_floor({}, {})", quote(container), quote(holder)),
    )
}

/// The fence of a floor that is free.
#[track_caller]
pub fn take(session: &mut Session, container: &str, holder: &str) -> i64 {
    let answer = request(session, container, holder);
    assert!(answer.granted, "{answer:?}");
    answer.fence.expect("a granted floor has a fence")
}

#[track_caller]
pub fn yes(
    session: &mut Session,
    function: &str,
    container: &str,
    holder: &str,
    fence: i64,
) -> bool {
    text(
        session,
        &format!(
            "select nightowls.{function}({}, {}, {fence})",
            quote(container),
            quote(holder)
        ),
    ) == "t"
}

#[track_caller]
pub fn release(session: &mut Session, container: &str, holder: &str, fence: i64) -> bool {
    yes(session, "release_floor", container, holder, fence)
}

#[track_caller]
pub fn beat(session: &mut Session, container: &str, holder: &str, fence: i64) -> bool {
    yes(session, "heartbeat_floor", container, holder, fence)
}

pub fn guarded(container: &str, fence: i64) -> String {
    format!(
        "select nightowls.append_event('work', {0}, 'written', jsonb_build_object('fence', {fence}), container => {0}, fence => {fence})",
        quote(container)
    )
}

/// Lets `ms` pass for the holder.
#[track_caller]
pub fn hold_for(db: &Db, container: &str, column: &str, ms: i64) {
    db.direct(SUPERUSER).exec(&format!(
        "update nightowls.floors set {column} = {column} - {ms} * interval '1 ms' where container = {}",
        quote(container)
    ));
}

/// Lets `ms` pass for a waiter.
#[track_caller]
pub fn silence(db: &Db, container: &str, holder: &str, ms: i64) {
    db.direct(SUPERUSER).exec(&format!(
        "update nightowls.floor_tickets set polled_at = polled_at - {ms} * interval '1 ms' where container = {} and holder = {}",
        quote(container),
        quote(holder)
    ));
}

/// Everything there is of floors.
#[track_caller]
pub fn everything(db: &Db) -> Vec<String> {
    lines(
        &mut db.direct(SUPERUSER),
        "select f::text from nightowls.floors f union all select t::text from nightowls.floor_tickets t \
         union all select count(*)::text from nightowls.events order by 1",
    )
}

/// The log of a floor: type, holder, ticket, and whether the fence is above the one before.
#[track_caller]
pub fn events(db: &Db, container: &str) -> Vec<String> {
    lines(
        &mut db.direct(SUPERUSER),
        &format!(
            "select event_type, payload ->> 'holder', payload ->> 'ticket' from nightowls.events \
              where aggregate_type = 'floor' and aggregate_id = {} order by position",
            quote(container)
        ),
    )
}

#[test]
fn two_orgs_with_the_same_container_never_meet() {
    on_each_pool(|db, open| {
        let own = text(&mut open(), "select nightowls.current_org()");
        let other = org_apart_from(db, &own);
        let mine = take(&mut open(), "c", "h");
        let mut session = open();
        let theirs = call(
            &mut session,
            &format!("request_floor('c', 'h', org => '{other}')"),
        );
        assert!(theirs.granted && theirs.ticket == 1, "{theirs:?}");
        let fence = theirs.fence.expect("granted");
        // A fence of the one is no good for the other, even were the numbers the same.
        db.direct(SUPERUSER).exec(&format!(
            "update nightowls.floors set fence = {fence} + 1000 where org_id = '{other}'"
        ));
        let fence = fence + 1000;
        assert_eq!(session.refused(&guarded("c", fence)).code, "NW003");
        session.exec("begin");
        session.exec(&format!(
            "select set_config('nightowls.org_id', '{other}', true)"
        ));
        session.exec(&guarded("c", fence));
        session.exec("savepoint s");
        assert_eq!(session.refused(&guarded("c", mine)).code, "NW003");
        session.exec("rollback to s");
        assert!(!release(&mut session, "c", "h", mine));
        assert!(!beat(&mut session, "c", "h", mine));
        assert!(release(&mut session, "c", "h", fence));
        session.exec("commit");
        assert!(beat(&mut open(), "c", "h", mine));
        assert_eq!(
            text(&mut open(), "select count(*) from nightowls.floors"),
            "2"
        );
        // Who is of no org gets nothing.
        db.owner().exec("select nightowls.set_default_org(null)");
        assert_eq!(
            open()
                .refused("select nightowls.request_floor('c', 'h')")
                .code,
            "NW010"
        );
        let nowhere = open().refused(
            "select nightowls.request_floor('c', 'h', org => '00000000-0000-4000-8000-000000000009')",
        );
        assert_eq!(nowhere.code, "22023", "{nowhere}");
    });
}

#[test]
fn bad_arguments_are_refused_and_nothing_is_written() {
    on_each_pool(|db, open| {
        let fence = take(&mut open(), "c", "h");
        let ticket = request(&mut open(), "c", "w").ticket;
        let before = everything(db);
        let long = |length: usize| format!("repeat('x', {length})");
        let mut calls: Vec<(String, &str)> = Vec::new();
        for (name, code) in [
            ("null".to_owned(), "22004"),
            ("''".to_owned(), "22023"),
            (long(1025), "54000"),
        ] {
            for function in [
                format!("request_floor({name}, 'h')"),
                format!("await_floor({name}, 'h', 1)"),
                format!("heartbeat_floor({name}, 'h', 1)"),
                format!("release_floor({name}, 'h', 1)"),
                format!("request_floor('c', {name})"),
                format!("await_floor('c', {name}, 1)"),
                format!("heartbeat_floor('c', {name}, 1)"),
                format!("release_floor('c', {name}, 1)"),
            ] {
                calls.push((function, code));
            }
        }
        for (function, code) in [
            ("request_floor('c', 'x', max_hold_ms => null)", "22004"),
            ("request_floor('c', 'x', max_hold_ms => 0)", "22023"),
            ("request_floor('c', 'x', max_hold_ms => -1)", "22023"),
            ("request_floor('c', 'x', max_total_ms => 0)", "22023"),
            ("request_floor('c', 'x', max_total_ms => -5)", "22023"),
            ("request_floor('c', 'x', poll_ms => null)", "22004"),
            ("request_floor('c', 'x', poll_ms => 0)", "22023"),
            ("request_floor('c', 'x', poll_ms => 60001)", "22023"),
            ("request_floor('c', 'x', request_id => '')", "22023"),
            (
                "request_floor('c', 'x', request_id => repeat('x', 256))",
                "54000",
            ),
            ("request_floor('c', repeat('x', 256))", "54000"),
            ("await_floor('c', 'w', null)", "22004"),
            ("await_floor('c', 'w', 2, null)", "22004"),
            ("await_floor('c', 'w', 2, -1)", "22023"),
            ("await_floor('c', 'w', 0)", "55000"),
            ("await_floor('c', 'w', -1)", "55000"),
            ("await_floor('c', 'w', 3)", "55000"),
            ("await_floor('c', 'other', 2)", "55000"),
            ("await_floor('other', 'w', 2)", "55000"),
            ("heartbeat_floor('c', 'h', null)", "22004"),
            ("release_floor('c', 'h', null)", "22004"),
            ("assert_floor(null, 1)", "22004"),
            ("assert_floor('c', null)", "22004"),
            ("assert_floor('', 1)", "NW003"),
            ("append_event('work', 'c', 'x', container => 'c')", "22004"),
            ("append_event('work', 'c', 'x', fence => 1)", "22004"),
        ] {
            calls.push((function.to_owned(), code));
        }
        for (function, code) in calls {
            let refusal = open().refused(&format!("select nightowls.{function}"));
            assert_eq!(refusal.code, code, "{function}: {refusal}");
            assert!(!refusal.message.is_empty());
        }
        for (arguments, code) in [
            ("null, 'h'", "22004"),
            ("'c', ''", "22023"),
            ("'c', 'x', max_wait_ms => -1", "22023"),
            ("'c', 'x', max_wait_ms => null", "22004"),
            ("'c', 'x', poll_ms => 0", "22023"),
        ] {
            let refusal = open().refused(&format!("call nightowls.acquire_floor({arguments})"));
            assert_eq!(refusal.code, code, "{arguments}: {refusal}");
        }
        assert_eq!(everything(db), before);
        assert!(beat(&mut open(), "c", "h", fence));
        assert_eq!(request(&mut open(), "c", "w").ticket, ticket);

        // Whatever a name is made of, it is a name.
        for name in [
            "it's",
            "a\\b",
            "🦉",
            "%",
            "x; drop table nightowls.floors",
            " ",
            "null",
        ] {
            let fence = take(&mut open(), name, name);
            open().exec(&guarded(name, fence));
            assert!(release(&mut open(), name, name, fence));
        }
        let longest = "x".repeat(1024);
        take(&mut open(), &longest, &"h".repeat(255));
    });
}

#[test]
fn above_read_committed_a_floor_is_not_requested_and_a_fence_is_no_weaker() {
    on_each_pool(|db, open| {
        let fence = take(&mut open(), "c", "h");
        for level in ["repeatable read", "serializable"] {
            let mut session = open();
            for call in ["request_floor('d', 'h')", "await_floor('c', 'h', 1)"] {
                session.exec(&format!("begin isolation level {level}"));
                let refusal = session.refused(&format!("select nightowls.{call}"));
                assert_eq!(refusal.code, "25001", "{call}: {refusal}");
                session.exec("rollback");
            }
        }
        // The snapshot is from before the grant to another: the lock tells.
        let mut late = open();
        late.exec("begin isolation level repeatable read; select count(*) from nightowls.floors");
        assert!(release(&mut open(), "c", "h", fence));
        take(&mut open(), "c", "other");
        let refusal = late.refused(&format!("select nightowls.assert_floor('c', {fence})"));
        assert_eq!(refusal.code, "40001", "{refusal}");
        late.exec("rollback");
        assert_eq!(late.refused(&guarded("c", fence)).code, "NW003");
        assert!(events(db, "d").is_empty());
    });
}

#[test]
fn await_floor_writes_and_locks_nothing_until_its_turn_and_needs_a_committed_ticket() {
    on_each_server(|db| {
        default_org(db);
        let mut watcher = db.superuser();
        let fence = take(&mut db.service(), "c", "h");

        let mut open = db.service();
        for sql in [
            "select * from nightowls.request_floor('c', 'w')",
            "savepoint s; select * from nightowls.request_floor('c', 'w'); release s",
        ] {
            open.exec("begin");
            open.exec(sql);
            let refusal = open.refused("select nightowls.await_floor('c', 'w', 2)");
            assert_eq!(refusal.code, "55000", "{refusal}");
            assert!(refusal.hint.contains("request_floor"), "{refusal}");
            open.exec("rollback");
        }

        let ticket = request(&mut db.service(), "c", "w").ticket;
        let before = everything(db);
        let mut waiting = db.service();
        let pid = waiting.pid();
        let granted = std::thread::scope(|scope| {
            let thread = scope
                .spawn(move || call(&mut waiting, &format!("await_floor('c', 'w', {ticket})")));
            wait_until("it waits", Duration::from_secs(10), || {
                text(
                    &mut watcher,
                    &format!(
                        "select count(*) from pg_stat_activity where pid = {pid} and state = 'active' and wait_event_type in ('Extension', 'Timeout')"
                    ),
                ) == "1"
            });
            assert_eq!(
                text(
                    &mut watcher,
                    &format!(
                        "select (select count(*) from pg_locks where pid = {pid} and (locktype not in ('relation', 'virtualxid') or mode <> 'AccessShareLock' and locktype = 'relation')) \
                              + (select count(*) from pg_stat_activity where pid = {pid} and backend_xid is not null)"
                    )
                ),
                "0"
            );
            assert_eq!(everything(db), before);
            assert!(release(&mut db.service(), "c", "h", fence));
            thread.join().expect("the thread ends")
        });
        assert!(granted.granted && granted.ticket == ticket, "{granted:?}");

        // In vain: it comes back in time to keep its place.
        let ticket = request(&mut db.service(), "c", "x").ticket;
        let answer = call(
            &mut db.service(),
            &format!("await_floor('c', 'x', {ticket}, 100)"),
        );
        assert!(!answer.granted && !answer.skipped, "{answer:?}");
        assert_eq!((answer.ahead, answer.retry_in_ms), (Some(1), Some(0)));
        let answer = call(
            &mut db.service(),
            &format!("await_floor('c', 'x', {ticket}, 2147483647)"),
        );
        assert!(!answer.granted && !answer.skipped, "{answer:?}");
        let answer = request(&mut db.service(), "c", "x");
        assert!(!answer.skipped && answer.ticket == ticket, "{answer:?}");

        // Cancelled, it is still in line.
        let mut waiting = db.service();
        let pid = waiting.pid();
        let refusal = std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                waiting.refused(&format!("select nightowls.await_floor('c', 'x', {ticket})"))
            });
            wait_until("it waits", Duration::from_secs(10), || {
                text(
                    &mut watcher,
                    &format!(
                        "select count(*) from pg_stat_activity where pid = {pid} and wait_event_type in ('Extension', 'Timeout')"
                    ),
                ) == "1"
            });
            watcher.exec(&format!("select pg_cancel_backend({pid})"));
            thread.join().expect("the thread ends")
        });
        assert_eq!(refusal.code, "57014");
        assert_eq!(request(&mut db.service(), "c", "x").ticket, ticket);

        // Had its turn: told so.
        let fence = granted.fence.expect("granted");
        assert!(release(&mut db.service(), "c", "w", fence));
        let refusal = call_refused(&mut db.service(), "await_floor('c', 'w', 2)");
        assert!(
            ["NW003", "55000"].contains(&refusal.code.as_str()),
            "{refusal}"
        );
    });
}

fn call_refused(session: &mut Session, call: &str) -> Refusal {
    session.refused(&format!("select nightowls.{call}"))
}

#[test]
fn acquire_floor_requests_commits_and_waits_in_one_call() {
    on_each_server(|db| {
        default_org(db);
        let mut watcher = db.superuser();
        let taken = |session: &mut Session, arguments: &str| {
            session.rows(&format!("call nightowls.acquire_floor({arguments})"))[0].clone()
        };
        let held = taken(&mut db.service(), "'c', 'h'");
        assert_eq!(held[0].as_deref(), Some("t"));
        let fence = number(&held[3]).expect("a fence");

        // The ticket is there for all to see while it waits, and no snapshot grows old.
        let mut waiting = db.service();
        let pid = waiting.pid();
        let got = std::thread::scope(|scope| {
            let thread = scope.spawn(move || taken(&mut waiting, "'c', 'w', max_wait_ms => 60000"));
            wait_until("its ticket is committed", Duration::from_secs(10), || {
                text(&mut watcher, "select waiting from nightowls.floor_status") == "1"
            });
            // Where it is woken it sleeps without a snapshot, else each nap has a transaction of its own.
            let mut starts = BTreeSet::new();
            wait_until("it holds no old snapshot", Duration::from_secs(30), || {
                starts.extend(lines(
                    &mut watcher,
                    &format!("select xact_start::text from pg_stat_activity where pid = {pid} and xact_start is not null"),
                ));
                starts.len() > 10
                    || text(
                        &mut watcher,
                        &format!(
                            "select count(*) from pg_stat_activity where pid = {pid} and state = 'active' \
                                and wait_event_type = 'Extension' and backend_xmin is null and nightowls._can_wake()"
                        ),
                    ) == "1"
            });
            assert!(release(&mut db.service(), "c", "h", fence));
            thread.join().expect("the thread ends")
        });
        assert_eq!(got[0].as_deref(), Some("t"));
        assert_eq!(got[1].as_deref(), Some("2"));

        // Not in time: its place is kept, and the next CALL goes on with it.
        let late = taken(&mut db.service(), "'c', 'x', max_wait_ms => 0");
        assert_eq!(late[0].as_deref(), Some("f"));
        assert_eq!(
            (late[1].as_deref(), late[2].as_deref(), late[3].as_deref()),
            (Some("3"), Some("1"), None)
        );
        request(&mut db.service(), "c", "y");
        let again = taken(&mut db.service(), "'c', 'x', max_wait_ms => 50");
        assert_eq!(again[1].as_deref(), Some("3"));

        // A procedure that commits is for the top level.
        let mut session = db.service();
        session.exec("begin");
        let refusal = session.refused("call nightowls.acquire_floor('d', 'h')");
        assert_eq!(refusal.code, "2D000", "{refusal}");
        session.exec("rollback");
        assert!(events(db, "d").is_empty());
        let in_a_block = |begin: &str, end: &str| {
            format!(
                "do $$ declare g boolean; t bigint; a bigint; f bigint; begin {begin} \
                 call nightowls.acquire_floor('d', 'h', granted => g, ticket => t, ahead => a, fence => f); {end} end $$"
            )
        };
        let caught = in_a_block("begin", "exception when division_by_zero then null; end;");
        assert_eq!(session.refused(&caught).code, "2D000");
        assert!(events(db, "d").is_empty());
        session.exec(&in_a_block("", ""));
        assert_eq!(events(db, "d"), ["floor_granted h 1"]);
    });
}

#[test]
fn floor_status_shows_who_has_which_floor() {
    on_each_install(|db| {
        default_org(db);
        let mut session = db.service();
        let fence = take(&mut session, "a", "h");
        request(&mut session, "a", "w1");
        request(&mut session, "a", "w2");
        silence(db, "a", "w1", 7_000);
        take(&mut session, "b", "h");
        hold_for(db, "b", "heartbeat_at", 180_000);
        let free = take(&mut session, "c", "h");
        assert!(release(&mut session, "c", "h", free));
        assert_eq!(
            lines(
                &mut session,
                "select container, status, holder, ticket, waiting, fence is not null, \
                        expires_at between clock_timestamp() + interval '170 s' and clock_timestamp() + interval '180 s', \
                        released_at is not null, waiting_since is not null \
                   from nightowls.floor_status order by container"
            ),
            [
                "a held h 1 1 t t f t",
                "b stale h 1 0 t f f f",
                "c free null 1 0 t null t f",
            ]
        );
        assert!(release(&mut session, "a", "h", fence));
    });
}

#[test]
fn finished_tickets_go_after_a_day() {
    on_each_install(|db| {
        default_org(db);
        let mut session = db.service();
        let mut turns = |from: usize, to: usize| {
            for number in from..to {
                let answer = call(
                    &mut session,
                    &format!("request_floor('c', 'h', request_id => 'r{number}')"),
                );
                assert!(release(&mut session, "c", "h", answer.fence.expect("free")));
            }
        };
        turns(0, 20);
        db.superuser()
            .exec("update nightowls.floor_tickets set polled_at = polled_at - interval '1 day'");
        turns(20, 40);
        assert_eq!(
            text(
                &mut db.superuser(),
                "select min(ticket) || ' ' || count(*) from nightowls.floor_tickets"
            ),
            "21 20"
        );
        // Without a request_id there is nothing to be kept.
        let mut session = db.service();
        for _ in 0..5 {
            let fence = take(&mut session, "d", "h");
            assert!(release(&mut session, "d", "h", fence));
        }
        assert_eq!(
            text(
                &mut session,
                "select count(*) from nightowls.floor_tickets where container = 'd'"
            ),
            "0"
        );
    });
}

#[test]
fn a_handler_of_floor_events_runs_as_the_one_who_asks() {
    on_each_install(|db| {
        default_org(db);
        db.owner().exec(&format!(
            "create table public.seen (who text, what text); grant select, insert on public.seen to {SERVICE};
             create function public.see(state jsonb, event nightowls.events) returns jsonb language plpgsql as $$
             begin insert into public.seen values (current_user, (event).event_type); return '{{}}'; end $$;
             select nightowls.create_projection('seen', 'floor', handler => 'public.see')"
        ));
        take(&mut db.service(), "c", "h");
        hold_for(db, "c", "heartbeat_at", 180_000);
        take(&mut db.service(), "c", "w");
        assert_eq!(
            lines(&mut db.owner(), "select who, what from public.seen"),
            [
                format!("{SERVICE} floor_granted"),
                format!("{SERVICE} floor_reclaimed"),
                format!("{SERVICE} floor_granted")
            ]
        );
    });
}

#[test]
fn a_sleeping_waiter_is_woken_by_the_release_that_concerns_it_and_by_no_other() {
    on_each_that_wakes(|db| {
        default_org(db);
        let mut fence = take(&mut db.service(), "c", "h");
        let elsewhere = take(&mut db.service(), "d", "h");
        let tickets: Vec<i64> = (0..4)
            .map(|number| request(&mut db.service(), "c", &format!("w{number}")).ticket)
            .collect();
        std::thread::scope(|scope| {
            let threads: Vec<_> = tickets
                .iter()
                .enumerate()
                .map(|(number, ticket)| {
                    scope.spawn(move || {
                        let mut session = db.service();
                        // The pause between two looks would be as long as the whole wait.
                        loop {
                            let answer = call(
                                &mut session,
                                &format!("await_floor('c', 'w{number}', {ticket})"),
                            );
                            if let Some(fence) = answer.fence {
                                break fence;
                            }
                            assert!(!answer.skipped);
                            request(&mut session, "c", &format!("w{number}"));
                        }
                    })
                })
                .collect();
            assert!(release(&mut db.service(), "d", "h", elsewhere));
            let mut holder = "h".to_owned();
            for (number, thread) in threads.into_iter().enumerate() {
                assert!(release(&mut db.service(), "c", &holder, fence));
                fence = thread.join().expect("the thread ends");
                holder = format!("w{number}");
            }
        });
        assert_eq!(
            events(db, "c"),
            [
                "floor_granted h 1",
                "floor_granted w0 2",
                "floor_granted w1 3",
                "floor_granted w2 4",
                "floor_granted w3 5"
            ]
        );
    });
}

#[test]
fn a_sleeping_waiter_looks_again_when_a_holder_s_or_a_waiter_s_time_is_over() {
    on_each_server(|db| {
        default_org(db);
        let held = call(
            &mut db.service(),
            "request_floor('c', 'dead', max_hold_ms => 1500)",
        );
        assert!(held.granted);
        let ticket = request(&mut db.service(), "c", "w").ticket;
        let answer = call(
            &mut db.service(),
            &format!("await_floor('c', 'w', {ticket})"),
        );
        assert!(answer.granted, "{answer:?}");

        // Before it in line is one that is silent: five seconds and one for what is not written down.
        request(&mut db.service(), "c", "silent");
        let ticket = request(&mut db.service(), "c", "x").ticket;
        silence(db, "c", "silent", 4_500);
        assert!(release(
            &mut db.service(),
            "c",
            "w",
            answer.fence.expect("granted")
        ));
        let answer = call(
            &mut db.service(),
            &format!("await_floor('c', 'x', {ticket})"),
        );
        assert!(answer.granted, "{answer:?}");
    });
}

/// The blocks of docs/floors.md: language and text.
fn blocks() -> Vec<(&'static str, &'static str)> {
    include_str!("../docs/floors.md")
        .split("```")
        .skip(1)
        .step_by(2)
        .filter_map(|block| block.split_once('\n'))
        .collect()
}

#[test]
fn the_worked_example_of_the_page_prints_what_the_page_says() {
    let Some(node) = orm::node() else { return };
    let folder = orm::project(node, "npm", &[]);
    for (_, text) in blocks().iter().filter(|(language, _)| *language == "ts") {
        let name = text
            .lines()
            .next()
            .and_then(|line| line.strip_prefix("// "))
            .expect("a block of TypeScript begins with the name of its file");
        orm::write(folder.path(), name, text);
    }
    let (_, promised) = blocks()
        .into_iter()
        .rfind(|(language, _)| *language == "text")
        .expect("the page says what the example prints");
    let tsx = node.folder.join("node_modules/.bin/tsx");
    on_each_route(|db| {
        let url = orm::ready(db);
        db.owner().exec(&format!(
            "select nightowls.set_default_org('{}'); \
             create table public.notes (container text, text text); \
             grant select, insert on public.notes to {SERVICE}",
            orm::ORG
        ));
        let said = orm::run(&tsx, &["floors/three.ts"], folder.path(), &url);
        // Of the two who ask at the same moment either may be the first.
        let swapped = promised
            .replace("ann", "?")
            .replace("bob", "ann")
            .replace('?', "bob");
        assert!(said == promised || said == swapped, "{said}");
        assert_eq!(
            lines(&mut db.owner(), "select text from public.notes order by 1"),
            ["ann was here", "bob was here"]
        );
        assert_eq!(events(db, "c1").len(), 4);
    });
}
