//! An address space of devices, and what of ours is in it.

use std::fmt;
use std::io;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::limits::Limits;
use super::{Charge, Error, Host, Memlock};
use crate::{Allocator, AllocatorError, Range, Ranges};

/// What a device may do with memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Access {
    /// Read it.
    Read,
    /// Write it.
    Write,
    /// Both: rings and packet buffers.
    ReadWrite,
}

impl Access {
    /// (read, write)
    pub(super) fn directions(self) -> (bool, bool) {
        (self != Access::Write, self != Access::Read)
    }
}

/// The addresses at which a device finds memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Placement {
    /// Ours, if the device reaches them and nothing else is there; the lowest that are free if not.
    Auto,
    /// Ours.
    Identity,
    /// The lowest that are free.
    Lowest,
    /// From this address on.
    At(u64),
}

/// How addresses are mapped: the container interface and iommufd are two ways to the same thing.
pub trait Mapper: Send + Sync {
    /// The interface's name, for people.
    fn name(&self) -> &'static str;

    /// What a mapping must keep to now.
    ///
    /// # Errors
    /// Those of the query.
    fn limits(&self) -> Result<Limits, Error>;

    /// Maps `iova` to as many bytes of our memory from `addr` on, in one call.
    ///
    /// # Safety
    /// As for [`Space::map`].
    ///
    /// # Errors
    /// Those of the call.
    unsafe fn map(&self, iova: Range, addr: NonNull<u8>, access: Access) -> io::Result<()>;

    /// Takes a mapping back, and says how many bytes that were.
    ///
    /// # Errors
    /// Those of the call.
    fn unmap(&self, iova: Range) -> io::Result<u64>;

    /// The IOMMU group of the devices, if it is known: what is reserved there has a name.
    fn group(&self) -> Option<u32>;

    /// Whether this error of [`map`](Self::map) means that there are too many mappings.
    fn is_full(&self, error: &io::Error) -> bool;

    /// The one address that memory can have. `None`: any that is free.
    ///
    /// # Errors
    /// [`Error::Physical`].
    fn fixed(&self, addr: NonNull<u8>, len: u64) -> Result<Option<u64>, Error> {
        let _ = (addr, len);
        Ok(None)
    }
}

/// An address space in which devices find memory of ours.
///
/// Each [`map`](Self::map) is one call to the kernel, whatever the length: what is contiguous is mapped at once. The
/// answer is a guard: dropping it takes the memory from the devices. Clones are the same space, which lives as long as
/// one of them or of its mappings.
#[derive(Clone)]
pub struct Space {
    inner: Arc<Inner>,
}

struct Inner {
    host: Host,
    mapper: Box<dyn Mapper>,
    page: u64,
    state: Mutex<State>,
}

struct State {
    allocator: Allocator,
    /// Bytes that are mapped.
    bytes: u64,
}

impl Space {
    /// A space that `mapper` maps into. Addresses of more than `width` bits are not used (64 for all).
    ///
    /// # Errors
    /// Those of [`Mapper::limits`].
    pub fn new(host: &Host, mapper: impl Mapper + 'static, width: u32) -> Result<Self, Error> {
        let limits = mapper.limits()?;
        let mut usable = limits.usable.clone();
        if let Some(first) = 1u64.checked_shl(width)
            && let Some(beyond) = Range::new(first, u64::MAX - first)
        {
            // What is cut off at the end needs no room.
            let _ = usable.remove(beyond);
        }
        // A page at address 0 would look like none to many a device.
        if let Some(null) = Range::new(0, limits.page()) {
            let _ = usable.remove(null);
        }
        Ok(Space {
            inner: Arc::new(Inner {
                host: host.clone(),
                mapper: Box::new(mapper),
                page: limits.page(),
                state: Mutex::new(State {
                    allocator: Allocator::new(usable),
                    bytes: 0,
                }),
            }),
        })
    }

