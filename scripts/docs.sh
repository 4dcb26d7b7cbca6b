#!/usr/bin/env bash
# Rewrites docs/api.md from the comments in the database.
source "$(dirname "$0")/common.sh"

"$root/scripts/setup.sh" build
NIGHTOWLS_SERVER=$("$root/scripts/server.sh" tree)
export NIGHTOWLS_SERVER NIGHTOWLS_WRITE_DOCS=yes
cd "$root"
cargo test --quiet --test suite -- --exact api::the_reference_is_current >&2
note 'docs/api.md is current'
