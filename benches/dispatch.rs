//! The client and the receiver of the bench of the outbox: `make bench` runs it; each figure is a line `name|value`.
//!
//! ```text
//! dispatch <socket folder> <port> <database> <user> rate <requests>
//! dispatch … latency <requests> <milliseconds between two>
//! dispatch … idle <seconds>
//! ```

use std::error::Error;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use postgres::{Client, Config, NoTls};

type Fallible<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// What has arrived: how many, how many are under way at most, and when each of the requests with a number came.
#[derive(Default)]
struct Arrivals {
    count: AtomicUsize,
    times: Mutex<Vec<(usize, Instant)>>,
}

fn main() -> Fallible<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [host, port, database, user, what, rest @ ..] = &arguments[..] else {
        return Err("usage: dispatch <socket folder> <port> <database> <user> <what> …".into());
    };
    let numbers: Vec<u64> = rest.iter().filter_map(|text| text.parse().ok()).collect();
    let mut config = Config::new();
    config
        .host(host)
        .port(port.parse()?)
        .dbname(database)
        .user(user);
    let mut client = config.connect(NoTls)?;
    match (what.as_str(), &numbers[..]) {
        ("rate", [count]) => rate(&mut client, *count as usize),
        ("latency", [count, pause]) => latency(&mut client, *count as usize, *pause),
        ("idle", [seconds]) => idle(&mut client, *seconds),
        _ => Err(format!("no such measurement: {what} {rest:?}").into()),
    }
}

/// A receiver that answers 200 at once, and an endpoint for it.
fn receiver(client: &mut Client) -> Fallible<(Arc<Arrivals>, String)> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let port = listener.local_addr()?.port();
    let arrivals: Arc<Arrivals> = Arc::default();
    let mine = Arc::clone(&arrivals);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let arrivals = Arc::clone(&mine);
            thread::spawn(move || serve(stream, &arrivals));
        }
    });
    let name = format!("bench {port}");
    client.execute(
        "select nightowls.create_endpoint($1, $2, max_in_flight => 64, secret => 'whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw')",
        &[&name, &format!("http://127.0.0.1:{port}/")],
    )?;
    Ok((arrivals, name))
}

fn serve(mut stream: TcpStream, arrivals: &Arrivals) -> Option<()> {
    stream.set_nodelay(true).ok()?;
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut line = String::new();
    loop {
        let mut length = 0;
        loop {
            line.clear();
            if reader.read_line(&mut line).ok()? == 0 {
                return None;
            }
            if line == "\r\n" {
                break;
            }
            if let Some(value) = line.strip_prefix("content-length: ") {
                length = value.trim().parse().ok()?;
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).ok()?;
        let now = Instant::now();
        arrivals.count.fetch_add(1, Ordering::SeqCst);
        if let Ok(number) = String::from_utf8_lossy(&body).parse() {
            arrivals.times.lock().ok()?.push((number, now));
        }
        stream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
            .ok()?;
    }
}

/// Waits until so many have arrived.
fn await_arrivals(arrivals: &Arrivals, count: usize) -> Fallible<()> {
    let start = Instant::now();
    while arrivals.count.load(Ordering::SeqCst) < count {
        if start.elapsed() > Duration::from_secs(600) {
            return Err("the requests do not arrive".into());
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Requests a second, from the moment they are committed to the last one's settlement.
fn rate(client: &mut Client, count: usize) -> Fallible<()> {
    let (arrivals, name) = receiver(client)?;
    // Connections are made, and plans.
    client.execute(
        "select nightowls.enqueue_request($1, '\"warm\"') from generate_series(1, 200)",
        &[&name],
    )?;
    await_arrivals(&arrivals, 200)?;
    thread::sleep(Duration::from_millis(300));
    client.execute(
        "select count(*) from nightowls.enqueue_requests($1, array(select to_jsonb(g) from generate_series(1, $2::int) g))",
        &[&name, &(count as i32)],
    )?;
    let start = Instant::now();
    await_arrivals(&arrivals, count + 200)?;
    let arrived = start.elapsed();
    loop {
        let row = client.query_one(
            "select count(*) from nightowls.queue_messages m join nightowls.endpoints e on m.queue_id = -e.endpoint_id where e.name = $1",
            &[&name],
        )?;
        if row.get::<_, i64>(0) == 0 {
            break;
        }
        thread::sleep(Duration::from_millis(5));
    }
    println!("arrived|{:.0}", count as f64 / arrived.as_secs_f64());
    println!("rate|{:.0}", count as f64 / start.elapsed().as_secs_f64());
    Ok(())
}

/// From the moment a client sends its enqueue, which commits by itself, to the request's arrival.
fn latency(client: &mut Client, count: usize, pause: u64) -> Fallible<()> {
    let (arrivals, name) = receiver(client)?;
    let statement = client.prepare("select nightowls.enqueue_request($1, to_jsonb($2::int))")?;
    let mut begun = Vec::new();
    for number in 0..count + 10 {
        begun.push(Instant::now());
        client.query(&statement, &[&name, &(number as i32)])?;
        await_arrivals(&arrivals, number + 1)?;
        thread::sleep(Duration::from_millis(pause));
    }
    let times = arrivals.times.lock().map_err(|_| "a receiver has failed")?;
    let mut taken: Vec<Duration> = times
        .iter()
        .filter(|(number, _)| *number >= 10)
        .map(|(number, at)| *at - begun[*number])
        .collect();
    taken.sort_unstable();
    let at = |share: f64| {
        taken[((taken.len() - 1) as f64 * share).round() as usize].as_secs_f64() * 1000.0
    };
    println!("p50|{:.3}", at(0.5));
    println!("p99|{:.3}", at(0.99));
    Ok(())
}

/// What the worker's processes use while there is nothing to do, in percent of a core.
fn idle(client: &mut Client, seconds: u64) -> Fallible<()> {
    let pids: Vec<i32> = client
        .query(
            "select pid from pg_stat_activity where backend_type like 'nightowls%'",
            &[],
        )?
        .iter()
        .map(|row| row.get(0))
        .collect();
    let used = || -> f64 {
        let ticks: u64 = pids
            .iter()
            .filter_map(|pid| {
                let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
                let (_, rest) = stat.rsplit_once(')')?;
                let fields: Vec<&str> = rest.split_whitespace().collect();
                Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
            })
            .sum();
        // The kernel counts in hundredths of a second.
        ticks as f64 / 100.0
    };
    let before = used();
    thread::sleep(Duration::from_secs(seconds));
    println!("processes|{}", pids.len());
    println!("cpu|{:.3}", (used() - before) / seconds as f64 * 100.0);
    Ok(())
}
