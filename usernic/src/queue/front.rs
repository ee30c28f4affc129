//! A queue pair of a front-end: packets on a [`RawQueue`].

use std::ptr::NonNull;
use std::sync::Arc;

use hugemem::Segment as Shared;
use virtio_ring::Segment;
use virtio_ring::net::Header;

use super::raw::{Buffer, LONG_HEADER, NET_HEADER, RawQueue, num_buffers};
use super::{Copied, SHORTEST, TAG};
use crate::copy::{copy, prefetch, prefetch_write};
use crate::filter::Filter;
use crate::packet::{Burst, Marks, Packet, emit_header};
use crate::pool::{self, BULK, Cache, HEADROOM, Meta, Own};
use crate::stats::Counters;

/// A packet's buffer on its way into a ring of a port with this pool.
struct Owned(NonNull<Meta>, Own);

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
        debug_assert!(usize::from(self.meta().offset) >= len && len == NET_HEADER);
        // SAFETY: as in `meta`; no other reference to it is alive.
        let meta = unsafe { self.0.as_mut() };
        if meta.zeroed_at != meta.offset {
            zero_header(meta);
        }
    }

    #[inline(always)]
    fn next(&self) -> Option<Self> {
        self.meta().next().map(|next| Owned(next, self.1))
    }

    #[inline(always)]
    fn is_plain(&self) -> bool {
        self.meta().is_plain_of(self.1)
    }

    #[inline(always)]
    fn cookie(&self) -> u64 {
        self.0.as_ptr() as u64
    }
}

/// A buffer to receive into, with room for so many bytes. What its line says of a frame is written when it comes back.
struct Empty(NonNull<Meta>, u32);

// SAFETY: its owner gives the buffer to the ring, which gives it back with the cookie.
unsafe impl Buffer for Empty {
    #[inline(always)]
    fn address(&self) -> u64 {
        // SAFETY: made from a buffer that the maker owns and hands to the ring.
        unsafe { self.0.as_ref() }.room_address()
    }

    #[inline(always)]
    fn len(&self) -> u32 {
        self.1
    }

    #[inline(always)]
    fn room(&self, header: u32) -> Segment {
        // The difference is the same for all buffers, and 32 bits wide so that it is one term of the sum.
        let before = u64::from(u32::from(HEADROOM) - header);
        Segment {
            // SAFETY: as above.
            addr: unsafe { self.0.as_ref() }.address + before,
            len: self.1 + header,
        }
    }

    fn write_header(&mut self, _len: usize) {}

    fn next(&self) -> Option<Self> {
        None
    }

    #[inline(always)]
    fn cookie(&self) -> u64 {
        self.0.as_ptr() as u64
    }
}

/// The buffer of a packet that may ask for something.
struct Asking(Owned);

// SAFETY: as for `Owned`.
unsafe impl Buffer for Asking {
    fn address(&self) -> u64 {
        self.0.address()
    }

    fn len(&self) -> u32 {
        self.0.len()
    }

    fn write_header(&mut self, len: usize) {
        let meta = self.0.meta();
        if len == LONG_HEADER {
            write_long_header(self.0.0);
        } else if meta.marks.has(Marks::ASKED) {
            debug_assert!(meta.zeroed_at == 0 && len == NET_HEADER);
            let bytes = emit_header(meta, 0);
            // SAFETY: the reserved headroom is before the data of every packet, and larger than the header.
            unsafe {
                meta.data()
                    .sub(NET_HEADER)
                    .cast::<[u8; NET_HEADER]>()
                    .write_unaligned(bytes)
            };
        } else {
            self.0.write_header(len);
        }
    }

    fn next(&self) -> Option<Self> {
        self.0.next().map(Asking)
    }

    fn is_plain(&self) -> bool {
        self.0.meta().is_single_of(self.0.1)
    }

    fn cookie(&self) -> u64 {
        self.0.cookie()
    }
}

