//! A receiver of requests: an HTTP server on 127.0.0.1, whose threads end with it; and a stand-in for pg_net.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nightowls::http::{Client, Policy, Request};

use super::database::Db;
use super::{SUPERUSER, quote};

/// A request that has arrived.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// The path and what follows it.
    pub path: String,
    /// By name in lower case.
    pub headers: BTreeMap<String, String>,
    /// The body.
    pub body: String,
    /// The status it was answered with; 0 for none.
    pub answered: u16,
}

impl Arrival {
    /// The header of that name; empty if there is none.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    /// What names the request.
    pub fn webhook_id(&self) -> &str {
        self.header("webhook-id")
    }
}

/// What the server does with a request.
pub enum Answer {
    /// A status, headers (each with its line end) and a body.
    Status(u16, String, String),
    /// Nothing, until the server ends or so long.
    Hang(Duration),
    /// The connection ends.
    Reset,
    /// A body that comes letter by letter.
    Drip(usize),
    /// 200 with a body of so many bytes.
    Huge(usize),
}

/// 200 with a small body.
pub fn ok() -> Answer {
    Answer::Status(200, String::new(), "fine".to_owned())
}

/// A status alone.
pub fn status(status: u16) -> Answer {
    Answer::Status(status, String::new(), String::new())
}

struct Shared {
    arrivals: Mutex<Vec<Arrival>>,
    under_way: AtomicUsize,
    most_under_way: AtomicUsize,
    ends: AtomicBool,
}

/// The server.
pub struct Peer {
    port: u16,
    shared: Arc<Shared>,
}

impl Peer {
    /// A server that answers as `answer` says.
    pub fn new(answer: impl Fn(&Arrival) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
        let port = listener.local_addr().expect("it is bound").port();
        let shared = Arc::new(Shared {
            arrivals: Mutex::default(),
            under_way: AtomicUsize::new(0),
            most_under_way: AtomicUsize::new(0),
            ends: AtomicBool::new(false),
        });
        let (mine, answer) = (Arc::clone(&shared), Arc::new(answer));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if mine.ends.load(Ordering::SeqCst) {
                    return;
                }
                let (shared, answer) = (Arc::clone(&mine), Arc::clone(&answer));
                thread::spawn(move || shared.serve(stream, &*answer));
            }
        });
        Self { port, shared }
    }

    /// A URL of the server.
    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    /// What has arrived so far, in order.
    pub fn arrivals(&self) -> Vec<Arrival> {
        self.shared.arrivals().clone()
    }

    /// How many have arrived so far.
    pub fn count(&self) -> usize {
        self.shared.arrivals().len()
    }

    /// How many are under way just now.
    pub fn under_way(&self) -> usize {
        self.shared.under_way.load(Ordering::SeqCst)
    }

    /// How many were under way at once, at most.
    pub fn most_under_way(&self) -> usize {
        self.shared.most_under_way.load(Ordering::SeqCst)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::SeqCst);
        // So that it looks.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

impl Shared {
    fn arrivals(&self) -> MutexGuard<'_, Vec<Arrival>> {
        self.arrivals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, stream: TcpStream, answer: &(dyn Fn(&Arrival) -> Answer + Send + Sync)) {
        let _ = stream.set_nodelay(true);
        let Ok(copy) = stream.try_clone() else { return };
        let mut reader = BufReader::new(copy);
        let mut stream = stream;
        while let Some(mut arrival) = read(&mut reader) {
            let now = self.under_way.fetch_add(1, Ordering::SeqCst) + 1;
            self.most_under_way.fetch_max(now, Ordering::SeqCst);
            let answer = answer(&arrival);
            arrival.answered = match &answer {
                Answer::Status(status, ..) => *status,
                Answer::Huge(_) | Answer::Drip(_) => 200,
                Answer::Hang(_) | Answer::Reset => 0,
            };
            self.arrivals().push(arrival);
            let goes_on = self.write(&mut stream, answer);
            self.under_way.fetch_sub(1, Ordering::SeqCst);
            if !goes_on {
                let _ = stream.shutdown(Shutdown::Both);
                return;
            }
        }
    }

    /// False if the connection is over.
    fn write(&self, stream: &mut TcpStream, answer: Answer) -> bool {
        match answer {
            Answer::Status(status, headers, body) => {
                let text = format!(
                    "HTTP/1.1 {status} Answer\r\n{headers}content-length: {}\r\n\r\n{body}",
                    body.len()
                );
                stream.write_all(text.as_bytes()).is_ok()
            }
            Answer::Hang(longest) => {
                let mut left = longest;
                let step = Duration::from_millis(20);
                while !left.is_zero() && !self.ends.load(Ordering::SeqCst) && !is_closed(stream) {
                    thread::sleep(step);
                    left = left.saturating_sub(step);
                }
                false
            }
            Answer::Reset => false,
            Answer::Drip(bytes) => {
                let head = format!("HTTP/1.1 200 Answer\r\ncontent-length: {bytes}\r\n\r\n");
                stream.write_all(head.as_bytes()).is_ok()
                    && (0..bytes).all(|_| {
                        thread::sleep(Duration::from_millis(2));
                        stream.write_all(b"x").is_ok()
                    })
            }
            Answer::Huge(bytes) => {
                let head = format!("HTTP/1.1 200 Answer\r\ncontent-length: {bytes}\r\n\r\n");
                let block = [b'x'; 65_536];
                stream.write_all(head.as_bytes()).is_ok()
                    && (0..bytes / block.len()).all(|_| stream.write_all(&block).is_ok())
            }
        }
    }
}

