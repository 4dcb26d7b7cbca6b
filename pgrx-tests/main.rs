//! The suite: a client of throwaway servers that sees nightowls as any program
//! sees it. `make test` runs it; README.md says how to run one test alone.

mod api;
mod catalog;
mod errors;
mod fold;
mod harness;
mod migration;
mod orm;
mod readme;
mod supabase;
mod support;
