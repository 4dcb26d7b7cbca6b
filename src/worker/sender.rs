//! Sends the requests of one database: leases them in one transaction, sends them in none, settles them in the next.

use std::collections::{BTreeSet, HashMap};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use pgrx::bgworkers::BackgroundWorker;
use pgrx::prelude::*;
use serde_json::{Value, json};

use super::session::{
    attach_signals, connect, finds, obey, sleep, stops, take_role, transaction, value,
};
use crate::dispatch::job::{self, Job};
use crate::dispatch::pool::Pool;
use crate::dispatch::settings;
use crate::http::Client;
use crate::wait;

/// The key that is woken when there may be something to send.
const KEY: &str = "dispatch";
/// The longest it sleeps: leases of others run out without a word.
const LONGEST: Duration = Duration::from_secs(5);
/// How long requests have to end when the process is to stop.
const GRACE: Duration = Duration::from_millis(700);
/// So many endpoints are settled in one transaction: each is a lock.
const ENDPOINTS: usize = 24;

/// Begun by the launcher.
#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn nightowls_sender(_argument: pg_sys::Datum) {
    // A settlement under way is not broken off: lock_timeout bounds it.
    attach_signals(false);
    let database = BackgroundWorker::get_extra().to_owned();
    connect(&database);
    match take_role(0) {
        Ok(true) => (),
        // The one before is still ending.
        Ok(false) => return,
        Err(error) => return log!("nightowls: {error}"),
    }
    let client = match settings::client() {
        Ok(client) => client,
        Err(fault) => {
            log!("nightowls: {fault}");
            return sleep(Duration::from_secs(30));
        }
    };
    Sender::new(client).run();
}

struct Sender {
    client: Client,
    pool: Pool,
    bell: std::io::PipeReader,
    /// Kept open for the pool.
    _ringer: std::io::PipeWriter,
    flights: HashMap<i64, usize>,
    /// What has come and is not settled yet: an endpoint and the outcome.
    outcomes: Vec<(i64, Value)>,
    /// When it was last asked whether the extension is here, and the answer.
    here: Option<(Instant, bool)>,
    /// How many transactions have failed in a row.
    failures: u32,
}

impl Sender {
    fn new(client: Client) -> Self {
        let (bell, ringer) = std::io::pipe().expect("the system gives a pipe");
        for end in [bell.as_raw_fd(), ringer.as_raw_fd()] {
            // SAFETY: both are open and ours.
            unsafe { libc::fcntl(end, libc::F_SETFL, libc::O_NONBLOCK) };
        }
        Self {
            client,
            pool: Pool::new(Some(ringer.as_raw_fd())),
            bell,
            _ringer: ringer,
            flights: HashMap::new(),
            outcomes: Vec::new(),
            here: None,
            failures: 0,
        }
    }

    fn run(&mut self) {
        while !stops() {
            obey();
            if !self.is_here() {
                self.collect();
                sleep(LONGEST);
                continue;
            }
            let seen = wait::count_of(KEY);
            let had_outcomes = self.collect();
            let free = settings::max_in_flight().saturating_sub(self.pool.under_way());
            if free == 0 && self.outcomes.is_empty() {
                wait::doze(KEY, seen, LONGEST, self.bell.as_raw_fd());
                continue;
            }
            match self.turn(free) {
                Ok(leased) => {
                    self.failures = 0;
                    if leased > 0 || had_outcomes || !self.outcomes.is_empty() {
                        // There may be more.
                        self.drain_bell();
                        if leased == 0 || self.pool.under_way() < settings::max_in_flight() {
                            continue;
                        }
                    }
                    let longest = self.next();
                    wait::doze(KEY, seen, longest, self.bell.as_raw_fd());
                }
                Err(error) => {
                    // Such as a lock that a DROP EXTENSION has: nothing is lost, it is done later.
                    self.failures += 1;
                    self.here = None;
                    if self.failures.is_power_of_two() {
                        log!("nightowls: sending is held up: {error}");
                    }
                    sleep(Duration::from_millis(100 << self.failures.min(6)));
                }
            }
        }
        self.end();
    }

    /// Takes what the threads have done. Returns whether there was anything.
    fn collect(&mut self) -> bool {
        self.drain_bell();
        let done = self.pool.take_done();
        let any = !done.is_empty();
        for done in done {
            self.land(done.job.endpoint_id);
            let outcome = done.job.outcome(&done.answer, done.took);
            self.outcomes.push((done.job.endpoint_id, outcome));
        }
        any
    }

