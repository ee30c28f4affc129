//! What is evaluated: each a set of processes that is stopped but for its windows.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use rustix::process::Pid;

use super::super::dpdk::{self, Pair, Place};
use super::super::latency::{Alone, DpdkTrips, Percentile};
use super::super::load::Load;
use super::super::ours::{self, Both};
use super::super::protocol::{Latency, Worker};
use super::super::startup;
use super::super::variants::{self, Subject};
use super::super::windows::{Variant, longest_wait, schedstat};
use crate::peers::Program;
use crate::process::{self, Process, Surroundings};

/// Bytes of a frame without FCS: the talk's.
pub const BYTES: usize = 64;

/// One way between two containers.
pub struct System {
    /// What charts call it.
    pub name: &'static str,
    /// Frames from the container to the switch, as many as go.
    throughput: Box<dyn Variant>,
    /// One frame there and back.
    trips: Box<dyn Trips>,
}

/// Round trips.
trait Trips {
    fn run(&mut self, on: bool) -> Result<()>;
    /// Since the last time.
    fn latency(&mut self) -> Result<Latency>;
    /// Its processes.
    fn pids(&self) -> Vec<Pid>;
}

impl Trips for Worker {
    fn run(&mut self, on: bool) -> Result<()> {
        Worker::run(self, on)
    }

    fn latency(&mut self) -> Result<Latency> {
        Worker::latency(self)
    }

    fn pids(&self) -> Vec<Pid> {
        vec![self.pid()]
    }
}

impl Trips for Both {
    fn run(&mut self, on: bool) -> Result<()> {
        Variant::run(self, on)
    }

    fn latency(&mut self) -> Result<Latency> {
        self.workers().0.latency()
    }

    fn pids(&self) -> Vec<Pid> {
        Variant::pids(self)
    }
}

impl Trips for DpdkTrips {
    fn run(&mut self, on: bool) -> Result<()> {
        Variant::run(self, on)
    }

    fn latency(&mut self) -> Result<Latency> {
        self.front.latency()
    }

    fn pids(&self) -> Vec<Pid> {
        Variant::pids(self)
    }
}

/// Two processes with their CPUs: commands, data.
type Sides = ((usize, usize), (usize, usize));

impl System {
    /// UDP sockets on a veth pair, both threads spinning: the kernel's best.
    pub fn kernel(cpus: (usize, usize)) -> Result<Self> {
        let worker = || -> Result<Worker> {
            let command = ours::worker_command("kernel", "udp", cpus)?;
            Worker::new(Process::spawn("veth worker", command, &Surroundings::default())?)
        };
        let throughput = Alone::new(worker()?, &format!("tx {BYTES}"), None)?;
        let mut trips = worker()?;
        trips.load(&format!("latency {BYTES} 1"))?;
        trips.run(false)?;
        Ok(System {
            name: "kernel, UDP over veth",
            throughput: Box::new(throughput),
            trips: Box::new(trips),
        })
    }

    /// Our front-end on our back-end.
    pub fn ours(dir: &Path, (front, back): Sides) -> Result<Self> {
        // Packed rings for rates, as DPDK's; one frame at a time is the same on both.
        let mut throughput = Both::start(dir, "et", front, back, 1024, &variants::OURS[1])?;
        throughput.prepare(Load::Tx, BYTES)?;
        let mut trips = Both::start(dir, "el", front, back, 256, &variants::OURS[1])?;
        trips.prepare_latency(1, BYTES)?;
        Ok(System {
            name: "usernic, virtio-user",
            throughput: Box::new(throughput),
            trips: Box::new(trips),
        })
    }

    /// DPDK's virtio_user on its vhost.
    pub fn dpdk(testpmd: &Program, place: &mut dyn FnMut(&str, bool) -> Result<Place>) -> Result<Self> {
        let packed = variants::VIRTIO_USER.iter().find(|choice| choice.name == "packed");
        let places = (place("df", true)?, place("db", false)?);
        let choice = packed.unwrap_or(&variants::VIRTIO_USER[0]);
        let mut throughput = Pair::start(testpmd, "ed", places, 1024, choice)?;
        throughput.prepare(Load::Tx, BYTES)?;

        let back = place("dl", false)?;
        let probe = startup::build_probe(&back.dir)?;
        let front = place("probe", true)?;
        let socket = back.dir.join("eprobe.sock");
        let dir = back.dir.clone();
        let back = dpdk::back_end(testpmd, "edl", back, &socket)?;
        let command = startup::probe_command(&probe, &dir, front.huge.as_deref(), &socket, front.cpus.1, "run");
        let surroundings = Surroundings {
            hugetlbfs: front.huge,
            ..Default::default()
        };
        let front = Worker::new(Process::spawn("dpdk_probe", command, &surroundings)?)?;
        let percentile = Percentile::P50;
        let mut trips = DpdkTrips {
            front,
            back,
            percentile,
        };
        trips.prepare(1, BYTES)?;
        Ok(System {
            name: "DPDK, virtio_user",
            throughput: Box::new(throughput),
            trips: Box::new(trips),
        })
    }

    /// Millions of frames a second, over a window; `None`: somebody else was on the CPUs.
    pub fn throughput(&mut self, rules: &Rules) -> Result<Option<f64>> {
        self.throughput.run(true)?;
        process::sleep(rules.settle)?;
        let look = Look::begin(self.throughput.pids(), rules);
        self.throughput.begin()?;
        process::sleep(rules.window)?;
        let value = self.throughput.end();
        let fit = look.fit(rules);
        self.throughput.run(false)?;
        value.map(|value| fit.then_some(value))
    }

    /// Round trips of a window, likewise.
    pub fn latency(&mut self, rules: &Rules) -> Result<Option<Latency>> {
        self.trips.run(true)?;
        process::sleep(rules.settle)?;
        let look = Look::begin(self.trips.pids(), rules);
        self.trips.latency()?;
        process::sleep(rules.window)?;
        let value = self.trips.latency();
        let fit = look.fit(rules);
        self.trips.run(false)?;
        value.map(|value| fit.then_some(value))
    }
}

/// How long a window is, and what spoils it.
pub struct Rules {
    /// From the start to the window's beginning.
    pub settle: Duration,
    /// The window.
    pub window: Duration,
    /// The part of it for which a measured thread may wait for its CPU.
    pub wait_at_most: f64,
    /// The neighbour, if it is meant to be on one of these CPUs: while it runs, others wait.
    pub sharing: Option<Pid>,
}

/// What threads did before a window.
struct Look {
    pids: Vec<Pid>,
    threads: BTreeMap<String, (u64, u64)>,
    neighbour: u64,
    start: Instant,
}

impl Look {
    fn begin(pids: Vec<Pid>, rules: &Rules) -> Self {
        Look {
            threads: schedstat(&pids),
            neighbour: ran(rules.sharing),
            pids,
            start: Instant::now(),
        }
    }

    /// Whether none but the neighbour had these CPUs.
    fn fit(self, rules: &Rules) -> bool {
        let took = self.start.elapsed();
        let waited = longest_wait(&self.threads, &schedstat(&self.pids), took);
        let neighbour = ran(rules.sharing).saturating_sub(self.neighbour) as f64 / took.as_nanos() as f64;
        waited <= rules.wait_at_most + neighbour
    }
}

/// Nanoseconds that a process ran.
fn ran(pid: Option<Pid>) -> u64 {
    pid.map_or(0, |pid| schedstat(&[pid]).values().map(|(ran, _)| ran).sum())
}
