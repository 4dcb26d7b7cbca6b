//! The lock table is the whole server's: what appends take of it, and that
//! they never wait for one another in a circle.

use std::time::{Duration, Instant};

use crate::fixture::{default_org, is_blocked, lines, together};
use crate::support::{
    Db, Install, Refusal, SERVICE, Session, on_each_install, own_cluster_with, wait_until,
};

/// What a server has that nobody has tuned.
const DEFAULTS: &[(&str, &str)] = &[
    ("max_connections", "100"),
    ("max_locks_per_transaction", "64"),
    ("max_prepared_transactions", "0"),
];

/// The advisory locks that the session's transaction holds.
#[track_caller]
fn advisory_locks(session: &mut Session) -> usize {
    session
        .value(
            "select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()",
        )
        .and_then(|count| count.parse().ok())
        .expect("a count is a number")
}

#[track_caller]
fn count(db: &Db) -> String {
    db.superuser()
        .value("select count(*) from nightowls.events")
        .expect("a count is never null")
}

#[test]
fn append_many_over_50_000_aggregates_works_at_default_settings() {
    own_cluster_with(DEFAULTS, |cluster| {
        for install in Install::ALL {
            let db = cluster.database(install);
            default_org(&db);
            let mut service = db.service();
            let start = Instant::now();
            service.exec("begin");
            let returned = service.value(
                "select count(*) from nightowls.append_many(( \
                   select jsonb_agg(jsonb_build_object('aggregate_type', 'file', 'aggregate_id', 'src/' || g || '.rs', \
                     'events', jsonb_build_array(jsonb_build_object('event_type', 'file_added', 'payload', jsonb_build_object('n', g))))) \
                   from generate_series(1, 50000) g))",
            );
            assert_eq!(returned.as_deref(), Some("50000"));
            assert!(advisory_locks(&mut service) <= 64);
            service.exec("commit");
            eprintln!("{install}: 50,000 aggregates in {:?}", start.elapsed());
            assert_eq!(count(&db), "50000");
        }
    });
}

#[test]
fn twenty_thousand_appends_in_one_transaction_work_at_default_settings() {
    own_cluster_with(DEFAULTS, |cluster| {
        for install in Install::ALL {
            let db = cluster.database(install);
            default_org(&db);
            let mut service = db.service();
            let start = Instant::now();
            service.exec(
                "begin; do $$ begin \
                   for i in 1 .. 14000 loop \
                     perform nightowls.append_event('file', i::text, 'file_added'); \
                   end loop; \
                   for i in 14001 .. 17000 loop \
                     perform nightowls.append_events('file', i::text, '[{\"event_type\": \"file_added\"}]'); \
                   end loop; \
                   for i in 17001 .. 20000 loop \
                     insert into nightowls.events (aggregate_type, aggregate_id, event_type) values ('file', i::text, 'file_added'); \
                   end loop; \
                 end $$",
            );
            assert!(advisory_locks(&mut service) <= 64);
            service.exec("commit");
            eprintln!("{install}: 20,000 appends in {:?}", start.elapsed());
            assert_eq!(count(&db), "20000");
        }
    });
}

#[test]
fn a_thousand_plain_inserts_to_a_thousand_aggregates_take_at_most_64_advisory_locks() {
    on_each_install(|db| {
        default_org(db);
        let mut service = db.service();
        for (number, sql) in [
            "do $$ begin for i in 1 .. 1000 loop \
               insert into nightowls.events (aggregate_type, aggregate_id, event_type) values ('cart', i::text, 'made'); \
             end loop; end $$",
            "insert into nightowls.events (aggregate_type, aggregate_id, event_type) \
             select 'cart', g::text, 'made' from generate_series(1, 1000) g",
            // Savepoints give locks back, and the count of them too.
            "do $$ begin for i in 1 .. 1000 loop \
               begin \
                 insert into nightowls.events (aggregate_type, aggregate_id, event_type) values ('cart', i::text, 'made'); \
                 if i % 2 = 0 then raise exception 'no'; end if; \
               exception when raise_exception then null; \
               end; \
             end loop; end $$",
        ]
        .into_iter()
        .enumerate()
        {
            service.exec("begin");
            service.exec(sql);
            let locks = advisory_locks(&mut service);
            service.exec("rollback");
            assert!(locks <= 64, "{number}: {locks}");
        }
    });
}

