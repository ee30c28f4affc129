//! What the other side of a ring does wrong, or only half: each has its counter, no frame comes of it, and nothing is lost.

use virtio_ring::any::{Driver, Format, Layout};
use virtio_ring::net::RxMode;
use virtio_ring::{Chain, Options, Part, Segment, Slot};

use super::front::Offloads;
use super::raw::NET_HEADER;
use super::tests::{Both, both, bytes_of, frames};
use crate::filter::Filter;
use crate::packet::{Burst, Packet};
use crate::stats::Stats;

const SIZE: u16 = 16;
const FORMATS: [Format; 2] = [Format::Split, Format::Packed];

fn pair(format: Format, mergeable: bool) -> Both {
    both(format, SIZE, Options::default(), mergeable, 1024)
}

impl Both {
    /// Uses the next buffer of the front-end's receive ring by hand: writes these bytes into it and says so many. `false`: no
    /// buffer is there.
    fn deliver_bytes(&mut self, bytes: &[u8], used: u32) -> bool {
        let ring = self.back.tx.as_mut().unwrap();
        let mut chain = Chain::new([Part::default(); 4]);
        let Some(head) = ring.device.pop(&*self.back.memory, &mut chain).unwrap() else {
            return false;
        };
        let part = chain.writable()[0];
        assert!(bytes.len() <= part.len as usize);
        // SAFETY: a part is valid for writes of its length; the front-end does not look meanwhile.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), part.ptr.as_ptr(), bytes.len()) };
        ring.device.push(head, used);
        ring.device.publish();
        true
    }

    /// The same with a header of this `num_buffers` before the frame's bytes.
    fn deliver(&mut self, num_buffers: u16, frame: &[u8], used: u32) -> bool {
        let mut bytes = vec![0; NET_HEADER];
        bytes[NET_HEADER - 2..].copy_from_slice(&num_buffers.to_le_bytes());
        bytes.extend(frame);
        self.deliver_bytes(&bytes, used)
    }

    fn deliver_frame(&mut self, frame: &[u8]) -> bool {
        self.deliver(1, frame, (NET_HEADER + frame.len()) as u32)
    }

    /// One look of the front-end at its receive ring.
    fn front_rx(&mut self) -> Vec<Vec<u8>> {
        let mut burst = Burst::new(32);
        let n = self.front.rx(&mut self.front_cache, &mut burst, &self.front_counters);
        assert_eq!(n, burst.len());
        burst.iter().map(bytes_of).collect()
    }

    fn front_stats(&self) -> Stats {
        self.front_counters.snapshot()
    }

    fn back_rx(&mut self) -> Vec<Vec<u8>> {
        let mut burst = Burst::new(32);
        let n = self.back.rx(&mut self.back_cache, &mut burst, &self.back_counters);
        assert_eq!(n, burst.len());
        burst.iter().map(bytes_of).collect()
    }

    fn back_tx(&mut self, burst: &mut Burst) -> usize {
        self.back.tx(&mut self.back_cache, burst, &self.back_counters)
    }

    /// A packet of the back-end's.
    fn back_packet(&mut self, frame: &[u8]) -> Packet {
        assert!(self.back_cache.reserve(1) > 0, "the pool ran dry");
        // SAFETY: just taken.
        let mut packet = unsafe { Packet::from_meta(self.back_cache.pop().unwrap()) };
        packet.copy_from(frame).unwrap();
        packet
    }

    /// A driver of its own on the front-end's receive (0) or transmit (1) ring, which it takes over as the ring was set up.
    fn by_hand(&mut self, format: Format, which: usize) -> Driver<Box<[Slot]>> {
        let layout = Layout::new(format, SIZE).unwrap();
        let slots = vec![Slot::default(); SIZE.into()].into_boxed_slice();
        // SAFETY: the segment outlives the driver; the front-end's own is not used any more.
        unsafe {
            let memory = layout.place(self.segment.base().add(which * layout.block_len()));
            Driver::new(memory, SIZE, Options::default(), slots).unwrap()
        }
    }

