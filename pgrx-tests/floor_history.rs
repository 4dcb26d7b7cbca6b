//! A history of floors under every misfortune, and a checker that knows nothing
//! of how floors are made: it reads what the clients saw and what the log holds.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::fixture::{Random, default_org};
use crate::support::{
    Db, Install, Refusal, SERVICE, SUPERUSER, Session, kill, own_cluster_with, wait_until,
};

const CLIENTS: usize = 50;
const CONTAINERS: usize = 5;
const ACQUISITIONS: usize = 1000 / CONTAINERS;
const MAX_HOLD_MS: u64 = 1000;
/// A waiter may be silent for so long.
const SILENCE: Duration = Duration::from_secs(5);

/// How often each misfortune may strike in one container: each costs the others a wait.
const HOLDERS_KILLED: usize = 2;
const HOLDERS_PAUSED: usize = 2;
const WAITERS_KILLED: usize = 1;

/// A guarded write, as the client saw it.
struct Write {
    fence: i64,
    event_id: String,
    sent: Instant,
    answered: Instant,
}

/// What the clients of one container have seen.
#[derive(Default)]
struct Seen {
    acknowledged: Vec<Write>,
    /// Event ids of writes that got NW003 and were never acknowledged.
    refused: Vec<String>,
    /// Tickets that a client waited with, and the longest it was silent; one that died is silent for ever.
    tickets: BTreeMap<i64, Duration>,
    granted: BTreeMap<i64, i64>,
}

struct Run<'a> {
    db: &'a Db,
    /// By container.
    acquired: Vec<AtomicUsize>,
    seen: Vec<Mutex<Seen>>,
    /// Misfortunes left, by container: holders killed, holders paused, waiters killed.
    left: Vec<[AtomicUsize; 3]>,
    paused: AtomicUsize,
}

fn strikes(left: &AtomicUsize) -> bool {
    left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
        left.checked_sub(1)
    })
    .is_ok()
}

/// Whether the connection is gone, not the call refused.
fn is_lost(refusal: &Refusal) -> bool {
    refusal.code == "08006" || refusal.code.starts_with("57P")
}

