//! Copies to and from memory that the other side may write at any moment.
//!
//! Such bytes are read once: what was copied is what is used from then on. The compiler knows nothing of the other
//! process, so after each copy a barrier (an empty `asm!`, which may have changed any memory) keeps it from reading the
//! source a second time in place of the copy.

use std::arch::asm;
use std::ptr;

/// Copies `len` bytes.
///
/// Frames at the small end are the common case and a call to `memcpy` shows there: up to 64 bytes are moved inline, as
/// overlapping words.
///
/// # Safety
/// `src` is valid for reads and `dst` for writes of `len` bytes, and the two do not overlap. Either may be shared with
/// another process, neither is covered by a Rust reference.
#[inline(always)]
pub(crate) unsafe fn copy(src: *const u8, dst: *mut u8, len: usize) {
    // SAFETY: each branch reads and writes only bytes 0..len of either side: the second word of a pair begins at
    // len - word, which is not negative in that branch, and ends at len.
    unsafe {
        if len > 64 {
            ptr::copy_nonoverlapping(src, dst, len);
        } else if len >= 32 {
            // One by one, each in a register: an array of two would go by way of the stack.
            let a = src.cast::<u128>().read_unaligned();
            let b = src.add(16).cast::<u128>().read_unaligned();
            let c = src.add(len - 32).cast::<u128>().read_unaligned();
            let d = src.add(len - 16).cast::<u128>().read_unaligned();
            dst.cast::<u128>().write_unaligned(a);
            dst.add(16).cast::<u128>().write_unaligned(b);
            dst.add(len - 32).cast::<u128>().write_unaligned(c);
            dst.add(len - 16).cast::<u128>().write_unaligned(d);
        } else if len >= 16 {
            let a = src.cast::<u128>().read_unaligned();
            let b = src.add(len - 16).cast::<u128>().read_unaligned();
            dst.cast::<u128>().write_unaligned(a);
            dst.add(len - 16).cast::<u128>().write_unaligned(b);
        } else if len >= 8 {
            let a = src.cast::<u64>().read_unaligned();
            let b = src.add(len - 8).cast::<u64>().read_unaligned();
            dst.cast::<u64>().write_unaligned(a);
            dst.add(len - 8).cast::<u64>().write_unaligned(b);
        } else {
            for i in 0..len {
                dst.add(i).write(src.add(i).read());
            }
        }
    }
    barrier();
}

/// Forgets what the compiler believes of memory. No instruction.
#[inline(always)]
pub(crate) fn barrier() {
    // SAFETY: an empty template; its only effect is on the compiler, which must assume that memory changed.
    unsafe { asm!("", options(nostack, preserves_flags)) }
}

/// Asks for a line of the first-level cache, for reading.
#[inline(always)]
pub(crate) fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch is a hint: it does not fault, whatever the address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast())
    };
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Asks for a line of the first-level cache, for writing.
#[inline(always)]
pub(crate) fn prefetch_write(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: prefetchw is a hint: it does not fault, whatever the address, and does nothing on a CPU without it.
    unsafe {
        asm!("prefetchw [{}]", in(reg) address as usize, options(nomem, nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_length_copies_exactly_its_bytes() {
        let src: Vec<u8> = (0..300u32).map(|i| (i * 7 + 1) as u8).collect();
        for len in 0..=200 {
            for offset in [0, 1, 12] {
                let mut dst = [0xEEu8; 300];
                // SAFETY: both sides are longer than offset + len, and distinct.
                unsafe { super::copy(src.as_ptr().add(offset), dst.as_mut_ptr().add(offset), len) };
                assert_eq!(dst[offset..offset + len], src[offset..offset + len]);
                assert!(
                    dst[..offset].iter().chain(&dst[offset + len..]).all(|&b| b == 0xEE),
                    "{len} at {offset}"
                );
            }
        }
    }
}
