//! Consumers: each event exactly once, in order, whoever dies on the way.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::fixture::{Random, default_org, is_blocked, lines, new_org, together};
use crate::projections::{buffers, text};
use crate::support::{
    Cluster, Db, Install, Refusal, SERVICE, SUPERUSER, Session, full, on_each_install,
    on_each_route, own_cluster, quote, wait_until,
};

/// Appends `count` events to each aggregate of `ids`, in turns.
#[track_caller]
fn append(session: &mut Session, ids: &[&str], count: u32) {
    for n in 1..=count {
        for id in ids {
            session.exec(&format!(
                "select nightowls.append_event('cart', {}, 'added', '{{\"n\": {n}}}')",
                quote(id)
            ));
        }
    }
}

/// A batch: the fence, and each event's position, aggregate and version.
#[derive(Debug, Default, PartialEq, Eq)]
struct Batch {
    fence: i64,
    events: Vec<(i64, String, i64)>,
}

impl Batch {
    fn last(&self) -> i64 {
        self.events.last().expect("the batch has events").0
    }

    fn ids(&self) -> BTreeSet<&str> {
        self.events.iter().map(|event| event.1.as_str()).collect()
    }

    fn positions(&self) -> Vec<i64> {
        self.events.iter().map(|event| event.0).collect()
    }
}

/// `fetch_events` with these arguments after the consumer's name.
#[track_caller]
fn fetch(session: &mut Session, consumer: &str, arguments: &str) -> Batch {
    let mut batch = Batch::default();
    for row in session.rows(&format!(
        "select fence, position, aggregate_id, version from nightowls.fetch_events({}{arguments})",
        quote(consumer)
    )) {
        let number = |column: usize| -> i64 {
            row[column]
                .as_deref()
                .and_then(|text| text.parse().ok())
                .expect("a number")
        };
        batch.fence = number(0);
        batch.events.push((
            number(1),
            row[2].clone().expect("an aggregate has an id"),
            number(3),
        ));
    }
    batch
}

fn commit(consumer: &str, up_to: i64, fence: i64, member: u32) -> String {
    format!(
        "select nightowls.commit_offset({}, {up_to}, {fence}, {member})",
        quote(consumer)
    )
}

/// Fetches and commits until nothing comes; returns what came.
#[track_caller]
fn drain(session: &mut Session, consumer: &str) -> Vec<(i64, String, i64)> {
    let mut all = Vec::new();
    loop {
        let batch = fetch(session, consumer, ", 7");
        if batch.events.is_empty() {
            return all;
        }
        session.exec(&commit(consumer, batch.last(), batch.fence, 0));
        all.extend(batch.events);
    }
}

#[track_caller]
fn offset(session: &mut Session, consumer: &str) -> i64 {
    text(
        session,
        &format!(
            "select min(\"offset\") from nightowls.consumer_lag where consumer = {}",
            quote(consumer)
        ),
    )
    .parse()
    .expect("an offset is a number")
}

/// Lets the leases of a consumer end, as time would.
fn end_leases(db: &Db) {
    db.direct(SUPERUSER)
        .exec("update nightowls._consumer_offsets set lease_until = clock_timestamp() - interval '1 second', paused_until = null");
}

#[test]
fn a_consumer_gets_every_event_once_in_order_and_goes_on_where_it_was() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        append(&mut service, &["a", "b"], 10);
        service.exec("select nightowls.create_consumer('mail')");
        let seen = drain(&mut service, "mail");
        let log = lines(
            &mut service,
            "select position from nightowls.read_events() order by 1",
        );
        assert_eq!(
            seen.iter()
                .map(|event| event.0.to_string())
                .collect::<Vec<_>>(),
            log
        );
        assert_eq!(fetch(&mut service, "mail", "").events, []);
        append(&mut service, &["c"], 1);
        assert_eq!(drain(&mut db.service(), "mail").len(), 1);
        // Another one has its own place.
        service.exec("select nightowls.create_consumer('audit')");
        assert_eq!(drain(&mut service, "audit").len(), 21);
        service.exec("select nightowls.create_consumer('late', start => 'end')");
        append(&mut service, &["c"], 2);
        assert_eq!(drain(&mut service, "late").len(), 2);
    });
}

#[test]
fn what_is_rolled_back_comes_again_and_what_is_committed_does_not() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        append(&mut service, &["a"], 3);
        service.exec("select nightowls.create_consumer('mail')");
        service.exec("begin");
        let first = fetch(&mut service, "mail", "");
        service.exec(&commit("mail", first.last(), first.fence, 0));
        service.exec("rollback");
        let again = fetch(&mut service, "mail", "");
        assert_eq!(again.events, first.events);
        assert!(again.fence > first.fence);
        // The fence of a fetch that was rolled back is worth nothing.
        let late = service.refused(&commit("mail", first.last(), first.fence, 0));
        assert_eq!(late.code, "NW003", "{late}");
        service.exec(&commit("mail", again.events[0].0, again.fence, 0));
        service.exec(&commit("mail", again.last(), again.fence, 0));
        assert_eq!(fetch(&mut service, "mail", "").events, []);
        // Nor may effects be committed a second time with the offset that is committed.
        let twice = service.refused(&commit("mail", again.last(), again.fence, 0));
        assert_eq!(twice.code, "NW003", "{twice}");
    });
}

