//! Snapshots: a state is made of the nearest one and the events after it, and is
//! the state that a full replay gives.

use std::time::Duration;

use crate::fixture::{default_org, is_blocked, lines, new_org};
use crate::projections::{buffers, text};
use crate::support::{
    Db, SERVICE, STRANGER, Session, on_each_install, on_each_route, quote, wait_until,
};

/// Notices an event that is missing, twice or out of order.
pub const CHAIN: &str = r#"{"initial": {"n": 0}, "on": {"closed": [{"op": "tombstone"}]},
    "otherwise": [{"op": "add", "path": "n", "value": "$.by"}, {"op": "add", "path": "count"},
                  {"op": "set", "path": "last", "value": "@.version"}, {"op": "set", "path": "at", "value": "@.position"},
                  {"op": "set", "path": "before", "value": "$.by"}]}"#;

/// Makes projection `chain` of type `order`, with a snapshot every `every` events.
#[track_caller]
pub fn chain(session: &mut Session, every: &str) {
    session.exec(&format!(
        "select nightowls.create_projection('chain', 'order', {}); select nightowls.set_snapshot_policy('chain', {every})",
        quote(CHAIN)
    ));
}

/// Appends `count` events to an aggregate, one call.
#[track_caller]
pub fn append(session: &mut Session, id: &str, count: usize) {
    session.exec(&format!(
        "select nightowls.append_events('order', {}, (
           select jsonb_agg(jsonb_build_object('event_type', 'counted', 'payload', jsonb_build_object('by', i % 7)))
             from generate_series(1, {count}) i))",
        quote(id)
    ));
}

/// Version and state of what a replay of everything gives, made without any of what is tested.
#[track_caller]
pub fn replay(session: &mut Session, id: &str, to_version: i64) -> String {
    text(
        session,
        &format!(
            "select nightowls.fold_events(p.reducer, row (e.*)::nightowls.events order by e.version)
               from nightowls.all_events e
               join nightowls.projections p on p.org_id = e.org_id and p.name = 'chain'
              where e.org_id = nightowls.current_org() and e.aggregate_type = 'order' and e.aggregate_id = {}
                and e.version <= {to_version}",
            quote(id)
        ),
    )
}

#[track_caller]
fn versions(session: &mut Session, id: &str) -> Vec<i64> {
    lines(
        session,
        &format!(
            "select s.version from nightowls.snapshots s
               join nightowls.projections p on p.org_id = s.org_id and p.name = s.projection and p.generation = s.generation
              where s.projection = 'chain' and s.aggregate_id = {} and s.org_id = nightowls.current_org() order by 1",
            quote(id)
        ),
    )
    .iter()
    .map(|version| version.parse().expect("a number"))
    .collect()
}

/// As after a crash of everything but the log and the snapshots.
#[track_caller]
fn forget_states(db: &Db) {
    db.superuser().exec(
        "begin; set local session_replication_role = replica; delete from nightowls._projection_states; commit",
    );
}

#[track_caller]
fn assert_every_version(session: &mut Session, id: &str, head: i64) {
    for version in 1..=head {
        let state = text(
            session,
            &format!(
                "select nightowls.state_at('chain', {}, {version})",
                quote(id)
            ),
        );
        assert_eq!(state, replay(session, id, version), "version {version}");
    }
    let state = text(
        session,
        &format!("select nightowls.state('chain', {})", quote(id)),
    );
    assert_eq!(state, replay(session, id, head));
}

