//! The two CPUs of a bench: how far apart they are just now, and what no ring between them can surpass.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// A round trip of a cache line below this is the near regime, in nanoseconds: near is about 50, far about 310.
const NEAR_BELOW: f64 = 140.0;

/// A CPU that does not answer for so long will not: on a busy machine a thread may wait for seconds.
const NO_ANSWER: Duration = Duration::from_secs(10);

/// A cache line of its own, and the next one, which the adjacent-line prefetcher fetches.
#[repr(align(128))]
struct Line<T>(T);

/// How far apart the two CPUs are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, PartialOrd, Ord)]
#[serde(rename_all = "lowercase")]
pub enum Regime {
    /// A line travels there and back in some 50 ns.
    Near,
    /// It takes some 300 ns.
    Far,
}

impl std::fmt::Display for Regime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if *self == Regime::Near { "near" } else { "far" })
    }
}

/// What a probe saw.
#[derive(Clone, Copy, Debug)]
pub struct Distance {
    /// Median round trip of a cache line in nanoseconds.
    pub round_trip: f64,
    /// What that is called.
    pub regime: Regime,
}

/// The CPUs that this process may use.
pub fn allowed() -> Vec<usize> {
    let set = rustix::thread::sched_getaffinity(None).unwrap_or_default();
    (0..rustix::thread::CpuSet::MAX_CPU)
        .filter(|&cpu| set.is_set(cpu))
        .collect()
}

/// The first two of them.
pub fn two() -> Result<(usize, usize)> {
    match allowed()[..] {
        [a, b, ..] => Ok((a, b)),
        _ => bail!("a bench needs two CPUs, one for each side"),
    }
}

/// Binds the calling thread to a CPU.
pub fn pin(cpu: usize) -> Result<()> {
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    Ok(rustix::thread::sched_setaffinity(None, &set)?)
}

/// Sends a cache line to and fro between the two CPUs for `time`.
pub fn probe(cpus: (usize, usize), time: Duration) -> Result<Distance> {
    let line = Line(AtomicU64::new(0));
    let stop = Line(AtomicBool::new(false));
    let mut trips = Vec::new();
    std::thread::scope(|scope| -> Result<()> {
        let pong = scope.spawn(|| -> Result<()> {
            pin(cpus.1)?;
            let mut expected = 1;
            while !stop.0.load(Ordering::Relaxed) {
                if line.0.load(Ordering::Acquire) == expected {
                    line.0.store(expected + 1, Ordering::Release);
                    expected += 2;
                }
            }
            Ok(())
        });
        let ping = scope.spawn(|| -> Result<Vec<f64>> {
            pin(cpus.0)?;
            let start = Instant::now();
            let (mut next, mut found) = (1, Vec::new());
            while start.elapsed() < time {
                let before = Instant::now();
                for _ in 0..200 {
                    line.0.store(next, Ordering::Release);
                    while line.0.load(Ordering::Acquire) != next + 1 {
                        // The other thread may not have started, or may have no CPU.
                        if start.elapsed() > time + NO_ANSWER {
                            bail!("CPU {} does not answer CPU {}", cpus.1, cpus.0);
                        }
                    }
                    next += 2;
                }
                found.push(before.elapsed().as_nanos() as f64 / 200.0);
            }
            Ok(found)
        });
        let pinged = ping.join().expect("the probe does not panic");
        stop.0.store(true, Ordering::Relaxed);
        pong.join().expect("the probe does not panic")?;
        trips = pinged?;
        Ok(())
    })?;
    let round_trip = super::stats::median(&trips);
    let regime = if round_trip < NEAR_BELOW {
        Regime::Near
    } else {
        Regime::Far
    };
    Ok(Distance { round_trip, regime })
}

const SLOTS: usize = 1024;
const SLOT: usize = 2048;
const BATCH: usize = 32;

struct Ring {
    head: Line<AtomicU64>,
    tail: Line<AtomicU64>,
    stop: Line<AtomicBool>,
    slots: *mut u8,
}

// SAFETY: a slot belongs to the producer from when `tail` passed it until it stores `head` past it, and then to the
// consumer: Release stores and Acquire loads of the two hand it over.
unsafe impl Sync for Ring {}

