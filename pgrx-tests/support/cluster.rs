//! A throwaway server: made at the first use, gone with the test process.

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use nightowls::migration;

use super::database::Db;
use super::session::{Refusal, Session, patience};
use super::{APP, Install, MEMBER, OWNER, SERVICE, STRANGER, SUPERUSER, pooler, wait_until};

/// Where a text stays a text: an unusual time zone and date style bring to
/// light what depends on them.
const SETTINGS: &[(&str, &str)] = &[
    ("listen_addresses", "127.0.0.1"),
    ("fsync", "off"),
    ("max_connections", "200"),
    ("max_prepared_transactions", "20"),
    ("wal_level", "logical"),
    ("max_wal_size", "4GB"),
    ("timezone", "Asia/Kathmandu"),
    ("datestyle", "sql, dmy"),
    ("lc_messages", "C"),
    ("log_line_prefix", "%m [%p] %u@%d "),
];

/// A PostgreSQL server of our own, with [`super::OWNER`] and the other roles.
pub struct Cluster {
    bin: PathBuf,
    folder: PathBuf,
    port: u16,
    server_user: Option<(u32, u32)>,
    library_path: Option<PathBuf>,
    templates: [OnceLock<Result<(), String>>; 2],
    poolers: Mutex<BTreeMap<u16, u16>>,
    /// Other tests use it too.
    shared: bool,
    keeper: Child,
}

/// The cluster that all tests of this process share.
///
/// # Panics
///
/// If it could not be started; the message says why.
pub fn server() -> Arc<Cluster> {
    static SERVER: OnceLock<Result<Arc<Cluster>, String>> = OnceLock::new();
    SERVER
        .get_or_init(|| Cluster::start_shared(&[]))
        .clone()
        .unwrap_or_else(|reason| panic!("{reason}"))
}

/// Another that all tests of this process share: it has loaded the library as it
/// started, and takes many sessions.
///
/// # Panics
///
/// As [`server`].
pub fn preloaded_server() -> Arc<Cluster> {
    static SERVER: OnceLock<Result<Arc<Cluster>, String>> = OnceLock::new();
    SERVER
        .get_or_init(|| {
            let settings = [
                ("shared_preload_libraries", "nightowls"),
                ("max_connections", "700"),
            ];
            Cluster::start_shared(&settings)
        })
        .clone()
        .unwrap_or_else(|reason| panic!("{reason}"))
}

/// Another that all tests of this process share: its databases are dressed as Supabase
/// projects, whose roles belong to the whole server.
///
/// # Panics
///
/// As [`server`].
pub fn supabase_server() -> Arc<Cluster> {
    static SERVER: OnceLock<Result<Arc<Cluster>, String>> = OnceLock::new();
    SERVER
        .get_or_init(|| Cluster::start_shared(&[]))
        .clone()
        .unwrap_or_else(|reason| panic!("{reason}"))
}

/// Settings of a server that has workers, and lets requests go to loopback.
pub const WORKER: &[(&str, &str)] = &[
    ("shared_preload_libraries", "nightowls"),
    ("nightowls.allow_http", "on"),
    ("nightowls.allow_private", "on"),
    ("max_worker_processes", "64"),
];

/// Another that all tests of this process share: it has workers, see [`WORKER`].
///
/// # Panics
///
/// As [`server`].
pub fn worker_server() -> Arc<Cluster> {
    static SERVER: OnceLock<Result<Arc<Cluster>, String>> = OnceLock::new();
    SERVER
        .get_or_init(|| Cluster::start_shared(WORKER))
        .clone()
        .unwrap_or_else(|reason| panic!("{reason}"))
}

/// Runs `test` with a cluster that nobody shares, and removes it.
pub fn own_cluster(test: impl FnOnce(&Arc<Cluster>)) {
    own_cluster_with(&[], test);
}

/// As [`own_cluster`], with settings of its own.
pub fn own_cluster_with(settings: &[(&str, &str)], test: impl FnOnce(&Arc<Cluster>)) {
    let cluster = Cluster::start(settings).unwrap_or_else(|reason| panic!("{reason}"));
    test(&Arc::new(cluster));
}