#[test]
fn a_stale_member_commits_nothing_and_no_offset_falls_or_runs_ahead() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        append(&mut service, &["a"], 6);
        service.exec("select nightowls.create_consumer('mail')");
        let stale = fetch(&mut service, "mail", ", 4");
        assert_eq!(
            fetch(&mut db.service(), "mail", "").events,
            [],
            "the lease keeps everybody off"
        );
        // Ended, but taken over by nobody: nothing speaks against it.
        end_leases(db);
        service.exec(&commit("mail", stale.events[1].0, stale.fence, 0));
        for (up_to, code) in [
            (stale.events[0].0, "22023"),
            (stale.events[1].0, "22023"),
            (stale.events[3].0 + 1, "22023"),
            (i64::MAX, "22023"),
        ] {
            let refused = service.refused(&commit("mail", up_to, stale.fence, 0));
            assert_eq!(refused.code, code, "{refused}");
        }
        let wrong = service.refused(&commit("mail", stale.last(), stale.fence, 1));
        assert_eq!(wrong.code, "NW003", "{wrong}");

        let mut other = db.service();
        other.exec("begin");
        let taken = fetch(&mut other, "mail", "");
        assert_eq!(taken.events[..2], stale.events[2..]);
        assert!(taken.fence > stale.fence);
        // While that is open, the stale one waits for what comes of it.
        let mut stale_session = db.direct(SERVICE);
        let pid = stale_session.pid();
        std::thread::scope(|scope| {
            let late = scope.spawn(|| {
                stale_session.refused(&format!(
                    "begin; {}",
                    commit("mail", stale.last(), stale.fence, 0)
                ))
            });
            let mut watcher = db.direct(SUPERUSER);
            wait_until("the late commit waits", Duration::from_secs(10), || {
                is_blocked(&mut watcher, pid)
            });
            other.exec("commit");
            let refused = late.join().expect("it was refused");
            assert_eq!(refused.code, "NW003", "{refused}");
        });
        other.exec(&commit("mail", taken.last(), taken.fence, 0));
        assert_eq!(offset(&mut other, "mail"), taken.last());
    });
}

#[test]
fn two_members_split_the_aggregates_and_take_over_from_one_that_died() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        let ids: Vec<String> = (0..20).map(|i| format!("cart {i}")).collect();
        let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
        append(&mut service, &ids, 3);
        service.exec("select nightowls.create_consumer('mail', members => 2)");
        let zero = fetch(&mut service, "mail", ", member => 0");
        let one = fetch(&mut service, "mail", ", member => 1");
        assert!(zero.ids().is_disjoint(&one.ids()));
        assert_eq!(zero.ids().len() + one.ids().len(), 20);
        assert!(zero.ids().len() > 1 && one.ids().len() > 1);
        assert_eq!(zero.events.len() + one.events.len(), 60);
        service.exec(&commit("mail", zero.last(), zero.fence, 0));
        // Member 1 has not ended: its share is its own as long as its lease lasts.
        assert_eq!(fetch(&mut service, "mail", ", member => 0").events, []);
        end_leases(db);
        let taken = fetch(&mut service, "mail", ", member => 0");
        assert_eq!(taken.events, one.events);
        let late = service.refused(&commit("mail", one.last(), one.fence, 1));
        assert_eq!(late.code, "NW003", "{late}");
        service.exec(&commit("mail", taken.last(), taken.fence, 0));
        // Back again, it gets its share at once, and the other one keeps off while it is at work.
        append(&mut service, &ids, 1);
        let back = fetch(&mut service, "mail", ", member => 1");
        assert_eq!(back.ids(), one.ids());
        service.exec(&commit("mail", back.last(), back.fence, 1));
        append(&mut service, &ids, 1);
        let zero = fetch(&mut service, "mail", ", member => 0");
        service.exec(&commit("mail", zero.last(), zero.fence, 0));
        assert_eq!(zero.events.len() + 2 * one.ids().len(), 40);
        assert_eq!(fetch(&mut service, "mail", ", member => 0").events, []);
        let third = service.refused("select * from nightowls.fetch_events('mail', member => 2)");
        assert_eq!(third.code, "22023", "{third}");
    });
}

#[test]
fn the_share_of_a_member_that_is_killed_passes_on_when_its_lease_ends() {
    on_each_install(|db| {
        default_org(db);
        let mut service = db.service();
        let ids: Vec<String> = (0..20).map(|i| format!("cart {i}")).collect();
        let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
        append(&mut service, &ids, 1);
        service.exec("select nightowls.create_consumer('mail', members => 2)");
        let zero = fetch(&mut service, "mail", ", member => 0");
        service.exec(&commit("mail", zero.last(), zero.fence, 0));
        // One dies with a lease that it has committed, another in the transaction that took it.
        for (begin, lease) in [("", "1 second"), ("begin; ", "1 hour")] {
            let mut dying = db.service();
            let pid = dying.pid();
            dying.exec(begin);
            let lost = fetch(
                &mut dying,
                "mail",
                &format!(", member => 1, lease => '{lease}'"),
            );
            assert_eq!(zero.ids().len() + lost.ids().len(), 20);
            let until = text(
                &mut db.superuser(),
                "select coalesce(max(lease_until), '-infinity') from nightowls.consumer_lag where lease_member = 1",
            );
            db.superuser()
                .exec(&format!("select pg_terminate_backend({pid}, 10000)"));
            let taken = fetch(
                &mut service,
                "mail",
                ", member => 0, max_wait => '10 seconds'",
            );
            assert_eq!(taken.events, lost.events);
            assert_eq!(
                text(
                    &mut service,
                    &format!(
                        "select clock_timestamp() >= {until} and clock_timestamp() < greatest({until}, transaction_timestamp() - interval '1 second') + interval '5 seconds'",
                        until = format_args!("{}::timestamptz", quote(&until))
                    )
                ),
                "t",
                "not before the lease ended, and soon after"
            );
            service.exec(&format!(
                "select nightowls.renew_lease('mail', {}, '0')",
                taken.fence
            ));
        }
    });
}

