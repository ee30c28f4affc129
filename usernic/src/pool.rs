//! Packet buffers of a port, and what is private about each.
//!
//! `hugemem::Pool` names buffers by number and keeps the free ones. Here each number gets a line of private memory, its
//! [`Meta`]: where its bytes are, how long the frame is. A [`Packet`](crate::Packet) is a pointer to that line, and so
//! is the cookie that a ring carries.
//!
//! A pool outlives its port while packets of it are about. Nothing is counted packet by packet for that: buffers leave
//! and come home in bulk, and the bulks are counted. Packets that are dropped go home by a
//! [`magazine`] of their thread, and a pool that closes takes what is in any of them.

mod magazine;

use std::cell::UnsafeCell;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use hugemem::{Segment, Slab};

pub(crate) use magazine::{flush_this_thread, free};

use crate::offload::checksum::Partial;
use crate::packet::Marks;

/// Bytes before a fresh packet's first byte: room for the virtio-net header and for what an application prepends.
pub(crate) const HEADROOM: u16 = 128;

/// Of the headroom, what is never given to the application: the largest virtio-net header (20 bytes), to the next
/// multiple of 4.
pub(crate) const RESERVED: u16 = 20;

/// Buffers that move between a cache and the pool at a time.
pub(crate) const BULK: usize = 32;

/// One buffer's private line.
#[repr(C, align(64))]
pub(crate) struct Meta {
    /// The buffer's first byte.
    pub(crate) base: *mut u8,
    /// The same, as the other side names it.
    pub(crate) address: u64,
    pool: *const Inner,
    /// The next segment of the same packet and [`MORE`]; in the last one the pool, and with it [`ASKS`] if there may be
    /// something in `marks` that the packet asks for. So one comparison with an [`Own`] tells of a packet to send that it
    /// is of one segment, of the sender's pool, and asks for nothing. In a buffer that nobody has it is the pool: whoever
    /// gives one back sees to that first.
    link: *mut u8,
    // `offset` to `len` stand in an order in which few stores reset them, of a packet to send and of a buffer to receive
    // into.
    /// Where the packet's bytes begin, from `base`.
    pub(crate) offset: u16,
    /// If it equals `offset`, the virtio-net header before it was zeroed by us and nothing has been put there since; and
    /// the packet asks for nothing.
    pub(crate) zeroed_at: u16,
    /// Of a packet's first segment: which of the other fields mean something.
    pub(crate) marks: Marks,
    /// Bytes of the packet's headers, if it is to be cut ([`Marks::SEGMENTATION`]).
    pub(crate) hdr_len: u16,
    /// Bytes of the packet in this segment.
    pub(crate) len: u32,
    id: u32,
    /// The checksum that is open ([`Marks::CHECKSUM`]).
    pub(crate) partial: Partial,
    /// Bytes of payload for each packet that this one is to be cut into ([`Marks::SEGMENTATION`]).
    pub(crate) gso_size: u16,
    /// Over what `hash` is ([`Marks::HASH`]).
    pub(crate) hash_report: u16,
    /// The hash that the other side reported ([`Marks::HASH`]).
    pub(crate) hash: u32,
    /// The VLAN tag that is not in the frame ([`Marks::TAG`]).
    pub(crate) tag: u16,
}

const _: () = assert!(size_of::<Meta>() == 64);

/// In [`Meta::link`]: it leads to another segment.
const MORE: usize = 1;
/// In [`Meta::link`] of a packet's first segment: look at its marks.
const ASKS: usize = 2;

const _: () = assert!(align_of::<Meta>() > (MORE | ASKS) && align_of::<Inner>() > (MORE | ASKS));

/// A pool, as [`Meta::is_plain_of`] compares it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Own(*mut u8);

impl Meta {
    /// The next segment of the same packet.
    #[inline(always)]
    pub(crate) fn next(&self) -> Option<NonNull<Meta>> {
        // SAFETY: with MORE the link is what `set_next` made of a NonNull.
        (!self.is_last()).then(|| unsafe { NonNull::new_unchecked(self.link.map_addr(|a| a & !(MORE | ASKS)).cast()) })
    }

    /// Whether no segment follows.
    #[inline(always)]
    pub(crate) fn is_last(&self) -> bool {
        self.link.addr() & MORE == 0
    }

