//! Counters of a queue: written by the thread that drives it, read by whoever asks.

use std::sync::atomic::{AtomicU64, Ordering};

use usernic::RawRing;

use crate::abi::Counts;

/// A number that one thread writes.
#[derive(Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    #[inline(always)]
    pub(crate) fn add(&self, n: u64) {
        self.0
            .store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    #[inline(always)]
    fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    #[inline(always)]
    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// On lines of their own.
#[derive(Default)]
#[repr(align(128))]
pub(crate) struct Counters {
    pub(crate) packets: Counter,
    pub(crate) bytes: Counter,
    pub(crate) errors: Counter,
    pub(crate) runts: Counter,
    pub(crate) oversize: Counter,
    pub(crate) filtered: Counter,
    pub(crate) empty: Counter,
    pub(crate) chains: Counter,
    kicks: Counter,
    anomalies: Counter,
    /// What rings that are gone had counted of the last two.
    past: [Counter; 2],
}

impl Counters {
    /// Shows what a ring has counted so far, after each burst: whoever polls does nothing else.
    #[inline(always)]
    pub(crate) fn publish(&self, ring: &RawRing) {
        self.kicks.set(self.past[0].get() + ring.kicks());
        self.strayed(ring.anomalies().total());
    }

    /// Shows what a device did wrong so far.
    #[inline(always)]
    pub(crate) fn strayed(&self, anomalies: u64) {
        self.anomalies.set(self.past[1].get() + anomalies);
    }

    /// Keeps what a ring has counted that goes.
    pub(crate) fn retire(&self, ring: &RawRing) {
        self.publish(ring);
        self.past[0].set(self.kicks.get());
        self.past[1].set(self.anomalies.get());
    }

    pub(crate) fn get(&self) -> Counts {
        Counts {
            packets: self.packets.get(),
            bytes: self.bytes.get(),
            errors: self.errors.get(),
            runts: self.runts.get(),
            oversize: self.oversize.get(),
            filtered: self.filtered.get(),
            empty: self.empty.get(),
            chains: self.chains.get(),
            kicks: self.kicks.get(),
            anomalies: self.anomalies.get(),
        }
    }
}
