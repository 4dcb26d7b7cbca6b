//! Reading a reducer: what check_reducer() refuses, and what is left to run.

use std::collections::HashMap;
use std::fmt;

use super::json::{Json, Object};

/// How deep a reducer may be nested.
pub const MAX_REDUCER_DEPTH: usize = 100;

/// The most segments a path may have.
const MAX_SEGMENTS: usize = 32;

/// What may stand at either end of a segment only in quotes.
const WHITE_SPACE: [char; 6] = [' ', '\t', '\n', '\x0b', '\x0c', '\r'];

/// The type of an event that was erased, and of the one that says so: it ends a
/// state whatever the reducer.
const ERASED: &str = "nightowls.erased";

/// A reducer, ready to run.
#[derive(Debug, Default)]
pub struct Reducer {
    /// Where a state starts.
    pub initial: Object<'static>,
    on: HashMap<String, Ops>,
    otherwise: Ops,
}

/// What one event type does, and which parts of the event it looks at.
#[derive(Debug, Default)]
pub struct Ops {
    /// The ops, in order.
    pub list: Vec<Op>,
    /// Whether one refers to the payload.
    pub reads_payload: bool,
    /// Whether one refers to the metadata.
    pub reads_metadata: bool,
}

/// One op.
#[derive(Debug)]
pub struct Op {
    /// What it does.
    pub action: Action,
    /// Where in the state.
    pub path: Vec<String>,
}

/// What an op does at its path.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum Action {
    Merge(Source),
    Set(Source),
    Add(Source),
    Min(Source),
    Max(Source),
    Push(Source),
    Put { key: Source, value: Source },
    Drop { key: Source },
    Remove,
    Tombstone,
}

/// Where the value or the key of an op comes from.
#[derive(Debug)]
pub enum Source {
    /// From the reducer.
    Literal(Json<'static>),
    /// From the payload, by path.
    Payload(Vec<String>),
    /// From the metadata, by path.
    Metadata(Vec<String>),
    /// From the envelope.
    Envelope(Field),
}

/// A field of the envelope.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub enum Field {
    EventType,
    AggregateType,
    AggregateId,
    Version,
    Position,
    EventId,
    CreatedAt,
}

/// Why a reducer is refused. Displays as the message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invalid {
    /// The place in the reducer, as a path.
    pub place: String,
    /// What is expected there.
    pub detail: String,
    /// How to mend it.
    pub hint: Option<&'static str>,
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "reducer is not valid at {}", self.place)
    }
}

impl Invalid {
    fn at<T>(place: impl Into<String>, detail: impl Into<String>) -> Result<T, Self> {
        Err(Self {
            place: place.into(),
            detail: detail.into(),
            hint: None,
        })
    }
}

impl Reducer {
    /// Reads a reducer.
    ///
    /// # Errors
    ///
    /// [`Invalid`] for the first fault found.
    pub fn read(json: &Json<'_>) -> Result<Self, Invalid> {
        let Json::Object(reducer) = json else {
            return Invalid::at(
                "the root",
                format!("Expected an object, found {}.", json.kind()),
            );
        };
        for (key, _) in reducer.iter() {
            if !["initial", "on", "otherwise"].contains(&key) {
                return Invalid::at(
                    name(key),
                    "A reducer has the keys initial, on and otherwise.",
                );
            }
        }
        let object = |key: &str| match reducer.get(key) {
            None => Ok(Object::default()),
            Some(Json::Object(object)) => Ok(object.detach()),
            Some(other) => Invalid::at(key, format!("Expected an object, found {}.", other.kind())),
        };

        let initial = object("initial")?;
        let mut on = HashMap::new();
        for (event_type, list) in object("on")?.iter() {
            let place = format!("on.{}", name(event_type));
            if event_type == ERASED {
                return Invalid::at(place, "An erased event ends the state, always.");
            }
            on.insert(event_type.to_owned(), Ops::read(list, &place)?);
        }
        let erased = Ops {
            list: vec![Op {
                action: Action::Tombstone,
                path: Vec::new(),
            }],
            ..Ops::default()
        };
        on.insert(ERASED.to_owned(), erased);
        let otherwise = match reducer.get("otherwise") {
            Some(list) => Ops::read(list, "otherwise")?,
            None => Ops::default(),
        };
        Ok(Self {
            initial,
            on,
            otherwise,
        })
    }

