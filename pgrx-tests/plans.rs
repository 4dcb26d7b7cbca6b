//! Flat cost: what a hot statement touches does not grow with the log, and no
//! statistics make its plans flip. Counted in buffers, not read from plans.

use crate::fixture::default_org;
use crate::projections::{buffers, text};
use crate::support::{Db, Session, on_each_install};

/// What each statement may touch, however many events there are. A probe of an
/// index is up to four buffers at these sizes, a row written about ten.
const BOUNDS: &[(&str, i64, &str)] = &[
    (
        "append_event, any",
        60,
        "select nightowls.append_event('plain', 'big', 'counted', '{\"by\": 1}')",
    ),
    (
        "append_event, new aggregate",
        60,
        "select nightowls.append_event('plain', gen_random_uuid()::text, 'counted', '{\"by\": 1}', 0)",
    ),
    (
        "append_event with an event_id",
        70,
        "select nightowls.append_event('plain', 'big', 'counted', '{\"by\": 1}', event_id => gen_random_uuid())",
    ),
    (
        "append_event with a projection, many states",
        80,
        "select nightowls.append_event('order', 'o17', 'counted', '{\"by\": 1}')",
    ),
    (
        "append_event with a projection, many events",
        80,
        "select nightowls.append_event('order', 'big', 'counted', '{\"by\": 1}')",
    ),
    (
        "append_events of 10",
        170,
        "select nightowls.append_events('plain', 'big', (select jsonb_agg('{\"event_type\": \"counted\"}'::jsonb) from generate_series(1, 10)))",
    ),
    (
        "append_events of 10 with a projection",
        220,
        "select nightowls.append_events('order', 'o18', (select jsonb_agg('{\"event_type\": \"counted\"}'::jsonb) from generate_series(1, 10)))",
    ),
    (
        "append_many to 10 aggregates with a projection",
        500,
        "select nightowls.append_many((select jsonb_agg(jsonb_build_object('aggregate_type', 'order', 'aggregate_id', 'o' || i,
                  'events', '[{\"event_type\": \"counted\"}]'::jsonb)) from generate_series(1, 10) i))",
    ),
    (
        "a retry of append_event",
        40,
        "select nightowls.append_event('plain', 'retried', 'counted', event_id => '00000000-0000-4000-8000-000000000001')",
    ),
    (
        "read_aggregate, the newest 10",
        40,
        "select * from nightowls.read_aggregate('order', 'big', (select version - 9 from nightowls.last_event('order', 'big')), 10)",
    ),
    (
        "read_aggregate, the first 10",
        40,
        "select * from nightowls.read_aggregate('order', 'big', max_events => 10)",
    ),
    (
        "last_event",
        15,
        "select * from nightowls.last_event('order', 'big')",
    ),
    (
        "read_events, after the last 10",
        40,
        "select * from nightowls.read_events((select min(position) - 1 from nightowls.recent_events(max_events => 10)))",
    ),
    (
        "read_events, 10 from the beginning",
        40,
        "select * from nightowls.read_events(0, 10)",
    ),
    (
        "read_events, nothing new",
        30,
        "select * from nightowls.read_events((select max(position) from nightowls.recent_events(max_events => 1)))",
    ),
    (
        "recent_events",
        40,
        "select * from nightowls.recent_events(max_events => 10)",
    ),
    (
        "state",
        25,
        "select nightowls.state('tally', 'big')",
    ),
    (
        "state, one of many",
        25,
        "select nightowls.state('tally', 'o77')",
    ),
    (
        "state_at, the newest version",
        25,
        "select nightowls.state_at('tally', 'big', (select version from nightowls.last_event('order', 'big')))",
    ),
    (
        "projection_states of one aggregate",
        60,
        "select * from nightowls.projection_states where org_id = nightowls.current_org() and projection = 'tally' and aggregate_id = 'big'",
    ),
];

