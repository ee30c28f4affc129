//! Device and PF keep to no rule. No panic, no access outside, no loop without end, no cookie twice, and what comes out is
//! well-formed. From one seed (IXGBEVF_SEED), for as many steps as asked for (IXGBEVF_STEPS).

mod common;

use common::*;
use ixgbevf::{
    Error, Event, L4, Model, Offload, Registers, RxOptions, Segment, Segmentation, Setup, TxOptions, Vf, XcastMode,
};
use proptest::prelude::*;
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| {
        text.parse().unwrap_or_else(|_| panic!("{name} is not a number"))
    })
}

const MODELS: [Model; 5] = [Model::I82599, Model::X540, Model::X550, Model::X550EmX, Model::X550EmA];

/// A VF whose queues run.
fn running() -> (Vf<Double, Time>, Double) {
    let (mut vf, double) = known(Model::X550);
    vf.configure(&Setup::default()).unwrap();
    (vf, double)
}

/// A quadword that a device might write, or might not.
fn quad(random: &Random) -> u64 {
    match random.below(4) {
        0 => random.next(),
        1 => random.next() & random.next() & random.next(),
        2 => u64::MAX,
        // A status with DD, and a length.
        _ => 1 | random.below(4) | random.below(2048) << 32,
    }
}

#[test]
fn a_receive_queue_facing_any_device() {
    let random = Random::new(number("IXGBEVF_SEED", 0x5eed_0001));
    let steps = number("IXGBEVF_STEPS", 200_000);
    let (mut frames, mut bad, mut lies) = (0u64, 0u64, 0u64);
    let mut done = 0;
    while done < steps {
        let size = 64 + 8 * random.below(12) as u16;
        let (mut vf, double) = running();
        let buffer_len = 1024 * (1 + random.below(4) as u32);
        let (mut queue, block) = rx_queue(
            &double,
            0,
            size,
            RxOptions {
                buffer_len,
                vlan_strip: false,
            },
        );
        vf.start_rx(&mut queue).unwrap();
        let mut flight = BTreeSet::new();
        let mut next = 0;
        // What the pieces of a frame say so far: pieces and bytes.
        let mut open: Option<(u32, u32)> = None;
        for _ in 0..random.below(400) {
            done += 1;
            match random.below(4) {
                0 => {
                    let count = random.below(100);
                    let buffers = (next..next + count).map(|i| {
                        (
                            Segment {
                                addr: random.next(),
                                len: 4096,
                            },
                            i,
                        )
                    });
                    let added = queue.post_each(buffers) as u64;
                    flight.extend(next..next + added);
                    next += added;
                    queue.publish();
                }
                1 | 2 => {
                    for _ in 0..random.below(40) {
                        block.set(random.below(size.into()) as usize, [random.next(), quad(&random)]);
                    }
                }
                _ => {
                    let max = random.below(100) as usize;
                    let before = queue.in_flight();
                    let polled = queue.poll_each(max, |r| {
                        assert!(flight.remove(&r.cookie), "a cookie that is in flight, once");
                        assert!(r.len <= buffer_len);
                        assert_eq!(r.first, open.is_none());
                        let (pieces, bytes) = open.unwrap_or_default();
                        let (pieces, bytes) = (pieces + 1, bytes + r.len);
                        assert!(pieces <= 10 && bytes <= 9728);
                        assert!(r.len > 0 || r.bad && r.last);
                        open = if r.last { None } else { Some((pieces, bytes)) };
                        // What is said of it can always be asked.
                        let _ = (r.vlan(), r.hash(), r.hash_type(), r.packet_type(), r.ip_checksum());
                        let _ = MODELS.map(|model| r.l4_checksum(model));
                        if r.last && !r.bad {
                            frames += 1;
                        }
                        bad += u64::from(r.bad);
                    });
                    assert!(polled <= max);
                    assert_eq!(usize::from(before - queue.in_flight()), polled);
                }
            }
            assert_eq!(usize::from(queue.in_flight()), flight.len());
            assert_eq!(queue.free() + queue.in_flight() + 1, size);
            assert!(double.written(0x1018).unwrap_or_default() < u32::from(size));
        }
        let seen = queue.anomalies();
        lies += seen.length + seen.short_piece + seen.overlong;
        queue.detach(|cookie| assert!(flight.remove(&cookie)));
        assert!(flight.is_empty(), "{flight:?} were lost");
    }
    println!("{done} steps, {frames} frames, {bad} bad ones, {lies} lies");
    assert!(frames > 0 && bad > 0 && lies > 0);
}

