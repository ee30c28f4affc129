//! Every function that takes numbers takes all of them: no panic, nothing out of bounds, in debug and in release builds.

mod common;

use common::Place;
use proptest::prelude::*;
use usernic::offload::checksum::{Partial, Sum, pseudo, set_ipv4, verify};
use usernic::offload::hash::{Indirection, KEY, Toeplitz};
use usernic::offload::headers::{Headers, MAX_HEADERS, Network, Transport};
use usernic::offload::segment::Segmenter;
use usernic::{Burst, Packet};
use virtio_ring::net::{GsoType, HashReport, HashTypes};

/// The ends of what a number can be, and what lies around the places of a buffer.
fn number() -> impl Strategy<Value = usize> {
    let ends = [0, 14, 128, 2048, 2176, 1 << 15, 1 << 16, 1 << 31, 1 << 32, 1 << 63];
    prop_oneof![
        (prop::sample::select(ends.to_vec()), -3isize..=3).prop_map(|(end, by)| usize::wrapping_add_signed(end, by)),
        0usize..9000,
    ]
}

#[derive(Clone, Debug)]
enum Step {
    SetLen(usize),
    Read(usize, usize),
    Write(usize, usize),
    Fill(usize),
    Prepend(usize),
    Trim(usize),
    Move(isize),
    Checksum(u16, u16),
    AskChecksum,
    Cut(u16),
    Tag(Option<u16>),
    Complete,
    Clear,
    Copy,
    Send,
}

fn step() -> impl Strategy<Value = Step> {
    let short = || 0usize..3000;
    prop_oneof![
        number().prop_map(Step::SetLen),
        (number(), short()).prop_map(|(at, n)| Step::Read(at, n)),
        (number(), short()).prop_map(|(at, n)| Step::Write(at, n)),
        short().prop_map(Step::Fill),
        short().prop_map(Step::Prepend),
        number().prop_map(Step::Trim),
        number().prop_map(|n| Step::Move(n as isize)),
        (number(), number()).prop_map(|(start, offset)| Step::Checksum(start as u16, offset as u16)),
        Just(Step::AskChecksum),
        number().prop_map(|size| Step::Cut(size as u16)),
        proptest::option::of(any::<u16>()).prop_map(Step::Tag),
        Just(Step::Complete),
        Just(Step::Clear),
        Just(Step::Copy),
        Just(Step::Send),
    ]
}

/// A TCP frame, so that what is asked for can be done.
fn tcp(len: usize) -> Vec<u8> {
    let mut frame = vec![0; len];
    let header = [8, 0, 0x45, 0, 0, 0, 0, 1, 0, 0, 64, 6];
    for (at, byte) in (12..).zip(header).chain([(46, 0x50)]) {
        if at < len {
            frame[at] = byte;
        }
    }
    frame
}

/// What must hold of every packet, whatever was done to it: its length is what its bytes are.
fn look_at(packet: &Packet) {
    let len = packet.len();
    let mut bytes = vec![0; len];
    assert!(packet.read_at(0, &mut bytes).is_ok() && packet.copy_to(&mut bytes) == len);
    assert!(packet.read_at(len, &mut [0]).is_err() && packet.read_at(1, &mut bytes).is_err());
    assert!(packet.headroom() + packet.tailroom() <= 2048 + 128);
    let place = packet.place();
    assert_eq!(
        (place.len as usize, usize::from(place.headroom)),
        (len, packet.headroom())
    );
    let _ = (
        packet.verify_checksum(),
        packet.checksum(),
        packet.segmentation(),
        packet.received_hash(),
    );
    let _ = (
        packet.hash(&Toeplitz::new(&KEY), HashTypes::all()),
        packet.header::<20>(),
        packet.vlan_tag(),
    );
}