    /// Whether all buffers of the front-end are home once its rings are reset.
    fn front_is_whole(&mut self) -> bool {
        self.front.reset();
        self.front_cache.flush(0);
        crate::pool::flush_this_thread();
        self.front_pool.available() == self.front_pool.capacity()
    }
}

/// A used length below the header's, or a `num_buffers` that cannot be.
#[test]
fn buffers_that_contradict_themselves_are_dropped_and_counted() {
    let frame = &frames(1, &[60])[0];
    let header = NET_HEADER as u32;
    for format in FORMATS {
        for (mergeable, num_buffers, used) in [
            (false, 1, 0),
            (false, 1, header - 1),
            (true, 1, 0),
            (true, 1, header - 1),
            (true, 0, header + 60),
            (true, SIZE + 1, header + 60),
            (true, u16::MAX, header + 60),
        ] {
            let what = format!("{format:?}, mergeable {mergeable}, {num_buffers} buffers, {used} bytes");
            let mut both = pair(format, mergeable);
            assert!(both.front_rx().is_empty());
            assert!(both.deliver(num_buffers, frame, used));
            assert!(both.deliver_frame(frame));
            assert_eq!(both.front_rx(), [&frame[..]], "{what}");
            let stats = both.front_stats();
            assert_eq!(
                (stats.rx_errors, stats.rx_packets, stats.rx_bytes),
                (1, 1, 60),
                "{what}"
            );
            assert_eq!((stats.rx_runts, stats.rx_oversize), (0, 0), "{what}");
            // Nothing comes any more, and the count is shown all the same.
            (0..64).for_each(|_| assert!(both.front_rx().is_empty()));
            assert_eq!(both.front_stats().anomalies, 1, "{what}");
            assert!(both.front_is_whole(), "{what}");
        }
    }
}

#[test]
fn violations_are_shown_while_frames_keep_coming() {
    let frame = &frames(1, &[60])[0];
    for format in FORMATS {
        let mut both = pair(format, true);
        assert!(both.front_rx().is_empty());
        assert!(both.deliver(0, frame, 72));
        for _ in 0..16 {
            // As many as the ring is refilled at, so that no poll is without a frame.
            (0..8).for_each(|_| assert!(both.deliver_frame(frame)));
            assert!(both.front_rx().len() >= 7);
        }
        assert_eq!(both.front_stats().anomalies, 1);
    }
}

#[test]
fn the_parts_of_a_frame_may_come_in_several_polls() {
    let mut parts = frames(3, &[1000, 1000, 7]);
    // As if it began with a header, of a frame of one buffer.
    parts[1][NET_HEADER - 2..NET_HEADER].copy_from_slice(&[1, 0]);
    for format in FORMATS {
        let mut both = pair(format, true);
        assert!(both.front_rx().is_empty());
        assert!(both.deliver(3, &parts[0], 1012));
        assert!(both.front_rx().is_empty());
        // No header in these: the frame goes on at once.
        assert!(both.deliver_bytes(&parts[1], 1000));
        assert!(both.front_rx().is_empty());
        assert!(both.deliver_bytes(&parts[2], 7));
        assert_eq!(both.front_rx(), [parts.concat()]);
        let stats = both.front_stats();
        assert_eq!((stats.rx_packets, stats.rx_bytes, stats.rx_errors), (1, 2007, 0));
        assert!(both.front_is_whole());
    }
}

