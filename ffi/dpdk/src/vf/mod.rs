//! A port on a virtual function: the device, and its queues while it is started.
//!
//! The device reaches DPDK's memory, at the addresses that it has here, from the first start on: mbufs are sent and received in
//! place, and the rings lie in memory that the C half took from DPDK. Mapping it takes its time, so that a stop leaves it
//! mapped; what keeps a stopped device from memory is that it is no bus master. When the PF is reset the link goes down; when it is
//! there again all begins anew, and the mbufs that were in the rings go back to their pools.

mod rx;
mod tx;

use std::ffi::c_void;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use ixgbevf::{HashFields, MAX_RING, MIN_RING, Memory, RxOptions, Setup, Speed, ring_len};
use rustix::io::Errno;
use usernic::filter::Filter;
use usernic::gate::{self, ControlSide};
use usernic::spec::PortSpec;
use usernic::vf::{Function, Hardware, Health, Rings, frame_of};

pub(crate) use self::rx::Rx;
pub(crate) use self::tx::Tx;
use crate::abi::{self, Calls, Config, Info, RX_VLAN_STRIP, RxSetup, TxSetup};
use crate::counts::Counters;
use crate::rx::{Data as RxData, RxQueue, Source};
use crate::setup::{Fault, Outcome, regions};
use crate::tx::{Data as TxData, Sink, TxQueue};
use crate::wake::Wake;

/// What rings are aligned to.
const ALIGN: usize = 4096;

/// Bits of `Info::features`, in virtio's words: checksums and segmentation, and frames in several buffers.
const FEATURES: u64 = 1 << 0 | 1 << 1 | 1 << 11 | 1 << 12 | 1 << 15;

struct Pair {
    rx: ControlSide<Rx>,
    tx: ControlSide<Tx>,
    wake: Arc<Wake>,
    /// Which of the two the application has.
    there: [bool; 2],
    /// What the application's threads have. Boxed, so that its address stays.
    queues: (Box<RxQueue>, Box<TxQueue>),
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

struct Running {
    config: Config,
    pairs: Vec<Pair>,
}

/// A port on a virtual function.
pub(crate) struct Port {
    spec: PortSpec,
    calls: &'static Calls,
    /// None once the device is gone.
    function: Option<Function>,
    running: Option<Running>,
    rss: Option<ixgbevf::Rss>,
    link: Option<Speed>,
    /// DPDK's memory is mapped for the device, and changes are followed.
    shared: bool,
    /// The PF was reset, and the queues do not run.
    lost: bool,
    /// Why they do not run again, as the log has it.
    trouble: String,
}

// SAFETY: queues refer to memory that the caller keeps while the port is started.
unsafe impl Send for Port {}

impl From<usernic::Error> for Fault {
    fn from(error: usernic::Error) -> Self {
        let errno = match &error {
            usernic::Error::Spec(_) => Errno::INVAL,
            usernic::Error::Region { .. } => Errno::FAULT,
            usernic::Error::Vf { source, .. } => match source {
                ixgbevf::Error::Refused(_) | ixgbevf::Error::Unsupported(_) => Errno::OPNOTSUPP,
                ixgbevf::Error::Gone => Errno::NODEV,
                _ => Errno::IO,
            },
            usernic::Error::Vfio(_) => Errno::NODEV,
            _ => Errno::IO,
        };
        Fault::new(errno, error.to_string())
    }
}

fn gone() -> Fault {
    Fault::new(Errno::NODEV, "the device is gone: close the port")
}

/// Descriptors of a ring, as a device has them.
fn ring_size(asked: u16) -> u16 {
    asked.clamp(MIN_RING, MAX_RING).next_multiple_of(8)
}

impl Port {
    /// Opens the device, and resets it: address and queues are known then.
    pub(crate) fn open(spec: PortSpec, calls: &'static Calls) -> Outcome<Self> {
        let function = Function::open(&spec)?;
        Self::over(function, spec, calls)
    }

    /// On a device that is open: a model, in tests.
    #[cfg_attr(not(test), allow(dead_code, reason = "for tests"))]
    pub(crate) fn on(hardware: Box<dyn Hardware>, spec: PortSpec, calls: &'static Calls) -> Outcome<Self> {
        let pause = hardware.pause();
        let function = Function::on(hardware, pause, &spec)?;
        Self::over(function, spec, calls)
    }

    fn over(mut function: Function, spec: PortSpec, calls: &'static Calls) -> Outcome<Self> {
        function.set_bus_master(true)?;
        function.begin(&spec)?;
        Ok(Port {
            spec,
            calls,
            function: Some(function),
            running: None,
            rss: None,
            link: None,
            shared: false,
            lost: false,
            trouble: String::new(),
        })
    }

