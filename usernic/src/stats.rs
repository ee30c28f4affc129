//! Counters of a queue pair: one thread adds to them once a burst, any thread reads them.

use std::sync::atomic::{AtomicU64, Ordering};

/// What a queue pair, or a whole port, has done since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Stats {
    /// Frames received and handed to the application.
    pub rx_packets: u64,
    /// Their bytes, without FCS.
    pub rx_bytes: u64,
    /// Frames sent: handed to the other side.
    pub tx_packets: u64,
    /// Their bytes, without FCS.
    pub tx_bytes: u64,
    /// Frames of the other side that were malformed, did not fit the port's buffers, or came from a ring that it had
    /// disabled, and were dropped.
    pub rx_errors: u64,
    /// Frames of the other side with fewer bytes than an Ethernet header has, which were dropped.
    pub rx_runts: u64,
    /// Frames of the other side that are longer than the port's MTU allows, and were dropped.
    pub rx_oversize: u64,
    /// Frames that the receive filter kept out.
    pub rx_filtered: u64,
    /// Frames to send that the other side's receive filter keeps out, and that were dropped.
    pub tx_filtered: u64,
    /// Frames to send that were dropped since the other side can never take them (longer than its buffers).
    pub tx_errors: u64,
    /// Frames to send that are longer than the port's MTU allows, and were dropped.
    pub tx_oversize: u64,
    /// Times that the pool had no buffer to receive into.
    pub rx_no_buffer: u64,
    /// Violations of the protocol by the other side that were caught: bad indices, lengths, chains.
    pub anomalies: u64,
    /// Notifications sent: each a system call.
    pub kicks: u64,
    /// Front-ends that a `vhost` port sent away: they broke the protocol, set up what cannot be used, did not answer within
    /// the time limit, or came while another one was served.
    pub peers_refused: u64,
}

/// What the device of a `vf` port counted since the port was opened, whoever took the frames. A frame for which there was no
/// buffer is in no counter of a virtual function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct DeviceStats {
    /// Frames that the device received.
    pub rx_packets: u64,
    /// Their bytes, with FCS.
    pub rx_bytes: u64,
    /// Of those frames, the ones for groups.
    pub rx_multicast: u64,
    /// Frames that it sent.
    pub tx_packets: u64,
    /// Their bytes, with FCS.
    pub tx_bytes: u64,
    /// Messages of the PF that were not to be expected, or could not be.
    pub anomalies: u64,
}

macro_rules! counters {
    ($($name:ident),*) => {
        /// The shared form of [`Stats`], on lines of its own.
        #[repr(align(128))]
        #[derive(Default)]
        pub(crate) struct Counters {
            $(pub(crate) $name: Counter),*
        }

        impl Counters {
            pub(crate) fn snapshot(&self) -> Stats {
                Stats { $($name: self.$name.get()),* }
            }
        }

        impl std::ops::AddAssign for Stats {
            fn add_assign(&mut self, other: Stats) {
                $(self.$name += other.$name;)*
            }
        }
    };
}

counters!(
    rx_packets,
    rx_bytes,
    tx_packets,
    tx_bytes,
    rx_errors,
    rx_runts,
    rx_oversize,
    rx_filtered,
    tx_filtered,
    tx_errors,
    tx_oversize,
    rx_no_buffer,
    anomalies,
    kicks,
    peers_refused
);

/// A counter with one writer.
#[derive(Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Adds; by the one writer, so that no locked instruction is needed.
    #[inline(always)]
    pub(crate) fn add(&self, n: u64) {
        self.0
            .store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Makes it at least `n`.
    #[inline]
    pub(crate) fn raise(&self, n: u64) {
        if self.get() < n {
            self.0.store(n, Ordering::Relaxed);
        }
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
