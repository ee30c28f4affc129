//! A port on a vhost-user socket: its connection, and its queues while it is started.
//!
//! DPDK's memory is the other side's too, as a region for each run of pages in one file; so are the rings, which lie in
//! memory that the C half took from DPDK. A connection that is lost takes the link down; when the back-end is there again,
//! the rings begin anew, and the mbufs that were in them go back to their pools.

use std::ffi::c_void;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use usernic::filter::Filter;
use usernic::gate;
use usernic::spec::PortSpec;
use usernic::vhost_user::{self, Candidates, FrontendSession, RingSetup};
use virtio_ring::any::Layout;
use virtio_ring::{Features, Options};

use crate::abi::{Calls, Config, Info, RX_VLAN_STRIP, RxSetup, TxSetup};
use crate::counts::Counters;
use crate::rx::{self, Rx, RxQueue, Source};
use crate::setup::{Fault, Outcome, Plan, borrow, negotiate, regions, ring, too_many};
use crate::tx::{self, Sink, Tx, TxQueue};
use crate::wake::Wake;

/// NET_GUEST_TSO4 and NET_GUEST_TSO6 of a configuration: DPDK's large receive offload.
const GUEST_TSO: u64 = (Features::NET_GUEST_TSO4.bits()) | (Features::NET_GUEST_TSO6.bits());

/// A pair of rings, and where they are.
struct Pair {
    rx: rx::Control,
    tx: tx::Control,
    /// What the application's threads have. Boxed, so that its address stays.
    queues: (Box<RxQueue>, Box<TxQueue>),
    kicks: [Arc<OwnedFd>; 2],
    calls: [Arc<OwnedFd>; 2],
    wake: Arc<Wake>,
    /// Of the receive and of the transmit ring.
    layouts: [Layout; 2],
    blocks: [NonNull<u8>; 2],
}

impl Pair {
    /// Lets the application's thread receive, and wakes it: what it armed before or meanwhile may be forgotten.
    fn open_rx(&mut self) {
        self.rx.open();
        self.wake.signal();
    }

    fn open(&mut self) {
        self.open_rx();
        self.tx.open();
    }
}

/// A port that is started.
struct Running {
    config: Config,
    pairs: Vec<Pair>,
}

/// A port.
pub(crate) struct Port {
    spec: PortSpec,
    calls: &'static Calls,
    listener: Option<Candidates>,
    session: Option<FrontendSession>,
    offered: Option<vhost_user::Offered>,
    running: Option<Running>,
    filter: Option<Box<Filter>>,
    /// Why the last back-end would not do, as the log has it.
    trouble: String,
}

// SAFETY: the blocks' addresses are memory that the caller keeps while the port is started.
unsafe impl Send for Port {}

impl Port {
    /// Connects, or listens.
    pub(crate) fn open(spec: PortSpec, calls: &'static Calls) -> Outcome<Self> {
        // What kicks go by, before a thread that polls needs it.
        usernic::notify::prepare()?;
        let mut port = Port {
            listener: None,
            session: None,
            offered: None,
            running: None,
            filter: None,
            trouble: String::new(),
            calls,
            spec,
        };
        if port.spec.reversed {
            let (path, access) = (&port.spec.path, port.spec.access);
            port.listener = Some(Candidates::bind(path, access, port.timeout())?);
        } else {
            let mut session = FrontendSession::connect(&port.spec.path, port.timeout())?;
            port.offered = Some(session.offer()?);
            port.session = Some(session);
        }
        Ok(port)
    }

    fn timeout(&self) -> Duration {
        Duration::from_millis(self.spec.timeout_ms.into())
    }