/// A port that nobody listens on just now, below those that the system gives to who connects: one that asks again and again for a
/// server which is down would get the server's own port some time, be connected to itself, wait for an answer, and keep the server
/// from its port.
pub fn free_port() -> u16 {
    const PORTS: std::ops::Range<u16> = 15_000..32_000;
    static NEXT: OnceLock<AtomicU32> = OnceLock::new();
    let next = NEXT.get_or_init(|| AtomicU32::new(std::process::id().wrapping_mul(97)));
    (0..1000)
        .map(|_| {
            let number = next.fetch_add(1, Ordering::Relaxed) % u32::from(PORTS.end - PORTS.start);
            PORTS.start + number as u16
        })
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .expect("some port on 127.0.0.1 is free")
}

impl Cluster {
    fn start_shared(settings: &[(&str, &str)]) -> Result<Arc<Self>, String> {
        let mut cluster = Self::start(settings)?;
        cluster.shared = true;
        Ok(Arc::new(cluster))
    }

    fn start(settings: &[(&str, &str)]) -> Result<Self, String> {
        let bin = std::env::var_os("NIGHTOWLS_SERVER")
            .map(PathBuf::from)
            .ok_or(
                "NIGHTOWLS_SERVER is not set: run `make test`, \
             or set it to what `scripts/server.sh tree 15` prints",
            )?;
        let server_user = server_user()?;
        let folder = make_folder(server_user)?;
        let keeper = as_user(server_user, "sh")
            .args(["-c", include_str!("keeper.sh"), "keeper.sh"])
            .arg(&folder)
            .arg(bin.join("pg_ctl"))
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| format!("no sh: {error}"))?;
        let mut cluster = Cluster {
            library_path: private_libraries(&bin)?,
            bin,
            folder,
            port: 0,
            server_user,
            templates: Default::default(),
            poolers: Mutex::default(),
            shared: false,
            keeper,
        };
        cluster.initialize(settings)?;
        // Between asking for a free port and taking it another may have taken it.
        for _ in 0..5 {
            cluster.port = free_port();
            if cluster.try_start()? {
                cluster
                    .create_roles()
                    .map_err(|refusal| refusal.to_string())?;
                return Ok(cluster);
            }
        }
        Err(format!("the server does not start:\n{}", cluster.log()))
    }

    fn initialize(&self, settings: &[(&str, &str)]) -> Result<(), String> {
        let mut initdb = self.as_server_user(self.bin("initdb"));
        initdb
            .arg("--pgdata")
            .arg(self.data())
            .args(["--username", SUPERUSER, "--auth", "trust"])
            .args(["--encoding", "UTF8", "--locale", "C.UTF-8", "--no-sync"]);
        // Where ICU is built in, text sorts unlike bytes, as it does for most users.
        if self
            .output_of("pg_config", &["--configure"])?
            .contains("--with-icu")
        {
            initdb.args(["--locale-provider", "icu", "--icu-locale", "en-US"]);
        }
        succeeded("initdb", initdb.output())?;

        let mut text = format!("unix_socket_directories = '{}'\n", self.folder.display());
        // What waits for longer hangs.
        let patience = format!("{}s", patience().as_secs());
        for (name, value) in SETTINGS
            .iter()
            .chain(&[("statement_timeout", patience.as_str())])
            .chain(settings)
        {
            text += &format!("{name} = '{value}'\n");
        }
        let path = self.data().join("postgresql.auto.conf");
        fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))
    }

    fn try_start(&self) -> Result<bool, String> {
        let started = self
            .as_server_user(self.bin("pg_ctl"))
            .args(["--wait", "--silent", "--timeout", "120", "--pgdata"])
            .arg(self.data())
            .arg("--log")
            .arg(self.folder.join("server.log"))
            .arg("--options")
            .arg(format!("-p {}", self.port))
            .arg("start")
            .output();
        Ok(started
            .map_err(|error| format!("pg_ctl: {error}"))?
            .status
            .success())
    }

    fn create_roles(&self) -> Result<(), Refusal> {
        Session::connect(self.port, "postgres", SUPERUSER)?.try_exec(&format!(
            "create role {OWNER} login createdb createrole bypassrls nosuperuser; \
             create role {SERVICE} login; \
             create role {MEMBER} login; \
             create role {STRANGER} login; \
             create role {APP} login"
        ))
    }

    /// A fresh database with nightowls in it.
    #[track_caller]
    pub fn database(self: &Arc<Self>, install: Install) -> Db {
        if let Err(reason) =
            self.templates[install as usize].get_or_init(|| self.make_template(install))
        {
            panic!("the {install} install failed: {reason}");
        }
        let name = next_name(install);
        self.create_database(&format!(
            "create database {name} template {} owner {}",
            template(install),
            install.owner()
        ));
        Db::new(Arc::clone(self), name, install)
    }

    /// A fresh database that the install's owner owns, without nightowls.
    #[track_caller]
    pub fn empty_database(self: &Arc<Self>, install: Install) -> Db {
        let name = next_name(install);
        self.create_database(&format!(
            "create database {name} template template0 owner {}",
            install.owner()
        ));
        Db::new(Arc::clone(self), name, install)
    }

    #[track_caller]
    fn create_database(&self, sql: &str) {
        Session::connect(self.port, "postgres", SUPERUSER)
            .and_then(|mut session| session.try_exec(sql))
            .unwrap_or_else(|refusal| panic!("{sql}: {refusal}"));
    }

    /// The extension comes from the server's files, the plain install from this
    /// build: a test of both says nothing unless they have one source.
    fn has_this_build(&self) -> Result<(), String> {
        let folder = self.output_of("pg_config", &["--sharedir"])?;
        let script = Path::new(folder.trim())
            .join("extension")
            .join(format!("nightowls--{}.sql", migration::VERSION));
        match fs::read_to_string(&script) {
            Ok(text) if text.trim() == migration::extension_script().trim() => Ok(()),
            Ok(_) => Err(format!(
                "{} is of another build: run scripts/server.sh tree {}",
                script.display(),
                self.major()
            )),
            Err(error) => Err(format!("{}: {error}", script.display())),
        }
    }

    fn make_template(&self, install: Install) -> Result<(), String> {
        if install == Install::Extension {
            self.has_this_build()?;
        }
        let name = template(install);
        let owner = install.owner();
        let session = |database: &str, role: &str| {
            Session::connect(self.port, database, role).map_err(|refusal| refusal.to_string())
        };
        session("postgres", SUPERUSER)?
            .try_exec(&format!(
                "create database {name} template template0 owner {owner}"
            ))
            .map_err(|refusal| refusal.to_string())?;
        session(name, SUPERUSER)?
            .try_exec(&format!("grant create on schema public to {APP}"))
            .map_err(|refusal| refusal.to_string())?;
        let mut session = session(name, owner)?;
        match install {
            Install::Extension => session
                .try_exec("create extension nightowls")
                .map_err(|refusal| refusal.to_string())?,
            Install::Plain => {
                for file in migration::migrations(migration::VERSION) {
                    session
                        .try_exec(&file.sql)
                        .map_err(|refusal| format!("migration {}: {refusal}", file.concern))?;
                }
            }
        }
        session
            .try_exec(&format!(
                "select nightowls.grant_service('{SERVICE}'), nightowls.grant_member('{MEMBER}')"
            ))
            .map_err(|refusal| refusal.to_string())
    }

    /// The port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The port of a PgBouncer in front, with pools of that size.
    pub fn pooler_port(&self, pool_size: u16) -> u16 {
        let mut poolers = self.poolers.lock().unwrap_or_else(PoisonError::into_inner);
        *poolers
            .entry(pool_size)
            .or_insert_with(|| pooler::start(self, pool_size))
    }

    /// The cluster's folder: data, socket and logs. The server's user owns it.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The data folder.
    pub fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    /// What the server has logged.
    pub fn log(&self) -> String {
        fs::read(self.folder.join("server.log"))
            .map(|log| String::from_utf8_lossy(&log).into_owned())
            .unwrap_or_default()
    }

    /// The server's major version.
    pub fn major(&self) -> u32 {
        self.output_of("pg_config", &["--version"])
            .ok()
            .and_then(|text| {
                let number = text.strip_prefix("PostgreSQL ")?;
                number
                    .split(|c: char| !c.is_ascii_digit())
                    .next()?
                    .parse()
                    .ok()
            })
            .expect("pg_config --version says PostgreSQL and a number")
    }

    /// Whether `create extension name` could find its files.
    pub fn offers(&self, extension: &str) -> bool {
        Session::connect(self.port, "postgres", SUPERUSER)
            .and_then(|mut session| {
                session.try_value(&format!(
                    "select 1 from pg_available_extensions where name = {}",
                    super::quote(extension)
                ))
            })
            .is_ok_and(|found| found.is_some())
    }

    /// Whether the server has a library of this name, such as an output plugin.
    pub fn has_library(&self, name: &str) -> bool {
        self.output_of("pg_config", &["--pkglibdir"])
            .is_ok_and(|folder| Path::new(folder.trim()).join(format!("{name}.so")).exists())
    }

    /// The path of one of the server's programs: `psql`, `pg_dump`, `pg_restore`.
    pub fn bin(&self, program: &str) -> PathBuf {
        self.bin.join(program)
    }

    /// One of the server's programs, set to connect here as the superuser.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.bin(program));
        self.set_library_path(&mut command);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("PG") {
                command.env_remove(name);
            }
        }
        command
            .env("PGHOST", "127.0.0.1")
            .env("PGPORT", self.port.to_string())
            .env("PGUSER", SUPERUSER)
            .env("PGDATABASE", "postgres")
            .stdin(Stdio::null());
        command
    }

    /// Kills the server as a power cut would, and starts it again. Sessions are
    /// lost; what was committed must not be.
    ///
    /// # Panics
    ///
    /// On the cluster that all tests share, and if it does not come back.
    pub fn kill9_postmaster_and_restart(&self) {
        self.refuse_if_shared();
        let pid = self.postmaster();
        // A backend that outlived its postmaster would end what it is at, and commit it.
        kill_all("-KILL", &children(&pid), &pid);
        wait_until("the postmaster is gone", Duration::from_secs(10), || {
            !Path::new("/proc").join(&pid).exists()
        });
        // It will not start while a backend of the old one still runs.
        wait_until("the server is back", Duration::from_secs(60), || {
            self.try_start().expect("pg_ctl runs")
        });
    }

    /// Stops the server in an orderly way and starts it again.
    pub fn restart(&self) {
        self.stop("fast");
        assert!(
            self.try_start().expect("pg_ctl runs"),
            "the server does not start again:\n{}",
            self.log()
        );
    }

    /// Starts the server that was stopped.
    pub fn start_again(&self) {
        assert!(
            self.try_start().expect("pg_ctl runs"),
            "the server does not start again:\n{}",
            self.log()
        );
    }

    /// Stops the server for good: `fast`, or `immediate` as a crash would.
    ///
    /// # Panics
    ///
    /// On the cluster that all tests share, and if it does not stop.
    pub fn stop(&self, mode: &str) {
        self.refuse_if_shared();
        let stopped = self
            .as_server_user(self.bin("pg_ctl"))
            .args(["--mode", mode, "--wait", "--silent", "stop", "--pgdata"])
            .arg(self.data())
            .output();
        succeeded("pg_ctl stop", stopped).unwrap_or_else(|reason| panic!("{reason}"));
    }

    /// A command that runs as the user of the server's files: never as root,
    /// whom the server refuses.
    pub fn as_server_user(&self, program: impl AsRef<Path>) -> Command {
        let mut command = as_user(self.server_user, program.as_ref());
        self.set_library_path(&mut command);
        command.stdin(Stdio::null()).current_dir(&self.folder);
        command
    }

    fn set_library_path(&self, command: &mut Command) {
        if let Some(folder) = &self.library_path {
            command.env("LD_LIBRARY_PATH", folder);
        }
    }

    fn refuse_if_shared(&self) {
        assert!(
            !self.shared,
            "other tests are using this server: use own_cluster"
        );
    }

    fn postmaster(&self) -> String {
        let text = fs::read_to_string(self.data().join("postmaster.pid"))
            .expect("a running server has a postmaster.pid");
        text.lines().next().unwrap_or_default().trim().to_owned()
    }

    fn output_of(&self, program: &str, arguments: &[&str]) -> Result<String, String> {
        let output = Command::new(self.bin(program)).args(arguments).output();
        let output = succeeded(program, output)?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // The keeper sees the end of its standard input, stops the server and
        // removes the folder.
        drop(self.keeper.stdin.take());
        let _ = self.keeper.wait();
    }
}

