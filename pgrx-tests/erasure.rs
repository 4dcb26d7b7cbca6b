//! Erasure: one subject is forgotten, completely, and nobody else.

use std::thread;
use std::time::Duration;

use crate::fixture::{default_org, digest, is_blocked, lines, new_org, together};
use crate::projections::{assert_examples, text};
use crate::support::{
    APP, Db, Install, SERVICE, STRANGER, Session, full, on_each_install, on_each_route,
    own_cluster, quote, wait_until,
};

/// What the subject's events hold, with everything that is escaped somewhere.
const PIECES: [&str; 7] = [
    r#"secret-key "quoted""#,
    r#"Ann "the\owl" O'Neil"#,
    "Zoë 🦉 Ünïcode",
    "line\nbreak\ttab",
    "inner/slash",
    "ann@example.org",
    "very_private_type",
];

/// An event of the subject, as a call of append_events for versions that `count` makes.
fn append_subject(s: &mut Session, aggregate: &str, count: u32, org: &str) {
    let source = text(
        s,
        &format!(
            "select {} || count(*) from nightowls.events",
            quote(aggregate)
        ),
    );
    let source = source.as_str();
    let [key, name, unicode, lines, slash, mail, kind] = PIECES;
    s.exec(&format!(
        "select count(*) from nightowls.append_events({}, 'subject', (
           select jsonb_agg(jsonb_build_object(
                    'event_type', case when i % 2 = 0 then {} else 'changed' end,
                    'payload', jsonb_build_object({}, {}, 'list', jsonb_build_array({}, jsonb_build_object('n', i)),
                                                  'raw', jsonb_build_object({}, {})::text, 'text', {}),
                    'metadata', jsonb_build_object('actor_id', {}),
                    'event_id', case when i <= 3 then nightowls.event_id_for({}, i::text) end) order by i)
             from generate_series(1, {count}) i), org => '{org}')",
        quote(aggregate),
        quote(kind),
        quote(key),
        quote(name),
        quote(unicode),
        quote(slash),
        quote(name),
        quote(lines),
        quote(mail),
        quote(source),
    ));
}

/// Where a piece of the subject still is, in this org or where no org is named.
#[track_caller]
fn traces(db: &Db, org: &str) -> Vec<String> {
    let mut service = db.service();
    PIECES
        .iter()
        .flat_map(|piece| {
            lines(
                &mut service,
                &format!(
                    "select {}, table_name, column_name, qty from nightowls.scan_for({}) where org_id = '{org}' or org_id is null",
                    quote(piece),
                    quote(piece)
                ),
            )
        })
        .collect()
}

/// Every row of an org in every table of ours, as text.
#[track_caller]
fn rows_of(db: &Db, org: &str) -> Vec<String> {
    let mut s = db.superuser();
    let tables = lines(
        &mut s,
        "select c.oid::regclass from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attname = 'org_id'
          where c.relnamespace = 'nightowls'::regnamespace and c.relkind in ('r', 'm') order by c.relname",
    );
    let mut rows = Vec::new();
    for table in tables {
        rows.extend(lines(
            &mut s,
            &format!(
                "select '{table}', count(*), md5(string_agg(r::text, E'\\n' order by r::text collate \"C\")) from {table} r where r.org_id = '{org}'"
            ),
        ));
    }
    rows
}

/// A state that does not grow with the history.
const PUT: &str = r#"{"otherwise": [{"op": "merge", "value": "$"}, {"op": "put", "path": "types", "key": "@.event_type", "value": "@.metadata.actor_id"}]}"#;

const MERGE: &str = r#"{"initial": {"from": "initial"}, "otherwise": [{"op": "merge", "value": "$"}, {"op": "add", "path": "count"},
    {"op": "push", "path": "types", "value": "@.event_type"}, {"op": "set", "path": "by", "value": "@.metadata.actor_id"}]}"#;

