//! Events of runs, broadcast by Supabase's Realtime: what is sent, to whom, and that whatever goes wrong with it is no append's concern.

use nightowls::migration::{VERSION, migrations};

use crate::fixture::{as_user, default_org, lines, new_org};
use crate::members::two_orgs;
use crate::projections::text;
use crate::support::{
    APP, Db, Install, MEMBER, SERVICE, Session, on_each_install, on_each_route, quote, server,
};

/// Puts Realtime's half of the database there, with the rights that a project gives.
pub fn add_realtime(db: &Db) {
    let owner = db.install().owner();
    db.direct("postgres").exec(&format!(
        "{}
         grant usage on schema realtime to {owner}, {SERVICE}, {MEMBER};
         grant select, insert, update on realtime.messages to {owner}, {SERVICE}, {MEMBER};
         grant supabase_realtime_admin to {owner}",
        include_str!("realtime.sql")
    ));
}

/// An org with Realtime on.
fn on_air(db: &Db) -> String {
    let org = default_org(db);
    add_realtime(db);
    db.owner().exec(&format!(
        "select nightowls.enable_realtime({})",
        quote(MEMBER)
    ));
    org
}

fn sent(db: &Db) -> Vec<String> {
    lines(
        &mut db.direct("postgres"),
        "select topic, event, private, extension,
                coalesce((select string_agg(e ->> 'version', ',') from jsonb_array_elements(payload -> 'events') e), 'truncated') from realtime.messages
          order by (payload ->> 'position')::bigint, topic",
    )
}

