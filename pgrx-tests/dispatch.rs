//! The outbox: requests through SQL, whoever sends them, to a server of the test's own.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nightowls::http::sign;

use crate::fixture::{default_org, lines};
use crate::orm;
use crate::support::peer::{Answer, Arrival, NetStandIn, Peer, ok, status};
use crate::support::{Db, Install, SERVICE, SUPERUSER, Session, on_each_install, worker_server};
use crate::worker::Worker;

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const LONG: Duration = Duration::from_secs(60);

/// A database whose requests are sent, and by what.
pub struct Sending {
    pub db: Db,
    pub by: &'static str,
    _worker: Option<Worker>,
    _net: Option<NetStandIn>,
}

impl Sending {
    fn new(by: &'static str) -> Self {
        let install = if by == "pg_net" {
            Install::Plain
        } else {
            Install::Extension
        };
        let db = worker_server().database(install);
        default_org(&db);
        if by == "pg_net" {
            db.owner().exec(
                "insert into nightowls.settings (name, value) values ('allow_http', 'true'), ('allow_private', 'true')",
            );
        }
        Self {
            _worker: (by == "worker").then(|| Worker::start(&db)),
            _net: (by == "pg_net").then(|| NetStandIn::start(&db)),
            by,
            db,
        }
    }

    pub fn service(&self) -> Session {
        self.db.session(SERVICE)
    }

    /// Has what is there sent, if nobody does so by itself.
    pub fn send(&self) {
        if self.by != "worker" {
            self.service()
                .exec("call nightowls.run_dispatch(10000, 3000)");
        }
    }