fn offload(random: &Random) -> Offload {
    let segmentation = random.one_in(4).then(|| Segmentation {
        header_len: random.below(64) as u8,
        mss: random.below(10_000) as u16,
    });
    Offload {
        l2_len: 12 + random.below(8) as u8,
        l3_len: [0, 20, 40, 512][random.below(4) as usize],
        ipv4: random.one_in(2),
        ip_checksum: random.one_in(2),
        l4: [L4::None, L4::Tcp, L4::Udp, L4::Sctp][random.below(4) as usize],
        vlan: random.one_in(4).then(|| random.next() as u16),
        segmentation,
    }
}

#[test]
fn a_transmit_queue_facing_any_device() {
    let random = Random::new(number("IXGBEVF_SEED", 0x5eed_0002));
    let steps = number("IXGBEVF_STEPS", 200_000);
    let (mut sent, mut refused, mut done) = (0u64, 0u64, 0);
    while done < steps {
        let size = 64 + 8 * random.below(12) as u16;
        let (mut vf, double) = running();
        let options = TxOptions {
            report_every: random.below(100) as u16,
            report_last: random.one_in(2),
        };
        let (mut queue, block) = tx_queue(&double, 0, size, options);
        vf.start_tx(&mut queue).unwrap();
        // In order, whatever the device says.
        let (mut oldest, mut next) = (0u64, 0u64);
        for _ in 0..random.below(400) {
            done += 1;
            match random.below(5) {
                0 => {
                    let frames = (next..next + random.below(60)).map(|i| {
                        (
                            Segment {
                                addr: random.next(),
                                len: 60,
                            },
                            i,
                        )
                    });
                    next += queue.post_each(frames) as u64;
                }
                1 => {
                    let len = random.below(20_000) as u32;
                    let frame = vec![
                        Segment {
                            addr: random.next(),
                            len
                        };
                        random.below(43) as usize
                    ];
                    match queue.post(&frame, &offload(&random), next) {
                        Ok(()) => next += 1,
                        Err(_) => refused += 1,
                    }
                }
                2 => queue.publish(),
                3 => {
                    for _ in 0..random.below(20) {
                        block.set(random.below(size.into()) as usize, [random.next(), quad(&random) << 32]);
                    }
                }
                _ => {
                    let max = random.below(100) as usize;
                    let polled = queue.poll_each(max, |cookie| {
                        assert_eq!(cookie, oldest);
                        oldest += 1;
                    });
                    assert!(polled <= max);
                    sent += polled as u64;
                }
            }
            assert!(oldest <= next);
            assert_eq!(u64::from(queue.in_flight()), next - oldest);
            assert!(queue.free() < size && queue.in_flight() < size);
            assert!(double.written(0x2018).unwrap_or_default() < u32::from(size));
        }
        queue.detach(|cookie| {
            assert_eq!(cookie, oldest);
            oldest += 1;
        });
        assert_eq!(oldest, next);
        assert_eq!(queue.free(), size - 1);
    }
    println!("{done} steps, {sent} frames, {refused} refused");
    assert!(sent > 0 && refused > 0);
}

/// Registers that read as anything. It counts, so that a wait without a limit would be seen.
struct Chaos {
    random: Random,
    reads: Cell<u64>,
    words: RefCell<Vec<u32>>,
    /// How often a read is what was written, and what VFMAILBOX mostly says.
    sane: u64,
    mailbox: u32,
}

