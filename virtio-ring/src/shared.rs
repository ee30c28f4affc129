//! Every access to ring memory that the other side can reach.
//!
//! Nothing outside this module touches a ring byte, so that one replacement (under `cfg(loom)`, where the cells are
//! loom's atomics) lets the model checker see all of the protocol. The rules, which hold for both replacements:
//!
//! * a field is read or written as one relaxed atomic access of its native width, little-endian ([virtio 1.3] §2.7);
//!   no reference to plain data in shared memory ever exists;
//! * `idx` is published with Release and consumed with Acquire: that orders descriptors and ring entries;
//! * [`Ring::fence`] is sequentially consistent, and only the suppression of notifications needs it (§2.7.7, §2.7.10,
//!   §2.7.13: "the driver performs a suitable memory barrier before reading flags or avail_event");
//! * an index is masked by the queue size here, so that no caller can reach outside the rings.
//!
//! [virtio 1.3]: https://docs.oasis-open.org/virtio/virtio/v1.3/virtio-v1.3.html

use crate::Error;

/// `VIRTQ_DESC_F_NEXT` (§2.7.5): the chain goes on at `next`.
pub(crate) const DESC_F_NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE` (§2.7.5): device-writable (else device-readable).
pub(crate) const DESC_F_WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT` (§2.7.5): the buffer holds a table of descriptors.
pub(crate) const DESC_F_INDIRECT: u16 = 4;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (§2.7.6): the driver asks for no used-buffer notification.
pub(crate) const AVAIL_F_NO_INTERRUPT: u16 = 1;
/// `VIRTQ_USED_F_NO_NOTIFY` (§2.7.8): the device asks for no available-buffer notification.
pub(crate) const USED_F_NO_NOTIFY: u16 = 1;

/// One descriptor by value: `addr`, and `len | flags << 32 | next << 48` as it lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Desc {
    pub(crate) addr: u64,
    meta: u64,
}

impl Desc {
    #[inline(always)]
    pub(crate) const fn new(addr: u64, len: u32, flags: u16, next: u16) -> Self {
        Self {
            addr,
            meta: len as u64 | (flags as u64) << 32 | (next as u64) << 48,
        }
    }

    #[inline(always)]
    pub(crate) const fn len(self) -> u32 {
        self.meta as u32
    }

    #[inline(always)]
    pub(crate) const fn flags(self) -> u16 {
        (self.meta >> 32) as u16
    }

    #[inline(always)]
    pub(crate) const fn next(self) -> u16 {
        (self.meta >> 48) as u16
    }
}

/// The three parts as they lie in memory (§2.7.5, §2.7.6, §2.7.8). Never instantiated: sizes and offsets only.
pub(crate) mod wire {
    use core::mem::{align_of, offset_of, size_of};
    use static_assertions::const_assert_eq;

    /// `struct virtq_desc`.
    #[repr(C, align(16))]
    pub(crate) struct Desc {
        pub(crate) addr: u64,
        pub(crate) len: u32,
        pub(crate) flags: u16,
        pub(crate) next: u16,
    }

    /// `struct virtq_avail` up to its ring.
    #[repr(C)]
    pub(crate) struct AvailHead {
        pub(crate) flags: u16,
        pub(crate) idx: u16,
        pub(crate) ring: [u16; 0],
    }

    /// `struct virtq_used` up to its ring.
    #[repr(C)]
    pub(crate) struct UsedHead {
        pub(crate) flags: u16,
        pub(crate) idx: u16,
        pub(crate) ring: [UsedElem; 0],
    }

    /// `struct virtq_used_elem`.
    #[repr(C)]
    pub(crate) struct UsedElem {
        pub(crate) id: u32,
        pub(crate) len: u32,
    }

