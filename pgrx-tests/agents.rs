//! Agents: versions that are never changed, one head, and no agent that changes them.

use std::io::Write as _;
use std::time::Duration;

use postgres::fallible_iterator::FallibleIterator as _;
use postgres::{Config, NoTls};

use crate::fixture::{default_org, lines, new_org, together};
use crate::projections::text;
use crate::support::{Db, SERVICE, on_each_install, on_each_route, quote};

const VERSIONS: &str = "select version, restored_from, actor_type, content from nightowls.agent_versions order by slug, version";

#[test]
fn publishing_and_rolling_back_make_versions_one_head_events_and_an_audit() {
    on_each_route(|db| {
        let org = default_org(db);
        let mut service = db.service();
        for (sql, answer) in [
            (
                r#"select nightowls.publish_agent_version('sage', '{"instructions": "Be brief.", "modelId": "m-1", "skillNames": ["a"], "delegateSlugs": [], "temperature": 0.10}')"#,
                "1",
            ),
            (
                r#"select nightowls.publish_agent_version('sage', '{"instructions": "Be long."}', '{"type": "user", "id": "ann"}', version => 2)"#,
                "2",
            ),
            (
                "select r.version || ' from ' || r.restored_from from nightowls.rollback_agent_version('sage', 1) r",
                "3 from 1",
            ),
            (
                "select (nightowls.get_agent('sage')).content ->> 'model_id'",
                "m-1",
            ),
            (
                "select (nightowls.get_agent('sage', 2)).content ->> 'instructions'",
                "Be long.",
            ),
            (
                "select count(*) from nightowls.list_agent_versions('nobody')",
                "0",
            ),
        ] {
            assert_eq!(text(&mut service, sql), answer, "{sql}");
        }
        assert_eq!(
            lines(
                &mut service,
                "select version, is_head, content, actor, restored_from from nightowls.list_agent_versions('sage')"
            ),
            [
                r#"1 f {"model_id": "m-1", "skill_names": ["a"], "temperature": 0.10, "instructions": "Be brief.", "delegate_slugs": []} {"id": null, "type": "service"} null"#,
                r#"2 f {"instructions": "Be long."} {"id": "ann", "type": "user"} null"#,
                r#"3 t {"model_id": "m-1", "skill_names": ["a"], "temperature": 0.10, "instructions": "Be brief.", "delegate_slugs": []} {"id": null, "type": "service"} 1"#,
            ]
        );
        assert_eq!(
            lines(
                &mut service,
                "select version, event_type, payload, metadata from nightowls.read_aggregate('agent', 'sage')"
            ),
            [
                r#"1 agent_published {"actor": {"type": "service"}, "version": 1} {}"#,
                r#"2 agent_published {"actor": {"id": "ann", "type": "user"}, "version": 2} {"actor_id": "ann"}"#,
                r#"3 agent_rolled_back {"actor": {"type": "service"}, "version": 3, "restored_from": 1} {}"#,
            ]
        );
        assert_eq!(
            lines(
                &mut service,
                &format!(
                    "select action, subject, actor_type, actor_id, detail from nightowls.audit_log where org_id = '{org}' order by audit_id"
                )
            ),
            [
                r#"publish sage service null {"version": 1}"#,
                r#"publish sage user ann {"version": 2}"#,
                r#"rollback sage service null {"version": 3, "restored_from": 1}"#,
            ]
        );
        assert_eq!(
            lines(
                &mut service,
                "select slug, version, actor_type from nightowls.agents"
            ),
            ["sage 3 service"]
        );
    });
}

