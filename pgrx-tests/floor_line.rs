//! Leaving a floor's line, the fence of an ack, and the sweep of what is long over.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::fixture::{default_org, lines, org_apart_from, together};
use crate::floors::{
    beat, call, events, everything, guarded, hold_for, on_each_pool, release, request, silence,
    take, yes,
};
use crate::projections::text;
use crate::queue::{read, settle};
use crate::support::{Db, SUPERUSER, Session, on_each_install, wait_until};
use crate::wait::{on_each_server, on_each_that_wakes, until_asleep};

#[track_caller]
fn leave(session: &mut Session, container: &str, holder: &str, ticket: i64) -> bool {
    yes(session, "leave_floor", container, holder, ticket)
}

#[test]
fn an_ack_that_names_a_fence_is_refused_once_the_floor_is_lost() {
    on_each_pool(|db, open| {
        open().exec("select nightowls.create_queue('jobs'); select nightowls.send_batch('jobs', array['1', '2', '3', '4']::jsonb[])");
        let fence = take(&mut open(), "c", "h");
        let claims = read(&mut open(), "jobs", 600, 4);
        let by = |fence: i64| format!(", container => 'c', fence => {fence}");
        let many = |by: &str| {
            format!(
                "select nightowls.ack_many('jobs', array[{}, {}], array['{}', '{}']::uuid[]{by})",
                claims[1].id, claims[2].id, claims[1].receipt, claims[2].receipt
            )
        };
        let one = |fence: &str| {
            format!(
                "select nightowls.ack('jobs', {}, '{}'{fence})",
                claims[3].id, claims[3].receipt
            )
        };
        assert!(settle(&mut open(), "ack", "jobs", &claims[0], &by(fence)));
        assert!(!settle(&mut open(), "ack", "jobs", &claims[0], &by(fence)));

        // Lost by time, then given to another: nothing is settled, nothing is forgotten.
        let left = "select msg_id, receipt from nightowls.queue_messages order by 1";
        let before = lines(&mut open(), left);
        assert_eq!(before.len(), 3);
        hold_for(db, "c", "heartbeat_at", 180_000);
        let mut next = fence;
        for _ in 0..2 {
            for sql in [
                one(&by(fence)),
                many(&by(fence)),
                one(&by(fence + 1_000_000_000_000)),
            ] {
                let refusal = open().refused(&sql);
                assert_eq!(refusal.code, "NW003", "{sql}: {refusal}");
            }
            // Whatever became of the message.
            let gone = one(&by(fence)).replace(&claims[3].id, "0");
            assert_eq!(open().refused(&gone).code, "NW003");
            if next == fence {
                next = take(&mut open(), "c", "other");
            }
        }
        for half in [", container => 'c'", ", fence => 1"] {
            for sql in [one(half), many(half)] {
                assert_eq!(open().refused(&sql).code, "22004", "{sql}");
            }
        }
        assert_eq!(lines(&mut open(), left), before);

        // An ack is a guarded write: the next grant comes after its commit.
        let mut worker = open();
        worker.exec("begin");
        assert_eq!(lines(&mut worker, &many(&by(next))).len(), 2);
        let mut other = open();
        request(&mut other, "c", "w");
        assert!(release(&mut other, "c", "other", next));
        assert!(!request(&mut other, "c", "w").granted);
        worker.exec("commit");
        assert!(request(&mut other, "c", "w").granted);
        // Without a fence it is as ever.
        assert_eq!(text(&mut open(), &one("")), "t");
        assert_eq!(
            text(&mut open(), "select count(*) from nightowls.queue_messages"),
            "0"
        );

        // Another org's floor of that name is no good.
        let own = text(&mut open(), "select nightowls.current_org()");
        let other = org_apart_from(db, &own);
        open().exec(&format!(
            "select nightowls.create_queue('jobs', org => '{other}'), nightowls.send('jobs', '1', org => '{other}')"
        ));
        let fence = request(&mut open(), "c", "w").fence.expect("it holds");
        let claim = open().rows(&format!(
            "select msg_id, receipt from nightowls.read('jobs', 600, 1, org => '{other}')"
        ))[0]
            .clone();
        let ack = format!(
            "select nightowls.ack('jobs', {}, '{}', container => 'c', fence => {fence}, org => '{other}')",
            claim[0].as_ref().expect("an id"),
            claim[1].as_ref().expect("a receipt")
        );
        assert_eq!(open().refused(&ack).code, "NW003");
    });
}

