//! Projections: states derived from events, at each append and in all the ways
//! in which they could come apart from their events.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::fixture::{default_org, is_blocked};
use crate::support::{
    APP, Db, Install, SERVICE, SUPERUSER, Session, on_each_install, on_each_route, quote,
    wait_until,
};

/// Counts what is counted, remembers the last other event, ends when closed.
const TALLY: &str = r#"{"initial": {"n": 0},
    "on": {"counted": [{"op": "add", "path": "n", "value": "$.by"}],
           "closed": [{"op": "tombstone"}]},
    "otherwise": [{"op": "set", "path": "last", "value": "@.event_type"}]}"#;

/// Another reducer for the same events.
const DOUBLE: &str = r#"{"on": {"counted": [{"op": "add", "path": "n", "value": "$.by"},
                                            {"op": "add", "path": "n", "value": "$.by"}]}}"#;

const GUARDED: &[&str] = &[
    "insert into nightowls._projection_states (org_id, projection, generation, aggregate_id, version, position, state)
     select org_id, projection, generation, 'forged', 1, 1, '{}' from nightowls._projection_states",
    "update nightowls._projection_states set state = '{\"n\": 666}'",
    "delete from nightowls._projection_states",
    "truncate nightowls._projection_states",
    "insert into nightowls.projection_states (org_id, projection, aggregate_id, version, position, state)
     select org_id, projection, 'forged', 1, 1, '{}' from nightowls.projection_states",
    "update nightowls.projection_states set state = '{\"n\": 666}'",
    "delete from nightowls.projection_states",
];

/// The first value, `null` if there is none.
#[track_caller]
pub fn text(session: &mut Session, sql: &str) -> String {
    session.value(sql).unwrap_or_else(|| "null".to_owned())
}

#[track_caller]
fn project(session: &mut Session, name: &str, reducer: &str) {
    session.exec(&format!(
        "select nightowls.create_projection({}, 'order', {})",
        quote(name),
        quote(reducer)
    ));
}

fn count(id: &str, by: i64) -> String {
    format!("select nightowls.append_event('order', '{id}', 'counted', '{{\"by\": {by}}}')")
}

#[track_caller]
fn state(session: &mut Session, projection: &str, id: &str) -> String {
    text(
        session,
        &format!("select nightowls.state('{projection}', '{id}')"),
    )
}

/// What is stored: one line an aggregate.
#[track_caller]
fn stored(session: &mut Session, projection: &str) -> Vec<String> {
    session
        .rows(&format!(
            "select concat_ws(' ', aggregate_id, version, coalesce(state::text, 'null'))
               from nightowls.projection_states where projection = '{projection}'
              order by org_id, aggregate_id"
        ))
        .into_iter()
        .map(|row| row[0].clone().expect("concat_ws is never null"))
        .collect()
}

/// Every aggregate has one stored state, at its newest version and position, and
/// that state is the fold of its events; nothing else is stored.
#[track_caller]
fn assert_exact(db: &Db) {
    let mut session = db.superuser();
    let wrong = session.rows(
        "with truth as (
           select e.org_id, p.name, e.aggregate_id, max(e.version) as version, max(e.position) as position,
                  nightowls.fold_events(p.reducer, e order by e.version)::text as state
             from nightowls.projections p
             join nightowls.events e on e.org_id = p.org_id and e.aggregate_type = p.aggregate_type
            where p.kind = 'reducer'
            group by e.org_id, p.name, p.reducer, e.aggregate_id
         ), kept as (
           select s.org_id, s.projection as name, s.aggregate_id, s.version, s.position, s.state::text as state
             from nightowls.projection_states s
             join nightowls.projections p on p.org_id = s.org_id and p.name = s.projection and p.kind = 'reducer')
         select coalesce(t.name, k.name), coalesce(t.aggregate_id, k.aggregate_id), t.version, k.version, t.state, k.state
           from truth t full join kept k using (org_id, name, aggregate_id)
          where (t.version, t.position, t.state) is distinct from (k.version, k.position, k.state)",
    );
    assert!(
        wrong.is_empty(),
        "projection, aggregate, version (true, stored), state (true, stored): {wrong:?}"
    );
    for row in session
        .rows("select org_id, name from nightowls.projections where kind in ('reducer', 'handler')")
    {
        let (org, name) = (row[0].as_deref().unwrap(), row[1].as_deref().unwrap());
        let bad = session.rows(&format!(
            "select * from nightowls.verify_projection({}, org => '{org}')",
            quote(name)
        ));
        assert!(bad.is_empty(), "verify_projection('{name}'): {bad:?}");
    }
}

#[test]
fn a_projection_keeps_the_state_of_every_append_however_it_came() {
    on_each_route(|db| {
        default_org(db);
        project(&mut db.owner(), "tally", TALLY);
        let mut service = db.service();
        service.exec(&count("a", 1));
        service.exec(
            r#"select nightowls.append_events('order', 'a', '[
                 {"event_type": "counted", "payload": {"by": 2}},
                 {"event_type": "noted"},
                 {"event_type": "counted", "payload": {"by": 0.50}}]')"#,
        );
        service.exec(
            r#"select nightowls.append_many('[
                 {"aggregate_type": "order", "aggregate_id": "b", "events": [{"event_type": "counted", "payload": {"by": 10}}]},
                 {"aggregate_type": "parcel", "aggregate_id": "b", "events": [{"event_type": "counted", "payload": {"by": 99}}]},
                 {"aggregate_type": "order", "aggregate_id": "a", "events": [{"event_type": "counted", "payload": {"by": 4}}]}]')"#,
        );
        service.exec(
            r#"insert into nightowls.events (aggregate_type, aggregate_id, event_type, payload)
               values ('order', 'a', 'counted', '{"by": 8}'), ('order', 'c', 'counted', '{"by": 1}'),
                      ('order', 'a', 'counted', '{"by": 16}'), ('parcel', 'c', 'counted', '{"by": 1}')"#,
        );
        assert_eq!(
            stored(&mut service, "tally"),
            [
                r#"a 7 {"n": 31.50, "last": "noted"}"#,
                r#"b 1 {"n": 10}"#,
                r#"c 1 {"n": 1}"#
            ]
        );
        assert_eq!(
            state(&mut service, "tally", "a"),
            r#"{"n": 31.50, "last": "noted"}"#
        );
        assert_eq!(state(&mut service, "tally", "nobody"), "null");
        assert_exact(db);
    });
}

#[test]
fn a_projection_made_late_holds_the_whole_history_at_once() {
    on_each_route(|db| {
        default_org(db);
        db.service().exec(
            r#"insert into nightowls.events (aggregate_type, aggregate_id, version, event_type, payload)
               select 'order', 'o' || i % 20, 1 + i / 20, case when i % 37 = 0 then 'closed' else 'counted' end,
                      jsonb_build_object('by', i / 8.0)
                 from generate_series(0, 399) i order by i"#,
        );
        let mut owner = db.owner();
        project(&mut owner, "tally", TALLY);
        let found = text(
            &mut owner,
            "select count(*) || ' ' || sum(version) from nightowls.projection_states where projection = 'tally'",
        );
        assert_eq!(found, "20 400");
        owner.exec("select nightowls.refresh_projection('tally')");
        assert_eq!(
            text(&mut owner, "select lagging_from from nightowls.projections"),
            "null"
        );
        db.service().exec(&count("o3", 1));
        assert_exact(db);
    });
}

