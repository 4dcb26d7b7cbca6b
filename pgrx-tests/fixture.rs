//! What the tests of the log begin with: an org, and ways to compete.

use std::sync::Barrier;
use std::thread;

use crate::support::{Db, Refusal, SUPERUSER, Session, quote};

/// Makes an org, the default of the database; returns its id.
#[track_caller]
pub fn default_org(db: &Db) -> String {
    let org = new_org(db, "acme");
    db.direct(db.install().owner())
        .exec(&format!("select nightowls.set_default_org('{org}')"));
    org
}

/// Makes an org; returns its id.
#[track_caller]
pub fn new_org(db: &Db, name: &str) -> String {
    db.direct(db.install().owner())
        .value(&format!("select nightowls.create_org({})", quote(name)))
        .expect("create_org returns an id")
}

/// Makes an org whose open appends do not by chance share a lock with those of `other`.
#[track_caller]
pub fn org_apart_from(db: &Db, other: &str) -> String {
    let org = db
        .direct(SUPERUSER)
        .value(&format!(
            "select id::text from (select gen_random_uuid() as id from generate_series(1, 100)) ids \
             where nightowls._org_class(id) <> nightowls._org_class('{other}') limit 1"
        ))
        .expect("of a hundred ids one is of another class");
    db.direct(db.install().owner()).exec(&format!(
        "select nightowls.create_org('apart', org => '{org}')"
    ));
    org
}

/// A fingerprint of every event there is.
#[track_caller]
pub fn digest(db: &Db) -> String {
    db.direct(SUPERUSER)
        .value(
            "select count(*) || ' ' || coalesce(md5(string_agg(e::text, E'\\n' order by e.position, e.org_id)), '') \
             from nightowls.events e",
        )
        .expect("a count is never null")
}

/// Every row, as text, a null as `null`, the columns joined by a blank.
#[track_caller]
pub fn lines(session: &mut Session, sql: &str) -> Vec<String> {
    joined(session.rows(sql))
}

/// As [`lines`], of rows that are there already.
pub fn joined(rows: Vec<Vec<Option<String>>>) -> Vec<String> {
    rows.into_iter()
        .map(|row| {
            row.into_iter()
                .map(|column| column.unwrap_or_else(|| "null".to_owned()))
                .collect::<Vec<_>>()
                .join(" ")
        })
        .collect()
}

/// Runs `work` in `count` threads that begin at the same moment, each with its
/// number and what `prepare` made for it before.
pub fn together<P: Send, T: Send>(
    count: usize,
    prepare: impl Fn(usize) -> P + Sync,
    work: impl Fn(usize, P) -> T + Sync,
) -> Vec<T> {
    let barrier = Barrier::new(count);
    let prepared: Vec<P> = (0..count).map(&prepare).collect();
    thread::scope(|scope| {
        let threads: Vec<_> = prepared
            .into_iter()
            .enumerate()
            .map(|(number, prepared)| {
                let (barrier, work) = (&barrier, &work);
                scope.spawn(move || {
                    barrier.wait();
                    work(number, prepared)
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
            .collect()
    })
}

/// Whether the backend `pid` waits for a lock.
pub fn is_blocked(watcher: &mut Session, pid: i32) -> bool {
    watcher
        .value(&format!(
            "select 1 from pg_stat_activity where pid = {pid} and wait_event_type = 'Lock'"
        ))
        .is_some()
}

/// Random numbers that come again with the same seed (xorshift64*).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % bound
    }

    /// True `percent` times in a hundred.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// What `user` gets for `sql` in a transaction of its own on a member's session,
/// as an API runs it; nothing of it stays in the session.
pub fn as_user(session: &mut Session, user: &str, sql: &str) -> Result<Vec<String>, Refusal> {
    session.exec(&format!(
        "begin; select set_config('nightowls.user_id', {}, true)",
        quote(user)
    ));
    let answer = session.try_rows(sql);
    session.exec(if answer.is_ok() { "commit" } else { "rollback" });
    answer.map(joined)
}
