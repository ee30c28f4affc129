//! A queue pair of a back-end: the front-end's rings, driven from the device side.
//!
//! Frames are copied out of the front-end's memory into private buffers, and into its memory from there. The rings go
//! by its point of view: it receives on the even virtqueue of a pair and transmits on the odd one.

use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use virtio_ring::any::Device;
use virtio_ring::{Chain, Direction, Head, Part, Popped, Single, Verdict};

use super::SHORTEST;
use super::front::Offloads;
use super::raw::{LONG_HEADER as LONG, NET_HEADER};
use crate::copy::{copy, prefetch, prefetch_write};
use crate::filter::Filter;
use crate::offload::Hasher;
use crate::packet::{Burst, Marks, Packet, emit_header};
use crate::pool::{self, Cache, Meta};
use crate::regions::Regions;
use crate::stats::Counters;

/// Segments of one chain at the most; and chains of one frame.
const MAX_PARTS: usize = 256;

/// The longest frame that is taken from a front-end: the longest IP packet, to be cut, behind an Ethernet header with two
/// VLAN tags.
const MAX_FRAME: usize = 65_535 + 22;

/// The header of a frame in one buffer: `num_buffers` 1, all else 0 (virtio 1.3, 5.1.6.4.1).
const fn plain<const HEADER: usize>() -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[NET_HEADER - 2] = 1;
    header
}

/// One ring, as the front-end set it up.
pub(crate) struct BackRing {
    pub(crate) device: Device,
    pub(crate) call: Option<OwnedFd>,
    /// What is in it is moved.
    pub(crate) enabled: bool,
    /// The front-end disabled it: what it transmits is discarded.
    pub(crate) discards: bool,
    calls: u64,
}

/// The pair: what the gate is around.
pub(crate) struct BackPair {
    /// The front-end's transmit ring.
    pub(crate) rx: Option<BackRing>,
    /// The front-end's receive ring.
    pub(crate) tx: Option<BackRing>,
    pub(crate) memory: Arc<Regions>,
    pub(crate) mergeable: bool,
    /// What the front-end takes of packets that are sent to it, and what its own may ask for.
    pub(crate) offloads: Offloads,
    /// HASH_REPORT was negotiated: headers are longer.
    pub(crate) long: bool,
    /// What hashes to report to the front-end, if it said so.
    pub(crate) hasher: Option<Arc<Hasher>>,
    /// Which frames the front-end lets in; `None`: all.
    pub(crate) admits: Option<Box<Filter>>,
    filter: Option<Box<Filter>>,
    /// Bytes of the longest frame that the port takes: see [`super::longest`].
    longest: u32,
    /// What a packet was cut into, as far as there was no room for it yet.
    cut: Burst,
    chain: Chain<Box<[Part]>>,
    singles: [Single; STAGE],
    /// Of rings that are gone.
    past_anomalies: u64,
    past_calls: u64,
    /// Polls, to publish counts now and then.
    polls: u8,
}

// SAFETY: the rings' memory is reached through this pair alone on our side, by the side of the gate that has it; the
// parts in `chain` and `singles` are leftovers that are never read before they are written again.
unsafe impl Send for BackPair {}

impl BackRing {
    /// `unused`: no device was on the ring before.
    pub(crate) fn new(device: Device, call: Option<OwnedFd>, unused: bool) -> Self {
        let mut ring = BackRing {
            device,
            call,
            enabled: false,
            discards: false,
            calls: 0,
        };
        ring.device.set_notify(false);
        // Whoever was on the ring before may have ended between using buffers and saying so.
        if !unused && ring.device.needs_call() {
            ring.notify();
        }
        ring
    }

    /// Makes visible what was used; whether the front-end was signalled.
    #[inline(always)]
    fn publish(&mut self) -> bool {
        let asked = self.device.publish();
        if asked {
            self.notify();
        }
        asked
    }

    /// Signals the front-end.
    #[cold]
    #[inline(never)]
    pub(crate) fn notify(&mut self) {
        if let Some(call) = &self.call
            && crate::notify::signal(call).is_ok()
        {
            self.calls += 1;
        }
    }
}

/// Where a frame goes: the writable parts of chains, one after the other.
struct Writer<'a> {
    parts: &'a [Part],
    at: usize,
}

