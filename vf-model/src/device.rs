//! One VF: its registers, and what reading and writing them does.

use crate::complaint::{Complaint, Complaints};
use crate::dma::Windows;
use crate::interrupt::Interrupts;
use crate::kind::Kind;
use crate::mailbox::Mailbox;
use crate::register::{self, QUEUES, Register, RxRegister, TxRegister, ctrl, ivar, status, txdctl};
use crate::ring::{Halt, Ring};
use crate::rss::KEY_BYTES;
use crate::rx::{RxQueue, Spread};
use crate::stats::{Counters, Drops, Offloads};
use crate::tx::TxQueue;

/// Base and length of a ring are multiples of this many bytes.
const RING_UNIT: u64 = 128;

/// What a register access asks of the rest of the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Effect {
    /// VFCTRL.RST.
    pub reset: bool,
    /// The VF has read the PF's message.
    pub acknowledged: bool,
}

/// One virtual function.
pub(crate) struct Vf {
    pub kind: Kind,
    pub latency: u32,
    pub queues: usize,
    pub mailbox: Mailbox,
    pub interrupts: Interrupts,
    pub rx: [RxQueue; QUEUES],
    pub tx: [TxQueue; QUEUES],
    pub psrtype: u32,
    pub mrqc: u32,
    pub key: [u8; KEY_BYTES],
    pub table: [u8; 64],
    pub counters: Counters,
    pub drops: Drops,
    pub offloads: Offloads,
    pub complaints: Complaints,
    pub dma: Windows,
    /// VFLINKS.
    pub links: u32,
    /// Time, in ns.
    pub now: u64,
}

impl Vf {
    pub fn new(kind: Kind, queues: usize, latency: u32) -> Self {
        let mut vf = Self {
            kind,
            latency,
            queues,
            mailbox: Mailbox::new(latency),
            interrupts: Interrupts::default(),
            rx: std::array::from_fn(|_| RxQueue::default()),
            tx: std::array::from_fn(|_| TxQueue::default()),
            psrtype: 0,
            mrqc: 0,
            key: [0; KEY_BYTES],
            table: [0; 64],
            counters: Counters::default(),
            drops: Drops::default(),
            offloads: Offloads::default(),
            complaints: Complaints::default(),
            dma: Windows::default(),
            links: 0,
            now: 0,
        };
        vf.reset_all();
        vf
    }

    /// VFCTRL.RST, or a function-level reset: queues stop, interrupts and mailbox are as after power-on. Counters go on, and
    /// rings keep their registers, since a driver must not rely on either.
    pub fn reset(&mut self) {
        self.mailbox.reset_vf();
        self.interrupts.reset();
        for queue in &mut self.rx {
            queue.reset_vf();
        }
        for queue in &mut self.tx {
            queue.reset_vf();
        }
        self.psrtype = 0;
        self.mrqc = 0;
    }

    /// The PF resets the whole device.
    pub fn reset_all(&mut self) {
        self.interrupts.reset();
        for queue in &mut self.rx {
            queue.reset_all();
        }
        self.tx = std::array::from_fn(|_| TxQueue::default());
        self.psrtype = 0;
        self.mrqc = 0;
        self.key = [0; KEY_BYTES];
        self.table = [0; 64];
    }

    /// How this VF spreads frames, with the PF's settings where it has none of its own.
    pub fn spread<'a>(&'a self, shared: &'a crate::pf::Rss) -> Spread<'a> {
        // VFPSRTYPE.RQPL: how many bits of an entry count.
        let mask = match self.psrtype >> 29 {
            0 => 0,
            1 => 1,
            2 => 3,
            _ => 7,
        } & (self.queues as u8 - 1);
        if self.kind.has_own_rss() {
            let on = self.mrqc & register::mrqc::ENABLE != 0;
            Spread {
                types: if on { self.mrqc & 0xffff_0000 } else { 0 },
                key: &self.key,
                table: &self.table,
                mask,
            }
        } else {
            Spread {
                types: shared.types,
                key: &shared.key,
                table: &shared.table,
                mask,
            }
        }
    }

