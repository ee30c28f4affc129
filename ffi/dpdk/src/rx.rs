//! The receive side of a queue: mbufs into the ring, frames out of it. What is here for virtio rings is in `vf`
//! for a device's; both take mbufs from a `Source` and look at frames with it.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;

use usernic::filter::Filter;
use usernic::gate::{ControlSide, DataSide};
use usernic::{Buffer, RawRing};

use crate::abi::{self, Calls, RxSetup};
use crate::counts::Counters;
use crate::mbuf::{Mbuf, prefetch};
use crate::vf;
use crate::wake::Wake;

/// Bytes of the virtio-net header before each frame (virtio 1.3, 5.1.6).
pub(crate) const HEADER: usize = 12;

/// Bytes of a frame at least, all of them in its first mbuf: its Ethernet header. Applications look at it unasked.
pub(crate) const SHORTEST: u32 = 14;

/// Bytes of a frame beyond its MTU: the Ethernet header and a VLAN tag, as `USERNIC_OVERHEAD` in C.
const OVERHEAD: u32 = 18;

/// Frames that are taken at a time.
pub(crate) const CHUNK: usize = 64;

/// Offset of `num_buffers` in the header.
const NUM_BUFFERS: usize = 10;

/// An empty mbuf on its way into the ring.
struct Empty {
    mbuf: Mbuf,
    /// Where frames begin.
    address: u64,
    room: u32,
}

// SAFETY: the mbuf came from its pool and goes to the ring, which gives it back with the cookie.
unsafe impl Buffer for Empty {
    #[inline(always)]
    fn address(&self) -> u64 {
        self.address
    }

    #[inline(always)]
    fn len(&self) -> u32 {
        self.room
    }

    fn write_header(&mut self, _len: usize) {}

    fn next(&self) -> Option<Self> {
        None
    }

    #[inline(always)]
    fn cookie(&self) -> u64 {
        self.mbuf.cookie()
    }
}

/// Where a queue's mbufs come from, and what is done with the frames in them.
pub(crate) struct Source {
    pool: *mut c_void,
    calls: &'static Calls,
    /// Of a received frame.
    pub(crate) rearm: u64,
    pub(crate) flags: u64,
    shift: u32,
    pub(crate) headroom: u16,
    pub(crate) room: u32,
    /// How much longer than [`SHORTEST`] a frame may be.
    pub(crate) spread: u32,
    /// `RX_` bits: what C looks at in each frame.
    pub(crate) look: u32,
    pub(crate) filter: Option<Box<Filter>>,
    pub(crate) counters: Arc<Counters>,
}

// SAFETY: the pool may be used by any thread.
unsafe impl Send for Source {}

impl Source {
    pub(crate) fn new(setup: &RxSetup, port: u16, calls: &'static Calls, counters: Arc<Counters>) -> Self {
        Source {
            pool: setup.pool,
            calls,
            rearm: u64::from(port) << 48 | 0x0001_0001_0000 | u64::from(setup.headroom),
            flags: setup.flags,
            shift: setup.shift,
            headroom: setup.headroom,
            room: setup.room,
            spread: 0,
            look: 0,
            filter: None,
            counters,
        }
    }

    /// Takes frames of packets of up to `mtu` bytes, as `rte_eth_dev_set_mtu` means it; `large`: of any length, since the
    /// device may hand over several of a stream as one.
    pub(crate) fn set_mtu(&mut self, mtu: u16, large: bool) {
        self.spread = u32::from(if large { u16::MAX } else { mtu }) + OVERHEAD - SHORTEST;
    }

    /// Whether a frame's length is one of Ethernet's, and not beyond the MTU.
    #[inline(always)]
    pub(crate) fn fits(&self, len: u32) -> bool {
        len.wrapping_sub(SHORTEST) <= self.spread
    }

    /// Counts a frame that does not [fit](Source::fits), or whose Ethernet header is not in its first mbuf.
    pub(crate) fn misfit(&self, len: u32) {
        let counter = match len {
            ..SHORTEST => &self.counters.runts,
            _ if !self.fits(len) => &self.counters.oversize,
            _ => &self.counters.errors,
        };
        counter.add(1);
    }

