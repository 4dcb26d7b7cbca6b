//! Runs and threads: legal changes only, each one row and one event, and snapshots that lose nothing.

use std::time::{Duration, Instant};

use crate::fixture::{default_org, lines, new_org, together};
use crate::projections::text;
use crate::support::{Db, on_each_install, on_each_route, wait_until};

const STATUSES: [&str; 6] = [
    "queued",
    "running",
    "suspended",
    "completed",
    "failed",
    "cancelled",
];

/// How a new run comes to each status.
fn way_to(status: &str) -> &'static [&'static str] {
    match status {
        "queued" => &[],
        "running" => &["running"],
        "suspended" => &["running", "suspended"],
        "completed" => &["running", "completed"],
        "failed" => &["failed"],
        _ => &["cancelled"],
    }
}

#[test]
fn every_change_is_legal_and_one_row_and_one_event_or_neither() {
    on_each_install(|db| {
        default_org(db);
        let mut service = db.service();
        let legal = [
            ("queued", vec!["running", "failed", "cancelled"]),
            (
                "running",
                vec!["suspended", "completed", "failed", "cancelled"],
            ),
            ("suspended", vec!["running", "failed", "cancelled"]),
        ];
        for from in STATUSES {
            for to in STATUSES {
                let run = format!("{from} to {to}");
                service.exec(&format!("select nightowls.start_run('{run}')"));
                for step in way_to(from) {
                    service.exec(&format!(
                        "select nightowls.set_run_status('{run}', '{step}')"
                    ));
                }
                let state = format!(
                    "select r::text from nightowls.runs r where run_id = '{run}' union all select e::text from nightowls.events e where aggregate_id = '{run}' order by 1"
                );
                let before = lines(&mut service, &state);
                let change = format!("select nightowls.set_run_status('{run}', '{to}')");
                let is_legal = legal
                    .iter()
                    .any(|(one, goals)| *one == from && goals.contains(&to));
                if is_legal {
                    // Undone, it leaves neither; done, both.
                    service.exec(&format!("begin; {change}; rollback"));
                    assert_eq!(lines(&mut service, &state), before);
                    let version = text(&mut service, &change);
                    assert_eq!(version, (way_to(from).len() + 2).to_string());
                    assert_eq!(
                        lines(
                            &mut service,
                            &format!(
                                "select r.status, e.event_type, e.version, e.payload ->> 'before' from nightowls.runs r cross join nightowls.last_event('run', r.run_id) e where run_id = '{run}'"
                            )
                        ),
                        [format!("{to} run_{to} {version} {from}")]
                    );
                } else {
                    let refusal = service.refused(&change);
                    assert_eq!(refusal.code, "NW005", "{run}");
                    assert!(
                        refusal.message.contains(from) && !refusal.hint.is_empty(),
                        "{refusal}"
                    );
                    assert_eq!(lines(&mut service, &state), before, "{run}");
                }
            }
        }
        // What refuses the event refuses the row, and the other way round.
        db.owner().exec(
            r#"create function public.refuse(state jsonb, event nightowls.events) returns jsonb language plpgsql as $$
               begin if (event).aggregate_id = 'refused' and (event).event_type = 'run_running' then raise exception 'no' using errcode = 'UU001'; end if; return '{}'; end $$;
               select nightowls.create_projection('refusing', 'run', handler => 'public.refuse')"#,
        );
        service.exec("select nightowls.start_run('refused')");
        assert_eq!(
            service
                .refused("select nightowls.set_run_status('refused', 'running')")
                .code,
            "UU001"
        );
        assert_eq!(
            text(
                &mut service,
                "select status from nightowls.runs where run_id = 'refused'"
            ),
            "queued"
        );
    });
}

