//! Dump and restore: everything comes back, nothing is done twice, and the log
//! goes on where it was.

use std::process::{Command, Stdio};
use std::sync::Arc;

use crate::fixture::{default_org, lines, new_org};
use crate::projections::text;
use crate::support::{Cluster, Db, Install, SERVICE, on_each_install, own_cluster};

/// A log with some of everything in it: orgs, ids, decimals, letters, a tombstone, an erasure,
/// gaps in the positions, and reducers that fold it.
fn fill_log(db: &Db) -> String {
    let org = default_org(db);
    let two = new_org(db, "it's \"two\"; ünï 🦉");
    let mut owner = db.owner();
    owner.exec(&format!(
        r#"update nightowls.orgs set external_id = 'ext' where org_id = '{two}';
           insert into nightowls.org_members (org_id, user_id, role) values ('{org}', 'ann', 'admin'), ('{two}', 'bob', 'viewer');
           insert into nightowls.org_members (org_id, user_id) select '{two}', 'user ' || i from generate_series(1, 500) i;
           insert into nightowls.settings values ('mine', '{{"kept": [1.10, "é"]}}');
           select nightowls.create_projection('tally', 'order', '{{"initial": {{"n": 0}},
             "on": {{"counted": [{{"op": "add", "path": "n", "value": "$.by"}}], "closed": [{{"op": "tombstone"}}]}},
             "otherwise": [{{"op": "push", "path": "others", "value": "@.event_type"}}, {{"op": "put", "path": "seen", "key": "$.by", "value": "@.version"}}]}}');
           select nightowls.create_projection('tally', 'order', '{{"otherwise": [{{"op": "add", "path": "n"}}]}}', org => '{two}')"#
    ));
    let mut service = db.service();
    for org in [&org, &two] {
        service.exec(&format!(
            r#"select nightowls.append_events('order', 'o' || i % 7, jsonb_build_array(
                 jsonb_build_object('event_type', case when i % 5 = 0 then 'noted' when i % 11 = 0 then 'closed' else 'counted' end,
                                    'payload', jsonb_build_object('by', (i / 8.0)::numeric(9, 3)), 'event_id', nightowls.event_id_for('test', i::text)),
                 '{{"event_type": "noted", "payload": {{"by": "ü\"'' \\ \n 🦉 \t", "deep": [[[{{"x": null}}]]]}}, "metadata": {{"actor_id": "ann"}}}}'::jsonb), org => '{org}')
                 from generate_series(1, 60) i"#
        ));
    }
    service.exec("begin; select nightowls.append_event('order', 'o1', 'counted', '{\"by\": 1000}'); rollback");
    service.exec(
        r#"insert into nightowls.events (aggregate_type, aggregate_id, event_type, payload) values ('order', 'direct', 'counted', '{"by": 1e-20}')"#,
    );
    service.exec(
        "begin; select nightowls.append_event('order', 'o2', 'counted', '{\"by\": 1}'); rollback",
    );
    // Snapshots, an archive, events that are gone, and a compaction that is under way.
    service.exec(
        r#"select nightowls.set_snapshot_policy('tally', 5);
           select nightowls.create_snapshot('tally', id) from unnest('{o5,o6}'::text[]) id;
           select nightowls.compact_aggregate('order', 'o6', keep => 2);
           select nightowls.set_compaction('order', keep => 7, min_events => 1000);
           select nightowls.append_events('gone', 'g', (select jsonb_agg('{"event_type": "noted"}'::jsonb) from generate_series(1, 9)));
           select nightowls.compact_aggregate('gone', 'g', keep => 2, mode => 'delete');
           select count(*) from nightowls.create_snapshots()"#,
    );
    db.superuser().exec(
        "select nightowls._begin_run(nightowls.current_org(), 'order', 'o5', 'archive', 4),
                nightowls._next_replay(nightowls.current_org(), 'tally', 'o5', 4, 2)",
    );
    service.exec(
        "select nightowls.request_floor('thread', 'ann', request_id => 'r1'), nightowls.request_floor('thread', 'bob', poll_ms => 10000)",
    );
    service.exec("select nightowls.erase('order', 'o5', 'asked')");
    fill_consumers(db);
    fill_swarm(db);
    org
}

