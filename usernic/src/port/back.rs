//! Back-end ports: a front-end's rings, over a vhost-user socket.

mod control;
mod net;
mod serve;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use hugemem::{PageSize, Segment};
use rustix::event::epoll;
use vhost_proto::{Event, F_PROTOCOL_FEATURES, MAX_RINGS, Outcome, ProtocolFeatures};
use virtio_ring::any::{Device, Format, Layout, Memory};
use virtio_ring::{Features, Options, Vectors, packed};

use self::control::ControlRing;
use self::net::Net;
use self::serve::Control;
use super::wish::{NO_DEVICE, Wish};
use super::{Inner, Port, watch};
use crate::error::{Error, Tried};
use crate::gate::{self, ControlSide};
use crate::packet::Marks;
use crate::pool::{Cache, Pool};
use crate::queue::{BackPair, BackRing, Offloads, Parts, Side};
use crate::regions::{Region, RegionError, Regions};
use crate::spec::PortSpec;
use crate::vhost_user::{Handler, Listener, PeerFd};

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
    /// As the front-end said last, since its rings were reset.
    enabled: Option<bool>,
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
    /// The control queue's kick is its member, edge-triggered: nobody reads what the front-end can write.
    kicks: OwnedFd,
    /// The control queue has more commands than one turn took.
    again: bool,
    /// The socket for our own requests.
    channel: Option<PeerFd>,
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
        kicks: epoll::create(epoll::CreateFlags::CLOEXEC).tried("epoll_create1(2)")?,
        again: false,
        channel: None,
        wanted_up: true,
    };
    let control_ring = usize::from(has_control(&inner.spec));
    for index in 0..usize::from(queues) {
        let mut pair = BackPair::new();
        // The port's own: what a front-end says of its MTU is about frames that are sent to it.
        pair.set_mtu(inner.spec.mtu);
        let (data, mut gate) = gate::pair_with_waker(pair, inner.waker_of(index));
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
    let control = Control::new(served, listener);
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

impl Handler for Served {
    fn handle(&mut self, event: Event<PeerFd>) -> Result<Outcome<'_>, String> {
        let done = |result: Result<(), RingError>| result.map(|()| Outcome::Done).map_err(|e| e.to_string());
        match event {
            Event::Features(bits) => {
                let features = Features::from_bits_retain(bits);
                if !features.contains(Features::VERSION_1) {
                    return Err(RingError::Legacy(bits).to_string());
                }
                let bit_30 = Features::from_bits_retain(F_PROTOCOL_FEATURES);
                let changed = !(features ^ self.features).difference(bit_30).is_empty();
                self.features = features;
                if changed {
                    self.reset_net();
                }
                if !features.contains(bit_30) {
                    for index in 0..self.rings.len() {
                        self.enable(index, true);
                    }
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
                ring.enabled = if enabled {
                    Some(true)
                } else {
                    ring.enabled.filter(|on| !on)
                };
                done(self.run(index))
            }
            Event::RingStop(index) => {
                let index = usize::from(index);
                let base = self.halt(index);
                done(self.set_kick(index, None))?;
                let ring = &mut self.rings[index];
                ring.call = None;
                let new = Format::from_features(self.features).start_base();
                let base = base.or(ring.setup.map(|setup| setup.base)).unwrap_or(new);
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
                    self.reset_rings();
                    self.reset_net();
                }
                Ok(Outcome::Done)
            }
            Event::Mtu(mtu) => {
                self.inner.set_mtu(mtu);
                Ok(Outcome::Done)
            }
            Event::Reset => {
                self.reset_rings();
                self.features = Features::empty();
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
            Event::BackendChannel(socket) if socket.is_unix_stream() => {
                self.set_channel(Some(socket));
                Ok(Outcome::Done)
            }
            // The port works without.
            Event::BackendChannel(_) => Ok(Outcome::Failed),
            // Nobody asks to be told of a broken ring.
            Event::RingErr(..) => Ok(Outcome::Done),
            other => Err(format!("{other:?} was not offered")),
        }
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
    if packed::Base::decode(base) != packed::Base::START {
        return Ok(base);
    }
    // SAFETY: passed on.
    Ok(unsafe { packed::recover(ring, size, options)? }.encode())
}

fn own(region: vhost_proto::Region, fd: PeerFd) -> Region {
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
                self.change_all(|pair| pair.set_filter(filter.clone()));
                Ok(())
            }
            Wish::Link(up) => {
                self.wanted_up = up;
                (0..self.rings.len()).for_each(|index| self.allow(index));
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

    /// Changes what the queue of a pair stands on; the gate wakes a thread that sleeps.
    fn change<T>(&mut self, pair: usize, change: impl FnOnce(&mut BackPair) -> T) -> Option<T> {
        Some(self.pairs.get_mut(pair)?.gate.change(change))
    }

    fn change_all(&mut self, mut change: impl FnMut(&mut BackPair)) {
        for pair in 0..self.pairs.len() {
            self.change(pair, &mut change);
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
        // Also where no ring runs: the old mappings are to go.
        let memory = Arc::clone(&self.memory);
        self.change_all(|pair| pair.memory = Arc::clone(&memory));
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
        // SAFETY: the parts are inside regions that are mapped.
        let unused = unsafe { parts.is_unused(setup.size) };
        // SAFETY: the parts are inside regions that are mapped; no device of ours is on the ring: `running` was false.
        let base = unsafe { found_base(parts, setup.size, options, setup.base) };
        let base = base.map_err(|source| RingError::Ring { index, source })?;
        // SAFETY: the parts are inside regions that are mapped, and stay so while whoever has the device holds `memory`; no
        // other device of ours is on the ring: `running` was false.
        let device = unsafe { Device::new(parts, setup.size, options, base) };
        let device = device.map_err(|source| RingError::Ring { index, source })?;
        if is_control {
            ring.running = true;
            self.control = Some(ControlRing::new(index, device, memory, call, unused));
            return Ok(());
        }
        ring.running = true;
        let told = ring.enabled;
        self.change(index / 2, move |pair| {
            let mut device = device;
            device.set_vectors(vectors);
            pair.memory = memory;
            pair.mergeable = features.contains(Features::NET_MRG_RXBUF);
            pair.long = features.contains(Features::NET_HASH_REPORT);
            pair.offloads = Offloads {
                takes: Marks::guest(takes),
                asks: Marks::host(features),
            };
            (pair.admits, pair.hasher) = (admits, hasher);
            let mut ring = BackRing::new(device, call, unused);
            allow(&mut ring, told, wanted_up);
            *pair.ring_mut(is_receive(index)) = Some(ring);
        });
        Ok(())
    }

    /// Stops the device side of a ring: nothing touches it any more. The base to go on from.
    fn halt(&mut self, index: usize) -> Option<u32> {
        let inner = Arc::clone(&self.inner);
        if let Some(control) = self.control.take_if(|control| control.index == index) {
            self.rings[index].running = false;
            return Some(control.base());
        }
        let (_, ring) = self.pair_of(index)?;
        if !std::mem::take(&mut ring.running) {
            return None;
        }
        self.change(index / 2, |pair| {
            pair.publish_counts(&inner.counters[index / 2]);
            pair.stop(is_receive(index))
        })?
    }

    /// Stops all rings. They go on only when they were set up anew.
    fn reset_rings(&mut self) {
        for index in 0..self.rings.len() {
            self.halt(index);
            let ring = &mut self.rings[index];
            (ring.setup, ring.enabled) = (None, None);
        }
    }

    fn enable(&mut self, index: usize, on: bool) {
        if let Some(ring) = self.rings.get_mut(index) {
            ring.enabled = Some(on);
        }
        self.allow(index);
    }

    /// Tells a ring that runs what the front-end and the application want.
    fn allow(&mut self, index: usize) {
        let (told, wanted_up) = (self.rings.get(index).and_then(|ring| ring.enabled), self.wanted_up);
        self.change(index / 2, |pair| {
            if let Some(running) = pair.ring_mut(is_receive(index)) {
                allow(running, told, wanted_up);
            }
        });
    }

    /// A new kick fd: what the queue sleeps on, if it is the front-end's transmit ring; or this thread, if it is the control
    /// queue's.
    fn set_kick(&mut self, index: usize, kick: Option<PeerFd>) -> Result<(), RingError> {
        let kick = kick.map(event_fd).transpose()?;
        let is_control = self.is_control(index);
        let Some(ring) = self.rings.get_mut(index) else {
            return Ok(());
        };
        let pair = self.pairs.get(index / 2).filter(|_| !is_receive(index));
        if let Some(old) = &ring.kick {
            // The front-end holds the same eventfd: closing ours would not take it out. Which queue is the control queue may
            // have changed since it came.
            let _ = epoll::delete(&self.kicks, old);
            let _ = pair.map(|pair| epoll::delete(&*pair.epoll, old));
        }
        let epoll = match is_control {
            true => Some(&self.kicks),
            false => pair.map(|pair| &*pair.epoll),
        };
        if let (Some(new), Some(epoll)) = (&kick, epoll) {
            watch(epoll, new).map_err(|_| RingError::NotAnEvent)?;
        }
        ring.kick = kick;
        if !is_control {
            // The front-end may have signalled the old one.
            self.change(index / 2, |_| ());
        }
        Ok(())
    }

    fn set_call(&mut self, index: usize, call: Option<PeerFd>) -> Result<(), RingError> {
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
        self.change(index / 2, |pair| {
            if let Some(running) = pair.ring_mut(is_receive(index)) {
                running.call = copy;
            }
        });
        Ok(())
    }

    fn set_channel(&mut self, channel: Option<PeerFd>) {
        if let Some(old) = std::mem::replace(&mut self.channel, channel) {
            old.close_connection();
        }
    }

    /// Says what the link is now.
    fn update_link(&mut self) {
        let up = self
            .rings
            .chunks_exact(2)
            .take_while(|pair| pair.iter().all(|ring| ring.running && ring.enabled == Some(true)))
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
        self.again = false;
        self.change_all(|pair| pair.memory = Arc::default());
        self.features = Features::empty();
        self.set_channel(None);
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

/// What is done with a ring, by what the front-end said of it and by whether the application wants the link up.
///
/// "If ring is started but disabled, back-end must process the ring without causing any side effects": what a disabled ring
/// transmits is discarded. Not so before the front-end has said anything: what is there then was sent to a back-end before
/// this one, and a front-end that comes back enables its rings right after it started them.
fn allow(ring: &mut BackRing, told: Option<bool>, wanted_up: bool) {
    ring.enabled = told == Some(true) && wanted_up;
    ring.discards = told == Some(false);
}

/// Of a pair the even virtqueue is the front-end's receive ring, the odd one its transmit ring (virtio 1.3, 5.1.2).
fn is_receive(index: usize) -> bool {
    index.is_multiple_of(2)
}

/// Takes a descriptor as kick or call only if it is an eventfd: anything else could hold the thread that signals it. Not even
/// an eventfd is read or written here (see [`notify`](crate::notify)).
fn event_fd(fd: PeerFd) -> Result<OwnedFd, RingError> {
    fd.into_eventfd().map_err(|_| RingError::NotAnEvent)
}
