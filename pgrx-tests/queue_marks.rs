//! The marks: reading begins behind what is dead, and never behind what is alive.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::fixture::{Random, lines};
use crate::projections::{buffers, text};
use crate::queue::{jobs, read, settle};
use crate::support::{Db, Session, on_each_install, wait_until};

/// The mark of a priority, 0 if there is none.
#[track_caller]
fn mark(session: &mut Session, priority: u32) -> i64 {
    text(
        session,
        &format!(
            "select coalesce(max(mark), 0) from nightowls.queue_marks where priority = {priority}"
        ),
    )
    .parse()
    .expect("a mark is a number")
}

/// A session that may also do what is private to readers.
#[track_caller]
fn owner(db: &Db) -> Session {
    jobs(db);
    db.owner()
}

/// Moves the mark of every priority as far as it may, as a reader does now and then.
#[track_caller]
fn move_marks(session: &mut Session) {
    session.exec(
        "select nightowls._move_marks(q.org_id, q.queue_id) from nightowls.queues q where q.name = 'jobs'",
    );
}

/// Reads and acks everything there is; returns how many that were.
#[track_caller]
fn drain(session: &mut Session) -> u64 {
    let mut count = 0;
    loop {
        let done = text(
            session,
            "select count(*) filter (where nightowls.ack('jobs', msg_id, receipt)) from nightowls.read('jobs', 60, 100)",
        );
        if done == "0" {
            return count;
        }
        count += done.parse::<u64>().expect("a count");
    }
}

#[track_caller]
fn send(session: &mut Session, count: u32) {
    session.exec(&format!(
        "select count(nightowls.send('jobs', to_jsonb(g))) from generate_series(1, {count}) g"
    ));
}

#[test]
fn a_rolled_back_ack_takes_the_mark_that_relied_on_it_with_it() {
    on_each_install(|db| {
        let mut service = owner(db);
        send(&mut service, 200);
        for inner in [false, true] {
            service.exec("begin");
            if inner {
                service.exec("savepoint a");
            }
            assert_eq!(
                text(
                    &mut service,
                    "select count(*) filter (where nightowls.ack('jobs', msg_id, receipt)) from nightowls.read('jobs', 60, 150)"
                ),
                "150"
            );
            if inner {
                service.exec("savepoint b");
            }
            move_marks(&mut service);
            assert!(mark(&mut service, 0) > 100);
            service.exec(if inner {
                "rollback to a; commit"
            } else {
                "rollback"
            });
            assert_eq!(mark(&mut service, 0), 0);
        }
        assert_eq!(drain(&mut service), 200);
        move_marks(&mut service);
        assert!(mark(&mut service, 0) > 150);
    });
}

#[test]
fn a_mark_does_not_pass_what_is_locked_leased_or_not_yet_gone() {
    on_each_install(|db| {
        let (mut service, mut other) = (owner(db), db.service());
        send(&mut service, 200);
        // Read by somebody who has not committed; acked by somebody who has not; leased.
        other.exec("begin");
        let first = read(&mut other, "jobs", 60, 1);
        assert_eq!(read(&mut service, "jobs", 60, 99).len(), 99);
        service.exec("select count(nightowls.ack('jobs', msg_id, receipt)) from nightowls.queue_messages where receipt is not null");
        move_marks(&mut service);
        let low = mark(&mut service, 0);
        assert!(low <= first[0].id.parse().expect("an id"));
        assert!(settle(&mut other, "ack", "jobs", &first[0], ""));
        move_marks(&mut service);
        assert_eq!(mark(&mut service, 0), low);
        other.exec("rollback");
        let again = read(&mut service, "jobs", 60, 1);
        assert_eq!(again[0].id, first[0].id);
        move_marks(&mut service);
        assert_eq!(mark(&mut service, 0), low);
        assert!(settle(&mut service, "ack", "jobs", &again[0], ""));
        move_marks(&mut service);
        assert!(mark(&mut service, 0) > low + 90);
        assert_eq!(drain(&mut service), 100);
    });
}

