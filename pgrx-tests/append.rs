//! The contract of append: expectations, idempotence, batches, and what
//! happens when several append at once.

use std::time::Duration;

use crate::fixture::{default_org, digest, is_blocked, joined, lines, org_apart_from, together};
use crate::support::{Db, Refusal, SERVICE, Session, on_each_install, on_each_route, wait_until};

/// An event_id, known by a number.
fn id(number: u32) -> String {
    format!("00000000-0000-4000-8000-{number:012}")
}

/// A batch: each event has a type, and perhaps an id. Its payload repeats the type.
fn batch(events: &[(&str, Option<u32>)]) -> String {
    let events: Vec<String> = events
        .iter()
        .map(|(kind, number)| {
            let id = number.map_or("null".to_owned(), |number| format!("\"{}\"", id(number)));
            format!(
                r#"{{"event_type": "{kind}", "payload": {{"is": "{kind}"}}, "event_id": {id}}}"#
            )
        })
        .collect();
    format!("[{}]", events.join(", "))
}

/// Some appends: each names an aggregate of type cart, and its batch.
fn appends(parts: &[(&str, String)]) -> String {
    let parts: Vec<String> = parts
        .iter()
        .map(|(aggregate, events)| {
            format!(
                r#"{{"aggregate_type": "cart", "aggregate_id": "{aggregate}", "events": {events}}}"#
            )
        })
        .collect();
    format!("[{}]", parts.join(", "))
}

fn append_single(aggregate: &str, kind: &str, number: u32, more: &str) -> String {
    format!(
        "select * from nightowls.append_event('cart', '{aggregate}', '{kind}', '{{\"is\": \"{kind}\"}}', \
         event_id => '{}'{more})",
        id(number)
    )
}

fn append_batch(aggregate: &str, events: &[(&str, Option<u32>)], more: &str) -> String {
    format!(
        "select * from nightowls.append_events('cart', '{aggregate}', '{}'{more})",
        batch(events)
    )
}

fn append_parts(parts: &[(&str, String)]) -> String {
    format!("select * from nightowls.append_many('{}')", appends(parts))
}

/// Asserts that `sql` is refused with `code` and `detail`, has a hint, leaves
/// the log as it was and the connection usable.
#[track_caller]
fn refused_and_nothing_written(
    db: &Db,
    session: &mut Session,
    sql: &str,
    code: &str,
    detail: &str,
) -> Refusal {
    let before = digest(db);
    let refusal = session.refused(sql);
    assert_eq!(refusal.code, code, "{sql}\n{refusal}");
    assert_eq!(refusal.detail, detail, "{sql}\n{refusal}");
    assert!(!refusal.hint.is_empty(), "{sql}\n{refusal}");
    assert_eq!(digest(db), before, "{sql}");
    assert!(session.alive(), "{sql}");
    refusal
}

fn versions_of(db: &Db, aggregate: &str) -> Vec<String> {
    lines(
        &mut db.service(),
        &format!(
            "select version from nightowls.read_aggregate('cart', '{aggregate}', max_events => 100000)"
        ),
    )
}

/// `1 2 3 … last`
fn up_to(last: usize) -> Vec<String> {
    (1..=last).map(|version| version.to_string()).collect()
}

// One call ----------------------------------------------------------------------------------------

#[test]
fn each_expectation_meets_each_state_in_each_form_as_the_contract_says() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        let mut number = 0;
        for (state, head) in [("new", 0), ("existing", 3)] {
            for expected in [
                None,
                Some(-1),
                Some(0),
                Some(2),
                Some(3),
                Some(4),
                Some(999_999_999_999_999_999),
            ] {
                for form in ["single", "batch", "many"] {
                    number += 1;
                    let aggregate = format!("{state}-{number}");
                    let beside = format!("beside-{number}");
                    if head > 0 {
                        service.exec(&append_batch(&aggregate, &[("old", None); 3], ""));
                    }
                    let argument = expected.map_or("null".to_owned(), |n: i64| n.to_string());
                    let (sql, count) = match form {
                        "single" => (
                            format!(
                                "select 'cart', '{aggregate}', r.version, r.position \
                                 from nightowls.append_event('cart', '{aggregate}', 'new', expected_version => {argument}) r"
                            ),
                            1,
                        ),
                        "batch" => (
                            format!(
                                "select 'cart', '{aggregate}', r.version, r.position \
                                 from nightowls.append_events('cart', '{aggregate}', '{}', {argument}) r",
                                batch(&[("new", None), ("newer", None)])
                            ),
                            2,
                        ),
                        _ => (
                            format!(
                                r#"select r.aggregate_type, r.aggregate_id, r.version, r.position from nightowls.append_many('[
                                    {{"aggregate_type": "cart", "aggregate_id": "{beside}", "events": {}}},
                                    {{"aggregate_type": "cart", "aggregate_id": "{aggregate}", "events": {}, "expected_version": {argument}}}
                                ]') r where r.aggregate_id = '{aggregate}'"#,
                                batch(&[("beside", None)]),
                                batch(&[("new", None), ("newer", None)])
                            ),
                            2,
                        ),
                    };
                    let what = format!("{state} aggregate, {argument} expected, {form}");
                    let fits = match expected {
                        None => true,
                        Some(-1) => head > 0,
                        Some(n) => n == head,
                    };
                    if fits {
                        let rows = service.rows(&sql);
                        let written = service.rows(&format!(
                            "select aggregate_type, aggregate_id, version, position \
                             from nightowls.read_aggregate('cart', '{aggregate}', {})",
                            head + 1
                        ));
                        assert_eq!(rows, written, "{what}");
                        assert_eq!(rows.len(), count, "{what}");
                        assert_eq!(
                            versions_of(db, &aggregate),
                            up_to(head as usize + count),
                            "{what}"
                        );
                    } else {
                        let refusal = refused_and_nothing_written(
                            db,
                            &mut service,
                            &sql,
                            "NW001",
                            &format!("Expected version {argument}, actual version {head}."),
                        );
                        assert!(
                            refusal.message.contains(&format!("cart \"{aggregate}\"")),
                            "{what}: {refusal}"
                        );
                    }
                }
            }
        }
    });
}

