//! Our sides of the comparisons: our front-end on DPDK's back-end, and ours on both sides.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use rustix::process::Pid;

use super::dpdk::{self, Place};
use super::latency::Percentile;
use super::load::{Counted, Load};
use super::protocol::{Counts, Worker};
use super::variants::{Busy, Choice, Look, Subject};
use super::windows::Variant;
use crate::peers::Program;
use crate::peers::testpmd::Testpmd;
use crate::process::{Process, Surroundings};

/// This program again, as a worker.
pub fn worker_command(mode: &str, spec: &str, cpus: (usize, usize)) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args([
        "bench-worker",
        mode,
        "--spec",
        spec,
        "--cpus",
        &format!("{},{}", cpus.0, cpus.1),
    ]);
    Ok(command)
}

/// A port that is driven as it is told; `more` are arguments of [`WorkerArguments`](super::WorkerArguments).
pub fn worker(name: &str, spec: &str, cpus: (usize, usize), more: &[&str]) -> Result<Worker> {
    worker_in("run", name, spec, cpus, more)
}

/// Another of the programs that speak the protocol.
pub fn worker_in(mode: &str, name: &str, spec: &str, cpus: (usize, usize), more: &[&str]) -> Result<Worker> {
    let mut command = worker_command(mode, spec, cpus)?;
    command.args(more);
    Worker::new(Process::spawn(name, command, &Surroundings::default())?)
}

/// A front-end of ours; `keys` as a [`Choice`] has them.
pub fn front_end(name: &str, socket: &Path, queue_size: u16, keys: &str, cpus: (usize, usize)) -> Result<Worker> {
    worker(
        name,
        &format!("virtio-user,path={},queue_size={queue_size}{keys}", socket.display()),
        cpus,
        &[],
    )
}

/// A back-end of ours.
pub fn back_end(name: &str, socket: &Path, cpus: (usize, usize)) -> Result<Worker> {
    worker(name, &format!("vhost,path={}", socket.display()), cpus, &[])
}

/// What a front-end does.
fn front_load(load: Load, size: usize) -> String {
    match load {
        Load::Tx => format!("tx {size}"),
        Load::Rx => "rx".into(),
        Load::Loop(n) => format!("loop {size} {n}"),
    }
}

/// What a back-end does.
fn back_load(load: Load, size: usize) -> String {
    match load {
        Load::Tx => "rx".into(),
        Load::Rx => format!("tx {size}"),
        Load::Loop(_) => "io".into(),
    }
}

/// Our front-end, DPDK's back-end: the count is the back-end's.
pub struct OnDpdk {
    front: Worker,
    back: Testpmd,
    load: Load,
    look: Look,
}

impl OnDpdk {
    /// Starts both. `front_cpus`: the commands' and the driving thread's.
    pub fn start(
        program: &Program,
        tag: &str,
        front_cpus: (usize, usize),
        back: Place,
        queue_size: u16,
        choice: &Choice,
    ) -> Result<Self> {
        let socket = back.dir.join(format!("{tag}.sock"));
        let back = dpdk::back_end(program, &format!("{tag}b"), back, &socket)?;
        let front = front_end("our front-end", &socket, queue_size, choice.keys, front_cpus)?;
        Ok(OnDpdk {
            front,
            back,
            load: Load::Tx,
            look: Look::default(),
        })
    }

    /// Sets round trips up, and leaves them stopped.
    pub fn prepare_latency(&mut self, in_flight: usize, size: usize) -> Result<()> {
        self.run(true)?;
        self.front.load("rx")?;
        dpdk::drain(&mut self.back)?;
        crate::process::sleep(Duration::from_millis(50))?;
        self.back.forward("io")?;
        self.front.load(&format!("latency {size} {in_flight}"))?;
        self.run(false)
    }

    /// The front-end, for its round trips.
    pub fn front(&mut self) -> &mut Worker {
        &mut self.front
    }
}

impl Subject for OnDpdk {
    fn prepare(&mut self, load: Load, size: usize) -> Result<()> {
        self.run(true)?;
        self.front.load("rx")?;
        dpdk::drain(&mut self.back)?;
        crate::process::sleep(Duration::from_millis(50))?;
        dpdk::load_back_end(&mut self.back, load, size)?;
        self.front.load(&front_load(load, size))?;
        self.load = load;
        self.run(false)
    }

    fn begin_polls(&mut self) -> Result<()> {
        self.back.record_polls(true)?;
        self.look.begin(self.front.polls()?);
        Ok(())
    }

