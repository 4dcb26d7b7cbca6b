//! The `owl` command: brings nightowls into a project's folder of migrations, which needs no Postgres, no database
//! and no network; runs the clock of a database, and shows what goes on in it.

mod connect;
mod report;
mod terminal;
mod tick;
mod top;

use connect::Target;
use lexopt::{Arg, ValueExt};
use nightowls::migration::folder::{
    self, NewFile, Numbering, Plan, ServiceRange, Wanted, configured_range,
};
use nightowls::migration::{UPGRADES, VERSION, extension_script, migration_name, migrations};
use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const HELP: &str = "\
owl: brings nightowls into a project, runs its clock, shows what goes on

  owl install DIR [--service-range RANGE] [--dry-run]
      Writes the migrations that DIR does not have yet. Running it again
      changes nothing; after an upgrade of owl it adds only what is new.
      Files are named by the time of copying, or, with a range such as
      00300-00399 or 00300, by its first free numbers. Without the option the
      range is read from .kodo/config.json, looked for from DIR upwards.
      --dry-run says what would be written.
  owl info [DIR] [--env]
      Shows the version and, for DIR, which files are there and which are
      missing; --env the environment variables of a client.
  owl script
      Prints the script that create extension runs.

  owl tick [--every 60s] [--max-ms 50000] URL
      Runs the clock of a database: once, or with --every again and again, for
      where there is neither pg_cron nor the background worker. Says what it did.
  owl top [--every 2s] [--once] URL
      Shows queues, consumers, floors, endpoints and health, live. q quits.
      --once prints one frame.
  owl report [-o report.html] [--hours 24] URL
      Writes one HTML page with charts of the last hours; -o - prints it.
  owl --version
  owl help

URL is postgresql://user:password@host:5432/database?sslmode=verify-full or
host=… dbname=…; what it leaves out comes from PGHOST, PGPORT, PGDATABASE,
PGUSER, PGPASSWORD and PGSSLMODE. Without URL, DATABASE_URL is read. The user
must have had grant_service.
Exit status: 0 done, 1 failed and nothing was written, 2 wrong usage.
The commands without URL need neither database nor network.
";

/// The variables that matter to a client: name, whether it may be shown, what
/// reads it.
const ENVIRONMENT: &[(&str, Shown, &str)] = &[
    (
        "DATABASE_URL",
        Shown::Url,
        "one URL for everything: psql \"$DATABASE_URL\", Drizzle, SQLAlchemy, sqlx",
    ),
    (
        "PGHOST",
        Shown::Plainly,
        "psql, pg_dump and every libpq client",
    ),
    ("PGPORT", Shown::Plainly, "the same; 5432 if not set"),
    ("PGDATABASE", Shown::Plainly, "the same"),
    (
        "PGUSER",
        Shown::Plainly,
        "the same; installing needs a role with bypassrls",
    ),
    (
        "PGPASSWORD",
        Shown::Never,
        "the same; better in the file of PGPASSFILE",
    ),
    (
        "PGPASSFILE",
        Shown::Plainly,
        "the same; ~/.pgpass if not set",
    ),
    ("PGSSLMODE", Shown::Plainly, "the same"),
    (
        "PG_CONFIG",
        Shown::Plainly,
        "make install: the server to install the extension into",
    ),
    (
        "SUPABASE_ACCESS_TOKEN",
        Shown::Never,
        "Supabase CLI: signs in, for db push --remote",
    ),
    (
        "SUPABASE_DB_PASSWORD",
        Shown::Never,
        "Supabase CLI: the linked project's database",
    ),
    (
        "SUPABASE_URL",
        Shown::Plainly,
        "supabase-js and edge functions: the project's API",
    ),
    (
        "SUPABASE_ANON_KEY",
        Shown::Never,
        "supabase-js as a user; sees what its JWT may see",
    ),
    (
        "SUPABASE_SERVICE_ROLE_KEY",
        Shown::Never,
        "supabase-js as the service; never in a browser",
    ),
    (
        "SUPABASE_DB_URL",
        Shown::Url,
        "edge functions that speak to Postgres; the CLI does not read it",
    ),
];

#[derive(Clone, Copy)]
enum Shown {
    Plainly,
    Url,
    Never,
}

enum Failure {
    Usage(String),
    Failed(String),
}

impl From<lexopt::Error> for Failure {
    fn from(error: lexopt::Error) -> Self {
        Self::Usage(error.to_string())
    }
}

fn main() -> ExitCode {
    let outcome = run().and_then(|text| match io::stdout().write_all(text.as_bytes()) {
        // Whoever reads us has seen enough.
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::Failed(format!("cannot write: {error}")))
        }
        _ => Ok(()),
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Failed(message)) => {
            eprintln!("owl: {message}");
            ExitCode::FAILURE
        }
        Err(Failure::Usage(message)) => {
            eprintln!("owl: {message}\nTry \"owl help\".");
            ExitCode::from(2)
        }
    }
}

