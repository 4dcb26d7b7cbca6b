//! Taking secrets out of JSON before somebody sees it who should not see them.
//!
//! Two things give a secret away: the name it stands under (`api_key`,
//! `Authorization`, also as `name=value` in a text), and what it looks like (`sk-…`,
//! a JWT, a URL with a password). [`Rules`] adds names and looks of one's own, and
//! names that are none. `sql/plain/redact.sql` is the twin; the suite compares them.

#[cfg(feature = "extension")]
mod extern_layer;

use std::borrow::Cow;

use crate::fold::Json;

/// What stands in a secret's place.
pub const REDACTED: &str = "[redacted]";

/// A name that ends like this, in lower case and without `-`, `_`, `.` and blanks, names a secret.
const NAMES: &[&str] = &[
    "password",
    "passwords",
    "passwd",
    "pwd",
    "passphrase",
    "secret",
    "secrets",
    "token",
    "apikey",
    "apikeys",
    "privatekey",
    "secretkey",
    "accesskey",
    "accesskeyid",
    "signingkey",
    "encryptionkey",
    "authorization",
    "cookie",
    "cookies",
    "credential",
    "credentials",
];

/// A word that looks like this is a secret.
const WORDS: &[&str] = &[
    "sk-????????????????*",
    "sk_live_*",
    "sk_test_*",
    "rk_live_*",
    "rk_test_*",
    "whsec_*",
    "ghp_*",
    "gho_*",
    "ghu_*",
    "ghs_*",
    "ghr_*",
    "github_pat_*",
    "glpat-*",
    "xox?-*",
    "AKIA????????????????",
    "ASIA????????????????",
    "AIza????????????????????*",
    "eyJ*.eyJ*.*",
    "sbp_????????????????*",
    "sb_secret_*",
    "npm_????????????????????*",
    "hf_????????????????????*",
    "*://*:*@*",
];

/// Where words end.
fn is_separator(byte: u8) -> bool {
    matches!(
        byte,
        b' ' | b'\t'
            | b'\n'
            | b'\r'
            | b'"'
            | b'\''
            | b'`'
            | b','
            | b';'
            | b'('
            | b')'
            | b'['
            | b']'
            | b'{'
            | b'}'
            | b'<'
            | b'>'
            | b'&'
            | b'='
            | b'|'
            | b'?'
    )
}

/// What is added to the built-in rules. In each pattern `*` stands for any text, `?` for one character.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    names: Vec<String>,
    words: Vec<String>,
    allowed: Vec<String>,
}

/// A text after which the next word may be a secret.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Before {
    Nothing,
    Bearer,
    Basic,
    Name,
}

impl Rules {
    /// Reads `{"keys": […], "words": […], "allow": […]}`, all optional; `None` if it is not of this shape.
    pub fn parse(rules: &Json<'_>) -> Option<Self> {
        let Json::Object(object) = rules else {
            return None;
        };
        let mut read = Self::default();
        for (key, patterns) in object.iter() {
            let Json::Array(patterns) = patterns else {
                return None;
            };
            let patterns = patterns
                .iter()
                .map(|pattern| pattern.as_str().filter(|text| !text.is_empty()))
                .collect::<Option<Vec<_>>>()?;
            let plain = || patterns.iter().map(|name| plain_name(name)).collect();
            match key {
                "keys" => read.names = plain(),
                "allow" => read.allowed = plain(),
                "words" => read.words = patterns.iter().map(|word| (*word).to_owned()).collect(),
                _ => return None,
            }
        }
        Some(read)
    }

    /// Takes the secrets out of `value`; whether there were any.
    pub fn redact(&self, value: &mut Json<'_>) -> bool {
        match value {
            Json::String(text) => match self.redact_text(text) {
                None => false,
                Some(redacted) => {
                    *text = Cow::Owned(redacted);
                    true
                }
            },
            Json::Array(elements) => {
                let mut changed = false;
                for element in elements {
                    changed |= self.redact(element);
                }
                changed
            }
            Json::Object(object) => {
                // A header as {"name": "Authorization", "value": "…"}.
                let is_pair = ["name", "key"].iter().any(|key| {
                    object
                        .get(key)
                        .and_then(Json::as_str)
                        .is_some_and(|name| self.is_secret(name))
                });
                let mut changed = false;
                for (key, value) in object.iter_mut() {
                    let hidden = self.is_secret(key) || is_pair && key == "value";
                    if hidden && !matches!(value, Json::Null | Json::Bool(_)) {
                        changed |= value.as_str() != Some(REDACTED);
                        *value = Json::String(Cow::Borrowed(REDACTED));
                    } else {
                        changed |= self.redact(value);
                    }
                }
                changed
            }
            _ => false,
        }
    }

    /// Whether what stands under this name is a secret.
    fn is_secret(&self, name: &str) -> bool {
        let name = plain_name(name);
        (NAMES.iter().any(|end| name.ends_with(end))
            || self.names.iter().any(|pattern| matches(pattern, &name)))
            && !self.allowed.iter().any(|pattern| matches(pattern, &name))
    }

