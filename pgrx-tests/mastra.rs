//! Mastra's own client on our tables, unchanged: that they are those it would make, that it gets the same answers from them, with a role that may
//! do no DDL, straight and pooled; that orgs see nothing of each other; and rows that it had elsewhere before.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use nightowls::migration::{VERSION, migrations};

use crate::fixture::{default_org, lines, new_org, together};
use crate::orm::{Found, Tools, npm, or_skip, run, write};
use crate::projections::text;
use crate::support::{
    Db, Install, MEMBER, SUPERUSER, Session, on_each_install, on_each_route, pooler_or_skip, server,
};

/// @mastra/pg, @mastra/core and the programs of `pgrx-tests/mastra`.
pub fn mastra() -> Option<&'static Tools> {
    static MASTRA: OnceLock<Found> = OnceLock::new();
    let tools = or_skip(
        "mastra",
        MASTRA.get_or_init(|| {
            let tools = npm("mastra")?;
            let programs = Path::new(env!("CARGO_MANIFEST_DIR")).join("pgrx-tests/mastra");
            for entry in fs::read_dir(programs).expect("the programs are there") {
                let path = entry.expect("the folder can be read").path();
                if path.extension().is_some_and(|extension| extension == "mjs") {
                    let name = path.file_name().expect("a file has a name");
                    let program = fs::read_to_string(&path).expect("a program is text");
                    write(&tools.folder, &name.to_string_lossy(), &program);
                }
            }
            Ok(tools)
        }),
    )?;
    Some(tools)
}

pub fn node(tools: &Tools, arguments: &[&str], url: &str) -> String {
    run(Path::new("node"), arguments, &tools.folder, url)
}

/// A login role for a test alone, dropped with it.
pub struct Role {
    pub name: String,
    db: String,
}

impl Role {
    /// With the rights of Mastra's store for an org.
    pub fn new(db: &Db, name: &str, org: &str) -> Self {
        let role = Role {
            name: format!("{}_{name}", db.name()),
            db: db.name().to_owned(),
        };
        db.direct(SUPERUSER)
            .exec(&format!("create role {} login", role.name));
        db.direct(db.install().owner()).exec(&format!(
            "select nightowls.grant_mastra('{}', '{org}')",
            role.name
        ));
        role
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        // Its rights are in the database, which may be in use still.
        let port = server().port();
        if let Ok(mut session) = Session::connect(port, &self.db, SUPERUSER) {
            let _ = session.try_exec(&format!("drop owned by {0}; drop role {0}", self.name));
        }
    }
}

/// Refuses whoever tries any DDL from now on.
pub fn forbid_ddl(db: &Db) {
    db.direct(SUPERUSER).exec(
        "create function public.no_ddl() returns event_trigger language plpgsql as $$
           begin raise exception 'DDL: %', tg_tag using errcode = '0LP01'; end $$;
         create event trigger no_ddl on ddl_command_start execute function public.no_ddl()",
    );
}

/// What the tour prints on the tables that the package itself makes.
fn reference(tools: &Tools) -> &'static str {
    static REFERENCE: OnceLock<String> = OnceLock::new();
    REFERENCE.get_or_init(|| {
        let db = server().empty_database(Install::Plain);
        let answers = node(
            tools,
            &["store.mjs", "tour", "", "init"],
            &db.url(SUPERUSER),
        );
        assert!(answers.ends_with("done\n"), "{answers}");
        assert!(answers.lines().count() > 120, "{answers}");
        answers
    })
}

#[track_caller]
fn assert_same(answers: &str, reference: &str) {
    for (ours, theirs) in answers.lines().zip(reference.lines()) {
        assert_eq!(ours, theirs);
    }
    assert_eq!(answers.lines().count(), reference.lines().count());
}

/// Tables, columns, keys, indexes and triggers, in the order of the columns.
const SCHEMA: &str = r#"
select c.relname, 'column', a.attnum, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, coalesce(pg_get_expr(d.adbin, d.adrelid), '')
  from pg_class c
  join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
  left join pg_attrdef d on d.adrelid = c.oid and d.adnum = a.attnum
 where c.relnamespace = 'nightowls'::regnamespace and c.relkind = 'r' and c.relname ~ '^mastra_' and a.attname <> 'org_id'
 union all
