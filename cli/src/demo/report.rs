//! What the demo found out, as a value, a table and JSON.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::channel::{Percentiles, Proof, Rate};
use crate::common::scaled;

/// Everything; the JSON file is this.
#[derive(Clone, Debug, Serialize)]
pub struct Results {
    /// The form of this object.
    pub schema: &'static str,
    /// The program's version.
    pub version: &'static str,
    /// When it ran, in UTC.
    pub date: String,
    /// The processor's name.
    pub cpu: String,
    /// The kernel's release.
    pub kernel: String,
    /// CPUs that the run could use.
    pub cpus: Vec<usize>,
    /// The containers.
    pub containers: Vec<Isolation>,
    /// The replay.
    pub replay: Replay,
    /// Rounds that were measured; each row's figures are the medians over them.
    pub rounds: usize,
    /// Milliseconds of a single measurement.
    pub window_ms: u64,
    /// The measurements.
    pub rows: Vec<Row>,
    /// Of the time that the switch's thread wanted to run: the part in which other programs had its CPU.
    pub waited: Option<f64>,
    /// Why rows are missing, if some are.
    pub missing: Option<String>,
    /// From the first line to the last, in seconds.
    pub seconds: f64,
}

/// A container, its proof, and its port.
#[derive(Clone, Debug, Serialize)]
pub struct Isolation {
    /// Its name.
    pub name: &'static str,
    /// Its user seen from outside.
    pub uid_outside: String,
    /// What it said of itself.
    pub proof: Proof,
    /// Where its packet memory comes from.
    pub memory: String,
    /// Bytes of packet memory.
    pub memory_bytes: usize,
    /// Microseconds from the order to open a port to its link being up.
    pub open_us: f64,
}

/// The capture's way from one container to the other.
#[derive(Clone, Debug, Serialize)]
pub struct Replay {
    /// The capture.
    pub capture: String,
    /// Frames in it.
    pub frames: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Frames that came.
    pub received: u64,
    /// Hash over the frames in their order, as sent and as received, in hexadecimal.
    pub chain_sent: String,
    /// The same as received.
    pub chain_received: String,
    /// What differs, if anything does.
    pub difference: Option<String>,
    /// Frames a second.
    pub rate: f64,
}

impl Replay {
    /// Every frame came, in order, byte for byte.
    pub fn is_exact(&self) -> bool {
        self.difference.is_none() && self.received == self.frames && self.chain_sent == self.chain_received
    }
}

/// One line of the comparison.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What was measured.
    pub name: &'static str,
    /// Whether it is ours or the kernel's.
    pub ours: bool,
    /// Frames a second with frames of 64 bytes.
    pub pps_64: Option<Spread>,
    /// Frames a second with frames of 1514 bytes.
    pub pps_1514: Option<Spread>,
    /// Frames lost on the way, over all rounds and sizes.
    pub lost: u64,
    /// Nanoseconds there and back, medians over the rounds of each percentile.
    pub p50_ns: Option<Spread>,
    /// The same: 99 of 100.
    pub p99_ns: Option<Spread>,
    /// The same: 999 of 1000.
    pub p999_ns: Option<Spread>,
}

impl Row {
    /// Frames lost, where they were counted.
    pub fn lost(&self) -> Option<u64> {
        self.pps_64.map(|_| self.lost)
    }
}

/// A figure over the rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The median round.
    pub median: f64,
    /// The lowest round.
    pub min: f64,
    /// The highest round.
    pub max: f64,
}

impl Spread {
    /// Of the rounds' figures; `None` when there are none.
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            (values[middle - 1] + values[middle]) / 2.0
        };
        Some(Spread { median, min, max })
    }
}

/// A row's rounds while they are collected.
#[derive(Default)]
pub struct Rounds {
    /// Throughput at 64 bytes.
    pub small: Vec<Rate>,
    /// Throughput at 1514 bytes.
    pub large: Vec<Rate>,
    /// Latency.
    pub latency: Vec<Percentiles>,
}

impl Rounds {
    /// The row of these rounds.
    pub fn row(&self, name: &'static str, ours: bool) -> Row {
        let pps = |rates: &[Rate]| Spread::of(rates.iter().map(|r| r.frames as f64 / (r.nanos as f64 / 1e9)).collect());
        let time = |pick: fn(&Percentiles) -> u64| Spread::of(self.latency.iter().map(|p| pick(p) as f64).collect());
        Row {
            name,
            ours,
            pps_64: pps(&self.small),
            pps_1514: pps(&self.large),
            lost: self.small.iter().chain(&self.large).map(|r| r.wrong).sum(),
            p50_ns: time(|p| p.p50),
            p99_ns: time(|p| p.p99),
            p999_ns: time(|p| p.p999),
        }
    }
}

