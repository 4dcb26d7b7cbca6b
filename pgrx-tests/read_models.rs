//! Read models: projections into the user's own table, and materialized views.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crate::fixture::{default_org, is_blocked, lines, new_org};
use crate::projections::{await_lock, text};
use crate::support::{
    APP, Db, SERVICE, SUPERUSER, Session, on_each_install, on_each_route, quote, wait_until,
};
use std::time::Duration;

/// A table of balances, and a handler that takes each event once and in order or
/// raises OR001.
fn create_balances(db: &Db) {
    db.owner().exec(&format!(
        "create table public.balances (
           org_id uuid not null, account text not null, balance numeric not null, version bigint not null,
           primary key (org_id, account));
         grant select, insert, update, delete on public.balances to {SERVICE}, {APP};
         create function public.keep_balance(event nightowls.events) returns void language plpgsql as $$
         declare
           v_version bigint;
         begin
           insert into public.balances as b (org_id, account, balance, version)
           values ((event).org_id, (event).aggregate_id, ((event).payload ->> 'by')::numeric, 1)
           on conflict (org_id, account) do update
             set balance = b.balance + excluded.balance, version = b.version + 1
           returning version into v_version;
           if v_version <> (event).version then
             raise exception 'version % is the % to come', (event).version, v_version using errcode = 'OR001';
           end if;
         end $$"
    ));
}

fn keep_balances(session: &mut Session, org: &str) {
    session.exec(&format!(
        "select nightowls.create_table_projection('balances', 'account', 'public.balances', 'public.keep_balance', '{org}')"
    ));
}

fn deposit(id: &str, by: i64) -> String {
    format!("select nightowls.append_event('account', '{id}', 'deposited', '{{\"by\": {by}}}')")
}

/// The table holds each event once: of every org that has the projection, nothing
/// of others.
#[track_caller]
fn assert_balanced(db: &Db) {
    let mut session = db.superuser();
    let wrong = lines(
        &mut session,
        "with truth as (
           select e.org_id, e.aggregate_id as account, sum((e.payload ->> 'by')::numeric) as balance, max(e.version) as version
             from nightowls.events e
             join nightowls.projections p on p.org_id = e.org_id and p.kind = 'table' and p.aggregate_type = e.aggregate_type
            group by 1, 2)
         select coalesce(t.account, b.account), t.version, b.version, t.balance, b.balance
           from truth t full join public.balances b using (org_id, account)
          where (t.balance, t.version) is distinct from (b.balance, b.version)",
    );
    assert!(
        wrong.is_empty(),
        "account, version (true, kept), balance (true, kept): {wrong:?}"
    );
}

#[test]
fn a_table_projection_handles_the_history_and_then_every_append() {
    on_each_route(|db| {
        let org = default_org(db);
        create_balances(db);
        let (mut owner, mut service) = (db.owner(), db.service());
        owner.exec(
            "insert into public.balances values (gen_random_uuid(), 'junk', 7, 7);
             insert into public.balances select nightowls.current_org(), 'a', 7, 7",
        );
        owner.exec("delete from public.balances where account = 'junk'");
        service.exec(&[deposit("a", 1), deposit("b", 1), deposit("a", 2)].join(";"));
        keep_balances(&mut owner, &org);
        assert_balanced(db);
        service.exec(&deposit("a", 4));
        service.exec(
            r#"select nightowls.append_many('[
                 {"aggregate_type": "account", "aggregate_id": "b", "events": [
                    {"event_type": "deposited", "payload": {"by": 10}}, {"event_type": "deposited", "payload": {"by": 20}}]},
                 {"aggregate_type": "other", "aggregate_id": "b", "events": [{"event_type": "deposited", "payload": {"by": 1}}]},
                 {"aggregate_type": "account", "aggregate_id": "c", "events": [{"event_type": "deposited", "payload": {"by": 5}}]}]')"#,
        );
        service.exec(
            r#"insert into nightowls.events (aggregate_type, aggregate_id, event_type, payload)
               values ('account', 'c', 'deposited', '{"by": 8}'), ('account', 'a', 'deposited', '{"by": 8}'),
                      ('account', 'c', 'deposited', '{"by": 16}')"#,
        );
        service.exec(&format!("begin; {}; rollback", deposit("a", 1000)));
        assert_eq!(
            lines(
                &mut service,
                "select account, balance, version from public.balances order by 1"
            ),
            ["a 15 4", "b 31 3", "c 29 3"]
        );
        owner.exec("select nightowls.rebuild_projection('balances'), nightowls.refresh_projection('balances')");
        service.exec(&deposit("b", 1));
        assert_balanced(db);
    });
}

