//! JSON as jsonb writes it: a small reader and writer.
//!
//! Not serde_json's `Value`: with `arbitrary_precision` it takes a payload's
//! object `{"$serde_json::private::Number": …}` for a number, and it copies
//! every string, where a fold wants a few of them. The reader borrows from the
//! text; [`Json::detach`] copies what is kept.

use std::borrow::Cow;
use std::fmt::Write;

use super::decimal::Decimal;

/// How deep an event or a state may be nested. Above what a table holds (100
/// levels, and a path of 32 to it), and far below what would endanger the stack.
pub const MAX_DEPTH: usize = 200;

/// A JSON value.
#[derive(Clone, Debug, PartialEq)]
pub enum Json<'a> {
    /// `null`
    Null,
    /// `true` or `false`
    Bool(bool),
    /// A number, exact.
    Number(Decimal),
    /// A string without its escapes.
    String(Cow<'a, str>),
    /// An array.
    Array(Vec<Json<'a>>),
    /// An object.
    Object(Object<'a>),
}

/// An object's members, in jsonb's order: by the key's length, then its bytes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Object<'a>(Vec<(Cow<'a, str>, Json<'a>)>);

/// Why a text could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParseError {
    /// It is nested deeper than is allowed.
    TooDeep,
    /// It is not JSON as jsonb writes it.
    Malformed,
}

impl<'a> Json<'a> {
    /// Reads a whole text that is nested at most `max_depth` levels deep.
    ///
    /// # Errors
    ///
    /// [`ParseError`] says why it cannot be read.
    pub fn parse(text: &'a str, max_depth: usize) -> Result<Self, ParseError> {
        let mut reader = Reader {
            text,
            at: 0,
            max_depth,
        };
        let value = reader.value(0)?;
        reader.skip_space();
        if reader.at == text.len() {
            Ok(value)
        } else {
            Err(ParseError::Malformed)
        }
    }

    /// The type with its article, as messages want it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool(_) => "a boolean",
            Self::Number(_) => "a number",
            Self::String(_) => "a string",
            Self::Array(_) => "an array",
            Self::Object(_) => "an object",
        }
    }

    /// The string in it, if it is one.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(text) => Some(text),
            _ => None,
        }
    }

    /// What is at `path`, as jsonb's operator `#>` finds it: members by key,
    /// elements by index, from the end if it is negative.
    pub fn at(&self, path: &[String]) -> Option<&Self> {
        path.iter().try_fold(self, |value, segment| match value {
            Self::Object(object) => object.get(segment),
            Self::Array(elements) => {
                let index = array_index(segment)?;
                let from_end = usize::try_from(index.unsigned_abs()).ok()?;
                match index {
                    0.. => elements.get(from_end),
                    _ => elements.get(elements.len().checked_sub(from_end)?),
                }
            }
            _ => None,
        })
    }

    /// A copy that borrows nothing.
    pub fn detach(&self) -> Json<'static> {
        match self {
            Self::Null => Json::Null,
            Self::Bool(value) => Json::Bool(*value),
            Self::Number(number) => Json::Number(number.clone()),
            Self::String(text) => Json::String(Cow::Owned(text.to_string())),
            Self::Array(elements) => Json::Array(elements.iter().map(Json::detach).collect()),
            Self::Object(object) => Json::Object(object.detach()),
        }
    }

    /// Appends the value's text to `out`.
    pub fn write(&self, out: &mut String) {
        match self {
            Self::Null => out.push_str("null"),
            Self::Bool(value) => out.push_str(if *value { "true" } else { "false" }),
            Self::Number(number) => {
                write!(out, "{number}").expect("writing to a string does not fail");
            }
            Self::String(text) => write_string(text, out),
            Self::Array(elements) => {
                out.push('[');
                for (index, element) in elements.iter().enumerate() {
                    if index > 0 {
                        out.push(',');
                    }
                    element.write(out);
                }
                out.push(']');
            }
            Self::Object(object) => object.write(out),
        }
    }
}

impl<'a> Object<'a> {
    fn find(&self, key: &str) -> Result<usize, usize> {
        self.0.binary_search_by(|(other, _)| {
            other
                .len()
                .cmp(&key.len())
                .then_with(|| other.as_bytes().cmp(key.as_bytes()))
        })
    }