    /// What an event of that type does.
    pub fn ops(&self, event_type: &str) -> &Ops {
        self.on.get(event_type).unwrap_or(&self.otherwise)
    }
}

impl Ops {
    fn read(json: &Json<'_>, place: &str) -> Result<Self, Invalid> {
        let Json::Array(elements) = json else {
            return Invalid::at(
                place,
                format!("Expected an array of ops, found {}.", json.kind()),
            );
        };
        let mut ops = Self::default();
        for (index, element) in elements.iter().enumerate() {
            let op = Op::read(element, &format!("{place}[{index}]"))?;
            for source in op.action.sources() {
                ops.reads_payload |= matches!(source, Source::Payload(_));
                ops.reads_metadata |= matches!(source, Source::Metadata(_));
            }
            ops.list.push(op);
        }
        Ok(ops)
    }
}

/// The keys an op may have, in the order in which they are asked for; those with
/// `true` it must have.
fn keys_of(op: &str) -> Option<&'static [(&'static str, bool)]> {
    Some(match op {
        "merge" => &[("path", false), ("value", true)],
        "add" => &[("path", true), ("value", false)],
        "set" | "min" | "max" | "push" => &[("path", true), ("value", true)],
        "put" => &[("path", true), ("key", true), ("value", true)],
        "drop" => &[("path", true), ("key", true)],
        "remove" => &[("path", true)],
        "tombstone" => &[],
        _ => return None,
    })
}

impl Op {
    fn read(json: &Json<'_>, place: &str) -> Result<Self, Invalid> {
        let Json::Object(op) = json else {
            return Invalid::at(place, format!("Expected an object, found {}.", json.kind()));
        };
        let Some(op_name) = op.get("op") else {
            return Invalid::at(place, "The key \"op\" is missing.");
        };
        let op_name = op_name.as_str().unwrap_or_default();
        let Some(keys) = keys_of(op_name) else {
            return Invalid::at(
                format!("{place}.op"),
                "Expected one of merge, set, add, min, max, push, put, drop, remove, tombstone.",
            );
        };

        for (key, _) in op.iter() {
            if key != "op" && !keys.iter().any(|(known, _)| *known == key) {
                let known: String = keys.iter().map(|(known, _)| format!(", {known}")).collect();
                return Invalid::at(
                    format!("{place}.{}", name(key)),
                    format!("The op \"{op_name}\" takes no such key, only op{known}."),
                );
            }
        }
        for (key, required) in keys {
            if *required && op.get(key).is_none() {
                return Invalid::at(
                    place,
                    format!("The op \"{op_name}\" needs the key \"{key}\"."),
                );
            }
        }

        let path = match op.get("path") {
            Some(path) => read_path(path).map_err(|fault| Invalid {
                place: match fault.element {
                    Some(element) => format!("{place}.path[{element}]"),
                    None => format!("{place}.path"),
                },
                detail: fault.detail,
                hint: None,
            })?,
            None => Vec::new(),
        };
        let expected = match op_name {
            "add" => Expected::Number,
            "min" | "max" => Expected::NumberOrString,
            "merge" => Expected::Object,
            _ => Expected::Anything,
        };
        let value = op
            .get("value")
            .map(|value| Source::read(value, &format!("{place}.value"), expected));
        let value = value.transpose()?;
        let key = op
            .get("key")
            .map(|key| Source::read(key, &format!("{place}.key"), Expected::Key));
        let key = key.transpose()?;

        let action = match (op_name, key, value) {
            ("merge", _, Some(value)) => Action::Merge(value),
            ("set", _, Some(value)) => Action::Set(value),
            ("add", _, Some(value)) => Action::Add(value),
            ("add", _, None) => Action::Add(Source::Literal(Json::Number(1.into()))),
            ("min", _, Some(value)) => Action::Min(value),
            ("max", _, Some(value)) => Action::Max(value),
            ("push", _, Some(value)) => Action::Push(value),
            ("put", Some(key), Some(value)) => Action::Put { key, value },
            ("drop", Some(key), _) => Action::Drop { key },
            ("remove", ..) => Action::Remove,
            ("tombstone", ..) => Action::Tombstone,
            _ => unreachable!("required keys were asked for above"),
        };
        Ok(Self { action, path })
    }
}

