//! What the device may reach of its driver's memory.
//!
//! Only what was mapped. An access outside is refused, counted and kept for whoever asks ([`Windows::faults`]): behind an
//! IOMMU such an access is a bug of the driver, and a test that caused one has failed.

use std::collections::BTreeMap;
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering, fence};

use crate::memory::Memory;

/// How many faults are kept with their details; all are counted.
const FAULTS_KEPT: usize = 64;

/// Who may do what in a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The device reads.
    Read,
    /// The device writes.
    Write,
    /// Both.
    ReadWrite,
}

impl Access {
    fn allows(self, write: bool) -> bool {
        match self {
            Self::Read => !write,
            Self::Write => write,
            Self::ReadWrite => true,
        }
    }
}

/// An access that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The device's address.
    pub address: u64,
    /// Bytes.
    pub length: usize,
    /// The device wanted to write.
    pub write: bool,
    /// What for.
    pub purpose: &'static str,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            address,
            length,
            write,
            purpose,
        } = self;
        let what = if *write { "write" } else { "read" };
        write!(
            f,
            "{what} of {length} bytes at {address:#x} ({purpose}) outside of what is mapped"
        )
    }
}

/// Why a window was not added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// The window has no bytes, or passes the end of the address space.
    #[error("{length} bytes at {address:#x} are no range of addresses")]
    Range {
        /// The device's address.
        address: u64,
        /// Bytes.
        length: u64,
    },
    /// A part of it is mapped already.
    #[error("a part of {length} bytes at {address:#x} is mapped already")]
    Overlap {
        /// The device's address.
        address: u64,
        /// Bytes.
        length: u64,
    },
    /// The device may not write to memory that is mapped read-only.
    #[error("{length} bytes at {address:#x} cannot be written")]
    ReadOnly {
        /// The device's address.
        address: u64,
        /// Bytes.
        length: u64,
    },
    /// Both addresses must be the same within 8 bytes, for the sake of atomic accesses.
    #[error("{address:#x} and where it lies here differ in their last three bits")]
    Misaligned {
        /// The device's address.
        address: u64,
    },
}

#[derive(Clone)]
struct Window {
    length: u64,
    at: NonNull<u8>,
    access: Access,
    // Keeps the memory mapped as long as the window stands, where the model has mapped it.
    _owner: Option<Arc<Memory>>,
}

// SAFETY: a window is an address and a length; the bytes behind are shared with the driver anyway and only ever reached
// by atomic accesses.
unsafe impl Send for Window {}

/// One device's windows into memory.
#[derive(Default)]
pub struct Windows {
    windows: BTreeMap<u64, Window>,
    faults: Vec<Fault>,
    fault_count: u64,
}

impl Windows {
    /// Lets the device reach `length` bytes from `at` on, as `address`.
    ///
    /// # Errors
    /// The range is empty, overflows, overlaps another, or lies otherwise than `at` within 8 bytes.
    ///
    /// # Safety
    /// The bytes stay valid until they are unmapped, and others reach them meanwhile only by atomic or volatile accesses
    /// or not at the same time.
    pub unsafe fn map(&mut self, address: u64, at: NonNull<u8>, length: u64, access: Access) -> Result<(), MapError> {
        self.insert(
            address,
            Window {
                length,
                at,
                access,
                _owner: None,
            },
        )
    }

    /// Lets the device reach all of `memory` from byte `offset` on for `length` bytes, as `address`.
    ///
    /// # Errors
    /// As [`Windows::map`]; also when `memory` ends earlier, or cannot be written and the device may.
    pub fn map_memory(
        &mut self,
        address: u64,
        memory: &Arc<Memory>,
        offset: u64,
        length: u64,
        access: Access,
    ) -> Result<(), MapError> {
        let at = memory
            .slice(offset, length)
            .ok_or(MapError::Range { address, length })?;
        if access.allows(true) && !memory.is_writable() {
            return Err(MapError::ReadOnly { address, length });
        }
        self.insert(
            address,
            Window {
                length,
                at,
                access,
                _owner: Some(Arc::clone(memory)),
            },
        )
    }

