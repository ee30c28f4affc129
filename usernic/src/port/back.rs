//! Back-end ports: a front-end's rings, over a vhost-user socket.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hugemem::{PageSize, Segment};
use rustix::event::epoll;
use vhost_proto::{Event, MAX_RINGS, Offer, Outcome, ProtocolFeatures};
use virtio_ring::Features;
use virtio_ring::split::{Device, Layout, Memory, Options};

use super::{Inner, Port, watch};
use crate::error::Error;
use crate::gate::{self, ControlSide};
use crate::pool::{Cache, Pool};
use crate::queue::{BackPair, BackRing, Parts, Side};
use crate::regions::{MAX_REGIONS, Region, RegionError, Regions};
use crate::spec::PortSpec;
use crate::vhost_user::{BackendSession, Handler, Listener};

/// Buffers of a queue pair, unless the spec says otherwise: what the largest usual rings hold, and bursts in hand.
const BUFFERS: u32 = 1024;

/// How long after a lost connection a `client=1` port looks for the front-end again.
const RETRY: Duration = Duration::from_millis(100);

/// How often the memory is looked at: whether the front-end truncated it.
const LOOK: Duration = Duration::from_secs(1);

/// Protocol features that are offered.
const PROTOCOL: ProtocolFeatures = ProtocolFeatures::MQ
    .union(ProtocolFeatures::REPLY_ACK)
    .union(ProtocolFeatures::RARP)
    .union(ProtocolFeatures::MTU)
    .union(ProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(ProtocolFeatures::RESET_DEVICE)
    .union(ProtocolFeatures::STATUS);

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
}

pub(super) fn open(spec: PortSpec) -> Result<Port, Error> {
    let listener = if spec.reversed {
        None
    } else {
        Some(Listener::bind(&spec.path)?)
    };
    let queues = spec.queues;
    // Frames are copied into memory of our own, which nobody else can reach.
    let count = spec.buffers.unwrap_or(u32::from(queues) * BUFFERS);
    let len = Pool::stride(spec.buffer_size) * count as usize;
    let segment = Arc::new(Segment::anonymous(len, PageSize::BASE, spec.numa)?);
    let pool = Pool::new(segment, 0, count, spec.buffer_size, 0, true)?;
    let inner = Arc::new(Inner::new(spec, queues)?);

    let mut served = Served {
        inner: Arc::clone(&inner),
        pairs: Vec::new(),
        rings: Vec::new(),
        memory: Arc::default(),
        features: Features::empty(),
    };
    for index in 0..usize::from(queues) {
        let (data, mut gate) = gate::pair(BackPair::new());
        gate.open();
        let epoll = Arc::new(inner.epoll_of(index)?);
        served.pairs.push(Pair {
            gate,
            epoll: Arc::clone(&epoll),
        });
        served.rings.extend([Ring::default(), Ring::default()]);
        inner.put_on_shelf(Parts {
            index: index as u16,
            side: Side::Back(data),
            cache: Cache::new(Arc::clone(&pool)),
            counters: Arc::clone(&inner.counters[index]),
            epoll,
        });
    }
    let control = Control {
        served,
        listener,
        session: None,
    };
    let control = super::spawn(move || control.run())?;
    Ok(Port {
        inner,
        control: Some(control),
        memory: "private memory of this process".into(),
        memory_bytes: len,
    })
}

/// What the control thread owns.
struct Control {
    served: Served,
    listener: Option<Listener>,
    session: Option<BackendSession>,
}

impl Control {
    fn offer(&self) -> Offer {
        let spec = &self.served.inner.spec;
        let mut features = Features::VERSION_1 | Features::NET_MRG_RXBUF;
        features.set(Features::NET_MQ, spec.queues > 1);
        features.set(Features::IN_ORDER, spec.in_order);
        features.set(Features::RING_EVENT_IDX, spec.event_idx);
        features.set(Features::RING_INDIRECT_DESC, spec.indirect);
        Offer {
            features: features.bits(),
            protocol: PROTOCOL,
            rings: (2 * spec.queues).min(MAX_RINGS as u16),
            queue_num: spec.queues,
            mem_slots: MAX_REGIONS as u16,
        }
    }

