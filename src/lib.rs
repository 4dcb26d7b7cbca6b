//! nightowls: the durable core of a swarm of AI agents, inside Postgres.
//!
//! `sql/` holds every stateful behaviour and is the one source of both
//! installs; Rust holds what SQL cannot do, or does slowly. The map:
//!
//! | module | concern |
//! | --- | --- |
//! | [`install`] | the ordered list of SQL files |
//! | [`migration`] | that list as an extension script or as migrations |
//! | [`dispatch`] | sending what was leased from the outbox |
//! | [`fold`] | folding events into state |
//! | [`embed`] | texts for embeddings, and a table owner's code |
//! | [`http`] | the client that requests and embeddings go by |
//! | [`redact`] | taking secrets out of JSON |
//! | [`wait`] | sleeping until a transaction has committed |
//! | `worker` | the background worker: sends, and runs the clock |

pub mod dispatch;
pub mod embed;
#[cfg(feature = "extension")]
mod error;
pub mod fold;
pub mod http;
pub mod install;
pub mod migration;
pub mod redact;
pub mod wait;
#[cfg(feature = "extension")]
mod worker;

#[cfg(feature = "extension")]
pgrx::pg_module_magic!(name, version);

/// Called when the library is loaded.
#[cfg(feature = "extension")]
#[pgrx::pg_guard]
pub extern "C-unwind" fn _PG_init() {
    dispatch::settings::init();
    wait::init();
    worker::init();
}
