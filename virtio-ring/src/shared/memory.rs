//! The rings in raw memory.

use super::{Desc, check_size, raw, wire};
use crate::Error;
use core::mem::offset_of;
use core::ptr::NonNull;
use core::sync::atomic::{
    AtomicU16, AtomicU32,
    Ordering::{Acquire, Relaxed, Release, SeqCst},
    fence,
};

/// Where the three parts of a split ring lie in this process. The parts may be anywhere; [`Layout`] gives the
/// sizes and one good arrangement.
///
/// [`Layout`]: crate::split::Layout
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// The descriptor table: 16 bytes a descriptor, aligned to 16 (§2.7.5).
    pub desc: NonNull<u8>,
    /// The available ring: 6 bytes and 2 an entry, aligned to 2 (§2.7.6).
    pub avail: NonNull<u8>,
    /// The used ring: 6 bytes and 8 an entry, aligned to 4 (§2.7.8).
    pub used: NonNull<u8>,
}

// SAFETY: three addresses. Nothing can be done with them but through the `unsafe` constructors of the rings, whose
// contract covers use from whatever thread the ring is on.
unsafe impl Send for Memory {}
// SAFETY: as above; a shared reference gives out the addresses only.
unsafe impl Sync for Memory {}

impl Memory {
    /// `used.idx` as it stands: how many buffers the device side has completed, modulo 2^16. What a back-end
    /// resumes at that takes over a ring whose former back-end died without saying where it was.
    ///
    /// # Safety
    /// `used` is valid for reads of 4 bytes and aligned to 4.
    pub unsafe fn used_index(&self) -> u16 {
        // SAFETY: in bounds and aligned by this function's contract.
        let cell = unsafe { AtomicU16::from_ptr(self.used.as_ptr().add(offset_of!(wire::UsedHead, idx)).cast()) };
        u16::from_le(cell.load(Acquire))
    }

    /// Whether no device has completed a buffer yet: the used ring is as it was made, all zero.
    ///
    /// # Safety
    /// `used` is valid for reads of [`Layout::used_len`](crate::split::Layout::used_len) bytes for `size`.
    pub(crate) unsafe fn is_unused(&self, size: u16) -> bool {
        (0..crate::split::Layout::used_len(size)).all(|at| {
            let mut byte = [0];
            // SAFETY: in bounds by this function's contract.
            unsafe { raw::load_bytes(self.used.as_ptr().add(at), &mut byte) };
            byte == [0]
        })
    }
}

/// The rings of one queue. Invariant, from the contract of [`Ring::new`]: the three parts are valid for reads and
/// writes of their full sizes and aligned as long as this value is used, and `mask + 1` is the queue size.
#[derive(Clone, Debug)]
pub(crate) struct Ring {
    desc: *mut u8,
    avail: *mut u8,
    used: *mut u8,
    mask: usize,
}

// SAFETY: `Ring` is the only path of this process side to the rings, and every access is atomic.
unsafe impl Send for Ring {}
// SAFETY: every access is atomic.
unsafe impl Sync for Ring {}

const AVAIL_RING: usize = offset_of!(wire::AvailHead, ring);
const USED_RING: usize = offset_of!(wire::UsedHead, ring);

impl Ring {
    /// # Safety
    /// The parts of `memory` are valid for reads and writes of their sizes for `size`, and nobody accesses them
    /// other than atomically or from another process or machine, for as long as the value or a clone of it lives.
    pub(crate) unsafe fn new(memory: Memory, size: u16) -> Result<Self, Error> {
        let size = check_size(size)?;
        let misaligned = [
            (memory.desc, core::mem::align_of::<wire::Desc>()),
            (memory.avail, core::mem::align_of::<wire::AvailHead>()),
            (memory.used, core::mem::align_of::<wire::UsedHead>()),
        ]
        .into_iter()
        .find(|(part, align)| !(part.as_ptr() as usize).is_multiple_of(*align));
        if let Some((part, align)) = misaligned {
            return Err(Error::Misaligned {
                address: part.as_ptr() as usize,
                align,
            });
        }
        Ok(Self {
            desc: memory.desc.as_ptr(),
            avail: memory.avail.as_ptr(),
            used: memory.used.as_ptr(),
            mask: usize::from(size) - 1,
        })
    }

    /// The queue size less 1.
    #[inline(always)]
    pub(crate) fn mask(&self) -> usize {
        self.mask
    }

    #[inline(always)]
    pub(crate) fn load_desc(&self, i: usize) -> Desc {
        // SAFETY: masked, so inside the table of `mask + 1` descriptors; aligned as the table is.
        Desc::from_words(unsafe { raw::load_desc(self.desc.add((i & self.mask) * size_of::<wire::Desc>())) })
    }

    #[inline(always)]
    pub(crate) fn store_desc(&self, i: usize, desc: Desc) {
        // SAFETY: masked, so inside the table of `mask + 1` descriptors; aligned as the table is.
        unsafe { raw::store_desc(self.desc.add((i & self.mask) * size_of::<wire::Desc>()), desc.words()) }
    }

