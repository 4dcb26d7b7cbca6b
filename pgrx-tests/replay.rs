//! Replay: what is in the archive is sent again, as new messages that say where they came from.

use crate::fixture::lines;
use crate::projections::text;
use crate::queue::{bodies, jobs, read, settle};
use crate::support::{Db, Session, on_each_install, on_each_route};

/// A queue that archives what is acked, with five messages that were.
#[track_caller]
fn archive(db: &Db) -> Session {
    let mut service = jobs(db);
    service.exec("select nightowls.alter_queue('jobs', archive_acked => true); select nightowls.create_queue('again')");
    service.exec(
        "select nightowls.send('jobs', '1', headers => '{\"h\": 1}'), nightowls.send('jobs', '2', group_key => 'g'), nightowls.send('jobs', '3', group_key => 'g'),
                nightowls.send('jobs', '4', dedup_key => 'k'), nightowls.send('jobs', '5', priority => 5)",
    );
    for _ in 0..2 {
        for claim in read(&mut service, "jobs", 30, 9) {
            assert!(settle(&mut service, "ack", "jobs", &claim, ""));
        }
    }
    assert_eq!(
        text(&mut service, "select count(*) from nightowls.queue_archive"),
        "5"
    );
    service
}

#[test]
fn archived_messages_are_sent_again_as_new_ones_on_every_route() {
    on_each_route(|db| {
        let mut service = archive(db);
        assert_eq!(text(&mut service, "select nightowls.replay('Jobs')"), "5");
        let rows = lines(
            &mut service,
            "select m.message, m.priority, m.group_key, m.dedup_key, m.headers, m.read_ct, m.msg_id > a.msg_id, m.queue_id = a.queue_id,
                    m.source = jsonb_build_object('replay', jsonb_build_object('queue_id', a.queue_id, 'msg_id', a.msg_id, 'enqueued_at', a.enqueued_at,
                                                                               'archived_at', a.archived_at, 'source', a.source))
               from nightowls.queue_messages m join nightowls.queue_archive a on a.message = m.message order by m.msg_id",
        );
        assert_eq!(
            rows,
            [
                "1 0 null null {\"h\": 1} 0 t t t",
                "2 0 g null null 0 t t t",
                "3 0 g null null 0 t t t",
                "4 0 null null null 0 t t t",
                "5 5 null null null 0 t t t",
            ]
        );
        // In order, the head of a group behind those who stand alone; the archive keeps what it has.
        assert_eq!(bodies(&mut service, "jobs", 9), ["5", "1", "4", "2"]);
        assert_eq!(
            text(&mut service, "select count(*) from nightowls.queue_archive"),
            "5"
        );
        // Elsewhere, and each call anew, unless once says that it was done.
        let call = "select nightowls.replay('jobs', into_queue => 'again') where nightowls.once('replay', 'ticket 7')";
        assert_eq!(lines(&mut service, call), ["5"]);
        assert_eq!(lines(&mut service, call), [""; 0]);
        assert_eq!(
            text(
                &mut service,
                "select nightowls.replay('jobs', into_queue => 'again')"
            ),
            "5"
        );
        assert_eq!(
            text(
                &mut service,
                "select count(*) from nightowls.read('again', 30, 99)"
            ),
            "7"
        );
    });
}

#[test]
fn a_time_is_what_was_archived_from_then_on_and_before_then() {
    on_each_install(|db| {
        let mut service = archive(db);
        db.superuser()
            .exec("update nightowls.queue_archive set archived_at = timestamptz '2026-01-01 00:00 utc' + message::text::int * interval '1 day'");
        for (since, until, count) in [
            ("null", "null", "5"),
            ("'2026-01-03 00:00 utc'", "null", "4"),
            ("null", "'2026-01-03 00:00 utc'", "1"),
            ("'2026-01-03 00:00 utc'", "'2026-01-05 00:00 utc'", "2"),
            ("'2026-01-03 00:00 utc'", "'2026-01-03 00:00 utc'", "0"),
            ("'-infinity'", "'infinity'", "5"),
        ] {
            let call = format!("select nightowls.replay('jobs', {since}, {until}, 'again')");
            assert_eq!(text(&mut service, &call), count, "{since} {until}");
        }
    });
}

#[test]
fn too_many_are_refused_and_so_is_what_makes_no_sense_and_nothing_is_sent() {
    on_each_install(|db| {
        let mut service = archive(db);
        for (call, code) in [
            ("replay('jobs', max_messages => 4)", "54000"),
            ("replay('jobz')", "NW007"),
            ("replay('jobs', into_queue => 'jobz')", "NW007"),
            ("replay(null)", "22004"),
            ("replay('jobs', max_messages => null)", "22004"),
            ("replay('jobs', max_messages => 0)", "22023"),
            ("replay('jobs', max_messages => 100001)", "22023"),
            ("replay('jobs', '2026-01-02', '2026-01-01')", "22023"),
        ] {
            let refused = service.refused(&format!("select nightowls.{call}"));
            assert_eq!(refused.code, code, "{call}: {refused}");
        }
        service.exec("begin isolation level repeatable read");
        assert_eq!(
            service.refused("select nightowls.replay('jobs')").code,
            "25001"
        );
        service.exec("rollback; begin; select nightowls.replay('jobs'); rollback");
        assert_eq!(
            text(
                &mut service,
                "select count(*) from nightowls.queue_messages"
            ),
            "0"
        );
        assert_eq!(
            text(
                &mut service,
                "select nightowls.replay('jobs', max_messages => 5)"
            ),
            "5"
        );
    });
}

#[test]
fn one_that_was_sent_again_fails_dies_and_is_redriven_like_any_other() {
    on_each_install(|db| {
        let mut service = archive(db);
        service.exec("select nightowls.create_queue('dead'), nightowls.alter_queue('again', max_attempts => 1, dead_letter_queue => 'dead')");
        service.exec("select nightowls.replay('jobs', into_queue => 'again')");
        // A redrive has nothing to do with it.
        let before = lines(
            &mut service,
            "select m from nightowls.queue_messages m order by msg_id",
        );
        assert_eq!(text(&mut service, "select nightowls.redrive('again')"), "0");
        assert_eq!(
            lines(
                &mut service,
                "select m from nightowls.queue_messages m order by msg_id"
            ),
            before
        );
        let claim = read(&mut service, "again", 30, 9).remove(1);
        assert_eq!(claim.message, "1");
        assert!(settle(&mut service, "nack", "again", &claim, ", 'no'"));
        let dead = "select source -> 'source' -> 'replay' -> 'msg_id' is not null, source ->> 'msg_id' from nightowls.queue_messages where message = '1'";
        assert_eq!(lines(&mut service, dead), [format!("t {}", claim.id)]);
        assert_eq!(text(&mut service, "select nightowls.redrive('dead')"), "1");
        assert_eq!(
            lines(
                &mut service,
                "select msg_id, source -> 'replay' -> 'msg_id' is not null from nightowls.queue_messages where message = '1'"
            ),
            [format!("{} t", claim.id)]
        );
    });
}
