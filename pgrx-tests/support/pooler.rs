//! PgBouncer in transaction mode, as hosted projects have it on port 6543.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use super::cluster::{Cluster, free_port};
use super::session::Session;
use super::{SUPERUSER, wait_until};

/// Server connections in each pool (one for each role and database).
pub const POOL_SIZE: u16 = 10;

/// Where PgBouncer is, if it is here.
pub fn program() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into()])
        .map(|folder| folder.join("pgbouncer"))
        .find(|candidate| candidate.is_file())
}

/// Starts one in front of `cluster`, whose keeper stops it; returns its port.
pub fn start(cluster: &Cluster, pool_size: u16) -> u16 {
    let program = program().expect("a test asks pooler_or_skip() before it wants PgBouncer");
    let port = free_port();
    let base = cluster.folder().join(format!("pgbouncer-{pool_size}"));
    let settings = base.with_extension("ini");
    fs::write(
        &settings,
        format!(
            "[databases]\n\
             * = host={folder} port={server}\n\
             [pgbouncer]\n\
             listen_addr = 127.0.0.1\n\
             listen_port = {port}\n\
             unix_socket_dir =\n\
             auth_type = trust\n\
             auth_user = {SUPERUSER}\n\
             auth_query = select rolname, ''::text from pg_catalog.pg_roles where rolname = $1\n\
             pool_mode = transaction\n\
             default_pool_size = {pool_size}\n\
             max_client_conn = 500\n\
             server_lifetime = 3600\n\
             ignore_startup_parameters = extra_float_digits\n\
             logfile = {base}.log\n\
             pidfile = {base}.pid\n",
            folder = cluster.folder().display(),
            server = cluster.port(),
            base = base.display(),
        ),
    )
    .expect("the cluster's folder takes a file");
    let started = cluster
        .as_server_user(&program)
        .args(["--quiet", "--daemon"])
        .arg(&settings)
        .output()
        .expect("pgbouncer runs");
    assert!(
        started.status.success(),
        "pgbouncer: {}",
        String::from_utf8_lossy(&started.stderr)
    );
    wait_until("PgBouncer answers", Duration::from_secs(10), || {
        Session::connect(port, "postgres", SUPERUSER).is_ok()
    });
    port
}
