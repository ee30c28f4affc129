//! What limits huge pages: the kernel's pools and cgroups. Read when something is short, to say what.
//!
//! All paths are below a root that tests prepare.

use std::path::{Path, PathBuf};

use hugemem::PageSize;
use rustix::fs::{Mode, OFlags, open};

use super::mounts::mounts;

/// A whole file of the kernel's, which are small and of unknown length.
pub(super) fn read(path: &Path) -> Option<Vec<u8>> {
    let file = open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let mut text = Vec::new();
    let mut chunk = [0u8; 4096];
    loop {
        match rustix::io::read(&file, &mut chunk) {
            Ok(0) => return Some(text),
            Ok(n) => text.extend_from_slice(&chunk[..n]),
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return None,
        }
    }
}

/// A file with one number, in one read. `None` if it is not there or holds something else (`max`).
fn number(path: &Path) -> Option<u64> {
    let file = open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let mut text = [0u8; 24];
    let n = rustix::io::read(&file, &mut text).ok()?;
    std::str::from_utf8(&text[..n]).ok()?.trim().parse().ok()
}

fn pool(root: &Path, page: PageSize) -> PathBuf {
    root.join(format!("sys/kernel/mm/hugepages/hugepages-{}kB", page.bytes() >> 10))
}

/// A pool of huge pages as the kernel describes it ("Documentation/admin-guide/mm/hugetlbpage.rst").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pool {
    /// Pages that are free, promised to somebody or not.
    pub(crate) free: u64,
    /// Pages of the pool that stay in it: what `nr_hugepages` was set to.
    pub(crate) persistent: u64,
    /// Pages that the kernel would still make on demand (`nr_overcommit_hugepages`).
    pub(crate) on_demand: u64,
    promised: u64,
}

impl Pool {
    /// The machine's pool. `None`: the kernel does not say.
    pub(crate) fn read(root: &Path, page: PageSize) -> Option<Self> {
        let pool = pool(root, page);
        let get = |file: &str| number(&pool.join(file)).unwrap_or(0);
        let surplus = get("surplus_hugepages");
        // Gigantic pages are never made on demand.
        let overcommit = if page.bytes() < PageSize::HUGE_1G.bytes() {
            get("nr_overcommit_hugepages")
        } else {
            0
        };
        Some(Pool {
            free: number(&pool.join("free_hugepages"))?,
            persistent: get("nr_hugepages").saturating_sub(surplus),
            on_demand: overcommit.saturating_sub(surplus),
            promised: get("resv_hugepages"),
        })
    }

    /// Pages that a new mapping can have.
    pub(crate) fn available(&self) -> u64 {
        self.free.saturating_add(self.on_demand).saturating_sub(self.promised)
    }
}

/// Huge pages that are free on a NUMA node.
pub(crate) fn free_pages_on(root: &Path, page: PageSize, node: u32) -> Option<u64> {
    let kib = page.bytes() >> 10;
    number(&root.join(format!(
        "sys/devices/system/node/node{node}/hugepages/hugepages-{kib}kB/free_hugepages"
    )))
}

/// A limit of a cgroup.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct CgroupLimit {
    /// The file that sets it.
    pub(crate) path: PathBuf,
    /// Bytes that it still allows.
    pub(crate) left: u64,
}

