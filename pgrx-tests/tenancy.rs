//! Orgs: how they are made, and which one a call is for.

use crate::fixture::{default_org, new_org, together};
use crate::support::{Db, SERVICE, STRANGER, Session, on_each_install, on_each_route, quote};

const SOME_ID: &str = "11111111-1111-4111-8111-111111111111";

/// What `current_org()` says in a transaction with these settings.
fn resolved(
    session: &mut Session,
    settings: &[(&str, &str)],
    argument: &str,
) -> Result<Option<String>, String> {
    session.exec("begin");
    for (name, value) in settings {
        session.exec(&format!(
            "select set_config({}, {}, true)",
            quote(name),
            quote(value)
        ));
    }
    let answer = session.try_value(&format!("select nightowls.current_org({argument})"));
    session.exec("rollback");
    answer.map_err(|refusal| refusal.code)
}

/// A role that may call what members call, and is no service.
fn admit_the_stranger(db: &Db) {
    db.direct(db.install().owner()).exec(&format!(
        "grant usage on schema nightowls to {STRANGER}; \
         grant execute on function nightowls.current_org, nightowls._resolve_org, nightowls._is_service, \
           nightowls._is_member, nightowls._user_id, nightowls.append_event, nightowls.append_events, \
           nightowls.append_many, nightowls.read_events, nightowls.read_aggregate, nightowls.recent_events, \
           nightowls.last_event, nightowls.create_org, nightowls.set_default_org to {STRANGER}"
    ));
}

#[test]
fn create_org_with_the_same_definition_again_returns_the_same_org() {
    on_each_route(|db| {
        let mut service = db.service();
        let org = service
            .value("select nightowls.create_org('acme', 'org_acme')")
            .expect("an id");
        for again in [
            "select nightowls.create_org('acme', 'org_acme')".to_owned(),
            format!("select nightowls.create_org('acme', 'org_acme', '{org}')"),
            format!(
                "select nightowls.create_org(name => 'acme', external_id => 'org_acme', org => '{org}')"
            ),
        ] {
            assert_eq!(
                service.value(&again).as_deref(),
                Some(org.as_str()),
                "{again}"
            );
        }
        let chosen = service.value(&format!(
            "select nightowls.create_org('chosen', org => '{SOME_ID}')"
        ));
        assert_eq!(chosen.as_deref(), Some(SOME_ID));
        assert_eq!(
            service
                .value("select count(*) from nightowls.orgs")
                .as_deref(),
            Some("2")
        );
    });
}

#[test]
fn orgs_without_a_foreign_id_may_share_a_name() {
    on_each_install(|db| assert_ne!(new_org(db, "acme"), new_org(db, "acme")));
}

#[test]
fn create_org_with_another_definition_is_refused_with_42710() {
    on_each_install(|db| {
        let mut service = db.service();
        service.exec(&format!(
            "select nightowls.create_org('acme', 'org_acme', '{SOME_ID}')"
        ));
        for other in [
            "'umbrella', 'org_acme'".to_owned(),
            format!("'umbrella', 'org_acme', '{SOME_ID}'"),
            format!("'acme', 'org_other', '{SOME_ID}'"),
            format!("'acme', null, '{SOME_ID}'"),
            "'acme', 'org_acme', '22222222-2222-4222-8222-222222222222'".to_owned(),
        ] {
            let refusal = service.refused(&format!("select nightowls.create_org({other})"));
            assert_eq!(refusal.code, "42710", "{other}: {refusal}");
            assert!(
                refusal.detail.contains("\"acme\"") && refusal.detail.contains("\"org_acme\""),
                "{other}: {refusal}"
            );
            assert!(!refusal.hint.is_empty(), "{other}: {refusal}");
        }
        assert_eq!(
            service
                .value("select count(*) from nightowls.orgs")
                .as_deref(),
            Some("1")
        );
    });
}

#[test]
fn create_org_refuses_a_name_that_is_null_or_empty() {
    on_each_install(|db| {
        let mut service = db.service();
        assert_eq!(
            service.refused("select nightowls.create_org(null)").code,
            "22004"
        );
        assert_eq!(
            service.refused("select nightowls.create_org('')").code,
            "22023"
        );
    });
}

