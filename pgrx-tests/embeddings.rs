//! Embedding sources, claims and saves: through SQL, as a worker outside does it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::fixture::{default_org, is_blocked, lines, new_org, together};
use crate::projections::text;
use crate::support::{
    APP, Db, Install, Session, on_each_install, on_each_route, quote, skip, wait_until,
};

/// A table of documents with so many rows, and the source `docs` over it.
fn documents(db: &Db, rows: u32) -> String {
    let org = default_org(db);
    table(db, "docs", rows);
    source(db, "docs", "");
    org
}

pub fn table(db: &Db, name: &str, rows: u32) {
    db.direct(db.install().owner()).exec(&format!(
        "create table public.{name} (id bigint primary key, title text, body text, views int default 0, embedding real[], model text);
         insert into public.{name} (id, title, body) select n, 'title ' || n, 'body ' || n from generate_series(1, {rows}) n"
    ));
}

/// A source of that name over a table of that name; `more` begins with a comma.
pub fn source(db: &Db, name: &str, more: &str) {
    source_with(db, name, "null", more);
}

/// As [`source`], with an endpoint, as an SQL literal.
pub fn source_with(db: &Db, name: &str, endpoint: &str, more: &str) {
    let create = create(name, more).replacen("null, 'small'", &format!("{endpoint}, 'small'"), 1);
    db.direct(db.install().owner()).exec(&create);
}

fn create(name: &str, more: &str) -> String {
    format!(
        "select nightowls.create_embedding_source('{name}', 'public.{name}', 'id', $x$title || ': ' || coalesce(body, '')$x$, 'embedding', \
         null, 'small', 3{more})"
    )
}

/// What stands in for a model: three numbers of a text.
fn vector_of(input: &str) -> String {
    let sum: u32 = input.bytes().map(u32::from).sum();
    format!("'{{{},{},1}}'", input.len(), sum % 1000)
}

#[derive(Debug)]
struct Claimed {
    key: String,
    claim: String,
    input: String,
}

fn claim(session: &mut Session, source: &str, qty: u32, lease: &str) -> Vec<Claimed> {
    session
        .rows(&format!(
            "select key, claim, input from nightowls.claim_embeddings('{source}', {qty}, '{lease}')"
        ))
        .into_iter()
        .map(|row| {
            let mut row = row.into_iter().map(|column| column.expect("not null"));
            Claimed {
                key: row.next().unwrap(),
                claim: row.next().unwrap(),
                input: row.next().unwrap(),
            }
        })
        .collect()
}

fn save(session: &mut Session, source: &str, claimed: &Claimed) -> bool {
    text(
        session,
        &format!(
            "select nightowls.save_embedding('{source}', {}, '{}', {})",
            quote(&claimed.key),
            claimed.claim,
            vector_of(&claimed.input)
        ),
    ) == "t"
}

/// Claims and saves until there is nothing left; how many were saved.
pub fn drain(session: &mut Session, source: &str) -> usize {
    let mut saved = 0;
    loop {
        let claimed = claim(session, source, 50, "1 minute");
        if claimed.is_empty() {
            return saved;
        }
        for one in &claimed {
            saved += usize::from(save(session, source, one));
        }
    }
}

fn pending(session: &mut Session) -> String {
    text(session, "select count(*) from nightowls._embedding_pending")
}

#[test]
fn rows_that_were_there_and_rows_that_come_are_claimed_once_and_saved() {
    on_each_route(|db| {
        documents(db, 120);
        let mut service = db.service();
        let mut owner = db.owner();
        owner.exec("insert into public.docs (id, title) values (500, 'late')");
        owner.exec(
            "insert into public.docs (id, title, embedding) values (501, 'has one', '{1,2,3}')",
        );
        // Nothing to embed, and so never pending.
        owner.exec("insert into public.docs (id, title) values (502, null)");

        let mut seen = BTreeSet::new();
        loop {
            let claimed = claim(&mut service, "docs", 50, "1 minute");
            if claimed.is_empty() {
                break;
            }
            for one in claimed {
                assert!(seen.insert(one.key.clone()), "{} came twice", one.key);
                assert!(save(&mut service, "docs", &one));
                assert!(!save(&mut service, "docs", &one), "the claim is used up");
            }
        }
        assert_eq!(seen.len(), 121);
        assert_eq!(
            lines(
                &mut owner,
                "select id, embedding from public.docs where id in (1, 500, 501, 502) order by id"
            ),
            ["1 {15,228,1}", "500 {6,512,1}", "501 {1,2,3}", "502 null"]
        );
        assert_eq!(pending(&mut owner), "0");
    });
}

