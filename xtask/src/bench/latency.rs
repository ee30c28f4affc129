//! Round trips of packets, as a variant of a comparison.

use anyhow::Result;
use rustix::process::{Pid, Signal};

use super::ours::OnDpdk;
use super::protocol::{Latency, Worker};
use super::windows::Variant;
use crate::peers::testpmd::Testpmd;
use crate::process;

/// Which number of the distribution.
#[derive(Clone, Copy, Debug)]
pub enum Percentile {
    /// The median.
    P50,
    /// One in a hundred is worse.
    P99,
}

impl Percentile {
    /// The number, or 0 if there were too few round trips.
    pub fn of(self, latency: Latency) -> f64 {
        // Too few tell nothing: the window is dropped, as one in which nothing arrived.
        if latency.count < 1000 {
            return 0.0;
        }
        match self {
            Percentile::P50 => latency.p50,
            Percentile::P99 => latency.p99,
        }
    }
}

/// Our front-end on DPDK's back-end.
pub struct OursTrips<'a>(pub &'a mut OnDpdk, pub Percentile);

impl Variant for OursTrips<'_> {
    fn run(&mut self, on: bool) -> Result<()> {
        self.0.run(on)
    }

    fn begin(&mut self) -> Result<()> {
        self.0.front().latency().map(drop)
    }

    fn end(&mut self) -> Result<f64> {
        Ok(self.1.of(self.0.front().latency()?))
    }

    fn pids(&self) -> Vec<Pid> {
        self.0.pids()
    }
}

/// DPDK's front-end (the probe program) on DPDK's back-end.
pub struct DpdkTrips {
    /// The front-end.
    pub front: Worker,
    /// The back-end.
    pub back: Testpmd,
    /// What is asked for.
    pub percentile: Percentile,
}

impl DpdkTrips {
    /// Sets round trips up, and leaves them stopped.
    pub fn prepare(&mut self, in_flight: usize, size: usize) -> Result<()> {
        self.run(true)?;
        self.front.load("rx")?;
        super::dpdk::drain(&mut self.back)?;
        process::sleep(std::time::Duration::from_millis(50))?;
        self.back.forward("io")?;
        self.front.load(&format!("latency {size} {in_flight}"))?;
        self.run(false)
    }
}

impl Variant for DpdkTrips {
    fn run(&mut self, on: bool) -> Result<()> {
        self.back
            .process()
            .signal(if on { Signal::CONT } else { Signal::STOP })?;
        self.front.run(on)
    }

    fn begin(&mut self) -> Result<()> {
        self.front.latency().map(drop)
    }

    fn end(&mut self) -> Result<f64> {
        Ok(self.percentile.of(self.front.latency()?))
    }

    fn pids(&self) -> Vec<Pid> {
        vec![self.front.pid(), self.back.pid()]
    }
}

/// A program alone that speaks the protocol, by its packets a second or its round trips.
pub struct Alone {
    /// The program.
    pub worker: Worker,
    /// Round trips rather than packets a second.
    pub percentile: Option<Percentile>,
    begun: u64,
    at: u64,
}

impl Alone {
    /// Stopped, with a load.
    pub fn new(mut worker: Worker, load: &str, percentile: Option<Percentile>) -> Result<Self> {
        worker.load(load)?;
        worker.run(false)?;
        Ok(Alone {
            worker,
            percentile,
            begun: 0,
            at: 0,
        })
    }
}

impl Variant for Alone {
    fn run(&mut self, on: bool) -> Result<()> {
        self.worker.run(on)
    }

    fn begin(&mut self) -> Result<()> {
        if self.percentile.is_some() {
            return self.worker.latency().map(drop);
        }
        let now = self.worker.stats()?;
        (self.begun, self.at) = (now.rx, now.at);
        Ok(())
    }

    fn end(&mut self) -> Result<f64> {
        if let Some(percentile) = self.percentile {
            return Ok(percentile.of(self.worker.latency()?));
        }
        let now = self.worker.stats()?;
        Ok((now.rx - self.begun) as f64 * 1e3 / (now.at - self.at).max(1) as f64)
    }

    fn pids(&self) -> Vec<Pid> {
        vec![self.worker.pid()]
    }
}