#[test]
fn ten_thousand_events_leave_no_trace_and_the_same_id_elsewhere_stays_as_it_was() {
    on_each_install(|db| {
        let org = default_org(db);
        let other = new_org(db, "other");
        let (mut owner, mut service) = (db.owner(), db.service());
        for org in [&org, &other] {
            owner.exec(&format!(
                "select nightowls.create_projection('person', 'person', {0}, org => '{org}');
                 select nightowls.create_projection('dropped', 'person', {0}, org => '{org}');
                 select nightowls.create_projection('company', 'company', {0}, org => '{org}')",
                quote(PUT)
            ));
            append_subject(&mut service, "person", 10_000, org);
            append_subject(&mut service, "company", 5, org);
            service.exec(&format!(
                "select nightowls.create_snapshot('person', 'subject', org => '{org}')"
            ));
            owner.exec(&format!(
                "select nightowls.drop_projection('dropped', org => '{org}')"
            ));
            while text(
                &mut service,
                &format!(
                    "select more from nightowls.compact_aggregate('person', 'subject', keep => 4000, org => '{org}')"
                ),
            ) == "t"
            {}
            service.exec(&format!(
                "select nightowls.append_event('person', 'subject 2', 'kept', '{{\"name\": \"Bob\"}}', org => '{org}')"
            ));
        }
        owner.exec(
            "select nightowls.create_view_projection('people', $$select org_id, aggregate_id, state from nightowls.projection_states
               where projection = 'person'$$, key_columns => '{org_id,aggregate_id}')",
        );
        // Generations that nobody reads any more, and states of a projection that is gone: as appends leave them that were open then.
        db.superuser().exec(&format!(
            "begin;
             select set_config('nightowls.door', pg_current_xact_id() || '|project', true);
             insert into nightowls._projection_states (org_id, projection, generation, aggregate_id, version, position, state)
             select s.org_id, x.projection, x.generation, s.aggregate_id, s.version, s.position, s.state
               from nightowls._projection_states s
              cross join (values ('person', -1), ('gone', 1), ('company', -1)) as x (projection, generation)
              where s.org_id = '{org}' and s.projection = 'person' and s.aggregate_id = 'subject';
             commit;"
        ));
        let mut company = lines(
            &mut service,
            &format!(
                "select state from nightowls.projection_states where projection = 'company' and org_id = '{org}'"
            ),
        );
        company.extend(lines(&mut service, &format!("select e from nightowls.events e where aggregate_type = 'company' and org_id = '{org}'")));
        let before = rows_of(db, &other);
        let kept = lines(
            &mut service,
            &format!(
                "select position, version, event_id, created_at from nightowls.all_events where org_id = '{org}' and aggregate_type = 'person' order by position"
            ),
        );
        assert_eq!(
            lines(
                &mut service,
                &format!(
                    "select table_name, column_name from nightowls.scan_for('ann@') where org_id = '{org}' order by 1, 2"
                )
            ),
            [
                "_projection_states state",
                "_view_people state",
                "events metadata",
                "events_archive metadata",
                "snapshots state"
            ]
        );

        assert_eq!(
            text(
                &mut service,
                "select nightowls.erase('person', 'subject', 'asked on 3 May')"
            ),
            "10000"
        );
        // The same id of another type is another aggregate; what is said of it is the same.
        let mut company_now = lines(
            &mut service,
            &format!(
                "select state from nightowls.projection_states where projection = 'company' and org_id = '{org}'"
            ),
        );
        company_now.extend(lines(&mut service, &format!("select e from nightowls.events e where aggregate_type = 'company' and org_id = '{org}'")));
        assert_eq!(company_now, company);
        assert_eq!(
            text(
                &mut service,
                "select nightowls.erase('company', 'subject', 'asked on 3 May')"
            ),
            "5"
        );

        assert_eq!(traces(db, &org), Vec::<String>::new());
        assert_eq!(rows_of(db, &other), before);
        assert_eq!(
            lines(
                &mut service,
                "select count(*), count(distinct version), max(version), bool_and(event_type = 'nightowls.erased'),
                        count(*) filter (where payload <> '{}' or metadata <> '{}')
                   from nightowls.all_events where org_id = nightowls.current_org() and aggregate_type = 'person' and aggregate_id = 'subject'"
            ),
            ["10001 10001 10001 t 1"]
        );
        assert_eq!(
            lines(
                &mut service,
                "select version, payload, metadata from nightowls.last_event('person', 'subject', 'nightowls.erased')"
            ),
            [format!(
                r#"10001 {{"events": 10000, "reason": "asked on 3 May"}} {{"actor_id": "{SERVICE}"}}"#
            )]
        );
        let places = lines(
            &mut service,
            &format!(
                "select position, version, event_id, created_at from nightowls.all_events where org_id = '{org}' and aggregate_type = 'person' order by position"
            ),
        );
        assert_eq!(places[..10_001], kept[..]);
        assert_eq!(
            text(
                &mut service,
                "select nightowls.state('person', 'subject 2') ->> 'name'"
            ),
            "Bob"
        );
        assert_eq!(
            lines(
                &mut owner,
                &format!(
                    "select aggregate_id, state ->> 'name' from nightowls._view_people where org_id = '{org}' order by 1"
                )
            ),
            ["subject null", "subject 2 Bob"]
        );
    });
}

#[test]
fn states_end_with_an_erasure_and_begin_anew_after_it() {
    on_each_route(|db| {
        let org = default_org(db);
        let (mut owner, mut s) = (db.owner(), db.service());
        owner.exec(&format!(
            "create function public.told(state jsonb, event nightowls.events) returns jsonb language sql
             begin atomic
               select jsonb_build_object('heard', coalesce(state -> 'heard', '[]') || to_jsonb((event).event_type));
             end;
             grant execute on function public.told to {SERVICE};
             select nightowls.create_projection('folded', 'person', {});
             select nightowls.create_projection('told', 'person', handler => 'public.told')",
            quote(MERGE)
        ));
        append_subject(&mut s, "person", 3, &org);
        s.exec("select pg_sleep(0.002)");
        let then = text(&mut s, "select clock_timestamp()");
        assert_eq!(
            text(
                &mut s,
                "select nightowls.erase('person', 'subject', 'asked')"
            ),
            "3"
        );

        let states = |s: &mut Session| {
            lines(
                s,
                &format!(
                    "select p, nightowls.state(p, 'subject'), nightowls.state_at(p, 'subject', 2), nightowls.state_at(p, 'subject', 4),
                            nightowls.state_at_time(p, 'subject', '{then}'), (select count(*) from nightowls.verify_projection(p))
                       from unnest(array['folded', 'told']) p"
                ),
            )
        };
        let gone = ["folded null null null null 0", "told null null null null 0"];
        assert_eq!(states(&mut s), gone);
        owner.exec("select nightowls.rebuild_projection('folded'); select nightowls.rebuild_projection('told')");
        assert_eq!(states(&mut s), gone);
        owner.exec("select nightowls.refresh_projection('folded'); select nightowls.refresh_projection('told')");
        assert_eq!(states(&mut s), gone);

        s.exec("select nightowls.append_event('person', 'subject', 'born', '{\"name\": \"Eve\"}', expected_version => 4)");
        let again = [
            r#"folded {"from": "initial", "name": "Eve", "count": 1, "types": ["born"]} null null null 0"#,
            r#"told {"heard": ["born"]} null null null 0"#,
        ];
        assert_eq!(states(&mut s), again);
        let stored = lines(
            &mut s,
            "select projection, version, state from nightowls.projection_states order by 1",
        );
        assert_eq!(
            stored,
            [
                r#"folded 5 {"from": "initial", "name": "Eve", "count": 1, "types": ["born"]}"#,
                r#"told 5 {"heard": ["born"]}"#
            ]
        );
        owner.exec("select nightowls.rebuild_projection('folded'); select nightowls.rebuild_projection('told')");
        assert_eq!(states(&mut s), again);

        // Once more: only what came since is erased, the first record stays.
        assert_eq!(
            text(
                &mut s,
                "select nightowls.erase('person', 'subject', 'again')"
            ),
            "1"
        );
        assert_eq!(
            lines(
                &mut s,
                "select version, payload from nightowls.read_aggregate('person', 'subject', 4)"
            ),
            [
                r#"4 {"events": 3, "reason": "asked"}"#,
                "5 {}",
                r#"6 {"events": 1, "reason": "again"}"#
            ]
        );
        assert_eq!(states(&mut s), gone);
    });
}

