//! Waiting for messages: whatever makes one ready wakes a waiter, and only as many
//! as there are messages.

use std::thread;
use std::time::{Duration, Instant};

use postgres::fallible_iterator::FallibleIterator;

use crate::fixture::{Random, default_org, is_blocked, lines, together};
use crate::projections::text;
use crate::queue::{jobs, read, settle};
use crate::support::{
    Db, SERVICE, Session, on_each_install, on_each_route, preloaded_server, wait_until,
};
use crate::wait::{on_each_server, on_each_that_wakes};

/// Well below the nap of a second, which ends without being woken.
const PROMPT: Duration = Duration::from_millis(400);

/// Waits until so many backends of the database nap.
#[track_caller]
fn until_napping(db: &Db, count: usize) {
    let mut watcher = db.superuser();
    let asleep = "select count(*) from pg_stat_activity where datname = current_database() \
                  and query like '%read_with_poll%' and wait_event_type in ('Extension', 'Timeout')";
    wait_until("the readers nap", Duration::from_secs(60), || {
        watcher.value(asleep) == Some(count.to_string())
    });
}

fn poll(queue: &str) -> String {
    format!("select message from nightowls.read_with_poll('{queue}', 60, 1, '60 seconds')")
}

/// How long a reader of `queue`, which naps, takes to get a message once `cause` has begun.
fn delivery(db: &Db, queue: &str, cause: impl FnOnce(&mut Session)) -> Duration {
    let mut reader = db.session(SERVICE);
    let mut other = db.session(SERVICE);
    thread::scope(|scope| {
        let got = scope.spawn(|| {
            let rows = reader.rows(&poll(queue));
            (rows.len(), Instant::now())
        });
        until_napping(db, 1);
        let start = Instant::now();
        cause(&mut other);
        let (rows, at) = got.join().expect("the reader ends");
        assert_eq!(rows, 1);
        at - start
    })
}

#[test]
fn whatever_makes_a_message_ready_wakes_a_reader() {
    type Prepare = fn(&mut Session);
    const CAUSES: &[(&str, &str, Prepare, &str)] = &[
        ("send", "jobs", |_| (), "select nightowls.send('jobs', '1')"),
        (
            "send_batch",
            "jobs",
            |_| (),
            "select nightowls.send_batch('jobs', '{1,2}'::jsonb[])",
        ),
        (
            "send to a group",
            "jobs",
            |_| (),
            "select nightowls.send('jobs', '1', group_key => 'g')",
        ),
        (
            "send with a key",
            "jobs",
            |_| (),
            "select nightowls.send('jobs', '1', dedup_key => 'k')",
        ),
        (
            "send with a priority",
            "jobs",
            |_| (),
            "select nightowls.send('jobs', '1', priority => 5)",
        ),
        (
            "the ack of the one before",
            "jobs",
            |s| {
                s.exec("select nightowls.send('jobs', '1', group_key => 'g'), nightowls.send('jobs', '2', group_key => 'g')");
                s.exec("select nightowls.read('jobs', 600)");
            },
            "select nightowls.ack('jobs', msg_id, receipt) from nightowls.queue_messages where receipt is not null",
        ),
        (
            "nack",
            "jobs",
            |s| s.exec("select nightowls.send('jobs', '1'); select nightowls.read('jobs', 600)"),
            "select nightowls.nack('jobs', msg_id, receipt, delay => 0) from nightowls.queue_messages",
        ),
        (
            "set_vt",
            "jobs",
            |s| s.exec("select nightowls.send('jobs', '1', delay => 600)"),
            "select nightowls.set_vt('jobs', msg_id, 0) from nightowls.queue_messages",
        ),
        (
            "redrive",
            "jobs",
            |s| {
                s.exec("select nightowls.alter_queue('jobs', max_attempts => 1); select nightowls.send('jobs', '1')");
                s.exec(
                    "select nightowls.nack('jobs', msg_id, receipt) from nightowls.read('jobs')",
                );
            },
            "select nightowls.redrive('jobs')",
        ),
        (
            "a dead letter",
            "dead",
            |s| {
                s.exec("select nightowls.create_queue('dead'); select nightowls.alter_queue('jobs', max_attempts => 1, dead_letter_queue => 'dead')");
                s.exec("select nightowls.send('jobs', '1'); select nightowls.read('jobs', 600)");
            },
            "select nightowls.nack('jobs', msg_id, receipt) from nightowls.queue_messages",
        ),
        (
            "resume_queue",
            "jobs",
            |s| s.exec("select nightowls.pause_queue('jobs'); select nightowls.send('jobs', '1')"),
            "select nightowls.resume_queue('jobs')",
        ),
        (
            "replay",
            "jobs",
            |s| s.exec("select nightowls.archive('jobs', nightowls.send('jobs', '1'))"),
            "select nightowls.replay('jobs')",
        ),
        (
            "an event that is routed",
            "jobs",
            |s| s.exec("select nightowls.bind('jobs')"),
            "select nightowls.append_event('order', 'a', 'placed')",
        ),
    ];
    on_each_server(|db| {
        let mut service = jobs(db);
        let wakes = text(&mut service, "select nightowls._can_wake()") == "t";
        for (name, queue, prepare, sql) in CAUSES {
            let mut times: Vec<_> = (0..3)
                .map(|_| {
                    prepare(&mut service);
                    let time = delivery(db, queue, |other| other.exec(sql));
                    service.exec("select nightowls.purge_queue('jobs'), nightowls.alter_queue('jobs', max_attempts => 0)");
                    if *queue != "jobs" {
                        service.exec(&format!("select nightowls.purge_queue('{queue}')"));
                    }
                    time
                })
                .collect();
            times.sort_unstable();
            // The middle one: this machine may be busy.
            assert!(!wakes || times[1] < PROMPT, "{name}: {times:?}");
        }
    });
}

