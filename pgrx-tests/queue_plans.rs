//! Flat cost of the queue: what a call touches does not grow with the queue, with what is delayed, with groups or keys, and
//! no statistics make its plans flip. Counted in buffers, not read from plans.

use crate::fixture::default_org;
use crate::projections::{buffers, text};
use crate::support::{Db, Session, full, on_each_install};

/// What each call may touch, however many messages there are. A probe of an index is up to four buffers, a row that is written
/// about fifteen with its indexes; a read now and then looks for what is due and moves a
/// mark, which is another hundred or two. A plan that walks over a queue touches thousands.
const BOUNDS: &[(&str, i64, &str)] = &[
    ("send", 60, "select nightowls.send('jobs', '1')"),
    (
        "send, delayed",
        90,
        "select nightowls.send('jobs', '1', delay => 86400)",
    ),
    (
        "send with a new key",
        110,
        "select nightowls.send('jobs', '1', dedup_key => gen_random_uuid()::text)",
    ),
    (
        "send with a known key",
        30,
        "select nightowls.send('jobs', '1', dedup_key => 'known')",
    ),
    (
        "send to a new group",
        130,
        "select nightowls.send('jobs', '1', group_key => gen_random_uuid()::text)",
    ),
    (
        "send to a long group",
        110,
        "select nightowls.send('jobs', '1', group_key => 'g7')",
    ),
    (
        "send_batch of 10",
        350,
        "select nightowls.send_batch('jobs', array_fill('1'::jsonb, array[10]))",
    ),
    (
        "send_batch of 10 with keys",
        720,
        "select nightowls.send_batch('jobs', array_fill('1'::jsonb, array[10]), dedup_keys => array(select gen_random_uuid()::text from generate_series(1, 10)))",
    ),
    (
        "send_batch of 10 to groups",
        960,
        "select nightowls.send_batch('jobs', array_fill('1'::jsonb, array[10]), group_keys => array(select 'g' || i from generate_series(1, 10) i))",
    ),
    (
        "a cycle",
        720,
        "select nightowls.ack('jobs', msg_id, receipt), nightowls.send('jobs', '1') from nightowls.read('jobs', 60, 1)",
    ),
    (
        "a cycle of 10",
        1200,
        "select nightowls.ack_many('jobs', ids, receipts), nightowls.send_batch('jobs', array_fill('1'::jsonb, array[10]))
           from (select array_agg(msg_id) as ids, array_agg(receipt) as receipts from nightowls.read('jobs', 60, 10)) r",
    ),
    (
        "a cycle in a group",
        800,
        "select nightowls.ack('grouped', msg_id, receipt), nightowls.send('grouped', '1', group_key => 'g' || (random() * 999)::int)
           from nightowls.read('grouped', 60, 1)",
    ),
    (
        "a dead letter of a group",
        800,
        "select nightowls.nack('grouped', msg_id, receipt) from nightowls.read('grouped', 60, 1)",
    ),
    (
        "pop of what has a key",
        640,
        "select nightowls.send('keyed', '1', dedup_key => gen_random_uuid()::text), (select count(*) from nightowls.pop('keyed'))",
    ),
    (
        "read and give back",
        440,
        "select nightowls.nack('jobs', msg_id, receipt, 'no', 0) from nightowls.read('jobs', 60, 1)",
    ),
    (
        "read and extend 10",
        830,
        "select nightowls.extend_many('jobs', array_agg(msg_id), array_agg(receipt), 60) from nightowls.read('jobs', 60, 10)",
    ),
    (
        "read and put off",
        600,
        "select nightowls.set_vt('jobs', msg_id, 86400) from nightowls.read('jobs', 60, 1)",
    ),
    ("pop", 410, "select * from nightowls.pop('jobs')"),
    ("pop of 10", 830, "select * from nightowls.pop('jobs', 10)"),
    (
        "read, nothing there but what is delayed",
        320,
        "select * from nightowls.read('later', 60, 10)",
    ),
    (
        "read of what has come due, and put off again",
        640,
        "select nightowls.nack('soon', msg_id, receipt) from nightowls.read('soon', 60, 1)",
    ),
    (
        "a cycle with priorities",
        800,
        "select nightowls.ack('ranked', msg_id, receipt), nightowls.send('ranked', '1', priority => (random() * 9)::int)
           from nightowls.read('ranked', 60, 1)",
    ),
    (
        "archive and delete",
        760,
        "select nightowls.archive('jobs', a.msg_id), nightowls.delete('jobs', b.msg_id)
           from nightowls.read('jobs', 60, 1) a, nightowls.read('jobs', 60, 1) b",
    ),
];

