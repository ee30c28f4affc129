//! Receive and the switch: who gets what, on which queue, with which words in the descriptor.

mod common;

use common::{CTS, Driver, RING, SUCCESS, device, frame, ipv4, pseudo, tcp, two, udp};
use vf_model::rss::toeplitz;
use vf_model::{Complaint, Halt, Kind, Settings, Shared};

const OTHER: [u8; 6] = [0x02, 0xaa, 0, 0, 0, 0x09];
const ALL: [u8; 6] = [0xff; 6];
/// One buffer of 2 KiB, advanced; the same with DROP_EN.
const BUFFER: u32 = 0x0200_0002;
const DROP: u32 = 0x1200_0002;
/// RXDCTL.VME.
const STRIP: u32 = 0x4000_0000;

fn one(kind: Kind) -> (Shared, Driver) {
    let device = device(Settings {
        kind,
        queues: 4,
        ..Settings::default()
    });
    let driver = Driver::up(&device, 0);
    (device, driver)
}

fn inject(device: &Shared, bytes: &[u8]) {
    device.with(|nic| {
        assert!(nic.inject(bytes));
        nic.run(100);
    });
}

#[test]
fn frames_arrive_whole_and_in_order() {
    let (device, mut driver) = one(Kind::I82599);
    for round in 0..5 {
        let frames: Vec<_> = (0..60).map(|i| frame(driver.mac, OTHER, 60 + 7 * i + round)).collect();
        for bytes in &frames {
            inject(&device, bytes);
        }
        for bytes in &frames {
            let received = driver.receive().unwrap();
            assert_eq!((&received.bytes, received.status), (bytes, 3));
        }
        assert_eq!(driver.receive(), None);
    }
    assert!(device.with(|nic| nic.complaints(0).is_empty()));
}

#[test]
fn without_descriptors_frames_wait_or_are_dropped() {
    for (srrctl, hold, arrive) in [(BUFFER, false, 10), (DROP, false, 2), (DROP, true, 10)] {
        let device = device(Settings {
            hold,
            ..Settings::default()
        });
        let mut driver = Driver::up(&device, 0);
        // The ring has two descriptors that are the device's.
        driver.rx_up_with(0, srrctl, 0, 2);
        for i in 0..10 {
            inject(&device, &frame(driver.mac, OTHER, 60 + i));
        }
        driver.write(0x1018, RING - 1);
        driver.settle();
        let got = std::iter::from_fn(|| driver.receive()).count();
        assert_eq!(got, arrive, "{srrctl:x} {hold}");
        assert_eq!(device.with(|nic| nic.drops(0).no_descriptor), 10 - arrive as u64);
    }
}

#[test]
fn what_waits_is_bounded() {
    let (device, mut driver) = one(Kind::I82599);
    driver.rx_up_with(0, BUFFER, 0, 0);
    for _ in 0..200 {
        inject(&device, &frame(driver.mac, OTHER, 1500));
    }
    assert_eq!(device.with(|nic| nic.waiting(0)), 128 * 1024 / 1500);
    assert_eq!(device.with(|nic| nic.drops(0).no_descriptor), 200 - 128 * 1024 / 1500);
}

#[test]
fn what_is_held_is_bounded_too_but_by_far_more() {
    let device = device(Settings {
        hold: true,
        ..Settings::default()
    });
    let mut driver = Driver::up(&device, 0);
    driver.rx_up_with(0, DROP, 0, 0);
    for _ in 0..50_000 {
        device.with(|nic| nic.inject(&frame(driver.mac, OTHER, 1500)));
    }
    assert_eq!(device.with(|nic| nic.waiting(0)), 64 * 1024 * 1024 / 1500);
}