#[test]
fn the_table_of_a_projection_refuses_every_other_write() {
    on_each_install(|db| {
        let org = default_org(db);
        create_balances(db);
        let mut owner = db.owner();
        keep_balances(&mut owner, &org);
        db.service().exec(&deposit("a", 1));
        let writes = [
            "insert into public.balances values (gen_random_uuid(), 'x', 1, 1)",
            "insert into public.balances select * from public.balances on conflict do nothing",
            "insert into public.balances select * from public.balances on conflict (org_id, account) do update set balance = 0",
            "update public.balances set balance = 0",
            "delete from public.balances",
            "with gone as (delete from public.balances returning 1) select count(*) from gone",
            "merge into public.balances b using (values ('a')) v (id) on b.account = v.id when matched then delete",
            "truncate public.balances",
        ];
        for role in [db.install().owner(), SUPERUSER, SERVICE, APP] {
            let mut session = db.session(role);
            let stale = text(&mut session, "select pg_current_xact_id()");
            for sql in writes {
                let allowed: &[&str] =
                    if sql.starts_with("truncate") && (role == SERVICE || role == APP) {
                        &["42501"]
                    } else {
                        &["NW008"]
                    };
                let refused = |session: &mut Session, how: &str| {
                    let refusal = session.refused(sql);
                    assert!(
                        allowed.contains(&refusal.code.as_str()),
                        "{role}, {how}: {sql}: {refusal}"
                    );
                };
                refused(&mut session, "alone");
                session.exec(&format!("set nightowls.door = '{stale}|project'"));
                refused(&mut session, "with an old door");
                session.exec("reset nightowls.door");
                if role != APP {
                    session.exec(&format!("begin; {}", deposit("a", 1)));
                    refused(&mut session, "after an append");
                    session.exec("rollback");
                    session.exec(
                        r#"begin; insert into nightowls.events (aggregate_type, aggregate_id, event_type, payload)
                                  values ('account', 'a', 'deposited', '{"by": 1}')"#,
                    );
                    refused(&mut session, "after a direct insert");
                    session.exec("rollback; begin; savepoint s");
                    session.refused("select nightowls.append_event('account', 'a', 'deposited', '{\"by\": \"much\"}')");
                    session.exec("rollback to s");
                    refused(&mut session, "after a handler that failed");
                    session.exec("rollback");
                }
            }
            if role == db.install().owner() {
                session.exec("begin; select nightowls.rebuild_projection('balances')");
                assert_eq!(session.refused(writes[3]).code, "NW008");
                session.exec("rollback");
            }
        }
        let copy = db
            .command("psql", SERVICE)
            .args(["--no-psqlrc", "--set", "VERBOSITY=sqlstate"])
            .args(["--command", "copy public.balances from stdin"])
            .output()
            .expect("psql runs");
        let said = String::from_utf8_lossy(&copy.stderr).into_owned();
        assert!(said.contains("NW008"), "{said}");
        assert_balanced(db);
    });
}

#[test]
fn orgs_share_a_table_by_its_column_org_id_and_not_without() {
    on_each_install(|db| {
        let one = default_org(db);
        let two = new_org(db, "two");
        create_balances(db);
        let mut owner = db.owner();
        let mut service = db.service();
        for (org, by) in [(&one, 1), (&two, 2), (&one, 3)] {
            service.exec(&format!(
                "select nightowls.append_event('account', 'a', 'deposited', '{{\"by\": {by}}}', org => '{org}')"
            ));
        }
        keep_balances(&mut owner, &one);
        assert_eq!(
            lines(&mut service, "select balance from public.balances"),
            ["4"]
        );
        keep_balances(&mut owner, &two);
        assert_balanced(db);
        service.exec(&format!(
            r#"insert into nightowls.events (org_id, aggregate_type, aggregate_id, event_type, payload)
               select o, 'account', a, 'deposited', '{{"by": 1}}'
                 from unnest('{{{one},{two}}}'::uuid[]) o, unnest('{{a,b}}'::text[]) a, generate_series(1, 2)"#
        ));
        assert_balanced(db);
        for org in [&one, &two] {
            owner.exec(&format!(
                "select nightowls.rebuild_projection('balances', '{org}')"
            ));
            assert_balanced(db);
        }

        owner.exec(
            "create table public.counts (account text primary key, n bigint not null);
             create function public.keep_count(event nightowls.events) returns void language sql
             begin atomic
               insert into public.counts as c values ((event).aggregate_id, 1) on conflict (account) do update set n = c.n + 1;
             end",
        );
        owner.exec(&format!("grant all on public.counts to {SERVICE}"));
        let create = |org: &str, name: &str| {
            format!(
                "select nightowls.create_table_projection('{name}', 'account', 'public.counts', 'public.keep_count', '{org}')"
            )
        };
        owner.exec(&create(&one, "counts"));
        let refusal = owner.refused(&create(&two, "counts"));
        assert_eq!(refusal.code, "55006");
        assert!(refusal.hint.contains("org_id"), "{refusal}");
        assert_eq!(
            lines(&mut service, "select * from public.counts order by 1"),
            ["a 4", "b 2"]
        );
        service.exec(&format!(
            "select nightowls.append_event('account', 'a', 'deposited', '{{\"by\": 1}}', org => '{two}')"
        ));
        assert_eq!(
            lines(&mut service, "select * from public.counts order by 1"),
            ["a 4", "b 2"]
        );
    });
}

