//! One virtual function: its reset, what it is told by its PF, and what it is set to.

mod filters;
mod link;
mod queues;
mod rss;

pub use link::{Link, Speed};
pub use rss::{HashFields, Rss};

use crate::access::{Registers, Regs};
use crate::mailbox::{Mailbox, Unasked};
use crate::message::{Api, FAILURE, Request, SUCCESS, check_mac, local_mac, mac_from};
use crate::regs::{
    self, MAX_QUEUES, TABLE, VFCTRL, VFDCA_RXCTRL, VFDCA_TXCTRL, VFMRQC, VFPSRTYPE, VFRDH, VFRDT, VFRXDCTL, VFSRRCTL,
    VFSTATUS, VFTDH, VFTDT, VFTDWBAH, VFTDWBAL, VFTXDCTL, VTEICR, VTEIMC,
};
use crate::stats::{Counters, Statistics};
use crate::{Access, Anomalies, Delay, Error, Model, Row};
use filters::Filters;

/// Looks for the end of a reset, and the microseconds between.
const RESET_TRIES: u32 = 10_000;
const RESET_INTERVAL_US: u32 = 5;

/// What the PF gives (GET_QUEUES).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Transmit queues, 1 to 8.
    pub tx: u8,
    /// Receive queues, 1 to 8.
    pub rx: u8,
    /// The queue that packets outside RSS go to.
    pub default_queue: u8,
    /// Not 0: the PF inserts a VLAN tag, or (above 1) there are that many traffic classes.
    pub vlan_or_classes: u32,
}

const ONE_QUEUE: Limits = Limits {
    tx: 1,
    rx: 1,
    default_queue: 0,
    vlan_or_classes: 0,
};

/// What a VF is set to before its queues start.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// The largest frame with its CRC: MTU + 18. On an 82599 the PF and its VFs share one.
    pub max_frame: u16,
    /// Receive queues that RSS spreads over: a power of two.
    pub rx_queues: u8,
    /// Key, table and fields; `None` for an even spread, or on an 82599 or X540 for the PF's.
    pub rss: Option<Rss>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            max_frame: 1518,
            rx_queues: 1,
            rss: None,
        }
    }
}

/// What happened to the VF since it was last asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// Nothing.
    Quiet,
    /// The PF pinged: the link may have changed.
    Ping,
    /// The PF was reset: stop using the queues and [`Vf::reset`].
    PfReset,
}

/// Where the VF stands with its PF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// Reset and known to the PF.
    Known,
    /// Not reset yet, or the PF was reset since.
    Lost,
    /// Removed.
    Gone,
}

/// The control side of one virtual function: `R` reaches its registers, `D` waits.
///
/// Queues are values of their own, so that each can be on a thread of its own.
#[derive(Debug)]
pub struct Vf<R, D> {
    regs: Regs<R>,
    delay: D,
    model: Model,
    mailbox: Mailbox,
    standing: Standing,
    api: Api,
    limits: Limits,
    spare_mac: [u8; 6],
    mac: [u8; 6],
    assigned: bool,
    filters: Filters,
    counters: Counters,
    answers: u64,
}

impl<R: Registers, D: Delay> Vf<R, D> {
    /// Touches nothing yet. `seed` makes the address that is taken if the PF assigned none; see
    /// [`local_mac`](crate::local_mac).
    pub fn new(regs: R, delay: D, model: Model, seed: u64) -> Self {
        Self {
            regs: Regs(regs),
            delay,
            model,
            mailbox: Mailbox::default(),
            standing: Standing::Lost,
            api: Api::V1_0,
            limits: ONE_QUEUE,
            spare_mac: local_mac(seed),
            mac: [0; 6],
            assigned: false,
            filters: Filters::new(),
            counters: Counters::default(),
            answers: 0,
        }
    }