    /// Puts a segment behind this one, which is the last.
    #[inline]
    pub(crate) fn set_next(&mut self, next: NonNull<Meta>) {
        debug_assert!(self.is_last());
        let asks = self.link.addr() & ASKS;
        self.link = next.as_ptr().cast::<u8>().map_addr(|a| a | MORE | asks);
    }

    /// Cuts off the segments behind this one.
    #[inline]
    pub(crate) fn take_next(&mut self) -> Option<NonNull<Meta>> {
        let next = self.next();
        let asks = self.link.addr() & ASKS;
        self.link = self.pool.cast_mut().cast::<u8>().map_addr(|a| a | asks);
        next
    }

    /// Of a packet's first segment: there is something that it asks for.
    #[inline]
    pub(crate) fn set_asks(&mut self) {
        self.link = self.link.map_addr(|a| a | ASKS);
    }

    /// Of a packet's first segment: there is nothing that it asks for.
    #[inline]
    pub(crate) fn clear_asks(&mut self) {
        self.link = self.link.map_addr(|a| a & !ASKS);
    }

    /// Of a packet's first segment: there may be something that it asks for.
    #[inline(always)]
    pub(crate) fn asks(&self) -> bool {
        self.link.addr() & ASKS != 0
    }

    /// Of a packet's first segment: there is no other, and nothing that it asks for.
    #[inline(always)]
    pub(crate) fn is_plain(&self) -> bool {
        self.link.addr() & (MORE | ASKS) == 0
    }

    /// The same, and the buffer is of this pool.
    #[inline(always)]
    pub(crate) fn is_plain_of(&self, own: Own) -> bool {
        self.link == own.0
    }

    /// Whether there is no other segment, and the buffer is of this pool.
    #[inline(always)]
    pub(crate) fn is_single_of(&self, own: Own) -> bool {
        self.link.addr() & !ASKS == own.0.addr()
    }

    /// Whether the buffer, and with it all of its packet, is of this pool.
    #[inline]
    pub(crate) fn is_of(&self, own: Own) -> bool {
        self.pool.addr() == own.0.addr()
    }

    /// Makes a chain's segment a buffer that nobody has; what was behind it.
    #[inline(always)]
    fn detach(&mut self) -> Option<NonNull<Meta>> {
        let next = self.next();
        self.link = self.pool.cast_mut().cast();
        next
    }

    /// Makes a buffer that nobody had an empty packet.
    #[inline(always)]
    pub(crate) fn reset(&mut self) {
        debug_assert!(self.is_plain());
        self.offset = HEADROOM;
        self.marks = Marks::NONE;
        self.hdr_len = 0;
        self.len = 0;
    }

    /// The other side wrote `len` bytes and a header before them.
    #[inline(always)]
    pub(crate) fn received(&mut self, len: u32) {
        self.offset = HEADROOM;
        self.zeroed_at = 0;
        self.marks = Marks::NONE;
        self.hdr_len = 0;
        self.len = len;
    }

    /// Where a buffer to receive into begins, as the other side names it.
    #[inline(always)]
    pub(crate) fn room_address(&self) -> u64 {
        self.address + u64::from(HEADROOM)
    }

    #[inline(always)]
    pub(crate) fn data(&self) -> *mut u8 {
        // SAFETY: offset is within the buffer (kept so by every method that moves it).
        unsafe { self.base.add(usize::from(self.offset)) }
    }
}

struct Inner {
    pool: hugemem::Pool,
    meta: Box<[Slot]>,
    /// Buffers that are not in `pool`, and one for the owner.
    refs: AtomicUsize,
    /// The owner is gone: buffers go home at once.
    closed: AtomicBool,
    /// Bytes of a buffer after the headroom.
    room: u32,
    /// Nobody else can reach the bytes.
    private: bool,
    /// Keeps the bytes mapped.
    _segment: Arc<Segment>,
}

/// A [`Meta`] that only its buffer's owner touches.
#[repr(transparent)]
struct Slot(UnsafeCell<Meta>);

// SAFETY: a Meta is reached through the one owner of its buffer: a Packet, a ring's cookie, or a cache. Ownership moves
// between threads by the pool's stack (Release/Acquire), by Packet's Send, or by the gate.
unsafe impl Sync for Slot {}
// SAFETY: as above; the pointers inside are to memory that `Inner` keeps alive.
unsafe impl Send for Slot {}

/// The owner's handle. Dropping it lets the memory go as soon as the last buffer is home.
pub(crate) struct Pool(NonNull<Inner>);