    const_assert_eq!(size_of::<Desc>(), 16);
    const_assert_eq!(align_of::<Desc>(), 16);
    const_assert_eq!(offset_of!(Desc, addr), 0);
    const_assert_eq!(offset_of!(Desc, len), 8);
    const_assert_eq!(offset_of!(Desc, flags), 12);
    const_assert_eq!(offset_of!(Desc, next), 14);
    const_assert_eq!(size_of::<AvailHead>(), 4);
    const_assert_eq!(align_of::<AvailHead>(), 2);
    const_assert_eq!(offset_of!(AvailHead, idx), 2);
    const_assert_eq!(offset_of!(AvailHead, ring), 4);
    const_assert_eq!(size_of::<UsedHead>(), 4);
    const_assert_eq!(align_of::<UsedHead>(), 4);
    const_assert_eq!(offset_of!(UsedHead, idx), 2);
    const_assert_eq!(offset_of!(UsedHead, ring), 4);
    const_assert_eq!(size_of::<UsedElem>(), 8);
    const_assert_eq!(align_of::<UsedElem>(), 4);
    const_assert_eq!(offset_of!(UsedElem, id), 0);
    const_assert_eq!(offset_of!(UsedElem, len), 4);
}

/// Checks what §2.7 asks of a queue size and returns it: a power of two, 2 to 32768.
pub(crate) const fn check_size(size: u16) -> Result<u16, Error> {
    // A queue of one entry is legal in the specification, but a chain of two descriptors would never fit.
    if size >= 2 && size.is_power_of_two() {
        Ok(size)
    } else {
        Err(Error::QueueSize(size))
    }
}

/// One 16-byte descriptor at `ptr`, which may lie at any alignment: an indirect table is where its driver put it.
///
/// # Safety
/// `ptr` is valid for reads of 16 bytes for the duration of the call.
#[inline]
pub(crate) unsafe fn load_table_entry(ptr: *const u8) -> Desc {
    // SAFETY: the caller's contract; `aligned` and `bytewise` read 16 bytes from `ptr`.
    unsafe {
        if (ptr as usize).is_multiple_of(8) {
            raw::load_desc(ptr.cast_mut())
        } else {
            raw::load_bytewise(ptr)
        }
    }
}

/// Writes one descriptor into an indirect table.
///
/// # Safety
/// `ptr` is valid for writes of 16 bytes for the duration of the call, and 8-byte aligned.
#[inline]
pub(crate) unsafe fn store_table_entry(ptr: *mut u8, desc: Desc) {
    // SAFETY: the caller's contract.
    unsafe { raw::store_desc(ptr, desc) }
}

/// Relaxed accesses to raw memory. Also what indirect tables use under loom, which does not model them.
mod raw {
    use super::Desc;
    #[cfg(not(target_has_atomic = "64"))]
    use core::sync::atomic::AtomicU32;
    #[cfg(target_has_atomic = "64")]
    use core::sync::atomic::AtomicU64;
    use core::sync::atomic::{AtomicU8, Ordering::Relaxed};

    /// # Safety
    /// `ptr` is valid for 16 bytes of reads and 8-byte aligned.
    #[inline(always)]
    pub(super) unsafe fn load_desc(ptr: *mut u8) -> Desc {
        // SAFETY: in bounds and aligned by this function's contract; all accesses to ring memory are atomic.
        unsafe {
            Desc {
                addr: load64(ptr),
                meta: load64(ptr.add(8)),
            }
        }
    }

    /// # Safety
    /// `ptr` is valid for 16 bytes of writes and 8-byte aligned.
    #[inline(always)]
    pub(super) unsafe fn store_desc(ptr: *mut u8, desc: Desc) {
        // SAFETY: in bounds and aligned by this function's contract; all accesses to ring memory are atomic.
        unsafe {
            store64(ptr, desc.addr);
            store64(ptr.add(8), desc.meta);
        }
    }

