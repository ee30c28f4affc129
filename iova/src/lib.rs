#![cfg_attr(not(feature = "vfio"), no_std)]
#![cfg_attr(not(feature = "vfio"), forbid(unsafe_code))]
//! Address spaces of devices and peers: ranges, and the table that translates theirs to ours.
//!
//! A vhost-user front-end names packets by addresses of its own; a device behind an IOMMU by I/O virtual addresses. The
//! side that follows such an address must know, for each, whether it and *all* the bytes behind it are inside of
//! something that was shared, and where that is here. The addresses come from somebody who is not trusted: every
//! arithmetic in this crate is checked, nothing panics, and nothing takes longer than a binary search.
//!
//! - [`Range`]: some addresses; never empty, never beyond the end of the address space.
//! - [`Table`]: up to `N` regions, theirs and ours; refuses those that overlap. No allocation, no `unsafe`.
//! - [`Hint`]: which region was hit last, kept by the one who asks.
//! - [`Ranges`]: a set of addresses, what touches joined.
//! - [`Allocator`]: gives out addresses of a device whose address space is smaller than ours.
//!
//! ```
//! use iova::{Range, Table};
//!
//! let mut table = Table::<8>::new();
//! // 2 MiB at 0x10_0000 of the peer are mapped here at 0x7f00_0000_0000.
//! table.insert(Range::new(0x10_0000, 0x20_0000).unwrap(), 0x7f00_0000_0000).unwrap();
//!
//! assert_eq!(table.translate(0x10_0040, 1500), Some(0x7f00_0000_0040));
//! assert_eq!(table.reverse(0x7f00_0000_0040, 1500), Some(0x10_0040));
//! // The first byte is inside, the last is not.
//! assert_eq!(table.translate(0x2f_ffff, 2), None);
//! assert_eq!(table.translate(u64::MAX, 2), None);
//! ```

mod allocator;
mod range;
mod ranges;
mod table;
#[cfg(feature = "vfio")]
pub mod vfio;

pub use allocator::{Allocator, AllocatorError};
pub use range::Range;
pub use ranges::{Ranges, TooManyRanges};
pub use table::{Error, Hint, Region, Table};

/// The README's example is compiled and run as well.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
