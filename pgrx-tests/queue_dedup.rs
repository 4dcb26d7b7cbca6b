//! Dedup keys: one key is one message, and a duplicate writes nothing.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::fixture::{is_blocked, lines, together};
use crate::projections::text;
use crate::queue::{bodies, jobs, read, settle};
use crate::support::{Db, Session, on_each_install, wait_until};

fn keyed(key: &str, message: &str) -> String {
    format!("select nightowls.send('jobs', '{message}', dedup_key => '{key}')")
}

/// Transactions on the queue's tables that wrote a row, live or dead.
#[track_caller]
fn writes(session: &mut Session) -> String {
    text(
        session,
        "select sum(n_tup_ins + n_tup_upd + n_tup_del)::text || ' ' || sum(n_dead_tup)
           from pg_stat_all_tables where relid in ('nightowls.queue_messages'::regclass, 'nightowls.queue_dedup'::regclass)",
    )
}

#[test]
fn sixty_four_sessions_with_one_key_make_one_message_and_get_one_id() {
    on_each_install(|db| {
        let mut service = jobs(db);
        let ids: BTreeSet<String> = together(
            64,
            |_| db.service(),
            |_, mut session: Session| text(&mut session, &keyed("k", "1")),
        )
        .into_iter()
        .collect();
        assert_eq!(ids.len(), 1, "{ids:?}");
        assert_eq!(bodies(&mut service, "jobs", 64), ["1"]);
    });
}

#[test]
fn a_hundred_thousand_duplicates_of_a_committed_key_write_nothing() {
    on_each_install(|db| {
        let mut service = jobs(db);
        let id = text(&mut service, &keyed("k", "1"));
        let mut superuser = db.superuser();
        let settled = |superuser: &mut Session| {
            superuser.exec("select pg_stat_force_next_flush()");
            let mut last = String::new();
            wait_until("the statistics rest", Duration::from_secs(20), || {
                let now = writes(superuser);
                let rest = now == last;
                last = now;
                std::thread::sleep(Duration::from_millis(50));
                rest
            });
            last
        };
        service.exec("select pg_stat_force_next_flush()");
        let before = settled(&mut superuser);
        assert_eq!(
            lines(
                &mut service,
                "select distinct u from generate_series(1, 1000),
                   lateral nightowls.send_batch('jobs', array_fill('1'::jsonb, array[100]), dedup_keys => array_fill('k'::text, array[100])) u"
            ),
            [id]
        );
        service.exec("select pg_stat_force_next_flush()");
        assert_eq!(settled(&mut superuser), before);
    });
}

#[test]
fn a_key_counts_until_its_message_is_done_or_as_long_as_was_said() {
    on_each_install(|db| {
        let mut service = jobs(db);
        for done in [
            "nightowls.ack('jobs', {id}, receipt)",
            "nightowls.delete('jobs', {id})",
            "nightowls.archive('jobs', {id})",
            "nightowls.ack_many('jobs', '{{id}}', array[receipt])",
            "nightowls.purge_queue('jobs')",
            "nightowls.pop('jobs')",
        ] {
            let id = text(&mut service, &keyed("k", "1"));
            assert_eq!(text(&mut service, &keyed("k", "1")), id, "{done}");
            read(
                &mut service,
                "jobs",
                if done.contains("pop") { 0 } else { 30 },
                1,
            );
            assert_eq!(text(&mut service, &keyed("k", "1")), id, "{done}");
            service.exec(&format!(
                "select {} from nightowls.queue_messages where msg_id = {id}",
                done.replace("{id}", &id)
            ));
            assert_eq!(
                text(&mut service, "select count(*) from nightowls.queue_dedup"),
                "0",
                "{done}"
            );
            let next = text(&mut service, &keyed("k", "2"));
            assert_ne!(next, id, "{done}");
            service.exec("select nightowls.purge_queue('jobs')");
        }

        // A window of its own outlives the message, archived or not.
        for window in ["1 hour", "infinity"] {
            let sql = format!(
                "select nightowls.send('jobs', '1', dedup_key => '{window}', dedup_for => '{window}')"
            );
            // There is no infinite interval before PostgreSQL 17: then it is a word of ours alone.
            let Ok(Some(id)) = service.try_value(&sql) else {
                continue;
            };
            for how in ["archive", "delete"] {
                service.exec(&format!("select nightowls.{how}('jobs', {id})"));
                assert_eq!(text(&mut service, &sql), id, "{window}, {how}");
            }
            assert_eq!(bodies(&mut service, "jobs", 9), [""; 0]);
            assert_eq!(service.refused(&sql.replace("'1'", "'2'")).code, "NW002");
        }
        // It ends, and the key is free.
        db.superuser()
            .exec("update nightowls.queue_dedup set expires_at = now()");
        service.exec(
            "select nightowls.send('jobs', '3', dedup_key => '1 hour', dedup_for => '1 hour')",
        );
        assert_eq!(bodies(&mut service, "jobs", 9), ["3"]);
    });
}

