//! Tables of vectors: as Mastra's PgVector expects them, with its own client, and walled.

use crate::fixture::{default_org, lines, new_org};
use crate::mastra::{Role, forbid_ddl, mastra, node};
use crate::projections::text;
use crate::support::{Db, on_each_install, on_each_route, skip};

/// With pgvector where the client need not set a path for it.
fn with_vector(db: &Db) -> bool {
    if !db.cluster().offers("vector") {
        skip("pgvector");
        return false;
    }
    db.superuser().exec("create extension vector schema public");
    true
}

#[test]
fn without_pgvector_it_says_so_and_makes_nothing() {
    on_each_install(|db| {
        default_org(db);
        let refusal = db
            .owner()
            .refused("select nightowls.create_vector_index('docs', 3)");
        assert_eq!(refusal.code, "0A000", "{refusal}");
        assert!(refusal.to_string().contains("create extension vector"));
        assert_eq!(
            lines(
                &mut db.superuser(),
                "select * from nightowls.vector_indexes"
            ),
            [""; 0]
        );
    });
}

#[test]
fn mastras_client_works_on_it_without_ddl() {
    let Some(tools) = mastra() else { return };
    on_each_route(|db| {
        let org = default_org(db);
        if !with_vector(db) {
            return;
        }
        let role = Role::new(db, "app", &org);
        db.owner()
            .exec("select nightowls.create_vector_index('docs', 3), nightowls.create_vector_index('flat', 2001, 'euclidean')");
        forbid_ddl(db);
        assert_eq!(
            node(tools, &["vectors.mjs", "docs"], &db.url(&role.name)),
            r#"listIndexes: ["docs","flat"]
createIndex: null
describeIndex: {"dimension":3,"metric":"cosine","type":"hnsw","vectorType":"vector","config":{"m":8,"efConstruction":32},"count":0}
upsert: ["x","y","z"]
upsert again: ["y"]
query: [["x",1,{"n":1,"kind":"axis"}],["y",0.707,{"n":22,"kind":"axis"}]]
query with a filter: [["y",0.707,{"n":22,"kind":"axis"}]]
query by filter alone: [{"id":"z","score":0,"metadata":{"kind":"other","thread_id":"t1"},"vector":[0,0,1]}]
updateVector: null
upsert in a namespace: ["x"]
query in it: [["x",1,{}]]
deleteVector: null
deleteVectors: null
describeIndex after: {"dimension":3,"metric":"cosine","type":"hnsw","vectorType":"vector","config":{"m":8,"efConstruction":32},"count":2}
upsert of other dimensions: refused: MASTRA_VECTOR_PG_UPSERT_INVALID_INPUT
"#
        );
        // What memory remembers of a thread goes with it.
        db.service()
            .exec("select nightowls.erase('thread', 't1', 'asked')");
        assert_eq!(
            lines(
                &mut db.superuser(),
                "select vector_id, namespace from nightowls.docs"
            ),
            ["x two"]
        );
    });
}

#[test]
fn an_index_is_one_orgs() {
    on_each_install(|db| {
        let (org, other) = (default_org(db), new_org(db, "other"));
        if !with_vector(db) {
            return;
        }
        let early = Role::new(db, "early", &other);
        let mut owner = db.owner();
        owner.exec(&format!(
            "select nightowls.create_vector_index('ours', 3), nightowls.create_vector_index('theirs', 3, org => '{other}')"
        ));
        let late = Role::new(db, "late", &org);
        let insert = |table: &str| {
            format!("insert into nightowls.{table} (vector_id, embedding) values ('a', '[1,2,3]')")
        };
        for (role, own, foreign) in [(&early, "theirs", "ours"), (&late, "ours", "theirs")] {
            let mut session = db.session(&role.name);
            session.exec(&insert(own));
            assert_eq!(
                session
                    .refused(&format!("select * from nightowls.{foreign}"))
                    .code,
                "42501"
            );
            assert_eq!(session.refused(&insert(foreign)).code, "42501");
            assert_eq!(
                session.refused(&format!("drop table nightowls.{own}")).code,
                "42501"
            );
        }
        // A service is for one org at a time here too.
        let mut service = db.service();
        assert_eq!(
            text(&mut service, "select count(*) from nightowls.theirs"),
            "0"
        );
        assert_eq!(service.refused(&insert("theirs")).code, "42501");
        service.exec(&format!(
            "begin; select set_config('nightowls.org_id', '{other}', true); update nightowls.theirs set metadata = '{{}}'; commit"
        ));
        let fault = db.superuser().refused(&format!(
            "insert into nightowls.theirs (vector_id, org_id) values ('b', '{org}')"
        ));
        assert_eq!(fault.code, "23514");

        owner.exec("select nightowls.drop_vector_index('ours')");
        assert_eq!(
            owner
                .refused("select nightowls.drop_vector_index('theirs')")
                .code,
            "NW007"
        );
        owner.exec(&format!(
            "select nightowls.drop_vector_index('theirs', '{other}')"
        ));
        assert_eq!(
            lines(
                &mut owner,
                "select to_regclass('nightowls.ours'), to_regclass('nightowls.theirs'), (select count(*) from nightowls.vector_indexes)"
            ),
            ["null null 0"]
        );
    });
}

#[test]
fn names_and_definitions_that_will_not_do_are_refused() {
    on_each_install(|db| {
        default_org(db);
        let other = new_org(db, "other");
        if !with_vector(db) {
            return;
        }
        let mut owner = db.owner();
        let before = text(&mut owner, "select count(*) from pg_class");
        for (arguments, code) in [
            ("null, 3", "22004"),
            ("'a', null", "22004"),
            ("'a', 3, null", "22004"),
            ("'', 3", "22023"),
            ("'A', 3", "22023"),
            ("'_a', 3", "22023"),
            ("'a b', 3", "22023"),
            ("'a\"; drop table nightowls.events; --', 3", "22023"),
            ("E'a\\n', 3", "22023"),
            ("'ä', 3", "22023"),
            ("repeat('a', 41), 3", "54000"),
            ("'a', 0", "22023"),
            ("'a', 16001", "22023"),
            ("'a', 3, 'hamming'", "22023"),
            ("'a', 3, 'cosine''; select 1; --'", "22023"),
            ("'events', 3", "42710"),
            ("'append_result', 3", "42710"),
            ("'mastra_threads', 3", "42710"),
            ("'events_pkey', 3", "42710"),
            (
                "'a', 3, org => '00000000-0000-4000-8000-00000000dead'",
                "22023",
            ),
        ] {
            let refusal = owner.refused(&format!(
                "select nightowls.create_vector_index({arguments})"
            ));
            assert_eq!(refusal.code, code, "{arguments}: {refusal}");
        }
        assert_eq!(text(&mut owner, "select count(*) from pg_class"), before);
        owner.exec("select nightowls.create_vector_index(repeat('a', 40), 3), nightowls.create_vector_index(repeat('a', 40), 3, 'cosine')");
        for arguments in ["4", "3, 'euclidean'", &format!("3, org => '{other}'")] {
            assert_eq!(
                owner
                    .refused(&format!(
                        "select nightowls.create_vector_index(repeat('a', 40), {arguments})"
                    ))
                    .code,
                "42710",
                "{arguments}"
            );
        }
        assert_eq!(
            db.service()
                .refused("select nightowls.create_vector_index('b', 3)")
                .code,
            "42501"
        );
        assert_eq!(
            owner
                .refused("select nightowls.drop_vector_index(null)")
                .code,
            "22004"
        );
    });
}
