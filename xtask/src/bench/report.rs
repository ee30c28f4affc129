//! What a bench prints, and the JSON that it writes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use serde::Serialize;
use serde_json::Value;

use super::cores::Regime;
use super::scale::Point;
use super::stats::{Spread, median};
use super::variants::Busy;
use super::windows::{Comparison, Launch, reasons};

/// The version of the JSON's form. It rises when a field changes its meaning or goes.
pub const SCHEMA: &str = "usernic.bench/2";

/// One metric's result.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// `group.what`.
    pub metric: String,
    /// Frame length in bytes without FCS, where it matters.
    pub bytes: Option<usize>,
    /// What the values are in: `Mpps`, `ns`, `ms`, `MiB`, `calls`, `instructions/packet`.
    pub unit: &'static str,
    /// Whether more is better.
    pub more_is_better: bool,
    /// Ours (or the yardstick's, where there is no peer): a median.
    pub ours: Option<f64>,
    /// The peer's, and who that is.
    pub peer: Option<f64>,
    /// Our variant.
    pub ours_name: Option<String>,
    /// Who the peer is, and its variant.
    pub peer_name: Option<String>,
    /// Pairwise ratios, ours to peer's.
    pub ratio: Option<Spread>,
    /// The best variants' shares of polls that moved packets.
    pub busy: Option<BusyOf>,
    /// Ours to the bare ring between the same CPUs that copies as many bytes.
    pub of_limit: Option<Spread>,
    /// The CPUs' distance.
    pub regime: Option<Regime>,
    /// Median round trip of a cache line in nanoseconds.
    pub round_trip_ns: Option<f64>,
    /// Pairs, or single measurements, that count.
    pub pairs: usize,
    /// The launches that they come from.
    pub launches: Vec<Launch>,
    /// Windows that were dropped, by reason.
    pub dropped: BTreeMap<String, usize>,
    /// The distances at which the variants were chosen: the row's own, but where the cores did not stay there.
    pub scouted: BTreeSet<Regime>,
    /// Launches are missing: the run was interrupted, or still goes on.
    pub unfinished: bool,
    /// Where the time went.
    pub seconds: Option<Spent>,
    /// When the row was made, in seconds since 1970.
    pub time: u64,
    /// Why there is no result.
    pub error: Option<String>,
}

/// Where the time of a metric went, in seconds. What several metrics share counts for the first of them.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Spent {
    /// Starting and ending programs.
    pub starting: f64,
    /// Choosing variants.
    pub scouting: f64,
    /// Setting loads up.
    pub preparing: f64,
    /// Waiting for near cores.
    pub waiting: f64,
    /// In windows.
    pub measuring: f64,
}

impl Row {
    fn empty(metric: &str, bytes: Option<usize>, unit: &'static str, more_is_better: bool) -> Self {
        Row {
            metric: metric.to_owned(),
            bytes,
            unit,
            more_is_better,
            ours: None,
            peer: None,
            ours_name: None,
            peer_name: None,
            busy: None,
            of_limit: None,
            ratio: None,
            regime: None,
            round_trip_ns: None,
            pairs: 0,
            launches: Vec::new(),
            dropped: BTreeMap::new(),
            scouted: BTreeSet::new(),
            unfinished: false,
            seconds: None,
            time: now(),
            error: None,
        }
    }

    /// Two variants, in windows.
    pub fn compared(
        metric: &str,
        bytes: usize,
        unit: &'static str,
        more_is_better: bool,
        peer_name: &str,
        result: Result<Comparison>,
    ) -> Self {
        let mut row = Self::empty(metric, Some(bytes), unit, more_is_better);
        row.peer_name = Some(peer_name.to_owned());
        match result {
            Ok(c) => {
                row.ours = Some(c.ours);
                row.peer = Some(c.peer);
                row.ratio = Some(c.ratio);
                row.of_limit = c.of_limit;
                row.launches = c.launches;
                row.regime = Some(c.regime);
                row.round_trip_ns = Some(c.round_trip_ns);
                row.pairs = c.pairs;
                row.dropped = c.dropped;
            }
            Err(e) => row.error = Some(format!("{e:#}")),
        }
        row
    }

