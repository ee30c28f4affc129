//! Front-end ports: our rings, over a vhost-user socket to a back-end.

mod control;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hugemem::Segment;
use hugemem::guard::Registration;
use rustix::event::{EventfdFlags, eventfd};
use virtio_ring::any::{Driver, Layout};
use virtio_ring::{Features, Options, Slot};

use self::control::Device;
use super::plan::Plan;
use super::wish::{NO_DEVICE, Wish};
use super::{Inner, Port, watch};
use crate::error::{Error, Tried};
use crate::filter::Filter;
use crate::gate::{self, ControlSide};
use crate::memory::{MemorySource, Request};
use crate::packet::Marks;
use crate::pool::{self, Cache, Pool};
use crate::queue::{FrontPair, LONG_HEADER, NET_HEADER, Offloads, Parts, RawQueue, RawRing, Side};
use crate::spec::{GUEST_OFFLOADS, HOST_OFFLOADS, PortSpec};
use crate::vhost_user::{self, Candidates, FrontendSession, Region, RingSetup};
use crate::warnings::Warnings;

/// First and longest wait before a lost back-end is looked for again.
const RETRY: [Duration; 2] = [Duration::from_millis(20), Duration::from_secs(1)];

/// What the control thread owns.
struct Control {
    /// Watches the segment, in case others can truncate its file. First, so that it goes before the segment does.
    guard: Option<Registration>,
    inner: Arc<Inner>,
    segment: Arc<Segment>,
    pool: Arc<Pool>,
    layout: Layout,
    pairs: Vec<Pair>,
    listener: Option<Candidates>,
    session: Option<FrontendSession>,
    /// A back-end was there.
    met: bool,
    /// Queue pairs that are used.
    active: u16,
    /// What the application lets in.
    filter: Option<Box<Filter>>,
    /// The back-end's network device.
    device: Device,
    /// Where the ring of its control queue goes in an area.
    control_place: (Layout, usize),
    /// Bytes of an area for rings; the one that is used begins at `area_at`.
    area: usize,
    area_at: usize,
    /// A back-end was told of the rings that are there.
    shown: bool,
    /// Of back-ends that were lost, and of an MTU that one refused.
    losses: Warnings,
    refusals: Warnings,
}

struct Pair {
    gate: ControlSide<FrontPair>,
    /// Of the receive and of the transmit ring.
    kicks: [Arc<OwnedFd>; 2],
    calls: [OwnedFd; 2],
}

/// Opens a front-end. `now`: its back-end is there, or else that is an error.
pub(super) fn open(spec: PortSpec, memory: &mut dyn MemorySource, now: bool) -> Result<Port, Error> {
    let plan = Plan::new(&spec)?;
    let server = spec.reversed;
    // The socket first: it is what is wrong most often, and costs nothing to find out.
    let timeout = Duration::from_millis(spec.timeout_ms.into());
    let listener = match server {
        true => Some(Candidates::bind(&spec.path, spec.access, timeout)?),
        false => None,
    };
    let session = if server || !now {
        None
    } else {
        Some(FrontendSession::connect(&spec.path, timeout)?)
    };

    let request = Request {
        len: plan.len,
        name: "usernic",
        numa: spec.numa,
    };
    let allocation = crate::memory::allocate(memory, &request)?;
    let description = allocation.choice.to_string();
    let segment = Arc::new(allocation.segment);
    let (queues, room) = (spec.queues, spec.buffer_size);
    let pool = Pool::new(
        Arc::clone(&segment),
        plan.buffers_at,
        plan.buffers(segment.len()),
        room,
        0,
        false,
    )?;
    let inner = Arc::new(Inner::new(spec, queues)?);
    // SAFETY: the registration goes with `Control`, before the Arc of the segment that is in there too.
    let guard = Some(unsafe { segment.guard() }?);

    let mut control = Control {
        inner: Arc::clone(&inner),
        segment: Arc::clone(&segment),
        pool,
        layout: plan.layout,
        pairs: Vec::new(),
        listener,
        session: None,
        met: false,
        guard,
        active: queues,
        filter: None,
        device: Device::default(),
        control_place: (plan.control, plan.control_at),
        area: plan.area,
        area_at: 0,
        shown: false,
        losses: Warnings::default(),
        refusals: Warnings::default(),
    };
    for index in 0..usize::from(queues) {
        let parts = control.add_pair(index)?;
        inner.put_on_shelf(parts);
    }
    if let Some(session) = session {
        control.bring_up(session)?;
    }
    let control = super::spawn(move || control.run())?;
    Ok(Port {
        inner,
        control: Some(control),
        memory: description,
        memory_bytes: segment.len(),
    })
}