/// Agents, runs and what belongs to them, in every state.
fn fill_swarm(db: &Db) {
    db.service().exec(
        r#"select nightowls.publish_agent_version('sage', '{"instructions": "it''s \"quoted\"", "n": 1.10}'), nightowls.publish_agent_version('sage', '{}');
           select nightowls.rollback_agent_version('sage', 1);
           select nightowls.create_thread('t', 'cust', 'ünï 🦉'), nightowls.start_run('r', 't', 'sage', '{"q": 1.10}'), nightowls.start_run('s');
           select nightowls.set_run_status('r', 'running'); select nightowls.set_run_status('r', 'suspended', '{"metadata": {"a": 1}}');
           select nightowls.save_run_snapshot('r', to_jsonb(i), keep => 2) from generate_series(1, 5) i;
           select nightowls.append_message('t', to_jsonb(i), message_id => 'm' || i) from generate_series(1, 50) i;
           select nightowls.scratchpad_put('s', k, '1') from unnest('{a,b}'::text[]) k; select nightowls.scratchpad_delete('s', 'a');
           select nightowls.create_followup('t', now() + interval '1 day', '"later"');
           select nightowls.set_redaction_rules('{"keys": ["ssn"]}');
           insert into nightowls.mastra_threads (id, "resourceId", title, metadata, "createdAt", "updatedAt")
             select 't' || i, 'r', 'it''s "\n', '{"n": 1.10}', '2024-01-01', '2024-01-02' from generate_series(1, 20) i;
           insert into nightowls.mastra_workflow_snapshot (workflow_name, run_id, snapshot, "createdAt", "updatedAt") values ('w', 'r', '{"status": "suspended"}', now(), now());
           insert into nightowls.mastra_ai_spans ("traceId", "spanId", name, "spanType", "isEvent", "startedAt", tags, "createdAt")
             select 't', i, 'span', 'run', false, now(), '["a"]', now() from generate_series(1, 20) i"#,
    );
    db.owner().exec("select nightowls.grant_mastra('owl_app')");
}

/// Consumers in every state: done in part, leased, with parked and replayed events;
/// of a type of their own, as they keep it from compaction.
fn fill_consumers(db: &Db) {
    db.service().exec(
        "select nightowls.append_event('letter', (i % 12)::text, 'written') from generate_series(1, 60) i",
    );
    db.service().exec(
        r#"select nightowls.create_consumer('mail', '{"aggregate_types": ["letter"]}', members => 3, max_attempts => 1);
           select nightowls.commit_offset('mail', max(position), max(fence), 1) from nightowls.fetch_events('mail', 10, 1);
           select nightowls.fetch_events('mail', 5, 1);
           select nightowls.fail_event('mail', min(position), 'it''s "poison"', max(fence), 2) from nightowls.fetch_events('mail', 5, 2);
           select nightowls.create_consumer('audit', '{"aggregate_types": ["letter"]}');
           select nightowls.park_event('audit', min(position), 'later', max(fence)), nightowls.commit_offset('audit', max(position), max(fence))
             from nightowls.fetch_events('audit', 20);
           select nightowls.replay_parked('audit');
           select nightowls.create_projection('later', 'letter', '{"otherwise": [{"op": "add", "path": "n"}]}', mode => 'async')"#,
    );
}

/// What a user's own functions and tables take part in.
fn fill_read_models(db: &Db) {
    let mut owner = db.owner();
    owner.exec(&format!(
        "create table public.calls (n bigint generated always as identity, who text not null);
         create table public.balances (org_id uuid not null, account text not null, n bigint not null, primary key (org_id, account));
         grant select, insert, update, delete on public.calls, public.balances to {SERVICE};
         create function public.called(state jsonb, event nightowls.events) returns jsonb language plpgsql as $$
         begin
           insert into public.calls (who) values ((event).aggregate_id);
           return jsonb_build_object('v', (event).version);
         end $$;
         create function public.keep(event nightowls.events) returns void language plpgsql as $$
         begin
           insert into public.calls (who) values ('table');
           insert into public.balances as b values ((event).org_id, (event).aggregate_id, 1)
           on conflict (org_id, account) do update set n = b.n + 1;
         end $$;
         select nightowls.create_projection('handled', 'order', handler => 'public.called');
         select nightowls.create_table_projection('balances', 'order', 'public.balances', 'public.keep');
         select nightowls.create_view_projection('totals', 'select e.org_id, e.aggregate_id, count(*) as n from nightowls.events e group by 1, 2',
                                                 key_columns => '{{org_id,aggregate_id}}');
         grant select on nightowls.view_totals to {SERVICE};
         create function public.mine() returns trigger language plpgsql as $$ begin return null; end $$;
         create trigger t90_mine after insert on nightowls.events for each statement execute function public.mine();
         select nightowls.create_type_index()"
    ));
    db.service()
        .exec("select nightowls.append_event('order', 'o1', 'counted', '{\"by\": 0.10}')");
    // A restore refreshes materialized views: then nothing differs.
    db.service()
        .exec("select nightowls.refresh_projection('totals')");
}

