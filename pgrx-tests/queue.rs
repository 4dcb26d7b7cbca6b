//! The queue's life cycle: what is sent is delivered, to one reader at a time, and
//! settled by nobody but that one.

use crate::fixture::{default_org, lines, new_org};
use crate::projections::text;
use crate::support::{Db, Session, on_each_install, on_each_route};

/// A database with a default org and queue `jobs`; a session of the service.
#[track_caller]
pub fn jobs(db: &Db) -> Session {
    default_org(db);
    let mut service = db.service();
    service.exec("select nightowls.create_queue('jobs')");
    service
}

/// What is left of a message when it was read: its id and its receipt.
pub struct Claim {
    pub id: String,
    pub receipt: String,
    pub message: String,
    pub read_ct: String,
}

/// Reads from `queue` with that lease.
#[track_caller]
pub fn read(session: &mut Session, queue: &str, vt: u32, qty: u32) -> Vec<Claim> {
    session
        .rows(&format!(
            "select msg_id, receipt, message, read_ct from nightowls.read('{queue}', {vt}, {qty})"
        ))
        .into_iter()
        .map(|row| {
            let mut row = row.into_iter().map(Option::unwrap_or_default);
            let mut next = || row.next().expect("four columns");
            Claim {
                id: next(),
                receipt: next(),
                message: next(),
                read_ct: next(),
            }
        })
        .collect()
}

/// Calls one of the functions that take a message and its receipt: true if it was good.
#[track_caller]
pub fn settle(session: &mut Session, what: &str, queue: &str, claim: &Claim, more: &str) -> bool {
    text(
        session,
        &format!(
            "select nightowls.{what}('{queue}', {}, '{}'{more})",
            claim.id, claim.receipt
        ),
    ) == "t"
}

/// The bodies that a read returns.
#[track_caller]
pub fn bodies(session: &mut Session, queue: &str, qty: u32) -> Vec<String> {
    read(session, queue, 30, qty)
        .into_iter()
        .map(|claim| claim.message)
        .collect()
}

const NOTHING: [&str; 0] = [];

#[test]
fn a_message_lives_from_send_to_ack_on_every_route() {
    on_each_route(|db| {
        let mut service = jobs(db);
        let id = text(
            &mut service,
            "select nightowls.send('jobs', '{\"n\": 1}', headers => '{\"trace\": \"t\"}')",
        );
        let row = lines(
            &mut service,
            "select msg_id, read_ct, message, headers, vt > now() + interval '29 seconds', last_read_at is not null,
                    enqueued_at <= last_read_at, receipt is not null from nightowls.read('jobs', 30, 10)",
        );
        assert_eq!(
            row,
            [format!("{id} 1 {{\"n\": 1}} {{\"trace\": \"t\"}} t t t t")]
        );
        // It is the reader's alone.
        assert_eq!(bodies(&mut db.service(), "jobs", 10), NOTHING);
        let receipt = text(&mut service, "select receipt from nightowls.queue_messages");
        let ack = format!("select nightowls.ack('jobs', {id}, '{receipt}')");
        assert_eq!(text(&mut service, &ack), "t");
        assert_eq!(text(&mut service, &ack), "f");
        assert_eq!(
            text(
                &mut service,
                "select count(*) from nightowls.queue_messages"
            ),
            "0"
        );

        // A batch, in order; pop takes away, delete and archive by id.
        let ids = lines(
            &mut service,
            "select nightowls.send_batch('jobs', array['1', '2', '3', '4', '5']::jsonb[])",
        );
        assert_eq!(ids.len(), 5);
        assert!(ids.is_sorted_by_key(|id| id.parse::<i64>().expect("an id")));
        assert_eq!(
            lines(&mut service, "select message from nightowls.pop('jobs', 2)"),
            ["1", "2"]
        );
        let all: Vec<_> = read(&mut service, "jobs", 30, 10);
        assert_eq!(
            all.iter().map(|claim| &claim.message).collect::<Vec<_>>(),
            ["3", "4", "5"]
        );
        assert!(settle(&mut service, "extend", "jobs", &all[0], ", 60"));
        assert_eq!(
            text(
                &mut service,
                &format!("select nightowls.archive('jobs', {})", all[0].id)
            ),
            "t"
        );
        assert_eq!(
            text(
                &mut service,
                &format!("select nightowls.delete('jobs', {})", all[1].id)
            ),
            "t"
        );
        assert!(settle(&mut service, "nack", "jobs", &all[2], ", 'why', 0"));
        let again = read(&mut service, "jobs", 30, 10);
        assert_eq!((again.len(), again[0].read_ct.as_str()), (1, "2"));
        assert_eq!(again[0].id, all[2].id);
        assert!(!settle(&mut service, "ack", "jobs", &all[2], ""));
        assert!(settle(&mut service, "ack", "jobs", &again[0], ""));
        assert_eq!(
            lines(
                &mut service,
                "select msg_id, message, read_ct from nightowls.queue_archive"
            ),
            [format!("{} 3 1", all[0].id)]
        );
        service.exec("select nightowls.drop_queue('jobs')");
        assert_eq!(
            service.refused("select nightowls.send('jobs', '1')").code,
            "NW007"
        );
    });
}

