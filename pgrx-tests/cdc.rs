//! Change data capture: the log as a publication, read from real slots, and changes
//! of users' tables as events.

use std::time::Duration;

use crate::dump::by_psql_as;
use crate::fixture::{default_org, lines, new_org};
use crate::projections::{assert_examples, text};
use crate::support::{
    APP, Cluster, Db, Install, OWNER, SERVICE, STRANGER, SUPERUSER, Session, on_each_install,
    on_install, own_cluster, own_cluster_with, quote, server, skip, wait_until,
};

/// Appends by every way there is: one, batches, several aggregates, plain inserts,
/// with a savepoint and a transaction that are rolled back in between.
fn append_by_every_way(service: &mut Session) {
    service.exec(
        r#"select nightowls.append_event('order', 'o' || i % 5, 'counted', jsonb_build_object('i', i, 'text', 'é ''" 🦉')) from generate_series(1, 50) i"#,
    );
    service.exec(
        r#"select nightowls.append_events('order', 'batch', (select jsonb_agg(jsonb_build_object('event_type', 'counted', 'payload', jsonb_build_object('i', i))) from generate_series(1, 300) i));
           select nightowls.append_many((select jsonb_agg(jsonb_build_object('aggregate_type', 'order', 'aggregate_id', 'many' || i,
             'events', '[{"event_type": "a"}, {"event_type": "b", "metadata": {"actor_id": "ann"}}]'::jsonb)) from generate_series(1, 40) i))"#,
    );
    service.exec(
        r#"insert into nightowls.events (aggregate_type, aggregate_id, event_type, payload, event_id)
           select 'direct', 'd' || i % 3, 'noted', '{"deep": [1.10, null]}', gen_random_uuid() from generate_series(1, 30) i"#,
    );
    service.exec("begin; select nightowls.append_event('order', 'o1', 'gone'); rollback");
    service.exec(
        "begin; savepoint s; select nightowls.append_event('order', 'o1', 'gone'); rollback to s; select nightowls.append_event('order', 'o1', 'kept'); commit",
    );
}

const COLUMNS: &str = "org_id, position, aggregate_type, aggregate_id, version, event_type, payload::text, metadata::text, event_id";

/// Every event, its columns joined by a blank.
fn log(db: &Db) -> Vec<String> {
    lines(
        &mut db.superuser(),
        &format!("select {COLUMNS} from nightowls.events order by position"),
    )
}

/// The rows that pgoutput sends as inserts, and how many other changes it sends.
fn decode_pgoutput(messages: &[Vec<u8>]) -> (Vec<String>, usize) {
    let (mut inserted, mut other) = (Vec::new(), 0);
    for message in messages {
        match message[0] {
            b'I' => {
                // Kind, relation, 'N', the number of columns.
                let mut rest = &message[8..];
                let mut columns = Vec::new();
                while let Some((kind, tail)) = rest.split_first() {
                    rest = tail;
                    columns.push(match kind {
                        b't' => {
                            let (size, tail) = rest.split_at(4);
                            let size = u32::from_be_bytes(size.try_into().expect("four bytes"));
                            let (value, tail) = tail.split_at(size as usize);
                            rest = tail;
                            String::from_utf8(value.to_vec()).expect("UTF-8")
                        }
                        b'n' => "null".to_owned(),
                        kind => panic!("a column of kind {kind}"),
                    });
                }
                columns.truncate(9);
                inserted.push(columns.join(" "));
            }
            b'U' | b'D' | b'T' => other += 1,
            _ => (),
        }
    }
    (inserted, other)
}

fn unhex(text: &str) -> Vec<u8> {
    let digits = text.strip_prefix("\\x").expect("a bytea").as_bytes();
    digits
        .chunks(2)
        .map(|pair| {
            let pair = std::str::from_utf8(pair).expect("ASCII");
            u8::from_str_radix(pair, 16).expect("hexadecimal")
        })
        .collect()
}

fn from_pgoutput(superuser: &mut Session, slot: &str) -> (Vec<String>, usize) {
    let messages: Vec<_> = lines(
        superuser,
        &format!(
            "select data from pg_logical_slot_get_binary_changes('{slot}', null, null, 'proto_version', '1', 'publication_names', 'nightowls_events')"
        ),
    )
    .iter()
    .map(|line| unhex(line))
    .collect();
    decode_pgoutput(&messages)
}

