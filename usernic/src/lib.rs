//! User-space network ports for containers.
//!
//! A process drives its own port: no kernel in the data path, no capability, no privilege. The other side is a virtual
//! switch in user space (OVS-DPDK, VPP, or the [`switch`] of this crate) that shares virtio rings with us, set up over a
//! vhost-user socket; or a virtual function of a network card ([`vf`]), behind VFIO.
//!
//! # The layers
//!
//! | layer | what it is |
//! |---|---|
//! | [`Port`] | opened from a [`spec`]: connection, memory, link |
//! | [`auto`] | the port that an orchestrator gave the container: `Port::open("auto")` |
//! | [`Queue`] | a queue pair, driven by the one thread that holds it |
//! | [`Packet`], [`Burst`] | frames in the port's memory, moved in bursts |
//! | [`RawQueue`] | the rings under a queue, over buffers of any kind |
//! | [`gate`] | one thread polls a ring, another stops it now and then |
//! | [`LentPort`] | a port over memory of the application |
//! | [`offload`] | checksums, segmentation and hashes in software |
//! | [`filter`] | which frames are for a port |
//! | [`switch`] | a learning bridge, cross-connects and reflectors, made of `vhost` ports |
//! | [`needs`] | what a port needs of its container |
//! | [`notify`] | signalling an eventfd that the other side holds, without sleeping |
//! | [`doctor`] | whether machine or container are fit for a port |
//! | [`cpu`] | CPUs: which may be used, and where they are |
//! | [`resctrl`] | a part of the cache for polling threads alone |
//! | [`vhost_user`] | the sockets under it all |
//! | [`vf`] | what a port needs of a virtual function |
//! | [`vfio`] | PCI devices that this process drives: registers, interrupts, memory |
//! | [`pci`] | what devices there are, and how they change hands |
//!
//! # Example
//!
//! A front-end and a back-end in one process, a frame from one to the other:
//!
//! ```
//! use std::time::Duration;
//! use usernic::{Burst, Port};
//!
//! let dir = tempfile::tempdir()?;
//! let socket = dir.path().join("port.sock");
//! let back = Port::open(&format!("vhost,path={}", socket.display()))?;
//! let front = Port::open(&format!("virtio-user,path={}", socket.display()))?;
//! assert!(back.wait_link(Duration::from_secs(5)));
//!
//! let (mut sender, mut receiver) = (front.queue(0)?, back.queue(0)?);
//! let mut burst = Burst::new(32);
//! sender.alloc(&mut burst, 1);
//! burst[0].copy_from(b"a frame of at least fourteen bytes")?;
//! assert_eq!(sender.tx(&mut burst), 1);
//!
//! let mut received = Burst::new(32);
//! while receiver.rx(&mut received) == 0 {
//!     receiver.wait(Some(Duration::from_secs(5)))?;
//! }
//! assert_eq!(received[0].bytes(), Some(&b"a frame of at least fourteen bytes"[..]));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod auto;
pub mod confine;
mod copy;
pub mod cpu;
pub mod doctor;
mod error;
pub mod filter;
pub mod gate;
pub mod memory;
pub mod needs;
pub mod notify;
pub mod offload;
mod packet;
pub mod pci;
mod pool;
mod port;
mod queue;
mod regions;
pub mod resctrl;
pub mod spec;
mod stats;
pub mod switch;
pub mod vf;
pub mod vfio;
pub mod vhost_user;
mod warnings;

pub use error::Error;
pub use packet::{Burst, Checksum, OffloadError, Packet, PacketError, Place, Segmentation};
pub use port::{LentMemory, LentPair, LentPort, LentRegion, Link, Port};
pub use queue::{Buffer, MAX_SEGMENTS, Queue, RawQueue, RawRing, TooManySegments};
pub use stats::{DeviceStats, Stats};
/// What [`Link::features`] consists of.
pub use virtio_ring::Features;

/// Installs a handler of SIGBUS that keeps the process alive when the other side truncates a file of memory that is
/// mapped here: the lost page becomes zeroes, and the port goes down.
///
/// A program does this once, before it opens ports; a library should leave it to its program. Other causes of SIGBUS
/// go to the handler that was there before.
///
/// # Errors
/// That of sigaction(2).
pub fn install_sigbus_guard() -> Result<(), Error> {
    hugemem::guard::install().map_err(Error::from)
}

/// When `timeout` will be over; for one that no clock can add, later than anybody waits.
pub(crate) fn deadline(timeout: std::time::Duration) -> std::time::Instant {
    let now = std::time::Instant::now();
    let longest = std::time::Duration::from_secs(u32::MAX.into());
    now.checked_add(timeout).unwrap_or(now + longest)
}

/// A random number, for addresses and hash keys.
pub(crate) fn random_u64() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // Keyed from the system's randomness once a process, and different at every call.
    std::hash::RandomState::new().build_hasher().finish()
}
