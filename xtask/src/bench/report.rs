//! What a bench prints, and the JSON that it writes.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::Serialize;

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
    /// Why there is no result.
    pub error: Option<String>,
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
    /// The rows.
    pub rows: Vec<Row>,
    /// What the variants of the rows were chosen by.
    pub scouted: Vec<Scouted>,
    /// Instructions a packet of all variants.
    pub counted: Vec<Counted>,
    /// How it scales.
    pub scale: Vec<Point>,
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
        let cpu = ["model name", "cpu family", "model\t", "cpu MHz"]
            .map(|f| field(f).unwrap_or_default())
            .join(", ");
        let time = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs();
        Report {
            schema: SCHEMA,
            time,
            cpu,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            peer,
            quick,
            rows: Vec::new(),
            scouted: Vec::new(),
            counted: Vec::new(),
            scale: Vec::new(),
        }
    }

    /// Adds a row and shows it.
    pub fn add(&mut self, row: Row) {
        println!("{}", row.line());
        self.rows.push(row);
    }

    /// Writes it.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        std::fs::write(path, text + "\n").with_context(|| path.display().to_string())
    }
}
