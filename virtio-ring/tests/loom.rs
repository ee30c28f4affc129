//! The protocol under every interleaving and every reordering that the memory model allows:
//! `RUSTFLAGS="--cfg loom" cargo test -p virtio-ring --release --test loom`
//!
//! Both sides run the real code; only the cells are loom's (`shared.rs`).
#![cfg(loom)]

use loom::cell::UnsafeCell;
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;
use std::ptr::NonNull;
use virtio_ring::any::{Device, Driver, Format, Memory};
use virtio_ring::{Chain, Completion, Direction, Error, Options, Part, Popped, Segment, Slot, Translate, Verdict};

/// Device addresses are taken as they are; nothing is behind them.
struct Nothing;

// SAFETY: the models never follow a pointer.
unsafe impl Translate for Nothing {
    fn translate(&self, addr: u64, _len: u32) -> Option<NonNull<u8>> {
        NonNull::new(addr as *mut u8)
    }
}

fn pair(format: Format, size: u16, options: Options) -> (Driver<Vec<Slot>>, Device) {
    let (driver, device, _) = pair_in(format, size, options);
    (driver, device)
}

fn pair_in(format: Format, size: u16, options: Options) -> (Driver<Vec<Slot>>, Device, Memory) {
    let memory = Memory::new(format, size);
    // SAFETY: a model has no raw memory.
    let driver = unsafe { Driver::new(memory.clone(), size, options, vec![Slot::default(); size.into()]).unwrap() };
    // SAFETY: as above.
    let device = unsafe { Device::new(memory.clone(), size, options, format.start_base()).unwrap() };
    (driver, device, memory)
}

fn post_each(
    driver: &mut Driver<Vec<Slot>>,
    direction: Direction,
    buffers: impl IntoIterator<Item = (Segment, u64)>,
) -> usize {
    // SAFETY: nothing is behind the addresses.
    unsafe { driver.add_each(direction, buffers) }
}

fn post(driver: &mut Driver<Vec<Slot>>, chain: &[Segment], readable: usize, cookie: u64) -> Result<(), Error> {
    // SAFETY: as above.
    unsafe { driver.add(chain, readable, cookie) }
}

/// A buffer by its number, which is in both of its fields.
fn segment(number: u64) -> Segment {
    Segment {
        addr: 0x1000 + number,
        len: 10 + number as u32,
    }
}

fn number(part: &Part) -> u64 {
    let number = part.ptr.as_ptr() as u64 - 0x1000;
    assert_eq!(u64::from(part.len), 10 + number);
    number
}

fn every_option(format: Format, model: fn(Format, Options)) {
    for event_idx in [false, true] {
        for in_order in [false, true] {
            let mut builder = loom::model::Builder::new();
            // Enough for every bug of this kind that was ever put in here; without it the larger models take hours.
            builder.preemption_bound = Some(3);
            builder.check(move || {
                let options = Options {
                    event_idx,
                    in_order,
                    indirect: false,
                };
                model(format, options);
            });
        }
    }
}

/// Each model once a format.
macro_rules! models {
    ($($name:ident),*) => {
        mod split {
            $(#[test]
            fn $name() {
                super::every_option(super::Format::Split, super::$name);
            })*
        }
        mod packed {
            $(#[test]
            fn $name() {
                super::every_option(super::Format::Packed, super::$name);
            })*
        }
    };
}

models!(
    what_is_published_is_complete,
    a_chain_is_seen_whole,
    a_buffer_has_one_owner,
    no_kick_is_lost,
    no_call_is_lost,
    no_kick_is_lost_at_a_take_over,
    no_call_is_lost_at_a_take_over,
    descriptors_are_not_reused_early
);

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

