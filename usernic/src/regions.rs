//! A front-end's memory, as it is mapped here.

use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use iova::{Range, Table};
use rustix::mm::{MapFlags, ProtFlags};
use virtio_ring::Window;

use crate::vhost_user::PeerFd;

/// Regions that are taken at the most: what is said to `GET_MAX_MEM_SLOTS`.
pub(crate) const MAX_REGIONS: usize = 32;

/// Bytes of all regions at the most. Address space is what a front-end can have for nothing, with sparse files: this much
/// leaves enough for the other ports of a process (47 bits on x86-64).
const MAX_BYTES: u64 = 4 << 40;

/// One region, as a vhost-user message describes it.
#[derive(Debug)]
pub(crate) struct Region {
    /// The address that descriptors use.
    pub(crate) guest: u64,
    /// The address that ring addresses use.
    pub(crate) user: u64,
    pub(crate) size: u64,
    /// Where the region begins in the file.
    pub(crate) offset: u64,
    pub(crate) fd: PeerFd,
}

/// Why a region cannot be taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RegionError {
    #[error("region of {size:#x} bytes at {guest:#x}: {what}")]
    Shape { guest: u64, size: u64, what: &'static str },
    #[error(
        "region at {guest:#x} is no file in memory: only those are taken (memfd, tmpfs, hugetlbfs), since a page of anything else can block whoever touches it"
    )]
    NotMemory { guest: u64 },
    #[error("regions of {0:#x} bytes: {MAX_BYTES:#x} are taken at the most")]
    TooLarge(u64),
    #[error("region at {guest:#x} ends at {end:#x} of a file of {len:#x} bytes")]
    Short { guest: u64, end: u64, len: u64 },
    #[error("{tried} of region at {guest:#x}: {source}")]
    System {
        guest: u64,
        tried: &'static str,
        source: std::io::Error,
    },
    #[error("region at {guest:#x} cannot be guarded against truncation: {source}")]
    Guard { guest: u64, source: hugemem::Error },
    #[error("region at {guest:#x}: {source}")]
    Table { guest: u64, source: iova::Error },
}

struct Mapping {
    /// The whole mapping, from the beginning of the page that the region begins in.
    start: NonNull<u8>,
    len: usize,
    guest: u64,
    user: u64,
    size: u64,
    /// The region's first byte.
    ours: u64,
    guard: Option<hugemem::guard::Registration>,
}

// SAFETY: a mapping is memory of the process, whatever the thread.
unsafe impl Send for Mapping {}
// SAFETY: as above; nothing is changed through a shared reference.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.guard = None;
        // SAFETY: mapped by `map`, unmapped once. Whoever used it is stopped: the rings hold an Arc of the Regions.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// All regions of a front-end.
#[derive(Default)]
pub(crate) struct Regions {
    table: Table<MAX_REGIONS>,
    mappings: Vec<Arc<Mapping>>,
}

const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

impl Regions {
    /// Maps a whole table.
    pub(crate) fn map(regions: Vec<Region>) -> Result<Self, RegionError> {
        let mut all = Regions::default();
        for region in regions {
            all.add(region)?;
        }
        Ok(all)
    }

    /// The same regions, to be changed: the mappings are shared.
    pub(crate) fn share(&self) -> Self {
        Regions {
            table: self.table.clone(),
            mappings: self.mappings.clone(),
        }
    }

