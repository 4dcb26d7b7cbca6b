//! Several requests at once, as JSON: what the backfill sends and what comes back.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use crate::http::{Client, Policy, Request, Response, without_signals};

/// As many requests are under way at once, at most.
const AT_ONCE: usize = 8;

/// The most of an answer that is read: 2,048 vectors of 4,096 numbers have less.
const MAX_BODY: usize = 128 * 1024 * 1024;

/// Sends a JSON array of `{url, headers, body, timeout_ms}` by POST and returns an array of
/// `{status, headers, body, failure}` in the same order. Nothing takes longer than `longest`.
/// `wait` is called every few milliseconds meanwhile, and may leave by a panic.
///
/// # Errors
///
/// What is wrong with the requests as JSON.
pub fn exchange(
    client: &Client,
    policy: Policy,
    requests: &str,
    longest: Duration,
    mut wait: impl FnMut(),
) -> Result<String, String> {
    let requests: Vec<Value> =
        serde_json::from_str(requests).map_err(|error| format!("not requests: {error}"))?;
    let end = Instant::now() + longest;
    let requests: Vec<Request> = requests
        .iter()
        .map(|request| request_of(request, policy))
        .collect::<Option<_>>()
        .ok_or("a request has no url or timeout_ms")?;
    let count = requests.len();
    let (tell, told) = mpsc::channel();
    let shared = Arc::new((requests, AtomicUsize::new(0)));
    without_signals(|| {
        for _ in 0..count.min(AT_ONCE) {
            let (tell, client, shared) = (tell.clone(), client.clone(), Arc::clone(&shared));
            let work = move || {
                let (requests, next) = &*shared;
                while let Some((place, request)) = {
                    let place = next.fetch_add(1, Ordering::Relaxed);
                    requests.get(place).map(|request| (place, request))
                } {
                    if tell.send((place, answer(&client, request, end))).is_err() {
                        break;
                    }
                }
            };
            // One thread will do; none is said below.
            let _ = thread::Builder::new().name("http".to_owned()).spawn(work);
        }
    });
    drop(tell);

    let mut answers = vec![failed("the system gave no thread"); count];
    let mut missing = count;
    let mut pause = Duration::from_millis(1);
    while missing > 0 {
        match told.recv_timeout(pause) {
            Ok((place, answer)) => {
                answers[place] = answer;
                missing -= 1;
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {
                wait();
                pause = (pause * 2).min(Duration::from_millis(20));
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
        }
    }
    // jsonb has no zero character.
    Ok(Value::Array(answers)
        .to_string()
        .replace("\\u0000", "\\ufffd"))
}

fn request_of(request: &Value, policy: Policy) -> Option<Request> {
    let headers = request.get("headers").and_then(Value::as_object);
    Some(Request {
        method: "POST",
        url: request.get("url")?.as_str()?.to_owned(),
        headers: headers
            .into_iter()
            .flatten()
            .map(|(name, value)| (name.clone(), value.as_str().unwrap_or_default().to_owned()))
            .collect(),
        body: request.get("body")?.as_str()?.as_bytes().to_vec(),
        timeout: Duration::from_millis(request.get("timeout_ms")?.as_u64()?),
        max_body: MAX_BODY,
        policy,
    })
}

fn answer(client: &Client, request: &Request, end: Instant) -> Value {
    let left = end.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return failed("there was no time left to send it");
    }
    let mut request = request.clone();
    request.timeout = request.timeout.min(left);
    match client.send(&request) {
        Ok(response) if response.truncated => failed("the answer is too large"),
        Ok(response) => json_of(response),
        Err(failure) => failed(&failure.message),
    }
}

fn json_of(response: Response) -> Value {
    let headers: Map<String, Value> = response
        .headers
        .into_iter()
        .map(|(name, value)| (name, Value::String(value)))
        .collect();
    json!({
        "status": response.status,
        "headers": headers,
        "body": String::from_utf8_lossy(&response.body),
    })
}

fn failed(message: &str) -> Value {
    json!({ "failure": message })
}