/// Versions of cgroups, see cgroups(7).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// The folders of this process's cgroups that may limit a resource: its own and those above, as far as they are mounted.
fn cgroups(root: &Path, controller: &str) -> Vec<(PathBuf, Version)> {
    let mut all = Vec::new();
    let Some(own) = read(&root.join("proc/self/cgroup")) else {
        return all;
    };
    let mounts = mounts(root);
    // `4:hugetlb:/path` of version 1, `0::/path` of version 2.
    for line in String::from_utf8_lossy(&own).lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(id), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let (mount, version) = if id == "0" && controllers.is_empty() {
            (mounts.iter().find(|m| m.kind == "cgroup2"), Version::Two)
        } else if controllers.split(',').any(|c| c == controller) {
            let mount = mounts.iter().find(|m| m.kind == "cgroup" && m.has(controller));
            (mount, Version::One)
        } else {
            continue;
        };
        let Some(mount) = mount else { continue };
        let top = below(root, &mount.path);
        // Inside of a container only a part of the hierarchy may be mounted.
        let inside = Path::new(path).strip_prefix(&mount.root).unwrap_or(Path::new(""));
        let mut dir = below(&top, inside);
        loop {
            all.push((dir.clone(), version));
            if dir == top || !dir.pop() {
                break;
            }
        }
    }
    all
}

/// The tightest limit that this process's cgroup, or one above it, puts on pages of this size; version 1 or 2, on pages
/// in use or on those promised.
pub(crate) fn cgroup_limit(root: &Path, page: PageSize) -> Option<CgroupLimit> {
    let size = cgroup_size(page);
    // (limit, usage), of pages in use and of reservations: "Documentation/admin-guide/cgroup-v2.rst", HugeTLB.
    let v1 = [
        ("limit_in_bytes", "usage_in_bytes"),
        ("rsvd.limit_in_bytes", "rsvd.usage_in_bytes"),
    ];
    let v2 = [("max", "current"), ("rsvd.max", "rsvd.current")];
    let mut tightest: Option<CgroupLimit> = None;
    for (dir, version) in cgroups(root, "hugetlb") {
        for (limit, usage) in if version == Version::One { v1 } else { v2 } {
            let path = dir.join(format!("hugetlb.{size}.{limit}"));
            // Version 1 has no word for no limit: it says the largest number of bytes in whole pages.
            let no_limit = i64::MAX as u64 & !(page.bytes() as u64 - 1);
            let Some(most) = number(&path).filter(|most| *most < no_limit) else {
                continue;
            };
            let used = number(&dir.join(format!("hugetlb.{size}.{usage}"))).unwrap_or(0);
            let left = most.saturating_sub(used);
            if tightest.as_ref().is_none_or(|t| left < t.left) {
                tightest = Some(CgroupLimit { path, left });
            }
        }
    }
    tightest
}

/// Version 1 has no word for no limit: it says the largest number of bytes in whole pages, of up to 64 KiB.
const NO_LIMIT: u64 = i64::MAX as u64 & !0xffff;

/// The tightest limit on ordinary memory. What is beyond it is no error of a call: the kernel ends the process. So it is
/// looked at before. File pages that could be dropped count as free.
pub(crate) fn memory_limit(root: &Path) -> Option<CgroupLimit> {
    let mut tightest: Option<CgroupLimit> = None;
    for (dir, version) in cgroups(root, "memory") {
        // "Documentation/admin-guide/cgroup-v2.rst", Memory, and "cgroup-v1/memory.rst".
        let (limit, usage, file) = match version {
            Version::One => ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
            Version::Two => ("memory.max", "memory.current", "file"),
        };
        let path = dir.join(limit);
        // What is no limit is not worth the look at what is in use.
        let Some(most) = number(&path).filter(|most| *most < NO_LIMIT) else {
            continue;
        };
        let stat = read(&dir.join("memory.stat")).unwrap_or_default();
        let stat = String::from_utf8_lossy(&stat);
        let of = |key: &str| {
            stat.lines()
                .find_map(|l| l.strip_prefix(key)?.trim().parse::<u64>().ok())
        };
        let shared = of("total_shmem ").or(of("shmem ")).unwrap_or(0);
        let droppable = of(&format!("{file} ")).unwrap_or(0).saturating_sub(shared);
        let used = number(&dir.join(usage)).unwrap_or(0).saturating_sub(droppable);
        let left = most.saturating_sub(used);
        if tightest.as_ref().is_none_or(|t| left < t.left) {
            tightest = Some(CgroupLimit { path, left });
        }
    }
    tightest
}

