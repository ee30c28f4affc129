//! Whatever bytes come, in whatever pieces, with whatever descriptors: no panic, and no descriptor left open.
//!
//! `PROPTEST_CASES=100000 cargo test -p vhost-proto --test hostile` for more.

mod common;

use common::{NEED_REPLY, Open, addr, describe, message, number, offer, outcome, state, table, words};
use proptest::prelude::*;
use vhost_proto::channel::Channel;
use vhost_proto::{Backend, Command, Frontend, ProtocolFeatures, Region, Reply, RingAddr, Step};

/// A session with every message that a back-end takes.
fn session() -> Vec<(Vec<u8>, usize)> {
    let mut all = vec![
        (message(3, 0, &[]), 0),
        (message(1, 0, &[]), 0),
        (message(15, 0, &[]), 0),
        (number(16, 0, offer().protocol.bits()), 0),
        (message(17, 0, &[]), 0),
        (message(36, 0, &[]), 0),
        (message(21, NEED_REPLY, &[]), 1),
        (number(13, 0, 0), 1),
        (number(14, 0, 1), 1),
        (number(2, 0, 0x9_5000_8000), 0),
        (number(39, NEED_REPLY, 0x0b), 0),
        (message(40, 0, &[]), 0),
        (
            table(NEED_REPLY, &[[0, 0x1000, 0x7000, 0], [0x1000, 0x1000, 0x9000, 0x1000]]),
            2,
        ),
        (message(37, NEED_REPLY, &words(&[0, 0x5000, 0x1000, 0x5000, 0])), 1),
        (message(38, 0, &words(&[0, 0x5000, 0x1000, 0x5000, 0])), 1),
    ];
    for ring in 0..2 {
        all.push((state(8, ring, 256), 0));
        all.push((state(10, ring, 0), 0));
        all.push((addr(ring, 0x7000, 0x7400, 0x7800), 0));
        all.push((number(12, 0, u64::from(ring) | u64::from(ring) << 8), 1 - ring as usize));
        all.push((state(18, ring, 1), 0));
    }
    all.extend([
        (number(20, NEED_REPLY, 1500), 0),
        (number(19, 0, 0x5634_1200_5452), 0),
        (
            message(24, 0, &[0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            0,
        ),
        (message(25, 0, &[0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 9, 9]), 0),
        (message(31, 0, &words(&[0, 0, 0x0100_0002])), 0),
        (message(32, 0, &words(&[4096, 0, 0x0100_0002])), 1),
        (state(35, 1, 0), 0),
        (state(11, 0, 0), 0),
        (message(34, 0, &[]), 0),
        (state(11, 1, 0), 0),
    ]);
    all
}

/// Gives bytes to a back-end in pieces, descriptors with the first piece of what `pieces` says. `false`: it died.
fn feed(back: &mut Backend<common::Fd>, open: &Open, mut bytes: &[u8], fds: usize, cut: usize) -> bool {
    let mut fds = Some(open.fds(fds));
    while !bytes.is_empty() {
        let wants = back.wants();
        assert!(wants > 0 && wants <= 512, "wants {wants}");
        let (piece, rest) = bytes.split_at(wants.min(bytes.len()).min(cut));
        bytes = rest;
        match back.receive(piece, fds.take().into_iter().flatten()) {
            Err(error) => {
                assert!(!error.to_string().is_empty());
                return false;
            }
            Ok(Step::Event(event)) => {
                assert!(!describe(&event).is_empty());
                if let Some(answer) = back.finish(outcome(&event)).expect("a matching outcome") {
                    assert!(answer.bytes().len() >= 12);
                }
            }
            Ok(_) => {}
        }
    }
    true
}

#[test]
fn the_session_is_valid() {
    let open = Open::default();
    for cut in [1, 7, 600] {
        let mut back = Backend::new(offer());
        for (at, (bytes, fds)) in session().iter().enumerate() {
            assert!(
                feed(&mut back, &open, bytes, *fds, cut),
                "message {at}, pieces of {cut}"
            );
            assert_eq!(open.count(), 0);
        }
        assert_eq!(back.closed(), Ok(()));
    }
}

#[derive(Clone, Debug)]
enum Mutation {
    /// One byte has another value.
    Byte(usize, u8),
    /// A message is cut to this length (and the next follows at once).
    Cut(usize, usize),
    /// A message comes a second time.
    Twice(usize),
    /// Two messages change places.
    Swap(usize, usize),
    /// A message has so many descriptors.
    Fds(usize, usize),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let at = 0..64usize;
    prop_oneof![
        4 => (at.clone(), any::<u8>(), 0..64usize).prop_map(|(at, value, byte)| Mutation::Byte(at * 64 + byte, value)),
        1 => (at.clone(), 0..64usize).prop_map(|(at, len)| Mutation::Cut(at, len)),
        1 => at.clone().prop_map(Mutation::Twice),
        1 => (at.clone(), at.clone()).prop_map(|(a, b)| Mutation::Swap(a, b)),
        2 => (at, 0..12usize).prop_map(|(at, fds)| Mutation::Fds(at, fds)),
    ]
}

fn mutate(all: &mut Vec<(Vec<u8>, usize)>, mutation: &Mutation) {
    let count = all.len();
    match *mutation {
        Mutation::Byte(at, value) => {
            let bytes = &mut all[at / 64 % count].0;
            let len = bytes.len().max(1);
            if let Some(byte) = bytes.get_mut(at % 64 % len) {
                *byte = value;
            }
        }
        Mutation::Cut(at, len) => all[at % count].0.truncate(len),
        Mutation::Twice(at) => all.insert(at % count, all[at % count].clone()),
        Mutation::Swap(a, b) => all.swap(a % count, b % count),
        Mutation::Fds(at, fds) => all[at % count].1 = fds,
    }
}

proptest! {
    #[test]
    fn a_back_end_survives_mutated_sessions(
        mutations in prop::collection::vec(mutation(), 1..6),
        cut in 1..600usize,
    ) {
        let open = Open::default();
        let mut all = session();
        for mutation in &mutations {
            mutate(&mut all, mutation);
        }
        let mut back = Backend::new(offer());
        for (bytes, fds) in &all {
            if !feed(&mut back, &open, bytes, *fds, cut) {
                prop_assert_eq!(open.count(), 0, "a dead machine holds a descriptor");
                break;
            }
        }
        let _ = back.closed();
        prop_assert_eq!(open.count(), 0, "a closed machine holds a descriptor");
    }

    #[test]
    fn a_back_end_survives_random_bytes(
        bytes in prop::collection::vec(any::<u8>(), 0..1024),
        codes in prop::collection::vec((0u32..48, 0u32..16, 0u32..80, 0..10usize), 0..16),
        cut in 1..64usize,
    ) {
        let open = Open::default();
        let mut back = Backend::new(offer());
        // Headers that are nearly right get further than noise does.
        let mut noise = bytes.iter().copied().cycle();
        for (code, flags, size, fds) in codes {
            let payload: Vec<u8> = (0..size).map(|_| if bytes.is_empty() { 0 } else { noise.next().unwrap() }).collect();
            if !feed(&mut back, &open, &message(code, flags & !2, &payload), fds, cut) {
                prop_assert_eq!(open.count(), 0);
                back = Backend::new(offer());
            }
        }
        feed(&mut back, &open, &bytes, 3, cut);
        drop(back);
        prop_assert_eq!(open.count(), 0);
    }

    #[test]
    fn a_front_end_survives_any_answer(
        which in 0..6usize,
        bytes in prop::collection::vec(any::<u8>(), 0..64),
        patch in prop::collection::vec((0..32usize, any::<u8>()), 0..3),
        fds in 0..10usize,
        cut in 1..64usize,
    ) {
        let open = Open::default();
        let mut front = Frontend::new();
        let commands = [
            (Command::GetFeatures, 1u32),
            (Command::GetVringBase(1), 11),
            (Command::SetVringErr(0, true), 14),
            (Command::SetMemTable(&[]), 5),
            (Command::SetOwner, 3),
            (Command::SetVringNum(0, 4), 8),
        ];
        let (command, code) = commands[which];
        front.command(command, true).unwrap();
        let mut answer = common::reply(code, &bytes[..bytes.len().min(8)]);
        for (at, value) in patch {
            let len = answer.len();
            answer[at % len] = value;
        }
        answer.extend(bytes);
        let mut rest = &answer[..];
        let mut fds = Some(open.fds(fds));
        while !rest.is_empty() {
            let (piece, later) = rest.split_at(front.wants().min(rest.len()).min(cut));
            rest = later;
            if front.receive(piece, fds.take().into_iter().flatten()).is_err() {
                break;
            }
        }
        let _ = front.closed();
        prop_assert_eq!(open.count(), 0);
    }

    #[test]
    fn a_channel_survives_any_request(
        headers in prop::collection::vec((0u32..12, 0u32..16, prop::collection::vec(any::<u8>(), 0..48), 0..4usize), 1..8),
        cut in 1..64usize,
    ) {
        let open = Open::default();
        let mut channel = Channel::new();
        'all: for (code, flags, payload, fds) in headers {
            let bytes = message(code, flags & !2, &payload);
            let (mut rest, mut fds) = (&bytes[..], Some(open.fds(fds)));
            while !rest.is_empty() {
                let (piece, later) = rest.split_at(channel.wants().min(rest.len()).min(cut));
                rest = later;
                match channel.receive(piece, fds.take().into_iter().flatten()) {
                    Ok(Some((_, Some(pending)))) => assert_eq!(pending.answer(true).bytes().len(), 20),
                    Ok(_) => {}
                    Err(_) => {
                        prop_assert_eq!(open.count(), 0);
                        break 'all;
                    }
                }
            }
        }
        drop(channel);
        prop_assert_eq!(open.count(), 0);
    }

    /// Both machines, a pipe that cuts the bytes anywhere: what goes in on one side comes out on the other.
    #[test]
    fn both_sides_over_a_pipe(cuts in prop::collection::vec(1..40usize, 1..50), ack: bool, base: u32, mtu in 68..=u16::MAX) {
        let open = Open::default();
        let (mut front, mut back) = (Frontend::<common::Fd>::new(), Backend::new(offer()));
        let mut cuts = cuts.iter().copied().cycle();
        let regions = [
            Region { guest_addr: 0, size: 0x1000, user_addr: 0x7000, offset: 0 },
            Region { guest_addr: 0x1000, size: 0x2000, user_addr: 0x8000, offset: 0x1000 },
        ];
        let ring = RingAddr { desc: 0x7000, avail: 0x7100, used: 0x7200 };
        let commands = [
            (Command::SetOwner, None),
            (Command::GetFeatures, None),
            (Command::GetProtocolFeatures, None),
            (Command::SetProtocolFeatures(offer().protocol & !ProtocolFeatures::RARP), None),
            (Command::GetQueueNum, None),
            (Command::GetMaxMemSlots, None),
            (Command::SetBackendReqFd, Some("channel".into())),
            (Command::SetVringCall(0, true), Some("call 0 fd".into())),
            (Command::SetVringCall(1, false), Some("call 1 none".into())),
            (Command::SetVringErr(2, true), Some("err 2 fd".into())),
            (Command::SetFeatures(1 << 32 | 1 << 30), Some("features 0x140000000".into())),
            (Command::SetStatus(11), Some("status 0xb".into())),
            (Command::GetStatus, None),
            (Command::SetMemTable(&regions), Some("memory 0x0+0x1000@0x7000:0x0 0x1000+0x2000@0x8000:0x1000".into())),
            (Command::AddMemReg(regions[0]), Some("add 0x0+0x1000".into())),
            (Command::RemMemReg(regions[1]), Some("remove 0x1000+0x2000".into())),
            (Command::SetVringNum(0, 16), None),
            (Command::SetVringBase(0, base), None),
            (Command::SetVringAddr(0, ring), None),
            (
                Command::SetVringKick(0, true),
                Some(format!("start 0 num 16 base {base:#x} at 0x7000 0x7100 0x7200 kick fd enabled false")),
            ),
            (Command::SetVringEnable(0, true), Some("enable 0 true".into())),
            (Command::NetSetMtu(mtu), Some(format!("mtu {mtu}"))),
            (Command::GetConfig(4, 6), Some("get config 4 6".into())),
            (Command::SetConfig(4, &[1, 2]), Some("set config 4 [1, 2]".into())),
            (Command::GetInflightFd(2, 16), Some("get inflight 2 16".into())),
            (Command::ResetDevice, Some("reset".into())),
            (Command::GetVringBase(0), Some("stop 0".into())),
        ];
        for (command, expected) in commands {
            let (out, answered) = front.command(command, ack).unwrap();
            let mut fds = Some(open.fds(Frontend::<common::Fd>::fds_of(&command)));
            let (mut rest, mut seen, mut answer) = (out.bytes(), None, None);
            while !rest.is_empty() {
                let (piece, later) = rest.split_at(back.wants().min(rest.len()).min(cuts.next().unwrap()));
                rest = later;
                match back.receive(piece, fds.take().into_iter().flatten()).unwrap() {
                    Step::More => {}
                    Step::Quiet(quiet) => answer = quiet,
                    Step::Event(event) => {
                        answer = back.finish(outcome(&event)).unwrap();
                        seen = Some(describe(&event));
                    }
                }
            }
            prop_assert_eq!(seen, expected, "{:?}", command);
            prop_assert_eq!(answer.is_some(), answered, "{:?}", command);
            prop_assert_eq!(open.count(), 0);
            let Some(answer) = answer else { continue };
            let (mut rest, mut reply) = (answer.bytes(), None);
            while !rest.is_empty() {
                let (piece, later) = rest.split_at(front.wants().min(rest.len()).min(cuts.next().unwrap()));
                rest = later;
                prop_assert!(reply.is_none());
                reply = front.receive(piece, []).unwrap();
            }
            match (command, reply.unwrap()) {
                (Command::GetFeatures, Reply::Features(f)) => prop_assert_eq!(f, offer().features | 1 << 30),
                (Command::GetProtocolFeatures, Reply::ProtocolFeatures(f)) => prop_assert_eq!(f, offer().protocol),
                (Command::GetQueueNum, Reply::QueueNum(n)) => prop_assert_eq!(n, 2),
                (Command::GetMaxMemSlots, Reply::MaxMemSlots(n)) => prop_assert_eq!(n, 32),
                (Command::GetStatus, Reply::Status(s)) => prop_assert_eq!(s, 11),
                (Command::GetVringBase(0), Reply::VringBase(0, b)) => prop_assert_eq!(b, 0x100),
                (Command::GetConfig(..), Reply::Config(bytes, 6)) => prop_assert_eq!(&bytes[..6], &[0xA5; 6]),
                (Command::GetInflightFd(..), Reply::Inflight(i, None)) => prop_assert_eq!(i.num_queues.get(), 2),
                (_, Reply::Ack) => prop_assert!(ack),
                (command, reply) => prop_assert!(false, "{:?} was answered with {:?}", command, reply),
            }
        }
    }
}
