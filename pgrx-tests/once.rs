//! Once: true the first time, whoever asks, and false from then on.

use std::thread;
use std::time::Duration;

use crate::fixture::{default_org, is_blocked, lines, new_org, together};
use crate::projections::text;
use crate::queue::jobs;
use crate::support::{on_each_install, on_each_route, wait_until};

#[test]
fn of_many_sessions_one_is_told_that_it_is_the_first() {
    const SESSIONS: usize = 64;
    on_each_install(|db| {
        default_org(db);
        for round in 0..3 {
            let answers = together(
                SESSIONS,
                |_| db.service(),
                |_, mut session| {
                    text(
                        &mut session,
                        &format!("select nightowls.once('mail', 'round {round}')"),
                    )
                },
            );
            assert_eq!(answers.iter().filter(|answer| *answer == "t").count(), 1);
            assert_eq!(
                answers.iter().filter(|answer| *answer == "f").count(),
                SESSIONS - 1
            );
        }
    });
}

#[test]
fn who_asks_while_another_is_at_it_waits_and_is_first_if_that_rolls_back() {
    on_each_route(|db| {
        default_org(db);
        for (end, answer) in [("commit", "f"), ("rollback", "t")] {
            let mut first = db.service();
            first.exec("begin");
            assert_eq!(
                text(
                    &mut first,
                    &format!("select nightowls.once('mail', '{end}')")
                ),
                "t"
            );
            assert_eq!(
                text(
                    &mut first,
                    &format!("select nightowls.once('mail', '{end}')")
                ),
                "f"
            );
            let mut second = db.service();
            let mut watcher = db.superuser();
            second.exec("begin");
            let pid = second.pid();
            thread::scope(|scope| {
                let asked = scope.spawn(|| {
                    let answer = text(
                        &mut second,
                        &format!("select nightowls.once('mail', '{end}')"),
                    );
                    second.exec("commit");
                    answer
                });
                wait_until("the second waits", Duration::from_secs(20), || {
                    is_blocked(&mut watcher, pid)
                });
                // Another key, or another scope, waits for nobody.
                assert_eq!(
                    text(
                        &mut watcher,
                        &format!("select nightowls.once('post', '{end}')")
                    ),
                    "t"
                );
                first.exec(end);
                assert_eq!(asked.join().expect("it ends"), answer);
            });
        }
        // A savepoint takes it back.
        let mut service = db.service();
        service
            .exec("begin; savepoint a; select nightowls.once('mail', 'savepoint'); rollback to a");
        assert_eq!(
            text(&mut service, "select nightowls.once('mail', 'savepoint')"),
            "t"
        );
        service.exec("commit");
        assert_eq!(
            text(&mut service, "select nightowls.once('mail', 'savepoint')"),
            "f"
        );
    });
}

#[test]
fn asking_again_writes_nothing() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.superuser();
        owner.exec("select nightowls.once('mail', '1')");
        let size = "select pg_relation_size('nightowls.once_keys'), pg_current_wal_insert_lsn()";
        let tuples = "select n_tup_ins, n_tup_upd, n_tup_del, n_dead_tup from pg_stat_user_tables where relname = 'once_keys'";
        owner.exec("select pg_stat_force_next_flush(); checkpoint");
        let before = (lines(&mut owner, size), lines(&mut owner, tuples));
        assert_eq!(
            text(
                &mut owner,
                "select count(*) filter (where nightowls.once('mail', case when g > 0 then '1' end)) from generate_series(1, 10000) g"
            ),
            "0"
        );
        owner.exec("select pg_stat_force_next_flush()");
        let after = (lines(&mut owner, size), lines(&mut owner, tuples));
        assert_eq!(before.1, after.1);
        assert_eq!(before.0[0].split(' ').next(), after.0[0].split(' ').next());
    });
}