    /// # Safety
    /// `ptr` is valid for 16 bytes of reads.
    #[cold]
    pub(super) unsafe fn load_bytewise(ptr: *const u8) -> Desc {
        let mut bytes = [0u8; 16];
        for (i, byte) in bytes.iter_mut().enumerate() {
            // SAFETY: `i` < 16, in bounds by this function's contract; a byte is always aligned.
            *byte = unsafe { AtomicU8::from_ptr(ptr.add(i).cast_mut()) }.load(Relaxed);
        }
        let [addr, meta] = [0, 8].map(|at| {
            let mut word = [0u8; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        });
        Desc { addr, meta }
    }

    #[cfg(target_has_atomic = "64")]
    #[inline(always)]
    unsafe fn load64(ptr: *mut u8) -> u64 {
        // SAFETY: valid for 8 bytes and aligned, by the contract of the callers.
        u64::from_le(unsafe { AtomicU64::from_ptr(ptr.cast()) }.load(Relaxed))
    }

    #[cfg(target_has_atomic = "64")]
    #[inline(always)]
    unsafe fn store64(ptr: *mut u8, value: u64) {
        // SAFETY: valid for 8 bytes and aligned, by the contract of the callers.
        unsafe { AtomicU64::from_ptr(ptr.cast()) }.store(value.to_le(), Relaxed);
    }

    // Two halves where the target has no 64-bit atomics. A descriptor's owner alone writes it before it is published,
    // so tearing needs a hostile peer, whose values are checked whatever they are.
    #[cfg(not(target_has_atomic = "64"))]
    #[inline(always)]
    unsafe fn load64(ptr: *mut u8) -> u64 {
        // SAFETY: valid for 8 bytes and aligned, by the contract of the callers.
        let (low, high) = unsafe { (AtomicU32::from_ptr(ptr.cast()), AtomicU32::from_ptr(ptr.add(4).cast())) };
        u64::from(u32::from_le(low.load(Relaxed))) | u64::from(u32::from_le(high.load(Relaxed))) << 32
    }

    #[cfg(not(target_has_atomic = "64"))]
    #[inline(always)]
    unsafe fn store64(ptr: *mut u8, value: u64) {
        // SAFETY: valid for 8 bytes and aligned, by the contract of the callers.
        let (low, high) = unsafe { (AtomicU32::from_ptr(ptr.cast()), AtomicU32::from_ptr(ptr.add(4).cast())) };
        low.store((value as u32).to_le(), Relaxed);
        high.store(((value >> 32) as u32).to_le(), Relaxed);
    }
}

#[cfg(not(loom))]
pub use memory::Memory;
#[cfg(not(loom))]
pub(crate) use memory::Ring;

#[cfg(not(loom))]
mod memory {
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
            unsafe { raw::load_desc(self.desc.add((i & self.mask) * size_of::<wire::Desc>())) }
        }

        #[inline(always)]
        pub(crate) fn store_desc(&self, i: usize, desc: Desc) {
            // SAFETY: masked, so inside the table of `mask + 1` descriptors; aligned as the table is.
            unsafe { raw::store_desc(self.desc.add((i & self.mask) * size_of::<wire::Desc>()), desc) }
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
}

#[cfg(loom)]
pub use modelled::Memory;
#[cfg(loom)]
pub(crate) use modelled::Ring;

/// The same rings made of loom's cells. Values are kept in native order: a model has one byte order.
#[cfg(loom)]
mod modelled {
    use super::{Desc, check_size};
    use crate::Error;
    use loom::sync::Arc;
    use loom::sync::atomic::{
        AtomicU16, AtomicU32, AtomicU64,
        Ordering::{Acquire, Relaxed, Release, SeqCst},
        fence,
    };
    extern crate std;
    use std::vec::Vec;

    struct Cells {
        desc: Vec<[AtomicU64; 2]>,
        avail_flags: AtomicU16,
        avail_idx: AtomicU16,
        avail_ring: Vec<AtomicU16>,
        used_event: AtomicU16,
        used_flags: AtomicU16,
        used_idx: AtomicU16,
        used_ring: Vec<[AtomicU32; 2]>,
        avail_event: AtomicU16,
    }

    /// The rings of one queue, in loom's memory.
    #[derive(Clone)]
    pub struct Memory(Arc<Cells>);

    impl core::fmt::Debug for Memory {
        fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
            f.write_str("Memory(loom)")
        }
    }

