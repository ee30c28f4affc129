//! Transmit: descriptors, contexts, checksums, segmentation, tags, what is refused.

mod common;

use common::{
    CC, DATA, Driver, IXSM, TSE, TXSM, VLE, checksum, device, frame, ipv4, pseudo, tcp, transport_ok, two, udp,
};
use vf_model::{Complaint, Halt, Kind, Settings, Shared};

const OTHER: [u8; 6] = [0x02, 0xaa, 0, 0, 0, 0x09];
/// TUCMD: IPv4, TCP; IPv4, UDP; IPv6, TCP.
const V4_TCP: u64 = 0xc00;
const V4_UDP: u64 = 0x400;
const V6_TCP: u64 = 0x800;

fn one(kind: Kind) -> (Shared, Driver) {
    let device = device(Settings {
        kind,
        ..Settings::default()
    });
    let driver = Driver::up(&device, 0);
    (device, driver)
}

fn wire(device: &Shared) -> Vec<Vec<u8>> {
    device.with(|nic| std::iter::from_fn(|| nic.collect()).collect())
}

#[test]
fn a_packet_goes_out_and_its_descriptor_is_done() {
    let (device, mut driver) = one(Kind::I82599);
    for length in [60, 61, 64, 1000, 1514] {
        let bytes = frame(OTHER, driver.mac, length);
        let index = driver.send(&bytes);
        assert!(driver.is_done(0, index));
        assert_eq!(wire(&device), [bytes]);
    }
    assert!(device.with(|nic| nic.complaints(0).is_empty()));
}

#[test]
fn a_short_packet_is_padded() {
    let (device, mut driver) = one(Kind::I82599);
    let bytes = frame(OTHER, driver.mac, 20);
    driver.send(&bytes);
    let sent = &wire(&device)[0];
    assert_eq!((sent.len(), &sent[..20]), (60, &bytes[..]));
    assert!(sent[20..].iter().all(|byte| *byte == 0));
    driver.send(&bytes[..16]);
    assert_eq!(device.with(|nic| nic.complaints(0).count(Complaint::ShortTxPacket)), 1);
}

#[test]
fn the_ring_wraps() {
    let (device, mut driver) = one(Kind::I82599);
    for i in 0..200_u8 {
        let bytes = frame(OTHER, driver.mac, 60 + usize::from(i));
        let index = driver.send(&bytes);
        assert!(driver.is_done(0, index));
        assert_eq!(wire(&device), [bytes]);
    }
    assert_eq!(driver.read(0x2010), driver.read(0x2018), "head meets tail");
}

#[test]
fn pieces_are_gathered_and_forty_are_too_many_after_that() {
    let (device, mut driver) = one(Kind::I82599);
    for (pieces, goes) in [(2, true), (40, true), (41, false)] {
        let bytes = frame(OTHER, driver.mac, 820);
        driver.put_context(0, (14, 0, 0), 0, 0, 0);
        let mut at = 0;
        for piece in 0..pieces {
            let end = if piece == pieces - 1 { bytes.len() } else { at + 20 };
            let address = driver.buffer(at, &bytes[at..end]);
            let eop = if end == bytes.len() { DATA } else { DATA & !0x0900_0000 };
            let high = u64::from(eop | (end - at) as u32) | u64::from(CC | 820 << 14) << 32;
            driver.put(0, address, high);
            at = end;
            // Before the last descriptor is there, nothing moves.
            driver.tx_tail(0);
            device.step();
            assert_eq!(wire(&device).len(), usize::from(at == bytes.len() && goes));
        }
        let expected = if goes { vec![] } else { vec![Halt::Malformed] };
        assert_eq!(device.with(|nic| nic.halts(0)), expected);
    }
}

#[test]
fn checksums_are_inserted() {
    let (device, mut driver) = one(Kind::X540);
    for length in [0, 1, 2, 999, 1000] {
        let payload: Vec<u8> = (0..length).map(|i| (i * 31) as u8).collect();
        let mut bytes = ipv4(OTHER, driver.mac, 17, &udp(&payload, pseudo(17, 8 + length)));
        let right = bytes.clone();
        bytes[24..26].fill(0);
        driver.put_context(0, (14, 20, 0), 0, V4_UDP, 0);
        driver.put_packet(&bytes, 0, CC | IXSM | TXSM, bytes.len());
        driver.tx_tail(0);
        driver.settle();
        let sent = wire(&device).remove(0);
        assert_eq!(sent[..40], right[..40], "the IP checksum is back");
        assert!(transport_ok(&sent), "{length}");
    }
}

