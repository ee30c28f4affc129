#![cfg(not(loom))]
//! A packed ring whose device side is lost at any moment, and another one that goes on where the ring says.

mod common;

use std::collections::VecDeque;

use common::{Arena, Posting, Random, Ring, seed};
use virtio_ring::any::{self, Driver, Format};
use virtio_ring::packed::{Base, Device, Memory, recover};
use virtio_ring::{Chain, Direction, Error, Head, Options, Part, Segment, Slot, Verdict};

fn memory(ring: &Ring) -> Memory {
    match ring.memory() {
        any::Memory::Packed(memory) => memory,
        any::Memory::Split(_) => unreachable!("the ring is packed"),
    }
}

/// What a device side does between its start and its end, against a model.
struct World {
    ring: Ring,
    arena: Arena,
    size: u16,
    options: Options,
    driver: Driver<Vec<Slot>>,
    device: Device,
    next: u64,
    /// Cookies and lengths in descriptors: added and not popped, popped and not pushed, pushed and not published.
    added: VecDeque<(u64, u16)>,
    popped: VecDeque<(Head, (u64, u16))>,
    pushed: Vec<(u64, u16)>,
    /// Published and not taken: cookies, and the lengths that they come with.
    done: VecDeque<(u64, u32)>,
}

impl World {
    fn new(size: u16) -> Self {
        let ring = Ring::new(Format::Packed, size);
        let options = Options::default();
        let slots = vec![Slot::default(); size.into()];
        // SAFETY: the ring lives as long as the world, and only atomics touch it.
        let driver = unsafe { Driver::new(ring.memory(), size, options, slots).unwrap() };
        // SAFETY: as above.
        let device = unsafe { Device::new(memory(&ring), size, options, Base::START).unwrap() };
        Self {
            arena: Arena::new(1 << 12),
            size,
            options,
            driver,
            device,
            next: 0,
            added: VecDeque::new(),
            popped: VecDeque::new(),
            pushed: Vec::new(),
            done: VecDeque::new(),
            ring,
        }
    }

    fn add(&mut self, count: u16) {
        let segment = Segment {
            addr: Arena::START,
            len: 64,
        };
        let chain = vec![segment; count.into()];
        if self.driver.post(&chain, 0, self.next).is_ok() {
            self.added.push_back((self.next, count));
            self.next += 1;
        }
        self.driver.publish();
    }

    fn pop(&mut self) {
        let mut chain = Chain::new(vec![Part::default(); self.size.into()]);
        let head = self.device.pop(&self.arena, &mut chain).unwrap();
        assert_eq!(head.is_some(), !self.added.is_empty());
        if let (Some(head), Some((cookie, count))) = (head, self.added.pop_front()) {
            assert_eq!(chain.writable().len(), count.into());
            self.popped.push_back((head, (cookie, count)));
        }
    }

    /// As a burst does it: what is popped is pushed at once.
    fn burst(&mut self, max: usize) {
        if !self.popped.is_empty() {
            return;
        }
        let mut chain = Chain::new(vec![Part::default(); self.size.into()]);
        let n = self
            .device
            .pop_each(&self.arena, &mut chain, max, |_| Verdict::Done(7))
            .unwrap();
        assert_eq!(n, max.min(self.added.len()));
        self.pushed.extend(self.added.drain(..n));
    }

    fn push(&mut self) {
        if let Some((head, chain)) = self.popped.pop_front() {
            self.device.push(head, 7);
            self.pushed.push(chain);
        }
    }

    fn publish(&mut self) {
        self.device.publish();
        self.done.extend(self.pushed.drain(..).map(|(cookie, _)| (cookie, 7)));
    }

    fn poll(&mut self) {
        let done = &mut self.done;
        self.driver.poll_each(usize::MAX, |completion| {
            assert_eq!(Some((completion.cookie, completion.len)), done.pop_front());
        });
        assert!(self.done.is_empty());
    }

    /// The device side is gone, and another one begins.
    fn lose(&mut self) {
        // A lone descriptor that was held back left no trace. All else that was pushed did: the driver gets it back empty.
        match self.pushed[..] {
            [(cookie, 1)] => self.added.push_front((cookie, 1)),
            _ => self.done.extend(self.pushed.iter().map(|(cookie, _)| (*cookie, 0))),
        }
        let lone = matches!(self.pushed[..], [(_, 1)]);
        let again: Vec<_> = self.popped.drain(..).map(|(_, chain)| chain).collect();
        for (place, chain) in again.into_iter().enumerate() {
            self.added.insert(place + usize::from(lone), chain);
        }
        self.pushed.clear();
        // SAFETY: the ring lives as long as the world; the device before this one is not used any more.
        let base = unsafe { recover(memory(&self.ring), self.size, self.options) };
        let base = base.expect("a ring that a device of this crate left");
        // SAFETY: as above.
        self.device = unsafe { Device::new(memory(&self.ring), self.size, self.options, base).unwrap() };
    }
}

