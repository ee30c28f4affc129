//! A queue pair of a front-end: packets on a [`RawQueue`].

use std::ptr::NonNull;
use std::sync::Arc;

use hugemem::Segment;

use super::raw::{Buffer, NET_HEADER, RawQueue, num_buffers};
use crate::copy::prefetch;
use crate::packet::{Burst, Packet};
use crate::pool::{self, BULK, Cache, HEADROOM, Meta};
use crate::stats::Counters;

/// A packet's buffer on its way into a ring.
struct Owned(NonNull<Meta>);

impl Owned {
    #[inline(always)]
    fn meta(&self) -> &Meta {
        // SAFETY: made from a buffer that the maker owns and hands to the ring.
        unsafe { self.0.as_ref() }
    }
}

// SAFETY: its owner gives the buffer to the ring, which gives it back with the cookie.
unsafe impl Buffer for Owned {
    #[inline(always)]
    fn address(&self) -> u64 {
        self.meta().address + u64::from(self.meta().offset)
    }

    #[inline(always)]
    fn len(&self) -> u32 {
        self.meta().len
    }

    #[inline(always)]
    fn write_header(&mut self, len: usize) {
        // SAFETY: as in `meta`; no other reference to it is alive.
        let meta = unsafe { self.0.as_mut() };
        if meta.zeroed_at != meta.offset {
            debug_assert!(usize::from(meta.offset) >= len && len == NET_HEADER);
            // SAFETY: the reserved headroom is before the data, and larger than the header.
            unsafe {
                let header = meta.data().sub(NET_HEADER);
                header.cast::<u64>().write_unaligned(0);
                header.add(8).cast::<u32>().write_unaligned(0);
            }
            meta.zeroed_at = meta.offset;
        }
    }

    #[inline(always)]
    fn next(&self) -> Option<Self> {
        self.meta().next.map(Owned)
    }

    #[inline(always)]
    fn cookie(&self) -> u64 {
        self.0.as_ptr() as u64
    }
}

/// The buffer that a cookie of our rings stands for.
///
/// # Safety
/// The cookie is one that `Owned::cookie` gave to a ring, and the ring gave it back: its buffer is the caller's.
#[inline(always)]
unsafe fn buffer(cookie: u64) -> NonNull<Meta> {
    // SAFETY: made from a NonNull.
    unsafe { NonNull::new_unchecked(cookie as *mut Meta) }
}

/// A frame whose buffers have not all come yet.
struct Partial {
    head: Packet,
    tail: NonNull<Meta>,
    left: u16,
}

/// The pair: what the gate is around.
pub(crate) struct Pair {
    raw: RawQueue,
    mergeable: bool,
    partial: Option<Partial>,
    /// Free descriptors of the receive ring at which it is filled again.
    refill: usize,
    size: usize,
    past: Past,
    /// Somebody is on the other side. If not, what it left is still received.
    up: bool,
    /// Keeps the rings mapped.
    _segment: Arc<Segment>,
}

/// Counts of rings that were replaced, and of frames whose header made no sense.
#[derive(Default)]
struct Past {
    anomalies: u64,
    kicks: u64,
}

impl Past {
    fn add(&mut self, raw: &RawQueue) {
        for ring in [&raw.rx, &raw.tx] {
            self.anomalies += ring.anomalies().total();
            self.kicks += ring.kicks();
        }
    }
}

// SAFETY: the ring memory and the Metas that the rings' cookies point to are reached through this pair alone, by the
// side of the gate that has it; `Partial::tail` points into the chain that `head` owns.
unsafe impl Send for Pair {}

impl Pair {
    /// A pair on rings in `segment`.
    pub(crate) fn new(raw: RawQueue, segment: Arc<Segment>, mergeable: bool) -> Self {
        let size = raw.rx.size();
        Pair {
            raw,
            mergeable,
            partial: None,
            refill: (size / 4).clamp(1, 32),
            size,
            past: Past::default(),
            up: false,
            _segment: segment,
        }
    }

    /// Puts fresh rings in the place of the old: the same memory, other features.
    pub(crate) fn replace(&mut self, raw: RawQueue, mergeable: bool) {
        self.reset();
        self.past.add(&self.raw);
        self.raw = raw;
        self.set_up(true);
        self.mergeable = mergeable;
        self.raw.rx.set_notify(false);
        self.raw.tx.set_notify(false);
    }

