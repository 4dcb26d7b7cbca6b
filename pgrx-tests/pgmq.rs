//! pgmq's functions over our queues: their shape, their meaning, the clients that call them,
//! and the messages of a real pgmq, taken over.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use postgres::fallible_iterator::FallibleIterator as _;

use crate::fixture::{default_org, lines};
use crate::orm::{Found, Tools, or_skip, pip, run};
use crate::projections::text;
use crate::queue_rpc::{node_clients, place};
use crate::support::{Db, SERVICE, STRANGER, Session, on_each_install, on_each_route, quote};

/// The Python client, which carries pgmq's own SQL.
fn python_client() -> Option<&'static Tools> {
    static PYTHON: OnceLock<Found> = OnceLock::new();
    or_skip("pgmq's client", PYTHON.get_or_init(|| pip("clients/py")))
}

#[track_caller]
fn installed(db: &Db) -> Session {
    default_org(db);
    db.direct(db.install().owner())
        .exec("select nightowls.install_pgmq()");
    db.service()
}

#[test]
fn its_functions_have_the_names_arguments_and_results_of_pgmqs() {
    on_each_install(|db| {
        installed(db);
        let mut made = lines(
            &mut db.superuser(),
            "select p.proname || '(' || pg_get_function_arguments(p.oid) || ') ' || pg_get_function_result(p.oid)
               from pg_proc p where p.pronamespace = 'pgmq'::regnamespace ",
        );
        made.sort_unstable();
        let mut wanted: Vec<_> = include_str!("clients/pgmq-1.11.txt").lines().collect();
        wanted.sort_unstable();
        assert_eq!(made, wanted);
        for (kind, columns) in [
            (
                "message_record",
                "msg_id bigint, read_ct integer, enqueued_at timestamp with time zone, last_read_at timestamp with time zone, \
                 vt timestamp with time zone, message jsonb, headers jsonb",
            ),
            (
                "queue_record",
                "queue_name character varying, is_partitioned boolean, is_unlogged boolean, created_at timestamp with time zone",
            ),
            (
                "metrics_result",
                "queue_name text, queue_length bigint, newest_msg_age_sec integer, oldest_msg_age_sec integer, total_messages bigint, \
                 scrape_time timestamp with time zone, queue_visible_length bigint",
            ),
        ] {
            let made = text(
                &mut db.superuser(),
                &format!(
                    "select string_agg(attname || ' ' || format_type(atttypid, atttypmod), ', ' order by attnum)
                       from pg_attribute where attrelid = 'pgmq.{kind}'::regclass and attnum > 0"
                ),
            );
            assert_eq!(made, columns, "{kind}");
        }
    });
}

#[test]
fn every_one_of_its_functions_can_be_called_and_does_what_it_says() {
    on_each_install(|db| {
        installed(db);
        let name = db.name();
        db.superuser().exec(&format!(
            "alter database {name} set track_functions to 'all'; alter database {name} set timezone to 'UTC'"
        ));
        let mut service = db.service();
        for sql in include_str!("clients/calls.sql")
            .split(";\n")
            .filter(|sql| !sql.trim().is_empty())
        {
            let rows = lines(&mut service, sql);
            assert!(
                rows.iter()
                    .all(|row| row == "t" || row.is_empty() || row == "null"),
                "{sql}: {rows:?}"
            );
        }
        service.exec("select pg_stat_force_next_flush()");
        drop(service);
        let uncalled = "select p.oid::regprocedure from pg_proc p
              where p.pronamespace = 'pgmq'::regnamespace and p.proname <> 'notify_queue_listeners'
                and not exists (select from pg_stat_user_functions s where s.funcid = p.oid and s.calls > 0)";
        assert_eq!(lines(&mut db.superuser(), uncalled), Vec::<String>::new());
    });
}