#[test]
fn a_change_of_the_text_nulls_the_target_and_no_other_change_does() {
    on_each_install(|db| {
        documents(db, 3);
        let mut owner = db.owner();
        let mut service = db.service();
        assert_eq!(drain(&mut service, "docs"), 3);

        owner.exec("update public.docs set views = views + 1");
        owner.exec("update public.docs set title = title, body = body");
        assert_eq!(drain(&mut service, "docs"), 0);
        assert_eq!(
            text(&mut owner, "select count(embedding) from public.docs"),
            "3"
        );

        owner.exec("update public.docs set body = 'new' where id = 1");
        owner.exec("update public.docs set embedding = null where id = 2");
        assert_eq!(
            lines(
                &mut owner,
                "select id from public.docs where embedding is null order by 1"
            ),
            ["1", "2"]
        );
        // While it is pending, another column does not make it pending again.
        owner.exec("update public.docs set views = 7");
        assert_eq!(pending(&mut owner), "2");
        owner.exec(
            "update public.docs set id = 40 where id = 1; delete from public.docs where id = 2",
        );
        let claimed = claim(&mut service, "docs", 50, "1 minute");
        assert_eq!(
            claimed
                .iter()
                .map(|one| (one.key.as_str(), one.input.as_str()))
                .collect::<Vec<_>>(),
            [("40", "title 1: new")]
        );
        assert!(save(&mut service, "docs", &claimed[0]));
        assert_eq!(pending(&mut owner), "0");
    });
}

#[test]
fn what_changed_between_claim_and_save_is_not_saved_but_claimed_again() {
    on_each_route(|db| {
        documents(db, 4);
        let mut owner = db.owner();
        let mut service = db.service();
        let claimed = claim(&mut service, "docs", 4, "1 minute");
        owner.exec("update public.docs set body = 'other' where id = 1");
        owner.exec("update public.docs set embedding = '{9,9,9}' where id = 2");
        owner.exec("delete from public.docs where id = 3");
        // There and back: the text is as it was claimed.
        owner.exec("update public.docs set body = 'x' where id = 4; update public.docs set body = 'body 4' where id = 4");
        let by_key: BTreeMap<_, _> = claimed.iter().map(|one| (one.key.as_str(), one)).collect();
        assert!(!save(&mut service, "docs", by_key["1"]));
        assert!(!save(&mut service, "docs", by_key["2"]));
        assert!(!save(&mut service, "docs", by_key["3"]));
        assert!(save(&mut service, "docs", by_key["4"]));
        assert_eq!(
            text(&mut owner, "select embedding from public.docs where id = 2"),
            "{9,9,9}"
        );

        let again = claim(&mut service, "docs", 50, "1 minute");
        assert_eq!(
            again
                .iter()
                .map(|one| one.input.as_str())
                .collect::<Vec<_>>(),
            ["title 1: other"]
        );
        assert!(!save(&mut service, "docs", by_key["1"]), "the old claim");
        assert!(save(&mut service, "docs", &again[0]));
        assert_eq!(drain(&mut service, "docs"), 0);
        assert_eq!(pending(&mut owner), "0");
    });
}

#[test]
fn a_claim_that_ran_out_saves_nothing_and_the_row_goes_to_the_next() {
    on_each_install(|db| {
        documents(db, 1);
        let mut service = db.service();
        let lost = claim(&mut service, "docs", 1, "1 millisecond");
        wait_until("the lease ends", Duration::from_secs(5), || {
            text(
                &mut service,
                "select due_at < clock_timestamp() from nightowls._embedding_pending",
            ) == "t"
        });
        assert!(
            !save(&mut service, "docs", &lost[0]),
            "late, though nobody has it yet"
        );
        let next = claim(&mut service, "docs", 1, "1 minute");
        assert_eq!(next[0].key, lost[0].key);
        assert!(!save(&mut service, "docs", &lost[0]));
        assert!(save(&mut service, "docs", &next[0]));
    });
}

#[test]
fn a_row_whose_claims_lead_to_nothing_is_given_up_and_comes_back_when_asked_for() {
    on_each_install(|db| {
        default_org(db);
        table(db, "docs", 1);
        source(db, "docs", ", max_attempts => 2");
        let mut service = db.service();
        for _ in 0..2 {
            wait_until("it can be claimed", Duration::from_secs(5), || {
                !claim(&mut service, "docs", 1, "1 millisecond").is_empty()
            });
        }
        wait_until("it is given up", Duration::from_secs(5), || {
            claim(&mut service, "docs", 1, "1 minute").is_empty()
                && text(
                    &mut service,
                    "select count(*) from nightowls.failed_embeddings",
                ) == "1"
        });
        assert_eq!(
            lines(
                &mut service,
                "select source, key, attempts, error from nightowls.failed_embeddings"
            ),
            ["docs 1 2 claimed, and nothing came back within the lease"]
        );
        assert_eq!(
            lines(
                &mut service,
                "select name, pending, given_up from nightowls.list_embedding_sources()"
            ),
            ["docs 0 1"]
        );
        assert_eq!(
            text(&mut service, "select nightowls.retry_embeddings('docs')"),
            "1"
        );
        assert_eq!(drain(&mut service, "docs"), 1);
    });
}