#[test]
fn a_compacted_history_is_erased_wherever_it_is() {
    on_each_install(|db| {
        let org = default_org(db);
        let (mut owner, mut s) = (db.owner(), db.service());
        owner.exec(&format!(
            "select nightowls.create_projection('person', 'person', {})",
            quote(PUT)
        ));
        let compact = |s: &mut Session, mode: &str| {
            while text(
                s,
                &format!(
                    "select more from nightowls.compact_aggregate('person', 'subject', keep => 2, mode => '{mode}')"
                ),
            ) == "t"
            {}
        };
        let gone = |db: &Db, s: &mut Session, at: &str| {
            assert_eq!(traces(db, &org), Vec::<String>::new());
            assert_eq!(
                lines(
                    s,
                    &format!(
                        "select nightowls.state('person', 'subject'), nightowls.state_at('person', 'subject', {at}),
                                (select count(*) from nightowls.verify_projection('person')), (select count(state) from nightowls._projection_states)"
                    )
                ),
                ["null null 0 0"],
                "at {at}"
            );
        };
        let rebuild = |owner: &mut Session| {
            owner.exec("select nightowls.rebuild_projection('person')");
        };

        append_subject(&mut s, "person", 10, &org);
        s.exec("select nightowls.create_snapshot('person', 'subject')");
        compact(&mut s, "archive");
        assert_eq!(
            text(
                &mut s,
                "select nightowls.erase('person', 'subject', 'asked')"
            ),
            "10"
        );
        gone(db, &mut s, "5");
        rebuild(&mut owner);
        gone(db, &mut s, "5");
        s.exec("select * from nightowls.restore_aggregate('person', 'subject')");
        gone(db, &mut s, "5");
        rebuild(&mut owner);
        gone(db, &mut s, "5");

        // It goes on, is compacted again, and again forgotten; what was deleted leaves nothing to fold from but records.
        for (mode, erased) in [("archive", "10"), ("delete", "2")] {
            append_subject(&mut s, "person", 10, &org);
            s.exec("select nightowls.create_snapshot('person', 'subject')");
            compact(&mut s, mode);
            assert_eq!(
                text(
                    &mut s,
                    "select nightowls.erase('person', 'subject', 'asked')"
                ),
                erased,
                "{mode}"
            );
            let head = text(&mut s, "select max(version) from nightowls.events");
            gone(db, &mut s, &head);
            s.exec(
                "select nightowls.append_event('person', 'subject', 'born', '{\"name\": \"Eve\"}')",
            );
            for _ in 0..2 {
                assert_eq!(
                    text(
                        &mut s,
                        "select nightowls.state('person', 'subject') ->> 'name'"
                    ),
                    "Eve",
                    "{mode}"
                );
                rebuild(&mut owner);
            }
            assert_eq!(
                text(
                    &mut s,
                    "select count(*) from nightowls.verify_projection('person')"
                ),
                "0"
            );
            s.exec("select nightowls.erase('person', 'subject', 'asked')");
            gone(db, &mut s, "(select max(version) from nightowls.events)");
        }
    });
}

#[test]
fn erasing_twice_changes_nothing() {
    on_each_install(|db| {
        let org = default_org(db);
        let mut s = db.service();
        db.owner().exec(&format!(
            "select nightowls.create_projection('person', 'person', {})",
            quote(MERGE)
        ));
        append_subject(&mut s, "person", 5, &org);
        assert_eq!(
            text(
                &mut s,
                "select nightowls.erase('person', 'subject', 'asked')"
            ),
            "5"
        );
        let before = rows_of(db, &org);
        assert_eq!(
            text(
                &mut s,
                "select nightowls.erase('person', 'subject', 'asked')"
            ),
            "0"
        );
        assert_eq!(
            text(
                &mut s,
                "select nightowls.erase('person', 'nobody', 'asked')"
            ),
            "0"
        );
        assert_eq!(rows_of(db, &org), before);
    });
}

