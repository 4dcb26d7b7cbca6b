//! The backfill: real requests to a server on loopback that makes vectors as a model does, or fails as one does.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::embeddings::{source_with, table};
use crate::fixture::{Random, default_org, lines};
use crate::projections::text;
use crate::support::peer::{Answer, Arrival, NetStandIn, Peer, status};
use crate::support::{
    Cluster, Db, Install, Session, WORKER, own_cluster_with, quote, wait_until, worker_server,
};
use crate::worker::Worker;

/// A database of each install, with what stands in for pg_net in the plain one.
fn on_each_sender(test: impl Fn(&Db)) {
    for install in Install::ALL {
        eprintln!("on the {install} install");
        let db = worker_server().database(install);
        allow_loopback(&db);
        let _net = (install == Install::Plain).then(|| NetStandIn::start(&db));
        test(&db);
    }
}

/// What the settings of the server say where the library is.
fn allow_loopback(db: &Db) {
    if db.install() == Install::Plain {
        db.owner().exec(
            "insert into nightowls.settings (name, value) values ('allow_http', 'true'), ('allow_private', 'true')",
        );
    }
}

/// A model of three numbers of a text.
fn model(text: &str) -> Value {
    let sum: u32 = text.bytes().map(u32::from).sum();
    json!([text.len(), sum % 1000, 1])
}

fn texts(arrival: &Arrival) -> Vec<String> {
    let body: Value = serde_json::from_str(&arrival.body).expect("the body is JSON");
    match &body["input"] {
        Value::Array(texts) => texts
            .iter()
            .map(|text| text.as_str().unwrap().to_owned())
            .collect(),
        text => vec![text.as_str().unwrap().to_owned()],
    }
}

fn json_answer(body: &Value) -> Answer {
    Answer::Status(
        200,
        "content-type: application/json\r\n".to_owned(),
        body.to_string(),
    )
}

/// What OpenAI's API answers, the last text first.
fn openai(arrival: &Arrival) -> Answer {
    let data: Vec<_> = texts(arrival)
        .iter()
        .enumerate()
        .rev()
        .map(|(index, text)| json!({"object": "embedding", "index": index, "embedding": model(text)}))
        .collect();
    json_answer(&json!({"object": "list", "data": data, "model": "small"}))
}

/// An endpoint `model` there.
fn endpoint(db: &Db, peer: &Peer, path: &str) {
    db.direct(db.install().owner()).exec(&format!(
        "select nightowls.set_config_value('model_key', 'sk-very-secret-key-of-a-model', secret => true);
         select nightowls.create_endpoint('model', {}, bearer => 'model_key', timeout => '5 seconds')",
        quote(&peer.url(path))
    ));
}

/// So many documents, of which `more` says how they are embedded.
fn documents(db: &Db, peer: &Peer, rows: u32, more: &str) {
    default_org(db);
    endpoint(db, peer, "/");
    table(db, "docs", rows);
    source_with(db, "docs", "'model'", more);
}

fn count(db: &Db, sql: &str) -> u64 {
    text(&mut db.superuser(), &format!("select count(*) from {sql}"))
        .parse()
        .unwrap()
}

/// Calls until `done`, each call in a transaction of its own.
fn call_until(session: &mut Session, call: &str, mut done: impl FnMut() -> bool) {
    wait_until("the backfill is through", Duration::from_secs(120), || {
        session.exec(call);
        done()
    });
}

const ONE: &str = "select nightowls.backfill_embeddings()";