    pub(crate) fn info(&self) -> Info {
        let limits = self.function.as_ref().map(Function::limits);
        let most = limits.map_or(1, |limits| limits.rx.min(limits.tx));
        Info {
            features: FEATURES,
            speed: self.link.map_or(self.spec.speed, Speed::mbps),
            pairs: self.spec.queues.min(most.into()),
            queue_size: ring_size(self.spec.queue_size),
            mac: self.function.as_ref().map(Function::mac).unwrap_or_default(),
            connected: self.link.is_some().into(),
            server: 0,
            // Scattered where frames do not fit, whatever was said.
            mrg_rxbuf: -1,
            packed: 0,
            in_order: 0,
            vf: match self.function.as_ref().map(Function::model) {
                Some(model) if model.has_own_rss() => abi::VF_OWN_RSS,
                _ => abi::VF,
            },
        }
    }

    /// Where the rings of each pair are, and how many bytes in all.
    fn plan(config: &Config, rx: &[RxSetup], tx: &[TxSetup]) -> (Vec<[usize; 2]>, usize) {
        let mut len = 0;
        let mut take = |size: u16| {
            let at = len;
            len = (at + ring_len(ring_size(size))).next_multiple_of(128);
            at
        };
        let at = (0..usize::from(config.pairs))
            .map(|index| [take(rx[index].size), take(tx[index].size)])
            .collect();
        (at, len.next_multiple_of(ALIGN))
    }

    pub(crate) fn memory(&self, config: &Config, rx: &[RxSetup], tx: &[TxSetup]) -> Outcome<usize> {
        self.check(config)?;
        Ok(Self::plan(config, rx, tx).1)
    }

    fn check(&self, config: &Config) -> Outcome<()> {
        let most = self.info().pairs;
        if config.pairs > most || !config.rx_pairs.max(1).is_power_of_two() {
            let text = format!(
                "{} queue pairs, {} of them to receive: {} gives {most} here (queues=), and spreads over 1, 2, 4 or 8",
                config.pairs,
                config.rx_pairs,
                self.name()
            );
            return Err(Fault::new(Errno::INVAL, text));
        }
        Ok(())
    }

    fn name(&self) -> &str {
        self.function.as_ref().map_or("the device", Function::name)
    }

    /// Starts the queues.
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
        self.check(config)?;
        self.share_all()?;
        let (at, _) = Self::plan(config, rx, tx);
        let mut pairs = Vec::new();
        for index in 0..config.pairs {
            let i = usize::from(index);
            // SAFETY: inside the memory, by the plan.
            let blocks = unsafe { at[i].map(|at| memory.add(at)) };
            // SAFETY: as above; the port keeps the pairs until it is stopped.
            pairs.push(unsafe { self.pair(index as u8, config, (&rx[i], &tx[i]), blocks)? });
        }
        for (index, pair) in pairs.iter_mut().enumerate() {
            queues[index] = (&raw mut *pair.queues.0).cast();
            queues[usize::from(config.pairs) + index] = (&raw mut *pair.queues.1).cast();
        }
        self.running = Some(Running { config: *config, pairs });
        if let Err(fault) = self.bring_up() {
            self.stop();
            return Err(fault);
        }
        Ok(())
    }

    /// # Safety
    /// As [`start`](Port::start).
    unsafe fn pair(
        &self,
        index: u8,
        config: &Config,
        (rx_setup, tx_setup): (&RxSetup, &TxSetup),
        blocks: [NonNull<u8>; 2],
    ) -> Outcome<Pair> {
        let function = self.function.as_ref().ok_or_else(gone)?;
        // Lent memory is where the device finds it.
        let memory = blocks.map(|ptr| Memory {
            ptr,
            addr: ptr.as_ptr() as u64,
        });
        let sizes = [ring_size(rx_setup.size), ring_size(tx_setup.size)];
        let options = RxOptions {
            // A queue that the application does not have gets no buffers.
            buffer_len: if rx_setup.pool.is_null() { 1024 } else { rx_setup.room },
            vlan_strip: u32::from(config.extras) & RX_VLAN_STRIP != 0,
        };
        // SAFETY: by the caller, the blocks are as long as the rings, and nobody else's.
        let rings = unsafe { function.rings(index, memory, sizes, options) }?;
        let counters = [Arc::new(Counters::default()), Arc::new(Counters::default())];
        let mut source = Source::new(rx_setup, config.port, self.calls, Arc::clone(&counters[0]));
        source.set_mtu(config.mtu, false);
        let sink = Sink::new(tx_setup, self.calls, Arc::clone(&counters[1]));
        let event: Arc<OwnedFd> = match function.event_of(index) {
            Some(event) => Arc::new(
                event
                    .try_clone()
                    .map_err(|e| Fault::new(Errno::MFILE, format!("an interrupt's descriptor: {e}")))?,
            ),
            None => return Err(Fault::new(Errno::NODEV, "the device has no interrupts")),
        };
        let wake = Arc::new(Wake::new(event)?);
        let Rings {
            rx,
            tx,
            interrupts,
            vector,
        } = rings;
        let receive = Rx::new((rx, interrupts), vector, function.model(), rx_setup, source);
        let send = Tx::new(tx, tx_setup, sink);
        let (rx_data, rx) = gate::pair(receive);
        let (tx_data, tx) = gate::pair(send);
        let [rx_counters, tx_counters] = counters;
        Ok(Pair {
            rx,
            tx,
            wake: Arc::clone(&wake),
            there: [!rx_setup.pool.is_null(), tx_setup.size != 0],
            queues: (
                Box::new(RxQueue::new(RxData::Vf(rx_data), rx_counters, wake)),
                Box::new(TxQueue::new(TxData::Vf(tx_data), tx_counters)),
            ),
        })
    }