#[test]
fn an_append_that_passes_a_multiple_takes_a_snapshot_in_its_own_transaction() {
    on_each_route(|db| {
        default_org(db);
        let mut owner = db.owner();
        chain(&mut owner, "10");
        owner.exec("create function public.counted(state jsonb, event nightowls.events) returns jsonb language sql
                      return jsonb_build_object('n', coalesce((state ->> 'n')::bigint, 0) + (event).version);
                    select nightowls.create_projection('handled', 'order', handler => 'public.counted');
                    select nightowls.set_snapshot_policy('handled', 10)");
        let mut service = db.service();
        // One by one, a batch across two multiples, several aggregates, a plain insert; and one that is rolled back.
        for _ in 0..10 {
            append(&mut service, "one", 1);
        }
        append(&mut service, "batch", 25);
        service.exec(
            r#"select nightowls.append_many((select jsonb_agg(jsonb_build_object('aggregate_type', 'order', 'aggregate_id', id,
                 'events', (select jsonb_agg('{"event_type": "counted", "payload": {"by": 1}}'::jsonb) from generate_series(1, 12))))
                 from unnest('{m1,m2}'::text[]) id));
               insert into nightowls.events (aggregate_type, aggregate_id, event_type, payload)
               select 'order', 'plain', 'counted', '{"by": 2}' from generate_series(1, 10)"#,
        );
        append(&mut service, "undone", 9);
        service.exec("begin");
        append(&mut service, "undone", 1);
        assert_eq!(versions(&mut service, "undone"), [10]);
        service.exec("rollback");

        for (id, expected) in [
            ("one", vec![10]),
            ("batch", vec![25]),
            ("m1", vec![12]),
            ("m2", vec![12]),
            ("plain", vec![10]),
            ("undone", vec![]),
        ] {
            assert_eq!(versions(&mut service, id), expected, "{id}");
        }
        assert_eq!(
            lines(
                &mut service,
                "select s.projection, s.aggregate_id, s.version from nightowls.snapshots s where s.projection = 'handled' order by 2"
            ),
            [
                "handled batch 25",
                "handled m1 12",
                "handled m2 12",
                "handled one 10",
                "handled plain 10"
            ]
        );
        // What a snapshot says is what a replay says.
        assert_eq!(
            lines(
                &mut service,
                "select s.projection, s.aggregate_id from nightowls.snapshots s
                   join nightowls.events e on e.org_id = s.org_id and e.aggregate_type = 'order' and e.aggregate_id = s.aggregate_id
                                          and e.version = s.version
                  where s.position <> e.position
                     or s.latest_at <> (select max(x.created_at) from nightowls.events x
                                         where x.org_id = s.org_id and x.aggregate_type = 'order' and x.aggregate_id = s.aggregate_id
                                           and x.version <= s.version)
                     or s.state <> (select a.state from nightowls.projection_states a
                                     where a.org_id = s.org_id and a.projection = s.projection and a.aggregate_id = s.aggregate_id)"
            ),
            Vec::<String>::new()
        );
    });
}

#[test]
fn without_a_policy_there_are_no_snapshots_but_those_asked_for() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        chain(&mut owner, "null");
        let mut service = db.service();
        append(&mut service, "a", 2500);
        append(&mut service, "a", 2500);
        assert_eq!(versions(&mut service, "a"), Vec::<i64>::new());
        assert_eq!(
            text(
                &mut service,
                "select count(*) from nightowls.create_snapshots()"
            ),
            "0"
        );
        assert_eq!(
            text(
                &mut service,
                "select nightowls.create_snapshot('chain', 'a')"
            ),
            "5000"
        );
        assert_eq!(versions(&mut service, "a"), [5000]);
        assert_eq!(
            text(
                &mut service,
                "select nightowls.create_snapshot('chain', 'nobody')"
            ),
            "null"
        );

        // The setting is for projections that are made after it.
        for (value, every) in [("'50'", "50"), ("'0'", "null"), ("'null'", "null")] {
            owner.exec(&format!(
                "insert into nightowls.settings values ('snapshot_every', {value}) on conflict (name) do update set value = excluded.value;
                 select nightowls.create_projection('as set', 'order', '{{\"otherwise\": []}}')"
            ));
            let found = text(
                &mut owner,
                "select snapshot_every from nightowls.projections where name = 'as set'",
            );
            assert_eq!(found, every, "{value}");
            owner.exec("select nightowls.drop_projection('as set')");
        }
        for value in ["'\"x\"'", "'-1'", "'1.5'", "'[]'", "'3000000000'"] {
            owner.exec(&format!(
                "update nightowls.settings set value = {value} where name = 'snapshot_every'"
            ));
            let refusal =
                owner.refused("select nightowls.create_projection('as set', 'order', '{}')");
            assert_eq!(refusal.code, "22023", "{value}");
        }
        owner.exec(
            "delete from nightowls.settings where name = 'snapshot_every';
                    select nightowls.create_projection('as set', 'order', '{}')",
        );
        let found = text(
            &mut owner,
            "select snapshot_every from nightowls.projections where name = 'as set'",
        );
        assert_eq!(found, "1000");
    });
}

