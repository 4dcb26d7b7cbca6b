//! `owl top`: the state of an installation on one screen.

use crate::connect::{Row, Target, rows};
use crate::terminal::{self, Key, Screen};
use postgres::Client;
use std::collections::VecDeque;
use std::time::Duration;

/// What is on the screen, as the database says it.
#[derive(Clone, Debug, Default)]
pub struct Sight {
    version: String,
    server: String,
    time: String,
    seconds: f64,
    positions: f64,
    queues: Vec<Row>,
    consumers: Vec<Row>,
    floors: Vec<Row>,
    endpoints: Option<Vec<Row>>,
    health: Vec<Row>,
    clock: Row,
}

/// How much of the past is remembered, in looks.
const PAST: usize = 60;

/// One frame, for scripts.
pub fn once(target: &Target) -> Result<String, String> {
    let sight = look(&mut target.connect()?)?;
    let (columns, lines) = terminal::size();
    let lines = frame(
        &sight,
        &VecDeque::new(),
        &target.shown(),
        None,
        columns,
        lines.max(24),
    );
    Ok(lines
        .iter()
        .map(|line| line.plain().trim_end().to_owned() + "\n")
        .collect())
}

/// Frame after frame, until q.
pub fn live(target: &Target, every: Duration) -> Result<String, String> {
    if !terminal::is_interactive() {
        return Err("this is no terminal: owl top --once prints one frame".to_owned());
    }
    let mut client = Some(target.connect()?);
    let failed = |error: std::io::Error| format!("the terminal: {error}");
    let mut sight = Sight::default();
    let mut past: VecDeque<f64> = VecDeque::new();
    let screen = Screen::open().map_err(failed)?;
    loop {
        let looked = match client.take().map_or_else(|| target.connect(), Ok) {
            Ok(mut session) => look(&mut session).inspect(|_| client = Some(session)),
            Err(error) => Err(error),
        };
        let mut trouble = None;
        match looked {
            Ok(next) => {
                let seconds = next.seconds - sight.seconds;
                if sight.seconds > 0.0 && seconds > 0.2 {
                    past.push_back(((next.positions - sight.positions) / seconds).max(0.0));
                    if past.len() > PAST {
                        past.pop_front();
                    }
                }
                sight = next;
            }
            Err(error) => trouble = Some(error),
        }
        loop {
            let (columns, lines) = terminal::size();
            let drawn = frame(
                &sight,
                &past,
                &target.shown(),
                trouble.as_deref(),
                columns,
                lines,
            );
            let drawn: Vec<String> = drawn.iter().map(Line::coloured).collect();
            screen.show(&drawn).map_err(failed)?;
            match screen.wait(every) {
                Some(Key::Quit) => return Ok(String::new()),
                Some(Key::Other) if terminal::size() != (columns, lines) => {}
                _ => break,
            }
        }
    }
}

