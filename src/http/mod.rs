//! The HTTP client of the outbox and the embeddings. Nothing here knows of Postgres, so it may run in any thread.
//!
//! What is sent is vetted first ([`url`]); the addresses of a name are looked at when it is connected to, and these are what is
//! connected to ([`address`]), so that a name that changes its addresses gains nothing. No redirect is followed, no proxy of the
//! environment is used, nothing is unpacked, and what is read has a limit. Nothing that a [`Failure`] says is from a URL or a header.

pub mod address;
pub mod sign;
pub mod url;

use std::fmt;
use std::io::Read;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use ureq::http;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Error};

use address::{Lookup, RefusedAddress, Vetted, system_lookup};

/// What may be sent to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// `http://` too, not only `https://`.
    pub allow_http: bool,
    /// Addresses of the inside too: loopback, private and so on.
    pub allow_private: bool,
}

/// What is to be sent.
#[derive(Clone, Debug)]
pub struct Request {
    /// `GET`, `POST` and so on.
    pub method: &'static str,
    /// Where to; see [`url::vet`].
    pub url: String,
    /// Names and values; see [`url::vet_headers`].
    pub headers: Vec<(String, String)>,
    /// The body; empty for none.
    pub body: Vec<u8>,
    /// For all of it, from the lookup of the name to the body's end.
    pub timeout: Duration,
    /// The most bytes of an answer that are read.
    pub max_body: usize,
    /// Where it may go.
    pub policy: Policy,
}

/// What came back, whatever its status.
#[derive(Clone, Debug)]
pub struct Response {
    /// The HTTP status.
    pub status: u16,
    /// Names in lower case, and values; values that are no text are left out.
    pub headers: Vec<(String, String)>,
    /// The body, cut after [`Request::max_body`].
    pub body: Vec<u8>,
    /// Whether there was more of it.
    pub truncated: bool,
}

impl Response {
    /// The first header of that name, which must be in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        let header = self.headers.iter().find(|(known, _)| known == name);
        header.map(|(_, value)| value.as_str())
    }
}

/// What kind of failure it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// The request or its target is not allowed: nothing was sent.
    Refused,
    /// The name has no address.
    Name,
    /// No connection came about, or it broke.
    Connection,
    /// The peer is not who it should be, or the encryption failed.
    Tls,
    /// It took too long.
    Timeout,
    /// The peer does not speak HTTP as it should.
    Protocol,
}

/// Why there is no response.
#[derive(Clone, Debug)]
pub struct Failure {
    /// What kind it is.
    pub kind: FailureKind,
    /// For people; nothing of the URL, the headers or the body stands in it.
    pub message: String,
    /// Whether it may go better another time.
    pub retryable: bool,
}

impl Failure {
    fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            retryable: kind != FailureKind::Refused,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// Keeps connections, so one is made for many requests; shared by any number of threads.
#[derive(Clone, Debug)]
pub struct Client {
    /// One for each policy: a connection that one allows is not used for another.
    agents: [Agent; 4],
}

impl Client {
    /// A client that trusts the public authorities, or those of `roots` (PEM) instead.
    ///
    /// # Errors
    ///
    /// What is wrong with `roots`.
    pub fn new(roots: Option<&[u8]>, connections: usize) -> Result<Self, String> {
        Self::with_lookup(roots, connections, system_lookup())
    }

    fn with_lookup(
        roots: Option<&[u8]>,
        connections: usize,
        lookup: Lookup,
    ) -> Result<Self, String> {
        let roots = match roots {
            None => RootCerts::WebPki,
            Some(pem) => RootCerts::from(certificates(pem)?),
        };
        let agent = |number: usize| {
            let config = Agent::config_builder()
                .http_status_as_error(false)
                .https_only(number & 1 == 0)
                .max_redirects(0)
                .max_redirects_will_error(false)
                .proxy(None)
                .max_response_header_size(65_536)
                .max_idle_connections(connections)
                .max_idle_connections_per_host(connections)
                .max_idle_age(Duration::from_secs(15))
                .timeout_connect(Some(Duration::from_secs(10)))
                .user_agent(concat!("nightowls/", env!("CARGO_PKG_VERSION")))
                .tls_config(TlsConfig::builder().root_certs(roots.clone()).build())
                .build();
            let resolver = Vetted::new(lookup.clone(), number & 2 != 0);
            Agent::with_parts(
                config,
                ureq::unversioned::transport::DefaultConnector::default(),
                resolver,
            )
        };
        Ok(Self {
            agents: std::array::from_fn(agent),
        })
    }

