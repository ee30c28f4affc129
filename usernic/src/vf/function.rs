//! The control of one function: what happens between its device file and the queues on its rings.

use std::os::fd::OwnedFd;
use std::ptr::NonNull;

use ixgbevf::{Cause, Event, Interrupts, Link, Model, RxQueue, Setup, Slot, Speed, Statistics, TxQueue, Vf, XcastMode};

use super::{Hardware, Mapped, Reach, Vfio};
use crate::error::Error;
use crate::filter::Filter;
use crate::spec::PortSpec;
use crate::vfio::{self, Device, Host, Options, find};

/// Why a device that works is let go of.
pub const WANTED_BACK: &str = "somebody wants the device back";

/// The vector of the mailbox, as its bit.
const MAILBOX: u32 = 1;

/// How a function waits, for so many microseconds at least.
pub type Pause = Box<dyn FnMut(u32) + Send>;

pub(super) struct Pace(Pause);

impl ixgbevf::Delay for Pace {
    fn delay_us(&mut self, us: u32) {
        (self.0)(us);
    }
}

/// A virtual function in the hands of one thread: its device, its mailbox, its interrupts, and the memory that it reaches.
///
/// Ports of kind `vf` stand on one. So does whoever brings memory and buffers along: [`lend`](Function::lend) lets the device
/// reach memory, and queues (`ixgbevf`'s) are made on [`registers`](Function::registers).
///
/// Dropping it stops all queues, takes all memory and all interrupts from the device, and resets it.
pub struct Function {
    pub(super) vf: Vf<Reach, Pace>,
    pub(super) mode: XcastMode,
    pub(super) filter: Option<Filter>,
    /// VLANs of the spec, which are received whatever a filter says.
    pub(super) vlans: Vec<u16>,
    name: String,
    vectors: Vec<OwnedFd>,
    removal: Option<OwnedFd>,
    /// The administrator lets the function have the link.
    enabled: bool,
    /// It was set up once: what was granted then need not be again.
    started: bool,
    moderation: u16,
    // Behind what uses it: the device before the memory.
    hardware: Box<dyn Hardware>,
    lent: Vec<Lent>,
}

/// A piece of memory that the device reaches at its own address.
struct Lent {
    start: u64,
    len: u64,
    _mapped: Mapped,
}

/// What became of a function since it was looked after last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// It runs.
    Well,
    /// Its PF was reset: nothing runs until [`Function::reset`] and all that follows it.
    Reset,
    /// It answers no more, or somebody wants it back: drop it.
    Gone(&'static str),
}

/// Of [`Function::look`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    /// Whatever it was, all goes on.
    Fine,
    Reset,
}

impl Function {
    /// Opens the device that the spec names, or that this process was given.
    ///
    /// # Errors
    /// Those of [`Port::open`](crate::Port::open) that concern the device.
    pub fn open(spec: &PortSpec) -> Result<Self, Error> {
        let hardware = hardware(spec)?;
        let pause = hardware.pause();
        Self::on(hardware, pause, spec)
    }

    /// Takes over an open device, and turns its interrupts on: the mailbox's, and up to two for queues.
    ///
    /// # Errors
    /// [`Error::Spec`], [`Error::Vf`], [`Error::Vfio`].
    pub fn on(hardware: Box<dyn Hardware>, pause: Pause, spec: &PortSpec) -> Result<Self, Error> {
        spec.check()?;
        spec.check_vf()?;
        let name = hardware.name();
        let (vendor, device) = hardware.ids()?;
        let model = Model::identify(vendor, device).map_err(|source| Error::Vf {
            device: name.clone(),
            tried: "look at the device",
            source,
        })?;
        let registers = hardware.registers()?;
        // The mailbox has one of its own, and the queues share what is left.
        let vectors = hardware.enable_vectors(1 + usize::from(spec.queues.min(2)))?;
        let removal = hardware.notice_of_removal()?;
        Ok(Function {
            vf: Vf::new(registers, Pace(pause), model, crate::random_u64()),
            mode: XcastMode::Multicast,
            filter: None,
            vlans: spec.vlans.clone(),
            name,
            vectors,
            removal,
            enabled: true,
            started: false,
            moderation: spec.moderation,
            hardware,
            lent: Vec::new(),
        })
    }

