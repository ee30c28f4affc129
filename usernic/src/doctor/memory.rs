//! Memory: what `open` would take, and each of the limits on it.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use hugemem::PageSize;

use super::{Finding, Level, Process, Question};
use crate::memory::limits::{Pool, cgroup_limit, free_pages_on, memory_limit};
use crate::memory::mounts::{Mount, huge_mounts, huge_stat, mounts};
use crate::needs::Memory;
use crate::spec::{MemoryKind, PortSpec};
use crate::vfio::Host;

const SMALL: PageSize = PageSize::HUGE_2M;
const LARGE: PageSize = PageSize::HUGE_1G;

pub(super) fn examine(host: &Host, question: &Question, process: &Process) -> Vec<Finding> {
    // Whom nobody asks about is a port as by default.
    let spec = question.spec.clone().unwrap_or_else(|| PortSpec::virtio_user("/"));
    let Ok(memory) = Memory::of(&spec) else {
        return Vec::new();
    };
    let root = host.path("");
    if memory.is_mounted() {
        return mounted(&root, &spec, &memory, process);
    }
    let bytes = memory.bytes;
    match memory.kind {
        MemoryKind::Memfd => {
            let none = Finding::ok("hugepages", "this port needs none");
            [none].into_iter().chain(plain(&root, bytes, Level::Fault)).collect()
        }
        MemoryKind::Auto => {
            // What cannot be had is made up for. Pages that the kernel would only make on demand are for those who insist.
            let mut all = pages_of(&root, &spec, SMALL, bytes, Level::Warning);
            let small = |mount: &&Mount| {
                mount
                    .page()
                    .is_some_and(|page| page.bytes() <= bytes.max(SMALL.bytes()))
            };
            let found = huge_mounts(&root, bytes);
            all.extend(
                found
                    .iter()
                    .filter(small)
                    .filter_map(|m| size(m, &root, bytes, Level::Note)),
            );
            // Where huge pages are short, these are taken.
            all.extend(plain(&root, bytes, Level::Warning));
            all
        }
        _ => pages_of(&root, &spec, SMALL, bytes, Level::Fault),
    }
}

/// What `open` finds among the mounts: the first that has enough, else what is wrong with the most suitable.
fn mounted(root: &Path, spec: &PortSpec, memory: &Memory, process: &Process) -> Vec<Finding> {
    let mut found = huge_mounts(root, memory.bytes);
    if let Some(dir) = &memory.mount {
        // The file system that the directory is on: the last of the mounts above it.
        let above = mounts(root).into_iter().filter(|m| dir.starts_with(&m.path));
        let on = above
            .enumerate()
            .max_by_key(|(number, m)| (m.path.as_os_str().len(), *number));
        let Some((_, on)) = on.filter(|(_, m)| m.kind == "hugetlbfs") else {
            return vec![Finding::fault(
                "no-mount",
                format!("huge_dir={} is not on a hugetlbfs", dir.display()),
                format!("mount -t hugetlbfs none {}, or leave huge_dir= out", dir.display()),
            )];
        };
        found.retain(|mount| *mount == on);
    }
    let mut first = None;
    for mount in &found {
        let Some(page) = mount.page() else { continue };
        let mut all = pages_of(root, spec, page, memory.bytes, Level::Fault);
        all.extend(size(mount, root, memory.bytes, Level::Fault));
        all.extend(writable(mount, root, process));
        if all.iter().all(|finding| finding.level < Level::Fault) {
            return all;
        }
        first = first.or(Some(all));
    }
    first.unwrap_or_else(|| {
        vec![Finding::fault(
            "no-mount",
            "no hugetlbfs is mounted here with write access",
            "mount -t hugetlbfs none /dev/hugepages, or pass memory=memfd-huge, which needs none",
        )]
    })
}

/// The kernel's pool of pages of this size, a NUMA node's, and the cgroup's limit.
fn pages_of(root: &Path, spec: &PortSpec, page: PageSize, bytes: usize, level: Level) -> Vec<Finding> {
    let mut all = vec![pool(root, page, bytes, level)];
    let needed = pages(bytes, page);
    if let Some(node) = spec.numa
        && let Some(free) = free_pages_on(root, page, node)
        && free.saturating_add(Pool::read(root, page).map_or(0, |pool| pool.on_demand)) < needed
    {
        let kib = page.bytes() >> 10;
        all.push(Finding::bad(
            level,
            "few-hugepages-on-node",
            format!("NUMA node {node} has {free} free huge pages of {page}, {needed} needed"),
            format!(
                "add {} to /sys/devices/system/node/node{node}/hugepages/hugepages-{kib}kB/nr_hugepages, or leave numa= out",
                needed - free
            ),
        ));
    }
    if let Some(limit) = cgroup_limit(root, page) {
        let left = limit.left / page.bytes() as u64;
        let at = limit.path.display();
        all.push(if left < needed {
            Finding::bad(
                level,
                "cgroup-limit",
                format!("{at} allows {left} more pages of {page}, {needed} needed"),
                "raise the container's hugepage limit (hugepages-2Mi in Kubernetes, hugepageLimits in OCI), or pass \
                 memory=memfd",
            )
        } else {
            Finding::ok("cgroup", format!("{at} allows {left} more pages of {page}"))
        });
    }
    all
}