#[test]
fn a_message_that_commits_late_is_behind_no_mark() {
    on_each_install(|db| {
        let mut service = owner(db);
        for (number, late) in [
            "select nightowls.send('jobs', '\"late\"')",
            "select nightowls.send('jobs', '\"late\"', priority => 4)",
            "select nightowls.send_batch('jobs', array['\"late\"']::jsonb[])",
            "select nightowls.send('jobs', '\"late\"', group_key => 'g')",
            "select nightowls.send('jobs', '\"late\"', dedup_key => 'k')",
            // The hold of a savepoint is gone with it, and taken again.
            "savepoint s; select nightowls.send('jobs', '\"gone\"'); rollback to s; select nightowls.send('jobs', '\"late\"')",
            "select nightowls.send('jobs', '\"late\"'); savepoint s; select nightowls.send('jobs', '\"gone\"'); rollback to s",
        ]
        .into_iter()
        .enumerate()
        {
            let mut open = db.service();
            open.exec(&format!("begin; {late}"));
            send(&mut service, 150);
            assert_eq!(drain(&mut service), 150, "{late}");
            move_marks(&mut service);
            open.exec("commit");
            assert_eq!(drain(&mut service), 1, "{number}: {late}");
            move_marks(&mut service);
        }
    });
}

#[test]
fn what_comes_back_joins_the_line_before_the_mark() {
    on_each_install(|db| {
        let mut service = owner(db);
        service.exec("select nightowls.alter_queue('jobs', max_attempts => 2)");
        for priority in ["0", "6"] {
            for (number, back) in [
                "nightowls.nack('jobs', {id}, '{receipt}', 'no', 0)",
                "nightowls.nack('jobs', {id}, '{receipt}', 'no', 3600); select nightowls.set_vt('jobs', {id}, 0)",
                "nightowls.set_vt('jobs', {id}, 0)",
                "nightowls.set_vt('jobs', {id}, 3600); select nightowls.set_vt('jobs', {id}, 0)",
                // Its worker is slow: it leaves the line, and comes back when the lease has run out.
                "nightowls.extend('jobs', {id}, '{receipt}', 3600); select nightowls.set_vt('jobs', {id}, 0)",
            ]
            .into_iter()
            .enumerate()
            {
                service.exec(&format!("select nightowls.send('jobs', '1', priority => {priority})"));
                let claim = read(&mut service, "jobs", 3600, 1).remove(0);
                if number == 4 {
                    db.superuser().exec(
                        "update nightowls.queue_messages set last_read_at = last_read_at - interval '10 seconds'",
                    );
                }
                service.exec(&format!("select count(nightowls.send('jobs', to_jsonb(g), priority => {priority})) from generate_series(1, 150) g"));
                assert_eq!(drain(&mut service), 150);
                move_marks(&mut service);
                let state = text(&mut service, "select state from nightowls.queue_messages");
                assert_eq!(state, if number == 4 { "d" } else { "r" });
                service.exec(&format!(
                    "select {}",
                    back.replace("{id}", &claim.id)
                        .replace("{receipt}", &claim.receipt)
                ));
                move_marks(&mut service);
                let again = read(&mut service, "jobs", 3600, 10);
                assert_eq!((again.len(), &again[0].id), (1, &claim.id), "{back}");
                // Once more: now it is a dead letter, and comes back from there.
                assert!(settle(&mut service, "nack", "jobs", &again[0], ""));
                service.exec(&format!("select count(nightowls.send('jobs', to_jsonb(g), priority => {priority})) from generate_series(1, 150) g"));
                assert_eq!(drain(&mut service), 150);
                move_marks(&mut service);
                assert_eq!(text(&mut service, "select nightowls.redrive('jobs')"), "1");
                assert_eq!(drain(&mut service), 1);
            }
        }
    });
}

#[test]
fn a_slow_workers_message_leaves_the_line_and_its_receipt_stays_good() {
    on_each_install(|db| {
        let mut service = owner(db);
        send(&mut service, 100);
        let slow = read(&mut service, "jobs", 3600, 50);
        db.superuser().exec(
            "update nightowls.queue_messages set last_read_at = last_read_at - interval '10 seconds' where receipt is not null",
        );
        move_marks(&mut service);
        assert!(mark(&mut service, 0) > 40);
        assert_eq!(
            lines(
                &mut service,
                "select state, count(*) from nightowls.queue_messages group by 1 order by 1"
            ),
            ["d 50", "r 50"]
        );
        assert_eq!(drain(&mut service), 50);
        assert!(settle(&mut service, "extend", "jobs", &slow[0], ", 7200"));
        assert_eq!(
            text(
                &mut service,
                &format!(
                    "select due_at = lease_until from nightowls.queue_messages where msg_id = {}",
                    slow[0].id
                )
            ),
            "t"
        );
        assert!(settle(&mut service, "ack", "jobs", &slow[0], ""));
        assert!(settle(&mut service, "nack", "jobs", &slow[1], ", 'no', 0"));
        assert_eq!(drain(&mut service), 1);
        // The others' leases run out.
        db.superuser()
            .exec("update nightowls.queue_messages set lease_until = now(), due_at = now()");
        assert!(!settle(&mut service, "ack", "jobs", &slow[2], ""));
        assert_eq!(drain(&mut service), 48);
        assert_eq!(
            text(
                &mut service,
                "select count(*) from nightowls.queue_messages"
            ),
            "0"
        );
    });
}

