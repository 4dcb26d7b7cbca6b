//! Groups: in the order of commits, one at a time, and never forgotten.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::fixture::{Random, is_blocked, lines};
use crate::projections::text;
use crate::queue::{Claim, bodies, jobs, read, settle};
use crate::support::{full, on_each_install, wait_until};

fn grouped(message: &str, group: &str) -> String {
    format!("select nightowls.send('jobs', '{message}', group_key => '{group}')")
}

const NOTHING: [&str; 0] = [];

#[test]
fn a_group_is_delivered_one_at_a_time_in_order_and_others_go_on() {
    on_each_install(|db| {
        let mut service = jobs(db);
        for (message, group) in [("1", "a"), ("2", "a"), ("3", "b"), ("4", "a")] {
            service.exec(&grouped(message, group));
        }
        service.exec("select nightowls.send('jobs', '5')");
        let first = read(&mut service, "jobs", 30, 9);
        assert_eq!(
            first
                .iter()
                .map(|claim| claim.message.as_str())
                .collect::<Vec<_>>(),
            ["1", "3", "5"]
        );
        assert_eq!(bodies(&mut service, "jobs", 9), NOTHING);
        // Failed, it stays the first; its turn is over when it is done.
        assert!(settle(
            &mut service,
            "nack",
            "jobs",
            &first[0],
            ", 'no', 3600"
        ));
        assert_eq!(bodies(&mut service, "jobs", 9), NOTHING);
        service.exec(&format!(
            "select nightowls.set_vt('jobs', {}, 0)",
            first[0].id
        ));
        let again = read(&mut service, "jobs", 30, 9);
        assert_eq!((again.len(), again[0].message.as_str()), (1, "1"));
        assert!(settle(&mut service, "ack", "jobs", &again[0], ""));
        assert_eq!(bodies(&mut service, "jobs", 9), ["2"]);
        service.exec("select nightowls.delete('jobs', msg_id) from nightowls.queue_messages where message = '2'");
        assert_eq!(bodies(&mut service, "jobs", 9), ["4"]);
    });
}

#[test]
fn the_order_is_that_of_the_commits_though_a_send_began_earlier() {
    on_each_install(|db| {
        let mut service = jobs(db);
        let mut watcher = db.superuser();
        let mut open = db.service();
        open.exec("begin");
        open.exec(&grouped("1", "a"));
        // Another group, another queue's message, a reader: nobody waits.
        service.exec(&grouped("3", "b"));
        assert_eq!(bodies(&mut service, "jobs", 9), ["3"]);
        let mut second = db.service();
        let pid = second.pid();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| second.exec(&grouped("2", "a")));
            wait_until("the second waits", Duration::from_secs(10), || {
                is_blocked(&mut watcher, pid)
            });
            open.exec("commit");
            waiting.join().expect("the second ends");
        });
        let first = read(&mut service, "jobs", 30, 9);
        assert_eq!((first.len(), first[0].message.as_str()), (1, "1"));
        assert!(settle(&mut service, "ack", "jobs", &first[0], ""));
        assert_eq!(bodies(&mut service, "jobs", 9), ["2"]);
    });
}

#[test]
fn an_ack_beside_an_open_send_leaves_no_group_behind() {
    on_each_install(|db| {
        let mut service = jobs(db);
        for (sends, acks) in [
            ("commit", "commit"),
            ("rollback", "commit"),
            ("commit", "rollback"),
        ] {
            for sender_first in [true, false] {
                service.exec(&grouped("1", "a"));
                let claim = read(&mut service, "jobs", 30, 1).remove(0);
                let (mut sender, mut worker) = (db.service(), db.service());
                sender.exec("begin");
                sender.exec(&grouped("2", "a"));
                worker.exec("begin");
                // It does not wait.
                assert!(settle(&mut worker, "ack", "jobs", &claim, ""));
                if sender_first {
                    sender.exec(sends);
                    worker.exec(acks);
                } else {
                    worker.exec(acks);
                    sender.exec(sends);
                }
                if acks == "rollback" {
                    assert!(settle(&mut service, "ack", "jobs", &claim, ""));
                }
                if sends == "commit" {
                    let next = lines(
                        &mut service,
                        "select message from nightowls.read_with_poll('jobs', 30, 9, '10 seconds')",
                    );
                    assert_eq!(next, ["2"], "{sends} {acks} {sender_first}");
                }
                service.exec("select nightowls.purge_queue('jobs')");
            }
        }
    });
}

