//! Waiting: who is woken, when, and what a sleeper costs others.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use crate::fixture::{Random, default_org, lines, org_apart_from, together};
use crate::support::{
    Cluster, Db, Install, Refusal, SERVICE, STRANGER, Session, kill, own_cluster_with,
    preloaded_server, server, wait_until,
};

/// Longer than a test takes.
const LONG: &str = "600000";

/// Both installs, and the extension on a server that has loaded it at its start.
pub fn on_each_server(test: impl Fn(&Db)) {
    let servers = [
        (
            "preloaded extension",
            preloaded_server(),
            Install::Extension,
        ),
        ("extension", server(), Install::Extension),
        ("plain", server(), Install::Plain),
    ];
    for (name, server, install) in servers {
        let run = AssertUnwindSafe(|| test(&database(&server, install)));
        if let Err(panic) = catch_unwind(run) {
            eprintln!("failed on: {name}");
            resume_unwind(panic);
        }
    }
}

/// As [`on_each_server`], where sleepers are woken.
pub fn on_each_that_wakes(test: impl Fn(&Db)) {
    test(&database(&preloaded_server(), Install::Extension));
    if server().major() >= 17 {
        test(&database(&server(), Install::Extension));
    }
}

/// A fresh database, in which a sleeper that was forgotten ends with its test.
fn database(cluster: &Arc<Cluster>, install: Install) -> Db {
    let db = cluster.database(install);
    db.superuser().exec(&format!(
        "alter database {} set statement_timeout = '90 s'; \
         create function public.nap(key text) returns void language plpgsql as $$ \
         declare \
           v_start timestamptz := clock_timestamp(); \
         begin \
           perform nightowls._nap(nap.key, nightowls._wake_count(nap.key), 0, {LONG}); \
           if clock_timestamp() - v_start >= interval '20 s' then \
             raise exception 'nobody woke the sleeper'; \
           end if; \
         end; \
         $$",
        db.name()
    ));
    db
}

/// One nap, until the key is woken: longer than the longest nap is an error.
fn nap(key: &str) -> String {
    format!("select public.nap('{key}')")
}

/// Waits until all of these backends have lain down.
#[track_caller]
pub fn until_asleep(db: &Db, pids: &[i32]) {
    let mut watcher = db.superuser();
    let list = pids.iter().map(i32::to_string).collect::<Vec<_>>();
    let asleep = format!(
        "select count(*) from pg_stat_activity where pid in ({}) and wait_event_type in ('Extension', 'Timeout')",
        list.join(", ")
    );
    let count = Some(pids.len().to_string());
    wait_until("everybody sleeps", Duration::from_secs(60), || {
        watcher.value(&asleep) == count
    });
}

/// Makes a table of flags and `naps_until(key, flag)`, which naps until the flag
/// is up and returns how often it slept. A nap that nobody ended is an error, but
/// where that is expected.
fn make_flags(db: &Db) {
    db.superuser().exec(&format!(
        "create table public.flags (name text); \
         grant select, insert on public.flags to {SERVICE}; \
         create function public.naps_until(key text, flag text, patient boolean default false) \
           returns int language plpgsql as $$ \
         declare \
           v_seen bigint := nightowls._wake_count(naps_until.key); \
           v_nth int := 0; \
           v_start timestamptz; \
         begin \
           loop \
             if exists (select from public.flags f where f.name = naps_until.flag) then \
               return v_nth; \
             end if; \
             v_start := clock_timestamp(); \
             v_seen := nightowls._nap(naps_until.key, v_seen, v_nth, {LONG}); \
             v_nth := v_nth + 1; \
             if not naps_until.patient and clock_timestamp() - v_start >= interval '20 s' then \
               raise exception 'nobody woke the sleeper'; \
             end if; \
           end loop; \
         end; \
         $$"
    ));
}

/// Runs `meanwhile` while a session naps for a flag; returns how often it slept
/// until the flag was up.
fn naps_during(db: &Db, key: &str, patient: bool, meanwhile: impl FnOnce(&mut Session)) -> u32 {
    make_flags(db);
    let mut sleeper = db.session(SERVICE);
    let pid = sleeper.pid();
    thread::scope(|scope| {
        let slept = scope.spawn(move || {
            sleeper.value(&format!(
                "select public.naps_until('{key}', 'up', {patient})"
            ))
        });
        until_asleep(db, &[pid]);
        let mut waker = db.session(SERVICE);
        meanwhile(&mut waker);
        // Time for one that was woken to look and to sleep again: that counts.
        for _ in 0..300 {
            waker.exec("select 1");
        }
        waker.exec(&format!(
            "begin; insert into public.flags values ('up'); select nightowls._wake('{key}'); commit"
        ));
        slept
            .join()
            .expect("the sleeper wakes")
            .and_then(|naps| naps.parse().ok())
            .expect("a number of naps")
    })
}

