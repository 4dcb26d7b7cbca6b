//! Embeddings as Postgres calls them.

use std::cell::RefCell;
use std::ffi::{CStr, CString};
use std::time::Duration;

use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use super::exchange::exchange;
use crate::dispatch::settings;
use crate::error::{internal, invalid};
use crate::fold::extern_layer::argument;
use crate::http::Client;

thread_local! {
    /// Made at the first request, as it keeps connections.
    static CLIENT: RefCell<Option<Client>> = const { RefCell::new(None) };
    /// What the last exchange of a procedure brought.
    static ANSWERS: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// The part of a text from one UTF-16 unit up to another.
#[pg_extern(sql = false)]
fn slice_utf16(content: Option<&str>, start: Option<i32>, stop: Option<i32>) -> Option<&str> {
    Some(super::slice_utf16(
        content?,
        start.unwrap_or(0).into(),
        stop.map(i64::from),
    ))
}

/// Runs one statement as the owner of a table, in a security-restricted operation, as
/// Postgres itself runs the expressions of an index.
///
/// # Errors
///
/// SQLSTATE 42P01 if there is no such table, 22023 if it is not one statement that
/// returns rows, and whatever the statement raises.
#[pg_extern(sql = false)]
fn run_as_owner(
    source: pg_sys::Oid,
    statement: &str,
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<Option<String>, ErrorReport> {
    let statement =
        CString::new(statement).map_err(|_| invalid("a statement must hold no zero bytes"))?;
    // SAFETY: declared as _run_as_owner(regclass, text, text[]); what is changed of the
    // backend's state is put back below, or by the (sub)transaction that an error ends.
    unsafe {
        let arguments = argument(fcinfo, 2);
        let owner = owner_of(source).ok_or_else(|| {
            ErrorReport::new(
                PgSqlErrorCode::ERRCODE_UNDEFINED_TABLE,
                format!("table {source} does not exist"),
                "nightowls",
            )
        })?;

        let mut user = pg_sys::InvalidOid;
        let mut context = 0;
        pg_sys::GetUserIdAndSecContext(&mut user, &mut context);
        pg_sys::SetUserIdAndSecContext(
            owner,
            context
                | pg_sys::SECURITY_LOCAL_USERID_CHANGE as i32
                | pg_sys::SECURITY_RESTRICTED_OPERATION as i32,
        );
        let level = pg_sys::NewGUCNestLevel();
        let answer = run(&statement, arguments);
        // Whatever the statement has set is undone.
        pg_sys::AtEOXact_GUC(false, level);
        pg_sys::SetUserIdAndSecContext(user, context);
        answer
    }
}

/// The owner of a relation.
unsafe fn owner_of(relation: pg_sys::Oid) -> Option<pg_sys::Oid> {
    // SAFETY: an unknown oid gives a null pointer; the tuple is released.
    unsafe {
        let tuple = pg_sys::SearchSysCache1(
            pg_sys::SysCacheIdentifier::RELOID as i32,
            pg_sys::Datum::from(relation),
        );
        if tuple.is_null() {
            return None;
        }
        let class = pg_sys::heap_tuple_get_struct::<pg_sys::FormData_pg_class>(tuple);
        let owner = (*class).relowner;
        pg_sys::ReleaseSysCache(tuple);
        Some(owner)
    }
}

/// The first column of the first row that a statement returns.
unsafe fn run(
    statement: &CStr,
    arguments: Option<pg_sys::Datum>,
) -> Result<Option<String>, ErrorReport> {
    // SAFETY: the plan and its rows live until SPI_finish, which an error does by itself.
    unsafe {
        if pg_sys::SPI_connect() != pg_sys::SPI_OK_CONNECT as i32 {
            return Err(internal("SPI_connect failed"));
        }
        let mut types = [pg_sys::TEXTARRAYOID];
        let plan = pg_sys::SPI_prepare(statement.as_ptr(), 1, types.as_mut_ptr());
        if plan.is_null() || !pg_sys::SPI_is_cursor_plan(plan) {
            pg_sys::SPI_finish();
            return Err(invalid("not one statement that returns rows"));
        }
        let mut values = [arguments.unwrap_or(pg_sys::Datum::from(0))];
        let nulls = [if arguments.is_some() { b' ' } else { b'n' } as std::ffi::c_char];
        pg_sys::SPI_execute_plan(plan, values.as_mut_ptr(), nulls.as_ptr(), false, 0);
        let mut answer = None;
        let table = pg_sys::SPI_tuptable;
        if !table.is_null() && pg_sys::SPI_processed > 0 {
            let text = pg_sys::SPI_getvalue(*(*table).vals, (*table).tupdesc, 1);
            if !text.is_null() {
                answer = Some(CStr::from_ptr(text).to_string_lossy().into_owned());
            }
        }
        pg_sys::SPI_finish();
        Ok(answer)
    }
}

/// Whether this install sends by itself.
#[pg_extern(sql = false)]
fn can_http() -> bool {
    true
}

/// Sends several requests and waits for their answers.
///
/// # Errors
///
/// SQLSTATE 22023 if they are no requests, 55000 if nightowls.ca_file is not valid, and those of an interrupt.
#[pg_extern(sql = false)]
fn http_post_all(requests: &str, max_ms: i32) -> Result<String, ErrorReport> {
    post_all(requests, max_ms)
}

/// As [`http_post_all`], in a procedure: commits first, and holds no snapshot meanwhile. [`http_answers`] has the answers.
///
/// # Errors
///
/// SQLSTATE 2D000 in a transaction block, and those of [`http_post_all`] and of a commit.
#[pg_extern(sql = false)]
fn http_exchange(
    requests: &str,
    max_ms: i32,
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<(), ErrorReport> {
    // The commit frees what the argument points at.
    let requests = requests.to_owned();
    // SAFETY: declared as procedure _http_exchange(text, integer).
    unsafe {
        let context = (*fcinfo).context.cast::<pg_sys::CallContext>();
        let atomic = context.is_null()
            || (*context).type_ != pg_sys::NodeTag::T_CallContext
            || (*context).atomic;
        let options = if atomic {
            0
        } else {
            pg_sys::SPI_OPT_NONATOMIC as i32
        };
        if pg_sys::SPI_connect_ext(options) != pg_sys::SPI_OK_CONNECT as i32 {
            return Err(internal("SPI_connect failed"));
        }
        pg_sys::SPI_commit();
        let answers = post_all(&requests, max_ms);
        if pg_sys::SPI_finish() != pg_sys::SPI_OK_FINISH as i32 {
            return Err(internal("SPI_finish failed"));
        }
        ANSWERS.set(Some(answers?));
    }
    Ok(())
}

/// What the last [`http_exchange`] brought; once.
#[pg_extern(sql = false)]
fn http_answers() -> Option<String> {
    ANSWERS.take()
}

fn post_all(requests: &str, max_ms: i32) -> Result<String, ErrorReport> {
    let client = match CLIENT.with_borrow(Clone::clone) {
        Some(client) => client,
        None => {
            let client = settings::client().map_err(|fault| {
                ErrorReport::new(
                    PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                    fault,
                    "nightowls",
                )
            })?;
            CLIENT.set(Some(client.clone()));
            client
        }
    };
    let longest = Duration::from_millis(u64::try_from(max_ms).unwrap_or(0));
    exchange(&client, settings::policy(), requests, longest, || {
        pgrx::check_for_interrupts!();
    })
    .map_err(invalid)
}