    /// Resets the VF, makes itself known to the PF, negotiates the mailbox and learns address and queues. Queues that ran
    /// do not any more: have them give their buffers back.
    ///
    /// # Errors
    /// [`Error::ResetTimeout`], [`Error::NoAck`] and [`Error::NoReply`] when there is no PF, or it is in reset itself;
    /// [`Error::BadReply`]; [`Error::Refused`] if the PF assigned no address and takes none; [`Error::Gone`].
    pub fn reset(&mut self) -> Result<(), Error> {
        self.standing = Standing::Lost;
        if self.regs.read(VFSTATUS) == u32::MAX {
            return Err(self.note(Error::Gone));
        }
        self.silence();
        self.counters.before_reset(&self.regs);
        self.mailbox.forget();
        self.regs.write(VFCTRL, regs::ctrl::RST);
        self.regs.read(VFSTATUS);
        self.delay.delay_us(50_000);
        let mut tries = 0;
        while !self.mailbox.is_reset_signalled(&self.regs).map_err(|e| self.note(e))? {
            tries += 1;
            if tries == RESET_TRIES {
                return Err(Error::ResetTimeout);
            }
            self.delay.delay_us(RESET_INTERVAL_US);
        }
        self.clear_registers();
        self.counters.after_reset(&self.regs);
        self.introduce().map_err(|e| self.note(e))
    }

    /// VF_RESET and what follows it.
    fn introduce(&mut self) -> Result<(), Error> {
        let [word, low, high, kind] = self.mailbox.reset(&self.regs, &mut self.delay)?;
        self.mailbox.settle(&self.regs)?;
        let request = Request::Reset;
        let told = mac_from([low, high]);
        self.assigned = if word == request.word() | SUCCESS {
            check_mac(told).is_ok()
        } else if word == request.word() | FAILURE {
            false
        } else {
            return Err(Error::BadReply { request, word });
        };
        self.mac = if self.assigned { told } else { self.spare_mac };
        if kind > 3 {
            self.answers += 1;
        }
        self.filters.set_hash_kind(kind);
        self.standing = Standing::Known;
        self.negotiate()?;
        self.ask_queues()?;
        if !self.assigned {
            self.tell_mac(self.mac)?;
        }
        Ok(())
    }

    fn negotiate(&mut self) -> Result<(), Error> {
        let request = Request::NegotiateApi;
        for api in Api::OFFERED {
            self.api = api;
            match self.ask(request, &[request.word(), api.wire(), 0], &mut [0; 3]) {
                Ok(()) => return Ok(()),
                Err(Error::Refused(_)) => {}
                Err(error) => {
                    self.api = Api::V1_0;
                    return Err(error);
                }
            }
        }
        // A PF from before there was a negotiation refuses all of them and speaks 1.0, which is the last of them.
        Ok(())
    }

    fn ask_queues(&mut self) -> Result<(), Error> {
        self.limits = ONE_QUEUE;
        if self.api < Api::V1_1 {
            return Ok(());
        }
        let request = Request::GetQueues;
        let mut answer = [0; 5];
        self.ask(request, &[request.word(), 0, 0, 0, 0], &mut answer)?;
        let [_, tx, rx, vlan_or_classes, default] = answer;
        let mut count = |n: u32| match u8::try_from(n) {
            Ok(n @ 1..=8) => n,
            _ => {
                self.answers += 1;
                1
            }
        };
        let (tx, rx) = (count(tx), count(rx));
        self.limits = Limits {
            tx,
            rx,
            default_queue: if default < u32::from(rx) { default as u8 } else { 0 },
            vlan_or_classes,
        };
        Ok(())
    }

    /// Masks interrupts and stops all queues, so that nothing comes any more.
    fn silence(&mut self) {
        self.regs.write(VTEIMC, regs::interrupt::ALL);
        self.regs.take(VTEICR);
        for q in 0..MAX_QUEUES {
            self.regs.write(VFTXDCTL.at(q), regs::dctl::SWFLSH);
            self.regs.update(VFRXDCTL.at(q), regs::dctl::ENABLE, 0);
        }
        self.regs.write(VFPSRTYPE, 0);
        self.regs.read(VFSTATUS);
        self.delay.delay_us(2_000);
    }