#[test]
fn what_cannot_be_a_table_projection_is_refused_and_nothing_is_made() {
    on_each_install(|db| {
        let org = default_org(db);
        create_balances(db);
        let mut owner = db.owner();
        owner.exec(
            "create view public.seen as select * from public.balances;
             create table public.parted (org_id uuid, account text) partition by list (account);
             create table public.parted_a partition of public.parted default",
        );
        let good = "'b', 'account', 'public.balances', 'public.keep_balance'";
        for (arguments, code) in [
            (good.replace("'b'", "null"), "22004"),
            (good.replace("'b'", "''"), "22023"),
            (good.replace("'b'", "repeat('b', 256)"), "54000"),
            (good.replace("'account'", "null"), "22004"),
            (good.replace("'account'", "''"), "22023"),
            (good.replace("'public.balances'", "null"), "42P01"),
            (
                good.replace("'public.balances'", "'public.nothing'"),
                "42P01",
            ),
            (good.replace("'public.balances'", "'public.seen'"), "42809"),
            (
                good.replace("'public.keep_balance'", "'public.nothing'"),
                "42883",
            ),
            (good.replace("'public.keep_balance'", "null"), "42883"),
            (format!("{good}, org => gen_random_uuid()"), "22023"),
        ] {
            let refusal = owner.refused(&format!(
                "select nightowls.create_table_projection({arguments})"
            ));
            assert_eq!(refusal.code, code, "{arguments}: {refusal}");
        }
        assert_eq!(
            text(
                &mut owner,
                "select (select count(*) from nightowls.projections) + (select count(*) from nightowls.routes)
                      + (select count(*) from pg_trigger where tgname = 'nightowls_projection_only')"
            ),
            "0"
        );
        // Nothing of ours is a target.
        for target in ["nightowls.orgs", "nightowls.settings", "nightowls.events"] {
            let refusal = owner.refused(&format!(
                "select nightowls.create_table_projection({})",
                good.replace("public.balances", target)
            ));
            assert_eq!(refusal.code, "42809", "{target}: {refusal}");
        }
        assert_eq!(text(&mut owner, "select count(*) from nightowls.orgs"), "1");
        // A partition is written to past the guard of its parent, unless that is refused.
        let parted = owner.try_exec(&format!(
            "select nightowls.create_table_projection({})",
            good.replace("public.balances", "public.parted")
        ));
        match parted {
            Err(refusal) => assert_eq!(refusal.code, "42809", "{refusal}"),
            Ok(()) => {
                let refusal = owner.refused("insert into public.parted_a values (null, 'forged')");
                assert_eq!(refusal.code, "NW008", "{refusal}");
                owner.exec("select nightowls.drop_projection('b')");
            }
        }
        keep_balances(&mut owner, &org);
        keep_balances(&mut owner, &org);
        let refusal = owner.refused(
            "select nightowls.create_table_projection('balances', 'other', 'public.balances', 'public.keep_balance')",
        );
        assert_eq!(refusal.code, "42710");
        for call in [
            "state('balances', 'a')",
            "state_at('balances', 'a', 1)",
            "verify_projection('balances')",
            "alter_projection('balances', '{}')",
        ] {
            assert_eq!(
                owner.refused(&format!("select nightowls.{call}")).code,
                "22023",
                "{call}"
            );
        }
    });
}

#[test]
fn a_dropped_table_projection_leaves_its_table_open_with_its_rows() {
    on_each_install(|db| {
        let org = default_org(db);
        create_balances(db);
        let (mut owner, mut service) = (db.owner(), db.service());
        keep_balances(&mut owner, &org);
        // A second projection into the same table: its rows are of another type.
        owner.exec(
            "select nightowls.create_table_projection('also', 'vault', 'public.balances', 'public.keep_balance')",
        );
        service.exec(&deposit("a", 1));
        service.exec("select nightowls.append_event('vault', 'v', 'deposited', '{\"by\": 9}')");
        owner.exec("select nightowls.rebuild_projection('also')");
        assert_balanced(db);

        owner.exec("select nightowls.drop_projection('also')");
        assert_eq!(owner.refused("delete from public.balances").code, "NW008");
        let refusal = service.refused("select nightowls.drop_projection('balances')");
        assert_eq!(refusal.code, "42501");
        service.exec(&deposit("a", 1));
        owner.exec("select nightowls.drop_projection('balances')");
        assert_eq!(
            lines(
                &mut owner,
                "select account, balance from public.balances order by 1"
            ),
            ["a 2", "v 9"]
        );
        owner.exec("update public.balances set balance = 0; delete from public.balances");
        service.exec(&deposit("a", 1));
        assert_eq!(
            text(&mut owner, "select count(*) from public.balances"),
            "0"
        );
        keep_balances(&mut owner, &org);
        assert_balanced(db);
        // The table goes first: the projection can still be dropped.
        owner.exec("drop table public.balances; select nightowls.drop_projection('balances')");
        service.exec(&deposit("a", 1));
    });
}