fn look(client: &mut Client) -> Result<Sight, String> {
    let mut sight = Sight::default();
    let head = rows(
        client,
        "select nightowls.version(), split_part(current_setting('server_version'), ' ', 1), to_char(clock_timestamp(), 'HH24:MI:SS'),
                extract(epoch from clock_timestamp()), nightowls._positions_drawn(), to_regclass('nightowls.dispatch_status') is not null,
                (select count(*) from nightowls.orgs) > 1",
    )?;
    let head = &head[0];
    let number = |column: usize| text(head, column).parse().unwrap_or_default();
    sight.version = text(head, 0).to_owned();
    sight.server = text(head, 1).to_owned();
    sight.time = text(head, 2).to_owned();
    (sight.seconds, sight.positions) = (number(3), number(4));
    let dispatch = text(head, 5) == "t";
    // Names are unique within an org only.
    let named = |column: &str| {
        if text(head, 6) == "t" {
            format!("coalesce(left(o.name, 12), '?') || '/' || {column}")
        } else {
            column.to_owned()
        }
    };
    sight.queues = rows(
        client,
        &format!(
            "select {}, m.queue_visible_length, m.leased, m.delayed, m.waiting, m.dead_letters, m.oldest_msg_age_sec,
                    concat_ws(' ', case when m.paused then 'paused' end, case when m.estimated then 'counted earlier' end)
               from nightowls.queue_metrics m
               left join nightowls.orgs o on o.org_id = m.org_id
              where m.queue_name not like 'endpoint/%'
              order by m.queue_length + m.dead_letters desc, 1
              limit 200",
            named("m.queue_name")
        ),
    )?;
    sight.consumers = rows(
        client,
        &format!(
            "select {} || case when l.members > 1 then '#' || l.member else '' end,
                    case when l.lag_events >= 10000 then '10000+' else l.lag_events::text end, l.behind,
                    case when l.lease_until > clock_timestamp() then 'at work' when l.paused_until > clock_timestamp() then 'rests' else 'idle' end,
                    l.parked, l.horizon_pid
               from (select c.*, count(*) over (partition by c.org_id, c.consumer) as members,
                            (select greatest(extract(epoch from clock_timestamp() - e.created_at), 0)::bigint
                               from nightowls.events e
                              where e.org_id = c.org_id and e.position > c.\"offset\" order by e.position limit 1) as behind
                       from nightowls.consumer_lag c) l
               left join nightowls.orgs o on o.org_id = l.org_id
              order by l.behind desc nulls last, 1
              limit 200",
            named("l.consumer")
        ),
    )?;
    sight.floors = rows(
        client,
        &format!(
            "select {}, f.status, f.holder, greatest(extract(epoch from clock_timestamp() - f.granted_at), 0)::bigint, f.waiting
               from nightowls.floor_status f
               left join nightowls.orgs o on o.org_id = f.org_id
              where f.holder is not null or f.waiting > 0
              order by f.waiting desc, f.granted_at, 1
              limit 200",
            named("f.container")
        ),
    )?;
    if dispatch {
        sight.endpoints = Some(rows(
            client,
            &format!(
                "select {}, d.waiting, d.in_flight, d.retrying, d.dead, coalesce(d.last_took_ms || ' ms', '-'),
                        coalesce(case when d.paused then 'paused' when d.fault is not null then d.fault when d.open_until is not null then 'left alone' end,
                                 case when d.last_error is not null then d.last_error else d.last_status::text end)
                   from nightowls.dispatch_status d
                   left join nightowls.orgs o on o.org_id = d.org_id
                  order by d.dead desc, d.waiting + d.in_flight + d.retrying desc, 1
                  limit 200",
                named("d.endpoint")
            ),
        )?);
    }
    sight.health = rows(
        client,
        "select h.ok, h.concern || '.' || h.name, h.value from nightowls.health h order by h.ok, 2",
    )?;
    sight.clock = rows(
        client,
        "select count(*), count(*) filter (where c.error is not null),
                floor(extract(epoch from clock_timestamp() - max(c.ran_at))), sum(c.total) from nightowls.clock_parts c",
    )?
    .remove(0);
    Ok(sight)
}

fn text(row: &[Option<String>], column: usize) -> &str {
    row.get(column)
        .and_then(Option::as_deref)
        .unwrap_or_default()
}

/// How a piece of a line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    Plain,
    Head,
    Title,
    Dim,
    Good,
    Bad,
    Warn,
}

/// A line of the screen, in pieces.
#[derive(Clone, Debug, Default)]
pub struct Line(Vec<(Style, String)>);

impl Line {
    fn of(style: Style, text: impl Into<String>) -> Self {
        Line(vec![(style, text.into())])
    }

    fn and(mut self, style: Style, text: impl Into<String>) -> Self {
        self.0.push((style, text.into()));
        self
    }

    /// Cut to `columns`, and filled up where its first piece is a bar.
    fn fitted(self, columns: usize) -> Self {
        let mut left = columns;
        let mut pieces = Vec::new();
        for (style, text) in self.0 {
            let text = cut(&text, left);
            left -= text.chars().count();
            pieces.push((style, text));
        }
        if let Some((Style::Head, _)) = pieces.first() {
            pieces.push((Style::Head, " ".repeat(left)));
        }
        Line(pieces)
    }

    fn plain(&self) -> String {
        self.0.iter().map(|(_, text)| text.as_str()).collect()
    }

    fn coloured(&self) -> String {
        self.0
            .iter()
            .map(|(style, text)| {
                let code = match style {
                    Style::Plain => "0",
                    Style::Head => "7",
                    Style::Title => "1;36",
                    Style::Dim => "2",
                    Style::Good => "32",
                    Style::Bad => "1;31",
                    Style::Warn => "33",
                };
                format!("\x1b[0;{code}m{text}")
            })
            .collect()
    }
}

/// At most so many characters, the last one … where some are missing; no control characters.
fn cut(text: &str, columns: usize) -> String {
    let text: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if text.chars().count() <= columns {
        return text;
    }
    let mut short: String = text.chars().take(columns.saturating_sub(1)).collect();
    if columns > 0 {
        short.push('…');
    }
    short
}

