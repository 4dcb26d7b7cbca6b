//! Scratchpads and followups.

use crate::fixture::{default_org, lines, new_org, together};
use crate::projections::text;
use crate::support::{on_each_install, on_each_route};

#[test]
fn compare_and_set_loses_no_change() {
    on_each_route(|db| {
        default_org(db);
        db.service()
            .exec("select nightowls.scratchpad_put('s', 'sum', '0', 0)");
        together(
            8,
            |_| db.service(),
            |_, mut session| {
                for _ in 0..10 {
                    loop {
                        let found = text(
                            &mut session,
                            "select version || ' ' || value from nightowls.scratchpad_get('s', 'sum')",
                        );
                        let (version, sum) = found.split_once(' ').unwrap();
                        match session.try_exec(&format!("select nightowls.scratchpad_put('s', 'sum', to_jsonb({sum} + 1), {version})")) {
                            Ok(()) => break,
                            Err(refusal) => assert_eq!(refusal.code, "NW001", "{refusal}"),
                        }
                    }
                }
            },
        );
        assert_eq!(
            lines(
                &mut db.service(),
                "select value, version from nightowls.scratchpad_get('s', 'sum')"
            ),
            ["80 81"]
        );
        // Who puts first what must not be there is one.
        let first = together(
            8,
            |_| db.service(),
            |nth, mut session| {
                session.try_exec(&format!(
                    "select nightowls.scratchpad_put('s', 'new', '{nth}', 0)"
                ))
            },
        );
        assert_eq!(first.iter().filter(|answer| answer.is_ok()).count(), 1);
        assert!(
            first
                .into_iter()
                .filter_map(Result::err)
                .all(|refusal| refusal.code == "NW001")
        );
    });
}

#[test]
fn a_deleted_key_is_gone_and_its_version_does_not_come_again() {
    on_each_route(|db| {
        default_org(db);
        let other = new_org(db, "other");
        let mut service = db.service();
        for (sql, answer) in [
            (
                "select nightowls.scratchpad_put('s', 'k', '{\"a\": 1.10}')",
                "1",
            ),
            ("select nightowls.scratchpad_put('s', 'k', '2', 1)", "2"),
            ("select nightowls.scratchpad_delete('s', 'k', 2)", "t"),
            ("select nightowls.scratchpad_delete('s', 'k')", "f"),
            (
                "select count(*) from nightowls.scratchpad_get('s', 'k')",
                "0",
            ),
            ("select count(*) from nightowls.scratchpad_list('s')", "0"),
            ("select nightowls.scratchpad_put('s', 'k', '3', 0)", "4"),
            ("select nightowls.scratchpad_put('s', 'j', 'null')", "1"),
            (
                "select string_agg(key || '=' || value, ' ') from nightowls.scratchpad_list('s')",
                "j=null k=3",
            ),
            (
                "select string_agg(key, ' ') from nightowls.scratchpad_list('s', 'j')",
                "k",
            ),
            (
                "select string_agg(key, ' ') from nightowls.scratchpad_list('s', max_entries => 1)",
                "j",
            ),
        ] {
            assert_eq!(text(&mut service, sql), answer, "{sql}");
        }
        for (sql, code) in [
            ("select nightowls.scratchpad_put('s', 'k', '1', 2)", "NW001"),
            ("select nightowls.scratchpad_put('s', 'k', '1', 0)", "NW001"),
            (
                "select nightowls.scratchpad_put('s', 'none', '1', 1)",
                "NW001",
            ),
            ("select nightowls.scratchpad_delete('s', 'k', 2)", "NW001"),
            ("select nightowls.scratchpad_delete('s', 'k', 0)", "22023"),
            ("select nightowls.scratchpad_put('s', 'k', null)", "22004"),
            ("select nightowls.scratchpad_put(null, 'k', '1')", "22004"),
            ("select nightowls.scratchpad_put('s', '', '1')", "22023"),
            (
                "select nightowls.scratchpad_put('s', repeat('x', 256), '1')",
                "54000",
            ),
            (
                "select nightowls.scratchpad_put('s', 'k', '1', -1)",
                "22023",
            ),
            (
                "select nightowls.scratchpad_put('s', 'k', '1', org => '00000000-0000-4000-8000-00000000dead')",
                "22023",
            ),
            ("select nightowls.scratchpad_get('s', null)", "22004"),
            (
                "select nightowls.scratchpad_list('s', max_entries => 0)",
                "22023",
            ),
        ] {
            let refusal = service.refused(sql);
            assert_eq!(refusal.code, code, "{sql}: {refusal}");
        }
        assert_eq!(
            text(
                &mut service,
                &format!("select count(*) from nightowls.scratchpad_get('s', 'k', '{other}')")
            ),
            "0"
        );
        assert_eq!(
            text(
                &mut service,
                &format!("select nightowls.scratchpad_put('s', 'k', '1', 0, '{other}')")
            ),
            "1"
        );
    });
}

