//! Waiting without polling: a waiter sleeps until the transaction that concerns
//! it has committed and released its locks.
//!
//! A key is any text, hashed with its database. A waiter reads the key's count,
//! then looks whether there is work, then sleeps unless the count has moved. A
//! writer says in its transaction whom it concerns; the count moves and sleepers
//! are woken once everybody can see what it wrote. [`board`] is what all backends
//! share, [`pending`] what one transaction remembers; neither knows anything of
//! Postgres. `sql/plain/wait.sql` is the twin, which polls.

pub mod board;
pub mod pending;

#[cfg(feature = "extension")]
mod extern_layer;
#[cfg(feature = "extension")]
mod shared;

#[cfg(feature = "extension")]
pub use extern_layer::{count_of, doze};
#[cfg(feature = "extension")]
pub use shared::init;

use std::time::Duration;

/// The longest nap: a `commit prepared` wakes nobody.
pub const LONGEST_NAP: Duration = Duration::from_secs(20);

/// What a key is known by; never 0.
fn hash(database: u32, key: &[u8]) -> u64 {
    // FNV-1a, then a mixer, so that its low bits depend on every byte.
    let mut hash = 0xcbf2_9ce4_8422_2325;
    for byte in database.to_le_bytes().iter().chain(key) {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    }
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (hash ^ (hash >> 31)).max(1)
}

/// The bits of a readers' key that say which: 0 to 255 for a class of holds, 256
/// for all of them.
const CLASS: u64 = 0x1ff;

/// What the readers of a class of holds sleep for, or (256) those of every class.
pub fn readers(database: u32, class: u64) -> u64 {
    (hash(database, READERS) | 1 << 63) & !CLASS | class.min(256)
}

/// What a text is known by: `events/` and a class of holds for [`readers`], else
/// its hash.
pub fn key(database: u32, text: &[u8]) -> u64 {
    text.strip_prefix(READERS)
        .and_then(|class| std::str::from_utf8(class).ok()?.parse().ok())
        .map_or_else(|| hash(database, text), |class| readers(database, class))
}

const READERS: &[u8] = b"events/";

/// How long to sleep where nothing can wake a sleeper: short at first, for a
/// quick answer, and longer the longer it takes.
pub fn pause(nth: i32) -> Duration {
    let nth = nth.max(0).unsigned_abs();
    let first = (5_u64 << nth.min(4)).min(50);
    Duration::from_millis(first.max(u64::from(nth) / 2).min(250))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_another_one_in_another_database() {
        assert_ne!(hash(1, b"queue"), hash(2, b"queue"));
        assert_ne!(hash(1, b"queue"), hash(1, b"floor"));
        assert_eq!(hash(1, b"queue"), hash(1, b"queue"));
    }

    #[test]
    fn keys_spread_over_the_low_bits() {
        let mut seen = std::collections::BTreeSet::new();
        for number in 0..1_000 {
            seen.insert(hash(5, format!("floor/{number}").as_bytes()) % 1_024);
        }
        // Of 1,000 thrown into 1,024, some 640 are met.
        assert!(seen.len() > 590, "{}", seen.len());
    }

    #[test]
    fn the_readers_of_every_class_are_of_one_block() {
        assert_eq!(key(1, b"events/17"), readers(1, 17));
        assert_eq!(readers(1, 17) & !CLASS, readers(1, 256) & !CLASS);
        assert_ne!(readers(1, 17), readers(1, 18));
        assert_ne!(readers(1, 256) & !CLASS, readers(2, 256) & !CLASS);
        assert_eq!(key(1, b"events/x"), hash(1, b"events/x"));
    }

    #[test]
    fn pauses_grow_and_stay_short_enough_to_be_interrupted() {
        let mut before = Duration::ZERO;
        for nth in 0..2_000 {
            let pause = pause(nth);
            assert!(pause >= before, "{nth}");
            before = pause;
        }
        assert_eq!(pause(-1), Duration::from_millis(5));
        assert_eq!(pause(3), Duration::from_millis(40));
        assert_eq!(pause(4), Duration::from_millis(50));
        assert_eq!(pause(i32::MAX), Duration::from_millis(250));
    }
}