impl Writer<'_> {
    /// Copies as much of `len` bytes as the parts still take; how much.
    #[inline]
    fn put(&mut self, mut src: *const u8, len: usize) -> usize {
        let mut left = len;
        while left > 0
            && let Some(part) = self.parts.first()
        {
            let n = left.min(part.len as usize - self.at);
            // SAFETY: the part is valid for writes of its length, and at + n does not exceed that; the source is the
            // caller's, `len` bytes long.
            unsafe {
                copy(src, part.ptr.as_ptr().add(self.at), n);
                src = src.add(n);
            }
            left -= n;
            self.at += n;
            if self.at == part.len as usize {
                self.parts = &self.parts[1..];
                self.at = 0;
            }
        }
        len - left
    }
}

/// Whether a frame found its place.
enum Fit {
    Sent,
    NoRoom,
    Never,
}

impl super::Asking for BackPair {
    fn send_offloads(&mut self, cache: &mut Cache, burst: &mut Burst, counters: &Counters) -> (usize, bool) {
        match self.long {
            true => self.send_long(cache, burst, counters),
            false => self.send::<true, NET_HEADER>(cache, burst, counters),
        }
    }

    fn flush(&mut self, cache: &mut Cache, counters: &Counters) -> bool {
        BackPair::flush(self, cache, counters)
    }

    fn cut(&mut self) -> &mut Burst {
        &mut self.cut
    }
}

impl BackPair {
    pub(crate) fn new() -> Self {
        let parts = vec![Part::default(); MAX_PARTS].into_boxed_slice();
        BackPair {
            rx: None,
            tx: None,
            memory: Arc::new(Regions::default()),
            mergeable: false,
            offloads: Offloads::NONE,
            long: false,
            hasher: None,
            admits: None,
            filter: None,
            longest: u32::MAX,
            cut: Burst::empty(),
            chain: Chain::new(parts),
            singles: [Single::default(); STAGE],
            past_anomalies: 0,
            polls: 0,
            past_calls: 0,
        }
    }

    /// Takes frames of packets of up to `mtu` bytes.
    pub(crate) fn set_mtu(&mut self, mtu: u16) {
        self.longest = super::longest(mtu);
    }

    /// Which frames to receive; `None`: all.
    pub(crate) fn set_filter(&mut self, filter: Option<Box<Filter>>) {
        self.filter = filter;
    }

    #[inline]
    pub(crate) fn rx(&mut self, cache: &mut Cache, burst: &mut Burst, counters: &Counters) -> usize {
        self.polls = self.polls.wrapping_add(1);
        if self.polls.is_multiple_of(64) {
            self.publish_counts(counters);
        }
        // Once a burst, so that a front-end that may ask for nothing pays for no look at its headers.
        if self.offloads.asks == Marks::NONE && self.filter.is_none() && self.cut.is_empty() && !self.long {
            return self.receive::<false, NET_HEADER>(cache, burst, counters);
        }
        self.flush(cache, counters);
        if self.long {
            return self.receive_long(cache, burst, counters);
        }
        self.receive::<true, NET_HEADER>(cache, burst, counters)
    }

    #[inline(never)]
    fn receive_long(&mut self, cache: &mut Cache, burst: &mut Burst, counters: &Counters) -> usize {
        self.receive::<true, LONG>(cache, burst, counters)
    }

