//! What the clock does for queues: due messages, words left for groups, old marks, expired keys, the archive's end.

use std::thread;
use std::time::Duration;

use crate::fixture::{Random, default_org, lines, new_org, together};
use crate::projections::text;
use crate::queue::{jobs, read, settle};
use crate::support::{on_each_install, wait_until};

const TICK: &str = "select queue, what, qty from nightowls._tick_queues(5000) order by 1, 2";

#[test]
fn what_is_due_and_what_has_expired_is_seen_to() {
    on_each_install(|db| {
        let mut service = jobs(db);
        let mut owner = db.superuser();
        assert_eq!(lines(&mut service, TICK), [""; 0]);
        service.exec(
            "select nightowls.send('jobs', '\"due\"', delay => 60), nightowls.send('jobs', '\"late\"', delay => 600),
                    nightowls.send('jobs', '\"key\"', dedup_key => 'old', dedup_for => '1 hour'), nightowls.send('jobs', '\"kept\"', dedup_key => 'new', dedup_for => '1 day'),
                    nightowls.send('jobs', '\"keyed\"', dedup_key => 'own')",
        );
        service.exec("select nightowls.archive('jobs', nightowls.send('jobs', '\"old\"')), nightowls.archive('jobs', nightowls.send('jobs', '\"young\"'))");
        // As if time had passed.
        owner.exec(
            "update nightowls.queue_messages set due_at = due_at - interval '5 minutes' where state = 'd';
             update nightowls.queue_dedup set expires_at = expires_at - interval '2 hours';
             update nightowls.queue_archive set archived_at = archived_at - interval '30 days 1 minute' where message = '\"old\"';
             insert into nightowls.queue_marks (org_id, queue_id, priority, mark) select org_id, queue_id, p, m from nightowls.queues, unnest('{0,3}'::int[]) p, generate_series(-49, 0) m;
             insert into nightowls.queue_due_marks (org_id, queue_id, mark) select org_id, queue_id, now() - m * interval '1 day' from nightowls.queues, generate_series(1, 50) m",
        );
        let done: Vec<_> = lines(&mut service, TICK)
            .into_iter()
            .filter(|row| !row.starts_with("jobs marks "))
            .collect();
        assert_eq!(done, ["jobs archived 1", "jobs due 1", "jobs keys 1"]);
        assert_eq!(
            lines(
                &mut service,
                "select message, state from nightowls.queue_messages where message in ('\"due\"', '\"late\"') order by 1"
            ),
            ["\"due\" r", "\"late\" d"]
        );
        assert_eq!(
            lines(
                &mut service,
                "select dedup_key from nightowls.queue_dedup order by 1"
            ),
            ["new", "own"]
        );
        assert_eq!(
            lines(&mut service, "select message from nightowls.queue_archive"),
            ["\"young\""]
        );
        assert_eq!(
            lines(
                &mut service,
                "select priority, mark from nightowls.queue_marks order by 1, 2"
            ),
            ["0 0", "3 0"]
        );
        assert_eq!(
            text(
                &mut service,
                "select count(*) from nightowls.queue_due_marks"
            ),
            "1"
        );
        assert_eq!(lines(&mut service, TICK), [""; 0]);
        assert_eq!(read(&mut service, "jobs", 30, 9).len(), 4);
    });
}

#[test]
fn a_group_whose_word_nobody_reads_goes_on() {
    on_each_install(|db| {
        let mut service = jobs(db);
        service.exec("select nightowls.send('jobs', '1', group_key => 'g'), nightowls.send('jobs', '2', group_key => 'g')");
        let claim = read(&mut service, "jobs", 30, 1).remove(0);
        // Its lock is taken: the ack leaves word.
        let mut open = db.service();
        open.exec("begin; select nightowls.send('jobs', '3', group_key => 'g')");
        assert!(settle(&mut service, "ack", "jobs", &claim, ""));
        service.exec("select nightowls._tick_queues(1000)");
        assert_eq!(
            text(
                &mut service,
                "select count(*) from nightowls.queue_messages where state = 'r'"
            ),
            "0"
        );
        open.exec("commit");
        wait_until("the group goes on", Duration::from_secs(20), || {
            service.exec("select nightowls._tick_queues(1000)");
            text(
                &mut service,
                "select message from nightowls.queue_messages where state = 'r'",
            ) == "2"
        });
        assert_eq!(
            text(
                &mut service,
                "select count(*) from nightowls.queue_messages where state = 's'"
            ),
            "0"
        );
    });
}

#[test]
fn what_expired_in_the_delayed_line_too_often_is_a_dead_letter() {
    on_each_install(|db| {
        let mut service = jobs(db);
        service.exec("select nightowls.alter_queue('jobs', max_attempts => 1); select nightowls.send('jobs', '1'); select nightowls.read('jobs', 30)");
        db.superuser().exec("update nightowls.queue_messages set state = 'd', lease_until = now() - interval '1 s', due_at = now() - interval '1 s'");
        service.exec("select nightowls._tick_queues(1000)");
        assert_eq!(
            lines(
                &mut service,
                "select state, last_error from nightowls.queue_messages"
            ),
            ["x the lease ran out"]
        );
    });
}

