//! One mapping, all of it there.

use core::ffi::CStr;
use core::ptr::NonNull;

use libc::c_int;

use crate::{Error, PageSize, sys};

/// From this length on the base is aligned to it, so that transparent huge pages can serve the mapping.
const THP: usize = 2 << 20;

/// One mapping, readable and writable, of one file, or of private anonymous memory.
///
/// - **Populated**: every page is there when the constructor returns, so that a shortage is an
///   [`Error::Shortage`] and not a SIGBUS at the first packet.
/// - **It stays there**: memfds are sealed against shrinking, growing and further seals. A file of hugetlbfs cannot be
///   sealed: whoever else has its descriptor can truncate it, which is what [`guard`](crate::guard) is for.
/// - **Aligned**: the base to the page size, and to 2 MiB from 2 MiB on. The length is rounded up to a page.
/// - **Given back**: `Drop` unmaps and closes. A file must have been unlinked by its maker, and then nothing is left
///   behind, not even after `SIGKILL`.
///
/// # After fork
///
/// A child inherits a shared mapping, and must not use rings in it that its parent drives. `MADV_DONTFORK` would take
/// the mapping from the child, but then dropping the segment there would unmap whatever the child has put at those
/// addresses since; and programs that become daemons after they opened their ports would lose them. The child of a
/// `fork` that executes another program keeps nothing: mappings end and descriptors are close-on-exec. Anonymous memory
/// is copied on write; what a device has pinned stays the parent's (Linux 5.12).
#[derive(Debug)]
pub struct Segment {
    base: NonNull<u8>,
    len: usize,
    page: PageSize,
    fd: c_int,
}

// SAFETY: a mapping belongs to the process, not to a thread. The segment gives out its address and nothing else.
unsafe impl Send for Segment {}
// SAFETY: as above; no method changes anything.
unsafe impl Sync for Segment {}

/// Closes a descriptor unless it found a home.
struct Fd(c_int);

impl Drop for Fd {
    fn drop(&mut self) {
        if self.0 >= 0 {
            sys::close(self.0);
        }
    }
}

impl Segment {
    /// Shared memory of `len` bytes without a file, on pages of this size; sealed.
    ///
    /// `name` is seen in `/proc/self/maps`; at most 249 bytes. `numa` binds the memory to a node.
    ///
    /// # Errors
    /// [`Error::PageSize`], [`Error::Create`] and [`Error::Shortage`] above all; any but the guard's.
    pub fn memfd(name: &CStr, len: usize, page: PageSize, numa: Option<u32>) -> Result<Self, Error> {
        let len = round(len, page)?;
        let fd = Fd(create(name, page)?);
        sys::ftruncate(fd.0, len).map_err(|errno| match errno {
            libc::ENOMEM | libc::ENOSPC => Error::Shortage {
                len,
                page: page.bytes(),
                errno,
            },
            errno => Error::Resize { errno },
        })?;
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        sys::add_seals(fd.0, seals).map_err(|errno| Error::Seal { errno })?;
        Self::map(fd, len, page, numa, Populate::Advise)
    }

    /// A file, whose length becomes `len`, rounded up to a page of the file system that it is on. Of hugetlbfs the pages
    /// are huge.
    ///
    /// The descriptor is the segment's, and is closed on an error as well. The caller has unlinked the file.
    ///
    /// # Safety
    /// `fd` is open and nothing else closes it.
    ///
    /// # Errors
    /// Any but [`Error::Create`], [`Error::Seal`] and the guard's.
    pub unsafe fn file(fd: c_int, len: usize, numa: Option<u32>) -> Result<Self, Error> {
        let fd = Fd(fd);
        let page = match sys::huge_page_of(fd.0).map_err(|errno| Error::Resize { errno })? {
            Some(bytes) => PageSize::huge(bytes).ok_or(Error::PageSize { page: bytes })?,
            None => PageSize::BASE,
        };
        let len = round(len, page)?;
        sys::ftruncate(fd.0, len).map_err(|errno| match errno {
            libc::ENOMEM | libc::ENOSPC => Error::Shortage {
                len,
                page: page.bytes(),
                errno,
            },
            errno => Error::Resize { errno },
        })?;
        Self::map(fd, len, page, numa, Populate::Advise)
    }