#[test]
fn one_insert_of_several_orgs_types_and_aggregates_is_projected_for_each() {
    on_each_route(|db| {
        let one = default_org(db);
        let mut owner = db.owner();
        let two = text(&mut owner, "select nightowls.create_org('other')");
        let none = text(
            &mut owner,
            "select nightowls.create_org('without projections')",
        );
        project(&mut owner, "tally", TALLY);
        project(&mut owner, "double", DOUBLE);
        owner.exec(&format!(
            "select nightowls.create_projection('tally', 'order', {}, org => '{two}');
             select nightowls.create_projection('parcels', 'parcel', {}, org => '{two}')",
            quote(DOUBLE),
            quote(TALLY)
        ));
        db.service().exec(&format!(
            r#"insert into nightowls.events (org_id, aggregate_type, aggregate_id, event_type, payload)
               select o::uuid, t, a, 'counted', jsonb_build_object('by', n)
                 from unnest('{{{one},{two},{none}}}'::text[]) o, unnest('{{order,parcel}}'::text[]) t,
                      unnest('{{a,b,c}}'::text[]) a, generate_series(1, 4) n
                order by n, a, t, o"#
        ));
        let mut service = db.service();
        let mut of = |org: &str, projection: &str| {
            text(
                &mut service,
                &format!("select nightowls.state('{projection}', 'b', '{org}')"),
            )
        };
        assert_eq!(of(&one, "tally"), r#"{"n": 10}"#);
        assert_eq!(of(&one, "double"), r#"{"n": 20}"#);
        assert_eq!(of(&two, "tally"), r#"{"n": 20}"#);
        assert_eq!(of(&two, "parcels"), r#"{"n": 10}"#);
        let missing = service.refused(&format!("select nightowls.state('tally', 'b', '{none}')"));
        assert_eq!(missing.code, "NW007");
        assert_exact(db);
    });
}

#[test]
fn state_at_is_the_state_of_each_version_whatever_is_stored() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        project(&mut owner, "tally", TALLY);
        let mut service = db.service();
        for (version, event) in ["counted", "noted", "closed", "counted", "counted"]
            .iter()
            .enumerate()
        {
            service.exec(&format!(
                "select nightowls.append_event('order', 'a', '{event}', '{{\"by\": {}}}')",
                version + 1
            ));
        }
        let all = [
            "null",
            r#"{"n": 1}"#,
            r#"{"n": 1, "last": "noted"}"#,
            "null",
            r#"{"n": 4}"#,
            r#"{"n": 9}"#,
            r#"{"n": 9}"#,
        ];
        let check = |session: &mut Session| {
            for (version, expected) in all.iter().enumerate() {
                let at = text(
                    session,
                    &format!("select nightowls.state_at('tally', 'a', {version})"),
                );
                assert_eq!(&at, expected, "at version {version}");
            }
            let far = text(
                session,
                "select nightowls.state_at('tally', 'a', 9223372036854775807)",
            );
            assert_eq!(far, r#"{"n": 9}"#);
        };
        check(&mut service);
        // The same with no state stored, and with one that is behind.
        let mut superuser = db.superuser();
        superuser.exec(
            "set session_replication_role = replica;
             update nightowls._projection_states set version = 4, state = '{\"n\": 4}';
             set session_replication_role = origin",
        );
        check(&mut service);
        superuser.exec(
            "set session_replication_role = replica;
             delete from nightowls._projection_states;
             set session_replication_role = origin",
        );
        check(&mut service);

        assert_eq!(
            service
                .refused("select nightowls.state_at('tally', 'a', -1)")
                .code,
            "22023"
        );
        assert_eq!(
            service
                .refused("select nightowls.state_at('tally', 'a', null)")
                .code,
            "22004"
        );
        assert_eq!(
            service
                .refused("select nightowls.state_at('tally', null, 1)")
                .code,
            "22004"
        );
        assert_eq!(
            service
                .refused("select nightowls.state('tally', null)")
                .code,
            "22004"
        );
        assert_eq!(
            service
                .refused("select nightowls.state_at_time('tally', 'a', null)")
                .code,
            "22004"
        );
    });
}

#[test]
fn state_at_time_ends_before_the_first_event_that_is_later() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        project(&mut owner, "tally", TALLY);
        // Clocks differ: the third event is older than the second, the fifth than the fourth.
        owner.exec(
            r#"insert into nightowls.events (aggregate_type, aggregate_id, version, event_type, payload, created_at)
               values ('order', 'a', 1, 'counted', '{"by": 1}',     '2026-01-01 10:00:00Z'),
                      ('order', 'a', 2, 'counted', '{"by": 10}',    '2026-01-01 12:00:00Z'),
                      ('order', 'a', 3, 'counted', '{"by": 100}',   '2026-01-01 11:00:00Z'),
                      ('order', 'a', 4, 'counted', '{"by": 1000}',  '2026-01-01 14:00:00Z'),
                      ('order', 'a', 5, 'counted', '{"by": 10000}', '2026-01-01 13:00:00Z')"#,
        );
        let mut service = db.service();
        for (at, expected) in [
            ("2026-01-01 09:59:59.999999Z", "null"),
            ("2026-01-01 10:00:00Z", r#"{"n": 1}"#),
            ("2026-01-01 11:30:00Z", r#"{"n": 1}"#),
            ("2026-01-01 12:00:00Z", r#"{"n": 111}"#),
            ("2026-01-01 13:30:00Z", r#"{"n": 111}"#),
            ("2026-01-01 14:00:00Z", r#"{"n": 11111}"#),
            ("infinity", r#"{"n": 11111}"#),
            ("-infinity", "null"),
        ] {
            let found = text(
                &mut service,
                &format!("select nightowls.state_at_time('tally', 'a', '{at}')"),
            );
            assert_eq!(found, expected, "at {at}");
        }
    });
}

#[test]
fn a_tombstone_stays_stored_as_null_and_the_next_event_starts_anew() {
    on_each_route(|db| {
        default_org(db);
        project(&mut db.owner(), "tally", TALLY);
        let mut service = db.service();
        service.exec(&count("a", 5));
        service.exec("select nightowls.append_event('order', 'a', 'closed')");
        assert_eq!(stored(&mut service, "tally"), ["a 2 null"]);
        assert_eq!(state(&mut service, "tally", "a"), "null");
        assert_exact(db);
        db.owner()
            .exec("select nightowls.rebuild_projection('tally')");
        assert_eq!(stored(&mut service, "tally"), ["a 2 null"]);
        service.exec(&count("a", 7));
        assert_eq!(stored(&mut service, "tally"), [r#"a 3 {"n": 7}"#]);
        assert_exact(db);
    });
}

#[test]
fn the_same_definition_again_changes_nothing_and_another_is_42710() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        project(&mut owner, "tally", TALLY);
        db.service().exec(&count("a", 1));
        let before = owner.rows("select p::text from nightowls.projections p");
        let rows = owner.rows("select xmin, s::text from nightowls._projection_states s");
        project(&mut owner, "tally", TALLY);
        // As another writes it: JSON has no order of keys, no white space.
        project(&mut owner, "tally", &TALLY.replace('\n', " "));
        assert_eq!(
            before,
            owner.rows("select p::text from nightowls.projections p")
        );
        assert_eq!(
            rows,
            owner.rows("select xmin, s::text from nightowls._projection_states s")
        );

        for sql in [
            format!(
                "select nightowls.create_projection('tally', 'order', {})",
                quote(DOUBLE)
            ),
            format!(
                "select nightowls.create_projection('tally', 'parcel', {})",
                quote(TALLY)
            ),
        ] {
            let refusal = owner.refused(&sql);
            assert_eq!(refusal.code, "42710");
            assert!(refusal.hint.contains("alter_projection"), "{refusal}");
        }
        assert_eq!(
            before,
            owner.rows("select p::text from nightowls.projections p")
        );
    });
}

#[test]
fn two_who_make_the_same_projection_at_once_make_one() {
    on_each_install(|db| {
        default_org(db);
        db.service().exec(&count("a", 1));
        let mut first = db.owner();
        first.exec("begin");
        project(&mut first, "tally", TALLY);
        let second = thread::scope(|scope| {
            let mut session = db.owner();
            let pid = session.pid();
            let second = scope.spawn(move || project(&mut session, "tally", TALLY));
            await_lock(db, pid);
            first.exec("commit");
            second.join()
        });
        second.expect("the second finds it made");
        assert_eq!(
            text(&mut first, "select count(*) from nightowls.projections"),
            "1"
        );
        db.service().exec(&count("a", 1));
        assert_exact(db);
    });
}

/// Waits until the backend `pid` waits for a lock.
pub fn await_lock(db: &Db, pid: i32) {
    let mut watcher = db.direct(SUPERUSER);
    wait_until(
        "a session waits for a lock",
        Duration::from_secs(20),
        || is_blocked(&mut watcher, pid),
    );
}

#[test]
fn alter_projection_folds_everything_by_the_new_reducer() {
    on_each_route(|db| {
        default_org(db);
        let mut owner = db.owner();
        project(&mut owner, "tally", TALLY);
        let mut service = db.service();
        service.exec(&count("a", 3));
        service.exec("select nightowls.append_event('order', 'b', 'closed')");
        owner.exec(&format!(
            "select nightowls.alter_projection('tally', {})",
            quote(DOUBLE)
        ));
        assert_eq!(stored(&mut service, "tally"), [r#"a 1 {"n": 6}"#, "b 1 {}"]);
        service.exec(&count("a", 1));
        assert_eq!(state(&mut service, "tally", "a"), r#"{"n": 8}"#);
        assert_exact(db);

        let bad = owner.refused(
            r#"select nightowls.alter_projection('tally', '{"on": {"counted": [{"op": "ad", "path": "n"}]}}')"#,
        );
        assert_eq!(bad.code, "22023");
        assert!(bad.message.contains("on.counted[0].op"), "{bad}");
        for sql in [
            "select nightowls.alter_projection('tally')",
            "select nightowls.alter_projection('tally', handler => 'public.f')",
            "select nightowls.alter_projection('tally', '{}', 'public.f')",
        ] {
            assert_eq!(owner.refused(sql).code, "22023", "{sql}");
        }
        // The new definition is the definition.
        project(&mut owner, "tally", DOUBLE);
        assert_eq!(state(&mut service, "tally", "a"), r#"{"n": 8}"#);
        assert_exact(db);
    });
}

#[test]
fn drop_projection_forgets_its_states_and_nothing_else() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        project(&mut owner, "tally", TALLY);
        project(&mut owner, "double", DOUBLE);
        let mut service = db.service();
        service.exec(&count("a", 1));
        owner.exec("select nightowls.drop_projection('tally')");
        service.exec(&count("a", 1));
        assert_eq!(
            service.refused("select nightowls.state('tally', 'a')").code,
            "NW007"
        );
        assert_eq!(state(&mut service, "double", "a"), r#"{"n": 4}"#);
        assert_eq!(
            text(
                &mut owner,
                "select (select count(*) from nightowls._projection_states where projection = 'tally')
                     || ' ' || (select count(*) from nightowls.routes where name = 'tally')
                     || ' ' || (select count(*) from nightowls.events)"
            ),
            "0 0 2"
        );
        project(&mut owner, "tally", DOUBLE);
        assert_eq!(state(&mut service, "tally", "a"), r#"{"n": 4}"#);
        assert_exact(db);
    });
}

#[test]
fn an_unknown_projection_is_nw007_with_a_near_name_in_the_hint() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        project(&mut owner, "balances", TALLY);
        for call in [
            "state('balance', 'a')",
            "state_at('balance', 'a', 1)",
            "state_at_time('balance', 'a', 'now')",
            "alter_projection('balance', '{}')",
            "drop_projection('balance')",
            "refresh_projection('balance')",
            "rebuild_projection('balance')",
            "verify_projection('balance')",
        ] {
            let refusal = owner.refused(&format!("select nightowls.{call}"));
            assert_eq!(refusal.code, "NW007", "{call}");
            assert!(refusal.message.contains("\"balance\""), "{call}: {refusal}");
            assert!(refusal.hint.contains("\"balances\""), "{call}: {refusal}");
            let far = owner.refused(&format!(
                "select nightowls.{}",
                call.replace("balance", "something else entirely")
            ));
            assert_eq!(far.code, "NW007", "{call}");
            assert!(far.hint.contains("create_projection"), "{call}: {far}");
            let null = owner.refused(&format!(
                "select nightowls.{}",
                call.replace("'balance'", "null")
            ));
            assert_eq!(null.code, "22004", "{call}: {null}");
        }
    });
}

#[test]
fn what_cannot_be_a_projection_is_refused_and_nothing_is_made() {
    on_each_install(|db| {
        let mut owner = db.owner();
        let homeless = owner.refused("select nightowls.create_projection('p', 'order', '{}')");
        assert_eq!(homeless.code, "NW010");
        default_org(db);
        for (arguments, code) in [
            ("null, 'order', '{}'", "22004"),
            ("'', 'order', '{}'", "22023"),
            ("repeat('p', 256), 'order', '{}'", "54000"),
            ("'p', null, '{}'", "22004"),
            ("'p', '', '{}'", "22023"),
            ("'p', repeat('t', 256), '{}'", "54000"),
            ("'p', 'order'", "22023"),
            ("'p', 'order', '{}', 'public.f'", "22023"),
            ("'p', 'order', handler => 'public.f'", "42883"),
            ("'p', 'order', handler => 'f'", "42883"),
            ("'p', 'order', handler => ''", "42883"),
            (
                "'p', 'order', handler => 'public.f(jsonb); drop table x; --'",
                "42883",
            ),
            ("'p', 'order', handler => 'nowhere.f'", "42883"),
            ("'p', 'order', '{}', mode => 'weekly'", "22023"),
            ("'p', 'order', '{}', mode => null", "22023"),
            ("'p', 'order', '[]'", "22023"),
            ("'p', 'order', 'null'", "22023"),
            ("'p', 'order', '{}', org => gen_random_uuid()", "22023"),
        ] {
            let refusal =
                owner.refused(&format!("select nightowls.create_projection({arguments})"));
            assert_eq!(refusal.code, code, "{arguments}: {refusal}");
        }
        for (reducer, place) in [
            (
                r#"{"on": {"paid": [{"op": "increment", "path": "n"}]}}"#,
                "on.paid[0].op",
            ),
            (
                r#"{"on": {"paid": [{"op": "add", "path": "n"}, {"op": "set", "path": "a..b", "value": 1}]}}"#,
                "on.paid[1].path",
            ),
            (
                r#"{"otherwise": [{"op": "set", "path": "n", "value": "$bad"}]}"#,
                "otherwise[0].value",
            ),
            (r#"{"initial": [], "on": {}}"#, "initial"),
            (r#"{"on": {}, "upon": {}}"#, "upon"),
        ] {
            let refusal = owner.refused(&format!(
                "select nightowls.create_projection('p', 'order', {})",
                quote(reducer)
            ));
            assert_eq!(refusal.code, "22023", "{reducer}");
            assert!(refusal.message.contains(place), "{reducer}: {refusal}");
        }
        owner.exec("begin isolation level repeatable read; select 1");
        assert_eq!(
            owner
                .refused("select nightowls.create_projection('p', 'order', '{}')")
                .code,
            "25001"
        );
        owner.exec("rollback");
        assert_eq!(
            text(
                &mut owner,
                "select (select count(*) from nightowls.projections) + (select count(*) from nightowls.routes)"
            ),
            "0"
        );
    });
}

#[test]
fn a_fold_that_fails_refuses_the_append_and_a_build_and_leaves_nothing() {
    on_each_route(|db| {
        default_org(db);
        let mut owner = db.owner();
        let mut service = db.service();
        project(&mut owner, "tally", TALLY);
        service.exec(&count("a", 1));
        let bad = r#"select nightowls.append_event('order', 'a', 'counted', '{"by": "many"}')"#;
        let refusal = service.refused(bad);
        assert_eq!(refusal.code, "22023");
        assert!(
            refusal.message.starts_with("cannot add at \"n\""),
            "{refusal}"
        );
        assert_eq!(refusal.detail, "Event \"counted\", version 2.");
        assert_eq!(state(&mut service, "tally", "a"), r#"{"n": 1}"#);
        assert_eq!(
            text(&mut owner, "select count(*) from nightowls.events"),
            "1"
        );

        owner.exec("select nightowls.drop_projection('tally')");
        service.exec(bad);
        let refusal = owner.refused(&format!(
            "select nightowls.create_projection('tally', 'order', {})",
            quote(TALLY)
        ));
        assert_eq!(refusal.code, "22023");
        assert_eq!(
            text(
                &mut owner,
                "select (select count(*) from nightowls.projections) + (select count(*) from nightowls.routes)
                      + (select count(*) from nightowls._projection_states)"
            ),
            "0"
        );
        assert_exact(db);
    });
}

#[test]
fn what_is_rolled_back_leaves_no_trace_in_a_state() {
    on_each_route(|db| {
        default_org(db);
        project(&mut db.owner(), "tally", TALLY);
        let mut service = db.service();
        service.exec(&count("a", 1));
        service.exec(&format!(
            "begin; {}; {}; rollback",
            count("a", 10),
            count("b", 10)
        ));
        assert_eq!(stored(&mut service, "tally"), [r#"a 1 {"n": 1}"#]);
        service.exec(&format!(
            "begin; {}; savepoint s; {}; {}; rollback to s; {}; savepoint t; {}; release t; commit",
            count("a", 2),
            count("a", 100),
            count("b", 100),
            count("a", 4),
            count("b", 8)
        ));
        assert_eq!(
            stored(&mut service, "tally"),
            [
                r#"a 4 {"n": 15}"#.replace("4 {\"n\": 15}", "3 {\"n\": 7}"),
                r#"b 1 {"n": 8}"#.to_owned()
            ]
        );
        // The same by an exception block, which a failing append ends.
        service.exec(&format!(
            r#"do $$ begin
                 begin
                   perform nightowls.append_event('order', 'a', 'counted', '{{"by": 1000}}');
                   perform nightowls.append_event('order', 'a', 'counted', '{{"by": "many"}}');
                 exception when invalid_parameter_value then null;
                 end;
               end $$; {}"#,
            count("a", 1)
        ));
        assert_eq!(state(&mut service, "tally", "a"), r#"{"n": 8}"#);
        assert_exact(db);
    });
}

#[test]
fn an_append_open_across_a_build_is_in_its_state_at_once_and_stored_after_a_refresh() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        db.service().exec(&count("old", 1));
        let builds = [
            format!(
                "select nightowls.create_projection('tally', 'order', {})",
                quote(TALLY)
            ),
            "select nightowls.rebuild_projection('tally')".to_owned(),
            format!(
                "select nightowls.alter_projection('tally', {})",
                quote(DOUBLE)
            ),
        ];
        for (round, build) in builds.iter().enumerate() {
            let new = format!("new{round}");
            let each = if round == 2 { 2 } else { 1 };
            let (mut open, mut reader) = (db.service(), db.service());
            open.exec(&format!("begin; {}; {}", count("old", 1), count(&new, 10)));
            owner.exec(build);
            // The one who appends sees its own events too.
            assert_eq!(
                state(&mut open, "tally", &new),
                format!("{{\"n\": {}}}", 10 * each)
            );
            open.exec("commit");
            assert_eq!(
                state(&mut reader, "tally", &new),
                format!("{{\"n\": {}}}", 10 * each)
            );
            assert_eq!(
                state(&mut reader, "tally", "old"),
                format!("{{\"n\": {}}}", (2 + round) * each)
            );
            assert_eq!(
                reader.rows("select * from nightowls.verify_projection('tally')"),
                Vec::<Vec<Option<String>>>::new()
            );
            assert_ne!(
                text(
                    &mut reader,
                    "select lagging_from from nightowls.projections"
                ),
                "null",
                "round {round}"
            );
            owner.exec("select nightowls.refresh_projection('tally')");
            assert_eq!(
                text(
                    &mut reader,
                    "select lagging_from from nightowls.projections"
                ),
                "null",
                "round {round}"
            );
            assert_exact(db);
        }
    });
}

#[test]
fn the_next_event_of_an_aggregate_brings_it_up_to_date_without_a_refresh() {
    on_each_install(|db| {
        default_org(db);
        project(&mut db.owner(), "tally", TALLY);
        let mut open = db.service();
        open.exec(&format!("begin; {}", count("a", 1)));
        db.owner()
            .exec("select nightowls.rebuild_projection('tally')");
        open.exec(&format!("{}; commit", count("a", 2)));
        db.service().exec(&count("a", 4));
        assert_eq!(stored(&mut open, "tally"), [r#"a 3 {"n": 7}"#]);
        assert_exact(db);
    });
}

#[test]
fn a_refresh_while_an_append_is_still_open_leaves_the_mark_for_the_next() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        let mut open = db.service();
        open.exec(&format!("begin; {}", count("a", 1)));
        project(&mut owner, "tally", TALLY);
        owner.exec("select nightowls.refresh_projection('tally')");
        assert_ne!(
            text(&mut owner, "select lagging_from from nightowls.projections"),
            "null"
        );
        open.exec("commit");
        owner.exec("select nightowls.refresh_projection('tally')");
        assert_eq!(
            text(&mut owner, "select lagging_from from nightowls.projections"),
            "null"
        );
        assert_exact(db);
    });
}

#[test]
fn nobody_waits_for_an_open_build() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        project(&mut owner, "tally", TALLY);
        db.service()
            .exec(&format!("{}; {}", count("a", 1), count("b", 1)));
        let builds = [
            "select nightowls.rebuild_projection('tally')".to_owned(),
            format!(
                "select nightowls.alter_projection('tally', {})",
                quote(TALLY)
            ),
            format!(
                "select nightowls.create_projection('double', 'order', {})",
                quote(DOUBLE)
            ),
            // Twice in one transaction, and once more after one before it.
            "select nightowls.rebuild_projection('tally'), nightowls.rebuild_projection('tally')"
                .to_owned(),
        ];
        for (round, build) in builds.iter().enumerate() {
            owner.exec(&format!("begin; {build}"));
            let mut other = db.service();
            other.exec("set lock_timeout = '500ms'; set statement_timeout = '5s'");
            other.exec(&count("a", 1));
            other.exec(&format!(
                "begin; {}; {}; commit",
                count("b", 1),
                count("new", 1)
            ));
            other.exec(&format!(
                "insert into nightowls.events (aggregate_type, aggregate_id, event_type, payload)
                 values ('order', 'a', 'counted', '{{\"by\": 1}}'), ('order', 'r{round}', 'counted', '{{\"by\": 1}}')"
            ));
            assert_eq!(
                state(&mut other, "tally", "a"),
                format!("{{\"n\": {}}}", 1 + 2 * (round + 1))
            );
            other.exec("select nightowls.state_at('tally', 'b', 1); select count(*) from nightowls.projection_states");
            other.exec("select count(*) from nightowls.read_events(); select * from nightowls.verify_projection('tally')");
            owner.exec("commit");
            assert_eq!(
                state(&mut other, "tally", "b"),
                format!("{{\"n\": {}}}", 1 + (round + 1))
            );
        }
        // Nor for an open refresh that has something to fold on.
        let mut open = db.service();
        open.exec(&format!("begin; {}; {}", count("a", 1), count("b", 1)));
        owner.exec("select nightowls.rebuild_projection('tally')");
        open.exec("commit; set lock_timeout = '500ms'");
        owner.exec("begin; select nightowls.refresh_projection('tally')");
        open.exec(&format!("{}; {}", count("a", 1), count("b", 1)));
        owner.exec("commit");
        owner.exec(
            "select nightowls.refresh_projection('tally'), nightowls.refresh_projection('double')",
        );
        assert_exact(db);
    });
}

#[test]
fn a_refresh_and_an_append_of_several_aggregates_do_not_deadlock() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        project(&mut owner, "tally", TALLY);
        let all = ["a", "b", "c"];
        db.service().exec(&all.map(|id| count(id, 1)).join(";"));
        for first in all {
            // Behind a build: each is stored at a version below its newest.
            let mut open = db.service();
            open.exec(&format!("begin; {}", all.map(|id| count(id, 1)).join(";")));
            owner.exec("select nightowls.rebuild_projection('tally')");
            open.exec("commit");

            open.exec(&format!("begin; {}", count(first, 1)));
            thread::scope(|scope| {
                let mut session = db.owner();
                let pid = session.pid();
                let refresh = scope
                    .spawn(move || session.exec("select nightowls.refresh_projection('tally')"));
                let mut watcher = db.direct(SUPERUSER);
                wait_until(
                    "the refresh is done or waits",
                    Duration::from_secs(20),
                    || refresh.is_finished() || is_blocked(&mut watcher, pid),
                );
                for id in all {
                    open.exec(&count(id, 1));
                }
                open.exec("commit");
                refresh.join().expect("the refresh ends well");
            });
            owner.exec("select nightowls.refresh_projection('tally')");
            assert_exact(db);
            assert_eq!(replaced(&mut owner), "0");
        }
    });
}

