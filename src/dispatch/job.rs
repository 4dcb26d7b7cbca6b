//! A leased request, as SQL gives it, and what came of it, as SQL takes it.

use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::http::{Failure, Policy, Request, Response, sign};

/// One request that was leased to be sent: a row of `_leased_request`.
#[derive(Clone, Debug)]
pub struct Job {
    /// What SQL wants back with the outcome.
    identity: Map<String, Value>,
    /// The endpoint's number.
    pub endpoint_id: i64,
    webhook_id: String,
    url: String,
    headers: Vec<(String, String)>,
    secret: Option<String>,
    body: String,
    timeout: Duration,
    max_response: usize,
}

/// What the outcome has in common with the lease.
const IDENTITY: &[&str] = &[
    "org_id",
    "endpoint_id",
    "request_id",
    "receipt",
    "attempt",
    "webhook_id",
    "enqueued_at",
    "position",
];

/// The jobs of a JSON array.
///
/// # Errors
///
/// What is not as it should be; nothing of the content stands in it.
pub fn parse(leased: &str) -> Result<Vec<Job>, String> {
    let leased: Value = serde_json::from_str(leased)
        .map_err(|error| format!("what was leased is no JSON, at line {}", error.line()))?;
    let Value::Array(leased) = leased else {
        return Err("what was leased is no array".to_owned());
    };
    leased
        .into_iter()
        .map(|job| Job::new(job).ok_or_else(|| "a lease lacks something".to_owned()))
        .collect()
}

impl Job {
    fn new(leased: Value) -> Option<Self> {
        let Value::Object(mut leased) = leased else {
            return None;
        };
        let mut text = |name: &str| match leased.remove(name) {
            Some(Value::String(text)) => Some(text),
            _ => None,
        };
        let (url, secret, body) = (text("url")?, text("secret"), text("body")?);
        let webhook_id = leased.get("webhook_id")?.as_str()?.to_owned();
        let headers = leased
            .get("headers")?
            .as_object()?
            .iter()
            .map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned())))
            .collect::<Option<_>>()?;
        Some(Self {
            endpoint_id: leased.get("endpoint_id")?.as_i64()?,
            webhook_id,
            url,
            headers,
            secret,
            body,
            timeout: Duration::from_millis(leased.get("timeout_ms")?.as_u64()?),
            max_response: usize::try_from(leased.get("max_response_bytes")?.as_u64()?).ok()?,
            identity: IDENTITY
                .iter()
                .map(|name| {
                    let value = leased.get(*name).cloned().unwrap_or(Value::Null);
                    ((*name).to_owned(), value)
                })
                .collect(),
        })
    }

    /// The request to send at `now` (seconds since 1970).
    pub fn request(&self, policy: Policy, now: u64) -> Request {
        let mut headers = self.headers.clone();
        headers.push(("webhook-timestamp".to_owned(), now.to_string()));
        if let Some(secret) = &self.secret {
            let signature = sign::signature(secret, &self.webhook_id, now, self.body.as_bytes());
            headers.push(("webhook-signature".to_owned(), signature));
        }
        Request {
            method: "POST",
            url: self.url.clone(),
            headers,
            body: self.body.clone().into_bytes(),
            timeout: self.timeout,
            max_body: self.max_response,
            policy,
        }
    }

    /// What came of it: a `_request_outcome`.
    pub fn outcome(&self, answer: &Result<Response, Failure>, took: Duration) -> Value {
        let mut outcome = self.identity.clone();
        outcome.insert("took_ms".to_owned(), json!(took.as_millis() as u64));
        match answer {
            Ok(response) => {
                // The first of a name counts; SQL keeps a few of them.
                let mut headers = Map::new();
                for (name, value) in &response.headers {
                    headers
                        .entry(name.clone())
                        .or_insert_with(|| json!(without_nul(value)));
                }
                outcome.insert("status".to_owned(), json!(response.status));
                outcome.insert("headers".to_owned(), Value::Object(headers));
                outcome.insert(
                    "body".to_owned(),
                    json!(text(&response.body, response.truncated)),
                );
                outcome.insert("truncated".to_owned(), json!(response.truncated));
            }
            Err(failure) => {
                outcome.insert("error".to_owned(), json!(without_nul(&failure.message)));
                outcome.insert("retryable".to_owned(), json!(failure.retryable));
            }
        }
        Value::Object(outcome)
    }

    /// The outcome of a request that its sender gave up because it stops: nobody knows whether it arrived.
    pub fn stopped(&self) -> Value {
        let mut outcome = self.identity.clone();
        outcome.insert("error".to_owned(), json!("the sender was stopped"));
        outcome.insert("retryable".to_owned(), json!(true));
        outcome.insert("blameless".to_owned(), json!(true));
        Value::Object(outcome)
    }
}

