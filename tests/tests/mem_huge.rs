//! Huge pages: mounts that are too small, pools that are empty, cgroups that say no, peers that truncate.
//!
//! These tests reserve huge pages of 2 MiB and mount file systems in a mount namespace of their own thread. Where that
//! is not allowed they say SKIPPED and why.

use std::fs;
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use hugemem::{PageSize, Segment, guard};
use usernic::memory::{Automatic, Error, Limit, MemorySource, Request};
use usernic::spec::MemoryKind;

const MIB: usize = 1 << 20;
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// The pool is as it was before, under the lock that has been held since.
const KEEPER: &str = "trap '' INT TERM HUP; cat >/dev/null; echo $BEFORE";

fn request(len: usize) -> Request<'static> {
    Request {
        len,
        name: "mem_huge",
        numa: None,
    }
}

/// Pages of 2 MiB that nobody had, until this is dropped, or its process ends in whatever way. One at a time: the pool is
/// the machine's.
struct Reserved {
    /// Gives the pages back when its standard input ends. Its standard output is the pool's file, whose lock it shares:
    /// tests may be threads of a process, or processes.
    keeper: Child,
}

/// Pages in use that leave the pool when they are freed are not the pool's.
fn persistent() -> Result<i64, String> {
    let number = |name: &str| {
        let path = format!("{POOL}/{name}");
        let text = fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
        text.trim().parse::<i64>().map_err(|e| format!("{path}: {e}"))
    };
    Ok(number("nr_hugepages")? - number("surplus_hugepages")?)
}

impl Reserved {
    fn new(pages: i64) -> Result<Self, String> {
        let path = format!("{POOL}/nr_hugepages");
        let mut file = fs::File::options()
            .write(true)
            .open(&path)
            .map_err(|e| format!("huge pages cannot be reserved: {path}: {e}"))?;
        rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)
            .map_err(|e| format!("{path} cannot be locked: {e}"))?;
        let before = persistent()?;
        let keeper = Command::new("sh")
            .args(["-c", KEEPER])
            .current_dir(POOL)
            .stdin(Stdio::piped())
            .stdout(file.try_clone().map_err(|e| e.to_string())?)
            // Signals to the test's group are not for it.
            .process_group(0)
            .env("BEFORE", before.to_string())
            .spawn()
            .map_err(|e| format!("sh: {e}"))?;
        let reserved = Reserved { keeper };
        file.write_all((before + pages).to_string().as_bytes())
            .map_err(|e| format!("huge pages cannot be reserved: {e}"))?;
        match persistent()? - before {
            given if given >= pages => Ok(reserved),
            given => Err(format!("the kernel gives {given} of {pages} huge pages")),
        }
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        let _ = self.keeper.wait();
    }
}

/// A hugetlbfs in a mount namespace of this thread. It goes with the thread.
struct Mounted {
    dir: PathBuf,
    /// With `proc/self` of this thread, whose mounts are not the process'.
    root: tempfile::TempDir,
}

impl Mounted {
    fn new(options: &str) -> Result<Self, String> {
        use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
        let failed = |what: &'static str| move |e: rustix::io::Errno| format!("{what}: {e}");
        // SAFETY: only this thread's view of mounts is taken apart; it shares no fs state that others count on.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }
            .map_err(failed("no mount namespace"))?;
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).map_err(failed("mounts cannot be made private"))?;
        let root = tempfile::tempdir().map_err(|e| e.to_string())?;
        let dir = root.path().join("huge pages");
        for dir in [&dir, &root.path().join("proc")] {
            fs::create_dir(dir).map_err(|e| e.to_string())?;
        }
        std::os::unix::fs::symlink("/proc/thread-self", root.path().join("proc/self")).map_err(|e| e.to_string())?;
        std::os::unix::fs::symlink("/sys", root.path().join("sys")).map_err(|e| e.to_string())?;
        // Others of the machine's would be found as well.
        while let Some(path) = hugetlbfs_paths().first() {
            rustix::mount::unmount(path, rustix::mount::UnmountFlags::DETACH).map_err(failed("umount"))?;
        }
        let options = std::ffi::CString::new(options).map_err(|e| e.to_string())?;
        mount("none", &dir, "hugetlbfs", MountFlags::empty(), options.as_c_str())
            .map_err(failed("hugetlbfs cannot be mounted"))?;
        Ok(Mounted { dir, root })
    }

    fn source(&self, kind: MemoryKind) -> Automatic {
        Automatic::new(kind).root(self.root.path())
    }

    fn free(&self) -> u64 {
        rustix::fs::statfs(&self.dir).unwrap().f_bfree as u64
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.dir, rustix::mount::UnmountFlags::DETACH);
    }
}