/// Everything that must come back.
fn fingerprint(db: &Db, read_models: bool) -> Vec<String> {
    let mut session = db.superuser();
    let mut all = Vec::new();
    let ours = [
        "nightowls.orgs",
        "nightowls.org_members",
        "nightowls.settings",
        "nightowls.imports",
        "nightowls.events",
        "nightowls.routes",
        "nightowls._append_targets",
        "nightowls.projections",
        "nightowls._projection_states",
        "nightowls.projection_states",
        "nightowls.snapshots",
        "nightowls._sweeps",
        "nightowls._replays",
        "nightowls.events_archive",
        "nightowls.compactions",
        "nightowls.compaction_policies",
        "nightowls.consumers",
        "nightowls._consumer_offsets",
        "nightowls._consumer_failures",
        "nightowls.consumer_lag",
        "nightowls.parked_events",
        "nightowls.floors",
        "nightowls.floor_tickets",
        "nightowls.floor_marks",
        "nightowls.agents",
        "nightowls.agent_versions",
        "nightowls.audit_log",
        "nightowls.threads",
        "nightowls.runs",
        "nightowls.run_snapshots",
        "nightowls.messages",
        "nightowls.scratchpad",
        "nightowls.scratchpad_marks",
        "nightowls.clock_parts",
        "nightowls.followups",
        "nightowls.redaction_rules",
    ];
    let theirs = ["public.calls", "public.balances", "nightowls._view_totals"];
    for table in ours.iter().chain(theirs.iter().filter(|_| read_models)) {
        all.extend(lines(
            &mut session,
            &format!("select '{table}', count(*), md5(string_agg(r::text, E'\\n' order by r::text collate \"C\")) from {table} r"),
        ));
    }
    all.extend(lines(
        &mut session,
        "select 'sequence', last_value, is_called from nightowls.events_position_seq
         union all
         select 'generations', last_value, is_called from nightowls.consumer_generations",
    ));
    all
}

