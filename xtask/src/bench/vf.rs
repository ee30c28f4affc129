//! What a packet of 64 bytes costs on a `vf` port's queues, its device apart: cycles and instructions.
//!
//! A port is opened on the model of a virtual function, whose PF answers its questions. Then the model rests: tails are
//! words of memory, and this program plays the device on the same thread, between the queue's calls and not counted. It
//! writes descriptors back, and touches no packet.
//!
//! | metric | a burst |
//! |---|---|
//! | `vf.rx` | is received, with the refill, and freed unread |
//! | `vf.tx` | is allocated, gets 42 bytes of headers, and is sent, with what was sent taken back |
//! | `vf.forward` | is received, with the refill, and sent untouched, with what was sent taken back |

use std::any::Any;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Command;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rustix::event::{EventfdFlags, eventfd};
use usernic::memory::Automatic;
use usernic::spec::PortSpec;
use usernic::vf::{Hardware, Mapped, Reach};
use usernic::{Burst, Port, Queue, vfio};
use vf_model::{Registers as _, Settings, Shared, VfHandle};

use super::Bench;
use super::drive::{fill, headers};
use super::instructions::inclusive;
use super::report::Row;
use super::stats::median;
use crate::peers::which;
use crate::process;

/// Entries of the rings.
const RING: usize = 512;

/// The frame.
const SIZE: usize = 64;

/// Packets that are moved at a time.
pub const BURSTS: [usize; 4] = [1, 8, 32, 64];

/// Runs of which the median is taken.
const RUNS: usize = 31;

/// What ixy.rs's authors publish for forwarding, its device included, in batches of 32.
const IXY: (usize, f64, f64) = (32, 100.0, 209.0);

/// Its name in a row.
const IXY_NAME: &str = "ixy.rs as published";

/// Register offsets of queue 0 (82599 datasheet, 9.3): base low and high, and tail, of receiving and of sending.
const RX: [u32; 3] = [0x1000, 0x1004, 0x1018];
const TX: [u32; 3] = [0x2000, 0x2004, 0x2018];

/// The words that the device of this program reads: see [`RX`] and [`TX`].
#[derive(Default)]
struct Words {
    rx: [AtomicU32; 3],
    tx: [AtomicU32; 3],
}

impl Words {
    fn at(&self, offset: u32) -> Option<&AtomicU32> {
        let of = |offsets: [u32; 3]| offsets.iter().position(|&o| o == offset);
        match (of(RX), of(TX)) {
            (Some(i), _) => Some(&self.rx[i]),
            (_, Some(i)) => Some(&self.tx[i]),
            _ => None,
        }
    }
}

/// The model's registers, but for the words, which the model does not see change at tails.
struct Split {
    model: VfHandle,
    words: Arc<Words>,
}

impl usernic::vf::Registers for Split {
    fn read(&self, offset: u32) -> u32 {
        self.model.read32(offset)
    }

    #[inline]
    fn write(&self, offset: u32, value: u32) {
        if let Some(word) = self.words.at(offset) {
            word.store(value, Ordering::Relaxed);
            if offset == RX[2] || offset == TX[2] {
                return;
            }
        }
        self.model.write32(offset, value);
    }
}

struct MemoryVf {
    device: Shared,
    words: Arc<Words>,
}

impl Hardware for MemoryVf {
    fn name(&self) -> String {
        "memory".into()
    }

    fn ids(&self) -> Result<(u16, u16), vfio::Error> {
        Ok((0x8086, self.device.with(|nic| nic.pf().kind.device_id())))
    }

    fn registers(&self) -> Result<Reach, vfio::Error> {
        Ok(Reach::other(Split {
            model: self.device.vf(0),
            words: Arc::clone(&self.words),
        }))
    }

    fn enable_vectors(&self, _most: usize) -> Result<Vec<OwnedFd>, vfio::Error> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(eventfd(0, flags).into_iter().collect())
    }

    unsafe fn map(&self, addr: NonNull<u8>, _len: usize) -> Result<Mapped, vfio::Error> {
        // The device is this program: its addresses are ours.
        let guard: Box<dyn Any + Send> = Box::new(());
        Ok(Mapped {
            address: addr.as_ptr() as u64,
            guard,
        })
    }

    unsafe fn map_in_place(&self, addr: NonNull<u8>, len: usize) -> Result<Mapped, vfio::Error> {
        // SAFETY: the caller's promise.
        unsafe { self.map(addr, len) }
    }

    fn set_bus_master(&self, _on: bool) -> Result<(), vfio::Error> {
        Ok(())
    }

    fn pause(&self) -> Box<dyn FnMut(u32) + Send> {
        let device = self.device.clone();
        Box::new(move |us| device.with(|nic| nic.advance(Duration::from_micros(us.into()))))
    }
}

