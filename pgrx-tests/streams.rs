//! Streams: joins of events, projections and tables inside a window.

use crate::dump::by_psql_as;
use crate::fixture::{Random, default_org, lines, new_org};
use crate::projections::text;
use crate::snapshots::long_history;
use crate::support::{
    APP, Db, Install, SERVICE, STRANGER, SUPERUSER, Session, on_each_install, quote,
};

const PLACED: &str = r#"'{"event_types": ["placed"]}'"#;
const PAID: &str = r#"'{"event_types": ["paid"]}'"#;
const BY_ID: &str = r#"'{"left": "$.order", "right": "$.order.id"}'"#;

/// Writes events with the times they are given, which no client may choose.
fn write_events(db: &Db, org: &str, rows: &str) {
    db.superuser().exec(&format!(
        "begin; set local session_replication_role = replica;
         insert into nightowls.events (org_id, aggregate_type, aggregate_id, version, event_type, payload, metadata, created_at)
         select '{org}', r.* from ({rows}) r; commit"
    ));
}

/// Random events of two types whose keys and times meet often: some keys missing,
/// some null, some numbers for texts, several at one instant.
fn write_random_events(db: &Db, org: &str, count: u64, seconds: u64, seed: u64) {
    let mut random = Random::new(seed);
    let rows: Vec<_> = (0..count)
        .map(|i| {
            let kind = ["placed", "paid", "noted"][random.below(3) as usize];
            let key = match random.below(12) {
                0 => "null".to_owned(),
                1 => "{}".to_owned(),
                2 => r#""a \" key, é""#.to_owned(),
                n => (n % 6).to_string(),
            };
            let payload = match kind {
                "placed" => format!(r#"{{"order": {key}}}"#),
                _ => format!(r#"{{"order": {{"id": {key}}}}}"#),
            };
            format!(
                "('a', 'e{i}', 1, '{kind}', '{payload}'::jsonb, '{{}}'::jsonb, timestamptz '2026-03-01 00:00+00' + {} * interval '1 second')",
                random.below(seconds)
            )
        })
        .collect();
    write_events(db, org, &format!("values {}", rows.join(", ")));
}

const PAIRS: &str = "select left_position, right_position, extract(epoch from window_start)::numeric(20, 3) from nightowls.stream_s order by 1, 2";

/// The pairs that a join must have, by nothing but its definition.
fn brute_force(db: &Db, org: &str, kind: &str, within: i64) -> Vec<String> {
    let events: Vec<(i64, bool, String, i64)> = db
        .superuser()
        .rows(&format!(
            "select position, event_type = 'placed', coalesce(case event_type when 'placed' then payload ->> 'order' else payload #>> '{{order,id}}' end, 'null '), extract(epoch from created_at)::bigint
               from nightowls.events where org_id = '{org}' and event_type in ('placed', 'paid') order by position"
        ))
        .into_iter()
        .map(|row| {
            let row: Vec<String> = row.into_iter().flatten().collect();
            (row[0].parse().unwrap(), row[1] == "t", row[2].clone(), row[3].parse().unwrap())
        })
        .filter(|event| event.2 != "null ")
        .collect();
    // 2000-01-03 00:00 UTC, a Monday.
    let window = |at: i64| (at - 946_857_600).div_euclid(within) * within + 946_857_600;
    let session = |key: &str, at: i64| {
        let mut times: Vec<_> = events.iter().filter(|e| e.2 == key).map(|e| e.3).collect();
        times.sort_unstable();
        let mut start = times[0];
        for pair in times.windows(2) {
            if pair[1] > at {
                break;
            }
            if pair[1] - pair[0] > within {
                start = pair[1];
            }
        }
        start
    };
    let mut pairs = Vec::new();
    for left in events.iter().filter(|e| e.1) {
        for right in events.iter().filter(|e| !e.1 && e.2 == left.2) {
            let (together, start) = match kind {
                "tumbling" => (window(left.3) == window(right.3), window(left.3)),
                "sliding" => ((left.3 - right.3).abs() <= within, left.3 - within),
                _ => {
                    let start = session(&left.2, left.3);
                    (start == session(&right.2, right.3), start)
                }
            };
            if together {
                pairs.push((
                    left.0,
                    right.0,
                    format!("{} {} {start}.000", left.0, right.0),
                ));
            }
        }
    }
    pairs.sort();
    pairs.into_iter().map(|pair| pair.2).collect()
}

#[test]
fn a_join_of_events_finds_exactly_the_pairs_of_its_windows() {
    on_each_install(|db| {
        let org = default_org(db);
        let other = new_org(db, "other");
        let mut owner = db.owner();
        let mut found = 0;
        for (seed, (kind, within)) in [
            ("tumbling", 60),
            ("sliding", 20),
            ("session", 25),
            ("tumbling", 7),
            ("sliding", 1),
            ("session", 60),
        ]
        .into_iter()
        .enumerate()
        {
            for org in [&org, &other] {
                write_random_events(db, org, 250, 3000 / (1 + seed as u64 % 3), 7 + seed as u64);
            }
            owner.exec(&format!(
                "select nightowls.create_stream_join('s', {PLACED}, {PAID}, {BY_ID}, '{within} seconds', '{kind}')"
            ));
            for org in [&org, &other] {
                let expected = brute_force(db, org, kind, within);
                found += expected.len();
                // By the owner, whom no policy holds back, and by a service, behind one.
                for mut session in [db.owner(), db.service()] {
                    session.exec(&format!(
                        "select set_config('nightowls.org_id', '{org}', false)"
                    ));
                    assert_eq!(lines(&mut session, PAIRS), expected, "{kind} {within}");
                }
            }
            owner.exec("select nightowls.drop_stream('s')");
            db.superuser().exec(
                "begin; set local session_replication_role = replica; delete from nightowls.events; commit",
            );
        }
        assert!(found > 500, "only {found} pairs were looked for");
    });
}

#[test]
fn a_join_of_tables_finds_exactly_the_pairs_of_its_windows() {
    on_each_install(|db| {
        let org = default_org(db);
        let mut owner = db.owner();
        write_random_events(db, &org, 900, 3000, 3);
        write_random_events(db, &new_org(db, "other"), 100, 3000, 4);
        // The same events as two tables; one keeps the orgs apart, the other has no orgs.
        owner.exec(&format!(
            "create table public.placed as select org_id, position, payload ->> 'order' as key, created_at from nightowls.events where event_type = 'placed';
             create table public.paid as select position, payload as body, created_at as paid_at from nightowls.events where event_type = 'paid' and org_id = '{org}';
             grant select on public.placed, public.paid to {SERVICE}"
        ));
        for (kind, within) in [("tumbling", 60), ("sliding", 20), ("session", 25)] {
            owner.exec(&format!(
                r#"select nightowls.create_table_join('s', 'public.placed', 'public.paid', '{{"left": "key", "right": "body.order.id"}}', '{within} seconds', '{kind}', right_time => 'paid_at')"#
            ));
            let expected = brute_force(db, &org, kind, within);
            assert!(expected.len() > 20);
            assert_eq!(lines(&mut db.service(), PAIRS), expected, "{kind}");
            owner.exec("select nightowls.drop_stream('s')");
        }
    });
}

#[test]
fn events_are_enriched_with_the_row_or_the_state_they_refer_to() {
    on_each_install(|db| {
        let org = default_org(db);
        let other = new_org(db, "other");
        let mut owner = db.owner();
        owner.exec(&format!(
            r#"create table public.customers (org_id uuid, id int, name text, primary key (org_id, id));
               insert into public.customers values ('{org}', 1, 'ann'), ('{other}', 1, 'bob'), ('{other}', 2, 'eve');
               grant select on public.customers to {SERVICE};
               select nightowls.create_projection('limits', 'customer', '{{"initial": {{"n": 0}}, "otherwise": [{{"op": "add", "path": "n"}}]}}')"#
        ));
        // Between the orders the customer's history goes on.
        for customer in ["1", "1", "2", "x"] {
            db.service().exec(&format!(
                r#"select nightowls.append_event('customer', '1', 'moved') from generate_series(1, 3);
                   select nightowls.append_event('order', gen_random_uuid()::text, 'placed', '{{"customer": "{customer}"}}')"#
            ));
        }
        db.service().exec(
            r#"select nightowls.append_event('customer', '1', 'moved'); select nightowls.append_event('order', 'none', 'placed')"#,
        );
        owner.exec(
            r#"select nightowls.create_enrichment('rows', '{"event_types": ["placed"]}', 'public.customers', '{"left": "$.customer", "right": "id"}');
               select nightowls.create_enrichment('now', '{"event_types": ["placed"]}', 'limits', '{"left": "$.customer", "right": "aggregate_id"}');
               select nightowls.create_enrichment('then', '{"event_types": ["placed"]}', 'limits', '{"left": "$.customer", "right": "aggregate_id"}', at => 'event')"#,
        );
        let mut service = db.service();
        let shown = |service: &mut Session, view: &str, column: &str| {
            lines(
                service,
                &format!("select {column} from nightowls.stream_{view} order by position"),
            )
        };
        assert_eq!(
            shown(&mut service, "rows", "reference_name"),
            ["ann", "ann", "null", "null", "null"]
        );
        let now = r#"{"n": 13}"#;
        assert_eq!(
            shown(&mut service, "now", "reference_state"),
            [now, now, "null", "null", "null"]
        );
        assert_eq!(
            shown(&mut service, "then", "reference_state"),
            [r#"{"n": 3}"#, r#"{"n": 6}"#, "null", "null", "null"]
        );
        // Nothing of the one org is seen from the other.
        service.exec(&format!(
            "select set_config('nightowls.org_id', '{other}', false)"
        ));
        for view in ["rows", "now", "then"] {
            assert_eq!(shown(&mut service, view, "position"), Vec::<String>::new());
        }
        assert_eq!(
            db.session(STRANGER)
                .refused("select * from nightowls.stream_rows")
                .code,
            "42501"
        );
    });
}

/// At every position, also with other versions between, as a replay has it.
#[test]
fn a_state_at_an_event_is_what_a_replay_up_to_it_gives() {
    on_each_install(|db| {
        default_org(db);
        db.owner().exec(
            r#"select nightowls.create_projection('tally', 'thing', '{"initial": {}, "otherwise": [{"op": "push", "path": "seen", "value": "@.version"}]}');
               select nightowls.create_enrichment('then', '{"aggregate_types": ["note"]}', 'tally', '{"left": "$.thing", "right": "aggregate_id"}', at => 'event')"#,
        );
        let mut random = Random::new(11);
        for _ in 0..150 {
            let thing = random.below(4);
            if random.chance(40) {
                db.service().exec(&format!(
                    r#"select nightowls.append_event('note', 'n', 'noted', '{{"thing": {thing}}}')"#
                ));
            } else {
                db.service().exec(&format!("select nightowls.append_events('thing', '{thing}', (select jsonb_agg('{{\"event_type\": \"x\"}}'::jsonb) from generate_series(1, {})))", 1 + random.below(5)));
            }
        }
        for round in ["live", "compacted"] {
            if round == "compacted" {
                db.service().exec(
                    "select nightowls.create_snapshot('tally', i::text), nightowls.compact_aggregate('thing', i::text) from generate_series(0, 3) i",
                );
                assert_ne!(
                    text(
                        &mut db.superuser(),
                        "select count(*)::text from nightowls.events_archive"
                    ),
                    "0"
                );
            }
            assert_eq!(
            lines(
                &mut db.service(),
                "select s.position, s.reference_state from nightowls.stream_then s
                  where s.reference_state is distinct from (
                    select jsonb_build_object('seen', jsonb_agg(e.version order by e.version))
                      from nightowls.all_events e
                     where e.org_id = s.org_id and e.aggregate_type = 'thing' and e.aggregate_id = s.payload ->> 'thing' and e.position <= s.position
                    having count(*) > 0)"
            ),
            Vec::<String>::new()
        );
            assert!(
                text(
                    &mut db.service(),
                    "select count(reference_state)::text from nightowls.stream_then"
                )
                .parse::<i64>()
                .unwrap()
                    > 30
            );
        }
    });
}

#[test]
fn an_event_s_own_time_decides_where_it_is_named() {
    on_each_install(|db| {
        default_org(db);
        db.owner().exec(
            r#"select nightowls.create_stream_join('s', '{"event_types": ["placed"]}', '{"event_types": ["paid"]}', '{"left": ["$.order", "$.shop"], "right": ["$.order", "@.metadata.shop"]}',
                 left_time => '$.at', right_time => '@.metadata.at')"#,
        );
        let mut service = db.service();
        for (order, at, paid) in [
            ("a", "2026-03-01T10:01:00Z", "2026-03-01T11:04:59.999+01:00"),
            ("b", "2026-03-01T10:01:00Z", "2026-03-01T10:05:00Z"),
            ("c", "2026-02-30T10:01:00Z", "2026-03-01T10:01:00Z"),
            ("d", "2024-02-29 23:59:59-0230", "2024-03-01T02:29:01Z"),
            ("e", "tomorrow", "2026-03-01T10:01:00Z"),
            ("f", "2026-03-01T10:01:00", "2026-03-01T10:01:00"),
            ("g", "2026-13-01T25:61:61+99:99", "infinity"),
        ] {
            service.exec(&format!(
                r#"select nightowls.append_event('o', '{order}', 'placed', '{{"order": "{order}", "shop": 1, "at": "{at}"}}'),
                          nightowls.append_event('o', '{order}', 'paid', '{{"order": "{order}"}}', metadata => '{{"shop": "1", "at": "{paid}"}}')"#
            ));
        }
        assert_eq!(
            lines(
                &mut service,
                "select left_aggregate_id, window_start at time zone 'utc' = '2026-03-01 10:00' from nightowls.stream_s order by 1"
            ),
            ["a t", "d f"]
        );
    });
}

#[test]
fn a_late_event_changes_the_window_it_belongs_to() {
    on_each_install(|db| {
        let org = default_org(db);
        db.owner().exec(&format!("select nightowls.create_stream_join('s', {PLACED}, {PAID}, {BY_ID}, '1 minute', 'session')"));
        let at = |time: &str, id: &str, kind: &str, payload: &str| {
            write_events(
                db,
                &org,
                &format!(
                    "values ('a', '{id}', 1, '{kind}', '{payload}'::jsonb, '{{}}'::jsonb, timestamptz '2026-03-01 {time}+00')"
                ),
            );
        };
        let mut service = db.service();
        at("10:00:00", "1", "placed", r#"{"order": 1}"#);
        at("10:01:30", "2", "paid", r#"{"order": {"id": 1}}"#);
        assert_eq!(lines(&mut service, PAIRS), Vec::<String>::new());
        // What comes late joins two sessions into one.
        at("10:00:50", "3", "paid", r#"{"order": {"id": 1}}"#);
        assert_eq!(lines(&mut service, PAIRS).len(), 2);
    });
}

/// Every scan of a plan: its kind and relation.
fn scans(plan: &serde_json::Value, found: &mut Vec<(String, String)>) {
    match plan {
        serde_json::Value::Object(node) => {
            if let (Some(kind), Some(relation)) = (node.get("Node Type"), node.get("Relation Name"))
            {
                found.push((
                    kind.as_str().unwrap().to_owned(),
                    relation.as_str().unwrap().to_owned(),
                ));
            }
            node.values().for_each(|value| scans(value, found));
        }
        serde_json::Value::Array(values) => values.iter().for_each(|value| scans(value, found)),
        _ => (),
    }
}

#[track_caller]
fn assert_indexed(session: &mut Session, who: &str, sql: &str) {
    let plan = text(
        session,
        &format!("explain (analyze, timing off, format json) {sql}"),
    );
    let json: serde_json::Value = serde_json::from_str(&plan).expect("explain writes JSON");
    let mut found = Vec::new();
    scans(&json, &mut found);
    assert!(
        found.iter().any(|(_, relation)| relation == "events"),
        "{who}: {sql}: {plan}"
    );
    assert!(
        !found
            .iter()
            .any(|(kind, relation)| kind == "Seq Scan" && relation == "events"),
        "{who}: {sql}: {plan}"
    );
}

/// At 200,000 events; NIGHTOWLS_STREAM_EVENTS=1000000 takes a million.
#[test]
fn no_view_of_a_stream_scans_the_log() {
    let events = long_history(200_000);
    on_each_install(|db| {
        let org = default_org(db);
        let mut superuser = db.superuser();
        superuser.exec("alter table nightowls.events set unlogged");
        write_events(
            db,
            &org,
            &format!(
                "select 'order', 'o' || i / 2, 1 + i % 2, case i % 2 when 0 then 'placed' else 'paid' end,
                        case i % 2 when 0 then jsonb_build_object('order', i / 20) else jsonb_build_object('order', jsonb_build_object('id', i / 20)) end,
                        '{{}}'::jsonb, timestamptz '2026-03-01 00:00+00' + i * interval '1 second' from generate_series(1, {events}) i"
            ),
        );
        let mut owner = db.owner();
        owner.exec(&format!(
            r#"create table public.customers (id int primary key, name text);
               grant select on public.customers to {SERVICE};
               select nightowls.create_stream_join('tumbling', {PLACED}, {PAID}, {BY_ID});
               select nightowls.create_stream_join('sliding', {PLACED}, {PAID}, {BY_ID}, kind => 'sliding');
               select nightowls.create_stream_join('session', {PLACED}, {PAID}, {BY_ID}, '1 minute', 'session');
               select nightowls.create_enrichment('enriched', {PLACED}, 'public.customers', '{{"left": "$.order", "right": "id"}}')"#
        ));
        let from = format!(
            "timestamptz '2026-03-01 00:00+00' + {} * interval '1 second'",
            events - 600
        );
        for round in ["never analyzed", "analyzed"] {
            if round == "analyzed" {
                superuser.exec("analyze nightowls.events");
            }
            for mode in ["auto", "force_generic_plan"] {
                for (who, mut session) in [("owner", db.owner()), ("service", db.service())] {
                    session.exec(&format!("set plan_cache_mode = {mode}"));
                    for kind in ["tumbling", "sliding", "session"] {
                        let view = format!("select count(*) from nightowls.stream_{kind}");
                        assert_indexed(
                            &mut session,
                            who,
                            &format!("{view} where left_at >= {from}"),
                        );
                        assert_indexed(
                            &mut session,
                            who,
                            &format!(
                                "{view} where left_position > (select max(position) - 600 from nightowls.recent_events(max_events => 1))"
                            ),
                        );
                    }
                    let view = "select count(*) from nightowls.stream_enriched";
                    assert_indexed(
                        &mut session,
                        who,
                        &format!("{view} where event_at >= {from}"),
                    );
                    if who == "owner" {
                        // An index on an expression: only for who is not behind row level security.
                        for view in ["tumbling", "enriched"] {
                            assert_indexed(
                                &mut session,
                                who,
                                &format!(
                                    "select count(*) from nightowls.stream_{view} where window_start >= {from}"
                                ),
                            );
                        }
                    }
                }
            }
        }
    });
}

#[test]
fn a_stream_is_made_once_listed_and_dropped_with_its_indexes() {
    let indexes =
        "select count(*)::text from pg_class where relkind = 'i' and relname like 'stream\\_%'";
    on_each_install(|db| {
        default_org(db);
        let other = new_org(db, "other");
        let mut owner = db.owner();
        let create = |name: &str, kind: &str| {
            format!(
                "select nightowls.create_stream_join('{name}', {PLACED}, {PAID}, {BY_ID}, kind => '{kind}')"
            )
        };
        owner.exec(&create("payments", "tumbling"));
        owner.exec(&create("payments", "tumbling"));
        assert_eq!(text(&mut owner, indexes), "4");
        owner.exec(&create("others", "sliding"));
        assert_eq!(text(&mut owner, indexes), "4", "they are shared");
        assert_eq!(owner.refused(&create("payments", "sliding")).code, "42710");
        let refusal = owner.refused(&format!("select nightowls.create_stream_join('payments', {PLACED}, {PAID}, {BY_ID}, org => '{other}')"));
        assert_eq!(refusal.code, "42P07");

        // What is missing is made again.
        owner.exec("drop view nightowls.stream_payments; do $$ declare i text; begin for i in select unnest(indexes) from nightowls.streams loop execute format('drop index if exists nightowls.%I', i); end loop; end $$");
        owner.exec(&create("payments", "tumbling"));
        assert_eq!(text(&mut owner, indexes), "4");
        assert_eq!(
            lines(&mut db.service(), "select * from nightowls.stream_payments"),
            Vec::<String>::new()
        );

        let refusal = owner.refused("select nightowls.drop_stream('paymnts')");
        assert_eq!(
            (refusal.code.as_str(), refusal.hint.as_str()),
            ("NW007", "Did you mean \"payments\"?")
        );
        owner.exec("select nightowls.drop_stream('payments')");
        assert_eq!(text(&mut owner, indexes), "3");
        owner.exec("select nightowls.drop_stream('others')");
        assert_eq!(text(&mut owner, indexes), "0");
        assert_eq!(
            text(&mut owner, "select count(*)::text from nightowls.streams"),
            "0"
        );
        for role in [SERVICE, STRANGER, APP] {
            let mut session = db.session(role);
            for call in [
                create("mine", "tumbling"),
                "select nightowls.drop_stream('mine')".to_owned(),
            ] {
                assert_eq!(session.refused(&call).code, "42501");
            }
        }
    });
}

#[test]
fn what_cannot_be_joined_is_refused_with_its_reason() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        owner.exec(
            r#"create table public.t (id int, created_at timestamptz); create table public.untimed (id int, at timestamp);
               select nightowls.create_projection('tally', 'order', '{"otherwise": [{"op": "add", "path": "n"}]}')"#,
        );
        let join = |rest: &str| format!("create_stream_join('s', {PLACED}, {PAID}, {rest})");
        let filtered = |filter: &str| format!("create_stream_join('s', {filter}, {PAID}, {BY_ID})");
        let on = |join_on: &str| join(&format!("'{join_on}'"));
        let enrich = |rest: &str| format!("create_enrichment('s', {PLACED}, {rest})");
        let tables = |rest: &str| format!("create_table_join('s', {rest})");
        for (call, code) in [
            (join(&format!("{BY_ID}, kind => 'session'")), "22023"),
            (join(&format!("{BY_ID}, kind => 'hopping'")), "22023"),
            (join(&format!("{BY_ID}, kind => null")), "22023"),
            (join(&format!("{BY_ID}, '0 seconds'")), "22023"),
            (join(&format!("{BY_ID}, '-1 second'")), "22023"),
            (join(&format!("{BY_ID}, '1 month'")), "22023"),
            (join(&format!("{BY_ID}, left_time => 'now()'")), "22023"),
            (join("null"), "22023"),
            (on("{}"), "22023"),
            (on(r#"{"left": "$.a"}"#), "22023"),
            (on(r#"{"left": "$.a", "right": ["$.b", "$.c"]}"#), "22023"),
            (on(r#"{"left": [], "right": []}"#), "22023"),
            (on(r#"{"left": ["$.a"], "right": [7]}"#), "22023"),
            (
                on(r#"{"left": "$.a", "right": "$.b", "or": true}"#),
                "22023",
            ),
            (on(r#"{"left": "a) or true --", "right": "$.b"}"#), "22023"),
            (on(r#"{"left": "@.created_at", "right": "$.b"}"#), "22023"),
            (filtered("null"), "22023"),
            (filtered("'{}'"), "22023"),
            (filtered(r#"'{"event_types": []}'"#), "22023"),
            (filtered(r#"'{"event_type": ["a"]}'"#), "22023"),
            (
                format!("create_stream_join(null, {PLACED}, {PAID}, {BY_ID})"),
                "22004",
            ),
            (
                format!("create_stream_join('', {PLACED}, {PAID}, {BY_ID})"),
                "22023",
            ),
            (
                format!("create_stream_join(repeat('s', 41), {PLACED}, {PAID}, {BY_ID})"),
                "54000",
            ),
            (
                enrich(r#"'public.none', '{"left": "$.a", "right": "id"}'"#),
                "42P01",
            ),
            (
                enrich(r#"'public.t', '{"left": "$.a", "right": "missing"}'"#),
                "42703",
            ),
            (
                enrich(r#"'public.t', '{"left": "$.a", "right": "id"}', at => 'event'"#),
                "NW007",
            ),
            (
                enrich(r#"'tally', '{"left": "$.a", "right": "version"}'"#),
                "22023",
            ),
            (
                enrich(r#"'public.t', '{"left": "$.a", "right": "id"}', at => 'then'"#),
                "22023",
            ),
            (
                tables(r#"'public.t', 'public.untimed', '{"left": "id", "right": "id"}'"#),
                "42703",
            ),
            (
                tables(
                    r#"'public.t', 'public.untimed', '{"left": "id", "right": "id"}', right_time => 'at'"#,
                ),
                "42703",
            ),
            (
                tables(r#"'public.t', 'talli', '{"left": "id", "right": "aggregate_id"}'"#),
                "NW007",
            ),
            (
                tables(
                    r#"'public.t', 'public.t; drop table public.t', '{"left": "id", "right": "id"}'"#,
                ),
                "42P01",
            ),
            (
                tables(r#"'public.t', 'public.t', '{"left": "id) or true --", "right": "id"}'"#),
                "42703",
            ),
        ] {
            let refusal = owner.refused(&format!("select nightowls.{call}"));
            assert_eq!(refusal.code, code, "{call}: {refusal}");
        }
        assert_eq!(
            text(&mut owner, "select count(*)::text from nightowls.streams"),
            "0"
        );
    });
}

/// What is quoted badly somewhere shows here: each name and text has every character that SQL minds.
#[test]
fn names_and_texts_are_never_sql() {
    on_each_install(|db| {
        let org = default_org(db);
        let mut owner = db.owner();
        owner.exec(
            r#"create table public."t'""%s" (org_id uuid, "k'""%1$s" text, "doc" jsonb, updated_at timestamptz default now());
               select nightowls.create_projection('it''s "%s"', 'order', '{"otherwise": [{"op": "add", "path": "n"}]}');
               select nightowls.create_stream_join('a''b"%s', '{"event_types": ["x''y\"%s", "%1$s\\"]}', '{"aggregate_types": ["''; drop table nightowls.streams; --"]}',
                 '{"left": ["$.a''\"%s{,}", "$.b"], "right": ["@.metadata.%1$s", "@.aggregate_id"]}', kind => 'session', within => '1 minute');
               select nightowls.create_enrichment('e''"%s', '{"event_types": ["x''y\"%s"]}', 'public."t''""%s"', '{"left": ["$.%s", "$.a"], "right": ["k''\"%1$s", "doc.%s''.x"]}');
               select nightowls.create_enrichment('f', '{"event_types": ["x''y\"%s"]}', 'it''s "%s"', '{"left": "$.%s''", "right": "aggregate_id"}', at => 'event');
               select nightowls.create_table_join('t''"%s', 'public."t''""%s"', 'it''s "%s"', '{"left": "k''\"%1$s", "right": "state.%s''"}', kind => 'session', within => '1 minute')"#,
        );
        let kind = "x'y\"%s";
        let payload = r#"{"a'\"%s{,}": "1", "b": "o", "%s": "v", "%s'": "z", "a": "w"}"#;
        db.service().exec(&format!(
            "select nightowls.append_event('any', 'x', {}, {});
             select nightowls.append_event('''; drop table nightowls.streams; --', 'o', 'paid', metadata => '{{\"%1$s\": 1}}')",
            quote(kind), quote(payload)
        ));
        owner.exec(&format!(
            r#"insert into public."t'""%s" values ('{org}', 'v', '{{"%s''": {{"x": "w"}}}}'), ('{org}', 'other', '{{}}')"#
        ));
        assert_eq!(
            text(
                &mut owner,
                r#"select count(*)::text from nightowls."stream_a'b""%s""#
            ),
            "1"
        );
        assert_eq!(
            lines(
                &mut owner,
                r#"select "reference_k'""%1$s" from nightowls."stream_e'""%s""#
            ),
            ["v"]
        );
        assert_eq!(
            text(
                &mut owner,
                r#"select count(*)::text || count(reference_state) from nightowls.stream_f"#
            ),
            "10"
        );
        assert_eq!(
            text(
                &mut owner,
                r#"select count(*)::text from nightowls."stream_t'""%s""#
            ),
            "0"
        );
        for name in ["a''b\"%s", "e''\"%s", "f", "t''\"%s"] {
            owner.exec(&format!("select nightowls.drop_stream('{name}')"));
        }
    });
}

#[test]
fn a_long_key_joins_and_never_stops_an_append() {
    on_each_install(|db| {
        default_org(db);
        db.owner().exec(&format!(
            "select nightowls.create_stream_join('s', {PLACED}, {PAID}, {BY_ID})"
        ));
        // Longer than a page, and hardly compressible.
        db.service().exec(
            "begin;
             create temp table long on commit drop as select string_agg(md5(i::text), '') as key from generate_series(1, 1000) i;
             select nightowls.append_event('o', '1', 'placed', jsonb_build_object('order', key)) from long;
             select nightowls.append_event('o', '1', 'paid', jsonb_build_object('order', jsonb_build_object('id', key))) from long;
             commit",
        );
        let joined = text(
            &mut db.service(),
            "select count(*)::text from nightowls.stream_s",
        );
        // Two windows of 5 minutes may just have met.
        let apart = text(
            &mut db.service(),
            "select (count(distinct date_bin('5 minutes', created_at, '2000-01-03 00:00+00')) = 2)::text from nightowls.events",
        );
        assert_eq!(joined, if apart == "true" { "0" } else { "1" });
    });
}

#[test]
fn a_restored_dump_has_its_streams_and_the_same_call_makes_their_indexes() {
    on_each_install(|db| {
        let org = default_org(db);
        write_random_events(db, &org, 200, 600, 5);
        let create = format!(
            "select nightowls.create_stream_join('s', {PLACED}, {PAID}, {BY_ID}, '20 seconds', 'sliding')"
        );
        db.owner().exec(&create);
        let before = lines(&mut db.service(), PAIRS);
        assert!(!before.is_empty());
        let to = db.cluster().empty_database(db.install());
        by_psql_as(SUPERUSER, db, &to, &[]);
        assert_eq!(lines(&mut to.service(), PAIRS), before);
        let indexes =
            "select count(*)::text from pg_class where relkind = 'i' and relname like 'stream\\_%'";
        let kept = if db.install() == Install::Plain {
            "3"
        } else {
            "0"
        };
        assert_eq!(text(&mut to.superuser(), indexes), kept);
        to.owner().exec(&create);
        assert_eq!(text(&mut to.superuser(), indexes), "3");
        assert_eq!(lines(&mut to.service(), PAIRS), before);
    });
}