#[test]
fn a_batch_comes_back_in_its_own_order_with_rising_positions() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        let kinds: Vec<String> = (0..100)
            .map(|n| format!("kind{}", (n * 37) % 100))
            .collect();
        let events: Vec<(&str, Option<u32>)> =
            kinds.iter().map(|kind| (kind.as_str(), None)).collect();
        let rows = service.rows(&append_batch("a", &events, ""));
        let versions: Vec<String> = rows.iter().flat_map(|row| row[1].clone()).collect();
        assert_eq!(versions, up_to(100));
        let positions: Vec<i64> = rows
            .iter()
            .map(|row| {
                row[0]
                    .as_deref()
                    .expect("a position")
                    .parse()
                    .expect("a number")
            })
            .collect();
        assert!(
            positions.is_sorted_by(|one, next| one < next),
            "{positions:?}"
        );
        let written = lines(
            &mut service,
            "select event_type from nightowls.read_aggregate('cart', 'a')",
        );
        assert_eq!(written, kinds);
    });
}

#[test]
fn append_many_returns_every_event_in_the_order_of_the_log() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        service.exec(&append_single("b", "old", 1, ""));
        let sql = append_parts(&[
            ("b", batch(&[("x", None), ("y", None)])),
            ("B", batch(&[("x", None)])),
            ("a", batch(&[("x", None), ("y", None)])),
        ]);
        let sql = sql.replace('*', "aggregate_id, version, position");
        let rows = joined(service.rows(&sql));
        let log = lines(
            &mut service,
            "select aggregate_id, version, position from nightowls.read_events() where event_type <> 'old'",
        );
        assert_eq!(rows, log);
        // By bytes, whatever the database's collation is.
        let keys: Vec<&str> = rows
            .iter()
            .map(|row| row.rsplit_once(' ').expect("three columns").0)
            .collect();
        assert_eq!(keys, ["B 1", "a 1", "a 2", "b 2", "b 3"]);
    });
}

#[test]
fn an_event_is_kept_as_it_was_given() {
    on_each_route(|db| {
        let org = default_org(db);
        let mut service = db.service();
        let payload =
            r#"{"a": [1.10, 12345678901234567890.123456789, null, true, "ä€😀"], "": {}}"#;
        let metadata = r#"{"actor_id": "ann", "trace_id": "t"}"#;
        service.exec(&format!(
            "select nightowls.append_event(aggregate_type => 'cart', aggregate_id => 'a', event_type => 'made', \
             payload => '{payload}', metadata => '{metadata}', event_id => '{}')",
            id(1)
        ));
        service.exec(&format!(
            r#"select nightowls.append_events('cart', 'a', '[{{"event_type": "made", "payload": {payload}, "metadata": {metadata}, "event_id": "{}"}}]')"#,
            id(2)
        ));
        service.exec("select nightowls.append_event('cart', 'a', 'bare')");
        service.exec(r#"select nightowls.append_events('cart', 'a', '[{"event_type": "bare"}]')"#);
        let full = |version: u32| format!("{org} {version} made t t {} t", id(version));
        let bare = |version: u32| format!("{org} {version} bare f f null t");
        assert_eq!(
            lines(
                &mut service,
                &format!(
                    "select org_id, version, event_type, payload::text = '{payload}'::jsonb::text, metadata = '{metadata}', \
                       event_id, created_at between clock_timestamp() - interval '1 minute' and clock_timestamp() \
                     from nightowls.read_aggregate('cart', 'a')"
                )
            ),
            [full(1), full(2), bare(3), bare(4)]
        );
        let defaults = service.value(
            "select count(*) from nightowls.events where event_type = 'bare' and payload = '{}' and metadata = '{}'",
        );
        assert_eq!(defaults.as_deref(), Some("2"));
    });
}

#[test]
fn a_fence_that_was_never_granted_is_refused() {
    on_each_install(|db| {
        default_org(db);
        let mut service = db.service();
        for (arguments, code) in [
            ("container => 'thread', fence => 1", "NW003"),
            ("container => 'thread'", "22004"),
            ("fence => 1", "22004"),
        ] {
            for call in [
                format!("select nightowls.append_event('cart', 'a', 'made', {arguments})"),
                format!(
                    r#"select nightowls.append_events('cart', 'a', '[{{"event_type": "made"}}]', {arguments})"#
                ),
            ] {
                let refusal = service.refused(&call);
                assert_eq!(refusal.code, code, "{call}: {refusal}");
            }
        }
        assert!(versions_of(db, "a").is_empty());
    });
}

#[test]
fn an_id_made_of_a_foreign_one_is_the_uuid_v5_that_others_make() {
    on_each_install(|db| {
        let mut service = db.service();
        for (source, external, expected) in [
            (
                "stripe",
                "evt_1".to_owned(),
                "a4164b29-e067-570b-9a4a-688bb1299159",
            ),
            ("", String::new(), "573f14b4-fe5d-55fd-918f-5edb1103b55a"),
            // Around the edges of SHA-1's blocks.
            (
                "github",
                "x".repeat(39),
                "c6292aac-3f84-54ca-b56a-8efabb17e899",
            ),
            (
                "github",
                "x".repeat(40),
                "9d7e1a54-f5b4-54f2-a738-5208325971da",
            ),
            (
                "github",
                "x".repeat(47),
                "60016b58-c575-59f4-abeb-bfbd60df6d89",
            ),
            (
                "github",
                "x".repeat(48),
                "46987d17-4489-5b85-ba38-9de94731f39c",
            ),
            (
                "ä",
                "🦉".repeat(100),
                "80924ebd-c750-5ea9-b910-9556569a3978",
            ),
        ] {
            let made = service.value(&format!(
                "select nightowls.event_id_for('{source}', '{external}')"
            ));
            assert_eq!(made.as_deref(), Some(expected), "{source} {external}");
        }
        for arguments in ["null, 'evt_1'", "'stripe', null"] {
            assert_eq!(
                service.value(&format!("select nightowls.event_id_for({arguments})")),
                None
            );
        }
    });
}

#[test]
fn the_index_by_type_is_made_once_and_by_the_owner_only() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        let there = "select count(*) from pg_indexes where schemaname = 'nightowls' and indexdef like '%(org_id, event_type, \"position\")%'";
        assert_eq!(owner.value(there).as_deref(), Some("0"));
        assert_eq!(
            db.service()
                .refused("select nightowls.create_type_index()")
                .code,
            "42501"
        );
        for _ in 0..2 {
            owner.exec("select nightowls.create_type_index()");
            assert_eq!(owner.value(there).as_deref(), Some("1"));
        }
        db.service()
            .exec(&append_batch("a", &[("x", Some(1)), ("y", None)], ""));
        assert_eq!(versions_of(db, "a"), up_to(2));
    });
}