/// How many rows of live states a newer one has replaced without removing them.
#[track_caller]
fn replaced(session: &mut Session) -> String {
    text(
        session,
        "select count(*)
           from nightowls._projection_states s
           join nightowls.projections p on (p.org_id, p.name, p.generation) = (s.org_id, s.projection, s.generation)
          where exists (
                  select from nightowls._projection_states n
                   where (n.org_id, n.projection, n.generation, n.aggregate_id)
                       = (s.org_id, s.projection, s.generation, s.aggregate_id)
                     and n.version > s.version)",
    )
}

#[test]
fn a_projection_made_anew_under_an_old_name_owes_nothing_to_the_old_one() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        project(&mut owner, "tally", TALLY);
        // An append that projects by the old definition, and commits after the new one is made.
        let mut open = db.service();
        open.exec(&format!("begin; {}", count("a", 3)));
        owner.exec("select nightowls.drop_projection('tally')");
        project(&mut owner, "tally", DOUBLE);
        open.exec("commit");
        assert_eq!(state(&mut open, "tally", "a"), r#"{"n": 6}"#);
        owner.exec("select nightowls.refresh_projection('tally')");
        assert_exact(db);
    });
}

#[test]
fn a_prepared_append_is_in_the_state_once_it_is_committed() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        project(&mut owner, "tally", TALLY);
        let mut service = db.service();
        let gid = quote(db.name());
        service.exec(&format!(
            "begin; {}; {}; prepare transaction {gid}",
            count("a", 1),
            count("b", 1)
        ));
        owner.exec("select nightowls.rebuild_projection('tally'); select nightowls.refresh_projection('tally')");
        assert_eq!(state(&mut service, "tally", "a"), "null");
        service.exec(&format!("commit prepared {gid}"));
        assert_eq!(state(&mut service, "tally", "a"), r#"{"n": 1}"#);
        service.exec(&count("a", 1));
        owner.exec("select nightowls.refresh_projection('tally')");
        assert_exact(db);
    });
}

