# shellcheck shell=bash
# shellcheck disable=SC2034 # the variables are for the scripts that source this
# What the scripts beside this one share: source it, do not run it.
set -euo pipefail
shopt -s inherit_errexit

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$root/Cargo.toml" | head -n 1)

# Where rustup puts cargo: the login shell may not have it on the path yet.
if ! command -v cargo >/dev/null; then PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin; fi

# Messages go to standard error: standard output is for what a script returns.
say() { printf '\n==> %s\n' "$*" >&2; }
note() { printf '    %s\n' "$*" >&2; }
die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# A thing that cannot be done here, and is not an error.
skip() { printf 'skip: %s\n' "$*" >&2; }

# The major version of the server that a pg_config belongs to.
major_of() {
  "$1" --version | sed -n 's/^PostgreSQL \([0-9]*\).*/\1/p'
}
