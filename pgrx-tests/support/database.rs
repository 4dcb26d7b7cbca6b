//! A database with nightowls in it, dropped at the end of its test.

use std::process::Command;
use std::sync::Arc;

use super::cluster::Cluster;
use super::session::Session;
use super::{Install, Route, SUPERUSER, quote};

/// A fresh database with nightowls installed. Dropping it drops the database,
/// sessions, prepared transactions and replication slots included.
pub struct Db {
    cluster: Arc<Cluster>,
    name: String,
    install: Install,
    route: Route,
}

impl Db {
    pub(super) fn new(cluster: Arc<Cluster>, name: String, install: Install) -> Self {
        Db {
            cluster,
            name,
            install,
            route: Route::Direct,
        }
    }

    pub(super) fn by(mut self, route: Route) -> Self {
        self.route = route;
        self
    }

    /// How nightowls came into this database.
    pub fn install(&self) -> Install {
        self.install
    }

    /// The way that this database's sessions take.
    pub fn route(&self) -> Route {
        self.route
    }

    /// The database's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The cluster it is in.
    pub fn cluster(&self) -> &Arc<Cluster> {
        &self.cluster
    }

    /// The port of this database's route on 127.0.0.1.
    pub fn port(&self) -> u16 {
        match self.route {
            Route::Direct => self.cluster.port(),
            Route::Pooled => self.cluster.pooler_port(super::pooler::POOL_SIZE),
        }
    }

    /// A connection URL of `role`, on this database's route.
    pub fn url(&self, role: &str) -> String {
        format!(
            "postgresql://{role}@127.0.0.1:{}/{}?sslmode=disable",
            self.port(),
            self.name
        )
    }

    /// A session of `role` straight to the server, whatever the route.
    #[track_caller]
    pub fn direct(&self, role: &str) -> Session {
        self.connect(Route::Direct, role)
    }

    /// A session of `role` through PgBouncer, whatever the route. Ask
    /// [`super::pooler_or_skip`] first.
    #[track_caller]
    pub fn pooled(&self, role: &str) -> Session {
        self.connect(Route::Pooled, role)
    }

    /// A session of `role` through a PgBouncer whose pools hold `size` server
    /// connections: more clients than that must share.
    #[track_caller]
    pub fn pooled_by(&self, size: u16, role: &str) -> Session {
        self.connect_to(self.cluster.pooler_port(size), role)
    }

    /// One of the server's programs (`psql`, `pg_dump`, …), set to connect to
    /// this database as `role`, straight to the server.
    pub fn command(&self, program: &str, role: &str) -> Command {
        let mut command = self.cluster.command(program);
        command.env("PGDATABASE", &self.name).env("PGUSER", role);
        command
    }

    #[track_caller]
    pub(super) fn connect(&self, route: Route, role: &str) -> Session {
        let port = match route {
            Route::Direct => self.cluster.port(),
            Route::Pooled => self.cluster.pooler_port(super::pooler::POOL_SIZE),
        };
        self.connect_to(port, role)
    }

    #[track_caller]
    fn connect_to(&self, port: u16, role: &str) -> Session {
        Session::connect(port, &self.name, role)
            .unwrap_or_else(|refusal| panic!("{role} cannot connect to {}: {refusal}", self.name))
    }

    // Both keep a database from being dropped, and both outlive their session.
    fn release(&self) {
        let Ok(mut session) = Session::connect(self.cluster.port(), &self.name, SUPERUSER) else {
            return;
        };
        let prepared = "select gid from pg_prepared_xacts where database = current_database()";
        for row in session.try_rows(prepared).unwrap_or_default() {
            if let Some(gid) = &row[0] {
                let _ = session.try_exec(&format!("rollback prepared {}", quote(gid)));
            }
        }
        let _ = session.try_exec(
            "select pg_drop_replication_slot(slot_name) from pg_replication_slots \
             where database = current_database() and not active",
        );
    }
}

impl Drop for Db {
    fn drop(&mut self) {
        self.release();
        // A server that a test has stopped needs no tidying.
        if let Ok(mut session) = Session::connect(self.cluster.port(), "postgres", SUPERUSER) {
            let _ = session.try_exec(&format!("drop database {} with (force)", self.name));
        }
    }
}
