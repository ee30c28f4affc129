//! The transmit side of a queue: frames into the ring, mbufs back to their pools. What is here for virtio rings is in
//! `vf` for a device's; both give mbufs back by a `Sink`.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;

use usernic::gate::{ControlSide, DataSide};
use usernic::{Buffer, MAX_SEGMENTS, RawRing};
use virtio_ring::{Segment, Table};

use crate::abi::{self, Calls, Piece, TxSetup};
use crate::counts::Counters;
use crate::mbuf::{ATTACHED, Mbuf};
use crate::rx::{CHUNK, HEADER, Handle};
use crate::vf;

/// Bytes of a header of its own, apart from its frame, up to a multiple of a descriptor.
const HEADER_SLOT: usize = 16;

/// Descriptors of an indirect table: a frame of more segments takes as many descriptors of the ring.
const TABLE: usize = 8;

/// Bytes for each descriptor of a ring: a header and a table.
pub(crate) const SLOT: usize = HEADER_SLOT + 16 * TABLE;

/// Descriptors of a frame: its segments, and its header.
pub(crate) const PIECES: usize = MAX_SEGMENTS + 1;

/// An mbuf on its way into the ring, and which of its flags ask for something.
struct Frame(Mbuf, u64);

impl Frame {
    /// One segment, nobody else's, with room for a header, that asks for nothing.
    #[inline(always)]
    fn is_plain(&self) -> bool {
        self.0.is_alone()
            && usize::from(self.0.headroom()) >= HEADER
            && self.0.flags() & self.1 == 0
            && self.0.data_len() != 0
    }
}

// SAFETY: its owner gives the mbuf to the ring, which gives it back with the cookie.
unsafe impl Buffer for Frame {
    #[inline(always)]
    fn address(&self) -> u64 {
        self.0.address()
    }

    #[inline(always)]
    fn len(&self) -> u32 {
        self.0.data_len().into()
    }

    #[inline(always)]
    fn write_header(&mut self, len: usize) {
        debug_assert_eq!(len, HEADER);
        let header = (self.0.address() - HEADER as u64) as *mut u8;
        // SAFETY: a plain frame has room for it, in its own buffer. Most have zeroes there: of a line that is only read both
        // sides keep their copy.
        unsafe {
            let (first, second) = (header.cast::<u64>(), header.add(8).cast::<u32>());
            if first.read_unaligned() | u64::from(second.read_unaligned()) != 0 {
                first.write_unaligned(0);
                second.write_unaligned(0);
            }
        }
    }

    #[inline(always)]
    fn next(&self) -> Option<Self> {
        // What is not plain stops the burst, and is looked at by itself.
        (!self.is_plain()).then_some(Frame(self.0, 0))
    }

    #[inline(always)]
    fn cookie(&self) -> u64 {
        self.0.cookie()
    }
}

/// Where mbufs go that were sent.
pub(crate) struct Sink {
    calls: &'static Calls,
    /// Flags of an mbuf that is not plain.
    pub(crate) odd: u64,
    fast_free: bool,
    /// Frames of several mbufs, or whose mbufs may be others' too, that are in flight or were since the ring was empty.
    pub(crate) chained: bool,
    pub(crate) counters: Arc<Counters>,
}

impl Sink {
    pub(crate) fn new(setup: &TxSetup, calls: &'static Calls, counters: Arc<Counters>) -> Self {
        Sink {
            calls,
            odd: setup.odd | ATTACHED,
            fast_free: setup.fast_free != 0,
            chained: false,
            counters,
        }
    }

    /// Gives back what was sent, so that `left` frames are still in flight.
    #[inline(always)]
    pub(crate) fn give_back(&mut self, back: &mut [*mut u8], left: usize) {
        if self.fast_free && !self.chained {
            // SAFETY: ours, and all of one pool, by what the application promised.
            unsafe { (self.calls.put)(Mbuf::new(back[0]).pool().cast(), back.as_mut_ptr(), back.len() as u32) };
        } else {
            self.free(back);
        }
        if left == 0 {
            self.chained = false;
        }
    }

    /// Gives mbufs back to their pools, neighbours of one pool at once.
    #[inline(never)]
    fn free(&self, back: &mut [*mut u8]) {
        let mut start = 0;
        while start < back.len() {
            let mut end = start;
            // SAFETY: ours.
            let first = unsafe { Mbuf::new(back[start]) };
            let pool = first.pool();
            while end < back.len() {
                // SAFETY: ours.
                let mbuf = unsafe { Mbuf::new(back[end]) };
                if !mbuf.is_alone() || mbuf.flags() & ATTACHED != 0 || mbuf.pool() != pool {
                    break;
                }
                end += 1;
            }
            if end == start {
                self.drop_frame(first);
                start += 1;
            } else {
                // SAFETY: ours, of that pool, each as it was taken from there.
                unsafe { (self.calls.put)(pool.cast(), back[start..].as_mut_ptr(), (end - start) as u32) };
                start = end;
            }
        }
    }

