//! A history of floors under every misfortune, and a checker that knows nothing
//! of how floors are made: it reads what the clients saw and what the log holds.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
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

/// So many of the clients are processes of their own, the others threads of this one.
const PROCESSES: usize = 10;

/// How often each misfortune may strike in one container, threads and processes: each costs the others a wait, a dead
/// waiter the longest, so it is a process in some containers and a thread in the others.
fn misfortunes(place: usize) -> [[usize; 3]; 2] {
    if place < 3 {
        [[1, 1, 0], [1, 1, 1]]
    } else {
        [[1, 1, 1], [1, 1, 0]]
    }
}

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
    /// Tickets that a client gave up, and those of which it was told that it had.
    leaving: BTreeSet<i64>,
    left: BTreeSet<i64>,
    granted: BTreeMap<i64, i64>,
}

struct Run<'a> {
    db: &'a Db,
    /// By container.
    acquired: Vec<AtomicUsize>,
    seen: Vec<Mutex<Seen>>,
    /// Misfortunes left, by container, of threads and of processes: holders killed, holders paused, waiters killed.
    left: Vec<[[AtomicUsize; 3]; 2]>,
    /// How many backends and processes were paused.
    paused: [AtomicUsize; 2],
    /// How many processes were killed.
    killed: AtomicUsize,
}

/// A client's connection: this process's own, or that of a psql that can be killed and stopped.
enum Client {
    Own(Box<Session>),
    Process(Process),
}

impl Client {
    fn try_rows(&mut self, sql: &str) -> Result<Vec<Vec<Option<String>>>, Refusal> {
        match self {
            Client::Own(session) => session.try_rows(sql),
            Client::Process(process) => {
                process.send(sql)?;
                process.receive()
            }
        }
    }

    fn try_exec(&mut self, sql: &str) -> Result<(), Refusal> {
        self.try_rows(sql).map(drop)
    }

    fn try_value(&mut self, sql: &str) -> Result<Option<String>, Refusal> {
        let rows = self.try_rows(sql)?;
        Ok(rows
            .into_iter()
            .next()
            .and_then(|row| row.into_iter().next().flatten()))
    }
}

