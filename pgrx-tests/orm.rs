//! The snippets of docs/orm.md, run as they stand there, with the packages that
//! the manifests under `orm/` pin.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use nightowls::migration::VERSION;

use crate::migration::{Folder, owl_install};
use crate::supabase;
use crate::support::{
    Db, Install, OWNER, Route, SERVICE, on_each_install, on_each_route, on_install, server, skip,
};

const PAGE: &str = include_str!("../docs/orm.md");
pub const ORG: &str = "00000000-0000-4000-8000-000000000001";

/// The blocks of docs/orm.md that begin with a file's name, by that name.
fn snippets() -> BTreeMap<&'static str, &'static str> {
    blocks()
        .filter_map(|(_, text)| Some((name_of(text)?, text)))
        .collect()
}

/// Every fenced block: its language and its text.
fn blocks() -> impl Iterator<Item = (&'static str, &'static str)> {
    PAGE.split("```")
        .skip(1)
        .step_by(2)
        .filter_map(|block| block.split_once('\n'))
}

fn name_of(text: &str) -> Option<&str> {
    let first = text.lines().next()?;
    let name = first
        .strip_prefix("// ")
        .or_else(|| first.strip_prefix("# "))?;
    (name.contains('/') && !name.contains(' ')).then_some(name)
}

/// What the page says that each tour prints.
fn what_the_page_promises() -> &'static str {
    let (_, text) = blocks()
        .find(|(language, _)| *language == "text")
        .expect("the page says what the tours print");
    text
}

#[test]
fn every_block_of_the_page_that_could_run_is_one_that_runs() {
    for (language, text) in blocks() {
        let shown_only = ["text", "console"].contains(&language);
        assert!(
            shown_only || name_of(text).is_some(),
            "a block in docs/orm.md has no file name, so nothing runs it:\n{text}"
        );
    }
    assert!(snippets().len() >= 15, "the page has lost its snippets");
}

/// A place with packages, where the snippets run.
pub struct Tools {
    pub folder: PathBuf,
}

pub type Found = Result<Tools, String>;

/// `pgrx-tests/<place>` where it is installed: `target/<place>`. `install` is run
/// there once for each state of the manifests.
fn installed(
    place: &str,
    manifests: &[&str],
    install: impl Fn(&Path) -> Result<(), String>,
) -> Found {
    let lists = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("pgrx-tests")
        .join(place);
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .parent()
        .expect("a folder in target/")
        .join(place);
    fs::create_dir_all(&folder).expect("target/ takes a folder");
    // Another run of the suite may be installing.
    let lock = File::create(folder.join(".lock")).expect("the folder takes a file");
    lock.lock().expect("a lock on a file of our own");

    let read = |name: &&str| fs::read_to_string(lists.join(name)).expect("the manifest is there");
    let wanted: String = manifests.iter().map(read).collect();
    let stamp = folder.join(".installed");
    if fs::read_to_string(&stamp).is_ok_and(|installed| installed == wanted) {
        return Ok(Tools { folder });
    }
    for name in manifests {
        fs::copy(lists.join(name), folder.join(name)).expect("the folder takes a file");
    }
    install(&folder)?;
    fs::write(&stamp, wanted).expect("the folder takes a file");
    Ok(Tools { folder })
}

/// Runs what fetches packages. That a registry cannot be reached is a reason to
/// skip, anything else that goes wrong is a failure.
fn fetch(command: &mut Command) -> Result<(), String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|_| format!("no {program}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    let out_of_reach = [
        "ENOTFOUND",
        "EAI_AGAIN",
        "ECONNREFUSED",
        "ECONNRESET",
        "ETIMEDOUT",
        "ENETUNREACH",
        "NewConnectionError",
        "NameResolutionError",
        "ConnectTimeoutError",
        "ProxyError",
        "Could not resolve host",
        "Couldn't resolve host",
        "Could not connect",
        "Couldn't connect",
    ];
    match out_of_reach.iter().find(|sign| said.contains(**sign)) {
        Some(sign) => Err(format!("{program} cannot reach its registry: {sign}")),
        None => panic!("{command:?}:\n{said}"),
    }
}

