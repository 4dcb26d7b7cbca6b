//! The background worker as a process: it starts, stops, survives, and keeps nobody from anything.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::fixture::{default_org, lines};
use crate::support::peer::{Answer, Peer, ok};
use crate::support::{
    Db, Install, SERVICE, SUPERUSER, Session, WORKER, kill, own_cluster_with, wait_until,
    worker_server,
};

const LONG: Duration = Duration::from_secs(60);

/// The worker of a database, until it is dropped.
pub struct Worker {
    database: String,
    port: u16,
}

/// The databases that have one, on the shared server.
static LISTED: Mutex<Vec<String>> = Mutex::new(Vec::new());

impl Worker {
    /// Has the server start one, and waits until it runs.
    #[track_caller]
    pub fn start(db: &Db) -> Self {
        let worker = Self {
            database: db.name().to_owned(),
            port: db.cluster().port(),
        };
        worker.list(|listed| listed.push(worker.database.clone()));
        let mut session = db.direct(SUPERUSER);
        wait_until("the worker runs", LONG, || runs(&mut session));
        worker
    }

    fn list(&self, change: impl FnOnce(&mut Vec<String>)) {
        let mut listed = LISTED.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut listed);
        if let Ok(mut session) = Session::connect(self.port, "postgres", SUPERUSER) {
            let _ = session.try_exec(&format!(
                "alter system set nightowls.databases = '{}'",
                listed.join(", ")
            ));
            let _ = session.try_exec("select pg_reload_conf()");
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.list(|listed| listed.retain(|name| *name != self.database));
    }
}

fn runs(session: &mut Session) -> bool {
    session
        .try_value("select nightowls._worker_runs()")
        .is_ok_and(|runs| runs.as_deref() == Some("t"))
}

fn sender(session: &mut Session) -> Option<String> {
    session.value("select pid from pg_stat_activity where backend_type = 'nightowls sender' and datname = current_database()")
}

/// A database with a worker and an endpoint `hook`, on a cluster of its own.
fn on_own_cluster(test: impl FnOnce(&Db, &mut Session)) {
    let mut settings = WORKER.to_vec();
    settings.push(("nightowls.databases", "owned"));
    own_cluster_with(&settings, |cluster| {
        let db = cluster.database(Install::Extension);
        default_org(&db);
        Session::connect(cluster.port(), "postgres", SUPERUSER)
            .expect("a session")
            .exec(&format!(
                "alter system set nightowls.databases = '{}'",
                db.name()
            ));
        let mut session = db.direct(SUPERUSER);
        session.exec("select pg_reload_conf()");
        wait_until("the worker runs", LONG, || runs(&mut session));
        test(&db, &mut session);
    });
}

fn hook(session: &mut Session, peer: &Peer, more: &str) {
    session.exec(&format!(
        "select nightowls.create_endpoint('hook', '{}', max_in_flight => 64{more})",
        peer.url("/")
    ));
}

#[test]
fn a_server_with_64_hanging_requests_stops_at_once_and_goes_on_after() {
    on_own_cluster(|db, session| {
        let peer = Peer::new(|_| Answer::Hang(LONG));
        hook(session, &peer, ", timeout => '60 s'");
        session.exec("select nightowls.enqueue_request('hook', '1') from generate_series(1, 70)");
        wait_until("64 hang", LONG, || peer.under_way() == 64);
        let first = sender(session).expect("it runs");
        let started = Instant::now();
        db.cluster().stop("fast");
        // It is to be 2 seconds; a loaded machine is given more.
        assert!(
            started.elapsed() < Duration::from_secs(10),
            "{:?}",
            started.elapsed()
        );
        drop(peer);

        let fine = Peer::new(|_| ok());
        db.cluster().start_again();
        let mut session = db.direct(SUPERUSER);
        session.exec(&format!(
            "select nightowls.alter_endpoint('hook', '{}')",
            fine.url("/")
        ));
        wait_until("what was under way is sent again", LONG, || {
            fine.count() >= 70
        });
        assert_ne!(sender(&mut session), Some(first));
        wait_until("all are settled", LONG, || {
            session
                .value("select count(*) from nightowls.requests where status = 'delivered'")
                .as_deref()
                == Some("70")
        });
        assert_eq!(fine.count(), 70, "each once");
    });
}