// Retries -----------------------------------------------------------------------------------------

#[test]
fn a_retried_event_returns_its_first_result_whatever_it_expects() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        let first = lines(
            &mut service,
            &append_single("a", "made", 1, ", expected_version => 0"),
        );
        service.exec(&append_single("a", "paid", 2, ""));
        let before = digest(db);
        for more in [
            "",
            ", expected_version => 0",
            ", expected_version => 9",
            ", expected_version => -1",
        ] {
            assert_eq!(
                lines(&mut service, &append_single("a", "made", 1, more)),
                first,
                "{more}"
            );
        }
        // Who asks, and when, is not the event: a retry is another request.
        assert_eq!(
            lines(
                &mut service,
                &append_single("a", "made", 1, r#", metadata => '{"request_id": "retry"}'"#)
            ),
            first
        );
        assert_eq!(digest(db), before);
    });
}

#[test]
fn an_event_id_with_another_body_is_refused_with_nw002() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        service.exec(&append_single("a", "made", 1, ""));
        let known = id(1);
        for (what, arguments) in [
            (
                "another payload",
                r#"'cart', 'a', 'made', '{"is": "other"}'"#,
            ),
            ("no payload", "'cart', 'a', 'made'"),
            (
                "another type of event",
                r#"'cart', 'a', 'paid', '{"is": "made"}'"#,
            ),
            (
                "another aggregate",
                r#"'cart', 'b', 'made', '{"is": "made"}'"#,
            ),
            (
                "another type of aggregate",
                r#"'order', 'a', 'made', '{"is": "made"}'"#,
            ),
        ] {
            for expected in ["null", "0", "1", "7"] {
                let refusal = refused_and_nothing_written(
                    db,
                    &mut service,
                    &format!(
                        "select nightowls.append_event({arguments}, event_id => '{known}', expected_version => {expected})"
                    ),
                    "NW002",
                    "It is version 1 of aggregate cart \"a\".",
                );
                assert!(refusal.message.contains(&known), "{what}: {refusal}");
            }
        }
    });
}

#[test]
fn a_batch_is_retried_whole_or_in_part_but_never_mixed_with_new_events() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        let (a, b, c, new) = (
            ("a", Some(1)),
            ("b", Some(2)),
            ("c", Some(3)),
            ("new", Some(4)),
        );
        let first = lines(
            &mut service,
            &append_batch("x", &[a, b, c], ", expected_version => 0"),
        );
        assert_eq!(first.len(), 3);
        service.exec(&append_batch("x", &[("later", None)], ""));

        for (what, events, rows) in [
            ("the same", vec![a, b, c], 0..3),
            ("a prefix", vec![a, b], 0..2),
            ("a suffix", vec![b, c], 1..3),
            ("one of them", vec![b], 1..2),
        ] {
            let before = digest(db);
            for more in ["", ", expected_version => 0", ", expected_version => 99"] {
                let again = lines(&mut service, &append_batch("x", &events, more));
                assert_eq!(again, first[rows.clone()], "{what}{more}");
            }
            assert_eq!(digest(db), before, "{what}");
        }
        assert_eq!(
            lines(&mut service, &append_single("x", "b", 2, "")),
            first[1..2],
            "one of them as a single event"
        );

        let other = ("other", Some(2));
        for (what, aggregate, events, good) in [
            ("a known prefix, then new", "x", vec![a, b, c, new], 3),
            ("an overlap at the end", "x", vec![c, new], 1),
            ("new before known", "x", vec![new, a], 1),
            ("new between known", "x", vec![a, new, b], 1),
            (
                "known, then one without id",
                "x",
                vec![a, b, c, ("d", None)],
                3,
            ),
            ("another order", "x", vec![b, a], 1),
            ("reversed", "x", vec![c, b, a], 1),
            ("another body first", "x", vec![("other", Some(1)), b, c], 2),
            ("another body in the middle", "x", vec![a, other, c], 2),
            ("another aggregate", "y", vec![a, b, c], 0),
            ("another aggregate, one event", "y", vec![a], 0),
        ] {
            for expected in ["", ", expected_version => 0", ", expected_version => 4"] {
                let refusal = refused_and_nothing_written(
                    db,
                    &mut service,
                    &append_batch(aggregate, &events, expected),
                    "NW002",
                    &format!(
                        "Of {} events {good} are there in this aggregate, in this order, with this body.",
                        events.len()
                    ),
                );
                assert!(!refusal.message.is_empty(), "{what}");
            }
        }
    });
}