/// The restored log is alive: it goes on, keeps its states and its guards.
#[track_caller]
fn assert_alive(db: &Db, read_models: bool) {
    let (mut owner, mut service) = (db.owner(), db.service());
    for name in ["tally", "handled"] {
        if name == "tally" || read_models {
            assert_eq!(
                lines(
                    &mut service,
                    &format!("select * from nightowls.verify_projection('{name}')")
                ),
                Vec::<String>::new()
            );
        }
    }
    let before = text(
        &mut owner,
        "select last_value from nightowls.events_position_seq",
    );
    let head = text(
        &mut service,
        "select version from nightowls.last_event('order', 'o3')",
    );
    let after = lines(
        &mut service,
        "select position, version from nightowls.append_event('order', 'o3', 'counted', '{\"by\": 1}')",
    );
    let next = |number: &str| number.parse::<i64>().expect("a number") + 1;
    assert_eq!(after, [format!("{} {}", next(&before), next(&head))]);
    assert_eq!(
        text(
            &mut service,
            "select version from nightowls.projection_states
              where projection = 'tally' and aggregate_id = 'o3' and org_id = nightowls.current_org()"
        ),
        next(&head).to_string()
    );
    // Consumers go on where they were, with fences above those of before.
    assert_eq!(
        lines(
            &mut service,
            "with before as materialized (select fence, \"offset\" from nightowls.consumer_lag where consumer = 'mail' and member = 0),
                  batch as materialized (select * from nightowls.fetch_events('mail', 1000))
             select min(b.position) > max(o.\"offset\"), min(b.fence) > max(o.fence) from batch b, before o"
        ),
        ["t t"]
    );
    assert_eq!(
        lines(
            &mut service,
            "select count(*), min(position) = (select min(position) from nightowls.parked_events where consumer = 'audit')
               from nightowls.fetch_events('audit')"
        ),
        ["1 t"],
        "what is to be replayed comes first"
    );
    service.exec("select nightowls.run_projections()");
    // A retry of what was appended before the dump is still known.
    assert_eq!(
        text(
            &mut service,
            "select version from nightowls.append_event('order', 'o6', 'counted', '{\"by\": 0.750}', 0, nightowls.event_id_for('test', '6'))"
        ),
        "1"
    );
    assert_eq!(
        text(
            &mut service,
            "select count(*) = (select count(*) from nightowls.read_events(max_events => 100000)) from nightowls.events where org_id = nightowls.current_org()"
        ),
        "t"
    );
    // The holder goes on with its fence, the next in line keeps its place and gets a later one.
    service.exec(
        "select nightowls.append_event('order', 'guarded', 'noted', container => 'thread', fence => f.fence) \
           from nightowls.floors f where f.org_id = nightowls.current_org() and f.container = 'thread'",
    );
    assert_eq!(
        lines(
            &mut service,
            "select a.granted, a.ticket from nightowls.request_floor('thread', 'ann', request_id => 'r1') a \
              union all select a.granted, a.ticket from nightowls.request_floor('thread', 'bob') a"
        ),
        ["t 1", "f 2"]
    );
    assert_eq!(
        lines(
            &mut service,
            "with f as materialized (select fence from nightowls.floors) \
             select nightowls.release_floor('thread', 'ann', f.fence), (nightowls.request_floor('thread', 'bob')).fence > f.fence from f"
        ),
        ["t t"]
    );
    for (sql, code) in [
        ("update nightowls.events set payload = '{}'", "NW008"),
        ("truncate nightowls.events", "NW008"),
        ("delete from nightowls._projection_states", "NW008"),
        ("delete from nightowls.snapshots", "NW008"),
        ("delete from nightowls.events_archive", "NW008"),
        (
            "insert into nightowls.events_archive select *, now() from nightowls.events",
            "NW008",
        ),
        (
            "update nightowls.projection_states set state = null",
            "NW008",
        ),
        (
            "insert into nightowls.events (aggregate_type, aggregate_id, version, event_type) values ('order', 'o3', 99, 'x')",
            "22023",
        ),
    ] {
        assert_eq!(owner.refused(sql).code, code, "{sql}");
    }
    assert_eq!(
        service.refused("delete from nightowls.events").code,
        "42501"
    );
    owner.exec(
        "select nightowls.rebuild_projection('tally'), nightowls.refresh_projection('tally')",
    );
    // The compaction goes on, the archive is read and put back, what is gone is known to be gone.
    let snapshots = if read_models {
        "'{tally,handled}'"
    } else {
        "'{tally}'"
    };
    service.exec(&format!(
        "select nightowls.create_snapshot(p, 'o5') from unnest({snapshots}::text[]) p"
    ));
    for (sql, expected) in [
        (
            "select compacted_to || ' ' || more from nightowls.compact_aggregate('order', 'o5', keep => 2)",
            "4 true",
        ),
        (
            "select more from nightowls.compact_aggregate('order', 'o5', keep => 2)",
            "f",
        ),
        (
            "select moved > 0 and not more from nightowls.restore_aggregate('order', 'o6')",
            "t",
        ),
        (
            "select compacted_to || ' ' || deleted_to from nightowls.compactions where aggregate_id = 'g'",
            "7 7",
        ),
        ("select count(*) from nightowls.progress", "0"),
    ] {
        assert_eq!(text(&mut service, sql), expected, "{sql}");
    }
    assert_eq!(
        service
            .refused("select nightowls.create_projection('late', 'gone', '{}')")
            .code,
        "NW006"
    );
    assert_eq!(
        lines(
            &mut service,
            "select * from nightowls.verify_projection('tally')"
        ),
        Vec::<String>::new()
    );
    if read_models {
        assert_eq!(
            text(
                &mut service,
                "select n from public.balances where account = 'o3' and org_id = nightowls.current_org()"
            ),
            next(&head).to_string()
        );
        assert_eq!(owner.refused("delete from public.balances").code, "NW008");
        service.exec("select nightowls.refresh_projection('totals')");
        assert_eq!(
            text(
                &mut service,
                "select n from nightowls.view_totals where aggregate_id = 'o3'"
            ),
            next(&head).to_string()
        );
        assert_eq!(
            service.refused("select * from nightowls._view_totals").code,
            "42501"
        );
    }
}

#[track_caller]
fn run(command: &mut Command) -> Vec<u8> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && !said.contains("ERROR"),
        "{command:?}:\n{said}"
    );
    output.stdout
}

