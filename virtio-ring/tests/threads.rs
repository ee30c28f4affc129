#![cfg(not(loom))]
//! Both sides at once, a thread each, over real memory: chains of one to four segments that say in every word which they
//! are, in both formats, with sleep and wake-up. VIRTIO_RING_CHAINS says how many in each of the eight combinations.
//!
//! The bytes of the buffers are plain memory. The wake-ups go through `park` and `unpark`, which order nothing that a
//! race detector could see: what makes these accesses safe is the ring alone. `cargo xtask test` runs it under
//! ThreadSanitizer.

mod common;

use common::{Arena, Posting, Random, Ring, seed};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};
use virtio_ring::any::{Device, Driver, Format};
use virtio_ring::packed::{Base, Table};
use virtio_ring::{Chain, Direction, Error, Head, Options, Part, Segment, Single, Slot, Verdict};

/// More buffers than the ring has descriptors, so that it gets full.
const BUFFERS: u64 = 100;
/// Of a buffer: four segments of up to four words, and an indirect table.
const STRIDE: u64 = 256;
const TABLE: u64 = 128;

/// What one side may wait for the other in all, on whatever machine: a wake-up that was lost ends the test.
const PATIENCE: Duration = Duration::from_secs(60);

fn sleep(what: &str) {
    let start = Instant::now();
    thread::park_timeout(PATIENCE);
    assert!(start.elapsed() < PATIENCE, "no {what} came");
}

/// What every word of a segment says.
fn word(sequence: u64, segment: usize) -> u64 {
    sequence << 8 | segment as u64
}

/// # Safety
/// `ptr` is valid for `len` bytes and aligned to 8, and nobody else has them now.
unsafe fn write(ptr: *mut u8, len: u32, word: u64) {
    for i in 0..len as usize / 8 {
        // SAFETY: the contract of this function.
        unsafe { ptr.cast::<u64>().add(i).write(word) };
    }
}

/// # Safety
/// As [`write`].
unsafe fn check(ptr: *const u8, len: u32, word: u64) {
    for i in 0..len as usize / 8 {
        // SAFETY: the contract of this function.
        assert_eq!(unsafe { ptr.cast::<u64>().add(i).read() }, word);
    }
}

/// What the driver remembers of a buffer that is in flight.
#[derive(Clone, Default)]
struct Posted {
    sequence: u64,
    segments: Vec<Segment>,
    readable: usize,
}

impl Posted {
    fn new(random: &Random, sequence: u64, buffer: u64) -> Self {
        let count = if random.one_in(2) { 1 } else { 1 + random.below(4) };
        let segments = (0..count).map(|i| Segment {
            addr: Arena::START + buffer * STRIDE + i * 32,
            len: 8 * (1 + random.below(4)) as u32,
        });
        Self {
            sequence,
            segments: segments.collect(),
            readable: random.below(count + 1) as usize,
        }
    }

    fn writable(&self) -> u32 {
        self.segments[self.readable..].iter().map(|segment| segment.len).sum()
    }
}

fn drive(mut driver: Driver<Vec<Slot>>, arena: &Arena, options: Options, total: u64, peer: &Thread) -> [u64; 2] {
    let random = Random::new(seed() ^ 1);
    let at = |segment: &Segment| arena.0.at((segment.addr - Arena::START) as usize);
    let mut posted = vec![Posted::default(); BUFFERS as usize];
    let mut free: Vec<u64> = (0..BUFFERS).collect();
    let (mut next, mut done, mut kicks, mut sleeps) = (0, 0, 0, 0);
    driver.set_notify(false);
    while done < total {
        while next < total
            && let Some(&buffer) = free.last()
        {
            let chain = Posted::new(&random, next, buffer);
            for (i, segment) in chain.segments.iter().enumerate() {
                let word = if i < chain.readable { word(next, i) } else { 0 };
                // SAFETY: inside the arena; the buffer is free, and so this side's.
                unsafe { write(at(segment), segment.len, word) };
            }
            let table = Table {
                // SAFETY: inside the arena.
                ptr: unsafe { arena.0.base().add((buffer * STRIDE + TABLE) as usize) },
                addr: Arena::START + buffer * STRIDE + TABLE,
                entries: 4,
            };
            let result = if let [only] = chain.segments[..]
                && random.one_in(2)
            {
                let direction = if chain.readable == 1 {
                    Direction::Readable
                } else {
                    Direction::Writable
                };
                let added = driver.post_each(direction, [(only, buffer)]);
                if added == 1 { Ok(()) } else { Err(Error::Full) }
            } else if random.one_in(4) {
                // SAFETY: the table is part of the buffer.
                unsafe { driver.add_indirect(table, &chain.segments, chain.readable, buffer) }
            } else {
                driver.post(&chain.segments, chain.readable, buffer)
            };
            match result {
                Ok(()) => {
                    posted[buffer as usize] = chain;
                    free.pop();
                    next += 1;
                }
                Err(error) => {
                    assert_eq!(error, Error::Full);
                    break;
                }
            }
            if random.one_in(4) {
                // Seen at once, asked for later.
                driver.commit();
            }
        }
        if driver.publish() {
            kicks += 1;
            peer.unpark();
        }
        let max = 1 + random.below(40) as usize;
        let taken = driver.poll_each(max, |completion| {
            let chain = &posted[completion.cookie as usize];
            assert_eq!(completion.len, chain.writable());
            for (i, segment) in chain.segments.iter().enumerate() {
                // SAFETY: inside the arena; the buffer came back.
                unsafe { check(at(segment), segment.len, word(chain.sequence, i)) };
            }
            if options.in_order {
                assert_eq!(chain.sequence, done);
            }
            done += 1;
            free.push(completion.cookie);
        });
        if taken == 0 && done < total && !driver.set_notify(true) {
            sleeps += 1;
            sleep("call");
            driver.set_notify(false);
        }
    }
    assert_eq!((driver.in_flight(), driver.free()), (0, driver.size()));
    assert_eq!((driver.anomalies().total(), driver.is_broken()), (0, false));
    [kicks, sleeps]
}