/// The features without those that need one that is not there (virtio 1.3, 5.1.3.1).
fn consistent(mut features: Features) -> Features {
    if !features.contains(Features::NET_CSUM) {
        features.remove(HOST_OFFLOADS);
    }
    if !features.contains(Features::NET_GUEST_CSUM) {
        features.remove(GUEST_OFFLOADS);
    }
    // Nobody could send a packet of 64 KiB to a port whose buffers are not merged.
    if !features.contains(Features::NET_MRG_RXBUF) {
        features.remove(GUEST_OFFLOADS.difference(Features::NET_GUEST_CSUM));
    }
    if !features.intersects(Features::NET_HOST_TSO4 | Features::NET_HOST_TSO6) {
        features.remove(Features::NET_HOST_ECN);
    }
    if !features.intersects(Features::NET_GUEST_TSO4 | Features::NET_GUEST_TSO6) {
        features.remove(Features::NET_GUEST_ECN);
    }
    features
}

/// A ring at an address of this process.
fn setup<'a>(layout: Layout, at: u64, base: u32, [kick, call]: [BorrowedFd<'a>; 2]) -> RingSetup<'a> {
    let [desc, avail, used] = layout.areas().map(|area| at + area as u64);
    RingSetup {
        num: layout.size(),
        base,
        desc,
        avail,
        used,
        kick,
        call,
    }
}

/// The file to hand over.
pub(super) fn file_of(segment: &Segment) -> Result<BorrowedFd<'_>, Error> {
    let fd = segment.fd().ok_or(hugemem::Error::Slab)?;
    // SAFETY: the segment keeps its descriptor open while it lives, and is borrowed.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) })
}

impl Control {
    fn add_pair(&mut self, index: usize) -> Result<Parts, Error> {
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        let event = || eventfd(0, flags).tried("eventfd(2)");
        let (kicks, calls) = ([Arc::new(event()?), Arc::new(event()?)], [event()?, event()?]);
        // SAFETY: nobody drives these rings yet.
        let raw = unsafe { self.rings(index, &kicks, Options::default(), NET_HEADER) }?;
        let mut pair = FrontPair::new(raw, Arc::clone(&self.segment), false);
        pair.set_mtu(self.inner.spec.mtu);
        let (data, gate) = gate::pair_with_waker(pair, self.inner.waker_of(index));
        let epoll = self.inner.epoll_of(index)?;
        watch(&epoll, &calls[0])?;
        self.pairs.push(Pair { gate, kicks, calls });
        Ok(Parts {
            index: index as u16,
            side: Side::Front(data),
            cache: Cache::new(Arc::clone(&self.pool)),
            counters: Arc::clone(&self.inner.counters[index]),
            epoll: Arc::new(epoll),
        })
    }

    /// Where a ring of a pair is in the segment.
    fn ring_at(&self, index: usize, which: usize) -> usize {
        self.area_at + (2 * index + which) * self.layout.block_len()
    }

    /// The rings of a pair, in their initial state.
    ///
    /// # Safety
    /// The pair's gate is closed, or there is none yet: the memory that the pair's rings are on now is written. They are
    /// replaced by the new ones before the gate opens.
    unsafe fn rings(
        &self,
        index: usize,
        kicks: &[Arc<OwnedFd>; 2],
        options: Options,
        header: usize,
    ) -> Result<RawQueue, Error> {
        let ring = |which: usize| {
            let size = self.layout.size();
            let slots = vec![Slot::default(); usize::from(size)].into_boxed_slice();
            // SAFETY: the plan has room for all rings in either area; the mapping's base is page-aligned.
            let memory = unsafe { self.layout.place(self.segment.base().add(self.ring_at(index, which))) };
            // SAFETY: the segment stays mapped while the pair lives (it holds an Arc); no other driver uses this ring, by
            // the caller; no device does: the session is not up yet.
            let driver = unsafe { Driver::new(memory, size, options, slots) };
            let driver = driver.map_err(|source| Error::Ring {
                index: 2 * index + which,
                source,
            })?;
            Ok::<_, Error>(RawRing::new(driver, Arc::clone(&kicks[which]), header))
        };
        Ok(RawQueue {
            rx: ring(0)?,
            tx: ring(1)?,
        })
    }