#[test]
fn a_key_with_another_message_is_refused_or_reported_and_nothing_is_written() {
    on_each_install(|db| {
        let mut service = jobs(db);
        let id = text(&mut service, &keyed("k", "1"));
        assert_eq!(service.refused(&keyed("k", "2")).code, "NW002");
        let batch = "select nightowls.send_batch('jobs', array['5', '2', '6']::jsonb[], dedup_keys => array['a', 'k', null])";
        assert_eq!(service.refused(batch).code, "NW002");
        let twice = "select nightowls.send_batch('jobs', array['5', '6']::jsonb[], dedup_keys => array['b', 'b'])";
        assert_eq!(service.refused(twice).code, "NW002");
        assert_eq!(
            text(
                &mut service,
                "select count(*) from nightowls.queue_messages"
            ),
            "1"
        );
        service.exec("select nightowls.alter_queue('jobs', on_other_body => 'report')");
        assert_eq!(text(&mut service, &keyed("k", "2")), id);
        let ids = lines(&mut service, batch);
        assert_eq!((ids.len(), &ids[1]), (3, &id));
        assert_eq!(bodies(&mut service, "jobs", 9), ["1", "5", "6"]);
    });
}

#[test]
fn a_batch_has_each_key_once_and_returns_ids_in_its_order() {
    on_each_install(|db| {
        let mut service = jobs(db);
        let known = text(&mut service, &keyed("known", "0"));
        let ids = lines(
            &mut service,
            "select nightowls.send_batch('jobs', array['1', '0', '2', '1', '3']::jsonb[], dedup_keys => array['z', 'known', 'a', 'z', null])",
        );
        assert_eq!(ids[1], known);
        assert_eq!(ids[0], ids[3]);
        assert_eq!(bodies(&mut service, "jobs", 9), ["0", "1", "2", "3"]);
    });
}

#[test]
fn batches_with_their_keys_in_reversed_order_do_not_deadlock() {
    on_each_install(|db| {
        let mut service = jobs(db);
        for round in 0..20 {
            let ids = together(
                4,
                |_| db.service(),
                |number, mut session: Session| {
                    let order = if number % 2 == 0 { "g" } else { "-g" };
                    text(
                        &mut session,
                        &format!(
                            "select md5(string_agg(m || ':' || i, ',' order by m))
                               from (select array_agg(g::text::jsonb order by {order}) as bodies,
                                            array_agg('{round}/' || g order by {order}) as keys from generate_series(1, 50) g) s,
                                    lateral nightowls.send_batch('jobs', s.bodies, dedup_keys => s.keys) with ordinality as u (i, n),
                                    lateral (select (s.bodies[u.n])::text as m) b"
                        ),
                    )
                },
            );
            assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
        }
        assert_eq!(
            text(
                &mut service,
                "select count(*) from nightowls.queue_messages"
            ),
            "1000"
        );
    });
}

#[test]
fn who_sends_an_open_key_waits_for_it_and_nobody_else_does() {
    on_each_install(|db| {
        let mut service = jobs(db);
        let mut watcher = db.superuser();
        for (end, same) in [("commit", true), ("rollback", false)] {
            let mut open = db.service();
            open.exec("begin");
            let first = text(&mut open, &keyed(end, "1"));
            // Another key, no key, a reader: nobody waits.
            service.exec(&keyed(&format!("other {end}"), "1"));
            service.exec("select nightowls.send('jobs', '1'); select nightowls.read('jobs', 0, 9)");
            let mut second = db.service();
            let pid = second.pid();
            let got = std::thread::scope(|scope| {
                let waiting = scope.spawn(|| text(&mut second, &keyed(end, "1")));
                wait_until("the second waits", Duration::from_secs(10), || {
                    is_blocked(&mut watcher, pid)
                });
                open.exec(end);
                waiting.join().expect("the second ends")
            });
            assert_eq!(got == first, same, "{end}");
        }
    });
}

/// The window of a dead letter's key is not over: it is not done.
#[test]
fn the_key_of_a_dead_letter_counts_until_that_is_done() {
    on_each_install(|db: &Db| {
        let mut service = jobs(db);
        service.exec(
            "select nightowls.create_queue('dead'); select nightowls.alter_queue('jobs', max_attempts => 1, dead_letter_queue => 'dead')",
        );
        let id = text(&mut service, &keyed("k", "1"));
        let claim = read(&mut service, "jobs", 30, 1).remove(0);
        assert!(settle(&mut service, "nack", "jobs", &claim, ""));
        assert_eq!(text(&mut service, &keyed("k", "1")), id);
        let claim = read(&mut service, "dead", 30, 1).remove(0);
        assert!(settle(&mut service, "ack", "dead", &claim, ""));
        assert_ne!(text(&mut service, &keyed("k", "1")), id);
    });
}
