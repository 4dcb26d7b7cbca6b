//! The client of the benches of waiting: pgbench cannot measure what one session
//! waits for another. `make bench` runs it; each figure is a line `name|value`.
//!
//! ```text
//! waiting <socket folder> <port> <database> <user> flush
//! waiting … handover <waiters> <rounds> <milliseconds that each holds it>
//! waiting … uncontended <clients> <seconds>
//! waiting … receive <nightowls or pgmq> <rounds> <milliseconds between two>
//! waiting … pollers <clients> <milliseconds> <seconds>
//! waiting … waiters <how many> <poll_ms> <seconds>
//! ```

use std::error::Error;
use std::fs;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use postgres::{Client, Config, NoTls};

type Fallible<T> = Result<T, Box<dyn Error + Send + Sync>>;

const REQUEST: &str = "select granted, ticket, fence from nightowls.request_floor($1, $2)";
const AWAIT: &str = "select granted, fence from nightowls.await_floor($1, $2, $3)";
const RELEASE: &str = "select nightowls.release_floor($1, $2, $3)";

/// Where the database is.
struct Place {
    config: Config,
    superuser: Config,
}

impl Place {
    fn connect(&self) -> Fallible<Client> {
        Ok(self.config.connect(NoTls)?)
    }
}

fn main() -> Fallible<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [host, port, database, user, what, rest @ ..] = &arguments[..] else {
        return Err("usage: waiting <socket folder> <port> <database> <user> <what> …".into());
    };
    let mut config = Config::new();
    config
        .host(host)
        .port(port.parse()?)
        .dbname(database)
        .user(user);
    let mut superuser = config.clone();
    superuser.user("postgres");
    let place = Place { config, superuser };
    let numbers: Vec<u64> = rest.iter().filter_map(|text| text.parse().ok()).collect();
    match (what.as_str(), &numbers[..]) {
        ("flush", []) => flush(&place),
        ("handover", [waiters, rounds, hold]) => {
            handover(&place, *waiters as usize, *rounds as usize, *hold)
        }
        ("uncontended", [clients, seconds]) => uncontended(&place, *clients as usize, *seconds),
        ("receive", [rounds, pause]) => receive(&place, &rest[0], *rounds as usize, *pause),
        ("pollers", [clients, pause, seconds]) => {
            pollers(&place, *clients as usize, *pause, *seconds)
        }
        ("waiters", [waiters, poll_ms, seconds]) => {
            waiters_cost(&place, *waiters as usize, *poll_ms as i32, *seconds)
        }
        ("crowd", [each, seconds]) => crowd(&place, *each as usize, *seconds),
        _ => Err(format!("no such measurement: {what} {rest:?}").into()),
    }
}

/// The median and the 99th percentile, in milliseconds.
fn print_quantiles(mut taken: Vec<Duration>) {
    taken.sort_unstable();
    let at = |share: f64| {
        taken[((taken.len() - 1) as f64 * share).round() as usize].as_secs_f64() * 1000.0
    };
    println!("p50|{:.3}", at(0.5));
    println!("p99|{:.3}", at(0.99));
    println!("count|{}", taken.len());
}

/// What waiting for the disk adds to a commit: the smallest write there is, with and without.
fn flush(place: &Place) -> Fallible<()> {
    let mut client = place.superuser.connect(NoTls)?;
    let statement = client.prepare("select pg_logical_emit_message(true, 'bench', 'x')")?;
    let mut medians = [[0.0; 2]; 3];
    for medians in &mut medians {
        for (median, setting) in medians.iter_mut().zip(["on", "off"]) {
            client.batch_execute(&format!("set synchronous_commit = {setting}"))?;
            let mut taken = Vec::new();
            for _ in 0..300 {
                let start = Instant::now();
                client.query(&statement, &[])?;
                taken.push(start.elapsed());
            }
            taken.sort_unstable();
            *median = taken[150].as_secs_f64() * 1000.0;
        }
    }
    let mut flushes = medians.map(|[on, off]| on - off);
    flushes.sort_by(f64::total_cmp);
    println!("flush|{:.3}", flushes[1].max(0.0));
    Ok(())
}