/// A body as Postgres can keep it: UTF-8 without NUL; a letter that was cut in two is left out.
fn text(body: &[u8], truncated: bool) -> String {
    let body = match std::str::from_utf8(body) {
        Err(error) if truncated && error.error_len().is_none() => &body[..error.valid_up_to()],
        _ => body,
    };
    without_nul(&String::from_utf8_lossy(body))
}

fn without_nul(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::FailureKind;

    const LEASED: &str = r#"[{
        "org_id": "6f1f3a52-0000-4000-8000-000000000001", "endpoint_id": 7, "request_id": 9007199254740993, "receipt": "r",
        "attempt": 2, "webhook_id": "msg_1", "url": "https://example.com/", "headers": {"authorization": "Bearer s3cret"},
        "secret": "whsec_AAEC", "body": "{\"a\": 1.10}", "timeout_ms": 1500, "max_response_bytes": 10,
        "enqueued_at": "2026-01-01T00:00:00+00:00", "position": null
    }]"#;

    fn job() -> Job {
        parse(LEASED).expect("a lease").remove(0)
    }

    #[test]
    fn a_lease_becomes_a_signed_request() {
        let request = job().request(Policy::default(), 1_700_000_000);
        assert_eq!(request.body, br#"{"a": 1.10}"#);
        assert_eq!(request.timeout, Duration::from_millis(1_500));
        let header = |name: &str| {
            let header = request.headers.iter().find(|(known, _)| known == name);
            header.map(|(_, value)| value.as_str())
        };
        assert_eq!(header("webhook-timestamp"), Some("1700000000"));
        assert_eq!(
            header("webhook-signature").map(str::to_owned),
            Some(sign::signature(
                "whsec_AAEC",
                "msg_1",
                1_700_000_000,
                br#"{"a": 1.10}"#
            ))
        );
    }

    #[test]
    fn an_outcome_names_its_lease_and_no_secret() {
        let answer = Ok(Response {
            status: 200,
            headers: vec![
                ("x".to_owned(), "1".to_owned()),
                ("x".to_owned(), "2".to_owned()),
            ],
            body: "a\0ä".as_bytes()[..3].to_vec(),
            truncated: true,
        });
        let outcome = job().outcome(&answer, Duration::from_millis(12));
        assert_eq!(outcome["request_id"].to_string(), "9007199254740993");
        assert_eq!(outcome["body"], "a\u{fffd}");
        assert_eq!(outcome["headers"], json!({"x": "1"}));
        assert_eq!(outcome["took_ms"], 12);
        let failure = Err(Failure {
            kind: FailureKind::Refused,
            message: "no".to_owned(),
            retryable: false,
        });
        for outcome in [
            outcome,
            job().outcome(&failure, Duration::ZERO),
            job().stopped(),
        ] {
            assert!(!outcome.to_string().contains("s3cret"));
            assert!(!outcome.to_string().contains("whsec"));
        }
    }

    #[test]
    fn what_is_no_lease_is_refused_without_being_shown() {
        for leased in ["s3cret", "{}", r#"["s3cret"]"#, r#"[{"url": "s3cret"}]"#] {
            let fault = parse(leased).expect_err(leased);
            assert!(!fault.contains("s3cret"), "{fault}");
        }
    }
}