    /// Has `post` take fresh mbufs while descriptors are free, of which `free` says how many; `post` says how many it took.
    /// Nothing is done while fewer than `enough` are free.
    #[inline(always)]
    pub(crate) fn fill(&self, mut free: usize, enough: usize, mut post: impl FnMut(&[*mut u8]) -> usize) {
        let mut fresh = [std::ptr::null_mut::<u8>(); CHUNK];
        let mut n = free.min(CHUNK);
        while n > 0 && free >= enough {
            // SAFETY: the pool is alive while the port runs; there is room for `n`.
            if unsafe { (self.calls.get)(self.pool, fresh.as_mut_ptr(), n as u32) } == 0 {
                self.counters.empty.add(n as u64);
                // A pool that has few gives few: with none at all in the ring, nothing would ever come.
                n /= 2;
                continue;
            }
            let posted = post(&fresh[..n]);
            for &pointer in &fresh[posted..n] {
                // SAFETY: what the ring did not take (it is broken) is ours.
                unsafe { (self.calls.release)(pointer) };
            }
            free -= n;
            n = n.min(free);
        }
    }

    /// Whether it has a pool: a queue that the application does not have has none.
    #[inline(always)]
    pub(crate) fn is_there(&self) -> bool {
        !self.pool.is_null()
    }

    /// Where each of these mbufs' frames are to begin.
    #[inline(always)]
    pub(crate) fn by_shift(&self) -> Option<u64> {
        (self.shift != 0).then(|| u64::from(self.shift) + u64::from(self.headroom))
    }

    /// Gives an mbuf back that is alone, whatever was received into it.
    pub(crate) fn put_back(&self, mbuf: Mbuf) {
        mbuf.received(self.rearm, self.flags, 0);
        // SAFETY: by whoever made the Mbuf, it is ours; what the pool wants is the initial state.
        unsafe { (self.calls.release)(mbuf.pointer()) };
    }

    /// Gives a frame back, all of its mbufs.
    ///
    /// # Safety
    /// It is whole: the segments that it says it has are chained.
    pub(crate) unsafe fn drop_frame(&self, frame: Mbuf) {
        // SAFETY: by the caller.
        unsafe { (self.calls.release)(frame.pointer()) };
    }

    /// Appends a segment to a frame whose last one is `last`.
    pub(crate) fn append(&self, frame: Mbuf, last: Mbuf, segment: Mbuf) {
        // SAFETY: all three are ours.
        unsafe { (self.calls.append)(frame.pointer(), last.pointer(), segment.pointer()) };
    }

    /// Looks at headers and addresses of received frames, and drops what is malformed or not for this port.
    ///
    /// # Safety
    /// `frames` has `count` frames, with a header's bytes before their data.
    #[inline(never)]
    pub(crate) unsafe fn look_at(&self, frames: *mut *mut u8, count: usize, mut bytes: u64) -> (usize, u64) {
        let mut kept = 0;
        for at in 0..count {
            // SAFETY: by the caller.
            let frame = unsafe { Mbuf::new(*frames.add(at)) };
            let len = u64::from(frame.pkt_len());
            let data = frame.address() as *const u8;
            let mut dropped = &self.counters.filtered;
            let mut keep = true;
            if let Some(filter) = &self.filter {
                let mut start = [0u8; 16];
                let n = usize::from(frame.data_len()).min(start.len());
                // SAFETY: the frame has so many bytes; a copy, since the other side may write them.
                unsafe { data.copy_to_nonoverlapping(start.as_mut_ptr(), n) };
                keep = filter.accepts(&start[..n]);
            }
            if keep && self.look != 0 {
                // SAFETY: the frame is ours, its header before it.
                let fine = unsafe { (self.calls.received)(frame.pointer(), data.sub(HEADER), self.look) };
                keep = fine == 0;
                dropped = &self.counters.errors;
            }
            if keep {
                // SAFETY: not beyond `at`.
                unsafe { *frames.add(kept) = frame.pointer() };
                kept += 1;
            } else {
                dropped.add(1);
                bytes -= len;
                // SAFETY: ours.
                unsafe { self.drop_frame(frame) };
            }
        }
        (kept, bytes)
    }
}