/// From the moment a holder sends its release to the moment the next one's wait returns: with so many in line.
fn handover(place: &Place, waiters: usize, rounds: usize, hold: u64) -> Fallible<()> {
    let released: Mutex<Option<Instant>> = Mutex::new(None);
    let taken = Mutex::new(Vec::new());
    let (done, ready) = (AtomicBool::new(false), Barrier::new(waiters + 1));
    thread::scope(|scope| -> Fallible<()> {
        let clients: Vec<_> = (0..=waiters)
            .map(|number| {
                let (released, taken, done, ready) = (&released, &taken, &done, &ready);
                scope.spawn(move || -> Fallible<()> {
                    let mut client = place.connect()?;
                    let [request, wait, release] = [
                        client.prepare(REQUEST)?,
                        client.prepare(AWAIT)?,
                        client.prepare(RELEASE)?,
                    ];
                    let container = "handover";
                    let holder = format!("h{number}");
                    ready.wait();
                    while !done.load(Ordering::SeqCst) {
                        let row = client.query_one(&request, &[&container, &holder])?;
                        let mut fence: Option<i64> = row.get(2);
                        if fence.is_none() {
                            let ticket: i64 = row.get(1);
                            let row = client.query_one(&wait, &[&container, &holder, &ticket])?;
                            fence = row.get(1);
                            let now = Instant::now();
                            if fence.is_some()
                                && let Some(sent) = released.lock().expect("nobody panics").take()
                            {
                                let mut taken = taken.lock().expect("nobody panics");
                                // The first rounds are for the caches, and for the line to form.
                                taken.push(now - sent);
                                if taken.len() > rounds + waiters {
                                    done.store(true, Ordering::SeqCst);
                                }
                            }
                        }
                        if let Some(fence) = fence {
                            // Meanwhile the one before is back in line, and all of them sleep.
                            thread::sleep(Duration::from_millis(hold));
                            *released.lock().expect("nobody panics") = Some(Instant::now());
                            client.query_one(&release, &[&container, &holder, &fence])?;
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        for client in clients {
            client.join().map_err(|_| "a client panicked")??;
        }
        Ok(())
    })?;
    let taken = taken.into_inner()?;
    print_quantiles(taken[waiters + 1..].to_vec());
    Ok(())
}

/// Acquired and released, by each client a floor of its own.
fn uncontended(place: &Place, clients: usize, seconds: u64) -> Fallible<()> {
    let turns = AtomicUsize::new(0);
    let ready = Barrier::new(clients);
    let length = Duration::from_secs(seconds);
    thread::scope(|scope| -> Fallible<()> {
        let clients: Vec<_> = (0..clients)
            .map(|number| {
                let (turns, ready) = (&turns, &ready);
                scope.spawn(move || -> Fallible<()> {
                    let mut client = place.connect()?;
                    let [request, release] = [client.prepare(REQUEST)?, client.prepare(RELEASE)?];
                    let (container, holder) = (format!("own{number}"), "h");
                    ready.wait();
                    let start = Instant::now();
                    while start.elapsed() < length {
                        let fence: i64 = client.query_one(&request, &[&container, &holder])?.get(2);
                        client.query_one(&release, &[&container, &holder, &fence])?;
                        turns.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(())
                })
            })
            .collect();
        for client in clients {
            client.join().map_err(|_| "a client panicked")??;
        }
        Ok(())
    })?;
    println!("rate|{:.0}", turns.into_inner() as f64 / seconds as f64);
    Ok(())
}

/// From the moment a message is sent to the moment the reader that waits for it has it.
fn receive(place: &Place, whose: &str, rounds: usize, pause: u64) -> Fallible<()> {
    let (make, send, read, settle) = match whose {
        "nightowls" => (
            "select nightowls.create_queue('bench')",
            "select nightowls.send('bench', '{\"n\": 1}')",
            "select msg_id, receipt::text from nightowls.read_with_poll('bench', 30, 1, max_wait => '20 s')",
            "select nightowls.ack('bench', $1, $2::text::uuid)",
        ),
        "pgmq" => (
            "select pgmq.create('bench')",
            "select pgmq.send('bench', '{\"n\": 1}'::jsonb)",
            "select msg_id, null::text from pgmq.read_with_poll('bench', 30, 1, 20)",
            "select pgmq.delete('bench', $1::bigint) or $2::text is null",
        ),
        other => return Err(format!("whose queue is {other}?").into()),
    };
    let mut sender = place.connect()?;
    sender.batch_execute(make)?;
    let send = sender.prepare(send)?;
    let sent: Mutex<Option<Instant>> = Mutex::new(None);
    let taken = Mutex::new(Vec::new());
    let received = AtomicUsize::new(0);
    thread::scope(|scope| -> Fallible<()> {
        let (sent, taken, received) = (&sent, &taken, &received);
        let reader = scope.spawn(move || -> Fallible<()> {
            let mut client = place.connect()?;
            let [read, settle] = [client.prepare(read)?, client.prepare(settle)?];
            for _ in 0..rounds + 5 {
                let rows = client.query(&read, &[])?;
                let now = Instant::now();
                let row = rows.first().ok_or("nothing came")?;
                let (id, receipt): (i64, Option<String>) = (row.get(0), row.get(1));
                let start = sent
                    .lock()
                    .expect("nobody panics")
                    .take()
                    .ok_or("nothing was sent")?;
                taken.lock().expect("nobody panics").push(now - start);
                client.query_one(&settle, &[&id, &receipt])?;
                received.fetch_add(1, Ordering::SeqCst);
            }
            Ok(())
        });
        for round in 0..rounds + 5 {
            // Not in step with anybody's pauses.
            thread::sleep(Duration::from_millis(
                pause + (round as u64 * 37) % pause.max(1),
            ));
            *sent.lock().expect("nobody panics") = Some(Instant::now());
            sender.query_one(&send, &[])?;
            let patience = Instant::now();
            while received.load(Ordering::SeqCst) <= round {
                if reader.is_finished() || patience.elapsed() > Duration::from_secs(30) {
                    break;
                }
                thread::sleep(Duration::from_millis(1));
            }
            if reader.is_finished() && round + 1 < rounds + 5 {
                break;
            }
        }
        reader.join().map_err(|_| "the reader panicked")?
    })?;
    let taken = taken.into_inner()?;
    print_quantiles(taken[5..].to_vec());
    Ok(())
}

/// What so many cost that ask again and again, while one holds the floor and beats.
fn pollers(place: &Place, clients: usize, pause: u64, seconds: u64) -> Fallible<()> {
    let mut watcher = place.superuser.connect(NoTls)?;
    let mut holder = place.connect()?;
    let row = holder.query_one(REQUEST, &[&"polled", &"holder"])?;
    let fence: i64 = row.get(2);
    let asked = AtomicUsize::new(0);
    let beats = AtomicUsize::new(0);
    let counters = "select coalesce(sum(n_tup_upd), 0)::bigint, coalesce(sum(n_tup_hot_upd), 0)::bigint, coalesce(sum(n_dead_tup), 0)::bigint, \
                           sum(pg_relation_size(relid))::bigint \
                      from pg_stat_user_tables where relname in ('floors', 'floor_tickets')";
    let length = Duration::from_secs(seconds);
    let ready = Barrier::new(clients + 2);
    let (asked_of, ready_of) = (&asked, &ready);
    let mut start_lsn = String::new();
    let mut before = None;
    thread::scope(|scope| -> Fallible<()> {
        let threads: Vec<_> = (0..clients)
            .map(|number| {
                scope.spawn(move || -> Fallible<()> {
                    let mut client = place.connect()?;
                    let request = client.prepare(REQUEST)?;
                    let name = format!("p{number}");
                    // The line has formed before anything is counted.
                    client.query_one(&request, &[&"polled", &name])?;
                    ready_of.wait();
                    ready_of.wait();
                    let start = Instant::now();
                    let mut nth = 0;
                    loop {
                        let next = Duration::from_millis(
                            nth * pause + pause * number as u64 / clients as u64,
                        );
                        if next >= length {
                            return Ok(());
                        }
                        thread::sleep(next.saturating_sub(start.elapsed()));
                        client.query_one(&request, &[&"polled", &name])?;
                        asked_of.fetch_add(1, Ordering::Relaxed);
                        nth += 1;
                    }
                })
            })
            .collect();
        let beats = &beats;
        let beater = scope.spawn(move || -> Fallible<()> {
            let beat =
                holder.prepare("select nightowls.heartbeat_floor('polled', 'holder', $1)")?;
            ready_of.wait();
            ready_of.wait();
            let start = Instant::now();
            while start.elapsed() < length {
                holder.query_one(&beat, &[&fence])?;
                beats.fetch_add(1, Ordering::Relaxed);
                thread::sleep(Duration::from_secs(1));
            }
            Ok(())
        });
        ready.wait();
        watcher.batch_execute("vacuum nightowls.floors, nightowls.floor_tickets")?;
        thread::sleep(Duration::from_secs(1));
        let row = watcher.query_one(counters, &[])?;
        before = Some([row.get::<_, i64>(0), row.get(1), row.get(2), row.get(3)]);
        start_lsn = watcher
            .query_one("select pg_current_wal_lsn()::text", &[])?
            .get(0);
        ready.wait();
        for thread in threads {
            thread.join().map_err(|_| "a poller panicked")??;
        }
        beater.join().map_err(|_| "the holder panicked")??;
        Ok(())
    })?;
    let wal: i64 = watcher
        .query_one(
            "select pg_wal_lsn_diff(pg_current_wal_lsn(), $1::text::pg_lsn)::bigint",
            &[&start_lsn],
        )?
        .get(0);
    thread::sleep(Duration::from_secs(2));
    let row = watcher.query_one(counters, &[])?;
    let before = before.ok_or("nothing was counted")?;
    let grown = |column: usize| row.get::<_, i64>(column) - before[column];
    println!("statements|{}", asked.into_inner() + beats.into_inner());
    println!("wal|{wal}");
    println!("updates|{}", grown(0));
    println!("hot|{}", grown(1));
    println!("dead|{}", row.get::<_, i64>(2));
    println!("growth|{}", grown(3));
    Ok(())
}

/// Processor time of the backends of so many who wait for one floor by acquire_floor, in percent of a core.
fn waiters_cost(place: &Place, waiters: usize, poll_ms: i32, seconds: u64) -> Fallible<()> {
    let mut watcher = place.superuser.connect(NoTls)?;
    let mut holder = place.connect()?;
    // A ticket keeps the poll_ms that it was drawn with: each run has a line of its own.
    let container = format!("crowded {poll_ms}");
    holder.query_one(
        "select granted from nightowls.request_floor($1, 'holder', max_hold_ms => 3600000)",
        &[&container],
    )?;
    let statement = |number: usize| {
        format!(
            "call nightowls.acquire_floor('{container}', 'w{number}', poll_ms => {poll_ms}, max_wait_ms => 3600000)"
        )
    };
    let [cpu] = cost(place, &mut watcher, waiters, seconds, statement)?;
    println!("cpu|{cpu:.2}");
    Ok(())
}

/// The same of every way of waiting that a client has, by so many each.
fn crowd(place: &Place, each: usize, seconds: u64) -> Fallible<()> {
    let mut watcher = place.superuser.connect(NoTls)?;
    let mut service = place.connect()?;
    service.batch_execute(&format!(
        r#"select nightowls.create_queue('crowded');
           select nightowls.request_floor('crowd', 'holder', max_hold_ms => 3600000);
           select nightowls.request_floor('crowd', 'w' || i, poll_ms => 60000), nightowls.create_consumer('crowd ' || i, '{{"event_types": ["never"]}}')
             from generate_series(0, {}) i"#,
        each - 1
    ))?;
    let statement = |number: usize| match number % 3 {
        // The line is as long as the crowd: its tickets were drawn in this order, after the holder's.
        0 => format!(
            "select nightowls.await_floor('crowd', 'w{0}', (select ticket from nightowls.floor_tickets where container = 'crowd' and holder = 'w{0}'), 3600000)",
            number / 3
        ),
        1 => "select nightowls.read_with_poll('crowded', max_wait => '100 s')".to_owned(),
        _ => format!(
            "select nightowls.fetch_events('crowd {}', max_wait => '1 minute')",
            number / 3
        ),
    };
    let [floor, queue, events] = cost(place, &mut watcher, 3 * each, seconds, statement)?;
    println!(
        "floor|{floor:.2}\nqueue|{queue:.2}\nevents|{events:.2}\ncpu|{:.2}",
        floor + queue + events
    );
    Ok(())
}

/// The processor time of so many backends that wait in these statements, in percent of a core: of each N-th.
fn cost<const N: usize>(
    place: &Place,
    watcher: &mut Client,
    waiters: usize,
    seconds: u64,
    statement: impl Fn(usize) -> String,
) -> Fallible<[f64; N]> {
    let mut clients = (0..waiters)
        .map(|_| place.connect())
        .collect::<Fallible<Vec<_>>>()?;
    let mut pids: [Vec<i32>; N] = std::array::from_fn(|_| Vec::new());
    for (number, client) in clients.iter_mut().enumerate() {
        pids[number % N].push(client.query_one("select pg_backend_pid()", &[])?.get(0));
    }
    thread::scope(|scope| {
        for (number, mut client) in clients.into_iter().enumerate() {
            let sql = statement(number);
            // It ends with its backend.
            let wait = move || client.batch_execute(&sql);
            thread::Builder::new()
                .stack_size(256 * 1024)
                .spawn_scoped(scope, wait)?;
        }
        let asleep = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type in ('Extension', 'Timeout')";
        let patience = Instant::now();
        let mut measured = Err("they do not lie down".into());
        while patience.elapsed() < Duration::from_secs(60) {
            if watcher.query_one(asleep, &[])?.get::<_, i64>(0) >= waiters as i64 {
                thread::sleep(Duration::from_secs(6));
                let before = pids.each_ref().map(|pids| ticks(pids));
                let start = Instant::now();
                thread::sleep(Duration::from_secs(seconds));
                let after = pids.each_ref().map(|pids| ticks(pids));
                measured = Ok(std::array::from_fn(|way| {
                    after[way].saturating_sub(before[way]) as f64 / start.elapsed().as_secs_f64()
                }));
                break;
            }
            thread::sleep(Duration::from_millis(100));
        }
        watcher.batch_execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()",
        )?;
        measured
    })
}

/// The processor time that they have had: ticks of 10 ms, so that ticks a second are percents of a core.
fn ticks(pids: &[i32]) -> u64 {
    pids.iter()
        .filter_map(|pid| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let (_, fields) = stat.rsplit_once(") ")?;
            let fields: Vec<_> = fields.split(' ').collect();
            Some(fields[11].parse::<u64>().ok()? + fields[12].parse::<u64>().ok()?)
        })
        .sum()
}
