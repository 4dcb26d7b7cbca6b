use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::*;

/// A server on 127.0.0.1 that reads a request, and hands the connection and the request's head to `answer`.
fn server(answer: impl Fn(&mut dyn ReadWrite, String) + Send + Sync + 'static) -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    let port = listener.local_addr().expect("it is bound").port();
    let answer = Arc::new(answer);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let answer = Arc::clone(&answer);
            thread::spawn(move || {
                let mut stream = stream;
                serve(&mut stream, &*answer);
            });
        }
    });
    port
}

trait ReadWrite: Read + Write {}
impl<T: Read + Write> ReadWrite for T {}

fn serve(stream: &mut dyn ReadWrite, answer: &dyn Fn(&mut dyn ReadWrite, String)) {
    loop {
        let mut head = String::new();
        let mut length = 0;
        {
            let mut reader = BufReader::with_capacity(1, &mut *stream);
            loop {
                let mut line = String::new();
                if reader.read_line(&mut line).unwrap_or(0) == 0 {
                    return;
                }
                if line == "\r\n" {
                    break;
                }
                if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                    length = value.trim().parse().expect("a length");
                }
                head += &line;
            }
        }
        let mut body = vec![0; length];
        if stream.read_exact(&mut body).is_err() {
            return;
        }
        answer(stream, head);
    }
}

fn ok(stream: &mut dyn ReadWrite, body: &str) {
    let _ = write!(
        stream,
        "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
}

const INSIDE: Policy = Policy {
    allow_http: true,
    allow_private: true,
};

fn request(url: String) -> Request {
    Request {
        method: "POST",
        url,
        headers: vec![("authorization".to_owned(), "Bearer s3cret".to_owned())],
        body: b"{}".to_vec(),
        timeout: Duration::from_secs(5),
        max_body: 1_000,
        policy: INSIDE,
    }
}

fn client() -> Client {
    Client::new(None, 4).expect("no certificates are given")
}

#[track_caller]
fn refused(client: &Client, request: &Request) -> Failure {
    let failure = client.send(request).expect_err("nothing is sent");
    assert!(!failure.message.contains("s3cret"), "{failure}");
    failure
}

#[test]
fn a_request_is_sent_and_answered() {
    let port = server(|stream, head| ok(stream, &head));
    let answer = client()
        .send(&request(format!("http://127.0.0.1:{port}/a?b=c")))
        .expect("an answer");
    let body = String::from_utf8(answer.body).expect("text");
    assert_eq!((answer.status, answer.truncated), (200, false));
    assert!(body.starts_with("POST /a?b=c HTTP/1.1\r\n"), "{body}");
    assert!(body.contains("authorization: Bearer s3cret\r\n"), "{body}");
    assert_eq!(body.matches("content-length: 2").count(), 1, "{body}");
}

#[test]
fn any_status_is_an_answer_and_no_redirect_is_followed() {
    let inner = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&inner);
    let inside = server(move |stream, _| {
        seen.fetch_add(1, Ordering::SeqCst);
        ok(stream, "");
    });
    for status in [301, 302, 303, 307, 308, 400, 404, 429, 500, 503] {
        let port = server(move |stream, _| {
            let _ = write!(
                stream,
                "HTTP/1.1 {status} X\r\nlocation: http://127.0.0.1:{inside}/\r\nretry-after: 7\r\ncontent-length: 0\r\n\r\n"
            );
        });
        let answer = client()
            .send(&request(format!("http://127.0.0.1:{port}/")))
            .expect("an answer");
        assert_eq!(answer.status, status);
        assert_eq!(answer.header("retry-after"), Some("7"));
    }
    assert_eq!(inner.load(Ordering::SeqCst), 0);
}

#[test]
fn an_answer_is_read_up_to_a_limit() {
    let port = server(|stream, _| {
        let _ = write!(
            stream,
            "HTTP/1.1 200 OK\r\ncontent-length: 52428800\r\n\r\n"
        );
        let block = [b'x'; 65_536];
        for _ in 0..800 {
            if stream.write_all(&block).is_err() {
                return;
            }
        }
    });
    let answer = client()
        .send(&request(format!("http://127.0.0.1:{port}/")))
        .expect("an answer");
    assert_eq!((answer.body.len(), answer.truncated), (1_000, true));
}

