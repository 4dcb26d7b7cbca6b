//! Which files go into a project's folder of migrations, and under which
//! names: `<number>_nightowls_<version>_<concern>.sql`. Pure: it sees the
//! folder as a list of names, and the clock as an argument.
//!
//! The Supabase CLI runs the files in the order of their names as text, skips
//! every name that is not `<digits>_<anything>.sql`, and remembers the digits.
//! So a file is never renumbered, and a new one must come after the ones that
//! it builds on.

use super::{Migration, Upgrade, migration_name};
use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;

/// The last second that a 14-digit timestamp can say: 9999-12-31 23:59:59.
const LAST_SECOND: u64 = 253_402_300_799;

/// Where the numbers of new files come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Numbering {
    /// 14-digit UTC timestamps, one second a file, from this moment on
    /// (seconds since 1970), and after every file that is there.
    Timestamps {
        /// The moment of copying.
        now: u64,
    },
    /// The first free numbers of a range.
    Range(ServiceRange),
}

/// A range of numbers that a project gives to one service: `00300-00399`, or
/// `00300` for it and the rest of its hundred.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceRange {
    first: u64,
    last: u64,
    width: usize,
}

/// A file that is to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewFile {
    /// The file's name.
    pub name: String,
    /// The file's whole text.
    pub sql: String,
}

/// One of our files: wanted, and there or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The version the file belongs to.
    pub version: String,
    /// What the file holds.
    pub migration: Migration,
    /// The name under which it is in the folder already.
    pub present_as: Option<String>,
}

/// What is to be done to a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The files to write, in order.
    pub files: Vec<NewFile>,
    /// How many wanted files are there already.
    pub present: usize,
    /// A file that comes after a new one: if it has been applied,
    /// `supabase db push` needs `--include-all`.
    pub overtaken: Option<String>,
    /// A file stamped later than now, which put the new ones after it.
    pub ahead_of_clock: Option<String>,
}

/// Why nothing can be planned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FolderError {
    /// The range has fewer free numbers than files.
    RangeExhausted {
        /// The range.
        range: ServiceRange,
        /// How many files need a number.
        needed: usize,
        /// How many of them found one.
        found: usize,
    },
    /// The new file would run before one that it builds on.
    TooLate {
        /// The new file's name.
        name: String,
        /// The file that is there and would run after it.
        before: String,
    },
    /// No timestamp sorts after this file.
    AfterEveryTimestamp(String),
    /// The folder is at a version that this build does not know.
    Newer {
        /// The version of the folder.
        folder: String,
        /// The version of this build.
        ours: String,
    },
    /// No upgrade scripts lead from the folder's version to this one.
    NoUpgrade {
        /// The version of the folder.
        folder: String,
        /// The version of this build.
        ours: String,
    },
}

impl fmt::Display for FolderError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RangeExhausted {
                range,
                needed,
                found,
            } => write!(
                f,
                "service range {range} is exhausted: {needed} files need a number, {found} are free"
            ),
            Self::TooLate { name, before } => write!(
                f,
                "\"{name}\" would run before \"{before}\", which it builds on: \
                 use the same kind of numbers as the files that are there"
            ),
            Self::AfterEveryTimestamp(name) => write!(
                f,
                "\"{name}\" sorts after every timestamp of today: rename it, or use --service-range"
            ),
            Self::Newer { folder, ours } => write!(
                f,
                "the folder has files of nightowls {folder}, and this is owl {ours}: use a newer owl"
            ),
            Self::NoUpgrade { folder, ours } => {
                write!(f, "there is no upgrade from nightowls {folder} to {ours}")
            }
        }
    }
}

impl std::error::Error for FolderError {}

