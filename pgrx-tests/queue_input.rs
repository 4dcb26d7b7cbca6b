//! What a queue is given that it cannot take: refused with a code, a hint, and nothing written.

use crate::fixture::lines;
use crate::projections::text;
use crate::queue::{bodies, jobs};
use crate::support::{Db, Session, on_each_install, quote};

const ID: &str = "'00000000-0000-4000-8000-000000000000'";

/// Everything there is.
#[track_caller]
fn digest(session: &mut Session) -> Vec<String> {
    let tables = [
        "queues",
        "queue_messages",
        "queue_archive",
        "queue_dedup",
        "queue_marks",
    ];
    tables
        .iter()
        .flat_map(|table| {
            lines(
                session,
                &format!("select t from nightowls.{table} t order by t::text"),
            )
        })
        .collect()
}

/// A call and the code it ends in.
fn table() -> Vec<(String, &'static str)> {
    let mut calls: Vec<(String, &'static str)> = Vec::new();
    // A queue that is not there.
    for call in [
        "send('jobz', '1')",
        "send('jobz', '1', dedup_key => 'k')",
        "send_batch('jobz', array['1']::jsonb[])",
        "send_batch('jobz', '{}')",
        "read('jobz')",
        "read_with_poll('jobz', max_wait => '0')",
        "pop('jobz')",
        "pop_queue('jobz')",
        &format!("ack('jobz', 1, {ID})"),
        &format!("nack('jobz', 1, {ID})"),
        &format!("extend('jobz', 1, {ID})"),
        &format!("ack_many('jobz', '{{1}}', array[{ID}]::uuid[])"),
        &format!("nack_many('jobz', '{{1}}', array[{ID}]::uuid[])"),
        &format!("extend_many('jobz', '{{1}}', array[{ID}]::uuid[])"),
        "delete('jobz', 1)",
        "delete_many('jobz', '{1}')",
        "archive('jobz', 1)",
        "archive_many('jobz', '{1}')",
        "set_vt('jobz', 1, 1)",
        "purge_queue('jobz')",
        "drop_queue('jobz')",
        "alter_queue('jobz', vt => 1)",
        "pause_queue('jobz')",
        "resume_queue('jobz')",
        "redrive('jobz')",
        "purge_archive('jobz')",
        "create_queue('other', dead_letter_queue => 'jobz')",
        "alter_queue('jobs', dead_letter_queue => 'jobz')",
    ] {
        calls.push((call.to_owned(), "NW007"));
    }
    for (code, some) in [
        (
            "22004",
            &[
                "create_queue(null)",
                "create_queue('q', vt => null)",
                "create_queue('q', on_other_body => null)",
                "send(null, '1')",
                "send('jobs', null)",
                "send('jobs', '1', delay => null)",
                "send('jobs', '1', priority => null)",
                "send_batch('jobs', null)",
                "send_batch('jobs', array['1', null]::jsonb[])",
                "read(null)",
                "read('jobs', qty => null)",
                "read_with_poll('jobs', max_wait => null)",
                "pop('jobs', null)",
                "ack('jobs', null, null)",
                "ack('jobs', 1, null)",
                "nack('jobs', 1, null)",
                "extend('jobs', 1, null)",
                "ack_many('jobs', null, null)",
                "nack_many('jobs', '{1}', null)",
                "delete('jobs', null)",
                "delete_many('jobs', null)",
                "archive('jobs', null)",
                "set_vt('jobs', 1, null)",
                "ack_message(null)",
                "purge_queue(null)",
                "drop_queue(null)",
            ][..],
        ),
        (
            "22023",
            &[
                "create_queue('')",
                "create_queue(' q')",
                "create_queue(E'q\\nr')",
                "create_queue('q', vt => -1)",
                "create_queue('q', max_attempts => -1)",
                "create_queue('q', backoff => '-1 second')",
                "create_queue('q', dedup_for => '0')",
                "create_queue('q', on_other_body => 'what')",
                "create_queue('q', dead_letter_queue => 'Q')",
                "send('jobs', '1', delay => -1)",
                "send('jobs', '1', priority => 10)",
                "send('jobs', '1', priority => -1)",
                "send('jobs', '1', headers => '[]')",
                "send('jobs', '1', dedup_key => '')",
                "send('jobs', '1', group_key => '')",
                "send('jobs', '1', dedup_key => 'k', dedup_for => '0')",
                "send_batch('jobs', array['1']::jsonb[], headers => array['{}', '{}']::jsonb[])",
                "send_batch('jobs', array['1']::jsonb[], dedup_keys => '{a,b}')",
                "read('jobs', vt => -1)",
                "read('jobs', qty => -1)",
                "read_with_poll('jobs', max_wait => '-1 second')",
                "pop('jobs', -1)",
                "set_vt('jobs', 1, -1)",
                "ack_message('nonsense')",
                "purge_archive('jobs', '-1 day')",
                "redrive('jobs', -1)",
            ][..],
        ),
        (
            "42710",
            &[
                "create_queue('jobs', vt => 31)",
                "create_queue('JOBS', retention => '1 day')",
            ][..],
        ),
    ] {
        calls.extend(some.iter().map(|call| ((*call).to_owned(), code)));
    }
    for call in [
        format!("nack('jobs', 1, {ID}, delay => -1)"),
        format!("extend('jobs', 1, {ID}, -1)"),
        format!("ack_many('jobs', '{{1,2}}', array[{ID}]::uuid[])"),
        format!("delete_many('jobs', '{{1,2}}', array[{ID}]::uuid[])"),
    ] {
        calls.push((call, "22023"));
    }
    let long = quote(&"x".repeat(256));
    for call in [
        // Bytes, not characters.
        format!("create_queue({})", quote(&"ü".repeat(32))),
        format!("send('jobs', '1', dedup_key => {long})"),
        format!("send('jobs', '1', group_key => {long})"),
        "send('jobs', (repeat('[', 101) || repeat(']', 101))::jsonb)".to_owned(),
        "send('jobs', '1', headers => (repeat('{\"a\":', 101) || '1' || repeat('}', 101))::jsonb)"
            .to_owned(),
        "send('jobs', to_jsonb(repeat('x', 16777216)))".to_owned(),
    ] {
        calls.push((call, "54000"));
    }
    calls
}

#[test]
fn what_cannot_be_is_refused_by_its_code_and_nothing_is_written() {
    on_each_install(|db| {
        let mut service = jobs(db);
        service.exec("select nightowls.send('jobs', '1', dedup_key => 'k', group_key => 'g')");
        let before = digest(&mut service);
        for (call, code) in table() {
            let refusal = service.refused(&format!("select nightowls.{call}"));
            assert_eq!(refusal.code, code, "{call}: {refusal}");
            if code == "NW007" {
                assert_eq!(refusal.hint, r#"Did you mean "jobs"?"#, "{call}");
                assert!(refusal.message.contains(r#""jobz""#), "{call}: {refusal}");
            }
        }
        // Not JSON at all, and what jsonb cannot hold.
        assert_eq!(
            service.refused("select nightowls.send('jobs', '{')").code,
            "22P02"
        );
        assert_eq!(
            service
                .refused(r#"select nightowls.send('jobs', '"\u0000"')"#)
                .code,
            "22P05"
        );
        assert_eq!(digest(&mut service), before);
    });
}

#[test]
fn what_looks_odd_but_is_not_wrong_works() {
    on_each_install(|db| {
        let mut service = jobs(db);
        let mut odd = |name: &str| {
            let name = quote(name);
            service.exec(&format!(
                "select nightowls.create_queue({name}); select nightowls.send({name}, 'null')"
            ));
            assert_eq!(
                lines(
                    &mut service,
                    &format!("select message from nightowls.pop({name})")
                ),
                ["null"],
                "{name}"
            );
        };
        for name in [
            "a b",
            "$;--'\"",
            "tenant/42",
            "ünï🦉",
            "select",
            "%s%I",
            &"ü".repeat(31),
        ] {
            odd(name);
        }
        // Nothing asked, nothing done.
        for none in [
            "nightowls.read('jobs', 30, 0)",
            "nightowls.pop('jobs', 0)",
            "nightowls.send_batch('jobs', '{}')",
            "nightowls.delete_many('jobs', '{}')",
            "nightowls.ack_many('jobs', '{}', '{}')",
            "nightowls.set_vt('jobs', 12345, 1)",
        ] {
            assert_eq!(
                lines(&mut service, &format!("select * from {none}")),
                [""; 0],
                "{none}"
            );
        }
        for no in [
            "delete('jobs', 12345)".to_owned(),
            "archive('jobs', -1)".to_owned(),
            format!("ack('jobs', 12345, {ID})"),
            format!("nack('jobs', 12345, {ID})"),
        ] {
            assert_eq!(
                text(&mut service, &format!("select nightowls.{no}")),
                "f",
                "{no}"
            );
        }
    });
}

#[test]
fn a_name_in_other_letters_is_the_same_queue_and_is_dropped_once() {
    on_each_install(|db: &Db| {
        let mut service = jobs(db);
        service
            .exec("select nightowls.create_queue('CaseQ'); select nightowls.create_queue('caseq')");
        service.exec("select nightowls.send('CASEQ', '1'); select nightowls.send('caseq', '2')");
        assert_eq!(bodies(&mut service, "CaseQ", 9), ["1", "2"]);
        assert_eq!(
            lines(&mut service, "select name from nightowls.list_queues()"),
            ["caseq", "jobs"]
        );
        service.exec("select nightowls.drop_queue('cAsEq')");
        assert_eq!(
            lines(&mut service, "select name from nightowls.list_queues()"),
            ["jobs"]
        );
        // Letters beyond ASCII are what they are.
        service.exec(
            "select nightowls.create_queue('Ä'); select nightowls.create_queue('ä', vt => 5)",
        );
        assert_eq!(
            text(&mut service, "select count(*) from nightowls.list_queues()"),
            "3"
        );
    });
}
