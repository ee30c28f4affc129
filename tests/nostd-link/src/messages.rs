//! `vhost-proto`: a negotiation, from SET_OWNER to a running ring and its end, between the two state machines.

use core::sync::atomic::{AtomicU32, Ordering};

use vhost_proto::{Backend, Command, Event, Frontend, Offer, Outcome, ProtocolFeatures, Region, Reply, RingAddr, Step};

use crate::{Outcome as Checked, check};

/// Descriptors that are open.
static OPEN: AtomicU32 = AtomicU32::new(0);

/// Stands for a file descriptor: counted while it is open.
#[derive(Debug)]
struct Fd(u32);

impl Fd {
    fn open(number: u32) -> Self {
        OPEN.fetch_add(1, Ordering::Relaxed);
        Fd(number)
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        OPEN.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What the back-end was told.
#[derive(Default)]
struct Told {
    features: u64,
    region: Option<Region>,
    memory_fd: u32,
    num: u32,
    base: u32,
    kick: u32,
    enabled: bool,
    stopped: bool,
}

fn handle(event: Event<Fd>, told: &mut Told) -> Outcome<'static> {
    match event {
        Event::Features(features) => told.features = features,
        Event::Memory(regions) => {
            for (region, fd) in regions.into_iter().flatten() {
                told.region = Some(region);
                told.memory_fd = fd.0;
            }
        }
        Event::RingStart {
            setup, kick, enabled, ..
        } => {
            told.num = setup.num;
            told.base = setup.base;
            told.kick = kick.map_or(0, |fd| fd.0);
            told.enabled |= enabled;
        }
        Event::RingEnable(_, on) => told.enabled = on,
        Event::RingStop(_) => {
            told.stopped = true;
            return Outcome::Base(told.base + 7);
        }
        _ => {}
    }
    Outcome::Done
}

/// One command there, and its reply back if it has one. `fd` goes along.
fn exchange(
    front: &mut Frontend<Fd>,
    back: &mut Backend<Fd>,
    told: &mut Told,
    command: Command<'_>,
    fd: Option<Fd>,
) -> Result<Option<Reply<Fd>>, u8> {
    let (message, answered) = front.command(command, false).map_err(|_| 40u8)?;
    let mut bytes = message.bytes();
    let mut fd = fd;
    let mut answer = None;
    while !bytes.is_empty() {
        let (piece, rest) = bytes.split_at(back.wants().min(bytes.len()));
        bytes = rest;
        match back.receive(piece, fd.take()).map_err(|_| 41u8)? {
            Step::More => {}
            Step::Quiet(out) => answer = out,
            Step::Event(event) => {
                let outcome = handle(event, told);
                answer = back.finish(outcome).map_err(|_| 42u8)?;
            }
        }
    }
    let Some(answer) = answer else {
        return if answered { Err(43) } else { Ok(None) };
    };
    let mut bytes = answer.bytes();
    let mut reply = None;
    while !bytes.is_empty() {
        let (piece, rest) = bytes.split_at(front.wants().min(bytes.len()));
        bytes = rest;
        reply = front.receive(piece, None).map_err(|_| 44u8)?;
    }
    Ok(reply)
}

/// Checks 40 to 59. `seed` is not known at compile time.
///
/// # Errors
/// The number of the check.
pub fn run(seed: u64) -> Checked {
    let offered = 1 << 32 | (seed & 0xff);
    let protocol = ProtocolFeatures::MQ | ProtocolFeatures::REPLY_ACK;
    let offer = Offer {
        features: offered,
        protocol,
        rings: 2,
        queue_num: 1,
        mem_slots: 8,
    };
    let (mut front, mut back) = (Frontend::<Fd>::new(), Backend::<Fd>::new(offer));
    let mut told = Told::default();
    let region = [Region {
        guest_addr: 0x1000,
        size: 0x10_0000,
        user_addr: 0x7000_0000,
        offset: 0,
    }];
    let mut ask = |command, fd| exchange(&mut front, &mut back, &mut told, command, fd);

    ask(Command::SetOwner, None)?;
    let features = match ask(Command::GetFeatures, None)? {
        Some(Reply::Features(features)) => features,
        _ => return Err(45),
    };
    check(features == offered | 1 << 30, 46)?;
    check(
        matches!(
            ask(Command::GetProtocolFeatures, None)?,
            Some(Reply::ProtocolFeatures(_))
        ),
        47,
    )?;
    ask(Command::SetProtocolFeatures(protocol), None)?;
    ask(Command::SetFeatures(features), None)?;
    ask(Command::SetMemTable(&region), Some(Fd::open(7)))?;
    ask(Command::SetVringNum(0, 256), None)?;
    ask(Command::SetVringBase(0, 3), None)?;
    let addr = RingAddr {
        desc: 0x7000_0000,
        avail: 0x7000_1000,
        used: 0x7000_2000,
    };
    ask(Command::SetVringAddr(0, addr), None)?;
    ask(Command::SetVringCall(0, true), Some(Fd::open(8)))?;
    ask(Command::SetVringKick(0, true), Some(Fd::open(9)))?;
    ask(Command::SetVringEnable(0, true), None)?;
    check(
        matches!(ask(Command::GetVringBase(0), None)?, Some(Reply::VringBase(0, 10))),
        48,
    )?;

    check(told.features == features && told.region == Some(region[0]), 49)?;
    check(told.memory_fd == 7 && told.kick == 9, 50)?;
    check(told.num == 256 && told.base == 3 && told.enabled && told.stopped, 51)?;
    drop((front, back));
    check(OPEN.load(Ordering::Relaxed) == 0, 52)
}