#[test]
fn another_number_of_members_gives_out_nothing_twice_and_keeps_the_order() {
    on_each_install(|db| {
        default_org(db);
        let mut service = db.service();
        let ids: Vec<String> = (0..12).map(|i| i.to_string()).collect();
        let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
        service.exec("select nightowls.create_consumer('mail', members => 2)");
        let mut random = Random::new(11);
        let mut seen: Vec<(i64, String, i64)> = Vec::new();
        let mut open: Vec<(u32, Batch)> = Vec::new();
        let mut rounds = 0;
        while rounds < 120 || seen.len() < 30 * 12 {
            rounds += 1;
            assert!(rounds < 2000, "{} of 360 events", seen.len());
            if rounds % 4 == 0 && rounds <= 120 {
                append(&mut service, &ids, 1);
            }
            if rounds % 10 == 0 && rounds <= 120 {
                let members = 1 + random.below(5);
                service.exec(&format!(
                    "select nightowls.alter_consumer('mail', members => {members})"
                ));
            }
            // A member whose number is gone is told so.
            let member = random.below(5) as u32;
            let asked = service.try_rows(&format!(
                "select 1 from nightowls.fetch_events('mail', 0 + 1, {member}, '1 minute') where false"
            ));
            if let Err(refusal) = asked {
                assert_eq!(refusal.code, "22023", "{refusal}");
            }
            end_leases(db);
            if service
                .try_exec(&format!(
                    "begin; savepoint s; select nightowls.fetch_events('mail', 1, {member}); rollback"
                ))
                .is_err()
            {
                service.exec("rollback");
                continue;
            }
            let batch = fetch(
                &mut service,
                "mail",
                &format!(", {}, {member}", 1 + random.below(9)),
            );
            if !batch.events.is_empty() {
                open.push((member, batch));
            }
            // Some commit in part, some never: those come again.
            while open.len() > 2 || random.chance(60) && !open.is_empty() {
                let (member, batch) = open.remove(random.below(open.len() as u64) as usize);
                let count = if random.chance(70) {
                    batch.events.len()
                } else {
                    1 + random.below(batch.events.len() as u64) as usize
                };
                let done = &batch.events[..count];
                match service.try_exec(&commit("mail", done[count - 1].0, batch.fence, member)) {
                    Ok(()) => seen.extend(done.iter().cloned()),
                    Err(refusal) => assert_eq!(refusal.code, "NW003", "{refusal}"),
                }
            }
        }
        assert_in_order(&seen, 12, 30);
        assert_eq!(
            text(&mut service, "select drain_to from nightowls.consumers"),
            "null"
        );
    });
}

/// `seen` has the versions 1 to `count` of each of `aggregates`, in this order.
#[track_caller]
fn assert_in_order(seen: &[(i64, String, i64)], aggregates: usize, count: i64) {
    let mut versions: BTreeMap<&str, Vec<i64>> = BTreeMap::new();
    for (_, id, version) in seen {
        versions.entry(id).or_default().push(*version);
    }
    assert_eq!(versions.len(), aggregates);
    for (id, versions) in versions {
        assert_eq!(versions, (1..=count).collect::<Vec<_>>(), "of {id}");
    }
}

