//! The guard: handlers belong to the whole process, so each test runs in a child of its own.

use std::fs::File;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::ptr::NonNull;

use hugemem::{Error, PageSize, Segment, guard};

const LEN: usize = 16384;

/// A file of LEN bytes as a segment, and another descriptor of it, as a peer has.
fn victim() -> (Segment, File) {
    let file = tempfile::tempfile().unwrap();
    let peer = file.try_clone().unwrap();
    // SAFETY: the descriptor is given away.
    (unsafe { Segment::file(file.into_raw_fd(), LEN, None) }.unwrap(), peer)
}

/// Runs `body` in a child; how it ended, as `wait(2)` says. 0 if it returned, exit status 101 if it panicked.
fn in_child(body: fn()) -> libc::c_int {
    // SAFETY: the child runs `body`, which does nothing that a fork forbids beyond allocating, and glibc's allocator
    // works in the child of a fork.
    match unsafe { libc::fork() } {
        0 => {
            let passed = std::panic::catch_unwind(body).is_ok();
            // SAFETY: ends the child without the harness' handlers.
            unsafe { libc::_exit(if passed { 0 } else { 101 }) }
        }
        child => {
            assert!(child > 0);
            let mut status = 0;
            // SAFETY: waits for our own child.
            assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
            status
        }
    }
}

fn read(base: NonNull<u8>, offset: usize) -> u8 {
    assert!(offset < LEN);
    // SAFETY: inside of a mapping of LEN bytes that lives; whether its pages do is what is tested.
    unsafe { base.as_ptr().add(offset).read_volatile() }
}

#[test]
fn a_truncated_mapping_dies_and_the_process_lives() {
    let status = in_child(|| {
        guard::install().unwrap();
        guard::install().unwrap();
        let (segment, peer) = victim();
        let (other, _other_peer) = victim();
        // SAFETY: both segments outlive their guards: they are dropped in reverse order.
        let (guarded, unharmed) = unsafe { (segment.guard().unwrap(), other.guard().unwrap()) };
        let base = segment.base();
        // SAFETY: inside of the segment.
        unsafe { base.as_ptr().add(LEN - 1).write_volatile(9) };
        assert!(!guarded.is_dead());

        peer.set_len(4096).unwrap();
        assert!(!guarded.is_dead(), "nobody has touched it yet");
        assert_eq!(read(base, 0), 0);
        assert!(!guarded.is_dead(), "the first page is still there");
        assert_eq!(read(base, LEN - 1), 0, "a page of zeroes");
        assert!(guarded.is_dead());
        // SAFETY: inside of the segment.
        unsafe { base.as_ptr().add(LEN - 1).write_volatile(5) };
        assert_eq!(read(base, LEN - 1), 5, "the page can be written");
        assert_eq!(read(base, 4096), 0, "and the next one is mended as well");
        assert!(!unharmed.is_dead());
    });
    assert_eq!(status, 0);
}

#[test]
fn the_kernel_is_refused_where_the_process_is_not() {
    // A system call that reads lost pages fails with EFAULT and raises nothing.
    let (segment, peer) = victim();
    peer.set_len(0).unwrap();
    let sink = tempfile::tempfile().unwrap();
    // SAFETY: the range is mapped.
    let wrote = unsafe { libc::write(sink.as_raw_fd(), segment.base().as_ptr().cast(), 1) };
    assert_eq!(
        (wrote, std::io::Error::last_os_error().raw_os_error()),
        (-1, Some(libc::EFAULT))
    );
}

#[test]
fn elsewhere_the_default_applies() {
    let status = in_child(|| {
        guard::install().unwrap();
        let (segment, peer) = victim();
        peer.set_len(0).unwrap();
        read(segment.base(), 0);
    });
    assert!(
        libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGBUS,
        "status {status:#x}"
    );
}

#[test]
fn a_watch_ends_when_it_is_dropped() {
    let status = in_child(|| {
        guard::install().unwrap();
        let (segment, peer) = victim();
        // SAFETY: dropped at once, before the segment.
        drop(unsafe { segment.guard() }.unwrap());
        peer.set_len(0).unwrap();
        read(segment.base(), 0);
    });
    assert!(
        libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGBUS,
        "status {status:#x}"
    );
}