    pub(crate) fn failed(&self, tried: &'static str) -> impl FnOnce(ixgbevf::Error) -> Error + use<> {
        let device = self.name.clone();
        move |source| Error::Vf { device, tried, source }
    }

    /// What people call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Which kind of function it is.
    pub fn model(&self) -> Model {
        self.vf.model()
    }

    /// Its registers, for queues.
    pub fn registers(&self) -> &Reach {
        self.vf.registers()
    }

    /// Its address: known after [`reset`](Function::reset).
    pub fn mac(&self) -> [u8; 6] {
        self.vf.mac()
    }

    /// Queues that its PF gives: known after [`reset`](Function::reset).
    pub fn limits(&self) -> ixgbevf::Limits {
        self.vf.limits()
    }

    /// What is readable when there is something to look after: the mailbox's vector, and the notice that somebody wants the
    /// device back.
    pub fn events(&self) -> impl Iterator<Item = &OwnedFd> {
        self.removal.iter().chain(self.vectors.first())
    }

    /// What is readable when a receive queue raised its vector.
    pub fn event_of(&self, queue: u8) -> Option<&OwnedFd> {
        self.vectors.get(usize::from(self.vector_of(queue)))
    }

    /// The vector that a receive queue raises.
    pub fn vector_of(&self, queue: u8) -> u8 {
        match self.vectors.len() {
            0 | 1 => 0,
            n => 1 + queue % (n - 1) as u8,
        }
    }

    /// Lets the device reach memory, and its registers be reached; or no more reach memory.
    ///
    /// # Errors
    /// [`Error::Vfio`].
    pub fn set_bus_master(&self, on: bool) -> Result<(), Error> {
        Ok(self.hardware.set_bus_master(on)?)
    }

    /// Lets the device reach `len` bytes from `addr` on, at an address of its own choice, until what is returned is dropped.
    ///
    /// # Errors
    /// [`Error::Vfio`].
    ///
    /// # Safety
    /// As for [`Hardware::map`].
    pub unsafe fn map(&self, addr: NonNull<u8>, len: usize) -> Result<Mapped, Error> {
        // SAFETY: by the caller.
        Ok(unsafe { self.hardware.map(addr, len) }?)
    }

    /// Lets the device reach these pieces of memory (address and bytes) and no others, at the addresses that they have here.
    /// A piece that it reaches already stays as it is; whatever else it reached, it reaches no more. After an error it
    /// reaches the pieces of before that are among these, and perhaps some of the new ones.
    ///
    /// # Errors
    /// [`Error::Region`] for a piece whose address the IOMMU does not take; [`Error::Vfio`].
    ///
    /// # Safety
    /// As for [`Hardware::map`], until the function is dropped or a later call leaves the piece out.
    pub unsafe fn lend(&mut self, pieces: &[(u64, u64)]) -> Result<(), Error> {
        let wanted: std::collections::HashSet<(u64, u64)> = pieces.iter().copied().collect();
        // First: a new piece may be where an old one was.
        self.lent.retain(|lent| wanted.contains(&(lent.start, lent.len)));
        let there: std::collections::HashSet<u64> = self.lent.iter().map(|lent| lent.start).collect();
        for (index, &(start, len)) in pieces.iter().enumerate() {
            if there.contains(&start) {
                continue;
            }
            let refuse = |why: String| Error::Region { index, why };
            let lower = |why: &dyn std::fmt::Display| {
                refuse(format!(
                    "{}: {len} bytes at {start:#x}: {why}: map them lower (DPDK: --base-virtaddr=0x100000000)",
                    self.name
                ))
            };
            let Some(addr) = NonNull::new(start as *mut u8) else {
                return Err(refuse("it begins at address 0".into()));
            };
            // SAFETY: by the caller.
            let mapped = match unsafe { self.hardware.map_in_place(addr, len as usize) } {
                Err(vfio::Error::Attach(
                    error @ (iova::vfio::Error::Unreachable { .. } | iova::vfio::Error::ReservedRegion { .. }),
                )) => return Err(lower(&error)),
                mapped => mapped?,
            };
            if mapped.address != start {
                let error = format!("the device finds it at {:#x}, without an IOMMU", mapped.address);
                return Err(refuse(format!("{}: {error}: lent memory needs one", self.name)));
            }
            self.lent.push(Lent {
                start,
                len,
                _mapped: mapped,
            });
        }
        Ok(())
    }

