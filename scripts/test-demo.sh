#!/usr/bin/env bash
# The demo, on the small recorded history and in a folder of its own: it runs, its proof can fail, it goes on from where it
# was, and nothing is left of it.
# usage: scripts/test-demo.sh <folder to work in>
source "$(dirname "$0")/common.sh"

mkdir -p "$1"
work=$(cd "$1" && pwd -P)
repository=$work/history.git
log=$work/demo.log
export NIGHTOWLS_DEMO_HOME=$work/home REPO=$repository NO_COLOR=1
failed=0

demo() { "$root/scripts/demo.sh" </dev/null >"$log" 2>&1; }

clean() { "$root/scripts/demo-clean.sh" >/dev/null 2>&1; }

# check <name> <command…>: one line a test, in the words of libtest.
check() {
  local name=$1
  shift
  if "$@"; then
    echo "test demo: $name ... ok"
    return
  fi
  echo "test demo: $name ... FAILED"
  tail -n 30 "$log"
  failed=1
}

says() { demo && grep -qE "$1" "$log"; }

# An event that git did not bring is not the demo's to overlook.
finds_a_wrong_state() {
  local database
  database=$(sed -n 's/.*in database \(demo[a-z0-9_]*\)$/\1/p' "$log" | tail -n 1)
  "$NIGHTOWLS_DEMO_HOME/psql" "$database" -Xqc "set session_replication_role = replica;
    update nightowls._projection_states set state = jsonb_set(state, '{blob}', '\"0\"')
     where ctid = (select min(ctid) from nightowls._projection_states where projection = 'files' and state is not null)" &&
    ! demo && grep -q 'NOT EQUAL' "$log"
}

clean || true
rm -rf "$repository"
git init --quiet --bare --initial-branch=main "$repository"
git -C "$repository" fast-import --quiet <"$root/demo/recorded.fi"
trap clean EXIT

check 'the history is taken in and proven against git' says '^  = the states, and HEAD '
check 'a long history is loaded, taken in by a consumer and compacted' grep -qE '^ +10 .* +50000 .*"visits": 50010' "$log"
check 'each letter of the queue is worked on' grep -q 'Each letter was worked on once more' "$log"
check 'a killed and a stopped holder of a floor are replaced, and the late word of one is refused' \
  eval 'grep -q "bob speaks with its old fence: refused, NW003" "$log" && grep -q "back in line, and with a new fence" "$log"'
check 'a run is suspended in one process and completed in another, and no agent publishes itself' \
  eval 'grep -q "two .* completes the run: 12.50" "$log" && grep -q "tries to publish itself: refused, NW004" "$log"'
check 'its timeline fits into 80 columns' eval '! sed -n "/^A swarm/,/^Go on/p" "$log" | grep -qE "^.{81}"'
check 'a second run has nothing to do' says 'nothing new: the whole main line is in the log'
check 'a state that is not what git says fails it' finds_a_wrong_state
check 'nothing is left of it' eval 'clean && [ ! -e "$NIGHTOWLS_DEMO_HOME" ]'
exit "$failed"
