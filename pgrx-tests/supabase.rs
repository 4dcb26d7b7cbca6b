//! The real Supabase CLI applies the migrations, to a plain server and to one
//! dressed as a Supabase project.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use nightowls::migration::{VERSION, migrations};

use crate::migration::{Folder, owl_install};
use crate::orm::write;
use crate::queue_rpc::{node_clients, serve};
use crate::support::{Db, Install, OWNER, STRANGER, own_cluster, server, skip, supabase_server};

/// The CLI and a project folder for it.
struct Project {
    cli: PathBuf,
    folder: Folder,
}

/// What a command of the CLI said, both streams together.
struct Said {
    succeeded: bool,
    text: String,
}

impl Project {
    /// A project whose migrations are ours; `None` where there is no CLI.
    fn new() -> Option<Self> {
        let project = Self::empty()?;
        owl_install(&project.migrations(), &[]);
        Some(project)
    }

    fn empty() -> Option<Self> {
        static CLI: OnceLock<Result<PathBuf, String>> = OnceLock::new();
        match CLI.get_or_init(installed_cli) {
            Ok(cli) => Some(Project {
                cli: cli.clone(),
                folder: Folder::new(),
            }),
            Err(reason) => {
                skip(&format!("supabase cli ({reason})"));
                None
            }
        }
    }

    fn migrations(&self) -> PathBuf {
        self.folder.path().join("supabase/migrations")
    }

    fn versions(&self) -> Vec<String> {
        let mut versions: Vec<_> = fs::read_dir(self.migrations())
            .expect("the project has migrations")
            .map(|entry| entry.expect("a file").file_name())
            .filter_map(|name| Some(name.to_str()?.split_once('_')?.0.to_owned()))
            .collect();
        versions.sort();
        versions
    }

    fn run(&self, arguments: &[&str]) -> Said {
        let output = Command::new(&self.cli)
            .args(arguments)
            .arg("--workdir")
            .arg(self.folder.path())
            .current_dir(self.folder.path())
            .envs(settings(&self.cli))
            .stdin(Stdio::null())
            .output()
            .expect("the Supabase CLI runs");
        Said {
            succeeded: output.status.success(),
            text: String::from_utf8_lossy(&output.stdout).into_owned()
                + &String::from_utf8_lossy(&output.stderr),
        }
    }

    /// A command against `db`, as `role`.
    fn remote(&self, db: &Db, role: &str, arguments: &[&str]) -> Said {
        let url = format!("--remote={}", db.url(role));
        self.run(&[arguments, &[&url]].concat())
    }
}

impl Said {
    #[track_caller]
    fn unwrap(self) -> String {
        assert!(self.succeeded, "{}", self.text);
        self.text
    }

    #[track_caller]
    fn unwrap_failure(self) -> String {
        assert!(!self.succeeded, "{}", self.text);
        self.text
    }
}

/// Installs what `npm/package-lock.json` names, once for each lock file.
pub fn installed_cli() -> Result<PathBuf, String> {
    let lists = Path::new(env!("CARGO_MANIFEST_DIR")).join("pgrx-tests/npm");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("npm");
    let cli = folder.join("node_modules/@supabase/cli-linux-x64/bin/supabase");
    let failed = |error: std::io::Error| format!("{}: {error}", folder.display());

    fs::create_dir_all(&folder).map_err(failed)?;
    // Another run of the suite may be installing.
    let lock = File::create(folder.join(".lock")).map_err(failed)?;
    lock.lock().map_err(failed)?;

    let wanted = fs::read(lists.join("package-lock.json")).map_err(failed)?;
    let stamp = folder.join(".installed");
    if cli.exists() && fs::read(&stamp).is_ok_and(|installed| installed == wanted) {
        return Ok(cli);
    }
    for name in ["package.json", "package-lock.json"] {
        fs::copy(lists.join(name), folder.join(name)).map_err(failed)?;
    }
    let output = Command::new("npm")
        .args(["ci", "--no-audit", "--no-fund", "--prefix"])
        .arg(&folder)
        .stdin(Stdio::null())
        .output()
        .map_err(|_| "no npm".to_owned())?;
    if !output.status.success() || !cli.exists() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let last = said.lines().rfind(|line| !line.trim().is_empty());
        return Err(format!("npm ci failed: {}", last.unwrap_or_default()));
    }
    // Else it asks its maker's servers who is there.
    let output = Command::new(&cli)
        .args(["telemetry", "disable"])
        .envs(settings(&cli))
        .output()
        .map_err(|error| format!("it does not run: {error}"))?;
    if !output.status.success() {
        return Err("telemetry cannot be switched off".to_owned());
    }
    fs::write(&stamp, wanted).map_err(failed)?;
    Ok(cli)
}

