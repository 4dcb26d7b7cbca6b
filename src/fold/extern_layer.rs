//! The fold as Postgres calls it.
//!
//! User data crosses as text: a jsonb is written out and read by [`Json`], and
//! the state goes back the same way. What an aggregate keeps lives on Rust's heap
//! and is dropped with the aggregate's memory context, also when the query is
//! cancelled or the aggregate is run again. Whatever a row allocates lives in the
//! executor's context for that row.

use std::borrow::Cow;
use std::cell::RefCell;
use std::ffi::{CStr, CString};
use std::rc::Rc;

use pgrx::callconv::{BoxRet, FcInfo};
use pgrx::fcinfo::{direct_function_call_as_datum, pg_getarg_datum};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::pgrx_sql_entity_graph::metadata::{
    ArgumentError, ReturnsError, ReturnsRef, SqlMappingRef, SqlTranslatable, TypeOrigin,
};
use pgrx::prelude::*;
use pgrx::{Internal, PgMemoryContexts, varlena_to_byte_slice};

use super::apply::{Event, FoldError, State};
use super::dry::{self, DryError};
use super::json::{Json, MAX_DEPTH, ParseError};
use super::reducer::{MAX_REDUCER_DEPTH, Reducer};
use crate::error::{
    internal, invalid, limit_exceeded, not_in_repertoire, null_argument, out_of_range,
};

/// How many reducers a backend keeps ready.
const CACHED_REDUCERS: usize = 32;

/// A reducer of more bytes is read anew each time, so that the cache stays small.
const CACHED_BYTES: usize = 64 * 1024;

/// A reducer with the jsonb bytes it was read from.
struct Compiled {
    bytes: Box<[u8]>,
    reducer: Reducer,
}

thread_local! {
    /// The reducers used last, the latest first.
    static COMPILED: RefCell<Vec<Rc<Compiled>>> = const { RefCell::new(Vec::new()) };
}

/// A jsonb on its way back to SQL; `None` is null.
pub(crate) struct Jsonb(pub(crate) Option<pg_sys::Datum>);

// SAFETY: the datum is a jsonb made in the calling context, or the null flag is set.
unsafe impl BoxRet for Jsonb {
    unsafe fn box_into<'fcx>(self, fcinfo: &mut FcInfo<'fcx>) -> pgrx::datum::Datum<'fcx> {
        match self.0 {
            // SAFETY: as above.
            Some(datum) => unsafe { fcinfo.return_raw_datum(datum) },
            None => fcinfo.return_null(),
        }
    }
}

// SAFETY: this only says that the SQL name is jsonb.
unsafe impl SqlTranslatable for Jsonb {
    const TYPE_IDENT: &'static str = pgrx::pgrx_resolved_type!(Jsonb);
    const TYPE_ORIGIN: TypeOrigin = TypeOrigin::External;
    const ARGUMENT_SQL: Result<SqlMappingRef, ArgumentError> = Ok(SqlMappingRef::literal("jsonb"));
    const RETURN_SQL: Result<ReturnsRef, ReturnsError> =
        Ok(ReturnsRef::One(SqlMappingRef::literal("jsonb")));
}

impl From<FoldError> for ErrorReport {
    fn from(error: FoldError) -> Self {
        let message = error.to_string();
        match error {
            FoldError::Mismatch { detail, .. } => invalid(message).set_detail(detail),
            FoldError::Overflow => out_of_range(message),
        }
    }
}

/// Refuses a reducer that is not valid.
///
/// # Errors
///
/// SQLSTATE 22023 names the place at fault, 22004 if the reducer is null, 54000
/// if it is nested too deeply.
#[pg_extern(sql = false)]
fn check_reducer(fcinfo: pg_sys::FunctionCallInfo) -> Result<(), ErrorReport> {
    // SAFETY: declared as check_reducer(jsonb).
    unsafe { compiled(argument(fcinfo, 0)) }.map(|_| ())
}