#[test]
fn headers_of_an_answer_have_a_limit() {
    let port = server(|stream, _| {
        let _ = write!(stream, "HTTP/1.1 200 OK\r\n");
        for number in 0..2_000 {
            let _ = write!(stream, "x-{number}: {}\r\n", "v".repeat(100));
        }
        let _ = write!(stream, "content-length: 0\r\n\r\n");
    });
    let failure = refused(&client(), &request(format!("http://127.0.0.1:{port}/")));
    assert_eq!(failure.kind, FailureKind::Protocol, "{failure}");
}

#[test]
fn who_hangs_or_drips_is_given_up_after_the_timeout() {
    let hangs = server(|_, _| thread::sleep(Duration::from_secs(60)));
    let drips = server(|stream, _| {
        let _ = write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n");
        while stream.write_all(b"x").and_then(|()| stream.flush()).is_ok() {
            thread::sleep(Duration::from_millis(20));
        }
    });
    for port in [hangs, drips] {
        let started = Instant::now();
        let mut request = request(format!("http://127.0.0.1:{port}/"));
        request.timeout = Duration::from_millis(300);
        let failure = refused(&client(), &request);
        assert_eq!(failure.kind, FailureKind::Timeout, "{failure}");
        assert!(failure.retryable);
        assert!(started.elapsed() < Duration::from_secs(30));
    }
}

#[test]
fn who_breaks_off_or_speaks_something_else_is_told() {
    let resets = server(|_, _| panic!("the connection ends"));
    let raw = server(|stream, _| {
        let _ = stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n\r\n");
    });
    let kinds = [resets, raw].map(|port| {
        let failure = refused(&client(), &request(format!("http://127.0.0.1:{port}/")));
        assert!(failure.retryable);
        failure.kind
    });
    assert_eq!(kinds, [FailureKind::Connection, FailureKind::Protocol]);

    let closed = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    let port = closed.local_addr().expect("it is bound").port();
    drop(closed);
    let failure = refused(&client(), &request(format!("http://127.0.0.1:{port}/")));
    assert_eq!(failure.kind, FailureKind::Connection, "{failure}");
}

#[test]
fn the_inside_is_not_connected_to_however_it_is_written() {
    let seen = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&seen);
    let port = server(move |stream, _| {
        count.fetch_add(1, Ordering::SeqCst);
        ok(stream, "");
    });
    for host in [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f.0.0.1",
        "0177.0.0.1",
        "0.0.0.0",
        "0",
        "localhost",
        "LOCALHOST.",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[64:ff9b::127.0.0.1]",
        "169.254.169.254",
        "10.0.0.1",
        "[fe80::1]",
        "[fd00::1]",
    ] {
        let mut request = request(format!("http://{host}:{port}/s3cret"));
        request.policy.allow_private = false;
        request.timeout = Duration::from_secs(20);
        let failure = refused(&client(), &request);
        assert!(
            matches!(failure.kind, FailureKind::Refused | FailureKind::Name),
            "{host}: {failure}"
        );
    }
    assert_eq!(seen.load(Ordering::SeqCst), 0);
}

#[test]
fn a_name_that_changes_its_address_gains_nothing() {
    let seen = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&seen);
    let port = server(move |stream, _| {
        count.fetch_add(1, Ordering::SeqCst);
        ok(stream, "");
    });
    // Each time that it is asked for, the name has another address.
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let lookup: Lookup = Arc::new(move |_, port| {
        let last = match count.fetch_add(1, Ordering::SeqCst) {
            0 => 1,
            _ => 2,
        };
        Ok(vec![SocketAddr::new(
            Ipv4Addr::new(127, 0, 0, last).into(),
            port,
        )])
    });
    let client = Client::with_lookup(None, 4, lookup).expect("no certificates are given");
    let mut request = request(format!("http://rebinds.example:{port}/"));

    // What was looked at is what is connected to: it is asked for once, and nobody listens at the second address.
    assert!(client.send(&request).is_ok());
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    assert_eq!(seen.load(Ordering::SeqCst), 1);

    request.policy.allow_private = false;
    let refused = refused(&client, &request);
    assert_eq!(refused.kind, FailureKind::Refused, "{refused}");
    assert_eq!(
        refused.message,
        "the address 127.0.0.2 is loopback and not allowed"
    );
    assert!(!refused.retryable);
    assert_eq!(asked.load(Ordering::SeqCst), 2);
    assert_eq!(seen.load(Ordering::SeqCst), 1);
}