#[test]
fn twenty_workers_at_once_share_the_rows_and_each_row_has_one_vector() {
    on_each_install(|db| {
        documents(db, 400);
        db.direct(db.install().owner()).exec(
            "create table public.saves (id bigint);
             create function public.note_save() returns trigger language plpgsql as $$
             begin insert into public.saves values (new.id); return null; end $$;
             create trigger note_save after update on public.docs for each row when (new.embedding is not null) execute function public.note_save()",
        );
        let saved = together(
            20,
            |_| db.service(),
            |_, mut session| {
                let mut saved = 0;
                loop {
                    let claimed = claim(&mut session, "docs", 7, "1 minute");
                    for one in &claimed {
                        saved += usize::from(save(&mut session, "docs", one));
                    }
                    if claimed.is_empty() && pending(&mut session) == "0" {
                        return saved;
                    }
                }
            },
        );
        assert_eq!(saved.iter().sum::<usize>(), 400);
        let mut owner = db.owner();
        assert_eq!(
            text(
                &mut owner,
                "select count(*) || ' ' || count(distinct id) from public.saves"
            ),
            "400 400"
        );
        assert_eq!(pending(&mut owner), "0");
    });
}

#[test]
fn a_writer_waits_for_no_claim_and_a_claim_for_no_writer() {
    on_each_install(|db| {
        documents(db, 2);
        let (mut writer, mut worker, mut watcher) = (db.owner(), db.service(), db.superuser());
        worker.exec("begin");
        let claimed = claim(&mut worker, "docs", 2, "1 minute");
        assert_eq!(claimed.len(), 2);
        // The claim is open; the writer writes to a claimed row all the same.
        writer.exec("update public.docs set body = 'meanwhile' where id = 1");
        worker.exec("commit");
        assert!(!save(&mut worker, "docs", &claimed[0]));

        // And a save waits for the row's writer, then looks at the text anew.
        writer.exec("begin; update public.docs set body = 'meanwhile' where id = 2");
        let mut late = db.service();
        let pid = late.pid();
        std::thread::scope(|scope| {
            let second = &claimed[1];
            let saving = scope.spawn(move || save(&mut late, "docs", second));
            wait_until("the save waits", Duration::from_secs(10), || {
                is_blocked(&mut watcher, pid)
            });
            writer.exec("commit");
            assert!(!saving.join().unwrap());
        });
        assert_eq!(drain(&mut worker, "docs"), 2);
    });
}

#[test]
fn vectors_are_padded_and_what_is_no_vector_is_refused() {
    on_each_install(|db| {
        documents(db, 1);
        let mut service = db.service();
        let one = &claim(&mut service, "docs", 1, "1 minute")[0];
        let call = |vector: &str| {
            format!(
                "select nightowls.save_embedding('docs', '1', '{}', {vector})",
                one.claim
            )
        };
        for (vector, code) in [
            ("null", "22004"),
            ("'{}'", "22023"),
            ("'{1,2,3,4}'", "22023"),
            ("'{1,null}'", "22004"),
            ("'{1,NaN}'", "22023"),
            ("'{1,Infinity}'", "22023"),
            ("'{{1},{2}}'", "22023"),
        ] {
            assert_eq!(service.refused(&call(vector)).code, code, "{vector}");
        }
        assert_eq!(text(&mut service, &call("'{0.5,-2}'")), "t");
        assert_eq!(
            text(&mut db.owner(), "select embedding from public.docs"),
            "{0.5,-2,0}"
        );
    });
}