#[test]
fn changes_of_one_run_at_the_same_moment_follow_each_other() {
    on_each_route(|db| {
        default_org(db);
        db.service().exec(
            "select nightowls.start_run('r'); select nightowls.set_run_status('r', 'running')",
        );
        let answers = together(
            10,
            |_| db.service(),
            |nth, mut session| {
                let to = ["completed", "failed", "suspended", "cancelled"][nth % 4];
                session.try_value(&format!("select nightowls.set_run_status('r', '{to}')"))
            },
        );
        let mut service = db.service();
        let events = lines(
            &mut service,
            "select payload ->> 'before', payload ->> 'status' from nightowls.read_aggregate('run', 'r') where version > 1",
        );
        let done = answers.iter().filter(|answer| answer.is_ok()).count();
        assert_eq!(events.len(), done + 1);
        for refusal in answers.into_iter().filter_map(Result::err) {
            assert_eq!(refusal.code, "NW005", "{refusal}");
        }
        // Each begins where the one before ended, and the row is the last.
        let ends: Vec<_> = events
            .iter()
            .map(|event| event.split_once(' ').unwrap())
            .collect();
        assert!(
            ends.windows(2).all(|pair| pair[0].1 == pair[1].0),
            "{ends:?}"
        );
        assert_eq!(
            text(&mut service, "select status from nightowls.runs"),
            ends.last().unwrap().1
        );
    });
}

#[test]
fn a_retried_start_is_the_first_run_and_another_one_is_refused() {
    on_each_route(|db| {
        let org = default_org(db);
        let other = new_org(db, "other");
        let mut service = db.service();
        service.exec("select nightowls.publish_agent_version('sage', '{}'); select nightowls.create_thread('t', 'customer', 'Hello', '{\"a\": 1}')");
        let start = r#"select nightowls.start_run('r', 't', 'sage', '{"q": 1.10}', 'worker')"#;
        let ids = together(
            8,
            |_| db.service(),
            |_, mut session| text(&mut session, start),
        );
        assert_eq!(ids, ["r"; 8]);
        service.exec("select nightowls.publish_agent_version('sage', '{}')");
        assert_eq!(text(&mut service, start), "r");
        assert_eq!(
            lines(
                &mut service,
                "select org_id, run_id, thread_id, agent, agent_version, runner, resource_id, status, input from nightowls.runs"
            ),
            [format!(
                r#"{org} r t sage 1 worker customer queued {{"q": 1.10}}"#
            )]
        );
        assert_eq!(
            lines(
                &mut service,
                "select version, event_type, payload from nightowls.list_run_events('r')"
            ),
            [
                r#"1 run_queued {"agent": "sage", "input": {"q": 1.10}, "runner": "worker", "status": "queued", "thread_id": "t", "resource_id": "customer", "agent_version": 1}"#
            ]
        );
        // Another tenant's run of that name is another run.
        service.exec(&format!(
            "select nightowls.start_run('r', org => '{other}')"
        ));
        assert_eq!(
            text(
                &mut service,
                "select count(*) from nightowls.list_run_events('r')"
            ),
            "1"
        );
        for (sql, code) in [
            (
                r#"select nightowls.start_run('r', 't', 'sage', '{"q": 2}', 'worker')"#,
                "NW002",
            ),
            (
                r#"select nightowls.start_run('r', 't', 'sage', '{"q": 1.10}', agent_version => 2)"#,
                "NW002",
            ),
            ("select nightowls.start_run('n', 'no thread')", "NW007"),
            ("select nightowls.start_run('n', agent => 'seer')", "NW007"),
            (
                "select nightowls.start_run('n', agent => 'sage', agent_version => 9)",
                "NW007",
            ),
            (
                "select nightowls.start_run('n', parent_run_id => 'none')",
                "NW007",
            ),
            (
                "select nightowls.start_run('n', agent_version => 1)",
                "22023",
            ),
            ("select nightowls.start_run('')", "22023"),
            ("select nightowls.start_run(repeat('x', 256))", "54000"),
            ("select nightowls.start_run('n', metadata => null)", "22004"),
            ("select nightowls.start_run('n', metadata => '[]')", "22023"),
            (
                "select nightowls.start_run('n', input => (repeat('[', 101) || repeat(']', 101))::jsonb)",
                "54000",
            ),
            (
                "select nightowls.start_run('n', org => '00000000-0000-4000-8000-00000000dead')",
                "22023",
            ),
            (
                "select nightowls.set_run_status('none', 'running')",
                "NW007",
            ),
            ("select nightowls.set_run_status('r', 'done')", "22023"),
            ("select nightowls.set_run_status(null, 'running')", "22004"),
            (
                r#"select nightowls.set_run_status('r', 'running', '{"status": "x"}')"#,
                "22023",
            ),
            (
                r#"select nightowls.set_run_status('r', 'running', '{"metadata": 1}')"#,
                "22023",
            ),
            (
                r#"select nightowls.set_run_status('r', 'running', '{"runner": 1}')"#,
                "22023",
            ),
            (
                "select nightowls.set_run_status('r', 'running', container => 'c')",
                "22004",
            ),
            (
                "select nightowls.set_run_status('r', 'running', container => 'c', fence => 1)",
                "NW003",
            ),
            (
                "select nightowls.create_thread('t', 'customer', 'Other')",
                "42710",
            ),
            ("select nightowls.create_thread('')", "22023"),
            (
                "select nightowls.create_thread('u', title => repeat('x', 1025))",
                "54000",
            ),
            ("select nightowls.list_run_events(null)", "22004"),
            (
                "select nightowls.list_run_events('r', max_events => 0)",
                "22023",
            ),
            (
                "select nightowls.list_run_events('r', max_wait => '2 minutes')",
                "22023",
            ),
        ] {
            let refusal = service.refused(sql);
            assert_eq!(refusal.code, code, "{sql}: {refusal}");
        }
        service.exec("select nightowls.create_thread('t', 'customer', 'Hello', '{\"a\": 1}')");
        assert_eq!(
            text(
                &mut service,
                "select (select count(*) from nightowls.runs) || ' ' || (select count(*) from nightowls.threads)"
            ),
            "2 1"
        );
    });
}