#[test]
fn readers_and_read_models_learn_of_an_erasure() {
    on_each_install(|db| {
        let org = default_org(db);
        let (mut owner, mut s) = (db.owner(), db.service());
        owner.exec(&format!(
            "create table public.people (org_id uuid, id text, version bigint, name text);
             grant select, insert, delete on public.people to {SERVICE};
             create function public.keep(event nightowls.events) returns void language plpgsql as $$
             begin
               if (event).event_type = 'nightowls.erased' then
                 delete from public.people p where p.org_id = (event).org_id and p.id = (event).aggregate_id;
               else
                 insert into public.people values ((event).org_id, (event).aggregate_id, (event).version, (event).payload ->> 'text');
               end if;
             end $$;
             select nightowls.create_table_projection('people', 'person', target => 'public.people', handler => 'public.keep')"
        ));
        append_subject(&mut s, "person", 3, &org);
        let last = text(&mut s, "select max(position) from nightowls.events");
        assert_eq!(text(&mut s, "select count(*) from public.people"), "3");
        s.exec("select nightowls.erase('person', 'subject', 'asked')");
        assert_eq!(text(&mut s, "select count(*) from public.people"), "0");
        owner.exec("select nightowls.rebuild_projection('people')");
        assert_eq!(text(&mut s, "select count(*) from public.people"), "0");

        // Who has read everything gets the record, who has not gets what is left.
        assert_eq!(
            lines(
                &mut s,
                &format!(
                    "select version, event_type, payload -> 'events' from nightowls.read_events({last})"
                )
            ),
            ["4 nightowls.erased 3"]
        );
        assert_eq!(
            lines(
                &mut s,
                "select version, event_type, payload -> 'events' from nightowls.read_events()"
            ),
            [
                "1 nightowls.erased null",
                "2 nightowls.erased null",
                "3 nightowls.erased null",
                "4 nightowls.erased 3"
            ]
        );
    });
}

#[test]
fn consumers_get_the_record_and_keep_no_errors() {
    on_each_install(|db| {
        let org = default_org(db);
        let mut s = db.service();
        s.exec(
            r#"select nightowls.create_consumer('behind', filter => '{"event_types": ["changed"]}');
               select nightowls.create_consumer('done'); select nightowls.create_consumer('failing', max_attempts => 2)"#,
        );
        append_subject(&mut s, "person", 4, &org);
        s.exec("begin; select nightowls.commit_offset('done', (select max(position) from nightowls.events), f.fence) from nightowls.fetch_events('done') f limit 1; commit");
        let fence = text(
            &mut s,
            "select max(fence) from nightowls.fetch_events('failing')",
        );
        let positions = lines(&mut s, "select position from nightowls.events order by 1");
        let park = |s: &mut Session, position: &str| {
            s.exec(&format!(
                "select nightowls.park_event('failing', {position}, 'cannot handle Zoë 🦉 Ünïcode', {fence})"
            ));
        };
        park(&mut s, &positions[0]);
        s.exec("select nightowls.erase('person', 'subject', 'asked')");
        // A worker that had fetched the event before tells of it only now.
        park(&mut s, &positions[1]);
        assert_eq!(traces(db, &org), Vec::<String>::new());
        assert_eq!(
            lines(
                &mut s,
                "select position, error from nightowls.parked_events order by 1"
            ),
            [
                format!("{} null", positions[0]),
                format!("{} null", positions[1])
            ]
        );

        let fetched = |s: &mut Session, consumer: &str| {
            lines(
                s,
                &format!(
                    "select version, event_type, payload ? 'reason' from nightowls.fetch_events('{consumer}') order by 1"
                ),
            )
        };
        assert_eq!(fetched(&mut s, "done"), ["5 nightowls.erased t"]);
        assert_eq!(
            fetched(&mut s, "behind"),
            [
                "1 nightowls.erased f",
                "2 nightowls.erased f",
                "3 nightowls.erased f",
                "4 nightowls.erased f",
                "5 nightowls.erased t"
            ]
        );
    });
}