#[test]
fn an_expression_that_is_not_one_text_of_one_row_is_refused() {
    on_each_install(|db| {
        default_org(db);
        table(db, "docs", 1);
        let mut owner = db.owner();
        owner.exec(
            "create function public.dice() returns text language sql volatile as $$ select random()::text $$;
             create function public.rows_of(text) returns setof text language sql immutable as $$ values ($1) $$;
             create table public.victim (id int)",
        );
        for (expression, code) in [
            ("title || random()", "22023"),
            ("title || public.dice()", "22023"),
            ("title || now()", "22023"),
            ("title || current_user", "22023"),
            ("title || current_date", "22023"),
            ("title || (select count(*) from pg_authid)", "22023"),
            ("string_agg(title, '')", "22023"),
            ("row_number() over () || title", "22023"),
            ("public.rows_of(title)", "22023"),
            ("docs::text", "22023"),
            ("to_jsonb(docs)", "22023"),
            ("to_jsonb(docs.*)", "22023"),
            ("ctid::text || title", "22023"),
            ("embedding::text", "22023"),
            ("'always the same'", "22023"),
            ("title, body", "42601"),
            ("title || nowhere", "42703"),
            ("no_function(title)", "42883"),
            (
                "title) from public.docs; drop table public.victim; select (title",
                "42601",
            ),
            ("'a']; drop table public.victim; select array['b'", "42601"),
            (
                "'a' as text) from public.docs; drop table public.victim; select cast('b'",
                "42601",
            ),
            (
                "title as text) from public.docs; drop table public.victim; select cast(title",
                "42601",
            ),
            ("title from public.docs where (true", "42601"),
            ("title /*", "42601"),
            ("title -- and so on", ""),
            ("'", "42601"),
            ("$1", "42P02"),
            ("", "42601"),
        ] {
            let sql = format!(
                "select nightowls.create_embedding_source('docs', 'public.docs', 'id', {}, 'embedding', null, 'small', 3)",
                quote(expression)
            );
            match owner.try_exec(&sql) {
                Ok(()) => {
                    assert_eq!(code, "", "{expression} was let through");
                    owner.exec("select nightowls.drop_embedding_source('docs')");
                }
                Err(refusal) => assert_eq!(refusal.code, code, "{expression}: {refusal}"),
            }
        }
        owner.exec("select from public.victim");
        assert_eq!(
            text(
                &mut owner,
                "select count(*) from pg_trigger where tgrelid = 'public.docs'::regclass"
            ),
            "0"
        );
        assert_eq!(
            text(
                &mut owner,
                "select count(*) from pg_class where relname = '_input_check' and relnamespace = 'nightowls'::regnamespace"
            ),
            "0"
        );
    });
}

#[test]
fn tables_columns_and_numbers_that_do_not_fit_are_refused() {
    on_each_install(|db| {
        default_org(db);
        table(db, "docs", 0);
        let mut owner = db.owner();
        owner.exec(
            "create table public.others (id int, code int unique, day date primary key, title text, embedding real[] not null, generated real[] generated always as ('{1}') stored)",
        );
        let call =
            |arguments: &str| format!("select nightowls.create_embedding_source({arguments})");
        for (arguments, code) in [
            (
                "'d', 'public.nowhere', 'id', 'title', 'embedding', null, 'm', 3",
                "42P01",
            ),
            (
                "'d', 'nightowls.events', 'position', 'event_type', 'payload', null, 'm', 3",
                "42809",
            ),
            (
                "'d', 'pg_catalog.pg_views', 'viewname', 'definition', 'definition', null, 'm', 3",
                "42809",
            ),
            (
                "'d', 'public.docs', 'nokey', 'title', 'embedding', null, 'm', 3",
                "42703",
            ),
            (
                "'d', 'public.docs', 'id', 'title', 'nowhere', null, 'm', 3",
                "42703",
            ),
            (
                "'d', 'public.docs', 'id', 'title', 'body', null, 'm', 3",
                "42804",
            ),
            (
                "'d', 'public.docs', 'id', 'title', 'embedding', null, 'm', 3, model_column => 'views'",
                "42804",
            ),
            (
                "'d', 'public.others', 'id', 'title', 'embedding', null, 'm', 3",
                "22023",
            ),
            (
                "'d', 'public.others', 'day', 'title', 'embedding', null, 'm', 3",
                "42804",
            ),
            (
                "'d', 'public.others', 'code', 'title', 'embedding', null, 'm', 3",
                "22023",
            ),
            (
                "'d', 'public.others', 'code', 'title', 'generated', null, 'm', 3",
                "22023",
            ),
            (
                "'d', 'public.docs', 'id', 'title', 'embedding', null, 'm', 0",
                "22023",
            ),
            (
                "'d', 'public.docs', 'id', 'title', 'embedding', null, 'm', 3, max_chars => 0",
                "22023",
            ),
            (
                "'d', 'public.docs', 'id', 'title', 'embedding', null, 'm', 3, shape => 'other'",
                "22023",
            ),
            (
                "'d', 'public.docs', 'id', 'title', 'embedding', null, 'm', 3, chunk_chars => 10, overlap => 6",
                "22023",
            ),
            (
                "'d', 'public.docs', 'id', 'title', 'embedding', null, 'm', 3, max_chars => 200000, chunk_chars => 10",
                "54000",
            ),
            (
                "'d', 'public.docs', 'id', 'title', 'embedding', null, 'm', 3, options => '[]'",
                "22023",
            ),
            (
                "'d', 'public.docs', 'id', 'title', 'embedding', null, 'm', 3, options => '{\"input\": 1}'",
                "22023",
            ),
            (
                "null, 'public.docs', 'id', 'title', 'embedding', null, 'm', 3",
                "22004",
            ),
            (
                "'', 'public.docs', 'id', 'title', 'embedding', null, 'm', 3",
                "22023",
            ),
            (
                "repeat('x', 256), 'public.docs', 'id', 'title', 'embedding', null, 'm', 3",
                "54000",
            ),
            (
                "'d', 'public.docs', 'id', 'title', 'embedding', null, null, 3",
                "22004",
            ),
        ] {
            let refusal = owner.refused(&call(arguments));
            assert_eq!(refusal.code, code, "{arguments}: {refusal}");
        }
        assert_eq!(
            text(
                &mut owner,
                "select count(*) from nightowls.embedding_sources"
            ),
            "0"
        );

        // The same again changes nothing, another definition is refused, and so is a second master of one column.
        owner.exec(&create("docs", ""));
        owner.exec(&create("docs", ""));
        let refusal = owner.refused(&create("docs", ", max_chars => 5"));
        assert_eq!(refusal.code, "42710");
        assert!(refusal.hint.contains("alter_embedding_source"));
        let refusal = owner.refused(&create("docs", "").replacen("'docs'", "'again'", 1));
        assert_eq!(refusal.code, "42710");
        // Nor may a service, and nothing is known of others' names.
        let mut service = db.service();
        assert_eq!(service.refused(&create("more", "")).code, "42501");
        let refusal = service.refused("select nightowls.claim_embeddings('dogs')");
        assert_eq!(
            (refusal.code.as_str(), refusal.hint.as_str()),
            ("NW007", "Did you mean \"docs\"?")
        );
        assert_eq!(
            service
                .refused("select nightowls.save_embedding('cats', '1', gen_random_uuid(), '{1}')")
                .code,
            "NW007"
        );
        assert_eq!(
            service
                .refused("select nightowls.claim_embeddings('docs', 0)")
                .code,
            "22023"
        );
        assert_eq!(
            service
                .refused("select nightowls.claim_embeddings('docs', null)")
                .code,
            "22004"
        );
        assert_eq!(
            service
                .refused("select nightowls.claim_embeddings('docs', 1, '0')")
                .code,
            "22023"
        );
        for call in [
            "alter_embedding_source('dogs')",
            "drop_embedding_source('dogs')",
        ] {
            assert_eq!(
                owner.refused(&format!("select nightowls.{call}")).code,
                "NW007"
            );
        }
        owner.exec("select nightowls.drop_embedding_source('docs')");
        assert_eq!(
            text(
                &mut owner,
                "select count(*) from pg_trigger where tgrelid = 'public.docs'::regclass"
            ),
            "0"
        );
    });
}

