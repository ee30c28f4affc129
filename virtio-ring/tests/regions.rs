#![cfg(not(loom))]
//! A driver knows its own addresses only: what it names may lie over the border between two regions of its memory, which
//! are apart on the device side.

mod common;

use std::ptr::NonNull;

use common::{Block, Posting, Ring};
use virtio_ring::any::{Device, Driver, Format};
use virtio_ring::{Chain, Direction, Fault, Options, Part, Segment, Single, Slot, Table, Translate, Verdict, Window};

const SIZE: u16 = 8;

/// Regions by their first addresses, each in memory of its own.
struct Scattered(Vec<(u64, Block)>);

impl Scattered {
    fn new(regions: impl IntoIterator<Item = (u64, usize)>) -> Self {
        Self(regions.into_iter().map(|(addr, len)| (addr, Block::new(len))).collect())
    }

    fn region(&self, addr: u64) -> Option<(&Block, u64)> {
        self.0.iter().find_map(|(start, block)| {
            let offset = addr.checked_sub(*start)?;
            (offset < block.len() as u64).then_some((block, offset))
        })
    }

    fn at(&self, addr: u64) -> *mut u8 {
        let (block, offset) = self.region(addr).unwrap();
        block.at(offset as usize)
    }

    fn fill(&self, addr: u64, bytes: &[u8]) {
        for (addr, byte) in (addr..).zip(bytes) {
            let (block, offset) = self.region(addr).unwrap();
            block.fill(offset as usize, &[*byte]);
        }
    }
}

// SAFETY: only memory of the blocks, all of which is valid, is given out.
unsafe impl Translate for Scattered {
    fn translate(&self, addr: u64, len: u32) -> Option<NonNull<u8>> {
        let (ptr, n) = self.prefix(addr, len)?;
        (n == len).then_some(ptr)
    }

    fn prefix(&self, addr: u64, len: u32) -> Option<(NonNull<u8>, u32)> {
        let (block, offset) = self.region(addr)?;
        let left = block.len() as u64 - offset;
        Some((
            NonNull::new(block.at(offset as usize))?,
            u64::from(len).min(left) as u32,
        ))
    }

    fn window(&self, addr: u64) -> Option<Window> {
        let (block, offset) = self.region(addr)?;
        Some(Window {
            theirs: addr - offset,
            len: block.len() as u64,
            ours: block.base(),
        })
    }
}

struct World {
    // The device and the driver are gone before their ring.
    driver: Driver<Vec<Slot>>,
    device: Device,
    _ring: Ring,
    format: Format,
}

impl World {
    fn new(format: Format) -> Self {
        let ring = Ring::new(format, SIZE);
        let options = Options {
            indirect: true,
            ..Options::default()
        };
        // SAFETY: the ring lives as long as the world, and only atomics touch it.
        let driver = unsafe { Driver::new(ring.memory(), SIZE, options, vec![Slot::default(); SIZE.into()]) };
        // SAFETY: as above.
        let mut device = unsafe { Device::new(ring.memory(), SIZE, options, format.start_base()) }.unwrap();
        device.set_vectors(*common::vectors().last().unwrap());
        Self {
            driver: driver.unwrap(),
            device,
            _ring: ring,
            format,
        }
    }

    /// A chain by way of a table, which lies at `addr` for the device.
    fn add_table(&mut self, memory: &Scattered, addr: u64, segments: &[Segment], readable: usize) {
        let scratch = Block::new(16 * segments.len());
        let table = Table {
            ptr: scratch.base(),
            addr,
            entries: segments.len() as u16,
        };
        // SAFETY: the table is as long. The device is given the copy.
        unsafe { self.driver.add_indirect(table, segments, readable, 0).unwrap() };
        memory.fill(addr, &scratch.bytes(0, scratch.len()));
        self.driver.publish();
    }