/// A slot's name is the whole server's.
fn slot(db: &Db, plugin: &str) -> String {
    let name = format!("{}_{plugin}", db.name());
    db.superuser().exec(&format!(
        "select pg_create_logical_replication_slot('{name}', '{plugin}')"
    ));
    name
}

#[test]
fn pgoutput_delivers_every_append_once_and_in_order_of_commit() {
    on_each_install(|db| {
        let org = default_org(db);
        db.owner().exec("select nightowls.enable_cdc()");
        db.owner().exec(
            r#"select nightowls.create_projection('tally', 'order', '{"otherwise": [{"op": "add", "path": "n"}]}')"#,
        );
        let slot = slot(db, "pgoutput");
        append_by_every_way(&mut db.service());
        let mut superuser = db.superuser();
        let (inserted, other) = from_pgoutput(&mut superuser, &slot);
        assert_eq!(inserted, log(db));
        assert_eq!(other, 0);

        // One that commits late comes when it commits.
        let (mut early, mut late) = (db.service(), db.service());
        early.exec("begin; select nightowls.append_event('order', 'early', 'drawn first')");
        late.exec("select nightowls.append_event('order', 'late', 'drawn second')");
        early.exec("commit");
        let (inserted, _) = from_pgoutput(&mut superuser, &slot);
        let types: Vec<_> = inserted
            .iter()
            .map(|row| row.contains("drawn second"))
            .collect();
        assert_eq!(types, [true, false], "{org}");
    });
}

/// Some servers load an output plugin only if a setting names it.
fn plugin_settings() -> &'static [(&'static str, &'static str)] {
    let known = server()
        .database(Install::Plain)
        .superuser()
        .value("select 1 from pg_settings where name = 'output_plugin_libraries'");
    match known {
        Some(_) => &[(
            "output_plugin_libraries",
            "pgoutput, wal2json, pglogical_output",
        )],
        None => &[],
    }
}

#[test]
fn wal2json_delivers_every_append_once() {
    if !server().has_library("wal2json") {
        skip("wal2json");
        return;
    }
    own_cluster_with(plugin_settings(), |cluster| {
        for install in Install::ALL {
            let db = &cluster.database(install);
            default_org(db);
            let slot = slot(db, "wal2json");
            append_by_every_way(&mut db.service());
            let found = lines(
                &mut db.superuser(),
                &format!(
                    "select string_agg(coalesce(case when c ->> 'type' ~ '^jsonb' then (c ->> 'value')::jsonb::text else c ->> 'value' end, 'null'), ' ' order by o)
                       from (select data::jsonb as d, no from pg_logical_slot_get_changes('{slot}', null, null, 'format-version', '2', 'add-tables', 'nightowls.events', 'actions', 'insert')
                               with ordinality as x (lsn, xid, data, no)) x
                      cross join lateral jsonb_array_elements(d -> 'columns') with ordinality as c (c, o)
                      where d ->> 'action' = 'I' and o <= 9
                      group by no order by no"
                ),
            );
            assert_eq!(found, log(db), "{install}");
        }
    });
}

/// What wal2json has for the log since the last call, in its whole text; without
/// `filter` updates and deletions too.
#[track_caller]
fn from_wal2json(superuser: &mut Session, slot: &str, filter: &str) -> Vec<String> {
    lines(
        superuser,
        &format!(
            "select data from pg_logical_slot_get_changes('{slot}', null, null, 'format-version', '2', 'include-transaction', 'false', 'add-tables', 'nightowls.events'{filter})"
        ),
    )
}

const INSERTS: &str = ", 'actions', 'insert'";

