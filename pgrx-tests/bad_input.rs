//! Bad input: each a clear error with its SQLSTATE, nothing written, the
//! connection usable. And odd input that is good: kept as it is.

use crate::fixture::{default_org, digest, lines};
use crate::support::{Db, Refusal, Session, on_each_install, on_each_route, quote};

/// Asserts that each statement is refused with its code.
#[track_caller]
fn refused(db: &Db, session: &mut Session, cases: &[(&str, String)]) {
    let before = digest(db);
    for (code, sql) in cases {
        let refusal = session.refused(sql);
        let shown: String = sql.chars().take(300).collect();
        assert_eq!(refusal.code, *code, "{shown}\n{refusal}");
        assert!(
            !refusal.message.is_empty() && !refusal.message.ends_with('.'),
            "{shown}\n{refusal}"
        );
        // A large value that is refused is not told back.
        assert!(
            refusal.to_string().len() < 4000,
            "{shown}: the error is {} bytes long",
            refusal.to_string().len()
        );
        assert_eq!(digest(db), before, "{shown}");
        assert_eq!(
            session.value("select 'usable'").as_deref(),
            Some("usable"),
            "{shown}"
        );
    }
    // It goes on where it was.
    session.exec("begin; select nightowls.append_event('cart', 'good', 'made'); rollback");
}

/// The same event in each form: three functions and the plain insert. Every
/// part is an SQL expression.
fn each_form(
    aggregate_type: &str,
    aggregate_id: &str,
    event_type: &str,
    payload: &str,
    metadata: &str,
) -> [String; 4] {
    let event = format!(
        "jsonb_build_object('event_type', {event_type}, 'payload', ({payload})::jsonb, 'metadata', ({metadata})::jsonb)"
    );
    [
        format!(
            "select nightowls.append_event({aggregate_type}, {aggregate_id}, {event_type}, ({payload})::jsonb, metadata => ({metadata})::jsonb)"
        ),
        format!(
            "select nightowls.append_events({aggregate_type}, {aggregate_id}, jsonb_build_array({event}))"
        ),
        format!(
            "select nightowls.append_many(jsonb_build_array(jsonb_build_object( \
               'aggregate_type', {aggregate_type}, 'aggregate_id', {aggregate_id}, 'events', jsonb_build_array({event}))))"
        ),
        format!(
            "insert into nightowls.events (aggregate_type, aggregate_id, event_type, payload, metadata) \
             values ({aggregate_type}, {aggregate_id}, {event_type}, ({payload})::jsonb, ({metadata})::jsonb)"
        ),
    ]
}

/// `each_form`, each refused with `code`.
fn in_each_form(code: &'static str, forms: [String; 4]) -> Vec<(&'static str, String)> {
    forms.map(|sql| (code, sql)).into()
}

const OBJECT: &str = "'{}'";

#[test]
fn nulls_and_empty_names_are_refused() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        let mut cases: Vec<(&str, String)> = Vec::new();
        for place in 0..3 {
            for (value, codes) in [
                ("null::text", ["22004", "22004", "22023", "23502"]),
                ("''", ["22023", "22023", "22023", "22023"]),
            ] {
                let mut names = ["'cart'", "'a'", "'made'"];
                names[place] = value;
                for (form, sql) in each_form(names[0], names[1], names[2], OBJECT, OBJECT)
                    .into_iter()
                    .enumerate()
                {
                    let code = match (form, place, value) {
                        // An event without a type is a fault of the JSON.
                        (1, 2, _) => "22023",
                        _ => codes[form],
                    };
                    cases.push((code, sql));
                }
            }
        }
        refused(db, &mut service, &cases);
        refused(
            db,
            &mut service,
            &[
                ("22004", "select nightowls.append_event('cart', 'a', 'made', null)".to_owned()),
                ("22004", "select nightowls.append_events('cart', 'a', null)".to_owned()),
                ("22004", "select nightowls.append_many(null)".to_owned()),
                (
                    "23502",
                    "insert into nightowls.events (aggregate_type, aggregate_id, event_type, payload) values ('cart', 'a', 'made', null)"
                        .to_owned(),
                ),
            ],
        );
    });
}