/// Sends a signal to a process, by `kill`'s own spelling of it.
pub fn kill(signal: &str, pid: &str) {
    // The shell's own: a program of that name is not everywhere.
    let killed = Command::new("sh")
        .args(["-c", "kill \"$@\"", "kill", signal, pid])
        .output();
    succeeded("kill", killed).unwrap_or_else(|reason| panic!("{reason}"));
}

/// Sends a signal to a process and then to its children; some of these may be gone.
fn kill_all(signal: &str, children: &[String], pid: &str) {
    let killed = Command::new("sh")
        .args(["-c", "kill \"$@\" 2>/dev/null || true", "kill", signal, pid])
        .args(children)
        .output();
    killed.unwrap_or_else(|error| panic!("no sh: {error}"));
}

/// The processes that a process has begun; none where the system does not tell.
fn children(pid: &str) -> Vec<String> {
    let stat = |entry: fs::DirEntry| {
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        // The name, in parentheses, may hold anything.
        let (_, rest) = stat.rsplit_once(')')?;
        (rest.split_whitespace().nth(1)? == pid)
            .then(|| entry.file_name().to_string_lossy().into_owned())
    };
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(stat)
        .collect()
}

fn template(install: Install) -> &'static str {
    match install {
        Install::Extension => "template_extension",
        Install::Plain => "template_plain",
    }
}