/// A frame whose buffers have not all come yet.
struct Partial {
    frame: Mbuf,
    last: Mbuf,
    left: u16,
}

/// What the gate is around.
pub(crate) struct Rx {
    pub(crate) ring: RawRing,
    pub(crate) source: Source,
    batch: usize,
    /// Somebody is on the other side.
    up: bool,
    mergeable: bool,
    partial: Option<Partial>,
}

// SAFETY: mbufs in the ring are this value's alone.
unsafe impl Send for Rx {}

impl Rx {
    pub(crate) fn new(ring: RawRing, setup: &RxSetup, source: Source) -> Self {
        Rx {
            batch: usize::from(setup.batch).clamp(1, ring.size()),
            ring,
            source,
            up: false,
            mergeable: false,
            partial: None,
        }
    }

    /// A fresh ring in the place of the old one, whose buffers are full of what nobody will receive.
    pub(crate) fn replace(&mut self, ring: RawRing, mergeable: bool) {
        self.reset();
        self.source.counters.retire(&self.ring);
        self.ring = ring;
        self.mergeable = mergeable;
        self.ring.set_notify(false);
        self.up = true;
        self.fill(1);
    }

    pub(crate) fn take_down(&mut self) {
        self.up = false;
    }

    /// Gives every buffer back to the pool. The other side must be gone.
    pub(crate) fn reset(&mut self) {
        let source = &self.source;
        // SAFETY: a cookie of this ring.
        let back = |cookie| source.put_back(unsafe { Mbuf::of(cookie) });
        // SAFETY: the back-end is gone, or has answered that it stopped the ring.
        unsafe { self.ring.reset(back) };
        if let Some(partial) = self.partial.take() {
            // SAFETY: the frame is ours, chained as far as it came.
            unsafe { source.drop_frame(partial.frame) };
        }
    }

    /// Fills the ring if so many descriptors are free.
    #[inline(always)]
    fn fill(&mut self, enough: usize) {
        let Rx { ring, source, .. } = self;
        let free = ring.free();
        if free < enough || !source.is_there() {
            return;
        }
        let room = source.room;
        source.fill(free, enough, |fresh| {
            // SAFETY: the pool gave them.
            let mbufs = fresh.iter().map(|&pointer| unsafe { Mbuf::new(pointer) });
            // The choice is made once a burst; the line of an mbuf is not read where its buffer can be told without.
            if let Some(shift) = source.by_shift() {
                ring.post(mbufs.map(|mbuf| Empty {
                    mbuf,
                    address: mbuf.cookie() + shift,
                    room,
                }))
            } else {
                let headroom = u64::from(source.headroom);
                ring.post(mbufs.map(|mbuf| Empty {
                    mbuf,
                    address: mbuf.buffer() + headroom,
                    room,
                }))
            }
        });
        ring.publish();
    }

