//! Registers, mapped into our memory.

use std::os::fd::AsFd;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::Error;

/// A base address register's region, or its first part, mapped to read and write. Dropping it unmaps it.
///
/// What is behind it is a device: reads may have side effects, and every value is the device's word. It is for volatile
/// accesses only.
#[derive(Debug)]
pub struct Bar {
    addr: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping belongs to no thread; who may touch which register is the driver's concern.
unsafe impl Send for Bar {}
// SAFETY: as above; there is no safe access through a shared reference.
unsafe impl Sync for Bar {}

impl Bar {
    /// Maps `len` bytes of the device's file from `offset` on.
    pub(super) fn map(device: impl AsFd, offset: u64, len: usize) -> Result<Self, Error> {
        // SAFETY: a new mapping at an address that the kernel chooses.
        let addr = unsafe {
            mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                device,
                offset,
            )
        }
        .map_err(|source| Error::System {
            tried: format!("map {len} bytes of registers"),
            source: source.into(),
        })?;
        let Some(addr) = NonNull::new(addr.cast()) else {
            return Err(Error::System {
                tried: "map registers".into(),
                source: rustix::io::Errno::FAULT.into(),
            });
        };
        Ok(Bar { addr, len })
    }

    /// The first register.
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.addr
    }

    /// Bytes that are mapped; at least as many as were asked for.
    #[allow(clippy::len_without_is_empty, reason = "a region of no bytes is not mapped")]
    pub fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nothing can reach any more.
        let _ = unsafe { munmap(self.addr.as_ptr().cast(), self.len) };
    }
}
