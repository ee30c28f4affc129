//! Relaxed accesses to raw memory: what [`super::Ring`] and indirect tables are read and written by. Under loom, which does
//! not model indirect tables, they alone.

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
