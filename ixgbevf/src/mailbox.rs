//! The legacy mailbox handshake: one buffer of 16 dwords, which either side takes, writes or reads, and gives back.
//!
//! ```text
//!   VF                                  PF
//!   take the buffer (VFU)
//!   write, REQ (gives it back)   --->   sees the request, takes, reads
//!                         PFACK  <---   gives it back
//!                                       works, takes, writes the answer
//!                         PFSTS  <---   gives it back
//!   take, read, ACK              --->
//! ```
//!
//! PFSTS, PFACK and RSTD clear when VFMAILBOX is read, by whatever read it: each read is folded into a copy, and waiting
//! looks at the copy.

use crate::access::{Registers, Regs};
use crate::message::{CTS, FAILURE, NUMBER, PF_CONTROL, Request, SUCCESS, WORDS};
use crate::regs::mailbox::{ACK, PFACK, PFSTS, READ_CLEARS, REQ, RSTD, RSTI, VFU};
use crate::regs::{VFMAILBOX, VFMBMEM};
use crate::{Delay, Error};

/// Looks at a bit before it is given up, and the microseconds between: one second each, as other drivers wait.
const TRIES: u32 = 2000;
const INTERVAL_US: u32 = 500;

/// All looks of one request: for the buffer, the acknowledgement and the answer, however often it begins anew.
const BUDGET: u32 = 3 * TRIES;

/// Unasked messages that may come before the answer.
const STRAYS: u32 = 8;

/// An unasked message of the PF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unasked {
    Nothing,
    /// Something changed: look at the link.
    Ping,
    PfReset,
}

/// What an answer's first word must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waiting {
    /// Any wait but those of a reset: a PF that resets ends it.
    Ordinary,
    /// While the VF itself resets, RSTI and RSTD say nothing new.
    Resetting,
}

/// The driver's end of the mailbox.
#[derive(Debug, Default)]
pub(crate) struct Mailbox {
    /// Those of the bits that clear on read that were seen and not yet attended to.
    seen: u32,
    /// RSTI was 0 when the PF last answered a reset: should it rise, a reset of the PF has begun.
    rsti_was_low: bool,
    /// Looks that the request under way has left.
    left: u32,
    /// Unasked messages.
    pub(crate) strays: u64,
}

impl Mailbox {
    /// VFMAILBOX as it would be if nothing cleared on read.
    pub(crate) fn status<R: Registers>(&mut self, regs: &Regs<R>) -> Result<u32, Error> {
        let status = regs.take(VFMAILBOX);
        if status == u32::MAX {
            return Err(Error::Gone);
        }
        self.seen |= status & READ_CLEARS;
        Ok(status | self.seen)
    }

    /// Forgets what was seen, before the VF is reset.
    pub(crate) fn forget(&mut self) {
        self.seen = 0;
    }

    /// Begins anew, after the PF answered a reset.
    pub(crate) fn settle<R: Registers>(&mut self, regs: &Regs<R>) -> Result<(), Error> {
        self.rsti_was_low = self.status(regs)? & RSTI == 0;
        self.seen = 0;
        Ok(())
    }

    fn is_pf_reset(&self, status: u32) -> bool {
        status & RSTD != 0 || self.rsti_was_low && status & RSTI != 0
    }

    /// RSTI or RSTD: the sign that a reset of the VF got through.
    pub(crate) fn is_reset_signalled<R: Registers>(&mut self, regs: &Regs<R>) -> Result<bool, Error> {
        Ok(self.status(regs)? & (RSTI | RSTD) != 0)
    }

    /// Attends to what the PF says unasked.
    pub(crate) fn unasked<R: Registers>(
        &mut self,
        regs: &Regs<R>,
        delay: &mut impl Delay,
        request: Request,
    ) -> Result<Unasked, Error> {
        self.left = BUDGET;
        let status = self.status(regs)?;
        if self.is_pf_reset(status) {
            return Ok(Unasked::PfReset);
        }
        if status & PFSTS == 0 {
            return Ok(Unasked::Nothing);
        }
        self.seen &= !PFSTS;
        let mut words = [0; 1];
        self.read(regs, delay, request, &mut words)?;
        self.strays += 1;
        Ok(classify(words[0]))
    }

