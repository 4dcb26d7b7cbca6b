//! Async projections: kept by `run_projections`, exact whenever they are asked.

use std::collections::BTreeSet;

use crate::fixture::{default_org, lines, new_org};
use crate::projections::text;
use crate::support::{Db, SERVICE, Session, on_each_install, on_each_route, quote};

const TALLY: &str = r#"{"on": {"counted": [{"op": "add", "path": "n", "value": "$.by"}]}}"#;

#[track_caller]
fn count(session: &mut Session, id: &str, by: &str) {
    session.exec(&format!(
        "select nightowls.append_event('order', '{id}', 'counted', '{{\"by\": {by}}}')"
    ));
}

#[track_caller]
fn project(session: &mut Session, name: &str, reducer: &str) {
    session.exec(&format!(
        "select nightowls.create_projection({}, 'order', {}, mode => 'async')",
        quote(name),
        quote(reducer)
    ));
}

#[track_caller]
fn stored(session: &mut Session, projection: &str) -> Vec<String> {
    lines(
        session,
        &format!(
            "select aggregate_id, version, state ->> 'n' from nightowls.projection_states \
             where projection = '{projection}' order by org_id, aggregate_id"
        ),
    )
}

/// Runs until there is nothing to do; returns how many rows came.
#[track_caller]
fn run(session: &mut Session) -> usize {
    let mut rows = 0;
    loop {
        let done = session
            .rows("select * from nightowls.run_projections()")
            .len();
        if done == 0 {
            return rows;
        }
        rows += done;
    }
}

#[test]
fn an_async_projection_is_stored_by_a_run_and_exact_before_it() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        count(&mut service, "a", "1");
        project(&mut service, "tally", TALLY);
        assert_eq!(
            stored(&mut service, "tally"),
            ["a 1 1"],
            "the build has the history"
        );
        count(&mut service, "a", "2");
        count(&mut service, "b", "5");
        service.exec("select nightowls.append_event('parcel', 'a', 'counted')");
        assert_eq!(
            stored(&mut service, "tally"),
            ["a 1 1"],
            "an append does nothing for it"
        );
        let state = "select nightowls.state('tally', 'a'), nightowls.state('tally', 'b'), nightowls.state_at('tally', 'a', 1)";
        let exact = [r#"{"n": 3} {"n": 5} {"n": 1}"#];
        assert_eq!(lines(&mut service, state), exact);
        assert_eq!(
            lines(
                &mut service,
                "select projection, events, error from nightowls.run_projections()"
            ),
            ["tally 3 null"]
        );
        assert_eq!(run(&mut service), 0);
        assert_eq!(stored(&mut service, "tally"), ["a 2 3", "b 1 5"]);
        assert_eq!(lines(&mut service, state), exact);
        assert_eq!(
            lines(
                &mut service,
                "select * from nightowls.verify_projection('tally')"
            ),
            Vec::<String>::new()
        );
        assert_eq!(
            text(&mut service, "select count(*) from nightowls.routes"),
            "0"
        );
    });
}

#[test]
fn it_is_refreshed_rebuilt_altered_and_dropped_as_others_are() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        project(&mut service, "tally", TALLY);
        project(&mut service, "tally", TALLY);
        let differs = service.refused(&format!(
            "select nightowls.create_projection('tally', 'order', {})",
            quote(TALLY)
        ));
        assert_eq!(differs.code, "42710", "{differs}");
        count(&mut service, "a", "2");
        service.exec("select nightowls.refresh_projection('tally')");
        assert_eq!(stored(&mut service, "tally"), ["a 1 2"]);
        count(&mut service, "a", "2");
        service.exec("select nightowls.rebuild_projection('tally')");
        assert_eq!(stored(&mut service, "tally"), ["a 2 4"]);
        count(&mut service, "b", "7");
        service.exec(
            r#"select nightowls.alter_projection('tally', '{"otherwise": [{"op": "add", "path": "n"}]}')"#,
        );
        assert_eq!(stored(&mut service, "tally"), ["a 2 2", "b 1 1"]);
        count(&mut service, "b", "7");
        run(&mut service);
        assert_eq!(stored(&mut service, "tally"), ["a 2 2", "b 2 2"]);
        // Its consumer is its own.
        for call in [
            "fetch_events",
            "drop_consumer",
            "replay_parked",
            "drop_parked",
        ] {
            let refused = service.refused(&format!("select nightowls.{call}('projection:tally')"));
            assert_eq!(refused.code, "22023", "{call}: {refused}");
        }
        service.exec("select nightowls.drop_projection('tally')");
        assert_eq!(
            text(
                &mut service,
                "select (select count(*) from nightowls.consumers) + (select count(*) from nightowls._consumer_offsets)"
            ),
            "0"
        );
        assert_eq!(run(&mut service), 0);
    });
}