#[test]
fn killed_senders_and_crashed_servers_lose_nothing() {
    let full = std::env::var_os("NIGHTOWLS_FULL").is_some();
    let (count, kills) = if full { (10_000, 10) } else { (400, 2) };
    on_own_cluster(|db, session| {
        let nth = std::sync::atomic::AtomicUsize::new(0);
        let peer = Peer::new(move |_| {
            std::thread::sleep(Duration::from_millis(5));
            match nth.fetch_add(1, std::sync::atomic::Ordering::SeqCst) % 10 {
                0 => Answer::Status(500, String::new(), String::new()),
                1 => Answer::Reset,
                _ => ok(),
            }
        });
        hook(
            session,
            &peer,
            ", timeout => '500 ms', backoff => '5 ms', max_backoff => '20 ms', max_attempts => 0, break_after => 0",
        );
        session.exec(&format!(
            "select count(*) from nightowls.enqueue_requests('hook', array(select to_jsonb(g) from generate_series(1, {count}) g))"
        ));
        for nth in 1..=kills {
            wait_until("it is at work", LONG, || {
                peer.count() >= count / (kills + 1) * nth
            });
            if nth % 2 == 0 {
                db.cluster().kill9_postmaster_and_restart();
            } else {
                let pid = Session::connect(db.cluster().port(), db.name(), SUPERUSER)
                    .ok()
                    .and_then(|mut session| sender(&mut session));
                // The server starts again when one of its processes dies like that.
                if let Some(pid) = pid {
                    kill("-KILL", &pid);
                }
            }
        }
        wait_until("all are delivered", Duration::from_secs(120), || {
            Session::connect(db.cluster().port(), db.name(), SUPERUSER).is_ok_and(|mut session| {
                session
                    .try_value("select count(*) from nightowls.requests where status = 'delivered'")
                    .is_ok_and(|found| found == Some(count.to_string()))
            })
        });
        let mut ids = std::collections::BTreeMap::<String, usize>::new();
        let mut bodies = std::collections::BTreeMap::<String, String>::new();
        for arrival in peer.arrivals() {
            *ids.entry(arrival.webhook_id().to_owned()).or_default() +=
                usize::from(arrival.answered == 200);
            let known = bodies
                .entry(arrival.body.clone())
                .or_insert_with(|| arrival.webhook_id().to_owned());
            assert_eq!(
                known,
                arrival.webhook_id(),
                "one webhook-id for each request"
            );
        }
        assert_eq!((ids.len(), bodies.len()), (count, count));
        assert!(ids.values().all(|successes| *successes >= 1));
        let again: usize = ids.values().map(|successes| successes - 1).sum();
        assert!(
            again <= kills * 64,
            "{again} were sent after success; only what was under way at a kill may be"
        );
    });
}

#[test]
fn the_extension_and_the_database_can_be_dropped_while_it_works() {
    let db = worker_server().database(Install::Extension);
    default_org(&db);
    let worker = Worker::start(&db);
    let peer = Peer::new(|_| {
        std::thread::sleep(Duration::from_millis(20));
        ok()
    });
    let mut session = db.direct(SUPERUSER);
    hook(&mut session, &peer, "");
    session.exec("select count(*) from nightowls.enqueue_requests('hook', array(select to_jsonb(g) from generate_series(1, 2000) g))");
    wait_until("it is at work", LONG, || peer.count() > 50);
    let pid = sender(&mut session);
    session.exec("alter extension nightowls update");
    session.exec("drop extension nightowls");
    wait_until("nothing is under way", LONG, || peer.under_way() == 0);

    // It goes on with the next extension, as the same process.
    session.exec("create extension nightowls");
    session.exec("select nightowls.set_default_org(nightowls.create_org('again'))");
    hook(&mut session, &peer, "");
    let before = peer.count();
    session.exec("select nightowls.enqueue_request('hook', '1')");
    wait_until("a new request arrives", LONG, || peer.count() > before);
    assert_eq!(sender(&mut session), pid);

    // Without force its sessions keep the database, as any would; with force they end.
    let name = db.name().to_owned();
    drop(session);
    let mut other =
        Session::connect(db.cluster().port(), "postgres", SUPERUSER).expect("a session");
    other.exec(&format!("drop database {name} with (force)"));
    let left = format!(
        "select count(*) from pg_stat_activity where backend_type like 'nightowls%' and datname = '{name}'"
    );
    wait_until("nobody is there", LONG, || {
        other.value(&left).as_deref() == Some("0")
    });
    // The launcher knows that it is gone: nobody tries to connect again.
    let failed = format!("database \"{name}\" does not exist");
    other.exec("select pg_sleep(0)");
    assert!(!db.cluster().log().contains(&failed));
    drop(worker);
}

#[test]
fn what_commits_is_sent_though_nobody_looks() {
    let db = worker_server().database(Install::Extension);
    default_org(&db);
    let _worker = Worker::start(&db);
    let peer = Peer::new(|_| ok());
    let mut session = db.direct(SUPERUSER);
    hook(&mut session, &peer, "");
    for nth in 1..=20 {
        session.exec("select nightowls.enqueue_request('hook', '1')");
        // Twenty looks of five seconds would take longer than this waits.
        wait_until("it arrives", Duration::from_secs(20), || {
            peer.count() == nth
        });
    }
    session.exec("select nightowls.enqueue_request('hook', '2', run_at => clock_timestamp() + interval '300 ms')");
    wait_until("it arrives when it is due", LONG, || peer.count() == 21);
    assert_eq!(
        lines(&mut session, "select sender from nightowls.dispatch()"),
        ["worker"]
    );
}

#[test]
fn it_runs_the_clock_with_the_rights_of_a_service() {
    let db = worker_server().database(Install::Extension);
    default_org(&db);
    let mut session = db.direct(SUPERUSER);
    session.exec(&format!(
        "create function public.who(state jsonb, event nightowls.events) returns jsonb language sql return jsonb_build_object('who', current_user);
         grant execute on function public.who(jsonb, nightowls.events) to {SERVICE};
         select nightowls.create_projection('who', 'order', handler => 'public.who', mode => 'async');
         select nightowls.append_event('order', 'a', 'made')"
    ));
    let _worker = Worker::start(&db);
    wait_until("every part has run", LONG, || {
        session
            .value("select 1 from nightowls.clock_parts where ran_at is not null limit 1")
            .is_some()
            && session
                .value(
                    "select 1 from nightowls.clock_parts where ran_at is null or took_ms is null",
                )
                .is_none()
    });
    assert_eq!(
        lines(
            &mut session,
            "select part, error from nightowls.clock_parts where error is not null"
        ),
        [""; 0]
    );
    assert_eq!(
        lines(
            &mut session,
            "select state ->> 'who' from nightowls.projection_states"
        ),
        [SERVICE]
    );
}
