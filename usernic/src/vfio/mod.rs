//! PCI devices that this process drives itself, through VFIO.
//!
//! | item | what it is |
//! |---|---|
//! | [`find`] | which device, if nobody says so: what a container was given |
//! | [`Device`] | an open device: configuration space, bus mastering, interrupts, reset |
//! | [`Bar`] | its registers, mapped |
//! | [`Device::space`] | where it finds memory: [`iova::vfio::Space`] |
//!
//! A driver knows registers and descriptors and none of this; a port joins the two.
//!
//! ```no_run
//! use usernic::vfio::{Device, Options};
//!
//! let device = Device::open("0000:81:10.0".parse()?, &Options::default())?;
//! let registers = device.bar(0, 0x4000)?;
//! let vectors = device.enable_vectors(2)?;
//! device.config().set_bus_master(true)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod bar;
mod config;
mod device;
mod error;
mod find;

pub use bar::Bar;
pub use config::Config;
pub use device::Device;
pub use error::Error;
pub use find::find;
pub use iova::vfio::{Access, Host, Interface, Kernel, Mapping, NOIOMMU_WARNING, Options, Placement, Space};
