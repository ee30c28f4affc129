//! The transmit side of a queue of a virtual function.

use ixgbevf::{L4, Offload, Segment, Segmentation};
use usernic::vf::Tx as Ring;

use crate::abi::{self, Piece, TxSetup, offload};
use crate::mbuf::Mbuf;
use crate::rx::CHUNK;
use crate::tx::{PIECES, Sink};

/// What the gate is around.
pub(crate) struct Tx {
    /// None once the device is gone: nothing here reaches it then.
    ring: Option<Ring>,
    sink: Sink,
    /// Frames in flight at which it is looked for those that were sent.
    keep: usize,
    up: bool,
}

// SAFETY: mbufs in the ring are this value's alone.
unsafe impl Send for Tx {}

/// One segment, nobody else's, that asks for nothing and that the device takes as it is.
#[inline(always)]
fn is_plain(mbuf: Mbuf, odd: u64) -> bool {
    mbuf.is_alone() && mbuf.flags() & odd == 0 && Ring::takes(mbuf.data_len().into())
}

/// What a frame asks of the device.
fn wanted(said: &abi::Offload) -> Offload {
    let asks = |what: u16| said.what & what != 0;
    let l4 = if asks(offload::TCP) {
        L4::Tcp
    } else if asks(offload::UDP) {
        L4::Udp
    } else if asks(offload::SCTP) {
        L4::Sctp
    } else {
        L4::None
    };
    let headers = asks(offload::IP_CHECKSUM) || l4 != L4::None;
    Offload {
        l2_len: if headers {
            u8::try_from(said.l2).unwrap_or(u8::MAX)
        } else {
            14
        },
        l3_len: if headers { said.l3 } else { 0 },
        ipv4: headers && asks(offload::IPV4),
        ip_checksum: asks(offload::IP_CHECKSUM),
        l4,
        vlan: asks(offload::VLAN).then_some(said.tag),
        segmentation: asks(offload::SEGMENT).then(|| Segmentation {
            header_len: u8::try_from(said.l4).unwrap_or(0),
            mss: said.mss,
        }),
    }
}

impl Tx {
    pub(super) fn new(ring: Ring, setup: &TxSetup, sink: Sink) -> Self {
        Tx {
            keep: usize::from(setup.keep).clamp(1, usize::from(ring.size()) / 2),
            ring: Some(ring),
            sink,
            up: false,
        }
    }

    /// The ring, to be started.
    pub(super) fn ring(&mut self) -> Option<&mut Ring> {
        self.ring.as_mut()
    }

    /// Frees every frame and lets go of the device's registers.
    pub(super) fn close(&mut self) {
        self.reset();
        self.ring = None;
    }

    /// The ring runs, or does not any more.
    pub(super) fn set_up(&mut self, up: bool) {
        self.up = up;
    }

    /// Frees every frame. The device must not use the ring any more.
    pub(super) fn reset(&mut self) {
        self.up = false;
        let sink = &self.sink;
        if let Some(ring) = &mut self.ring {
            // SAFETY: a cookie of this ring.
            let back = |cookie| sink.drop_frame(unsafe { Mbuf::of(cookie) });
            // SAFETY: the device was stopped or reset before.
            unsafe { ring.detach_each(back) };
        }
        self.sink.chained = false;
    }

    fn free(&self) -> usize {
        self.ring.as_ref().map_or(0, |ring| ring.free().into())
    }

    /// Takes back up to `most` frames that the device has sent.
    #[inline(always)]
    pub(crate) fn reap(&mut self, most: usize) -> usize {
        let mut back = [std::ptr::null_mut::<u8>(); CHUNK];
        let mut n = 0;
        let Some(ring) = &mut self.ring else { return 0 };
        ring.poll_each(most.min(CHUNK), |cookie| {
            // SAFETY: at most so many come.
            unsafe { *back.get_unchecked_mut(n) = cookie as *mut u8 };
            n += 1;
        });
        if n > 0 {
            let left = ring.in_flight().into();
            self.sink.give_back(&mut back[..n], left);
        }
        n
    }

