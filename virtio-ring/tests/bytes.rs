#![cfg(not(loom))]
//! What is written where: literal bytes, from the structures of virtio 1.3 §2.7.

mod common;

use common::{Arena, Posting, Rings, set_desc};
use std::sync::atomic::Ordering::SeqCst;
use virtio_ring::split::{Device, Driver, Options, Table, Verdict};
use virtio_ring::{Chain, Completion, Direction, Error, Part, Segment, Slot};

const DIRECT: Options = Options {
    event_idx: false,
    in_order: false,
    indirect: false,
};

fn driver(rings: &Rings, options: Options) -> Driver<Vec<Slot>> {
    let size = rings.layout.size;
    // SAFETY: the rings outlive every use in these tests, and only atomics touch them.
    unsafe { Driver::new(rings.memory(), size, options, vec![Slot::default(); size.into()]).unwrap() }
}

fn device(rings: &Rings, options: Options) -> Device {
    // SAFETY: as above.
    unsafe { Device::new(rings.memory(), rings.layout.size, options, 0).unwrap() }
}

#[test]
fn a_chain_as_it_lies_in_memory() {
    let rings = Rings::new(4);
    let mut driver = driver(&rings, DIRECT);
    let chain = [
        Segment {
            addr: 0x1122_3344_5566_7788,
            len: 0x0c,
        },
        Segment {
            addr: 0x2000,
            len: 0x5dc,
        },
        Segment {
            addr: 0x3000,
            len: 0x800,
        },
    ];
    driver.post(&chain, 2, 77).unwrap();
    assert!(driver.publish());
    #[rustfmt::skip]
    assert_eq!(rings.block.bytes(rings.layout.desc, 48), [
        0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0x0c, 0, 0, 0, /* NEXT */ 1, 0, /* next */ 1, 0,
        0x00, 0x20, 0, 0, 0, 0, 0, 0, 0xdc, 0x05, 0, 0, /* NEXT */ 1, 0, /* next */ 2, 0,
        0x00, 0x30, 0, 0, 0, 0, 0, 0, 0x00, 0x08, 0, 0, /* WRITE */ 2, 0, 0, 0,
    ]);
    // flags, idx, ring[0]: the head is descriptor 0.
    assert_eq!(rings.block.bytes(rings.layout.avail, 6), [0, 0, 1, 0, 0, 0]);

    let arena = Arena::new(16);
    let mut device = device(&rings, DIRECT);
    let mut parts = Chain::new([Part::default(); 4]);
    // The addresses are nobody's: the chain comes out empty, and is completed all the same.
    let head = device.pop(&arena, &mut parts).unwrap().unwrap();
    assert_eq!(parts.fault(), Some(virtio_ring::Fault::Untranslated));
    device.push(head, 0x123);
    assert!(device.publish());
    // flags, idx, ring[0].id, ring[0].len
    assert_eq!(
        rings.block.bytes(rings.layout.used, 12),
        [0, 0, 1, 0, 0, 0, 0, 0, 0x23, 0x01, 0, 0]
    );
    let mut seen = vec![];
    driver.poll_each(9, |completion| seen.push(completion));
    assert_eq!(seen, [Completion { cookie: 77, len: 0x123 }]);
    assert_eq!((driver.free(), driver.in_flight()), (4, 0));
}

