//! A front-end's pair against a back-end's, in one process and without a socket.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use hugemem::{PageSize, Segment};
use rustix::event::{EventfdFlags, eventfd};
use virtio_ring::any::{Device, Driver, Format, Layout};
use virtio_ring::{Options, Slot};

use super::back::{BackPair, BackRing};
use super::front::Pair;
use super::raw::{NET_HEADER, RawQueue, RawRing};
use crate::packet::Burst;
use crate::pool::{Cache, Pool};
use crate::regions::Regions;
use crate::stats::Counters;

pub(crate) struct Both {
    pub(crate) front: Pair,
    pub(crate) front_cache: Cache,
    pub(crate) front_pool: Arc<Pool>,
    pub(crate) segment: Arc<Segment>,
    pub(crate) front_counters: Counters,
    pub(crate) back: BackPair,
    pub(crate) back_cache: Cache,
    pub(crate) back_pool: Arc<Pool>,
    pub(crate) back_counters: Counters,
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap()
}

pub(crate) fn both(format: Format, size: u16, options: Options, mergeable: bool, room: u32) -> Both {
    let layout = Layout::new(format, size).unwrap();
    let at = (2 * layout.block_len()).next_multiple_of(4096);
    let count = 4 * u32::from(size) + 256;
    let page = PageSize::BASE;
    let segment = Arc::new(Segment::anonymous(at + Pool::stride(room) * count as usize, page, None).unwrap());
    let front_pool = Pool::new(Arc::clone(&segment), at, count, room, 0, false).unwrap();
    let memory = |which: usize| {
        // SAFETY: inside the segment, whose beginning was kept for two rings.
        unsafe { layout.place(segment.base().add(which * layout.block_len())) }
    };
    let ring = |which| {
        // SAFETY: the segment outlives the pair, which holds it; one driver a ring.
        let driver = unsafe {
            Driver::new(
                memory(which),
                size,
                options,
                vec![Slot::default(); size.into()].into_boxed_slice(),
            )
        };
        RawRing::new(driver.unwrap(), Arc::new(event()), NET_HEADER)
    };
    let mut front = Pair::new(
        RawQueue {
            rx: ring(0),
            tx: ring(1),
        },
        Arc::clone(&segment),
        mergeable,
    );
    front.set_up(true);
    front.disarm();
    let mut back = BackPair::new();
    back.memory = Arc::new(Regions::own(&segment, []));
    back.mergeable = mergeable;
    let base = format.start_base();
    for (even, which) in [(true, 0), (false, 1)] {
        // SAFETY: as above; one device a ring.
        let mut device = unsafe { Device::new(memory(which), size, options, base) }.unwrap();
        device.set_vectors(crate::port::vectors());
        let mut ring = BackRing::new(device, Some(event()), true);
        ring.enabled = true;
        *back.ring_mut(even) = Some(ring);
    }
    let private = Arc::new(Segment::anonymous(Pool::stride(2048) * 1024, page, None).unwrap());
    let back_pool = Pool::new(private, 0, 1024, 2048, 0, true).unwrap();
    Both {
        front,
        front_cache: Cache::new(Arc::clone(&front_pool)),
        front_pool,
        segment,
        front_counters: Counters::default(),
        back,
        back_cache: Cache::new(Arc::clone(&back_pool)),
        back_pool,
        back_counters: Counters::default(),
    }
}

impl Both {
    pub(crate) fn fresh(&mut self, burst: &mut Burst, frames: &[Vec<u8>]) {
        for frame in frames {
            assert!(self.front_cache.reserve(1) > 0, "the pool ran dry");
            // SAFETY: just taken.
            let mut packet = unsafe { crate::Packet::from_meta(self.front_cache.pop().unwrap()) };
            packet.copy_from(frame).unwrap();
            burst.push(packet).unwrap();
        }
    }

    /// Sends frames from the front-end, has the back-end send back what it receives, and returns what arrives.
    pub(crate) fn echo(&mut self, frames: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let (mut out, mut middle, mut back) = (Burst::new(32), Burst::new(32), Burst::new(32));
        let mut arrived = Vec::new();
        let mut left = frames;
        let mut turns = 0;
        while arrived.len() < frames.len() {
            let n = left.len().min(out.room());
            self.fresh(&mut out, &left[..n]);
            left = &left[n..];
            self.front.tx(&mut self.front_cache, &mut out, &self.front_counters);
            self.back.rx(&mut self.back_cache, &mut middle, &self.back_counters);
            self.front.rx(&mut self.front_cache, &mut back, &self.front_counters);
            self.back.tx(&mut self.back_cache, &mut middle, &self.back_counters);
            self.front.rx(&mut self.front_cache, &mut back, &self.front_counters);
            arrived.extend(back.drain().map(|p| p.into_private()));
            turns += 1;
            assert!(
                turns < 10 * frames.len() + 100,
                "{} of {} frames came back",
                arrived.len(),
                frames.len()
            );
        }
        arrived
    }

