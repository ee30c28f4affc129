//! Back-end ports: a front-end's rings, over a vhost-user socket.

mod control;
mod net;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hugemem::{PageSize, Segment};
use rustix::event::epoll;
use vhost_proto::{Event, MAX_RINGS, Offer, Outcome, ProtocolFeatures};
use virtio_ring::any::{Device, Format, Layout, Memory};
use virtio_ring::{Features, Options, Vectors, packed};

use self::control::ControlRing;
use self::net::Net;
use super::wish::{NO_DEVICE, Wish};
use super::{Inner, Port, watch};
use crate::error::Error;
use crate::gate::{self, ControlSide};
use crate::packet::Marks;
use crate::pool::{Cache, Pool};
use crate::queue::{BackPair, BackRing, Offloads, Parts, Side};
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
    .union(ProtocolFeatures::CONFIG)
    .union(ProtocolFeatures::BACKEND_REQ)
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
    base: u32,
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
    net: Net,
    control: Option<ControlRing>,
    /// The socket for our own requests.
    channel: Option<OwnedFd>,
    /// The application wants the link up.
    wanted_up: bool,
}

fn buffers(spec: &PortSpec) -> u32 {
    spec.buffers.unwrap_or(u32::from(spec.queues) * BUFFERS)
}

/// Bytes of the port's private memory.
pub(super) fn segment_len(spec: &PortSpec) -> usize {
    Pool::stride(spec.buffer_size) * buffers(spec) as usize
}

pub(super) fn open(spec: PortSpec) -> Result<Port, Error> {
    let listener = if spec.reversed {
        None
    } else {
        Some(Listener::bind_for(&spec.path, spec.access)?)
    };
    let queues = spec.queues;
    // Frames are copied into memory of our own, which nobody else can reach.
    let count = buffers(&spec);
    let memory_bytes = segment_len(&spec);
    let segment = Arc::new(Segment::anonymous(memory_bytes, PageSize::BASE, spec.numa)?);
    let pool = Pool::new(segment, 0, count, spec.buffer_size, 0, true)?;
    let inner = Arc::new(Inner::new(spec, queues)?);

    let mut served = Served {
        inner: Arc::clone(&inner),
        pairs: Vec::new(),
        rings: Vec::new(),
        memory: Arc::default(),
        features: Features::empty(),
        net: Net::new(&inner.spec, inner.mac()),
        control: None,
        channel: None,
        wanted_up: true,
    };
    let control_ring = usize::from(has_control(&inner.spec));
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
    served
        .rings
        .resize_with(served.rings.len() + control_ring, Ring::default);
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
        memory_bytes,
    })
}

/// Whether there is a number left for a control queue.
fn has_control(spec: &PortSpec) -> bool {
    2 * usize::from(spec.queues) < MAX_RINGS
}