#[test]
fn a_source_of_a_table_with_org_id_takes_the_rows_of_its_own_org() {
    on_each_install(|db| {
        let org = default_org(db);
        let other = new_org(db, "other");
        let mut owner = db.owner();
        owner.exec(&format!(
            "create table public.docs (id int primary key, org_id uuid not null, title text, body text, embedding real[]);
             insert into public.docs select n, case when n % 2 = 0 then '{org}'::uuid else '{other}' end, 't' || n from generate_series(1, 6) n"
        ));
        source(db, "docs", "");
        source(db, "docs", &format!(", org => '{other}'"));
        owner.exec(&format!(
            "insert into public.docs values (7, '{other}', 't7'), (8, '{org}', 't8'); update public.docs set org_id = '{org}' where id = 1"
        ));
        let mut service = db.service();
        let keys = |claimed: Vec<Claimed>| {
            claimed
                .into_iter()
                .map(|one| one.key)
                .collect::<BTreeSet<_>>()
        };
        let mine = keys(claim(&mut service, "docs", 50, "1 minute"));
        assert_eq!(mine, ["1", "2", "4", "6", "8"].map(str::to_owned).into());
        let theirs = lines(
            &mut service,
            &format!(
                "select org_id = '{other}', key from nightowls.claim_embeddings(org => '{other}') order by 2"
            ),
        );
        assert_eq!(theirs, ["t 3", "t 5", "t 7"]);
        // A claim for any source serves all orgs.
        owner.exec(&format!("update public.docs set title = 'new'; insert into public.docs values (9, '{org}', 't9')"));
        assert_eq!(
            lines(
                &mut service,
                "select count(distinct org_id), count(*) from nightowls.claim_embeddings()"
            ),
            ["2 9"]
        );
    });
}

