#![cfg(not(loom))]
//! A side that takes a ring over knows nothing of what the one before it owed: it begins by wanting to be notified, and
//! its first decision is to notify.

mod common;

use common::{Arena, Posting, Ring};
use virtio_ring::any::{self, Device, Driver, Format};
use virtio_ring::{Chain, Part, packed};
use virtio_ring::{Direction, Options, Segment, Slot, Verdict};

const SIZE: u16 = 8;

struct World {
    ring: Ring,
    options: Options,
    arena: Arena,
    driver: Driver<Vec<Slot>>,
}

impl World {
    fn all() -> impl Iterator<Item = Self> {
        [Format::Split, Format::Packed].into_iter().flat_map(|format| {
            [false, true].map(|event_idx| {
                let options = Options {
                    event_idx,
                    ..Options::default()
                };
                let ring = Ring::new(format, SIZE);
                // SAFETY: the ring lives as long as the world, and only atomics touch it.
                let driver = unsafe { Driver::new(ring.memory(), SIZE, options, vec![Slot::default(); 8]) };
                Self {
                    driver: driver.unwrap(),
                    options,
                    arena: Arena::new(1 << 12),
                    ring,
                }
            })
        })
    }

    /// A device side, where the ring says that it begins.
    fn device(&self) -> Device {
        let base = match self.ring.memory() {
            // SAFETY: the ring lives as long as the world; no device is on it.
            any::Memory::Packed(memory) => unsafe { packed::recover(memory, SIZE, self.options).unwrap().encode() },
            // SAFETY: as above.
            any::Memory::Split(memory) => unsafe { memory.used_index() }.into(),
        };
        // SAFETY: as above.
        unsafe { Device::new(self.ring.memory(), SIZE, self.options, base).unwrap() }
    }

    fn add(&mut self) -> bool {
        let segment = Segment {
            addr: Arena::START,
            len: 64,
        };
        assert_eq!(self.driver.post_each(Direction::Readable, [(segment, 0)]), 1);
        self.driver.publish()
    }

    /// The device uses all there is, and does not say so.
    fn use_all(&self, device: &mut Device) -> usize {
        let mut chain = Chain::new(vec![Part::default(); 8]);
        let n = device
            .pop_each(&self.arena, &mut chain, 8, |_| Verdict::Done(0))
            .unwrap();
        device.commit();
        n
    }
}

#[test]
fn a_device_that_takes_over_is_kicked_though_its_predecessor_polled() {
    for mut world in World::all() {
        for round in 0..20 {
            let mut device = world.device();
            device.set_notify(false);
            for _ in 0..round % 3 {
                world.add();
                world.use_all(&mut device);
                world.driver.poll_each(8, |_| {});
            }
            let _ = device;
            let mut device = world.device();
            // It finds nothing, and sleeps.
            assert!(!device.has_available());
            assert!(world.add(), "{:?}, round {round}", world.options);
            assert_eq!(world.use_all(&mut device), 1);
            world.driver.poll_each(8, |_| {});
        }
    }
}

#[test]
fn what_a_lost_device_used_and_did_not_tell_its_successor_tells() {
    for mut world in World::all() {
        for round in 0..20 {
            let mut device = world.device();
            device.needs_call();
            for _ in 0..=round % 3 {
                world.add();
            }
            // The driver sleeps until something is used, and the device is lost between using it and saying so.
            assert!(!world.driver.set_notify(true));
            assert!(world.use_all(&mut device) > 0);
            let _ = device;
            let mut device = world.device();
            assert!(device.needs_call(), "{:?}, round {round}", world.options);
            assert!(!device.needs_call(), "once is enough");
            world.driver.poll_each(8, |_| {});
        }
    }
}

#[test]
fn the_first_call_after_a_take_over_is_not_lost_among_those_that_are_suppressed() {
    for mut world in World::all() {
        let mut device = world.device();
        world.add();
        world.add();
        assert!(!world.driver.set_notify(true));
        assert_eq!(world.use_all(&mut device), 2);
        let _ = device;
        // The successor first uses something itself: what the driver waits for lies further back.
        let mut device = world.device();
        world.add();
        assert_eq!(world.use_all(&mut device), 1);
        assert!(device.needs_call(), "{:?}", world.options);
    }
}

#[test]
fn a_driver_that_takes_over_kicks_first() {
    for world in World::all() {
        let device = world.device();
        let _ = device;
        let memory = world.ring.memory();
        drop(world.driver);
        // SAFETY: the ring lives on, and nobody else is on it.
        let mut driver = unsafe { Driver::new(memory, SIZE, world.options, vec![Slot::default(); 8]) }.unwrap();
        assert!(driver.needs_kick());
        assert!(!driver.needs_kick(), "once is enough");
        // So does one that was reset.
        driver.detach(|_| {});
        assert!(driver.needs_kick());
    }
}

/// A back-end signals a ring that was used, and leaves the eventfd of a new one alone.
#[test]
fn a_used_ring_is_told_from_a_new_one() {
    for mut world in World::all() {
        let memory = world.ring.memory();
        // SAFETY: the ring lives as long as the world.
        let unused = || unsafe { memory.is_unused(SIZE) };
        assert!(unused(), "as it was made");
        for _ in 0..SIZE {
            world.add();
        }
        assert!(
            unused(),
            "buffers are posted, and no device has come yet: {:?}",
            world.options
        );
        let mut device = world.device();
        // Indices of 16 bits are at their beginning again after the last round.
        for _ in 0..1 << 13 {
            assert_eq!(world.use_all(&mut device), usize::from(SIZE));
            assert!(!unused(), "{:?}", world.options);
            world.driver.poll_each(SIZE.into(), |_| {});
            for _ in 0..SIZE {
                world.add();
            }
        }
    }
}