#[test]
fn an_event_that_does_not_fit_holds_back_its_aggregate_and_nothing_else() {
    on_each_install(|db| {
        default_org(db);
        let mut service = db.service();
        project(&mut service, "tally", TALLY);
        count(&mut service, "a", "1");
        count(&mut service, "b", "\"much\"");
        count(&mut service, "c", "3");
        let errors = lines(
            &mut service,
            "select left(error, 5) from nightowls.run_projections()",
        );
        assert_eq!(errors, ["22023"]);
        assert_eq!(stored(&mut service, "tally"), ["a 1 1", "c 1 3"]);
        assert_eq!(
            lines(
                &mut service,
                "select consumer, aggregate_id, version, left(error, 5) from nightowls.parked_events"
            ),
            ["projection:tally b 1 22023"]
        );
        // What it has not folded must not be compacted away.
        assert_eq!(
            lines(&mut service, "select consumer, \"offset\" = (select min(position) from nightowls.events where aggregate_id = 'b') - 1
                                   from nightowls._slowest_consumer(nightowls.current_org(), 'order')"),
            ["projection:tally t"]
        );
        count(&mut service, "a", "1");
        assert_eq!(
            lines(
                &mut service,
                "select error from nightowls.run_projections()"
            ),
            ["null"]
        );
        service.exec(
            r#"select nightowls.alter_projection('tally', '{"on": {"counted": [{"op": "add", "path": "n"}]}}')"#,
        );
        assert_eq!(stored(&mut service, "tally"), ["a 2 2", "b 1 1", "c 1 1"]);
        assert_eq!(
            text(&mut service, "select count(*) from nightowls.parked_events"),
            "0"
        );
    });
}

#[test]
fn its_handler_runs_as_the_caller_of_the_run() {
    on_each_install(|db| {
        default_org(db);
        db.owner().exec(&format!(
            "create table public.ran (who text not null default current_user);
             grant select, insert on public.ran to {SERVICE};
             create function public.see(state jsonb, event nightowls.events) returns jsonb language plpgsql as $$
             begin
               insert into public.ran default values;
               return jsonb_build_object('n', (event).version);
             end $$;
             select nightowls.create_projection('seen', 'order', handler => 'public.see', mode => 'async')"
        ));
        let mut service = db.service();
        count(&mut service, "a", "1");
        count(&mut service, "a", "1");
        assert_eq!(text(&mut service, "select count(*) from public.ran"), "0");
        run(&mut service);
        assert_eq!(
            lines(
                &mut service,
                "select who, count(*) from public.ran group by 1"
            ),
            [format!("{SERVICE} 2")]
        );
        assert_eq!(stored(&mut service, "seen"), ["a 2 2"]);
    });
}

#[test]
fn a_run_is_bounded_and_serves_every_org_in_turn() {
    on_each_install(|db| {
        let busy = default_org(db);
        let quiet: Vec<String> = (0..3).map(|i| new_org(db, &format!("quiet {i}"))).collect();
        let mut service = db.service();
        for org in quiet.iter().chain([&busy]) {
            service.exec(&format!(
                "select nightowls.create_projection('tally', 'order', {}, mode => 'async', org => '{org}')",
                quote(TALLY)
            ));
            let events = if org == &busy { 9000 } else { 3 };
            service.exec(&format!(
                "insert into nightowls.events (org_id, aggregate_type, aggregate_id, version, event_type, payload)
                 select '{org}', 'order', 'o' || i % 3, 1 + i / 3, 'counted', '{{\"by\": 1}}' from generate_series(0, {events} - 1) i"
            ));
        }
        let first = lines(
            &mut service,
            "select sum(events) <= 4000, count(distinct org_id) from nightowls.run_projections(4000)",
        );
        assert_eq!(first, ["t 4"], "the busy one starves nobody");
        run(&mut service);
        for org in quiet.iter().chain([&busy]) {
            let events = text(
                &mut service,
                &format!(
                    "select sum((state ->> 'n')::int) from nightowls.projection_states where org_id = '{org}'"
                ),
            );
            assert_eq!(events, if org == &busy { "9000" } else { "3" });
        }
        for sql in ["0", "null", "max_ms => 0", "max_ms => null"] {
            let code = service
                .refused(&format!("select nightowls.run_projections({sql})"))
                .code;
            assert!(["22023", "22004"].contains(&code.as_str()), "{sql}: {code}");
        }
    });
}

#[test]
fn a_run_beside_open_appends_and_a_rebuild_leaves_out_nothing() {
    on_each_install(|db| {
        default_org(db);
        let mut service = db.service();
        project(&mut service, "tally", TALLY);
        let mut open = db.service();
        open.exec("begin");
        count(&mut open, "late", "1");
        count(&mut service, "a", "1");
        run(&mut service);
        service.exec("select nightowls.rebuild_projection('tally')");
        let mut building = db.service();
        building.exec("begin; select nightowls.rebuild_projection('tally')");
        count(&mut service, "a", "1");
        // Another is at it: left alone, not waited for.
        assert_eq!(run(&mut service), 0);
        open.exec("commit");
        building.exec("commit");
        run(&mut service);
        assert_eq!(stored(&mut service, "tally"), ["a 2 2", "late 1 1"]);
        assert_eq!(
            text(
                &mut service,
                "select lagging_from from nightowls.projections"
            ),
            "null"
        );
    });
}

/// `count` orgs with an async projection of the same name each; returns their ids.
fn orgs_with_tallies(db: &Db, count: usize) -> Vec<String> {
    let mut owner = db.owner();
    (0..count)
        .map(|i| {
            let org = new_org(db, &format!("org {i}"));
            owner.exec(&format!(
                "select nightowls.create_projection('tally', 'order', {}, mode => 'async', org => '{org}')",
                quote(TALLY)
            ));
            org
        })
        .collect()
}

fn count_in_each(session: &mut Session, orgs: &[String], events: u32) {
    session.exec(&format!(
        "insert into nightowls.events (org_id, aggregate_type, aggregate_id, event_type, payload)
         select o.id, 'order', 'o' || i, 'counted', '{{\"by\": 1}}'
           from unnest(array['{}']::uuid[]) as o (id) cross join generate_series(1, {events}) i",
        orgs.join("','")
    ));
}

#[test]
fn who_had_no_turn_comes_first_in_the_next_call_however_busy_the_others_are() {
    on_each_install(|db| {
        let orgs = orgs_with_tallies(db, 60);
        let mut service = db.service();
        count_in_each(&mut service, &orgs, 3);
        // Three calls serve sixty, though those that were served have new work before each call, and more of it.
        let mut served = BTreeSet::new();
        for round in 0..3 {
            service.exec("begin");
            let turn = lines(
                &mut service,
                "select org_id from nightowls.run_projections()",
            );
            assert_eq!(turn.len(), 25, "{turn:?}");
            let locks: i64 = text(
                &mut service,
                "select count(*) from pg_locks where pid = pg_backend_pid() and locktype = 'advisory'",
            )
            .parse()
            .expect("a number");
            assert!(locks <= 64, "{locks} advisory locks");
            service.exec("commit");
            let again: Vec<String> = served.iter().cloned().collect();
            served.extend(turn);
            assert_eq!(served.len(), [25, 50, 60][round], "{again:?}");
            let busy: Vec<String> = served.iter().cloned().collect();
            count_in_each(&mut service, &busy, 20);
        }
    });
}

#[test]
fn what_others_are_at_or_erase_and_what_fails_holds_up_nobody() {
    on_each_install(|db| {
        let orgs = orgs_with_tallies(db, 60);
        let mut service = db.service();
        count_in_each(&mut service, &orgs, 3);
        // A call that is still open has 25 of them, and stays first in line.
        let mut open = db.service();
        open.exec("begin");
        assert_eq!(
            open.rows("select * from nightowls.run_projections()").len(),
            25
        );
        assert_eq!(
            service
                .rows("select * from nightowls.run_projections()")
                .len(),
            25
        );
        assert_eq!(
            service
                .rows("select * from nightowls.run_projections()")
                .len(),
            10
        );
        open.exec("commit");

        // So does an erasure that is open.
        let mut eraser = db.service();
        count_in_each(&mut service, &orgs, 1);
        eraser.exec(&format!(
            "begin; select nightowls.erase('order', 'o1', 'asked', org => '{}')",
            orgs[0]
        ));
        let mut rows = 0;
        for _ in 0..3 {
            rows += service
                .rows("select * from nightowls.run_projections()")
                .len();
        }
        assert_eq!(rows, 59);
        eraser.exec("commit");
        assert_eq!(run(&mut service), 1);

        // And a handler whose error will pass is told, and tried again.
        db.owner().exec(&format!(
            "create function public.busy(state jsonb, event nightowls.events) returns jsonb language plpgsql as $$
             begin
               if current_setting('app.busy', true) = 'yes' then
                 raise exception 'somebody else has it' using errcode = 'lock_not_available';
               end if;
               return jsonb_build_object('n', (event).version);
             end $$;
             select nightowls.create_projection('busy', 'order', handler => 'public.busy', mode => 'async', org => '{}')",
            orgs[1]
        ));
        count_in_each(&mut service, &orgs[..3], 1);
        service.exec("set app.busy = 'yes'");
        assert_eq!(
            lines(
                &mut service,
                "select projection, events, error from nightowls.run_projections() order by org_id <> (select org_id from nightowls.projections where name = 'busy'), projection"
            ),
            [
                "busy 0 55P03 somebody else has it",
                "tally 1 null",
                "tally 1 null",
                "tally 1 null"
            ]
        );
        assert_eq!(
            text(&mut service, "select count(*) from nightowls.parked_events"),
            "0"
        );
        service.exec("set app.busy = 'no'");
        assert_eq!(
            lines(
                &mut service,
                "select projection, events, error from nightowls.run_projections()"
            ),
            ["busy 1 null"]
        );
    });
}
