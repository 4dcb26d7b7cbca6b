//! `owl report`: one HTML page with charts, that needs nothing but itself.

use crate::connect::{Row, Target, rows};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

const STYLE: &str = include_str!("report.css");

/// How many points a chart has at most.
const STEPS: u64 = 240;

/// How many lines a chart has at most: those that rise highest.
const LINES: usize = 6;

/// Writes the page about the last `hours` to a file, or, for `-`, returns it.
pub fn write(target: &Target, hours: u64, path: &Path) -> Result<String, String> {
    let page = page(target, hours)?;
    if path.as_os_str() == "-" {
        return Ok(page);
    }
    // Whole or not at all.
    let mut hidden = path.as_os_str().to_owned();
    hidden.push(format!(".{}", std::process::id()));
    fs::write(&hidden, page)
        .and_then(|()| fs::rename(&hidden, path))
        .map_err(|error| {
            let _ = fs::remove_file(&hidden);
            format!("cannot write \"{}\": {error}", path.display())
        })?;
    Ok(format!("wrote {}\n", path.display()))
}

/// A line of a chart: its name, and values by time in seconds.
#[derive(Clone, Debug, Default)]
struct Series {
    name: String,
    points: Vec<(f64, f64)>,
}

/// What the values are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Unit {
    Count,
    PerSecond,
    Seconds,
    Milliseconds,
}

struct Chart<'a> {
    title: &'a str,
    about: &'a str,
    unit: Unit,
    bars: bool,
    series: Vec<Series>,
    nothing: &'a str,
}

/// The time that all charts show.
#[derive(Clone, Copy)]
struct Span {
    from: f64,
    to: f64,
    step: f64,
}