    /// What a reset leaves as it was.
    fn clear_registers(&mut self) {
        self.regs.write(VFPSRTYPE, 0);
        for q in 0..MAX_QUEUES {
            for array in [VFRDH, VFRDT, VFRXDCTL, VFTDH, VFTDT, VFTXDCTL, VFTDWBAH, VFTDWBAL] {
                self.regs.write(array.at(q), 0);
            }
            self.regs.write(VFSRRCTL.at(q), regs::srrctl::DEFAULT);
            self.regs.write(VFDCA_RXCTRL.at(q), regs::dca::RX_DEFAULT);
            self.regs.write(VFDCA_TXCTRL.at(q), regs::dca::TX_DEFAULT);
        }
        if self.model.has_own_rss() {
            self.regs.write(VFMRQC, 0);
        }
        self.regs.read(VFSTATUS);
    }

    /// One request, if the PF knows this VF.
    fn ask(&mut self, request: Request, message: &[u32], answer: &mut [u32]) -> Result<(), Error> {
        self.check_standing()?;
        self.mailbox
            .exchange(&self.regs, &mut self.delay, request, message, answer)
            .map_err(|error| self.note(error))
    }

    fn check_standing(&self) -> Result<(), Error> {
        match self.standing {
            Standing::Known => Ok(()),
            Standing::Lost => Err(Error::PfReset),
            Standing::Gone => Err(Error::Gone),
        }
    }

    /// Remembers what an error says about the PF.
    fn note(&mut self, error: Error) -> Error {
        match error {
            Error::Gone => self.standing = Standing::Gone,
            Error::PfReset => self.standing = Standing::Lost,
            _ => {}
        }
        error
    }

    /// Attends to the mailbox: to be called when the vector of the mailbox fires, or a few times a second.
    ///
    /// # Errors
    /// [`Error::Gone`]; [`Error::MailboxBusy`] if the PF keeps the mailbox.
    pub fn service(&mut self) -> Result<Event, Error> {
        match self.check_standing() {
            Err(Error::PfReset) => return Ok(Event::PfReset),
            other => other?,
        }
        let seen = self.mailbox.unasked(&self.regs, &mut self.delay, Request::GetLinkState);
        Ok(match seen.map_err(|error| self.note(error))? {
            Unasked::Nothing => Event::Quiet,
            Unasked::Ping => Event::Ping,
            Unasked::PfReset => {
                self.standing = Standing::Lost;
                Event::PfReset
            }
        })
    }

    /// Whether [`Vf::reset`] succeeded and the PF was not reset since, as far as is known.
    pub fn is_known(&self) -> bool {
        self.standing == Standing::Known
    }

    /// The model.
    pub fn model(&self) -> Model {
        self.model
    }

    /// The mailbox version that was negotiated.
    pub fn api(&self) -> Api {
        self.api
    }

    /// What the PF gives.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// The address.
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Whether the PF assigned the address; else it was made up by the VF.
    pub fn is_mac_assigned(&self) -> bool {
        self.assigned
    }

    /// The registers, for queues and interrupts.
    pub fn registers(&self) -> &R {
        &self.regs.0
    }

    /// Reads the counters and adds what they moved: at least every four minutes, since packets are counted in 32 bits,
    /// which wrap after 288 s at line rate.
    pub fn statistics(&mut self) -> Statistics {
        if self.standing != Standing::Gone {
            self.counters.update(&self.regs);
        }
        self.counters.total()
    }

    /// What the PF did wrong so far. Queues have their own.
    pub fn anomalies(&self) -> Anomalies {
        Anomalies {
            stray_message: self.mailbox.strays,
            answer: self.answers,
            ..Anomalies::default()
        }
    }

    /// Every register that can be read without effect: its row, its index, its value. VFMAILBOX, whose bits clear, is read
    /// by way of the mailbox; VTEICR, which clears too, and write-only registers are left out.
    pub fn dump(&mut self, mut each: impl FnMut(&'static Row, u32, u32)) {
        for row in TABLE {
            match row.access {
                Access::ReadOnly | Access::ReadWrite => {
                    for i in 0..row.count {
                        each(row, i, self.regs.0.read(row.offset + i * row.stride));
                    }
                }
                Access::ReadClears if row.offset == regs::VFMAILBOX.offset() => {
                    each(row, 0, self.mailbox.status(&self.regs).unwrap_or(u32::MAX));
                }
                _ => {}
            }
        }
    }
}