/// A psql that is told what to do.
struct Process {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

const END: &str = "--- that was all ---";
const NULL: &str = "--- null ---";

fn lost(why: &str) -> Refusal {
    Refusal {
        code: "08006".to_owned(),
        message: why.to_owned(),
        detail: String::new(),
        hint: String::new(),
        context: String::new(),
    }
}

impl Process {
    fn start(db: &Db) -> Result<Self, Refusal> {
        let psql = db.command("psql", SERVICE);
        // Its complaints come between its answers, where they belong.
        let mut command = db.command("/bin/sh", SERVICE);
        command
            .args(["-c", "exec \"$0\" \"$@\" 2>&1"])
            .arg(psql.get_program())
            .args(["-XqAt", "-F", "\u{1f}", "-v", "VERBOSITY=sqlstate", "-P"])
            .arg(format!("null={NULL}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = command.spawn().expect("psql starts");
        let input = child.stdin.take().expect("it is piped");
        let output = BufReader::new(child.stdout.take().expect("it is piped"));
        let mut process = Process {
            child,
            input,
            output,
        };
        process.send("select 1")?;
        process.receive()?;
        Ok(process)
    }

    fn send(&mut self, sql: &str) -> Result<(), Refusal> {
        writeln!(self.input, "{sql};\n\\echo {END}")
            .and_then(|()| self.input.flush())
            .map_err(|error| lost(&error.to_string()))
    }

    fn receive(&mut self) -> Result<Vec<Vec<Option<String>>>, Refusal> {
        let mut rows = Vec::new();
        let mut refusal = None;
        let mut line = String::new();
        loop {
            line.clear();
            match self.output.read_line(&mut line) {
                Ok(0) | Err(_) => return Err(lost("psql has ended")),
                Ok(_) => {}
            }
            let text = line.trim_end_matches('\n');
            if text == END {
                return refusal.map_or(Ok(rows), Err);
            }
            let of_an_error = ["ERROR:  ", "FATAL:  ", "PANIC:  "]
                .iter()
                .find_map(|severity| text.split_once(severity));
            if let Some((_, code)) = of_an_error {
                refusal = Some(Refusal {
                    code: code.to_owned(),
                    ..lost(text)
                });
            } else if text.contains("server closed the connection")
                || text.contains("connection to server")
            {
                return Err(lost(text));
            } else if !text.is_empty() && refusal.is_none() {
                rows.push(
                    text.split('\u{1f}')
                        .map(|value| (value != NULL).then(|| value.to_owned()))
                        .collect(),
                );
            }
        }
    }

    fn signal(&self, signal: &str) {
        kill(signal, &self.child.id().to_string());
    }

    /// Killed, whatever it was doing.
    fn kill(mut self) {
        self.child.kill().expect("it is there to be killed");
        self.child.wait().expect("it was killed");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
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

fn is_process(number: usize) -> bool {
    number >= CLIENTS - PROCESSES
}

impl Run<'_> {
    fn connect(&self, number: usize) -> Client {
        loop {
            let client = if is_process(number) {
                Process::start(self.db).map(Client::Process)
            } else {
                Session::connect(self.db.cluster().port(), self.db.name(), SERVICE)
                    .map(|session| Client::Own(Box::new(session)))
            };
            match client {
                Ok(client) => return client,
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
        let left = &self.left[place][usize::from(is_process(number))];
        let mut session = self.connect(number);
        let mut turn = 0;
        while !self.over(place) {
            turn += 1;
            let holder = format!("h{number}-{turn}");
            let Some(fence) = self.wait(&mut session, &mut random, number, &holder) else {
                continue;
            };
            self.acquired[place].fetch_add(1, Ordering::SeqCst);
            let mut ids = (0..).map(|write| format!("{holder}/{write}"));
            let mut write = |session: &mut Client| {
                let id = ids.next().expect("no end");
                self.write(session, number, fence, &id)
            };
            write(&mut session);
            let fate = random.below(100);
            let often = if is_process(number) { 25 } else { 6 };
            if fate < often && strikes(&left[0]) {
                // Killed while holding, a process in the middle of a write: no release, no more beats.
                self.replace(
                    &mut session,
                    number,
                    &guarded_write(place, fence, &format!("{holder}/last")),
                );
                continue;
            }
            if fate < 2 * often && strikes(&left[1]) {
                self.pause(
                    &mut session,
                    number,
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
                let _ = self.connect(number).try_exec(&release);
            }
        }
    }

    /// The client is gone, a process in the middle of a statement; what comes next is another.
    fn replace(&self, session: &mut Client, number: usize, sql: &str) {
        let next = self.connect(number);
        if let Client::Process(mut process) = std::mem::replace(session, next) {
            let _ = process.send(sql);
            process.kill();
            self.killed.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Waits for a turn; `None`: killed while waiting, or it has left.
    fn wait(
        &self,
        session: &mut Client,
        random: &mut Random,
        number: usize,
        holder: &str,
    ) -> Option<i64> {
        let place = number % CONTAINERS;
        let by_await = number % 2 == 1 || is_process(number);
        let deadly = &self.left[place][usize::from(is_process(number))][2];
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
                    *session = self.connect(number);
                    sql.clone_from(&request);
                    continue;
                }
                // It was granted in an answer that was lost, and the time is over.
                Err(refusal) if refusal.code == "NW003" => return None,
                Err(refusal) => panic!("{refusal}"),
            };
            if random.chance(2) {
                // The answer is lost.
                *session = self.connect(number);
                sql.clone_from(&request);
                continue;
            }
            let figure = |column: usize| -> Option<i64> {
                rows[0][column]
                    .as_ref()
                    .map(|text| text.parse().expect("a number"))
            };
            let ticket = figure(1).expect("a ticket");
            let mut seen = self.seen[place].lock().expect("no client panics");
            if let Some(fence) = figure(3) {
                seen.granted.insert(ticket, fence);
                return Some(fence);
            }
            let silent = seen.tickets.entry(ticket).or_default();
            *silent = (*silent).max(last.elapsed());
            let chances = if is_process(number) { 20 } else { 300 };
            if random.below(chances) == 0 && strikes(deadly) {
                *silent = Duration::MAX;
                drop(seen);
                // Its backend may be granted the floor before it hears of that.
                self.replace(
                    session,
                    number,
                    &format!(
                        "select * from nightowls.await_floor('c{place}', '{holder}', {ticket}, 500)"
                    ),
                );
                return None;
            }
            if random.below(100) == 0 {
                seen.leaving.insert(ticket);
                drop(seen);
                let leave =
                    format!("select nightowls.leave_floor('c{place}', '{holder}', {ticket})");
                let left = session.try_value(&leave);
                let mut seen = self.seen[place].lock().expect("no client panics");
                match left {
                    Ok(left) if left.as_deref() == Some("t") => {
                        seen.left.insert(ticket);
                    }
                    // It was skipped.
                    Ok(_) => {}
                    // Whether it left it will not ask.
                    Err(_) => {
                        seen.tickets.insert(ticket, Duration::MAX);
                        drop(seen);
                        *session = self.connect(number);
                    }
                }
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
                let pause = figure(4).expect("when to ask again");
                std::thread::sleep(Duration::from_millis(
                    u64::try_from(pause).expect("not negative"),
                ));
            } else {
                sql.clone_from(&request);
            }
        }
    }

    /// A guarded write, repeated until its fate is known. Whether it stands.
    fn write(&self, session: &mut Client, number: usize, fence: i64, id: &str) -> bool {
        let place = number % CONTAINERS;
        let sql = guarded_write(place, fence, id);
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
                    *session = self.connect(number);
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

    /// The holder's backend is stopped until its time is over, or the process that is its client, in a transaction or between two.
    fn pause(
        &self,
        session: &mut Client,
        number: usize,
        fence: i64,
        in_transaction: bool,
        write: &mut impl FnMut(&mut Client) -> bool,
    ) {
        let place = number % CONTAINERS;
        let begin = if in_transaction {
            format!("begin; select nightowls.assert_floor('c{place}', {fence})")
        } else {
            "select 1".to_owned()
        };
        // The server may have crashed, and the time may be over.
        if session.try_exec(&begin).is_err() {
            let _ = session.try_exec("rollback");
            return;
        }
        let beyond = Duration::from_millis(MAX_HOLD_MS + 100);
        if let Client::Process(process) = session {
            process.signal("-STOP");
            let _ = process.send(&guarded_write(place, fence, &format!("{fence}/late")));
            std::thread::sleep(beyond);
            process.signal("-CONT");
            match process.receive() {
                Ok(_) => panic!("fence {fence} of c{place} wrote after its time was over"),
                Err(refusal) => assert!(is_lost(&refusal) || refusal.code == "NW003", "{refusal}"),
            }
            let _ = session.try_exec("rollback");
            self.paused[1].fetch_add(1, Ordering::SeqCst);
        } else {
            let Ok(Some(pid)) = session.try_value("select pg_backend_pid()") else {
                return;
            };
            kill("-STOP", &pid);
            std::thread::sleep(beyond);
            kill("-CONT", &pid);
            if write(session) {
                panic!("fence {fence} of c{place} wrote after its time was over");
            }
            let _ = session.try_exec("rollback");
            self.paused[0].fetch_add(1, Ordering::SeqCst);
        }
    }
}

fn guarded_write(place: usize, fence: i64, id: &str) -> String {
    format!(
        "select nightowls.append_event('work', 'c{place}', 'written', '{{\"fence\": {fence}, \"id\": \"{id}\"}}', \
                                       event_id => nightowls.event_id_for('history', '{id}'), container => 'c{place}', fence => {fence})"
    )
}

/// What the log says of one container, in its order.
enum Logged {
    Granted { ticket: i64, fence: i64 },
    Reclaimed { fence: i64, silent_ms: i64 },
    Skipped { ticket: i64 },
    Left { ticket: i64 },
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
                Some("floor_left") => Logged::Left { ticket: number(1) },
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
    let mut left = BTreeSet::new();
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
            Logged::Left { ticket } => {
                if !seen.leaving.contains(ticket) || !left.insert(*ticket) {
                    return Err(format!("ticket {ticket} left and did not mean to"));
                }
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
        } else if left.contains(ticket) && (was_skipped || granted.contains_key(ticket)) {
            return Err(format!("ticket {ticket} left and was skipped or granted"));
        } else if seen.left.contains(ticket)
            && !left.contains(ticket)
            && !granted.contains_key(ticket)
        {
            return Err(format!("ticket {ticket} was told that it left"));
        } else if was_skipped && *silent < SILENCE {
            return Err(format!("ticket {ticket} was skipped after {silent:?}"));
        } else if !was_skipped
            && !left.contains(ticket)
            && !granted.contains_key(ticket)
            && *ticket < last_ticket
        {
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
                    .map(|place| misfortunes(place).map(|left| left.map(AtomicUsize::new)))
                    .collect(),
                paused: Default::default(),
                killed: AtomicUsize::new(0),
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
            let paused = run
                .paused
                .each_ref()
                .map(|count| count.load(Ordering::SeqCst));
            let killed = run.killed.load(Ordering::SeqCst);
            assert!(
                paused.iter().all(|count| *count > 0) && killed > 3,
                "{paused:?} backends and processes were paused, {killed} processes killed"
            );
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
                "{install}: {} grants, {} reclaims, {} skips, {} leaves, {} writes, {paused:?} backends and processes paused, \
                 {killed} processes killed, in {:?}",
                count("floor_granted"),
                count("floor_reclaimed"),
                count("floor_skipped"),
                count("floor_left"),
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
            Logged::Left { ticket: 5 },
            granted(6, 40),
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
        tickets: [(2, SILENCE), (3, Duration::ZERO), (5, Duration::ZERO)].into(),
        leaving: [5].into(),
        left: [5].into(),
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
            log.push(granted(7, 40));
            log
        }),
        ("earlier ticket", seen(), {
            let mut log = good();
            log.push(granted(2, 50));
            log
        }),
        ("reclaimed too early", seen(), {
            let mut log = good();
            log.push(Logged::Reclaimed {
                fence: 40,
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
        ("left and granted", seen(), {
            let mut log = good();
            log.insert(7, granted(5, 35));
            log
        }),
        (
            "left against its will",
            Seen {
                leaving: BTreeSet::new(),
                left: BTreeSet::new(),
                ..seen()
            },
            good(),
        ),
        (
            "told that it left",
            seen(),
            good()
                .into_iter()
                .filter(|event| !matches!(event, Logged::Left { .. }))
                .collect(),
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