impl Registers for &Chaos {
    fn read(&self, offset: u32) -> u32 {
        self.reads.set(self.reads.get() + 1);
        assert!(self.reads.get() < 10_000_000, "an endless loop");
        assert!(offset < 0x4000);
        if offset == VFMAILBOX && !self.random.one_in(4) {
            return self.mailbox;
        }
        if self.random.below(100) < self.sane {
            let word = self.words.borrow()[offset as usize / 4];
            return match offset {
                // A PF that agrees.
                VFMBMEM if word == 1 => ACK | 1,
                VFMBMEM => word | ACK | CTS,
                _ => word,
            };
        }
        match self.random.below(8) {
            0 => self.random.next() as u32,
            1 => 0,
            // An answer, or what looks like one.
            2 => 0xa000_0000 | self.random.below(20) as u32,
            3 => 0x8000_0001,
            4 => 0x0000_0100 | (self.random.next() as u32 & 0x2000_0000),
            5 if self.random.one_in(50) => u32::MAX,
            _ => self.words.borrow()[offset as usize / 4] | 0xa000_0000,
        }
    }

    fn write(&self, offset: u32, value: u32) {
        assert!(offset < 0x4000);
        self.words.borrow_mut()[offset as usize / 4] = value;
    }
}

#[test]
fn a_vf_facing_any_registers() {
    let random = Random::new(number("IXGBEVF_SEED", 0x5eed_0003));
    let rounds = number("IXGBEVF_STEPS", 200_000) / 1000;
    let (mut known, mut calls) = (0, 0u64);
    for round in 0..rounds {
        let chaos = Chaos {
            random: Random::new(random.next()),
            reads: Cell::new(0),
            words: RefCell::new(vec![0; 4096]),
            sane: [0, 50, 90, 99, 100][random.below(5) as usize],
            // Mostly everything goes through, without a reset in the way.
            mailbox: if round % 4 == 0 {
                random.next() as u32
            } else {
                0x34 | [0, 0x40][random.below(2) as usize]
            },
        };
        let time = Time::default();
        let model = MODELS[random.below(5) as usize];
        let mut vf = Vf::new(&chaos, time.clone(), model, round);
        let (mut rx_block, mut tx_block) = (Block::new(64), Block::new(64));
        for _ in 0..60 {
            calls += 1;
            let before = time.0.get();
            let what = random.below(18);
            let result: Result<(), Error> = match what {
                0..=3 => vf.reset(),
                4 => vf.configure(&Setup {
                    rx_queues: 1 << random.below(4),
                    ..Setup::default()
                }),
                5 => vf.set_mac([2, 0, 0, 0, 0, random.next() as u8]),
                6 => vf.set_multicast(&[[1, 0, 0, 0, random.next() as u8, 1]; 30]),
                7 => vf.set_unicast(&[[2, 0, 0, 0, 0, random.next() as u8]; 3]),
                8 => vf.set_vlan(random.below(5000) as u16, random.one_in(2)),
                9 => vf.set_mode(XcastMode::AllMulticast),
                10 => vf.set_mtu(random.next() as u16),
                11 => vf.pf_rss_table().map(|_| ()),
                12 => vf.is_link_enabled().map(|_| ()),
                13 => vf
                    .service()
                    .map(|event| assert!(event != Event::PfReset || !vf.is_known())),
                14 => {
                    vf.dump(|_, _, _| ());
                    let (_, _) = (vf.link(), vf.settled_link());
                    Ok(())
                }
                15 => {
                    let now = vf.statistics();
                    assert!(now.rx_packets <= vf.statistics().rx_packets);
                    Ok(())
                }
                16 => {
                    let (double, index) = (Double::well_behaved(), random.below(8) as u8);
                    let (mut rx, block) = rx_queue(&double, index, 64, RxOptions::default());
                    rx_block = block;
                    let started = vf.start_rx(&mut rx).and_then(|()| vf.stop_rx(&mut rx));
                    rx.detach(|_| unreachable!());
                    started
                }
                _ => {
                    let (double, index) = (Double::well_behaved(), random.below(8) as u8);
                    let (mut tx, block) = tx_queue(&double, index, 64, TxOptions::default());
                    tx_block = block;
                    let started = vf.start_tx(&mut tx).and_then(|()| vf.stop_tx(&mut tx));
                    tx.detach(|_| unreachable!());
                    started
                }
            };
            // What was not reset, or not since, says so at once.
            if result == Err(Error::PfReset) || result == Err(Error::Gone) {
                assert!(!vf.is_known());
            }
            let limits = vf.limits();
            assert!((1..=8).contains(&limits.rx) && (1..=8).contains(&limits.tx) && limits.default_queue < limits.rx);
            // One request takes three seconds at the most. A reset is seven of them, a list of addresses one more than it
            // has; a set-up is as many as it has to repeat.
            let requests = match what {
                0..=3 => 7,
                4 => 200,
                7 => 4,
                _ => 1,
            };
            assert!(time.0.get() - before <= 3_010_000 * requests + 200_000);
            known += u64::from(vf.is_known());
        }
        drop((rx_block, tx_block));
    }
    println!("{calls} calls, {known} with a VF that was known");
    assert!(known > 0 && known < calls);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the answer to any request is: an error, or what the answer says.
    #[test]
    fn any_answer(words in prop::array::uniform5(any::<u32>()), low in 0u32..32, flags in 0u32..8, which in 0..8) {
        let (mut vf, double) = known(Model::I82599);
        let mut reply = words.to_vec();
        if which % 2 == 0 {
            // One that may be right.
            reply[0] = flags << 29 | low;
        }
        let first = reply[0];
        double.set_script(Box::new(move |_| {
            let mut reply = reply.clone();
            reply.resize(16, 0xffff_ffff);
            Some(reply)
        }));
        let (number, result) = match which {
            0 | 1 => (16, vf.is_link_enabled().map(|_| ())),
            2 | 3 => (9, vf.reset()),
            4 | 5 => (10, vf.pf_rss_table().map(|table| assert!(table.iter().all(|entry| *entry < 4)))),
            _ => (5, vf.set_mtu(1500)),
        };
        if result.is_ok() && number != 9 {
            prop_assert_eq!(first & 0xc000_ffff, 0x8000_0000 | number);
        }
        prop_assert!(vf.limits().rx <= 8);
    }

    /// Segments that `add` takes are what the descriptors say, whatever the offload.
    #[test]
    fn any_frame(lens in prop::collection::vec(0u32..20_000, 0..45), seed in any::<u64>()) {
        let (mut vf, double) = running();
        let (mut queue, block) = tx_queue(&double, 0, 64, TxOptions::default());
        vf.start_tx(&mut queue).unwrap();
        let frame: Vec<_> = lens.iter().map(|len| Segment { addr: 0x1000, len: *len }).collect();
        let offload = offload(&Random::new(seed));
        if queue.post(&frame, &offload, 9).is_ok() {
            prop_assert!(offload.l2_len >= 14 && frame.len() <= 40);
            // The context first, then each segment with CC; EOP in the last alone.
            prop_assert_eq!(block.get(0)[1] as u32 & 0x00f0_0000, 0x0020_0000);
            for (i, segment) in frame.iter().enumerate() {
                let [addr, rest] = block.get(1 + i);
                prop_assert_eq!((addr, rest as u32 & 0xffff), (0x1000, segment.len));
                prop_assert_eq!(rest as u32 & 0x0130_0000 == 0x0130_0000, i + 1 == frame.len());
                prop_assert!(rest & 0x80 << 32 != 0);
            }
        } else {
            prop_assert_eq!((queue.free(), queue.in_flight()), (63, 0));
            prop_assert_eq!(block.get(0), [0, 0]);
        }
    }
}
