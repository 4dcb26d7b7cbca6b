//! Threads that send. They touch nothing of Postgres, and no signal reaches them.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::RawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use super::job::Job;
use crate::http::{Client, Failure, FailureKind, Policy, Response, without_signals};

/// What a thread needs; a handshake of TLS is the most.
const STACK: usize = 512 * 1_024;

/// A request that was sent, or failed to be.
pub struct Done {
    /// What it was.
    pub job: Job,
    /// What came of it.
    pub answer: Result<Response, Failure>,
    /// How long it took.
    pub took: Duration,
}

struct Task {
    job: Job,
    client: Client,
    policy: Policy,
}

#[derive(Default)]
struct Work {
    todo: VecDeque<Task>,
    done: Vec<Done>,
    /// Threads that have nothing to do.
    idle: usize,
    threads: usize,
    /// Given to the pool and not taken back yet.
    under_way: usize,
    /// What threads are sending just now, by a number of its own.
    sending: BTreeMap<u64, Job>,
    last: u64,
}

struct Shared {
    work: Mutex<Work>,
    more: Condvar,
    finished: Condvar,
    /// Written to when something is done; -1 for nobody.
    bell: RawFd,
}

/// A pool that grows up to as many threads as there are requests under way.
pub struct Pool(Arc<Shared>);

impl Pool {
    /// A pool that writes a byte to `bell` when something is done.
    pub fn new(bell: Option<RawFd>) -> Self {
        Self(Arc::new(Shared {
            work: Mutex::default(),
            more: Condvar::new(),
            finished: Condvar::new(),
            bell: bell.unwrap_or(-1),
        }))
    }

    /// Sends a request in some thread.
    pub fn send(&self, job: Job, client: &Client, policy: Policy) {
        let mut work = self.0.lock();
        work.under_way += 1;
        work.todo.push_back(Task {
            job,
            client: client.clone(),
            policy,
        });
        if work.idle >= work.todo.len() {
            self.0.more.notify_one();
            return;
        }
        let shared = Arc::clone(&self.0);
        let spawned = without_signals(|| {
            thread::Builder::new()
                .name("nightowls http".to_owned())
                .stack_size(STACK)
                .spawn(move || shared.run())
        });
        if spawned.is_ok() {
            work.threads += 1;
        } else if work.threads == 0 {
            // Nobody will ever take it.
            let task = work.todo.pop_back().expect("it was put there");
            work.done.push(Done {
                job: task.job,
                answer: Err(failed("the system gave no thread")),
                took: Duration::ZERO,
            });
            self.0.ring();
        }
    }

    /// What was done since the last call.
    pub fn take_done(&self) -> Vec<Done> {
        let mut work = self.0.lock();
        work.under_way -= work.done.len();
        std::mem::take(&mut work.done)
    }

    /// How many were given to it and not taken back yet.
    pub fn under_way(&self) -> usize {
        self.0.lock().under_way
    }

    /// Waits until something is done, or for so long.
    pub fn wait(&self, longest: Duration) {
        let work = self.0.lock();
        if work.done.is_empty() && work.under_way > 0 {
            drop(self.0.finished.wait_timeout(work, longest));
        }
    }

    /// What threads are sending just now.
    pub fn sending(&self) -> Vec<Job> {
        self.0.lock().sending.values().cloned().collect()
    }

    /// Takes back what no thread has begun.
    pub fn take_back(&self) -> Vec<Job> {
        let mut work = self.0.lock();
        work.under_way -= work.todo.len();
        work.todo.drain(..).map(|task| task.job).collect()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ring(&self) {
        if self.bell >= 0 {
            // SAFETY: the descriptor is the pool's owner's, who keeps it open. A pipe that is full has rung already.
            unsafe { libc::write(self.bell, [1_u8].as_ptr().cast(), 1) };
        }
        self.finished.notify_all();
    }

    fn run(&self) {
        let mut work = self.lock();
        loop {
            let Some(task) = work.todo.pop_front() else {
                work.idle += 1;
                work = self.more.wait(work).unwrap_or_else(PoisonError::into_inner);
                work.idle -= 1;
                continue;
            };
            work.last += 1;
            let number = work.last;
            work.sending.insert(number, task.job.clone());
            drop(work);
            let started = Instant::now();
            let now = SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0, |now| now.as_secs());
            let request = task.job.request(task.policy, now);
            let answer = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                task.client.send(&request)
            }))
            .unwrap_or_else(|_| Err(failed("the client failed")));
            let took = started.elapsed();
            work = self.lock();
            work.sending.remove(&number);
            work.done.push(Done {
                job: task.job,
                answer,
                took,
            });
            self.ring();
        }
    }
}

fn failed(message: &str) -> Failure {
    Failure {
        kind: FailureKind::Connection,
        message: message.to_owned(),
        retryable: true,
    }
}
