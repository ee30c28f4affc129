//! The container interface: groups share an address space, the type1v2 IOMMU. `include/uapi/linux/vfio.h`.

use std::io;
use std::mem::offset_of;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;

use vfio_bindings::bindings::vfio as uapi;

use super::error::Tried;
use super::limits::{cautious, collect};
use super::{Access, Charge, Error, Group, Host, Limits, Mapper, Request};
use crate::{Range, Ranges};

/// A container with a type1v2 IOMMU, and the group in it.
#[derive(Debug)]
pub struct Type1 {
    host: Host,
    container: OwnedFd,
    group: Group,
}

/// Opens a container and looks whether it is of our version.
pub(super) fn container(host: &Host) -> Result<OwnedFd, Error> {
    let missing = "load VFIO (modprobe vfio-pci); a container must be given /dev/vfio/vfio beside its group";
    let container = host.open("dev/vfio/vfio", missing)?;
    // SAFETY: the request takes no argument.
    let found =
        unsafe { host.call_number(container.as_fd(), Request::GET_API_VERSION, 0) }.tried("VFIO_GET_API_VERSION")?;
    if found as u32 != uapi::VFIO_API_VERSION {
        return Err(Error::ApiVersion { found });
    }
    Ok(container)
}

impl Type1 {
    /// Puts a group into a container of its own and gives that an IOMMU. `device` is for messages.
    ///
    /// # Errors
    /// Those of the nodes; [`Error::NoType1`], [`Error::NotViable`], [`Error::NoInterruptRemapping`].
    pub fn new(host: &Host, group: Group, device: &str) -> Result<Self, Error> {
        let container = container(host)?;
        let kind = uapi::VFIO_TYPE1v2_IOMMU;
        // SAFETY: the request takes a number.
        let offered = unsafe { host.call_number(container.as_fd(), Request::CHECK_EXTENSION, kind) }
            .tried("VFIO_CHECK_EXTENSION")?;
        if offered == 0 {
            return Err(Error::NoType1);
        }
        group.set_container(container.as_fd())?;
        // SAFETY: the request takes a number.
        match unsafe { host.call_number(container.as_fd(), Request::SET_IOMMU, kind) } {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                return Err(Error::NoInterruptRemapping {
                    device: device.to_owned(),
                    module: "vfio_iommu_type1",
                });
            }
            Err(error) => return Err(error).tried("VFIO_SET_IOMMU"),
        }
        Ok(Type1 {
            host: host.clone(),
            container,
            group,
        })
    }

    /// The group.
    pub fn group(&self) -> &Group {
        &self.group
    }

    /// `VFIO_IOMMU_GET_INFO`, with the capabilities behind it.
    fn info(&self) -> io::Result<Info> {
        // In words of 8 bytes, for the structure's alignment.
        let mut words = vec![0u64; size_of::<uapi::vfio_iommu_type1_info>() / 8];
        loop {
            let size = words.len() * 8;
            let bytes = size.min(MOST_INFO) as u32;
            write_u32(&mut words, 0, bytes);
            // SAFETY: at least as many bytes as the structure, and argsz says how many.
            unsafe {
                self.host
                    .call(self.container.as_fd(), Request::IOMMU_GET_INFO, words.as_mut_slice())
            }?;
            let info = Info { words };
            let needed = info.u32(offset_of!(uapi::vfio_iommu_type1_info, argsz)) as usize;
            if needed <= size || size >= MOST_INFO {
                return Ok(info);
            }
            words = vec![0; needed.min(MOST_INFO).div_ceil(8)];
        }
    }
}

/// More than any kernel says of an IOMMU.
const MOST_INFO: usize = 1 << 16;

