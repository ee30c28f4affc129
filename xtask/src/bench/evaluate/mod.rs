//! `cargo xtask evaluate`: the evaluation of the talk that this project goes back to, redrawn on this machine.
//!
//! Throughput, latency and jitter between a container and a switch, with and without a noisy neighbour, by the kernel's
//! way, by ours and by DPDK's. All are started at once; one at a time runs, in turns, each once without and once with
//! the neighbour in every round. Nothing is judged: what a machine gives is what the charts show.

mod chart;
pub mod neighbour;
mod systems;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde::Serialize;

use super::cores;
use super::dpdk::Place;
use super::stats::Spread;
use super::windows::WAIT_AT_MOST;
use crate::peers::{Found, is_root};
use crate::process;
use crate::scratch::Scratch;
use neighbour::Neighbour;
use systems::{BYTES, Rules, System};

const SCHEMA: &str = "usernic.evaluate/1";

/// A metric of a system.
#[derive(Clone, Debug, Serialize)]
struct Row {
    /// `throughput`, `latency.p50`, `latency.p99`, `latency.p99.9` or `jitter`.
    metric: &'static str,
    unit: &'static str,
    system: String,
    /// With the noisy neighbour.
    neighbour: bool,
    #[serde(flatten)]
    spread: Spread,
    windows: usize,
}

/// What is not in the charts, and why.
#[derive(Clone, Debug, Serialize)]
struct Absent {
    system: &'static str,
    reason: String,
}

#[derive(Serialize)]
struct Report<'a> {
    schema: &'static str,
    quick: bool,
    bytes: usize,
    cpus: (usize, usize),
    /// How often the two CPUs were near, and how often far, before a window.
    near: usize,
    far: usize,
    /// Windows that did not count, since others had the CPUs.
    dropped: usize,
    neighbour: String,
    neighbour_mib: usize,
    cpu: String,
    kernel: String,
    rows: &'a [Row],
    absent: &'a [Absent],
}

/// The metrics, their units, and what charts say of them.
const METRICS: [(&str, &str, &str); 5] = [
    (
        "throughput",
        "Mpps",
        "Throughput, frames of 64 bytes from a container to the switch",
    ),
    ("latency.p50", "us", "Round trip of a frame, median"),
    ("latency.p99", "us", "Round trip of a frame, 99th percentile"),
    ("latency.p99.9", "us", "Round trip of a frame, 99.9th percentile"),
    ("jitter", "us", "Jitter: 99.9th percentile less the median"),
];

/// Windows of one system, with or without the neighbour.
#[derive(Default, Clone)]
struct Cell {
    values: [Vec<f64>; METRICS.len()],
}