#[test]
fn what_will_not_do_is_refused_and_leaves_nothing() {
    on_each_install(|db| {
        default_org(db);
        let mut service = db.service();
        service.exec("select nightowls.publish_agent_version('sage', '{}')");
        let before = everything(db);
        let long = "x".repeat(256);
        for (sql, code) in [
            (
                "select nightowls.publish_agent_version(null, '{}')",
                "22004",
            ),
            ("select nightowls.publish_agent_version('', '{}')", "54000"),
            (
                &format!("select nightowls.publish_agent_version('{long}', '{{}}')"),
                "54000",
            ),
            (
                "select nightowls.publish_agent_version('sage', null)",
                "22004",
            ),
            (
                "select nightowls.publish_agent_version('sage', '[]')",
                "22023",
            ),
            (
                r#"select nightowls.publish_agent_version('sage', '{"modelId": 7}')"#,
                "22023",
            ),
            (
                r#"select nightowls.publish_agent_version('sage', '{"skillNames": ["a", 1]}')"#,
                "22023",
            ),
            (
                r#"select nightowls.publish_agent_version('sage', '{"modelId": "a", "model_id": "b"}')"#,
                "22023",
            ),
            (
                "select nightowls.publish_agent_version('sage', (repeat('[', 101) || repeat(']', 101))::jsonb)",
                "22023",
            ),
            (
                r#"select nightowls.publish_agent_version('sage', jsonb_build_object('deep', (repeat('[', 101) || repeat(']', 101))::jsonb))"#,
                "54000",
            ),
            (
                "select nightowls.publish_agent_version('sage', '{}', '\"ann\"')",
                "22023",
            ),
            (
                r#"select nightowls.publish_agent_version('sage', '{}', '{"type": "user", "id": 7}')"#,
                "22023",
            ),
            (
                "select nightowls.publish_agent_version('sage', '{}', version => 1)",
                "NW001",
            ),
            (
                "select nightowls.publish_agent_version('sage', '{}', version => 3)",
                "NW001",
            ),
            (
                "select nightowls.publish_agent_version('new', '{}', version => 2)",
                "NW001",
            ),
            (
                "select nightowls.publish_agent_version('new', '{}', org => '00000000-0000-4000-8000-00000000dead')",
                "22023",
            ),
            (
                "select nightowls.rollback_agent_version('sage', 2)",
                "NW007",
            ),
            (
                "select nightowls.rollback_agent_version('sage', 0)",
                "NW007",
            ),
            (
                "select nightowls.rollback_agent_version('sagi', 1)",
                "NW007",
            ),
            (
                "select nightowls.rollback_agent_version('sage', null)",
                "22004",
            ),
            ("select nightowls.get_agent('sagi')", "NW007"),
            ("select nightowls.get_agent('sage', 2)", "NW007"),
            ("select nightowls.list_agent_versions(null)", "22004"),
        ] {
            let refusal = service.refused(sql);
            assert_eq!(refusal.code, code, "{sql}: {refusal}");
        }
        assert!(
            service
                .refused("select nightowls.get_agent('sagi')")
                .hint
                .contains("\"sage\"")
        );
        assert!(
            service
                .refused("select nightowls.publish_agent_version('sage', '{}', version => 9)")
                .detail
                .contains("actual version 1")
        );
        assert_eq!(everything(db), before);
    });
}

/// All that is stored of agents.
fn everything(db: &Db) -> Vec<String> {
    let mut all = Vec::new();
    for table in ["agents", "agent_versions", "audit_log", "events"] {
        all.extend(lines(
            &mut db.superuser(),
            &format!("select t::text from nightowls.{table} t order by 1"),
        ));
    }
    all
}

#[track_caller]
fn copy_in(db: &Db, role: &str, table: &str, row: &str) -> String {
    let copied = db
        .session(role)
        .client()
        .copy_in(&format!("copy nightowls.{table} from stdin"))
        .and_then(|mut writer| {
            writer.write_all(row.as_bytes()).expect("a few bytes");
            writer.finish()
        });
    let error = copied.expect_err("the row is refused");
    error.code().expect("the server says why").code().to_owned()
}