select c.relname, 'key', 0, k.conname, pg_get_constraintdef(k.oid), true, ''
  from pg_class c join pg_constraint k on k.conrelid = c.oid
 where c.relnamespace = 'nightowls'::regnamespace and c.relname ~ '^mastra_' and k.contype <> 'n'
 union all
select c.relname, 'index', 0, i.indexrelid::regclass::text, pg_get_indexdef(i.indexrelid), i.indisreplident, ''
  from pg_class c join pg_index i on i.indrelid = c.oid
 where c.relnamespace = 'nightowls'::regnamespace and c.relname ~ '^mastra_'
 union all
select c.relname, 'trigger', 0, t.tgname, pg_get_triggerdef(t.oid), true, ''
  from pg_class c join pg_trigger t on t.tgrelid = c.oid
 where c.relnamespace = 'nightowls'::regnamespace and c.relname ~ '^mastra_' and not t.tgisinternal and t.tgname <> 't10_foreign'
 union all
select c.relname, 'replica identity', 0, c.relreplident::text, '', true, ''
  from pg_class c
 where c.relnamespace = 'nightowls'::regnamespace and c.relkind = 'r' and c.relname ~ '^mastra_'
 order by 1, 2, 3, 4"#;

#[test]
fn the_tables_are_those_that_the_package_makes() {
    let Some(tools) = mastra() else { return };
    let theirs = server().empty_database(Install::Plain);
    node(tools, &["init.mjs", "nightowls"], &theirs.url(SUPERUSER));
    let theirs = lines(&mut theirs.superuser(), SCHEMA);
    assert!(theirs.len() > 780, "{}", theirs.len());
    on_each_install(|db| {
        let ours = lines(&mut db.superuser(), SCHEMA);
        let only = |some: &[String], others: &[String]| {
            let mut only: Vec<_> = some.to_vec();
            only.retain(|line| !others.contains(line));
            only
        };
        assert_eq!(
            (only(&ours, &theirs), only(&theirs, &ours)),
            (Vec::<String>::new(), Vec::new()),
            "ours alone, theirs alone"
        );
    });
}

#[test]
fn the_store_gets_the_same_answers_with_a_role_that_may_do_no_ddl() {
    let Some(tools) = mastra() else { return };
    let reference = reference(tools);
    // Pooled, in the test of two orgs.
    on_each_install(|db| {
        let org = default_org(db);
        let role = Role::new(db, "app", &org);
        forbid_ddl(db);
        assert_same(&node(tools, &["store.mjs"], &db.url(&role.name)), reference);
        let mut superuser = db.direct(SUPERUSER);
        let used = lines(
            &mut superuser,
            "select table_name from nightowls._mastra_tables()",
        )
        .iter()
        .filter(|table| {
            let any = format!("select exists (select from nightowls.{table})");
            text(&mut superuser, &any) == "t"
        })
        .count();
        assert!(used >= 36, "{used} tables");
    });
}

#[test]
fn a_workflow_suspended_in_one_process_goes_on_in_another() {
    let Some(tools) = mastra() else { return };
    on_each_route(|db| {
        let org = default_org(db);
        let role = Role::new(db, "app", &org);
        forbid_ddl(db);
        let url = db.url(&role.name);
        assert_eq!(
            node(tools, &["workflow.mjs", "start", "run-1"], &url),
            "[\"suspended\",\"how much more than 40?\"]\n"
        );
        assert_eq!(
            node(tools, &["workflow.mjs", "resume", "run-1"], &url),
            "[\"success\",{\"answer\":42}]\n"
        );
    });
}