// Stress ------------------------------------------------------------------------------------------

/// How long a stress goes on: NIGHTOWLS_STRESS_SECONDS for longer.
fn stress_time() -> Duration {
    let seconds = std::env::var("NIGHTOWLS_STRESS_SECONDS").ok();
    Duration::from_secs(seconds.and_then(|text| text.parse().ok()).unwrap_or(5))
}

/// Sends until `stop`, in transactions that linger, roll back, and roll back in part. Returns the
/// bodies that were committed.
fn sender(session: &mut Session, number: u64, seed: u64, stop: &AtomicBool) -> Vec<u64> {
    let mut random = Random::new(seed);
    let mut next = number * 1_000_000_000;
    let mut committed = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let mut sent = Vec::new();
        // One a transaction: those who send to several in turn can wait for each other in a circle.
        let group = random.below(7);
        session.exec("begin");
        for _ in 0..=random.below(4) {
            let inner = random.chance(25);
            if inner {
                session.exec("savepoint s");
            }
            let count = 1 + random.below(12);
            let bodies: Vec<u64> = (0..count).map(|n| next + n).collect();
            next += count;
            let array: Vec<_> = bodies.iter().map(|body| format!("'{body}'")).collect();
            let array = array.join(",");
            session.exec(&match random.below(5) {
                0 => format!("select nightowls.send_batch('jobs', array[{array}]::jsonb[], priority => {})", random.below(3)),
                1 if count < 4 => format!(
                    "select nightowls.send('jobs', to_jsonb(b), group_key => 'g{group}') from unnest('{{{}}}'::bigint[]) b",
                    array.replace('\'', "")
                ),
                _ => format!(
                    "select nightowls.send('jobs', to_jsonb(b)) from unnest('{{{}}}'::bigint[]) b",
                    array.replace('\'', "")
                ),
            });
            if inner && random.chance(60) {
                session.exec("rollback to s");
            } else {
                sent.extend(bodies);
            }
            if random.chance(10) {
                session.exec("select pg_sleep(random() * 0.05)");
            }
        }
        if random.chance(20) {
            session.exec("rollback");
        } else {
            session.exec("commit");
            committed.extend(sent);
        }
    }
    committed
}

/// Reads and settles in every way there is until `stop`, then acks what is left until `done`. Returns the
/// bodies that were acked.
fn worker(session: &mut Session, seed: u64, stop: &AtomicBool, done: &AtomicBool) -> Vec<u64> {
    let mut random = Random::new(seed);
    let mut acked = Vec::new();
    while !done.load(Ordering::Relaxed) {
        let mut mine = Vec::new();
        session.exec("begin");
        let vt = 1 + random.below(2) as u32;
        let qty = 1 + random.below(40) as u32;
        let claims = read(session, "jobs", vt, qty);
        if claims.is_empty() {
            session.exec("commit");
            std::thread::sleep(Duration::from_millis(2));
            continue;
        }
        for claim in &claims {
            let body: u64 = claim.message.parse().expect("a body");
            let calm = stop.load(Ordering::Relaxed);
            match random.below(if calm { 1 } else { 20 }) + u64::from(calm) * 5 {
                0 => {
                    settle(session, "nack", "jobs", claim, ", 'no', 0");
                }
                1 => {
                    settle(session, "nack", "jobs", claim, ", 'no'");
                }
                2 => {
                    session.exec("savepoint s");
                    settle(session, "ack", "jobs", claim, "");
                    if random.chance(50) {
                        move_marks(session);
                    }
                    session.exec("rollback to s");
                }
                3 => {
                    session.exec(&format!("select nightowls.set_vt('jobs', {}, 0)", claim.id));
                }
                4 => (),
                _ => {
                    if settle(session, "ack", "jobs", claim, "") {
                        mine.push(body);
                    }
                }
            }
        }
        if random.chance(30) {
            move_marks(session);
        }
        if random.chance(15) {
            session.exec("rollback");
        } else {
            session.exec("commit");
            acked.extend(mine);
        }
    }
    acked
}

