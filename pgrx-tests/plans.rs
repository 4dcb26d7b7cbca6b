//! Flat cost: what a hot statement touches does not grow with the log, and no
//! statistics make its plans flip. Counted in buffers, not read from plans.

use crate::fixture::default_org;
use crate::projections::{buffers, text};
use crate::support::{Db, OWNER, SERVICE, Session, full, on_each_install};

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
    (
        "fetch_events and commit_offset, 10 events",
        150,
        "with batch as materialized (select * from nightowls.fetch_events('behind', 10))
         select nightowls.commit_offset('behind', max(position), max(fence)) from batch having count(*) > 0",
    ),
    (
        "fetch_events and commit_offset, 10 events of one member of four",
        250,
        "with batch as materialized (select * from nightowls.fetch_events('shared', 10, 1))
         select nightowls.commit_offset('shared', max(position), max(fence), 1) from batch having count(*) > 0",
    ),
    (
        "fetch_events, nothing new",
        40,
        "select * from nightowls.fetch_events('idle')",
    ),
    (
        "run_projections, one new event",
        250,
        "select * from nightowls.run_projections(1)",
    ),
    (
        "state of an async projection",
        40,
        "select nightowls.state('later', 'a')",
    ),
    (
        "state_at, 400 events ago",
        // A snapshot and the events after it, up to 1,000, with others' between them.
        1100,
        "select nightowls.state_at('tally', 'big', (select greatest(version - 400, 1) from nightowls.last_event('order', 'big')))",
    ),
    (
        // The events after the last snapshot lie on pages of their own, and some states on dead rows.
        "create_snapshot",
        120,
        "select nightowls.create_snapshot('tally', 'o77')",
    ),
    (
        "read_aggregate with the archive, 10 from the middle",
        60,
        "select * from nightowls.read_aggregate('order', 'big', 5001, 10, include_archived => true)",
    ),
    (
        "read_aggregate with the archive, 10 archived ones",
        60,
        "select * from nightowls.read_aggregate('order', 'old7', 1, 10, include_archived => true)",
    ),
    (
        "all_events, one version",
        40,
        "select * from nightowls.all_events e where e.org_id = nightowls.current_org() and e.aggregate_type = 'order' and e.aggregate_id = 'big' and e.version = 77",
    ),
    (
        "a row of a published table",
        80,
        "select public.put()",
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

/// Consumers at the beginning of the log and at its end, and events for an async
/// projection to take on, one a call.
const PREPARE: &str = "select nightowls.seek('behind', 0), nightowls.seek('shared', 0);
     select nightowls.seek('idle', coalesce((select max(position) from nightowls.recent_events(max_events => 1)), 0));
     select nightowls.refresh_projection('later');
     select nightowls.append_event('async', 'a', 'counted') from generate_series(1, 8)";

/// Notes each statement that goes beyond its bound, and does so again: what other tests do to the server can empty a session's caches, which
/// it then fills from the catalog. A bad plan is bad each time.
fn measure(sessions: &mut [(&str, Session); 2], when: &str, wrong: &mut Vec<String>) {
    for (mode, session) in sessions {
        session.exec(PREPARE);
        for (name, bound, sql) in BOUNDS {
            let found = (0..3)
                .map(|_| buffers(session, sql))
                .find(|found| found <= bound)
                .unwrap_or_else(|| buffers(session, sql));
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

const TABLES: [&str; 12] = [
    "events",
    "events_archive",
    "compactions",
    "snapshots",
    "_projection_states",
    "consumers",
    "_consumer_offsets",
    "_consumer_failures",
    "routes",
    "_append_targets",
    "projections",
    "published_changes",
];

fn analyze(session: &mut Session) {
    for table in TABLES {
        session.exec(&format!("analyze nightowls.{table}"));
    }
    session.exec("analyze nightowls.orgs; analyze nightowls.settings");
}

/// As after a restore or a crash: nothing was ever analyzed.
fn forget_statistics(session: &mut Session) {
    let tables = TABLES
        .map(|table| format!("'nightowls.{table}'::regclass"))
        .join(", ");
    session.exec(&format!(
        "delete from pg_statistic where starelid in ({tables});
         update pg_class set reltuples = -1, relpages = 0, relallvisible = 0 where oid in ({tables});
         update pg_class set reltuples = -1, relpages = 0 where oid in (select indexrelid from pg_index where indrelid in ({tables}));
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
         insert into nightowls.snapshots (org_id, projection, generation, aggregate_id, version, position, state, latest_at)
         select e.org_id, p.name, p.generation, e.aggregate_id, e.version, e.position, jsonb_build_object('n', e.version), e.created_at
           from nightowls.events e join nightowls.projections p on p.aggregate_type = e.aggregate_type
          where e.aggregate_type = 'order' and e.version % case e.aggregate_id when 'big' then 1000 else 10 end = 0
             on conflict do nothing;
         insert into nightowls.events_archive (org_id, position, aggregate_type, aggregate_id, version, event_type, payload, metadata, created_at, event_id)
         select '{org}', -i, 'order', 'old' || i % 100, 1 + i / 100, 'counted', '{{\"by\": 1}}', '{{}}', now(),
                case when i % 2 = 0 then gen_random_uuid() end
           from generate_series(0, {events} / 20) i
             on conflict do nothing;
         insert into nightowls.compactions (org_id, aggregate_type, aggregate_id, compacted_to)
         select '{org}', 'order', 'old' || i, {events} / 500 from generate_series(0, 99) i on conflict do nothing;
         insert into nightowls._consumer_offsets (org_id, consumer, generation, share, seq, \"offset\", fence)
         select '{org}', 'other ' || i % 300, 1, 0, {events} + i, i, i from generate_series(1, {events} / 20) i
             on conflict do nothing;
         insert into nightowls._consumer_failures (org_id, consumer, position, attempts)
         select '{org}', 'other ' || i % 300, i, 1 from generate_series(1, {events} / 20) i on conflict do nothing;
         commit"
    ));
}

/// Back to no events, with nothing left of those that were there.
fn empty(session: &mut Session) {
    session.exec(
        "begin; set local session_replication_role = replica;
         delete from nightowls.events; delete from nightowls._projection_states; delete from nightowls.events_archive;
         delete from nightowls.compactions; delete from nightowls.snapshots; delete from nightowls._consumer_offsets where consumer like 'other%';
         delete from nightowls._consumer_failures; commit",
    );
    session.exec("vacuum nightowls.events, nightowls._projection_states, nightowls.events_archive, nightowls.compactions, nightowls.snapshots, nightowls._consumer_offsets, nightowls._consumer_failures");
}

#[test]
fn hot_statements_touch_as_few_buffers_with_many_events_as_with_none() {
    // With NIGHTOWLS_FULL set a million.
    let many = if full() { 1_000_000 } else { 200_000 };
    on_each_install(|db| {
        let org = default_org(db);
        let mut superuser = db.superuser();
        for table in TABLES {
            superuser.exec(&format!(
                "alter table nightowls.{table} set (autovacuum_enabled = off)"
            ));
        }
        // Loads faster; plans are the same.
        superuser.exec("alter table nightowls.events set unlogged");
        superuser.exec("alter table nightowls.events_archive set unlogged");
        superuser.exec(
            r#"select nightowls.create_projection('tally', 'order', '{"otherwise": [{"op": "add", "path": "n"}]}')"#,
        );
        // Others that have nothing to do with these events.
        superuser.exec(
            r#"select nightowls.create_projection('other ' || i, 'type ' || i, '{"otherwise": []}') from generate_series(1, 300) i"#,
        );
        superuser.exec(
            r#"select nightowls.create_projection('later', 'async', '{"otherwise": [{"op": "add", "path": "n"}]}', mode => 'async');
               select nightowls.create_consumer('behind'), nightowls.create_consumer('shared', members => 4), nightowls.create_consumer('idle');
               select nightowls.create_consumer('other ' || i, '{"aggregate_types": ["none"]}') from generate_series(1, 300) i"#,
        );
        superuser.exec(&format!(
            "create table public.things (id int generated always as identity);
             -- In a function, as explain does not count what AFTER triggers touch.
             create function public.put() returns void language plpgsql as 'begin insert into public.things default values; end';
             grant insert on public.things to {SERVICE};
             grant trigger on public.things to {OWNER}"
        ));
        db.owner()
            .exec("select nightowls.publish_changes('public.things', 'made', 'thing', 'new.id')");
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

        grow(&mut superuser, &org, many);
        let analyzed =
            "select reltuples < 10000 from pg_class where oid = 'nightowls.events'::regclass";
        assert_eq!(text(&mut superuser, analyzed), "t");
        measure(
            &mut old,
            &format!("{many} events, planned at 1,000"),
            &mut late,
        );
        fresh(&format!("{many} events, statistics of 1,000"));
        analyze(&mut superuser);
        fresh(&format!("{many} events, fresh statistics"));
        forget_statistics(&mut superuser);
        fresh(&format!("{many} events, no statistics"));

        wrong.append(&mut late);
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    });
}