#[test]
fn an_older_snapshot_never_replaces_a_newer_one() {
    on_each_install(|db| {
        default_org(db);
        chain(&mut db.owner(), "null");
        let (mut ann, mut bob, mut eve) = (db.service(), db.service(), db.service());
        append(&mut ann, "a", 5);
        // The older one is written first and committed last; and one that is written last of all.
        ann.exec("begin");
        assert_eq!(
            text(&mut ann, "select nightowls.create_snapshot('chain', 'a')"),
            "5"
        );
        append(&mut bob, "a", 1);
        eve.exec("begin isolation level repeatable read; select 1 from nightowls.events");
        append(&mut bob, "a", 3);
        assert_eq!(
            text(&mut bob, "select nightowls.create_snapshot('chain', 'a')"),
            "9"
        );
        ann.exec("commit");
        assert_eq!(
            text(&mut eve, "select nightowls.create_snapshot('chain', 'a')"),
            "6"
        );
        eve.exec("commit");
        append(&mut bob, "a", 2);

        forget_states(db);
        let base = "select b.version from nightowls.projections p cross join lateral nightowls._base(p, 'a', null) b where p.name = 'chain'";
        assert_eq!(text(&mut bob, base), "9");
        assert_every_version(&mut bob, "a", 11);
    });
}

#[test]
fn two_snapshots_of_one_version_are_one_and_appends_wait_for_neither() {
    on_each_install(|db| {
        default_org(db);
        chain(&mut db.owner(), "5");
        let (mut ann, mut bob, mut eve) = (db.service(), db.service(), db.service());
        append(&mut ann, "a", 12);
        ann.exec("begin; select nightowls.create_snapshot('chain', 'a')");
        // Passes a multiple and thins out beside the open snapshot.
        bob.exec("set lock_timeout = '5s'");
        append(&mut bob, "a", 8);
        eve.exec("begin; select nightowls.create_snapshot('chain', 'a')");
        append(&mut bob, "a", 40);
        ann.exec("commit");
        eve.exec("commit");
        assert_eq!(
            text(&mut bob, "select nightowls.create_snapshot('chain', 'a')"),
            "60"
        );
        assert_eq!(
            text(&mut bob, "select nightowls.create_snapshot('chain', 'a')"),
            "60"
        );
        assert_every_version(&mut bob, "a", 60);
    });
}

#[test]
fn snapshots_grow_thin_with_age_and_every_state_is_near_one() {
    on_each_install(|db| {
        default_org(db);
        chain(&mut db.owner(), "2");
        let mut service = db.service();
        for _ in 0..300 {
            append(&mut service, "a", 2);
        }
        let kept = versions(&mut service, "a");
        assert!(kept.len() < 30, "{kept:?}");
        assert_eq!(kept.last(), Some(&600));
        // At a distance d from the head the next older snapshot is not further than d and a little more.
        for version in 1..=600_i64 {
            let base = kept
                .iter()
                .rev()
                .find(|kept| **kept <= version)
                .unwrap_or(&0);
            assert!(
                version - base <= (600 - version) + 10,
                "version {version}, nearest {base}: {kept:?}"
            );
        }
        for version in [1, 2, 3, 299, 300, 301, 555, 590, 597, 598, 599, 600] {
            let state = text(
                &mut service,
                &format!("select nightowls.state_at('chain', 'a', {version})"),
            );
            assert_eq!(
                state,
                replay(&mut service, "a", version),
                "version {version}"
            );
        }
    });
}

