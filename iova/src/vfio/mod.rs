//! Memory for devices, through VFIO (feature `vfio`, which implies `std`).
//!
//! A device that a process drives itself reaches memory through an IOMMU, at addresses that the process chooses: its own,
//! where the IOMMU reaches as far. So nobody needs physical addresses, nor a capability. The kernel has two interfaces for
//! that, and [`attach`] takes the one that is there:
//!
//! | interface | nodes | mapper |
//! |---|---|---|
//! | containers and groups | `/dev/vfio/vfio`, `/dev/vfio/GROUP` | [`Type1`] |
//! | iommufd and a character device for each device | `/dev/iommu`, `/dev/vfio/devices/vfioN` | [`Iommufd`] |
//! | no IOMMU at all, only when it is asked for by name | `/dev/vfio/noiommu-GROUP` | [`NoIommu`] |
//!
//! A [`Space`] maps memory through any of them and gives a [`Mapping`] for it, which unmaps when it is dropped. What would
//! be refused late or silently is looked at first: addresses that are reserved or out of reach, the limit of locked
//! memory, the number of mappings. All errors say what was found and what to do.
//!
//! ```no_run
//! use iova::vfio::{Access, Host, Options, Placement, attach};
//!
//! # fn memory() -> (std::ptr::NonNull<u8>, usize) { unimplemented!() }
//! let attached = attach(&Host::default(), "sys/bus/pci/devices/0000:81:10.0", &Options::default())?;
//! let (addr, len) = memory();
//! // SAFETY: `memory` gives bytes that nothing else uses, and they outlive the mapping.
//! let mapping = unsafe { attached.space.map(addr, len, Placement::Auto, Access::ReadWrite)? };
//! println!("the device finds them at {:?}", mapping.iova());
//! # Ok::<(), iova::vfio::Error>(())
//! ```

mod attach;
mod error;
mod group;
mod host;
mod iommufd;
mod limits;
mod noiommu;
mod space;
mod sys;
mod type1;

pub use attach::{Attached, Interface, Options, attach};
pub use error::Error;
pub use group::{Group, Member, Reserved};
pub use host::Host;
pub use iommufd::Iommufd;
pub use limits::{Charge, Limits, Memlock};
pub use noiommu::{NOIOMMU_WARNING, NoIommu};
pub use space::{Access, Mapper, Mapping, Placement, Space};
pub use sys::{Ioctl, Kernel, Request};
pub use type1::Type1;
