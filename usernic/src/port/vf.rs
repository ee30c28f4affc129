//! Ports on a virtual function of a network card.
//!
//! Rings and buffers are one segment, and one mapping of the IOMMU. The control thread sleeps on the vector of the mailbox:
//! it looks at the link, does what the application wishes, and brings the function up anew after the PF was reset.

mod plan;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hugemem::Segment;
use hugemem::guard::Registration;
use ixgbevf::{Memory, RxOptions, Setup, Speed, ring_len};
use rustix::event::epoll;

use self::plan::Plan;
use super::wish::{VfWish, Wish};
use super::{Inner, Port, watch};
use crate::error::{Error, Tried};
use crate::filter::Filter;
use crate::gate::{self, ControlSide};
use crate::memory::{MemorySource, Request};
use crate::packet::Marks;
use crate::pool::{self, Cache, Pool};
use crate::queue::{Parts, Side, VfPair};
use crate::spec::PortSpec;
use crate::stats::DeviceStats;
use crate::vf::{Function, Hardware, Health, Mapped, WANTED_BACK, frame_of};

/// First and longest wait before a function whose PF was reset is tried again.
const RETRY: [Duration; 2] = [Duration::from_millis(20), Duration::from_secs(1)];

/// Between two looks at link, counters and memory. Counters may not be left alone for more than 288 s.
const LOOK: Duration = Duration::from_secs(1);

/// What the control thread owns. Closing it goes from the device to the memory, so the fields are in no particular order.
struct Control {
    inner: Arc<Inner>,
    /// Watches the segment, in case others can truncate its file.
    guard: Option<Registration>,
    pairs: Vec<ControlSide<VfPair>>,
    /// None once the device is gone.
    function: Option<Function>,
    mapped: Option<Mapped>,
    /// Readable when there is something to look after in the function.
    events: OwnedFd,
    pool: Arc<Pool>,
    /// Keeps the rings mapped until the device is closed.
    _segment: Arc<Segment>,
    mtu: u16,
    /// The rings run.
    running: bool,
}

/// Bytes of the memory that a port of this spec asks for.
pub(super) fn segment_len(spec: &PortSpec) -> Result<usize, Error> {
    Ok(Plan::new(spec)?.len)
}

pub(super) fn open(spec: PortSpec, memory: &mut dyn MemorySource) -> Result<Port, Error> {
    let hardware = crate::vf::hardware(&spec)?;
    open_on(spec, hardware, memory)
}

pub(super) fn open_on(
    spec: PortSpec,
    hardware: Box<dyn Hardware>,
    memory: &mut dyn MemorySource,
) -> Result<Port, Error> {
    spec.check()?;
    spec.check_vf()?;
    let plan = Plan::new(&spec)?;
    let request = Request {
        len: plan.len,
        name: "usernic-vf",
        numa: spec.numa,
    };
    let allocation = crate::memory::allocate(memory, &request)?;
    let description = allocation.choice.to_string();
    let segment = Arc::new(allocation.segment);
    let (mtu, queues, room) = (spec.mtu, spec.queues, spec.buffer_size);
    let inner = Arc::new(Inner::new(spec, queues)?);
    let events = epoll::create(epoll::CreateFlags::CLOEXEC).tried("epoll_create1(2)")?;
    let pause = {
        // Short waits are left out once the port is to be closed, so that a PF that does not answer does not hold that up.
        let inner = Arc::clone(&inner);
        let mut pause = hardware.pause();
        Box::new(move |us| {
            if us >= 1000 || !inner.stopped() {
                pause(us);
            }
        })
    };
    let function = Function::on(hardware, pause, &inner.spec)?;
    // SAFETY: `Control`, from here on, drops this before its Arc of the segment. Only rings and packet bytes are in there,
    // which are reached by volatile accesses, by copy, or by who owns them.
    let mapped = unsafe { function.map(segment.base(), segment.len()) }?;
    let bias = mapped.address.wrapping_sub(segment.base().as_ptr() as u64);
    let buffers = plan.buffers(segment.len());
    let pool = Pool::new(Arc::clone(&segment), plan.buffers_at, buffers, room, bias, false);
    // SAFETY: the registration goes with `Control`, before the Arc of the segment that is in there too.
    let made = pool.and_then(|pool| Ok((pool, Some(unsafe { segment.guard() }?))));
    let (pool, guard) = match made {
        Ok(made) => made,
        Err(error) => {
            // The device before the memory.
            drop(function);
            drop(mapped);
            return Err(error.into());
        }
    };
    let memory_bytes = segment.len();
    let mut control = Control {
        inner: Arc::clone(&inner),
        guard,
        pairs: Vec::new(),
        function: Some(function),
        mapped: Some(mapped),
        events,
        pool,
        _segment: Arc::clone(&segment),
        mtu,
        running: false,
    };
    control.prepare(&segment, bias)?;
    control.first_time()?;
    let control = super::spawn(move || control.run())?;
    Ok(Port {
        inner,
        control: Some(control),
        memory: description,
        memory_bytes,
    })
}

