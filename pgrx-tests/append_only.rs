//! Append-only, against everyone: what would change the log is refused, and
//! the log is as it was before.

use std::io::Write as _;

use crate::fixture::{default_org, digest, org_apart_from};
use crate::support::{Db, OWNER, Refusal, SERVICE, SUPERUSER, Session, on_each_install};

/// The superuser, the owner where it is another, and the service.
fn roles(db: &Db) -> Vec<&'static str> {
    match db.install().owner() {
        SUPERUSER => vec![SUPERUSER, SERVICE],
        owner => vec![SUPERUSER, owner, SERVICE],
    }
}

/// A log with something in it: two aggregates, one with an event_id.
fn a_log(db: &Db) -> String {
    let org = default_org(db);
    db.service().exec(
        r#"select nightowls.append_event('cart', 'a', 'made', '{"n": 1}', event_id => '00000000-0000-4000-8000-000000000001');
           select nightowls.append_event('cart', 'a', 'paid');
           select nightowls.append_event('cart', 'b', 'made')"#,
    );
    org
}

/// Asserts that each statement is refused, as the service with the second code
/// and as everybody else with the first, and that the log is as before.
fn refused_by_all(db: &Db, statements: &[(&str, &str, &str)]) {
    let before = digest(db);
    for role in roles(db) {
        let mut session = db.session(role);
        for (sql, code, of_service) in statements {
            let code = if role == SERVICE { of_service } else { code };
            let refusal = session.refused(sql);
            assert_eq!(refusal.code, *code, "{role}: {sql}\n{refusal}");
            assert_eq!(digest(db), before, "{role}: {sql}");
        }
        assert!(session.alive());
    }
}

#[test]
fn update_delete_and_truncate_are_refused_whoever_asks() {
    on_each_install(|db| {
        a_log(db);
        refused_by_all(
            db,
            &[
                (
                    "update nightowls.events set payload = '{}'",
                    "NW008",
                    "42501",
                ),
                (
                    "update nightowls.events set payload = '{}' where false",
                    "NW008",
                    "42501",
                ),
                (
                    "update nightowls.events set version = version + 10",
                    "NW008",
                    "42501",
                ),
                (
                    "update only nightowls.events set created_at = now()",
                    "NW008",
                    "42501",
                ),
                (
                    "update nightowls.events set position = default",
                    "NW008",
                    "42501",
                ),
                ("delete from nightowls.events", "NW008", "42501"),
                ("delete from nightowls.events where false", "NW008", "42501"),
                ("delete from only nightowls.events", "NW008", "42501"),
                ("truncate nightowls.events", "NW008", "42501"),
                (
                    "truncate nightowls.events restart identity cascade",
                    "NW008",
                    "42501",
                ),
                (
                    "with gone as (delete from nightowls.events returning *) select count(*) from gone",
                    "NW008",
                    "42501",
                ),
            ],
        );
        let refusal = db.owner().refused("delete from nightowls.events");
        assert_eq!(refusal.message, "nightowls.events is append-only");
        assert_eq!(refusal.detail, "DELETE is refused, whoever asks.");
        assert!(!refusal.hint.is_empty());
    });
}

#[test]
fn an_insert_that_would_update_is_refused_with_and_without_a_conflict() {
    on_each_install(|db| {
        a_log(db);
        refused_by_all(
            db,
            &[
                (
                    "insert into nightowls.events (aggregate_type, aggregate_id, version, event_type) \
                     values ('cart', 'a', 1, 'other') \
                     on conflict (org_id, aggregate_type, aggregate_id, version) do update set event_type = 'other'",
                    "NW008",
                    "42501",
                ),
                (
                    "insert into nightowls.events (aggregate_type, aggregate_id, version, event_type) \
                     values ('cart', 'new', 1, 'other') \
                     on conflict (org_id, aggregate_type, aggregate_id, version) do update set event_type = 'other'",
                    "NW008",
                    "42501",
                ),
                (
                    "insert into nightowls.events (aggregate_type, aggregate_id, event_type, event_id) \
                     values ('cart', 'a', 'other', '00000000-0000-4000-8000-000000000001') \
                     on conflict (org_id, event_id) where event_id is not null do update set payload = excluded.payload",
                    "NW008",
                    "42501",
                ),
                (
                    "merge into nightowls.events e using (values ('a')) as s (id) on e.aggregate_id = s.id \
                     when matched then update set event_type = 'other'",
                    "NW008",
                    "42501",
                ),
                (
                    "merge into nightowls.events e using (values ('a')) as s (id) on e.aggregate_id = s.id \
                     when matched then delete",
                    "NW008",
                    "42501",
                ),
                (
                    "merge into nightowls.events e using (values ('new')) as s (id) on e.aggregate_id = s.id \
                     when matched then delete \
                     when not matched then insert (aggregate_type, aggregate_id, event_type) values ('cart', s.id, 'made')",
                    "NW008",
                    "42501",
                ),
            ],
        );
    });
}