/// Writes `count` events of an aggregate as appends would, without the time they take.
#[track_caller]
pub fn write_history(session: &mut Session, org: &str, id: &str, count: u64) {
    session.exec(&format!(
        "begin;
         set local session_replication_role = replica;
         insert into nightowls.events (org_id, aggregate_type, aggregate_id, version, event_type, payload)
         select '{org}', 'order', {}, i, 'counted', '{{\"by\": 1}}' from generate_series(1, {count}) i;
         commit",
        quote(id)
    ));
}

/// How many events a long history has here: with `NIGHTOWLS_EVENTS=1000000` as many as the promise speaks of.
pub fn long_history(default: u64) -> u64 {
    std::env::var("NIGHTOWLS_EVENTS")
        .ok()
        .and_then(|count| count.parse().ok())
        .unwrap_or(default)
}

#[test]
fn a_long_history_with_a_snapshot_is_loaded_as_cheaply_as_a_short_one() {
    on_each_install(|db| {
        let org = default_org(db);
        let count = long_history(100_000);
        let mut superuser = db.superuser();
        write_history(&mut superuser, &org, "short", 1000);
        write_history(&mut superuser, &org, "long", count - 1000);
        chain(&mut superuser, "1000");
        let mut service = db.service();
        // The snapshot that the build took, and a tail as long as the short history.
        superuser.exec(&format!(
            "begin;
             set local session_replication_role = replica;
             insert into nightowls.events (org_id, aggregate_type, aggregate_id, version, event_type, payload)
             select '{org}', 'order', 'long', i, 'counted', '{{\"by\": 1}}' from generate_series({count} - 999, {count}) i;
             delete from nightowls._projection_states;
             delete from nightowls.snapshots where aggregate_id = 'short';
             commit"
        ));
        for (what, short, long) in [
            (
                "state",
                "state('chain', 'short')".to_owned(),
                "state('chain', 'long')".to_owned(),
            ),
            (
                "state_at",
                "state_at('chain', 'short', 998)".to_owned(),
                format!("state_at('chain', 'long', {count} - 2)"),
            ),
            (
                "state_at_time",
                "state_at_time('chain', 'short', 'now')".to_owned(),
                "state_at_time('chain', 'long', 'now')".to_owned(),
            ),
        ] {
            let short = buffers(&mut service, &format!("select nightowls.{short}"));
            let long = buffers(&mut service, &format!("select nightowls.{long}"));
            assert!(
                long * 2 <= short * 3,
                "{what}: {long} buffers, of the short one {short}"
            );
        }
        assert_eq!(
            text(
                &mut service,
                "select nightowls.state('chain', 'long') ->> 'n'"
            ),
            count.to_string()
        );
    });
}

