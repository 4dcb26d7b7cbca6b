//! Folding events into state.
//!
//! A reducer says what each event type does to a JSON state. The core knows
//! nothing of Postgres: [`reducer`] reads a reducer, [`apply`] runs it on an
//! event, [`dry`] on events that are JSON themselves, [`json`] and [`decimal`]
//! hold the values. `sql/plain/fold.sql` is the twin of all this, with the same
//! answers and the same errors; the suite compares them on random input.

pub mod apply;
pub mod decimal;
pub mod dry;
pub mod json;
pub mod reducer;

#[cfg(feature = "extension")]
pub(crate) mod extern_layer;

pub use apply::{Event, FoldError};
pub use decimal::Decimal;
pub use json::Json;
pub use reducer::{Invalid, Reducer};