#[test]
fn a_target_may_have_any_name_and_a_handler_too() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        owner.exec(&format!(
            r#"create schema "my schema"; grant usage on schema "my schema" to {SERVICE};
               create table "my schema"."it's; a ""table""" (n bigint);
               grant all on "my schema"."it's; a ""table""" to {SERVICE};
               create function "my schema"."a 'handler'"(event nightowls.events) returns void language sql
               begin atomic insert into "my schema"."it's; a ""table""" values ((event).version); end"#
        ));
        owner.exec(&format!(
            "select nightowls.create_table_projection('odd', 'account', {}, {})",
            quote(r#""my schema"."it's; a ""table""""#),
            quote(r#""my schema"."a 'handler'""#)
        ));
        db.service()
            .exec(&format!("{}; {}", deposit("a", 1), deposit("a", 1)));
        owner.exec("select nightowls.rebuild_projection('odd')");
        assert_eq!(
            lines(
                &mut owner,
                r#"select n from "my schema"."it's; a ""table""" order by 1"#
            ),
            ["1", "2"]
        );
        let refusal = owner.refused(r#"delete from "my schema"."it's; a ""table""""#);
        assert_eq!(refusal.code, "NW008");
        owner.exec("select nightowls.drop_projection('odd')");
        owner.exec(r#"delete from "my schema"."it's; a ""table""""#);
    });
}

#[test]
fn a_table_handler_runs_as_the_one_who_appends_and_needs_its_own_rights() {
    on_each_route(|db| {
        let org = default_org(db);
        create_balances(db);
        let mut owner = db.owner();
        keep_balances(&mut owner, &org);
        owner.exec(&format!("revoke insert on public.balances from {SERVICE}"));
        let mut service = db.service();
        let refusal = service.refused(&deposit("a", 1));
        assert_eq!(refusal.code, "42501");
        assert!(refusal.message.contains("balances"), "{refusal}");
        assert_eq!(
            text(&mut service, "select count(*) from nightowls.events"),
            "0"
        );
        owner.exec(&deposit("a", 1));
        assert_balanced(db);
        // A rebuild is for one who may empty the table.
        assert_eq!(
            service
                .refused("select nightowls.rebuild_projection('balances')")
                .code,
            "42501"
        );
        assert_balanced(db);
    });
}

#[test]
fn a_handler_may_append_to_its_org_and_to_others_and_write_before_and_after() {
    on_each_route(|db| {
        let one = default_org(db);
        let two = new_org(db, "two");
        create_balances(db);
        let mut owner = db.owner();
        owner.exec(&format!(
            "create table public.log (n bigint generated always as identity, line text); grant all on public.log to {SERVICE};
             create function public.chain(event nightowls.events) returns void language plpgsql as $$
             begin
               insert into public.log (line) values ((event).aggregate_id || ' before');
               if (event).event_type = 'deposited' then
                 perform nightowls.append_event('audit', (event).aggregate_id, 'seen', org => (event).org_id);
                 perform nightowls.append_event('account', (event).aggregate_id, 'deposited', '{{\"by\": 1}}', org => '{two}');
                 insert into nightowls.events (org_id, aggregate_type, aggregate_id, event_type)
                 values ('{two}', 'audit', 'direct', 'seen'), ((event).org_id, 'audit', 'direct', 'seen');
                 perform nightowls.append_event('order', 'of ' || (event).aggregate_id, 'noted', org => (event).org_id);
               end if;
               insert into public.log (line) values ((event).aggregate_id || ' after');
             end $$;
             select nightowls.create_table_projection('log', 'account', 'public.log', 'public.chain', '{one}');
             select nightowls.create_table_projection('log too', 'order', 'public.log', 'public.chain', '{one}');
             select nightowls.create_projection('seen', 'audit', '{{\"otherwise\": [{{\"op\": \"add\", \"path\": \"n\"}}]}}', org => '{one}');"
        ));
        keep_balances(&mut owner, &two);
        let mut service = db.service();
        service.exec(&deposit("a", 1));
        assert_eq!(
            lines(&mut service, "select line from public.log order by n"),
            ["a before", "of a before", "of a after", "a after"]
        );
        service.exec(&format!(
            "begin; {}; {}; rollback",
            deposit("a", 1),
            deposit("b", 1)
        ));
        service.exec(&format!(
            "begin; {}; {}; commit",
            deposit("a", 1),
            deposit("b", 1)
        ));
        assert_eq!(
            text(&mut service, "select nightowls.state('seen', 'a')"),
            r#"{"n": 2}"#
        );
        assert_eq!(
            text(&mut service, "select nightowls.state('seen', 'direct')"),
            r#"{"n": 3}"#
        );
        assert_eq!(
            lines(
                &mut service,
                "select account, balance from public.balances order by 1"
            ),
            ["a 2", "b 1"]
        );
        // What it appended is read like everything else: nothing is left behind the safe position.
        assert_eq!(
            text(
                &mut service,
                &format!(
                    "select (select count(*) from nightowls.read_events(org => '{one}')) || ' ' ||
                                 (select count(*) from nightowls.read_events(org => '{two}'))"
                )
            ),
            "12 6"
        );
        // The door is shut when it is over.
        service.exec(&format!("begin; {}", deposit("a", 1)));
        assert_eq!(service.refused("delete from public.log").code, "NW008");
        service.exec("rollback");
    });
}

#[test]
fn a_handler_may_not_append_to_what_it_handles_as_that_would_come_out_of_order() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        owner.exec(&format!(
            "create table public.log (n bigint generated always as identity, version bigint); grant all on public.log to {SERVICE};
             create function public.echo(event nightowls.events) returns void language plpgsql as $$
             begin
               insert into public.log (version) values ((event).version);
               if (event).event_type = 'x' then
                 perform nightowls.append_event('account', (event).aggregate_id, 'echoed');
               end if;
             end $$;
             select nightowls.create_table_projection('log', 'account', 'public.log', 'public.echo')"
        ));
        let mut service = db.service();
        for append in [
            "select nightowls.append_event('account', 'a', 'x')",
            r#"select nightowls.append_events('account', 'a', '[{"event_type": "y"}, {"event_type": "x"}, {"event_type": "z"}]')"#,
            "insert into nightowls.events (aggregate_type, aggregate_id, event_type) values ('account', 'a', 'x')",
        ] {
            let refusal = service.refused(append);
            assert_eq!(refusal.code, "0A000", "{append}: {refusal}");
            assert!(refusal.message.contains("\"log\""), "{refusal}");
        }
        assert_eq!(
            text(&mut service, "select count(*) from nightowls.events"),
            "0"
        );
        service.exec(
            r#"select nightowls.append_events('account', 'a', '[{"event_type": "y"}, {"event_type": "z"}]')"#,
        );
        assert_eq!(
            lines(&mut service, "select version from public.log order by n"),
            ["1", "2"]
        );
    });
}