#[test]
fn a_time_is_looked_for_from_the_newest_snapshot_that_holds_nothing_later() {
    on_each_install(|db| {
        let org = default_org(db);
        let mut superuser = db.superuser();
        // A clock that goes back: version 30 is later than all others.
        superuser.exec(&format!(
            "begin;
             set local session_replication_role = replica;
             insert into nightowls.events (org_id, aggregate_type, aggregate_id, version, event_type, payload, created_at)
             select '{org}', 'order', 'a', i, 'counted', '{{\"by\": 1}}',
                    '2026-01-01'::timestamptz + case when i = 30 then interval '1 year' else i * interval '1 minute' end
               from generate_series(1, 60) i;
             commit"
        ));
        chain(&mut superuser, "7");
        let mut service = db.service();
        let when = "'2026-01-01'::timestamptz + ";
        for (at, version) in [
            ("interval '0'", "null"),
            ("interval '5 minutes'", "5"),
            ("interval '29 minutes'", "29"),
            // The first event after the time ends the history, though later versions are of before it.
            ("interval '45 minutes'", "29"),
            ("interval '2 years'", "60"),
        ] {
            for stored in [true, false] {
                if !stored {
                    forget_states(db);
                }
                let last = text(
                    &mut service,
                    &format!("select nightowls.state_at_time('chain', 'a', {when}{at}) ->> 'last'"),
                );
                assert_eq!(last, version, "{at}");
            }
            superuser.exec("select nightowls.rebuild_projection('chain'), nightowls.create_snapshot('chain', 'a')");
        }
    });
}

#[test]
fn a_projection_that_folds_otherwise_uses_no_older_snapshot() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        chain(&mut owner, "3");
        let mut service = db.service();
        append(&mut service, "a", 10);
        owner.exec(r#"select nightowls.alter_projection('chain', '{"otherwise": [{"op": "add", "path": "m"}]}')"#);
        for version in 1..=10_i64 {
            let state = text(
                &mut service,
                &format!("select nightowls.state_at('chain', 'a', {version})"),
            );
            assert_eq!(state, format!("{{\"m\": {version}}}"));
        }
        // Made again under the old name.
        owner.exec("select nightowls.drop_projection('chain')");
        assert_eq!(
            text(&mut owner, "select count(*) from nightowls.snapshots"),
            "0"
        );
        chain(&mut owner, "3");
        assert_every_version(&mut service, "a", 10);

        // A handler whose code has changed: from the rebuild on by the new one.
        owner.exec("create function public.counted(state jsonb, event nightowls.events) returns jsonb language sql return '{\"old\": true}'::jsonb;
                    select nightowls.create_projection('handled', 'order', handler => 'public.counted');
                    select nightowls.set_snapshot_policy('handled', 3)");
        append(&mut service, "a", 10);
        owner.exec("create or replace function public.counted(state jsonb, event nightowls.events) returns jsonb language sql
                      return jsonb_build_object('n', coalesce((state ->> 'n')::bigint, 0) + 1);
                    select nightowls.rebuild_projection('handled')");
        for version in [1, 5, 9, 10, 19, 20] {
            let state = text(
                &mut service,
                &format!("select nightowls.state_at('handled', 'a', {version})"),
            );
            assert_eq!(state, format!("{{\"n\": {version}}}"));
        }
    });
}

#[test]
fn a_rebuild_repairs_a_snapshot_that_was_tampered_with() {
    on_each_install(|db| {
        default_org(db);
        chain(&mut db.owner(), "5");
        let mut service = db.service();
        append(&mut service, "a", 18);
        db.superuser().exec(
            "begin; set local session_replication_role = replica;
             update nightowls.snapshots set state = '{\"n\": 666}'; update nightowls._projection_states set state = '{\"n\": 666}'; commit",
        );
        db.owner()
            .exec("select nightowls.rebuild_projection('chain')");
        assert_every_version(&mut service, "a", 18);
    });
}

