#![cfg(not(loom))]
//! The other side keeps to no rule: a million steps of it on each side (VIRTIO_RING_STEPS), from one seed
//! (VIRTIO_RING_SEED). No panic, no access outside, no loop without end, nothing handed out twice; all of it counted.

mod common;

use common::{Arena, Posting, Random, Rings, seed, set_desc, steps};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering::SeqCst;
use virtio_ring::split::{Device, Driver, Options, Table, Verdict};
use virtio_ring::{Anomalies, Chain, Direction, Error, Part, Segment, Slot};

fn options(random: &Random) -> Options {
    Options {
        event_idx: random.one_in(2),
        in_order: random.one_in(2),
        indirect: random.one_in(2),
    }
}

fn add(into: &mut Anomalies, from: Anomalies) {
    into.id_out_of_range += from.id_out_of_range;
    into.id_not_in_flight += from.id_not_in_flight;
    into.out_of_order += from.out_of_order;
    into.length += from.length;
    into.index_jump += from.index_jump;
    into.head_out_of_range += from.head_out_of_range;
    into.chain += from.chain;
}

/// A number that is likely to be near an edge.
fn edgy(random: &Random, size: u16) -> u16 {
    match random.below(6) {
        0 => 0,
        1 => size - 1,
        2 => size,
        3 => u16::MAX,
        _ => random.next() as u16,
    }
}

/// Bytes of a region of the device's memory: all of it in one, or in several, down to some of which an indirect table is
/// over more than two.
const REGIONS: [u64; 4] = [u64::MAX, 1 << 10, 100, 7];

#[test]
fn a_driver_facing_any_used_ring() {
    let total = steps(1_000_000);
    let random = Random::new(seed());
    let mut seen = Anomalies::default();
    let (mut done, mut queues, mut taken, mut broken) = (0, 0u64, 0u64, 0u64);
    while done < total {
        queues += 1;
        let size = 1u16 << (1 + random.below(8));
        let options = options(&random);
        let rings = Rings::new(size);
        let tables = Arena::new(16 * 8 * 512);
        let index = random.next() as u16;
        // SAFETY: the rings outlive the driver, and only atomics touch them.
        let mut driver = unsafe {
            Driver::starting_at(rings.memory(), size, options, vec![Slot::default(); size.into()], index).unwrap()
        };
        // What is in flight: its bytes for writing.
        let mut flight = BTreeMap::<u64, u32>::new();
        let mut next = 0u64;
        let honest = random.below(4);
        for _ in 0..random.below(2000).min(total - done) {
            done += 1;
            let segment = |_| Segment {
                addr: random.next(),
                len: 1 + random.below(3000) as u32,
            };
            match random.below(8) {
                0 => {
                    let chain: Vec<_> = (0..1 + random.below(5)).map(segment).collect();
                    let readable = random.below(6) as usize;
                    let writable = chain.iter().skip(readable).map(|segment| segment.len).sum();
                    let added = if options.indirect && random.one_in(2) {
                        let at = (next % 512) * 128;
                        // SAFETY: inside the arena.
                        let ptr = unsafe { tables.0.base().add(at as usize) };
                        // SAFETY: 512 tables of 8 entries, more than are in flight.
                        unsafe {
                            driver.add_indirect(
                                Table {
                                    ptr,
                                    addr: at,
                                    entries: 8,
                                },
                                &chain,
                                readable,
                                next,
                            )
                        }
                    } else {
                        driver.post(&chain, readable, next)
                    };
                    if added.is_ok() {
                        flight.insert(next, writable);
                        next += 1;
                    }
                }
                1 => {
                    let writable = random.one_in(2);
                    let direction = if writable {
                        Direction::Writable
                    } else {
                        Direction::Readable
                    };
                    let buffers: Vec<_> = (0..random.below(20)).map(|i| (segment(i), next + i)).collect();
                    let added = driver.post_each(direction, buffers.iter().copied());
                    flight.extend(
                        buffers[..added]
                            .iter()
                            .map(|(segment, id)| (*id, if writable { segment.len } else { 0 })),
                    );
                    next += added as u64;
                }
                2 => drop(driver.publish()),
                3 => drop(driver.set_notify(random.one_in(2))),
                4 | 5 => {
                    // The device writes what it likes.
                    let at = random.next() as u16;
                    let id = match random.below(3) {
                        0 => random.next() as u32,
                        1 => edgy(&random, size).into(),
                        _ => random.below(size.into()) as u32,
                    };
                    let len = if random.one_in(2) {
                        random.below(100) as u32
                    } else {
                        random.next() as u32
                    };
                    rings.set_used_ring(at, (id, len));
                    if random.one_in(4) {
                        rings.avail_event().store(random.next() as u16, SeqCst);
                        rings.used_flags().store(random.next() as u16, SeqCst);
                    }
                    // And says how far it is: a step forward, mostly, or anything.
                    let idx = rings.used_idx().load(SeqCst);
                    let step = if random.one_in(100 + 1000 * honest) {
                        edgy(&random, size)
                    } else {
                        let left = rings.avail_idx().load(SeqCst).wrapping_sub(idx);
                        random.below(4).min(u64::from(left.min(size))) as u16
                    };
                    for position in (0..step.min(size)).map(|i| idx.wrapping_add(i)) {
                        // Mostly as a device that works in order would.
                        if honest > 0 && !random.one_in(16 * honest) {
                            let len = if random.one_in(8) {
                                random.next()
                            } else {
                                random.below(2)
                            };
                            let head = rings.avail_ring(position).load(SeqCst);
                            rings.set_used_ring(position, (head.into(), len as u32));
                        }
                    }
                    rings.used_idx().store(idx.wrapping_add(step), SeqCst);
                    if random.one_in(50) {
                        // Even what only the driver may write.
                        rings.avail_ring(at).store(random.next() as u16, SeqCst);
                        rings.set_desc(
                            random.below(size.into()) as u16,
                            (random.next(), 1, 1, random.next() as u16),
                        );
                        rings.avail_idx().store(random.next() as u16, SeqCst);
                    }
                }
                _ => {
                    let mut n = 0;
                    let max = random.below(20) as usize;
                    let polled = driver.poll_each(max, |completion| {
                        n += 1;
                        // In flight once, and never longer than posted.
                        let posted = flight.remove(&completion.cookie).expect("a cookie that is in flight");
                        assert!(completion.len <= posted);
                    });
                    assert_eq!(polled, n);
                    assert!(polled <= max);
                    taken += n as u64;
                }
            }
            assert_eq!(usize::from(driver.in_flight()), flight.len());
            assert!(driver.free() <= size);
            if driver.is_broken() {
                broken += 1;
                assert_eq!(driver.post(&[segment(0)], 0, 0), Err(Error::Broken));
                assert_eq!(driver.poll_each(9, |_| ()), 0);
                break;
            }
        }
        let anomalies = driver.anomalies();
        assert_eq!(driver.is_broken(), anomalies.index_jump + anomalies.out_of_order > 0);
        driver.detach(|cookie| {
            flight.remove(&cookie).expect("a cookie that is in flight");
        });
        assert!(flight.is_empty(), "{flight:?} were lost");
        assert_eq!(
            (driver.free(), driver.in_flight(), driver.is_broken()),
            (size, 0, false)
        );
        assert_eq!(driver.anomalies(), anomalies);
        add(&mut seen, anomalies);
    }
    println!("{done} steps, {queues} queues of which {broken} broke, {taken} chains taken, {seen:?}");
    if total >= 100_000 {
        // The test is one: everything that it is about did happen.
        assert!(taken > 0 && broken > 0);
        for count in [
            seen.id_out_of_range,
            seen.id_not_in_flight,
            seen.out_of_order,
            seen.length,
            seen.index_jump,
        ] {
            assert!(count > 0, "{seen:?}");
        }
    }
}

