#![cfg(not(loom))]
//! As `hostile.rs`, for a packed ring: a million steps of a peer that keeps to no rule, on each side (VIRTIO_RING_STEPS),
//! from one seed (VIRTIO_RING_SEED). No panic, no access outside, no loop without end, nothing handed out twice, nothing
//! lost; all of it counted.

mod common;

use common::{Arena, Packed, Posting, Random, seed, set_desc, steps, vectors};
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::Ordering::SeqCst;
use virtio_ring::packed::{Base, Device, Driver, Table, Verdict};
use virtio_ring::{Anomalies, Chain, Direction, Error, Fault, Options, Part, Segment, Single, Slot};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

fn options(random: &Random) -> Options {
    Options {
        event_idx: random.one_in(2),
        in_order: random.one_in(2),
        indirect: random.one_in(2),
    }
}

/// A power of two in half of the cases; every size from 2 to 10 comes up.
fn size(random: &Random) -> u16 {
    match random.below(4) {
        0 | 1 => 1 << (1 + random.below(8)),
        2 => 2 + random.below(9) as u16,
        _ => 2 + random.below(300) as u16,
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

/// The state of a descriptor, of any lap: available or used, with either wrap counter.
fn state(random: &Random) -> u16 {
    [0, AVAIL, USED, AVAIL | USED][random.below(4) as usize]
}

/// The peer's own account of where it is: a position, and the wrap counter there.
#[derive(Clone, Copy)]
struct Place {
    at: u16,
    wrap: bool,
}

impl Place {
    const START: Self = Self { at: 0, wrap: true };

    fn on(self, n: u16, size: u16) -> Self {
        let at = u32::from(self.at) + u32::from(n);
        Self {
            at: (at % u32::from(size)) as u16,
            wrap: self.wrap ^ !(at / u32::from(size)).is_multiple_of(2),
        }
    }

    fn available(self) -> u16 {
        if self.wrap { AVAIL } else { USED }
    }

    fn used(self) -> u16 {
        if self.wrap { AVAIL | USED } else { 0 }
    }
}

/// An event suppression structure as nobody should write it.
fn scribble_event(random: &Random, event: [&std::sync::atomic::AtomicU16; 2]) {
    event[0].store(random.next() as u16, SeqCst);
    let flags = if random.one_in(2) {
        random.below(4)
    } else {
        random.next()
    };
    event[1].store(flags as u16, SeqCst);
}

/// Bytes of a region of the device's memory: all of it in one, or in several, down to some of which an indirect table is
/// over more than two.
const REGIONS: [u64; 4] = [u64::MAX, 1 << 10, 100, 7];

#[test]
fn a_driver_facing_any_used_descriptor() {
    let total = steps(1_000_000);
    let random = Random::new(seed() ^ 0xbacced);
    let mut seen = Anomalies::default();
    let (mut done, mut queues, mut taken, mut broken, mut laps) = (0, 0u64, 0u64, 0u64, 0u64);
    while done < total {
        queues += 1;
        let (size, options) = (size(&random), options(&random));
        let ring = Packed::new(size);
        let tables = Arena::new(16 * 8 * 512);
        let slots = vec![Slot::default(); size.into()];
        // SAFETY: the ring outlives the driver, and only atomics touch it.
        let mut driver = unsafe { Driver::new(ring.memory(), size, options, slots).unwrap() };
        // What is in flight: its bytes for writing. And what a device that keeps to the rules would know of it: the ID and
        // the extent of each chain, in order.
        let mut flight = BTreeMap::<u64, u32>::new();
        let mut known = VecDeque::<(u16, u16)>::new();
        let (mut place, mut ahead) = (Place::START, Place::START);
        let mut next = 0u64;
        let honest = random.below(4);
        let segment = |_| Segment {
            addr: random.next(),
            len: 1 + random.below(3000) as u32,
        };
        for _ in 0..random.below(2000).min(total - done) {
            done += 1;
            match random.below(8) {
                0 => {
                    let chain: Vec<_> = (0..1 + random.below(5)).map(segment).collect();
                    let readable = random.below(6) as usize;
                    let writable = chain.iter().skip(readable).map(|segment| segment.len).sum();
                    let added = if options.indirect && random.one_in(2) {
                        let at = (next % 512) * 128;
                        // SAFETY: inside the arena.
                        let ptr = unsafe { tables.0.base().add(at as usize) };
                        let table = Table {
                            ptr,
                            addr: at,
                            entries: 8,
                        };
                        // SAFETY: 512 tables of 8 entries, more than are in flight.
                        unsafe { driver.add_indirect(table, &chain, readable, next) }
                    } else {
                        driver.post(&chain, readable, next)
                    };
                    if added.is_ok() {
                        assert_eq!(flight.insert(next, writable), None);
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
                2 => {
                    driver.publish();
                    // What a device sees now.
                    let mut extent = 0;
                    for _ in 0..size {
                        let (_, _, id, flags) = ring.desc(ahead.at);
                        if flags & (AVAIL | USED) != ahead.available() {
                            break;
                        }
                        extent += 1;
                        if flags & NEXT == 0 {
                            known.push_back((id, extent));
                            extent = 0;
                        }
                        ahead = ahead.on(1, size);
                    }
                }
                3 => drop(driver.set_notify(random.one_in(2))),
                4 | 5 => {
                    // The device writes what it likes.
                    if random.one_in(4 + 40 * honest) {
                        let id = match random.below(3) {
                            0 => random.next() as u16,
                            1 => edgy(&random, size),
                            _ => random.below(size.into()) as u16,
                        };
                        let at = if random.one_in(2) {
                            place.at
                        } else {
                            random.below(size.into()) as u16
                        };
                        let flags = match random.below(3) {
                            0 => random.next() as u16,
                            1 => place.used(),
                            _ => state(&random) | (random.next() as u16 & 7),
                        };
                        ring.set_desc(at, (random.next(), random.next() as u32, id, flags));
                    }
                    if random.one_in(8) {
                        scribble_event(&random, ring.device_event());
                    }
                    if random.one_in(100) {
                        // Even what only the driver may write.
                        scribble_event(&random, ring.driver_event());
                    }
                    // And goes on, mostly, as a device that works in order would.
                    for _ in 0..random.below(4) {
                        let batch = if options.in_order {
                            1 + random.below(3) as usize
                        } else {
                            1
                        };
                        if known.len() < batch {
                            break;
                        }
                        let which = if options.in_order || random.one_in(2) {
                            0
                        } else {
                            random.below(known.len() as u64) as usize
                        };
                        let mut extent = 0;
                        let mut id = 0;
                        for _ in 0..batch {
                            let chain = known.remove(which).expect("that many are known");
                            (id, extent) = (chain.0, extent + chain.1);
                        }
                        let len = if random.one_in(8) {
                            random.next()
                        } else {
                            random.below(2)
                        };
                        let write = if random.one_in(4) { 0 } else { WRITE };
                        let reserved = random.next() as u16 & !(AVAIL | USED | WRITE);
                        ring.set_desc(
                            place.at,
                            (random.next(), len as u32, id, place.used() | write | reserved),
                        );
                        place = place.on(extent, size);
                        laps += u64::from(place.at == 0);
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
                assert_eq!(driver.post_each(Direction::Readable, [(segment(0), 0)]), 0);
                assert_eq!(driver.poll_each(9, |_| ()), 0);
                break;
            }
        }
        let anomalies = driver.anomalies();
        let breaks = anomalies.id_out_of_range + anomalies.id_not_in_flight + anomalies.out_of_order;
        assert_eq!(breaks, u64::from(driver.is_broken()), "{anomalies:?}");
        driver.detach(|cookie| {
            flight.remove(&cookie).expect("a cookie that is in flight");
        });
        assert!(flight.is_empty(), "{flight:?} were lost");
        assert_eq!(
            (driver.free(), driver.in_flight(), driver.is_broken()),
            (size, 0, false)
        );
        assert_eq!(driver.anomalies(), anomalies);
        // Nothing of what was before is seen in the ring that begins anew.
        assert!((0..size).all(|i| ring.desc(i).3 == 0));
        assert_eq!(driver.post_each(Direction::Writable, [(segment(0), 7)]), 1);
        assert_eq!(driver.poll_each(9, |_| panic!("nothing was used")), 0);
        add(&mut seen, anomalies);
    }
    println!("{done} steps, {queues} queues of which {broken} broke, {laps} laps, {taken} chains taken, {seen:?}");
    if total >= 100_000 {
        // The test is one: everything that it is about did happen.
        assert!(taken > 0 && broken > 0 && laps > 0);
        for count in [
            seen.id_out_of_range,
            seen.id_not_in_flight,
            seen.out_of_order,
            seen.length,
        ] {
            assert!(count > 0, "{seen:?}");
        }
        assert_eq!((seen.index_jump, seen.head_out_of_range, seen.chain), (0, 0, 0));
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
        // So far outside that offsets overflow.
        4 if random.one_in(2) => (Arena::START + (1 << 63) - random.below(1 << 33), random.next() as u32),
        // A table that may be one, at any alignment.
        4..=9 => {
            let odd = if random.one_in(4) { random.below(16) } else { 0 };
            let entries = if random.one_in(8) {
                random.below(400)
            } else {
                1 + random.below(4)
            };
            (Arena::START + 16 * random.below(64) + odd, 16 * entries as u32)
        }
        _ => (Arena::START + random.below(bytes / 2), 1 + random.below(1500) as u32),
    }
}

/// Flags without the state.
fn flags(random: &Random) -> u16 {
    match random.below(16) {
        0 => random.next() as u16 & !(AVAIL | USED),
        1 => INDIRECT | NEXT,
        2..=4 => INDIRECT | (random.next() as u16 & WRITE),
        5..=7 => NEXT,
        8 | 9 => NEXT | WRITE,
        10..=12 => WRITE,
        _ => 0,
    }
}

#[test]
fn a_device_facing_any_driver() {
    let total = steps(1_000_000);
    let random = Random::new(seed() ^ 0xdbacced);
    let kinds = vectors();
    let mut seen = Anomalies::default();
    let (mut done, mut queues, mut good, mut groups, mut broken) = (0, 0u64, 0u64, 0u64, 0u64);
    let mut faults = BTreeMap::<String, u64>::new();
    while done < total {
        queues += 1;
        let (size, options) = (size(&random), options(&random));
        let (ring, arena) = (
            Packed::new(size),
            Arena::of_regions(1 << 14, REGIONS[random.below(4) as usize]),
        );
        // Any start that there can be, as vhost-user gives it.
        let mut place = Place {
            at: random.below(size.into()) as u16,
            wrap: random.one_in(2),
        };
        let start = place.at | u16::from(place.wrap) << 15;
        let base = Base {
            available: start,
            used: start,
        };
        for i in 0..size {
            // As the lap before left it.
            let lap = Place {
                at: i,
                wrap: place.wrap ^ (i >= place.at),
            };
            ring.set_desc(i, (0, 0, 0, lap.used()));
        }
        // SAFETY: the ring outlives the device, and only atomics touch it.
        let mut device = unsafe { Device::new(ring.memory(), size, options, base).unwrap() };
        device.set_vectors(kinds[random.below(kinds.len() as u64) as usize]);
        let storage = 1 + random.below(u64::from(size)) as usize;
        let mut chain = Chain::new(vec![Part::default(); storage]);
        let mut out = VecDeque::new();
        let honest = random.below(4);
        for _ in 0..random.below(2000).min(total - done) {
            done += 1;
            let mut check = |readable: &[Part], writable: &[Part], fault: Option<Fault>| {
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
            match random.below(9) {
                0 | 1 => {
                    // The driver writes what it likes: of any lap, anywhere; or into what may be an indirect table.
                    for _ in 0..1 + random.below(8) {
                        let (addr, len) = address(&random, &arena);
                        let (id, flags) = (edgy(&random, size), flags(&random));
                        if random.one_in(10 + 500 * honest) {
                            ring.set_desc(
                                random.below(size.into()) as u16,
                                (addr, len, id, flags | state(&random)),
                            );
                        } else {
                            set_desc(&arena.0, 16 * random.below(64) as usize, (addr, len, id, flags));
                        }
                    }
                    if random.one_in(8) {
                        scribble_event(&random, ring.driver_event());
                        scribble_event(&random, ring.device_event());
                    }
                }
                2..=4 => {
                    // And goes on where it is, mostly with as many as there is room for. That may overtake the device.
                    let room = if honest > 0 {
                        size - device.outstanding().min(size)
                    } else {
                        size
                    };
                    // A run of lone descriptors of one direction, mostly good: what vectors are for.
                    let run = (honest > 0 && random.one_in(4)).then(|| random.next() as u16 & WRITE);
                    let most = if run.is_some() { 20 } else { 5 };
                    for _ in 0..random.below(most).min(room.into()) {
                        let (_, _, _, before) = ring.desc(place.at);
                        if honest > 0 && before & (AVAIL | USED) == place.on(size, size).available() {
                            // The device has not used this one.
                            break;
                        }
                        let (addr, len) = address(&random, &arena);
                        let mut flags = flags(&random);
                        if honest > 1 && random.one_in(2) {
                            flags &= !NEXT;
                        }
                        if let Some(direction) = run
                            && !random.one_in(16)
                        {
                            flags = direction;
                        }
                        ring.set_desc(place.at, (addr, len, random.next() as u16, flags | place.available()));
                        place = place.on(1, size);
                    }
                }
                5 => match device.pop(&arena, &mut chain) {
                    Ok(Some(head)) => {
                        check(chain.readable(), chain.writable(), chain.fault());
                        assert!(chain.readable().len() + chain.writable().len() <= storage);
                        if random.one_in(16) {
                            assert!(device.undo(head));
                            if chain.fault().is_none() {
                                good -= 1;
                            }
                            // It will be counted again, as it will be popped again.
                        } else {
                            out.push_back(head);
                        }
                    }
                    Ok(None) => assert!(!device.is_broken()),
                    Err(error) => assert_eq!((error, device.is_broken()), (Error::Broken, true)),
                },
                6 => {
                    // With IN_ORDER what is kept goes first.
                    let keep = options.in_order && !out.is_empty();
                    let (max, stop) = (random.below(20) as usize, random.below(20) as usize);
                    let (mut n, mut kept) = (0, false);
                    let result = device.pop_each(&arena, &mut chain, max, |popped| {
                        check(popped.readable, popped.writable, popped.fault);
                        assert!(u64::from(popped.readable_len()) + u64::from(popped.writable_len()) < 1 << 32);
                        n += 1;
                        if n > stop {
                            return Verdict::Stop;
                        }
                        if keep || random.one_in(4) || (options.in_order && kept) {
                            kept = true;
                            out.push_back(popped.head);
                            return Verdict::Keep;
                        }
                        Verdict::Done(popped.writable_len())
                    });
                    assert!(n <= max);
                    match result {
                        Ok(count) => assert_eq!(count, n.min(stop)),
                        Err(error) => assert_eq!((error, device.is_broken()), (Error::Broken, true)),
                    }
                }
                7 => {
                    // The fast path, where nothing is kept.
                    if out.is_empty() {
                        let direction = if random.one_in(2) {
                            Direction::Readable
                        } else {
                            Direction::Writable
                        };
                        let mut singles = vec![Single::default(); random.below(20) as usize];
                        let n = device.peek_singles(&arena, direction, &mut singles);
                        for single in &mut singles[..n] {
                            assert!(single.len > 0 && arena.contains(single.ptr, single.len));
                            single.len = random.below(u64::from(single.len) + 1) as u32;
                        }
                        let n = random.below(n as u64 + 1) as usize;
                        let used = match direction {
                            Direction::Readable => device.use_read(&singles[..n]),
                            Direction::Writable => device.use_written(&singles[..n]),
                        };
                        assert_eq!(used, n);
                        groups += n as u64 / 4;
                        good += n as u64;
                    }
                }
                _ => {
                    while !out.is_empty() {
                        let which = if options.in_order {
                            0
                        } else {
                            random.below(out.len() as u64) as usize
                        };
                        let head = out.remove(which).expect("that many are out");
                        device.push(head, random.next() as u32);
                    }
                    device.publish();
                    device.set_notify(random.one_in(2));
                }
            }
            assert_eq!(usize::from(device.outstanding()), out.len());
            assert!(device.outstanding() <= size);
            let at = device.base();
            assert!((at.available & 0x7fff) < size && (at.used & 0x7fff) < size);
            if device.is_broken() {
                broken += 1;
                assert!(!device.has_available());
                assert_eq!(device.pop(&arena, &mut chain), Err(Error::Broken));
                let none = device.pop_each(&arena, &mut chain, 9, |_| panic!("the ring is broken"));
                assert_eq!(none, Err(Error::Broken));
                let mut singles = [Single::default(); 4];
                assert_eq!(device.peek_singles(&arena, Direction::Readable, &mut singles), 0);
                break;
            }
        }
        let anomalies = device.anomalies();
        assert_eq!(anomalies.index_jump, u64::from(device.is_broken()));
        // What is out can still be pushed.
        while let Some(head) = out.pop_front() {
            device.push(head, 0);
        }
        device.publish();
        assert_eq!(device.outstanding(), 0);
        add(&mut seen, anomalies);
    }
    println!("{done} steps, {queues} queues of which {broken} broke, {good} good chains, {faults:?}, {seen:?}");
    assert_eq!(faults.values().sum::<u64>(), seen.chain);
    assert_eq!(
        (seen.total(), seen.head_out_of_range),
        (seen.chain + seen.index_jump, 0)
    );
    if total >= 100_000 {
        assert!(good > 0 && groups > 0 && broken > 0);
        // Every fault that a packed ring has; the sum of 2^32 bytes is too rare to count on.
        faults.remove("TooManyBytes");
        let all = [
            "IndirectNotNegotiated",
            "IndirectSize",
            "IndirectTooLarge",
            "IndirectWithNext",
            "ReadableAfterWritable",
            "TooManySegments",
            "Untranslated",
            "ZeroLength",
        ];
        assert_eq!(faults.into_keys().collect::<Vec<_>>(), all);
    }
}