    /// Everything given up: every buffer must be home.
    fn finish(mut self) {
        for counters in [&self.front_counters, &self.back_counters] {
            self.front.publish_counts(&self.front_counters);
            self.back.publish_counts(&self.back_counters);
            let stats = counters.snapshot();
            assert_eq!((stats.anomalies, stats.rx_errors, stats.tx_errors), (0, 0, 0));
        }
        self.front.reset();
        drop((self.front, self.front_cache, self.back, self.back_cache));
        crate::pool::flush_this_thread();
        assert_eq!(
            self.front_pool.available(),
            self.front_pool.capacity(),
            "front-end buffers were lost"
        );
        assert_eq!(
            self.back_pool.available(),
            self.back_pool.capacity(),
            "back-end buffers were lost"
        );
    }
}

pub(crate) fn frames(count: usize, lengths: &[usize]) -> Vec<Vec<u8>> {
    (0..count)
        .map(|n| {
            let len = lengths[n % lengths.len()];
            (0..len)
                .map(|i| (i.wrapping_mul(31) ^ n.wrapping_mul(7)) as u8)
                .collect()
        })
        .collect()
}

fn options() -> impl Iterator<Item = Options> {
    (0..8).map(|bits| Options {
        event_idx: bits & 1 != 0,
        in_order: bits & 2 != 0,
        indirect: bits & 4 != 0,
    })
}

#[test]
fn frames_come_back_byte_for_byte() {
    use Format::{Packed, Split};
    for options in options() {
        for (format, size, mergeable) in [
            (Split, 16, true),
            (Split, 16, false),
            (Split, 64, true),
            (Split, 256, false),
            (Split, 1024, true),
            (Packed, 16, true),
            (Packed, 17, false),
            (Packed, 64, false),
            (Packed, 255, true),
            (Packed, 1024, false),
        ] {
            let mut both = both(format, size, options, mergeable, 2048);
            let sent = frames(3000, &[60, 64, 65, 128, 590, 1514, 1518, 2000]);
            assert_eq!(
                both.echo(&sent),
                sent,
                "{format:?}, {options:?}, {size} descriptors, mergeable {mergeable}"
            );
            both.finish();
        }
    }
}

/// virtio 1.3, 5.1.6.2.1: without VIRTIO_NET_F_CSUM the driver sets `flags` to zero, and `num_buffers` always. What the
/// other side wrote before a frame, which says one buffer at least, does not go back to it.
#[test]
fn a_frame_passed_on_has_a_header_of_zeroes() {
    let header = |packet: &crate::Packet| -> [u8; NET_HEADER] {
        // SAFETY: a received packet's header is before its data; nobody else uses the ring meanwhile.
        unsafe {
            packet
                .meta()
                .data()
                .sub(NET_HEADER)
                .cast::<[u8; NET_HEADER]>()
                .read_unaligned()
        }
    };
    for mergeable in [false, true] {
        let mut both = both(Format::Packed, 16, Options::default(), mergeable, 2048);
        let (mut out, mut back) = (Burst::new(32), Burst::new(32));
        // Its buffers are given to the ring.
        both.front.rx(&mut both.front_cache, &mut back, &both.front_counters);
        both.fresh(&mut out, &frames(4, &[60]));
        assert_eq!(both.front.tx(&mut both.front_cache, &mut out, &both.front_counters), 4);
        both.back.rx(&mut both.back_cache, &mut back, &both.back_counters);
        both.back.tx(&mut both.back_cache, &mut back, &both.back_counters);
        assert_eq!(both.front.rx(&mut both.front_cache, &mut back, &both.front_counters), 4);
        for packet in &back {
            // As a hostile back-end might: a checksum is open, at a place far away.
            // SAFETY: as above.
            unsafe { packet.meta().data().sub(NET_HEADER).write(1) };
        }
        // One is sent as it came, one has its front moved there and back.
        let mut moved = back.pop().unwrap();
        moved.prepend(&[7; 20]).unwrap();
        moved.trim_front(20).unwrap();
        back.push(moved).unwrap();
        let places: Vec<_> = back.iter().map(|packet| packet.meta_ptr()).collect();
        let sent = back.len();
        assert_eq!(
            both.front.tx(&mut both.front_cache, &mut back, &both.front_counters),
            sent
        );
        for (i, place) in places.iter().enumerate() {
            // SAFETY: looked at, and forgotten again.
            let packet = std::mem::ManuallyDrop::new(unsafe { crate::Packet::from_meta(*place) });
            assert_eq!(header(&packet), [0; NET_HEADER], "frame {i}, mergeable {mergeable}");
        }
        both.finish();
    }
}