fn hugetlbfs_paths() -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/thread-self/mountinfo").unwrap_or_default();
    let paths = text
        .lines()
        .filter(|line| line.contains(" - hugetlbfs "))
        .filter_map(|line| line.split(' ').nth(4));
    paths.map(PathBuf::from).collect()
}

/// Takes what a test needs, or says why it cannot run and returns from it.
macro_rules! need {
    ($test:literal, $what:expr) => {
        match $what {
            Ok(what) => what,
            Err(reason) => {
                eprintln!("SKIPPED {}: {reason}", $test);
                return;
            }
        }
    };
}

/// Runs `body` in a child, which reports with its exit status: 0, or 101 if it panicked.
fn fork(body: impl FnOnce()) -> libc::pid_t {
    // SAFETY: the child runs `body` alone, and glibc's allocator works in the child of a fork.
    match unsafe { libc::fork() } {
        0 => {
            // It must not outlive the test: it holds pages, and the keeper's standard input.
            let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
            let passed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).is_ok();
            // SAFETY: ends the child without the harness' handlers.
            unsafe { libc::_exit(if passed { 0 } else { 101 }) }
        }
        child => {
            assert!(child > 0);
            child
        }
    }
}

fn wait(child: libc::pid_t) -> libc::c_int {
    let mut status = 0;
    // SAFETY: waits for our own child.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    status
}

#[test]
fn a_memfd_of_huge_pages() {
    let _reserved = need!("a_memfd_of_huge_pages", Reserved::new(2));
    for kind in [MemoryKind::MemfdHuge, MemoryKind::Auto] {
        let allocation = Automatic::new(kind).allocate(&request(3 * MIB)).unwrap();
        let segment = allocation.segment;
        assert_eq!((segment.len(), segment.page_size()), (4 * MIB, PageSize::HUGE_2M));
        assert_eq!(segment.base().as_ptr() as usize % (2 * MIB), 0);
        assert_eq!(allocation.choice.to_string(), "memfd-huge, 2 MiB pages");
        // SAFETY: asks for the seals of an open file.
        let seals = unsafe { libc::fcntl(segment.fd().unwrap(), libc::F_GET_SEALS) };
        let wanted = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        assert_eq!(seals & wanted, wanted);
        // SAFETY: the last byte of the segment.
        unsafe { segment.base().as_ptr().add(4 * MIB - 1).write_volatile(1) };
    }
    let anonymous = Segment::anonymous(4 * MIB, PageSize::HUGE_2M, None).unwrap();
    assert_eq!(anonymous.base().as_ptr() as usize % (2 * MIB), 0);
}

#[test]
fn more_than_the_pool_has() {
    let _reserved = need!("more_than_the_pool_has", Reserved::new(1));
    // A terabyte: nobody else reserves so much meanwhile.
    let error = Automatic::new(MemoryKind::MemfdHuge)
        .allocate(&request(1 << 40))
        .unwrap_err();
    assert!(
        matches!(
            error,
            Error::Shortage {
                limit: Limit::Pool { free: 0..400_000, .. },
                needed: 524_288,
                ..
            }
        ),
        "{error}"
    );
    assert!(error.to_string().contains("524288 needed: add "), "{error}");
}

