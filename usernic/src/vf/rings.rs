//! The rings of a queue pair.

use ixgbevf::{Interrupts, Memory, RxOptions, RxQueue, Slot, TxOptions, TxQueue};

use super::{Function, Reach};
use crate::error::Error;

/// A receive queue of a function.
pub type Rx = RxQueue<Reach, Box<[Slot]>>;

/// A transmit queue of a function.
pub type Tx = TxQueue<Reach, Box<[Slot]>>;

/// The two rings of a pair, and the interrupt that wakes who waits for frames.
pub struct Rings {
    /// What the device fills.
    pub rx: Rx,
    /// What the device empties.
    pub tx: Tx,
    /// The function's interrupts.
    pub interrupts: Interrupts<Reach>,
    /// The vector that the receive ring raises, as its bit.
    pub vector: u32,
}

/// What the device did wrong on a receive ring.
pub fn anomalies(rx: &Rx) -> u64 {
    let seen = rx.anomalies();
    seen.length + seen.short_piece + seen.overlong
}

impl Function {
    /// Makes the rings of pair `index`, receive and transmit, over descriptor memory of these sizes. They are
    /// [started](Function::start) next.
    ///
    /// # Errors
    /// [`Error::Vf`].
    ///
    /// # Safety
    /// Each memory is as long as [`ring_len`](ixgbevf::ring_len) of its size says, stays while the rings live, is nobody
    /// else's, and is where the device finds it.
    pub unsafe fn rings(
        &self,
        index: u8,
        memory: [Memory; 2],
        sizes: [u16; 2],
        options: RxOptions,
    ) -> Result<Rings, Error> {
        let registers = || self.registers().clone();
        let slots = |size: u16| vec![Slot::default(); usize::from(size)].into_boxed_slice();
        let ([rx, tx], [rx_size, tx_size]) = (memory, sizes);
        // SAFETY: by the caller.
        let rx = unsafe { RxQueue::new(registers(), index, rx, rx_size, options, slots(rx_size)) };
        let options = TxOptions::default();
        // SAFETY: by the caller.
        let tx = unsafe { TxQueue::new(registers(), index, tx, tx_size, options, slots(tx_size)) };
        Ok(Rings {
            rx: rx.map_err(self.failed("make a receive ring"))?,
            tx: tx.map_err(self.failed("make a transmit ring"))?,
            interrupts: Interrupts::new(registers()),
            vector: 1 << self.vector_of(index),
        })
    }
}
