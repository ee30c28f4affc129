//! Interrupts: causes, masks, auto-clear, auto-mask, moderation (datasheet 7.3 and 8.3.5.3).
//!
//! Time is what the owner says it is (`Nic::advance`), so that tests of moderation need no clock.

use crate::register::{VECTORS, eitr, ivar};

const ALL: u32 = (1 << VECTORS) - 1;
/// VTEITR counts in steps of 2 us.
const TICK_NS: u64 = 2000;

/// The interrupt registers of one VF, and what was fired.
#[derive(Clone, Debug, Default)]
pub struct Interrupts {
    causes: u32,
    mask: u32,
    auto_clear: u32,
    auto_mask: u32,
    /// VTIVAR, VTIVAR_MISC.
    pub(crate) allocation: [u32; 4],
    pub(crate) misc: u32,
    throttle: [u32; VECTORS],
    /// VTRSCINT: stored, since nothing is coalesced.
    pub(crate) rsc: [u32; VECTORS],
    /// A cause came since the vector fired last.
    pending: u32,
    /// No message before this time, in ns.
    not_before: [u64; VECTORS],
    now: u64,
    fired: u32,
    /// Messages sent, for each vector.
    pub sent: [u64; VECTORS],
}

impl Interrupts {
    /// A reset: everything but the time and the count of messages.
    pub(crate) fn reset(&mut self) {
        *self = Self {
            now: self.now,
            sent: self.sent,
            ..Self::default()
        };
    }

    /// VTEICR: reading clears it, and masks what VTEIAM says.
    pub(crate) fn read_causes(&mut self) -> u32 {
        let causes = self.causes;
        self.clear(ALL);
        causes
    }

    /// Writing ones to VTEICR.
    pub(crate) fn clear(&mut self, bits: u32) {
        self.mask &= !(self.causes & bits & self.auto_mask);
        self.causes &= !bits;
        self.pending &= !bits;
    }

    /// VTEICS.
    pub(crate) fn set(&mut self, bits: u32) {
        self.causes |= bits & ALL;
        self.pending |= bits & ALL;
        self.fire();
    }

    /// The bits of VTEIMS.
    pub(crate) fn mask(&self) -> u32 {
        self.mask
    }

    /// VTEIMS: ones unmask.
    pub(crate) fn unmask(&mut self, bits: u32) {
        // A cause that was not cleared is told about again.
        self.pending |= self.causes & bits & ALL & !self.mask;
        self.mask |= bits & ALL;
        self.fire();
    }

    /// VTEIMC: ones mask.
    pub(crate) fn mask_off(&mut self, bits: u32) {
        self.mask &= !bits;
    }

    pub(crate) fn auto_clear(&self) -> u32 {
        self.auto_clear
    }

    pub(crate) fn set_auto_clear(&mut self, bits: u32) {
        self.auto_clear = bits & ALL;
    }

    pub(crate) fn auto_mask(&self) -> u32 {
        self.auto_mask
    }

    pub(crate) fn set_auto_mask(&mut self, bits: u32) {
        self.auto_mask = bits & ALL;
    }

    pub(crate) fn throttle(&self, vector: usize) -> u32 {
        self.throttle[vector]
    }

    /// VTEITR: without CNT_WDIS the counter begins again, from 0: the next cause fires at once.
    pub(crate) fn set_throttle(&mut self, vector: usize, value: u32) {
        self.throttle[vector] = value & !eitr::KEEP_COUNTER;
        if value & eitr::KEEP_COUNTER == 0 {
            self.not_before[vector] = self.now;
            self.fire();
        }
    }

    /// Something of `queue` is done: 0 receive, 1 transmit.
    pub(crate) fn queue_event(&mut self, queue: usize, direction: usize) {
        let entry = self.allocation[queue / 2].to_le_bytes()[queue % 2 * 2 + direction];
        self.entry_event(entry);
    }

    /// The PF has sent or acknowledged a message, or reset.
    pub(crate) fn mailbox_event(&mut self) {
        self.entry_event(self.misc as u8);
    }