    /// Resets the function, sets it up as it is configured, and starts all queues.
    fn bring_up(&mut self) -> Outcome<()> {
        let function = self.function.as_mut().ok_or_else(gone)?;
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        let config = &running.config;
        function.set_bus_master(true)?;
        function.reset()?;
        let rx_queues = config.rx_pairs.max(1) as u8;
        let own = function.model().has_own_rss() && rx_queues > 1;
        let rss = own.then(|| {
            let mut rss = self.rss.unwrap_or_else(|| ixgbevf::Rss::spread(rx_queues));
            if config.hash != 0 {
                rss.fields = HashFields::from_bits_truncate(config.hash);
            }
            rss
        });
        let setup = Setup {
            max_frame: frame_of(config.mtu),
            rx_queues,
            rss,
        };
        function.set_up(&setup)?;
        for pair in &mut running.pairs {
            let rx = pair.rx.close();
            let tx = pair.tx.close();
            rx.fill(1);
            let [receives, sends] = pair.there;
            function.start(rx.ring().filter(|_| receives), tx.ring().filter(|_| sends))?;
            rx.set_running(receives);
            tx.set_up(sends);
        }
        for pair in &mut running.pairs {
            pair.open();
        }
        self.rss = rss.or(self.rss);
        self.lost = false;
        self.link = function.link();
        function.unmask_mailbox();
        Ok(())
    }

    /// Stops what runs, until it can be brought up again.
    fn fall(&mut self) {
        for pair in self.running.iter_mut().flat_map(|running| &mut running.pairs) {
            pair.rx.close();
            pair.tx.close();
        }
        // After a reset of the PF nothing runs.
        if let Some(function) = self.function.as_mut().filter(|function| function.is_known()) {
            function.stop();
        }
        self.take_down();
        self.lost = self.running.is_some();
    }

    /// No ring runs any more, and no mbuf is in one.
    fn take_down(&mut self) {
        self.link = None;
        for pair in self.running.iter_mut().flat_map(|running| &mut running.pairs) {
            pair.rx.close().reset();
            pair.tx.close().reset();
        }
    }

    /// Stops all queues: no mbuf is in one any more, and the device reaches no memory until the next start.
    pub(crate) fn stop(&mut self) {
        if self.running.is_none() {
            return;
        }
        for pair in self.running.iter_mut().flat_map(|running| &mut running.pairs) {
            pair.rx.close();
            pair.tx.close();
        }
        if let Some(function) = &mut self.function {
            function.stop();
            // What its queues had under way ends here.
            if let Err(error) = function.set_bus_master(false) {
                tracing::warn!("{error}");
            }
        }
        self.take_down();
        for pair in self.running.take().into_iter().flat_map(|running| running.pairs) {
            let Pair { mut rx, mut tx, .. } = pair;
            rx.close().close();
            tx.close().close();
        }
    }

    /// The device is gone, or wanted back: it is let go of at once, since others wait for that.
    fn give_up(&mut self, why: &str) {
        tracing::error!("{}: {why}: the port is dead", self.name());
        for pair in self.running.iter_mut().flat_map(|running| &mut running.pairs) {
            pair.rx.close();
            pair.tx.close();
        }
        // No more memory, no more interrupts, a function-level reset.
        self.function = None;
        self.link = None;
        for pair in self.running.iter_mut().flat_map(|running| &mut running.pairs) {
            pair.rx.close().close();
            pair.tx.close().close();
        }
    }