    /// What comes next, by the one or the other function: readable and writable parts, or why there are none.
    fn take(&mut self, memory: &Scattered, room: usize, burst: bool) -> Result<[Vec<Part>; 2], Fault> {
        let mut chain = Chain::new(vec![Part::default(); room]);
        let mut found = None;
        if burst {
            let popped = self.device.pop_each(memory, &mut chain, 1, |popped| {
                found = Some((popped.fault, popped.readable.to_vec(), popped.writable.to_vec()));
                Verdict::Done(0)
            });
            assert_eq!(popped, Ok(1));
        } else {
            let head = self.device.pop(memory, &mut chain).unwrap().unwrap();
            found = Some((chain.fault(), chain.readable().to_vec(), chain.writable().to_vec()));
            self.device.push(head, 0);
        }
        self.device.publish();
        assert_eq!(self.driver.poll_each(1, |_| {}), 1);
        assert_eq!((self.driver.in_flight(), self.driver.anomalies().total()), (0, 0));
        let (fault, readable, writable) = found.unwrap();
        match fault {
            None => Ok([readable, writable]),
            Some(fault) => {
                assert!(readable.is_empty() && writable.is_empty());
                Err(fault)
            }
        }
    }
}

/// Each part is inside one region, and together they are these segments, byte by byte.
fn check(memory: &Scattered, parts: &[Part], segments: &[Segment]) {
    let bytes = |part: &Part| {
        let start = part.ptr.as_ptr();
        (0..part.len as usize).map(move |i| start.wrapping_add(i))
    };
    let expected = segments
        .iter()
        .flat_map(|segment| (0..u64::from(segment.len)).map(|i| memory.at(segment.addr + i)));
    assert!(parts.iter().flat_map(bytes).eq(expected));
    // No more of them than borders make.
    assert!(parts.iter().all(|part| part.len > 0));
    let borders: usize = segments
        .iter()
        .map(|segment| {
            let (first, last) = (segment.addr, segment.addr + u64::from(segment.len - 1));
            memory
                .0
                .iter()
                .filter(|(start, _)| first < *start && *start <= last)
                .count()
        })
        .sum();
    assert_eq!(parts.len(), segments.len() + borders);
}

const FORMATS: [Format; 2] = [Format::Split, Format::Packed];

/// Four regions one behind the other for the driver; the third is smaller than a descriptor.
fn adjacent() -> Scattered {
    Scattered::new([(0x1000, 0x80), (0x1080, 0x40), (0x10c0, 5), (0x10c5, 0x200)])
}

#[test]
fn a_descriptor_over_a_border_is_several_parts() {
    let memory = adjacent();
    for format in FORMATS {
        for burst in [false, true] {
            let mut world = World::new(format);
            for addr in 0x1000..0x1100 {
                for (len, readable) in [(1u32, 0), (3, 1), (64, 1), (100, 0), (0x100, 1)] {
                    let segment = Segment { addr, len };
                    world.driver.post(&[segment], readable, 0).unwrap();
                    world.driver.publish();
                    let [read, written] = world.take(&memory, 8, burst).unwrap();
                    check(&memory, if readable == 1 { &read } else { &written }, &[segment]);
                    assert!(if readable == 1 {
                        written.is_empty()
                    } else {
                        read.is_empty()
                    });
                }
            }
            assert_eq!(world.device.anomalies().total(), 0);
        }
    }
}

#[test]
fn a_chain_over_borders_keeps_what_is_readable_before_what_is_writable() {
    let memory = adjacent();
    for format in FORMATS {
        for burst in [false, true] {
            let mut world = World::new(format);
            for addr in 0x1000..0x10d0 {
                let segments = [(addr, 12), (addr + 12, 70), (addr + 1, 150)].map(|(addr, len)| Segment { addr, len });
                for readable in 0..=3 {
                    world.driver.post(&segments, readable, 0).unwrap();
                    world.driver.publish();
                    let [read, written] = world.take(&memory, 16, burst).unwrap();
                    check(&memory, &read, &segments[..readable]);
                    check(&memory, &written, &segments[readable..]);
                }
            }
        }
    }
}

#[test]
fn a_table_over_a_border_and_entries_over_it_are_read() {
    let memory = adjacent();
    for format in FORMATS {
        for burst in [false, true] {
            let mut world = World::new(format);
            for addr in 0x1000..0x10d0 {
                // Behind the table, wherever that is.
                let segments = [(0x1180, 12), (0x1200, 70), (0x1190, 1)].map(|(addr, len)| Segment { addr, len });
                world.add_table(&memory, addr, &segments, 2);
                let [read, written] = world.take(&memory, 16, burst).unwrap();
                check(&memory, &read, &segments[..2]);
                check(&memory, &written, &segments[2..]);
            }
            assert_eq!(world.device.anomalies().total(), 0);
        }
    }
}

