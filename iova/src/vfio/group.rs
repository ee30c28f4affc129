//! IOMMU groups: what can only be given away together. `Documentation/driver-api/vfio.rst`.

use std::ffi::CString;
use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use vfio_bindings::bindings::vfio::{VFIO_GROUP_FLAGS_VIABLE, vfio_group_status};

use super::error::Tried;
use super::{Error, Host, Request};
use crate::Range;

/// A device of an IOMMU group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its name, as `0000:81:10.0`.
    pub device: String,
    /// The driver that has it.
    pub driver: Option<String>,
}

impl Member {
    /// Whether its driver uses it for the kernel, which keeps the group from being given away. Bridges' drivers and
    /// those that hand devices to user space do not.
    pub fn blocks(&self) -> bool {
        self.driver.as_deref().is_some_and(|driver| {
            !driver.starts_with("vfio") && !driver.ends_with("-vfio-pci") && !matches!(driver, "pci-stub" | "pcieport")
        })
    }
}

/// Addresses that the platform keeps, by the kernel's word for them: `msi`, `direct`, `reserved`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reserved {
    /// The addresses.
    pub range: Range,
    /// What for.
    pub kind: String,
}

impl fmt::Display for Reserved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind.as_str() {
            "msi" => write!(f, "the MSI window {:?}", self.range),
            kind => write!(f, "a {kind} range {:?}", self.range),
        }
    }
}

/// What sysfs says of groups.
impl Host {
    /// The IOMMU group of a device, by its folder in sysfs, as `sys/bus/pci/devices/0000:81:10.0`.
    pub fn iommu_group(&self, device: &str) -> Option<u32> {
        self.link(format!("{device}/iommu_group"))?.parse().ok()
    }

    /// Whether the group is one of noiommu mode: a group in name only.
    pub fn is_noiommu(&self, group: u32) -> bool {
        let name = self.read(format!("sys/kernel/iommu_groups/{group}/name"));
        name.is_ok_and(|name| name.trim() == "vfio-noiommu")
    }

    /// The path of a group's node: `/dev/vfio/7`, or `/dev/vfio/noiommu-7` in noiommu mode.
    pub fn group_node(&self, group: u32) -> String {
        let prefix = if self.is_noiommu(group) { "noiommu-" } else { "" };
        format!("/dev/vfio/{prefix}{group}")
    }

    /// The number in the name of a group's node, in either mode.
    pub fn group_of_node(name: &str) -> Option<u32> {
        name.strip_prefix("noiommu-").unwrap_or(name).parse().ok()
    }

    /// The devices of a group.
    pub fn group_members(&self, group: u32) -> Vec<Member> {
        let folder = format!("sys/kernel/iommu_groups/{group}/devices");
        let member = |device: String| Member {
            driver: self.link(format!("{folder}/{device}/driver")),
            device,
        };
        self.names(&folder).into_iter().map(member).collect()
    }

    /// What the platform keeps of a group's addresses: lines of first, last and kind. Lines that are none are left out.
    pub fn reserved_regions(&self, group: u32) -> Vec<Reserved> {
        let text = self.read(format!("sys/kernel/iommu_groups/{group}/reserved_regions"));
        let parse = |line: &str| {
            let mut fields = line.split_whitespace();
            let mut address = || u64::from_str_radix(fields.next()?.strip_prefix("0x")?, 16).ok();
            let (start, last) = (address()?, address()?);
            Some(Reserved {
                range: Range::new(start, last.checked_sub(start)?.saturating_add(1))?,
                kind: fields.next()?.to_owned(),
            })
        };
        text.unwrap_or_default().lines().filter_map(parse).collect()
    }
}

/// An open group. Whoever holds it keeps all others out.
#[derive(Debug)]
pub struct Group {
    host: Host,
    number: u32,
    fd: OwnedFd,
}

const MISSING: &str = "load vfio-pci on the host (modprobe vfio-pci); a container must be given this node and \
                       /dev/vfio/vfio (--device, or the device plugin's allocation)";

impl Group {
    /// Opens a group and looks whether it can be used.
    ///
    /// # Errors
    /// Those of the node, [`Error::NotViable`].
    pub fn open(host: &Host, number: u32) -> Result<Self, Error> {
        let group = Group {
            host: host.clone(),
            number,
            fd: host.open(host.group_node(number), MISSING)?,
        };
        let mut status = vfio_group_status {
            argsz: size_of::<vfio_group_status>() as u32,
            flags: 0,
        };
        // SAFETY: the structure of this request, with its size.
        unsafe { host.call(group.fd.as_fd(), Request::GROUP_GET_STATUS, &mut status) }
            .tried("VFIO_GROUP_GET_STATUS")?;
        if status.flags & VFIO_GROUP_FLAGS_VIABLE == 0 {
            return Err(group.not_viable());
        }
        Ok(group)
    }

    /// Its number.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Opens a device of the group by its name. The group has a container with an IOMMU by then.
    ///
    /// # Errors
    /// [`Error::System`].
    pub fn device(&self, name: &str) -> Result<OwnedFd, Error> {
        let tried = || format!("open {name} of IOMMU group {}", self.number);
        let text = CString::new(name).map_err(|e| Error::System {
            tried: tried(),
            source: e.into(),
        })?;
        let mut text = text.into_bytes_with_nul();
        // SAFETY: the request takes a C string, and the NUL is there.
        let fd = unsafe {
            self.host
                .call(self.fd.as_fd(), Request::GROUP_GET_DEVICE_FD, text.as_mut_slice())
        }
        .map_err(|source| Error::System { tried: tried(), source })?;
        // SAFETY: the call made a descriptor for us.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Puts the group into a container.
    pub(super) fn set_container(&self, container: BorrowedFd<'_>) -> Result<(), Error> {
        let mut fd = container.as_raw_fd();
        // SAFETY: the request takes a pointer to a descriptor.
        match unsafe { self.host.call(self.fd.as_fd(), Request::GROUP_SET_CONTAINER, &mut fd) } {
            Ok(_) => Ok(()),
            // The group was viable a moment ago.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => Err(self.not_viable()),
            Err(error) => Err(error).tried("VFIO_GROUP_SET_CONTAINER"),
        }
    }

    fn not_viable(&self) -> Error {
        let mut blocking = self.host.group_members(self.number);
        blocking.retain(Member::blocks);
        Error::NotViable {
            group: self.number,
            blocking,
        }
    }
}
