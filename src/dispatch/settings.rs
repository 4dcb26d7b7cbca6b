//! The settings of the server that sending goes by. They are the superuser's, and are read again with the configuration.

use std::ffi::CString;

use pgrx::{GucContext, GucFlags, GucRegistry, GucSetting};

use crate::http::{Client, Policy};

/// `http://` is not for the internet: whoever is on the way reads and changes it.
static ALLOW_HTTP: GucSetting<bool> = GucSetting::<bool>::new(false);
/// Who may make endpoints could otherwise reach what only the server can.
static ALLOW_PRIVATE: GucSetting<bool> = GucSetting::<bool>::new(false);
static CA_FILE: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(None);
static CLOCK_ROLE: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(None);
static DATABASES: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(None);
/// As many threads, at most.
static MAX_IN_FLIGHT: GucSetting<i32> = GucSetting::<i32>::new(64);

/// Makes them known. The prefix is not reserved: transactions have settings of their own under it.
pub fn init() {
    GucRegistry::define_bool_guc(
        c"nightowls.allow_http",
        c"Lets endpoints have http:// URLs, not only https://.",
        c"What is sent there can be read and changed on the way.",
        &ALLOW_HTTP,
        GucContext::Sighup,
        GucFlags::default(),
    );
    GucRegistry::define_bool_guc(
        c"nightowls.allow_private",
        c"Lets requests go to loopback, private and link-local addresses.",
        c"Whoever may make endpoints can then reach what only the server can.",
        &ALLOW_PRIVATE,
        GucContext::Sighup,
        GucFlags::default(),
    );
    GucRegistry::define_string_guc(
        c"nightowls.ca_file",
        c"A file of certificates in PEM form that are trusted instead of the public authorities.",
        c"Read when a process first sends something.",
        &CA_FILE,
        GucContext::Sighup,
        GucFlags::SUPERUSER_ONLY,
    );
    GucRegistry::define_string_guc(
        c"nightowls.clock_role",
        c"The role as which the worker's clock runs tick.",
        c"Empty: the first role that grant_service was given to, service_role before others.",
        &CLOCK_ROLE,
        GucContext::Sighup,
        GucFlags::default(),
    );
    GucRegistry::define_string_guc(
        c"nightowls.databases",
        c"The databases that have a worker, with commas between.",
        c"A worker sends requests and runs the clock where pg_cron does not. It needs the library in shared_preload_libraries.",
        &DATABASES,
        GucContext::Sighup,
        GucFlags::default(),
    );
    GucRegistry::define_int_guc(
        c"nightowls.max_in_flight",
        c"How many requests a worker has under way at once.",
        c"Each has a thread of its own.",
        &MAX_IN_FLIGHT,
        1,
        1_000,
        GucContext::Sighup,
        GucFlags::default(),
    );
}

/// What may be sent to.
pub fn policy() -> Policy {
    Policy {
        allow_http: ALLOW_HTTP.get(),
        allow_private: ALLOW_PRIVATE.get(),
    }
}

/// The databases that are to have a worker, each once.
pub fn databases() -> Vec<String> {
    let text = text(&DATABASES).unwrap_or_default();
    let mut names: Vec<String> = Vec::new();
    for name in text
        .split(',')
        .map(str::trim)
        .filter(|name| !name.is_empty())
    {
        if !names.iter().any(|known| known == name) {
            names.push(name.to_owned());
        }
    }
    names
}

/// The role that the clock was told to run as.
pub fn clock_role() -> Option<String> {
    text(&CLOCK_ROLE).filter(|name| !name.is_empty())
}

/// How many requests a worker has under way at once.
pub fn max_in_flight() -> usize {
    usize::try_from(MAX_IN_FLIGHT.get()).unwrap_or(1)
}

/// A client by these settings. Keep it: it keeps connections.
///
/// # Errors
///
/// What is wrong with nightowls.ca_file.
pub fn client() -> Result<Client, String> {
    let roots = match text(&CA_FILE).filter(|path| !path.is_empty()) {
        None => None,
        Some(path) => Some(
            std::fs::read(path)
                .map_err(|error| format!("nightowls.ca_file cannot be read: {}", error.kind()))?,
        ),
    };
    Client::new(roots.as_deref(), max_in_flight())
        .map_err(|fault| format!("nightowls.ca_file: {fault}"))
}

fn text(setting: &GucSetting<Option<CString>>) -> Option<String> {
    setting.get().and_then(|text| text.into_string().ok())
}