    pub fn read(&mut self, offset: u32) -> u32 {
        let Some(register) = register::decode(offset) else {
            self.complaints.add(Complaint::UnknownRegister);
            return 0;
        };
        let counters = &self.counters;
        match register {
            Register::Status => {
                let up = if self.links & register::links::UP == 0 {
                    0
                } else {
                    status::LINK_UP
                };
                status::MASTER | up
            }
            Register::Links => self.links,
            // Microseconds, milliseconds and seconds in ten bits each.
            Register::FreeTimer => {
                let part = |ns: u64, modulus: u64| (self.now / ns % modulus) as u32;
                part(1000, 1000) | part(1_000_000, 1000) << 10 | part(1_000_000_000, 4096) << 20
            }
            Register::Ctrl | Register::Eics | Register::Eimc => 0,
            Register::Eicr => self.interrupts.read_causes(),
            Register::Eims => self.interrupts.mask(),
            Register::Eiac => self.interrupts.auto_clear(),
            Register::Eiam => self.interrupts.auto_mask(),
            Register::Ivar(i) => self.interrupts.allocation[i],
            Register::IvarMisc => self.interrupts.misc,
            Register::RscInterval(i) => self.interrupts.rsc[i],
            Register::Eitr(i) => self.interrupts.throttle(i),
            Register::MailboxMemory(i) => self.mailbox.read_memory(i),
            Register::Mailbox => self.mailbox.read(),
            Register::PsrType => self.psrtype,
            Register::GoodRx => counters.packets_rx,
            Register::OctetsRxLow => counters.octets_rx as u32,
            Register::OctetsRxHigh => (counters.octets_rx >> 32) as u32,
            Register::MulticastRx => counters.multicast_rx,
            Register::GoodTx => counters.packets_tx,
            Register::OctetsTxLow => counters.octets_tx as u32,
            Register::OctetsTxHigh => (counters.octets_tx >> 32) as u32,
            Register::RxMemWrap => 0,
            Register::Mrqc | Register::RssKey(_) | Register::Reta(_) if !self.kind.has_own_rss() => {
                self.complaints.add(Complaint::AbsentRegister);
                0
            }
            Register::Mrqc => self.mrqc,
            Register::RssKey(i) => word(&self.key, i),
            Register::Reta(i) => word(&self.table, i),
            Register::Rx(q, _) | Register::Tx(q, _) if q >= self.queues => 0,
            Register::Rx(q, register) => read_rx(&mut self.rx[q], register),
            Register::Tx(q, register) => read_tx(&mut self.tx[q], register),
        }
    }

    pub fn write(&mut self, offset: u32, value: u32) -> Effect {
        let mut effect = Effect::default();
        let Some(register) = register::decode(offset) else {
            self.complaints.add(Complaint::UnknownRegister);
            return effect;
        };
        match register {
            Register::Ctrl => effect.reset = value & ctrl::RST != 0,
            Register::Eicr => self.interrupts.clear(value),
            Register::Eics => self.interrupts.set(value),
            Register::Eims => self.interrupts.unmask(value),
            Register::Eimc => self.interrupts.mask_off(value),
            Register::Eiac => self.interrupts.set_auto_clear(value),
            Register::Eiam => self.interrupts.set_auto_mask(value),
            Register::Ivar(i) => {
                self.check_vectors(value);
                self.interrupts.allocation[i] = value;
            }
            Register::IvarMisc => {
                self.check_vectors(value & 0xff);
                self.interrupts.misc = value & 0xff;
            }
            Register::RscInterval(i) => self.interrupts.rsc[i] = value,
            Register::Eitr(i) => self.interrupts.set_throttle(i, value),
            Register::MailboxMemory(i) => {
                if !self.mailbox.write_memory(i, value) {
                    self.complaints.add(Complaint::MailboxNotOwned);
                }
            }
            Register::Mailbox => {
                let asked = self.mailbox.write(value);
                if asked.not_owned {
                    self.complaints.add(Complaint::MailboxNotOwned);
                }
                effect.acknowledged = asked.acknowledged;
            }
            Register::PsrType => self.psrtype = value,
            Register::Mrqc | Register::RssKey(_) | Register::Reta(_) if !self.kind.has_own_rss() => {
                self.complaints.add(Complaint::AbsentRegister);
            }
            Register::Mrqc => self.mrqc = value,
            Register::RssKey(i) => self.key[4 * i..4 * i + 4].copy_from_slice(&value.to_le_bytes()),
            Register::Reta(i) => self.table[4 * i..4 * i + 4].copy_from_slice(&value.to_le_bytes()),
            Register::Rx(q, register) => self.write_rx(q, register, value),
            Register::Tx(q, register) => self.write_tx(q, register, value),
            Register::Status
            | Register::Links
            | Register::FreeTimer
            | Register::GoodRx
            | Register::OctetsRxLow
            | Register::OctetsRxHigh
            | Register::MulticastRx
            | Register::GoodTx
            | Register::OctetsTxLow
            | Register::OctetsTxHigh
            | Register::RxMemWrap => self.complaints.add(Complaint::ReadOnlyRegister),
        }
        effect
    }

    fn check_vectors(&mut self, value: u32) {
        for entry in value.to_le_bytes() {
            if entry & ivar::VALID != 0 && usize::from(entry & ivar::VECTOR) >= register::VECTORS {
                self.complaints.add(Complaint::BadVector);
            }
        }
    }

