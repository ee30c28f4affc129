#![cfg(not(loom))]
//! What a packed ring refuses: faults by their names, what breaks a ring, calls that change nothing (virtio 1.3 §2.8).

mod common;

use common::{Arena, Packed, Posting, set_desc};
use virtio_ring::packed::{Base, Device, Driver, Layout, Table, Verdict};
use virtio_ring::{Chain, Direction, Error, Fault, Options, Part, Segment, Slot};

const DIRECT: Options = Options {
    event_idx: false,
    in_order: false,
    indirect: false,
};
const ORDERED: Options = Options {
    in_order: true,
    ..DIRECT
};
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Available and used, in a lap with wrap counter 1 and in one with 0 (§2.8.1).
const AVAIL_1: u16 = 0x0080;
const USED_1: u16 = 0x8080;
const AVAIL_0: u16 = 0x8000;

fn driver(ring: &Packed, options: Options) -> Driver<Vec<Slot>> {
    let size = ring.layout.size;
    // SAFETY: the ring outlives every use in these tests, and only atomics touch it.
    unsafe { Driver::new(ring.memory(), size, options, vec![Slot::default(); size.into()]).unwrap() }
}

fn device(ring: &Packed, options: Options) -> Device {
    // SAFETY: as above.
    unsafe { Device::new(ring.memory(), ring.layout.size, options, Base::START).unwrap() }
}

fn segment(offset: u64, len: u32) -> Segment {
    Segment {
        addr: Arena::START + offset,
        len,
    }
}

fn poll(driver: &mut Driver<Vec<Slot>>) -> Vec<(u64, u32)> {
    let mut seen = vec![];
    driver.poll_each(usize::MAX, |done| seen.push((done.cookie, done.len)));
    seen
}

#[test]
fn every_fault_by_its_name() {
    use Fault::*;
    let a = Arena::START;
    // The chain from descriptor 0 on; the table at the arena's start is filled from the second list.
    type Desc = (u64, u32, u16, u16);
    let cases: &[(Fault, &[Desc], &[Desc])] = &[
        (
            TooManySegments,
            &[(a, 1, 0, NEXT), (a, 1, 0, NEXT), (a, 1, 0, NEXT), (a, 1, 5, 0)],
            &[],
        ),
        (TooManyBytes, &[(a, 4096, 0, NEXT), (a, u32::MAX - 4095, 5, 0)], &[]),
        (
            IndirectWithNext,
            &[(a, 16, 0, INDIRECT | NEXT), (a, 1, 5, 0)],
            &[(a, 1, 0, 0)],
        ),
        (
            IndirectWithNext,
            &[(a, 1, 0, NEXT), (a, 16, 5, INDIRECT)],
            &[(a, 1, 0, 0)],
        ),
        (IndirectSize, &[(a, 0, 5, INDIRECT)], &[]),
        (IndirectSize, &[(a, 17, 5, INDIRECT)], &[(a, 1, 0, 0)]),
        (IndirectTooLarge, &[(a, 16 * 9, 5, INDIRECT)], &[(a, 1, 0, 0); 9]),
        (ReadableAfterWritable, &[(a, 1, 0, NEXT | WRITE), (a, 1, 5, 0)], &[]),
        (ZeroLength, &[(a, 0, 5, 0)], &[]),
        (ZeroLength, &[(a, 1, 0, NEXT), (a, 0, 5, WRITE)], &[]),
        (ZeroLength, &[(a, 16, 5, INDIRECT)], &[(a, 0, 0, 0)]),
        (Untranslated, &[(a + 4096, 1, 5, 0)], &[]),
        (Untranslated, &[(a + 4095, 2, 5, WRITE)], &[]),
        (Untranslated, &[(u64::MAX, 2, 5, 0)], &[]),
        (Untranslated, &[(a - 16, 16, 5, INDIRECT)], &[]),
    ];
    let indirect = Options {
        indirect: true,
        ..DIRECT
    };
    for (fault, chain, table) in cases {
        for single in [true, false] {
            let (ring, arena) = (Packed::new(8), Arena::new(4096));
            // A good chain follows, in the same burst.
            for (i, (addr, len, id, flags)) in chain.iter().chain(&[(a, 7, 6, 0)]).enumerate() {
                ring.set_desc(i as u16, (*addr, *len, *id, flags | AVAIL_1));
            }
            for (i, desc) in table.iter().enumerate() {
                set_desc(&arena.0, 16 * i, *desc);
            }
            let mut device = device(&ring, indirect);
            let storage = if *fault == TooManySegments { 3 } else { 8 };
            let mut parts = Chain::new(vec![Part::default(); storage]);
            let mut seen = vec![];
            if single {
                while let Some(head) = device.pop(&arena, &mut parts).unwrap() {
                    let none = parts.readable().is_empty() && parts.writable().is_empty();
                    assert_eq!(parts.fault().is_some(), none);
                    seen.push((head.index(), parts.fault()));
                    device.push(head, 0);
                }
            } else {
                let popped = device.pop_each(&arena, &mut parts, 9, |popped| {
                    seen.push((popped.head.index(), popped.fault));
                    Verdict::Done(0)
                });
                assert_eq!(popped, Ok(2));
            }
            assert_eq!(seen, [(5, Some(*fault)), (6, None)], "{chain:?} {table:?}");
            device.publish();
            let behind = chain.len() as u16;
            assert_eq!((ring.desc(0).2, ring.desc(0).3), (5, USED_1));
            assert_eq!((ring.desc(behind).2, ring.desc(behind).3), (6, USED_1));
            assert_eq!((device.anomalies().chain, device.anomalies().total()), (1, 1));
            assert!(!device.is_broken());
        }
    }
    // Without the feature, an indirect descriptor is a fault of its own.
    let (ring, arena) = (Packed::new(4), Arena::new(64));
    ring.set_desc(0, (a, 16, 0, INDIRECT | AVAIL_1));
    let mut parts = Chain::new([Part::default(); 4]);
    device(&ring, DIRECT).pop(&arena, &mut parts).unwrap().unwrap();
    assert_eq!(parts.fault(), Some(IndirectNotNegotiated));
}

