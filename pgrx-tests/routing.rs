//! Events that become messages in the transaction that appends them, and topics.

use crate::fixture::{Random, is_blocked, lines, new_org, together};
use crate::projections::{assert_examples, text};
use crate::queue::{bodies, jobs, read, settle};
use crate::support::{SERVICE, Session, on_each_install, on_each_route, wait_until};
use std::thread;
use std::time::Duration;

/// What lies in a queue, in the order of ids: type, id, version and event type.
#[track_caller]
fn routed(session: &mut Session, queue: &str) -> Vec<String> {
    lines(
        session,
        &format!(
            "select m.message ->> 'aggregate_type', m.message ->> 'aggregate_id', m.message ->> 'version', m.message ->> 'event_type'
               from nightowls.queue_messages m join nightowls.queues q using (org_id, queue_id)
              where q.name = '{queue}' and m.state <> 's' order by m.msg_id"
        ),
    )
}

const NOTHING: [&str; 0] = [];

#[test]
fn an_event_is_a_message_with_all_that_it_says_on_every_route() {
    on_each_route(|db| {
        let mut service = jobs(db);
        service.exec("select nightowls.bind('Jobs')");
        service.exec(
            "select nightowls.append_event('order', 'o1', 'placed', '{\"sum\": 12.50}', metadata => '{\"actor_id\": \"ann\"}',
                     event_id => '00000000-0000-4000-8000-000000000001')",
        );
        let same = text(
            &mut service,
            "select (r.message - 'created_at') = (to_jsonb(e) - 'org_id' - 'created_at')
                    and (r.message ->> 'created_at')::timestamptz = e.created_at
                    and r.headers = jsonb_build_object('nightowls_event', e.position)
               from nightowls.read('jobs') r, nightowls.events e",
        );
        assert_eq!(same, "t");
    });
}