#[test]
fn neither_a_view_nor_a_function_is_a_way_round() {
    on_each_install(|db| {
        a_log(db);
        let before = digest(db);
        let mut owner = db.owner();
        owner.exec(&format!(
            "create schema app; grant usage on schema app to {SERVICE}; \
             create view app.log as select * from nightowls.events; \
             grant select, insert, update, delete on app.log to {SERVICE}; \
             create function app.forget() returns void language sql volatile security definer \
               as 'delete from nightowls.events'; \
             grant execute on function app.forget() to {SERVICE}"
        ));
        for role in roles(db) {
            let mut session = db.session(role);
            for sql in [
                "update app.log set payload = '{}'",
                "delete from app.log",
                "select app.forget()",
            ] {
                let refusal = session.refused(sql);
                assert_eq!(refusal.code, "NW008", "{role}: {sql}\n{refusal}");
            }
        }
        assert_eq!(digest(db), before);
    });
}

#[test]
fn a_position_cannot_be_chosen() {
    on_each_install(|db| {
        a_log(db);
        refused_by_all(
            db,
            &[
                (
                    "insert into nightowls.events (position, aggregate_type, aggregate_id, event_type) \
                     values (500, 'cart', 'c', 'made')",
                    "428C9",
                    "428C9",
                ),
                (
                    "insert into nightowls.events (position, aggregate_type, aggregate_id, event_type) \
                     overriding system value values (500, 'cart', 'c', 'made')",
                    "22023",
                    "42501",
                ),
                (
                    "insert into nightowls.events (position, aggregate_type, aggregate_id, event_type) \
                     overriding system value values (0, 'cart', 'c', 'made')",
                    "22023",
                    "42501",
                ),
                (
                    "insert into nightowls.events (position, aggregate_type, aggregate_id, event_type) \
                     overriding system value values (-1, 'cart', 'c', 'made')",
                    "22023",
                    "42501",
                ),
                (
                    "insert into nightowls.events (position, aggregate_type, aggregate_id, event_type) \
                     overriding system value values (9223372036854775807, 'cart', 'c', 'made')",
                    "22023",
                    "42501",
                ),
                // The very next one.
                (
                    "insert into nightowls.events (position, aggregate_type, aggregate_id, event_type) \
                     overriding system value select last_value + 1, 'cart', 'c', 'made' from nightowls.events_position_seq",
                    "22023",
                    "42501",
                ),
                // One that exists, and one beside a good one.
                (
                    "insert into nightowls.events (position, aggregate_type, aggregate_id, event_type) \
                     overriding system value select min(position), 'cart', 'c', 'made' from nightowls.events",
                    "23505",
                    "42501",
                ),
                (
                    "insert into nightowls.events (position, aggregate_type, aggregate_id, event_type) \
                     overriding system value values (default, 'cart', 'c', 'made'), (700, 'cart', 'd', 'made')",
                    "22023",
                    "42501",
                ),
                (
                    "insert into nightowls.events (position, aggregate_type, aggregate_id, event_type) \
                     overriding system value values (null, 'cart', 'c', 'made')",
                    "23502",
                    "42501",
                ),
                (
                    "merge into nightowls.events using (values (1)) as s (n) on false \
                     when not matched then insert (position, aggregate_type, aggregate_id, event_type) \
                       overriding system value values (500, 'cart', 'c', 'made')",
                    "22023",
                    "42501",
                ),
            ],
        );
        // Asked to be ignored, it is.
        db.owner().exec(
            "insert into nightowls.events (position, aggregate_type, aggregate_id, event_type) \
             overriding user value values (500, 'cart', 'c', 'made')",
        );
        let chosen = db
            .superuser()
            .value("select count(*) from nightowls.events where position = 500");
        assert_eq!(chosen.as_deref(), Some("0"));
    });
}