/// Packets are counted by their bytes; those that the filter keeps out are not.
#[test]
fn bytes_of_frames_that_are_filtered_do_not_count() {
    let to = |last: u8, len: usize| [&[2, 0, 0, 0, 0, last][..], &vec![0; len - 6]].concat();
    for format in FORMATS {
        let mut both = pair(format, false);
        let mut filter = Filter::new([2, 0, 0, 0, 0, 1]);
        filter.set_mode(RxMode::Promiscuous, false);
        both.front.set_filter(Some(Box::new(filter.clone())));
        both.back.set_filter(Some(Box::new(filter)));
        let sent = [to(1, 60), to(9, 100), to(1, 61)];
        assert!(both.front_rx().is_empty());
        assert!(sent.iter().all(|frame| both.deliver_frame(frame)));
        assert_eq!(both.front_rx(), [to(1, 60), to(1, 61)]);
        let stats = both.front_stats();
        assert_eq!((stats.rx_packets, stats.rx_bytes, stats.rx_filtered), (2, 121, 1));

        let mut out = Burst::new(32);
        both.fresh(&mut out, &sent);
        assert_eq!(both.front.tx(&mut both.front_cache, &mut out, &both.front_counters), 3);
        assert_eq!(both.back_rx(), [to(1, 60), to(1, 61)]);
        let stats = both.back_counters.snapshot();
        assert_eq!((stats.rx_packets, stats.rx_bytes, stats.rx_filtered), (2, 121, 1));
    }
}

/// A header that the other side wrote into a buffer and did not say so is in no frame that is sent from there later.
#[test]
fn a_header_that_was_written_in_silence_is_not_taken_for_zeroes() {
    for format in FORMATS {
        let mut both = pair(format, false);
        // All buffers have been sent from, and have a header of zeroes.
        let count = both.front_pool.capacity();
        let mut all: Vec<Burst> = Vec::new();
        while both.front_cache.reserve(1) > 0 {
            let mut burst = Burst::new(32);
            both.fresh(&mut burst, &frames(1, &[60]));
            all.push(burst);
        }
        assert_eq!(all.len(), count);
        for mut burst in all {
            assert_eq!(
                both.front.tx(&mut both.front_cache, &mut burst, &both.front_counters),
                1
            );
            assert_eq!(both.back_rx().len(), 1);
            both.front.reclaim(&mut both.front_cache);
        }
        both.front_cache.flush(0);
        assert!(both.front_rx().is_empty());
        let ring = both.back.tx.as_mut().unwrap();
        let mut chain = Chain::new([Part::default(); 4]);
        let mut written = 0;
        while ring.device.pop(&*both.back.memory, &mut chain).unwrap().is_some() {
            // SAFETY: a part is valid for writes of its length; the front-end does not look meanwhile.
            unsafe { chain.writable()[0].ptr.as_ptr().write_bytes(0xff, NET_HEADER) };
            written += 1;
        }
        assert_eq!(written, SIZE);
        both.front.reset();
        both.front_cache.flush(0);
        crate::pool::flush_this_thread();
        let mut all = Vec::new();
        while both.front_cache.reserve(1) > 0 {
            // SAFETY: just taken.
            let packet = unsafe { Packet::from_meta(both.front_cache.pop().unwrap()) };
            let meta = packet.meta();
            // SAFETY: the headroom is before the data.
            let header = unsafe { meta.data().sub(NET_HEADER).cast::<[u8; NET_HEADER]>().read_unaligned() };
            assert!(meta.zeroed_at != meta.offset || header == [0; NET_HEADER], "{header:?}");
            all.push(packet);
        }
        assert_eq!(all.len(), count);
    }
}