    #[inline(always)]
    fn burst(&mut self, out: *mut *mut u8, count: usize) -> usize {
        let mut received = 0;
        let mut bytes = 0;
        while received < count {
            let most = (count - received).min(CHUNK);
            // SAFETY: `out` has room for `count`.
            let to = unsafe { out.add(received) };
            let mut lens = [0u32; CHUNK];
            let mut n = 0;
            let mut sum = 0u64;
            let mut misfits = 0;
            let spread = self.source.spread;
            self.ring.complete(most, |cookie, len| {
                // A length that is too short wraps around, so that one comparison finds it, too.
                let len = len.wrapping_sub(HEADER as u32 + SHORTEST);
                misfits += usize::from(len > spread);
                sum += u64::from(len);
                // SAFETY: at most `most` come; a cookie of this ring.
                unsafe {
                    Mbuf::of(cookie).prefetch();
                    *to.add(n) = cookie as *mut u8;
                    *lens.get_unchecked_mut(n) = len;
                }
                n += 1;
            });
            if n == 0 {
                break;
            }
            if misfits == 0 && !self.mergeable {
                let (rearm, flags) = (self.source.rearm, self.source.flags);
                for (at, &len) in lens[..n].iter().enumerate() {
                    // SAFETY: written above.
                    unsafe { Mbuf::new(*to.add(at)) }.received(rearm, flags, len + SHORTEST);
                }
                bytes += sum + n as u64 * u64::from(SHORTEST);
                received += n;
            } else {
                // SAFETY: as above.
                let (frames, sum) = unsafe { self.join(to, &lens[..n]) };
                bytes += sum;
                received += frames;
            }
            if n < most {
                break;
            }
        }
        if self.up {
            self.fill(self.batch);
        }
        let source = &self.source;
        if source.look != 0 || source.filter.is_some() {
            // SAFETY: so many were written; every posted buffer has room for a header before the data.
            (received, bytes) = unsafe { source.look_at(out, received, bytes) };
        }
        if received > 0 {
            source.counters.packets.add(received as u64);
            source.counters.bytes.add(bytes);
        }
        source.counters.publish(&self.ring);
        received
    }

    /// Joins the segments of frames, and drops what is none; frames and their bytes. `lens` are without a header and
    /// without [`SHORTEST`].
    ///
    /// # Safety
    /// `to` has an mbuf for each length.
    #[inline(never)]
    unsafe fn join(&mut self, to: *mut *mut u8, lens: &[u32]) -> (usize, u64) {
        let (mut frames, mut bytes) = (0, 0);
        let source = &self.source;
        let base = u64::from(source.headroom);
        if self.mergeable {
            for at in 0..lens.len() {
                // SAFETY: by the caller.
                let mbuf = unsafe { Mbuf::new(*to.add(at)) };
                prefetch((mbuf.buffer() + base - HEADER as u64) as *const u8);
            }
        }
        for (at, &len) in lens.iter().enumerate() {
            // SAFETY: by the caller.
            let mbuf = unsafe { Mbuf::new(*to.add(at)) };
            let len = len.wrapping_add(SHORTEST);
            if let Some(partial) = &mut self.partial {
                // What follows has a header's bytes of data at its beginning (virtio 1.3, 5.1.6.4): no header at all.
                let whole = len.wrapping_add(HEADER as u32);
                let data = base as u16 - HEADER as u16;
                mbuf.received(source.rearm - base + u64::from(data), source.flags, whole);
                source.append(partial.frame, partial.last, mbuf);
                partial.last = mbuf;
                partial.left -= 1;
                if partial.left > 0 {
                    continue;
                }
                let frame = partial.frame;
                self.partial = None;
                let len = frame.pkt_len();
                if u32::from(frame.data_len()) < SHORTEST || !source.fits(len) {
                    source.misfit(len);
                    // SAFETY: ours, and whole.
                    unsafe { source.drop_frame(frame) };
                    continue;
                }
                source.counters.chains.add(1);
                bytes += u64::from(frame.pkt_len());
                // SAFETY: not beyond `at`.
                unsafe { *to.add(frames) = frame.pointer() };
                frames += 1;
                continue;
            }
            mbuf.received(source.rearm, source.flags, len);
            let pieces = if self.mergeable {
                let field = (mbuf.address() - (HEADER - NUM_BUFFERS) as u64) as *const u16;
                // SAFETY: every posted buffer has its header before the data; volatile, since the other side may write it.
                u16::from_le(unsafe { field.read_volatile() })
            } else {
                1
            };
            // A length of less than a header wrapped around.
            if len > source.room || pieces == 0 || usize::from(pieces) > self.ring.size() {
                source.counters.errors.add(1);
                source.put_back(mbuf);
                continue;
            }
            if pieces == 1 && !source.fits(len) {
                source.misfit(len);
                source.put_back(mbuf);
                continue;
            }
            if pieces > 1 {
                self.partial = Some(Partial {
                    frame: mbuf,
                    last: mbuf,
                    left: pieces - 1,
                });
                continue;
            }
            bytes += u64::from(len);
            // SAFETY: not beyond `at`.
            unsafe { *to.add(frames) = mbuf.pointer() };
            frames += 1;
        }
        (frames, bytes)
    }
}