    /// The interface's name: `VFIO type1v2`, `iommufd`, `noiommu`.
    pub fn interface(&self) -> &'static str {
        self.inner.mapper.name()
    }

    /// The addresses that may be used, mapped or not.
    pub fn usable(&self) -> Ranges {
        self.inner.state().allocator.usable().clone()
    }

    /// Bytes of the smallest page: memory is mapped in multiples of it.
    pub fn page(&self) -> u64 {
        self.inner.page
    }

    /// Bytes that are mapped.
    pub fn mapped(&self) -> u64 {
        self.inner.state().bytes
    }

    /// Gives the devices of this space `len` bytes of memory from `addr` on.
    ///
    /// Address and length are multiples of [`page`](Self::page). The kernel pins the memory; what that needs is looked
    /// at before: RLIMIT_MEMLOCK, the addresses that are usable, the mappings that there may be.
    ///
    /// # Safety
    /// Until the mapping is gone, a device may read and write these bytes at any moment (as far as `access` allows): they
    /// are mapped memory of this process all that time, and nothing that Rust takes for its own is in them.
    ///
    /// # Errors
    /// Nothing is mapped then. [`Error::Unaligned`], [`Error::NoAddress`], [`Error::ReservedRegion`],
    /// [`Error::Unreachable`], [`Error::Memlock`], [`Error::Entries`], [`Error::System`].
    pub unsafe fn map(
        &self,
        addr: NonNull<u8>,
        len: usize,
        placement: Placement,
        access: Access,
    ) -> Result<Mapping, Error> {
        let inner = &self.inner;
        let (ours, len) = (addr.as_ptr().addr() as u64, len as u64);
        // Held over the call: two threads must not both find the last entry free.
        let mut state = inner.state();
        let placement = match inner.mapper.fixed(addr, len)? {
            Some(fixed) => Placement::At(fixed),
            None => placement,
        };
        let iova = inner.place(&mut state.allocator, ours, len, placement)?;
        let done = inner.check(&state, iova).and_then(|()| {
            // SAFETY: the caller's promise.
            unsafe { inner.mapper.map(iova, addr, access) }.map_err(|error| inner.explain(&state, iova, error))
        });
        match done {
            Ok(()) => {
                state.bytes += len;
                Ok(Mapping {
                    inner: Arc::clone(inner),
                    iova,
                    addr: ours,
                    mapped: true,
                })
            }
            Err(error) => {
                let _ = state.allocator.release(iova);
                Err(error)
            }
        }
    }

    /// Gives the devices of this space memory in pieces, pages for example. Pieces that lie side by side are one mapping:
    /// one call to the kernel, one of the mappings that there may be.
    ///
    /// # Safety
    /// As for [`map`](Self::map), for each piece.
    ///
    /// # Errors
    /// As for [`map`](Self::map); nothing is mapped then.
    pub unsafe fn map_all(
        &self,
        pieces: &[(NonNull<u8>, usize)],
        placement: Placement,
        access: Access,
    ) -> Result<Vec<Mapping>, Error> {
        let mut pieces = pieces.to_vec();
        pieces.sort();
        let mut joined: Vec<(NonNull<u8>, usize)> = Vec::new();
        for (addr, len) in pieces {
            match joined.last_mut() {
                Some((first, so_far)) if first.addr().get() + *so_far == addr.addr().get() => *so_far += len,
                _ => joined.push((addr, len)),
            }
        }
        joined
            .into_iter()
            // SAFETY: the caller's promise, for all of the pieces that were joined.
            .map(|(addr, len)| unsafe { self.map(addr, len, placement, access) })
            .collect()
    }
}