/// What was published is complete when it is seen: descriptors and heads one way, used elements or descriptors the other.
fn what_is_published_is_complete(format: Format, options: Options) {
    let (mut driver, mut device) = pair(format, 2, options);
    let device = thread::spawn(move || {
        let mut chain = Chain::new([Part::default(); 2]);
        let mut seen = 0u64;
        for _ in 0..2 {
            device
                .pop_each(&Nothing, &mut chain, 2, |popped| {
                    assert_eq!((popped.fault, popped.readable.len()), (None, 0));
                    assert_eq!(number(&popped.writable[0]), seen);
                    seen += 1;
                    Verdict::Done(seen as u32)
                })
                .unwrap();
            device.commit();
            thread::yield_now();
        }
        assert_eq!(device.anomalies().total(), 0);
    });
    let mut seen = vec![];
    post_each(&mut driver, Direction::Writable, [(segment(0), 0)]);
    driver.commit();
    post_each(&mut driver, Direction::Writable, [(segment(1), 1)]);
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
}

/// Never a part of a chain, nor of a burst that was published at once; and one burst of completions back.
fn a_chain_is_seen_whole(format: Format, options: Options) {
    let (mut driver, mut device) = pair(format, 3 + u16::from(format == Format::Split), options);
    let device = thread::spawn(move || {
        let mut chain = Chain::new([Part::default(); 2]);
        let mut seen = 0;
        for _ in 0..2 {
            let check = |popped: Popped<'_>| {
                assert_eq!(popped.fault, None);
                let [readable, writable] = [popped.readable, popped.writable].map(|parts| parts.first().map(number));
                assert_eq!((readable, writable), [(Some(0), Some(1)), (None, Some(2))][seen]);
                seen += 1;
                Verdict::Done(seen as u32)
            };
            device.pop_each(&Nothing, &mut chain, 9, check).unwrap();
            // All or nothing.
            assert!(seen == 0 || seen == 2);
            device.commit();
        }
        seen
    });
    post(&mut driver, &[segment(0), segment(1)], 1, 0).unwrap();
    post(&mut driver, &[segment(2)], 0, 1).unwrap();
    driver.commit();
    let mut seen = vec![];
    for _ in 0..2 {
        driver.poll_each(9, |completion| seen.push((completion.cookie, completion.len)));
        assert!(seen.is_empty() || seen == [(0, 1), (1, 2)]);
    }
    let popped = device.join().unwrap();
    driver.poll_each(9, |completion| seen.push((completion.cookie, completion.len)));
    assert_eq!(seen, [(0, 1), (1, 2)][..popped]);
    assert_eq!((driver.anomalies().total(), driver.is_broken()), (0, false));
}

/// The bytes of a buffer: loom sees every access that the ring does not put in order.
struct Bytes([UnsafeCell<u64>; 2]);

// SAFETY: loom checks what this promises: that is what the model is for.
unsafe impl Sync for Bytes {}

impl Bytes {
    fn add(&self, number: u64, change: u64) -> u64 {
        self.0[number as usize].with_mut(|value| {
            // SAFETY: loom stops where anybody else may be in here.
            unsafe {
                *value += change;
                *value
            }
        })
    }
}

/// The driver writes bytes and posts them, the device changes them and gives them back, the driver posts them again.
fn a_buffer_has_one_owner(format: Format, options: Options) {
    let (mut driver, mut device) = pair(format, 2, options);
    let bytes = Arc::new(Bytes([UnsafeCell::new(0), UnsafeCell::new(0)]));
    let device = thread::spawn({
        let bytes = bytes.clone();
        move || {
            let mut chain = Chain::new([Part::default(); 1]);
            for _ in 0..3 {
                device
                    .pop_each(&Nothing, &mut chain, 2, |popped| {
                        let value = bytes.add(number(&popped.writable[0]), 0x10);
                        assert_eq!(value & 0xf, value >> 4);
                        Verdict::Done((value >> 4) as u32)
                    })
                    .unwrap();
                device.commit();
            }
        }
    });
    for number in 0..2 {
        assert_eq!(bytes.add(number, 1), 1);
        post_each(&mut driver, Direction::Writable, [(segment(number), number)]);
    }
    driver.commit();
    for _ in 0..2 {
        let mut back = vec![];
        driver.poll_each(2, |completion| back.push(completion));
        for Completion { cookie, len } in back {
            let value = bytes.add(cookie, 1);
            assert_eq!((u64::from(len), value & 0xf), (value >> 4, (value >> 4) + 1));
            post_each(&mut driver, Direction::Writable, [(segment(cookie), cookie)]);
        }
        driver.commit();
    }
    device.join().unwrap();
    assert_eq!((driver.anomalies().total(), driver.in_flight()), (0, 2));
}