#[test]
fn stores_of_two_orgs_run_side_by_side_and_see_nothing_of_each_other() {
    let Some(tools) = mastra() else { return };
    if !pooler_or_skip() {
        return;
    }
    let reference = reference(tools);
    for install in Install::ALL {
        let db = server().database(install);
        let orgs = [default_org(&db), new_org(&db, "other")];
        let roles = [("one", "0"), ("two", "1")].map(|(name, nth)| {
            Role::new(&db, name, &orgs[nth.parse::<usize>().expect("a number")])
        });
        let port = db.cluster().pooler_port(2);
        let url = |role: &Role| {
            format!(
                "postgresql://{}@127.0.0.1:{port}/{}?sslmode=disable",
                role.name,
                db.name()
            )
        };
        let answers = together(
            2,
            |nth| url(&roles[nth]),
            |nth, url| node(tools, &["store.mjs", "nightowls", ["a~", "b~"][nth]], &url),
        );
        for answers in answers {
            assert_same(&answers, reference);
        }
        let mut superuser = db.superuser();
        for (nth, role) in roles.iter().enumerate() {
            let mut session = db.session(&role.name);
            for table in lines(
                &mut superuser,
                "select table_name from nightowls._mastra_tables()",
            ) {
                let orgs_of = lines(
                    &mut session,
                    &format!("select distinct org_id from nightowls.{table}"),
                );
                assert!(
                    orgs_of.iter().all(|org| *org == orgs[nth]),
                    "{table}: {orgs_of:?}"
                );
            }
            assert_eq!(
                lines(
                    &mut session,
                    "select id from nightowls.mastra_resources order by 1"
                ),
                [["a~new", "a~res"], ["b~new", "b~res"]][nth]
            );
        }

        // By hand, as the second org: nothing of the first can be read, changed or taken, and what is refused is said.
        let mut session = db.session(&roles[1].name);
        for sql in [
            "update nightowls.mastra_threads set title = 'mine' where id = 'a~t1' returning id",
            "delete from nightowls.mastra_messages where thread_id = 'a~t1' returning id",
            "select id from nightowls.mastra_threads where id like 'a~%'",
        ] {
            assert_eq!(lines(&mut session, sql), [""; 0], "{sql}");
        }
        let org = &orgs[0];
        for (sql, code) in [
            ("insert into nightowls.mastra_resources (id, \"createdAt\", \"updatedAt\") values ('a~res', now(), now())", "23505"),
            (
                "insert into nightowls.mastra_resources (id, \"createdAt\", \"updatedAt\") values ('a~res', now(), now())
                   on conflict (id) do update set \"workingMemory\" = 'taken'",
                "42501",
            ),
            (
                "insert into nightowls.mastra_skill_blobs (hash, content, size, \"createdAt\") values ('a~hash2', 'x', 1, now()) on conflict (hash) do nothing",
                "23505",
            ),
            (
                &format!("insert into nightowls.mastra_resources (id, \"createdAt\", \"updatedAt\", org_id) values ('c', now(), now(), '{org}')"),
                "42501",
            ),
            (&format!("update nightowls.mastra_threads set org_id = '{org}'"), "42501"),
            ("truncate nightowls.mastra_threads", "42501"),
            ("select * from nightowls.runs", "42501"),
            ("select * from nightowls._mastra_roles", "42501"),
            ("select nightowls.send('jobs', '1')", "42501"),
            ("select nightowls.current_org()", "42501"),
            (&format!("select nightowls.grant_mastra('{}', '{org}')", roles[1].name), "42501"),
        ] {
            assert_eq!(session.refused(sql).code, code, "{sql}");
        }
        // Whatever the session says it is for.
        session.exec(&format!("set nightowls.org_id to '{org}'; set nightowls.user_id to 'owner'; set row_security to off"));
        assert_eq!(
            session
                .refused("select id from nightowls.mastra_threads")
                .code,
            "42501"
        );
        session.exec("set row_security to on");
        assert_eq!(
            lines(
                &mut session,
                "select distinct org_id from nightowls.mastra_threads"
            ),
            [orgs[1].as_str()]
        );
    }
}