/// Once a process; a skip, where it cannot be had.
pub fn or_skip(name: &str, found: &'static Found) -> Option<&'static Tools> {
    found
        .as_ref()
        .inspect_err(|reason| skip(&format!("{name} ({reason})")))
        .ok()
}

/// What `pgrx-tests/<place>/package-lock.json` names.
pub fn npm(place: &str) -> Found {
    let version = Command::new("node")
        .arg("--version")
        .output()
        .map_err(|_| "no node")?;
    let version = String::from_utf8_lossy(&version.stdout).trim().to_owned();
    let major = version
        .trim_start_matches('v')
        .split('.')
        .next()
        .and_then(|n| n.parse().ok());
    if major.is_none_or(|major: u32| major < 18) {
        return Err(format!("node {version} is older than 18"));
    }
    installed(place, &["package.json", "package-lock.json"], |folder| {
        fetch(
            Command::new("npm")
                .args(["ci", "--no-audit", "--no-fund", "--prefix"])
                .arg(folder),
        )
    })
}

/// What `pgrx-tests/<place>/requirements.txt` names, in `venv/`.
pub fn pip(place: &str) -> Found {
    installed(place, &["requirements.txt"], |folder| {
        let made = Command::new("python3")
            .args(["-m", "venv", "--clear"])
            .arg(folder.join("venv"))
            .output();
        if !made.is_ok_and(|output| output.status.success()) {
            return Err("no python3-venv".to_owned());
        }
        fetch(
            Command::new(folder.join("venv/bin/pip"))
                .args([
                    "install",
                    "--quiet",
                    "--no-input",
                    "--disable-pip-version-check",
                    "--requirement",
                ])
                .arg(folder.join("requirements.txt")),
        )
    })
}

pub fn node() -> Option<&'static Tools> {
    static NODE: OnceLock<Found> = OnceLock::new();
    or_skip("drizzle", NODE.get_or_init(|| npm("orm/npm")))
}

fn python() -> Option<&'static Tools> {
    static PYTHON: OnceLock<Found> = OnceLock::new();
    or_skip("sqlalchemy", PYTHON.get_or_init(|| pip("orm/py")))
}

fn sqlx() -> Option<&'static Tools> {
    static SQLX: OnceLock<Found> = OnceLock::new();
    or_skip(
        "sqlx",
        SQLX.get_or_init(|| {
            let cargo =
                || Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
            let tools = installed("orm/sqlx", &["Cargo.toml", "Cargo.lock"], |folder| {
                write(folder, "src/main.rs", "fn main() {}");
                fetch(
                    cargo()
                        .args(["fetch", "--quiet", "--locked"])
                        .current_dir(folder),
                )
            })?;
            place(&tools.folder, "sqlx/", "");
            copy(
                &Path::new(env!("CARGO_MANIFEST_DIR")).join("pgrx-tests/orm/sqlx/src"),
                &tools.folder.join("src"),
            );
            let built = cargo()
                .args([
                    "build",
                    "--quiet",
                    "--locked",
                    "--offline",
                    "--target-dir",
                    "target",
                ])
                .current_dir(&tools.folder)
                .output()
                .expect("cargo runs");
            assert!(
                built.status.success(),
                "{}",
                String::from_utf8_lossy(&built.stderr)
            );
            assert!(
                built.stderr.is_empty(),
                "a warning: {}",
                String::from_utf8_lossy(&built.stderr)
            );
            Ok(tools)
        }),
    )
}

/// Writes a file unless it is there with the same text: cargo goes by times.
pub fn write(folder: &Path, name: &str, text: &str) {
    let path = folder.join(name);
    if fs::read_to_string(&path).is_ok_and(|old| old == text) {
        return;
    }
    fs::create_dir_all(path.parent().expect("a file is in a folder")).expect("a new folder");
    fs::write(path, text).expect("the folder takes a file");
}