    /// Memory that is this process's own.
    ///
    /// # Errors
    /// [`Error::Length`], [`Error::PageSize`], [`Error::Map`], [`Error::Numa`], [`Error::Shortage`].
    pub fn anonymous(len: usize, page: PageSize, numa: Option<u32>) -> Result<Self, Error> {
        Self::map(Fd(-1), round(len, page)?, page, numa, Populate::Advise)
    }

    fn map(mut fd: Fd, len: usize, page: PageSize, numa: Option<u32>, populate: Populate) -> Result<Self, Error> {
        let shortage = |errno| Error::Shortage {
            len,
            page: page.bytes(),
            errno,
        };
        let flags = match (fd.0 < 0, page.is_huge()) {
            (false, _) => libc::MAP_SHARED,
            (true, false) => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            (true, true) => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | page.flag() as c_int,
        };
        let base = map_aligned(len, page, flags, fd.0).map_err(|errno| match errno {
            libc::ENOMEM => shortage(errno),
            libc::EINVAL | libc::ENODEV | libc::ENOENT if page.is_huge() => Error::PageSize { page: page.bytes() },
            errno => Error::Map { errno },
        })?;
        // From here on the segment owns both, and gives them back if one of the next steps fails.
        let segment = Segment {
            base,
            len,
            page,
            fd: core::mem::replace(&mut fd.0, -1),
        };
        if let Some(node) = numa {
            sys::mbind(base, len, node).map_err(|errno| Error::Numa { node, errno })?;
        }
        if !page.is_huge() && len >= THP {
            // Refused by kernels without transparent huge pages, where it would not help either.
            // SAFETY: our mapping; the advice keeps its content.
            let _ = unsafe { sys::madvise(base, len, libc::MADV_HUGEPAGE) };
        }
        segment.populate(flags, populate).map_err(shortage)?;
        Ok(segment)
    }

    fn populate(&self, flags: c_int, populate: Populate) -> Result<(), i32> {
        if populate == Populate::Advise {
            // SAFETY: our mapping; populating keeps its content.
            match unsafe { sys::madvise(self.base, self.len, libc::MADV_POPULATE_WRITE) } {
                // Linux before 5.14 does not know this advice.
                Err(libc::EINVAL) => {}
                other => return other,
            }
        }
        if self.fd >= 0 {
            // Once the file has its pages, no access can fail for want of one.
            sys::fallocate(self.fd, self.len)?;
        }
        // MAP_POPULATE tells of no shortage, so look.
        // SAFETY: replaces our own mapping, which nobody has seen yet, by the same.
        unsafe { sys::mmap_at(self.base, self.len, PROT, flags | libc::MAP_POPULATE, self.fd) }?;
        if sys::resident(self.base, self.len, self.page.bytes()) {
            Ok(())
        } else {
            Err(libc::EFAULT)
        }
    }

    /// The first byte. Valid for [`len`](Self::len) bytes as long as the segment lives.
    ///
    /// The bytes are shared with whoever has the descriptor: read and write them by copy, or atomically.
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Bytes, a multiple of the page size; never 0.
    #[allow(clippy::len_without_is_empty, reason = "a segment is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The pages it is made of.
    pub fn page_size(&self) -> PageSize {
        self.page
    }

    /// The file, for a peer; `None` for anonymous memory. It stays the segment's: duplicate it to keep it.
    pub fn fd(&self) -> Option<c_int> {
        (self.fd >= 0).then_some(self.fd)
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: made in `map`; whoever was given the address was told that it ends with the segment.
        unsafe { sys::munmap(self.base, self.len) };
        if self.fd >= 0 {
            sys::close(self.fd);
        }
    }
}