#[test]
fn states_are_read_in_any_transaction_read_only_and_serializable_included() {
    on_each_route(|db| {
        default_org(db);
        project(&mut db.owner(), "tally", TALLY);
        let mut service = db.service();
        for level in ["read committed", "repeatable read", "serializable"] {
            service.exec(&format!(
                "begin isolation level {level}; {}; commit",
                count("a", 1)
            ));
            service.exec(&format!("begin isolation level {level} read only"));
            let before = state(&mut service, "tally", "a");
            db.service().exec(&count("a", 1));
            let after = state(&mut service, "tally", "a");
            assert_eq!(before == after, level != "read committed", "{level}");
            service.exec(
                "select nightowls.state_at('tally', 'a', 1), nightowls.state_at_time('tally', 'a', 'now');
                 select * from nightowls.projection_states; select * from nightowls.verify_projection('tally'); commit",
            );
        }
        assert_exact(db);
    });
}

#[test]
fn an_append_with_an_older_snapshot_than_the_projection_is_in_the_state() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        let mut old = db.service();
        old.exec("begin isolation level repeatable read; select count(*) from nightowls.events");
        project(&mut owner, "tally", TALLY);
        owner.exec("select nightowls.refresh_projection('tally')");
        old.exec(&format!("{}; commit", count("a", 3)));
        assert_eq!(state(&mut old, "tally", "a"), r#"{"n": 3}"#);
        old.exec(&count("a", 1));
        assert_exact(db);
    });
}

