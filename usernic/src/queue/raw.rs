//! The lower layer: two rings of the driver side, over buffers of any kind.
//!
//! [`RawQueue`] knows rings, headers and notifications. It does not know who allocates: a [`Buffer`] is what it must be
//! told of one, and a cookie is all that it keeps. [`Queue`](crate::Queue) puts [`Packet`](crate::Packet)s on it; a
//! poll-mode driver puts its own buffers there, in memory that it registered itself.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtio_ring::any::Driver;
use virtio_ring::{Anomalies, Direction, Segment, Slot, Table};

/// Bytes of the virtio-net header of a VERSION_1 device without HASH_REPORT (virtio 1.3, 5.1.6).
pub(crate) const NET_HEADER: usize = 12;

/// Bytes of the header with HASH_REPORT.
pub(crate) const LONG_HEADER: usize = 20;

/// Offset of `num_buffers` in the header.
const NUM_BUFFERS: usize = 10;

/// A buffer, as the rings see it. Static dispatch: the methods are inlined into the burst loops.
///
/// # Safety
/// From when it is posted or sent until its cookie comes back, the other side may read its memory and, if it was
/// posted, write it: the header's bytes before it and all its segments. Nobody else uses that memory meanwhile.
pub unsafe trait Buffer {
    /// The address of the frame's first byte, as the other side knows it.
    fn address(&self) -> u64;

    /// Bytes of the frame in this segment; for a buffer to receive into, bytes that it holds.
    fn len(&self) -> u32;

    /// The same with the `header` bytes before it: what the other side fills.
    #[inline(always)]
    fn room(&self, header: u32) -> Segment {
        Segment {
            addr: self.address() - u64::from(header),
            len: self.len() + header,
        }
    }

    /// Whether there is no byte.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Makes the `len` bytes before the frame its virtio-net header.
    fn write_header(&mut self, len: usize);

    /// The next segment of the same frame, if there is one.
    fn next(&self) -> Option<Self>
    where
        Self: Sized;

    /// Whether [`RawRing::send`] may send the frame: it is in this one segment. An implementation may refuse others as well,
    /// for [`RawRing::send_chain`] or to be looked at before.
    #[inline(always)]
    fn is_plain(&self) -> bool
    where
        Self: Sized,
    {
        self.next().is_none()
    }

    /// What the ring keeps while the other side has the buffer, and gives back.
    fn cookie(&self) -> u64;
}

/// A receive and a transmit ring, driven by one thread.
pub struct RawQueue {
    /// The ring that the other side fills.
    pub rx: RawRing,
    /// The ring that it empties.
    pub tx: RawRing,
}

/// One ring of the driver side, with its kick.
pub struct RawRing {
    ring: Driver<Box<[Slot]>>,
    kick: Arc<OwnedFd>,
    header: usize,
    kicks: u64,
}

/// Segments of one frame that are sent at the most, the limit of what peers take.
pub const MAX_SEGMENTS: usize = 64;

impl RawRing {
    /// A ring of the driver side over `ring`, with an eventfd to kick and `header` bytes of virtio-net header.
    pub fn new(ring: Driver<Box<[Slot]>>, kick: Arc<OwnedFd>, header: usize) -> Self {
        RawRing {
            ring,
            kick,
            header,
            kicks: 0,
        }
    }

    /// Descriptors of the ring.
    pub fn size(&self) -> usize {
        usize::from(self.ring.size())
    }

    /// Descriptors that are free.
    #[inline(always)]
    pub fn free(&self) -> usize {
        usize::from(self.ring.free())
    }

    /// Buffers that the other side has.
    pub fn in_flight(&self) -> usize {
        usize::from(self.ring.in_flight())
    }

    /// Posts buffers to receive into, one descriptor each, while there is room and `buffers` yields; how many.
    ///
    /// The other side writes the header into the `header` bytes before each buffer's address.
    #[inline(always)]
    pub fn post<B: Buffer>(&mut self, buffers: impl Iterator<Item = B>) -> usize {
        let header = self.header as u32;
        let buffers = buffers.map(move |b| (b.room(header), b.cookie()));
        // SAFETY: what a `Buffer` promises.
        unsafe { self.ring.add_each(Direction::Writable, buffers) }
    }

    /// Sends frames, while there is room; how many, and their bytes. Stops before a frame that is not
    /// [plain](Buffer::is_plain), such as one of several segments: see [`send_chain`](RawRing::send_chain).
    #[inline(always)]
    pub fn send<B: Buffer>(&mut self, buffers: impl Iterator<Item = B>) -> (usize, u64) {
        let header = self.header;
        let mut bytes = 0;
        let frames = buffers.map_while(|mut b| {
            if !b.is_plain() {
                return None;
            }
            let len = b.len();
            bytes += u64::from(len);
            // Before the header is written, so that what was read of the buffer need not be read again.
            let segment = Segment {
                addr: b.address() - header as u64,
                len: len + header as u32,
            };
            b.write_header(header);
            Some((segment, b.cookie()))
        });
        // SAFETY: what a `Buffer` promises.
        let frames = unsafe { self.ring.add_each(Direction::Readable, frames) };
        (frames, bytes)
    }