    /// Resets the function, and asks for what its spec says. The first thing to do, with the bus master on.
    ///
    /// # Errors
    /// [`Error::Vf`].
    pub fn begin(&mut self, spec: &PortSpec) -> Result<(), Error> {
        self.reset()?;
        if let Some(mac) = spec.mac {
            let failed = self.failed("set its address");
            self.vf.set_mac(mac).map_err(failed)?;
        }
        for id in self.vlans.clone() {
            let failed = self.failed("receive a VLAN");
            self.vf.set_vlan(id, true).map_err(failed)?;
        }
        Ok(())
    }

    /// Resets the function: no ring is the device's afterwards.
    ///
    /// # Errors
    /// [`Error::Vf`].
    pub fn reset(&mut self) -> Result<(), Error> {
        let failed = self.failed("reset it");
        self.vf.reset().map_err(failed)
    }

    /// Sets a function up that was just reset, its interrupts included. Queues are started next.
    ///
    /// # Errors
    /// [`Error::Vf`].
    pub fn set_up(&mut self, setup: &Setup) -> Result<(), Error> {
        match self.vf.configure(setup) {
            Err(ixgbevf::Error::Refused(request)) if self.started => {
                tracing::warn!("{}: {request} is not granted any more", self.name);
            }
            other => other.map_err(self.failed("set it up"))?,
        }
        let failed = self.failed("set its interrupts up");
        self.route(setup.rx_queues).map_err(failed)?;
        // A PF from before there was the question does not refuse.
        self.enabled = self.vf.is_link_enabled().unwrap_or(true);
        self.started = true;
        Ok(())
    }

    fn route(&self, queues: u8) -> Result<(), ixgbevf::Error> {
        let interrupts = Interrupts::new(self.registers());
        interrupts.route(Cause::Mailbox, Some(0))?;
        let mut used = MAILBOX;
        for queue in 0..queues {
            let vector = self.vector_of(queue);
            interrupts.route(Cause::Rx(queue), Some(vector))?;
            interrupts.route(Cause::Tx(queue), None)?;
            interrupts.moderate(vector, self.moderation.into())?;
            used |= 1 << vector;
        }
        interrupts.auto_mask(used);
        Ok(())
    }

    /// Starts a pair of queues.
    ///
    /// # Errors
    /// [`Error::Vf`].
    pub fn start<S: AsMut<[Slot]>>(
        &mut self,
        rx: Option<&mut RxQueue<Reach, S>>,
        tx: Option<&mut TxQueue<Reach, S>>,
    ) -> Result<(), Error> {
        let failed = self.failed("start its queues");
        let vf = &mut self.vf;
        let started = tx
            .map_or(Ok(()), |tx| vf.start_tx(tx))
            .and_then(|()| rx.map_or(Ok(()), |rx| vf.start_rx(rx)));
        started.map_err(failed)
    }

    /// Stops all queues at once, for good: only [`reset`](Function::reset) starts anything again.
    pub fn stop(&mut self) {
        self.vf.stop();
    }

    /// Has the mailbox raise its vector, which masked itself when it did so last.
    pub fn unmask_mailbox(&self) {
        Interrupts::new(self.registers()).enable(MAILBOX);
    }