impl Control {
    fn name(&self) -> &str {
        self.function.as_ref().map_or("", Function::name)
    }

    fn function(&mut self) -> Result<&mut Function, Error> {
        self.function.as_mut().ok_or(Error::NotGranted {
            why: "the device is gone",
        })
    }

    /// Makes the queue pairs, which do not run yet.
    fn prepare(&mut self, segment: &Arc<Segment>, bias: u64) -> Result<(), Error> {
        let Some(function) = &self.function else { return Ok(()) };
        let queues = self.inner.spec.queues;
        for fd in function.events() {
            watch(&self.events, fd)?;
        }
        let spec = &self.inner.spec;
        let takes = Marks::device(spec.csum != Some(false), spec.tso);
        for index in 0..queues {
            let memory = |which: usize| {
                let at = (2 * usize::from(index) + which) * ring_len(spec.queue_size);
                // SAFETY: the plan has room for all rings at the segment's beginning.
                let ptr = unsafe { segment.base().add(at) };
                Memory {
                    ptr,
                    addr: (ptr.as_ptr() as u64).wrapping_add(bias),
                }
            };
            let options = RxOptions {
                buffer_len: spec.buffer_size,
                vlan_strip: spec.vlan_strip,
            };
            let number = index as u8;
            // SAFETY: the rings are inside the segment, which stays mapped while the pair lives (it holds an Arc), and are
            // nobody else's: each queue has its own. The device finds them at the same bytes.
            let rings = unsafe { function.rings(number, [memory(0), memory(1)], [spec.queue_size; 2], options) }?;
            let mut pair = VfPair::new(rings, Arc::clone(segment), takes);
            pair.set_mtu(spec.mtu);
            let (data, gate) = gate::pair_with_waker(pair, self.inner.waker_of(index.into()));
            let epoll = self.inner.epoll_of(index.into())?;
            if let Some(event) = function.event_of(number) {
                watch(&epoll, event)?;
            }
            self.pairs.push(gate);
            self.inner.put_on_shelf(Parts {
                index,
                side: Side::Vf(data),
                cache: Cache::new(Arc::clone(&self.pool)),
                counters: Arc::clone(&self.inner.counters[usize::from(index)]),
                epoll: Arc::new(epoll),
            });
        }
        Ok(())
    }

    /// Resets the function, asks for what the spec says, and starts.
    fn first_time(&mut self) -> Result<(), Error> {
        let inner = Arc::clone(&self.inner);
        let function = self.function()?;
        // Its registers can be reached only then; a device that was just opened knows of no memory.
        function.set_bus_master(true)?;
        function.begin(&inner.spec)?;
        self.start()
    }