#[test]
fn what_pgmq_answers_badly_is_answered_better() {
    on_each_route(|db| {
        let mut service = installed(db);
        service.exec("select pgmq.create('jobs'), pgmq.send('jobs', '1')");
        for (sql, code) in [
            ("pgmq.send('jbos', '1')", "NW007"),
            ("pgmq.read('jbos', 1, 1)", "NW007"),
            ("pgmq.pop('jbos')", "NW007"),
            ("pgmq.archive('jbos', 1)", "NW007"),
            ("pgmq.delete('jbos', 1)", "NW007"),
            ("pgmq.set_vt('jbos', 1, 1)", "NW007"),
            ("pgmq.purge_queue('jbos')", "NW007"),
            ("pgmq.metrics('jbos')", "NW007"),
            ("pgmq.bind_topic('a', 'jbos')", "NW007"),
            ("pgmq.enable_notify_insert('jbos')", "NW007"),
            ("pgmq.create('a;b')", "22023"),
            ("pgmq.create('')", "22023"),
            ("pgmq.create(null)", "22004"),
            ("pgmq.create(repeat('a', 48))", "54000"),
            ("pgmq.create(repeat('ö', 47))", "54000"),
            ("pgmq.validate_queue_name(repeat('a', 48))", "54000"),
            ("pgmq.read('jobs', null, 1)", "22004"),
            ("pgmq.read('jobs', 1, -1)", "22023"),
            ("pgmq.send('jobs', '1', null::int)", "22004"),
            ("pgmq.send('jobs', '1', '[]'::jsonb)", "22023"),
            ("pgmq.send_batch('jobs', '{}')", "22023"),
            ("pgmq.send_batch('jobs', null)", "22023"),
            (
                "pgmq.send_batch('jobs', array['1']::jsonb[], array['{}', '{}']::jsonb[])",
                "22023",
            ),
            ("pgmq.send_topic('a..b', '1')", "22023"),
            ("pgmq.send_topic('a', '1', -1)", "22023"),
            ("pgmq.bind_topic('a.**', 'jobs')", "22023"),
            ("pgmq.update_notify_insert('jobs', 1)", "55000"),
            ("pgmq.enable_notify_insert('jobs', -1)", "22023"),
        ] {
            let refusal = service.refused(&format!("select {sql}"));
            assert_eq!(refusal.code, code, "{sql}: {refusal}");
            if code == "NW007" {
                assert_eq!(refusal.hint, "Did you mean \"jobs\"?", "{sql}");
            }
        }
        assert_eq!(
            text(
                &mut service,
                "select queue_length from pgmq.metrics('jobs')"
            ),
            "1"
        );
        // An org sees its own.
        let org = text(&mut service, "select nightowls.create_org('other')");
        service.exec(&format!(
            "begin; select set_config('nightowls.org_id', '{org}', true)"
        ));
        assert_eq!(
            lines(&mut service, "select * from pgmq.list_queues()"),
            Vec::<String>::new()
        );
        assert_eq!(
            service.refused("select pgmq.read('jobs', 1, 1)").code,
            "NW007"
        );
        service.exec("rollback");
    });
}

#[test]
fn it_is_made_once_by_the_owner_and_never_over_another() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        let install = "select nightowls.install_pgmq()";
        assert_eq!(db.service().refused(install).code, "42501");
        owner.exec("create schema pgmq; create table pgmq.meta (mine int)");
        let refusal = owner.refused(install);
        assert_eq!(refusal.code, "42P06");
        assert!(refusal.hint.contains("adopt_pgmq"), "{refusal}");
        assert_eq!(
            lines(
                &mut owner,
                "select relname from pg_class where relnamespace = 'pgmq'::regnamespace"
            ),
            ["meta"]
        );
        owner.exec("drop schema pgmq cascade");
        owner.exec(install);
        owner.exec(install);
        let mut stranger = db.session(STRANGER);
        assert_eq!(stranger.refused("select pgmq.create('q')").code, "42501");
        owner.exec(&format!("select nightowls.grant_service('{STRANGER}')"));
        owner.exec(install);
        stranger.exec("select pgmq.create('q')");
        owner.exec("comment on schema pgmq is 'pgmq''s functions over the queues of nightowls; made by nightowls.install_pgmq(): old'");
        let refusal = owner.refused(install);
        assert!(refusal.hint.contains("drop schema pgmq"), "{refusal}");
        assert_eq!(
            text(
                &mut db.superuser(),
                "select count(*) from pg_proc p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
                  where p.pronamespace = 'pgmq'::regnamespace and a.grantee = 0"
            ),
            "0"
        );
    });
}

#[test]
fn a_send_notifies_once_a_transaction_and_holds_up_nobody() {
    on_each_install(|db| {
        let mut service = installed(db);
        service.exec("select pgmq.create('Jobs'), pgmq.enable_notify_insert('jobs')");
        let mut held = db.service();
        held.exec("begin; select pgmq.send('jobs', '1'), pgmq.send('jobs', '2')");
        service.exec("set lock_timeout to '5s'; set statement_timeout to '5s'");
        service.exec("select pgmq.send('jobs', '3')");
        let mut ears = db.service();
        ears.exec("listen \"pgmq.q_jobs.INSERT\"");
        held.exec("commit");
        ears.exec("select 1");
        let heard = ears
            .client()
            .notifications()
            .timeout_iter(Duration::from_secs(5))
            .next()
            .expect("the connection is there")
            .expect("a notification");
        assert_eq!(heard.channel(), "pgmq.q_jobs.INSERT");
        // The other send of the transaction says nothing more.
        ears.exec("select 1");
        let more = ears.client().notifications().iter().count();
        assert_eq!(more.expect("the connection is there"), 0);
    });
}

