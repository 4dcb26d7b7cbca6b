# shellcheck shell=bash
# shellcheck disable=SC2154 # home, psql, database and the helpers come from demo.sh and demo-floors.sh
# The demo's scene of a swarm: source it after demo-floors.sh. A run begins in one process, which is killed while the run waits for
# somebody's word, and ends in another.

in_swarm() { sql -At -v "container=$container" -v "slug=$slug" >/dev/null; } # SQL on standard input

note_process() { # <who> <what happened to it>
  sql -v "by=$1" -v "type=$2" -v "container=$container" >/dev/null <<<"select nightowls.append_event('process', :'container', :'type', jsonb_build_object('by', :'by'))"
}

await_run() { await "the run is $1" "(select r.status from nightowls.runs r where r.org_id = nightowls.current_org() and r.run_id = :'container') = '$1'"; }

swarm() {
  local n at
  title 'A swarm: a run is suspended in one process and goes on in another'
  n=$(value "select count(*) + 1 from nightowls.threads t where t.org_id = nightowls.current_org() and t.thread_id like 'refund %'")
  container="refund $n" slug="sage-$n"
  trap end_instances EXIT
  at=$(now)
  in_swarm <<'SQL'
select nightowls.publish_agent_version(:'slug', '{"instructions": "Ask before you pay.", "modelId": "small-1"}', '{"type": "user", "id": "ann"}');
select nightowls.publish_agent_version(:'slug', '{"instructions": "Be generous.", "modelId": "large-1"}', '{"type": "user", "id": "ann"}');
select nightowls.create_thread(:'container', resource_id => 'bob', title => 'A refund');
select nightowls.append_message(:'container', '{"text": "12.50 are missing"}', author => '{"type": "user", "id": "bob"}');
SQL

  start_instance one
  tell one "\\set slug '$slug'
    select nightowls.start_run(:'container', :'container', :'slug', '{\"ask\": \"refund\"}', :'name') \\g /dev/null"
  acquire one 60000
  tell one "select nightowls.set_run_status(:'container', 'running', '{\"runner\": \"one\"}', :'container', :floor_fence) \\g /dev/null
    select nightowls.scratchpad_put('run:' || :'container', 'plan', '[\"ask ann\", \"pay 12.50\"]', 0) \\g /dev/null
    select nightowls.append_message(:'container', '{\"text\": \"ann, may I?\"}', 'assistant', jsonb_build_object('type', 'agent', 'id', :'slug'), :'container') \\g /dev/null
    begin;
    select nightowls.save_run_snapshot(:'container', '{\"step\": 2, \"amount\": 12.50}', container => :'container', fence => :floor_fence) \\g /dev/null
    select nightowls.set_run_status(:'container', 'suspended', '{\"runner\": \"one\"}', :'container', :floor_fence) \\g /dev/null
    commit;
    select nightowls.release_floor(:'container', :'name', :floor_fence) \\g /dev/null"
  await_run suspended
  await 'one has let go' "exists (select from nightowls.floor_status s where s.container = :'container' and s.status = 'free')"
  kill -KILL "${instance_pid[one]}"
  note_process one killed
  in_swarm <<<"select nightowls.append_message(:'container', '{\"text\": \"yes, pay\"}', author => '{\"type\": \"user\", \"id\": \"ann\"}')"

  start_instance two
  tell two "\\set slug '$slug'"
  acquire two 60000
  tell two "select snapshot ->> 'amount' as amount from nightowls.load_run_snapshot(:'container') \\gset saved_
    select nightowls.set_run_status(:'container', 'running', '{\"runner\": \"two\"}', :'container', :floor_fence) \\g /dev/null
    select nightowls.publish_agent_version(:'slug', '{\"instructions\": \"Never ask.\"}', jsonb_build_object('type', 'agent', 'id', :'slug')) \\g /dev/null"
  until grep -q NW004 "$home/two.log"; do
    sleep 0.05
    [ $(($(now) - at)) -lt 30000 ] || die "an agent's publishing was not refused ($home/two.log)"
  done
  note_process "$slug" refused
  tell two "select nightowls.append_message(:'container', jsonb_build_object('text', :'saved_amount' || ' is on its way'), 'assistant',
      jsonb_build_object('type', 'agent', 'id', :'slug'), :'container') \\g /dev/null
    select nightowls.set_run_status(:'container', 'completed', jsonb_build_object('runner', 'two', 'output', :'saved_amount'::numeric), :'container', :floor_fence) \\g /dev/null
    select nightowls.release_floor(:'container', :'name', :floor_fence) \\g /dev/null"
  await_run completed
  await 'two has let go' "exists (select from nightowls.floor_status s where s.container = :'container' and s.status = 'free')"
  end_instances
  trap - EXIT
  in_swarm <<<"select nightowls.rollback_agent_version(:'slug', 1, '{\"type\": \"user\", \"id\": \"ann\"}')"
  line "two psql processes, $(seconds $(($(now) - at))) s in all; every line is an event or a message"
  tour swarm.sql -v "thread=$container" -v "slug=$slug"
}
