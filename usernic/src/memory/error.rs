//! Why there is no memory, and what to do about it.

use std::fmt;
use std::io;
use std::path::PathBuf;

use hugemem::PageSize;

/// Why a segment could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Too few pages; the limit that bit says which.
    #[error("{limit}, {needed} needed: {}", limit.advice(*page, *needed))]
    Shortage {
        /// Which pages there are too few of.
        limit: Limit,
        /// Their size.
        page: PageSize,
        /// How many the port needs.
        needed: u64,
    },
    /// There is no mount of hugetlbfs.
    #[error(
        "memory=hugetlbfs: no hugetlbfs is mounted here with write access: mount one, or pass memory=memfd-huge, which needs none"
    )]
    NoMount,
    /// `huge_dir=` is something else.
    #[error("huge_dir={} is not on a hugetlbfs: mount one there (mount -t hugetlbfs none {}), or leave huge_dir= out", path.display(), path.display())]
    NotHugetlbfs {
        /// The directory.
        path: PathBuf,
    },
    /// No file could be made in the mount.
    #[error("hugetlbfs at {}: no file can be made there: {source}: mount it with uid={uid} or mode=1777, or pass memory=memfd-huge", path.display(), uid = rustix::process::geteuid().as_raw())]
    Mount {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The kernel has no such huge pages.
    #[error("memory={kind}: this kernel has no huge pages of {page}: pass memory=memfd")]
    NoHugePages {
        /// As in `memory=`.
        kind: &'static str,
        /// The pages asked for.
        page: PageSize,
    },
    /// `huge_dir=` and a `memory=` that is no mount contradict each other.
    #[error("huge_dir= names a mount, but memory={kind} uses none: leave one of them out")]
    Contradiction {
        /// As in `memory=`.
        kind: &'static str,
    },
    /// A NUMA node that memory cannot be bound to.
    #[error("numa={node}: memory cannot be bound to this node: {source}: {advice}")]
    Numa {
        /// As in `numa=`.
        node: u32,
        /// What the system said.
        source: io::Error,
        /// What to do.
        advice: &'static str,
    },
    /// The segment could not be made for another reason.
    #[error("memory={kind}: {source}")]
    Segment {
        /// As in `memory=`.
        kind: &'static str,
        /// Why.
        source: hugemem::Error,
    },
    /// A source of the application's own failed.
    #[error("memory: {0}")]
    Source(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl Error {
    /// Why a choice is no better, for one that found another way: without the advice to take that way.
    pub(super) fn why(&self) -> String {
        match self {
            Error::Shortage { limit, page, needed } => {
                format!(
                    "{limit}, {needed} needed: {}",
                    limit.cure(*page, *needed).trim_end_matches(',')
                )
            }
            Error::NoHugePages { page, .. } => format!("this kernel has no huge pages of {page}"),
            other => other.to_string(),
        }
    }

    /// An error of an application's own source.
    pub fn source(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Error::Source(error.into())
    }
}

/// What there is too little of.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Limit {
    /// The `size=` of a mount.
    Mount {
        /// Where it is mounted.
        path: PathBuf,
        /// The pages' size.
        page: PageSize,
        /// Pages that it still allows.
        free: u64,
    },
    /// The kernel's pool of huge pages.
    Pool {
        /// The pages' size.
        page: PageSize,
        /// Pages that are free and not promised to anybody.
        free: u64,
    },
    /// The pool of one NUMA node.
    Node {
        /// The node.
        node: u32,
        /// The pages' size.
        page: PageSize,
        /// Pages that are free there.
        free: u64,
    },
    /// The hugetlb controller of a cgroup.
    Cgroup {
        /// The file with the limit.
        path: PathBuf,
        /// The pages' size.
        page: PageSize,
        /// Pages that it still allows.
        free: u64,
    },
    /// The memory of the machine.
    Machine {
        /// The pages' size.
        page: PageSize,
        /// Pages that it has to give.
        free: u64,
    },
    /// Something that does not say how much it has left: the memory of the machine, of a cgroup, or of a process.
    Memory {
        /// The pages' size.
        page: PageSize,
        /// What the system said.
        errno: i32,
    },
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Limit::Mount { path, page, free } => {
                write!(
                    f,
                    "hugetlbfs at {} has {} of {page}",
                    path.display(),
                    pages(*free, "free page")
                )
            }
            Limit::Pool { page, free } => write!(f, "the kernel has {} of {page}", pages(*free, "free huge page")),
            Limit::Node { node, page, free } => {
                write!(f, "NUMA node {node} has {} of {page}", pages(*free, "free huge page"))
            }
            Limit::Cgroup { path, page, free } => {
                write!(
                    f,
                    "the cgroup limit {} allows {} of {page}",
                    path.display(),
                    pages(*free, "more page")
                )
            }
            Limit::Machine { page, free } => write!(f, "the machine has {} of {page}", pages(*free, "available page")),
            Limit::Memory { page, errno } => {
                write!(
                    f,
                    "pages of {page} are refused ({})",
                    io::Error::from_raw_os_error(*errno)
                )
            }
        }
    }
}

