//! What the queue says of itself: every message counted once, under the state it is in,
//! and at a cost that has a bound.

use crate::fixture::{Random, default_org, lines, together};
use crate::projections::{buffers, text};
use crate::queue::{jobs, read, settle};
use crate::support::{Db, Session, on_each_install, on_each_route};

const FIGURES: &str = "queue_length, queue_visible_length, leased, delayed, waiting, dead_letters";

#[track_caller]
fn figures(session: &mut Session, queue: &str) -> String {
    lines(
        session,
        &format!("select {FIGURES} from nightowls.metrics('{queue}')"),
    )
    .remove(0)
}

/// The same by looking at every row.
#[track_caller]
fn counted(db: &Db, queue: &str) -> String {
    lines(
        &mut db.superuser(),
        &format!(
            "select count(*) filter (where state in ('r', 'd', 'w')),
                    count(*) filter (where state in ('r', 'd') and not leased and (state = 'r' or due_at <= clock_timestamp())),
                    count(*) filter (where state in ('r', 'd') and leased),
                    count(*) filter (where state = 'd' and not leased and due_at > clock_timestamp()),
                    count(*) filter (where state = 'w'), count(*) filter (where state = 'x')
               from (select m.*, coalesce(m.lease_until > clock_timestamp(), false) as leased
                       from nightowls.queue_messages m join nightowls.queues q using (org_id, queue_id)
                      where q.name = '{queue}') m"
        ),
    )
    .remove(0)
}

#[test]
fn a_message_is_counted_under_what_it_waits_for() {
    on_each_route(|db| {
        let mut service = jobs(db);
        assert_eq!(figures(&mut service, "jobs"), "0 0 0 0 0 0");
        assert_eq!(
            lines(
                &mut service,
                "select newest_msg_age_sec, oldest_msg_age_sec, estimated, paused, counted_at = scrape_time from nightowls.metrics('Jobs')"
            ),
            ["null null f f t"]
        );
        service.exec(
            "select nightowls.alter_queue('jobs', max_attempts => 2);
             select nightowls.send('jobs', '1'), nightowls.send('jobs', '2', delay => 3600), nightowls.send('jobs', '3', priority => 7);
             select nightowls.send('jobs', to_jsonb(i), group_key => 'g') from generate_series(4, 8) i",
        );
        assert_eq!(figures(&mut service, "jobs"), "8 3 0 1 4 0");
        // Leased, in the ready line: of every priority.
        let claims = read(&mut service, "jobs", 600, 2);
        assert_eq!(figures(&mut service, "jobs"), "8 1 2 1 4 0");
        // Leased for so long that it has left the ready line.
        db.superuser().exec(
            "update nightowls.queue_messages set last_read_at = last_read_at - interval '1 minute' where lease_until is not null;
             select nightowls._move_marks(org_id, queue_id) from nightowls.queues",
        );
        let moved = text(
            &mut db.superuser(),
            "select count(*) from nightowls.queue_messages where state = 'd' and lease_until > now()",
        );
        assert_eq!(moved, "2");
        assert_eq!(figures(&mut service, "jobs"), "8 1 2 1 4 0");
        // Given back for later, then a dead letter.
        assert!(settle(
            &mut service,
            "nack",
            "jobs",
            &claims[0],
            ", 'no', 3600"
        ));
        assert_eq!(figures(&mut service, "jobs"), "8 1 1 2 4 0");
        service.exec(&format!(
            "select nightowls.set_vt('jobs', {}, 0)",
            claims[0].id
        ));
        assert_eq!(figures(&mut service, "jobs"), "8 2 1 1 4 0");
        let again = read(&mut service, "jobs", 600, 1).remove(0);
        assert_eq!(again.read_ct, "2");
        assert!(settle(&mut service, "nack", "jobs", &again, ", 'no'"));
        assert_eq!(figures(&mut service, "jobs"), "7 1 1 1 4 1");
        // A lease that has run out is no lease.
        read(&mut service, "jobs", 0, 1);
        assert_eq!(figures(&mut service, "jobs"), "7 1 1 1 4 1");
        assert_eq!(figures(&mut service, "jobs"), counted(db, "jobs"));

        service.exec("select nightowls.pause_queue('jobs')");
        db.superuser().exec(
            "update nightowls.queue_messages set enqueued_at = enqueued_at - interval '90 seconds' where message = '2'",
        );
        assert_eq!(
            lines(
                &mut service,
                "select paused, oldest_msg_age_sec between 90 and 119, newest_msg_age_sec between 0 and 29 from nightowls.metrics('jobs')"
            ),
            ["t t t"]
        );
        service.exec("select nightowls.purge_queue('jobs')");
        assert_eq!(figures(&mut service, "jobs"), "0 0 0 0 0 0");
        assert_eq!(
            service.refused("select nightowls.metrics('jbos')").hint,
            "Did you mean \"jobs\"?"
        );
    });
}