#[test]
fn events_without_an_id_are_retried_along_with_their_neighbours_that_have_one() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        let events = [("a", None), ("b", Some(1)), ("c", None)];
        let first = lines(&mut service, &append_batch("x", &events, ""));
        assert_eq!(lines(&mut service, &append_batch("x", &events, "")), first);
        refused_and_nothing_written(
            db,
            &mut service,
            &append_batch("x", &[("a", None), ("b", Some(1)), ("other", None)], ""),
            "NW002",
            "Of 3 events 2 are there in this aggregate, in this order, with this body.",
        );
        // A batch without any id has nothing to be known by.
        let anonymous = append_batch("x", &[("d", None), ("e", None)], "");
        assert_ne!(
            lines(&mut service, &anonymous),
            lines(&mut service, &anonymous)
        );
        assert_eq!(versions_of(db, "x"), up_to(7));
    });
}

#[test]
fn append_many_is_retried_by_the_same_rules() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        let x = batch(&[("a", Some(1)), ("b", Some(2))]);
        let y = batch(&[("a", Some(3)), ("b", Some(4))]);
        service.exec(&append_single("y", "old", 9, ""));
        let first = lines(
            &mut service,
            &append_parts(&[("x", x.clone()), ("y", y.clone())]),
        );
        assert_eq!(first.len(), 4);
        service.exec(&append_single("x", "later", 10, ""));

        for (what, parts, rows) in [
            ("the same", vec![("x", x.clone()), ("y", y.clone())], 0..4),
            (
                "in another order of aggregates",
                vec![("y", y.clone()), ("x", x.clone())],
                0..4,
            ),
            ("one aggregate of two", vec![("y", y.clone())], 2..4),
            (
                "a prefix of the second",
                vec![("x", x.clone()), ("y", batch(&[("a", Some(3))]))],
                0..3,
            ),
        ] {
            let before = digest(db);
            assert_eq!(
                lines(&mut service, &append_parts(&parts)),
                first[rows],
                "{what}"
            );
            assert_eq!(digest(db), before, "{what}");
        }
        let with_expectation = append_parts(&[("x", x.clone()), ("y", y.clone())])
            .replace("\"events\"", "\"expected_version\": 77, \"events\"");
        assert_eq!(
            lines(&mut service, &with_expectation),
            first,
            "whatever it expects"
        );

        for (what, parts, count, good) in [
            (
                "a new event in one of them",
                vec![
                    ("x", x.clone()),
                    (
                        "y",
                        batch(&[("a", Some(3)), ("b", Some(4)), ("c", Some(5))]),
                    ),
                ],
                5,
                4,
            ),
            (
                "a new aggregate",
                vec![("x", x.clone()), ("z", batch(&[("a", Some(6))]))],
                3,
                2,
            ),
            (
                "a new aggregate without ids",
                vec![("x", x.clone()), ("z", batch(&[("a", None)]))],
                3,
                2,
            ),
            (
                "the aggregates exchanged",
                vec![("y", x.clone()), ("x", y.clone())],
                4,
                0,
            ),
            (
                "another body",
                vec![
                    ("x", x.clone()),
                    ("y", batch(&[("a", Some(3)), ("other", Some(4))])),
                ],
                4,
                3,
            ),
            (
                "another order",
                vec![
                    ("x", batch(&[("b", Some(2)), ("a", Some(1))])),
                    ("y", y.clone()),
                ],
                4,
                3,
            ),
        ] {
            let refusal = refused_and_nothing_written(
                db,
                &mut service,
                &append_parts(&parts),
                "NW002",
                &format!(
                    "Of {count} events {good} are there in this aggregate, in this order, with this body."
                ),
            );
            assert!(!refusal.message.is_empty(), "{what}");
        }
    });
}

#[test]
fn a_missed_expectation_in_one_aggregate_leaves_nothing_in_the_others() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        let sql = append_parts(&[
            ("x", batch(&[("a", Some(1))])),
            ("y", batch(&[("a", Some(2))])),
        ])
        .replacen("\"events\"", "\"expected_version\": 0, \"events\"", 1);
        let missing = sql.replace(
            "\"y\", \"events\"",
            "\"y\", \"expected_version\": 5, \"events\"",
        );
        refused_and_nothing_written(
            db,
            &mut service,
            &missing,
            "NW001",
            "Expected version 5, actual version 0.",
        );
        // Nothing of it is known either: the same ids may come again.
        assert_eq!(service.rows(&sql).len(), 2);
    });
}

#[test]
fn an_event_id_or_an_aggregate_twice_in_one_call_is_refused_with_22023() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        let twice = [
            append_batch("x", &[("a", Some(1)), ("a", Some(1))], ""),
            append_batch("x", &[("a", Some(1)), ("b", None), ("c", Some(1))], ""),
            append_parts(&[
                ("x", batch(&[("a", Some(1))])),
                ("y", batch(&[("a", Some(1))])),
            ]),
            append_parts(&[("x", batch(&[("a", None)])), ("x", batch(&[("b", None)]))]),
        ];
        for sql in &twice {
            refused_and_nothing_written(db, &mut service, sql, "22023", "");
        }
        // A retry cannot cure it, so it is no 40001 either.
        for sql in &twice {
            service.exec("begin isolation level repeatable read");
            let refusal = service.refused(sql);
            service.exec("rollback");
            assert_eq!(refusal.code, "22023", "{sql}: {refusal}");
        }
    });
}

#[test]
fn the_events_of_a_rolled_back_append_are_unknown() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        service.exec("begin");
        service.exec(&append_single("x", "a", 1, ""));
        service.exec("savepoint s");
        service.exec(&append_batch("x", &[("b", Some(2))], ""));
        service.exec("rollback to s");
        service.exec("rollback");
        let sql = append_batch(
            "y",
            &[("other", Some(1)), ("another", Some(2))],
            ", expected_version => 0",
        );
        assert_eq!(service.rows(&sql).len(), 2);
    });
}

