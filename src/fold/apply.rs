//! Running a reducer's ops on one event.

use std::borrow::Cow;
use std::fmt;

use super::decimal::Overflow;
use super::json::{Json, Object};
use super::reducer::{Action, Field, Op, Reducer, Source};

/// A state: an object, or nothing after a tombstone.
pub type State = Option<Object<'static>>;

/// One event, as far as ops can see it.
#[derive(Debug)]
pub struct Event<'a> {
    /// Its type.
    pub event_type: Cow<'a, str>,
    /// Its aggregate's type.
    pub aggregate_type: Option<Cow<'a, str>>,
    /// Its aggregate's id.
    pub aggregate_id: Option<Cow<'a, str>>,
    /// Its number within the aggregate.
    pub version: Option<i64>,
    /// Its number within the log.
    pub position: Option<i64>,
    /// The caller's key for it.
    pub event_id: Option<[u8; 16]>,
    /// When it was written, in microseconds since 2000-01-01 00:00 UTC.
    pub created_at: Option<i64>,
    /// What happened.
    pub payload: Option<Json<'a>>,
    /// What is known beside it; null counts as absent.
    pub metadata: Json<'a>,
}

/// Why an event cannot be folded. Displays as the message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FoldError {
    /// An op does not fit the state or its value.
    Mismatch {
        /// The op's name.
        op: &'static str,
        /// Its path; none is the root.
        path: Vec<String>,
        /// What does not fit.
        reason: String,
        /// Names the event.
        detail: String,
    },
    /// A number grew beyond what numeric can hold.
    Overflow,
}

impl fmt::Display for FoldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mismatch {
                op, path, reason, ..
            } if path.is_empty() => {
                write!(f, "cannot {op} at the root: {reason}")
            }
            Self::Mismatch {
                op, path, reason, ..
            } => {
                write!(f, "cannot {op} at \"{}\": {reason}", path.join("."))
            }
            Self::Overflow => f.write_str("value overflows numeric format"),
        }
    }
}

/// Why an op stops, before op and event are named.
enum Refusal {
    Mismatch(String),
    Overflow,
}

impl From<Overflow> for Refusal {
    fn from(Overflow: Overflow) -> Self {
        Self::Overflow
    }
}

fn value_is<T>(value: &Json<'_>) -> Result<T, Refusal> {
    Err(Refusal::Mismatch(format!("the value is {}", value.kind())))
}

fn state_holds<T>(target: &Json<'_>) -> Result<T, Refusal> {
    Err(Refusal::Mismatch(format!(
        "the state holds {} there",
        target.kind()
    )))
}

impl Reducer {
    /// Folds one event into `state`.
    ///
    /// # Errors
    ///
    /// [`FoldError`] if an op does not fit; `state` is then of no use any more.
    pub fn apply(&self, state: &mut State, event: &Event<'_>) -> Result<(), FoldError> {
        for op in &self.ops(&event.event_type).list {
            if matches!(op.action, Action::Tombstone) {
                *state = None;
                continue;
            }
            let state = state.get_or_insert_with(|| self.initial.clone());
            op.apply(state, event).map_err(|refusal| match refusal {
                Refusal::Overflow => FoldError::Overflow,
                Refusal::Mismatch(reason) => {
                    let version = event.version.map(|version| format!(", version {version}"));
                    FoldError::Mismatch {
                        op: op.action.name(),
                        path: op.path.clone(),
                        reason,
                        detail: format!(
                            "Event \"{}\"{}.",
                            event.event_type,
                            version.unwrap_or_default()
                        ),
                    }
                }
            })?;
        }
        Ok(())
    }
}