    /// Negotiates and starts all rings, within one time limit.
    fn bring_up(&mut self, mut session: FrontendSession) -> Result<(), Error> {
        session.begin();
        session.stop_by(Some(Arc::clone(&self.inner.stopping)));
        let result = self.set_up(&mut session);
        if result.is_ok() {
            session.end();
            self.session = Some(session);
            self.met = true;
            self.inner.set_reason(None);
        }
        result
    }

    fn set_up(&mut self, session: &mut FrontendSession) -> Result<(), Error> {
        let spec = &self.inner.spec;
        let mut wanted = Features::VERSION_1 | Features::NET_MTU;
        wanted.set(Features::NET_MRG_RXBUF, spec.mergeable());
        wanted |= spec.offloads();
        // Without it a back-end serves the first pair alone (DPDK's does).
        wanted.set(Features::NET_MQ, spec.queues > 1);
        wanted.set(Features::RING_PACKED, spec.packed);
        wanted.set(Features::IN_ORDER, spec.in_order);
        wanted.set(Features::RING_EVENT_IDX, spec.event_idx);
        wanted.set(Features::RING_INDIRECT_DESC, spec.indirect);
        let offer = session.offer()?;
        let offered = Features::from_bits_retain(offer.features);
        if !offered.contains(Features::VERSION_1) {
            return Err(Error::Feature {
                path: spec.path.clone(),
                feature: "VIRTIO_F_VERSION_1",
                offered: offer.features,
                advice: "legacy devices are not supported: use a back-end of virtio 1.0 or later",
            });
        }
        if spec.packed && !offered.contains(Features::RING_PACKED) {
            return Err(Error::Feature {
                path: spec.path.clone(),
                feature: "VIRTIO_F_RING_PACKED",
                offered: offer.features,
                advice: "leave packed_vq=1 out, and the port has split rings",
            });
        }
        if spec.queues > offer.queue_pairs {
            return Err(Error::TooManyQueues {
                path: spec.path.clone(),
                asked: spec.queues,
                most: offer.queue_pairs,
            });
        }
        let (device, more) = Device::look(session, offered, spec)?;
        let features = consistent((wanted | more) & offered);
        if std::mem::take(&mut self.shown) {
            // The other area: see `plan`.
            self.area_at = self.area - self.area_at;
        }
        self.make_control(features, device)?;
        let spec = &self.inner.spec;
        let options = Options::from_features(features);
        let mergeable = features.contains(Features::NET_MRG_RXBUF);
        let header = match features.contains(Features::NET_HASH_REPORT) {
            true => LONG_HEADER,
            false => NET_HEADER,
        };
        let offloads = Offloads {
            takes: Marks::host(features),
            asks: Marks::guest(features),
        };

        let mut rings = Vec::with_capacity(2 * self.pairs.len());
        for index in 0..self.pairs.len() {
            // The polling thread is out before its rings' memory changes. A packed ring in its initial state is full of used
            // buffers for a driver in its second lap.
            self.pairs[index].gate.close().reset();
            // SAFETY: the gate is closed, and opens below, behind `replace`.
            let raw = unsafe { self.rings(index, &self.pairs[index].kicks, options, header) }?;
            let pair = self.pairs[index].gate.close();
            pair.replace(raw, mergeable, offloads, header == LONG_HEADER);
            // Frames can come from the first moment on, whenever the application looks.
            pair.fill(&mut Cache::new(Arc::clone(&self.pool)), &self.inner.counters[index]);
        }
        // What the old rings held is for the application's threads, not for this one to keep.
        pool::flush_this_thread();
        self.shown = true;
        let base = self.segment.base().as_ptr() as u64;
        let start = self.layout.format().start_base();
        for (index, pair) in self.pairs.iter().enumerate() {
            for which in 0..2 {
                let at = base + self.ring_at(index, which) as u64;
                let events = [pair.kicks[which].as_fd(), pair.calls[which].as_fd()];
                rings.push(((2 * index + which) as u32, setup(self.layout, at, start, events)));
            }
        }
        if let Some(ring) = self.control_ring() {
            let (layout, at) = self.control_place;
            let at = base + (self.area_at + at) as u64;
            rings.push((self.device.index, setup(layout, at, start, ring.events())));
        }
        let region = Region {
            guest_addr: base,
            user_addr: base,
            size: self.segment.len() as u64,
            offset: 0,
            fd: file_of(&self.segment)?,
        };
        session.start_rings(features.bits(), &[region], &rings)?;
        session.open_channel()?;
        if features.contains(Features::NET_MTU) {
            let mtu = spec.mtu;
            if !session.set_mtu(mtu)?
                && let Some(more) = self.refusals.due()
            {
                let path = spec.path.display();
                tracing::warn!(
                    "{path}: the back-end refuses an MTU of {mtu}: larger frames than its own may be lost{more}"
                );
            }
        }
        let pairs = self.pairs.len() as u16;
        if self.control_ring().is_none() && self.active < pairs && !session.enable(self.active, pairs)? {
            self.active = pairs;
        }
        self.introduce(session)?;
        if let Some(listener) = &mut self.listener {
            listener.choose(session);
        }
        // Before the first frame can move: whoever has received one finds the link up.
        self.show_link();
        for pair in &mut self.pairs {
            pair.gate.open();
        }
        self.announce_if_asked(session)
    }

