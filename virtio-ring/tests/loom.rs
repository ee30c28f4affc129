//! The protocol under every interleaving and every reordering that the memory model allows:
//! `RUSTFLAGS="--cfg loom" cargo test -p virtio-ring --release --test loom`
//!
//! Both sides run the real code; only the cells are loom's (`shared.rs`).
#![cfg(loom)]

use loom::sync::atomic::{AtomicBool, Ordering};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;
use std::ptr::NonNull;
use virtio_ring::split::{Device, Driver, Memory, Options, Verdict};
use virtio_ring::{Chain, Completion, Direction, Part, Segment, Slot, Translate};

/// Device addresses are taken as they are; nothing is behind them.
struct Nothing;

// SAFETY: the models never follow a pointer.
unsafe impl Translate for Nothing {
    fn translate(&self, addr: u64, _len: u32) -> Option<NonNull<u8>> {
        NonNull::new(addr as *mut u8)
    }
}

fn pair(size: u16, options: Options) -> (Driver<Vec<Slot>>, Device) {
    let memory = Memory::new(size);
    // SAFETY: a model has no raw memory.
    let driver = unsafe { Driver::new(memory.clone(), size, options, vec![Slot::default(); size.into()]).unwrap() };
    // SAFETY: as above.
    let device = unsafe { Device::new(memory, size, options, 0).unwrap() };
    (driver, device)
}

fn every_option(model: fn(Options)) {
    for event_idx in [false, true] {
        for in_order in [false, true] {
            let mut builder = loom::model::Builder::new();
            // Enough for every bug of this kind that was ever put in here; without it the larger models take hours.
            builder.preemption_bound = Some(3);
            builder.check(move || {
                model(Options {
                    event_idx,
                    in_order,
                    indirect: false,
                })
            });
        }
    }
}

/// An eventfd: a wake-up is kept until somebody takes it.
#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    ring: Condvar,
}

impl Bell {
    fn ring(&self) {
        *self.rung.lock().unwrap() = true;
        self.ring.notify_one();
    }

    fn wait(&self) {
        let mut rung = self.rung.lock().unwrap();
        while !*rung {
            rung = self.ring.wait(rung).unwrap();
        }
        *rung = false;
    }
}

/// What is behind an index is complete when the index is seen: descriptors and heads one way, elements the other.
#[test]
fn what_is_published_is_complete() {
    every_option(|options| {
        let (mut driver, mut device) = pair(2, options);
        let device = thread::spawn(move || {
            let mut chain = Chain::new([Part::default(); 2]);
            let mut seen = 0u64;
            for _ in 0..2 {
                device
                    .pop_each(&Nothing, &mut chain, 2, |popped| {
                        assert_eq!(popped.fault, None);
                        let part = popped.writable[0];
                        assert_eq!(
                            (part.ptr.as_ptr() as u64, u64::from(part.len)),
                            (0x1000 + seen, 10 + seen)
                        );
                        seen += 1;
                        Verdict::Done(seen as u32)
                    })
                    .unwrap();
                device.commit();
                thread::yield_now();
            }
            assert_eq!(device.anomalies().total(), 0);
        });
        let segment = |i: u64| Segment {
            addr: 0x1000 + i,
            len: 10 + i as u32,
        };
        let mut seen = vec![];
        driver.add_each(Direction::Writable, [(segment(0), 0)]);
        driver.commit();
        driver.add_each(Direction::Writable, [(segment(1), 1)]);
        driver.commit();
        driver.poll_each(2, |completion| seen.push(completion));
        device.join().unwrap();
        driver.poll_each(2, |completion| seen.push(completion));
        driver.poll_each(2, |completion| seen.push(completion));
        let expected: Vec<_> = (0..seen.len() as u64)
            .map(|i| Completion {
                cookie: i,
                len: i as u32 + 1,
            })
            .collect();
        assert_eq!(seen, expected);
        assert_eq!(driver.anomalies().total(), 0);
    });
}

/// The device sleeps only when nothing is there, and is woken for what comes then. Loom reports a deadlock if a kick is
/// lost: without the fence in `needs_kick` or the one in `set_notify` it does.
#[test]
fn no_kick_is_lost() {
    every_option(|options| {
        let (mut driver, mut device) = pair(2, options);
        let bell = Arc::new(Bell::default());
        let device = thread::spawn({
            let bell = bell.clone();
            move || {
                let mut chain = Chain::new([Part::default(); 1]);
                let mut seen = 0;
                device.set_notify(false);
                while seen < 2 {
                    seen += device.pop_each(&Nothing, &mut chain, 2, |_| Verdict::Done(0)).unwrap();
                    device.commit();
                    if seen < 2 && !device.set_notify(true) {
                        bell.wait();
                        device.set_notify(false);
                    }
                }
            }
        });
        for i in 0..2 {
            driver.add_each(Direction::Readable, [(Segment { addr: 0x1000, len: 1 }, i)]);
            if driver.publish() {
                bell.ring();
            }
        }
        device.join().unwrap();
    });
}

/// The same the other way round.
#[test]
fn no_call_is_lost() {
    every_option(|options| {
        let (mut driver, mut device) = pair(2, options);
        let bell = Arc::new(Bell::default());
        driver.add_each(
            Direction::Writable,
            (0..2).map(|i| (Segment { addr: 0x1000, len: 1 }, i)),
        );
        driver.commit();
        let device = thread::spawn({
            let bell = bell.clone();
            move || {
                let mut chain = Chain::new([Part::default(); 1]);
                for _ in 0..2 {
                    assert_eq!(device.pop_each(&Nothing, &mut chain, 1, |_| Verdict::Done(1)), Ok(1));
                    if device.publish() {
                        bell.ring();
                    }
                }
            }
        });
        let mut seen = 0;
        driver.set_notify(false);
        while seen < 2 {
            seen += driver.poll_each(2, |_| ());
            if seen < 2 && !driver.set_notify(true) {
                bell.wait();
                driver.set_notify(false);
            }
        }
        device.join().unwrap();
    });
}

/// A descriptor is used again only when its chain came back: the device never sees the next content under the old head.
#[test]
fn descriptors_are_not_reused_early() {
    every_option(|options| {
        let (mut driver, mut device) = pair(2, options);
        let stop = Arc::new(AtomicBool::new(false));
        driver.add_each(
            Direction::Readable,
            (0..2u64).map(|i| {
                (
                    Segment {
                        addr: 0x1000 + i,
                        len: 1,
                    },
                    i,
                )
            }),
        );
        driver.commit();
        let device = thread::spawn({
            let stop = stop.clone();
            move || {
                let mut chain = Chain::new([Part::default(); 1]);
                let mut next = 0;
                for _ in 0..3 {
                    device
                        .pop_each(&Nothing, &mut chain, 1, |popped| {
                            assert_eq!(popped.readable[0].ptr.as_ptr() as u64, 0x1000 + next);
                            next += 1;
                            Verdict::Done(0)
                        })
                        .unwrap();
                    device.commit();
                }
                stop.store(true, Ordering::Release);
            }
        });
        let mut next = 2;
        let free = driver.poll_each(2, |_| ()) as u64;
        next += driver.add_each(
            Direction::Readable,
            (next..next + free).map(|i| {
                (
                    Segment {
                        addr: 0x1000 + i,
                        len: 1,
                    },
                    i,
                )
            }),
        ) as u64;
        driver.commit();
        device.join().unwrap();
        assert!(stop.load(Ordering::Acquire));
        assert_eq!((next, driver.anomalies().total()), (2 + free, 0));
    });
}
