//! Compaction: what is moved is as it was, and everybody else sees no difference.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};

use crate::fixture::{Random, default_org, is_blocked, lines, new_org};
use crate::projections::text;
use crate::snapshots::{CHAIN, append, chain, long_history, replay, write_history};
use crate::support::{
    Db, Install, Refusal, SERVICE, SUPERUSER, Session, on_each_install, on_each_route, own_cluster,
    quote, skip, wait_until,
};

/// Every event that was not deleted, as it was, wherever it is now.
#[track_caller]
fn history(db: &Db) -> String {
    text(
        &mut db.superuser(),
        "select count(*) || ' ' || coalesce(md5(string_agg(e::text, E'\\n' order by e.org_id, e.position)), '') from nightowls.all_events e",
    )
}

/// moved, compacted_to, more, held_by
#[track_caller]
fn compact(session: &mut Session, id: &str, more: &str) -> String {
    lines(
        session,
        &format!(
            "select * from nightowls.compact_aggregate('order', {}{more})",
            quote(id)
        ),
    )
    .join("; ")
}

#[track_caller]
fn refused(session: &mut Session, id: &str, more: &str) -> String {
    let refusal = session.refused(&format!(
        "select * from nightowls.compact_aggregate('order', {}{more})",
        quote(id)
    ));
    assert_eq!(refusal.code, "NW006", "{refusal}");
    assert!(!refusal.hint.is_empty(), "{refusal}");
    refusal.message
}

/// Versions that are archived, and versions that are live, as ranges.
#[track_caller]
fn extent(session: &mut Session, id: &str) -> String {
    text(
        session,
        &format!(
            "select concat_ws(' | ',
               (select min(version) || '..' || max(version) || ' ' || count(*) from nightowls.events_archive where aggregate_id = {id} and org_id = nightowls.current_org()),
               (select min(version) || '..' || max(version) || ' ' || count(*) from nightowls.events where aggregate_id = {id} and org_id = nightowls.current_org()))",
            id = quote(id)
        ),
    )
}

#[track_caller]
fn assert_state(session: &mut Session, id: &str, version: i64) {
    let state = text(
        session,
        &format!(
            "select nightowls.state_at('chain', {}, {version})",
            quote(id)
        ),
    );
    assert_eq!(
        state,
        replay(session, id, version),
        "{id} at version {version}"
    );
}

#[track_caller]
fn verified(session: &mut Session, projection: &str) {
    assert_eq!(
        lines(
            session,
            &format!("select * from nightowls.verify_projection('{projection}')")
        ),
        Vec::<String>::new()
    );
}

/// A handler in schema public that counts, and can be made to answer otherwise.
#[track_caller]
fn create_handler(db: &Db) {
    db.owner().exec(
        "create function public.counted(state jsonb, event nightowls.events) returns jsonb language sql
           return jsonb_build_object('n', coalesce((state ->> 'n')::bigint, 0) + coalesce((event).payload ->> 'by', '0')::bigint,
                                     'h', md5(concat(state ->> 'h', (event).version)));
         select nightowls.create_projection('handled', 'order', handler => 'public.counted')",
    );
}

#[test]
fn what_is_compacted_is_in_the_archive_as_it_was_and_every_state_too() {
    on_each_route(|db| {
        default_org(db);
        let mut owner = db.owner();
        chain(&mut owner, "10");
        create_handler(db);
        let mut service = db.service();
        append(&mut service, "a", 25);
        service.exec("select nightowls.append_event('order', 'a', 'closed'); select nightowls.append_event('order', 'a', 'counted', '{\"by\": 3}', metadata => '{\"actor_id\": \"ann\"}', event_id => '00000000-0000-4000-8000-000000000001')");
        append(&mut service, "b", 5);
        let before = history(db);
        service.exec("select nightowls.create_snapshot('chain', 'a'), nightowls.create_snapshot('handled', 'a')");

        assert_eq!(compact(&mut service, "a", ", keep => 7"), "20 20 f null");
        assert_eq!(extent(&mut service, "a"), "1..20 20 | 21..27 7");
        assert_eq!(compact(&mut service, "a", ", keep => 7"), "0 20 f null");
        assert_eq!(compact(&mut service, "a", ", keep => 100"), "0 20 f null");
        for version in 1..=27 {
            assert_state(&mut service, "a", version);
        }
        assert_eq!(compact(&mut service, "a", ""), "6 26 f null");
        assert_eq!(extent(&mut service, "a"), "1..26 26 | 27..27 1");
        assert_eq!(extent(&mut service, "b"), "1..5 5");
        assert_eq!(history(db), before);
        for version in 1..=27 {
            assert_state(&mut service, "a", version);
        }
        verified(&mut service, "chain");
        verified(&mut service, "handled");

        // Reading back.
        assert_eq!(
            text(
                &mut service,
                "select string_agg(version::text, ' ') from nightowls.read_aggregate('order', 'a')"
            ),
            "27"
        );
        assert_eq!(
            text(
                &mut service,
                "select string_agg(version::text, ' ') from nightowls.read_aggregate('order', 'a', 25, 2, true)"
            ),
            "25 26"
        );
        assert_eq!(
            text(
                &mut service,
                "select count(*) || ' ' || max(version) from nightowls.read_aggregate('order', 'a', include_archived => true)"
            ),
            "27 27"
        );
        assert_eq!(
            service
                .refused("select nightowls.read_aggregate('order', 'a', include_archived => null)")
                .code,
            "22004"
        );
        assert_eq!(
            text(
                &mut service,
                "select version from nightowls.last_event('order', 'a')"
            ),
            "27"
        );

        // Appends go on; and once it is back, nothing has happened.
        append(&mut service, "a", 2);
        assert_eq!(extent(&mut service, "a"), "1..26 26 | 27..29 3");
        let before = history(db);
        assert_eq!(
            lines(
                &mut service,
                "select * from nightowls.restore_aggregate('order', 'a')"
            ),
            ["26 0 f"]
        );
        assert_eq!(
            lines(
                &mut service,
                "select * from nightowls.restore_aggregate('order', 'a')"
            ),
            ["0 0 f"]
        );
        assert_eq!(extent(&mut service, "a"), "1..29 29");
        assert_eq!(history(db), before);
        assert_eq!(
            text(&mut service, "select count(*) from nightowls.compactions"),
            "0"
        );
        for version in 1..=29 {
            assert_state(&mut service, "a", version);
        }
        verified(&mut service, "chain");
        verified(&mut service, "handled");
    });
}

#[test]
fn a_type_without_projections_and_consumers_is_compacted_to_its_newest_event() {
    on_each_install(|db| {
        default_org(db);
        let mut service = db.service();
        append(&mut service, "a", 12);
        assert_eq!(compact(&mut service, "a", ""), "11 11 f null");
        assert_eq!(compact(&mut service, "nobody", ""), "0 0 f null");
        append(&mut service, "one", 1);
        assert_eq!(compact(&mut service, "one", ""), "0 0 f null");
        // The log goes on where it was.
        assert_eq!(
            text(
                &mut service,
                "select version from nightowls.append_event('order', 'a', 'counted', expected_version => 12)"
            ),
            "13"
        );
        assert_eq!(
            service
                .refused(
                    "select nightowls.append_event('order', 'a', 'counted', expected_version => 1)"
                )
                .code,
            "NW001"
        );
        assert_eq!(
            service
                .refused(
                    "select nightowls.append_event('order', 'a', 'counted', expected_version => 0)"
                )
                .code,
            "NW001"
        );
        service.exec("insert into nightowls.events (aggregate_type, aggregate_id, event_type) values ('order', 'a', 'counted')");
        assert_eq!(extent(&mut service, "a"), "1..11 11 | 12..14 3");
    });
}