#[test]
fn more_parts_than_there_is_room_for_are_refused_and_counted() {
    let memory = adjacent();
    for format in FORMATS {
        for burst in [false, true] {
            let mut world = World::new(format);
            let segment = Segment {
                addr: 0x1070,
                len: 0x60,
            };
            for (room, counted) in [(0, 1), (1, 2), (3, 3), (4, 3)] {
                world.driver.post(&[segment], 0, 0).unwrap();
                world.driver.publish();
                match world.take(&memory, room, burst) {
                    Ok([_, written]) => check(&memory, &written, &[segment]),
                    Err(fault) => assert_eq!((fault, room < 4), (Fault::TooManySegments, true), "{room}"),
                }
                assert_eq!(world.device.anomalies().chain, counted, "{:?} {room}", world.format);
            }
        }
    }
}

#[test]
fn a_hole_between_regions_and_the_end_of_the_address_space_are_no_memory() {
    let top = u64::MAX - 0x1f;
    let memory = Scattered::new([(0x1000, 0x80), (0x1081, 0x80), (top - 0x40, 0x40), (top, 0x20)]);
    for format in FORMATS {
        for burst in [false, true] {
            let mut world = World::new(format);
            let mut bad = 0;
            for (addr, len, good) in [
                (0x1070, 0x10, true),
                (0x1070, 0x20, false),
                (0xfff, 2, false),
                (0x1100, 2, false),
                (top - 0x10, 0x30, true),
                (top - 0x10, 0x31, false),
                (u64::MAX, 1, true),
                (u64::MAX, 2, false),
                (top - 0x40, u32::MAX, false),
            ] {
                let segment = Segment { addr, len };
                world.driver.post(&[segment], 1, 0).unwrap();
                world.driver.publish();
                let taken = world.take(&memory, 8, burst);
                assert_eq!(taken.is_ok(), good, "{addr:#x}");
                assert!(good || taken == Err(Fault::Untranslated));
                bad += u64::from(!good);
                assert_eq!(world.device.anomalies().chain, bad);
            }
            // The same for tables: inside the hole, and over the end.
            for addr in [0x1070u64, top + 8] {
                let segments = [Segment { addr: 0x1000, len: 1 }; 2];
                let scratch = Block::new(32);
                let table = Table {
                    ptr: scratch.base(),
                    addr,
                    entries: 2,
                };
                // SAFETY: the table is as long; the device finds none.
                unsafe { world.driver.add_indirect(table, &segments, 2, 0).unwrap() };
                memory.fill(addr, &scratch.bytes(0, 16));
                world.driver.publish();
                assert_eq!(world.take(&memory, 8, burst), Err(Fault::Untranslated));
            }
        }
    }
}

#[test]
fn the_fast_path_leaves_what_is_over_a_border_to_the_other_one() {
    let memory = adjacent();
    let segments = [
        (0x1000, 64),
        (0x1004, 64),
        (0x1008, 64),
        (0x1044, 60),
        (0x1050, 64),
        (0x1090, 8),
    ];
    for format in FORMATS {
        let mut world = World::new(format);
        for _ in 0..10 {
            let segments = segments.map(|(addr, len)| (Segment { addr, len }, 0));
            assert_eq!(world.driver.post_each(Direction::Readable, segments), 6);
            world.driver.publish();
            let mut singles = [Single::default(); 8];
            assert_eq!(world.device.peek_singles(&memory, Direction::Readable, &mut singles), 4);
            for (single, (segment, _)) in singles.iter().zip(&segments[..4]) {
                assert_eq!(
                    (single.ptr.as_ptr(), single.len),
                    (memory.at(segment.addr), segment.len)
                );
            }
            assert_eq!(world.device.use_read(&singles[..4]), 4);
            let mut chain = Chain::new([Part::default(); 4]);
            let mut parts = vec![];
            let popped = world.device.pop_each(&memory, &mut chain, 1, |popped| {
                parts.extend_from_slice(popped.readable);
                Verdict::Done(0)
            });
            assert_eq!(popped, Ok(1));
            check(&memory, &parts, &[segments[4].0]);
            assert_eq!(world.device.peek_singles(&memory, Direction::Readable, &mut singles), 1);
            assert_eq!(world.device.use_read(&singles[..1]), 1);
            world.device.publish();
            assert_eq!(world.driver.poll_each(9, |_| {}), 6);
        }
    }
}