#[test]
fn an_append_open_across_a_build_writes_no_snapshot_that_counts() {
    on_each_install(|db| {
        default_org(db);
        chain(&mut db.owner(), "5");
        let mut open = db.service();
        append(&mut open, "a", 4);
        open.exec("begin");
        append(&mut open, "a", 1);
        db.owner().exec(r#"select nightowls.alter_projection('chain', '{"otherwise": [{"op": "add", "path": "m"}]}')"#);
        open.exec("commit");
        assert_eq!(versions(&mut db.service(), "a"), Vec::<i64>::new());
        for version in 1..=5_i64 {
            let state = text(
                &mut db.service(),
                &format!("select nightowls.state_at('chain', 'a', {version})"),
            );
            assert_eq!(state, format!("{{\"m\": {version}}}"));
        }
    });
}

#[test]
fn a_snapshot_never_runs_a_handler_as_the_owner() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        db.superuser().exec(&format!(
            "create table public.callers (who text); grant insert, select on public.callers to {SERVICE};
             create function public.spy(state jsonb, event nightowls.events) returns jsonb language plpgsql as $$
             begin insert into public.callers values (current_user); return jsonb_build_object('v', (event).version); end $$"
        ));
        owner.exec("select nightowls.create_projection('spied', 'order', handler => 'public.spy')");
        let mut service = db.service();
        service.exec("select nightowls.set_snapshot_policy('spied', 2)");
        append(&mut service, "a", 5);
        forget_states(db);
        service.exec("select nightowls.create_snapshot('spied', 'a'); select nightowls.state_at('spied', 'a', 3)");
        append(&mut service, "b", 5);
        db.superuser().exec(
            "begin; set local session_replication_role = replica; delete from nightowls.snapshots; commit",
        );
        service.exec("select * from nightowls.create_snapshots()");
        let who = lines(&mut service, "select distinct who from public.callers");
        assert_eq!(who, [SERVICE]);
    });
}

#[test]
fn nobody_writes_a_snapshot_but_its_projection() {
    on_each_install(|db| {
        default_org(db);
        chain(&mut db.owner(), "2");
        append(&mut db.service(), "a", 4);
        for table in ["snapshots", "_replays"] {
            for sql in [
                format!("update nightowls.{table} set state = '{{\"n\": 666}}'"),
                format!("delete from nightowls.{table}"),
                format!("truncate nightowls.{table}"),
                format!("insert into nightowls.{table} select * from nightowls.{table}"),
            ] {
                assert_eq!(db.owner().refused(&sql).code, "NW008", "{sql}");
                let mut service = db.service();
                service.exec("begin; select nightowls._open_door('project')");
                assert_eq!(service.refused(&sql).code, "42501", "{sql}");
                service.exec("rollback");
            }
        }
        let mut service = db.service();
        let generation = text(
            &mut service,
            "select generation from nightowls.projections where name = 'chain'",
        );
        // What writes them for handlers does so for no other kind.
        for sql in [
            format!("select nightowls._save_snapshot(nightowls.current_org(), 'chain', {generation}, 'a', 3, 3, '{{\"n\": 666}}')"),
            "select nightowls._save_replay(nightowls.current_org(), 'chain', 'a', 3, 3, '{\"n\": 666}')".to_owned(),
        ] {
            assert_eq!(service.refused(&sql).code, "NW008", "{sql}");
        }
        let forged = "select nightowls._store_snapshot(p, 'a', 3, 3, '{\"n\": 666}') from nightowls.projections p where p.name = 'chain'";
        assert_eq!(service.refused(forged).code, "42501");
        let forged = "select nightowls._note_replay(p, 'a', 3, 3, '{\"n\": 666}') from nightowls.projections p where p.name = 'chain'";
        assert_eq!(service.refused(forged).code, "42501");
        assert_every_version(&mut service, "a", 4);
    });
}