#[test]
fn a_filter_lets_through_what_it_names_and_erasures() {
    on_each_install(|db| {
        default_org(db);
        let mut service = db.service();
        service.exec(
            "select nightowls.append_event('cart', 'a', 'added'), nightowls.append_event('order', 'a', 'added'),
                    nightowls.append_event('order', 'a', 'paid'), nightowls.append_event('cart', 'a', 'paid')",
        );
        db.superuser().exec(
            "set session_replication_role = replica;
             insert into nightowls.events (aggregate_type, aggregate_id, version, event_type) values ('order', 'a', 3, 'nightowls.erased')",
        );
        let mut types = |filter: &str| {
            let name = format!("c {filter}");
            service.exec(&format!(
                "select nightowls.create_consumer({}, {})",
                quote(&name),
                quote(filter)
            ));
            lines(
                &mut service,
                &format!(
                    "select aggregate_type, event_type from nightowls.fetch_events({})",
                    quote(&name)
                ),
            )
        };
        assert_eq!(
            types(r#"{"aggregate_types": ["order"]}"#),
            ["order added", "order paid", "order nightowls.erased"]
        );
        assert_eq!(
            types(r#"{"event_types": ["paid"]}"#),
            ["order paid", "cart paid", "order nightowls.erased"]
        );
        assert_eq!(
            types(r#"{"event_types": ["paid"], "aggregate_types": ["cart"]}"#),
            ["cart paid"]
        );
        assert_eq!(types("{}").len(), 5);
        assert_eq!(types(r#"{"aggregate_types": []}"#).len(), 0);
    });
}

#[test]
fn a_filter_that_matches_nothing_costs_no_second_look_at_history() {
    on_each_install(|db| {
        let org = default_org(db);
        db.superuser().exec(&format!(
            "set session_replication_role = replica;
             insert into nightowls.events (org_id, aggregate_type, aggregate_id, version, event_type)
             select '{org}', 'cart', 'c' || i % 100, 1 + i / 100, 'added' from generate_series(0, 119999) i"
        ));
        let mut service = db.service();
        service.exec("select nightowls.create_consumer('idle', '{\"event_types\": [\"never\"]}')");
        let last: i64 = text(&mut service, "select max(position) from nightowls.events")
            .parse()
            .expect("a number");
        let mut offsets = Vec::new();
        for _ in 0..4 {
            assert_eq!(fetch(&mut service, "idle", "").events, []);
            offsets.push(offset(&mut service, "idle"));
        }
        assert_eq!(offsets, [50000, 100000, last, last]);
        let cost = buffers(&mut service, "select * from nightowls.fetch_events('idle')");
        assert!(cost < 40, "{cost} buffers to see that there is nothing new");
        // What matches is found wherever it is, also behind a window that it does not fill.
        service.exec("select nightowls.append_event('cart', 'x', 'never')");
        assert_eq!(fetch(&mut service, "idle", "").events.len(), 1);
        service.exec(
            "select nightowls.create_consumer('far', '{\"event_types\": [\"never\"]}');
             select nightowls.seek('far', 60000)",
        );
        assert_eq!(fetch(&mut service, "far", "").events, []);
        assert_eq!(fetch(&mut service, "far", "").events.len(), 1);
    });
}

#[test]
fn seeking_goes_anywhere_and_makes_what_was_fetched_before_stale() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        append(&mut service, &["a"], 10);
        service.exec("select nightowls.create_consumer('mail', members => 3)");
        let all = fetch(&mut service, "mail", ", member => 1");
        let before = drain(&mut service, "mail");
        let positions: Vec<String> =
            lines(&mut service, "select position from nightowls.read_events()");
        service.exec(&format!("select nightowls.seek('mail', {})", positions[6]));
        if !all.events.is_empty() {
            let late = service.refused(&commit("mail", all.last(), all.fence, 1));
            assert_eq!(late.code, "NW003", "{late}");
        }
        assert!(before.len() <= 10);
        assert_eq!(drain(&mut service, "mail").len(), 3);
        service.exec("select nightowls.seek('mail', 0)");
        assert_eq!(drain(&mut service, "mail").len(), 10);
        let beyond = service.refused("select nightowls.seek('mail', 999999)");
        assert_eq!(beyond.code, "22023", "{beyond}");

        let third = text(
            &mut service,
            "select created_at from nightowls.events where version = 3",
        );
        service.exec(&format!(
            "select nightowls.seek_time('mail', {})",
            quote(&third)
        ));
        assert_eq!(drain(&mut service, "mail").len(), 8);
        service.exec("select nightowls.seek_time('mail', 'infinity')");
        append(&mut service, &["a"], 2);
        assert_eq!(drain(&mut service, "mail").len(), 2);
        service.exec("select nightowls.seek_time('mail', '-infinity')");
        assert_eq!(drain(&mut service, "mail").len(), 12);
    });
}

#[test]
fn a_poison_event_is_parked_after_its_attempts_and_can_be_replayed() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        append(&mut service, &["a", "b"], 2);
        service.exec("select nightowls.create_consumer('mail', max_attempts => 3)");
        let mut poison = 0;
        for attempt in 1..=3 {
            let batch = if attempt == 2 {
                // Fetched and failed in one transaction: the lease is gone with it.
                service.exec("begin");
                let batch = fetch(&mut service, "mail", "");
                service.exec("rollback");
                batch
            } else {
                fetch(&mut service, "mail", "")
            };
            assert_eq!(batch.events.len(), 4);
            poison = batch.events[1].0;
            let parked = text(
                &mut service,
                &format!(
                    "select nightowls.fail_event('mail', {poison}, 'attempt {attempt}', {})",
                    batch.fence
                ),
            );
            assert_eq!(parked, if attempt == 3 { "t" } else { "f" });
            if attempt < 3 {
                assert_eq!(fetch(&mut service, "mail", "").events, [], "it rests");
                end_leases(db);
            }
            let late = service.refused(&commit("mail", batch.last(), batch.fence, 0));
            assert_eq!(late.code, "NW003", "{late}");
        }
        assert_eq!(
            lines(
                &mut service,
                "select consumer, position, attempts, error, aggregate_id from nightowls.parked_events"
            ),
            [format!("mail {poison} 3 attempt 3 b")]
        );
        assert_eq!(
            text(
                &mut service,
                "select \"offset\" from nightowls._slowest_consumer(nightowls.current_org(), 'cart')"
            ),
            "0"
        );
        let rest = fetch(&mut service, "mail", "");
        assert_eq!(rest.events.len(), 3, "the consumer goes on without it");
        service.exec(&commit("mail", rest.last(), rest.fence, 0));
        // Compaction is kept from what is parked.
        assert_eq!(
            text(
                &mut service,
                "select \"offset\" from nightowls._slowest_consumer(nightowls.current_org(), 'cart')"
            ),
            (poison - 1).to_string()
        );

        assert_eq!(
            text(
                &mut service,
                &format!("select nightowls.replay_parked('mail', {poison})")
            ),
            "1"
        );
        append(&mut service, &["a"], 1);
        let replayed = fetch(&mut service, "mail", "");
        assert_eq!(replayed.positions(), [poison]);
        let refused = service.refused(&commit("mail", poison + 1, replayed.fence, 0));
        assert_eq!(refused.code, "22023", "{refused}");
        let refused = service.refused(&commit("mail", poison - 1, replayed.fence, 0));
        assert_eq!(refused.code, "22023", "{refused}");
        service.exec(&commit("mail", poison, replayed.fence, 0));
        assert_eq!(drain(&mut service, "mail").len(), 1);
        assert_eq!(
            text(&mut service, "select count(*) from nightowls.parked_events"),
            "0"
        );
    });
}