#[test]
fn long_frames_span_buffers() {
    let (device, mut driver) = one(Kind::X540);
    assert_eq!(driver.ask(&[0x05, 9018])[0], SUCCESS | CTS | 0x05);
    // Buffers of 1 KiB.
    driver.rx_up(0, 0x0200_0001);
    for (length, pieces) in [(1024, 1), (1025, 2), (2048, 2), (9014, 9)] {
        let bytes = frame(driver.mac, OTHER, length);
        inject(&device, &bytes);
        let received = driver.receive().unwrap();
        assert_eq!((received.pieces, received.bytes), (pieces, bytes));
    }
    inject(&device, &frame(driver.mac, OTHER, 9015));
    assert_eq!(driver.receive(), None);
    assert_eq!(device.with(|nic| nic.drops(0).too_long), 1);
}

#[test]
fn a_tag_does_not_count_for_the_limit() {
    let (device, mut driver) = one(Kind::I82599);
    driver.ask(&[0x0001_0004, 5]);
    let mut bytes = frame(driver.mac, OTHER, 1514);
    bytes.splice(12..12, [0x81, 0, 0, 5]);
    inject(&device, &bytes);
    assert_eq!(driver.receive().unwrap().bytes, bytes);
    bytes.push(0);
    inject(&device, &bytes);
    assert_eq!(driver.receive(), None);
}

#[test]
fn rlpml_limits_a_queue_from_x540_on() {
    for kind in Kind::ALL {
        let (device, mut driver) = one(kind);
        driver.rx_up_with(0, BUFFER, 0x8000 | 1000, RING - 1);
        inject(&device, &frame(driver.mac, OTHER, 1000));
        inject(&device, &frame(driver.mac, OTHER, 1001));
        let got = std::iter::from_fn(|| driver.receive()).count();
        assert_eq!(got, if kind == Kind::I82599 { 2 } else { 1 });
    }
}

#[test]
fn an_82599_under_a_jumbo_pf_hears_nothing_before_set_lpe() {
    for kind in [Kind::I82599, Kind::X540] {
        let device = device(Settings {
            kind,
            ..Settings::default()
        });
        device.with(|nic| nic.pf().mtu = 9000);
        let mut driver = Driver::new(&device, 0);
        driver.reset();
        driver.hello();
        driver.ask(&[0x08, 4]);
        driver.rx_up(0, BUFFER);
        inject(&device, &frame(driver.mac, OTHER, 60));
        assert_eq!(driver.receive().is_some(), kind != Kind::I82599);
        driver.ask(&[0x05, 1518]);
        inject(&device, &frame(driver.mac, OTHER, 61));
        assert!(driver.receive().is_some());
    }
}

#[test]
fn checksums_are_checked() {
    const IPCS: u32 = 0x40;
    const L4CS: u32 = 0x20;
    const UDPCS: u32 = 0x10;
    const IPE: u32 = 0x8000_0000;
    const L4E: u32 = 0x4000_0000;
    for kind in Kind::ALL {
        let (device, mut driver) = one(kind);
        let mut look = |bytes: &[u8]| {
            inject(&device, bytes);
            let received = driver.receive().unwrap();
            (received.status & !3, received.kind >> 4)
        };
        let to = [0x02, 0x82, 0x59, 0x90, 0, 1];
        let fill = |transport: &[u8], at: usize, protocol| {
            let mut bytes = transport.to_vec();
            bytes[at..at + 2].copy_from_slice(&pseudo(protocol, transport.len()).to_be_bytes());
            let sum = common::checksum(&bytes);
            bytes[at..at + 2].copy_from_slice(&sum.to_be_bytes());
            bytes
        };
        let good_tcp = ipv4(to, OTHER, 6, &fill(&tcp(b"hello", 0x18, 0), 16, 6));
        assert_eq!(look(&good_tcp), (IPCS | L4CS, 0x11));
        let mut bad = good_tcp.clone();
        bad[54] ^= 1;
        assert_eq!(look(&bad), (IPCS | L4CS | L4E, 0x11));
        let mut bad = good_tcp.clone();
        bad[22] ^= 1;
        assert_eq!(look(&bad), (IPCS | IPE | L4CS, 0x11));
        let good_udp = ipv4(to, OTHER, 17, &fill(&udp(b"hello", 0), 6, 17));
        assert_eq!(look(&good_udp), (IPCS | L4CS | UDPCS, 0x21));
        // Erratum 44: the 82599 takes a missing checksum for a wrong one.
        let absent = look(&ipv4(to, OTHER, 17, &udp(b"hello", 0)));
        let erratum = if kind == Kind::I82599 { L4CS | UDPCS | L4E } else { 0 };
        assert_eq!(absent, (IPCS | erratum, 0x21));
        // A fragment's transport is not looked at.
        let mut fragment = good_tcp.clone();
        fragment[20] = 0x20;
        fragment[24..26].fill(0);
        let sum = common::checksum(&fragment[14..34]);
        fragment[24..26].copy_from_slice(&sum.to_be_bytes());
        assert_eq!(look(&fragment), (IPCS, 0x01));
        assert_eq!(look(&frame(to, OTHER, 60)), (0, 0));
    }
}