/// What waits in the transmit ring to be taken back makes room for a frame of many buffers, and one that never fits leaves.
#[test]
fn frames_of_many_buffers_find_room_or_are_counted() {
    for format in FORMATS {
        let mut both = pair(format, true);
        let mut out = Burst::new(32);
        both.fresh(&mut out, &frames(11, &[60]));
        assert_eq!(both.front.tx(&mut both.front_cache, &mut out, &both.front_counters), 11);
        assert_eq!(both.back_rx().len(), 11);
        // Eight buffers, and five descriptors are free.
        both.fresh(&mut out, &frames(1, &[8000]));
        assert_eq!(both.front.tx(&mut both.front_cache, &mut out, &both.front_counters), 1);
        assert_eq!(both.back_rx(), frames(1, &[8000]));
        // More buffers than the ring has descriptors.
        both.fresh(&mut out, &frames(2, &[20_000, 60]));
        assert_eq!(both.front.tx(&mut both.front_cache, &mut out, &both.front_counters), 1);
        assert!(out.is_empty());
        let stats = both.front_stats();
        assert_eq!((stats.tx_errors, stats.tx_packets), (1, 13));
        // The same toward a front-end that has all buffers posted.
        assert!(both.front_rx().is_empty());
        let mut burst = Burst::new(4);
        let long = both.back_packet(&frames(1, &[20_000])[0]);
        burst.push(long).unwrap();
        assert_eq!(both.back_tx(&mut burst), 1);
        assert!(burst.is_empty());
        let stats = both.back_counters.snapshot();
        assert_eq!((stats.tx_errors, stats.tx_packets), (1, 0));
    }
}

/// A queue that is about to sleep has all buffers posted that it can post.
#[test]
fn a_queue_that_is_armed_has_its_ring_filled() {
    for format in FORMATS {
        let mut both = pair(format, false);
        assert!(both.front_rx().is_empty());
        let frame = &frames(1, &[60])[0];
        (0..3).for_each(|_| assert!(both.deliver_frame(frame)));
        assert_eq!(both.front_rx().len(), 3);
        assert!(!both.front.arm(&mut both.front_cache, &both.front_counters));
        (0..SIZE).for_each(|n| assert!(both.deliver_frame(frame), "{n}"));
    }
}

#[test]
fn rings_that_are_not_enabled_are_left_alone() {
    for format in FORMATS {
        let mut both = pair(format, false);
        assert!(both.front_rx().is_empty());
        let mut out = Burst::new(32);
        both.fresh(&mut out, &frames(1, &[60]));
        assert_eq!(both.front.tx(&mut both.front_cache, &mut out, &both.front_counters), 1);
        let packet = both.back_packet(&frames(1, &[60])[0]);
        out.push(packet).unwrap();
        for enabled in [false, true] {
            both.back.rx.as_mut().unwrap().enabled = enabled;
            both.back.tx.as_mut().unwrap().enabled = enabled;
            // Frames are there, but none that may be read.
            assert_eq!((both.back.arm(), both.back.disarm()), (enabled, enabled));
            assert_eq!(both.back_rx().len(), usize::from(enabled));
            assert_eq!(both.back_tx(&mut out), usize::from(enabled));
        }
        assert_eq!(both.front_rx().len(), 1);
    }
}

#[test]
fn a_back_end_without_buffers_says_so() {
    let mut both = pair(Format::Split, false);
    let mut held = Vec::new();
    while both.back_cache.reserve(1) > 0 {
        held.push(both.back_packet(&[0; 60]));
    }
    let mut out = Burst::new(32);
    both.fresh(&mut out, &frames(1, &[60]));
    assert_eq!(both.front.tx(&mut both.front_cache, &mut out, &both.front_counters), 1);
    assert!(both.back_rx().is_empty());
    assert_eq!(both.back_counters.snapshot().rx_no_buffer, 1);
    drop(held);
    crate::pool::flush_this_thread();
    assert_eq!(both.back_rx().len(), 1);
}