fn next_name(install: Install) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    format!("owl_{}_{install}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// PostgreSQL refuses to run as root: then it runs as its own user.
fn server_user() -> Result<Option<(u32, u32)>, String> {
    let own = fs::metadata("/proc/self").map_err(|error| format!("/proc: {error}"))?;
    if own.uid() != 0 {
        return Ok(None);
    }
    let accounts =
        fs::read_to_string("/etc/passwd").map_err(|error| format!("/etc/passwd: {error}"))?;
    ["postgres", "nobody"]
        .iter()
        .find_map(|name| {
            let line = accounts
                .lines()
                .find(|line| line.split(':').next() == Some(name))?;
            let mut ids = line.split(':').skip(2);
            Some((ids.next()?.parse().ok()?, ids.next()?.parse().ok()?))
        })
        .map(Some)
        .ok_or_else(|| "root cannot run a server, and there is no user postgres".to_owned())
}

fn as_user(user: Option<(u32, u32)>, program: impl AsRef<Path>) -> Command {
    let mut command = Command::new(program.as_ref());
    if let Some((uid, gid)) = user {
        command.uid(uid).gid(gid);
    }
    command
}

fn make_folder(user: Option<(u32, u32)>) -> Result<PathBuf, String> {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let path = std::env::temp_dir().join(format!(
        "nightowls-{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    ));
    let failed = |error: std::io::Error| format!("{}: {error}", path.display());
    fs::DirBuilder::new()
        .mode(0o700)
        .create(&path)
        .map_err(failed)?;
    if let Some((uid, gid)) = user {
        chown(&path, Some(uid), Some(gid)).map_err(failed)?;
    }
    Ok(path)
}

/// Where a server was built for another place than it stands in, its programs
/// need to be told where its libpq is.
fn private_libraries(bin: &Path) -> Result<Option<PathBuf>, String> {
    let output = Command::new(bin.join("pg_config")).arg("--libdir").output();
    let output = succeeded("pg_config", output)?;
    let folder = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    Ok(folder.join("libpq.so.5").exists().then_some(folder))
}

fn succeeded(program: &str, output: std::io::Result<Output>) -> Result<Output, String> {
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        Ok(output)
    } else {
        Err(format!(
            "{program} failed:\n{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        ))
    }
}