#[test]
fn a_server_can_wake_if_it_has_loaded_the_library_or_is_new_enough() {
    let can = |cluster: &Arc<Cluster>, install| {
        cluster
            .database(install)
            .session(SERVICE)
            .value("select nightowls._can_wake()")
    };
    let expected = |can: bool| Some(if can { "t" } else { "f" }.to_owned());
    assert_eq!(can(&preloaded_server(), Install::Extension), expected(true));
    assert_eq!(
        can(&server(), Install::Extension),
        expected(server().major() >= 17)
    );
    assert_eq!(can(&server(), Install::Plain), expected(false));
    assert_eq!(can(&preloaded_server(), Install::Plain), expected(false));
}

#[test]
fn a_sleeper_finds_what_its_waker_committed() {
    on_each_server(|db| {
        let naps = naps_during(db, "bell", false, |_| ());
        assert!(naps >= 1);
    });
}

#[test]
fn only_its_own_key_wakes_a_sleeper() {
    on_each_that_wakes(|db| {
        let naps = naps_during(db, "bell", false, |waker| {
            for number in 0..300 {
                waker.exec(&format!("select nightowls._wake('bell {number}')"));
            }
            let elsewhere = db.cluster().database(Install::Extension);
            elsewhere
                .session(SERVICE)
                .exec("select nightowls._wake('bell')");
        });
        assert_eq!(naps, 1);
    });
}

#[test]
fn a_transaction_that_rolls_back_wakes_nobody() {
    on_each_that_wakes(|db| {
        let naps = naps_during(db, "bell", false, |waker| {
            for _ in 0..20 {
                waker.exec("begin; select nightowls._wake('bell'); rollback");
                waker.refused("begin; select nightowls._wake('bell'); select 1 / 0");
                waker.exec("rollback");
                waker.refused("select nightowls._wake('bell'), 1 / (random() > 2)::int");
            }
            // What was forgotten does not come back with the next commit.
            waker.exec("select nightowls._wake('another')");
        });
        assert_eq!(naps, 1);
    });
}

#[test]
fn a_rolled_back_savepoint_keeps_no_wake_up_from_anybody() {
    on_each_server(|db| {
        make_flags(db);
        let mut sleeper = db.session(SERVICE);
        let pid = sleeper.pid();
        thread::scope(|scope| {
            let slept = scope.spawn(move || sleeper.exec("select public.naps_until('bell', 'up')"));
            until_asleep(db, &[pid]);
            db.session(SERVICE).exec(
                "begin; select nightowls._wake('bell'); savepoint a; select nightowls._wake('bell'); \
                 select nightowls._wake('other'); rollback to a; \
                 insert into public.flags values ('up'); commit",
            );
            slept.join().expect("the sleeper wakes");
        });
    });
}

#[test]
fn nobody_is_woken_before_the_wakers_locks_are_free() {
    const ROUNDS: usize = 60;
    on_each_that_wakes(|db| {
        let org = default_org(db);
        // The answer of a look right after the nap: the log shows a new event only when its append holds nothing any more. Many
        // locks take long to free. Who has been woken too early goes on sleeping, and says how often that was.
        db.superuser().exec(&format!(
            "create function public.next_event(after bigint) returns text language plpgsql as $$ \
             declare \
               v_seen bigint := nightowls._wake_count('log'); \
               v_early int := -1; \
               v_found bigint; \
             begin \
               loop \
                 select e.position into v_found from nightowls.read_events(next_event.after) e limit 1; \
                 if v_found is not null then return v_found || ' ' || v_early; end if; \
                 v_early := v_early + 1; \
                 v_seen := nightowls._nap('log', v_seen, 0, {LONG}); \
               end loop; \
             end; \
             $$"
        ));
        let mut sleeper = db.session(SERVICE);
        let pid = sleeper.pid();
        let mut waker = db.session(SERVICE);
        let mut after = "0".to_owned();
        let mut early = 0;
        for round in 0..ROUNDS {
            let look = format!(
                "select set_config('nightowls.org_id', '{org}', false); select public.next_event({after})"
            );
            let answer: String = thread::scope(|scope| {
                let found =
                    scope.spawn(|| sleeper.rows(&look).pop().and_then(|mut row| row.remove(0)));
                until_asleep(db, &[pid]);
                waker.exec(&format!(
                    "begin; select count(pg_advisory_xact_lock(7, i)) from generate_series(1, 500) i; \
                     select nightowls._wake('log'); \
                     select nightowls.append_event('cart', '{round}', 'opened'); commit"
                ));
                found.join().expect("the sleeper wakes").expect("an answer")
            });
            let (position, times) = answer.split_once(' ').expect("a position and a count");
            after = position.to_owned();
            early += times.parse::<i32>().expect("a number");
        }
        // A transaction of another database that wakes more keys than it remembers wakes everybody.
        assert!(early <= 2, "woken too early {early} times of {ROUNDS}");
    });
}

