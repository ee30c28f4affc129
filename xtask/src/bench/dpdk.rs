//! DPDK's own pair: virtio_user on a vhost back-end, both testpmd, split ring.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use rustix::process::{Pid, Signal};

use super::load::{Counted, Load};
use super::windows::Variant;
use crate::peers::Program;
use crate::peers::testpmd::{self, Config, Testpmd};

/// Where a testpmd of a bench lives.
pub struct Place {
    /// Its run directory.
    pub dir: PathBuf,
    /// Its hugetlbfs, if it may have one.
    pub huge: Option<PathBuf>,
    /// CPU of the commands, CPU that forwards.
    pub cpus: (usize, usize),
}

/// A testpmd with one port, on one side of a socket.
pub fn back_end(program: &Program, name: &str, place: Place, socket: &std::path::Path) -> Result<Testpmd> {
    start(program, name, place, testpmd::vhost(0, socket, ""))
}

/// The other side.
pub fn front_end(program: &Program, name: &str, place: Place, socket: &std::path::Path, size: u16) -> Result<Testpmd> {
    start(program, name, place, testpmd::virtio_user(0, socket, size, ""))
}

fn start(program: &Program, name: &str, place: Place, vdev: String) -> Result<Testpmd> {
    let mut config = Config::new(name, &place.dir);
    config.vdevs = vec![vdev];
    config.huge_dir = place.huge;
    config.cpus = place.cpus;
    Testpmd::start(program, &config)
}

/// Makes a back-end do its part of a load.
pub fn load_back_end(testpmd: &mut Testpmd, load: Load, size: usize) -> Result<()> {
    match load {
        Load::Tx => testpmd.forward("rxonly"),
        Load::Rx => {
            testpmd.stop()?;
            testpmd.command(&format!("set txpkts {size}"))?;
            testpmd.forward("txonly")
        }
        Load::Loop(_) => testpmd.forward("io"),
    }
}

/// Makes a front-end do its part of a load, once the back-end does its own.
pub fn load_front_end(testpmd: &mut Testpmd, load: Load, size: usize) -> Result<()> {
    testpmd.stop()?;
    testpmd.command(&format!("set txpkts {size}"))?;
    match load {
        Load::Tx => testpmd.forward("txonly"),
        Load::Rx => testpmd.forward("rxonly"),
        Load::Loop(in_flight) => {
            let burst = in_flight.min(32);
            testpmd.command(&format!("set burst {burst}"))?;
            testpmd.forward_first("io", in_flight / burst)
        }
    }
}

/// Takes out what earlier loads left in the rings.
pub fn drain(testpmd: &mut Testpmd) -> Result<()> {
    testpmd.stop()?;
    testpmd.command("set burst 32")?;
    testpmd.forward("rxonly")
}

/// Millions of packets a second at a back-end, by its own clock, since the last time.
pub fn rate(testpmd: &mut Testpmd, load: Load) -> Result<f64> {
    let stats = testpmd.stats(0)?;
    Ok(match load.counted() {
        Counted::Received => stats.rx_pps,
        Counted::Sent => stats.tx_pps,
    } / 1e6)
}

/// DPDK on both sides.
pub struct Pair {
    front: Testpmd,
    back: Testpmd,
    load: Load,
}

impl Pair {
    /// Starts both; they do nothing yet.
    pub fn start(program: &Program, tag: &str, places: (Place, Place), queue_size: u16) -> Result<Self> {
        let socket = places.1.dir.join(format!("{tag}.sock"));
        let back = back_end(program, &format!("{tag}b"), places.1, &socket)?;
        let front = front_end(program, &format!("{tag}f"), places.0, &socket, queue_size)?;
        Ok(Pair {
            front,
            back,
            load: Load::Tx,
        })
    }

    /// Sets a load up, and leaves it stopped.
    pub fn prepare(&mut self, load: Load, size: usize) -> Result<()> {
        self.run(true)?;
        drain(&mut self.back)?;
        drain(&mut self.front)?;
        crate::process::sleep(Duration::from_millis(50))?;
        load_back_end(&mut self.back, load, size)?;
        load_front_end(&mut self.front, load, size)?;
        self.load = load;
        self.run(false)
    }
}

impl Variant for Pair {
    fn run(&mut self, on: bool) -> Result<()> {
        let signal = if on { Signal::CONT } else { Signal::STOP };
        // The side that is counted goes last when stopping and first when continuing.
        self.back.process().signal(signal)?;
        self.front.process().signal(signal)
    }

    fn begin(&mut self) -> Result<()> {
        rate(&mut self.back, self.load).map(drop)
    }

    fn end(&mut self) -> Result<f64> {
        rate(&mut self.back, self.load)
    }

    fn pids(&self) -> Vec<Pid> {
        vec![self.front.pid(), self.back.pid()]
    }
}