    /// Measurements taken in turns, pair by pair; the peer's may be none.
    pub fn paired(
        metric: &str,
        bytes: Option<usize>,
        unit: &'static str,
        peer_name: Option<&str>,
        ours: &[f64],
        peer: &[f64],
    ) -> Self {
        let mut row = Self::empty(metric, bytes, unit, false);
        row.peer_name = peer_name.filter(|_| !peer.is_empty()).map(str::to_owned);
        row.pairs = ours.len();
        row.ours = Some(median(ours)).filter(|m| m.is_finite());
        row.peer = Some(median(peer)).filter(|m| m.is_finite());
        let ratios: Vec<f64> = ours
            .iter()
            .zip(peer)
            .map(|(a, b)| a / b)
            .filter(|r| r.is_finite())
            .collect();
        row.ratio = (!ratios.is_empty()).then(|| Spread::of(&ratios));
        row
    }

    /// One variant alone, in windows.
    pub fn alone(metric: &str, bytes: usize, unit: &'static str, result: Result<(f64, Regime, usize)>) -> Self {
        let mut row = Self::empty(metric, Some(bytes), unit, true);
        match result {
            Ok((value, regime, windows)) => {
                row.ours = Some(value);
                row.regime = Some(regime);
                row.pairs = windows;
            }
            Err(e) => row.error = Some(format!("{e:#}")),
        }
        row
    }

    /// No result, and why.
    pub fn failed(metric: &str, bytes: Option<usize>, unit: &'static str, error: &anyhow::Error) -> Self {
        let mut row = Self::empty(metric, bytes, unit, false);
        row.error = Some(format!("{error:#}"));
        row
    }

    /// The line of the table.
    pub fn line(&self) -> String {
        let bytes = self.bytes.map_or(String::new(), |b| b.to_string());
        let name = format!("{:<30} {:>5}", self.metric, bytes);
        if let Some(error) = &self.error {
            return format!("{name}  no result: {}", error.lines().next().unwrap_or_default());
        }
        let number = |value: Option<f64>| value.map_or("-".to_owned(), |v| format!("{v:.*}", decimals(v)));
        let ratio = self.ratio.map_or("-".to_owned(), |r| {
            format!("{:.3}  (min {:.3}, quartiles {:.3} {:.3})", r.median, r.min, r.q1, r.q3)
        });
        let regime = self.regime.map_or("-".to_owned(), |r| r.to_string());
        let dropped = if self.dropped.is_empty() {
            String::new()
        } else {
            format!("; dropped: {}", reasons(&self.dropped))
        };
        let launches = match self.launches.len() {
            0 | 1 => String::new(),
            n => format!("/{n}"),
        };
        let mut line = format!(
            "{name}  {:>9} {:>9} {:<20} {ratio:<46} {regime:<4} {:>4}{dropped}",
            number(self.ours),
            number(self.peer),
            self.unit,
            format!("{}{launches}", self.pairs)
        );
        let mut more = Vec::new();
        if let (Some(ours), Some(peer)) = (&self.ours_name, &self.peer_name) {
            more.push(format!("{ours} against {peer}"));
        }
        if let Some(busy) = &self.busy {
            more.push(format!(
                "busy polls, front/back: ours {}, peer {}",
                busy.ours, busy.peer
            ));
        }
        if let Some(of) = &self.of_limit {
            more.push(format!(
                "{:.2} of the bare ring (quartiles {:.2} {:.2})",
                of.median, of.q1, of.q3
            ));
        }
        if let Some(regime) = self.regime
            && self.scouted.iter().any(|&r| r != regime)
        {
            more.push("variants chosen in part at the other distance".into());
        }
        if let Some(s) = self.seconds {
            more.push(format!(
                "{:.0} s: starting {:.0}, scouting {:.0}, preparing {:.0}, waiting {:.0}, measuring {:.0}",
                s.starting + s.scouting + s.preparing + s.waiting + s.measuring,
                s.starting,
                s.scouting,
                s.preparing,
                s.waiting,
                s.measuring
            ));
        }
        if !more.is_empty() {
            line += &format!("\n{:<38}{}", "", more.join("; "));
        }
        line
    }
}

/// The shares of busy polls of both sides of a comparison.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct BusyOf {
    /// Ours.
    pub ours: Busy,
    /// The peer's.
    pub peer: Busy,
}

impl std::fmt::Display for Busy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let percent = |share: Option<f64>| share.map_or("-".to_owned(), |s| format!("{:.0}", s * 100.0));
        write!(f, "{}/{} %", percent(self.front), percent(self.back))
    }
}