/// Folds an array of events into a state: a dry run.
///
/// # Errors
///
/// SQLSTATE 22023 if an argument is not valid or an event does not fit, 22003 if a
/// number overflows, 22004 for a null, 54000 if something is nested too deeply.
#[pg_extern(sql = false)]
fn fold_state(fcinfo: pg_sys::FunctionCallInfo) -> Result<Jsonb, ErrorReport> {
    // SAFETY: declared as fold_state(jsonb, jsonb, jsonb).
    unsafe {
        let compiled = compiled(argument(fcinfo, 0))?;
        let Some(events) = argument(fcinfo, 2) else {
            return Err(null_argument("events"));
        };
        let state = match argument(fcinfo, 1) {
            None => compiled.reducer.initial.clone(),
            Some(state) => match parse(&jsonb_text(state)?, "state", MAX_DEPTH)? {
                Json::Object(state) => state.detach(),
                other => {
                    return Err(invalid("state must be a JSON object")
                        .set_detail(format!("Found {}.", other.kind())));
                }
            },
        };
        let text = jsonb_text(events)?;
        let events = match parse(&text, "events", MAX_DEPTH)? {
            Json::Array(events) => events,
            other => {
                return Err(invalid("events must be a JSON array")
                    .set_detail(format!("Found {}.", other.kind())));
            }
        };

        let folded = dry::fold(&compiled.reducer, Some(state), &events, || {
            pgrx::check_for_interrupts!();
        });
        match folded {
            Ok(state) => jsonb(&state),
            Err(DryError::Fold(error)) => Err(error.into()),
            Err(DryError::Event(event)) => Err(invalid(event.to_string()).set_detail(event.detail)),
        }
    }
}

/// What an aggregate keeps from row to row.
struct Progress {
    compiled: Rc<Compiled>,
    state: State,
    /// How an event's row is laid out; only for rows that come whole.
    layout: Option<Layout>,
}

/// Folds a row given column by column.
///
/// # Errors
///
/// SQLSTATE 22023 if the event does not fit, 22003 if a number overflows.
#[pg_extern(sql = false)]
fn fold_rows_step(fcinfo: pg_sys::FunctionCallInfo) -> Result<Internal, ErrorReport> {
    // SAFETY: declared with the arguments of nightowls._fold_rows() after its state.
    unsafe {
        let progress = match argument(fcinfo, 0) {
            Some(progress) => progress,
            None => {
                let compiled = compiled(argument(fcinfo, 1))?;
                let state = base(argument(fcinfo, 2))?;
                start(
                    fcinfo,
                    Progress {
                        compiled,
                        state,
                        layout: None,
                    },
                )?
            }
        };
        let Progress {
            compiled, state, ..
        } = &mut *progress.cast_mut_ptr::<Progress>();
        Row::arguments(fcinfo, 3).fold(&compiled.reducer, state)?;
        Ok(Internal::from(Some(progress)))
    }
}

/// Folds one row given column by column, outside of an aggregate.
///
/// # Errors
///
/// As [`fold_rows_step`].
#[pg_extern(sql = false)]
fn fold_row(fcinfo: pg_sys::FunctionCallInfo) -> Result<Jsonb, ErrorReport> {
    // SAFETY: declared with the arguments of nightowls._fold_rows().
    unsafe {
        let compiled = compiled(argument(fcinfo, 0))?;
        let mut state = base(argument(fcinfo, 1))?;
        Row::arguments(fcinfo, 2).fold(&compiled.reducer, &mut state)?;
        jsonb(&state)
    }
}

/// The state to start from; null is a tombstone.
///
/// # Safety
///
/// The datum must be a jsonb.
unsafe fn base(base: Option<pg_sys::Datum>) -> Result<State, ErrorReport> {
    let Some(base) = base else { return Ok(None) };
    // SAFETY: by this function's own condition.
    match parse(&unsafe { jsonb_text(base) }?, "state", MAX_DEPTH)? {
        Json::Object(base) => Ok(Some(base.detach())),
        _ => Err(invalid("state must be a JSON object")),
    }
}