    fn run(mut self) {
        let inner = Arc::clone(&self.served.inner);
        let path = inner.spec.path.clone();
        let mut next_try = Instant::now();
        while !inner.stopped() {
            if let Some(session) = &mut self.session {
                // The SIGBUS guard tells nobody: look at it now and then.
                inner.sleep(Some(session.as_fd()), Some(Instant::now() + LOOK));
                if inner.stopped() {
                    break;
                }
                let mut result = session.service(&mut self.served);
                if result.is_ok() && self.served.memory.is_dead() {
                    let what = "the front-end truncated a file of its memory".into();
                    result = Err(crate::vhost_user::Error::Setup {
                        path: path.clone(),
                        what,
                    });
                }
                self.served.update_link();
                if let Err(error) = result {
                    tracing::info!(path = %path.display(), "front-end gone: {error}");
                    self.session = None;
                    self.served.clear();
                    next_try = Instant::now() + RETRY;
                }
                continue;
            }
            let listener = self.listener.as_ref().map(AsFd::as_fd);
            let deadline = if listener.is_some() { None } else { Some(next_try) };
            inner.sleep(listener, deadline);
            if inner.stopped() {
                break;
            }
            let timeout = Duration::from_millis(inner.spec.timeout_ms.into());
            let found = match &self.listener {
                Some(listener) => listener
                    .accept()
                    .map(|stream| stream.map(|stream| BackendSession::new(stream, &path, self.offer(), timeout))),
                None => BackendSession::connect(&path, self.offer(), timeout).map(Some),
            };
            next_try = Instant::now() + RETRY;
            match found {
                Ok(session) => self.session = session,
                Err(error) => tracing::debug!(path = %path.display(), "no front-end yet: {error}"),
            }
        }
        self.session = None;
        self.served.clear();
    }
}

impl Handler for Served {
    fn handle(&mut self, event: Event<OwnedFd>) -> Result<Outcome<'static>, String> {
        let done = |result: Result<(), RingError>| result.map(|()| Outcome::Done).map_err(|e| e.to_string());
        match event {
            Event::Features(bits) => {
                let features = Features::from_bits_retain(bits);
                if !features.contains(Features::VERSION_1) {
                    return Err(RingError::Legacy(bits).to_string());
                }
                self.features = features;
                Ok(Outcome::Done)
            }
            Event::Memory(table) => {
                let regions = table
                    .into_iter()
                    .flatten()
                    .map(|(region, fd)| own(region, fd))
                    .collect();
                done(self.set_memory(regions))
            }
            Event::AddRegion(region, fd) => done(self.add_region(own(region, fd))),
            Event::RemoveRegion(region) => done(self.remove_region(region)),
            Event::RingStart {
                index,
                setup,
                kick,
                enabled,
            } => {
                let index = usize::from(index);
                // A second kick for a ring that runs replaces the first.
                done(self.set_kick(index, kick))?;
                let Some(ring) = self.rings.get_mut(index).filter(|ring| !ring.running) else {
                    return Ok(Outcome::Done);
                };
                let size = u16::try_from(setup.num).map_err(|_| format!("ring {index}: {} descriptors", setup.num))?;
                let vhost_proto::RingAddr { desc, avail, used } = setup.addr;
                ring.setup = Some(Setup {
                    size,
                    base: setup.base as u16,
                    desc,
                    avail,
                    used,
                });
                ring.enabled = enabled;
                done(self.run(index))
            }
            Event::RingStop(index) => {
                let index = usize::from(index);
                let base = self.halt(index);
                done(self.set_kick(index, None))?;
                let ring = &mut self.rings[index];
                ring.call = None;
                let base = base.or(ring.setup.map(|setup| setup.base)).unwrap_or(0);
                ring.setup = None;
                Ok(Outcome::Base(base.into()))
            }
            Event::RingCall(index, call) => done(self.set_call(index.into(), call)),
            Event::RingEnable(index, on) => {
                self.enable(index.into(), on);
                Ok(Outcome::Done)
            }
            Event::Status(status) => {
                if status == 0 {
                    // A reset: rings stop, and are set up anew.
                    for index in 0..self.rings.len() {
                        self.halt(index);
                        self.rings[index].setup = None;
                    }
                }
                Ok(Outcome::Done)
            }
            Event::Mtu(mtu) => {
                self.inner.set_mtu(mtu);
                Ok(Outcome::Done)
            }
            Event::Reset => {
                for index in 0..self.rings.len() {
                    self.halt(index);
                    self.rings[index].setup = None;
                    self.rings[index].enabled = false;
                }
                Ok(Outcome::Done)
            }
            // Nobody asks to be told of a broken ring, or of an address that moved: this port learns from frames.
            Event::RingErr(..) | Event::Rarp(_) => Ok(Outcome::Done),
            other => Err(format!("{other:?} was not offered")),
        }
    }
}