#[test]
fn more_than_the_ring_has_breaks_it() {
    let (ring, arena) = (Packed::new(3), Arena::new(64));
    let mut parts = Chain::new([Part::default(); 4]);
    // A chain that does not end.
    for i in 0..3 {
        ring.set_desc(i, (Arena::START, 1, i, AVAIL_1 | NEXT));
    }
    let mut device = device(&ring, DIRECT);
    assert_eq!(device.pop(&arena, &mut parts), Err(Error::Broken));
    assert_eq!((device.is_broken(), device.anomalies().index_jump), (true, 1));
    assert_eq!((device.has_available(), device.outstanding()), (false, 0));

    // A chain that goes on where another one is still out; what was completed before is published.
    for i in 0..2 {
        ring.set_desc(i, (Arena::START, 1, i, AVAIL_1));
    }
    let mut device = self::device(&ring, DIRECT);
    let mut n = 0;
    ring.set_desc(2, (Arena::START, 1, 2, AVAIL_1 | NEXT));
    let popped = device.pop_each(&arena, &mut parts, 9, |_| {
        n += 1;
        if n == 1 { Verdict::Done(0) } else { Verdict::Keep }
    });
    assert_eq!((popped, n), (Err(Error::Broken), 2));
    assert_eq!(device.pop(&arena, &mut parts), Err(Error::Broken));
    device.publish();
    assert_eq!(ring.desc(0).3, USED_1);
    assert_eq!(device.outstanding(), 1);

    // A lap ahead.
    for i in 0..3 {
        ring.set_desc(i, (Arena::START, 1, i, AVAIL_1));
    }
    for single in [true, false] {
        let mut device = self::device(&ring, DIRECT);
        assert_eq!(device.pop_each(&arena, &mut parts, 9, |_| Verdict::Keep), Ok(3));
        assert_eq!(device.pop(&arena, &mut parts), Ok(None));
        ring.set_desc(0, (Arena::START, 1, 0, AVAIL_0));
        let result = if single {
            device.pop(&arena, &mut parts).map(|head| usize::from(head.is_some()))
        } else {
            device.pop_each(&arena, &mut parts, 9, |_| Verdict::Keep)
        };
        assert_eq!(result, Err(Error::Broken));
        ring.set_desc(0, (Arena::START, 1, 0, AVAIL_1));
    }
}