/// Sessions as `plan_cache_mode` has them plan.
fn sessions(db: &Db) -> [(&'static str, Session); 2] {
    ["auto", "force_generic_plan"].map(|mode| {
        let mut session = db.service();
        session.exec(&format!("set plan_cache_mode = {mode}"));
        (mode, session)
    })
}

/// Notes each statement that goes beyond its bound.
fn measure(sessions: &mut [(&str, Session); 2], when: &str, wrong: &mut Vec<String>) {
    for (mode, session) in sessions {
        for (name, bound, sql) in BOUNDS {
            let found = buffers(session, sql);
            if std::env::var_os("NIGHTOWLS_SHOW_BUFFERS").is_some() {
                println!("{when}, {mode}: {name}: {found}");
            }
            if found > *bound {
                wrong.push(format!(
                    "{when}, {mode}: {name}: {found} buffers, at most {bound}"
                ));
            }
        }
    }
}

const TABLES: &str = "'nightowls.events'::regclass, 'nightowls._projection_states'::regclass, 'nightowls.routes'::regclass, \
     'nightowls.projections'::regclass, 'nightowls.orgs'::regclass, 'nightowls.settings'::regclass";

fn analyze(session: &mut Session) {
    session.exec(
        "analyze nightowls.events, nightowls._projection_states, nightowls.routes, nightowls.projections, nightowls.orgs, nightowls.settings",
    );
}

/// As after a restore or a crash: nothing was ever analyzed.
fn forget_statistics(session: &mut Session) {
    session.exec(&format!(
        "delete from pg_statistic where starelid in ({TABLES});
         update pg_class set reltuples = -1, relpages = 0, relallvisible = 0 where oid in ({TABLES});
         update pg_class set reltuples = -1, relpages = 0 where oid in (select indexrelid from pg_index where indrelid in ({TABLES}));
         "
    ));
}

/// Brings the log to `events` events: half of them in 1,000 aggregates (up to
/// 500 each), half in one. Triggers would take minutes; this writes what they would.
fn grow(session: &mut Session, org: &str, events: u64) {
    session.exec(&format!(
        "begin;
         set local session_replication_role = replica;
         insert into nightowls.events (org_id, aggregate_type, aggregate_id, version, event_type, payload)
         select '{org}', 'order', case when i % 2 = 0 then 'big' else 'o' || (i / 2) % 1000 end,
                coalesce(h.version, 0) + case when i % 2 = 0 then i / 2 else 1 + (i / 2) / 1000 end,
                'counted', '{{\"by\": 1}}'
           from generate_series(2, {events} + 1) i
           left join (select e.aggregate_id, max(e.version) as version from nightowls.events e
                       where e.org_id = '{org}' and e.aggregate_type = 'order' group by 1) h
             on h.aggregate_id = case when i % 2 = 0 then 'big' else 'o' || (i / 2) % 1000 end;
         delete from nightowls._projection_states;
         insert into nightowls._projection_states (org_id, projection, generation, aggregate_id, version, position, state)
         select e.org_id, p.name, p.generation, e.aggregate_id, max(e.version), max(e.position), jsonb_build_object('n', max(e.version))
           from nightowls.events e join nightowls.projections p on p.aggregate_type = e.aggregate_type
          where e.aggregate_type = 'order' group by 1, 2, 3, 4;
         commit"
    ));
}

/// Back to no events, with nothing left of those that were there.
fn empty(session: &mut Session) {
    session.exec(
        "begin; set local session_replication_role = replica;
         delete from nightowls.events; delete from nightowls._projection_states; commit",
    );
    session.exec("vacuum nightowls.events, nightowls._projection_states");
}

#[test]
fn hot_statements_touch_as_few_buffers_at_a_million_events_as_at_none() {
    on_each_install(|db| {
        let org = default_org(db);
        let mut superuser = db.superuser();
        for table in ["events", "_projection_states", "routes", "projections"] {
            superuser.exec(&format!(
                "alter table nightowls.{table} set (autovacuum_enabled = off)"
            ));
        }
        // Loads faster; plans are the same.
        superuser.exec("alter table nightowls.events set unlogged");
        superuser.exec(
            r#"select nightowls.create_projection('tally', 'order', '{"otherwise": [{"op": "add", "path": "n"}]}')"#,
        );
        // Others that have nothing to do with these events.
        superuser.exec(
            r#"select nightowls.create_projection('other ' || i, 'type ' || i, '{"otherwise": []}') from generate_series(1, 300) i"#,
        );
        let mut wrong = Vec::new();
        let mut fresh = |when: &str| measure(&mut sessions(db), when, &mut wrong);
        fresh("0 events, never analyzed");

        empty(&mut superuser);
        analyze(&mut superuser);
        let mut old = sessions(db);
        let mut late = Vec::new();
        measure(&mut old, "0 events, analyzed when empty", &mut late);
        grow(&mut superuser, &org, 20_000);
        measure(&mut old, "20,000 events, planned when empty", &mut late);
        fresh("20,000 events, analyzed when empty");

        empty(&mut superuser);
        grow(&mut superuser, &org, 1_000);
        analyze(&mut superuser);
        let mut old = sessions(db);
        measure(&mut old, "1,000 events, fresh statistics", &mut late);

        grow(&mut superuser, &org, 1_000_000);
        let analyzed =
            "select reltuples < 10000 from pg_class where oid = 'nightowls.events'::regclass";
        assert_eq!(text(&mut superuser, analyzed), "t");
        measure(&mut old, "1,000,000 events, planned at 1,000", &mut late);
        fresh("1,000,000 events, statistics of 1,000");
        analyze(&mut superuser);
        fresh("1,000,000 events, fresh statistics");
        forget_statistics(&mut superuser);
        fresh("1,000,000 events, no statistics");

        wrong.append(&mut late);
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    });
}