/// Compaction and a restore of what it took are no news of the subject; its erasure is its record.
#[test]
fn a_compaction_reaches_no_slot_and_an_erasure_only_as_its_record() {
    let wal2json = server().has_library("wal2json");
    if !wal2json {
        skip("wal2json");
    }
    own_cluster_with(plugin_settings(), |cluster| {
        for install in Install::ALL {
            let db = &cluster.database(install);
            default_org(db);
            let (mut owner, mut service, mut superuser) =
                (db.owner(), db.service(), db.superuser());
            owner.exec("select nightowls.enable_cdc()");
            owner.exec(
                r#"select nightowls.create_projection('tally', 'person', '{"otherwise": [{"op": "add", "path": "n"}]}')"#,
            );
            let published = slot(db, "pgoutput");
            let listed = wal2json.then(|| slot(db, "wal2json"));
            service.exec(
                r#"select nightowls.append_events('person', 'ann', (select jsonb_agg('{"event_type": "moved", "payload": {"to": "a secret address"}}'::jsonb) from generate_series(1, 30)));
                   select nightowls.append_event('person', 'bob', 'moved', '{"to": "elsewhere"}')"#,
            );
            assert_eq!(from_pgoutput(&mut superuser, &published), (log(db), 0));
            if let Some(slot) = &listed {
                let found = from_wal2json(&mut superuser, slot, INSERTS);
                assert_eq!(found.len(), 31, "{found:?}");
            }

            service.exec("select nightowls.create_snapshot('tally', 'ann')");
            assert_eq!(
                text(
                    &mut service,
                    "select moved from nightowls.compact_aggregate('person', 'ann', keep => 10)"
                ),
                "20"
            );
            assert_eq!(from_pgoutput(&mut superuser, &published), (vec![], 0));
            if let Some(slot) = &listed {
                let found = from_wal2json(&mut superuser, slot, INSERTS);
                assert_eq!(found, Vec::<String>::new());
            }

            service.exec("select nightowls.erase('person', 'ann', 'asked on 3 May')");
            let record = log(db).pop().expect("the record is the newest event");
            assert!(
                record.contains(
                    r#"person ann 31 nightowls.erased {"events": 30, "reason": "asked on 3 May"}"#
                ),
                "{record}"
            );
            assert_eq!(
                from_pgoutput(&mut superuser, &published),
                (vec![record], 0),
                "{install}"
            );
            if let Some(slot) = &listed {
                // Peeked at without the filter first: what an erasure rewrites shows nothing of what was there.
                let all = lines(
                    &mut superuser,
                    &format!(
                        "select data from pg_logical_slot_peek_changes('{slot}', null, null, 'format-version', '2')"
                    ),
                );
                assert!(all.len() > 30, "{all:?}");
                assert!(!all.iter().any(|change| change.contains("secret")));
                let found = from_wal2json(&mut superuser, slot, INSERTS);
                assert_eq!(found.len(), 1, "{found:?}");
                let change: serde_json::Value =
                    serde_json::from_str(&found[0]).expect("wal2json writes JSON");
                let value = |name: &str| {
                    let columns = change["columns"].as_array().expect("a row has columns");
                    let column = columns.iter().find(|column| column["name"] == name);
                    column.expect("the column is there")["value"].to_string()
                };
                assert_eq!(change["action"], "I");
                assert_eq!(value("aggregate_id"), r#""ann""#);
                assert_eq!(value("version"), "31");
                assert_eq!(value("event_type"), r#""nightowls.erased""#);
                assert!(value("payload").contains("asked on 3 May"), "{change}");
            }

            // What is put back is inserted, and comes again: positions tell.
            service.exec("select nightowls.restore_aggregate('person', 'ann')");
            let (again, other) = from_pgoutput(&mut superuser, &published);
            assert_eq!((again.len(), other), (20, 0));
            assert!(again.iter().all(|row| log(db).contains(row)));
        }
    });
}

/// pglogical's supervisor keeps databases from being dropped, for ever.
struct StoppedOnPanic<'a>(&'a Cluster);

impl Drop for StoppedOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.stop("immediate");
        }
    }
}

