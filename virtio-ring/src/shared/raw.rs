//! Atomic accesses to raw memory: what the rings and indirect tables are read and written by. A descriptor of either
//! ring format is two words of 64 bits here. Under loom, which does not model indirect tables, they alone.

#[cfg(not(target_has_atomic = "64"))]
use core::sync::atomic::AtomicU32;
#[cfg(target_has_atomic = "64")]
use core::sync::atomic::AtomicU64;
#[cfg(not(loom))]
use core::sync::atomic::Ordering::{Acquire, Release};
use core::sync::atomic::{AtomicU8, Ordering::Relaxed};

/// # Safety
/// `ptr` is valid for 16 bytes of reads and 8-byte aligned.
#[inline(always)]
pub(super) unsafe fn load_desc(ptr: *mut u8) -> [u64; 2] {
    // SAFETY: in bounds and aligned by this function's contract; all accesses to ring memory are atomic.
    unsafe { [load64(ptr), load64(ptr.add(8))] }
}

/// # Safety
/// `ptr` is valid for 16 bytes of writes and 8-byte aligned.
#[inline(always)]
pub(super) unsafe fn store_desc(ptr: *mut u8, [addr, meta]: [u64; 2]) {
    // SAFETY: in bounds and aligned by this function's contract; all accesses to ring memory are atomic.
    unsafe {
        store64(ptr, addr);
        store64(ptr.add(8), meta);
    }
}

/// # Safety
/// `ptr` is valid for reads of as many bytes as `to` has.
pub(super) unsafe fn load_bytes(ptr: *const u8, to: &mut [u8]) {
    for (i, byte) in to.iter_mut().enumerate() {
        // SAFETY: in bounds by this function's contract; a byte is always aligned.
        *byte = unsafe { AtomicU8::from_ptr(ptr.add(i).cast_mut()) }.load(Relaxed);
    }
}

/// # Safety
/// `ptr` is valid for 8 bytes of reads and 8-byte aligned.
#[cfg(target_has_atomic = "64")]
#[inline(always)]
pub(super) unsafe fn load64(ptr: *mut u8) -> u64 {
    // SAFETY: valid for 8 bytes and aligned, by the contract of the callers.
    u64::from_le(unsafe { AtomicU64::from_ptr(ptr.cast()) }.load(Relaxed))
}

/// The word that holds a packed descriptor's flags: what was stored before it is seen by whoever sees it.
///
/// # Safety
/// `ptr` is valid for 8 bytes of reads and 8-byte aligned.
#[cfg(all(target_has_atomic = "64", not(loom)))]
#[inline(always)]
pub(super) unsafe fn load_flags(ptr: *mut u8) -> u64 {
    // SAFETY: valid for 8 bytes and aligned, by the contract of this function.
    u64::from_le(unsafe { AtomicU64::from_ptr(ptr.cast()) }.load(Acquire))
}

/// The counterpart of [`load_flags`].
///
/// # Safety
/// `ptr` is valid for 8 bytes of writes and 8-byte aligned.
#[cfg(all(target_has_atomic = "64", not(loom)))]
#[inline(always)]
pub(super) unsafe fn store_flags(ptr: *mut u8, value: u64) {
    #[cfg(test)]
    journal::note(ptr, value);
    // SAFETY: valid for 8 bytes and aligned, by the contract of this function.
    unsafe { AtomicU64::from_ptr(ptr.cast()) }.store(value.to_le(), Release);
}

/// The half with the flags first: the length is then what belongs to them.
///
/// # Safety
/// `ptr` is valid for 8 bytes of reads and 8-byte aligned.
#[cfg(all(not(target_has_atomic = "64"), not(loom)))]
#[inline(always)]
pub(super) unsafe fn load_flags(ptr: *mut u8) -> u64 {
    // SAFETY: valid for 8 bytes and aligned, by the contract of this function.
    let (low, high) = unsafe { (AtomicU32::from_ptr(ptr.cast()), AtomicU32::from_ptr(ptr.add(4).cast())) };
    let high = u64::from(u32::from_le(high.load(Acquire)));
    u64::from(u32::from_le(low.load(Relaxed))) | high << 32
}

/// The half with the flags last.
///
/// # Safety
/// `ptr` is valid for 8 bytes of writes and 8-byte aligned.
#[cfg(all(not(target_has_atomic = "64"), not(loom)))]
#[inline(always)]
pub(super) unsafe fn store_flags(ptr: *mut u8, value: u64) {
    // SAFETY: valid for 8 bytes and aligned, by the contract of this function.
    let (low, high) = unsafe { (AtomicU32::from_ptr(ptr.cast()), AtomicU32::from_ptr(ptr.add(4).cast())) };
    low.store((value as u32).to_le(), Relaxed);
    high.store(((value >> 32) as u32).to_le(), Release);
}

/// # Safety
/// `ptr` is valid for 8 bytes of writes and 8-byte aligned.
#[cfg(target_has_atomic = "64")]
#[inline(always)]
pub(super) unsafe fn store64(ptr: *mut u8, value: u64) {
    #[cfg(test)]
    journal::note(ptr, value);
    // SAFETY: valid for 8 bytes and aligned, by the contract of the callers.
    unsafe { AtomicU64::from_ptr(ptr.cast()) }.store(value.to_le(), Relaxed);
}

/// Two halves where the target has no 64-bit atomics. A descriptor's owner alone writes it before it is published,
/// so tearing needs a hostile peer, whose values are checked whatever they are.
///
/// # Safety
/// `ptr` is valid for 8 bytes of reads and 8-byte aligned.
#[cfg(not(target_has_atomic = "64"))]
#[inline(always)]
pub(super) unsafe fn load64(ptr: *mut u8) -> u64 {
    // SAFETY: valid for 8 bytes and aligned, by the contract of the callers.
    let (low, high) = unsafe { (AtomicU32::from_ptr(ptr.cast()), AtomicU32::from_ptr(ptr.add(4).cast())) };
    u64::from(u32::from_le(low.load(Relaxed))) | u64::from(u32::from_le(high.load(Relaxed))) << 32
}

/// # Safety
/// `ptr` is valid for 8 bytes of writes and 8-byte aligned.
#[cfg(not(target_has_atomic = "64"))]
#[inline(always)]
pub(super) unsafe fn store64(ptr: *mut u8, value: u64) {
    // SAFETY: valid for 8 bytes and aligned, by the contract of the callers.
    let (low, high) = unsafe { (AtomicU32::from_ptr(ptr.cast()), AtomicU32::from_ptr(ptr.add(4).cast())) };
    low.store((value as u32).to_le(), Relaxed);
    high.store(((value >> 32) as u32).to_le(), Relaxed);
}

/// The stores of 64 bits that this thread makes, for tests that stop between two of them.
#[cfg(test)]
pub(crate) mod journal {
    extern crate std;
    use std::cell::RefCell;
    use std::vec::Vec;

    std::thread_local! {
        static STORES: RefCell<Option<Vec<(*mut u8, u64)>>> = const { RefCell::new(None) };
    }

    pub(super) fn note(ptr: *mut u8, value: u64) {
        STORES.with_borrow_mut(|stores| {
            if let Some(stores) = stores {
                stores.push((ptr, value));
            }
        });
    }

    /// What `f` stores, in this order.
    pub(crate) fn of(f: impl FnOnce()) -> Vec<(*mut u8, u64)> {
        STORES.set(Some(Vec::new()));
        f();
        STORES.take().unwrap_or_default()
    }
}
