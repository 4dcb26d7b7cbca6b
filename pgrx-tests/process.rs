//! Process: what a handler does and the ack commit together, or neither does.

use std::thread;
use std::time::Duration;

use crate::fixture::{Random, lines};
use crate::projections::text;
use crate::queue::jobs;
use crate::support::{Db, SERVICE, Session, on_each_install, on_each_route, quote, wait_until};

/// A table of effects, and handlers that write to it.
#[track_caller]
fn handlers(db: &Db) -> Session {
    let service = jobs(db);
    db.superuser().exec(&format!(
        "create table public.effects (msg_id bigint, message jsonb, who text default current_user);
         grant insert, select on public.effects to {SERVICE};
         create function public.work(message nightowls.queue_message) returns void language plpgsql as $$
         begin
           insert into public.effects values (message.msg_id, message.message);
           if message.message = '\"poison\"' then raise exception 'it is poison' using errcode = 'NW042'; end if;
           if message.message = '\"gone\"' then perform nightowls.delete('jobs', message.msg_id); end if;
           if message.message = '\"later\"' then perform nightowls.nack('jobs', message.msg_id, message.receipt, 'not now', 600); end if;
           if message.message = '\"again\"' then raise exception 'lost' using errcode = '40P01'; end if;
           if message.message = '\"slow\"' then perform pg_sleep(30); end if;
         end $$;
         grant execute on function public.work to {SERVICE}"
    ));
    service
}

#[test]
fn each_message_is_handled_and_acked_in_one_transaction_on_every_route() {
    on_each_route(|db| {
        let mut service = handlers(db);
        service.exec("select nightowls.send_batch('jobs', '{1,2,3}'::jsonb[])");
        service.exec("begin");
        let rows = lines(
            &mut service,
            "select read_ct, done, error from nightowls.process('Jobs', 'public.work', 2)",
        );
        assert_eq!(rows, ["1 t null", "1 t null"]);
        service.exec("rollback");
        assert_eq!(
            text(&mut service, "select count(*) from public.effects"),
            "0"
        );
        assert_eq!(
            text(
                &mut service,
                "select count(*) from nightowls.process('jobs', 'public.work', 10) where done"
            ),
            "3"
        );
        assert_eq!(
            lines(
                &mut service,
                "select message, who from public.effects order by msg_id"
            ),
            ["1", "2", "3"].map(|n| format!("{n} {SERVICE}"))
        );
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
                "select count(*) from nightowls.process('jobs', 'public.work', 10)"
            ),
            "0"
        );
    });
}

#[test]
fn a_failing_message_is_undone_nacked_and_in_the_end_dead_and_the_rest_goes_on() {
    on_each_install(|db| {
        let mut service = handlers(db);
        service.exec(
            "select nightowls.create_queue('dead'), nightowls.alter_queue('jobs', max_attempts => 3, dead_letter_queue => 'dead', backoff => '0', max_backoff => '0');
             select nightowls.send_batch('jobs', '{1,\"\\\"poison\\\"\",2}'::jsonb[]);
             select nightowls.send('jobs', '\"poison\"', group_key => 'g'), nightowls.send('jobs', '3', group_key => 'g')",
        );
        let rows = lines(
            &mut service,
            "select done, error from nightowls.process('jobs', 'public.work', 100)",
        );
        assert_eq!(
            rows.iter().filter(|row| *row == "t null").count(),
            3,
            "{rows:?}"
        );
        assert_eq!(
            rows.iter()
                .filter(|row| *row == "f NW042 it is poison")
                .count(),
            6,
            "{rows:?}"
        );
        assert_eq!(
            lines(
                &mut service,
                "select message from public.effects order by message"
            ),
            ["1", "2", "3"]
        );
        assert_eq!(
            lines(
                &mut service,
                "select message, last_error, read_ct from nightowls.queue_messages"
            ),
            ["\"poison\" NW042 it is poison 0"; 2]
        );
        assert_eq!(
            text(
                &mut service,
                "select count(*) from nightowls.read('dead', 30, 9)"
            ),
            "2"
        );
    });
}

#[test]
fn a_handler_may_settle_its_message_itself() {
    on_each_install(|db| {
        let mut service = handlers(db);
        service.exec("select nightowls.send('jobs', '\"gone\"'), nightowls.send('jobs', '\"later\"'), nightowls.send('jobs', '1')");
        assert_eq!(
            lines(
                &mut service,
                "select done, error from nightowls.process('jobs', 'public.work', 9)"
            ),
            ["t null"; 3]
        );
        assert_eq!(
            lines(
                &mut service,
                "select message, last_error, state from nightowls.queue_messages"
            ),
            ["\"later\" not now d"]
        );
    });
}

#[test]
fn what_is_to_be_tried_again_or_was_cancelled_ends_the_call_and_nothing_has_happened() {
    on_each_install(|db| {
        let mut service = handlers(db);
        service.exec("select nightowls.send('jobs', '1'), nightowls.send('jobs', '\"again\"')");
        assert_eq!(
            service
                .refused("select nightowls.process('jobs', 'public.work', 9)")
                .code,
            "40P01"
        );
        assert_eq!(
            text(
                &mut service,
                "select sum(read_ct) from nightowls.queue_messages"
            ),
            "0"
        );
        service.exec(
            "select nightowls.purge_queue('jobs'); select nightowls.send('jobs', '\"slow\"')",
        );
        service.exec("set statement_timeout = '200 ms'");
        assert_eq!(
            service
                .refused("select nightowls.process('jobs', 'public.work')")
                .code,
            "57014"
        );
        service.exec("reset statement_timeout");
        assert_eq!(
            text(
                &mut service,
                "select sum(read_ct) from nightowls.queue_messages"
            ),
            "0"
        );
        assert_eq!(
            text(&mut service, "select count(*) from public.effects"),
            "0"
        );
    });
}