    fn land(&mut self, endpoint_id: i64) {
        if let Some(count) = self.flights.get_mut(&endpoint_id) {
            *count -= 1;
            if *count == 0 {
                self.flights.remove(&endpoint_id);
            }
        }
    }

    fn drain_bell(&mut self) {
        let mut rung = [0; 256];
        while self
            .bell
            .read(&mut rung)
            .is_ok_and(|count| count == rung.len())
        {}
    }

    /// The outcomes of as many endpoints as one transaction may lock.
    fn batch(&self) -> (Vec<usize>, Value) {
        let mut endpoints = BTreeSet::new();
        let mut places = Vec::new();
        for (place, (endpoint, _)) in self.outcomes.iter().enumerate() {
            if endpoints.len() < ENDPOINTS || endpoints.contains(endpoint) {
                endpoints.insert(*endpoint);
                places.push(place);
            }
        }
        let batch = places
            .iter()
            .map(|place| self.outcomes[*place].1.clone())
            .collect();
        (places, Value::Array(batch))
    }

    /// Settles what has come and leases as much as there is room for, in one transaction. Returns how much was leased.
    fn turn(&mut self, free: usize) -> Result<usize, String> {
        let (places, batch) = self.batch();
        let flights: Value = self
            .flights
            .iter()
            .map(|(endpoint, count)| (endpoint.to_string(), json!(count)))
            .collect::<serde_json::Map<_, _>>()
            .into();
        let (settles, batch) = (!places.is_empty(), batch.to_string());
        let flights = flights.to_string();
        let leased = transaction("nightowls: settles and leases requests", || {
            if settles {
                value("select nightowls._settle_batch($1)::text", &[batch.into()]);
            }
            if free == 0 {
                return None;
            }
            value(
                "select nightowls._lease_batch($1, $2)",
                &[(free as i32).into(), flights.into()],
            )
        });
        let leased = match leased {
            Ok(leased) => leased,
            Err(error) => {
                self.drop_hopeless(&places, &error);
                return Err(error);
            }
        };
        let mut place = 0;
        self.outcomes.retain(|_| {
            place += 1;
            places.binary_search(&(place - 1)).is_err()
        });
        let Some(leased) = leased else {
            return Ok(0);
        };
        let jobs = job::parse(&leased)?;
        let count = jobs.len();
        let policy = settings::policy();
        for job in jobs {
            *self.flights.entry(job.endpoint_id).or_default() += 1;
            self.pool.send(job, &self.client, policy);
        }
        Ok(count)
    }

    /// What cannot be settled time and again is let go one at a time: its lease runs out, and it is sent again.
    fn drop_hopeless(&mut self, places: &[usize], error: &str) {
        if self.failures >= 20 && !places.is_empty() {
            log!("nightowls: a response cannot be written down: {error}");
            self.outcomes.remove(places[0]);
        }
    }

    /// How long nothing can be sent by the clock alone.
    fn next(&self) -> Duration {
        if self.pool.under_way() >= settings::max_in_flight() {
            return LONGEST;
        }
        transaction("nightowls: looks what is due", || {
            value(
                "select nightowls._next_request_ms($1)::text",
                &[(LONGEST.as_millis() as i32).into()],
            )
        })
        .ok()
        .flatten()
        .and_then(|ms| ms.parse().ok())
        .map_or(LONGEST, Duration::from_millis)
    }

    fn is_here(&mut self) -> bool {
        match self.here {
            Some((asked, answer)) if answer && asked.elapsed() < LONGEST => true,
            _ => {
                let answer = finds(&[
                    "nightowls._settle_batch(text)",
                    "nightowls._lease_batch(integer,text)",
                    "nightowls._next_request_ms(integer)",
                ])
                .into_iter()
                .all(|found| found);
                self.here = Some((Instant::now(), answer));
                answer
            }
        }
    }

    /// Lets requests end that are about to, writes down what came of them, and gives the others back.
    fn end(&mut self) {
        let until = Instant::now() + GRACE;
        let unsent = self.pool.take_back();
        loop {
            self.collect();
            let left = until.saturating_duration_since(Instant::now());
            if self.pool.under_way() == 0 || left.is_zero() {
                break;
            }
            self.pool.wait(left.min(Duration::from_millis(20)));
        }
        let given_back = |job: &Job| (job.endpoint_id, job.stopped());
        self.outcomes.extend(unsent.iter().map(given_back));
        self.outcomes
            .extend(self.pool.sending().iter().map(given_back));
        while !self.outcomes.is_empty() {
            let before = self.outcomes.len();
            if self.turn(0).is_err()
                || self.outcomes.len() == before
                || Instant::now() > until + GRACE
            {
                // Their leases run out.
                break;
            }
        }
    }
}
