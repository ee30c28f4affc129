//! Huge pages: what there is, and each of the limits on it.

use std::path::Path;

use hugemem::PageSize;

use super::{Finding, Level, Question};
use crate::memory::limits::{cgroup_limit, memory_limit, total_pages, unpromised_pages};
use crate::memory::mounts::{Mount, huge_stat, mounts};
use crate::needs::Needs;
use crate::spec::{MemoryKind, PortSpec};
use crate::vfio::Host;

const SMALL: PageSize = PageSize::HUGE_2M;
const LARGE: PageSize = PageSize::HUGE_1G;

pub(super) fn examine(host: &Host, question: &Question) -> Vec<Finding> {
    // Whom nobody asks about is a port as by default.
    let spec = question.spec.clone().unwrap_or_else(|| PortSpec::virtio_user("/"));
    let Ok(needs) = Needs::of(&spec) else { return Vec::new() };
    let root = host.path("");
    if !needs.memory.huge {
        let none = Finding::ok("hugepages", "this port needs none");
        return [none]
            .into_iter()
            .chain(plain(&root, needs.memory.bytes, Level::Fault))
            .collect();
    }
    // What cannot be had is made up for, unless the spec insists on it.
    let insists = spec.memory != MemoryKind::Auto || spec.huge_dir.is_some();
    let level = if insists { Level::Fault } else { Level::Warning };
    let mounted = spec.memory == MemoryKind::Hugetlbfs || spec.huge_dir.is_some();
    let found: Vec<Mount> = mounts(&root)
        .into_iter()
        .filter(|m| m.kind == "hugetlbfs" && !m.has("ro"))
        .filter(|m| spec.huge_dir.as_deref().is_none_or(|dir| dir.starts_with(&m.path)))
        .collect();
    // The pages that the port would take.
    let page = match found.first().and_then(Mount::page) {
        Some(page) if mounted => page,
        _ => SMALL,
    };
    let bytes = needs.memory.bytes;
    let mut all = vec![pool(&root, page, bytes, level)];
    if mounted && found.is_empty() {
        all.push(Finding::fault(
            "no-mount",
            "no hugetlbfs is mounted here with write access",
            "mount -t hugetlbfs none /dev/hugepages, or pass memory=memfd-huge, which needs none",
        ));
    }
    for mount in &found {
        all.extend(size(
            mount,
            &root,
            bytes,
            if mounted { Level::Fault } else { Level::Note },
        ));
    }
    if !insists {
        // Where huge pages are short, these are taken.
        all.extend(plain(&root, bytes, Level::Warning));
    }
    if let Some(limit) = cgroup_limit(&root, page) {
        let needed = pages(bytes, page);
        let left = limit.left / page.bytes() as u64;
        all.push(if left < needed {
            Finding::bad(
                level,
                "cgroup-limit",
                format!(
                    "{} allows {left} more pages of {page}, {needed} needed",
                    limit.path.display()
                ),
                "raise the container's hugepage limit (hugepages-2Mi in Kubernetes, hugepageLimits in OCI), or pass \
                 memory=memfd",
            )
        } else {
            Finding::ok(
                "cgroup",
                format!("{} allows {left} more pages of {page}", limit.path.display()),
            )
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
    let total = total_pages(root, page).unwrap_or(0);
    let free = unpromised_pages(root, page).unwrap_or(0);
    let file = format!(
        "/sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages",
        page.bytes() >> 10
    );
    if total == 0 {
        let large = unpromised_pages(root, LARGE).unwrap_or(0);
        if page == SMALL && large > 0 {
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
        return Finding::bad(
            level,
            "no-hugepages",
            format!("the kernel has no huge pages of {page}"),
            format!("echo {needed} > {file} (or vm.nr_hugepages in sysctl.d), or pass memory=memfd"),
        );
    }
    if free < needed {
        return Finding::bad(
            level,
            "few-hugepages",
            format!("{free} of {total} huge pages of {page} are free, {needed} needed"),
            format!("echo {} > {file}, or end who has them", total + needed - free),
        );
    }
    Finding::ok(
        "hugepages",
        format!("{free} of {total} huge pages of {page} are free, {needed} needed"),
    )
}

/// A mount's `size=`: what is left of it where it can be asked, the whole of it otherwise.
fn size(mount: &Mount, root: &Path, bytes: usize, level: Level) -> Option<Finding> {
    let page = mount.page()?;
    let needed = pages(bytes, page);
    let inside = mount.path.strip_prefix("/").unwrap_or(&mount.path);
    let free = match huge_stat(&root.join(inside)) {
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