// Several at once ---------------------------------------------------------------------------------

#[test]
fn twenty_parallel_any_appends_to_one_aggregate_all_succeed() {
    on_each_route(|db| {
        default_org(db);
        const SESSIONS: usize = 20;
        const ROUNDS: usize = 10;
        for (form, sql, size) in [
            (
                "single",
                "select nightowls.append_event('cart', 'single', 'made')".to_owned(),
                1,
            ),
            (
                "batch",
                append_batch("batch", &[("a", None), ("b", None), ("c", None)], ""),
                3,
            ),
            (
                "many",
                append_parts(&[
                    ("many", batch(&[("a", None)])),
                    ("beside", batch(&[("a", None)])),
                ]),
                1,
            ),
        ] {
            let refusals: Vec<Refusal> = together(
                SESSIONS,
                |_| db.service(),
                |_, mut session| {
                    (0..ROUNDS)
                        .filter_map(|_| session.try_exec(&sql).err())
                        .collect::<Vec<_>>()
                },
            )
            .concat();
            assert!(
                refusals.is_empty(),
                "{form}: {}: {}",
                refusals.len(),
                refusals[0]
            );
            assert_eq!(
                versions_of(db, form),
                up_to(SESSIONS * ROUNDS * size),
                "{form}"
            );
        }
    });
}

#[test]
fn of_parallel_appends_with_the_same_expectation_one_succeeds_and_the_others_get_nw001() {
    on_each_install(|db| {
        default_org(db);
        for round in 0..5 {
            for form in ["single", "batch", "many"] {
                let aggregate = format!("{form}-{round}");
                let sql = match form {
                    "single" => format!(
                        "select nightowls.append_event('cart', '{aggregate}', 'made', expected_version => 0)"
                    ),
                    "batch" => append_batch(
                        &aggregate,
                        &[("a", None), ("b", None)],
                        ", expected_version => 0",
                    ),
                    _ => append_parts(&[(&aggregate, batch(&[("a", None), ("b", None)]))])
                        .replace("\"events\"", "\"expected_version\": 0, \"events\""),
                };
                let results =
                    together(8, |_| db.service(), |_, mut session| session.try_exec(&sql));
                let head = if form == "single" { 1 } else { 2 };
                let refused: Vec<&Refusal> = results
                    .iter()
                    .filter_map(|result| result.as_ref().err())
                    .collect();
                assert_eq!(refused.len(), 7, "{form}");
                for refusal in refused {
                    assert_eq!(
                        (refusal.code.as_str(), refusal.detail.as_str()),
                        (
                            "NW001",
                            format!("Expected version 0, actual version {head}.").as_str()
                        ),
                        "{form}: {refusal}"
                    );
                }
                assert_eq!(versions_of(db, &aggregate), up_to(head), "{form}");
            }
        }
    });
}

#[test]
fn parallel_retries_of_one_event_make_one_event_and_equal_results() {
    on_each_route(|db| {
        default_org(db);
        for round in 0..10 {
            let number = 10 * round + 1;
            let aggregate = format!("x{round}");
            let beside = format!("y{round}");
            for (form, sql) in [
                (
                    "single",
                    append_single(&aggregate, "a", number, ", expected_version => 0"),
                ),
                (
                    "batch",
                    append_batch(
                        &aggregate,
                        &[("b", Some(number + 1)), ("c", Some(number + 2))],
                        ", expected_version => 1",
                    ),
                ),
                (
                    "many",
                    append_parts(&[
                        (&aggregate, batch(&[("d", Some(number + 3))])),
                        (
                            &beside,
                            batch(&[("e", Some(number + 4)), ("f", Some(number + 5))]),
                        ),
                    ]),
                ),
            ] {
                let results =
                    together(8, |_| db.service(), |_, mut session| session.try_rows(&sql));
                let first = results[0]
                    .as_ref()
                    .unwrap_or_else(|refusal| panic!("{form}: {refusal}"));
                for result in &results {
                    assert_eq!(result.as_ref(), Ok(first), "{form}");
                }
            }
            assert_eq!(versions_of(db, &aggregate), up_to(4));
            assert_eq!(versions_of(db, &beside), up_to(2));
        }
    });
}

#[test]
fn an_append_that_had_to_wait_and_look_again_returns_each_event_once() {
    on_each_install(|db| {
        default_org(db);
        let mut watcher = db.superuser();
        for (form, sql, expected) in [
            (
                "batch",
                append_batch("b", &[("x", None), ("y", None)], ""),
                vec!["b 2", "b 3"],
            ),
            (
                // The aggregate that comes first in the order of keys goes in before the wait.
                "many",
                append_parts(&[
                    ("a", batch(&[("x", None), ("y", None)])),
                    ("b", batch(&[("x", None)])),
                    ("c", batch(&[("x", None)])),
                ]),
                vec!["a 1", "a 2", "b 5", "c 1"],
            ),
        ] {
            let mut first = db.service();
            let mut second = db.service();
            let pid = second.pid();
            first.exec("begin; select nightowls.append_event('cart', 'b', 'first')");
            let rows = std::thread::scope(|scope| {
                let waiting = scope.spawn(|| second.rows(&sql));
                wait_until("the second append waits", Duration::from_secs(10), || {
                    is_blocked(&mut watcher, pid)
                });
                first.exec("commit");
                waiting.join().expect("the second append succeeds")
            });
            let positions: Vec<String> = rows
                .iter()
                .map(|row| row[row.len() - 2].clone().expect("a position"))
                .collect();
            let written = lines(
                &mut db.service(),
                &format!(
                    "select aggregate_id, version from nightowls.events \
                     where position in ({}) order by position",
                    positions.join(", ")
                ),
            );
            assert_eq!(written, expected, "{form}");
            assert_eq!(rows.len(), expected.len(), "{form}: {rows:?}");
        }
    });
}