/// What scouting found of a variant.
#[derive(Clone, Debug, Serialize)]
pub struct Scouted {
    /// The metrics that it was for.
    pub metric: String,
    /// Frame length.
    pub bytes: usize,
    /// `ours` or `peer`.
    pub side: &'static str,
    /// The variant.
    pub variant: &'static str,
    /// To the side's first variant, pair by pair: the median.
    pub to_first: Option<f64>,
    /// Pairs that count.
    pub pairs: usize,
    /// The CPUs' distance.
    pub regime: Option<Regime>,
    /// Whether it was taken.
    pub best: bool,
    /// Why there is no value.
    pub error: Option<String>,
}

/// Instructions a packet of one variant.
#[derive(Clone, Debug, Serialize)]
pub struct Counted {
    /// `tx`, `rx`, `alloc` or `free`.
    pub call: &'static str,
    /// Frame length.
    pub bytes: usize,
    /// `ours` or `peer`.
    pub side: &'static str,
    /// The variant.
    pub variant: &'static str,
    /// For each packet.
    pub instructions: f64,
}

fn decimals(value: f64) -> usize {
    match value.abs() {
        v if v >= 1000.0 => 0,
        v if v >= 100.0 => 1,
        v if v >= 1.0 => 2,
        _ => 3,
    }
}

/// The heading of the table.
pub fn heading() -> String {
    format!(
        "{:<30} {:>5}  {:>9} {:>9} {:<20} {:<46} {:<4} pairs",
        "metric", "bytes", "ours", "peer", "unit", "median of pairwise ratios, ours / peer", "CPUs"
    )
}

/// The machine and the versions, and all rows.
#[derive(Serialize)]
pub struct Report {
    schema: &'static str,
    /// Seconds since 1970.
    time: u64,
    cpu: String,
    kernel: String,
    peer: String,
    quick: bool,
    /// Seconds that each part of the run took.
    parts: BTreeMap<String, f64>,
    /// The rows.
    pub rows: Vec<Row>,
    /// What the variants of the rows were chosen by.
    pub scouted: Vec<Scouted>,
    /// Instructions a packet of all variants.
    pub counted: Vec<Counted>,
    /// How it scales.
    pub scale: Vec<Point>,
    /// What the file already had, of an earlier run.
    #[serde(skip)]
    kept: Option<Value>,
    /// What has a result there.
    #[serde(skip)]
    had: BTreeSet<(String, Option<usize>)>,
    #[serde(skip)]
    since: Instant,
}

/// Lists of the file, and by which fields an entry of this run replaces one of an earlier one.
const LISTS: [(&str, &[&str]); 4] = [
    ("rows", &["metric", "bytes"]),
    ("scouted", &["metric", "bytes", "side", "variant", "regime"]),
    ("counted", &["call", "bytes", "side", "variant"]),
    ("scale", &["factor", "at", "rings", "load"]),
];

fn now() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

