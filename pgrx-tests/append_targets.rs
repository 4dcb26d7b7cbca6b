//! What an append knows of its org from one row: which one it is, that it is
//! there, and what follows. The row repeats what is said elsewhere.

use std::time::Duration;

use crate::fixture::{default_org, is_blocked, lines, new_org};
use crate::support::{Db, Session, on_each_install, wait_until};

const APPEND: &str = "select nightowls.append_event('order', 'a', 'made', '{\"n\": 1}')";
const COUNTS: &str = r#"{"initial": {"n": 0}, "on": {"made": [{"op": "add", "path": "n"}]}}"#;

/// The org of the newest event.
fn newest_org(db: &Db) -> String {
    db.superuser()
        .value("select org_id from nightowls.events order by position desc limit 1")
        .expect("an event")
}

fn project(session: &mut Session, name: &str, kind: &str) {
    session.exec(&format!(
        "select nightowls.create_projection('{name}', '{kind}', '{COUNTS}')"
    ));
}

#[test]
fn an_append_that_names_no_org_follows_every_change_of_the_default() {
    on_each_install(|db| {
        let one = default_org(db);
        let two = new_org(db, "two");
        let mut service = db.service();
        for (change, org) in [
            ("select 1".to_owned(), &one),
            (format!("select nightowls.set_default_org('{two}')"), &two),
            (
                format!(
                    "update nightowls.settings set value = to_jsonb('{one}'::text) where name = 'default_org'"
                ),
                &one,
            ),
            (
                format!(
                    "update nightowls.settings set name = 'other' where name = 'default_org';
                     insert into nightowls.settings values ('default_org', to_jsonb('{two}'::text))"
                ),
                &two,
            ),
        ] {
            service.exec(&change);
            service.exec(APPEND);
            assert_eq!(&newest_org(db), org, "{change}");
            // A change that is rolled back is none.
            service.exec("begin; select nightowls.set_default_org(null); rollback");
            service.exec(APPEND);
            assert_eq!(&newest_org(db), org, "{change}");
        }
        service.exec("select nightowls.set_default_org(null)");
        assert_eq!(service.refused(APPEND).code, "NW010");
        // An org that is made after it was chosen.
        let three = "00000000-0000-4000-8000-000000000003";
        service.exec(&format!(
            "insert into nightowls.settings values ('default_org', '\"{three}\"')"
        ));
        assert_eq!(service.refused(APPEND).code, "22023");
        service.exec(&format!(
            "insert into nightowls.orgs (org_id, name) values ('{three}', 'three')"
        ));
        service.exec(APPEND);
        assert_eq!(newest_org(db), three);
        // One that is gone takes no more, to its old aggregates neither.
        service.exec(&format!(
            "delete from nightowls.orgs where org_id = '{three}'"
        ));
        assert_eq!(service.refused(APPEND).code, "22023");
        service.exec(&format!(
            "update nightowls.orgs set org_id = '{three}' where org_id = '{two}'"
        ));
        service.exec(APPEND);
        assert_eq!(newest_org(db), three);
    });
}

#[test]
fn an_org_that_appends_do_not_know_is_made_known_by_its_next_append() {
    on_each_install(|db| {
        default_org(db);
        project(&mut db.owner(), "counts", "order");
        for append in [
            APPEND,
            "select nightowls.append_events('order', 'a', '[{\"event_type\": \"made\"}]')",
            "select nightowls.append_event('order', 'a', 'made', event_id => gen_random_uuid())",
            "insert into nightowls.events (aggregate_type, aggregate_id, event_type) values ('order', 'a', 'made')",
        ] {
            let mut superuser = db.superuser();
            superuser.exec("delete from nightowls._append_targets");
            db.service().exec(append);
            assert_eq!(
                lines(
                    &mut superuser,
                    "select follows from nightowls._append_targets where org_id = target"
                ),
                [r#"{"order": "reducer:counts"}"#],
                "{append}"
            );
        }
        assert_eq!(
            lines(
                &mut db.service(),
                "select version, state from nightowls.projection_states"
            ),
            [r#"4 {"n": 4}"#]
        );
        assert_eq!(
            lines(
                &mut db.service(),
                "select * from nightowls.verify_projection('counts')"
            ),
            [""; 0]
        );
    });
}

#[test]
fn two_projections_made_at_once_are_both_kept_from_then_on() {
    on_each_install(|db| {
        default_org(db);
        let (mut one, mut two) = (db.owner(), db.owner());
        let mut watcher = db.superuser();
        let pid = two.pid();
        one.exec("begin");
        project(&mut one, "orders", "order");
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                project(&mut two, "carts", "cart");
                project(&mut two, "more_carts", "cart");
            });
            wait_until("the second waits", Duration::from_secs(10), || {
                is_blocked(&mut watcher, pid)
            });
            // Nobody who appends waits for either.
            db.service().exec(APPEND);
            one.exec("commit");
            thread.join().expect("the thread ends");
        });
        assert_eq!(
            lines(
                &mut watcher,
                "select distinct follows from nightowls._append_targets"
            ),
            [r#"{"cart": "reducer", "order": "reducer:orders"}"#]
        );
        let mut service = db.service();
        service.exec(APPEND);
        service.exec("select nightowls.append_event('cart', 'c', 'made')");
        assert_eq!(
            lines(
                &mut service,
                "select projection, aggregate_id, version, state from nightowls.projection_states order by 1"
            ),
            [
                r#"carts c 1 {"n": 1}"#,
                r#"more_carts c 1 {"n": 1}"#,
                r#"orders a 2 {"n": 2}"#
            ]
        );
        db.owner()
            .exec("select nightowls.drop_projection('orders'), nightowls.drop_projection('carts')");
        assert_eq!(
            lines(
                &mut watcher,
                "select distinct follows from nightowls._append_targets"
            ),
            [r#"{"cart": "reducer:more_carts"}"#]
        );
    });
}

/// What `append_events` looks at with a comparison, not key by key.
#[test]
fn an_event_with_any_other_key_is_refused_whatever_it_is_called() {
    on_each_install(|db| {
        default_org(db);
        let mut service = db.service();
        for known in [
            "",
            r#", "payload": null"#,
            r#", "metadata": {"a": 1}"#,
            r#", "payload": {}, "metadata": null"#,
        ] {
            for other in [
                r#""": null"#,
                r#""": 1"#,
                r#""\u0001": null"#,
                r#""!": null"#,
                r#""event_typ": "b""#,
                r#""zzzzzzzzzzzzzzz": {}"#,
                r#""": null, "\u0001": null"#,
            ] {
                let refusal = service.refused(&format!(
                    r#"select nightowls.append_events('cart', 'x', '[{{"event_type": "a"{known}, {other}}}]')"#
                ));
                assert_eq!(refusal.code, "22023", "{known} {other}: {refusal}");
                assert!(refusal.message.contains("unknown key"), "{refusal}");
            }
            service.exec(&format!(
                r#"select nightowls.append_events('cart', 'known', '[{{"event_type": "a"{known}}}]')"#
            ));
        }
        assert_eq!(
            lines(&mut service, "select count(*) from nightowls.events"),
            ["4"]
        );
    });
}