/// The device sleeps only when nothing is there, and is woken for what comes then. Loom reports a deadlock if a kick is
/// lost: without the fence in `needs_kick` or the one in `set_notify` it does.
fn no_kick_is_lost(format: Format, options: Options) {
    let (mut driver, mut device) = pair(format, 2, options);
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
        post_each(&mut driver, Direction::Readable, [(segment(i), i)]);
        if driver.publish() {
            bell.ring();
        }
    }
    device.join().unwrap();
}

/// The same the other way round.
fn no_call_is_lost(format: Format, options: Options) {
    let (mut driver, mut device) = pair(format, 2, options);
    let bell = Arc::new(Bell::default());
    post_each(&mut driver, Direction::Writable, (0..2).map(|i| (segment(i), i)));
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
}

/// A device that polled is lost while the driver adds. The next one sleeps if it finds nothing.
fn no_kick_is_lost_at_a_take_over(format: Format, options: Options) {
    let (mut driver, mut device, memory) = pair_in(format, 2, options);
    let bell = Arc::new(Bell::default());
    device.set_notify(false);
    let device = thread::spawn({
        let bell = bell.clone();
        move || {
            let base = device.base();
            drop(device);
            // SAFETY: a model has no raw memory.
            let mut device = unsafe { Device::new(memory, 2, options, base).unwrap() };
            if !device.has_available() {
                bell.wait();
            }
            let mut chain = Chain::new([Part::default(); 1]);
            assert_eq!(device.pop_each(&Nothing, &mut chain, 1, |_| Verdict::Done(0)), Ok(1));
        }
    });
    post_each(&mut driver, Direction::Readable, [(segment(0), 0)]);
    if driver.publish() {
        bell.ring();
    }
    device.join().unwrap();
}

/// A device is lost between using a buffer and saying so, while the driver goes to sleep.
fn no_call_is_lost_at_a_take_over(format: Format, options: Options) {
    let (mut driver, mut device, memory) = pair_in(format, 2, options);
    let bell = Arc::new(Bell::default());
    post_each(&mut driver, Direction::Writable, [(segment(0), 0)]);
    driver.commit();
    let device = thread::spawn({
        let bell = bell.clone();
        move || {
            let mut chain = Chain::new([Part::default(); 1]);
            assert_eq!(device.pop_each(&Nothing, &mut chain, 1, |_| Verdict::Done(1)), Ok(1));
            device.commit();
            let base = device.base();
            drop(device);
            // SAFETY: as above.
            let mut device = unsafe { Device::new(memory, 2, options, base).unwrap() };
            if device.needs_call() {
                bell.ring();
            }
        }
    });
    driver.set_notify(false);
    let mut seen = 0;
    while seen < 1 {
        seen += driver.poll_each(1, |_| ());
        if seen < 1 && !driver.set_notify(true) {
            bell.wait();
            driver.set_notify(false);
        }
    }
    device.join().unwrap();
}

/// A descriptor is used again only when its chain came back: the device never sees the next content under the old head.
fn descriptors_are_not_reused_early(format: Format, options: Options) {
    let (mut driver, mut device) = pair(format, 2, options);
    post_each(&mut driver, Direction::Readable, (0..2).map(|i| (segment(i), i)));
    driver.commit();
    let device = thread::spawn(move || {
        let mut chain = Chain::new([Part::default(); 1]);
        let mut next = 0;
        for _ in 0..3 {
            device
                .pop_each(&Nothing, &mut chain, 1, |popped| {
                    assert_eq!(number(&popped.readable[0]), next);
                    next += 1;
                    Verdict::Done(0)
                })
                .unwrap();
            device.commit();
        }
        assert_eq!(device.anomalies().total(), 0);
    });
    let mut next = 2;
    let free = driver.poll_each(2, |_| ()) as u64;
    next += post_each(
        &mut driver,
        Direction::Readable,
        (next..next + free).map(|i| (segment(i), i)),
    ) as u64;
    driver.commit();
    device.join().unwrap();
    assert_eq!((next, driver.anomalies().total()), (2 + free, 0));
}
