//! The view health: it says when something is wrong, and nothing while nothing is.

use crate::fixture::{default_org, lines};
use crate::projections::text;
use crate::queue::{jobs, read};
use crate::support::{Session, on_each_install, on_each_route, quote};

/// The checks that are not well.
#[track_caller]
fn unwell(session: &mut Session) -> Vec<String> {
    lines(
        session,
        "select concern || '.' || name from nightowls.health where not ok and concern <> 'clock' order by 1",
    )
}

#[track_caller]
fn says(session: &mut Session, name: &str) -> (String, String) {
    let row = session
        .rows(&format!(
            "select value, hint from nightowls.health where name = {}",
            quote(name)
        ))
        .remove(0);
    (
        row[0].clone().unwrap_or_default(),
        row[1].clone().unwrap_or_default(),
    )
}

const NOTHING: [&str; 0] = [];

#[test]
fn a_fresh_install_is_well_and_every_check_has_a_value() {
    on_each_route(|db| {
        let mut service = jobs(db);
        assert_eq!(unwell(&mut service), NOTHING);
        assert_eq!(
            text(
                &mut service,
                "select bool_and(value <> '' and ok = (hint is null)) and count(*) >= 11 from nightowls.health"
            ),
            "t"
        );
    });
}

#[test]
fn guards_that_are_switched_off_are_named() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        let trigger = text(
            &mut owner,
            "select min(tgname::text) from pg_trigger where tgrelid = 'nightowls.events'::regclass and not tgisinternal",
        );
        for (off, on, name, told) in [
            (
                format!("alter table nightowls.events disable trigger {trigger}"),
                format!("alter table nightowls.events enable trigger {trigger}"),
                "guards",
                trigger.as_str(),
            ),
            (
                format!("alter table nightowls.events enable replica trigger {trigger}"),
                format!("alter table nightowls.events enable trigger {trigger}"),
                "guards",
                trigger.as_str(),
            ),
            (
                "alter table nightowls.queue_messages no force row level security".to_owned(),
                "alter table nightowls.queue_messages force row level security".to_owned(),
                "row_security",
                "queue_messages",
            ),
        ] {
            owner.exec(&off);
            assert_eq!(unwell(&mut owner), [format!("log.{name}")]);
            let (value, hint) = says(&mut owner, name);
            assert!(
                value.contains(told) && hint.contains("alter table"),
                "{value} {hint}"
            );
            owner.exec(&on);
            assert_eq!(unwell(&mut owner), NOTHING);
        }
        let mut superuser = db.superuser();
        superuser.exec("set session_replication_role to replica");
        assert_eq!(unwell(&mut superuser), ["log.replication_role"]);
        superuser.exec(&format!(
            "reset session_replication_role; alter database {} set session_replication_role to replica",
            db.name()
        ));
        assert!(
            says(&mut superuser, "replication_role")
                .0
                .contains(db.name())
        );
    });
}

#[test]
fn queues_that_nobody_works_on_are_named() {
    on_each_install(|db| {
        let mut service = jobs(db);
        let mut superuser = db.superuser();
        service.exec(
            "select nightowls.create_queue('graves'); select nightowls.create_queue('mail', dead_letter_queue => 'graves', max_attempts => 1);
             select nightowls.alter_queue('jobs', max_attempts => 1);
             select nightowls.send('jobs', '1'), nightowls.send('jobs', '2', delay => 100000)",
        );
        // What is sent for later is not old.
        superuser.exec(
            "update nightowls.queue_messages set enqueued_at = enqueued_at - interval '2 hours'",
        );
        assert_eq!(unwell(&mut service), NOTHING);
        superuser.exec("update nightowls.queue_messages set due_at = due_at - interval '2 hours' where message = '1'");
        assert_eq!(unwell(&mut service), ["queues.oldest_unacknowledged"]);
        assert!(
            says(&mut service, "oldest_unacknowledged")
                .0
                .starts_with("jobs: 72")
        );
        // Nor is what a reader has and does not settle, wherever it stands.
        let claim = read(&mut service, "jobs", 0, 1).remove(0);
        assert_eq!(unwell(&mut service), ["queues.oldest_unacknowledged"]);
        service.exec("select nightowls.pause_queue('jobs')");
        assert_eq!(unwell(&mut service), NOTHING);
        superuser.exec("update nightowls.queues set paused_at = paused_at - interval '2 hours' where name = 'jobs'");
        assert_eq!(unwell(&mut service), ["queues.paused"]);
        service.exec("select nightowls.resume_queue('jobs')");

        // Delivered as often as it may be: a dead letter, here or elsewhere.
        service.exec("select nightowls.send('mail', '3')");
        read(&mut service, "mail", 0, 1);
        assert_eq!(read(&mut service, "mail", 0, 1).len(), 0);
        assert_eq!(read(&mut service, "jobs", 0, 1).len(), 0);
        assert_eq!(unwell(&mut service), ["queues.dead_letters"]);
        assert_eq!(says(&mut service, "dead_letters").0, "graves: 1, jobs: 1");
        service.exec(&format!(
            "select nightowls.delete('jobs', {}), nightowls.purge_queue('graves')",
            claim.id
        ));
        assert_eq!(unwell(&mut service), NOTHING);

        // A long queue that grows from one count to another.
        let send = "select count(*) from nightowls.send_batch('jobs', array_fill('1'::jsonb, array[12000]))";
        service.exec(send);
        service.exec("select nightowls._count_queues(60000)");
        assert_eq!(unwell(&mut service), NOTHING);
        superuser.exec(
            "update nightowls._queue_counts set counted_at = counted_at - interval '15 minutes'",
        );
        service.exec(send);
        service.exec("select nightowls._count_queues(60000)");
        assert_eq!(unwell(&mut service), ["queues.backlog"]);
        assert!(
            says(&mut service, "backlog")
                .0
                .starts_with("jobs: 24000, 12000 of them since")
        );
    });
}

#[test]
fn who_holds_up_the_log_and_whom_nobody_reads_for_is_named() {
    on_each_install(|db| {
        default_org(db);
        let mut service = db.service();
        let mut superuser = db.superuser();
        service.exec(
            "select nightowls.create_consumer('mail'); select nightowls.append_event('order', '1', 'paid')",
        );
        assert_eq!(unwell(&mut superuser), NOTHING);
        // As if it had been there for long: the clock cannot be moved, the event can.
        superuser.exec(
            "set session_replication_role to replica;
             update nightowls.events set created_at = created_at - interval '1 hour';
             reset session_replication_role",
        );
        assert_eq!(unwell(&mut superuser), ["consumers.stalled"]);
        assert_eq!(says(&mut superuser, "stalled").0, "mail: 1 events behind");
        service.exec("select nightowls.fetch_events('mail')");
        assert_eq!(unwell(&mut superuser), NOTHING);
        service.exec(
            "select nightowls.park_event('mail', position, 'poison', (select max(fence) from nightowls.consumer_lag)) from nightowls.events;
             select nightowls.commit_offset('mail', position, (select max(fence) from nightowls.consumer_lag)) from nightowls.events",
        );
        assert_eq!(unwell(&mut superuser), ["consumers.parked"]);
    });
}