impl Limit {
    /// What to do, for an error that needs `needed` pages.
    fn advice(&self, page: PageSize, needed: u64) -> String {
        let smaller = self
            .free()
            .map_or("pass memory=memfd".into(), |free| smaller(page, free));
        match self {
            Limit::Memory { .. } if page.is_huge() => smaller,
            Limit::Memory { .. } => self.cure(page, needed),
            Limit::Machine { .. } => self.cure(page, needed),
            // Nothing takes less than plain pages do.
            Limit::Cgroup { .. } if !page.is_huge() => self.cure(page, needed),
            _ => format!("{} or {smaller}", self.cure(page, needed)),
        }
    }

    /// How there would be more.
    fn cure(&self, page: PageSize, needed: u64) -> String {
        let kib = page.bytes() >> 10;
        let missing = needed.saturating_sub(self.free().unwrap_or(0));
        match self {
            Limit::Mount { .. } => "raise its size=".into(),
            Limit::Pool { .. } => format!("add {missing} to /sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages"),
            Limit::Node { node, .. } => format!(
                "add {missing} to /sys/devices/system/node/node{node}/hugepages/hugepages-{kib}kB/nr_hugepages, leave \
                 numa= out,"
            ),
            Limit::Cgroup { .. } if page.is_huge() => "raise it (a container's hugepage limit)".into(),
            Limit::Cgroup { .. } => {
                "raise it (a container's memory limit), or pass a smaller mem=, buffers= or queue_size=".into()
            }
            Limit::Machine { .. } | Limit::Memory { .. } => "free memory, or pass a smaller mem= or buffers=".into(),
        }
    }

    pub(super) fn free(&self) -> Option<u64> {
        match self {
            Limit::Mount { free, .. }
            | Limit::Pool { free, .. }
            | Limit::Node { free, .. }
            | Limit::Machine { free, .. }
            | Limit::Cgroup { free, .. } => Some(*free),
            Limit::Memory { .. } => None,
        }
    }
}

fn pages(count: u64, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// The size that would fit, as it is typed.
fn smaller(page: PageSize, free: u64) -> String {
    match free.saturating_mul(page.bytes() as u64) {
        0 => "pass memory=memfd".into(),
        bytes if bytes % (1 << 20) == 0 => format!("pass mem={}M", bytes >> 20),
        bytes => format!("pass mem={}K", bytes >> 10),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shortage_names_the_limit_and_the_cure() {
        let page = PageSize::HUGE_2M;
        let text = |limit: Limit| Error::Shortage { limit, page, needed: 8 }.to_string();
        assert_eq!(
            text(Limit::Mount {
                path: "/dev/hugepages".into(),
                page,
                free: 3
            }),
            "hugetlbfs at /dev/hugepages has 3 free pages of 2 MiB, 8 needed: raise its size= or pass mem=6M"
        );
        assert_eq!(
            text(Limit::Pool { page, free: 1 }),
            "the kernel has 1 free huge page of 2 MiB, 8 needed: add 7 to \
             /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages or pass mem=2M"
        );
        let path = PathBuf::from("/sys/fs/cgroup/hugetlb.2MB.max");
        assert_eq!(
            text(Limit::Cgroup { path, page, free: 0 }),
            "the cgroup limit /sys/fs/cgroup/hugetlb.2MB.max allows 0 more pages of 2 MiB, 8 needed: raise it (a \
             container's hugepage limit) or pass memory=memfd"
        );
    }
}
