//! The eleven guarantees of DESIGN.md 5, each by its number: `cargo test --test suite guarantee_08`.
//! On both installs, straight to the server and through a PgBouncer with two connections;
//! what a dump brings back is in dump.rs.

use std::time::{Duration, Instant};

use crate::fixture::{default_org, lines, together};
use crate::floors::{
    Open, beat, call, events, everything, guarded, hold_for, on_each_pool, release, request,
    silence, take,
};
use crate::projections::text;
use crate::support::{
    Db, Install, SERVICE, SUPERUSER, Session, kill, on_each_install, own_cluster, pooler_or_skip,
    wait_until,
};

#[test]
fn guarantee_01_one_holder_at_a_time_and_the_table_itself_takes_no_second_one() {
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
fn guarantee_02_the_line_goes_by_tickets_and_no_later_ticket_is_drawn_before_an_earlier_one_is_committed()
 {
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
fn guarantee_03_a_retried_request_keeps_its_place_and_a_late_one_does_no_harm() {
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
fn guarantee_04_every_call_is_one_short_transaction_on_any_connection() {
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
fn guarantee_05_a_waiter_that_stops_asking_is_skipped_and_told_so_and_never_granted_late() {
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
fn guarantee_06_a_holder_is_stale_when_the_database_s_clock_says_so_and_not_while_it_beats() {
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
fn guarantee_06_a_beating_holder_keeps_the_floor_beyond_max_hold_ms_and_a_silent_one_loses_it() {
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
fn guarantee_07_a_stale_floor_goes_to_the_next_who_asks_and_two_who_race_make_one_grant() {
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
fn guarantee_08_the_fence_rises_with_every_grant_and_a_late_write_fails() {
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
fn guarantee_08_a_retry_of_a_guarded_append_that_arrived_gets_its_first_result_though_the_floor_is_lost()
 {
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
fn guarantee_08_a_guarded_write_keeps_the_next_grant_waiting_until_it_is_committed() {
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
fn guarantee_08_a_release_in_an_open_transaction_lets_nobody_in_before_its_commit() {
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
fn guarantee_08_a_holder_s_heartbeat_and_new_requests_do_not_wait_for_its_open_write() {
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
fn guarantee_08_a_write_that_begins_during_a_grant_waits_for_it_and_is_then_refused() {
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
fn guarantee_08_a_paused_backend_wakes_up_after_its_time_and_writes_nothing() {
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
fn guarantee_08_floors_and_fences_survive_a_crash() {
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
fn guarantee_09_a_late_heartbeat_or_release_changes_nothing_and_a_release_may_be_repeated() {
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
fn guarantee_10_fifty_waiters_that_ask_all_the_time_bloat_nothing() {
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
fn guarantee_11_grants_skips_and_reclaims_are_events_of_the_floor() {
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