#[test]
fn auto_takes_plain_pages_when_huge_ones_are_too_few() {
    let _reserved = need!("auto_takes_plain_pages_when_huge_ones_are_too_few", Reserved::new(1));
    let free = || -> usize {
        let free = fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").unwrap();
        free.trim().parse().unwrap()
    };
    // Where many are free, take them: what is asked for below is in plain pages.
    let surplus = free().saturating_sub(8);
    let _held = (surplus > 24).then(|| {
        Automatic::new(MemoryKind::MemfdHuge)
            .allocate(&request(surplus * 2 * MIB))
            .unwrap()
    });
    let free = free();
    // A few more than there are now, since others may reserve some.
    let mounted = need!(
        "auto_takes_plain_pages_when_huge_ones_are_too_few",
        Mounted::new("pagesize=2M,size=2M")
    );
    let allocation = mounted
        .source(MemoryKind::Auto)
        .allocate(&request((free + 24) * 2 * MIB))
        .unwrap();
    assert_eq!(allocation.segment.page_size(), PageSize::BASE);
    let choice = allocation.choice.to_string();
    assert!(choice.starts_with("memfd, 4 KiB pages (the kernel has "), "{choice}");
    assert!(
        choice.contains("free huge page") && choice.contains(&format!("{} needed", free + 24)),
        "{choice}"
    );
    assert!(
        choice.contains("huge pages has 1 free page of 2 MiB"),
        "the mount is named too: {choice}"
    );
}

#[test]
fn a_mount_with_a_size() {
    let _reserved = need!("a_mount_with_a_size", Reserved::new(6));
    let mounted = need!("a_mount_with_a_size", Mounted::new("pagesize=2M,size=4M"));
    let mut source = mounted.source(MemoryKind::Hugetlbfs);
    let dir = mounted.dir.display();
    assert_eq!(mounted.free(), 2);

    let error = source.allocate(&request(7 * MIB)).unwrap_err().to_string();
    let expected = format!("hugetlbfs at {dir} has 2 free pages of 2 MiB, 4 needed: raise its size= or pass mem=4M");
    assert_eq!(error, expected);
    assert_eq!(mounted.free(), 2, "nothing is kept after an error");

    let allocation = source.allocate(&request(4 * MIB)).unwrap();
    assert_eq!(
        (allocation.segment.len(), allocation.segment.page_size()),
        (4 * MIB, PageSize::HUGE_2M)
    );
    assert_eq!(
        allocation.choice.to_string(),
        format!("hugetlbfs at {dir}, 2 MiB pages")
    );
    assert_eq!(mounted.free(), 0);
    assert_eq!(fs::read_dir(&mounted.dir).unwrap().count(), 0, "the file has no name");

    // Full now. By directory, and as automatic, which a directory makes explicit.
    for kind in [MemoryKind::Hugetlbfs, MemoryKind::Auto] {
        let error = mounted
            .source(kind)
            .huge_dir(&mounted.dir)
            .allocate(&request(1))
            .unwrap_err();
        let expected =
            format!("hugetlbfs at {dir} has 0 free pages of 2 MiB, 1 needed: raise its size= or pass memory=memfd");
        assert_eq!(error.to_string(), expected);
    }
    drop(allocation);
    assert_eq!(mounted.free(), 2, "given back");
}