impl Run<'_> {
    fn connect(&self) -> Session {
        loop {
            match Session::connect(self.db.cluster().port(), self.db.name(), SERVICE) {
                Ok(session) => return session,
                // The server is starting again.
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    fn over(&self, place: usize) -> bool {
        self.acquired[place].load(Ordering::SeqCst) >= ACQUISITIONS
    }

    fn client(&self, number: usize) {
        let mut random = Random::new(number as u64 + 1);
        let place = number % CONTAINERS;
        let container = format!("c{place}");
        let mut session = self.connect();
        let mut turn = 0;
        while !self.over(place) {
            turn += 1;
            let holder = format!("h{number}-{turn}");
            let Some(fence) = self.wait(&mut session, &mut random, place, &holder, number % 2 == 1)
            else {
                // Its process was killed: what comes next is another.
                session = self.connect();
                continue;
            };
            self.acquired[place].fetch_add(1, Ordering::SeqCst);
            let mut ids = (0..).map(|write| format!("{holder}/{write}"));
            let mut write = |session: &mut Session| {
                let id = ids.next().expect("no end");
                self.write(session, place, fence, &id)
            };
            write(&mut session);
            let fate = random.below(100);
            if fate < 6 && strikes(&self.left[place][0]) {
                // Killed while holding: no release, no more beats.
                session = self.connect();
                continue;
            }
            if fate < 12 && strikes(&self.left[place][1]) {
                self.pause(
                    &mut session,
                    place,
                    fence,
                    fate.is_multiple_of(2),
                    &mut write,
                );
                continue;
            }
            if random.chance(50) {
                let _ = session.try_exec(&format!(
                    "select nightowls.heartbeat_floor('{container}', '{holder}', {fence})"
                ));
                write(&mut session);
            }
            let release =
                format!("select nightowls.release_floor('{container}', '{holder}', {fence})");
            let _ = session.try_exec(&release);
            if random.chance(10) {
                // The reply was lost, so once more.
                let _ = self.connect().try_exec(&release);
            }
        }
    }

    /// Waits for a turn; `None`: killed while waiting.
    fn wait(
        &self,
        session: &mut Session,
        random: &mut Random,
        place: usize,
        holder: &str,
        by_await: bool,
    ) -> Option<i64> {
        let request = format!(
            "select * from nightowls.request_floor('c{place}', '{holder}', max_hold_ms => {MAX_HOLD_MS}, \
                                                   poll_ms => 50, request_id => '{holder}')"
        );
        let mut last = Instant::now();
        let mut sql = request.clone();
        loop {
            let sent = Instant::now();
            let rows = match session.try_rows(&sql) {
                Ok(rows) => rows,
                Err(refusal) if is_lost(&refusal) => {
                    *session = self.connect();
                    sql.clone_from(&request);
                    continue;
                }
                // It was granted in an answer that was lost, and the time is over.
                Err(refusal) if refusal.code == "NW003" => return None,
                Err(refusal) => panic!("{refusal}"),
            };
            if random.chance(2) {
                // The answer is lost.
                *session = self.connect();
                sql.clone_from(&request);
                continue;
            }
            let number = |column: usize| -> Option<i64> {
                rows[0][column]
                    .as_ref()
                    .map(|text| text.parse().expect("a number"))
            };
            let ticket = number(1).expect("a ticket");
            let mut seen = self.seen[place].lock().expect("no client panics");
            if let Some(fence) = number(3) {
                seen.granted.insert(ticket, fence);
                return Some(fence);
            }
            let silent = seen.tickets.entry(ticket).or_default();
            *silent = (*silent).max(last.elapsed());
            if random.below(300) == 0 && strikes(&self.left[place][2]) {
                *silent = Duration::MAX;
                return None;
            }
            drop(seen);
            if self.over(place) {
                return None;
            }
            if sql == request {
                last = sent;
                if by_await {
                    sql = format!(
                        "select * from nightowls.await_floor('c{place}', '{holder}', {ticket}, 500)"
                    );
                    continue;
                }
                let pause = number(4).expect("when to ask again");
                std::thread::sleep(Duration::from_millis(
                    u64::try_from(pause).expect("not negative"),
                ));
            } else {
                sql.clone_from(&request);
            }
        }
    }

    /// A guarded write, repeated until its fate is known. Whether it stands.
    fn write(&self, session: &mut Session, place: usize, fence: i64, id: &str) -> bool {
        let event_id = format!("nightowls.event_id_for('history', '{id}')");
        let sql = format!(
            "select nightowls.append_event('work', 'c{place}', 'written', '{{\"fence\": {fence}, \"id\": \"{id}\"}}', \
                                           event_id => {event_id}, container => 'c{place}', fence => {fence})"
        );
        let mut in_doubt = false;
        loop {
            let sent = Instant::now();
            match session.try_exec(&sql) {
                Ok(()) => {
                    let write = Write {
                        fence,
                        event_id: id.to_owned(),
                        sent,
                        answered: Instant::now(),
                    };
                    let mut seen = self.seen[place].lock().expect("no client panics");
                    seen.acknowledged.push(write);
                    return true;
                }
                Err(refusal) if is_lost(&refusal) => {
                    in_doubt = true;
                    *session = self.connect();
                }
                Err(refusal) => {
                    assert_eq!(refusal.code, "NW003", "{refusal}");
                    if !in_doubt {
                        let mut seen = self.seen[place].lock().expect("no client panics");
                        seen.refused.push(id.to_owned());
                    }
                    return false;
                }
            }
        }
    }

    /// The holder's backend is stopped until its time is over, in a transaction or between two.
    fn pause(
        &self,
        session: &mut Session,
        place: usize,
        fence: i64,
        in_transaction: bool,
        write: &mut impl FnMut(&mut Session) -> bool,
    ) {
        let begin = if in_transaction {
            format!("begin; select nightowls.assert_floor('c{place}', {fence})")
        } else {
            "select 1".to_owned()
        };
        // The server may have crashed, and the time may be over.
        if session.try_exec(&begin).is_err() {
            return;
        }
        let Ok(Some(pid)) = session.try_value("select pg_backend_pid()") else {
            return;
        };
        kill("-STOP", &pid);
        std::thread::sleep(Duration::from_millis(MAX_HOLD_MS + 100));
        kill("-CONT", &pid);
        if write(session) {
            panic!("fence {fence} of c{place} wrote after its time was over");
        }
        let _ = session.try_exec("rollback");
        self.paused.fetch_add(1, Ordering::SeqCst);
    }
}

/// What the log says of one container, in its order.
enum Logged {
    Granted { ticket: i64, fence: i64 },
    Reclaimed { fence: i64, silent_ms: i64 },
    Skipped { ticket: i64 },
    Written { fence: i64, id: String },
}

fn log_of(db: &Db, place: usize) -> Vec<Logged> {
    db.direct(SUPERUSER)
        .rows(&format!(
            "select event_type, payload ->> 'ticket', payload ->> 'fence', payload ->> 'silent_ms', payload ->> 'id' \
               from nightowls.events where aggregate_id = 'c{place}' order by position"
        ))
        .into_iter()
        .map(|row| {
            let number = |column: usize| -> i64 {
                row[column]
                    .as_ref()
                    .and_then(|text| text.parse().ok())
                    .expect("a number")
            };
            match row[0].as_deref() {
                Some("floor_granted") => Logged::Granted {
                    ticket: number(1),
                    fence: number(2),
                },
                Some("floor_reclaimed") => Logged::Reclaimed {
                    fence: number(2),
                    silent_ms: number(3),
                },
                Some("floor_skipped") => Logged::Skipped { ticket: number(1) },
                Some("written") => Logged::Written {
                    fence: number(2),
                    id: row[4].clone().expect("an id"),
                },
                other => panic!("no such event: {other:?}"),
            }
        })
        .collect()
}

/// Whether what was seen and what is logged can both be true of a floor.
fn check(seen: &Seen, log: &[Logged]) -> Result<(), String> {
    let (mut holder, mut last_ticket) = (0, 0);
    let mut skipped = BTreeSet::new();
    let mut granted = BTreeMap::new();
    let mut written = BTreeSet::new();
    for event in log {
        match event {
            Logged::Granted { ticket, fence } => {
                if *fence <= holder {
                    return Err(format!("fence {fence} was granted after {holder}"));
                }
                if *ticket <= last_ticket {
                    return Err(format!("ticket {ticket} was granted after {last_ticket}"));
                }
                (holder, last_ticket) = (*fence, *ticket);
                granted.insert(*ticket, *fence);
            }
            Logged::Reclaimed { fence, silent_ms } => {
                if *fence != holder || *silent_ms < MAX_HOLD_MS as i64 {
                    return Err(format!(
                        "fence {fence} was reclaimed from {holder} after {silent_ms} ms"
                    ));
                }
            }
            Logged::Skipped { ticket } => {
                skipped.insert(*ticket);
            }
            Logged::Written { fence, id } => {
                if *fence != holder {
                    return Err(format!("fence {fence} wrote while {holder} held the floor"));
                }
                if !written.insert(id.clone()) {
                    return Err(format!("{id} was written twice"));
                }
            }
        }
    }
    for (ticket, fence) in &seen.granted {
        if granted.get(ticket) != Some(fence) {
            return Err(format!("the grant of ticket {ticket} is not in the log"));
        }
    }
    for (ticket, silent) in &seen.tickets {
        let was_skipped = skipped.contains(ticket);
        if was_skipped && granted.contains_key(ticket) {
            return Err(format!("ticket {ticket} was skipped and granted"));
        } else if was_skipped && *silent < SILENCE {
            return Err(format!("ticket {ticket} was skipped after {silent:?}"));
        } else if !was_skipped && !granted.contains_key(ticket) && *ticket < last_ticket {
            return Err(format!("ticket {ticket} was passed over without a word"));
        }
    }
    if let Some(lost) = seen
        .acknowledged
        .iter()
        .find(|write| !written.contains(&write.event_id))
    {
        return Err(format!("{} was acknowledged and is lost", lost.event_id));
    }
    if let Some(id) = seen.refused.iter().find(|id| written.contains(*id)) {
        return Err(format!("{id} was refused and is there"));
    }
    // By the clients' clock: once a later holder has written, no earlier one succeeds any more.
    let mut writes: Vec<&Write> = seen.acknowledged.iter().collect();
    writes.sort_by_key(|write| write.fence);
    let mut earliest_later = None;
    for write in writes.iter().rev() {
        if let Some((fence, answered)) = earliest_later
            && fence > write.fence
            && write.sent > answered
        {
            return Err(format!(
                "fence {} wrote after fence {fence} had written",
                write.fence
            ));
        }
        if earliest_later.is_none_or(|(_, answered)| write.answered < answered) {
            earliest_later = Some((write.fence, write.answered));
        }
    }
    Ok(())
}

#[test]
fn fifty_clients_of_five_floors_under_every_misfortune_leave_a_good_history() {
    own_cluster_with(&[("shared_preload_libraries", "nightowls")], |cluster| {
        for install in Install::ALL {
            let db = cluster.database(install);
            default_org(&db);
            let start = Instant::now();
            let run = Run {
                db: &db,
                acquired: (0..CONTAINERS).map(|_| AtomicUsize::new(0)).collect(),
                seen: (0..CONTAINERS).map(|_| Mutex::default()).collect(),
                left: (0..CONTAINERS)
                    .map(|_| [HOLDERS_KILLED, HOLDERS_PAUSED, WAITERS_KILLED].map(AtomicUsize::new))
                    .collect(),
                paused: AtomicUsize::new(0),
            };
            std::thread::scope(|scope| {
                let clients: Vec<_> = (0..CLIENTS)
                    .map(|number| {
                        scope.spawn({
                            let run = &run;
                            move || run.client(number)
                        })
                    })
                    .collect();
                wait_until("a third of it", Duration::from_secs(300), || {
                    run.acquired
                        .iter()
                        .map(|count| count.load(Ordering::SeqCst))
                        .sum::<usize>()
                        >= ACQUISITIONS * CONTAINERS / 3
                        || clients.iter().any(|client| client.is_finished())
                });
                cluster.kill9_postmaster_and_restart();
            });
            let paused = run.paused.load(Ordering::SeqCst);
            assert!(paused > 0, "nobody was paused");
            for (place, seen) in run.seen.iter().enumerate() {
                let seen = seen.lock().expect("no client panics");
                let log = log_of(&db, place);
                if let Err(fault) = check(&seen, &log) {
                    panic!("{install}, c{place}: {fault}");
                }
                let (grants, writes) = (seen.granted.len(), seen.acknowledged.len());
                assert!(
                    grants >= ACQUISITIONS && writes > ACQUISITIONS / 2,
                    "{install}, c{place}: {grants} grants, {writes} writes"
                );
            }
            let count = |what: &str| {
                db.direct(SUPERUSER)
                    .value(&format!(
                        "select count(*) from nightowls.events where event_type = '{what}'"
                    ))
                    .expect("a count is never null")
            };
            eprintln!(
                "{install}: {} grants, {} reclaims, {} skips, {} writes, {paused} paused, in {:?}",
                count("floor_granted"),
                count("floor_reclaimed"),
                count("floor_skipped"),
                count("written"),
                start.elapsed()
            );
        }
    });
}

#[test]
fn the_checker_finds_what_is_wrong() {
    let granted = |ticket, fence| Logged::Granted { ticket, fence };
    let written = |fence, id: &str| Logged::Written {
        fence,
        id: id.to_owned(),
    };
    let good = || {
        vec![
            granted(1, 10),
            written(10, "a"),
            Logged::Skipped { ticket: 2 },
            granted(3, 20),
            written(20, "b"),
            Logged::Reclaimed {
                fence: 20,
                silent_ms: 1000,
            },
            granted(4, 30),
        ]
    };
    let start = Instant::now();
    let at = |ms| start + Duration::from_millis(ms);
    let write = |fence, id: &str, sent, answered| Write {
        fence,
        event_id: id.to_owned(),
        sent: at(sent),
        answered: at(answered),
    };
    let seen = || Seen {
        acknowledged: vec![write(10, "a", 0, 5), write(20, "b", 3, 9)],
        refused: vec!["c".to_owned()],
        tickets: [(2, SILENCE), (3, Duration::ZERO)].into(),
        granted: [(1, 10), (3, 20)].into(),
    };
    assert_eq!(check(&seen(), &good()), Ok(()));

    let faults: Vec<(&str, Seen, Vec<Logged>)> = vec![
        ("late write", seen(), {
            let mut log = good();
            log.push(written(20, "d"));
            log
        }),
        ("fence again", seen(), {
            let mut log = good();
            log.push(granted(5, 30));
            log
        }),
        ("earlier ticket", seen(), {
            let mut log = good();
            log.push(granted(2, 40));
            log
        }),
        ("reclaimed too early", seen(), {
            let mut log = good();
            log.push(Logged::Reclaimed {
                fence: 30,
                silent_ms: 999,
            });
            log
        }),
        ("twice", seen(), {
            let mut log = good();
            log.insert(2, written(10, "a"));
            log
        }),
        (
            "skipped while alive",
            Seen {
                tickets: [(2, Duration::from_secs(1))].into(),
                ..seen()
            },
            good(),
        ),
        (
            "passed over",
            seen(),
            good()
                .into_iter()
                .filter(|event| !matches!(event, Logged::Skipped { .. }))
                .collect(),
        ),
        (
            "lost",
            Seen {
                acknowledged: vec![write(10, "x", 0, 5)],
                ..seen()
            },
            good(),
        ),
        (
            "refused and there",
            Seen {
                refused: vec!["a".to_owned()],
                ..seen()
            },
            good(),
        ),
        (
            "two at once",
            Seen {
                acknowledged: vec![write(10, "a", 10, 11), write(20, "b", 3, 9)],
                ..seen()
            },
            good(),
        ),
        (
            "a grant that never was",
            Seen {
                granted: [(1, 11)].into(),
                ..seen()
            },
            good(),
        ),
    ];
    for (what, seen, log) in faults {
        assert!(check(&seen, &log).is_err(), "{what} was not found");
    }
}
