//! Our own source of memory.

use std::ffi::CString;
use std::io;
use std::os::fd::IntoRawFd;
use std::path::{Path, PathBuf};

use hugemem::{PageSize, Segment};

use super::mounts::{HugeStat, huge_mounts, huge_stat, unnamed_file};
use super::{Allocation, Choice, Error, Limit, MemorySource, Request, limits};
use crate::spec::{MemoryKind, PortSpec};

/// The huge pages that ports use: one holds the rings and buffers of a queue pair of 256.
const HUGE: PageSize = PageSize::HUGE_2M;

/// Memory as a port spec's `memory=` and `huge_dir=` say.
#[derive(Clone, Debug)]
pub struct Automatic {
    kind: MemoryKind,
    huge_dir: Option<PathBuf>,
    /// What `/proc` and `/sys` are below.
    root: PathBuf,
}

impl Automatic {
    /// Memory of this kind.
    pub fn new(kind: MemoryKind) -> Self {
        Automatic {
            kind,
            huge_dir: None,
            root: PathBuf::from("/"),
        }
    }

    /// Memory as the spec has it.
    pub fn from_spec(spec: &PortSpec) -> Self {
        Automatic {
            huge_dir: spec.huge_dir.clone(),
            ..Self::new(spec.memory)
        }
    }

    /// In this directory of a hugetlbfs and nowhere else.
    #[must_use]
    pub fn huge_dir(mut self, path: impl Into<PathBuf>) -> Self {
        self.huge_dir = Some(path.into());
        self
    }

    /// Reads `/proc` and `/sys` below this directory.
    #[must_use]
    pub fn root(mut self, path: impl Into<PathBuf>) -> Self {
        self.root = path.into();
        self
    }
}

impl Default for Automatic {
    fn default() -> Self {
        Self::new(MemoryKind::Auto)
    }
}

impl MemorySource for Automatic {
    fn allocate(&mut self, request: &Request<'_>) -> Result<Allocation, Error> {
        self.check()?;
        match (self.kind, &self.huge_dir) {
            (MemoryKind::Auto, None) => self.any(request),
            (MemoryKind::Hugetlbfs, None) => self.mounted(request, |_| true),
            // A directory is a choice, too.
            (_, Some(dir)) => self.in_dir(request, dir),
            (MemoryKind::MemfdHuge, None) => self.memfd_huge(request),
            (MemoryKind::Memfd, None) => self.memfd(request),
        }
    }
}

impl Automatic {
    /// An error if `memory=` and `huge_dir=` contradict each other, whatever the machine has.
    pub(crate) fn check(&self) -> Result<(), Error> {
        match (self.kind, &self.huge_dir) {
            (MemoryKind::MemfdHuge, Some(_)) => Err(Error::Contradiction { kind: "memfd-huge" }),
            (MemoryKind::Memfd, Some(_)) => Err(Error::Contradiction { kind: "memfd" }),
            _ => Ok(()),
        }
    }

    /// Huge pages if any are free, plain ones otherwise.
    ///
    /// A memfd before a mount: it is sealed, and no peer can truncate it. A mount can still have what a memfd has not:
    /// pages that its `min_size=` keeps.
    fn any(&self, request: &Request<'_>) -> Result<Allocation, Error> {
        let needed = pages(request.len, HUGE);
        let why = if limits::Pool::read(&self.root, HUGE).is_some_and(|pool| pool.free == 0) {
            // Not worth the attempt. (Pages that the kernel would only make on demand, nr_overcommit_hugepages, are
            // for an explicit choice.)
            let limit = Limit::Pool { page: HUGE, free: 0 };
            Error::Shortage {
                limit,
                page: HUGE,
                needed,
            }
            .why()
        } else {
            match self.memfd_huge(request) {
                Ok(allocation) => return Ok(allocation),
                // Nor will another kind be bound to this node.
                Err(error @ Error::Numa { .. }) => return Err(error),
                // Pages much larger than the need are for an explicit choice.
                Err(error) => match self.mounted(request, |page| page.bytes() <= request.len.max(HUGE.bytes())) {
                    Ok(mut allocation) => {
                        allocation.choice.why = Some(format!("no memfd: {}", error.why()));
                        return Ok(allocation);
                    }
                    Err(Error::NoMount) => error.why(),
                    Err(mount) => format!("{}; {}", error.why(), mount.why()),
                },
            }
        };
        let mut allocation = self.memfd(request)?;
        allocation.choice.why = Some(why);
        Ok(allocation)
    }

    fn memfd(&self, request: &Request<'_>) -> Result<Allocation, Error> {
        self.plain_limit(request)?;
        let segment = Segment::memfd(&name(request.name), request.len, PageSize::BASE, request.numa)
            .map_err(|error| self.explain("memfd", request, None, error))?;
        Ok(Allocation {
            choice: Choice::new("memfd", segment.page_size()),
            segment,
        })
    }