    /// Brings a function up that was just reset: no ring is the device's now.
    fn start(&mut self) -> Result<(), Error> {
        for gate in &mut self.pairs {
            gate.close().detach();
        }
        // What the old rings held is for the application's threads, not for this one to keep.
        pool::flush_this_thread();
        let setup = Setup {
            max_frame: frame_of(self.mtu),
            rx_queues: self.pairs.len() as u8,
            rss: None,
        };
        self.function()?.set_up(&setup)?;
        self.start_queues()?;
        let mac = self.function()?.mac();
        self.inner.set_mac(mac);
        self.running = true;
        self.look_at_link();
        for gate in &mut self.pairs {
            gate.open();
        }
        Ok(())
    }

    fn start_queues(&mut self) -> Result<(), Error> {
        let Some(function) = &mut self.function else {
            return Ok(());
        };
        for (index, gate) in self.pairs.iter_mut().enumerate() {
            let pair = gate.close();
            let mut cache = Cache::new(Arc::clone(&self.pool));
            pair.fill(&mut cache, &self.inner.counters[index]);
            let Some(rings) = pair.rings() else { continue };
            function.start(Some(&mut rings.rx), Some(&mut rings.tx))?;
            pair.set_running(true);
        }
        Ok(())
    }

    /// Tells the link's state, if it is another.
    fn look_at_link(&mut self) {
        let Some(function) = &mut self.function else { return };
        let speed = function.link();
        let before = self.inner.link();
        let told = speed.map_or(0, Speed::mbps);
        if before.up == speed.is_some() && (told == 0 || before.speed == told || self.inner.spec.speed != 0) {
            return;
        }
        self.inner.set_speed(told);
        for gate in &mut self.pairs {
            gate.change(|pair| pair.set_up(speed.is_some()));
        }
        let queues = if speed.is_some() { self.pairs.len() as u16 } else { 0 };
        self.inner.set_link(queues, 0);
        let name = self.name();
        match speed {
            Some(speed) => tracing::info!("{name}: link up, {speed}"),
            None => tracing::warn!("{name}: link down"),
        }
    }

    /// The device's queues do not run any more: nothing is posted. What has come can still be received.
    fn take_down(&mut self) {
        self.running = false;
        for gate in &mut self.pairs {
            gate.change(|pair| pair.set_running(false));
        }
        self.inner.set_speed(0);
        self.inner.set_link(0, 0);
    }

    /// The device is gone, or wanted back: it is let go of at once, since others wait for that.
    fn give_up(&mut self, why: &str) {
        tracing::error!("{}: {why}: the port is dead", self.name());
        self.close();
        // Queues report from now on that there is no port behind them.
        self.pairs.clear();
        self.inner.wait_for_stop();
    }

    fn count(&mut self) {
        let Some(function) = &mut self.function else { return };
        let (counted, anomalies) = (function.statistics(), function.anomalies());
        *super::lock(&self.inner.device) = DeviceStats {
            rx_packets: counted.rx_packets,
            rx_bytes: counted.rx_bytes,
            rx_multicast: counted.rx_multicast,
            tx_packets: counted.tx_packets,
            tx_bytes: counted.tx_bytes,
            anomalies: anomalies.stray_message + anomalies.answer,
        };
    }