    /// Sends a request and waits for the answer, in this thread. In a backend of Postgres see [`Client::send_aside`].
    ///
    /// # Errors
    ///
    /// Why there is no response; any status is one.
    pub fn send(&self, request: &Request) -> Result<Response, Failure> {
        let started = Instant::now();
        let policy = request.policy;
        let uri = url::vet(&request.url, policy.allow_http)
            .map_err(|fault| Failure::new(FailureKind::Refused, fault))?;
        let pairs = request
            .headers
            .iter()
            .map(|(n, v)| (n.as_str(), v.as_str()));
        url::vet_headers(pairs).map_err(|fault| Failure::new(FailureKind::Refused, fault))?;

        let mut built = http::Request::builder().method(request.method).uri(uri);
        for (name, value) in &request.headers {
            built = built.header(name, value);
        }
        let agent =
            &self.agents[usize::from(policy.allow_http) | usize::from(policy.allow_private) << 1];
        let answer =
            if request.body.is_empty() && matches!(request.method, "GET" | "HEAD" | "DELETE") {
                let built = built.body(()).map_err(|_| unusable())?;
                let built = agent
                    .configure_request(built)
                    .timeout_global(Some(request.timeout))
                    .build();
                agent.run(built)
            } else {
                let built = built
                    .body(request.body.as_slice())
                    .map_err(|_| unusable())?;
                let built = agent
                    .configure_request(built)
                    .timeout_global(Some(request.timeout))
                    .build();
                agent.run(built)
            };
        let mut answer = answer.map_err(|error| failure(error, started, request.timeout))?;

        let headers = answer
            .headers()
            .iter()
            .filter_map(|(name, value)| {
                Some((name.as_str().to_owned(), value.to_str().ok()?.to_owned()))
            })
            .collect();
        let status = answer.status().as_u16();
        let mut body = Vec::new();
        let limit = request.max_body as u64 + 1;
        let read = answer
            .body_mut()
            .with_config()
            .limit(u64::MAX)
            .reader()
            .take(limit)
            .read_to_end(&mut body);
        if let Err(error) = read {
            return Err(failure(Error::from(error), started, request.timeout));
        }
        let truncated = body.len() > request.max_body;
        body.truncate(request.max_body);
        Ok(Response {
            status,
            headers,
            body,
            truncated,
        })
    }

    /// As [`Client::send`], in a thread of its own, which no signal of the process can reach; `wait` is called every few
    /// milliseconds meanwhile, and may leave by a panic: then the answer is not waited for.
    ///
    /// # Errors
    ///
    /// As [`Client::send`].
    pub fn send_aside(
        &self,
        request: Request,
        mut wait: impl FnMut(),
    ) -> Result<Response, Failure> {
        let (tell, told) = mpsc::sync_channel(1);
        let client = self.clone();
        let spawned = without_signals(|| {
            thread::Builder::new()
                .name("http".to_owned())
                .spawn(move || tell.send(client.send(&request)).ok())
        });
        if spawned.is_err() {
            return Err(Failure::new(
                FailureKind::Connection,
                "the system gave no thread",
            ));
        }
        let mut pause = Duration::from_millis(1);
        loop {
            match told.recv_timeout(pause) {
                Ok(answer) => return answer,
                Err(mpsc::RecvTimeoutError::Timeout) => wait(),
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    return Err(Failure::new(FailureKind::Protocol, "the client failed"));
                }
            }
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    }
}

/// Calls `make` with all signals blocked: threads that it starts inherit that, so that signals reach the main
/// thread only, where Postgres expects them.
pub fn without_signals<T>(make: impl FnOnce() -> T) -> T {
    /// Puts the mask back, also when `make` panics.
    struct Restore(libc::sigset_t);
    impl Drop for Restore {
        fn drop(&mut self) {
            // SAFETY: the mask is one that the system gave.
            unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, std::ptr::null_mut()) };
        }
    }
    // SAFETY: both sets are ours; a set of zeroes is one that sigfillset may fill.
    let _restore = unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        Restore(before)
    };
    make()
}

fn certificates(pem: &[u8]) -> Result<Vec<Certificate<'static>>, String> {
    let found: Result<Vec<_>, _> = parse_pem(pem).collect();
    let found: Vec<_> = found
        .map_err(|_| "the certificates are not in PEM form".to_owned())?
        .into_iter()
        .filter_map(|item| match item {
            PemItem::Certificate(certificate) => Some(certificate),
            _ => None,
        })
        .collect();
    if found.is_empty() {
        return Err("there is no certificate in PEM form".to_owned());
    }
    Ok(found)
}

fn unusable() -> Failure {
    Failure::new(FailureKind::Refused, "the request is not valid")
}

/// What an error of the library is called here. Its own words may hold the URL.
fn failure(error: Error, started: Instant, timeout: Duration) -> Failure {
    use FailureKind::{Connection, Name, Protocol, Refused, Timeout, Tls};
    let late = || {
        Failure::new(
            Timeout,
            format!("no answer within {} ms", timeout.as_millis()),
        )
    };
    match error {
        Error::Other(other) => match other.downcast::<RefusedAddress>() {
            Ok(refused) => Failure::new(Refused, refused.to_string()),
            Err(_) => Failure::new(Connection, "the connection failed"),
        },
        Error::HostNotFound => Failure::new(Name, "the name has no address"),
        Error::Timeout(_) if started.elapsed() >= timeout => late(),
        Error::Timeout(ureq::Timeout::Connect) => {
            Failure::new(Timeout, "no connection within 10000 ms")
        }
        Error::Timeout(_) => late(),
        Error::Rustls(error) => Failure::new(Tls, format!("TLS: {error}")),
        Error::Tls(fault) => Failure::new(Tls, format!("TLS: {fault}")),
        Error::RequireHttpsOnly(_) => Failure::new(Refused, "the URL is not https"),
        Error::BadUri(_) => Failure::new(Refused, "the URL is not valid"),
        Error::LargeResponseHeader(..) => {
            Failure::new(Protocol, "the answer's headers have more than 65536 bytes")
        }
        Error::Protocol(_) | Error::Http(_) => {
            Failure::new(Protocol, "the answer is not valid HTTP")
        }
        Error::Io(error) if started.elapsed() >= timeout => {
            drop(error);
            late()
        }
        // rustls comes as what an I/O error holds.
        Error::Io(error) => match error.get_ref().map(ToString::to_string) {
            Some(inner) if error.kind() == std::io::ErrorKind::InvalidData => {
                Failure::new(Tls, format!("TLS: {inner}"))
            }
            _ => Failure::new(
                Connection,
                format!("the connection failed: {}", error.kind()),
            ),
        },
        _ => Failure::new(Connection, "the connection failed"),
    }
}

#[cfg(test)]
mod tests;