/// The bare ring of one producer and one consumer: frames of `bytes` are copied in on one CPU and out on the other, in
/// batches of 32, for `time`. Millions of frames a second.
pub fn spsc(cpus: (usize, usize), bytes: usize, time: Duration) -> Result<f64> {
    assert!(bytes <= SLOT);
    // One huge page if the kernel likes.
    let layout = std::alloc::Layout::from_size_align(SLOTS * SLOT, 2 << 20)?;
    // SAFETY: the layout is not empty.
    let slots = unsafe { std::alloc::alloc_zeroed(layout) };
    if slots.is_null() {
        bail!("no memory for {} bytes", layout.size());
    }
    let ring = Ring {
        head: Line(AtomicU64::new(0)),
        tail: Line(AtomicU64::new(0)),
        stop: Line(AtomicBool::new(false)),
        slots,
    };
    let rate = std::thread::scope(|scope| -> Result<f64> {
        let ring = &ring;
        let consumer = scope.spawn(move || consume(ring, cpus.1, bytes));
        let producer = scope.spawn(move || produce(ring, cpus.0, bytes));
        std::thread::sleep(time / 4);
        // The clock first: a thread that loses its CPU in between must not make the ring faster than it is.
        let (start, from) = (Instant::now(), ring.tail.0.load(Ordering::Relaxed));
        std::thread::sleep(time);
        let (to, took) = (ring.tail.0.load(Ordering::Relaxed), start.elapsed());
        ring.stop.0.store(true, Ordering::Relaxed);
        producer.join().expect("the producer does not panic")?;
        consumer.join().expect("the consumer does not panic")?;
        Ok((to - from) as f64 / took.as_secs_f64() / 1e6)
    });
    // SAFETY: allocated above by this layout; both threads are gone.
    unsafe { std::alloc::dealloc(slots, layout) };
    rate
}

fn slot(ring: &Ring, index: u64) -> *mut u8 {
    // SAFETY: the index is taken modulo the number of slots.
    unsafe { ring.slots.add(index as usize % SLOTS * SLOT) }
}

fn produce(ring: &Ring, cpu: usize, bytes: usize) -> Result<()> {
    pin(cpu)?;
    let source = vec![[7u8; SLOT]; BATCH];
    let (mut head, mut tail) = (0u64, 0u64);
    while !ring.stop.0.load(Ordering::Relaxed) {
        if head + BATCH as u64 - tail > SLOTS as u64 {
            tail = ring.tail.0.load(Ordering::Acquire);
            spin_loop();
            continue;
        }
        for frame in &source {
            // SAFETY: the slot is the producer's (see Ring), and holds `bytes`.
            unsafe { std::ptr::copy_nonoverlapping(frame.as_ptr(), slot(ring, head), bytes) };
            head += 1;
        }
        ring.head.0.store(head, Ordering::Release);
    }
    Ok(())
}

fn consume(ring: &Ring, cpu: usize, bytes: usize) -> Result<()> {
    pin(cpu)?;
    let mut sink = vec![[0u8; SLOT]; BATCH];
    let mut tail = 0u64;
    while !ring.stop.0.load(Ordering::Relaxed) {
        let ready = ring.head.0.load(Ordering::Acquire) - tail;
        if ready == 0 {
            spin_loop();
            continue;
        }
        let n = ready.min(BATCH as u64);
        for frame in sink.iter_mut().take(n as usize) {
            // SAFETY: the slot is the consumer's (see Ring), and holds `bytes`.
            unsafe { std::ptr::copy_nonoverlapping(slot(ring, tail), frame.as_mut_ptr(), bytes) };
            tail += 1;
        }
        std::hint::black_box(&mut sink);
        ring.tail.0.store(tail, Ordering::Release);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_yardsticks_measure_something() {
        let Ok(cpus) = two() else {
            eprintln!("SKIPPED both_yardsticks_measure_something: one CPU");
            return;
        };
        let distance = probe(cpus, Duration::from_millis(5)).unwrap();
        assert!(distance.round_trip > 5.0, "{distance:?}");
        // On a busy machine a short window may see nothing.
        assert!((0..200).any(|_| spsc(cpus, 64, Duration::from_millis(20)).unwrap() > 0.0));
    }
}