#[test]
fn a_followup_is_given_out_when_it_is_due_to_one_worker_at_a_time() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        service.exec("select nightowls.create_thread('t')");
        assert_eq!(
            text(
                &mut service,
                "select count(*) from nightowls.claim_followups()"
            ),
            "0"
        );
        service.exec(
            "select nightowls.create_followup('t', now() + interval '1 hour', '\"later\"');
             select nightowls.create_followup('t', now() - interval '1 hour', jsonb_build_object('n', i), 'sage') from generate_series(1, 20) i",
        );
        service.exec("begin; select nightowls.create_followup('t', now(), '\"never\"'); rollback");
        let claimed = together(
            4,
            |_| db.service(),
            |_, mut session| {
                lines(
                    &mut session,
                    "select followup_id, receipt from nightowls.claim_followups(10)",
                )
            },
        );
        let claimed = claimed.concat();
        let mut ids: Vec<_> = claimed
            .iter()
            .map(|row| row.split_once(' ').unwrap().0)
            .collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!((ids.len(), claimed.len()), (20, 20));
        let (id, receipt) = claimed[0].split_once(' ').unwrap();
        for (sql, answer) in [
            (
                format!("select nightowls.finish_followup({id}, gen_random_uuid())"),
                "f",
            ),
            (
                format!("select nightowls.finish_followup({id}, '{receipt}')"),
                "t",
            ),
            (
                format!("select nightowls.finish_followup({id}, '{receipt}')"),
                "f",
            ),
            (format!("select nightowls.cancel_followup({id})"), "f"),
            (
                format!(
                    "select nightowls.cancel_followup({})",
                    claimed[1].split_once(' ').unwrap().0
                ),
                "t",
            ),
            (
                format!(
                    "select nightowls.finish_followup({}, '{}')",
                    claimed[1].split_once(' ').unwrap().0,
                    claimed[1].split_once(' ').unwrap().1
                ),
                "f",
            ),
            (
                "select count(*) from nightowls.followups where status = 'pending'".to_owned(),
                "19",
            ),
            (
                "select count(*) from nightowls.queue_messages".to_owned(),
                "19",
            ),
            (
                "select count(*) from nightowls.claim_followups(10)".to_owned(),
                "0",
            ),
        ] {
            assert_eq!(text(&mut service, &sql), answer, "{sql}");
        }
        // A worker that does not finish loses it to the next.
        service.exec("select nightowls.set_vt('followups', msg_id, 0) from nightowls.followups where payload = '\"later\"'");
        assert_eq!(
            lines(
                &mut service,
                "select payload, thread_id, read_ct from nightowls.claim_followups(1, 0)"
            ),
            [r#""later" t 1"#]
        );
        assert_eq!(
            lines(
                &mut service,
                "select payload, read_ct from nightowls.claim_followups(1, 0)"
            ),
            [r#""later" 2"#]
        );
        for (sql, code) in [
            ("select nightowls.create_followup('none', now())", "NW007"),
            ("select nightowls.create_followup('t', null)", "22004"),
            ("select nightowls.create_followup('t', 'infinity')", "22023"),
            (
                "select nightowls.create_followup('t', now() + interval '100 years')",
                "22023",
            ),
            (
                "select nightowls.create_followup('t', now(), null)",
                "22004",
            ),
            (
                "select nightowls.finish_followup(999999, gen_random_uuid())",
                "NW007",
            ),
            ("select nightowls.finish_followup(1, null)", "22004"),
            ("select nightowls.cancel_followup(null)", "22004"),
        ] {
            assert_eq!(service.refused(sql).code, code, "{sql}");
        }
    });
}

#[test]
fn followups_use_a_queue_of_that_name_that_is_there() {
    on_each_install(|db| {
        default_org(db);
        let mut service = db.service();
        service.exec("select nightowls.create_queue('followups', vt => 7, max_attempts => 3); select nightowls.create_thread('t'); select nightowls.create_followup('t', now())");
        assert_eq!(
            text(
                &mut service,
                "select count(*) from nightowls.claim_followups()"
            ),
            "1"
        );
        assert_eq!(text(&mut service, "select vt from nightowls.queues"), "7");
    });
}
