//! The main functions as supabase-js calls them, through a real PostgREST: who may, whose org it is, and how errors arrive.

use std::collections::BTreeMap;

use crate::errors::promised;
use crate::queue_rpc::{node_clients, place, project, serve};
use crate::support::Install;

#[test]
fn the_swarm_is_called_over_supabase_js_by_those_who_may() {
    let Some(node) = node_clients() else { return };
    place(node, "npm", "swarm.ts");
    for install in Install::ALL {
        let db = project(install);
        db.owner().exec(
            "select nightowls.create_org('acme two', org => '00000000-0000-4000-8000-00000000000a');
             select nightowls.set_default_org('00000000-0000-4000-8000-00000000000a');
             select nightowls.create_org('beta', 'org_beta', org => '00000000-0000-4000-8000-00000000000b');
             select nightowls.add_member('ann'), nightowls.add_member('vic', 'viewer'), nightowls.create_queue('jobs')",
        );
        assert_eq!(
            serve(node, &db, &["service_role=swarm.ts"]),
            "service: ok\nerrors: ok\norgs: ok\nmembers: ok\n"
        );
    }
}

/// What docs/errors.md says of the statuses: of codes and of classes, which are the codes' first two characters.
fn statuses() -> BTreeMap<&'static str, &'static str> {
    let (_, section) = include_str!("../docs/errors.md")
        .split_once("\n## Over HTTP\n")
        .expect("the page has the heading");
    section
        .lines()
        .filter_map(|line| {
            line.strip_prefix("| ")?
                .strip_suffix(" |")?
                .split_once(" | ")
        })
        .filter(|(status, _)| status.parse::<u16>().is_ok())
        .flat_map(|(status, codes)| {
            codes
                .split([',', ';', ' '])
                .filter(|word| [2, 5].contains(&word.len()))
                .map(move |code| (code, status))
        })
        .collect()
}

#[test]
fn every_error_has_the_http_status_that_the_page_gives_it() {
    let Some(node) = node_clients() else { return };
    place(node, "npm", "statuses.ts");
    let statuses = statuses();
    assert!(statuses.len() > 10, "{statuses:?}");
    let codes = promised();
    let db = project(Install::Plain);
    db.owner().exec(&format!(
        "create function public.codes_to_try() returns text[] language sql return '{{{}}}'::text[];
         create function public.fail_with(code text) returns int language plpgsql as $$
         begin raise exception 'told' using errcode = code, detail = 'more', hint = 'try'; end $$;
         create sequence public.calls; grant usage on sequence public.calls to service_role;
         create function public.succeed_at_the_third() returns text language plpgsql as $$
         declare n bigint := nextval('public.calls');
         begin if n < 3 then raise exception 'not yet' using errcode = '40001'; end if; return 'call ' || n; end $$",
        codes.iter().map(String::as_str).collect::<Vec<_>>().join(",")
    ));
    let expected: String = codes
        .iter()
        .map(|code| {
            if code == "40001" {
                return "40001 call 3\n".to_owned();
            }
            let status = statuses.get(code.as_str()).or(statuses.get(&code[..2]));
            format!("{code} {} whole\n", status.unwrap_or(&"400"))
        })
        .collect();
    assert_eq!(serve(node, &db, &["service_role=statuses.ts"]), expected);
}