    /// Sends one frame of any number of segments up to [`MAX_SEGMENTS`]; `Ok(false)` if it does not fit now.
    ///
    /// # Errors
    /// [`TooManySegments`]: it never fits.
    pub fn send_chain<B: Buffer>(&mut self, mut first: B) -> Result<bool, TooManySegments> {
        let mut chain = [Segment { addr: 0, len: 0 }; MAX_SEGMENTS];
        first.write_header(self.header);
        let cookie = first.cookie();
        let header = self.header as u32;
        chain[0] = Segment {
            addr: first.address() - u64::from(header),
            len: first.len() + header,
        };
        let mut n = 1;
        let mut next = first.next();
        while let Some(segment) = next {
            if n == MAX_SEGMENTS || n == usize::from(self.ring.size()) {
                return Err(TooManySegments);
            }
            chain[n] = Segment {
                addr: segment.address(),
                len: segment.len(),
            };
            n += 1;
            next = segment.next();
        }
        // SAFETY: what a `Buffer` promises of all its segments.
        Ok(unsafe { self.ring.add(&chain[..n], n, cookie) }.is_ok())
    }

    /// Sends one frame whose segments the caller has put together, with its virtio-net header in the first of them;
    /// `Ok(false)` if it does not fit now.
    ///
    /// # Errors
    /// [`TooManySegments`]: it never fits.
    ///
    /// # Safety
    /// The other side may read the segments until the cookie comes back: they stay valid, and nobody else writes them.
    pub unsafe fn send_segments(&mut self, segments: &[Segment], cookie: u64) -> Result<bool, TooManySegments> {
        if segments.len() > usize::from(self.ring.size()) {
            return Err(TooManySegments);
        }
        // SAFETY: by the caller.
        Ok(unsafe { self.ring.add(segments, segments.len(), cookie) }.is_ok())
    }

    /// The same by way of an indirect table, so that the frame takes one descriptor of the ring. RING_INDIRECT_DESC must be
    /// negotiated; the table has an entry for each segment.
    ///
    /// # Errors
    /// [`TooManySegments`]: it never fits.
    ///
    /// # Safety
    /// As for [`send_segments`](RawRing::send_segments). The table can be written, and nobody else uses its memory until the
    /// cookie comes back.
    pub unsafe fn send_indirect(
        &mut self,
        table: Table,
        segments: &[Segment],
        cookie: u64,
    ) -> Result<bool, TooManySegments> {
        // SAFETY: by the caller.
        match unsafe { self.ring.add_indirect(table, segments, segments.len(), cookie) } {
            Ok(()) => Ok(true),
            Err(virtio_ring::Error::Full | virtio_ring::Error::Broken) => Ok(false),
            Err(_) => Err(TooManySegments),
        }
    }

    /// Makes what was posted or sent visible, at once, and kicks if the other side asked for it; whether it did.
    #[inline(always)]
    pub fn publish(&mut self) -> bool {
        let asked = self.ring.publish();
        if asked {
            self.kick();
        }
        asked
    }

    #[cold]
    #[inline(never)]
    fn kick(&mut self) {
        self.kicks += 1;
        // The other side holds the eventfd, too. An error leaves a frame waiting until the next kick.
        let _ = crate::notify::signal(&*self.kick);
    }

    /// Takes up to `max` buffers that the other side is done with: cookie, and bytes written into it, header included
    /// (checked: never more than it holds).
    #[inline(always)]
    pub fn complete(&mut self, max: usize, mut each: impl FnMut(u64, u32)) -> usize {
        self.ring
            .poll_each(max, |completion| each(completion.cookie, completion.len))
    }

    /// Asks for notifications, or not. `true`: there is something to complete already.
    pub fn set_notify(&mut self, on: bool) -> bool {
        self.ring.set_notify(on)
    }

    /// Gives back the cookie of every buffer that the other side has, and begins anew.
    ///
    /// # Safety
    /// The other side is gone, or has said that it stopped: it does not use the ring or the buffers any more.
    pub unsafe fn reset(&mut self, each: impl FnMut(u64)) {
        // SAFETY: by the caller.
        unsafe { self.ring.detach_each(each) };
    }

    /// Kicks so far.
    pub fn kicks(&self) -> u64 {
        self.kicks
    }

    /// What the other side did wrong, so far.
    pub fn anomalies(&self) -> Anomalies {
        self.ring.anomalies()
    }
}

/// A frame of more segments than [`MAX_SEGMENTS`] or than the ring has descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the frame has more segments than {MAX_SEGMENTS} or than the ring has descriptors")]
pub struct TooManySegments;

/// `num_buffers` of the header of `header` bytes that ends at `data`.
///
/// # Safety
/// The header is mapped.
#[inline(always)]
pub(crate) unsafe fn num_buffers(data: *const u8, header: usize) -> u16 {
    // SAFETY: inside the header, by the caller; volatile, since the other side may write it meanwhile.
    u16::from_le(unsafe { data.sub(header - NUM_BUFFERS).cast::<u16>().read_volatile() })
}
