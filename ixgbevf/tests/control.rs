//! From a reset to the first packet, and what else is done by registers: order, values, limits.

mod common;

use common::*;
use ixgbevf::{
    Access, Cause, Error, HashFields, Interrupts, Link, Model, Reason, Rss, RxOptions, RxQueue, Segment, Setup, Slot,
    Speed, TABLE, TxOptions, TxQueue, XcastMode,
};

fn position(writes: &[(u32, u32)], wanted: (u32, u32)) -> usize {
    writes
        .iter()
        .position(|write| *write == wanted)
        .unwrap_or_else(|| panic!("{wanted:#x?} is not in {writes:#x?}"))
}

#[test]
fn a_reset_silences_resets_and_clears() {
    let double = Double::well_behaved();
    let (mut vf, time) = fresh(&double, Model::X550);
    for q in 0..8 {
        double.poke(RXDCTL + 0x40 * q, 0x4200_0000);
    }
    double.poke(VTEICR, 7);
    vf.reset().unwrap();
    let writes = double.writes();
    let reset = position(&writes, (VFCTRL, 0x0400_0000));
    assert_eq!(writes[0], (0x10c, 7));
    assert_eq!(double.peek(VTEICR), 0, "causes were read");
    for q in 0..8 {
        assert!(position(&writes, (TXDCTL + 0x40 * q, 0x0400_0000)) < reset);
        assert!(position(&writes, (RXDCTL + 0x40 * q, 0x4000_0000)) < reset);
        for (offset, value) in [
            (0x1010, 0),
            (0x1018, 0),
            (0x1028, 0),
            (0x1014, 0x402),
            (0x100c, 0xa200),
            (0x2010, 0),
            (0x2018, 0),
            (0x2028, 0),
            (0x2038, 0),
            (0x203c, 0),
            (0x200c, 0x2a00),
        ] {
            assert!(position(&writes[reset..], (offset + 0x40 * q, value)) > 0);
        }
        // Addresses and lengths are left alone.
        for offset in [0x1000, 0x1004, 0x1008, 0x2000, 0x2004, 0x2008] {
            assert!(!writes.iter().any(|(at, _)| *at == offset + 0x40 * q));
        }
    }
    assert!(time.0.get() >= 62_000);
}

/// Behaviour 4, and the order of everything else.
#[test]
fn a_start_tells_the_frame_length_and_enables_before_the_tail() {
    let (mut vf, double) = known(Model::I82599);
    for round in 0..3 {
        let (mut rx, _rx_block) = rx_queue(
            &double,
            1,
            128,
            RxOptions {
                vlan_strip: true,
                ..RxOptions::default()
            },
        );
        let (mut tx, _tx_block) = tx_queue(&double, 1, 512, TxOptions::default());
        double.poke(0x204c, 0x2a00);
        let buffers = (0..100u64).map(|i| {
            (
                Segment {
                    addr: i << 12,
                    len: 2048,
                },
                i,
            )
        });
        assert_eq!(rx.post_each(buffers), 100);
        rx.publish();
        assert_eq!(
            double.written(0x1058),
            None,
            "the tail is not written before the queue runs"
        );
        vf.configure(&Setup {
            rx_queues: 4,
            ..Setup::default()
        })
        .unwrap();
        assert_eq!(
            double.messages(),
            [{
                let mut lpe = [0; 16];
                lpe[..2].copy_from_slice(&[5, 1518]);
                // What earlier messages left in the buffer.
                double.messages();
                for (i, word) in lpe.iter_mut().enumerate().skip(2) {
                    *word = double.peek(VFMBMEM + 4 * i as u32);
                }
                lpe
            }],
            "round {round}"
        );
        assert_eq!(double.written(0x300), Some(2 << 29));
        vf.start_tx(&mut tx).unwrap();
        vf.start_rx(&mut rx).unwrap();
        let writes = double.writes();
        for (offset, value) in [
            (0x2040, RING_ADDR as u32),
            (0x2044, (RING_ADDR >> 32) as u32),
            (0x2048, 512 * 16),
            (0x2050, 0),
            (0x2058, 0),
            (0x204c, 0x2200),
        ] {
            assert!(position(&writes, (offset, value)) < position(&writes, (0x2068, 0x0200_0120)));
        }
        let enable = position(&writes, (0x1068, 0x4200_0000));
        for (offset, value) in [
            (0x1040, RING_ADDR as u32),
            (0x1044, (RING_ADDR >> 32) as u32),
            (0x1048, 128 * 16),
            (0x1050, 0),
            (0x1058, 0),
            (0x1054, 0x1200_0002),
            (0x106c, 0),
        ] {
            assert!(position(&writes, (offset, value)) < enable);
        }
        assert!(position(&writes, (0x1058, 100)) > enable);
        // RSS is the PF's.
        assert!(!writes.iter().any(|(at, _)| (0x3000..0x3300).contains(at)));

        assert_eq!(vf.start_rx(&mut rx), Err(Error::NotDetached(1)));
        vf.stop_tx(&mut tx).unwrap();
        vf.stop_rx(&mut rx).unwrap();
        assert_eq!((double.peek(0x1068), double.peek(0x2068)), (0x4000_0000, 0x0400_0000));
        assert_eq!(vf.start_rx(&mut rx), Err(Error::NotDetached(1)));
        let mut back = Vec::new();
        rx.detach(|cookie| back.push(cookie));
        tx.detach(|_| unreachable!());
        assert_eq!(back, (0..100).collect::<Vec<_>>());
        vf.start_rx(&mut rx).unwrap();
        vf.start_tx(&mut tx).unwrap();
        vf.reset().unwrap();
        double.messages();
        double.writes();
    }
}