    /// # Safety
    /// `frames` has `count` frames, which are ours as far as they are sent.
    #[inline(always)]
    pub(crate) unsafe fn burst(&mut self, frames: *mut *mut u8, count: usize) -> usize {
        let Some(ring) = &self.ring else { return 0 };
        if !self.up {
            return 0;
        }
        // A descriptor more, for a context.
        if usize::from(ring.in_flight()) >= self.keep || usize::from(ring.free()) <= count {
            while self.reap(CHUNK) == CHUNK && self.free() <= count {}
        }
        let odd = self.sink.odd;
        let (mut sent, mut dropped, mut bytes) = (0, 0, 0);
        while sent < count {
            // SAFETY: by the caller.
            let mbufs = (sent..count).map(|at| unsafe { Mbuf::new(*frames.add(at)) });
            let plain = mbufs.map_while(|mbuf| {
                if !is_plain(mbuf, odd) {
                    return None;
                }
                let (addr, len) = (mbuf.address(), u32::from(mbuf.data_len()));
                bytes += u64::from(len);
                Some((Segment { addr, len }, mbuf.cookie()))
            });
            let Some(ring) = &mut self.ring else { break };
            // SAFETY: mbufs of memory that is mapped for the device, and the ring's until they come back.
            sent += unsafe { ring.add_each(plain) };
            if sent == count || ring.free() == 0 {
                break;
            }
            // SAFETY: as above.
            match unsafe { self.send_odd(frames.add(sent)) } {
                Some(sum) => {
                    sent += 1;
                    dropped += usize::from(sum == 0);
                    bytes += sum;
                }
                None => break,
            }
        }
        if let Some(ring) = &mut self.ring
            && sent > 0
        {
            ring.publish();
            self.sink.counters.packets.add((sent - dropped) as u64);
            self.sink.counters.bytes.add(bytes);
        }
        sent
    }

    /// Sends a frame that is not plain, or a plain one for which there was no room; its bytes. `None`: there is no room now.
    /// One that can never be sent is freed: 0.
    ///
    /// # Safety
    /// The frame is ours.
    #[inline(never)]
    unsafe fn send_odd(&mut self, frame: *mut *mut u8) -> Option<u64> {
        if self.free() < PIECES {
            while self.reap(CHUNK) == CHUNK {}
        }
        // SAFETY: by the caller.
        let mbuf = unsafe { Mbuf::new(*frame) };
        let mut pieces = [Piece::default(); PIECES];
        let mut said = abi::Offload::default();
        // SAFETY: the frame is ours; there is room for what is written.
        let n = unsafe { (self.sink.calls().describe)(mbuf.pointer(), &mut said, pieces.as_mut_ptr()) };
        let n = (n as usize).min(PIECES);
        let mut segments = [Segment { addr: 0, len: 0 }; PIECES];
        for (segment, piece) in segments.iter_mut().zip(&pieces[..n]) {
            *segment = Segment {
                addr: piece.address,
                len: piece.length,
            };
        }
        let ring = self.ring.as_mut()?;
        // SAFETY: as in `send`.
        match unsafe { ring.add(&segments[..n], &wanted(&said), mbuf.cookie()) } {
            Ok(()) => {
                self.sink.took(mbuf, n);
                // As it goes out: with the tag that the device inserts.
                let tag = if said.what & offload::VLAN != 0 { 4 } else { 0 };
                Some(u64::from(mbuf.pkt_len()) + tag)
            }
            Err(ixgbevf::Error::Full) if n + 1 < usize::from(ring.size()) => None,
            Err(error) => {
                tracing::debug!("a frame that cannot be sent: {error}");
                self.sink.counters.errors.add(1);
                self.sink.drop_frame(mbuf);
                Some(0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_frames_ask_for() {
        let said = |what| abi::Offload {
            what,
            l2: 18,
            l3: 20,
            l4: 32,
            mss: 1448,
            tag: 0x2064,
        };
        assert_eq!(wanted(&said(0)), Offload::NONE);
        let vlan = wanted(&said(offload::VLAN));
        assert_eq!((vlan.vlan, vlan.l2_len, vlan.l3_len), (Some(0x2064), 14, 0));
        let udp = wanted(&said(offload::UDP | offload::IPV4));
        assert_eq!(
            (udp.l4, udp.ipv4, udp.ip_checksum, udp.l3_len, udp.l2_len),
            (L4::Udp, true, false, 20, 18)
        );
        let cut = wanted(&said(
            offload::TCP | offload::IPV4 | offload::IP_CHECKSUM | offload::SEGMENT,
        ));
        assert_eq!(
            cut.segmentation,
            Some(Segmentation {
                header_len: 32,
                mss: 1448
            })
        );
        assert_eq!((cut.l4, cut.ip_checksum), (L4::Tcp, true));
    }
}
