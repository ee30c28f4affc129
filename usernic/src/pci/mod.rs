//! PCI functions: what there is, who has it, and how it changes hands.
//!
//! An operator makes virtual functions of a port ([`create_vfs`]), gives one to vfio-pci ([`bind`]) and its node in
//! `/dev/vfio` to a container, and takes all back ([`unbind`], [`destroy_vfs`]). Whatever could cut the machine off, or
//! leave something half done, is refused before anything changes, with what to do instead.
//!
//! All functions take a [`Host`](iova::vfio::Host): the machine, or a folder that a test prepared.

mod address;
mod bind;
mod error;
mod function;
mod sriov;
mod usage;

pub use address::{Address, AddressError};
pub use bind::{BindOptions, Bound, bind, unbind};
pub use error::Error;
pub use function::Function;
pub use sriov::{create_vfs, destroy_vfs};
pub use usage::{InterfaceUse, User, interface_use, users};
