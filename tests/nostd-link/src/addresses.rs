//! `iova`: a table of regions.

use iova::{Range, Table};

use crate::{Outcome, check};

/// Checks 10 to 19. `seed` is not known at compile time.
///
/// # Errors
/// The number of the check.
pub fn run(seed: u64) -> Outcome {
    let base = 0x10_0000 + (seed & 0xfff);
    let mut table = Table::<8>::new();
    let first = Range::new(base, 0x20_0000).ok_or(10)?;
    check(table.insert(first, 0x7f00_0000_0000).is_ok(), 11)?;
    check(table.insert(first, 0x7e00_0000_0000).is_err(), 12)?;
    check(table.translate(base + 64, 1500) == Some(0x7f00_0000_0040), 13)?;
    check(table.translate(base + 0x1f_ffff, 2).is_none(), 14)?;
    check(table.reverse(0x7f00_0000_0040, 1500) == Some(base + 64), 15)?;
    check(table.remove(first).is_ok() && table.is_empty(), 16)
}
