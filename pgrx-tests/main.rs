//! The suite: a client of throwaway servers that sees nightowls as any program
//! sees it. `make test` runs it; README.md says how to run one test alone.

mod api;
mod append;
mod append_only;
mod async_projections;
mod bad_input;
mod catalog;
mod cdc;
mod compaction;
mod consumers;
mod dump;
mod erasure;
mod errors;
mod fixture;
mod floor_history;
mod floors;
mod fold;
mod harness;
mod horizon;
mod import;
mod locks;
mod migration;
mod orm;
mod plans;
mod privileges;
mod projections;
mod queue;
mod queue_marks;
mod read_models;
mod readme;
mod snapshots;
mod streams;
mod supabase;
mod support;
mod tenancy;
mod wait;