/// Every way in which an event comes into the log, and how many events each brings.
const PATHS: &[(&str, &str, u32)] = &[
    ("the first event", "select nightowls.append_event('order', 'new', 'placed')", 1),
    ("the next event", "select nightowls.append_event('order', 'new', 'placed')", 1),
    (
        "with an event_id",
        "select nightowls.append_event('order', 'new', 'placed', event_id => gen_random_uuid())",
        1,
    ),
    (
        "a list",
        "select nightowls.append_events('order', 'list', '[{\"event_type\": \"placed\"}, {\"event_type\": \"paid\"}]')",
        2,
    ),
    (
        "a batch with ids",
        "select nightowls.append_events('order', 'list', jsonb_build_array(jsonb_build_object('event_type', 'placed', 'event_id', gen_random_uuid())))",
        1,
    ),
    (
        "many",
        "select nightowls.append_many('[{\"aggregate_type\": \"order\", \"aggregate_id\": \"m1\", \"events\": [{\"event_type\": \"placed\"}]},
                                       {\"aggregate_type\": \"order\", \"aggregate_id\": \"m2\", \"events\": [{\"event_type\": \"placed\"}, {\"event_type\": \"paid\"}]},
                                       {\"aggregate_type\": \"cart\", \"aggregate_id\": \"m3\", \"events\": [{\"event_type\": \"opened\"}]}]')",
        4,
    ),
    (
        "a plain insert",
        "insert into nightowls.events (aggregate_type, aggregate_id, event_type) values ('order', 'orm', 'placed'), ('cart', 'orm', 'opened')",
        2,
    ),
    (
        "a plain insert with versions",
        "insert into nightowls.events (aggregate_type, aggregate_id, version, event_type) values ('order', 'orm', 2, 'paid'), ('order', 'orm', 3, 'sent')",
        2,
    ),
    (
        "repeatable read",
        "begin isolation level repeatable read; select nightowls.append_event('order', 'new', 'placed'); commit",
        1,
    ),
];

#[test]
fn every_way_to_append_routes_each_event_once() {
    on_each_install(|db| {
        let mut service = jobs(db);
        service.exec(
            "select nightowls.create_queue('loose'), nightowls.create_queue('carts'), nightowls.create_queue('paid')",
        );
        // All of them; all of them twice; one type; one event type.
        service.exec(
            "select nightowls.bind('jobs'), nightowls.bind('loose', group_by => 'none'),
                    nightowls.bind('loose', '{\"aggregate_types\": [\"order\", \"cart\"]}', 'none'),
                    nightowls.bind('loose', '{\"event_types\": [\"placed\"]}', 'none'),
                    nightowls.bind('carts', '{\"aggregate_types\": [\"cart\"]}'),
                    nightowls.bind('paid', '{\"aggregate_types\": [\"order\"], \"event_types\": [\"paid\", \"paid\"]}')",
        );
        let log = "select aggregate_type, aggregate_id, version, event_type from nightowls.events";
        let mut all = 0;
        for (name, sql, count) in PATHS {
            service.exec(sql);
            all += *count as usize;
            let events = lines(&mut service, &format!("{log} order by position"));
            assert_eq!(events.len(), all, "{name}");
            assert_eq!(routed(&mut service, "jobs"), events, "{name}");
            assert_eq!(routed(&mut service, "loose"), events, "{name}");
            let carts = lines(
                &mut service,
                &format!("{log} where aggregate_type = 'cart' order by position"),
            );
            assert_eq!(routed(&mut service, "carts"), carts, "{name}");
            let paid = lines(
                &mut service,
                &format!(
                    "{log} where aggregate_type = 'order' and event_type = 'paid' order by position"
                ),
            );
            assert_eq!(routed(&mut service, "paid"), paid, "{name}");
        }
        // What failed, was rolled back or was there before brings nothing.
        service.refused(
            "select nightowls.append_event('order', 'new', 'placed', expected_version => 99)",
        );
        service.exec("begin; select nightowls.append_event('order', 'new', 'placed'); rollback");
        service.exec("begin; savepoint a; select nightowls.append_event('order', 'new', 'placed'); rollback to a; commit");
        for _ in 0..3 {
            service.exec(
                "select nightowls.append_event('order', 'once', 'placed', event_id => '00000000-0000-4000-8000-000000000009');
                 select nightowls.append_events('order', 'twice', '[{\"event_type\": \"placed\", \"event_id\": \"00000000-0000-4000-8000-000000000008\"}]')",
            );
        }
        assert_eq!(routed(&mut service, "jobs").len(), all + 2);
        assert_eq!(routed(&mut service, "loose").len(), all + 2);
    });
}

#[test]
fn with_projections_handlers_and_queues_each_gets_its_part() {
    on_each_install(|db| {
        let mut service = jobs(db);
        db.superuser().exec(&format!(
            "create table public.seen (n bigint); grant insert, select on public.seen to {SERVICE};
             create function public.see(state jsonb, event nightowls.events) returns jsonb language plpgsql as $$
             begin insert into public.seen values (event.version); return coalesce(state, '{{}}'); end $$;
             grant execute on function public.see to {SERVICE}"
        ));
        for steps in [
            "select nightowls.bind('jobs', '{\"aggregate_types\": [\"order\"]}')",
            "select nightowls.create_projection('count', 'order', '{\"otherwise\": [{\"op\": \"add\", \"path\": \"n\"}]}')",
            "select nightowls.create_projection('seen', 'order', handler => 'public.see')",
        ] {
            service.exec(steps);
            service.exec("select nightowls.append_event('order', 'a', 'placed')");
            service.exec(
                "select nightowls.append_events('order', 'a', '[{\"event_type\": \"placed\"}]')",
            );
        }
        assert_eq!(routed(&mut service, "jobs").len(), 6);
        assert_eq!(
            text(&mut service, "select nightowls.state('count', 'a')"),
            "{\"n\": 6}"
        );
        assert!(
            text(&mut service, "select count(*) from public.seen")
                .parse::<u32>()
                .expect("a number")
                >= 2
        );
        // One of the same name as the queue does not take its routes away.
        service.exec("select nightowls.create_projection('jobs', 'order', '{\"otherwise\": []}'); select nightowls.drop_projection('jobs')");
        service.exec("select nightowls.append_event('order', 'a', 'placed')");
        assert_eq!(routed(&mut service, "jobs").len(), 7);
        service.exec("select nightowls.unbind('jobs')");
        service.exec("select nightowls.append_event('order', 'a', 'placed')");
        assert_eq!(routed(&mut service, "jobs").len(), 7);
        assert_eq!(
            text(&mut service, "select nightowls.state('count', 'a')"),
            "{\"n\": 8}"
        );
    });
}

#[test]
fn the_events_of_an_aggregate_are_worked_on_in_order_one_at_a_time() {
    const WRITERS: usize = 4;
    const WORKERS: usize = 4;
    const EVENTS: u64 = 60;
    on_each_install(|db| {
        let mut service = jobs(db);
        service.exec("select nightowls.alter_queue('jobs', backoff => '0', max_backoff => '0'); select nightowls.bind('jobs', '{\"aggregate_types\": [\"order\"]}')");
        db.superuser().exec(&format!(
            "create table public.effects (at bigint generated always as identity, id text, version bigint);
             grant insert, select on public.effects to {SERVICE}"
        ));
        thread::scope(|scope| {
            for worker in 0..WORKERS {
                let mut session = db.service();
                scope.spawn(move || {
                    let mut random = Random::new(worker as u64 + 3);
                    loop {
                        session.exec("begin");
                        let rows = session.rows(
                            "select msg_id, receipt, message ->> 'aggregate_id', message ->> 'version', message ->> 'event_type'
                               from nightowls.read_with_poll('jobs', 60, 2, '30 seconds')",
                        );
                        let mut last = rows.is_empty();
                        for row in rows {
                            let [msg, receipt, id, version, kind] = [0, 1, 2, 3, 4].map(|i| row[i].clone().expect("not null"));
                            last = last || kind == "end";
                            if kind != "end" && random.chance(15) {
                                session.exec(&format!("select nightowls.nack('jobs', {msg}, '{receipt}')"));
                            } else {
                                session.exec(&format!("insert into public.effects (id, version) values ('{id}', {version})"));
                                session.exec(&format!("select nightowls.ack('jobs', {msg}, '{receipt}')"));
                            }
                        }
                        session.exec(if !last && random.chance(10) { "rollback" } else { "commit" });
                        if last {
                            return;
                        }
                    }
                });
            }
            together(
                WRITERS,
                |_| db.service(),
                |writer, mut session| {
                    let mut random = Random::new(writer as u64 + 31);
                    for _ in 0..EVENTS {
                        let id = random.below(5);
                        session.exec(&format!(
                            "begin; select nightowls.append_event('order', 'o{id}', 'said'); {}{}",
                            if random.chance(20) {
                                "select pg_sleep(0.005); "
                            } else {
                                ""
                            },
                            if random.chance(15) {
                                "rollback"
                            } else {
                                "commit"
                            }
                        ));
                    }
                },
            );
            let mut watcher = db.superuser();
            wait_until("everything is worked off", Duration::from_secs(60), || {
                watcher.value("select count(*) from nightowls.queue_messages where state <> 's'")
                    == Some("0".to_owned())
            });
            for n in 0..WORKERS * 2 {
                service.exec(&format!(
                    "select nightowls.append_event('order', 'end{n}', 'end')"
                ));
            }
        });
        assert_eq!(
            lines(
                &mut service,
                "select e.aggregate_id from nightowls.events e where e.event_type = 'said' and not exists (
                   select from public.effects f where f.id = e.aggregate_id and f.version = e.version)"
            ),
            NOTHING
        );
        assert_eq!(
            lines(
                &mut service,
                "select id, version from (select f.*, row_number() over (partition by id order by at) as nth from public.effects f) n
                  where id like 'o%' and version <> nth"
            ),
            NOTHING
        );
    });
}

#[test]
fn a_worker_that_has_acked_keeps_nobody_from_appending_and_may_append_itself() {
    on_each_install(|db| {
        let mut service = jobs(db);
        service.exec("select nightowls.bind('jobs')");
        let append = "select nightowls.append_event('order', 'a', 'said')";
        service.exec(append);
        let mut other = db.service();
        other.exec("set statement_timeout = '5 s'");
        let mut worker = db.service();
        worker.exec("set statement_timeout = '20 s'; begin");
        let claim = read(&mut worker, "jobs", 60, 1).remove(0);
        assert!(settle(&mut worker, "ack", "jobs", &claim, ""));
        other.exec(append);
        // One stays open: the worker waits for its version, and it for nobody.
        other.exec(&format!("begin; {append}"));
        let pid = worker.pid();
        thread::scope(|scope| {
            let appended = scope.spawn(|| worker.exec(&format!("{append}; commit")));
            wait_until("the worker waits", Duration::from_secs(20), || {
                is_blocked(&mut service, pid)
            });
            other.exec(&format!("{append}; commit"));
            appended.join().expect("it is appended");
        });
        for version in 2..=5 {
            let rows = lines(
                &mut service,
                "select r.message ->> 'version', nightowls.ack('jobs', r.msg_id, r.receipt)
                   from nightowls.read_with_poll('jobs', 60, 9, '10 seconds') r",
            );
            assert_eq!(rows, [format!("{version} t")]);
        }
        // And the other way round: the append first, then the ack of another worker's message.
        service.exec(append);
        other.exec(&format!("begin; {append}"));
        let claim = read(&mut worker, "jobs", 60, 1).remove(0);
        assert!(settle(&mut worker, "ack", "jobs", &claim, ""));
        other.exec("commit");
        assert_eq!(
            text(
                &mut service,
                "select message ->> 'version' from nightowls.read_with_poll('jobs', 60, 9, '10 seconds')"
            ),
            "7"
        );
    });
}

#[test]
fn a_binding_sends_what_is_appended_after_it_and_until_it_is_taken_off() {
    on_each_install(|db| {
        let mut service = jobs(db);
        service.exec("select nightowls.append_event('order', 'a', 'before')");
        // An older snapshot does not know of it: it says so rather than send nothing.
        let mut older = db.service();
        older.exec("begin isolation level repeatable read; select count(*) from nightowls.events");
        let mut open = db.service();
        open.exec("begin; select nightowls.append_event('order', 'b', 'open')");
        service.exec("set statement_timeout = '5 s'; select nightowls.bind('jobs', '{\"event_types\": [\"x\", \"after\", \"open\"]}')");
        assert_eq!(
            older
                .refused("select nightowls.append_event('order', 'c', 'after')")
                .code,
            "40001"
        );
        older.exec("rollback");
        open.exec("select nightowls.append_event('order', 'b', 'open'); commit");
        service.exec("select nightowls.append_event('order', 'a', 'after'), nightowls.append_event('order', 'a', 'other')");
        assert_eq!(
            routed(&mut service, "jobs"),
            ["order b 2 open", "order a 2 after"]
        );
        // Again, in another order: the same. The list says what there is.
        service.exec("select nightowls.bind('jobs', '{\"event_types\": [\"after\", \"open\", \"x\", \"x\"]}')");
        assert_eq!(
            lines(
                &mut service,
                "select queue_name, filter, topic, group_by from nightowls.list_bindings()"
            ),
            ["jobs {\"event_types\": [\"after\", \"open\", \"x\"]} null aggregate"]
        );
        assert_eq!(
            service
                .refused("select nightowls.bind('jobs', '{\"event_types\": [\"x\", \"after\", \"open\"]}', 'none')")
                .code,
            "42710"
        );
        service.exec("select nightowls.bind('jobs')");
        assert_eq!(
            text(
                &mut service,
                "select nightowls.unbind('jobs', '{\"event_types\": [\"none such\"]}')"
            ),
            "0"
        );
        assert_eq!(
            text(&mut service, "select nightowls.unbind('jobs', '{}')"),
            "1"
        );
        service.exec("select nightowls.append_event('order', 'a', 'other')");
        assert_eq!(routed(&mut service, "jobs").len(), 2);
        service.exec("select nightowls.bind('jobs')");
        assert_eq!(text(&mut service, "select nightowls.unbind('jobs')"), "2");
        assert_eq!(text(&mut service, "select nightowls.unbind('jobs')"), "0");
        service.exec("select nightowls.append_event('order', 'a', 'after')");
        assert_eq!(routed(&mut service, "jobs").len(), 2);
        assert_eq!(
            text(
                &mut service,
                "select count(*) from nightowls.routes where kind = 'queue'"
            ),
            "0"
        );
    });
}

#[test]
fn a_dropped_queue_is_bound_to_nothing_and_appends_go_on() {
    on_each_install(|db| {
        let mut service = jobs(db);
        service.exec("select nightowls.bind('jobs'), nightowls.bind_topic('#', 'jobs')");
        // An append that is open while the queue goes: neither fails.
        let mut open = db.service();
        open.exec("begin; select nightowls.append_event('order', 'a', 'placed')");
        let mut dropper = db.service();
        let pid = dropper.pid();
        thread::scope(|scope| {
            let dropped = scope.spawn(move || dropper.exec("select nightowls.drop_queue('jobs')"));
            // It waits for who sends to a group.
            wait_until("the drop waits", Duration::from_secs(20), || {
                is_blocked(&mut service, pid)
            });
            open.exec("select nightowls.append_event('order', 'a', 'paid'); commit");
            dropped.join().expect("it is dropped");
        });
        service.exec("select nightowls.append_event('order', 'a', 'sent')");
        for table in ["queue_bindings", "topic_bindings", "queues", "routes"] {
            assert_eq!(
                text(
                    &mut service,
                    &format!("select count(*) from nightowls.{table}")
                ),
                "0",
                "{table}"
            );
        }
        service.exec("select nightowls.create_queue('jobs'); select nightowls.append_event('order', 'a', 'sent')");
        assert_eq!(routed(&mut service, "jobs"), NOTHING);
    });
}

#[test]
fn a_queue_gets_the_events_of_its_own_org() {
    on_each_install(|db| {
        let mut service = jobs(db);
        let other = new_org(db, "other");
        service.exec(&format!(
            "select nightowls.create_queue('jobs', org => '{other}'); select nightowls.bind('jobs')"
        ));
        service.exec(&format!(
            "select nightowls.append_event('order', 'theirs', 'placed', org => '{other}'), nightowls.append_event('order', 'ours', 'placed');
             insert into nightowls.events (org_id, aggregate_type, aggregate_id, event_type) values ('{other}', 'order', 'theirs', 'paid')"
        ));
        assert_eq!(routed(&mut service, "jobs"), ["order ours 1 placed"]);
    });
}

#[test]
fn imported_and_restored_events_are_not_sent() {
    on_each_install(|db| {
        let mut service = jobs(db);
        service.exec("select nightowls.bind('jobs')");
        let mut owner = db.owner();
        owner.exec("create table public.old (id bigint primary key, who text); insert into public.old values (1, 'a'), (2, 'b')");
        owner.exec(
            "select nightowls.import_events('public.old', '{\"aggregate_type\": {\"literal\": \"old\"}, \"aggregate_id\": \"who\", \"event_type\": {\"literal\": \"was\"}}')",
        );
        let imported = text(&mut service, "select count(*) from nightowls.events");
        assert_eq!(
            (imported.as_str(), routed(&mut service, "jobs").len()),
            ("2", 0)
        );
        // As a restoring session does.
        owner.exec(
            "begin; set local row_security = off;
             insert into nightowls.events (org_id, aggregate_type, aggregate_id, version, event_type)
             select org_id, 'order', 'restored', 1, 'placed' from nightowls.orgs; commit",
        );
        assert_eq!(routed(&mut service, "jobs"), NOTHING);
    });
}

#[test]
fn a_dump_brings_queues_bindings_and_messages_back_and_sends_nothing_anew() {
    on_each_install(|db| {
        let mut service = jobs(db);
        service.exec("select nightowls.bind('jobs'), nightowls.bind_topic('a.#', 'jobs')");
        service.exec("select nightowls.append_event('order', 'a', 'placed'), nightowls.append_event('order', 'a', 'paid')");
        let before = routed(&mut service, "jobs");
        let dump = db
            .command("pg_dump", db.install().owner())
            .output()
            .expect("pg_dump runs");
        assert!(
            dump.status.success(),
            "{}",
            String::from_utf8_lossy(&dump.stderr)
        );
        let copy = db.cluster().empty_database(db.install());
        let file = std::env::temp_dir().join(format!(
            "nightowls-{}-{}.sql",
            std::process::id(),
            db.name()
        ));
        std::fs::write(&file, &dump.stdout).expect("the dump is written");
        let restored = copy
            .command("psql", copy.install().owner())
            .args([
                "--no-psqlrc",
                "--quiet",
                "--set",
                "ON_ERROR_STOP=1",
                "--file",
            ])
            .arg(&file)
            .output()
            .expect("psql runs");
        std::fs::remove_file(&file).expect("it was there");
        assert!(
            restored.status.success(),
            "{}",
            String::from_utf8_lossy(&restored.stderr)
        );
        let mut owner = copy.owner();
        assert_eq!(routed(&mut owner, "jobs"), before);
        owner.exec("select nightowls.append_event('order', 'a', 'sent'); select nightowls.send_topic('a.b', '1')");
        assert_eq!(routed(&mut owner, "jobs").len(), before.len() + 2);
    });
}

#[test]
fn what_is_erased_is_gone_from_every_queue_and_archive() {
    on_each_install(|db| {
        let mut service = jobs(db);
        service.exec("select nightowls.create_queue('loose'), nightowls.create_queue('dead'), nightowls.create_queue('failing', max_attempts => 1, dead_letter_queue => 'dead'), nightowls.create_queue('copy')");
        service.exec(
            "select nightowls.bind('jobs'), nightowls.bind('loose', '{\"event_types\": [\"named\"]}', 'none'), nightowls.bind('failing')",
        );
        for (id, secret) in [("ann", "Ann Secretly"), ("bob", "Bob Openly")] {
            for n in 0..3 {
                service.exec(&format!(
                    "select nightowls.append_event('person', '{id}', 'named', '{{\"name\": \"{secret} {n}\"}}', metadata => '{{\"note\": \"{secret}\"}}')"
                ));
            }
        }
        // Archived, replayed, dead with an error that tells, and waiting in its group.
        service
            .exec("select nightowls.archive('loose', msg_id) from nightowls.read('loose', 30, 2)");
        service.exec("select nightowls.replay('loose', into_queue => 'copy')");
        service.exec("select nightowls.nack('failing', msg_id, receipt, 'Ann Secretly has no address') from nightowls.read('failing', 30, 10) where message ->> 'aggregate_id' = 'ann'");
        let leased = read(&mut service, "jobs", 60, 1).remove(0);
        let scan =
            "select table_name, column_name from nightowls.scan_for('Ann Secretly') order by 1, 2";
        assert_eq!(
            lines(&mut db.owner(), scan),
            [
                "events metadata",
                "events payload",
                "queue_archive message",
                "queue_messages last_error",
                "queue_messages message"
            ]
        );
        service.exec("select nightowls.erase('person', 'ann', 'asked')");
        assert_eq!(lines(&mut db.owner(), scan), NOTHING);
        assert_eq!(
            lines(
                &mut db.owner(),
                "select distinct table_name from nightowls.scan_for('Bob Openly') order by 1"
            ),
            ["events", "queue_messages"]
        );
        // They stand where they stood, in their order, and the record follows; so it does where a filter names other types.
        assert!(settle(&mut service, "ack", "jobs", &leased, ""));
        let ann = |session: &mut Session, queue: &str| -> Vec<String> {
            routed(session, queue)
                .into_iter()
                .filter(|row| row.contains("ann"))
                .collect()
        };
        let erased = |versions: &[u32]| -> Vec<String> {
            versions
                .iter()
                .map(|v| format!("person ann {v} nightowls.erased"))
                .collect()
        };
        assert_eq!(ann(&mut service, "jobs"), erased(&[2, 3, 4]));
        assert_eq!(ann(&mut service, "loose"), erased(&[3, 4]));
        assert_eq!(ann(&mut service, "copy"), erased(&[1, 2]));
        let record = text(
            &mut service,
            "select message -> 'payload' ->> 'reason' from nightowls.queue_messages where message ->> 'version' = '4' limit 1",
        );
        assert_eq!(record, "asked");
        // Again: nothing changes, and the record stays.
        service.exec("select nightowls.erase('person', 'ann', 'asked')");
        assert_eq!(ann(&mut service, "jobs"), erased(&[2, 3, 4]));
    });
}

#[test]
fn an_erasure_finds_what_is_moved_while_it_looks() {
    on_each_install(|db| {
        let mut service = jobs(db);
        service.exec("select nightowls.bind('jobs', group_by => 'none')");
        service.exec("select nightowls.append_event('person', 'ann', 'named', '{\"name\": \"Ann Secretly\"}') from generate_series(1, 3)");
        let mut open = db.service();
        open.exec(
            "begin; select nightowls.archive('jobs', msg_id) from nightowls.read('jobs', 60, 1);
             select nightowls.append_event('person', 'ann', 'named', '{\"name\": \"Ann Secretly\"}')",
        );
        let mut eraser = db.service();
        let pid = eraser.pid();
        thread::scope(|scope| {
            let erased = scope.spawn(move || {
                text(
                    &mut eraser,
                    "select nightowls.erase('person', 'ann', 'asked')",
                )
            });
            wait_until("the erasure waits", Duration::from_secs(20), || {
                is_blocked(&mut service, pid)
            });
            open.exec("commit");
            assert_eq!(erased.join().expect("it is erased"), "4");
        });
        // A replay that began before it is waited for; one that comes later finds nothing.
        service.exec("select nightowls.replay('jobs')");
        assert_eq!(
            lines(
                &mut db.owner(),
                "select table_name from nightowls.scan_for('Ann Secretly')"
            ),
            NOTHING
        );

        service.exec("select nightowls.append_event('person', 'joe', 'named', '{\"name\": \"Joe Secretly\"}')");
        service.exec("select nightowls.archive('jobs', msg_id) from nightowls.queue_messages where message ->> 'aggregate_id' = 'joe'");
        open.exec("begin; select nightowls.replay('jobs')");
        let mut eraser = db.service();
        let pid = eraser.pid();
        thread::scope(|scope| {
            let erased = scope
                .spawn(move || eraser.exec("select nightowls.erase('person', 'joe', 'asked')"));
            wait_until("the erasure waits", Duration::from_secs(20), || {
                is_blocked(&mut service, pid)
            });
            open.exec("commit");
            erased.join().expect("it is erased");
        });
        assert_eq!(
            lines(
                &mut db.owner(),
                "select table_name from nightowls.scan_for('Joe Secretly')"
            ),
            NOTHING
        );
    });
}

#[test]
fn long_ids_deep_and_large_events_and_many_groups_are_sent_too() {
    on_each_install(|db| {
        let mut service = jobs(db);
        service.exec("select nightowls.bind('jobs')");
        let deep = format!("{}1{}", "[".repeat(100), "]".repeat(100));
        service.exec(&format!(
            "select nightowls.append_event('order', repeat('é', 500), 'long'), nightowls.append_event('order', repeat('é', 500), 'long'),
                    nightowls.append_event('order', 'deep', 'deep', '{deep}'),
                    nightowls.append_event('order', 'large', 'large', to_jsonb(repeat('x', 16000000)))"
        ));
        service.exec("begin");
        service.exec(
            "select nightowls.append_many((select jsonb_agg(jsonb_build_object('aggregate_type', 'many', 'aggregate_id', 'm' || i,
                      'events', '[{\"event_type\": \"a\"}, {\"event_type\": \"b\"}]'::jsonb)) from generate_series(1, 100) i))",
        );
        let locks = text(
            &mut service,
            "select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()",
        );
        assert!(locks.parse::<u32>().expect("a number") <= 64, "{locks}");
        service.exec("commit");
        assert_eq!(
            text(
                &mut service,
                "select count(*) from nightowls.queue_messages"
            ),
            "204"
        );
        // One of each group.
        assert_eq!(read(&mut service, "jobs", 30, 1000).len(), 103);
    });
}