#[test]
fn sctp_has_a_crc() {
    let (device, mut driver) = one(Kind::X540);
    let mut sctp = vec![0; 12];
    sctp.extend(b"123456789");
    let bytes = ipv4(OTHER, driver.mac, 132, &sctp);
    driver.put_context(0, (14, 20, 0), 0, 0x1400, 0);
    driver.put_packet(&bytes, 0, CC | TXSM, bytes.len());
    driver.tx_tail(0);
    driver.settle();
    let sent = wire(&device).remove(0);
    // CRC-32C of twelve zeros and the digits, by another implementation.
    assert_eq!(sent[42..46], crc_reference(&sctp).to_le_bytes());
}

/// CRC-32C by long division, bit by bit from the top: not the model's way.
fn crc_reference(bytes: &[u8]) -> u32 {
    let mut register = u32::MAX;
    for byte in bytes {
        register ^= u32::from(byte.reverse_bits()) << 24;
        for _ in 0..8 {
            let top = register >> 31 == 1;
            register <<= 1;
            if top {
                register ^= 0x1edc_6f41;
            }
        }
    }
    (!register).reverse_bits()
}

#[test]
fn tcp_is_cut_into_segments() {
    let (device, mut driver) = one(Kind::X550);
    driver.ask(&[0x0001_0004, 7]);
    let payload: Vec<u8> = (0..2500_u32).map(|i| (i * 13) as u8).collect();
    // FIN, PSH, ACK, CWR. The IP length and checksum are left to the device.
    let mut bytes = ipv4(OTHER, driver.mac, 6, &tcp(&payload, 0x99, pseudo(6, 0)));
    bytes[16..18].fill(0);
    bytes[24..26].fill(0);
    driver.put_context(1, (14, 20, 20), 0x6007, V4_TCP, 1000);
    driver.put_packet(&bytes, TSE | VLE, CC | IXSM | TXSM | 1 << 4, payload.len());
    driver.tx_tail(0);
    driver.settle();
    let sent = wire(&device);
    assert_eq!(sent.iter().map(Vec::len).collect::<Vec<_>>(), [1058, 1058, 558]);
    let mut joined: Vec<u8> = Vec::new();
    for (i, segment) in sent.iter().enumerate() {
        assert_eq!(segment[12..16], [0x81, 0, 0x60, 7], "tag");
        let plain = [&segment[..12], &segment[16..]].concat();
        assert_eq!(checksum(&plain[14..34]), 0, "IP");
        assert!(transport_ok(&plain));
        assert_eq!(plain[16..18], (plain.len() as u16 - 14).to_be_bytes(), "length");
        assert_eq!(plain[18..20], (0x1234 + i as u16).to_be_bytes(), "identification");
        assert_eq!(plain[38..42], (1 + 1000 * i as u32).to_be_bytes(), "sequence");
        assert_eq!(plain[47], [0x90, 0x10, 0x19][i], "CWR first, FIN and PSH last");
        joined.extend(&plain[54..]);
    }
    assert_eq!(joined, payload);
    assert_eq!(device.with(|nic| nic.offloads(0).segmented), 1);
}

#[test]
fn tcp_over_ipv6_is_cut_into_segments() {
    let (device, mut driver) = one(Kind::X550);
    let payload = [7; 700];
    let addresses: Vec<u8> = (0..32).collect();
    let partial = !checksum(&[&addresses[..], &[0, 6]].concat());
    let header = [&[0x60, 0, 0, 0, 0, 0, 6, 64][..], &addresses].concat();
    let bytes = [
        &OTHER[..],
        &driver.mac,
        &[0x86, 0xdd],
        &header,
        &tcp(&payload, 0x18, partial),
    ]
    .concat();
    driver.put_context(0, (14, 40, 20), 0, V6_TCP, 400);
    driver.put_packet(&bytes, TSE, CC | TXSM, payload.len());
    driver.tx_tail(0);
    driver.settle();
    let sent = wire(&device);
    assert_eq!(sent.len(), 2);
    for segment in &sent {
        let length = segment.len() as u16 - 54;
        assert_eq!(segment[18..20], length.to_be_bytes());
        let mut covered = [0, 6].to_vec();
        covered.extend(length.to_be_bytes());
        covered.extend(&segment[22..]);
        assert_eq!(checksum(&covered), 0);
    }
}