// SAFETY: Inner is Sync: its parts are atomics, a Sync pool, and Metas that follow ownership.
unsafe impl Send for Pool {}
// SAFETY: as above.
unsafe impl Sync for Pool {}

/// A thread's or queue's own stack of free buffers.
pub(crate) struct Cache {
    pool: Arc<Pool>,
    /// Of capacity `most` or more, so that a push below that never allocates.
    ids: Vec<u32>,
    most: usize,
}

/// Buffers that a cache holds at the most; and an eighth of the pool, so that caches do not starve it.
const CACHE: usize = 512;

impl Pool {
    /// Builds a pool of `count` buffers with `room` bytes after the headroom, on `segment` from `offset`.
    ///
    /// The buffers' addresses for the other side are their addresses here plus `bias`.
    pub(crate) fn new(
        segment: Arc<Segment>,
        offset: usize,
        count: u32,
        room: u32,
        bias: u64,
        private: bool,
    ) -> Result<Arc<Self>, hugemem::Error> {
        let stride = Self::stride(room);
        assert!(
            offset + stride * count as usize <= segment.len(),
            "the caller sized the segment"
        );
        // SAFETY: in bounds, as just asserted.
        let base = unsafe { segment.base().add(offset) };
        let slab = Slab {
            base,
            buffer_size: stride as u32,
            count,
            headroom: u32::from(HEADROOM),
        };
        // SAFETY: the slab's bytes are inside the segment, which Inner keeps mapped, and are used through this pool
        // alone.
        let pool = unsafe { hugemem::Pool::new(slab) }?;
        let inner = Box::new(Inner {
            pool,
            meta: Box::default(),
            refs: AtomicUsize::new(1),
            closed: AtomicBool::new(false),
            room,
            private,
            _segment: segment,
        });
        let inner = NonNull::from(Box::leak(inner));
        let meta = (0..count)
            .map(|id| {
                // SAFETY: id < count, so the buffer is inside the slab.
                let base = unsafe { base.as_ptr().add(id as usize * stride) };
                Slot(UnsafeCell::new(Meta {
                    base,
                    address: (base as u64).wrapping_add(bias),
                    pool: inner.as_ptr(),
                    link: inner.as_ptr().cast(),
                    id,
                    len: 0,
                    offset: HEADROOM,
                    marks: Marks::NONE,
                    zeroed_at: 0,
                    partial: Partial { start: 0, offset: 0 },
                    gso_size: 0,
                    hash_report: 0,
                    tag: 0,
                    hash: 0,
                    hdr_len: 0,
                }))
            })
            .collect();
        // SAFETY: just made, nobody else has it.
        unsafe { (*inner.as_ptr()).meta = meta };
        Ok(Arc::new(Pool(inner)))
    }

    /// Bytes from one buffer to the next: headroom and room, in lines; an odd number of lines, so that the buffers of
    /// a burst spread over all sets of a cache.
    pub(crate) fn stride(room: u32) -> usize {
        let lines = (usize::from(HEADROOM) + room as usize).div_ceil(64);
        (lines | 1) * 64
    }

    #[inline]
    fn inner(&self) -> &Inner {
        // SAFETY: the owner's reference keeps Inner alive while self lives.
        unsafe { self.0.as_ref() }
    }

    /// Buffers that are in the shared part now.
    #[cfg(test)]
    pub(crate) fn available(&self) -> usize {
        self.inner().pool.available() as usize
    }

    /// All buffers.
    #[cfg(test)]
    pub(crate) fn capacity(&self) -> usize {
        self.inner().meta.len()
    }

    /// Bytes of a frame that one buffer holds.
    pub(crate) fn room(&self) -> u32 {
        self.inner().room
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.inner().closed.store(true, Ordering::Relaxed);
        // Buffers that are freed from now on go home at once, and those that threads have in hand now.
        magazine::flush_all_of(self.0);
        // SAFETY: the owner's reference, given up here, once.
        unsafe { release(self.0, 1) };
    }
}

/// Gives up `n` references.
///
/// # Safety
/// The caller owns `n` references to `inner`, and uses it no more.
unsafe fn release(inner: NonNull<Inner>, n: usize) {
    // SAFETY: alive by the references that are given up here.
    let refs = &unsafe { inner.as_ref() }.refs;
    if refs.fetch_sub(n, Ordering::Release) == n {
        // What the others did with it comes before. A load, not a fence: ThreadSanitizer knows no fences.
        refs.load(Ordering::Acquire);
        // SAFETY: the last reference: every buffer is home, the owner is gone. It came from Box::leak.
        drop(unsafe { Box::from_raw(inner.as_ptr()) });
    }
}

