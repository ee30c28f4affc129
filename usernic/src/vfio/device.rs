//! An open device. `include/uapi/linux/vfio.h`, "API for DEVICE file descriptors".

use std::fmt;
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use iova::vfio::{Attached, Host, NOIOMMU_WARNING, Options, Request, Space, attach};
use rustix::event::{EventfdFlags, eventfd};
use vfio_bindings::bindings::vfio as uapi;

use super::{Bar, Config, Error};
use crate::pci::Address;

/// A PCI function that this process drives: its registers, its interrupts, its address space.
///
/// The kernel resets it when it is opened. Dropping it keeps it from memory (bus mastering off), turns its interrupts off
/// and resets it (FLR), also while its registers are still mapped: nothing of what this process did is left for the next
/// one.
pub struct Device {
    host: Host,
    name: String,
    space: Space,
    flags: u32,
    /// Offset and size of configuration space in the device's file.
    config: (u64, u64),
    /// Whether MSI-X is on.
    interrupts: AtomicBool,
    fd: OwnedFd,
}

impl Device {
    /// Opens a device that is bound to vfio-pci, on this machine.
    ///
    /// # Errors
    /// [`Error::Attach`] says what is in the way; [`Error::NotPci`], [`Error::Config`].
    pub fn open(address: Address, options: &Options) -> Result<Self, Error> {
        Self::open_on(&Host::default(), address, options)
    }