/// Puts the page's snippets under `prefix` into a folder, under `instead`.
fn place(folder: &Path, prefix: &str, instead: &str) {
    for (name, text) in snippets() {
        if let Some(rest) = name.strip_prefix(prefix) {
            write(folder, &format!("{instead}{rest}"), text);
        }
    }
}

/// Copies a folder's files and folders.
fn copy(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).expect("the folder is there") {
        let entry = entry.expect("the folder can be read");
        let (path, name) = (entry.path(), entry.file_name());
        if path.is_dir() {
            copy(&path, &to.join(name));
        } else {
            let text = fs::read_to_string(&path).expect("the file is text");
            write(to, &name.to_string_lossy(), &text);
        }
    }
}

/// A folder with the page's snippets and what `orm/<name>` adds to them.
pub fn project(tools: &Tools, name: &str, prefixes: &[&str]) -> Folder {
    let folder = Folder::new();
    copy(
        &Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("pgrx-tests/orm")
            .join(name),
        folder.path(),
    );
    for prefix in prefixes {
        place(folder.path(), prefix, prefix);
    }
    let packages = tools.folder.join("node_modules");
    if packages.exists() {
        symlink(packages, folder.path().join("node_modules")).expect("the folder takes a link");
    }
    folder
}

/// What a program of `folder` prints with `url` in its environment.
#[track_caller]
pub fn run(program: &Path, arguments: &[&str], folder: &Path, url: &str) -> String {
    let owl = Path::new(env!("CARGO_BIN_EXE_owl"))
        .parent()
        .expect("a program is in a folder");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths(
        [owl.to_owned()]
            .into_iter()
            .chain(std::env::split_paths(&path)),
    )
    .expect("paths have no colon");
    let output = Command::new(program)
        .args(arguments)
        .current_dir(folder)
        .env("PATH", path)
        .env("DATABASE_URL", url)
        .env("ORG_ID", ORG)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}", program.display()));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{} {arguments:?}:\n{said}{}",
        program.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    said
}

/// Makes the tours' org and returns the URL of their role: pooled, with fewer
/// server connections than clients, so that they must share.
pub fn ready(db: &Db) -> String {
    db.owner().exec(&format!(
        "select nightowls.create_org('shop', org => '{ORG}')"
    ));
    // psycopg reads times in no other style than the default one.
    db.superuser().exec(&format!(
        "alter database {} set datestyle to iso",
        db.name()
    ));
    let port = match db.route() {
        Route::Direct => db.cluster().port(),
        Route::Pooled => db.cluster().pooler_port(2),
    };
    format!(
        "postgresql://{SERVICE}@127.0.0.1:{port}/{}?sslmode=disable",
        db.name()
    )
}

#[track_caller]
fn assert_the_tour_left_its_events(db: &Db) {
    let events = db.owner().value(&format!(
        "select string_agg(version || ' ' || event_type, ', ' order by version) \
         from nightowls.events where org_id = '{ORG}' and (aggregate_type, aggregate_id) = ('order', '42')"
    ));
    assert_eq!(
        events.as_deref(),
        Some("1 order_placed, 2 order_paid, 3 order_shipped")
    );
}

const COUNTED: &str = "counted: 40, in order: true\n";

#[test]
fn drizzle_takes_the_tour() {
    let Some(node) = node() else { return };
    let folder = project(node, "npm", &["drizzle/"]);
    let tsx = node.folder.join("node_modules/.bin/tsx");
    on_each_route(|db| {
        let url = ready(db);
        let run = |file| run(&tsx, &[file], folder.path(), &url);
        assert_eq!(run("drizzle/tour.ts"), what_the_page_promises());
        assert_the_tour_left_its_events(db);
        assert_eq!(run("workers.ts"), COUNTED);
        assert_eq!(run("postgres-js.ts"), "counted: 40 object\n");
    });
}