fn own(region: vhost_proto::Region, fd: OwnedFd) -> Region {
    let vhost_proto::Region {
        guest_addr,
        size,
        user_addr,
        offset,
    } = region;
    Region {
        guest: guest_addr,
        user: user_addr,
        size,
        offset,
        fd,
    }
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

    fn add_region(&mut self, region: Region) -> Result<(), RingError> {
        // The rings that run have an Arc of the regions as they are: the new ones are a table of their own.
        let mut memory = self.memory.share();
        memory.add(region)?;
        self.use_memory(memory)
    }

    fn remove_region(&mut self, region: vhost_proto::Region) -> Result<(), RingError> {
        let mut memory = self.memory.share();
        let vhost_proto::Region {
            guest_addr,
            size,
            user_addr,
            ..
        } = region;
        memory
            .remove(guest_addr, user_addr, size)
            .ok_or(RingError::NoRegion(guest_addr))?;
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
        let (memory, features) = (Arc::clone(&self.memory), self.features);
        let Some((pair, ring)) = self.pair_of(index) else {
            return Ok(());
        };
        let (Some(setup), false) = (ring.setup, ring.running) else {
            return Ok(());
        };
        let call = ring
            .call
            .as_ref()
            .map(OwnedFd::try_clone)
            .transpose()
            .map_err(RingError::Call)?;
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
        *value.ring_mut(is_receive(index)) = Some(BackRing::new(device, call, ring.enabled));
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
        let base = value.stop(is_receive(index));
        pair.gate.open();
        base
    }

    fn enable(&mut self, index: usize, on: bool) {
        if let Some((pair, ring)) = self.pair_of(index) {
            ring.enabled = on;
            if let Some(running) = pair.gate.close().ring_mut(is_receive(index)) {
                running.enabled = on;
            }
            pair.gate.open();
        }
    }

    /// A new kick fd: what the queue sleeps on, if it is the front-end's transmit ring.
    fn set_kick(&mut self, index: usize, kick: Option<OwnedFd>) -> Result<(), RingError> {
        let kick = kick.map(event_fd).transpose()?;
        let Some((pair, ring)) = self.pair_of(index) else {
            return Ok(());
        };
        if !is_receive(index) {
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
        let copy = call
            .as_ref()
            .map(OwnedFd::try_clone)
            .transpose()
            .map_err(RingError::Call)?;
        let Some((pair, ring)) = self.pair_of(index) else {
            return Ok(());
        };
        ring.call = call;
        if let Some(running) = pair.gate.close().ring_mut(is_receive(index)) {
            running.call = copy;
        }
        pair.gate.open();
        Ok(())
    }

    /// Says what the link is now.
    fn update_link(&mut self) {
        let up = self
            .rings
            .chunks(2)
            .take_while(|pair| pair.iter().all(|ring| ring.running && ring.enabled))
            .count();
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
        self.update_link();
    }
}

/// Why a ring cannot be driven. The connection ends.
#[derive(Debug, thiserror::Error)]
enum RingError {
    #[error(transparent)]
    Region(#[from] RegionError),
    #[error("ring {index}: its {what} ({len} bytes at {at:#x}) is in no region")]
    Outside {
        index: usize,
        what: &'static str,
        at: u64,
        len: usize,
    },
    #[error("ring {index}: {source}")]
    Ring { index: usize, source: virtio_ring::Error },
    #[error("a kick or call descriptor is not an eventfd: only those are taken")]
    NotAnEvent,
    #[error("there is no region at {0:#x} to remove")]
    NoRegion(u64),
    #[error("duplicating a call descriptor: {0}")]
    Call(std::io::Error),
    #[error("features {0:#x} without VIRTIO_F_VERSION_1: legacy front-ends are not supported")]
    Legacy(u64),
}

/// Of a pair the even virtqueue is the front-end's receive ring, the odd one its transmit ring (virtio 1.3, 5.1.2).
fn is_receive(index: usize) -> bool {
    index.is_multiple_of(2)
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