#[test]
fn json_of_the_wrong_shape_is_refused_by_append_events() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        let cases: Vec<(&str, String)> = [
            "{}",
            "[]",
            "1",
            "null",
            r#""made""#,
            r#"{"event_type": "made"}"#,
            "[1]",
            "[null]",
            "[[]]",
            "[{}]",
            r#"["made"]"#,
            r#"[{"event_type": null}]"#,
            r#"[{"event_type": 1}]"#,
            r#"[{"event_type": ""}]"#,
            r#"[{"event_type": ["made"]}]"#,
            r#"[{"type": "made"}]"#,
            r#"[{"event_type": "made", "version": 1}]"#,
            r#"[{"event_type": "made", "position": 1}]"#,
            r#"[{"event_type": "made", "metadata": 1}]"#,
            r#"[{"event_type": "made", "metadata": []}]"#,
            r#"[{"event_type": "made", "metadata": "ann"}]"#,
            r#"[{"event_type": "made", "event_id": "nope"}]"#,
            r#"[{"event_type": "made", "event_id": ""}]"#,
            r#"[{"event_type": "made", "event_id": 5}]"#,
            r#"[{"event_type": "made", "event_id": {}}]"#,
            r#"[{"event_type": "made", "event_id": "00000000-0000-4000-8000-00000000000"}]"#,
            // The first is good: all or nothing.
            r#"[{"event_type": "made"}, {"event_type": "made"}, {}]"#,
        ]
        .iter()
        .map(|events| {
            (
                "22023",
                format!(
                    "select nightowls.append_events('cart', 'a', {})",
                    quote(events)
                ),
            )
        })
        .collect();
        refused(db, &mut service, &cases);
        let hint = service
            .refused("select nightowls.append_events('cart', 'a', '[{}]')")
            .hint;
        assert!(hint.contains("event_type"), "{hint}");
    });
}

#[test]
fn json_of_the_wrong_shape_is_refused_by_append_many() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        let good = r#"{"aggregate_type": "cart", "aggregate_id": "g", "events": [{"event_type": "made"}]}"#;
        let cases: Vec<(&str, String)> = [
            "{}",
            "[]",
            "1",
            "null",
            good,
            "[1]",
            "[null]",
            "[[]]",
            "[{}]",
            r#"[{"aggregate_type": "cart", "aggregate_id": "a"}]"#,
            r#"[{"aggregate_type": "cart", "aggregate_id": "a", "events": []}]"#,
            r#"[{"aggregate_type": "cart", "aggregate_id": "a", "events": null}]"#,
            r#"[{"aggregate_type": "cart", "aggregate_id": "a", "events": {"event_type": "made"}}]"#,
            r#"[{"aggregate_type": "cart", "aggregate_id": "a", "events": [1]}]"#,
            r#"[{"aggregate_type": "cart", "aggregate_id": "a", "events": [{}]}]"#,
            r#"[{"aggregate_type": "cart", "events": [{"event_type": "made"}]}]"#,
            r#"[{"aggregate_id": "a", "events": [{"event_type": "made"}]}]"#,
            r#"[{"aggregate_type": 1, "aggregate_id": "a", "events": [{"event_type": "made"}]}]"#,
            r#"[{"aggregate_type": "cart", "aggregate_id": 1, "events": [{"event_type": "made"}]}]"#,
            r#"[{"aggregate_type": "cart", "aggregate_id": "", "events": [{"event_type": "made"}]}]"#,
            r#"[{"aggregate_type": "cart", "aggregate_id": "a", "events": [{"event_type": "made"}], "org": "x"}]"#,
            r#"[{"aggregate_type": "cart", "aggregate_id": "a", "events": [{"event_type": "made", "event_id": "nope"}]}]"#,
            r#"[{"aggregate_type": "cart", "aggregate_id": "a", "events": [{"event_type": "made", "metadata": []}]}]"#,
            r#"[{"aggregate_type": "cart", "aggregate_id": "a", "events": [{"event_type": "made"}], "expected_version": -2}]"#,
            r#"[{"aggregate_type": "cart", "aggregate_id": "a", "events": [{"event_type": "made"}], "expected_version": 1.5}]"#,
            r#"[{"aggregate_type": "cart", "aggregate_id": "a", "events": [{"event_type": "made"}], "expected_version": 1e30}]"#,
            r#"[{"aggregate_type": "cart", "aggregate_id": "a", "events": [{"event_type": "made"}], "expected_version": "1"}]"#,
            r#"[{"aggregate_type": "cart", "aggregate_id": "a", "events": [{"event_type": "made"}], "expected_version": true}]"#,
        ]
        .iter()
        .flat_map(|appends| {
            let beside = appends
                .strip_prefix('[')
                .and_then(|rest| rest.strip_suffix(']'))
                .filter(|rest| !rest.is_empty())
                .map(|rest| format!("[{good}, {rest}]"));
            [Some((*appends).to_owned()), beside]
        })
        .flatten()
        .map(|appends| ("22023", format!("select nightowls.append_many({})", quote(&appends))))
        .collect();
        refused(db, &mut service, &cases);
    });
}