#[test]
fn writers_builds_and_refreshes_at_once_lose_nothing() {
    on_each_install(|db| {
        default_org(db);
        project(&mut db.owner(), "tally", TALLY);
        create_tally_handler(db);
        db.service().exec(
            "select nightowls.create_projection('handled', 'order', handler => 'public.tally')",
        );
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let writers: Vec<_> = (0..3)
                .map(|writer| {
                    scope.spawn(move || {
                        let mut session = db.service();
                        for round in 0..60 {
                            let own = format!("w{writer}");
                            session.exec(&match (writer + round) % 5 {
                                0 => count("hot", 1),
                                1 => format!("begin; {}; {}; commit", count(&own, 1), count("hot", 1)),
                                2 => format!("begin; {}; rollback", count("hot", 1000)),
                                3 => format!(
                                    r#"select nightowls.append_many('[
                                       {{"aggregate_type": "order", "aggregate_id": "hot", "events": [{{"event_type": "counted", "payload": {{"by": 1}}}}]}},
                                       {{"aggregate_type": "order", "aggregate_id": "{own}", "events": [{{"event_type": "counted", "payload": {{"by": 1}}}}]}},
                                       {{"aggregate_type": "order", "aggregate_id": "n{round}", "events": [{{"event_type": "noted"}}]}}]')"#
                                ),
                                _ => format!(
                                    r#"insert into nightowls.events (aggregate_type, aggregate_id, event_type, payload)
                                       values ('order', '{own}', 'counted', '{{"by": 1}}'), ('order', 'd{writer}-{round}', 'counted', '{{"by": 2}}')"#
                                ),
                            });
                        }
                    })
                })
                .collect();
            for build in [
                format!(
                    "select nightowls.rebuild_projection('tally'); select nightowls.create_projection('double', 'order', {})",
                    quote(DOUBLE)
                ),
                "select nightowls.refresh_projection('tally'); select nightowls.refresh_projection('handled')".to_owned(),
                "select nightowls.rebuild_projection('handled')".to_owned(),
            ] {
                let done = &done;
                scope.spawn(move || {
                    let mut session = db.owner();
                    while !done.load(Ordering::Relaxed) {
                        session.exec(&build);
                    }
                });
            }
            // A reader never sees a state that is not the fold of what is there.
            let done = &done;
            scope.spawn(move || {
                let mut session = db.service();
                while !done.load(Ordering::Relaxed) {
                    let wrong = session.rows("select * from nightowls.verify_projection('tally')");
                    assert!(wrong.is_empty(), "{wrong:?}");
                }
            });
            for writer in writers {
                let ended = writer.join();
                if ended.is_err() {
                    done.store(true, Ordering::Relaxed);
                }
                ended.expect("a writer ends well");
            }
            done.store(true, Ordering::Relaxed);
        });
        db.owner().exec(
            "select nightowls.refresh_projection('tally'), nightowls.refresh_projection('double')",
        );
        assert_exact(db);
        assert_eq!(replaced(&mut db.owner()), "0");
    });
}

