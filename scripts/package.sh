#!/usr/bin/env bash
# Makes a package with pgrx's own tools, which the other commands do without.
# usage: [PG=17] scripts/package.sh [<folder>]
source "$(dirname "$0")/common.sh"

pgrx_version=$(sed -n 's/^pgrx = .*"=\([0-9.]*\)".*/\1/p' "$root/Cargo.toml")
"$root/scripts/setup.sh" build
pg=${PG:-$("$root/scripts/server.sh" default)}
pg_config=$("$root/scripts/server.sh" pg_config "$pg") || die "no PostgreSQL $pg with its headers found (PG_CONFIG=/path names one)"
out=${1:-$target/package/nightowls-$version-pg$pg}

if [ "$(cargo pgrx --version 2>/dev/null)" != "cargo-pgrx $pgrx_version" ]; then
  note "installing cargo-pgrx $pgrx_version (takes some minutes)"
  # Without optimization: built in half the time, and quick enough.
  cargo install --locked --debug cargo-pgrx --version "$pgrx_version" >&2
fi

# A configuration of our own: the user's, if any, stays as it is.
export PGRX_HOME=$target/pgrx
mkdir -p "$PGRX_HOME"
cargo pgrx init "--pg$pg" "$pg_config" >/dev/null 2>&1 || die "cargo pgrx init refused $pg_config"

note "packaging nightowls $version for PostgreSQL $pg"
rm -rf "$out"
cd "$root"
CARGO_TARGET_DIR=$target cargo pgrx package --pg-config "$pg_config" --no-default-features --features "pg$pg" --out-dir "$out" >&2
printf '%s\n' "$out"