/// A header with room for a hash, which is the device's to fill.
fn write_long_header(mut meta: NonNull<Meta>) {
    // SAFETY: made from a buffer that the maker owns and hands to the ring; no other reference to it is alive.
    let meta = unsafe { meta.as_mut() };
    let mut bytes = [0; LONG_HEADER];
    if meta.marks.has(Marks::ASKED) {
        bytes[..NET_HEADER].copy_from_slice(&emit_header(meta, 0));
    }
    meta.zeroed_at = 0;
    // SAFETY: the reserved headroom is before the data of every packet, and as large as this header.
    unsafe {
        meta.data()
            .sub(LONG_HEADER)
            .cast::<[u8; LONG_HEADER]>()
            .write_unaligned(bytes)
    };
}

#[inline(always)]
fn zero_header(meta: &mut Meta) {
    // SAFETY: the reserved headroom is before the data of every packet, and larger than the header.
    unsafe {
        let header = meta.data().sub(NET_HEADER);
        header.cast::<u64>().write_unaligned(0);
        header.add(8).cast::<u32>().write_unaligned(0);
    }
    meta.zeroed_at = meta.offset;
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

/// Bytes of a frame that every buffer is posted for, whatever the MTU.
const LEAST_POSTED: u32 = 1514;

/// Fewer frames than this at a time come one by one.
const FEW: usize = 4;

/// The pair: what the gate is around.
pub(crate) struct Pair {
    raw: RawQueue,
    mergeable: bool,
    partial: Option<Partial>,
    /// Free descriptors of the receive ring at which it is filled again.
    refill: usize,
    /// The last poll that brought frames brought fewer than [`FEW`].
    few: bool,
    /// Polls that brought nothing.
    idle: u32,
    /// Refills of the receive ring.
    fills: u32,
    size: usize,
    /// Violations on rings that were replaced, and frames whose header made no sense.
    past: u64,
    /// Somebody is on the other side. If not, what it left is still received.
    up: bool,
    /// What the other side does for packets that are sent, and may have left undone of those received.
    offloads: Offloads,
    filter: Option<Box<Filter>>,
    /// Bytes of the longest frame that the port takes: see [`super::longest`].
    longest: u32,
    /// HASH_REPORT was negotiated: headers are longer.
    long: bool,
    /// What a packet was cut into, as far as there was no room for it yet.
    cut: Burst,
    /// There is more to do than to move packets: looked at once a burst.
    extras: bool,
    /// Keeps the rings mapped.
    _segment: Arc<Shared>,
}

/// What was negotiated about packets that ask for something.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Offloads {
    /// What the other side takes of packets that are sent to it.
    pub(crate) takes: Marks,
    /// What packets that come from it may ask for.
    pub(crate) asks: Marks,
}

impl Offloads {
    pub(crate) const NONE: Self = Offloads {
        takes: Marks::NONE,
        asks: Marks::NONE,
    };
}

/// Violations that rings counted.
fn violations(raw: &RawQueue) -> u64 {
    raw.rx.anomalies().total() + raw.tx.anomalies().total()
}

// SAFETY: the ring memory and the Metas that the rings' cookies point to are reached through this pair alone, by the
// side of the gate that has it; `Partial::tail` points into the chain that `head` owns.
unsafe impl Send for Pair {}

impl Pair {
    /// A pair on rings in `segment`.
    pub(crate) fn new(raw: RawQueue, segment: Arc<Shared>, mergeable: bool) -> Self {
        let size = raw.rx.size();
        Pair {
            raw,
            mergeable,
            partial: None,
            refill: (size / 4).clamp(1, 64),
            few: false,
            idle: 0,
            fills: 0,
            size,
            past: 0,
            up: false,
            offloads: Offloads::NONE,
            filter: None,
            longest: u32::MAX,
            long: false,
            cut: Burst::empty(),
            extras: false,
            _segment: segment,
        }
    }

