//! The one ordered list of SQL files. The extension's script and the plain
//! migrations are both made from it, in this order.

/// Where a file of [`FILES`] belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Both installs.
    Both,
    /// Only with the library: C declarations and what only an extension may do.
    Extension,
    /// Only in migrations: the prologue and the plain twins.
    Plain,
}

/// One SQL file of the install.
#[derive(Clone, Copy, Debug)]
pub struct SqlFile {
    /// The concern: the file's stem without its number.
    pub concern: &'static str,
    /// The path, seen from this file.
    pub path: &'static str,
    /// The file's whole text.
    pub text: &'static str,
    /// Which install it is for.
    pub scope: Scope,
}

macro_rules! sql_files {
    ($($scope:ident $concern:literal $path:literal),+ $(,)?) => {
        /// Every SQL file, in install order.
        pub const FILES: &[SqlFile] = &[$(SqlFile {
            concern: $concern,
            path: $path,
            text: include_str!($path),
            scope: Scope::$scope,
        }),+];

        #[cfg(feature = "extension")]
        extension_chain!([] $($scope $concern $path,)+);
    };
}

// Emits one `extension_sql_file!` for each file the extension has; each
// requires the one before it, which is what keeps the order.
#[cfg(feature = "extension")]
macro_rules! extension_chain {
    ([$($before:literal)?]) => {};
    ([$($before:literal)?] Plain $concern:literal $path:literal, $($rest:tt)*) => {
        extension_chain!([$($before)?] $($rest)*);
    };
    ([] $scope:ident $concern:literal $path:literal, $($rest:tt)*) => {
        pgrx::extension_sql_file!($path, name = $concern, bootstrap);
        extension_chain!([$concern] $($rest)*);
    };
    ([$before:literal] $scope:ident $concern:literal $path:literal, $($rest:tt)*) => {
        pgrx::extension_sql_file!($path, name = $concern, requires = [$before]);
        extension_chain!([$concern] $($rest)*);
    };
}

sql_files! {
    Extension "prologue" "../sql/extension/prologue.sql",
    Plain "prologue" "../sql/plain/prologue.sql",
    Both "errors" "../sql/03_errors.sql",
    Both "tenancy" "../sql/05_tenancy.sql",
    Both "members" "../sql/06_members.sql",
    Extension "wait" "../sql/extension/wait.sql",
    Plain "wait" "../sql/plain/wait.sql",
    Both "events" "../sql/10_events.sql",
    Both "append" "../sql/12_append.sql",
    Both "reads" "../sql/14_reads.sql",
    Both "consumers" "../sql/15_consumers.sql",
    Both "import" "../sql/16_import.sql",
    Extension "fold" "../sql/extension/fold.sql",
    Plain "fold" "../sql/plain/fold.sql",
    Both "projections" "../sql/20_projections.sql",
    Both "states" "../sql/22_states.sql",
    Both "read_models" "../sql/24_read_models.sql",
    Both "snapshots" "../sql/25_snapshots.sql",
    Both "async" "../sql/26_async.sql",
    Both "compaction" "../sql/27_compaction.sql",
    Both "erasure" "../sql/28_erasure.sql",
    Both "queue" "../sql/30_queue.sql",
    Both "queue_send" "../sql/31_queue_send.sql",
    Both "queue_read" "../sql/32_queue_read.sql",
    Both "queue_settle" "../sql/33_queue_settle.sql",
    Both "queue_admin" "../sql/34_queue_admin.sql",
    Both "routing" "../sql/35_routing.sql",
    Both "once" "../sql/36_once.sql",
    Both "process" "../sql/37_process.sql",
    Both "queue_metrics" "../sql/37_queue_metrics.sql",
    Both "queue_rpc" "../sql/38_queue_rpc.sql",
    Both "replay" "../sql/38_replay.sql",
    Both "pgmq" "../sql/39_pgmq.sql",
    Both "queue_tick" "../sql/39_queue_tick.sql",
    Both "floors" "../sql/40_floors.sql",
    Both "floor_sweep" "../sql/41_floor_sweep.sql",
    Both "agents" "../sql/50_agents.sql",
    Extension "redact" "../sql/extension/redact.sql",
    Plain "redact" "../sql/plain/redact.sql",
    Both "redaction" "../sql/52_redaction.sql",
    Both "runs" "../sql/55_runs.sql",
    Both "messages" "../sql/56_messages.sql",
    Both "scratchpad" "../sql/57_scratchpad.sql",
    Both "followups" "../sql/58_followups.sql",
    Both "config" "../sql/59_config.sql",
    Both "member_views" "../sql/59_member_views.sql",
    Extension "dispatch" "../sql/extension/dispatch.sql",
    Plain "dispatch" "../sql/plain/dispatch.sql",
    Both "endpoints" "../sql/60_endpoints.sql",
    Both "requests" "../sql/61_requests.sql",
    Both "responses" "../sql/62_responses.sql",
    Both "sending" "../sql/63_sending.sql",
    Both "webhooks" "../sql/64_webhooks.sql",
    Extension "embed" "../sql/extension/embed.sql",
    Plain "embed" "../sql/plain/embed.sql",
    Both "embeddings" "../sql/66_embeddings.sql",
    Both "embedding_claims" "../sql/67_embedding_claims.sql",
    Both "backfill" "../sql/68_backfill.sql",
    Both "mastra" "../sql/70_mastra.sql",
    Both "mastra_rights" "../sql/71_mastra_rights.sql",
    Both "vectors" "../sql/72_vectors.sql",
    Both "realtime" "../sql/73_realtime.sql",
    Both "streams" "../sql/75_streams.sql",
    Both "cdc" "../sql/77_cdc.sql",
    Both "operations" "../sql/80_operations.sql",
    Both "clock" "../sql/82_clock.sql",
    Both "health" "../sql/84_health.sql",
    Both "metrics" "../sql/85_metrics.sql",
    Extension "migration" "../sql/extension/migration.sql",
    Both "grants" "../sql/90_grants.sql",
    Extension "dump" "../sql/extension/dump.sql",
}
