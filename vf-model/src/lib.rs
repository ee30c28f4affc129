//! The virtual function of an 82599, X540 or X550, its PF's mailbox, and a little switch, in software.
//!
//! For tests: a driver is driven against it in one thread, without hardware, a thousand restarts a second; or through
//! QEMU, where Linux's and DPDK's drivers find a PCI device. It shares nothing with a driver: offsets, bits and messages
//! are written here a second time, so that a wrong constant on either side shows.
//!
//! ```text
//!   driver                      test
//!     | read32, write32           | link, resets, VLANs, frames from and to the wire
//!     v                           v
//!    Vf  registers  <-mailbox->  Pf  answers, permits, refuses
//!     |  rings, offloads          |
//!     +--------- switch ----------+--- wire
//!     |
//!    Windows: what of memory was mapped; all else is refused and counted
//! ```
//!
//! - [`Nic`]: the device. Registers act at once; packets move in [`Nic::step`], so that a test decides when.
//! - [`Shared`], [`VfHandle`]: the same for several holders. A refused access that nobody has taken note of is a panic
//!   when the last of them goes.
//! - [`Complaints`]: what a driver did that hardware may let pass, and the datasheet does not.
//! - [`server`]: the device for QEMU, over vfio-user.
//!
//! ```
//! use vf_model::{Registers, Settings, Shared};
//!
//! let device = Shared::new(Settings::default());
//! let vf = device.vf(0);
//! // VFCTRL.RST, then wait for RSTD in VFMAILBOX.
//! vf.write32(0x0000, 1 << 26);
//! let reads = (1..100).find(|_| vf.read32(0x02fc) & 0x80 != 0);
//! assert_eq!(reads, Some(2));
//! assert_eq!(vf.read32(0x02fc), 0, "RSTD clears when read");
//! ```

pub mod complaint;
mod device;
pub mod dma;
pub mod frame;
pub mod interrupt;
pub mod kind;
pub mod mailbox;
pub mod memory;
pub mod message;
mod nic;
mod offload;
pub mod pf;
pub mod register;
mod ring;
pub mod rss;
mod rx;
pub mod server;

mod shared;
pub mod stats;
mod switch;
mod tx;

pub use complaint::{Complaint, Complaints};
pub use dma::{Access, Fault, MapError, Windows};
pub use kind::Kind;
pub use memory::Memory;
pub use nic::{Nic, Settings};
pub use pf::{Mac, Speed};
pub use ring::Halt;
pub use shared::{Registers, Shared, VfHandle};

/// The README's example is compiled and run as well.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
