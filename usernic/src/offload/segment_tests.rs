use super::*;
use crate::offload::checksum::tests::etherparse_agrees;
use etherparse::{PacketHeaders, TransportHeader};
use proptest::prelude::*;

fn cut(frame: &[u8], kind: GsoType, size: u16) -> Result<Vec<Vec<u8>>, Uncuttable> {
    let mut segmenter = Segmenter::new(frame, frame.len(), kind, size)?;
    let (expected, longest) = (segmenter.packets(), segmenter.longest());
    let mut packets = Vec::new();
    while let Some(cut) = segmenter.next() {
        let payload = &frame[cut.payload()];
        let len = cut.packet_len();
        packets.push([cut.headers_with(payload), payload].concat());
        assert_eq!(packets.last().unwrap().len(), len);
    }
    assert_eq!(packets.len(), expected);
    assert_eq!(packets.iter().map(Vec::len).max(), Some(longest));
    assert_eq!(segmenter.packets(), 0);
    Ok(packets)
}

#[derive(Debug, Clone)]
struct Large {
    frame: Vec<u8>,
    kind: GsoType,
    payload: Vec<u8>,
}

/// A packet of any size whose lengths and checksums are whatever they are.
fn large() -> impl Strategy<Value = Large> {
    let payload = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..300),
        prop::collection::vec(any::<u8>(), 0..5000)
    ];
    (
        0..3usize,
        any::<bool>(),
        any::<bool>(),
        0..11usize,
        any::<[u16; 4]>(),
        payload,
    )
        .prop_map(|(tags, six, tcp, options, words, payload)| {
            let mut frame = vec![2; 12];
            for _ in 0..tags {
                frame.extend([0x81, 0, 0, 5]);
            }
            let protocol = if tcp { 6 } else { 17 };
            let [word, ..] = words.map(u16::to_be_bytes);
            if six {
                frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, word[0], word[1]]);
                frame.extend([if options % 2 == 1 { 60 } else { protocol }, 9]);
                frame.extend([3; 16]);
                frame.extend([word; 8].concat());
                if options % 2 == 1 {
                    frame.extend([protocol, 0, 1, 4, 0, 0, 0, 0]);
                }
            } else {
                frame.extend([8, 0, 0x40 | (5 + options as u8), 0, word[1], word[0]]);
                frame.extend([word[0], word[1], 0x40, 0, 9, protocol, 7, 7, 3, 3, 3, 3]);
                frame.extend([word[1]; 4]);
                frame.extend(vec![1; 4 * options]);
            }
            if !six {
                // Nothing, as some senders leave it.
                let at = 14 + 4 * tags + 2;
                frame[at..at + 2].fill(0);
            } else {
                let at = 14 + 4 * tags + 4;
                frame[at..at + 2].fill(0);
            }
            frame.extend([0, 1, 0, 2]);
            if tcp {
                frame.extend(words.map(u16::to_be_bytes).concat());
                frame.extend([0x50 + (options as u8) * 16, 0xff, 1, 2, 3, 4, 0, 0]);
                frame.extend(vec![1; 4 * options]);
            } else {
                frame.extend([word[0], word[1], 9, 9]);
            }
            frame.extend(&payload);
            let kind = match (tcp, six) {
                (true, false) => GsoType::TCPV4,
                (true, true) => GsoType::TCPV6,
                (false, _) => GsoType::UDP_L4,
            };
            Large { frame, kind, payload }
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    /// What is cut is, put together again, what it was; and every packet is right by etherparse.
    #[test]
    fn cut_and_joined(large in large(), size in prop_oneof![1..100u16, 1..3000u16]) {
        let Large { frame, kind, payload } = large;
        let packets = match cut(&frame, kind, size) {
            Ok(packets) => packets,
            Err(error) => {
                prop_assert!(payload.len().div_ceil(size.into()) > MAX_PACKETS, "{:?}", error);
                return Ok(());
            }
        };
        prop_assert_eq!(packets.len(), payload.len().div_ceil(size.into()).max(1));
        let whole = Headers::parse(&frame, frame.len()).unwrap();
        let last = packets.len() - 1;
        let mut joined: Vec<u8> = Vec::new();
        for (number, packet) in packets.iter().enumerate() {
            prop_assert!(etherparse_agrees(packet), "packet {}", number);
            let headers = Headers::parse(packet, packet.len()).unwrap();
            prop_assert!(!headers.wrong_length && headers.end == packet.len());
            prop_assert_eq!(headers.payload_at, whole.payload_at);
            let parsed = PacketHeaders::from_ethernet_slice(packet).unwrap();
            if let Some(etherparse::NetHeaders::Ipv4(ip, _)) = &parsed.net {
                let first = be16(&frame, whole.network_at + 4).unwrap();
                prop_assert_eq!(ip.identification, first.wrapping_add(number as u16));
                prop_assert!(ip.dont_fragment);
            }
            match parsed.transport.unwrap() {
                TransportHeader::Tcp(tcp) => {
                    let first = u32::from_be_bytes(frame[whole.transport_at + 4..][..4].try_into().unwrap());
                    prop_assert_eq!(tcp.sequence_number, first.wrapping_add(joined.len() as u32));
                    // All flags were set.
                    prop_assert_eq!((tcp.fin, tcp.psh), (number == last, number == last));
                    prop_assert_eq!(tcp.cwr, number == 0);
                    prop_assert!(tcp.syn && tcp.ack && tcp.urg && tcp.ece);
                    prop_assert_eq!(tcp.options.as_slice(), &frame[whole.transport_at + 20..whole.payload_at]);
                }
                TransportHeader::Udp(udp) => {
                    prop_assert_eq!(usize::from(udp.length), packet.len() - whole.transport_at);
                    prop_assert_ne!(udp.checksum, 0);
                }
                other => prop_assert!(false, "{:?}", other),
            }
            let here = &packet[whole.payload_at..];
            prop_assert!(number == last || here.len() == usize::from(size));
            joined.extend(here);
        }
        prop_assert_eq!(joined, payload);
    }

    /// The wrong type is refused, any bytes are taken.
    #[test]
    fn any_bytes(large in large(), kind: u8, at in any::<prop::sample::Index>(), value: u8, size: u16) {
        let Large { mut frame, kind: right, .. } = large;
        if GsoType(kind).kind() != right.kind() {
            prop_assert!(Segmenter::new(&frame, frame.len(), GsoType(kind), size).is_err());
        }
        let at = at.index(frame.len().min(100));
        frame[at] = value;
        let _ = cut(&frame, right, size);
        // Of a large frame, only the first bytes.
        if let Ok(mut segmenter) = Segmenter::new(&frame[..frame.len().min(300)], 65_550, right, size.max(100)) {
            while let Some(cut) = segmenter.next() {
                cut.headers(Sum::new());
            }
        }
    }
}

