//! What the driving thread of a worker does.
//!
//! It does for a packet what testpmd does: `tx` takes a fresh buffer for each, writes 42 bytes of headers, and frees
//! what was not sent; `rx` frees unread what came; `io` sends back what came untouched, and drops what does not fit. A
//! thread that has several queues serves them in turn.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use hdrhistogram::Histogram;
use usernic::{Burst, Queue};

use super::protocol::Polls;

/// Packets that are moved at a time, unless somebody says otherwise.
pub const BURST: usize = 32;

/// The bytes of Ethernet, IPv4 and UDP headers.
pub const HEADERS: usize = 42;

/// A round trip that takes longer has lost a packet.
const LOST: Duration = Duration::from_millis(20);

/// A round that takes more cycles lost its CPU meanwhile: the longest, of 256 frames of 9000 bytes, takes less.
const INTERRUPTED: u64 = 4_000_000;

/// What it is told to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// Take out and free.
    Rx,
    /// Send frames of a size.
    Tx {
        /// In bytes.
        size: usize,
    },
    /// Send back what comes.
    Io,
    /// Send `in_flight` packets on each queue, then send back what comes.
    Loop {
        /// In bytes.
        size: usize,
        /// Packets.
        in_flight: usize,
    },
    /// Send `in_flight` packets, wait for all of them, note the time, again.
    Latency {
        /// In bytes.
        size: usize,
        /// Packets.
        in_flight: usize,
    },
}

impl Load {
    /// From the words of a command.
    pub fn parse(words: &[&str]) -> Result<Self> {
        let number = |at: usize| -> Result<usize> { Ok(words.get(at).context("a number is missing")?.parse()?) };
        Ok(match words[0] {
            "rx" => Load::Rx,
            "io" => Load::Io,
            "tx" => Load::Tx { size: number(1)? },
            "loop" => Load::Loop {
                size: number(1)?,
                in_flight: number(2)?,
            },
            "latency" => Load::Latency {
                size: number(1)?,
                in_flight: number(2)?,
            },
            other => bail!("no load {other}"),
        })
    }
}

/// What the driving thread and the one that takes commands share.
pub struct Shared {
    /// Changes when there is another load, so that the driving thread looks at one word only.
    pub generation: AtomicU64,
    /// The next load, until it is taken over.
    pub load: Mutex<Option<Load>>,
    /// Round trips in nanoseconds.
    pub trips: Mutex<Histogram<u64>>,
    /// The driving thread's.
    pub meter: Meter,
}

impl Shared {
    /// The first load is to receive.
    pub fn new() -> Result<Self> {
        Ok(Shared {
            generation: AtomicU64::new(0),
            load: Mutex::new(Some(Load::Rx)),
            trips: Mutex::new(Histogram::new_with_bounds(1, 10_000_000_000, 3)?),
            meter: Meter::default(),
        })
    }

    /// Whether there is no other load yet.
    #[inline(always)]
    pub fn is(&self, generation: u64) -> bool {
        self.generation.load(Ordering::Relaxed) == generation
    }

    /// Takes loads over: `serve` gets each with its generation, and is to end when there is another.
    pub fn each_load(&self, mut serve: impl FnMut(Load, u64) -> Result<()>) -> Result<()> {
        let mut load = Load::Rx;
        let mut generation = u64::MAX;
        loop {
            let now = self.generation.load(Ordering::Acquire);
            if now != generation {
                generation = now;
                if let Some(next) = lock(&self.load).take() {
                    load = next;
                }
            }
            serve(load, generation)?;
        }
    }

    /// What the polls did, so far.
    pub fn polls(&self) -> Polls {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Polls {
            calls: get(&self.meter.calls),
            busy: get(&self.meter.busy),
            cycles: get(&self.meter.cycles),
            packets: get(&self.meter.packets),
        }
    }
}