#[test]
fn appends_to_three_hundred_orgs_in_one_transaction_take_at_most_64_advisory_locks() {
    on_each_install(|db| {
        let mut service = db.service();
        service.exec("select nightowls.create_org('org ' || g) from generate_series(1, 300) g");
        service.exec("begin");
        service.exec(
            "select nightowls.append_event('cart', 'a', 'made', org => o.org_id) from nightowls.orgs o",
        );
        let locks = advisory_locks(&mut service);
        assert!(locks <= 64, "{locks}");
        // And readers wait for all of them, in whichever way they are held.
        let mut other = db.service();
        other.exec("select nightowls.append_event('cart', 'b', 'made', org => o.org_id) from nightowls.orgs o");
        let seen =
            "select count(*) from nightowls.orgs o, lateral nightowls.read_events(org => o.org_id)";
        assert_eq!(other.value(seen).as_deref(), Some("0"));
        service.exec("commit");
        assert_eq!(other.value(seen).as_deref(), Some("600"));
    });
}

#[test]
fn an_append_takes_one_advisory_lock_and_all_after_it_another_whatever_they_append() {
    on_each_install(|db| {
        default_org(db);
        let mut service = db.service();
        service.exec("begin");
        service.exec("select nightowls.append_event('cart', 'first', 'made')");
        assert_eq!(advisory_locks(&mut service), 1);
        service.exec(
            "select nightowls.append_event('cart', g::text, 'made') from generate_series(1, 100) g; \
             select nightowls.append_many((select jsonb_agg(jsonb_build_object('aggregate_type', 'order', \
               'aggregate_id', g::text, 'events', '[{\"event_type\": \"made\"}]'::jsonb)) from generate_series(1, 100) g))",
        );
        assert_eq!(advisory_locks(&mut service), 2);
        service.exec("commit");
        // And none outlives its transaction, nor does a read take any.
        service.exec("begin; select nightowls.read_events()");
        assert_eq!(advisory_locks(&mut service), 0);
        service.exec("rollback");
    });
}

#[test]
fn a_plain_insert_of_more_aggregates_than_locks_loses_with_23505_at_worst() {
    on_each_install(|db| {
        default_org(db);
        let mut watcher = db.superuser();
        // The last of a hundred aggregates is one that has no lock of its own any more.
        let many = "insert into nightowls.events (aggregate_type, aggregate_id, event_type) \
                    select 'cart', g::text, 'made' from generate_series(1, 100) g";
        let one = "insert into nightowls.events (aggregate_type, aggregate_id, event_type) values ('cart', '100', 'made')";
        let mut written = 0;
        for (first, second, must_succeed) in
            [(many, one, false), (one, many, false), (many, many, true)]
        {
            let mut open = db.service();
            let mut waiting = db.service();
            let pid = waiting.pid();
            open.exec("begin");
            open.exec(first);
            let result = std::thread::scope(|scope| {
                let thread = scope.spawn(|| waiting.try_exec(second));
                wait_until("the second insert waits", Duration::from_secs(10), || {
                    is_blocked(&mut watcher, pid)
                });
                open.exec("commit");
                thread.join().expect("the thread ends")
            });
            written += 1 + usize::from(result.is_ok());
            if let Err(refusal) = result {
                assert!(!must_succeed && refusal.code == "23505", "{refusal}");
                // Nobody in the way any more: a retry goes through.
                waiting.exec(second);
                written += 1;
            }
        }
        let versions = lines(
            &mut db.service(),
            "select version from nightowls.read_aggregate('cart', '100')",
        );
        let expected: Vec<String> = (1..=written).map(|version| version.to_string()).collect();
        assert_eq!(versions, expected);
    });
}

