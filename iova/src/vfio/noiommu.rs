//! Without an IOMMU: physical addresses, and nothing between the device and the machine's memory.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use vfio_bindings::bindings::vfio::VFIO_NOIOMMU_IOMMU;

use super::error::Tried;
use super::type1::container;
use super::{Access, Charge, Error, Group, Host, Limits, Mapper, Request};
use crate::{Range, Ranges};

/// What whoever asks for noiommu mode must be told.
pub const NOIOMMU_WARNING: &str = "noiommu: the device reads and writes all memory of this machine at physical addresses that \
                                   this process gives it; a mistake here, or whoever controls this process, owns the kernel. \
                                   Not for containers, not for machines that matter";

/// A container without an IOMMU.
#[derive(Debug)]
pub struct NoIommu {
    pagemap: File,
    _container: OwnedFd,
    group: Group,
}

impl NoIommu {
    /// Puts a group of noiommu mode into a container of its own.
    ///
    /// # Errors
    /// Those of the nodes; [`Error::System`].
    pub fn new(host: &Host, group: Group) -> Result<Self, Error> {
        let container = container(host)?;
        group.set_container(container.as_fd())?;
        // SAFETY: the request takes a number.
        unsafe { host.call_number(container.as_fd(), Request::SET_IOMMU, VFIO_NOIOMMU_IOMMU) }
            .tried("VFIO_SET_IOMMU without an IOMMU")?;
        let pagemap = File::open(host.path("proc/self/pagemap")).tried("open /proc/self/pagemap")?;
        Ok(NoIommu {
            pagemap,
            _container: container,
            group,
        })
    }

    /// The group.
    pub fn group(&self) -> &Group {
        &self.group
    }

    /// The physical page behind our page number `page`. `Documentation/admin-guide/mm/pagemap.rst`
    fn frame(&self, page: u64) -> Result<u64, Error> {
        let mut entry = [0; 8];
        self.pagemap
            .read_exact_at(&mut entry, page * 8)
            .tried("read /proc/self/pagemap")?;
        let entry = u64::from_ne_bytes(entry);
        let problem = |problem: &str| Error::Physical {
            problem: problem.to_owned(),
        };
        if entry >> 63 == 0 {
            return Err(problem(
                "a page of the memory is not present: populate it before it is mapped",
            ));
        }
        match entry & ((1 << 55) - 1) {
            0 => Err(problem(
                "the kernel hides physical addresses from this process: it needs CAP_SYS_ADMIN",
            )),
            frame => Ok(frame),
        }
    }
}

impl Mapper for NoIommu {
    fn name(&self) -> &'static str {
        "noiommu"
    }

    fn limits(&self) -> Result<Limits, Error> {
        let mut usable = Ranges::new();
        let _ = Range::new(0, u64::MAX).map(|all| usable.insert(all));
        Ok(Limits {
            usable,
            page_sizes: rustix::param::page_size() as u64,
            entries: None,
            charge: Charge::Nobody,
        })
    }

    unsafe fn map(&self, _iova: Range, _addr: NonNull<u8>, _access: Access) -> io::Result<()> {
        Ok(())
    }

    fn unmap(&self, iova: Range) -> io::Result<u64> {
        Ok(iova.len())
    }

    fn group(&self) -> Option<u32> {
        None
    }

    fn is_full(&self, _error: &io::Error) -> bool {
        false
    }

    /// The physical address, if the memory is in one piece there: a huge page is.
    fn fixed(&self, addr: NonNull<u8>, len: u64) -> Result<Option<u64>, Error> {
        let size = rustix::param::page_size() as u64;
        let first_page = addr.as_ptr().addr() as u64 / size;
        let first = self.frame(first_page)?;
        for page in 1..len.div_ceil(size) {
            if self.frame(first_page + page)? != first + page {
                return Err(Error::Physical {
                    problem: format!(
                        "{len} bytes of memory are not in one piece physically, but {} are: use one huge page",
                        page * size
                    ),
                });
            }
        }
        Ok(Some(first * size))
    }
}
