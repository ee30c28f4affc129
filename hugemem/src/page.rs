//! Sizes of pages.

use core::fmt;

/// A size of pages that memory can be asked for in.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageSize(u8);

impl PageSize {
    /// The kernel's ordinary pages; transparent huge pages may serve them where the kernel is told so.
    pub const BASE: Self = Self(0);
    /// Huge pages of 2 MiB.
    pub const HUGE_2M: Self = Self(21);
    /// Huge pages of 1 GiB.
    pub const HUGE_1G: Self = Self(30);

    /// Huge pages of `bytes` bytes, a power of two of more than 4096; whether the kernel has such is another matter.
    pub const fn huge(bytes: usize) -> Option<Self> {
        if bytes.is_power_of_two() && bytes > 4096 {
            Some(Self(bytes.trailing_zeros() as u8))
        } else {
            None
        }
    }

    /// Whether these are pages of hugetlbfs.
    pub const fn is_huge(self) -> bool {
        self.0 != 0
    }

    /// Bytes of one page.
    pub fn bytes(self) -> usize {
        if self.is_huge() {
            1 << self.0
        } else {
            crate::sys::base_page()
        }
    }

    /// The size as `memfd_create(2)` and `mmap(2)` take it: log2 in the bits from 26 on.
    pub(crate) const fn flag(self) -> u32 {
        (self.0 as u32) << 26
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.bytes();
        match bytes.trailing_zeros() {
            0..20 => write!(f, "{} KiB", bytes >> 10),
            20..30 => write!(f, "{} MiB", bytes >> 20),
            _ => write!(f, "{} GiB", bytes >> 30),
        }
    }
}

impl fmt::Debug for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageSize({self})")
    }
}
