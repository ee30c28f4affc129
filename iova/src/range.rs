//! Some addresses.

use core::fmt;

/// Addresses `start..=last()`: never empty, and never wraps around the end of the address space.
///
/// The last address may be `u64::MAX`; there is no `end()`, which would not fit then.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Range {
    start: u64,
    len: u64,
}

impl Range {
    /// `len` addresses from `start` on. `None` if `len` is 0 or if they do not all fit below 2^64.
    pub const fn new(start: u64, len: u64) -> Option<Self> {
        // With `start + (len - 1)` a range may end with the last address there is.
        if len == 0 || start.checked_add(len - 1).is_none() {
            None
        } else {
            Some(Range { start, len })
        }
    }

    /// The first address.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// How many addresses; never 0.
    #[allow(clippy::len_without_is_empty, reason = "a range is never empty")]
    pub const fn len(self) -> u64 {
        self.len
    }

    /// The last address, which is in the range.
    pub const fn last(self) -> u64 {
        self.start + (self.len - 1)
    }

    /// Where `addr` is in the range, from its start, if the `len` bytes from it on are all in the range. With a `len` of 0
    /// `addr` itself must be in the range.
    #[inline(always)]
    pub const fn offset_of(self, addr: u64, len: u64) -> Option<u64> {
        // Addresses before the start wrap to more than any length.
        let offset = addr.wrapping_sub(self.start);
        if offset < self.len && len <= self.len - offset {
            Some(offset)
        } else {
            None
        }
    }

    /// Whether `addr` is in the range.
    pub const fn contains(self, addr: u64) -> bool {
        self.offset_of(addr, 1).is_some()
    }

    /// Whether there is an address in both.
    pub const fn overlaps(self, other: Range) -> bool {
        self.start <= other.last() && other.start <= self.last()
    }
}

impl fmt::Debug for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..={:#x}", self.start, self.last())
    }
}
