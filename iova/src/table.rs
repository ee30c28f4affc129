//! Theirs to ours.

use core::fmt;

use crate::Range;

/// Addresses of theirs, and where they are in ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// In their address space.
    pub theirs: Range,
    /// In ours; as long, so it does not wrap either.
    pub ours: Range,
}

/// A slot of the table. `len` is 0 in those that are not used, so that no address is inside.
#[derive(Clone, Copy)]
struct Entry {
    theirs: u64,
    len: u64,
    ours: u64,
}

impl Entry {
    const NONE: Entry = Entry {
        theirs: 0,
        len: 0,
        ours: 0,
    };

    /// As [`Range::offset_of`], and `None` in a slot that is not used.
    #[inline(always)]
    fn offset(start: u64, region: u64, addr: u64, len: u64) -> Option<u64> {
        let offset = addr.wrapping_sub(start);
        if len == 0 {
            return if offset < region { Some(offset) } else { None };
        }
        // Two jumps that are never taken.
        match offset.checked_add(len) {
            Some(end) if end <= region => Some(offset),
            _ => None,
        }
    }

    #[inline(always)]
    fn translate(&self, addr: u64, len: u64) -> Option<u64> {
        // No overflow: `ours + len - 1` was checked by insert.
        Self::offset(self.theirs, self.len, addr, len).map(|offset| self.ours + offset)
    }

    fn region(&self) -> Option<Region> {
        Some(Region {
            theirs: Range::new(self.theirs, self.len)?,
            ours: Range::new(self.ours, self.len)?,
        })
    }
}

/// Which region was hit last. It belongs to the one who asks, so that a table that threads share stays unwritten.
///
/// A hint of another table, or of one that changed since, is merely a worse guess.
#[derive(Debug, Clone, Copy, Default)]
pub struct Hint(usize);

/// Why a region was not inserted or removed. The table is as before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// It has addresses of theirs in common with this one.
    Overlap(Region),
    /// Our addresses would wrap around the end of the address space.
    Overflow,
    /// The table has `N` regions.
    Full,
    /// There is no region of exactly these addresses.
    Missing,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Overlap(with) => write!(f, "the region overlaps {:?}", with.theirs),
            Error::Overflow => f.write_str("the region goes beyond the end of our address space"),
            Error::Full => f.write_str("the table is full"),
            Error::Missing => f.write_str("there is no such region"),
        }
    }
}

impl core::error::Error for Error {}

/// Up to `N` regions, sorted by their addresses, which do not overlap. Ours may: two of their ranges can be the same
/// memory.
///
/// The table is a value of 24 bytes a region and allocates nothing. vhost-user names at most 8 regions in one message,
/// and up to 512 one by one.
#[derive(Clone)]
pub struct Table<const N: usize = 32> {
    len: usize,
    entries: [Entry; N],
}

impl<const N: usize> Table<N> {
    /// A table without regions. `N` is at least 1.
    pub const fn new() -> Self {
        const { assert!(N > 0, "a table of no regions translates nothing") };
        Table {
            len: 0,
            entries: [Entry::NONE; N],
        }
    }

    /// Adds a region: their addresses `theirs` are ours from `ours` on.
    ///
    /// # Errors
    /// [`Error::Overlap`], [`Error::Overflow`], [`Error::Full`].
    pub fn insert(&mut self, theirs: Range, ours: u64) -> Result<(), Error> {
        Range::new(ours, theirs.len()).ok_or(Error::Overflow)?;
        let at = self.position(theirs.start());
        // The neighbours are the only ones that it can overlap, as the others do not overlap each other.
        let before = at.checked_sub(1).and_then(|index| self.get(index));
        for neighbour in before.into_iter().chain(self.get(at)) {
            if neighbour.theirs.overlaps(theirs) {
                return Err(Error::Overlap(neighbour));
            }
        }
        if self.len == N {
            return Err(Error::Full);
        }
        self.entries.copy_within(at..self.len, at + 1);
        self.entries[at] = Entry {
            theirs: theirs.start(),
            len: theirs.len(),
            ours,
        };
        self.len += 1;
        Ok(())
    }