    /// The connection is lost, or was never made.
    fn lose(&mut self, error: &Error) {
        let path = self.inner.spec.path.display();
        match error {
            _ if self.inner.stopped() => {}
            Error::VhostUser(vhost_user::Error::Closed { step: "", .. }) => tracing::info!(%path, "link down: {error}"),
            error => match self.losses.due() {
                Some(more) => tracing::warn!(%path, "link down: {error}{more}"),
                None => tracing::info!(%path, "link down: {error}"),
            },
        }
        self.take_down();
        self.inner.set_reason(Some(error.to_string()));
    }

    /// Takes the link down: nothing is sent any more; what has come can still be received.
    fn take_down(&mut self) {
        for pair in &mut self.pairs {
            pair.gate.close().set_up(false);
            pair.gate.open();
        }
        self.session = None;
        self.inner.set_link(0, 0);
    }

    fn run(mut self) {
        let mut retry = RETRY[0];
        let mut next_try = Instant::now();
        while !self.inner.stopped() {
            self.grant_wishes();
            if let Some(session) = &self.session {
                // The guard tells nobody, nor do connections that wait: look at them now and then.
                let look = Instant::now() + Duration::from_secs(1);
                let deadline = (self.guard.is_some() || self.listener.is_some()).then_some(look);
                self.inner
                    .sleep_on([Some(session.as_fd()), session.channel()], deadline);
                if self.inner.stopped() {
                    break;
                }
                if self.guard.as_ref().is_some_and(Registration::is_dead) {
                    tracing::error!("the file of the port's memory was truncated: the port is dead");
                    self.take_down();
                    // Queues report from now on that there is no port behind them.
                    self.pairs.clear();
                    self.inner.wait_for_stop();
                    break;
                }
                if let Err(error) = self.service() {
                    self.lose(&error);
                    retry = RETRY[0];
                    next_try = Instant::now() + retry;
                } else if let Some(listener) = &mut self.listener {
                    listener.look_beside();
                }
                continue;
            }
            if self.listener.is_none() && !self.inner.spec.reconnect && self.met {
                self.inner.sleep(None, None);
                continue;
            }
            match &self.listener {
                Some(listener) => self.inner.sleep(listener.events(), listener.deadline()),
                None => self.inner.sleep(None, Some(next_try)),
            }
            if self.inner.stopped() {
                break;
            }
            if self.listener.is_none() && Instant::now() < next_try {
                continue;
            }
            match self.find() {
                Ok(true) => tracing::info!(path = %self.inner.spec.path.display(), "link up"),
                Ok(false) => {}
                Err(error) => {
                    tracing::debug!(path = %self.inner.spec.path.display(), "no back-end yet: {error}");
                    self.inner.set_reason(Some(error.to_string()));
                    retry = (retry * 2).min(RETRY[1]);
                }
            }
            next_try = Instant::now() + retry;
        }
        self.inner.wishes.close();
        self.stop();
    }

