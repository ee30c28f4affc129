//! What can be in the way, and what to do about it.

use std::fmt;
use std::io;
use std::path::PathBuf;

use super::{Member, Reserved};
use crate::{AllocatorError, Range};

/// Why a device could not be attached to an address space of ours, or memory not be mapped there.
///
/// Each names what was found and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no such device.
    #[error("there is no device {device}: `usernic devices` lists those that there are")]
    NoDevice {
        /// Its name.
        device: String,
    },
    /// The device is in no IOMMU group, as the kernel has no group at all.
    #[error(
        "{device} is in no IOMMU group, and this kernel has no IOMMU: switch VT-d (AMD-Vi) on in the firmware and boot with \
         intel_iommu=on iommu=pt (AMD: iommu=pt)"
    )]
    NoIommu {
        /// Its name.
        device: String,
    },
    /// Other devices are in IOMMU groups, this one is not.
    #[error("{device} is in no IOMMU group, while others are: it is behind no IOMMU, use another slot or device")]
    NoGroup {
        /// Its name.
        device: String,
    },
    /// The device's driver is not VFIO's.
    #[error(
        "{device} is bound to {}, not to vfio-pci: `usernic bind {device}` gives it to vfio-pci",
        driver.as_deref().unwrap_or("no driver")
    )]
    Driver {
        /// The device.
        device: String,
        /// The driver that has it.
        driver: Option<String>,
    },
    /// A node is not there.
    #[error("there is no {}: {mend}", path.display())]
    NoNode {
        /// Its path.
        path: PathBuf,
        /// What to do.
        mend: &'static str,
    },
    /// A node is there and may not be opened.
    #[error(
        "{} belongs to {uid}:{gid} with mode {mode:04o}, and user {user} may not open it ({source}): chown it to the user, \
         or start the container with this device", path.display()
    )]
    NodeRefused {
        /// Its path.
        path: PathBuf,
        /// Its owner.
        uid: u32,
        /// Its group.
        gid: u32,
        /// Its permissions.
        mode: u32,
        /// Who we are.
        user: u32,
        /// What the kernel said: EPERM comes from the container's device rules, EACCES from the mode.
        source: io::Error,
    },
    /// Somebody has the node open already.
    #[error("{} is in use: another process, or another port of this one, has the group; end it first", path.display())]
    NodeBusy {
        /// Its path.
        path: PathBuf,
    },
    /// Drivers of the kernel have devices of the same group.
    #[error(
        "IOMMU group {group} is not viable: {}; the devices of a group go together",
        Members(blocking)
    )]
    NotViable {
        /// The group.
        group: u32,
        /// The members that are in the way; empty if sysfs shows none.
        blocking: Vec<Member>,
    },
    /// The kernel speaks another VFIO.
    #[error("/dev/vfio/vfio speaks version {found} of the VFIO API, and this crate version 0")]
    ApiVersion {
        /// The version that it speaks.
        found: i32,
    },
    /// VFIO without its IOMMU driver.
    #[error("VFIO has no type1v2 IOMMU here: modprobe vfio_iommu_type1")]
    NoType1,
    /// Interrupts are not isolated.
    #[error(
        "the kernel refuses {device}: its interrupts are not remapped, so that it could raise any. Switch interrupt remapping \
         on (intremap=on; firmware: x2APIC, VT-d), or, trusting the device, allow_unsafe_interrupts=1 for the module \
         {module}"
    )]
    NoInterruptRemapping {
        /// The device.
        device: String,
        /// The module whose parameter it is.
        module: &'static str,
    },
    /// The device has no IOMMU, and nobody asked for that by name.
    #[error(
        "{device} is in noiommu mode, in which it reaches all memory of the machine: refused. Boot with an IOMMU \
         (intel_iommu=on), or ask for it by name with noiommu=1"
    )]
    NoIommuMode {
        /// The device.
        device: String,
    },
    /// Physical addresses are hidden, or the memory is in pieces.
    #[error("noiommu: {problem}")]
    Physical {
        /// What is wrong, and what to do.
        problem: String,
    },
    /// iommufd was asked for, and there is none.
    #[error(
        "this kernel has no iommufd (no {}): load it (modprobe iommufd), or leave the choice open, which takes the container \
         interface", path.display()
    )]
    NoIommufd {
        /// The node that was looked for.
        path: PathBuf,
    },
    /// There is an iommufd, and the device has no node for it.
    #[error(
        "this kernel has iommufd and {device} no character device for it (no {}): it is built without \
         VFIO_DEVICE_CDEV; leave the choice open, which takes the container interface", path.display()
    )]
    NoCdev {
        /// The device.
        device: String,
        /// What was looked for.
        path: PathBuf,
    },
    /// The mapping would lock more memory than this process may.
    #[error(
        "mapping {len} bytes for a device locks them: {locked} are locked already and RLIMIT_MEMLOCK allows {limit}, \
         {} too few: raise it (ulimit -l, LimitMEMLOCK=, --ulimit memlock=) to {} or more",
        missing(*len, *locked, *limit), locked + len
    )]
    Memlock {
        /// Bytes to map.
        len: u64,
        /// Bytes that are locked now.
        locked: u64,
        /// Bytes that may be.
        limit: u64,
    },
    /// The container has no entry left.
    #[error(
        "the VFIO container takes no more mapping ({used} of ours are there): map memory in fewer, larger pieces, or raise \
         dma_entry_limit of the module vfio_iommu_type1"
    )]
    Entries {
        /// Mappings of this process in the container.
        used: usize,
    },
    /// The addresses hit what the platform keeps for itself.
    #[error("{iova:?} overlaps {reserved}, which the device cannot use for memory; usable: {usable:?}")]
    ReservedRegion {
        /// The addresses.
        iova: Range,
        /// What they hit.
        reserved: Reserved,
        /// What may be used.
        usable: Vec<Range>,
    },
    /// The addresses are not those of the IOMMU.
    #[error("{iova:?} is not inside of what the IOMMU reaches; usable: {usable:?}")]
    Unreachable {
        /// The addresses.
        iova: Range,
        /// What may be used.
        usable: Vec<Range>,
    },
    /// The memory is not made of whole pages.
    #[error("{len} bytes at {addr:#x} (IOVA {iova:#x}) are not whole pages of {page} bytes, the smallest of the IOMMU")]
    Unaligned {
        /// Where the memory is.
        addr: u64,
        /// Its bytes.
        len: u64,
        /// The address wanted for it.
        iova: u64,
        /// Bytes of a page.
        page: u64,
    },
    /// The addresses are taken, or there are none left.
    #[error("no I/O address for {len} bytes: {source}")]
    NoAddress {
        /// Bytes to map.
        len: u64,
        /// Why.
        source: AllocatorError,
    },
    /// Less was unmapped than was mapped.
    #[error(
        "the kernel unmapped {unmapped} bytes of {iova:?}: something else of this process changes the same container"
    )]
    PartialUnmap {
        /// What was to be unmapped.
        iova: Range,
        /// Bytes that were.
        unmapped: u64,
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

fn missing(len: u64, locked: u64, limit: u64) -> u64 {
    len.saturating_add(locked).saturating_sub(limit)
}

/// `0000:81:10.1 is bound to ixgbevf, ...`, and what to type.
struct Members<'a>(&'a [Member]);

impl fmt::Display for Members<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("the kernel uses a device of it");
        }
        for (at, member) in self.0.iter().enumerate() {
            let driver = member.driver.as_deref().unwrap_or("no driver");
            write!(
                f,
                "{}{} is bound to {driver}",
                if at > 0 { ", " } else { "" },
                member.device
            )?;
        }
        f.write_str(": `usernic bind")?;
        self.0.iter().try_for_each(|member| write!(f, " {}", member.device))?;
        f.write_str("` too")
    }
}

/// Names what was tried, for a failed system call.
pub(super) trait Tried<T> {
    fn tried(self, tried: &str) -> Result<T, Error>;
}

impl<T> Tried<T> for io::Result<T> {
    fn tried(self, tried: &str) -> Result<T, Error> {
        self.map_err(|source| Error::System {
            tried: tried.to_owned(),
            source,
        })
    }
}