#[test]
fn more_keys_than_a_transaction_remembers_wake_everybody() {
    on_each_that_wakes(|db| {
        let mut sessions: Vec<_> = (0..3).map(|_| db.session(SERVICE)).collect();
        let pids: Vec<_> = sessions.iter_mut().map(Session::pid).collect();
        thread::scope(|scope| {
            for (mut session, key) in sessions.into_iter().zip(["k1", "k100", "not named"]) {
                scope.spawn(move || session.exec(&nap(key)));
            }
            until_asleep(db, &pids);
            db.session(SERVICE)
                .exec("select nightowls._wake('k' || i) from generate_series(1, 100) i");
        });
    });
}

#[test]
fn no_more_sleepers_are_woken_than_asked_for() {
    on_each_that_wakes(|db| {
        let mut sessions: Vec<_> = (0..6).map(|_| db.session(SERVICE)).collect();
        let pids: Vec<_> = sessions.iter_mut().map(Session::pid).collect();
        thread::scope(|scope| {
            let sleepers: Vec<_> = sessions
                .into_iter()
                .map(|mut session| scope.spawn(move || session.exec(&nap("one by one"))))
                .collect();
            until_asleep(db, &pids);
            let mut waker = db.session(SERVICE);
            let mut watcher = db.superuser();
            let still_asleep = "select count(*) from pg_stat_activity \
                                where datname = current_database() and wait_event_type = 'Extension'";
            for (waiters, left) in [(1, 5), (2, 3), (0, 3), (1, 2)] {
                waker.exec(&format!("select nightowls._wake('one by one', {waiters})"));
                wait_until("so many still sleep", Duration::from_secs(20), || {
                    watcher.value(still_asleep) == Some(left.to_string())
                });
            }
            // Twice for one is for two.
            waker.exec(
                "begin; select nightowls._wake('one by one', 1); select nightowls._wake('one by one', 1); commit",
            );
            for sleeper in sleepers {
                sleeper.join().expect("everybody was woken");
            }
        });
    });
}

