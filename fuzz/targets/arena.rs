//! Memory that the other side of a ring can write: the ring at its beginning, and all that descriptors can name.

use std::alloc::{Layout as Alloc, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use virtio_ring::any::{Format, Layout, Memory};
use virtio_ring::{Options, Translate};

use crate::input::Input;

/// Bytes of the memory.
pub const LEN: usize = 16 << 10;

/// Bytes of a region of it: what lies over the border between two is in two parts.
const REGION: u64 = 3000;

/// The memory, as large as it says and no larger.
pub struct Arena {
    base: NonNull<u8>,
}

impl Arena {
    fn alloc() -> Alloc {
        Alloc::from_size_align(LEN, 128).expect("a size")
    }

    /// Zeroed.
    pub fn new() -> Self {
        // SAFETY: the size is not 0.
        let base = unsafe { alloc_zeroed(Self::alloc()) };
        Arena {
            base: NonNull::new(base).expect("memory"),
        }
    }

    /// The other side writes.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        let at = at % LEN;
        for (place, byte) in (at..LEN).zip(bytes) {
            // SAFETY: inside the arena, of which nobody holds a reference.
            unsafe { self.base.as_ptr().add(place).write_volatile(*byte) };
        }
    }

    /// A ring of some size at the beginning, and what was negotiated for it.
    pub fn ring(&self, input: &mut Input<'_>) -> Option<(Memory, u16, Options)> {
        let choice = input.u8();
        let format = if choice & 1 == 0 { Format::Split } else { Format::Packed };
        let options = Options {
            event_idx: choice & 2 != 0,
            in_order: choice & 4 != 0,
            indirect: choice & 8 != 0,
        };
        let size = match format {
            Format::Split => 2 << (choice >> 4 & 3),
            Format::Packed => 2 + u16::from(choice >> 4),
        };
        let layout = Layout::new(format, size).ok()?;
        assert!(layout.block_len() < LEN);
        // SAFETY: the arena is larger than the block and aligned.
        Some((unsafe { layout.place(self.base) }, size, options))
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: allocated so.
        unsafe { dealloc(self.base.as_ptr(), Self::alloc()) };
    }
}

// SAFETY: only places inside the arena, which outlives the chains.
unsafe impl Translate for Arena {
    fn translate(&self, addr: u64, len: u32) -> Option<NonNull<u8>> {
        let (ptr, n) = self.prefix(addr, len)?;
        (n == len).then_some(ptr)
    }

    fn prefix(&self, addr: u64, len: u32) -> Option<(NonNull<u8>, u32)> {
        let left = (LEN as u64).checked_sub(addr)?.min(REGION - addr % REGION);
        // SAFETY: inside the arena.
        Some((unsafe { self.base.add(addr as usize) }, u64::from(len).min(left) as u32))
    }
}
