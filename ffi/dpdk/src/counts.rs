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
    pub(crate) filtered: Counter,
    pub(crate) empty: Counter,
    pub(crate) chains: Counter,
    kicks: Counter,
    anomalies: Counter,
}

impl Counters {
    /// Adds what a ring has counted that goes.
    pub(crate) fn retire(&self, ring: &RawRing) {
        self.kicks.add(ring.kicks());
        self.anomalies.add(ring.anomalies().total());
    }

    /// Adds what a device did wrong on a ring that goes.
    pub(crate) fn strayed(&self, anomalies: u64) {
        self.anomalies.add(anomalies);
    }

    pub(crate) fn get(&self) -> Counts {
        Counts {
            packets: self.packets.get(),
            bytes: self.bytes.get(),
            errors: self.errors.get(),
            filtered: self.filtered.get(),
            empty: self.empty.get(),
            chains: self.chains.get(),
            kicks: self.kicks.get(),
            anomalies: self.anomalies.get(),
        }
    }
}