#[test]
fn packets_take_all_numbers() {
    let place = Place::new();
    let (front, back) = place.pair("csum=1,tso=1,mtu=9000", "mtu=9000");
    let queues = [front.queue(0).unwrap(), back.queue(0).unwrap()];
    let queues = std::cell::RefCell::new(queues);
    let config = ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(150)
    };
    proptest!(config, |(steps in proptest::collection::vec(step(), 1..30), side in 0usize..2)| {
        let queues = &mut *queues.borrow_mut();
        let Some(mut packet) = queues[side].packet() else {
            return Err(TestCaseError::fail("buffers are gone"));
        };
        for step in steps {
            match step {
                Step::SetLen(len) => match packet.set_len(len) {
                    Ok(()) => prop_assert_eq!(packet.len(), len),
                    Err(_) => prop_assert!(packet.is_empty() && len > 65_536, "{}", len),
                },
                Step::Read(at, n) => {
                    let fits = at.checked_add(n).is_some_and(|end| end <= packet.len());
                    prop_assert_eq!(packet.read_at(at, &mut vec![0; n]).is_ok(), fits);
                }
                Step::Write(at, n) => {
                    let fits = at.checked_add(n).is_some_and(|end| end <= packet.len());
                    prop_assert_eq!(packet.write_at(at, &vec![1; n]).is_ok(), fits);
                }
                Step::Fill(n) => packet.copy_from(&tcp(n)).unwrap(),
                Step::Prepend(n) => {
                    let fits = n <= packet.headroom();
                    prop_assert_eq!(packet.prepend(&vec![2; n]).is_ok(), fits);
                }
                Step::Trim(n) => {
                    let (before, done) = (packet.len(), packet.trim_front(n).is_ok());
                    prop_assert_eq!(packet.len(), if done { before - n } else { before });
                }
                Step::Move(by) => {
                    let (before, done) = (packet.len() as isize, packet.move_start(by).is_ok());
                    prop_assert_eq!(packet.len() as isize, if done { before - by } else { before });
                }
                Step::Checksum(start, offset) => packet.set_checksum(Partial { start, offset }),
                Step::AskChecksum => _ = packet.request_checksum(),
                Step::Cut(size) => _ = packet.request_segmentation(size),
                Step::Tag(tag) => packet.set_vlan_tag(tag),
                Step::Complete => _ = packet.complete_checksum(),
                Step::Clear => packet.clear_offloads(),
                Step::Copy => {
                    if let Some(mut copy) = queues[1 - side].packet() {
                        copy.copy_packet(&packet).unwrap();
                        prop_assert_eq!(copy.len(), packet.len());
                        packet = copy;
                    }
                }
                Step::Send => {
                    let mut burst = Burst::new(1);
                    let packet = std::mem::replace(&mut packet, queues[side].packet().unwrap());
                    burst.push(packet).unwrap();
                    queues[side].tx(&mut burst);
                    let mut got = Burst::new(64);
                    queues[1 - side].rx(&mut got);
                    got.iter().for_each(look_at);
                    got.clear();
                    // What the other side has read comes home.
                    queues[side].reclaim();
                }
            }
            look_at(&packet);
        }
    });
    // The ports work afterwards.
    let [front, back] = queues.into_inner();
    let (mut from, mut to) = (front, back);
    let mut got = Burst::new(64);
    to.rx(&mut got);
    got.clear();
    let mut packet = from.packet().unwrap();
    packet.copy_from(&[9; 60]).unwrap();
    let mut burst = Burst::new(1);
    burst.push(packet).unwrap();
    assert_eq!(from.tx(&mut burst), 1);
    common::until("it has come", || to.rx(&mut got) > 0);
    assert_eq!(got[0].header::<60>(), Some([9; 60]));
}

/// A wait without an end is asked for by the longest time there is, which no clock can add.
#[test]
fn waits_take_the_longest_time() {
    use std::time::Duration;
    use usernic::vhost_user::{BackendSession, Closer, FrontendSession};
    let place = Place::new();
    let nobody = place.socket().with_extension("none");
    assert!(FrontendSession::connect(&nobody, Duration::MAX).is_err());
    let offer = vhost_proto::Offer {
        features: 1 << 32,
        protocol: vhost_proto::ProtocolFeatures::MQ,
        rings: 2,
        queue_num: 1,
        mem_slots: 8,
    };
    assert!(BackendSession::connect(&nobody, offer, Duration::MAX, &Closer::default()).is_err());
    let (front, back) = place.pair("", "");
    let mut session = FrontendSession::connect(&place.socket(), Duration::MAX).unwrap();
    session.begin();
    session.end();
    drop(session);
    assert!(front.wait_link(Duration::MAX));
    let (mut from, mut to) = (front.queue(0).unwrap(), back.queue(0).unwrap());
    let mut burst = Burst::new(1);
    assert_eq!(from.alloc(&mut burst, usize::MAX), 1);
    burst[0].copy_from(&[7; 60]).unwrap();
    assert_eq!(from.tx(&mut burst), 1);
    assert!(to.wait(Some(Duration::MAX)).unwrap());
    assert_eq!(to.rx(&mut burst), 1);
    assert!(from.drain(Duration::MAX) && to.drain(Duration::MAX));
}

