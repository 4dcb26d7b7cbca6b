//! README.md and the other pages: the tour does what it says, and links lead somewhere.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::{Session, on_each_route};

const README: &str = include_str!("../README.md");

/// One statement of the tour, and the lines that the page says come back.
struct Step {
    sql: String,
    promised: Vec<String>,
}

/// The first block of SQL of README.md.
fn tour() -> Vec<Step> {
    let (_, block) = README.split_once("```sql\n").expect("README.md has a tour");
    let (block, _) = block.split_once("```").expect("the block ends");
    let mut steps: Vec<Step> = Vec::new();
    let mut sql = String::new();
    for line in block.lines() {
        if let Some(promised) = line.strip_prefix("--> ") {
            let step = steps.last_mut().expect("a result follows a statement");
            step.promised.push(promised.to_owned());
            continue;
        }
        sql.push_str(line);
        sql.push('\n');
        if line.ends_with(';') {
            let promised = Vec::new();
            steps.push(Step {
                sql: std::mem::take(&mut sql),
                promised,
            });
        }
    }
    steps
}

/// What comes back: a line for each row, or the error.
fn answer(session: &mut Session, sql: &str) -> Vec<String> {
    match session.try_rows(sql) {
        Ok(rows) => rows
            .into_iter()
            .map(|row| {
                row.into_iter()
                    .map(Option::unwrap_or_default)
                    .collect::<Vec<_>>()
                    .join(" | ")
            })
            .collect(),
        Err(refusal) => vec![format!("{} {}", refusal.code, refusal.message)],
    }
}

#[test]
fn the_tour_of_the_readme_does_what_it_says() {
    let steps = tour();
    assert!(steps.len() >= 8, "the tour is gone");
    on_each_route(|db| {
        let mut session = db.owner();
        for step in &steps {
            let said = answer(&mut session, &step.sql);
            // What returns nothing worth showing is shown without it.
            let nothing = step.promised.is_empty() && said == [""];
            assert!(nothing || said == step.promised, "{}\n{said:#?}", step.sql);
        }
    });
}

/// README.md and what is in docs/ and benches/.
fn pages() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut pages = vec![root.join("README.md"), root.join("CHANGELOG.md")];
    for folder in ["docs", "benches"] {
        let entries = fs::read_dir(root.join(folder)).expect("the folder is there");
        pages.extend(
            entries
                .map(|entry| entry.expect("the folder can be read").path())
                .filter(|path| path.extension().is_some_and(|end| end == "md")),
        );
    }
    pages
}

#[test]
fn links_between_pages_lead_somewhere() {
    let mut broken = Vec::new();
    for page in pages() {
        let text = fs::read_to_string(&page).expect("the page is text");
        for target in text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next())
        {
            if target.contains("://") {
                continue;
            }
            let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
            let goal = match file {
                "" => page.clone(),
                file => page.parent().expect("a page is in a folder").join(file),
            };
            let found = match anchor {
                "" => goal.exists(),
                anchor => {
                    fs::read_to_string(&goal).is_ok_and(|text| headings(&text).any(|h| h == anchor))
                }
            };
            if !found {
                broken.push(format!("{}: {target}", page.display()));
            }
        }
    }
    assert!(
        broken.is_empty(),
        "links that lead nowhere:\n{}",
        broken.join("\n")
    );
}

/// The anchors of a page, as GitHub makes them of headings.
fn headings(text: &str) -> impl Iterator<Item = String> {
    text.lines()
        .filter(|line| line.starts_with('#'))
        .map(|line| {
            line.trim_start_matches('#')
                .trim()
                .to_lowercase()
                .chars()
                .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'))
                .map(|c| if c == ' ' { '-' } else { c })
                .collect()
        })
}
