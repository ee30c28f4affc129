//! `cargo xtask bench`: ours beside DPDK's, and beside the kernel's, in one run.
//!
//! | part | what it does |
//! |---|---|
//! | [`windows`] | A B A B between two variants, which windows count, ratios |
//! | [`cores`] | how far apart the two CPUs are; the bare ring |
//! | [`throughput`], [`scouting`], [`variants`] | which variants there are, the best of each side against each other, over several launches |
//! | [`dpdk`], [`ours`], [`latency`], [`kernel`] | the programs, as [`windows::Variant`]s |
//! | [`worker`], [`drive`], [`protocol`], `dpdk_probe.c` | the programs that are measured, and how we speak with them |
//! | [`startup`], [`instructions`] | what is counted rather than timed |
//! | [`contained`] | start-up in a container |
//! | [`vf`] | a virtual function's queues against a device that is memory |
//! | [`scale`], [`raw`] | our two sides over sizes of rings, bursts, frames, and numbers of queues and regions |
//! | [`evaluate`] | `cargo xtask evaluate`: kernel, ours and DPDK, with and without a noisy neighbour |
//! | [`report`], [`charts`] | the table, the JSON, and SVG charts of it |
//!
//! To add a metric that is timed in windows: make its two sides [`windows::Variant`]s, give it a name in [`METRICS`]
//! and a place in [`Bench::run`].

mod charts;
mod contained;
pub mod cores;
mod dpdk;
mod drive;
pub mod evaluate;
mod instructions;
mod kernel;
mod latency;
mod load;
mod ours;
mod protocol;
mod raw;
mod report;
mod scale;
mod scouting;
pub mod startup;
mod stats;
mod throughput;
mod variants;
mod vf;
mod windows;
mod worker;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::peers::{Found, Program, is_root, which};
use crate::plugin::{self, sdk::Dpdk};
use crate::process::{self, Process, Surroundings};
use crate::scratch::Scratch;
use dpdk::Place;
pub use instructions::inclusive;
use latency::{Alone, DpdkTrips, OursTrips, Percentile};
use load::Load;
use protocol::Worker;
use report::{Report, Row, Spent};
use variants::Subject;
use windows::{Pairs, Plan};

/// Frame lengths of the metrics, without FCS.
const SIZES: [usize; 2] = [64, 1518];

/// Hugepages for three testpmd and a probe at a time.
const PAGES: usize = 288;

/// How long a run waits for near cores, in all.
const PATIENCE: Duration = Duration::from_secs(300);

/// How long a metric does.
const PATIENCE_OF_METRIC: Duration = Duration::from_secs(20);

/// Names of metrics, for `--metric`; `*` stands for anything.
const METRICS: &[&str] = &[
    "limit.spsc",
    "virtio_user.tx",
    "virtio_user.rx",
    "virtio_user.loop32",
    "virtio_user.loop512",
    "pmd.tx",
    "pmd.rx",
    "pmd.loop32",
    "pmd.loop512",
    "both.tx",
    "both.rx",
    "both.loop32",
    "both.loop512",
    "direct.tx",
    "direct.rx",
    "direct.loop32",
    "direct.loop512",
    "latency.p50.1",
    "latency.p99.1",
    "latency.p50.32",
    "latency.p99.32",
    "startup.exec_to_first_packet",
    "memory.resident",
    "memory.huge",
    "startup.syscalls",
    "startup.container",
    "startup.container.runtime",
    "kernel.udp.tx",
    "kernel.af_packet.tx",
    "kernel.udp.latency",
    "kernel.af_packet.latency",
    "instructions.tx",
    "instructions.rx",
    "instructions.alloc",
    "instructions.free",
];

/// The names of all metrics.
fn metrics() -> impl Iterator<Item = String> {
    METRICS.iter().map(|name| (*name).to_owned()).chain(vf::names())
}