    pub(crate) fn info(&self) -> Info {
        let spec = &self.spec;
        Info {
            features: self.offered.map_or(u64::MAX, |offered| offered.features),
            speed: spec.speed,
            pairs: self
                .offered
                .map_or(spec.queues, |offered| offered.queue_pairs.min(spec.queues)),
            queue_size: spec.queue_size,
            mac: spec.mac.unwrap_or_default(),
            connected: self.session.is_some().into(),
            server: self.listener.is_some().into(),
            mrg_rxbuf: spec.mrg_rxbuf.map_or(-1, i8::from),
            packed: spec.packed.into(),
            in_order: spec.in_order.into(),
            vf: 0,
        }
    }

    pub(crate) fn memory(&self, config: &Config, rx: &[RxSetup], tx: &[TxSetup]) -> Outcome<usize> {
        Plan::new(&self.spec, config, rx, tx).map(|plan| plan.len)
    }

    /// Starts the queues; with nobody on the other side they wait for somebody.
    ///
    /// # Safety
    /// `memory` is as long as [`memory`](Port::memory) says, aligned to a page, and stays until the port is stopped, as do the
    /// pools.
    pub(crate) unsafe fn start(
        &mut self,
        config: &Config,
        rx: &[RxSetup],
        tx: &[TxSetup],
        memory: NonNull<u8>,
        queues: &mut [*mut c_void],
    ) -> Outcome<()> {
        self.stop();
        let plan = Plan::new(&self.spec, config, rx, tx)?;
        let mut pairs = Vec::new();
        for index in 0..usize::from(config.pairs) {
            let [rx_at, tx_at, slots_at] = plan.at[index];
            // SAFETY: inside the memory, by the plan.
            let (blocks, slots) = unsafe { ([memory.add(rx_at), memory.add(tx_at)], memory.add(slots_at)) };
            // SAFETY: as above; the port keeps the pairs until it is stopped.
            pairs.push(unsafe {
                self.pair(
                    config.port,
                    (&rx[index], &tx[index]),
                    plan.layouts[index],
                    blocks,
                    slots,
                )?
            });
        }
        for (index, pair) in pairs.iter_mut().enumerate() {
            queues[index] = (&raw mut *pair.queues.0).cast();
            queues[usize::from(config.pairs) + index] = (&raw mut *pair.queues.1).cast();
        }
        self.running = Some(Running { config: *config, pairs });
        self.use_extras(config.extras.into());
        if self.session.is_none() && self.listener.is_some() {
            // Whoever connects and will not do is no reason not to start.
            self.service();
            return Ok(());
        }
        let up = match &mut self.session {
            Some(session) => {
                session.begin();
                self.bring_up()
            }
            None => self.find(),
        };
        if up.is_err() {
            self.take_down();
            self.stop();
        }
        up
    }

    /// # Safety
    /// As [`start`](Port::start).
    unsafe fn pair(
        &self,
        port: u16,
        (rx, tx): (&RxSetup, &TxSetup),
        layouts: [Layout; 2],
        blocks: [NonNull<u8>; 2],
        slots: NonNull<u8>,
    ) -> Outcome<Pair> {
        let event = || {
            let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
            eventfd(0, flags)
                .map(Arc::new)
                .map_err(|e| Fault::new(e, format!("eventfd(2): {e}")))
        };
        let (kicks, calls) = ([event()?, event()?], [event()?, event()?]);
        let counters = [Arc::new(Counters::default()), Arc::new(Counters::default())];
        let options = Options::default();
        // SAFETY: by the caller, nobody else is on this memory.
        let (rx_ring, tx_ring) = unsafe {
            (
                ring(layouts[0], blocks[0], options, &kicks[0])?,
                ring(layouts[1], blocks[1], options, &kicks[1])?,
            )
        };
        let source = Source::new(rx, port, self.calls, Arc::clone(&counters[0]));
        let sink = Sink::new(tx, self.calls, Arc::clone(&counters[1]));
        let receive = Rx::new(rx_ring, rx, source);
        let wake = Arc::new(Wake::new(Arc::clone(&calls[0]))?);
        // SAFETY: the plan has room for the slots.
        let send = unsafe { Tx::new(tx_ring, tx, slots.as_ptr(), sink) };
        let (rx_data, rx) = gate::pair(receive);
        let (tx_data, tx) = gate::pair(send);
        let [rx_counters, tx_counters] = counters;
        Ok(Pair {
            rx,
            tx,
            queues: (
                Box::new(RxQueue::new(rx::Data::Ring(rx_data), rx_counters, Arc::clone(&wake))),
                Box::new(TxQueue::new(tx::Data::Ring(tx_data), tx_counters)),
            ),
            kicks,
            calls,
            wake,
            layouts,
            blocks,
        })
    }

