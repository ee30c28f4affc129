use super::*;
use crate::offload::headers::tests::frames;
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use proptest::prelude::*;

/// The sum as RFC 1071 has it, word by word.
fn naive(bytes: &[u8]) -> [u8; 2] {
    let mut sum = 0u32;
    for word in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([word[0], word.get(1).copied().unwrap_or(0)]));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (sum as u16).to_be_bytes()
}

#[test]
fn the_example_of_rfc_1071() {
    let sum = Sum::of(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
    assert_eq!(sum.partial(), [0xdd, 0xf2]);
    assert_eq!(sum.checksum(), [0x22, 0x0d]);
}

#[test]
fn the_largest_sums_carry() {
    for len in [2, 64, 255, 256, 257, 4096, 65_549] {
        let bytes = vec![0xff; len];
        assert_eq!(Sum::of(&bytes).partial(), naive(&bytes), "{len}");
        for odd in [1, 63, 64] {
            let mut sum = Sum::of(&bytes[..odd.min(len)]);
            sum.add(&bytes[odd.min(len)..]);
            assert_eq!(sum.partial(), naive(&bytes), "{len} at {odd}");
        }
    }
}

#[test]
fn a_changed_port_and_address() {
    // RFC 1624, 4: the sum comes out as zero either way.
    assert_eq!(update([0xdd, 0x2f], &[0x55, 0x55], &[0x32, 0x85]), [0x00, 0x00]);
}

fn split(bytes: &[u8], cuts: [prop::sample::Index; 3]) -> Vec<&[u8]> {
    let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
    at.sort_unstable();
    vec![
        &bytes[..at[0]],
        &bytes[at[0]..at[1]],
        &bytes[at[1]..at[2]],
        &bytes[at[2]..],
    ]
}

/// The transport checksum of a frame by etherparse; the one that stands there.
fn theirs(frame: &[u8]) -> (u16, u16) {
    let sliced = SlicedPacket::from_ethernet(frame).unwrap();
    let transport = sliced.transport.unwrap();
    match (sliced.net.unwrap(), transport) {
        (NetSlice::Ipv4(ip), TransportSlice::Tcp(tcp)) => {
            let (header, address) = (tcp.to_header(), ip.header());
            let (from, to) = (address.source(), address.destination());
            (
                header.calc_checksum_ipv4_raw(from, to, tcp.payload()).unwrap(),
                tcp.checksum(),
            )
        }
        (NetSlice::Ipv4(ip), TransportSlice::Udp(udp)) => {
            let (header, address) = (udp.to_header(), ip.header());
            let (from, to) = (address.source(), address.destination());
            (
                header.calc_checksum_ipv4_raw(from, to, udp.payload()).unwrap(),
                udp.checksum(),
            )
        }
        (NetSlice::Ipv6(ip), TransportSlice::Tcp(tcp)) => {
            let (header, address) = (tcp.to_header(), ip.header());
            let (from, to) = (address.source(), address.destination());
            (
                header.calc_checksum_ipv6_raw(from, to, tcp.payload()).unwrap(),
                tcp.checksum(),
            )
        }
        (NetSlice::Ipv6(ip), TransportSlice::Udp(udp)) => {
            let (header, address) = (udp.to_header(), ip.header());
            let (from, to) = (address.source(), address.destination());
            (
                header.calc_checksum_ipv6_raw(from, to, udp.payload()).unwrap(),
                udp.checksum(),
            )
        }
        other => panic!("{other:?}"),
    }
}

/// Whether etherparse finds the frame's checksums right.
pub(crate) fn etherparse_agrees(frame: &[u8]) -> bool {
    let (computed, there) = theirs(frame);
    let header = match SlicedPacket::from_ethernet(frame).unwrap().net {
        Some(NetSlice::Ipv4(ip)) => {
            let header = ip.header().to_header();
            header.calc_header_checksum() == header.header_checksum
        }
        _ => true,
    };
    // A sum of zero has two forms, of which UDP may not send the one (RFC 768), and this crate sends the other for TCP, too.
    header && (computed == there || (computed, there) == (0, 0xffff))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn any_bytes_in_any_pieces(
        bytes in prop_oneof![prop::collection::vec(any::<u8>(), 0..300), prop::collection::vec(any::<u8>(), 0..3000)],
        cuts in any::<[prop::sample::Index; 3]>(),
    ) {
        prop_assert_eq!(Sum::of(&bytes).partial(), naive(&bytes));
        let mut sum = Sum::new();
        split(&bytes, cuts).into_iter().for_each(|piece| sum.add(piece));
        prop_assert_eq!(sum.partial(), naive(&bytes));
    }

    #[test]
    fn an_update_is_a_new_sum(mut bytes in prop::collection::vec(any::<u8>(), 2..100), at in any::<prop::sample::Index>(), new: [u8; 4]) {
        bytes.truncate(bytes.len() / 2 * 2);
        let at = at.index(bytes.len() / 2) * 2;
        let end = (at + 4).min(bytes.len());
        let before = Sum::of(&bytes).checksum();
        let old = bytes[at..end].to_vec();
        bytes[at..end].copy_from_slice(&new[..end - at]);
        let (updated, whole) = (update(before, &old, &new[..end - at]), Sum::of(&bytes).checksum());
        // Of all zeroes the sum is the other zero.
        prop_assert!(updated == whole || bytes.iter().all(|byte| *byte == 0), "{:?} {:?}", updated, whole);
    }

    #[test]
    fn frames_of_etherparse_are_right(frame in frames(), cuts in any::<[prop::sample::Index; 3]>(), padding in 0..3usize) {
        let mut frame = frame;
        frame.extend(vec![0xee; padding]);
        let headers = Headers::parse(&frame, frame.len()).unwrap();
        let (head, rest) = frame.split_at(headers.payload_at);
        let mut pieces = split(rest, cuts);
        pieces.insert(0, head);
        prop_assert_eq!(verify(&headers, pieces.iter().copied()), Verdict::Right);
        // Any bit that the checksums cover. With another length of UDP they cover other bytes, which may be right by chance.
        let from = if headers.network == Network::Ipv6 { headers.network_at + 8 } else { headers.network_at };
        let length = match headers.transport {
            Transport::Udp => headers.transport_at + 4..headers.transport_at + 6,
            _ => 0..0,
        };
        for at in (from..headers.end).filter(|at| !length.contains(at)) {
            let mut changed = frame.clone();
            changed[at] ^= 0x10;
            let headers = Headers::parse(&changed, changed.len()).unwrap();
            prop_assert_ne!(verify(&headers, [&changed[..]]), Verdict::Right, "at {}", at);
        }
    }

    /// As a driver leaves it open, and a device completes it.
    #[test]
    fn opened_and_completed(frame in frames()) {
        let headers = Headers::parse(&frame, frame.len()).unwrap();
        let mut open = frame.clone();
        let partial = Partial::open(&headers, &mut open, frame.len()).unwrap();
        prop_assert!(partial.fits(frame.len()));
        open[headers.network_at + 10] ^= u8::from(headers.network == Network::Ipv4);
        set_ipv4(&headers, &mut open);
        prop_assert!(partial.complete(&mut open));
        prop_assert!(etherparse_agrees(&open));
        prop_assert_eq!(open, frame);
    }

    #[test]
    fn no_place_is_outside(mut frame in prop::collection::vec(any::<u8>(), 0..200), start: u16, offset: u16, small: bool) {
        let partial = if small { Partial { start: start % 256, offset: offset % 256 } } else { Partial { start, offset } };
        let before = frame.clone();
        let done = partial.complete(&mut frame);
        prop_assert_eq!(done, partial.fits(frame.len()));
        if !done {
            prop_assert_eq!(frame, before);
        }
    }

    #[test]
    fn no_bytes_panic(mut bytes in prop::collection::vec(any::<u8>(), 14..200), frame in frames(), more in 0..100usize) {
        for (at, byte) in bytes.iter_mut().enumerate() {
            if *byte < 200 {
                *byte = frame.get(at).copied().unwrap_or(0);
            }
        }
        let headers = Headers::parse(&bytes, bytes.len() + more).unwrap();
        verify(&headers, [&bytes[..]]);
        set_ipv4(&headers, &mut bytes);
        Partial::open(&headers, &mut bytes, headers.end);
    }
}

#[test]
fn udp_without_a_checksum() {
    let mut frame = vec![0; 12];
    frame.extend([8, 0, 0x45, 0, 0, 30, 0, 0, 0, 0, 9, 17, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
    frame.extend([0, 1, 0, 2, 0, 10, 0, 0, 5, 5]);
    let headers = Headers::parse(&frame, frame.len()).unwrap();
    assert_eq!(verify(&headers, [&frame[..]]), Verdict::Wrong);
    set_ipv4(&headers, &mut frame);
    assert_eq!(verify(&headers, [&frame[..]]), Verdict::Unknown);
    // A length of its own that is more than there is.
    frame[39] = 11;
    frame[41] = 1;
    assert_eq!(verify(&headers, [&frame[..]]), Verdict::Wrong);
}
