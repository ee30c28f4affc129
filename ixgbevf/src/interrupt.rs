//! Interrupts: which vector a queue raises, how often, and what masks itself. A VF has three MSI-X vectors.

use crate::Error;
use crate::access::{Registers, Regs};
use crate::regs::interrupt::{ALL, CNT_WDIS, INTERVAL_MAX, INTERVAL_SHIFT, VALID};
use crate::regs::{
    MAX_QUEUES, MAX_VECTORS, VTEIAC, VTEIAM, VTEICR, VTEICS, VTEIMC, VTEIMS, VTEITR, VTIVAR, VTIVAR_MISC,
};

/// What raises an interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// A receive queue got something.
    Rx(u8),
    /// A transmit queue sent something that was to be reported.
    Tx(u8),
    /// The PF has a message, or the link changed.
    Mailbox,
}

/// The interrupt registers. Threads may have one each: those that unmask are write-only and concern single vectors.
#[derive(Clone, Copy, Debug)]
pub struct Interrupts<R>(Regs<R>);

impl<R: Registers> Interrupts<R> {
    /// Touches nothing yet.
    pub const fn new(regs: R) -> Self {
        Self(Regs(regs))
    }

    /// Has `cause` raise `vector`, or nothing. To be done by one thread, and again after a reset.
    ///
    /// # Errors
    /// [`Error::Vector`], [`Error::QueueIndex`].
    pub fn route(&self, cause: Cause, vector: Option<u8>) -> Result<(), Error> {
        let entry = match vector {
            None => 0,
            Some(vector) => VALID | check(vector)? as u32,
        };
        let (queue, direction) = match cause {
            Cause::Mailbox => {
                self.0.write(VTIVAR_MISC, entry);
                return Ok(());
            }
            Cause::Rx(queue) => (queue, 0),
            Cause::Tx(queue) => (queue, 1),
        };
        if usize::from(queue) >= MAX_QUEUES {
            return Err(Error::QueueIndex(queue));
        }
        // Two queues a register, receive and transmit a byte each.
        let shift = 16 * u32::from(queue & 1) + 8 * direction;
        self.0
            .update(VTIVAR.at(usize::from(queue / 2)), 0xff << shift, entry << shift);
        Ok(())
    }

    /// Raises `vector` at most once in `us` microseconds, in steps of 2.048, up to 1,046; 0 for no moderation.
    ///
    /// # Errors
    /// [`Error::Vector`].
    pub fn moderate(&self, vector: u8, us: u32) -> Result<(), Error> {
        let steps = (u64::from(us) * 1000 / 2048).min(INTERVAL_MAX.into()) as u32;
        self.0
            .write(VTEITR.at(check(vector)?), steps << INTERVAL_SHIFT | CNT_WDIS);
        Ok(())
    }

    /// The vectors, by their bits, whose causes clear and which mask themselves when they are raised: a thread that wakes up
    /// need not write a register before it goes on polling, and [`enable`](Interrupts::enable)s its own before it sleeps.
    pub fn auto_mask(&self, vectors: u32) {
        self.0.write(VTEIAC, vectors & ALL);
        self.0.write(VTEIAM, vectors & ALL);
    }

    /// Unmasks vectors, by their bits.
    #[inline]
    pub fn enable(&self, vectors: u32) {
        self.0.write(VTEIMS, vectors & ALL);
    }

    /// Masks vectors, by their bits.
    #[inline]
    pub fn disable(&self, vectors: u32) {
        self.0.write(VTEIMC, vectors & ALL);
    }

    /// Raises vectors, by their bits, as if something had happened.
    #[inline]
    pub fn trigger(&self, vectors: u32) {
        self.0.write(VTEICS, vectors & ALL);
    }

    /// The vectors that were raised and did not clear by themselves; reading clears them.
    #[inline]
    pub fn take_causes(&self) -> u32 {
        self.0.take(VTEICR) & ALL
    }
}

fn check(vector: u8) -> Result<usize, Error> {
    let index = usize::from(vector);
    if index < MAX_VECTORS {
        Ok(index)
    } else {
        Err(Error::Vector(vector))
    }
}
