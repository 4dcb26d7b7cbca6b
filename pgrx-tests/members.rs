//! Who belongs to an org, and who may change that.

use crate::fixture::{as_user, default_org, lines, new_org, together};
use crate::support::{Db, MEMBER, on_each_install, on_each_route};

/// An org with one member of each role, named like it; and another org with an owner.
#[track_caller]
pub fn two_orgs(db: &Db) -> (String, String) {
    let (org, other) = (default_org(db), new_org(db, "other"));
    db.service().exec(&format!(
        "select nightowls.add_member(r, r) from unnest('{{owner,admin,member,viewer}}'::text[]) r;
         select nightowls.add_member('foreign', 'owner', '{other}')"
    ));
    (org, other)
}

#[test]
fn a_service_adds_changes_and_removes_members() {
    on_each_route(|db| {
        let org = default_org(db);
        let mut service = db.service();
        for (sql, answer) in [
            ("select nightowls.add_member('ann', 'owner')", "t"),
            ("select nightowls.add_member('ann', 'owner')", "f"),
            ("select nightowls.add_member('bob')", "t"),
            ("select nightowls.change_member('bob', 'viewer')", "t"),
            ("select nightowls.change_member('bob', 'viewer')", "f"),
            ("select nightowls.add_member('not-a-uuid|github')", "t"),
            ("select nightowls.remove_member('not-a-uuid|github')", "t"),
            ("select nightowls.remove_member('not-a-uuid|github')", "f"),
        ] {
            assert_eq!(service.value(sql).as_deref(), Some(answer), "{sql}");
        }
        assert_eq!(
            lines(
                &mut service,
                "select org_id, user_id, role from nightowls.org_members order by 2"
            ),
            [format!("{org} ann owner"), format!("{org} bob viewer")]
        );
        let long = "x".repeat(256);
        for (sql, code) in [
            ("select nightowls.add_member('ann', 'viewer')", "42710"),
            ("select nightowls.add_member(null)", "22004"),
            ("select nightowls.add_member('cyd', null)", "22004"),
            ("select nightowls.add_member('')", "22023"),
            ("select nightowls.add_member('cyd', 'king')", "22023"),
            ("select nightowls.change_member('an', 'viewer')", "NW007"),
            ("select nightowls.change_member('bob', 'king')", "22023"),
            ("select nightowls.remove_member(null)", "22004"),
            (
                "select nightowls.add_member('cyd', org => '00000000-0000-4000-8000-00000000dead')",
                "22023",
            ),
            (&format!("select nightowls.add_member('{long}')"), "54000"),
        ] {
            assert_eq!(service.refused(sql).code, code, "{sql}");
        }
        let refusal = service.refused("select nightowls.change_member('an', 'viewer')");
        assert!(refusal.hint.contains("\"ann\""), "{refusal}");
    });
}

#[test]
fn an_owner_changes_all_an_admin_no_owners_and_everybody_may_leave() {
    on_each_route(|db| {
        let (_, other) = two_orgs(db);
        let mut member = db.session(MEMBER);
        // The caller, what it does, and what it gets: an answer or a refusal.
        for (user, sql, expected) in [
            ("owner", "nightowls.add_member('two', 'owner')", "t"),
            ("owner", "nightowls.change_member('two', 'admin')", "t"),
            ("owner", "nightowls.remove_member('two')", "t"),
            ("admin", "nightowls.add_member('new', 'admin')", "t"),
            ("admin", "nightowls.change_member('new', 'viewer')", "t"),
            ("admin", "nightowls.change_member('new', 'owner')", "42501"),
            ("admin", "nightowls.add_member('newer', 'owner')", "42501"),
            (
                "admin",
                "nightowls.change_member('admin', 'owner')",
                "42501",
            ),
            (
                "admin",
                "nightowls.change_member('owner', 'viewer')",
                "42501",
            ),
            ("admin", "nightowls.remove_member('owner')", "42501"),
            ("admin", "nightowls.remove_member('new')", "t"),
            ("member", "nightowls.add_member('new')", "42501"),
            (
                "member",
                "nightowls.change_member('member', 'owner')",
                "42501",
            ),
            ("member", "nightowls.remove_member('viewer')", "42501"),
            ("viewer", "nightowls.add_member('new', 'viewer')", "42501"),
            ("foreign", "nightowls.add_member('foreign')", "42501"),
            ("foreign", "nightowls.remove_member('viewer')", "42501"),
            ("nobody", "nightowls.add_member('nobody', 'owner')", "42501"),
            ("", "nightowls.add_member('nobody', 'owner')", "42501"),
            (
                "owner",
                "nightowls.add_member('x', 'owner', (select org_id from nightowls.orgs where name = 'other'))",
                "t",
            ),
            ("owner", "nightowls.remove_member('x')", "t"),
            ("viewer", "nightowls.remove_member('viewer')", "t"),
            ("viewer", "nightowls.remove_member('viewer')", "42501"),
            ("owner", "nightowls.remove_member('owner')", "55000"),
            (
                "owner",
                "nightowls.change_member('owner', 'admin')",
                "55000",
            ),
        ] {
            // The other org is not seen, so its id is null, and the call is for one's own.
            let got = as_user(&mut member, user, &format!("select {sql}"));
            let got = got.map_or_else(|refusal| refusal.code, |rows| rows.join(" "));
            assert_eq!(got, expected, "{user}: {sql}");
        }
        for call in [
            "add_member('x', 'viewer', ",
            "change_member('foreign', 'viewer', ",
            "remove_member('foreign', ",
            "_manage_member('",
        ] {
            let sql = if call.starts_with('_') {
                format!("select nightowls.{call}{other}', 'owner', 'owner', 'add')")
            } else {
                format!("select nightowls.{call}'{other}')")
            };
            let refusal = as_user(&mut member, "owner", &sql).unwrap_err();
            assert_eq!(refusal.code, "42501", "{sql}");
        }
        let private =
            "select nightowls._write_member(nightowls.current_org(), 'viewer', 'owner', 'add')";
        assert_eq!(
            as_user(&mut member, "owner", private).unwrap_err().code,
            "42501"
        );
        assert_eq!(
            lines(
                &mut db.service(),
                &format!(
                    "select user_id, role from nightowls.org_members where org_id = '{other}'"
                )
            ),
            ["foreign owner"]
        );
    });
}

