//! The kernel, and what a container lets through to it.

use rustix::io::Errno;

use super::{Finding, Level, Question};
use crate::memory::mounts;
use crate::spec::MemoryKind;
use crate::vfio::Host;

pub(super) fn examine(host: &Host, question: &Question) -> Vec<Finding> {
    let mut all = vec![kernel(host)];
    all.extend(shm(host));
    all.extend(aio(host));
    if host.path("") == std::path::Path::new("/") {
        all.extend(calls(question));
    }
    all
}

/// The oldest kernel: memfd_create(2) with huge pages and expedited membarrier(2) are of 4.14. Nothing older was tried.
const OLDEST: (u32, u32) = (4, 14);

/// From here on pages are populated by one call that tells of a shortage, MADV_POPULATE_WRITE.
const POPULATES: (u32, u32) = (5, 14);

fn kernel(host: &Host) -> Finding {
    let release = host.read("proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        return Finding::bad(
            Level::Note,
            "kernel",
            "the kernel's release cannot be read",
            "mount /proc",
        );
    };
    if (major, minor) < OLDEST {
        return Finding::fault(
            "kernel-too-old",
            format!("Linux {release} lacks memfd with huge pages and membarrier"),
            "use Linux 4.14 or later; 5.14 for the quickest start",
        );
    }
    if (major, minor) < POPULATES {
        return Finding::bad(
            Level::Note,
            "kernel",
            format!("Linux {release} populates memory in three steps"),
            "Linux 5.14 does it in one",
        );
    }
    Finding::ok("kernel", format!("Linux {release}"))
}

/// Packet memory is never there, but what else runs in the container may need it.
fn shm(host: &Host) -> Option<Finding> {
    let mounts = mounts::mounts(&host.path(""));
    let shm = mounts
        .iter()
        .rfind(|mount| mount.path == std::path::Path::new("/dev/shm"))?;
    Some(if shm.has("ro") {
        Finding::bad(
            Level::Note,
            "read-only-shm",
            "/dev/shm is read-only: ports do not use it, other programs (DPDK with --no-huge, shm_open) do",
            "mount a tmpfs there if such a program runs here",
        )
    } else {
        Finding::ok("shm", "/dev/shm can be written to (and is not used)")
    })
}

/// Contexts of asynchronous I/O: each process with ports takes one, for notifications.
fn aio(host: &Host) -> Option<Finding> {
    let number = |file: &str| {
        host.read(format!("proc/sys/fs/{file}"))
            .ok()?
            .trim()
            .parse::<u64>()
            .ok()
    };
    let (used, most) = (number("aio-nr")?, number("aio-max-nr")?);
    Some(if used >= most {
        Finding::fault(
            "aio-limit",
            format!("{used} of {most} asynchronous requests are taken (fs.aio-nr, fs.aio-max-nr): a port needs one"),
            format!("sysctl -w fs.aio-max-nr={} on the host", used.saturating_add(1024)),
        )
    } else {
        Finding::ok("aio", format!("{used} of {most} asynchronous requests are taken"))
    })
}

/// Makes a context of asynchronous I/O, and removes it.
fn try_aio() -> Result<(), Errno> {
    let mut context: libc::c_ulong = 0;
    // SAFETY: io_setup(2) writes the context's number there and nothing else.
    let made = unsafe { libc::syscall(libc::SYS_io_setup, 1, &raw mut context) };
    if made < 0 {
        return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::NOSYS));
    }
    // SAFETY: the context is this function's, and has no requests.
    unsafe { libc::syscall(libc::SYS_io_destroy, context) };
    Ok(())
}

/// Tries what a port calls, each without effect.
fn calls(question: &Question) -> Vec<Finding> {
    let numa = question.spec.as_ref().is_some_and(|spec| spec.numa.is_some());
    let shared = question
        .spec
        .as_ref()
        .is_none_or(|spec| spec.memory != MemoryKind::Hugetlbfs);
    let raw = |number: i64, args: [i64; 6]| {
        // SAFETY: the calls below take no pointer, or a null one with a length of 0.
        let result = unsafe { libc::syscall(number, args[0], args[1], args[2], args[3], args[4], args[5]) };
        if result < 0 {
            Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::NOSYS))
        } else {
            Ok(())
        }
    };
    let level = |needed: bool| if needed { Level::Fault } else { Level::Warning };
    let tried = [
        (
            "memfd_create",
            rustix::fs::memfd_create("doctor", rustix::fs::MemfdFlags::CLOEXEC).map(drop),
            level(shared),
            "memory that is shared with the other side",
        ),
        (
            "eventfd2",
            rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).map(drop),
            Level::Fault,
            "notifications",
        ),
        ("io_setup", try_aio(), Level::Fault, "notifications"),
        (
            "membarrier",
            // MEMBARRIER_CMD_QUERY.
            raw(libc::SYS_membarrier, [0; 6]),
            Level::Warning,
            "without it every burst has a fence",
        ),
        (
            "mbind",
            raw(libc::SYS_mbind, [0; 6]),
            level(numa),
            "numa= binds memory by it",
        ),
    ];
    let refused = |errno: &Errno| matches!(*errno, Errno::PERM | Errno::NOSYS | Errno::ACCESS);
    let mut all: Vec<Finding> = tried
        .into_iter()
        .filter_map(|(name, result, level, why)| {
            let errno = result.err().filter(refused)?;
            Some(Finding::bad(
                level,
                "seccomp-too-tight",
                format!("{name}(2) is refused ({errno}): {why}"),
                format!(
                    "allow {name} in the container's seccomp profile (usernic container --format oci prints one), or \
                     use the engine's default"
                ),
            ))
        })
        .collect();
    if all.is_empty() {
        all.push(Finding::ok(
            "system-calls",
            "memfd_create, eventfd2, io_setup, membarrier and mbind are let through",
        ));
    }
    all
}