#[test]
fn the_reason_for_a_refusal_is_said_and_nothing_is_moved() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        chain(&mut owner, "null");
        let mut service = db.service();
        append(&mut service, "a", 20);
        assert_eq!(
            refused(&mut service, "a", ""),
            "order \"a\" cannot be compacted: projection \"chain\" has no snapshot of it"
        );
        service.exec("select nightowls.create_snapshot('chain', 'a')");
        append(&mut service, "a", 20);
        create_handler(db);
        assert_eq!(
            refused(&mut service, "a", ""),
            "order \"a\" cannot be compacted: projection \"handled\" has no snapshot of it"
        );
        service.exec("select nightowls.create_snapshot('handled', 'a')");
        // As far as the older of the two snapshots.
        assert_eq!(
            compact(&mut service, "a", ""),
            "20 20 f projection \"chain\""
        );
        assert_eq!(
            refused(&mut service, "a", ""),
            "order \"a\" cannot be compacted: the newest snapshot of projection \"chain\" is of version 20"
        );
        assert_eq!(extent(&mut service, "a"), "1..20 20 | 21..40 20");

        // A replay that differs: the snapshot is wrong.
        service.exec("select nightowls.create_snapshot('chain', 'a')");
        db.superuser().exec("begin; set local session_replication_role = replica; update nightowls.snapshots set state = '{\"n\": 666}' where projection = 'chain' and version = 40; commit");
        assert_eq!(
            refused(&mut service, "a", ""),
            "order \"a\" cannot be compacted: a replay differs from the snapshot of projection \"chain\" at version 40"
        );
        assert_eq!(extent(&mut service, "a"), "1..20 20 | 21..40 20");
        owner.exec(
            "select nightowls.rebuild_projection('chain'), nightowls.create_snapshot('chain', 'a')",
        );
        // A replay that differs: the handler gives another answer each time.
        owner.exec("create or replace function public.counted(state jsonb, event nightowls.events) returns jsonb language sql return jsonb_build_object('r', random())");
        assert_eq!(
            refused(&mut service, "a", ""),
            "order \"a\" cannot be compacted: a replay differs from the snapshot of projection \"handled\" at version 40"
        );
        assert_eq!(extent(&mut service, "a"), "1..20 20 | 21..40 20");
        owner.exec("select nightowls.drop_projection('handled')");
        assert_eq!(compact(&mut service, "a", ""), "19 39 f null");
        for version in 1..=40 {
            assert_state(&mut service, "a", version);
        }
    });
}

#[test]
fn a_consumer_holds_back_what_it_has_not_passed_and_sees_no_difference() {
    on_each_install(|db| {
        default_org(db);
        let mut service = db.service();
        service.exec("select nightowls.create_consumer('slow'); select nightowls.create_consumer('elsewhere', '{\"aggregate_types\": [\"cart\"]}')");
        for _ in 0..4 {
            append(&mut service, "a", 5);
            append(&mut service, "b", 5);
        }
        assert_eq!(
            refused(&mut service, "a", ""),
            "order \"a\" cannot be compacted: consumer \"slow\" has not passed version 1"
        );
        let pass = |session: &mut Session, count: usize| -> Vec<String> {
            let fetched = lines(
                session,
                &format!(
                    "select aggregate_id, version, position, fence from nightowls.fetch_events('slow', {count})"
                ),
            );
            let last = fetched.last().expect("there are events").clone();
            let mut last = last.split(' ').skip(2);
            session.exec(&format!(
                "select nightowls.commit_offset('slow', {}, {})",
                last.next().expect("a position"),
                last.next().expect("a fence")
            ));
            fetched
                .iter()
                .map(|line| line.split(' ').take(2).collect::<Vec<_>>().join(" "))
                .collect()
        };
        let mut seen = pass(&mut service, 13);
        assert_eq!(compact(&mut service, "a", ""), "8 8 f consumer \"slow\"");
        assert_eq!(compact(&mut service, "b", ""), "5 5 f consumer \"slow\"");
        seen.extend(pass(&mut service, 20));
        assert_eq!(compact(&mut service, "a", ""), "10 18 f consumer \"slow\"");
        seen.extend(pass(&mut service, 20));
        assert_eq!(compact(&mut service, "a", ""), "1 19 f null");
        let mut expected = Vec::new();
        for block in 0..4 {
            for id in ["a", "b"] {
                expected.extend((1..=5).map(|i| format!("{id} {}", block * 5 + i)));
            }
        }
        assert_eq!(seen, expected);
        // One who goes back gets what the live log has.
        service.exec("select nightowls.seek('slow', 0)");
        assert_eq!(
            refused(&mut service, "b", ""),
            "order \"b\" cannot be compacted: consumer \"slow\" has not passed version 6"
        );
        assert_eq!(pass(&mut service, 100).len(), 1 + 15);
        service.exec("select nightowls.drop_consumer('slow')");
        assert_eq!(compact(&mut service, "b", ""), "14 19 f null");
    });
}