#[test]
fn the_array_forms_settle_what_is_the_callers_and_say_which() {
    on_each_install(|db| {
        let mut service = jobs(db);
        let read_all = "select array_agg(msg_id order by msg_id)::text as ids, array_agg(receipt order by msg_id)::text as receipts \
                        from nightowls.read('jobs', 30, 100)";
        for (call, left, archived) in [
            ("ack_many('jobs', '{ids}', '{receipts}')", "0", "0"),
            ("delete_many('jobs', '{ids}')", "0", "0"),
            ("delete_many('jobs', '{ids}', '{receipts}')", "0", "0"),
            ("archive_many('jobs', '{ids}')", "0", "4"),
            ("archive_many('jobs', '{ids}', '{receipts}')", "0", "4"),
            (
                "nack_many('jobs', '{ids}', '{receipts}', 'no', 0)",
                "4",
                "0",
            ),
            ("extend_many('jobs', '{ids}', '{receipts}', 60)", "4", "0"),
        ] {
            service.exec("select nightowls.send_batch('jobs', array['1', '2']::jsonb[]); select nightowls.send('jobs', '3', group_key => 'g'), \
                          nightowls.send('jobs', '4', dedup_key => 'k')");
            let row = service.rows(read_all).remove(0);
            let (ids, receipts) = (row[0].clone().unwrap(), row[1].clone().unwrap());
            let sql = |receipts: &str| {
                format!(
                    "select count(*) from nightowls.{} as id",
                    call.replace("{ids}", &ids).replace("{receipts}", receipts)
                )
            };
            if call.contains("receipts") {
                let wrong = format!("{{{}}}", [uuid(), uuid(), uuid(), uuid()].join(","));
                assert_eq!(text(&mut service, &sql(&wrong)), "0", "{call}");
            }
            assert_eq!(text(&mut service, &sql(&receipts)), "4", "{call}");
            let counts = lines(
                &mut service,
                "select (select count(*) from nightowls.queue_messages), (select count(*) from nightowls.queue_archive)",
            );
            assert_eq!(counts, [format!("{left} {archived}")], "{call}");
            service
                .exec("select nightowls.purge_queue('jobs'), nightowls.purge_archive('jobs', '0')");
        }
    });
}

fn uuid() -> &'static str {
    "00000000-0000-4000-8000-000000000000"
}

#[test]
fn a_lease_that_ran_out_is_lost_to_every_way_of_settling() {
    on_each_install(|db| {
        let mut service = jobs(db);
        let mut other = db.service();
        for what in ["ack", "nack", "extend", "archive", "delete"] {
            service.exec("select nightowls.send('jobs', '1')");
            let late = read(&mut service, "jobs", 0, 1).remove(0);
            assert!(!settle(&mut service, what, "jobs", &late, ""), "{what}");
            // Somebody else has it now; the late one changes nothing.
            let now = read(&mut other, "jobs", 30, 1).remove(0);
            let before = lines(&mut service, "select m from nightowls.queue_messages m");
            assert!(!settle(&mut service, what, "jobs", &late, ""), "{what}");
            assert_eq!(
                lines(&mut service, "select m from nightowls.queue_messages m"),
                before
            );
            assert!(settle(&mut other, "ack", "jobs", &now, ""));
        }
        assert_eq!(
            text(&mut service, "select count(*) from nightowls.queue_archive"),
            "0"
        );
    });
}