/// The best vector instructions that the processor has.
pub(crate) fn vectors() -> Vectors {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: just detected.
            return unsafe { Vectors::avx512() };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: just detected.
            return unsafe { Vectors::avx2() };
        }
    }
    Vectors::NONE
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
        let mut features = Features::VERSION_1 | Features::NET_MRG_RXBUF | Features::NET_MTU;
        features |= spec.offloads();
        let control = has_control(spec);
        if control {
            features |= Net::offer(spec);
        }
        features.set(Features::NET_MQ, spec.queues > 1);
        features.set(Features::RING_PACKED, spec.packed);
        features.set(Features::IN_ORDER, spec.in_order);
        features.set(Features::RING_EVENT_IDX, spec.event_idx);
        features.set(Features::RING_INDIRECT_DESC, spec.indirect);
        Offer {
            features: features.bits(),
            protocol: PROTOCOL,
            rings: 2 * spec.queues + u16::from(control),
            queue_num: spec.queues,
            mem_slots: MAX_REGIONS as u16,
        }
    }

    fn run(mut self) {
        let inner = Arc::clone(&self.served.inner);
        let path = inner.spec.path.clone();
        let mut next_try = Instant::now();
        while !inner.stopped() {
            while let Some((wish, answer)) = inner.wishes.next() {
                // Who does not wait any more has his wish all the same.
                let _ = answer.send(self.served.grant(wish));
            }
            if let Some(session) = &mut self.session {
                // The SIGBUS guard tells nobody: look at it now and then.
                let (kick, pause) = self.served.control_kick();
                inner.sleep_on([Some(session.as_fd()), kick], Some(Instant::now() + pause));
                if inner.stopped() {
                    break;
                }
                let mut result = session.service(&mut self.served);
                self.served.serve_control();
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
        inner.wishes.close();
        self.session = None;
        self.served.clear();
    }
}

impl Handler for Served {
    fn handle(&mut self, event: Event<OwnedFd>) -> Result<Outcome<'_>, String> {
        let done = |result: Result<(), RingError>| result.map(|()| Outcome::Done).map_err(|e| e.to_string());
        match event {
            Event::Features(bits) => {
                let features = Features::from_bits_retain(bits);
                if !features.contains(Features::VERSION_1) {
                    return Err(RingError::Legacy(bits).to_string());
                }
                if features != self.features {
                    self.features = features;
                    self.reset_net();
                }
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
                    base: setup.base,
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
                Ok(Outcome::Base(base))
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
                    self.reset_net();
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
                self.reset_net();
                Ok(Outcome::Done)
            }
            Event::Rarp(address) => {
                self.inner.announced(address);
                Ok(Outcome::Done)
            }
            // A piece that is not there is told by an empty answer. Nothing in the space is for a driver to write, but for
            // legacy ones (virtio 1.3, 5.1.4).
            Event::GetConfig { offset, size } => Ok(Outcome::Config(self.net.piece(offset, size).unwrap_or_default())),
            Event::SetConfig(..) => Ok(Outcome::Failed),
            Event::BackendChannel(socket) => {
                self.channel = Some(socket);
                Ok(Outcome::Done)
            }
            // Nobody asks to be told of a broken ring.
            Event::RingErr(..) => Ok(Outcome::Done),
            other => Err(format!("{other:?} was not offered")),
        }
    }
}

/// The base of a ring that nobody was on.
fn new_base(format: Format) -> u32 {
    match format {
        Format::Split => 0,
        Format::Packed => packed::Base::START.encode(),
    }
}