#[test]
fn the_python_client_runs_its_life_cycle_unchanged() {
    let Some(tools) = python_client() else { return };
    place(tools, "py", "lifecycle.py");
    on_each_route(|db| {
        db.superuser().exec(&format!(
            "alter database {} set datestyle to iso",
            db.name()
        ));
        installed(db);
        let said = run(
            &tools.folder.join("venv/bin/python"),
            &["-W", "ignore", "lifecycle.py"],
            &tools.folder,
            &db.url(SERVICE),
        );
        assert_eq!(said, "done\n");
    });
}

#[test]
fn the_node_client_runs_its_life_cycle_unchanged() {
    let Some(tools) = node_clients() else { return };
    place(tools, "npm", "lifecycle.mjs");
    on_each_route(|db| {
        db.superuser().exec(&format!(
            "alter database {} set datestyle to iso",
            db.name()
        ));
        installed(db);
        let said = run(
            Path::new("node"),
            &["lifecycle.mjs"],
            &tools.folder,
            &db.url(SERVICE),
        );
        assert_eq!(said, "done\n");
    });
}

/// The real pgmq's SQL, which the Python client carries.
pub fn real_pgmq() -> Option<String> {
    let tools = python_client()?;
    let lib = fs::read_dir(tools.folder.join("venv/lib")).expect("a venv has a lib");
    let python = lib
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.join("site-packages/pgmq").exists())
        .expect("the client is installed");
    let path = python.join("site-packages/pgmq/sql/pgmq.sql");
    Some(fs::read_to_string(path).expect("the client carries pgmq's SQL"))
}

const ADOPT: &str = "select messages, archived, more from nightowls.adopt_pgmq";

