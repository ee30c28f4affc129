//! Pairs of testpmd: virtio_user and our plugin on a vhost back-end, and memif's client and server.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use rustix::process::{Pid, Signal};

use super::load::{Counted, Load};
use super::variants::{Busy, Choice, Subject};
use super::windows::Variant;
use crate::peers::Program;
use crate::peers::testpmd::{self, Config, Testpmd};

/// Up to this long for memif's two sides to come together.
const CONNECT: Duration = Duration::from_secs(10);

/// Where a testpmd of a bench lives.
pub struct Place {
    /// Its run directory.
    pub dir: PathBuf,
    /// Its hugetlbfs, if it may have one.
    pub huge: Option<PathBuf>,
    /// CPU of the commands, CPU that forwards.
    pub cpus: (usize, usize),
}

/// A testpmd with a vhost port that listens on a socket.
pub fn back_end(program: &Program, name: &str, place: Place, socket: &Path) -> Result<Testpmd> {
    start(program, name, place, testpmd::vhost(0, socket, ""), false)
}

/// A testpmd with a virtio_user port, of a variant. An error if DPDK takes another path than the vectorized one that is
/// asked for.
fn front_end(
    program: &Program,
    name: &str,
    place: Place,
    socket: &Path,
    size: u16,
    choice: &Choice,
) -> Result<Testpmd> {
    let vdev = testpmd::virtio_user(0, socket, size, choice.keys);
    let testpmd = start(program, name, place, vdev, choice.vectorized)?;
    if choice.vectorized {
        let output = testpmd.output();
        if let Some(line) = output
            .lines()
            .find(|l| l.contains("disabled") && l.contains("vectorized"))
        {
            bail!("{}", line.trim());
        }
    }
    Ok(testpmd)
}

fn start(program: &Program, name: &str, place: Place, vdev: String, vectorized: bool) -> Result<Testpmd> {
    let mut config = Config::new(name, &place.dir);
    config.vdevs = vec![vdev];
    config.huge_dir = place.huge;
    config.cpus = place.cpus;
    if vectorized {
        config.eal = [
            "--force-max-simd-bitwidth=512",
            "--log-level=pmd.net.virtio.driver:info",
        ]
        .map(String::from)
        .to_vec();
    }
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
    /// Starts virtio_user on vhost; they do nothing yet. The front-end's place is the first.
    pub fn start(
        program: &Program,
        tag: &str,
        places: (Place, Place),
        queue_size: u16,
        choice: &Choice,
    ) -> Result<Self> {
        let socket = places.1.dir.join(format!("{tag}.sock"));
        let back = back_end(program, &format!("{tag}b"), places.1, &socket)?;
        let front = front_end(program, &format!("{tag}f"), places.0, &socket, queue_size, choice)?;
        Ok(Pair {
            front,
            back,
            load: Load::Tx,
        })
    }

    /// Starts our plugin on vhost, as [`Pair::start`] does virtio_user.
    pub fn start_plugin(
        program: &Program,
        plugin: &Path,
        tag: &str,
        places: (Place, Place),
        queue_size: u16,
        choice: &Choice,
    ) -> Result<Self> {
        let socket = places.1.dir.join(format!("{tag}.sock"));
        let back = back_end(program, &format!("{tag}b"), places.1, &socket)?;
        let mut config = Config::new(&format!("{tag}f"), &places.0.dir);
        config.vdevs = vec![testpmd::usernic(0, &socket, queue_size, choice.keys)];
        config.huge_dir = places.0.huge;
        config.cpus = places.0.cpus;
        config.plugin = Some(plugin.to_owned());
        Ok(Pair {
            front: Testpmd::start(program, &config)?,
            back,
            load: Load::Tx,
        })
    }

    /// Starts memif's client, which owns the memory as a front-end does, on its server.
    pub fn start_memif(
        program: &Program,
        tag: &str,
        places: (Place, Place),
        queue_size: u16,
        choice: &Choice,
    ) -> Result<Self> {
        let socket = places.1.dir.join(format!("{tag}.sock"));
        let bits = queue_size.ilog2();
        let server = testpmd::memif(0, &socket, true, bits, "");
        let client = testpmd::memif(0, &socket, false, bits, choice.keys);
        let back = start(program, &format!("{tag}b"), places.1, server, false)?;
        let mut front = start(program, &format!("{tag}f"), places.0, client, false)?;
        // They come together after both are started.
        let end = Instant::now() + CONNECT;
        while !front.command("show port info 0")?.contains("Link status: up") {
            if Instant::now() > end {
                bail!("memif's client and server do not come together within {CONNECT:?}");
            }
            crate::process::sleep(Duration::from_millis(20))?;
        }
        Ok(Pair {
            front,
            back,
            load: Load::Tx,
        })
    }
}

impl Subject for Pair {
    fn prepare(&mut self, load: Load, size: usize) -> Result<()> {
        self.run(true)?;
        drain(&mut self.back)?;
        drain(&mut self.front)?;
        crate::process::sleep(Duration::from_millis(50))?;
        load_back_end(&mut self.back, load, size)?;
        load_front_end(&mut self.front, load, size)?;
        self.load = load;
        self.run(false)
    }

    fn begin_polls(&mut self) -> Result<()> {
        self.front.record_polls(true)?;
        self.back.record_polls(true)
    }

    fn end_polls(&mut self) -> Result<Busy> {
        let busy = Busy {
            front: self.front.busy(self.load == Load::Tx)?,
            back: self.back.busy(self.load == Load::Rx)?,
        };
        self.front.record_polls(false)?;
        self.back.record_polls(false)?;
        Ok(busy)
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
