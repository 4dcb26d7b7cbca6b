//! Folding: what each op does, what is refused, and that the library and its
//! SQL twin never differ.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::support::{
    Db, Install, SERVICE, Session, on_each_install, on_install, quote, wait_until,
};

/// `fold_state` of one event of type `e` in version 7, by a reducer of one op.
fn one_op(op: &str, state: &str, payload: &str) -> String {
    format!(
        "select nightowls.fold_state({}, {}, {})",
        quote(&format!(r#"{{"otherwise": [{op}]}}"#)),
        quote(state),
        quote(&format!(
            r#"[{{"event_type": "e", "version": 7, "payload": {payload}}}]"#
        )),
    )
}

#[test]
fn every_op_does_what_it_says() {
    on_each_install(|db| {
        let mut s = db.owner();
        for (op, state, payload, result) in [
            // set
            (
                r#""set", "path": "a", "value": "$.v""#,
                "{}",
                r#"{"v": [1]}"#,
                r#"{"a": [1]}"#,
            ),
            (
                r#""set", "path": "a", "value": "$.v""#,
                r#"{"a": 1}"#,
                "{}",
                r#"{"a": 1}"#,
            ),
            (
                r#""set", "path": "a", "value": "$.v""#,
                r#"{"a": 1}"#,
                r#"{"v": null}"#,
                r#"{"a": null}"#,
            ),
            (
                r#""set", "path": "a.b", "value": true"#,
                r#"{"a": null}"#,
                "{}",
                r#"{"a": {"b": true}}"#,
            ),
            (
                r#""set", "path": "a.\"b.c\".d", "value": 1"#,
                "{}",
                "{}",
                r#"{"a": {"b.c": {"d": 1}}}"#,
            ),
            (
                r#""set", "path": ["a", "b.c", " "], "value": 1"#,
                "{}",
                "{}",
                r#"{"a": {"b.c": {" ": 1}}}"#,
            ),
            (
                r#""set", "path": "a", "value": {"literal": "$.v"}"#,
                "{}",
                "{}",
                r#"{"a": "$.v"}"#,
            ),
            (
                r#""set", "path": "a", "value": {"literal": 1, "x": 2}"#,
                "{}",
                "{}",
                r#"{"a": {"x": 2, "literal": 1}}"#,
            ),
            (
                r#""set", "path": "a", "value": {"deep": "$.v"}"#,
                "{}",
                r#"{"v": 1}"#,
                r#"{"a": {"deep": "$.v"}}"#,
            ),
            (
                r#""set", "path": "a", "value": "$""#,
                "{}",
                r#""whole""#,
                r#"{"a": "whole"}"#,
            ),
            (
                r#""set", "path": "a", "value": "$.items.0.sku""#,
                "{}",
                r#"{"items": [{"sku": "s"}]}"#,
                r#"{"a": "s"}"#,
            ),
            (
                r#""set", "path": "a", "value": "$.items.-1""#,
                "{}",
                r#"{"items": [1, 2]}"#,
                r#"{"a": 2}"#,
            ),
            (
                r#""set", "path": "a", "value": "$.items.-3""#,
                "{}",
                r#"{"items": [1, 2]}"#,
                "{}",
            ),
            // add
            (r#""add", "path": "a""#, "{}", "{}", r#"{"a": 1}"#),
            (
                r#""add", "path": "a", "value": -0.50"#,
                r#"{"a": null}"#,
                "{}",
                r#"{"a": -0.50}"#,
            ),
            (
                r#""add", "path": "a", "value": "$.v""#,
                r#"{"a": 1.10}"#,
                r#"{"v": 1}"#,
                r#"{"a": 2.10}"#,
            ),
            (
                r#""add", "path": "a", "value": "$.v""#,
                r#"{"a": 1}"#,
                r#"{"v": null}"#,
                r#"{"a": 1}"#,
            ),
            (r#""add", "path": "a", "value": "$.v""#, "{}", "{}", "{}"),
            (
                r#""add", "path": "a", "value": 0.1234567890123456789012345"#,
                r#"{"a": 99999999999999999999.9}"#,
                "{}",
                r#"{"a": 100000000000000000000.0234567890123456789012345}"#,
            ),
            // min and max
            (
                r#""min", "path": "a", "value": 2"#,
                "{}",
                "{}",
                r#"{"a": 2}"#,
            ),
            (
                r#""min", "path": "a", "value": 1.00"#,
                r#"{"a": 1.0}"#,
                "{}",
                r#"{"a": 1.0}"#,
            ),
            (
                r#""min", "path": "a", "value": -10"#,
                r#"{"a": -9}"#,
                "{}",
                r#"{"a": -10}"#,
            ),
            (
                r#""max", "path": "a", "value": -10"#,
                r#"{"a": -9}"#,
                "{}",
                r#"{"a": -9}"#,
            ),
            (
                r#""max", "path": "a", "value": "$.v""#,
                r#"{"a": "z"}"#,
                r#"{"v": "ä"}"#,
                r#"{"a": "ä"}"#,
            ),
            (
                r#""max", "path": "a", "value": "a""#,
                r#"{"a": "B"}"#,
                "{}",
                r#"{"a": "a"}"#,
            ),
            (
                r#""min", "path": "a", "value": "$.v""#,
                r#"{"a": 1}"#,
                r#"{"v": null}"#,
                r#"{"a": 1}"#,
            ),
            // push
            (
                r#""push", "path": "a", "value": "$""#,
                r#"{"a": null}"#,
                "[1]",
                r#"{"a": [[1]]}"#,
            ),
            (
                r#""push", "path": "a", "value": null"#,
                r#"{"a": [1]}"#,
                "{}",
                r#"{"a": [1, null]}"#,
            ),
            // put and drop
            (
                r#""put", "path": "m", "key": "$.k", "value": 1"#,
                "{}",
                r#"{"k": 1.50}"#,
                r#"{"m": {"1.50": 1}}"#,
            ),
            (
                r#""put", "path": "m", "key": true, "value": 1"#,
                r#"{"m": null}"#,
                "{}",
                r#"{"m": {"true": 1}}"#,
            ),
            (
                r#""put", "path": "m", "key": "a.b", "value": null"#,
                "{}",
                "{}",
                r#"{"m": {"a.b": null}}"#,
            ),
            (
                r#""put", "path": "m", "key": "$.k", "value": 1"#,
                "{}",
                r#"{"k": null}"#,
                "{}",
            ),
            (
                r#""put", "path": "m", "key": "$.k", "value": 1"#,
                "{}",
                "{}",
                "{}",
            ),
            (
                r#""drop", "path": "m", "key": "$.k""#,
                r#"{"m": {"x": 1, "y": 2}}"#,
                r#"{"k": "x"}"#,
                r#"{"m": {"y": 2}}"#,
            ),
            (r#""drop", "path": "m", "key": "x""#, "{}", "{}", "{}"),
            (
                r#""drop", "path": "m", "key": "0""#,
                r#"{"m": [1]}"#,
                "{}",
                r#"{"m": [1]}"#,
            ),
            // remove
            (
                r#""remove", "path": "a.b""#,
                r#"{"a": {"b": null, "c": 1}}"#,
                "{}",
                r#"{"a": {"c": 1}}"#,
            ),
            (
                r#""remove", "path": "a.0""#,
                r#"{"a": [1]}"#,
                "{}",
                r#"{"a": [1]}"#,
            ),
            (
                r#""remove", "path": "a.b.c""#,
                r#"{"a": 1}"#,
                "{}",
                r#"{"a": 1}"#,
            ),
            // merge
            (
                r#""merge", "value": "$""#,
                r#"{"a": 1}"#,
                r#"{"a": null, "b": {"c": null}}"#,
                r#"{"b": {}}"#,
            ),
            (
                r#""merge", "path": "m", "value": {"x": {"y": 1}}"#,
                r#"{"m": {"x": [1]}}"#,
                "{}",
                r#"{"m": {"x": {"y": 1}}}"#,
            ),
            (
                r#""merge", "path": "m.n", "value": {}"#,
                r#"{"m": null}"#,
                "{}",
                r#"{"m": {"n": {}}}"#,
            ),
            // the envelope
            (
                r#""set", "path": "a", "value": "@.event_type""#,
                "{}",
                "{}",
                r#"{"a": "e"}"#,
            ),
            (
                r#""set", "path": "a", "value": "@.version""#,
                "{}",
                "{}",
                r#"{"a": 7}"#,
            ),
            (
                r#""set", "path": "a", "value": "@.event_id""#,
                "{}",
                "{}",
                r#"{"a": null}"#,
            ),
            (
                r#""set", "path": "a", "value": "@.metadata""#,
                "{}",
                "{}",
                "{}",
            ),
            (r#""tombstone""#, r#"{"a": 1}"#, "{}", "null"),
        ] {
            let sql = one_op(&format!(r#"{{"op": {op}}}"#), state, payload);
            assert_eq!(
                s.value(&sql).as_deref().unwrap_or("null"),
                result,
                "{op} on {state}"
            );
        }
    });
}

#[test]
fn an_event_that_does_not_fit_is_refused_with_22023() {
    on_each_install(|db| {
        let mut s = db.owner();
        for (op, state, payload, message) in [
            (
                r#""add", "path": "a.b""#,
                r#"{"a": {"b": "x"}}"#,
                "{}",
                r#"add at "a.b": the state holds a string there"#,
            ),
            (
                r#""add", "path": "a", "value": "$""#,
                r#"{"a": "x"}"#,
                "[]",
                r#"add at "a": the value is an array"#,
            ),
            (
                r#""set", "path": "a.\"b.c\".d", "value": 1"#,
                r#"{"a": {"b.c": []}}"#,
                "{}",
                r#"set at "a.b.c.d": the state holds an array at "a.b.c""#,
            ),
            (
                r#""push", "path": "a", "value": 1"#,
                r#"{"a": {}}"#,
                "{}",
                r#"push at "a": the state holds an object there"#,
            ),
            (
                r#""min", "path": "a", "value": "$""#,
                "{}",
                "true",
                r#"min at "a": the value is a boolean"#,
            ),
            (
                r#""max", "path": "a", "value": 1"#,
                r#"{"a": []}"#,
                "{}",
                r#"max at "a": the state holds an array there"#,
            ),
            (
                r#""min", "path": "a", "value": "$""#,
                r#"{"a": "x"}"#,
                "1",
                r#"min at "a": the state holds a string there, the value is a number"#,
            ),
            (
                r#""put", "path": "a", "key": "k", "value": 1"#,
                r#"{"a": true}"#,
                "{}",
                r#"put at "a": the state holds a boolean there"#,
            ),
            (
                r#""put", "path": "a", "key": "$", "value": 1"#,
                "{}",
                "{}",
                r#"put at "a": the key is an object"#,
            ),
            (
                r#""drop", "path": "a", "key": "$""#,
                "{}",
                "[]",
                r#"drop at "a": the key is an array"#,
            ),
            (
                r#""merge", "value": "$""#,
                "{}",
                "null",
                "merge at the root: the value is null",
            ),
            (
                r#""merge", "path": "a", "value": {}"#,
                r#"{"a": 1}"#,
                "{}",
                r#"merge at "a": the state holds a number there"#,
            ),
        ] {
            let refusal = s.refused(&one_op(&format!(r#"{{"op": {op}}}"#), state, payload));
            assert_eq!(
                (
                    refusal.code.as_str(),
                    refusal.message.as_str(),
                    refusal.detail.as_str()
                ),
                (
                    "22023",
                    format!("cannot {message}").as_str(),
                    "Event \"e\", version 7."
                ),
            );
        }
    });
}

#[test]
fn a_sum_beyond_numeric_is_refused_with_22003() {
    on_each_install(|db| {
        let refusal = db.owner().refused(
            r#"select nightowls.fold_state('{"otherwise": [{"op": "add", "path": "n", "value": "$"}]}', null,
                 jsonb_build_array(jsonb_build_object('event_type', 'e', 'payload', repeat('9', 131072)::numeric),
                                   jsonb_build_object('event_type', 'e', 'payload', 1)))"#,
        );
        assert_eq!(refusal.code, "22003");
        assert_eq!(refusal.message, "value overflows numeric format");
    });
}

#[test]
fn a_bad_reducer_is_refused_and_the_place_is_named() {
    on_each_install(|db| {
        let mut s = db.owner();
        for (reducer, place, detail) in [
            ("[]", "the root", "Expected an object, found an array."),
            (
                r#"{"onn": {}}"#,
                "onn",
                "A reducer has the keys initial, on and otherwise.",
            ),
            (
                r#"{"initial": null}"#,
                "initial",
                "Expected an object, found null.",
            ),
            (
                r#"{"on": {"order paid": 1}}"#,
                r#"on."order paid""#,
                "Expected an array of ops, found a number.",
            ),
            (
                r#"{"on": {"a": [[]]}}"#,
                "on.a[0]",
                "Expected an object, found an array.",
            ),
            (
                r#"{"on": {"a": [{}]}}"#,
                "on.a[0]",
                r#"The key "op" is missing."#,
            ),
            (
                r#"{"on": {"a": [{"op": "tombstone"}, {"op": "inc", "path": "a"}]}}"#,
                "on.a[1].op",
                "Expected one of merge, set, add, min, max, push, put, drop, remove, tombstone.",
            ),
            (
                r#"{"otherwise": [{"op": "set", "path": "a", "valeu": 1}]}"#,
                "otherwise[0].valeu",
                r#"The op "set" takes no such key, only op, path, value."#,
            ),
            (
                r#"{"otherwise": [{"op": "put", "path": "a", "value": 1}]}"#,
                "otherwise[0]",
                r#"The op "put" needs the key "key"."#,
            ),
            (
                r#"{"otherwise": [{"op": "remove", "path": "a..b"}]}"#,
                "otherwise[0].path",
                "A segment of a path must not be empty.",
            ),
            (
                r#"{"otherwise": [{"op": "remove", "path": []}]}"#,
                "otherwise[0].path",
                "A path has 1 to 32 segments, this one has 0.",
            ),
            (
                r#"{"otherwise": [{"op": "remove", "path": ["a", null]}]}"#,
                "otherwise[0].path[1]",
                "Expected a string, found null.",
            ),
            (
                r#"{"otherwise": [{"op": "remove", "path": " a"}]}"#,
                "otherwise[0].path",
                "A segment that begins or ends with white space needs double quotes.",
            ),
            (
                r#"{"otherwise": [{"op": "set", "path": "a", "value": "$price"}]}"#,
                "otherwise[0].value",
                "A string that begins with $ or @ is a reference: $ or $.path into the payload, @.field of the envelope.",
            ),
            (
                r#"{"otherwise": [{"op": "set", "path": "a", "value": "@.who"}]}"#,
                "otherwise[0].value",
                "The envelope has @.event_type, @.aggregate_type, @.aggregate_id, @.version, @.position, @.event_id, \
                 @.created_at and @.metadata; only @.metadata goes deeper.",
            ),
            (
                r#"{"otherwise": [{"op": "add", "path": "a", "value": "1"}]}"#,
                "otherwise[0].value",
                "Expected a number or a reference, found a string.",
            ),
            (
                r#"{"otherwise": [{"op": "drop", "path": "a", "key": {}}]}"#,
                "otherwise[0].key",
                "Expected a string, a number, a boolean or a reference, found an object.",
            ),
        ] {
            let message = format!("reducer is not valid at {place}");
            for sql in [
                format!("select nightowls.check_reducer({})", quote(reducer)),
                format!(
                    "select nightowls.fold_state({}, null, '[]')",
                    quote(reducer)
                ),
                format!(
                    "select nightowls.fold_events({}, jsonb_populate_record(null::nightowls.events, '{{\"event_type\": \"e\"}}'))",
                    quote(reducer)
                ),
            ] {
                let refusal = s.refused(&sql);
                assert_eq!(
                    (
                        refusal.code.as_str(),
                        refusal.message.as_str(),
                        refusal.detail.as_str()
                    ),
                    ("22023", message.as_str(), detail),
                    "{sql}"
                );
            }
        }
        let refusal = s.refused("select nightowls.check_reducer('{\"otherwise\": [{\"op\": \"set\", \"path\": \"a\", \"value\": \"@\"}]}')");
        assert_eq!(
            refusal.hint,
            r#"To mean the string itself, write {"literal": "…"}."#
        );
    });
}

#[test]
fn nulls_and_depths_have_their_own_codes() {
    on_each_install(|db| {
        let mut s = db.owner();
        let nested = |levels: usize| format!("{}{}", "[".repeat(levels), "]".repeat(levels));
        for (sql, code) in [
            ("select nightowls.check_reducer(null)".to_owned(), "22004"),
            (
                "select nightowls.fold_state(null, null, '[]')".to_owned(),
                "22004",
            ),
            (
                "select nightowls.fold_state('{}', null, null)".to_owned(),
                "22004",
            ),
            (
                "select nightowls.fold_state('{}', '[]', '[]')".to_owned(),
                "22023",
            ),
            (
                "select nightowls.fold_state('{}', null, '{}')".to_owned(),
                "22023",
            ),
            (
                format!(
                    "select nightowls.check_reducer('{{\"initial\": {{\"a\": {}}}}}')",
                    nested(100)
                ),
                "54000",
            ),
            (
                format!(
                    "select nightowls.fold_state('{{}}', '{{\"a\": {}}}', '[]')",
                    nested(201)
                ),
                "54000",
            ),
            (
                format!(
                    "select nightowls.fold_state('{{}}', null, '{}')",
                    nested(5000)
                ),
                "54000",
            ),
        ] {
            assert_eq!(s.refused(&sql).code, code, "{sql}");
        }
        s.exec(&format!(
            "select nightowls.check_reducer('{{\"initial\": {{\"a\": {}}}}}')",
            nested(99)
        ));
        s.exec(&format!(
            "select nightowls.fold_state('{{}}', '{{\"a\": {}}}', '[]')",
            nested(200)
        ));
    });
}

#[test]
fn a_tombstone_ends_a_state_and_the_next_op_starts_again() {
    on_each_install(|db| {
        let mut s = db.owner();
        let reducer = r#"{"initial": {"n": 0}, "on": {"add": [{"op": "add", "path": "n"}], "end": [{"op": "tombstone"}],
                          "touch": [{"op": "set", "path": "x", "value": "$.none"}], "nothing": []}}"#;
        for (types, result) in [
            ("add add end", "null"),
            ("add end nothing unknown", "null"),
            ("add end end add", r#"{"n": 1}"#),
            ("add end touch", r#"{"n": 0}"#),
            ("nothing unknown", r#"{"n": 0}"#),
            ("", "null"),
        ] {
            let state = s.value(&format!(
                "select nightowls.fold_events({}, jsonb_populate_record(null::nightowls.events,
                          jsonb_build_object('event_type', t.name)) order by t.number)
                   from unnest(string_to_array('{types}', ' ')) with ordinality t (name, number)",
                quote(reducer)
            ));
            assert_eq!(state.as_deref().unwrap_or("null"), result, "{types}");
        }
    });
}

#[test]
fn an_erased_event_ends_a_state_whatever_the_reducer() {
    on_each_install(|db| {
        let mut s = db.owner();
        for reducer in [
            r#"{"initial": {"n": 0}, "on": {"add": [{"op": "add", "path": "n"}]}}"#,
            r#"{"initial": {"n": 0}, "otherwise": [{"op": "add", "path": "n"}]}"#,
        ] {
            for (types, result) in [
                ("add add nightowls.erased", "null"),
                ("nightowls.erased nightowls.erased", "null"),
                ("add nightowls.erased add", r#"{"n": 1}"#),
            ] {
                let state = s.value(&format!(
                    "select nightowls.fold_state({}, null,
                              (select jsonb_agg(jsonb_build_object('event_type', t.name) order by t.number)
                                 from unnest(string_to_array('{types}', ' ')) with ordinality t (name, number)))",
                    quote(reducer)
                ));
                assert_eq!(state.as_deref().unwrap_or("null"), result, "{types}");
            }
        }

        let refused = s.refused(
            r#"select nightowls.check_reducer('{"on": {"nightowls.erased": [{"op": "add", "path": "n"}]}}')"#,
        );
        assert_eq!(
            (refused.code.as_str(), refused.message.as_str()),
            ("22023", "reducer is not valid at on.\"nightowls.erased\"")
        );
    });
}

#[test]
fn null_events_are_skipped_and_the_reducer_must_stay_the_same() {
    on_each_install(|db| {
        let mut s = db.owner();
        let events = "(values (1, null::nightowls.events), (2, jsonb_populate_record(null::nightowls.events, \
                       '{\"event_type\": \"e\"}')), (3, null)) v (number, event)";
        let state = s.value(&format!(
            "select nightowls.fold_events('{{\"otherwise\": [{{\"op\": \"add\", \"path\": \"n\"}}]}}', v.event order by v.number) from {events}"
        ));
        assert_eq!(state.as_deref(), Some(r#"{"n": 1}"#));

        let refusal = s.refused(
            "select nightowls.fold_events(jsonb_build_object('initial', jsonb_build_object('n', i)),
                      jsonb_populate_record(null::nightowls.events, '{\"event_type\": \"e\"}') order by i)
               from generate_series(1, 2) i",
        );
        assert_eq!(refusal.code, "22023");
        assert_eq!(refusal.message, "reducer must be the same for every event");

        let refusal = s.refused(
            "select nightowls.fold_events(null, jsonb_populate_record(null::nightowls.events, '{\"event_type\": \"e\"}'))",
        );
        assert_eq!(refusal.code, "22004");
    });
}

#[test]
fn times_are_written_in_utc_whatever_the_session_says() {
    on_each_install(|db| {
        let mut s = db.owner();
        let folded = |time: &str| {
            format!(
                "select nightowls.fold_events('{{\"otherwise\": [{{\"op\": \"set\", \"path\": \"at\", \"value\": \"@.created_at\"}}]}}',
                          jsonb_populate_record(null::nightowls.events, '{{\"event_type\": \"e\", \"created_at\": \"{time}\"}}')) ->> 'at'"
            )
        };
        s.exec("set timezone to 'Asia/Kathmandu'; set datestyle to 'German'");
        for (time, text) in [
            (
                "2024-02-29 23:59:59.123456+00",
                Some("2024-02-29T23:59:59.123456Z"),
            ),
            (
                "2024-03-01 01:00:00+02",
                Some("2024-02-29T23:00:00.000000Z"),
            ),
            (
                "1969-12-31 23:59:59.999999+00",
                Some("1969-12-31T23:59:59.999999Z"),
            ),
            (
                "0044-03-15 12:00:00+00 BC",
                Some("0044-03-15T12:00:00.000000Z"),
            ),
            (
                "12345-01-01 00:00:00+00",
                Some("12345-01-01T00:00:00.000000Z"),
            ),
            ("infinity", None),
        ] {
            assert_eq!(s.value(&folded(time)).as_deref(), text);
        }
    });
}

/// Makes the default org, and 1,000 events of `order`/`o-1`.
fn thousand_events(db: &Db) -> Session {
    let mut s = db.owner();
    s.exec(
        "select nightowls.set_default_org(nightowls.create_org('acme'));
         select nightowls.append_events('order', 'o-1',
           (select jsonb_agg(jsonb_build_object('event_type', 'counted', 'payload', jsonb_build_object('by', i)) order by i)
              from generate_series(1, 1000) i))",
    );
    s
}

const COUNTING: &str =
    r#"'{"initial": {"n": 0}, "on": {"counted": [{"op": "add", "path": "n", "value": "$.by"}]}}'"#;

#[test]
fn a_tail_is_folded_from_its_base() {
    on_each_install(|db| {
        let mut s = thousand_events(db);
        let mut tail = |base: &str, from: &str, to: &str| {
            let sql = format!(
                "select t.state, t.version, t.\"position\" = (select e.\"position\" from nightowls.events e where e.version = t.version)
                   from nightowls._fold_tail(nightowls.current_org(), {COUNTING}, {base}, 'order', 'o-1', {from}, {to}) t"
            );
            let row = s.rows(&sql).remove(0);
            let column = |number: usize| row[number].clone().unwrap_or_else(|| "null".to_owned());
            (column(0), column(1), column(2))
        };
        let found =
            |state: &str, version: &str| (state.to_owned(), version.to_owned(), "t".to_owned());
        assert_eq!(tail("'{}'", "1", "null"), found(r#"{"n": 500500}"#, "1000"));
        assert_eq!(
            tail("'{\"n\": 1}'", "999", "null"),
            found(r#"{"n": 2000}"#, "1000")
        );
        assert_eq!(tail("'{\"n\": 1}'", "2", "3"), found(r#"{"n": 6}"#, "3"));
        assert_eq!(tail("'{\"n\": 1}'", "2", "2"), found(r#"{"n": 3}"#, "2"));
        assert_eq!(tail("null", "2", "2"), found(r#"{"n": 2}"#, "2"));
        assert_eq!(tail("null", "2", "3"), found(r#"{"n": 5}"#, "3"));
        for (from, to) in [("1001", "null"), ("1001", "1001"), ("3", "2")] {
            assert_eq!(
                tail("'{\"n\": 1}'", from, to),
                (
                    r#"{"n": 1}"#.to_owned(),
                    "null".to_owned(),
                    "null".to_owned()
                )
            );
            assert_eq!(tail("null", from, to).0, "null");
        }
    });
}

#[test]
fn the_aggregate_runs_in_groups_in_windows_and_again() {
    on_each_install(|db| {
        let mut s = thousand_events(db);
        let groups = s.rows(&format!(
            "select nightowls.fold_events({COUNTING}, e order by e.version) from nightowls.events e group by e.version % 2 order by 1"
        ));
        assert_eq!(
            groups,
            [
                [Some(r#"{"n": 250000}"#.to_owned())],
                [Some(r#"{"n": 250500}"#.to_owned())]
            ]
        );

        let running = s.value(&format!(
            "select string_agg(f.state ->> 'n', ',' order by f.version)
               from (select e.version, nightowls.fold_events({COUNTING}, e) over (order by e.version) as state
                       from nightowls.events e where e.version <= 4) f"
        ));
        assert_eq!(running.as_deref(), Some("1,3,6,10"));

        let again = s.value(&format!(
            "select sum((l.state ->> 'n')::int)
               from generate_series(1, 20) i
              cross join lateral (select nightowls.fold_events({COUNTING}, e order by e.version) as state
                                    from nightowls.events e where e.version <= i) l"
        ));
        assert_eq!(again.as_deref(), Some("1540"));
    });
}

/// What the backend has allocated from its memory contexts, in bytes, once the
/// statement that asks is at its end.
fn memory(s: &mut Session) -> i64 {
    s.value("select sum(total_bytes) from pg_backend_memory_contexts")
        .and_then(|bytes| bytes.parse().ok())
        .expect("a number")
}

/// What the backend's process takes, in kB.
fn resident(pid: i32) -> i64 {
    std::fs::read_to_string(format!("/proc/{pid}/status"))
        .ok()
        .and_then(|status| {
            let line = status
                .lines()
                .find(|line| line.starts_with("RssAnon:"))?
                .to_owned();
            line.split_whitespace().nth(1)?.parse().ok()
        })
        .expect("a server on this machine")
}

#[test]
fn folding_again_and_again_keeps_no_memory() {
    on_each_install(|db| {
        thousand_events(db);
        let mut s = db.superuser();
        let pid = s.pid();
        // The state holds every payload: what is not given back shows soon.
        let keeping = r#"'{"otherwise": [{"op": "push", "path": "all", "value": {"literal": "a text of some length, to weigh more"}}]}'"#;
        let round = |s: &mut Session| {
            s.exec(&format!(
                "select count(l.state)
                   from generate_series(1, 60) i
                  cross join lateral (select nightowls.fold_events({keeping}, e order by e.version) as state
                                        from nightowls.events e where e.version <= 100 + i) l"
            ));
            s.refused(&format!(
                "select nightowls.fold_events({keeping}, e order by e.version), count(1 / (999 - e.version)) from nightowls.events e"
            ));
        };
        for _ in 0..3 {
            round(&mut s);
        }
        let before = (memory(&mut s), resident(pid));
        for _ in 0..20 {
            round(&mut s);
        }
        let after = (memory(&mut s), resident(pid));
        assert!(
            after.0 < before.0 + 512 * 1024,
            "{before:?} became {after:?}"
        );
        assert!(after.1 < before.1 + 4 * 1024, "{before:?} became {after:?}");
    });
}

#[test]
fn a_long_fold_can_be_cancelled() {
    on_each_install(|db| {
        let mut s = db.owner();
        let mut other = db.superuser();
        let pid = s.pid();
        s.exec(
            "create temp table many as select jsonb_agg(jsonb_build_object('event_type', 'e')) as events from generate_series(1, 300000)",
        );
        let cancel = std::thread::spawn(move || {
            wait_until("the fold is running", Duration::from_secs(20), || {
                other
                    .value(&format!(
                        "select pg_cancel_backend(pid) from pg_stat_activity
                          where pid = {pid} and state = 'active' and query like '%fold_state%'
                            and clock_timestamp() > query_start + '0.05 s'"
                    ))
                    .is_some()
            });
        });
        // Pushing makes each event dearer than the one before.
        let refusal = s.refused(
            r#"select nightowls.fold_state('{"otherwise": [{"op": "push", "path": "a", "value": {"literal": "0123456789"}}]}', null, m.events || m.events || m.events)
                 from many m"#,
        );
        cancel.join().expect("the other session cancels");
        assert_eq!(refusal.code, "57014");
        assert_eq!(s.value("select 1").as_deref(), Some("1"));
    });
}

#[test]
fn a_service_may_fold_and_check() {
    on_each_install(|db| {
        let mut s = db.session(SERVICE);
        let state = s.value(
            r#"select nightowls.fold_state('{"on": {"e": [{"op": "add", "path": "n"}]}}', null, '[{"event_type": "e"}]')"#,
        );
        assert_eq!(state.as_deref(), Some(r#"{"n": 1}"#));
        s.exec("select nightowls.check_reducer('{}')");
        assert_eq!(
            s.value("select nightowls.fold_events('{}', e) from nightowls.events e"),
            None
        );
    });
}

/// Loads the twin beside the library, in a schema of its own.
fn with_twin(db: &Db) -> Session {
    let twin = include_str!("../sql/plain/fold.sql")
        .replace("nightowls.", "twin.")
        .replace("twin.events", "nightowls.events")
        .replace("twin.erased", "nightowls.erased");
    let mut s = db.owner();
    s.exec("create schema twin");
    s.exec(&twin);
    s.exec(
        r#"
create function public.outcome(query text, reducer jsonb, state jsonb, events jsonb) returns text language plpgsql as $$
declare
  v_result text;
  v_code text;
  v_message text;
  v_detail text;
  v_hint text;
begin
  execute query into v_result using reducer, state, events;
  return coalesce(v_result, '(null)');
exception when others then
  get stacked diagnostics v_code = returned_sqlstate, v_message = message_text, v_detail = pg_exception_detail,
    v_hint = pg_exception_hint;
  return format('%s: %s | %s | %s', v_code, v_message, v_detail, v_hint);
end
$$;"#,
    );
    s
}

/// The ways in, with `$1` the reducer, `$2` the state and `$3` the events.
const WAYS: [&str; 5] = [
    "select nightowls.check_reducer($1)::text",
    "select nightowls.fold_state($1, $2, $3)::text",
    "select nightowls.fold_events($1, jsonb_populate_record(null::nightowls.events, e.value) order by e.number)::text
       from jsonb_array_elements($3) with ordinality e (value, number)",
    "select nightowls._fold_rows($1, $2, r.event_type, r.aggregate_type, r.aggregate_id, r.version, r.\"position\", r.event_id,
                                 r.created_at, r.payload, r.metadata order by e.number)::text
       from jsonb_array_elements($3) with ordinality e (value, number)
      cross join lateral jsonb_populate_record(null::nightowls.events, e.value) r
      where r.event_type is not null",
    "select nightowls._fold_row($1, $2, r.event_type, r.aggregate_type, r.aggregate_id, r.version, r.\"position\", r.event_id,
                                r.created_at, r.payload, r.metadata)::text
       from jsonb_populate_record(null::nightowls.events, $3 -> 0) r
      where r.event_type is not null",
];

#[test]
fn the_library_and_its_twin_never_differ() {
    // One seed repeats a run: NIGHTOWLS_SEED=… cargo test --test suite twin.
    let seed = std::env::var("NIGHTOWLS_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| {
            let now = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .expect("a clock after 1970");
            now.as_micros() as u64
        });
    let rounds = std::env::var("NIGHTOWLS_ROUNDS")
        .ok()
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(20);
    on_install(Install::Extension, |db| {
        let mut s = with_twin(db);
        let mut random = Random(seed);
        let (mut folded, mut refused) = (0, 0);
        for _ in 0..rounds {
            let mut cases = String::new();
            for number in 0..200 {
                let (reducer, fits) = random.reducer();
                let state = match random.below(4) {
                    0 => "null".to_owned(),
                    _ => quote(&random.object(3)),
                };
                let events = quote(&random.events());
                let comma = if number > 0 { "," } else { "" };
                write!(
                    cases,
                    "{comma}({fits}, {}::jsonb, {state}::jsonb, {events}::jsonb)",
                    quote(&reducer)
                )
                .expect("a string takes all");
            }
            for (way, query) in WAYS.iter().enumerate() {
                let twin = query
                    .replace("nightowls.", "twin.")
                    .replace("twin.events", "nightowls.events");
                // The private ones trust the reducer, so they are given none that is bad.
                let rows = s.rows(&format!(
                    "select c.reducer, c.state, c.events, o.library, o.twin
                       from (values {cases}) c (fits, reducer, state, events)
                      cross join lateral (select public.outcome({}, c.reducer, c.state, c.events),
                                                 public.outcome({}, c.reducer, c.state, c.events)) o (library, twin)
                      where {way} < 3 or public.outcome('select nightowls.check_reducer($1)::text', c.reducer, null, null) = ''",
                    quote(query),
                    quote(&twin),
                ));
                for row in rows {
                    let [reducer, state, events, library, twin] =
                        <[Option<String>; 5]>::try_from(row)
                            .expect("five columns")
                            .map(Option::unwrap_or_default);
                    assert_eq!(
                        library, twin,
                        "seed {seed}: {query}\nreducer {reducer}\nstate {state}\nevents {events}"
                    );
                    if library.starts_with(['{', '(']) {
                        folded += 1;
                    } else {
                        refused += 1;
                    }
                }
            }
        }
        // Neither kind may be rare, or little was compared.
        assert!(
            folded > 400 * rounds / 4 && refused > 400 * rounds / 4,
            "{folded} folded, {refused} refused"
        );
    });
}

/// A small generator of reducers, states and events (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn one_in(&mut self, end: usize) -> bool {
        self.below(end) == 0
    }

    fn pick<'a>(&mut self, from: &[&'a str]) -> &'a str {
        from[self.below(from.len())]
    }

    /// A key, as JSON. Few, so that paths meet.
    fn key(&mut self) -> &'static str {
        const ODD: [&str; 14] = [
            r#""a.b""#,
            r#""x y""#,
            r#""""#,
            r#""q\"\\""#,
            r#"" a""#,
            r#""\u00e9""#,
            r#""\ud83d\ude00""#,
            r#""-1""#,
            r#""1.50""#,
            r#""true""#,
            r#""literal""#,
            r#""$serde_json::private::Number""#,
            r#""\u0001\n""#,
            r#""metadata""#,
        ];
        if self.one_in(4) {
            self.pick(&ODD)
        } else {
            self.pick(&[r#""a""#, r#""b""#, r#""c""#, r#""0""#])
        }
    }

    fn digits(&mut self, longest: usize) -> String {
        let count = 1 + self.below(longest);
        (0..count)
            .map(|_| char::from(b'0' + self.below(10) as u8))
            .collect()
    }

    fn number(&mut self) -> String {
        const EDGES: [&str; 14] = [
            "0",
            "-0",
            "0.00",
            "-0.0",
            "1.10",
            "1",
            "-1",
            "1e20",
            "-1E-20",
            "999999999999999999",
            "1000000000000000000",
            "-999999999999999999.9",
            "0.000000000000000001",
            "123456789012345678901234567890.10",
        ];
        match self.below(8) {
            0..=1 => self.pick(&EDGES).to_owned(),
            2 if self.one_in(40) => "9".repeat(131_072),
            2..=3 => {
                let (sign, whole, rest) = (self.pick(&["", "-"]), self.digits(24), self.digits(24));
                format!("{sign}1{whole}.{rest}")
            }
            4 => {
                let (sign, rest) = (self.pick(&["", "-"]), self.digits(30));
                format!("{sign}0.{rest}")
            }
            _ => {
                let (sign, whole, zeros) = (
                    self.pick(&["", "-"]),
                    self.digits(3),
                    self.pick(&["", ".0", ".50", ".25"]),
                );
                format!("{sign}1{whole}{zeros}")
            }
        }
    }

    fn string(&mut self) -> String {
        const STRINGS: [&str; 16] = [
            r#""""#,
            r#""a""#,
            r#""b""#,
            r#""B""#,
            r#""ab""#,
            r#""\u00e4""#,
            r#""\ud83d\ude00""#,
            r#""\udbff\udfff""#,
            r#""\uffff""#,
            r#""\"""#,
            r#""\\""#,
            r#""line\nend\t""#,
            r#""\u001f\u007f""#,
            r#""1""#,
            r#""null""#,
            r#""a much longer text, with many words in it""#,
        ];
        self.pick(&STRINGS).to_owned()
    }

    fn json(&mut self, depth: usize) -> String {
        match self.below(if depth == 0 { 6 } else { 10 }) {
            0 => "null".to_owned(),
            1 => self.pick(&["true", "false"]).to_owned(),
            2..=3 => self.number(),
            4..=5 => self.string(),
            6..=7 => self.array(depth - 1),
            _ => self.object(depth - 1),
        }
    }

    fn array(&mut self, depth: usize) -> String {
        let elements: Vec<_> = (0..self.below(4)).map(|_| self.json(depth)).collect();
        format!("[{}]", elements.join(","))
    }

    fn object(&mut self, depth: usize) -> String {
        let members: Vec<_> = (0..self.below(5))
            .map(|_| format!("{}:{}", self.key(), self.json(depth)))
            .collect();
        format!("{{{}}}", members.join(","))
    }

    /// A path, as a JSON string or array; now and then one that is none.
    fn path(&mut self) -> String {
        const STRINGS: [&str; 12] = [
            r#""a.b""#,
            r#""a.b.c""#,
            r#""\"a.b\".c""#,
            r#""a.\"x y\"""#,
            r#""0""#,
            r#""a.0""#,
            r#""c.\"q\\\"\\\\\"""#,
            r#""x y""#,
            r#""\ud83d\ude00.\u00e9""#,
            r#""a.\"\\u00e9\".b""#,
            r#""b.c.a.b.c.a""#,
            r#""\" a\"""#,
        ];
        const FAULTS: [&str; 20] = [
            r#""""#,
            r#"".""#,
            r#""a.""#,
            r#"".a""#,
            r#""a..b""#,
            r#"" a""#,
            r#""a\t.b""#,
            r#""a.b\u000b""#,
            r#""a\"b""#,
            r#""\"a""#,
            r#""\"a\"b""#,
            r#""\"\"""#,
            r#""\"\\n\"""#,
            r#""\"a\".""#,
            "1",
            "null",
            "{}",
            "[]",
            r#"["a",""]"#,
            r#"["a",1]"#,
        ];
        match self.below(24) {
            0 => self.pick(&FAULTS).to_owned(),
            1 => {
                let segments = vec!["a"; 31 + self.below(3)];
                format!("\"{}\"", segments.join("."))
            }
            2..=5 => {
                let segments: Vec<_> = (0..1 + self.below(3)).map(|_| self.key()).collect();
                format!("[{}]", segments.join(","))
            }
            6..=12 => self.pick(&STRINGS).to_owned(),
            _ => self.pick(&[r#""a""#, r#""b""#, r#""c""#]).to_owned(),
        }
    }

    /// A value or a key of an op.
    fn source(&mut self) -> String {
        const REFERENCES: [&str; 20] = [
            r#""$""#,
            r#""$.a""#,
            r#""$.b""#,
            r#""$.c""#,
            r#""$.a.b""#,
            r#""$.a.0""#,
            r#""$.a.-1""#,
            r#""$.\"a.b\"""#,
            r#""$.a.\" 01\"""#,
            r#""$.a.+0""#,
            r#""@.event_type""#,
            r#""@.aggregate_type""#,
            r#""@.aggregate_id""#,
            r#""@.version""#,
            r#""@.position""#,
            r#""@.event_id""#,
            r#""@.created_at""#,
            r#""@.metadata""#,
            r#""@.metadata.a""#,
            r#""@.metadata.a.0""#,
        ];
        const FAULTS: [&str; 9] = [
            r#""$a""#,
            r#""$.""#,
            r#""@""#,
            r#""@.""#,
            r#""@.nothing""#,
            r#""@.version.a""#,
            r#""$.a..b""#,
            r#""$..""#,
            r#""@a""#,
        ];
        match self.below(24) {
            0 => self.pick(&FAULTS).to_owned(),
            1..=3 => format!("{{\"literal\":{}}}", self.json(2)),
            4..=8 => self.json(2),
            9..=13 => self.number(),
            _ => self.pick(&REFERENCES).to_owned(),
        }
    }

    fn op(&mut self) -> String {
        const OPS: [&str; 10] = [
            "merge",
            "set",
            "add",
            "min",
            "max",
            "push",
            "put",
            "drop",
            "remove",
            "tombstone",
        ];
        let name = self.pick(&OPS);
        let mut keys = match name {
            "merge" if self.one_in(2) => vec!["value"],
            "add" if self.one_in(3) => vec!["path"],
            "merge" | "set" | "add" | "min" | "max" | "push" => vec!["path", "value"],
            "put" => vec!["path", "key", "value"],
            "drop" => vec!["path", "key"],
            "remove" => vec!["path"],
            _ => vec![],
        };
        if self.one_in(60) {
            keys.pop();
        }
        if self.one_in(60) {
            keys.push(self.pick(&["key", "value", "path", "from", "x y"]));
        }
        let mut op = match self.below(60) {
            0 => r#"{"op":"nope""#.to_owned(),
            1 => r#"{"op":1"#.to_owned(),
            _ => format!(r#"{{"op":"{name}""#),
        };
        for key in keys {
            let value = match (key, name) {
                ("path", _) => self.path(),
                ("value", "merge") if !self.one_in(12) => match self.below(3) {
                    0 => self.object(3),
                    _ => self
                        .pick(&[r#""$""#, r#""$.a""#, r#""@.metadata""#])
                        .to_owned(),
                },
                ("value", "add") if !self.one_in(12) => match self.below(2) {
                    0 => self.number(),
                    _ => self
                        .pick(&[r#""$.a""#, r#""$.b""#, r#""$.a.b""#, r#""@.version""#])
                        .to_owned(),
                },
                ("key", _) if !self.one_in(8) => match self.below(2) {
                    0 => self.key().to_owned(),
                    _ => self
                        .pick(&[
                            r#""$.a""#,
                            r#""$.b""#,
                            r#""@.event_type""#,
                            r#""@.version""#,
                        ])
                        .to_owned(),
                },
                _ => self.source(),
            };
            write!(op, ",\"{key}\":{value}").expect("a string takes all");
        }
        op + "}"
    }

    fn ops(&mut self) -> String {
        let ops: Vec<_> = (0..self.below(4))
            .map(|_| {
                if self.one_in(80) {
                    self.json(1)
                } else {
                    self.op()
                }
            })
            .collect();
        format!("[{}]", ops.join(","))
    }

    /// A reducer, and whether it was meant to be valid at its top.
    fn reducer(&mut self) -> (String, bool) {
        if self.one_in(60) {
            return (self.json(2), false);
        }
        let mut members = Vec::new();
        if !self.one_in(3) {
            members.push(format!("\"initial\":{}", self.object(2)));
        }
        if !self.one_in(8) {
            let on: Vec<_> = (0..3)
                .map(|_| {
                    let event_type = self.pick(&["paid", "sent", "order paid", "\\u00e9\\\"", ""]);
                    let event_type = if self.one_in(120) {
                        "nightowls.erased"
                    } else {
                        event_type
                    };
                    format!("\"{event_type}\":{}", self.ops())
                })
                .collect();
            members.push(format!("\"on\":{{{}}}", on.join(",")));
        }
        if !self.one_in(3) {
            members.push(format!("\"otherwise\":{}", self.ops()));
        }
        if self.one_in(60) {
            members.push(format!("{}:{}", self.key(), self.json(1)));
        }
        (format!("{{{}}}", members.join(",")), true)
    }

    fn event(&mut self) -> String {
        let mut event = format!(
            "{{\"event_type\":\"{}\"",
            self.pick(&[
                "paid",
                "paid",
                "sent",
                "order paid",
                "\\u00e9\\\"",
                "",
                "other",
                "nightowls.erased"
            ])
        );
        let payload = match self.below(12) {
            0 => format!("{}1{}", "[".repeat(98), "]".repeat(98)),
            1..=2 => self.json(3),
            _ => self.object(3),
        };
        write!(event, ",\"payload\":{payload}").expect("a string takes all");
        if !self.one_in(4) {
            write!(
                event,
                ",\"version\":{},\"position\":{}",
                1 + self.below(9),
                self.digits(17).trim_start_matches('0').to_owned() + "1"
            )
            .expect("a string takes all");
        }
        if self.one_in(2) {
            write!(event, ",\"metadata\":{}", self.json(2)).expect("a string takes all");
        }
        if self.one_in(2) {
            write!(
                event,
                ",\"aggregate_type\":{},\"aggregate_id\":{}",
                self.string(),
                self.string()
            )
            .expect("a string takes all");
        }
        if self.one_in(2) {
            let id = self.pick(&[
                "0b0e1c5e-93ad-4f1e-9d8c-2f6a0c8e7d55",
                "ABCDEF00-0000-4000-8000-00000000ffff",
            ]);
            write!(event, ",\"event_id\":\"{id}\"").expect("a string takes all");
        }
        if self.one_in(2) {
            let time = self.pick(&[
                "2024-02-29T23:59:59.5Z",
                "1999-12-31 23:59:59.999999+05:30",
                "0001-01-01T00:00:00Z",
                "9999-12-31T23:59:59-12",
                "2024-02-29T23:59:60Z",
            ]);
            write!(event, ",\"created_at\":\"{time}\"").expect("a string takes all");
        }
        if self.one_in(60) {
            let key = self.pick(&[
                "version",
                "position",
                "aggregate_id",
                "event_id",
                "created_at",
            ]);
            let value = self.pick(&[
                "null",
                "true",
                "1.0",
                "9223372036854775808",
                "\"x\"",
                "\"2024-13-01T00:00:00Z\"",
                "\"2024-01-01\"",
            ]);
            write!(event, ",\"{key}\":{value}").expect("a string takes all");
        }
        event + "}"
    }

    fn events(&mut self) -> String {
        let events: Vec<_> = (0..self.below(6))
            .map(|_| {
                if self.one_in(120) {
                    self.json(1)
                } else {
                    self.event()
                }
            })
            .collect();
        format!("[{}]", events.join(","))
    }
}