    fn entry_event(&mut self, entry: u8) {
        let vector = usize::from(entry & ivar::VECTOR);
        if entry & ivar::VALID != 0 && vector < VECTORS {
            self.set(1 << vector);
        }
    }

    fn fire(&mut self) {
        for vector in 0..VECTORS {
            let bit = 1 << vector;
            if self.pending & self.mask & bit == 0 || self.now < self.not_before[vector] {
                continue;
            }
            self.pending &= !bit;
            self.fired |= bit;
            self.sent[vector] += 1;
            self.not_before[vector] = self.now + u64::from((self.throttle[vector] & eitr::INTERVAL) >> 3) * TICK_NS;
            self.causes &= !(bit & self.auto_clear);
            self.mask &= !(bit & self.auto_mask);
        }
    }

    /// Lets time pass: `now` in ns, never earlier than before.
    pub(crate) fn advance(&mut self, now: u64) {
        self.now = self.now.max(now);
        self.fire();
    }

    /// When a moderated interrupt is due, in ns.
    pub(crate) fn next_due(&self) -> Option<u64> {
        (0..VECTORS)
            .filter(|vector| self.pending & self.mask & (1 << vector) != 0)
            .map(|vector| self.not_before[vector])
            .min()
    }

    /// The vectors that sent a message since the last call, as bits.
    pub(crate) fn take_fired(&mut self) -> u32 {
        std::mem::take(&mut self.fired)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unmasked() -> Interrupts {
        let mut interrupts = Interrupts::default();
        interrupts.unmask(7);
        interrupts
    }

    #[test]
    fn a_masked_cause_fires_when_unmasked() {
        let mut interrupts = Interrupts::default();
        interrupts.set(2);
        assert_eq!(interrupts.take_fired(), 0);
        interrupts.unmask(2);
        assert_eq!(interrupts.take_fired(), 2);
        assert_eq!(interrupts.read_causes(), 2);
        assert_eq!(interrupts.read_causes(), 0, "read to clear");
    }

    #[test]
    fn auto_clear_and_auto_mask() {
        let mut interrupts = unmasked();
        interrupts.set_auto_clear(1);
        interrupts.set_auto_mask(1);
        interrupts.set(3);
        assert_eq!(interrupts.take_fired(), 3);
        assert_eq!(interrupts.mask(), 6);
        assert_eq!(interrupts.read_causes(), 2);
        interrupts.set(1);
        assert_eq!(interrupts.take_fired(), 0, "masked since it fired");
        interrupts.unmask(1);
        assert_eq!(interrupts.take_fired(), 1);
    }

    #[test]
    fn moderation_delays_the_second() {
        let mut interrupts = unmasked();
        // 200 in the register: 25 steps of 2 us.
        interrupts.set_throttle(1, 200);
        interrupts.set(2);
        assert_eq!(interrupts.take_fired(), 2);
        interrupts.set(2);
        assert_eq!(interrupts.take_fired(), 0);
        assert_eq!(interrupts.next_due(), Some(50_000));
        interrupts.advance(49_999);
        assert_eq!(interrupts.take_fired(), 0);
        interrupts.advance(50_000);
        assert_eq!(interrupts.take_fired(), 2);
        interrupts.set(2);
        interrupts.set_throttle(1, 200 | eitr::KEEP_COUNTER);
        assert_eq!(interrupts.take_fired(), 0);
        interrupts.set_throttle(1, 200);
        assert_eq!(interrupts.take_fired(), 2, "the counter was written with 0");
    }

    #[test]
    fn queues_find_their_vector() {
        let mut interrupts = unmasked();
        // Queue 2 receive on vector 1, queue 3 transmit on vector 2, the mailbox on vector 0 but not valid.
        interrupts.allocation[1] = 0x8200_0081;
        interrupts.queue_event(2, 0);
        assert_eq!(interrupts.take_fired(), 2);
        interrupts.queue_event(3, 1);
        assert_eq!(interrupts.take_fired(), 4);
        interrupts.queue_event(2, 1);
        interrupts.mailbox_event();
        assert_eq!(interrupts.take_fired(), 0);
        interrupts.misc = 0x80;
        interrupts.mailbox_event();
        assert_eq!(interrupts.take_fired(), 1);
    }
}