    impl Memory {
        /// Zeroed rings for `size` entries.
        pub fn new(size: u16) -> Self {
            Self(Arc::new(Cells {
                desc: (0..size).map(|_| [AtomicU64::new(0), AtomicU64::new(0)]).collect(),
                avail_flags: AtomicU16::new(0),
                avail_idx: AtomicU16::new(0),
                avail_ring: (0..size).map(|_| AtomicU16::new(0)).collect(),
                used_event: AtomicU16::new(0),
                used_flags: AtomicU16::new(0),
                used_idx: AtomicU16::new(0),
                used_ring: (0..size).map(|_| [AtomicU32::new(0), AtomicU32::new(0)]).collect(),
                avail_event: AtomicU16::new(0),
            }))
        }
    }

    #[derive(Clone)]
    pub(crate) struct Ring {
        cells: Arc<Cells>,
        mask: usize,
    }

    impl core::fmt::Debug for Ring {
        fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
            f.write_str("Ring(loom)")
        }
    }

    impl Ring {
        pub(crate) unsafe fn new(memory: Memory, size: u16) -> Result<Self, Error> {
            let size = check_size(size)?;
            Ok(Self {
                cells: memory.0,
                mask: usize::from(size) - 1,
            })
        }
        pub(crate) fn mask(&self) -> usize {
            self.mask
        }
        fn at(&self, i: usize) -> usize {
            i & self.mask
        }
        pub(crate) fn load_desc(&self, i: usize) -> Desc {
            let cell = &self.cells.desc[self.at(i)];
            Desc {
                addr: cell[0].load(Relaxed),
                meta: cell[1].load(Relaxed),
            }
        }
        pub(crate) fn store_desc(&self, i: usize, desc: Desc) {
            let cell = &self.cells.desc[self.at(i)];
            cell[0].store(desc.addr, Relaxed);
            cell[1].store(desc.meta, Relaxed);
        }
        pub(crate) fn load_avail_entry(&self, position: usize) -> u16 {
            self.cells.avail_ring[self.at(position)].load(Relaxed)
        }
        pub(crate) fn store_avail_entry(&self, position: usize, head: u16) {
            self.cells.avail_ring[self.at(position)].store(head, Relaxed);
        }
        pub(crate) fn load_avail_idx(&self) -> u16 {
            self.cells.avail_idx.load(Acquire)
        }
        pub(crate) fn store_avail_idx(&self, idx: u16) {
            self.cells.avail_idx.store(idx, Release);
        }
        pub(crate) fn load_avail_flags(&self) -> u16 {
            self.cells.avail_flags.load(Relaxed)
        }
        pub(crate) fn store_avail_flags(&self, flags: u16) {
            self.cells.avail_flags.store(flags, Relaxed);
        }
        pub(crate) fn load_used_event(&self) -> u16 {
            self.cells.used_event.load(Relaxed)
        }
        pub(crate) fn store_used_event(&self, idx: u16) {
            self.cells.used_event.store(idx, Relaxed);
        }
        pub(crate) fn load_element(&self, position: usize) -> (u32, u32) {
            let cell = &self.cells.used_ring[self.at(position)];
            (cell[0].load(Relaxed), cell[1].load(Relaxed))
        }
        pub(crate) fn store_element(&self, position: usize, id: u32, len: u32) {
            let cell = &self.cells.used_ring[self.at(position)];
            cell[0].store(id, Relaxed);
            cell[1].store(len, Relaxed);
        }
        pub(crate) fn load_used_idx(&self) -> u16 {
            self.cells.used_idx.load(Acquire)
        }
        pub(crate) fn store_used_idx(&self, idx: u16) {
            self.cells.used_idx.store(idx, Release);
        }
        pub(crate) fn load_used_flags(&self) -> u16 {
            self.cells.used_flags.load(Relaxed)
        }
        pub(crate) fn store_used_flags(&self, flags: u16) {
            self.cells.used_flags.store(flags, Relaxed);
        }
        pub(crate) fn load_avail_event(&self) -> u16 {
            self.cells.avail_event.load(Relaxed)
        }
        pub(crate) fn store_avail_event(&self, idx: u16) {
            self.cells.avail_event.store(idx, Relaxed);
        }
        pub(crate) fn fence(&self) {
            fence(SeqCst);
        }
    }
}