impl Action {
    /// The op's name in a reducer.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Merge(_) => "merge",
            Self::Set(_) => "set",
            Self::Add(_) => "add",
            Self::Min(_) => "min",
            Self::Max(_) => "max",
            Self::Push(_) => "push",
            Self::Put { .. } => "put",
            Self::Drop { .. } => "drop",
            Self::Remove => "remove",
            Self::Tombstone => "tombstone",
        }
    }

    fn sources(&self) -> impl Iterator<Item = &Source> {
        let (first, second) = match self {
            Self::Merge(value) | Self::Set(value) | Self::Add(value) => (Some(value), None),
            Self::Min(value) | Self::Max(value) | Self::Push(value) => (Some(value), None),
            Self::Put { key, value } => (Some(value), Some(key)),
            Self::Drop { key } => (None, Some(key)),
            Self::Remove | Self::Tombstone => (None, None),
        };
        first.into_iter().chain(second)
    }
}

/// What a value that is no reference may be.
#[derive(Clone, Copy)]
enum Expected {
    Number,
    NumberOrString,
    Object,
    Key,
    Anything,
}

impl Expected {
    fn accepts(self, value: &Json<'_>) -> bool {
        match value {
            _ if matches!(self, Self::Anything) => true,
            Json::Number(_) => matches!(self, Self::Number | Self::NumberOrString | Self::Key),
            Json::String(_) => matches!(self, Self::NumberOrString | Self::Key),
            Json::Bool(_) => matches!(self, Self::Key),
            Json::Object(_) => matches!(self, Self::Object),
            Json::Null | Json::Array(_) => false,
        }
    }

    fn names(self) -> &'static str {
        match self {
            Self::Number => "a number",
            Self::NumberOrString => "a number, a string",
            Self::Object => "an object",
            Self::Key => "a string, a number, a boolean",
            Self::Anything => "any value",
        }
    }
}

/// How to write a string that looks like a reference.
const LITERAL_HINT: &str = "To mean the string itself, write {\"literal\": \"…\"}.";

impl Source {
    fn read(value: &Json<'_>, place: &str, expected: Expected) -> Result<Self, Invalid> {
        let refused = |detail: String| Invalid {
            place: place.to_owned(),
            detail,
            hint: Some(LITERAL_HINT),
        };
        let path = |text: &str| split_path(text).map_err(refused);

        let mut literal = value;
        match value {
            Json::String(text) if text == "$" => return Ok(Self::Payload(Vec::new())),
            Json::String(text) => {
                if let Some(rest) = text.strip_prefix("$.") {
                    return Ok(Self::Payload(path(rest)?));
                } else if let Some(rest) = text.strip_prefix("@.") {
                    let detail = "The envelope has @.event_type, @.aggregate_type, @.aggregate_id, \
                                  @.version, @.position, @.event_id, @.created_at and @.metadata; \
                                  only @.metadata goes deeper.";
                    return Self::envelope(path(rest)?).ok_or_else(|| refused(detail.to_owned()));
                } else if text.starts_with(['$', '@']) {
                    let detail = "A string that begins with $ or @ is a reference: $ or $.path \
                                  into the payload, @.field of the envelope.";
                    return Err(refused(detail.to_owned()));
                }
            }
            Json::Object(object) if object.len() == 1 => {
                literal = object.get("literal").unwrap_or(value);
            }
            _ => {}
        }

        if expected.accepts(literal) {
            Ok(Self::Literal(literal.detach()))
        } else {
            let (names, kind) = (expected.names(), literal.kind());
            Invalid::at(
                place,
                format!("Expected {names} or a reference, found {kind}."),
            )
        }
    }