/// Measures, prints a table, and writes JSON and charts into `out`.
pub fn command(root: &Path, out: &Path, quick: bool) -> Result<bool> {
    let cpus = cores::two()?;
    let found = Found::search(root);
    let scratch = Scratch::new(if is_root() { super::PAGES } else { 0 })?;
    let ms = Duration::from_millis;
    let (rounds, tries, settle, window, wait_at_most) = if quick {
        (2, 1, ms(20), ms(60), f64::INFINITY)
    } else {
        (9, 4, ms(60), ms(300), WAIT_AT_MOST)
    };

    let (mut systems, absent) = start(&scratch, &found, cpus)?;
    if systems.is_empty() {
        bail!("nothing to evaluate: {}", words(&absent).join("; "));
    }
    let mut neighbour = Neighbour::start(cpus)?;
    println!(
        "the neighbour writes to {} MiB {}",
        neighbour.mib,
        neighbour.place.words()
    );
    for line in words(&absent) {
        println!("{line}");
    }

    let mut cells = vec![[Cell::default(), Cell::default()]; systems.len()];
    let mut regimes = [0; 2];
    let mut dropped = 0;
    for round in 0..rounds {
        for (system, cells) in systems.iter_mut().zip(&mut cells) {
            for (noisy, cell) in [false, true].into_iter().zip(cells) {
                process::check_interrupted()?;
                let near = cores::probe(cpus, ms(4))?.regime == cores::Regime::Near;
                regimes[usize::from(!near)] += 1;
                let rules = Rules {
                    settle,
                    window,
                    wait_at_most,
                    sharing: neighbour.sharing().filter(|_| noisy),
                };
                neighbour.run(noisy)?;
                let measured = measure(system, &rules, tries);
                neighbour.run(false)?;
                let (values, spoilt) = measured.with_context(|| format!("{}, round {round}", system.name))?;
                cell.add(values);
                dropped += spoilt;
            }
        }
        if cells.iter().flatten().flat_map(|cell| &cell.values).all(Vec::is_empty) {
            bail!(
                "others had the CPUs in all {dropped} windows of the first round: try again when the machine is quiet"
            );
        }
    }
    let rows = rows(&systems, &cells);
    print(&rows);
    println!(
        "CPUs near for {} windows, far for {}; {dropped} windows dropped, since others had the CPUs",
        regimes[0], regimes[1]
    );

    std::fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let report = Report {
        schema: SCHEMA,
        quick,
        bytes: BYTES,
        cpus,
        near: regimes[0],
        far: regimes[1],
        dropped,
        neighbour: neighbour.place.words(),
        neighbour_mib: neighbour.mib,
        cpu: model.map_or(String::new(), |(_, model)| model.trim().to_owned()),
        kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        rows: &rows,
        absent: &absent,
    };
    let write = |name: &str, text: &str| -> Result<()> {
        let path = out.join(name);
        std::fs::write(&path, text).with_context(|| path.display().to_string())?;
        println!("written: {}", path.display());
        Ok(())
    };
    write("evaluation.json", &(serde_json::to_string_pretty(&report)? + "\n"))?;
    let mut foot = vec![format!(
        "Medians and quartiles of up to {rounds} windows each. The neighbour writes to {} MiB {}.",
        neighbour.mib,
        neighbour.place.words()
    )];
    if quick {
        foot.push("A --quick run, whose numbers say nothing.".into());
    }
    foot.extend(words(&absent));
    for (metric, _, title) in METRICS {
        let of: Vec<&Row> = rows.iter().filter(|row| row.metric == metric).collect();
        write(&format!("evaluation-{metric}.svg"), &chart::draw(title, &of, &foot)?)?;
    }
    let missing = METRICS.len() * 2 * systems.len() - rows.len();
    if missing > 0 {
        println!("{missing} values have no window: the machine is not quiet enough");
    }
    Ok(missing == 0)
}

/// All systems that can be had here, and why the others cannot.
fn start(scratch: &Scratch, found: &Found, cpus: (usize, usize)) -> Result<(Vec<System>, Vec<Absent>)> {
    let (front, back) = ((cpus.1, cpus.0), cpus);
    let mut place = |name: &str, is_front: bool| -> Result<Place> {
        let huge = (scratch.pages() > 0)
            .then(|| scratch.subdir(&format!("huge-{name}")))
            .transpose()?;
        Ok(Place {
            dir: scratch.dir().to_owned(),
            huge,
            cpus: if is_front { front } else { back },
        })
    };
    let dpdk = match &found.testpmd {
        Some(testpmd) => System::dpdk(testpmd, &mut place),
        None => Err(anyhow::anyhow!("DPDK is missing: cargo xtask peers")),
    };
    let tried = [
        ("kernel, UDP over veth", System::kernel(cpus)),
        ("usernic, virtio-user", System::ours(scratch.dir(), (front, back))),
        ("DPDK, virtio_user", dpdk),
    ];
    process::check_interrupted()?;
    let (mut systems, mut absent) = (Vec::new(), Vec::new());
    for (system, result) in tried {
        match result {
            Ok(started) => systems.push(started),
            Err(error) => absent.push(Absent {
                system,
                reason: format!("{error:#}"),
            }),
        }
    }
    absent.push(Absent {
        system: "SR-IOV virtual function",
        reason: format!("it takes silicon; {}", emulated()),
    });
    Ok((systems, absent))
}

/// The virtual function of the machine in software, which says how our driver and the kernel's differ there, and nothing of
/// hardware: what the hardware test says of it.
fn emulated() -> String {
    const NAME: &str = "hwtest/82599/round-trips";
    let said = || -> Result<String> {
        let mut command = std::process::Command::new(std::env::current_exe()?);
        command.args(["hwtest", NAME]);
        let output = process::run("xtask hwtest", command, Duration::from_secs(900))?;
        let line = output.lines().find(|line| line.contains(NAME));
        Ok(line.context("it said nothing")?.to_owned())
    };
    match said() {
        Ok(line) => line.split_once(": ").map_or(line.clone(), |(_, said)| said.to_owned()),
        Err(error) => format!("nor was an emulated one to be had ({error:#})"),
    }
}