#[test]
fn the_three_shapes_are_asked_and_understood() {
    on_each_sender(|db| {
        let peer = Peer::new(|arrival| match arrival.path.as_str() {
            "/v1/embeddings" => openai(arrival),
            "/api/embed" => {
                let vectors: Vec<_> = texts(arrival).iter().map(|text| model(text)).collect();
                json_answer(&json!({"model": "small", "embeddings": vectors}))
            }
            "/functions/v1/embed" => json_answer(&json!({"embedding": model(&texts(arrival)[0])})),
            _ => status(404),
        });
        default_org(db);
        endpoint(db, &peer, "");
        db.owner().exec(&format!(
            "select nightowls.create_endpoint('edge', {})",
            quote(&peer.url("/functions/v1/embed"))
        ));
        for (name, endpoint, shape) in [
            ("a", "'model'", "openai"),
            ("b", "'model'", "ollama"),
            ("c", "'edge'", "edge"),
        ] {
            table(db, name, 3);
            source_with(
                db,
                name,
                endpoint,
                &format!(", shape => '{shape}', options => '{{\"user\": \"owl\"}}'"),
            );
        }
        let mut service = db.service();
        call_until(&mut service, ONE, || {
            count(db, "nightowls._embedding_pending") == 0
        });
        for name in ["a", "b", "c"] {
            assert_eq!(
                lines(
                    &mut db.superuser(),
                    &format!("select embedding from public.{name} order by id")
                ),
                ["{15,228,1}", "{15,230,1}", "{15,232,1}"],
                "{name}"
            );
        }
        let arrivals = peer.arrivals();
        let paths = |path: &str| {
            arrivals
                .iter()
                .filter(|arrival| arrival.path == path)
                .count()
        };
        assert_eq!(
            (
                paths("/v1/embeddings"),
                paths("/api/embed"),
                paths("/functions/v1/embed")
            ),
            (1, 1, 3)
        );
        for arrival in &arrivals {
            let body: Value = serde_json::from_str(&arrival.body).unwrap();
            assert_eq!(
                (&body["model"], &body["user"]),
                (&json!("small"), &json!("owl"))
            );
            assert_eq!(arrival.header("content-type"), "application/json");
            if arrival.path != "/functions/v1/embed" {
                assert_eq!(
                    arrival.header("authorization"),
                    "Bearer sk-very-secret-key-of-a-model"
                );
            }
        }
    });
}

#[test]
fn beside_429_and_500_each_row_gets_exactly_one_vector_in_bounded_calls() {
    let rows = if std::env::var_os("NIGHTOWLS_FULL").is_some() {
        10_000
    } else {
        500
    };
    on_each_sender(|db| {
        let random = Mutex::new(Random::new(7));
        let peer = Peer::new(move |arrival| match random.lock().unwrap().below(10) {
            0 | 1 => Answer::Status(429, "retry-after: 0\r\n".to_owned(), String::new()),
            2 => status(500),
            3 => Answer::Reset,
            _ => openai(arrival),
        });
        documents(db, &peer, rows, "");
        let mut owner = db.owner();
        owner.exec(
            "create table public.saves (id bigint);
             create function public.note_save() returns trigger language plpgsql as $$
             begin insert into public.saves values (new.id); return null; end $$;
             create trigger note_save after update on public.docs for each row when (new.embedding is not null) execute function public.note_save()",
        );
        // Half of them by the function, at most 50 a call, the others by the procedure.
        let mut service = db.service();
        let half = u64::from(rows / 2);
        let mut saved = 0;
        wait_until("half of them are saved", Duration::from_secs(600), || {
            let one: u64 = text(&mut service, ONE).parse().unwrap();
            // By pg_net a call saves what several have asked for.
            assert!(
                one <= 50 || db.install() == Install::Plain,
                "{one} in one call"
            );
            saved += one;
            saved >= half
        });
        wait_until("all are saved", Duration::from_secs(600), || {
            service.exec("call nightowls.run_backfill(max_ms => 2000)");
            count(db, "nightowls._embedding_pending") == 0
        });
        assert_eq!(
            text(
                &mut owner,
                "select count(*) || ' ' || count(distinct id) from public.saves"
            ),
            format!("{rows} {rows}")
        );
        assert_eq!(count(db, "public.docs where embedding is null"), 0);
        assert_eq!(
            count(db, "nightowls.failed_embeddings"),
            0,
            "no row is to blame"
        );
        assert_eq!(count(db, "nightowls._embedding_requests"), 0);
        let failed = peer
            .arrivals()
            .iter()
            .filter(|arrival| arrival.answered != 200)
            .count();
        assert!(failed > 0);
        // An idle call asks nobody.
        let before = peer.count();
        assert_eq!(text(&mut service, ONE), "0");
        assert_eq!(peer.count(), before);
    });
}

