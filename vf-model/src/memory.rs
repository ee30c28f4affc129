//! Memory that a device reaches: anonymous, or a file that a VMM has sent.

use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::io;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// A shared mapping; unmapped when dropped.
#[derive(Debug)]
pub struct Memory {
    at: NonNull<u8>,
    length: usize,
    writable: bool,
}

// SAFETY: the mapping belongs to this value until it is dropped; its bytes are only reached by atomic accesses.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// `length` bytes of zeros.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn anonymous(length: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice touches nobody's memory.
        let at = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
            )?
        };
        Self::own(at, length, true)
    }

    /// The first `length` bytes of a file, shared with everybody who has it.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn file(file: impl AsFd, length: usize, writable: bool) -> io::Result<Self> {
        let mut protection = ProtFlags::READ;
        protection.set(ProtFlags::WRITE, writable);
        // SAFETY: as above.
        let at = unsafe { mmap(std::ptr::null_mut(), length, protection, MapFlags::SHARED, file, 0)? };
        Self::own(at, length, writable)
    }

    fn own(at: *mut core::ffi::c_void, length: usize, writable: bool) -> io::Result<Self> {
        let at = NonNull::new(at.cast()).ok_or(io::Errno::NOMEM)?;
        Ok(Self { at, length, writable })
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Never: the kernel maps no empty ranges.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The bytes can be written.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Where the bytes `offset..offset + length` lie, if they are all inside.
    #[must_use]
    pub fn slice(&self, offset: u64, length: u64) -> Option<NonNull<u8>> {
        if offset.checked_add(length)? > self.length as u64 {
            return None;
        }
        // SAFETY: inside of the mapping.
        Some(unsafe { self.at.add(offset as usize) })
    }

    /// The driver's view in tests: reads bytes.
    ///
    /// # Panics
    /// Outside of the memory.
    #[must_use]
    pub fn read<const N: usize>(&self, offset: usize) -> [u8; N] {
        let at = self.slice(offset as u64, N as u64).expect("inside of the memory");
        // SAFETY: the bytes are inside of the mapping, and all accesses to it are atomic.
        std::array::from_fn(|i| unsafe { AtomicU8::from_ptr(at.as_ptr().add(i)) }.load(Ordering::Acquire))
    }

    /// The driver's view in tests: reads `length` bytes.
    ///
    /// # Panics
    /// Outside of the memory.
    #[must_use]
    pub fn read_vec(&self, offset: usize, length: usize) -> Vec<u8> {
        (offset..offset + length).map(|at| self.read::<1>(at)[0]).collect()
    }

    /// The driver's view in tests: writes bytes.
    ///
    /// # Panics
    /// Outside of the memory, or it is read-only.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(self.writable, "memory that can be written");
        let at = self
            .slice(offset as u64, bytes.len() as u64)
            .expect("inside of the memory");
        for (i, byte) in bytes.iter().enumerate() {
            // SAFETY: the bytes are inside of the mapping, and all accesses to it are atomic.
            unsafe { AtomicU8::from_ptr(at.as_ptr().add(i)) }.store(*byte, Ordering::Release);
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by this value, and windows into it hold the value.
        let result = unsafe { munmap(self.at.as_ptr().cast(), self.length) };
        debug_assert!(result.is_ok(), "a mapping of our own can be unmapped");
    }
}