#[test]
fn no_wake_up_is_lost_among_many_workers_and_senders() {
    const WORKERS: usize = 12;
    const SENDERS: usize = 6;
    const TRANSACTIONS: u64 = 250;
    on_each_server(|db| {
        db.superuser().exec(&format!(
            "create table public.jobs (job bigint generated always as identity primary key, last boolean); \
             create table public.done (job bigint, worker int); \
             grant select, insert, update, delete on public.jobs, public.done to {SERVICE}; \
             create function public.take() returns bigint language sql volatile as $$ \
               delete from public.jobs where job = (select job from public.jobs where not last \
                 order by job limit 1 for update skip locked) returning job $$; \
             create procedure public.work(worker int, inout late int) language plpgsql as $$ \
             declare \
               v_seen bigint; \
               v_job bigint; \
               v_nth int := 0; \
               v_start timestamptz; \
             begin \
               late := 0; \
               loop \
                 v_seen := nightowls._wake_count('jobs'); \
                 loop \
                   v_job := public.take(); \
                   exit when v_job is null; \
                   insert into public.done values (v_job, worker); \
                   v_nth := 0; \
                   commit; \
                 end loop; \
                 exit when exists (select from public.jobs where last); \
                 v_start := clock_timestamp(); \
                 v_seen := nightowls._nap('jobs', v_seen, v_nth, {LONG}); \
                 v_nth := v_nth + 1; \
                 if clock_timestamp() - v_start > interval '9 s' then late := late + 1; end if; \
                 commit; \
               end loop; \
             end; \
             $$"
        ));
        let late = thread::scope(|scope| {
            let workers: Vec<_> = (0..WORKERS)
                .map(|worker| {
                    let mut session = db.session(SERVICE);
                    scope.spawn(move || session.value(&format!("call public.work({worker}, null)")))
                })
                .collect();
            let sent: u64 = together(
                SENDERS,
                |_| db.session(SERVICE),
                |number, mut session| {
                    let mut random = Random::new(number as u64 + 11);
                    let mut sent = 0;
                    for _ in 0..TRANSACTIONS {
                        let jobs = 1 + random.below(3);
                        let end = if random.chance(20) {
                            "rollback"
                        } else {
                            "commit"
                        };
                        let savepoint = if random.chance(20) {
                            "savepoint a; insert into public.jobs (last) values (false); \
                             select nightowls._wake('jobs', 1); rollback to a; "
                        } else {
                            ""
                        };
                        let wake = if random.chance(50) {
                            format!("select nightowls._wake('jobs', {jobs})")
                        } else {
                            "select nightowls._wake('jobs')".to_owned()
                        };
                        session.exec(&format!(
                            "begin; {savepoint}{wake}; insert into public.jobs (last) \
                             select false from generate_series(1, {jobs}); {end}"
                        ));
                        if end == "commit" {
                            sent += jobs;
                        }
                    }
                    sent
                },
            )
            .into_iter()
            .sum();
            let mut watcher = db.superuser();
            let done = "select count(*) || ' ' || count(distinct job) from public.done";
            let all = Some(format!("{sent} {sent}"));
            wait_until("every job is done once", Duration::from_secs(60), || {
                watcher.value(done) == all
            });
            watcher.exec(
                "begin; insert into public.jobs (last) values (true); select nightowls._wake('jobs'); commit",
            );
            workers
                .into_iter()
                .map(|worker| {
                    worker
                        .join()
                        .expect("a worker ends")
                        .expect("how often it was late")
                })
                .collect::<Vec<_>>()
        });
        // A nap that ended by itself while there was work or the end to be seen.
        assert!(late.iter().all(|late| late == "0"), "late: {late:?}");
    });
}

#[test]
fn a_nap_can_be_cancelled_terminated_and_timed_out() {
    on_each_server(|db| {
        // In a loop, as its callers do: a twin's nap is short.
        make_flags(db);
        let wait = "select public.naps_until('bell', 'up')";
        let interrupted = |mut session: Session, how: &str| -> (Refusal, Session) {
            let pid = session.pid();
            thread::scope(|scope| {
                let ended = scope.spawn(move || (session.refused(wait), session));
                until_asleep(db, &[pid]);
                let mut watcher = db.superuser();
                watcher.exec(&format!("select {how}({pid})"));
                // Before the nap would have ended by itself.
                let busy = format!(
                    "select 1 from pg_stat_activity where pid = {pid} and state = 'active'"
                );
                wait_until("the nap is over", Duration::from_secs(9), || {
                    watcher.value(&busy).is_none()
                });
                ended.join().expect("the nap ends")
            })
        };

        let (refusal, mut session) = interrupted(db.session(SERVICE), "pg_cancel_backend");
        assert_eq!(refusal.code, "57014");
        session.exec("set statement_timeout = '50 ms'");
        assert_eq!(session.refused(wait).code, "57014");
        session.exec("reset statement_timeout");
        let (refusal, _) = interrupted(session, "pg_terminate_backend");
        assert!(
            ["57P01", "08006"].contains(&refusal.code.as_str()),
            "{refusal}"
        );
    });
}