    #[inline(always)]
    fn receive<const OFFLOADS: bool, const HEADER: usize>(
        &mut self,
        cache: &mut Cache,
        burst: &mut Burst,
        counters: &Counters,
    ) -> usize {
        let BackPair {
            rx: Some(ring),
            memory,
            chain,
            singles,
            offloads: Offloads { asks, .. },
            filter,
            longest,
            ..
        } = self
        else {
            return 0;
        };
        if !ring.enabled {
            self.discard(counters);
            return 0;
        }
        let start = burst.len();
        // A frame takes at least a buffer.
        let room = burst.room().min(STAGE);
        let mut room = room.min(cache.reserve(room));
        if room == 0 {
            if burst.room() > 0 {
                counters.rx_no_buffer.add(1);
            }
            return 0;
        }
        let longest = *longest;
        let asks = if OFFLOADS { *asks } else { Marks::NONE };
        // What is shorter or longer is no simple frame. Packets that are to be cut are judged when their header was read.
        let limit = match asks.has(Marks::SEGMENTATION) {
            true => cache.pool().room(),
            false => cache.pool().room().min(longest),
        };
        let spread = limit as usize - SHORTEST;
        let (mut bytes, mut errors, mut full, mut dropped) = (0u64, 0u64, false, false);
        // Not more turns than frames: a front-end that makes bad ones as fast as they are thrown away is left alone.
        let turns = room;
        for _ in 0..turns {
            let left = room - (burst.len() - start);
            let stage = &mut singles[..left];
            let n = ring.device.peek_singles(&**memory, Direction::Readable, stage);
            // First all descriptors, then the bytes: these are on their way meanwhile. The frames are given back (and
            // their memory may be reused) by `publish`, after the copies.
            let fit = stage[..n]
                .iter()
                .take_while(|frame| (frame.len as usize).wrapping_sub(HEADER + SHORTEST) <= spread)
                .map(|frame| prefetch(frame.ptr.as_ptr().wrapping_add(HEADER)))
                .count();
            let before = burst.len();
            bytes += receive::<HEADER>(&stage[..fit], cache, burst);
            if asks != Marks::NONE {
                let received = burst.len() - before;
                errors += look_at(&stage[..fit], asks, burst, before, longest, counters, &mut bytes);
                // Their buffers were among those that are reserved.
                room -= received - (burst.len() - before);
            }
            ring.device.use_read(&stage[..fit]);
            if fit == left {
                break;
            }
            // Either there is no more, or it is no simple frame. Frames stay in order: one of these at a time.
            if !ring.device.has_available() {
                break;
            }
            let popped = ring.device.pop_each(&**memory, chain, 1, |popped| {
                match gather(&popped, cache, room - (burst.len() - start), asks, HEADER) {
                    Ok(Some(packet)) if !super::fits(&packet, longest, counters) => dropped = true,
                    Ok(Some(packet)) => {
                        bytes += packet.len() as u64;
                        // SAFETY: at most `room` chains are popped, a packet each.
                        unsafe { burst.push_unchecked(packet) };
                    }
                    Ok(None) => errors += 1,
                    Err(NoBuffers) => {
                        full = true;
                        return Verdict::Stop;
                    }
                }
                Verdict::Done(0)
            });
            if popped != Ok(1) || burst.len() - start == room {
                break;
            }
        }
        let taken = burst.len() - start;
        if OFFLOADS && filter.is_some() {
            burst.rewrite(start, |packet| {
                if super::passes(filter, &packet) {
                    return Some(packet);
                }
                bytes -= packet.len() as u64;
                None
            });
            counters.rx_filtered.add((taken + start - burst.len()) as u64);
        }
        let n = burst.len() - start;
        if taken > 0 || errors > 0 || dropped {
            if ring.publish() {
                counters.kicks.add(1);
            }
            counters.rx_packets.add(n as u64);
            counters.rx_bytes.add(bytes);
            if errors > 0 {
                counters.rx_errors.add(errors);
            }
        }
        if full {
            counters.rx_no_buffer.add(1);
        }
        n
    }

    /// Takes what a ring that the front-end disabled transmits, without looking at it: such a ring is processed without
    /// side effects (vhost-user.rst, Ring states).
    #[cold]
    #[inline(never)]
    fn discard(&mut self, counters: &Counters) {
        let BackPair {
            rx: Some(ring),
            memory,
            chain,
            ..
        } = self
        else {
            return;
        };
        if !ring.discards {
            return;
        }
        let discarded = ring.device.pop_each(&**memory, chain, STAGE, |_| Verdict::Done(0));
        if let Ok(count @ 1..) = discarded {
            counters.rx_errors.add(count as u64);
            if ring.publish() {
                counters.kicks.add(1);
            }
        }
    }

    #[inline]
    pub(crate) fn tx(&mut self, cache: &mut Cache, burst: &mut Burst, counters: &Counters) -> usize {
        if self.admits.is_none() && !self.long && self.cut.is_empty() {
            return match self.send::<false, NET_HEADER>(cache, burst, counters) {
                (sent, false) => sent,
                (sent, true) => sent + super::send_asking(self, cache, burst, counters),
            };
        }
        if !self.flush(cache, counters) {
            return 0;
        }
        let sent = self.admit(burst, counters);
        sent + super::send_asking(self, cache, burst, counters)
    }