/// What the command line asked for.
pub struct Options {
    /// Where the JSON goes.
    pub json: Option<PathBuf>,
    /// What is there already stays: metrics that have a result are left out, but those asked for by name.
    pub resume: bool,
    /// Fewer and shorter windows: to see whether it works, not to believe.
    pub quick: bool,
    /// Which metrics; all if none.
    pub metric: Vec<String>,
    /// No comparison: DPDK's own pair alone, to see whether this machine reproduces what is known of it.
    pub baseline: bool,
    /// No comparison: how ours scales.
    pub scale: bool,
    /// No measurement: charts of these files.
    pub charts: Vec<PathBuf>,
}

/// What a hidden subcommand runs: the programs that are measured.
#[derive(clap::Subcommand)]
pub enum WorkerMode {
    /// One port and its commands on standard input
    Run(WorkerArguments),
    /// One packet there and back
    First(WorkerArguments),
    /// Both sides in one thread, for callgrind
    Instructions(WorkerArguments),
    /// A virtual function's queues, and the device that is memory, in one thread
    Vf(WorkerArguments),
    /// A veth pair
    Kernel(WorkerArguments),
    /// A front-end with several regions of memory
    Regions(WorkerArguments),
    /// A noisy neighbour
    Neighbour(WorkerArguments),
    /// Says when, and becomes another program
    Stamp {
        #[arg(long)]
        cpu: usize,
        #[arg(last = true)]
        command: Vec<String>,
    },
}

/// Their arguments.
#[derive(clap::Args)]
pub struct WorkerArguments {
    #[arg(long)]
    spec: String,
    #[arg(long, value_delimiter = ',', default_value = "0,1")]
    cpus: Vec<usize>,
    #[arg(long, default_value = "0")]
    bursts: u64,
    #[arg(long, default_value = "64")]
    size: usize,
    /// Packets that are moved at a time
    #[arg(long, default_value = "32")]
    burst: usize,
    /// Count the cycles of rounds that move packets
    #[arg(long)]
    timed: bool,
    /// Regions of memory
    #[arg(long, default_value = "1")]
    regions: usize,
}

/// Runs one of them.
pub fn worker_main(mode: &WorkerMode) -> Result<()> {
    let cpus = |a: &WorkerArguments| -> Result<(usize, usize)> {
        match a.cpus[..] {
            [control, data] => Ok((control, data)),
            _ => bail!("--cpus CONTROL,DATA"),
        }
    };
    match mode {
        WorkerMode::Run(a) => worker::main(&a.spec, cpus(a)?, a.burst, a.timed),
        WorkerMode::Regions(a) => raw::main(&a.spec, cpus(a)?, a.burst, a.timed, a.regions),
        WorkerMode::Neighbour(a) => evaluate::neighbour::main(&a.spec, cpus(a)?.1),
        WorkerMode::First(a) => worker::first(&a.spec),
        WorkerMode::Stamp { cpu, command } => contained::stamp(*cpu, command),
        WorkerMode::Vf(a) => vf::main(&a.spec, a.bursts, a.burst),
        WorkerMode::Instructions(a) => instructions::main(&a.spec, a.bursts, a.size),
        WorkerMode::Kernel(a) => {
            let sockets = if a.spec == "udp" {
                kernel::Sockets::Udp
            } else {
                kernel::Sockets::Packet
            };
            kernel::main(sockets, cpus(a)?)
        }
    }
}

/// Whether a name matches a pattern with `*`.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((start, rest)) => name
            .strip_prefix(start)
            .is_some_and(|tail| (0..=tail.len()).any(|i| tail.is_char_boundary(i) && matches(rest, &tail[i..]))),
    }
}