/// An address that the arena has, mostly.
fn address(random: &Random, arena: &Arena) -> (u64, u32) {
    let bytes = arena.0.len() as u64;
    match random.below(24) {
        0 => (random.next(), random.next() as u32),
        1 => (Arena::START + bytes - random.below(64), random.below(128) as u32),
        2 => (u64::MAX - random.below(64), random.below(128) as u32),
        3 => (Arena::START + random.below(bytes), 0),
        // A table that may be one.
        4..=9 => (Arena::START + 16 * random.below(64), 16 * (1 + random.below(4)) as u32),
        _ => (Arena::START + random.below(bytes / 2), 1 + random.below(1500) as u32),
    }
}

fn descriptor(random: &Random, arena: &Arena, size: u16) -> (u64, u32, u16, u16) {
    let (addr, len) = address(random, arena);
    let flags = match random.below(16) {
        0 => random.next() as u16,
        1..=3 => 4,
        4..=7 => 1,
        8 | 9 => 1 | 2,
        10..=12 => 2,
        _ => 0,
    };
    let next = if random.one_in(8) {
        edgy(random, size)
    } else {
        random.below(size.into()) as u16
    };
    (addr, len, flags, next)
}

#[test]
fn a_device_facing_any_driver() {
    let total = steps(1_000_000);
    let random = Random::new(seed() ^ 0xd);
    let mut seen = Anomalies::default();
    let (mut done, mut queues, mut good, mut broken) = (0, 0u64, 0u64, 0u64);
    let mut faults = BTreeMap::<String, u64>::new();
    while done < total {
        queues += 1;
        let size = 1u16 << (1 + random.below(8));
        let options = options(&random);
        let (rings, arena) = (
            Rings::new(size),
            Arena::of_regions(1 << 14, REGIONS[random.below(4) as usize]),
        );
        let index = random.next() as u16;
        rings.avail_idx().store(index, SeqCst);
        rings.used_idx().store(index, SeqCst);
        // SAFETY: the rings outlive the device, and only atomics touch them.
        let mut device = unsafe { Device::new(rings.memory(), size, options, index).unwrap() };
        let storage = 1 + random.below(u64::from(size)) as usize;
        let mut chain = Chain::new(vec![Part::default(); storage]);
        let mut out = vec![];
        // How far the driver's index is, as a count.
        let mut offered = 0u64;
        let (mut announced, mut popped) = (0u64, 0u64);
        for _ in 0..random.below(2000).min(total - done) {
            done += 1;
            let mut check = |readable: &[Part], writable: &[Part], fault: Option<virtio_ring::Fault>| {
                let parts = readable.iter().chain(writable);
                let (mut n, mut bytes) = (0, 0u64);
                for part in parts {
                    assert!(
                        part.len > 0 && arena.contains(part.ptr, part.len),
                        "{part:?} is outside"
                    );
                    n += 1;
                    bytes += u64::from(part.len);
                }
                assert!(n <= usize::from(size) && bytes <= u64::from(u32::MAX));
                assert_eq!(fault.is_some(), n == 0);
                match fault {
                    Some(fault) => *faults.entry(format!("{fault:?}")).or_default() += 1,
                    None => good += 1,
                }
            };
            match random.below(8) {
                0 | 1 => {
                    // The driver writes what it likes, into the table or into what may be an indirect table.
                    for _ in 0..1 + random.below(8) {
                        let desc = descriptor(&random, &arena, size);
                        if random.one_in(2) {
                            rings.set_desc(random.below(size.into()) as u16, desc);
                        } else {
                            set_desc(&arena.0, 16 * random.below(64) as usize, desc);
                        }
                    }
                    if random.one_in(8) {
                        rings.used_event().store(random.next() as u16, SeqCst);
                        rings.avail_flags().store(random.next() as u16, SeqCst);
                        rings.used_idx().store(random.next() as u16, SeqCst);
                    }
                }
                2 | 3 => {
                    let idx = rings.avail_idx().load(SeqCst);
                    let step = if random.one_in(2000) {
                        edgy(&random, size)
                    } else {
                        random.below(4).min(u64::from(size) - offered.min(size.into())) as u16
                    };
                    for i in 0..step.min(size) {
                        let head = if random.one_in(5000) {
                            edgy(&random, size)
                        } else {
                            random.below(size.into()) as u16
                        };
                        rings.avail_ring(idx.wrapping_add(i)).store(head, SeqCst);
                    }
                    rings.avail_idx().store(idx.wrapping_add(step), SeqCst);
                    offered += u64::from(step);
                    announced += u64::from(step);
                }
                4 => match device.pop(&arena, &mut chain) {
                    Ok(Some(head)) => {
                        check(chain.readable(), chain.writable(), chain.fault());
                        assert!(chain.readable().len() + chain.writable().len() <= storage);
                        popped += 1;
                        out.push(head);
                    }
                    Ok(None) => assert!(!device.is_broken()),
                    Err(error) => assert_eq!((error, device.is_broken()), (Error::Broken, true)),
                },
                5 => {
                    // With IN_ORDER what is kept goes first.
                    let keep = options.in_order && !out.is_empty();
                    let (max, stop) = (random.below(20) as usize, random.below(20));
                    let (mut n, mut kept) = (0, out.len());
                    let result = device.pop_each(&arena, &mut chain, max, |popped| {
                        check(popped.readable, popped.writable, popped.fault);
                        assert!(popped.readable_len() as u64 + u64::from(popped.writable_len()) <= u64::from(u32::MAX));
                        n += 1;
                        if n > stop {
                            return Verdict::Stop;
                        }
                        if keep || random.one_in(4) || (options.in_order && kept < out.len()) {
                            out.push(popped.head);
                            return Verdict::Keep;
                        }
                        kept = out.len();
                        Verdict::Done(popped.writable_len())
                    });
                    let taken = n.min(stop);
                    popped += taken;
                    assert!(n as usize <= max);
                    match result {
                        Ok(count) => assert_eq!(count as u64, taken),
                        Err(error) => assert_eq!((error, device.is_broken()), (Error::Broken, true)),
                    }
                    // What was done leaves room for the driver.
                    offered = offered.saturating_sub(taken);
                }
                6 => {
                    while let Some(head) = (!out.is_empty()).then(|| out.remove(0)) {
                        device.push(head, random.next() as u32);
                        offered = offered.saturating_sub(1);
                    }
                }
                _ => {
                    device.publish();
                    device.set_notify(random.one_in(2));
                }
            }
            assert!(device.outstanding() <= size);
            assert!(popped <= announced);
            if device.is_broken() {
                broken += 1;
                assert!(!device.has_available());
                assert_eq!(device.pop(&arena, &mut chain), Err(Error::Broken));
                break;
            }
        }
        let anomalies = device.anomalies();
        assert_eq!(
            device.is_broken(),
            anomalies.index_jump + anomalies.head_out_of_range > 0
        );
        add(&mut seen, anomalies);
    }
    println!("{done} steps, {queues} queues of which {broken} broke, {good} good chains, {faults:?}, {seen:?}");
    assert_eq!(faults.values().sum::<u64>(), seen.chain);
    if total >= 100_000 {
        assert!(good > 0 && broken > 0 && seen.index_jump > 0 && seen.head_out_of_range > 0);
        // Every fault; the sum of 2^32 bytes is too rare to count on.
        faults.remove("TooManyBytes");
        assert_eq!(faults.len(), 11, "{faults:?}");
    }
}