#[test]
fn the_sweep_takes_what_is_missing_of_all_orgs_in_turn() {
    on_each_route(|db| {
        let one = default_org(db);
        let two = new_org(db, "two");
        let mut owner = db.owner();
        for org in [&one, &two] {
            owner.exec(&format!(
                "select nightowls.create_projection('chain', 'order', {}, org => '{org}');
                 select nightowls.set_snapshot_policy('chain', null, '{org}')",
                quote(CHAIN)
            ));
        }
        let mut service = db.service();
        // A busy org and one with little.
        for (org, count) in [(&one, 40), (&two, 2)] {
            for i in 0..count {
                service.exec(&format!(
                    "select nightowls.append_events('order', 'o{i}', (select jsonb_agg('{{\"event_type\": \"counted\", \"payload\": {{\"by\": 1}}}}'::jsonb) from generate_series(1, 10)), org => '{org}')"
                ));
            }
            owner.exec(&format!(
                "select nightowls.set_snapshot_policy('chain', 10, '{org}')"
            ));
        }
        let taken = lines(
            &mut service,
            "select org_id, projection, aggregate_id, version, error from nightowls.create_snapshots(max_aggregates => 5)",
        );
        assert_eq!(taken.len(), 5, "{taken:?}");
        let again = lines(
            &mut service,
            "select distinct org_id from nightowls.create_snapshots(max_aggregates => 3)",
        );
        let first = taken[0].split(' ').next().unwrap_or_default().to_owned();
        assert_ne!(again, [first], "the other org had no turn");
        while text(
            &mut service,
            "select count(*) from nightowls.create_snapshots(max_aggregates => 7)",
        ) != "0"
        {}
        assert_eq!(
            lines(
                &mut service,
                "select count(*), count(distinct (org_id, aggregate_id)), min(version), max(version) from nightowls.snapshots"
            ),
            ["42 42 10 10"]
        );
        assert_eq!(
            text(
                &mut service,
                "select count(*) from nightowls.snapshots s where (s.state ->> 'n')::int <> 10"
            ),
            "0"
        );
    });
}

#[test]
fn the_sweep_goes_on_past_a_handler_that_fails_and_says_so() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        owner.exec("create function public.moody(state jsonb, event nightowls.events) returns jsonb language plpgsql as $$
                    begin
                      if (event).aggregate_id = 'b' and current_setting('app.bad', true) = 'yes' then
                        raise exception 'not today' using errcode = 'AP001';
                      end if;
                      return jsonb_build_object('n', (event).version);
                    end $$;
                    select nightowls.create_projection('moody', 'order', handler => 'public.moody');
                    select nightowls.set_snapshot_policy('moody', null)");
        let mut service = db.service();
        for id in ["a", "b", "c"] {
            append(&mut service, id, 5);
        }
        service.exec("select nightowls.set_snapshot_policy('moody', 5)");
        // Stored states that are behind, so that the handler is called.
        db.superuser().exec(
            "begin; set local session_replication_role = replica; update nightowls._projection_states set version = 4 where version = 5;
             update nightowls.projections set snapshot_every = 4; commit",
        );
        service.exec("set app.bad = 'yes'");
        let taken = lines(
            &mut service,
            "select aggregate_id, version, error from nightowls.create_snapshots()",
        );
        assert_eq!(taken, ["a 5 null", "b null AP001 not today", "c 5 null"]);
    });
}

#[test]
fn only_one_sweep_of_a_kind_runs_and_nobody_waits_for_it() {
    on_each_install(|db| {
        default_org(db);
        chain(&mut db.owner(), "5");
        let (mut ann, mut bob) = (db.service(), db.service());
        append(&mut ann, "a", 4);
        db.superuser().exec(
            "begin; set local session_replication_role = replica; update nightowls.projections set snapshot_every = 2; commit",
        );
        ann.exec("begin; select * from nightowls.create_snapshots()");
        bob.exec("set lock_timeout = '5s'");
        assert_eq!(
            text(
                &mut bob,
                "select count(*) from nightowls.create_snapshots()"
            ),
            "0"
        );
        append(&mut bob, "a", 4);
        ann.exec("commit");
        assert_every_version(&mut bob, "a", 8);
    });
}