/// `cargo xtask bench`.
pub fn command(root: &Path, options: &Options) -> Result<bool> {
    if !options.charts.is_empty() {
        return charts::command(root, &options.charts).map(|()| true);
    }
    for pattern in &options.metric {
        if !metrics().any(|name| matches(pattern, &name)) {
            let all: Vec<String> = metrics().collect();
            bail!("no metric is called {pattern}; there are: {}", all.join(" "));
        }
    }
    let cpus = cores::two()?;
    let found = Found::search(root);
    let scratch = Scratch::new(if is_root() { PAGES } else { 0 })?;
    let ms = Duration::from_millis;
    let plan = if options.quick {
        // Whether a thread had to wait is no matter here.
        Plan {
            cpus,
            settle: ms(20),
            window: ms(50),
            launches: 1,
            pairs: 2,
            tries: 8,
            limit: ms(6_000),
            wait_at_most: 1.0,
            near: false,
            patience: Duration::ZERO,
        }
    } else {
        Plan {
            cpus,
            settle: ms(60),
            window: ms(300),
            launches: 3,
            pairs: 3,
            tries: 20,
            limit: ms(15_000),
            wait_at_most: windows::WAIT_AT_MOST,
            near: true,
            patience: PATIENCE_OF_METRIC,
        }
    };
    let peer = if found.testpmd.is_some() {
        dpdk_version()
    } else {
        "none".into()
    };
    println!(
        "peer: {peer}; hugepages: {}; CPUs {} and {}",
        scratch.pages(),
        cpus.0,
        cpus.1
    );
    let mut bench = Bench {
        root,
        options,
        cpus,
        plan,
        testpmd: found.testpmd,
        scratch,
        report: Report::new(peer, options.quick),
        patience: PATIENCE,
        known: scouting::Known::default(),
        started: 0,
        plugin: None,
    };
    if let (Some(path), true) = (&options.json, options.resume) {
        bench.report.resume(path)?;
    }
    let outcome = if options.scale {
        bench.scale()
    } else {
        println!("{}", report::heading());
        if options.baseline {
            bench.baseline()
        } else {
            bench.run()
        }
    };
    bench.save()?;
    if let Some(path) = &options.json {
        println!("written: {}", path.display());
    }
    outcome?;
    let report = &bench.report;
    Ok(report.rows.iter().all(|r| r.error.is_none()) && report.scale.iter().all(|p| p.error.is_none()))
}

/// The peer's version, as its development package gives it.
fn dpdk_version() -> String {
    let mut command = std::process::Command::new("pkg-config");
    command.args(["--modversion", "libdpdk"]);
    let version = process::run("pkg-config", command, Duration::from_secs(10)).unwrap_or_default();
    format!("DPDK {}", version.trim()).trim().to_owned()
}

struct Bench<'a> {
    root: &'a Path,
    options: &'a Options,
    cpus: (usize, usize),
    plan: Plan,
    testpmd: Option<Program>,
    scratch: Scratch,
    report: Report,
    /// How long this run may still wait for near cores.
    patience: Duration,
    /// The best variants, as far as they were scouted.
    known: scouting::Known,
    /// Pairs of programs that were started, for names.
    started: usize,
    /// The plugin, once it was built.
    plugin: Option<PathBuf>,
}