#[test]
fn what_was_set_is_set_again_after_a_reset() {
    let (mut vf, double) = known(Model::X550);
    let mine = [2, 0, 0, 0, 0, 7];
    vf.set_mac(mine).unwrap();
    for id in [1, 31, 32, 4095] {
        vf.set_vlan(id, true).unwrap();
    }
    vf.set_vlan(31, false).unwrap();
    vf.set_mode(XcastMode::AllMulticast).unwrap();
    vf.set_multicast(&[[0x33, 0x33, 0, 0, 0, 1]]).unwrap();
    vf.set_unicast(&[[2, 0, 0, 0, 0, 8]]).unwrap();
    vf.reset().unwrap();
    assert_eq!(vf.mac(), MAC, "the PF's, until it is asked again");
    double.messages();
    vf.configure(&Setup::default()).unwrap();
    assert_eq!(vf.mac(), mine);
    let asked: Vec<_> = double.messages().iter().map(|m| (m[0], m[1])).collect();
    assert_eq!(
        asked,
        [
            (5, 1518),
            (2, 2),
            (0x0001_0004, 1),
            (0x0001_0004, 32),
            (0x0001_0004, 4095),
            (12, 2),
            (0x0001_0003, 0x0010),
            (6, 0),
            (0x0001_0006, 2),
        ]
    );
}

/// Behaviour 7.
#[test]
fn rss_is_the_vfs_own_on_the_x550_only() {
    let rss = Rss::spread(4);
    for model in [Model::I82599, Model::X540] {
        let (mut vf, double) = known(model);
        let refused = Err(Error::Unsupported(Reason::RssIsThePfs));
        assert_eq!(vf.set_rss(&rss, 4), refused);
        assert_eq!(vf.rss().map(|_| ()), refused);
        assert_eq!(
            vf.configure(&Setup {
                rx_queues: 4,
                rss: Some(rss),
                ..Setup::default()
            }),
            refused
        );
        assert!(double.writes().is_empty() && double.messages().is_empty());
    }
    for model in [Model::X550, Model::X550EmX, Model::X550EmA] {
        let (mut vf, double) = known(model);
        vf.configure(&Setup {
            rx_queues: 4,
            rss: Some(rss),
            ..Setup::default()
        })
        .unwrap();
        assert_eq!(vf.rss().unwrap(), rss);
        assert_eq!(double.peek(0x3000), 0x0033_0001);
        assert_eq!(
            double.peek(0x3100),
            u32::from_le_bytes(rss.key[..4].try_into().unwrap())
        );
        assert_eq!(
            double.peek(0x3124),
            u32::from_le_bytes(rss.key[36..].try_into().unwrap())
        );
        assert_eq!((double.peek(0x3200), double.peek(0x323c)), (0x0302_0100, 0x0302_0100));
        // Another table, while queues run.
        let mut other = rss;
        other.table[63] = 0;
        other.fields = HashFields::IPV6_UDP;
        vf.set_rss(&other, 4).unwrap();
        assert_eq!((double.peek(0x323c), double.peek(0x3000)), (0x0002_0100, 0x0080_0001));
        other.table[9] = 4;
        assert_eq!(vf.set_rss(&other, 4), Err(Error::RssTable { entry: 9, queue: 4 }));
        // Without one: even, or off.
        vf.configure(&Setup {
            rx_queues: 2,
            ..Setup::default()
        })
        .unwrap();
        assert_eq!((double.peek(0x300), double.peek(0x3200)), (1 << 29, 0x0100_0100));
        vf.configure(&Setup::default()).unwrap();
        assert_eq!((double.peek(0x300), double.peek(0x3000)), (0, 0));
    }
}