#[test]
fn an_indirect_table_as_it_lies_in_memory() {
    let rings = Rings::new(4);
    let options = Options {
        indirect: true,
        ..DIRECT
    };
    let mut driver = driver(&rings, options);
    let arena = Arena::new(4096);
    let table = Table {
        ptr: arena.0.base(),
        addr: Arena::START,
        entries: 3,
    };
    let chain = [
        Segment {
            addr: Arena::START + 256,
            len: 12,
        },
        Segment {
            addr: Arena::START + 512,
            len: 100,
        },
        Segment {
            addr: Arena::START + 1024,
            len: 1000,
        },
    ];
    // SAFETY: the table is the arena's first 48 bytes.
    unsafe { driver.add_indirect(table, &chain, 1, 5).unwrap() };
    driver.publish();
    // INDIRECT, 48 bytes.
    assert_eq!(rings.desc(0), (Arena::START, 48, 4, 0));
    #[rustfmt::skip]
    assert_eq!(arena.0.bytes(0, 48), [
        0, 1, 0, 0, 0x10, 0, 0, 0, 12, 0, 0, 0, 1, 0, 1, 0,
        0, 2, 0, 0, 0x10, 0, 0, 0, 100, 0, 0, 0, 3, 0, 2, 0,
        0, 4, 0, 0, 0x10, 0, 0, 0, 0xe8, 3, 0, 0, 2, 0, 0, 0,
    ]);
    let mut device = device(&rings, options);
    let mut parts = Chain::new([Part::default(); 3]);
    let head = device.pop(&arena, &mut parts).unwrap().unwrap();
    assert_eq!(
        (parts.fault(), parts.readable_len(), parts.writable_len()),
        (None, 12, 1100)
    );
    assert_eq!(parts.readable()[0].ptr.as_ptr(), arena.0.at(256));
    assert_eq!(
        parts
            .writable()
            .iter()
            .map(|part| part.ptr.as_ptr())
            .collect::<Vec<_>>(),
        [arena.0.at(512), arena.0.at(1024)]
    );
    device.push(head, 1100);
    device.publish();
    assert_eq!(
        driver.poll_each(1, |done| assert_eq!(done, Completion { cookie: 5, len: 1100 })),
        1
    );
}

#[test]
fn direct_descriptors_before_an_indirect_one() {
    // §2.7.5.3.2: the device must handle them, and must ignore WRITE beside INDIRECT. The table is at an odd address.
    let rings = Rings::new(4);
    let arena = Arena::new(4096);
    rings.set_desc(2, (Arena::START + 100, 10, 1, 3));
    rings.set_desc(3, (Arena::START + 1, 32, 4 | 2, 0));
    let mut table = vec![0u8; 32];
    table[..8].copy_from_slice(&(Arena::START + 200).to_le_bytes());
    table[8..16].copy_from_slice(&[20, 0, 0, 0, 1, 0, 1, 0]);
    table[16..24].copy_from_slice(&(Arena::START + 300).to_le_bytes());
    table[24..].copy_from_slice(&[30, 0, 0, 0, 2, 0, 0, 0]);
    arena.0.fill(1, &table);
    rings.avail_ring(0).store(2, SeqCst);
    rings.avail_idx().store(1, SeqCst);
    let mut device = device(
        &rings,
        Options {
            indirect: true,
            ..DIRECT
        },
    );
    let mut parts = Chain::new([Part::default(); 4]);
    let head = device.pop(&arena, &mut parts).unwrap().unwrap();
    assert_eq!((head.index(), parts.fault()), (2, None));
    assert_eq!((parts.readable_len(), parts.writable_len()), (30, 30));
}

#[test]
fn in_order_the_available_ring_is_written_once() {
    let rings = Rings::new(8);
    let options = Options {
        in_order: true,
        ..DIRECT
    };
    let mut driver = driver(&rings, options);
    let mut device = device(&rings, options);
    let arena = Arena::new(64);
    let mut parts = Chain::new([Part::default(); 1]);
    for round in 0..50u16 {
        let buffers = (0..3u64).map(|i| {
            (
                Segment {
                    addr: Arena::START,
                    len: 64,
                },
                i,
            )
        });
        assert_eq!(driver.post_each(Direction::Readable, buffers), 3);
        driver.publish();
        device.pop_each(&arena, &mut parts, 9, |_| Verdict::Done(0)).unwrap();
        // One element for the batch: at the position of its first, with the id of its last (§2.7.9).
        let first = round * 3;
        assert_eq!(rings.used_ring(first), (u32::from((first + 2) % 8), 0));
        device.publish();
        assert_eq!(rings.used_idx().load(SeqCst), first + 3);
        let mut cookies = vec![];
        driver.poll_each(9, |done| cookies.push(done.cookie));
        assert_eq!(cookies, [0, 1, 2]);
    }
    assert!((0..8).all(|i| rings.avail_ring(i).load(SeqCst) == i));
    // A mark that a store would remove stays.
    rings.avail_ring(6).store(0x7777, SeqCst);
    driver.post_each(Direction::Readable, [(Segment { addr: 1, len: 1 }, 0); 8]);
    driver.publish();
    assert_eq!(rings.avail_ring(6).load(SeqCst), 0x7777);
}