/// Bytes of memory that the machine has to give, `MemAvailable` of proc_meminfo(5).
pub(crate) fn available(root: &Path) -> Option<u64> {
    let text = read(&root.join("proc/meminfo"))?;
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

/// A path as seen from the root, below another.
fn below(root: &Path, path: &Path) -> PathBuf {
    let mut all = root.to_path_buf();
    all.extend(
        path.components()
            .filter(|c| matches!(c, std::path::Component::Normal(_))),
    );
    all
}

/// How cgroups name a page size: `64KB`, `2MB`, `1GB`.
fn cgroup_size(page: PageSize) -> String {
    match page.bytes() {
        bytes if bytes >= 1 << 30 => format!("{}GB", bytes >> 30),
        bytes if bytes >= 1 << 20 => format!("{}MB", bytes >> 20),
        bytes => format!("{}KB", bytes >> 10),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: PageSize = PageSize::HUGE_2M;

    /// Makes a root with these files.
    fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn pools() {
        let root = root(&[
            ("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "10\n"),
            ("sys/kernel/mm/hugepages/hugepages-2048kB/resv_hugepages", "4\n"),
            (
                "sys/devices/system/node/node1/hugepages/hugepages-2048kB/free_hugepages",
                "7\n",
            ),
        ]);
        let pool = Pool::read(root.path(), PAGE).unwrap();
        assert_eq!((pool.free, pool.available()), (10, 6));
        assert_eq!(free_pages_on(root.path(), PAGE, 1), Some(7));
        assert_eq!(free_pages_on(root.path(), PAGE, 0), None);
        assert_eq!(Pool::read(root.path(), PageSize::HUGE_1G), None);
    }

    #[test]
    fn pages_that_the_kernel_makes_on_demand_are_available() {
        for (nr, free, promised, overcommit, surplus, available, persistent) in [
            (0, 0, 0, 64, 0, 64, 0),
            (64, 0, 0, 64, 64, 0, 0),
            (10, 4, 3, 8, 2, 7, 8),
            (10, 0, 3, 2, 0, 0, 10),
            (8, 8, 0, 0, 0, 8, 8),
        ] {
            let text = [nr, free, promised, overcommit, surplus].map(|n: u64| n.to_string());
            let files = ["nr", "free", "resv", "nr_overcommit", "surplus"];
            let paths = files.map(|file| format!("sys/kernel/mm/hugepages/hugepages-2048kB/{file}_hugepages"));
            let both: Vec<(&str, &str)> = paths
                .iter()
                .map(String::as_str)
                .zip(text.iter().map(String::as_str))
                .collect();
            let pool = Pool::read(root(&both).path(), PAGE).unwrap();
            assert_eq!((pool.available(), pool.persistent), (available, persistent), "{text:?}");
        }
    }

    #[test]
    fn version_2_is_walked_up() {
        let root = root(&[
            ("proc/self/cgroup", "0::/pod/box\n"),
            (
                "proc/self/mountinfo",
                "30 20 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n",
            ),
            ("sys/fs/cgroup/pod/hugetlb.2MB.max", "8388608\n"),
            ("sys/fs/cgroup/pod/hugetlb.2MB.current", "6291456\n"),
            ("sys/fs/cgroup/pod/box/hugetlb.2MB.max", "max\n"),
            ("sys/fs/cgroup/pod/box/hugetlb.2MB.rsvd.max", "16777216\n"),
        ]);
        let limit = cgroup_limit(root.path(), PAGE).unwrap();
        assert!(limit.path.ends_with("sys/fs/cgroup/pod/hugetlb.2MB.max"), "{limit:?}");
        assert_eq!(limit.left, 2 << 20);
        assert_eq!(cgroup_limit(root.path(), PageSize::HUGE_1G), None);
    }

    #[test]
    fn version_1_in_a_container_that_sees_a_part() {
        let root = root(&[
            (
                "proc/self/cgroup",
                "5:memory:/docker/x\n4:cpu,hugetlb:/docker/x/in\n0::/\n",
            ),
            (
                "proc/self/mountinfo",
                "30 20 0:26 /docker/x /sys/fs/cgroup/hugetlb ro - cgroup cgroup rw,cpu,hugetlb\n",
            ),
            ("sys/fs/cgroup/hugetlb/in/hugetlb.2MB.limit_in_bytes", "4194304\n"),
            ("sys/fs/cgroup/hugetlb/in/hugetlb.2MB.usage_in_bytes", "9999999999\n"),
        ]);
        let limit = cgroup_limit(root.path(), PAGE).unwrap();
        assert!(limit.path.ends_with("hugetlb/in/hugetlb.2MB.limit_in_bytes"));
        assert_eq!(limit.left, 0, "more in use than allowed");
    }

    #[test]
    fn no_limit_of_version_1_is_none() {
        let folder = "sys/fs/cgroup/hugetlb";
        let root = root(&[
            ("proc/self/cgroup", "4:hugetlb:/\n"),
            (
                "proc/self/mountinfo",
                "30 20 0:26 / /sys/fs/cgroup/hugetlb rw - cgroup cgroup rw,hugetlb\n",
            ),
            (&format!("{folder}/hugetlb.2MB.limit_in_bytes"), "9223372036852678656\n"),
            (&format!("{folder}/hugetlb.2MB.usage_in_bytes"), "0\n"),
            (&format!("{folder}/hugetlb.1GB.limit_in_bytes"), "9223372035781033984\n"),
        ]);
        assert_eq!(cgroup_limit(root.path(), PAGE), None);
        assert_eq!(cgroup_limit(root.path(), PageSize::HUGE_1G), None);
    }

    #[test]
    fn ordinary_memory_of_both_versions() {
        let v2 = root(&[
            ("proc/self/cgroup", "0::/pod/box\n"),
            (
                "proc/self/mountinfo",
                "30 20 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
            ),
            ("sys/fs/cgroup/pod/memory.max", "100000\n"),
            ("sys/fs/cgroup/pod/memory.current", "90000\n"),
            ("sys/fs/cgroup/pod/memory.stat", "anon 30000\nfile 50000\nshmem 20000\n"),
            ("sys/fs/cgroup/pod/box/memory.max", "max\n"),
            ("proc/meminfo", "MemTotal: 100 kB\nMemAvailable:     50 kB\n"),
        ]);
        // 90000 in use, 30000 of them droppable.
        let limit = memory_limit(v2.path()).unwrap();
        assert!(limit.path.ends_with("pod/memory.max"), "{limit:?}");
        assert_eq!((limit.left, available(v2.path())), (40000, Some(51200)));
        let v1 = root(&[
            ("proc/self/cgroup", "4:memory:/box\n"),
            (
                "proc/self/mountinfo",
                "30 20 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
            ),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/box/memory.limit_in_bytes", "100000\n"),
            ("sys/fs/cgroup/memory/box/memory.usage_in_bytes", "70000\n"),
            (
                "sys/fs/cgroup/memory/box/memory.stat",
                "cache 1\ntotal_cache 30000\ntotal_shmem 10000\n",
            ),
        ]);
        let limit = memory_limit(v1.path()).unwrap();
        assert!(limit.path.ends_with("memory/box/memory.limit_in_bytes"), "{limit:?}");
        assert_eq!((limit.left, available(v1.path())), (50000, None));
    }

    #[test]
    fn nothing_to_read_is_no_limit() {
        assert_eq!(cgroup_limit(Path::new("/nowhere"), PAGE), None);
        assert_eq!(memory_limit(Path::new("/nowhere")), None);
        let root = root(&[("proc/self/cgroup", "\n0\n0:\n0::\n7:hugetlb:/\n")]);
        assert_eq!(cgroup_limit(root.path(), PAGE), None);
    }
}
