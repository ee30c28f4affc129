//! Cases that run on a virtual function: in a guest, on the model of the hardware, or on silicon. `cargo xtask hwtest`
//! runs them.
//!
//! A case has a function, bound to vfio-pci, and most have a peer: an interface of the kernel's on the other side, which
//! a packet socket opens. Some ask for something that only a model or an administrator does (a link that goes down, a
//! reset of the PF): a line `@what` of standard output asks whoever runs the case.

mod cases;
pub mod frames;
mod peer;
mod world;

use std::time::Duration;

pub use peer::Peer;
pub use world::World;

/// Longer than anything here takes, in emulation.
pub const LIMIT: Duration = Duration::from_secs(30);

/// A case.
pub struct Case {
    /// Its name.
    pub name: &'static str,
    /// What it shows, for people.
    pub shows: &'static str,
    /// It has a peer.
    pub peer: bool,
    /// It asks for what only a model does.
    pub model: bool,
    /// The case: what it has to say, or why it failed.
    pub run: fn(&World) -> anyhow::Result<String>,
}

/// All of them.
pub const CASES: &[Case] = cases::CASES;