/// Behaviour 7: powers of two, up to what the PF gives.
#[test]
fn receive_queues_are_a_power_of_two() {
    let (mut vf, _) = known(Model::X550);
    for asked in [0, 3, 5, 8, 16, 255] {
        let setup = Setup {
            rx_queues: asked,
            ..Setup::default()
        };
        let error = Error::QueueCount {
            asked: asked.into(),
            limit: 4,
        };
        assert_eq!(vf.configure(&setup), Err(error));
        assert_eq!(vf.set_rss(&Rss::spread(1), asked), Err(error));
    }
    let double = Double::new(Box::new(|message| {
        let mut reply = answer(message, &[4]);
        if message[0] == 9 {
            reply[1..5].copy_from_slice(&[8, 8, 0, 0]);
        }
        Some(reply)
    }));
    let (mut vf, _) = fresh(&double, Model::X550);
    vf.reset().unwrap();
    vf.configure(&Setup {
        rx_queues: 8,
        ..Setup::default()
    })
    .unwrap();
    assert_eq!(double.peek(0x300), 0x8000_0000);
}

/// Behaviour 8.
#[test]
fn rings_have_limits() {
    let double = Double::well_behaved();
    let block = Block::new(8192);
    let new = |size: u16, index: u8, buffer_len: u32, slots: usize, offset: usize| {
        let mut memory = block.memory();
        // SAFETY: what is tested fails before the memory is used, or the memory is long enough.
        memory.ptr = unsafe { memory.ptr.add(offset) };
        let options = RxOptions {
            buffer_len,
            ..RxOptions::default()
        };
        // SAFETY: the block outlives the queue.
        let rx = unsafe {
            RxQueue::new(
                double.clone(),
                index,
                memory,
                size,
                options,
                vec![Slot::default(); slots],
            )
        };
        // SAFETY: as above.
        let tx = unsafe {
            TxQueue::new(
                double.clone(),
                index,
                memory,
                size,
                TxOptions::default(),
                vec![Slot::default(); slots],
            )
        };
        (rx.map(|queue| queue.buffer_len()), tx.map(|queue| queue.size()))
    };
    for size in [64, 72, 1000, 8192] {
        assert_eq!(new(size, 7, 2048, 8192, 0), (Ok(2048), Ok(size)));
    }
    for size in [0, 8, 56, 65, 100, 8200, 16384, u16::MAX] {
        let error = Error::RingSize(size);
        assert_eq!(new(size, 0, 2048, 65536, 0), (Err(error), Err(error)));
    }
    for (given, used) in [(1024, 1024), (2047, 1024), (4095, 3072), (16384, 16384), (65536, 16384)] {
        assert_eq!(new(64, 0, given, 64, 0).0, Ok(used));
    }
    assert_eq!(new(64, 0, 1023, 64, 0).0, Err(Error::BufferLen(1023)));
    assert_eq!(new(64, 8, 2048, 64, 0).1, Err(Error::QueueIndex(8)));
    assert_eq!(new(64, 0, 2048, 63, 0).1, Err(Error::Slots { needed: 64, given: 63 }));
    assert!(matches!(
        new(64, 0, 2048, 64, 64),
        (Err(Error::Misaligned(_)), Err(Error::Misaligned(_)))
    ));
    // Beyond what the PF gives.
    let (mut vf, double) = known(Model::X540);
    let (mut rx, _a) = rx_queue(&double, 4, 64, RxOptions::default());
    let (mut tx, _b) = tx_queue(&double, 4, 64, TxOptions::default());
    assert_eq!(vf.start_rx(&mut rx), Err(Error::QueueIndex(4)));
    assert_eq!(vf.start_tx(&mut tx), Err(Error::QueueIndex(4)));
}