#[test]
fn a_connection_that_one_policy_allows_is_not_used_under_another() {
    let port = server(|stream, _| ok(stream, ""));
    let client = client();
    let mut request = request(format!("http://127.0.0.1:{port}/"));
    assert!(client.send(&request).is_ok());
    request.policy.allow_private = false;
    assert_eq!(refused(&client, &request).kind, FailureKind::Refused);
    request.policy = Policy {
        allow_http: false,
        allow_private: true,
    };
    assert_eq!(refused(&client, &request).kind, FailureKind::Refused);
}

#[test]
fn connections_are_kept() {
    let connections = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&connections);
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    let port = listener.local_addr().expect("it is bound").port();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            count.fetch_add(1, Ordering::SeqCst);
            thread::spawn(move || serve(&mut stream, &|stream, _| ok(stream, "x")));
        }
    });
    let client = client();
    for _ in 0..10 {
        let answer = client.send(&request(format!("http://127.0.0.1:{port}/")));
        assert_eq!(answer.expect("an answer").body, b"x");
    }
    assert_eq!(connections.load(Ordering::SeqCst), 1);
}

/// A server that speaks TLS with a certificate for `name`, and the certificate in PEM form.
fn tls_server(name: &str) -> (u16, String) {
    let made = rcgen::generate_simple_self_signed(vec![name.to_owned()]).expect("a certificate");
    let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der())
        .expect("a key");
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(
        rustls::crypto::ring::default_provider(),
    ))
    .with_safe_default_protocol_versions()
    .expect("the versions are known")
    .with_no_client_auth()
    .with_single_cert(vec![made.cert.der().clone()], key)
    .expect("key and certificate belong together");
    let config = Arc::new(config);
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    let port = listener.local_addr().expect("it is bound").port();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let config = Arc::clone(&config);
            thread::spawn(move || {
                let connection = rustls::ServerConnection::new(config).expect("a connection");
                let mut stream = rustls::StreamOwned::new(connection, stream);
                serve(&mut stream, &|stream, _| {
                    ok(stream, "over TLS");
                    let _ = stream.flush();
                });
            });
        }
    });
    (port, made.cert.pem())
}

#[test]
fn a_peer_must_be_who_it_says_it_is() {
    let lookup: Lookup =
        Arc::new(|_, port| Ok(vec![SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port)]));
    let (port, pem) = tls_server("hooks.example");
    let client = |pem: Option<&str>| {
        Client::with_lookup(pem.map(str::as_bytes), 4, lookup.clone()).expect("certificates")
    };
    let mut request = request(format!("https://hooks.example:{port}/s3cret"));
    request.policy.allow_http = false;

    let unknown = refused(&client(None), &request);
    assert_eq!(unknown.kind, FailureKind::Tls, "{unknown}");
    let answer = client(Some(&pem))
        .send(&request)
        .expect("its own authority");
    assert_eq!(answer.body, b"over TLS");

    request.url = format!("https://other.example:{port}/s3cret");
    let other = refused(&client(Some(&pem)), &request);
    assert_eq!(other.kind, FailureKind::Tls, "{other}");

    let plain = server(|stream, _| ok(stream, ""));
    request.url = format!("https://hooks.example:{plain}/s3cret");
    request.timeout = Duration::from_secs(2);
    let plain = refused(&client(Some(&pem)), &request);
    assert!(
        matches!(
            plain.kind,
            FailureKind::Tls | FailureKind::Timeout | FailureKind::Connection
        ),
        "{plain}"
    );
    assert!(Client::new(Some(b"no certificate"), 4).is_err());
}

#[test]
fn who_waits_aside_can_leave() {
    let port = server(|_, _| thread::sleep(Duration::from_secs(60)));
    let request = request(format!("http://127.0.0.1:{port}/"));
    let client = client();
    let left = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        client.send_aside(request, || panic!("cancelled"))
    }));
    assert!(left.is_err());

    let port = server(|stream, _| ok(stream, "x"));
    let request = self::request(format!("http://127.0.0.1:{port}/"));
    let answer = client.send_aside(request, || ()).expect("an answer");
    assert_eq!(answer.body, b"x");
}

#[test]
fn threads_start_with_all_signals_blocked() {
    let blocked = || {
        // SAFETY: asks for this thread's mask and changes nothing.
        unsafe {
            let mut mask: libc::sigset_t = std::mem::zeroed();
            libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &mut mask);
            libc::sigismember(&mask, libc::SIGTERM) == 1
        }
    };
    assert!(!blocked());
    let inner = without_signals(|| thread::spawn(blocked));
    assert!(inner.join().expect("a thread"));
    assert!(!blocked());
}
