//! Descriptors, bit by bit, and what comes back.

mod common;

use common::*;
use ixgbevf::{
    Checksum, Error, HashType, L4, Model, Offload, PacketType, Received, RxOptions, Segment, Segmentation, TxOptions,
    Vf,
};

const TDT: u32 = 0x2018;
const RDT: u32 = 0x1018;

fn buffers(range: std::ops::Range<u64>) -> impl Iterator<Item = (Segment, u64)> {
    range.map(|i| {
        (
            Segment {
                addr: 0xab_0000_0000 + 2048 * i,
                len: 2048,
            },
            1000 + i,
        )
    })
}

fn frames(range: std::ops::Range<u64>) -> impl Iterator<Item = (Segment, u64)> {
    buffers(range).map(|(segment, cookie)| (Segment { len: 60, ..segment }, cookie))
}

struct Running {
    vf: Vf<Double, Time>,
    double: Double,
}

impl Running {
    fn new() -> Self {
        let (mut vf, double) = known(Model::X550);
        vf.configure(&Default::default()).unwrap();
        Running { vf, double }
    }

    fn rx(&mut self, size: u16, options: RxOptions) -> (Rx, Block) {
        let (mut queue, block) = rx_queue(&self.double, 0, size, options);
        self.vf.start_rx(&mut queue).unwrap();
        self.double.writes();
        (queue, block)
    }

    fn tx(&mut self, size: u16, options: TxOptions) -> (Tx, Block) {
        let (mut queue, block) = tx_queue(&self.double, 0, size, options);
        self.vf.start_tx(&mut queue).unwrap();
        self.double.writes();
        (queue, block)
    }
}

fn poll(queue: &mut Rx, max: usize) -> Vec<Received> {
    let mut done = Vec::new();
    assert_eq!(queue.poll_each(max, |received| done.push(received)), done.len());
    done
}

fn taken(queue: &mut Tx, max: usize) -> Vec<u64> {
    let mut done = Vec::new();
    assert_eq!(queue.poll_each(max, |cookie| done.push(cookie)), done.len());
    done
}

#[test]
fn buffers_go_round_and_the_tail_is_written_once_a_burst() {
    let mut running = Running::new();
    let (mut queue, block) = running.rx(72, RxOptions::default());
    // One descriptor stays free: a tail at the head would say that there is none.
    assert_eq!(queue.free(), 71);
    assert_eq!(queue.post_each(buffers(0..100)), 71);
    assert_eq!((queue.free(), queue.in_flight()), (0, 71));
    queue.publish();
    queue.publish();
    assert_eq!(running.double.writes(), [(RDT, 71)]);
    assert_eq!(block.get(0), [0xab_0000_0000, 0]);
    assert_eq!(block.get(70), [0xab_0000_0000 + 2048 * 70, 0]);
    assert!(poll(&mut queue, 100).is_empty() && !queue.has_done());
    let (mut at, mut next) = (0, 71);
    for round in 0..50u64 {
        let burst = 1 + round as usize % 31;
        for i in 0..burst {
            block.frame((at + i) % 72, 64 + i as u16);
        }
        assert!(queue.has_done());
        assert_eq!((queue.done(100), queue.done(3)), (burst, burst.min(3)));
        let first = poll(&mut queue, 5);
        assert_eq!(first.len(), burst.min(5));
        let rest = poll(&mut queue, 100);
        for (i, received) in first.iter().chain(&rest).enumerate() {
            assert_eq!(received.cookie, 1000 + next - 71 + i as u64);
            assert_eq!(received.len, 64 + i as u32);
            assert!(received.is_whole());
        }
        assert_eq!(first.len() + rest.len(), burst);
        at = (at + burst) % 72;
        assert_eq!(queue.post_each(buffers(next..next + 100)), burst);
        next += burst as u64;
        queue.publish();
        assert_eq!(running.double.writes(), [(RDT, ((at + 71) % 72) as u32)]);
    }
    let mut back = Vec::new();
    queue.detach(|cookie| back.push(cookie));
    assert_eq!(back, (next - 71..next).map(|i| 1000 + i).collect::<Vec<_>>());
    assert_eq!((queue.free(), queue.in_flight()), (71, 0));
    assert!((0..72).all(|i| block.get(i) == [0, 0]));
}

