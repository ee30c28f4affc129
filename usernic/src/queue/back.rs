//! A queue pair of a back-end: the front-end's rings, driven from the device side.
//!
//! Frames are copied out of the front-end's memory into private buffers, and into its memory from there. The rings go
//! by its point of view: it receives on the even virtqueue of a pair and transmits on the odd one.

use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use virtio_ring::split::{Device, Verdict};
use virtio_ring::{Chain, Head, Part};

use super::raw::NET_HEADER;
use crate::copy::{copy, prefetch, prefetch_write};
use crate::packet::{Burst, Packet};
use crate::pool::{self, Cache, Meta};
use crate::regions::Regions;
use crate::stats::Counters;

/// Segments of one chain at the most; and chains of one frame.
const MAX_PARTS: usize = 256;

/// The longest frame that is taken from a front-end: the largest that virtio knows, a GSO packet of 64 KiB.
const MAX_FRAME: usize = 65_550;

/// The header of a frame in one buffer: `num_buffers` 1, all else 0 (virtio 1.3, 5.1.6.4.1).
const PLAIN: [u8; NET_HEADER] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];

/// One ring, as the front-end set it up.
pub(crate) struct BackRing {
    pub(crate) device: Device,
    pub(crate) call: Option<OwnedFd>,
    pub(crate) enabled: bool,
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
    chain: Chain<Box<[Part]>>,
    /// Of rings that are gone.
    past_anomalies: u64,
    past_calls: u64,
}

// SAFETY: the rings' memory is reached through this pair alone on our side, by the side of the gate that has it; the
// parts in `chain` are leftovers that are never read before they are written again.
unsafe impl Send for BackPair {}

impl BackRing {
    pub(crate) fn new(device: Device, call: Option<OwnedFd>, enabled: bool) -> Self {
        let mut ring = BackRing {
            device,
            call,
            enabled,
            calls: 0,
        };
        ring.device.set_notify(false);
        ring
    }

    #[inline(always)]
    fn publish(&mut self) {
        if self.device.publish() {
            self.notify();
        }
    }