/// How the pages get there.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Populate {
    /// `MADV_POPULATE_WRITE`, and if the kernel does not know it, `Allocate`.
    Advise,
    /// `fallocate(2)`, then `MAP_POPULATE`, then `mincore(2)`.
    #[cfg_attr(
        not(test),
        allow(dead_code, reason = "the older kernel's way, which tests take directly")
    )]
    Allocate,
}

const PROT: c_int = libc::PROT_READ | libc::PROT_WRITE;

fn round(len: usize, page: PageSize) -> Result<usize, Error> {
    let rounded = len.checked_next_multiple_of(page.bytes()).ok_or(Error::Length)?;
    if len == 0 || rounded > isize::MAX as usize {
        Err(Error::Length)
    } else {
        Ok(rounded)
    }
}

fn create(name: &CStr, page: PageSize) -> Result<c_int, Error> {
    let mut flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    if page.is_huge() {
        flags |= libc::MFD_HUGETLB | page.flag();
    }
    // Never executable: asked for by vm.memfd_noexec=2, not known before Linux 6.3.
    let made = match sys::memfd_create(name, flags | libc::MFD_NOEXEC_SEAL) {
        Err(libc::EINVAL) => sys::memfd_create(name, flags),
        other => other,
    };
    made.map_err(|errno| match errno {
        libc::ENODEV | libc::ENOENT | libc::EINVAL | libc::ENOSYS if page.is_huge() => {
            Error::PageSize { page: page.bytes() }
        }
        errno => Error::Create { errno },
    })
}

/// Maps at a multiple of the page size, or of 2 MiB from 2 MiB on.
fn map_aligned(len: usize, page: PageSize, flags: c_int, fd: c_int) -> Result<NonNull<u8>, i32> {
    // Huge pages are aligned by the kernel, and it often aligns the others too.
    let base = sys::mmap(len, PROT, flags, fd)?;
    if page.is_huge() || len < THP || base.addr().get().is_multiple_of(THP) {
        return Ok(base);
    }
    // SAFETY: our own mapping, just made.
    unsafe { sys::munmap(base, len) };
    // Reserve enough addresses to have an aligned start among them, and give the rest back.
    let whole = len.checked_add(THP).ok_or(libc::ENOMEM)?;
    let none = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let reserved = sys::mmap(whole, libc::PROT_NONE, none, -1)?;
    let before = (reserved.as_ptr() as usize).next_multiple_of(THP) - reserved.as_ptr() as usize;
    // SAFETY: before <= THP, so all pointers are inside the reserved range.
    let (base, end) = unsafe { (reserved.add(before), reserved.add(before + len)) };
    // SAFETY: inside the reservation, which is ours.
    if let Err(errno) = unsafe { sys::mmap_at(base, len, PROT, flags, fd) } {
        // SAFETY: the whole reservation is ours, whatever became of its middle.
        unsafe { sys::munmap(reserved, whole) };
        return Err(errno);
    }
    if before > 0 {
        // SAFETY: the part of the reservation before the mapping.
        unsafe { sys::munmap(reserved, before) };
    }
    if before < THP {
        // SAFETY: the part of the reservation after the mapping.
        unsafe { sys::munmap(end, THP - before) };
    }
    Ok(base)
}

#[cfg(test)]
mod tests {
    use std::string::String;

    use super::*;

    const MIB: usize = 1 << 20;

    /// The line of /proc/self/maps with this address, if any.
    fn map_of(address: usize) -> Option<String> {
        std::fs::read_to_string("/proc/self/maps")
            .unwrap()
            .lines()
            .find_map(|line| {
                let (range, _) = line.split_once(' ')?;
                let (start, end) = range.split_once('-')?;
                let number = |text| usize::from_str_radix(text, 16).unwrap();
                (number(start)..number(end)).contains(&address).then(|| line.into())
            })
    }

