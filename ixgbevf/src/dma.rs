//! Descriptor memory, which the device reads and writes at any moment: every access to it, and every ordering that the
//! driver owes, is in this module.
//!
//! * A field is read or written as one volatile access of its width, little-endian. No reference to descriptor memory
//!   exists.
//! * A written-back descriptor is read status first; then comes [`Ring::acquire`], then the other fields. The device
//!   writes a descriptor back as a whole before DD can be seen, so that they belong to that status.
//! * Packet bytes lie in memory before DD does (PCIe's ordering of posted writes); the same fence keeps the caller from
//!   reading them too early.
//! * Descriptors are written; then comes [`Ring::release`], then the tail register. The device must not see the tail
//!   before the descriptors.
//!
//! In unit tests the accesses are recorded, so that a test can look at their order.

use core::ptr::NonNull;
use static_assertions::const_assert_eq;
use volatile::{VolatileFieldAccess, VolatilePtr};

/// A receive descriptor as the driver writes it (82599 datasheet §7.1.6.1).
#[repr(C, align(16))]
#[derive(Clone, Copy, VolatileFieldAccess)]
struct Offered {
    packet: u64,
    /// Where headers would go if they were split off: 0, which clears the DD that lies in bit 0 of it.
    header: u64,
}

/// A transmit descriptor as the driver writes it (§7.2.3.2.3, §7.2.3.2.4). DD is bit 0 of `high`.
///
/// ```text
///            data             context
/// address    buffer           VLAN, header lengths | seed (not used)
/// low        cmd_type_len     type_tucmd_mlhl
/// high       olinfo_status    mss_l4len_idx
/// ```
#[repr(C, align(16))]
#[derive(Clone, Copy, VolatileFieldAccess)]
struct Posted {
    address: u64,
    low: u32,
    high: u32,
}

/// A receive descriptor as the device writes it back (§7.1.6.2).
#[repr(C, align(16))]
#[derive(Clone, Copy, VolatileFieldAccess)]
struct WrittenBack {
    /// RSS type, packet type and header length below, RSS hash above.
    packet_hash: u64,
    status: u32,
    length_vlan: u32,
}

const_assert_eq!(size_of::<Offered>(), 16);
const_assert_eq!(core::mem::offset_of!(Offered, header), 8);
const_assert_eq!(size_of::<Posted>(), 16);
const_assert_eq!(core::mem::offset_of!(Posted, low), 8);
const_assert_eq!(core::mem::offset_of!(Posted, high), 12);
const_assert_eq!(size_of::<WrittenBack>(), 16);
const_assert_eq!(core::mem::offset_of!(WrittenBack, status), 8);
const_assert_eq!(core::mem::offset_of!(WrittenBack, length_vlan), 12);

/// Bytes of a descriptor.
pub const DESCRIPTOR_LEN: usize = 16;

/// Descriptor memory of one queue: [`ring_len`](crate::ring_len) bytes, aligned to 128.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Where it is here.
    pub ptr: NonNull<u8>,
    /// Where it is for the device.
    pub addr: u64,
}

// SAFETY: two addresses. Nothing can be done with them but through the `unsafe` constructors of the queues, whose
// contract covers use from whatever thread the queue is on.
unsafe impl Send for Memory {}
// SAFETY: as above; a shared reference gives out the addresses only.
unsafe impl Sync for Memory {}

/// What the device wrote about a piece of a frame, but its status.
#[derive(Clone, Copy)]
pub(crate) struct Rest {
    pub(crate) packet_hash: u64,
    pub(crate) length_vlan: u32,
}

/// The descriptors of one queue. Invariant, from the contract of [`Ring::new`]: `size` descriptors at `base` are valid
/// for reads and writes as long as the value or a copy of it is used.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ring {
    base: NonNull<u8>,
    #[cfg(debug_assertions)]
    size: usize,
}

// SAFETY: the queue that owns the ring is the only path of this process to it, and every access is volatile.
unsafe impl Send for Ring {}

impl Ring {
    /// # Safety
    /// `size` descriptors at `base` are valid for reads and writes, and in this process only this value and copies of it
    /// access them, as long as one of them is used. `base` is aligned to 128.
    pub(crate) unsafe fn new(base: NonNull<u8>, size: usize) -> Self {
        let _ = size;
        Self {
            base,
            #[cfg(debug_assertions)]
            size,
        }
    }

