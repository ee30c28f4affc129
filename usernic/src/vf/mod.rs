//! Virtual functions that ports drive: what a `vf` port needs of a device, and the devices behind VFIO that have it.
//!
//! A port reaches its function through [`Hardware`] alone. [`Vfio`] is the one that `Port::open` takes; a model of the
//! hardware is another, for tests ([`Port::open_vf`](crate::Port::open_vf)). On it stands [`Function`]: the control of a
//! function, for ports and for whoever brings memory and queues along.

mod filter;
mod function;
mod rings;

use std::any::Any;
use std::fmt;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

pub use ixgbevf::{BAR_LEN, Registers};

pub use function::WANTED_BACK;
pub(crate) use function::hardware;
pub use function::{Function, Health, Pause};
pub use rings::{Rings, Rx, Tx, anomalies};

use crate::vfio::{Access, Bar, Device, Error, Mapping, Placement};

/// The largest frame of an MTU, as a device counts it: Ethernet header and FCS come on top, a VLAN tag does not count.
pub const fn frame_of(mtu: u16) -> u16 {
    mtu.saturating_add(18)
}

/// A virtual function of an 82599, X540 or X550 that this process drives alone.
///
/// Dropping it takes all memory and all interrupts from the device and resets it.
pub trait Hardware: Send {
    /// What people call it: its PCI address.
    fn name(&self) -> String;

    /// PCI vendor and device.
    ///
    /// # Errors
    /// Configuration space does not answer.
    fn ids(&self) -> Result<(u16, u16), Error>;

    /// Its registers: BAR 0.
    ///
    /// # Errors
    /// They cannot be mapped.
    fn registers(&self) -> Result<Reach, Error>;

    /// Turns its first MSI-X vectors on, `most` at the most and one at least: an eventfd each.
    ///
    /// # Errors
    /// It has none, or they cannot be had.
    fn enable_vectors(&self, most: usize) -> Result<Vec<OwnedFd>, Error>;

    /// Becomes readable when somebody wants the device back; `None`: nobody would tell.
    ///
    /// # Errors
    /// Those of the system.
    fn notice_of_removal(&self) -> Result<Option<OwnedFd>, Error> {
        Ok(None)
    }

    /// Lets the device read and write `len` bytes of memory from `addr` on: one mapping.
    ///
    /// # Errors
    /// Nothing is mapped then.
    ///
    /// # Safety
    /// The bytes are mapped memory of this process until what this returns is dropped, and nothing that Rust takes for
    /// its own is in them.
    unsafe fn map(&self, addr: NonNull<u8>, len: usize) -> Result<Mapped, Error>;

    /// The same, at the address that the memory has here.
    ///
    /// # Errors
    /// As [`map`](Hardware::map), and [`Unreachable`](iova::vfio::Error::Unreachable) or
    /// [`ReservedRegion`](iova::vfio::Error::ReservedRegion) where the IOMMU does not take the address.
    ///
    /// # Safety
    /// As for [`map`](Hardware::map).
    unsafe fn map_in_place(&self, addr: NonNull<u8>, len: usize) -> Result<Mapped, Error>;

    /// Lets the device reach memory, and its registers be reached; or no more reach memory.
    ///
    /// # Errors
    /// Configuration space does not answer.
    fn set_bus_master(&self, on: bool) -> Result<(), Error>;

    /// How to wait for so many microseconds, at least.
    fn pause(&self) -> Box<dyn FnMut(u32) + Send> {
        Box::new(|us| std::thread::sleep(Duration::from_micros(us.into())))
    }
}

/// Memory that a device reaches. Dropping it ends that.
pub struct Mapped {
    /// Where the device finds the first byte.
    pub address: u64,
    /// Ends it when it is dropped.
    pub guard: Box<dyn Any + Send>,
}

impl fmt::Debug for Mapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapped")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

/// How registers are reached: mapped, or by way of something else. Clones reach the same ones.
#[derive(Clone)]
pub struct Reach(Way);

#[derive(Clone)]
enum Way {
    /// The second keeps it mapped.
    Bar(ixgbevf::Bar, #[allow(dead_code, reason = "held, not read")] Arc<Bar>),
    Other(Arc<dyn Registers + Send + Sync>),
}

impl Reach {
    /// Mapped registers. `None`: fewer bytes than BAR 0 of a virtual function has.
    pub fn bar(bar: Bar) -> Option<Self> {
        if bar.len() < BAR_LEN as usize {
            return None;
        }
        // SAFETY: a mapping of registers is aligned to a page, as long as was just checked, and held by the value.
        let registers = unsafe { ixgbevf::Bar::new(bar.as_ptr()) };
        Some(Reach(Way::Bar(registers, Arc::new(bar))))
    }

    /// Registers that are no memory of this process: a model's.
    pub fn other(registers: impl Registers + Send + Sync + 'static) -> Self {
        Reach(Way::Other(Arc::new(registers)))
    }
}

impl Registers for Reach {
    #[inline(always)]
    fn read(&self, offset: u32) -> u32 {
        match &self.0 {
            Way::Bar(bar, _) => bar.read(offset),
            Way::Other(other) => other.read(offset),
        }
    }

    #[inline(always)]
    fn write(&self, offset: u32, value: u32) {
        match &self.0 {
            Way::Bar(bar, _) => bar.write(offset, value),
            Way::Other(other) => other.write(offset, value),
        }
    }
}

impl fmt::Debug for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Way::Bar(..) => "Reach(mapped)",
            Way::Other(_) => "Reach(other)",
        })
    }
}

/// A function behind VFIO.
#[derive(Debug)]
pub struct Vfio(Device);

impl Vfio {
    /// Takes over an open device.
    pub fn new(device: Device) -> Self {
        Vfio(device)
    }

    /// # Safety
    /// As for [`Hardware::map`].
    unsafe fn place(&self, addr: NonNull<u8>, len: usize, placement: Placement) -> Result<Mapped, Error> {
        // SAFETY: the caller's promise.
        let mapping: Mapping = unsafe { self.0.space().map(addr, len, placement, Access::ReadWrite) }?;
        Ok(Mapped {
            address: mapping.iova().start(),
            guard: Box::new(mapping),
        })
    }
}

impl Hardware for Vfio {
    fn name(&self) -> String {
        self.0.name().to_owned()
    }

    fn ids(&self) -> Result<(u16, u16), Error> {
        self.0.config().ids()
    }

    fn registers(&self) -> Result<Reach, Error> {
        let bar = self.0.bar(0, BAR_LEN as usize)?;
        let size = bar.len() as u64;
        Reach::bar(bar).ok_or_else(|| Error::BarTooSmall {
            device: self.name(),
            bar: 0,
            size,
            needed: BAR_LEN as usize,
        })
    }

    fn enable_vectors(&self, most: usize) -> Result<Vec<OwnedFd>, Error> {
        let has = self.0.vectors()? as usize;
        self.0.enable_vectors(most.min(has.max(1)))
    }

    fn notice_of_removal(&self) -> Result<Option<OwnedFd>, Error> {
        self.0.notice_of_removal()
    }

    unsafe fn map(&self, addr: NonNull<u8>, len: usize) -> Result<Mapped, Error> {
        // SAFETY: the caller's promise.
        unsafe { self.place(addr, len, Placement::Auto) }
    }

    unsafe fn map_in_place(&self, addr: NonNull<u8>, len: usize) -> Result<Mapped, Error> {
        // SAFETY: the caller's promise.
        unsafe { self.place(addr, len, Placement::Identity) }
    }

    fn set_bus_master(&self, on: bool) -> Result<(), Error> {
        self.0.config().set_bus_master(on)
    }
}