/// The device: descriptor memory, and how far it is.
struct Device {
    words: Arc<Words>,
    rx_head: usize,
    tx_head: usize,
}

impl Device {
    fn ring(words: &[AtomicU32; 3]) -> (*mut [u64; 2], usize) {
        let word = |i: usize| u64::from(words[i].load(Ordering::Relaxed));
        ((word(0) | word(1) << 32) as *mut [u64; 2], word(2) as usize)
    }

    /// Receives `count` frames, and sends all that there is; whether there were buffers for all.
    fn work(&mut self, count: usize) -> bool {
        let (ring, tail) = Self::ring(&self.words.rx);
        for _ in 0..count {
            if self.rx_head == tail {
                return false;
            }
            // SAFETY: inside the ring, whose address the driver wrote; one thread uses it.
            unsafe {
                ring.add(self.rx_head)
                    .write_volatile([0x0110, (SIZE as u64 - 4) << 32 | 0x63])
            };
            self.rx_head = (self.rx_head + 1) % RING;
        }
        let (ring, tail) = Self::ring(&self.words.tx);
        while self.tx_head != tail {
            // SAFETY: as above.
            unsafe {
                let desc = ring.add(self.tx_head);
                let [addr, rest] = desc.read_volatile();
                // RS: it is to tell.
                if rest & 0x0800_0000 != 0 {
                    desc.write_volatile([addr, 1 << 32]);
                }
            }
            self.tx_head = (self.tx_head + 1) % RING;
        }
        true
    }
}

/// What is done with a burst.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// `vf.rx`
    Rx,
    /// `vf.tx`
    Tx,
    /// `vf.forward`
    Forward,
}

impl What {
    const ALL: [What; 3] = [What::Rx, What::Tx, What::Forward];

    fn name(self) -> &'static str {
        match self {
            What::Rx => "rx",
            What::Tx => "tx",
            What::Forward => "forward",
        }
    }

    fn function(self) -> &'static str {
        match self {
            What::Rx => "usernic_bench_vf_rx",
            What::Tx => "usernic_bench_vf_tx",
            What::Forward => "usernic_bench_vf_forward",
        }
    }
}

#[inline(never)]
#[unsafe(no_mangle)]
extern "Rust" fn usernic_bench_vf_rx(queue: &mut Queue, burst: &mut Burst) -> usize {
    let n = queue.rx(burst);
    queue.free(burst);
    n
}

#[inline(never)]
#[unsafe(no_mangle)]
extern "Rust" fn usernic_bench_vf_tx(queue: &mut Queue, burst: &mut Burst, headers: &[u8; 42]) -> usize {
    let count = burst.capacity();
    match fill(queue, burst, count, SIZE - 4, headers) {
        Ok(()) => queue.tx(burst),
        Err(_) => 0,
    }
}

#[inline(never)]
#[unsafe(no_mangle)]
extern "Rust" fn usernic_bench_vf_forward(queue: &mut Queue, burst: &mut Burst) -> usize {
    queue.rx(burst);
    queue.tx(burst)
}

/// The time stamp counter, after all that is before it.
fn cycles() -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has the counter; the fence waits for what is before it.
    unsafe {
        std::arch::x86_64::_mm_lfence();
        std::arch::x86_64::_rdtsc()
    }
    #[cfg(not(target_arch = "x86_64"))]
    super::worker::monotonic()
}