    /// Negotiates with the back-end that is there, and starts all rings: the end of an operation of the session's.
    fn bring_up(&mut self) -> Outcome<()> {
        let (Some(session), Some(offered)) = (&mut self.session, self.offered) else {
            return Ok(());
        };
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        let features = negotiate(&self.spec, &running.config, &offered)?;
        let options = Options::from_features(features);
        let mergeable = features.contains(Features::NET_MRG_RXBUF);
        let mtu = running.config.mtu;
        let large = running.config.features & GUEST_TSO != 0;
        for pair in &mut running.pairs {
            // First of all: a thread that polls the ring that was there would take the initial state of a packed ring for
            // buffers that were used.
            let (receive, send) = (pair.rx.close(), pair.tx.close());
            // SAFETY: the gates are closed, and the rings that were on this memory are replaced; no device is on it: the
            // session has not started.
            let (rx, tx) = unsafe {
                (
                    ring(pair.layouts[0], pair.blocks[0], options, &pair.kicks[0])?,
                    ring(pair.layouts[1], pair.blocks[1], options, &pair.kicks[1])?,
                )
            };
            receive.source.set_mtu(mtu, large);
            receive.replace(rx, mergeable);
            send.replace(tx, options.indirect);
        }
        let regions = regions(self.calls, true)?;
        let shared = borrow(&regions);
        let mut setups = Vec::new();
        for pair in &running.pairs {
            for which in 0..2 {
                let at = pair.blocks[which].as_ptr() as u64;
                let layout = pair.layouts[which];
                let [desc, avail, used] = layout.areas().map(|area| at + area as u64);
                setups.push(RingSetup {
                    num: layout.size(),
                    base: layout.format().start_base(),
                    desc,
                    avail,
                    used,
                    kick: pair.kicks[which].as_fd(),
                    call: pair.calls[which].as_fd(),
                });
            }
        }
        session
            .start(features.bits(), &shared, &setups)
            .map_err(|e| too_many(e, regions.len()))?;
        if features.contains(Features::NET_MTU) {
            let mtu = running.config.mtu;
            if !session.set_mtu(mtu)? {
                tracing::warn!("the back-end refuses an MTU of {mtu}: larger frames than its own may be lost");
            }
        }
        session.end();
        if let Some(listener) = &mut self.listener {
            listener.choose(session);
        }
        for pair in &mut running.pairs {
            pair.open();
        }
        tracing::info!(path = %self.spec.path.display(), "link up: {features:?}, {} regions of memory", regions.len());
        Ok(())
    }

    /// The connection is gone: nothing is sent any more; what has come can still be received.
    fn take_down(&mut self) {
        self.session = None;
        for pair in self.running.iter_mut().flat_map(|running| &mut running.pairs) {
            let was_open = pair.rx.is_open();
            pair.rx.close().take_down();
            pair.tx.close().take_down();
            if was_open {
                pair.open();
            }
        }
    }

    /// Stops all rings: no mbuf is in one any more.
    pub(crate) fn stop(&mut self) {
        if let Some(mut running) = self.running.take() {
            if let Some(session) = &mut self.session
                && let Err(error) = session.stop()
            {
                tracing::warn!("link down: {error}");
                // What does not answer may still look at the rings: with the connection it loses its right to.
                self.session = None;
            }
            for pair in &mut running.pairs {
                pair.rx.close().reset();
                pair.tx.close().reset();
            }
        }
    }

