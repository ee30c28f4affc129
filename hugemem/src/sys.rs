//! System calls, as thin as they can be: an `errno` in place of -1.

use core::ffi::CStr;
use core::ptr::{NonNull, null_mut};

use libc::c_int;

/// `errno` of this thread.
pub(crate) fn errno() -> i32 {
    // SAFETY: the C library gives a pointer to this thread's errno, always valid.
    unsafe { *libc::__errno_location() }
}

/// Bytes of an ordinary page.
pub(crate) fn base_page() -> usize {
    // SAFETY: sysconf takes an integer and has no effect.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(bytes).unwrap_or(4096)
}

fn check(result: c_int) -> Result<c_int, i32> {
    if result < 0 { Err(errno()) } else { Ok(result) }
}

/// Makes a memfd.
pub(crate) fn memfd_create(name: &CStr, flags: u32) -> Result<c_int, i32> {
    // SAFETY: the name is a C string, which the kernel copies.
    check(unsafe { libc::memfd_create(name.as_ptr(), flags) })
}

/// Gives a file its length.
pub(crate) fn ftruncate(fd: c_int, len: usize) -> Result<(), i32> {
    let len = libc::off_t::try_from(len).map_err(|_| libc::EFBIG)?;
    // SAFETY: plain integers.
    check(unsafe { libc::ftruncate(fd, len) }).map(drop)
}

/// Allocates a file's pages.
pub(crate) fn fallocate(fd: c_int, len: usize) -> Result<(), i32> {
    let len = libc::off_t::try_from(len).map_err(|_| libc::EFBIG)?;
    // SAFETY: plain integers.
    check(unsafe { libc::fallocate(fd, 0, 0, len) }).map(drop)
}

/// Forbids what `seals` says, for good.
pub(crate) fn add_seals(fd: c_int, seals: c_int) -> Result<(), i32> {
    // SAFETY: plain integers.
    check(unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, seals) }).map(drop)
}

/// The page size of the file system that a file is on, if that is hugetlbfs.
pub(crate) fn huge_page_of(fd: c_int) -> Result<Option<usize>, i32> {
    let mut stat = core::mem::MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: the kernel fills the structure, which is writable and of the size that the call expects.
    check(unsafe { libc::fstatfs(fd, stat.as_mut_ptr()) })?;
    // SAFETY: the call succeeded, so it is filled.
    let stat = unsafe { stat.assume_init() };
    Ok((stat.f_type as u64 as u32 == HUGETLBFS_MAGIC).then_some(stat.f_bsize as usize))
}

/// `statfs(2)`.
const HUGETLBFS_MAGIC: u32 = 0x9584_58f6;

/// Maps memory where the kernel likes.
pub(crate) fn mmap(len: usize, prot: c_int, flags: c_int, fd: c_int) -> Result<NonNull<u8>, i32> {
    // SAFETY: without MAP_FIXED the kernel picks addresses that nothing uses.
    result(unsafe { libc::mmap(null_mut(), len, prot, flags, fd, 0) })
}

/// Maps memory at `at`, in place of what is there.
///
/// # Safety
/// The `len` bytes from `at` on are a mapping of the caller's that nothing refers to.
pub(crate) unsafe fn mmap_at(at: NonNull<u8>, len: usize, prot: c_int, flags: c_int, fd: c_int) -> Result<(), i32> {
    // SAFETY: replaces what the caller owns.
    result(unsafe { libc::mmap(at.as_ptr().cast(), len, prot, flags | libc::MAP_FIXED, fd, 0) }).map(drop)
}

fn result(address: *mut libc::c_void) -> Result<NonNull<u8>, i32> {
    if address == libc::MAP_FAILED {
        return Err(errno());
    }
    NonNull::new(address.cast()).ok_or(libc::ENOMEM)
}

/// Unmaps memory.
///
/// # Safety
/// The `len` bytes from `at` on are a mapping of the caller's that nothing refers to.
pub(crate) unsafe fn munmap(at: NonNull<u8>, len: usize) {
    // SAFETY: the caller gives the mapping up. It can fail only for addresses that are no mapping, or for lack of
    // memory to split one; there is nothing to do about either.
    unsafe { libc::munmap(at.as_ptr().cast(), len) };
}

/// Advises the kernel on memory.
///
/// # Safety
/// The `len` bytes from `at` on are a mapping of the caller's, and `advice` keeps its content.
pub(crate) unsafe fn madvise(at: NonNull<u8>, len: usize, advice: c_int) -> Result<(), i32> {
    // SAFETY: the caller's mapping, its content kept.
    check(unsafe { libc::madvise(at.as_ptr().cast(), len, advice) }).map(drop)
}

/// The largest node number that [`mbind`] can name.
const MAX_NODES: u32 = 1024;

/// Binds memory to one NUMA node, strictly.
pub(crate) fn mbind(at: NonNull<u8>, len: usize, node: u32) -> Result<(), i32> {
    const BITS: u32 = usize::BITS;
    if node >= MAX_NODES {
        return Err(libc::EINVAL);
    }
    let mut nodes = [0usize; (MAX_NODES / BITS) as usize];
    nodes[(node / BITS) as usize] = 1 << (node % BITS);
    // SAFETY: a mapping's policy is changed, not its content; the mask has the bits that are announced (the kernel takes
    // one off the count).
    let result = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            at.as_ptr(),
            len,
            libc::MPOL_BIND,
            nodes.as_ptr(),
            MAX_NODES as usize + 1,
            0usize,
        )
    };
    if result < 0 { Err(errno()) } else { Ok(()) }
}

/// Whether all pages of a range are in memory. `page` is the distance to look at.
pub(crate) fn resident(at: NonNull<u8>, len: usize, page: usize) -> bool {
    let base = base_page();
    let mut offset = 0;
    while offset < len {
        let mut seen = 0u8;
        // SAFETY: one page of a mapping is asked for, so one byte is written.
        let result = unsafe { libc::mincore(at.as_ptr().add(offset).cast(), base, &mut seen) };
        if result < 0 || seen & 1 == 0 {
            return false;
        }
        offset += page;
    }
    true
}

/// Closes a file.
pub(crate) fn close(fd: c_int) {
    // SAFETY: the callers own the descriptor and use it no more.
    unsafe { libc::close(fd) };
}