#[test]
fn what_is_put_off_is_delivered_when_it_is_due() {
    on_each_server(|db| {
        let mut service = jobs(db);
        let late = "select extract(epoch from clock_timestamp() - r.enqueued_at) from nightowls.read_with_poll('jobs', 30, 1, '20 seconds') r";
        let mut times: Vec<f64> = (0..3)
            .map(|_| {
                let mut reader = db.session(SERVICE);
                thread::scope(|scope| {
                    let got = scope.spawn(|| text(&mut reader, late));
                    until_napping(db, 1);
                    service.exec("select nightowls.send('jobs', '1', delay => 1)");
                    got.join()
                        .expect("the reader ends")
                        .parse()
                        .expect("seconds")
                })
            })
            .collect();
        times.sort_by(f64::total_cmp);
        assert!(times[0] >= 1.0 && times[1] < 1.4, "{times:?}");
        // So when a lease ends that was taken while the reader was asleep.
        service.exec("select nightowls.purge_queue('jobs')");
        let mut reader = db.session(SERVICE);
        thread::scope(|scope| {
            let got = scope.spawn(|| {
                text(
                    &mut reader,
                    "select read_ct from nightowls.read_with_poll('jobs', 30, 1, '20 seconds')",
                )
            });
            until_napping(db, 1);
            service.exec("begin; select nightowls.send('jobs', '1'); select nightowls.read('jobs', 1); commit");
            let start = Instant::now();
            assert_eq!(got.join().expect("the reader ends"), "2");
            assert!(start.elapsed() < Duration::from_secs(5));
        });
    });
}

#[test]
fn a_reader_that_rolls_back_leaves_its_message_to_the_next() {
    on_each_that_wakes(|db| {
        let mut service = jobs(db);
        for end in ["rollback", "rollback to a", "terminate"] {
            let mut first = db.session(SERVICE);
            let pid = first.pid();
            let mut second = db.session(SERVICE);
            service.exec("select nightowls.send('jobs', '1')");
            first.exec("begin; savepoint a");
            assert_eq!(text(&mut first, &poll("jobs")), "1");
            thread::scope(|scope| {
                let got = scope.spawn(|| {
                    let message = text(&mut second, &poll("jobs"));
                    (message, Instant::now())
                });
                until_napping(db, 1);
                let start = Instant::now();
                match end {
                    "terminate" => {
                        service.exec(&format!("select pg_terminate_backend({pid})"));
                    }
                    end => first.exec(end),
                }
                let (message, at) = got.join().expect("the reader ends");
                assert_eq!(message, "1");
                assert!(at - start < PROMPT, "{end}: {:?}", at - start);
            });
            service.exec("select nightowls.purge_queue('jobs')");
        }
    });
}

#[test]
fn a_sender_that_rolls_back_delivers_nothing_and_one_with_savepoints_what_it_keeps() {
    on_each_server(|db| {
        let mut service = jobs(db);
        let mut reader = db.session(SERVICE);
        thread::scope(|scope| {
            let got = scope.spawn(|| text(&mut reader, &poll("jobs")));
            until_napping(db, 1);
            service.exec("begin; select nightowls.send('jobs', '1'); rollback");
            service.exec(
                "begin; savepoint a; select nightowls.send('jobs', '2'); rollback to a; commit",
            );
            service.exec(
                "begin; savepoint a; select nightowls.send('jobs', '3'); rollback to a;
                 savepoint b; select nightowls.send('jobs', '4'); release b; commit",
            );
            assert_eq!(got.join().expect("the reader ends"), "4");
        });
    });
}

