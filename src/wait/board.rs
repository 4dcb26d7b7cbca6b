//! The board that all backends share: counts by key, and who sleeps for what.

use std::mem::{align_of, size_of};
use std::ptr::slice_from_raw_parts;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicU64, AtomicUsize};

use super::CLASS;

/// Two keys that share a count make a wait return early now and then, no more.
const COUNTS: usize = 1_024;

/// Lies in memory that every backend maps; all zeroes is a board on which nobody
/// sleeps.
///
/// Why no wake-up is lost: who sleeps has written its key, then reads the count;
/// who wakes has moved the count, then reads the keys. All four are in one total
/// order, so that either the sleeper sees the count moved or the waker sees the
/// key.
#[repr(C)]
pub struct Board {
    counts: [AtomicU64; COUNTS],
    /// How many sleep, whatever for: who wakes nobody does not look through all.
    asleep: AtomicU64,
    /// One for each backend.
    beds: [Bed],
}

#[repr(C)]
struct Bed {
    /// The hash of the key that its owner sleeps for, and 0 while it is awake. The
    /// owner writes a hash; the owner and a waker write 0.
    key: AtomicU64,
    /// Where the owner's latch lies, written before the key.
    latch: AtomicUsize,
}

impl Board {
    /// The bytes that a board for so many backends takes.
    pub const fn size(backends: usize) -> usize {
        size_of::<[AtomicU64; COUNTS + 1]>() + backends * size_of::<Bed>()
    }

    /// The board that lies at `start`.
    ///
    /// # Safety
    ///
    /// From `start`, which must be aligned, there must be [`Board::size`] bytes
    /// that stay where they are and are used as a board only; zeroes at first.
    pub unsafe fn at<'a>(start: *mut u8, backends: usize) -> &'a Board {
        debug_assert!(start.align_offset(align_of::<Bed>()) == 0);
        // SAFETY: by this function's own condition. All fields are atomics; the
        // length of the struct's pointer is that of its last field.
        unsafe { &*(slice_from_raw_parts(start, backends) as *const Board) }
    }

    /// How often a key was woken. Keys share counts, so it may move without.
    pub fn count(&self, key: u64) -> u64 {
        self.counts[key as usize % COUNTS].load(SeqCst)
    }

    /// Wakes at most `limit` of those who sleep for `key`; `rouse` is called with
    /// the latch of each.
    pub fn wake(&self, key: u64, limit: u32, rouse: impl FnMut(usize)) {
        self.counts[key as usize % COUNTS].fetch_add(1, SeqCst);
        self.rouse(|sleeps_for| sleeps_for == key, limit, rouse);
    }

    /// Wakes the readers of a class of holds, or of all: see [`super::readers`].
    pub fn wake_readers(&self, readers: u64, rouse: impl FnMut(usize)) {
        if readers & CLASS < 256 {
            return self.wake(readers, u32::MAX, rouse);
        }
        let block = readers & !CLASS;
        for key in block..block + 256 {
            self.counts[key as usize % COUNTS].fetch_add(1, SeqCst);
        }
        self.rouse(|sleeps_for| sleeps_for & !CLASS == block, u32::MAX, rouse);
    }

    /// Wakes everybody, whatever they sleep for.
    pub fn wake_all(&self, rouse: impl FnMut(usize)) {
        for count in &self.counts {
            count.fetch_add(1, SeqCst);
        }
        self.rouse(|_| true, u32::MAX, rouse);
    }

    fn rouse(&self, is_meant: impl Fn(u64) -> bool, limit: u32, mut rouse: impl FnMut(usize)) {
        if self.asleep.load(SeqCst) == 0 {
            return;
        }
        let mut left = limit;
        for bed in &self.beds {
            if left == 0 {
                return;
            }
            let sleeps_for = bed.key.load(SeqCst);
            if sleeps_for != 0
                && is_meant(sleeps_for)
                // Whoever writes the 0 has woken it: two wakers never take one
                // sleeper for two.
                && bed
                    .key
                    .compare_exchange(sleeps_for, 0, SeqCst, SeqCst)
                    .is_ok()
            {
                left -= 1;
                rouse(bed.latch.load(SeqCst));
            }
        }
    }

    /// Lies down: from now on `key` wakes backend `number`, until it rises.
    pub fn lie_down(&self, number: usize, key: u64, latch: usize) {
        let bed = &self.beds[number];
        self.asleep.fetch_add(1, SeqCst);
        bed.latch.store(latch, SeqCst);
        bed.key.store(key, SeqCst);
    }

    /// Whether backend `number`, which has lain down, was woken since.
    pub fn is_woken(&self, number: usize) -> bool {
        self.beds[number].key.load(SeqCst) == 0
    }

    /// Gets up after [`Board::lie_down`]. True if somebody has woken it, who may
    /// have woken nobody else: one that will not look has to pass it on.
    pub fn rise(&self, number: usize) -> bool {
        let woken = self.beds[number].key.swap(0, SeqCst) == 0;
        self.asleep.fetch_sub(1, SeqCst);
        woken
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::sync::mpsc::{SyncSender, sync_channel};
    use std::thread;

    use super::*;

    fn board(backends: usize) -> &'static Board {
        let words = vec![0_u64; Board::size(backends) / size_of::<u64>()].leak();
        // SAFETY: aligned, zero and never freed.
        unsafe { Board::at(words.as_mut_ptr().cast(), backends) }
    }

    fn woken(wake: impl FnOnce(&mut dyn FnMut(usize))) -> Vec<usize> {
        let mut numbers = Vec::new();
        wake(&mut |number| numbers.push(number));
        numbers
    }