    /// Notices that the back-end is gone, or wants something.
    fn service(&mut self) -> Result<(), Error> {
        let Some(session) = &mut self.session else {
            return Ok(());
        };
        session.begin();
        let result = session.service().and_then(|()| session.requests());
        let result = match result {
            Ok(true) => self.config_changed(),
            other => other.map(drop).map_err(Error::from),
        };
        if let Some(session) = &mut self.session {
            session.end();
        }
        result
    }

    /// Connects, or accepts, and starts the rings; `false`: nobody is there yet.
    fn find(&mut self) -> Result<bool, Error> {
        let spec = &self.inner.spec;
        let session = match &mut self.listener {
            Some(listener) => match listener.answered()? {
                Some(session) => session,
                None => return Ok(false),
            },
            None => {
                let timeout = Duration::from_millis(spec.timeout_ms.into());
                FrontendSession::connect_beside(&spec.path, timeout, Some(Arc::clone(&self.inner.stopping)))?
            }
        };
        self.bring_up(session).map(|()| true)
    }

    fn grant_wishes(&mut self) {
        while let Some((wish, answer)) = self.inner.wishes.next() {
            // All messages of a wish have one time limit.
            if let Some(session) = &mut self.session {
                session.begin();
            }
            let granted = self.grant(wish);
            if let Some(session) = &mut self.session {
                session.end();
            }
            if let Err(error @ Error::VhostUser(_)) = &granted {
                self.lose(error);
            }
            let _ = answer.send(granted);
        }
    }

    fn grant(&mut self, wish: Wish) -> Result<(), Error> {
        match wish {
            Wish::Filter(filter) => {
                self.filter = filter;
                let session = self.session.take();
                let result = self.use_filter(session.as_ref());
                self.session = session;
                if let Err(error) = result {
                    // The queues keep to it all the same, and the next back-end is told.
                    self.lose(&error);
                }
                Ok(())
            }
            Wish::Queues(count) => {
                let pairs = self.pairs.len() as u16;
                if let Some(mut session) = self.session.take() {
                    let granted = match self.use_pairs(&session, count) {
                        Ok(None) => session.enable(count, pairs).map_err(Error::from),
                        granted => granted.map(|granted| granted == Some(true)),
                    };
                    self.session = Some(session);
                    if !granted? {
                        return Err(Error::NotGranted {
                            why: "the back-end cannot use some of its queue pairs only",
                        });
                    }
                    self.active = count;
                    self.show_link();
                } else {
                    self.active = count;
                }
                Ok(())
            }
            Wish::Link(_) => Err(Error::NotGranted {
                why: "the back-end decides about the link of a virtio-user port",
            }),
            Wish::Vf(_) => Err(NO_DEVICE),
            Wish::Announce => {
                let session = self.session.as_mut().ok_or(Error::NotGranted {
                    why: "the link is down",
                })?;
                match session.announce(self.inner.mac())? {
                    true => Ok(()),
                    false => Err(Error::NotGranted {
                        why: "the back-end does not offer VHOST_USER_PROTOCOL_F_RARP",
                    }),
                }
            }
        }
    }

    /// Sends on the queue pairs that are enabled and on no other; with the link down, on none.
    fn use_active(&mut self, up: bool) {
        for (index, pair) in self.pairs.iter_mut().enumerate() {
            let up = up && index < usize::from(self.active);
            pair.gate.change(|pair| pair.set_up(up));
        }
    }

    /// Says goodbye: the back-end knows that the rings are stopped before they go.
    fn stop(&mut self) {
        for pair in &mut self.pairs {
            pair.gate.close().set_up(false);
        }
        if let Some(mut session) = self.session.take()
            && let Err(error) = session.stop()
        {
            tracing::debug!("the back-end did not stop its rings: {error}");
        }
        self.inner.set_link(0, 0);
        for pair in &mut self.pairs {
            pair.gate.close().reset();
        }
    }
}