    /// Frees a frame, whatever it consists of.
    pub(crate) fn drop_frame(&self, frame: Mbuf) {
        // SAFETY: by whoever made the Mbuf, it is ours: who sends gets back what was not taken, and this was.
        unsafe { (self.calls.release)(frame.pointer()) };
    }

    /// Notes that a frame that is not plain is in flight.
    pub(crate) fn took(&mut self, frame: Mbuf, pieces: usize) {
        self.chained |= !frame.is_alone() || frame.flags() & ATTACHED != 0;
        self.counters.chains.add((pieces > 1).into());
    }

    pub(crate) fn calls(&self) -> &'static Calls {
        self.calls
    }
}

/// What the gate is around.
pub(crate) struct Tx {
    pub(crate) ring: RawRing,
    sink: Sink,
    /// Frames in flight at which it is looked for those that were taken.
    keep: usize,
    up: bool,
    /// Indirect tables were negotiated.
    indirect: bool,
    /// Headers apart from their frames and indirect tables, one of each for each descriptor, and the next of them.
    slots: *mut u8,
    slot: usize,
}

// SAFETY: mbufs in the ring are this value's alone, and so is the memory of the slots.
unsafe impl Send for Tx {}

impl Tx {
    /// # Safety
    /// `slots` has [`SLOT`] bytes for each descriptor of the ring, while this lives, aligned to 16.
    pub(crate) unsafe fn new(ring: RawRing, setup: &TxSetup, slots: *mut u8, sink: Sink) -> Self {
        Tx {
            keep: usize::from(setup.keep).min(ring.size()),
            ring,
            sink,
            up: false,
            indirect: false,
            slots,
            slot: 0,
        }
    }

    /// A fresh ring in the place of the old one, whose frames nobody will take.
    pub(crate) fn replace(&mut self, ring: RawRing, indirect: bool) {
        self.reset();
        self.indirect = indirect;
        self.sink.counters.retire(&self.ring);
        self.ring = ring;
        self.ring.set_notify(false);
        self.up = true;
    }

    pub(crate) fn take_down(&mut self) {
        self.up = false;
    }

    /// Frees every frame. The other side must be gone.
    pub(crate) fn reset(&mut self) {
        let sink = &self.sink;
        // SAFETY: a cookie of this ring.
        let back = |cookie| sink.drop_frame(unsafe { Mbuf::of(cookie) });
        // SAFETY: the back-end is gone, or has answered that it stopped the ring.
        unsafe { self.ring.reset(back) };
        self.sink.chained = false;
    }

    /// Takes back up to `most` frames that the other side has taken.
    #[inline(always)]
    fn reap(&mut self, most: usize) -> usize {
        let mut back = [std::ptr::null_mut::<u8>(); CHUNK];
        let mut n = 0;
        let most = most.min(CHUNK);
        self.ring.complete(most, |cookie, _| {
            // SAFETY: at most `most` come.
            unsafe { *back.get_unchecked_mut(n) = cookie as *mut u8 };
            n += 1;
        });
        if n > 0 {
            let left = self.ring.in_flight();
            self.sink.give_back(&mut back[..n], left);
        }
        n
    }