#[test]
fn parallel_calls_of_create_org_make_one_org() {
    on_each_install(|db| {
        let ids = together(
            8,
            |_| db.service(),
            |_, mut session| session.value("select nightowls.create_org('acme', 'org_acme')"),
        );
        assert!(
            ids[0].is_some() && ids.iter().all(|id| *id == ids[0]),
            "{ids:?}"
        );
    });
}

#[test]
fn each_source_of_the_org_comes_before_the_next() {
    on_each_route(|db| {
        let default = default_org(db);
        let argument = new_org(db, "argument");
        let setting = new_org(db, "setting");
        let claim = new_org(db, "claim");
        let metadata = new_org(db, "metadata");
        let foreign = db
            .owner()
            .value("select nightowls.create_org('foreign', 'org_2abc')")
            .expect("an id");
        let as_argument = format!("'{argument}'");
        let claims = format!(
            r#"{{"sub": "ann", "org_id": "{claim}", "app_metadata": {{"org_id": "{metadata}"}}, "user_metadata": {{"org_id": "{argument}"}}}}"#
        );
        let in_metadata = format!(
            r#"{{"app_metadata": {{"org_id": "{metadata}"}}, "user_metadata": {{"org_id": "{argument}"}}}}"#
        );
        let only_users =
            format!(r#"{{"sub": "ann", "user_metadata": {{"org_id": "{argument}"}}}}"#);
        let upper = setting.to_uppercase();
        const SETTING: &str = "nightowls.org_id";
        const JWT: &str = "request.jwt.claims";

        let mut service = db.service();
        for (what, settings, argument_sql, expected) in [
            (
                "the argument beats all",
                vec![(SETTING, setting.as_str()), (JWT, claims.as_str())],
                as_argument.as_str(),
                &argument,
            ),
            (
                "the transaction's setting beats the JWT",
                vec![(SETTING, setting.as_str()), (JWT, claims.as_str())],
                "",
                &setting,
            ),
            (
                "a null argument is none",
                vec![(SETTING, setting.as_str())],
                "null",
                &setting,
            ),
            (
                "a uuid is one in capitals too",
                vec![(SETTING, upper.as_str())],
                "",
                &setting,
            ),
            (
                "an empty setting is none",
                vec![(SETTING, ""), (JWT, claims.as_str())],
                "",
                &claim,
            ),
            (
                "the JWT's org_id beats its app_metadata",
                vec![(JWT, claims.as_str())],
                "",
                &claim,
            ),
            (
                "app_metadata beats the default",
                vec![(JWT, in_metadata.as_str())],
                "",
                &metadata,
            ),
            (
                "a claim that is no uuid is looked up",
                vec![(JWT, r#"{"org_id": "org_2abc"}"#)],
                "",
                &foreign,
            ),
            (
                "so is one under app_metadata",
                vec![(JWT, r#"{"app_metadata": {"org_id": "org_2abc"}}"#)],
                "",
                &foreign,
            ),
            (
                "user_metadata is never read",
                vec![(JWT, only_users.as_str())],
                "",
                &default,
            ),
            (
                "a claim that is JSON's null is none",
                vec![(JWT, r#"{"org_id": null}"#)],
                "",
                &default,
            ),
            ("an empty JWT is none", vec![(JWT, "")], "", &default),
            ("the default comes last", vec![], "", &default),
        ] {
            assert_eq!(
                resolved(&mut service, &settings, argument_sql),
                Ok(Some(expected.clone())),
                "{what}"
            );
        }
        // A transaction's setting ends with it.
        assert_eq!(resolved(&mut service, &[], ""), Ok(Some(default)));
    });
}

#[test]
fn a_claim_that_names_no_org_is_refused_with_nw010_and_not_replaced_by_the_default() {
    on_each_install(|db| {
        default_org(db);
        let mut service = db.service();
        for claims in [
            r#"{"org_id": "org_unknown"}"#,
            r#"{"app_metadata": {"org_id": "org_unknown"}}"#,
            r#"{"org_id": 7}"#,
        ] {
            let answer = resolved(&mut service, &[("request.jwt.claims", claims)], "");
            assert_eq!(answer, Err("NW010".to_owned()), "{claims}");
        }
    });
}

#[test]
fn without_any_org_every_call_is_refused_with_nw010() {
    on_each_route(|db| {
        let mut service = db.service();
        for call in [
            "select nightowls.current_org()",
            "select nightowls.append_event('cart', 'a', 'made')",
            r#"select nightowls.append_events('cart', 'a', '[{"event_type": "made"}]')"#,
            r#"select nightowls.append_many('[{"aggregate_type": "cart", "aggregate_id": "a", "events": [{"event_type": "made"}]}]')"#,
            "insert into nightowls.events (aggregate_type, aggregate_id, event_type) values ('cart', 'a', 'made')",
            "select nightowls.read_events()",
            "select nightowls.read_aggregate('cart', 'a')",
            "select nightowls.recent_events()",
            "select nightowls.last_event('cart', 'a')",
        ] {
            let refusal = service.refused(call);
            assert_eq!(refusal.code, "NW010", "{call}: {refusal}");
            assert!(!refusal.hint.is_empty(), "{call}: {refusal}");
        }
    });
}

#[test]
fn what_is_no_uuid_is_refused() {
    on_each_install(|db| {
        default_org(db);
        let mut service = db.service();
        let setting = resolved(&mut service, &[("nightowls.org_id", "acme")], "");
        assert_eq!(setting, Err("22023".to_owned()));
        let argument = resolved(&mut service, &[], "'acme'");
        assert_eq!(argument, Err("22P02".to_owned()));
        let claims = resolved(&mut service, &[("request.jwt.claims", "{not JSON")], "");
        assert_eq!(claims, Err("22P02".to_owned()));
        assert!(service.alive());
    });
}

#[test]
fn set_default_org_sets_changes_and_unsets_it() {
    on_each_route(|db| {
        let (first, second) = (new_org(db, "first"), new_org(db, "second"));
        let mut service = db.service();
        for org in [&first, &second, &second] {
            service.exec(&format!("select nightowls.set_default_org('{org}')"));
            assert_eq!(resolved(&mut service, &[], ""), Ok(Some(org.clone())));
        }

        let refusal = service.refused(&format!("select nightowls.set_default_org('{SOME_ID}')"));
        assert_eq!(refusal.code, "NW007", "{refusal}");
        assert_eq!(resolved(&mut service, &[], ""), Ok(Some(second)));

        service.exec("select nightowls.set_default_org(null)");
        assert_eq!(resolved(&mut service, &[], ""), Err("NW010".to_owned()));
    });
}

#[test]
fn a_caller_who_is_neither_service_nor_member_is_refused_with_42501_by_every_call() {
    on_each_route(|db| {
        let org = default_org(db);
        db.service()
            .exec("select nightowls.append_event('cart', 'a', 'made')");
        admit_the_stranger(db);
        let mut stranger = db.session(STRANGER);
        for named in [String::new(), format!("org => '{org}'")] {
            let and_named = if named.is_empty() {
                String::new()
            } else {
                format!(", {named}")
            };
            for call in [
                format!("select nightowls.current_org({named})"),
                format!("select nightowls.append_event('cart', 'a', 'made'{and_named})"),
                format!(
                    r#"select nightowls.append_events('cart', 'a', '[{{"event_type": "made"}}]'{and_named})"#
                ),
                format!(
                    r#"select nightowls.append_many('[{{"aggregate_type": "cart", "aggregate_id": "a", "events": [{{"event_type": "made"}}]}}]'{and_named})"#
                ),
                format!("select nightowls.read_events({named})"),
                format!("select nightowls.read_aggregate('cart', 'a'{and_named})"),
                format!("select nightowls.recent_events({named})"),
                format!("select nightowls.last_event('cart', 'a'{and_named})"),
            ] {
                let refusal = stranger.refused(&call);
                assert_eq!(refusal.code, "42501", "{call}: {refusal}");
            }
        }
        for call in [
            "select nightowls.create_org('mine')".to_owned(),
            format!("select nightowls.set_default_org('{org}')"),
            "select nightowls.set_default_org(null)".to_owned(),
            "select count(*) from nightowls.events".to_owned(),
            "insert into nightowls.events (aggregate_type, aggregate_id, event_type) values ('cart', 'a', 'made')"
                .to_owned(),
            "insert into nightowls.org_members (org_id, user_id) values (gen_random_uuid(), 'me')".to_owned(),
        ] {
            let refusal = stranger.refused(&call);
            assert_eq!(refusal.code, "42501", "{call}: {refusal}");
        }
    });
}

#[test]
fn a_member_is_known_by_the_jwt_or_the_setting_and_only_in_the_own_org() {
    on_each_route(|db| {
        let (own, foreign) = (new_org(db, "own"), new_org(db, "foreign"));
        admit_the_stranger(db);
        db.service().exec(&format!(
            "insert into nightowls.org_members (org_id, user_id) values ('{own}', 'ann'), ('{foreign}', 'bob')"
        ));
        let mut stranger = db.session(STRANGER);
        let (own_argument, foreign_argument) = (format!("'{own}'"), format!("'{foreign}'"));
        const JWT: &str = "request.jwt.claims";
        let named = format!(r#"{{"sub": "ann", "org_id": "{own}"}}"#);
        let lying = format!(r#"{{"sub": "ann", "org_id": "{foreign}"}}"#);

        for (settings, argument, expected) in [
            (vec![(JWT, r#"{"sub": "ann"}"#)], &own_argument, Some(&own)),
            (
                vec![("nightowls.user_id", "ann")],
                &own_argument,
                Some(&own),
            ),
            (vec![(JWT, named.as_str())], &String::new(), Some(&own)),
            // The JWT's subject comes before the setting.
            (
                vec![(JWT, r#"{"sub": "bob"}"#), ("nightowls.user_id", "ann")],
                &own_argument,
                None,
            ),
            (vec![(JWT, r#"{"sub": "ann"}"#)], &foreign_argument, None),
            (vec![(JWT, lying.as_str())], &String::new(), None),
            (vec![(JWT, r#"{"sub": ""}"#)], &own_argument, None),
            (vec![], &own_argument, None),
        ] {
            let answer = resolved(&mut stranger, &settings, argument);
            let expected = expected.map(|org| Some(org.clone()));
            assert_eq!(
                answer,
                expected.ok_or_else(|| "42501".to_owned()),
                "{settings:?} {argument}"
            );
        }
    });
}

#[test]
fn the_service_and_the_owner_may_name_any_org() {
    on_each_install(|db| {
        let (one, two) = (new_org(db, "one"), new_org(db, "two"));
        for role in [SERVICE, db.install().owner()] {
            let mut session = db.session(role);
            for org in [&one, &two] {
                let answer = resolved(&mut session, &[], &format!("'{org}'"));
                assert_eq!(answer, Ok(Some(org.clone())), "{role}");
            }
        }
    });
}

#[test]
fn a_call_for_one_org_reads_and_writes_nothing_of_another() {
    on_each_route(|db| {
        let own = default_org(db);
        let other = new_org(db, "other");
        let mut service = db.service();
        for (org, event) in [(&own, "mine"), (&other, "theirs"), (&own, "mine")] {
            service.exec(&format!(
                "select nightowls.append_event('cart', 'a', '{event}', \
                 event_id => case '{event}' when 'theirs' then '{SOME_ID}'::uuid end, org => '{org}')"
            ));
        }
        for read in [
            "nightowls.read_events()",
            "nightowls.read_aggregate('cart', 'a')",
            "nightowls.recent_events()",
            "nightowls.last_event('cart', 'a')",
        ] {
            let seen = service.value(&format!(
                "select string_agg(distinct event_type, ' ') from {read}"
            ));
            assert_eq!(seen.as_deref(), Some("mine"), "{read}");
        }
        // The same aggregate and the same event_id are another's business.
        let version = service.value(&format!(
            "select version from nightowls.append_event('cart', 'a', 'mine', event_id => '{SOME_ID}')"
        ));
        assert_eq!(version.as_deref(), Some("3"));
    });
}
