//! The newer interface: address spaces of iommufd, devices by a character device each.
//! `Documentation/userspace-api/iommufd.rst`, `include/uapi/linux/iommufd.h`.

use std::io;
use std::mem::offset_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use iommufd_bindings as uapi;
use vfio_bindings::bindings::vfio::{vfio_device_attach_iommufd_pt, vfio_device_bind_iommufd};

use super::error::Tried;
use super::limits::collect;
use super::{Access, Charge, Error, Host, Limits, Mapper, Member, Request};
use crate::Range;

/// An address space of iommufd.
#[derive(Debug)]
pub struct Iommufd {
    host: Host,
    fd: OwnedFd,
    ioas: u32,
    group: Option<u32>,
}

/// More ranges than any platform leaves.
const MOST_RANGES: u32 = 4096;

impl Iommufd {
    /// Makes an address space and attaches a device to it, whose character device is `cdev`. `name` is for messages,
    /// `group` the IOMMU group that it is in.
    ///
    /// # Errors
    /// Those of the node; [`Error::NotViable`], [`Error::NoInterruptRemapping`], [`Error::NodeBusy`].
    pub fn new(host: &Host, cdev: BorrowedFd<'_>, name: &str, group: Option<u32>) -> Result<Self, Error> {
        let fd = host.open(
            "dev/iommu",
            "load it (modprobe iommufd), or give the container /dev/iommu",
        )?;
        let mut bind = vfio_device_bind_iommufd {
            argsz: offset_of!(vfio_device_bind_iommufd, token_uuid_ptr) as u32,
            iommufd: fd.as_raw_fd(),
            ..Default::default()
        };
        // SAFETY: the structure of this request, with the size of the part that every kernel knows.
        unsafe { host.call(cdev, Request::DEVICE_BIND_IOMMUFD, &mut bind) }
            .map_err(|error| refused(host, error, name, group, "VFIO_DEVICE_BIND_IOMMUFD"))?;
        let mut alloc = uapi::iommu_ioas_alloc {
            size: size_of::<uapi::iommu_ioas_alloc>() as u32,
            ..Default::default()
        };
        // SAFETY: the structure of this request, with its size.
        unsafe { host.call(fd.as_fd(), Request::IOAS_ALLOC, &mut alloc) }.tried("IOMMU_IOAS_ALLOC")?;
        let mut attach = vfio_device_attach_iommufd_pt {
            argsz: offset_of!(vfio_device_attach_iommufd_pt, pasid) as u32,
            pt_id: alloc.out_ioas_id,
            ..Default::default()
        };
        // SAFETY: as with bind.
        unsafe { host.call(cdev, Request::DEVICE_ATTACH_IOMMUFD_PT, &mut attach) }
            .map_err(|error| refused(host, error, name, group, "VFIO_DEVICE_ATTACH_IOMMUFD_PT"))?;
        Ok(Iommufd {
            host: host.clone(),
            fd,
            ioas: alloc.out_ioas_id,
            group,
        })
    }
}

/// EPERM: a driver of the kernel has a device of the group, or interrupts are not isolated.
fn refused(host: &Host, source: io::Error, name: &str, group: Option<u32>, tried: &str) -> Error {
    if source.raw_os_error() == Some(libc::EPERM) {
        let mut blocking = group.map(|g| host.group_members(g)).unwrap_or_default();
        blocking.retain(Member::blocks);
        return match group.filter(|_| !blocking.is_empty()) {
            Some(group) => Error::NotViable { group, blocking },
            None => Error::NoInterruptRemapping {
                device: name.to_owned(),
                module: "iommufd",
            },
        };
    }
    Error::System {
        tried: format!("{tried} of {name}"),
        source,
    }
}

impl Mapper for Iommufd {
    fn name(&self) -> &'static str {
        "iommufd"
    }

    fn limits(&self) -> Result<Limits, Error> {
        let mut ranges = vec![uapi::iommu_iova_range::default(); 8];
        let mut query = uapi::iommu_ioas_iova_ranges {
            size: size_of::<uapi::iommu_ioas_iova_ranges>() as u32,
            ioas_id: self.ioas,
            ..Default::default()
        };
        loop {
            query.num_iovas = ranges.len() as u32;
            query.allowed_iovas = ranges.as_mut_ptr().expose_provenance() as u64;
            // SAFETY: the structure of this request, with its size, pointing to num_iovas ranges.
            match unsafe { self.host.call(self.fd.as_fd(), Request::IOAS_IOVA_RANGES, &mut query) } {
                Ok(_) => break,
                Err(error)
                    if error.raw_os_error() == Some(libc::EMSGSIZE)
                        && query.num_iovas as usize > ranges.len()
                        && query.num_iovas <= MOST_RANGES =>
                {
                    ranges.resize(query.num_iovas as usize, Default::default());
                }
                Err(error) => return Err(error).tried("IOMMU_IOAS_IOVA_RANGES"),
            }
        }
        ranges.truncate(query.num_iovas as usize);
        Ok(Limits {
            usable: collect(ranges.iter().map(|range| (range.start, range.last))),
            // An alignment of 1 means pages of ours: the kernel maps nothing smaller.
            page_sizes: query.out_iova_alignment.max(rustix::param::page_size() as u64),
            entries: None,
            charge: Charge::User,
        })
    }

    unsafe fn map(&self, iova: Range, addr: NonNull<u8>, access: Access) -> io::Result<()> {
        let (read, write) = access.directions();
        let flag = |on: bool, flag: u32| if on { flag } else { 0 };
        let mut map = uapi::iommu_ioas_map {
            size: size_of::<uapi::iommu_ioas_map>() as u32,
            flags: uapi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA
                | flag(read, uapi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE)
                | flag(write, uapi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE),
            ioas_id: self.ioas,
            user_va: addr.as_ptr().expose_provenance() as u64,
            length: iova.len(),
            iova: iova.start(),
            ..Default::default()
        };
        // SAFETY: the structure of this request, with its size; the caller answers for the memory.
        unsafe { self.host.call(self.fd.as_fd(), Request::IOAS_MAP, &mut map) }.map(drop)
    }

    fn unmap(&self, iova: Range) -> io::Result<u64> {
        let mut unmap = uapi::iommu_ioas_unmap {
            size: size_of::<uapi::iommu_ioas_unmap>() as u32,
            ioas_id: self.ioas,
            iova: iova.start(),
            length: iova.len(),
        };
        // SAFETY: the structure of this request, with its size.
        unsafe { self.host.call(self.fd.as_fd(), Request::IOAS_UNMAP, &mut unmap) }?;
        Ok(unmap.length)
    }

    fn group(&self) -> Option<u32> {
        self.group
    }

    fn is_full(&self, _error: &io::Error) -> bool {
        false
    }
}
