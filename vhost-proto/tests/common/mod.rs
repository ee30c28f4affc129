//! What the tests share: descriptors that are counted, messages by hand, and a wire.

#![allow(dead_code, reason = "not every test uses all of it")]

use std::cell::Cell;
use std::rc::Rc;

use vhost_proto::{Backend, Error, Event, Offer, Outcome, ProtocolFeatures, Step};

/// How many descriptors are open.
#[derive(Clone, Default)]
pub struct Open(Rc<Cell<usize>>);

impl Open {
    pub fn fd(&self) -> Fd {
        self.0.set(self.0.get() + 1);
        Fd(Rc::clone(&self.0))
    }

    pub fn fds(&self, count: usize) -> Vec<Fd> {
        (0..count).map(|_| self.fd()).collect()
    }

    pub fn count(&self) -> usize {
        self.0.get()
    }
}

/// A descriptor: dropping it closes it.
#[derive(Debug)]
pub struct Fd(Rc<Cell<usize>>);

impl Drop for Fd {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

pub const NEED_REPLY: u32 = 8;

/// A message as a front-end sends it.
pub fn message(code: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [code, 1 | flags, payload.len() as u32] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(payload);
    bytes
}

/// One with a number.
pub fn number(code: u32, flags: u32, value: u64) -> Vec<u8> {
    message(code, flags, &value.to_le_bytes())
}

/// One with a ring and a number.
pub fn state(code: u32, index: u32, num: u32) -> Vec<u8> {
    message(code, 0, &[index.to_le_bytes(), num.to_le_bytes()].concat())
}

/// A reply.
pub fn reply(code: u32, payload: &[u8]) -> Vec<u8> {
    message(code, 4, payload)
}

/// A payload of 64-bit words.
pub fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A memory table of these regions: guest address, size, user address, offset.
pub fn table(flags: u32, regions: &[[u64; 4]]) -> Vec<u8> {
    message(
        5,
        flags,
        &[words(&[regions.len() as u64]), words(regions.as_flattened())].concat(),
    )
}

/// SET_VRING_ADDR.
pub fn addr(index: u32, desc: u64, used: u64, avail: u64) -> Vec<u8> {
    message(9, 0, &words(&[index.into(), desc, used, avail, 0]))
}

/// What a network back-end offers; all that this crate implements, so that a test reaches all of it.
pub fn offer() -> Offer {
    Offer {
        features: 0xd_7c66_e7cb,
        protocol: ProtocolFeatures::from_bits_retain(0x10cbf)
            | ProtocolFeatures::CONFIG
            | ProtocolFeatures::INFLIGHT_SHMFD
            | ProtocolFeatures::RESET_DEVICE
            | ProtocolFeatures::INBAND_NOTIFICATIONS
            | ProtocolFeatures::CONFIGURE_MEM_SLOTS,
        rings: 4,
        queue_num: 2,
        mem_slots: 32,
    }
}

/// Feeds whole messages to a back-end, in the pieces that it wants; handles its events by `outcome`. What happened, as
/// text, and what it sent.
pub struct Peer {
    pub back: Backend<Fd>,
    pub log: Vec<String>,
    pub sent: Vec<Vec<u8>>,
    /// Descriptors that came with events, kept open.
    pub kept: Vec<String>,
}

impl Peer {
    pub fn new(offer: Offer) -> Self {
        Peer {
            back: Backend::new(offer),
            log: Vec::new(),
            sent: Vec::new(),
            kept: Vec::new(),
        }
    }

    pub fn give(&mut self, bytes: &[u8], fds: Vec<Fd>) -> Result<(), Error> {
        let (mut rest, mut fds) = (bytes, Some(fds));
        while !rest.is_empty() {
            let (piece, later) = rest.split_at(self.back.wants().min(rest.len()));
            rest = later;
            match self.back.receive(piece, fds.take().into_iter().flatten())? {
                Step::More => {}
                Step::Quiet(answer) => self.sent.extend(answer.map(|a| a.bytes().to_vec())),
                Step::Event(event) => {
                    let answer = self.back.finish(outcome(&event))?;
                    self.log.push(describe(&event));
                    self.sent.extend(answer.map(|a| a.bytes().to_vec()));
                }
            }
        }
        Ok(())
    }

    /// What was logged since the last look.
    pub fn events(&mut self) -> Vec<String> {
        std::mem::take(&mut self.log)
    }

    /// What was sent since the last look.
    pub fn answers(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.sent)
    }
}

/// The outcome of a back-end that does all that it is asked for.
pub fn outcome(event: &Event<Fd>) -> Outcome<'static> {
    static SPACE: [u8; 256] = [0xA5; 256];
    match event {
        Event::RingStop(index) => Outcome::Base(0x100 + u32::from(*index)),
        Event::GetConfig { size, .. } => Outcome::Config(&SPACE[..*size as usize]),
        Event::GetInflight(inflight) => Outcome::Inflight(*inflight),
        _ => Outcome::Done,
    }
}

/// An event, short.
pub fn describe(event: &Event<Fd>) -> String {
    let fd = |fd: &Option<Fd>| if fd.is_some() { "fd" } else { "none" };
    match event {
        Event::Features(features) => format!("features {features:#x}"),
        Event::Memory(table) => {
            let regions: Vec<String> = table
                .iter()
                .flatten()
                .map(|(r, _)| format!("{:#x}+{:#x}@{:#x}:{:#x}", r.guest_addr, r.size, r.user_addr, r.offset))
                .collect();
            format!("memory {}", regions.join(" "))
        }
        Event::RingStart {
            index,
            setup,
            kick,
            enabled,
        } => format!(
            "start {index} num {} base {:#x} at {:#x} {:#x} {:#x} kick {} enabled {enabled}",
            setup.num,
            setup.base,
            setup.addr.desc,
            setup.addr.avail,
            setup.addr.used,
            fd(kick)
        ),
        Event::RingStop(index) => format!("stop {index}"),
        Event::RingCall(index, call) => format!("call {index} {}", fd(call)),
        Event::RingErr(index, err) => format!("err {index} {}", fd(err)),
        Event::RingEnable(index, on) => format!("enable {index} {on}"),
        Event::RingKick(index) => format!("kick {index}"),
        Event::Status(status) => format!("status {status:#x}"),
        Event::Mtu(mtu) => format!("mtu {mtu}"),
        Event::Rarp(mac) => format!("rarp {mac:02x?}"),
        Event::AddRegion(r, _) => format!("add {:#x}+{:#x}", r.guest_addr, r.size),
        Event::RemoveRegion(r) => format!("remove {:#x}+{:#x}", r.guest_addr, r.size),
        Event::BackendChannel(_) => "channel".into(),
        Event::GetInflight(i) => format!("get inflight {} {}", i.num_queues, i.queue_size),
        Event::SetInflight(i, _) => format!("set inflight {}", i.mmap_size),
        Event::GetConfig { offset, size } => format!("get config {offset} {size}"),
        Event::SetConfig(offset, bytes, len) => format!("set config {offset} {:?}", &bytes[..*len]),
        Event::Reset => "reset".into(),
        other => format!("{other:?}"),
    }
}
