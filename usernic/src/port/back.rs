//! Back-end ports: a front-end's rings, over a vhost-user socket.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hugemem::{PageSize, Segment};
use rustix::event::{PollFd, PollFlags, Timespec, epoll};
use virtio_ring::Features;
use virtio_ring::split::{Device, Layout, Memory, Options};

use super::{Inner, Port, watch};
use crate::error::{Error, Tried};
use crate::gate::{self, ControlSide};
use crate::pool::{Cache, Pool};
use crate::queue::{BackPair, BackRing, Parts, Side};
use crate::regions::{Region, RegionError, Regions};
use crate::spec::PortSpec;

/// Buffers of a queue pair, unless the spec says otherwise: what the largest usual rings hold, and bursts in hand.
const BUFFERS: u32 = 1024;

/// How long after a lost connection a `client=1` port looks for the front-end again.
const RETRY: Duration = Duration::from_millis(100);

/// One virtqueue, as the front-end set it up.
#[derive(Default)]
struct Ring {
    setup: Option<Setup>,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    enabled: bool,
    /// A device is on it, in its pair.
    running: bool,
}

#[derive(Clone, Copy)]
struct Setup {
    size: u16,
    base: u16,
    /// User addresses of the front-end.
    desc: u64,
    avail: u64,
    used: u64,
}

struct Pair {
    gate: ControlSide<BackPair>,
    epoll: Arc<OwnedFd>,
}

/// What the control thread knows of the front-end that is connected.
struct Served {
    inner: Arc<Inner>,
    pairs: Vec<Pair>,
    rings: Vec<Ring>,
    memory: Arc<Regions>,
    features: Features,
    ready: bool,
}

impl Served {
    fn pair_of(&mut self, index: usize) -> Option<(&mut Pair, &mut Ring)> {
        Some((self.pairs.get_mut(index / 2)?, self.rings.get_mut(index)?))
    }

    /// A new memory table. Rings that run go on, on the new mappings.
    fn set_memory(&mut self, regions: Vec<Region>) -> Result<(), RingError> {
        let memory = Regions::map(regions)?;
        self.use_memory(memory)
    }

    fn use_memory(&mut self, memory: Regions) -> Result<(), RingError> {
        let old = std::mem::replace(&mut self.memory, Arc::new(memory));
        for index in 0..self.rings.len() {
            if let Some(base) = self.halt(index)
                && let Some(setup) = &mut self.rings[index].setup
            {
                setup.base = base;
                self.run(index)?;
            }
        }
        for pair in &mut self.pairs {
            // Also where no ring runs: the old mappings are to go.
            let was_open = pair.gate.is_open();
            pair.gate.close().memory = Arc::clone(&self.memory);
            if was_open {
                pair.gate.open();
            }
        }
        drop(old);
        Ok(())
    }

