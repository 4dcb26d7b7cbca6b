//! Messages: numbered in the order of commits, posted by members as themselves, and paged without a walk.

use crate::fixture::{as_user, default_org, lines, together};
use crate::members::two_orgs;
use crate::projections::text;
use crate::support::{MEMBER, on_each_install, on_each_route};

#[test]
fn messages_posted_at_the_same_moment_number_without_a_hole_in_the_order_of_commits() {
    on_each_route(|db| {
        default_org(db);
        db.service()
            .exec("select nightowls.create_thread('t'), nightowls.create_thread('u')");
        let seqs = together(
            10,
            |_| db.service(),
            |nth, mut session| {
                (0..10)
                    .map(|round| {
                        let sql = format!("select nightowls.append_message('t', '[{nth}, {round}]', message_id => '{nth}/{round}')");
                        let seq = text(&mut session, &sql);
                        // A retry is the same message.
                        assert_eq!(text(&mut session, &sql), seq);
                        seq.parse::<i64>().unwrap()
                    })
                    .collect::<Vec<_>>()
            },
        );
        let mut all = seqs.concat();
        all.sort_unstable();
        assert_eq!(all, (1..=100).collect::<Vec<_>>());
        let mut service = db.service();
        // Forwards and backwards, each page where the last ended.
        let page = |service: &mut crate::support::Session, range: &str| {
            lines(
                service,
                &format!("select seq from nightowls.list_messages('t', {range})"),
            )
        };
        let expected = |from: i64, to: i64| (from..=to).map(|n| n.to_string()).collect::<Vec<_>>();
        assert_eq!(page(&mut service, "max_messages => 30"), expected(1, 30));
        assert_eq!(page(&mut service, "30, 30"), expected(31, 60));
        assert_eq!(page(&mut service, "90, 30"), expected(91, 100));
        assert_eq!(page(&mut service, "100"), expected(1, 0));
        assert_eq!(
            page(
                &mut service,
                "before => 9223372036854775807, max_messages => 30"
            ),
            expected(71, 100)
        );
        assert_eq!(
            page(&mut service, "before => 71, max_messages => 30"),
            expected(41, 70)
        );
        assert_eq!(
            page(&mut service, "35, before => 71, max_messages => 90"),
            expected(36, 70)
        );
        assert_eq!(
            text(
                &mut service,
                "select count(*) from nightowls.list_messages('u')"
            ),
            "0"
        );
        assert_eq!(
            text(
                &mut service,
                "select count(*) from nightowls.list_messages('no thread')"
            ),
            "0"
        );
    });
}

#[test]
fn a_message_that_will_not_do_is_refused() {
    on_each_install(|db| {
        default_org(db);
        let mut service = db.service();
        service.exec("select nightowls.create_thread('t'), nightowls.start_run('r'); select nightowls.append_message('t', '1', message_id => 'm')");
        for (sql, code) in [
            ("select nightowls.append_message('u', '1')", "NW007"),
            (
                "select nightowls.append_message('t', '1', run_id => 's')",
                "NW007",
            ),
            (
                "select nightowls.append_message('t', '2', message_id => 'm')",
                "NW002",
            ),
            (
                "select nightowls.append_message('t', '1', 'tool', message_id => 'm')",
                "NW002",
            ),
            ("select nightowls.append_message(null, '1')", "22004"),
            ("select nightowls.append_message('t', null)", "22004"),
            ("select nightowls.append_message('t', '1', null)", "22004"),
            (
                "select nightowls.append_message('t', '1', metadata => null)",
                "22004",
            ),
            ("select nightowls.append_message('t', '1', 'king')", "22023"),
            (
                "select nightowls.append_message('t', '1', author => '\"ann\"')",
                "22023",
            ),
            (
                "select nightowls.append_message('t', '1', author => '{\"id\": \"ann\"}')",
                "22023",
            ),
            (
                "select nightowls.append_message('t', '1', author => '{\"type\": \"\"}')",
                "22023",
            ),
            (
                "select nightowls.append_message('t', '1', metadata => '[]')",
                "22023",
            ),
            (
                "select nightowls.append_message('t', '1', message_id => repeat('x', 256))",
                "54000",
            ),
            (
                "select nightowls.append_message('t', (repeat('[', 101) || repeat(']', 101))::jsonb)",
                "54000",
            ),
            ("select nightowls.list_messages(null)", "22004"),
            (
                "select nightowls.list_messages('t', max_messages => 0)",
                "22023",
            ),
        ] {
            let refusal = service.refused(sql);
            assert_eq!(refusal.code, code, "{sql}: {refusal}");
        }
        assert_eq!(
            text(&mut service, "select count(*) from nightowls.messages"),
            "1"
        );
    });
}