    /// Puts fresh rings in the place of the old: the same memory, other features.
    pub(crate) fn replace(&mut self, raw: RawQueue, mergeable: bool, offloads: Offloads, long: bool) {
        self.reset();
        self.offloads = offloads;
        self.long = long;
        self.look_for_extras();
        self.past += violations(&self.raw);
        self.raw = raw;
        self.set_up(true);
        self.mergeable = mergeable;
        self.raw.rx.set_notify(false);
        self.raw.tx.set_notify(false);
    }

    /// Takes frames of packets of up to `mtu` bytes.
    pub(crate) fn set_mtu(&mut self, mtu: u16) {
        self.longest = super::longest(mtu);
        self.look_for_extras();
    }

    /// Bytes of a frame that a buffer is posted for: no more than a frame has, with two tags, so that the other side has no
    /// room for one that is too long. But a device may count on 1,514 (virtio 1.3, 5.1.6.3.1), and joined packets are longer.
    fn posted(&self, room: u32) -> u32 {
        match self.offloads.asks.has(Marks::SEGMENTATION) {
            true => room,
            false => room.min(self.longest.saturating_add(TAG).max(LEAST_POSTED)),
        }
    }

    /// Which frames to receive; `None`: all.
    pub(crate) fn set_filter(&mut self, filter: Option<Box<Filter>>) {
        self.filter = filter;
        self.look_for_extras();
    }

    fn look_for_extras(&mut self) {
        let short = self.longest < LEAST_POSTED;
        self.extras =
            self.offloads.asks != Marks::NONE || self.filter.is_some() || !self.cut.is_empty() || self.long || short;
    }

    #[inline]
    pub(crate) fn rx(&mut self, cache: &mut Cache, burst: &mut Burst, counters: &Counters) -> usize {
        if self.long {
            return self.receive_long(cache, burst, counters);
        }
        self.receive::<NET_HEADER>(cache, burst, counters)
    }

    #[inline(never)]
    fn receive_long(&mut self, cache: &mut Cache, burst: &mut Burst, counters: &Counters) -> usize {
        self.receive::<LONG_HEADER>(cache, burst, counters)
    }

    #[inline(always)]
    fn receive<const HEADER: usize>(&mut self, cache: &mut Cache, burst: &mut Burst, counters: &Counters) -> usize {
        let start = burst.len();
        let room = burst.room();
        let mergeable = self.mergeable;
        // Of all frames, the bytes behind an Ethernet header.
        let mut payload = 0u64;
        let mut arriving = burst.appending();
        self.raw.rx.complete(room, |cookie, len| {
            // SAFETY: a cookie of the receive ring is a buffer that `fill` posted.
            let mut meta = unsafe { buffer(cookie) };
            payload += u64::from(len.wrapping_sub((HEADER + SHORTEST) as u32));
            // SAFETY: ours again.
            let m = unsafe { meta.as_mut() };
            m.received(len.wrapping_sub(HEADER as u32));
            // SAFETY: at most `room` completions; the buffer is ours.
            unsafe { arriving.push(Packet::from_meta(meta)) };
        });
        drop(arriving);
        // A length of less than the two headers wrapped around, and shows in the sum.
        let mut whole = payload >> 31 == 0;
        let mut bytes = payload + ((burst.len() - start) * SHORTEST) as u64;
        if mergeable {
            for packet in &burst[start..] {
                prefetch(packet.meta().data().wrapping_sub(HEADER));
            }
            for packet in &burst[start..] {
                // SAFETY: every posted buffer has its header before the data.
                whole &= unsafe { num_buffers(packet.meta().data(), HEADER) } == 1;
            }
        }
        if !whole || self.partial.is_some() {
            bytes = self.assemble(burst, start, counters, HEADER);
        }
        // Many at a time where many come: the lines of the ring change hands less often.
        let found = burst.len() - start;
        if self.raw.rx.free() >= self.refill && self.up {
            self.fill(cache, counters);
        } else if found == 0 {
            self.idle(cache, counters);
        }
        if found > 0 {
            self.few = found < FEW;
        }
        if self.extras {
            bytes -= self.look_at(cache, burst, start, counters, HEADER);
        }
        let n = burst.len() - start;
        if n > 0 {
            counters.rx_packets.add(n as u64);
            counters.rx_bytes.add(bytes);
        }
        n
    }

