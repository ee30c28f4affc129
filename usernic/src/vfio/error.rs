//! What can go wrong with a device.

use std::io;

use crate::pci::Address;

/// Why a device could not be opened or used. Each names what was found and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It could not be attached to an address space, or memory not be mapped there.
    #[error(transparent)]
    Attach(#[from] iova::vfio::Error),
    /// It is behind VFIO, but not on PCI.
    #[error("{device} is no PCI device to VFIO (flags {flags:#x})")]
    NotPci {
        /// The device.
        device: String,
        /// Its flags.
        flags: u32,
    },
    /// A region of registers is smaller than the driver needs.
    #[error(
        "BAR{bar} of {device} has {size} bytes, and its driver needs {needed}: is this the device that it is taken for?"
    )]
    BarTooSmall {
        /// The device.
        device: String,
        /// The region.
        bar: u32,
        /// Bytes that it has.
        size: u64,
        /// Bytes that are needed.
        needed: usize,
    },
    /// A region is not, or not far enough, mappable.
    #[error(
        "the kernel lets {mappable} of {size} bytes of BAR{bar} of {device} be mapped, and its driver needs {needed}: a region \
         that shares its page with others cannot be mapped (boot with pci=resource_alignment=)"
    )]
    NotMappable {
        /// The device.
        device: String,
        /// The region.
        bar: u32,
        /// Bytes that it has.
        size: u64,
        /// Bytes from its start that can be mapped.
        mappable: u64,
        /// Bytes that are needed.
        needed: usize,
    },
    /// The device has fewer interrupts than were asked for.
    #[error("{device} has {has} MSI-X vectors, {asked} asked for: use fewer queues with interrupts, or poll")]
    Vectors {
        /// The device.
        device: String,
        /// Vectors that it has.
        has: u32,
        /// Vectors that were asked for.
        asked: usize,
    },
    /// It cannot be reset.
    #[error("{device} has no function-level reset that VFIO could use")]
    NoReset {
        /// The device.
        device: String,
    },
    /// Configuration space does not answer.
    #[error("cannot {verb} configuration space of {device} at {offset:#x}: {source}")]
    Config {
        /// The device.
        device: String,
        /// What was tried.
        verb: &'static str,
        /// Where.
        offset: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// No device was named, and there is none to be found.
    #[error(
        "no device: pass pci=, or give the container one (its PCIDEVICE_... variable, a group in /dev/vfio); {seen}"
    )]
    NoneFound {
        /// What was seen where devices are looked for.
        seen: String,
    },
    /// No device was named, and there are several.
    #[error("several devices ({}): pass one of them as pci=", list(found))]
    SeveralFound {
        /// Them.
        found: Vec<Address>,
    },
    /// A variable that should name devices does not.
    #[error("{variable}={value:?} names no PCI device: {source}")]
    Variable {
        /// Its name.
        variable: String,
        /// What it holds.
        value: String,
        /// Why.
        source: crate::pci::AddressError,
    },
    /// A system call failed.
    #[error("{tried}: {source}")]
    System {
        /// What was tried.
        tried: String,
        /// What the kernel said.
        source: io::Error,
    },
}

fn list(addresses: &[Address]) -> String {
    let names: Vec<_> = addresses.iter().map(Address::to_string).collect();
    names.join(", ")
}