/// A table: a box of lines on a terminal, plain columns elsewhere.
pub struct Table {
    title: String,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with a heading for each column.
    pub fn new(title: impl Into<String>, headings: &[&str]) -> Self {
        Table {
            title: title.into(),
            rows: vec![headings.iter().map(|h| (*h).to_owned()).collect()],
        }
    }

    /// Adds a row; missing cells are empty.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// As text.
    pub fn render(&self, boxed: bool) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width: Vec<usize> = (0..columns)
            .map(|c| {
                self.rows
                    .iter()
                    .filter_map(|r| r.get(c))
                    .map(|cell| cell.chars().count())
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        let mut out = format!("{}\n", self.title);
        let rule = |out: &mut String, left: &str, middle: &str, right: &str| {
            let bars: Vec<String> = width.iter().map(|w| "─".repeat(w + 2)).collect();
            let _ = writeln!(out, "{left}{}{right}", bars.join(middle));
        };
        if boxed {
            rule(&mut out, "┌", "┬", "┐");
        }
        for (number, row) in self.rows.iter().enumerate() {
            let cells: Vec<String> = width
                .iter()
                .enumerate()
                .map(|(c, w)| {
                    let cell = row.get(c).map_or("", String::as_str);
                    // Figures stand right, words left.
                    if number > 0 && c > 0 && cell.starts_with(|ch: char| ch.is_ascii_digit()) && columns > 3 {
                        format!("{cell:>w$}")
                    } else {
                        format!("{cell:<w$}")
                    }
                })
                .collect();
            let line = if boxed {
                format!("│ {} │", cells.join(" │ "))
            } else {
                cells.join("  ")
            };
            let _ = writeln!(out, "{}", line.trim_end());
            if boxed && number == 0 {
                rule(&mut out, "├", "┼", "┤");
            }
        }
        if boxed {
            rule(&mut out, "└", "┴", "┘");
        }
        out
    }
}

/// `2026-11-30 16:28 UTC`.
pub fn date(at: SystemTime) -> String {
    let seconds = at.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (minutes, days) = (seconds / 60 % 1440, seconds / 86_400);
    // Days since 0000-03-01, in eras of 400 years: the leap day is a year's last.
    let (era, day) = ((days + 719_468) / 146_097, (days + 719_468) % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (day, month) = (
        day - (153 * month + 2) / 5 + 1,
        if month < 10 { month + 3 } else { month - 9 },
    );
    let year = year + era * 400 + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02} UTC", minutes / 60, minutes % 60)
}

/// The processor's name, as /proc/cpuinfo has it, or the architecture's.
pub fn cpu() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    name.map_or(std::env::consts::ARCH, |(_, name)| name.trim()).to_owned()
}

fn micros(ns: Option<Spread>) -> String {
    ns.map_or("-".into(), |s| format!("{:.2} us", s.median / 1e3))
}

fn pps(rate: Option<Spread>) -> String {
    rate.map_or("-".into(), |s| format!("{}pps", scaled(s.median)))
}

impl Results {
    /// The tables of a run.
    pub fn tables(&self, boxed: bool) -> String {
        let mut out = self.isolation_table().render(boxed);
        out.push('\n');
        out.push_str(&self.replay_table().render(boxed));
        out.push('\n');
        out.push_str(&self.measurement_table().render(boxed));
        if let Some(missing) = &self.missing {
            let _ = writeln!(out, "not measured: {missing}");
        }
        let conclusion = self.conclusion();
        if !conclusion.is_empty() {
            let _ = writeln!(out, "{conclusion}");
        }
        out
    }

    /// What the measurements say, in a sentence, or why they say nothing.
    pub fn conclusion(&self) -> String {
        // Above this, windows say more about the neighbours than about either path.
        match self.waited.filter(|w| *w > 0.04) {
            None => self.verdict(),
            Some(waited) => format!(
                "No comparison: the machine is busy, the switch waited for its CPU {:.0} % of the time. Run it again.",
                waited * 100.0
            ),
        }
    }