    /// Drops what the front-end does not let in; how many.
    #[inline(never)]
    fn admit(&mut self, burst: &mut Burst, counters: &Counters) -> usize {
        let before = burst.len();
        if self.admits.is_some() && self.tx.is_some() {
            burst.rewrite(0, |packet| super::passes(&self.admits, &packet).then_some(packet));
            counters.tx_filtered.add((before - burst.len()) as u64);
        }
        before - burst.len()
    }

    #[inline(never)]
    fn send_long(&mut self, cache: &mut Cache, burst: &mut Burst, counters: &Counters) -> (usize, bool) {
        self.send::<true, LONG>(cache, burst, counters)
    }

    /// Sends what packets were cut into; whether nothing of that is left.
    #[inline(never)]
    fn flush(&mut self, cache: &mut Cache, counters: &Counters) -> bool {
        if !self.cut.is_empty() {
            let mut cut = std::mem::replace(&mut self.cut, Burst::empty());
            match self.long {
                true => self.send_long(cache, &mut cut, counters),
                false => self.send::<false, NET_HEADER>(cache, &mut cut, counters),
            };
            self.cut = cut;
        }
        self.cut.is_empty()
    }

    /// Of what was sent, packets that are still here: what was cut and did not fit yet.
    pub(crate) fn unsent(&mut self, cache: &mut Cache, counters: &Counters) -> super::Unsent {
        self.flush(cache, counters);
        super::Unsent {
            frames: self.cut.len(),
            up: self.tx.is_some(),
        }
    }

    /// Sends what it can; how many packets, and whether the next one asks for what the front-end does not take. Without
    /// OFFLOADS: whether it asks for anything.
    #[inline(always)]
    fn send<const OFFLOADS: bool, const HEADER: usize>(
        &mut self,
        cache: &mut Cache,
        burst: &mut Burst,
        counters: &Counters,
    ) -> (usize, bool) {
        let BackPair {
            tx: Some(ring),
            memory,
            chain,
            singles,
            mergeable,
            offloads: Offloads { takes, .. },
            hasher,
            ..
        } = self
        else {
            return (0, false);
        };
        let hasher = hasher.as_deref();
        if !ring.enabled {
            return (0, false);
        }
        let mut beyond = false;
        let mut at = 0;
        let (mut bytes, mut dropped) = (0u64, 0u64);
        while at < burst.len() {
            let rest = &burst[at..];
            let rest = &rest[..rest.len().min(STAGE)];
            let stage = &mut singles[..rest.len()];
            let n = ring.device.peek_singles(&**memory, Direction::Writable, stage);
            // First all descriptors, then the bytes: the lines that are written are on their way meanwhile.
            let fit = stage[..n]
                .iter()
                .zip(rest)
                .take_while(|(place, packet)| {
                    let meta = packet.meta();
                    let simple = match OFFLOADS {
                        true => !meta.marks.beyond(*takes) && meta.is_last(),
                        false => meta.is_plain(),
                    };
                    simple && place.len as usize >= meta.len as usize + HEADER
                })
                .map(|(place, _)| {
                    prefetch_write(place.ptr.as_ptr());
                    prefetch_write(place.ptr.as_ptr().wrapping_add(HEADER));
                })
                .count();
            for (frames, packets) in stage[..fit].chunks_mut(SHOWN).zip(rest.chunks(SHOWN)) {
                bytes += send::<OFFLOADS, HEADER>(frames, packets, hasher);
                ring.device.use_written(frames);
                // Shown at once: the front-end works on these while the next ones are copied.
                ring.device.commit();
            }
            at += fit;
            if fit == rest.len() {
                continue;
            }
            // No place may be left to have looked at it.
            let meta = burst[at].meta();
            beyond = if OFFLOADS {
                meta.marks.beyond(*takes)
            } else {
                meta.asks()
            };
            if beyond {
                break;
            }
            // Either there is no more, or it goes into no simple place.
            if !ring.device.has_available() {
                break;
            }
            let packet = &burst[at];
            let header = header_of::<HEADER>(packet, hasher);
            match scatter(&mut ring.device, memory, chain, *mergeable, packet, &header) {
                Fit::Sent => bytes += packet.len() as u64,
                Fit::NoRoom => break,
                Fit::Never => dropped += 1,
            }
            at += 1;
        }
        if at > 0 {
            if ring.publish() {
                counters.kicks.add(1);
            }
            let mut returning = cache.returning();
            for packet in &burst[..at] {
                // SAFETY: forgotten right below.
                unsafe { returning.put(packet.meta_ptr()) };
            }
            drop(returning);
            // SAFETY: the cache owns these buffers now.
            unsafe { burst.forget_front(at) };
            counters.tx_packets.add(at as u64 - dropped);
            counters.tx_bytes.add(bytes);
            if dropped > 0 {
                counters.tx_errors.add(dropped);
            }
        }
        (at, beyond)
    }