#[test]
fn a_position_that_another_transaction_drew_cannot_be_chosen_either() {
    on_each_install(|db| {
        let one = a_log(db);
        let two = org_apart_from(db, &one);
        let mut owner = db.owner();
        owner.exec("begin; insert into nightowls.events (aggregate_type, aggregate_id, event_type) values ('cart', 'c', 'made')");
        let mut other = db.service();
        let drawn = other
            .value(&format!(
                "select position from nightowls.append_event('cart', 'x', 'made', org => '{two}')"
            ))
            .expect("a position");
        other.exec(&format!(
            "select nightowls.append_event('cart', 'x', 'made', org => '{two}')"
        ));
        let refusal = owner.refused(&format!(
            "insert into nightowls.events (position, aggregate_type, aggregate_id, event_type) \
             overriding system value values ({drawn}, 'cart', 'd', 'made')"
        ));
        assert_eq!(refusal.code, "22023", "{refusal}");
        owner.exec("rollback");
    });
}

#[test]
fn copy_brings_neither_chosen_positions_nor_gaps() {
    on_each_install(|db| {
        let org = a_log(db);
        let before = digest(db);
        for (columns, line, code) in [
            (
                "org_id, position, aggregate_type, aggregate_id, version, event_type",
                format!("{org}\t500\tcart\tc\t1\tmade"),
                "22023",
            ),
            (
                "org_id, position, aggregate_type, aggregate_id, event_type",
                format!("{org}\t0\tcart\tc\tmade"),
                "22023",
            ),
            (
                "org_id, aggregate_type, aggregate_id, version, event_type",
                format!("{org}\tcart\ta\t4\tmade"),
                "22023",
            ),
            (
                "org_id, aggregate_type, aggregate_id, version, event_type",
                format!("{org}\tcart\tc\t2\tmade\n{org}\tcart\tc\t1\tmade"),
                "22023",
            ),
            (
                "org_id, aggregate_type, aggregate_id, event_type",
                "11111111-1111-4111-8111-111111111111\tcart\tc\tmade".to_owned(),
                "22023",
            ),
        ] {
            for role in roles(db) {
                let mut session = db.session(role);
                let copied = session
                    .client()
                    .copy_in(&format!("copy nightowls.events ({columns}) from stdin"))
                    .and_then(|mut writer| {
                        writer
                            .write_all(format!("{line}\n").as_bytes())
                            .expect("a buffer takes all");
                        writer.finish()
                    });
                let refusal = Refusal::from(copied.expect_err("this COPY is refused"));
                if role == SERVICE {
                    // Row level security: its roles cannot copy at all; or the column is not theirs.
                    assert!(
                        ["0A000", "42501"].contains(&refusal.code.as_str()),
                        "{line}: {refusal}"
                    );
                } else {
                    assert_eq!(refusal.code, code, "{role}: {line}: {refusal}");
                }
                assert_eq!(digest(db), before, "{role}: {line}");
            }
        }
    });
}