#[test]
fn in_order_batches_of_writable_buffers() {
    // A device that skips elements: those skipped were used completely, the last says its length (§2.7.9).
    let rings = Rings::new(8);
    let mut driver = driver(
        &rings,
        Options {
            in_order: true,
            ..DIRECT
        },
    );
    driver.post_each(Direction::Readable, (0..2).map(|i| (Segment { addr: 1, len: 10 }, i)));
    driver.publish();
    rings.used_idx().store(2, SeqCst);
    assert_eq!(driver.poll_each(1, |done| assert_eq!(done.cookie, 0)), 1);
    // Now something writable, while a completion is known but not taken, whose element was never written.
    driver.post_each(Direction::Writable, (2..7).map(|i| (Segment { addr: 1, len: 100 }, i)));
    driver.publish();
    rings.set_used_ring(2, (5, 60));
    rings.set_used_ring(6, (6, 70));
    rings.used_idx().store(7, SeqCst);
    let mut seen = vec![];
    // The batch is cut by the limit, and goes on.
    for _ in 0..4 {
        driver.poll_each(2, |done| seen.push((done.cookie, done.len)));
    }
    assert_eq!(seen, [(1, 0), (2, 100), (3, 100), (4, 100), (5, 60), (6, 70)]);
    assert_eq!(
        (driver.free(), driver.anomalies().total(), driver.is_broken()),
        (8, 0, false)
    );
}

#[test]
fn event_words_stay_untouched_without_the_feature() {
    let rings = Rings::new(4);
    rings.used_event().store(0xabcd, SeqCst);
    rings.avail_event().store(0xabcd, SeqCst);
    let mut driver = driver(&rings, DIRECT);
    let mut device = device(&rings, DIRECT);
    let (arena, mut parts) = (Arena::new(64), Chain::new([Part::default(); 1]));
    for on in [true, false, true] {
        driver.set_notify(on);
        device.set_notify(on);
        assert_eq!(rings.avail_flags().load(SeqCst), u16::from(!on));
        assert_eq!(rings.used_flags().load(SeqCst), u16::from(!on));
        driver
            .post(
                &[Segment {
                    addr: Arena::START,
                    len: 1,
                }],
                1,
                0,
            )
            .unwrap();
        assert_eq!(driver.publish(), on);
        device.pop_each(&arena, &mut parts, 1, |_| Verdict::Done(0)).unwrap();
        assert_eq!(device.publish(), on);
        driver.poll_each(1, |_| ());
    }
    assert_eq!(
        (rings.used_event().load(SeqCst), rings.avail_event().load(SeqCst)),
        (0xabcd, 0xabcd)
    );
}