    /// Asks for a kick at the next frame. `true`: frames are there already.
    pub(crate) fn arm(&mut self) -> bool {
        self.rx
            .as_mut()
            .is_some_and(|ring| (ring.enabled || ring.discards) && ring.device.set_notify(true))
    }

    /// Asks for no more kicks. `true`: frames are there.
    pub(crate) fn disarm(&mut self) -> bool {
        self.rx.as_mut().is_some_and(|ring| {
            ring.device.set_notify(false);
            (ring.enabled || ring.discards) && ring.device.has_available()
        })
    }

    /// Copies the rings' own counts to where others read them: now and then, for it costs some additions.
    #[inline(never)]
    pub(crate) fn publish_counts(&self, counters: &Counters) {
        let rings = [&self.rx, &self.tx].into_iter().flatten();
        let (mut anomalies, mut calls) = (self.past_anomalies, self.past_calls);
        for ring in rings {
            anomalies += ring.device.anomalies().total();
            calls += ring.calls;
        }
        counters.anomalies.raise(anomalies);
        counters.kicks.raise(calls);
    }

    /// The ring of a virtqueue: the even one of the pair is the front-end's receive ring.
    pub(crate) fn ring_mut(&mut self, even: bool) -> &mut Option<BackRing> {
        if even { &mut self.tx } else { &mut self.rx }
    }

    /// Stops a ring; the base of whoever goes on with it.
    pub(crate) fn stop(&mut self, even: bool) -> Option<u32> {
        let ring = self.ring_mut(even).take()?;
        if even {
            self.cut.clear();
        }
        self.past_anomalies += ring.device.anomalies().total();
        self.past_calls += ring.calls;
        Some(ring.device.base())
    }
}

/// Frames that are staged at a time, between the look at their descriptors and the copy of their bytes.
const STAGE: usize = 32;

/// Frames that a front-end is shown at a time while a burst is sent. Fewer make more of its bursts and of the lines that
/// both sides write, more leave one side idle while the other one works.
const SHOWN: usize = 16;

/// Copies staged frames, whose lengths were checked against the buffers' room, into buffers of the cache, which has
/// enough; their bytes.
#[inline(always)]
fn receive<const HEADER: usize>(frames: &[Single], cache: &mut Cache, burst: &mut Burst) -> u64 {
    let (mut bytes, count) = (0, frames.len());
    let mut arriving = burst.appending();
    for (frame, mut meta) in frames.iter().zip(cache.last(count)) {
        let len = frame.len as usize - HEADER;
        // SAFETY: the buffer is the cache's until it is forgotten below, and `len` was checked against its room; the
        // part is valid for reads of its length. The burst has room: no more than that was staged.
        unsafe {
            let m = meta.as_mut();
            m.received(len as u32);
            copy(frame.ptr.as_ptr().add(HEADER), m.data(), len);
            arriving.push(Packet::from_meta(meta));
        }
        bytes += len as u64;
    }
    cache.forget_first(count, count);
    bytes
}

/// Reads the headers of staged frames, which are the burst's packets from `start` on, and drops what makes no sense; how
/// many. Their bytes are taken off `bytes`.
#[inline(never)]
fn look_at(
    frames: &[Single],
    asks: Marks,
    burst: &mut Burst,
    start: usize,
    longest: u32,
    counters: &Counters,
    bytes: &mut u64,
) -> u64 {
    let mut frames = frames.iter();
    let mut errors = 0;
    burst.rewrite(start, |mut packet| {
        let frame = frames.next()?;
        let mut header = [0; NET_HEADER];
        // SAFETY: the part is valid for reads of its length, which is more than a header.
        unsafe { copy(frame.ptr.as_ptr(), header.as_mut_ptr(), NET_HEADER) };
        if !packet.take_header(&header, asks) {
            errors += 1;
        } else if packet.len() <= longest as usize || super::fits(&packet, longest, counters) {
            return Some(packet);
        }
        *bytes -= packet.len() as u64;
        None
    });
    errors
}