/// Runs the command that the arguments ask for; returns what it prints.
fn run() -> Result<String, Failure> {
    let mut arguments = lexopt::Parser::from_env();
    let command = match arguments.next()? {
        None => return Err(Failure::Usage("a command is missing".to_owned())),
        Some(Arg::Short('h') | Arg::Long("help")) => return Ok(HELP.to_owned()),
        Some(Arg::Short('V') | Arg::Long("version")) => return Ok(format!("owl {VERSION}\n")),
        Some(Arg::Value(command)) => command.string()?,
        Some(other) => return Err(other.unexpected().into()),
    };

    let mut dir: Option<OsString> = None;
    let mut range: Option<ServiceRange> = None;
    let (mut dry_run, mut env) = (false, false);
    let (mut every, mut max_ms, mut once, mut hours) = (None, None, false, 24);
    let mut out = PathBuf::from("report.html");
    while let Some(argument) = arguments.next()? {
        match (command.as_str(), argument) {
            (_, Arg::Short('h') | Arg::Long("help")) => return Ok(HELP.to_owned()),
            ("install", Arg::Long("service-range")) => {
                let text = arguments.value()?.string()?;
                range = Some(text.parse().map_err(Failure::Usage)?);
            }
            ("install", Arg::Long("dry-run")) => dry_run = true,
            ("info", Arg::Long("env")) => env = true,
            ("tick" | "top", Arg::Long("every")) => {
                let text = arguments.value()?.string()?;
                every = Some(tick::duration(&text).map_err(Failure::Usage)?);
            }
            ("tick", Arg::Long("max-ms")) => max_ms = Some(number(&mut arguments, 3_600_000)?),
            ("top", Arg::Long("once")) => once = true,
            ("report", Arg::Short('o') | Arg::Long("output")) => out = arguments.value()?.into(),
            ("report", Arg::Long("hours")) => hours = number(&mut arguments, 48)?,
            ("install" | "info" | "tick" | "top" | "report", Arg::Value(value))
                if dir.is_none() =>
            {
                dir = Some(value);
            }
            (_, other) => return Err(other.unexpected().into()),
        }
    }

    if let "tick" | "top" | "report" = command.as_str() {
        let target = target(dir)?;
        return match (command.as_str(), every) {
            ("tick", None) => tick::once(&target, max_ms.unwrap_or(50_000)),
            ("tick", Some(every)) => {
                // So that one run is over when the next one is due.
                let most = u64::try_from(every.as_millis() * 4 / 5).unwrap_or(50_000);
                tick::forever(&target, every, max_ms.unwrap_or(most.min(50_000)))
            }
            ("top", _) if once => top::once(&target),
            ("top", every) => top::live(&target, every.unwrap_or(Duration::from_secs(2))),
            _ => report::write(&target, hours, &out),
        }
        .map_err(Failure::Failed);
    }

    let dir = dir.map(PathBuf::from);
    match (command.as_str(), dir) {
        ("help", _) => Ok(HELP.to_owned()),
        ("script", _) => Ok(extension_script()),
        ("info", dir) => info(dir.as_deref(), env).map_err(Failure::Failed),
        ("install", Some(dir)) if !dir.as_os_str().is_empty() => {
            install(&dir, range, dry_run).map_err(Failure::Failed)
        }
        ("install", _) => Err(Failure::Usage("install needs a folder".to_owned())),
        (other, _) => Err(Failure::Usage(format!("there is no command \"{other}\""))),
    }
}

/// The database that the argument names, or `DATABASE_URL`.
fn target(argument: Option<OsString>) -> Result<Target, Failure> {
    let url = argument
        .or_else(|| std::env::var_os("DATABASE_URL"))
        .filter(|url| !url.is_empty())
        .ok_or_else(|| {
            Failure::Usage("a URL is missing, and DATABASE_URL is not set".to_owned())
        })?;
    let url = url
        .into_string()
        .map_err(|_| Failure::Usage("the URL is no text".to_owned()))?;
    Target::parse(&url).map_err(Failure::Usage)
}

/// The value of an option: a whole number from 1.
fn number(arguments: &mut lexopt::Parser, most: u64) -> Result<u64, Failure> {
    let text = arguments.value()?.string()?;
    text.parse()
        .ok()
        .filter(|number| (1..=most).contains(number))
        .ok_or_else(|| Failure::Usage(format!("\"{text}\" is no number from 1 to {most}")))
}