impl Inner {
    fn take(&self, out: &mut [u32]) -> usize {
        let n = self.pool.get_bulk(out);
        self.refs.fetch_add(n, Ordering::Relaxed);
        n
    }

    /// # Safety
    /// The caller owns the buffers `ids` of `inner` and gives them up.
    unsafe fn give(inner: NonNull<Inner>, ids: &[u32]) {
        // SAFETY: alive: each of the caller's buffers is a reference. The buffers are the caller's, each once.
        unsafe { inner.as_ref().pool.put_bulk_unchecked(ids) };
        // SAFETY: the references of these buffers.
        unsafe { release(inner, ids.len()) };
    }

    #[inline(always)]
    fn meta(&self, id: u32) -> NonNull<Meta> {
        debug_assert!((id as usize) < self.meta.len());
        // SAFETY: ids come from the pool, which has as many buffers as there are Metas. A cell's pointer is not null.
        unsafe { NonNull::new_unchecked(self.meta.as_ptr().add(id as usize).cast_mut().cast()) }
    }
}

impl Cache {
    pub(crate) fn new(pool: Arc<Pool>) -> Self {
        let most = (pool.inner().meta.len() / 8).clamp(4 * BULK, CACHE);
        Cache {
            pool,
            ids: Vec::with_capacity(most),
            most,
        }
    }

    pub(crate) fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// The pool, to be compared with.
    #[inline(always)]
    pub(crate) fn own(&self) -> Own {
        Own(self.pool.0.as_ptr().cast())
    }

    /// Buffers that can be made ready at the most.
    pub(crate) fn most(&self) -> usize {
        self.most.min(self.pool.inner().meta.len())
    }

    /// Makes `n` buffers ready, if there are so many; how many are.
    #[inline(always)]
    pub(crate) fn reserve(&mut self, n: usize) -> usize {
        if self.ids.len() < n {
            self.refill(n)
        } else {
            self.ids.len()
        }
    }

    #[inline(never)]
    fn refill(&mut self, n: usize) -> usize {
        let have = self.ids.len();
        let want = (n - have).next_multiple_of(BULK).min(self.most - have);
        self.ids.resize(have + want, 0);
        let got = self.pool.inner().take(&mut self.ids[have..]);
        self.ids.truncate(have + got);
        if self.ids.len() < n {
            // This thread's magazine may hold the rest.
            flush_this_thread();
            let have = self.ids.len();
            self.ids.resize((have + BULK).min(self.most), 0);
            let got = self.pool.inner().take(&mut self.ids[have..]);
            self.ids.truncate(have + got);
        }
        self.ids.len()
    }

    /// Takes a buffer that was made ready, reset.
    #[inline(always)]
    pub(crate) fn pop(&mut self) -> Option<NonNull<Meta>> {
        let id = self.ids.pop()?;
        let mut meta = self.pool.inner().meta(id);
        // SAFETY: the buffer is ours: it came from the cache, which owned it.
        unsafe { meta.as_mut() }.reset();
        Some(meta)
    }

