//! What can go wrong, so that a caller can say what to do about it.

use core::fmt;

/// Why memory could not be had. An `errno` is the one of the call that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The length is 0, or its multiple of the page size does not fit the address space.
    Length,
    /// The kernel has no huge pages of this size.
    PageSize {
        /// Bytes of the page that was asked for.
        page: usize,
    },
    /// `memfd_create(2)` failed.
    Create {
        /// See `memfd_create(2)`.
        errno: i32,
    },
    /// The file could not be examined or given its length (`fstatfs(2)`, `ftruncate(2)`).
    Resize {
        /// See `ftruncate(2)`.
        errno: i32,
    },
    /// The memfd could not be sealed against truncation.
    Seal {
        /// See `fcntl(2)`, `F_ADD_SEALS`.
        errno: i32,
    },
    /// `mmap(2)` failed for a reason that is not a shortage of pages.
    Map {
        /// See `mmap(2)`.
        errno: i32,
    },
    /// There are not enough pages: free huge pages, the `size=` of a mount, or a cgroup's limit.
    Shortage {
        /// Bytes that were asked for.
        len: usize,
        /// Bytes of a page.
        page: usize,
        /// ENOMEM: the pool of huge pages or the mount cannot promise them. EFAULT or ENOSPC: they were promised but
        /// cannot be had, as under a limit of the hugetlb cgroup, or of one NUMA node.
        errno: i32,
    },
    /// The kernel refuses to bind memory to this NUMA node.
    Numa {
        /// The node that was asked for.
        node: u32,
        /// EINVAL: no such node; EPERM or ENOSYS: a container's filter forbids `mbind(2)`.
        errno: i32,
    },
    /// A slab that is none: no buffers or more than [`MAX_BUFFERS`](crate::MAX_BUFFERS), a headroom as large as the
    /// buffers, or more bytes than there are addresses.
    Slab,
    /// The guard has no memory to watch more mappings.
    GuardFull,
    /// The handler of SIGBUS could not be installed.
    Signal {
        /// See `sigaction(2)`.
        errno: i32,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Error::Length => f.write_str("the length is zero or too large"),
            Error::PageSize { page } => write!(f, "the kernel has no huge pages of {} KiB", page >> 10),
            Error::Create { errno } => write!(f, "memfd_create failed (errno {errno})"),
            Error::Resize { errno } => write!(f, "the file could not be given its length (errno {errno})"),
            Error::Seal { errno } => write!(f, "the memfd could not be sealed (errno {errno})"),
            Error::Map { errno } => write!(f, "mmap failed (errno {errno})"),
            Error::Shortage { len, page, errno } => {
                write!(
                    f,
                    "not enough memory for {len} bytes in pages of {} KiB (errno {errno})",
                    page >> 10
                )
            }
            Error::Numa { node, errno } => write!(f, "memory cannot be bound to NUMA node {node} (errno {errno})"),
            Error::Slab => f.write_str("the slab's count, size and headroom do not make buffers"),
            Error::GuardFull => f.write_str("the SIGBUS guard has no memory to watch one more mapping"),
            Error::Signal { errno } => write!(f, "the SIGBUS handler could not be installed (errno {errno})"),
        }
    }
}

impl core::error::Error for Error {}

/// A buffer that cannot be put into this pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PutError {
    /// No buffer of this pool has this number.
    Foreign(u32),
    /// The buffer is in the pool, or in a cache, already.
    Double(u32),
}

impl fmt::Display for PutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PutError::Foreign(id) => write!(f, "buffer {id} is not of this pool"),
            PutError::Double(id) => write!(f, "buffer {id} is free already"),
        }
    }
}

impl core::error::Error for PutError {}