    fn run(mut self) {
        let mut retry = RETRY[0];
        let mut next_try = Instant::now();
        let mut next_look = Instant::now() + LOOK;
        while !self.inner.stopped() {
            self.grant_wishes();
            if self.guard.as_ref().is_some_and(Registration::is_dead) {
                return self.give_up("the file of the port's memory was truncated");
            }
            if self.running
                && let Some(function) = &self.function
            {
                function.unmask_mailbox();
            }
            let deadline = if self.running { next_look } else { next_try };
            let events = self.events.as_fd();
            self.inner.sleep(Some(events), Some(deadline));
            if self.inner.stopped() {
                break;
            }
            let _ = drain(&self.events);
            if self.function.as_ref().is_some_and(Function::is_wanted_back) {
                return self.give_up(WANTED_BACK);
            }
            if !self.running {
                if Instant::now() < next_try {
                    continue;
                }
                match self.function().and_then(Function::reset).and_then(|()| self.start()) {
                    Ok(()) => {
                        tracing::info!("{}: brought up after a reset of its PF", self.name());
                        retry = RETRY[0];
                    }
                    Err(Error::Vf {
                        source: ixgbevf::Error::Gone,
                        ..
                    }) => return self.give_up("it answers no more"),
                    Err(error) => {
                        tracing::debug!("not yet: {error}");
                        retry = (retry * 2).min(RETRY[1]);
                    }
                }
                next_try = Instant::now() + retry;
                next_look = Instant::now() + LOOK;
                continue;
            }
            match self.function.as_mut().map(Function::service) {
                Some(Health::Gone(why)) => return self.give_up(why),
                Some(Health::Reset) => {
                    self.take_down();
                    next_try = Instant::now();
                    continue;
                }
                _ => {}
            }
            if Instant::now() >= next_look {
                next_look = Instant::now() + LOOK;
                self.count();
            }
            self.look_at_link();
        }
        self.inner.wishes.close();
    }

    fn grant_wishes(&mut self) {
        while let Some((wish, answer)) = self.inner.wishes.next() {
            let granted = self.grant(wish);
            if self.running && self.function.as_ref().is_some_and(|function| !function.is_known()) {
                tracing::warn!("{}: its PF was reset", self.name());
                self.take_down();
            }
            let _ = answer.send(granted);
        }
    }

    fn grant(&mut self, wish: Wish) -> Result<(), Error> {
        match wish {
            Wish::Filter(filter) => self.set_filter(filter.map(|f| *f)),
            Wish::Vf(VfWish::Mac(mac)) => {
                self.function()?.set_mac(mac)?;
                self.inner.set_mac(mac);
                Ok(())
            }
            Wish::Vf(VfWish::Mtu(mtu)) => {
                self.function()?.set_max_frame(frame_of(mtu))?;
                self.mtu = mtu;
                self.inner.set_mtu(mtu);
                for gate in &mut self.pairs {
                    gate.change(|pair| pair.set_mtu(mtu));
                }
                Ok(())
            }
            Wish::Vf(VfWish::Count) => {
                self.count();
                Ok(())
            }
            Wish::Link(_) => Err(Error::NotGranted {
                why: "the link of a virtual function is its PF's",
            }),
            Wish::Queues(_) => Err(Error::NotGranted {
                why: "the queues of a virtual function are set up when it starts",
            }),
            Wish::Announce => Err(Error::NotGranted {
                why: "a network card learns addresses from what is sent: send something",
            }),
        }
    }

    /// Asks the PF for what the filter lets in, then drops what else comes.
    fn set_filter(&mut self, filter: Option<Filter>) -> Result<(), Error> {
        let active = filter.clone().filter(Filter::is_active).map(Box::new);
        let function = self.function()?;
        function.set_filter(filter)?;
        let mac = function.mac();
        self.inner.set_mac(mac);
        for gate in &mut self.pairs {
            gate.change(|pair| pair.set_filter(active.clone()));
        }
        Ok(())
    }

    /// Lets go of the device and then of the memory.
    fn close(&mut self) {
        self.running = false;
        for gate in &mut self.pairs {
            gate.close();
        }
        // No more memory, no more interrupts, a function-level reset.
        self.function = None;
        for gate in &mut self.pairs {
            gate.close().close();
        }
        pool::flush_this_thread();
        self.mapped = None;
        self.inner.set_link(0, 0);
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.close();
    }
}

/// Takes the events of an epoll instance whose members are edge-triggered.
fn drain(events: &OwnedFd) -> rustix::io::Result<()> {
    let mut taken = [std::mem::MaybeUninit::<epoll::Event>::uninit(); 4];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    epoll::wait(events, &mut taken, Some(&now)).map(drop)
}