/// What DPDK knows a queue by: memory of the C half's that begins so. Null while the port is stopped, when DPDK's calls
/// still come.
#[repr(C)]
pub struct Handle {
    pub(crate) running: Option<NonNull<c_void>>,
}

impl Handle {
    /// The queue, if it runs.
    ///
    /// # Safety
    /// `handle` is one, and what runs is a `T` that nobody else uses meanwhile.
    #[inline(always)]
    pub(crate) unsafe fn queue<'a, T>(handle: *mut c_void) -> Option<&'a mut T> {
        // SAFETY: by the caller.
        unsafe {
            (*handle.cast::<Handle>())
                .running
                .map(|queue| queue.cast::<T>().as_mut())
        }
    }
}

/// A receive queue.
pub(crate) struct RxQueue {
    data: Data,
    counters: Arc<Counters>,
    wake: Arc<Wake>,
}

/// The ring of it.
pub(crate) enum Data {
    Ring(DataSide<Rx>),
    Vf(DataSide<vf::Rx>),
}

impl RxQueue {
    pub(crate) fn new(data: Data, counters: Arc<Counters>, wake: Arc<Wake>) -> Self {
        RxQueue { data, counters, wake }
    }

    /// Makes a call as from inside a burst.
    #[cfg(test)]
    pub(crate) fn inside(&mut self, call: impl FnOnce()) -> bool {
        match &mut self.data {
            Data::Ring(data) => data.enter().map(|_inside| call()).is_some(),
            Data::Vf(data) => data.enter().map(|_inside| call()).is_some(),
        }
    }
}

/// The queue's control.
pub(crate) type Control = ControlSide<Rx>;

/// Receives: `rte_eth_rx_burst`.
///
/// # Safety
/// `queue` is a [`Handle`] of a receive queue, and one thread's; `mbufs` has room for `count`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_pmd_rx(queue: *mut c_void, mbufs: *mut *mut u8, count: u16) -> u16 {
    // SAFETY: by the caller.
    let Some(queue) = (unsafe { Handle::queue::<RxQueue>(queue) }) else {
        return 0;
    };
    let received = match &mut queue.data {
        Data::Ring(data) => data.enter().map(|mut rx| rx.burst(mbufs, count.into())),
        // SAFETY: by the caller.
        Data::Vf(data) => data.enter().map(|mut rx| unsafe { rx.burst(mbufs, count.into()) }),
    };
    received.unwrap_or(0) as u16
}

/// The queue's counters.
///
/// # Safety
/// The queue is one of a started port; `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_pmd_rx_counts(queue: *const c_void, out: *mut abi::Counts) {
    // SAFETY: by the caller.
    unsafe { out.write((*queue.cast::<RxQueue>()).counters.get()) };
}

/// What is readable when frames have come that the queue was [armed](usernic_pmd_rx_arm) for. It is not to be read.
///
/// # Safety
/// The queue is one of a started port.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_pmd_rx_fd(queue: *const c_void) -> i32 {
    // SAFETY: by the caller.
    unsafe { (*queue.cast::<RxQueue>()).wake.fd() }
}

/// Asks to be notified of frames, or not any more. 1: frames are there.
///
/// # Safety
/// As [`usernic_pmd_rx`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_pmd_rx_arm(queue: *mut c_void, on: u8) -> i32 {
    // SAFETY: by the caller.
    let Some(queue) = (unsafe { Handle::queue::<RxQueue>(queue) }) else {
        return 0;
    };
    if on == 0 {
        queue.wake.clear();
    }
    let there = match &mut queue.data {
        Data::Ring(data) => data.enter().is_some_and(|mut rx| rx.ring.set_notify(on != 0)),
        Data::Vf(data) => data.enter().is_some_and(|mut rx| rx.arm(on != 0)),
    };
    if there && on != 0 {
        // No notification comes for what is there: this stands for it.
        queue.wake.signal();
    }
    i32::from(there)
}