#[test]
fn an_archived_event_id_is_known_to_every_way_of_appending() {
    on_each_install(|db| {
        default_org(db);
        chain(&mut db.owner(), "1");
        let mut service = db.service();
        let id = |n: usize| format!("00000000-0000-4000-8000-{n:012}");
        let batch = |from: usize, to: usize| {
            (from..=to)
                .map(|n| format!(r#"{{"event_type": "counted", "payload": {{"by": {n}}}, "event_id": "{}"}}"#, id(n)))
                .collect::<Vec<_>>()
                .join(", ")
        };
        service.exec(&format!(
            "select nightowls.append_event('order', 'a', 'counted', '{{\"by\": 1}}', event_id => '{}');
             select nightowls.append_events('order', 'a', '[{}]');
             select nightowls.append_many('[{{\"aggregate_type\": \"order\", \"aggregate_id\": \"a\", \"events\": [{}]}}, {{\"aggregate_type\": \"order\", \"aggregate_id\": \"b\", \"events\": [{}]}}]');",
            id(1), batch(2, 4), batch(5, 6), batch(7, 8)
        ));
        append(&mut service, "a", 1);
        append(&mut service, "b", 1);
        assert_eq!(compact(&mut service, "a", ""), "6 6 f null");
        assert_eq!(compact(&mut service, "b", ", keep => 2"), "1 1 f null");
        let before = history(db);
        assert_eq!(
            text(
                &mut service,
                &format!(
                    "select version from nightowls.append_event('order', 'a', 'counted', '{{\"by\": 1}}', 0, '{}')",
                    id(1)
                )
            ),
            "1"
        );
        assert_eq!(
            lines(
                &mut service,
                &format!(
                    "select version from nightowls.append_events('order', 'a', '[{}]', 1)",
                    batch(2, 4)
                )
            ),
            ["2", "3", "4"]
        );
        // Some archived, some live.
        assert_eq!(
            lines(
                &mut service,
                &format!(
                    "select aggregate_id, version from nightowls.append_many('[{{\"aggregate_type\": \"order\", \"aggregate_id\": \"a\", \"events\": [{}]}}, {{\"aggregate_type\": \"order\", \"aggregate_id\": \"b\", \"events\": [{}]}}]')",
                    batch(5, 6),
                    batch(7, 8)
                )
            ),
            ["a 5", "a 6", "b 1", "b 2"]
        );
        for (sql, code) in [
            (format!("select nightowls.append_event('order', 'a', 'counted', '{{\"by\": 99}}', event_id => '{}')", id(1)), "NW002"),
            (format!("select nightowls.append_event('order', 'b', 'counted', '{{\"by\": 1}}', event_id => '{}')", id(1)), "NW002"),
            (format!("select nightowls.append_events('order', 'a', '[{}]')", batch(4, 5).replace("\"by\": 4", "\"by\": 0")), "NW002"),
            (format!("insert into nightowls.events (aggregate_type, aggregate_id, event_type, event_id) values ('order', 'a', 'counted', '{}')", id(1)), "23505"),
            (format!("insert into nightowls.events (aggregate_type, aggregate_id, event_type, event_id) values ('order', 'new', 'counted', null), ('order', 'new', 'counted', '{}')", id(7)), "23505"),
            // Nor can a version that is archived be taken again.
            ("insert into nightowls.events (aggregate_type, aggregate_id, version, event_type) values ('order', 'a', 1, 'counted')".to_owned(), "22023"),
            ("insert into nightowls.events (aggregate_type, aggregate_id, version, event_type) values ('order', 'a', 2, 'counted')".to_owned(), "22023"),
            ("insert into nightowls.events (aggregate_type, aggregate_id, version, event_type) values ('order', 'a', 6, 'counted')".to_owned(), "22023"),
            ("insert into nightowls.events (aggregate_type, aggregate_id, version, event_type) values ('order', 'a', 7, 'counted')".to_owned(), "23505"),
            ("insert into nightowls.events (aggregate_type, aggregate_id, version, event_type) values ('order', 'a', 9, 'counted')".to_owned(), "22023"),
        ] {
            assert_eq!(service.refused(&sql).code, code, "{sql}");
        }
        assert_eq!(history(db), before);
        // Another org has ids of its own.
        let other = new_org(db, "other");
        service.exec(&format!("select nightowls.append_event('order', 'a', 'counted', event_id => '{}', org => '{other}')", id(1)));
    });
}

#[test]
fn a_new_altered_or_rebuilt_projection_is_made_of_archive_and_log() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        chain(&mut owner, "10");
        let mut service = db.service();
        append(&mut service, "a", 30);
        append(&mut service, "b", 30);
        assert_eq!(compact(&mut service, "a", ""), "29 29 f null");

        owner.exec(&format!(
            "create table public.balances (org_id uuid, id text, n bigint, versions bigint[]); grant all on public.balances to {SERVICE};
             create function public.keep(event nightowls.events) returns void language sql
             begin atomic
               insert into public.balances select (event).org_id, (event).aggregate_id, 0, '{{}}'
                where not exists (select from public.balances b where b.id = (event).aggregate_id);
               update public.balances b set n = n + coalesce(((event).payload ->> 'by')::bigint, 0), versions = versions || (event).version
                where b.id = (event).aggregate_id;
             end;
             select nightowls.create_table_projection('balances', 'order', 'public.balances', 'public.keep')"
        ));
        create_handler(db);
        owner.exec(&format!(
            "select nightowls.create_projection('late', 'order', {})",
            quote(CHAIN)
        ));
        for (projection, id) in [("late", "a"), ("late", "b"), ("chain", "a")] {
            assert_eq!(
                text(
                    &mut service,
                    &format!("select nightowls.state('{projection}', '{id}')")
                ),
                replay(&mut service, id, 30)
            );
        }
        let table = "select string_agg(id || ' ' || n || ' ' || (versions = array(select generate_series(1, 30)::bigint)), ', ' order by id) from public.balances";
        let sum = (1..=30).map(|i| i % 7).sum::<i32>();
        let expected = format!("a {sum} true, b {sum} true");
        assert_eq!(text(&mut owner, table), expected);
        // With the table projection there and the new ones not proven yet, compaction goes on all the same.
        service.exec("select nightowls.create_snapshot(p, 'b') from unnest('{chain,handled,late}'::text[]) p");
        assert_eq!(compact(&mut service, "b", ""), "29 29 f null");
        owner.exec("select nightowls.rebuild_projection('balances'), nightowls.rebuild_projection('late'), nightowls.rebuild_projection('handled'), nightowls.rebuild_projection('chain')");
        assert_eq!(text(&mut owner, table), expected);
        for projection in ["chain", "late", "handled"] {
            verified(&mut service, projection);
        }
        owner.exec(r#"select nightowls.alter_projection('late', '{"otherwise": [{"op": "add", "path": "m"}]}')"#);
        assert_eq!(
            text(&mut service, "select nightowls.state('late', 'a')"),
            "{\"m\": 30}"
        );
        for version in [1, 15, 29, 30] {
            assert_eq!(
                text(
                    &mut service,
                    &format!("select nightowls.state_at('late', 'b', {version})")
                ),
                format!("{{\"m\": {version}}}")
            );
            assert_state(&mut service, "b", version);
        }
        // A view over the whole history.
        owner.exec("select nightowls.create_view_projection('counts', 'select e.org_id, e.aggregate_id, count(*) as n from nightowls.all_events e group by 1, 2')");
        assert_eq!(
            lines(
                &mut owner,
                "select aggregate_id, n from nightowls.view_counts order by 1"
            ),
            ["a 30", "b 30"]
        );
    });
}

#[test]
fn deleted_events_are_gone_and_states_from_there_on_are_not() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        chain(&mut owner, "5");
        create_handler(db);
        owner.exec("select nightowls.set_snapshot_policy('handled', 5)");
        let mut service = db.service();
        append(&mut service, "a", 20);
        append(&mut service, "b", 10);
        let before: Vec<_> = (0..=20)
            .map(|version| replay(&mut service, "a", version))
            .collect();
        let handled: Vec<_> = (1..=20)
            .map(|version| {
                text(
                    &mut service,
                    &format!("select nightowls.state_at('handled', 'a', {version})"),
                )
            })
            .collect();
        assert_eq!(compact(&mut service, "a", ", keep => 15"), "5 5 f null");
        assert_eq!(
            compact(&mut service, "a", ", keep => 8, mode => 'delete'"),
            "12 12 f null"
        );
        assert_eq!(extent(&mut service, "a"), "13..20 8");
        let check = |service: &mut Session, from: usize| {
            for version in 1..=20_usize {
                let asked = [
                    (
                        format!("select nightowls.state_at('chain', 'a', {version})"),
                        &before[version],
                    ),
                    (
                        format!("select nightowls.state_at('handled', 'a', {version})"),
                        &handled[version - 1],
                    ),
                ];
                for (sql, expected) in asked {
                    match service.try_value(&sql) {
                        Ok(state) => assert_eq!(state.as_ref(), Some(expected), "{sql}"),
                        Err(refusal) => assert!(
                            refusal.code == "NW006" && version < from,
                            "{sql}: {refusal}"
                        ),
                    }
                }
            }
            assert_eq!(
                service
                    .refused("select nightowls.state_at('chain', 'a', 1)")
                    .code,
                "NW006"
            );
            verified(service, "chain");
            verified(service, "handled");
        };
        check(&mut service, 12);
        // A rebuild starts from what was proven; what would fold otherwise has nothing to fold.
        owner.exec(
            "select nightowls.rebuild_projection('chain'), nightowls.rebuild_projection('handled')",
        );
        check(&mut service, 12);
        for sql in [
            "alter_projection('chain', '{\"otherwise\": []}')",
            "create_projection('late', 'order', '{}')",
            "create_projection('late', 'order', handler => 'public.counted')",
        ] {
            let refusal = owner.refused(&format!("select nightowls.{sql}"));
            assert_eq!(refusal.code, "NW006", "{sql}: {refusal}");
        }
        owner.exec("select nightowls.alter_projection('handled', handler => 'public.counted')");
        owner.exec(&format!(
            "select nightowls.create_projection('chain', 'order', {})",
            quote(CHAIN)
        ));
        check(&mut service, 12);
        assert_eq!(
            lines(
                &mut service,
                "select * from nightowls.restore_aggregate('order', 'a')"
            ),
            ["0 12 f"]
        );
        // Further, after more events; then in mode archive.
        append(&mut service, "a", 10);
        assert_eq!(
            compact(&mut service, "a", ", mode => 'delete', keep => 12"),
            "6 18 f null"
        );
        assert_eq!(compact(&mut service, "a", ", keep => 5"), "7 25 f null");
        assert_eq!(extent(&mut service, "a"), "19..25 7 | 26..30 5");
        owner.exec(
            "select nightowls.rebuild_projection('chain'), nightowls.rebuild_projection('handled')",
        );
        verified(&mut service, "chain");
        verified(&mut service, "handled");
        assert_eq!(
            lines(
                &mut service,
                "select * from nightowls.restore_aggregate('order', 'a')"
            ),
            ["7 18 f"]
        );
        append(&mut service, "a", 1);
        verified(&mut service, "chain");
        assert_eq!(
            service
                .refused("select nightowls.state_at('chain', 'a', 3)")
                .code,
            "NW006"
        );
        for version in 1..=10 {
            assert_state(&mut service, "b", version);
        }
    });
}