#[test]
fn a_service_works_for_one_org_at_a_time_and_a_member_for_none() {
    on_each_route(|db| {
        let (org, other) = (default_org(db), new_org(db, "other"));
        let mut service = db.service();
        let save = "insert into nightowls.mastra_threads (id, \"resourceId\", title, \"createdAt\", \"updatedAt\") values";
        service.exec(&format!("{save} ('t1', 'r', 'first', now(), now())"));
        service.exec(&format!(
            "begin; select set_config('nightowls.org_id', '{other}', true); {save} ('t2', 'r', 'second', now(), now()); commit"
        ));
        let mine = "select id, org_id from nightowls.mastra_threads";
        assert_eq!(lines(&mut service, mine), [format!("t1 {org}")]);
        service.exec("begin");
        service.exec(&format!(
            "select set_config('nightowls.org_id', '{other}', true)"
        ));
        assert_eq!(lines(&mut service, mine), [format!("t2 {other}")]);
        service.exec("commit");
        db.owner().exec("select nightowls.set_default_org(null)");
        assert_eq!(service.refused(mine).code, "NW010");
        assert_eq!(
            service
                .refused(&format!("{save} ('t3', 'r', 'third', now(), now())"))
                .code,
            "NW010"
        );
        assert_eq!(db.session(MEMBER).refused(mine).code, "42501");
    });
}

#[test]
fn rights_are_given_to_roles_that_they_can_hold() {
    on_each_install(|db| {
        let (org, other) = (default_org(db), new_org(db, "other"));
        let role = Role::new(db, "app", &org);
        let mut owner = db.owner();
        let call = |role: &str, org: &str| format!("select nightowls.grant_mastra({role}, {org})");
        let name = format!("'{}'", role.name);
        owner.exec(&call(&name, &format!("'{org}'")));
        owner.exec(&call(&name, "null"));
        for (sql, code) in [
            (call("null", "null"), "22004"),
            (call("'nobody here'", "null"), "42704"),
            (call("'postgres'", "null"), "22023"),
            (call("'owl_owner'", "null"), "22023"),
            (call(&name, &format!("'{other}'")), "42710"),
            (
                call(&name, "'00000000-0000-4000-8000-00000000dead'"),
                "22023",
            ),
            ("select nightowls.revoke_mastra(null)".into(), "22004"),
        ] {
            let refusal = owner.refused(&sql);
            assert_eq!(refusal.code, code, "{sql}: {refusal}");
        }
        let mut session = db.session(&role.name);
        let read = "select count(*) from nightowls.mastra_threads";
        assert_eq!(text(&mut session, read), "0");
        owner.exec(&format!("select nightowls.revoke_mastra({name}), nightowls.revoke_mastra({name}), nightowls.revoke_mastra('never there')"));
        assert_eq!(session.refused(read).code, "42501");
        owner.exec(&call(&name, &format!("'{other}'")));
        assert_eq!(text(&mut session, read), "0");
        assert_eq!(text(&mut session, "select nightowls._mastra_org()"), other);
    });
}

fn install(db: &Db) -> Result<(), crate::support::Refusal> {
    let mut owner = db.owner();
    match db.install() {
        Install::Extension => owner.try_exec("create extension nightowls"),
        Install::Plain => migrations(VERSION)
            .iter()
            .try_for_each(|file| owner.try_exec(&file.sql)),
    }
}

/// Every row of a schema's tables but for the org.
fn contents(session: &mut Session, schema: &str) -> Vec<String> {
    lines(
        session,
        &format!("select relname from pg_class where relnamespace = '{schema}'::regnamespace and relkind = 'r' and relname ~ '^mastra_' order by 1"),
    )
    .iter()
    .map(|table| {
        format!(
            "{table} {}",
            text(
                session,
                &format!("select count(*) || ' ' || coalesce(md5(string_agg(r, E'\\n' order by r)), '') from (select (to_jsonb(t) - 'org_id')::text as r from {schema}.{table} t) x")
            )
        )
    })
    .collect()
}