#[test]
fn a_thousand_stale_workers_change_nothing() {
    on_each_install(|db| {
        let mut service = jobs(db);
        let stale = text(
            &mut service,
            "select count(*) from (
               select nightowls.send('jobs', to_jsonb(g)) from generate_series(1, 1000) g) s",
        );
        assert_eq!(stale, "1000");
        db.superuser().exec(
            "create table public.late as select * from nightowls.read('jobs', 0, 1000);
             create table public.now as select * from nightowls.read('jobs', 60, 1000);
             create table public.before as select * from nightowls.queue_messages",
        );
        for what in ["ack", "nack", "extend", "archive"] {
            assert_eq!(
                text(
                    &mut db.superuser(),
                    &format!(
                        "select count(*) filter (where nightowls.{what}('jobs', msg_id, receipt)) from public.late"
                    )
                ),
                "0"
            );
        }
        assert_eq!(
            text(
                &mut db.superuser(),
                "select count(*) from (select * from nightowls.queue_messages except select * from public.before) d"
            ),
            "0"
        );
        assert_eq!(
            text(
                &mut db.superuser(),
                "select count(*) filter (where nightowls.ack('jobs', msg_id, receipt)) from public.now"
            ),
            "1000"
        );
    });
}

#[test]
fn a_rolled_back_send_read_or_ack_has_not_happened() {
    on_each_install(|db| {
        let mut service = jobs(db);
        service.exec("begin; select nightowls.send('jobs', '0'); rollback");
        assert_eq!(bodies(&mut service, "jobs", 1), NOTHING);
        service.exec("select nightowls.send('jobs', '1')");
        service.exec("begin");
        let claim = read(&mut service, "jobs", 30, 1).remove(0);
        // Passed over, not waited for.
        assert_eq!(bodies(&mut db.service(), "jobs", 1), NOTHING);
        service.exec("rollback");
        assert!(!settle(&mut service, "ack", "jobs", &claim, ""));
        let claim = read(&mut service, "jobs", 30, 1).remove(0);
        assert_eq!(claim.read_ct, "1");
        service.exec("begin");
        assert!(settle(&mut service, "ack", "jobs", &claim, ""));
        service.exec("rollback");
        assert!(settle(&mut service, "ack", "jobs", &claim, ""));
    });
}

#[test]
fn what_is_delayed_comes_when_it_is_due_and_not_before() {
    on_each_install(|db| {
        let mut service = jobs(db);
        service.exec("select nightowls.send('jobs', '\"later\"', delay => 3600), nightowls.send('jobs', '\"now\"')");
        assert_eq!(bodies(&mut service, "jobs", 5), ["\"now\""]);
        assert_eq!(bodies(&mut service, "jobs", 5), NOTHING);
        let id = text(
            &mut service,
            "select msg_id from nightowls.queue_messages where message = '\"later\"'",
        );
        let vt = format!("select vt <= now() from nightowls.set_vt('jobs', {id}, 0)");
        assert_eq!(text(&mut service, &vt), "f");
        assert_eq!(bodies(&mut service, "jobs", 5), ["\"later\""]);
        // Taken away from its reader, put off, and back.
        let claim = read(&mut service, "jobs", 0, 5);
        assert_eq!(claim.len(), 0);
        service.exec(&format!("select nightowls.set_vt('jobs', {id}, 0)"));
        assert_eq!(bodies(&mut service, "jobs", 5), ["\"later\""]);
        service.exec(&format!(
            "select nightowls.set_vt('jobs', {id}, 0), nightowls.set_vt('jobs', {id}, 3600)"
        ));
        assert_eq!(bodies(&mut service, "jobs", 5), NOTHING);
        service.exec(&format!("select nightowls.set_vt('jobs', {id}, 1)"));
        assert_eq!(
            lines(
                &mut service,
                "select message from nightowls.read_with_poll('jobs', 30, 1, '20 seconds')"
            ),
            ["\"later\""]
        );
    });
}

