//! What can go wrong when a port is opened.

use std::io;
use std::path::PathBuf;

use crate::memory;
use crate::spec::SpecError;
use crate::vhost_user;

/// Why a port could not be opened, or a queue not be taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The text is no port spec.
    #[error("port spec: {0}")]
    Spec(#[from] SpecError),
    /// The port's memory could not be had.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// Part of the memory could not be put to use.
    #[error("packet memory: {0}")]
    Segment(#[from] hugemem::Error),
    /// The memory asked for cannot hold the rings and the fewest buffers.
    #[error("mem={given} is too small: {rings} bytes of rings and {buffers} buffers of {stride} bytes need {needed}")]
    TooSmall {
        /// `mem=` of the spec.
        given: usize,
        /// Bytes of rings.
        rings: usize,
        /// Buffers that the rings need.
        buffers: usize,
        /// Bytes of a buffer.
        stride: usize,
        /// Bytes in all.
        needed: usize,
    },
    /// The vhost-user connection could not be made, or broke.
    #[error(transparent)]
    VhostUser(#[from] vhost_user::Error),
    /// The device could not be opened or used.
    #[error(transparent)]
    Vfio(#[from] crate::vfio::Error),
    /// The virtual function, or its PF, did not do what was asked.
    #[error("{device}: {tried}: {source}{}", advice(source))]
    Vf {
        /// The device.
        device: String,
        /// What was tried.
        tried: &'static str,
        /// Why not.
        source: ixgbevf::Error,
    },
    /// The back-end lacks what the port cannot do without.
    #[error("the back-end at {} offers no {feature} (it offers {offered:#x}): {advice}", path.display())]
    Feature {
        /// The socket.
        path: PathBuf,
        /// The feature's name.
        feature: &'static str,
        /// All features that it offers.
        offered: u64,
        /// What to do.
        advice: &'static str,
    },
    /// The back-end has fewer queue pairs.
    #[error("queues={asked}: the back-end at {} has {most} queue pair(s): pass queues={most} or give it more", path.display())]
    TooManyQueues {
        /// The socket.
        path: PathBuf,
        /// Queue pairs asked for.
        asked: u16,
        /// Queue pairs that it has.
        most: u16,
    },
    /// A ring could not be made.
    #[error("ring {index}: {source}")]
    Ring {
        /// The virtqueue's index.
        index: usize,
        /// Why.
        source: virtio_ring::Error,
    },
    /// The port has no such queue.
    #[error("queue {index}: the port has {count} (0 to {}): pass a larger queues= in the port spec", count - 1)]
    NoSuchQueue {
        /// The queue asked for.
        index: u16,
        /// Queues of the port, at least 1.
        count: u16,
    },
    /// Somebody has the queue.
    #[error("queue {index} is taken already: drop the other handle first")]
    QueueTaken {
        /// The queue.
        index: u16,
    },
    /// A queue's thread is to run where this process may not.
    #[error(
        "cpus=: CPU {cpu} is not among those that this process may use: {allowed}: name some of these, or widen its cpuset"
    )]
    Cpu {
        /// The CPU.
        cpu: u32,
        /// Those that it may use, as the kernel writes lists.
        allowed: String,
    },
    /// What was asked of an open port cannot be done.
    #[error("not done: {why}")]
    NotGranted {
        /// What stands against it.
        why: &'static str,
    },
    /// Memory that was lent to a port cannot be shared.
    #[error("lent region {index}: {why}")]
    Region {
        /// Which of them.
        index: usize,
        /// What is wrong with it.
        why: String,
    },
    /// A system call failed.
    #[error("{tried}: {source}")]
    System {
        /// What was tried.
        tried: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// Names what was tried, for a failed system call.
pub(crate) trait Tried<T> {
    fn tried(self, tried: &'static str) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> Tried<T> for Result<T, E> {
    fn tried(self, tried: &'static str) -> Result<T, Error> {
        self.map_err(|e| Error::System {
            tried,
            source: e.into(),
        })
    }
}

/// What to do about an error of a virtual function, as the end of a sentence.
fn advice(error: &ixgbevf::Error) -> &'static str {
    use ixgbevf::{Error as E, Request as R};
    match error {
        E::Refused(R::SetMac) => {
            ": its address was set by the administrator: leave mac= out, or `ip link set PF vf N trust on`"
        }
        E::Refused(R::SetLpe) => ": the PF's own MTU must be as large: `ip link set PF mtu N`, or pass a smaller mtu=",
        E::Refused(R::SetVlan) => ": the administrator has put it into a VLAN: leave vlan= out",
        E::Refused(R::UpdateXcastMode) => {
            ": the PF must trust it (`ip link set PF vf N trust on`), and for promiscuous mode be promiscuous itself"
        }
        E::ResetTimeout | E::NoAck(_) | E::NoReply(_) | E::PfReset => {
            ": the PF's driver must be loaded and its interface up: `ip link set PF up`"
        }
        E::QueueCount { .. } => ": pass another queues=",
        _ => "",
    }
}