#[test]
fn other_arguments_that_are_not_valid_are_refused() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        let mut cases: Vec<(&str, String)> = Vec::new();
        for expected in ["-2", "-9223372036854775808"] {
            cases.push((
                "22023",
                format!("select nightowls.append_event('cart', 'a', 'made', expected_version => {expected})"),
            ));
            cases.push((
                "22023",
                format!(r#"select nightowls.append_events('cart', 'a', '[{{"event_type": "made"}}]', {expected})"#),
            ));
        }
        for metadata in ["'[]'", "'1'", "'\"ann\"'", "'true'"] {
            cases.extend(in_each_form(
                "22023",
                each_form("'cart'", "'a'", "'made'", OBJECT, metadata),
            ));
        }
        cases.extend([
            (
                "22P02",
                "select nightowls.append_event('cart', 'a', 'made', event_id => 'nope')".to_owned(),
            ),
            (
                "22P02",
                "select nightowls.append_event('cart', 'a', 'made', org => 'nope')".to_owned(),
            ),
            ("22P02", "select nightowls.append_event('cart', 'a', 'made', '{not JSON')".to_owned()),
            ("22P02", "select nightowls.append_events('cart', 'a', '[{')".to_owned()),
            (
                "22003",
                "select nightowls.append_event('cart', 'a', 'made', expected_version => 9223372036854775808::numeric::bigint)"
                    .to_owned(),
            ),
            (
                "22P02",
                "insert into nightowls.events (aggregate_type, aggregate_id, event_type, event_id) values ('cart', 'a', 'made', 'nope')"
                    .to_owned(),
            ),
        ]);
        // An org that does not exist.
        let nowhere = "'11111111-1111-4111-8111-111111111111'";
        cases.extend([
            (
                "22023",
                format!("select nightowls.append_event('cart', 'a', 'made', org => {nowhere})"),
            ),
            (
                "22023",
                format!(r#"select nightowls.append_events('cart', 'a', '[{{"event_type": "made"}}]', org => {nowhere})"#),
            ),
            (
                "22023",
                format!(
                    r#"select nightowls.append_many('[{{"aggregate_type": "cart", "aggregate_id": "a", "events": [{{"event_type": "made"}}]}}]', {nowhere})"#
                ),
            ),
        ]);
        refused(db, &mut service, &cases);
    });
}

#[test]
fn a_read_with_arguments_that_are_not_valid_is_refused() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        service.exec("select nightowls.append_event('cart', 'a', 'made')");
        let mut cases: Vec<(&str, String)> = Vec::new();
        for (code, max_events) in [("22004", "null"), ("22023", "0"), ("22023", "-1")] {
            for call in [
                "read_events(0, ",
                "recent_events(null, ",
                "read_aggregate('cart', 'a', 1, ",
            ] {
                cases.push((code, format!("select nightowls.{call}{max_events})")));
            }
        }
        for filter in [
            "1",
            "[]",
            r#""cart""#,
            "null",
            r#"{"types": []}"#,
            r#"{"aggregate_types": "cart"}"#,
            r#"{"aggregate_types": null}"#,
            r#"{"aggregate_types": [1]}"#,
            r#"{"aggregate_types": [null]}"#,
            r#"{"aggregate_types": [["cart"]]}"#,
            r#"{"event_types": {}}"#,
            r#"{"event_types": ["made", 1]}"#,
            r#"{"event_types": [], "other": []}"#,
        ] {
            for call in ["read_events(0, 10, ", "recent_events(null, 10, "] {
                cases.push((
                    "22023",
                    format!("select nightowls.{call}{})", quote(filter)),
                ));
            }
        }
        cases.extend([
            ("22004", "select nightowls.read_events(null)".to_owned()),
            (
                "22004",
                "select nightowls.read_aggregate(null, 'a')".to_owned(),
            ),
            (
                "22004",
                "select nightowls.read_aggregate('cart', null)".to_owned(),
            ),
            (
                "22004",
                "select nightowls.read_aggregate('cart', 'a', null)".to_owned(),
            ),
            ("22004", "select nightowls.last_event(null, 'a')".to_owned()),
            (
                "22004",
                "select nightowls.last_event('cart', null)".to_owned(),
            ),
            (
                "22P02",
                "select nightowls.read_events(org => 'nope')".to_owned(),
            ),
        ]);
        refused(db, &mut service, &cases);
        // What is merely not there is no error.
        for call in [
            "read_aggregate('cart', 'none')",
            "read_aggregate('cart', 'a', 2)",
            "last_event('cart', 'none')",
            "last_event('cart', 'a', 'none')",
            "read_events(9223372036854775807)",
            "recent_events(0)",
            r#"recent_events(filter => '{"aggregate_types": []}')"#,
        ] {
            let found = service.value(&format!("select count(*) from nightowls.{call}"));
            assert_eq!(found.as_deref(), Some("0"), "{call}");
        }
        for call in [
            "read_events(-1)",
            "read_aggregate('cart', 'a', -5)",
            "last_event('cart', 'a', null)",
        ] {
            let found = service.value(&format!("select count(*) from nightowls.{call}"));
            assert_eq!(found.as_deref(), Some("1"), "{call}");
        }
    });
}