#[test]
fn the_messages_of_a_real_pgmq_are_taken_over_with_their_ids() {
    let Some(real) = real_pgmq() else { return };
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        // As the owner: pgmq installed from its SQL belongs to whoever runs it.
        db.superuser().exec(&format!(
            "grant pg_monitor to {} with admin option",
            db.install().owner()
        ));
        owner.exec("set client_min_messages to warning");
        owner.exec(&real);
        owner.exec("select pgmq.create('Old Jobs')");
        owner.exec(
            "select pgmq.send_batch('Old Jobs', array(select to_jsonb(i) from generate_series(1, 200) i));
             select pgmq.send_batch('Old Jobs', array(select to_jsonb(i) from generate_series(201, 210) i), 3600);
             select pgmq.send_batch('Old Jobs', array(select to_jsonb(i) from generate_series(211, 230) i),
                                    array(select jsonb_build_object('x-pgmq-group', 'g' || i % 2, 'n', i) from generate_series(211, 230) i));
             select pgmq.send('Old Jobs', null::jsonb);
             select pgmq.archive('Old Jobs', array[3, 7, 50]);
             select pgmq.delete('Old Jobs', 9::bigint);
             select pgmq.read('Old Jobs', 600, 5);
             select pgmq.read('Old Jobs', 0, 1)",
        );
        let listing = |session: &mut Session, table: &str, more: &str| {
            lines(
                session,
                &format!(
                    "select msg_id, read_ct, enqueued_at, last_read_at, message, headers{more} from {table} order by msg_id"
                ),
            )
        };
        let before = listing(&mut owner, "pgmq.\"q_old jobs\"", "");
        let archive = listing(&mut owner, "pgmq.\"a_old jobs\"", ", archived_at");
        let leased = lines(
            &mut owner,
            "select msg_id, vt from pgmq.\"q_old jobs\" where vt > now() order by msg_id",
        );
        assert_eq!((before.len(), archive.len(), leased.len()), (227, 3, 15));

        let refusal = owner.refused(&format!("{ADOPT}('Old Job')"));
        assert_eq!(
            (refusal.code.as_str(), refusal.hint.as_str()),
            ("NW007", "Did you mean \"old jobs\"?")
        );
        assert_eq!(
            owner.refused(&format!("{ADOPT}('Old Jobs', 0)")).code,
            "22023"
        );
        assert_eq!(
            db.service().refused(&format!("{ADOPT}('Old Jobs')")).code,
            "42501"
        );

        // A call that does not commit moves nothing; nor is anything there twice after one that does.
        owner.exec(&format!("begin; {ADOPT}('Old Jobs', 100); rollback"));
        assert_eq!(listing(&mut owner, "pgmq.\"q_old jobs\"", "").len(), 227);
        assert_eq!(
            lines(&mut owner, &format!("{ADOPT}('Old Jobs', 100)")),
            ["97 3 t"]
        );
        // Somebody is still at work there: what he has is left for a later call; what he sends comes with it.
        let mut other = db.owner();
        other.exec("begin; select * from pgmq.read('Old Jobs', 60, 1)");
        let rest = lines(&mut owner, &format!("{ADOPT}('Old Jobs')"));
        assert_eq!(rest, ["129 0 t"]);
        assert_eq!(
            lines(&mut owner, &format!("{ADOPT}('Old Jobs')")),
            ["0 0 t"]
        );
        other.exec("rollback; select pgmq.send('Old Jobs', '\"new\"')");
        assert_eq!(
            lines(&mut owner, &format!("{ADOPT}('old jobs')")),
            ["2 0 f"]
        );
        assert_eq!(
            lines(&mut owner, &format!("{ADOPT}('Old Jobs')")),
            ["0 0 f"]
        );

        let after = listing(&mut owner, "nightowls.queue_messages", "");
        assert_eq!(after.len(), 228);
        for (row, wanted) in after.iter().zip(&before) {
            // A body that was null is JSON's null, which looks the same here.
            assert_eq!(row, wanted);
        }
        assert_eq!(
            listing(&mut owner, "nightowls.queue_archive", ", archived_at"),
            archive
        );
        assert_eq!(
            lines(
                &mut owner,
                "select msg_id, coalesce(lease_until, due_at) from nightowls.queue_messages where due_at > now() order by msg_id"
            ),
            leased
        );

        // New ids lie above; order, groups and leases go on.
        owner.exec("drop schema pgmq cascade; select nightowls.install_pgmq()");
        let mut service = db.service();
        let id = text(&mut service, "select pgmq.send('Old Jobs', '\"newer\"')");
        assert!(id.parse::<i64>().expect("an id") > 232, "{id}");
        let read = lines(
            &mut service,
            "select msg_id from pgmq.read('Old Jobs', 60, 500)",
        );
        // Ready at once: 200 less three archived, one deleted, five leased; of each group its head; the three sent last.
        assert_eq!(read.len(), 191 + 2 + 3, "{read:?}");
        // Whoever had read a message there can still delete it by its id.
        let held = leased[0].split(' ').next().expect("an id");
        assert_eq!(
            text(
                &mut service,
                &format!("select pgmq.delete('Old Jobs', {}::bigint)", quote(held))
            ),
            "t"
        );
        service.exec("select count(*) from pgmq.delete('Old Jobs', array(select msg_id from nightowls.queue_messages where lease_until > now()))");
        assert_eq!(
            lines(
                &mut service,
                "select headers ->> 'n' from pgmq.read_grouped('Old Jobs', 60, 500) order by 1"
            ),
            ["213", "214"]
        );
    });
}

#[test]
fn a_queue_of_ours_with_the_same_ids_is_not_mixed_up_with_theirs() {
    let Some(real) = real_pgmq() else { return };
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        db.superuser().exec(&format!(
            "grant pg_monitor to {} with admin option",
            db.install().owner()
        ));
        owner.exec("set client_min_messages to warning");
        owner.exec(&real);
        owner.exec("select pgmq.create('jobs'); select pgmq.send_batch('jobs', array['1', '2', '3']::jsonb[])");
        owner.exec(
            "select nightowls.create_queue('jobs'); select nightowls.send('jobs', '\"ours\"')",
        );
        let refusal = owner.refused(&format!("{ADOPT}('jobs')"));
        assert_eq!(refusal.code, "23505");
        assert_eq!(text(&mut owner, "select count(*) from pgmq.q_jobs"), "3");
        assert_eq!(
            lines(
                &mut owner,
                &format!("{ADOPT}('jobs', into_queue => 'Theirs')")
            ),
            ["3 0 f"]
        );
        assert_eq!(
            lines(
                &mut owner,
                "select q.name, count(*) from nightowls.queue_messages m join nightowls.queues q using (queue_id) group by 1 order by 1"
            ),
            ["jobs 1", "theirs 3"]
        );
    });
}