#[test]
fn what_was_sent_is_done_or_counted_whatever_happened() {
    on_each_install(|db| {
        default_org(db);
        db.service().exec(
            "select nightowls.create_queue('graves');
             select nightowls.create_queue('mail', max_attempts => 2, dead_letter_queue => 'graves', archive_acked => true);
             select nightowls.create_queue('jobs', max_attempts => 3)",
        );
        let tallies = together(
            6,
            |_| db.service(),
            |number, mut service| {
                let mut random = Random::new(71 + number as u64);
                let (mut sent, mut done) = (0_i64, 0_i64);
                for _ in 0..120 {
                    let queue = ["mail", "jobs"][random.below(2) as usize];
                    let kept = !random.chance(15);
                    service.exec("begin");
                    let (mut more, mut fewer) = (0, 0);
                    match random.below(6) {
                        0 => {
                            let group = ["null", "'a'", "'b'", "'c'"][random.below(4) as usize];
                            service.exec(&format!(
                                "select nightowls.send('{queue}', '1', group_key => {group}, delay => {}, priority => {})",
                                random.below(2) * 3600,
                                random.below(3)
                            ));
                            more = 1;
                        }
                        1 => {
                            service.exec(&format!(
                                "select nightowls.send_batch('{queue}', array_fill('2'::jsonb, array[5]))"
                            ));
                            more = 5;
                        }
                        2 => {
                            let popped = lines(
                                &mut service,
                                &format!("select msg_id from nightowls.pop('{queue}', 2)"),
                            );
                            fewer = popped.len() as i64;
                        }
                        way => {
                            for claim in read(&mut service, queue, 60, 3) {
                                let what = if way == 3 { "nack" } else { "ack" };
                                let more = if way > 3 {
                                    ""
                                } else {
                                    [", 'no', 0", ", 'no', 3600"][random.below(2) as usize]
                                };
                                let good = settle(&mut service, what, queue, &claim, more);
                                assert!(good, "{what} of a message just read");
                                fewer += i64::from(what == "ack");
                            }
                        }
                    }
                    service.exec(if kept { "commit" } else { "rollback" });
                    if kept {
                        (sent, done) = (sent + more, done + fewer);
                    }
                }
                (sent, done)
            },
        );
        let sent: i64 = tallies.iter().map(|tally| tally.0).sum();
        let done: i64 = tallies.iter().map(|tally| tally.1).sum();
        assert!(sent > 500 && done > 100, "{sent} {done}");
        let mut service = db.service();
        for queue in ["mail", "jobs", "graves"] {
            assert_eq!(figures(&mut service, queue), counted(db, queue), "{queue}");
        }
        let left = text(
            &mut service,
            "select sum(queue_length + dead_letters) from nightowls.queue_metrics",
        );
        assert_eq!(left, (sent - done).to_string(), "{sent} sent, {done} done");
    });
}

/// Counts until nothing is left to be counted.
#[track_caller]
fn count_all(session: &mut Session) {
    for _ in 0..100 {
        if text(session, "select nightowls._count_queues(60000)") != "0" {
            return;
        }
    }
    panic!("the clock never ends its count");
}

#[test]
fn beyond_ten_thousand_it_is_the_clocks_last_count_and_says_so() {
    on_each_install(|db| {
        let mut service = jobs(db);
        let said = |service: &mut Session| {
            lines(
                service,
                "select queue_length, leased, estimated, counted_at < scrape_time from nightowls.metrics('jobs')",
            )
            .remove(0)
        };
        let send = |service: &mut Session, count: u32| {
            service.exec(&format!(
                "select nightowls.send_batch('jobs', array_fill('1'::jsonb, array[{count}]))"
            ));
        };
        send(&mut service, 10000);
        assert_eq!(said(&mut service), "10000 0 f f");
        send(&mut service, 1);
        // Nobody has counted yet: at least so many.
        assert_eq!(said(&mut service), "10001 0 t null");
        send(&mut service, 20000);
        service.exec("select nightowls.read('jobs', 600, 7)");
        count_all(&mut service);
        assert_eq!(said(&mut service), "30001 7 t t");
        send(&mut service, 5);
        assert_eq!(said(&mut service), "30001 7 t t", "that of the clock");
        count_all(&mut service);
        assert_eq!(said(&mut service), "30006 7 t t");

        // A count without time goes on where it was.
        service.exec("select nightowls.read('jobs', 600, 3)");
        let mut steps = 0;
        while text(&mut service, "select nightowls._count_queues(0)") == "0" {
            assert_eq!(said(&mut service), "30006 7 t t", "not complete yet");
            // One who has no time at all does not begin: a look is what it is given here.
            db.superuser().exec(
                "do $$ declare c record; s record; begin
                   select * into c from nightowls._queue_counts;
                   s := nightowls._count_on(c.org_id, c.queue_id, c.so_far, coalesce(c.after, 0), 10000);
                   if s.finished then perform nightowls._count_queues(60000);
                   else update nightowls._queue_counts set so_far = s.counts, after = s.last; end if;
                 end $$",
            );
            steps += 1;
            if said(&mut service).starts_with("30006 10") {
                break;
            }
            assert!(steps < 10, "the count does not end");
        }
        assert_eq!(steps, 4);
        assert_eq!(said(&mut service), "30006 10 t t");

        // What is short again is counted, whatever the clock knows.
        service.exec("select count(*) from nightowls.pop('jobs', 29000)");
        assert_eq!(said(&mut service), "1006 10 f f");
        service.exec("select nightowls._count_queues()");
        let kept = "select count(*) from nightowls._queue_counts";
        assert_eq!(text(&mut service, kept), "0");
        send(&mut service, 10001);
        count_all(&mut service);
        assert_eq!(text(&mut service, kept), "1");
        service.exec("select nightowls.drop_queue('jobs'); select nightowls._count_queues()");
        assert_eq!(text(&mut service, kept), "0");
    });
}