    /// The member of that key.
    pub fn get(&self, key: &str) -> Option<&Json<'a>> {
        self.find(key).ok().map(|index| &self.0[index].1)
    }

    /// The member of that key, to be changed.
    pub fn get_mut(&mut self, key: &str) -> Option<&mut Json<'a>> {
        self.find(key).ok().map(|index| &mut self.0[index].1)
    }

    /// The member of that key; null is put there if there is none.
    pub fn entry(&mut self, key: &str) -> &mut Json<'a> {
        let index = match self.find(key) {
            Ok(index) => index,
            Err(index) => {
                self.0
                    .insert(index, (Cow::Owned(key.to_owned()), Json::Null));
                index
            }
        };
        &mut self.0[index].1
    }

    /// Removes the member of that key, if there is one.
    pub fn remove(&mut self, key: &str) {
        if let Ok(index) = self.find(key) {
            self.0.remove(index);
        }
    }

    /// The members, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Json<'a>)> {
        self.0.iter().map(|(key, value)| (key.as_ref(), value))
    }

    /// The members, in order, their values to be changed.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&str, &mut Json<'a>)> {
        self.0.iter_mut().map(|(key, value)| {
            let key: &Cow<'a, str> = key;
            (key.as_ref(), value)
        })
    }

    /// How many members there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no member.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A copy that borrows nothing.
    pub fn detach(&self) -> Object<'static> {
        let copy =
            |(key, value): &(Cow<'_, str>, Json<'_>)| (Cow::Owned(key.to_string()), value.detach());
        Object(self.0.iter().map(copy).collect())
    }

    /// Applies `patch` as RFC 7396 says: a null removes, an object merges,
    /// anything else replaces.
    pub fn merge(&mut self, patch: &Object<'_>) {
        for (key, value) in patch.iter() {
            match value {
                Json::Null => self.remove(key),
                Json::Object(patch) => {
                    let target = self.entry(key);
                    if !matches!(target, Json::Object(_)) {
                        *target = Json::Object(Object::default());
                    }
                    if let Json::Object(target) = target {
                        target.merge(patch);
                    }
                }
                value => *self.entry(key) = value.detach(),
            }
        }
    }

    /// Appends the object's text to `out`.
    pub fn write(&self, out: &mut String) {
        out.push('{');
        for (index, (key, value)) in self.iter().enumerate() {
            if index > 0 {
                out.push(',');
            }
            write_string(key, out);
            out.push(':');
            value.write(out);
        }
        out.push('}');
    }

    /// Adds a member as it is read. jsonb's order makes that a push.
    fn push(&mut self, key: Cow<'a, str>, value: Json<'a>) {
        let is_last = self
            .0
            .last()
            .is_none_or(|(last, _)| (last.len(), last.as_bytes()) < (key.len(), key.as_bytes()));
        if is_last {
            self.0.push((key, value));
        } else {
            *self.entry(&key) = value;
        }
    }
}

fn write_string(text: &str, out: &mut String) {
    out.push('"');
    let mut rest = text;
    while let Some(at) = rest
        .bytes()
        .position(|byte| matches!(byte, b'"' | b'\\' | 0..0x20))
    {
        out.push_str(&rest[..at]);
        match rest.as_bytes()[at] {
            b'"' => out.push_str("\\\""),
            b'\\' => out.push_str("\\\\"),
            control => {
                write!(out, "\\u{control:04x}").expect("writing to a string does not fail");
            }
        }
        rest = &rest[at + 1..];
    }
    out.push_str(rest);
    out.push('"');
}

/// An array index as `#>` reads it, with C's strtol().
fn array_index(segment: &str) -> Option<i32> {
    let number = segment.trim_start_matches([' ', '\t', '\n', '\x0b', '\x0c', '\r']);
    let digits = number.strip_prefix(['+', '-']).unwrap_or(number);
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    number.parse().ok()
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
    max_depth: usize,
}

impl<'a> Reader<'a> {
    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn skip_space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn expect(&mut self, token: &str) -> Result<(), ParseError> {
        if !self.text.as_bytes()[self.at..].starts_with(token.as_bytes()) {
            return Err(ParseError::Malformed);
        }
        self.at += token.len();
        Ok(())
    }