    /// Reads the headers of received frames, and drops what is malformed or not for this port; the bytes of that.
    #[cold]
    #[inline(never)]
    fn look_at(
        &mut self,
        cache: &mut Cache,
        burst: &mut Burst,
        start: usize,
        counters: &Counters,
        header_len: usize,
    ) -> u64 {
        let mut dropped = 0;
        let Pair {
            offloads,
            filter,
            past,
            longest,
            ..
        } = self;
        let long = header_len == LONG_HEADER;
        burst.rewrite(start, |mut packet| {
            if offloads.asks != Marks::NONE || long {
                let mut header = [0; LONG_HEADER];
                // SAFETY: every posted buffer has its header before the data, and a packet begins with such a buffer.
                unsafe { copy(packet.meta().data().sub(header_len), header.as_mut_ptr(), header_len) };
                let plain = header
                    .first_chunk()
                    .is_some_and(|plain| packet.take_header(plain, offloads.asks));
                if long && let Some(header) = Header::parse(&header) {
                    packet.take_hash(&header);
                }
                if !plain {
                    counters.rx_errors.add(1);
                    *past += 1;
                    dropped += packet.len() as u64;
                    return None;
                }
            }
            if packet.len() as u64 > u64::from(*longest) && !super::fits(&packet, *longest, counters) {
                dropped += packet.len() as u64;
                return None;
            }
            if !super::passes(filter, &packet) {
                counters.rx_filtered.add(1);
                dropped += packet.len() as u64;
                return None;
            }
            Some(packet)
        });
        self.flush(cache, counters);
        dropped
    }