#[test]
fn deletion_is_refused_where_something_would_be_lost_that_can_be_made_of_events_only() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        let mut service = db.service();
        append(&mut service, "a", 10);
        owner.exec(&format!(
            "create table public.seen (org_id uuid, version bigint); grant all on public.seen to {SERVICE};
             create function public.see(event nightowls.events) returns void language sql
             begin atomic insert into public.seen values ((event).org_id, (event).version); end;
             select nightowls.create_table_projection('seen', 'order', 'public.seen', 'public.see')"
        ));
        assert_eq!(
            refused(&mut service, "a", ", mode => 'delete'"),
            "order \"a\" cannot be compacted: table projection \"seen\" could not be made again without its events"
        );
        owner.exec("select nightowls.drop_projection('seen')");
        for level in ["repeatable read", "serializable"] {
            service.exec(&format!("begin isolation level {level}"));
            let refusal = service.refused(
                "select * from nightowls.compact_aggregate('order', 'a', mode => 'delete')",
            );
            service.exec("rollback");
            assert_eq!(refusal.code, "25001");
        }
        // While a projection is being made, which the deletion cannot see.
        let mut maker = db.owner();
        maker.exec("begin");
        chain(&mut maker, "1");
        assert_eq!(
            refused(&mut service, "a", ", mode => 'delete'"),
            "order \"a\" cannot be compacted: a projection is being made or another compaction deletes"
        );
        maker.exec("commit");
        // And while the deletion is open, nobody makes one of what it takes.
        service.exec("select nightowls.create_snapshot('chain', 'a'); begin");
        assert_eq!(
            compact(&mut service, "a", ", mode => 'delete'"),
            "9 9 f null"
        );
        let pid = maker.pid();
        thread::scope(|scope| {
            let made = scope.spawn(|| {
                maker.refused(
                    "select nightowls.create_projection('late', 'order', '{\"otherwise\": []}')",
                )
            });
            let mut watcher = db.superuser();
            wait_until("it waits for the deletion", Duration::from_secs(10), || {
                is_blocked(&mut watcher, pid)
            });
            service.exec("commit");
            assert_eq!(made.join().expect("it ends").code, "NW006");
        });
        assert_eq!(owner.refused("select nightowls.create_table_projection('seen', 'order', 'public.seen', 'public.see')").code, "NW006");
    });
}

#[test]
fn the_archive_is_as_closed_as_the_log() {
    on_each_install(|db| {
        default_org(db);
        let mut service = db.service();
        append(&mut service, "a", 5);
        compact(&mut service, "a", "");
        let before = history(db);
        db.owner().exec(&format!(
            "grant insert, update, delete, truncate on nightowls.events_archive to {SERVICE}"
        ));
        for role in [SUPERUSER, db.install().owner(), SERVICE] {
            let mut session = db.session(role);
            for sql in [
                "update nightowls.events_archive set payload = '{}'",
                "update nightowls.events_archive set archived_at = now() where false",
                "delete from nightowls.events_archive",
                "truncate nightowls.events_archive",
                "insert into nightowls.events_archive select *, now() from nightowls.events",
                "insert into nightowls.events_archive select * from nightowls.events_archive on conflict (org_id, position) do update set payload = '{}'",
                "merge into nightowls.events_archive a using (values (1)) v on true when matched then delete",
            ] {
                let refusal = session.refused(sql);
                assert_eq!(refusal.code, "NW008", "{role}: {sql}\n{refusal}");
            }
        }
        for door in ["maintain", "append", "project"] {
            let mut service = db.service();
            service.exec(&format!("begin; select nightowls._open_door('{door}')"));
            assert_eq!(
                service.refused("delete from nightowls.events_archive").code,
                "NW008"
            );
            service.exec("rollback");
        }
        assert_eq!(history(db), before);
    });
}

/// What lies beneath looks for itself whether events may go.
#[test]
fn calling_what_moves_events_by_hand_moves_nothing_that_may_not_go() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        chain(&mut owner, "null");
        let mut service = db.service();
        append(&mut service, "a", 10);
        let before = (history(db), extent(&mut service, "a"));
        let assert_refused = |service: &mut Session, upto: i64| {
            for mode in ["archive", "delete"] {
                let refusal = service.refused(&format!(
                    "select nightowls._move_events(nightowls.current_org(), 'order', 'a', {upto}, '{mode}', 100)"
                ));
                assert_eq!(refusal.code, "NW006", "{upto} {mode}: {refusal}");
            }
        };
        for upto in [1, 9, 10, 11] {
            assert_refused(&mut service, upto);
        }
        service.exec("select nightowls.create_snapshot('chain', 'a')");
        for upto in [1, 9, 10, 11] {
            assert_refused(&mut service, upto);
        }
        service.exec("select nightowls._begin_run(nightowls.current_org(), 'order', 'a', 'archive', 9), nightowls._end_run(nightowls.current_org(), 'order', 'a', true)");
        assert_eq!((history(db), extent(&mut service, "a")), before);
        // Once it is proven up to 4, that far and not further.
        assert_eq!(compact(&mut service, "a", ", keep => 6"), "4 4 f null");
        for upto in [5, 9, 10] {
            assert_refused(&mut service, upto);
        }
        // What runs as the owner names no handler.
        let definers = lines(
            &mut db.superuser(),
            "select p.oid::regprocedure from pg_proc p
              where p.pronamespace = 'nightowls'::regnamespace and p.prosecdef
                and p.prosrc ~* 'nightowls[.](_compact|_compact_by_policy|_prove|_snapshot)[(]'",
        );
        assert_eq!(definers, Vec::<String>::new());
    });
}

#[test]
fn a_compaction_never_runs_a_handler_as_the_owner() {
    on_each_install(|db| {
        default_org(db);
        db.owner().exec(&format!(
            "create table public.callers (who text); grant insert, select on public.callers to {SERVICE};
             create function public.spy(state jsonb, event nightowls.events) returns jsonb language plpgsql as $$
             begin insert into public.callers values (current_user); return jsonb_build_object('v', (event).version); end $$;
             select nightowls.create_projection('spied', 'order', handler => 'public.spy')"
        ));
        let mut service = db.service();
        for id in ["a", "b"] {
            append(&mut service, id, 10);
        }
        service.exec("select nightowls.create_snapshot('spied', 'a')");
        assert_eq!(compact(&mut service, "a", ""), "9 9 f null");
        service.exec("select nightowls.set_compaction('order', min_events => 2)");
        assert_eq!(
            lines(
                &mut service,
                "select aggregate_id, moved, error from nightowls.compact()"
            ),
            ["b 9 null"]
        );
        service.exec("select nightowls.state_at('spied', 'a', 3); select nightowls.verify_projection('spied')");
        assert_eq!(
            lines(&mut service, "select distinct who from public.callers"),
            [SERVICE]
        );
    });
}