#[test]
fn members_post_as_themselves_and_viewers_and_others_do_not() {
    on_each_route(|db| {
        let (_, other) = two_orgs(db);
        db.service().exec("select nightowls.create_thread('t')");
        let mut member = db.session(MEMBER);
        for (user, arguments, expected) in [
            ("owner", "'t', '1'", "1"),
            ("admin", "'t', '1'", "2"),
            ("member", "'t', '1'", "3"),
            (
                "member",
                r#"'t', '1', author => '{"type": "user", "id": "member"}'"#,
                "4",
            ),
            ("viewer", "'t', '1'", "42501"),
            ("foreign", "'t', '1'", "42501"),
            ("nobody", "'t', '1'", "42501"),
            (
                "member",
                r#"'t', '1', author => '{"type": "user", "id": "admin"}'"#,
                "42501",
            ),
            (
                "member",
                r#"'t', '1', author => '{"type": "agent", "id": "member"}'"#,
                "42501",
            ),
            ("member", "'t', '1', 'assistant'", "42501"),
            ("member", "'t', '1', 'system'", "42501"),
            ("member", &format!("'t', '1', org => '{other}'"), "42501"),
        ] {
            let got = as_user(
                &mut member,
                user,
                &format!("select nightowls.append_message({arguments})"),
            )
            .map_or_else(|refusal| refusal.code, |rows| rows.join(" "));
            assert_eq!(got, expected, "{user}: {arguments}");
        }
        // Nor by the functions beneath: a row that says who it is from.
        for function in ["_append_message", "_post_message"] {
            let forged = format!(
                "select nightowls.{function}(m) from (select (nightowls.current_org(), 't', null, null, 'user', 'user', 'admin', null, '1', '{{}}', now())::nightowls.messages) x (m)"
            );
            assert_eq!(
                as_user(&mut member, "member", &forged).unwrap_err().code,
                "42501",
                "{function}"
            );
        }
        assert_eq!(
            lines(
                &mut db.service(),
                "select seq, author_type, author_id from nightowls.list_messages('t')"
            ),
            [
                "1 user owner",
                "2 user admin",
                "3 user member",
                "4 user member"
            ]
        );
    });
}

#[test]
fn a_members_page_of_a_busy_table_is_read_by_the_key() {
    const ROWS: u64 = 1_000_000;
    on_each_install(|db| {
        let (org, _) = two_orgs(db);
        db.superuser().exec(&format!(
            "insert into nightowls.threads (org_id, thread_id) select '{org}', 't';
             insert into nightowls.messages (org_id, thread_id, seq, role, author_type, author_id, content)
             select '{org}', 't', i, 'user', 'user', 'ann', jsonb_build_object('text', 'message ' || i, 'password', 'x') from generate_series(1, {half}) i;
             insert into nightowls.messages (org_id, thread_id, seq, role, author_type, author_id, content)
             select ('00000000-0000-4000-8000-' || lpad((i % 99)::text, 12, '0'))::uuid, 't', i / 99 + 1, 'user', 'user', 'ann', '\"theirs\"' from generate_series(1, {half}) i",
            half = ROWS / 2
        ));
        let mut member = db.session(MEMBER);
        for analysed in [false, true] {
            if analysed {
                db.superuser().exec("vacuum analyze nightowls.messages");
            }
            for (range, first) in [
                ("250000", "250001"),
                ("0", "1"),
                ("0, before => 400001", "399951"),
            ] {
                let call = format!("nightowls.list_messages('t', {range})");
                // The first call of a session plans and reads the catalog; the second is what is meant.
                let mut last = (0, 0.0);
                for _ in 0..3 {
                    let plan = as_user(&mut member, "member", &format!("explain (analyze, buffers, timing off, format json) select * from {call}")).unwrap().join("\n");
                    let plan: serde_json::Value = serde_json::from_str(&plan).unwrap();
                    let top = &plan[0];
                    let buffers = top["Plan"]["Shared Hit Blocks"].as_u64().unwrap()
                        + top["Plan"]["Shared Read Blocks"].as_u64().unwrap();
                    last = (buffers, top["Execution Time"].as_f64().unwrap());
                }
                assert!(last.0 < 60, "{range}: {} buffers", last.0);
                eprintln!(
                    "{} {call}: {} buffers, {:.2} ms",
                    db.install(),
                    last.0,
                    last.1
                );
                let page = as_user(
                    &mut member,
                    "member",
                    &format!("select seq, content from {call}"),
                )
                .unwrap();
                assert_eq!(page.len(), 50);
                assert_eq!(
                    page[0],
                    format!(r#"{first} {{"text": "message {first}", "password": "[redacted]"}}"#)
                );
            }
            // Under the policy, a member's own filter on the table is by the key as well.
            let plan = as_user(&mut member, "member", &format!("explain (costs off) select seq from nightowls.messages where org_id = '{org}' and thread_id = 't' and seq > 250000 order by seq limit 50")).unwrap().join("\n");
            assert!(
                plan.contains("messages_pkey") && !plan.contains("Sort"),
                "{plan}"
            );
        }
    });
}