#[test]
fn all_orgs_have_their_turn_and_a_busy_one_starves_nobody() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.superuser();
        owner.exec("select nightowls.create_queue('busy'); select nightowls.send('busy', '1', delay => 60) from generate_series(1, 30000)");
        for name in ["b", "c"] {
            let org = new_org(db, name);
            owner.exec(&format!(
                "select nightowls.create_queue('q', org => '{org}'), nightowls.create_queue('p', org => '{org}');
                 select nightowls.send('q', '1', delay => 60, org => '{org}'), nightowls.send('p', '1', delay => 60, org => '{org}')"
            ));
        }
        owner.exec("update nightowls.queue_messages set due_at = now() - interval '1 s'");
        // A millisecond a call: each does one queue's part, and the next goes on from there.
        let mut calls = 0;
        wait_until("the small ones are served", Duration::from_secs(60), || {
            owner.exec("select nightowls._tick_queues(1)");
            calls += 1;
            text(
                &mut owner,
                "select count(*) from nightowls.queue_messages m join nightowls.queues q using (org_id, queue_id) where q.name <> 'busy' and m.state = 'd'",
            ) == "0"
        });
        // The busy one alone would take thirty.
        assert!(calls <= 8, "{calls} calls");
        assert_ne!(
            text(
                &mut owner,
                "select count(*) from nightowls.queue_messages where state = 'd'"
            ),
            "0"
        );
        // With time, all of it in one call.
        owner.exec("select nightowls._tick_queues(60000)");
        assert_eq!(
            text(
                &mut owner,
                "select count(*) from nightowls.queue_messages where state = 'd'"
            ),
            "0"
        );
    });
}

#[test]
fn many_groups_take_few_locks() {
    on_each_install(|db| {
        let mut service = jobs(db);
        service.exec("select nightowls.create_queue('q' || i) from generate_series(1, 80) i");
        service.exec("begin isolation level repeatable read; select nightowls.send('q' || i, '1', group_key => 'g' || j) from generate_series(1, 80) i, generate_series(1, 3) j; commit");
        let mut calls = 0;
        wait_until("all words are acted on", Duration::from_secs(60), || {
            service.exec("begin; select nightowls._tick_queues(60000)");
            let locks: u32 = text(&mut service, "select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()")
                .parse()
                .expect("a number");
            service.exec("commit");
            assert!(locks <= 64, "{locks}");
            calls += 1;
            text(
                &mut service,
                "select count(*) from nightowls.queue_messages where state = 's'",
            ) == "0"
        });
        assert!(calls > 1);
        assert_eq!(
            text(
                &mut service,
                "select count(*) from nightowls.queue_messages where state = 'r'"
            ),
            "240"
        );
    });
}

#[test]
fn what_was_sent_to_a_queue_while_it_was_dropped_goes() {
    on_each_install(|db| {
        let mut service = jobs(db);
        service.exec("select nightowls.create_queue('stays'); select nightowls.send('stays', '1')");
        let mut open = db.service();
        open.exec("begin; select nightowls.send('jobs', '1')");
        service.exec("select nightowls.drop_queue('jobs')");
        open.exec("commit");
        assert_eq!(lines(&mut service, TICK), ["null dropped 1"]);
        assert_eq!(
            text(
                &mut service,
                "select count(*) from nightowls.queue_messages"
            ),
            "1"
        );
    });
}

#[test]
fn two_at_once_beside_workers_do_no_harm() {
    const MESSAGES: u64 = 300;
    on_each_install(|db| {
        let mut service = jobs(db);
        service.exec(
            "select nightowls.alter_queue('jobs', backoff => '10 ms', max_backoff => '10 ms')",
        );
        service.exec(&format!(
            "select nightowls.send('jobs', to_jsonb(g), delay => case when g % 5 = 0 then 1 else 0 end, group_key => case when g % 2 = 0 then 'g' || g % 10 end,
                    dedup_key => 'k' || g, dedup_for => case when g % 3 = 0 then interval '1 s' end) from generate_series(1, {MESSAGES}) g"
        ));
        thread::scope(|scope| {
            for _ in 0..2 {
                let mut ticker = db.service();
                scope.spawn(move || {
                    while text(&mut ticker, "select count(*) from nightowls.queue_messages") != "0"
                    {
                        ticker.exec("select nightowls._tick_queues(100)");
                    }
                });
            }
            let done: Vec<String> = together(
                3,
                |_| db.service(),
                |number, mut session| {
                    let mut random = Random::new(number as u64 + 17);
                    let mut done = Vec::new();
                    while text(
                        &mut session,
                        "select count(*) from nightowls.queue_messages where state <> 's'",
                    ) != "0"
                    {
                        for claim in read(&mut session, "jobs", 30, 3) {
                            if random.chance(20) {
                                assert!(settle(&mut session, "nack", "jobs", &claim, ""));
                            } else {
                                assert!(settle(&mut session, "ack", "jobs", &claim, ""));
                                done.push(claim.message);
                            }
                        }
                    }
                    done
                },
            )
            .concat();
            let mut numbers: Vec<u64> = done.iter().map(|n| n.parse().expect("a number")).collect();
            numbers.sort_unstable();
            assert_eq!(numbers, (1..=MESSAGES).collect::<Vec<_>>());
        });
        for (call, code) in [("null", "22004"), ("0", "22023")] {
            assert_eq!(
                service
                    .refused(&format!("select nightowls._tick_queues({call})"))
                    .code,
                code
            );
        }
    });
}