#[test]
fn what_the_device_says_of_a_frame() {
    let mut running = Running::new();
    let options = RxOptions {
        vlan_strip: true,
        ..RxOptions::default()
    };
    let (mut queue, block) = running.rx(64, options);
    queue.post_each(buffers(0..8));
    queue.publish();
    // TCP over IPv4, hashed, checksums good, a tag taken out; an RSS type of its own; both checksums bad.
    block.write_back(0, 0x0111, 0x1234_5678, 0x6b, 1500, 0xe064);
    block.write_back(1, 0x0248, 9, 0x23, 60, 0);
    block.write_back(2, 0x0110, 0xffff_0000, 0xc000_0063, 60, 0xe064);
    // Broken on the wire.
    block.write_back(3, 0, 0, 0x2000_0003, 60, 0);
    let done = poll(&mut queue, 10);
    assert_eq!((done[0].vlan(), done[0].hash()), (Some(0xe064), Some(0x1234_5678)));
    assert_eq!(done[0].hash_type(), Some(HashType::Ipv4Tcp));
    assert_eq!(done[0].packet_type(), PacketType::IPV4 | PacketType::TCP);
    assert_eq!(done[0].ip_checksum(), Checksum::Good);
    assert_eq!(done[0].l4_checksum(Model::X550), Checksum::Good);
    assert_eq!(done[1].hash_type(), Some(HashType::Ipv6Udp));
    assert_eq!((done[1].ip_checksum(), done[1].vlan()), (Checksum::Unknown, None));
    assert_eq!((done[2].hash(), done[2].vlan()), (None, None));
    assert_eq!(done[2].ip_checksum(), Checksum::Bad);
    assert_eq!(done[2].l4_checksum(Model::I82599), Checksum::Bad);
    assert!(done[3].bad && !done[3].is_whole());
    assert_eq!(queue.anomalies(), Default::default());
}

#[test]
fn a_queue_that_leaves_tags_in_frames_tells_none() {
    // The device says that a frame has a tag whether it takes it out or not.
    let mut running = Running::new();
    let (mut queue, block) = running.rx(64, RxOptions::default());
    queue.post_each(buffers(0..8));
    queue.publish();
    block.write_back(0, 0x0111, 0x1234_5678, 0x6b, 1500, 0xe064);
    let done = poll(&mut queue, 10);
    assert_eq!((done[0].vlan(), done[0].hash()), (None, Some(0x1234_5678)));
    assert!(done[0].is_whole());
}

#[test]
fn frames_of_several_buffers() {
    let mut running = Running::new();
    let options = RxOptions {
        buffer_len: 1024,
        ..RxOptions::default()
    };
    let (mut queue, block) = running.rx(64, options);
    queue.post_each(buffers(0..63));
    queue.publish();
    // 9,728 bytes: nine full buffers and a half; then a whole frame.
    for i in 0..9 {
        block.write_back(i, 0, 0, 1, 1024, 0);
    }
    block.write_back(9, 0x0110, 0, 0x63, 512, 0);
    block.frame(10, 60);
    // In two polls, and the end is not there yet.
    let first = poll(&mut queue, 4);
    let rest = poll(&mut queue, 100);
    let done: Vec<_> = first.into_iter().chain(rest).collect();
    assert_eq!(done.iter().map(|r| r.len).sum::<u32>(), 9728 + 60);
    assert!(done.iter().all(|r| !r.bad));
    let firsts: Vec<_> = (0..11).filter(|i| done[*i].first).collect();
    let lasts: Vec<_> = (0..11).filter(|i| done[*i].last).collect();
    assert_eq!((firsts, lasts), (vec![0, 10], vec![9, 10]));
    assert_eq!(done[9].l4_checksum(Model::X540), Checksum::Good);
    assert_eq!(queue.anomalies(), Default::default());
}