/// Where to begin. A front-end whose back-end was lost knows it of a split ring, from the used index in memory; DPDK's
/// virtio_user says 0 all the same, and a new ring has 0 there. Of a packed ring a front-end can only say what it said
/// first (QEMU: that the ring is new): there the ring itself is asked.
///
/// # Safety
/// As for [`Device::new`].
unsafe fn found_base(parts: Memory, size: u16, options: Options, base: u32) -> Result<u32, virtio_ring::Error> {
    let ring = match parts {
        Memory::Packed(ring) => ring,
        Memory::Split(ring) if base == 0 && ring.used.cast::<u32>().is_aligned() => {
            // SAFETY: passed on; aligned.
            return Ok(unsafe { ring.used_index() }.into());
        }
        Memory::Split(_) => return Ok(base),
    };
    if options.in_order || packed::Base::decode(base) != packed::Base::START {
        return Ok(base);
    }
    // SAFETY: passed on.
    let found = unsafe { packed::recover(ring, size)? };
    if found.is_none() {
        tracing::warn!("a packed ring does not tell where the back-end before this one left it");
    }
    Ok(found.map_or(base, packed::Base::encode))
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
    fn grant(&mut self, wish: Wish) -> Result<(), Error> {
        match wish {
            Wish::Filter(filter) => {
                for pair in &mut self.pairs {
                    let was_open = pair.gate.is_open();
                    pair.gate.close().set_filter(filter.clone());
                    if was_open {
                        pair.gate.open();
                    }
                }
                Ok(())
            }
            Wish::Link(up) => {
                self.wanted_up = up;
                self.enable_all();
                if self.net.set_link(up) {
                    self.config_changed();
                }
                self.update_link();
                Ok(())
            }
            Wish::Announce if self.channel.is_some() && self.net.ask_announce() => {
                self.config_changed();
                Ok(())
            }
            Wish::Announce => Err(Error::NotGranted {
                why: "no front-end is there that takes VIRTIO_NET_F_GUEST_ANNOUNCE and the control queue from its back-end",
            }),
            Wish::Vf(_) => Err(NO_DEVICE),
            Wish::Queues(_) => Err(Error::NotGranted {
                why: "the port is a back-end",
            }),
        }
    }

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
        let vectors = self.inner.spec.vectorized.then(vectors).unwrap_or_default();
        let (is_control, wanted_up) = (self.is_control(index), self.wanted_up);
        let (takes, admits, hasher) = (self.net.offloads(), self.net.admits(), self.net.hasher());
        let Some(ring) = self.rings.get_mut(index) else {
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
        let format = Format::from_features(features);
        let lens = Layout::area_lens(format, setup.size);
        let areas = [
            place(setup.desc, lens[0], "descriptor area")?,
            place(setup.avail, lens[1], "driver area")?,
            place(setup.used, lens[2], "device area")?,
        ];
        let parts = Memory::from_areas(format, areas);
        let options = Options::from_features(features);
        // SAFETY: the parts are inside regions that are mapped; no device of ours is on the ring: `running` was false.
        let base = unsafe { found_base(parts, setup.size, options, setup.base) };
        let base = base.map_err(|source| RingError::Ring { index, source })?;
        // SAFETY: the parts are inside regions that are mapped, and stay so while whoever has the device holds `memory`; no
        // other device of ours is on the ring: `running` was false.
        let device = unsafe { Device::new(parts, setup.size, options, base) };
        let device = device.map_err(|source| RingError::Ring { index, source })?;
        if is_control {
            ring.running = true;
            self.control = Some(ControlRing::new(index, device, memory, call));
            return Ok(());
        }
        let Some((pair, ring)) = self.pair_of(index) else {
            return Ok(());
        };
        let value = pair.gate.close();
        value.memory = memory;
        value.mergeable = features.contains(Features::NET_MRG_RXBUF);
        let mut device = device;
        device.set_vectors(vectors);
        value.long = features.contains(Features::NET_HASH_REPORT);
        value.offloads = Offloads {
            takes: Marks::guest(takes),
            asks: Marks::host(features),
        };
        (value.admits, value.hasher) = (admits, hasher);
        let mut started = BackRing::new(device, call, ring.enabled && wanted_up);
        if base != new_base(format) {
            // Who was on the ring before may have ended between using buffers and saying so.
            started.notify();
        }
        *value.ring_mut(is_receive(index)) = Some(started);
        ring.running = true;
        pair.gate.open();
        Ok(())
    }

    /// Stops the device side of a ring: nothing touches it any more. The base to go on from.
    fn halt(&mut self, index: usize) -> Option<u32> {
        let inner = Arc::clone(&self.inner);
        if let Some(control) = self.control.take_if(|control| control.index == index) {
            self.rings[index].running = false;
            return Some(control.base());
        }
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
        let wanted_up = self.wanted_up;
        if let Some(ring) = self.rings.get_mut(index) {
            ring.enabled = on;
        }
        if let Some((pair, _)) = self.pair_of(index) {
            if let Some(running) = pair.gate.close().ring_mut(is_receive(index)) {
                running.enabled = on && wanted_up;
            }
            pair.gate.open();
        }
    }

    /// Enables what the front-end enabled, if the link is wanted up.
    fn enable_all(&mut self) {
        for index in 0..self.rings.len() {
            self.enable(index, self.rings[index].enabled);
        }
    }

    /// A new kick fd: what the queue sleeps on, if it is the front-end's transmit ring.
    fn set_kick(&mut self, index: usize, kick: Option<OwnedFd>) -> Result<(), RingError> {
        let kick = kick.map(event_fd).transpose()?;
        if self.is_control(index) {
            self.rings[index].kick = kick;
            return Ok(());
        }
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
        let Some(ring) = self.rings.get_mut(index) else {
            return Ok(());
        };
        ring.call = call;
        if let Some(control) = self.control.as_mut().filter(|control| control.index == index) {
            control.call = copy;
            return Ok(());
        }
        let Some((pair, _)) = self.pair_of(index) else {
            return Ok(());
        };
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
            .chunks_exact(2)
            .take_while(|pair| pair.iter().all(|ring| ring.running && ring.enabled))
            .count();
        let link = self.inner.link();
        // A driver with a control queue says there how many it uses; all its rings are enabled.
        let used = self.control.as_ref().map_or(u16::MAX, |_| self.net.active());
        let queues = if self.wanted_up { used.min(up as u16) } else { 0 };
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
        self.channel = None;
        self.reset_net();
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