impl Mapper for Type1 {
    fn name(&self) -> &'static str {
        "VFIO type1v2"
    }

    fn limits(&self) -> Result<Limits, Error> {
        let info = self.info().tried("VFIO_IOMMU_GET_INFO")?;
        let has_sizes = info.flags() & uapi::VFIO_IOMMU_INFO_PGSIZES != 0;
        Ok(Limits {
            usable: info
                .usable()
                .unwrap_or_else(|| cautious(&self.host.reserved_regions(self.group.number()))),
            page_sizes: if has_sizes {
                info.u64(offset_of!(uapi::vfio_iommu_type1_info, iova_pgsizes))
            } else {
                4096
            },
            entries: info.entries(),
            charge: Charge::Process,
        })
    }

    unsafe fn map(&self, iova: Range, addr: NonNull<u8>, access: Access) -> io::Result<()> {
        let (read, write) = access.directions();
        let flag = |on: bool, flag: u32| if on { flag } else { 0 };
        let mut map = uapi::vfio_iommu_type1_dma_map {
            argsz: size_of::<uapi::vfio_iommu_type1_dma_map>() as u32,
            flags: flag(read, uapi::VFIO_DMA_MAP_FLAG_READ) | flag(write, uapi::VFIO_DMA_MAP_FLAG_WRITE),
            vaddr: addr.as_ptr().expose_provenance() as u64,
            iova: iova.start(),
            size: iova.len(),
        };
        // SAFETY: the structure of this request, with its size; the caller answers for the memory.
        unsafe { self.host.call(self.container.as_fd(), Request::IOMMU_MAP_DMA, &mut map) }.map(drop)
    }

    fn unmap(&self, iova: Range) -> io::Result<u64> {
        let size = offset_of!(uapi::vfio_iommu_type1_dma_unmap, data);
        let mut unmap = uapi::vfio_iommu_type1_dma_unmap {
            argsz: size as u32,
            flags: 0,
            iova: iova.start(),
            size: iova.len(),
            data: Default::default(),
        };
        // SAFETY: the structure of this request, without the data that flags would ask for.
        unsafe {
            self.host
                .call(self.container.as_fd(), Request::IOMMU_UNMAP_DMA, &mut unmap)
        }?;
        Ok(unmap.size)
    }

    fn group(&self) -> Option<u32> {
        Some(self.group.number())
    }

    fn is_full(&self, error: &io::Error) -> bool {
        error.raw_os_error() == Some(libc::ENOSPC)
    }
}

/// `struct vfio_iommu_type1_info` and what follows it.
struct Info {
    words: Vec<u64>,
}

impl Info {
    fn u32(&self, offset: usize) -> u32 {
        let word = self.words.get(offset / 8).copied().unwrap_or(0).to_ne_bytes();
        let at = (offset % 8) & !3;
        u32::from_ne_bytes([word[at], word[at + 1], word[at + 2], word[at + 3]])
    }

    fn u64(&self, offset: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&self.u32(offset).to_ne_bytes());
        bytes[4..].copy_from_slice(&self.u32(offset + 4).to_ne_bytes());
        u64::from_ne_bytes(bytes)
    }

    fn flags(&self) -> u32 {
        self.u32(offset_of!(uapi::vfio_iommu_type1_info, flags))
    }

    /// Where the capability `id` begins. The chain only leads on, so that it ends.
    fn capability(&self, id: u32) -> Option<usize> {
        if self.flags() & uapi::VFIO_IOMMU_INFO_CAPS == 0 {
            return None;
        }
        let mut at = self.u32(offset_of!(uapi::vfio_iommu_type1_info, cap_offset)) as usize;
        let mut before = 0;
        while at > before
            && at.is_multiple_of(4)
            && at + size_of::<uapi::vfio_info_cap_header>() <= self.words.len() * 8
        {
            // Id and version are 16 bits each.
            let word = self.u32(at).to_ne_bytes();
            if u32::from(u16::from_ne_bytes([word[0], word[1]])) == id {
                return Some(at);
            }
            before = at;
            at = self.u32(at + offset_of!(uapi::vfio_info_cap_header, next)) as usize;
        }
        None
    }

    fn usable(&self) -> Option<Ranges> {
        let at = self.capability(uapi::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE)?;
        let count = self.u32(at + offset_of!(uapi::vfio_iommu_type1_info_cap_iova_range, nr_iovas)) as usize;
        let first = at + offset_of!(uapi::vfio_iommu_type1_info_cap_iova_range, iova_ranges);
        let size = size_of::<uapi::vfio_iova_range>();
        let room = (self.words.len() * 8).saturating_sub(first) / size;
        Some(collect((0..count.min(room)).map(|index| {
            let range = first + index * size;
            (self.u64(range), self.u64(range + 8))
        })))
    }

    fn entries(&self) -> Option<u32> {
        let at = self.capability(uapi::VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL)?;
        Some(self.u32(at + offset_of!(uapi::vfio_iommu_type1_info_dma_avail, avail)))
    }
}

fn write_u32(words: &mut [u64], index: usize, value: u32) {
    let mut bytes = words[index].to_ne_bytes();
    bytes[..4].copy_from_slice(&value.to_ne_bytes());
    words[index] = u64::from_ne_bytes(bytes);
}