#[test]
fn a_snapshot_waits_for_an_erasure_and_never_brings_back_what_it_takes() {
    on_each_install(|db| {
        let org = default_org(db);
        chain(&mut db.owner(), "null");
        let (mut erasing, mut service) = (db.superuser(), db.service());
        append(&mut service, "a", 4);
        erasing.exec(&format!(
            "begin; select pg_advisory_xact_lock(nightowls._lock_class(263), uuid_hash('{org}'))"
        ));
        let pid = service.pid();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                text(
                    &mut service,
                    "select nightowls.create_snapshot('chain', 'a')",
                )
            });
            let mut watcher = db.superuser();
            wait_until("it waits", Duration::from_secs(10), || {
                is_blocked(&mut watcher, pid)
            });
            erasing.exec("commit");
            assert_eq!(waiting.join().expect("it ends"), "4");
        });
    });
}

#[test]
fn two_orgs_with_the_same_names_never_meet_in_a_snapshot() {
    on_each_route(|db| {
        let one = default_org(db);
        let two = new_org(db, "two");
        let mut owner = db.owner();
        for org in [&one, &two] {
            owner.exec(&format!(
                "select nightowls.create_projection('chain', 'order', {}, org => '{org}'); select nightowls.set_snapshot_policy('chain', 2, '{org}')",
                quote(CHAIN)
            ));
        }
        let mut service = db.service();
        for (org, by) in [
            (&one, 1),
            (&two, 100),
            (&one, 1),
            (&two, 100),
            (&one, 1),
            (&two, 100),
        ] {
            service.exec(&format!(
                "select nightowls.append_event('order', 'same', 'counted', '{{\"by\": {by}}}', org => '{org}')"
            ));
        }
        forget_states(db);
        for (org, n) in [(&one, "3"), (&two, "300")] {
            let found = text(
                &mut service,
                &format!("select nightowls.state('chain', 'same', '{org}') ->> 'n'"),
            );
            assert_eq!(found, n);
        }
        owner.exec(&format!(
            "select nightowls.drop_projection('chain', '{one}')"
        ));
        assert_eq!(
            text(
                &mut owner,
                &format!("select count(*) from nightowls.snapshots where org_id = '{two}'")
            ),
            "1"
        );
    });
}

#[test]
fn what_cannot_have_a_snapshot_is_refused() {
    on_each_install(|db| {
        let org = default_org(db);
        let mut owner = db.owner();
        chain(&mut owner, "5");
        owner.exec("select nightowls.create_view_projection('seen', 'select e.org_id, e.position from nightowls.events e')");
        let mut service = db.service();
        for (sql, code) in [
            ("create_snapshot('chian', 'a')", "NW007"),
            ("create_snapshot(null, 'a')", "22004"),
            ("create_snapshot('chain', null)", "22004"),
            ("create_snapshot('seen', 'a')", "22023"),
            (
                "create_snapshot('chain', 'a', '11111111-1111-4111-8111-111111111111')",
                "NW007",
            ),
            ("set_snapshot_policy('chian', 5)", "NW007"),
            ("set_snapshot_policy('chain', 0)", "22023"),
            ("set_snapshot_policy('chain', -5)", "22023"),
            ("set_snapshot_policy('seen', 5)", "22023"),
            ("create_snapshots(0)", "22023"),
            ("create_snapshots(null)", "22004"),
            ("create_snapshots(1, 0)", "22023"),
            ("create_snapshots(1, null)", "22004"),
        ] {
            assert_eq!(
                service.refused(&format!("select nightowls.{sql}")).code,
                code,
                "{sql}"
            );
        }
        // A sweep serves all orgs: no member of one may run it, nor a stranger.
        owner.exec(&format!(
            "insert into nightowls.org_members (org_id, user_id) values ('{org}', 'ann')"
        ));
        let mut stranger = db.session(STRANGER);
        for sql in [
            "create_snapshots()",
            "create_snapshot('chain', 'a')",
            "compact()",
            "compact_aggregate('order', 'a')",
        ] {
            assert_eq!(
                stranger.refused(&format!("select nightowls.{sql}")).code,
                "42501",
                "{sql}"
            );
        }
    });
}