    fn envelope(mut path: Vec<String>) -> Option<Self> {
        let field = match path[0].as_str() {
            "event_type" => Field::EventType,
            "aggregate_type" => Field::AggregateType,
            "aggregate_id" => Field::AggregateId,
            "version" => Field::Version,
            "position" => Field::Position,
            "event_id" => Field::EventId,
            "created_at" => Field::CreatedAt,
            "metadata" => return Some(Self::Metadata(path.split_off(1))),
            _ => return None,
        };
        (path.len() == 1).then_some(Self::Envelope(field))
    }
}

/// Why a path cannot be read.
struct PathFault {
    element: Option<usize>,
    detail: String,
}

const EMPTY_SEGMENT: &str = "A segment of a path must not be empty.";

fn read_path(path: &Json<'_>) -> Result<Vec<String>, PathFault> {
    let fault = |detail: String| PathFault {
        element: None,
        detail,
    };
    match path {
        Json::String(text) => split_path(text).map_err(fault),
        Json::Array(elements) => {
            let mut segments = Vec::with_capacity(elements.len());
            for (index, element) in elements.iter().enumerate() {
                let detail = match element {
                    Json::String(segment) if !segment.is_empty() => {
                        segments.push(segment.to_string());
                        continue;
                    }
                    Json::String(_) => EMPTY_SEGMENT.to_owned(),
                    other => format!("Expected a string, found {}.", other.kind()),
                };
                return Err(PathFault {
                    element: Some(index),
                    detail,
                });
            }
            counted(segments).map_err(fault)
        }
        other => Err(fault(format!(
            "Expected a string or an array of strings, found {}.",
            other.kind()
        ))),
    }
}

/// Splits `a."b.c".d` at its dots.
fn split_path(text: &str) -> Result<Vec<String>, String> {
    let mut segments = Vec::new();
    let mut rest = Some(text);
    while let Some(text) = rest {
        let segment = if let Some(quoted) = text.strip_prefix('"') {
            let (segment, after) = unquote(quoted).ok_or(
                "A quoted segment ends with a double quote, then comes a dot or nothing; \
                 inside it \\\" and \\\\ are the only escapes.",
            )?;
            rest = after;
            segment
        } else {
            let (segment, after) = match text.split_once('.') {
                Some((segment, after)) => (segment, Some(after)),
                None => (text, None),
            };
            if segment.contains('"') {
                return Err(
                    "A double quote may only begin a segment, or be escaped inside a quoted one."
                        .to_owned(),
                );
            }
            if segment.starts_with(WHITE_SPACE) || segment.ends_with(WHITE_SPACE) {
                return Err(
                    "A segment that begins or ends with white space needs double quotes."
                        .to_owned(),
                );
            }
            rest = after;
            segment.to_owned()
        };
        if segment.is_empty() {
            return Err(EMPTY_SEGMENT.to_owned());
        }
        segments.push(segment);
    }
    counted(segments)
}

/// Reads up to the closing quote; what follows its dot is returned with it.
fn unquote(text: &str) -> Option<(String, Option<&str>)> {
    let mut segment = String::new();
    let mut characters = text.chars();
    loop {
        match characters.next()? {
            '"' => break,
            '\\' => match characters.next()? {
                escaped @ ('"' | '\\') => segment.push(escaped),
                _ => return None,
            },
            character => segment.push(character),
        }
    }
    match characters.as_str() {
        "" => Some((segment, None)),
        rest => Some((segment, Some(rest.strip_prefix('.')?))),
    }
}