#[test]
fn a_status_and_a_snapshot_are_written_only_under_the_floor_that_is_held() {
    on_each_install(|db| {
        default_org(db);
        let mut service = db.service();
        service.exec("select nightowls.start_run('r')");
        let fence = text(
            &mut service,
            "select fence from nightowls.request_floor('thread', 'ann')",
        );
        service.exec(&format!("select nightowls.set_run_status('r', 'running', container => 'thread', fence => {fence}), nightowls.save_run_snapshot('r', '1', container => 'thread', fence => {fence})"));
        service.exec(&format!("select nightowls.release_floor('thread', 'ann', {fence}); select nightowls.request_floor('thread', 'bob')"));
        for call in [
            format!(
                "select nightowls.set_run_status('r', 'completed', container => 'thread', fence => {fence})"
            ),
            format!(
                "select nightowls.save_run_snapshot('r', '2', container => 'thread', fence => {fence})"
            ),
        ] {
            assert_eq!(service.refused(&call).code, "NW003", "{call}");
        }
        assert_eq!(
            lines(
                &mut service,
                "select r.status, s.snapshot, (select count(*) from nightowls.events where aggregate_type = 'run') from nightowls.runs r cross join nightowls.load_run_snapshot('r') s"
            ),
            ["running 1 2"]
        );
    });
}