#[test]
fn an_event_can_be_parked_at_once_beside_the_others_and_forgotten() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        append(&mut service, &["a"], 3);
        service.exec("select nightowls.create_consumer('mail')");
        service.exec("begin");
        let batch = fetch(&mut service, "mail", "");
        let poison = batch.events[1].0;
        service.exec(&format!(
            "select nightowls.park_event('mail', {poison}, 'no such address', {})",
            batch.fence
        ));
        let early = "savepoint s; select nightowls.drop_parked('mail')";
        assert_eq!(service.refused(early).code, "55000");
        service.exec(&format!(
            "rollback to s; {}; commit",
            commit("mail", batch.last(), batch.fence, 0)
        ));
        assert_eq!(drain(&mut service, "mail"), []);
        assert_eq!(
            text(&mut service, "select error from nightowls.parked_events"),
            "no such address"
        );
        let unknown = service.refused("select nightowls.replay_parked('mail', 1000000)");
        assert_eq!(unknown.code, "NW007", "{unknown}");
        assert_eq!(
            text(&mut service, "select nightowls.drop_parked('mail')"),
            "1"
        );
        assert_eq!(drain(&mut service, "mail"), []);
        // Seeking back forgets what was parked: it comes again.
        service.exec("select nightowls.seek('mail', 0)");
        assert_eq!(drain(&mut service, "mail").len(), 3);
    });
}

#[test]
fn a_lease_can_be_renewed_and_given_back() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        append(&mut service, &["a"], 3);
        service.exec("select nightowls.create_consumer('mail')");
        let batch = fetch(&mut service, "mail", ", lease => '0.001 seconds'");
        service.exec(&format!(
            "select nightowls.renew_lease('mail', {}, '1 hour')",
            batch.fence
        ));
        assert_eq!(fetch(&mut service, "mail", "").events, []);
        service.exec(&format!(
            "select nightowls.renew_lease('mail', {}, '0')",
            batch.fence
        ));
        let late = service.refused(&format!(
            "select nightowls.renew_lease('mail', {})",
            batch.fence
        ));
        assert_eq!(late.code, "NW003", "{late}");
        assert_eq!(fetch(&mut service, "mail", "").events, batch.events);
    });
}

#[test]
fn a_consumer_of_one_org_and_that_of_the_same_name_in_another_never_meet() {
    on_each_route(|db| {
        let one = default_org(db);
        let two = new_org(db, "two");
        let mut service = db.service();
        for org in [&one, &two] {
            service.exec(&format!(
                "select nightowls.create_consumer('mail', org => '{org}');
                 select nightowls.append_event('cart', 'a', 'of {org}', org => '{org}')"
            ));
        }
        let of = |session: &mut Session, org: &str| {
            session.rows(&format!(
                "select fence, position, event_type from nightowls.fetch_events('mail', org => '{org}')"
            ))
        };
        let (first, second) = (of(&mut service, &one), of(&mut service, &two));
        assert_eq!(first.len() + second.len(), 2);
        assert_eq!(first[0][2].as_deref(), Some(format!("of {one}").as_str()));
        assert_eq!(second[0][2].as_deref(), Some(format!("of {two}").as_str()));
        let (fence, position) = (
            first[0][0].as_deref().unwrap(),
            first[0][1].as_deref().unwrap(),
        );
        let refused = service.refused(&format!(
            "select nightowls.commit_offset('mail', {position}, {fence}, org => '{two}')"
        ));
        assert_eq!(refused.code, "NW003", "{refused}");
        service.exec(&format!(
            "select nightowls.commit_offset('mail', {position}, {fence}, org => '{one}')"
        ));
        service.exec(&format!("select nightowls.drop_consumer('mail', '{one}')"));
        assert_eq!(
            text(
                &mut service,
                &format!("select count(*) from nightowls.consumer_lag where org_id = '{two}'")
            ),
            "1"
        );
        assert_eq!(
            service
                .refused(&format!(
                    "select nightowls.fetch_events('mail', org => '{one}')"
                ))
                .code,
            "NW007"
        );
    });
}