#[test]
fn reading_forwards_above_read_committed_is_refused_with_25001() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        service.exec("select nightowls.append_event('cart', 'a', 'made')");
        for level in ["repeatable read", "serializable"] {
            service.exec(&format!("begin isolation level {level}"));
            for call in [
                "read_aggregate('cart', 'a')",
                "recent_events()",
                "last_event('cart', 'a')",
            ] {
                let found = service.value(&format!("select count(*) from nightowls.{call}"));
                assert_eq!(found.as_deref(), Some("1"), "{level}: {call}");
            }
            let refusal = service.refused("select nightowls.read_events()");
            assert_eq!(refusal.code, "25001", "{level}: {refusal}");
            assert!(!refusal.hint.is_empty(), "{level}: {refusal}");
            service.exec("rollback");
        }
        for level in ["read committed", "read uncommitted"] {
            service.exec(&format!("begin isolation level {level}"));
            let found = service.value("select count(*) from nightowls.read_events()");
            assert_eq!(found.as_deref(), Some("1"), "{level}");
            service.exec("rollback");
        }
    });
}

// Large, deep and odd -----------------------------------------------------------------------------

#[test]
fn a_payload_of_a_megabyte_is_kept_and_one_of_a_hundred_is_refused() {
    on_each_install(|db| {
        default_org(db);
        let mut service = db.service();
        let megabyte = "jsonb_build_object('text', repeat('x', 1000000))";
        for sql in each_form("'file'", "'a'", "'made'", megabyte, OBJECT) {
            service.exec(&sql);
        }
        let kept = service.value(
            "select count(*) from nightowls.read_aggregate('file', 'a') where payload ->> 'text' = repeat('x', 1000000)",
        );
        assert_eq!(kept.as_deref(), Some("4"));

        let hundred = "jsonb_build_object('text', repeat('x', 100000000))";
        let twenty = "jsonb_build_object('text', repeat('x', 20000000))";
        let [single, _, _, insert] = each_form("'file'", "'a'", "'made'", hundred, OBJECT);
        refused(db, &mut service, &[("54000", single), ("54000", insert)]);
        refused(
            db,
            &mut service,
            &in_each_form(
                "54000",
                each_form("'file'", "'a'", "'made'", twenty, OBJECT),
            ),
        );
        let [single, _, _, insert] = each_form("'file'", "'a'", "'made'", OBJECT, twenty);
        refused(db, &mut service, &[("54000", single), ("54000", insert)]);
        // As a client sends it.
        let sent = format!(
            r#"select nightowls.append_event('file', 'a', 'made', '{{"text": "{}"}}')"#,
            "y".repeat(100_000_000)
        );
        refused(db, &mut service, &[("54000", sent)]);
        // As a table keeps it: compressed.
        service.exec(&format!(
            "create temporary table kept as select {twenty} as large"
        ));
        let [single, _, _, insert] =
            each_form("'file'", "'a'", "'made'", "select large from kept", OBJECT);
        refused(db, &mut service, &[("54000", single), ("54000", insert)]);
    });
}