#[test]
fn the_storage_adapter_keeps_what_an_agent_engine_has() {
    let Some(node) = node() else { return };
    let folder = with_adapter(project(node, "npm", &[]));
    let tsx = node.folder.join("node_modules/.bin/tsx");
    on_each_route(|db| {
        let url = ready(db);
        db.owner().exec(
            "select nightowls.create_org('other', org => '00000000-0000-4000-8000-000000000002')",
        );
        assert_eq!(run(&tsx, &["storage.ts"], folder.path(), &url), "stored\n");
    });
}

/// The folder, with examples/storage-adapter.ts in it.
fn with_adapter(folder: Folder) -> Folder {
    folder.write(
        "storage-adapter.ts",
        include_str!("../examples/storage-adapter.ts"),
    );
    folder
}

#[test]
fn drizzle_kit_leaves_our_schema_alone() {
    let Some(node) = node() else { return };
    let kit = node.folder.join("node_modules/.bin/drizzle-kit");
    on_each_install(|db| {
        ready(db);
        let folder = project(node, "npm", &["drizzle/"]);
        let before = relations(db);
        let run = |command: &[&str]| {
            let config = ["--config=drizzle/drizzle.config.ts"];
            run(
                &kit,
                &[command, &config].concat(),
                folder.path(),
                &db.url(db.install().owner()),
            )
        };

        run(&["generate", "--name=first"]);
        let made = fs::read_to_string(folder.path().join("drizzle/migrations/0000_first.sql"))
            .expect("generate writes a migration");
        assert!(
            made.contains("customers") && !made.contains("nightowls"),
            "{made}"
        );

        let said = run(&["push", "--force"]);
        assert!(said.contains("Changes applied"), "{said}");
        let said = run(&["push", "--force"]);
        assert!(said.contains("No changes detected"), "{said}");
        assert_eq!(relations(db), before);
        assert_eq!(
            db.owner()
                .value("select to_regclass('public.customers')")
                .as_deref(),
            Some("customers")
        );
    });
}

/// Every relation of ours.
fn relations(db: &Db) -> Option<String> {
    db.owner().value(
        "select string_agg(oid || ' ' || relname, ', ' order by relname) \
         from pg_class where relnamespace = 'nightowls'::regnamespace",
    )
}

#[track_caller]
fn assert_installed(db: &Db) {
    let version = db.owner().value("select nightowls.version()");
    assert_eq!(version.as_deref(), Some(VERSION));
    let mut owner = db.owner();
    owner.exec(&format!(
        "select nightowls.create_org('shop', org => '{ORG}')"
    ));
    let version = owner.value(&format!(
        "select version from nightowls.append_event('order', '1', 'placed', org => '{ORG}')"
    ));
    assert_eq!(version.as_deref(), Some("1"));
}

#[test]
fn drizzle_kit_installs_the_migrations() {
    let Some(node) = node() else { return };
    let folder = project(node, "npm", &["drizzle/"]);
    let db = server().empty_database(Install::Plain);
    run(
        Path::new("sh"),
        &["-e", "drizzle/install.sh"],
        folder.path(),
        &db.url(OWNER),
    );
    assert_installed(&db);
}

