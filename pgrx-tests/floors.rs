//! Floors: one holder at a time, first come first served, and a fence that shuts
//! out who has lost it. Where a test needs time to pass, it sets the clock of a
//! row back.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::fixture::{default_org, lines, org_apart_from, together};
use crate::orm;
use crate::projections::text;
use crate::support::{
    Db, Install, Refusal, SERVICE, SUPERUSER, Session, kill, on_each_install, on_each_route,
    own_cluster, pooler_or_skip, quote, wait_until,
};
use crate::wait::{on_each_server, on_each_that_wakes};

/// Opens a session of the service.
type Open<'a> = &'a (dyn Fn() -> Session + Sync);

/// On both installs, straight to the server and through a PgBouncer with two connections.
fn on_each_pool(test: impl Fn(&Db, Open)) {
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
struct Answer {
    granted: bool,
    ticket: i64,
    ahead: Option<i64>,
    fence: Option<i64>,
    retry_in_ms: Option<i64>,
    skipped: bool,
}

fn number(text: &Option<String>) -> Option<i64> {
    text.as_ref().map(|text| text.parse().expect("a number"))
}

fn answer(row: &[Option<String>]) -> Answer {
    Answer {
        granted: row[0].as_deref() == Some("t"),
        ticket: number(&row[1]).expect("a ticket"),
        ahead: number(&row[2]),
        fence: number(&row[3]),
        retry_in_ms: number(&row[4]),
        skipped: row[5].as_deref() == Some("t"),
    }
}

fn try_call(session: &mut Session, call: &str) -> Result<Answer, Refusal> {
    session
        .try_rows(&format!("select * from nightowls.{call}"))
        .map(|rows| answer(&rows[0]))
}

#[track_caller]
fn call(session: &mut Session, call: &str) -> Answer {
    try_call(session, call).unwrap_or_else(|refusal| panic!("{call}: {refusal}"))
}

#[track_caller]
fn request(session: &mut Session, container: &str, holder: &str) -> Answer {
    call(
        session,
        &format!("request_floor({}, {})", quote(container), quote(holder)),
    )
}

/// The fence of a floor that is free.
#[track_caller]
fn take(session: &mut Session, container: &str, holder: &str) -> i64 {
    let answer = request(session, container, holder);
    assert!(answer.granted, "{answer:?}");
    answer.fence.expect("a granted floor has a fence")
}

#[track_caller]
fn yes(session: &mut Session, function: &str, container: &str, holder: &str, fence: i64) -> bool {
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
fn release(session: &mut Session, container: &str, holder: &str, fence: i64) -> bool {
    yes(session, "release_floor", container, holder, fence)
}

#[track_caller]
fn beat(session: &mut Session, container: &str, holder: &str, fence: i64) -> bool {
    yes(session, "heartbeat_floor", container, holder, fence)
}

fn guarded(container: &str, fence: i64) -> String {
    format!(
        "select nightowls.append_event('work', {0}, 'written', jsonb_build_object('fence', {fence}), container => {0}, fence => {fence})",
        quote(container)
    )
}

/// Lets `ms` pass for the holder.
#[track_caller]
fn hold_for(db: &Db, container: &str, column: &str, ms: i64) {
    db.direct(SUPERUSER).exec(&format!(
        "update nightowls.floors set {column} = {column} - {ms} * interval '1 ms' where container = {}",
        quote(container)
    ));
}

/// Lets `ms` pass for a waiter.
#[track_caller]
fn silence(db: &Db, container: &str, holder: &str, ms: i64) {
    db.direct(SUPERUSER).exec(&format!(
        "update nightowls.floor_tickets set polled_at = polled_at - {ms} * interval '1 ms' where container = {} and holder = {}",
        quote(container),
        quote(holder)
    ));
}

/// Everything there is of floors.
#[track_caller]
fn everything(db: &Db) -> Vec<String> {
    lines(
        &mut db.direct(SUPERUSER),
        "select f::text from nightowls.floors f union all select t::text from nightowls.floor_tickets t \
         union all select count(*)::text from nightowls.events order by 1",
    )
}

/// The log of a floor: type, holder, ticket, and whether the fence is above the one before.
#[track_caller]
fn events(db: &Db, container: &str) -> Vec<String> {
    lines(
        &mut db.direct(SUPERUSER),
        &format!(
            "select event_type, payload ->> 'holder', payload ->> 'ticket' from nightowls.events \
              where aggregate_type = 'floor' and aggregate_id = {} order by position",
            quote(container)
        ),
    )
}

// The eleven guarantees.

#[test]
fn one_holder_at_a_time_and_the_table_itself_takes_no_second_one() {
    on_each_pool(|db, open| {
        let answers = together(
            12,
            |_| open(),
            |number, mut session| request(&mut session, "c", &format!("h{number}")),
        );
        let granted: Vec<_> = answers.iter().filter(|answer| answer.granted).collect();
        assert_eq!(granted.len(), 1, "{answers:?}");
        let mut tickets: Vec<_> = answers.iter().map(|answer| answer.ticket).collect();
        tickets.sort_unstable();
        assert_eq!(tickets, (1..=12).collect::<Vec<_>>());
        assert_eq!(granted[0].ticket, 1);

        let mut superuser = db.direct(SUPERUSER);
        assert_eq!(
            superuser
                .refused("update nightowls.floor_tickets set holding = true where ticket = 2")
                .code,
            "23505"
        );
        assert_eq!(
            superuser
                .refused("insert into nightowls.floors (org_id, container) select org_id, container from nightowls.floors")
                .code,
            "23505"
        );
        // And nobody writes there but the functions.
        for sql in [
            "update nightowls.floors set holder = 'me'",
            "update nightowls.floor_tickets set holding = true",
            "delete from nightowls.floors",
            "insert into nightowls.floors (org_id, container) values (gen_random_uuid(), 'x')",
            "select from nightowls.floors for update",
        ] {
            assert_eq!(open().refused(sql).code, "42501", "{sql}");
        }
    });
}

#[test]
fn the_line_goes_by_tickets_and_no_later_ticket_is_drawn_before_an_earlier_one_is_committed() {
    on_each_pool(|db, open| {
        let mut watcher = db.direct(SUPERUSER);
        let fence = take(&mut open(), "c", "h0");
        // The ticket is drawn and not committed: who comes later waits for it, and comes later.
        let mut slow = open();
        slow.exec("begin");
        let first = request(&mut slow, "c", "h1");
        let second = std::thread::scope(|scope| {
            let thread = scope.spawn(|| request(&mut open(), "c", "h2"));
            wait_until("the second waits", Duration::from_secs(10), || {
                text(
                    &mut watcher,
                    "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'",
                ) == "1"
            });
            slow.exec("commit");
            thread.join().expect("the thread ends")
        });
        assert_eq!((first.ticket, second.ticket), (2, 3));
        assert_eq!((first.ahead, second.ahead), (Some(1), Some(2)));

        // Whoever asks first: only the first in line gets it.
        assert!(release(&mut open(), "c", "h0", fence));
        assert_eq!(request(&mut open(), "c", "h3").ahead, Some(2));
        assert!(!request(&mut open(), "c", "h2").granted);
        assert!(!request(&mut open(), "c", "h3").granted);
        for (number, holder) in ["h1", "h2", "h3"].iter().enumerate() {
            for other in ["h3", "h2", "h1"] {
                assert_eq!(
                    request(&mut open(), "c", other).granted,
                    other == *holder,
                    "{number}: {other}"
                );
                if other == *holder {
                    break;
                }
            }
            let fence = take(&mut open(), "c", holder);
            assert!(release(&mut open(), "c", holder, fence));
        }
    });
}

#[test]
fn a_retried_request_keeps_its_place_and_a_late_one_does_no_harm() {
    on_each_pool(|db, open| {
        let by_id = "request_floor('c', 'h', request_id => 'r1')";
        let first = call(&mut open(), by_id);
        assert!(first.granted);
        assert_eq!(call(&mut open(), by_id), first);

        // Many at once of one request are one.
        for arguments in ["'w1', request_id => 'r2'", "'w2'"] {
            let answers = together(
                8,
                |_| open(),
                |_, mut session| call(&mut session, &format!("request_floor('c', {arguments})")),
            );
            assert!(
                answers.iter().all(|answer| *answer == answers[0]),
                "{answers:?}"
            );
        }
        assert_eq!(
            lines(
                &mut db.direct(SUPERUSER),
                "select holder, ticket from nightowls.floor_tickets order by ticket"
            ),
            ["h 1", "w1 2", "w2 3"]
        );
        // The same holder, another request: another place.
        assert_eq!(
            call(&mut open(), "request_floor('c', 'w1', request_id => 'r3')").ticket,
            4
        );
        assert_eq!(
            call(&mut open(), "request_floor('c', 'w1', request_id => 'r2')").ticket,
            2
        );
        let refusal =
            open().refused("select nightowls.request_floor('c', 'other', request_id => 'r2')");
        assert_eq!(refusal.code, "NW002", "{refusal}");

        // A retry that comes when all is over takes nothing.
        let fence = first.fence.expect("granted");
        assert!(release(&mut open(), "c", "h", fence));
        let before = everything(db);
        let refusal =
            open().refused("select nightowls.request_floor('c', 'h', request_id => 'r1')");
        assert_eq!(refusal.code, "NW003", "{refusal}");
        assert_eq!(everything(db), before);
        // Without an id it is a request of its own, behind the others.
        let fresh = request(&mut open(), "c", "w1");
        assert_eq!((fresh.granted, fresh.ticket), (false, 5));
    });
}

#[test]
fn every_call_is_one_short_transaction_on_any_connection() {
    on_each_pool(|db, open| {
        // Each call by a client of its own; nothing is left behind on the connection.
        let mut watcher = db.direct(SUPERUSER);
        let mut clean = |after: &str| {
            assert_eq!(
                text(
                    &mut watcher,
                    "select count(*) from pg_locks l join pg_stat_activity a using (pid)
                      where a.datname = current_database() and a.pid <> pg_backend_pid() and a.usename = 'owl_service'"
                ),
                "0",
                "{after}"
            );
        };
        let mut sessions: Vec<Session> = (0..6).map(|_| open()).collect();
        let mut next = 0;
        let mut session = || {
            next = (next + 1) % 6;
            next
        };
        for round in 0..10 {
            let holder = format!("h{round}");
            let fence = take(&mut sessions[session()], "c", &holder);
            clean("request_floor");
            let waiting = request(&mut sessions[session()], "c", "w");
            assert!(!waiting.granted);
            assert!(beat(&mut sessions[session()], "c", &holder, fence));
            clean("heartbeat_floor");
            sessions[session()].exec(&guarded("c", fence));
            clean("append_event");
            sessions[session()].exec(&format!("select nightowls.assert_floor('c', {fence})"));
            clean("assert_floor");
            assert!(release(&mut sessions[session()], "c", &holder, fence));
            clean("release_floor");
            let waited = call(
                &mut sessions[session()],
                &format!("await_floor('c', 'w', {})", waiting.ticket),
            );
            clean("await_floor");
            let fence = waited.fence.expect("the floor is free");
            assert!(release(&mut sessions[session()], "c", "w", fence));
        }
        // Nor does one leave a setting.
        assert_eq!(
            text(
                &mut sessions[0],
                "select concat(current_setting('nightowls.held', true), current_setting('nightowls.door', true))"
            ),
            ""
        );
    });
}

#[test]
fn a_waiter_that_stops_asking_is_skipped_and_told_so_and_never_granted_late() {
    on_each_pool(|db, open| {
        let fence = take(&mut open(), "c", "h");
        assert_eq!(request(&mut open(), "c", "w1").ticket, 2);
        assert_eq!(request(&mut open(), "c", "w2").ticket, 3);
        // max(10 * 250 ms, 5 s): not yet. What is written down may be a second old.
        silence(db, "c", "w1", 4_000);
        assert!(release(&mut open(), "c", "h", fence));
        assert!(!request(&mut open(), "c", "w2").granted);
        silence(db, "c", "w1", 2_000);
        let granted = request(&mut open(), "c", "w2");
        assert!(granted.granted);

        // The late one is told, whichever way it asks, and stands at the end of the line.
        let late = call(&mut open(), "await_floor('c', 'w1', 2)");
        assert!(late.skipped && !late.granted, "{late:?}");
        assert_eq!(request(&mut open(), "c", "w3").ticket, 4);
        let late = request(&mut open(), "c", "w1");
        assert!(late.skipped && !late.granted, "{late:?}");
        assert_eq!((late.ticket, late.ahead), (5, Some(2)));
        // Told once; from now on it waits like any other.
        assert!(!request(&mut open(), "c", "w1").skipped);

        // Silence counts though nobody has passed by.
        silence(db, "c", "w1", 6_000);
        let late = request(&mut open(), "c", "w1");
        assert!(late.skipped && !late.granted, "{late:?}");
        assert_eq!(late.ticket, 6);
        // The last in line that was silent is behind nobody, and is still told.
        assert!(release(
            &mut open(),
            "c",
            "w2",
            granted.fence.expect("granted")
        ));
        silence(db, "c", "w3", 6_000);
        silence(db, "c", "w1", 6_000);
        let late = request(&mut open(), "c", "w1");
        assert!(late.skipped && late.granted, "{late:?}");
        assert_eq!(late.ticket, 7);

        // Who asks less often may be silent for longer: ten polls.
        let slow = call(&mut open(), "request_floor('c', 'slow', poll_ms => 1000)");
        assert_eq!(slow.retry_in_ms, Some(1000));
        let fast = request(&mut open(), "c", "fast");
        assert_eq!(fast.ahead, Some(2));
        silence(db, "c", "slow", 10_000);
        assert_eq!(request(&mut open(), "c", "fast").ahead, Some(2));
        silence(db, "c", "slow", 2_000);
        assert_eq!(request(&mut open(), "c", "fast").ahead, Some(1));

        // An answer that was lost does not make a skipped waiter of one with a request_id.
        let waiting = call(&mut open(), "request_floor('d', 'h', request_id => 'a')");
        assert!(waiting.granted);
        call(&mut open(), "request_floor('d', 'w', request_id => 'b')");
        call(&mut open(), "request_floor('d', 'x', request_id => 'c')");
        silence(db, "d", "w", 6_000);
        assert!(release(
            &mut open(),
            "d",
            "h",
            waiting.fence.expect("granted")
        ));
        assert!(call(&mut open(), "request_floor('d', 'x', request_id => 'c')").granted);
        let late = call(&mut open(), "request_floor('d', 'w', request_id => 'b')");
        assert!(late.skipped && !late.granted, "{late:?}");
        assert_eq!(late.ticket, 4);
    });
}

#[test]
fn a_holder_is_stale_when_the_database_s_clock_says_so_and_not_while_it_beats() {
    on_each_pool(|db, open| {
        let fence = take(&mut open(), "c", "h");
        assert!(!request(&mut open(), "c", "w").granted);
        // 179 of 180 seconds.
        hold_for(db, "c", "heartbeat_at", 179_000);
        assert!(!request(&mut open(), "c", "w").granted);
        open().exec(&guarded("c", fence));
        assert!(beat(&mut open(), "c", "h", fence));
        hold_for(db, "c", "heartbeat_at", 179_000);
        assert!(!request(&mut open(), "c", "w").granted);
        assert_eq!(
            text(&mut open(), "select status from nightowls.floor_status"),
            "held"
        );
        // The clock of the client says nothing.
        hold_for(db, "c", "heartbeat_at", 1_000);
        assert_eq!(
            text(&mut open(), "select status from nightowls.floor_status"),
            "stale"
        );
        let before = everything(db);
        assert!(!beat(&mut open(), "c", "h", fence));
        assert_eq!(open().refused(&guarded("c", fence)).code, "NW003");
        assert!(!release(&mut open(), "c", "h", fence));
        assert_eq!(everything(db), before);
        assert!(request(&mut open(), "c", "w").granted);

        // A limit on the whole: beating does not help.
        let answer = call(
            &mut open(),
            "request_floor('t', 'h', max_hold_ms => 1000000, max_total_ms => 2000000)",
        );
        let fence = answer.fence.expect("the floor is free");
        hold_for(db, "t", "granted_at", 1_999_000);
        assert!(beat(&mut open(), "t", "h", fence));
        assert!(!request(&mut open(), "t", "w").granted);
        hold_for(db, "t", "granted_at", 1_000);
        assert!(!beat(&mut open(), "t", "h", fence));
        assert_eq!(open().refused(&guarded("t", fence)).code, "NW003");
        assert!(request(&mut open(), "t", "w").granted);
    });
}

#[test]
fn a_beating_holder_keeps_the_floor_beyond_max_hold_ms_and_a_silent_one_loses_it() {
    on_each_pool(|_, open| {
        let held = call(&mut open(), "request_floor('c', 'h', max_hold_ms => 1000)");
        let fence = held.fence.expect("the floor is free");
        let start = Instant::now();
        let mut session = open();
        wait_until(
            "two and a half times max_hold_ms",
            Duration::from_secs(60),
            || {
                assert!(beat(&mut session, "c", "h", fence));
                assert!(!request(&mut session, "c", "w").granted);
                start.elapsed() > Duration::from_millis(2500)
            },
        );
        let mut asked = 0;
        wait_until("the waiter gets it", Duration::from_secs(60), || {
            asked += 1;
            request(&mut session, "c", "w").granted
        });
        assert!(asked > 1, "it was granted at once");
        assert!(!beat(&mut session, "c", "h", fence));
    });
}

#[test]
fn a_stale_floor_goes_to_the_next_who_asks_and_two_who_race_make_one_grant() {
    on_each_pool(|db, open| {
        for round in 0..5 {
            let container = format!("c{round}");
            take(&mut open(), &container, "dead");
            hold_for(db, &container, "heartbeat_at", 180_000);
            let answers = together(
                8,
                |_| open(),
                |number, mut session| request(&mut session, &container, &format!("h{number}")),
            );
            let granted: Vec<_> = answers.iter().filter(|answer| answer.granted).collect();
            assert_eq!(granted.len(), 1, "{answers:?}");
            assert_eq!(granted[0].ticket, 2);
            let log = events(db, &container);
            assert_eq!(log.len(), 3, "{log:?}");
            assert!(log[1].starts_with("floor_reclaimed dead 1"), "{log:?}");
            assert!(log[2].starts_with("floor_granted"), "{log:?}");

            // The same, of those who stand in line already, each asking twice at once.
            hold_for(db, &container, "heartbeat_at", 180_000);
            let next = answers
                .iter()
                .position(|answer| answer.ticket == 3)
                .expect("somebody was second");
            let again = together(
                8,
                |_| open(),
                |number, mut session| {
                    let holder = if number < 4 { next } else { number };
                    request(&mut session, &container, &format!("h{holder}"))
                },
            );
            // All may have found the row locked by another's look; who asks once more gets it.
            let last = request(&mut open(), &container, &format!("h{next}"));
            assert!(last.granted, "{last:?}");
            assert!(
                again
                    .iter()
                    .all(|answer| answer.fence.is_none() || answer.fence == last.fence),
                "{again:?}"
            );
            assert!(
                again
                    .iter()
                    .all(|answer| !answer.granted || answer.ticket == 3),
                "{again:?}"
            );
            assert_eq!(events(db, &container).len(), 5);
        }
    });
}

#[test]
fn the_fence_rises_with_every_grant_and_a_late_write_fails() {
    on_each_pool(|db, open| {
        let since_2020 = "floor(extract(epoch from clock_timestamp() - timestamptz '2020-01-01 00:00:00+00') * 1000)";
        let before: i64 = text(&mut open(), &format!("select {since_2020}"))
            .parse()
            .expect("a number");
        let mut fences = vec![before - 1];
        for round in 0..50 {
            let holder = format!("h{}", round % 3);
            let fence = take(&mut open(), "c", &holder);
            assert!(fence > *fences.last().expect("not empty"));
            if round % 2 == 0 {
                assert!(release(&mut open(), "c", &holder, fence));
            } else {
                hold_for(db, "c", "heartbeat_at", 180_000);
            }
            fences.push(fence);
        }
        // None of them is any good: lost, released, or never granted.
        let last = *fences.last().expect("not empty");
        for fence in fences.iter().chain(&[last + 1, 0, -1, i64::MAX]) {
            for write in [
                guarded("c", *fence),
                format!(
                    r#"select nightowls.append_events('work', 'c', '[{{"event_type": "written"}}]', container => 'c', fence => {fence})"#
                ),
                format!("select nightowls.assert_floor('c', {fence})"),
            ] {
                let refusal = open().refused(&write);
                assert_eq!(refusal.code, "NW003", "{write}: {refusal}");
                assert!(refusal.message.contains(&fence.to_string()), "{refusal}");
            }
        }
        assert_eq!(
            text(
                &mut open(),
                "select count(*) from nightowls.events where aggregate_type = 'work'"
            ),
            "0"
        );
        // A clock that was set back, or rows of another server's: it goes on from where it was.
        db.direct(SUPERUSER)
            .exec("update nightowls.floors set fence = 9000000000000000");
        assert_eq!(take(&mut open(), "c", "h"), 9000000000000001);
        open().exec(&guarded("c", 9000000000000001));
        // Never granted at all.
        assert_eq!(open().refused(&guarded("other", last)).code, "NW003");
    });
}

#[test]
fn a_retry_of_a_guarded_append_that_arrived_gets_its_first_result_though_the_floor_is_lost() {
    on_each_pool(|db, open| {
        let fence = take(&mut open(), "c", "h");
        let id = |number: u32| format!("00000000-0000-4000-8000-{number:012}");
        let calls = [
            format!(
                "select nightowls.append_event('work', 'c', 'written', event_id => '{}', container => 'c', fence => {fence})",
                id(1)
            ),
            format!(
                r#"select nightowls.append_events('work', 'c', '[{{"event_type": "written", "event_id": "{}"}}]', container => 'c', fence => {fence})"#,
                id(2)
            ),
        ];
        let first: Vec<_> = calls.iter().map(|sql| text(&mut open(), sql)).collect();
        assert!(release(&mut open(), "c", "h", fence));
        take(&mut open(), "c", "other");
        let again: Vec<_> = calls.iter().map(|sql| text(&mut open(), sql)).collect();
        assert_eq!(again, first);
        // One that did not arrive does not do so now, nor does a known id open the door to another body.
        for (number, sql) in calls.iter().enumerate() {
            let new = sql.replace(&id(1 + number as u32), &id(9));
            assert_eq!(open().refused(&new).code, "NW003", "{new}");
            let other = sql.replace("written", "rewritten");
            assert_eq!(open().refused(&other).code, "NW002", "{other}");
        }
        assert_eq!(
            text(
                &mut db.direct(SUPERUSER),
                "select count(*) from nightowls.events where aggregate_type = 'work'"
            ),
            "2"
        );
    });
}

#[test]
fn a_guarded_write_keeps_the_next_grant_waiting_until_it_is_committed() {
    on_each_pool(|db, open| {
        for write in [
            "select nightowls.append_event('work', 'c', 'written', container => 'c', fence => FENCE)",
            "select nightowls.assert_floor('c', FENCE); \
             insert into nightowls.events (aggregate_type, aggregate_id, event_type) values ('work', 'c', 'inserted')",
        ] {
            for commit in ["commit", "rollback"] {
                let held = call(&mut open(), "request_floor('c', 'h', max_hold_ms => 10000)");
                let fence = held.fence.expect("the floor is free");
                let mut writer = open();
                writer.exec("begin");
                writer.exec(&write.replace("FENCE", &fence.to_string()));
                // The holder's time is over, and somebody waits. Nobody is granted, nobody hangs.
                let ticket = request(&mut open(), "c", "w").ticket;
                hold_for(db, "c", "heartbeat_at", 10_000);
                for _ in 0..3 {
                    let answer = request(&mut open(), "c", "w");
                    assert!(!answer.granted, "{answer:?}");
                    assert_eq!(answer.ahead, Some(1));
                }
                let answer = call(&mut open(), &format!("await_floor('c', 'w', {ticket}, 50)"));
                assert!(!answer.granted, "{answer:?}");
                // In the same transaction the late one is told.
                writer.exec("savepoint s");
                let refusal = writer.refused(&guarded("c", fence));
                assert_eq!(refusal.code, "NW003", "{refusal}");
                writer.exec("rollback to s");
                writer.exec(commit);

                let next = take(&mut open(), "c", "w");
                assert_eq!(writer.refused(&guarded("c", fence)).code, "NW003");
                assert!(release(&mut open(), "c", "w", next));
            }
        }
        // What was written and committed came before the next grant.
        let log = lines(
            &mut db.direct(SUPERUSER),
            "select event_type from nightowls.events where event_type <> 'floor_reclaimed' order by position",
        );
        assert_eq!(
            log,
            [
                "floor_granted",
                "written",
                "floor_granted",
                "floor_granted",
                "floor_granted",
                "floor_granted",
                "inserted",
                "floor_granted",
                "floor_granted",
                "floor_granted",
            ]
        );
    });
}

#[test]
fn a_release_in_an_open_transaction_lets_nobody_in_before_its_commit() {
    on_each_pool(|_, open| {
        let fence = take(&mut open(), "c", "h");
        let ticket = request(&mut open(), "c", "w").ticket;
        let mut holder = open();
        holder.exec("begin");
        holder.exec(&guarded("c", fence));
        assert!(release(&mut holder, "c", "h", fence));
        assert_eq!(
            {
                holder.exec("savepoint s");
                holder.refused(&guarded("c", fence)).code
            },
            "NW003"
        );
        holder.exec("rollback to s");
        assert!(!request(&mut open(), "c", "w").granted);
        assert!(!call(&mut open(), &format!("await_floor('c', 'w', {ticket}, 20)")).granted);
        holder.exec("rollback");
        // Taken back: still held.
        assert!(!request(&mut open(), "c", "w").granted);
        assert!(beat(&mut open(), "c", "h", fence));
        assert!(release(&mut open(), "c", "h", fence));
        assert!(request(&mut open(), "c", "w").granted);
    });
}

#[test]
fn a_holder_s_heartbeat_and_new_requests_do_not_wait_for_its_open_write() {
    on_each_pool(|db, open| {
        let fence = take(&mut open(), "c", "h");
        let mut writer = open();
        writer.exec("begin");
        writer.exec(&guarded("c", fence));
        hold_for(db, "c", "heartbeat_at", 100_000);
        let mut other = open();
        other.exec("begin; set local lock_timeout = '5s'");
        assert!(beat(&mut other, "c", "h", fence));
        assert_eq!(request(&mut other, "c", "w").ticket, 2);
        assert_eq!(request(&mut other, "c", "x").ahead, Some(2));
        other.exec("commit");
        // A second write beside the first, and a release beside both.
        other.exec("begin; set local lock_timeout = '5s'");
        other.exec("select nightowls.append_event('work', 'other', 'written', container => 'c', fence => FENCE)"
            .replace("FENCE", &fence.to_string())
            .as_str());
        assert!(release(&mut other, "c", "h", fence));
        other.exec("commit");
        // Released, but a write of the last holder is open: not yet.
        assert!(!request(&mut other, "c", "w").granted);
        writer.exec("commit");
        assert!(request(&mut other, "c", "w").granted);
    });
}

#[test]
fn a_write_that_begins_during_a_grant_waits_for_it_and_is_then_refused() {
    on_each_pool(|db, open| {
        let mut watcher = db.direct(SUPERUSER);
        let mut fence = take(&mut open(), "c", "h");
        for end in ["rollback", "commit"] {
            // One transaction gives it back and hands it on: the late write still sees the old holder.
            let mut next = open();
            next.exec("begin");
            assert!(release(&mut next, "c", "h", fence));
            let granted = request(&mut next, "c", "w");
            assert!(granted.granted);
            let mut late = open();
            let result = std::thread::scope(|scope| {
                let thread = scope.spawn(|| late.try_exec(&guarded("c", fence)));
                wait_until("the write waits", Duration::from_secs(10), || {
                    text(
                        &mut watcher,
                        "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'",
                    ) != "0"
                });
                next.exec(end);
                thread.join().expect("the thread ends")
            });
            match (end, result) {
                ("rollback", result) => result.expect("it is still held"),
                (_, result) => {
                    let refusal = result.expect_err("the floor is another's");
                    assert_eq!(refusal.code, "NW003", "{refusal}");
                    fence = granted.fence.expect("granted");
                    open().exec(&guarded("c", fence));
                }
            }
        }
    });
}

#[test]
fn a_paused_backend_wakes_up_after_its_time_and_writes_nothing() {
    on_each_install(|db| {
        default_org(db);
        for in_transaction in [true, false] {
            let held = call(
                &mut db.service(),
                "request_floor('c', 'h', max_hold_ms => 1000)",
            );
            let fence = held.fence.expect("the floor is free");
            let mut zombie = db.service();
            if in_transaction {
                zombie.exec("begin");
                zombie.exec(&guarded("c", fence));
            }
            let pid = zombie.pid().to_string();
            kill("-STOP", &pid);
            let mut next = db.service();
            wait_until("its time is over", Duration::from_secs(30), || {
                text(&mut next, "select status from nightowls.floor_status") == "stale"
            });
            // In an open transaction it wrote in time, and that stands; the next waits for it.
            assert_eq!(request(&mut next, "c", "w").granted, !in_transaction);
            kill("-CONT", &pid);
            let refusal = zombie.refused(&guarded("c", fence));
            assert_eq!(refusal.code, "NW003", "{refusal}");
            if in_transaction {
                zombie.exec("rollback");
                assert!(request(&mut next, "c", "w").granted);
            }
            assert_eq!(zombie.refused(&guarded("c", fence)).code, "NW003");
            let fence = request(&mut next, "c", "w").fence.expect("granted");
            assert!(release(&mut next, "c", "w", fence));
        }
        assert_eq!(
            text(
                &mut db.service(),
                "select count(*) from nightowls.events where aggregate_type = 'work'"
            ),
            "0"
        );
    });
}

#[test]
fn a_late_heartbeat_or_release_changes_nothing_and_a_release_may_be_repeated() {
    on_each_pool(|db, open| {
        let first = take(&mut open(), "c", "h");
        assert!(release(&mut open(), "c", "h", first));
        let before = everything(db);
        for _ in 0..2 {
            assert!(!release(&mut open(), "c", "h", first));
            assert!(!beat(&mut open(), "c", "h", first));
        }
        assert_eq!(everything(db), before);

        // Another has it now; and the same again, with a new fence.
        for holder in ["other", "h"] {
            let fence = take(&mut open(), "c", holder);
            request(&mut open(), "c", "w");
            let before = everything(db);
            assert!(!release(&mut open(), "c", "h", first));
            assert!(!beat(&mut open(), "c", "h", first));
            // The fence alone is not enough, nor is the name.
            assert!(!release(&mut open(), "c", "thief", fence));
            assert!(!beat(&mut open(), "c", "thief", fence));
            assert!(!release(&mut open(), "never asked for", "h", fence));
            assert!(!beat(&mut open(), "never asked for", "h", fence));
            assert_eq!(everything(db), before);
            assert!(release(&mut open(), "c", holder, fence));
            silence(db, "c", "w", 6_000);
        }
    });
}

/// As [`on_each_pool`], on a server where nobody else's open transaction keeps what is dead.
fn on_each_pool_alone(test: impl Fn(&Db, Open)) {
    own_cluster(|cluster| {
        for install in Install::ALL {
            let db = cluster.database(install);
            default_org(&db);
            test(&db, &|| db.service());
            if pooler_or_skip() {
                let db = cluster.database(install);
                default_org(&db);
                test(&db, &|| db.pooled_by(2, SERVICE));
            }
        }
    });
}

#[test]
fn fifty_waiters_that_ask_all_the_time_bloat_nothing() {
    on_each_pool_alone(|db, open| {
        let fence = take(&mut open(), "c", "h");
        let mut session = open();
        let mut superuser = db.direct(SUPERUSER);
        let mut poll = |waiter: usize| {
            assert!(!request(&mut session, "c", &format!("w{waiter}")).granted);
        };
        (0..50).for_each(&mut poll);

        // What was written down a moment ago is not written again.
        superuser.exec("update nightowls.floor_tickets set polled_at = clock_timestamp() + interval '1 h'; \
                        update nightowls.floors set heartbeat_at = clock_timestamp() + interval '1 h'");
        let rows = "select ctid::text, f::text from nightowls.floors f union all \
                    select ctid::text, t::text from nightowls.floor_tickets t order by 1, 2";
        let before = lines(&mut superuser, rows);
        for _ in 0..4 {
            (0..50).for_each(&mut poll);
            assert!(beat(&mut open(), "c", "h", fence));
        }
        assert_eq!(lines(&mut superuser, rows), before);

        // What is written takes the place of what was there, and no index hears of it: 2,000 polls, each of them due.
        superuser.exec(
            "update nightowls.floor_tickets set polled_at = clock_timestamp(); \
             update nightowls.floors set heartbeat_at = clock_timestamp()",
        );
        superuser.exec("vacuum nightowls.floors, nightowls.floor_tickets");
        let sizes = "select c.relname, pg_relation_size(c.oid) from pg_class c
                      where c.relnamespace = 'nightowls'::regnamespace and c.relname like 'floor%' and c.relkind in ('r', 'i') order by 1";
        let before = lines(&mut superuser, sizes);
        for _ in 0..40 {
            for waiter in 0..50 {
                superuser.exec(&format!(
                    "update nightowls.floor_tickets set polled_at = polled_at - interval '1100 ms' where holder = 'w{waiter}'"
                ));
                poll(waiter);
            }
            hold_for(db, "c", "heartbeat_at", 1_100);
            assert!(beat(&mut open(), "c", "h", fence));
        }
        assert_eq!(lines(&mut superuser, sizes), before);
        // Nor do the polls fill the log.
        assert_eq!(events(db, "c"), ["floor_granted h 1"]);
    });
}

#[test]
fn grants_skips_and_reclaims_are_events_of_the_floor() {
    on_each_pool(|db, open| {
        db.owner().exec(
            r#"select nightowls.create_projection('holders', 'floor',
                 '{"on": {"floor_granted": [{"op": "set", "path": "holder", "value": "$.holder"}, {"op": "set", "path": "fence", "value": "$.fence"}]}}')"#,
        );
        let first = call(&mut open(), "request_floor('c', 'h1', request_id => 'r1')");
        request(&mut open(), "c", "w1");
        request(&mut open(), "c", "w2");
        silence(db, "c", "w1", 6_000);
        hold_for(db, "c", "heartbeat_at", 180_000);
        let second = request(&mut open(), "c", "w2");
        let fences = (
            first.fence.expect("granted"),
            second.fence.expect("granted"),
        );
        assert!(release(&mut open(), "c", "w2", fences.1));
        let third = take(&mut open(), "c", "h3");
        let log = lines(
            &mut open(),
            "select version, event_type, payload - 'silent_ms' - 'held_ms' - 'waited_ms' - 'previous_released_at' \
               from nightowls.read_aggregate('floor', 'c')",
        );
        assert_eq!(
            log,
            [
                format!(
                    r#"1 floor_granted {{"fence": {}, "holder": "h1", "ticket": 1, "request_id": "r1"}}"#,
                    fences.0
                ),
                format!(
                    r#"2 floor_reclaimed {{"fence": {}, "holder": "h1", "ticket": 1, "new_fence": {}}}"#,
                    fences.0, fences.1
                ),
                r#"3 floor_skipped {"holder": "w1", "ticket": 2}"#.to_owned(),
                format!(
                    r#"4 floor_granted {{"fence": {}, "holder": "w2", "ticket": 3, "previous_fence": {}}}"#,
                    fences.1, fences.0
                ),
                format!(
                    r#"5 floor_granted {{"fence": {third}, "holder": "h3", "ticket": 4, "previous_fence": {}}}"#,
                    fences.1
                ),
            ]
        );
        let times = lines(
            &mut open(),
            "select (payload ->> 'silent_ms')::int between 180000 and 240000 or (payload ->> 'silent_ms')::int between 6000 and 66000, \
                    payload ? 'previous_released_at', payload ? 'waited_ms' \
               from nightowls.read_aggregate('floor', 'c')",
        );
        assert_eq!(
            times,
            ["null f t", "t f f", "t f f", "null f t", "null t t"]
        );
        // They are events like any other: projections follow.
        assert_eq!(
            text(
                &mut open(),
                "select nightowls.state('holders', 'c') ->> 'holder'"
            ),
            "h3"
        );
        // What is rolled back leaves neither a grant nor an event.
        assert!(release(&mut open(), "c", "h3", third));
        let before = everything(db);
        let mut session = open();
        session.exec("begin");
        assert!(request(&mut session, "c", "h4").granted);
        session.exec("rollback");
        assert_eq!(everything(db), before);
    });
}

// What else must be so.

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
fn floors_and_fences_survive_a_crash() {
    own_cluster(|cluster| {
        for install in Install::ALL {
            let db = cluster.database(install);
            default_org(&db);
            // Whoever commits carelessly: a grant is on disk before it is told.
            let mut session = db.service();
            session.exec("set synchronous_commit = off; begin");
            let held = request(&mut session, "c", "h");
            assert_eq!(text(&mut session, "show synchronous_commit"), "on");
            session.exec("commit");
            assert_eq!(text(&mut session, "show synchronous_commit"), "off");
            request(&mut session, "c", "w");
            session.exec("begin; set local synchronous_commit = remote_write");
            request(&mut session, "d", "h");
            assert_eq!(
                text(&mut session, "show synchronous_commit"),
                "remote_write"
            );
            session.exec("commit");
            let before = everything(&db);
            cluster.kill9_postmaster_and_restart();
            assert_eq!(everything(&db), before);
            let mut session = db.service();
            assert_eq!(request(&mut session, "c", "h"), held);
            let fence = held.fence.expect("granted");
            assert!(beat(&mut session, "c", "h", fence));
            session.exec(&guarded("c", fence));
            assert_eq!(request(&mut session, "c", "w").ticket, 2);
            assert!(release(&mut session, "c", "h", fence));
            assert!(take(&mut session, "c", "w") > fence);
        }
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