#[test]
fn an_append_that_was_open_is_erased_too() {
    on_each_install(|db| {
        let org = default_org(db);
        let mut s = db.service();
        db.owner().exec(&format!(
            "select nightowls.create_projection('person', 'person', {})",
            quote(MERGE)
        ));
        append_subject(&mut s, "person", 3, &org);
        for (round, (end, count)) in [("commit", "2"), ("rollback", "1")].into_iter().enumerate() {
            s.exec("select nightowls.append_event('person', 'subject', 'seen')");
            let mut open = db.service();
            open.exec("begin");
            open.exec(&format!(
                "select nightowls.append_event('person', 'subject', 'changed', {})",
                quote(r#"{"name": "ann@example.org"}"#)
            ));
            let (mut eraser, mut watcher) = (db.service(), db.superuser());
            let pid = eraser.pid();
            thread::scope(|scope| {
                let erased = scope.spawn(move || {
                    text(
                        &mut eraser,
                        "select nightowls.erase('person', 'subject', 'asked')",
                    )
                });
                wait_until("the erasure waits", Duration::from_secs(20), || {
                    is_blocked(&mut watcher, pid)
                });
                open.exec(end);
                let expected = if round == 0 { "5" } else { count };
                assert_eq!(erased.join().expect("it ends"), expected);
            });
            assert_eq!(traces(db, &org), Vec::<String>::new());
            assert_eq!(
                text(
                    &mut s,
                    "select count(*) = max(version) and bool_and(event_type = 'nightowls.erased') from nightowls.events"
                ),
                "t"
            );
        }
    });
}

#[test]
fn appends_beside_erasures_keep_versions_whole_and_lose_nothing() {
    on_each_install(|db| {
        default_org(db);
        db.owner().exec(&format!(
            "select nightowls.create_projection('person', 'person', {})",
            quote(MERGE)
        ));
        together(
            5,
            |_| db.service(),
            |number, mut s| {
                for i in 0..60 {
                    match number {
                        0 => s.exec("select nightowls.erase('person', 'subject', 'asked')"),
                        1 => s.exec(&format!(
                            "select nightowls.append_events('person', 'subject', '[{{\"event_type\": \"a\", \"payload\": {{\"k\": {i}}}}},
                                                                                  {{\"event_type\": \"b\"}}]')"
                        )),
                        // A plain insert's turn is its own: it may meet 23505 beside a function's append, and is tried again.
                        2 => {
                            while let Err(refusal) = s.try_exec(
                                "insert into nightowls.events (aggregate_type, aggregate_id, event_type) values ('person', 'subject', 'c')",
                            ) {
                                assert!(["23505", "22023"].contains(&refusal.code.as_str()), "{refusal}");
                            }
                        }
                        _ => s.exec("select nightowls.append_event('person', 'subject', 'd', '{\"name\": \"x\"}')"),
                    }
                }
            },
        );
        let mut s = db.service();
        assert_eq!(
            lines(
                &mut s,
                "with e as (select * from nightowls.events where aggregate_id = 'subject'),
                      r as (select version, (payload ->> 'events')::int as n from e where payload ? 'events')
                 select count(*) = max(version), min(version), count(*) - (select count(*) from r),
                        -- Each record counts what lies between it and the one before.
                        (select bool_and(n = version - before - 1) from (select *, lag(version, 1, 0) over (order by version) as before from r) x),
                        count(*) filter (where version < (select max(version) from r) and event_type <> 'nightowls.erased'),
                        count(*) filter (where version > (select max(version) from r) and event_type = 'nightowls.erased')
                   from e"
            ),
            ["t 1 300 t 0 0"]
        );
        assert_eq!(
            lines(
                &mut s,
                "select * from nightowls.verify_projection('person')"
            ),
            Vec::<String>::new()
        );
        s.exec("select nightowls.erase('person', 'subject', 'at last')");
        assert_eq!(
            lines(
                &mut s,
                "select count(*), count(state) from nightowls._projection_states"
            ),
            ["1 0"]
        );
    });
}

#[test]
fn a_build_or_refresh_that_was_open_brings_nothing_back() {
    on_each_install(|db| {
        let org = default_org(db);
        let mut s = db.service();
        db.owner().exec(&format!(
            "select nightowls.create_projection('person', 'person', {});
             select nightowls.create_view_projection('people', 'select org_id, position, payload, metadata, event_type from nightowls.events',
                                                     key_columns => '{{org_id,position}}')",
            quote(MERGE)
        ));
        for call in [
            "select nightowls.rebuild_projection('person')",
            "select nightowls.refresh_projection('person')",
            "select nightowls.refresh_projection('people')",
            &format!(
                "select nightowls.create_projection('more', 'person', {})",
                quote(MERGE)
            ),
        ] {
            // One after the other, both ways round.
            for first in ["the build", "the erasure"] {
                db.owner()
                    .exec("select nightowls.rebuild_projection('person')"); // So that there may be something to refresh.
                append_subject(&mut s, "person", 3, &org);
                let (mut builder, mut eraser, mut watcher) =
                    (db.owner(), db.service(), db.superuser());
                let erase = "select nightowls.erase('person', 'subject', 'asked')";
                builder.exec("begin");
                eraser.exec("begin");
                let call = call.replace("'more'", &quote(first));
                let (one, other, then) = if first == "the build" {
                    (&mut builder, &mut eraser, erase)
                } else {
                    (&mut eraser, &mut builder, call.as_str())
                };
                one.exec(if first == "the build" { &call } else { erase });
                let pid = other.pid();
                thread::scope(|scope| {
                    let waiting = scope.spawn(move || {
                        other.exec(then);
                        other.exec("commit");
                    });
                    wait_until(&format!("{then} waits"), Duration::from_secs(20), || {
                        is_blocked(&mut watcher, pid)
                    });
                    one.exec("commit");
                    waiting.join().expect("it ends");
                });
                assert_eq!(
                    traces(db, &org),
                    Vec::<String>::new(),
                    "{call}, {first} first"
                );
            }
        }
    });
}

#[test]
fn an_erased_event_is_not_appended_again() {
    on_each_install(|db| {
        let org = default_org(db);
        let mut s = db.service();
        append_subject(&mut s, "person", 3, &org);
        let id = "nightowls.event_id_for('person0', '2')";
        let event = |id: &str| format!("jsonb_build_object('event_type', 'a', 'event_id', {id})");
        // In the log, then in the archive.
        for archived in [false, true] {
            if archived {
                assert_eq!(
                    text(
                        &mut s,
                        "select compacted_to from nightowls.compact_aggregate('person', 'subject')"
                    ),
                    "3"
                );
            }
            s.exec("select nightowls.erase('person', 'subject', 'asked')");
            let before = rows_of(db, &org);
            for (code, call) in [
            ("NW009", format!("select nightowls.append_event('person', 'subject', 'changed', event_id => {id})")),
            ("NW009", format!("select nightowls.append_event('person', 'other', 'changed', event_id => {id}, expected_version => 7)")),
            ("NW009", format!("select nightowls.append_events('person', 'subject', jsonb_build_array({}))", event(id))),
            (
                "NW009",
                format!("select nightowls.append_events('person', 'other', jsonb_build_array({}, {}))", event("gen_random_uuid()"), event(id)),
            ),
            (
                "NW009",
                format!(
                    "select nightowls.append_many(jsonb_build_array(
                       jsonb_build_object('aggregate_type', 'x', 'aggregate_id', 'y', 'events', jsonb_build_array({})),
                       jsonb_build_object('aggregate_type', 'x', 'aggregate_id', 'z', 'events', jsonb_build_array({}))))",
                    event("gen_random_uuid()"),
                    event(id)
                ),
            ),
            (
                "23505",
                format!("insert into nightowls.events (aggregate_type, aggregate_id, event_type, event_id) values ('a', 'b', 'c', {id})"),
            ),
        ] {
            assert_eq!(s.refused(&call).code, code, "{call}");
        }
            assert_eq!(rows_of(db, &org), before);
        }
    });
}

#[test]
fn nobody_appends_what_looks_erased() {
    on_each_install(|db| {
        default_org(db);
        for mut s in [db.service(), db.owner()] {
            for kind in ["nightowls.erased", "nightowls."] {
                for call in [
                    format!("select nightowls.append_event('a', 'b', '{kind}')"),
                    format!(
                        "select nightowls.append_event('a', 'b', '{kind}', jsonb_build_object('n', repeat('long', 1000)))"
                    ),
                    format!(
                        "select nightowls.append_events('a', 'b', '[{{\"event_type\": \"x\"}}, {{\"event_type\": \"{kind}\"}}]')"
                    ),
                    format!(
                        "select nightowls.append_many('[{{\"aggregate_type\": \"a\", \"aggregate_id\": \"b\", \"events\": [{{\"event_type\": \"{kind}\"}}]}}]')"
                    ),
                    format!(
                        "insert into nightowls.events (aggregate_type, aggregate_id, event_type) values ('a', 'b', 'x'), ('a', 'b', '{kind}')"
                    ),
                    format!(
                        "insert into nightowls.events (aggregate_type, aggregate_id, version, event_type) values ('a', 'new', 1, '{kind}')"
                    ),
                ] {
                    let refused = s.refused(&call);
                    assert_eq!(
                        (refused.code.as_str(), refused.message.as_str()),
                        (
                            "22023",
                            "event types that begin with nightowls. are nightowls' own"
                        ),
                        "{call}"
                    );
                }
            }
            s.exec("select nightowls.append_event('a', 'b', 'nightowls')");
        }
    });
}

#[test]
fn only_a_service_erases_and_only_in_the_org_it_names() {
    on_each_install(|db| {
        let org = default_org(db);
        let other = new_org(db, "other");
        let mut s = db.service();
        for org in [&org, &other] {
            append_subject(&mut s, "person", 3, org);
        }
        // A member who was even given the function.
        db.owner().exec(&format!(
            "insert into nightowls.org_members (org_id, user_id, role) values ('{org}', 'ann', 'owner');
             grant usage on schema nightowls to {APP}, {STRANGER};
             grant execute on function nightowls.erase(text, text, text, uuid), nightowls.current_org(uuid), nightowls._is_service(),
               nightowls._is_member(uuid), nightowls._resolve_org() to {APP}"
        ));
        let before = (rows_of(db, &org), rows_of(db, &other));
        for role in [APP, STRANGER] {
            let mut who = db.session(role);
            for claims in ["", r#"{"sub": "ann"}"#] {
                who.exec(&format!(
                    "begin; set local request.jwt.claims to {}",
                    quote(claims)
                ));
                assert_eq!(
                    who.refused("select nightowls.erase('person', 'subject', 'asked')")
                        .code,
                    "42501",
                    "{role} {claims}"
                );
                who.exec("rollback");
                assert_eq!(
                    who.refused("select nightowls.scan_for('ann')").code,
                    "42501"
                );
                assert_eq!(
                    who.refused(&format!(
                        "select nightowls._erase_log('{org}', 'person', 'subject')"
                    ))
                    .code,
                    "42501"
                );
            }
        }
        assert_eq!((rows_of(db, &org), rows_of(db, &other)), before);

        s.exec(&format!(
            "begin; select set_config('nightowls.org_id', '{other}', true); select nightowls.erase('person', 'subject', 'asked'); commit"
        ));
        assert_eq!(rows_of(db, &org), before.0);
        assert_eq!(traces(db, &other), Vec::<String>::new());

        s.exec(
            r#"begin; set local request.jwt.claims to '{"sub": "officer 7"}'; select nightowls.erase('person', 'subject', 'asked'); commit"#,
        );
        assert_eq!(
            text(
                &mut s,
                "select metadata from nightowls.last_event('person', 'subject')"
            ),
            r#"{"actor_id": "officer 7"}"#
        );
    });
}

#[test]
fn the_door_is_shut_behind_an_erasure() {
    on_each_install(|db| {
        let org = default_org(db);
        let (mut owner, mut s) = (db.owner(), db.service());
        owner.exec(&format!(
            "create function public.fail(event nightowls.events) returns void language plpgsql as $$
             begin
               if (event).event_type = 'nightowls.erased' then
                 -- In the middle of it the log is as closed as ever.
                 begin
                   update nightowls.events set payload = '{{}}';
                   raise exception 'open';
                 exception when sqlstate 'NW008' or insufficient_privilege then
                   null;
                 end;
                 raise exception 'no' using errcode = 'XY001';
               end if;
             end $$;
             create table public.none (org_id uuid);
             grant execute on function public.fail to {SERVICE};
             select nightowls.create_table_projection('none', 'person', target => 'public.none', handler => 'public.fail')"
        ));
        append_subject(&mut s, "person", 3, &org);
        let before = digest(db);
        assert_eq!(
            s.refused("select nightowls.erase('person', 'subject', 'asked')")
                .code,
            "XY001"
        );
        assert_eq!(
            owner
                .refused("begin; do $$ begin perform nightowls.erase('person', 'subject', 'asked'); exception when others then null; end $$;
                          update nightowls.events set payload = '{}'")
                .code,
            "NW008"
        );
        owner.exec("rollback");
        assert_eq!(digest(db), before);

        owner.exec("select nightowls.drop_projection('none')");
        assert_eq!(
            owner
                .refused("begin; select nightowls.erase('person', 'subject', 'asked'); update nightowls.events set payload = '{}'")
                .code,
            "NW008"
        );
        owner.exec("rollback");
        s.exec("begin; select nightowls.erase('person', 'subject', 'asked')");
        assert_eq!(
            s.refused("update nightowls.events set payload = '{}'").code,
            "42501"
        );
        s.exec("rollback");
        assert_eq!(digest(db), before);
    });
}

#[test]
fn a_bad_call_is_refused() {
    on_each_install(|db| {
        default_org(db);
        let mut s = db.service();
        let long = "x".repeat(1025);
        for (code, call) in [
            ("22004", "select nightowls.erase(null, 'a', 'b')".to_owned()),
            ("22004", "select nightowls.erase('a', null, 'b')".to_owned()),
            ("22004", "select nightowls.erase('a', 'b', null)".to_owned()),
            ("22023", "select nightowls.erase('', 'b', 'c')".to_owned()),
            ("22023", "select nightowls.erase('a', '', 'c')".to_owned()),
            ("22023", "select nightowls.erase('a', 'b', '')".to_owned()),
            (
                "22023",
                "select nightowls.erase('a', 'b', 'c', gen_random_uuid())".to_owned(),
            ),
            (
                "54000",
                format!("select nightowls.erase('{long}', 'b', 'c')"),
            ),
            (
                "54000",
                format!("select nightowls.erase('a', '{long}', 'c')"),
            ),
            (
                "54000",
                format!("select nightowls.erase('a', 'b', '{long}')"),
            ),
            (
                "25001",
                "begin isolation level repeatable read; select nightowls.erase('a', 'b', 'c')"
                    .to_owned(),
            ),
            (
                "25001",
                "begin isolation level serializable; select nightowls.erase('a', 'b', 'c')"
                    .to_owned(),
            ),
            ("22004", "select nightowls.scan_for(null)".to_owned()),
            ("22023", "select nightowls.scan_for('')".to_owned()),
        ] {
            assert_eq!(s.refused(&call).code, code, "{call}");
            s.exec("rollback");
        }
    });
}

#[test]
fn a_scan_finds_what_is_there_in_whatever_form() {
    on_each_install(|db| {
        let org = default_org(db);
        let mut owner = db.owner();
        owner.exec(
            "create type nightowls.zz_pair as (one text, two jsonb);
             create table nightowls.zz (org_id uuid, \"odd column\" text, body jsonb, doc json, raw bytea, raws bytea[], list text[],
                                        bodies jsonb[], pair nightowls.zz_pair, place text, org int, number numeric)",
        );
        let mut s = db.service();
        for (column, value, content) in [
            ("\"odd column\"", r#"'a "b" \c'"#, r#""b" \c"#),
            ("\"odd column\"", r#"'select ''O''''Neil'''"#, "O'Neil"),
            ("body", r#"'{"a \"b\" \\c": 1}'"#, r#""b" \c"#),
            ("body", r#"'{"a": [["x\ny"]]}'"#, "x\ny"),
            ("body", r#"'["Zo\u00eb \ud83e\udd89"]'"#, "Zoë 🦉"),
            (
                "body",
                r#"'{"raw": "{\"name\": \"Zo\\u00EB \\uD83E\\uDD89 \\\"q\\\"\"}"}'"#,
                r#"Zoë 🦉 "q""#,
            ),
            (
                "body",
                r#"to_jsonb(to_jsonb('{"a": "b\\"}'::text)::text)"#,
                r#"{"a": "b\\"}"#,
            ),
            ("doc", r#"'{"a": "Zo\u00EB \/ \"x\""}'"#, r#"Zoë / "x""#),
            ("raw", r#"convert_to('..Zoë "x"..', 'UTF8')"#, r#"Zoë "x""#),
            ("raw", r#"convert_to('{"a": "\"x\""}', 'UTF8')"#, r#""x""#),
            (
                "raws",
                r#"array[null, 'a', convert_to('Zoë', 'UTF8')]"#,
                "Zoë",
            ),
            ("list", r#"array['a, "b" {\c}']"#, r#""b" {\c}"#),
            ("bodies", r#"array['{"a": "\"b\""}'::jsonb]"#, r#""b""#),
            (
                "pair",
                r#"row('it "is"', '{"k": "\\"}')::nightowls.zz_pair"#,
                r#""is""#,
            ),
            (
                "pair",
                r#"row('x', '{"k": "\\back"}')::nightowls.zz_pair"#,
                r"\back",
            ),
            ("number", "123.450", "23.45"),
        ] {
            owner.exec(&format!("truncate nightowls.zz; insert into nightowls.zz (org_id, {column}) values ('{org}', {value})"));
            let name = column.trim_matches('"');
            assert_eq!(
                lines(
                    &mut s,
                    &format!(
                        "select column_name, org_id, qty, places from nightowls.scan_for({}) where table_name = 'zz'",
                        quote(content)
                    )
                ),
                [format!("{name} {org} 1 {{\"(0,1)\"}}")],
                "{column} {value}"
            );
        }
        // To the letter, and only what is there.
        owner.exec("truncate nightowls.zz; insert into nightowls.zz (body, list) values ('{\"a\": \"Ann%_\"}', '{x,y}')");
        for content in ["ann%_", "Ann%x", "A_n", "x\",\"z", "Annn"] {
            assert_eq!(
                lines(
                    &mut s,
                    &format!("select * from nightowls.scan_for('{content}')")
                ),
                Vec::<String>::new(),
                "{content}"
            );
        }
        assert_eq!(
            lines(
                &mut s,
                "select table_name, column_name, org_id from nightowls.scan_for('Ann%_')"
            ),
            ["zz body null"]
        );
    });
}

#[test]
fn a_server_killed_in_the_middle_of_an_erasure_has_erased_everything_or_nothing() {
    // Of ten appends of so many.
    let each = if full() { 500 } else { 150 };
    own_cluster(|cluster| {
        for install in Install::ALL {
            let db = cluster.database(install);
            let org = default_org(&db);
            let mut owner = db.owner();
            owner.exec(&format!(
                "select nightowls.create_projection('person', 'person', {});
                 select nightowls.create_consumer('mail')",
                quote(PUT)
            ));
            let mut service = db.service();
            for _ in 0..10 {
                append_subject(&mut service, "person", each, &org);
            }
            service.exec("select nightowls.create_snapshot('person', 'subject')");
            owner.exec("select nightowls.seek_time('mail', 'infinity')");
            service.exec(&format!(
                "select nightowls.compact_aggregate('person', 'subject', keep => {}, max_ms => 600000)",
                5 * each
            ));
            let before = rows_of(&db, &org);
            assert!(
                before
                    .iter()
                    .any(|row| row.contains(&format!("events_archive {}", 5 * each)))
            );

            // Done and not committed.
            service.exec("begin; select nightowls.erase('person', 'subject', 'asked')");
            cluster.kill9_postmaster_and_restart();
            assert_eq!(rows_of(&db, &org), before, "{install}: not committed");

            // In the middle, each time after it has written more, until it is faster than the blow.
            let mut blows = 0;
            for written in (0..).map(|step| 50_000 * (4_u64.pow(step) - 1)) {
                let mut dying = db.service();
                let pid = dying.pid();
                let mut watcher = db.superuser();
                let start = text(&mut watcher, "select pg_current_wal_insert_lsn()");
                let done = thread::scope(|scope| {
                    let erasing = scope.spawn(move || {
                        dying.try_exec("select nightowls.erase('person', 'subject', 'asked')")
                    });
                    wait_until("it has written so much", Duration::from_secs(60), || {
                        text(
                            &mut watcher,
                            &format!(
                                "select coalesce((select a.backend_xid is not null and pg_current_wal_insert_lsn() - '{start}' >= {written} or a.state = 'idle' and a.query like '%erase%'
                                                    from pg_stat_activity a where a.pid = {pid}), true)"
                            ),
                        ) == "t"
                    });
                    cluster.kill9_postmaster_and_restart();
                    erasing.join().expect("it ends").is_ok()
                });
                if rows_of(&db, &org) == before {
                    assert!(!done, "{install}: what was committed is lost");
                    blows += 1;
                    continue;
                }
                assert_eq!(traces(&db, &org), Vec::<String>::new(), "{install}");
                let mut service = db.service();
                assert_eq!(
                    lines(
                        &mut service,
                        "select count(*), max(version), count(*) filter (where event_type = 'nightowls.erased') from nightowls.all_events"
                    ),
                    [format!("{0} {0} {0}", 10 * each + 1)]
                );
                assert_eq!(
                    text(
                        &mut service,
                        "select nightowls.erase('person', 'subject', 'again')"
                    ),
                    "0"
                );
                break;
            }
            assert!(blows >= 3, "{install}: {blows} blows fell in the middle");
        }
    });
}

#[test]
fn every_table_says_how_a_subject_leaves_it() {
    on_each_install(|db| {
        let wrong = lines(
            &mut db.superuser(),
            "select coalesce(c.relname, t.table_name), case
                      when t.table_name is null then 'is not in _subject_tables()'
                      when c.relname is null then 'is no table'
                      when (t.eraser is null) = (t.reason is null) then 'needs an eraser or a reason, not both'
                      when to_regprocedure(format('nightowls.%I(uuid, text, text)', t.eraser)) is null and t.eraser is not null
                        then 'has an eraser that does not exist'
                      else 'is there twice'
                    end
               from (select c.relname::text from pg_class c
                      where c.relnamespace = 'nightowls'::regnamespace and c.relkind in ('r', 'p')) c
               full join (select t.*, count(*) over (partition by t.table_name) as times from nightowls._subject_tables() t) t
                 on t.table_name = c.relname
              where t.table_name is null or c.relname is null or (t.eraser is null) = (t.reason is null) or t.times > 1
                 or t.eraser is not null and to_regprocedure(format('nightowls.%I(uuid, text, text)', t.eraser)) is null",
        );
        assert_eq!(wrong, Vec::<String>::new());
    });
}

#[test]
fn the_examples_of_the_page_do_what_it_says() {
    assert_examples(include_str!("../docs/erasure.md"), 5);
}
