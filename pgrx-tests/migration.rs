//! `owl` and the migrations it writes, up to the database they make.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use nightowls::migration::{VERSION, extension_script, migrations};

use crate::fixture::{default_org, lines};
use crate::pgmq::real_pgmq;
use crate::support::{Db, Install, OWNER, STRANGER, on_each_install, on_install, quote, server};

/// A folder of its own, removed at the end of its test.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let path = std::env::temp_dir().join(format!(
            "nightowls-folder-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        ));
        fs::create_dir(&path).expect("the folder is new");
        Folder(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn write(&self, name: &str, text: &str) {
        let path = self.0.join(name);
        fs::create_dir_all(path.parent().expect("a file is in a folder")).expect("a new folder");
        fs::write(path, text).expect("the folder takes a file");
    }

    /// Each file's name and text, in the order of the names.
    pub fn files(&self) -> BTreeMap<String, String> {
        let entries = fs::read_dir(&self.0).expect("the folder is there");
        entries
            .map(|entry| entry.expect("the folder can be read").path())
            .filter(|path| path.is_file())
            .map(|path| {
                let name = path.file_name().expect("a file has a name");
                let text = fs::read_to_string(&path).expect("the file is text");
                (name.to_string_lossy().into_owned(), text)
            })
            .collect()
    }

    pub fn names(&self) -> Vec<String> {
        self.files().into_keys().collect()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn owl() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_owl"));
    command.stdin(Stdio::null());
    command
}

fn run(command: &mut Command) -> Output {
    command.output().expect("owl runs")
}

/// Runs `owl install`, which must succeed; returns what it said.
pub fn owl_install(folder: &Path, options: &[&str]) -> String {
    let output = run(owl().arg("install").arg(folder).args(options));
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("owl speaks UTF-8")
}

/// Runs `owl` with arguments that it must refuse; returns the exit status and what it said.
fn refused(arguments: &[&str]) -> (i32, String) {
    let output = run(owl().args(arguments));
    (
        output.status.code().expect("owl was not killed"),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

fn text(path: &Path) -> &str {
    path.to_str().expect("the folder's name is UTF-8")
}

/// The names without their numbers.
fn unnumbered(names: &[String]) -> Vec<&str> {
    names
        .iter()
        .map(|name| name.split_once('_').expect("a numbered name").1)
        .collect()
}

fn expected_names() -> Vec<String> {
    migrations(VERSION)
        .iter()
        .map(|file| format!("nightowls_{VERSION}_{}.sql", file.concern))
        .collect()
}

#[test]
fn owl_install_writes_the_files_that_the_extension_hands_out() {
    let folder = Folder::new();
    let said = owl_install(folder.path(), &[]);
    assert!(said.ends_with("next: supabase db push\n"), "{said}");

    on_install(Install::Extension, |db| {
        let handed_out = db
            .superuser()
            .rows("select version, name, sql from nightowls.migration_files()");
        let files = folder.files();
        assert_eq!(handed_out.len(), files.len());
        for (row, (name, sql)) in handed_out.iter().zip(&files) {
            let (number, rest) = name.split_once('_').expect("a numbered name");
            assert_eq!(number.len(), 14);
            assert_eq!(row[0].as_deref(), Some(VERSION));
            assert_eq!(row[1].as_deref(), rest.strip_suffix(".sql"));
            assert_eq!(row[2].as_deref(), Some(sql.as_str()));
        }
    });
}

#[test]
fn the_installed_version_is_that_of_owl() {
    on_each_install(|db| {
        let installed = db.owner().value("select nightowls.version()");
        assert_eq!(installed.as_deref(), Some(VERSION));
    });
    let said = run(owl().arg("--version")).stdout;
    assert_eq!(String::from_utf8_lossy(&said), format!("owl {VERSION}\n"));
}

#[test]
fn timestamps_follow_each_other_and_every_file_that_is_there() {
    let folder = Folder::new();
    folder.write("20991231235959_host.sql", "select 1;");
    owl_install(folder.path(), &[]);
    let names = folder.names();
    assert_eq!(names[0], "20991231235959_host.sql");
    assert_eq!(unnumbered(&names[1..]), expected_names());
    for (second, name) in names[1..].iter().enumerate() {
        assert!(
            name.starts_with(&format!("2100010100{:02}{:02}_", second / 60, second % 60)),
            "{name}"
        );
    }
}

#[test]
fn writing_again_changes_nothing() {
    for options in [&[][..], &["--service-range", "00300-00399"]] {
        let folder = Folder::new();
        owl_install(folder.path(), options);
        let before = folder.files();
        let said = owl_install(folder.path(), options);
        assert!(said.starts_with("nothing to write"), "{said}");
        assert_eq!(folder.files(), before);
    }
}

#[test]
fn only_what_is_missing_is_added() {
    let folder = Folder::new();
    owl_install(folder.path(), &[]);
    let last = folder.names().pop().expect("there are files");
    fs::remove_file(folder.path().join(&last)).expect("the file was there");
    folder.write("20991231235959_host.sql", "select 1;");
    let before = folder.files();

    owl_install(folder.path(), &[]);
    let mut after = folder.files();
    let (added, _) = after.pop_last().expect("there are files");
    assert_eq!(after, before);
    assert_eq!(
        added.split_once('_').expect("a numbered name").1,
        last.split_once('_').expect("a numbered name").1
    );
    assert!(added.starts_with("21000101000000_"), "{added}");
}

#[test]
fn owls_at_once_write_each_file_once() {
    let folder = Folder::new();
    let children: Vec<_> = (0..8)
        .map(|_| {
            owl()
                .arg("install")
                .arg(folder.path())
                .stdout(Stdio::null())
                .spawn()
                .expect("owl runs")
        })
        .collect();
    for mut child in children {
        assert!(child.wait().expect("owl ends").success());
    }
    assert_eq!(unnumbered(&folder.names()), expected_names());
}

#[test]
fn a_service_range_gives_its_first_free_numbers() {
    let folder = Folder::new();
    folder.write("00301_host.sql", "select 1;");
    folder.write("20260101000000_host.sql", "select 1;");
    let said = owl_install(folder.path(), &["--service-range", "00300"]);
    let names = folder.names();
    assert!(names[0].starts_with("00300_nightowls_"), "{names:?}");
    assert_eq!(names[1], "00301_host.sql");
    assert!(names[2].starts_with("00302_nightowls_"), "{names:?}");
    assert!(
        said.ends_with("next: supabase db push --include-all\n"),
        "{said}"
    );

    let narrow = Folder::new();
    narrow.write("00301_host.sql", "select 1;");
    let before = narrow.files();
    let (status, said) = refused(&[
        "install",
        text(narrow.path()),
        "--service-range",
        "00300-00302",
    ]);
    assert_eq!(status, 1);
    assert!(said.contains("00300-00302 is exhausted"), "{said}");
    assert_eq!(narrow.files(), before);
}

#[test]
fn the_range_may_come_from_a_kodo_config_above_the_folder() {
    let project = Folder::new();
    project.write(
        ".kodo/config.json",
        r#"{"stack": {"sharedDatabase": {"serviceRanges": {"api": "00200-00299", "nightowls": "00300-00399"}}}}"#,
    );
    let migrations = project.path().join("supabase/migrations");
    owl_install(&migrations, &[]);
    assert!(
        migrations
            .join(format!("00300_nightowls_{VERSION}_prologue.sql"))
            .exists()
    );

    project.write(".kodo/config.json", "{");
    let (status, said) = refused(&["install", text(&migrations)]);
    assert_eq!(status, 1);
    assert!(said.contains("not valid JSON"), "{said}");
}

#[test]
fn a_dry_run_writes_nothing() {
    let folder = Folder::new();
    let target = folder.path().join("migrations");
    let said = owl_install(&target, &["--dry-run"]);
    assert_eq!(said.matches("would write").count(), expected_names().len());
    assert!(!target.exists());
}

#[test]
fn a_failed_install_leaves_the_folder_as_it_was() {
    let folder = Folder::new();
    folder.write("00299_host.sql", "select 1;");
    // A folder where the second file goes: renaming onto it fails.
    let second = &expected_names()[1];
    fs::create_dir(folder.path().join(format!("00301_{second}"))).expect("a new folder");
    let (status, said) = refused(&["install", text(folder.path()), "--service-range", "00300"]);
    assert_eq!(status, 1);
    assert!(said.contains("cannot write"), "{said}");
    assert_eq!(folder.names(), ["00299_host.sql"]);
}

#[test]
fn another_version_without_a_way_to_ours_is_refused() {
    for (version, reason) in [
        ("0.0.1", "no upgrade from nightowls 0.0.1"),
        ("999.0.0", "use a newer owl"),
    ] {
        let folder = Folder::new();
        folder.write(&format!("1_nightowls_{version}_events.sql"), "select 1;");
        let before = folder.files();
        let (status, said) = refused(&["install", text(folder.path())]);
        assert_eq!(status, 1);
        assert!(said.contains(reason), "{said}");
        assert_eq!(folder.files(), before);
    }
}

#[test]
fn wrong_usage_has_its_own_exit_status() {
    for arguments in [
        &[][..],
        &["fly"],
        &["install"],
        &["install", ""],
        &["install", "a", "b"],
        &["install", "a", "--loud"],
        &["install", "a", "--service-range", "x"],
        &["install", "a", "--service-range"],
        &["script", "a"],
    ] {
        let (status, said) = refused(arguments);
        assert_eq!(status, 2, "{arguments:?}: {said}");
        assert!(said.contains("Try \"owl help\"."), "{said}");
    }
}

#[test]
fn owl_info_tells_present_missing_and_changed() {
    let folder = Folder::new();
    owl_install(folder.path(), &[]);
    let names = folder.names();
    let (changed, missing) = (&names[0], &names[1]);
    folder.write(changed, "select 1;");
    fs::remove_file(folder.path().join(missing)).expect("the file was there");

    let said = run(owl().arg("info").arg(folder.path())).stdout;
    let said = String::from_utf8_lossy(&said);
    assert!(said.contains(&format!("changed  {changed}")), "{said}");
    let unnumbered = missing.split_once('_').expect("a numbered name").1;
    let unnumbered = unnumbered.strip_suffix(".sql").expect("an SQL file");
    assert!(said.contains(&format!("missing  {unnumbered}")), "{said}");
    assert!(said.contains(&format!("present  {}", names[2])), "{said}");
}

#[test]
fn owl_info_shows_the_environment_without_secrets() {
    let said = run(owl()
        .args(["info", "--env"])
        .env(
            "DATABASE_URL",
            "postgresql://ann:hunter2@db.example:5432/app",
        )
        .env("PGPASSWORD", "hunter2")
        .env("SUPABASE_SERVICE_ROLE_KEY", "hunter2")
        .env("PGHOST", "db.example"));
    let said = String::from_utf8_lossy(&said.stdout);
    assert!(
        said.contains("postgresql://ann:***@db.example:5432/app"),
        "{said}"
    );
    assert!(said.contains("= db.example"), "{said}");
    assert!(!said.contains("hunter2"), "{said}");
}

#[test]
fn owl_prints_the_script_of_the_extension() {
    let said = run(owl().arg("script"));
    assert_eq!(String::from_utf8_lossy(&said.stdout), extension_script());
}

/// Applies every file of `folder` by `psql -f`, in order, as `role`.
fn psql(db: &Db, role: &str, folder: &Folder) -> Output {
    let mut command = db.command("psql", role);
    command.args(["--no-psqlrc", "--quiet", "--single-transaction"]);
    command.args(["--set", "ON_ERROR_STOP=1", "--set", "VERBOSITY=verbose"]);
    for name in folder.names() {
        command.arg("--file").arg(folder.path().join(name));
    }
    command.output().expect("psql runs")
}

#[test]
fn the_files_install_by_psql_in_their_order() {
    let folder = Folder::new();
    owl_install(folder.path(), &[]);
    let db = server().empty_database(Install::Plain);
    let output = psql(&db, OWNER, &folder);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let installed = db.owner().value("select nightowls.version()");
    assert_eq!(installed.as_deref(), Some(VERSION));

    // Once more: the first statement refuses.
    let output = psql(&db, OWNER, &folder);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(
        said.contains("42710: nightowls is installed in this database already"),
        "{said}"
    );
}

#[test]
fn the_plain_install_refuses_a_role_without_bypassrls() {
    let folder = Folder::new();
    owl_install(folder.path(), &[]);
    let db = server().empty_database(Install::Plain);
    db.superuser().exec(&format!(
        "grant create on database {} to {STRANGER}",
        db.name()
    ));
    let output = psql(&db, STRANGER, &folder);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(
        said.contains(&format!(
            "42501: role \"{STRANGER}\" may not bypass row level security"
        )),
        "{said}"
    );
    assert!(
        said.contains(&format!("alter role {STRANGER} bypassrls")),
        "{said}"
    );
    assert_eq!(
        db.superuser().value("select to_regnamespace('nightowls')"),
        None
    );
}

/// What the first statement of an install is refused with.
fn refused_install(db: &Db, install: Install) -> crate::support::Refusal {
    match install {
        Install::Extension => db.superuser().refused("create extension nightowls"),
        Install::Plain => db.session(OWNER).refused(&migrations(VERSION)[0].sql),
    }
}

fn install_by_hand(db: &Db, install: Install) {
    match install {
        Install::Extension => db.superuser().exec("create extension nightowls"),
        Install::Plain => {
            let mut session = db.session(OWNER);
            for file in migrations(VERSION) {
                session.exec(&file.sql);
            }
        }
    }
}

#[test]
fn both_installs_stop_next_to_tables_that_are_not_theirs() {
    for install in Install::ALL {
        let db = server().empty_database(install);
        let mut owner = db.owner();
        owner.exec(
            "create schema nightowls;
             create table nightowls.mastra_threads (id text primary key, title text);
             insert into nightowls.mastra_threads values ('t1', 'kept');",
        );
        let refusal = refused_install(&db, install);
        assert_eq!(refusal.code, "42P06", "{refusal}");
        assert!(
            refusal.detail.contains("nightowls.mastra_threads"),
            "{refusal}"
        );
        let way_out = "alter schema nightowls rename to nightowls_v1";
        assert!(refusal.hint.contains(way_out), "{refusal}");

        owner.exec(way_out);
        install_by_hand(&db, install);
        assert_eq!(
            owner
                .value("select title from nightowls_v1.mastra_threads")
                .as_deref(),
            Some("kept")
        );
    }
}

#[test]
fn an_empty_schema_is_taken_by_the_extension_and_explained_by_the_migration() {
    let db = server().empty_database(Install::Extension);
    db.superuser().exec("create schema nightowls");
    install_by_hand(&db, Install::Extension);

    let db = server().empty_database(Install::Plain);
    db.session(OWNER).exec("create schema nightowls");
    let refusal = refused_install(&db, Install::Plain);
    assert_eq!(refusal.code, "42P06");
    assert!(refusal.hint.contains("drop schema nightowls"), "{refusal}");
}

#[test]
fn the_extension_does_not_move_into_the_schema_of_an_ordinary_role() {
    let db = server().empty_database(Install::Extension);
    let mut superuser = db.superuser();
    superuser.exec(&format!("create schema nightowls authorization {STRANGER}"));
    let refusal = refused_install(&db, Install::Extension);
    assert_eq!(refusal.code, "42501", "{refusal}");
    superuser.exec("alter schema nightowls owner to postgres");
    install_by_hand(&db, Install::Extension);
}

#[test]
fn a_database_takes_one_install_only() {
    on_each_install(|db| {
        let refusal = match db.install() {
            Install::Extension => refused_install(db, Install::Plain),
            Install::Plain => refused_install(db, Install::Extension),
        };
        assert_eq!(refusal.code, "42710", "{refusal}");
        assert!(refusal.hint.contains("one install"), "{refusal}");
    });
}

#[test]
fn a_schema_without_the_right_to_make_one_is_refused_by_the_server() {
    let db = server().empty_database(Install::Extension);
    let refusal = db.session(OWNER).refused(&migrations(VERSION)[0].sql);
    assert_eq!(refusal.code, "42501", "{refusal}");
    let left = db.superuser().value(&format!(
        "select count(*) from pg_namespace where nspname = {}",
        quote("nightowls")
    ));
    assert_eq!(left.as_deref(), Some("0"));
}

/// The SQL blocks of a page, in order.
fn sql_blocks(page: &str) -> Vec<String> {
    let mut blocks = Vec::new();
    let mut block: Option<String> = None;
    for line in page.lines() {
        match (line.trim(), &mut block) {
            ("```sql", None) => block = Some(String::new()),
            ("```", Some(_)) => blocks.extend(block.take()),
            (text, Some(block)) => {
                block.push_str(text);
                block.push('\n');
            }
            _ => (),
        }
    }
    blocks
}

/// The blocks of the part of docs/moving.md under a heading.
fn moving(heading: &str) -> Vec<String> {
    let (_, rest) = include_str!("../docs/moving.md")
        .split_once(&format!("\n## {heading}\n"))
        .expect("the page has the heading");
    sql_blocks(rest.split("\n## ").next().unwrap_or_default())
}

#[test]
fn an_older_schema_moves_over_as_the_page_says() {
    let blocks = moving("Beside an older schema");
    let [rename, org, history] = blocks.as_slice() else {
        panic!("{} blocks", blocks.len());
    };
    for install in Install::ALL {
        let db = server().empty_database(install);
        let mut owner = db.owner();
        owner.exec(
            "create schema nightowls;
             create table nightowls.order_events (
               id bigint primary key, order_id text, kind text, body jsonb, created_at timestamp);
             insert into nightowls.order_events
             select i, 'o' || i % 3, 'order_changed', jsonb_build_object('n', i), '2020-01-01'
               from generate_series(1, 30) i;",
        );
        owner.exec(rename);
        install_by_hand(&db, install);
        owner.exec(org);
        owner.exec(history);
        let moved = owner.value(
            "select count(*) || ' ' || max(version) || ' ' || (min(created_at) at time zone 'UTC')::date
               from nightowls.events
              where version = ((payload ->> 'n')::bigint + 2) / 3",
        );
        assert_eq!(moved.as_deref(), Some("30 10 01/01/2020"));
    }
}

#[test]
fn the_npm_package_s_agents_and_messages_come_over_as_the_page_says() {
    let before = moving("Beside an older schema");
    let blocks = moving("From @nightowlsdev/storage-supabase");
    let [agents, messages] = blocks.as_slice() else {
        panic!("{} blocks", blocks.len());
    };
    for install in Install::ALL {
        let db = server().empty_database(install);
        let mut owner = db.owner();
        // As far as the page looks at them; Mastra's two as @mastra/pg 1.27 makes them.
        owner.exec(
            r#"create schema nightowls;
               create table nightowls.agent_versions (slug text, version int, content jsonb, created_by text, primary key (slug, version));
               insert into nightowls.agent_versions values ('sage', 2, '{"modelId": "large"}', 'bob'), ('owl', 1, '{}', 'ann'),
                 ('sage', 1, '{"modelId": "small"}', 'ann');
               create table nightowls.mastra_threads (id text primary key, "resourceId" text not null, title text not null, metadata jsonb,
                 "createdAt" timestamp not null, "updatedAt" timestamp not null);
               create table nightowls.mastra_messages (id text primary key, thread_id text not null, content text not null, role text not null,
                 type text not null, "createdAt" timestamp not null, "resourceId" text);
               insert into nightowls.mastra_threads values ('t', 'customer-7', 'A refund', null, now(), now());
               insert into nightowls.mastra_messages values
                 ('m2', 't', '{"format": 2, "parts": [{"type": "text", "text": "It is."}]}', 'assistant', 'v2', '2020-01-01 10:01', 'customer-7'),
                 ('m1', 't', '{"format": 2, "parts": [{"type": "text", "text": "Is it?"}]}', 'user', 'v2', '2020-01-01 10:00', 'customer-7')"#,
        );
        owner.exec(&before[0]);
        install_by_hand(&db, install);
        owner.exec(&before[1]);
        owner.exec(agents);
        owner.exec(messages);
        owner.exec(messages);
        assert_eq!(
            lines(
                &mut owner,
                "select slug, version, is_head, content ->> 'model_id', actor ->> 'id'
                   from unnest(array['owl', 'sage']) slug, nightowls.list_agent_versions(slug) order by 1, 2"
            ),
            ["owl 1 t null ann", "sage 1 f small ann", "sage 2 t large bob"]
        );
        assert_eq!(
            lines(
                &mut owner,
                "select seq, message_id, author_type, content -> 'parts' -> 0 ->> 'text', metadata ->> 'said_at' from nightowls.list_messages('t')"
            ),
            [
                "1 m1 user Is it? 2020-01-01T10:00:00",
                "2 m2 agent It is. 2020-01-01T10:01:00"
            ]
        );
        // Nothing is half there where a number is missing.
        owner.exec(
            "delete from nightowls_v1.agent_versions;
             insert into nightowls_v1.agent_versions values ('new', 1, '{}', 'ann'), ('new', 3, '{}', 'ann')",
        );
        assert_eq!(owner.refused(agents).code, "NW001");
        assert_eq!(
            lines(
                &mut owner,
                "select * from nightowls.list_agent_versions('new')"
            ),
            Vec::<String>::new()
        );
    }
}

#[test]
fn an_events_table_and_a_pgmq_move_over_as_the_page_says() {
    let Some(real) = real_pgmq() else { return };
    let blocks = moving("From an events table and pgmq");
    let [history, queue, view, binding] = blocks.as_slice() else {
        panic!("{} blocks", blocks.len());
    };
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        db.superuser().exec(&format!(
            "grant pg_monitor to {} with admin option",
            db.install().owner()
        ));
        owner.exec("set client_min_messages to warning");
        owner.exec(&real);
        owner.exec(
            "create table public.order_events (id bigint generated by default as identity primary key, order_id text, kind text, body jsonb,
               created_at timestamptz default now());
             select pgmq.create('jobs');
             create procedure public.pay(o text) language sql as $$
               insert into public.order_events (order_id, kind, body) values (o, 'order_paid', '{\"amount\": 5}');
               select pgmq.send('jobs', jsonb_build_object('order', o)) $$;
             call public.pay('o1'); call public.pay('o2'); call public.pay('o1')",
        );
        assert_eq!(lines(&mut owner, history), ["3 0 f"]);
        owner.exec("call public.pay('o3')");
        assert_eq!(lines(&mut owner, history), ["1 0 f"]);
        owner.exec(queue);
        // The old program goes on, over functions and a table that are others now.
        owner.exec("call public.pay('o1')");
        owner.exec(view);
        owner.exec("call public.pay('o1')");
        let written = "select version, payload from nightowls.read_aggregate('order', 'o1')";
        assert_eq!(lines(&mut owner, written).len(), 3);
        let id = lines(
            &mut owner,
            "insert into public.order_events (order_id, kind) values ('o2', 'order_sent') returning id",
        );
        let last = "select position from nightowls.last_event('order', 'o2', 'order_sent')";
        assert_eq!(lines(&mut owner, last), id);
        owner.exec("create or replace procedure public.pay(o text) language sql as $$
               insert into public.order_events (order_id, kind, body) values (o, 'order_paid', '{\"amount\": 5}') $$");
        owner.exec(binding);
        owner.exec("call public.pay('o4')");
        assert_eq!(
            lines(
                &mut owner,
                "select coalesce(message ->> 'order', message ->> 'aggregate_id' || ' ' || (message -> 'payload' ->> 'amount'))
                   from pgmq.read('jobs', 30, 10)"
            ),
            ["o1", "o2", "o1", "o3", "o1", "o1", "o4 5"]
        );
    });
}

#[test]
fn an_embedding_backfill_moves_over_as_the_page_says() {
    let blocks = moving("From an embedding backfill with claim and save");
    let [source, tidy] = blocks.as_slice() else {
        panic!("{} blocks", blocks.len());
    };
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        owner.exec(
            "create table public.docs (id bigint primary key, body text, embedding real[], claimed_by text, claimed_at timestamptz);
             create function public.claim_docs(n int) returns setof public.docs language sql as $$
               update public.docs set claimed_by = 'me', claimed_at = now()
                where id in (select id from public.docs where embedding is null and claimed_by is null limit n for update skip locked)
               returning * $$;
             create function public.save_doc(doc bigint, vector real[]) returns void language sql as $$
               update public.docs set embedding = vector, claimed_by = null where id = doc $$;
             insert into public.docs values (1, 'one'), (2, 'two'), (3, 'three'), (4, 'four');
             select public.claim_docs(3); select public.save_doc(1, '{1,1,1}'); select public.save_doc(2, '{2,2,2}')",
        );
        owner.exec(source);
        let mut service = db.service();
        let claim = "select key, input, claim from nightowls.claim_embeddings('docs', qty => 20) order by 1";
        let claimed = service.rows(claim);
        let keys: Vec<_> = claimed.iter().map(|row| row[0].as_deref()).collect();
        assert_eq!(keys, [Some("3"), Some("4")]);
        assert!(service.rows(claim).is_empty());

        owner.exec(tidy);
        let save = |row: &[Option<String>]| {
            format!(
                "select nightowls.save_embedding('docs', {}, {}, '{{7,8,9}}')",
                quote(row[0].as_deref().expect("a key")),
                quote(row[2].as_deref().expect("a claim"))
            )
        };
        assert_eq!(lines(&mut service, &save(&claimed[0])), ["t"]);
        owner.exec("update public.docs set body = 'another' where id in (2, 4)");
        assert_eq!(lines(&mut service, &save(&claimed[1])), ["f"]);
        assert_eq!(
            lines(
                &mut owner,
                "select id, embedding from public.docs order by 1"
            ),
            ["1 {1,1,1}", "2 null", "3 {7,8,9}", "4 null"]
        );
        let again: Vec<_> = service.rows(claim);
        let inputs: Vec<_> = again.iter().map(|row| row[1].as_deref()).collect();
        assert_eq!(inputs, [Some("another"), Some("another")]);
    });
}