#[test]
fn versions_follow_one_another_in_the_order_of_positions_or_are_refused() {
    on_each_install(|db| {
        a_log(db);
        let statements: Vec<String> = [
            // Out of order in one statement; gaps; before the first; far off.
            "('cart', 'c', 2, 'made'), ('cart', 'c', 1, 'made')",
            "('cart', 'c', 1, 'made'), ('cart', 'c', 3, 'made'), ('cart', 'c', 2, 'made')",
            "('cart', 'a', 4, 'made'), ('cart', 'a', 3, 'made')",
            "('cart', 'c', 1, 'made'), ('cart', 'c', 3, 'made')",
            "('cart', 'c', 2, 'made')",
            "('cart', 'a', 4, 'made')",
            "('cart', 'a', 3, 'made'), ('cart', 'b', 3, 'made')",
            "('cart', 'c', 0, 'made')",
            "('cart', 'c', -1, 'made')",
            "('cart', 'c', 0, 'made'), ('cart', 'c', 1, 'made')",
            "('cart', 'c', 9223372036854775807, 'made')",
            "('cart', 'c', null, 'made'), ('cart', 'c', 3, 'made')",
            // The same name in another type or org is another aggregate.
            "('order', 'a', 3, 'made')",
        ]
        .iter()
        .map(|values| {
            format!(
                "insert into nightowls.events (aggregate_type, aggregate_id, version, event_type) values {values}"
            )
        })
        .collect();
        let statements: Vec<(&str, &str, &str)> = statements
            .iter()
            .map(|sql| (sql.as_str(), "22023", "22023"))
            .collect();
        refused_by_all(db, &statements);
        refused_by_all(
            db,
            &[
                (
                    "insert into nightowls.events (org_id, aggregate_type, aggregate_id, event_type) \
                     values ('11111111-1111-4111-8111-111111111111', 'cart', 'a', 'made')",
                    "22023",
                    "22023",
                ),
                (
                    "insert into nightowls.events (org_id, aggregate_type, aggregate_id, event_type) \
                     values (default, 'cart', 'a', 'made'), ('11111111-1111-4111-8111-111111111111', 'cart', 'a', 'made')",
                    "22023",
                    "22023",
                ),
                (
                    "insert into nightowls.events (aggregate_type, aggregate_id, version, event_type) \
                     values ('cart', 'a', 2, 'made')",
                    "23505",
                    "23505",
                ),
            ],
        );
    });
}

#[test]
fn the_service_chooses_no_time_and_touches_neither_sequence_nor_triggers() {
    on_each_install(|db| {
        a_log(db);
        let before = digest(db);
        let mut service = db.service();
        for sql in [
            "insert into nightowls.events (aggregate_type, aggregate_id, event_type, created_at) \
             values ('cart', 'c', 'made', '2020-01-01')",
            "select nextval('nightowls.events_position_seq')",
            "select setval('nightowls.events_position_seq', 1)",
            "alter sequence nightowls.events_position_seq restart",
            "alter table nightowls.events disable trigger all",
            "alter table nightowls.events no force row level security",
            "drop trigger t05_append_only on nightowls.events",
            "drop table nightowls.events",
            "create trigger mine before insert on nightowls.events for each row execute function suppress_redundant_updates_trigger()",
            "create rule mine as on insert to nightowls.events do instead nothing",
            "begin; lock table nightowls.events in exclusive mode",
            "select * from nightowls.events for update",
            "select nightowls._owner()",
        ] {
            let refusal = service.refused(sql);
            assert_eq!(refusal.code, "42501", "{sql}\n{refusal}");
            service.exec("rollback");
        }
        assert_eq!(digest(db), before);
    });
}

#[test]
fn nobody_but_a_superuser_may_switch_the_triggers_off_by_a_setting() {
    on_each_install(|db| {
        a_log(db);
        let before = digest(db);
        for role in [SERVICE, OWNER] {
            let mut session = db.session(role);
            for sql in [
                "set session_replication_role = replica",
                "set local session_replication_role = replica",
                "select set_config('session_replication_role', 'replica', true)",
                "alter role current_user set session_replication_role = replica",
            ] {
                assert_eq!(session.refused(sql).code, "42501", "{role}: {sql}");
            }
        }
        assert_eq!(digest(db), before);
    });
}

#[test]
fn no_setting_of_ours_opens_a_door_for_the_service() {
    on_each_install(|db| {
        a_log(db);
        let before = digest(db);
        let mut service = db.service();
        for setting in [
            "set local search_path to pg_catalog, pg_temp, pg_append",
            "select set_config('nightowls.door', pg_current_xact_id() || '|project', true)",
            "select set_config('nightowls.door', pg_current_xact_id() || '|maintain', true)",
            "select set_config('nightowls.held', pg_current_xact_id() || '|256:0|#0', true)",
            "select nightowls._open_door('maintain')",
            "set row_security = off",
        ] {
            for (sql, code) in [
                ("update nightowls.events set payload = '{}'", "42501"),
                ("delete from nightowls.events", "42501"),
                (
                    "insert into nightowls.events (aggregate_type, aggregate_id, version, event_type) values ('cart', 'c', 2, 'made')",
                    "22023",
                ),
                (
                    "insert into nightowls.events (org_id, aggregate_type, aggregate_id, event_type) \
                     values ('11111111-1111-4111-8111-111111111111', 'cart', 'c', 'made')",
                    "22023",
                ),
            ] {
                service.exec("begin");
                service.exec(setting);
                let refusal = service.refused(sql);
                service.exec("rollback");
                // Row security cannot be set aside by whom it binds.
                let codes = if setting.contains("row_security") {
                    ["42501", "42501"]
                } else {
                    [code, code]
                };
                assert!(
                    codes.contains(&refusal.code.as_str()),
                    "{setting}: {sql}\n{refusal}"
                );
            }
        }
        assert_eq!(digest(db), before);
    });
}