    /// Opens a device of `host`.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_on(host: &Host, address: Address, options: &Options) -> Result<Self, Error> {
        let Attached { device, space, .. } = attach(host, &address.sysfs(), options)?;
        if space.interface() == "noiommu" {
            tracing::warn!("{address}: {NOIOMMU_WARNING}");
        }
        let mut device = Device {
            host: host.clone(),
            name: address.to_string(),
            space,
            flags: 0,
            config: (0, 0),
            interrupts: AtomicBool::new(false),
            fd: device,
        };
        let mut info = uapi::vfio_device_info {
            argsz: size_of::<uapi::vfio_device_info>() as u32,
            ..Default::default()
        };
        // SAFETY: the structure of this request, with its size.
        unsafe { device.call(Request::DEVICE_GET_INFO, &mut info) }.map_err(|e| device.failed("ask for", e))?;
        if info.flags & uapi::VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(Error::NotPci {
                device: device.name.clone(),
                flags: info.flags,
            });
        }
        device.flags = info.flags;
        let config = device.region(uapi::VFIO_PCI_CONFIG_REGION_INDEX)?;
        device.config = (config.offset, config.size);
        // The kernel has reset it just now, if it can be reset.
        device.config().set_bus_master(false)?;
        Ok(device)
    }

    /// Its address, as text.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it finds memory.
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// Its configuration space.
    pub fn config(&self) -> Config<'_> {
        let (offset, size) = self.config;
        Config {
            device: self.fd.as_fd(),
            name: &self.name,
            offset,
            size,
        }
    }

    /// Maps the registers behind a base address register (0 to 5), of which the driver needs `needed` bytes.
    ///
    /// # Errors
    /// [`Error::BarTooSmall`], [`Error::NotMappable`], [`Error::System`].
    pub fn bar(&self, bar: u32, needed: usize) -> Result<Bar, Error> {
        let region = self.region(bar)?;
        if region.size < needed as u64 || needed == 0 {
            return Err(Error::BarTooSmall {
                device: self.name.clone(),
                bar,
                size: region.size,
                needed,
            });
        }
        if region.mappable < needed as u64 {
            return Err(Error::NotMappable {
                device: self.name.clone(),
                bar,
                size: region.size,
                mappable: region.mappable,
                needed,
            });
        }
        // A driver needs no more than it says.
        let len = needed.next_multiple_of(rustix::param::page_size());
        let len = usize::try_from(region.mappable).map_or(len, |most| len.min(most));
        Bar::map(&self.fd, region.offset, len)
    }

    /// MSI-X vectors that it has.
    ///
    /// # Errors
    /// [`Error::System`].
    pub fn vectors(&self) -> Result<u32, Error> {
        let mut info = uapi::vfio_irq_info {
            argsz: size_of::<uapi::vfio_irq_info>() as u32,
            index: uapi::VFIO_PCI_MSIX_IRQ_INDEX,
            ..Default::default()
        };
        // SAFETY: the structure of this request, with its size.
        unsafe { self.call(Request::DEVICE_GET_IRQ_INFO, &mut info) }
            .map_err(|e| self.failed("ask for the MSI-X vectors of", e))?;
        Ok(info.count)
    }

    /// Turns the first `count` MSI-X vectors on, an eventfd each, which becomes readable when the vector is raised. It
    /// replaces what was on before.
    ///
    /// # Errors
    /// [`Error::Vectors`], [`Error::System`].
    pub fn enable_vectors(&self, count: usize) -> Result<Vec<OwnedFd>, Error> {
        let has = self.vectors()?;
        if count == 0 || count > has as usize {
            return Err(Error::Vectors {
                device: self.name.clone(),
                has,
                asked: count,
            });
        }
        self.disable_vectors()?;
        let fds = self.trigger(uapi::VFIO_PCI_MSIX_IRQ_INDEX, count, "enable MSI-X of")?;
        self.interrupts.store(true, Ordering::Relaxed);
        Ok(fds)
    }

    /// Turns all MSI-X vectors off.
    ///
    /// # Errors
    /// [`Error::System`].
    pub fn disable_vectors(&self) -> Result<(), Error> {
        // The kernel refuses to turn off what is not on.
        if !self.interrupts.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        let none = uapi::VFIO_IRQ_SET_DATA_NONE | uapi::VFIO_IRQ_SET_ACTION_TRIGGER;
        self.set_irqs(uapi::VFIO_PCI_MSIX_IRQ_INDEX, none, 0, &[])
            .map_err(|e| self.failed("disable MSI-X of", e))
    }

    /// An eventfd that becomes readable when the kernel wants the device back, because it is unplugged or unbound: whoever
    /// did that waits until this process closes the device. `None`: this kernel does not tell.
    ///
    /// # Errors
    /// [`Error::System`].
    pub fn notice_of_removal(&self) -> Result<Option<OwnedFd>, Error> {
        match self.trigger(uapi::VFIO_PCI_REQ_IRQ_INDEX, 1, "watch the removal of") {
            Ok(fds) => Ok(fds.into_iter().next()),
            Err(Error::System { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether the device can be reset alone.
    pub fn can_reset(&self) -> bool {
        self.flags & uapi::VFIO_DEVICE_FLAGS_RESET != 0
    }

    /// Resets the function (FLR), which takes 100 ms. The kernel keeps its configuration space over it, interrupts and bus
    /// mastering included; registers and queues begin anew.
    ///
    /// # Errors
    /// [`Error::NoReset`], [`Error::System`].
    pub fn reset(&self) -> Result<(), Error> {
        if !self.can_reset() {
            return Err(Error::NoReset {
                device: self.name.clone(),
            });
        }
        // SAFETY: the request takes no argument.
        unsafe { self.host.call_number(self.fd.as_fd(), Request::DEVICE_RESET, 0) }
            .map_err(|e| self.failed("reset", e))?;
        Ok(())
    }

    fn region(&self, index: u32) -> Result<Region, Error> {
        // The structure, and room for the capabilities that say which part can be mapped.
        let mut words = [0u64; 64];
        let size = size_of_val(&words) as u32;
        let fields = |words: &[u64; 64], offset: usize| {
            let bytes = words[offset / 8].to_ne_bytes();
            let at = offset % 8;
            u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        // argsz and flags; index and cap_offset.
        words[0] = u64::from_ne_bytes(pair(size, 0));
        words[1] = u64::from_ne_bytes(pair(index, 0));
        // SAFETY: more bytes than the structure of this request, and argsz says how many.
        unsafe { self.call(Request::DEVICE_GET_REGION_INFO, &mut words) }
            .map_err(|e| self.failed(&format!("ask for region {index} of"), e))?;
        let flags = fields(&words, offset_of!(uapi::vfio_region_info, flags));
        let size = words[offset_of!(uapi::vfio_region_info, size) / 8];
        let offset = words[offset_of!(uapi::vfio_region_info, offset) / 8];
        let mut mappable = if flags & uapi::VFIO_REGION_INFO_FLAG_MMAP != 0 {
            size
        } else {
            0
        };
        if mappable > 0 && flags & uapi::VFIO_REGION_INFO_FLAG_CAPS != 0 {
            let first = fields(&words, offset_of!(uapi::vfio_region_info, cap_offset)) as usize;
            if let Some(area) = sparse(&words, first) {
                mappable = area.min(size);
            }
        }
        Ok(Region { size, offset, mappable })
    }

    /// Makes eventfds and has the first interrupts of a kind signal them.
    fn trigger(&self, index: u32, count: usize, tried: &str) -> Result<Vec<OwnedFd>, Error> {
        let make = |_| eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let fds: Vec<OwnedFd> = (0..count)
            .map(make)
            .collect::<Result<_, _>>()
            .map_err(|e| self.failed("make eventfds for", e.into()))?;
        let raw: Vec<i32> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let flags = uapi::VFIO_IRQ_SET_DATA_EVENTFD | uapi::VFIO_IRQ_SET_ACTION_TRIGGER;
        self.set_irqs(index, flags, count as u32, &raw)
            .map_err(|e| self.failed(tried, e))?;
        Ok(fds)
    }

    /// `VFIO_DEVICE_SET_IRQS`: a header of five words, then the descriptors.
    fn set_irqs(&self, index: u32, flags: u32, count: u32, fds: &[i32]) -> io::Result<()> {
        let header = offset_of!(uapi::vfio_irq_set, data);
        let mut words = vec![(header + size_of_val(fds)) as u32, flags, index, 0, count];
        words.extend(fds.iter().map(|fd| *fd as u32));
        // SAFETY: the structure of this request, as long as argsz says, with as many descriptors as count says.
        unsafe { self.call(Request::DEVICE_SET_IRQS, words.as_mut_slice()) }
    }

    /// # Safety
    /// As for [`Host::call`].
    unsafe fn call<T: ?Sized>(&self, request: Request, arg: &mut T) -> io::Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.host.call(self.fd.as_fd(), request, arg) }.map(drop)
    }

    fn failed(&self, tried: &str, source: io::Error) -> Error {
        Error::System {
            tried: format!("{tried} {}", self.name),
            source,
        }
    }
}

/// A region of the device's file.
struct Region {
    size: u64,
    offset: u64,
    /// Bytes from its start that can be mapped.
    mappable: u64,
}

fn pair(low: u32, high: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&low.to_ne_bytes());
    bytes[4..].copy_from_slice(&high.to_ne_bytes());
    bytes
}

/// The bytes from the region's start on that can be mapped, from its capabilities; `None` if they do not say. The chain
/// only leads on, so that it ends.
fn sparse(words: &[u64; 64], first: usize) -> Option<u64> {
    let bytes = |at: usize| words.get(at / 8).map(|w| w.to_ne_bytes());
    let word = |at: usize| {
        let bytes = bytes(at)?;
        let at = at % 8;
        Some(u32::from_ne_bytes([
            bytes[at],
            bytes[at + 1],
            bytes[at + 2],
            bytes[at + 3],
        ]))
    };
    let (mut at, mut before) = (first, 0);
    while at > before && at.is_multiple_of(8) {
        let id = word(at)? & 0xffff;
        if id == uapi::VFIO_REGION_INFO_CAP_SPARSE_MMAP {
            let count = word(at + offset_of!(uapi::vfio_region_info_cap_sparse_mmap, nr_areas))? as usize;
            let areas = at + offset_of!(uapi::vfio_region_info_cap_sparse_mmap, areas);
            let size = size_of::<uapi::vfio_region_sparse_mmap_area>();
            let area = |index: usize| {
                let at = (areas + index * size) / 8;
                Some((*words.get(at)?, *words.get(at + 1)?))
            };
            let from_start = (0..count.min(words.len()))
                .map_while(area)
                .find(|(offset, _)| *offset == 0);
            return Some(from_start.map_or(0, |(_, size)| size));
        }
        before = at;
        at = word(at + offset_of!(uapi::vfio_info_cap_header, next))? as usize;
    }
    None
}

impl Drop for Device {
    fn drop(&mut self) {
        // In this order: no more DMA, no more interrupts, then a device that knows nothing of us. What fails here has
        // failed because the device is gone, or closing it does the same.
        let _ = self.config().set_bus_master(false);
        let _ = self.disable_vectors();
        if self.can_reset() {
            let _ = self.reset();
        }
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device")
            .field("name", &self.name)
            .field("space", &self.space)
            .finish_non_exhaustive()
    }
}