/// The program that is measured: `what` as its spec, and with `bursts` as many and nothing else, for callgrind; else it
/// prints cycles a packet.
pub fn main(what: &str, bursts: u64, burst: usize) -> Result<()> {
    let what = What::ALL
        .into_iter()
        .find(|w| w.name() == what)
        .context("rx, tx or forward")?;
    let words = Arc::new(Words::default());
    let hardware = MemoryVf {
        device: Shared::tolerant(Settings {
            vfs: 1,
            ..Settings::default()
        }),
        words: Arc::clone(&words),
    };
    let spec: PortSpec = format!("vf,memory=memfd,queue_size={RING}").parse()?;
    let mut memory = Automatic::from_spec(&spec);
    let port = Port::open_vf(spec, Box::new(hardware), &mut memory)?;
    if !port.wait_link(Duration::from_secs(60)) {
        bail!("no link");
    }
    let mut queue = port.queue(0)?;
    let mut device = Device {
        words,
        rx_head: 0,
        tx_head: 0,
    };
    let mut held = Burst::new(burst);
    let headers = headers(SIZE - 4);
    let arrives = if what == What::Tx { 0 } else { burst };
    let mut once = || -> Result<u64> {
        if !device.work(arrives) {
            bail!("the receive ring ran empty");
        }
        let start = cycles();
        let n = match what {
            What::Rx => usernic_bench_vf_rx(&mut queue, &mut held),
            What::Tx => usernic_bench_vf_tx(&mut queue, &mut held, &headers),
            What::Forward => usernic_bench_vf_forward(&mut queue, &mut held),
        };
        let took = cycles() - start;
        if n != burst {
            bail!("{n} packets of a burst of {burst}");
        }
        Ok(took)
    };
    if bursts > 0 {
        for _ in 0..bursts {
            once()?;
        }
        return Ok(());
    }
    let rounds = 200_000 / burst;
    let mut runs = Vec::new();
    for _ in 0..RUNS {
        let mut empty = 0;
        for _ in 0..rounds {
            let start = cycles();
            empty += cycles() - start;
        }
        let mut sum = 0;
        for _ in 0..rounds {
            sum += once()?;
        }
        runs.push(sum.saturating_sub(empty) as f64 / (rounds * burst) as f64);
    }
    println!("cycles {:.3}", median(&runs));
    Ok(())
}

/// A worker of this kind.
fn command(what: What, burst: usize, bursts: u64) -> Result<(std::path::PathBuf, Vec<String>)> {
    let arguments = ["bench-worker", "vf", "--spec", what.name(), "--burst"].map(str::to_owned);
    let mut arguments = arguments.to_vec();
    arguments.extend([burst.to_string(), "--bursts".into(), bursts.to_string()]);
    Ok((std::env::current_exe()?, arguments))
}

fn count_cycles(what: What, burst: usize) -> Result<f64> {
    let (program, arguments) = command(what, burst, 0)?;
    let mut command = Command::new(program);
    command.args(arguments);
    let text = process::run("the vf bench", command, Duration::from_secs(60))?;
    let value = text.lines().find_map(|line| line.strip_prefix("cycles "));
    value.context("no cycles")?.trim().parse().context("a number")
}

fn count_instructions(dir: &Path, what: What, burst: usize) -> Result<f64> {
    let total = |packets: usize| -> Result<u64> {
        let out = dir.join("callgrind.vf.out");
        let (program, arguments) = command(what, burst, (packets / burst) as u64)?;
        let mut command = Command::new("valgrind");
        command
            .arg("--tool=callgrind")
            .arg(format!("--callgrind-out-file={}", out.display()))
            .arg(program)
            .args(arguments);
        process::run("valgrind", command, Duration::from_secs(180))?;
        let report = std::fs::read_to_string(&out)?;
        inclusive(&report, what.function()).with_context(|| format!("no call of {}", what.function()))
    };
    // Multiples of the ring's size, so that wraps and refills fall alike.
    let (few, many) = (8 * RING, 24 * RING);
    Ok((total(many)? - total(few)?) as f64 / (many - few) as f64)
}

/// The names of the metrics.
pub fn names() -> impl Iterator<Item = String> {
    What::ALL.into_iter().flat_map(|what| {
        BURSTS.into_iter().flat_map(move |burst| {
            ["cycles", "instructions"].map(|counted| format!("vf.{}.{burst}.{counted}", what.name()))
        })
    })
}

impl Bench<'_> {
    /// The metrics `vf.*`.
    pub fn vf(&mut self) -> Result<()> {
        let dir = self.scratch.dir().to_owned();
        for what in What::ALL {
            for burst in BURSTS {
                let of_ixy = what == What::Forward && burst == IXY.0;
                let mut counted = |counted: &str, unit, published, count: &dyn Fn() -> Result<f64>| -> Result<()> {
                    let name = format!("vf.{}.{burst}.{counted}", what.name());
                    if !self.wanted_at(&name, Some(SIZE)) {
                        return Ok(());
                    }
                    let peer: Vec<f64> = if of_ixy { vec![published] } else { Vec::new() };
                    let row = match count() {
                        Ok(value) => Row::paired(&name, Some(SIZE), unit, Some(IXY_NAME), &[value], &peer),
                        Err(error) => Row::failed(&name, Some(SIZE), unit, &error),
                    };
                    process::check_interrupted()?;
                    self.report.add(row);
                    self.save()
                };
                counted("cycles", "cycles/packet", IXY.1, &|| count_cycles(what, burst))?;
                counted("instructions", "instructions/packet", IXY.2, &|| {
                    if which("valgrind").is_none() {
                        bail!("valgrind is missing: cargo xtask peers");
                    }
                    count_instructions(&dir, what, burst)
                })?;
            }
        }
        Ok(())
    }
}