    fn insert(&mut self, address: u64, window: Window) -> Result<(), MapError> {
        let length = window.length;
        if length == 0 || address.checked_add(length).is_none() {
            return Err(MapError::Range { address, length });
        }
        if (address ^ window.at.as_ptr() as u64) & 7 != 0 {
            return Err(MapError::Misaligned { address });
        }
        let before = self.windows.range(..address + length).next_back();
        if before.is_some_and(|(start, window)| start + window.length > address) {
            return Err(MapError::Overlap { address, length });
        }
        self.windows.insert(address, window);
        Ok(())
    }

    /// Takes away what of `length` bytes at `address` is mapped; windows that reach beyond keep the rest.
    pub fn unmap(&mut self, address: u64, length: u64) {
        let end = address.saturating_add(length);
        let inside: Vec<u64> = self
            .windows
            .range(..end)
            .filter(|(start, window)| **start + window.length > address)
            .map(|(start, _)| *start)
            .collect();
        for start in inside {
            let Some(window) = self.windows.remove(&start) else {
                continue;
            };
            if start < address {
                let mut left = window.clone();
                left.length = address - start;
                self.windows.insert(start, left);
            }
            if start + window.length > end {
                let mut right = window;
                right.length = start + right.length - end;
                // SAFETY: the window reaches beyond `end`, so that `end - start` is inside of its bytes.
                right.at = unsafe { right.at.add((end - start) as usize) };
                self.windows.insert(end, right);
            }
        }
    }

    /// Takes everything away.
    pub fn unmap_all(&mut self) {
        self.windows.clear();
    }

    /// Windows that stand.
    #[must_use]
    pub fn len(&self) -> usize {
        self.windows.len()
    }

    /// Nothing is mapped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.windows.is_empty()
    }

    /// Accesses that were refused so far.
    #[must_use]
    pub fn fault_count(&self) -> u64 {
        self.fault_count
    }

    /// The first 64 refused accesses since the last [`Windows::take_faults`].
    #[must_use]
    pub fn faults(&self) -> &[Fault] {
        &self.faults
    }

    /// Forgets the faults, and says what they were.
    pub fn take_faults(&mut self) -> Vec<Fault> {
        self.fault_count = 0;
        std::mem::take(&mut self.faults)
    }

    /// Reads `bytes.len()` bytes at `address`.
    ///
    /// # Errors
    /// A part lies outside of what is mapped for reading: nothing was read.
    pub fn read(&mut self, address: u64, bytes: &mut [u8], purpose: &'static str) -> Result<(), Fault> {
        self.each(address, bytes.len(), false, purpose, |at, range| {
            // SAFETY: `each` gives addresses inside of a window.
            unsafe { load(at, &mut bytes[range]) }
        })
    }

    /// Writes `bytes` at `address`.
    ///
    /// # Errors
    /// A part lies outside of what is mapped for writing: nothing was written.
    pub fn write(&mut self, address: u64, bytes: &[u8], purpose: &'static str) -> Result<(), Fault> {
        self.each(address, bytes.len(), true, purpose, |at, range| {
            // SAFETY: `each` gives addresses inside of a window.
            unsafe { store(at, &bytes[range]) }
        })
    }

    /// Reads a descriptor of two quadwords.
    ///
    /// # Errors
    /// As [`Windows::read`].
    pub fn read_descriptor(&mut self, address: u64, purpose: &'static str) -> Result<[u64; 2], Fault> {
        let mut bytes = [0; 16];
        self.read(address, &mut bytes, purpose)?;
        let (low, high) = bytes.split_at(8);
        Ok([low, high].map(|half| u64::from_le_bytes(half.try_into().expect("8 bytes"))))
    }

    /// Writes a descriptor: everything that was written earlier, then the low quadword, then the high one, which has the
    /// DD bit, become visible in this order.
    ///
    /// # Errors
    /// As [`Windows::write`].
    pub fn write_descriptor(&mut self, address: u64, halves: [u64; 2], purpose: &'static str) -> Result<(), Fault> {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&halves[0].to_le_bytes());
        bytes[8..].copy_from_slice(&halves[1].to_le_bytes());
        // The whole first, so that a fault leaves nothing half written.
        self.each(address, 16, true, purpose, |_, _| ())?;
        self.write(address, &bytes[..8], purpose)?;
        fence(Ordering::Release);
        self.write(address + 8, &bytes[8..], purpose)
    }

    fn each(
        &mut self,
        address: u64,
        length: usize,
        write: bool,
        purpose: &'static str,
        mut visit: impl FnMut(NonNull<u8>, std::ops::Range<usize>),
    ) -> Result<(), Fault> {
        // Twice: all or nothing.
        for moving in [false, true] {
            let mut done = 0;
            while done < length {
                let piece = address.checked_add(done as u64).and_then(|now| self.piece(now, write));
                let Some((at, available)) = piece else {
                    let fault = Fault {
                        address,
                        length,
                        write,
                        purpose,
                    };
                    self.fault_count += 1;
                    if self.faults.len() < FAULTS_KEPT {
                        self.faults.push(fault);
                    }
                    return Err(fault);
                };
                let now = available.min((length - done) as u64) as usize;
                if moving {
                    visit(at, done..done + now);
                }
                done += now;
            }
        }
        Ok(())
    }

    /// Where `address` lies here, and how many bytes follow in the same window.
    fn piece(&self, address: u64, write: bool) -> Option<(NonNull<u8>, u64)> {
        let (start, window) = self.windows.range(..=address).next_back()?;
        let inside = address - start;
        if inside >= window.length || !window.access.allows(write) {
            return None;
        }
        // SAFETY: `inside` is below the window's length.
        Some((unsafe { window.at.add(inside as usize) }, window.length - inside))
    }
}