#[test]
fn as_many_readers_are_woken_as_there_are_messages() {
    const READERS: usize = 16;
    on_each_that_wakes(|db| {
        let mut service = jobs(db);
        let mut owner = db.superuser();
        owner.exec(&format!(
            "alter database {} set track_functions = 'pl'",
            db.name()
        ));
        let start = Instant::now();
        thread::scope(|scope| {
            let readers: Vec<_> = (0..READERS)
                .map(|_| {
                    let mut session = db.session(SERVICE);
                    scope.spawn(move || text(&mut session, &poll("jobs")))
                })
                .collect();
            until_napping(db, READERS);
            for left in (0..READERS).rev() {
                service.exec("select nightowls.send('jobs', '1')");
                until_napping(db, left);
            }
            for reader in readers {
                assert_eq!(reader.join().expect("a reader ends"), "1");
            }
        });
        // Each looks when it comes, when it is woken, and once a second.
        let most = READERS as f64 * (2.0 + start.elapsed().as_secs_f64() + 1.0);
        let herd = (READERS * READERS / 2) as f64;
        let mut looks = 0.0;
        wait_until("the statistics are in", Duration::from_secs(20), || {
            looks = text(
                &mut owner,
                "select coalesce(sum(calls), 0) from pg_stat_user_functions where schemaname = 'nightowls' and funcname = 'read'",
            )
            .parse()
            .expect("a number");
            looks >= (2 * READERS) as f64
        });
        assert!(
            looks <= most,
            "{looks} looks, {most} expected, a herd would have been {herd} more"
        );
    });
}

#[test]
fn a_reader_can_be_cancelled_and_gives_up_in_time() {
    on_each_server(|db| {
        let mut service = jobs(db);
        let mut reader = db.session(SERVICE);
        let pid = reader.pid();
        thread::scope(|scope| {
            let refused = scope.spawn(|| reader.refused(&poll("jobs")));
            until_napping(db, 1);
            service.exec(&format!("select pg_cancel_backend({pid})"));
            assert_eq!(refused.join().expect("the reader ends").code, "57014");
        });
        let start = Instant::now();
        assert_eq!(
            service
                .rows("select * from nightowls.read_with_poll('jobs', max_wait => '300 ms')")
                .len(),
            0
        );
        assert!(start.elapsed() >= Duration::from_millis(300));
        // None are wanted: nobody waits for them.
        assert_eq!(
            service
                .rows(
                    "select * from nightowls.read_with_poll('jobs', qty => 0, max_wait => '1 hour')"
                )
                .len(),
            0
        );
        for level in ["repeatable read", "serializable"] {
            service.exec(&format!("begin isolation level {level}"));
            let refused = service.refused("select nightowls.read_with_poll('jobs')");
            assert_eq!(refused.code, "25001");
            service.exec("rollback");
            service.exec(&format!("begin isolation level {level}; select nightowls.read_with_poll('jobs', max_wait => '0'); rollback"));
        }
    });
}

#[test]
fn a_reader_waits_on_every_route() {
    on_each_route(|db| {
        let mut service = jobs(db);
        let mut reader = db.session(SERVICE);
        thread::scope(|scope| {
            let got = scope.spawn(|| text(&mut reader, &poll("jobs")));
            until_napping(db, 1);
            service.exec("select nightowls.send('jobs', '7')");
            assert_eq!(got.join().expect("the reader ends"), "7");
        });
    });
}