#[test]
fn a_read_for_no_time_gives_no_message_twice() {
    on_each_install(|db| {
        let mut service = jobs(db);
        // More than become due at once, among those that are, also where priorities are.
        for (ready, delayed, priority) in [(0, 250, 0), (20, 250, 0), (20, 250, 1)] {
            service.exec(&format!(
                "select nightowls.purge_queue('jobs'); \
                 select nightowls.send('jobs', to_jsonb(i), priority => {priority}) from generate_series(1, {ready}) i; \
                 select nightowls.send('jobs', to_jsonb(i), delay => 3600) from generate_series(1, {delayed}) i"
            ));
            db.superuser()
                .exec("update nightowls.queue_messages set due_at = now() where state = 'd'");
            for qty in [300, 5] {
                assert_eq!(
                    text(
                        &mut service,
                        &format!(
                            "select count(*) > 0 and count(*) = count(distinct msg_id) from nightowls.read('jobs', 0, {qty})"
                        )
                    ),
                    "t"
                );
            }
            assert_eq!(
                text(
                    &mut service,
                    "select count(distinct message) from nightowls.read('jobs', 60, 1000)"
                ),
                delayed.max(ready).to_string()
            );
        }
    });
}

#[test]
fn a_lease_that_runs_out_is_delivered_again_in_its_old_place() {
    on_each_install(|db| {
        let mut service = jobs(db);
        service.exec(
            "select nightowls.send_batch('jobs', array['1', '2', '3', '4', '5', '6']::jsonb[])",
        );
        // One after the other, as a heap would scatter them.
        for _ in 0..3 {
            assert_eq!(read(&mut service, "jobs", 0, 3).len(), 3);
        }
        assert_eq!(
            bodies(&mut service, "jobs", 6),
            ["1", "2", "3", "4", "5", "6"]
        );
        assert_eq!(
            lines(
                &mut service,
                "select message, read_ct from nightowls.queue_messages order by msg_id"
            ),
            ["1 4", "2 4", "3 4", "4 1", "5 1", "6 1"]
        );
    });
}

#[test]
fn the_highest_priority_is_read_first_and_within_it_the_oldest() {
    on_each_install(|db| {
        let mut service = jobs(db);
        service.exec(
            "select nightowls.send('jobs', to_jsonb(p || '/' || n), priority => p) from generate_series(1, 3) n, unnest('{0,5,9}'::int[]) p",
        );
        assert_eq!(
            bodies(&mut service, "jobs", 4),
            ["\"9/1\"", "\"9/2\"", "\"9/3\"", "\"5/1\""]
        );
        service.exec("select nightowls.send('jobs', '\"7\"', priority => 7, delay => 0)");
        assert_eq!(
            bodies(&mut service, "jobs", 10),
            [
                "\"7\"", "\"5/2\"", "\"5/3\"", "\"0/1\"", "\"0/2\"", "\"0/3\""
            ]
        );
    });
}

#[test]
fn pop_queue_and_ack_message_are_what_a_worker_on_supabase_calls() {
    on_each_route(|db| {
        let mut service = jobs(db);
        service.exec(
            "select nightowls.send_batch('jobs', array['{\"n\": 1}', '{\"n\": 2}']::jsonb[])",
        );
        let got = service.rows(
            "select id, payload ->> 'n' from nightowls.pop_queue(queue_name => 'jobs', batch_size => 10, visibility_timeout => 30)",
        );
        assert_eq!(got.len(), 2);
        for row in &got {
            let id = row[0].as_deref().expect("an id");
            let ack = format!("select nightowls.ack_message(message_id => '{id}')");
            assert_eq!(text(&mut service, &ack), "t");
            assert_eq!(text(&mut service, &ack), "f");
        }
        service.exec("select nightowls.send('jobs', '1')");
        let late = text(
            &mut service,
            "select id from nightowls.pop_queue('jobs', 1, 0)",
        );
        service.exec("select * from nightowls.pop_queue('jobs')");
        assert_eq!(
            text(
                &mut service,
                &format!("select nightowls.ack_message('{late}')")
            ),
            "f"
        );
        for wrong in [
            "",
            "1",
            "1.1.x",
            "1.1",
            "99999999999.1.00000000-0000-4000-8000-000000000000",
        ] {
            let call = format!("select nightowls.ack_message('{wrong}')");
            assert_eq!(service.refused(&call).code, "22023", "{wrong}");
        }
        assert_eq!(
            text(
                &mut service,
                &format!("select nightowls.ack_message('999.1.{}')", uuid())
            ),
            "f"
        );
    });
}