/// A window of each kind, in the order of [`METRICS`], and how many were spoilt. What could not be told is not a number.
fn measure(system: &mut System, rules: &Rules, tries: usize) -> Result<([f64; METRICS.len()], usize)> {
    let mut values = [f64::NAN; METRICS.len()];
    let mut dropped = 0;
    for _ in 0..tries {
        if let Some(mpps) = system.throughput(rules)? {
            values[0] = mpps;
            break;
        }
        dropped += 1;
    }
    for _ in 0..tries {
        if let Some(latency) = system.latency(rules)? {
            if latency.count > 0 {
                let jitter = latency.p999 - latency.p50;
                let us = [latency.p50, latency.p99, latency.p999, jitter].map(|ns| ns / 1e3);
                values[1..].copy_from_slice(&us);
            }
            break;
        }
        dropped += 1;
    }
    Ok((values, dropped))
}

impl Cell {
    fn add(&mut self, window: [f64; METRICS.len()]) {
        for (values, value) in self.values.iter_mut().zip(window) {
            // A window in which nothing arrived tells nothing.
            if value.is_finite() && value > 0.0 {
                values.push(value);
            }
        }
    }
}

fn rows(systems: &[System], cells: &[[Cell; 2]]) -> Vec<Row> {
    let mut rows = Vec::new();
    for (index, (metric, unit, _)) in METRICS.into_iter().enumerate() {
        for (system, cells) in systems.iter().zip(cells) {
            for (neighbour, cell) in [false, true].into_iter().zip(cells) {
                let values = &cell.values[index];
                if !values.is_empty() {
                    rows.push(Row {
                        metric,
                        unit,
                        system: system.name.to_owned(),
                        neighbour,
                        spread: Spread::of(values),
                        windows: values.len(),
                    });
                }
            }
        }
    }
    rows
}

fn words(absent: &[Absent]) -> Vec<String> {
    absent
        .iter()
        .map(|absent| format!("Absent: {}: {}.", absent.system, absent.reason))
        .collect()
}

fn print(rows: &[Row]) {
    println!(
        "{:<14} {:<24} {:>16} {:>16}  unit, median (quartiles)",
        "metric", "system", "alone", "with neighbour"
    );
    for row in rows.iter().filter(|row| !row.neighbour) {
        let other = rows
            .iter()
            .find(|r| r.neighbour && (r.metric, &r.system) == (row.metric, &row.system));
        let show = |row: &Row| {
            let number = chart::number;
            format!(
                "{} ({} {})",
                number(row.spread.median),
                number(row.spread.q1),
                number(row.spread.q3)
            )
        };
        let with = other.map_or("-".to_owned(), show);
        println!(
            "{:<14} {:<24} {:>16} {:>16}  {}",
            row.metric,
            row.system,
            show(row),
            with,
            row.unit
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chart_has_every_bar_and_what_is_absent() {
        let row = |system: &str, neighbour, value: f64| Row {
            metric: "latency.p50",
            unit: "us",
            system: system.into(),
            neighbour,
            spread: Spread::of(&[value, value * 1.5, value * 2.0]),
            windows: 3,
        };
        let rows = [
            row("kernel", false, 8.0),
            row("kernel", true, 80.0),
            row("ours", false, 0.4),
        ];
        let absent = [Absent {
            system: "SR-IOV",
            reason: "no hardware".into(),
        }];
        let svg = chart::draw("Round trip", &rows.iter().collect::<Vec<_>>(), &words(&absent)).unwrap();
        for text in [
            "12.0 us",
            "120 us",
            "0.60 us",
            "kernel",
            "ours",
            "Absent: SR-IOV: no hardware.",
        ] {
            assert!(svg.contains(text), "{text}");
        }
        chart::draw("Nothing", &[], &[]).unwrap();
    }

    #[test]
    fn windows_without_packets_do_not_count() {
        let mut cell = Cell::default();
        cell.add([0.0, f64::NAN, 1.0, 2.0, 3.0]);
        let counts = cell.values.each_ref().map(Vec::len);
        assert_eq!(counts, [0, 0, 1, 1, 1]);
    }
}