#[test]
fn who_leaves_the_line_is_passed_over_at_once() {
    on_each_pool(|db, open| {
        let fence = take(&mut open(), "c", "h");
        let first = call(&mut open(), "request_floor('c', 'w1', request_id => 'r1')").ticket;
        let second = request(&mut open(), "c", "w2").ticket;
        assert_eq!(request(&mut open(), "c", "w3").ahead, Some(3));

        // What is not one's own, not in line or no ticket changes nothing.
        let before = everything(db);
        for (holder, ticket) in [("w2", first), ("h2", 1), ("w1", 99), ("w1", 0), ("w1", -1)] {
            assert!(
                !leave(&mut open(), "c", holder, ticket),
                "{holder} {ticket}"
            );
        }
        assert!(!leave(&mut open(), "nowhere", "w1", first));
        assert_eq!(everything(db), before);

        assert!(leave(&mut open(), "c", "w1", first));
        assert!(leave(&mut open(), "c", "w2", second));
        let before = everything(db);
        assert!(!leave(&mut open(), "c", "w1", first));
        // A late retry of the request does not bring it back, nor does waiting for its ticket.
        for late in [
            "request_floor('c', 'w1', request_id => 'r1')".to_owned(),
            format!("await_floor('c', 'w1', {first})"),
            format!("await_floor('c', 'w2', {second})"),
        ] {
            let refusal = open().refused(&format!("select nightowls.{late}"));
            assert_eq!(refusal.code, "NW003", "{late}: {refusal}");
            assert!(refusal.detail.contains("left the line"), "{refusal}");
        }
        assert_eq!(everything(db), before);
        assert_eq!(
            text(&mut open(), "select waiting from nightowls.floor_status"),
            "1"
        );
        assert_eq!(request(&mut open(), "c", "w3").ahead, Some(1));

        // Who comes back without a request_id is new, and was not skipped.
        let back = request(&mut open(), "c", "w2");
        assert_eq!((back.ticket, back.ahead, back.skipped), (5, Some(2), false));
        assert!(release(&mut open(), "c", "h", fence));
        let fence = take(&mut open(), "c", "w3");
        assert!(leave(&mut open(), "c", "w2", 5));
        // The last number in line is used up though its owner left.
        assert_eq!(request(&mut open(), "c", "w4").ticket, 6);
        assert_eq!(
            events(db, "c"),
            [
                "floor_granted h 1",
                "floor_left w1 2",
                "floor_left w2 3",
                "floor_granted w3 4",
                "floor_left w2 5"
            ]
        );

        // Granted in an answer that was lost: leaving gives it back, without knowing the fence.
        assert!(release(&mut open(), "c", "w3", fence));
        let granted = take(&mut open(), "c", "w4");
        assert!(!leave(&mut open(), "c", "w3", 6));
        assert!(leave(&mut open(), "c", "w4", 6));
        assert!(!leave(&mut open(), "c", "w4", 6));
        assert!(!beat(&mut open(), "c", "w4", granted));
        assert_eq!(open().refused(&guarded("c", granted)).code, "NW003");
        assert!(take(&mut open(), "c", "w5") > granted);

        // Who was silent for too long has lost its place, and cannot leave it.
        request(&mut open(), "c", "w6");
        silence(db, "c", "w6", 7_000);
        let before = everything(db);
        assert!(!leave(&mut open(), "c", "w6", 8));
        assert_eq!(everything(db), before);
        for (arguments, code) in [
            ("null, 'w', 1", "22004"),
            ("'c', null, 1", "22004"),
            ("'c', 'w', null", "22004"),
            ("'', 'w', 1", "22023"),
            ("'c', '', 1", "22023"),
            ("repeat('x', 1025), 'w', 1", "54000"),
            ("'c', repeat('x', 256), 1", "54000"),
        ] {
            let refusal = open().refused(&format!("select nightowls.leave_floor({arguments})"));
            assert_eq!(refusal.code, code, "{arguments}: {refusal}");
        }
        assert_eq!(everything(db), before);
    });
}