    /// Sends `message` and reads the answer into `answer`, at most 16 words each; the answer's first word, with SUCCESS.
    pub(crate) fn exchange<R: Registers>(
        &mut self,
        regs: &Regs<R>,
        delay: &mut impl Delay,
        request: Request,
        message: &[u32],
        answer: &mut [u32],
    ) -> Result<(), Error> {
        // What is still unread would be overwritten: it may be the news that the PF was reset.
        if self.unasked(regs, delay, request)? == Unasked::PfReset {
            return Err(Error::PfReset);
        }
        self.send(regs, delay, request, message, Waiting::Ordinary)?;
        for _ in 0..STRAYS {
            self.wait(regs, delay, PFSTS, Waiting::Ordinary)
                .map_err(|e| e.or(Error::NoReply(request)))?;
            self.read(regs, delay, request, answer)?;
            let word = answer.first().copied().unwrap_or_default();
            if word & NUMBER == PF_CONTROL {
                self.strays += 1;
                if classify(word) == Unasked::PfReset {
                    return Err(Error::PfReset);
                }
                continue;
            }
            return match (
                word & NUMBER == request.word(),
                word & SUCCESS != 0,
                word & FAILURE != 0,
            ) {
                (true, true, false) => Ok(()),
                (true, false, true) if word & CTS != 0 => Err(Error::Refused(request)),
                // The PF answers everything so until it was told of the VF's reset.
                (true, false, true) => Err(Error::PfReset),
                _ => Err(Error::BadReply { request, word }),
            };
        }
        Err(Error::NoReply(request))
    }

    /// VF_RESET: its answer alone carries no CTS, and its words are the caller's to judge.
    pub(crate) fn reset<R: Registers>(&mut self, regs: &Regs<R>, delay: &mut impl Delay) -> Result<[u32; 4], Error> {
        let request = Request::Reset;
        self.left = BUDGET;
        self.send(regs, delay, request, &[request.word()], Waiting::Resetting)?;
        delay.delay_us(10_000);
        let mut answer = [0; 4];
        for _ in 0..STRAYS {
            self.wait(regs, delay, PFSTS, Waiting::Resetting)
                .map_err(|e| e.or(Error::NoReply(request)))?;
            self.read(regs, delay, request, &mut answer)?;
            if answer[0] & NUMBER != PF_CONTROL {
                return Ok(answer);
            }
            // Sent before the PF saw the reset.
            self.strays += 1;
        }
        Err(Error::NoReply(request))
    }

    fn send<R: Registers>(
        &mut self,
        regs: &Regs<R>,
        delay: &mut impl Delay,
        request: Request,
        message: &[u32],
        waiting: Waiting,
    ) -> Result<(), Error> {
        self.acquire(regs, delay, request)?;
        self.seen &= !(PFSTS | PFACK);
        for (i, word) in message.iter().enumerate().take(WORDS) {
            regs.write(VFMBMEM.at(i), *word);
        }
        regs.write(VFMAILBOX, REQ);
        self.wait(regs, delay, PFACK, waiting)
            .map_err(|e| e.or(Error::NoAck(request)))
    }

    fn read<R: Registers>(
        &mut self,
        regs: &Regs<R>,
        delay: &mut impl Delay,
        request: Request,
        words: &mut [u32],
    ) -> Result<(), Error> {
        self.acquire(regs, delay, request)?;
        for (i, word) in words.iter_mut().enumerate().take(WORDS) {
            *word = regs.read(VFMBMEM.at(i));
        }
        regs.write(VFMAILBOX, ACK);
        Ok(())
    }

    /// Time until the next look, if there is to be one.
    fn pause(&mut self, delay: &mut impl Delay) -> bool {
        if self.left == 0 {
            return false;
        }
        self.left -= 1;
        delay.delay_us(INTERVAL_US);
        true
    }

    /// Takes the buffer: VFU stays 0 while the PF has it.
    fn acquire<R: Registers>(&mut self, regs: &Regs<R>, delay: &mut impl Delay, request: Request) -> Result<(), Error> {
        for _ in 0..TRIES {
            regs.write(VFMAILBOX, VFU);
            if self.status(regs)? & VFU != 0 {
                return Ok(());
            }
            if !self.pause(delay) {
                break;
            }
        }
        Err(Error::MailboxBusy(request))
    }

    /// Waits for a bit that clears on read.
    fn wait<R: Registers>(
        &mut self,
        regs: &Regs<R>,
        delay: &mut impl Delay,
        bit: u32,
        waiting: Waiting,
    ) -> Result<(), GivenUp> {
        let mut status = 0;
        for _ in 0..TRIES {
            status = self.status(regs).map_err(GivenUp::For)?;
            if status & bit != 0 {
                self.seen &= !bit;
                return Ok(());
            }
            if waiting == Waiting::Ordinary && self.is_pf_reset(status) {
                return Err(GivenUp::For(Error::PfReset));
            }
            if !self.pause(delay) {
                break;
            }
        }
        Err(if status & RSTI != 0 {
            GivenUp::For(Error::PfReset)
        } else {
            GivenUp::Late
        })
    }
}

/// How a wait ended without what it waited for.
enum GivenUp {
    Late,
    For(Error),
}

impl GivenUp {
    fn or(self, late: Error) -> Error {
        match self {
            GivenUp::Late => late,
            GivenUp::For(error) => error,
        }
    }
}

fn classify(word: u32) -> Unasked {
    // What a PF says that does not know this VF any more: the notice itself, or a request of before refused.
    let forgotten = word & CTS == 0 && word & FAILURE != 0 && word & NUMBER != Request::Reset.word();
    if word == PF_CONTROL || forgotten {
        Unasked::PfReset
    } else {
        Unasked::Ping
    }
}