impl fmt::Debug for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Space")
            .field("interface", &self.interface())
            .field("usable", &self.usable())
            .field("mapped", &self.mapped())
            .finish()
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves the state whole: it is changed last.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes addresses for memory at `ours`.
    fn place(&self, allocator: &mut Allocator, ours: u64, len: u64, placement: Placement) -> Result<Range, Error> {
        let wanted = match placement {
            Placement::At(iova) => iova,
            _ => ours,
        };
        let unaligned = Error::Unaligned {
            addr: ours,
            len,
            iova: wanted,
            page: self.page,
        };
        if (ours | len | wanted) & (self.page - 1) != 0 {
            return Err(unaligned);
        }
        let range = Range::new(wanted, len).ok_or(unaligned)?;
        if placement != Placement::Lowest {
            match (allocator.claim(range), placement) {
                (Ok(()), _) => return Ok(range),
                (Err(AllocatorError::Unusable | AllocatorError::Taken(_)), Placement::Auto) => {}
                (Err(AllocatorError::Unusable), _) => return Err(self.unusable(allocator, range)),
                (Err(source), _) => return Err(Error::NoAddress { len, source }),
            }
        }
        // Aligned as our addresses are, up to 1 GiB: the IOMMU then has use for its larger pages.
        let shift = ours.trailing_zeros().min(len.ilog2()).min(30);
        allocator
            .allocate(len, self.page.max(1 << shift))
            .or_else(|error| match error {
                AllocatorError::Exhausted => allocator.allocate(len, self.page),
                error => Err(error),
            })
            .map_err(|source| Error::NoAddress { len, source })
    }

    /// Why addresses cannot be used.
    fn unusable(&self, allocator: &Allocator, iova: Range) -> Error {
        let usable = allocator.usable().iter().collect();
        let group = self.mapper.group();
        let reserved = group.map(|g| self.host.reserved_regions(g)).unwrap_or_default();
        match reserved.into_iter().find(|r| r.range.overlaps(iova)) {
            Some(reserved) => Error::ReservedRegion { iova, reserved, usable },
            None => Error::Unreachable { iova, usable },
        }
    }

    /// Looks at the limits before they bite.
    fn check(&self, state: &State, iova: Range) -> Result<(), Error> {
        let limits = self.mapper.limits()?;
        if limits.entries == Some(0) {
            return Err(self.full(state));
        }
        let memlock = Memlock::read(&self.host);
        let locked = match limits.charge {
            Charge::Process => memlock.locked,
            Charge::User => state.bytes,
            Charge::Nobody => return Ok(()),
        };
        match memlock.limit {
            Some(limit) if locked.saturating_add(iova.len()) > limit => Err(Error::Memlock {
                len: iova.len(),
                locked,
                limit,
            }),
            _ => Ok(()),
        }
    }

    /// What an error of the kernel means.
    fn explain(&self, state: &State, iova: Range, source: io::Error) -> Error {
        if self.mapper.is_full(&source) {
            return self.full(state);
        }
        let why = match source.raw_os_error() {
            Some(libc::EEXIST) => " (something of this process is mapped there already)",
            Some(libc::ENOMEM) => " (no memory, or RLIMIT_MEMLOCK: other processes of this user may have locked some)",
            Some(libc::EFAULT) => " (there is no memory of ours)",
            _ => "",
        };
        Error::System {
            tried: format!("map {iova:?} with {}{why}", self.mapper.name()),
            source,
        }
    }

    fn full(&self, state: &State) -> Error {
        // The range that is about to be mapped is among those that are out.
        let used = state.allocator.used().len() - 1;
        Error::Entries { used }
    }

    fn unmap(&self, iova: Range) -> Result<(), Error> {
        let mut state = self.state();
        // What may still be mapped keeps its addresses: nobody else must get them.
        let unmapped = self.mapper.unmap(iova).map_err(|source| Error::System {
            tried: format!("unmap {iova:?} with {}", self.mapper.name()),
            source,
        })?;
        if unmapped != iova.len() {
            return Err(Error::PartialUnmap { iova, unmapped });
        }
        state.bytes -= iova.len();
        let _ = state.allocator.release(iova);
        Ok(())
    }
}

/// Memory that devices reach. Dropping it ends that, before the memory can be given back.
pub struct Mapping {
    inner: Arc<Inner>,
    iova: Range,
    addr: u64,
    mapped: bool,
}

impl Mapping {
    /// Where devices find it.
    pub fn iova(&self) -> Range {
        self.iova
    }

    /// Where it is in our memory.
    pub fn addr(&self) -> u64 {
        self.addr
    }

    /// Takes the memory from the devices. Dropping does it too, and tells no error.
    ///
    /// # Errors
    /// [`Error::System`], [`Error::PartialUnmap`]: devices may still reach the memory, until the space is gone.
    pub fn unmap(mut self) -> Result<(), Error> {
        self.mapped = false;
        self.inner.unmap(self.iova)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.mapped {
            let _ = self.inner.unmap(self.iova);
        }
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapping({:?} at {:#x})", self.iova, self.addr)
    }
}
