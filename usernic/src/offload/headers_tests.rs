use super::*;
use etherparse::{IpNumber, LaxPacketHeaders, LaxPayloadSlice, NetHeaders, PacketBuilder, TransportHeader, VlanHeader};
use proptest::prelude::*;

fn parse(bytes: &[u8]) -> Headers {
    Headers::parse(bytes, bytes.len()).unwrap()
}

fn be(words: &[u16]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

/// Ethernet, IPv6 with these extension headers, and a transport header.
fn ipv6(first: u8, extensions: &[u8], transport: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend(be(&[0x86dd, 0x6000, 0, (extensions.len() + transport.len()) as u16]));
    frame.extend([first, 64]);
    frame.extend([0x20; 32]);
    frame.extend(extensions);
    frame.extend(transport);
    frame
}

#[test]
fn tcp_behind_a_tag_and_options() {
    let mut frame = vec![0; 12];
    frame.extend(be(&[0x8100, 0x2064, 0x0800]));
    frame.extend(be(&[0x4600, 24 + 32 + 7, 1, 0, 0x4006, 0, 1, 2, 3, 4, 5, 6]));
    frame.extend(be(&[80, 81, 0, 0, 0, 0, 0x8010, 0, 0, 0]));
    frame.extend([1; 12 + 7]);
    // Ethernet's padding.
    frame.extend([0; 5]);
    let headers = parse(&frame);
    assert_eq!((headers.tag, headers.ether_type), (Some(0x2064), 0x0800));
    assert_eq!((headers.network, headers.transport), (Network::Ipv4, Transport::Tcp));
    assert_eq!(
        (
            headers.network_at,
            headers.transport_at,
            headers.payload_at,
            headers.end
        ),
        (18, 42, 74, 81)
    );
    assert_eq!(headers.checksum_offset(), Some(16));
    assert!(!headers.wrong_length);
    // As one that is to be cut: its length is not right.
    frame[20..22].fill(0);
    let headers = parse(&frame);
    assert!(headers.wrong_length);
    assert_eq!((headers.transport, headers.end), (Transport::Tcp, frame.len()));
}

#[test]
fn two_tags_and_no_more() {
    let mut frame = vec![0; 12];
    frame.extend(be(&[0x88a8, 5, 0x8100, 6, 0x0806, 0]));
    let headers = parse(&frame);
    assert_eq!(
        (headers.tag, headers.ether_type, headers.network_at),
        (Some(5), 0x0806, 22)
    );
    frame[20..22].copy_from_slice(&[0x81, 0]);
    assert_eq!(
        (parse(&frame).ether_type, parse(&frame).network),
        (0x8100, Network::Other)
    );
}

#[test]
fn extension_headers() {
    let udp = be(&[1, 2, 8, 0]);
    // Hop by hop, a routing header of type 2, destination options with a home address.
    let mut extensions = vec![43, 0, 1, 4, 0, 0, 0, 0];
    extensions.extend([60, 2, 2, 1, 0, 0, 0, 0]);
    extensions.extend([0xdd; 16]);
    extensions.extend([17, 2, 0, 1, 0, 0, 201, 16]);
    extensions.extend([0xcc; 16]);
    let frame = ipv6(0, &extensions, &udp);
    let headers = parse(&frame);
    assert_eq!((headers.transport, headers.transport_at), (Transport::Udp, 54 + 56));
    assert!(headers.extended && !headers.routed);
    assert_eq!(frame[headers.source_at..][..16], [0xcc; 16]);
    assert_eq!(frame[headers.destination_at..][..16], [0xdd; 16]);
    // Of another type, on its way.
    extensions[8 + 2] = 4;
    let headers = parse(&ipv6(0, &extensions, &udp));
    assert!(headers.routed);
    assert_eq!(headers.destination_at, 14 + 24);
    // Twelve bytes of authentication header are not, by its own length, cut off.
    let headers = parse(&ipv6(51, &[17, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &udp));
    assert_eq!((headers.transport, headers.transport_at), (Transport::Udp, 54 + 12));
}

#[test]
fn fragments() {
    let udp = be(&[1, 2, 8, 0]);
    let piece = |offset: u16| parse(&ipv6(44, &[&[17, 0][..], &be(&[offset]), &[0; 4]].concat(), &udp));
    assert_eq!(piece(0).transport, Transport::Udp);
    assert_eq!(piece(1).transport, Transport::Fragment(17));
    assert_eq!(piece(8).transport, Transport::Fragment(17));
    let mut frame = vec![0; 12];
    frame.extend(be(&[0x0800, 0x4500, 28, 1, 0x4000, 0x4011, 0, 1, 2, 3, 4, 1, 2, 8, 0]));
    assert_eq!(parse(&frame).transport, Transport::Udp);
    for flags in [0x20, 0x01] {
        frame[20] = flags;
        assert_eq!(parse(&frame).transport, Transport::Fragment(17));
        assert_eq!(parse(&frame).checksum_offset(), None);
    }
}

#[test]
fn what_is_cut_short_is_of_no_kind() {
    let tcp = be(&[80, 81, 0, 0, 0, 0, 0x5010, 0, 0, 0]);
    let frame = ipv6(6, &[], &tcp);
    assert_eq!(parse(&frame).transport, Transport::Tcp);
    for len in 14..frame.len() {
        let headers = parse(&frame[..len]);
        assert_ne!(headers.transport, Transport::Tcp, "{len}");
        assert_eq!(headers.network == Network::Ipv6, len >= 54, "{len}");
    }
    for len in 0..14 {
        assert_eq!(Headers::parse(&frame[..len], len), None);
    }
    // A data offset of less than a header, and one of more than there is.
    for offset in [0x40, 0x60] {
        let mut frame = frame.clone();
        frame[54 + 12] = offset;
        assert_eq!(parse(&frame).transport, Transport::Other(6));
    }
    // Bytes behind the packet's end are none of its header.
    let mut frame = frame;
    frame[19] = 19;
    assert_eq!(parse(&frame).transport, Transport::Other(6));
}

fn holds(headers: &Headers, frame_len: usize) -> Result<(), TestCaseError> {
    let Headers {
        network_at,
        transport_at,
        payload_at,
        end,
        ..
    } = *headers;
    prop_assert!(
        network_at <= transport_at && transport_at <= payload_at && payload_at <= end && end <= frame_len,
        "{:?}",
        headers
    );
    prop_assert!(payload_at <= MAX_HEADERS);
    let addresses = headers.address_len();
    prop_assert!(headers.source_at + addresses <= transport_at && headers.destination_at + addresses <= transport_at);
    if let Some(offset) = headers.checksum_offset() {
        prop_assert!(transport_at + offset + 2 <= payload_at);
    }
    Ok(())
}

/// Compares with what etherparse finds, where both know the header.
fn agrees(frame: &[u8]) -> Result<bool, TestCaseError> {
    let ours = Headers::parse(frame, frame.len()).unwrap();
    holds(&ours, frame.len())?;
    let Ok(theirs) = LaxPacketHeaders::from_ethernet(frame) else {
        return Ok(false);
    };
    // It goes by the IP header's version, whatever the EtherType says.
    let kind = match theirs.net {
        Some(NetHeaders::Ipv4(..)) => 0x0800,
        _ => 0x86dd,
    };
    if theirs.link_exts.len() > 2 || ours.ether_type != kind {
        return Ok(false);
    }
    match (&theirs.net, ours.network) {
        (Some(NetHeaders::Ipv4(header, extensions)), Network::Ipv4) => {
            prop_assert_eq!(frame[ours.source_at..][..4].to_vec(), header.source.to_vec());
            if extensions.auth.is_some() {
                return Ok(false);
            }
            prop_assert_eq!(ours.transport_at - ours.network_at, header.header_len());
            prop_assert_eq!(
                matches!(ours.transport, Transport::Fragment(_)),
                header.is_fragmenting_payload()
            );
        }
        (Some(NetHeaders::Ipv6(header, _)), Network::Ipv6) => {
            prop_assert_eq!(frame[ours.network_at..][..40].to_vec(), header.to_bytes().to_vec());
        }
        (Some(NetHeaders::Ipv4(..) | NetHeaders::Ipv6(..)), other) => {
            prop_assert!(false, "etherparse finds {:?}, we {:?}", theirs.net, other);
        }
        _ => return Ok(false),
    }
    match theirs.transport {
        Some(TransportHeader::Tcp(tcp)) => {
            // Theirs may take extension headers that go beyond what is looked at here.
            if frame.len() > MAX_HEADERS && ours.transport != Transport::Tcp {
                return Ok(false);
            }
            prop_assert_eq!(ours.transport, Transport::Tcp);
            prop_assert_eq!(ours.payload_at - ours.transport_at, tcp.header_len());
            prop_assert_eq!(be16(frame, ours.transport_at), Some(tcp.source_port));
            prop_assert_eq!(
                frame[ours.transport_at + 4..][..4].to_vec(),
                tcp.sequence_number.to_be_bytes().to_vec()
            );
            prop_assert_eq!(ours.end - ours.payload_at, theirs.payload.slice().len());
        }
        Some(TransportHeader::Udp(udp)) => {
            if frame.len() > MAX_HEADERS && ours.transport != Transport::Udp {
                return Ok(false);
            }
            prop_assert_eq!(ours.transport, Transport::Udp);
            prop_assert_eq!(
                frame[ours.transport_at..ours.payload_at].to_vec(),
                udp.to_bytes().to_vec()
            );
        }
        _ => {
            // It leaves some extension headers, and some orders of them, alone.
            let stopped = matches!(
                &theirs.payload,
                LaxPayloadSlice::Ip(ip) if [0, 43, 44, 51, 60, 135, 139, 140].contains(&ip.ip_number.0)
            );
            prop_assert!(
                stopped || theirs.stop_err.is_some() || !matches!(ours.transport, Transport::Tcp | Transport::Udp),
                "{:?}, they {:?}",
                ours,
                theirs
            );
        }
    }
    Ok(true)
}

/// A frame that etherparse builds.
pub(crate) fn frames() -> impl Strategy<Value = Vec<u8>> {
    let payload = prop::collection::vec(any::<u8>(), 0..80);
    (0..3u8, any::<bool>(), any::<bool>(), payload, any::<u16>(), 0..10usize).prop_map(
        |(tags, six, tcp, payload, word, options)| {
            let vlan = |id: u16| etherparse::VlanId::try_new(id & 0xfff).unwrap();
            let builder = PacketBuilder::ethernet2([2; 6], [4; 6]);
            let tag = |id| {
                VlanHeader::Single(etherparse::SingleVlanHeader {
                    vlan_id: vlan(id),
                    ..Default::default()
                })
            };
            let address = word.to_be_bytes()[0];
            let ip = |six: bool| {
                if six {
                    etherparse::IpHeaders::Ipv6(
                        etherparse::Ipv6Header {
                            hop_limit: 3,
                            source: [address; 16],
                            destination: [7; 16],
                            ..Default::default()
                        },
                        Default::default(),
                    )
                } else {
                    let mut header =
                        etherparse::Ipv4Header::new(0, 9, IpNumber::UDP, [address, 2, 3, 4], [5, 6, 7, 8]).unwrap();
                    header.identification = word;
                    etherparse::IpHeaders::Ipv4(header, Default::default())
                }
            };
            let with_ip = match tags {
                0 => builder.ip(ip(six)),
                1 => builder.vlan(tag(word)).ip(ip(six)),
                _ => builder.double_vlan(vlan(word), vlan(word >> 1)).ip(ip(six)),
            };
            let mut frame = Vec::new();
            if tcp {
                let mut header = etherparse::TcpHeader::new(word, 80, u32::from(word) << 16 | 0xfff0, 1000);
                header.set_options_raw(&[1; 40][..4 * options]).unwrap();
                (header.ack, header.psh) = (true, true);
                with_ip.tcp_header(header).write(&mut frame, &payload).unwrap();
                // Of the two forms of a sum of zero this crate writes the one that UDP must send (RFC 768).
                let at = frame.len() - payload.len() - 4 * options - 4;
                if frame[at..at + 2] == [0, 0] {
                    frame[at..at + 2].fill(0xff);
                }
            } else {
                with_ip.udp(word, 9).write(&mut frame, &payload).unwrap();
            }
            frame
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 14..400), more in 0..3000usize) {
        holds(&Headers::parse(&bytes, bytes.len() + more).unwrap(), bytes.len() + more)?;
        agrees(&bytes)?;
    }

    /// Bytes that are mostly extension headers.
    #[test]
    fn any_extensions(first in kinds(), mut bytes in prop::collection::vec(prop_oneof![kinds(), 0..4u8], 0..300)) {
        bytes.truncate(300);
        let frame = ipv6(first, &bytes, &[]);
        agrees(&frame)?;
    }

    #[test]
    fn well_formed_frames_are_understood(frame in frames()) {
        prop_assert!(agrees(&frame)?);
        // The first bytes are enough.
        let whole = Headers::parse(&frame, frame.len()).unwrap();
        prop_assert_eq!(Headers::parse(&frame[..whole.payload_at], frame.len()), Some(whole));
        prop_assert!(!whole.wrong_length);
    }

    #[test]
    fn changed_frames(frame in frames(), at in any::<prop::sample::Index>(), value in any::<u8>(), cut in 0..20usize) {
        let mut frame = frame;
        let at = at.index(frame.len().min(80));
        frame[at] = value;
        frame.truncate(frame.len().saturating_sub(cut).max(14));
        agrees(&frame)?;
    }
}

fn kinds() -> impl Strategy<Value = u8> {
    prop::sample::select(vec![0u8, 6, 17, 43, 44, 51, 60, 135, 139, 140, 59, 50])
}
