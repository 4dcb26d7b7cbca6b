//! The suite: a client of throwaway servers that sees nightowls as any program
//! sees it. `make test` runs it; README.md says how to run one test alone.

mod api;
mod catalog;
mod harness;
mod migration;
mod supabase;
mod support;