fn page(target: &Target, hours: u64) -> Result<String, String> {
    let mut client = target.connect()?;
    let head = rows(
        &mut client,
        "select nightowls.version(), split_part(current_setting('server_version'), ' ', 1), to_char(clock_timestamp() at time zone 'UTC', 'YYYY-MM-DD HH24:MI') || ' UTC',
                extract(epoch from clock_timestamp()), nightowls._positions_drawn(), to_regclass('nightowls.responses') is not null,
                (select count(*) from nightowls.orgs), (select count(*) > 1 from nightowls.orgs), current_database()",
    )?
    .remove(0);
    let to: f64 = text(&head, 3)
        .parse()
        .map_err(|_| "the server has no time".to_owned())?;
    let seconds = hours as f64 * 3600.0;
    let span = Span {
        from: to - seconds,
        to,
        step: (seconds / STEPS as f64).max(60.0),
    };
    let many = text(&head, 7) == "t";

    let mut sampled = |metric: &str, joined: &str, how: &str| -> Result<Vec<Series>, String> {
        let name = if many {
            "coalesce(left(o.name, 16), '?') || '/' || s.name"
        } else {
            "s.name"
        };
        let found = rows(
            &mut client,
            &format!(
                "select g.name, extract(epoch from g.at), max(g.value)
                   from (select {name} as name, s.sampled_at, date_bin('{step} seconds', s.sampled_at, '2000-01-01') as at, {joined}(s.value) as value
                           from (select x.org_id, x.sampled_at, x.value, {how} as name
                                   from nightowls._samples x
                                  where x.metric = '{metric}' and x.sampled_at > to_timestamp({from})) s
                           left join nightowls.orgs o on o.org_id = s.org_id
                          where s.name is not null
                          group by 1, 2, 3) g
                  group by 1, 2
                  order by 1, 2",
                step = span.step,
                from = span.from,
            ),
        )?;
        Ok(series(&found))
    };
    // What a queue's messages wait for stands before or after its name, as the labels sort.
    let depth = sampled(
        "queue_messages",
        "sum",
        "case when x.name !~ ' dead$' and x.name !~ '^endpoint/' then regexp_replace(x.name, ' [a-z]+$', '') end",
    )?;
    let ages = sampled(
        "queue_oldest_seconds",
        "max",
        "case when x.name !~ '^endpoint/' then x.name end",
    )?;
    let lag = sampled(
        "consumer_lag_seconds",
        "max",
        "regexp_replace(x.name, ' [0-9]+$', '')",
    )?;
    let found = rows(
        &mut client,
        &format!(
            "select 'events', extract(epoch from date_bin('{step} seconds', d.sampled_at, '2000-01-01')), sum(d.grown) / sum(d.seconds)
               from (select s.sampled_at, s.value - lag(s.value) over w as grown, extract(epoch from s.sampled_at - lag(s.sampled_at) over w) as seconds
                       from nightowls._samples s
                      where s.metric = 'positions' and s.sampled_at > to_timestamp({from})
                     window w as (order by s.sampled_at)) d
              where d.grown >= 0 and d.seconds between 1 and 600
              group by 2
              order by 2",
            step = span.step,
            from = span.from,
        ),
    )?;
    let events = series(&found);

    let (mut latency, mut requests) = (Vec::new(), Vec::new());
    let dispatch = text(&head, 5) == "t";
    if dispatch {
        let found = rows(
            &mut client,
            &format!(
                "select extract(epoch from date_bin('{step} seconds', r.received_at, '2000-01-01')),
                        percentile_cont(0.5) within group (order by r.took_ms), percentile_cont(0.95) within group (order by r.took_ms),
                        count(*) filter (where r.error is null and r.status between 200 and 299), count(*) filter (where not (r.error is null and r.status between 200 and 299) is true)
                   from (select p.received_at, p.took_ms, p.error, p.status
                           from nightowls.responses p
                          where p.received_at > to_timestamp({from})
                          order by p.received_at desc
                          limit 200000) r
                  group by 1
                  order by 1",
                step = span.step,
                from = span.from,
            ),
        )?;
        let column = |name: &str, column: usize| Series {
            name: name.to_owned(),
            points: found
                .iter()
                .filter_map(|row| {
                    Some((text(row, 0).parse().ok()?, text(row, column).parse().ok()?))
                })
                .collect(),
        };
        latency = vec![column("half were faster", 1), column("95 % were faster", 2)];
        requests = vec![column("delivered", 3), column("failed", 4)];
    }

    let none = "No samples: the clock takes one a minute while it runs.";
    let mut charts = vec![
        Chart {
            title: "Events",
            about: "appended a second",
            unit: Unit::PerSecond,
            bars: false,
            series: events,
            nothing: none,
        },
        Chart {
            title: "Queue depth",
            about: "messages that are not done",
            unit: Unit::Count,
            bars: false,
            series: depth,
            nothing: none,
        },
        Chart {
            title: "Oldest message",
            about: "age of the oldest message that is not done",
            unit: Unit::Seconds,
            bars: false,
            series: ages,
            nothing: none,
        },
        Chart {
            title: "Consumer lag",
            about: "age of the first event not passed",
            unit: Unit::Seconds,
            bars: false,
            series: lag,
            nothing: none,
        },
    ];
    if dispatch {
        let none = "No requests were sent.";
        charts.push(Chart {
            title: "Requests",
            about: "attempts, by how they ended",
            unit: Unit::Count,
            bars: true,
            series: requests,
            nothing: none,
        });
        charts.push(Chart {
            title: "Latency",
            about: "of requests, until the response was there",
            unit: Unit::Milliseconds,
            bars: false,
            series: latency,
            nothing: none,
        });
    }

    let health = rows(
        &mut client,
        "select h.ok, h.concern, h.name, h.value, h.hint from nightowls.health h order by h.ok",
    )?;
    let queues = rows(
        &mut client,
        "select coalesce(o.name, ''), m.queue_name, m.queue_visible_length, m.leased, m.delayed, m.waiting, m.dead_letters, m.oldest_msg_age_sec
           from nightowls.queue_metrics m left join nightowls.orgs o on o.org_id = m.org_id
          where m.queue_name not like 'endpoint/%'
          order by m.queue_length desc, 2 limit 25",
    )?;
    let consumers = rows(
        &mut client,
        "select coalesce(o.name, ''), l.consumer, max(l.lag_events), max(l.parked)
           from nightowls.consumer_lag l left join nightowls.orgs o on o.org_id = l.org_id
          group by 1, 2 order by 3 desc, 2 limit 25",
    )?;
    let parts = rows(
        &mut client,
        "select c.part, to_char(c.ran_at at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS'), c.took_ms, c.total, coalesce(c.error, '') from nightowls.clock_parts c order by 1",
    )?;

    let well = health.iter().filter(|row| text(row, 0) == "t").count();
    let sum = |column: usize| {
        queues
            .iter()
            .map(|row| text(row, column).parse::<f64>().unwrap_or(0.0))
            .sum::<f64>()
    };
    let rate = charts[0]
        .series
        .first()
        .and_then(|line| line.points.last())
        .map_or(0.0, |point| point.1);
    let tiles = [
        (
            "checks are well",
            format!("{well} of {}", health.len()),
            well < health.len(),
        ),
        ("events a second", short(rate), false),
        (
            "last position",
            short(text(&head, 4).parse().unwrap_or(0.0)),
            false,
        ),
        ("messages ready", short(sum(2)), false),
        ("dead letters", short(sum(6)), sum(6) > 0.0),
        ("orgs", short(text(&head, 6).parse().unwrap_or(0.0)), false),
    ];

    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>nightowls: {db}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n\
         <header><h1>{db}</h1><p>nightowls {version} on PostgreSQL {server}, the last {hours} hours until {now}</p></header>\n",
        db = escaped(text(&head, 8)),
        version = escaped(text(&head, 0)),
        server = escaped(text(&head, 1)),
        now = escaped(text(&head, 2)),
    );
    out.push_str("<section class=\"tiles\">\n");
    for (name, value, bad) in tiles {
        let class = if bad { "tile bad" } else { "tile" };
        let _ = writeln!(
            out,
            "<div class=\"{class}\"><b>{}</b><span>{name}</span></div>",
            escaped(&value)
        );
    }
    out.push_str("</section>\n");
    let (good, bad): (Vec<&Row>, Vec<&Row>) = health.iter().partition(|row| text(row, 0) == "t");
    if !bad.is_empty() {
        let _ = write!(
            out,
            "<section>\n<h2>To look at</h2>\n{}</section>\n",
            checks(&bad)
        );
    }
    out.push_str("<section class=\"charts\">\n");
    for chart in &charts {
        out.push_str(&drawn(chart, span));
    }
    out.push_str("</section>\n");
    out.push_str(&table(
        "Queues",
        &[
            "org",
            "queue",
            "ready",
            "leased",
            "delayed",
            "waiting",
            "dead",
            "oldest, s",
        ],
        2,
        &queues,
    ));
    out.push_str(&table(
        "Consumers",
        &["org", "consumer", "events behind", "parked"],
        2,
        &consumers,
    ));
    out.push_str(&table(
        "The clock",
        &["part", "last ran, UTC", "took, ms", "has done", "error"],
        2,
        &parts,
    ));
    let _ = write!(
        out,
        "<section>\n<details><summary>{} checks are well</summary>\n{}</details>\n</section>\n",
        good.len(),
        checks(&good)
    );
    out.push_str("</main>\n</body>\n</html>\n");
    Ok(out)
}