/// Chains that are no frame: too short for a header, longer than any frame, outside of memory.
#[test]
fn chains_that_are_no_frame_are_counted_and_the_next_is_received() {
    for format in FORMATS {
        let mut both = pair(format, false);
        let base = both.segment.base().as_ptr() as u64 + 0x4000;
        let mut driver = both.by_hand(format, 1);
        let part = |addr, len| Segment { addr, len };
        let long: Vec<Segment> = (0..9).map(|_| part(base, 8000)).collect();
        let chains: [&[Segment]; 5] = [
            &[part(base, 5)],
            &[part(base, 4), part(base, 7)],
            &long,
            &[part(16, 72)],
            &[part(base, 72)],
        ];
        for (cookie, chain) in chains.iter().enumerate() {
            // SAFETY: memory of the segment, which nobody else uses; or none at all.
            unsafe { driver.add(chain, chain.len(), cookie as u64) }.unwrap();
            driver.publish();
            let frames = both.back_rx();
            assert_eq!(frames.len(), usize::from(cookie == 4), "{format:?}, {chain:?}");
        }
        let mut done = Vec::new();
        driver.poll_each(16, |completion| done.push(completion.cookie));
        assert_eq!(done, [0, 1, 2, 3, 4]);
        let stats = both.back_counters.snapshot();
        assert_eq!((stats.rx_errors, stats.rx_packets), (4, 1), "{format:?}");
        // What the ring counted outlasts it.
        both.back.publish_counts(&both.back_counters);
        let anomalies = both.back_counters.snapshot().anomalies;
        assert!(anomalies > 0);
        both.back.stop(false).unwrap();
        let fresh = crate::stats::Counters::default();
        both.back.publish_counts(&fresh);
        assert_eq!(fresh.snapshot().anomalies, anomalies);
    }
}

/// A front-end that posts what cannot be written loses nothing of what is for it, and gets its buffers back empty.
#[test]
fn chains_that_cannot_be_written_cost_no_frame() {
    for format in FORMATS {
        for mergeable in [false, true] {
            let mut both = pair(format, mergeable);
            let base = both.segment.base().as_ptr() as u64 + 0x4000;
            let mut driver = both.by_hand(format, 0);
            let mut burst = Burst::new(4);
            let packet = both.back_packet(&frames(1, &[60])[0]);
            burst.push(packet).unwrap();
            for (cookie, (addr, readable)) in [(base, 1), (16, 0), (base, 0)].into_iter().enumerate() {
                // SAFETY: memory of the segment, which nobody else uses; or none at all.
                unsafe { driver.add(&[Segment { addr, len: 1000 }], readable, cookie as u64) }.unwrap();
                driver.publish();
                let sent = both.back_tx(&mut burst);
                assert_eq!(sent, usize::from(cookie == 2), "{format:?}, {mergeable}, {cookie}");
            }
            let mut done = Vec::new();
            driver.poll_each(16, |completion| done.push((completion.cookie, completion.len)));
            assert_eq!(done, [(0, 0), (1, 0), (2, 72)]);
            assert_eq!(both.back_counters.snapshot().tx_errors, 0);
        }
    }
}

/// Pieces of a packet that a front-end had no room for are not sent to the one after it.
#[test]
fn pieces_for_a_front_end_that_left_go_with_it() {
    let mut both = pair(Format::Split, true);
    assert!(both.front_rx().is_empty());
    // Ethernet, IPv4, TCP.
    let mut frame = vec![2; 12];
    frame.extend([8, 0, 0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
    frame.extend([0, 1, 0, 2, 0, 0, 0, 9, 0, 0, 0, 0, 0x50, 0x10, 0, 9, 0, 0, 0, 0]);
    frame.resize(30_000, 0);
    let mut packet = both.back_packet(&frame);
    packet.request_segmentation(1000).unwrap();
    let mut burst = Burst::new(1);
    burst.push(packet).unwrap();
    both.back.offloads = Offloads::NONE;
    both.back_tx(&mut burst);
    assert!(burst.is_empty());
    let left = both.back.unsent(&mut both.back_cache, &both.back_counters).frames;
    assert!(left > 0, "30 pieces do not fit in 16 buffers");
    both.back.stop(true).unwrap();
    assert_eq!(both.back.unsent(&mut both.back_cache, &both.back_counters).frames, 0);
}