#[test]
fn lies_about_lengths() {
    let mut running = Running::new();
    let options = RxOptions {
        buffer_len: 1024,
        ..RxOptions::default()
    };
    let (mut queue, block) = running.rx(64, options);
    queue.post_each(buffers(0..63));
    queue.publish();
    let mut at = 0;
    let mut frame = |pieces: &[(u32, u16)]| {
        for (status, len) in pieces {
            block.write_back(at, 0, 0, *status, *len, 0);
            at += 1;
        }
        poll(&mut queue, 100)
            .iter()
            .map(|r| (r.len, r.first, r.last, r.bad))
            .collect::<Vec<_>>()
    };
    let bad = (0, true, true, true);
    let fine = (60, true, true, false);
    // Longer than the buffer, and nothing.
    assert_eq!(frame(&[(3, 1025), (3, 0), (3, 65535), (3, 60)]), [bad, bad, bad, fine]);
    // A piece that leaves room, and what follows it, are dropped up to the end of the frame.
    assert_eq!(
        frame(&[(1, 1024), (1, 1000), (1, 1024), (3, 60), (3, 60)]),
        [(1024, true, false, false), (0, false, true, true), bad, bad, fine]
    );
    // Too long, by a byte.
    let mut pieces = vec![(1, 1024); 9];
    pieces.extend([(3, 513), (3, 60)]);
    let done = frame(&pieces);
    assert_eq!(done[8], (1024, false, false, false));
    assert_eq!(done[9..], [(0, false, true, true), fine]);
    // Without end.
    let done = frame(&[(1, 1024); 20]);
    assert_eq!(done[8], (1024, false, false, false));
    assert_eq!(done[9], (0, false, true, true));
    assert!(done[10..].iter().all(|piece| *piece == bad));
    let seen = queue.anomalies();
    assert_eq!((seen.length, seen.short_piece, seen.overlong), (3, 1, 2));
}

#[test]
fn what_was_not_posted_is_not_looked_at() {
    let mut running = Running::new();
    let (mut queue, block) = running.rx(64, RxOptions::default());
    (0..64).for_each(|i| block.frame(i, 60));
    assert!(poll(&mut queue, 100).is_empty() && !queue.has_done() && queue.done(9) == 0);
    // Posting clears what is there.
    queue.post_each(buffers(0..3));
    assert!(poll(&mut queue, 100).is_empty());
    (0..64).for_each(|i| block.frame(i, 60));
    assert_eq!(poll(&mut queue, 100).len(), 3);
    assert!(poll(&mut queue, 100).is_empty());
}

#[test]
#[should_panic = "a receive buffer is too short"]
fn a_short_buffer_is_not_posted() {
    let mut running = Running::new();
    let (mut queue, _block) = running.rx(64, RxOptions::default());
    queue.post_each([(Segment { addr: 0, len: 2047 }, 0)]);
}

/// Behaviour 5, the fast path: a context before the first frame, CC in every data descriptor.
#[test]
fn plain_frames_have_a_context() {
    let mut running = Running::new();
    let (mut queue, block) = running.tx(64, TxOptions::default());
    assert_eq!(queue.post_each([]), 0);
    queue.publish();
    assert!(running.double.writes().is_empty());
    assert_eq!(queue.post_each(frames(0..3)), 3);
    queue.publish();
    queue.publish();
    assert_eq!(running.double.writes(), [(TDT, 4)]);
    let index = context_at(&block, 0, (0x1c00, 0x2020_1800, 0));
    for i in 0..3 {
        let rs = if i == 2 { 0x0800_0000 } else { 0 };
        assert_eq!(
            block.get(1 + i as usize),
            [
                0xab_0000_0000 + 2048 * i,
                u64::from(0x2330_0000u32 + 60 + rs) | u64::from(60 << 14 | 0x80 | index << 4) << 32
            ]
        );
    }
    // The context stays.
    queue.post_each(frames(3..4));
    queue.publish();
    assert_eq!(block.get(4)[1] as u32, 0x2330_0000 + 60 + 0x0800_0000);
}

/// The index that the context at `i`, which must say `wanted`, is loaded into.
fn context_at(block: &Block, i: usize, wanted: (u32, u32, u32)) -> u32 {
    let [low, high] = block.get(i);
    let index = (high >> 36) as u32 & 7;
    assert!(index < 2);
    assert_eq!(
        (low, high as u32, (high >> 32) as u32 & !0x70),
        (u64::from(wanted.0), wanted.1, wanted.2)
    );
    index
}