    fn looks_secret(&self, word: &str) -> bool {
        WORDS.iter().any(|pattern| matches(pattern, word))
            || self.words.iter().any(|pattern| matches(pattern, word))
    }

    /// A text without its secrets; `None` if it has none.
    fn redact_text(&self, text: &str) -> Option<String> {
        if text.contains("-----BEGIN") && text.contains("PRIVATE KEY-----") {
            return Some(REDACTED.to_owned());
        }
        let bytes = text.as_bytes();
        let mut out: Option<String> = None;
        let mut kept = 0;
        let mut at = 0;
        let mut before = Before::Nothing;
        while at < bytes.len() {
            if is_separator(bytes[at]) {
                at += 1;
                continue;
            }
            let end = bytes[at..]
                .iter()
                .position(|byte| is_separator(*byte))
                .map_or(bytes.len(), |length| at + length);
            let word = &text[at..end];
            let scheme = if word.eq_ignore_ascii_case("bearer") {
                Before::Bearer
            } else if word.eq_ignore_ascii_case("basic") {
                Before::Basic
            } else {
                Before::Nothing
            };
            let follows = match before {
                Before::Nothing => false,
                Before::Bearer => word.len() >= 5,
                Before::Basic => {
                    word.len() >= 8
                        && word
                            .bytes()
                            .any(|byte| byte.is_ascii_digit() || byte.is_ascii_uppercase())
                }
                Before::Name => scheme == Before::Nothing,
            };
            if (follows || self.looks_secret(word)) && word != "redacted" {
                let out = out.get_or_insert_default();
                out.push_str(&text[kept..at]);
                out.push_str(REDACTED);
                kept = end;
            }
            before = if scheme != Before::Nothing {
                scheme
            } else if (bytes.get(end) == Some(&b'=') || word.ends_with(':'))
                && self.is_secret(word.trim_end_matches(':'))
            {
                Before::Name
            } else {
                Before::Nothing
            };
            at = end;
        }
        out.map(|out| out + &text[kept..])
    }
}

/// A name as it is compared: in lower case, of ASCII, without what separates its parts.
fn plain_name(name: &str) -> String {
    name.chars()
        .filter(|letter| !matches!(letter, '-' | '_' | '.' | ' '))
        .map(|letter| letter.to_ascii_lowercase())
        .collect()
}

/// Whether all of `text` is as `pattern` says.
fn matches(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let letter = |at: usize| {
        1 + text[at + 1..]
            .iter()
            .take_while(|byte| **byte & 0xc0 == 0x80)
            .count()
    };
    let (mut p, mut t) = (0, 0);
    // Where to go back to: behind the last star, and one letter further than the last time.
    let mut back: Option<(usize, usize)> = None;
    loop {
        match pattern.get(p) {
            Some(b'*') => {
                back = Some((p + 1, t));
                p += 1;
                continue;
            }
            Some(b'?') if t < text.len() => {
                t += letter(t);
                p += 1;
                continue;
            }
            Some(byte) if text.get(t) == Some(byte) => {
                t += 1;
                p += 1;
                continue;
            }
            None if t == text.len() => return true,
            _ => {}
        }
        match back {
            Some((behind, from)) if from < text.len() => {
                t = from + letter(from);
                p = behind;
                back = Some((behind, t));
            }
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn redacted(text: &str) -> String {
        let mut value = Json::parse(text, 100).unwrap();
        Rules::default().redact(&mut value);
        let mut out = String::new();
        value.write(&mut out);
        out
    }

    #[test]
    fn patterns_match_the_whole_text() {
        for (pattern, text, expected) in [
            ("a*", "a", true),
            ("a*c", "abc", true),
            ("a*c", "abcd", false),
            ("*b*", "abc", true),
            ("a?c", "aäc", true),
            ("a??c", "aäc", false),
            ("*?", "ä", true),
            ("*??", "ä", false),
            ("", "", true),
            ("*", "", true),
            ("?", "", false),
            ("a*b*c", "a-b-b-c", true),
        ] {
            assert_eq!(matches(pattern, text), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn secrets_go_and_the_rest_stays() {
        for (text, expected) in [
            (
                r#"{"a":1.10,"api_key":"x"}"#,
                r#"{"a":1.10,"api_key":"[redacted]"}"#,
            ),
            (
                r#"{"max_tokens":5,"hasPassword":true}"#,
                r#"{"max_tokens":5,"hasPassword":true}"#,
            ),
            (
                r#"["Authorization: Bearer abc.def"]"#,
                r#"["Authorization: Bearer [redacted]"]"#,
            ),
            (
                r#""a?access_token=abc&b=c""#,
                r#""a?access_token=[redacted]&b=c""#,
            ),
            (
                r#"{"key":"Cookie","value":"a=b"}"#,
                r#"{"key":"Cookie","value":"[redacted]"}"#,
            ),
            (r#""the bearer of bad news""#, r#""the bearer of bad news""#),
            (r#""postgres://u:p@h/db here""#, r#""[redacted] here""#),
            (r#""Bearer [redacted]""#, r#""Bearer [redacted]""#),
        ] {
            assert_eq!(redacted(text), expected);
        }
    }
}
