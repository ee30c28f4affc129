//! From a device in sysfs to an open device in an address space of its own.

use std::os::fd::{AsFd, OwnedFd};

use super::{Error, Group, Host, Iommufd, NoIommu, Space, Type1};

/// Which interface of the kernel to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Interface {
    /// iommufd where the kernel has it for this device, containers if not.
    #[default]
    Auto,
    /// Containers and groups.
    Container,
    /// iommufd and the device's own node.
    Iommufd,
}

/// How to attach a device.
#[derive(Debug, Clone)]
pub struct Options {
    /// The interface.
    pub interface: Interface,
    /// Whether a device without an IOMMU will do: see [`NOIOMMU_WARNING`](super::NOIOMMU_WARNING).
    pub noiommu: bool,
    /// Bits of the addresses that the device can put on the bus; 64 unless it is known to have fewer.
    pub width: u32,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            interface: Interface::Auto,
            noiommu: false,
            width: 64,
        }
    }
}

/// An open device, and the address space that it is in.
#[derive(Debug)]
pub struct Attached {
    /// The device: `VFIO_DEVICE_*` calls.
    pub device: OwnedFd,
    /// Where it finds memory.
    pub space: Space,
    /// Its IOMMU group.
    pub group: Option<u32>,
}

/// Opens a device by its folder in sysfs, as `sys/bus/pci/devices/0000:81:10.0`, and gives it an address space.
///
/// # Errors
/// Whatever is in the way, in this order: no such device, no IOMMU, noiommu mode, another driver, the nodes, the other
/// devices of its group. Nothing is left open.
pub fn attach(host: &Host, device: &str, options: &Options) -> Result<Attached, Error> {
    let name = device.rsplit('/').next().unwrap_or(device);
    let owned = || name.to_owned();
    if !host.exists(device) {
        return Err(Error::NoDevice { device: owned() });
    }
    let Some(group) = host.iommu_group(device) else {
        return Err(if host.names("sys/kernel/iommu_groups").is_empty() {
            Error::NoIommu { device: owned() }
        } else {
            Error::NoGroup { device: owned() }
        });
    };
    let noiommu = host.is_noiommu(group);
    if noiommu && !options.noiommu {
        return Err(Error::NoIommuMode { device: owned() });
    }
    let driver = host.link(format!("{device}/driver"));
    if !driver.as_deref().is_some_and(is_vfio) {
        return Err(Error::Driver {
            device: owned(),
            driver,
        });
    }
    let attached = |device, mapper: Result<Space, Error>| {
        Ok(Attached {
            device,
            space: mapper?,
            group: Some(group),
        })
    };
    if noiommu {
        let mapper = NoIommu::new(host, Group::open(host, group)?)?;
        let device = mapper.group().device(name)?;
        return attached(device, Space::new(host, mapper, options.width));
    }
    let cdev = || by_iommufd(host, device, name, group, options);
    let container = || {
        let mapper = Type1::new(host, Group::open(host, group)?, name)?;
        let device = mapper.group().device(name)?;
        attached(device, Space::new(host, mapper, options.width))
    };
    match options.interface {
        Interface::Iommufd => cdev(),
        Interface::Container => container(),
        Interface::Auto => match node(host, device, name) {
            // A container may have been given one of the two.
            Ok(_) => cdev().or_else(|error| match error {
                Error::NodeRefused { .. } | Error::NoNode { .. } if host.exists(host.group_node(group)) => container(),
                error => Err(error),
            }),
            Err(_) => container(),
        },
    }
}

/// Whether a driver hands devices to user space through VFIO: vfio-pci, and the variants for single devices.
pub(super) fn is_vfio(driver: &str) -> bool {
    driver == "vfio-pci" || driver.ends_with("-vfio-pci") || driver.ends_with("_vfio_pci")
}

/// The device's own node, if the kernel has iommufd and made one.
fn node(host: &Host, device: &str, name: &str) -> Result<String, Error> {
    if !host.exists("dev/iommu") {
        return Err(Error::NoIommufd {
            path: host.path("dev/iommu"),
        });
    }
    let folder = format!("{device}/vfio-dev");
    // The folder is there without nodes, too; the file `dev` in it is the node's number.
    let has_node = |found: &String| host.exists(format!("{folder}/{found}/dev"));
    match host.names(&folder).into_iter().find(has_node) {
        Some(found) => Ok(format!("dev/vfio/devices/{found}")),
        None => Err(Error::NoCdev {
            device: name.to_owned(),
            path: host.path(format!("{folder}/vfio*/dev")),
        }),
    }
}

fn by_iommufd(host: &Host, device: &str, name: &str, group: u32, options: &Options) -> Result<Attached, Error> {
    let node = node(host, device, name)?;
    let cdev = host.open(node, "a container must be given this node and /dev/iommu")?;
    let mapper = Iommufd::new(host, cdev.as_fd(), name, Some(group))?;
    Ok(Attached {
        device: cdev,
        space: Space::new(host, mapper, options.width)?,
        group: Some(group),
    })
}