impl Op {
    /// Runs the op. A value of the wrong type fails before the state is looked at.
    fn apply(&self, state: &mut Object<'static>, event: &Event<'_>) -> Result<(), Refusal> {
        match &self.action {
            Action::Set(source) => {
                if let Some(value) = event.resolve(source) {
                    *place(state, &self.path, None)? = value.detach();
                }
            }
            Action::Add(source) => {
                let Some(value) = event.resolve(source) else {
                    return Ok(());
                };
                let addend = match &*value {
                    Json::Null => return Ok(()),
                    Json::Number(addend) => addend,
                    other => return value_is(other),
                };
                let target = place(state, &self.path, None)?;
                *target = match target {
                    Json::Null => Json::Number(addend.clone()),
                    Json::Number(sum) => Json::Number(sum.add(addend)?),
                    other => return state_holds(other),
                };
            }
            Action::Min(source) => self.extreme(state, event, source, |new, old| new < old)?,
            Action::Max(source) => self.extreme(state, event, source, |new, old| new > old)?,
            Action::Push(source) => {
                let Some(value) = event.resolve(source) else {
                    return Ok(());
                };
                match place(state, &self.path, None)? {
                    Json::Array(elements) => elements.push(value.detach()),
                    target @ Json::Null => *target = Json::Array(vec![value.detach()]),
                    other => return state_holds(other),
                }
            }
            Action::Merge(source) => {
                let Some(value) = event.resolve(source) else {
                    return Ok(());
                };
                let Json::Object(patch) = &*value else {
                    return value_is(&value);
                };
                if self.path.is_empty() {
                    state.merge(patch);
                    return Ok(());
                }
                let target = place(state, &self.path, None)?;
                if *target == Json::Null {
                    *target = Json::Object(Object::default());
                }
                match target {
                    Json::Object(target) => target.merge(patch),
                    other => return state_holds(other),
                }
            }
            Action::Put { key, value } => {
                let Some(value) = event.resolve(value) else {
                    return Ok(());
                };
                let Some(key) = event.resolve_key(key)? else {
                    return Ok(());
                };
                *place(state, &self.path, Some(&key))? = value.detach();
            }
            Action::Drop { key } => {
                if let Some(key) = event.resolve_key(key)?
                    && let Some(object) = object_at(state, &self.path)
                {
                    object.remove(&key);
                }
            }
            Action::Remove => {
                if let Some((last, way)) = self.path.split_last()
                    && let Some(object) = object_at(state, way)
                {
                    object.remove(last);
                }
            }
            Action::Tombstone => unreachable!("a tombstone needs no state"),
        }
        Ok(())
    }

    /// Puts the value in the target's place if it is `better`.
    fn extreme(
        &self,
        state: &mut Object<'static>,
        event: &Event<'_>,
        source: &Source,
        better: impl FnOnce(Comparable<'_>, Comparable<'_>) -> bool,
    ) -> Result<(), Refusal> {
        let Some(value) = event.resolve(source) else {
            return Ok(());
        };
        let new = match &*value {
            Json::Null => return Ok(()),
            Json::Number(number) => Comparable::Number(number),
            Json::String(text) => Comparable::String(text),
            other => return value_is(other),
        };
        let target = place(state, &self.path, None)?;
        let old = match target {
            Json::Null => {
                *target = value.detach();
                return Ok(());
            }
            Json::Number(number) => Comparable::Number(number),
            Json::String(text) => Comparable::String(text),
            other => return state_holds(other),
        };
        if std::mem::discriminant(&new) != std::mem::discriminant(&old) {
            return Err(Refusal::Mismatch(format!(
                "the state holds {} there, the value is {}",
                target.kind(),
                value.kind()
            )));
        }
        if better(new, old) {
            *target = value.detach();
        }
        Ok(())
    }
}

/// Numbers by value, strings by bytes.
#[derive(PartialEq, PartialOrd)]
enum Comparable<'a> {
    Number(&'a super::Decimal),
    String(&'a str),
}

/// The place at `path`, or the one of `key` in the map there; it holds null if
/// there was nothing. Objects that are missing on the way are made.
fn place<'s>(
    state: &'s mut Object<'static>,
    path: &[String],
    key: Option<&str>,
) -> Result<&'s mut Json<'static>, Refusal> {
    let (last, way) = match key {
        Some(key) => (key, path),
        None => match path.split_last() {
            Some((last, way)) => (last.as_str(), way),
            None => unreachable!("only a merge has no path"),
        },
    };
    let mut object = state;
    for (level, segment) in way.iter().enumerate() {
        let next = object.entry(segment);
        if *next == Json::Null {
            *next = Json::Object(Object::default());
        }
        object = match next {
            Json::Object(next) => next,
            other if level + 1 == path.len() => return state_holds(other),
            other => {
                let (kind, way) = (other.kind(), path[..=level].join("."));
                return Err(Refusal::Mismatch(format!(
                    "the state holds {kind} at \"{way}\""
                )));
            }
        };
    }
    Ok(object.entry(last))
}

/// The object at `path`, if every step is one.
fn object_at<'s>(
    state: &'s mut Object<'static>,
    path: &[String],
) -> Option<&'s mut Object<'static>> {
    path.iter()
        .try_fold(state, |object, segment| match object.get_mut(segment) {
            Some(Json::Object(next)) => Some(next),
            _ => None,
        })
}