    fn write_rx(&mut self, q: usize, register: RxRegister, value: u32) {
        let allowed = q < self.queues;
        let queue = &mut self.rx[q];
        let complaints = &mut self.complaints;
        match register {
            RxRegister::BaseLow => set_base(&mut queue.ring, low, value, complaints),
            RxRegister::BaseHigh => set_base(&mut queue.ring, high, value, complaints),
            RxRegister::Length => set_length(&mut queue.ring, value, complaints),
            RxRegister::Head => set_head(&mut queue.ring, value, complaints),
            RxRegister::Tail => queue.ring.write_tail(value, complaints),
            RxRegister::Dca => queue.dca = value,
            RxRegister::Rsc => queue.rsc = value,
            RxRegister::Srrctl => queue.srrctl = value,
            RxRegister::Control => queue.ring.write_control(value, self.latency, allowed, complaints),
        }
    }

    fn write_tx(&mut self, q: usize, register: TxRegister, value: u32) {
        let allowed = q < self.queues;
        let queue = &mut self.tx[q];
        let complaints = &mut self.complaints;
        match register {
            TxRegister::BaseLow => set_base(&mut queue.ring, low, value, complaints),
            TxRegister::BaseHigh => set_base(&mut queue.ring, high, value, complaints),
            TxRegister::Length => set_length(&mut queue.ring, value, complaints),
            TxRegister::Head => set_head(&mut queue.ring, value, complaints),
            TxRegister::Tail => queue.ring.write_tail(value, complaints),
            TxRegister::Dca => queue.dca = value,
            TxRegister::WritebackLow => queue.writeback = low(queue.writeback, value),
            TxRegister::WritebackHigh => queue.writeback = high(queue.writeback, value),
            // What is done is written back at once: there is nothing to flush.
            TxRegister::Control => {
                let value = value & !txdctl::FLUSH;
                queue.ring.write_control(value, self.latency, allowed, complaints);
            }
        }
    }

    /// Why queues have stopped: receive, then transmit.
    pub fn halts(&self) -> impl Iterator<Item = Halt> + '_ {
        let rx = self.rx.iter().map(|queue| &queue.ring);
        let tx = self.tx.iter().map(|queue| &queue.ring);
        rx.chain(tx).filter_map(|ring| ring.halted)
    }
}

fn word(bytes: &[u8], index: usize) -> u32 {
    u32::from_le_bytes(bytes[4 * index..4 * index + 4].try_into().expect("4 bytes"))
}

fn low(old: u64, value: u32) -> u64 {
    old & !0xffff_ffff | u64::from(value)
}

fn high(old: u64, value: u32) -> u64 {
    old & 0xffff_ffff | u64::from(value) << 32
}

/// Rings begin at multiples of 128 bytes: lower bits are not kept.
fn set_base(ring: &mut Ring, half: fn(u64, u32) -> u64, value: u32, complaints: &mut Complaints) {
    ring.check_idle(complaints);
    let base = half(ring.base, value);
    if !base.is_multiple_of(RING_UNIT) {
        complaints.add(Complaint::BadRing);
    }
    ring.base = base & !(RING_UNIT - 1);
}

/// Rings are multiples of 128 bytes long, 20 bits at most: other bits are not kept.
fn set_length(ring: &mut Ring, length: u32, complaints: &mut Complaints) {
    ring.check_idle(complaints);
    let kept = length & 0x000f_ff80;
    if kept != length {
        complaints.add(Complaint::BadRing);
    }
    ring.length = kept;
}

fn set_head(ring: &mut Ring, head: u32, complaints: &mut Complaints) {
    ring.check_idle(complaints);
    ring.head = head & 0xffff;
}

fn read_rx(queue: &mut RxQueue, register: RxRegister) -> u32 {
    match register {
        RxRegister::BaseLow => queue.ring.base as u32,
        RxRegister::BaseHigh => (queue.ring.base >> 32) as u32,
        RxRegister::Length => queue.ring.length,
        RxRegister::Dca => queue.dca,
        RxRegister::Head => queue.ring.head,
        RxRegister::Srrctl => queue.srrctl,
        RxRegister::Tail => queue.ring.tail,
        RxRegister::Control => queue.ring.read_control(),
        RxRegister::Rsc => queue.rsc,
    }
}

fn read_tx(queue: &mut TxQueue, register: TxRegister) -> u32 {
    match register {
        TxRegister::BaseLow => queue.ring.base as u32,
        TxRegister::BaseHigh => (queue.ring.base >> 32) as u32,
        TxRegister::Length => queue.ring.length,
        TxRegister::Dca => queue.dca,
        TxRegister::Head => queue.ring.head,
        TxRegister::Tail => queue.ring.tail,
        TxRegister::Control => queue.ring.read_control(),
        TxRegister::WritebackLow => queue.writeback as u32,
        TxRegister::WritebackHigh => (queue.writeback >> 32) as u32,
    }
}