#[test]
fn a_run_is_suspended_in_one_process_and_goes_on_in_another() {
    on_each_route(|db| {
        default_org(db);
        let mut one = db.service();
        one.exec(r#"select nightowls.start_run('r', input => '{"n": 1}'); select nightowls.set_run_status('r', 'running');
                    begin; select nightowls.save_run_snapshot('r', '{"step": 3, "sum": 1.10}', 0); select nightowls.set_run_status('r', 'suspended', '{"metadata": {"waits_for": "approval"}}'); commit"#);
        drop(one);
        let mut two = db.service();
        assert_eq!(
            lines(
                &mut two,
                "select r.status, r.metadata, s.version, s.snapshot from nightowls.runs r cross join nightowls.load_run_snapshot('r') s"
            ),
            [r#"suspended {"waits_for": "approval"} 1 {"sum": 1.10, "step": 3}"#]
        );
        two.exec(r#"select nightowls.set_run_status('r', 'running', '{"runner": "two"}'); select nightowls.set_run_status('r', 'completed', '{"output": {"sum": 2.20}, "metadata": {"done": true}}')"#);
        assert_eq!(
            lines(
                &mut two,
                "select status, runner, output, metadata, started_at < finished_at from nightowls.runs"
            ),
            [r#"completed two {"sum": 2.20} {"done": true, "waits_for": "approval"} t"#]
        );
        assert_eq!(
            lines(
                &mut two,
                "select event_type from nightowls.list_run_events('r')"
            ),
            [
                "run_queued",
                "run_running",
                "run_suspended",
                "run_running",
                "run_completed"
            ]
        );
    });
}

#[test]
fn snapshots_saved_at_the_same_moment_lose_nothing() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        service.exec("select nightowls.start_run('any'), nightowls.start_run('counted')");
        let versions = together(
            20,
            |_| db.service(),
            |nth, mut session| {
                // Who loads, changes and saves what was expected loses nobody's change.
                loop {
                    let found = lines(
                        &mut session,
                        "select version, snapshot from nightowls.load_run_snapshot('counted')",
                    );
                    let (version, steps) = found.first().map_or((0, "[]".to_owned()), |row| {
                        let (version, steps) = row.split_once(' ').unwrap();
                        (version.parse::<i64>().unwrap(), steps.to_owned())
                    });
                    let save = format!(
                        "select nightowls.save_run_snapshot('counted', '{steps}'::jsonb || '{nth}', {version}, keep => 3)"
                    );
                    match session.try_exec(&save) {
                        Ok(()) => break,
                        Err(refusal) => assert_eq!(refusal.code, "NW001", "{refusal}"),
                    }
                }
                text(
                    &mut session,
                    &format!("select nightowls.save_run_snapshot('any', '{nth}')"),
                )
                .parse::<i64>()
                .unwrap()
            },
        );
        let mut sorted = versions.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (1..=20).collect::<Vec<_>>());
        for (nth, version) in versions.iter().enumerate() {
            assert_eq!(
                text(
                    &mut service,
                    &format!("select snapshot from nightowls.load_run_snapshot('any', {version})")
                ),
                nth.to_string()
            );
        }
        assert_eq!(
            text(
                &mut service,
                "select version || ' ' || (select string_agg(e::text, ',' order by e::int) from jsonb_array_elements_text(snapshot) e) from nightowls.load_run_snapshot('counted')"
            ),
            format!(
                "20 {}",
                (0..20).map(|n| n.to_string()).collect::<Vec<_>>().join(",")
            )
        );
        assert_eq!(
            lines(
                &mut service,
                "select version from nightowls.run_snapshots where run_id = 'counted' order by 1"
            ),
            ["18", "19", "20"]
        );
        for (sql, code) in [
            ("select nightowls.save_run_snapshot('none', '1')", "NW007"),
            ("select nightowls.save_run_snapshot('any', null)", "22004"),
            (
                "select nightowls.save_run_snapshot('any', '1', keep => 0)",
                "22023",
            ),
            ("select nightowls.save_run_snapshot('any', '1', 3)", "NW001"),
            ("select nightowls.load_run_snapshot(null)", "22004"),
        ] {
            assert_eq!(service.refused(sql).code, code, "{sql}");
        }
        assert_eq!(
            text(
                &mut service,
                "select count(*) from nightowls.load_run_snapshot('none')"
            ),
            "0"
        );
    });
}

#[test]
fn a_runs_events_are_read_on_from_any_position_and_waited_for() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        service.exec("select nightowls.start_run('r'); select nightowls.append_event('other', 'x', 'noted'); select nightowls.set_run_status('r', 'running')");
        let all = lines(
            &mut service,
            "select position, version from nightowls.list_run_events('r')",
        );
        assert_eq!(all.len(), 2);
        // After its own events, and after positions of others.
        assert_eq!(
            lines(&mut service, "select p, (select string_agg(version::text, ' ') from nightowls.list_run_events('r', p)) from generate_series(0, 9) p, (select min(position) as first, max(position) as last from nightowls.events where aggregate_type = 'run') x where p in (first - 1, first, first + 1, last, last + 1)")
                .iter().map(|line| line.split_once(' ').unwrap().1.to_owned()).collect::<Vec<_>>(),
            ["1 2", "2", "2", "null", "null"]
        );
        assert_eq!(
            text(
                &mut service,
                "select string_agg(version::text, ' ') from nightowls.list_run_events('r', max_events => 1)"
            ),
            "1"
        );
        assert_eq!(
            text(
                &mut service,
                "select count(*) from nightowls.list_run_events('none')"
            ),
            "0"
        );
        assert_eq!(
            text(
                &mut service,
                "select count(*) from nightowls.list_run_events('r', 99, max_wait => '50 ms')"
            ),
            "0"
        );
        service.exec("begin isolation level repeatable read");
        assert_eq!(
            service
                .refused("select nightowls.list_run_events('r', 99, max_wait => '1 second')")
                .code,
            "25001"
        );
        service.exec("rollback");

        let last = text(
            &mut service,
            "select max(position) from nightowls.list_run_events('r')",
        );
        std::thread::scope(|scope| {
            let mut waiter = db.service();
            let pid = waiter.pid();
            let waiting = scope.spawn(move || {
                let start = Instant::now();
                let found = lines(&mut waiter, &format!("select event_type from nightowls.list_run_events('r', {last}, max_wait => '30 s')"));
                (found, start.elapsed())
            });
            if db.route() == crate::support::Route::Direct {
                let mut watcher = db.superuser();
                wait_until("it waits", Duration::from_secs(10), || {
                    watcher.value(&format!("select 1 from pg_stat_activity where pid = {pid} and state = 'active' and wait_event is not null")).is_some()
                });
            }
            service.exec("select nightowls.set_run_status('r', 'completed')");
            let (found, waited) = waiting.join().unwrap();
            assert_eq!(found, ["run_completed"]);
            assert!(waited < Duration::from_secs(20), "{waited:?}");
        });
    });
}