/// Seconds as a person says them.
fn age(seconds: &str) -> String {
    let Ok(seconds) = seconds.parse::<f64>() else {
        return "-".to_owned();
    };
    match seconds as u64 {
        s @ 0..120 => format!("{s} s"),
        s @ 120..7200 => format!("{} min", s / 60),
        s @ 7200..172_800 => format!("{} h", s / 3600),
        s => format!("{} d", s / 86_400),
    }
}

/// A whole number with a blank between thousands.
fn grouped(number: &str) -> String {
    if number.is_empty() || !number.chars().all(|c| c.is_ascii_digit()) {
        return if number.is_empty() {
            "-".to_owned()
        } else {
            number.to_owned()
        };
    }
    let mut out = String::new();
    for (index, digit) in number.chars().enumerate() {
        if index > 0 && (number.len() - index).is_multiple_of(3) {
            out.push(' ');
        }
        out.push(digit);
    }
    out
}

/// A little chart of the past, the newest at the right.
fn spark(past: &VecDeque<f64>, columns: usize) -> String {
    let bars = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let shown = past.iter().skip(past.len().saturating_sub(columns));
    let most = past.iter().copied().fold(1.0, f64::max);
    shown
        .map(|value| bars[((value / most * 7.0).round() as usize).min(7)])
        .collect()
}

/// A table: its columns' heads and widths (the first takes what is left), and its rows.
struct Table {
    title: &'static str,
    heads: &'static [(&'static str, usize)],
    rows: Vec<(Style, Vec<String>)>,
    nothing: &'static str,
}

impl Table {
    fn wanted(&self) -> usize {
        1 + self.rows.len().max(1)
    }

    /// Exactly so many lines, or fewer.
    fn lines(&self, columns: usize, most: usize) -> Vec<Line> {
        if most < 2 {
            return Vec::new();
        }
        let rest: usize = self.heads.iter().skip(1).map(|(_, width)| width + 1).sum();
        let first = columns.saturating_sub(rest + 2).clamp(8, 40);
        let written = |cells: &mut dyn Iterator<Item = &str>| -> String {
            let mut line = String::from(" ");
            for (index, (cell, (head, width))) in cells.zip(self.heads).enumerate() {
                let width = if index == 0 { first } else { *width };
                let cell = cut(cell, width);
                // Numbers stand at the right, words at the left.
                line += &if index == 0 || head.starts_with('<') {
                    format!("{cell:<width$} ")
                } else {
                    format!("{cell:>width$} ")
                };
            }
            line.trim_end().to_owned()
        };
        let mut heads = self
            .heads
            .iter()
            .map(|(head, _)| head.trim_start_matches('<'));
        let mut lines = vec![Line::of(
            Style::Title,
            written(&mut heads).replacen(' ', "", 1),
        )];
        if self.rows.is_empty() {
            lines.push(Line::of(Style::Dim, format!(" {}", self.nothing)));
        }
        let fits = if self.rows.len() < most {
            self.rows.len()
        } else {
            most - 2
        };
        for (style, cells) in &self.rows[..fits] {
            lines.push(Line::of(
                *style,
                written(&mut cells.iter().map(String::as_str)),
            ));
        }
        if fits < self.rows.len() {
            lines.push(Line::of(
                Style::Dim,
                format!(" … {} more {}", self.rows.len() - fits, self.title),
            ));
        }
        lines
    }
}

