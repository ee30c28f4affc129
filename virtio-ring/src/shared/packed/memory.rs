//! The packed ring in raw memory.

use super::{Cursor, DESC_F_AVAIL, DESC_F_USED, Desc, Event, Meta, check_size, wire};
use crate::Error;
use crate::shared::raw;
use core::cell::UnsafeCell;
use core::ptr::NonNull;
use core::sync::atomic::{
    AtomicU32,
    Ordering::{Relaxed, SeqCst},
    fence,
};
use static_assertions::const_assert_eq;

/// Where the three parts of a packed ring lie in this process. The parts may be anywhere; [`Layout`] gives the sizes and
/// one good arrangement.
///
/// [`Layout`]: crate::packed::Layout
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// The descriptor ring: 16 bytes a descriptor, aligned to 16 (§2.8).
    pub desc: NonNull<u8>,
    /// The driver's event suppression structure: 4 bytes, aligned to 4 (§2.8).
    pub driver: NonNull<u8>,
    /// The device's: 4 bytes, aligned to 4 (§2.8).
    pub device: NonNull<u8>,
}

// SAFETY: three addresses. Nothing can be done with them but through the `unsafe` constructors of the rings, whose
// contract covers use from whatever thread the ring is on.
unsafe impl Send for Memory {}
// SAFETY: as above; a shared reference gives out the addresses only.
unsafe impl Sync for Memory {}

impl Memory {
    /// Whether no device has completed a buffer yet: each descriptor is as it was made, all zero, or available for the
    /// first time.
    ///
    /// # Safety
    /// `desc` is valid for reads of [`Layout::desc_len`](crate::packed::Layout::desc_len) bytes for `size`.
    pub(crate) unsafe fn is_unused(&self, size: u16) -> bool {
        (0..usize::from(size)).all(|at| {
            let mut bytes = [0; 16];
            // SAFETY: in bounds by this function's contract.
            unsafe { raw::load_bytes(self.desc.as_ptr().add(16 * at), &mut bytes) };
            let flags = u16::from_le_bytes([bytes[14], bytes[15]]);
            bytes == [0; 16] || flags & (DESC_F_AVAIL | DESC_F_USED) == DESC_F_AVAIL
        })
    }
}

/// The ring of one queue. Invariant, from the contract of [`Ring::new`]: the three parts are valid for reads and writes
/// of their full sizes and aligned as long as this value is used, and `size` is the queue size. Cursors given to it were
/// made for this size.
#[derive(Clone, Debug)]
pub(crate) struct Ring {
    desc: *mut u8,
    driver: *mut u8,
    device: *mut u8,
    size: u16,
}

// SAFETY: `Ring` is the only path of this process side to the ring, and every access is atomic.
unsafe impl Send for Ring {}
// SAFETY: every access is atomic.
unsafe impl Sync for Ring {}

/// One descriptor of a ring. A reference to it is to memory of a [`Ring`] that is in use.
#[repr(C, align(16))]
pub(crate) struct Place(UnsafeCell<[u8; size_of::<wire::Desc>()]>);

const_assert_eq!(size_of::<Place>(), size_of::<wire::Desc>());

impl Place {
    /// The word with the state: what was written before it is seen.
    #[inline(always)]
    pub(crate) fn load_meta(&self) -> Meta {
        // SAFETY: inside the ring and aligned to 8.
        Meta(unsafe { raw::load_flags(self.0.get().cast::<u8>().add(META)) })
    }

    /// The same word, where its state was seen before.
    #[inline(always)]
    pub(crate) fn load_meta_again(&self) -> Meta {
        // SAFETY: inside the ring and aligned to 8.
        Meta(unsafe { raw::load64(self.0.get().cast::<u8>().add(META)) })
    }

    /// A descriptor behind one that is published later.
    #[inline(always)]
    pub(crate) fn store(&self, desc: Desc) {
        // SAFETY: inside the ring and aligned to 8.
        unsafe { raw::store_desc(self.0.get().cast(), [desc.addr, desc.meta.0]) }
    }
}

/// Where a descriptor's second word is.
const META: usize = core::mem::offset_of!(wire::Desc, len);