#[test]
fn the_typescript_fits_the_packages_and_the_types_that_supabase_generates() {
    let Some(node) = node() else { return };
    let cli = match supabase::installed_cli() {
        Ok(cli) => cli,
        Err(reason) => return skip(&format!("supabase cli ({reason})")),
    };
    let folder = with_adapter(project(node, "npm", &["drizzle/", "supabase/"]));
    on_install(Install::Plain, |db| {
        let remote = format!("--remote={}", db.url(OWNER));
        let types = Command::new(&cli)
            .args(["gen", "types", &remote, "--schema", "nightowls"])
            .current_dir(folder.path())
            .envs(supabase::settings(&cli))
            .stdin(Stdio::null())
            .output()
            .expect("the Supabase CLI runs");
        assert!(
            types.status.success(),
            "{}",
            String::from_utf8_lossy(&types.stderr)
        );
        folder.write(
            "supabase/database.ts",
            &String::from_utf8_lossy(&types.stdout),
        );
    });
    for (name, text) in supabase::programs() {
        folder.write(name, text);
    }
    folder.write(
        "tsconfig.json",
        r#"{
  "compilerOptions": {
    "strict": true, "noEmit": true, "skipLibCheck": true, "noUnusedLocals": true,
    "module": "nodenext", "target": "es2022"
  },
  "include": ["*.ts", "drizzle/*.ts", "supabase/*.ts", "swarm/*.ts"]
}"#,
    );
    let tsc = node.folder.join("node_modules/.bin/tsc");
    run(&tsc, &["--project", "."], folder.path(), "");
}

#[test]
fn sqlalchemy_takes_the_tour() {
    let Some(tools) = python() else { return };
    let folder = project(tools, "py", &["python/"]);
    let python = tools.folder.join("venv/bin/python");
    on_each_route(|db| {
        let url = ready(db);
        let run = |file| run(&python, &[file], folder.path(), &url);
        assert_eq!(run("python/tour.py"), what_the_page_promises());
        assert_the_tour_left_its_events(db);
        assert_eq!(
            run("workers.py"),
            format!("{COUNTED}flushed: (0, 1) (1, 2) (2, 3)\n")
        );
    });
}

#[test]
fn alembic_leaves_our_schema_alone() {
    let Some(tools) = python() else { return };
    let alembic = tools.folder.join("venv/bin/alembic");
    on_each_install(|db| {
        ready(db);
        let folder = project(tools, "py", &["python/"]);
        let run = |command: &[&str]| {
            let config = ["-c", "python/alembic.ini"];
            run(
                &alembic,
                &[&config, command].concat(),
                folder.path(),
                &db.url(db.install().owner()),
            )
        };
        // nightowls is there already.
        run(&["stamp", "0001"]);
        run(&["upgrade", "head"]);
        let said = run(&["check"]);
        assert!(
            said.contains("No new upgrade operations detected"),
            "{said}"
        );
    });
}

#[test]
fn alembic_installs_the_migrations() {
    let Some(tools) = python() else { return };
    let folder = project(tools, "py", &["python/"]);
    let alembic = tools.folder.join("venv/bin/alembic");
    owl_install(&folder.path().join("python/migrations/nightowls"), &[]);
    let db = server().empty_database(Install::Plain);
    let run = |command: &[&str]| {
        let config = ["-c", "python/alembic.ini"];
        run(
            &alembic,
            &[&config, command].concat(),
            folder.path(),
            &db.url(OWNER),
        )
    };
    run(&["upgrade", "head"]);
    assert_installed(&db);
    run(&["downgrade", "base"]);
    assert_eq!(
        db.owner().value("select to_regnamespace('nightowls')"),
        None
    );
}

#[test]
fn sqlx_takes_the_tour() {
    let Some(tools) = sqlx() else { return };
    let programs = tools.folder.join("target/debug");
    on_each_route(|db| {
        let url = ready(db);
        let run = |name| run(&programs.join(name), &[], &tools.folder, &url);
        assert_eq!(run("nightowls-orm-tests"), what_the_page_promises());
        assert_the_tour_left_its_events(db);
        assert_eq!(run("workers"), COUNTED);
    });
}

#[test]
fn sqlx_installs_the_migrations() {
    let Some(tools) = sqlx() else { return };
    let folder = Folder::new();
    owl_install(&folder.path().join("migrations"), &[]);
    let db = server().empty_database(Install::Plain);
    run(
        &tools.folder.join("target/debug/install"),
        &[],
        folder.path(),
        &db.url(OWNER),
    );
    assert_installed(&db);
}