#[test]
fn udp_is_cut_into_datagrams() {
    let (device, mut driver) = one(Kind::X550);
    let payload = [9; 250];
    let mut bytes = ipv4(OTHER, driver.mac, 17, &udp(&payload, pseudo(17, 0)));
    bytes[24..26].fill(0);
    driver.put_context(0, (14, 20, 8), 0, V4_UDP, 100);
    driver.put_packet(&bytes, TSE, CC | IXSM | TXSM, payload.len());
    driver.tx_tail(0);
    driver.settle();
    let lengths: Vec<u16> = wire(&device)
        .iter()
        .map(|sent| {
            let end = 14 + usize::from(u16::from_be_bytes([sent[16], sent[17]]));
            assert!(transport_ok(&sent[..end]));
            u16::from_be_bytes([sent[38], sent[39]])
        })
        .collect();
    assert_eq!(lengths, [108, 108, 58]);
}

#[test]
fn a_tag_is_inserted_and_comes_off_at_the_other_end() {
    let (device, mut a, mut b) = two(Settings::default());
    for driver in [&mut a, &mut b] {
        driver.ask(&[0x0001_0004, 5]);
    }
    b.rx_up_with(0, 0x0200_0002, 0x4000_0000, 63);
    let bytes = frame(b.mac, a.mac, 100);
    a.put_context(0, (14, 0, 0), 0xa005, 0, 0);
    a.put_packet(&bytes, VLE, CC, bytes.len());
    a.tx_tail(0);
    a.settle();
    let received = b.receive().unwrap();
    assert_eq!((received.bytes, received.tag), (bytes, 0xa005));
    assert_eq!(received.status & 0x8, 0x8, "VP");
    assert!(wire(&device).is_empty());
}

#[test]
fn the_head_is_written_back_where_asked() {
    let (device, mut driver) = one(Kind::I82599);
    let place = driver.buffer(0x7000, &[0xff; 4]);
    driver.write(0x203c, (place >> 32) as u32);
    driver.write(0x2038, place as u32 | 1);
    let bytes = frame(OTHER, driver.mac, 60);
    let index = driver.send(&bytes);
    assert!(!driver.is_done(0, index), "instead of the descriptor");
    assert_eq!(driver.memory.read(0x18_7000), 2_u32.to_le_bytes());
    assert_eq!(wire(&device).len(), 1);
}

#[test]
fn malicious_driver_detection_stops_what_has_no_context() {
    for (kind, detection) in [(Kind::X550, true), (Kind::X550, false), (Kind::I82599, false)] {
        let (device, mut driver) = one(kind);
        device.with(|nic| nic.pf().malicious_detection = detection);
        let bytes = frame(OTHER, driver.mac, 60);
        // CC, but no context was ever loaded; then a context, but no CC.
        for olinfo in [CC, 0] {
            let index = driver.put_packet(&bytes, 0, olinfo, 60);
            driver.tx_tail(0);
            driver.settle();
            assert_eq!(driver.is_done(0, index), !detection);
            assert_eq!(wire(&device).len(), usize::from(!detection));
            let halts = if detection { vec![Halt::Malicious] } else { vec![] };
            assert_eq!(device.with(|nic| nic.halts(0)), halts);
            // Disabling the queue does not help.
            driver.tx_up(0);
            assert_eq!(device.with(|nic| nic.halts(0)), halts);
            // A reset does.
            driver.restart();
            assert_eq!(device.with(|nic| nic.halts(0)), []);
            driver.put_context(0, (14, 0, 0), 0, 0, 0);
        }
        let complaints = device.with(|nic| nic.complaints(0).count(Complaint::NoContext));
        assert_eq!(complaints, 2);
    }
}

#[test]
fn contexts_are_gone_after_a_reset() {
    let (device, mut driver) = one(Kind::X550);
    device.with(|nic| nic.pf().malicious_detection = true);
    let bytes = frame(OTHER, driver.mac, 60);
    driver.send(&bytes);
    driver.restart();
    driver.put_packet(&bytes, 0, CC, 60);
    driver.tx_tail(0);
    driver.settle();
    assert_eq!(device.with(|nic| nic.halts(0)), [Halt::Malicious]);
}

