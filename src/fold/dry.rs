//! A dry run: events that are JSON themselves.

use std::borrow::Cow;
use std::fmt;

use super::Decimal;
use super::apply::{Event, FoldError, State};
use super::json::Json;
use super::reducer::Reducer;

/// Why a dry run stops.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DryError {
    /// An event is not one.
    Event(InvalidEvent),
    /// An event does not fit.
    Fold(FoldError),
}

/// Why an event is refused. Displays as the message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidEvent {
    /// The place among the events, as a path.
    pub place: String,
    /// What is expected there.
    pub detail: String,
}

impl fmt::Display for InvalidEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "event is not valid at {}", self.place)
    }
}

/// Folds `events` into `state`. `before_each` is called before each event.
///
/// # Errors
///
/// [`DryError`] for the first event that is not valid or does not fit.
pub fn fold(
    reducer: &Reducer,
    mut state: State,
    events: &[Json<'_>],
    mut before_each: impl FnMut(),
) -> Result<State, DryError> {
    for (index, event) in events.iter().enumerate() {
        before_each();
        let event = read_event(event, index).map_err(DryError::Event)?;
        reducer.apply(&mut state, &event).map_err(DryError::Fold)?;
    }
    Ok(state)
}

fn read_event<'a>(json: &'a Json<'a>, index: usize) -> Result<Event<'a>, InvalidEvent> {
    let refuse = |key: &str, detail: String| InvalidEvent {
        place: format!("events[{index}]{key}"),
        detail,
    };
    let Json::Object(event) = json else {
        return Err(refuse(
            "",
            format!("Expected an object, found {}.", json.kind()),
        ));
    };
    // What is null is not there.
    let get = |key: &str| event.get(key).filter(|value| **value != Json::Null);
    let text = |key: &str| match get(key) {
        None => Ok(None),
        Some(Json::String(text)) => Ok(Some(Cow::Borrowed(text.as_ref()))),
        Some(other) => Err(refuse(
            &format!(".{key}"),
            format!("Expected a string, found {}.", other.kind()),
        )),
    };
    let number = |key: &str| match get(key) {
        None => Ok(None),
        Some(Json::Number(Decimal::Small { digits, scale: 0 })) => Ok(Some(*digits)),
        Some(_) => Err(refuse(
            &format!(".{key}"),
            "Expected a whole number of at most 18 digits.".to_owned(),
        )),
    };

    let event_type = match event.get("event_type") {
        None => return Err(refuse("", "The key \"event_type\" is missing.".to_owned())),
        Some(Json::String(text)) => Cow::Borrowed(text.as_ref()),
        Some(other) => {
            let detail = format!("Expected a string, found {}.", other.kind());
            return Err(refuse(".event_type", detail));
        }
    };
    let aggregate_type = text("aggregate_type")?;
    let aggregate_id = text("aggregate_id")?;
    let version = number("version")?;
    let position = number("position")?;
    let event_id = match text("event_id")? {
        None => None,
        Some(text) => Some(
            read_uuid(&text).ok_or_else(|| refuse(".event_id", "Expected a UUID.".to_owned()))?,
        ),
    };
    let created_at = match text("created_at")? {
        None => None,
        Some(text) => Some(read_time(&text).ok_or_else(|| {
            let detail = "Expected a time with its zone, such as \"2030-01-31T12:00:00Z\".";
            refuse(".created_at", detail.to_owned())
        })?),
    };

    Ok(Event {
        event_type,
        aggregate_type,
        aggregate_id,
        version,
        position,
        event_id,
        created_at,
        payload: Some(
            event
                .get("payload")
                .cloned()
                .unwrap_or_else(|| Json::Object(Default::default())),
        ),
        metadata: event.get("metadata").cloned().unwrap_or(Json::Null),
    })
}

/// Reads 8-4-4-4-12 hexadecimal digits.
fn read_uuid(text: &str) -> Option<[u8; 16]> {
    let groups: Vec<&str> = text.split('-').collect();
    if !groups.iter().map(|group| group.len()).eq([8, 4, 4, 4, 12]) {
        return None;
    }
    let digits = groups.concat();
    if !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    u128::from_str_radix(&digits, 16)
        .ok()
        .map(u128::to_be_bytes)
}

/// Reads a time of ISO 8601 with its zone, as microseconds since 2000-01-01 UTC.
fn read_time(text: &str) -> Option<i64> {
    let (date, rest) = text.split_at_checked(10)?;
    let (clock, rest) = rest.strip_prefix(['T', ' '])?.split_at_checked(8)?;
    let (fraction, zone) = match rest.strip_prefix('.') {
        None => (0, rest),
        Some(rest) => {
            let end = rest.find(|byte: char| !byte.is_ascii_digit())?;
            let (digits, zone) = rest.split_at(end);
            if digits.is_empty() {
                return None;
            }
            (numbers(&format!("{digits:0<6}"), [6], '.')?[0], zone)
        }
    };

    let [year, month, day] = numbers(date, [4, 2, 2], '-')?;
    let [hour, minute, second] = numbers(clock, [2, 2, 2], ':')?;
    let is_leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let last_day = match month {
        2 => 28 + i64::from(is_leap),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    };
    let is_date = year >= 1 && (1..=12).contains(&month) && (1..=last_day).contains(&day);
    if !is_date || hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    let east = match zone.strip_prefix(['+', '-']) {
        None if zone == "Z" => 0,
        None => return None,
        Some(offset) => {
            let [hours, minutes] = match offset.len() {
                2 => [numbers(offset, [2], ':')?[0], 0],
                _ => numbers(offset, [2, 2], ':')?,
            };
            // Postgres knows no zone farther away.
            if hours > 15 || minutes > 59 {
                return None;
            }
            let seconds = hours * 3_600 + minutes * 60;
            if zone.starts_with('-') {
                -seconds
            } else {
                seconds
            }
        }
    };

    // Days before the year, with March as its first month, and before the month.
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1;
    let seconds = (days - 730_425) * 86_400 + hour * 3_600 + minute * 60 + second - east;
    Some(seconds * 1_000_000 + fraction)
}

/// Reads numbers of so many digits each, with a character between them.
fn numbers<const N: usize>(text: &str, widths: [usize; N], between: char) -> Option<[i64; N]> {
    let mut parts = text.split(between);
    let mut numbers = [0; N];
    for (number, width) in numbers.iter_mut().zip(widths) {
        let part = parts.next()?;
        if part.len() != width || !part.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        *number = part.parse().ok()?;
    }
    parts.next().is_none().then_some(numbers)
}

#[cfg(test)]
mod tests {
    use super::super::json::MAX_DEPTH;
    use super::*;

    /// Folds and gives the state's text, or the error with its detail.
    fn run(reducer: &str, state: Option<&str>, events: &str) -> Result<String, String> {
        let parse = |text| Json::parse(text, MAX_DEPTH).expect("JSON");
        let reducer = Reducer::read(&parse(reducer)).expect("a reducer");
        let state = match state.map(parse) {
            Some(Json::Object(state)) => state.detach(),
            None => reducer.initial.clone(),
            other => panic!("{other:?}"),
        };
        let Json::Array(events) = parse(events) else {
            panic!("an array")
        };
        match fold(&reducer, Some(state), &events, || ()) {
            Ok(None) => Ok("null".to_owned()),
            Ok(Some(state)) => {
                let mut text = String::new();
                state.write(&mut text);
                Ok(text)
            }
            Err(DryError::Event(invalid)) => Err(format!("{invalid} | {}", invalid.detail)),
            Err(DryError::Fold(error)) => Err(match &error {
                FoldError::Mismatch { detail, .. } => format!("{error} | {detail}"),
                FoldError::Overflow => error.to_string(),
            }),
        }
    }

    /// Runs `op` alone on `state`, with `payload`.
    fn op(op: &str, state: &str, payload: &str) -> Result<String, String> {
        run(
            &format!(r#"{{"otherwise":[{op}]}}"#),
            Some(state),
            &format!(r#"[{{"event_type":"e","version":7,"payload":{payload}}}]"#),
        )
    }

    #[test]
    fn every_op_does_what_it_says() {
        for (what, state, payload, result) in [
            (
                r#"{"op":"set","path":"a","value":"$.v"}"#,
                "{}",
                r#"{"v":[1]}"#,
                r#"{"a":[1]}"#,
            ),
            (r#"{"op":"set","path":"a","value":"$.v"}"#, "{}", "{}", "{}"),
            (
                r#"{"op":"set","path":"a.b","value":null}"#,
                r#"{"a":null}"#,
                "{}",
                r#"{"a":{"b":null}}"#,
            ),
            (
                r#"{"op":"set","path":"a","value":{"literal":"$"}}"#,
                "{}",
                "{}",
                r#"{"a":"$"}"#,
            ),
            (
                r#"{"op":"set","path":"a","value":"$.x.-1"}"#,
                "{}",
                r#"{"x":[1,2]}"#,
                r#"{"a":2}"#,
            ),
            (r#"{"op":"add","path":"a"}"#, "{}", "{}", r#"{"a":1}"#),
            (
                r#"{"op":"add","path":"a","value":"$.v"}"#,
                r#"{"a":1.10}"#,
                r#"{"v":1}"#,
                r#"{"a":2.10}"#,
            ),
            (
                r#"{"op":"add","path":"a","value":"$.v"}"#,
                r#"{"a":1}"#,
                r#"{"v":null}"#,
                r#"{"a":1}"#,
            ),
            (
                r#"{"op":"min","path":"a","value":"$.v"}"#,
                r#"{"a":1.0}"#,
                r#"{"v":1.00}"#,
                r#"{"a":1.0}"#,
            ),
            (
                r#"{"op":"max","path":"a","value":"$.v"}"#,
                r#"{"a":"b"}"#,
                r#"{"v":"ä"}"#,
                r#"{"a":"ä"}"#,
            ),
            (
                r#"{"op":"push","path":"a","value":"$"}"#,
                r#"{"a":null}"#,
                "1",
                r#"{"a":[1]}"#,
            ),
            (
                r#"{"op":"put","path":"a","key":"$.k","value":1}"#,
                "{}",
                r#"{"k":1.50}"#,
                r#"{"a":{"1.50":1}}"#,
            ),
            (
                r#"{"op":"put","path":"a","key":"$.k","value":1}"#,
                "{}",
                r#"{"k":null}"#,
                "{}",
            ),
            (
                r#"{"op":"drop","path":"a","key":"k"}"#,
                r#"{"a":{"k":1}}"#,
                "{}",
                r#"{"a":{}}"#,
            ),
            (
                r#"{"op":"drop","path":"a","key":"k"}"#,
                r#"{"a":[1]}"#,
                "{}",
                r#"{"a":[1]}"#,
            ),
            (
                r#"{"op":"remove","path":"a.0"}"#,
                r#"{"a":[1]}"#,
                "{}",
                r#"{"a":[1]}"#,
            ),
            (
                r#"{"op":"merge","value":"$"}"#,
                r#"{"a":1}"#,
                r#"{"a":null,"b":{"c":null}}"#,
                r#"{"b":{}}"#,
            ),
            (
                r#"{"op":"merge","path":"m","value":{}}"#,
                "{}",
                "{}",
                r#"{"m":{}}"#,
            ),
            (
                r#"{"op":"set","path":"a","value":"@.version"}"#,
                "{}",
                "{}",
                r#"{"a":7}"#,
            ),
            (
                r#"{"op":"set","path":"a","value":"@.event_id"}"#,
                "{}",
                "{}",
                r#"{"a":null}"#,
            ),
            (
                r#"{"op":"set","path":"a","value":"@.metadata"}"#,
                "{}",
                "{}",
                "{}",
            ),
        ] {
            assert_eq!(
                op(what, state, payload).as_deref(),
                Ok(result),
                "{what} on {state}"
            );
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        for (what, state, payload, reason) in [
            (
                r#"{"op":"add","path":"a.b"}"#,
                r#"{"a":{"b":"x"}}"#,
                "{}",
                r#"add at "a.b": the state holds a string there"#,
            ),
            (
                r#"{"op":"add","path":"a","value":"$"}"#,
                r#"{"a":"x"}"#,
                "[]",
                r#"add at "a": the value is an array"#,
            ),
            (
                r#"{"op":"set","path":"a.b.c","value":1}"#,
                r#"{"a":{"b":[]}}"#,
                "{}",
                r#"set at "a.b.c": the state holds an array at "a.b""#,
            ),
            (
                r#"{"op":"min","path":"a","value":"$"}"#,
                r#"{"a":"x"}"#,
                "1",
                r#"min at "a": the state holds a string there, the value is a number"#,
            ),
            (
                r#"{"op":"put","path":"a","key":"k","value":1}"#,
                r#"{"a":true}"#,
                "{}",
                r#"put at "a": the state holds a boolean there"#,
            ),
            (
                r#"{"op":"put","path":"a","key":"$","value":1}"#,
                "{}",
                "{}",
                r#"put at "a": the key is an object"#,
            ),
            (
                r#"{"op":"merge","value":"$"}"#,
                "{}",
                "null",
                "merge at the root: the value is null",
            ),
        ] {
            let error = op(what, state, payload).expect_err(what);
            assert_eq!(error, format!("cannot {reason} | Event \"e\", version 7."));
        }
    }

    #[test]
    fn a_tombstone_ends_a_state_and_the_next_op_starts_again() {
        let reducer = r#"{"initial":{"n":0},"on":{"add":[{"op":"add","path":"n"}],
            "end":[{"op":"tombstone"}],"touch":[{"op":"set","path":"x","value":"$.none"}]}}"#;
        let events = |types: &[&str]| {
            let events: Vec<_> = types
                .iter()
                .map(|t| format!(r#"{{"event_type":"{t}"}}"#))
                .collect();
            format!("[{}]", events.join(","))
        };
        for (types, result) in [
            (&["add", "add", "end"][..], "null"),
            (&["add", "end", "other"], "null"),
            (&["add", "end", "end", "add"], r#"{"n":1}"#),
            (&["add", "end", "touch"], r#"{"n":0}"#),
        ] {
            assert_eq!(run(reducer, None, &events(types)).as_deref(), Ok(result));
        }
    }

    #[test]
    fn events_are_checked_one_by_one() {
        for (events, place) in [
            ("[1]", "events[0]"),
            (r#"[{"event_type":"a"},{}]"#, "events[1]"),
            (r#"[{"event_type":1}]"#, "events[0].event_type"),
            (r#"[{"event_type":"a","version":1.0}]"#, "events[0].version"),
            (
                r#"[{"event_type":"a","event_id":"x"}]"#,
                "events[0].event_id",
            ),
            (
                r#"[{"event_type":"a","created_at":"now"}]"#,
                "events[0].created_at",
            ),
        ] {
            let error = run("{}", None, events).expect_err(events);
            assert!(
                error.starts_with(&format!("event is not valid at {place} | ")),
                "{error}"
            );
        }
    }

    #[test]
    fn only_times_with_a_zone_are_times() {
        for (text, microseconds) in [
            ("2000-01-01T00:00:00Z", 0),
            ("2000-01-01 02:00:00.5+02", 500_000),
            ("1999-12-31T18:30:00.000001-05:30", 1),
            ("2024-02-29T00:00:00Z", 762_480_000_000_000),
            ("0001-01-01T00:00:00Z", -63_082_281_600_000_000),
        ] {
            assert_eq!(read_time(text), Some(microseconds), "{text}");
        }
        for text in [
            "",
            "now",
            "2030-01-31",
            "2030-01-31T12:00:00",
            "2030-01-31T12:00:00.Z",
            "2030-01-31T12:00:00é",
            "2030-01-31T12:00:00.1234567Z",
            "2030-02-29T12:00:00Z",
            "2030-13-01T12:00:00Z",
            "0000-01-01T12:00:00Z",
            "2030-01-31T24:00:00Z",
            "2030-01-31T12:00:60Z",
            "2030-01-31T12:00:00+16",
            "2030-01-31T12:00:00+1",
            "+030-01-31T12:00:00Z",
            "2030-01-31T12:00:00+00:0é",
        ] {
            assert_eq!(read_time(text), None, "{text}");
        }
    }
}
