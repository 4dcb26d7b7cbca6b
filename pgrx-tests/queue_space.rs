//! Space: what an old snapshot has kept is used again when it has gone.

use std::time::Duration;

use crate::fixture::{default_org, lines};
use crate::projections::text;
use crate::support::{Db, Install, Session, full, own_cluster_with, wait_until};

/// How many messages go through the queue in one phase: with NIGHTOWLS_FULL set a million in all.
fn phase_size() -> u32 {
    if full() { 100_000 } else { 20_000 }
}

/// How many phases come after the one that was held.
fn phases() -> u32 {
    if full() { 9 } else { 4 }
}

/// Sends, reads and acks so many, 500 at a time.
fn work(session: &mut Session, messages: u32) {
    session.exec(&format!(
        "do $$ begin for i in 1 .. {messages} / 500 loop
           perform nightowls.send_batch('jobs', array_fill('{{\"note\": \"hello world, hello world\"}}'::jsonb, array[500]));
           commit;
           perform nightowls.ack_many('jobs', r.ids, r.receipts)
              from (select array_agg(msg_id) as ids, array_agg(receipt) as receipts from nightowls.read('jobs', 60, 500)) r;
           commit;
         end loop; end $$"
    ));
}

/// The kilobytes of the table and of its indexes.
fn sizes(session: &mut Session) -> (i64, i64) {
    let row = lines(
        session,
        "select pg_relation_size(t) / 1024, pg_indexes_size(t) / 1024 from (select 'nightowls.queue_messages'::regclass as t) x",
    )
    .remove(0);
    let (heap, indexes) = row.split_once(' ').expect("two columns");
    (
        heap.parse().expect("a number"),
        indexes.parse().expect("a number"),
    )
}

fn goes_through(db: &Db) {
    default_org(db);
    let mut service = db.service();
    service.exec("select nightowls.create_queue('jobs')");
    let mut superuser = db.superuser();
    let mut holder = db.service();
    holder.exec(
        "begin isolation level repeatable read; select count(*) from nightowls.queue_messages",
    );
    work(&mut service, phase_size());
    let (heap, indexes) = sizes(&mut superuser);
    holder.exec("commit");
    let mut seen = Vec::new();
    for _ in 0..phases() {
        service.exec("select pg_stat_force_next_flush()");
        // By autovacuum, as the table's own settings have it.
        wait_until("autovacuum has been there", Duration::from_secs(60), || {
            text(
                &mut superuser,
                "select autovacuum_count > 0 and n_dead_tup < 5000 from pg_stat_all_tables
                  where relid = 'nightowls.queue_messages'::regclass",
            ) == "t"
        });
        work(&mut service, phase_size());
        seen.push(sizes(&mut superuser));
    }
    eprintln!(
        "{}: {heap} and {indexes} kB of indexes held, then {seen:?}",
        db.install()
    );
    let (last_heap, last_indexes) = *seen.last().expect("some phases");
    assert!(last_heap < heap * 3 / 2, "{heap} kB held, then {seen:?}");
    assert!(
        last_indexes < indexes * 3,
        "{indexes} kB of indexes held, then {seen:?}"
    );
    assert_eq!(
        text(
            &mut superuser,
            "select count(*) from nightowls.queue_messages"
        ),
        "0"
    );
}

#[test]
fn space_is_used_again_when_the_holder_of_a_snapshot_has_left() {
    own_cluster_with(&[("autovacuum_naptime", "1s")], |cluster| {
        for install in Install::ALL {
            goes_through(&cluster.database(install));
        }
    });
}