fn tables(sight: &Sight) -> Vec<Table> {
    let numbers = |row: &Row, columns: std::ops::Range<usize>| -> Vec<String> {
        columns.map(|column| grouped(text(row, column))).collect()
    };
    let named = |row: &Row| text(row, 0).to_owned();
    let queues = sight.queues.iter().map(|row| {
        let mut cells = vec![named(row)];
        cells.extend(numbers(row, 1..6));
        cells.extend([age(text(row, 6)), text(row, 7).to_owned()]);
        let style = match (text(row, 5), text(row, 7).starts_with("paused")) {
            ("0" | "", false) => Style::Plain,
            ("0" | "", true) => Style::Warn,
            _ => Style::Bad,
        };
        (style, cells)
    });
    let consumers = sight.consumers.iter().map(|row| {
        let cells = vec![
            named(row),
            grouped(text(row, 1)),
            if text(row, 2).is_empty() {
                "0 s".to_owned()
            } else {
                age(text(row, 2))
            },
            grouped(text(row, 4)),
            text(row, 3).to_owned(),
        ];
        let late = text(row, 2).parse::<u64>().unwrap_or(0) > 600;
        let style = match (text(row, 4), late) {
            ("0", false) => Style::Plain,
            ("0", true) => Style::Warn,
            _ => Style::Bad,
        };
        (style, cells)
    });
    let floors = sight.floors.iter().map(|row| {
        let cells = vec![
            named(row),
            grouped(text(row, 4)),
            age(text(row, 3)),
            text(row, 1).to_owned(),
            text(row, 2).to_owned(),
        ];
        (
            if text(row, 1) == "stale" {
                Style::Warn
            } else {
                Style::Plain
            },
            cells,
        )
    });
    let mut all = vec![
        Table {
            title: "queues",
            heads: &[
                ("QUEUE", 0),
                ("ready", 8),
                ("leased", 7),
                ("delayed", 7),
                ("waiting", 7),
                ("dead", 5),
                ("oldest", 7),
                ("<", 15),
            ],
            rows: queues.collect(),
            nothing: "no queues",
        },
        Table {
            title: "consumers",
            heads: &[
                ("CONSUMER", 0),
                ("events behind", 13),
                ("by", 7),
                ("parked", 6),
                ("<", 8),
            ],
            rows: consumers.collect(),
            nothing: "no consumers",
        },
        Table {
            title: "floors",
            heads: &[
                ("FLOOR", 0),
                ("in line", 7),
                ("for", 7),
                ("<status", 6),
                ("<holder", 24),
            ],
            rows: floors.collect(),
            nothing: "nobody holds a floor",
        },
    ];
    if let Some(endpoints) = &sight.endpoints {
        let endpoints = endpoints.iter().map(|row| {
            let mut cells = vec![named(row)];
            cells.extend(numbers(row, 1..5));
            cells.extend([text(row, 5).to_owned(), text(row, 6).to_owned()]);
            (
                if text(row, 4) == "0" {
                    Style::Plain
                } else {
                    Style::Bad
                },
                cells,
            )
        });
        all.push(Table {
            title: "endpoints",
            heads: &[
                ("ENDPOINT", 0),
                ("waiting", 7),
                ("in flight", 9),
                ("later", 6),
                ("dead", 5),
                ("took", 8),
                ("<last", 18),
            ],
            rows: endpoints.collect(),
            nothing: "no endpoints",
        });
    }
    all
}

/// The whole screen: never more than `columns` by `lines`.
fn frame(
    sight: &Sight,
    past: &VecDeque<f64>,
    at: &str,
    trouble: Option<&str>,
    columns: usize,
    lines: usize,
) -> Vec<Line> {
    let right = format!("{}  q quits ", sight.time);
    let left = format!(
        " owl top  {at}  nightowls {} on PostgreSQL {}",
        sight.version, sight.server
    );
    let room = columns.saturating_sub(right.chars().count() + 1);
    let left = cut(&left, room);
    let mut out = vec![Line::of(Style::Head, format!("{left:<room$} {right}"))];
    if let Some(trouble) = trouble {
        out.push(Line::of(Style::Bad, format!(" {trouble}")));
    }
    let rate = past
        .back()
        .map_or_else(String::new, |rate| format!("{rate:.0} events/s  "));
    let (failing, ran) = (text(&sight.clock, 1), text(&sight.clock, 2));
    let clock = match (ran, failing) {
        ("", _) => Line::of(Style::Warn, "clock: has never run"),
        (ran, "0") => Line::of(Style::Plain, format!("clock: ran {} ago", age(ran))),
        (ran, failing) => Line::of(
            Style::Bad,
            format!("clock: ran {} ago, failing: {failing}", age(ran)),
        ),
    };
    let mut line = Line::of(
        Style::Plain,
        format!(
            " position {}   {rate}",
            grouped(&format!("{:.0}", sight.positions))
        ),
    );
    line = line.and(
        Style::Good,
        spark(past, columns.saturating_sub(70).clamp(10, 40)),
    );
    for (style, text) in clock.0 {
        line = line.and(style, format!("   {text}"));
    }
    out.push(line);

    // What is wrong comes first, and never more of it than a third of the screen.
    let bad: Vec<&Row> = sight
        .health
        .iter()
        .filter(|row| text(row, 0) != "t")
        .collect();
    let summary = format!(
        "{} of {} checks are well",
        sight.health.len() - bad.len(),
        sight.health.len()
    );
    out.push(Line::of(Style::Title, "HEALTH  ").and(
        if bad.is_empty() {
            Style::Good
        } else {
            Style::Bad
        },
        summary,
    ));
    let most = (lines / 3).saturating_sub(1).max(1);
    let shown = if bad.len() <= most {
        bad.len()
    } else {
        most - 1
    };
    for row in &bad[..shown] {
        out.push(
            Line::of(Style::Bad, format!(" {:<28} ", text(row, 1))).and(Style::Plain, text(row, 2)),
        );
    }
    if shown < bad.len() {
        out.push(Line::of(
            Style::Dim,
            format!(
                " … {} more; select * from nightowls.health",
                bad.len() - shown
            ),
        ));
    }

    let tables = tables(sight);
    let wanted: Vec<usize> = tables.iter().map(Table::wanted).collect();
    let given = shared(&wanted, lines.saturating_sub(out.len()));
    for (table, most) in tables.iter().zip(given) {
        out.extend(table.lines(columns, most));
    }
    out.truncate(lines);
    out.into_iter().map(|line| line.fitted(columns)).collect()
}