    fn end_polls(&mut self) -> Result<Busy> {
        let busy = Busy {
            front: self.look.end(self.front.polls()?),
            back: self.back.busy(self.load == Load::Rx)?,
        };
        self.back.record_polls(false)?;
        Ok(busy)
    }
}

impl Variant for OnDpdk {
    fn run(&mut self, on: bool) -> Result<()> {
        let signal = if on {
            rustix::process::Signal::CONT
        } else {
            rustix::process::Signal::STOP
        };
        self.back.process().signal(signal)?;
        self.front.run(on)
    }

    fn begin(&mut self) -> Result<()> {
        dpdk::rate(&mut self.back, self.load).map(drop)
    }

    fn end(&mut self) -> Result<f64> {
        dpdk::rate(&mut self.back, self.load)
    }

    fn pids(&self) -> Vec<Pid> {
        vec![self.front.pid(), self.back.pid()]
    }
}

/// Ours on both sides: the count is the back-end's.
pub struct Both {
    front: Worker,
    back: Worker,
    load: Load,
    begun: Option<Counts>,
    looks: (Look, Look),
}

impl Both {
    /// Starts both, with the CPUs of their commands and their driving threads.
    pub fn start(
        dir: &Path,
        tag: &str,
        front: (usize, usize),
        back: (usize, usize),
        queue_size: u16,
        choice: &Choice,
    ) -> Result<Self> {
        let socket = dir.join(format!("{tag}.sock"));
        let back = back_end("our back-end", &socket, back)?;
        let front = front_end("our front-end", &socket, queue_size, choice.keys, front)?;
        Ok(Both::of(front, back))
    }

    /// Of two that were started.
    pub fn of(front: Worker, back: Worker) -> Self {
        Both {
            front,
            back,
            load: Load::Tx,
            begun: None,
            looks: Default::default(),
        }
    }

    /// The front-end and the back-end.
    pub fn workers(&mut self) -> (&mut Worker, &mut Worker) {
        (&mut self.front, &mut self.back)
    }
}

impl Subject for Both {
    fn prepare(&mut self, load: Load, size: usize) -> Result<()> {
        self.run(true)?;
        self.front.load("rx")?;
        self.back.load("rx")?;
        crate::process::sleep(Duration::from_millis(50))?;
        self.back.load(&back_load(load, size))?;
        self.front.load(&front_load(load, size))?;
        self.load = load;
        self.run(false)
    }

    fn begin_polls(&mut self) -> Result<()> {
        self.looks.0.begin(self.front.polls()?);
        self.looks.1.begin(self.back.polls()?);
        Ok(())
    }

    fn end_polls(&mut self) -> Result<Busy> {
        Ok(Busy {
            front: self.looks.0.end(self.front.polls()?),
            back: self.looks.1.end(self.back.polls()?),
        })
    }
}

impl Variant for Both {
    fn run(&mut self, on: bool) -> Result<()> {
        self.back.run(on)?;
        self.front.run(on)
    }

    fn begin(&mut self) -> Result<()> {
        self.begun = Some(self.back.stats()?);
        Ok(())
    }

    fn end(&mut self) -> Result<f64> {
        let now = self.back.stats()?;
        let then = self.begun.take().unwrap_or(now);
        let packets = match self.load.counted() {
            Counted::Received => now.rx - then.rx,
            Counted::Sent => now.tx - then.tx,
        };
        // Packets a microsecond: millions a second.
        Ok(packets as f64 * 1e3 / (now.at - then.at).max(1) as f64)
    }

    fn pids(&self) -> Vec<Pid> {
        vec![self.front.pid(), self.back.pid()]
    }
}

impl Both {
    /// Sets round trips up, and leaves them stopped.
    pub fn prepare_latency(&mut self, in_flight: usize, size: usize) -> Result<()> {
        self.run(true)?;
        self.front.load("rx")?;
        self.back.load("rx")?;
        crate::process::sleep(Duration::from_millis(50))?;
        self.back.load("io")?;
        self.front.load(&format!("latency {size} {in_flight}"))?;
        self.run(false)
    }
}

/// Round trips of ours on both sides.
pub struct BothTrips<'a>(pub &'a mut Both, pub Percentile);

impl Variant for BothTrips<'_> {
    fn run(&mut self, on: bool) -> Result<()> {
        self.0.run(on)
    }

    fn begin(&mut self) -> Result<()> {
        self.0.front.latency().map(drop)
    }

    fn end(&mut self) -> Result<f64> {
        Ok(self.1.of(self.0.front.latency()?))
    }

    fn pids(&self) -> Vec<Pid> {
        self.0.pids()
    }
}
