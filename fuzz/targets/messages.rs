//! vhost-user messages: to a back-end, to a front-end that waits for answers, to its channel.
#![no_main]

mod input;

use input::Input;
use libfuzzer_sys::fuzz_target;
use vhost_proto::channel::Channel;
use vhost_proto::payload::Inflight;
use vhost_proto::{Backend, Command, Event, Frontend, Offer, Outcome, ProtocolFeatures, Reply, Step};

/// Feeds bytes in pieces whose sizes and descriptors are the input's, too.
fn pieces(input: &mut Input<'_>, mut take: impl FnMut(&[u8], u8) -> Option<usize>) {
    let mut wants = 12;
    while !input.is_empty() {
        let shape = input.u8();
        let len = match shape & 7 {
            0 => 1 + usize::from(shape >> 6),
            _ => wants,
        };
        // A whole message brings descriptors with its first piece.
        let bytes = input.bytes(len.min(wants).max(1));
        match take(bytes, (shape >> 3) & 7) {
            Some(next) => wants = next,
            None => return,
        }
    }
}

fn outcome(event: &Event<u32>, space: &[u8; 256]) -> Outcome<'static> {
    match event {
        Event::RingStop(index) => Outcome::Base(u32::from(*index)),
        Event::GetConfig { size, .. } if *size <= 8 => {
            let _ = space;
            Outcome::Config(&[0; 256][..*size as usize])
        }
        Event::GetConfig { .. } => Outcome::Config(&[]),
        Event::GetInflight(_) => Outcome::Inflight(Inflight {
            mmap_size: 0.into(),
            mmap_offset: 0.into(),
            num_queues: 0.into(),
            queue_size: 0.into(),
            padding: 0.into(),
        }),
        _ => Outcome::Done,
    }
}

fn backend(input: &mut Input<'_>) {
    let offer = Offer {
        features: !(1 << 26),
        protocol: ProtocolFeatures::from_bits_retain(input.u64() | 0x1_8001),
        rings: u16::from(input.u8()),
        queue_num: 4,
        mem_slots: 8,
    };
    let mut back = Box::new(Backend::<u32>::new(offer));
    pieces(input, |bytes, fds| {
        match back.receive(bytes, 0..u32::from(fds)).ok()? {
            Step::More => {}
            Step::Quiet(answer) => assert!(answer.is_none_or(|answer| answer.bytes().len() >= 12)),
            Step::Event(event) => {
                if let Event::RingStart { index, setup, .. } = &event {
                    assert!(*index < offer.rings && (1..=32768).contains(&setup.num));
                }
                let outcome = outcome(&event, &[0; 256]);
                back.finish(outcome).expect("an outcome of this event's kind");
            }
        }
        Some(back.wants())
    });
    let _ = back.closed();
}

fn frontend(input: &mut Input<'_>) {
    let mut front = Frontend::<u32>::new();
    let asks = [
        Command::GetFeatures,
        Command::GetProtocolFeatures,
        Command::SetProtocolFeatures(ProtocolFeatures::from_bits_retain(0x1_ffff)),
        Command::GetQueueNum,
        Command::GetStatus,
        Command::GetVringBase(1),
        Command::GetConfig(0, 24),
        Command::GetConfig(8, 256),
        Command::GetInflightFd(2, 256),
        Command::GetMaxMemSlots,
        Command::SetStatus(15),
    ];
    let mut waits = false;
    pieces(input, |bytes, fds| {
        if !waits {
            let ask = asks[usize::from(bytes.first().copied().unwrap_or(0)) % asks.len()];
            // What is not negotiated is refused.
            waits = front.command(ask, true).is_ok_and(|(_, answered)| answered);
        }
        if let Some(reply) = front.receive(bytes, 0..u32::from(fds)).ok()? {
            waits = false;
            if let Reply::Config(_, count) = reply {
                assert!(count == 0 || count == 24 || count == 256);
            }
        }
        Some(front.wants())
    });
    let _ = front.closed();
}

fn channel(input: &mut Input<'_>) {
    let mut channel = Channel::<u32>::new();
    pieces(input, |bytes, fds| {
        if let Some((_, Some(pending))) = channel.receive(bytes, 0..u32::from(fds)).ok()? {
            assert_eq!(pending.answer(true).bytes().len(), 20);
        }
        Some(channel.wants())
    });
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    match input.u8() % 4 {
        0 | 1 => backend(&mut input),
        2 => frontend(&mut input),
        _ => channel(&mut input),
    }
});
