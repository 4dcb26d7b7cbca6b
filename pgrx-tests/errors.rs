//! docs/errors.md: every SQLSTATE that is raised stands there, and no other.

use std::collections::BTreeSet;

use nightowls::install::FILES;

use crate::support::{Install, SERVICE, Session, on_each_install, on_install, quote};

const PAGE: &str = include_str!("../docs/errors.md");
/// The errors that Rust raises, each by a constructor whose comment begins with its code.
const CONSTRUCTORS: &str = include_str!("../src/error.rs");

/// The codes in the first column of the table under a heading.
fn listed(heading: &str) -> BTreeSet<String> {
    let (_, section) = PAGE
        .split_once(&format!("\n## {heading}\n"))
        .expect("the page has the heading");
    let section = section.split("\n## ").next().unwrap_or_default();
    section
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.split(" | ").next())
        .flat_map(|codes| codes.split(", "))
        .filter(|code| is_code(code))
        .map(str::to_owned)
        .collect()
}

/// The codes of both tables.
pub fn promised() -> BTreeSet<String> {
    let mut codes = listed("Raised by nightowls");
    codes.extend(listed("Raised by Postgres on our objects"));
    codes
}

fn is_code(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_digit() || c.is_ascii_uppercase();
    text.len() == 5 && text.chars().all(allowed) && text.contains(|c: char| c.is_ascii_digit())
}

/// The codes of every `errcode = '…'`, which may be a condition's name.
fn raised_in_sql(session: &mut Session) -> BTreeSet<String> {
    let names: BTreeSet<_> = FILES
        .iter()
        .flat_map(|file| file.text.split("errcode = '").skip(1))
        .filter_map(|rest| rest.split('\'').next())
        .collect();
    assert!(
        names.len() > 15,
        "the SQL raises errors in another way: {names:?}"
    );
    names
        .into_iter()
        .map(|name| {
            let raise = format!(
                "do $$ begin raise exception 'x' using errcode = {}; end $$",
                quote(name)
            );
            session.refused(&raise).code
        })
        .collect()
}

fn raised_in_rust() -> impl Iterator<Item = String> {
    CONSTRUCTORS
        .lines()
        .filter_map(|line| line.strip_prefix("/// ")?.get(..5))
        .filter(|code| is_code(code))
        .map(str::to_owned)
}

#[test]
fn every_code_that_is_raised_is_on_the_page_and_no_other() {
    on_install(Install::Plain, |db| {
        let mut raised = raised_in_sql(&mut db.owner());
        raised.extend(raised_in_rust());
        assert_eq!(listed("Raised by nightowls"), raised);
    });
}

#[test]
fn every_code_that_a_comment_promises_is_on_the_page() {
    let promised = promised();
    on_each_install(|db| {
        let comments = db.owner().rows(
            "select p.proname, obj_description(p.oid) from pg_proc p \
             where p.pronamespace = 'nightowls'::regnamespace",
        );
        for row in comments {
            let comment = row[1].as_deref().unwrap_or_default();
            let raises = comment
                .split_once("Raises ")
                .map_or("", |(_, raises)| raises);
            for word in raises.split(|c: char| !c.is_ascii_alphanumeric()) {
                assert!(
                    !is_code(word) || promised.contains(word),
                    "{} is not in docs/errors.md: {:?} promises it",
                    word,
                    row[0]
                );
            }
        }
    });
}

#[test]
fn what_postgres_raises_on_our_objects_is_what_the_page_says() {
    const INSERT: &str = "insert into nightowls.events";
    on_each_install(|db| {
        db.owner().exec(
            "select nightowls.set_default_org(nightowls.create_org('shop')); \
             select nightowls.append_event('order', '1', 'placed')",
        );
        let promised = promised();
        let mut service = db.session(SERVICE);
        let mut refused = |code: &str, sql: &str| {
            assert!(promised.contains(code), "{code} is not on the page");
            let refusal = service.refused(sql);
            assert_eq!(refusal.code, code, "{sql}: {refusal}");
        };
        refused(
            "22P02",
            "select nightowls.append_event('order', '1', 'paid', '{')",
        );
        refused(
            "22P05",
            r#"select nightowls.append_event('order', '1', 'paid', '"\u0000"')"#,
        );
        refused(
            "23502",
            &format!("{INSERT} (aggregate_type, aggregate_id) values ('order', '2')"),
        );
        refused(
            "23505",
            &format!(
                "{INSERT} (aggregate_type, aggregate_id, event_type, version) values ('order', '1', 'paid', 1)"
            ),
        );
        refused("23514", "insert into nightowls.orgs (name) values ('')");
        refused(
            "42883",
            "select nightowls.append_event(aggregate => 'order')",
        );
        let chosen = format!(
            "{INSERT} (position, aggregate_type, aggregate_id, event_type) values (1, 'order', '2', 'placed')"
        );
        refused("428C9", &chosen);
        assert_eq!(db.owner().refused(&chosen).code, "428C9");
        refused(
            "42501",
            &format!(
                "{INSERT} (aggregate_type, aggregate_id, event_type, created_at) values ('order', '2', 'placed', now())"
            ),
        );
        refused(
            "2D000",
            "begin; call nightowls.acquire_floor('conversation', 'ann')",
        );
        refused(
            "57014",
            "rollback; begin; set local statement_timeout = 10; select pg_sleep(1)",
        );
        refused(
            "25P02",
            "select nightowls.append_event('order', '1', 'paid')",
        );
    });
}