#[test]
fn an_agent_publishes_and_rolls_back_by_no_way_at_all() {
    on_each_install(|db| {
        let org = default_org(db);
        db.service().exec("select nightowls.publish_agent_version('sage', '{}'), nightowls.publish_agent_version('sage', '{\"a\": 1}')");
        // Somebody has given all there is to give.
        db.superuser().exec("grant all on all tables in schema nightowls to owl_app; grant usage on schema nightowls to owl_app");
        let before = everything(db);
        let agent = r#"{"type": "agent", "id": "sage"}"#;
        let version = |actor: &str| {
            format!(
                "insert into nightowls.agent_versions values ('{org}', 'sage', 3, '{{}}', '{actor}', 'x')"
            )
        };
        let head = |actor: &str| {
            format!("update nightowls.agents set version = 1, actor_type = '{actor}'")
        };
        for role in [db.install().owner(), SERVICE, "owl_app"] {
            // Who is under policies cannot COPY at all.
            let copied = |code: &'static str| if role == SERVICE { "0A000" } else { code };
            let mut session = db.session(role);
            if role == "owl_app" {
                // Not under the policies: then only the guard is left.
                db.superuser().exec("alter role owl_app bypassrls");
            } else {
                for call in [
                    format!("select nightowls.publish_agent_version('sage', '{{}}', '{agent}')"),
                    format!("select nightowls.rollback_agent_version('sage', 1, '{agent}')"),
                    "select nightowls.publish_agent_version('new', '{}', '{\"type\": \" Agent \"}')".to_owned(),
                    format!(
                        "select nightowls._publish_agent('{org}', 'sage', '{{}}', '{agent}', null, null)"
                    ),
                ] {
                    assert_eq!(session.refused(&call).code, "NW004", "{role}: {call}");
                }
            }
            assert_eq!(session.refused(&version("agent")).code, "NW004", "{role}");
            assert_eq!(session.refused(&version("AGENT")).code, "NW004", "{role}");
            assert_eq!(session.refused(&head("agent")).code, "NW004", "{role}");
            assert_eq!(
                session
                    .refused(&format!(
                        "insert into nightowls.agents values ('{org}', 'new', 1, 'agent')"
                    ))
                    .code,
                "NW004"
            );
            assert_eq!(
                copy_in(
                    db,
                    role,
                    "agent_versions",
                    &format!("{org}\tsage\t3\t{{}}\tagent\tx\t\\N\t2026-01-01\n")
                ),
                copied("NW004"),
                "{role}"
            );
            // Nor under another name: these tables have one way in.
            assert_eq!(session.refused(&version("service")).code, "NW008", "{role}");
            assert_eq!(session.refused(&head("service")).code, "NW008", "{role}");
            assert_eq!(
                copy_in(
                    db,
                    role,
                    "agent_versions",
                    &format!("{org}\tsage\t3\t{{}}\tuser\tx\t\\N\t2026-01-01\n")
                ),
                copied("NW008"),
                "{role}"
            );
            // Nor with a forged door, but for the owner, who may alter the table as well.
            if role != db.install().owner() {
                session.exec("begin; select pg_current_xact_id(); select set_config('nightowls.door', pg_current_xact_id()::text || '|agents', true)");
                assert_eq!(session.refused(&version("service")).code, "NW008", "{role}");
                session.exec("rollback");
            }
            // The JWT says what the caller is, whatever the argument says.
            for claims in [
                r#"{"actor_type": "agent", "sub": "x"}"#,
                r#"{"app_metadata": {"actor_type": "agent"}}"#,
            ] {
                let mut calls = vec![version("service"), head("service")];
                if role != "owl_app" {
                    calls.push("select nightowls.publish_agent_version('sage', '{}')".to_owned());
                    calls.push("select nightowls.publish_agent_version('sage', '{}', '{\"type\": \"service\"}')".to_owned());
                    calls.push("select nightowls.rollback_agent_version('sage', 1)".to_owned());
                }
                for call in calls {
                    session.exec(&format!("begin; select set_config('request.jwt.claims', {}, true), set_config('nightowls.org_id', '{org}', true)", quote(claims)));
                    assert_eq!(
                        session.refused(&call).code,
                        "NW004",
                        "{role}: {claims}: {call}"
                    );
                    session.exec("rollback");
                }
            }
        }
        db.superuser().exec("alter role owl_app nobypassrls");
        assert_eq!(everything(db), before);
    });
}

#[test]
fn no_version_and_no_record_is_ever_changed_or_removed() {
    on_each_install(|db| {
        default_org(db);
        db.service()
            .exec("select nightowls.publish_agent_version('sage', '{}')");
        let before = everything(db);
        for role in [db.install().owner(), crate::support::SUPERUSER] {
            let mut session = db.session(role);
            for sql in [
                "update nightowls.agent_versions set content = '{\"a\": 1}'",
                "delete from nightowls.agent_versions",
                "truncate nightowls.agent_versions",
                "update nightowls.audit_log set actor_id = 'x'",
                "delete from nightowls.audit_log",
                "truncate nightowls.audit_log",
                "delete from nightowls.agents",
                "truncate nightowls.agents",
                "update nightowls.agents set slug = 'x'",
            ] {
                assert_eq!(session.refused(sql).code, "NW008", "{role}: {sql}");
            }
        }
        assert_eq!(everything(db), before);
    });
}