/// Copies out of shared memory.
///
/// # Safety
/// `at` is valid for `bytes.len()` bytes that others reach only by atomic or volatile accesses or not now.
unsafe fn load(at: NonNull<u8>, bytes: &mut [u8]) {
    let mut at = at.as_ptr();
    let (head, body, tail) = split(at, bytes.len());
    let mut rest = bytes;
    for part in [head, body, tail] {
        let (now, later) = std::mem::take(&mut rest).split_at_mut(part);
        rest = later;
        if part == body && (at as usize).is_multiple_of(8) && part % 8 == 0 {
            for word in now.chunks_exact_mut(8) {
                // SAFETY: aligned (`split`), and inside by the caller's promise.
                let value = unsafe { AtomicU64::from_ptr(at.cast()) }.load(Ordering::Relaxed);
                word.copy_from_slice(&value.to_ne_bytes());
                // SAFETY: at most one past the end.
                at = unsafe { at.add(8) };
            }
        } else {
            for byte in now {
                // SAFETY: inside by the caller's promise.
                *byte = unsafe { AtomicU8::from_ptr(at) }.load(Ordering::Relaxed);
                // SAFETY: at most one past the end.
                at = unsafe { at.add(1) };
            }
        }
    }
    fence(Ordering::Acquire);
}

/// Copies into shared memory.
///
/// # Safety
/// As [`load`].
unsafe fn store(at: NonNull<u8>, bytes: &[u8]) {
    let mut at = at.as_ptr();
    let (head, body, tail) = split(at, bytes.len());
    let mut rest = bytes;
    for part in [head, body, tail] {
        let (now, later) = rest.split_at(part);
        rest = later;
        if part == body && (at as usize).is_multiple_of(8) && part % 8 == 0 {
            for word in now.chunks_exact(8) {
                let value = u64::from_ne_bytes(word.try_into().expect("8 bytes"));
                // SAFETY: aligned (`split`), and inside by the caller's promise.
                unsafe { AtomicU64::from_ptr(at.cast()) }.store(value, Ordering::Relaxed);
                // SAFETY: at most one past the end.
                at = unsafe { at.add(8) };
            }
        } else {
            for byte in now {
                // SAFETY: inside by the caller's promise.
                unsafe { AtomicU8::from_ptr(at) }.store(*byte, Ordering::Relaxed);
                // SAFETY: at most one past the end.
                at = unsafe { at.add(1) };
            }
        }
    }
}

