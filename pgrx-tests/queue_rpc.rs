//! The queue's functions where an API finds them, and a worker that calls them through one.

use std::path::Path;
use std::sync::OnceLock;

use crate::fixture::{default_org, lines};
use crate::orm::{Found, Tools, npm, or_skip, run, write};
use crate::projections::text;
use crate::queue::jobs;
use crate::supabase::dressed;
use crate::support::{APP, Db, Install, SERVICE, STRANGER, on_each_install};

/// The npm clients, PostgREST and the programs of `pgrx-tests/clients/npm`.
pub fn node_clients() -> Option<&'static Tools> {
    static NODE: OnceLock<Found> = OnceLock::new();
    or_skip("queue clients", NODE.get_or_init(|| npm("clients/npm")))
}

/// A program of `pgrx-tests/clients` beside the packages it needs.
pub fn place(tools: &Tools, folder: &str, name: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("pgrx-tests/clients")
        .join(folder)
        .join(name);
    let program = std::fs::read_to_string(path).expect("the program is there");
    write(&tools.folder, name, &program);
}

#[test]
fn wrappers_are_made_where_nothing_is_in_their_way() {
    on_each_install(|db| {
        let mut service = jobs(db);
        let mut owner = db.owner();
        db.superuser().exec(&format!(
            "create schema api authorization {}; grant usage on schema api to {SERVICE}, {STRANGER};
             create function api.read(x int) returns int language sql return x;
             create function api.pop(text) returns int language sql return 1;
             comment on function api.pop(text) is 'Calls nightowls.pop(), with the caller''s rights; made by nightowls.install_rpc(): x';
             alter function api.pop(text) owner to {APP};
             alter default privileges for role {} in schema api grant execute on functions to {STRANGER}",
            db.install().owner(),
            db.install().owner()
        ));
        let install = "select function_name, outcome from nightowls.install_rpc('api') order by 1";
        let first = lines(&mut owner, install);
        assert!(first.len() > 20, "{first:?}");
        for row in &first {
            let alone = ["read ", "pop "].iter().any(|name| row.starts_with(name));
            let expected = if alone {
                "left alone: there is another function of this name"
            } else {
                "made"
            };
            assert!(row.ends_with(expected), "{row}");
        }
        assert!(
            lines(&mut owner, install)
                .iter()
                .all(|row| !row.ends_with("made"))
        );

        // They do what they stand for, with defaults and names.
        let id = text(
            &mut service,
            "select api.send(queue => 'jobs', message => '{\"n\": 1}')",
        );
        assert_eq!(
            lines(
                &mut service,
                "select payload, read_ct from api.pop_queue('jobs')"
            ),
            ["{\"n\": 1} 1"]
        );
        let opaque = text(
            &mut service,
            "select queue_id || '.' || msg_id || '.' || receipt from nightowls.queue_messages",
        );
        assert!(opaque.contains(&format!(".{id}.")));
        assert_eq!(
            text(
                &mut service,
                &format!("select api.ack_message(message_id => '{opaque}')")
            ),
            "t"
        );
        assert_eq!(
            text(
                &mut service,
                "select version from api.append_event('order', '1', 'paid')"
            ),
            "1"
        );
        assert_eq!(
            service.refused("select api.pop_queue('nope')").code,
            "NW007"
        );

        // Services only, whatever default privileges say; and with their own rights.
        let mut stranger = db.session(STRANGER);
        for call in ["api.pop_queue('jobs')", "api.send('jobs', '1')"] {
            assert_eq!(stranger.refused(&format!("select {call}")).code, "42501");
        }
        let rights = lines(
            &mut db.superuser(),
            &format!(
                "select distinct a.grantee::regrole, p.prosecdef from pg_proc p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
                  where p.pronamespace = 'api'::regnamespace and p.proname not in ('read', 'pop') and a.grantee <> p.proowner or
                        p.pronamespace = 'api'::regnamespace and a.grantee = '{STRANGER}'::regrole order by 1"
            ),
        );
        assert_eq!(rights, [format!("{SERVICE} f")]);

        // What is ours and old is made anew; what has become a service gets its rights.
        db.superuser().exec(&format!(
            "drop function api.send(text, jsonb, int, jsonb, text, interval, text, int, uuid);
             comment on function api.ack_message(text, uuid) is 'Calls nightowls.ack_message(), with the caller''s rights; made by nightowls.install_rpc(): old';
             select nightowls.grant_service('{STRANGER}')"
        ));
        let changed: Vec<_> = lines(&mut owner, install)
            .into_iter()
            .filter(|row| !row.ends_with("there already") && !row.contains("left alone"))
            .collect();
        assert_eq!(changed, ["ack_message made anew", "send made"]);
        assert_eq!(
            lines(&mut stranger, "select count(*) from api.pop_queue('jobs')"),
            ["0"]
        );
    });
}

