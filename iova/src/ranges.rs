//! A set of addresses.

use core::fmt;

use crate::Range;

/// A set of addresses: at most `N` ranges, sorted, apart from each other. What touches is joined.
///
/// It says which addresses a device may use, and joins pieces of memory: pages that lie side by side, inserted one by
/// one in any order, come out as one range, so that they can be mapped at once.
#[derive(Clone)]
pub struct Ranges<const N: usize = 32> {
    len: usize,
    ranges: [Range; N],
}

/// A set would need more than its `N` ranges. It is as before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooManyRanges;

impl fmt::Display for TooManyRanges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("there is no room for one more range")
    }
}

impl core::error::Error for TooManyRanges {}

/// What is in the slots that are not used.
const NONE: Range = match Range::new(0, 1) {
    Some(range) => range,
    None => unreachable!(),
};

impl<const N: usize> Ranges<N> {
    /// No addresses. `N` is at least 1.
    pub const fn new() -> Self {
        const { assert!(N > 0, "a set of no ranges holds nothing") };
        Ranges {
            len: 0,
            ranges: [NONE; N],
        }
    }

    /// Adds addresses, some of which may be there already.
    ///
    /// # Errors
    /// [`TooManyRanges`].
    pub fn insert(&mut self, range: Range) -> Result<(), TooManyRanges> {
        // Those that overlap the new range or touch it become one with it.
        let from = self
            .ranges()
            .partition_point(|r| r.last() < range.start() && r.last() + 1 < range.start());
        let to = self
            .ranges()
            .partition_point(|r| r.start() <= range.last() || r.start() - 1 <= range.last());
        let joined = match self.ranges().get(from..to) {
            Some([]) | None => range,
            Some(old) => span(
                range.start().min(old[0].start()),
                range.last().max(old[old.len() - 1].last()),
            ),
        };
        self.splice(from, to, &[joined])
    }

    /// Takes addresses out, some of which may not be there.
    ///
    /// # Errors
    /// [`TooManyRanges`]: a hole makes two ranges of one.
    pub fn remove(&mut self, range: Range) -> Result<(), TooManyRanges> {
        let from = self.ranges().partition_point(|r| r.last() < range.start());
        let to = self.ranges().partition_point(|r| r.start() <= range.last());
        if from >= to {
            return Ok(());
        }
        let (first, last) = (self.ranges[from], self.ranges[to - 1]);
        let before = (first.start() < range.start()).then(|| span(first.start(), range.start() - 1));
        let after = (last.last() > range.last()).then(|| span(range.last() + 1, last.last()));
        match (before, after) {
            (Some(before), Some(after)) => self.splice(from, to, &[before, after]),
            (Some(rest), None) | (None, Some(rest)) => self.splice(from, to, &[rest]),
            (None, None) => self.splice(from, to, &[]),
        }
    }

    /// Whether all addresses of `range` are in the set.
    pub fn contains(&self, range: Range) -> bool {
        let at = self.ranges().partition_point(|r| r.last() < range.start());
        self.ranges()
            .get(at)
            .is_some_and(|r| r.offset_of(range.start(), range.len()).is_some())
    }

    /// The ranges, by their addresses.
    pub fn iter(&self) -> impl Iterator<Item = Range> + '_ {
        self.ranges().iter().copied()
    }

    /// How many ranges there are.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn ranges(&self) -> &[Range] {
        &self.ranges[..self.len]
    }

    /// Puts `new` in the place of `from..to`.
    fn splice(&mut self, from: usize, to: usize, new: &[Range]) -> Result<(), TooManyRanges> {
        let len = self.len - (to - from) + new.len();
        if len > N {
            return Err(TooManyRanges);
        }
        self.ranges.copy_within(to..self.len, from + new.len());
        self.ranges[from..from + new.len()].copy_from_slice(new);
        self.len = len;
        Ok(())
    }
}

/// From `start` to `last`, which is not before it. All 2^64 addresses are one more than a range can have: the last one
/// is left out then.
const fn span(start: u64, last: u64) -> Range {
    match Range::new(start, (last - start).saturating_add(1)) {
        Some(range) => range,
        None => unreachable!(),
    }
}

impl<const N: usize> Default for Ranges<N> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const N: usize> PartialEq for Ranges<N> {
    fn eq(&self, other: &Self) -> bool {
        self.ranges() == other.ranges()
    }
}

impl<const N: usize> Eq for Ranges<N> {}

impl<const N: usize> fmt::Debug for Ranges<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}