/// Folds a whole row of nightowls.events.
///
/// # Errors
///
/// As [`fold_rows_step`]; also 22023 if the reducer is not valid or changes, 22004
/// if it is null.
#[pg_extern(sql = false)]
fn fold_events_step(fcinfo: pg_sys::FunctionCallInfo) -> Result<Internal, ErrorReport> {
    // SAFETY: declared as (internal, jsonb, nightowls.events).
    unsafe {
        let progress = argument(fcinfo, 0);
        let Some(event) = argument(fcinfo, 2) else {
            return Ok(Internal::from(progress));
        };
        let header =
            pg_sys::pg_detoast_datum(event.cast_mut_ptr()).cast::<pg_sys::HeapTupleHeaderData>();

        let layout = match progress {
            Some(progress) => (*progress.cast_mut_ptr::<Progress>()).layout.take(),
            None => None,
        };
        let layout = match layout {
            Some(layout) if layout.fits(header) => layout,
            _ => Layout::of(fcinfo, header)?,
        };
        let row = layout.row(header);
        if row.event_type.is_none() {
            if let Some(progress) = progress {
                (*progress.cast_mut_ptr::<Progress>()).layout = Some(layout);
            }
            return Ok(Internal::from(progress));
        }

        let progress = match progress {
            None => {
                let compiled = compiled(argument(fcinfo, 1))?;
                let state = Some(compiled.reducer.initial.clone());
                start(
                    fcinfo,
                    Progress {
                        compiled,
                        state,
                        layout: None,
                    },
                )?
            }
            Some(progress) => progress,
        };
        let Progress {
            compiled,
            state,
            layout: kept,
        } = &mut *progress.cast_mut_ptr::<Progress>();
        *kept = Some(layout);
        if !compiled.is(argument(fcinfo, 1)) {
            return Err(invalid("reducer must be the same for every event"));
        }
        row.fold(&compiled.reducer, state)?;
        Ok(Internal::from(Some(progress)))
    }
}

/// The state an aggregate ends with.
///
/// # Errors
///
/// SQLSTATE 54000 if it is larger than jsonb allows.
#[pg_extern(sql = false)]
fn fold_end(fcinfo: pg_sys::FunctionCallInfo) -> Result<Jsonb, ErrorReport> {
    // SAFETY: declared as (internal), strict.
    unsafe {
        match argument(fcinfo, 0) {
            None => Ok(Jsonb(None)),
            Some(progress) => jsonb(&(*progress.cast_mut_ptr::<Progress>()).state),
        }
    }
}

/// Hands `progress` to the aggregate's memory context.
///
/// # Safety
///
/// `fcinfo` must be that of the call.
unsafe fn start(
    fcinfo: pg_sys::FunctionCallInfo,
    progress: Progress,
) -> Result<pg_sys::Datum, ErrorReport> {
    let mut context = std::ptr::null_mut();
    // SAFETY: both pointers are valid.
    if unsafe { pg_sys::AggCheckCallContext(fcinfo, &mut context) } == 0 {
        return Err(internal("called outside of an aggregate"));
    }
    Ok(PgMemoryContexts::For(context)
        .leak_and_drop_on_delete(progress)
        .into())
}

/// An event's columns, as they are stored.
struct Row {
    event_type: Option<pg_sys::Datum>,
    aggregate_type: Option<pg_sys::Datum>,
    aggregate_id: Option<pg_sys::Datum>,
    version: Option<pg_sys::Datum>,
    position: Option<pg_sys::Datum>,
    event_id: Option<pg_sys::Datum>,
    created_at: Option<pg_sys::Datum>,
    payload: Option<pg_sys::Datum>,
    metadata: Option<pg_sys::Datum>,
}

impl Row {
    /// The row in the arguments from `first` on.
    ///
    /// # Safety
    ///
    /// `fcinfo` must be that of a call with the columns in that place and order.
    unsafe fn arguments(fcinfo: pg_sys::FunctionCallInfo, first: usize) -> Self {
        // SAFETY: by this function's own condition.
        let column = |number| unsafe { argument(fcinfo, first + number) };
        Self {
            event_type: column(0),
            aggregate_type: column(1),
            aggregate_id: column(2),
            version: column(3),
            position: column(4),
            event_id: column(5),
            created_at: column(6),
            payload: column(7),
            metadata: column(8),
        }
    }

