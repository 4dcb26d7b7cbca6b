# shellcheck shell=bash
# shellcheck disable=SC2154 # home, psql, database and the helpers come from demo.sh
# The demo's scene of the floors: source it after demo-server.sh. Three instances share a conversation, each a psql process of
# its own that reads what it is to do from a pipe; one is killed while it holds the floor, one is stopped and goes on later.

declare -A instance_pid instance_pipe

start_instance() { # <name>
  local pipe=$home/$1.pipe fd
  rm -f "$pipe"
  mkfifo "$pipe"
  # The lock of the demo is not for it.
  "$psql" -XqAt -d "$database" -v VERBOSITY=sqlstate -v "name=$1" -v "container=$container" <"$pipe" >"$home/$1.log" 2>&1 8>&- &
  instance_pid[$1]=$!
  disown # else the shell has a word to say when it is killed
  exec {fd}>"$pipe"
  instance_pipe[$1]=$fd
}

tell() { printf '%s\n' "$2" >&"${instance_pipe[$1]}"; } # <name> <what to do>

acquire() { # <name> <max_hold_ms>
  tell "$1" "call nightowls.acquire_floor(:'container', :'name', max_hold_ms => $2, max_wait_ms => 60000) \\gset floor_"
}

speak() { # <name> <text>
  tell "$1" "select nightowls.append_event('conversation', :'container', 'said', jsonb_build_object('by', :'name', 'text', '$2', 'fence', :floor_fence),
    container => :'container', fence => :floor_fence) \\g /dev/null"
}

# What was done to an instance, for the log.
note_fate() { # <name> <event type>
  sql -v "name=$1" -v "type=$2" -v "container=$container" >/dev/null <<<"select nightowls.append_event('conversation', :'container', :'type', jsonb_build_object('by', :'name'))"
}

await() { # <what> <condition in SQL>
  local waited=0
  until [ "$(sql -At -v "container=$container" <<<"select $2")" = t ]; do
    sleep 0.05
    waited=$((waited + 1))
    [ "$waited" -lt 600 ] || die "waited 30 s in vain: $1 ($home/{ann,bob,cat}.log)"
  done
}

await_holder() { await "$1 has the floor" "exists (select from nightowls.floor_status s where s.container = :'container' and s.holder = '$1' and s.status = 'held')"; }
await_line() { await "$1 in line" "(select s.waiting from nightowls.floor_status s where s.container = :'container') = $1"; }
await_words() { # <name> <how often>
  await "$1 has spoken" "(select count(*) from nightowls.read_aggregate('conversation', :'container') e where e.event_type = 'said' and e.payload ->> 'by' = '$1') = $2"
}

end_instances() {
  local name
  for name in "${!instance_pid[@]}"; do
    kill -KILL "${instance_pid[$name]}" 2>/dev/null || true
    eval "exec ${instance_pipe[$name]}>&-"
    rm -f "$home/$name.pipe"
  done
  wait 2>/dev/null || true
  instance_pid=() instance_pipe=()
}

floors() {
  local waited=0 at
  title 'Three instances, one conversation: a floor lets one of them speak at a time'
  container="conversation $(value "select count(distinct e.aggregate_id) + 1 from nightowls.events e
    where e.org_id = nightowls.current_org() and e.aggregate_type = 'conversation'")"
  trap end_instances EXIT
  at=$(now)
  for name in ann bob cat; do start_instance "$name"; done

  acquire ann 2000
  speak ann 'hello, I begin'
  await_words ann 1
  acquire bob 2000
  await_line 1
  acquire cat 60000
  await_line 2

  kill -KILL "${instance_pid[ann]}"
  note_fate ann killed
  speak bob 'ann is gone, I go on'
  await_holder bob
  await_words bob 1

  kill -STOP "${instance_pid[bob]}"
  note_fate bob stopped
  # It lies in the pipe: the first thing that it does when it goes on.
  speak bob 'as I was saying'
  await_holder cat
  speak cat 'bob is silent, so I speak'
  await_words cat 1

  kill -CONT "${instance_pid[bob]}"
  note_fate bob resumed
  until grep -q NW003 "$home/bob.log"; do
    sleep 0.05
    waited=$((waited + 1))
    [ "$waited" -lt 600 ] || die "bob's late word was not refused ($home/bob.log)"
  done
  note_fate bob refused
  acquire bob 60000
  await_line 1
  speak cat 'your turn'
  tell cat "select nightowls.release_floor(:'container', :'name', :floor_fence) \\g /dev/null"
  speak bob 'back in line, and with a new fence'
  await_words bob 2
  tell bob "select nightowls.release_floor(:'container', :'name', :floor_fence) \\g /dev/null"
  await 'the floor is free' "exists (select from nightowls.floor_status s where s.container = :'container' and s.status = 'free')"
  end_instances
  trap - EXIT
  line "ann was killed (SIGKILL) and bob stopped (SIGSTOP) while each held the floor for at most 2 s without a sign of life; $(seconds $(($(now) - at))) s in all"
  tour floors.sql
}