#[test]
fn no_message_waits_while_a_reader_sleeps() {
    const READERS: usize = 8;
    const SENDERS: usize = 4;
    const TRANSACTIONS: usize = 120;
    on_each_server(|db| {
        let mut service = jobs(db);
        service.exec("select nightowls.alter_queue('jobs', backoff => '0', max_backoff => '0')");
        thread::scope(|scope| {
            let readers: Vec<_> = (0..READERS)
                .map(|number| {
                    let mut session = db.session(SERVICE);
                    scope.spawn(move || {
                        let mut random = Random::new(number as u64 + 5);
                        let mut done = Vec::new();
                        loop {
                            session.exec("begin");
                            let row = session
                                .rows(
                                    "select msg_id, receipt, message from nightowls.read_with_poll('jobs', 60, 1, '60 seconds')",
                                )
                                .remove(0);
                            let [id, receipt, message] = [0, 1, 2].map(|i| row[i].clone().expect("not null"));
                            if message == "\"end\"" {
                                session.exec(&format!("select nightowls.ack('jobs', {id}, '{receipt}'); commit"));
                                return done;
                            }
                            if random.chance(20) {
                                session.exec("rollback");
                            } else if random.chance(20) {
                                session.exec(&format!("select nightowls.nack('jobs', {id}, '{receipt}'); commit"));
                            } else {
                                session.exec(&format!("select nightowls.ack('jobs', {id}, '{receipt}'); commit"));
                                done.push(message);
                            }
                        }
                    })
                })
                .collect();
            let mut sent: Vec<String> = together(
                SENDERS,
                |_| db.session(SERVICE),
                |sender, mut session| {
                    let mut random = Random::new(sender as u64 + 77);
                    let mut sent = Vec::new();
                    for n in 0..TRANSACTIONS {
                        let number = (sender * TRANSACTIONS + n) * 10;
                        let more = random.below(3) as usize;
                        let group = if random.chance(30) {
                            format!(", group_key => 'g{}'", random.below(3))
                        } else {
                            String::new()
                        };
                        let keep = random.chance(80);
                        let mut sql = "begin".to_owned();
                        for i in 0..=more {
                            sql += &format!(
                                "; select nightowls.send('jobs', '{}'{group})",
                                number + i
                            );
                        }
                        sql += if keep { "; commit" } else { "; rollback" };
                        session.exec(&sql);
                        if keep {
                            sent.extend((0..=more).map(|i| (number + i).to_string()));
                        }
                        if random.chance(10) {
                            // Readers fall asleep now and then.
                            session.exec("select pg_sleep(0.02)");
                        }
                    }
                    sent
                },
            )
            .concat();
            let mut watcher = db.superuser();
            wait_until("everything is acked", Duration::from_secs(60), || {
                watcher.value("select count(*) from nightowls.queue_messages where state <> 's'")
                    == Some("0".to_owned())
            });
            for _ in 0..READERS {
                service.exec("select nightowls.send('jobs', '\"end\"')");
            }
            let mut done: Vec<String> = readers
                .into_iter()
                .flat_map(|reader| reader.join().expect("a reader ends"))
                .collect();
            sent.sort();
            done.sort();
            assert_eq!(done, sent);
        });
    });
}

#[test]
fn who_listens_is_told_once_a_transaction_and_nobody_waits_for_it() {
    on_each_install(|db| {
        let org = default_org(db);
        let mut service = db.service();
        service.exec("select nightowls.create_queue('Loud', notify => true), nightowls.create_queue('quiet')");
        let mut listener = db.direct(SERVICE);
        listener.exec("listen nightowls_queues");
        let mut heard = |timeout: u64| {
            listener
                .client()
                .notifications()
                .timeout_iter(Duration::from_millis(timeout))
                .map(|note| Ok(note.payload().to_owned()))
                .collect::<Vec<_>>()
                .expect("the connection lives")
        };
        let loud = format!("{org}:loud");
        service.exec(
            "begin; select nightowls.send('loud', '1'), nightowls.send('loud', '2'), nightowls.send('quiet', '1');
             select nightowls.send_batch('loud', '{3,4}'::jsonb[]), nightowls.send('loud', '5', group_key => 'g');
             savepoint a; select nightowls.send('loud', '6'); release a; savepoint b; select nightowls.send('loud', '7');
             rollback to b; commit",
        );
        assert_eq!(heard(1000).join(" "), loud);
        service.exec("begin; select nightowls.send('loud', '8'); rollback; select nightowls.send('quiet', '1')");
        assert_eq!(heard(300), [""; 0]);
        // Another queue: another word. What comes back says so too.
        service.exec("begin; select nightowls.alter_queue('quiet', notify => true); select nightowls.purge_queue('loud'); commit");
        heard(300);
        service.exec("select nightowls.send('quiet', '1')");
        assert_eq!(heard(1000).join(" "), format!("{org}:quiet"));
        service.exec("select nightowls.alter_queue('quiet', notify => false)");
        heard(300);
        service.exec("select nightowls.send('loud', '1')");
        assert_eq!(heard(1000).join(" "), loud);
        let claim = read(&mut service, "loud", 30, 1).remove(0);
        assert!(settle(&mut service, "nack", "loud", &claim, ", 'no', 0"));
        assert_eq!(heard(1000).join(" "), loud);

        // An open sender: others send, read and ack meanwhile.
        let mut open = db.service();
        open.exec("begin; select nightowls.send('loud', '\"open\"')");
        let mut other = db.service();
        other.exec("set statement_timeout = '5 s'");
        other.exec("select nightowls.send('loud', '2')");
        assert_eq!(heard(1000).join(" "), loud);
        let claims = read(&mut other, "loud", 30, 10);
        assert_eq!(
            claims
                .iter()
                .map(|claim| claim.message.as_str())
                .collect::<Vec<_>>(),
            ["1", "2"]
        );
        for claim in &claims {
            assert!(settle(&mut other, "ack", "loud", claim, ""));
        }
        open.exec("commit");
        assert_eq!(heard(1000).join(" "), loud);
        assert_eq!(read(&mut other, "loud", 30, 10).len(), 1);
    });
}