    /// Folds the row into `state`. Only what the ops look at is read.
    ///
    /// # Safety
    ///
    /// Each datum must be of its column's type.
    unsafe fn fold(&self, reducer: &Reducer, state: &mut State) -> Result<(), ErrorReport> {
        // SAFETY: by this function's own condition.
        unsafe {
            let Some(event_type) = self.event_type else {
                return Ok(());
            };
            let event_type = text(event_type)?;
            let ops = reducer.ops(&event_type);
            if ops.list.is_empty() {
                return Ok(());
            }

            let payload = self
                .payload
                .filter(|_| ops.reads_payload)
                .map(|datum| jsonb_text(datum));
            let payload = payload.transpose()?;
            let metadata = self
                .metadata
                .filter(|_| ops.reads_metadata)
                .map(|datum| jsonb_text(datum));
            let metadata = metadata.transpose()?;
            let optional =
                |datum: Option<pg_sys::Datum>| datum.map(|datum| text(datum)).transpose();
            let event = Event {
                event_type,
                aggregate_type: optional(self.aggregate_type)?,
                aggregate_id: optional(self.aggregate_id)?,
                version: self.version.map(|datum| datum.value() as i64),
                position: self.position.map(|datum| datum.value() as i64),
                event_id: self.event_id.map(|datum| *datum.cast_mut_ptr::<[u8; 16]>()),
                created_at: self.created_at.map(|datum| datum.value() as i64),
                payload: match &payload {
                    Some(text) => Some(parse(text, "payload", MAX_DEPTH)?),
                    None => None,
                },
                metadata: match &metadata {
                    Some(text) => parse(text, "metadata", MAX_DEPTH)?,
                    None => Json::Null,
                },
            };
            Ok(reducer.apply(state, &event)?)
        }
    }
}

/// Where the columns of an event's row are.
struct Layout {
    /// A copy in the aggregate's context.
    descriptor: pg_sys::TupleDesc,
    row_type: (pg_sys::Oid, i32),
    /// The columns of [`Row`], counted from 0.
    columns: [usize; 9],
}

impl Layout {
    /// # Safety
    ///
    /// `header` must be a composite datum, `fcinfo` that of an aggregate's call.
    unsafe fn of(
        fcinfo: pg_sys::FunctionCallInfo,
        header: pg_sys::HeapTupleHeader,
    ) -> Result<Self, ErrorReport> {
        const COLUMNS: [&CStr; 9] = [
            c"event_type",
            c"aggregate_type",
            c"aggregate_id",
            c"version",
            c"position",
            c"event_id",
            c"created_at",
            c"payload",
            c"metadata",
        ];
        let mut context = std::ptr::null_mut();
        // SAFETY: both pointers are valid, and so is the descriptor looked up.
        unsafe {
            if pg_sys::AggCheckCallContext(fcinfo, &mut context) == 0 {
                return Err(internal("called outside of an aggregate"));
            }
            let row_type = Self::type_of(header);
            let descriptor = PgMemoryContexts::For(context)
                .switch_to(|_| pg_sys::lookup_rowtype_tupdesc_copy(row_type.0, row_type.1));
            let mut columns = [0; 9];
            for (column, name) in columns.iter_mut().zip(COLUMNS) {
                let number = pg_sys::SPI_fnumber(descriptor, name.as_ptr());
                *column = usize::try_from(number)
                    .ok()
                    .and_then(|number| number.checked_sub(1))
                    .ok_or_else(|| internal(format!("an event has no column {name:?}")))?;
            }
            Ok(Self {
                descriptor,
                row_type,
                columns,
            })
        }
    }

    /// # Safety
    ///
    /// `header` must be a composite datum.
    unsafe fn type_of(header: pg_sys::HeapTupleHeader) -> (pg_sys::Oid, i32) {
        // SAFETY: a composite datum says its type there.
        unsafe {
            let datum = (*header).t_choice.t_datum;
            (datum.datum_typeid, datum.datum_typmod)
        }
    }

