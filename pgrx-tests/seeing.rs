//! What others see of an installation: metrics_text() as Prometheus reads it, the Grafana dashboard, owl tick, owl top and owl report.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use crate::fixture::{default_org, lines, new_org};
use crate::orm::{Found, Tools, or_skip, pip};
use crate::projections::text;
use crate::support::{
    Db, Install, SERVICE, STRANGER, Session, on_each_install, on_each_route, on_install, quote,
    skip, wait_until,
};

const DASHBOARD: &str = include_str!("../dashboards/nightowls.json");
const OPERATIONS: &str = include_str!("../docs/operations.md");

fn parser() -> Option<&'static Tools> {
    static PARSER: OnceLock<Found> = OnceLock::new();
    or_skip(
        "prometheus-client",
        PARSER.get_or_init(|| pip("metrics/py")),
    )
}

/// Every sample as Prometheus's own parser sees it: `name {labels} value`.
#[track_caller]
fn parsed(tools: &Tools, exposition: &str) -> Vec<String> {
    let mut python = Command::new(tools.folder.join("venv/bin/python"))
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("pgrx-tests/metrics/families.py"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("python runs");
    python
        .stdin
        .take()
        .expect("it is piped")
        .write_all(exposition.as_bytes())
        .expect("python reads");
    let output = python.wait_with_output().expect("python ends");
    assert!(
        output.status.success(),
        "{}\n{exposition}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout)
        .expect("python speaks UTF-8")
        .lines()
        .map(str::to_owned)
        .collect()
}

#[track_caller]
fn metrics(session: &mut Session) -> String {
    text(session, "select nightowls.metrics_text()")
}

/// A little of everything, in two orgs, with a name that would break a careless exposition.
fn busy(db: &Db) -> [String; 2] {
    let orgs = [default_org(db), new_org(db, "other")];
    let name = "a \"b\"\\c\nd";
    for org in &orgs {
        db.service().exec(&format!(
            "begin; select set_config('nightowls.org_id', '{org}', true);
             select nightowls.create_queue('jobs'), nightowls.send_batch('jobs', array_fill('1'::jsonb, array[7])), nightowls.read('jobs', 300, 2);
             select nightowls.create_consumer({});
             select nightowls.append_event('order', '1', 'noted') from generate_series(1, 5);
             select nightowls.request_floor('run:1', 'ann'), nightowls.request_floor('run:1', 'bob');
             commit",
            quote(name).replacen('\'', "E'", 1).replace('\\', "\\\\")
        ));
    }
    db.service().exec("select nightowls.tick()");
    orgs
}

#[test]
fn the_parser_of_prometheus_reads_every_figure() {
    let Some(tools) = parser() else { return };
    on_each_route(|db| {
        let [org, other] = busy(db);
        let samples = parsed(tools, &metrics(&mut db.service()));
        for (name, labels, value) in [
            (
                "nightowls_build_info",
                r#"{"version": "0.1.0"}"#.to_owned(),
                "1",
            ),
            (
                "nightowls_queue_messages",
                format!(r#"{{"org": "{org}", "queue": "jobs", "state": "visible"}}"#),
                "5",
            ),
            (
                "nightowls_queue_messages",
                format!(r#"{{"org": "{other}", "queue": "jobs", "state": "leased"}}"#),
                "2",
            ),
            (
                "nightowls_consumer_lag_positions",
                format!(r#"{{"consumer": "a \"b\"\\c\nd", "member": "0", "org": "{other}"}}"#),
                "",
            ),
            (
                "nightowls_floors",
                format!(r#"{{"org": "{org}", "status": "held"}}"#),
                "1",
            ),
            (
                "nightowls_floor_waiters",
                format!(r#"{{"org": "{org}"}}"#),
                "1",
            ),
            (
                "nightowls_healthy",
                r#"{"check": "guards", "concern": "log"}"#.to_owned(),
                "1",
            ),
            (
                "nightowls_clock_failing",
                r#"{"part": "queues"}"#.to_owned(),
                "0",
            ),
            (
                "nightowls_series_left_out",
                r#"{"of": "queues"}"#.to_owned(),
                "0",
            ),
        ] {
            let wanted = format!("{name} {labels} {value}");
            assert!(
                samples.iter().any(|sample| sample.starts_with(&wanted)),
                "{wanted}\n{samples:#?}"
            );
        }
        assert!(
            samples
                .iter()
                .any(|sample| sample.starts_with("nightowls_positions_total {} "))
        );
    });
}

#[test]
fn a_monitor_sees_totals_and_no_name_of_a_tenant() {
    on_each_install(|db| {
        let orgs = busy(db);
        let mut owner = db.owner();
        owner.exec(&format!("select nightowls.grant_monitor('{STRANGER}')"));
        assert_eq!(
            owner
                .refused("select nightowls.grant_monitor('owl_nobody')")
                .code,
            "42704"
        );
        assert_eq!(
            owner.refused("select nightowls.grant_monitor(null)").code,
            "22004"
        );
        let mut monitor = db.session(STRANGER);
        let seen = metrics(&mut monitor);
        for hidden in [
            orgs[0].as_str(),
            &orgs[1],
            "org=",
            "jobs",
            "queue=",
            "consumer=",
            "run:1",
        ] {
            assert!(!seen.contains(hidden), "{hidden}\n{seen}");
        }
        for shown in [
            "nightowls_queue_messages{state=\"visible\"} 10\n",
            "nightowls_queue_messages{state=\"leased\"} 4\n",
            "nightowls_floors{status=\"held\"} 2\n",
            "nightowls_healthy{check=\"guards\",concern=\"log\"} 1\n",
        ] {
            assert!(seen.contains(shown), "{shown}\n{seen}");
        }
        if let Some(tools) = parser() {
            parsed(tools, &seen);
        }
        for sql in [
            "select * from nightowls.queues",
            "select nightowls.tick()",
            "select * from nightowls.health",
        ] {
            assert_eq!(monitor.refused(sql).code, "42501", "{sql}");
        }
    });
}

#[test]
fn what_is_too_much_to_show_is_left_out_and_said() {
    on_install(Install::Plain, |db| {
        default_org(db);
        let mut service = db.service();
        service.exec("select nightowls.create_queue('q' || i) from generate_series(1, 1010) i");
        let seen = metrics(&mut service);
        assert!(seen.contains("nightowls_series_left_out{of=\"queues\"} 10\n"));
        assert_eq!(seen.matches("nightowls_queue_paused{").count(), 1000);
    });
}

#[test]
fn a_sample_is_taken_once_a_minute_and_kept_for_two_days() {
    on_each_install(|db| {
        busy(db);
        let mut service = db.service();
        let count = "select count(distinct sampled_at) from nightowls._samples";
        assert_eq!(text(&mut service, count), "1");
        service.exec("select nightowls.tick()");
        assert_eq!(text(&mut service, count), "1");
        db.superuser()
            .exec("update nightowls._samples set sampled_at = sampled_at - interval '51 seconds'");
        service.exec("select nightowls.tick()");
        assert_eq!(text(&mut service, count), "2");
        db.superuser()
            .exec("update nightowls._samples set sampled_at = sampled_at - interval '49 hours'");
        service.exec("select nightowls.tick()");
        assert_eq!(text(&mut service, count), "1");
        assert_eq!(
            lines(
                &mut service,
                "select name, value from nightowls._samples where metric = 'queue_messages' and name = 'jobs visible'"
            ),
            ["jobs visible 5", "jobs visible 5"]
        );
    });
}

/// The names that a text uses: `nightowls_…`.
fn names(text: &str) -> BTreeSet<String> {
    text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
        .filter(|word| word.starts_with("nightowls_"))
        .map(str::to_owned)
        .collect()
}

#[test]
fn the_dashboard_asks_for_metrics_that_there_are() {
    let dashboard: serde_json::Value =
        serde_json::from_str(DASHBOARD).expect("the dashboard is JSON");
    let panels = dashboard["panels"].as_array().expect("it has panels");
    let mut asked = BTreeSet::new();
    for panel in panels {
        let targets = panel["targets"].as_array().expect("a panel has targets");
        assert!(!targets.is_empty(), "{panel}");
        for target in targets {
            asked.extend(names(
                target["expr"].as_str().expect("a target has an expression"),
            ));
        }
    }
    on_each_install(|db| {
        busy(db);
        db.owner().exec(
            "select nightowls.create_view_projection('v', 'select e.org_id, count(*) as n from nightowls.events e group by 1')",
        );
        db.superuser().exec(
            "insert into nightowls._consumer_failures (org_id, consumer, position, attempts, error, parked_at)
             select c.org_id, c.name, 1, 1, 'poison', now() from nightowls.consumers c",
        );
        let mut superuser = db.superuser();
        let has_dispatch = text(
            &mut superuser,
            "select to_regprocedure('nightowls._metrics_dispatch()') is not null",
        ) == "t";
        if has_dispatch {
            superuser.exec("select nightowls.create_endpoint('hook', 'https://example.com/hook')");
        }
        let there = names(&metrics(&mut superuser));
        let missing: Vec<_> = asked
            .iter()
            .filter(|name| !there.contains(*name))
            .filter(|name| has_dispatch || !name.starts_with("nightowls_dispatch_"))
            .collect();
        assert!(missing.is_empty(), "{missing:?}");
        // And nothing that matters is without a panel.
        for name in [
            "nightowls_healthy",
            "nightowls_positions_total",
            "nightowls_queue_messages",
            "nightowls_queue_oldest_seconds",
            "nightowls_consumer_lag_seconds",
            "nightowls_floors",
            "nightowls_clock_failures_total",
            "nightowls_dispatch_dead",
        ] {
            assert!(asked.contains(name), "{name}");
        }
    });
}

#[test]
fn the_page_on_operations_has_every_line_of_health_and_no_other() {
    let page: BTreeSet<String> = OPERATIONS
        .lines()
        .filter_map(|line| {
            line.strip_prefix("| `")?
                .split('`')
                .next()
                .map(str::to_owned)
        })
        .filter(|name| {
            name.split_once('.').is_some_and(|(concern, check)| {
                !concern.is_empty()
                    && !check.is_empty()
                    && name
                        .chars()
                        .all(|c| c.is_ascii_lowercase() || c == '_' || c == '.')
                    && concern != "nightowls"
                    && concern != "cron"
            })
        })
        .collect();
    on_each_install(|db| {
        let there: BTreeSet<String> = lines(
            &mut db.service(),
            "select concern || '.' || name from nightowls.health",
        )
        .into_iter()
        .collect();
        let concerns: BTreeSet<&str> = there
            .iter()
            .filter_map(|name| Some(name.split_once('.')?.0))
            .collect();
        let missing: Vec<_> = there.difference(&page).collect();
        let gone: Vec<_> = page
            .difference(&there)
            .filter(|name| {
                name.split_once('.')
                    .is_some_and(|(concern, _)| concerns.contains(concern))
            })
            // There only while runs are broadcast.
            .filter(|name| *name != "realtime.policies")
            .collect();
        assert!(
            missing.is_empty() && gone.is_empty(),
            "docs/operations.md: missing {missing:?}, not there {gone:?}"
        );
    });
}

// owl -----------------------------------------------------------------------------------------------

fn owl(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_owl"));
    for name in [
        "PGHOST",
        "PGPORT",
        "PGUSER",
        "PGDATABASE",
        "PGPASSWORD",
        "PGSSLMODE",
        "DATABASE_URL",
    ] {
        command.env_remove(name);
    }
    command
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .expect("owl runs")
}

#[track_caller]
fn said(output: &Output) -> String {
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout.clone()).expect("owl speaks UTF-8")
}

#[test]
fn owl_runs_the_clock_and_says_what_it_did() {
    on_each_route(|db| {
        default_org(db);
        let mut service = db.service();
        service.exec(
            "select nightowls.create_queue('jobs'), nightowls.send('jobs', '1', delay => 600)",
        );
        db.superuser()
            .exec("update nightowls.queue_messages set due_at = now() - interval '1 s'");
        let url = db.url(SERVICE);
        let first = said(&owl(&["tick", &url]));
        assert!(
            first.contains("queues") && first.contains(" ms\n"),
            "{first}"
        );
        assert_eq!(
            text(&mut service, "select state from nightowls.queue_messages"),
            "r"
        );
        assert_eq!(
            said(&owl(&["tick", "--max-ms", "5000", &url])),
            "nothing was due\n"
        );
        // A part that fails is an error.
        db.superuser().exec(
            "create function public.raising() returns trigger language plpgsql as $$ begin raise exception 'not today'; end $$;
             create trigger t99_mine before insert on nightowls._samples for each row execute function public.raising();
             delete from nightowls._samples",
        );
        let failed = owl(&["tick", &url]);
        assert_eq!(failed.status.code(), Some(1));
        assert!(
            String::from_utf8_lossy(&failed.stderr)
                .contains("samples      failed: P0001 not today")
        );
    });
    // Again and again, and on after the connection was lost.
    on_install(Install::Extension, |db| {
        let mut child = Command::new(env!("CARGO_BIN_EXE_owl"))
            .args(["tick", "--every", "1s", &db.url(SERVICE)])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("owl runs");
        let mut watcher = db.superuser();
        let ran = "select coalesce(min(ran_at)::text, '') from nightowls.clock_parts";
        let mut last = String::new();
        for round in 0..3 {
            wait_until("it runs", Duration::from_secs(20), || {
                text(&mut watcher, ran) != last
            });
            last = text(&mut watcher, ran);
            if round == 1 {
                watcher.exec("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'owl' and datname = current_database()");
            }
        }
        child.kill().expect("it is there");
        child.wait().expect("it ends");
    });
}

#[test]
fn owl_says_what_is_wrong_and_never_a_password() {
    for (arguments, code, told) in [
        (
            vec!["tick", "postgresql://me:secret@127.0.0.1:1/x"],
            1,
            "cannot connect",
        ),
        (
            vec!["top", "--once", "postgresql://me:secret@127.0.0.1:1/x"],
            1,
            "cannot connect",
        ),
        (
            vec!["report", "postgresql://me:secret@127.0.0.1:1/x"],
            1,
            "cannot connect",
        ),
        (
            vec!["tick", "postgresql://me:secret@h/x?sslmode=often"],
            2,
            "sslmode",
        ),
        (vec!["tick"], 2, "DATABASE_URL"),
        (
            vec!["tick", "--every", "1d", "postgresql://me:secret@h/x"],
            2,
            "60s",
        ),
        (
            vec!["report", "--hours", "0", "postgresql://me:secret@h/x"],
            2,
            "1 to 48",
        ),
    ] {
        let output = owl(&arguments);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {error}");
        assert!(
            error.contains(told) && !error.contains("secret"),
            "{arguments:?}: {error}"
        );
    }
    on_install(Install::Plain, |db| {
        let error = owl(&["tick", &db.url(STRANGER)]);
        assert_eq!(error.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&error.stderr).contains("permission denied"));
    });
}

#[test]
fn owl_top_shows_everything_on_80_by_24() {
    on_each_install(|db| {
        busy(db);
        let frame = said(&owl(&["top", "--once", &db.url(SERVICE)]));
        for word in [
            "owl top",
            "HEALTH",
            "QUEUE",
            "acme/jobs",
            "other/jobs",
            "CONSUMER",
            "FLOOR",
            "acme/run:1",
            "clock: ran",
        ] {
            assert!(frame.contains(word), "{word}\n{frame}");
        }
        assert!(frame.lines().count() <= 24, "{frame}");
        assert!(
            frame.lines().all(|line| line.chars().count() <= 80),
            "{frame}"
        );
    });
}

#[test]
fn owl_top_lives_in_a_terminal() {
    if Command::new("tmux").arg("-V").output().is_err() {
        return skip("tmux");
    }
    on_install(Install::Extension, |db| {
        busy(db);
        let socket = format!("nightowls-{}", std::process::id());
        let tmux = |arguments: &[&str]| {
            let output = Command::new("tmux")
                .args(["-L", &socket, "-f", "/dev/null"])
                .args(arguments)
                .env("LC_ALL", "C.UTF-8")
                .env_remove("TMUX")
                .output()
                .expect("tmux runs");
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        let command = format!(
            "{} top --every 1s '{}'",
            env!("CARGO_BIN_EXE_owl"),
            db.url(SERVICE)
        );
        tmux(&[
            "new-session",
            "-d",
            "-x",
            "80",
            "-y",
            "24",
            "sh",
            "-c",
            &format!("{command}; echo it ended with $?; exec sleep 60"),
        ]);
        let deadline = Duration::from_secs(20);
        let screen = || tmux(&["capture-pane", "-p"]);
        wait_until("it shows queues", deadline, || {
            screen().contains("acme/jobs") && screen().contains("q quits")
        });
        // It looks again by itself.
        db.service()
            .exec("select nightowls.create_queue('newcomer')");
        wait_until("it shows the new one", deadline, || {
            screen().contains("newcomer")
        });
        // It follows the window.
        tmux(&["resize-window", "-x", "120", "-y", "30"]);
        wait_until("it fills the new width", deadline, || {
            screen().lines().next().is_some_and(|line| {
                line.trim_end().ends_with("q quits") && line.chars().count() > 100
            })
        });
        tmux(&["resize-window", "-x", "60", "-y", "12"]);
        wait_until("it fits the small one", deadline, || {
            let shown = screen();
            shown.contains("QUEUE")
                && shown.lines().next().is_some_and(|line| {
                    line.trim_end().ends_with("q quits") && line.chars().count() <= 60
                })
        });
        // A database that goes away is said, and found again.
        tmux(&["resize-window", "-x", "80", "-y", "24"]);
        tmux(&["send-keys", "q"]);
        wait_until("it ends and gives the terminal back", deadline, || {
            screen().contains("it ended with 0") && !screen().contains("QUEUE")
        });
        tmux(&["kill-server"]);
    });
}

/// Two hours of figures, with a gap.
fn history(db: &Db) {
    db.superuser().exec(
        "insert into nightowls._samples
         select s.org_id, s.metric, s.name, g.t, greatest(s.v, 0)
           from generate_series(now() - interval '2 hours', now(), '1 minute') with ordinality g (t, i)
          cross join lateral (
            select '00000000-0000-0000-0000-000000000000'::uuid, 'positions', '', g.i * 600.0 + 50 * sin(g.i)
             union all select o.org_id, 'queue_messages', 'jobs visible', 100 + 50 * sin(g.i / 9.0) from nightowls.orgs o
             union all select o.org_id, 'queue_messages', 'jobs dead', 1000000 from nightowls.orgs o
             union all select o.org_id, 'queue_oldest_seconds', 'jobs', 30 + 20 * sin(g.i / 9.0) from nightowls.orgs o
             union all select o.org_id, 'consumer_lag_seconds', '<b>mail</b> 0', 5 + 4 * cos(g.i / 9.0) from nightowls.orgs o) s (org_id, metric, name, v)
          where g.i not between 50 and 60
             on conflict do nothing",
    );
}

struct Page(PathBuf);

impl Page {
    fn new(name: &str) -> Self {
        Page(std::env::temp_dir().join(format!("nightowls-{}-{name}.html", std::process::id())))
    }

    fn path(&self) -> &str {
        self.0
            .to_str()
            .expect("a temporary folder has a plain name")
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[test]
fn owl_report_writes_one_page_that_needs_nothing_else() {
    on_each_install(|db| {
        busy(db);
        let page = Page::new(db.name());
        // Without any history it says so.
        assert_eq!(
            said(&owl(&["report", "-o", page.path(), &db.url(SERVICE)])),
            format!("wrote {}\n", page.path())
        );
        assert!(
            fs::read_to_string(&page.0)
                .expect("it is written")
                .contains("Queue depth")
        );
        history(db);
        let html = said(&owl(&[
            "report",
            "-o",
            "-",
            "--hours",
            "2",
            &db.url(SERVICE),
        ]));
        for word in [
            "Events",
            "Queue depth",
            "Oldest message",
            "Consumer lag",
            "acme/jobs",
            "other/jobs",
            "&lt;b&gt;mail",
            "checks are well",
            "The clock",
            "<svg",
        ] {
            assert!(html.contains(word), "{word}");
        }
        // Nothing is fetched, nothing runs, and no name can write into the page. Dead letters are no depth.
        for word in [
            "http:", "https:", "src=", "url(", "@import", "<link", "<script", "<b>mail", "1 M",
        ] {
            assert!(!html.contains(word), "{word}");
        }
        assert!(
            owl(&["report", "-o", "/nowhere/at/all.html", &db.url(SERVICE)])
                .status
                .code()
                == Some(1)
        );
    });
}

#[test]
fn a_browser_shows_the_report_light_and_dark_wide_and_narrow() {
    let Some(chromium) = ["chromium", "chromium-browser", "google-chrome"]
        .into_iter()
        .find(|name| {
            Command::new(name)
                .arg("--version")
                .output()
                .is_ok_and(|output| output.status.success())
        })
    else {
        return skip("chromium");
    };
    on_install(Install::Extension, |db| {
        busy(db);
        history(db);
        let page = Page::new("browser");
        let html = said(&owl(&[
            "report",
            "-o",
            "-",
            "--hours",
            "2",
            &db.url(SERVICE),
        ]));
        // What the browser made of it, measured by a script that the page itself does not have.
        let probe = "<script>addEventListener('load', () => {
            const root = document.documentElement, boxes = [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect());
            const ink = [...document.querySelectorAll('path[class^=l]')].filter(p => p.getTotalLength() > 50 && getComputedStyle(p).stroke !== 'none').length;
            root.dataset.seen = JSON.stringify({fits: root.scrollWidth <= innerWidth, charts: boxes.filter(b => b.width > 200 && b.height > 80).length,
              lines: ink, back: getComputedStyle(document.body).backgroundColor, fore: getComputedStyle(document.body).color});
          });</script></body>";
        fs::write(&page.0, html.replace("</body>", probe)).expect("a temporary file");
        let mut seen = BTreeMap::new();
        for (name, size, scheme) in [("light", "1400,1200", "1"), ("dark", "520,900", "0")] {
            let folder =
                std::env::temp_dir().join(format!("nightowls-{}-{name}", std::process::id()));
            let output = Command::new("timeout")
                .args([
                    "60",
                    chromium,
                    "--headless",
                    "--no-sandbox",
                    "--disable-gpu",
                    "--disable-dev-shm-usage",
                    "--dump-dom",
                ])
                .arg(format!("--user-data-dir={}", folder.display()))
                .arg(format!("--window-size={size}"))
                .arg(format!("--blink-settings=preferredColorScheme={scheme}"))
                .arg(format!("file://{}", page.path()))
                .stdin(Stdio::null())
                .output()
                .expect("chromium runs");
            let _ = fs::remove_dir_all(&folder);
            let dom = String::from_utf8_lossy(&output.stdout).replace("&quot;", "\"");
            let data = dom
                .split("data-seen=\"")
                .nth(1)
                .and_then(|rest| rest.split("}\"").next())
                .map(|json| format!("{json}}}"));
            let data: serde_json::Value =
                serde_json::from_str(&data.unwrap_or_else(|| {
                    panic!("{dom}\n{}", String::from_utf8_lossy(&output.stderr))
                }))
                .expect("JSON");
            assert_eq!(data["fits"], true, "{name}: {data}");
            assert!(data["charts"].as_u64() >= Some(4), "{name}: {data}");
            assert!(data["lines"].as_u64() >= Some(7), "{name}: {data}");
            seen.insert(name, data["back"].as_str().unwrap_or_default().to_owned());
        }
        assert_eq!(seen["light"], "rgb(246, 247, 249)");
        assert_eq!(seen["dark"], "rgb(18, 22, 29)");
    });
}