#[test]
fn verify_projection_finds_every_state_that_was_tampered_with_and_no_other() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        project(&mut owner, "tally", TALLY);
        let mut service = db.service();
        for id in ["a", "b", "c", "d"] {
            service.exec(&format!("{}; {}", count(id, 1), count(id, 2)));
        }
        let faulty = |db: &Db| -> Vec<String> {
            db.service()
                .rows("select aggregate_id, state, replayed from nightowls.verify_projection('tally')")
                .into_iter()
                .map(|row| {
                    row.into_iter()
                        .map(|value| value.unwrap_or_else(|| "null".to_owned()))
                        .collect::<Vec<_>>()
                        .join(" ")
                })
                .collect()
        };
        assert_eq!(faulty(db), Vec::<String>::new());
        let tamper = |sql: &str| {
            db.superuser().exec(&format!(
                "begin; set local session_replication_role = replica; {sql}; commit"
            ));
        };
        tamper(
            "update nightowls._projection_states set state = '{\"n\": 3.0}' where aggregate_id = 'a'",
        );
        assert_eq!(faulty(db), [r#"a {"n": 3.0} {"n": 3}"#]);
        tamper("update nightowls._projection_states set state = null where aggregate_id = 'b'");
        assert_eq!(
            faulty(db),
            [r#"a {"n": 3.0} {"n": 3}"#, r#"b null {"n": 3}"#]
        );
        tamper(
            "insert into nightowls._projection_states (org_id, projection, generation, aggregate_id, version, position, state)
             select org_id, projection, generation, 'ghost', 1, 1, '{}' from nightowls._projection_states where aggregate_id = 'a'",
        );
        tamper(
            "update nightowls._projection_states set version = 9, state = '{\"n\": 9}' where aggregate_id = 'c'",
        );
        assert_eq!(
            faulty(db),
            [
                r#"a {"n": 3.0} {"n": 3}"#,
                r#"b null {"n": 3}"#,
                r#"c {"n": 9} {"n": 3}"#,
                "ghost {} null"
            ]
        );
        let sampled =
            service.rows("select * from nightowls.verify_projection('tally', sample => 1)");
        assert!(sampled.len() <= 1);
        assert_eq!(
            service
                .refused("select nightowls.verify_projection('tally', 0)")
                .code,
            "22023"
        );

        owner.exec("select nightowls.rebuild_projection('tally')");
        assert_eq!(faulty(db), Vec::<String>::new());
        owner.exec("select nightowls.refresh_projection('tally')");
        assert_exact(db);
    });
}

#[test]
fn a_state_is_found_as_fast_after_2000_changes_under_a_held_snapshot() {
    on_each_install(|db| {
        default_org(db);
        project(&mut db.owner(), "tally", TALLY);
        let mut service = db.service();
        service.exec(&format!("{}; {}", count("hot", 1), count("cold", 1)));
        let mut holder = db.superuser();
        holder.exec("begin isolation level repeatable read; select count(*) from nightowls.events");

        let find = "select nightowls.state('tally', 'hot')";
        let append = &count("hot", 1);
        let (found, appended) = (buffers(&mut service, find), buffers(&mut service, append));
        let churn = "do $$ begin
             for i in 1 .. 2000 loop
               perform nightowls.append_event('order', 'hot', 'counted', '{\"by\": 1}');
               commit;
             end loop;
           end $$";
        service.exec(churn);
        let (found_then, appended_then) =
            (buffers(&mut service, find), buffers(&mut service, append));
        assert!(
            found_then <= found + 4,
            "state(): {found} buffers, then {found_then}"
        );
        assert!(
            appended_then <= appended + 16,
            "append_event(): {appended} buffers, then {appended_then}"
        );
        let view = buffers(
            &mut service,
            "select state from nightowls.projection_states where projection = 'tally' and aggregate_id = 'cold'",
        );
        assert!(
            view <= 40,
            "projection_states, another aggregate: {view} buffers"
        );
        holder.exec("commit");
        assert_exact(db);
    });
}

/// The buffers that a statement touches once its plans are made.
#[track_caller]
pub fn buffers(session: &mut Session, sql: &str) -> i64 {
    for _ in 0..7 {
        session.exec(sql);
    }
    let plan = text(
        session,
        &format!("explain (analyze, buffers, format json) {sql}"),
    );
    let plan: serde_json::Value = serde_json::from_str(&plan).expect("explain writes JSON");
    let blocks = |name: &str| {
        plan[0]["Plan"][name]
            .as_i64()
            .expect("explain counts buffers")
    };
    blocks("Shared Hit Blocks") + blocks("Shared Read Blocks")
}

#[test]
fn nobody_writes_a_state_but_its_projection() {
    on_each_install(|db| {
        default_org(db);
        project(&mut db.owner(), "tally", TALLY);
        db.service().exec(&count("a", 1));
        let before = text(
            &mut db.owner(),
            "select md5(string_agg(s::text, '')) from nightowls._projection_states s",
        );
        for role in [db.install().owner(), SUPERUSER, SERVICE] {
            let mut session = db.session(role);
            let refused = |session: &mut Session, sql: &str, how: &str| {
                let refusal = session.refused(sql);
                let expected = if role == SERVICE { "42501" } else { "NW008" };
                assert_eq!(refusal.code, expected, "{role}, {how}: {sql}: {refusal}");
            };
            let stale = text(&mut session, "select pg_current_xact_id()");
            for sql in GUARDED {
                refused(&mut session, sql, "alone");
                session.exec("begin");
                session.exec(&count("scratch", 1));
                refused(&mut session, sql, "after an append");
                session.exec("rollback");
                session.exec("begin; insert into nightowls.events (aggregate_type, aggregate_id, event_type, payload) values ('order', 'scratch', 'counted', '{\"by\": 1}')");
                refused(&mut session, sql, "after a direct insert");
                session.exec("rollback");
                session.exec("begin; savepoint s");
                session.refused(
                    r#"select nightowls.append_event('order', 'a', 'counted', '{"by": "many"}')"#,
                );
                session.exec("rollback to s");
                refused(&mut session, sql, "after a failed append");
                session.exec("rollback");
                session.exec(&format!("set nightowls.door = '{stale}|project'"));
                refused(&mut session, sql, "with an old door");
                session.exec("reset nightowls.door");
            }
            session.exec("begin");
            assert!(
                matches!(
                    session
                        .refused("truncate nightowls.projection_states")
                        .code
                        .as_str(),
                    "42809" | "42501"
                ),
                "a view is not truncated"
            );
            session.exec("rollback");
        }
        for build in ["refresh_projection", "rebuild_projection"] {
            let mut session = db.owner();
            session.exec(&format!("begin; select nightowls.{build}('tally')"));
            assert_eq!(session.refused(GUARDED[1]).code, "NW008", "after {build}");
            session.exec("rollback");
        }
        assert_eq!(
            before,
            text(
                &mut db.owner(),
                "select md5(string_agg(s::text, '')) from nightowls._projection_states s"
            )
        );
    });
}