#[test]
fn an_event_id_that_arrives_in_the_meantime_is_waited_for_and_found() {
    on_each_install(|db| {
        default_org(db);
        let mut watcher = db.superuser();
        let batched = append_batch("x", &[("a", Some(1)), ("b", Some(2))], "");
        let other = append_batch("y", &[("a", Some(1)), ("b", Some(2))], "");
        for (second_sql, commit, code) in [
            (&batched, "commit", None),
            (&other, "commit", Some("NW002")),
        ] {
            let mut first = db.service();
            let mut second = db.service();
            let pid = second.pid();
            first.exec("begin");
            let rows = first.rows(&batched);
            let again = std::thread::scope(|scope| {
                let waiting = scope.spawn(|| second.try_rows(second_sql));
                if code.is_none() {
                    wait_until("the retry waits", Duration::from_secs(10), || {
                        is_blocked(&mut watcher, pid)
                    });
                }
                first.exec(commit);
                waiting.join().expect("the thread ends")
            });
            match code {
                None => assert_eq!(again, Ok(rows)),
                Some(code) => {
                    assert_eq!(again.map_err(|refusal| refusal.code), Err(code.to_owned()))
                }
            }
        }
        assert_eq!(versions_of(db, "x"), up_to(2));
    });
}

#[test]
fn an_append_waits_for_one_that_rolls_back_and_then_takes_its_version() {
    on_each_install(|db| {
        default_org(db);
        let mut watcher = db.superuser();
        for (number, sql) in [
            (1, append_single("s", "a", 1, ", expected_version => 0")),
            (
                2,
                append_batch("s", &[("a", Some(2))], ", expected_version => 1"),
            ),
        ] {
            let mut first = db.service();
            let mut second = db.service();
            let pid = second.pid();
            first.exec("begin");
            first.exec(&sql);
            let rows = std::thread::scope(|scope| {
                let waiting = scope.spawn(|| second.rows(&sql));
                wait_until("the second append waits", Duration::from_secs(10), || {
                    is_blocked(&mut watcher, pid)
                });
                first.exec("rollback");
                waiting.join().expect("the second append succeeds")
            });
            assert_eq!(rows.len(), 1);
            assert_eq!(versions_of(db, "s"), up_to(number));
        }
    });
}

#[test]
fn above_read_committed_an_append_that_comes_too_late_gets_40001_and_never_loops() {
    on_each_route(|db| {
        default_org(db);
        for level in ["repeatable read", "serializable"] {
            for (form, sql) in [
                (
                    "single",
                    "select nightowls.append_event('cart', 'x', 'late')".to_owned(),
                ),
                ("single with an id", append_single("x", "late", 1, "")),
                ("batch", append_batch("x", &[("late", None)], "")),
                (
                    "many",
                    append_parts(&[
                        ("w", batch(&[("late", None)])),
                        ("x", batch(&[("late", None)])),
                    ]),
                ),
            ] {
                let mut late = db.service();
                late.exec(&format!(
                    "begin isolation level {level}; set local statement_timeout = '10s'"
                ));
                late.exec("select count(*) from nightowls.events");
                db.service()
                    .exec("select nightowls.append_event('cart', 'x', 'early')");
                let refusal = late.refused(&sql);
                assert_eq!(refusal.code, "40001", "{level}, {form}: {refusal}");
                late.exec("rollback");
                // Nobody in between: it goes through.
                late.exec(&format!("begin isolation level {level}"));
                late.exec(&sql);
                late.exec("rollback");
            }
            // The same event, brought by another meanwhile.
            for (form, number) in [("single", 50), ("batch", 60)] {
                let number = number + level.len() as u32;
                let aggregate = format!("{form}{number}");
                let sql = match form {
                    "single" => append_single(&aggregate, "a", number, ""),
                    _ => append_batch(&aggregate, &[("a", Some(number))], ""),
                };
                let mut late = db.service();
                late.exec(&format!(
                    "begin isolation level {level}; set local statement_timeout = '10s'"
                ));
                late.exec("select count(*) from nightowls.events");
                db.service().exec(&sql);
                let refusal = late.refused(&sql);
                assert_eq!(
                    refusal.code, "40001",
                    "{level}, {form} with a known id: {refusal}"
                );
                late.exec("rollback");
                assert_eq!(versions_of(db, &aggregate), up_to(1));
            }
        }
    });
}

#[test]
fn a_conflict_in_somebody_elses_table_is_not_taken_for_one_of_the_log() {
    on_each_install(|db| {
        let org = default_org(db);
        // Both tables are called events, and the handler breaks a unique key of the other one.
        let mut owner = db.owner();
        owner.exec(&format!(
            "create table public.events (org_id uuid, one int unique); \
             grant select, insert, update, delete on public.events to {SERVICE}; \
             create function public.keep(event nightowls.events) returns void language sql volatile \
               begin atomic insert into public.events values ((event).org_id, 1); end; \
             select nightowls.create_table_projection('kept', 'cart', 'public.events', 'public.keep', '{org}')"
        ));
        let mut service = db.service();
        service.exec(
            "set statement_timeout = '10s'; select nightowls.append_event('cart', 'a', 'made')",
        );
        for sql in [
            "select nightowls.append_event('cart', 'b', 'made')".to_owned(),
            append_batch("b", &[("made", None)], ""),
            append_parts(&[("b", batch(&[("made", None)]))]),
        ] {
            let refusal = service.refused(&sql);
            assert_eq!(refusal.code, "23505", "{sql}: {refusal}");
            assert!(versions_of(db, "b").is_empty(), "{sql}");
        }
    });
}

