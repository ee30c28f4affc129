#![cfg(not(loom))]
//! What is written where: literal bytes, from the structures of virtio 1.3 §2.8.

mod common;

use common::{Arena, Packed, Posting};
use std::sync::atomic::Ordering::SeqCst;
use virtio_ring::packed::{Base, Device, Driver, Table, Verdict};
use virtio_ring::{Chain, Completion, Direction, Fault, Options, Part, Segment, Single, Slot};

const DIRECT: Options = Options {
    event_idx: false,
    in_order: false,
    indirect: false,
};
const ORDERED: Options = Options {
    in_order: true,
    ..DIRECT
};
const EVENTS: Options = Options {
    event_idx: true,
    ..DIRECT
};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Available and used, in a lap with wrap counter 1 and in one with 0 (§2.8.1).
const AVAIL_1: u16 = 0x0080;
const USED_1: u16 = 0x8080;
const AVAIL_0: u16 = 0x8000;
const USED_0: u16 = 0x0000;

fn driver(ring: &Packed, options: Options) -> Driver<Vec<Slot>> {
    let size = ring.layout.size;
    // SAFETY: the ring outlives every use in these tests, and only atomics touch it.
    unsafe { Driver::new(ring.memory(), size, options, vec![Slot::default(); size.into()]).unwrap() }
}

fn device_at(ring: &Packed, options: Options, base: Base) -> Device {
    // SAFETY: as above.
    unsafe { Device::new(ring.memory(), ring.layout.size, options, base).unwrap() }
}