#[test]
fn an_append_open_while_a_table_projection_is_made_or_rebuilt_is_handled_once() {
    on_each_install(|db| {
        let org = default_org(db);
        create_balances(db);
        db.service().exec(&deposit("a", 1));
        let org = &org;
        for round in 0..2 {
            let mut open = db.service();
            open.exec(&format!(
                "begin; {}; {}",
                deposit("a", 1),
                deposit(&format!("n{round}"), 1)
            ));
            thread::scope(|scope| {
                let mut owner = db.owner();
                let pid = owner.pid();
                let build = scope.spawn(move || match round {
                    0 => keep_balances(&mut owner, org),
                    _ => owner.exec("select nightowls.rebuild_projection('balances')"),
                });
                await_lock(db, pid);
                open.exec(&format!("{}; {}; commit", deposit("a", 1), deposit("b", 1)));
                build.join().expect("the build ends well");
            });
            assert_balanced(db);
        }
    });
}

#[test]
fn writers_and_rebuilds_of_a_table_projection_at_once_lose_and_repeat_nothing() {
    on_each_install(|db| {
        let org = default_org(db);
        create_balances(db);
        let mut owner = db.owner();
        keep_balances(&mut owner, &org);
        let done = AtomicBool::new(false);
        let rebuilt = thread::scope(|scope| {
            let writers: Vec<_> = (0..3)
                .map(|writer| {
                    scope.spawn(move || {
                        let mut session = db.service();
                        for round in 0..40 {
                            session.exec(&match (writer + round) % 3 {
                                0 => deposit("hot", 1),
                                1 => format!("begin; {}; {}; commit", deposit(&format!("w{writer}"), 1), deposit("hot", 1)),
                                _ => format!(
                                    r#"insert into nightowls.events (aggregate_type, aggregate_id, event_type, payload)
                                       values ('account', 'd{writer}', 'deposited', '{{"by": 1}}'), ('other', 'w{writer}', 'x', '{{}}')"#
                                ),
                            });
                        }
                    })
                })
                .collect();
            let done = &done;
            let builder = scope.spawn(move || {
                let mut session = db.owner();
                let mut rounds = 0;
                while !done.load(Ordering::Relaxed) {
                    session.exec("select nightowls.rebuild_projection('balances')");
                    rounds += 1;
                }
                rounds
            });
            let ended: Vec<_> = writers.into_iter().map(|writer| writer.join()).collect();
            done.store(true, Ordering::Relaxed);
            assert!(ended.iter().all(Result::is_ok), "a writer failed");
            builder.join().expect("the rebuilds end well")
        });
        assert!(rebuilt > 0);
        assert_balanced(db);
    });
}

#[test]
fn an_append_that_meets_a_rebuild_waits_for_it_and_neither_fails() {
    on_each_install(|db| {
        let org = default_org(db);
        create_balances(db);
        let mut owner = db.owner();
        // A handler that waits as long as the test wants.
        owner.exec(
            "create function public.slowly(event nightowls.events) returns void language plpgsql as $$
             begin
               if (event).aggregate_id = 'slow' then
                 perform pg_advisory_xact_lock_shared(7);
               end if;
               perform public.keep_balance(event);
             end $$",
        );
        let mut service = db.service();
        service.exec(&format!("{}; {}", deposit("slow", 1), deposit("a", 1)));
        owner.exec(&format!(
            "select nightowls.create_table_projection('balances', 'account', 'public.balances', 'public.slowly', '{org}')"
        ));
        let mut gate = db.superuser();
        gate.exec("select pg_advisory_lock(7)");
        thread::scope(|scope| {
            let builder_pid = owner.pid();
            let build =
                scope.spawn(move || owner.exec("select nightowls.rebuild_projection('balances')"));
            await_lock(db, builder_pid);
            let mut reader = db.service();
            reader.exec("set statement_timeout = '5s'; select * from public.balances; select count(*) from nightowls.read_events()");
            let writer_pid = service.pid();
            let write = scope.spawn(move || service.exec(&deposit("a", 1)));
            let mut watcher = db.superuser();
            wait_until(
                "the append is done or waits",
                Duration::from_secs(20),
                || write.is_finished() || is_blocked(&mut watcher, writer_pid),
            );
            gate.exec("select pg_advisory_unlock(7)");
            build.join().expect("the rebuild ends well");
            write.join().expect("the append ends well");
        });
        assert_balanced(db);
    });
}