#[test]
fn a_used_descriptor_without_a_name_breaks_the_ring() {
    for (options, id, extent) in [
        (DIRECT, 4, 1),
        (DIRECT, 3, 1),
        (DIRECT, u16::MAX, 1),
        (ORDERED, 4, 1),
        (ORDERED, 3, 1),
        (ORDERED, u16::MAX, 1),
        // In the middle of a chain.
        (ORDERED, 1, 2),
        (ORDERED, u16::MAX, 2),
        (DIRECT, 1, 2),
    ] {
        let ring = Packed::new(4);
        let mut driver = driver(&ring, options);
        driver.post(&vec![segment(0, 9); extent], 0, 1).unwrap();
        driver.publish();
        ring.set_desc(0, (0, 0, id, USED_1));
        assert_eq!(poll(&mut driver), []);
        let seen = driver.anomalies();
        assert_eq!((driver.is_broken(), driver.in_flight(), seen.total()), (true, 1, 1));
        assert_eq!(seen.id_out_of_range, u64::from(id >= 4));
        assert_eq!(seen.out_of_order, u64::from(id < 4 && options.in_order));
        assert_eq!(seen.id_not_in_flight, u64::from(id < 4 && !options.in_order));
        assert_eq!(driver.post(&[segment(0, 9)], 0, 1), Err(Error::Broken));
        let mut left = vec![];
        driver.detach(|cookie| left.push(cookie));
        assert_eq!((left, driver.is_broken(), driver.free()), (vec![1], false, 4));
        assert_eq!(ring.block.bytes(ring.layout.desc, 64), [0; 64]);
    }
}

#[test]
fn refusals_change_nothing() {
    let ring = Packed::new(4);
    let one = segment(0, 1);
    for size in [0, 1, 32769, u16::MAX] {
        // SAFETY: a size that cannot be is refused before any use of the memory.
        let refused = unsafe { Driver::new(ring.memory(), size, DIRECT, vec![Slot::default(); 4]) };
        assert_eq!(refused.err(), Some(Error::PackedQueueSize(size)));
        // SAFETY: as above.
        let refused = unsafe { Device::new(ring.memory(), size, DIRECT, Base::START) };
        assert_eq!(refused.err(), Some(Error::PackedQueueSize(size)));
        assert_eq!(Layout::new(size), Err(Error::PackedQueueSize(size)));
    }
    // SAFETY: the ring outlives the call.
    let few = unsafe { Driver::new(ring.memory(), 4, DIRECT, vec![Slot::default(); 3]) };
    assert_eq!(few.err(), Some(Error::Slots { needed: 4, given: 3 }));
    for part in 0..3 {
        let mut memory = ring.memory();
        let (askew, align) = [
            (&mut memory.desc, Layout::DESC_ALIGN),
            (&mut memory.driver, Layout::EVENT_ALIGN),
            (&mut memory.device, Layout::EVENT_ALIGN),
        ]
        .into_iter()
        .nth(part)
        .unwrap();
        // SAFETY: inside the block; the call refuses the memory before any use.
        *askew = unsafe { askew.add(align / 2) };
        let address = askew.as_ptr() as usize;
        // SAFETY: as above.
        let refused = unsafe { Driver::new(memory, 4, DIRECT, vec![Slot::default(); 4]) };
        assert_eq!(refused.err(), Some(Error::Misaligned { address, align }));
        // SAFETY: as above.
        let refused = unsafe { Device::new(memory, 4, DIRECT, Base::START) };
        assert_eq!(refused.err(), Some(Error::Misaligned { address, align }));
    }
    let mut driver = driver(&ring, DIRECT);
    assert_eq!(driver.post(&[], 0, 0), Err(Error::EmptySegment));
    assert_eq!(driver.post(&[segment(0, 0)], 0, 0), Err(Error::EmptySegment));
    assert_eq!(driver.post(&[one; 5], 0, 0), Err(Error::TooLong));
    assert_eq!(driver.post(&[segment(0, 1 << 31); 2], 2, 0), Err(Error::TooLong));
    let arena = Arena::new(64);
    let table = Table {
        ptr: arena.0.base(),
        addr: Arena::START,
        entries: 4,
    };
    // SAFETY: the table is the arena.
    let refused = unsafe { driver.add_indirect(table, &[one], 0, 0) };
    assert_eq!(refused, Err(Error::NotNegotiated));
    assert_eq!(ring.block.bytes(0, ring.block.len()), vec![0; ring.block.len()]);
    driver.post(&[one; 3], 3, 0).unwrap();
    assert_eq!(driver.post(&[one; 2], 2, 0), Err(Error::Full));
    assert_eq!((driver.free(), driver.in_flight()), (1, 1));
    assert_eq!(driver.post_each(Direction::Readable, [(one, 1); 9]), 1);
    assert_eq!(driver.post_each(Direction::Readable, [(one, 1); 9]), 0);
    for (available, used) in [(4, 0x8000), (0x8000, 4), (0x7fff, 0x8000), (0x8000, 0xffff)] {
        let base = Base { available, used };
        // SAFETY: as for the driver.
        let outside = unsafe { Device::new(ring.memory(), 4, DIRECT, base) };
        let base = base.encode();
        assert_eq!(outside.err(), Some(Error::PackedBase { base, size: 4 }));
    }
}