/// Lists the files that a folder at `version` has or should have, in order.
///
/// A folder without our files, or begun at this version, gets the install; one
/// begun at an earlier version gets the upgrade scripts from there.
///
/// # Errors
///
/// [`FolderError::Newer`] and [`FolderError::NoUpgrade`].
pub fn wanted(
    present: &[String],
    version: &str,
    install: &[Migration],
    upgrades: &[Upgrade],
) -> Result<Vec<Wanted>, FolderError> {
    let ours: Vec<_> = present.iter().filter_map(|name| our_file(name)).collect();
    let versions = || ours.iter().map(|(version, _)| *version);

    if let Some(newest) = versions().max_by_key(|version| version_key(version))
        && version_key(newest) > version_key(version)
    {
        return Err(FolderError::Newer {
            folder: newest.to_owned(),
            ours: version.to_owned(),
        });
    }

    let mut steps = Vec::new();
    match versions().min_by_key(|version| version_key(version)) {
        Some(begun_at) if begun_at != version => {
            let mut reached = begun_at;
            while reached != version {
                let Some(step) = upgrades.iter().find(|step| step.from == reached) else {
                    return Err(FolderError::NoUpgrade {
                        folder: begun_at.to_owned(),
                        ours: version.to_owned(),
                    });
                };
                steps.push((step.to, step.migration()));
                reached = step.to;
            }
        }
        _ => steps.extend(install.iter().map(|file| (version, file.clone()))),
    }

    Ok(steps
        .into_iter()
        .map(|(version, migration)| {
            let key = Some((version, migration.concern.as_str()));
            let present_as = present.iter().find(|name| our_file(name) == key).cloned();
            Wanted {
                version: version.to_owned(),
                present_as,
                migration,
            }
        })
        .collect())
}

/// Decides which of `wanted` are written and under which names.
///
/// # Errors
///
/// [`FolderError::RangeExhausted`], [`FolderError::TooLate`] and
/// [`FolderError::AfterEveryTimestamp`].
pub fn plan(
    present: &[String],
    wanted: &[Wanted],
    numbering: &Numbering,
) -> Result<Plan, FolderError> {
    let missing: Vec<_> = wanted
        .iter()
        .enumerate()
        .filter(|(_, file)| file.present_as.is_none())
        .collect();
    let mut plan = Plan {
        files: Vec::new(),
        present: wanted.len() - missing.len(),
        overtaken: None,
        ahead_of_clock: None,
    };
    if missing.is_empty() {
        return Ok(plan);
    }

    // For each missing file, the ones of ours that are there and must run before it.
    let before = |index: usize| {
        present.iter().filter(move |name| {
            our_file(name).is_some()
                && !wanted[index..]
                    .iter()
                    .any(|later| later.present_as.as_ref() == Some(*name))
        })
    };

    let numbers = match numbering {
        Numbering::Timestamps { now } => {
            let start = first_timestamp(present, *now)?;
            if start > *now {
                plan.ahead_of_clock = last_to_run(present).cloned();
            }
            (0..missing.len() as u64)
                .map(|second| timestamp(start + second))
                .collect()
        }
        Numbering::Range(range) => {
            let mut taken: HashSet<u64> = present.iter().filter_map(|name| number(name)).collect();
            let mut next = range.first;
            let mut numbers = Vec::new();
            for (index, _) in &missing {
                let after = before(*index).filter_map(|name| number(name));
                next = after
                    .filter(|number| (range.first..=range.last).contains(number))
                    .map(|number| number + 1)
                    .fold(next, u64::max);
                while taken.contains(&next) {
                    next += 1;
                }
                if next > range.last {
                    return Err(FolderError::RangeExhausted {
                        range: range.clone(),
                        needed: missing.len(),
                        found: numbers.len(),
                    });
                }
                taken.insert(next);
                numbers.push(format!("{next:0width$}", width = range.width));
            }
            numbers
        }
    };

    for ((index, file), number) in missing.into_iter().zip(numbers) {
        let name = migration_name(&file.version, &file.migration.concern);
        let name = format!("{number}_{name}.sql");
        if let Some(before) = before(index).find(|before| **before >= name) {
            return Err(FolderError::TooLate {
                name,
                before: before.clone(),
            });
        }
        plan.files.push(NewFile {
            name,
            sql: file.migration.sql.clone(),
        });
    }

    plan.overtaken = last_to_run(present)
        .filter(|last| **last > plan.files[0].name)
        .cloned();
    Ok(plan)
}