impl Bench<'_> {
    fn wanted(&self, name: &str) -> bool {
        self.wanted_at(name, None)
    }

    /// Whether a metric is wanted at a frame length, if it has any: what an earlier run left is not, unless asked for.
    fn wanted_at(&self, name: &str, bytes: Option<usize>) -> bool {
        match self.options.metric.is_empty() {
            true => !self.report.has(name, bytes),
            false => self.options.metric.iter().any(|p| matches(p, name)),
        }
    }

    /// Writes what there is so far.
    fn save(&self) -> Result<()> {
        match &self.options.json {
            Some(path) => self.report.write(path),
            None => Ok(()),
        }
    }

    fn any(&self, prefix: &str) -> bool {
        metrics().any(|name| name.starts_with(prefix) && self.wanted(&name))
    }

    fn testpmd(&self) -> Result<Program> {
        self.testpmd.clone().context("DPDK is missing: cargo xtask peers")
    }

    /// The poll-mode driver, built as `cargo xtask plugin` does.
    fn plugin(&mut self) -> Result<PathBuf> {
        if self.plugin.is_none() {
            let dpdk = Dpdk::find(None, true)?;
            let out = self.scratch.subdir("plugin")?;
            self.plugin = Some(plugin::build(self.root, &out, &dpdk, false)?);
        }
        self.plugin.clone().context("just built")
    }

    /// Where a peer mounts its hugetlbfs, if it can.
    fn huge(&self, name: &str) -> Result<Option<PathBuf>> {
        if self.scratch.pages() > 0 {
            self.scratch.subdir(&format!("huge-{name}")).map(Some)
        } else {
            Ok(None)
        }
    }

    /// The side that forwards on the second CPU.
    fn back(&self, name: &str) -> Result<Place> {
        Ok(Place {
            dir: self.scratch.dir().to_owned(),
            huge: self.huge(name)?,
            cpus: self.cpus,
        })
    }

    /// The side that forwards on the first CPU.
    fn front(&self, name: &str) -> Result<Place> {
        Ok(Place {
            cpus: (self.cpus.1, self.cpus.0),
            ..self.back(name)?
        })
    }

    fn front_cpus(&self) -> (usize, usize) {
        (self.cpus.1, self.cpus.0)
    }

    fn run(&mut self) -> Result<()> {
        type Part<'a> = fn(&mut Bench<'a>) -> Result<()>;
        let parts: [(&str, Part<'_>); 10] = [
            ("limit.", Self::limit),
            ("virtio_user.", |bench| bench.throughput(&throughput::VIRTIO_USER)),
            ("pmd.", |bench| bench.throughput(&throughput::PMD)),
            ("both.", |bench| bench.throughput(&throughput::BOTH)),
            ("direct.", |bench| bench.throughput(&throughput::DIRECT)),
            ("latency.", Self::latency),
            ("startup.", Self::startup),
            ("kernel.", Self::kernel),
            ("instructions.", Self::instructions),
            ("vf.", Self::vf),
        ];
        for (prefix, part) in parts {
            if self.any(prefix) || (prefix == "startup." && self.any("memory.")) {
                process::check_interrupted()?;
                if let Err(error) = part(self) {
                    process::check_interrupted()?;
                    self.report.add(Row::failed(&format!("{prefix}*"), None, "", &error));
                }
                self.report.part(prefix);
                self.save()?;
            }
        }
        Ok(())
    }

    /// Frame lengths.
    fn sizes(&self) -> &'static [usize] {
        if self.options.quick { &SIZES[..1] } else { &SIZES }
    }

    fn limit(&mut self) -> Result<()> {
        for bytes in SIZES {
            if !self.wanted_at("limit.spsc", Some(bytes)) && !self.options.baseline {
                continue;
            }
            let mut ring = BareRing {
                cpus: self.cpus,
                bytes,
                window: self.plan.window,
            };
            let result = windows::alone(&self.plan.bare(), &mut ring);
            self.report.add(Row::alone("limit.spsc", bytes, "Mpps", result));
        }
        Ok(())
    }

    fn latency(&mut self) -> Result<()> {
        let testpmd = self.testpmd()?;
        let dir = self.scratch.dir().to_owned();
        let probe = startup::build_probe(&dir)?;
        let mut columns = Vec::new();
        for &bytes in self.sizes() {
            for in_flight in [1, 32] {
                for (percentile, text) in [(Percentile::P50, "p50"), (Percentile::P99, "p99")] {
                    let name = format!("latency.{text}.{in_flight}");
                    if self.wanted_at(&name, Some(bytes)) {
                        columns.push((name, bytes, in_flight, percentile, Pairs::default(), Spent::default()));
                    }
                }
            }
        }
        if columns.is_empty() {
            return Ok(());
        }
        for launch in 0..self.plan.launches {
            let choice = &variants::OURS[0];
            let mut ours = ours::OnDpdk::start(&testpmd, "l", self.front_cpus(), self.back("lb")?, 256, choice)?;
            let socket = dir.join("m.sock");
            let back = dpdk::back_end(&testpmd, "mb", self.back("mb")?, &socket)?;
            let huge = self.huge("probe")?;
            let command = startup::probe_command(&probe, &dir, huge.as_deref(), &socket, self.cpus.0, "run");
            let surroundings = Surroundings {
                hugetlbfs: huge,
                ..Default::default()
            };
            let front = Worker::new(Process::spawn("dpdk_probe", command, &surroundings)?)?;
            let mut peer = DpdkTrips {
                front,
                back,
                percentile: Percentile::P50,
            };
            for (_, bytes, in_flight, percentile, pairs, spent) in &mut columns {
                let start = Instant::now();
                ours.prepare_latency(*in_flight, *bytes)?;
                peer.percentile = *percentile;
                peer.prepare(*in_flight, *bytes)?;
                let mut ours = OursTrips(&mut ours, *percentile);
                spent.preparing += start.elapsed().as_secs_f64();
                let (start, waited) = (Instant::now(), pairs.waited());
                pairs.launch(&self.plan, &mut self.patience, &mut ours, &mut peer, None)?;
                let waited = (pairs.waited() - waited).as_secs_f64();
                spent.waiting += waited;
                spent.measuring += start.elapsed().as_secs_f64() - waited;
            }
            let last = launch + 1 == self.plan.launches;
            for (name, bytes, _, _, pairs, spent) in &columns {
                let result = pairs.compare(&self.plan);
                let mut row = Row::compared(name, *bytes, "ns", false, "DPDK virtio_user", result);
                (row.unfinished, row.seconds) = (!last, Some(*spent));
                if last {
                    self.report.add(row);
                } else {
                    self.report.set(row);
                }
            }
            self.save()?;
        }
        Ok(())
    }

    fn startup(&mut self) -> Result<()> {
        if self.any("startup.container") {
            self.contained()?;
        }
        let others = ["startup.exec_to_first_packet", "startup.syscalls"];
        if !self.any("memory.") && !others.iter().any(|name| self.wanted(name)) {
            return Ok(());
        }
        let dir = self.scratch.dir().to_owned();
        let reflector = startup::Reflector::start(&dir, self.cpus)?;
        let ours = startup::Who::Ours;
        let peer = startup::dpdk(&dir, self.huge("start")?, self.testpmd.as_ref());
        let (mut our_starts, mut peer_starts) = (Vec::new(), Vec::new());
        for _ in 0..self.plan.at_once().pairs {
            our_starts.push(reflector.once(&ours)?);
            if let Ok(peer) = &peer {
                peer_starts.push(reflector.once(peer)?);
            }
        }
        type Value = fn(&startup::Start) -> f64;
        let columns: [(&str, &'static str, Value); 3] = [
            ("startup.exec_to_first_packet", "ms", |s| s.first_packet_ms),
            ("memory.resident", "MiB", |s| s.resident_mib),
            ("memory.huge", "MiB", |s| s.huge_mib),
        ];
        let name = Some("DPDK virtio_user");
        for (metric, unit, value) in columns {
            if self.wanted(metric) {
                let column = |starts: &[startup::Start]| starts.iter().map(value).collect::<Vec<_>>();
                self.report.add(Row::paired(
                    metric,
                    None,
                    unit,
                    name,
                    &column(&our_starts),
                    &column(&peer_starts),
                ));
            }
        }
        if self.wanted("startup.syscalls") {
            if which("strace").is_none() {
                bail!("strace is missing: cargo xtask peers");
            }
            let ours = reflector.syscalls(&ours, "ours")? as f64;
            let peer = match &peer {
                Ok(peer) => vec![reflector.syscalls(peer, "dpdk")? as f64],
                Err(_) => Vec::new(),
            };
            self.report
                .add(Row::paired("startup.syscalls", None, "calls", name, &[ours], &peer));
        }
        match peer {
            Ok(_) => Ok(()),
            Err(error) => Err(error.context("DPDK's part of the start-up metrics")),
        }
    }

    /// The same in containers.
    fn contained(&mut self) -> Result<()> {
        let names = ["startup.container", "startup.container.runtime"];
        if let Some(reason) = contained::lacking()? {
            for name in names {
                self.report
                    .add(Row::failed(name, None, "ms", &anyhow::anyhow!("{reason}")));
            }
            return Ok(());
        }
        let dir = self.scratch.subdir("contained")?;
        let probe = startup::build_probe(&self.scratch.subdir("probe")?)?;
        let usernic = contained::usernic(self.root)?;
        let mut stage = contained::Contained::new(&dir, self.cpus, &usernic, probe)?;
        let mut starts = [Vec::new(), Vec::new()];
        for _ in 0..self.plan.at_once().pairs {
            for (who, starts) in [contained::Who::Ours, contained::Who::Dpdk]
                .into_iter()
                .zip(&mut starts)
            {
                starts.push(stage.once(who)?);
            }
        }
        type Value = fn(&contained::Start) -> f64;
        let columns: [Value; 2] = [|s| s.first_packet_ms, |s| s.runtime_ms];
        for (name, value) in names.into_iter().zip(columns) {
            if self.wanted(name) {
                let [ours, peer] = starts.each_ref().map(|s| s.iter().map(value).collect::<Vec<_>>());
                let row = Row::paired(name, None, "ms", Some("DPDK virtio_user"), &ours, &peer);
                self.report.add(row);
            }
        }
        Ok(())
    }

    /// Ours on both sides against sockets on a veth pair, everything spinning.
    fn kernel(&mut self) -> Result<()> {
        let dir = self.scratch.dir().to_owned();
        let mut ours = ours::Both::start(&dir, "k", self.front_cpus(), self.cpus, 256, &variants::OURS[0])?;
        for (spec, text, who) in [
            ("udp", "udp", "UDP over veth"),
            ("packet", "af_packet", "AF_PACKET over veth"),
        ] {
            for &bytes in self.sizes() {
                // The veth's MTU of 1500 and the Ethernet header.
                let bytes = bytes.min(1514);
                for (load, suffix) in [(format!("tx {bytes}"), "tx"), (format!("latency {bytes} 1"), "latency")] {
                    let name = format!("kernel.{text}.{suffix}");
                    if !self.wanted_at(&name, Some(bytes)) {
                        continue;
                    }
                    let start = Instant::now();
                    let command = ours::worker_command("kernel", spec, self.cpus)?;
                    let worker = Worker::new(Process::spawn("veth worker", command, &Surroundings::default())?)?;
                    let trips = (suffix == "latency").then_some(Percentile::P50);
                    let mut peer = Alone::new(worker, &load, trips)?;
                    let mut row = if trips.is_some() {
                        ours.prepare_latency(1, bytes)?;
                        let mut ours = ours::BothTrips(&mut ours, Percentile::P50);
                        let result = windows::compare(&self.plan, &mut self.patience, &mut ours, &mut peer);
                        Row::compared(&name, bytes, "ns", false, who, result)
                    } else {
                        ours.prepare(Load::Tx, bytes)?;
                        Row::compared(
                            &name,
                            bytes,
                            "Mpps",
                            true,
                            who,
                            windows::compare(&self.plan, &mut self.patience, &mut ours, &mut peer),
                        )
                    };
                    process::check_interrupted()?;
                    row.seconds = Some(Spent {
                        measuring: start.elapsed().as_secs_f64(),
                        ..Spent::default()
                    });
                    self.report.add(row);
                    self.save()?;
                }
            }
        }
        Ok(())
    }

    /// DPDK's own pair and the bare ring.
    fn baseline(&mut self) -> Result<()> {
        self.limit()?;
        let testpmd = self.testpmd()?;
        let places = (self.front("df")?, self.back("db")?);
        let mut pair = dpdk::Pair::start(&testpmd, "d", places, throughput::QUEUE, &variants::VIRTIO_USER[0])?;
        for bytes in SIZES {
            for load in Load::ALL {
                pair.prepare(load, bytes)?;
                let result = windows::alone(&self.plan, &mut pair);
                process::check_interrupted()?;
                self.report
                    .add(Row::alone(&format!("dpdk.{}", load.name()), bytes, "Mpps", result));
            }
        }
        Ok(())
    }
}

/// The bare ring as a variant: it runs within its window.
struct BareRing {
    cpus: (usize, usize),
    bytes: usize,
    window: Duration,
}

impl windows::Variant for BareRing {
    fn run(&mut self, _: bool) -> Result<()> {
        Ok(())
    }

    fn begin(&mut self) -> Result<()> {
        Ok(())
    }

    fn end(&mut self) -> Result<f64> {
        cores::spsc(self.cpus, self.bytes, self.window)
    }

    fn pids(&self) -> Vec<rustix::process::Pid> {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn patterns() {
        let matches = super::matches;
        assert!(matches("virtio_user.*", "virtio_user.tx") && matches("*.tx", "both.tx") && matches("a", "a"));
        assert!(matches("*", "") && matches("l*p50*", "latency.p50.1"));
        assert!(!matches("virtio_user.*", "both.tx") && !matches("tx", "both.tx"));
    }
}