/// pglogical has replication sets instead of publications, and a process for each
/// subscription: both ends are databases of one server here.
#[test]
fn pglogical_delivers_every_append_once_and_an_erasure_as_its_record() {
    if !server().has_library("pglogical") {
        skip("pglogical");
        return;
    }
    let settings: Vec<_> = plugin_settings()
        .iter()
        .copied()
        .chain([
            ("shared_preload_libraries", "pglogical"),
            ("max_worker_processes", "20"),
            ("track_commit_timestamp", "on"),
        ])
        .collect();
    own_cluster_with(&settings, |cluster| {
        let mut ends = Vec::new();
        for install in Install::ALL {
            let (from, to) = (cluster.database(install), cluster.database(install));
            let _guard = StoppedOnPanic(cluster);
            default_org(&from);
            let (mut provider, mut subscriber) = (from.superuser(), to.superuser());
            let dsn = |db: &Db| {
                format!(
                    "host=127.0.0.1 port={} dbname={} user={SUPERUSER}",
                    cluster.port(),
                    db.name()
                )
            };
            append_by_every_way(&mut from.service());
            provider.exec(&format!(
                "create extension pglogical;
                 select pglogical.create_node('provider_{install}', '{}')",
                dsn(&from)
            ));
            provider.exec(
                "select pglogical.replication_set_add_table('default_insert_only', 'nightowls.events', synchronize_data => true)",
            );
            subscriber.exec(&format!(
                "create extension pglogical;
                 select pglogical.create_node('subscriber_{install}', '{}')",
                dsn(&to)
            ));
            subscriber.exec(&format!(
                "select pglogical.create_subscription('events_{install}', '{}', array['default_insert_only'], synchronize_structure => false, synchronize_data => true)",
                dsn(&from)
            ));
            let arrives = |what: &str, expected: Vec<String>| {
                wait_until(what, Duration::from_secs(120), || {
                    log(&to).len() >= expected.len()
                });
                assert_eq!(log(&to), expected, "{install}: {what}");
            };
            arrives("what was there", log(&from));
            append_by_every_way(&mut from.service());
            arrives("what comes", log(&from));

            let mut expected = log(&from);
            let mut service = from.service();
            service.exec("select nightowls.erase('order', 'o1', 'asked on 3 May')");
            expected.push(log(&from).pop().expect("the record is the newest event"));
            arrives("the record of an erasure, and nothing else", expected);
            subscriber.exec(&format!(
                "select pglogical.drop_subscription('events_{install}')"
            ));
            ends.push((from, to));
        }
        cluster.stop("immediate");
    });
}

#[test]
fn a_subscriber_gets_what_was_there_and_what_comes() {
    own_cluster(|subscribers| {
        on_each_install(|db| {
            default_org(db);
            db.owner().exec("select nightowls.enable_cdc()");
            append_by_every_way(&mut db.service());
            let to = subscribers.database(db.install());
            let name = db.name();
            to.superuser().exec(&format!(
                "create subscription {name} connection 'host=127.0.0.1 port={} dbname={name} user={SUPERUSER}' publication nightowls_events",
                db.cluster().port()
            ));
            append_by_every_way(&mut db.service());
            let expected = log(db);
            wait_until("every event has arrived", Duration::from_secs(60), || {
                log(&to).len() == expected.len()
            });
            assert_eq!(log(&to), expected);
            to.superuser().exec(&format!("drop subscription {name}"));
        });
    });
}

#[test]
fn the_publication_is_made_once_and_put_right() {
    let published = "select p.pubinsert, p.pubupdate, p.pubdelete, p.pubtruncate, count(r.prrelid)
                       from pg_publication p left join pg_publication_rel r on r.prpubid = p.oid
                      where p.pubname = 'nightowls_events' group by p.oid";
    on_each_install(|db| {
        let mut owner = db.owner();
        let good = ["t f f f 1"];
        owner.exec("select nightowls.enable_cdc(); select nightowls.enable_cdc()");
        assert_eq!(lines(&mut owner, published), good);
        owner.exec("alter publication nightowls_events drop table nightowls.events");
        owner.exec("alter publication nightowls_events set (publish = 'insert, update, truncate')");
        owner.exec("select nightowls.enable_cdc()");
        assert_eq!(lines(&mut owner, published), good);
        for role in [SERVICE, STRANGER] {
            let mut session = db.session(role);
            for call in [
                "nightowls.enable_cdc()",
                "nightowls.disable_cdc()",
                "nightowls.publish_table('public.t')",
                "nightowls.publish_changes('public.t', 'a', 'b', 'new.id')",
                "nightowls.unpublish_changes('public.t', 'a')",
            ] {
                assert_eq!(session.refused(&format!("select {call}")).code, "42501");
            }
        }
        owner.exec("select nightowls.disable_cdc(); select nightowls.disable_cdc()");
        assert_eq!(lines(&mut owner, published), Vec::<String>::new());
        db.superuser()
            .exec("create publication nightowls_events for all tables");
        assert_eq!(
            db.superuser().refused("select nightowls.enable_cdc()").code,
            "42710"
        );
    });
}