#[test]
fn the_last_owner_stays_whoever_writes_and_however() {
    on_each_install(|db| {
        let (org, _) = two_orgs(db);
        let mut service = db.service();
        for sql in [
            "select nightowls.remove_member('owner')",
            "select nightowls.change_member('owner', 'admin')",
            "delete from nightowls.org_members",
            "update nightowls.org_members set role = 'viewer'",
            "update nightowls.org_members set org_id = gen_random_uuid() where user_id = 'owner'",
        ] {
            assert_eq!(service.refused(sql).code, "55000", "{sql}");
        }
        service.exec("select nightowls.change_member('admin', 'owner'); select nightowls.remove_member('owner')");
        assert_eq!(
            service
                .refused("select nightowls.remove_member('admin')")
                .code,
            "55000"
        );
        // An org that is gone needs none.
        service.exec(&format!(
            "delete from nightowls.orgs where org_id = '{org}'; delete from nightowls.org_members where org_id = '{org}'"
        ));
    });
}

#[test]
fn owners_who_leave_at_the_same_moment_leave_one_behind() {
    on_each_install(|db| {
        for round in 0..5 {
            let org = new_org(db, &format!("org {round}"));
            db.service().exec(&format!(
                "select nightowls.add_member('o' || i, 'owner', '{org}') from generate_series(1, 8) i"
            ));
            for isolation in ["read committed", "repeatable read"] {
                let gone = together(
                    8,
                    |_| db.session(MEMBER),
                    |nth, mut session| {
                        session.exec(&format!(
                            "set default_transaction_isolation = '{isolation}'"
                        ));
                        let leave =
                            format!("select nightowls.remove_member('o{}', '{org}')", nth + 1);
                        as_user(&mut session, &format!("o{}", nth + 1), &leave)
                    },
                );
                for refusal in gone.into_iter().filter_map(Result::err) {
                    // 42501: who has left before may not; above read committed also 40001.
                    assert!(
                        ["55000", "42501", "40001"].contains(&refusal.code.as_str()),
                        "{refusal}"
                    );
                }
                let left = db.service().value(&format!(
                    "select count(*) from nightowls.org_members where org_id = '{org}'"
                ));
                assert!(left.as_deref() >= Some("1"), "{isolation}: {left:?}");
                if isolation == "read committed" {
                    assert_eq!(left.as_deref(), Some("1"));
                    db.service().exec(&format!(
                        "select nightowls.add_member('o' || i, 'owner', '{org}') from generate_series(1, 8) i"
                    ));
                }
            }
        }
    });
}

#[test]
fn the_jwt_says_who_the_member_is_before_the_setting_does() {
    on_each_route(|db| {
        let (org, other) = two_orgs(db);
        let mut member = db.session(MEMBER);
        let mut orgs = |claims: &str, setting: &str| {
            member.exec(&format!(
                "begin; select set_config('request.jwt.claims', '{claims}', true), set_config('nightowls.user_id', '{setting}', true)"
            ));
            let seen = lines(&mut member, "select org_id from nightowls.orgs");
            member.exec("rollback");
            seen
        };
        assert_eq!(
            orgs(r#"{"sub": "member"}"#, "foreign"),
            std::slice::from_ref(&org)
        );
        assert_eq!(
            orgs(r#"{"sub": "foreign"}"#, "member"),
            std::slice::from_ref(&other)
        );
        assert_eq!(
            orgs(r#"{"sub": "member", "org_id": "x"}"#, ""),
            std::slice::from_ref(&org)
        );
        assert_eq!(orgs("", "foreign"), [other]);
        assert_eq!(orgs("", ""), Vec::<String>::new());
        // What the user writes is no identity.
        assert_eq!(
            orgs(r#"{"user_metadata": {"sub": "member"}}"#, ""),
            Vec::<String>::new()
        );
    });
}

#[test]
fn a_policy_asks_once_a_statement_and_a_members_own_filter_uses_the_key() {
    on_each_install(|db| {
        let (org, _) = two_orgs(db);
        db.superuser().exec(&format!(
            "insert into nightowls.org_members (org_id, user_id) select '{org}', 'u' || i from generate_series(1, 20000) i;
             analyze nightowls.org_members; set track_functions = 'all'"
        ));
        let mut member = db.session(MEMBER);
        let plan = as_user(
            &mut member,
            "member",
            &format!("explain (analyze, costs off, timing off, summary off) select role from nightowls.org_members where org_id = '{org}' and user_id = 'u7'"),
        )
        .unwrap()
        .join("\n");
        assert!(
            plan.contains("Index Cond") && plan.contains("user_id"),
            "{plan}"
        );
        let plan = as_user(
            &mut member,
            "member",
            "explain (analyze, costs off, timing off, summary off) select count(*) from nightowls.org_members",
        )
        .unwrap()
        .join("\n");
        // Both questions are initial plans: asked once for 20,000 rows.
        let asked = plan
            .lines()
            .filter(|line| line.trim().starts_with("InitPlan"));
        assert_eq!(asked.count(), 2, "{plan}");
        assert_eq!(plan.matches("Result (actual rows=1").count(), 2, "{plan}");
    });
}