#[test]
fn a_search_path_with_other_operators_and_functions_changes_no_rule() {
    on_each_install(|db| {
        a_log(db);
        let before = digest(db);
        // Every comparison that the rules could use, each with the wrong answer.
        let mut lies = String::from("create schema lies; ");
        for of_type in ["uuid", "text", "bigint", "integer"] {
            lies += &format!(
                "create function lies.no(one {of_type}, other {of_type}) returns boolean language sql immutable return false; "
            );
            for operator in ["=", "<>", "<", "<=", ">", ">="] {
                lies += &format!(
                    "create operator lies.{operator} (function = lies.no, leftarg = {of_type}, rightarg = {of_type}); "
                );
            }
        }
        lies += &format!(
            "create function lies.current_setting(text, boolean) returns text language sql immutable return null; \
             create function lies.starts_with(text, text) returns boolean language sql immutable return false; \
             create function lies.jsonb_path_exists(jsonb, jsonpath) returns boolean language sql immutable return false; \
             create function lies.has_function_privilege(text, text) returns boolean language sql immutable return true; \
             grant usage on schema lies to {SERVICE}; grant execute on all functions in schema lies to {SERVICE}"
        );
        db.superuser().exec(&lies);
        let mut service = db.service();
        service.exec("set search_path to lies, pg_catalog");
        for (sql, code) in [
            (
                "insert into nightowls.events (aggregate_type, aggregate_id, version, event_type) values ('cart', 'c', 2, 'made')",
                "22023",
            ),
            (
                "insert into nightowls.events (aggregate_type, aggregate_id, version, event_type) \
                 values ('cart', 'c', 2, 'made'), ('cart', 'c', 1, 'made')",
                "22023",
            ),
            (
                "insert into nightowls.events (org_id, aggregate_type, aggregate_id, event_type) \
                 values ('11111111-1111-4111-8111-111111111111', 'cart', 'c', 'made')",
                "22023",
            ),
            (
                "insert into nightowls.events (aggregate_type, aggregate_id, event_type, payload) \
                 values ('cart', 'c', 'made', (repeat('[', 101) || repeat(']', 101))::jsonb)",
                "54000",
            ),
            (
                "select nightowls.append_event('cart', 'a', 'made', expected_version => 7)",
                "NW001",
            ),
            (
                "select nightowls.append_event('cart', 'a', 'other', event_id => '00000000-0000-4000-8000-000000000001')",
                "NW002",
            ),
            ("delete from nightowls.events", "42501"),
        ] {
            let refusal = service.refused(sql);
            assert_eq!(refusal.code, code, "{sql}\n{refusal}");
        }
        assert_eq!(digest(db), before);
        let version =
            service.value("select version from nightowls.append_event('cart', 'a', 'made')");
        assert_eq!(version.as_deref(), Some("3"));
    });
}

#[test]
fn a_door_left_open_by_another_transaction_is_shut_for_the_owner_too() {
    on_each_install(|db| {
        a_log(db);
        let before = digest(db);
        let mut owner: Session = db.owner();
        for setting in [
            "select set_config('nightowls.door', '3|maintain', false)",
            "select set_config('nightowls.door', '|maintain', false)",
            "begin; select set_config('nightowls.door', pg_current_xact_id() || '|maintain', false); commit",
        ] {
            owner.exec(setting);
            for (sql, code) in [
                ("update nightowls.events set payload = '{}'", "NW008"),
                (
                    "insert into nightowls.events (aggregate_type, aggregate_id, version, event_type) values ('cart', 'c', 2, 'made')",
                    "22023",
                ),
            ] {
                let refusal = owner.refused(sql);
                assert_eq!(refusal.code, code, "{setting}: {sql}\n{refusal}");
            }
        }
        assert_eq!(digest(db), before);
    });
}

/// The service with the right to change the log, which nothing of ours gives it.
fn bold_service(db: &Db) -> Session {
    db.owner().exec(&format!(
        "grant update, delete, truncate on nightowls.events to {SERVICE}"
    ));
    db.service()
}

