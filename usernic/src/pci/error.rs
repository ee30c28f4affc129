//! Why a function does not change hands.

use std::io;
use std::path::PathBuf;

use super::{Address, InterfaceUse, User};

/// Why nothing was changed, or not all: what was found, and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no such function.
    #[error("there is no PCI device {address}: `usernic devices --all` lists those that there are")]
    NoDevice {
        /// Its address.
        address: Address,
    },
    /// A name that is neither an address nor an interface of a PCI device.
    #[error(
        "{name:?} is neither a PCI address (0000:81:10.0) nor a network interface of a PCI device in this namespace"
    )]
    NoInterface {
        /// The name.
        name: String,
    },
    /// The machine needs it.
    #[error("{address} is in use: {by}. Move that elsewhere first, or insist with --force")]
    InUse {
        /// The function.
        address: Address,
        /// Why it is needed.
        by: InterfaceUse,
    },
    /// A process has it open: the kernel would wait for it, for ever if need be.
    #[error("{address} is open in {}: end that first", list(by))]
    Open {
        /// The function.
        address: Address,
        /// The processes.
        by: Vec<User>,
    },
    /// There is no IOMMU that would keep it to its memory.
    #[error(
        "{address} is in no IOMMU group{}: vfio-pci would refuse it. Switch VT-d (AMD-Vi) on in the firmware and boot with \
         intel_iommu=on iommu=pt (AMD: iommu=pt); or, trusting whoever gets it with all memory of this machine, pass \
         --noiommu",
        if *none { ", and this kernel has no IOMMU" } else { "" }
    )]
    NoIommu {
        /// The function.
        address: Address,
        /// Whether there is no group at all.
        none: bool,
    },
    /// noiommu mode was asked for, and the kernel does not have it on.
    #[error("{} is not on: modprobe vfio enable_unsafe_noiommu_mode=1, or write Y there", path.display())]
    NoIommuOff {
        /// The parameter.
        path: PathBuf,
    },
    /// Others of its group stay with drivers of the kernel.
    #[error(
        "IOMMU group {group} would not be viable: {}, and the devices of a group go together. Name them too, or pass --group",
        members(others)
    )]
    NotViable {
        /// The group.
        group: u32,
        /// The others, and their drivers.
        others: Vec<(String, String)>,
    },
    /// The driver is not loaded.
    #[error("the driver {driver} is not there: modprobe {driver}")]
    NoDriver {
        /// Its name.
        driver: String,
    },
    /// Asked for, and the driver did not take it.
    #[error("{driver} did not take {address}: it has {}. dmesg may say why", found.as_deref().unwrap_or("no driver"))]
    NotBound {
        /// The function.
        address: Address,
        /// The driver that should have taken it.
        driver: String,
        /// The one that has it.
        found: Option<String>,
    },
    /// It is not bound to a driver that hands it to user space.
    #[error("{address} is with {}, not with vfio-pci: there is nothing to unbind", driver.as_deref().unwrap_or("no driver"))]
    NotGivenAway {
        /// The function.
        address: Address,
        /// The driver that has it.
        driver: Option<String>,
    },
    /// It cannot have virtual functions.
    #[error("{address} has no SR-IOV{}", match physical {
        Some(pf) => format!(": it is a virtual function itself, of {pf}"),
        None => String::new(),
    })]
    NoSriov {
        /// The function.
        address: Address,
        /// Its physical function, if it is a virtual one.
        physical: Option<Address>,
    },
    /// It has no driver that would manage virtual functions.
    #[error("{address} is with {}: virtual functions need the port's own driver (ixgbe for an 82599, X540 or X550)",
        driver.as_deref().unwrap_or("no driver"))]
    NoPortDriver {
        /// The function.
        address: Address,
        /// The driver that has it.
        driver: Option<String>,
    },
    /// More than it can have, or none.
    #[error("{address} can have 1 to {total} virtual functions, {asked} asked for")]
    HowMany {
        /// The function.
        address: Address,
        /// As many as it can have.
        total: u16,
        /// Asked for.
        asked: u16,
    },
    /// It has virtual functions already: their number changes only by way of none.
    #[error("{address} has {count} virtual functions already: `usernic vf destroy {address}` first")]
    HasVfs {
        /// The function.
        address: Address,
        /// As many as it has.
        count: usize,
    },
    /// It has none.
    #[error("{address} has no virtual functions")]
    NoVfs {
        /// The function.
        address: Address,
    },
    /// Not as many came as were asked for.
    #[error("{address} has {found} virtual functions after {asked} were asked for. dmesg may say why")]
    TooFew {
        /// The function.
        address: Address,
        /// As many as it has.
        found: usize,
        /// Asked for.
        asked: u16,
    },
    /// A file of sysfs does not take what is written to it.
    #[error("cannot write {text:?} to {}: {source}{}", path.display(), advice(source))]
    Write {
        /// The file.
        path: PathBuf,
        /// The text.
        text: String,
        /// What the kernel said.
        source: io::Error,
    },
}

fn list<T: ToString>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
}

fn members(others: &[(String, String)]) -> String {
    let all: Vec<_> = others
        .iter()
        .map(|(device, driver)| format!("{device} is with {driver}"))
        .collect();
    all.join(", ")
}

fn advice(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => {
            " (this needs root on the host; in a container sysfs is not to be written)"
        }
        Some(libc::EINVAL) => " (vfio-pci says this of a device without an IOMMU)",
        Some(libc::ENOSPC | libc::ENOMEM) => " (the firmware has left no room for the registers or buses: pci=realloc)",
        _ => "",
    }
}