#[test]
fn every_fault_by_its_name() {
    use virtio_ring::Fault::*;
    let (next, write, indirect) = (1, 2, 4);
    let a = Arena::START;
    // Descriptor 0 is the head; the table at the arena's start is filled from the second list.
    type Desc = (u64, u32, u16, u16);
    let cases: &[(virtio_ring::Fault, &[Desc], &[Desc])] = &[
        (NextOutOfRange, &[(a, 1, next, 4)], &[]),
        (
            NextOutOfRange,
            &[(a, 32, indirect, 0)],
            &[(a, 1, next, 2), (a, 1, 0, 0)],
        ),
        (TooManyDescriptors, &[(a, 1, next, 0)], &[]),
        (TooManyDescriptors, &[(a, 1, next, 1), (a, 1, next, 0)], &[]),
        (TooManyDescriptors, &[(a, 16, indirect, 0)], &[(a, 1, next, 0)]),
        (
            TooManySegments,
            &[(a, 1, next, 1), (a, 1, next, 2), (a, 1, next, 3), (a, 1, 0, 0)],
            &[],
        ),
        (TooManyBytes, &[(a, 4096, next, 1), (a, u32::MAX - 4095, 0, 0)], &[]),
        (
            IndirectInIndirect,
            &[(a, 16, indirect, 0)],
            &[(a + 256, 16, indirect, 0)],
        ),
        (
            IndirectWithNext,
            &[(a, 16, indirect | next, 1), (a, 1, 0, 0)],
            &[(a, 1, 0, 0)],
        ),
        (IndirectSize, &[(a, 0, indirect, 0)], &[]),
        (IndirectSize, &[(a, 17, indirect, 0)], &[(a, 1, 0, 0)]),
        (IndirectTooLarge, &[(a, 16 * 5, indirect, 0)], &[(a, 1, 0, 0)]),
        (ReadableAfterWritable, &[(a, 1, next | write, 1), (a, 1, 0, 0)], &[]),
        (ZeroLength, &[(a, 0, 0, 0)], &[]),
        (ZeroLength, &[(a, 1, next, 1), (a, 0, write, 0)], &[]),
        (Untranslated, &[(a + 4096, 1, 0, 0)], &[]),
        (Untranslated, &[(a + 4095, 2, write, 0)], &[]),
        (Untranslated, &[(u64::MAX, 2, 0, 0)], &[]),
        (Untranslated, &[(a - 16, 16, indirect, 0)], &[]),
    ];
    for (fault, chain, table) in cases {
        for single in [true, false] {
            let (rings, arena) = (Rings::new(4), Arena::new(4096));
            for (i, desc) in chain.iter().enumerate() {
                rings.set_desc(i as u16, *desc);
            }
            for (i, desc) in table.iter().enumerate() {
                set_desc(&arena.0, 16 * i, *desc);
            }
            // A good chain follows, in the same burst.
            rings.set_desc(3, if chain.len() == 4 { chain[3] } else { (a, 7, 0, 0) });
            rings.avail_ring(1).store(3, SeqCst);
            rings.avail_idx().store(2, SeqCst);
            let mut device = device(
                &rings,
                Options {
                    indirect: true,
                    ..DIRECT
                },
            );
            let storage = if *fault == TooManySegments { 3 } else { 4 };
            let mut parts = Chain::new(vec![Part::default(); storage]);
            let mut seen = vec![];
            if single {
                while let Some(head) = device.pop(&arena, &mut parts).unwrap() {
                    assert_eq!(
                        parts.fault().is_some(),
                        parts.readable().is_empty() && parts.writable().is_empty()
                    );
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
            assert_eq!(seen, [(0, Some(*fault)), (3, None)], "{chain:?} {table:?}");
            device.publish();
            assert_eq!((rings.used_ring(0), rings.used_ring(1)), ((0, 0), (3, 0)));
            assert_eq!((device.anomalies().chain, device.anomalies().total()), (1, 1));
            assert!(!device.is_broken());
        }
    }
    // Without the feature, an indirect descriptor is a fault of its own.
    let (rings, arena) = (Rings::new(4), Arena::new(4096));
    rings.set_desc(0, (a, 16, indirect, 0));
    rings.avail_idx().store(1, SeqCst);
    let mut parts = Chain::new([Part::default(); 4]);
    device(&rings, DIRECT).pop(&arena, &mut parts).unwrap().unwrap();
    assert_eq!(parts.fault(), Some(IndirectNotNegotiated));
}

#[test]
fn a_head_without_a_name_breaks_the_ring() {
    let (rings, arena) = (Rings::new(4), Arena::new(64));
    rings.set_desc(0, (Arena::START, 1, 0, 0));
    rings.avail_ring(1).store(4, SeqCst);
    rings.avail_idx().store(3, SeqCst);
    let mut device = device(&rings, DIRECT);
    let mut parts = Chain::new([Part::default(); 4]);
    let mut seen = 0;
    let popped = device.pop_each(&arena, &mut parts, 9, |_| {
        seen += 1;
        Verdict::Done(0)
    });
    assert_eq!((popped, seen), (Err(Error::Broken), 1));
    assert_eq!(device.pop(&arena, &mut parts), Err(Error::Broken));
    assert_eq!(
        (
            device.is_broken(),
            device.has_available(),
            device.anomalies().head_out_of_range
        ),
        (true, false, 1)
    );
    // What was completed before is published.
    device.publish();
    assert_eq!(rings.used_idx().load(SeqCst), 1);
}

#[test]
fn refusals_change_nothing() {
    let rings = Rings::new(4);
    let segment = Segment { addr: 0, len: 1 };
    // SAFETY: the rings outlive the call.
    let few = unsafe { Driver::new(rings.memory(), 4, DIRECT, vec![Slot::default(); 3]) };
    assert_eq!(few.err(), Some(Error::Slots { needed: 4, given: 3 }));
    let mut memory = rings.memory();
    // SAFETY: inside the block; the call refuses the memory before any use.
    memory.desc = unsafe { memory.desc.add(8) };
    // SAFETY: as above.
    let askew = unsafe { Driver::new(memory, 4, DIRECT, vec![Slot::default(); 4]) };
    assert!(matches!(askew.err(), Some(Error::Misaligned { align: 16, .. })));
    let mut driver = driver(&rings, DIRECT);
    assert_eq!(driver.post(&[], 0, 0), Err(Error::EmptySegment));
    assert_eq!(
        driver.post(&[Segment { addr: 0, len: 0 }], 0, 0),
        Err(Error::EmptySegment)
    );
    assert_eq!(driver.post(&[segment; 5], 0, 0), Err(Error::TooLong));
    let half = Segment { addr: 0, len: 1 << 31 };
    assert_eq!(driver.post(&[half; 2], 2, 0), Err(Error::TooLong));
    let arena = Arena::new(64);
    let table = Table {
        ptr: arena.0.base(),
        addr: Arena::START,
        entries: 4,
    };
    // SAFETY: the table is the arena.
    let refused = unsafe { driver.add_indirect(table, &[segment], 0, 0) };
    assert_eq!(refused, Err(Error::NotNegotiated));
    driver.post(&[segment; 3], 3, 0).unwrap();
    assert_eq!(driver.post(&[segment; 2], 2, 0), Err(Error::Full));
    assert_eq!((driver.free(), driver.in_flight()), (1, 1));
    assert_eq!(driver.post_each(Direction::Readable, [(segment, 1); 9]), 1);
    assert_eq!(driver.post_each(Direction::Readable, [(segment, 1); 9]), 0);
    // SAFETY: as for the driver. The driver's used.idx is 0.
    let ahead = unsafe { Device::new(rings.memory(), 4, DIRECT, 5) };
    assert_eq!(ahead.err(), Some(Error::Base { base: 5, used: 0 }));
}

/// DPDK's driver says WRITE of the header that it sends through a packed ring's table. What is readable after it tells
/// that it is not meant.
#[test]
fn a_packed_table_whose_header_says_write() {
    use virtio_ring::any::{Device, Driver, Format};
    let ring = common::Ring::new(Format::Packed, 4);
    let options = Options {
        indirect: true,
        ..DIRECT
    };
    // SAFETY: the ring lives to the end, and only atomics touch it.
    let mut driver = unsafe { Driver::new(ring.memory(), 4, options, vec![Slot::default(); 4]).unwrap() };
    let start = virtio_ring::packed::Base::START.encode();
    // SAFETY: as above.
    let mut device = unsafe { Device::new(ring.memory(), 4, options, start).unwrap() };
    let arena = Arena::new(4096);
    let table = Table {
        ptr: arena.0.base(),
        addr: Arena::START,
        entries: 3,
    };
    let chain = [(256, 12), (512, 100), (1024, 1000)].map(|(at, len)| Segment {
        addr: Arena::START + at,
        len,
    });
    // SAFETY: the table is the arena's first 48 bytes.
    unsafe { driver.add_indirect(table, &chain, 3, 5).unwrap() };
    arena.0.u16(14).store(2, SeqCst);
    driver.publish();
    let mut parts = Chain::new([Part::default(); 3]);
    assert!(device.pop(&arena, &mut parts).unwrap().is_some());
    assert_eq!(
        (parts.fault(), parts.readable_len(), parts.writable_len()),
        (None, 1112, 0)
    );
}
