//! How the bench speaks with the programs that it measures: lines on standard input and output.
//!
//! | line | answer |
//! |---|---|
//! | `load NAME SIZE [IN_FLIGHT]` | `ok` |
//! | `stats` | `stats RX TX NANOSECONDS`: packets so far, and the time of the count |
//! | `polls` | `polls CALLS BUSY CYCLES PACKETS`: see [`Polls`] |
//! | `latency` | `latency COUNT P50 P99 P999`: round trips since the last such line, in nanoseconds |
//!
//! A program first says `ready`. The end of its input ends it.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal};

use crate::process::Process;

const ANSWER: Duration = Duration::from_secs(10);

/// Counters of a program.
#[derive(Clone, Copy, Debug)]
pub struct Counts {
    /// Packets received.
    pub rx: u64,
    /// Packets sent.
    pub tx: u64,
    /// When, on the monotonic clock, in nanoseconds.
    pub at: u64,
}

/// What a program's polls did, so far. A sender's poll is a call that sends, anybody else's one that receives.
#[derive(Clone, Copy, Debug, Default)]
pub struct Polls {
    /// All of them.
    pub calls: u64,
    /// Those that moved packets.
    pub busy: u64,
    /// Cycles of the time stamp counter in rounds that moved packets, if the program was told to measure them; rounds
    /// that were interrupted do not count.
    pub cycles: u64,
    /// Packets that these rounds moved.
    pub packets: u64,
}

impl Polls {
    /// Since then.
    pub fn since(self, then: Polls) -> Polls {
        Polls {
            calls: self.calls.wrapping_sub(then.calls),
            busy: self.busy.wrapping_sub(then.busy),
            cycles: self.cycles.wrapping_sub(then.cycles),
            packets: self.packets.wrapping_sub(then.packets),
        }
    }

    /// The share that moved packets.
    pub fn share(self) -> Option<f64> {
        (self.calls > 0).then(|| self.busy as f64 / self.calls as f64)
    }
}

/// Round trips.
#[derive(Clone, Copy, Debug)]
pub struct Latency {
    /// How many.
    pub count: u64,
    /// Median in nanoseconds.
    pub p50: f64,
    /// 99th percentile in nanoseconds.
    pub p99: f64,
    /// One in a thousand is worse, in nanoseconds.
    pub p999: f64,
}

/// A program that speaks this way.
pub struct Worker {
    process: Process,
}

impl Worker {
    /// Waits until it is ready.
    pub fn new(mut process: Process) -> Result<Self> {
        process.wait_for("ready\n", 0, Duration::from_secs(30))?;
        Ok(Worker { process })
    }

    /// Its id.
    pub fn pid(&self) -> Pid {
        self.process.pid()
    }

    /// Continues or stops it.
    pub fn run(&mut self, on: bool) -> Result<()> {
        self.process.signal(if on { Signal::CONT } else { Signal::STOP })
    }

    /// Gives it something to do.
    pub fn load(&mut self, load: &str) -> Result<()> {
        self.ask(&format!("load {load}"), "ok").map(drop)
    }

    /// Its counters.
    pub fn stats(&mut self) -> Result<Counts> {
        let numbers = self.ask("stats", "stats ")?;
        match numbers
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<Vec<u64>, _>>()?[..]
        {
            [rx, tx, at] => Ok(Counts { rx, tx, at }),
            _ => bail!("{} answered \"stats {numbers}\"", self.process.name()),
        }
    }

    /// What its polls did, so far.
    pub fn polls(&mut self) -> Result<Polls> {
        let numbers = self.ask("polls", "polls ")?;
        match numbers
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<Vec<u64>, _>>()?[..]
        {
            [calls, busy, cycles, packets] => Ok(Polls {
                calls,
                busy,
                cycles,
                packets,
            }),
            _ => bail!("{} answered \"polls {numbers}\"", self.process.name()),
        }
    }

    /// Round trips since the last time.
    pub fn latency(&mut self) -> Result<Latency> {
        let numbers = self.ask("latency", "latency ")?;
        match numbers
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<Vec<f64>, _>>()?[..]
        {
            [count, p50, p99, p999] => Ok(Latency {
                count: count as u64,
                p50,
                p99,
                p999,
            }),
            _ => bail!("{} answered \"latency {numbers}\"", self.process.name()),
        }
    }

    fn ask(&mut self, line: &str, answer: &str) -> Result<String> {
        let mark = self.process.mark();
        self.process.command(line)?;
        let from = self
            .process
            .wait_for(answer, mark, ANSWER)
            .with_context(|| format!("after \"{line}\""))?;
        let end = self.process.wait_for("\n", from, ANSWER)?;
        let text = self.process.output_since(from);
        Ok(text[..text.len().min(end - from)].trim().to_owned())
    }
}
