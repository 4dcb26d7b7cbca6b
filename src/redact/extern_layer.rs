//! Redaction as Postgres calls it.

use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use super::Rules;
use crate::error::{invalid, limit_exceeded};
use crate::fold::extern_layer::{Jsonb, argument, jsonb_of, jsonb_text};
use crate::fold::json::{Json, ParseError};

/// As deep as an event may be.
const MAX_DEPTH: usize = 100;

/// Takes secrets out of a payload.
///
/// # Errors
///
/// SQLSTATE 22023 if the rules are not valid, 54000 if the payload is nested too deeply.
#[pg_extern(sql = false)]
fn redact(fcinfo: pg_sys::FunctionCallInfo) -> Result<Jsonb, ErrorReport> {
    // SAFETY: declared as redact(jsonb, jsonb); the texts live as long as the call.
    unsafe {
        let rules = match argument(fcinfo, 1) {
            None => Rules::default(),
            Some(rules) => Json::parse(&jsonb_text(rules)?, MAX_DEPTH)
                .ok()
                .and_then(|rules| Rules::parse(&rules))
                .ok_or_else(|| {
                    invalid("rules are not valid").set_hint(
                        "Rules are {\"keys\": [text, …], \"words\": [text, …], \"allow\": [text, …]}; all keys are optional, no text is empty.",
                    )
                })?,
        };
        let Some(payload) = argument(fcinfo, 0) else {
            return Ok(Jsonb(None));
        };
        let text = jsonb_text(payload)?;
        let mut value = Json::parse(&text, MAX_DEPTH).map_err(|error| match error {
            ParseError::TooDeep => limit_exceeded("payload is nested too deeply")
                .set_detail("At most 100 levels of objects and arrays are redacted."),
            ParseError::Malformed => crate::error::internal("jsonb wrote something else than JSON"),
        })?;
        if !rules.redact(&mut value) {
            return Ok(Jsonb(Some(payload)));
        }
        let mut out = String::with_capacity(text.len());
        value.write(&mut out);
        jsonb_of(out)
    }
}