    #[cold]
    #[inline(never)]
    fn notify(&mut self) {
        if let Some(call) = &self.call {
            self.calls += 1;
            // Does not block: the descriptor was made so when it came. A full counter is a call to see anyway.
            let _ = rustix::io::write(call, &1u64.to_ne_bytes());
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

impl BackPair {
    pub(crate) fn new() -> Self {
        let parts = vec![Part::default(); MAX_PARTS].into_boxed_slice();
        BackPair {
            rx: None,
            tx: None,
            memory: Arc::new(Regions::default()),
            mergeable: false,
            chain: Chain::new(parts),
            past_anomalies: 0,
            past_calls: 0,
        }
    }

    #[inline]
    pub(crate) fn rx(&mut self, cache: &mut Cache, burst: &mut Burst, counters: &Counters) -> usize {
        let BackPair {
            rx: Some(ring),
            memory,
            chain,
            ..
        } = self
        else {
            return 0;
        };
        if !ring.enabled {
            return 0;
        }
        let start = burst.len();
        // A frame takes at least a buffer.
        let room = burst.room().min(STAGE);
        let room = room.min(cache.reserve(room));
        if room == 0 {
            if burst.room() > 0 {
                counters.rx_no_buffer.add(1);
            }
            return 0;
        }
        let limit = cache.pool().room() as usize;
        let mut bytes = 0u64;
        let mut errors = 0u64;
        let mut full = false;
        // First all descriptors, then the bytes: these are on their way meanwhile. The frames are given back (and their
        // memory may be reused) by `publish`, after the copies.
        let mut stage = Stage::new();
        let _ = ring
            .device
            .pop_each(&**memory, chain, room, |popped| match popped.readable {
                [only] if (only.len as usize).wrapping_sub(NET_HEADER + 1) < limit => {
                    let ptr = only.ptr.as_ptr().wrapping_add(NET_HEADER);
                    prefetch(ptr);
                    stage.push(ptr, only.len as usize - NET_HEADER);
                    Verdict::Done(0)
                }
                parts => {
                    // Frames stay in order: what is staged goes first.
                    bytes += stage.receive(cache, burst);
                    match gather(parts, cache, room - (burst.len() - start)) {
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
                }
            });
        bytes += stage.receive(cache, burst);
        let n = burst.len() - start;
        if n > 0 || errors > 0 {
            ring.publish();
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

    #[inline]
    pub(crate) fn tx(&mut self, cache: &mut Cache, burst: &mut Burst, counters: &Counters) -> usize {
        let BackPair {
            tx: Some(ring),
            memory,
            chain,
            mergeable,
            ..
        } = self
        else {
            return 0;
        };
        if !ring.enabled {
            return 0;
        }
        let mut at = 0;
        let mut bytes = 0u64;
        let mut dropped = 0u64;
        while at < burst.len() {
            let rest = &burst[at..];
            let rest = &rest[..rest.len().min(STAGE)];
            let mut stopped = false;
            // First all descriptors, then the bytes: the lines that are written are on their way meanwhile.
            let mut stage = Stage::new();
            let _ = ring.device.pop_each(&**memory, chain, rest.len(), |popped| {
                if popped.fault.is_some() {
                    return Verdict::Done(0);
                }
                let Some(packet) = rest.get(stage.count) else {
                    return Verdict::Stop;
                };
                let meta = packet.meta();
                let total = meta.len as usize + NET_HEADER;
                match popped.writable {
                    [only] if meta.next.is_none() && only.len as usize >= total => {
                        let ptr = only.ptr.as_ptr();
                        prefetch_write(ptr);
                        prefetch_write(ptr.wrapping_add(NET_HEADER));
                        stage.push(ptr, meta.len as usize);
                        Verdict::Done(total as u32)
                    }
                    _ => {
                        stopped = true;
                        Verdict::Stop
                    }
                }
            });
            let n = stage.count;
            bytes += stage.send(rest);
            at += n;
            if stopped {
                let packet = &burst[at];
                match scatter(&mut ring.device, memory, chain, *mergeable, packet) {
                    Fit::Sent => bytes += packet.len() as u64,
                    Fit::NoRoom => break,
                    Fit::Never => dropped += 1,
                }
                at += 1;
            } else if n == 0 {
                break;
            }
        }
        if at > 0 {
            ring.publish();
            for packet in &burst[..at] {
                // SAFETY: forgotten right below.
                unsafe { cache.put(packet.meta_ptr()) };
            }
            // SAFETY: the cache owns these buffers now.
            unsafe { burst.forget_front(at) };
            counters.tx_packets.add(at as u64 - dropped);
            counters.tx_bytes.add(bytes);
            if dropped > 0 {
                counters.tx_errors.add(dropped);
            }
        }
        at
    }

    /// Asks for a kick at the next frame. `true`: frames are there already.
    pub(crate) fn arm(&mut self) -> bool {
        self.rx
            .as_mut()
            .is_some_and(|ring| ring.enabled && ring.device.set_notify(true))
    }

    /// Asks for no more kicks. `true`: frames are there.
    pub(crate) fn disarm(&mut self) -> bool {
        self.rx.as_mut().is_some_and(|ring| {
            ring.device.set_notify(false);
            ring.enabled && ring.device.available() > 0
        })
    }

    /// Copies the rings' own counts to where others read them.
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

    /// Stops a ring; the available index of its next chain.
    pub(crate) fn stop(&mut self, even: bool) -> Option<u16> {
        let ring = self.ring_mut(even).take()?;
        self.past_anomalies += ring.device.anomalies().total();
        self.past_calls += ring.calls;
        Some(ring.device.base())
    }
}

/// Frames of one part each, between the look at their descriptors and the copy of their bytes.
struct Stage {
    frames: [(*mut u8, usize); STAGE],
    count: usize,
}

/// Frames that are staged at a time.
const STAGE: usize = 32;

impl Stage {
    #[inline(always)]
    fn new() -> Self {
        Stage {
            frames: [(std::ptr::null_mut(), 0); STAGE],
            count: 0,
        }
    }

    #[inline(always)]
    fn push(&mut self, ptr: *mut u8, len: usize) {
        // `count` is below STAGE: no more than that is popped.
        if let Some(place) = self.frames.get_mut(self.count) {
            *place = (ptr, len);
            self.count += 1;
        }
    }

    /// Copies the staged frames into buffers of the cache, which has enough; their bytes.
    #[inline(always)]
    fn receive(&mut self, cache: &mut Cache, burst: &mut Burst) -> u64 {
        let mut bytes = 0;
        for &(ptr, len) in &self.frames[..self.count] {
            let Some(mut meta) = cache.pop() else { break };
            // SAFETY: the buffer is ours, and `len` was checked against its room; the part is valid for reads of its
            // length. The burst has room: at most that many chains were popped.
            unsafe {
                let m = meta.as_mut();
                copy(ptr, m.data(), len);
                m.len = len as u32;
                burst.push_unchecked(Packet::from_meta(meta));
            }
            bytes += len as u64;
        }
        self.count = 0;
        bytes
    }

    /// Copies packets of one segment to where they are staged to; their bytes.
    #[inline(always)]
    fn send(&self, packets: &[Packet]) -> u64 {
        let mut bytes = 0;
        for (&(ptr, len), packet) in self.frames[..self.count].iter().zip(packets) {
            // SAFETY: the part is valid for writes of header and frame, as checked when it was staged; the packet is
            // ours.
            unsafe {
                ptr.cast::<[u8; NET_HEADER]>().write_unaligned(PLAIN);
                copy(packet.meta().data(), ptr.add(NET_HEADER), len);
            }
            bytes += len as u64;
        }
        bytes
    }
}

struct NoBuffers;

/// Copies a frame that is in several parts, or does not fit one buffer, if that leaves `others` buffers in the cache.
/// `None`: it is no frame.
#[cold]
#[inline(never)]
fn gather(parts: &[Part], cache: &mut Cache, others: usize) -> Result<Option<Packet>, NoBuffers> {
    let total: usize = parts.iter().map(|p| p.len as usize).sum();
    if total <= NET_HEADER || total - NET_HEADER > MAX_FRAME {
        return Ok(None);
    }
    let room = cache.pool().room() as usize;
    // The buffers that the burst's other frames need stay reserved.
    let needed = (total - NET_HEADER).div_ceil(room) + others;
    if needed > cache.most() {
        // It would wait for ever.
        return Ok(None);
    }
    if cache.reserve(needed) < needed {
        return Err(NoBuffers);
    }
    let first = cache.pop().ok_or(NoBuffers)?;
    let mut tail = first;
    let mut skip = NET_HEADER;
    for part in parts {
        let mut from = skip.min(part.len as usize);
        skip -= from;
        while from < part.len as usize {
            // SAFETY: the buffers of the chain that begins at `first` are ours, as just popped.
            let mut m: &mut Meta = unsafe { tail.as_mut() };
            if m.len as usize == room {
                let next = match cache.pop() {
                    Some(next) => next,
                    None => {
                        // SAFETY: the chain is ours, given up here.
                        unsafe { pool::free(first) };
                        return Err(NoBuffers);
                    }
                };
                m.next = Some(next);
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
    Ok(Some(unsafe { Packet::from_meta(first) }))
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
) -> Fit {
    let total = packet.len() + NET_HEADER;
    let mut used: [Option<(Head, u32)>; MAX_PARTS] = [None; MAX_PARTS];
    let mut count = 0u16;
    let mut written = 0usize;
    let mut merged: Option<NonNull<u8>> = None;
    let mut source = Segments::new(packet);
    let mut header = &PLAIN[..];
    while written < total {
        let slot = usize::from(count);
        let popped = if slot < MAX_PARTS {
            device.pop(&**memory, chain)
        } else {
            Ok(None)
        };
        let Ok(Some(head)) = popped else {
            let all = count == device.size() || slot == MAX_PARTS;
            device.undo(count);
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
            merged = place_of_num_buffers(chain.writable());
        }
        let fits = written + chain.writable_len() as usize >= total;
        if !fits && (!mergeable || merged.is_none()) {
            device.undo(count);
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
        && let Some(place) = merged
    {
        // SAFETY: inside the first chain's first part, which is valid for writes.
        unsafe { place.cast::<u16>().write_unaligned(count.to_le()) };
    }
    for (head, len) in used.iter().flatten() {
        device.push(*head, *len);
    }
    Fit::Sent
}

/// Where `num_buffers` lies, if it lies in one part.
fn place_of_num_buffers(parts: &[Part]) -> Option<NonNull<u8>> {
    let first = parts.first().filter(|part| part.len as usize >= NET_HEADER)?;
    // SAFETY: below the part's length.
    Some(unsafe { first.ptr.add(NET_HEADER - 2) })
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
            self.packet = meta.next.map(|next| unsafe { next.as_ref() });
            self.at = 0;
        }
        done
    }
}