    #[inline]
    pub(crate) fn rx(&mut self, cache: &mut Cache, burst: &mut Burst, counters: &Counters) -> usize {
        let start = burst.len();
        let room = burst.room();
        let mergeable = self.mergeable;
        self.raw.rx.complete(room, |cookie, len| {
            // SAFETY: a cookie of the receive ring is a buffer that `fill` posted.
            let mut meta = unsafe { buffer(cookie) };
            // SAFETY: ours again.
            unsafe { meta.as_mut() }.len = len;
            if mergeable {
                // SAFETY: as above.
                prefetch(unsafe { meta.as_ref() }.data().wrapping_sub(NET_HEADER));
            }
            // SAFETY: at most `room` completions; the buffer is ours.
            unsafe { burst.push_unchecked(Packet::from_meta(meta)) };
        });
        let mut bytes = 0u64;
        let mut whole = true;
        for packet in &mut burst[start..] {
            let meta = packet.meta_mut();
            // SAFETY: every posted buffer has its header before the data.
            let one = !mergeable || unsafe { num_buffers(meta.data()) } == 1;
            whole &= one & (meta.len >= NET_HEADER as u32);
            meta.len = meta.len.wrapping_sub(NET_HEADER as u32);
            bytes += u64::from(meta.len);
        }
        if !whole || self.partial.is_some() {
            bytes = self.assemble(burst, start, counters);
        }
        if self.raw.rx.free() >= self.refill && self.up {
            self.fill(cache, counters);
        }
        let n = burst.len() - start;
        if n > 0 {
            counters.rx_packets.add(n as u64);
            counters.rx_bytes.add(bytes);
        }
        n
    }

    /// Joins the buffers of frames that took several, and drops what is malformed. The lengths of the burst's new
    /// packets have had the header taken off, wrapping.
    #[cold]
    #[inline(never)]
    fn assemble(&mut self, burst: &mut Burst, start: usize, counters: &Counters) -> u64 {
        let mut bytes = 0u64;
        let Pair {
            partial,
            mergeable,
            size,
            past,
            ..
        } = self;
        burst.rewrite(start, |mut packet| {
            let Some(part) = partial else {
                let meta = packet.meta_mut();
                let n = if *mergeable {
                    // SAFETY: every posted buffer has its header before the data.
                    unsafe { num_buffers(meta.data()) }
                } else {
                    1
                };
                // A length of less than a header wrapped around.
                let runt = meta.len > u32::MAX - NET_HEADER as u32;
                if runt || n == 0 || usize::from(n) > *size {
                    counters.rx_errors.add(1);
                    past.anomalies += 1;
                    meta.len = 0;
                    return None;
                }
                if n == 1 {
                    bytes += u64::from(meta.len);
                    return Some(packet);
                }
                let tail = packet.meta_ptr();
                *partial = Some(Partial {
                    head: packet,
                    tail,
                    left: n - 1,
                });
                return None;
            };
            // No header in here: the frame goes on in the first byte of the buffer.
            let meta = packet.meta_mut();
            meta.len = meta.len.wrapping_add(NET_HEADER as u32);
            meta.offset = HEADROOM - NET_HEADER as u16;
            let meta = packet.into_meta();
            // SAFETY: the tail is in the chain that `head` owns.
            unsafe { part.tail.as_mut() }.next = Some(meta);
            part.tail = meta;
            part.left -= 1;
            if part.left > 0 {
                return None;
            }
            let done = partial.take()?.head;
            bytes += done.len() as u64;
            Some(done)
        });
        bytes
    }

    /// Fills the receive ring and publishes that.
    pub(crate) fn fill(&mut self, cache: &mut Cache, counters: &Counters) {
        let rx = &mut self.raw.rx;
        let mut want = rx.free();
        let room = cache.pool().room();
        let mut posted = 0;
        while want > 0 {
            let have = cache.reserve(want.min(BULK)).min(want);
            if have == 0 {
                counters.rx_no_buffer.add(1);
                break;
            }
            let n = rx.post(cache.last(have).map(|mut meta| {
                // SAFETY: the cache's, and the ring's from here on: it is forgotten below.
                let m = unsafe { meta.as_mut() };
                m.reset();
                m.len = room;
                // The other side writes a header there.
                m.zeroed_at = 0;
                Owned(meta)
            }));
            cache.forget_first(n, have);
            want -= n;
            posted += n;
            if n == 0 {
                break;
            }
        }
        if posted > 0 {
            rx.publish();
        }
    }