#[test]
fn leaving_and_a_grant_of_the_same_ticket_do_not_both_happen() {
    on_each_install(|db| {
        default_org(db);
        let mut session = db.service();
        let mut holders: Vec<(String, i64)> = Vec::new();
        for round in 0..60 {
            let container = format!("c{}", round % 3);
            let holder = format!("h{round}");
            let fence = take(&mut session, &container, "first");
            let ticket = request(&mut session, &container, &holder).ticket;
            assert!(release(&mut session, &container, "first", fence));
            let outcome = together(
                2,
                |_| db.service(),
                |number, mut session| {
                    if number == 0 {
                        leave(&mut session, &container, &holder, ticket)
                    } else {
                        session
                            .try_rows(&format!("select granted from nightowls.await_floor('{container}', '{holder}', {ticket}, 0)"))
                            .is_ok_and(|rows| rows[0][0].as_deref() == Some("t"))
                    }
                },
            );
            // Either way it neither waits nor holds any more.
            assert!(outcome[0], "round {round}: {outcome:?}");
            holders.push((container, ticket));
        }
        for (container, ticket) in holders {
            let log = events(db, &container);
            let granted = log
                .iter()
                .filter(|line| {
                    line.starts_with("floor_granted") && line.ends_with(&format!(" {ticket}"))
                })
                .count();
            let left = log
                .iter()
                .filter(|line| {
                    line.starts_with("floor_left") && line.ends_with(&format!(" {ticket}"))
                })
                .count();
            assert_eq!(granted + left, 1, "{container} {ticket}: {log:?}");
        }
        assert_eq!(
            text(
                &mut session,
                "select count(*) from nightowls.floor_status where status <> 'free' or waiting > 0"
            ),
            "0"
        );
    });
}

#[test]
fn a_sleeper_moves_up_when_the_first_in_line_leaves() {
    on_each_that_wakes(|db| {
        default_org(db);
        let fence = take(&mut db.service(), "c", "h");
        let ticket = call(
            &mut db.service(),
            "request_floor('c', 'first', poll_ms => 60000)",
        )
        .ticket;
        let second = call(
            &mut db.service(),
            "request_floor('c', 'second', poll_ms => 60000)",
        )
        .ticket;
        let mut sleeper = db.service();
        let pid = sleeper.pid();
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                let start = Instant::now();
                let answer = call(
                    &mut sleeper,
                    &format!("await_floor('c', 'second', {second}, 60000)"),
                );
                (answer, start.elapsed())
            });
            until_asleep(db, &[pid]);
            // The first is told and does not come; then it leaves.
            assert!(release(&mut db.service(), "c", "h", fence));
            until_asleep(db, &[pid]);
            assert!(leave(&mut db.service(), "c", "first", ticket));
            let (answer, took) = thread.join().expect("the thread ends");
            assert!(answer.granted, "{answer:?}");
            // A nap that nobody ends lasts twenty seconds.
            assert!(took < Duration::from_secs(15), "{took:?}");
        });
    });
}

#[test]
fn a_waiter_behind_one_that_falls_silent_takes_its_place_in_time() {
    on_each_server(|db| {
        default_org(db);
        let fence = take(&mut db.service(), "c", "h");
        for silent in ["s1", "s2", "s3"] {
            request(&mut db.service(), "c", silent);
        }
        let ticket = request(&mut db.service(), "c", "w").ticket;
        assert!(release(&mut db.service(), "c", "h", fence));
        // In the order of the line, not of their silence.
        silence(db, "c", "s3", 3_000);
        silence(db, "c", "s1", 5_000);
        silence(db, "c", "s2", 4_500);
        let mut session = db.service();
        let mut ticket = ticket;
        let start = Instant::now();
        let granted = loop {
            let answer = call(&mut session, &format!("await_floor('c', 'w', {ticket})"));
            if answer.granted {
                break start.elapsed();
            }
            let again = request(&mut session, "c", "w");
            assert!(!again.skipped, "{again:?}");
            if again.granted {
                break start.elapsed();
            }
            ticket = again.ticket;
        };
        // The last of them had 3 of its 6 seconds left.
        assert!(granted < Duration::from_secs(5), "{granted:?}");
    });
}