fn device(ring: &Packed, options: Options) -> Device {
    device_at(ring, options, Base::START)
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
fn a_single_as_it_lies_in_memory() {
    let ring = Packed::new(4);
    let mut driver = driver(&ring, DIRECT);
    let one = Segment {
        addr: 0x1122_3344_5566_7788,
        len: 0x5dc,
    };
    assert_eq!(driver.post_each(Direction::Writable, [(one, 77)]), 1);
    // The second word of the first descriptor waits: nothing is available yet (§2.8.21.1).
    assert_eq!(ring.block.bytes(ring.layout.desc + 8, 8), [0; 8]);
    assert!(driver.publish());
    #[rustfmt::skip]
    assert_eq!(ring.block.bytes(ring.layout.desc, 32), [
        0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0xdc, 0x05, 0, 0, /* id */ 0, 0, /* AVAIL, WRITE */ 0x82, 0,
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ]);

    let mut device = device(&ring, DIRECT);
    let mut parts = Chain::new([Part::default(); 4]);
    // The address is nobody's: the chain comes out empty, and is completed all the same.
    let head = device.pop(&Arena::new(16), &mut parts).unwrap().unwrap();
    assert_eq!((head.index(), parts.fault()), (0, Some(Fault::Untranslated)));
    device.push(head, 0x123);
    assert!(device.publish());
    // The address stays; length, ID, AVAIL and USED, and WRITE for "something was written" (§2.8.3).
    #[rustfmt::skip]
    assert_eq!(ring.block.bytes(ring.layout.desc, 16), [
        0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0x23, 0x01, 0, 0, 0, 0, /* AVAIL, WRITE */ 0x82, /* USED */ 0x80,
    ]);
    let mut seen = vec![];
    driver.poll_each(9, |completion| seen.push(completion));
    assert_eq!(seen, [Completion { cookie: 77, len: 0x123 }]);
    assert_eq!((driver.free(), driver.in_flight()), (4, 0));
}

#[test]
fn a_chain_as_it_lies_in_memory() {
    for options in [DIRECT, ORDERED] {
        let ring = Packed::new(4);
        let mut driver = driver(&ring, options);
        driver.post(&[segment(0, 1)], 1, 76).unwrap();
        driver.publish();
        let chain = [segment(0x100, 12), segment(0x200, 0x5dc), segment(0x300, 0x800)];
        driver.post(&chain, 2, 77).unwrap();
        // All of it but what makes the first available: the device never sees a part of a chain (§2.8.6).
        assert_eq!(ring.desc(1), (Arena::START + 0x100, 0, 0, 0));
        assert!(driver.publish());
        // NEXT in all but the last. The ID, which counts in the last, is in all.
        #[rustfmt::skip]
        assert_eq!(ring.block.bytes(ring.layout.desc + 16, 48), [
            0, 1, 0, 0, 0x10, 0, 0, 0, 12, 0, 0, 0, 1, 0, /* AVAIL, NEXT */ 0x81, 0,
            0, 2, 0, 0, 0x10, 0, 0, 0, 0xdc, 5, 0, 0, 1, 0, /* AVAIL, NEXT */ 0x81, 0,
            0, 3, 0, 0, 0x10, 0, 0, 0, 0, 8, 0, 0, 1, 0, /* AVAIL, WRITE */ 0x82, 0,
        ]);
        let arena = Arena::new(4096);
        let mut device = device(&ring, options);
        let mut parts = Chain::new([Part::default(); 4]);
        let first = device.pop(&arena, &mut parts).unwrap().unwrap();
        let second = device.pop(&arena, &mut parts).unwrap().unwrap();
        assert_eq!((second.index(), parts.fault()), (1, None));
        assert_eq!((parts.readable_len(), parts.writable_len()), (12 + 0x5dc, 0x800));
        device.push(first, 0);
        device.push(second, 9);
        // The first of what is published together waits for it.
        assert_eq!(ring.desc(0).3, AVAIL_1);
        assert!(device.publish());
        assert_eq!(ring.desc(0), (Arena::START, 0, 0, USED_1));
        assert_eq!(ring.desc(1), (Arena::START + 0x100, 9, 1, USED_1 | WRITE));
        assert_eq!(poll(&mut driver), [(76, 0), (77, 9)]);
    }
}

#[test]
fn of_a_foreign_chain_the_last_descriptor_names_it() {
    // §2.8.6: the ID is in the last descriptor. In the others it may be anything, and so may what is reserved.
    let (ring, arena) = (Packed::new(4), Arena::new(64));
    ring.set_desc(0, (Arena::START, 8, 0xdead, AVAIL_1 | NEXT | 0x0f00));
    ring.set_desc(1, (Arena::START, 8, 0xbeef, AVAIL_1 | NEXT | WRITE));
    ring.set_desc(2, (Arena::START, 8, 0xcafe, AVAIL_1 | WRITE));
    let mut device = device(&ring, DIRECT);
    let mut parts = Chain::new([Part::default(); 4]);
    let head = device.pop(&arena, &mut parts).unwrap().unwrap();
    assert_eq!(
        (head.index(), parts.fault(), parts.readable_len(), parts.writable_len()),
        (0xcafe, None, 8, 16)
    );
    device.push(head, 5);
    device.publish();
    // One used descriptor for the chain, where it began. The next one is awaited behind its end.
    assert_eq!(ring.desc(0), (Arena::START, 5, 0xcafe, USED_1 | WRITE));
    assert_eq!(device.base().encode(), 0x8003_8003);
    assert_eq!(device.pop(&arena, &mut parts), Ok(None));
}

#[test]
fn an_indirect_table_as_it_lies_in_memory() {
    let ring = Packed::new(4);
    let options = Options {
        indirect: true,
        ..DIRECT
    };
    let mut driver = driver(&ring, options);
    let arena = Arena::new(4096);
    let table = Table {
        ptr: arena.0.base(),
        addr: Arena::START,
        entries: 3,
    };
    let chain = [segment(256, 12), segment(512, 100), segment(1024, 1000)];
    // SAFETY: the table is the arena's first 48 bytes.
    unsafe { driver.add_indirect(table, &chain, 1, 5).unwrap() };
    driver.publish();
    assert_eq!(ring.desc(0), (Arena::START, 48, 0, AVAIL_1 | INDIRECT));
    // §2.8.7: WRITE is the only flag in a table; the ID is reserved.
    #[rustfmt::skip]
    assert_eq!(arena.0.bytes(0, 48), [
        0, 1, 0, 0, 0x10, 0, 0, 0, 12, 0, 0, 0, 0, 0, 0, 0,
        0, 2, 0, 0, 0x10, 0, 0, 0, 100, 0, 0, 0, 0, 0, 2, 0,
        0, 4, 0, 0, 0x10, 0, 0, 0, 0xe8, 3, 0, 0, 0, 0, 2, 0,
    ]);
    assert_eq!(driver.free(), 3);
    let mut device = device(&ring, options);
    let mut parts = Chain::new([Part::default(); 3]);
    let head = device.pop(&arena, &mut parts).unwrap().unwrap();
    assert_eq!(
        (parts.fault(), parts.readable_len(), parts.writable_len()),
        (None, 12, 1100)
    );
    assert_eq!(parts.readable()[0].ptr.as_ptr(), arena.0.at(256));
    let writable: Vec<_> = parts.writable().iter().map(|part| part.ptr.as_ptr()).collect();
    assert_eq!(writable, [arena.0.at(512), arena.0.at(1024)]);
    device.push(head, 1100);
    device.publish();
    assert_eq!(poll(&mut driver), [(5, 1100)]);
}

#[test]
fn what_is_reserved_in_an_indirect_table_is_ignored() {
    // §2.8.7: beside INDIRECT, WRITE is ignored; in the table all flags but WRITE are, and the ID. The table is at an odd
    // address.
    let (ring, arena) = (Packed::new(4), Arena::new(4096));
    ring.set_desc(0, (Arena::START + 1, 32, 3, AVAIL_1 | INDIRECT | WRITE));
    let mut table = vec![0u8; 32];
    table[..8].copy_from_slice(&(Arena::START + 200).to_le_bytes());
    table[8..16].copy_from_slice(&[20, 0, 0, 0, 0xff, 0xff, 0xfd, 0xff]);
    table[16..24].copy_from_slice(&(Arena::START + 300).to_le_bytes());
    table[24..].copy_from_slice(&[30, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    arena.0.fill(1, &table);
    let options = Options {
        indirect: true,
        ..DIRECT
    };
    let mut device = device(&ring, options);
    let mut parts = Chain::new([Part::default(); 4]);
    let head = device.pop(&arena, &mut parts).unwrap().unwrap();
    assert_eq!((head.index(), parts.fault()), (3, None));
    assert_eq!((parts.readable_len(), parts.writable_len()), (20, 30));
}

#[test]
fn the_counters_turn_where_the_ring_ends() {
    // Sizes that are no power of two (§2.8.10.1), with pairs of descriptors across the end.
    for size in [3u16, 5] {
        let (ring, arena) = (Packed::new(size), Arena::new(64));
        let (mut driver, mut device) = (driver(&ring, ORDERED), device(&ring, ORDERED));
        let mut parts = Chain::new([Part::default(); 2]);
        let mut at = 0u32;
        for round in 0..20u64 {
            driver.post(&[segment(0, 1), segment(1, 2)], 1, round).unwrap();
            driver.publish();
            let place = |i: u32| ((i % u32::from(size)) as u16, (i / u32::from(size)).is_multiple_of(2));
            let ((first, wrap), (second, wrap_behind)) = (place(at), place(at + 1));
            let available = |wrap| if wrap { AVAIL_1 } else { AVAIL_0 };
            // IN_ORDER: the ID is the position of the first.
            assert_eq!(ring.desc(first), (Arena::START, 1, first, available(wrap) | NEXT));
            assert_eq!(
                ring.desc(second),
                (Arena::START + 1, 2, first, available(wrap_behind) | WRITE)
            );
            let base = device.base();
            assert_eq!(base.available, first | u16::from(wrap) << 15);
            assert_eq!(base.used, base.available);
            let head = device.pop(&arena, &mut parts).unwrap().unwrap();
            device.push(head, 2);
            device.publish();
            let used = if wrap { USED_1 } else { USED_0 };
            assert_eq!(ring.desc(first), (Arena::START, 2, first, used | WRITE));
            assert_eq!(poll(&mut driver), [(round, 2)]);
            at += 2;
        }
    }
}

#[test]
fn in_order_one_used_descriptor_completes_a_batch() {
    let (ring, arena) = (Packed::new(5), Arena::new(64));
    let (mut driver, mut device) = (driver(&ring, ORDERED), device(&ring, ORDERED));
    let mut parts = Chain::new([Part::default(); 1]);
    let mut at = 0u16;
    for _ in 0..50 {
        let buffers = (0..3u64).map(|i| (segment(0, 64), i));
        assert_eq!(driver.post_each(Direction::Readable, buffers), 3);
        driver.publish();
        let [first, second, last] = [at, at + 1, at + 2].map(|at| at % 5);
        let before = [second, last].map(|at| ring.desc(at));
        device.pop_each(&arena, &mut parts, 9, |_| Verdict::Done(7)).unwrap();
        device.publish();
        // It lies where the batch began and names its last (§2.8.8). Nothing was written: neither length nor WRITE.
        let (_, len, id, flags) = ring.desc(first);
        assert_eq!((len, id, flags & !USED_1), (0, last, 0));
        assert_eq!([second, last].map(|at| ring.desc(at)), before);
        assert_eq!(poll(&mut driver), [(0, 0), (1, 0), (2, 0)]);
        at = (at + 3) % 5;
    }
    // The same by the other ways to complete what was read.
    for way in 0..2 {
        let buffers = (0..4u64).map(|i| (segment(0, 64), i));
        assert_eq!(driver.post_each(Direction::Readable, buffers), 4);
        driver.publish();
        if way == 0 {
            let mut singles = [Single::default(); 9];
            assert_eq!(device.peek_singles(&arena, Direction::Writable, &mut singles), 0);
            assert_eq!(device.peek_singles(&arena, Direction::Readable, &mut singles), 4);
            assert_eq!(device.use_read(&singles[..4]), 4);
        } else {
            let heads: Vec<_> = std::iter::from_fn(|| device.pop(&arena, &mut parts).unwrap()).collect();
            device.push_batch(&heads);
        }
        device.publish();
        assert_eq!(ring.desc(at % 5).2, (at + 3) % 5);
        assert_eq!(poll(&mut driver), [(0, 0), (1, 0), (2, 0), (3, 0)]);
        at = (at + 4) % 5;
    }
}

#[test]
fn in_order_batches_of_writable_buffers() {
    // A device that skips: what it skipped was used completely, the last says its length (§2.8.8). Its batch goes across
    // the end of the ring and has a chain of two descriptors in it.
    let ring = Packed::new(5);
    for singles in [true, false] {
        let mut driver = driver(&ring, ORDERED);
        driver.post_each(Direction::Readable, (0..2).map(|i| (segment(0, 10), i)));
        driver.publish();
        ring.set_desc(0, (0, 0, 1, USED_1));
        // The batch is cut by the limit, and goes on.
        assert_eq!(driver.poll_each(1, |done| assert_eq!(done.cookie, 0)), 1);
        assert!(driver.set_notify(true));
        let (last, expected) = if singles {
            driver.post_each(Direction::Writable, (2..5).map(|i| (segment(0, 100), i)));
            (4, vec![(1, 0), (2, 100), (3, 100), (4, 60)])
        } else {
            driver.post(&[segment(0, 100), segment(0, 50)], 0, 2).unwrap();
            driver.post(&[segment(0, 100)], 0, 3).unwrap();
            (4, vec![(1, 0), (2, 150), (3, 60)])
        };
        driver.publish();
        ring.set_desc(2, (0, 60, last, USED_1 | WRITE));
        let mut seen = vec![];
        for _ in 0..4 {
            driver.poll_each(1, |done| seen.push((done.cookie, done.len)));
        }
        assert_eq!(seen, expected);
        assert_eq!(
            (driver.free(), driver.anomalies().total(), driver.is_broken()),
            (5, 0, false)
        );
    }
}

#[test]
fn a_length_counts_if_it_can_be() {
    let mut lies = 0;
    for options in [DIRECT, ORDERED] {
        for (flags, len, expected, lie) in [
            (WRITE, 60, 60, 0),
            (WRITE, 100, 100, 0),
            (WRITE, 0, 0, 0),
            (WRITE, 101, 0, 1),
            (WRITE, u32::MAX, 0, 1),
            // §2.8.4: without WRITE the length is reserved. There are devices that give it all the same, without the flag;
            // what cannot be a length is none, and no lie either.
            (0, 60, 60, 0),
            (0, 101, 0, 0),
            (0, u32::MAX, 0, 0),
            // NEXT and INDIRECT are reserved in a used descriptor, and ignored (§2.8.6).
            (WRITE | NEXT | INDIRECT | 0x7f00, 60, 60, 0),
        ] {
            let ring = Packed::new(2);
            let mut driver = driver(&ring, options);
            driver.post(&[segment(0, 5), segment(0, 100)], 1, 9).unwrap();
            driver.publish();
            ring.set_desc(0, (0, len, 0, USED_1 | flags));
            assert_eq!(poll(&mut driver), [(9, expected)], "{flags:#x} {len}");
            assert_eq!((driver.anomalies().length, driver.anomalies().total()), (lie, lie));
            assert!(!driver.is_broken());
            lies += lie;
        }
    }
    assert_eq!(lies, 4);
}

#[test]
fn the_write_flag_says_that_something_was_written() {
    let (ring, arena) = (Packed::new(4), Arena::new(64));
    let (mut driver, mut device) = (driver(&ring, DIRECT), device(&ring, DIRECT));
    driver.post_each(Direction::Writable, (0..4).map(|i| (segment(0, 64), i)));
    driver.publish();
    let mut singles = [Single::default(); 4];
    assert_eq!(device.peek_singles(&arena, Direction::Writable, &mut singles), 4);
    for (single, len) in singles.iter_mut().zip([3, 0, 64, 0]) {
        single.len = len;
    }
    assert_eq!(device.use_written(&singles), 4);
    device.publish();
    let seen: Vec<_> = (0..4)
        .map(|i| ring.desc(i))
        .map(|(_, len, _, flags)| (len, flags))
        .collect();
    let (with, without) = (USED_1 | WRITE, USED_1);
    assert_eq!(seen, [(3, with), (0, without), (64, with), (0, without)]);
    assert_eq!(poll(&mut driver), [(0, 3), (1, 0), (2, 64), (3, 0)]);
}

/// `desc` and `flags` of the driver's structure, then of the device's.
fn events(ring: &Packed) -> [u16; 4] {
    let ([a, b], [c, d]) = (ring.driver_event(), ring.device_event());
    [a, b, c, d].map(|word| word.load(SeqCst))
}

#[test]
fn event_suppression_without_the_feature() {
    // §2.8.10: ENABLE is 0 and DISABLE is 1, the reserved bits and the offset 0; DESC needs the feature.
    let (ring, arena) = (Packed::new(4), Arena::new(64));
    let (mut driver, mut device) = (driver(&ring, DIRECT), device(&ring, DIRECT));
    let mut parts = Chain::new([Part::default(); 1]);
    for on in [true, false, true, true, false, false, true] {
        driver.set_notify(on);
        device.set_notify(on);
        assert_eq!(events(&ring), [0, u16::from(!on), 0, u16::from(!on)]);
        driver.post(&[segment(0, 1)], 1, 0).unwrap();
        assert_eq!(driver.publish(), on);
        // Nothing new, nothing to tell.
        assert!(!driver.publish());
        device.pop_each(&arena, &mut parts, 1, |_| Verdict::Done(0)).unwrap();
        assert_eq!(device.publish(), on);
        assert!(!device.publish());
        driver.poll_each(1, |_| ());
    }
}

#[test]
fn event_suppression_by_descriptor() {
    // §2.8.14: the offset in bits 0 to 14, the wrap counter in bit 15; DESC is 2.
    let (ring, arena) = (Packed::new(3), Arena::new(64));
    let (mut driver, mut device) = (driver(&ring, EVENTS), device(&ring, EVENTS));
    let mut parts = Chain::new([Part::default(); 1]);
    assert_eq!(events(&ring), [0, 0, 0, 0]);
    for round in 0..20u16 {
        let wrap = u16::from((round / 3).is_multiple_of(2));
        let next = wrap << 15 | (round % 3);
        driver.set_notify(true);
        device.set_notify(true);
        assert_eq!(events(&ring), [next, 2, next, 2]);
        driver.post(&[segment(0, 1)], 1, 0).unwrap();
        assert!(driver.publish());
        device.pop_each(&arena, &mut parts, 1, |_| Verdict::Done(0)).unwrap();
        assert!(device.publish());
        assert_eq!(poll(&mut driver).len(), 1);
        if round % 4 == 0 {
            driver.set_notify(false);
            device.set_notify(false);
            assert_eq!(events(&ring), [0, 1, 0, 1]);
        }
    }
    // A wish for what was added already, and one for the same place a lap later: no notification for either.
    for off in [1 | 1 << 15, 2 | 1 << 15] {
        let ring = Packed::new(3);
        let mut driver = self::driver(&ring, EVENTS);
        driver.post_each(Direction::Readable, [(segment(0, 1), 0); 2]);
        driver.publish();
        ring.device_event()[0].store(off, SeqCst);
        ring.device_event()[1].store(2, SeqCst);
        driver.post(&[segment(0, 1)], 1, 0).unwrap();
        assert_eq!(driver.publish(), off & 0x7fff == 2);
    }
    // The reserved value of the flags, and reserved bits beside DISABLE.
    for (flags, wanted) in [(3, true), (0x7ffd, false), (0xfffc, true)] {
        let ring = Packed::new(3);
        let mut driver = self::driver(&ring, EVENTS);
        ring.device_event()[1].store(flags, SeqCst);
        driver.post(&[segment(0, 1)], 1, 0).unwrap();
        assert_eq!(driver.publish(), wanted, "{flags:#x}");
    }
}

#[test]
fn a_device_goes_on_where_another_one_stopped() {
    // Two popped and completed, two more popped: those are popped again, in a lap that has just begun, by the base alone.
    let (ring, arena) = (Packed::new(3), Arena::new(64));
    let (mut driver, mut first) = (driver(&ring, DIRECT), device(&ring, DIRECT));
    let mut parts = Chain::new([Part::default(); 2]);
    assert_eq!(first.base(), Base::START);
    assert_eq!(Base::START.encode(), 0x8000_8000);
    driver.post_each(Direction::Writable, (0..2).map(|i| (segment(i, 8), i)));
    driver.publish();
    first.pop_each(&arena, &mut parts, 9, |_| Verdict::Done(1)).unwrap();
    first.publish();
    assert_eq!(first.base().encode(), 0x8002_8002);
    assert_eq!(poll(&mut driver), [(0, 1), (1, 1)]);
    driver.post(&[segment(2, 8)], 0, 2).unwrap();
    driver.post(&[segment(3, 8), segment(4, 8)], 1, 3).unwrap();
    driver.publish();
    let taken: Vec<_> = std::iter::from_fn(|| first.pop(&arena, &mut parts).unwrap()).collect();
    assert_eq!((taken.len(), first.outstanding()), (2, 2));
    let base = first.base();
    // Available: position 2 of the next lap, whose counter is 0. Used: position 2 of this one.
    assert_eq!(base.encode(), 0x8002_0002);
    assert_eq!(Base::decode(base.encode()), base);
    // One of the two is given back: the base says where.
    assert!(first.undo(taken[1]));
    assert_eq!(first.base().encode(), 0x8002_0000);

    let mut second = device_at(&ring, DIRECT, Base::decode(0x8002_0002));
    let mut seen = vec![];
    second
        .pop_each(&arena, &mut parts, 9, |popped| {
            assert_eq!(popped.fault, None);
            seen.push((popped.readable_len(), popped.writable_len()));
            Verdict::Done(5)
        })
        .unwrap();
    assert_eq!(seen, [(0, 8), (8, 8)]);
    second.publish();
    assert_eq!(second.base().encode(), 0x0002_0002);
    assert_eq!(poll(&mut driver), [(2, 5), (3, 5)]);
    assert_eq!((driver.in_flight(), driver.anomalies().total()), (0, 0));
}