#[test]
fn frames_of_many_buffers_come_back_byte_for_byte() {
    for options in options() {
        for (format, size) in [
            (Format::Split, 16),
            (Format::Split, 64),
            (Format::Split, 256),
            (Format::Packed, 16),
            (Format::Packed, 61),
            (Format::Packed, 256),
        ] {
            let mut both = both(format, size, options, true, 1024);
            let sent = frames(500, &[60, 1013, 1024, 1025, 2048, 9000, 9728, 1012]);
            assert_eq!(both.echo(&sent), sent, "{format:?}, {options:?}, {size} descriptors");
            both.finish();
        }
    }
}

/// A front-end knows its own addresses: where the back-end maps its memory in pieces, frames and their headers lie over the
/// borders.
#[test]
fn frames_over_the_borders_of_regions_come_back_byte_for_byte() {
    // In the header, in and around `num_buffers`, which is its last two bytes, and in the frame.
    const WHERE: [u64; 8] = [1, 9, 10, 11, 12, 13, 500, 2011];
    for (format, options, mergeable) in [
        (Format::Split, Options::default(), true),
        (
            Format::Packed,
            Options {
                in_order: true,
                ..Options::default()
            },
            false,
        ),
        (
            Format::Packed,
            Options {
                indirect: true,
                ..Options::default()
            },
            true,
        ),
    ] {
        let mut both = both(format, 16, options, mergeable, 2048);
        let mut burst = Burst::new(31);
        both.fresh(&mut burst, &frames(31, &[60]));
        let headers = burst
            .iter()
            .map(|packet| packet.meta().data() as u64 - NET_HEADER as u64);
        let mut borders: Vec<_> = headers.zip(WHERE.iter().cycle()).map(|(at, more)| at + more).collect();
        borders.sort_unstable();
        drop(burst);
        both.back.memory = Arc::new(Regions::own(&both.segment, borders));
        let lengths = if mergeable {
            &[60, 2000, 9000][..]
        } else {
            &[60, 1514, 2000]
        };
        let sent = frames(3000, lengths);
        assert_eq!(both.echo(&sent), sent, "{format:?}, {options:?}");
        both.finish();
    }
}

#[test]
fn without_mergeable_buffers_a_long_frame_is_dropped_and_counted() {
    for format in [Format::Split, Format::Packed] {
        a_long_frame_is_dropped(both(format, 64, Options::default(), false, 2048));
    }
}

fn a_long_frame_is_dropped(mut both: Both) {
    let long = frames(1, &[4000]);
    let mut burst = Burst::new(32);
    both.fresh(&mut burst, &long);
    let mut middle = Burst::new(32);
    both.front.rx(&mut both.front_cache, &mut middle, &both.front_counters);
    assert_eq!(
        both.front.tx(&mut both.front_cache, &mut burst, &both.front_counters),
        1
    );
    assert_eq!(both.back.rx(&mut both.back_cache, &mut middle, &both.back_counters), 1);
    assert_eq!(middle[0].len(), 4000);
    assert_eq!(both.back.tx(&mut both.back_cache, &mut middle, &both.back_counters), 1);
    assert_eq!(both.back_counters.snapshot().tx_errors, 1);
    // What comes after it arrives.
    let sent = frames(100, &[60, 2000]);
    assert_eq!(both.echo(&sent), sent);
}

pub(crate) fn bytes_of(packet: &crate::Packet) -> Vec<u8> {
    let mut bytes = vec![0; packet.len()];
    packet.copy_to(&mut bytes);
    bytes
}

#[test]
fn a_full_ring_hands_the_rest_back() {
    for format in [Format::Split, Format::Packed] {
        a_full_ring(both(format, 16, Options::default(), true, 2048));
    }
}

fn a_full_ring(mut both: Both) {
    let mut burst = Burst::new(32);
    both.fresh(&mut burst, &frames(32, &[60]));
    assert_eq!(
        both.front.tx(&mut both.front_cache, &mut burst, &both.front_counters),
        16
    );
    assert_eq!(burst.len(), 16);
    assert_eq!(bytes_of(&burst[0]), frames(32, &[60])[16]);
    let mut middle = Burst::new(32);
    assert_eq!(both.back.rx(&mut both.back_cache, &mut middle, &both.back_counters), 16);
    assert_eq!(
        both.front.tx(&mut both.front_cache, &mut burst, &both.front_counters),
        16
    );
    drop((burst, middle));
    both.finish();
}