    /// An error if plain pages would end this process or another: for them the kernel knows no shortage.
    fn plain_limit(&self, request: &Request<'_>) -> Result<(), Error> {
        let page = PageSize::BASE;
        let needed = pages(request.len, page);
        let cgroup = limits::memory_limit(&self.root).map(|limit| Limit::Cgroup {
            path: limit.path,
            page,
            free: limit.left / page.bytes() as u64,
        });
        let machine = limits::available(&self.root).map(|bytes| Limit::Machine {
            page,
            free: bytes / page.bytes() as u64,
        });
        let short = cgroup
            .into_iter()
            .chain(machine)
            .find(|limit| limit.free().is_some_and(|free| free < needed));
        match short {
            Some(limit) => Err(Error::Shortage { limit, page, needed }),
            None => Ok(()),
        }
    }

    fn memfd_huge(&self, request: &Request<'_>) -> Result<Allocation, Error> {
        let segment = Segment::memfd(&name(request.name), request.len, HUGE, request.numa)
            .map_err(|error| self.explain("memfd-huge", request, None, error))?;
        Ok(Allocation {
            choice: Choice::new("memfd-huge", segment.page_size()),
            segment,
        })
    }

    /// In the first mount that has enough; the error is that of the most suitable.
    fn mounted(&self, request: &Request<'_>, fits: impl Fn(PageSize) -> bool) -> Result<Allocation, Error> {
        let mut first = None;
        for mount in huge_mounts(&self.root, request.len)
            .iter()
            .filter(|mount| mount.page().is_some_and(&fits))
        {
            match self.in_dir(request, &mount.path) {
                Err(error) => first = first.or(Some(error)),
                allocation => return allocation,
            }
        }
        Err(first.unwrap_or(Error::NoMount))
    }

    fn in_dir(&self, request: &Request<'_>, dir: &Path) -> Result<Allocation, Error> {
        let failed = |source| Error::Mount {
            path: dir.to_path_buf(),
            source,
        };
        let not_huge = || Error::NotHugetlbfs {
            path: dir.to_path_buf(),
        };
        let HugeStat { page, free } = huge_stat(dir).map_err(failed)?.ok_or_else(not_huge)?;
        let needed = pages(request.len, page);
        if let Some(free) = free.filter(|free| *free < needed) {
            let limit = Limit::Mount {
                path: dir.to_path_buf(),
                page,
                free,
            };
            return Err(Error::Shortage { limit, page, needed });
        }
        let file = unnamed_file(dir).map_err(failed)?;
        // SAFETY: the descriptor is open and ours, and is given to the segment.
        let segment = unsafe { Segment::file(file.into_raw_fd(), request.len, request.numa) }
            .map_err(|error| self.explain("hugetlbfs", request, Some(dir), error))?;
        let mut choice = Choice::new("hugetlbfs", segment.page_size());
        choice.path = Some(dir.to_path_buf());
        Ok(Allocation { segment, choice })
    }

    /// Finds the limit behind an error.
    fn explain(&self, kind: &'static str, request: &Request<'_>, dir: Option<&Path>, error: hugemem::Error) -> Error {
        match error {
            hugemem::Error::Shortage { page, errno, .. } => {
                let page = PageSize::huge(page).unwrap_or(PageSize::BASE);
                let needed = pages(request.len, page);
                let limit = if page.is_huge() {
                    self.limit(request, dir, page, needed)
                } else {
                    None
                };
                Error::Shortage {
                    limit: limit.unwrap_or(Limit::Memory { page, errno }),
                    page,
                    needed,
                }
            }
            hugemem::Error::PageSize { page } => Error::NoHugePages {
                kind,
                page: PageSize::huge(page).unwrap_or(PageSize::BASE),
            },
            hugemem::Error::Numa { node, errno } => Error::Numa {
                node,
                source: io::Error::from_raw_os_error(errno),
                advice: match errno {
                    libc::EINVAL => "name a node that has memory (numactl --hardware), or leave numa= out",
                    _ => "a container's seccomp filter may forbid mbind(2): allow it, or leave numa= out",
                },
            },
            source => Error::Segment { kind, source },
        }
    }

    /// The limit of huge pages that `needed` is beyond, the innermost first.
    fn limit(&self, request: &Request<'_>, dir: Option<&Path>, page: PageSize, needed: u64) -> Option<Limit> {
        if let Some(path) = dir {
            let free = huge_stat(path).ok().flatten().and_then(|stat| stat.free);
            if let Some(free) = free.filter(|free| *free < needed) {
                return Some(Limit::Mount {
                    path: path.to_path_buf(),
                    page,
                    free,
                });
            }
        }
        if let Some(limit) = limits::cgroup_limit(&self.root, page) {
            let free = limit.left / page.bytes() as u64;
            if free < needed {
                return Some(Limit::Cgroup {
                    path: limit.path,
                    page,
                    free,
                });
            }
        }
        if let Some(free) = limits::Pool::read(&self.root, page)
            .map(|pool| pool.available())
            .filter(|free| *free < needed)
        {
            return Some(Limit::Pool { page, free });
        }
        let node = request.numa?;
        let free = limits::free_pages_on(&self.root, page, node).filter(|free| *free < needed)?;
        Some(Limit::Node { node, page, free })
    }
}

fn pages(len: usize, page: PageSize) -> u64 {
    len.div_ceil(page.bytes()) as u64
}

/// A memfd's name: at most 249 bytes, see `memfd_create(2)`.
fn name(name: &str) -> CString {
    let bytes: Vec<u8> = name.bytes().filter(|&byte| byte != 0).take(249).collect();
    CString::new(bytes).unwrap_or_default()
}