    #[inline(always)]
    fn burst(&mut self, frames: *mut *mut u8, count: usize) -> usize {
        if !self.up {
            return 0;
        }
        if self.ring.in_flight() >= self.keep || self.ring.free() < count {
            while self.reap(CHUNK) == CHUNK && self.ring.free() < count {}
        }
        let odd = self.sink.odd;
        let (mut sent, mut dropped, mut bytes) = (0, 0, 0);
        while sent < count {
            // SAFETY: by the caller, the frames are ours until they are sent.
            let mbufs = (sent..count).map(|at| unsafe { Frame(Mbuf::new(*frames.add(at)), odd) });
            let (n, sum) = self.ring.send(mbufs);
            sent += n;
            bytes += sum;
            if sent == count || self.ring.free() == 0 {
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
        if sent > 0 {
            self.ring.publish();
            self.sink.counters.packets.add((sent - dropped) as u64);
            self.sink.counters.bytes.add(bytes);
        }
        self.sink.counters.publish(&self.ring);
        sent
    }

    /// Sends a frame that is not plain; its bytes. `None`: there is no room now. One that can never be sent is freed: 0.
    ///
    /// # Safety
    /// The frame is ours.
    #[inline(never)]
    unsafe fn send_odd(&mut self, frame: *mut *mut u8) -> Option<u64> {
        if self.ring.free() < PIECES.min(self.ring.size()) {
            while self.reap(CHUNK) == CHUNK {}
        }
        // As many frames are in flight at the most as there are slots, so that none is in use twice; unless a back-end takes
        // frames out of turn for a whole round, which then reads another frame's header: nobody else does.
        // SAFETY: inside the memory that `new` was given.
        let slot = unsafe { self.slots.add(self.slot * SLOT) };
        let mut pieces = [Piece::default(); PIECES];
        // SAFETY: the frame is ours; slot and pieces have room for what is written.
        let n =
            unsafe { (self.sink.calls().pieces)(frame, (self.sink.odd != ATTACHED).into(), slot, pieces.as_mut_ptr()) };
        // SAFETY: it may be another one now, but it is one.
        let mbuf = unsafe { Mbuf::new(*frame) };
        let mut segments = [Segment { addr: 0, len: 0 }; PIECES];
        let n = (n as usize).min(PIECES);
        for (segment, piece) in segments.iter_mut().zip(&pieces[..n]) {
            *segment = Segment {
                addr: piece.address,
                len: piece.length,
            };
        }
        let fits = if n == 0 {
            Err(usernic::TooManySegments)
        } else if self.indirect && (2..=TABLE).contains(&n) {
            // SAFETY: the table is behind the header, in the slot.
            let table = unsafe { NonNull::new_unchecked(slot.add(HEADER_SLOT)) };
            let table = Table {
                addr: table.as_ptr() as u64,
                ptr: table,
                entries: TABLE as u16,
            };
            // SAFETY: it is nobody else's while the frame is in flight: see above.
            unsafe { self.ring.send_indirect(table, &segments[..n], mbuf.cookie()) }
        } else {
            // SAFETY: the mbuf's own segments, which are the ring's until its cookie comes back.
            unsafe { self.ring.send_segments(&segments[..n], mbuf.cookie()) }
        };
        match fits {
            Ok(true) => {
                self.slot = (self.slot + 1) % self.ring.size();
                self.sink.took(mbuf, n);
                Some(mbuf.pkt_len().into())
            }
            Ok(false) => None,
            Err(_) => {
                self.sink.counters.errors.add(1);
                self.sink.drop_frame(mbuf);
                Some(0)
            }
        }
    }
}

/// A transmit queue.
pub(crate) struct TxQueue {
    data: Data,
    counters: Arc<Counters>,
}

/// The ring of it.
pub(crate) enum Data {
    Ring(DataSide<Tx>),
    Vf(DataSide<vf::Tx>),
}

impl TxQueue {
    pub(crate) fn new(data: Data, counters: Arc<Counters>) -> Self {
        TxQueue { data, counters }
    }

    /// Takes back up to `most` frames; how many it were.
    fn reap(&mut self, most: usize) -> usize {
        let reaped = match &mut self.data {
            Data::Ring(data) => data.enter().map(|mut tx| tx.reap(most)),
            Data::Vf(data) => data.enter().map(|mut tx| tx.reap(most)),
        };
        reaped.unwrap_or(0)
    }
}

/// The queue's control.
pub(crate) type Control = ControlSide<Tx>;

/// Sends: `rte_eth_tx_burst`.
///
/// # Safety
/// `queue` is a [`Handle`] of a transmit queue, and one thread's; `mbufs` has `count` frames.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_pmd_tx(queue: *mut c_void, mbufs: *mut *mut u8, count: u16) -> u16 {
    // SAFETY: by the caller.
    let Some(queue) = (unsafe { Handle::queue::<TxQueue>(queue) }) else {
        return 0;
    };
    let sent = match &mut queue.data {
        Data::Ring(data) => data.enter().map(|mut tx| tx.burst(mbufs, count.into())),
        // SAFETY: by the caller.
        Data::Vf(data) => data.enter().map(|mut tx| unsafe { tx.burst(mbufs, count.into()) }),
    };
    sent.unwrap_or(0) as u16
}

/// The queue's counters.
///
/// # Safety
/// The queue is one of a started port; `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_pmd_tx_counts(queue: *const c_void, out: *mut abi::Counts) {
    // SAFETY: by the caller.
    unsafe { out.write((*queue.cast::<TxQueue>()).counters.get()) };
}

/// Frees frames that the other side has taken: `rte_eth_tx_done_cleanup`.
///
/// # Safety
/// As [`usernic_pmd_tx`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_pmd_tx_clean(queue: *mut c_void, most: u32) -> i32 {
    // SAFETY: by the caller.
    let Some(queue) = (unsafe { Handle::queue::<TxQueue>(queue) }) else {
        return 0;
    };
    let most = if most == 0 { usize::MAX } else { most as usize };
    let mut freed = 0;
    loop {
        let n = queue.reap(most - freed);
        freed += n;
        if n == 0 || freed >= most {
            return freed as i32;
        }
    }
}