#[test]
fn the_door_for_maintenance_opens_in_functions_of_the_owner_only() {
    on_each_install(|db| {
        a_log(db);
        let before = digest(db);
        let mut service = bold_service(db);
        for door in [
            "select nightowls._open_door('maintain')",
            "select set_config('nightowls.door', pg_current_xact_id() || '|maintain', true)",
            "select set_config('nightowls.door', '|maintain', true)",
            "select set_config('nightowls.door', 'maintain', true)",
        ] {
            for sql in [
                "update nightowls.events set payload = '{}'",
                "delete from nightowls.events",
                "truncate nightowls.events",
                "insert into nightowls.events (aggregate_type, aggregate_id, version, event_type) values ('cart', 'c', 2, 'made')",
            ] {
                service.exec("begin");
                service.exec(door);
                let refusal = service.refused(sql);
                service.exec("rollback");
                let code = if sql.starts_with("insert") {
                    "22023"
                } else {
                    "NW008"
                };
                assert_eq!(refusal.code, code, "{door}: {sql}\n{refusal}");
            }
        }
        // Nor for the owner: with another purpose, of another transaction, and for TRUNCATE never.
        let mut owner = db.owner();
        for (door, sql) in [
            (
                "select nightowls._open_door('append')",
                "delete from nightowls.events",
            ),
            (
                "select nightowls._open_door('project')",
                "update nightowls.events set payload = '{}'",
            ),
            (
                "select nightowls._open_door('maintain|x')",
                "delete from nightowls.events",
            ),
            (
                "select set_config('nightowls.door', '3|maintain', true)",
                "delete from nightowls.events",
            ),
            (
                "select nightowls._open_door('maintain')",
                "truncate nightowls.events",
            ),
            (
                "select nightowls._open_door('maintain'); select nightowls._shut_door()",
                "delete from nightowls.events",
            ),
        ] {
            owner.exec("begin");
            owner.exec(door);
            let refusal = owner.refused(sql);
            owner.exec("rollback");
            assert_eq!(refusal.code, "NW008", "{door}: {sql}\n{refusal}");
        }
        assert_eq!(digest(db), before);
    });
}

#[test]
fn the_door_for_maintenance_is_shut_after_an_error_and_after_its_transaction() {
    on_each_install(|db| {
        a_log(db);
        let mut owner = db.owner();
        // As a function of ours does it; the caller has no right of its own to change the log.
        owner.exec(&format!(
            "create schema app; grant usage on schema app to {SERVICE};
             create function app.forget(id text, fails boolean default false) returns bigint
               language plpgsql security definer set search_path to pg_catalog, pg_temp as $$
             declare v_door text := coalesce(current_setting('nightowls.door', true), ''); v_count bigint;
             begin
               perform nightowls._open_door('maintain');
               delete from nightowls.events e where e.aggregate_id = id;
               get diagnostics v_count = row_count;
               if fails then raise exception 'no'; end if;
               perform set_config('nightowls.door', v_door, true);
               return v_count;
             end $$;
             revoke all on function app.forget(text, boolean) from public;
             grant execute on function app.forget(text, boolean) to {SERVICE}"
        ));
        let mut service = bold_service(db);
        let before = digest(db);

        service.exec("begin; savepoint before");
        assert_eq!(
            service.refused("select app.forget('b', true)").code,
            "P0001"
        );
        service.exec("rollback to before");
        for session in [&mut service, &mut owner] {
            assert_eq!(
                session.refused("delete from nightowls.events").code,
                "NW008"
            );
        }
        service.exec("rollback");
        owner.exec(
            "do $$ begin perform app.forget('b', true); exception when raise_exception then null; end $$",
        );
        assert_eq!(digest(db), before);

        let mut caller = db.service();
        caller.exec("begin");
        assert_eq!(caller.value("select app.forget('b')").as_deref(), Some("1"));
        let refusal = caller.refused("delete from nightowls.events");
        caller.exec("rollback");
        assert_eq!(refusal.code, "NW008");

        owner.exec("begin; select nightowls._open_door('maintain'); commit");
        assert_eq!(owner.refused("delete from nightowls.events").code, "NW008");
        assert_eq!(digest(db), before);
    });
}