/// Copies packets of one segment to the staged places, which were checked to be long enough, and says how much was
/// written to each; the packets' bytes.
#[inline(always)]
fn send<const OFFLOADS: bool, const HEADER: usize>(
    places: &mut [Single],
    packets: &[Packet],
    hasher: Option<&Hasher>,
) -> u64 {
    let mut bytes = 0;
    for (place, packet) in places.iter_mut().zip(packets) {
        let len = packet.meta().len;
        // SAFETY: the part is valid for writes of header and frame; the packet is ours.
        unsafe {
            let ptr = place.ptr.as_ptr();
            let header = if OFFLOADS { header_of(packet, hasher) } else { plain() };
            ptr.cast::<[u8; HEADER]>().write_unaligned(header);
            copy(packet.meta().data(), ptr.add(HEADER), len as usize);
        }
        place.len = len + HEADER as u32;
        bytes += u64::from(len);
    }
    bytes
}

/// The header of a packet in one buffer.
#[inline(always)]
fn header_of<const HEADER: usize>(packet: &Packet, hasher: Option<&Hasher>) -> [u8; HEADER] {
    let meta = packet.meta();
    let mut header = plain::<HEADER>();
    if meta.marks.has(Marks::ASKED) {
        header[..NET_HEADER].copy_from_slice(&emit_header(meta, 1));
    }
    if HEADER == LONG
        && let Some(hasher) = hasher
    {
        let (hash, report) = hasher.of(packet);
        header[12..16].copy_from_slice(&hash.to_le_bytes());
        header[16..18].copy_from_slice(&report.0.to_le_bytes());
    }
    header
}

struct NoBuffers;

/// Copies a frame that is in several parts, or does not fit one buffer, if that leaves `others` buffers in the cache.
/// `None`: it is no frame.
#[cold]
#[inline(never)]
fn gather(
    popped: &Popped<'_>,
    cache: &mut Cache,
    others: usize,
    asks: Marks,
    header_len: usize,
) -> Result<Option<Packet>, NoBuffers> {
    // A ring of frames to send is only read, whatever its descriptors say: DPDK's driver leaves WRITE set on entries of its
    // indirect tables that it has used for something else before.
    let parts = || popped.readable.iter().chain(popped.writable);
    let total: usize = parts().map(|p| p.len as usize).sum();
    if total < header_len || total - header_len > MAX_FRAME {
        return Ok(None);
    }
    let room = cache.pool().room() as usize;
    // The buffers that the burst's other frames need stay reserved.
    let needed = (total - header_len).div_ceil(room).max(1) + others;
    if needed > cache.most() {
        // It would wait for ever.
        return Ok(None);
    }
    if cache.reserve(needed) < needed {
        return Err(NoBuffers);
    }
    let first = cache.pop().ok_or(NoBuffers)?;
    let mut tail = first;
    let mut header = [0; LONG];
    let mut skip = header_len;
    for part in parts() {
        let mut from = skip.min(part.len as usize);
        // SAFETY: the part is valid for reads of its length, and the header has `skip` bytes left.
        unsafe { copy(part.ptr.as_ptr(), header.as_mut_ptr().add(header_len - skip), from) };
        skip -= from;
        while from < part.len as usize {
            // SAFETY: the buffers of the chain that begins at `first` are ours, as just popped.
            let mut m: &mut Meta = unsafe { tail.as_mut() };
            if m.len as usize == room {
                let next = match cache.pop() {
                    Some(next) => next,
                    None => {
                        // SAFETY: the chain is ours, given up here.
                        unsafe { pool::free([first]) };
                        return Err(NoBuffers);
                    }
                };
                m.set_next(next);
                tail = next;
                // SAFETY: as above.
                m = unsafe { tail.as_mut() };
            }
            let n = (part.len as usize - from).min(room - m.len as usize);
            // SAFETY: the part is valid for reads of its length; the buffer holds `room` bytes.
            unsafe { copy(part.ptr.as_ptr().add(from), m.data().add(m.len as usize), n) };
            m.len += n as u32;
            from += n;
        }
    }
    // SAFETY: the chain is ours.
    let mut packet = unsafe { Packet::from_meta(first) };
    let header = header.first_chunk().ok_or(NoBuffers)?;
    if asks != Marks::NONE && !packet.take_header(header, asks) {
        return Ok(None);
    }
    Ok(Some(packet))
}