    /// Shares DPDK's memory as it is now.
    pub(crate) fn share(&mut self) -> Outcome<()> {
        let (Some(session), Some(running)) = (&mut self.session, &self.running) else {
            return Ok(());
        };
        let regions = regions(self.calls, true)?;
        let pairs = running.config.pairs;
        session.begin();
        let mut replace = || {
            // Rings that are enabled may be looked at while the table is replaced; some back-ends do not stand that.
            session.enable(0, pairs)?;
            session.share(&borrow(&regions))?;
            session.enable(pairs, pairs)
        };
        if let Err(error) = replace() {
            self.take_down();
            return Err(too_many(error, regions.len()));
        }
        if let Some(session) = &mut self.session {
            session.end();
        }
        Ok(())
    }

    /// Looks after the connection; whether the link is up.
    pub(crate) fn service(&mut self) -> bool {
        if let Some(session) = &mut self.session
            && let Err(error) = session.service()
        {
            tracing::warn!("link down: {error}");
            self.take_down();
            // Looked for another time, so that who asks sees that the link was down.
            return false;
        }
        if self.session.is_none() {
            if let Err(fault) = self.find() {
                self.take_down();
                // Once, not with every look.
                if self.trouble != fault.text {
                    tracing::warn!("no link: {}", fault.text);
                    self.trouble = fault.text;
                }
            } else if self.session.is_some() {
                self.trouble.clear();
            }
        } else if let Some(listener) = &mut self.listener {
            listener.look_beside();
        }
        self.session.is_some()
    }

    /// Connects, or takes a back-end that has connected, and starts all rings on it.
    fn find(&mut self) -> Outcome<()> {
        let timeout = self.timeout();
        let found = match &mut self.listener {
            Some(listener) => listener.answered()?,
            None => match FrontendSession::connect(&self.spec.path, timeout) {
                Ok(session) => Some(session),
                Err(vhost_user::Error::NoSocket { .. } | vhost_user::Error::NobodyListens { .. }) => None,
                Err(error) => return Err(error.into()),
            },
        };
        if let Some(mut session) = found {
            // All that is agreed on has one time limit.
            session.begin();
            self.offered = Some(session.offer()?);
            self.session = Some(session);
            self.bring_up()?;
        }
        Ok(())
    }

    /// What C is to look at in received frames.
    fn use_extras(&mut self, look: u32) {
        let filter = self.filter.clone();
        self.each_rx(|rx| {
            rx.source.look = look;
            rx.source.filter.clone_from(&filter);
        });
    }

    pub(crate) fn set_filter(&mut self, filter: Filter) -> Outcome<()> {
        self.filter = filter.is_active().then(|| Box::new(filter));
        let filter = self.filter.clone();
        self.each_rx(|rx| rx.source.filter.clone_from(&filter));
        Ok(())
    }

    pub(crate) fn set_vlan_strip(&mut self, on: bool) {
        self.each_rx(|rx| {
            let look = &mut rx.source.look;
            *look = if on {
                *look | RX_VLAN_STRIP
            } else {
                *look & !RX_VLAN_STRIP
            };
        });
        if let Some(running) = &mut self.running {
            let kept = running.config.extras & !(RX_VLAN_STRIP as u8);
            running.config.extras = kept | if on { RX_VLAN_STRIP as u8 } else { 0 };
        }
    }

    /// Takes packets of so many bytes from now on.
    pub(crate) fn set_mtu(&mut self, mtu: u16) {
        let Some(running) = &mut self.running else { return };
        running.config.mtu = mtu;
        let large = running.config.features & GUEST_TSO != 0;
        self.each_rx(|rx| rx.source.set_mtu(mtu, large));
    }

    fn each_rx(&mut self, mut change: impl FnMut(&mut Rx)) {
        for pair in self.running.iter_mut().flat_map(|running| &mut running.pairs) {
            let was_open = pair.rx.is_open();
            change(pair.rx.close());
            if was_open {
                pair.open_rx();
            }
        }
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.stop();
    }
}