#[test]
fn a_signal_that_was_sent_ends_the_process() {
    let status = in_child(|| {
        // Rust's own handler, which looks for stack overflows, takes a signal that was sent for a fault and returns.
        install_previous(libc::SIG_DFL, 0);
        guard::install().unwrap();
        // SAFETY: sends a signal to this process.
        unsafe { libc::raise(libc::SIGBUS) };
    });
    assert!(
        libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGBUS,
        "status {status:#x}"
    );
}

extern "C" fn previous(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel's info; the child ends here.
    unsafe { libc::_exit(if (*info).si_code == libc::BUS_ADRERR { 42 } else { 43 }) }
}

extern "C" fn previous_plain(_signal: libc::c_int) {
    // SAFETY: the child ends here.
    unsafe { libc::_exit(44) }
}

fn install_previous(action: usize, flags: libc::c_int) {
    // SAFETY: all-zero is a valid sigaction, completed here with a handler that suits the flags.
    unsafe {
        let mut new: libc::sigaction = std::mem::zeroed();
        new.sa_sigaction = action;
        new.sa_flags = flags;
        assert_eq!(libc::sigaction(libc::SIGBUS, &new, std::ptr::null_mut()), 0);
    }
}

fn touch_guarded_then_not() {
    guard::install().unwrap();
    let (segment, peer) = victim();
    // SAFETY: dropped before the segment.
    let guarded = unsafe { segment.guard() }.unwrap();
    peer.set_len(0).unwrap();
    read(segment.base(), 0);
    assert!(guarded.is_dead(), "ours is asked first");
    drop(guarded);
    read(segment.base(), 8192);
}

#[test]
fn the_handler_from_before_gets_the_rest() {
    let status = in_child(|| {
        let action: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = previous;
        install_previous(action as usize, libc::SA_SIGINFO);
        touch_guarded_then_not();
    });
    assert!(
        libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 42,
        "status {status:#x}"
    );
    let status = in_child(|| {
        let action: extern "C" fn(libc::c_int) = previous_plain;
        install_previous(action as usize, 0);
        touch_guarded_then_not();
    });
    assert!(
        libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 44,
        "status {status:#x}"
    );
}

#[test]
fn errno_is_kept() {
    let status = in_child(|| {
        guard::install().unwrap();
        let (segment, peer) = victim();
        // SAFETY: dropped before the segment.
        let guarded = unsafe { segment.guard() }.unwrap();
        peer.set_len(0).unwrap();
        // SAFETY: this thread's errno.
        unsafe { *libc::__errno_location() = 77 };
        read(segment.base(), 0);
        // SAFETY: as above.
        assert_eq!(unsafe { *libc::__errno_location() }, 77);
        assert!(guarded.is_dead());
    });
    assert_eq!(status, 0);
}

#[test]
fn ranges_that_are_no_pages_are_refused() {
    let segment = Segment::memfd(c"guarded", LEN, PageSize::BASE, None).unwrap();
    let base = segment.base();
    for (offset, len, page) in [
        (1, 4096, 4096),
        (0, 4095, 4096),
        (0, 4096, 3000),
        (0, 4096, 0),
        (0, usize::MAX & !4095, 4096),
    ] {
        // SAFETY: nothing is truncated.
        let refused = unsafe { guard::register(base.add(offset), len, page) };
        assert_eq!(refused.unwrap_err(), Error::Length);
    }
}

/// Mappings of one page each of one file.
fn mappings(file: &File, n: usize) -> Vec<NonNull<u8>> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let map = |_| {
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), 4096, prot, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        assert_ne!(at, libc::MAP_FAILED);
        NonNull::new(at.cast()).unwrap()
    };
    (0..n).map(map).collect()
}