#[test]
fn appends_and_a_compaction_wait_for_nobody() {
    on_each_install(|db| {
        default_org(db);
        chain(&mut db.owner(), "5");
        let (mut ann, mut bob, mut eve) = (db.service(), db.service(), db.service());
        append(&mut ann, "a", 20);
        for session in [&mut ann, &mut bob] {
            session.exec("set lock_timeout = '5s'");
        }
        // An append is open: its event and the one before it stay.
        ann.exec("begin");
        append(&mut ann, "a", 1);
        assert_eq!(compact(&mut bob, "a", ""), "19 19 f null");
        ann.exec("commit");
        assert_eq!(extent(&mut bob, "a"), "1..19 19 | 20..21 2");
        // A compaction is open: appends go on, the aggregate's states are read.
        append(&mut ann, "a", 4);
        bob.exec("begin");
        assert_eq!(compact(&mut bob, "a", ""), "5 24 f null");
        append(&mut ann, "a", 1);
        ann.exec("insert into nightowls.events (aggregate_type, aggregate_id, event_type, payload) values ('order', 'a', 'counted', '{\"by\": 5}')");
        for version in [1, 19, 20, 24, 25, 27] {
            let mut reader = db.service();
            assert_state(&mut reader, "a", version);
        }
        // Another compaction of the same aggregate comes after it.
        let pid = eve.pid();
        thread::scope(|scope| {
            let second = scope.spawn(|| compact(&mut eve, "a", ""));
            let mut watcher = db.superuser();
            wait_until("it waits for the first", Duration::from_secs(10), || {
                is_blocked(&mut watcher, pid)
            });
            bob.exec("commit");
            assert_eq!(
                second.join().expect("it ends"),
                "1 25 f projection \"chain\""
            );
        });
        for version in 1..=27 {
            assert_state(&mut bob, "a", version);
        }
        // Rolled back, nothing has moved.
        let before = (history(db), extent(&mut bob, "a"));
        bob.exec("begin; select nightowls.create_snapshot('chain', 'a')");
        assert_eq!(compact(&mut bob, "a", ""), "1 26 f null");
        bob.exec("rollback");
        assert_eq!((history(db), extent(&mut bob, "a")), before);
    });
}

#[test]
fn a_reader_with_an_older_snapshot_sees_the_log_as_it_was() {
    on_each_install(|db| {
        default_org(db);
        chain(&mut db.owner(), "5");
        let (mut reader, mut service) = (db.service(), db.service());
        append(&mut service, "a", 20);
        reader.exec("begin isolation level repeatable read");
        let all = "select count(*) || ' ' || sum(version) from nightowls.read_aggregate('order', 'a', include_archived => true)";
        let before = text(&mut reader, all);
        assert_eq!(compact(&mut service, "a", ""), "19 19 f null");
        assert_eq!(text(&mut reader, all), before);
        assert_eq!(
            text(
                &mut reader,
                "select count(*) from nightowls.read_aggregate('order', 'a')"
            ),
            "20"
        );
        for version in [1, 7, 20] {
            assert_state(&mut reader, "a", version);
        }
        // Its append meets no archived version either.
        let appended = reader
            .try_exec("select nightowls.append_event('order', 'a', 'counted', '{\"by\": 1}')");
        assert!(appended.is_ok(), "{appended:?}");
        reader.exec("commit");
        assert_eq!(extent(&mut service, "a"), "1..19 19 | 20..21 2");
        assert_state(&mut service, "a", 21);
    });
}

#[test]
fn a_build_open_across_a_compaction_finds_what_was_moved() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        chain(&mut owner, "5");
        create_handler(db);
        owner.exec("select nightowls.set_snapshot_policy('handled', 5)");
        let mut service = db.service();
        append(&mut service, "a", 20);
        // The build has seen 20 events; what is appended and compacted before it ends is missing in what it made.
        owner.exec("begin");
        owner.exec(&format!("select nightowls.create_projection('late', 'order', {}), nightowls.rebuild_projection('handled')", quote(CHAIN)));
        append(&mut service, "a", 10);
        assert_eq!(compact(&mut service, "a", ""), "29 29 f null");
        owner.exec("commit");
        for projection in ["late", "chain"] {
            assert_eq!(
                text(
                    &mut service,
                    &format!("select nightowls.state('{projection}', 'a')")
                ),
                replay(&mut service, "a", 30)
            );
        }
        verified(&mut service, "handled");
        append(&mut service, "a", 1);
        for projection in ["late", "handled"] {
            verified(&mut service, projection);
        }
        assert_eq!(
            text(&mut service, "select nightowls.state('late', 'a')"),
            replay(&mut service, "a", 31)
        );
        assert_eq!(
            lines(
                &mut service,
                "select projection, version from nightowls.projection_states order by 1"
            ),
            ["chain 31", "handled 31", "late 31"]
        );
    });
}

#[test]
fn a_long_history_is_moved_in_slices_that_go_on_where_the_last_one_was() {
    on_each_install(|db| {
        let org = default_org(db);
        let count = long_history(30_000);
        let mut superuser = db.superuser();
        write_history(&mut superuser, &org, "a", count);
        chain(&mut superuser, "1000");
        let before = history(db);
        let mut service = db.service();
        let (mut phases, mut calls, mut moved, mut last) = (Vec::new(), 0_u64, 0_u64, 0_u64);
        loop {
            let slice = lines(
                &mut service,
                "select moved, compacted_to, more from nightowls.compact_aggregate('order', 'a', keep => 10, max_ms => 20)",
            )
            .join(" ");
            let slice: Vec<_> = slice.split(' ').collect();
            calls += 1;
            moved += slice[0].parse::<u64>().expect("a number");
            let to = slice[1].parse::<u64>().expect("a number");
            assert!(to >= last && to == moved, "{slice:?}");
            last = to;
            assert_eq!(
                extent(&mut service, "a"),
                if to == 0 {
                    format!("1..{count} {count}")
                } else {
                    format!("1..{to} {to} | {}..{count} {}", to + 1, count - to)
                }
            );
            if slice[2] == "f" {
                break;
            }
            let progress = lines(
                &mut service,
                "select operation, subject, phase, total, done between 1 and total from nightowls.progress",
            );
            assert_eq!(progress.len(), 1, "{progress:?}");
            phases.push(progress[0].clone());
            if calls % 7 == 3 {
                append(&mut service, "b", 1);
                assert_eq!(
                    text(&mut service, "select nightowls.state('chain', 'a') ->> 'n'"),
                    count.to_string()
                );
            }
        }
        assert!(calls > 5, "{calls} calls");
        assert_eq!(last, count - 10);
        phases.dedup();
        let target = count - 10;
        assert_eq!(
            phases,
            [
                format!("compaction order a proving {target} t"),
                format!("compaction order a moving {target} t")
            ]
        );
        assert_eq!(
            text(&mut service, "select count(*) from nightowls.progress"),
            "0"
        );
        assert_eq!(
            text(&mut service, "select count(*) from nightowls._replays"),
            "0"
        );
        assert_eq!(
            text(
                &mut db.superuser(),
                &format!(
                    "select count(*) || ' ' || coalesce(md5(string_agg(e::text, E'\\n' order by e.org_id, e.position)), '') from nightowls.all_events e where aggregate_id = 'a' or aggregate_id = 'b' and false and e.org_id = '{org}'"
                )
            ),
            before
        );
        verified(&mut service, "chain");
        // And back, in slices too.
        let mut restores = 0;
        while text(
            &mut service,
            "select more from nightowls.restore_aggregate('order', 'a', 20)",
        ) == "t"
        {
            restores += 1;
            let progress = lines(
                &mut service,
                "select operation, phase from nightowls.progress",
            );
            assert_eq!(progress, ["restore putting back"]);
        }
        assert!(restores > 1, "{restores}");
        assert_eq!(extent(&mut service, "a"), format!("1..{count} {count}"));
        verified(&mut service, "chain");
    });
}

