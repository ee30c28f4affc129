#![no_std]
//! Shared packet memory: segments, an arena for rings, pools of packet buffers.
//!
//! ```text
//!   Segment   one mapping of one file, populated: a shortage is an error now and never a SIGBUS later
//!     |
//!     +-- Arena    hands out aligned offsets, for rings
//!     +-- Slab     the rest, cut into equal buffers
//!           |
//!         Pool     the free buffers, for all threads; lock-free, in bulks
//!           |
//!         Cache    one thread's own few of them; get and put are a handful of instructions
//!
//!   guard     opt-in: a mapping that somebody truncates dies, the process does not
//! ```
//!
//! The segment holds what is shared and nothing else: rings and packet bytes. Free lists and ownership are in private
//! memory that the pool maps for itself, because the other side of a shared file can write all of it.
//!
//! The crate is Linux only, uses `libc` for system calls, and neither `std` nor an allocator.
//!
//! # Example
//!
//! ```
//! use hugemem::{Arena, Cache, PageSize, Pool, Segment, Slab};
//!
//! # fn main() -> Result<(), hugemem::Error> {
//! // 1 MiB of plain shared memory; PageSize::HUGE_2M asks for huge pages.
//! let segment = Segment::memfd(c"example", 1 << 20, PageSize::BASE, None)?;
//!
//! // Rings first, each on lines of its own.
//! let mut arena = Arena::new(0..segment.len());
//! let ring = arena.alloc(6 * 256 + 16 * 256, 4096).unwrap();
//! assert_eq!(ring.start % 4096, 0);
//!
//! // Packet buffers in the rest.
//! let buffers = arena.alloc(128 * 2048, 64).unwrap();
//! // SAFETY: the range is inside the segment, which outlives the pool, and nobody else uses it.
//! let pool = unsafe {
//!     let base = segment.base().add(buffers.start);
//!     Pool::new(Slab { base, buffer_size: 2048, count: 128, headroom: 128 })?
//! };
//!
//! let mut cache: Cache<&Pool> = Cache::new(&pool);
//! let id = cache.get().unwrap();
//! assert_eq!(pool.id_of(pool.ptr(id).unwrap().as_ptr()), Some(id));
//! cache.put(id).unwrap();
//! assert!(cache.put(id).is_err(), "it is free already");
//! # Ok(())
//! # }
//! ```

#[cfg(any(test, loom))]
extern crate std;

mod arena;
mod cache;
mod error;
pub mod guard;
mod page;
mod pool;
mod segment;
mod stack;
mod sys;

pub use arena::Arena;
pub use cache::Cache;
pub use error::{Error, PutError};
pub use page::PageSize;
pub use pool::{MAX_BUFFERS, Pool, Slab};
pub use segment::Segment;

/// The README's example is compiled and run as well.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