/// A switch's numbers are its caller's, too.
#[test]
fn a_switch_takes_all_numbers_or_refuses_them() {
    use std::time::Duration;
    use usernic::switch::{Mac, MacTable, Switch, SwitchConfig};
    for entries in [0, 1, 5] {
        let mut table = MacTable::new(entries, Duration::MAX, 0);
        table.learn(Mac::new([2; 6]), u16::MAX, u32::MAX);
        assert_eq!(table.lookup(Mac::new([2; 6]), u32::MAX), Some(u16::MAX));
        table.remove(0);
    }
    for addresses in [0, 1, usize::MAX, usize::MAX / 2, 1 << 40] {
        let config = SwitchConfig {
            addresses,
            ageing: Duration::MAX,
            idle: Duration::MAX,
            ..SwitchConfig::default()
        };
        match Switch::new(config) {
            Ok(mut switch) => assert!(addresses <= 1 && switch.drain(Duration::MAX) && switch.turn() == 0),
            Err(error) => assert!(addresses > 1 && error.to_string().contains("addresses"), "{error}"),
        }
    }
}

fn headers() -> impl Strategy<Value = Headers> {
    let network = prop::sample::select(vec![Network::Other, Network::Ipv4, Network::Ipv6]);
    let transport = prop::sample::select(vec![
        Transport::Other(1),
        Transport::Fragment(6),
        Transport::Tcp,
        Transport::Udp,
    ]);
    (
        network,
        transport,
        [number(), number(), number(), number(), number(), number()],
        any::<[bool; 3]>(),
    )
        .prop_map(|(network, transport, at, [wrong_length, extended, routed])| Headers {
            tag: None,
            ether_type: 0x0800,
            network,
            network_at: at[0],
            transport,
            transport_at: at[1],
            payload_at: at[2],
            end: at[3],
            wrong_length,
            source_at: at[4],
            destination_at: at[5],
            extended,
            routed,
        })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    /// Headers are a struct of public numbers: nobody need have made them by parsing.
    #[test]
    fn functions_over_headers_take_all_numbers(
        headers in headers(),
        mut bytes in proptest::collection::vec(any::<u8>(), 0..300),
        len in number(),
        start in number(),
        offset in number(),
    ) {
        let _ = pseudo(&headers, &bytes, len);
        let _ = verify(&headers, [&bytes[..]]);
        let _ = Partial::open(&headers, &mut bytes, len);
        set_ipv4(&headers, &mut bytes);
        let partial = Partial { start: start as u16, offset: offset as u16 };
        prop_assert_eq!(partial.complete(&mut bytes), partial.fits(bytes.len()));
        let _ = Toeplitz::new(&KEY).report(&headers, &bytes, HashTypes::all());
        let table = Indirection::even(start as u16 | 1);
        prop_assert!(table.pair(len as u32, HashReport::IPV4) < start as u16 | 1);
        let mut sum = Sum::of(&bytes);
        sum.add(&bytes);
        let _ = sum.checksum_not_zero();
    }

    #[test]
    fn frames_of_any_length_are_parsed_and_cut(len in number(), frame_len in number(), size in number()) {
        let bytes = tcp(len.min(400));
        for frame_len in [frame_len, bytes.len(), len] {
            if let Some(headers) = Headers::parse(&bytes, frame_len) {
                prop_assert!(headers.network_at <= headers.transport_at && headers.transport_at <= headers.payload_at);
                prop_assert!(headers.payload_at <= headers.end && headers.end <= frame_len);
                prop_assert!(headers.payload_at <= MAX_HEADERS);
            }
            for kind in [GsoType::TCPV4, GsoType::TCPV6, GsoType::UDP_L4, GsoType(size as u8)] {
                let Ok(mut segmenter) = Segmenter::new(&bytes, frame_len, kind, size as u16) else { continue };
                let (mut cut, longest) = (0, segmenter.longest());
                while let Some(next) = segmenter.next() {
                    prop_assert!(next.packet_len() <= longest);
                    cut += next.payload().len();
                }
                prop_assert_eq!(cut + segmenter.header_len(), frame_len);
            }
        }
    }
}