#[test]
fn the_sweep_compacts_what_was_asked_for_in_every_org_and_nothing_else() {
    on_each_route(|db| {
        let one = default_org(db);
        let two = new_org(db, "two");
        let mut owner = db.owner();
        for org in [&one, &two] {
            owner.exec(&format!(
                "select nightowls.create_projection('chain', 'order', {}, org => '{org}')",
                quote(CHAIN)
            ));
        }
        let mut service = db.service();
        let many = |count: usize| {
            format!(
                "(select jsonb_agg('{{\"event_type\": \"counted\", \"payload\": {{\"by\": 1}}}}'::jsonb) from generate_series(1, {count}))"
            )
        };
        for (org, aggregates) in [(&one, 30), (&two, 2)] {
            for i in 0..aggregates {
                service.exec(&format!(
                    "select nightowls.append_events('order', 'o{i}', {}, org => '{org}'), nightowls.append_events('cart', 'o{i}', {}, org => '{org}')",
                    many(12), many(12)
                ));
            }
            service.exec(&format!(
                "select nightowls.append_events('order', 'few', {}, org => '{org}')",
                many(5)
            ));
        }
        let before = history(db);
        assert_eq!(
            text(&mut service, "select count(*) from nightowls.compact()"),
            "0"
        );
        for org in [&one, &two] {
            service.exec(&format!("select nightowls.set_compaction('order', keep => 3, min_events => 5, org => '{org}')"));
        }
        // Both have a turn, though one has much more to do; and what is left is gone on with.
        let first = lines(
            &mut service,
            "select org_id from nightowls.compact(max_aggregates => 4)",
        );
        assert_eq!(first.len(), 4);
        let second = lines(
            &mut service,
            "select distinct org_id from nightowls.compact(max_aggregates => 1)",
        );
        assert_ne!(second, [first[0].clone()]);
        while text(
            &mut service,
            "select count(*) from nightowls.compact(max_aggregates => 5)",
        ) != "0"
        {}
        assert_eq!(
            lines(
                &mut service,
                "select aggregate_type, aggregate_id like 'o%', count(distinct (org_id, aggregate_id)), min(version), max(version), count(*) from nightowls.events_archive group by 1, 2"
            ),
            ["order t 32 1 9 288"]
        );
        assert_eq!(history(db), before);
        for org in [&one, &two] {
            assert_eq!(
                lines(
                    &mut service,
                    &format!("select * from nightowls.verify_projection('chain', org => '{org}')")
                ),
                Vec::<String>::new()
            );
        }
        // Taken back.
        assert_eq!(
            text(
                &mut service,
                &format!("select nightowls.drop_compaction('order', '{one}')")
            ),
            "t"
        );
        assert_eq!(
            text(
                &mut service,
                &format!("select nightowls.drop_compaction('order', '{one}')")
            ),
            "f"
        );
        for org in [&one, &two] {
            service.exec(&format!(
                "select nightowls.append_events('order', 'o1', {}, org => '{org}')",
                many(12)
            ));
        }
        assert_eq!(
            lines(
                &mut service,
                "select org_id, aggregate_id, moved, compacted_to, more, held_by, error from nightowls.compact()"
            ),
            [format!("{two} o1 12 21 f null null")]
        );
    });
}

#[test]
fn orgs_beyond_what_one_sweep_may_lock_come_first_in_the_next() {
    on_each_install(|db| {
        let orgs: Vec<String> = (0..40).map(|i| new_org(db, &format!("org {i}"))).collect();
        let mut service = db.service();
        for org in &orgs {
            service.exec(&format!(
                "select nightowls.set_compaction('order', min_events => 2, org => '{org}');
                 select nightowls.create_projection('chain', 'order', {}, org => '{org}')",
                quote(CHAIN)
            ));
        }
        // Without a policy while they are appended, so that the appends leave the snapshots to the sweep.
        let fill = |session: &mut Session, orgs: &[String]| {
            let of = format!("unnest(array['{}']::uuid[]) as o (id)", orgs.join("','"));
            session.exec(&format!(
                "select nightowls.set_snapshot_policy('chain', null, o.id) from {of};
                 select nightowls.append_events('order', 'a' || i, '[{}]', org => o.id) from {of} cross join generate_series(1, 2) i;
                 select nightowls.set_snapshot_policy('chain', 2, o.id) from {of}",
                [r#"{"event_type": "counted", "payload": {"by": 1}}"#; 5].join(",")
            ));
        };
        fill(&mut service, &orgs);
        // An erasure that is open in one is not waited for.
        let mut eraser = db.service();
        eraser.exec(&format!(
            "begin; select nightowls.erase('cart', 'a', 'asked', org => '{}')",
            orgs[0]
        ));
        for sweep in ["compact", "create_snapshots"] {
            let mut served = BTreeSet::new();
            for round in 0..2 {
                service.exec("begin");
                let turn = lines(
                    &mut service,
                    &format!("select distinct org_id from nightowls.{sweep}(1000, 20000)"),
                );
                let locks: i64 = text(
                    &mut service,
                    "select count(*) from pg_locks where pid = pg_backend_pid() and locktype = 'advisory'",
                )
                .parse()
                .expect("a number");
                assert!(locks <= 64, "{sweep}: {locks} advisory locks");
                service.exec("commit");
                assert_eq!(turn.len(), 24, "{sweep}, round {round}");
                served.extend(turn);
                // Those that were served have as much to do again.
                let busy: Vec<String> = served.iter().cloned().collect();
                fill(&mut service, &busy);
            }
            assert_eq!(served.len(), 39, "{sweep}: all but the one that is held up");
            assert!(!served.contains(&orgs[0]));
        }
        eraser.exec("commit");
        let mut late = BTreeSet::new();
        for _ in 0..2 {
            late.extend(lines(
                &mut service,
                "select distinct org_id from nightowls.compact(1000, 20000)",
            ));
        }
        assert!(late.contains(&orgs[0]));
    });
}

#[test]
fn the_sweep_goes_on_past_what_it_cannot_compact_and_says_why() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        owner.exec("create function public.moody(state jsonb, event nightowls.events) returns jsonb language sql
                      return jsonb_build_object('n', case (event).aggregate_id when 'b' then random() else (event).version end);
                    select nightowls.create_projection('moody', 'order', handler => 'public.moody');
                    select nightowls.set_compaction('order', min_events => 2)");
        let mut service = db.service();
        for id in ["a", "b", "c"] {
            append(&mut service, id, 5);
        }
        let why = "NW006 order \"b\" cannot be compacted: a replay differs from the snapshot of projection \"moody\" at version 5";
        assert_eq!(
            lines(
                &mut service,
                "select aggregate_id, moved, error from nightowls.compact()"
            ),
            [
                "a 4 null".to_owned(),
                format!("b 0 {why}"),
                "c 4 null".to_owned()
            ]
        );
        assert_eq!(
            lines(
                &mut service,
                "select operation, subject, phase, reason from nightowls.progress"
            ),
            [format!("compaction order b refused {why}")]
        );
        owner.exec("select nightowls.drop_projection('moody')");
        assert_eq!(
            lines(
                &mut service,
                "select aggregate_id, moved, error from nightowls.compact()"
            ),
            ["b 4 null"]
        );
        assert_eq!(
            text(&mut service, "select count(*) from nightowls.progress"),
            "0"
        );
    });
}

#[test]
fn progress_shows_a_build_while_it_runs() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        chain(&mut owner, "5");
        append(&mut db.service(), "a", 5);
        owner.exec("begin; select nightowls.rebuild_projection('chain')");
        let pid = owner.pid();
        assert_eq!(
            lines(
                &mut db.service(),
                "select operation, subject, phase, pid from nightowls.progress"
            ),
            [format!("build chain building {pid}")]
        );
        owner.exec("commit");
        assert_eq!(
            text(&mut db.service(), "select count(*) from nightowls.progress"),
            "0"
        );
    });
}

#[test]
fn arguments_that_will_not_do_are_refused() {
    on_each_install(|db| {
        default_org(db);
        let mut service = db.service();
        append(&mut service, "a", 5);
        for (sql, code) in [
            ("compact_aggregate(null, 'a')", "22004"),
            ("compact_aggregate('', 'a')", "22023"),
            ("compact_aggregate('order', null)", "22004"),
            ("compact_aggregate(repeat('x', 256), 'a')", "54000"),
            ("compact_aggregate('order', 'a', 0)", "22023"),
            ("compact_aggregate('order', 'a', -1)", "22023"),
            ("compact_aggregate('order', 'a', null)", "22004"),
            ("compact_aggregate('order', 'a', 1, 'shred')", "22023"),
            ("compact_aggregate('order', 'a', 1, null)", "22004"),
            ("compact_aggregate('order', 'a', 1, 'archive', 0)", "22023"),
            (
                "compact_aggregate('order', 'a', 1, 'archive', null)",
                "22004",
            ),
            ("restore_aggregate(null, 'a')", "22004"),
            ("restore_aggregate('order', null)", "22004"),
            ("restore_aggregate('order', 'a', 0)", "22023"),
            ("restore_aggregate('order', 'a', null)", "22004"),
            ("set_compaction(null)", "22004"),
            ("set_compaction('')", "22023"),
            ("set_compaction('order', 0)", "22023"),
            ("set_compaction('order', mode => 'x')", "22023"),
            ("set_compaction('order', min_events => 0)", "22023"),
            ("set_compaction('order', min_events => null)", "22004"),
            (
                "set_compaction('order', org => '11111111-1111-4111-8111-111111111111')",
                "22023",
            ),
            ("drop_compaction(null)", "22004"),
            ("compact(0)", "22023"),
            ("compact(null)", "22004"),
            ("compact(1, 0)", "22023"),
            ("compact(1, null)", "22004"),
        ] {
            assert_eq!(
                service.refused(&format!("select nightowls.{sql}")).code,
                code,
                "{sql}"
            );
        }
        assert_eq!(extent(&mut service, "a"), "1..5 5");
        // The other org's aggregate of the same name is another.
        let other = new_org(db, "other");
        assert_eq!(
            compact(&mut service, "a", &format!(", org => '{other}'")),
            "0 0 f null"
        );
        assert_eq!(extent(&mut service, "a"), "1..5 5");
    });
}