#[test]
fn what_cannot_be_bound_is_refused_and_nothing_is_written() {
    on_each_install(|db| {
        let mut service = jobs(db);
        for (call, code) in [
            ("bind(null)", "22004"),
            ("bind('jobz')", "NW007"),
            ("bind('jobs', '[]')", "22023"),
            ("bind('jobs', '{\"types\": []}')", "22023"),
            ("bind('jobs', '{\"event_types\": []}')", "22023"),
            ("bind('jobs', '{\"event_types\": [\"\"]}')", "22023"),
            ("bind('jobs', '{\"event_types\": [1]}')", "22023"),
            (
                "bind('jobs', jsonb_build_object('event_types', jsonb_build_array(repeat('x', 256))))",
                "54000",
            ),
            (
                "bind('jobs', jsonb_build_object('event_types', (select jsonb_agg(i::text) from generate_series(1, 101) i)))",
                "54000",
            ),
            ("bind('jobs', group_by => null)", "22004"),
            ("bind('jobs', group_by => 'type')", "22023"),
            ("unbind('jobz')", "NW007"),
            ("unbind('jobs', '[]')", "22023"),
            ("list_bindings('jobz')", "NW007"),
            ("bind_topic(null, 'jobs')", "22004"),
            ("bind_topic('', 'jobs')", "22023"),
            ("bind_topic('a..b', 'jobs')", "22023"),
            ("bind_topic('a*', 'jobs')", "22023"),
            ("bind_topic('a.#b', 'jobs')", "22023"),
            ("bind_topic('a.b.', 'jobs')", "22023"),
            ("bind_topic(E'a\\nb', 'jobs')", "22023"),
            ("bind_topic('a|b', 'jobs')", "22023"),
            ("bind_topic(repeat('x', 256), 'jobs')", "54000"),
            ("bind_topic('a', 'jobz')", "NW007"),
            ("bind_topic('a', null)", "22004"),
            ("unbind_topic('a b', 'jobs')", "22023"),
            ("unbind_topic('a', 'jobz')", "NW007"),
            ("send_topic(null, '1')", "22004"),
            ("send_topic('a.*', '1')", "22023"),
            ("send_topic('a.#', '1')", "22023"),
            ("send_topic('', '1')", "22023"),
            ("send_topic('a', null)", "22004"),
            ("send_topic('a', '1', -1)", "22023"),
            ("send_topic('a', '1', priority => 10)", "22023"),
            ("send_topic(repeat('x', 256), '1')", "54000"),
        ] {
            let refused = service.refused(&format!("select nightowls.{call}"));
            assert_eq!(refused.code, code, "{call}: {refused}");
        }
        for table in [
            "queue_bindings",
            "topic_bindings",
            "routes",
            "queue_messages",
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
    });
}

#[test]
fn a_topic_goes_to_every_queue_whose_pattern_it_matches_once() {
    on_each_install(|db| {
        let mut service = jobs(db);
        service.exec("select nightowls.create_queue('second'), nightowls.create_queue('third')");
        for (pattern, yes, no) in [
            (
                "order.paid",
                &["order.paid"][..],
                &["order", "order.paid.eu", "orderxpaid", "Order.paid"][..],
            ),
            ("*", &["a", "a-b_c"], &["a.b"]),
            ("#", &["a", "a.b", "a.b.c"], &[]),
            ("order.*", &["order.paid"], &["order", "order.paid.eu"]),
            ("*.paid", &["order.paid"], &["paid", "a.order.paid"]),
            (
                "order.#",
                &["order", "order.paid", "order.paid.eu"],
                &["orders", "orders.paid"],
            ),
            (
                "#.eu",
                &["eu", "order.eu", "order.paid.eu"],
                &["order.paid", "order.xeu"],
            ),
            (
                "order.#.eu",
                &["order.eu", "order.paid.eu", "order.a.b.eu"],
                &["order", "eu", "order.eu.x"],
            ),
            ("*.*.#", &["a.b", "a.b.c"], &["a"]),
            ("#.#", &["a", "a.b"], &[]),
        ] {
            service.exec(&format!("select nightowls.bind_topic('{pattern}', 'jobs'), nightowls.bind_topic('{pattern}', 'jobs')"));
            for topic in yes {
                let sent = lines(
                    &mut service,
                    &format!("select queue from nightowls.send_topic('{topic}', '1')"),
                );
                assert_eq!(sent, ["jobs"], "{pattern} {topic}");
            }
            for topic in no {
                let sent = lines(
                    &mut service,
                    &format!("select queue from nightowls.send_topic('{topic}', '1')"),
                );
                assert_eq!(sent, NOTHING, "{pattern} {topic}");
            }
            assert_eq!(
                text(
                    &mut service,
                    &format!("select nightowls.unbind_topic('{pattern}', 'Jobs')")
                ),
                "t"
            );
            assert_eq!(
                text(
                    &mut service,
                    &format!("select nightowls.unbind_topic('{pattern}', 'jobs')")
                ),
                "f"
            );
        }
        service.exec(
            "select nightowls.purge_queue('jobs'), nightowls.bind_topic('a.*', 'jobs'), nightowls.bind_topic('#', 'jobs'),
                    nightowls.bind_topic('a.b', 'second'), nightowls.bind_topic('b', 'third')",
        );
        let sent = "select queue, msg_id from nightowls.send_topic('a.b', '{\"n\": 1}', headers => '{\"h\": 1}', dedup_key => 'k', group_key => 'g', priority => 3)";
        let first = lines(&mut service, sent);
        assert_eq!(first.len(), 2);
        // The key counts in each of them.
        assert_eq!(lines(&mut service, sent), first);
        assert_eq!(bodies(&mut service, "jobs", 9), ["{\"n\": 1}"]);
        assert_eq!(bodies(&mut service, "second", 9), ["{\"n\": 1}"]);
        assert_eq!(bodies(&mut service, "third", 9), NOTHING);
        assert_eq!(
            lines(
                &mut service,
                "select queue_name, topic from nightowls.list_bindings('jobs') order by topic"
            ),
            ["jobs #", "jobs a.*"]
        );
    });
}

#[test]
fn the_examples_of_the_page_do_what_it_says() {
    assert_examples(include_str!("../docs/routing.md"), 3);
}
