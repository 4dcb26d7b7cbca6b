//! The two installs as text, from one source: the extension's script and the
//! plain migrations are both made from [`crate::install::FILES`].
//!
//! [`folder`] decides under which names migrations go into a project's folder.

pub mod folder;

use crate::install::{FILES, Scope};

/// The version of this build.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// One migration: a file that runs on its own, as one transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Migration {
    /// What the file is about; the last part of its name.
    pub concern: String,
    /// The file's whole text.
    pub sql: String,
}

/// A released version's step to a later one, as the same file serves
/// `alter extension nightowls update`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Upgrade {
    /// The version it starts from.
    pub from: &'static str,
    /// The version it ends at.
    pub to: &'static str,
    /// The text of `sql/nightowls--from--to.sql`.
    pub sql: &'static str,
}

/// Every upgrade script, oldest first. 0.1.0 is the first version.
pub const UPGRADES: &[Upgrade] = &[];

/// The text of `nightowls--<version>.sql`, which `create extension` runs.
pub fn extension_script() -> String {
    let mut script = String::new();
    for file in FILES.iter().filter(|file| file.scope != Scope::Plain) {
        if !script.is_empty() {
            script.push('\n');
        }
        script.push_str("-- ");
        script.push_str(file.path.trim_start_matches("../"));
        script.push_str("\n\n");
        script.push_str(file.text.trim());
        script.push('\n');
    }
    script
}

/// The plain install of `version` as migrations, in the order in which they
/// must be applied.
pub fn migrations(version: &str) -> Vec<Migration> {
    FILES
        .iter()
        .filter(|file| file.scope != Scope::Extension)
        .map(|file| Migration {
            concern: file.concern.to_owned(),
            sql: with_heading(version, file.concern, file.text),
        })
        .collect()
}

impl Upgrade {
    /// This step as a migration.
    pub fn migration(&self) -> Migration {
        Migration {
            concern: "upgrade".to_owned(),
            sql: with_heading(self.to, "upgrade", self.sql),
        }
    }
}

/// What a migration is called without its number: `nightowls_0.1.0_events`.
/// A number, `_`, this and `.sql` make the file's name.
pub fn migration_name(version: &str, concern: &str) -> String {
    format!("nightowls_{version}_{concern}")
}

fn with_heading(version: &str, concern: &str, text: &str) -> String {
    format!(
        "-- nightowls {version}: {concern}\n\
         -- Applied once and never edited: an upgrade comes as files of its own.\n\n{}\n",
        text.trim()
    )
}

#[cfg(feature = "extension")]
mod sql {
    use pgrx::prelude::*;

    /// One row for each migration of this build, in order.
    #[pg_extern(sql = false)]
    fn migration_files() -> TableIterator<
        'static,
        (
            name!(version, String),
            name!(name, String),
            name!(sql, String),
        ),
    > {
        let files = super::migrations(super::VERSION);
        TableIterator::new(files.into_iter().map(|file| {
            let name = super::migration_name(super::VERSION, &file.concern);
            (super::VERSION.to_owned(), name, file.sql)
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn the_extension_script_has_each_of_its_files_once_and_in_order() {
        let script = extension_script();
        let mut from = 0;
        for file in FILES {
            let heading = format!("-- {}\n", file.path.trim_start_matches("../"));
            if file.scope == Scope::Plain {
                assert!(!script.contains(&heading), "{heading}");
            } else {
                from += script[from..].find(&heading).expect("files stay in order") + 1;
            }
        }
    }

    #[test]
    fn the_first_migration_makes_the_schema_and_no_concern_comes_twice() {
        let files = migrations(VERSION);
        assert_eq!(files[0].concern, "prologue");
        assert!(files[0].sql.contains("create schema nightowls"));

        let concerns: HashSet<_> = files.iter().map(|file| &file.concern).collect();
        assert_eq!(concerns.len(), files.len());
    }

    #[test]
    fn a_migration_holds_nothing_that_only_psql_or_an_extension_script_knows() {
        for file in migrations(VERSION) {
            let mut in_body = false;
            for line in file.sql.lines() {
                let line = line.trim_start().to_ascii_lowercase();
                in_body ^= line.matches("$$").count() % 2 == 1;
                // A procedure may commit, a migration may not.
                for refused in ["begin;", "commit;"] {
                    assert!(
                        in_body || !line.starts_with(refused),
                        "{}: {line}",
                        file.concern
                    );
                }
                for refused in [
                    "\\",
                    "create extension",
                    "create table if not exists",
                    "create or replace",
                ] {
                    assert!(!line.starts_with(refused), "{}: {line}", file.concern);
                }
                assert!(!line.contains("@extschema@"), "{}: {line}", file.concern);
                assert!(
                    !line.contains("module_pathname"),
                    "{}: {line}",
                    file.concern
                );
            }
        }
    }

    #[test]
    fn the_upgrades_make_one_chain_to_this_version() {
        for step in UPGRADES.windows(2) {
            assert_eq!(step[0].to, step[1].from);
        }
        if let Some(last) = UPGRADES.last() {
            assert_eq!(last.to, VERSION);
        }
    }
}
