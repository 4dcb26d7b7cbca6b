//! The harness itself: what every other test stands on.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use crate::support::{
    APP, Install, OWNER, Route, SERVICE, STRANGER, on_each_install, on_each_route, on_install,
    own_cluster, pooler_or_skip, quote, server, wait_until,
};

#[test]
fn each_install_is_owned_by_its_owner_and_the_plain_one_by_no_superuser() {
    on_each_install(|db| {
        let owner = db.superuser().value(
            "select pg_get_userbyid(nspowner) from pg_namespace where nspname = 'nightowls'",
        );
        assert_eq!(owner.as_deref(), Some(db.install().owner()));

        let as_extension = db
            .superuser()
            .value("select count(*) from pg_extension where extname = 'nightowls'");
        let expected = match db.install() {
            Install::Extension => "1",
            Install::Plain => "0",
        };
        assert_eq!(as_extension.as_deref(), Some(expected));

        let superuser = db.superuser().value(&format!(
            "select rolsuper from pg_roles where rolname = {}",
            quote(OWNER)
        ));
        assert_eq!(superuser.as_deref(), Some("f"));
    });
}

#[test]
fn every_role_gets_a_session_on_every_route() {
    on_each_route(|db| {
        for role in [db.install().owner(), SERVICE, STRANGER, APP] {
            let who = db.session(role).value("select current_user");
            assert_eq!(who.as_deref(), Some(role));
        }
    });
}

#[test]
fn two_sessions_share_one_server_connection_when_the_pool_holds_two() {
    if !pooler_or_skip() {
        return;
    }
    on_each_install(|db| {
        let mut sessions: Vec<_> = (0..6).map(|_| db.pooled_by(2, SERVICE)).collect();
        let mut pids: Vec<_> = sessions.iter_mut().map(|session| session.pid()).collect();
        pids.sort_unstable();
        pids.dedup();
        assert!(pids.len() <= 2, "six clients had {} servers", pids.len());
    });
}

#[test]
fn a_refusal_carries_code_message_detail_and_hint() {
    on_each_route(|db| {
        let mut session = db.session(STRANGER);
        let refusal = session.refused(
            "do $$ begin raise exception 'no' using errcode = 'NW001', detail = 'why', hint = 'how'; end $$",
        );
        assert_eq!(
            (
                refusal.code.as_str(),
                refusal.message.as_str(),
                refusal.detail.as_str(),
                refusal.hint.as_str()
            ),
            ("NW001", "no", "why", "how")
        );
        assert_eq!(session.value("select 1").as_deref(), Some("1"));
    });
}

#[test]
fn a_session_survives_the_database_of_another_test_being_dropped() {
    on_each_install(|db| {
        let mut here = db.owner();
        let other = db.cluster().database(db.install());
        let name = other.name().to_owned();
        other
            .superuser()
            .exec("begin; prepare transaction 'left behind'");
        drop(other);
        let left = here.value(&format!(
            "select count(*) from pg_database where datname = {}",
            quote(&name)
        ));
        assert_eq!(left.as_deref(), Some("0"));
    });
}

#[test]
fn a_database_goes_with_its_test_even_when_that_panics() {
    let name = Mutex::new(String::new());
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        on_install(Install::Extension, |db| {
            *name.lock().expect("nobody else holds it") = db.name().to_owned();
            panic!("as a failing test does");
        });
    }));
    assert!(panicked.is_err());
    let left = server()
        .database(Install::Plain)
        .superuser()
        .value(&format!(
            "select count(*) from pg_database where datname = {}",
            quote(&name.lock().expect("nobody else holds it"))
        ));
    assert_eq!(left.as_deref(), Some("0"));
}

#[test]
fn a_cluster_of_its_own_leaves_nothing_behind() {
    let mut folder = PathBuf::new();
    own_cluster(|cluster| {
        folder = cluster.folder().to_owned();
        assert!(folder.exists());
    });
    assert!(!folder.exists());
}

#[test]
fn a_cluster_of_its_own_comes_back_after_its_server_was_killed() {
    own_cluster(|cluster| {
        let db = cluster.database(Install::Extension);
        assert_eq!(db.route(), Route::Direct);
        let mut session = db.superuser();
        session.exec("create table public.kept (); insert into public.kept default values");
        cluster.kill9_postmaster_and_restart();
        wait_until("the old session is gone", Duration::from_secs(5), || {
            !session.alive()
        });
        let rows = db.superuser().value("select count(*) from public.kept");
        assert_eq!(rows.as_deref(), Some("1"));
    });
}

#[test]
fn the_programs_of_the_server_connect_to_it() {
    on_each_install(|db| {
        let output = db
            .command("psql", OWNER)
            .args(["--no-psqlrc", "--tuples-only", "--no-align"])
            .args([
                "--command",
                "select current_database() || ' ' || current_user",
            ])
            .output()
            .expect("psql runs");
        assert_eq!(
            String::from_utf8_lossy(&output.stdout).trim(),
            format!("{} {OWNER}", db.name())
        );
    });
}