#[test]
fn a_queue_that_does_not_follow_is_an_error_after_10_ms() {
    let double = Double::well_behaved();
    let (mut vf, time) = fresh(&double, Model::X540);
    vf.reset().unwrap();
    let (mut rx, _a) = rx_queue(&double, 0, 64, RxOptions::default());
    let (mut tx, _b) = tx_queue(&double, 0, 64, TxOptions::default());
    double.stick(true);
    let before = time.0.get();
    assert_eq!(vf.start_rx(&mut rx), Err(Error::QueueTimeout(0)));
    assert_eq!(vf.start_tx(&mut tx), Err(Error::QueueTimeout(0)));
    assert_eq!(time.0.get() - before, 20_000);
    double.stick(false);
    vf.start_rx(&mut rx).unwrap();
    vf.start_tx(&mut tx).unwrap();
    double.stick(true);
    assert_eq!(vf.stop_rx(&mut rx), Err(Error::QueueTimeout(0)));
    assert_eq!(vf.stop_tx(&mut tx), Err(Error::QueueTimeout(0)));
    // A queue that is stopped, or should be, writes no tail.
    double.writes();
    tx.post_each([(Segment { addr: 0, len: 64 }, 0)]);
    tx.publish();
    assert!(double.writes().is_empty());
    double.remove();
    assert_eq!(vf.stop_tx(&mut tx), Err(Error::Gone));
}

/// Behaviour 6.
#[test]
fn statistics_survive_wraps_and_resets() {
    let double = Double::well_behaved();
    // (packets in, octets in low, high, multicast, packets out, octets out low, high)
    let counters = [0x101c, 0x1020, 0x1024, 0x1034, 0x201c, 0x2020, 0x2024];
    let set = |values: [u32; 7]| {
        counters
            .iter()
            .zip(values)
            .for_each(|(at, value)| double.poke(*at, value))
    };
    // They begin anywhere: nobody cleared them.
    set([0xffff_fff0, 0xffff_ff00, 0xf, 7, 5, 1000, 3]);
    let (mut vf, _) = fresh(&double, Model::I82599);
    assert_eq!(vf.statistics(), Default::default());
    vf.reset().unwrap();
    assert_eq!(vf.statistics(), Default::default());
    // All of those that count packets, and 36 bits, wrap.
    set([0x10, 0x100, 0, 9, 6, 1064, 3]);
    let now = vf.statistics();
    assert_eq!((now.rx_packets, now.rx_bytes, now.rx_multicast), (0x20, 0x200, 2));
    assert_eq!((now.tx_packets, now.tx_bytes), (1, 64));
    set([0x10, 0x100, 1, 9, 6, 0, 4]);
    let now = vf.statistics();
    assert_eq!((now.rx_packets, now.rx_bytes), (0x20, 0x200 + (1 << 32)));
    assert_eq!(now.tx_bytes, 64 + (1 << 32) - 1064);
    // The high register has 4 bits.
    set([0x10, 0x100, 0xffff_fff1, 9, 6, 0, 4]);
    assert_eq!(vf.statistics(), now);
    // A reset that leaves them; one with packets just before it; one that clears them, as that of a PF does.
    vf.reset().unwrap();
    assert_eq!(vf.statistics(), now);
    set([0x11, 0x140, 1, 9, 6, 0, 4]);
    vf.reset().unwrap();
    let last = vf.statistics();
    assert_eq!(
        (last.rx_packets, last.rx_bytes),
        (now.rx_packets + 1, now.rx_bytes + 64)
    );
    double.clear_on_reset(counters.to_vec());
    vf.reset().unwrap();
    assert_eq!(vf.statistics(), last);
    set([1, 64, 0, 0, 0, 0, 0]);
    assert_eq!(vf.statistics().rx_packets, last.rx_packets + 1);
}

