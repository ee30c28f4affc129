//! Every access to ring memory that the other side can reach.
//!
//! Nothing outside this module touches a ring byte, so that one replacement (under `cfg(loom)`, where the cells are
//! loom's atomics) lets the model checker see all of the protocol. The rules, which hold for both replacements:
//!
//! * a field is read or written as one relaxed atomic access of its native width, little-endian ([virtio 1.3] §2.7);
//!   no reference to plain data in shared memory ever exists;
//! * `idx`, and the flags of a packed descriptor, are published with Release and consumed with Acquire: that orders
//!   descriptors and ring entries;
//! * [`Ring::fence`] is sequentially consistent, and only the suppression of notifications needs it (§2.7.7, §2.7.10,
//!   §2.7.13: "the driver performs a suitable memory barrier before reading flags or avail_event");
//! * a split ring's index is masked by the queue size here, and a packed ring's position is kept below it by its
//!   [`packed::Cursor`], so that no caller can reach outside the rings.
//!
//! [virtio 1.3]: https://docs.oasis-open.org/virtio/virtio/v1.3/virtio-v1.3.html

#[cfg(not(loom))]
mod memory;
#[cfg(loom)]
mod modelled;
pub(crate) mod packed;
pub(crate) mod raw;

#[cfg(not(loom))]
pub use memory::Memory;
#[cfg(not(loom))]
pub(crate) use memory::Ring;
#[cfg(loom)]
pub use modelled::Memory;
#[cfg(loom)]
pub(crate) use modelled::Ring;

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
    pub(crate) const fn from_words([addr, meta]: [u64; 2]) -> Self {
        Self { addr, meta }
    }

    #[inline(always)]
    pub(crate) const fn words(self) -> [u64; 2] {
        [self.addr, self.meta]
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

/// The two words of a 16-byte descriptor at `ptr`, which may lie at any alignment: an indirect table is where its driver
/// put it.
///
/// # Safety
/// `ptr` is valid for reads of 16 bytes for the duration of the call.
#[inline]
pub(crate) unsafe fn load_table_entry(ptr: *const u8) -> [u64; 2] {
    // SAFETY: the caller's contract; either reads 16 bytes from `ptr`.
    unsafe {
        if (ptr as usize).is_multiple_of(8) {
            raw::load_desc(ptr.cast_mut())
        } else {
            let mut bytes = [0; size_of::<wire::Desc>()];
            raw::load_bytes(ptr, &mut bytes);
            words_of(bytes)
        }
    }
}

/// The two words that these bytes are.
pub(crate) fn words_of(bytes: [u8; 16]) -> [u64; 2] {
    let (words, _) = bytes.as_chunks();
    [0, 1].map(|word| u64::from_le_bytes(words[word]))
}

/// Some bytes of a descriptor in a table.
///
/// # Safety
/// `ptr` is valid for reads of as many bytes as `to` has for the duration of the call.
pub(crate) unsafe fn load_table_bytes(ptr: *const u8, to: &mut [u8]) {
    // SAFETY: the caller's contract.
    unsafe { raw::load_bytes(ptr, to) }
}

/// Writes one descriptor into an indirect table.
///
/// # Safety
/// `ptr` is valid for writes of 16 bytes for the duration of the call, and 8-byte aligned.
#[inline]
pub(crate) unsafe fn store_table_entry(ptr: *mut u8, words: [u64; 2]) {
    // SAFETY: the caller's contract.
    unsafe { raw::store_desc(ptr, words) }
}
