//! Where a port's segment comes from.
//!
//! A port has one segment for its rings and buffers, of the size that they need and no more. It asks a
//! [`MemorySource`] for it; [`Automatic`] is ours, and an application can bring its own (a segment on a device's node, a
//! file that another process must find).
//!
//! | `memory=` | what it is | what it needs |
//! |---|---|---|
//! | `memfd-huge` | a memfd of 2 MiB pages, sealed | free huge pages, no mount, no privilege |
//! | `hugetlbfs` | an unlinked file in a mount of hugetlbfs, which cannot be sealed (see [`hugemem::guard`]) | a mount that we may write to |
//! | `memfd` | a memfd of plain pages, sealed | nothing |
//! | `auto` | the first of these that works | nothing |
//!
//! `auto` looks once whether any huge page is free, which costs three system calls, and says in its [`Choice`] why it
//! took nothing better. An explicit choice never falls back: if it cannot be had, the [`Error`] names the limit that
//! bit and what to do. All pages are there when the segment is; a shortage is never a SIGBUS later.

mod automatic;
mod choice;
mod error;
pub(crate) mod limits;
pub(crate) mod mounts;
#[cfg(test)]
mod tests;

pub use automatic::Automatic;
pub use choice::Choice;
pub use error::{Error, Limit};

use hugemem::Segment;

/// What a port asks for.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Bytes needed, at least 1. The segment may be larger, by less than a page.
    pub len: usize,
    /// What the memory is called in `/proc/PID/maps`.
    pub name: &'a str,
    /// The NUMA node that all of it must be on.
    pub numa: Option<u32>,
}

/// What a port gets.
#[derive(Debug)]
pub struct Allocation {
    /// The memory, populated.
    pub segment: Segment,
    /// What it is and why.
    pub choice: Choice,
}

/// Gives memory to ports.
///
/// ```
/// use hugemem::{PageSize, Segment};
/// use usernic::memory::{Allocation, Choice, Error, MemorySource, Request};
///
/// /// Plain memory, always.
/// struct Plain;
///
/// impl MemorySource for Plain {
///     fn allocate(&mut self, request: &Request<'_>) -> Result<Allocation, Error> {
///         let segment = Segment::memfd(c"plain", request.len, PageSize::BASE, request.numa).map_err(Error::source)?;
///         Ok(Allocation { choice: Choice::new("plain", segment.page_size()), segment })
///     }
/// }
///
/// let allocation = Plain.allocate(&Request { len: 100_000, name: "port", numa: None })?;
/// assert!(allocation.segment.len() >= 100_000);
/// # Ok::<(), Error>(())
/// ```
pub trait MemorySource {
    /// Makes a segment of at least `request.len` bytes, all of it populated, with a file descriptor that can be handed
    /// to a peer.
    ///
    /// # Errors
    /// [`Error`]; what was made until then is given back.
    fn allocate(&mut self, request: &Request<'_>) -> Result<Allocation, Error>;
}

/// Asks a source for memory, and looks at what it gives: a source is safe to write, and rings are put there.
pub(crate) fn allocate(source: &mut dyn MemorySource, request: &Request<'_>) -> Result<Allocation, Error> {
    let allocation = source.allocate(request)?;
    let (given, asked) = (allocation.segment.len(), request.len);
    if given < asked {
        return Err(Error::source(format!(
            "the memory source gave {given} bytes where {asked} were asked for"
        )));
    }
    Ok(allocation)
}