#[test]
fn a_send_or_ack_with_an_old_snapshot_leaves_no_group_behind() {
    on_each_install(|db| {
        let mut service = jobs(db);
        for level in ["repeatable read", "serializable"] {
            // Sent by who does not see that the head is gone.
            service.exec(&grouped("1", "a"));
            let mut old = db.service();
            old.exec(&format!(
                "begin isolation level {level}; select count(*) from nightowls.queue_messages"
            ));
            assert_eq!(
                lines(&mut service, "select message from nightowls.pop('jobs')"),
                ["1"]
            );
            old.exec(&grouped("2", "a"));
            old.exec("commit");
            let poll = "select message from nightowls.read_with_poll('jobs', 30, 9, '10 seconds')";
            assert_eq!(lines(&mut service, poll), ["2"], "{level}");
            service.exec("select nightowls.purge_queue('jobs')");

            // Acked by who does not see the next one.
            service.exec(&grouped("3", "a"));
            let claim = read(&mut service, "jobs", 30, 1).remove(0);
            old.exec(&format!(
                "begin isolation level {level}; select count(*) from nightowls.queue_messages"
            ));
            service.exec(&grouped("4", "a"));
            assert!(settle(&mut old, "ack", "jobs", &claim, ""));
            old.exec("commit");
            assert_eq!(lines(&mut service, poll), ["4"], "{level}");
            service.exec("select nightowls.purge_queue('jobs')");
        }
    });
}

#[test]
fn a_poison_message_becomes_a_dead_letter_and_its_group_goes_on() {
    on_each_install(|db| {
        let mut service = jobs(db);
        service.exec(
            "select nightowls.create_queue('dead');
             select nightowls.create_queue('elsewhere', max_attempts => 3, dead_letter_queue => 'dead', backoff => '0');
             select nightowls.alter_queue('jobs', max_attempts => 3, backoff => '0')",
        );
        for queue in ["jobs", "elsewhere"] {
            for message in ["1", "2"] {
                service.exec(&format!("select nightowls.send('{queue}', '{message}', group_key => 'g', headers => '{{\"h\": 1}}')"));
            }
            let mut poison = String::new();
            for attempt in 1..=3 {
                let claim: Claim = read(&mut service, queue, 30, 9).remove(0);
                assert_eq!(
                    (claim.message.as_str(), claim.read_ct),
                    ("1", attempt.to_string())
                );
                poison = claim.id.clone();
                if attempt < 3 {
                    assert!(settle(
                        &mut service,
                        "nack",
                        queue,
                        &Claim {
                            read_ct: String::new(),
                            ..claim
                        },
                        ", 'broken'"
                    ));
                } else {
                    // This one crashes: nobody says so, the lease runs out.
                    db.superuser().exec("update nightowls.queue_messages set lease_until = now() where lease_until is not null");
                }
            }
            let next = read(&mut service, queue, 30, 9);
            assert_eq!((next.len(), next[0].message.as_str()), (1, "2"), "{queue}");
            let dead = "select msg_id, last_error, headers, state, source ->> 'read_ct' from nightowls.queue_messages where message = '1'";
            let (state, read_ct) = if queue == "jobs" {
                ("x", "null")
            } else {
                ("r", "3")
            };
            assert_eq!(
                lines(&mut service, dead),
                [format!(
                    "{poison} the lease ran out {{\"h\": 1}} {state} {read_ct}"
                )]
            );
            // Back it goes behind the one that is there, under its old id.
            assert_eq!(
                text(
                    &mut service,
                    &format!("select nightowls.redrive('{queue}')")
                ),
                "1"
            );
            assert_eq!(bodies(&mut service, queue, 9), NOTHING);
            assert!(settle(&mut service, "ack", queue, &next[0], ""));
            let back = read(&mut service, queue, 30, 9);
            assert_eq!(
                (back.len(), &back[0].id, back[0].read_ct.as_str()),
                (1, &poison, "1")
            );
            assert!(settle(&mut service, "ack", queue, &back[0], ""));
        }
        assert_eq!(
            text(
                &mut service,
                "select count(*) from nightowls.queue_messages"
            ),
            "0"
        );
    });
}