#[test]
fn a_wake_up_for_one_that_is_cancelled_goes_to_the_next() {
    on_each_that_wakes(|db| {
        for how in ["pg_cancel_backend", "pg_terminate_backend"] {
            let mut sessions: Vec<_> = (0..2).map(|_| db.session(SERVICE)).collect();
            let pids: Vec<_> = sessions.iter_mut().map(Session::pid).collect();
            let mut waker = db.session(SERVICE);

            // Who of the two is woken when one is: always the same.
            let (sender, woken) = mpsc::channel();
            let first = thread::scope(|scope| {
                for (number, session) in sessions.iter_mut().enumerate() {
                    let sender = sender.clone();
                    scope.spawn(move || {
                        session.exec(&nap("relay"));
                        sender.send(number).expect("somebody listens");
                    });
                }
                until_asleep(db, &pids);
                waker.exec("select nightowls._wake('relay', 1)");
                let first = woken.recv().expect("one is woken");
                waker.exec("select nightowls._wake('relay')");
                first
            });

            thread::scope(|scope| {
                let sleepers: Vec<_> = sessions
                    .iter_mut()
                    .map(|session| scope.spawn(move || session.try_exec(&nap("relay"))))
                    .collect();
                until_asleep(db, &pids);
                // It is given the wake-up, and learns of its end before it can look.
                let pid = pids[first].to_string();
                kill("-STOP", &pid);
                waker.exec("select nightowls._wake('relay', 1)");
                db.superuser().exec(&format!("select {how}({pid})"));
                kill("-CONT", &pid);
                let ended: Vec<_> = sleepers
                    .into_iter()
                    .map(|sleeper| sleeper.join().expect("a session ends its call"))
                    .collect();
                assert!(ended[first].is_err());
                ended[1 - first].as_ref().expect("the other is woken");
            });
        }
    });
}

/// The server has room for five hundred sessions once.
static CROWD: Mutex<()> = Mutex::new(());

#[test]
fn five_hundred_sleepers_block_nobody_and_all_wake() {
    const SLEEPERS: usize = 500;
    let _alone = CROWD.lock().unwrap_or_else(PoisonError::into_inner);
    let db = database(&preloaded_server(), Install::Extension);
    let mut sessions: Vec<_> = (0..SLEEPERS).map(|_| db.session(SERVICE)).collect();
    let pids: Vec<_> = sessions.iter_mut().map(Session::pid).collect();
    thread::scope(|scope| {
        let sleepers: Vec<_> = sessions
            .into_iter()
            .map(|mut session| {
                thread::Builder::new()
                    .stack_size(256 * 1024)
                    .spawn_scoped(scope, move || session.exec(&nap("many")))
                    .expect("a thread starts")
            })
            .collect();
        until_asleep(&db, &pids);

        let locks = "select distinct locktype, mode from pg_locks l join pg_stat_activity a using (pid) \
                     where a.datname = current_database() and a.wait_event_type = 'Extension'";
        assert_eq!(
            lines(&mut db.superuser(), locks),
            ["virtualxid ExclusiveLock"]
        );
        db.superuser()
            .exec("begin; lock table nightowls.events in access exclusive mode nowait; commit");

        db.session(SERVICE).exec("select nightowls._wake('many')");
        for sleeper in sleepers {
            sleeper.join().expect("everybody wakes");
        }
    });
}

/// Every way of waiting that a client has, by five hundred in all: they keep nobody from anything. What they cost is measured by
/// `make bench PART=floors`.
#[test]
fn five_hundred_waiting_clients_block_nobody() {
    const EACH: usize = 170;
    let _alone = CROWD.lock().unwrap_or_else(PoisonError::into_inner);
    let db = database(&preloaded_server(), Install::Extension);
    default_org(&db);
    let mut service = db.service();
    service.exec(
        "select nightowls.create_queue('jobs'); \
         select nightowls.request_floor('c', 'h', max_hold_ms => 3600000)",
    );
    service.exec(&format!(
        r#"select nightowls.request_floor('c', 'w' || i, poll_ms => 60000),
                  nightowls.create_consumer('c' || i, '{{"event_types": ["never"]}}') from generate_series(0, {}) i"#,
        EACH - 1
    ));
    let statement = |number: usize| match number % 3 {
        0 => format!(
            "select nightowls.await_floor('c', 'w{}', {}, 60000)",
            number / 3,
            number / 3 + 2
        ),
        1 => "select nightowls.read_with_poll('jobs', max_wait => '60 s')".to_owned(),
        _ => format!(
            "select nightowls.fetch_events('c{}', max_wait => '60 s')",
            number / 3
        ),
    };
    let mut sessions: Vec<_> = (0..3 * EACH).map(|_| db.session(SERVICE)).collect();
    let pids: Vec<_> = sessions.iter_mut().map(Session::pid).collect();
    thread::scope(|scope| {
        let waiters: Vec<_> = sessions
            .into_iter()
            .enumerate()
            .map(|(number, mut session)| {
                let sql = statement(number);
                thread::Builder::new()
                    .stack_size(256 * 1024)
                    .spawn_scoped(scope, move || session.try_exec(&sql))
                    .expect("a thread starts")
            })
            .collect();
        until_asleep(&db, &pids);
        // Who waits for a floor has no locks but those of a plain select; the others none that keeps anything but DDL from a table.
        let locks = "select distinct l.locktype, l.mode from pg_locks l join pg_stat_activity a using (pid) \
                      where a.datname = current_database() and a.wait_event_type = 'Extension' \
                        and case when a.query like '%await_floor%' \
                              then (l.locktype, l.mode) not in (('relation', 'AccessShareLock'), ('virtualxid', 'ExclusiveLock')) \
                              else l.locktype = 'relation' and l.mode not in ('AccessShareLock', 'RowShareLock', 'RowExclusiveLock') end";
        assert_eq!(lines(&mut db.superuser(), locks), [""; 0]);
        db.superuser().exec(&format!(
            "select pg_cancel_backend(pid) from unnest('{{{}}}'::int[]) pid",
            pids.iter()
                .map(i32::to_string)
                .collect::<Vec<_>>()
                .join(",")
        ));
        for waiter in waiters {
            let ended = waiter.join().expect("everybody ends");
            assert_eq!(ended.expect_err("nothing came").code, "57014");
        }
    });
}