    /// Sends until `condition` holds.
    #[track_caller]
    pub fn until(&self, what: &str, mut condition: impl FnMut(&mut Session) -> bool) {
        let (started, mut session) = (Instant::now(), self.service());
        while !condition(&mut session) {
            assert!(
                started.elapsed() < LONG,
                "{}: waited in vain: {what}\n{}",
                self.by,
                lines(
                    &mut session,
                    "select endpoint, status, attempts, last_error from nightowls.requests limit 20"
                )
                .join("\n")
            );
            self.send();
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Until each request is delivered or dead.
    #[track_caller]
    pub fn until_done(&self) {
        self.until("all requests are done", |session| {
            session
                .value("select not exists (select from nightowls.requests where status not in ('delivered', 'dead'))")
                .as_deref()
                == Some("t")
        });
    }
}

/// The worker, run_dispatch in a session, and pg_net's stand-in in the plain install.
pub fn on_each_sender(test: impl Fn(&Sending)) {
    for by in ["worker", "run_dispatch", "pg_net"] {
        let run = AssertUnwindSafe(|| test(&Sending::new(by)));
        if let Err(panic) = catch_unwind(run) {
            eprintln!("failed on: {by}");
            resume_unwind(panic);
        }
    }
}

fn endpoint(session: &mut Session, name: &str, url: &str, more: &str) {
    session.exec(&format!(
        "select nightowls.create_endpoint('{name}', '{url}'{more})"
    ));
}

#[test]
fn a_request_arrives_signed_and_what_came_of_it_is_kept() {
    on_each_sender(|sending| {
        let peer = Peer::new(|_| {
            Answer::Status(
                201,
                "content-type: text/plain\r\n".to_owned(),
                "thanks".to_owned(),
            )
        });
        let mut session = sending.service();
        let more = format!(", '{{\"X-Api-Key\": \"k3y\"}}', '{SECRET}'");
        endpoint(&mut session, "hook", &peer.url("/in?a=b"), &more);
        let id = session
            .value("select nightowls.enqueue_request('hook', '{\"n\": 1.10, \"t\": \"ä\"}', 'key', traceparent => '00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01')")
            .expect("a number");
        sending.until_done();

        let arrivals = peer.arrivals();
        assert_eq!(arrivals.len(), 1);
        let arrival = &arrivals[0];
        assert_eq!(arrival.path, "/in?a=b");
        assert_eq!(arrival.body, r#"{"n": 1.10, "t": "ä"}"#);
        assert_eq!(arrival.header("content-type"), "application/json");
        assert_eq!(arrival.header("x-api-key"), "k3y");
        assert_eq!(
            arrival.header("traceparent"),
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
        );
        let timestamp = arrival
            .header("webhook-timestamp")
            .parse()
            .expect("seconds");
        assert_eq!(
            arrival.header("webhook-signature"),
            sign::signature(
                SECRET,
                arrival.webhook_id(),
                timestamp,
                arrival.body.as_bytes()
            )
        );
        assert_eq!(
            lines(
                &mut session,
                "select request_id, webhook_id, attempt, result, status, body, headers ->> 'content-type', error from nightowls.responses"
            ),
            [format!(
                "{id} {} 1 delivered 201 thanks text/plain null",
                arrival.webhook_id()
            )]
        );
        assert_eq!(
            lines(
                &mut session,
                "select endpoint, request_id, webhook_id, status, attempts from nightowls.requests"
            ),
            [format!("hook {id} {} delivered 1", arrival.webhook_id())]
        );
        // What goes out can be checked by who gets it.
        let headers = serde_json::to_string(&arrival.headers).expect("headers are text");
        let verify = |body: &str, secret: &str| {
            let mut session = sending.service();
            session.value(&format!(
                "select nightowls.verify_webhook('{headers}', '{body}', '{secret}')"
            ))
        };
        assert_eq!(verify(&arrival.body, SECRET).as_deref(), Some("t"));
        assert_eq!(verify("{}", SECRET).as_deref(), Some("f"));
        assert_eq!(
            verify(&arrival.body, "whsec_AAECAwQFBgcICQoLDA0ODw==").as_deref(),
            Some("f")
        );
        // The key is known though the request is done.
        assert_eq!(
            session.value(
                "select nightowls.enqueue_request('hook', '{\"n\": 1.10, \"t\": \"ä\"}', 'key')"
            ),
            Some(id)
        );
        assert_eq!(
            session
                .refused("select nightowls.enqueue_request('hook', '{}', 'key')")
                .code,
            "NW002"
        );
    });
}

#[test]
fn what_fails_is_sent_again_or_is_a_dead_letter_with_its_reason() {
    on_each_sender(|sending| {
        let tries: Arc<Mutex<BTreeMap<String, usize>>> = Arc::default();
        let counts = Arc::clone(&tries);
        let peer = Peer::new(move |arrival: &Arrival| {
            let mut counts = counts.lock().expect("no test panics with it");
            let nth = counts.entry(arrival.body.clone()).or_default();
            *nth += 1;
            match (arrival.body.trim_matches('"'), *nth) {
                ("twice", 1 | 2) => status(500),
                ("busy", 1) => Answer::Status(429, "retry-after: 1\r\n".to_owned(), String::new()),
                ("reset", 1) => Answer::Reset,
                ("hang", 1) => Answer::Hang(LONG),
                ("never", _) => status(503),
                ("gone", _) => status(404),
                ("elsewhere", _) => {
                    Answer::Status(302, "location: /there\r\n".to_owned(), String::new())
                }
                _ => ok(),
            }
        });
        let mut session = sending.service();
        endpoint(
            &mut session,
            "hook",
            &peer.url("/"),
            ", timeout => '400 ms', max_attempts => 3, backoff => '1 ms', max_backoff => '2 ms', break_after => 0",
        );
        session.exec(
            "select nightowls.enqueue_requests('hook', array['\"fine\"', '\"twice\"', '\"reset\"', '\"hang\"', '\"never\"', '\"gone\"', '\"elsewhere\"', '\"busy\"']::jsonb[])",
        );
        sending.until_done();
        let hang = "no answer within 400 ms";
        assert_eq!(
            lines(
                &mut session,
                "select body #>> '{}', status, attempts, coalesce(last_error, '-') from nightowls.requests order by request_id"
            ),
            [
                "fine delivered 1 -".to_owned(),
                "twice delivered 3 HTTP 500".to_owned(),
                format!("reset delivered 2 {}", last_error(&mut session, "reset")),
                format!("hang delivered 2 {hang}"),
                "never dead 3 HTTP 503".to_owned(),
                "gone dead 1 HTTP 404".to_owned(),
                "elsewhere dead 1 HTTP 302: redirects are not followed".to_owned(),
                "busy delivered 2 HTTP 429".to_owned(),
            ]
        );
        let arrivals = peer.arrivals();
        assert!(arrivals.iter().all(|arrival| arrival.path == "/"));
        let mut ids: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for arrival in &arrivals {
            ids.entry(&arrival.body)
                .or_default()
                .push(arrival.webhook_id());
        }
        assert_eq!(ids.len(), 8);
        for (body, ids) in &ids {
            assert!(ids.iter().all(|id| id == &ids[0]), "{body}: {ids:?}");
        }
        let waited = session.value(
            "select extract(epoch from max(received_at) - min(received_at)) >= 1 from nightowls.responses r \
               join nightowls.requests q using (request_id) where q.body = '\"busy\"'",
        );
        assert_eq!(waited.as_deref(), Some("t"), "Retry-After");

        assert_eq!(
            session
                .value("select nightowls.redrive_requests('hook', 1)")
                .as_deref(),
            Some("1")
        );
        sending.until("it was sent again", |session| {
            session
                .value("select count(*) from nightowls.responses r join nightowls.requests q using (request_id) where q.body = '\"never\"' and q.status = 'dead'")
                .as_deref()
                == Some("6")
        });
    });
}

fn last_error(session: &mut Session, body: &str) -> String {
    session
        .value(&format!(
            "select last_error from nightowls.requests where body = '\"{body}\"'"
        ))
        .expect("it failed once")
}

#[test]
fn nothing_is_lost_and_nothing_sent_after_success() {
    // 2,000 by the worker, fewer by the others; NIGHTOWLS_FULL=1: 50,000.
    let full = std::env::var_os("NIGHTOWLS_FULL").is_some();
    on_each_sender(|sending| {
        let count = match (sending.by, full) {
            ("worker", true) => 50_000,
            ("worker", false) => 2_000,
            (_, true) => 5_000,
            (_, false) => 300,
        };
        let nth = AtomicUsize::new(0);
        let peer = Peer::new(move |_: &Arrival| {
            match nth
                .fetch_add(1, Ordering::SeqCst)
                .wrapping_mul(2_654_435_761)
                % 1_000
            {
                0..5 => Answer::Hang(LONG),
                5..45 => Answer::Reset,
                45..150 => status(500),
                150..180 => Answer::Status(429, "retry-after: 0\r\n".to_owned(), String::new()),
                180..190 => Answer::Drip(50),
                190..192 => Answer::Huge(52_428_800),
                192..200 => status(400),
                _ => ok(),
            }
        });
        let mut session = sending.service();
        for name in ["one", "two"] {
            endpoint(
                &mut session,
                name,
                &peer.url("/"),
                ", timeout => '500 ms', max_attempts => 12, backoff => '5 ms', max_backoff => '50 ms', max_in_flight => 32, break_for => '100 ms'",
            );
            session.exec(&format!(
                "select count(*) from nightowls.enqueue_requests('{name}', array(select jsonb_build_object('n', g) from generate_series(1, {}) g))",
                count / 2
            ));
        }
        sending.until_done();
        check_deliveries(sending, &peer, count, 0);
    });
}

/// Each request has one webhook-id; it ended delivered or dead with a reason; none was sent after it had been answered with success, but for
/// `excused` whose sender was killed.
#[track_caller]
pub fn check_deliveries(sending: &Sending, peer: &Peer, count: usize, excused: usize) {
    let mut session = sending.service();
    let rows =
        session.rows("select webhook_id, status, coalesce(last_error, '') from nightowls.requests");
    assert_eq!(rows.len(), count, "requests are lost");
    let mut by_id: BTreeMap<String, Vec<u16>> = BTreeMap::new();
    for arrival in peer.arrivals() {
        by_id
            .entry(arrival.webhook_id().to_owned())
            .or_default()
            .push(arrival.answered);
    }
    let mut again = 0;
    for row in &rows {
        let [id, state, error] = [0, 1, 2].map(|column| row[column].clone().unwrap_or_default());
        let answers = by_id.remove(&id).unwrap_or_default();
        // A body that came too slowly or was cut off by the reader's haste is no success to who reads it.
        let successes = answers
            .iter()
            .filter(|status| (200..300).contains(*status))
            .count();
        match state.as_str() {
            "delivered" => assert!(successes > 0, "{id} is said to be delivered: {answers:?}"),
            "dead" => assert!(!error.is_empty(), "{id} died without a reason: {answers:?}"),
            other => panic!("{id} is {other}"),
        }
        again += successes.saturating_sub(1);
    }
    assert!(by_id.is_empty(), "sent and unknown: {by_id:?}");
    assert!(again <= excused, "{again} were sent after success");
    assert_eq!(
        session.value("select count(*) from nightowls.responses where result = 'delivered'"),
        session.value("select count(*) from nightowls.requests where status = 'delivered'"),
        "each delivery is written down once"
    );
}

#[test]
fn events_become_requests_in_their_own_transaction() {
    on_each_sender(|sending| {
        let peer = Peer::new(|_| ok());
        let mut session = sending.service();
        endpoint(&mut session, "hook", &peer.url("/"), "");
        session.exec("select nightowls.bind_endpoint('hook', '{\"event_types\": [\"order_paid\"]}', ordered => true)");
        session.exec("begin; select nightowls.append_event('order', '1', 'order_paid', '{\"n\": 0}'); rollback");
        session.exec("select nightowls.append_event('order', '1', 'order_made')");
        session.exec("select nightowls.append_event('order', '1', 'order_paid', '{\"n\": 1}', metadata => '{\"trace_id\": \"4bf92f3577b34da6a3ce929d0e0e4736\"}')");
        session.exec("select nightowls.append_events('order', '1', '[{\"event_type\": \"order_paid\", \"payload\": {\"n\": 2}}, {\"event_type\": \"order_paid\", \"payload\": {\"n\": 3}}]')");
        sending.until_done();
        let arrivals = peer.arrivals();
        let bodies: Vec<serde_json::Value> = arrivals
            .iter()
            .map(|arrival| serde_json::from_str(&arrival.body).expect("JSON"))
            .collect();
        assert_eq!(
            bodies
                .iter()
                .map(|body| body["payload"]["n"].as_i64())
                .collect::<Vec<_>>(),
            [Some(1), Some(2), Some(3)],
            "in order"
        );
        assert!(
            arrivals[0]
                .header("traceparent")
                .starts_with("00-4bf92f3577b34da6a3ce929d0e0e4736-")
        );
        assert_eq!(
            arrivals
                .iter()
                .map(Arrival::webhook_id)
                .collect::<std::collections::BTreeSet<_>>()
                .len(),
            3
        );

        // What was answered is forgotten with the subject.
        assert_eq!(
            lines(
                &mut session,
                "select distinct body from nightowls.responses"
            ),
            ["fine"]
        );
        session.exec("select nightowls.erase('order', '1', 'asked for')");
        assert_eq!(
            lines(
                &mut session,
                "select distinct body from nightowls.responses where request_id <= (select max(request_id) from nightowls.responses where body is null)"
            ),
            ["null"]
        );
        assert_eq!(
            session
                .value("select nightowls.unbind_endpoint('hook')")
                .as_deref(),
            Some("1")
        );
    });
}

#[test]
fn one_that_hangs_slows_no_other_and_is_left_alone() {
    on_each_sender(|sending| {
        if sending.by != "worker" {
            return; // The others send in batches, and wait for the slowest.
        }
        let hangs = Peer::new(|_| Answer::Hang(LONG));
        let fine = Peer::new(|_| ok());
        let mut session = sending.service();
        endpoint(
            &mut session,
            "hangs",
            &hangs.url("/"),
            ", timeout => '20 s', max_in_flight => 5",
        );
        endpoint(&mut session, "fine", &fine.url("/"), "");
        session.exec("select nightowls.enqueue_request('hangs', '1') from generate_series(1, 50)");
        sending.until("five hang", |_| hangs.under_way() == 5);
        session.exec("select nightowls.enqueue_request('fine', '1') from generate_series(1, 100)");
        sending.until("the others arrive", |_| fine.count() == 100);
        assert_eq!((hangs.count(), hangs.most_under_way()), (5, 5));
        assert_eq!(
            lines(
                &mut session,
                "select waiting, in_flight from nightowls.dispatch_status where endpoint = 'hangs'"
            ),
            ["45 5"]
        );
        // No transaction is open while requests are under way.
        let open = "select count(*) from pg_stat_activity where backend_type = 'nightowls sender' and datname = current_database() and (xact_start is not null or backend_xid is not null or backend_xmin is not null)";
        let mut superuser = sending.db.superuser();
        crate::support::wait_until("the sender sleeps", LONG, || {
            superuser.value(open).as_deref() == Some("0")
        });
    });
}

#[test]
fn an_endpoint_that_fails_is_left_alone_for_a_while_and_then_tried_by_one() {
    on_each_sender(|sending| {
        let well = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let is_well = Arc::clone(&well);
        let peer = Peer::new(move |_| {
            if is_well.load(Ordering::SeqCst) {
                ok()
            } else {
                status(500)
            }
        });
        let mut session = sending.service();
        endpoint(
            &mut session,
            "hook",
            &peer.url("/"),
            ", max_in_flight => 1, max_attempts => 0, backoff => '1 ms', max_backoff => '1 ms', break_after => 3, break_for => '10 minutes'",
        );
        session.exec("select nightowls.enqueue_request('hook', '1') from generate_series(1, 10)");
        sending.until("it is left alone", |session| {
            session
                .value("select open_until is not null from nightowls.dispatch_status")
                .as_deref()
                == Some("t")
        });
        sending.send();
        assert_eq!(peer.count(), 3);
        assert!(
            lines(
                &mut session,
                "select name from nightowls._health_dispatch() where not ok"
            )
            .contains(&"failing".to_owned())
        );
        well.store(true, Ordering::SeqCst);
        session.exec("select nightowls.redrive_requests('hook')");
        sending.until_done();
        assert_eq!(
            lines(
                &mut session,
                "select failures, open_until from nightowls.dispatch_status"
            ),
            ["0 null"]
        );
    });
}

#[test]
fn a_rate_is_kept_and_answers_go_to_a_queue() {
    on_each_sender(|sending| {
        let times: Arc<Mutex<Vec<Instant>>> = Arc::default();
        let seen = Arc::clone(&times);
        let peer = Peer::new(move |_| {
            seen.lock()
                .expect("no test panics with it")
                .push(Instant::now());
            Answer::Status(200, String::new(), "{\"answer\": 42}".to_owned())
        });
        let mut session = sending.service();
        session.exec("select nightowls.create_queue('answers')");
        endpoint(
            &mut session,
            "hook",
            &peer.url("/"),
            ", rate_limit => 2, rate_interval => '300 ms', reply_queue => 'answers'",
        );
        session.exec("select nightowls.enqueue_request('hook', '1') from generate_series(1, 6)");
        sending.until_done();
        let times = times.lock().expect("no test panics with it").clone();
        assert_eq!(times.len(), 6);
        // They are begun 300 ms apart; what is measured is when they arrive.
        assert!(
            times[5] - times[0] >= Duration::from_millis(500),
            "{times:?}"
        );
        assert_eq!(
            lines(
                &mut session,
                "select distinct message ->> 'endpoint', message ->> 'status', message -> 'body' ->> 'answer' from nightowls.read('answers', qty => 10)"
            ),
            ["hook 200 42"]
        );
        assert_eq!(
            session
                .value("select count(*) from nightowls.queue_messages where queue_id > 0")
                .as_deref(),
            Some("6")
        );
    });
}

#[test]
fn edge_functions_wait_for_their_secrets_and_leave_their_region_after_two_failures() {
    on_each_sender(|sending| {
        let nth = AtomicUsize::new(0);
        let peer = Peer::new(move |_| {
            if nth.fetch_add(1, Ordering::SeqCst) < 2 {
                status(503)
            } else {
                ok()
            }
        });
        let mut session = sending.service();
        endpoint(
            &mut session,
            "edge",
            "/functions/v1/notify",
            ", region => 'eu-central-1', backoff => '1 ms', max_backoff => '1 ms'",
        );
        session.exec("select nightowls.enqueue_request('edge', '{}')");
        sending.send();
        let fault =
            |session: &mut Session| session.value("select fault from nightowls.dispatch_status");
        assert!(fault(&mut session).is_some_and(|fault| fault.ends_with("is missing")));
        assert!(
            lines(
                &mut session,
                "select name from nightowls._health_dispatch() where not ok"
            )
            .contains(&"secrets".to_owned())
        );
        session.exec(&format!(
            "select nightowls.set_config_value('project_url', '{}', secret => true)",
            peer.url("")
        ));
        session.exec("select nightowls.set_config_value('service_role_key', 'aaaa.bbbb.cccc', secret => true)");
        assert_eq!(fault(&mut session), None);
        sending.until_done();
        let arrivals = peer.arrivals();
        assert!(
            arrivals
                .iter()
                .all(|arrival| arrival.path == "/functions/v1/notify"
                    && arrival.header("authorization") == "Bearer aaaa.bbbb.cccc")
        );
        assert_eq!(
            arrivals
                .iter()
                .map(|arrival| arrival.header("x-region"))
                .collect::<Vec<_>>(),
            ["eu-central-1", "eu-central-1", ""]
        );
    });
}

#[test]
fn secrets_stand_nowhere_but_where_they_are_kept() {
    on_each_sender(|sending| {
        // It gives back what it got, as a debugging aid would.
        let peer = Peer::new(|arrival: &Arrival| {
            let body = format!("{:?} {SECRET}", arrival.headers);
            let echo = format!("x-request-id: {}\r\n", arrival.header("x-token"));
            match arrival.body.as_str() {
                "1" => Answer::Status(200, echo, body),
                _ => Answer::Status(400, echo, body),
            }
        });
        let mut session = sending.service();
        let mut superuser = sending.db.superuser();
        endpoint(
            &mut session,
            "hook",
            &peer.url("/"),
            &format!(
                ", '{{\"Authorization\": \"Bearer v3rys3cret\", \"x-token\": \"t0k3nt0k3n\"}}', '{SECRET}'"
            ),
        );
        for refused in [
            "select nightowls.create_endpoint('hook', 'https://example.com', '{\"x-token\": \"t0k3nt0k3n\"}')",
            "select nightowls.create_endpoint('other', 'https://me:t0k3nt0k3n@example.com')",
            "select nightowls.create_endpoint('other', 'https://example.com/t0k3nt0k3n x')",
            "select nightowls.create_endpoint('other', 'https://example.com', '{\"x-token\": \"t0k3nt0k3n\\r\\nx: y\"}')",
        ] {
            let refusal = session.refused(refused);
            assert!(
                !format!(
                    "{} {} {} {}",
                    refusal.message, refusal.detail, refusal.hint, refusal.context
                )
                .contains("t0k3n"),
                "{refusal}"
            );
        }
        session.exec(
            "select nightowls.enqueue_request('hook', '1'), nightowls.enqueue_request('hook', '2')",
        );
        sending.until_done();
        assert_eq!(
            peer.arrivals()[0].header("authorization"),
            "Bearer v3rys3cret"
        );

        for secret in ["v3rys3cret", "t0k3nt0k3n", &SECRET["whsec_".len()..]] {
            let places = lines(
                &mut superuser,
                &format!("select distinct table_name from nightowls.scan_for('{secret}')"),
            );
            assert_eq!(places, ["_endpoint_secrets"], "{secret}");
            for view in lines(
                &mut superuser,
                "select relname from pg_class where relnamespace = 'nightowls'::regnamespace and relkind = 'v'",
            ) {
                let found = superuser.value(&format!(
                    "select count(*) from nightowls.{view} v where v::text like '%{secret}%'"
                ));
                assert_eq!(found.as_deref(), Some("0"), "{view} shows {secret}");
            }
            // Statements that fail are logged as they were sent; those above hold the secret in their own text.
            let log = sending.db.cluster().log();
            let told: Vec<_> = log
                .lines()
                .filter(|line| line.contains(secret) && !line.contains("STATEMENT:"))
                .collect();
            assert!(told.is_empty(), "the log tells {secret}: {told:?}");
        }
    });
}

#[test]
fn secrets_stand_in_no_statistics_of_statements() {
    if !crate::support::server().has_library("pg_stat_statements") {
        return crate::support::skip("pg_stat_statements");
    }
    let mut settings = crate::support::WORKER.to_vec();
    settings[0].1 = "nightowls, pg_stat_statements";
    settings.push(("pg_stat_statements.track", "all"));
    crate::support::own_cluster_with(&settings, |cluster| {
        let db = cluster.database(Install::Extension);
        default_org(&db);
        let peer = Peer::new(|_| ok());
        let mut session = db.superuser();
        session.exec("create extension pg_stat_statements");
        endpoint(
            &mut session,
            "hook",
            &peer.url("/"),
            &format!(", '{{\"x-token\": \"t0k3nt0k3n\"}}', '{SECRET}'"),
        );
        session.exec("select nightowls.enqueue_request('hook', '1')");
        session.exec("call nightowls.run_dispatch()");
        session.exec(
            "select nightowls.alter_endpoint('hook', secret => 'whsec_AAECAwQFBgcICQoLDA0ODw==')",
        );
        assert_eq!(peer.arrivals()[0].header("x-token"), "t0k3nt0k3n");
        assert!(
            session
                .value("select count(*) > 20 from pg_stat_statements")
                .as_deref()
                == Some("t")
        );
        assert_eq!(
            lines(
                &mut session,
                "select query from pg_stat_statements where query ~ 't0k3n|MfKQ9r8GKYq|AAECAwQF'"
            ),
            Vec::<String>::new()
        );
    });
}

#[test]
fn what_may_not_be_sent_to_is_refused_when_it_is_named() {
    on_each_install(|db| {
        default_org(db);
        let mut session = db.session(SERVICE);
        for url in [
            "http://example.com/",
            "ftp://example.com/",
            "https://127.0.0.1/",
            "https://127.1/",
            "https://2130706433/",
            "https://0x7f000001/",
            "https://0177.0.0.1/",
            "https://localhost/",
            "https://LOCALHOST./",
            "https://a.localhost/",
            "https://10.1.2.3/",
            "https://172.16.0.1/",
            "https://192.168.0.1:8443/",
            "https://169.254.169.254/latest/meta-data/",
            "https://0.0.0.0/",
            "https://100.64.0.1/",
            "https://224.0.0.1/",
            "https://[::1]/",
            "https://[::]/",
            "https://[::ffff:127.0.0.1]/",
            "https://[64:ff9b::7f00:1]/",
            "https://[fd00::1]/",
            "https://[fe80::1]/",
            "https://[ff02::1]/",
            "https://[2002:7f00:1::]/",
            "https://user:pass@example.com/",
            "https://user@example.com/",
            "https://example.com:0/",
            "https://example.com:99999999/",
            "https://example.com/#f",
            "https://exa mple.com/",
            "https:///x",
            "https://",
            "",
        ] {
            let refusal =
                session.refused(&format!("select nightowls.create_endpoint('e', '{url}')"));
            assert_eq!(refusal.code, "22023", "{url}: {refusal}");
            assert!(!refusal.hint.is_empty(), "{url}");
        }
        for headers in [
            r#"{"a b": "c"}"#,
            r#"{"a": "b\r\nc: d"}"#,
            r#"{"a": "b\u0001"}"#,
            r#"{"host": "x"}"#,
            r#"{"Content-Length": "1"}"#,
            r#"{"webhook-id": "1"}"#,
            r#"{"a": 1}"#,
            r#"{"a": {"secret": 1}}"#,
            r#"{"a": "1", "A": "2"}"#,
            "[]",
        ] {
            let refusal = session.refused(&format!(
                "select nightowls.create_endpoint('e', 'https://example.com', '{headers}')"
            ));
            assert_eq!(refusal.code, "22023", "{headers}: {refusal}");
        }
        let huge = "v".repeat(17_000);
        let refusal = session.refused(&format!(
            "select nightowls.create_endpoint('e', 'https://example.com', '{{\"a\": \"{huge}\"}}')"
        ));
        assert_eq!(refusal.code, "22023");
        for (more, code) in [
            ("timeout => '10 ms'", "22023"),
            ("timeout => '1 hour'", "22023"),
            ("timeout => null", "22004"),
            ("max_in_flight => 0", "22023"),
            ("max_attempts => -1", "22023"),
            ("rate_limit => 0", "22023"),
            ("region => 'a b'", "22023"),
            ("region_in => 'x'", "22023"),
            ("secret => 'short'", "22023"),
            ("reply_queue => 'nowhere'", "NW007"),
            ("backoff => null", "22004"),
            ("org => '00000000-0000-4000-8000-000000000000'", "22023"),
        ] {
            let refusal = session.refused(&format!(
                "select nightowls.create_endpoint('e', 'https://example.com', {more})"
            ));
            assert_eq!(refusal.code, code, "{more}: {refusal}");
        }
        assert_eq!(
            session
                .value("select count(*) from nightowls.endpoints")
                .as_deref(),
            Some("0")
        );
        assert_eq!(
            session
                .value("select count(*) from nightowls.queues")
                .as_deref(),
            Some("0")
        );

        session.exec("select nightowls.create_endpoint('Good', 'https://example.com/x?y=z', '{\"a\": \"b\"}', region => 'eu')");
        session.exec("select nightowls.create_endpoint('good', 'https://example.com/x?y=z', '{\"a\": \"b\"}', region => 'eu')");
        for other in [
            "'https://example.com/', '{\"a\": \"b\"}'",
            "'https://example.com/x?y=z', '{\"a\": \"c\"}'",
        ] {
            let refusal = session.refused(&format!(
                "select nightowls.create_endpoint('good', {other}, region => 'eu')"
            ));
            assert_eq!(refusal.code, "42710", "{refusal}");
        }
        for (call, code) in [
            ("select nightowls.enqueue_request('god', '{}')", "NW007"),
            ("select nightowls.enqueue_request('good', null)", "22004"),
            (
                "select nightowls.enqueue_request('good', '{}', traceparent => 'x')",
                "22023",
            ),
            (
                "select nightowls.enqueue_request('good', '{}', run_at => 'infinity')",
                "22023",
            ),
            (
                "select nightowls.bind_endpoint('good', '{\"x\": 1}')",
                "22023",
            ),
            (
                "select nightowls.alter_endpoint('good', 'https://localhost')",
                "22023",
            ),
            ("select nightowls.drop_queue('endpoint/good')", "2BP01"),
            ("select nightowls.drop_endpoint('god')", "NW007"),
            ("select nightowls.dispatch(0, 1)", "22023"),
            ("select nightowls.dispatch(null, 1)", "22004"),
            ("select nightowls.dispatch()", "55000"),
        ] {
            let refusal = session.refused(call);
            assert_eq!(refusal.code, code, "{call}: {refusal}");
        }
        session.exec("select nightowls.alter_endpoint('good', secret => 'whsec_AAECAwQFBgcICQoLDA0ODw==', region => '', paused => true)");
        assert_eq!(
            lines(
                &mut session,
                "select e.signed, e.region, e.header_names, d.paused from nightowls.endpoints e, nightowls.dispatch_status d"
            ),
            ["t null {a} t"]
        );
        session.exec("select nightowls.drop_endpoint('good')");
        assert_eq!(
            session
                .value("select count(*) from nightowls.queues")
                .as_deref(),
            Some("0")
        );
    });
}

#[test]
fn webhooks_that_come_in_are_verified_by_their_schemes() {
    on_each_install(|db| {
        let mut session = db.session(SERVICE);
        let mut check = |headers: &str, body: &str, secret: &str, scheme: &str, more: &str| {
            session.value(&format!(
                "select nightowls.verify_webhook('{headers}', '{body}', '{secret}', '{scheme}'{more})"
            ))
        };
        let (yes, no) = (Some("t".to_owned()), Some("f".to_owned()));
        let old = ", interval '200 years'";
        // The examples of the specification and of GitHub's documentation.
        let standard = r#"{"Webhook-Id": "msg_p5jXN8AQM9LWM0D4loKWxJek", "webhook-timestamp": "1614265330", "webhook-signature": "v1,AAAA v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="}"#;
        let body = r#"{"test": 2432232314}"#;
        assert_eq!(check(standard, body, SECRET, "standard", old), yes);
        assert_eq!(
            check(standard, body, SECRET, "standard", ""),
            no,
            "it is old"
        );
        assert_eq!(check(standard, "{}", SECRET, "standard", old), no);
        assert_eq!(
            check(
                &standard.replace("v1,g0", "v1a,g0"),
                body,
                SECRET,
                "standard",
                old
            ),
            no
        );
        let github = r#"{"X-Hub-Signature-256": "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"}"#;
        assert_eq!(
            check(
                github,
                "Hello, World!",
                "It''s a Secret to Everybody",
                "github",
                ""
            ),
            yes
        );
        assert_eq!(
            check(
                github,
                "Hello, World",
                "It''s a Secret to Everybody",
                "github",
                ""
            ),
            no
        );
        // As openssl computes it: printf '1700000000.{}' | openssl dgst -sha256 -hmac whsec_test
        let stripe = r#"{"stripe-signature": "t=1700000000,v1=0000000000000000000000000000000000000000000000000000000000000000,v1=SIGNED,v0=00"}"#;
        let signed = session
            .value("select encode(nightowls._hmac_sha256('whsec_test', '1700000000.{}'), 'hex')")
            .expect("a hash");
        let mut check = |headers: &str, body: &str, secret: &str, more: &str| {
            session.value(&format!(
                "select nightowls.verify_webhook('{headers}', '{body}', '{secret}', 'stripe'{more})"
            ))
        };
        let stripe = stripe.replace("SIGNED", &signed);
        assert_eq!(check(&stripe, "{}", "whsec_test", old), yes);
        assert_eq!(check(&stripe, "{}", "whsec_tset", old), no);
        assert_eq!(check(&stripe, "{}", "whsec_test", ""), no);
        assert_eq!(check("{}", "{}", "whsec_test", old), no);
        for (call, code) in [
            ("select nightowls.verify_webhook(null, '', 's')", "22004"),
            ("select nightowls.verify_webhook('{}', '', '')", "22023"),
            ("select nightowls.verify_webhook('[]', '', 's')", "22023"),
            (
                "select nightowls.verify_webhook('{}', '', 's', 'x')",
                "22023",
            ),
        ] {
            assert_eq!(session.refused(call).code, code, "{call}");
        }
    });
}

#[test]
fn our_hash_is_the_one_of_everybody() {
    use proptest::prelude::*;
    let db = crate::support::server().database(Install::Plain);
    let session = std::cell::RefCell::new(db.superuser());
    proptest!(ProptestConfig::with_cases(50), |(secret in "[!-~]{1,100}", body in "\\PC{0,80}", time in 0_u64..10_000_000_000)| {
        let asked = format!(
            "select nightowls._webhook_signature({}, 'msg_1', {time}, {})",
            crate::support::quote(&secret), crate::support::quote(&body)
        );
        let got = session.borrow_mut().value(&asked);
        prop_assert_eq!(got, Some(sign::signature(&secret, "msg_1", time, body.as_bytes())));
    });
}

#[test]
fn the_reference_library_accepts_our_signature() {
    static NODE: std::sync::OnceLock<orm::Found> = std::sync::OnceLock::new();
    let Some(node) = orm::or_skip(
        "standardwebhooks",
        NODE.get_or_init(|| orm::npm("webhooks")),
    ) else {
        return;
    };
    let sending = Sending::new("worker");
    let peer = Peer::new(|_| ok());
    let mut session = sending.service();
    endpoint(
        &mut session,
        "hook",
        &peer.url("/"),
        &format!(", secret => '{SECRET}'"),
    );
    session.exec("select nightowls.enqueue_request('hook', '{\"a\": [1, \"ä\"]}')");
    sending.until_done();
    let arrival = &peer.arrivals()[0];
    let script = "const { Webhook } = require(process.argv[1]); \
                  const [secret, body, headers] = process.argv.slice(2); \
                  process.stdout.write(JSON.stringify(new Webhook(secret).verify(body, JSON.parse(headers))))";
    let run = |body: &str| {
        std::process::Command::new("node")
            .args(["-e", script])
            .arg(node.folder.join("node_modules/standardwebhooks"))
            .args([SECRET, body])
            .arg(serde_json::to_string(&arrival.headers).expect("headers are text"))
            .output()
            .expect("node runs")
    };
    let said = run(&arrival.body);
    assert_eq!(
        String::from_utf8_lossy(&said.stdout),
        r#"{"a":[1,"ä"]}"#,
        "{}",
        String::from_utf8_lossy(&said.stderr)
    );
    assert!(!run("{}").status.success());
    drop(sending.db.direct(SUPERUSER));
}

#[test]
fn leasing_and_settling_cost_the_same_while_an_old_snapshot_keeps_what_is_dead() {
    on_each_install(|db| {
        default_org(db);
        let mut session = db.session(SERVICE);
        endpoint(
            &mut session,
            "hook",
            "https://example.com",
            ", rate_limit => 1000000, max_in_flight => 1000",
        );
        // Who asks for more than there is moves the mark behind what is done; who gets all it asks for does so now and then.
        let rounds = |session: &mut Session, count: usize| {
            for _ in 0..count {
                session.exec(
                    "select nightowls.enqueue_requests('hook', array_fill('{}'::jsonb, array[50])); \
                     create temporary table if not exists leased as select null::text as leased limit 0; truncate leased; \
                     insert into leased select nightowls._lease_batch(60)",
                );
                session.exec(
                    "select nightowls._settle_batch((select jsonb_agg(r.value || '{\"status\": 200}') \
                       from leased l cross join lateral jsonb_array_elements(l.leased::jsonb) r)::text)",
                );
            }
        };
        let buffers = |session: &mut Session| -> u64 {
            session.exec("begin; select nightowls.enqueue_request('hook', '{}')");
            let plan = session
                .value("explain (analyze, buffers, format json) select nightowls._lease_batch(1)")
                .expect("a plan");
            session.exec("rollback");
            let plan: serde_json::Value = serde_json::from_str(&plan).expect("JSON");
            ["Shared Hit Blocks", "Shared Read Blocks"]
                .iter()
                .map(|name| plan[0]["Plan"][*name].as_u64().expect("a count"))
                .sum()
        };
        rounds(&mut session, 4);
        let before = buffers(&mut session);
        let mut old = db.direct(SUPERUSER);
        old.exec("begin isolation level repeatable read; select count(*) from nightowls.requests");
        rounds(&mut session, 40);
        let after = buffers(&mut session);
        old.exec("commit");
        // 2,000 dead requests, as many dead entries of each index, 80 dead states.
        assert!(
            after < before * 2 + 60,
            "{}: {before} buffers, then {after}",
            db.install()
        );
        assert_eq!(
            session
                .value("select count(*) from nightowls.responses")
                .as_deref(),
            Some("2200")
        );
    });
}