#[test]
fn plain_inserts_of_many_aggregates_at_once_do_not_deadlock() {
    on_each_install(|db| {
        default_org(db);
        let results: Vec<Refusal> = together(
            4,
            |_| db.service(),
            |number, mut session| {
                (0..10)
                    .filter_map(|round| {
                        session
                            .try_exec(&format!(
                                "insert into nightowls.events (aggregate_type, aggregate_id, event_type) \
                                 select 'cart', '{number}-{round}-' || g, 'made' from generate_series(1, 200) g"
                            ))
                            .err()
                    })
                    .collect::<Vec<_>>()
            },
        )
        .concat();
        assert!(results.is_empty(), "{}: {}", results.len(), results[0]);
        assert_eq!(count(db), "8000");
    });
}

#[test]
fn a_thousand_rounds_of_reversed_append_many_never_deadlock() {
    on_each_install(|db| {
        default_org(db);
        const ROUNDS: usize = 1000;
        let part = |aggregate: &str| {
            format!(
                r#"{{"aggregate_type": "cart", "aggregate_id": "{aggregate}", "events": [{{"event_type": "made"}}]}}"#
            )
        };
        let names = ["a", "b", "c"];
        let forward = names.map(part).join(", ");
        let mut reversed = names;
        reversed.reverse();
        let backward = reversed.map(part).join(", ");
        let results: Vec<Vec<Refusal>> = together(
            2,
            |_| db.service(),
            |number, mut session| {
                let order = if number == 0 { &forward } else { &backward };
                let sql = format!("select nightowls.append_many('[{order}]')");
                (0..ROUNDS)
                    .filter_map(|_| session.try_exec(&sql).err())
                    .collect()
            },
        );
        for refusals in results {
            assert!(refusals.is_empty(), "{}: {}", refusals.len(), refusals[0]);
        }
        assert_eq!(count(db), (2 * ROUNDS * names.len()).to_string());
    });
}

#[test]
fn of_two_calls_with_the_same_ids_in_reversed_order_one_is_refused_and_the_other_is_whole() {
    on_each_install(|db| {
        default_org(db);
        for round in 0..20 {
            let part = |aggregate: &str, number: u32| {
                format!(
                    r#"{{"aggregate_type": "cart", "aggregate_id": "{aggregate}{round}", "events": [{{"event_type": "made", "event_id": "00000000-0000-4000-8000-{:012}"}}]}}"#,
                    10 * round + number
                )
            };
            let calls = [
                [part("a", 1), part("b", 2)].join(", "),
                [part("c", 2), part("d", 1)].join(", "),
            ];
            let results = together(
                2,
                |_| db.service(),
                |number, mut session| {
                    session.try_exec(&format!(
                        "select nightowls.append_many('[{}]')",
                        calls[number]
                    ))
                },
            );
            let refused: Vec<&Refusal> = results
                .iter()
                .filter_map(|result| result.as_ref().err())
                .collect();
            assert_eq!(refused.len(), 1, "{results:?}");
            assert!(
                ["NW002", "40P01"].contains(&refused[0].code.as_str()),
                "{}",
                refused[0]
            );
        }
        assert_eq!(count(db), "40");
    });
}

#[test]
fn an_append_waits_for_no_append_to_another_aggregate() {
    on_each_install(|db| {
        default_org(db);
        let mut open = db.session(SERVICE);
        open.exec("begin; select nightowls.append_event('cart', 'a', 'made')");
        open.exec("insert into nightowls.events (aggregate_type, aggregate_id, event_type) values ('cart', 'b', 'made')");
        let mut other = db.service();
        // Whoever waits longer than this waits for the other's commit.
        other.exec("set lock_timeout = '5s'");
        for sql in [
            "select nightowls.append_event('cart', 'c', 'made')",
            "insert into nightowls.events (aggregate_type, aggregate_id, event_type) values ('cart', 'd', 'made')",
            r#"select nightowls.append_events('order', 'a', '[{"event_type": "made"}]')"#,
            "select nightowls.read_events()",
            "select nightowls.read_aggregate('cart', 'a')",
        ] {
            other.exec(sql);
        }
        open.exec("rollback");
    });
}