#[test]
fn a_unique_index_that_a_user_added_refuses_an_append_and_does_not_make_it_loop() {
    on_each_install(|db| {
        default_org(db);
        db.owner().exec(
            "create unique index one_name on nightowls.events (org_id, (payload ->> 'is')) where event_type = 'named'",
        );
        let mut service = db.service();
        service.exec("set statement_timeout = '10s'");
        service.exec(&append_batch("a", &[("named", None)], ""));
        for sql in [
            append_single("b", "named", 1, ""),
            append_batch("b", &[("named", None)], ""),
            append_parts(&[("b", batch(&[("named", None)]))]),
        ] {
            let refusal = service.refused(&sql);
            assert_eq!(refusal.code, "23505", "{sql}: {refusal}");
            assert!(versions_of(db, "b").is_empty(), "{sql}");
        }
    });
}

// A plain insert ----------------------------------------------------------------------------------

#[test]
fn a_plain_insert_numbers_its_versions_and_takes_the_default_org() {
    on_each_route(|db| {
        let org = default_org(db);
        let mut service = db.service();
        let rows = lines(
            &mut service,
            "insert into nightowls.events (aggregate_type, aggregate_id, event_type) values ('cart', 'x', 'a') \
             returning org_id, version, payload, metadata, event_id",
        );
        assert_eq!(rows, [format!("{org} 1 {{}} {{}} null")]);
        // Two aggregates, interleaved; then one that goes on by an explicit version.
        let rows = lines(
            &mut service,
            "insert into nightowls.events (aggregate_type, aggregate_id, event_type) \
             values ('cart', 'x', 'b'), ('cart', 'y', 'a'), ('cart', 'x', 'c'), ('cart', 'y', 'b') \
             returning aggregate_id, version",
        );
        assert_eq!(rows, ["x 2", "y 1", "x 3", "y 2"]);
        service.exec(
            "insert into nightowls.events (aggregate_type, aggregate_id, version, event_type) \
             values ('cart', 'x', 4, 'd'), ('cart', 'x', null, 'e'), ('cart', 'x', 6, 'f')",
        );
        assert_eq!(versions_of(db, "x"), up_to(6));
        // The functions go on where it stopped, and it where they did.
        service.exec(&append_batch(
            "x",
            &[("g", None)],
            ", expected_version => 6",
        ));
        service.exec(
            "insert into nightowls.events (aggregate_type, aggregate_id, event_type) \
             select 'cart', 'x', 'bulk' from generate_series(1, 200)",
        );
        assert_eq!(versions_of(db, "x"), up_to(207));
    });
}

#[test]
fn a_plain_insert_names_any_org_and_each_org_has_its_own_versions() {
    on_each_install(|db| {
        let one = default_org(db);
        let two = org_apart_from(db, &one);
        let rows = lines(
            &mut db.service(),
            &format!(
                "insert into nightowls.events (org_id, aggregate_type, aggregate_id, event_type) \
                 values ('{one}', 'cart', 'x', 'a'), ('{two}', 'cart', 'x', 'a'), ('{one}', 'cart', 'x', 'b') \
                 returning version"
            ),
        );
        assert_eq!(rows, ["1", "1", "2"]);
    });
}

#[test]
fn a_plain_insert_of_a_taken_version_or_a_known_event_is_refused_with_23505() {
    on_each_install(|db| {
        default_org(db);
        let mut service = db.service();
        service.exec(&append_single("x", "a", 1, ""));
        let before = digest(db);
        for sql in [
            "insert into nightowls.events (aggregate_type, aggregate_id, version, event_type) values ('cart', 'x', 1, 'a')"
                .to_owned(),
            format!(
                "insert into nightowls.events (aggregate_type, aggregate_id, event_type, event_id) \
                 values ('cart', 'x', 'a', '{}')",
                id(1)
            ),
        ] {
            let refusal = service.refused(&sql);
            assert_eq!(refusal.code, "23505", "{sql}: {refusal}");
        }
        assert_eq!(digest(db), before);
    });
}

#[test]
fn on_conflict_do_nothing_leaves_out_what_is_there_and_never_makes_a_gap() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        service.exec(&append_batch("x", &[("a", Some(1)), ("b", None)], ""));
        let rows = lines(
            &mut service,
            "insert into nightowls.events (aggregate_type, aggregate_id, version, event_type) \
             values ('cart', 'x', 1, 'a'), ('cart', 'x', 2, 'b'), ('cart', 'x', 3, 'c') \
             on conflict do nothing returning version",
        );
        assert_eq!(rows, ["3"]);
        let rows = lines(
            &mut service,
            &format!(
                "insert into nightowls.events (aggregate_type, aggregate_id, event_type, event_id) \
                 values ('cart', 'x', 'a', '{}'), ('cart', 'x', 'd', '{}') on conflict do nothing returning version",
                id(1),
                id(2)
            ),
        );
        assert_eq!(rows, ["4"]);
        let before = digest(db);
        service.exec(
            "insert into nightowls.events (aggregate_type, aggregate_id, version, event_type) \
             values ('cart', 'x', 1, 'a') on conflict do nothing",
        );
        let refusal = service.refused(
            "insert into nightowls.events (aggregate_type, aggregate_id, version, event_type) \
             values ('cart', 'x', 4, 'd'), ('cart', 'x', 6, 'f') on conflict do nothing",
        );
        assert_eq!(refusal.code, "22023", "{refusal}");
        assert_eq!(digest(db), before);
        assert_eq!(versions_of(db, "x"), up_to(4));
    });
}