/// What is remembered of a subject, on every way it is remembered.
fn remember(db: &Db, org: &str) {
    db.service().exec(&format!(
        r#"select nightowls.create_thread('t', 'cust', 'Zanzibar title', '{{"m": "Zanzibar"}}', '{org}');
           select nightowls.start_run('r', 't', input => '{{"i": "Zanzibar"}}', metadata => '{{"m": "Zanzibar"}}', org => '{org}');
           select nightowls.set_run_status('r', 'running', '{{"metadata": {{"x": "Zanzibar"}}}}', org => '{org}');
           select nightowls.save_run_snapshot('r', '{{"s": "Zanzibar"}}', org => '{org}');
           select nightowls.set_run_status('r', 'failed', '{{"error": "Zanzibar", "output": ["Zanzibar"]}}', org => '{org}');
           select nightowls.append_message('t', '"Zanzibar"', run_id => 'r', metadata => '{{"m": "Zanzibar"}}', org => '{org}');
           select nightowls.append_message('t', '"Zanzibar too"', author => '{{"type": "user", "id": "ann"}}', org => '{org}');
           select nightowls.scratchpad_put(s || ':' || i, 'k', '"Zanzibar"', org => '{org}') from (values ('thread', 't'), ('run', 'r'), ('user', 'ann')) x (s, i);
           select nightowls.create_followup('t', now() + interval '1 day', '"Zanzibar"', org => '{org}');
           select nightowls.publish_agent_version('sage', '{{"instructions": "Zanzibar"}}', org => '{org}')"#
    ));
}

#[test]
fn a_subject_of_the_swarm_is_forgotten_everywhere_in_one_org_only() {
    on_each_install(|db| {
        let org = default_org(db);
        let other = new_org(db, "other");
        remember(db, &org);
        remember(db, &other);
        let mut service = db.service();
        let traces = |service: &mut crate::support::Session| {
            lines(
                service,
                &format!(
                    "select distinct table_name, column_name from (select (s).* from (select nightowls.scan_for('Zanzibar') s) x) s where s::text like '%{org}%' order by 1, 2"
                ),
            )
        };
        assert!(
            traces(&mut service).len() >= 13,
            "{:?}",
            traces(&mut service)
        );
        // What one person said, and nothing else of the thread.
        service.exec("select nightowls.erase('user', 'ann', 'asked')");
        assert_eq!(
            lines(
                &mut service,
                "select seq, content from nightowls.list_messages('t')"
            ),
            [r#"1 "Zanzibar""#, "2 {}"]
        );
        service.exec("select nightowls.erase('thread', 't', 'asked'), nightowls.erase('run', 'r', 'asked'), nightowls.erase('agent', 'sage', 'asked')");
        assert_eq!(traces(&mut service), Vec::<String>::new());
        let theirs = text(
            &mut service,
            &format!(
                "select count(*) from (select nightowls.scan_for('Zanzibar') s) x where s::text like '%{other}%'"
            ),
        );
        assert!(theirs.parse::<i32>().unwrap() >= 13, "{theirs}");
        // Its places stay.
        assert_eq!(
            text(
                &mut service,
                "select count(*) from nightowls.messages where org_id = nightowls.current_org()"
            ),
            "2"
        );
    });
}
