//! The receive side of a queue of a virtual function.

use ixgbevf::{Checksum, Interrupts, Model, PacketType, Received, Segment};
use usernic::vf::{Reach, Rx as Ring};

use crate::abi::RxSetup;
use crate::mbuf::{Mbuf, flag, ptype};
use crate::rx::{CHUNK, SHORTEST, Source};

/// What reaches the device.
struct Rings {
    ring: Ring,
    interrupts: Interrupts<Reach>,
}

/// A frame whose buffers have not all come yet.
struct Partial {
    frame: Mbuf,
    last: Mbuf,
}

/// What the gate is around.
pub(crate) struct Rx {
    /// None once the device is gone: nothing here reaches it then.
    rings: Option<Rings>,
    pub(crate) source: Source,
    /// The vector of the queue, as its bit.
    vector: u32,
    model: Model,
    batch: usize,
    running: bool,
    partial: Option<Partial>,
}

// SAFETY: mbufs in the ring are this value's alone.
unsafe impl Send for Rx {}

/// What is odd about a buffer that came back; 0: it is a whole frame.
mod piece {
    pub(super) const ODD: u8 = 1;
    pub(super) const FIRST: u8 = 2;
    pub(super) const LAST: u8 = 4;
    pub(super) const BAD: u8 = 8;
}

/// The headers of a frame in DPDK's words, by bits 4 to 10 of what the device says.
const TYPES: [u32; 128] = {
    let mut types = [0; 128];
    let mut bits = 0;
    while bits < types.len() {
        types[bits] = headers((bits as u16) << 4);
        bits += 1;
    }
    types
};

const fn headers(bits: u16) -> u32 {
    let kind = PacketType::from_bits_retain(bits);
    let mut headers = ptype::L2_ETHER;
    if kind.contains(PacketType::IPV4_EX) {
        headers |= ptype::L3_IPV4_EXT;
    } else if kind.contains(PacketType::IPV4) {
        headers |= ptype::L3_IPV4;
    } else if kind.contains(PacketType::IPV6_EX) {
        headers |= ptype::L3_IPV6_EXT;
    } else if kind.contains(PacketType::IPV6) {
        headers |= ptype::L3_IPV6;
    } else {
        return headers;
    }
    if kind.contains(PacketType::TCP) {
        headers |= ptype::L4_TCP;
    } else if kind.contains(PacketType::UDP) {
        headers |= ptype::L4_UDP;
    } else if kind.contains(PacketType::SCTP) {
        headers |= ptype::L4_SCTP;
    }
    headers
}

/// The headers that the device recognised.
#[inline(always)]
fn recognised(kind: PacketType) -> u32 {
    if kind.contains(PacketType::ETHERTYPE) {
        return ptype::L2_ETHER;
    }
    TYPES[usize::from(kind.bits() >> 4 & 0x7f)]
}

/// What the device says of a frame, as flags of its mbuf.
#[inline(always)]
fn said(received: &Received, model: Model) -> u64 {
    let mut flags = match received.ip_checksum() {
        Checksum::Good => flag::IP_GOOD,
        Checksum::Bad => flag::IP_BAD,
        Checksum::Unknown => 0,
    };
    flags |= match received.l4_checksum(model) {
        Checksum::Good => flag::L4_GOOD,
        Checksum::Bad => flag::L4_BAD,
        Checksum::Unknown => 0,
    };
    if received.hash().is_some() {
        flags |= flag::RSS_HASH;
    }
    if received.vlan().is_some() {
        flags |= flag::VLAN | flag::VLAN_STRIPPED;
    }
    flags
}

impl Rx {
    pub(super) fn new(
        (ring, interrupts): (Ring, Interrupts<Reach>),
        vector: u32,
        model: Model,
        setup: &RxSetup,
        source: Source,
    ) -> Self {
        Rx {
            batch: usize::from(setup.batch).clamp(1, usize::from(ring.size()) / 2),
            rings: Some(Rings { ring, interrupts }),
            source,
            vector,
            model,
            running: false,
            partial: None,
        }
    }

    /// The ring, to be started.
    pub(super) fn ring(&mut self) -> Option<&mut Ring> {
        self.rings.as_mut().map(|rings| &mut rings.ring)
    }