/// `owl install`: writes the files that are missing.
fn install(dir: &Path, range: Option<ServiceRange>, dry_run: bool) -> Result<String, String> {
    let mut text = String::new();
    let numbering = match range {
        Some(range) => Numbering::Range(range),
        None => match kodo_range(dir, &mut text)? {
            Some(range) => Numbering::Range(range),
            None => Numbering::Timestamps { now: now()? },
        },
    };

    let missing_folder = !dir.exists();
    if !dry_run {
        fs::create_dir_all(dir).map_err(|error| in_path("cannot make", dir, &error))?;
    }
    // Two owls at once would take the same numbers. Held until the handle is dropped;
    // a file system that has no locks has no such owls either.
    let lock = if dir.exists() {
        let folder = File::open(dir).map_err(|error| in_path("cannot open", dir, &error))?;
        let _ = folder.lock();
        Some(folder)
    } else {
        None
    };

    let outcome = planned(dir, &numbering).and_then(|plan| {
        if !dry_run {
            write_files(dir, &plan.files)?;
        }
        Ok(plan)
    });
    if missing_folder && !dry_run && outcome.is_err() {
        // Only if it is empty, as it was made here.
        let _ = fs::remove_dir(dir);
    }
    let plan = outcome?;
    if let Some(folder) = lock.filter(|_| !dry_run && !plan.files.is_empty()) {
        folder
            .sync_all()
            .map_err(|error| in_path("cannot sync", dir, &error))?;
    }

    let verb = if dry_run { "would write" } else { "wrote" };
    for file in &plan.files {
        let _ = writeln!(text, "{verb} {}", dir.join(&file.name).display());
    }
    report(&mut text, &plan, dry_run);
    Ok(text)
}

fn planned(dir: &Path, numbering: &Numbering) -> Result<Plan, String> {
    let present = names_in(dir)?;
    folder::wanted(&present, VERSION, &migrations(VERSION), UPGRADES)
        .and_then(|wanted| folder::plan(&present, &wanted, numbering))
        .map_err(|error| error.to_string())
}

/// Says what follows from what was written.
fn report(text: &mut String, plan: &Plan, dry_run: bool) {
    if plan.files.is_empty() {
        let _ = writeln!(
            text,
            "nothing to write: all {} files of nightowls {VERSION} are there",
            plan.present
        );
        return;
    }
    if plan.present > 0 {
        let _ = writeln!(text, "{} files were there already", plan.present);
    }
    if let Some(ahead) = &plan.ahead_of_clock {
        let _ = writeln!(
            text,
            "\"{ahead}\" is ahead of the clock; the new files come after it"
        );
    }
    let push = match &plan.overtaken {
        None => "supabase db push",
        Some(overtaken) => {
            let _ = writeln!(
                text,
                "the new files come before \"{overtaken}\": where that is applied, db push needs --include-all"
            );
            "supabase db push --include-all"
        }
    };
    if !dry_run {
        let _ = writeln!(text, "next: {push}");
    }
}

/// Writes all files or none: each under another name first, then renamed.
fn write_files(dir: &Path, files: &[NewFile]) -> Result<(), String> {
    let hidden = |file: &NewFile| dir.join(format!(".{}.{}", file.name, std::process::id()));
    let mut renamed = 0;
    let outcome = (|| {
        for file in files {
            let path = hidden(file);
            write_synced(&path, &file.sql)
                .map_err(|error| in_path("cannot write", &path, &error))?;
        }
        for file in files {
            let path = dir.join(&file.name);
            fs::rename(hidden(file), &path)
                .map_err(|error| in_path("cannot write", &path, &error))?;
            renamed += 1;
        }
        Ok(())
    })();
    if outcome.is_err() {
        for (index, file) in files.iter().enumerate() {
            // Some of them were never made.
            let _ = fs::remove_file(hidden(file));
            if index < renamed {
                let _ = fs::remove_file(dir.join(&file.name));
            }
        }
    }
    outcome
}