    #[test]
    fn a_board_has_the_size_that_it_says() {
        let board = board(7);
        assert_eq!(size_of_val(board), Board::size(7));
        assert_eq!(board.beds.len(), 7);
    }

    #[test]
    fn only_those_who_sleep_for_the_key_are_woken() {
        let board = board(4);
        board.lie_down(0, 11, 0);
        board.lie_down(2, 22, 2);
        board.lie_down(3, 11, 3);
        assert_eq!(woken(|rouse| board.wake(11, u32::MAX, rouse)), [0, 3]);
        assert!(board.is_woken(0) && board.is_woken(3) && !board.is_woken(2));
        assert_eq!(woken(|rouse| board.wake(11, u32::MAX, rouse)), [0; 0]);
        assert!(board.rise(0) && board.rise(3) && !board.rise(2));
        assert_eq!(board.asleep.load(SeqCst), 0);
    }

    #[test]
    fn no_more_are_woken_than_asked_for() {
        let board = board(4);
        for number in 0..4 {
            board.lie_down(number, 11, number);
        }
        assert_eq!(woken(|rouse| board.wake(11, 1, rouse)), [0]);
        assert_eq!(woken(|rouse| board.wake(11, 2, rouse)), [1, 2]);
        assert_eq!(woken(|rouse| board.wake(11, 0, rouse)), [0; 0]);
        assert_eq!(woken(|rouse| board.wake(11, 2, rouse)), [3]);
    }

    #[test]
    fn waking_all_wakes_all_and_moves_every_count() {
        let board = board(3);
        board.lie_down(1, 11, 1);
        board.lie_down(2, 22, 2);
        let before = (board.count(11), board.count(33));
        assert_eq!(woken(|rouse| board.wake_all(rouse)), [1, 2]);
        assert_ne!(before, (board.count(11), board.count(33)));
        assert!(before.0 < board.count(11) && before.1 < board.count(33));
    }

    #[test]
    fn readers_are_woken_by_their_class_and_by_all() {
        let board = board(3);
        let (all, other) = (super::super::readers(1, 256), super::super::readers(2, 17));
        let (mine, next) = (super::super::readers(1, 17), super::super::readers(1, 18));
        let counts = [mine, next].map(|key| board.count(key));
        board.lie_down(0, mine, 0);
        board.lie_down(1, next, 1);
        board.lie_down(2, other, 2);
        assert_eq!(woken(|rouse| board.wake_readers(mine, rouse)), [0]);
        assert_ne!(board.count(mine), counts[0]);
        assert_eq!(board.count(next), counts[1]);
        board.rise(0);
        board.lie_down(0, mine, 0);
        assert_eq!(woken(|rouse| board.wake_readers(all, rouse)), [0, 1]);
        assert_ne!(board.count(next), counts[1]);
        assert!(!board.is_woken(2));
    }

    #[test]
    fn a_wake_between_the_count_and_the_bed_is_seen() {
        let board = board(1);
        let seen = board.count(11);
        assert_eq!(woken(|rouse| board.wake(11, u32::MAX, rouse)), [0; 0]);
        board.lie_down(0, 11, 0);
        assert_ne!(board.count(11), seen);
        assert!(!board.rise(0));
    }

    /// As a backend does it, with a channel of one place for a latch.
    fn sleep(
        board: &Board,
        number: usize,
        key: u64,
        seen: u64,
        latch: &std::sync::mpsc::Receiver<()>,
    ) {
        board.lie_down(number, key, number);
        if board.count(key) == seen {
            while !board.is_woken(number) {
                latch
                    .recv_timeout(std::time::Duration::from_secs(20))
                    .expect("a wake-up was lost");
            }
        }
        board.rise(number);
    }

    #[test]
    fn no_wake_up_is_lost_between_threads() {
        const SLEEPERS: usize = 4;
        const WORK: usize = 20_000;
        let board = board(SLEEPERS);
        let todo: &'static AtomicUsize = Box::leak(Box::default());
        let done: &'static AtomicUsize = Box::leak(Box::default());
        let (latches, wakers): (Vec<SyncSender<()>>, Vec<_>) =
            (0..SLEEPERS).map(|_| sync_channel(1)).unzip();
        let latches: &'static [SyncSender<()>] = latches.leak();
        let rouse = |number: usize| {
            // A latch that is set stays set.
            let _ = latches[number].try_send(());
        };

        let sleepers: Vec<_> = wakers
            .into_iter()
            .enumerate()
            .map(|(number, latch)| {
                thread::spawn(move || {
                    while done.load(SeqCst) < WORK {
                        let seen = board.count(11);
                        let took = todo
                            .fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1))
                            .is_ok();
                        if took {
                            if done.fetch_add(1, SeqCst) + 1 == WORK {
                                board.wake(11, u32::MAX, rouse);
                            }
                        } else if done.load(SeqCst) < WORK {
                            sleep(board, number, 11, seen, &latch);
                        }
                    }
                })
            })
            .collect();
        let makers = [0; 2].map(|_| {
            thread::spawn(move || {
                for _ in 0..WORK / 2 {
                    todo.fetch_add(1, SeqCst);
                    board.wake(11, 1, rouse);
                }
            })
        });

        for thread in sleepers.into_iter().chain(makers) {
            thread.join().expect("no thread waits in vain");
        }
        assert_eq!(done.load(SeqCst), WORK);
        assert_eq!(board.asleep.load(SeqCst), 0);
    }
}