#[test]
fn what_the_package_made_before_is_adopted_with_its_rows() {
    let Some(tools) = mastra() else { return };
    let reference = reference(tools);
    for kind in Install::ALL {
        let db = server().empty_database(kind);
        // As an application had it: the package's tables in a schema of our name.
        db.superuser().exec(&format!(
            "create schema nightowls authorization {0}; grant create on database {1} to {0}",
            kind.owner(),
            db.name()
        ));
        let owner_url = db.url(kind.owner());
        assert_same(
            &node(tools, &["store.mjs", "nightowls", "", "init"], &owner_url),
            reference,
        );
        let refusal = install(&db).unwrap_err();
        assert_eq!(refusal.code, "42P06", "{kind}: {refusal}");
        let mut owner = db.owner();
        owner.exec("alter schema nightowls rename to nightowls_v1");
        install(&db).unwrap();
        let org = default_org(&db);
        let other = new_org(&db, "other");

        let before = contents(&mut owner, "nightowls_v1");
        let adopt = "select table_name, adopted, outcome from nightowls.adopt_mastra()";
        let adopted = lines(&mut owner, adopt);
        assert_eq!(adopted.len(), before.len());
        assert_eq!(contents(&mut owner, "nightowls"), before, "{kind}");
        assert_eq!(contents(&mut owner, "nightowls_v1"), before, "{kind}");
        assert_eq!(
            text(
                &mut owner,
                "select distinct org_id from nightowls.mastra_messages"
            ),
            org
        );
        // Again nothing; what was changed meanwhile is refused, all of it; so is another org.
        assert!(
            lines(&mut owner, adopt)
                .iter()
                .all(|line| line.split(' ').nth(1) == Some("0"))
        );
        assert_eq!(contents(&mut owner, "nightowls"), before, "{kind}");
        assert_eq!(
            owner
                .refused(&format!("select nightowls.adopt_mastra(org => '{other}')"))
                .code,
            "23505"
        );
        owner.exec(
            "update nightowls_v1.mastra_threads set title = 'changed' where id = 't1'; delete from nightowls.mastra_agents",
        );
        assert_eq!(owner.refused(adopt).code, "23505");
        assert_eq!(
            text(&mut owner, "select count(*) from nightowls.mastra_agents"),
            "0"
        );

        // The client goes on with what it had.
        let role = Role::new(&db, "app", &org);
        node(
            tools,
            &["workflow.mjs", "start", "run-1"],
            &db.url(&role.name),
        );
        assert_eq!(
            text(
                &mut db.session(&role.name),
                "select count(*) from nightowls.mastra_messages where thread_id = 't1'"
            ),
            "24"
        );
    }
}

#[test]
fn tables_of_another_version_are_adopted_if_nothing_is_lost() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        for (schema, code) in [
            ("null", "22004"),
            ("'nowhere'", "3F000"),
            ("'nightowls'", "22023"),
            ("'pg_catalog'", "22023"),
        ] {
            assert_eq!(
                owner
                    .refused(&format!("select nightowls.adopt_mastra({schema})"))
                    .code,
                code,
                "{schema}"
            );
        }
        assert_eq!(
            db.service().refused("select nightowls.adopt_mastra()").code,
            "42501"
        );
        // Fewer columns, JSON as text, a column and a table that are gone.
        db.superuser().exec(&format!(
            "create schema \"Old One\"; grant usage on schema \"Old One\" to {0};
             create table \"Old One\".mastra_threads (id text primary key, \"resourceId\" text not null, title text not null, metadata text,
               \"createdAt\" timestamp not null, \"updatedAt\" timestamp not null, extra text);
             insert into \"Old One\".mastra_threads values ('t', 'r', 'old', '{{\"a\": 1.10}}', '2024-01-02', '2024-01-03');
             create table \"Old One\".mastra_traces (id text);
             insert into \"Old One\".mastra_traces values ('x');
             alter table \"Old One\".mastra_threads owner to {0}; alter table \"Old One\".mastra_traces owner to {0}",
            db.install().owner()
        ));
        let adopt = "select table_name, adopted, outcome from nightowls.adopt_mastra('Old One')";
        assert_eq!(
            lines(&mut owner, adopt),
            [
                "mastra_threads 1 adopted",
                "mastra_traces 0 left where it is, with 1 rows: this version of Mastra has no such table",
            ]
        );
        assert_eq!(
            lines(
                &mut owner,
                "select title, metadata, \"createdAt\"::date - '2024-01-01'::date from nightowls.mastra_threads"
            ),
            ["old {\"a\": 1.10} 1"]
        );
        owner.exec("update \"Old One\".mastra_threads set extra = 'kept'");
        let refusal = owner.refused(adopt);
        assert_eq!(refusal.code, "22023");
        assert!(refusal.to_string().contains("extra"), "{refusal}");
    });
}