fn counted(segments: Vec<String>) -> Result<Vec<String>, String> {
    match segments.len() {
        1..=MAX_SEGMENTS => Ok(segments),
        count => Err(format!(
            "A path has 1 to {MAX_SEGMENTS} segments, this one has {count}."
        )),
    }
}

/// A key as a place shows it: quoted unless it is plain.
fn name(key: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    if !key.is_empty() && key.bytes().all(is_plain) {
        key.to_owned()
    } else {
        format!("\"{}\"", key.replace('\\', "\\\\").replace('"', "\\\""))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Reducer, Invalid> {
        Reducer::read(&Json::parse(text, MAX_REDUCER_DEPTH).expect("JSON"))
    }

    #[test]
    fn a_path_is_split_at_its_dots() {
        let split = |text: &str| split_path(text).map(|segments| segments.join("|"));
        assert_eq!(split(r#"a."b.c".d"#).as_deref(), Ok("a|b.c|d"));
        assert_eq!(split(r#""\"\\ ""#).as_deref(), Ok("\"\\ "));
        assert_eq!(split("über.😀").as_deref(), Ok("über|😀"));
        assert_eq!(split("a b").as_deref(), Ok("a b"));
        for bad in [
            "", ".", "a.", ".a", "a..b", " a", "a\t.b", "a\"b", "\"a", "\"a\"b", "\"\"", r#""\n""#,
        ] {
            assert!(split(bad).is_err(), "{bad}");
        }
        assert!(split(&["a"; 32].join(".")).is_ok());
        assert!(split(&["a"; 33].join(".")).is_err());
    }

    #[test]
    fn a_fault_is_named_by_its_place() {
        for (reducer, place) in [
            ("[]", "the root"),
            (r#"{"onn":{}}"#, "onn"),
            (r#"{"initial":[]}"#, "initial"),
            (r#"{"on":{"a":{}}}"#, "on.a"),
            (r#"{"on":{"a b":[1]}}"#, "on.\"a b\"[0]"),
            (
                r#"{"otherwise":[{"op":"tombstone"},{"op":"nope"}]}"#,
                "otherwise[1].op",
            ),
            (
                r#"{"otherwise":[{"op":"tombstone","path":"a"}]}"#,
                "otherwise[0].path",
            ),
            (r#"{"otherwise":[{"op":"set","path":"a"}]}"#, "otherwise[0]"),
            (
                r#"{"otherwise":[{"op":"remove","path":["a",1]}]}"#,
                "otherwise[0].path[1]",
            ),
            (
                r#"{"otherwise":[{"op":"set","path":"a","value":"$x"}]}"#,
                "otherwise[0].value",
            ),
            (
                r#"{"otherwise":[{"op":"set","path":"a","value":"@.version.x"}]}"#,
                "otherwise[0].value",
            ),
            (
                r#"{"otherwise":[{"op":"add","path":"a","value":null}]}"#,
                "otherwise[0].value",
            ),
            (
                r#"{"otherwise":[{"op":"merge","value":{"literal":1}}]}"#,
                "otherwise[0].value",
            ),
            (
                r#"{"otherwise":[{"op":"drop","path":"a","key":[]}]}"#,
                "otherwise[0].key",
            ),
        ] {
            assert_eq!(
                read(reducer)
                    .map_err(|invalid| invalid.place)
                    .err()
                    .as_deref(),
                Some(place)
            );
        }
    }

    #[test]
    fn what_an_event_is_read_for_is_known() {
        let reducer = read(
            r#"{"on":{"a":[{"op":"put","path":"m","key":"$.k","value":"@.metadata.x"}],
                     "b":[{"op":"set","path":"v","value":"@.version"}]}}"#,
        )
        .expect("a reducer");
        assert!(reducer.ops("a").reads_payload && reducer.ops("a").reads_metadata);
        assert!(!reducer.ops("b").reads_payload && !reducer.ops("b").reads_metadata);
        assert!(reducer.ops("c").list.is_empty());
    }
}