    #[inline]
    pub(crate) fn tx(&mut self, cache: &mut Cache, burst: &mut Burst, counters: &Counters) -> usize {
        if self.raw.tx.free() < burst.len().max(self.refill) {
            self.reclaim(cache);
        }
        if !self.up {
            return 0;
        }
        let mut bytes = 0u64;
        let mut sent = 0;
        let mut retried = false;
        loop {
            let tx = &mut self.raw.tx;
            let n = tx.send(burst[sent..].iter_mut().map(|packet| {
                let owned = Owned(packet.meta_ptr());
                if owned.meta().next.is_none() {
                    bytes += u64::from(owned.meta().len);
                }
                owned
            }));
            sent += n;
            // What stopped it: the end, a full ring, or a frame of several segments.
            if sent == burst.len() || tx.free() == 0 {
                break;
            }
            let packet = &mut burst[sent];
            let len = packet.len() as u64;
            match tx.send_chain(Owned(packet.meta_ptr())) {
                Ok(true) => {
                    bytes += len;
                    sent += 1;
                }
                Ok(false) if !retried => {
                    // More descriptors than were left free are behind this frame's segments.
                    retried = true;
                    self.reclaim(cache);
                }
                Ok(false) => break,
                Err(_) => {
                    // It never fits. It leaves the burst, counted.
                    counters.tx_errors.add(1);
                    let last = burst.len() - 1;
                    burst[sent..].rotate_left(1);
                    burst.truncate(last);
                }
            }
        }
        if sent > 0 {
            self.raw.tx.publish();
            // SAFETY: the ring owns these buffers now.
            unsafe { burst.forget_front(sent) };
            counters.tx_packets.add(sent as u64);
            counters.tx_bytes.add(bytes);
        }
        sent
    }

    /// Takes back what the other side has sent on.
    #[inline]
    pub(crate) fn reclaim(&mut self, cache: &mut Cache) {
        let size = self.size;
        self.raw.tx.complete(size, |cookie, _| {
            // SAFETY: a cookie of the transmit ring is the head of a packet that `tx` gave up.
            unsafe { cache.put(buffer(cookie)) };
        });
    }

    /// Frames sent that the other side has not taken. With nobody there, none: it never will.
    pub(crate) fn unsent(&mut self, cache: &mut Cache) -> usize {
        self.reclaim(cache);
        if self.up { self.raw.tx.in_flight() } else { 0 }
    }

    /// Whether somebody is on the other side. When it goes, what is in the rings stays there until another one comes.
    pub(crate) fn set_up(&mut self, up: bool) {
        self.up = up;
    }

    /// Asks for a call at the next frame. `true`: frames are there already.
    pub(crate) fn arm(&mut self, cache: &mut Cache, counters: &Counters) -> bool {
        if self.up {
            self.fill(cache, counters);
        }
        self.raw.rx.set_notify(true)
    }

    /// Asks for no more calls. `true`: frames are there.
    pub(crate) fn disarm(&mut self) -> bool {
        self.raw.rx.set_notify(false)
    }

    /// Copies the rings' own counts to where others read them.
    pub(crate) fn publish_counts(&self, counters: &Counters) {
        let mut sum = Past {
            anomalies: self.past.anomalies,
            kicks: self.past.kicks,
        };
        sum.add(&self.raw);
        counters.kicks.raise(sum.kicks);
        counters.anomalies.raise(sum.anomalies);
    }

    /// Takes every buffer back from the rings and begins anew; the other side is gone.
    pub(crate) fn reset(&mut self) {
        self.partial = None;
        for ring in [&mut self.raw.rx, &mut self.raw.tx] {
            // SAFETY: cookies of our rings, given back.
            ring.reset(|cookie| unsafe { pool::free(buffer(cookie)) });
        }
        self.raw.rx.set_notify(false);
        self.raw.tx.set_notify(false);
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.reset();
    }
}
