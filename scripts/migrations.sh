#!/usr/bin/env bash
# Writes the plain install as migrations. Needs no Postgres.
# usage: scripts/migrations.sh <folder> [<option of owl install>…]
source "$(dirname "$0")/common.sh"

"$root/scripts/setup.sh" rust
folder=${1:?a folder, such as supabase/migrations}
shift
cargo run --quiet --manifest-path "$root/Cargo.toml" --bin owl -- install "$folder" "$@"