    /// [`Ring::store_desc`], unless the descriptor says so already: an unchanged line stays in both caches.
    #[inline(always)]
    pub(crate) fn update_desc(&self, i: usize, desc: Desc) {
        if self.load_desc(i) != desc {
            self.store_desc(i, desc);
        }
    }

    #[inline(always)]
    fn avail(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: the callers pass an even offset below the ring's size of 6 + 2 * (mask + 1).
        unsafe { AtomicU16::from_ptr(self.avail.add(offset).cast()) }
    }

    #[inline(always)]
    fn used(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: the callers pass an even offset below the ring's size of 6 + 8 * (mask + 1).
        unsafe { AtomicU16::from_ptr(self.used.add(offset).cast()) }
    }

    #[inline(always)]
    fn element(&self, position: usize, offset: usize) -> &AtomicU32 {
        let at = USED_RING + (position & self.mask) * size_of::<wire::UsedElem>() + offset;
        // SAFETY: masked, so inside the ring of `mask + 1` elements; the callers pass the offset of a field. Elements
        // are 4-byte aligned and lie 4 bytes after the start of the ring: a 64-bit access would be misaligned.
        unsafe { AtomicU32::from_ptr(self.used.add(at).cast()) }
    }

    #[inline(always)]
    pub(crate) fn load_avail_entry(&self, position: usize) -> u16 {
        u16::from_le(self.avail(AVAIL_RING + (position & self.mask) * 2).load(Relaxed))
    }

    #[inline(always)]
    pub(crate) fn store_avail_entry(&self, position: usize, head: u16) {
        self.avail(AVAIL_RING + (position & self.mask) * 2)
            .store(head.to_le(), Relaxed);
    }

    #[inline(always)]
    pub(crate) fn load_avail_idx(&self) -> u16 {
        u16::from_le(self.avail(offset_of!(wire::AvailHead, idx)).load(Acquire))
    }

    #[inline(always)]
    pub(crate) fn store_avail_idx(&self, idx: u16) {
        self.avail(offset_of!(wire::AvailHead, idx)).store(idx.to_le(), Release);
    }

    #[inline(always)]
    pub(crate) fn load_avail_flags(&self) -> u16 {
        u16::from_le(self.avail(offset_of!(wire::AvailHead, flags)).load(Relaxed))
    }

    #[inline(always)]
    pub(crate) fn store_avail_flags(&self, flags: u16) {
        self.avail(offset_of!(wire::AvailHead, flags))
            .store(flags.to_le(), Relaxed);
    }

    #[inline(always)]
    pub(crate) fn load_used_event(&self) -> u16 {
        u16::from_le(self.avail(AVAIL_RING + (self.mask + 1) * 2).load(Relaxed))
    }

    #[inline(always)]
    pub(crate) fn store_used_event(&self, idx: u16) {
        self.avail(AVAIL_RING + (self.mask + 1) * 2).store(idx.to_le(), Relaxed);
    }

    #[inline(always)]
    pub(crate) fn load_element(&self, position: usize) -> (u32, u32) {
        (
            u32::from_le(self.element(position, offset_of!(wire::UsedElem, id)).load(Relaxed)),
            u32::from_le(self.element(position, offset_of!(wire::UsedElem, len)).load(Relaxed)),
        )
    }

    #[inline(always)]
    pub(crate) fn store_element(&self, position: usize, id: u32, len: u32) {
        self.element(position, offset_of!(wire::UsedElem, id))
            .store(id.to_le(), Relaxed);
        self.element(position, offset_of!(wire::UsedElem, len))
            .store(len.to_le(), Relaxed);
    }

    #[inline(always)]
    pub(crate) fn load_used_idx(&self) -> u16 {
        u16::from_le(self.used(offset_of!(wire::UsedHead, idx)).load(Acquire))
    }

    #[inline(always)]
    pub(crate) fn store_used_idx(&self, idx: u16) {
        self.used(offset_of!(wire::UsedHead, idx)).store(idx.to_le(), Release);
    }

    #[inline(always)]
    pub(crate) fn load_used_flags(&self) -> u16 {
        u16::from_le(self.used(offset_of!(wire::UsedHead, flags)).load(Relaxed))
    }

    #[inline(always)]
    pub(crate) fn store_used_flags(&self, flags: u16) {
        self.used(offset_of!(wire::UsedHead, flags))
            .store(flags.to_le(), Relaxed);
    }

    #[inline(always)]
    pub(crate) fn load_avail_event(&self) -> u16 {
        u16::from_le(
            self.used(USED_RING + (self.mask + 1) * size_of::<wire::UsedElem>())
                .load(Relaxed),
        )
    }

    #[inline(always)]
    pub(crate) fn store_avail_event(&self, idx: u16) {
        self.used(USED_RING + (self.mask + 1) * size_of::<wire::UsedElem>())
            .store(idx.to_le(), Relaxed);
    }

    /// The full barrier between one's own index or event and the other side's.
    #[inline(always)]
    pub(crate) fn fence(&self) {
        fence(SeqCst);
    }
}