#[test]
fn a_hundred_levels_are_kept_and_one_more_is_refused() {
    on_each_install(|db| {
        default_org(db);
        let mut service = db.service();
        let arrays = |levels: usize| format!("'{}{}'", "[".repeat(levels), "]".repeat(levels));
        let objects =
            |levels: usize| format!("'{}1{}'", r#"{"a": "#.repeat(levels), "}".repeat(levels));
        // The deep one last, behind a shallow one and a long one.
        let beside = |levels: usize| {
            format!(
                "'[1, {{\"a\": [2, 3]}}, {}\"x\"{}]'",
                "[".repeat(levels - 1),
                "]".repeat(levels - 1)
            )
        };
        for payload in [arrays(100), objects(100), beside(100)] {
            for sql in each_form("'deep'", "'a'", "'made'", &payload, OBJECT) {
                service.exec(&sql);
            }
        }
        for sql in each_form("'deep'", "'a'", "'made'", OBJECT, &objects(100)) {
            service.exec(&sql);
        }
        let kept = service.value(&format!(
            "select count(*) from nightowls.read_aggregate('deep', 'a') \
             where payload in ({}::jsonb, {}::jsonb, {}::jsonb) or metadata = {}::jsonb",
            arrays(100),
            objects(100),
            beside(100),
            objects(100)
        ));
        assert_eq!(kept.as_deref(), Some("16"));

        let mut cases = Vec::new();
        for levels in [101, 10_000] {
            for payload in [arrays(levels), objects(levels), beside(levels)] {
                cases.extend(in_each_form(
                    "54000",
                    each_form("'deep'", "'a'", "'made'", &payload, OBJECT),
                ));
            }
            cases.extend(in_each_form(
                "54000",
                each_form("'deep'", "'a'", "'made'", OBJECT, &objects(levels)),
            ));
        }
        refused(db, &mut service, &cases);
    });
}

#[test]
fn nul_in_text_is_refused() {
    on_each_install(|db| {
        default_org(db);
        let mut service = db.service();
        refused(
            db,
            &mut service,
            &[
                ("22P05", r#"select nightowls.append_event('cart', 'a', 'made', '{"a": "\u0000"}')"#.to_owned()),
                ("22P05", r#"select nightowls.append_event('cart', 'a', 'made', '{"\u0000": 1}')"#.to_owned()),
                (
                    "22P05",
                    r#"select nightowls.append_events('cart', 'a', '[{"event_type": "ma\u0000de"}]')"#.to_owned(),
                ),
                (
                    "22P05",
                    r#"select nightowls.append_many('[{"aggregate_type": "cart", "aggregate_id": "\u0000", "events": [{"event_type": "made"}]}]')"#
                        .to_owned(),
                ),
                ("22021", r"select nightowls.append_event('cart', E'a\000b', 'made')".to_owned()),
            ],
        );
        let before = digest(db);
        for names in [
            ["ca\0rt", "a", "made"],
            ["cart", "\0", "made"],
            ["cart", "a", "made\0"],
        ] {
            let sent = service.client().execute(
                "select nightowls.append_event($1, $2, $3)",
                &[&names[0], &names[1], &names[2]],
            );
            let refusal = Refusal::from(sent.expect_err("no text holds a NUL"));
            assert_eq!(refusal.code, "22021", "{names:?}: {refusal}");
        }
        assert_eq!(digest(db), before);
        assert!(service.alive());
    });
}

#[test]
fn names_with_quotes_dots_emoji_and_the_like_are_kept_as_they_are() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        for name in [
            "it's",
            r#"say "no""#,
            "a.b.c",
            "🦉 night owl",
            r"back\slash\n",
            "new\nline\r\n\ttab",
            "100 %s $1 {} :name",
            " blanks around ",
            "null",
            "';drop table nightowls.events;--",
            "ﷺ עברית 日本語",
            "e\u{301} is not é",
            "/src/main.rs#L1|256:0",
            "\u{feff}\u{200b}",
            "\u{10ffff}",
        ] {
            let quoted = quote(name);
            for sql in each_form(
                &quoted,
                &quoted,
                &quoted,
                &format!("jsonb_build_object({quoted}, {quoted})"),
                &format!("jsonb_build_object({quoted}, {quoted})"),
            ) {
                service.exec(&sql);
            }
            let expected: Vec<String> = (1..=4)
                .map(|version| format!("{version} t t t t t"))
                .collect();
            for read in [
                format!("nightowls.read_aggregate({quoted}, {quoted})"),
                format!(
                    "nightowls.read_events(0, 10, jsonb_build_object('aggregate_types', jsonb_build_array({quoted})))"
                ),
                format!(
                    "nightowls.read_events(0, 10, jsonb_build_object('event_types', jsonb_build_array({quoted})))"
                ),
            ] {
                let rows = lines(
                    &mut service,
                    &format!(
                        "select version, aggregate_type = {quoted}, aggregate_id = {quoted}, event_type = {quoted}, \
                           payload ->> {quoted} = {quoted}, metadata ->> {quoted} = {quoted} from {read}"
                    ),
                );
                assert_eq!(rows, expected, "{name:?}: {read}");
            }
            let last = service.value(&format!(
                "select version from nightowls.last_event({quoted}, {quoted}, {quoted})"
            ));
            assert_eq!(last.as_deref(), Some("4"), "{name:?}");
            // An error that tells of it tells it right.
            let refusal = service.refused(&format!(
                "select nightowls.append_event({quoted}, {quoted}, 'made', expected_version => 0)"
            ));
            assert!(
                refusal.code == "NW001" && refusal.message.contains(name),
                "{name:?}: {refusal}"
            );
        }
    });
}

