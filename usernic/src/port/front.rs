//! Front-end ports: our rings, over a vhost-user socket to a back-end.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hugemem::Segment;
use hugemem::guard::Registration;
use rustix::event::{EventfdFlags, eventfd};
use virtio_ring::split::{Driver, Layout, Options};
use virtio_ring::{Features, Slot};

use super::plan::Plan;
use super::{Inner, Port, watch};
use crate::error::{Error, Tried};
use crate::gate::{self, ControlSide};
use crate::memory::{MemorySource, Request};
use crate::pool::{self, Cache, Pool};
use crate::queue::{FrontPair, NET_HEADER, Parts, RawQueue, RawRing, Side};
use crate::spec::PortSpec;
use crate::vhost_user::{FrontendSession, Listener, Region, RingSetup};

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
    listener: Option<Listener>,
    session: Option<FrontendSession>,
}

struct Pair {
    gate: ControlSide<FrontPair>,
    /// Of the receive and of the transmit ring.
    kicks: [Arc<OwnedFd>; 2],
    calls: [OwnedFd; 2],
}

pub(super) fn open(spec: PortSpec, memory: &mut dyn MemorySource) -> Result<Port, Error> {
    let plan = Plan::new(&spec)?;
    let server = spec.reversed;
    // The socket first: it is what is wrong most often, and costs nothing to find out.
    let timeout = Duration::from_millis(spec.timeout_ms.into());
    let listener = if server {
        Some(Listener::bind(&spec.path)?)
    } else {
        None
    };
    let session = if server {
        None
    } else {
        Some(FrontendSession::connect(&spec.path, timeout)?)
    };

    let request = Request {
        len: plan.len,
        name: "usernic",
        numa: spec.numa,
    };
    let allocation = memory.allocate(&request)?;
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
    let guard = unsafe { segment.guard() }.ok();

    let mut control = Control {
        inner: Arc::clone(&inner),
        segment: Arc::clone(&segment),
        pool,
        layout: plan.layout,
        pairs: Vec::new(),
        listener,
        session: None,
        guard,
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

/// The file to hand over.
fn file_of(segment: &Segment) -> Result<BorrowedFd<'_>, Error> {
    let fd = segment.fd().ok_or(hugemem::Error::Slab)?;
    // SAFETY: the segment keeps its descriptor open while it lives, and is borrowed.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) })
}

impl Control {
    fn add_pair(&mut self, index: usize) -> Result<Parts, Error> {
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        let event = || eventfd(0, flags).tried("eventfd(2)");
        let (kicks, calls) = ([Arc::new(event()?), Arc::new(event()?)], [event()?, event()?]);
        let raw = self.rings(index, &kicks, Options::default())?;
        let (data, gate) = gate::pair(FrontPair::new(raw, Arc::clone(&self.segment), false));
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

    /// The rings of a pair, in their initial state.
    fn rings(&self, index: usize, kicks: &[Arc<OwnedFd>; 2], options: Options) -> Result<RawQueue, Error> {
        let ring = |which: usize| {
            let size = self.layout.size;
            let slots = vec![Slot::default(); usize::from(size)].into_boxed_slice();
            // SAFETY: the plan has room for all rings at the segment's beginning; the mapping's base is page-aligned.
            let memory = unsafe {
                self.layout
                    .place(self.segment.base().add((2 * index + which) * self.layout.len))
            };
            // SAFETY: the segment stays mapped while the pair lives (it holds an Arc); no other driver is on this ring:
            // one that was there before is replaced with the gate closed; no device is: the session is not up yet.
            let driver = unsafe { Driver::new(memory, size, options, slots) };
            let driver = driver.map_err(|source| Error::Ring {
                index: 2 * index + which,
                source,
            })?;
            Ok::<_, Error>(RawRing::new(driver, Arc::clone(&kicks[which]), NET_HEADER))
        };
        Ok(RawQueue {
            rx: ring(0)?,
            tx: ring(1)?,
        })
    }

    /// Negotiates and starts all rings.
    fn bring_up(&mut self, mut session: FrontendSession) -> Result<(), Error> {
        let spec = &self.inner.spec;
        let mut wanted = Features::VERSION_1;
        wanted.set(Features::NET_MRG_RXBUF, spec.mergeable());
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
        if spec.queues > offer.queue_pairs {
            return Err(Error::TooManyQueues {
                path: spec.path.clone(),
                asked: spec.queues,
                most: offer.queue_pairs,
            });
        }
        let features = wanted & offered;
        let options = Options::from_features(features);
        let mergeable = features.contains(Features::NET_MRG_RXBUF);

        let mut rings = Vec::with_capacity(2 * self.pairs.len());
        for index in 0..self.pairs.len() {
            let raw = self.rings(index, &self.pairs[index].kicks, options)?;
            let pair = self.pairs[index].gate.close();
            pair.replace(raw, mergeable);
            // Frames can come from the first moment on, whenever the application looks.
            pair.fill(&mut Cache::new(Arc::clone(&self.pool)), &self.inner.counters[index]);
        }
        // What the old rings held is for the application's threads, not for this one to keep.
        pool::flush_this_thread();
        let base = self.segment.base().as_ptr() as u64;
        for (index, pair) in self.pairs.iter().enumerate() {
            for which in 0..2 {
                let at = base + ((2 * index + which) * self.layout.len) as u64;
                rings.push(RingSetup {
                    num: self.layout.size,
                    base: 0,
                    desc: at + self.layout.desc as u64,
                    avail: at + self.layout.avail as u64,
                    used: at + self.layout.used as u64,
                    kick: pair.kicks[which].as_fd(),
                    call: pair.calls[which].as_fd(),
                });
            }
        }
        let region = Region {
            guest_addr: base,
            user_addr: base,
            size: self.segment.len() as u64,
            offset: 0,
            fd: file_of(&self.segment)?,
        };
        session.start(features.bits(), &[region], &rings)?;
        for pair in &mut self.pairs {
            pair.gate.open();
        }
        self.session = Some(session);
        self.inner.set_link(self.pairs.len() as u16, features.bits());
        Ok(())
    }

    /// Takes the link down: nothing is sent any more; what has come can still be received.
    fn take_down(&mut self) {
        self.session = None;
        self.inner.set_link(0, 0);
        for pair in &mut self.pairs {
            pair.gate.close().set_up(false);
            pair.gate.open();
        }
    }

    fn run(mut self) {
        let mut retry = RETRY[0];
        let mut next_try = Instant::now();
        while !self.inner.stopped() {
            if let Some(session) = &self.session {
                // The guard tells nobody: look at it now and then.
                let look = Instant::now() + Duration::from_secs(1);
                self.inner
                    .sleep(Some(session.as_fd()), self.guard.is_some().then_some(look));
                if self.inner.stopped() {
                    break;
                }
                if self.guard.as_ref().is_some_and(Registration::is_dead) {
                    tracing::error!("the file of the port's memory was truncated: the port is dead");
                    self.take_down();
                    self.inner.wait_for_stop();
                    break;
                }
                let lost = self.session.as_mut().and_then(|session| session.service().err());
                if let Some(error) = lost {
                    tracing::warn!(path = %self.inner.spec.path.display(), "link down: {error}");
                    self.take_down();
                    retry = RETRY[0];
                    next_try = Instant::now() + retry;
                }
                continue;
            }
            if self.listener.is_none() && !self.inner.spec.reconnect {
                self.inner.sleep(None, None);
                continue;
            }
            let listener = self.listener.as_ref().map(AsFd::as_fd);
            let deadline = if listener.is_some() { None } else { Some(next_try) };
            self.inner.sleep(listener, deadline);
            if self.inner.stopped() {
                break;
            }
            match self
                .find()
                .and_then(|found| found.map_or(Ok(()), |session| self.bring_up(session)))
            {
                Ok(()) => {
                    if self.session.is_some() {
                        tracing::info!(path = %self.inner.spec.path.display(), "link up");
                    }
                }
                Err(error) => {
                    tracing::debug!(path = %self.inner.spec.path.display(), "no back-end yet: {error}");
                    retry = (retry * 2).min(RETRY[1]);
                }
            }
            next_try = Instant::now() + retry;
        }
        self.stop();
    }

    /// Connects, or accepts.
    fn find(&mut self) -> Result<Option<FrontendSession>, Error> {
        let timeout = Duration::from_millis(self.inner.spec.timeout_ms.into());
        match &self.listener {
            Some(listener) => Ok(listener
                .accept()?
                .map(|stream| FrontendSession::new(stream, &self.inner.spec.path, timeout))),
            None => Ok(Some(FrontendSession::connect(&self.inner.spec.path, timeout)?)),
        }
    }

    /// Says goodbye: the back-end knows that the rings are stopped before they go.
    fn stop(&mut self) {
        if let Some(session) = &mut self.session
            && let Err(error) = session.stop()
        {
            tracing::debug!("the back-end did not stop its rings: {error}");
        }
        self.take_down();
        for pair in &mut self.pairs {
            pair.gate.close().reset();
        }
    }
}