impl Ring {
    /// # Safety
    /// The parts of `memory` are valid for reads and writes of their sizes for `size`, and nobody accesses them
    /// other than atomically or from another process or machine, for as long as the value or a clone of it lives.
    pub(crate) unsafe fn new(memory: Memory, size: u16) -> Result<Self, Error> {
        let size = check_size(size)?;
        let misaligned = [
            (memory.desc, core::mem::align_of::<wire::Desc>()),
            (memory.driver, core::mem::align_of::<wire::Event>()),
            (memory.device, core::mem::align_of::<wire::Event>()),
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
            driver: memory.driver.as_ptr(),
            device: memory.device.as_ptr(),
            size,
        })
    }

    #[inline(always)]
    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    #[inline(always)]
    fn at(&self, cursor: Cursor) -> *mut u8 {
        debug_assert!(cursor.position() < usize::from(self.size));
        // SAFETY: below the size, by the cursor's invariant: inside the ring.
        unsafe { self.desc.add(cursor.position() * size_of::<wire::Desc>()) }
    }

    /// Where the descriptors from `cursor` on are, for `n` of them, at most up to the end of the lap. For `vectors` alone,
    /// which keeps to the rules of this module.
    #[inline(always)]
    pub(crate) fn run(&self, cursor: Cursor, n: usize) -> (*mut u8, usize) {
        (self.at(cursor), n.min(usize::from(self.size) - cursor.position()))
    }

    /// The descriptors from `cursor` on, `n` of them at most, none beyond the end of the lap.
    #[inline(always)]
    pub(crate) fn span(&self, cursor: Cursor, n: usize) -> &[Place] {
        let (first, n) = self.run(cursor, n);
        // SAFETY: `n` descriptors inside the ring, aligned; a Place may change behind a reference to it.
        unsafe { core::slice::from_raw_parts(first.cast(), n) }
    }

    /// The word with the state: what was written before it is seen.
    #[inline(always)]
    pub(crate) fn load_meta(&self, cursor: Cursor) -> Meta {
        // SAFETY: inside the ring and aligned to 8.
        Meta(unsafe { raw::load_flags(self.at(cursor).add(META)) })
    }

    #[inline(always)]
    pub(crate) fn load_addr(&self, cursor: Cursor) -> u64 {
        // SAFETY: inside the ring and aligned to 8.
        unsafe { raw::load64(self.at(cursor)) }
    }

    /// The address alone.
    #[inline(always)]
    pub(crate) fn store_addr(&self, cursor: Cursor, addr: u64) {
        // SAFETY: inside the ring and aligned to 8.
        unsafe { raw::store64(self.at(cursor), addr) }
    }

    /// A descriptor behind one that is published later.
    #[inline(always)]
    pub(crate) fn store(&self, cursor: Cursor, desc: Desc) {
        // SAFETY: inside the ring and aligned to 8.
        unsafe { raw::store_desc(self.at(cursor), [desc.addr, desc.meta.0]) }
    }

    /// The second word of a descriptor behind one that is published later.
    #[inline(always)]
    pub(crate) fn store_meta(&self, cursor: Cursor, meta: Meta) {
        // SAFETY: inside the ring and aligned to 8.
        unsafe { raw::store64(self.at(cursor).add(META), meta.0) }
    }

    /// Publishes a descriptor, and with it those that were stored before.
    #[inline(always)]
    pub(crate) fn publish(&self, cursor: Cursor, meta: Meta) {
        // SAFETY: inside the ring and aligned to 8.
        unsafe { raw::store_flags(self.at(cursor).add(META), meta.0) }
    }

    /// What the driver wishes (the device's calls).
    #[inline(always)]
    pub(crate) fn load_driver_event(&self) -> Event {
        // SAFETY: valid for 4 bytes and aligned, by the type's invariant.
        Event::from_word(u32::from_le(
            unsafe { AtomicU32::from_ptr(self.driver.cast()) }.load(Relaxed),
        ))
    }

    #[inline(always)]
    pub(crate) fn store_driver_event(&self, event: Event) {
        // SAFETY: valid for 4 bytes and aligned, by the type's invariant.
        unsafe { AtomicU32::from_ptr(self.driver.cast()) }.store(event.word().to_le(), Relaxed);
    }

    /// What the device wishes (the driver's kicks).
    #[inline(always)]
    pub(crate) fn load_device_event(&self) -> Event {
        // SAFETY: valid for 4 bytes and aligned, by the type's invariant.
        Event::from_word(u32::from_le(
            unsafe { AtomicU32::from_ptr(self.device.cast()) }.load(Relaxed),
        ))
    }

    #[inline(always)]
    pub(crate) fn store_device_event(&self, event: Event) {
        // SAFETY: valid for 4 bytes and aligned, by the type's invariant.
        unsafe { AtomicU32::from_ptr(self.device.cast()) }.store(event.word().to_le(), Relaxed);
    }

    /// The full barrier between one's own flags or event and the other side's.
    #[inline(always)]
    pub(crate) fn fence(&self) {
        fence(SeqCst);
    }
}