#[test]
fn whenever_a_device_side_is_lost_the_next_one_goes_on() {
    let random = Random::new(seed());
    for round in 0..3000u64 {
        let size = [2, 3, 4, 7, 8, 16][random.below(6) as usize];
        let singles = random.one_in(2);
        let mut world = World::new(size);
        for _ in 0..random.below(200) {
            match random.below(16) {
                0..4 => world.add(if singles { 1 } else { 1 + random.below(3) as u16 }),
                4..7 => world.pop(),
                7..9 => world.push(),
                9..11 => world.burst(random.below(8) as usize),
                11..13 => world.publish(),
                13..15 => world.poll(),
                _ => world.lose(),
            }
        }
        // All comes back, and the driver saw nothing odd.
        world.lose();
        for _ in 0..world.added.len() {
            world.pop();
            world.push();
        }
        world.publish();
        world.poll();
        assert_eq!(world.driver.in_flight(), 0, "round {round}");
        assert_eq!(world.driver.anomalies().total(), 0, "round {round}");
        assert!(!world.driver.is_broken());
    }
}

#[test]
fn a_new_ring_begins_at_the_start() {
    for size in [2, 256, 1000] {
        let world = World::new(size);
        // SAFETY: the ring lives as long as the world, whose device is not used.
        let base = unsafe { recover(memory(&world.ring), size, world.options) };
        assert_eq!(base, Ok(Base::START));
    }
}

#[test]
fn a_ring_that_nobody_left_so_gives_no_base() {
    let world = World::new(4);
    // Available, available, used, available: of one lap.
    for (slot, flags) in [0x0080u16, 0x0080, 0x8080, 0x0080].into_iter().enumerate() {
        world
            .ring
            .block
            .u16(slot * 16 + 14)
            .store(flags, std::sync::atomic::Ordering::SeqCst);
    }
    // SAFETY: as above.
    let base = unsafe { recover(memory(&world.ring), 4, world.options) };
    assert_eq!(base, Err(Error::NoBase));
}

#[test]
fn whatever_is_in_the_ring_a_base_is_one_that_a_device_takes() {
    let random = Random::new(seed());
    let mut bases = 0;
    for _ in 0..20_000 {
        let size = 2 + random.below(6) as u16;
        let world = World::new(size);
        for slot in 0..usize::from(size) {
            world
                .ring
                .block
                .u64(slot * 16 + 8)
                .store(random.next(), std::sync::atomic::Ordering::SeqCst);
        }
        // SAFETY: the ring lives as long as the world, whose device is not used any more.
        if let Ok(base) = unsafe { recover(memory(&world.ring), size, world.options) } {
            // SAFETY: as above.
            unsafe { Device::new(memory(&world.ring), size, Options::default(), base) }.unwrap();
            bases += 1;
        }
    }
    assert!(bases > 0);
}

/// With IN_ORDER a used descriptor stands for several chains, so that a base cannot be told; but a ring in use is not taken
/// for a new one, whose stale descriptors a device would use once more.
#[test]
fn an_in_order_ring_is_at_the_start_or_nowhere() {
    let options = Options {
        in_order: true,
        ..Options::default()
    };
    let (mut at_start, mut elsewhere) = (0, 0);
    for size in 2..=6u16 {
        for before in 0..=4 * size {
            for after in 0..=size {
                let ring = Ring::new(Format::Packed, size);
                let slots = vec![Slot::default(); size.into()];
                // SAFETY: the ring lives on, and only atomics touch it.
                let mut driver = unsafe { Driver::new(ring.memory(), size, options, slots).unwrap() };
                // SAFETY: as above.
                let mut device = unsafe { Device::new(memory(&ring), size, options, Base::START).unwrap() };
                let arena = Arena::new(1 << 12);
                let mut chain = Chain::new([Part::default(); 1]);
                let segment = Segment {
                    addr: Arena::START,
                    len: 64,
                };
                let mut left = before;
                while left > 0 {
                    // Batches of two, of which one descriptor is marked.
                    let n = left.min(2);
                    driver.post_each(Direction::Readable, vec![(segment, 0); n.into()]);
                    driver.publish();
                    device.pop_each(&arena, &mut chain, 2, |_| Verdict::Done(0)).unwrap();
                    device.publish();
                    assert_eq!(driver.poll_each(2, |_| {}), n.into());
                    left -= n;
                }
                driver.post_each(Direction::Readable, vec![(segment, 0); after.into()]);
                driver.publish();
                let truly = device.base();
                let _ = device;
                // SAFETY: as above; no device is on the ring.
                let found = unsafe { recover(memory(&ring), size, options) };
                if truly == Base::START {
                    assert_eq!(found, Ok(Base::START), "{size}: {before}, {after}");
                    at_start += 1;
                } else {
                    // A driver that is in a lap that a device could begin in hides that the device is in the one before.
                    let hidden = before / size % 2 == 1 && (before + after) / size > before / size;
                    assert!(
                        hidden || found == Err(Error::NoBase),
                        "{size}: {before}, {after}: {found:?}"
                    );
                    elsewhere += u32::from(found.is_err());
                }
            }
        }
    }
    assert!(at_start > 50 && elsewhere > 200, "{at_start} {elsewhere}");
}