#[test]
fn sizes_that_are_refused() {
    let mut frame = vec![0; 12];
    frame.extend([8, 0, 0x45, 0, 0, 0, 0, 1, 0, 0, 64, 17]);
    frame.extend([1; 16]);
    frame.resize(42 + 70_000, 0);
    let refused = |size: u16| matches!(cut(&frame, GsoType::UDP_L4, size), Err(Uncuttable::Size { .. }));
    assert!(refused(0));
    assert!(refused((70_000 / MAX_PACKETS) as u16));
    assert!(!refused((70_000 / MAX_PACKETS) as u16 + 1));
    assert!(!refused(65_535 - 28));
    assert!(refused(65_535 - 27));
    // ECN is a bit beside the type.
    let error = cut(&frame, GsoType(1 | GsoType::ECN), 1000).unwrap_err();
    assert!(
        matches!(
            error,
            Uncuttable::Headers {
                transport: Transport::Udp,
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(cut(&frame, GsoType::UDP, 1000), Err(Uncuttable::Kind(3)));
    assert_eq!(cut(&frame, GsoType::NONE, 1000), Err(Uncuttable::Kind(0)));
}

#[test]
fn nothing_but_headers_is_one_packet() {
    let mut frame = vec![0; 12];
    frame.extend([8, 0, 0x45, 0, 0, 40, 0, 1, 0, 0, 64, 6, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
    frame.extend([0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x19, 0, 0, 0, 0, 0, 0]);
    let packets = cut(&frame, GsoType::TCPV4, 1000).unwrap();
    assert_eq!(packets.len(), 1);
    assert!(etherparse_agrees(&packets[0]));
    assert_eq!(packets[0][47], 0x19);
}