#[test]
fn the_worker_asks_for_what_is_missing_though_nobody_calls() {
    let db = worker_server().database(Install::Extension);
    let peer = Peer::new(openai);
    documents(&db, &peer, 70, "");
    let _worker = Worker::start(&db);
    wait_until("all are embedded", Duration::from_secs(120), || {
        count(&db, "public.docs where embedding is null") == 0
    });
    // Who commits more wakes it; else it looks each five seconds.
    db.owner()
        .exec("update public.docs set body = 'another' where id = 1");
    wait_until("it is embedded again", Duration::from_secs(60), || {
        lines(
            &mut db.superuser(),
            "select embedding from public.docs where id = 1",
        ) == ["{16,470,1}"]
    });
}

#[test]
fn a_text_that_is_refused_stops_no_other_and_is_given_up() {
    on_each_sender(|db| {
        let peer = Peer::new(|arrival| {
            if texts(arrival).iter().any(|text| text.contains("body 7")) {
                let said = json!({"error": "not with key sk-very-secret-key-of-a-model"});
                Answer::Status(400, String::new(), said.to_string())
            } else {
                openai(arrival)
            }
        });
        documents(db, &peer, 9, ", max_attempts => 1");
        let mut service = db.service();
        call_until(&mut service, ONE, || {
            count(db, "nightowls.failed_embeddings") == 1
        });
        call_until(&mut service, ONE, || {
            count(db, "public.docs where embedding is null") == 1
        });
        assert_eq!(
            lines(
                &mut service,
                "select key, error from nightowls.failed_embeddings"
            ),
            [r#"7 HTTP 400: {"error": "not with key [redacted]"}"#.replace(": \"not", ":\"not")]
        );
        assert_eq!(
            lines(
                &mut service,
                "select pending, given_up, failures from nightowls.list_embedding_sources()"
            ),
            ["0 1 0"]
        );
        assert_eq!(
            lines(
                &mut service,
                "select name, ok from nightowls._health_embeddings() order by name"
            ),
            ["given_up f", "requests t", "triggers t"]
        );
    });
}

#[test]
fn a_pause_that_is_asked_for_is_kept_and_no_row_is_blamed() {
    on_each_sender(|db| {
        let wants = Arc::new(AtomicUsize::new(429));
        let asked = Arc::clone(&wants);
        let peer = Peer::new(move |arrival| match asked.load(Ordering::SeqCst) {
            200 => openai(arrival),
            429 => Answer::Status(
                429,
                "Retry-After: 3000\r\n".to_owned(),
                "slow down".to_owned(),
            ),
            503 => {
                let date = "Fri, 31 Dec 2100 23:59:59 GMT";
                Answer::Status(503, format!("retry-after: {date}\r\n"), String::new())
            }
            other => status(other as u16),
        });
        documents(db, &peer, 2, ", max_attempts => 1");
        let mut service = db.service();
        let sources = "select failures, last_error, retry_at > clock_timestamp() + interval '40 minutes', pending, given_up \
                       from nightowls.list_embedding_sources()";
        for (status, seen, kept) in [
            (429, "HTTP 429: slow down", "t"),
            (503, "HTTP 503: ", "t"),
            (401, "HTTP 401: ", "f"),
        ] {
            wants.store(status, Ordering::SeqCst);
            service.exec("select nightowls.retry_embeddings('docs')");
            let before = peer.count();
            call_until(&mut service, ONE, || {
                lines(
                    &mut db.superuser(),
                    "select failures from nightowls._embedding_states",
                ) == ["1"]
            });
            assert_eq!(
                lines(&mut service, sources),
                [format!("1 {seen} {kept} 2 0")]
            );
            if kept == "t" {
                for _ in 0..3 {
                    assert_eq!(text(&mut service, ONE), "0");
                }
                assert_eq!(peer.count(), before + 1);
            }
        }
        wants.store(200, Ordering::SeqCst);
        service.exec("select nightowls.retry_embeddings('docs')");
        call_until(&mut service, ONE, || {
            count(db, "nightowls._embedding_pending") == 0
        });
        assert_eq!(count(db, "public.docs where embedding is null"), 0);
    });
}

#[test]
fn answers_that_hold_no_vectors_or_others_are_no_vectors() {
    on_each_sender(|db| {
        let answers = [
            "",
            "not JSON",
            "{}",
            r#"{"data": []}"#,
            r#"{"data": [{"index": 0, "embedding": [1, 2, 3, 4]}]}"#,
            r#"{"data": [{"index": 0, "embedding": []}]}"#,
            r#"{"data": [{"index": 0, "embedding": ["1", "2"]}]}"#,
            r#"{"data": [{"index": 0, "embedding": [1]}, {"index": 1, "embedding": [2]}]}"#,
        ];
        let next = Arc::new(AtomicUsize::new(0));
        let given = Arc::clone(&next);
        let peer = Peer::new(move |_| match answers.get(given.load(Ordering::SeqCst)) {
            Some(answer) => Answer::Status(200, String::new(), (*answer).to_owned()),
            // A short one, with a number that is too small for real.
            None => json_answer(&json!({"data": [{"index": 0, "embedding": [0.5, 1e-60]}]})),
        });
        documents(db, &peer, 1, "");
        let mut service = db.service();
        for (nth, answer) in answers.iter().enumerate() {
            next.store(nth, Ordering::SeqCst);
            service.exec("select nightowls.retry_embeddings('docs')");
            let mut superuser = db.superuser();
            call_until(&mut service, ONE, || {
                text(
                    &mut superuser,
                    "select failures from nightowls._embedding_states",
                ) == "1"
            });
            let error = text(
                &mut superuser,
                "select last_error from nightowls._embedding_states",
            );
            assert!(error.starts_with("the answer"), "{answer}: {error}");
            assert_eq!(
                count(db, "public.docs where embedding is null"),
                1,
                "{answer}"
            );
        }
        next.store(answers.len(), Ordering::SeqCst);
        service.exec("select nightowls.retry_embeddings('docs')");
        call_until(&mut service, ONE, || {
            count(db, "nightowls._embedding_pending") == 0
        });
        assert_eq!(
            text(&mut db.superuser(), "select embedding from public.docs"),
            "{0.5,0,0}"
        );
    });
}

#[test]
fn texts_in_chunks_go_in_one_request_and_fill_the_table_of_chunks() {
    on_each_sender(|db| {
        let peer = Peer::new(openai);
        documents(
            db,
            &peer,
            5,
            ", max_chars => 100, chunk_chars => 8, overlap => 2, batch_size => 4",
        );
        let mut service = db.service();
        call_until(&mut service, ONE, || {
            count(db, "nightowls._embedding_pending") == 0
        });
        assert_eq!(
            lines(
                &mut service,
                "select chunk, content, embedding from nightowls.embedding_chunks where key = '3' order by chunk"
            ),
            [
                "0 title 3: {8,687,1}",
                "1 3: body  {8,603,1}",
                "2 y 3 {3,204,1}"
            ]
        );
        assert_eq!(count(db, "nightowls.embedding_chunks"), 15);
        assert_eq!(count(db, "public.docs where embedding is not null"), 5);
        assert!(
            peer.arrivals()
                .iter()
                .all(|arrival| texts(arrival).len() <= 4)
        );
    });
}

#[test]
fn a_query_is_embedded_while_it_waits_where_the_library_is() {
    on_each_sender(|db| {
        let wants = Arc::new(AtomicUsize::new(200));
        let asked = Arc::clone(&wants);
        let peer = Peer::new(move |arrival| match asked.load(Ordering::SeqCst) {
            200 => openai(arrival),
            1 => Answer::Hang(Duration::from_secs(60)),
            other => Answer::Status(
                other as u16,
                "retry-after: 9\r\n".to_owned(),
                "no".to_owned(),
            ),
        });
        documents(db, &peer, 0, "");
        let mut service = db.service();
        let call = "select nightowls.embed('docs', 'an owl', max_ms => 300)";
        if db.install() == Install::Plain {
            let refusal = service.refused(call);
            assert_eq!(refusal.code, "0A000");
            assert!(refusal.hint.contains("edge function"));
            return;
        }
        assert_eq!(
            text(&mut service, "select nightowls.embed('docs', 'an owl')"),
            "{6,577,1}"
        );
        for (status, code) in [(429, "53400"), (500, "58000"), (403, "58000"), (1, "58000")] {
            wants.store(status, Ordering::SeqCst);
            let refusal = service.refused(call);
            assert_eq!(refusal.code, code, "{refusal}");
            assert!(!format!("{refusal}").contains("sk-very"), "{refusal}");
            if status == 1 {
                assert!(refusal.detail.starts_with("no answer within"), "{refusal}");
            }
        }
        assert_eq!(
            service.refused("select nightowls.embed('docs', ' ')").code,
            "22023"
        );
        assert_eq!(
            service.refused("select nightowls.embed('docs', null)").code,
            "22004"
        );
        assert_eq!(
            service.refused("select nightowls.embed('dogs', 'x')").code,
            "NW007"
        );
        db.owner()
            .exec("select nightowls.alter_embedding_source('docs', endpoint => '')");
        assert_eq!(service.refused(call).code, "55000");
    });
}

#[test]
fn a_call_that_waits_can_be_cancelled_and_its_rows_are_not_lost() {
    on_each_sender(|db| {
        if db.install() == Install::Plain {
            return;
        }
        let hangs = Arc::new(AtomicBool::new(true));
        let hang = Arc::clone(&hangs);
        let peer = Peer::new(move |arrival| {
            if hang.load(Ordering::SeqCst) {
                Answer::Hang(Duration::from_secs(60))
            } else {
                openai(arrival)
            }
        });
        documents(db, &peer, 3, "");
        let mut watcher = db.superuser();
        let (mut function, mut procedure) = (db.service(), db.service());
        let pids = [function.pid(), procedure.pid()];
        thread::scope(|scope| {
            let waiting = scope.spawn(move || function.refused(ONE).code);
            wait_until("it is asked", Duration::from_secs(10), || {
                peer.under_way() == 1
            });
            watcher.exec(&format!("select pg_cancel_backend({})", pids[0]));
            assert_eq!(waiting.join().unwrap(), "57014");
        });
        wait_until("the peer has noticed", Duration::from_secs(10), || {
            peer.under_way() == 0
        });
        // The function's claims were rolled back with it; the procedure's are committed while it waits, and it holds nothing.
        thread::scope(|scope| {
            let waiting =
                scope.spawn(move || procedure.refused("call nightowls.run_backfill()").code);
            wait_until("it is asked", Duration::from_secs(10), || {
                peer.under_way() == 1
            });
            assert_eq!(
                lines(
                    &mut watcher,
                    &format!(
                        "select backend_xid is null, backend_xmin is null, (select count(*) from pg_locks l where l.pid = a.pid and l.locktype in ('relation', 'advisory'))
                           from pg_stat_activity a where pid = {}",
                        pids[1]
                    )
                ),
                ["t t 0"]
            );
            assert_eq!(
                count(db, "nightowls._embedding_pending where claim is not null"),
                3
            );
            watcher.exec(&format!("select pg_terminate_backend({})", pids[1]));
            assert!(["57P01", "08006"].contains(&waiting.join().unwrap().as_str()));
        });
        hangs.store(false, Ordering::SeqCst);
        // As when the lease has run out.
        watcher.exec("update nightowls._embedding_pending set due_at = clock_timestamp()");
        let mut service = db.service();
        call_until(&mut service, ONE, || {
            count(db, "nightowls._embedding_pending") == 0
        });
        assert_eq!(count(db, "public.docs where embedding is null"), 0);
    });
}

#[test]
fn a_source_that_is_broken_stops_no_other() {
    on_each_sender(|db| {
        let peer = Peer::new(openai);
        default_org(db);
        endpoint(db, &peer, "/v1/embeddings");
        for name in ["a", "b", "c", "good"] {
            table(db, name, 2);
            source_with(db, name, "'model'", "");
        }
        let mut owner = db.owner();
        owner.exec(
            "drop table public.a cascade; alter table public.b rename title to headline;
             select nightowls.create_endpoint('nowhere', 'https://example.com'), nightowls.alter_embedding_source('c', endpoint => 'nowhere'),
                    nightowls.drop_endpoint('nowhere')",
        );
        assert_eq!(
            owner
                .refused("select nightowls.alter_embedding_source('good', endpoint => 'nowhere')")
                .code,
            "NW007"
        );
        let mut service = db.service();
        call_until(&mut service, ONE, || {
            count(db, "public.good where embedding is null") == 0
        });
        call_until(&mut service, ONE, || {
            count(db, "nightowls._embedding_states where failures > 0") == 3
        });
        let errors: BTreeMap<_, _> = service
            .rows("select name, last_error from nightowls.list_embedding_sources()")
            .into_iter()
            .map(|row| (row[0].clone().unwrap(), row[1].clone().unwrap_or_default()))
            .collect();
        assert!(errors["a"].contains("does not exist"), "{errors:?}");
        assert!(errors["b"].contains("title"), "{errors:?}");
        assert!(errors["c"].contains("nowhere"), "{errors:?}");
        assert_eq!(errors["good"], "");
        assert_eq!(
            lines(
                &mut service,
                "select ok, value from nightowls._health_embeddings() where name = 'triggers'"
            ),
            ["f missing or switched off: a"]
        );
    });
}

#[test]
fn a_request_that_nobody_ends_is_made_again_and_an_answer_that_comes_late_changes_nothing() {
    on_each_sender(|db| {
        let peer = Peer::new(openai);
        documents(db, &peer, 4, "");
        // As the worker does it, in two transactions.
        let mut worker = db.service();
        let begin = "select org_id, request_id, body::jsonb -> 'input' ->> 0 from nightowls._begin_backfill(50)";
        let end = |row: &[Option<String>], vectors: &str| {
            format!(
                "select nightowls._end_backfill('{}', {}, 200, '{{}}', '{{\"data\": [{vectors}]}}', null)",
                row[0].as_ref().unwrap(),
                row[1].as_ref().unwrap()
            )
        };
        let vectors = (1..=4)
            .map(|n| format!("{{\"index\": {}, \"embedding\": [{n}]}}", n - 1))
            .collect::<Vec<_>>()
            .join(",");
        let first = worker.rows(begin);
        assert_eq!(first.len(), 1);
        assert!(worker.rows(begin).is_empty(), "all are claimed");
        db.superuser()
            .exec("update nightowls._embedding_pending set due_at = clock_timestamp()");
        let second = worker.rows(begin);
        assert_eq!(second.len(), 1);
        assert_eq!(
            text(&mut worker, &end(&first[0], &vectors)),
            "0",
            "too late"
        );
        assert_eq!(count(db, "public.docs where embedding is null"), 4);
        assert_eq!(text(&mut worker, &end(&second[0], &vectors)), "4");
        assert_eq!(
            text(&mut worker, &end(&second[0], &vectors)),
            "0",
            "ended already"
        );
        assert_eq!(count(db, "public.docs where embedding is null"), 0);
        assert_eq!(count(db, "nightowls._embedding_requests"), 0);

        // A source that is dropped meanwhile, or altered.
        let mut owner = db.owner();
        owner.exec("update public.docs set body = 'z'");
        let third = worker.rows(begin);
        owner.exec("select nightowls.drop_embedding_source('docs')");
        assert_eq!(text(&mut worker, &end(&third[0], &vectors)), "0");
        assert_eq!(count(db, "public.docs where embedding is null"), 4);
    });
}

#[test]
fn a_server_that_is_killed_loses_no_row_and_saves_none_twice() {
    let rounds = if std::env::var_os("NIGHTOWLS_FULL").is_some() {
        10
    } else {
        2
    };
    let rows = 120 * rounds;
    own_cluster_with(WORKER, |cluster: &Arc<Cluster>| {
        for install in Install::ALL {
            let db = &cluster.database(install);
            allow_loopback(db);
            let peer = Peer::new(openai);
            documents(db, &peer, rows, ", batch_size => 5");
            db.owner().exec(
                "create table public.saves (id bigint, embedding real[]);
                 create function public.note_save() returns trigger language plpgsql as $$
                 begin insert into public.saves values (new.id, new.embedding); return null; end $$;
                 create trigger note_save after update on public.docs for each row when (new.embedding is not null) execute function public.note_save()",
            );
            for round in 0..rounds {
                // Its queue dies with the server, as pg_net's does.
                let net = (install == Install::Plain && round == 0).then(|| NetStandIn::start(db));
                let goal = count(db, "public.saves") + 20;
                thread::scope(|scope| {
                    let worker = scope.spawn(|| {
                        let mut session = db.service();
                        while session
                            .try_exec("call nightowls.run_backfill(100, 500)")
                            .is_ok()
                        {}
                    });
                    if install == Install::Extension || round == 0 {
                        wait_until("some are saved", Duration::from_secs(60), || {
                            count(db, "public.saves") >= goal
                        });
                    }
                    cluster.kill9_postmaster_and_restart();
                    worker.join().unwrap();
                });
                drop(net);
                // As when the leases have run out.
                db.superuser().exec("update nightowls._embedding_pending set due_at = clock_timestamp() where claim is not null");
            }
            if install == Install::Plain {
                db.superuser().exec("drop schema net cascade");
            }
            let _net = (install == Install::Plain).then(|| NetStandIn::start(db));
            let mut service = db.service();
            call_until(
                &mut service,
                "call nightowls.run_backfill(1000, 1000)",
                || count(db, "nightowls._embedding_pending") == 0,
            );
            assert_eq!(
                text(
                    &mut db.superuser(),
                    "select count(*) || ' ' || count(distinct id) from public.saves"
                ),
                format!("{rows} {rows}")
            );
            assert_eq!(
                count(
                    db,
                    "public.docs d where not exists (select from public.saves s where s.id = d.id and s.embedding = d.embedding)"
                ),
                0
            );
        }
    });
}

#[test]
fn an_idle_call_looks_at_a_handful_of_pages_whatever_was_embedded_before() {
    on_each_sender(|db| {
        let peer = Peer::new(openai);
        documents(db, &peer, 0, ", batch_size => 500");
        let mut superuser = db.superuser();
        let mut service = db.service();
        // All are noted, and so long ago that the line has a mark.
        db.owner().exec("insert into public.docs (id, title) select n, 'title ' || n from generate_series(1, 1500) n");
        superuser.exec("update nightowls._embedding_pending set due_at = clock_timestamp() - interval '1 hour'");
        let mut holder = db.superuser();
        holder.exec("begin isolation level repeatable read; select 1");
        call_until(
            &mut service,
            "select nightowls.backfill_embeddings(1000)",
            || count(db, "nightowls._embedding_pending") == 0,
        );
        let pages = (0..3)
            .map(|_| {
                let call = "explain (analyze, buffers, format json) select nightowls.backfill_embeddings()";
                let plan: Value = serde_json::from_str(&text(&mut service, call)).unwrap();
                let of = |name: &str| plan[0]["Plan"][name].as_u64().unwrap();
                of("Shared Hit Blocks") + of("Shared Read Blocks")
            })
            .min()
            .unwrap();
        holder.exec("rollback");
        assert!(pages < 80, "{}: {pages} pages", db.install());
    });
}

#[test]
fn the_page_on_embeddings_does_what_it_says() {
    const PAGE: &str = include_str!("../docs/embeddings.md");
    on_each_sender(|db| {
        let peer = Peer::new(|arrival| {
            let data: Vec<_> = (0..texts(arrival).len())
                .map(|index| json!({"index": index, "embedding": [0.5, 0.25]}))
                .collect();
            json_answer(&json!({"data": data}))
        });
        default_org(db);
        let mut owner = db.owner();
        let blocks: Vec<_> = PAGE
            .split("```sql\n")
            .skip(1)
            .map(|rest| {
                rest.split_once("```").unwrap().0.replace(
                    "https://api.openai.com/v1/embeddings",
                    &peer.url("/v1/embeddings"),
                )
            })
            .collect();
        assert!(blocks.len() > 5);
        for block in blocks {
            owner.exec(&block);
        }
        assert_eq!(count(db, "public.articles where embedding is not null"), 1);
        let mut service = db.service();
        call_until(&mut service, ONE, || {
            count(
                db,
                "public.articles where embedding[1] = 0.5 and cardinality(embedding) = 1536",
            ) == 2
        });
        if db.install() == Install::Extension && db.cluster().offers("vector") {
            db.superuser().exec("create extension vector");
            let search = PAGE
                .split("```text\n")
                .last()
                .unwrap()
                .split_once("```")
                .unwrap()
                .0
                .replace("embedding <=>", "embedding::vector <=>");
            assert_eq!(lines(&mut owner, &search).len(), 2);
        }
    });
}
