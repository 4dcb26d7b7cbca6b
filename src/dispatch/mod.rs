//! Sending the outbox's requests: what was leased becomes an HTTP request, and what came of it an outcome.
//!
//! SQL leases and settles (sql/61_requests.sql, 62_responses.sql); here is what lies between, with no transaction open. [`job`] is
//! pure, [`pool`] are the threads that send, and touch nothing of Postgres.

pub mod job;
pub mod pool;

#[cfg(feature = "extension")]
mod extern_layer;
#[cfg(feature = "extension")]
pub mod settings;