    /// Gives every buffer back and lets go of the device's registers.
    pub(super) fn close(&mut self) {
        self.reset();
        self.source.counters.strayed(self.anomalies());
        self.rings = None;
    }

    /// The ring runs, or does not any more. While it does not nothing is posted.
    pub(super) fn set_running(&mut self, running: bool) {
        self.running = running;
    }

    /// Gives every buffer back to the pool. The device must not use the ring any more.
    pub(super) fn reset(&mut self) {
        self.running = false;
        let source = &self.source;
        if let Some(rings) = &mut self.rings {
            // SAFETY: a cookie of this ring.
            let back = |cookie| source.put_back(unsafe { Mbuf::of(cookie) });
            // SAFETY: the device was stopped or reset before.
            unsafe { rings.ring.detach_each(back) };
        }
        if let Some(partial) = self.partial.take() {
            // SAFETY: the frame is ours, chained as far as it came.
            unsafe { source.drop_frame(partial.frame) };
        }
    }

    /// What the device did wrong so far.
    fn anomalies(&self) -> u64 {
        self.rings
            .as_ref()
            .map_or(0, |rings| usernic::vf::anomalies(&rings.ring))
    }

    /// Has the device raise its interrupt at the next frame, or not. `true`: frames are there.
    pub(crate) fn arm(&mut self, on: bool) -> bool {
        if on && self.running {
            self.fill(1);
            if let Some(rings) = &self.rings {
                rings.interrupts.enable(self.vector);
            }
        }
        self.rings.as_ref().is_some_and(|rings| rings.ring.has_done())
    }

    /// Fills the ring if so many descriptors are free.
    #[inline(always)]
    pub(super) fn fill(&mut self, enough: usize) {
        let Rx { rings, source, .. } = self;
        let Some(Rings { ring, .. }) = rings else { return };
        let free = usize::from(ring.free());
        if free < enough || !source.is_there() {
            return;
        }
        let len = source.room;
        source.fill(free, enough, |fresh| {
            // SAFETY: the pool gave them.
            let mbufs = fresh.iter().map(|&pointer| unsafe { Mbuf::new(pointer) });
            // The choice is made once a burst; the line of an mbuf is not read where its buffer can be told without.
            if let Some(shift) = source.by_shift() {
                let buffers = mbufs.map(|mbuf| {
                    let addr = mbuf.cookie() + shift;
                    (Segment { addr, len }, mbuf.cookie())
                });
                // SAFETY: buffers of the pool, mapped for the device, and the ring's until they come back.
                unsafe { ring.add_each(buffers) }
            } else {
                let headroom = u64::from(source.headroom);
                let buffers = mbufs.map(|mbuf| {
                    let addr = mbuf.buffer() + headroom;
                    (Segment { addr, len }, mbuf.cookie())
                });
                // SAFETY: as above.
                unsafe { ring.add_each(buffers) }
            }
        });
        ring.publish();
    }

    /// # Safety
    /// `out` has room for `count`.
    #[inline(always)]
    pub(crate) unsafe fn burst(&mut self, out: *mut *mut u8, count: usize) -> usize {
        let mut received = 0;
        let mut bytes = 0;
        while received < count {
            let most = (count - received).min(CHUNK);
            // SAFETY: by the caller.
            let to = unsafe { out.add(received) };
            let mut pieces = [0u8; CHUNK];
            let mut n = 0;
            let mut sum = 0u64;
            let mut odd = self.partial.is_some();
            let (rearm, flags, model) = (self.source.rearm, self.source.flags, self.model);
            let source = &self.source;
            let Some(rings) = &mut self.rings else { return 0 };
            rings.ring.poll_each(most, |received| {
                // SAFETY: a cookie of this ring.
                let mbuf = unsafe { Mbuf::of(received.cookie) };
                mbuf.arrived(
                    rearm,
                    flags | said(&received, model),
                    recognised(received.packet_type()),
                    received.len,
                    received.vlan().unwrap_or(0),
                    received.hash().unwrap_or(0),
                );
                sum += u64::from(received.len);
                odd |= !source.fits(received.len);
                if !received.is_whole() {
                    odd = true;
                    let bit = |is: bool, bit: u8| if is { bit } else { 0 };
                    pieces[n % CHUNK] = piece::ODD
                        | bit(received.first, piece::FIRST)
                        | bit(received.last, piece::LAST)
                        | bit(received.bad, piece::BAD);
                }
                // SAFETY: at most `most` come.
                unsafe { *to.add(n) = mbuf.pointer() };
                n += 1;
            });
            if n == 0 {
                break;
            }
            let mut frames = n;
            if odd {
                // SAFETY: so many were written.
                (frames, sum) = unsafe { self.join(to, &pieces[..n]) };
            }
            bytes += sum;
            received += frames;
            if n < most {
                break;
            }
        }
        if self.running {
            self.fill(self.batch);
        }
        let source = &self.source;
        if source.look != 0 || source.filter.is_some() {
            // SAFETY: so many were written; buffers have room for a header before the data.
            (received, bytes) = unsafe { source.look_at(out, received, bytes) };
        }
        if received > 0 {
            source.counters.packets.add(received as u64);
            source.counters.bytes.add(bytes);
        }
        source.counters.strayed(self.anomalies());
        received
    }