#[test]
fn a_stale_setting_of_ours_left_on_a_session_changes_nothing() {
    on_each_install(|db| {
        default_org(db);
        project(&mut db.owner(), "tally", TALLY);
        let mut service = db.service();
        service.exec(
            "set nightowls.door = '1|append|7'; set nightowls.held = '1|256:0|#64'; select 1",
        );
        service.exec(&count("a", 1));
        service.exec(&format!(
            "begin; {}; {}; commit",
            count("a", 1),
            count("b", 1)
        ));
        service.exec(
            r#"insert into nightowls.events (aggregate_type, aggregate_id, event_type, payload) values ('order', 'a', 'counted', '{"by": 1}')"#,
        );
        assert_eq!(
            stored(&mut service, "tally"),
            [r#"a 3 {"n": 3}"#, r#"b 1 {"n": 1}"#]
        );
        assert_eq!(
            text(&mut service, "select count(*) from nightowls.read_events()"),
            "4"
        );
        assert_exact(db);
    });
}

/// A handler in schema public that does as [`TALLY`] and notes who ran it.
fn create_tally_handler(db: &Db) {
    db.owner().exec(
        "create table public.calls (who text not null default current_user, version bigint not null);
         grant insert, select on public.calls to public;
         create function public.tally(state jsonb, event nightowls.events) returns jsonb
           language plpgsql as $$
         begin
           insert into public.calls (version) values ((event).version);
           if (event).event_type = 'closed' then
             return null;
           elsif (event).payload ->> 'by' = 'many' then
             raise exception 'too many' using errcode = 'TM001', detail = 'By the handler.';
           end if;
           return jsonb_build_object('n', coalesce((state ->> 'n')::numeric, 0) + ((event).payload ->> 'by')::numeric);
         end $$",
    );
}

#[test]
fn a_handler_keeps_states_as_the_one_who_appends_and_never_as_the_owner() {
    on_each_route(|db| {
        default_org(db);
        create_tally_handler(db);
        let mut service = db.service();
        service.exec(&format!("{}; {}", count("a", 1), count("b", 5)));
        service.exec(
            "select nightowls.create_projection('tally', 'order', handler => 'public.tally')",
        );
        assert_eq!(
            stored(&mut service, "tally"),
            [r#"a 1 {"n": 1}"#, r#"b 1 {"n": 5}"#]
        );
        service.exec(&count("a", 2));
        service.exec(
            r#"select nightowls.append_many('[
                 {"aggregate_type": "order", "aggregate_id": "b", "events": [{"event_type": "closed"}]},
                 {"aggregate_type": "order", "aggregate_id": "a", "events": [
                    {"event_type": "counted", "payload": {"by": 4}}, {"event_type": "counted", "payload": {"by": 8}}]}]')"#,
        );
        assert_eq!(
            stored(&mut service, "tally"),
            [r#"a 4 {"n": 15}"#, "b 2 null"]
        );
        assert_eq!(
            text(&mut service, "select nightowls.state_at('tally', 'a', 2)"),
            r#"{"n": 3}"#
        );
        assert_eq!(
            text(
                &mut service,
                "select string_agg(distinct who, ' ') from public.calls"
            ),
            SERVICE
        );
        service.exec(
            "select nightowls.rebuild_projection('tally'), nightowls.refresh_projection('tally')",
        );
        assert_eq!(
            text(
                &mut service,
                "select string_agg(distinct who, ' ') from public.calls"
            ),
            SERVICE
        );
        assert_eq!(
            stored(&mut service, "tally"),
            [r#"a 4 {"n": 15}"#, "b 2 null"]
        );
        assert_exact(db);
    });
}

#[test]
fn a_handler_that_raises_refuses_the_append_with_its_own_sqlstate() {
    on_each_route(|db| {
        default_org(db);
        create_tally_handler(db);
        let mut service = db.service();
        service.exec(
            "select nightowls.create_projection('tally', 'order', handler => 'public.tally')",
        );
        service.exec(&count("a", 1));
        for append in [
            r#"select nightowls.append_event('order', 'a', 'counted', '{"by": "many"}')"#,
            r#"select nightowls.append_events('order', 'a', '[{"event_type": "counted", "payload": {"by": 1}}, {"event_type": "counted", "payload": {"by": "many"}}]')"#,
            r#"insert into nightowls.events (aggregate_type, aggregate_id, event_type, payload) values ('order', 'z', 'counted', '{"by": "many"}')"#,
        ] {
            let refusal = service.refused(append);
            assert_eq!(
                (
                    refusal.code.as_str(),
                    refusal.message.as_str(),
                    refusal.detail.as_str()
                ),
                ("TM001", "too many", "By the handler.")
            );
        }
        assert_eq!(
            text(
                &mut service,
                "select (select count(*) from nightowls.events) || ' ' || (select count(*) from public.calls)"
            ),
            "1 1"
        );
        assert_eq!(stored(&mut service, "tally"), [r#"a 1 {"n": 1}"#]);
    });
}

#[test]
fn a_handler_that_is_gone_is_42883_and_one_replaced_counts_from_then_on() {
    on_each_install(|db| {
        default_org(db);
        create_tally_handler(db);
        let mut owner = db.owner();
        let mut service = db.service();
        service.exec(
            "select nightowls.create_projection('tally', 'order', handler => 'public.tally')",
        );
        service.exec(&count("a", 1));
        owner.exec("alter function public.tally rename to other");
        assert_eq!(service.refused(&count("a", 1)).code, "42883");
        owner.exec("alter function public.other rename to tally");
        service.exec(&count("a", 1));
        owner.exec(
            "create or replace function public.tally(state jsonb, event nightowls.events) returns jsonb
               language sql return jsonb_build_object('v', (event).version)",
        );
        service.exec(&count("a", 1));
        assert_eq!(state(&mut service, "tally", "a"), r#"{"v": 3}"#);
        // A handler that folds otherwise than before shows in states that it made before.
        service.exec(&count("b", 1));
        service.exec("select nightowls.alter_projection('tally', handler => 'public.tally')");
        assert_exact(db);
    });
}

#[test]
fn an_append_open_across_a_build_reaches_a_handlers_state_too() {
    on_each_install(|db| {
        default_org(db);
        create_tally_handler(db);
        let mut owner = db.owner();
        let mut open = db.service();
        open.exec(&count("a", 1));
        open.exec(&format!("begin; {}; {}", count("a", 2), count("b", 2)));
        owner.exec(
            "select nightowls.create_projection('tally', 'order', handler => 'public.tally')",
        );
        open.exec("commit");
        assert_eq!(state(&mut open, "tally", "a"), r#"{"n": 3}"#);
        assert_eq!(state(&mut open, "tally", "b"), r#"{"n": 2}"#);
        open.exec(&format!("begin; {}; {}", count("a", 4), count("c", 4)));
        owner.exec("select nightowls.rebuild_projection('tally')");
        open.exec("commit");
        assert_eq!(state(&mut open, "tally", "a"), r#"{"n": 7}"#);
        owner.exec("select nightowls.refresh_projection('tally')");
        assert_eq!(
            stored(&mut open, "tally"),
            [r#"a 3 {"n": 7}"#, r#"b 1 {"n": 2}"#, r#"c 1 {"n": 4}"#]
        );
        assert_eq!(
            text(&mut open, "select lagging_from from nightowls.projections"),
            "null"
        );
        assert_exact(db);
    });
}

#[test]
fn a_handlers_state_is_written_by_its_projection_alone() {
    on_each_install(|db| {
        default_org(db);
        create_tally_handler(db);
        // A handler that tries to write states itself, of its own projection and of another.
        db.owner().exec(
            "create function public.forger(state jsonb, event nightowls.events) returns jsonb language plpgsql as $$
             begin
               update nightowls._projection_states set state = '{\"n\": 666}';
               return '{}';
             end $$",
        );
        project(&mut db.owner(), "reduced", TALLY);
        let mut owner = db.owner();
        owner.exec(
            "select nightowls.create_projection('tally', 'order', handler => 'public.forger')",
        );
        for (role, code) in [
            (db.install().owner(), "NW008"),
            (SUPERUSER, "NW008"),
            (SERVICE, "42501"),
        ] {
            assert_eq!(
                db.session(role).refused(&count("a", 1)).code,
                code,
                "{role}"
            );
        }
        assert_eq!(
            text(&mut owner, "select count(*) from nightowls.events"),
            "0"
        );
    });
}

#[test]
fn a_handler_registered_by_an_ordinary_role_gains_it_nothing() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        owner.exec(&format!(
            "create table public.secrets (word text); insert into public.secrets values ('hush');
             create table public.loot (word text); grant all on public.loot to public;
             select nightowls.grant_service('{APP}')"
        ));
        let mut app = db.session(APP);
        app.exec(
            "create function public.grab(state jsonb, event nightowls.events) returns jsonb language plpgsql as $$
             begin
               begin execute 'create role owl_thief superuser'; exception when insufficient_privilege then null; end;
               begin execute 'alter role owl_app superuser'; exception when insufficient_privilege then null; end;
               begin insert into public.loot select word from public.secrets; exception when insufficient_privilege then null; end;
               insert into public.loot values ('ran as ' || current_user);
               return jsonb_build_object('superuser', (select rolsuper from pg_roles where rolname = current_user));
             end $$;
             select nightowls.create_projection('grab', 'order', handler => 'public.grab')",
        );
        let mut service = db.service();
        service.exec(&count("a", 1));
        service.exec(
            "insert into nightowls.events (aggregate_type, aggregate_id, event_type) values ('order', 'b', 'noted')",
        );
        app.exec(&count("c", 1));
        service.exec(
            "select nightowls.rebuild_projection('grab'); select nightowls.refresh_projection('grab');
             select nightowls.state('grab', 'a'); select nightowls.state_at('grab', 'a', 1);
             select nightowls.verify_projection('grab')",
        );
        assert_eq!(
            text(
                &mut owner,
                "select string_agg(distinct word, ', ' order by word) from public.loot"
            ),
            format!("ran as {APP}, ran as {SERVICE}")
        );
        assert_eq!(state(&mut service, "grab", "b"), r#"{"superuser": false}"#);
        let mut superuser = db.superuser();
        assert_eq!(
            text(
                &mut superuser,
                "select count(*) from pg_roles where rolname = 'owl_thief' or rolname = 'owl_app' and rolsuper"
            ),
            "0"
        );
        // Nor by what lies beneath: no function that runs as the owner runs what a caller hands it.
        let definers = superuser.rows(
            "select p.oid::regprocedure::text, p.prosrc from pg_proc p
              where p.pronamespace = 'nightowls'::regnamespace and p.prosecdef
                and p.prosrc ~* '(_call_handlers|_fold_by_handler|_rebuild_table|_build_by_handler|execute[^;]*handler)'",
        );
        assert!(definers.is_empty(), "{definers:?}");
    });
}

#[test]
fn a_reducer_nobody_checked_is_an_error_and_not_a_crash() {
    on_each_install(|db| {
        let org = default_org(db);
        let mut service = db.service();
        for (number, reducer) in [
            "null",
            "[]",
            "7",
            r#"{"on": 7}"#,
            r#"{"on": {"counted": 7}}"#,
            r#"{"on": {"counted": [7]}}"#,
            r#"{"on": {"counted": [{"op": "add"}]}}"#,
            r#"{"on": {"counted": [{"op": "nothing", "path": "n"}]}}"#,
            r#"{"on": {"counted": [{"op": "put", "path": []}]}}"#,
            r#"{"initial": [1], "on": {"counted": [{"op": "add", "path": "n"}]}}"#,
        ]
        .iter()
        .enumerate()
        {
            // A service may call what is beneath create_projection().
            let registered = service.try_exec(&format!(
                "select nightowls._register_projection(row('{org}', 'p{number}', 'reducer', 't{number}', '{reducer}', null, null, null, null, 'inline', 1, null, now(), null)::nightowls.projections)"
            ));
            if registered.is_ok() {
                let append = service.try_exec(&format!(
                    "select nightowls.append_event('t{number}', 'a', 'counted', '{{\"by\": 1}}')"
                ));
                if let Err(refusal) = append {
                    assert!(
                        !["08006", "57P02", "XX000"].contains(&refusal.code.as_str()),
                        "{reducer}: {refusal}"
                    );
                }
            }
            assert!(service.alive(), "{reducer}");
        }
    });
}

#[test]
fn projections_of_one_type_keep_apart_and_orgs_too() {
    on_each_route(|db| {
        let one = default_org(db);
        let mut owner = db.owner();
        let two = text(&mut owner, "select nightowls.create_org('two')");
        project(&mut owner, "it's \"odd\". {}, ünïcödé", TALLY);
        owner.exec(&format!(
            "select nightowls.create_projection('tally', 'order', {}, org => '{two}')",
            quote(TALLY)
        ));
        let mut service = db.service();
        for org in [&one, &two] {
            service.exec(&format!(
                "select nightowls.append_event('order', 'same', 'counted', '{{\"by\": 1}}', org => '{org}')"
            ));
        }
        service.exec(&count("same", 1));
        let rows = service
            .rows("select projection, version from nightowls.projection_states order by version");
        assert_eq!(
            rows,
            [
                [Some("tally".to_owned()), Some("1".to_owned())],
                [
                    Some("it's \"odd\". {}, ünïcödé".to_owned()),
                    Some("2".to_owned())
                ]
            ]
        );
        assert_exact(db);
    });
}

/// One piece of a block of SQL on a page, and what the page says comes back.
struct Example {
    line: usize,
    sql: String,
    promised: Vec<String>,
}

/// Every piece of SQL of a page: a blank line ends a piece whose result is shown.
fn examples(page: &str) -> Vec<Example> {
    let mut examples: Vec<Example> = Vec::new();
    let mut inside = false;
    let mut open = false;
    for (number, line) in page.lines().enumerate() {
        if line.starts_with("```") {
            inside = line == "```sql";
            open = false;
        } else if let Some(promised) = line.strip_prefix("--> ").filter(|_| inside) {
            let example = examples.last_mut().expect("a result follows a statement");
            example.promised.push(promised.to_owned());
            open = false;
        } else if inside && open {
            let example = examples.last_mut().expect("one is open");
            example.sql += line;
            example.sql += "\n";
        } else if inside && !line.is_empty() {
            open = true;
            examples.push(Example {
                line: number + 1,
                sql: format!("{line}\n"),
                promised: Vec::new(),
            });
        }
    }
    examples
}

#[test]
fn the_examples_of_the_page_do_what_it_says() {
    assert_examples(include_str!("../docs/projections.md"), 20);
}

/// Runs a page's SQL as the owner, from the first piece to the last. There must be
/// more than `least` pieces.
#[track_caller]
pub fn assert_examples(page: &str, least: usize) {
    let examples = examples(page);
    assert!(examples.len() > least, "the examples are gone");
    on_each_route(|db| {
        let mut session = db.owner();
        for example in &examples {
            let (said, refused) = match session.try_rows(&example.sql) {
                Ok(rows) => (joined_by_bars(rows), false),
                Err(refusal) => (vec![format!("{} {}", refusal.code, refusal.message)], true),
            };
            let shown = &said[said.len().saturating_sub(example.promised.len())..];
            assert!(
                shown == example.promised && !(refused && example.promised.is_empty()),
                "line {}: {}\n{said:#?}",
                example.line,
                example.sql
            );
        }
    });
}

fn joined_by_bars(rows: Vec<Vec<Option<String>>>) -> Vec<String> {
    rows.into_iter()
        .map(|row| {
            row.into_iter()
                .map(|value| value.unwrap_or_else(|| "null".to_owned()))
                .collect::<Vec<_>>()
                .join(" | ")
        })
        .collect()
}

/// What an append does next when the projection is dropped right after its
/// insert has looked at what follows.
#[test]
fn a_projection_dropped_under_an_append_is_no_error_and_leaves_no_state() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        project(&mut owner, "tally", TALLY);
        owner.exec(&count("a", 1));
        owner.exec("select nightowls.drop_projection('tally')");

        // As in a function that appends.
        owner.exec("set search_path to pg_catalog, pg_temp, pg_append");
        owner.exec(
            "select nightowls._project_one(e.org_id, 'tally', e.aggregate_type, e.aggregate_id, e.version, e.position, e.event_type,
                                           e.payload, e.metadata, e.event_id, e.created_at)
               from nightowls.events e where e.aggregate_id = 'a'",
        );

        assert_eq!(
            text(
                &mut owner,
                "select count(*) from nightowls._projection_states"
            ),
            "0"
        );
    });
}

#[test]
fn both_installs_show_the_same_refusal() {
    let told: Vec<_> = Install::ALL
        .iter()
        .map(|install| {
            let mut refusals = Vec::new();
            crate::support::on_install(*install, |db| {
                default_org(db);
                let mut owner = db.owner();
                project(&mut owner, "tally", TALLY);
                for sql in [
                    r#"select nightowls.append_event('order', 'a', 'counted', '{"by": []}')"#,
                    r#"select nightowls.create_projection('p', 'order', '{"on": {"x": [{"op": "set", "path": ""}]}}')"#,
                    "select nightowls.state('taly', 'a')",
                    "delete from nightowls._projection_states",
                ] {
                    let refusal = owner.refused(sql);
                    refusals.push((refusal.code, refusal.message, refusal.detail, refusal.hint));
                }
            });
            refusals
        })
        .collect();
    assert_eq!(told[0], told[1]);
}