#[test]
fn what_a_prepared_transaction_committed_is_found_without_a_wake_up() {
    let db = database(&preloaded_server(), Install::Extension);
    naps_during(&db, "bell", true, |waker| {
        waker.exec(
            "begin; insert into public.flags values ('up'); select nightowls._wake('bell'); \
             prepare transaction 'wait'",
        );
        waker.exec("commit prepared 'wait'");
        // The flag is up for whoever wakes; nobody says so until the longest nap is
        // over, unless the sleeper was woken by the preparation only after this.
        let pending = "select 1 from pg_stat_activity where datname = current_database() \
                       and wait_event_type = 'Extension'";
        let mut watcher = db.superuser();
        wait_until("the sleeper has looked", Duration::from_secs(40), || {
            watcher.value(pending).is_none()
        });
    });
}

#[test]
fn the_procedure_commits_and_holds_no_snapshot_while_it_sleeps() {
    on_each_server(|db| {
        make_flags(db);
        db.superuser().exec(&format!(
            "create procedure public.wait_in_procedure(key text) language plpgsql as $$ \
             declare \
               v_seen bigint; \
               v_nth int := 0; \
             begin \
               insert into public.flags values ('begun'); \
               loop \
                 v_seen := nightowls._wake_count(wait_in_procedure.key); \
                 exit when exists (select from public.flags f where f.name = 'up'); \
                 call nightowls._nap_without_snapshot(wait_in_procedure.key, v_seen, v_nth, {LONG}); \
                 v_nth := v_nth + 1; \
               end loop; \
               insert into public.flags values ('ended'); \
             end; \
             $$"
        ));
        let mut sleeper = db.session(SERVICE);
        let pid = sleeper.pid();
        thread::scope(|scope| {
            let slept = scope.spawn(move || {
                sleeper.exec("call public.wait_in_procedure('bell')");
                sleeper
            });
            until_asleep(db, &[pid]);
            let mut watcher = db.superuser();
            let flags = || {
                lines(
                    &mut db.superuser(),
                    "select name from public.flags order by 1",
                )
            };
            wait_until("its work is committed", Duration::from_secs(20), || {
                flags() == ["begun"]
            });
            if db.install() == Install::Extension {
                let held = "select coalesce(backend_xmin::text, 'none'), coalesce(backend_xid::text, 'none'), \
                                   (select count(*) from pg_locks l where l.pid = a.pid and l.locktype <> 'virtualxid') \
                              from pg_stat_activity a";
                // Where it is not woken it sleeps again and again: it may be looking.
                wait_until("it sleeps with nothing", Duration::from_secs(20), || {
                    let held =
                        format!("{held} where pid = {pid} and wait_event_type = 'Extension'");
                    lines(&mut watcher, &held) == ["none none 0"]
                });
            }
            db.session(SERVICE).exec(
                "begin; insert into public.flags values ('up'); select nightowls._wake('bell'); commit",
            );
            let mut sleeper = slept.join().expect("it is woken");
            assert_eq!(flags(), ["begun", "ended", "up"]);

            let refused = |session: &mut Session, sql: &str| session.refused(sql).code;
            let call = "call nightowls._nap_without_snapshot('bell', 0, 0, 1)";
            assert_eq!(refused(&mut sleeper, &format!("begin; {call}")), "2D000");
            sleeper.exec("rollback");
            assert_eq!(
                refused(
                    &mut sleeper,
                    &format!(
                        "do $$ begin {call}; exception when division_by_zero then null; end $$"
                    )
                ),
                "2D000"
            );
            sleeper.exec(call);
            sleeper.exec(&format!("do $$ begin {call}; end $$"));
        });
    });
}