/// Whether the other side has gone.
fn is_closed(stream: &TcpStream) -> bool {
    let mut byte = [0];
    let _ = stream.set_nonblocking(true);
    let closed = matches!(stream.peek(&mut byte), Ok(0));
    let _ = stream.set_nonblocking(false);
    closed
}

fn read(reader: &mut BufReader<TcpStream>) -> Option<Arrival> {
    let mut line = String::new();
    if reader.read_line(&mut line).ok()? == 0 {
        return None;
    }
    let path = line.split(' ').nth(1)?.to_owned();
    let mut headers = BTreeMap::new();
    loop {
        line.clear();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let length = headers
        .get("content-length")
        .and_then(|length| length.parse().ok());
    let mut body = vec![0; length.unwrap_or(0)];
    reader.read_exact(&mut body).ok()?;
    Some(Arrival {
        path,
        headers,
        body: String::from_utf8(body).ok()?,
        answered: 0,
    })
}

/// Stands in for pg_net, which cannot be had everywhere: the same function and tables (0.14 and later), and a thread that sends what
/// was committed, and forgets it as it takes it, as pg_net does.
pub struct NetStandIn {
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl NetStandIn {
    /// Makes schema `net` in a database, for the owner of its install, and begins to send.
    pub fn start(db: &Db) -> Self {
        let owner = db.install().owner();
        let mut session = db.direct(SUPERUSER);
        session.exec(&format!(
            "create schema net; \
             create unlogged table net.http_request_queue ( \
               id bigserial, method text not null, url text not null, headers jsonb, body bytea, timeout_milliseconds int not null); \
             create unlogged table net._http_response ( \
               id bigint, status_code int, content_type text, headers jsonb, content text, timed_out bool, error_msg text, \
               created timestamptz not null default now()); \
             create index on net._http_response (created); \
             create function net.http_post(url text, body jsonb default '{{}}', params jsonb default '{{}}', \
               headers jsonb default '{{\"Content-Type\": \"application/json\"}}', timeout_milliseconds int default 5000) \
             returns bigint language plpgsql security definer as $$ \
             declare \
               v_id bigint; \
               v_type text := (select h.value from jsonb_each_text(headers) as h where lower(h.key) = 'content-type' limit 1); \
             begin \
               if v_type <> 'application/json' then \
                 raise exception 'Content-Type header must be \"application/json\"'; \
               elsif body is null then \
                 raise exception 'body must not be null'; \
               end if; \
               insert into net.http_request_queue (method, url, headers, body, timeout_milliseconds) \
               values ('POST', http_post.url, http_post.headers, convert_to(http_post.body::text, 'UTF8'), http_post.timeout_milliseconds) \
               returning id into v_id; \
               return v_id; \
             end; \
             $$; \
             grant usage on schema net to {owner}; \
             grant select on net._http_response to {owner}"
        ));
        let ends = Arc::new(AtomicBool::new(false));
        let mine = Arc::clone(&ends);
        let thread = thread::spawn(move || {
            let client = Client::new(None, 16).expect("no certificates are given");
            while !mine.load(Ordering::SeqCst) {
                let taken = session.try_rows(
                    "delete from net.http_request_queue returning id, url, headers::text, convert_from(body, 'UTF8'), timeout_milliseconds",
                );
                let Ok(taken) = taken else { return };
                if taken.is_empty() {
                    thread::sleep(Duration::from_millis(5));
                    continue;
                }
                let sends: Vec<_> = taken
                    .into_iter()
                    .map(|row| {
                        let client = client.clone();
                        thread::spawn(move || answer_of(&client, row))
                    })
                    .collect();
                for sent in sends {
                    let values = sent.join().expect("it does not panic");
                    if session
                        .try_exec(&format!(
                            "insert into net._http_response (id, status_code, headers, content, timed_out, error_msg) values ({values})"
                        ))
                        .is_err()
                    {
                        return;
                    }
                }
            }
        });
        Self {
            ends,
            thread: Some(thread),
        }
    }
}

impl Drop for NetStandIn {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn answer_of(client: &Client, row: Vec<Option<String>>) -> String {
    let row: Vec<String> = row.into_iter().map(Option::unwrap_or_default).collect();
    let headers: serde_json::Value = serde_json::from_str(&row[2]).expect("headers are JSON");
    let request = Request {
        method: "POST",
        url: row[1].clone(),
        headers: headers
            .as_object()
            .into_iter()
            .flatten()
            .map(|(name, value)| (name.clone(), value.as_str().unwrap_or_default().to_owned()))
            .collect(),
        body: row[3].clone().into_bytes(),
        timeout: Duration::from_millis(row[4].parse().expect("milliseconds")),
        max_body: 1 << 20,
        policy: Policy {
            allow_http: true,
            allow_private: true,
        },
    };
    match client.send(&request) {
        Ok(answer) => {
            let headers: serde_json::Map<_, _> = answer
                .headers
                .iter()
                .map(|(name, value)| (name.clone(), value.clone().into()))
                .collect();
            format!(
                "{}, {}, {}, {}, false, null",
                row[0],
                answer.status,
                quote(&serde_json::Value::Object(headers).to_string()),
                quote(&String::from_utf8_lossy(&answer.body))
            )
        }
        Err(failure) => {
            let late = failure.kind == nightowls::http::FailureKind::Timeout;
            format!(
                "{}, null, null, null, {late}, {}",
                row[0],
                quote(&failure.message)
            )
        }
    }
}