/// Looks at a chain and fills it; returns the bytes written.
fn serve(sequence: u64, readable: &[Part], writable: &[Part]) -> u32 {
    let mut written = 0;
    for (i, part) in readable.iter().chain(writable).enumerate() {
        // SAFETY: translated; the driver gave it away, until it is pushed.
        unsafe {
            if i < readable.len() {
                check(part.ptr.as_ptr(), part.len, word(sequence, i));
            } else {
                write(part.ptr.as_ptr(), part.len, word(sequence, i));
                written += part.len;
            }
        }
    }
    written
}

fn device(mut device: Device, arena: &Arena, options: Options, stop: &AtomicBool, peer: &Thread) -> [u64; 2] {
    let random = Random::new(seed() ^ 2);
    let mut chain = Chain::new([Part::default(); 4]);
    let mut kept = VecDeque::<(Head, u32)>::new();
    let (mut next, mut calls, mut sleeps) = (0, 0, 0);
    device.set_notify(false);
    loop {
        let before = next;
        match random.below(4) {
            0 => {
                while let Some(head) = device.pop(arena, &mut chain).unwrap() {
                    assert_eq!(chain.fault(), None);
                    kept.push_back((head, serve(next, chain.readable(), chain.writable())));
                    next += 1;
                    if random.one_in(4) {
                        break;
                    }
                }
            }
            1 if kept.is_empty() => {
                let mut singles = [Single::default(); 8];
                let direction = if random.one_in(2) {
                    Direction::Readable
                } else {
                    Direction::Writable
                };
                let n = device.peek_singles(arena, direction, &mut singles);
                let singles = &mut singles[..n];
                for single in &mut *singles {
                    let part = [Part {
                        ptr: single.ptr,
                        len: single.len,
                    }];
                    single.len = match direction {
                        Direction::Readable => serve(next, &part, &[]),
                        Direction::Writable => serve(next, &[], &part),
                    };
                    next += 1;
                }
                let used = match direction {
                    Direction::Readable => device.use_read(singles),
                    Direction::Writable => device.use_written(singles),
                };
                assert_eq!(used, n);
            }
            _ => {
                let (max, mut keep) = (1 + random.below(32) as usize, !kept.is_empty());
                let popped = device.pop_each(arena, &mut chain, max, |popped| {
                    assert_eq!(popped.fault, None);
                    if random.one_in(32) {
                        return Verdict::Stop;
                    }
                    let written = serve(next, popped.readable, popped.writable);
                    next += 1;
                    // With IN_ORDER everything behind what is kept is kept as well.
                    keep = random.one_in(8) || (keep && options.in_order);
                    if keep {
                        kept.push_back((popped.head, written));
                        Verdict::Keep
                    } else {
                        Verdict::Done(written)
                    }
                });
                assert_eq!(popped, Ok((next - before) as usize));
            }
        }
        // Some of what is kept, or all of it when there is nothing else to do.
        while !kept.is_empty() && (next == before || random.one_in(2)) {
            let which = if options.in_order {
                0
            } else {
                random.below(kept.len() as u64) as usize
            };
            let (head, written) = kept.remove(which).expect("that many are kept");
            device.push(head, written);
        }
        if device.publish() {
            calls += 1;
            peer.unpark();
        }
        if next == before && !device.set_notify(true) {
            if stop.load(Ordering::Acquire) {
                break;
            }
            sleeps += 1;
            sleep("kick");
            device.set_notify(false);
        }
    }
    assert_eq!(device.outstanding(), 0);
    assert_eq!((device.anomalies().total(), device.is_broken()), (0, false));
    [calls, sleeps]
}

fn run(format: Format, size: u16) {
    let total =
        std::env::var("VIRTIO_RING_CHAINS").map_or(100_000, |n| n.parse().expect("VIRTIO_RING_CHAINS is a number"));
    for event_idx in [false, true] {
        for in_order in [false, true] {
            let options = Options {
                event_idx,
                in_order,
                indirect: true,
            };
            let (ring, arena) = (Ring::new(format, size), Arena::new((BUFFERS * STRIDE) as usize));
            let slots = vec![Slot::default(); size.into()];
            // SAFETY: the ring outlives both threads, and only the two sides of it use it.
            let driver = unsafe { Driver::new(ring.memory(), size, options, slots).unwrap() };
            let base = match format {
                Format::Split => 0,
                Format::Packed => Base::START.encode(),
            };
            // SAFETY: as above.
            let side = unsafe { Device::new(ring.memory(), size, options, base).unwrap() };
            let (arena, stop, this) = (&arena, &AtomicBool::new(false), thread::current());
            thread::scope(|scope| {
                let other = scope.spawn(move || device(side, arena, options, stop, &this));
                let driven = drive(driver, arena, options, total, other.thread());
                stop.store(true, Ordering::Release);
                other.thread().unpark();
                let served = other.join().expect("the device side");
                println!("{format:?} {options:?}: kicks, sleeps {driven:?}; calls, sleeps {served:?}");
            });
        }
    }
}

#[test]
fn split() {
    run(Format::Split, 64);
}

#[test]
fn packed() {
    run(Format::Packed, 50);
}