/// Copies a frame that is in several segments, or goes into several parts or several buffers.
#[cold]
#[inline(never)]
fn scatter(
    device: &mut Device,
    memory: &Arc<Regions>,
    chain: &mut Chain<Box<[Part]>>,
    mergeable: bool,
    packet: &Packet,
    mut header: &[u8],
) -> Fit {
    let total = packet.len() + header.len();
    let mut used: [Option<(Head, u32)>; MAX_PARTS] = [None; MAX_PARTS];
    let mut count = 0u16;
    let mut written = 0usize;
    let mut merged = None;
    let mut source = Segments::new(packet);
    while written < total {
        let slot = usize::from(count);
        let popped = if slot < MAX_PARTS {
            device.pop(&**memory, chain)
        } else {
            Ok(None)
        };
        let Ok(Some(head)) = popped else {
            let all = count == device.size() || slot == MAX_PARTS;
            undo(device, &used);
            return if all { Fit::Never } else { Fit::NoRoom };
        };
        count += 1;
        if chain.fault().is_some() || chain.writable_len() == 0 {
            // Its neighbours go back with it, empty: the front-end broke its own ring.
            for (head, _) in used.iter().flatten() {
                device.push(*head, 0);
            }
            device.push(head, 0);
            return Fit::NoRoom;
        }
        if slot == 0 {
            merged = places_of_num_buffers(chain.writable());
        }
        let fits = written + chain.writable_len() as usize >= total;
        if !fits && (!mergeable || merged.is_none()) {
            device.undo(head);
            undo(device, &used);
            return Fit::Never;
        }
        let mut to = Writer {
            parts: chain.writable(),
            at: 0,
        };
        let mut here = 0;
        let n = to.put(header.as_ptr(), header.len());
        header = &header[n..];
        here += n;
        if header.is_empty() {
            here += source.copy_to(&mut to);
        }
        written += here;
        used[slot] = Some((head, here as u32));
    }
    if count > 1
        && let Some(places) = merged
    {
        for (place, byte) in places.into_iter().zip(count.to_le_bytes()) {
            // SAFETY: inside the first chain's parts, which are valid for writes.
            unsafe { place.write(byte) };
        }
    }
    for (head, len) in used.iter().flatten() {
        device.push(*head, *len);
    }
    Fit::Sent
}

/// Gives popped chains back, the last first.
fn undo(device: &mut Device, used: &[Option<(Head, u32)>]) {
    for (head, _) in used.iter().rev().flatten() {
        device.undo(*head);
    }
}

/// Where the two bytes of `num_buffers` lie, in one part or in two.
fn places_of_num_buffers(parts: &[Part]) -> Option<[NonNull<u8>; 2]> {
    let place = |mut at: usize| {
        for part in parts {
            match at.checked_sub(part.len as usize) {
                Some(behind) => at = behind,
                // SAFETY: below the part's length.
                None => return Some(unsafe { part.ptr.add(at) }),
            }
        }
        None
    };
    Some([place(NET_HEADER - 2)?, place(NET_HEADER - 1)?])
}

/// A packet's bytes, segment by segment.
struct Segments<'a> {
    packet: Option<&'a Meta>,
    at: usize,
}

impl<'a> Segments<'a> {
    fn new(packet: &'a Packet) -> Self {
        Segments {
            packet: Some(packet.meta()),
            at: 0,
        }
    }

    /// Copies as much as `to` takes; how much.
    fn copy_to(&mut self, to: &mut Writer<'_>) -> usize {
        let mut done = 0;
        while let Some(meta) = self.packet {
            let left = meta.len as usize - self.at;
            // SAFETY: at <= len: inside the segment.
            let n = to.put(unsafe { meta.data().add(self.at) }, left);
            done += n;
            self.at += n;
            if n < left {
                break;
            }
            // SAFETY: the segments behind the first belong to the same packet, which is borrowed.
            self.packet = meta.next().map(|next| unsafe { next.as_ref() });
            self.at = 0;
        }
        done
    }
}