/// `pg_dump | psql`, as the owner of the install.
#[track_caller]
fn by_psql(from: &Db, to: &Db, options: &[&str]) {
    by_psql_as(from.install().owner(), from, to, options);
}

/// `pg_dump | psql`, as `role`.
#[track_caller]
pub fn by_psql_as(role: &str, from: &Db, to: &Db, options: &[&str]) {
    let script = to.cluster().folder().join(format!("{}.sql", to.name()));
    let dumped = run(from.command("pg_dump", role).args(options));
    std::fs::write(&script, dumped).expect("the folder takes a file");
    run(to
        .command("psql", role)
        .args([
            "--no-psqlrc",
            "--quiet",
            "--set",
            "ON_ERROR_STOP=1",
            "--output",
            "/dev/null",
            "--file",
        ])
        .arg(&script));
}

/// `pg_dump -Fc`, then `pg_restore -j 2`.
#[track_caller]
fn by_pg_restore(from: &Db, to: &Db) {
    let owner = from.install().owner();
    let archive = to.cluster().folder().join(format!("{}.dump", to.name()));
    let dumped = run(from.command("pg_dump", owner).arg("--format=custom"));
    std::fs::write(&archive, dumped).expect("the folder takes a file");
    run(to
        .command("pg_restore", owner)
        .args(["--jobs", "2", "--exit-on-error", "--dbname", to.name()])
        .arg(&archive));
}

#[test]
fn a_dump_restored_into_a_fresh_cluster_brings_everything_back_and_does_nothing_twice() {
    own_cluster(|fresh: &Arc<Cluster>| {
        on_each_install(|db| {
            fill_log(db);
            fill_read_models(db);
            let before = fingerprint(db, true);
            for how in ["pg_dump | psql", "pg_restore -j 2"] {
                let to = fresh.empty_database(db.install());
                if how == "pg_dump | psql" {
                    by_psql(db, &to, &[]);
                } else {
                    by_pg_restore(db, &to);
                }
                assert_eq!(fingerprint(&to, true), before, "{how}");
                assert_eq!(
                    text(
                        &mut to.superuser(),
                        "select (select count(*) from pg_extension where extname = 'nightowls')::text"
                    ),
                    if db.install() == Install::Extension {
                        "1"
                    } else {
                        "0"
                    }
                );
                // What a user hangs on our tables is in a dump of the plain install only.
                let kept = text(
                    &mut to.superuser(),
                    "select (select count(*) from pg_trigger where tgname = 't90_mine')
                          + (select count(*) from pg_class where relname = 'events_event_type_idx')",
                );
                assert_eq!(
                    kept,
                    if db.install() == Install::Plain {
                        "2"
                    } else {
                        "0"
                    },
                    "{how}"
                );
                assert_alive(&to, true);
            }
            assert_eq!(fingerprint(db, true), before, "a dump changes nothing");
        });
    });
}

/// Workers of a parallel restore load the tables of an extension in any order, with
/// all constraints in place.
#[test]
fn no_table_of_ours_has_a_foreign_key_as_a_parallel_restore_would_fail_on_it() {
    on_each_install(|db| {
        let keys = lines(
            &mut db.superuser(),
            "select conname from pg_constraint where contype = 'f' and connamespace = 'nightowls'::regnamespace",
        );
        assert_eq!(keys, Vec::<String>::new());
    });
}

#[test]
fn the_rows_alone_restore_into_a_fresh_install() {
    on_each_install(|db| {
        fill_log(db);
        for options in [&["--data-only"][..], &["--data-only", "--inserts"]] {
            let to = db.cluster().database(db.install());
            by_psql(db, &to, options);
            assert_eq!(
                fingerprint(&to, false),
                fingerprint(db, false),
                "{options:?}"
            );
            assert_alive(&to, false);
        }
    });
}

#[test]
fn a_dump_beside_open_appends_restores_to_a_log_that_goes_on() {
    on_each_install(|db| {
        fill_log(db);
        let mut open = db.service();
        open.exec("begin; select nightowls.append_event('order', 'o3', 'counted', '{\"by\": 1}'); select nightowls.append_event('order', 'late', 'counted', '{\"by\": 1}')");
        let to = db.cluster().empty_database(db.install());
        by_psql(db, &to, &[]);
        assert_alive(&to, false);
        open.exec("rollback");
    });
}