    fn check(segment: &Segment, len: usize) {
        let page = segment.page_size().bytes();
        assert!(segment.len() >= len && segment.len() < len + page && segment.len().is_multiple_of(page));
        let base = segment.base().as_ptr();
        assert_eq!(base as usize % if len >= THP { THP } else { page }, 0);
        assert!(sys::resident(segment.base(), segment.len(), page), "not populated");
        for offset in [0, len - 1, segment.len() - 1] {
            // SAFETY: inside of the segment, which nobody else has.
            unsafe {
                assert_eq!(base.add(offset).read_volatile(), 0);
                base.add(offset).write_volatile(7);
                assert_eq!(base.add(offset).read_volatile(), 7);
                base.add(offset).write_volatile(0);
            }
        }
    }

    #[test]
    fn plain_memory_is_there_and_aligned() {
        // Several at a time, so that not all are aligned by chance.
        for len in [1, 4096, 4097, 2 * MIB - 1, 2 * MIB, 3 * MIB + 5] {
            let segments: [_; 3] =
                core::array::from_fn(|_| Segment::memfd(c"plain", len, PageSize::BASE, None).unwrap());
            segments.iter().for_each(|segment| check(segment, len));
            let anonymous = Segment::anonymous(len, PageSize::BASE, None).unwrap();
            check(&anonymous, len);
            assert_eq!(anonymous.fd(), None);
        }
    }

    #[test]
    fn the_way_of_older_kernels() {
        for len in [1, 3 * MIB] {
            let fd = Fd(create(c"older", PageSize::BASE).unwrap());
            let len = round(len, PageSize::BASE).unwrap();
            sys::ftruncate(fd.0, len).unwrap();
            check(
                &Segment::map(fd, len, PageSize::BASE, None, Populate::Allocate).unwrap(),
                len,
            );
            check(
                &Segment::map(Fd(-1), len, PageSize::BASE, None, Populate::Allocate).unwrap(),
                len,
            );
        }
    }

    #[test]
    fn a_memfd_cannot_be_truncated() {
        let segment = Segment::memfd(c"sealed", 8192, PageSize::BASE, None).unwrap();
        let fd = segment.fd().unwrap();
        assert_eq!(sys::ftruncate(fd, 4096), Err(libc::EPERM));
        assert_eq!(sys::ftruncate(fd, 1 << 20), Err(libc::EPERM));
        assert_eq!(
            sys::add_seals(fd, libc::F_SEAL_WRITE),
            Err(libc::EPERM),
            "no further seals"
        );
        // SAFETY: asks for the descriptor's flags.
        assert_eq!(unsafe { libc::fcntl(fd, libc::F_GETFD) }, libc::FD_CLOEXEC);
    }

    #[test]
    fn both_sides_see_the_same_bytes() {
        let segment = Segment::memfd(c"both", 4096, PageSize::BASE, None).unwrap();
        // SAFETY: a duplicate of an open descriptor.
        let peer = unsafe { libc::dup(segment.fd().unwrap()) };
        let other = sys::mmap(4096, PROT, libc::MAP_SHARED, peer).unwrap();
        // SAFETY: both mappings are 4096 bytes long and of this test alone.
        unsafe {
            segment.base().as_ptr().add(100).write_volatile(42);
            assert_eq!(other.as_ptr().add(100).read_volatile(), 42);
            sys::munmap(other, 4096);
        }
        sys::close(peer);
    }

    #[test]
    fn dropping_gives_everything_back() {
        let segment = Segment::memfd(c"hugemem-drop-test", 3 * MIB, PageSize::BASE, None).unwrap();
        assert!(
            map_of(segment.base().as_ptr() as usize)
                .unwrap()
                .contains("hugemem-drop-test")
        );
        drop(segment);
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        assert!(!maps.contains("hugemem-drop-test"));
        let open = std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
        assert!(
            !open
                .into_iter()
                .any(|path| path.to_string_lossy().contains("hugemem-drop-test"))
        );
    }