    /// Joins the segments of frames, and drops what is broken; frames and their bytes. The driver of the ring has seen to it
    /// that pieces come in order and that a frame has no more than 9,728 bytes.
    ///
    /// # Safety
    /// `to` has an mbuf for each piece.
    #[inline(never)]
    unsafe fn join(&mut self, to: *mut *mut u8, pieces: &[u8]) -> (usize, u64) {
        let (mut frames, mut bytes) = (0, 0);
        let source = &self.source;
        for (at, &piece) in pieces.iter().enumerate() {
            // SAFETY: by the caller.
            let mbuf = unsafe { Mbuf::new(*to.add(at)) };
            let mut done = None;
            if piece == 0 {
                done = Some(mbuf);
            } else {
                if piece & (piece::FIRST | piece::BAD) != 0
                    && let Some(partial) = self.partial.take()
                {
                    // Of a frame whose end never came, or of which something was broken.
                    // SAFETY: chained as far as it came.
                    unsafe { source.drop_frame(partial.frame) };
                }
                if piece & piece::BAD != 0 {
                    source.counters.errors.add(1);
                    source.put_back(mbuf);
                    continue;
                }
                match &mut self.partial {
                    None if piece & piece::FIRST != 0 => {
                        self.partial = Some(Partial {
                            frame: mbuf,
                            last: mbuf,
                        });
                    }
                    // The rest of what was dropped.
                    None => source.put_back(mbuf),
                    Some(partial) => {
                        source.append(partial.frame, partial.last, mbuf);
                        partial.last = mbuf;
                    }
                }
                if piece & piece::LAST != 0
                    && let Some(partial) = self.partial.take()
                {
                    // What the device says of a frame is in its last piece.
                    partial.frame.said_in(partial.last);
                    done = Some(partial.frame);
                }
            }
            if let Some(frame) = done {
                let len = frame.pkt_len();
                if u32::from(frame.data_len()) < SHORTEST || !source.fits(len) {
                    source.misfit(len);
                    // SAFETY: ours, and whole.
                    unsafe { source.drop_frame(frame) };
                    continue;
                }
                source.counters.chains.add((piece != 0).into());
                bytes += u64::from(len);
                // SAFETY: not beyond `at`.
                unsafe { *to.add(frames) = frame.pointer() };
                frames += 1;
            }
        }
        (frames, bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_in_dpdks_words() {
        let kind = |kind: PacketType| recognised(kind);
        assert_eq!(kind(PacketType::IPV4 | PacketType::TCP), 0x111);
        assert_eq!(kind(PacketType::IPV4 | PacketType::IPV4_EX | PacketType::UDP), 0x231);
        assert_eq!(kind(PacketType::IPV6 | PacketType::UDP), 0x241);
        assert_eq!(kind(PacketType::IPV6 | PacketType::IPV6_EX), 0xc1);
        assert_eq!(kind(PacketType::IPV4 | PacketType::SCTP), 0x411);
        assert_eq!(kind(PacketType::empty()), 0x1);
        assert_eq!(kind(PacketType::ETHERTYPE | PacketType::IPV4 | PacketType::TCP), 0x1);
    }
}