#[test]
fn tags_stay_or_are_stripped() {
    let (device, mut driver) = one(Kind::I82599);
    driver.ask(&[0x0001_0004, 5]);
    let plain = frame(driver.mac, OTHER, 80);
    let mut tagged = plain.clone();
    tagged.splice(12..12, [0x81, 0, 0xe0, 5]);
    inject(&device, &tagged);
    let received = driver.receive().unwrap();
    assert_eq!(
        (received.bytes, received.tag, received.status & 8),
        (tagged.clone(), 0, 8)
    );
    driver.rx_up_with(0, BUFFER, STRIP, RING - 1);
    inject(&device, &tagged);
    let received = driver.receive().unwrap();
    assert_eq!(
        (received.bytes, received.tag, received.status & 8),
        (plain.clone(), 0xe005, 8)
    );
    inject(&device, &plain);
    assert_eq!(driver.receive().unwrap().status & 8, 0);
    // A VLAN that was not asked for.
    tagged[15] = 6;
    inject(&device, &tagged);
    assert_eq!(driver.receive(), None);
}

#[test]
fn a_port_vlan_is_not_seen_by_its_vf() {
    let (device, mut a, mut b) = two(Settings::default());
    device.with(|nic| nic.set_port_vlan(0, Some((9, 3))));
    a.restart();
    let bytes = frame(OTHER, a.mac, 60);
    a.send(&bytes);
    let mut tagged = bytes.clone();
    tagged.splice(12..12, [0x81, 0, 0x60, 9]);
    assert_eq!(device.with(|nic| nic.collect()), Some(tagged));
    let mut tagged = frame(a.mac, OTHER, 60);
    let plain = tagged.clone();
    inject(&device, &plain);
    assert_eq!(a.receive(), None, "without the tag");
    tagged.splice(12..12, [0x81, 0, 0, 9]);
    inject(&device, &tagged);
    let received = a.receive().unwrap();
    assert_eq!((received.bytes, received.status & 8), (plain, 0));
    // The neighbour is in no VLAN: broadcast does not reach it.
    a.send(&frame(ALL, a.mac, 60));
    assert_eq!(b.receive(), None);
}

#[test]
fn the_switch_knows_addresses() {
    let (device, mut a, mut b) = two(Settings::default());
    let wire = |device: &Shared| device.with(|nic| std::iter::from_fn(|| nic.collect()).count());
    let to_b = frame(b.mac, a.mac, 60);
    a.send(&to_b);
    let received = b.receive().unwrap();
    assert_eq!(received.bytes, to_b);
    assert_eq!(received.status & 1 << 18, 1 << 18, "LB");
    assert_eq!((wire(&device), a.receive()), (0, None));
    a.send(&frame(OTHER, a.mac, 60));
    assert_eq!((wire(&device), b.receive()), (1, None), "unknown: the wire alone");
    a.send(&frame(ALL, a.mac, 60));
    assert!(b.receive().is_some());
    assert_eq!((wire(&device), a.receive()), (1, None), "broadcast: all but the sender");
    inject(&device, &frame(ALL, OTHER, 60));
    assert!(a.receive().is_some() && b.receive().is_some());
    assert_eq!(wire(&device), 0, "nothing goes back to where it came from");
    // A further address.
    b.ask(&[0x0001_0006, 0x0000_aa02, 0x0900]);
    a.send(&frame(OTHER, a.mac, 60));
    assert!(b.receive().is_some());
    assert_eq!(wire(&device), 0);
}