fn prune(session: &mut Session, arguments: &str) -> Vec<String> {
    lines(
        session,
        &format!("select floors, tickets from nightowls._prune_floors({arguments})"),
    )
}

/// Lets a day pass for floors and tickets of a name like that.
fn a_day_passes(db: &Db, like: &str) {
    db.direct(SUPERUSER).exec(&format!(
        "update nightowls.floors set granted_at = granted_at - interval '1 day', heartbeat_at = heartbeat_at - interval '1 day', \
                                     released_at = released_at - interval '1 day' where container like '{like}'; \
         update nightowls.floor_tickets set polled_at = polled_at - interval '1 day' where container like '{like}'"
    ));
}

#[test]
fn the_sweep_removes_what_has_been_over_for_a_day_and_no_fence_comes_again() {
    on_each_install(|db| {
        default_org(db);
        let mut session = db.service();
        let turn = |session: &mut Session, container: &str, request: &str| {
            let answer = call(
                session,
                &format!("request_floor('{container}', 'h', request_id => '{request}')"),
            );
            let fence = answer.fence.expect("free");
            assert!(release(session, container, "h", fence));
            fence
        };
        // A floor that nobody wants any more, one that a dead holder has, one that is never granted again but waited for.
        for request in ["a", "b", "c"] {
            turn(&mut session, "over", request);
        }
        let dead = take(&mut session, "dead", "h");
        request(&mut session, "dead", "w");
        // One that is in use: held for longer than a day, with a line and finished tickets.
        for request in ["a", "b"] {
            turn(&mut session, "used", request);
        }
        let held = call(
            &mut session,
            "request_floor('used', 'h', max_hold_ms => 2000000000)",
        );
        // One that was in use a moment ago, and one that only its waiter keeps.
        turn(&mut session, "recent", "a");
        turn(&mut session, "waited", "a");
        db.direct(SUPERUSER)
            .exec("update nightowls.floors set fence = 9000000000000000 where container = 'over'");
        assert_eq!(prune(&mut session, ""), [""; 0]);
        for container in ["over", "dead", "used", "waited"] {
            a_day_passes(db, container);
        }
        let fence = held.fence.expect("free");
        session.exec("begin");
        // What somebody has locked stays.
        let waiting = request(&mut session, "waited", "w");
        assert!(waiting.granted);
        let mut sweeper = db.service();
        assert_eq!(prune(&mut sweeper, ""), ["2 8"]);
        session.exec("commit");
        assert_eq!(
            lines(
                &mut session,
                "select container, status from nightowls.floor_status order by 1"
            ),
            ["recent free", "used held", "waited held"]
        );
        assert_eq!(
            lines(
                &mut session,
                "select container, ticket from nightowls.floor_tickets order by 1, 2"
            ),
            ["recent 1", "used 3", "waited 2"]
        );
        assert!(beat(&mut session, "used", "h", fence));
        assert_eq!(prune(&mut session, ""), [""; 0]);

        // A floor of that name is another one, and its fences go on above.
        assert_eq!(session.refused(&guarded("dead", dead)).code, "NW003");
        let again = request(&mut session, "dead", "w");
        assert!(
            again.granted && !again.skipped && again.ticket == 1,
            "{again:?}"
        );
        assert_eq!(again.fence, Some(9_000_000_000_000_001));
        assert_eq!(session.refused(&guarded("dead", dead)).code, "NW003");
        assert_eq!(take(&mut session, "new", "h"), 9_000_000_000_000_001);
        assert_eq!(
            events(db, "dead"),
            ["floor_granted h 1", "floor_granted w 1"]
        );
        // Fences of one floor only rise, those of others need not.
        assert!(turn(&mut session, "recent", "b") < 9_000_000_000_000_000);
    });
}