#[test]
fn a_paused_queue_takes_messages_and_delivers_none() {
    on_each_install(|db| {
        let mut service = jobs(db);
        service.exec("select nightowls.send('jobs', '1')");
        let claim = read(&mut service, "jobs", 30, 1).remove(0);
        service.exec("select nightowls.pause_queue('jobs'); select nightowls.send('jobs', '2')");
        assert_eq!(bodies(&mut service, "jobs", 5), NOTHING);
        assert_eq!(
            lines(&mut service, "select nightowls.pop('jobs', 5)"),
            NOTHING
        );
        assert!(settle(&mut service, "ack", "jobs", &claim, ""));
        service.exec("select nightowls.resume_queue('jobs')");
        assert_eq!(bodies(&mut service, "jobs", 5), ["2"]);
    });
}

#[test]
fn purge_and_drop_leave_nothing_behind() {
    on_each_install(|db| {
        let mut service = jobs(db);
        let fill = "select nightowls.send('jobs', '1', priority => 3), nightowls.send('jobs', '2', delay => 60), \
                    nightowls.send('jobs', '3', group_key => 'g'), nightowls.send('jobs', '4', group_key => 'g'), \
                    nightowls.send('jobs', '5', dedup_key => 'k')";
        service.exec(fill);
        assert_eq!(
            text(&mut service, "select nightowls.purge_queue('jobs')"),
            "5"
        );
        // Its groups go on, and its keys are free again.
        service.exec(fill);
        assert_eq!(bodies(&mut service, "jobs", 9), ["1", "3", "5"]);
        service.exec("select nightowls.archive('jobs', msg_id) from nightowls.queue_messages where message = '1'");
        service.exec("select nightowls.create_queue('dead'); select nightowls.alter_queue('jobs', dead_letter_queue => 'dead')");
        assert_eq!(
            service.refused("select nightowls.drop_queue('dead')").code,
            "2BP01"
        );
        service.exec("select nightowls.drop_queue('jobs'); select nightowls.drop_queue('dead')");
        for table in [
            "queues",
            "queue_messages",
            "queue_archive",
            "queue_dedup",
            "queue_marks",
            "queue_due_marks",
        ] {
            assert_eq!(
                text(
                    &mut service,
                    &format!("select count(*) from nightowls.{table}")
                ),
                "0",
                "{table}"
            );
        }
        service.exec("select nightowls.create_queue('jobs')");
        assert_eq!(
            service
                .refused(
                    "begin isolation level repeatable read; select nightowls.purge_queue('jobs')"
                )
                .code,
            "25001"
        );
    });
}

#[test]
fn one_orgs_queue_is_not_anothers() {
    on_each_install(|db| {
        let mut service = jobs(db);
        let other = new_org(db, "other");
        service.exec("select nightowls.send('jobs', '1')");
        let claim = read(&mut service, "jobs", 30, 1).remove(0);
        assert_eq!(
            service
                .refused(&format!(
                    "select nightowls.send('jobs', '1', org => '{other}')"
                ))
                .code,
            "NW007"
        );
        service.exec(&format!(
            "select nightowls.create_queue('jobs', org => '{other}'); select nightowls.send('jobs', '2', org => '{other}')"
        ));
        assert_eq!(
            lines(
                &mut service,
                &format!("select message from nightowls.read('jobs', 30, 9, org => '{other}')")
            ),
            ["2"]
        );
        assert_eq!(
            text(
                &mut service,
                &format!(
                    "select nightowls.ack('jobs', {}, '{}', org => '{other}')",
                    claim.id, claim.receipt
                )
            ),
            "f"
        );
        assert_eq!(
            text(&mut service, "select count(*) from nightowls.list_queues()"),
            "1"
        );
        service.exec(&format!(
            "select nightowls.drop_queue('jobs', org => '{other}')"
        ));
        assert!(settle(&mut service, "ack", "jobs", &claim, ""));
    });
}