#[test]
fn multicast_goes_by_hash_and_mode() {
    let group = [0x01, 0, 0x5e, 0, 0xab, 0xcd];
    for (filter, hash) in [(0, 0xcda_u32), (1, 0x9b5), (2, 0x36a), (3, 0xdab)] {
        let (device, mut driver) = one(Kind::X550);
        device.with(|nic| {
            nic.pf().multicast_filter = filter;
            nic.policy(0).trusted = true;
        });
        let hears = |driver: &mut Driver| {
            inject(&device, &frame(group, OTHER, 60));
            driver.receive().is_some()
        };
        assert!(!hears(&mut driver));
        driver.ask(&[0x0001_0003, hash]);
        assert!(hears(&mut driver), "filter {filter}");
        driver.ask(&[0x0001_0003, hash ^ 1]);
        assert!(!hears(&mut driver));
        driver.ask(&[0x0c, 2]);
        assert!(hears(&mut driver), "all multicast");
        driver.ask(&[0x0c, 0]);
        assert!(!hears(&mut driver));
        inject(&device, &frame(ALL, OTHER, 60));
        assert_eq!(driver.receive(), None, "mode none hears no broadcast");
    }
}

#[test]
fn the_promiscuous_hear_everything() {
    let (device, mut a, mut b) = two(Settings {
        kind: Kind::X550,
        ..Settings::default()
    });
    device.with(|nic| {
        nic.pf().promiscuous = true;
        nic.policy(1).trusted = true;
    });
    a.send(&frame(OTHER, a.mac, 60));
    assert_eq!(b.receive(), None);
    assert_eq!(b.ask(&[0x0c, 3])[..2], [SUCCESS | CTS | 0x0c, 3]);
    a.send(&frame(OTHER, a.mac, 60));
    assert!(b.receive().is_some());
    assert_eq!(device.with(|nic| std::iter::from_fn(|| nic.collect()).count()), 2);
}

#[test]
fn an_x550_spreads_by_its_own_key_and_table() {
    let (device, mut driver) = one(Kind::X550);
    for q in 1..4 {
        driver.rx_up(q, BUFFER);
    }
    let key: [u8; 40] = std::array::from_fn(|i| (i * 73 + 5) as u8);
    for (i, word) in key.chunks(4).enumerate() {
        driver.write(0x3100 + 4 * i as u32, u32::from_le_bytes(word.try_into().unwrap()));
    }
    for i in 0..16 {
        driver.write(0x3200 + 4 * i, 0x0001_0203);
    }
    let frames: Vec<_> = (0..32)
        .map(|i| {
            let mut bytes = ipv4(driver.mac, OTHER, 6, &tcp(b"", 0x10, 0));
            bytes[35] = i;
            bytes
        })
        .collect();
    // Off: queue 0, no hash.
    inject(&device, &frames[0]);
    assert_eq!(driver.receive().unwrap().kind & 0xf, 0);
    driver.write(0x3000, 0x0003_0001);
    driver.write(0x300, 2 << 29);
    let mut used = [0; 4];
    for bytes in &frames {
        inject(&device, bytes);
        let input = [&bytes[26..34], &bytes[34..38]].concat();
        let hash = toeplitz(&key, input.into_iter());
        let queue = 3 - hash % 4;
        let received = driver.receive_from(queue).expect("on the queue of its hash");
        assert_eq!((received.hash, received.kind & 0xf), (hash, 1));
        used[queue as usize] += 1;
    }
    assert!(used.iter().all(|count| *count > 0), "{used:?}");
    // RQPL of one bit: queues 0 and 1 alone.
    driver.write(0x300, 1 << 29);
    for bytes in &frames {
        inject(&device, bytes);
    }
    assert_eq!((driver.receive_from(2), driver.receive_from(3)), (None, None));
}