    /// Maps one more region.
    pub(crate) fn add(&mut self, region: Region) -> Result<(), RegionError> {
        let Region {
            guest,
            user,
            size,
            offset,
            fd,
        } = region;
        let shape = |what| RegionError::Shape { guest, size, what };
        let range = Range::new(guest, size).ok_or(shape("it is empty or wraps around"))?;
        Range::new(user, size).ok_or(shape("its user addresses wrap around"))?;
        let end = offset.checked_add(size).ok_or(shape("its file offset overflows"))?;
        let all = self.mappings.iter().map(|m| m.size).fold(size, u64::saturating_add);
        if all > MAX_BYTES {
            return Err(RegionError::TooLarge(all));
        }
        let fd = fd.into_memory().map_err(|_| RegionError::NotMemory { guest })?;
        let page = check_memory(&fd, guest, end)?;
        let skip = offset % page;
        let len = usize::try_from((skip + size).next_multiple_of(page)).map_err(|_| shape("it is too large"))?;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                &fd,
                offset - skip,
            )
        };
        let start = start.map_err(|e| RegionError::System {
            guest,
            tried: "mmap(2)",
            source: e.into(),
        })?;
        let start = NonNull::new(start.cast::<u8>()).ok_or(shape("it was mapped at address 0"))?;
        // The front-end can truncate its file under us. Where the program installed the guard, that marks the mapping
        // dead instead of ending the process.
        let ours = start.as_ptr() as u64 + skip;
        let mut mapping = Mapping {
            start,
            len,
            guest,
            user,
            size,
            ours,
            guard: None,
        };
        // SAFETY: the mapping was made above, and its registration goes before it does (`Mapping::drop`).
        let guard = unsafe { hugemem::guard::register(start, len, page as usize) };
        mapping.guard = Some(guard.map_err(|source| RegionError::Guard { guest, source })?);
        self.table
            .insert(range, ours)
            .map_err(|source| RegionError::Table { guest, source })?;
        self.mappings.push(Arc::new(mapping));
        Ok(())
    }

    /// Takes out the region at `guest`, of `size` bytes and at `user`. `None`: there is none such.
    pub(crate) fn remove(&mut self, guest: u64, user: u64, size: u64) -> Option<()> {
        let at = self
            .mappings
            .iter()
            .position(|m| (m.guest, m.user, m.size) == (guest, user, size))?;
        self.table.remove(Range::new(guest, size)?).ok()?;
        self.mappings.remove(at);
        Some(())
    }

    /// A segment of this process as a front-end's memory, with borders between regions at these addresses.
    #[cfg(test)]
    pub(crate) fn own(segment: &hugemem::Segment, borders: impl IntoIterator<Item = u64>) -> Self {
        let mut start = segment.base().as_ptr() as u64;
        let end = start + segment.len() as u64;
        let mut all = Regions::default();
        for border in borders.into_iter().chain([end]) {
            all.table
                .insert(Range::new(start, border - start).unwrap(), start)
                .unwrap();
            start = border;
        }
        all
    }

    /// Where the `len` bytes at the front-end's user address `addr` are.
    pub(crate) fn user(&self, addr: u64, len: usize) -> Option<NonNull<u8>> {
        self.mappings.iter().find_map(|m| {
            let at = addr.checked_sub(m.user)?;
            let end = at.checked_add(len as u64)?;
            if end <= m.size {
                NonNull::new((m.ours + at) as *mut u8)
            } else {
                None
            }
        })
    }

    /// Whether a mapping lost its file.
    pub(crate) fn is_dead(&self) -> bool {
        self.mappings
            .iter()
            .any(|m| m.guard.as_ref().is_some_and(|g| g.is_dead()))
    }
}

// SAFETY: the table has only ranges that are mapped whole, for as long as the Regions live; the rings that use them
// hold an Arc.
unsafe impl virtio_ring::Translate for Regions {
    #[inline(always)]
    fn translate(&self, addr: u64, len: u32) -> Option<NonNull<u8>> {
        self.table
            .translate(addr, u64::from(len))
            // SAFETY: `add` puts only mappings into the table, none of which begins at 0 or wraps around.
            .map(|ours| unsafe { NonNull::new_unchecked(ours as *mut u8) })
    }

    fn prefix(&self, addr: u64, len: u32) -> Option<(NonNull<u8>, u32)> {
        let (ours, n) = self.table.prefix(addr, len.into())?;
        // At most `len`.
        Some((NonNull::new(ours as *mut u8)?, n as u32))
    }

    #[inline]
    fn window(&self, addr: u64) -> Option<Window> {
        let region = self.table.region_at(addr)?;
        Some(Window {
            theirs: region.theirs.start(),
            len: region.theirs.len(),
            ours: NonNull::new(region.ours.start() as *mut u8)?,
        })
    }
}

/// Checks that a file in memory is long enough; its page size.
fn check_memory(fd: &OwnedFd, guest: u64, end: u64) -> Result<u64, RegionError> {
    let system = |tried| {
        move |e: rustix::io::Errno| RegionError::System {
            guest,
            tried,
            source: e.into(),
        }
    };
    // Neither of them blocks: the file is one of tmpfs or hugetlbfs.
    let stat = rustix::fs::fstat(fd).map_err(system("fstat(2)"))?;
    let fs = rustix::fs::fstatfs(fd).map_err(system("fstatfs(2)"))?;
    let magic = fs.f_type as u64 & 0xFFFF_FFFF;
    let len = stat.st_size as u64;
    if end > len {
        return Err(RegionError::Short { guest, end, len });
    }
    // Of hugetlbfs, the block size is the page size.
    Ok(if magic == HUGETLBFS_MAGIC {
        fs.f_bsize as u64
    } else {
        page_size()
    })
}

/// Bytes of a plain page.
fn page_size() -> u64 {
    // SAFETY: sysconf(3) takes a number and gives one.
    u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}