    /// Removes the region with exactly these addresses of theirs.
    ///
    /// # Errors
    /// [`Error::Missing`].
    pub fn remove(&mut self, theirs: Range) -> Result<Region, Error> {
        let at = self.position(theirs.start());
        let region = self
            .get(at)
            .filter(|region| region.theirs == theirs)
            .ok_or(Error::Missing)?;
        self.entries.copy_within(at + 1..self.len, at);
        self.len -= 1;
        self.entries[self.len] = Entry::NONE;
        Ok(region)
    }

    /// Removes all regions.
    pub fn clear(&mut self) {
        *self = Self::new();
    }

    /// Where the `len` bytes from their `addr` on are in ours, if one region has them all.
    ///
    /// Bytes on both sides of a border between two regions are `None`, also where the regions touch: they may be apart
    /// in ours. [`prefix`](Self::prefix) takes them apart. A `len` of 0 asks for `addr` itself.
    ///
    /// With one region this is a comparison or two; with more, the lowest is tried first, then a binary search.
    #[inline(always)]
    pub fn translate(&self, addr: u64, len: u64) -> Option<u64> {
        match self.entries[0].translate(addr, len) {
            Some(ours) => Some(ours),
            None if self.len <= 1 => None,
            None => self.search(addr, len).map(|(_, ours)| ours),
        }
    }

    /// The region that their `addr` is in.
    #[inline]
    pub fn region_at(&self, addr: u64) -> Option<Region> {
        let index = match self.entries[0].translate(addr, 1) {
            Some(_) => 0,
            None => self.position_at(addr)?,
        };
        self.get(index)
            .filter(|region| region.theirs.offset_of(addr, 1).is_some())
    }

    /// As [`translate`](Self::translate), and the region that was hit last is tried first.
    #[inline(always)]
    pub fn translate_near(&self, hint: &mut Hint, addr: u64, len: u64) -> Option<u64> {
        // An index out of bounds is a hint of another table.
        if let Some(ours) = self.entries.get(hint.0).and_then(|entry| entry.translate(addr, len)) {
            return Some(ours);
        }
        let (index, ours) = self.search(addr, len)?;
        hint.0 = index;
        Some(ours)
    }

    /// Where their `addr` is in ours, and how many of the `len` bytes from it on are in the same region: at least 1,
    /// unless `len` is 0.
    pub fn prefix(&self, addr: u64, len: u64) -> Option<(u64, u64)> {
        let entry = self.entries[..self.len].get(self.position_at(addr)?)?;
        let offset = Entry::offset(entry.theirs, entry.len, addr, 0)?;
        Some((entry.ours + offset, len.min(entry.len - offset)))
    }

    /// Where the `len` bytes from our `addr` on are in theirs, if one region has them all; if several have, in that with
    /// the lowest addresses of theirs. Looks at one region after the other.
    pub fn reverse(&self, addr: u64, len: u64) -> Option<u64> {
        self.entries[..self.len]
            .iter()
            .find_map(|entry| Entry::offset(entry.ours, entry.len, addr, len).map(|offset| entry.theirs + offset))
    }

    /// The regions, by their addresses.
    pub fn iter(&self) -> impl Iterator<Item = Region> + '_ {
        self.entries[..self.len].iter().filter_map(Entry::region)
    }

    /// How many regions there are.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn get(&self, index: usize) -> Option<Region> {
        self.entries[..self.len].get(index).and_then(Entry::region)
    }

    /// The first region that starts at `addr` or after it.
    fn position(&self, addr: u64) -> usize {
        self.entries[..self.len].partition_point(|entry| entry.theirs < addr)
    }

    /// The last region that starts at `addr` or before it.
    fn position_at(&self, addr: u64) -> Option<usize> {
        self.entries[..self.len]
            .partition_point(|entry| entry.theirs <= addr)
            .checked_sub(1)
    }

    #[inline(never)]
    fn search(&self, addr: u64, len: u64) -> Option<(usize, u64)> {
        let index = self.position_at(addr)?;
        Some((index, self.entries[index].translate(addr, len)?))
    }
}

impl<const N: usize> Default for Table<N> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const N: usize> fmt::Debug for Table<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}