/// Bytes before the first aligned quadword, in aligned quadwords, and after.
fn split(at: *const u8, length: usize) -> (usize, usize, usize) {
    let head = ((at as usize).wrapping_neg() & 7).min(length);
    let body = (length - head) & !7;
    (head, body, length - head - body)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn windows() -> (Windows, Arc<Memory>) {
        let memory = Arc::new(Memory::anonymous(0x4000).unwrap());
        let mut windows = Windows::default();
        windows
            .map_memory(0x1_0000, &memory, 0, 0x2000, Access::ReadWrite)
            .unwrap();
        windows
            .map_memory(0x1_2000, &memory, 0x3000, 0x1000, Access::Read)
            .unwrap();
        (windows, memory)
    }

    #[test]
    fn bytes_travel_at_every_alignment() {
        let (mut windows, _memory) = windows();
        for offset in 0..17 {
            for length in 0..40 {
                let bytes: Vec<u8> = (0..length).map(|i| (i + offset) as u8 | 0x80).collect();
                windows.write(0x1_0100 + offset, &bytes, "test").unwrap();
                let mut back = vec![0; bytes.len()];
                windows.read(0x1_0100 + offset, &mut back, "test").unwrap();
                assert_eq!(back, bytes);
            }
        }
    }

    #[test]
    fn neighbours_are_read_across() {
        let (mut windows, memory) = windows();
        memory.write(0x1ffe, &[1, 2]);
        memory.write(0x3000, &[3, 4]);
        let mut bytes = [0; 4];
        windows.read(0x1_1ffe, &mut bytes, "test").unwrap();
        assert_eq!(bytes, [1, 2, 3, 4]);
        // The second window is not for writing: nothing is written to the first either.
        windows.write(0x1_1ffe, &[9; 4], "test").unwrap_err();
        windows.read(0x1_1ffe, &mut bytes, "test").unwrap();
        assert_eq!(bytes, [1, 2, 3, 4]);
    }

    #[test]
    fn outside_is_refused_and_counted() {
        let (mut windows, _memory) = windows();
        let mut bytes = [0; 16];
        for address in [0, 0xffff, 0x1_0000 - 8, 0x1_2ff8, 0x1_3000, u64::MAX - 7, u64::MAX] {
            windows.read(address, &mut bytes, "test").unwrap_err();
        }
        assert_eq!(windows.fault_count(), 7);
        assert_eq!(windows.faults()[6].address, u64::MAX);
    }

    #[test]
    fn unmap_takes_parts_away() {
        let (mut windows, memory) = windows();
        memory.write(0x1800, &[7]);
        windows.unmap(0x1_0800, 0x1000);
        let mut byte = [0];
        windows.read(0x1_07ff, &mut byte, "test").unwrap();
        windows.read(0x1_0800, &mut byte, "test").unwrap_err();
        windows.read(0x1_17ff, &mut byte, "test").unwrap_err();
        windows.read(0x1_1800, &mut byte, "test").unwrap();
        assert_eq!(byte, [7]);
        windows.unmap(0, u64::MAX);
        assert!(windows.is_empty());
    }

    #[test]
    fn overlap_and_overflow_are_refused() {
        let (mut windows, memory) = windows();
        let mut map = |address, length| windows.map_memory(address, &memory, 0, length, Access::Read);
        assert!(matches!(map(0x1_1000, 0x10), Err(MapError::Overlap { .. })));
        assert!(matches!(map(0xf000, 0x1008), Err(MapError::Overlap { .. })));
        assert!(matches!(map(0x2_0000, 0), Err(MapError::Range { .. })));
        assert!(matches!(map(u64::MAX - 7, 0x10), Err(MapError::Range { .. })));
        assert!(matches!(map(0x2_0000, 0x4008), Err(MapError::Range { .. })));
        assert!(matches!(map(0x2_0001, 8), Err(MapError::Misaligned { .. })));
        let file = std::fs::File::open(std::env::current_exe().unwrap()).unwrap();
        let memory = Arc::new(Memory::file(&file, 0x1000, false).unwrap());
        let mut map = |access| windows.map_memory(0x2_0000, &memory, 0, 0x1000, access);
        assert!(matches!(map(Access::ReadWrite), Err(MapError::ReadOnly { .. })));
        map(Access::Read).unwrap();
    }
}