    /// How it was measured, in a sentence.
    pub fn method(&self) -> String {
        format!(
            "Measured in alternation, {} rounds of {} ms, medians; two busy threads on {}",
            self.rounds,
            self.window_ms,
            match self.cpus.len() {
                0 | 1 => "ONE core, which makes these figures worthless".to_owned(),
                _ => format!("two cores (CPU {} and {})", self.cpus[1], self.cpus[0]),
            }
        )
    }

    fn isolation_table(&self) -> Table {
        let mut headings = vec!["isolation, told by /proc/self/status inside"];
        headings.extend(self.containers.iter().map(|c| c.name));
        let mut table = Table::new("Containers", &headings);
        let mut add = |name: &str, value: &dyn Fn(&Isolation) -> String| {
            let mut cells = vec![name.to_owned()];
            cells.extend(self.containers.iter().map(value));
            table.row(cells);
        };
        add("Uid (outside)", &|c| {
            format!(
                "{} ({})",
                c.proof.uid.split(' ').next().unwrap_or_default(),
                c.uid_outside
            )
        });
        for set in ["CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb"] {
            add(set, &|c| {
                c.proof
                    .capabilities
                    .iter()
                    .find(|(name, _)| name == set)
                    .map_or("?".into(), |(_, value)| value.clone())
            });
        }
        add("NoNewPrivs", &|c| c.proof.no_new_privs.clone());
        add("own namespaces", &|c| {
            c.proof
                .namespaces
                .iter()
                .map(|(name, _)| name.as_str())
                .collect::<Vec<_>>()
                .join(" ")
        });
        add("pid in its namespace", &|c| c.proof.pid.clone());
        add("network interfaces", &|c| c.proof.interfaces.join(" "));
        add("files (read-only root)", &|c| {
            c.proof
                .files
                .iter()
                .filter(|f| *f != "/run")
                .cloned()
                .collect::<Vec<_>>()
                .join(" ")
        });
        add("packet memory", &|c| format!("{} KiB", c.memory_bytes / 1024));
        add("port open after", &|c| format!("{:.1} ms", c.open_us / 1e3));
        table
    }

    fn replay_table(&self) -> Table {
        let r = &self.replay;
        let mut table = Table::new(
            format!("Replay of {}", r.capture),
            &["a to b, cross-connect", "sent", "received"],
        );
        table.row(vec!["frames".into(), r.frames.to_string(), r.received.to_string()]);
        table.row(vec![
            "hash in order".into(),
            r.chain_sent.clone(),
            r.chain_received.clone(),
        ]);
        let verdict = match &r.difference {
            None if r.is_exact() => "identical, in order".to_owned(),
            None => "differ".to_owned(),
            Some(difference) => difference.clone(),
        };
        table.row(vec!["bytes".into(), r.bytes.to_string(), verdict]);
        table.row(vec![
            "rate".into(),
            format!("{}frames/s", scaled(r.rate)),
            String::new(),
        ]);
        table
    }

    fn measurement_table(&self) -> Table {
        let headings = [
            "path",
            "64 B",
            "1514 B",
            "1514 B",
            "lost",
            "rtt p50",
            "rtt p99",
            "rtt p99.9",
        ];
        let mut table = Table::new(self.method(), &headings);
        for row in &self.rows {
            let bits = row
                .pps_1514
                .map_or("-".into(), |s| format!("{}b/s", scaled(s.median * 1514.0 * 8.0)));
            let lost = row.lost().map_or("-".into(), |lost| lost.to_string());
            table.row(vec![
                row.name.to_owned(),
                pps(row.pps_64),
                pps(row.pps_1514),
                bits,
                lost,
                micros(row.p50_ns),
                micros(row.p99_ns),
                micros(row.p999_ns),
            ]);
        }
        table
    }

