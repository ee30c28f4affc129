#![cfg(all(not(loom), target_arch = "x86_64"))]
//! Bursts with vector instructions against the same bursts without: the scalar code is the oracle.

mod common;

use common::{Arena, Packed, Posting, Random, Ring, seed, vectors};
use std::ptr::NonNull;
use virtio_ring::any::{Device, Driver, Format};
use virtio_ring::{Direction, Options, Segment, Single, Slot, Translate, Window, packed};

/// Two regions, apart for the driver and here.
struct Regions([Arena; 2]);

impl Regions {
    const SECOND: u64 = 0x7000_0000_0000;

    fn windows(&self) -> [Window; 2] {
        let window = |arena: &Arena, theirs| Window {
            theirs,
            len: arena.0.len() as u64,
            ours: arena.0.base(),
        };
        [window(&self.0[0], Arena::START), window(&self.0[1], Self::SECOND)]
    }
}

// SAFETY: only memory of the arenas is given out.
unsafe impl Translate for Regions {
    fn translate(&self, addr: u64, len: u32) -> Option<NonNull<u8>> {
        let window = self.window(addr)?;
        let offset = addr - window.theirs;
        // SAFETY: below the length.
        (offset + u64::from(len) <= window.len).then(|| unsafe { window.ours.add(offset as usize) })
    }

    fn window(&self, addr: u64) -> Option<Window> {
        self.windows()
            .into_iter()
            .find(|window| addr.wrapping_sub(window.theirs) < window.len)
    }
}

/// A segment that is good, mostly.
fn segment(random: &Random, regions: &Regions) -> Segment {
    let [first, second] = regions.windows();
    let window = if random.one_in(20) { second } else { first };
    let (addr, len) = match random.below(60) {
        // Over the end of the region, outside of it, just before it.
        0 => (window.theirs + window.len - 8, 9),
        1 => (random.next(), 1 + random.below(100) as u32),
        2 => (window.theirs - 1, 2),
        // Up to its end.
        3 => (window.theirs + window.len - 64, 64),
        4 => (window.theirs, u32::MAX),
        _ => (
            window.theirs + random.below(window.len - 2048),
            1 + random.below(2047) as u32,
        ),
    };
    Segment { addr, len }
}