/// The version and concern of one of our files, by its name.
pub fn our_file(name: &str) -> Option<(&str, &str)> {
    let (_, rest) = numbered(name)?;
    let (version, concern) = rest.strip_prefix("nightowls_")?.split_once('_')?;
    version_key(version).map(|_| (version, concern))
}

/// Splits `<digits>_<anything>.sql`, the names that the Supabase CLI takes.
fn numbered(name: &str) -> Option<(&str, &str)> {
    let (number, rest) = name.strip_suffix(".sql")?.split_once('_')?;
    let digits = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    digits.then_some((number, rest))
}

/// The number that any file begins with, whatever follows.
fn number(name: &str) -> Option<u64> {
    let end = name.bytes().take_while(u8::is_ascii_digit).count();
    name[..end].parse().ok()
}

fn last_to_run(present: &[String]) -> Option<&String> {
    present.iter().filter(|name| numbered(name).is_some()).max()
}

/// Orders versions: by number, a pre-release before its release.
fn version_key(version: &str) -> Option<(u64, u64, u64, bool, &str)> {
    let (numbers, suffix) = match version.find(['-', '+']) {
        Some(at) => version.split_at(at),
        None => (version, ""),
    };
    let mut parts = numbers.split('.').map(|part| part.parse().ok());
    let key = (parts.next()??, parts.next()??, parts.next()??);
    let whole = parts.next().is_none();
    whole.then_some((key.0, key.1, key.2, !suffix.starts_with('-'), suffix))
}

/// The first second, not before `now`, whose name sorts after every file.
fn first_timestamp(present: &[String], now: u64) -> Result<u64, FolderError> {
    let Some(last) = last_to_run(present) else {
        return Ok(now);
    };
    let number = numbered(last).map_or("", |(number, _)| number);
    let sorts_after = |second: u64| format!("{}_", timestamp(second)) > format!("{number}_");
    if sorts_after(now) {
        return Ok(now);
    }
    // A short number such as 3_ sorts after every year below 4000: no timestamp to wait for.
    if number.len() != 14 || !sorts_after(LAST_SECOND) {
        return Err(FolderError::AfterEveryTimestamp(last.clone()));
    }
    let (mut before, mut after) = (now, LAST_SECOND);
    while after - before > 1 {
        let middle = before + (after - before) / 2;
        if sorts_after(middle) {
            after = middle;
        } else {
            before = middle;
        }
    }
    Ok(after)
}

/// `YYYYMMDDHHMMSS` in UTC of a second since 1970.
fn timestamp(second: u64) -> String {
    let second = second.min(LAST_SECOND);
    let (days, rest) = (second / 86_400, second % 86_400);
    // Civil date from a day number, in years that begin on 1 March and 400-year eras.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute) = (rest / 3_600, rest / 60 % 60);
    format!(
        "{year:04}{month:02}{day:02}{hour:02}{minute:02}{:02}",
        rest % 60
    )
}

impl fmt::Display for ServiceRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.width;
        write!(f, "{:0width$}-{:0width$}", self.first, self.last)
    }
}

impl FromStr for ServiceRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let invalid = || {
            format!(
                "service range \"{text}\" is not valid: write it as 00300-00399, \
                 two numbers of the same length, or as 00300 for the rest of its hundred"
            )
        };
        // 18 digits always fit.
        let parse = |number: &str| match number.len() {
            1..=18 if number.bytes().all(|byte| byte.is_ascii_digit()) => number.parse().ok(),
            _ => None,
        };
        let (first, last) = match text.split_once('-') {
            Some((first, last)) if first.len() == last.len() => {
                (parse(first).ok_or_else(invalid)?, parse(last))
            }
            Some(_) => return Err(invalid()),
            None => {
                let first: u64 = parse(text).ok_or_else(invalid)?;
                (first, Some(first / 100 * 100 + 99))
            }
        };
        let width = text.split('-').next().map_or(0, str::len);
        match last {
            Some(last) if first <= last && last.to_string().len() <= width.max(1) => {
                Ok(Self { first, last, width })
            }
            _ => Err(invalid()),
        }
    }
}