    fn verdict(&self) -> String {
        let Some(ours) = self.rows.iter().find(|r| r.ours) else {
            return String::new();
        };
        let kernel = || self.rows.iter().filter(|r| !r.ours);
        let best_rate = kernel().filter_map(|r| r.pps_64).map(|s| s.median).fold(0.0, f64::max);
        let best_time = kernel()
            .filter_map(|r| r.p50_ns)
            .map(|s| s.median)
            .fold(f64::INFINITY, f64::min);
        match (ours.pps_64, ours.p50_ns) {
            (Some(rate), Some(time)) if best_rate > 0.0 && best_time.is_finite() => format!(
                "Against the best of the kernel's: {:.1} times the frames, {:.1} times the round trips.",
                rate.median / best_rate,
                best_time / time.median
            ),
            _ => String::new(),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Made-up results, to draw from.
    pub fn example() -> Results {
        let rate = |frames| Rate {
            frames,
            nanos: 1_000_000_000,
            wrong: 0,
        };
        let time = |p50| Percentiles {
            count: 9,
            p50,
            p99: p50 * 2,
            p999: p50 * 3,
            max: p50 * 4,
        };
        let row = |name, ours, n: u64, t: u64| {
            let rounds = Rounds {
                small: vec![rate(n)],
                large: vec![rate(n / 2)],
                latency: vec![time(t)],
            };
            rounds.row(name, ours)
        };
        let container = Isolation {
            name: "a",
            uid_outside: "1000".into(),
            proof: Proof {
                uid: "65534 65534 65534 65534".into(),
                interfaces: vec!["lo".into()],
                ..Proof::default()
            },
            memory: "memfd".into(),
            memory_bytes: 2 << 20,
            open_us: 1234.0,
        };
        Results {
            schema: "usernic.demo/1",
            version: "0",
            date: date(std::time::UNIX_EPOCH),
            cpu: "Made-up CPU & more".into(),
            kernel: "6".into(),
            cpus: vec![0, 1],
            containers: vec![container],
            replay: Replay {
                capture: "x".into(),
                frames: 2,
                bytes: 120,
                received: 2,
                chain_sent: "ab".into(),
                chain_received: "ab".into(),
                difference: None,
                rate: 1e6,
            },
            rounds: 1,
            window_ms: 100,
            rows: vec![
                row("usernic", true, 8_000_000, 600),
                row("veth, AF_PACKET", false, 700_000, 3900),
                Rounds {
                    latency: vec![time(51_000)],
                    ..Rounds::default()
                }
                .row("veth, UDP, blocking", false),
            ],
            waited: Some(0.01),
            missing: None,
            seconds: 1.0,
        }
    }

    #[test]
    fn dates() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00 UTC"),
            (951_782_399, "2000-02-28 23:59 UTC"),
            (951_782_400, "2000-02-29 00:00 UTC"),
            (1_709_251_199, "2024-02-29 23:59 UTC"),
            (4_102_444_799, "2099-12-31 23:59 UTC"),
        ] {
            assert_eq!(date(UNIX_EPOCH + std::time::Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn medians() {
        assert_eq!(Spread::of(vec![]), None);
        assert_eq!(
            Spread::of(vec![3.0, 1.0, 2.0]),
            Some(Spread {
                median: 2.0,
                min: 1.0,
                max: 3.0
            })
        );
        assert_eq!(Spread::of(vec![4.0, 1.0]).map(|s| s.median), Some(2.5));
    }

    #[test]
    fn the_table_says_what_was_found() {
        let results = example();
        let plain = results.tables(false);
        assert!(plain.contains("identical, in order"));
        assert!(plain.contains("two cores (CPU 1 and 0)"));
        assert!(plain.contains("8.00 Mpps"));
        assert!(plain.contains("11.4 times the frames, 6.5 times the round trips"));
        assert!(plain.is_ascii());
        let boxed = results.tables(true);
        let widths: Vec<usize> = boxed
            .lines()
            .skip_while(|l| !l.starts_with('┌'))
            .take_while(|l| l.starts_with(['┌', '│', '├', '└']))
            .map(|l| l.chars().count())
            .collect();
        assert!(widths.len() > 5 && widths.iter().all(|w| *w == widths[0]), "{widths:?}");
        assert!(!plain.contains("machine is busy"));
        let mut one = results.clone();
        one.waited = Some(0.3);
        let busy = one.tables(false);
        assert!(busy.contains("waited for its CPU 30 % of the time") && !busy.contains("times the frames"));
        one.cpus = vec![3];
        one.replay.received = 1;
        let text = one.tables(false);
        assert!(text.contains("worthless") && text.contains("differ"));
    }

    #[test]
    fn a_replay_is_exact_or_not() {
        let good = example().replay;
        assert!(good.is_exact());
        assert!(
            !Replay {
                received: 1,
                ..good.clone()
            }
            .is_exact()
        );
        assert!(
            !Replay {
                chain_received: "ac".into(),
                ..good.clone()
            }
            .is_exact()
        );
        assert!(
            !Replay {
                difference: Some("x".into()),
                ..good
            }
            .is_exact()
        );
    }
}
