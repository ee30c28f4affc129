//! Offsets for rings.

use core::ops::Range;

/// Hands out ranges of offsets, one after the other, and takes none back: rings live as long as their segment.
///
/// It is arithmetic: it neither has nor touches memory. A [`Segment`](crate::Segment)'s base is aligned to its page, so
/// that an offset's alignment of up to a page is its address's too.
///
/// ```
/// let mut arena = hugemem::Arena::new(0..8192);
/// assert_eq!(arena.alloc(100, 16), Some(0..100));
/// assert_eq!(arena.alloc(100, 4096), Some(4096..4196));
/// assert_eq!(arena.alloc(8192, 1), None);
/// assert_eq!(arena.remaining(), 8192 - 4196);
/// ```
#[derive(Debug, Clone)]
pub struct Arena {
    next: usize,
    end: usize,
}

impl Arena {
    /// An arena of these offsets.
    pub const fn new(range: Range<usize>) -> Self {
        Arena {
            next: range.start,
            end: range.end,
        }
    }

    /// `len` bytes at a multiple of `align`, a power of two. `None`: they do not fit, or `align` is none.
    pub fn alloc(&mut self, len: usize, align: usize) -> Option<Range<usize>> {
        if !align.is_power_of_two() {
            return None;
        }
        let start = self.next.checked_add(align - 1)? & !(align - 1);
        let end = start.checked_add(len)?;
        if end > self.end {
            return None;
        }
        self.next = end;
        Some(start..end)
    }

    /// The offset from which on all is free.
    pub const fn position(&self) -> usize {
        self.next
    }

    /// Free bytes, before any alignment.
    pub const fn remaining(&self) -> usize {
        self.end.saturating_sub(self.next)
    }
}
