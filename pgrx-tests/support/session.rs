//! One connection, and what the server refuses on it.

use std::fmt;
use std::time::{Duration, Instant};

use postgres::{Client, Config, NoTls, SimpleQueryMessage};

use super::database::Db;

/// One connection. It speaks the simple query protocol only, which needs
/// nothing of the session and so passes through a pooler in transaction mode.
pub struct Session {
    client: Client,
    role: String,
}

/// An error as the server reported it. A lost connection has code 08006.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The SQLSTATE.
    pub code: String,
    /// The primary message.
    pub message: String,
    /// DETAIL, or nothing.
    pub detail: String,
    /// HINT, or nothing.
    pub hint: String,
    /// CONTEXT, or nothing.
    pub context: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.code, self.message)?;
        for (name, text) in [
            ("DETAIL", &self.detail),
            ("HINT", &self.hint),
            ("CONTEXT", &self.context),
        ] {
            if !text.is_empty() {
                write!(f, "\n{name}: {text}")?;
            }
        }
        Ok(())
    }
}

impl From<postgres::Error> for Refusal {
    fn from(error: postgres::Error) -> Self {
        let text = |part: Option<&str>| part.unwrap_or_default().to_owned();
        match error.as_db_error() {
            Some(refused) => Refusal {
                code: refused.code().code().to_owned(),
                message: refused.message().to_owned(),
                detail: text(refused.detail()),
                hint: text(refused.hint()),
                context: text(refused.where_()),
            },
            None => Refusal {
                code: "08006".to_owned(),
                message: error.to_string(),
                detail: String::new(),
                hint: String::new(),
                context: String::new(),
            },
        }
    }
}

thread_local! {
    /// Each test has a thread of its own, as has each that it starts.
    static BEGUN: Instant = Instant::now();
}

/// How long one thread of a test may go on asking: what is not over by then hangs.
pub fn patience() -> Duration {
    Duration::from_secs(if super::full() { 3600 } else { 300 })
}

/// So that a loop which waits for what does not come ends.
///
/// # Panics
///
/// When the time is over.
#[track_caller]
fn be_in_time() {
    let begun = BEGUN.with(Instant::elapsed);
    assert!(begun < patience(), "this test has gone on for {begun:.0?}");
}

impl Session {
    /// A session of `role` on that port of 127.0.0.1; most tests ask their [`Db`] for one.
    pub fn connect(port: u16, database: &str, role: &str) -> Result<Self, Refusal> {
        be_in_time();
        let client = Config::new()
            .host("127.0.0.1")
            .port(port)
            .dbname(database)
            .user(role)
            .application_name("nightowls suite")
            .connect(NoTls)?;
        Ok(Session {
            client,
            role: role.to_owned(),
        })
    }

    /// Runs `sql`, one statement or several.
    ///
    /// # Panics
    ///
    /// If the server refuses; so do all but [`Session::try_exec`],
    /// [`Session::try_value`] and [`Session::refused`].
    #[track_caller]
    pub fn exec(&mut self, sql: &str) {
        if let Err(refusal) = self.try_exec(sql) {
            self.give_up(sql, &refusal);
        }
    }

    /// Runs `sql`, or says why the server would not.
    pub fn try_exec(&mut self, sql: &str) -> Result<(), Refusal> {
        be_in_time();
        Ok(self.client.batch_execute(sql)?)
    }

    /// The first column of the first row; `None` if it is null or there is no row.
    #[track_caller]
    pub fn value(&mut self, sql: &str) -> Option<String> {
        self.try_value(sql)
            .unwrap_or_else(|refusal| self.give_up(sql, &refusal))
    }

    /// As [`Session::value`], or why the server would not.
    pub fn try_value(&mut self, sql: &str) -> Result<Option<String>, Refusal> {
        let rows = self.try_rows(sql)?;
        Ok(rows
            .into_iter()
            .next()
            .and_then(|row| row.into_iter().next().flatten()))
    }

    /// Every row, each column as text.
    #[track_caller]
    pub fn rows(&mut self, sql: &str) -> Vec<Vec<Option<String>>> {
        self.try_rows(sql)
            .unwrap_or_else(|refusal| self.give_up(sql, &refusal))
    }

    /// As [`Session::rows`], or why the server would not.
    pub fn try_rows(&mut self, sql: &str) -> Result<Vec<Vec<Option<String>>>, Refusal> {
        be_in_time();
        let mut rows = Vec::new();
        for message in self.client.simple_query(sql)? {
            if let SimpleQueryMessage::Row(row) = message {
                rows.push(
                    (0..row.len())
                        .map(|column| row.get(column).map(str::to_owned))
                        .collect(),
                );
            }
        }
        Ok(rows)
    }

    /// The error that `sql` must end in.
    ///
    /// # Panics
    ///
    /// If it succeeds.
    #[track_caller]
    pub fn refused(&mut self, sql: &str) -> Refusal {
        match self.try_exec(sql) {
            Err(refusal) => refusal,
            Ok(()) => panic!("{} was not refused: {}", self.role, shortened(sql)),
        }
    }

    /// The process that serves this session. Behind a pooler: that served this query.
    #[track_caller]
    pub fn pid(&mut self) -> i32 {
        self.value("select pg_backend_pid()")
            .and_then(|pid| pid.parse().ok())
            .expect("every backend has a process id")
    }

    /// Whether the connection still works.
    pub fn alive(&mut self) -> bool {
        self.try_exec("select 1").is_ok()
    }

    /// The client beneath, for what the simple protocol cannot do (COPY,
    /// prepared statements).
    pub fn client(&mut self) -> &mut Client {
        &mut self.client
    }

    #[track_caller]
    fn give_up(&self, sql: &str, refusal: &Refusal) -> ! {
        panic!(
            "{} was refused: {refusal}\nSTATEMENT: {}",
            self.role,
            shortened(sql)
        )
    }
}

/// Enough of a statement to know it by.
fn shortened(sql: &str) -> String {
    const KEPT: usize = 2000;
    match sql.char_indices().nth(KEPT) {
        Some((end, _)) => format!("{} … ({} bytes)", &sql[..end], sql.len()),
        None => sql.to_owned(),
    }
}

impl Db {
    /// A session of `role`, on this database's route.
    #[track_caller]
    pub fn session(&self, role: &str) -> Session {
        self.connect(self.route(), role)
    }

    /// A session of the role that owns the install.
    #[track_caller]
    pub fn owner(&self) -> Session {
        self.session(self.install().owner())
    }

    /// A session of the superuser.
    #[track_caller]
    pub fn superuser(&self) -> Session {
        self.session(super::SUPERUSER)
    }

    /// A session of a role with the service's rights.
    #[track_caller]
    pub fn service(&self) -> Session {
        self.session(super::SERVICE)
    }
}
