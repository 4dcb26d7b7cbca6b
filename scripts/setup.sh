#!/usr/bin/env bash
# Installs what is missing on a Debian or Ubuntu machine, and says what.
# usage: scripts/setup.sh [rust] [build] [test] [demo] [bench]
#
# Nothing is missing: nothing is done, in well under a second. What is optional
# and cannot be had is a printed `skip`, not a failure.
source "$(dirname "$0")/common.sh"

rust_needed=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$root/Cargo.toml")

as_root() {
  if [ "$(id -u)" = 0 ]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    die "root is needed for: $* (no sudo here)"
  fi
}

installed() {
  [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

lists_read=
read_lists() {
  if [ -z "$lists_read" ]; then
    note 'reading the package lists (apt-get update)'
    as_root apt-get -qq update >/dev/null || note 'apt-get update failed; going on with the lists that are there'
    lists_read=yes
  fi
}

available() {
  [ -n "$(apt-cache policy "$1" 2>/dev/null | sed -n 's/^ *Candidate: \([^(].*\)/\1/p')" ]
}

apt_install() {
  note "installing $*"
  local said
  said=$(as_root env DEBIAN_FRONTEND=noninteractive \
    apt-get -qq install -y --no-install-recommends -o Dpkg::Use-Pty=0 "$@" 2>&1) && return
  printf '%s\n' "$said" >&2
  return 1
}

# need <package>…: those that are missing, or failure.
need() {
  local package missing=()
  for package in "$@"; do
    installed "$package" || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null || die "install these by hand, this is neither Debian nor Ubuntu: ${missing[*]}"
  read_lists
  apt_install "${missing[@]}" || die "could not install ${missing[*]}"
}

# want <package> [<command>]: unless the command or the package is there.
want() {
  local package=$1 command=${2:-}
  if [ -n "$command" ] && PATH=$PATH:/usr/sbin command -v "$command" >/dev/null; then return 0; fi
  installed "$package" && return 0
  if ! command -v apt-get >/dev/null; then
    skip "$package (not installed)"
    return 0
  fi
  read_lists
  if ! available "$package" || ! apt_install "$package"; then
    skip "$package (cannot be had here)"
  fi
}

# PostgreSQL 15, or else the oldest supported one that there is.
server() {
  local pg
  if "$root/scripts/server.sh" installed >/dev/null; then return; fi
  if command -v apt-cache >/dev/null; then
    read_lists
    for pg in 15 16 17 18; do
      if available "postgresql-server-dev-$pg"; then
        without_main_cluster need "postgresql-$pg" "postgresql-server-dev-$pg"
        return
      fi
    done
  fi
  "$root/scripts/server.sh" default >/dev/null ||
    die 'no PostgreSQL 15 to 18 in the package lists: add https://wiki.postgresql.org/wiki/Apt or set PG_CONFIG'
}

# The packages would start a server of their own on port 5432: not for us.
without_main_cluster() {
  local folder=/etc/postgresql-common/createcluster.d
  if installed postgresql-common; then
    "$@"
    return
  fi
  as_root mkdir -p "$folder"
  printf 'create_main_cluster = false\n' | as_root tee "$folder/nightowls.conf" >/dev/null
  local status=0
  "$@" || status=$?
  as_root rm -f "$folder/nightowls.conf"
  return "$status"
}

rust() {
  if ! command -v cargo >/dev/null; then
    note 'installing Rust with rustup (the rustc of Debian 12 and Ubuntu 24.04 is older than the'
    note "$rust_needed this project needs); to do it by hand: https://rustup.rs"
    need curl ca-certificates
    local installer
    installer=$(mktemp -d)/rustup-init
    { curl --proto '=https' --tlsv1.2 -sSf -o "$installer" \
      "https://static.rust-lang.org/rustup/dist/$(uname -m)-unknown-linux-gnu/rustup-init" &&
      chmod +x "$installer" &&
      "$installer" -y --quiet --profile minimal --component clippy --component rustfmt >/dev/null; } ||
      die 'rustup could not install Rust; see https://rustup.rs'
    rm -r "$(dirname "$installer")"
    PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
  fi
  local have
  have=$(cargo --version | cut -d ' ' -f 2)
  if [ "$(printf '%s\n' "$rust_needed" "$have" | sort -V | head -n 1)" != "$rust_needed" ]; then
    die "cargo $have is older than $rust_needed: rustup update stable (https://rustup.rs)"
  fi
}

build() {
  if command -v apt-get >/dev/null; then
    need build-essential pkg-config libclang-dev ca-certificates xz-utils
  elif ! command -v cc >/dev/null; then
    die 'no C compiler (cc)'
  fi
  server
  rust
}

test_group() {
  local pg package
  build
  want pgbouncer pgbouncer
  pg=$("$root/scripts/server.sh" default)
  for package in plpgsql-check wal2json pglogical cron; do
    if [ -d "/usr/lib/postgresql/$pg" ]; then
      want "postgresql-$pg-$package"
    fi
  done
  want nodejs node
  want npm npm
  want python3-venv
  want jq jq
  want shellcheck shellcheck
  want tmux tmux
  want chromium chromium
}

[ $# -gt 0 ] || set -- build
for group in "$@"; do
  case $group in
    rust) rust ;;
    build) build ;;
    test) test_group ;;
    demo)
      build
      want git git
      want jq jq
      ;;
    bench) build ;;
    *) die "unknown group \"$group\" (rust, build, test, demo, bench)" ;;
  esac
done