#[test]
fn two_inserts_in_one_statement_are_checked_together() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        service.exec(
            "with one as (insert into nightowls.events (aggregate_type, aggregate_id, version, event_type) \
                          values ('cart', 'x', 1, 'a') returning version), \
                  two as (insert into nightowls.events (aggregate_type, aggregate_id, version, event_type) \
                          values ('cart', 'y', 1, 'a'), ('cart', 'y', 2, 'b') returning version) \
             select * from one union all select * from two",
        );
        service.exec(
            "with one as (insert into nightowls.events (aggregate_type, aggregate_id, event_type) \
                          values ('cart', 'x', 'b'), ('cart', 'x', 'c')) \
             insert into nightowls.events (aggregate_type, aggregate_id, event_type) \
             values ('cart', 'x', 'd'), ('cart', 'y', 'c')",
        );
        assert_eq!(versions_of(db, "x"), up_to(4));
        assert_eq!(versions_of(db, "y"), up_to(3));

        let before = digest(db);
        for versions in ["1, 3", "3, 1", "1, 1"] {
            let (one, two) = versions.split_once(", ").expect("two numbers");
            let refusal = service.refused(&format!(
                "with one as (insert into nightowls.events (aggregate_type, aggregate_id, version, event_type) \
                              values ('cart', 'z', {one}, 'a')) \
                 insert into nightowls.events (aggregate_type, aggregate_id, version, event_type) \
                 values ('cart', 'z', {two}, 'b')"
            ));
            let code = if versions == "1, 1" { "23505" } else { "22023" };
            assert_eq!(refusal.code, code, "{versions}: {refusal}");
        }
        assert_eq!(digest(db), before);
    });
}

#[test]
fn copy_and_merge_are_appends_too() {
    use std::io::Write as _;

    on_each_install(|db| {
        let org = default_org(db);
        let mut owner = db.owner();
        let copied = owner
            .client()
            .copy_in("copy nightowls.events (org_id, aggregate_type, aggregate_id, event_type) from stdin")
            .and_then(|mut writer| {
                for _ in 0..100 {
                    writer
                        .write_all(format!("{org}\tcart\tx\tcopied\n").as_bytes())
                        .expect("a buffer takes all");
                }
                writer.finish()
            });
        assert_eq!(copied.expect("the owner may copy"), 100);
        assert_eq!(versions_of(db, "x"), up_to(100));

        let copied = owner
            .client()
            .copy_in("copy nightowls.events (org_id, aggregate_type, aggregate_id, version, event_type) from stdin")
            .and_then(|mut writer| {
                writer
                    .write_all(format!("{org}\tcart\tx\t102\tcopied\n").as_bytes())
                    .expect("a buffer takes all");
                writer.finish()
            });
        assert_eq!(
            Refusal::from(copied.expect_err("there is a gap")).code,
            "22023"
        );

        for role in [db.install().owner(), SERVICE] {
            db.session(role).exec(
                "merge into nightowls.events using (values ('x'), ('y')) as source (aggregate_id) on false \
                 when not matched then insert (aggregate_type, aggregate_id, event_type) \
                   values ('cart', source.aggregate_id, 'merged')",
            );
        }
        assert_eq!(versions_of(db, "x"), up_to(102));
        assert_eq!(versions_of(db, "y"), up_to(2));
    });
}

#[test]
fn parallel_plain_inserts_without_a_version_all_succeed() {
    on_each_route(|db| {
        default_org(db);
        const SESSIONS: usize = 8;
        const ROUNDS: usize = 25;
        let refusals: Vec<Refusal> = together(
            SESSIONS,
            |_| db.service(),
            |_, mut session| {
                (0..ROUNDS)
                    .filter_map(|_| {
                        session
                            .try_exec(
                                "insert into nightowls.events (aggregate_type, aggregate_id, event_type) \
                                 values ('cart', 'x', 'a'), ('cart', 'x', 'b')",
                            )
                            .err()
                    })
                    .collect::<Vec<_>>()
            },
        )
        .concat();
        assert!(refusals.is_empty(), "{}: {}", refusals.len(), refusals[0]);
        assert_eq!(versions_of(db, "x"), up_to(SESSIONS * ROUNDS * 2));
    });
}

#[test]
fn plain_inserts_beside_the_functions_lose_with_23505_at_worst_and_never_break_the_order() {
    on_each_install(|db| {
        default_org(db);
        let results = together(
            8,
            |_| db.service(),
            |number, mut session| {
                let sql = match number % 4 {
                    0 => "select nightowls.append_event('cart', 'x', 'made')".to_owned(),
                    1 => append_batch("x", &[("a", None), ("b", None)], ""),
                    _ => "insert into nightowls.events (aggregate_type, aggregate_id, event_type) values ('cart', 'x', 'a')"
                        .to_owned(),
                };
                (0..25)
                    .map(|_| (number % 4, session.try_exec(&sql)))
                    .collect::<Vec<_>>()
            },
        );
        let mut written = 0;
        for (form, result) in results.into_iter().flatten() {
            match result {
                Ok(()) => written += if form == 1 { 2 } else { 1 },
                Err(refusal) => assert!(form > 1 && refusal.code == "23505", "{form}: {refusal}"),
            }
        }
        assert_eq!(versions_of(db, "x"), up_to(written));
    });
}

#[test]
fn a_session_setting_left_on_a_pooled_connection_changes_no_append() {
    on_each_install(|db| {
        default_org(db);
        let mut service = db.service();
        for setting in [
            "select set_config('nightowls.held', '1|256:0|#0', false)",
            "select set_config('nightowls.held', 'nonsense', false)",
            "select set_config('nightowls.door', '1|append|0', false)",
            "select set_config('nightowls.door', '|', false)",
        ] {
            service.exec(setting);
            service.exec(&append_batch("x", &[("a", None)], ""));
            service.exec("select nightowls.append_event('cart', 'x', 'b')");
            service.exec(
                "insert into nightowls.events (aggregate_type, aggregate_id, event_type) values ('cart', 'x', 'c')",
            );
        }
        assert_eq!(versions_of(db, "x"), up_to(12));
    });
}