    /// # Safety
    ///
    /// As for [`Self::type_of`].
    unsafe fn fits(&self, header: pg_sys::HeapTupleHeader) -> bool {
        // SAFETY: by this function's own condition.
        unsafe { Self::type_of(header) == self.row_type }
    }

    /// Takes a row apart.
    ///
    /// # Safety
    ///
    /// `header` must be a composite datum that fits.
    unsafe fn row(&self, header: pg_sys::HeapTupleHeader) -> Row {
        /// More columns than an event will ever have, in a row on the stack.
        const ROOM: usize = 32;
        // SAFETY: the arrays have room for every column of the descriptor.
        unsafe {
            let count = (*self.descriptor).natts as usize;
            let mut values = vec![pg_sys::Datum::null(); count.max(ROOM)];
            let mut nulls = vec![true; count.max(ROOM)];
            let mut tuple = pg_sys::HeapTupleData {
                t_len: pgrx::varsize_any(header.cast()) as u32,
                t_data: header,
                ..Default::default()
            };
            pg_sys::heap_deform_tuple(
                &mut tuple,
                self.descriptor,
                values.as_mut_ptr(),
                nulls.as_mut_ptr(),
            );
            let [a, b, c, d, e, f, g, h, i] = self
                .columns
                .map(|column| (!nulls[column]).then_some(values[column]));
            Row {
                event_type: a,
                aggregate_type: b,
                aggregate_id: c,
                version: d,
                position: e,
                event_id: f,
                created_at: g,
                payload: h,
                metadata: i,
            }
        }
    }
}

/// An argument, if it is not null.
///
/// # Safety
///
/// `fcinfo` must be that of a call with so many arguments.
pub(crate) unsafe fn argument(
    fcinfo: pg_sys::FunctionCallInfo,
    number: usize,
) -> Option<pg_sys::Datum> {
    // SAFETY: by this function's own condition.
    unsafe { pg_getarg_datum(fcinfo, number) }
}

impl Compiled {
    /// Whether a jsonb is the reducer this was read from.
    ///
    /// # Safety
    ///
    /// The datum must be a jsonb.
    unsafe fn is(&self, reducer: Option<pg_sys::Datum>) -> bool {
        // SAFETY: by this function's own condition; detoasting gives a valid varlena.
        unsafe {
            let Some(reducer) = reducer else { return false };
            let varlena = pg_sys::pg_detoast_datum_packed(reducer.cast_mut_ptr());
            varlena_to_byte_slice(varlena) == &*self.bytes
        }
    }
}

/// The reducer in a jsonb, from the cache or read anew.
///
/// # Errors
///
/// As [`check_reducer`].
///
/// # Safety
///
/// The datum must be a jsonb.
unsafe fn compiled(reducer: Option<pg_sys::Datum>) -> Result<Rc<Compiled>, ErrorReport> {
    let Some(reducer) = reducer else {
        return Err(null_argument("reducer"));
    };
    // SAFETY: detoasting gives a valid varlena, which lives as long as this call.
    let bytes =
        unsafe { varlena_to_byte_slice(pg_sys::pg_detoast_datum_packed(reducer.cast_mut_ptr())) };
    let cached = COMPILED.with_borrow_mut(|cache| {
        let index = cache
            .iter()
            .position(|compiled| &*compiled.bytes == bytes)?;
        cache[..=index].rotate_right(1);
        Some(Rc::clone(&cache[0]))
    });
    if let Some(cached) = cached {
        return Ok(cached);
    }

    // SAFETY: by this function's own condition.
    let text = unsafe { jsonb_text(reducer)? };
    let json = parse(&text, "reducer", MAX_REDUCER_DEPTH)?;
    let reducer = Reducer::read(&json).map_err(|fault| {
        let report = invalid(fault.to_string()).set_detail(fault.detail);
        match fault.hint {
            Some(hint) => report.set_hint(hint),
            None => report,
        }
    })?;
    let compiled = Rc::new(Compiled {
        bytes: bytes.into(),
        reducer,
    });
    if bytes.len() <= CACHED_BYTES {
        COMPILED.with_borrow_mut(|cache| {
            cache.truncate(CACHED_REDUCERS - 1);
            cache.insert(0, Rc::clone(&compiled));
        });
    }
    Ok(compiled)
}