#[test]
fn the_sweep_is_bounded_and_serves_all_orgs_in_turn() {
    on_each_install(|db| {
        let busy = default_org(db);
        let small = org_apart_from(db, &busy);
        let mut session = db.service();
        let fill = |session: &mut Session, org: &str, count: usize| {
            session.exec(&format!(
                "select nightowls.release_floor('c' || i, 'h', (nightowls.request_floor('c' || i, 'h', request_id => 'r', org => '{org}')).fence, org => '{org}') \
                   from generate_series(1, {count}) i"
            ));
        };
        fill(&mut session, &busy, 60);
        fill(&mut session, &small, 5);
        a_day_passes(db, "%");
        // At most 20 are looked at, a quarter of them in a turn.
        let mut calls = Vec::new();
        let by_org = format!(
            "select case p.org_id when '{busy}' then 'busy' else 'small' end, p.floors, p.tickets from nightowls._prune_floors(20) p order by 1"
        );
        for _ in 0..20 {
            let rows = lines(&mut session, &by_org);
            if rows.is_empty() && text(&mut session, "select count(*) from nightowls.floors") == "0"
            {
                break;
            }
            calls.push(rows);
        }
        assert_eq!(calls[0], ["busy 5 5", "small 5 5"], "{calls:?}");
        assert!(
            calls.iter().all(|rows| rows
                .iter()
                .all(|row| row == "busy 5 5" || row == "small 5 5")),
            "{calls:?}"
        );
        assert_eq!(
            text(&mut session, "select count(*) from nightowls.floors"),
            "0"
        );
        assert_eq!(
            text(&mut session, "select count(*) from nightowls.floor_tickets"),
            "0"
        );

        // Two at once: the second has nothing to do, and waits for nobody.
        fill(&mut session, &busy, 3);
        a_day_passes(db, "%");
        session.exec("begin");
        assert_eq!(prune(&mut session, ""), ["3 3"]);
        let mut other = db.service();
        other.exec("set statement_timeout = '5s'");
        assert_eq!(prune(&mut other, ""), [""; 0]);
        session.exec("rollback");
        assert_eq!(prune(&mut other, ""), ["3 3"]);
    });
}

#[test]
fn floors_that_are_asked_for_while_they_are_swept_keep_one_holder_and_their_fences_rise() {
    on_each_install(|db| {
        default_org(db);
        let stop = AtomicBool::new(false);
        let fences = std::thread::scope(|scope| {
            let sweeper = scope.spawn(|| {
                let mut session = db.service();
                let mut removed = 0;
                while !stop.load(Ordering::SeqCst) {
                    a_day_passes(db, "old%");
                    removed += prune(&mut session, "").len();
                }
                removed
            });
            let fences = together(
                6,
                |_| db.service(),
                |number, mut session| {
                    let mut fences = Vec::new();
                    for round in 0..80 {
                        let container = format!("old{}", round % 4);
                        let holder = format!("h{number}-{round}");
                        let answer = request(&mut session, &container, &holder);
                        if let Some(fence) = answer.fence {
                            fences.push((container.clone(), fence));
                            let _ = session.try_exec(&guarded(&container, fence));
                            release(&mut session, &container, &holder, fence);
                        }
                    }
                    fences
                },
            );
            stop.store(true, Ordering::SeqCst);
            assert!(sweeper.join().expect("the sweeper ends") > 0);
            fences
        });
        let all: Vec<_> = fences.into_iter().flatten().collect();
        let unique: BTreeSet<_> = all.iter().collect();
        assert_eq!(unique.len(), all.len(), "a fence was given twice");
        assert!(all.len() > 20, "{}", all.len());
        // In the log: fences rise in each container, and writes are those of the last grant.
        let faults = lines(
            &mut db.direct(SUPERUSER),
            "select e.aggregate_id, e.position from (
               select e.aggregate_id, e.position, e.event_type, (e.payload ->> 'fence')::bigint as fence,
                      max((e.payload ->> 'fence')::bigint) filter (where e.event_type = 'floor_granted')
                        over (partition by e.aggregate_id order by e.position rows between unbounded preceding and 1 preceding) as before
                 from nightowls.events e where e.event_type in ('floor_granted', 'written')) e
              where e.event_type = 'floor_granted' and e.fence <= e.before or e.event_type = 'written' and e.fence <> e.before",
        );
        assert!(faults.is_empty(), "{faults:?}");
        wait_until("no ticket without a floor", Duration::from_secs(1), || {
            text(
                &mut db.direct(SUPERUSER),
                "select count(*) from nightowls.floor_tickets t where not exists (
                   select from nightowls.floors f where f.org_id = t.org_id and f.container = t.container)",
            ) == "0"
        });
    });
}