#[test]
fn a_rebuild_of_a_table_projection_holds_up_no_reader_and_no_other_type() {
    on_each_install(|db| {
        let org = default_org(db);
        let two = new_org(db, "two");
        create_balances(db);
        let mut owner = db.owner();
        keep_balances(&mut owner, &org);
        owner.exec(r#"select nightowls.create_projection('tally', 'order', '{"otherwise": [{"op": "add", "path": "n"}]}')"#);
        db.service().exec(&deposit("a", 1));
        owner.exec("begin; select nightowls.rebuild_projection('balances')");
        let mut other = db.service();
        other.exec("set lock_timeout = '500ms'");
        other.exec("select * from public.balances; select count(*) from nightowls.read_events(); select nightowls.state('tally', 'a')");
        other.exec("select nightowls.append_event('order', 'a', 'noted')");
        other.exec(&format!(
            "select nightowls.append_event('account', 'a', 'deposited', org => '{two}')"
        ));
        owner.exec("commit");
        assert_balanced(db);
    });
}

#[test]
fn an_append_with_an_older_snapshot_than_a_table_projection_is_not_lost_to_it() {
    on_each_install(|db| {
        let org = default_org(db);
        create_balances(db);
        let event = r#"{"event_type": "deposited", "payload": {"by": 1}}"#;
        let appends = [
            deposit("a", 1),
            format!("select nightowls.append_events('account', 'a', '[{event}, {event}]')"),
            format!(
                r#"select nightowls.append_many('[{{"aggregate_type": "account", "aggregate_id": "a", "events": [{event}]}},
                                                 {{"aggregate_type": "account", "aggregate_id": "b", "events": [{event}]}}]')"#
            ),
            r#"insert into nightowls.events (aggregate_type, aggregate_id, event_type, payload)
               values ('account', 'a', 'deposited', '{"by": 1}')"#
                .to_owned(),
        ];
        for append in &appends {
            for before in [
                "select count(*) from nightowls.events",
                "select nightowls.append_event('other', 'a', 'noted')",
            ] {
                let mut old = db.service();
                old.exec(&format!("begin isolation level repeatable read; {before}"));
                // Making it waits for the one who has appended already: then there is nothing to lose.
                let mut owner = db.owner();
                owner.exec("set lock_timeout = '300ms'");
                let made = owner
                    .try_exec(&format!(
                        "select nightowls.create_table_projection('balances', 'account', 'public.balances', 'public.keep_balance', '{org}')"
                    ))
                    .is_ok();
                // It is handled, or it is refused and may be tried again.
                match old.try_exec(append) {
                    Ok(()) => old.exec("commit"),
                    Err(refusal) => {
                        assert_eq!(refusal.code, "40001", "{append}: {refusal}");
                        old.exec(&format!("rollback; {append}"));
                    }
                }
                if made {
                    assert_balanced(db);
                    owner.exec("select nightowls.drop_projection('balances')");
                }
            }
        }
    });
}

#[test]
fn appends_that_wait_for_each_other_and_for_a_rebuild_do_not_deadlock() {
    on_each_install(|db| {
        let org = default_org(db);
        create_balances(db);
        let mut owner = db.owner();
        keep_balances(&mut owner, &org);
        let mut first = db.service();
        first.exec(&format!("begin; {}", deposit("a", 1)));
        thread::scope(|scope| {
            let mut watcher = db.superuser();
            let pid = owner.pid();
            let rebuild =
                scope.spawn(move || owner.exec("select nightowls.rebuild_projection('balances')"));
            wait_until(
                "the rebuild is done or waits",
                Duration::from_secs(20),
                || rebuild.is_finished() || is_blocked(&mut watcher, pid),
            );
            // A second comes later, appends to another aggregate, and may have to wait for the rebuild …
            let mut session = db.service();
            let pid = session.pid();
            let second = scope.spawn(move || session.exec(&deposit("x", 1)));
            wait_until(
                "the second append is done or waits",
                Duration::from_secs(20),
                || second.is_finished() || is_blocked(&mut watcher, pid),
            );
            // … to which the first, for whom the rebuild waits, appends as well.
            first.exec(&format!("{}; commit", deposit("x", 1)));
            second.join().expect("the second append ends well");
            rebuild.join().expect("the rebuild ends well");
        });
        assert_balanced(db);
    });
}

#[test]
fn a_table_projection_is_not_made_or_rebuilt_from_an_older_snapshot() {
    on_each_install(|db| {
        let org = default_org(db);
        create_balances(db);
        let mut owner = db.owner();
        let create = format!(
            "select nightowls.create_table_projection('balances', 'account', 'public.balances', 'public.keep_balance', '{org}')"
        );
        for level in ["repeatable read", "serializable"] {
            owner.exec(&format!(
                "begin isolation level {level}; select count(*) from nightowls.events"
            ));
            db.service().exec(&deposit("a", 1));
            assert_eq!(owner.refused(&create).code, "25001", "{level}");
            owner.exec("rollback");
        }
        owner.exec(&create);
        for level in ["repeatable read", "serializable"] {
            owner.exec(&format!(
                "begin isolation level {level}; select count(*) from nightowls.events"
            ));
            db.service().exec(&deposit("b", 1));
            let refusal = owner.refused("select nightowls.rebuild_projection('balances')");
            assert_eq!(refusal.code, "25001", "{level}");
            owner.exec("rollback");
        }
        assert_balanced(db);
    });
}

const TOTALS: &str =
    "select e.org_id, e.aggregate_id as account, sum((e.payload ->> ''by'')::numeric) as total
                        from nightowls.events e where e.aggregate_type = ''account'' group by 1, 2";

fn create_totals(db: &Db) {
    db.owner().exec(&format!(
        "select nightowls.create_view_projection('totals', '{TOTALS}', key_columns => '{{org_id,account}}');
         grant select on nightowls.view_totals to {SERVICE}"
    ));
}