    /// Lets the device reach DPDK's memory as it is now.
    fn share_all(&mut self) -> Outcome<()> {
        let mut pieces = Vec::new();
        for region in regions(self.calls, false)? {
            let grain = match u64::from(region.grain) {
                0 => region.length,
                grain => grain,
            };
            let mut at = 0;
            while at < region.length {
                let len = grain.min(region.length - at);
                pieces.push((region.address + at, len));
                at += len;
            }
        }
        let function = self.function.as_mut().ok_or_else(gone)?;
        self.shared = true;
        // SAFETY: DPDK's memory is locked during this call, and who changes it comes here before it goes.
        unsafe { function.lend(&pieces) }?;
        Ok(())
    }

    /// Shares DPDK's memory as it is now.
    pub(crate) fn share(&mut self) -> Outcome<()> {
        if !self.shared || self.function.is_none() {
            return Ok(());
        }
        let shared = self.share_all();
        if shared.is_err() {
            // Frames in what the device does not reach would be lost without a word.
            self.fall();
        }
        shared
    }

    /// Looks after the device; whether the link is up.
    pub(crate) fn service(&mut self) -> bool {
        let Some(function) = &mut self.function else {
            return false;
        };
        if self.lost {
            if function.is_wanted_back() {
                self.give_up(usernic::vf::WANTED_BACK);
                return false;
            }
            match self.share_all().and_then(|()| self.bring_up()) {
                Ok(()) => {
                    tracing::info!("{}: brought up again", self.name());
                    self.trouble.clear();
                }
                Err(fault) => {
                    self.take_down();
                    // Once, not with every look.
                    if self.trouble != fault.text {
                        tracing::warn!("no link: {}", fault.text);
                        self.trouble = fault.text;
                    }
                }
            }
            return self.link.is_some();
        }
        match function.service() {
            Health::Well => {
                self.link = function.link();
                function.unmask_mailbox();
            }
            Health::Reset => self.fall(),
            Health::Gone(why) => self.give_up(why),
        }
        self.link.is_some()
    }

    /// Asks the PF for what the filter lets in, then drops what else comes.
    pub(crate) fn set_filter(&mut self, filter: Filter) -> Outcome<()> {
        let function = self.function.as_mut().ok_or_else(gone)?;
        let active = filter.is_active().then(|| Box::new(filter.clone()));
        function.set_filter(Some(filter))?;
        self.each_rx(|rx| rx.source.filter.clone_from(&active));
        Ok(())
    }

    pub(crate) fn set_vlan_strip(&mut self, on: bool) {
        let Some(function) = &mut self.function else { return };
        let Some(running) = &mut self.running else { return };
        for pair in &mut running.pairs {
            let was_open = pair.rx.is_open();
            if let Some(ring) = pair.rx.close().ring() {
                function.set_vlan_strip(ring, on);
            }
            if was_open {
                pair.open_rx();
            }
        }
        let kept = running.config.extras & !(RX_VLAN_STRIP as u8);
        running.config.extras = kept | if on { RX_VLAN_STRIP as u8 } else { 0 };
    }

    pub(crate) fn set_mtu(&mut self, mtu: u16) -> Outcome<()> {
        let function = self.function.as_mut().ok_or_else(gone)?;
        function.set_max_frame(frame_of(mtu))?;
        if let Some(running) = &mut self.running {
            running.config.mtu = mtu;
        }
        self.each_rx(|rx| rx.source.set_mtu(mtu, false));
        Ok(())
    }

    /// Key, table and fields of the spread, as they are or will be.
    pub(crate) fn rss(&self) -> Outcome<ixgbevf::Rss> {
        self.own_rss()?;
        let queues = self
            .running
            .as_ref()
            .map_or(1, |running| running.config.rx_pairs.max(1));
        Ok(self.rss.unwrap_or_else(|| ixgbevf::Rss::spread(queues as u8)))
    }

    /// Sets them.
    pub(crate) fn set_rss(&mut self, rss: &ixgbevf::Rss) -> Outcome<()> {
        self.own_rss()?;
        if let (Some(function), Some(running)) = (&mut self.function, &mut self.running) {
            let queues = running.config.rx_pairs.max(1) as u8;
            if queues > 1 {
                function.set_rss(rss, queues)?;
            }
            running.config.hash = rss.fields.bits();
        }
        self.rss = Some(*rss);
        Ok(())
    }

    fn own_rss(&self) -> Outcome<()> {
        match &self.function {
            Some(function) if function.model().has_own_rss() => Ok(()),
            Some(function) => Err(Fault::new(
                Errno::OPNOTSUPP,
                format!(
                    "{}: key and table of an {} are its PF's",
                    function.name(),
                    function.model()
                ),
            )),
            None => Err(gone()),
        }
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
