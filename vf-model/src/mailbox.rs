//! The mailbox between a VF and its PF: 16 dwords that one side owns at a time, and eight bits (datasheet 8.3.5.1.5).
//!
//! PFSTS, PFACK and RSTD clear when the VF reads them. What a VF asks for is seen by the PF only some reads of VFMAILBOX
//! later, so that a driver that does not wait fails.

use crate::register::{MAILBOX_WORDS, mailbox as bit};

/// A message, padded with what was in the memory.
pub type Message = [u32; MAILBOX_WORDS];

/// What the VF asked for by a write to VFMAILBOX.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Asked {
    /// The PF's message was read.
    pub acknowledged: bool,
    /// The VF used the mailbox without owning it.
    pub not_owned: bool,
}

/// One VF's mailbox.
#[derive(Clone, Debug, Default)]
pub struct Mailbox {
    memory: Message,
    owned: bool,
    pf_owns: bool,
    status: bool,
    ack: bool,
    resetting: bool,
    reset_done: bool,
    /// Reads until what waits happens.
    latency: u32,
    request: Option<u32>,
    reply: Option<(u32, Message, usize)>,
    reset: Option<u32>,
}

impl Mailbox {
    pub(crate) fn new(latency: u32) -> Self {
        Self {
            latency,
            ..Self::default()
        }
    }

    /// The VF reads VFMAILBOX.
    pub(crate) fn read(&mut self) -> u32 {
        let mut value = 0;
        for (set, mask) in [
            (self.owned, bit::VFU),
            (self.pf_owns, bit::PFU),
            (self.status, bit::PFSTS),
            (self.ack, bit::PFACK),
            (self.resetting, bit::RSTI),
            (self.reset_done, bit::RSTD),
        ] {
            if set {
                value |= mask;
            }
        }
        self.status = false;
        self.ack = false;
        self.reset_done = false;
        value
    }

    /// The VF writes VFMAILBOX.
    pub(crate) fn write(&mut self, value: u32) -> Asked {
        let mut asked = Asked::default();
        let owned_before = self.owned;
        self.owned = value & bit::VFU != 0 && !self.pf_owns;
        if value & bit::REQ != 0 {
            asked.not_owned = !owned_before;
            self.request = Some(self.latency);
        }
        asked.acknowledged = value & bit::ACK != 0;
        asked
    }

    pub(crate) fn read_memory(&self, index: usize) -> u32 {
        self.memory[index]
    }

    /// The VF writes memory: false if it does not own it.
    pub(crate) fn write_memory(&mut self, index: usize, value: u32) -> bool {
        if !self.pf_owns {
            self.memory[index] = value;
        }
        self.owned
    }

    /// Time passes by one read or one step: the message that the PF now has to handle, and whether an interrupt is due.
    pub(crate) fn tick(&mut self) -> (Option<Message>, bool) {
        let mut interrupt = false;
        let mut message = None;
        if due(&mut self.reset) {
            self.reset_done = true;
            interrupt = true;
        }
        if let Some((left, ..)) = &mut self.reply {
            if *left > 0 {
                *left -= 1;
            } else if !self.owned
                && let Some((_, message, words)) = self.reply.take()
            {
                self.deliver(&message, words);
                interrupt = true;
            }
        }
        if due(&mut self.request) && !self.resetting {
            self.ack = true;
            interrupt = true;
            message = Some(self.memory);
        }
        (message, interrupt)
    }

    /// The PF answers: the VF sees it after the latency, once it has let go of the memory.
    pub(crate) fn answer(&mut self, message: Message, words: usize) {
        self.reply = Some((self.latency, message, words));
    }

    /// The PF sends a message of its own.
    pub(crate) fn post(&mut self, word: u32) {
        let mut message = self.memory;
        message[0] = word;
        self.deliver(&message, 1);
    }

    fn deliver(&mut self, message: &Message, words: usize) {
        self.memory[..words].copy_from_slice(&message[..words]);
        self.status = true;
    }

    /// The VF resets itself: what was under way is forgotten, RSTD follows.
    pub(crate) fn reset_vf(&mut self) {
        let resetting = self.resetting;
        *self = Self::new(self.latency);
        self.resetting = resetting;
        if !resetting {
            self.reset = Some(self.latency);
        }
    }

    /// The PF resets: RSTI, and nobody answers.
    pub(crate) fn begin_reset(&mut self) {
        *self = Self::new(self.latency);
        self.resetting = true;
    }

    /// The PF is back: RSTD.
    pub(crate) fn end_reset(&mut self) {
        self.resetting = false;
        self.reset_done = true;
    }

    /// The PF holds the memory (to test drivers that must wait for it), or lets it go.
    pub(crate) fn hold(&mut self, held: bool) {
        self.pf_owns = held;
        self.owned &= !held;
    }

    /// The PF is in reset.
    pub(crate) fn is_resetting(&self) -> bool {
        self.resetting
    }

    /// Something is under way that the next ticks bring nearer.
    pub(crate) fn is_busy(&self) -> bool {
        self.request.is_some() || self.reset.is_some() || self.reply.is_some() && !self.owned
    }
}

fn due(countdown: &mut Option<u32>) -> bool {
    match countdown {
        None => false,
        Some(0) => {
            *countdown = None;
            true
        }
        Some(left) => {
            *left -= 1;
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_bits_clear_on_read_and_three_do_not() {
        let mut mailbox = Mailbox::new(0);
        mailbox.begin_reset();
        assert_eq!(mailbox.read(), bit::RSTI);
        assert_eq!(mailbox.read(), bit::RSTI);
        mailbox.end_reset();
        mailbox.post(0x100);
        assert_eq!(mailbox.read(), bit::RSTD | bit::PFSTS);
        assert_eq!(mailbox.read(), 0);
        assert!(!mailbox.write(bit::VFU).not_owned);
        assert_eq!(mailbox.read(), bit::VFU);
        mailbox.write(bit::REQ);
        assert!(mailbox.tick().0.is_some());
        assert_eq!(mailbox.read(), bit::PFACK, "REQ without VFU lets go");
        assert_eq!(mailbox.read(), 0);
    }

    #[test]
    fn the_pf_takes_its_time() {
        let mut mailbox = Mailbox::new(2);
        mailbox.write(bit::VFU);
        mailbox.write_memory(0, 7);
        mailbox.write(bit::REQ);
        assert_eq!(mailbox.tick().0, None);
        assert_eq!(mailbox.tick().0, None);
        let request = mailbox.tick().0.unwrap();
        assert_eq!(request[0], 7);
        mailbox.answer([9; 16], 1);
        assert!(!mailbox.tick().1);
        assert!(!mailbox.tick().1);
        assert!(mailbox.tick().1);
        assert_eq!(mailbox.read(), bit::PFSTS | bit::PFACK);
        assert_eq!((mailbox.read_memory(0), mailbox.read_memory(1)), (9, 0));
    }

    #[test]
    fn who_holds_the_memory_keeps_the_other_out() {
        let mut mailbox = Mailbox::new(0);
        mailbox.hold(true);
        mailbox.write(bit::VFU);
        assert_eq!(mailbox.read(), bit::PFU);
        assert!(!mailbox.write_memory(0, 1));
        assert_eq!(mailbox.read_memory(0), 0);
        assert!(mailbox.write(bit::REQ).not_owned);
    }
}
