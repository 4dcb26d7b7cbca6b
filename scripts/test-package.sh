#!/usr/bin/env bash
# pgrx's own tools must make of the sources the extension that `owl script` makes.
# usage: scripts/test-package.sh <folder to package into>
source "$(dirname "$0")/common.sh"

# Each statement of a script, without what pgrx writes around them.
statements() { sed -e '/^\/\*$/,/^\*\/$/d' -e '/^\/\*.*\*\/$/d' -e '/^ *--/d' -e '/^ *$/d' "$1"; }

out=$("$root/scripts/package.sh" "$1")
ours=$(cd "$root" && cargo run --quiet --bin owl -- script)
theirs=$(find "$out" -name "nightowls--$version.sql")
name='test cargo pgrx package makes the extension of owl script'
if diff <(statements /dev/stdin <<<"$ours") <(statements "$theirs"); then
  echo "$name ... ok"
else
  echo "$name ... FAILED"
  exit 1
fi