const TCP4: Offload = Offload {
    l3_len: 20,
    ipv4: true,
    ip_checksum: true,
    l4: L4::Tcp,
    ..Offload::NONE
};

/// Behaviour 5: contexts are kept, and replaced when there is a third.
#[test]
fn two_contexts_are_kept() {
    let mut running = Running::new();
    let (mut queue, block) = running.tx(64, TxOptions::default());
    let udp = Offload { l4: L4::Udp, ..TCP4 };
    let segment = [Segment { addr: 0x1000, len: 100 }];
    // What is sent, and what it takes.
    let mut at = 0;
    let mut loaded = [None; 2];
    for (offload, context) in [
        (Offload::NONE, Some((0x1c00, 0x2020_1800))),
        (Offload::NONE, None),
        (TCP4, Some((0x1c14, 0x2020_0c00))),
        (Offload::NONE, None),
        (TCP4, None),
        (udp, Some((0x1c14, 0x2020_0400))),
        (TCP4, None),
        (udp, None),
        (Offload::NONE, Some((0x1c00, 0x2020_1800))),
        (udp, None),
        (TCP4, Some((0x1c14, 0x2020_0c00))),
    ] {
        let free = queue.free();
        queue.post(&segment, &offload, 5).unwrap();
        if let Some((headers, kind)) = context {
            let index = context_at(&block, at, (headers, kind, 0));
            loaded[index as usize] = Some(offload);
            at += 1;
        }
        assert_eq!(usize::from(free - queue.free()), 1 + usize::from(context.is_some()));
        let olinfo = (block.get(at)[1] >> 32) as u32;
        assert_ne!(olinfo & 0x80, 0, "CC");
        assert_eq!(
            loaded[(olinfo >> 4 & 7) as usize],
            Some(offload),
            "the context is the one that is meant"
        );
        at += 1;
    }
    // After a stop the device has none.
    queue.publish();
    running.vf.stop_tx(&mut queue).unwrap();
    queue.detach(|cookie| assert_eq!(cookie, 5));
    running.vf.start_tx(&mut queue).unwrap();
    queue.post(&segment, &TCP4, 6).unwrap();
    context_at(&block, 0, (0x1c14, 0x2020_0c00, 0));
}

#[test]
fn segments_tags_and_segmentation() {
    let mut running = Running::new();
    let (mut queue, block) = running.tx(64, TxOptions::default());
    let tso = Offload {
        vlan: Some(0x2005),
        segmentation: Some(Segmentation {
            header_len: 20,
            mss: 1460,
        }),
        ..TCP4
    };
    let frame = [
        Segment { addr: 0x1000, len: 54 },
        Segment {
            addr: 0x2000,
            len: 16384,
        },
        Segment {
            addr: 0x8000,
            len: 5000,
        },
    ];
    queue.post(&frame, &tso, 7).unwrap();
    queue.publish();
    assert_eq!(running.double.writes(), [(TDT, 4)]);
    let index = context_at(&block, 0, (0x2005_1c14, 0x2020_0c00, 0x05b4_1400));
    let olinfo = 21384u32 << 14 | 0x380 | index << 4;
    for (i, segment) in frame.iter().enumerate() {
        // DATA, IFCS, DEXT, VLE, TSE in each; EOP and RS in the last.
        let command = 0xe230_0000 | segment.len | if i == 2 { 0x0900_0000 } else { 0 };
        assert_eq!(
            block.get(1 + i),
            [segment.addr, u64::from(command) | u64::from(olinfo) << 32]
        );
    }
    assert_eq!((queue.in_flight(), queue.free()), (1, 59));
    block.sent(3);
    assert_eq!(taken(&mut queue, 9), [7]);
    assert_eq!((queue.in_flight(), queue.free()), (0, 63));
}

