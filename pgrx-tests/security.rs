//! docs/security.md names every function that runs as the owner; docs/agents.md and docs/runs.md do what they say.

use std::collections::BTreeSet;

use crate::fixture::{default_org, lines};
use crate::projections::text;
use crate::support::{on_each_install, on_each_route};

const SECURITY: &str = include_str!("../docs/security.md");
const AGENTS: &str = include_str!("../docs/agents.md");
const RUNS: &str = include_str!("../docs/runs.md");

/// The names between backquotes of the first column of the page's last table.
fn named() -> BTreeSet<String> {
    let (_, table) = SECURITY
        .split_once("| functions | why |")
        .expect("the page has the table");
    table
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split(" | ").next())
        .flat_map(|cell| cell.split('`').map(str::to_owned).collect::<Vec<_>>())
        .filter(|name| name.chars().any(char::is_alphabetic))
        .collect()
}

#[test]
fn every_function_that_runs_as_the_owner_is_on_the_page_and_no_other() {
    on_each_install(|db| {
        let there: BTreeSet<_> = lines(
            &mut db.superuser(),
            "select distinct proname from pg_proc where pronamespace = 'nightowls'::regnamespace and prosecdef",
        )
        .into_iter()
        .collect();
        let page = named();
        let missing: Vec<_> = there.difference(&page).collect();
        let gone: Vec<_> = page.difference(&there).collect();
        assert!(
            missing.is_empty() && gone.is_empty(),
            "docs/security.md: missing {missing:?}, not there {gone:?}"
        );
    });
}

#[test]
fn what_members_may_call_is_private_or_asks_who_they_are() {
    // Of the functions that run as the owner those that members may call are these, each read by hand.
    on_each_install(|db| {
        let callable = lines(
            &mut db.superuser(),
            "select distinct p.proname from pg_proc p where p.pronamespace = 'nightowls'::regnamespace and p.prosecdef
                and has_function_privilege('owl_member', p.oid, 'execute') order by 1",
        );
        assert_eq!(
            callable,
            [
                "_is_member",
                "_list_messages_redacted",
                "_list_my_run_events",
                "_manage_member",
                "_may_receive",
                "_member_orgs",
                "_my_config_value",
                "_my_message",
                "_my_run",
                "_my_run_events",
                "_my_thread",
                "_post_message",
                "_resolve_org",
            ]
        );
    });
}

/// The statements of a page's blocks of SQL.
fn blocks(page: &str) -> Vec<String> {
    page.split("```sql\n")
        .skip(1)
        .filter_map(|rest| Some(rest.split_once("```")?.0.to_owned()))
        .collect()
}

#[test]
fn the_pages_on_agents_and_runs_do_what_they_say() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        for page in [AGENTS, RUNS] {
            let blocks = blocks(page);
            assert!(!blocks.is_empty());
            for block in blocks {
                service.exec(&block);
            }
        }
        assert_eq!(
            lines(
                &mut service,
                "select version, is_head, restored_from, content ->> 'model_id' from nightowls.list_agent_versions('sage')"
            ),
            ["1 f null small-1", "2 f null large-1", "3 t 1 small-1"]
        );
        assert_eq!(
            lines(
                &mut service,
                "select status, runner, output from nightowls.runs"
            ),
            [r#"completed worker-2 {"refunded": 12.50}"#]
        );
        assert_eq!(
            text(
                &mut service,
                "select string_agg(event_type, ' ' order by version) from nightowls.list_run_events('r-1')"
            ),
            "run_queued run_running run_suspended run_running run_completed"
        );
        assert_eq!(
            lines(&mut service, "select status from nightowls.followups"),
            ["done"]
        );
        assert_eq!(
            text(
                &mut service,
                r#"select nightowls.redact('{"ssn": "1", "next_token": "abc", "text": "see CASE-1234"}', rules) from nightowls.redaction_rules"#
            ),
            r#"{"ssn": "[redacted]", "text": "see [redacted]", "next_token": "abc"}"#
        );
    });
}
