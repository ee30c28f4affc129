//! A queue pair of a virtual function: packets on the descriptor rings of a device.

use std::ptr::NonNull;
use std::sync::Arc;

use hugemem::Segment as Memory;
use ixgbevf::{HashType, L4, MAX_SEGMENTS, MIN_FRAME, Offload, Received, Segment, Segmentation, Status};

use virtio_ring::net::HashReport;

use super::{Copied, SHORTEST};
use crate::filter::Filter;
use crate::offload::headers::{Network, Transport};
use crate::packet::{Burst, Marks, Packet};
use crate::pool::{self, BULK, Cache, Meta};
use crate::stats::Counters;
use crate::vf::{Rings, Tx, anomalies};

/// The pair: what the gate is around.
pub(crate) struct Pair {
    /// None once the port is closed: nothing of it reaches the device then.
    rings: Option<Rings>,
    partial: Option<Partial>,
    /// Free descriptors of the receive ring at which it is filled again.
    refill: usize,
    /// Free descriptors of the transmit ring below which those are taken back that the device has sent: soon enough that
    /// they fit the cache, and the receive ring gets buffers whose private lines are still near.
    reclaim: usize,
    size: usize,
    /// The rings run.
    running: bool,
    /// The link is up.
    up: bool,
    /// What the device does for packets that are sent.
    takes: Marks,
    filter: Option<Box<Filter>>,
    /// Bytes of the longest frame that the port takes: see [`super::longest`].
    longest: u32,
    /// What a packet was cut into, as far as there was no room for it yet.
    cut: Burst,
    /// Violations that were counted by rings that are gone.
    anomalies: u64,
    /// Keeps the rings mapped.
    _segment: Arc<Memory>,
}

// SAFETY: the ring memory and the Metas that the rings' cookies point to are reached through this pair alone, by the
// side of the gate that has it; `Partial::tail` points into the chain that `head` owns.
unsafe impl Send for Pair {}

/// A frame whose pieces have not all come yet.
struct Partial {
    head: Packet,
    tail: NonNull<Meta>,
}

/// In [`Meta::hdr_len`] between the ring and [`Pair::assemble`]: what is odd about a piece. 0: it is a whole frame.
mod piece {
    pub(super) const ODD: u16 = 1;
    pub(super) const FIRST: u16 = 2;
    pub(super) const LAST: u16 = 4;
    pub(super) const BAD: u16 = 8;
}

/// What became of a frame that is to be sent.
enum Sent {
    Yes,
    /// Not now: too few descriptors are free.
    Full,
    /// The device can never take it.
    Never,
}

/// The buffer that a cookie of our rings stands for.
///
/// # Safety
/// The cookie was given to a ring with a buffer that its giver owned, and the ring gave it back: the buffer is the
/// caller's.
#[inline(always)]
unsafe fn buffer(cookie: u64) -> NonNull<Meta> {
    // SAFETY: made from a NonNull.
    unsafe { NonNull::new_unchecked(cookie as *mut Meta) }
}

#[inline(always)]
fn cookie(meta: NonNull<Meta>) -> u64 {
    meta.as_ptr() as u64
}

#[inline(always)]
fn segment(meta: &Meta) -> Segment {
    Segment {
        addr: meta.address + u64::from(meta.offset),
        len: meta.len,
    }
}

/// Over what a hash is, as a virtio-net header says it.
#[inline(always)]
fn report(of: Option<HashType>) -> HashReport {
    match of {
        Some(HashType::Ipv4Tcp) => HashReport::TCPV4,
        Some(HashType::Ipv4) => HashReport::IPV4,
        Some(HashType::Ipv6Tcp) => HashReport::TCPV6,
        Some(HashType::Ipv6Ex) => HashReport::IPV6_EX,
        Some(HashType::Ipv6) => HashReport::IPV6,
        Some(HashType::Ipv6ExTcp) => HashReport::TCPV6_EX,
        Some(HashType::Ipv4Udp) => HashReport::UDPV4,
        Some(HashType::Ipv6Udp) => HashReport::UDPV6,
        Some(HashType::Ipv6ExUdp) => HashReport::UDPV6_EX,
        _ => HashReport::NONE,
    }
}

