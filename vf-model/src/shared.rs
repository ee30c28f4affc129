//! A device that several hands hold: the driver under test, the test, a server's threads.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::nic::{Nic, Settings};

/// Registers of a VF, as a driver sees them.
pub trait Registers {
    /// Reads 32 bits at a byte offset of BAR 0.
    fn read32(&self, offset: u32) -> u32;
    /// Writes 32 bits at a byte offset of BAR 0.
    fn write32(&self, offset: u32, value: u32);
}

/// A device, shared.
#[derive(Clone)]
pub struct Shared(Arc<Mutex<Guarded>>);

struct Guarded {
    nic: Nic,
    /// An access outside of what is mapped that nobody has asked about is a panic in the end.
    strict: bool,
}

impl Shared {
    /// A new device. When its last holder goes and there are refused accesses that nobody took
    /// ([`crate::dma::Windows::take_faults`]), the thread panics, so that the test fails.
    ///
    /// # Panics
    /// As [`Nic::new`].
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self(Arc::new(Mutex::new(Guarded {
            nic: Nic::new(settings),
            strict: true,
        })))
    }

    /// The same for drivers that may do what they like: nobody panics.
    ///
    /// # Panics
    /// As [`Nic::new`].
    #[must_use]
    pub fn tolerant(settings: Settings) -> Self {
        let shared = Self::new(settings);
        shared.guard().strict = false;
        shared
    }

    fn guard(&self) -> MutexGuard<'_, Guarded> {
        // A test that has panicked must still be able to look.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something with the device.
    pub fn with<T>(&self, act: impl FnOnce(&mut Nic) -> T) -> T {
        act(&mut self.guard().nic)
    }

    /// One round of packets and messages.
    pub fn step(&self) -> bool {
        self.with(Nic::step)
    }

    /// The registers of one VF.
    ///
    /// # Panics
    /// There is no such VF.
    #[must_use]
    pub fn vf(&self, index: usize) -> VfHandle {
        assert!(index < self.with(|nic| nic.vf_count()), "there is no VF {index}");
        VfHandle {
            shared: self.clone(),
            index,
        }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        if !self.strict || std::thread::panicking() {
            return;
        }
        for vf in 0..self.nic.vf_count() {
            let windows = self.nic.dma(vf);
            let count = windows.fault_count();
            if count > 0 {
                let first = windows.faults().first().map(ToString::to_string).unwrap_or_default();
                panic!("VF {vf}: {count} accesses were refused; the first: {first}");
            }
        }
    }
}

/// One VF of a shared device.
#[derive(Clone)]
pub struct VfHandle {
    shared: Shared,
    index: usize,
}

impl VfHandle {
    /// Which VF.
    #[must_use]
    pub fn index(&self) -> usize {
        self.index
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Shared {
        &self.shared
    }
}

impl Registers for VfHandle {
    fn read32(&self, offset: u32) -> u32 {
        self.shared.with(|nic| nic.read32(self.index, offset))
    }

    fn write32(&self, offset: u32, value: u32) {
        self.shared.with(|nic| nic.write32(self.index, offset, value));
    }
}