/// Its home is beside it: whatever the user has signed in to stays out of it.
pub fn settings(cli: &Path) -> [(&'static str, OsString); 3] {
    let home = cli.with_file_name("home");
    [
        ("HOME", home.into_os_string()),
        ("DO_NOT_TRACK", "1".into()),
        ("SUPABASE_NO_UPDATE_NOTIFIER", "1".into()),
    ]
}

/// Runs `test` with a project and an empty database on a plain server, then on
/// one dressed as Supabase.
fn on_each_host(test: impl Fn(&Project, &Db)) {
    let plain = || server().empty_database(Install::Plain);
    let hosts: [&dyn Fn() -> Db; 2] = [&plain, &|| dressed(Install::Plain)];
    for host in hosts {
        let Some(project) = Project::new() else {
            return;
        };
        test(&project, &host());
    }
}

fn dress(db: Db) -> Db {
    let mut superuser = db.superuser();
    superuser.exec(&format!("set shim.host to '{OWNER}'"));
    superuser.exec(include_str!("supabase-shim.sql"));
    db
}

/// A Supabase project's database, without nightowls.
pub fn dressed(install: Install) -> Db {
    dress(supabase_server().empty_database(install))
}

#[test]
fn supabase_applies_the_migrations_once() {
    on_each_host(|project, db| {
        let push = ["db", "push", "--yes"];
        project.remote(db, OWNER, &push).unwrap();
        let installed = db.owner().value("select nightowls.version()");
        assert_eq!(installed.as_deref(), Some(VERSION));

        let again = project.remote(db, OWNER, &push).unwrap();
        assert!(again.contains("up to date"), "{again}");

        let history: Vec<_> = db
            .owner()
            .rows("select version from supabase_migrations.schema_migrations order by version")
            .into_iter()
            .map(|row| row[0].clone().expect("every migration has a version"))
            .collect();
        assert_eq!(history, project.versions());

        let list = project
            .remote(db, OWNER, &["migration", "list", "--output-format", "json"])
            .unwrap();
        for version in project.versions() {
            assert_eq!(
                list.matches(&version).count(),
                2,
                "local and remote: {list}"
            );
        }
    });
}

#[test]
fn supabase_finds_no_error_in_what_the_migrations_make() {
    let look = |db: &Db| {
        let Some(project) = Project::new() else {
            return;
        };
        let mut superuser = db.superuser();
        // The advisors look at what the API's roles may see.
        superuser.exec(
            "do $$ begin
               if to_regrole('anon') is null then
                 create role anon; create role authenticated;
               end if;
             end $$",
        );
        project.remote(db, OWNER, &["db", "push", "--yes"]).unwrap();
        let advisors = ["db", "advisors", "--level", "error", "--fail-on", "error"];
        project.remote(db, OWNER, &advisors).unwrap();

        if !db.cluster().offers("plpgsql_check") {
            skip("supabase db lint (no plpgsql_check)");
            return;
        }
        superuser.exec("create extension plpgsql_check");
        let lint = [
            "db",
            "lint",
            "--schema",
            "nightowls",
            "--level",
            "error",
            "--fail-on",
            "error",
        ];
        project.remote(db, OWNER, &lint).unwrap();
    };
    // Roles belong to a whole server, and the plain one has others.
    own_cluster(|cluster| look(&cluster.empty_database(Install::Plain)));
    look(&dressed(Install::Plain));
}

#[test]
fn supabase_adds_what_a_later_owl_brings() {
    let Some(project) = Project::new() else {
        return;
    };
    let db = dressed(Install::Plain);
    let push = ["db", "push", "--yes"];
    let folder = project.migrations();
    let last = last_name(&folder);
    fs::remove_file(folder.join(&last)).expect("the file was there");
    project.remote(&db, OWNER, &push).unwrap();
    let before = project.versions();

    // The host's own, later than now.
    let host = "20991231235959_host.sql";
    fs::write(folder.join(host), "create table public.host ();").expect("a new file");
    project.remote(&db, OWNER, &push).unwrap();

    owl_install(&folder, &[]);
    let added = last_name(&folder);
    let said = project.remote(&db, OWNER, &push).unwrap();
    assert!(said.contains(&added), "{said}");
    for version in before {
        assert!(!said.contains(&version), "{said}");
    }
    let again = project.remote(&db, OWNER, &push).unwrap();
    assert!(again.contains("up to date"), "{again}");
}

fn last_name(folder: &Path) -> String {
    fs::read_dir(folder)
        .expect("the folder is there")
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .max()
        .expect("there are files")
}

#[test]
fn supabase_takes_numbers_of_a_service_range_with_include_all() {
    let Some(project) = Project::empty() else {
        return;
    };
    let db = dressed(Install::Plain);
    let folder = project.migrations();
    fs::create_dir_all(&folder).expect("a new folder");
    fs::write(
        folder.join("20260101000000_host.sql"),
        "create table public.host ();",
    )
    .expect("a new file");
    project
        .remote(&db, OWNER, &["db", "push", "--yes"])
        .unwrap();

    let said = owl_install(&folder, &["--service-range", "00300-00399"]);
    assert!(said.contains("db push --include-all"), "{said}");
    let refused = project
        .remote(&db, OWNER, &["db", "push", "--yes"])
        .unwrap_failure();
    assert!(refused.contains("--include-all"), "{refused}");
    project
        .remote(&db, OWNER, &["db", "push", "--yes", "--include-all"])
        .unwrap();
    let installed = db.owner().value("select nightowls.version()");
    assert_eq!(installed.as_deref(), Some(VERSION));
}

#[test]
fn supabase_leaves_nothing_behind_where_the_first_file_refuses() {
    on_each_host(|project, db| {
        let mut superuser = db.superuser();
        superuser.exec(&format!(
            "grant create on database {} to {STRANGER}",
            db.name()
        ));
        let said = project
            .remote(db, STRANGER, &["db", "push", "--yes"])
            .unwrap_failure();
        assert!(said.contains("42501"), "{said}");
        assert!(said.contains("may not bypass row level security"), "{said}");

        assert_eq!(superuser.value("select to_regnamespace('nightowls')"), None);
        let applied = superuser.value("select count(*) from supabase_migrations.schema_migrations");
        assert_eq!(applied.as_deref(), Some("0"));
    });
}

#[test]
fn on_supabase_the_service_role_appends_and_anon_gets_nothing() {
    // No CLI is needed here: the dressed server alone.
    let db = dressed(Install::Plain);
    let mut owner = db.owner();
    for file in migrations(VERSION) {
        owner.exec(&file.sql);
    }

    // As PostgREST does it: the role and the claims for one transaction.
    let mut api = db.session("authenticator");
    let mut request = |role: &str, sql: &str| {
        let claims = format!(r#"{{"role": "{role}", "org_id": "org_acme"}}"#);
        api.exec(&format!(
            "begin; set local role {role}; set local request.jwt.claims to '{claims}'"
        ));
        let answer = api.try_value(sql);
        api.exec(if answer.is_ok() { "commit" } else { "rollback" });
        answer
    };

    let org = request(
        "service_role",
        "select nightowls.create_org('acme', 'org_acme')",
    )
    .expect("the service makes an org");
    let append = r#"select version from nightowls.append_event('order', 'o1', 'order_paid', '{"amount": 12.50}')"#;
    let version = request("service_role", append).expect("the service appends");
    assert_eq!(version.as_deref(), Some("1"));
    let read = "select org_id from nightowls.read_events()";
    assert_eq!(request("service_role", read), Ok(org));

    for refused in [append, read, "select org_id from nightowls.events"] {
        let refusal = request("anon", refused).expect_err("anon has no rights");
        assert_eq!(refusal.code, "42501", "{refused}");
    }
}

/// The blocks of docs/supabase.md: language and text, in their order.
fn blocks() -> Vec<(&'static str, &'static str)> {
    include_str!("../docs/supabase.md")
        .split("```")
        .skip(1)
        .step_by(2)
        .filter_map(|block| block.split_once('\n'))
        .collect()
}

/// The programs of docs/supabase.md, by name.
pub fn programs() -> impl Iterator<Item = (&'static str, &'static str)> {
    blocks()
        .into_iter()
        .filter(|(language, _)| *language == "ts")
        .map(|(_, text)| (named(text).expect("a program has a name"), text))
}

/// The name in the first line of a block, `// name` or `-- name`.
fn named(text: &'static str) -> Option<&'static str> {
    let first = text.lines().next()?;
    first.strip_prefix("// ").or(first.strip_prefix("-- "))
}

#[test]
fn an_empty_project_becomes_a_running_swarm_as_the_page_says() {
    let (Some(project), Some(node)) = (Project::empty(), node_clients()) else {
        return;
    };
    let db = dressed(Install::Plain);
    let mut owner = db.owner();
    let ann = "00000000-0000-4000-8000-0000000000aa";
    db.superuser().exec(&format!(
        "insert into auth.users (id, email) values ('{ann}', 'ann@example.com'); grant select on auth.users to {OWNER}"
    ));
    let mut promised = "";
    for (language, text) in blocks() {
        match (language, named(text)) {
            ("console", _) => {
                for line in text.lines() {
                    match line.strip_prefix("$ ") {
                        Some("owl install supabase/migrations") => {
                            owl_install(&project.migrations(), &[]);
                        }
                        Some("supabase db push --remote") => {
                            project
                                .remote(&db, OWNER, &["db", "push", "--yes"])
                                .unwrap();
                        }
                        _ => panic!("the page has another command: {line}"),
                    }
                }
            }
            ("sql", Some(name)) => project.folder.write(name, text),
            ("sql", None) => owner.exec(text),
            ("ts", Some(name)) => write(&node.folder, name, text),
            ("text", _) => promised = text,
            other => panic!("a block of the page is not run: {other:?}"),
        }
    }
    let worker = "service_role=swarm/worker.ts";
    let read = format!("authenticated:{ann}=swarm/read.ts");
    let said = serve(
        node,
        &db,
        &[
            &format!("service_role:{ann}=swarm/ask.ts"),
            worker,
            &read,
            "service_role=swarm/approve.ts",
            worker,
            &read,
        ],
    );
    assert_eq!(said, promised);
    let left = owner.value("select count(*) from nightowls.queue_messages");
    assert_eq!(left.as_deref(), Some("0"));
}