#[test]
fn frames_that_cannot_be_sent() {
    let mut running = Running::new();
    let (mut queue, block) = running.tx(64, TxOptions::default());
    let segment = |len| Segment { addr: 0x1000, len };
    let mut refuse = |frame: &[Segment], offload: &Offload, error| {
        assert_eq!(queue.post(frame, offload, 1), Err(error));
        assert_eq!((queue.free(), queue.in_flight()), (63, 0));
    };
    refuse(&[], &Offload::NONE, Error::EmptySegment);
    refuse(&[segment(60), segment(0)], &Offload::NONE, Error::EmptySegment);
    refuse(&[segment(16)], &Offload::NONE, Error::FrameLen(16));
    refuse(&[segment(9728), segment(1)], &Offload::NONE, Error::FrameLen(9729));
    refuse(&[segment(16385)], &TCP4, Error::SegmentLen(16385));
    refuse(&[segment(100); 41], &TCP4, Error::TooManySegments(41));
    refuse(
        &[segment(100)],
        &Offload { l2_len: 4, ..TCP4 },
        Error::Offload("an Ethernet header has 14 to 127 bytes"),
    );
    assert_eq!(block.get(0), [0, 0]);
    queue.post(&[segment(17)], &Offload::NONE, 1).unwrap();
    queue.post(&[segment(1), segment(16)], &Offload::NONE, 2).unwrap();
    queue.post(&[segment(200); 40], &Offload::NONE, 3).unwrap();
    // 19 are left: the frame fits, its context does not.
    assert_eq!(queue.free(), 63 - 44);
    assert_eq!(queue.post(&[segment(100); 19], &TCP4, 4), Err(Error::Full));
    assert_eq!(queue.post(&[segment(100); 20], &Offload::NONE, 4), Err(Error::Full));
    queue.post(&[segment(100); 18], &TCP4, 4).unwrap();
    assert_eq!((queue.free(), queue.in_flight()), (0, 4));
    assert_eq!(queue.post_each(frames(0..5)), 0);
}

#[test]
#[should_panic = "a frame has 17 to 9,728 bytes"]
fn a_short_frame_is_not_sent() {
    let mut running = Running::new();
    let (mut queue, _block) = running.tx(64, TxOptions::default());
    queue.post_each([(Segment { addr: 0, len: 60 }, 0), (Segment { addr: 0, len: 16 }, 0)]);
}

fn reported(block: &Block, range: std::ops::Range<usize>) -> Vec<usize> {
    range.filter(|i| block.get(*i)[1] & 0x0800_0000 != 0).collect()
}

#[test]
fn reports_are_rare() {
    let mut running = Running::new();
    let (mut queue, block) = running.tx(256, TxOptions::default());
    queue.post_each(frames(0..100));
    queue.publish();
    // Every 32 descriptors, the context with them, and the last.
    assert_eq!(reported(&block, 0..101), [31, 63, 95, 100]);
    assert!(taken(&mut queue, 200).is_empty() && !queue.has_done());
    // A report further on does not count before those ahead of it.
    block.sent(63);
    assert!(taken(&mut queue, 200).is_empty());
    block.sent(31);
    assert!(queue.has_done());
    assert_eq!(taken(&mut queue, 10), (1000..1010).collect::<Vec<_>>());
    // Descriptors are free when all cookies up to their report are.
    assert_eq!((queue.free(), queue.in_flight()), (255 - 101, 90));
    assert_eq!(taken(&mut queue, 40), (1010..1050).collect::<Vec<_>>());
    assert_eq!(queue.free(), 255 - 101 + 32);
    assert_eq!(taken(&mut queue, 200), (1050..1063).collect::<Vec<_>>());
    assert_eq!(queue.free(), 255 - 37);
    [95, 100].into_iter().for_each(|i| block.sent(i));
    assert_eq!(taken(&mut queue, 200).len(), 37);
    assert_eq!((queue.free(), queue.in_flight()), (255, 0));

    let options = TxOptions {
        report_every: 8,
        report_last: false,
    };
    let (mut queue, block) = running.tx(256, options);
    queue.post_each(frames(0..20));
    queue.publish();
    assert_eq!(reported(&block, 0..21), [7, 15]);
    [7, 15].into_iter().for_each(|i| block.sent(i));
    assert_eq!(taken(&mut queue, 99).len(), 15);
    assert_eq!(queue.in_flight(), 5);
    let mut back = Vec::new();
    queue.detach(|cookie| back.push(cookie));
    assert_eq!(back, (1015..1020).collect::<Vec<_>>());
}