/// Shares lines out: a line at a time to each that wants more.
fn shared(wanted: &[usize], lines: usize) -> Vec<usize> {
    let mut given = vec![0; wanted.len()];
    let mut left = lines;
    while left > 0
        && given
            .iter()
            .zip(wanted)
            .any(|(given, wanted)| given < wanted)
    {
        for (given, wanted) in given.iter_mut().zip(wanted) {
            if left > 0 && *given < *wanted {
                *given += 1;
                left -= 1;
            }
        }
    }
    given
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(cells: &[&str]) -> Row {
        cells.iter().map(|cell| Some((*cell).to_owned())).collect()
    }

    fn busy() -> Sight {
        let many = |make: &dyn Fn(usize) -> Row| (0..50).map(make).collect::<Vec<_>>();
        Sight {
            version: "0.1.0".to_owned(),
            server: "15.8".to_owned(),
            time: "12:00:00".to_owned(),
            seconds: 1.0,
            positions: 1_234_567.0,
            queues: many(&|n| {
                row(&[
                    &format!("a queue with a name that is long {n}"),
                    "1234567",
                    "12",
                    "3",
                    "0",
                    "1",
                    "86400",
                    "",
                ])
            }),
            consumers: many(&|n| row(&[&format!("c{n}"), "10000+", "7200", "idle", "0"])),
            floors: many(&|n| row(&[&format!("run:{n}"), "held", "agent\u{1b}[31m", "12", "3"])),
            endpoints: Some(many(&|n| {
                row(&[&format!("e{n}"), "1", "2", "3", "0", "12 ms", "200"])
            })),
            health: many(&|n| row(&["f", &format!("queues.check_{n}"), "bad"])),
            clock: row(&["12", "1", "30", "1"]),
        }
    }

    #[test]
    fn a_frame_keeps_to_its_screen_whatever_there_is() {
        for (columns, lines) in [(80, 24), (40, 10), (200, 60), (20, 5), (81, 25)] {
            for sight in [busy(), Sight::default()] {
                let drawn = frame(
                    &sight,
                    &VecDeque::from(vec![1.0, 5.0]),
                    "d at h",
                    Some("gone"),
                    columns,
                    lines,
                );
                assert!(drawn.len() <= lines, "{columns}x{lines}: {}", drawn.len());
                for line in drawn {
                    let plain = line.plain();
                    assert!(plain.chars().count() <= columns, "{columns}: {plain}");
                    assert!(!plain.chars().any(char::is_control), "{plain:?}");
                }
            }
        }
    }

    #[test]
    fn on_80_by_24_every_concern_has_its_lines() {
        let drawn: Vec<String> = frame(&busy(), &VecDeque::new(), "d at h", None, 80, 24)
            .iter()
            .map(Line::plain)
            .collect();
        let all = drawn.join("\n");
        for word in [
            "HEALTH",
            "QUEUE",
            "CONSUMER",
            "FLOOR",
            "ENDPOINT",
            "more queues",
            "more consumers",
            "more floors",
            "more endpoints",
        ] {
            assert!(all.contains(word), "{word}:\n{all}");
        }
        assert_eq!(drawn.len(), 24);
    }

    #[test]
    fn numbers_are_as_a_person_says_them() {
        assert_eq!(grouped("1234567"), "1 234 567");
        assert_eq!(grouped("123"), "123");
        assert_eq!(grouped("10000+"), "10000+");
        assert_eq!(
            ["5", "119.9", "120", "7199", "7200", "172800", ""].map(age),
            ["5 s", "119 s", "2 min", "119 min", "2 h", "2 d", "-"]
        );
        assert_eq!(cut("abcdef", 4), "abc…");
        assert_eq!(shared(&[10, 1, 3], 6), [3, 1, 2]);
    }
}