#[test]
fn nothing_is_hidden_or_done_twice_whatever_rolls_back() {
    on_each_install(|db| {
        let mut watcher = owner(db);
        watcher.exec("select nightowls.alter_queue('jobs', backoff => '20 milliseconds')");
        let (stop, done) = (AtomicBool::new(false), AtomicBool::new(false));
        let (sent, acked) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            let senders: Vec<_> = (0..4)
                .map(|number| {
                    let (mut session, stop, sent) = (db.service(), &stop, &sent);
                    scope.spawn(move || {
                        let bodies = sender(&mut session, number + 1, 7 + number, stop);
                        sent.lock().unwrap().extend(bodies);
                    })
                })
                .collect();
            for number in 0..4 {
                let (mut session, stop, done, acked) = (db.owner(), &stop, &done, &acked);
                scope.spawn(move || {
                    let bodies = worker(&mut session, 100 + number, stop, done);
                    acked.lock().unwrap().extend(bodies);
                });
            }
            std::thread::sleep(stress_time());
            stop.store(true, Ordering::Relaxed);
            let ends: Vec<_> = senders.into_iter().map(|sender| sender.join()).collect();
            if ends.iter().any(Result::is_err) {
                done.store(true, Ordering::Relaxed);
                panic!("a sender has failed");
            }
            let started = Instant::now();
            while text(
                &mut watcher,
                "select count(*) from nightowls.queue_messages",
            ) != "0"
                && started.elapsed() < Duration::from_secs(30)
            {
                std::thread::sleep(Duration::from_millis(20));
            }
            done.store(true, Ordering::Relaxed);
        });
        assert_eq!(
            lines(
                &mut watcher,
                "select m.* from nightowls.queue_messages m limit 5"
            ),
            Vec::<String>::new(),
            "hidden; the marks are {:?}",
            lines(
                &mut watcher,
                "select priority, max(mark) from nightowls.queue_marks group by 1"
            )
        );
        let (mut sent, mut acked) = (sent.into_inner().unwrap(), acked.into_inner().unwrap());
        sent.sort_unstable();
        acked.sort_unstable();
        eprintln!(
            "{}: {} messages, mark {}",
            db.install(),
            sent.len(),
            mark(&mut watcher, 0)
        );
        assert!(sent.len() > 500);
        assert!(mark(&mut watcher, 0) > 500, "the mark did not move");
        assert!(sent == acked, "{} sent, {} acked", sent.len(), acked.len());
    });
}

/// What a read of one message touches, and a whole cycle.
fn cost_of_a_cycle(session: &mut Session) -> i64 {
    buffers(
        session,
        "select nightowls.ack('jobs', msg_id, receipt), nightowls.send('jobs', '1') from nightowls.read('jobs', 60, 1)",
    )
}

#[test]
fn a_cycle_touches_no_more_under_an_old_snapshot() {
    on_each_install(|db| {
        let mut service = owner(db);
        let mut holder = db.service();
        db.superuser()
            .exec("alter table nightowls.queue_messages set (autovacuum_enabled = off)");
        send(&mut service, 20);
        let free = cost_of_a_cycle(&mut service);
        holder.exec(
            "begin isolation level repeatable read; select count(*) from nightowls.queue_messages",
        );
        let mut worst = 0;
        for round in 0..20 {
            service.exec(
                "do $$ begin for i in 1 .. 250 loop
                   perform nightowls.ack('jobs', msg_id, receipt) from nightowls.read('jobs', 60, 1);
                   perform nightowls.send('jobs', '1');
                   commit;
                 end loop; end $$",
            );
            let cost = cost_of_a_cycle(&mut service);
            if round > 1 {
                worst = worst.max(cost);
            }
        }
        eprintln!(
            "{}: {free} buffers free, {worst} at worst after 5,000 cycles held",
            db.install()
        );
        // Up to 64 dead ones and a few batches of eight lie behind the mark, each with a page of its own.
        assert!(worst < free + 400, "{free} buffers free, {worst} held");
        holder.exec("commit");
    });
}

#[test]
fn claims_are_heap_only_even_under_an_old_snapshot() {
    on_each_install(|db| {
        let mut service = owner(db);
        let mut holder = db.service();
        let mut superuser = db.superuser();
        superuser.exec("alter table nightowls.queue_messages set (autovacuum_enabled = off)");
        send(&mut service, 5000);
        holder.exec(
            "begin isolation level repeatable read; select count(*) from nightowls.queue_messages",
        );
        service.exec("select count(*) from nightowls.read('jobs', 60, 5000)");
        service.exec("select pg_stat_force_next_flush()");
        wait_until("the statistics arrive", Duration::from_secs(20), || {
            text(
                &mut superuser,
                "select n_tup_upd >= 5000 from pg_stat_all_tables where relid = 'nightowls.queue_messages'::regclass",
            ) == "t"
        });
        assert_eq!(
            text(
                &mut superuser,
                "select n_tup_upd - n_tup_hot_upd from pg_stat_all_tables where relid = 'nightowls.queue_messages'::regclass"
            ),
            "0"
        );
        holder.exec("commit");
    });
}