#[test]
fn an_erasure_takes_mastras_rows_of_the_subject_along() {
    let Some(tools) = mastra() else { return };
    on_each_install(|db| {
        let (org, other) = (default_org(db), new_org(db, "other"));
        let role = Role::new(db, "one", &org);
        node(
            tools,
            &["store.mjs", "nightowls", "a~"],
            &db.url(&role.name),
        );
        db.superuser().exec(&format!(
            "insert into nightowls.mastra_messages select 'b~' || id, thread_id, content, role, type, \"createdAt\", \"resourceId\", \"createdAtZ\", '{other}'
               from nightowls.mastra_messages"
        ));
        let mut service = db.service();
        for (kind, id, pieces) in [
            ("thread", "a~t1", ["said anew", "likes owls"]),
            ("run", "a~run", ["\"a~run\"", "a~task"]),
            ("resource", "a~res", ["# More", "a~res"]),
        ] {
            let before = text(
                &mut db.superuser(),
                &format!(
                    "select md5(string_agg(m::text, '' order by id)) from nightowls.mastra_messages m where org_id = '{other}'"
                ),
            );
            service.exec(&format!(
                "select nightowls.erase('{kind}', '{id}', 'asked')"
            ));
            for piece in pieces {
                assert_eq!(
                    lines(
                        &mut service,
                        &format!(
                            "select table_name, column_name from nightowls.scan_for('{piece}') where org_id = '{org}' and table_name ~ '^mastra_'"
                        )
                    ),
                    [""; 0],
                    "{kind} {piece}"
                );
            }
            assert_eq!(
                text(
                    &mut db.superuser(),
                    &format!(
                        "select md5(string_agg(m::text, '' order by id)) from nightowls.mastra_messages m where org_id = '{other}'"
                    ),
                ),
                before
            );
        }
        assert_eq!(
            lines(
                &mut service,
                "select count(*) from nightowls.mastra_messages"
            ),
            ["0"]
        );
        service.exec("select nightowls.erase('user', 'a~ann', 'asked')");
        assert_eq!(
            lines(
                &mut service,
                &format!(
                    "select table_name, column_name from nightowls.scan_for('a~ann') where org_id = '{org}' and table_name ~ '^mastra_'"
                )
            ),
            [""; 0]
        );
    });
}

#[test]
fn the_page_does_what_it_says() {
    on_each_install(|db| {
        default_org(db);
        let owner = db.install().owner();
        // Where a step of the page has brought us: the old schema has its new name.
        db.superuser().exec(&format!(
            "create schema nightowls_v1 authorization {owner};
             create table nightowls_v1.mastra_resources (id text primary key, \"workingMemory\" text, \"createdAt\" timestamp not null, \"updatedAt\" timestamp not null);
             insert into nightowls_v1.mastra_resources values ('r', '# Notes', now(), now());
             alter table nightowls_v1.mastra_resources owner to {owner}"
        ));
        let role = Role {
            name: format!("{}_acme", db.name()),
            db: db.name().to_owned(),
        };
        let blocks: Vec<_> = include_str!("../docs/mastra.md")
            .split("```sql\n")
            .skip(1)
            .filter_map(|rest| Some(rest.split_once("```")?.0.replace("acme_app", &role.name)))
            .collect();
        assert_eq!(blocks.len(), 4);
        for block in &blocks {
            if block.contains("create extension vector") && !db.cluster().offers("vector")
                || block.contains("alter schema nightowls rename")
            {
                continue;
            }
            // Roles and pgvector are the superuser's to make; the rest is the owner's.
            let (first, rest) = block.split_once(';').expect("a statement");
            if first.contains("create role") || first.contains("create extension") {
                db.superuser().exec(first);
                db.owner().exec(rest);
            } else {
                db.owner().exec(block);
            }
        }
        assert_eq!(
            text(
                &mut db.session(&role.name),
                "select \"workingMemory\" from nightowls.mastra_resources"
            ),
            "# Notes"
        );
    });
}