#[test]
fn wrappers_are_the_owners_to_make_and_go_where_they_may() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        for (schema, code) in [
            ("null", "22004"),
            ("'nowhere'", "3F000"),
            ("'nightowls'", "22023"),
            ("'pg_catalog'", "22023"),
        ] {
            let refusal = owner.refused(&format!("select nightowls.install_rpc({schema})"));
            assert_eq!(refusal.code, code, "{schema}: {refusal}");
        }
        assert_eq!(
            db.service().refused("select nightowls.install_rpc()").code,
            "42501"
        );
        // A name that must be quoted.
        owner.exec("create schema \"My Api\"; select nightowls.install_rpc('My Api')");
        assert_eq!(
            text(
                &mut owner,
                "select nightowls.create_queue('q')::text || \"My Api\".send('q', '1')"
            )
            .len(),
            1
        );
    });
}

/// The worker of docs/queue.md.
fn worker() -> &'static str {
    include_str!("../docs/queue.md")
        .split("```ts\n")
        .nth(1)
        .and_then(|rest| rest.split("```").next())
        .expect("docs/queue.md has a worker")
}

/// A Supabase project's database with nightowls and the wrappers in schema public, and an org by default.
pub fn project(install: Install) -> Db {
    let db = dressed(install);
    let mut owner = db.owner();
    match install {
        Install::Extension => owner.exec("create extension nightowls"),
        Install::Plain => {
            for file in nightowls::migration::migrations(nightowls::migration::VERSION) {
                owner.exec(&file.sql);
            }
        }
    }
    default_org(&db);
    owner.exec("select nightowls.install_rpc()");
    db
}

/// What programs of `pgrx-tests/clients/npm`, each `role=program`, print, one after the other, with PostgREST before the database.
#[track_caller]
pub fn serve(node: &Tools, db: &Db, programs: &[&str]) -> String {
    for file in ["serve.mjs", "token.mjs", "websocket.mjs", "package.json"] {
        place(node, "npm", file);
    }
    run(
        Path::new("node"),
        &[&["serve.mjs"], programs].concat(),
        &node.folder,
        &db.url("authenticator"),
    )
}

#[test]
fn a_worker_written_against_supabase_js_runs_verbatim() {
    let Some(node) = node_clients() else { return };
    for file in ["errors.ts", "refused.ts"] {
        place(node, "npm", file);
    }
    write(&node.folder, "worker.ts", worker());
    for install in Install::ALL {
        let db = project(install);
        let mut owner = db.owner();
        owner.exec(
            "select nightowls.create_queue('jobs');
             select nightowls.send('jobs', '{\"to\": \"ann\"}'), nightowls.send('jobs', '{\"to\": \"bob\"}')",
        );
        let said = serve(
            node,
            &db,
            &[
                "service_role=worker.ts",
                "service_role=errors.ts",
                "anon=refused.ts",
                "authenticated=refused.ts",
            ],
        );
        let refused = "pop_queue null 42501\nack_message null 42501\nsend null 42501\n";
        assert_eq!(
            said,
            format!(
                "working on {{ to: 'ann' }}\nworking on {{ to: 'bob' }}\n\
                     NW007 queue \"jbos\" does not exist Did you mean \"jobs\"?\nnumber 1 eve\ntrue false\n{refused}{refused}"
            )
        );
        let left = text(&mut owner, "select count(*) from nightowls.queue_messages");
        assert_eq!(left, "0");
    }
}