#[test]
fn a_view_projection_shows_each_org_its_own_as_of_the_last_refresh() {
    on_each_route(|db| {
        let one = default_org(db);
        let two = new_org(db, "two");
        let mut service = db.service();
        service.exec(&deposit("a", 1));
        create_totals(db);
        service.exec(&deposit("a", 2));
        service.exec(&format!(
            "select nightowls.append_event('account', 'b', 'deposited', '{{\"by\": 9}}', org => '{two}')"
        ));
        let own = "select account, total from nightowls.view_totals order by 1";
        assert_eq!(lines(&mut service, own), ["a 1"]);
        service.exec("select nightowls.refresh_projection('totals')");
        assert_eq!(lines(&mut service, own), ["a 3"]);
        let foreign = format!(
            "begin; select set_config('nightowls.org_id', '{two}', true) where false; set local nightowls.org_id = '{two}'; {own}; commit"
        );
        assert_eq!(lines(&mut service, &foreign), ["b 9"]);
        assert_eq!(lines(&mut service, own), ["a 3"]);
        service.exec("select nightowls.rebuild_projection('totals')");

        let direct = service.refused("select * from nightowls._view_totals");
        assert_eq!(direct.code, "42501");
        assert_ne!(
            text(
                &mut service,
                "select refreshed_at from nightowls.projections where name = 'totals'"
            ),
            "null"
        );
        // A condition of the caller's sees no row of another org, however cheap it looks.
        db.owner().exec(&format!(
            "create table public.seen (org uuid); grant all on public.seen to {SERVICE};
             create function public.peek(org uuid) returns boolean language plpgsql cost 0.0000001 as $$
             begin insert into public.seen values (org); return true; end $$"
        ));
        service.exec("select * from nightowls.view_totals where public.peek(org_id)");
        assert_eq!(
            lines(&mut service, "select distinct org from public.seen"),
            [one]
        );
    });
}

#[test]
fn a_refresh_does_not_disturb_a_reader_of_the_old_rows() {
    on_each_install(|db| {
        default_org(db);
        let mut service = db.service();
        service.exec(&deposit("a", 1));
        create_totals(db);
        let own = "select account, total from nightowls.view_totals order by 1";
        let mut reader = db.service();
        reader.exec("begin isolation level repeatable read");
        assert_eq!(lines(&mut reader, own), ["a 1"]);
        service.exec(&deposit("a", 1));
        service.exec("set lock_timeout = '500ms'; select nightowls.refresh_projection('totals')");
        assert_eq!(lines(&mut reader, own), ["a 1"]);
        reader.exec("commit");
        assert_eq!(lines(&mut reader, own), ["a 2"]);

        // Nor does an open refresh keep a reader or a writer waiting; another refresh waits its turn.
        let mut open = db.service();
        open.exec(&deposit("a", 1));
        open.exec("begin; select nightowls.refresh_projection('totals')");
        assert_eq!(lines(&mut service, own), ["a 2"]);
        service.exec(&deposit("a", 1));
        thread::scope(|scope| {
            let mut second = db.service();
            let pid = second.pid();
            let second =
                scope.spawn(move || second.exec("select nightowls.refresh_projection('totals')"));
            await_lock(db, pid);
            open.exec("commit");
            second.join().expect("the second refresh ends well");
        });
        assert_eq!(lines(&mut service, own), ["a 4"]);
    });
}

#[test]
fn what_cannot_be_a_view_projection_is_refused_and_nothing_is_made() {
    on_each_install(|db| {
        default_org(db);
        let two = new_org(db, "two");
        let mut service = db.service();
        service.exec(&format!("{}; {}", deposit("a", 1), deposit("a", 1)));
        let mut owner = db.owner();
        let q = "'select org_id, aggregate_id from nightowls.events'";
        for (arguments, code) in [
            (format!("null, {q}"), "22004"),
            (format!("'', {q}"), "22023"),
            (format!("repeat('v', 41), {q}"), "54000"),
            (format!("repeat('ü', 21), {q}"), "54000"),
            ("'v', null".to_owned(), "22004"),
            (format!("'v', {q}, '0'"), "22023"),
            (format!("'v', {q}, '-1 second'"), "22023"),
            (format!("'v', {q}, null"), "22023"),
            ("'v', 'select aggregate_id from nightowls.events'".to_owned(), "22023"),
            ("'v', 'select org_id::text, version from nightowls.events'".to_owned(), "22023"),
            (format!("'v', {q}"), "23505"),
            ("'v', 'select org_id, version from nightowls.events', key_columns => '{org_id}'".to_owned(), "23505"),
            ("'v', 'select org_id, version from nightowls.events', key_columns => '{org_id,nothing}'".to_owned(), "42703"),
            ("'v', 'selec'".to_owned(), "42601"),
            ("'v', 'select org_id from nowhere.events'".to_owned(), "42P01"),
            ("'v', 'select org_id, version from nightowls.events', org => gen_random_uuid()".to_owned(), "22023"),
        ] {
            let refusal = owner.refused(&format!("select nightowls.create_view_projection({arguments})"));
            assert_eq!(refusal.code, code, "{arguments}: {refusal}");
            assert_eq!(
                text(
                    &mut owner,
                    "select (select count(*) from nightowls.projections)
                          + (select count(*) from pg_class where relname like '%view\\_%' and relnamespace = 'nightowls'::regnamespace)"
                ),
                "0",
                "{arguments}"
            );
        }
        create_totals(db);
        create_totals(db);
        let refusal = owner.refused(&format!(
            "select nightowls.create_view_projection('totals', {q})"
        ));
        assert_eq!(refusal.code, "42710");
        let refusal = owner.refused(&format!(
            "select nightowls.create_view_projection('totals', '{TOTALS}', org => '{two}')"
        ));
        assert_eq!(refusal.code, "42P07");
        let refusal = service.refused(&format!(
            "select nightowls.create_view_projection('mine', '{TOTALS}')"
        ));
        assert_eq!(refusal.code, "42501");
        for call in [
            "state('totals', 'a')",
            "state_at('totals', 'a', 1)",
            "verify_projection('totals')",
            "alter_projection('totals', '{}')",
        ] {
            assert_eq!(
                owner.refused(&format!("select nightowls.{call}")).code,
                "22023",
                "{call}"
            );
        }
    });
}

