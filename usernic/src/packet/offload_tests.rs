use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::offload::checksum::tests::etherparse_agrees;
use crate::offload::headers::tests::frames;
use crate::packet::tests::{bytes_of, fresh, pool};
use crate::pool::Cache;

fn packet(cache: &mut Cache, bytes: &[u8]) -> Packet {
    let mut packet = fresh(cache);
    packet.copy_from(bytes).unwrap();
    packet
}

fn all() -> Marks {
    Marks::ASKED
}

/// Ethernet, IPv4, TCP with this flag byte, and so much payload. Lengths and checksums are left out.
pub(crate) fn tcp(flags: u8, payload: usize) -> Vec<u8> {
    let mut frame = vec![2; 12];
    frame.extend([8, 0, 0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
    frame.extend([0, 1, 0, 2, 0, 0, 0, 9, 0, 0, 0, 0, 0x50, flags, 0, 9, 0, 0, 0, 0]);
    frame.extend((0..payload).map(|at| (at * 7 % 251) as u8));
    frame
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// What is asked for and then done in software is what etherparse would have written, over any segments.
    #[test]
    fn a_checksum_that_is_asked_for(frame in frames(), padding in 0..3usize, room in 1024..1030u32) {
        let pool = pool(64, room, true);
        let mut cache = Cache::new(Arc::clone(&pool));
        let headers = Headers::parse(&frame, frame.len()).unwrap();
        let mut blank = frame.clone();
        let at = headers.transport_at + headers.checksum_offset().unwrap();
        blank[at..at + 2].fill(0xaa);
        if headers.network == Network::Ipv4 {
            blank[headers.network_at + 10..][..2].fill(0xaa);
        }
        blank.extend(vec![0; padding]);
        let mut packet = packet(&mut cache, &blank);
        packet.request_checksum().unwrap();
        prop_assert_eq!(matches!(packet.checksum(), Checksum::Open(_)), padding == 0);
        prop_assert!(packet.complete_checksum());
        let bytes = bytes_of(&packet);
        prop_assert_eq!(&bytes[..frame.len()], &frame[..]);
        prop_assert_eq!(packet.checksum(), Checksum::Unknown);
        prop_assert_eq!(packet.verify_checksum(), Verdict::Right);
        // One bit, and it is wrong.
        packet.write_at(at, &[bytes[at] ^ 1]).unwrap();
        prop_assert_eq!(packet.verify_checksum(), Verdict::Wrong);
    }

    /// Whatever stands in a header that came: what is taken over can be carried out or refused, and no more.
    #[test]
    fn any_header(header: [u8; 12], small: bool, may: u16, frame in frames()) {
        let pool = pool(64, 1024, true);
        let mut cache = Cache::new(Arc::clone(&pool));
        let mut header = header;
        if small {
            header.iter_mut().skip(2).step_by(2).for_each(|byte| *byte %= 64);
            header.iter_mut().skip(3).step_by(2).for_each(|byte| *byte = 0);
            header[1] %= 8;
            header[0] |= 1;
        }
        let may = Marks(may & Marks::ASKED.0);
        let mut packet = packet(&mut cache, &frame);
        if packet.take_header(&header, may) {
            prop_assert!(!packet.meta().marks.beyond(may));
            if packet.segmentation().is_some() {
                prop_assert!(matches!(packet.checksum(), Checksum::Open(_)));
            }
            if let Checksum::Open(partial) = packet.checksum() {
                prop_assert!(partial.fits(frame.len()));
            }
            let mut cut = Burst::empty();
            let handled = handle(&mut packet, &mut cache, &mut cut);
            prop_assert_ne!(handled, Handled::NoBuffers);
            if packet.segmentation().is_none() {
                prop_assert_eq!(handled, Handled::Ready);
                prop_assert!(!packet.meta().marks.has(Marks::ASKED));
            }
        }
    }
}

#[test]
fn what_is_asked_for_stands_in_the_header() {
    let pool = pool(256, 2048, true);
    let mut cache = Cache::new(Arc::clone(&pool));
    let mut packet = packet(&mut cache, &tcp(0x90, 5000));
    packet.request_segmentation(1000).unwrap();
    let expected = Segmentation {
        kind: GsoType(GsoType::TCPV4.0 | GsoType::ECN),
        size: 1000,
    };
    assert_eq!(packet.segmentation(), Some(expected));
    // flags, gso_type, hdr_len 54, gso_size 1000, csum_start 34, csum_offset 16, num_buffers
    let bytes = [1, 0x81, 54, 0, 0xe8, 3, 34, 0, 16, 0, 0, 0];
    assert_eq!(emit_header(packet.meta(), 0), bytes);
    assert_eq!(emit_header(packet.meta(), 1)[10..], [1, 0]);
    // And the other side understands it.
    let mut other = fresh(&mut cache);
    other.copy_packet(&packet).unwrap();
    assert_eq!(other.segmentation(), Some(expected));
    other.clear_offloads();
    assert!(other.take_header(&bytes, all()));
    assert_eq!(
        (other.segmentation(), other.checksum()),
        (Some(expected), packet.checksum())
    );
    for missing in [Marks::CHECKSUM, Marks::TCP4, Marks::ECN] {
        other.clear_offloads();
        assert!(!other.take_header(&bytes, all().without(missing)), "{missing:?}");
        assert!(packet.meta().marks.beyond(all().without(missing)));
    }
    assert!(!packet.meta().marks.beyond(all()));
    // A tag more, and one less.
    packet.prepend(&[0; 4]).unwrap();
    assert_eq!(emit_header(packet.meta(), 0)[2..10], [58, 0, 0xe8, 3, 38, 0, 16, 0]);
    packet.trim_front(4).unwrap();
    assert_eq!(emit_header(packet.meta(), 0), bytes);
    packet.trim_front(40).unwrap();
    assert_eq!((packet.segmentation(), packet.checksum()), (None, Checksum::Unknown));
}

#[test]
fn a_large_packet_in_software() {
    let pool = pool(256, 2048, true);
    let mut cache = Cache::new(Arc::clone(&pool));
    let frame = tcp(0x99, 20_000);
    let mut packet = packet(&mut cache, &frame);
    packet.request_segmentation(1448).unwrap();
    let mut cut = Burst::empty();
    assert_eq!(handle(&mut packet, &mut cache, &mut cut), Handled::Cut);
    assert_eq!(cut.len(), 20_000usize.div_ceil(1448));
    let mut joined = Vec::new();
    for piece in &cut {
        let bytes = bytes_of(piece);
        assert!(etherparse_agrees(&bytes));
        assert_eq!(piece.verify_checksum(), Verdict::Right);
        joined.extend_from_slice(&bytes[54..]);
    }
    assert_eq!(joined, frame[54..]);
    // Pieces that take two buffers each.
    packet.request_segmentation(3000).unwrap();
    cut.clear();
    assert_eq!(handle(&mut packet, &mut cache, &mut cut), Handled::Cut);
    assert!(cut.iter().all(|piece| etherparse_agrees(&bytes_of(piece))));
    assert_eq!((cut.len(), cut[0].segment_count()), (7, 2));
}

#[test]
fn without_buffers_a_packet_stays_whole() {
    let pool = pool(160, 2048, true);
    let mut cache = Cache::new(Arc::clone(&pool));
    let mut packet = packet(&mut cache, &tcp(0x10, 60_000));
    let mut cut = Burst::empty();
    // 120 packets of 128 that a cache holds, and 34 are left when 126 are taken.
    packet.request_segmentation(500).unwrap();
    let taken: Vec<Packet> = (0..96).map(|_| fresh(&mut cache)).collect();
    assert_eq!(handle(&mut packet, &mut cache, &mut cut), Handled::NoBuffers);
    assert!(packet.segmentation().is_some() && cut.is_empty());
    drop(taken);
    // More than a cache ever holds.
    packet.request_segmentation(100).unwrap();
    assert_eq!(handle(&mut packet, &mut cache, &mut cut), Handled::Never);
    packet.request_segmentation(1000).unwrap();
    assert_eq!(handle(&mut packet, &mut cache, &mut cut), Handled::Cut);
    assert_eq!(cut.len(), 60);
}

#[test]
fn a_hash_is_that_of_the_flow() {
    let pool = pool(64, 1024, true);
    let mut cache = Cache::new(Arc::clone(&pool));
    // 66.9.149.187:2794 to 161.142.100.80:1766, whose hash Microsoft gives; over as many buffers as it takes.
    let mut frame = tcp(0x10, 3000);
    frame[26..38].copy_from_slice(&[66, 9, 149, 187, 161, 142, 100, 80, 0x0a, 0xea, 0x06, 0xe6]);
    let packet = packet(&mut cache, &frame);
    let toeplitz = Toeplitz::new(&crate::offload::hash::KEY);
    let types = HashTypes::TCPV4 | HashTypes::IPV4;
    assert_eq!(packet.hash(&toeplitz, types), (0x51cc_c178, HashReport::TCPV4));
    assert_eq!(packet.hash(&toeplitz, HashTypes::IPV4), (0x323e_8fc2, HashReport::IPV4));
    assert_eq!(packet.hash(&toeplitz, HashTypes::UDPV6), (0, HashReport::NONE));
}

#[test]
fn what_cannot_be_asked_for() {
    let pool = pool(64, 1024, true);
    let mut cache = Cache::new(Arc::clone(&pool));
    let mut arp = packet(&mut cache, &[&[2; 12][..], &[8, 6], &[1; 28]].concat());
    let error = arp.request_checksum().unwrap_err();
    assert!(error.to_string().contains("Other"), "{error}");
    assert!(arp.request_segmentation(1000).is_err());
    assert_eq!(
        (arp.checksum(), arp.verify_checksum()),
        (Checksum::Unknown, Verdict::Unknown)
    );
    let mut small = packet(&mut cache, &tcp(0x10, 500));
    assert!(small.request_segmentation(0).is_err());
    // It is one packet: there is nothing to cut, but lengths and checksums.
    small.request_segmentation(500).unwrap();
    assert_eq!(small.segmentation(), None);
    assert!(small.complete_checksum());
    assert!(etherparse_agrees(&bytes_of(&small)));
    // Another frame in the same packet asks for nothing.
    small.request_checksum().unwrap();
    small.copy_from(&tcp(0x10, 20)).unwrap();
    assert_eq!(small.checksum(), Checksum::Unknown);
    // A place that a shorter packet does not have any more.
    small.request_checksum().unwrap();
    small.set_len(40).unwrap();
    assert!(!small.complete_checksum());
}