#[test]
fn a_mount_without_a_size_and_an_empty_pool() {
    let _reserved = need!("a_mount_without_a_size_and_an_empty_pool", Reserved::new(1));
    let mounted = need!("a_mount_without_a_size_and_an_empty_pool", Mounted::new("pagesize=2M"));
    let error = mounted
        .source(MemoryKind::Hugetlbfs)
        .allocate(&request(1 << 40))
        .unwrap_err();
    assert!(
        matches!(
            error,
            Error::Shortage {
                limit: Limit::Pool { .. },
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(fs::read_dir(&mounted.dir).unwrap().count(), 0);
    mounted.source(MemoryKind::Hugetlbfs).allocate(&request(1)).unwrap();
}

#[test]
fn pages_that_a_mount_keeps() {
    let _reserved = need!("pages_that_a_mount_keeps", Reserved::new(2));
    let mounted = need!("pages_that_a_mount_keeps", Mounted::new("pagesize=2M,min_size=4M"));
    // Free, but promised to the mount: a memfd gets them only if others have left some, the mount in any case.
    let allocation = mounted.source(MemoryKind::Auto).allocate(&request(4 * MIB)).unwrap();
    assert_eq!(allocation.segment.page_size(), PageSize::HUGE_2M);
    let choice = allocation.choice;
    if choice.kind == "hugetlbfs" {
        assert!(
            choice
                .why
                .as_deref()
                .is_some_and(|why| why.starts_with("no memfd: the kernel has ")),
            "{choice}"
        );
    }
}

#[test]
fn nothing_is_left_after_sigkill() {
    let _reserved = need!("nothing_is_left_after_sigkill", Reserved::new(2));
    let mounted = need!("nothing_is_left_after_sigkill", Mounted::new("pagesize=2M,size=4M"));
    let (ready, go) = rustix::pipe::pipe().unwrap();
    let child = fork(|| {
        let _held = mounted
            .source(MemoryKind::Hugetlbfs)
            .allocate(&request(4 * MIB))
            .unwrap();
        rustix::io::write(&go, b"!").unwrap();
        loop {
            std::thread::park();
        }
    });
    drop(go);
    assert_eq!(
        rustix::io::read(&ready, &mut [0u8; 1]),
        Ok(1),
        "the child could not allocate"
    );
    assert_eq!(mounted.free(), 0);
    // SAFETY: kills our own child.
    unsafe { libc::kill(child, libc::SIGKILL) };
    wait(child);
    assert_eq!(mounted.free(), 2);
    assert_eq!(fs::read_dir(&mounted.dir).unwrap().count(), 0);
}

#[test]
fn a_mount_of_somebody_else() {
    let _reserved = need!("a_mount_of_somebody_else", Reserved::new(1));
    let mounted = need!("a_mount_of_somebody_else", Mounted::new("pagesize=2M,mode=0700"));
    // As nobody, in a child: user ids are the process'.
    fs::set_permissions(mounted.root.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let child = fork(|| {
        // SAFETY: plain integers, in a process of one thread.
        assert_eq!(unsafe { libc::setresuid(65534, 65534, 65534) }, 0);
        let error = mounted.source(MemoryKind::Hugetlbfs).allocate(&request(1)).unwrap_err();
        assert!(matches!(error, Error::Mount { .. }), "{error}");
        let text = error.to_string();
        assert!(
            text.contains("Permission denied") && text.contains("mount it with uid=65534"),
            "{text}"
        );
    });
    assert_eq!(wait(child), 0);
}

#[test]
fn a_truncated_hugetlbfs_file_marks_its_port_dead() {
    let _reserved = need!("a_truncated_hugetlbfs_file_marks_its_port_dead", Reserved::new(3));
    let mounted = need!(
        "a_truncated_hugetlbfs_file_marks_its_port_dead",
        Mounted::new("pagesize=2M")
    );
    let child = fork(|| {
        guard::install().unwrap();
        let allocation = mounted
            .source(MemoryKind::Hugetlbfs)
            .allocate(&request(6 * MIB))
            .unwrap();
        let segment = &allocation.segment;
        // SAFETY: dropped before the segment, in reverse order.
        let guarded = unsafe { segment.guard() }.unwrap();
        // SAFETY: truncates our own file, as a peer would.
        let truncated = unsafe { libc::ftruncate(segment.fd().unwrap(), 2 * MIB as libc::off_t) };
        assert_eq!(truncated, 0);
        let byte = |offset: usize| segment.base().as_ptr().wrapping_add(offset);
        // SAFETY: all offsets are inside of the mapping.
        unsafe {
            byte(5).write_volatile(5);
            assert!(!guarded.is_dead());
            byte(3 * MIB).write_volatile(7);
            assert!(guarded.is_dead());
            assert_eq!(byte(3 * MIB).read_volatile(), 7);
            assert_eq!(byte(4 * MIB - 1).read_volatile(), 0, "the whole huge page is mended");
            assert_eq!(byte(6 * MIB - 1).read_volatile(), 0);
            assert_eq!(byte(5).read_volatile(), 5);
        }
    });
    assert_eq!(wait(child), 0, "the process did not survive");
}

/// A cgroup of version 2 with a limit on huge pages.
struct Cgroup {
    path: PathBuf,
    /// The file from which the controller is taken again.
    enabled: Option<PathBuf>,
}

impl Cgroup {
    fn new(max: usize) -> Result<Self, String> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let line = mounts
            .lines()
            .find(|line| line.contains(" - cgroup2 "))
            .ok_or("cgroup version 2 is not mounted")?;
        let top = Path::new(line.split(' ').nth(4).ok_or("mountinfo")?);
        let has = |file: &str| {
            fs::read_to_string(top.join(file))
                .unwrap_or_default()
                .split(' ')
                .any(|c| c.trim() == "hugetlb")
        };
        if !has("cgroup.controllers") {
            return Err("cgroup version 2 has no hugetlb controller".into());
        }
        let control = top.join("cgroup.subtree_control");
        let enabled = if has("cgroup.subtree_control") {
            None
        } else {
            fs::write(&control, "+hugetlb").map_err(|e| format!("the hugetlb controller cannot be enabled: {e}"))?;
            Some(control)
        };
        let path = top.join(format!("usernic-mem-{}", std::process::id()));
        let cgroup = Cgroup { path, enabled };
        fs::create_dir(&cgroup.path).map_err(|e| format!("no cgroup can be made: {e}"))?;
        fs::write(cgroup.path.join("hugetlb.2MB.max"), max.to_string())
            .map_err(|e| format!("no limit can be set: {e}"))?;
        Ok(cgroup)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.path);
        if let Some(control) = &self.enabled {
            let _ = fs::write(control, "-hugetlb");
        }
    }
}

#[test]
fn a_cgroup_limit_is_an_error_and_no_sigbus() {
    let _reserved = need!("a_cgroup_limit_is_an_error_and_no_sigbus", Reserved::new(4));
    let cgroup = need!("a_cgroup_limit_is_an_error_and_no_sigbus", Cgroup::new(4 * MIB));
    let mounted = need!("a_cgroup_limit_is_an_error_and_no_sigbus", Mounted::new("pagesize=2M"));
    let child = fork(|| {
        fs::write(cgroup.path.join("cgroup.procs"), std::process::id().to_string()).unwrap();
        for kind in [MemoryKind::MemfdHuge, MemoryKind::Hugetlbfs] {
            let error = mounted.source(kind).allocate(&request(8 * MIB)).unwrap_err();
            let Error::Shortage {
                limit: Limit::Cgroup { path, free: 2, .. },
                needed: 4,
                ..
            } = &error
            else {
                panic!("{error}")
            };
            assert!(path.ends_with("hugetlb.2MB.max"), "{error}");
            assert!(
                error
                    .to_string()
                    .ends_with("raise it (a container's hugepage limit) or pass mem=4M"),
                "{error}"
            );
        }
        let held = mounted
            .source(MemoryKind::MemfdHuge)
            .allocate(&request(4 * MIB))
            .unwrap();
        // And with nothing left, automatic memory says what is in the way.
        let plain = mounted.source(MemoryKind::Auto).allocate(&request(MIB)).unwrap();
        let choice = plain.choice.to_string();
        assert!(
            choice.starts_with("memfd, ") && choice.contains("hugetlb.2MB.max allows 0 more pages"),
            "{choice}"
        );
        drop(held);
    });
    assert_eq!(wait(child), 0);
}