/// Notes what the device says of a frame: in its last piece, which may be its only one.
#[inline(always)]
fn note(meta: &mut Meta, received: &Received) {
    let looked = Status::L4CS.union(Status::TCPE).union(Status::IPE);
    let mut marks = Marks::NONE;
    if received.status.intersection(looked) == Status::L4CS {
        marks = Marks::RIGHT;
    }
    if let Some(hash) = received.hash() {
        (meta.hash, meta.hash_report) = (hash, report(received.hash_type()).0);
        marks = marks.with(Marks::HASH);
    }
    if let Some(tag) = received.vlan() {
        meta.tag = tag;
        marks = marks.with(Marks::TAG);
        meta.set_asks();
    }
    meta.marks = marks;
}

impl Pair {
    /// A pair on rings in `segment`, not running.
    pub(crate) fn new(rings: Rings, segment: Arc<Memory>, takes: Marks) -> Self {
        let size = usize::from(rings.rx.size());
        Pair {
            rings: Some(rings),
            partial: None,
            refill: (size / 4).clamp(1, 32),
            reclaim: size - (size / 4).clamp(1, 64),
            size,
            running: false,
            up: false,
            takes,
            filter: None,
            longest: u32::MAX,
            cut: Burst::empty(),
            anomalies: 0,
            _segment: segment,
        }
    }

    /// The rings, to be started.
    pub(crate) fn rings(&mut self) -> Option<&mut Rings> {
        self.rings.as_mut()
    }

    /// Whether the rings run. While they do not nothing is posted; what has come can still be received.
    pub(crate) fn set_running(&mut self, running: bool) {
        self.running = running;
        self.up &= running;
    }

    /// Whether the link is up. While it is down nothing is sent.
    pub(crate) fn set_up(&mut self, up: bool) {
        self.up = up;
    }

    /// Takes frames of packets of up to `mtu` bytes.
    pub(crate) fn set_mtu(&mut self, mtu: u16) {
        self.longest = super::longest(mtu);
    }

    /// Which frames to receive; `None`: all that the device lets through.
    pub(crate) fn set_filter(&mut self, filter: Option<Box<Filter>>) {
        self.filter = filter;
    }

    #[inline]
    pub(crate) fn rx(&mut self, cache: &mut Cache, burst: &mut Burst, counters: &Counters) -> usize {
        let Some(rings) = &mut self.rings else { return 0 };
        let start = burst.len();
        let room = burst.room();
        // Of all frames, the bytes behind an Ethernet header: one that is shorter wraps around, and shows in the sum. And all
        // bits of their lengths: no less than the longest.
        let (mut payload, mut lengths) = (0u64, 0);
        let mut odd = self.partial.is_some();
        let mut arriving = burst.appending();
        rings.rx.poll_each(room, |received| {
            // SAFETY: a cookie of the receive ring is a buffer that `fill` posted.
            let mut meta = unsafe { buffer(received.cookie) };
            payload += u64::from(received.len.wrapping_sub(SHORTEST as u32));
            lengths |= received.len;
            // SAFETY: ours again.
            let m = unsafe { meta.as_mut() };
            m.received(received.len);
            note(m, &received);
            if !received.is_whole() {
                odd = true;
                m.hdr_len = piece::ODD
                    | if received.first { piece::FIRST } else { 0 }
                    | if received.last { piece::LAST } else { 0 }
                    | if received.bad { piece::BAD } else { 0 };
            }
            // SAFETY: at most `room` buffers; this one is ours.
            unsafe { arriving.push(Packet::from_meta(meta)) };
        });
        drop(arriving);
        let mut bytes = payload + ((burst.len() - start) * SHORTEST) as u64;
        if odd || payload >> 31 != 0 || lengths > self.longest {
            bytes = self.assemble(burst, start, counters);
        }
        self.refill(cache, counters);
        if self.filter.is_some() {
            bytes -= self.look_at(burst, start, counters);
        }
        let n = burst.len() - start;
        if n > 0 {
            counters.rx_packets.add(n as u64);
            counters.rx_bytes.add(bytes);
        }
        n
    }