fn parse<'a>(text: &'a str, what: &str, max_depth: usize) -> Result<Json<'a>, ErrorReport> {
    Json::parse(text, max_depth).map_err(|error| match error {
        ParseError::TooDeep => limit_exceeded(format!("{what} is nested too deeply"))
            .set_detail(format!("At most {max_depth} levels are allowed.")),
        ParseError::Malformed => internal(format!("{what} cannot be read")),
    })
}

/// A jsonb's text, in the current memory context or copied from it.
///
/// # Safety
///
/// The datum must be a jsonb; the text must not outlive the memory context.
pub(crate) unsafe fn jsonb_text<'a>(datum: pg_sys::Datum) -> Result<Cow<'a, str>, ErrorReport> {
    // SAFETY: a detoasted jsonb has its four-byte header before its root.
    unsafe {
        let jsonb = pg_sys::pg_detoast_datum(datum.cast_mut_ptr()).cast::<pg_sys::Jsonb>();
        let size = pgrx::varsize_any(jsonb.cast());
        let written =
            pg_sys::JsonbToCString(std::ptr::null_mut(), &raw mut (*jsonb).root, size as i32);
        to_utf8(CStr::from_ptr(written).to_bytes())
    }
}

/// A text datum as a string.
///
/// # Safety
///
/// As for [`jsonb_text`].
unsafe fn text<'a>(datum: pg_sys::Datum) -> Result<Cow<'a, str>, ErrorReport> {
    // SAFETY: detoasting gives a valid varlena.
    unsafe {
        to_utf8(varlena_to_byte_slice(pg_sys::pg_detoast_datum_packed(
            datum.cast_mut_ptr(),
        )))
    }
}

/// Bytes in the server's encoding as a string.
fn to_utf8<'a>(bytes: &'a [u8]) -> Result<Cow<'a, str>, ErrorReport> {
    let utf8 = pg_sys::pg_enc::PG_UTF8 as i32;
    // SAFETY: the pointer and the length are those of a slice; what comes back is
    // the same pointer or a string of its own, with a zero at its end.
    let bytes = unsafe {
        if pg_sys::GetDatabaseEncoding() == utf8 {
            bytes
        } else {
            let converted =
                pg_sys::pg_server_to_any(bytes.as_ptr().cast(), bytes.len() as i32, utf8);
            if converted.cast_const().cast() == bytes.as_ptr() {
                bytes
            } else {
                CStr::from_ptr(converted).to_bytes()
            }
        }
    };
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(Cow::Borrowed(text)),
        Err(_) => Err(not_in_repertoire(
            "a text is not valid in the server's encoding",
        )),
    }
}

/// A state as a jsonb.
///
/// # Errors
///
/// Those of jsonb's input: 54000 if it is too large.
fn jsonb(state: &State) -> Result<Jsonb, ErrorReport> {
    let Some(state) = state else {
        return Ok(Jsonb(None));
    };
    let mut text = String::new();
    state.write(&mut text);
    jsonb_of(text)
}

/// The jsonb that `text` is.
pub(crate) fn jsonb_of(text: String) -> Result<Jsonb, ErrorReport> {
    let length = text.len();
    let text = CString::new(text).map_err(|_| internal("a state holds a zero byte"))?;
    // SAFETY: jsonb_in() takes a C string in the server's encoding.
    unsafe {
        let utf8 = pg_sys::pg_enc::PG_UTF8 as i32;
        let text = pg_sys::pg_any_to_server(text.as_ptr(), length as i32, utf8);
        Ok(Jsonb(direct_function_call_as_datum(
            pg_sys::jsonb_in,
            &[Some(text.into())],
        )))
    }
}