#[test]
fn a_procedure_that_sleeps_can_be_interrupted() {
    on_each_server(|db| {
        let loops = format!(
            "do $$ begin for i in 1 .. 1000000 loop \
             call nightowls._nap_without_snapshot('bell', nightowls._wake_count('bell'), i, {LONG}); \
             end loop; end $$"
        );
        let mut session = db.session(SERVICE);
        let pid = session.pid();
        thread::scope(|scope| {
            let ended = scope.spawn(|| session.refused(&loops).code);
            until_asleep(db, &[pid]);
            db.superuser()
                .exec(&format!("select pg_cancel_backend({pid})"));
            assert_eq!(ended.join().expect("the nap ends"), "57014");
        });
        assert_eq!(session.value("select 1").as_deref(), Some("1"));
    });
}

#[test]
fn a_nap_without_time_or_with_news_returns_at_once() {
    on_each_server(|db| {
        let mut session = db.session(SERVICE);
        session.exec("select nightowls._nap('bell', nightowls._wake_count('bell'), 0, 0)");
        session.exec("select nightowls._nap('bell', nightowls._wake_count('bell'), 0, -5)");
        session.exec("select nightowls._nap('bell', nightowls._wake_count('bell'), -3, 1)");
        // Somebody wakes between the count and the nap.
        session.exec("set statement_timeout = '9 s'");
        for _ in 0..3 {
            let seen = session
                .value("select nightowls._wake_count('bell')")
                .expect("a count is never null");
            db.session(SERVICE).exec("select nightowls._wake('bell')");
            session.exec(&format!("select nightowls._nap('bell', {seen}, 0, {LONG})"));
        }
        assert_eq!(
            session.value(&format!(
                "select nightowls._nap(null, 0, 0, {LONG}) is null"
            )),
            Some("t".to_owned())
        );
        assert_eq!(
            session.value("select nightowls._wake(null)").as_deref(),
            Some("t")
        );
    });
}

#[test]
fn the_server_recovers_when_a_sleeper_is_killed() {
    let settings = [("shared_preload_libraries", "nightowls")];
    own_cluster_with(&settings, |cluster| {
        let db = database(cluster, Install::Extension);
        let mut sessions: Vec<_> = (0..3).map(|_| db.session(SERVICE)).collect();
        let pids: Vec<_> = sessions.iter_mut().map(Session::pid).collect();
        thread::scope(|scope| {
            for mut session in sessions {
                scope.spawn(move || session.refused(&nap("bell")));
            }
            until_asleep(&db, &pids);
            kill("-KILL", &pids[0].to_string());
        });
        wait_until("the server is back", Duration::from_secs(60), || {
            Session::connect(db.port(), db.name(), SERVICE).is_ok()
        });
        let naps = naps_during(&db, "bell", false, |_| ());
        assert_eq!(naps, 1);
        assert_eq!(
            db.session(SERVICE)
                .value("select nightowls._wake_count('bell')")
                .as_deref(),
            Some("1")
        );
    });
}

#[test]
fn a_sleeper_stops_neither_drop_extension_nor_a_new_one() {
    on_each_that_wakes(|db| {
        let mut sleeper = db.superuser();
        let pid = sleeper.pid();
        thread::scope(|scope| {
            let slept = scope.spawn(move || {
                sleeper.exec(&nap("bell"));
                sleeper
            });
            until_asleep(db, &[pid]);
            let mut owner = db.superuser();
            owner.exec("drop extension nightowls; create extension nightowls; select nightowls._wake('bell')");
            let mut sleeper = slept.join().expect("it is woken");
            sleeper.exec("select nightowls._wake_count('bell')");
        });
    });
}

#[test]
fn a_parallel_worker_wakes_nobody() {
    on_each_that_wakes(|db| {
        let setting = if db.cluster().major() >= 16 {
            "debug_parallel_query"
        } else {
            "force_parallel_mode"
        };
        let mut session = db.superuser();
        session.exec(&format!(
            "create function public.wakes() returns boolean language plpgsql parallel safe as $$ \
             begin return nightowls._wake('bell'); end $$; set {setting} = on"
        ));
        assert_eq!(session.refused("select public.wakes()").code, "25000");
    });
}