#[test]
fn interrupts() {
    let double = Double::well_behaved();
    let interrupts = Interrupts::new(double.clone());
    for (cause, vector) in [
        (Cause::Rx(0), 1),
        (Cause::Tx(0), 2),
        (Cause::Rx(1), 0),
        (Cause::Tx(7), 1),
        (Cause::Mailbox, 0),
    ] {
        interrupts.route(cause, Some(vector)).unwrap();
    }
    assert_eq!(
        (double.peek(0x120), double.peek(0x12c), double.peek(0x140)),
        (0x0080_8281, 0x8100_0000, 0x80)
    );
    interrupts.route(Cause::Tx(0), None).unwrap();
    assert_eq!(double.peek(0x120), 0x0080_0081);
    assert_eq!(interrupts.route(Cause::Rx(8), Some(0)), Err(Error::QueueIndex(8)));
    assert_eq!(interrupts.route(Cause::Rx(0), Some(3)), Err(Error::Vector(3)));

    for (us, steps) in [
        (0, 0),
        (2, 0),
        (3, 1),
        (500, 244),
        (1046, 510),
        (1047, 511),
        (u32::MAX, 511),
    ] {
        interrupts.moderate(2, us).unwrap();
        assert_eq!(double.peek(0x828), 0x8000_0000 | steps << 3, "{us} us");
    }
    assert_eq!(interrupts.moderate(3, 9), Err(Error::Vector(3)));

    double.writes();
    interrupts.auto_mask(3);
    interrupts.enable(0xff);
    interrupts.disable(4);
    interrupts.trigger(1);
    assert_eq!(
        double.writes(),
        [(0x110, 3), (0x114, 3), (0x108, 7), (0x10c, 4), (0x104, 1)]
    );
    double.poke(VTEICR, 5);
    assert_eq!((interrupts.take_causes(), interrupts.take_causes()), (5, 0));
}

#[test]
fn link() {
    let double = Double::well_behaved();
    let (mut vf, time) = fresh(&double, Model::I82599);
    double.poke(VFLINKS, 0x7000_0000);
    assert_eq!(vf.link(), Link::Down, "before a reset");
    vf.reset().unwrap();
    assert_eq!(vf.link(), Link::Up(Speed::G10));
    let before = time.0.get();
    assert_eq!(vf.settled_link(), Link::Up(Speed::G10));
    assert_eq!(time.0.get() - before, 500);
    double.poke(VFLINKS, 0x3000_0000);
    assert_eq!((vf.link(), vf.settled_link()), (Link::Down, Link::Down));
    // Only the 82599 flickers.
    let (mut vf, time) = fresh(&double, Model::X550);
    double.poke(VFLINKS, 0x7800_0000);
    vf.reset().unwrap();
    let before = time.0.get();
    assert_eq!(vf.settled_link(), Link::Up(Speed::G2_5));
    assert_eq!(time.0.get(), before);
}

#[test]
fn a_dump_reads_without_effect() {
    let (mut vf, double) = known(Model::X550);
    double.poke(VTEICR, 5);
    double.poke(0x1018, 77);
    double.poke(0x3124, 99);
    let mut rows = Vec::new();
    vf.dump(|row, i, value| rows.push((row.name, row.offset + i * row.stride, value)));
    assert_eq!(double.peek(VTEICR), 5);
    assert!(double.writes().is_empty());
    for row in TABLE {
        let dumped = rows.iter().filter(|(name, ..)| *name == row.name).count();
        let readable = matches!(row.access, Access::ReadOnly | Access::ReadWrite) || row.name == "VFMAILBOX";
        assert_eq!(dumped, if readable { row.count as usize } else { 0 }, "{}", row.name);
    }
    assert!(rows.contains(&("VFRDT", 0x1018, 77)) && rows.contains(&("VFRSSRK", 0x3124, 99)));
}

#[test]
fn a_stop_silences_everything() {
    let (mut vf, double) = known(Model::X550);
    double.poke(RXDCTL, 0x0200_0000);
    vf.stop();
    assert_eq!(
        (double.peek(RXDCTL), double.peek(TXDCTL), double.peek(0x10c)),
        (0, 0x0400_0000, 7)
    );
    assert!(!vf.is_known());
    assert_eq!(vf.set_vlan(1, true), Err(Error::PfReset));
}