#[test]
fn names_that_differ_only_in_case_accent_or_form_are_different() {
    on_each_install(|db| {
        default_org(db);
        let mut service = db.service();
        for name in ["cafe", "Cafe", "café", "cafe\u{301}", "CAFÉ", "cafe "] {
            let version = service.value(&format!(
                "select version from nightowls.append_event('place', {}, 'made')",
                quote(name)
            ));
            assert_eq!(version.as_deref(), Some("1"), "{name:?}");
        }
    });
}

#[test]
fn names_up_to_the_limit_are_kept_and_longer_ones_are_refused() {
    on_each_install(|db| {
        default_org(db);
        let mut service = db.service();
        // Noise: nothing that an index could compress.
        let noise = |length: usize| {
            let mut text = String::new();
            let mut random = crate::fixture::Random::new(length as u64);
            while text.len() < length {
                text.push(char::from(b'a' + random.below(26) as u8));
            }
            quote(&text)
        };
        let (kind, id) = (noise(255), noise(1024));
        for sql in each_form(&kind, &id, &kind, OBJECT, OBJECT) {
            service.exec(&sql);
        }
        let mut cases = Vec::new();
        for (kind_length, id_length, event_length) in [
            (256, 1, 1),
            (1, 1025, 1),
            (1, 1, 256),
            (10_240, 1, 1),
            (1, 10_240, 1),
            (1, 1, 10_240),
        ] {
            for text in [noise, |length| format!("repeat('x', {length})")] {
                cases.extend(in_each_form(
                    "54000",
                    each_form(
                        &text(kind_length),
                        &text(id_length),
                        &text(event_length),
                        OBJECT,
                        OBJECT,
                    ),
                ));
            }
        }
        // Bytes count, not characters.
        let owls = format!("repeat('🦉', {})", 64);
        cases.extend(in_each_form(
            "54000",
            each_form(&owls, "'a'", "'made'", OBJECT, OBJECT),
        ));
        refused(db, &mut service, &cases);
    });
}

#[test]
fn a_read_only_transaction_reads_and_does_not_append() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        service.exec("select nightowls.append_event('cart', 'a', 'made')");
        for sql in each_form("'cart'", "'a'", "'made'", OBJECT, OBJECT) {
            service.exec("begin read only");
            for call in [
                "read_events()",
                "read_aggregate('cart', 'a')",
                "recent_events()",
                "last_event('cart', 'a')",
            ] {
                let found = service.value(&format!("select count(*) from nightowls.{call}"));
                assert_eq!(found.as_deref(), Some("1"), "{call}");
            }
            let refusal = service.refused(&sql);
            assert_eq!(refusal.code, "25006", "{sql}: {refusal}");
            service.exec("rollback");
        }
    });
}

#[test]
fn any_json_is_a_payload() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        for payload in [
            "{}",
            "[]",
            "null",
            "true",
            "0",
            "-0.0",
            "1e400",
            r#""text""#,
            r#"{"": {"": [null]}}"#,
            "123456789012345678901234567890.123456789012345678901234567890",
            r#"{"a": 1.10, "b": 1.1}"#,
            r#""\ud83e\udd89""#,
        ] {
            for sql in each_form("'any'", "'a'", "'made'", &quote(payload), OBJECT) {
                service.exec(&sql);
            }
            let kept = service.value(&format!(
                "select count(*) from (select payload from nightowls.recent_events(max_events => 4)) e \
                 where payload::text = {}::jsonb::text",
                quote(payload)
            ));
            assert_eq!(kept.as_deref(), Some("4"), "{payload}");
        }
    });
}