/// The limit of ordinary memory.
fn plain(root: &Path, bytes: usize, level: Level) -> Option<Finding> {
    let limit = memory_limit(root)?;
    let at = limit.path.display();
    if limit.left >= bytes as u64 {
        return Some(Finding::ok("memory", format!("{at} allows {} more bytes", limit.left)));
    }
    Some(Finding::bad(
        level,
        "memory-limit",
        format!(
            "{at} allows {} more bytes of ordinary memory, {bytes} needed",
            limit.left
        ),
        "raise the container's memory limit, or pass a smaller mem=, buffers= or queue_size=",
    ))
}

fn pages(bytes: usize, page: PageSize) -> u64 {
    bytes.div_ceil(page.bytes()) as u64
}

fn pool(root: &Path, page: PageSize, bytes: usize, level: Level) -> Finding {
    let needed = pages(bytes, page);
    let pool = Pool::read(root, page);
    let available = pool.map_or(0, |pool| pool.available());
    let (free, persistent, on_demand) = pool.map_or((0, 0, 0), |p| (p.free, p.persistent, p.on_demand));
    // A port that would also take plain pages tries huge ones only if one is free.
    let tried = level == Level::Fault || free > 0;
    let demand = match on_demand {
        0 => String::new(),
        n => format!(", {n} more can be made on demand"),
    };
    let what = format!("{free} of {persistent} huge pages of {page} are free{demand}, {needed} needed");
    if tried && available >= needed {
        return Finding::ok("hugepages", what);
    }
    let kib = page.bytes() >> 10;
    let file = format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages");
    let missing = needed.saturating_sub(if tried { available } else { 0 });
    let more = persistent + missing;
    if on_demand > 0 {
        let mend = if available >= needed {
            format!("pass memory=memfd-huge, or echo {more} > {file}")
        } else {
            format!("echo {more} > {file}, or end who has them")
        };
        return Finding::bad(level, "few-hugepages", what, mend);
    }
    let large = Pool::read(root, LARGE).map_or(0, |pool| pool.available());
    if persistent == 0 && page == SMALL && large > 0 {
        return Finding::bad(
            level,
            "only-1g-pages",
            format!("there are {large} free huge pages of {LARGE} and none of {SMALL}"),
            format!(
                "echo {needed} > {file}, or spend a page of {LARGE} on the port: memory=hugetlbfs,huge_dir= with the \
                 mount of such pages"
            ),
        );
    }
    if persistent == 0 {
        return Finding::bad(
            level,
            "no-hugepages",
            format!("the kernel has no huge pages of {page}"),
            format!("echo {needed} > {file} (or vm.nr_hugepages in sysctl.d), or pass memory=memfd"),
        );
    }
    Finding::bad(
        level,
        "few-hugepages",
        what,
        format!("echo {more} > {file}, or end who has them"),
    )
}

/// A mount's directory in the folder that is examined.
fn inside(mount: &Mount, root: &Path) -> std::path::PathBuf {
    root.join(mount.path.strip_prefix("/").unwrap_or(&mount.path))
}

/// A mount's `size=`: what is left of it where it can be asked, the whole of it otherwise.
fn size(mount: &Mount, root: &Path, bytes: usize, level: Level) -> Option<Finding> {
    let page = mount.page()?;
    let needed = pages(bytes, page);
    let free = match huge_stat(&inside(mount, root)) {
        Ok(Some(stat)) => stat.free,
        _ => mount.size().map(|size| size / page.bytes() as u64),
    };
    let at = mount.path.display();
    let free = match free {
        Some(free) if free < needed => free,
        _ => return Some(Finding::ok("mount", format!("hugetlbfs at {at}, pages of {page}"))),
    };
    Some(Finding::bad(
        level,
        "mount-too-small",
        format!("hugetlbfs at {at} has {free} free pages of {page} by its size=, {needed} needed"),
        format!(
            "mount -o remount,size={} {at}, or pass memory=memfd-huge",
            needed * page.bytes() as u64
        ),
    ))
}

/// Whether this user may make a file in a mount, where its directory can be looked at.
fn writable(mount: &Mount, root: &Path, process: &Process) -> Option<Finding> {
    let meta = std::fs::metadata(inside(mount, root)).ok()?;
    if process.may(meta.uid(), meta.gid(), meta.mode(), 3) {
        return None;
    }
    let at = mount.path.display();
    Some(Finding::fault(
        "mount-mode",
        format!(
            "hugetlbfs at {at} belongs to {}:{} with mode {:03o}: user {} cannot make a file there",
            meta.uid(),
            meta.gid(),
            meta.mode() & 0o7777,
            process.uid
        ),
        format!(
            "mount it with uid={} or mode=1777, or pass memory=memfd-huge, which needs none",
            process.uid
        ),
    ))
}
