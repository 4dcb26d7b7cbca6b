#!/usr/bin/env bash
# Finds PostgreSQL servers, builds the library for one and installs it.
#
#   scripts/server.sh installed      the version of a server that the machine has: 15, else the oldest
#   scripts/server.sh default        that, or else the oldest that an archive has
#   scripts/server.sh pg_config 17   its pg_config (with headers), or failure
#   scripts/server.sh tree 17        a private server with nightowls installed; prints its bin folder
#   scripts/server.sh remove         removes the private servers
#   scripts/server.sh install        into the server of PG_CONFIG (root may be needed; DESTDIR is honoured)
#
# PG_CONFIG=/path names the pg_config to use. A private server is a copy under
# target/servers/: the machine's own PostgreSQL and whatever runs are not touched.
source "$(dirname "$0")/common.sh"

archives=${NIGHTOWLS_ARCHIVES:-$root/../shared/postgres}
servers=${NIGHTOWLS_SERVERS:-$target/servers}

# Run by root, a server runs as another user, who may not get into a checkout
# under /root: then the copies are kept where that user can go.
if [ "$(id -u)" = 0 ]; then
  user=$(id -un postgres 2>/dev/null || echo nobody)
  mkdir -p "$servers"
  if ! setpriv --reuid="$user" --regid="$(id -g "$user")" --clear-groups test -x "$servers"; then
    servers=/var/tmp/nightowls-$(printf '%s' "$root" | sha256sum | cut -c 1-12)
  fi
fi

has_headers() { [ -f "$("$1" --includedir-server)/postgres.h" ]; }

# Where the machine has no such server: one unpacked from an archive.
unpacked() {
  local major=$1 tree=$servers/$1
  [ -f "$archives/postgres-$major.tar.xz" ] || return 1
  mkdir -p "$servers"
  (
    flock 8
    unpack "$archives/postgres-$major.tar.xz" "$tree"
  ) 8>"$servers/.unpacking" || return 1
  "$tree/bin/postgres" --version >/dev/null 2>&1 || return 1
  printf '%s\n' "$tree/bin/pg_config"
}

unpack() {
  local archive=$1 tree=$2 stamp
  stamp=$(stat -c '%n %s %Y' "$archive")
  if [ "$(cat "$tree/.stamp" 2>/dev/null)" = "$stamp" ]; then return; fi
  note "unpacking $(basename "$archive" .tar.xz)"
  rm -rf "$tree.new" "$tree"
  mkdir "$tree.new"
  tar -xJf "$archive" -C "$tree.new" --no-same-owner || return 1
  printf '%s' "$stamp" >"$tree.new/.stamp"
  mv "$tree.new" "$tree"
}

installed_pg_config() {
  local major=$1 candidate
  for candidate in "${PG_CONFIG:-}" "$(command -v pg_config || true)" "/usr/lib/postgresql/$major/bin/pg_config"; do
    if [ -n "$candidate" ] && [ -x "$candidate" ] && [ "$(major_of "$candidate")" = "$major" ] &&
      has_headers "$candidate" && [ -x "$("$candidate" --bindir)/postgres" ]; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  return 1
}

find_pg_config() { installed_pg_config "$1" || unpacked "$1"; }

# The oldest supported version of which <command> finds a pg_config.
oldest() {
  local major
  if [ -n "${PG_CONFIG:-}" ]; then
    major_of "$PG_CONFIG"
    return
  fi
  for major in 15 16 17 18; do
    if "$1" "$major" >/dev/null; then
      printf '%s\n' "$major"
      return
    fi
  done
  return 1
}

default_version() {
  oldest installed_pg_config || oldest unpacked ||
    die 'no PostgreSQL 15 to 18 with its headers found; scripts/setup.sh build installs one, PG_CONFIG=/path names one'
}

# The longest folder that holds all the arguments.
common_folder() {
  local folder=$1 path
  for path in "$@"; do
    while [ "$folder" != / ] && [ "${path#"$folder"/}" = "$path" ]; do folder=$(dirname "$folder"); done
  done
  printf '%s\n' "${folder%/}"
}

# A copy of the server in the same layout. A postgres started from there finds
# its libraries and extensions there, because it looks relative to itself.
copy_server() {
  local pg_config=$1 tree=$2 prefix folder stamp
  local folders=("$("$pg_config" --bindir)" "$("$pg_config" --pkglibdir)" "$("$pg_config" --sharedir)")
  prefix=$(common_folder "${folders[@]}")
  stamp=$("$pg_config" --version && find "${folders[@]}" -type f -printf '%p %s %T@\n' | sort | sha256sum)
  if [ "$(cat "$tree/.stamp" 2>/dev/null)" != "$stamp" ]; then
    note "copying $("$pg_config" --version) to ${tree#"$root"/}"
    rm -rf "$tree.new" "$tree"
    for folder in "${folders[@]}"; do
      mkdir -p "$tree.new${folder#"$prefix"}"
      cp -a --no-preserve=ownership "$folder/." "$tree.new${folder#"$prefix"}"
    done
    printf '%s' "$stamp" >"$tree.new/.stamp"
    mv "$tree.new" "$tree"
  fi
  printf '%s\n' "$tree${folders[0]#"$prefix"}"
}