#[test]
fn parallel_publications_number_without_a_hole_and_leave_one_head() {
    on_each_route(|db| {
        default_org(db);
        let versions = together(
            20,
            |_| db.service(),
            |nth, mut session| {
                text(
                    &mut session,
                    &format!(
                        "select nightowls.publish_agent_version('sage', '{{\"nth\": {nth}}}')"
                    ),
                )
                .parse::<i64>()
                .unwrap()
            },
        );
        let mut sorted = versions.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (1..=20).collect::<Vec<_>>());
        let mut service = db.service();
        assert_eq!(
            lines(
                &mut service,
                "select version from nightowls.list_agent_versions('sage') where is_head"
            ),
            ["20"]
        );
        for (nth, version) in versions.iter().enumerate() {
            assert_eq!(
                text(
                    &mut service,
                    &format!("select (nightowls.get_agent('sage', {version})).content ->> 'nth'")
                ),
                nth.to_string()
            );
        }
        // The log has them in the same order.
        assert_eq!(
            lines(
                &mut service,
                "select version = (payload ->> 'version')::bigint from nightowls.read_aggregate('agent', 'sage') where version is not null"
            ),
            ["t"; 20]
        );
    });
}

#[test]
fn a_rolled_back_publication_leaves_no_version_no_event_and_no_notification() {
    on_each_install(|db| {
        let org = default_org(db);
        let other = new_org(db, "other");
        let mut listener = Config::new()
            .host("127.0.0.1")
            .port(db.cluster().port())
            .dbname(db.name())
            .user(SERVICE)
            .connect(NoTls)
            .unwrap();
        listener.batch_execute("listen nightowls_agents").unwrap();
        let mut service = db.service();
        service.exec("begin; select nightowls.publish_agent_version('gone', '{}'); rollback");
        service.exec("begin; select nightowls.publish_agent_version('kept', '{}'); savepoint s; select nightowls.publish_agent_version('gone', '{}'); rollback to s");
        assert_eq!(
            listener
                .notifications()
                .timeout_iter(Duration::from_millis(300))
                .count()
                .unwrap(),
            0,
            "not before the commit"
        );
        service.exec("commit");
        service.exec(&format!("select nightowls.publish_agent_version('kept', '{{}}', org => '{other}'), nightowls.rollback_agent_version('kept', 1, org => '{other}')"));
        let mut heard = Vec::new();
        let mut notifications = listener.notifications();
        let mut told = notifications.timeout_iter(Duration::from_secs(10));
        while heard.len() < 2 {
            heard.push(
                told.next()
                    .unwrap()
                    .expect("a notification")
                    .payload()
                    .to_owned(),
            );
        }
        assert_eq!(heard, [format!("{org}:kept"), format!("{other}:kept")]);
        assert_eq!(
            lines(
                &mut service,
                "select org_id, slug from nightowls.agents order by version"
            ),
            [format!("{org} kept"), format!("{other} kept")]
        );
        assert_eq!(
            text(
                &mut service,
                "select count(*) from nightowls.events where aggregate_id = 'gone'"
            ),
            "0"
        );
    });
}

#[test]
fn agents_of_two_orgs_do_not_meet() {
    on_each_install(|db| {
        default_org(db);
        let other = new_org(db, "other");
        let mut service = db.service();
        service.exec(&format!("select nightowls.publish_agent_version('sage', '{{\"a\": 1}}'), nightowls.publish_agent_version('sage', '{{\"a\": 2}}', org => '{other}')"));
        assert_eq!(
            lines(&mut service, VERSIONS),
            [r#"1 null service {"a": 1}"#, r#"1 null service {"a": 2}"#]
        );
        assert_eq!(
            text(
                &mut service,
                &format!("select (nightowls.get_agent('sage', org => '{other}')).content ->> 'a'")
            ),
            "2"
        );
        service.exec(&format!(
            "select nightowls.erase('agent', 'sage', 'asked', '{other}')"
        ));
        assert_eq!(
            lines(&mut service, VERSIONS),
            [r#"1 null service {"a": 1}"#, r#"1 null service {}"#]
        );
    });
}