#[test]
fn many_groups_in_one_transaction_take_few_locks() {
    on_each_install(|db| {
        let mut service = jobs(db);
        let locks = "select count(*) <= 64 from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()";
        for sql in [
            "select nightowls.send('jobs', '1', group_key => 'g' || i) from generate_series(1, 2000) i",
            "select nightowls.send_batch('jobs', array_fill('1'::jsonb, array[2000]), group_keys => array(select 'h' || i from generate_series(1, 2000) i))",
        ] {
            service.exec("begin");
            service.exec(sql);
            assert_eq!(text(&mut service, locks), "t");
            service.exec("commit");
        }
        assert_eq!(read(&mut service, "jobs", 30, 9999).len(), 4000);
    });
}

/// 10,000 messages with NIGHTOWLS_FULL set, else 1,200.
#[test]
fn whatever_the_delays_each_group_is_worked_off_in_the_order_of_its_commits() {
    const GROUPS: u64 = 100;
    let per_sender = if full() { 2500 } else { 300 };
    on_each_install(|db| {
        let mut service = jobs(db);
        service.exec("select nightowls.alter_queue('jobs', backoff => '1 millisecond')");
        db.superuser().exec(
            "create table public.sent (n bigint generated always as identity, body text, g text, at timestamptz default clock_timestamp());
             create table public.done (n bigint generated always as identity, body text, msg_id bigint, read_ct int);
             grant all on public.sent, public.done to public",
        );
        let done = AtomicUsize::new(0);
        let in_flight = Mutex::new(BTreeMap::<String, String>::new());
        std::thread::scope(|scope| {
            for number in 0..4u64 {
                let mut session = db.service();
                scope.spawn(move || {
                    let mut random = Random::new(number + 3);
                    for n in 0..per_sender {
                        let group = random.below(GROUPS);
                        session.exec("begin");
                        // The group's lock is held until the commit: so the numbers of `sent` have the order of the commits.
                        session.exec(&grouped(&format!("\"{group}/{number}/{n}\""), &format!("g{group}")));
                        session.exec(&format!("insert into public.sent (body, g) values ('{group}/{number}/{n}', 'g{group}')"));
                        if random.chance(5) {
                            session.exec("select pg_sleep(random() * 0.01)");
                        }
                        session.exec("commit");
                    }
                });
            }
            for number in 0..8u64 {
                let (mut session, done, in_flight) = (db.service(), &done, &in_flight);
                scope.spawn(move || {
                    let mut random = Random::new(number + 50);
                    while done.load(Ordering::Relaxed) < 4 * per_sender {
                        let claims = read(&mut session, "jobs", 600, 3);
                        if claims.is_empty() {
                            std::thread::sleep(Duration::from_millis(3));
                        }
                        for claim in claims {
                            let body = claim.message.trim_matches('"').to_owned();
                            let group = body.split('/').next().unwrap_or_default().to_owned();
                            let other = in_flight
                                .lock()
                                .unwrap()
                                .insert(group.clone(), body.clone());
                            assert_eq!(other, None, "two of group {group} in flight: {body}");
                            let fails = random.chance(10);
                            if random.chance(20) {
                                // As long as it works on it, nobody else may have one of this group.
                                session.exec("select pg_sleep(random() * 0.01)");
                            }
                            in_flight.lock().unwrap().remove(&group);
                            if fails {
                                assert!(settle(&mut session, "nack", "jobs", &claim, ", 'no'"));
                                continue;
                            }
                            session.exec(&format!(
                                "begin; insert into public.done (body, msg_id, read_ct) values ('{body}', {}, {})", claim.id, claim.read_ct
                            ));
                            assert!(settle(&mut session, "ack", "jobs", &claim, ""));
                            session.exec("commit");
                            done.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        assert_eq!(
            lines(
                &mut service,
                "select * from (
                   select s.n as sent, d.n as done, d.msg_id, d.read_ct, s.body, s.at,
                          lag(d.n) over w as done_before, lag(d.msg_id) over w as id_before, lag(d.read_ct) over w, lag(s.body) over w, lag(s.at) over w
                     from public.sent s join public.done d using (body) window w as (partition by s.g order by s.n)) x
                  where x.done < x.done_before or x.msg_id < x.id_before"
            ),
            NOTHING
        );
        assert_eq!(
            lines(
                &mut service,
                "select count(*), count(distinct body) from public.done"
            ),
            [format!("{0} {0}", 4 * per_sender)]
        );
        assert_eq!(
            text(
                &mut service,
                "select count(*) from nightowls.queue_messages"
            ),
            "0"
        );
    });
}
