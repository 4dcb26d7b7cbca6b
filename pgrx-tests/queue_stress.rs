//! Nothing lost and nothing twice, whatever is killed: senders, workers, and the server.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::fixture::{Random, default_org, lines};
use crate::projections::text;
use crate::support::{Db, Install, Refusal, SERVICE, Session, full, own_cluster};

/// How many messages: all of them with NIGHTOWLS_FULL set.
fn messages() -> u64 {
    if full() { 200_000 } else { 1_600 }
}

/// The end of a log.
fn tail(log: &str) -> String {
    let lines: Vec<_> = log.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

/// A connection that is made anew when it was lost.
struct Client<'a> {
    db: &'a Db,
    name: &'static str,
    session: Option<Session>,
}

impl Client<'_> {
    fn session(&mut self) -> &mut Session {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.session.is_none() {
            // The server may be down just now.
            match Session::connect(self.db.cluster().port(), self.db.name(), SERVICE) {
                Ok(mut open) => {
                    let named = open.try_exec(&format!("set application_name = '{}'", self.name));
                    if named.is_ok() {
                        self.session = Some(open);
                    }
                }
                Err(refusal) => {
                    assert!(
                        Instant::now() < deadline,
                        "{}: no server: {refusal}\n{}",
                        self.name,
                        tail(&self.db.cluster().log())
                    );
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        }
        self.session.as_mut().expect("just made")
    }

    /// What was asked, or nothing when the connection was lost meanwhile.
    fn try_rows(&mut self, sql: &str) -> Option<Vec<Vec<Option<String>>>> {
        match self.session().try_rows(sql) {
            Ok(rows) => Some(rows),
            Err(refusal) => {
                self.lost(&refusal, sql);
                None
            }
        }
    }

    fn try_exec(&mut self, sql: &str) -> bool {
        match self.session().try_exec(sql) {
            Ok(()) => true,
            Err(refusal) => {
                self.lost(&refusal, sql);
                false
            }
        }
    }

    fn lost(&mut self, refusal: &Refusal, sql: &str) {
        match refusal.code.as_str() {
            "08006" | "57P01" | "57P02" | "57P03" => self.session = None,
            _ => panic!("{}: {refusal}\n{sql}", self.name),
        }
    }

    /// As a client that dies: the connection goes without a word.
    fn die(&mut self) {
        self.session = None;
    }
}

/// Sends in every way there is, with its own record of what it has sent in the same transaction.
fn produce(db: &Db, number: u64, count: u64, sent: &AtomicU64) {
    let mut random = Random::new(number + 11);
    let mut client = Client {
        db,
        name: "producer",
        session: None,
    };
    let mut next = 0;
    while next < count {
        let size = (1 + random.below(20)).min(count - next);
        let first = number * 1_000_000_000 + next;
        let bodies = format!("generate_series({first}, {})", first + size - 1);
        let send = match random.below(5) {
            0 => format!("select nightowls.send('jobs', to_jsonb(b)) from {bodies} b"),
            1 => format!(
                "select nightowls.send('jobs', to_jsonb(b), group_key => 'g{}') from {bodies} b",
                random.below(40)
            ),
            2 => format!(
                "select nightowls.send('jobs', to_jsonb(b), dedup_key => b::text) from {bodies} b"
            ),
            3 => format!(
                "select nightowls.send('jobs', to_jsonb(b), priority => {}) from {bodies} b",
                random.below(3)
            ),
            _ => format!(
                "select nightowls.send_batch('jobs', array(select to_jsonb(b) from {bodies} b))"
            ),
        };
        let end = if random.chance(10) {
            "rollback"
        } else {
            "commit"
        };
        let said = client.try_exec(&format!(
            "begin; insert into public.sent select b from {bodies} b; {send}; {}; {end}",
            if random.chance(3) {
                "select pg_sleep(random() * 0.03)"
            } else {
                "select"
            },
        ));
        // Killed, it does not know whether that was committed: `sent` does, and these bodies are not sent again.
        if !said || end == "commit" {
            next += size;
            sent.fetch_add(size, Ordering::Relaxed);
        }
        if random.chance(1) {
            client.die();
        }
    }
}

/// Works on what it reads, in every way there is, and is killed, dies, stalls, fails and forgets.
fn work(db: &Db, number: u64, done: &AtomicBool) {
    let mut random = Random::new(number + 101);
    let mut client = Client {
        db,
        name: "worker",
        session: None,
    };
    while !done.load(Ordering::Relaxed) {
        if random.chance(20) {
            // In one call: claim, handler, ack.
            let _ = client.try_rows(&format!(
                "select msg_id from nightowls.process('jobs', 'public.work', {})",
                1 + random.below(10)
            ));
            continue;
        }
        let Some(claims) = client.try_rows(&format!(
            "select msg_id, receipt, message from nightowls.read('jobs', 1, {})",
            1 + random.below(20)
        )) else {
            continue;
        };
        if claims.is_empty() {
            std::thread::sleep(Duration::from_millis(5));
        }
        if !claims.is_empty() && random.chance(2) {
            // Past its lease: somebody else has them by now, its acks are refused.
            std::thread::sleep(Duration::from_millis(1300));
        }
        for claim in claims {
            let [id, receipt, body] =
                [0, 1, 2].map(|n| claim[n].clone().expect("no column is null"));
            let ack = format!("nightowls.ack('jobs', {id}, '{receipt}')");
            let effect = format!("insert into public.effects (body, msg_id) select {body}, {id}");
            // Of every second message the effect counts by a key of its own, of the others by the ack that it commits with.
            let keyed = body.ends_with(['0', '2', '4', '6', '8']);
            let alive = match random.below(20) {
                0 => client.try_exec(&format!(
                    "select nightowls.nack('jobs', {id}, '{receipt}', 'failed')"
                )),
                1 => client.try_exec(&format!("begin; {effect} where {ack}; rollback")),
                2 => {
                    client.try_exec(&format!("begin; {effect} where {ack}"));
                    client.die();
                    false
                }
                3 => {
                    client.die();
                    false
                }
                4 => true,
                // The ack may come late or never.
                5..=12 if keyed => {
                    client.try_exec(&format!("{effect} where nightowls.once('work', '{body}')"))
                        && (random.chance(10) || client.try_exec(&format!("select {ack}")))
                }
                _ if keyed => client.try_exec(&format!(
                    "{effect} where case when {ack} then nightowls.once('work', '{body}') end"
                )),
                _ => client.try_exec(&format!("{effect} where {ack}")),
            };
            if !alive {
                break;
            }
        }
    }
}

/// Eight senders, eight workers, and somebody who kills connections, and three times the server.
fn survive(db: &Db) {
    default_org(db);
    db.owner()
        .exec("select nightowls.create_queue('jobs', backoff => '10 milliseconds')");
    db.superuser().exec(
        "create table public.sent (body bigint);
         create table public.effects (n bigint generated always as identity, body bigint, msg_id bigint);
         grant all on public.sent, public.effects to public;
         create function public.work(message nightowls.queue_message) returns void language sql
           begin atomic
             insert into public.effects (body, msg_id)
             select (work.message).message::bigint, (work.message).msg_id
              where nightowls.once('work', (work.message).message::text);
           end;
         grant execute on function public.work(nightowls.queue_message) to public",
    );
    let total = messages();
    let (sent, done) = (AtomicU64::new(0), AtomicBool::new(false));
    let started = Instant::now();
    let mut kills = 0;
    std::thread::scope(|scope| {
        /// The workers end also when this thread panics.
        struct Done<'a>(&'a AtomicBool);
        impl Drop for Done<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        let finish = Done(&done);
        let producers: Vec<_> = (0..8)
            .map(|number| {
                let sent = &sent;
                scope.spawn(move || produce(db, number + 1, total / 8, sent))
            })
            .collect();
        for number in 0..8 {
            let done = &done;
            scope.spawn(move || work(db, number, done));
        }
        let mut crashes = 0;
        let mut random = Random::new(7);
        let deadline = started + Duration::from_secs(if total > 50_000 { 1500 } else { 240 });
        let mut watcher: Option<Session> = None;
        loop {
            assert!(
                Instant::now() < deadline,
                "not done in time; {} sent",
                sent.load(Ordering::Relaxed)
            );
            if crashes < 3 && sent.load(Ordering::Relaxed) >= (crashes + 1) * total / 4 {
                crashes += 1;
                watcher = None;
                db.cluster().kill9_postmaster_and_restart();
            }
            let Some(open) = watcher.as_mut() else {
                watcher = Session::connect(db.cluster().port(), db.name(), "postgres").ok();
                continue;
            };
            // One connection in the middle of something.
            let killed = open.try_value(&format!(
                "select pg_terminate_backend(pid) from pg_stat_activity
                  where datname = current_database() and usename = '{SERVICE}' and state <> 'idle' and application_name in ('producer', 'worker')
                  offset {} limit 1",
                random.below(4)
            ));
            kills += u32::from(matches!(killed, Ok(Some(_))));
            if producers.iter().all(|producer| producer.is_finished())
                && open
                    .try_value("select count(*) from nightowls.queue_messages")
                    .ok()
                    .flatten()
                    .as_deref()
                    == Some("0")
            {
                break;
            }
            std::thread::sleep(Duration::from_millis(if total > 50_000 {
                250
            } else {
                100
            }));
        }
        drop(finish);
        for producer in producers {
            producer.join().expect("a producer ends well");
        }
    });
    let mut session = db.superuser();
    let counts = lines(
        &mut session,
        "select count(*), count(distinct body), (select count(*) from public.sent) from public.effects",
    );
    eprintln!(
        "{}: effects, bodies, sent: {}; {kills} connections killed, {:.0?}",
        db.install(),
        counts[0],
        started.elapsed()
    );
    let wrong = |session: &mut Session, sql: &str| {
        text(session, &format!("select count(*) from ({sql}) x"))
    };
    assert_eq!(
        wrong(
            &mut session,
            "select body from public.sent except select body from public.effects"
        ),
        "0",
        "lost"
    );
    assert_eq!(
        wrong(
            &mut session,
            "select body from public.effects except select body from public.sent"
        ),
        "0",
        "never sent"
    );
    assert_eq!(
        wrong(
            &mut session,
            "select body from public.effects group by 1 having count(*) > 1"
        ),
        "0",
        "twice"
    );
    assert!(kills > 10, "only {kills} were killed");
    assert_eq!(
        text(&mut session, "select count(*) from nightowls.queue_dedup"),
        "0"
    );
}

#[test]
fn every_message_has_its_effect_once_though_workers_senders_and_the_server_are_killed() {
    own_cluster(|cluster| {
        for install in Install::ALL {
            survive(&cluster.database(install));
        }
    });
}