#[test]
fn bad_calls_are_answered_by_their_sqlstate() {
    on_each_install(|db| {
        default_org(db);
        let mut service = db.service();
        service.exec("select nightowls.create_consumer('mailer')");
        let near = service.refused("select nightowls.fetch_events('mialer')");
        assert_eq!(
            (near.code.as_str(), near.hint.as_str()),
            ("NW007", "Did you mean \"mailer\"?")
        );
        for (code, sql) in [
            ("22004", "fetch_events(null)"),
            ("NW007", "fetch_events('')"),
            ("22023", "fetch_events('mailer', 0)"),
            ("22004", "fetch_events('mailer', null)"),
            ("22004", "fetch_events('mailer', member => null)"),
            ("22023", "fetch_events('mailer', member => -1)"),
            ("22023", "fetch_events('mailer', member => 1)"),
            ("22004", "fetch_events('mailer', lease => null)"),
            ("22023", "fetch_events('mailer', lease => '0')"),
            ("22023", "fetch_events('mailer', lease => '-1 s')"),
            ("22004", "fetch_events('mailer', max_wait => null)"),
            ("22023", "fetch_events('mailer', max_wait => '2 minutes')"),
            ("22023", "fetch_events('mailer', max_wait => '-1 s')"),
            ("NW007", "commit_offset('none', 1, 1)"),
            ("22004", "commit_offset('mailer', null, 1)"),
            ("22004", "commit_offset('mailer', 1, null)"),
            ("NW003", "commit_offset('mailer', 1, 1)"),
            ("NW003", "commit_offset('mailer', 1, -1)"),
            ("NW003", "commit_offset('mailer', 1, 31)"),
            ("NW003", "commit_offset('mailer', 1, 9223372036854775807)"),
            ("22004", "fail_event('mailer', null, 'x', 1)"),
            ("NW007", "fail_event('none', 1, 'x', 1)"),
            ("22023", "fail_event('mailer', 1, 'x', 9000000000000000)"),
            ("NW003", "park_event('mailer', 1, 'x', 9000000000000000)"),
            ("NW003", "renew_lease('mailer', 1)"),
            ("22023", "renew_lease('mailer', 1, '-1 s')"),
            ("22004", "renew_lease('mailer', 1, null)"),
            ("NW007", "seek('none', 0)"),
            ("22004", "seek('mailer', null)"),
            ("22023", "seek('mailer', -1)"),
            ("22004", "seek_time('mailer', null)"),
            ("NW007", "seek_time('none', now())"),
            ("NW007", "drop_consumer('none')"),
            ("NW007", "replay_parked('none')"),
            ("NW007", "drop_parked('none', 1)"),
            ("22004", "create_consumer(null)"),
            ("22023", "create_consumer('')"),
            ("54000", "create_consumer(repeat('x', 256))"),
            ("22023", "create_consumer('projection:x')"),
            ("22023", "create_consumer('x', '[]')"),
            ("22023", "create_consumer('x', '{\"types\": []}')"),
            ("22023", "create_consumer('x', start => 'middle')"),
            ("22004", "create_consumer('x', start => null)"),
            ("22023", "create_consumer('x', members => 0)"),
            ("22023", "create_consumer('x', members => 33)"),
            ("22004", "create_consumer('x', members => null)"),
            ("22023", "create_consumer('x', max_attempts => 0)"),
            ("22023", "create_consumer('x', retry_pause => '-1 s')"),
            ("42710", "create_consumer('mailer', members => 2)"),
            ("42710", "create_consumer('mailer', '{}')"),
            ("22023", "alter_consumer('mailer', members => 0)"),
            ("22023", "alter_consumer('mailer', '[]')"),
            ("NW007", "alter_consumer('none', members => 2)"),
            ("22023", "alter_consumer('projection:x')"),
            ("22023", "drop_consumer('projection:x')"),
        ] {
            let refusal = service.refused(&format!("select nightowls.{sql}"));
            assert_eq!(refusal.code, code, "{sql}: {refusal}");
        }
        service.exec("select nightowls.create_consumer('mailer')");
        append(&mut service, &["a"], 1);
        for sql in [
            "select nightowls.fetch_events('mailer')",
            "select nightowls.commit_offset('mailer', 1, 1)",
            "select nightowls.seek('mailer', 0)",
            "select nightowls.fail_event('mailer', 1, 'x', 1)",
            "select nightowls.alter_consumer('mailer', members => 2)",
        ] {
            let refusal = service.refused(&format!("begin isolation level repeatable read; {sql}"));
            assert_eq!(refusal.code, "25001", "{sql}: {refusal}");
            service.exec("rollback");
        }
    });
}

#[test]
fn a_fetch_waits_for_events_no_longer_than_it_is_told() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        service.exec("select nightowls.create_consumer('mail')");
        assert_eq!(
            fetch(&mut service, "mail", ", max_wait => '0.05 seconds'").events,
            []
        );
        std::thread::scope(|scope| {
            let waiting =
                scope.spawn(|| fetch(&mut db.service(), "mail", ", max_wait => '1 minute'"));
            append(&mut service, &["a"], 1);
            let batch = waiting.join().expect("it got events");
            assert_eq!(batch.events.len(), 1);
        });
    });
}

#[test]
fn consumer_lag_says_who_works_and_who_holds_the_horizon() {
    on_each_install(|db| {
        default_org(db);
        let mut service = db.service();
        service.exec("select nightowls.create_consumer('mail')");
        let mut open = db.service();
        open.exec("begin; select nightowls.append_event('cart', 'open', 'added')");
        let pid = open.pid();
        append(&mut service, &["a"], 3);
        assert_eq!(fetch(&mut service, "mail", "").events, []);
        let row = "select \"offset\", lag_events, lease_member, parked, horizon_pid, horizon_gid from nightowls.consumer_lag";
        assert_eq!(lines(&mut service, row), [format!("0 3 null 0 {pid} null")]);
        open.exec("prepare transaction 'held back'");
        assert_eq!(lines(&mut service, row), ["0 3 null 0 null held back"]);
        open.exec("commit prepared 'held back'");
        let batch = fetch(&mut service, "mail", "");
        assert_eq!(batch.events.len(), 4);
        assert_eq!(lines(&mut service, row), ["0 4 0 0 null null"]);
        service.exec(&commit("mail", batch.last(), batch.fence, 0));
        assert_eq!(
            lines(
                &mut service,
                "select lag_events, lag_positions, lease_until from nightowls.consumer_lag"
            ),
            ["0 0 null"]
        );
    });
}

// Killed consumers --------------------------------------------------------------------------------

const MEMBERS: u32 = 2;
const PER_BLOW: i64 = 500;

/// One member: fetches, writes its effects and commits, half of the time in one
/// transaction, else with a lease that is committed first; killed, it comes back.
fn work(db: &Db, member: u32, done: &AtomicBool) {
    let mut random = Random::new(u64::from(member) + 5);
    let mut session: Option<Session> = None;
    while !done.load(Ordering::SeqCst) {
        let Some(open) = session.as_mut() else {
            session = Session::connect(db.cluster().port(), db.name(), SERVICE).ok();
            let named = session
                .as_mut()
                .map(|open| open.try_exec("set application_name = 'consumer'"));
            if !matches!(named, Some(Ok(()))) {
                session = None;
            }
            continue;
        };
        let size = 1 + random.below(120);
        let outcome = if random.chance(50) {
            open.try_exec(&format!(
                "begin;
                 with batch as materialized (
                   select * from nightowls.fetch_events('mail', {size}, {member}, max_wait => '0.02 seconds')
                 ), effect as (
                   insert into public.effects (position, aggregate_id, version)
                   select b.position, b.aggregate_id, b.version from batch b order by b.position
                 )
                 select nightowls.commit_offset('mail', max(b.position), max(b.fence), {member}) from batch b having count(*) > 0;
                 commit"
            ))
        } else {
            in_two_steps(open, size, member)
        };
        if let Err(refusal) = outcome {
            match refusal.code.as_str() {
                // Somebody else has taken over.
                "NW003" => {
                    if open.try_exec("rollback").is_err() {
                        session = None;
                    }
                }
                "08006" | "57P01" | "57P02" | "57P03" => session = None,
                _ => panic!("member {member}: {refusal}"),
            }
        }
    }
}