    fn value(&mut self, depth: usize) -> Result<Json<'a>, ParseError> {
        if depth > self.max_depth {
            return Err(ParseError::TooDeep);
        }
        self.skip_space();
        match self.peek().ok_or(ParseError::Malformed)? {
            b'{' => self.object(depth).map(Json::Object),
            b'[' => self.array(depth).map(Json::Array),
            b'"' => self.string().map(Json::String),
            b't' => self.expect("true").map(|()| Json::Bool(true)),
            b'f' => self.expect("false").map(|()| Json::Bool(false)),
            b'n' => self.expect("null").map(|()| Json::Null),
            _ => self.number().map(Json::Number),
        }
    }

    /// Reads members or elements up to `close`.
    fn items(
        &mut self,
        close: u8,
        mut item: impl FnMut(&mut Self) -> Result<(), ParseError>,
    ) -> Result<(), ParseError> {
        self.at += 1;
        self.skip_space();
        if self.peek() == Some(close) {
            self.at += 1;
            return Ok(());
        }
        loop {
            item(self)?;
            self.skip_space();
            match self.peek() {
                Some(b',') => self.at += 1,
                Some(byte) if byte == close => {
                    self.at += 1;
                    return Ok(());
                }
                _ => return Err(ParseError::Malformed),
            }
        }
    }

    fn object(&mut self, depth: usize) -> Result<Object<'a>, ParseError> {
        let mut object = Object::default();
        self.items(b'}', |reader| {
            reader.skip_space();
            if reader.peek() != Some(b'"') {
                return Err(ParseError::Malformed);
            }
            let key = reader.string()?;
            reader.skip_space();
            reader.expect(":")?;
            object.push(key, reader.value(depth + 1)?);
            Ok(())
        })?;
        Ok(object)
    }

    fn array(&mut self, depth: usize) -> Result<Vec<Json<'a>>, ParseError> {
        let mut elements = Vec::new();
        self.items(b']', |reader| {
            elements.push(reader.value(depth + 1)?);
            Ok(())
        })?;
        Ok(elements)
    }

    fn number(&mut self) -> Result<Decimal, ParseError> {
        let rest = &self.text[self.at..];
        let end = rest
            .bytes()
            .position(|byte| !matches!(byte, b'0'..=b'9' | b'-' | b'.'))
            .unwrap_or(rest.len());
        self.at += end;
        Decimal::parse(&rest[..end]).ok_or(ParseError::Malformed)
    }

    fn string(&mut self) -> Result<Cow<'a, str>, ParseError> {
        self.at += 1;
        let mut copy: Option<String> = None;
        loop {
            let rest = &self.text[self.at..];
            let end = rest
                .bytes()
                .position(|byte| matches!(byte, b'"' | b'\\'))
                .ok_or(ParseError::Malformed)?;
            self.at += end + 1;
            if rest.as_bytes()[end] == b'"' {
                return Ok(match copy {
                    None => Cow::Borrowed(&rest[..end]),
                    Some(copy) => Cow::Owned(copy + &rest[..end]),
                });
            }
            let copy = copy.get_or_insert_default();
            copy.push_str(&rest[..end]);
            copy.push(self.escaped()?);
        }
    }

    /// Reads what follows a backslash.
    fn escaped(&mut self) -> Result<char, ParseError> {
        let byte = self.peek().ok_or(ParseError::Malformed)?;
        self.at += 1;
        Ok(match byte {
            b'"' | b'\\' | b'/' => char::from(byte),
            b'b' => '\x08',
            b'f' => '\x0c',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => {
                let unit = self.hex()?;
                if !(0xd800..0xdc00).contains(&unit) {
                    return char::from_u32(unit).ok_or(ParseError::Malformed);
                }
                self.expect("\\u")?;
                let low = self
                    .hex()?
                    .checked_sub(0xdc00)
                    .ok_or(ParseError::Malformed)?;
                char::from_u32(0x10000 + ((unit - 0xd800) << 10) + low)
                    .filter(|_| low < 0x400)
                    .ok_or(ParseError::Malformed)?
            }
            _ => return Err(ParseError::Malformed),
        })
    }

    fn hex(&mut self) -> Result<u32, ParseError> {
        let digits = self
            .text
            .get(self.at..self.at + 4)
            .ok_or(ParseError::Malformed)?;
        self.at += 4;
        u32::from_str_radix(digits, 16).map_err(|_| ParseError::Malformed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copy(text: &str) -> String {
        let mut out = String::new();
        Json::parse(text, MAX_DEPTH).expect("JSON").write(&mut out);
        out
    }

    #[test]
    fn what_is_read_is_written() {
        for text in [
            r#"{"a":1.50,"b":[],"cc":{},"dd":[null,true,false,-0.10]}"#,
            r#""quotes \" and \\ and \u0001""#,
            r#"{"":"empty","$serde_json::private::Number":"7"}"#,
            "123456789012345678901234567890.000",
            "\"\u{1f600} \u{e9}\"",
        ] {
            assert_eq!(copy(text), text);
        }
    }

    #[test]
    fn escapes_are_resolved() {
        assert_eq!(
            copy(r#""\ud83d\ude00\u00e9\n\/""#),
            "\"\u{1f600}\u{e9}\\u000a/\""
        );
    }

    #[test]
    fn broken_texts_are_refused() {
        for text in [
            "",
            "{",
            "[1",
            "[1 2]",
            r#"{"a"}"#,
            "{1:2}",
            "tru",
            "1e5",
            "01",
            r#""\x""#,
            r#""\ud800""#,
            r#""\ud800\u0041""#,
            "1 2",
            "\"",
            r#""\u00"#,
            "[1,]",
            "-",
        ] {
            assert_eq!(
                Json::parse(text, MAX_DEPTH),
                Err(ParseError::Malformed),
                "{text}"
            );
        }
    }

    #[test]
    fn depth_is_limited() {
        let nested = |levels: usize| "[".repeat(levels) + "1" + &"]".repeat(levels);
        assert!(Json::parse(&nested(MAX_DEPTH), MAX_DEPTH).is_ok());
        assert_eq!(
            Json::parse(&nested(MAX_DEPTH + 1), MAX_DEPTH),
            Err(ParseError::TooDeep)
        );
        assert_eq!(
            Json::parse(&nested(1_000_000), MAX_DEPTH),
            Err(ParseError::TooDeep)
        );
    }

    #[test]
    fn members_are_found_in_any_order() {
        let Ok(Json::Object(object)) = Json::parse(r#"{"bb":1,"a":2,"c":3,"a":4}"#, MAX_DEPTH)
        else {
            panic!("an object");
        };
        let keys: Vec<_> = object.iter().map(|(key, _)| key).collect();
        assert_eq!(keys, ["a", "c", "bb"]);
        assert_eq!(
            object.get("a"),
            Some(&Json::Number(Decimal::parse("4").expect("a number")))
        );
    }

    #[test]
    fn indexes_are_read_as_postgres_reads_them() {
        let array = Json::parse("[10,20,30]", MAX_DEPTH).expect("JSON");
        let at = |segment: &str| {
            let mut out = String::new();
            array.at(&[segment.to_owned()])?.write(&mut out);
            Some(out)
        };
        for (segment, found) in [
            ("0", Some("10")),
            ("-1", Some("30")),
            ("-3", Some("10")),
            ("+1", Some("20")),
            (" 01", Some("20")),
            ("3", None),
            ("-4", None),
            ("1 ", None),
            ("1.0", None),
            ("", None),
            ("-", None),
            ("99999999999", None),
            ("-2147483648", None),
        ] {
            assert_eq!(at(segment).as_deref(), found, "{segment:?}");
        }
    }

    #[test]
    fn merge_follows_rfc_7396() {
        // The table of the RFC's appendix A, those where both are objects.
        for (target, patch, result) in [
            (r#"{"a":"b"}"#, r#"{"a":"c"}"#, r#"{"a":"c"}"#),
            (r#"{"a":"b"}"#, r#"{"b":"c"}"#, r#"{"a":"b","b":"c"}"#),
            (r#"{"a":"b"}"#, r#"{"a":null}"#, r#"{}"#),
            (r#"{"a":"b","b":"c"}"#, r#"{"a":null}"#, r#"{"b":"c"}"#),
            (r#"{"a":["b"]}"#, r#"{"a":"c"}"#, r#"{"a":"c"}"#),
            (r#"{"a":"c"}"#, r#"{"a":["b"]}"#, r#"{"a":["b"]}"#),
            (
                r#"{"a":{"b":"c"}}"#,
                r#"{"a":{"b":"d","c":null}}"#,
                r#"{"a":{"b":"d"}}"#,
            ),
            (r#"{"a":[{"b":"c"}]}"#, r#"{"a":[1]}"#, r#"{"a":[1]}"#),
            (r#"{"e":null}"#, r#"{"a":1}"#, r#"{"a":1,"e":null}"#),
            (
                r#"{}"#,
                r#"{"a":{"bb":{"ccc":null}}}"#,
                r#"{"a":{"bb":{}}}"#,
            ),
        ] {
            let parse = |text| match Json::parse(text, MAX_DEPTH) {
                Ok(Json::Object(object)) => object,
                other => panic!("{other:?}"),
            };
            let mut merged = parse(target);
            merged.merge(&parse(patch));
            assert_eq!(merged, parse(result), "{target} + {patch}");
        }
    }
}
