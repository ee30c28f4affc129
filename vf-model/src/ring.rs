//! What receive and transmit rings have in common: base, length, head, tail, and the bit that makes them work.

use crate::complaint::{Complaint, Complaints};
use crate::dma::Windows;
use crate::register::rxdctl;

/// Bytes of a descriptor.
pub(crate) const DESCRIPTOR: u32 = 16;
/// Bytes of the longest ring.
const LONGEST: u32 = 8192 * DESCRIPTOR;
/// The same bit in RXDCTL and TXDCTL.
const ENABLE: u32 = rxdctl::ENABLE;

/// Why a queue does not go on although it is enabled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Halt {
    /// An access outside of what is mapped. Until the queue is disabled and enabled again.
    Dma,
    /// Ring, index or descriptor that the datasheet forbids. Until the queue is disabled and enabled again.
    Malformed,
    /// Malicious-driver detection. Until the VF is reset.
    Malicious,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Ring {
    pub base: u64,
    pub length: u32,
    pub head: u32,
    pub tail: u32,
    /// RXDCTL or TXDCTL as written.
    pub control: u32,
    /// Reads until a change of ENABLE shows, and takes effect.
    delay: u32,
    enabled: bool,
    pub halted: Option<Halt>,
}

impl Ring {
    pub fn count(&self) -> u32 {
        self.length / DESCRIPTOR
    }

    pub fn address(&self, index: u32) -> u64 {
        self.base.wrapping_add(u64::from(index * DESCRIPTOR))
    }

    pub fn next(&self, index: u32) -> u32 {
        if index + 1 >= self.count() { 0 } else { index + 1 }
    }

    /// Descriptors between head and tail: those that belong to the device.
    pub fn available(&self) -> u32 {
        if self.head >= self.count() || self.tail >= self.count() {
            0
        } else if self.tail >= self.head {
            self.tail - self.head
        } else {
            self.count() - self.head + self.tail
        }
    }

    /// The queue is enabled, and shows it.
    pub fn works(&self) -> bool {
        self.enabled && self.delay == 0
    }

    /// The queue can go on: it works, nothing has stopped it, and its indices are inside of the ring.
    pub fn can_run(&mut self, complaints: &mut Complaints) -> bool {
        if !self.works() || self.halted.is_some() {
            return false;
        }
        if self.head >= self.count() || self.tail >= self.count() {
            complaints.add(Complaint::BadIndex);
            self.halted = Some(Halt::Malformed);
            return false;
        }
        true
    }

    pub fn read_control(&mut self) -> u32 {
        if self.delay > 0 {
            self.delay -= 1;
            self.control ^ ENABLE
        } else {
            self.control
        }
    }

    /// Time passes by one step.
    pub fn tick(&mut self) {
        self.delay = self.delay.saturating_sub(1);
    }

    pub fn write_control(&mut self, value: u32, latency: u32, allowed: bool, complaints: &mut Complaints) {
        let enable = value & ENABLE != 0;
        self.control = value;
        if enable == self.enabled {
            return;
        }
        if enable && !allowed {
            complaints.add(Complaint::ForeignQueue);
            self.control &= !ENABLE;
            return;
        }
        self.enabled = enable;
        self.delay = latency;
        if enable {
            if self.halted != Some(Halt::Malicious) {
                self.halted = None;
            }
            if self.length == 0 || self.length > LONGEST {
                complaints.add(Complaint::BadRing);
                self.halted.get_or_insert(Halt::Malformed);
            }
        }
    }

    /// Base, length or head is written.
    pub fn check_idle(&self, complaints: &mut Complaints) {
        if self.enabled {
            complaints.add(Complaint::RunningQueueChanged);
        }
    }

    pub fn write_tail(&mut self, value: u32, complaints: &mut Complaints) {
        self.tail = value & 0xffff;
        if !self.works() && self.tail != self.head {
            complaints.add(Complaint::TailOfStoppedQueue);
        }
    }

    /// A reset of the VF: the queue stops. Base, length, head and tail stay, as the next driver must not rely on them.
    pub fn reset_vf(&mut self) {
        self.control = 0;
        self.delay = 0;
        self.enabled = false;
        self.halted = None;
    }

    pub fn read_descriptor(&mut self, index: u32, dma: &mut Windows, purpose: &'static str) -> Option<[u64; 2]> {
        let read = dma.read_descriptor(self.address(index), purpose);
        self.or_halt(read)
    }

    pub fn or_halt<T, E>(&mut self, result: Result<T, E>) -> Option<T> {
        if result.is_err() {
            self.halted = Some(Halt::Dma);
        }
        result.ok()
    }
}