fn in_two_steps(session: &mut Session, size: u64, member: u32) -> Result<(), Refusal> {
    let batch = session.try_rows(&format!(
        "select fence, position, quote_literal(aggregate_id), version
           from nightowls.fetch_events('mail', {size}, {member}, '0.2 seconds', '0.02 seconds')"
    ))?;
    let column = |row: &Vec<Option<String>>, n: usize| row[n].clone().expect("no column is null");
    let Some(last) = batch.last() else {
        return Ok(());
    };
    let effects: Vec<String> = batch
        .iter()
        .map(|row| {
            format!(
                "({}, {}, {})",
                column(row, 1),
                column(row, 2),
                column(row, 3)
            )
        })
        .collect();
    session.try_exec(&format!(
        "begin;
         insert into public.effects (position, aggregate_id, version) values {};
         select nightowls.commit_offset('mail', {}, {}, {member});
         commit",
        effects.join(", "),
        column(last, 1),
        column(last, 0)
    ))
}

/// Two members work while `blows` times some events are appended and one of the
/// blows falls. In the end every effect is there once, in order.
fn survive(db: &Db, blows: u64, mut blow: impl FnMut(&mut Random)) {
    default_org(db);
    db.owner().exec(&format!(
        "create table public.effects (id bigint generated always as identity, position bigint, aggregate_id text, version bigint);
         grant select, insert on public.effects to {SERVICE};
         select nightowls.create_consumer('mail', members => {MEMBERS})"
    ));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        /// The members end also when this thread panics.
        struct Done<'a>(&'a AtomicBool);
        impl Drop for Done<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        let finish = Done(&done);
        for member in 0..MEMBERS {
            let done = &done;
            scope.spawn(move || work(db, member, done));
        }
        let mut random = Random::new(blows);
        for _ in 0..blows {
            db.service().exec(&format!(
                "select nightowls.append_events('cart', i::text, (select jsonb_agg('{{\"event_type\": \"added\"}}'::jsonb)
                   from generate_series(1, {PER_BLOW} / 10))) from generate_series(1, 10) i"
            ));
            blow(&mut random);
        }
        let mut watcher = db.service();
        wait_until("every event is handled", Duration::from_secs(60), || {
            text(
                &mut watcher,
                "select bool_and(\"offset\" >= (select max(position) from nightowls.events)) from nightowls.consumer_lag",
            ) == "t"
        });
        drop(finish);
    });
    let mut session = db.service();
    let total = blows as i64 * PER_BLOW;
    assert_eq!(
        lines(
            &mut session,
            "select count(*), count(distinct position) from public.effects"
        ),
        [format!("{total} {total}")]
    );
    assert_eq!(
        text(
            &mut session,
            "select count(*) from (select version, lag(version, 1, 0::bigint) over (partition by aggregate_id order by id) as before
               from public.effects) e where version <> before + 1"
        ),
        "0",
        "order in every aggregate"
    );
}

/// A member that is at work just now.
fn busy_member(watcher: &mut Session, random: &mut Random) -> Option<String> {
    let pids = watcher
        .try_rows(&format!(
            "select pid from pg_stat_activity where datname = current_database() and usename = '{SERVICE}'
                and application_name = 'consumer' and state <> 'idle'"
        ))
        .ok()?;
    if pids.is_empty() {
        return None;
    }
    pids[random.below(pids.len() as u64) as usize][0].clone()
}

/// With `NIGHTOWLS_FULL` as many as the promise speaks of.
fn blows(default: u64) -> u64 {
    if full() { 200 } else { default }
}

#[test]
fn terminated_two_hundred_times_a_consumer_has_every_effect_once() {
    on_each_install(|db| {
        survive(db, 200, |random| {
            let mut watcher = db.superuser();
            wait_until("a member is terminated", Duration::from_secs(30), || {
                busy_member(&mut watcher, random).is_some_and(|pid| {
                    text(&mut watcher, &format!("select pg_terminate_backend({pid})")) == "t"
                })
            });
        });
    });
}

/// `kill -9` of a member's process, which the server answers by ending all others and
/// recovering as after a crash; and five times of the server itself.
#[test]
fn killed_by_kill_9_a_consumer_has_every_effect_once() {
    own_cluster(|cluster| {
        for install in Install::ALL {
            let db = cluster.database(install);
            let count = blows(20);
            let mut number = 0;
            survive(&db, count + 5, |random| {
                number += 1;
                if number % (count / 5 + 1) == 0 {
                    cluster.kill9_postmaster_and_restart();
                    return;
                }
                let before = crashes(cluster);
                let mut watcher = db.superuser();
                wait_until("a member is killed", Duration::from_secs(30), || {
                    busy_member(&mut watcher, random).is_some_and(|pid| kills(&pid))
                });
                wait_until("the server has recovered", Duration::from_secs(60), || {
                    crashes(cluster) > before
                        && Session::connect(cluster.port(), db.name(), SERVICE).is_ok()
                });
            });
        }
    });
}