    /// Joins the buffers of frames that took several, and drops what is malformed. The lengths of the burst's new
    /// packets have had the header taken off, wrapping.
    #[cold]
    #[inline(never)]
    fn assemble(&mut self, burst: &mut Burst, start: usize, counters: &Counters, header_len: usize) -> u64 {
        let mut bytes = 0u64;
        let Pair {
            partial,
            mergeable,
            size,
            past,
            longest,
            offloads,
            ..
        } = self;
        // Joined packets are judged when their headers are read.
        let longest = match offloads.asks.has(Marks::SEGMENTATION) {
            true => u32::MAX,
            false => *longest,
        };
        let fits = |packet: &Packet| {
            (SHORTEST..=longest as usize).contains(&packet.len()) || super::fits(packet, longest, counters)
        };
        burst.rewrite(start, |mut packet| {
            let Some(part) = partial else {
                let meta = packet.meta_mut();
                let n = if *mergeable {
                    // SAFETY: every posted buffer has its header before the data.
                    unsafe { num_buffers(meta.data(), header_len) }
                } else {
                    1
                };
                // A length of less than a header wrapped around.
                let headless = meta.len > u32::MAX - header_len as u32;
                if headless || n == 0 || usize::from(n) > *size {
                    counters.rx_errors.add(1);
                    *past += 1;
                    meta.len = 0;
                    return None;
                }
                if n == 1 {
                    return fits(&packet).then(|| {
                        bytes += packet.len() as u64;
                        packet
                    });
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
            meta.len = meta.len.wrapping_add(header_len as u32);
            meta.offset = HEADROOM - header_len as u16;
            let meta = packet.into_meta();
            // SAFETY: the tail is in the chain that `head` owns.
            unsafe { part.tail.as_mut() }.set_next(meta);
            part.tail = meta;
            part.left -= 1;
            if part.left > 0 {
                return None;
            }
            let done = partial.take()?.head;
            fits(&done).then(|| {
                bytes += done.len() as u64;
                done
            })
        });
        bytes
    }

    /// Nothing has come.
    #[inline(always)]
    fn idle(&mut self, cache: &mut Cache, counters: &Counters) {
        if self.few && self.up {
            self.tidy(cache, counters);
        }
        // Violations may have broken a ring, on which nothing will come.
        self.idle = self.idle.wrapping_add(1);
        if self.idle.is_multiple_of(64) {
            self.publish_counts(counters);
        }
    }

    /// What is to be done now and then, while nothing comes: where frames come one by one somebody waits for each, and so
    /// not for this.
    #[inline(always)]
    fn tidy(&mut self, cache: &mut Cache, counters: &Counters) {
        let enough = self.refill.div_ceil(4);
        // Not both at a time: the next frame may come meanwhile.
        if self.raw.rx.free() >= enough {
            self.fill(cache, counters);
        } else if self.raw.tx.in_flight() >= enough + enough / 2 {
            self.reclaim(cache);
        }
    }

    /// Fills the receive ring and publishes that.
    pub(crate) fn fill(&mut self, cache: &mut Cache, counters: &Counters) {
        let room = self.posted(cache.pool().room());
        let rx = &mut self.raw.rx;
        let mut want = rx.free();
        let mut posted = 0;
        while want > 0 {
            let have = cache.reserve(want.min(BULK)).min(want);
            if have == 0 {
                counters.rx_no_buffer.add(1);
                break;
            }
            let n = rx.post(cache.last(have).map(|meta| Empty(meta, room)));
            cache.forget_first(n, have);
            want -= n;
            posted += n;
            if n == 0 {
                break;
            }
        }
        if posted > 0 && rx.publish() {
            counters.kicks.add(1);
        }
        // Some thousand frames; while none come `idle` does it.
        self.fills = self.fills.wrapping_add(1);
        if self.fills.is_multiple_of(16) {
            self.publish_counts(counters);
        }
    }

    #[inline]
    pub(crate) fn tx(&mut self, cache: &mut Cache, burst: &mut Burst, counters: &Counters) -> usize {
        if self.extras {
            if !self.flush(cache, counters) {
                return 0;
            }
            if self.long {
                return super::send_asking(self, cache, burst, counters);
            }
        }
        match self.send::<false>(cache, burst, counters) {
            (sent, false) => sent,
            (sent, true) => sent + super::send_asking(self, cache, burst, counters),
        }
    }

    /// Sends what it can; how many packets, and whether the next one asks for what the other side does not do. Without
    /// OFFLOADS: whether it asks for anything.
    #[inline(always)]
    fn send<const OFFLOADS: bool>(
        &mut self,
        cache: &mut Cache,
        burst: &mut Burst,
        counters: &Counters,
    ) -> (usize, bool) {
        if self.raw.tx.free() < burst.len().max(self.refill) {
            self.reclaim(cache);
            self.publish_counts(counters);
        }
        if !self.up {
            return (0, false);
        }
        let takes = self.offloads.takes;
        let own = cache.own();
        // Frames that are passed on have the header that the other side wrote, and its lines are over there: the stores
        // would wait for them one after the other. They come in bursts, so the first one tells.
        let fresh = |meta: &Meta| meta.zeroed_at == meta.offset;
        if burst.first().is_some_and(|first| !fresh(first.meta())) {
            for meta in burst.iter().map(Packet::meta).filter(|meta| !fresh(meta)) {
                prefetch_write(meta.data().wrapping_sub(NET_HEADER));
            }
        }
        let mut bytes = 0u64;
        let mut sent = 0;
        let mut retried = false;
        let mut beyond = false;
        loop {
            let tx = &mut self.raw.tx;
            let packets = burst[sent..].iter();
            let (n, b) = if OFFLOADS {
                let taken = packets.take_while(|packet| !packet.meta().marks.beyond(takes));
                tx.send(taken.map(|packet| Asking(Owned(packet.meta_ptr(), own))))
            } else {
                tx.send(packets.map(|packet| Owned(packet.meta_ptr(), own)))
            };
            sent += n;
            bytes += b;
            // What stopped it: the end, a full ring, or a frame of several segments, of another port, or that asks.
            if sent == burst.len() || tx.free() == 0 {
                break;
            }
            let packet = &mut burst[sent];
            let meta = packet.meta();
            beyond = if OFFLOADS {
                meta.marks.beyond(takes)
            } else {
                meta.asks()
            };
            if beyond {
                break;
            }
            if !meta.is_of(own) {
                match super::copy_foreign(&mut burst[sent..], cache) {
                    Copied::First => continue,
                    Copied::Never => {
                        counters.tx_errors.add(1);
                        burst.remove(sent);
                        continue;
                    }
                    Copied::NoBuffers if !retried => {
                        retried = true;
                        self.reclaim(cache);
                        continue;
                    }
                    Copied::NoBuffers => break,
                }
            }
            let len = packet.len() as u64;
            match tx.send_chain(Asking(Owned(packet.meta_ptr(), own))) {
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
                    burst.remove(sent);
                }
            }
        }
        if sent > 0 {
            if self.raw.tx.publish() {
                counters.kicks.add(1);
            }
            // SAFETY: the ring owns these buffers now.
            unsafe { burst.forget_front(sent) };
            counters.tx_packets.add(sent as u64);
            counters.tx_bytes.add(bytes);
        }
        (sent, beyond)
    }

    /// Sends what packets were cut into; whether nothing of that is left.
    #[inline(never)]
    fn flush(&mut self, cache: &mut Cache, counters: &Counters) -> bool {
        if !self.cut.is_empty() {
            let mut cut = std::mem::replace(&mut self.cut, Burst::empty());
            match self.long {
                true => self.send::<true>(cache, &mut cut, counters),
                false => self.send::<false>(cache, &mut cut, counters),
            };
            self.cut = cut;
        }
        self.look_for_extras();
        self.cut.is_empty()
    }

    /// Takes back what the other side has sent on.
    #[inline]
    pub(crate) fn reclaim(&mut self, cache: &mut Cache) {
        let size = self.size;
        let mut returning = cache.returning();
        self.raw.tx.complete(size, |cookie, _| {
            // SAFETY: a cookie of the transmit ring is the head of a packet that `tx` gave up.
            unsafe { returning.put(buffer(cookie)) };
        });
    }

    /// Frames sent that the other side has not taken.
    pub(crate) fn unsent(&mut self, cache: &mut Cache, counters: &Counters) -> super::Unsent {
        self.reclaim(cache);
        self.flush(cache, counters);
        super::Unsent {
            frames: self.raw.tx.in_flight() + self.cut.len(),
            up: self.up,
        }
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

    /// Copies the rings' own counts to where others read them: now and then, for it costs some additions.
    #[inline(never)]
    pub(crate) fn publish_counts(&self, counters: &Counters) {
        counters.anomalies.raise(self.past + violations(&self.raw));
    }

    /// Takes every buffer back from the rings and begins anew; the other side is gone.
    pub(crate) fn reset(&mut self) {
        self.partial = None;
        self.cut.clear();
        for ring in [&mut self.raw.rx, &mut self.raw.tx] {
            let back = |cookie| {
                // SAFETY: a cookie of our rings, given back.
                let mut meta = unsafe { buffer(cookie) };
                // The other side may have written a header without saying so.
                // SAFETY: ours again.
                unsafe { meta.as_mut() }.zeroed_at = 0;
                // SAFETY: as above.
                unsafe { pool::free([meta]) };
            };
            // SAFETY: the other side is gone. One that is not and writes on finds memory that it was given for that: the
            // segment, whose packets' bytes it may change at any moment as long as it has the segment mapped.
            unsafe { ring.reset(back) };
        }
        self.raw.rx.set_notify(false);
        self.raw.tx.set_notify(false);
    }
}

impl super::Asking for Pair {
    fn send_offloads(&mut self, cache: &mut Cache, burst: &mut Burst, counters: &Counters) -> (usize, bool) {
        self.send::<true>(cache, burst, counters)
    }

    fn flush(&mut self, cache: &mut Cache, counters: &Counters) -> bool {
        Pair::flush(self, cache, counters)
    }

    fn cut(&mut self) -> &mut Burst {
        &mut self.cut
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.reset();
    }
}