/// Appends in every way there is, each of one statement: eight events of a run, two of another, one of an order.
fn append_in_every_way(service: &mut Session, run: &str) {
    service.exec("set statement_timeout to '60s'");
    for sql in [
        "select nightowls.start_run('$')",
        "select nightowls.set_run_status('$', 'running')",
        "select nightowls.append_event('run', '$', 'said', '{\"n\": 1}')",
        "select nightowls.append_events('run', '$', '[{\"event_type\": \"a\"}, {\"event_type\": \"b\"}]')",
        "select nightowls.append_event('run', '$', 'said', event_id => gen_random_uuid())",
        "select nightowls.append_many('[{\"aggregate_type\": \"run\", \"aggregate_id\": \"$\", \"events\": [{\"event_type\": \"c\"}]},
                                       {\"aggregate_type\": \"run\", \"aggregate_id\": \"$2\", \"events\": [{\"event_type\": \"d\"}]},
                                       {\"aggregate_type\": \"order\", \"aggregate_id\": \"$\", \"events\": [{\"event_type\": \"e\"}]}]')",
        "insert into nightowls.events (aggregate_type, aggregate_id, event_type) values ('run', '$', 'f'), ('run', '$2', 'g')",
    ] {
        service.exec(&sql.replace('$', run));
    }
    assert_eq!(
        lines(
            service,
            &format!(
                "select aggregate_type, count(*) from nightowls.events where aggregate_id in ('{run}', '{run}2') group by 1 order by 1"
            )
        ),
        ["order 1", "run 10"],
        "{run}"
    );
}

#[test]
fn one_message_for_each_statement_and_run() {
    on_each_route(|db| {
        on_air(db);
        append_in_every_way(&mut db.service(), "r");
        assert_eq!(
            sent(db),
            [
                "run:r events t broadcast 1",
                "run:r events t broadcast 2",
                "run:r events t broadcast 3",
                "run:r events t broadcast 4,5",
                "run:r events t broadcast 6",
                "run:r events t broadcast 7",
                "run:r2 events t broadcast 1",
                "run:r events t broadcast 8",
                "run:r2 events t broadcast 2",
            ]
        );
    });
}

#[test]
fn every_append_commits_whatever_is_wrong_with_realtime() {
    // What a superuser does to it, and whether it is heard of after that; the superuser, who owns the extension, has every right.
    let send = "create or replace function realtime.send(payload jsonb, event text, topic text, private boolean default true) returns void language plpgsql";
    let situations: [(&str, String, [bool; 2]); 12] = [
        ("normal", String::new(), [true, true]),
        (
            "no USAGE",
            "revoke usage on schema realtime from owl_owner".into(),
            [true, false],
        ),
        (
            "no EXECUTE",
            "revoke execute on function realtime.send from public, supabase_realtime_admin".into(),
            [true, false],
        ),
        (
            "function missing",
            "drop function realtime.send".into(),
            [false; 2],
        ),
        (
            "another signature",
            "drop function realtime.send; create function realtime.send(a text) returns void language sql return null".into(),
            [false; 2],
        ),
        (
            "no partition",
            "drop table realtime.messages_today".into(),
            [false; 2],
        ),
        (
            "refused by a policy",
            "alter table realtime.messages force row level security; alter function realtime.send(jsonb, text, text, boolean) security definer".into(),
            [false; 2],
        ),
        (
            "refused, and raised",
            format!("{send} as $$ begin insert into realtime.messages (topic, extension) values (null, null); end $$"),
            [false; 2],
        ),
        (
            "raises",
            format!("{send} as $$ begin raise exception 'out of order' using errcode = 'XX001'; end $$"),
            [false; 2],
        ),
        (
            "fails an assertion",
            format!("{send} as $$ begin assert false; end $$"),
            [false; 2],
        ),
        (
            "somebody has the table locked",
            "begin; lock table realtime.messages in access exclusive mode".into(),
            [false; 2],
        ),
        ("schema absent", "drop schema realtime cascade".into(), [false; 2]),
    ];
    on_each_install(|db| {
        on_air(db);
        let (mut superuser, mut service) = (db.superuser(), db.service());
        for (nth, (what, fault, heard)) in situations.iter().enumerate() {
            add_realtime(db);
            // It has been heard of once: plans and rights are in the session's caches.
            service.exec("select nightowls.append_event('run', 'before', 'said')");
            assert_eq!(sent(db).len(), 1, "{what}");
            superuser.exec(fault);
            append_in_every_way(&mut service, &format!("r{nth}"));
            superuser.exec("rollback");
            let heard = heard[usize::from(db.install() == Install::Plain)];
            if text(
                &mut superuser,
                "select to_regclass('realtime.messages') is not null",
            ) == "t"
            {
                let count = sent(db).len();
                assert_eq!(
                    count,
                    if heard {
                        10
                    } else {
                        usize::from(*what != "no partition")
                    },
                    "{what}"
                );
            }
            // Nothing of it is left in the transaction.
            let after = "begin; select nightowls.append_event('run', 'after', 'said'); select concat('<', current_setting('realtime.topic', true), '>'); commit";
            assert_eq!(
                lines(&mut service, after).pop().as_deref(),
                Some("<>"),
                "{what}"
            );
        }
    });
}

#[test]
fn without_realtime_an_append_looks_for_nothing() {
    on_each_install(|db| {
        default_org(db);
        append_in_every_way(&mut db.service(), "r");
        assert_eq!(
            lines(
                &mut db.superuser(),
                "select distinct follows from nightowls._append_targets"
            ),
            ["{}"]
        );
    });
}

#[test]
fn it_goes_with_the_transaction_and_the_savepoint() {
    on_each_install(|db| {
        on_air(db);
        let mut service = db.service();
        service.exec("begin; select nightowls.append_event('run', 'r', 'undone'); rollback");
        service.exec(
            "begin; select nightowls.append_event('run', 'r', 'kept'); savepoint a;
             select nightowls.append_event('run', 'r', 'undone'); rollback to a; commit",
        );
        assert_eq!(sent(db), ["run:r events t broadcast 1"]);
    });
}

#[test]
fn members_get_events_without_secrets_or_where_they_are_if_they_are_large() {
    on_each_install(|db| {
        let org = on_air(db);
        let mut service = db.service();
        service.exec(
            "select nightowls.set_redaction_rules('{\"keys\": [\"salary\"]}');
             select nightowls.append_event('run', 'r', 'said', '{\"password\": \"hunter2\", \"deep\": [{\"salary\": 5}], \"text\": \"hi\"}',
                                           metadata => '{\"authorization\": \"Bearer abc\", \"actor_id\": \"ann\"}')",
        );
        let payload = text(
            &mut db.superuser(),
            "select payload::text from realtime.messages",
        );
        for secret in ["hunter2", "\"salary\": 5", "Bearer abc"] {
            assert!(!payload.contains(secret), "{payload}");
        }
        for kept in [
            "\"text\": \"hi\"",
            "\"actor_id\": \"ann\"",
            &org,
            "\"event_type\": \"said\"",
        ] {
            assert!(payload.contains(kept), "{payload}");
        }

        // The bound counts what is sent, compressed or not; a value that is no number is none.
        for (bound, bytes, outcome) in [
            (None, 150_000, "whole"),
            (None, 210_000, "truncated"),
            (Some("300000"), 210_000, "whole"),
            (Some("1000"), 900, "truncated"),
            (Some("much"), 150_000, "whole"),
            (Some("0"), 1, "truncated"),
        ] {
            service.exec(&format!(
                "select nightowls.set_config_value('broadcast_max_bytes', {});
                 select nightowls.append_event('run', 'r', 'said', jsonb_build_object('text', repeat('a', {bytes})))",
                bound.map_or("null".to_owned(), quote)
            ));
            assert_eq!(
                text(
                    &mut db.superuser(),
                    "select case when payload ? 'events' then 'whole' when payload @> '{\"truncated\": true, \"run_id\": \"r\"}' then 'truncated' end
                       from realtime.messages order by (payload ->> 'position')::bigint desc limit 1"
                ),
                outcome,
                "{bound:?} {bytes}"
            );
        }
        assert_eq!(
            lines(
                &mut db.superuser(),
                "select count(*) from realtime.messages m join nightowls.events e on e.position = (m.payload ->> 'position')::bigint
                    and e.version = (m.payload ->> 'version')::bigint"
            ),
            ["7"]
        );
    });
}

/// What a member finds when Realtime asks on its behalf whether it may join: rows of each extension that it sees.
fn joins(session: &mut Session, user: &str, topic: &str) -> String {
    session.exec("begin");
    session.exec(&format!(
        "select set_config('nightowls.user_id', {}, true), set_config('realtime.topic', {}, true)",
        quote(user),
        quote(topic)
    ));
    let seen = lines(
        session,
        "select coalesce(string_agg(distinct extension, '+' order by extension), 'nothing') from realtime.messages",
    );
    session.exec("rollback");
    seen.concat()
}

#[test]
fn members_join_the_channels_of_their_orgs_runs_and_no_others() {
    on_each_route(|db| {
        let (org, other) = two_orgs(db);
        add_realtime(db);
        db.owner().exec(&format!(
            "select nightowls.enable_realtime({})",
            quote(MEMBER)
        ));
        db.superuser().exec(
            "insert into realtime.messages (topic, extension) select 'any', e from unnest('{broadcast,presence,postgres_changes}'::text[]) e",
        );
        let mut service = db.service();
        // One id in both orgs: two topics.
        for org in [&org, &other] {
            service.exec(&format!("select nightowls.start_run('r', org => '{org}')"));
        }
        let theirs = format!("run:{other}:r");
        assert_eq!(
            lines(
                &mut db.superuser(),
                "select topic, payload ->> 'org_id' from realtime.messages where topic <> 'any' order by 1"
            ),
            {
                let mut topics = [format!("run:r {org}"), format!("{theirs} {other}")];
                topics.sort_by_key(|line| line.clone());
                topics
            }
        );
        // An id that looks like another org's topic is no way in, and none out.
        service.exec(&format!(
            "select nightowls.append_event('run', '{other}:r', 'said', org => '{org}')"
        ));
        assert_eq!(
            text(
                &mut db.superuser(),
                "select topic from realtime.messages order by (payload ->> 'position')::bigint desc nulls last limit 1"
            ),
            format!("run:{org}:{other}:r")
        );

        let mut member = db.session(MEMBER);
        let both = "broadcast+presence";
        for (user, topic, seen) in [
            ("member", "run:r", both),
            ("viewer", "run:r", both),
            ("owner", "run:not yet", both),
            ("member", &format!("run:{org}:r"), both),
            ("foreign", "run:r", "nothing"),
            ("foreign", &theirs, both),
            ("member", &theirs, "nothing"),
            ("nobody", "run:r", "nothing"),
            ("", "run:r", "nothing"),
            ("member", "room:r", "nothing"),
            ("member", "", "nothing"),
            ("member", "run", "nothing"),
            ("member", "RUN:r", "nothing"),
            (
                "member",
                "run:00000000-0000-0000-0000-000000000000:r",
                "nothing",
            ),
        ] {
            assert_eq!(joins(&mut member, user, topic), seen, "{user} {topic}");
        }

        // Presence is a member's to write, a broadcast is not.
        let track = |user: &str, extension: &str, topic: &str| {
            format!(
                "select set_config('nightowls.user_id', {}, true), set_config('realtime.topic', {}, true);
                 insert into realtime.messages (topic, extension) values ({}, '{extension}')",
                quote(user),
                quote(topic),
                quote(topic)
            )
        };
        member.exec(&format!(
            "begin; {}; rollback",
            track("member", "presence", "run:r")
        ));
        for (user, extension, topic) in [
            ("member", "broadcast", "run:r"),
            ("member", "presence", theirs.as_str()),
            ("nobody", "presence", "run:r"),
        ] {
            let refusal = member.refused(&format!("begin; {}", track(user, extension, topic)));
            assert_eq!(refusal.code, "42501", "{user} {extension} {topic}");
            member.exec("rollback");
        }
    });
}

#[test]
fn the_policys_function_answers_no_and_never_raises() {
    on_each_install(|db| {
        two_orgs(db);
        let mut member = db.session(MEMBER);
        let odd = [
            "null".to_owned(),
            "''".to_owned(),
            "'run:'".to_owned(),
            "repeat('run:', 100000)".to_owned(),
            "'run:' || chr(1) || '%_\\'".to_owned(),
            "'run:ffffffff-ffff-ffff-ffff-ffffffffffff:'".to_owned(),
            "'run:''; drop table nightowls.events; --'".to_owned(),
        ];
        for claims in [
            "",
            "{",
            "[]",
            "\"x\"",
            "{\"sub\": 7}",
            "{\"sub\": {\"a\": 1}}",
            "null",
        ] {
            for topic in &odd {
                let sql = format!("select nightowls._may_receive({topic})");
                member.exec(&format!(
                    "begin; select set_config('request.jwt.claims', {}, true)",
                    quote(claims)
                ));
                assert_eq!(text(&mut member, &sql), "f", "{claims} {topic}");
                member.exec("rollback");
            }
        }
        // No default org.
        db.owner().exec("select nightowls.set_default_org(null)");
        assert_eq!(
            as_user(
                &mut member,
                "member",
                "select nightowls._may_receive('run:r')"
            ),
            Ok(vec!["f".to_owned()])
        );
    });
}

#[test]
fn a_send_that_is_not_supabases_is_not_run_with_the_owners_rights() {
    on_each_install(|db| {
        on_air(db);
        let mut superuser = db.superuser();
        superuser.exec(&format!(
            "create table public.spoils (who text); grant all on public.spoils to public;
             create or replace function realtime.send(payload jsonb, event text, topic text, private boolean default true)
               returns void language sql as $$ insert into public.spoils values (current_user) $$;
             grant create on schema realtime to {APP};
             alter function realtime.send(jsonb, text, text, boolean) owner to {APP}"
        ));
        append_in_every_way(&mut db.service(), "r");
        assert_eq!(
            text(&mut superuser, "select count(*) from public.spoils"),
            "0"
        );
        assert_eq!(
            lines(
                &mut superuser,
                "select name, ok from nightowls._health_realtime() order by 1"
            ),
            ["broadcast f", "policies t"]
        );
    });
}

#[test]
fn it_is_switched_on_off_and_on_again_by_the_owner_alone() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        let health = "select name, ok, value from nightowls._health_realtime() order by 1";
        assert_eq!(lines(&mut owner, health), ["broadcast t off"]);
        for call in ["enable_realtime()", "disable_realtime()"] {
            assert_eq!(
                db.service()
                    .refused(&format!("select nightowls.{call}"))
                    .code,
                "42501"
            );
        }
        assert_eq!(
            owner.refused("select nightowls.enable_realtime(null)").code,
            "22004"
        );
        let enable = format!(
            "select step, outcome from nightowls.enable_realtime({})",
            quote(MEMBER)
        );
        assert_eq!(
            lines(&mut owner, &enable),
            [
                "broadcast on, as soon as realtime.send(jsonb, text, text, boolean) is there, is Supabase's, and may be called",
                "policy members_receive_run_events not made: there is no table realtime.messages",
                "policy members_track_run_presence not made: there is no table realtime.messages",
            ]
        );
        // Told, not failed.
        append_in_every_way(&mut db.service(), "r");
        assert_eq!(
            lines(&mut owner, health),
            ["broadcast f there is no schema realtime"]
        );

        add_realtime(db);
        let policies = "select polname, polcmd from pg_policy where polrelid = 'realtime.messages'::regclass order by 1";
        assert_eq!(
            lines(
                &mut owner,
                "select step, outcome from nightowls.enable_realtime('owl_nobody')"
            ),
            [
                "broadcast on",
                "policy members_receive_run_events not made: role \"owl_nobody\" does not exist",
                "policy members_track_run_presence not made: role \"owl_nobody\" does not exist",
            ]
        );
        for outcome in ["made", "there already"] {
            assert_eq!(
                lines(&mut owner, &enable),
                [
                    "broadcast on".to_owned(),
                    format!("policy members_receive_run_events {outcome}"),
                    format!("policy members_track_run_presence {outcome}"),
                ]
            );
        }
        assert_eq!(
            lines(&mut owner, policies),
            [
                "members_receive_run_events r",
                "members_track_run_presence a"
            ]
        );
        assert_eq!(
            lines(&mut owner, health),
            ["broadcast t on", "policies t members may receive"]
        );
        // An org that is made now is on the air as well.
        let new = new_org(db, "new");
        db.service().exec(&format!(
            "select nightowls.append_event('run', 'x', 'said'), nightowls.append_event('run', 'y', 'said', org => '{new}')"
        ));
        assert_eq!(sent(db).len(), 2);

        owner.exec("select nightowls.disable_realtime(), nightowls.disable_realtime()");
        db.service()
            .exec("select nightowls.append_event('run', 'x', 'said')");
        assert_eq!(sent(db).len(), 2);
        assert_eq!(lines(&mut owner, policies), [""; 0]);
        assert_eq!(lines(&mut owner, health), ["broadcast t off"]);
    });
}