# pgvector, for tests that use it: it comes with some archives.
add_vector() {
  local major=$1 bin=$2 archive=$archives/pgvector-$1.tar.xz scratch
  if [ ! -f "$archive" ] || [ -f "$("$bin/pg_config" --sharedir)/extension/vector.control" ]; then return; fi
  note 'adding pgvector'
  scratch=$(mktemp -d)
  tar -xJf "$archive" -C "$scratch" --no-same-owner
  find "$scratch" -name 'vector*.so' -exec cp {} "$("$bin/pg_config" --pkglibdir)/" \;
  find "$scratch" \( -name 'vector*.sql' -o -name 'vector.control' \) -exec cp {} "$("$bin/pg_config" --sharedir)/extension/" \;
  rm -rf "$scratch"
}

built=
trap 'if [ -n "$built" ]; then rm -rf "$built"; fi' EXIT

# Builds the library and the extension's files for one server into a folder.
build() {
  local pg_config=$1 folder=$2 major
  major=$(major_of "$pg_config")
  note "building nightowls $version for PostgreSQL $major"
  (
    cd "$root"
    export CARGO_TARGET_DIR=$target
    cargo build --bin owl
    PGRX_PG_CONFIG_PATH=$pg_config cargo build --release --no-default-features --features "pg$major" --lib
  ) >&2 || die 'the build failed'
  cp "$target/release/libnightowls.so" "$folder/nightowls.so"
  sed "s/@CARGO_VERSION@/$version/" "$root/nightowls.control" >"$folder/nightowls.control"
  "$target/debug/owl" script >"$folder/nightowls--$version.sql"
  local upgrade
  for upgrade in "$root"/sql/nightowls--*--*.sql; do
    if [ -f "$upgrade" ]; then cp "$upgrade" "$folder/"; fi
  done
}

# Each file appears whole or not at all: a server may be running on the old one.
place() {
  local mode=$1 file=$2 folder=$3
  if cmp -s "$file" "$folder/$(basename "$file")"; then return; fi
  install -d "$folder"
  install -m "$mode" "$file" "$folder/.$(basename "$file").new"
  mv "$folder/.$(basename "$file").new" "$folder/$(basename "$file")"
}

place_all() {
  local from=$1 pkglibdir=$2 sharedir=$3 file
  place 755 "$from/nightowls.so" "$pkglibdir"
  place 644 "$from/nightowls.control" "$sharedir/extension"
  for file in "$from"/nightowls--*.sql; do place 644 "$file" "$sharedir/extension"; done
}

# One build at a time: two versions share the name of what cargo makes.
locked() {
  mkdir -p "$servers"
  exec 9>"$servers/.lock"
  flock 9
}

tree() {
  local major=$1 pg_config bin
  locked
  pg_config=$(find_pg_config "$major") || die "no PostgreSQL $major with its headers found (PG_CONFIG=/path names one)"
  if [ "$pg_config" = "$servers/$major/bin/pg_config" ]; then
    bin=$servers/$major/bin
  else
    bin=$(copy_server "$pg_config" "$servers/$major")
  fi
  add_vector "$major" "$bin"
  built=$(mktemp -d)
  build "$pg_config" "$built"
  place_all "$built" "$("$bin/pg_config" --pkglibdir)" "$("$bin/pg_config" --sharedir)"
  printf '%s\n' "$bin"
}

install_into_server() {
  local pg_config=${PG_CONFIG:-} pkglibdir sharedir
  locked
  [ -n "$pg_config" ] || pg_config=$(find_pg_config "$(default_version)")
  has_headers "$pg_config" || die "$pg_config has no server headers: install postgresql-server-dev-$(major_of "$pg_config")"
  pkglibdir=${DESTDIR:-}$("$pg_config" --pkglibdir)
  sharedir=${DESTDIR:-}$("$pg_config" --sharedir)
  built=$(mktemp -d)
  build "$pg_config" "$built"
  place_all "$built" "$pkglibdir" "$sharedir" || die "could not write to $pkglibdir and $sharedir/extension (as root?)"
  note "installed nightowls $version in $pkglibdir and $sharedir/extension"
  note 'in a database: create extension nightowls'
}

case ${1:-} in
  installed) oldest installed_pg_config ;;
  default) default_version ;;
  pg_config) find_pg_config "${2:?a version, 15 to 18}" ;;
  tree) tree "${2:-$(default_version)}" ;;
  remove) rm -rf "$servers" ;;
  install) install_into_server ;;
  *) die 'usage: scripts/server.sh installed | default | pg_config <version> | tree [<version>] | remove | install' ;;
esac