#[test]
fn two_clocks_count_without_waiting_for_each_other() {
    on_each_install(|db| {
        let mut service = jobs(db);
        service.exec("select nightowls.send_batch('jobs', array_fill('1'::jsonb, array[10001]))");
        let mut other = db.service();
        other.exec("begin");
        assert_eq!(
            text(&mut other, "select nightowls._count_queues(60000)"),
            "1"
        );
        service.exec("set lock_timeout to '5s'");
        assert_eq!(
            text(&mut service, "select nightowls._count_queues(60000)"),
            "0"
        );
        other.exec("commit");
    });
}

#[test]
fn all_queues_of_all_orgs_are_measured_within_a_bound() {
    on_each_install(|db| {
        let mut service = jobs(db);
        // The first of all, as they go by.
        let org = "00000000-0000-4000-8000-000000000000";
        service.exec(&format!(
            "select nightowls.create_org('other', org => '{org}'); select nightowls.create_queue('jobs', org => '{org}'); select nightowls.send('jobs', '1', org => '{org}');
             select nightowls.create_queue('q' || i) from generate_series(1, 23) i;
             select nightowls.send_batch('q' || i, array_fill('1'::jsonb, array[9999])) from generate_series(1, 23) i"
        ));
        let rows = lines(
            &mut service,
            "select org_id = nightowls.current_org(), queue_name, queue_length, estimated from nightowls.queue_metrics where not queue_name ~ '^q'
              order by 1",
        );
        assert_eq!(rows, ["f jobs 1 f", "t jobs 0 f"]);
        // Twenty times 9,999 are within 200,000; what comes after that is a lower bound.
        assert_eq!(
            lines(
                &mut service,
                "select estimated, count(*) from nightowls.metrics_all() where queue_name ~ '^q' group by 1 order by 1"
            ),
            ["f 20", "t 3"]
        );
        assert_eq!(
            text(
                &mut service,
                "select bool_and(queue_length = 9999) from nightowls.metrics_all() where queue_name ~ '^q' and not estimated"
            ),
            "t"
        );
    });
}

#[test]
fn measuring_costs_the_same_however_much_there_is() {
    on_each_install(|db| {
        let mut service = jobs(db);
        let measure = "select * from nightowls.metrics('jobs')";
        let send = "select count(*) from nightowls.send_batch('jobs', array_fill('1'::jsonb, array[30000]))";
        service.exec(send);
        let few = buffers(&mut service, measure);
        for _ in 0..4 {
            service.exec(send);
        }
        count_all(&mut service);
        let many = buffers(&mut service, measure);
        assert!(many <= few + 20, "{few} buffers, then {many}");
        assert!(many < 1500, "{many} buffers");

        // Nor does it walk over what is done but cannot be removed yet.
        let mut holder = db.superuser();
        holder.exec("begin isolation level repeatable read; select 1");
        for _ in 0..60 {
            service.exec("select count(*) from nightowls.pop('jobs', 2500)");
        }
        assert_eq!(figures(&mut service, "jobs"), "0 0 0 0 0 0");
        db.superuser().exec(
            "select nightowls._move_marks(org_id, queue_id), nightowls._move_due_mark(org_id, queue_id) from nightowls.queues",
        );
        service.exec("select nightowls.send_batch('jobs', array_fill('1'::jsonb, array[100]))");
        let after = buffers(&mut service, measure);
        assert!(
            after < 300,
            "{after} buffers for a hundred messages behind the dead"
        );
        holder.exec("rollback");
    });
}