#[test]
fn generated_columns_and_types_without_equality_count_as_text_too() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        owner.exec(
            "create table public.docs (id uuid primary key default gen_random_uuid(), title text, body text, extra json,
                                       shout text generated always as (upper(title)) stored, embedding double precision[], made_by text);
             insert into public.docs (title, extra) values ('a', '{\"n\": 1}');
             select nightowls.create_embedding_source('docs', 'public.docs', 'id', $$shout || (extra ->> 'n')$$, 'embedding', null, 'small', 3, model_column => 'made_by')",
        );
        assert_eq!(
            text(
                &mut owner,
                "select input_columns from nightowls.embedding_sources"
            ),
            "{extra,title}"
        );
        let mut service = db.service();
        assert_eq!(drain(&mut service, "docs"), 1);
        assert_eq!(text(&mut owner, "select made_by from public.docs"), "small");
        for change in ["title = 'b'", "extra = '{\"n\": 2}'"] {
            owner.exec(&format!("update public.docs set {change}"));
            assert_eq!(
                text(&mut owner, "select embedding from public.docs"),
                "null",
                "{change}"
            );
            assert_eq!(drain(&mut service, "docs"), 1, "{change}");
        }
        owner.exec("update public.docs set body = 'z', extra = extra");
        assert_eq!(drain(&mut service, "docs"), 0);
    });
}

#[test]
fn one_row_whose_expression_fails_stops_no_other() {
    on_each_install(|db| {
        default_org(db);
        table(db, "docs", 5);
        let mut owner = db.owner();
        owner.exec(
            "update public.docs set views = 1; update public.docs set views = 0 where id = 3",
        );
        owner.exec(
            "select nightowls.create_embedding_source('docs', 'public.docs', 'id', '(100 / views)::text || title', 'embedding', null, 'm', 3, max_attempts => 1)",
        );
        let mut service = db.service();
        assert_eq!(drain(&mut service, "docs"), 4);
        assert_eq!(
            lines(
                &mut service,
                "select key, error from nightowls.failed_embeddings"
            ),
            ["3 division by zero"]
        );
        owner.exec("update public.docs set views = 4 where id = 3");
        assert_eq!(drain(&mut service, "docs"), 1);
        assert_eq!(
            pending(&mut owner),
            "0",
            "with the new text the old failure is gone"
        );
    });
}

#[test]
fn the_code_of_a_tables_owner_runs_with_no_more_than_its_rights() {
    on_each_install(|db| {
        let org = default_org(db);
        let mut app = db.session(APP);
        app.exec(
            "create table public.docs (id int primary key, title text, body text, embedding real[]);
             create table public.seen (who text, restricted boolean);
             create function public.peek(title text) returns text language plpgsql stable as $$
             begin return title || ' as ' || current_user; end $$;
             create function public.spy() returns trigger language plpgsql as $$
             begin
               insert into public.seen values (current_user, false);
               perform set_config('search_path', 'public', false);
               begin execute 'set role postgres'; update public.seen set restricted = true; exception when others then null; end;
               return new;
             end $$;
             create trigger spy before update on public.docs for each row execute function public.spy();
             insert into public.docs values (1, 'x')",
        );
        let mut owner = db.owner();
        let create = "select nightowls.create_embedding_source('docs', 'public.docs', 'id', 'public.peek(title)', 'embedding', null, 'm', 3)";
        if db.install() == Install::Plain {
            // Where PL/pgSQL cannot take rights away, such a table is refused.
            let refusal = owner.refused(create);
            assert_eq!(refusal.code, "42501");
            assert!(!refusal.hint.is_empty());
            return;
        }
        owner.exec(create);
        let mut service = db.service();
        let claimed = claim(&mut service, "docs", 1, "1 minute");
        assert_eq!(claimed[0].input, format!("x as {APP}"));
        service.exec("begin");
        assert!(save(&mut service, "docs", &claimed[0]));
        assert_eq!(text(&mut service, "show search_path"), "\"$user\", public");
        service.exec("commit");
        assert_eq!(
            lines(&mut owner, "select who, restricted from public.seen"),
            [format!("{APP} f")]
        );
        // Nor can a service have anything else run as somebody.
        for call in [
            "nightowls._run_as_owner('public.docs', 'select 1::text', '{}')".to_owned(),
            format!(
                "nightowls._read_inputs((select s from nightowls.embedding_sources s where s.org_id = '{org}'), '{{1}}')"
            ),
            format!(
                "nightowls._scan_embeddings((select s from nightowls.embedding_sources s where s.org_id = '{org}'), 1)"
            ),
        ] {
            assert_eq!(
                service.refused(&format!("select {call}")).code,
                "42501",
                "{call}"
            );
        }
        // A table's owner can make no trigger of ours.
        assert_eq!(
            app.refused("create trigger mine after insert on public.docs for each row execute function nightowls._note_embedding('x')").code,
            "42501"
        );
        // And cannot give the key a type of its own while we look at it.
        app.exec("create domain public.own as int");
        assert_eq!(
            app.refused("alter table public.docs alter id type public.own")
                .code,
            "0A000"
        );
    });
}

