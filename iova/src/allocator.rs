//! Addresses for those who have none of their own.

use core::fmt;

use crate::{Range, Ranges};

/// Gives out addresses of a device's address space: the lowest that fit (first fit), out of those that may be used.
///
/// Where a device reaches as far as our own addresses do, they serve it as they are and are only
/// [claimed](Allocator::claim) here; where its reach is shorter (an IOMMU of 39 bits), it is
/// [given](Allocator::allocate) others. At most `N` ranges are out at a time, the addresses that may be used are at
/// most `R` ranges. It allocates no memory.
///
/// ```
/// use iova::{Allocator, Range, Ranges};
///
/// let mut usable = Ranges::<4>::new();
/// usable.insert(Range::new(0x1000, 0xfedf_f000).unwrap()).unwrap();
/// let mut allocator = Allocator::<16, 4>::new(usable);
/// let pool = allocator.allocate(4 << 20, 2 << 20).unwrap();
/// assert_eq!(pool.start(), 2 << 20);
/// allocator.release(pool).unwrap();
/// ```
#[derive(Clone)]
pub struct Allocator<const N: usize = 256, const R: usize = 32> {
    usable: Ranges<R>,
    len: usize,
    /// Sorted; those from `len` on are not in use.
    used: [Range; N],
}

/// Why addresses were not given out or taken back. Everything is as before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum AllocatorError {
    /// Nowhere are so many addresses free in one piece.
    Exhausted,
    /// `N` ranges are out.
    Full,
    /// The addresses may not be used, or not all of them.
    Unusable,
    /// Some of the addresses are in this range, which is out.
    Taken(Range),
    /// No range of exactly these addresses is out.
    Missing,
    /// The length is 0, or the alignment no power of two.
    Invalid,
}

impl fmt::Display for AllocatorError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AllocatorError::Exhausted => f.write_str("not so many addresses are free in one piece"),
            AllocatorError::Full => f.write_str("no more ranges can be given out"),
            AllocatorError::Unusable => f.write_str("not all of these addresses may be used"),
            AllocatorError::Taken(by) => write!(f, "some of these addresses are taken by {by:?}"),
            AllocatorError::Missing => f.write_str("there is no such range"),
            AllocatorError::Invalid => f.write_str("a length of 0, or an alignment that is no power of two"),
        }
    }
}

impl core::error::Error for AllocatorError {}

impl<const N: usize, const R: usize> Allocator<N, R> {
    /// An allocator over these addresses. `N` is at least 1.
    pub const fn new(usable: Ranges<R>) -> Self {
        const { assert!(N > 0, "an allocator of no ranges gives nothing") };
        let none = match Range::new(0, 1) {
            Some(range) => range,
            None => unreachable!(),
        };
        Allocator {
            usable,
            len: 0,
            used: [none; N],
        }
    }

    /// `len` addresses, the first a multiple of `align`: the lowest such that are free.
    ///
    /// # Errors
    /// [`AllocatorError::Exhausted`], [`AllocatorError::Full`]; [`AllocatorError::Invalid`] if `len` is 0 or `align` no
    /// power of two.
    pub fn allocate(&mut self, len: u64, align: u64) -> Result<Range, AllocatorError> {
        if len == 0 || !align.is_power_of_two() {
            return Err(AllocatorError::Invalid);
        }
        if self.len == N {
            return Err(AllocatorError::Full);
        }
        let found = self.usable.iter().find_map(|window| self.first_fit(window, len, align));
        let range = found.ok_or(AllocatorError::Exhausted)?;
        self.put(range);
        Ok(range)
    }

    /// Takes exactly these addresses.
    ///
    /// # Errors
    /// [`AllocatorError::Unusable`], [`AllocatorError::Taken`], [`AllocatorError::Full`].
    pub fn claim(&mut self, range: Range) -> Result<(), AllocatorError> {
        if !self.usable.contains(range) {
            return Err(AllocatorError::Unusable);
        }
        if let Some(by) = self.taken(range) {
            return Err(AllocatorError::Taken(by));
        }
        if self.len == N {
            return Err(AllocatorError::Full);
        }
        self.put(range);
        Ok(())
    }

    /// Takes a range back that was given out or claimed.
    ///
    /// # Errors
    /// [`AllocatorError::Missing`]: no such range is out, or only one that is larger or smaller.
    pub fn release(&mut self, range: Range) -> Result<(), AllocatorError> {
        let at = self.used().binary_search(&range).map_err(|_| AllocatorError::Missing)?;
        self.used.copy_within(at + 1..self.len, at);
        self.len -= 1;
        Ok(())
    }

    /// The addresses that may be used, given out or not.
    pub const fn usable(&self) -> &Ranges<R> {
        &self.usable
    }

    /// The ranges that are out, by their addresses.
    pub fn used(&self) -> &[Range] {
        &self.used[..self.len]
    }

    /// The lowest aligned place in `window` that nothing is in. Looks at each range that is out once.
    fn first_fit(&self, window: Range, len: u64, align: u64) -> Option<Range> {
        let mut start = align_up(window.start(), align)?;
        let mut at = self.used().partition_point(|r| r.last() < start);
        loop {
            window.offset_of(start, len)?;
            let range = Range::new(start, len)?;
            match self.used().get(at) {
                Some(used) if used.overlaps(range) => start = align_up(used.last().checked_add(1)?, align)?,
                Some(used) if used.last() < start => {}
                _ => return Some(range),
            }
            at += 1;
        }
    }

    /// A range that is out and has addresses in common with this one.
    fn taken(&self, range: Range) -> Option<Range> {
        let at = self.used().partition_point(|r| r.last() < range.start());
        self.used().get(at).copied().filter(|r| r.overlaps(range))
    }

    /// Notes a range as given out. It is free, and there is room.
    fn put(&mut self, range: Range) {
        let at = self.used().partition_point(|r| r.start() < range.start());
        self.used.copy_within(at..self.len, at + 1);
        self.used[at] = range;
        self.len += 1;
    }
}

/// The next multiple of a power of two, if there is one below 2^64.
const fn align_up(addr: u64, align: u64) -> Option<u64> {
    match addr.checked_add(align - 1) {
        Some(sum) => Some(sum & !(align - 1)),
        None => None,
    }
}

impl<const N: usize, const R: usize> fmt::Debug for Allocator<N, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Allocator")
            .field("usable", &self.usable)
            .field("used", &self.used())
            .finish()
    }
}