impl Report {
    /// A report without rows.
    pub fn new(peer: String, quick: bool) -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let field = |name: &str| {
            let line = cpuinfo.lines().find(|l| l.starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let cpu = ["model name", "cpu family", "model\t"]
            .map(|f| field(f).unwrap_or_default())
            .join(", ");
        Report {
            schema: SCHEMA,
            time: now(),
            cpu,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            peer,
            quick,
            parts: BTreeMap::new(),
            rows: Vec::new(),
            scouted: Vec::new(),
            counted: Vec::new(),
            scale: Vec::new(),
            kept: None,
            had: BTreeSet::new(),
            since: Instant::now(),
        }
    }

    /// Takes over what an earlier run of the same kind on this machine left in `path`, if that exists.
    pub fn resume(&mut self, path: &Path) -> Result<()> {
        let text = match std::fs::read_to_string(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            text => text.with_context(|| path.display().to_string())?,
        };
        self.take_over(&text).with_context(|| path.display().to_string())
    }

    fn take_over(&mut self, text: &str) -> Result<()> {
        let kept: Value = serde_json::from_str(text)?;
        let ours = serde_json::to_value(&*self)?;
        for field in ["schema", "cpu", "kernel", "peer", "quick"] {
            if kept[field] != ours[field] {
                bail!(
                    "its {field} is {}, and that of this run {}: give another file, or none to resume",
                    kept[field],
                    ours[field]
                );
            }
        }
        for row in kept["rows"].as_array().into_iter().flatten() {
            if row["error"].is_null() && row["unfinished"] != true {
                let bytes = row["bytes"].as_u64().map(|b| b as usize);
                self.had
                    .insert((row["metric"].as_str().unwrap_or_default().to_owned(), bytes));
            }
        }
        self.kept = Some(kept);
        Ok(())
    }

    /// Whether the file has a result of that already.
    pub fn has(&self, metric: &str, bytes: Option<usize>) -> bool {
        self.had.contains(&(metric.to_owned(), bytes))
    }

    /// Adds a row and shows it.
    pub fn add(&mut self, row: Row) {
        println!("{}", row.line());
        self.set(row);
    }

    /// Adds a row, in the place of what there was of its metric.
    pub fn set(&mut self, row: Row) {
        self.rows.retain(|r| (&r.metric, r.bytes) != (&row.metric, row.bytes));
        self.rows.push(row);
    }

    /// A part of the run is over.
    pub fn part(&mut self, name: &str) {
        let took = std::mem::replace(&mut self.since, Instant::now()).elapsed();
        self.parts.insert(name.to_owned(), took.as_secs_f64());
    }

    /// All of it as JSON, with what is kept of an earlier run.
    fn json(&self) -> Result<Value> {
        let mut value = serde_json::to_value(self)?;
        let Some(kept) = &self.kept else { return Ok(value) };
        for (list, fields) in LISTS {
            let new = value[list].as_array().cloned().unwrap_or_default();
            let same = |a: &Value, b: &Value| fields.iter().all(|f| a[f] == b[f]);
            let mut all: Vec<Value> = kept[list].as_array().cloned().unwrap_or_default();
            all.retain(|old| !new.iter().any(|n| same(n, old)));
            all.extend(new);
            value[list] = Value::Array(all);
        }
        for (name, seconds) in kept["parts"].as_object().into_iter().flatten() {
            if value["parts"][name].is_null() {
                value["parts"][name] = seconds.clone();
            }
        }
        Ok(value)
    }

    /// Writes it: the file is the old one or the new one, never half of it.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(&self.json()?)?;
        let mut beside = path.as_os_str().to_owned();
        beside.push(".new");
        std::fs::write(&beside, text + "\n").with_context(|| path.display().to_string())?;
        std::fs::rename(&beside, path).with_context(|| path.display().to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(rows: &[(&str, Option<usize>, f64)]) -> Report {
        let mut report = Report::new("DPDK".into(), false);
        for &(metric, bytes, ours) in rows {
            report.set(Row::paired(metric, bytes, "ms", None, &[ours], &[]));
        }
        report
    }

    #[test]
    fn a_later_run_keeps_the_rows_of_other_metrics() {
        let mut first = report(&[("a.tx", Some(64), 1.0), ("a.tx", Some(1518), 2.0), ("b", None, 3.0)]);
        first.rows[1].unfinished = true;
        first.part("a.");
        let text = first.json().unwrap().to_string();
        let mut second = report(&[("b", None, 4.0)]);
        second.take_over(&text).unwrap();
        assert!(second.has("a.tx", Some(64)) && !second.has("a.tx", Some(1518)) && second.has("b", None));
        let json = second.json().unwrap();
        let rows: Vec<_> = json["rows"]
            .as_array()
            .unwrap()
            .iter()
            .map(|r| r["ours"].as_f64())
            .collect();
        assert_eq!(rows, [Some(1.0), Some(2.0), Some(4.0)]);
        assert!(json["parts"]["a."].is_number());
    }

    #[test]
    fn a_file_of_another_peer_is_not_resumed() {
        let text = Report::new("DPDK 1".into(), false).json().unwrap().to_string();
        let error = Report::new("DPDK 2".into(), false).take_over(&text).unwrap_err();
        assert!(error.to_string().contains("peer"), "{error}");
    }

    #[test]
    fn a_row_stands_once() {
        let mut report = report(&[("a", None, 1.0), ("a", None, 2.0)]);
        assert_eq!((report.rows.len(), report.rows[0].ours), (1, Some(2.0)));
        report.set(Row::paired("a", Some(64), "ms", None, &[1.0], &[]));
        assert_eq!(report.rows.len(), 2);
    }
}