/// Finds our range in the text of a `.kodo/config.json`, in this order:
/// `nightowls.serviceRange` (or `service_range`),
/// `stack.sharedDatabase.serviceRanges.nightowls`, and
/// `stack.workspaces.nightowls.database.migrationStrategy.serviceRange`; as
/// `"00300-00399"` or `{"start": "00300", "end": "00399"}`. A range of another
/// service is never taken.
///
/// # Errors
///
/// A sentence, if the text is not JSON or the range not valid.
pub fn configured_range(config: &str) -> Result<Option<ServiceRange>, String> {
    let config: serde_json::Value =
        serde_json::from_str(config).map_err(|error| format!("is not valid JSON: {error}"))?;
    let found = [
        "/nightowls/serviceRange",
        "/nightowls/service_range",
        "/stack/sharedDatabase/serviceRanges/nightowls",
        "/stack/workspaces/nightowls/database/migrationStrategy/serviceRange",
    ]
    .into_iter()
    .find_map(|path| config.pointer(path).map(|value| (path, value)));

    let Some((path, value)) = found else {
        return Ok(None);
    };
    let text = match (value.as_str(), value.get("start"), value.get("end")) {
        (Some(text), _, _) => Some(text.to_owned()),
        (_, Some(start), Some(end)) => start
            .as_str()
            .zip(end.as_str())
            .map(|(start, end)| format!("{start}-{end}")),
        _ => None,
    };
    let text = text.ok_or_else(|| {
        format!("has a value at {path} that is neither \"00300-00399\" nor {{\"start\", \"end\"}}")
    })?;
    text.parse()
        .map(Some)
        .map_err(|error: String| format!("has at {path}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2026-01-31 23:59:58 UTC.
    const NOW: u64 = 1_769_903_998;

    const UPGRADES: &[Upgrade] = &[
        Upgrade {
            from: "0.1.0",
            to: "0.2.0",
            sql: "select 2;",
        },
        Upgrade {
            from: "0.2.0",
            to: "0.10.0",
            sql: "select 10;",
        },
    ];

    fn install() -> Vec<Migration> {
        ["prologue", "events", "grants"]
            .map(|concern| Migration {
                concern: concern.to_owned(),
                sql: format!("-- {concern}\n"),
            })
            .to_vec()
    }

    fn names(present: &[&str]) -> Vec<String> {
        present.iter().map(|name| (*name).to_owned()).collect()
    }

    fn plan_at(
        version: &str,
        present: &[&str],
        numbering: &Numbering,
    ) -> Result<Plan, FolderError> {
        let present = names(present);
        let wanted = wanted(&present, version, &install(), UPGRADES)?;
        plan(&present, &wanted, numbering)
    }

    fn planned(present: &[&str], numbering: &Numbering) -> Vec<String> {
        let plan = plan_at("0.1.0", present, numbering).expect("a plan");
        plan.files.into_iter().map(|file| file.name).collect()
    }

    fn stamps() -> Numbering {
        Numbering::Timestamps { now: NOW }
    }

    fn range(text: &str) -> Numbering {
        Numbering::Range(text.parse().expect("a range"))
    }

    #[test]
    fn timestamps_are_utc_dates() {
        for (second, text) in [
            (0, "19700101000000"),
            (951_782_399, "20000228235959"),
            (951_782_400, "20000229000000"),
            (1_709_164_800, "20240229000000"),
            (4_107_542_400, "21000301000000"),
            (NOW, "20260131235958"),
            (LAST_SECOND, "99991231235959"),
        ] {
            assert_eq!(timestamp(second), text);
        }
    }

    #[test]
    fn an_empty_folder_gets_one_file_a_second() {
        assert_eq!(
            planned(&[], &stamps()),
            [
                "20260131235958_nightowls_0.1.0_prologue.sql",
                "20260131235959_nightowls_0.1.0_events.sql",
                "20260201000000_nightowls_0.1.0_grants.sql",
            ]
        );
    }

    #[test]
    fn new_files_sort_after_every_file_that_is_there() {
        for (last, first) in [
            ("20270228235959_host.sql", "20270301000000"),
            ("20269999999999_bad_date.sql", "20270101000000"),
            ("20260131235958_now.sql", "20260131235959"),
            ("00300_short.sql", "20260131235958"),
            ("notes_about_99999999999999.sql", "20260131235958"),
            ("99999999999999.sql", "20260131235958"),
        ] {
            let files = planned(&[last], &stamps());
            assert!(files[0].starts_with(first), "{last}: {files:?}");
        }
    }

    #[test]
    fn a_number_that_no_timestamp_can_follow_is_an_error() {
        for name in ["3_short.sql", "99999_x.sql", "99991231235959_last.sql"] {
            assert_eq!(
                plan_at("0.1.0", &[name], &stamps()),
                Err(FolderError::AfterEveryTimestamp(name.to_owned()))
            );
        }
    }

    #[test]
    fn writing_again_changes_nothing() {
        for numbering in [stamps(), range("00300-00399")] {
            let files = planned(&[], &numbering);
            let present: Vec<_> = files.iter().map(String::as_str).collect();
            let again = plan_at("0.1.0", &present, &numbering).expect("a plan");
            assert_eq!((again.files.len(), again.present), (0, 3));
        }
    }

    #[test]
    fn an_upgrade_adds_only_what_is_new() {
        let mut present = planned(&[], &stamps());
        present.push("20260301000000_host.sql".to_owned());
        let refs: Vec<_> = present.iter().map(String::as_str).collect();
        let plan = plan_at("0.10.0", &refs, &stamps()).expect("a plan");
        let added: Vec<_> = plan.files.iter().map(|file| file.name.as_str()).collect();
        assert_eq!(
            added,
            [
                "20260301000001_nightowls_0.2.0_upgrade.sql",
                "20260301000002_nightowls_0.10.0_upgrade.sql",
            ]
        );
        assert!(plan.files[0].sql.ends_with("select 2;\n"));

        let refs: Vec<_> = refs.into_iter().chain(added).collect();
        assert_eq!(
            plan_at("0.10.0", &refs, &stamps()).map(|plan| plan.files.len()),
            Ok(0)
        );
    }

    #[test]
    fn a_folder_of_another_version_without_a_way_is_refused() {
        assert_eq!(
            plan_at("0.1.0", &["1_nightowls_0.2.0_events.sql"], &stamps()),
            Err(FolderError::Newer {
                folder: "0.2.0".to_owned(),
                ours: "0.1.0".to_owned(),
            })
        );
        assert_eq!(
            plan_at("0.2.0", &["1_nightowls_0.0.9_events.sql"], &stamps()),
            Err(FolderError::NoUpgrade {
                folder: "0.0.9".to_owned(),
                ours: "0.2.0".to_owned(),
            })
        );
    }

    #[test]
    fn a_range_gives_its_first_free_numbers() {
        assert_eq!(
            planned(
                &[
                    "00300_host.sql",
                    "302_other_width.sql",
                    "00303-not-a-migration.txt",
                ],
                &range("00300"),
            ),
            [
                "00301_nightowls_0.1.0_prologue.sql",
                "00304_nightowls_0.1.0_events.sql",
                "00305_nightowls_0.1.0_grants.sql",
            ]
        );
    }

    #[test]
    fn a_range_keeps_our_files_in_order() {
        // The gap at 00302 lies before what grants builds on, the one at 00305 after it.
        let present = [
            "00303_nightowls_0.1.0_prologue.sql",
            "00304_nightowls_0.1.0_events.sql",
        ];
        assert_eq!(
            planned(&present, &range("00302-00309")),
            ["00305_nightowls_0.1.0_grants.sql"]
        );

        let present = [
            "00300_nightowls_0.1.0_prologue.sql",
            "00302_nightowls_0.1.0_grants.sql",
        ];
        assert_eq!(
            planned(&present, &range("00300")),
            ["00301_nightowls_0.1.0_events.sql"]
        );

        let present = ["20260101000000_nightowls_0.1.0_prologue.sql"];
        assert!(matches!(
            plan_at("0.1.0", &present, &range("00300")),
            Err(FolderError::TooLate { .. })
        ));
    }

    #[test]
    fn an_exhausted_range_is_an_error() {
        let error = plan_at("0.1.0", &["00301_host.sql"], &range("00300-00302")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "service range 00300-00302 is exhausted: 3 files need a number, 2 are free"
        );
    }

    #[test]
    fn a_plan_says_when_an_applied_file_may_come_after() {
        let plan = |numbering| plan_at("0.1.0", &["20260101000000_host.sql"], &numbering).unwrap();
        assert_eq!(plan(stamps()).overtaken, None);
        assert_eq!(
            plan(range("00300")).overtaken.as_deref(),
            Some("20260101000000_host.sql")
        );
        assert_eq!(plan(stamps()).ahead_of_clock, None);
        let late = plan_at("0.1.0", &["20270101000000_host.sql"], &stamps()).unwrap();
        assert_eq!(
            late.ahead_of_clock.as_deref(),
            Some("20270101000000_host.sql")
        );
    }

    #[test]
    fn ranges_are_two_numbers_of_one_length() {
        for (text, shown) in [
            ("00300-00399", "00300-00399"),
            ("00300", "00300-00399"),
            ("00350", "00350-00399"),
            ("7-9", "7-9"),
        ] {
            assert_eq!(
                text.parse::<ServiceRange>().map(|range| range.to_string()),
                Ok(shown.to_owned())
            );
        }
        for text in [
            "",
            "-",
            "a",
            "00399-00300",
            "300-00399",
            "00300-",
            "-00399",
            "00300-00310-00320",
            "+300",
            "7",
            "1234567890123456789",
        ] {
            assert!(text.parse::<ServiceRange>().is_err(), "{text}");
        }
    }

    #[test]
    fn only_names_of_ours_are_ours() {
        assert_eq!(
            our_file("20260101000000_nightowls_0.1.0_events.sql"),
            Some(("0.1.0", "events"))
        );
        assert_eq!(
            our_file("00300_nightowls_1.0.0-rc.1_a_b.sql"),
            Some(("1.0.0-rc.1", "a_b"))
        );
        for name in [
            "nightowls_0.1.0_events.sql",
            "1_nightowls_add_column.sql",
            "1_nightowls_0.1_events.sql",
            "1_nightowls_0.1.0_events.SQL",
            "1_my_nightowls_0.1.0_events.sql",
        ] {
            assert_eq!(our_file(name), None, "{name}");
        }
        assert!(version_key("1.0.0-rc.1") < version_key("1.0.0"));
        assert!(version_key("0.9.0") < version_key("0.10.0"));
    }

    #[test]
    fn the_range_may_come_from_kodo() {
        for config in [
            r#"{"nightowls": {"serviceRange": "00300-00399"}}"#,
            r#"{"nightowls": {"service_range": "00300"}}"#,
            r#"{"stack": {"sharedDatabase": {"serviceRanges":
                {"api": "00200-00299", "nightowls": "00300-00399"}}}}"#,
            r#"{"stack": {"workspaces": {"nightowls": {"database": {"migrationStrategy":
                {"type": "hybrid", "serviceRange": {"start": "00300", "end": "00399"}}}}}}}"#,
        ] {
            let range = configured_range(config).expect("a valid config");
            assert_eq!(range.expect("a range").to_string(), "00300-00399");
        }
        for config in [
            "{}",
            "[]",
            r#"{"stack": {"sharedDatabase": {"serviceRanges": {"api": "00200-00299"}}}}"#,
        ] {
            assert_eq!(configured_range(config), Ok(None));
        }
        for config in [
            "",
            "{",
            r#"{"nightowls": {"serviceRange": 300}}"#,
            r#"{"nightowls": {"serviceRange": "x"}}"#,
        ] {
            assert!(configured_range(config).is_err(), "{config}");
        }
    }
}