/// Counts polls, on lines of its own; one thread writes.
#[derive(Default)]
#[repr(align(128))]
pub struct Meter {
    calls: AtomicU64,
    busy: AtomicU64,
    cycles: AtomicU64,
    packets: AtomicU64,
}

impl Meter {
    /// Rounds of `turn`, which says how many packets it moved, while `same` says so.
    #[inline(always)]
    pub fn rounds<const TIMED: bool>(
        &self,
        same: impl Fn() -> bool,
        mut turn: impl FnMut() -> Result<usize>,
    ) -> Result<()> {
        let mut last = if TIMED { cycles() } else { 0 };
        while same() {
            let packets = turn()?;
            self.poll(packets);
            if TIMED {
                let now = cycles();
                self.round(packets, now.wrapping_sub(last));
                last = now;
            }
        }
        Ok(())
    }

    #[inline(always)]
    fn poll(&self, packets: usize) {
        add(&self.calls, 1);
        if packets > 0 {
            add(&self.busy, 1);
        }
    }

    #[inline(always)]
    fn round(&self, packets: usize, cycles: u64) {
        if packets > 0 && cycles < INTERRUPTED {
            add(&self.packets, packets as u64);
            add(&self.cycles, cycles);
        }
    }
}

/// By the one writer, so that no locked instruction is needed.
#[inline(always)]
fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Ordering::Relaxed) + n, Ordering::Relaxed);
}

/// The time stamp counter where there is one, else nanoseconds.
#[inline(always)]
fn cycles() -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has the counter, and Linux lets everybody read it.
    unsafe {
        core::arch::x86_64::_rdtsc()
    }
    #[cfg(not(target_arch = "x86_64"))]
    super::worker::monotonic()
}

/// Ends with the value of a lock, also of one whose holder panicked.
pub fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ethernet, IPv4 and UDP, as a generator writes them for each packet.
pub fn headers(size: usize) -> [u8; HEADERS] {
    let mut bytes = [0u8; HEADERS];
    bytes[..12].copy_from_slice(&[2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1]);
    bytes[12..14].copy_from_slice(&0x0800u16.to_be_bytes());
    bytes[14] = 0x45;
    bytes[16..18].copy_from_slice(&(size as u16 - 14).to_be_bytes());
    bytes[22] = 64;
    bytes[23] = 17;
    bytes[26..34].copy_from_slice(&[198, 18, 0, 1, 198, 18, 0, 2]);
    bytes[34..38].copy_from_slice(&[0, 9, 0, 9]);
    bytes[38..40].copy_from_slice(&(size as u16 - 34).to_be_bytes());
    bytes
}

/// Fresh buffers with headers.
#[inline(always)]
pub fn fill(queue: &mut Queue, burst: &mut Burst, count: usize, size: usize, headers: &[u8; HEADERS]) -> Result<()> {
    queue.alloc(burst, count);
    for packet in burst.iter_mut() {
        packet.set_len(size)?;
        packet.write_at(0, headers)?;
    }
    Ok(())
}

/// The queues, and how many packets are moved at a time.
pub struct Driver {
    queues: Vec<Queue>,
    burst: Burst,
    count: usize,
}

impl Driver {
    /// Of these queues, of which there is one at least.
    pub fn new(queues: Vec<Queue>, burst: usize) -> Self {
        Driver {
            queues,
            burst: Burst::new(burst),
            count: burst,
        }
    }

    /// Does what it is told, until the process ends.
    pub fn run(mut self, shared: &Shared, timed: bool) -> Result<()> {
        shared.each_load(|load, generation| {
            let same = || shared.is(generation);
            if timed {
                self.serve::<true>(load, shared, same)
            } else {
                self.serve::<false>(load, shared, same)
            }
        })
    }