#[test]
fn a_sender_that_stays_open_delays_only_its_own_group() {
    for notify in [false, true] {
        on_each_install(|db| {
            default_org(db);
            let mut service = db.service();
            service.exec(&format!(
                "select nightowls.create_queue('jobs', notify => {notify})"
            ));
            let mut open = db.service();
            open.exec(
                "begin; select nightowls.send('jobs', '0'), nightowls.send('jobs', '0', group_key => 'mine');
                        select nightowls.send_batch('jobs', '{0,0}'::jsonb[], dedup_keys => '{a,b}')",
            );
            let mut other = db.service();
            other.exec("set statement_timeout = '5 s'");
            for n in 1..=20 {
                other.exec(&format!("select nightowls.send('jobs', '{n}'), nightowls.send('jobs', '{n}', group_key => 'other')"));
            }
            for left in (0..40).rev() {
                let claim = read(&mut other, "jobs", 30, 1).pop();
                let claim = claim.unwrap_or_else(|| panic!("{left} more are to be read"));
                assert!(settle(&mut other, "ack", "jobs", &claim, ""));
            }
            let mut same = db.service();
            let pid = same.pid();
            thread::scope(|scope| {
                let sent = scope.spawn(move || {
                    same.exec("select nightowls.send('jobs', '21', group_key => 'mine')")
                });
                wait_until("its group waits", Duration::from_secs(20), || {
                    is_blocked(&mut service, pid)
                });
                open.exec("commit");
                sent.join().expect("it is sent");
            });
            assert_eq!(
                lines(
                    &mut service,
                    "select message from nightowls.queue_messages order by msg_id"
                ),
                ["0", "0", "0", "0", "21"]
            );
        });
    }
}

/// Not a bound: it says what waking costs here.
#[test]
fn a_woken_reader_has_its_message_within_milliseconds() {
    on_each_that_wakes(|db| {
        jobs(db);
        let mut times: Vec<_> = (0..40)
            .map(|_| {
                delivery(db, "jobs", |other| {
                    other.exec("select nightowls.send('jobs', '1')")
                })
            })
            .collect();
        times.sort_unstable();
        eprintln!(
            "send to delivery: p50 {:?}, p90 {:?} (preloaded: {})",
            times[20],
            times[36],
            db.port() == preloaded_server().port()
        );
        assert!(times[20] < Duration::from_millis(50), "{times:?}");
    });
}

/// Two that sleep with what the other one needs would keep a group waiting.
#[test]
fn a_reader_that_sleeps_holds_no_group() {
    on_each_server(|db| {
        let mut service = jobs(db);
        service.exec("select nightowls.send('jobs', '1', group_key => 'g')");
        let head = read(&mut service, "jobs", 600, 1).remove(0);
        // Word is left for the group, and nothing can be done about it.
        service.exec(
            "begin isolation level repeatable read; select nightowls.send('jobs', '2', group_key => 'g'); commit",
        );
        let mut reader = db.session(SERVICE);
        let pid = reader.pid();
        reader.exec("begin");
        thread::scope(|scope| {
            let got = scope.spawn(|| text(&mut reader, &poll("jobs")));
            until_napping(db, 1);
            let held = format!(
                "select count(*) from pg_locks where pid = {pid} and locktype = 'advisory'
                    and classid::bigint in (nightowls._lock_class(264), nightowls._lock_class(267))"
            );
            // But for the moment of a look.
            wait_until("it holds nothing", Duration::from_secs(20), || {
                text(&mut service, &held) == "0"
            });
            // Who acks it can have the group.
            assert!(settle(&mut service, "ack", "jobs", &head, ""));
            assert_eq!(got.join().expect("the reader ends"), "2");
        });
    });
}