#[test]
fn every_one_of_thousands_of_mappings_is_watched() {
    let status = in_child(|| {
        const MANY: usize = 5000;
        guard::install().unwrap();
        let (file, whole) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        file.set_len(4096).unwrap();
        whole.set_len(4096).unwrap();
        let (lost, kept) = (mappings(&file, MANY), mappings(&whole, MANY));
        // SAFETY: the mappings stay to the end of the process.
        let watch = |at: &NonNull<u8>| unsafe { guard::register(*at, 4096, 4096) }.unwrap();
        let (mut lost_guards, mut kept_guards) = (vec![], vec![]);
        for (lost, kept) in lost.iter().zip(&kept) {
            lost_guards.push(watch(lost));
            kept_guards.push(watch(kept));
        }
        file.set_len(0).unwrap();
        for i in [0, 511, 512, 513, 1023, 1024, 3000, MANY - 1] {
            assert!(!lost_guards[i].is_dead());
            assert_eq!(read(lost[i], 0), 0);
            assert!(lost_guards[i].is_dead(), "{i}");
        }
        for (at, guard) in lost.iter().zip(&lost_guards) {
            read(*at, 5);
            assert!(guard.is_dead());
        }
        for (at, guard) in kept.iter().zip(&kept_guards) {
            read(*at, 5);
            assert!(!guard.is_dead());
        }
        // Slots are used again, wherever they are.
        drop((lost_guards, kept_guards));
        let again: Vec<_> = lost.iter().map(watch).collect();
        assert!(again.iter().all(|guard| !guard.is_dead()));
    });
    assert_eq!(status, 0);
}

#[test]
fn threads_that_watch_at_once_share_the_table() {
    let status = in_child(|| {
        guard::install().unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let maps: Vec<_> = mappings(&file, 4096)
            .into_iter()
            .map(|at| at.as_ptr() as usize)
            .collect();
        let guards: Vec<_> = std::thread::scope(|scope| {
            let watch = |maps: &[usize]| -> Vec<_> {
                maps.iter()
                    .map(|at| NonNull::new(*at as *mut u8).unwrap())
                    // SAFETY: the mappings stay to the end of the process.
                    .map(|at| unsafe { guard::register(at, 4096, 4096) }.unwrap())
                    .collect()
            };
            let threads: Vec<_> = maps.chunks(1024).map(|maps| scope.spawn(move || watch(maps))).collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        file.set_len(0).unwrap();
        for (at, guard) in maps.iter().zip(&guards) {
            assert!(!guard.is_dead());
            read(NonNull::new(*at as *mut u8).unwrap(), 0);
            assert!(guard.is_dead());
        }
    });
    assert_eq!(status, 0);
}

/// A process has at most vm.max_map_count mappings, and to replace a page in the middle of one takes two more.
#[test]
fn at_the_limit_of_mappings_the_process_lives_too() {
    let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    let limit: usize = limit.trim().parse().unwrap();
    if limit > 1 << 20 {
        eprintln!("SKIPPED at_the_limit_of_mappings: vm.max_map_count is {limit}");
        return;
    }
    static LIMIT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    LIMIT.store(limit, std::sync::atomic::Ordering::Relaxed);
    let status = in_child(|| {
        guard::install().unwrap();
        let (segment, peer) = victim();
        // SAFETY: dropped before the segment.
        let guarded = unsafe { segment.guard() }.unwrap();
        peer.set_len(0).unwrap();
        let pages = 2 * LIMIT.load(std::sync::atomic::Ordering::Relaxed);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh mapping.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), 4096 * pages, libc::PROT_NONE, flags, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        let protect = |page: usize, prot| {
            // SAFETY: a page of the mapping above, which nothing uses.
            unsafe { libc::mprotect(at.byte_add(4096 * page), 4096, prot) }
        };
        // Every second page becomes a mapping of its own, until there can be no more.
        let full = (1..pages).step_by(2).find(|page| protect(*page, libc::PROT_READ) != 0);
        assert!(full.is_some(), "there is no limit");
        assert_eq!(read(segment.base(), 8192), 0);
        assert!(guarded.is_dead());
        // SAFETY: inside of the segment.
        unsafe { segment.base().as_ptr().write_volatile(5) };
        assert_eq!(read(segment.base(), 0), 5);
    });
    assert_eq!(status, 0);
}