/// What the property below does to an aggregate.
#[derive(Clone, Debug)]
enum Step {
    Append(u32),
    Insert,
    Close,
    Snapshot,
    Policy(u32),
    Compact { keep: u32, ms: u32 },
    Restore { ms: u32 },
    Rebuild,
    Sweep,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // A slice is at least 500 events, so 1 ms is a partial run and 1,000 a whole one.
    let ms = || prop::sample::select(vec![1_u32, 1000]);
    prop::collection::vec(
        prop_oneof![
            6 => (1..500_u32).prop_map(Step::Append),
            1 => Just(Step::Insert),
            1 => Just(Step::Close),
            3 => Just(Step::Snapshot),
            1 => (1..300_u32).prop_map(Step::Policy),
            6 => (1..60_u32, ms()).prop_map(|(keep, ms)| Step::Compact { keep, ms }),
            2 => ms().prop_map(|ms| Step::Restore { ms }),
            1 => Just(Step::Rebuild),
            1 => Just(Step::Sweep),
        ],
        5..14,
    )
}

/// Each event is in it once and in order, or it is another state.
const HANDLER: &str = "create function public.counted(state jsonb, event nightowls.events) returns jsonb language sql
       return jsonb_build_object('n', coalesce((state ->> 'n')::bigint, 0) + coalesce((event).payload ->> 'by', '0')::bigint,
                                 'c', coalesce((state ->> 'c')::bigint, 0) + (event).version,
                                 'last', (event).version);
     select nightowls.create_projection('handled', 'order', handler => 'public.counted');
     select nightowls.set_snapshot_policy('handled', 70)";

fn handled(session: &mut Session, id: &str, to_version: i64) -> String {
    text(
        session,
        &format!(
            "select jsonb_build_object('n', sum(coalesce((e.payload ->> 'by')::bigint, 0)), 'c', sum(e.version), 'last', max(e.version))
               from nightowls.all_events e
              where e.org_id = nightowls.current_org() and e.aggregate_type = 'order' and e.aggregate_id = {} and e.version <= {to_version}",
            quote(id)
        ),
    )
}

fn step(session: &mut Session, id: &str, step: &Step) -> Result<(), Refusal> {
    match step {
        Step::Append(count) => append(session, id, *count as usize),
        Step::Insert => session.exec(&format!(
            "insert into nightowls.events (aggregate_type, aggregate_id, event_type, payload) values ('order', '{id}', 'counted', '{{\"by\": 9}}')"
        )),
        Step::Close => session.exec(&format!("select nightowls.append_event('order', '{id}', 'closed')")),
        Step::Snapshot => session.exec(&format!(
            "select nightowls.create_snapshot('chain', '{id}'), nightowls.create_snapshot('handled', '{id}')"
        )),
        Step::Policy(every) => session.exec(&format!("select nightowls.set_snapshot_policy('chain', {every})")),
        Step::Compact { keep, ms } => match session.try_exec(&format!(
            "select nightowls.compact_aggregate('order', '{id}', {keep}, max_ms => {ms})"
        )) {
            // Nothing may go yet.
            Err(refusal) if refusal.code == "NW006" => (),
            other => other?,
        },
        Step::Restore { ms } => session.exec(&format!("select nightowls.restore_aggregate('order', '{id}', {ms})")),
        Step::Rebuild => session.exec("select nightowls.rebuild_projection('chain'), nightowls.rebuild_projection('handled')"),
        Step::Sweep => session.exec("select nightowls.create_snapshots(), nightowls.compact(max_ms => 50)"),
    }
    Ok(())
}

#[test]
fn every_state_is_that_of_a_full_replay_whatever_was_done_to_the_history() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        chain(&mut owner, "100");
        owner.exec(HANDLER);
        owner.exec("select nightowls.set_compaction('order', keep => 20, min_events => 100)");
        let session = RefCell::new(db.service());
        let number = Cell::new(0);
        let mut runner = TestRunner::new(Config {
            cases: 14,
            failure_persistence: None,
            max_shrink_iters: 60,
            ..Config::default()
        });
        let run = runner.run(&steps(), |steps| {
            number.set(number.get() + 1);
            let id = format!("o{}", number.get());
            let mut session = session.borrow_mut();
            append(&mut session, &id, 1);
            for done in &steps {
                step(&mut session, &id, done).map_err(|refusal| TestCaseError::fail(refusal.to_string()))?;
                let head: i64 = text(&mut session, &format!("select version from nightowls.last_event('order', '{id}')"))
                    .parse()
                    .expect("a number");
                for version in [1, head / 2, head - 1, head] {
                    let chained = text(&mut session, &format!("select nightowls.state_at('chain', '{id}', {version})"));
                    prop_assert_eq!(chained, if version == 0 { "null".to_owned() } else { replay(&mut session, &id, version) }, "{:?}, version {}", done, version);
                    if version > 0 {
                        let counted = text(&mut session, &format!("select nightowls.state_at('handled', '{id}', {version})"));
                        prop_assert_eq!(counted, handled(&mut session, &id, version), "{:?}, version {}", done, version);
                    }
                }
                prop_assert_eq!(
                    text(&mut session, &format!("select nightowls.state('chain', '{id}')")),
                    replay(&mut session, &id, head)
                );
                let whole = text(
                    &mut session,
                    &format!(
                        "select count(*) = {head} and bool_and(version = no) from (
                           select e.version, row_number() over (order by e.position) as no from nightowls.all_events e where e.aggregate_id = '{id}') e"
                    ),
                );
                prop_assert_eq!(whole, "t", "{:?}", done);
            }
            Ok(())
        });
        if let Err(error) = run {
            panic!("{error}");
        }
        let mut session = session.borrow_mut();
        verified(&mut session, "chain");
        verified(&mut session, "handled");
    });
}