/// Lines of the view health.
fn checks(rows: &[&Row]) -> String {
    let mut out = String::from("<table class=\"health\">\n");
    for row in rows {
        let (class, word) = if text(row, 0) == "t" {
            ("good", "ok")
        } else {
            ("bad", "look")
        };
        let _ = writeln!(
            out,
            "<tr class=\"{class}\"><td><i>{word}</i></td><td>{}.{}</td><td>{}<small>{}</small></td></tr>",
            escaped(text(row, 1)),
            escaped(text(row, 2)),
            escaped(text(row, 3)),
            escaped(text(row, 4)),
        );
    }
    out.push_str("</table>\n");
    out
}

fn text(row: &Row, column: usize) -> &str {
    row.get(column)
        .and_then(Option::as_deref)
        .unwrap_or_default()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// Rows of name, time and value as series; those that rise highest first.
fn series(found: &[Row]) -> Vec<Series> {
    let mut by_name: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
    for row in found {
        if let (Ok(at), Ok(value)) = (text(row, 1).parse(), text(row, 2).parse()) {
            by_name.entry(text(row, 0)).or_default().push((at, value));
        }
    }
    let mut all: Vec<Series> = by_name
        .into_iter()
        .map(|(name, points)| Series {
            name: name.to_owned(),
            points,
        })
        .collect();
    all.sort_by(|a, b| highest(b).total_cmp(&highest(a)));
    all
}

fn highest(series: &Series) -> f64 {
    series
        .points
        .iter()
        .map(|point| point.1)
        .fold(0.0, f64::max)
}

/// A number in few characters.
fn short(value: f64) -> String {
    let (value, unit) = match value.abs() {
        v if v >= 1e9 => (value / 1e9, " G"),
        v if v >= 1e6 => (value / 1e6, " M"),
        v if v >= 1e4 => (value / 1e3, " k"),
        _ => (value, ""),
    };
    let digits = if value.abs() >= 100.0 || value.fract().abs() < 0.005 {
        0
    } else if value.abs() >= 10.0 {
        1
    } else {
        2
    };
    let number = format!("{value:.digits$}");
    let number = if number.contains('.') {
        number
            .trim_end_matches('0')
            .trim_end_matches('.')
            .to_owned()
    } else {
        number
    };
    format!("{number}{unit}")
}

fn measured(value: f64, unit: Unit) -> String {
    match unit {
        Unit::Count => short(value),
        Unit::PerSecond => format!("{}/s", short(value)),
        Unit::Milliseconds if value >= 1000.0 => format!("{} s", short(value / 1000.0)),
        Unit::Milliseconds => format!("{} ms", short(value)),
        Unit::Seconds if value >= 172_800.0 => format!("{} d", short(value / 86_400.0)),
        Unit::Seconds if value >= 7200.0 => format!("{} h", short(value / 3600.0)),
        Unit::Seconds if value >= 120.0 => format!("{} min", short(value / 60.0)),
        Unit::Seconds => format!("{} s", short(value)),
    }
}

/// The end of the scale, and the step of its lines: four at most, of round values.
fn scale(most: f64, unit: Unit) -> (f64, f64) {
    let most = if most > 0.0 { most } else { 1.0 };
    let rough = most / 4.0;
    let times: &[f64] = &[
        1.0, 2.0, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 900.0, 1800.0, 3600.0, 7200.0,
        21600.0, 43200.0, 86400.0,
    ];
    let step = match times
        .iter()
        .find(|step| unit == Unit::Seconds && **step >= rough)
    {
        Some(step) => *step,
        None => {
            let power = 10_f64.powf(rough.log10().floor());
            let step = [1.0, 2.0, 2.5, 5.0, 10.0]
                .iter()
                .map(|factor| factor * power)
                .find(|step| *step >= rough * 0.999)
                .unwrap_or(power * 10.0);
            // Of things that are counted there are no halves.
            if unit == Unit::Count {
                step.max(1.0).round()
            } else {
                step
            }
        }
    };
    ((most / step).ceil() * step, step)
}

/// A time of day in UTC.
fn clock(at: f64) -> String {
    let minutes = (at / 60.0).round() as u64;
    format!("{:02}:{:02}", minutes / 60 % 24, minutes % 60)
}

fn drawn(chart: &Chart, span: Span) -> String {
    let (width, height, left, top, bottom) = (640.0, 240.0, 58.0, 12.0, 26.0);
    let mut out = format!(
        "<figure><figcaption><b>{}</b> <span>{}</span></figcaption>\n",
        escaped(chart.title),
        escaped(chart.about)
    );
    let shown = &chart.series[..chart.series.len().min(LINES)];
    if shown.iter().all(|line| line.points.is_empty()) {
        let _ = writeln!(
            out,
            "<p class=\"nothing\">{}</p></figure>",
            escaped(chart.nothing)
        );
        return out;
    }
    let total = |index: usize| {
        shown
            .iter()
            .filter_map(|line| line.points.get(index))
            .map(|point| point.1)
            .sum::<f64>()
    };
    let most = if chart.bars {
        (0..shown[0].points.len()).map(total).fold(0.0, f64::max)
    } else {
        shown.iter().map(highest).fold(0.0, f64::max)
    };
    let (end, step) = scale(most, chart.unit);
    let x = |at: f64| {
        left + (at - span.from).clamp(0.0, span.to - span.from) / (span.to - span.from)
            * (width - left - 8.0)
    };
    let y = |value: f64| height - bottom - value / end * (height - bottom - top);
    let _ = writeln!(
        out,
        "<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{}\">",
        escaped(chart.title)
    );
    let mut line = 0.0;
    while line <= end * 1.001 {
        let _ = writeln!(
            out,
            "<line class=\"grid\" x1=\"{left}\" x2=\"{:.1}\" y1=\"{1:.1}\" y2=\"{1:.1}\"/><text x=\"{2:.1}\" y=\"{3:.1}\" text-anchor=\"end\">{4}</text>",
            width - 8.0,
            y(line),
            left - 8.0,
            y(line) + 4.0,
            measured(line, chart.unit)
        );
        line += step;
    }
    // Round hours, six at most.
    let hours = ((span.to - span.from) / 3600.0 / 6.0).max(0.25);
    let every = [0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 12.0, 24.0]
        .into_iter()
        .find(|step| *step >= hours)
        .unwrap_or(24.0)
        * 3600.0;
    let mut at = (span.from / every).ceil() * every;
    while at <= span.to {
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            x(at).min(width - 20.0),
            height - 8.0,
            clock(at)
        );
        at += every;
    }
    if chart.bars {
        let wide = (x(span.from + span.step) - x(span.from)).max(2.0) * 0.8;
        for index in 0..shown[0].points.len() {
            let mut base = 0.0;
            for (number, line) in shown.iter().enumerate() {
                let Some((at, value)) = line
                    .points
                    .get(index)
                    .copied()
                    .filter(|point| point.1 > 0.0)
                else {
                    continue;
                };
                let _ = writeln!(
                    out,
                    "<rect class=\"b{}\" x=\"{:.1}\" y=\"{:.1}\" width=\"{wide:.1}\" height=\"{:.1}\"><title>{} {}: {}</title></rect>",
                    number + 1,
                    x(at),
                    y(base + value),
                    (y(base) - y(base + value)).max(1.0),
                    clock(at),
                    escaped(&line.name),
                    measured(value, chart.unit)
                );
                base += value;
            }
        }
    } else {
        for (number, line) in shown.iter().enumerate().rev() {
            let mut path = String::new();
            for run in runs(&line.points, span.step.max(60.0) * 3.5) {
                let mut part = String::new();
                for (at, value) in run {
                    let _ = write!(
                        part,
                        "{}{:.1},{:.1}",
                        if part.is_empty() { "M" } else { "L" },
                        x(*at),
                        y(*value)
                    );
                }
                if let [only] = run {
                    let _ = write!(part, "L{:.1},{:.1}", x(only.0) + 1.0, y(only.1));
                }
                if let (1, Some(first), Some(last)) = (shown.len(), run.first(), run.last()) {
                    let _ = writeln!(
                        out,
                        "<path class=\"area\" d=\"{part}L{:.1},{2:.1}L{:.1},{2:.1}Z\"/>",
                        x(last.0),
                        x(first.0),
                        y(0.0)
                    );
                }
                path.push_str(&part);
            }
            let _ = writeln!(
                out,
                "<path class=\"l{}\" d=\"{path}\"><title>{}</title></path>",
                number + 1,
                escaped(&line.name)
            );
        }
    }
    out.push_str("</svg>\n<p class=\"legend\">");
    for (number, line) in shown.iter().enumerate() {
        let now = line.points.last().map_or(0.0, |point| point.1);
        let value = if chart.bars {
            line.points.iter().map(|point| point.1).sum()
        } else {
            now
        };
        let _ = write!(
            out,
            "<span><i class=\"k{}\"></i>{} <b>{}</b></span>",
            number + 1,
            escaped(&line.name),
            measured(value, chart.unit)
        );
    }
    if chart.series.len() > shown.len() {
        let _ = write!(
            out,
            "<span>{} more are lower</span>",
            chart.series.len() - shown.len()
        );
    }
    out.push_str("</p></figure>\n");
    out
}