#[test]
fn an_install_where_realtime_is_there_needs_no_more() {
    for install in Install::ALL {
        let db = server().empty_database(install);
        add_realtime(&db);
        let mut owner = db.owner();
        match install {
            Install::Extension => owner.exec("create extension nightowls"),
            Install::Plain => {
                for file in migrations(VERSION) {
                    owner.exec(&file.sql);
                }
            }
        }
        owner.exec(&format!("select nightowls.grant_service('{SERVICE}')"));
        default_org(&db);
        db.service().exec("select nightowls.start_run('r')");
        assert_eq!(sent(&db), ["run:r events t broadcast 1"], "{install}");
    }
}

#[test]
fn the_page_does_what_it_says() {
    on_each_install(|db| {
        default_org(db);
        add_realtime(db);
        let page = include_str!("../docs/realtime.md");
        let blocks: Vec<_> = page
            .split("```sql\n")
            .skip(1)
            .filter_map(|rest| Some(rest.split_once("```")?.0))
            .collect();
        assert_eq!(blocks.len(), 1);
        for block in blocks {
            db.owner().exec(block);
        }
        db.service()
            .exec("select nightowls.append_event('run', 'r', 'said')");
        // The fields that the page lists are those of a message.
        let fields = lines(
            &mut db.superuser(),
            "select k from realtime.messages, jsonb_object_keys(payload) k where k <> 'id' order by 1",
        );
        for field in fields.iter().map(|field| format!("`{field}`")) {
            assert!(page.contains(&field), "{field}");
        }
        assert_eq!(fields.len(), 6, "{fields:?}");
    });
}