    /// The last `n` buffers that were made ready, in the order in which they were put back. They are still the cache's:
    /// see [`forget_first`](Cache::forget_first).
    ///
    /// In this order a receive ring that is filled with what was just freed gets each buffer where it was before.
    #[inline(always)]
    pub(crate) fn last(&self, n: usize) -> impl DoubleEndedIterator<Item = NonNull<Meta>> + '_ {
        // The array's beginning by value: in a loop that copies shared memory, what is behind references is read again.
        let metas = self.pool.inner().meta.as_ptr();
        self.ids[self.ids.len() - n.min(self.ids.len())..]
            .iter()
            // SAFETY: ids come from the pool, which has as many buffers as there are Metas. A cell's pointer is not null.
            .map(move |&id| unsafe { NonNull::new_unchecked(metas.add(id as usize).cast_mut().cast()) })
    }

    /// Of the last `n` buffers, the first `taken` are somebody else's now.
    #[inline(always)]
    pub(crate) fn forget_first(&mut self, taken: usize, n: usize) {
        let len = self.ids.len();
        debug_assert!(taken <= n && n <= len);
        if taken < n {
            self.ids.copy_within(len - n + taken.., len - n);
        }
        self.ids.truncate(len - taken);
    }

    /// To take buffers back by.
    #[inline(always)]
    pub(crate) fn returning(&mut self) -> Returning<'_> {
        Returning {
            ids: self.ids.as_mut_ptr(),
            len: self.ids.len(),
            most: self.most,
            own: self.own(),
            cache: self,
        }
    }

    #[inline(never)]
    unsafe fn put_slow(&mut self, meta: NonNull<Meta>) {
        let mut next = Some(meta);
        while let Some(mut meta) = next {
            // SAFETY: the caller owns the chain.
            let m = unsafe { meta.as_mut() };
            next = m.detach();
            if m.pool != self.pool.0.as_ptr() {
                // SAFETY: owned, and now a chain of one.
                unsafe { free([meta]) };
                continue;
            }
            if self.ids.len() == self.most {
                self.flush(self.most / 2);
            }
            self.ids.push(m.id);
        }
    }

    /// Sends all but the `keep` buffers used last to the pool.
    pub(crate) fn flush(&mut self, keep: usize) {
        let n = self.ids.len().saturating_sub(keep);
        if n > 0 {
            // SAFETY: the cache owned these buffers; they are removed from it right below.
            unsafe { Inner::give(self.pool.0, &self.ids[..n]) };
            self.ids.drain(..n);
        }
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        self.flush(0);
    }
}

/// Buffers on their way into a cache: what that consists of, in registers.
///
/// Invariant: `ids` is the cache's, `len` of them are initialised, and its capacity is `most` or more.
pub(crate) struct Returning<'a> {
    ids: *mut u32,
    len: usize,
    most: usize,
    own: Own,
    cache: &'a mut Cache,
}

impl Returning<'_> {
    /// Takes back a buffer, with all segments behind it.
    ///
    /// # Safety
    /// The caller owns the buffers and gives them up.
    #[inline(always)]
    pub(crate) unsafe fn put(&mut self, meta: NonNull<Meta>) {
        // SAFETY: the caller owns it.
        let m = unsafe { meta.as_ref() };
        if m.is_plain_of(self.own) && self.len < self.most {
            // SAFETY: below the capacity.
            unsafe { self.ids.add(self.len).write(m.id) };
            self.len += 1;
        } else {
            // SAFETY: handed on.
            unsafe { self.put_slow(meta) };
        }
    }

    #[cold]
    unsafe fn put_slow(&mut self, meta: NonNull<Meta>) {
        // SAFETY: the first `len` are initialised.
        unsafe { self.cache.ids.set_len(self.len) };
        // SAFETY: handed on.
        unsafe { self.cache.put_slow(meta) };
        self.ids = self.cache.ids.as_mut_ptr();
        self.len = self.cache.ids.len();
    }
}

impl Drop for Returning<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: the first `len` are initialised.
        unsafe { self.cache.ids.set_len(self.len) };
    }
}

/// Takes one buffer from the pool that `like` is of: for packets that grow.
///
/// # Safety
/// The caller owns `like`.
pub(crate) unsafe fn sibling(like: NonNull<Meta>) -> Option<NonNull<Meta>> {
    // SAFETY: the pool is alive while one of its buffers is out.
    let inner = unsafe { &*like.as_ref().pool };
    let mut id = [0u32];
    if inner.take(&mut id) == 0 {
        flush_this_thread();
        if inner.take(&mut id) == 0 {
            return None;
        }
    }
    let mut meta = inner.meta(id[0]);
    // SAFETY: just taken.
    unsafe { meta.as_mut() }.reset();
    Some(meta)
}

/// Bytes after the headroom, of the buffer's pool; and whether nobody else can reach them.
///
/// # Safety
/// The caller owns the buffer.
#[inline]
pub(crate) unsafe fn room_of(meta: &Meta) -> (u32, bool) {
    // SAFETY: the pool is alive while one of its buffers is out.
    let inner = unsafe { &*meta.pool };
    (inner.room, inner.private)
}

/// Bytes of a frame at the most, if all buffers of the buffer's pool were its own. No more than fits a `u32`.
///
/// # Safety
/// The caller owns the buffer.
pub(crate) unsafe fn capacity_of(meta: &Meta) -> usize {
    // SAFETY: the pool is alive while one of its buffers is out.
    let inner = unsafe { &*meta.pool };
    let of_one = usize::from(HEADROOM) + inner.room as usize;
    of_one.saturating_mul(inner.meta.len()).min(u32::MAX as usize)
}
