//! `owl tick`: the clock where there is neither pg_cron nor the worker.

use crate::connect::{Target, rows};
use postgres::Client;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::thread;
use std::time::{Duration, Instant};

/// Runs the clock once; says what it did.
///
/// # Errors
///
/// What the server said, or the parts that failed.
pub fn once(target: &Target, max_ms: u64) -> Result<String, String> {
    let (text, failed) = beat(&mut target.connect()?, max_ms)?;
    if failed {
        Err(text.trim_end().to_owned())
    } else {
        Ok(text)
    }
}

/// Runs the clock again and again until somebody stops it. What goes wrong is said, and tried again at the next beat.
pub fn forever(target: &Target, every: Duration, max_ms: u64) -> Result<String, String> {
    let mut client = Some(target.connect()?);
    loop {
        let start = Instant::now();
        let outcome = match client.take().map_or_else(|| target.connect(), Ok) {
            Ok(mut session) => beat(&mut session, max_ms).inspect(|_| client = Some(session)),
            Err(error) => Err(error),
        };
        match outcome {
            Ok((text, _)) => {
                let mut out = io::stdout();
                if out
                    .write_all(text.as_bytes())
                    .and_then(|()| out.flush())
                    .is_err()
                {
                    return Ok(String::new());
                }
            }
            Err(error) => eprintln!("owl: {error}"),
        }
        thread::sleep(every.saturating_sub(start.elapsed()));
    }
}

/// One run: what it did, and whether a part failed.
fn beat(client: &mut Client, max_ms: u64) -> Result<(String, bool), String> {
    let began = rows(client, "select clock_timestamp()")?;
    let began = began[0][0].clone().unwrap_or_default();
    rows(client, &format!("call nightowls.run_tick({max_ms})"))?;
    let parts = rows(
        client,
        &format!(
            "select to_char(c.ran_at at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS'), c.part, c.did, c.took_ms, c.error
               from nightowls.clock_parts c
              where c.ran_at >= '{began}' and (c.did > 0 or c.error is not null)
              order by c.ran_at"
        ),
    )?;
    let mut text = String::new();
    let mut failed = false;
    for row in parts {
        let [at, part, did, took, error] = <[_; 5]>::try_from(row).unwrap_or_default();
        let (at, part) = (at.unwrap_or_default(), part.unwrap_or_default());
        let _ = match error {
            Some(error) => {
                failed = true;
                writeln!(text, "{at}Z  {part:<12} failed: {error}")
            }
            None => writeln!(
                text,
                "{at}Z  {part:<12} {:>8} in {} ms",
                did.unwrap_or_default(),
                took.unwrap_or_default()
            ),
        };
    }
    if text.is_empty() {
        text.push_str("nothing was due\n");
    }
    Ok((text, failed))
}

/// `60s`, `5m`, `1h`, or seconds.
pub fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = match text.find(|c: char| !c.is_ascii_digit()) {
        Some(end) => text.split_at(end),
        None => (text, "s"),
    };
    let factor = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => 0,
    };
    number
        .parse::<u64>()
        .ok()
        .map(|number| number.saturating_mul(factor))
        .filter(|seconds| (1..=86_400).contains(seconds))
        .map(Duration::from_secs)
        .ok_or_else(|| format!("\"{text}\" is no time such as 60s, 5m or 1h, at most 24h"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_with_their_unit() {
        for (text, seconds) in [
            ("60s", Some(60)),
            ("5m", Some(300)),
            ("1h", Some(3600)),
            ("2", Some(2)),
            ("0s", None),
            ("1d", None),
            ("", None),
            ("h", None),
            ("99999999999999999999s", None),
            ("25h", None),
        ] {
            assert_eq!(
                duration(text).ok().map(|time| time.as_secs()),
                seconds,
                "{text}"
            );
        }
    }
}