#[test]
fn bad_descriptors_stop_the_queue() {
    let (device, mut driver) = one(Kind::I82599);
    let bytes = frame(OTHER, driver.mac, 60);
    let address = driver.buffer(0, &bytes);
    let good = u64::from(DATA | 60) | u64::from(CC | 60 << 14) << 32;
    for (what, bad) in [
        ("legacy", good & !(1 << 29)),
        ("type", good & !(0xf << 20)),
        ("empty", good & !0xffff),
        ("PAYLEN", good & !(0x3_ffff << 46) | 61 << 46),
        ("segments of no size", good | u64::from(TSE)),
    ] {
        driver.put_context(0, (14, 0, 0), 0, 0, 0);
        driver.put(0, address, bad);
        driver.tx_tail(0);
        driver.settle();
        assert_eq!(device.with(|nic| nic.halts(0)), [Halt::Malformed], "{what}");
        assert_eq!(wire(&device).len(), 0, "{what}");
        // A good one behind it does not go either, until the queue begins again.
        driver.put(0, address, good);
        driver.tx_tail(0);
        driver.settle();
        assert_eq!(wire(&device).len(), 0, "{what}");
        driver.tx_up(0);
        driver.send(&bytes);
        assert_eq!(wire(&device).len(), 1, "{what}");
    }
    assert_eq!(
        device.with(|nic| nic.complaints(0).count(Complaint::BadTxDescriptor)),
        5
    );
}

#[test]
fn memory_outside_is_not_read() {
    let (device, mut driver) = one(Kind::I82599);
    let high = u64::from(DATA | 60) | u64::from(CC | 60 << 14) << 32;
    driver.put(0, 0x1000, high);
    driver.tx_tail(0);
    driver.settle();
    assert_eq!(device.with(|nic| nic.halts(0)), [Halt::Dma]);
    let faults = device.with(|nic| nic.dma(0).take_faults());
    assert_eq!((faults.len(), faults[0].address, faults[0].write), (1, 0x1000, false));
}

#[test]
#[should_panic(expected = "accesses were refused")]
fn a_fault_that_nobody_took_is_a_panic() {
    let (_device, mut driver) = one(Kind::I82599);
    driver.put(0, 0x1000, u64::from(DATA | 60) | u64::from(60_u32 << 14) << 32);
    driver.tx_tail(0);
    driver.settle();
}

#[test]
fn without_ifcs_there_is_no_frame() {
    let (device, mut driver) = one(Kind::I82599);
    let bytes = frame(OTHER, driver.mac, 60);
    let address = driver.buffer(0, &bytes);
    driver.put_context(0, (14, 0, 0), 0, 0, 0);
    let high = u64::from(DATA & !0x0200_0000 | 60) | u64::from(CC | 60 << 14) << 32;
    let index = driver.put(0, address, high);
    driver.tx_tail(0);
    driver.settle();
    assert!(driver.is_done(0, index));
    assert!(wire(&device).is_empty());
    assert_eq!(device.with(|nic| nic.drops(0).no_crc), 1);
}

#[test]
fn nothing_is_sent_while_the_link_is_down_and_all_of_it_after() {
    let (device, mut driver) = one(Kind::I82599);
    device.with(|nic| nic.set_link(None));
    let bytes = frame(OTHER, driver.mac, 60);
    let index = driver.send(&bytes);
    assert!(!driver.is_done(0, index));
    device.with(|nic| nic.set_link(Some(vf_model::Speed::G10)));
    driver.settle();
    assert!(driver.is_done(0, index));
    assert_eq!(wire(&device).len(), 1);
}

#[test]
fn before_reset_is_sent_nothing_moves() {
    let device = device(Settings::default());
    let mut driver = Driver::new(&device, 0);
    driver.reset();
    driver.tx_up(0);
    let bytes = frame(OTHER, [0x02, 0x82, 0x59, 0x90, 0, 1], 60);
    let index = driver.send(&bytes);
    assert!(!driver.is_done(0, index));
    driver.hello();
    driver.settle();
    assert!(driver.is_done(0, index));
}

#[test]
fn foreign_sources_are_dropped_unless_allowed() {
    let (device, mut driver) = one(Kind::I82599);
    let bytes = frame(OTHER, [0x02, 1, 1, 1, 1, 1], 60);
    let index = driver.send(&bytes);
    assert!(driver.is_done(0, index), "the driver does not notice");
    assert!(wire(&device).is_empty());
    assert_eq!(device.with(|nic| nic.drops(0).spoofed), 1);
    device.with(|nic| nic.policy(0).spoof_check = false);
    driver.send(&bytes);
    assert_eq!(wire(&device).len(), 1);
}