    #[test]
    fn a_file_becomes_a_segment() {
        use std::os::fd::IntoRawFd;
        let file = tempfile::tempfile().unwrap();
        // SAFETY: the descriptor is given away.
        let segment = unsafe { Segment::file(file.into_raw_fd(), 10_000, None) }.unwrap();
        check(&segment, 10_000);
        assert_eq!(segment.page_size(), PageSize::BASE);
    }

    #[test]
    fn a_file_that_is_none_is_refused_and_closed() {
        use std::os::fd::IntoRawFd;
        let fd = std::fs::File::open("/dev/null").unwrap().into_raw_fd();
        // SAFETY: the descriptor is given away.
        let error = unsafe { Segment::file(fd, 10_000, None) }.unwrap_err();
        assert!(matches!(error, Error::Resize { errno: libc::EINVAL }), "{error}");
        // SAFETY: asks for the flags of a descriptor that may not exist.
        let open = unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0;
        let link = std::fs::read_link(std::format!("/proc/self/fd/{fd}"));
        assert!(
            !open || link.unwrap() != std::path::Path::new("/dev/null"),
            "another test may have the number by now"
        );
    }

    #[test]
    fn lengths_that_are_none() {
        for len in [0, usize::MAX, isize::MAX as usize + 1] {
            for page in [PageSize::BASE, PageSize::HUGE_1G] {
                assert_eq!(Segment::memfd(c"len", len, page, None).unwrap_err(), Error::Length);
                assert_eq!(Segment::anonymous(len, page, None).unwrap_err(), Error::Length);
            }
        }
    }

    #[test]
    fn more_than_there_is_is_an_error() {
        // 64 TiB: addresses enough, memory not.
        let error = Segment::memfd(c"much", 1 << 46, PageSize::HUGE_2M, None).unwrap_err();
        assert!(
            matches!(error, Error::Shortage { .. } | Error::PageSize { .. }),
            "{error}"
        );
        let odd = PageSize::huge(1 << 23).unwrap();
        assert_eq!(
            Segment::memfd(c"odd", 1, odd, None).unwrap_err(),
            Error::PageSize { page: 1 << 23 }
        );
        assert_eq!(
            Segment::anonymous(1, odd, None).unwrap_err(),
            Error::PageSize { page: 1 << 23 }
        );
    }

    #[test]
    fn nodes() {
        match Segment::memfd(c"node", 4096, PageSize::BASE, Some(0)) {
            Ok(segment) => check(&segment, 4096),
            Err(Error::Numa {
                node: 0,
                errno: libc::EPERM | libc::ENOSYS,
            }) => {
                std::eprintln!("SKIPPED nodes: mbind(2) is forbidden here");
                return;
            }
            Err(error) => panic!("{error}"),
        }
        for node in [1023, 1024, u32::MAX] {
            let error = Segment::memfd(c"node", 4096, PageSize::BASE, Some(node)).unwrap_err();
            assert_eq!(
                error,
                Error::Numa {
                    node,
                    errno: libc::EINVAL
                }
            );
        }
    }

    #[test]
    fn page_sizes() {
        assert_eq!(PageSize::huge(2 * MIB), Some(PageSize::HUGE_2M));
        assert_eq!(PageSize::huge(3 * MIB), None);
        assert_eq!(PageSize::huge(4096), None);
        assert_eq!(PageSize::HUGE_1G.bytes(), 1 << 30);
        assert_eq!(
            std::format!("{} {:?}", PageSize::HUGE_2M, PageSize::HUGE_1G),
            "2 MiB PageSize(1 GiB)"
        );
        assert_eq!(
            PageSize::huge(64 << 10).unwrap().flag() as c_int,
            libc::MFD_HUGE_64KB as c_int
        );
        assert_eq!(PageSize::HUGE_1G.flag() as c_int, libc::MFD_HUGE_1GB as c_int);
    }
}