#[test]
fn writers_readers_snapshots_compactions_restores_and_builds_at_once_lose_nothing() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        chain(&mut owner, "10");
        owner.exec(HANDLER);
        owner.exec("select nightowls.set_snapshot_policy('handled', 10); select nightowls.set_compaction('order', keep => 3, min_events => 5)");
        let mut service = db.service();
        for id in ["a", "b"] {
            append(&mut service, id, 30);
        }
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let writers: Vec<_> = (0..2)
                .map(|writer| {
                    scope.spawn(move || {
                        let mut session = db.service();
                        let mut random = Random::new(writer);
                        for round in 0..60 {
                            let id = if random.chance(50) { "a" } else { "b" };
                            match random.below(4) {
                                0 => append(&mut session, id, 7),
                                1 => {
                                    session.exec("begin");
                                    append(&mut session, id, 3);
                                    session.exec(if random.chance(50) { "commit" } else { "rollback" });
                                }
                                2 => session.exec(&format!("select nightowls.append_event('order', '{id}', 'counted', '{{\"by\": {round}}}')")),
                                _ => {
                                    // Two such inserts at once can meet: the second is told.
                                    let inserted = session.try_exec(&format!(
                                        "insert into nightowls.events (aggregate_type, aggregate_id, event_type, payload) values ('order', '{id}', 'counted', '{{\"by\": 2}}')"
                                    ));
                                    if let Err(refusal) = inserted {
                                        assert_eq!(refusal.code, "23505", "{refusal}");
                                    }
                                }
                            }
                        }
                    })
                })
                .collect();
            let done = &done;
            for (role, work) in [
                (
                    SERVICE,
                    "select nightowls.compact_aggregate('order', 'a', 2, max_ms => 5)",
                ),
                (SERVICE, "select nightowls.compact(max_ms => 10)"),
                (
                    SERVICE,
                    "select nightowls.restore_aggregate('order', 'a', 1); select nightowls.restore_aggregate('order', 'b', 1)",
                ),
                (
                    SERVICE,
                    "select nightowls.create_snapshot('chain', 'a'), nightowls.create_snapshot('handled', 'b')",
                ),
                (
                    db.install().owner(),
                    "select nightowls.rebuild_projection('chain'); select nightowls.rebuild_projection('handled')",
                ),
            ] {
                scope.spawn(move || {
                    let mut session = db.session(role);
                    while !done.load(Ordering::Relaxed) {
                        if let Err(refusal) = session.try_exec(work) {
                            assert_eq!(refusal.code, "NW006", "{work}: {refusal}");
                        }
                    }
                });
            }
            for reader in 0..2 {
                scope.spawn(move || {
                    let mut session = db.service();
                    let mut random = Random::new(100 + reader);
                    while !done.load(Ordering::Relaxed) {
                        let id = if random.chance(50) { "a" } else { "b" };
                        let version = 1 + random.below(60) as i64;
                        let version = version.min(text(&mut session, &format!("select version from nightowls.last_event('order', '{id}')")).parse().expect("a number"));
                        assert_state(&mut session, id, version);
                        let counted = text(&mut session, &format!("select nightowls.state_at('handled', '{id}', {version})"));
                        assert_eq!(counted, handled(&mut session, id, version), "{id} at {version}");
                        let whole = text(
                            &mut session,
                            &format!("select count(*) = max(version) and count(*) = count(distinct version) from nightowls.read_aggregate('order', '{id}', 1, 1000000, true)"),
                        );
                        assert_eq!(whole, "t", "{id}");
                    }
                });
            }
            let ended: Vec<_> = writers
                .into_iter()
                .map(thread::ScopedJoinHandle::join)
                .collect();
            done.store(true, Ordering::Relaxed);
            for writer in ended {
                writer.expect("a writer ends well");
            }
        });
        let mut service = db.service();
        service.exec(
            "select nightowls.refresh_projection('chain'), nightowls.refresh_projection('handled')",
        );
        for id in ["a", "b"] {
            let head: i64 = text(
                &mut service,
                &format!("select version from nightowls.last_event('order', '{id}')"),
            )
            .parse()
            .expect("a number");
            for version in [1, head / 3, head / 2, head] {
                assert_state(&mut service, id, version);
            }
            let state = text(
                &mut service,
                &format!(
                    "select state from nightowls.projection_states where projection = 'handled' and aggregate_id = '{id}'"
                ),
            );
            assert_eq!(state, handled(&mut service, id, head));
        }
        for projection in ["chain", "handled"] {
            verified(&mut service, projection);
        }
    });
}

#[test]
fn a_server_killed_in_the_middle_of_a_compaction_has_lost_nothing_and_goes_on() {
    own_cluster(|cluster| {
        for install in Install::ALL {
            let db = cluster.database(install);
            let org = default_org(&db);
            let mut superuser = db.superuser();
            write_history(&mut superuser, &org, "a", 12_000);
            chain(&mut superuser, "1000");
            let before = history(&db);
            // One slice is there; the next is under way when the server dies, in the proof first, then in the moving.
            let mut service = db.service();
            compact(&mut service, "a", ", max_ms => 1");
            for phase in ["proving", "moving"] {
                while phase == "moving"
                    && text(
                        &mut service,
                        "select coalesce(max(compacted_to), 0) > 0 from nightowls.compactions",
                    ) == "f"
                {
                    compact(&mut service, "a", ", max_ms => 1");
                }
                let kept = (
                    extent(&mut service, "a"),
                    lines(&mut service, "select phase, done from nightowls.progress"),
                );
                assert_eq!(kept.1[0].split(' ').next(), Some(phase));
                let pid = service.pid();
                thread::scope(|scope| {
                    let dying = scope.spawn(|| {
                        // Longer than the server lives: what it has done is not committed.
                        let mut done = Ok(());
                        while done.is_ok() {
                            done = service.try_exec(
                                "begin; select nightowls.compact_aggregate('order', 'a', max_ms => 600000); rollback",
                            );
                        }
                    });
                    let mut watcher = db.superuser();
                    wait_until("it writes", Duration::from_secs(20), || {
                        text(
                            &mut watcher,
                            &format!(
                                "select count(*) from pg_stat_activity where pid = {pid} and backend_xid is not null and query like '%compact_aggregate%'"
                            ),
                        ) == "1"
                    });
                    cluster.kill9_postmaster_and_restart();
                    dying.join().expect("it ends");
                });
                service = db.service();
                assert_eq!(
                    (
                        extent(&mut service, "a"),
                        lines(&mut service, "select phase, done from nightowls.progress")
                    ),
                    kept
                );
                assert_eq!(history(&db), before);
            }
            while compact(&mut service, "a", ", max_ms => 1000").contains(" t ") {}
            assert_eq!(extent(&mut service, "a"), "1..11999 11999 | 12000..12000 1");
            assert_eq!(history(&db), before);
            verified(&mut service, "chain");
        }
    });
}

/// The most memory that a backend has had, in kB; what it shares with others counts too.
fn peak(pid: i32) -> u64 {
    let status =
        std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the process is there");
    status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok())
        .expect("a process has a peak")
}

#[test]
fn folding_a_long_history_takes_little_memory_in_every_way() {
    on_each_install(|db| {
        if !cfg!(target_os = "linux") {
            return skip("/proc");
        }
        let org = default_org(db);
        let count = match db.install() {
            Install::Extension => long_history(300_000),
            Install::Plain => long_history(40_000),
        };
        let mut superuser = db.superuser();
        write_history(&mut superuser, &org, "long", count);
        superuser.exec(&format!(
            "begin;
             set local session_replication_role = replica;
             insert into nightowls.events (org_id, aggregate_type, aggregate_id, version, event_type, payload)
             select '{org}', 'other', 'handled', i, 'counted', '{{\"by\": 1}}' from generate_series(1, 30000) i;
             commit"
        ));
        chain(&mut superuser, "null");
        superuser.exec("begin; set local session_replication_role = replica; delete from nightowls._projection_states; commit");
        superuser.exec(&HANDLER.replace("'order'", "'other'"));
        let mut folded = Vec::new();
        for work in [
            "select nightowls.state('chain', 'long')",
            "select nightowls.create_snapshot('chain', 'long')",
            "select nightowls.rebuild_projection('chain')",
            "select nightowls.alter_projection('handled', handler => 'public.counted')",
            "select nightowls.verify_projection('chain')",
            "select nightowls.create_snapshot('chain', 'long')",
            "select nightowls.compact_aggregate('order', 'long', max_ms => 600000)",
            "select nightowls.state_at('chain', 'long', 29999)",
            "select nightowls.restore_aggregate('order', 'long', max_ms => 600000)",
        ] {
            let mut session = db.direct(db.install().owner());
            session.exec(work);
            folded.push((peak(session.pid()), work));
        }
        assert!(
            folded.iter().all(|(kilobytes, _)| *kilobytes < 200 * 1024),
            "{folded:?}"
        );
        if std::env::var_os("NIGHTOWLS_SHOW_BUFFERS").is_some() {
            println!("{}: {count} events: {folded:?}", db.install());
        }
    });
}
