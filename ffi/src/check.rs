//! What C hands in, checked as far as that can be.

use std::ffi::c_char;

use crate::status::{Fault, Outcome, Status};

/// Bytes of a text, at the most.
const TEXT: usize = 4096;

/// Refuses null and misaligned pointers.
#[inline(always)]
pub(crate) fn pointer<T>(pointer: *const T, what: &'static str) -> Outcome<()> {
    if pointer.is_null() || !pointer.is_aligned() {
        Err(Fault::new(
            Status::Pointer,
            format_args!("{what}: the pointer is {pointer:p}"),
        ))
    } else {
        Ok(())
    }
}

/// A count of bytes as the caller's memory can have it.
pub(crate) fn length(len: usize, what: &'static str) -> Outcome<usize> {
    if len > i32::MAX as usize {
        Err(Fault::new(Status::Argument, format_args!("{what}: {len} bytes")))
    } else {
        Ok(len)
    }
}

/// A text of at most 4095 bytes of UTF-8.
///
/// # Safety
/// The pointer, if it is not null, leads to a text that ends, or to 4096 readable bytes.
pub(crate) unsafe fn text<'a>(text: *const c_char, what: &'static str) -> Outcome<&'a str> {
    pointer(text, what)?;
    // SAFETY: read byte by byte, up to the NUL or the limit.
    let len = (0..TEXT)
        .find(|&at| unsafe { *text.add(at) } == 0)
        .ok_or_else(|| Fault::new(Status::Argument, format_args!("{what}: no end within {TEXT} bytes")))?;
    // SAFETY: so many bytes were just read.
    let bytes = unsafe { std::slice::from_raw_parts(text.cast::<u8>(), len) };
    std::str::from_utf8(bytes).map_err(|error| Fault::new(Status::Argument, format_args!("{what}: {error}")))
}

/// Writes a struct that may have grown since the caller was compiled: as much of it as the caller knows; what the caller
/// knows beyond it becomes zeroes.
///
/// # Safety
/// `out`, if it is not null, has `size` bytes that can be written. `T` is plain numbers without padding.
pub(crate) unsafe fn put<T: Copy>(value: T, out: *mut T, size: usize, what: &'static str) -> Outcome<()> {
    pointer(out, what)?;
    if size == 0 || size > 4096 {
        return Err(Fault::new(
            Status::Argument,
            format_args!("{what}: sizeof gives {size}, here it is {}", size_of::<T>()),
        ));
    }
    let known = size.min(size_of::<T>());
    // SAFETY: `size` bytes can be written, by the caller; `known` are no more than the value has.
    unsafe {
        std::ptr::copy_nonoverlapping((&raw const value).cast::<u8>(), out.cast::<u8>(), known);
        out.cast::<u8>().add(known).write_bytes(0, size - known);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_end_or_are_refused() {
        let long = vec![b'a' as c_char; TEXT];
        // SAFETY: texts with an end, or of 4096 bytes.
        unsafe {
            assert!(matches!(text(c"abc".as_ptr(), "t"), Ok("abc")));
            assert_eq!(text(long.as_ptr(), "t").err().unwrap().status(), Status::Argument);
            assert_eq!(text(c"\xff".as_ptr(), "t").err().unwrap().status(), Status::Argument);
            assert_eq!(text(std::ptr::null(), "t").err().unwrap().status(), Status::Pointer);
        }
    }

    #[test]
    fn structs_of_other_sizes_are_filled_as_far_as_they_go() {
        let mut out = [0xEE_u64; 4];
        let at = out.as_mut_ptr().cast::<[u64; 2]>();
        // SAFETY: 32 bytes are there.
        unsafe {
            assert!(put([1, 2], at, 8, "s").is_ok());
            assert_eq!(out[..2], [1, 0xEE]);
            assert!(put([1, 2], at, 24, "s").is_ok());
            assert_eq!(out, [1, 2, 0, 0xEE]);
            assert!(put([1, 2], at, 0, "s").is_err());
            assert!(put([1, 2], at.byte_add(1), 16, "s").is_err());
        }
    }
}