#[test]
fn an_82599_spreads_by_its_pfs_key_and_has_no_table() {
    let (device, mut driver) = one(Kind::I82599);
    driver.rx_up(1, BUFFER);
    driver.write(0x300, 1 << 29);
    for register in [0x3000, 0x3100, 0x3200] {
        driver.write(register, 1);
        assert_eq!(driver.read(register), 0);
    }
    assert_eq!(device.with(|nic| nic.complaints(0).count(Complaint::AbsentRegister)), 6);
    let (key, table) = device.with(|nic| (nic.pf().rss.key, nic.pf().rss.table));
    for port in 0..16 {
        let mut bytes = ipv4(driver.mac, OTHER, 17, &udp(b"", 0));
        bytes[35] = port;
        inject(&device, &bytes);
        // UDP is not among the PF's types: the addresses alone.
        let hash = toeplitz(&key, bytes[26..34].iter().copied());
        let queue = u32::from(table[hash as usize % 128] & 1);
        let received = driver.receive_from(queue).unwrap();
        assert_eq!((received.hash, received.kind & 0xf), (hash, 2));
    }
}

#[test]
fn descriptors_outside_of_memory_stop_the_queue() {
    let (device, mut driver) = one(Kind::I82599);
    driver.memory.write(0, &0x7000_u64.to_le_bytes());
    inject(&device, &frame(driver.mac, OTHER, 60));
    assert_eq!(driver.receive(), None);
    assert_eq!(device.with(|nic| nic.halts(0)), [Halt::Dma]);
    assert!(device.with(|nic| nic.dma(0).take_faults())[0].write);
    assert_eq!(driver.read(0x101c), 0, "not counted");
    driver.rx_up(0, BUFFER);
    inject(&device, &frame(driver.mac, OTHER, 60));
    assert!(driver.receive().is_some());
}

#[test]
fn what_drivers_do_wrong_is_counted() {
    let (device, mut driver) = one(Kind::I82599);
    let complaints = |what| device.with(|nic| nic.complaints(0).count(what));
    driver.write(0x1000, 0);
    assert_eq!(complaints(Complaint::RunningQueueChanged), 1);
    driver.write(0x1028, 0);
    driver.write(0x1018, 3);
    assert_eq!(complaints(Complaint::TailOfStoppedQueue), 1);
    driver.write(0x1000, 0x1234_56ff);
    driver.write(0x1008, 0xffff_ffff);
    assert_eq!((driver.read(0x1000), driver.read(0x1008)), (0x1234_5680, 0x000f_ff80));
    assert_eq!(complaints(Complaint::BadRing), 2);
    driver.write(0x1028, 1 << 25);
    assert_eq!(complaints(Complaint::BadRing), 3, "too long");
    driver.write(0x1000 + 0x40 * 5 + 0x28, 1 << 25);
    assert_eq!(complaints(Complaint::ForeignQueue), 1);
    driver.write(0x400, 0);
    driver.read(0x2);
    assert_eq!(complaints(Complaint::UnknownRegister), 2);
    driver.write(0x101c, 0);
    assert_eq!(complaints(Complaint::ReadOnlyRegister), 1);
    driver.write(0x120, 0x83);
    assert_eq!(complaints(Complaint::BadVector), 1);
    driver.rx_up(0, 0x0000_0002);
    inject(&device, &frame(driver.mac, OTHER, 60));
    assert_eq!(complaints(Complaint::BadRxDescriptorKind), 1);
}