    fn serve<const TIMED: bool>(&mut self, load: Load, shared: &Shared, same: impl Fn() -> bool) -> Result<()> {
        let meter = &shared.meter;
        match load {
            Load::Rx => self.receive::<TIMED>(meter, same),
            Load::Tx { size } => self.transmit::<TIMED>(size, meter, same)?,
            Load::Io => self.reflect::<TIMED>(meter, same),
            Load::Loop { size, in_flight } => {
                self.launch(size, in_flight, &same)?;
                self.reflect::<TIMED>(meter, same);
            }
            Load::Latency { size, in_flight } => {
                round_trips(&mut self.queues[0], size, in_flight, &shared.trips, same)?
            }
        }
        Ok(())
    }

    /// Rounds of `turn`, of the queues in turn.
    #[inline(always)]
    fn rounds<const TIMED: bool>(
        &mut self,
        meter: &Meter,
        same: impl Fn() -> bool,
        mut turn: impl FnMut(&mut Queue, &mut Burst) -> Result<usize>,
    ) -> Result<()> {
        let Driver { queues, burst, .. } = self;
        let (count, mut next) = (queues.len(), 0);
        meter.rounds::<TIMED>(same, || {
            let queue = &mut queues[next];
            next += 1;
            if next == count {
                next = 0;
            }
            turn(queue, burst)
        })
    }

    fn receive<const TIMED: bool>(&mut self, meter: &Meter, same: impl Fn() -> bool) {
        let turn = |queue: &mut Queue, burst: &mut Burst| {
            let packets = queue.rx(burst);
            queue.free(burst);
            Ok(packets)
        };
        let _ = self.rounds::<TIMED>(meter, same, turn);
    }

    fn transmit<const TIMED: bool>(&mut self, size: usize, meter: &Meter, same: impl Fn() -> bool) -> Result<()> {
        let headers = headers(size);
        let count = self.count;
        self.rounds::<TIMED>(meter, same, |queue, burst| {
            fill(queue, burst, count, size, &headers)?;
            let packets = queue.tx(burst);
            queue.free(burst);
            Ok(packets)
        })
    }

    fn reflect<const TIMED: bool>(&mut self, meter: &Meter, same: impl Fn() -> bool) {
        let turn = |queue: &mut Queue, burst: &mut Burst| {
            let packets = queue.rx(burst);
            if packets > 0 {
                queue.tx(burst);
                queue.free(burst);
            }
            Ok(packets)
        };
        let _ = self.rounds::<TIMED>(meter, same, turn);
    }

    /// Sends exactly so many on each queue.
    fn launch(&mut self, size: usize, count: usize, same: impl Fn() -> bool) -> Result<()> {
        let headers = headers(size);
        let burst = &mut self.burst;
        for queue in &mut self.queues {
            let mut left = count;
            while same() && left > 0 {
                fill(queue, burst, left.min(self.count), size, &headers)?;
                left -= burst.len();
                while same() && !burst.is_empty() {
                    queue.tx(burst);
                }
            }
            queue.free(burst);
        }
        Ok(())
    }
}

fn round_trips(
    queue: &mut Queue,
    size: usize,
    in_flight: usize,
    trips: &Mutex<Histogram<u64>>,
    same: impl Fn() -> bool,
) -> Result<()> {
    let (mut out, mut back) = (Burst::new(in_flight), Burst::new(in_flight));
    let headers = headers(size);
    let mut found = Vec::with_capacity(1024);
    while same() {
        fill(queue, &mut out, in_flight, size, &headers)?;
        let wanted = out.len();
        let start = Instant::now();
        while !out.is_empty() {
            queue.tx(&mut out);
            if start.elapsed() > LOST {
                break;
            }
        }
        while back.len() < wanted {
            queue.rx(&mut back);
            if back.len() < wanted && start.elapsed() > LOST {
                break;
            }
        }
        let took = start.elapsed();
        let complete = back.len() == wanted;
        queue.free(&mut back);
        queue.free(&mut out);
        if complete && wanted == in_flight {
            found.push(took.as_nanos() as u64);
        }
        if found.len() == found.capacity() || !complete {
            let mut trips = lock(trips);
            found.drain(..).for_each(|t| trips.saturating_record(t));
        }
    }
    Ok(())
}