#[test]
fn strangers_neither_wake_nor_sleep() {
    on_each_server(|db| {
        let mut stranger = db.session(STRANGER);
        for call in ["select nightowls._wake('bell')", &nap("bell")] {
            assert_eq!(stranger.refused(call).code, "42501");
        }
    });
}

#[test]
fn a_fetch_waits_until_what_holds_events_back_lets_go() {
    on_each_that_wakes(|db| {
        let org = default_org(db);
        let apart = org_apart_from(db, &org);
        // A fetch that nobody woke would take as long as the longest nap.
        db.superuser().exec(
            "create function public.fetched(type text) returns text language plpgsql as $$ \
             declare \
               v_start timestamptz := clock_timestamp(); \
               v_found text; \
             begin \
               select string_agg(f.event_type, ' ') into v_found \
                 from nightowls.fetch_events(fetched.type, max_wait => '1 minute', lease => '1 ms') f; \
               if clock_timestamp() - v_start >= interval '20 s' then return 'too late'; end if; \
               return v_found; \
             end; \
             $$",
        );
        let append = |org: &str, event: &str| {
            format!(
                "select nightowls.append_event('cart', gen_random_uuid()::text, '{event}', org => '{org}')"
            )
        };
        let insert = format!(
            "insert into nightowls.events (org_id, aggregate_type, aggregate_id, event_type) \
             values ('{apart}', 'cart', gen_random_uuid()::text, 'other')"
        );
        // What somebody does before another appends, and how it lets go of what it holds.
        let cases = [
            (String::new(), "select 1".to_owned()),
            (append(&org, "undone"), "rollback".to_owned()),
            (
                format!("savepoint a; {}", append(&org, "undone")),
                "rollback to a".to_owned(),
            ),
            (insert.clone(), "rollback".to_owned()),
            (insert, "commit".to_owned()),
        ];
        let mut owner = db.owner();
        for (number, (first, then)) in cases.iter().enumerate() {
            owner.exec(&format!(
                "select nightowls.create_consumer('case {number}', start => 'end')"
            ));
            let mut sleeper = db.session(SERVICE);
            let pid = sleeper.pid();
            let fetched = thread::scope(|scope| {
                let fetched = scope.spawn(move || {
                    sleeper.value(&format!("select public.fetched('case {number}')"))
                });
                until_asleep(db, &[pid]);
                let mut holder = db.session(SERVICE);
                holder.exec(&format!("begin; {first}"));
                db.session(SERVICE).exec(&append(&org, "placed"));
                until_asleep_or_done(db, pid);
                holder.exec(then);
                let fetched = fetched.join().expect("the fetch ends");
                holder.exec("rollback");
                fetched
            });
            assert_eq!(fetched.as_deref(), Some("placed"), "{first} … {then}");
        }
    });
}

/// Waits until a backend has lain down or has nothing to do any more.
#[track_caller]
fn until_asleep_or_done(db: &Db, pid: i32) {
    let mut watcher = db.superuser();
    wait_until("it sleeps or is done", Duration::from_secs(20), || {
        watcher
            .value(&format!(
                "select 1 from pg_stat_activity where pid = {pid} \
                 and state = 'active' and wait_event_type is distinct from 'Extension'"
            ))
            .is_none()
    });
}

#[test]
fn a_fetch_that_waits_sees_a_consumer_that_is_put_back() {
    on_each_that_wakes(|db| {
        default_org(db);
        let mut owner = db.owner();
        owner.exec("select nightowls.append_event('cart', '1', 'placed')");
        owner.exec("select nightowls.create_consumer('mail', start => 'end')");
        let mut sleeper = db.session(SERVICE);
        let pid = sleeper.pid();
        thread::scope(|scope| {
            let fetched = scope.spawn(move || {
                sleeper.exec("set statement_timeout = '9 s'");
                sleeper.value(
                    "select event_type from nightowls.fetch_events('mail', max_wait => '1 minute')",
                )
            });
            until_asleep(db, &[pid]);
            owner.exec("select nightowls.seek('mail', 0)");
            let fetched = fetched.join().expect("the fetch ends");
            assert_eq!(fetched.as_deref(), Some("placed"));
        });
    });
}