    /// Starts the device side of a ring, if all that it needs is there.
    fn run(&mut self, index: usize) -> Result<(), RingError> {
        let (memory, features, ready) = (Arc::clone(&self.memory), self.features, self.ready);
        let Some((pair, ring)) = self.pair_of(index) else { return Ok(()) };
        let (Some(setup), false, true) = (ring.setup, ring.running, ready) else { return Ok(()) };
        let call = ring.call.as_ref().map(OwnedFd::try_clone).transpose().map_err(RingError::Call)?;
        let place = |at: u64, len: usize, what: &'static str| {
            memory.user(at, len).ok_or(RingError::Outside { index, what, at, len })
        };
        let parts = Memory {
            desc: place(setup.desc, Layout::desc_len(setup.size), "descriptor table")?,
            avail: place(setup.avail, Layout::avail_len(setup.size), "available ring")?,
            used: place(setup.used, Layout::used_len(setup.size), "used ring")?,
        };
        let value = pair.gate.close();
        // SAFETY: the parts are inside regions that are mapped, and stay so while the pair holds `memory`; no other
        // device of ours is on the ring: `running` was false.
        let device = unsafe { Device::new(parts, setup.size, Options::from_features(features), setup.base) };
        let device = match device {
            Ok(device) => device,
            Err(source) => {
                pair.gate.open();
                return Err(RingError::Ring { index, source });
            }
        };
        value.memory = memory;
        value.mergeable = features.contains(Features::NET_MRG_RXBUF);
        *value.ring_mut(index % 2 == 0) = Some(BackRing::new(device, call, ring.enabled));
        ring.running = true;
        pair.gate.open();
        Ok(())
    }

    /// Stops the device side of a ring: nothing touches it any more. The available index to go on from.
    fn halt(&mut self, index: usize) -> Option<u16> {
        let inner = Arc::clone(&self.inner);
        let (pair, ring) = self.pair_of(index)?;
        if !ring.running {
            return None;
        }
        ring.running = false;
        let value = pair.gate.close();
        value.publish_counts(&inner.counters[index / 2]);
        let base = value.stop(index % 2 == 0);
        pair.gate.open();
        base
    }

    fn enable(&mut self, index: usize, on: bool) {
        if let Some((pair, ring)) = self.pair_of(index) {
            ring.enabled = on;
            if let Some(running) = pair.gate.close().ring_mut(index % 2 == 0) {
                running.enabled = on;
            }
            pair.gate.open();
        }
    }

    /// A new kick fd: what the queue sleeps on, if it is the front-end's transmit ring.
    fn set_kick(&mut self, index: usize, kick: Option<OwnedFd>) -> Result<(), RingError> {
        let kick = kick.map(event_fd).transpose()?;
        let Some((pair, ring)) = self.pair_of(index) else { return Ok(()) };
        if index % 2 == 1 {
            if let Some(old) = &ring.kick {
                // The front-end holds the same eventfd: closing ours would not take it out.
                let _ = epoll::delete(&*pair.epoll, old);
            }
            if let Some(new) = &kick {
                watch(&pair.epoll, new).map_err(|_| RingError::NotAnEvent)?;
            }
        }
        ring.kick = kick;
        Ok(())
    }

    fn set_call(&mut self, index: usize, call: Option<OwnedFd>) -> Result<(), RingError> {
        let call = call.map(event_fd).transpose()?;
        let copy = call.as_ref().map(OwnedFd::try_clone).transpose().map_err(RingError::Call)?;
        let Some((pair, ring)) = self.pair_of(index) else { return Ok(()) };
        ring.call = call;
        if let Some(running) = pair.gate.close().ring_mut(index % 2 == 0) {
            running.call = copy;
        }
        pair.gate.open();
        Ok(())
    }

    /// Says what the link is now.
    fn update_link(&mut self) {
        let up = self.rings.chunks(2).take_while(|pair| pair.iter().all(|ring| ring.running && ring.enabled)).count();
        let link = self.inner.link();
        let queues = up as u16;
        if (link.queues, link.features) != (queues, self.features.bits()) {
            self.inner.set_link(queues, self.features.bits());
        }
    }

    /// The front-end is gone: nothing of it is kept.
    fn clear(&mut self) {
        for index in 0..self.rings.len() {
            self.halt(index);
            let _ = self.set_kick(index, None);
            self.rings[index] = Ring::default();
        }
        self.memory = Arc::default();
        for pair in &mut self.pairs {
            pair.gate.close().memory = Arc::default();
        }
        self.features = Features::empty();
        self.ready = false;
        self.update_link();
    }
}

/// Why a ring cannot be driven. The connection ends.
#[derive(Debug, thiserror::Error)]
enum RingError {
    #[error(transparent)]
    Region(#[from] RegionError),
    #[error("ring {index}: its {what} ({len} bytes at {at:#x}) is in no region")]
    Outside { index: usize, what: &'static str, at: u64, len: usize },
    #[error("ring {index}: {source}")]
    Ring { index: usize, source: virtio_ring::Error },
    #[error("a kick or call descriptor is not an eventfd: only those are taken")]
    NotAnEvent,
    #[error("duplicating a call descriptor: {0}")]
    Call(std::io::Error),
    #[error("features {0:#x} without VIRTIO_F_VERSION_1: legacy front-ends are not supported")]
    Legacy(u64),
}

/// Takes a descriptor as kick or call only if it is an eventfd, and makes it one that does not block: anything else
/// could hold the thread that writes to it.
fn event_fd(fd: OwnedFd) -> Result<OwnedFd, RingError> {
    use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
    use std::os::fd::AsRawFd;
    let name = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let eventfd = match name {
        Ok(name) => name.as_os_str() == "anon_inode:[eventfd]",
        // Without /proc: an eventfd has no file type, unlike pipes, sockets and files.
        Err(_) => rustix::fs::fstat(&fd).is_ok_and(|stat| stat.st_mode & libc::S_IFMT == 0),
    };
    if !eventfd {
        return Err(RingError::NotAnEvent);
    }
    let flags = fcntl_getfl(&fd).map_err(|_| RingError::NotAnEvent)?;
    fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(|_| RingError::NotAnEvent)?;
    Ok(fd)
}
pub(super) fn open(_: PortSpec) -> Result<Port, Error> { todo!() }