#[test]
fn vectors_see_and_do_what_the_scalar_code_does() {
    let kinds = vectors();
    println!("{:?}", kinds.iter().map(|kind| kind.name()).collect::<Vec<_>>());
    let random = Random::new(seed() ^ 0x512);
    let regions = Regions([Arena::new(1 << 16), Arena::new(1 << 15)]);
    let (mut whole, mut all) = (0u64, 0u64);
    for _ in 0..300 {
        let size = [4, 7, 8, 16, 61, 64, 256][random.below(7) as usize];
        let options = Options {
            in_order: random.one_in(2),
            ..Options::default()
        };
        let rings: Vec<_> = kinds.iter().map(|_| Ring::new(Format::Packed, size)).collect();
        let mut drivers: Vec<_> = rings
            .iter()
            // SAFETY: the rings outlive the drivers, and only atomics touch them.
            .map(|ring| unsafe {
                Driver::new(ring.memory(), size, options, vec![Slot::default(); size.into()]).unwrap()
            })
            .collect();
        let mut devices: Vec<_> = rings
            .iter()
            .zip(&kinds)
            .map(|(ring, kind)| {
                let base = packed::Base::START.encode();
                // SAFETY: as above.
                let mut device = unsafe { Device::new(ring.memory(), size, options, base).unwrap() };
                device.set_vectors(*kind);
                device
            })
            .collect();
        let writable = random.one_in(2);
        let direction = if writable {
            Direction::Writable
        } else {
            Direction::Readable
        };
        for _ in 0..50 {
            let burst: Vec<_> = (0..random.below(u64::from(size) + 1))
                .map(|i| (segment(&random, &regions), i))
                .collect();
            // Now and then one of the other direction.
            let odd = random.one_in(10);
            for driver in &mut drivers {
                let way = if odd == writable {
                    Direction::Readable
                } else {
                    Direction::Writable
                };
                driver.post_each(way, burst.iter().copied());
                driver.publish();
            }
            let most = random.below(40) as usize;
            let mut seen: Vec<Vec<Single>> = vec![];
            for device in &mut devices {
                let mut singles = vec![Single::default(); most];
                let n = device.peek_singles(&regions, direction, &mut singles);
                singles.truncate(n);
                seen.push(singles);
            }
            assert!(seen.iter().all(|singles| *singles == seen[0]), "{seen:?}");
            let n = seen[0].len();
            all += n as u64;
            whole += (n >= 4) as u64;
            let used = if random.one_in(4) { n / 2 } else { n };
            let empty = random.one_in(8);
            let mut more = vec![];
            for device in &mut devices {
                let mut singles = seen[0][..used].to_vec();
                for (i, single) in singles.iter_mut().enumerate() {
                    single.len = if empty && i % 5 == 3 {
                        0
                    } else {
                        single.len.min(7 + i as u32)
                    };
                }
                let done = if writable {
                    device.use_written(&singles)
                } else {
                    device.use_read(&singles)
                };
                assert_eq!(done, used);
                // What is in the way is taken by the general code.
                let mut chain = virtio_ring::Chain::new(vec![virtio_ring::Part::default(); 4]);
                let rest = device.pop_each(&regions, &mut chain, 64, |popped| {
                    virtio_ring::Verdict::Done(popped.writable_len().min(5))
                });
                more.push(rest.unwrap());
                device.publish();
            }
            assert!(more.iter().all(|n| *n == more[0]));
            let back: Vec<Vec<_>> = drivers
                .iter_mut()
                .map(|driver| {
                    let mut done = vec![];
                    driver.poll_each(1000, |completion| done.push((completion.cookie, completion.len)));
                    done
                })
                .collect();
            assert!(back.iter().all(|done| *done == back[0]), "{back:?}");
            assert_eq!(back[0].len(), used + more[0]);
            // Not a byte of the rings differs.
            let bytes = |ring: &Ring| ring.block.bytes(0, ring.layout.block_len());
            assert!(rings.iter().all(|ring| bytes(ring) == bytes(&rings[0])));
        }
    }
    assert!(whole > 1000 && all > 10_000, "{whole} groups, {all} singles");
}

#[test]
fn no_offset_is_so_large_that_its_end_is_inside() {
    let regions = Regions([Arena::new(1 << 16), Arena::new(1 << 15)]);
    for kind in vectors() {
        for offset in [1 << 62, 1 << 63, u64::MAX].into_iter().flat_map(|edge: u64| {
            [0, 1, 2, 1 << 16, 1 << 31, u64::from(u32::MAX), 1 << 32].map(|n| edge.wrapping_sub(n))
        }) {
            for (len, place) in [1, 1 << 16, 1 << 31, u32::MAX - 1, u32::MAX]
                .into_iter()
                .flat_map(|len| [1u16, 2, 3].map(|place| (len, place)))
            {
                let ring = Packed::new(4);
                for i in 0..4 {
                    ring.set_desc(i, (Arena::START, 64, i, 0x80));
                }
                ring.set_desc(place, (Arena::START.wrapping_add(offset), len, place, 0x80));
                // SAFETY: the ring outlives the device, and only atomics touch it.
                let device = unsafe { packed::Device::new(ring.memory(), 4, Options::default(), packed::Base::START) };
                let mut device = device.unwrap();
                device.set_vectors(kind);
                let mut singles = [Single::default(); 4];
                let n = device.peek_singles(&regions, Direction::Readable, &mut singles);
                assert_eq!(n, place.into(), "{}: {offset:#x} {len:#x}", kind.name());
            }
        }
    }
}