fn write_synced(path: &Path, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

/// `owl info`: what there is, without writing anything.
fn info(dir: Option<&Path>, env: bool) -> Result<String, String> {
    let mut text = format!("owl {VERSION}, PostgreSQL 15 to 18\n");
    match dir {
        Some(dir) => folder_info(&mut text, dir)?,
        None if !env => {
            text.push_str("\nmigrations of this version:\n");
            for file in migrations(VERSION) {
                let _ = writeln!(text, "  {}", migration_name(VERSION, &file.concern));
            }
        }
        None => {}
    }
    if env {
        text.push_str("\nenvironment of a client (secrets are never shown):\n");
        for (name, shown, what) in ENVIRONMENT {
            let value = shown_value(std::env::var_os(name).as_deref(), *shown);
            let _ = writeln!(text, "  {name:<26} {what}\n  {:<26} {value}", "");
        }
    }
    Ok(text)
}

fn folder_info(text: &mut String, dir: &Path) -> Result<(), String> {
    if !dir.is_dir() {
        return Err(format!("\"{}\" is not a folder", dir.display()));
    }
    let present = names_in(dir)?;
    let wanted = folder::wanted(&present, VERSION, &migrations(VERSION), UPGRADES)
        .map_err(|error| error.to_string())?;
    let there = |wanted: &Wanted| wanted.present_as.is_some();

    let _ = writeln!(text, "\n{}:", dir.display());
    for name in present.iter().filter(|name| {
        folder::our_file(name).is_some()
            && !wanted
                .iter()
                .any(|file| file.present_as.as_ref() == Some(*name))
    }) {
        let _ = writeln!(text, "  earlier  {name}");
    }
    for file in &wanted {
        match &file.present_as {
            None => {
                let name = migration_name(&file.version, &file.migration.concern);
                let _ = writeln!(text, "  missing  {name}");
            }
            Some(name) => {
                let path = dir.join(name);
                let found =
                    fs::read(&path).map_err(|error| in_path("cannot read", &path, &error))?;
                let state = if found == file.migration.sql.as_bytes() {
                    "present"
                } else {
                    "changed"
                };
                let _ = writeln!(text, "  {state}  {name}");
            }
        }
    }

    let missing = wanted.iter().filter(|file| !there(file)).count();
    let _ = match missing {
        0 => writeln!(text, "all {} files are there", wanted.len()),
        _ => writeln!(
            text,
            "{missing} of {} files are missing; next: owl install {}",
            wanted.len(),
            dir.display()
        ),
    };
    Ok(())
}

fn shown_value(value: Option<&OsStr>, shown: Shown) -> String {
    let Some(value) = value.filter(|value| !value.is_empty()) else {
        return "not set".to_owned();
    };
    match shown {
        Shown::Plainly => format!("= {}", value.display()),
        Shown::Never => "set".to_owned(),
        Shown::Url => match without_secrets(&value.to_string_lossy()) {
            Some(url) => format!("= {url}"),
            None => "set".to_owned(),
        },
    }
}

/// A URL without its password and its parameters; nothing if it is no URL.
fn without_secrets(url: &str) -> Option<String> {
    let (scheme, rest) = url.split_once("://")?;
    let rest = rest.split(['?', '#']).next().unwrap_or_default();
    let Some((user, host)) = rest.rsplit_once('@') else {
        return Some(format!("{scheme}://{rest}"));
    };
    let user = match user.split_once(':') {
        Some((name, _)) => format!("{name}:***"),
        None => user.to_owned(),
    };
    Some(format!("{scheme}://{user}@{host}"))
}

/// Reads the service range of the nearest `.kodo/config.json`, from `dir` upwards.
fn kodo_range(dir: &Path, text: &mut String) -> Result<Option<ServiceRange>, String> {
    let dir = std::path::absolute(dir).map_err(|error| in_path("cannot find", dir, &error))?;
    for folder in dir.ancestors() {
        let path = folder.join(".kodo/config.json");
        let config = match fs::read_to_string(&path) {
            Ok(config) => config,
            Err(error)
                if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) =>
            {
                continue;
            }
            Err(error) => return Err(in_path("cannot read", &path, &error)),
        };
        let range =
            configured_range(&config).map_err(|error| format!("\"{}\" {error}", path.display()))?;
        let _ = match &range {
            Some(range) => writeln!(text, "service range {range}, from {}", path.display()),
            None => writeln!(
                text,
                "{} has no range for nightowls: using timestamps",
                path.display()
            ),
        };
        return Ok(range);
    }
    Ok(None)
}

/// The names of the files in `dir`, sorted; none if there is no such folder.
fn names_in(dir: &Path) -> Result<Vec<String>, String> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(in_path("cannot read", dir, &error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| in_path("cannot read", dir, &error))?;
        if !entry.path().is_dir() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

fn now() -> Result<u64, String> {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map(|since| since.as_secs())
        .map_err(|_| "the clock is before 1970".to_owned())
}

fn in_path(what: &str, path: &Path, error: &io::Error) -> String {
    format!("{what} \"{}\": {error}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_shown_without_its_password() {
        for (url, shown) in [
            (
                "postgresql://a:b@h:1/d?sslmode=x",
                Some("postgresql://a:***@h:1/d"),
            ),
            ("postgres://a:p@ss@h/d", Some("postgres://a:***@h/d")),
            ("postgres://a@h/d", Some("postgres://a@h/d")),
            ("postgres:///d?password=b", Some("postgres:///d")),
            ("host=h password=b", None),
        ] {
            assert_eq!(without_secrets(url).as_deref(), shown, "{url}");
        }
    }
}