/// Sessions as `plan_cache_mode` has them plan.
fn sessions(db: &Db) -> [(&'static str, Session); 2] {
    ["auto", "force_generic_plan"].map(|mode| {
        let mut session = db.service();
        session.exec(&format!("set plan_cache_mode = {mode}"));
        (mode, session)
    })
}

/// Notes each call that goes beyond its bound. Now and then a call also moves a mark, or looks for more: so it is three calls that
/// must do so, one after the other, as with a bad plan they would.
fn measure(sessions: &mut [(&str, Session); 2], when: &str, wrong: &mut Vec<String>) {
    for (mode, session) in sessions {
        for (name, bound, sql) in BOUNDS {
            let found = (0..3)
                .map(|_| buffers(session, sql))
                .find(|found| found <= bound)
                .unwrap_or_else(|| buffers(session, sql));
            if std::env::var_os("NIGHTOWLS_SHOW_BUFFERS").is_some() {
                println!("{when}, {mode}: {name}: {found}");
            }
            if found > *bound {
                wrong.push(format!(
                    "{when}, {mode}: {name}: {found} buffers, at most {bound}"
                ));
            }
        }
    }
}

const TABLES: [&str; 6] = [
    "queue_messages",
    "queue_marks",
    "queue_due_marks",
    "queue_dedup",
    "queue_archive",
    "queues",
];

fn analyze(session: &mut Session) {
    for table in TABLES {
        session.exec(&format!("analyze nightowls.{table}"));
    }
}

/// As after a restore or a crash: nothing was ever analyzed.
fn forget_statistics(session: &mut Session) {
    for table in TABLES {
        session.exec(&format!(
            "delete from pg_statistic where starelid = 'nightowls.{table}'::regclass;
             update pg_class set reltuples = -1, relpages = 0, relallvisible = 0 where oid = 'nightowls.{table}'::regclass;
             update pg_class set reltuples = -1, relpages = 0
              where oid in (select indexrelid from pg_index where indrelid = 'nightowls.{table}'::regclass)"
        ));
    }
}

/// Brings the queues to `rows` messages: of each five two that can be read in `jobs`, one delayed there, one delayed in `later`,
/// one of 1,000 groups in `grouped`; and as many keys.
fn grow(session: &mut Session, rows: u64) {
    session.exec(&format!(
        "insert into nightowls.queue_messages (org_id, queue_id, state, msg_id, line_no, due_at, group_key, message)
         select q.org_id, q.queue_id,
                case when i % 5 < 2 then 'r' when i % 5 < 4 then 'd' when i / 5 < 1000 then 'r' else 'w' end::\"char\",
                n.line_no, n.line_no, now() + case when i % 5 in (2, 3) then interval '1 day' else interval '0' end,
                case when i % 5 = 4 then 'g' || (i / 5) % 1000 end, '1'
           from generate_series(0, {rows} - 1) i
           join nightowls.queues q on q.name = case i % 5 when 3 then 'later' when 4 then 'grouped' else 'jobs' end
          cross join lateral (select nextval('nightowls.queue_line_no') + 0 * i as line_no) n;
         insert into nightowls.queue_dedup (org_id, queue_id, dedup_key, msg_id, body)
         select q.org_id, q.queue_id, 'key ' || i, i, sha256('1') from generate_series(1, {rows}) i join nightowls.queues q on q.name = 'jobs';
         select nightowls.send('jobs', '1', dedup_key => 'known'), nightowls.send('soon', '1'),
                (select count(nightowls.send('ranked', '1', priority => i % 10)) from generate_series(1, 100) i)"
    ));
}

fn empty(session: &mut Session) {
    session.exec(
        "truncate nightowls.queue_messages, nightowls.queue_marks, nightowls.queue_due_marks, nightowls.queue_dedup, nightowls.queue_archive",
    );
}

#[test]
fn hot_calls_touch_as_few_buffers_with_many_messages_as_with_none() {
    // With NIGHTOWLS_FULL set a million.
    let many = if full() { 1_000_000 } else { 200_000 };
    on_each_install(|db| {
        default_org(db);
        let mut superuser = db.superuser();
        for table in &TABLES[..5] {
            superuser.exec(&format!(
                "alter table nightowls.{table} set unlogged; alter table nightowls.{table} set (autovacuum_enabled = off)"
            ));
        }
        superuser.exec(
            "select nightowls.create_queue(n) from unnest('{jobs,later,keyed,ranked}'::text[]) n;
             select nightowls.create_queue('soon', backoff => '1 microsecond', max_backoff => '1 microsecond');
             select nightowls.create_queue('grouped', max_attempts => 1);
             select nightowls.create_queue('other ' || i) from generate_series(1, 300) i",
        );
        let mut wrong = Vec::new();
        let mut fresh = |when: &str| measure(&mut sessions(db), when, &mut wrong);
        fresh("0 messages, never analyzed");

        empty(&mut superuser);
        analyze(&mut superuser);
        let mut old = sessions(db);
        let mut late = Vec::new();
        measure(&mut old, "0 messages, analyzed when empty", &mut late);
        grow(&mut superuser, 50_000);
        measure(&mut old, "50,000 messages, planned when empty", &mut late);
        fresh("50,000 messages, analyzed when empty");

        empty(&mut superuser);
        grow(&mut superuser, 1_000);
        analyze(&mut superuser);
        let mut old = sessions(db);
        measure(&mut old, "1,000 messages, fresh statistics", &mut late);

        empty(&mut superuser);
        grow(&mut superuser, many);
        let analyzed = "select reltuples < 10000 from pg_class where oid = 'nightowls.queue_messages'::regclass";
        assert_eq!(text(&mut superuser, analyzed), "t");
        measure(
            &mut old,
            &format!("{many} messages, planned at 1,000"),
            &mut late,
        );
        fresh(&format!("{many} messages, statistics of 1,000"));
        analyze(&mut superuser);
        fresh(&format!("{many} messages, fresh statistics"));
        forget_statistics(&mut superuser);
        fresh(&format!("{many} messages, no statistics"));

        wrong.append(&mut late);
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    });
}