/// The points between gaps: where the clock stood still there is no line.
fn runs(points: &[(f64, f64)], gap: f64) -> impl Iterator<Item = &[(f64, f64)]> {
    points.chunk_by(move |one, next| next.0 - one.0 <= gap)
}

/// A table; its first `words` columns are words, the others numbers.
fn table(title: &str, heads: &[&str], words: usize, rows: &[Row]) -> String {
    let mut out = format!("<section>\n<h2>{}</h2>\n", escaped(title));
    if rows.is_empty() {
        out.push_str("<p class=\"nothing\">None.</p>\n</section>\n");
        return out;
    }
    let class = |column: usize, cell: &str| {
        if column >= words && (cell.is_empty() || cell.parse::<f64>().is_ok()) {
            " class=\"n\""
        } else {
            ""
        }
    };
    out.push_str("<div class=\"wide\"><table>\n<tr>");
    for (column, head) in heads.iter().enumerate() {
        let number = rows
            .iter()
            .all(|row| !class(column, text(row, column)).is_empty());
        let _ = write!(
            out,
            "<th{}>{}</th>",
            if number { " class=\"n\"" } else { "" },
            escaped(head)
        );
    }
    out.push_str("</tr>\n");
    for row in rows {
        out.push_str("<tr>");
        for column in 0..heads.len() {
            let cell = text(row, column);
            let _ = write!(out, "<td{}>{}</td>", class(column, cell), escaped(cell));
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</table></div>\n</section>\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_end_at_round_values() {
        assert_eq!(scale(0.0, Unit::Count), (1.0, 1.0));
        assert_eq!(scale(3.0, Unit::Count), (3.0, 1.0));
        assert_eq!(scale(97.0, Unit::Count), (100.0, 25.0));
        assert_eq!(scale(4200.0, Unit::Seconds), (5400.0, 1800.0));
        assert!((scale(0.3, Unit::PerSecond).0 - 0.3).abs() < 1e-9);
    }

    #[test]
    fn values_are_short() {
        assert_eq!(
            [0.0, 1.5, 999.0, 12_345.0, 2e6].map(short),
            ["0", "1.5", "999", "12.3 k", "2 M"]
        );
        assert_eq!(measured(7200.0, Unit::Seconds), "2 h");
        assert_eq!(measured(1500.0, Unit::Milliseconds), "1.5 s");
    }

    #[test]
    fn names_cannot_write_into_the_page() {
        let line = Series {
            name: "<script>&\"".to_owned(),
            points: vec![(0.0, 1.0), (60.0, 2.0)],
        };
        let chart = Chart {
            title: "t",
            about: "a",
            unit: Unit::Count,
            bars: false,
            series: vec![line],
            nothing: "",
        };
        let svg = drawn(
            &chart,
            Span {
                from: 0.0,
                to: 3600.0,
                step: 60.0,
            },
        );
        assert!(!svg.contains("<script>") && svg.contains("&lt;script&gt;&amp;&quot;"));
    }

    #[test]
    fn a_gap_is_no_line() {
        let line = Series {
            name: "a".to_owned(),
            points: vec![(0.0, 1.0), (60.0, 2.0), (3000.0, 2.0), (3060.0, 1.0)],
        };
        let chart = Chart {
            title: "t",
            about: "a",
            unit: Unit::Count,
            bars: false,
            series: vec![line.clone(), line],
            nothing: "",
        };
        let svg = drawn(
            &chart,
            Span {
                from: 0.0,
                to: 3600.0,
                step: 60.0,
            },
        );
        let path = svg
            .split("class=\"l1\" d=\"")
            .nth(1)
            .and_then(|rest| rest.split('"').next())
            .unwrap_or_default();
        assert_eq!(path.matches('M').count(), 2, "{path}");
    }
}
