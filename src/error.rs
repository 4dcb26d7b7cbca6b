//! Errors with their SQLSTATE fixed: one constructor for each that Rust raises.

use pgrx::PgSqlErrorCode;
use pgrx::pg_sys::panic::ErrorReport;

fn report(code: PgSqlErrorCode, message: impl Into<String>) -> ErrorReport {
    ErrorReport::new(code, message.into(), "nightowls")
}

/// 22023: an argument that cannot be right.
pub fn invalid(message: impl Into<String>) -> ErrorReport {
    report(PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE, message)
}

/// 22004: an argument that must not be null.
pub fn null_argument(name: &str) -> ErrorReport {
    report(
        PgSqlErrorCode::ERRCODE_NULL_VALUE_NOT_ALLOWED,
        format!("{name} must not be null"),
    )
}

/// 22003: a number beyond what numeric can hold.
pub fn out_of_range(message: impl Into<String>) -> ErrorReport {
    report(PgSqlErrorCode::ERRCODE_NUMERIC_VALUE_OUT_OF_RANGE, message)
}

/// 22021: a text that is not in the encoding it should be in.
pub fn not_in_repertoire(message: impl Into<String>) -> ErrorReport {
    report(PgSqlErrorCode::ERRCODE_CHARACTER_NOT_IN_REPERTOIRE, message)
}

/// 55000: something must be put right first.
pub fn not_ready(message: impl Into<String>) -> ErrorReport {
    report(
        PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
        message,
    )
}

/// 54000: more than a limit allows.
pub fn limit_exceeded(message: impl Into<String>) -> ErrorReport {
    report(PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED, message)
}

/// XX000: a bug of ours, or a function called by hand that is only for aggregates.
pub fn internal(message: impl Into<String>) -> ErrorReport {
    report(PgSqlErrorCode::ERRCODE_INTERNAL_ERROR, message)
}