    /// Attends to the mailbox and to whoever wants the device back. To be called when one of [`events`](Function::events) is
    /// readable, and a few times a second.
    pub fn service(&mut self) -> Health {
        if self.is_wanted_back() {
            return Health::Gone(WANTED_BACK);
        }
        match self.look() {
            Ok(Told::Fine) => Health::Well,
            Ok(Told::Reset) => {
                tracing::warn!("{}: its PF was reset", self.name);
                Health::Reset
            }
            Err(ixgbevf::Error::Gone) => Health::Gone("it answers no more"),
            Err(error) => {
                tracing::debug!("{}: {error}", self.name);
                Health::Well
            }
        }
    }

    /// Whether somebody wants the device back, and waits for that: told once.
    pub fn is_wanted_back(&self) -> bool {
        let mut count = [0u8; 8];
        let told = |fd: &OwnedFd| rustix::io::read(fd, &mut count).is_ok();
        self.removal.as_ref().is_some_and(told)
    }

    fn look(&mut self) -> Result<Told, ixgbevf::Error> {
        match self.vf.service()? {
            Event::PfReset => return Ok(Told::Reset),
            Event::Ping => self.enabled = self.vf.is_link_enabled().unwrap_or(true),
            _ => {}
        }
        Ok(Told::Fine)
    }

    /// Whether it was reset and its PF not since, as far as is known.
    pub fn is_known(&self) -> bool {
        self.vf.is_known()
    }

    /// The link's speed; `None`: it is down, or the function may not have it.
    pub fn link(&mut self) -> Option<Speed> {
        match self.vf.settled_link() {
            Link::Up(speed) if self.enabled => Some(speed),
            _ => None,
        }
    }

    /// Takes another address.
    ///
    /// # Errors
    /// [`Error::Vf`].
    pub fn set_mac(&mut self, mac: [u8; 6]) -> Result<(), Error> {
        let failed = self.failed("set its address");
        self.vf.set_mac(mac).map_err(failed)
    }

    /// Takes frames of so many bytes, their CRC included.
    ///
    /// # Errors
    /// [`Error::Vf`].
    pub fn set_max_frame(&mut self, len: u16) -> Result<(), Error> {
        let failed = self.failed("set its MTU");
        self.vf.set_max_frame(len).map_err(failed)
    }

    /// Has the device take tags out of what a queue receives, or leave them in, also while it runs.
    pub fn set_vlan_strip<S: AsMut<[Slot]>>(&mut self, rx: &mut RxQueue<Reach, S>, on: bool) {
        self.vf.set_vlan_strip(rx, on);
    }

    /// Key, table and fields of receive side scaling.
    ///
    /// # Errors
    /// [`Error::Vf`]: on an 82599 and an X540 they are the PF's.
    pub fn set_rss(&mut self, rss: &ixgbevf::Rss, queues: u8) -> Result<(), Error> {
        let failed = self.failed("set its RSS");
        self.vf.set_rss(rss, queues).map_err(failed)
    }

    /// What the device counted: to be asked every four minutes at least.
    pub fn statistics(&mut self) -> Statistics {
        self.vf.statistics()
    }

    /// What the PF did wrong.
    pub fn anomalies(&self) -> ixgbevf::Anomalies {
        self.vf.anomalies()
    }
}

impl Drop for Function {
    fn drop(&mut self) {
        // What runs is stopped here; the device goes next, and then what it reached.
        self.vf.stop();
    }
}

/// The device that a spec names, or that this process was given.
pub(crate) fn hardware(spec: &PortSpec) -> Result<Box<dyn Hardware>, Error> {
    let host = Host::default();
    let variables = std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)));
    let address = match spec.pci {
        Some(address) => address,
        None => find(&host, variables)?,
    };
    let options = Options {
        interface: spec.interface,
        noiommu: spec.noiommu,
        ..Options::default()
    };
    Ok(Box::new(Vfio::new(Device::open_on(&host, address, &options)?)))
}
