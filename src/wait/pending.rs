//! Whom a transaction will wake when it has committed.

use std::cell::Cell;

/// So many keys a transaction remembers; beyond that it wakes everybody.
pub const MOST_KEYS: usize = 64;

/// The keys of one transaction. It allocates nothing, so that it can be emptied
/// where nothing may fail.
pub struct Pending {
    keys: [Cell<(u64, u32)>; MOST_KEYS],
    /// How many of them are used; one more means everybody.
    used: Cell<usize>,
}

/// What a transaction wakes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// So many of those who sleep for a key.
    Key(u64, u32),
    /// Everybody.
    All,
}

impl Pending {
    /// Nobody to wake.
    pub const fn new() -> Self {
        Self {
            keys: [const { Cell::new((0, 0)) }; MOST_KEYS],
            used: Cell::new(0),
        }
    }

    /// Adds `limit` of those who sleep for `key`.
    pub fn remember(&self, key: u64, limit: u32) {
        let used = self.used.get();
        // The newest first: a loop wakes the same key again and again.
        let known = self.keys[..used.min(MOST_KEYS)].iter().rev();
        if used > MOST_KEYS || limit == 0 {
            return;
        }
        for cell in known {
            let (known, so_far) = cell.get();
            if known == key {
                cell.set((key, so_far.saturating_add(limit)));
                return;
            }
        }
        if let Some(cell) = self.keys.get(used) {
            cell.set((key, limit));
        }
        self.used.set(used + 1);
    }

    /// Forgets all.
    pub fn forget(&self) {
        self.used.set(0);
    }

    /// Forgets all, telling each to `wake` first.
    pub fn deliver(&self, wake: impl FnMut(Wake)) {
        self.repeat(wake);
        self.forget();
    }

    /// Tells each to `wake` and keeps it.
    pub fn repeat(&self, mut wake: impl FnMut(Wake)) {
        let used = self.used.get();
        match self.keys.get(..used) {
            Some(keys) => {
                for cell in keys {
                    let (key, limit) = cell.get();
                    wake(Wake::Key(key, limit));
                }
            }
            None => wake(Wake::All),
        }
    }
}

impl Default for Pending {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delivered(pending: &Pending) -> Vec<Wake> {
        let mut all = Vec::new();
        pending.deliver(|wake| all.push(wake));
        all
    }

    #[test]
    fn a_key_is_delivered_once_with_all_its_limits() {
        let pending = Pending::new();
        pending.remember(1, 1);
        pending.remember(2, u32::MAX);
        pending.remember(1, 2);
        pending.remember(2, 5);
        pending.remember(3, 0);
        assert_eq!(
            delivered(&pending),
            [Wake::Key(1, 3), Wake::Key(2, u32::MAX)]
        );
        assert_eq!(delivered(&pending), []);
    }

    #[test]
    fn what_is_forgotten_is_not_delivered() {
        let pending = Pending::new();
        pending.remember(1, 1);
        pending.forget();
        pending.remember(2, 1);
        assert_eq!(delivered(&pending), [Wake::Key(2, 1)]);
    }

    #[test]
    fn more_keys_than_it_remembers_wake_everybody() {
        let pending = Pending::new();
        for key in 0..MOST_KEYS as u64 {
            pending.remember(key, 1);
        }
        for key in 0..MOST_KEYS as u64 {
            pending.remember(key, 1);
        }
        assert_eq!(delivered(&pending).len(), MOST_KEYS);
        for key in 0..1_000 {
            pending.remember(key, 1);
        }
        assert_eq!(delivered(&pending), [Wake::All]);
        assert_eq!(delivered(&pending), []);
    }
}