#[test]
fn texts_in_chunks_have_a_vector_each_and_the_row_their_mean() {
    on_each_install(|db| {
        default_org(db);
        table(db, "docs", 0);
        source(
            db,
            "docs",
            ", chunk_chars => 10, overlap => 4, max_chars => 100",
        );
        let mut owner = db.owner();
        let mut service = db.service();
        owner.exec("insert into public.docs (id, title, body) values (1, 'abc', 'defghijklmnopq'), (2, 's', 'hort')");
        let rows = lines(
            &mut service,
            "select key, chunks, claim from nightowls.claim_embeddings('docs') order by key",
        );
        let claims: Vec<_> = rows
            .iter()
            .map(|row| row.rsplit_once(' ').unwrap())
            .collect();
        assert_eq!(claims[0].0, r#"1 {"abc: defgh",efghijklmn,klmnopq}"#);
        assert_eq!(claims[1].0, r#"2 {"s: hort"}"#);
        let call = |key: &str, claim: &str, vector: &str| {
            format!("select nightowls.save_embedding('docs', '{key}', '{claim}', {vector})")
        };
        for wrong in [
            "'{1,2,3}'",
            "'{{1,2,3},{1,2,3}}'",
            "'{{1,2,3,4},{1,2,3,4},{1,2,3,4}}'",
        ] {
            assert_eq!(
                service.refused(&call("1", claims[0].1, wrong)).code,
                "22023",
                "{wrong}"
            );
        }
        assert_eq!(
            text(
                &mut service,
                &call("1", claims[0].1, "'{{3,0},{0,3},{0,1}}'")
            ),
            "t"
        );
        assert_eq!(
            text(&mut service, &call("2", claims[1].1, "'{{0,2}}'")),
            "t"
        );
        assert_eq!(
            lines(
                &mut owner,
                "select id, embedding from public.docs order by id"
            ),
            ["1 {0.6,0.8,0}", "2 {0,1,0}"]
        );
        assert_eq!(
            lines(
                &mut service,
                "select key, chunk, content, embedding, model from nightowls.embedding_chunks order by key, chunk"
            ),
            [
                "1 0 abc: defgh {3,0,0} small",
                "1 1 efghijklmn {0,3,0} small",
                "1 2 klmnopq {0,1,0} small",
                "2 0 s: hort {0,2,0} small",
            ]
        );
        owner.exec(
            "update public.docs set views = 2; update public.docs set body = 'x' where id = 1",
        );
        let left = "select string_agg(distinct key, ',') from nightowls.embedding_chunks";
        assert_eq!(text(&mut service, left), "2");
        owner.exec("delete from public.docs where id = 2");
        assert_eq!(text(&mut service, left), "null");
        drain_chunks(&mut service);
        assert_eq!(text(&mut service, left), "1");
        owner.exec("truncate public.docs");
        assert_eq!(text(&mut service, left), "null");
    });
}

fn drain_chunks(session: &mut Session) {
    session.exec(
        "select nightowls.save_embedding('docs', c.key, c.claim, array(select array[1, 2, 3]::real[] from unnest(c.chunks)))
           from nightowls.claim_embeddings('docs') c",
    );
}

#[test]
fn a_source_that_is_altered_embeds_every_row_anew_and_one_that_is_dropped_none() {
    on_each_install(|db| {
        documents(db, 30);
        let mut owner = db.owner();
        let mut service = db.service();
        drain(&mut service, "docs");
        assert_eq!(
            text(
                &mut owner,
                "select nightowls.alter_embedding_source('docs', batch_size => 7)"
            ),
            "t"
        );
        assert_eq!(
            text(
                &mut owner,
                "select nightowls.alter_embedding_source('docs', batch_size => 7)"
            ),
            "f"
        );
        assert_eq!(drain(&mut service, "docs"), 0);

        owner.exec("update public.docs set body = 'claimed before' where id = 1");
        let before = claim(&mut service, "docs", 1, "1 minute");
        owner.exec("select nightowls.alter_embedding_source('docs', model => 'large', input_expression => 'title')");
        assert!(!save(&mut service, "docs", &before[0]), "of the old model");
        assert_eq!(drain(&mut service, "docs"), 30);
        assert_eq!(
            text(&mut owner, "select embedding from public.docs where id = 2"),
            "{7,628,1}"
        );
        // The body is no part of the text any more.
        owner.exec("update public.docs set body = 'y'");
        assert_eq!(drain(&mut service, "docs"), 0);

        owner.exec("select nightowls.alter_embedding_source('docs', paused => true); update public.docs set title = 'z' where id = 1");
        assert_eq!(drain(&mut service, "docs"), 0);
        owner.exec("select nightowls.alter_embedding_source('docs', paused => false)");
        assert_eq!(drain(&mut service, "docs"), 1);

        // What no trigger saw is found by a pass.
        db.superuser().exec("set session_replication_role = replica; update public.docs set embedding = null where id < 4");
        assert_eq!(drain(&mut service, "docs"), 0);
        service.exec("select nightowls.rescan_embeddings('docs')");
        assert_eq!(drain(&mut service, "docs"), 3);
        service.exec("select nightowls.rescan_embeddings('docs', all_rows => true)");
        assert_eq!(drain(&mut service, "docs"), 30);

        owner.exec(
            "select nightowls.drop_embedding_source('docs'); update public.docs set title = 'free'",
        );
        assert_eq!(
            text(&mut owner, "select count(embedding) from public.docs"),
            "30"
        );
        assert_eq!(pending(&mut owner), "0");
    });
}

#[test]
fn a_table_whose_own_triggers_change_the_text_at_each_save_is_given_up() {
    on_each_install(|db| {
        default_org(db);
        table(db, "docs", 1);
        let mut owner = db.owner();
        owner.exec(
            "create function public.touch() returns trigger language plpgsql as $$ begin new.views := new.views + 1; return new; end $$;
             create trigger touch before update on public.docs for each row execute function public.touch();
             select nightowls.create_embedding_source('docs', 'public.docs', 'id', 'title || views', 'embedding', null, 'm', 3, max_attempts => 1)",
        );
        let mut service = db.service();
        let claimed = claim(&mut service, "docs", 1, "1 minute");
        assert!(!save(&mut service, "docs", &claimed[0]));
        assert_eq!(
            text(&mut owner, "select embedding from public.docs"),
            "null"
        );
        assert_eq!(
            text(
                &mut service,
                "select error from nightowls.failed_embeddings"
            ),
            "the table's own triggers change the text or the target when it is saved"
        );
        assert_eq!(pending(&mut owner), "1", "it does not go round in circles");
    });
}

#[test]
fn vectors_go_into_columns_of_pgvector() {
    on_each_install(|db| {
        if !db.cluster().offers("vector") {
            skip("pgvector");
            return;
        }
        default_org(db);
        db.superuser().exec("create schema extensions; grant usage on schema extensions to public; create extension vector schema extensions");
        let mut owner = db.owner();
        owner.exec(
            "create table public.docs (id text primary key, title text, body text, embedding extensions.vector(3));
             insert into public.docs values ('a''b', 'x')",
        );
        assert_eq!(
            owner
                .refused(&create("docs", "").replace(", 3)", ", 4)"))
                .code,
            "22023"
        );
        source(db, "docs", "");
        let mut service = db.service();
        assert_eq!(drain(&mut service, "docs"), 1);
        assert_eq!(
            text(&mut owner, "select embedding from public.docs"),
            "[3,210,1]"
        );
        owner.exec("update public.docs set title = 'y'");
        assert_eq!(
            text(&mut owner, "select embedding from public.docs"),
            "null"
        );
    });
}

#[test]
fn slice_utf16_cuts_as_javascript_does_on_both_installs() {
    let texts = [
        "",
        "a",
        "owl",
        "a🦉b🦉",
        "🦉🦉",
        "é\u{301}🦉\u{1}\u{1}z",
        "\u{1}🦉\u{1}",
        "日本🦉語",
    ];
    on_each_install(|db| {
        let mut service = db.service();
        for content in texts {
            let units: Vec<u16> = content.encode_utf16().collect();
            let length = i64::try_from(units.len()).unwrap();
            for start in -length - 1..=length + 1 {
                for stop in -length - 1..=length + 1 {
                    let place = |n: i64| {
                        if n < 0 {
                            (length + n).max(0)
                        } else {
                            n.min(length)
                        }
                    };
                    let (from, to) = (place(start) as usize, place(stop) as usize);
                    let expected = if from < to {
                        // As JavaScript cuts, less the halves.
                        char::decode_utf16(units[from..to].iter().copied())
                            .filter_map(Result::ok)
                            .collect::<String>()
                    } else {
                        String::new()
                    };
                    let got = text(
                        &mut service,
                        &format!(
                            "select nightowls.slice_utf16({}, {start}, {stop})",
                            quote(content)
                        ),
                    );
                    assert_eq!(got, expected, "{content:?} {start} {stop}");
                }
            }
        }
        assert_eq!(
            text(&mut service, "select nightowls.slice_utf16(null)"),
            "null"
        );
        assert_eq!(
            text(
                &mut service,
                "select nightowls.slice_utf16('owl', null, null)"
            ),
            "owl"
        );
        assert_eq!(
            text(
                &mut service,
                "select length(nightowls.slice_utf16(repeat('🦉x', 100000), 1, 150000))"
            ),
            "99999"
        );
    });
}