#[test]
fn a_message_that_takes_longer_than_any_lease_is_nobody_elses() {
    on_each_install(|db| {
        let mut service = handlers(db);
        service.exec(
            "select nightowls.alter_queue('jobs', vt => 0); select nightowls.send('jobs', '1')",
        );
        service.exec("begin; select nightowls.process('jobs', 'public.work')");
        let mut other = db.service();
        assert_eq!(
            text(
                &mut other,
                "select count(*) from nightowls.read('jobs', 30, 9)"
            ),
            "0"
        );
        assert_eq!(
            text(
                &mut other,
                "select count(*) from nightowls.process('jobs', 'public.work', 9)"
            ),
            "0"
        );
        service.exec("commit");
        assert_eq!(text(&mut other, "select count(*) from public.effects"), "1");
    });
}

#[test]
fn the_handler_is_looked_up_at_each_call_and_runs_as_the_caller() {
    on_each_install(|db| {
        let mut service = handlers(db);
        service.exec("select nightowls.send_batch('jobs', '{1,2}'::jsonb[])");
        for handler in [
            "public.none",
            "work",
            "public.work(nightowls.queue_message)",
            "public.work; drop table public.effects",
            "pg_catalog.pg_sleep",
            "",
        ] {
            let call = format!("select nightowls.process('jobs', {})", quote(handler));
            assert_eq!(service.refused(&call).code, "42883", "{handler}");
        }
        for (call, code) in [
            ("process('jobs', null)", "42883"),
            ("process('jobz', 'public.work')", "NW007"),
            ("process(null, 'public.work')", "22004"),
            ("process('jobs', 'public.work', null)", "22004"),
            ("process('jobs', 'public.work', -1)", "22023"),
            ("process('jobs', 'public.work', 1001)", "22023"),
        ] {
            assert_eq!(
                service.refused(&format!("select nightowls.{call}")).code,
                code,
                "{call}"
            );
        }
        // One made anew is the one that runs; without the right to it nothing does.
        service.exec("select nightowls.process('jobs', 'public.work')");
        db.superuser().exec(
            "create function public.other(message nightowls.queue_message) returns void language sql as 'select 1 / 0';
             revoke all on function public.other from public",
        );
        assert_eq!(
            lines(
                &mut service,
                "select done, left(error, 5) from nightowls.process('jobs', 'public.other')"
            ),
            ["f 42501"]
        );
    });
}

#[test]
fn whatever_crashes_each_effect_is_there_once() {
    const WORKERS: usize = 4;
    const MESSAGES: usize = 400;
    on_each_install(|db| {
        let mut service = handlers(db);
        service.exec("select nightowls.alter_queue('jobs', backoff => '0', max_backoff => '0')");
        db.superuser().exec(
            "create function public.flaky(message nightowls.queue_message) returns void language plpgsql as $$
             begin
               insert into public.effects values (message.msg_id, message.message);
               if random() < 0.1 then raise exception 'no luck'; end if;
               perform pg_sleep(random() * 0.004);
             end $$;
             grant execute on function public.flaky to public",
        );
        service.exec(&format!(
            "select nightowls.send('jobs', to_jsonb(g), group_key => case when g % 3 = 0 then 'g' || g % 9 end) from generate_series(1, {MESSAGES}) g"
        ));
        thread::scope(|scope| {
            for worker in 0..WORKERS {
                scope.spawn(move || {
                    let mut random = Random::new(worker as u64 + 41);
                    let mut session = db.service();
                    loop {
                        let qty = 1 + random.below(8);
                        let done = session.try_exec(&format!(
                            "begin; select nightowls.process('jobs', 'public.flaky', {qty}); {}",
                            if random.chance(15) {
                                "rollback"
                            } else {
                                "commit"
                            }
                        ));
                        if done.is_err() {
                            // Killed: a new worker takes over.
                            session = db.service();
                        }
                        let left = session.try_value(
                            "select count(*) from nightowls.queue_messages where state <> 's'",
                        );
                        if left == Ok(Some("0".to_owned())) {
                            return;
                        }
                    }
                });
            }
            let mut killer = db.superuser();
            let mut random = Random::new(7);
            wait_until("all is done", Duration::from_secs(120), || {
                if random.chance(30) {
                    killer.exec(
                        "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and query like '%public.flaky%'
                            and pid <> pg_backend_pid() order by random() limit 1",
                    );
                }
                killer.value("select count(*) from nightowls.queue_messages where state <> 's'")
                    == Some("0".to_owned())
            });
        });
        assert_eq!(
            lines(
                &mut service,
                "select count(*), count(distinct message), count(distinct msg_id) from public.effects"
            ),
            [format!("{MESSAGES} {MESSAGES} {MESSAGES}")]
        );
    });
}