#[test]
fn a_key_that_is_no_longer_unique_fails_the_refresh_and_keeps_the_old_rows() {
    on_each_install(|db| {
        default_org(db);
        let mut service = db.service();
        service.exec(&deposit("a", 1));
        let mut owner = db.owner();
        owner.exec(&format!(
            "select nightowls.create_view_projection('v', 'select org_id, aggregate_id, version from nightowls.events', key_columns => '{{org_id,aggregate_id}}');
             grant select on nightowls.view_v to {SERVICE}"
        ));
        service.exec(&deposit("a", 1));
        let refusal = service.refused("select nightowls.refresh_projection('v')");
        assert!(
            ["21000", "23505"].contains(&refusal.code.as_str()),
            "{refusal}"
        );
        assert_eq!(
            lines(&mut service, "select version from nightowls.view_v"),
            ["1"]
        );
    });
}

#[test]
fn a_dropped_view_projection_leaves_nothing_and_only_the_owner_may_drop_it() {
    on_each_install(|db| {
        default_org(db);
        db.service().exec(&deposit("a", 1));
        create_totals(db);
        assert_eq!(
            db.service()
                .refused("select nightowls.drop_projection('totals')")
                .code,
            "42501"
        );
        let mut owner = db.owner();
        assert_eq!(
            text(&mut owner, "select count(*) from nightowls.projections"),
            "1"
        );
        owner.exec("select nightowls.drop_projection('totals')");
        assert_eq!(
            text(
                &mut owner,
                "select (select count(*) from nightowls.projections)
                      + (select count(*) from pg_class where relname like '%view\\_%' and relnamespace = 'nightowls'::regnamespace)"
            ),
            "0"
        );
        // Any name will do.
        owner.exec(&format!(
            r#"select nightowls.create_view_projection('Ünder "quotes"; --', '{TOTALS}')"#
        ));
        assert_eq!(
            lines(
                &mut owner,
                r#"select account from nightowls."view_Ünder ""quotes""; --""#
            ),
            ["a"]
        );
        db.service()
            .exec(r#"select nightowls.refresh_projection('Ünder "quotes"; --')"#);
        owner.exec(r#"select nightowls.drop_projection('Ünder "quotes"; --')"#);
        create_totals(db);
    });
}

#[test]
fn a_query_is_registered_by_the_owner_alone_and_refreshed_without_the_callers_code() {
    on_each_install(|db| {
        let org = default_org(db);
        db.owner()
            .exec(&format!("select nightowls.grant_service('{APP}')"));
        let mut app = db.session(APP);
        app.exec(
            "create function public.grab() returns uuid language plpgsql as $$
             begin execute 'alter role owl_app superuser'; return null; end $$",
        );
        let refusal = app.refused(
            "select nightowls.create_view_projection('grab', 'select public.grab() as org_id')",
        );
        assert_eq!(refusal.code, "42501");
        let refusal = app.refused(
            "create materialized view nightowls._view_grab as select public.grab() as org_id",
        );
        assert_eq!(refusal.code, "42501");
        // Past the front door: written down by what lies beneath, then refreshed.
        for kind in ["view", "table"] {
            let _ = app.try_exec(&format!(
                "select nightowls._register_projection(row('{org}', 'grab {kind}', '{kind}', 'account', null, 'public.grab',
                   'public.x; alter role owl_app superuser; --', 'select public.grab() as org_id', '1 s', 'inline', 1, null, now(), null)::nightowls.projections)"
            ));
            for call in [
                "refresh_projection",
                "rebuild_projection",
                "drop_projection",
            ] {
                let _ = app.try_exec(&format!("select nightowls.{call}('grab {kind}')"));
            }
        }
        // The owner tends what it finds registered.
        for kind in ["view", "table"] {
            let _ = app.try_exec(&format!(
                "select nightowls._register_projection(row('{org}', 'grab {kind}', '{kind}', 'account', null, 'public.grab',
                   'public.x; alter role owl_app superuser; --', 'select public.grab() as org_id', '1 s', 'inline', 1, null, now(), null)::nightowls.projections)"
            ));
            for call in [
                "refresh_projection",
                "rebuild_projection",
                "drop_projection",
            ] {
                let _ = db
                    .owner()
                    .try_exec(&format!("select nightowls.{call}('grab {kind}')"));
            }
        }
        assert_eq!(
            text(
                &mut db.superuser(),
                "select rolsuper from pg_roles where rolname = 'owl_app'"
            ),
            "f"
        );
    });
}