/// The largest frame finds room whatever waits for a report.
#[test]
fn reports_leave_room_for_the_largest_frame() {
    for size in [64, 72, 96, 256] {
        for waiting in 0..u64::from(size) {
            let mut running = Running::new();
            let options = TxOptions {
                report_every: u16::MAX,
                report_last: false,
            };
            let (mut queue, block) = running.tx(size, options);
            queue.post_each(frames(0..waiting));
            queue.publish();
            reported(&block, 0..size.into()).into_iter().for_each(|i| block.sent(i));
            taken(&mut queue, usize::MAX);
            let largest = [Segment { addr: 0x1000, len: 200 }; 40];
            assert_eq!(queue.post(&largest, &TCP4, 1), Ok(()), "{waiting} in a ring of {size}");
        }
    }
}

#[test]
fn transmit_goes_round() {
    for (size, every) in [(64, 1), (72, 5), (128, 32), (64, 1000)] {
        let mut running = Running::new();
        let options = TxOptions {
            report_every: every,
            report_last: true,
        };
        let (mut queue, block) = running.tx(size, options);
        let (mut sent, mut back) = (0, 0);
        for round in 0..200 {
            let burst = 1 + round * 7 % 40;
            sent += queue.post_each(frames(sent..sent + burst)) as u64;
            queue.publish();
            let tail = running.double.written(TDT).unwrap();
            assert!(tail < u32::from(size));
            // The device does its work: all that asks for a report gets it.
            (0..usize::from(size))
                .filter(|i| block.get(*i)[1] & 0x0900_0000 == 0x0900_0000)
                .for_each(|i| block.sent(i));
            for cookie in taken(&mut queue, 17 + round as usize % 50) {
                assert_eq!(cookie, 1000 + back);
                back += 1;
            }
            assert_eq!(u64::from(queue.in_flight()), sent - back);
        }
        assert!(sent > 2000, "{sent}");
        while queue.in_flight() > 0 {
            back += taken(&mut queue, 99).len() as u64;
        }
        assert_eq!((sent, queue.free()), (back, size - 1));
    }
}

/// A panic of the caller in the midst of a burst: what was handed out stays handed out.
#[test]
fn nothing_comes_twice_when_the_caller_panics() {
    let mut running = Running::new();
    let (mut rx, rx_block) = running.rx(64, RxOptions::default());
    let (mut tx, tx_block) = running.tx(64, TxOptions::default());
    rx.post_each(buffers(0..4));
    tx.post_each(frames(0..4));
    rx.publish();
    tx.publish();
    (0..4).for_each(|i| rx_block.frame(i, 60));
    tx_block.sent(4);
    let mut seen = Vec::new();
    let panics = std::panic::AssertUnwindSafe(|| {
        rx.poll_each(9, |r| {
            seen.push(r.cookie);
            assert_ne!(r.cookie, 1001, "on purpose");
        });
    });
    assert!(std::panic::catch_unwind(panics).is_err());
    rx.poll_each(9, |r| seen.push(r.cookie));
    assert_eq!(seen, [1000, 1001, 1002, 1003]);
    seen.clear();
    let panics = std::panic::AssertUnwindSafe(|| {
        tx.poll_each(9, |cookie| {
            seen.push(cookie);
            assert_ne!(cookie, 1001, "on purpose");
        });
    });
    assert!(std::panic::catch_unwind(panics).is_err());
    tx.detach(|cookie| seen.push(cookie));
    assert_eq!(seen, [1000, 1001, 1002, 1003]);
    // And one in the iterator: what it yielded before is posted.
    let panics = std::panic::AssertUnwindSafe(|| rx.post_each(buffers(0..9).inspect(|(_, c)| assert_ne!(*c, 1003))));
    assert!(std::panic::catch_unwind(panics).is_err());
    assert_eq!(rx.in_flight(), 3);
}