/// A table of an application that has no right on nightowls, published as orders.
fn publish_orders(db: &Db) {
    db.session(APP).exec(&format!(
        "create table public.orders (id int primary key, status text, total numeric(9, 2));
         grant select, insert, update, delete on public.orders to {STRANGER};
         grant trigger on public.orders to {OWNER}"
    ));
    db.owner().exec(
        "select nightowls.publish_changes('public.orders', 'order_placed', 'order', 'new.id', operations => '{insert}');
         select nightowls.publish_changes('public.orders', 'order_paid', 'order', 'new.id',
           condition => 'new.status = ''paid'' and old.status is distinct from new.status',
           payload_expression => 'jsonb_build_object(''total'', new.total, ''before'', old.status)');
         select nightowls.publish_changes('public.orders', 'order_removed', 'order', 'old.id', operations => '{delete}')",
    );
}

const EVENTS: &str = "select aggregate_id, version, event_type, payload, metadata from nightowls.events where aggregate_type = 'order' order by position";

#[test]
fn changes_of_a_table_become_events_in_the_transaction_that_makes_them() {
    on_each_install(|db| {
        default_org(db);
        publish_orders(db);
        let mut writer = db.session(STRANGER);
        // The writer may not do it by itself.
        assert_eq!(
            writer
                .refused("select nightowls.append_event('order', '1', 'forged')")
                .code,
            "42501"
        );
        writer.exec(
            r#"begin; select set_config('request.jwt.claims', '{"sub": "ann"}', true);
               insert into public.orders values (1, 'new', 19.90), (2, 'paid', 5.00); commit"#,
        );
        writer.exec("update public.orders set status = 'paid'");
        writer.exec("begin; update public.orders set status = 'new'; update public.orders set status = 'paid'; delete from public.orders; rollback");
        writer.exec(
            "begin; savepoint s; insert into public.orders values (3); rollback to s; commit",
        );
        writer.exec("insert into public.orders values (1) on conflict do nothing");
        writer.exec("delete from public.orders where id = 2");
        let by = |operation: &str| {
            format!(r#""operation": "{operation}", "source_table": "public.orders"}}"#)
        };
        let ann = format!(r#"{{"actor_id": "ann", {}"#, by("insert"));
        assert_eq!(
            lines(&mut db.superuser(), EVENTS),
            [
                format!(r#"1 1 order_placed {{"id": 1, "total": 19.90, "status": "new"}} {ann}"#),
                format!(r#"2 1 order_placed {{"id": 2, "total": 5.00, "status": "paid"}} {ann}"#),
                format!(r#"2 2 order_paid {{"total": 5.00, "before": null}} {ann}"#),
                format!(
                    r#"1 2 order_paid {{"total": 19.90, "before": "new"}} {{{}"#,
                    by("update")
                ),
                format!(
                    r#"2 3 order_removed {{"id": 2, "total": 5.00, "status": "paid"}} {{{}"#,
                    by("delete")
                ),
            ]
        );
    });
}

#[test]
fn a_registration_is_made_once_listed_and_ended() {
    on_each_install(|db| {
        default_org(db);
        publish_orders(db);
        publish_orders_again(db);
        let mut owner = db.owner();
        let triggers =
            "select count(*)::text from pg_trigger where tgrelid = 'public.orders'::regclass";
        assert_eq!(text(&mut owner, triggers), "9");
        let refusal = owner.refused(
            "select nightowls.publish_changes('public.orders', 'order_placed', 'order', 'new.id + 1', operations => '{insert}')",
        );
        assert_eq!(refusal.code, "42710");
        let refusal =
            owner.refused("select nightowls.unpublish_changes('public.orders', 'order_plced')");
        assert_eq!(
            (refusal.code.as_str(), refusal.hint.as_str()),
            ("NW007", "Did you mean \"public.orders order_placed\"?")
        );

        // Not the table's owner, so the triggers stay where the role is no superuser; either way nothing is appended.
        owner.exec("select nightowls.unpublish_changes('public.orders', 'order_placed')");
        db.session(STRANGER)
            .exec("insert into public.orders values (7, 'new')");
        assert_eq!(lines(&mut db.superuser(), EVENTS), Vec::<String>::new());
        let left = if db.install() == Install::Plain {
            "9"
        } else {
            "6"
        };
        assert_eq!(text(&mut owner, triggers), left);
        owner.exec("select nightowls.publish_changes('public.orders', 'order_placed', 'order', 'new.id', operations => '{insert}')");
        db.session(STRANGER)
            .exec("insert into public.orders values (8, 'new')");
        assert_eq!(lines(&mut db.superuser(), EVENTS).len(), 1);
        // One that is missing is made again.
        db.superuser().exec("do $$ declare t name; begin for t in select tgname from pg_trigger where tgrelid = 'public.orders'::regclass loop execute format('drop trigger %I on public.orders', t); end loop; end $$");
        publish_orders_again(db);
        assert_eq!(text(&mut owner, triggers), "3");
        db.session(STRANGER)
            .exec("insert into public.orders values (9, 'new')");
        assert_eq!(lines(&mut db.superuser(), EVENTS).len(), 2);
    });
}

fn publish_orders_again(db: &Db) {
    db.owner().exec(
        "select nightowls.publish_changes('public.orders', 'order_placed', 'order', 'new.id', operations => '{insert}')",
    );
}

#[test]
fn no_code_of_a_user_runs_as_the_owner() {
    on_each_install(|db| {
        default_org(db);
        // Everything that an expression sets off tells who runs it: a function, a cast
        // that to_jsonb finds by itself, the text form of the id.
        db.session(APP).exec(&format!(
            "create table public.ran (who text);
             grant insert on public.ran to public;
             create function public.note(what int) returns text language plpgsql as $$ begin
               insert into public.ran values (current_user); return what::text; end $$;
             create function public.immutably(what int) returns boolean language plpgsql immutable as $$ begin
               perform public.note(what); return true; end $$;
             create type public.evil as enum ('x');
             create function public.evil_json(evil) returns json language plpgsql as $$ begin
               perform public.note(1); return '1'; end $$;
             create cast (public.evil as json) with function public.evil_json(evil);
             create table public.things (id int, e public.evil);
             grant all on public.things to {STRANGER};
             grant trigger on public.things to {OWNER}"
        ));
        db.owner().exec(
            "select nightowls.publish_changes('public.things', 'thing_made', 'thing', 'public.note(new.id)', condition => 'public.immutably(1)')",
        );
        assert_eq!(
            text(&mut db.superuser(), "select count(*)::text from public.ran"),
            "0",
            "registering runs nothing"
        );
        db.session(STRANGER)
            .exec("insert into public.things values (1, 'x')");
        assert_eq!(
            lines(&mut db.superuser(), "select distinct who from public.ran"),
            [STRANGER]
        );
        assert_eq!(
            lines(
                &mut db.superuser(),
                "select aggregate_id, payload from nightowls.events"
            ),
            [r#"1 {"e": 1, "id": 1}"#]
        );
    });
}

#[test]
fn only_what_is_registered_is_appended_whatever_the_writer_sets() {
    on_each_install(|db| {
        let org = default_org(db);
        let other = new_org(db, "other");
        publish_orders(db);
        let mut writer = db.session(STRANGER);
        let forged = format!(
            r#"{{"id": "forged", "payload": {{}}, "org": "{other}", "type": "secret", "position": 1}}"#
        );
        writer.exec(&format!(
            "begin; select set_config('nightowls.change', {forged}, true), set_config('nightowls.org_id', '{other}', true),
                    set_config('nightowls.door', pg_current_xact_id()::text || '|append', true);
             insert into public.orders values (1, 'new', 1);
             select set_config('nightowls.change', {forged}, true);
             update public.orders set status = 'same';
             commit",
            forged = quote(&forged)
        ));
        assert_eq!(
            lines(
                &mut db.superuser(),
                "select org_id, aggregate_type, aggregate_id, event_type from nightowls.events"
            ),
            [format!("{org} order 1 order_placed")]
        );

        // Nor may anybody else hang the appending function on a table.
        for role in [STRANGER, SERVICE, APP] {
            db.superuser().exec(&format!(
                "create table public.of_{role} (id int); alter table public.of_{role} owner to {role}"
            ));
            let refused = db.session(role).refused(&format!(
                "create trigger t after insert on public.of_{role} for each row
                 execute function nightowls._append_change('{org}', 'public.orders', 'order_placed')"
            ));
            assert_eq!(refused.code, "42501");
        }
    });
}

#[test]
fn a_table_that_orgs_share_gives_each_row_s_event_to_its_org() {
    on_each_install(|db| {
        let one = default_org(db);
        let two = new_org(db, "two");
        db.owner().exec(&format!(
            "create table public.notes (org_id uuid, id int); grant all on public.notes to {STRANGER};
             select nightowls.publish_changes('public.notes', 'noted', 'note', 'new.id')"
        ));
        let refused = db.owner().refused(&format!(
            "select nightowls.publish_changes('public.notes', 'noted', 'note', 'new.id', org => '{two}')"
        ));
        assert_eq!(refused.code, "42710");
        let mut writer = db.session(STRANGER);
        writer.exec(&format!(
            "insert into public.notes values ('{one}', 1), ('{two}', 1), ('{two}', 2)"
        ));
        assert_eq!(
            lines(
                &mut db.superuser(),
                "select org_id, aggregate_id from nightowls.events order by position"
            ),
            [format!("{one} 1"), format!("{two} 1"), format!("{two} 2")]
        );
        assert_eq!(
            writer
                .refused("insert into public.notes values (null, 3)")
                .code,
            "22004"
        );
        assert_eq!(
            writer
                .refused("insert into public.notes values (gen_random_uuid(), 3)")
                .code,
            "22023"
        );
    });
}

#[test]
fn what_cannot_be_published_is_refused_with_its_reason() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        owner.exec("create table public.t (id int, org int); create view public.v as select 1 as id; create table public.empty ()");
        for (arguments, code) in [
            ("null, 'a', 'b', 'new.id'", "22004"),
            ("'public.t', null, 'b', 'new.id'", "22004"),
            ("'public.t', '', 'b', 'new.id'", "22023"),
            ("'public.t', 'nightowls.erased', 'b', 'new.id'", "22023"),
            ("'public.t', 'a', repeat('b', 256), 'new.id'", "54000"),
            ("'public.t', 'a', 'b', null", "22004"),
            ("'public.t', 'a', 'b', 'new.missing'", "42703"),
            ("'public.t', 'a', 'b', 'id'", "42702"),
            ("'public.t', 'a', 'b', 'missing(new.id)'", "42883"),
            ("'public.t', 'a', 'b', 'new.id)'", "42601"),
            (
                "'public.t', 'a', 'b', 'new.id; drop table public.t'",
                "42601",
            ),
            (
                "'public.t', 'a', 'b', 'new.id', condition => 'new'",
                "42846",
            ),
            (
                "'public.t', 'a', 'b', 'new.id', operations => '{}'",
                "22023",
            ),
            (
                "'public.t', 'a', 'b', 'new.id', operations => '{insert,truncate}'",
                "22023",
            ),
            ("'public.none', 'a', 'b', 'new.id'", "42P01"),
            (
                "'public.t; drop table public.t', 'a', 'b', 'new.id'",
                "42P01",
            ),
            ("'public.v', 'a', 'b', 'new.id'", "42809"),
            ("'nightowls.orgs', 'a', 'b', 'new.org_id'", "42809"),
        ] {
            let refusal = owner.refused(&format!("select nightowls.publish_changes({arguments})"));
            assert_eq!(refusal.code, code, "{arguments}: {refusal}");
        }
        assert_eq!(
            text(
                &mut owner,
                "select count(*)::text from nightowls.published_changes"
            ),
            "0"
        );

        owner.exec("select nightowls.publish_changes('public.t', 'a', 'b', 'new.id -- really')");
        let refusal = owner.refused("insert into public.t values (null)");
        assert_eq!(
            (refusal.code.as_str(), refusal.message.as_str()),
            (
                "22004",
                "aggregate_id_expression of the changes of public.t is null"
            )
        );
        owner.exec("insert into public.t values (1)");
        assert_eq!(
            text(&mut owner, "select count(*)::text from nightowls.events"),
            "1"
        );
    });
}

#[test]
fn a_change_keeps_projections_and_handlers_run_as_the_writer() {
    on_each_install(|db| {
        default_org(db);
        publish_orders(db);
        db.superuser()
            .exec(&format!("grant all on public.orders to {SERVICE}"));
        db.owner().exec(
            r#"select nightowls.create_projection('tally', 'order', '{"otherwise": [{"op": "add", "path": "n"}]}')"#,
        );
        let mut writer = db.session(STRANGER);
        writer.exec("insert into public.orders values (1, 'new', 1)");
        assert_eq!(
            text(&mut db.service(), "select nightowls.state('tally', '1')"),
            r#"{"n": 1}"#
        );
        db.owner().exec(
            "create table public.ran (who text); grant insert on public.ran to public;
             create function public.handle(state jsonb, event nightowls.events) returns jsonb language plpgsql as $$ begin
               insert into public.ran values (current_user); return '{}'; end $$;
             select nightowls.create_projection('handled', 'order', handler => 'public.handle');
             delete from public.ran",
        );
        let refusal = writer.refused("insert into public.orders values (2, 'new', 1)");
        assert_eq!(refusal.code, "42501");
        assert!(refusal.hint.contains("rights of a service"), "{refusal}");
        db.service()
            .exec("insert into public.orders values (2, 'new', 1)");
        assert_eq!(
            lines(&mut db.superuser(), "select who from public.ran"),
            [SERVICE]
        );
    });
}

#[test]
fn a_table_is_added_to_the_publication_of_realtime_where_that_is() {
    on_each_install(|db| {
        let mut owner = db.owner();
        owner.exec(
            "create table public.t (id int primary key); create view public.v as select 1 as id",
        );
        let refusal = owner.refused("select nightowls.publish_table('public.t')");
        assert_eq!(refusal.code, "42704");
        owner.exec("create publication supabase_realtime");
        owner.exec("select nightowls.publish_table('public.t'); select nightowls.publish_table('public.t')");
        let found = "select r.prrelid::regclass, c.relreplident from pg_publication_rel r join pg_class c on c.oid = r.prrelid";
        assert_eq!(lines(&mut owner, found), ["t d"]);
        owner.exec("select nightowls.publish_table('public.t', full_identity => true)");
        assert_eq!(lines(&mut owner, found), ["t f"]);
        for (relation, code) in [
            ("'public.v'", "42809"),
            ("'public.none'", "42P01"),
            ("null", "22004"),
        ] {
            let refusal = owner.refused(&format!("select nightowls.publish_table({relation})"));
            assert_eq!(refusal.code, code, "{relation}");
        }
    });
}

#[test]
fn an_app_that_publishes_its_users_needs_no_right_on_nightowls() {
    on_install(Install::Plain, |db| {
        default_org(db);
        // As in Supabase: the sign-in service owns the table, and the project may make triggers on it.
        db.superuser().exec(&format!(
            "create schema auth authorization {APP}; set role {APP};
             create table auth.users (id uuid primary key, email text);
             grant usage on schema auth to {OWNER}; grant trigger on auth.users to {OWNER}"
        ));
        db.owner().exec(
            "select nightowls.publish_changes('auth.users', 'user_signed_up', 'user', 'new.id',
               payload_expression => 'jsonb_build_object(''email'', new.email)', operations => '{insert}')",
        );
        db.session(APP)
            .exec("insert into auth.users values ('00000000-0000-4000-8000-000000000001', 'ann@example.org')");
        assert_eq!(
            lines(
                &mut db.superuser(),
                "select aggregate_id, payload from nightowls.events"
            ),
            [r#"00000000-0000-4000-8000-000000000001 {"email": "ann@example.org"}"#]
        );
    });
}

#[test]
fn the_examples_of_the_page_do_what_it_says() {
    assert_examples(include_str!("../docs/streams.md"), 4);
}

/// What a dump must bring back: the registration and its triggers. The publication of an
/// extension install comes back empty, and `enable_cdc` fills it again.
#[test]
fn a_restored_dump_goes_on_publishing_and_publishes_nothing_twice() {
    on_each_install(|db| {
        default_org(db);
        publish_orders(db);
        db.owner().exec("select nightowls.enable_cdc()");
        db.session(STRANGER)
            .exec("insert into public.orders values (1, 'new', 1.50), (2, 'paid', 2.50)");
        let before = log(db);
        assert_eq!(before.len(), 3);
        for options in [&[][..], &["--inserts"]] {
            let to = db.cluster().empty_database(db.install());
            by_psql_as(SUPERUSER, db, &to, options);
            assert_eq!(log(&to), before);
            to.session(STRANGER)
                .exec("update public.orders set status = 'paid'");
            assert_eq!(log(&to).len(), 4);
            let published = "select count(*)::text from pg_publication_tables where pubname = 'nightowls_events'";
            if db.install() == Install::Extension {
                assert_eq!(text(&mut to.superuser(), published), "0");
            }
            to.owner().exec("select nightowls.enable_cdc()");
            assert_eq!(text(&mut to.superuser(), published), "1");
        }
    });
}