    /// Joins the buffers of frames that took several, and drops what is broken, too short or too long; the bytes that are
    /// left. The driver has
    /// seen to it that pieces come in order and that a frame has no more than 9,728 bytes.
    #[cold]
    #[inline(never)]
    fn assemble(&mut self, burst: &mut Burst, start: usize, counters: &Counters) -> u64 {
        let mut bytes = 0;
        let partial = &mut self.partial;
        let longest = self.longest;
        let fits = |packet: &Packet| {
            (SHORTEST..=longest as usize).contains(&packet.len()) || super::fits(packet, longest, counters)
        };
        burst.rewrite(start, |mut packet| {
            let piece = std::mem::take(&mut packet.meta_mut().hdr_len);
            if piece == 0 {
                return fits(&packet).then(|| {
                    bytes += packet.len() as u64;
                    packet
                });
            }
            if piece & piece::FIRST != 0 {
                *partial = None;
            }
            if piece & piece::BAD != 0 {
                // Of the frame, this piece and those before it.
                *partial = None;
                counters.rx_errors.add(1);
                packet.meta_mut().len = 0;
                return None;
            }
            match partial {
                None if piece & piece::FIRST == 0 => return None,
                None => {
                    let tail = packet.meta_ptr();
                    *partial = Some(Partial { head: packet, tail });
                }
                Some(part) => {
                    let said = packet.meta();
                    let (marks, tag, hash) = (said.marks, said.tag, (said.hash, said.hash_report));
                    let meta = packet.into_meta();
                    // SAFETY: the tail is in the chain that `head` owns.
                    unsafe { part.tail.as_mut() }.set_next(meta);
                    part.tail = meta;
                    let head = part.head.meta_mut();
                    (head.marks, head.tag) = (marks, tag);
                    if marks.has(Marks::ASKED) {
                        head.set_asks();
                    }
                    (head.hash, head.hash_report) = hash;
                }
            }
            if piece & piece::LAST == 0 {
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

    /// Drops what the filter keeps out; the bytes of that.
    #[cold]
    #[inline(never)]
    fn look_at(&mut self, burst: &mut Burst, start: usize, counters: &Counters) -> u64 {
        let mut dropped = 0;
        let filter = &self.filter;
        burst.rewrite(start, |packet| {
            if super::passes(filter, &packet) {
                return Some(packet);
            }
            counters.rx_filtered.add(1);
            dropped += packet.len() as u64;
            None
        });
        dropped
    }

    #[inline(always)]
    fn refill(&mut self, cache: &mut Cache, counters: &Counters) {
        if let Some(rings) = &self.rings
            && usize::from(rings.rx.free()) >= self.refill
            && self.running
        {
            self.fill(cache, counters);
        }
    }

    /// Fills the receive ring and publishes that.
    pub(crate) fn fill(&mut self, cache: &mut Cache, counters: &Counters) {
        let Some(rings) = &mut self.rings else { return };
        let rx = &mut rings.rx;
        let mut want = usize::from(rx.free());
        let len = cache.pool().room();
        while want > 0 {
            let have = cache.reserve(want.min(BULK)).min(want);
            if have == 0 {
                counters.rx_no_buffer.add(1);
                break;
            }
            let buffers = cache.last(have).map(|meta| {
                // SAFETY: the cache owns it.
                let addr = unsafe { meta.as_ref() }.room_address();
                (Segment { addr, len }, cookie(meta))
            });
            // SAFETY: buffers of the pool, mapped for the device as long as it is not stopped, and the ring's from here on.
            let n = unsafe { rx.add_each(buffers) };
            cache.forget_first(n, have);
            want -= n;
            if n == 0 {
                break;
            }
        }
        rx.publish();
        self.publish_counts(counters);
    }

    #[inline]
    pub(crate) fn tx(&mut self, cache: &mut Cache, burst: &mut Burst, counters: &Counters) -> usize {
        if !self.cut.is_empty() && !self.flush(cache, counters) {
            return 0;
        }
        match self.send::<false>(cache, burst, counters) {
            (sent, false) => sent,
            (sent, true) => sent + super::send_asking(self, cache, burst, counters),
        }
    }

    /// Sends what it can; how many packets, and whether the next one asks for what the device does not do. Without
    /// OFFLOADS: whether it asks for anything.
    #[inline(always)]
    fn send<const OFFLOADS: bool>(
        &mut self,
        cache: &mut Cache,
        burst: &mut Burst,
        counters: &Counters,
    ) -> (usize, bool) {
        if !self.up {
            return (0, false);
        }
        if self.rings.as_ref().is_some_and(|rings| {
            // A descriptor more, for a context.
            usize::from(rings.tx.free()) < (burst.len() + 1).max(self.reclaim)
        }) {
            self.reclaim(cache);
        }
        let takes = self.takes;
        let own = cache.own();
        let mut bytes = 0u64;
        let mut sent = 0;
        let mut retried = false;
        let mut beyond = false;
        while let Some(rings) = &mut self.rings {
            let tx = &mut rings.tx;
            let frames = burst[sent..].iter().map_while(|packet| {
                let meta = packet.meta();
                // What may ask for something is not plain, with OFFLOADS or without.
                if !meta.is_plain_of(own) || !Tx::takes(meta.len) {
                    return None;
                }
                bytes += u64::from(meta.len);
                Some((segment(meta), cookie(packet.meta_ptr())))
            });
            // SAFETY: buffers of this port's pool, mapped for the device, which leave the burst for the ring below.
            sent += unsafe { tx.add_each(frames) };
            // What stopped it: the end, a full ring, or a frame that is not a plain one.
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
            match send_one(tx, packet) {
                Sent::Yes => {
                    bytes += len;
                    sent += 1;
                }
                Sent::Full if !retried => {
                    // More descriptors than were left free are behind this frame's segments.
                    retried = true;
                    self.reclaim(cache);
                }
                Sent::Full => break,
                Sent::Never => {
                    counters.tx_errors.add(1);
                    burst.remove(sent);
                }
            }
        }
        if let Some(rings) = &mut self.rings
            && sent > 0
        {
            rings.tx.publish();
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
        let mut cut = std::mem::replace(&mut self.cut, Burst::empty());
        self.send::<false>(cache, &mut cut, counters);
        self.cut = cut;
        self.cut.is_empty()
    }

    /// Takes back what the device has sent.
    #[inline]
    pub(crate) fn reclaim(&mut self, cache: &mut Cache) {
        let Some(rings) = &mut self.rings else { return };
        let mut returning = cache.returning();
        rings.tx.poll_each(self.size, |cookie| {
            // SAFETY: a cookie of the transmit ring is the head of a packet that `tx` gave up.
            unsafe { returning.put(buffer(cookie)) };
        });
    }

    /// Frames that the device has not sent. With the link down they wait for it, or for the port's end.
    pub(crate) fn unsent(&mut self, cache: &mut Cache, counters: &Counters) -> super::Unsent {
        self.reclaim(cache);
        self.flush(cache, counters);
        let in_flight = self.rings.as_ref().map_or(0, |rings| rings.tx.in_flight().into());
        super::Unsent {
            frames: in_flight + self.cut.len(),
            up: self.up,
        }
    }

    /// Has the device raise an interrupt at the next frame. `true`: frames are there already.
    pub(crate) fn arm(&mut self, cache: &mut Cache, counters: &Counters) -> bool {
        if self.running {
            self.fill(cache, counters);
        }
        let Some(rings) = &mut self.rings else { return false };
        if self.running {
            rings.interrupts.enable(rings.vector);
        }
        rings.rx.has_done()
    }

    /// `true`: frames are there. The vector has masked itself, if it was raised; if not it stays on, for others may wait
    /// for it too.
    pub(crate) fn disarm(&mut self) -> bool {
        self.rings.as_ref().is_some_and(|rings| rings.rx.has_done())
    }

    /// Copies the rings' own counts to where others read them.
    #[inline(never)]
    pub(crate) fn publish_counts(&self, counters: &Counters) {
        counters.anomalies.raise(self.anomalies + self.seen());
    }

    fn seen(&self) -> u64 {
        self.rings.as_ref().map_or(0, |rings| anomalies(&rings.rx))
    }

    /// Takes every buffer back from the rings, which begin anew: the device does not use them any more.
    pub(crate) fn detach(&mut self) {
        self.partial = None;
        self.cut.clear();
        self.set_running(false);
        if let Some(rings) = &mut self.rings {
            let give = |cookie| {
                // SAFETY: a cookie of our rings, given back.
                unsafe { pool::free([buffer(cookie)]) }
            };
            // SAFETY: the device was stopped, reset or removed before.
            unsafe {
                rings.rx.detach_each(give);
                rings.tx.detach_each(give);
            }
        }
    }

    /// Takes every buffer back and lets go of the device's registers: it was reset, or is gone.
    pub(crate) fn close(&mut self) {
        self.detach();
        self.anomalies += self.seen();
        self.rings = None;
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

/// Posts a frame of several segments, or one that asks for what the device does.
#[inline(never)]
fn send_one(tx: &mut Tx, packet: &mut Packet) -> Sent {
    let mut segments = [Segment { addr: 0, len: 0 }; MAX_SEGMENTS];
    let mut n = 0;
    let mut next = Some(packet.meta_ptr());
    while let Some(meta) = next {
        // SAFETY: a segment of the packet.
        let meta = unsafe { meta.as_ref() };
        if meta.len > 0 {
            let Some(place) = segments.get_mut(n) else {
                return Sent::Never;
            };
            *place = segment(meta);
            n += 1;
        }
        next = meta.next();
    }
    if packet.len() < usize::from(MIN_FRAME) {
        return Sent::Never;
    }
    // Before anything is changed in the headers: one more for the context.
    if n + 1 > usize::from(tx.free()) {
        return match n + 1 > usize::from(tx.size()) - 1 {
            true => Sent::Never,
            false => Sent::Full,
        };
    }
    let Some(offload) = offload(packet) else {
        return Sent::Never;
    };
    // SAFETY: buffers of this port's pool, mapped for the device, which the caller leaves to the ring.
    match unsafe { tx.add(&segments[..n], &offload, cookie(packet.meta_ptr())) } {
        Ok(()) => Sent::Yes,
        Err(ixgbevf::Error::Full) => Sent::Full,
        Err(_) => Sent::Never,
    }
}

/// What the device is to do to a packet. A checksum of a kind that it does not know is made here; `None`: it cannot be.
fn offload(packet: &mut Packet) -> Option<Offload> {
    let vlan = packet.vlan_tag();
    let marks = packet.meta().marks;
    let plain = Offload { vlan, ..Offload::NONE };
    let segmentation = marks.has(Marks::SEGMENTATION);
    if !segmentation && !marks.has(Marks::CHECKSUM) {
        return Some(plain);
    }
    let headers = packet
        .device_headers()
        .filter(|h| h.network != Network::Other && h.network_at <= 127 && h.transport_at - h.network_at <= 511);
    let Some(headers) = headers else {
        return (!segmentation && packet.complete_checksum()).then_some(plain);
    };
    let ipv4 = headers.network == Network::Ipv4;
    let cut = if segmentation {
        if headers.transport != Transport::Tcp || !packet.prepare_for_device(&headers) {
            return None;
        }
        Some(Segmentation {
            header_len: (headers.payload_at - headers.transport_at) as u8,
            mss: packet.meta().gso_size,
        })
    } else {
        None
    };
    Some(Offload {
        l2_len: headers.network_at as u8,
        l3_len: (headers.transport_at - headers.network_at) as u16,
        ipv4,
        ip_checksum: ipv4 && segmentation,
        l4: if headers.transport == Transport::Tcp {
            L4::Tcp
        } else {
            L4::Udp
        },
        vlan,
        segmentation: cut,
    })
}

impl Drop for Pair {
    fn drop(&mut self) {
        // Whoever drops it has taken the device from the rings; there is no way to a pair but through its port.
        self.detach();
    }
}