#[test]
fn scopes_keys_and_orgs_are_kept_apart() {
    on_each_install(|db| {
        default_org(db);
        let other = new_org(db, "other");
        let mut service = db.service();
        for call in [
            "'a', 'bc'",
            "'ab', 'c'",
            "'A', 'bc'",
            "'a', 'Bc'",
            "'a', repeat('x', 65536)",
            &format!("'a', 'bc', org => '{other}'"),
        ] {
            assert_eq!(
                text(&mut service, &format!("select nightowls.once({call})")),
                "t",
                "{call}"
            );
            assert_eq!(
                text(&mut service, &format!("select nightowls.once({call})")),
                "f",
                "{call}"
            );
        }
        // A key can name somebody: it is nowhere to be read.
        service.exec("select nightowls.once('mail', 'ann@example.org')");
        assert_eq!(
            lines(
                &mut db.owner(),
                "select table_name from nightowls.scan_for('ann@example.org')"
            ),
            [""; 0]
        );
        for (call, code) in [
            ("null, 'a'", "22004"),
            ("'a', null", "22004"),
            ("'a', 'b', null", "22004"),
            ("'', 'b'", "22023"),
            ("'a', ''", "22023"),
            ("'a', 'b', '0'", "22023"),
            ("'a', 'b', '-1 day'", "22023"),
            ("repeat('x', 256), 'b'", "54000"),
            ("'a', repeat('x', 65537)", "54000"),
            (
                "'a', 'b', org => '00000000-0000-4000-8000-000000000000'",
                "22023",
            ),
        ] {
            assert_eq!(
                service
                    .refused(&format!("select nightowls.once({call})"))
                    .code,
                code,
                "{call}"
            );
        }
    });
}

#[test]
fn a_key_is_kept_while_its_message_can_be_delivered_again() {
    on_each_install(|db| {
        let mut service = jobs(db);
        let mut owner = db.superuser();
        // Keys of another time: as if the clock had gone on.
        let age = "update nightowls.once_keys set made_at = made_at - interval '40 days', expires_at = expires_at - interval '40 days'";
        let known = "select count(*) from nightowls.once_keys";
        service.exec("select nightowls.once('mail', '1'), nightowls.once('mail', '2', '60 days'), nightowls.once('mail', 'for ever', '1000 years')");
        assert_eq!(
            text(
                &mut owner,
                "select nightowls._prune_once(nightowls.current_org(), 100)"
            ),
            "0"
        );
        let all = text(&mut owner, known);
        owner.exec(age);
        // A message that is not done, then one in the archive, was sent before.
        service.exec("select nightowls.send('jobs', '1')");
        owner.exec(
            "update nightowls.queue_messages set enqueued_at = enqueued_at - interval '50 days'",
        );
        assert_eq!(
            text(
                &mut owner,
                "select nightowls._prune_once(nightowls.current_org(), 100)"
            ),
            "0"
        );
        service.exec("select nightowls.archive('jobs', msg_id) from nightowls.read('jobs')");
        assert_eq!(
            text(
                &mut owner,
                "select nightowls._prune_once(nightowls.current_org(), 100)"
            ),
            "0"
        );
        assert_eq!(text(&mut owner, known), all);
        assert_eq!(
            text(&mut service, "select nightowls.once('mail', '1')"),
            "f"
        );
        // It can be replayed no more: the key goes, those that are to be kept stay.
        service.exec("select nightowls.purge_archive('jobs', '0')");
        assert_eq!(
            text(
                &mut owner,
                "select nightowls._prune_once(nightowls.current_org(), 100)"
            ),
            "1"
        );
        assert_eq!(
            text(&mut service, "select nightowls.once('mail', '2')"),
            "f"
        );
        assert_eq!(
            text(&mut service, "select nightowls.once('mail', 'for ever')"),
            "f"
        );
        assert_eq!(
            text(&mut service, "select nightowls.once('mail', '1')"),
            "t"
        );
    });
}