impl<'a> Event<'a> {
    /// The value of `source`, or `None` where the event has nothing.
    fn resolve<'e>(&'e self, source: &'e Source) -> Option<Cow<'e, Json<'a>>> {
        let text = |text: &Option<Cow<'a, str>>| text.clone().map(Json::String);
        let number = |number: Option<i64>| number.map(|number| Json::Number(number.into()));
        let value = match source {
            Source::Literal(value) => return Some(Cow::Borrowed(value)),
            Source::Payload(path) => return self.payload.as_ref()?.at(path).map(Cow::Borrowed),
            Source::Metadata(_) if self.metadata == Json::Null => None,
            Source::Metadata(path) => return self.metadata.at(path).map(Cow::Borrowed),
            Source::Envelope(field) => match field {
                Field::EventType => Some(Json::String(self.event_type.clone())),
                Field::AggregateType => text(&self.aggregate_type),
                Field::AggregateId => text(&self.aggregate_id),
                Field::Version => number(self.version),
                Field::Position => number(self.position),
                Field::EventId => Some(match &self.event_id {
                    Some(id) => Json::String(Cow::Owned(uuid_text(id))),
                    None => Json::Null,
                }),
                Field::CreatedAt => self
                    .created_at
                    .and_then(time_text)
                    .map(|text| Json::String(Cow::Owned(text))),
            },
        };
        value.map(Cow::Owned)
    }

    /// The key of `source`, or `None` where the event has none.
    fn resolve_key<'e>(&'e self, source: &'e Source) -> Result<Option<Cow<'e, str>>, Refusal> {
        let Some(key) = self.resolve(source) else {
            return Ok(None);
        };
        Ok(Some(match &*key {
            Json::Null => return Ok(None),
            Json::Bool(value) => Cow::Owned(value.to_string()),
            Json::Number(number) => Cow::Owned(number.to_string()),
            Json::String(text) => Cow::Owned(text.to_string()),
            other => {
                return Err(Refusal::Mismatch(format!("the key is {}", other.kind())));
            }
        }))
    }
}

fn uuid_text(id: &[u8; 16]) -> String {
    let hex = |bytes: &[u8]| {
        bytes
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>()
    };
    [
        hex(&id[..4]),
        hex(&id[4..6]),
        hex(&id[6..8]),
        hex(&id[8..10]),
        hex(&id[10..]),
    ]
    .join("-")
}

/// A time as to_char() writes it with `YYYY-MM-DD"T"HH24:MI:SS.US"Z"`; `None` for
/// the infinities.
fn time_text(microseconds: i64) -> Option<String> {
    if microseconds == i64::MIN || microseconds == i64::MAX {
        return None;
    }
    const DAY: i64 = 86_400_000_000;
    let (days, time) = (microseconds.div_euclid(DAY), microseconds.rem_euclid(DAY));

    // Days since 0000-03-01, so that a leap day ends its year. Eras of 400 years.
    let days = days + 730_425;
    let (era, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year + i64::from(month <= 2);
    // Before Christ to_char() counts years without a zero, and shows no sign.
    let year = if year <= 0 { 1 - year } else { year };

    let (seconds, fraction) = (time / 1_000_000, time % 1_000_000);
    let (hour, minute, second) = (seconds / 3_600, seconds / 60 % 60, seconds % 60);
    Some(format!(
        "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{fraction:06}Z"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_in_utc() {
        for (microseconds, text) in [
            (0, "2000-01-01T00:00:00.000000Z"),
            (-1, "1999-12-31T23:59:59.999999Z"),
            (759_801_599_123_456, "2024-01-28T23:59:59.123456Z"),
            (762_480_000_000_000, "2024-02-29T00:00:00.000000Z"),
            (-3_155_673_600_000_000, "1900-01-01T00:00:00.000000Z"),
            (-63_082_281_600_000_000, "0001-01-01T00:00:00.000000Z"),
            (-63_082_281_600_000_001, "0001-12-31T23:59:59.999999Z"),
        ] {
            assert_eq!(time_text(microseconds).as_deref(), Some(text));
        }
        assert_eq!(time_text(i64::MAX), None);
    }

    #[test]
    fn ids_are_written_as_uuids() {
        let id = 0x0123_4567_89ab_cdef_0123_4567_89ab_cdef_u128.to_be_bytes();
        assert_eq!(uuid_text(&id), "01234567-89ab-cdef-0123-456789abcdef");
    }
}