/// How often the server has answered the death of a process by starting anew.
fn crashes(cluster: &Cluster) -> usize {
    cluster
        .log()
        .matches("all server processes terminated; reinitializing")
        .count()
}

/// Whether a process was there to be killed.
fn kills(pid: &str) -> bool {
    std::process::Command::new("sh")
        .args(["-c", "kill -KILL \"$1\"", "kill", pid])
        .stderr(std::process::Stdio::null())
        .status()
        .expect("sh is there")
        .success()
}

#[test]
fn a_consumer_beside_eight_writers_that_roll_back_misses_nothing() {
    on_each_install(|db| {
        default_org(db);
        db.service()
            .exec("select nightowls.create_consumer('mail')");
        let writing = AtomicBool::new(true);
        let seen = std::thread::scope(|scope| {
            let consumer = scope.spawn(|| {
                let mut session = db.service();
                let mut seen = Vec::new();
                loop {
                    // Asked before: once nobody writes, an empty answer is the end.
                    let last = !writing.load(Ordering::SeqCst);
                    let more = drain(&mut session, "mail");
                    if last && more.is_empty() {
                        return seen;
                    }
                    seen.extend(more);
                }
            });
            together(
                8,
                |_| db.service(),
                |number, mut session| {
                    let mut random = Random::new(number as u64);
                    for _ in 0..40 {
                        session.exec("begin");
                        for _ in 0..=random.below(3) {
                            session.exec(&format!(
                                "select nightowls.append_event('cart', '{number} {}', 'added')",
                                random.below(5)
                            ));
                            // A delay is the point here: it lets later positions commit first.
                            std::thread::sleep(Duration::from_micros(random.below(3000)));
                        }
                        session.exec(if random.chance(20) {
                            "rollback"
                        } else {
                            "commit"
                        });
                    }
                },
            );
            writing.store(false, Ordering::SeqCst);
            consumer.join().expect("the consumer read to the end")
        });
        let positions: Vec<String> = seen.iter().map(|event| event.0.to_string()).collect();
        assert_eq!(
            positions,
            lines(
                &mut db.service(),
                "select position from nightowls.events order by position"
            )
        );
    });
}

#[test]
fn fetching_and_committing_stays_flat_while_an_old_snapshot_is_open() {
    const CYCLE: &str = "with b as materialized (select * from nightowls.fetch_events('mail', 1))
         select nightowls.commit_offset('mail', max(position), max(fence)) from b having count(*) > 0";
    on_each_install(|db| {
        let org = default_org(db);
        let mut superuser = db.superuser();
        superuser.exec(&format!(
            "set session_replication_role = replica;
             insert into nightowls.events (org_id, aggregate_type, aggregate_id, version, event_type)
             select '{org}', 'cart', 'c', i, 'added' from generate_series(1, 5000) i;
             reset session_replication_role;
             alter table nightowls._consumer_offsets set (autovacuum_enabled = off)"
        ));
        superuser.exec("select nightowls.create_consumer('mail')");
        let mut held = db.service();
        held.exec("begin isolation level repeatable read; select 1");
        for mode in ["auto", "force_generic_plan"] {
            let mut service = db.service();
            service.exec(&format!("set plan_cache_mode = {mode}"));
            let mut most = Vec::new();
            for _ in 0..3 {
                // Not always the one in 64 that removes old rows.
                let least = (0..3).map(|_| buffers(&mut service, CYCLE)).min();
                most.push(least.expect("three are measured"));
                for _ in 0..300 {
                    service.exec(CYCLE);
                }
            }
            assert!(
                most.iter().all(|cost| *cost <= most[0] + 10 && *cost < 150),
                "{mode}: {most:?} buffers, the later with hundreds of rows more that the snapshot keeps"
            );
        }
        assert_eq!(
            text(
                &mut held,
                "select count(*) from nightowls._consumer_offsets"
            ),
            "1",
            "the old snapshot still sees what it saw"
        );
        held.exec("commit");
        let rows = text(
            &mut superuser,
            "select count(*) from nightowls._consumer_offsets",
        );
        assert!(
            rows.parse::<i64>().expect("a number") <= 130,
            "{rows} rows left"
        );
        superuser.exec("select nightowls._prune_consumers()");
        assert_eq!(
            text(
                &mut superuser,
                "select count(*) from nightowls._consumer_offsets"
            ),
            "1"
        );
    });
}

#[test]
fn the_page_on_consumers_does_what_it_says() {
    on_each_route(|db| {
        default_org(db);
        let mut owner = db.owner();
        for block in include_str!("../docs/consumers.md")
            .split("```sql\n")
            .skip(1)
        {
            let (sql, _) = block.split_once("```").expect("a block has an end");
            for statement in statements(sql) {
                owner.exec(&statement);
            }
        }
        assert_eq!(
            lines(
                &mut owner,
                "select order_id, amount from public.invoices order by position"
            ),
            ["42 19.90", "43 5"]
        );
        assert_eq!(
            lines(
                &mut owner,
                "select consumer, attempts, error from nightowls._consumer_failures"
            ),
            ["invoices 1 not a number"]
        );
    });
}

/// Each statement by itself, but what stands between begin and commit.
fn statements(sql: &str) -> Vec<String> {
    let mut all = vec![String::new()];
    let mut open = false;
    for line in sql.lines() {
        let last = all.last_mut().expect("there is always one");
        last.push_str(line);
        last.push('\n');
        open = (open || line == "begin;") && line != "commit;";
        if !open && line.ends_with(';') {
            all.push(String::new());
        }
    }
    all.retain(|statement| !statement.trim().is_empty());
    all
}