    /// # Safety
    /// `i` is below the ring's size.
    #[inline(always)]
    unsafe fn at<T>(&self, i: usize) -> VolatilePtr<'_, T> {
        #[cfg(debug_assertions)]
        assert!(i < self.size);
        // SAFETY: inside the ring by this function's contract, and aligned as the ring is; all descriptor types have 16
        // bytes. Volatile accesses to memory that only a device shares.
        unsafe { VolatilePtr::new(self.base.cast::<T>().add(i)) }
    }

    /// Writes receive descriptor `i`.
    ///
    /// # Safety
    /// `i` is below the ring's size.
    #[inline(always)]
    pub(crate) unsafe fn offer(&self, i: usize, address: u64) {
        trace(Step::Post(i));
        // SAFETY: passed on.
        let desc = unsafe { self.at::<Offered>(i) };
        desc.packet().write(address.to_le());
        desc.header().write(0);
    }

    /// Writes transmit descriptor `i`.
    ///
    /// # Safety
    /// `i` is below the ring's size.
    #[inline(always)]
    pub(crate) unsafe fn post(&self, i: usize, address: u64, low: u32, high: u32) {
        trace(Step::Post(i));
        // SAFETY: passed on.
        let desc = unsafe { self.at::<Posted>(i) };
        desc.address().write(address.to_le());
        desc.low().write(low.to_le());
        desc.high().write(high.to_le());
    }

    /// Writes the command of transmit descriptor `i` again.
    ///
    /// # Safety
    /// `i` is below the ring's size.
    #[inline(always)]
    pub(crate) unsafe fn amend(&self, i: usize, command: u32) {
        trace(Step::Post(i));
        // SAFETY: passed on.
        unsafe { self.at::<Posted>(i) }.low().write(command.to_le());
    }

    /// The status of receive descriptor `i`.
    ///
    /// # Safety
    /// `i` is below the ring's size.
    #[inline(always)]
    pub(crate) unsafe fn status(&self, i: usize) -> u32 {
        trace(Step::Status(i));
        // SAFETY: passed on.
        u32::from_le(unsafe { self.at::<WrittenBack>(i) }.status().read())
    }

    /// What else the device wrote into receive descriptor `i`; behind [`Ring::acquire`].
    ///
    /// # Safety
    /// `i` is below the ring's size.
    #[inline(always)]
    pub(crate) unsafe fn rest(&self, i: usize) -> Rest {
        trace(Step::Rest(i));
        // SAFETY: passed on.
        let desc = unsafe { self.at::<WrittenBack>(i) };
        Rest {
            packet_hash: u64::from_le(desc.packet_hash().read()),
            length_vlan: u32::from_le(desc.length_vlan().read()),
        }
    }

    /// The status of transmit descriptor `i`, where `olinfo_status` was.
    ///
    /// # Safety
    /// `i` is below the ring's size.
    #[inline(always)]
    pub(crate) unsafe fn sent_status(&self, i: usize) -> u32 {
        trace(Step::Status(i));
        // SAFETY: passed on.
        u32::from_le(unsafe { self.at::<Posted>(i) }.high().read())
    }

    /// Between a status and what it stands for.
    #[inline(always)]
    pub(crate) fn acquire(&self) {
        trace(Step::Acquire);
        barrier::reads();
    }

    /// Between descriptors and the tail.
    #[inline(always)]
    pub(crate) fn release(&self) {
        trace(Step::Release);
        barrier::writes();
    }
}

/// The barriers towards a device: what Linux calls `dma_rmb` and, with the barrier that its `writel` begins with, `dma_wmb`.
///
/// The fences of the language order a thread's accesses for other threads. A device is no thread: it is in another
/// shareability domain, and its registers are I/O. So the fences suffice on x86 only, where loads stay in order, and
/// stores are seen before a later store to a register.
mod barrier {
    #[cfg(any(target_arch = "x86_64", target_arch = "x86"))]
    use core::sync::atomic::{
        Ordering::{Acquire, Release},
        fence,
    };

    /// Loads before, from memory that a device writes, are done before the loads and stores behind.
    #[inline(always)]
    pub(super) fn reads() {
        #[cfg(any(target_arch = "x86_64", target_arch = "x86"))]
        fence(Acquire);
        // Loads before; the outer shareable domain.
        #[cfg(target_arch = "aarch64")]
        // SAFETY: a barrier; it has no effect but on ordering.
        unsafe {
            core::arch::asm!("dmb oshld", options(nostack, preserves_flags));
        }
        // Loads of memory and of registers before.
        #[cfg(any(target_arch = "riscv64", target_arch = "riscv32"))]
        // SAFETY: as above.
        unsafe {
            core::arch::asm!("fence ir, iorw", options(nostack, preserves_flags));
        }
        #[cfg(not(any(
            target_arch = "x86_64",
            target_arch = "x86",
            target_arch = "aarch64",
            target_arch = "riscv64",
            target_arch = "riscv32"
        )))]
        core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
    }

    /// Loads and stores before are done before a device can see the stores behind, to memory or to its registers.
    #[inline(always)]
    pub(super) fn writes() {
        #[cfg(any(target_arch = "x86_64", target_arch = "x86"))]
        fence(Release);
        // Loads and stores before: a buffer that is given back was read before.
        #[cfg(target_arch = "aarch64")]
        // SAFETY: a barrier; it has no effect but on ordering.
        unsafe {
            core::arch::asm!("dmb osh", options(nostack, preserves_flags));
        }
        // The tail register is output.
        #[cfg(any(target_arch = "riscv64", target_arch = "riscv32"))]
        // SAFETY: as above.
        unsafe {
            core::arch::asm!("fence iorw, ow", options(nostack, preserves_flags));
        }
        #[cfg(not(any(
            target_arch = "x86_64",
            target_arch = "x86",
            target_arch = "aarch64",
            target_arch = "riscv64",
            target_arch = "riscv32"
        )))]
        core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
    }
}

/// What was done, for unit tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Post(usize),
    Status(usize),
    Rest(usize),
    Acquire,
    Release,
    Tail,
}

#[cfg(not(test))]
#[inline(always)]
pub(crate) fn trace(_: Step) {}

#[cfg(test)]
pub(crate) use recorded::{steps, trace};

#[cfg(test)]
mod recorded {
    use super::Step;
    use std::cell::RefCell;
    use std::vec::Vec;

    std::thread_local! {
        static STEPS: RefCell<Vec<Step>> = const { RefCell::new(Vec::new()) };
    }

    pub(crate) fn trace(step: Step) {
        STEPS.with_borrow_mut(|steps| steps.push(step));
    }

    /// What this thread did since the last call.
    pub(crate) fn steps() -> Vec<Step> {
        STEPS.take()
    }
}
