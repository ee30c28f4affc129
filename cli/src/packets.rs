//! Frames as bytes: Ethernet, ARP, IPv4, IPv6, ICMP, UDP and TCP headers with their checksums.
//!
//! Layers are built from the inside out: each builder takes the payload's bytes and gives a `Vec` of header and
//! payload. That is for set-up and for slow senders; who sends millions builds one frame and changes it in place.
//!
//! | layer | specification |
//! |---|---|
//! | checksum | RFC 1071 |
//! | ARP | RFC 826 |
//! | IPv4, ICMP | RFC 791, RFC 792 |
//! | IPv6, ICMPv6, neighbour discovery | RFC 8200, RFC 4443, RFC 4861 |
//! | UDP, TCP | RFC 768, RFC 9293 |

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An Ethernet address.
pub type Mac = [u8; 6];

/// Every station.
pub const BROADCAST: Mac = [0xff; 6];

/// Bytes of an Ethernet header.
pub const ETHER_LEN: usize = 14;
/// Bytes of an IPv4 header without options.
pub const IPV4_LEN: usize = 20;
/// Bytes of an IPv6 header.
pub const IPV6_LEN: usize = 40;
/// Bytes of a UDP header.
pub const UDP_LEN: usize = 8;

/// EtherType values (IEEE 802 numbers).
pub mod ethertype {
    /// IPv4.
    pub const IPV4: u16 = 0x0800;
    /// ARP.
    pub const ARP: u16 = 0x0806;
    /// IPv6.
    pub const IPV6: u16 = 0x86dd;
}

/// IP protocol numbers.
pub mod protocol {
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMPv6.
    pub const ICMPV6: u8 = 58;
}

/// Parses `02:00:00:00:00:01`.
pub fn parse_mac(text: &str) -> Result<Mac, String> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|p| p.len() == 2);
        *byte = part
            .and_then(|p| u8::from_str_radix(p, 16).ok())
            .ok_or_else(|| format!("{text:?} is no Ethernet address: write six bytes as in 02:00:00:00:00:01"))?;
    }
    match parts.next() {
        None => Ok(mac),
        Some(_) => Err(format!("{text:?} is no Ethernet address: more than six bytes")),
    }
}

/// `02:00:00:00:00:01`.
pub fn format_mac(mac: Mac) -> String {
    mac.map(|b| format!("{b:02x}")).join(":")
}

/// The one's complement sum of RFC 1071 over `bytes`, added to `sum`; an odd last byte is padded with zero.
pub fn sum(bytes: &[u8], sum: u32) -> u32 {
    let mut total = u64::from(sum);
    let mut pairs = bytes.chunks_exact(2);
    for pair in &mut pairs {
        total += u64::from(u16::from_be_bytes([pair[0], pair[1]]));
    }
    if let [last] = pairs.remainder() {
        total += u64::from(*last) << 8;
    }
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u32
}

/// The Internet checksum of `bytes` after `initial` (0, or a pseudo header's [`sum`]).
pub fn checksum(bytes: &[u8], initial: u32) -> u16 {
    !(sum(bytes, initial) as u16)
}

/// The sum of the pseudo header of RFC 768, RFC 9293 and RFC 8200 section 8.1.
///
/// Both addresses are of one family, or nothing is added for them.
pub fn pseudo(src: IpAddr, dst: IpAddr, protocol: u8, len: usize) -> u32 {
    let addresses = match (src, dst) {
        (IpAddr::V4(s), IpAddr::V4(d)) => sum(&d.octets(), sum(&s.octets(), 0)),
        (IpAddr::V6(s), IpAddr::V6(d)) => sum(&d.octets(), sum(&s.octets(), 0)),
        _ => 0,
    };
    let len = len as u32;
    addresses + u32::from(protocol) + (len >> 16) + (len & 0xffff)
}

/// An Ethernet frame without FCS, padded with zeros to 60 bytes.
pub fn ethernet(dst: Mac, src: Mac, ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity((ETHER_LEN + payload.len()).max(60));
    frame.extend_from_slice(&dst);
    frame.extend_from_slice(&src);
    frame.extend_from_slice(&ethertype.to_be_bytes());
    frame.extend_from_slice(payload);
    if frame.len() < 60 {
        frame.resize(60, 0);
    }
    frame
}

/// What an ARP packet asks or says: RFC 826's `ar$op`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArpOp {
    /// Who has the target protocol address?
    Request,
    /// The sender has it.
    Reply,
}

/// An ARP packet for Ethernet and IPv4 (28 bytes).
pub fn arp(op: ArpOp, sender: (Mac, Ipv4Addr), target: (Mac, Ipv4Addr)) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4, 0, if op == ArpOp::Request { 1 } else { 2 }];
    for (mac, ip) in [sender, target] {
        packet.extend_from_slice(&mac);
        packet.extend_from_slice(&ip.octets());
    }
    packet
}

/// An IPv4 packet without options, not to be fragmented.
pub fn ipv4(src: Ipv4Addr, dst: Ipv4Addr, protocol: u8, id: u16, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0u8; IPV4_LEN];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&((IPV4_LEN + payload.len()) as u16).to_be_bytes());
    packet[4..6].copy_from_slice(&id.to_be_bytes());
    packet[6] = 0x40;
    packet[8] = 64;
    packet[9] = protocol;
    packet[12..16].copy_from_slice(&src.octets());
    packet[16..20].copy_from_slice(&dst.octets());
    let check = checksum(&packet, 0);
    packet[10..12].copy_from_slice(&check.to_be_bytes());
    packet.extend_from_slice(payload);
    packet
}

/// An IPv6 packet without extension headers. Neighbour discovery wants `hop_limit` 255 (RFC 4861 section 4).
pub fn ipv6(src: Ipv6Addr, dst: Ipv6Addr, next_header: u8, hop_limit: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = Vec::with_capacity(IPV6_LEN + payload.len());
    packet.extend_from_slice(&[0x60, 0, 0, 0]);
    packet.extend_from_slice(&(payload.len() as u16).to_be_bytes());
    packet.extend_from_slice(&[next_header, hop_limit]);
    packet.extend_from_slice(&src.octets());
    packet.extend_from_slice(&dst.octets());
    packet.extend_from_slice(payload);
    packet
}

/// A UDP datagram, its checksum made for the given addresses.
pub fn udp(src: (IpAddr, u16), dst: (IpAddr, u16), payload: &[u8]) -> Vec<u8> {
    let len = UDP_LEN + payload.len();
    let mut packet = Vec::with_capacity(len);
    packet.extend_from_slice(&src.1.to_be_bytes());
    packet.extend_from_slice(&dst.1.to_be_bytes());
    packet.extend_from_slice(&(len as u16).to_be_bytes());
    packet.extend_from_slice(&[0, 0]);
    packet.extend_from_slice(payload);
    let check = checksum(&packet, pseudo(src.0, dst.0, protocol::UDP, len));
    // RFC 768: a computed zero is sent as all ones, for zero says that there is none.
    let check = if check == 0 { 0xffff } else { check };
    packet[6..8].copy_from_slice(&check.to_be_bytes());
    packet
}

/// TCP control bits (RFC 9293 section 3.1).
pub mod tcp_flags {
    /// No more data from the sender.
    pub const FIN: u8 = 1;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 2;
    /// Push.
    pub const PSH: u8 = 8;
    /// The acknowledgement number counts.
    pub const ACK: u8 = 16;
}

/// A TCP segment with a window of 64,240 bytes; a SYN carries the option MSS 1460.
pub fn tcp(src: (IpAddr, u16), dst: (IpAddr, u16), seq: u32, ack: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
    let options: &[u8] = if flags & tcp_flags::SYN != 0 {
        &[2, 4, 0x05, 0xb4]
    } else {
        &[]
    };
    let header = 20 + options.len();
    let mut packet = Vec::with_capacity(header + payload.len());
    packet.extend_from_slice(&src.1.to_be_bytes());
    packet.extend_from_slice(&dst.1.to_be_bytes());
    packet.extend_from_slice(&seq.to_be_bytes());
    packet.extend_from_slice(&ack.to_be_bytes());
    packet.extend_from_slice(&[((header / 4) as u8) << 4, flags]);
    packet.extend_from_slice(&64_240u16.to_be_bytes());
    packet.extend_from_slice(&[0; 4]);
    packet.extend_from_slice(options);
    packet.extend_from_slice(payload);
    let check = checksum(&packet, pseudo(src.0, dst.0, protocol::TCP, packet.len()));
    packet[16..18].copy_from_slice(&check.to_be_bytes());
    packet
}

/// An ICMP message: `kind` 8 asks for an echo, 0 answers (RFC 792).
pub fn icmp_echo(kind: u8, id: u16, seq: u16, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![kind, 0, 0, 0];
    packet.extend_from_slice(&id.to_be_bytes());
    packet.extend_from_slice(&seq.to_be_bytes());
    packet.extend_from_slice(payload);
    let check = checksum(&packet, 0);
    packet[2..4].copy_from_slice(&check.to_be_bytes());
    packet
}

/// An ICMPv6 message of any type, `body` being all after the checksum.
pub fn icmpv6(src: Ipv6Addr, dst: Ipv6Addr, kind: u8, body: &[u8]) -> Vec<u8> {
    let mut packet = vec![kind, 0, 0, 0];
    packet.extend_from_slice(body);
    let check = checksum(&packet, pseudo(src.into(), dst.into(), protocol::ICMPV6, packet.len()));
    packet[2..4].copy_from_slice(&check.to_be_bytes());
    packet
}

/// An ICMPv6 echo: `kind` 128 asks, 129 answers (RFC 4443 section 4).
pub fn icmpv6_echo(src: Ipv6Addr, dst: Ipv6Addr, kind: u8, id: u16, seq: u16, payload: &[u8]) -> Vec<u8> {
    let mut body = id.to_be_bytes().to_vec();
    body.extend_from_slice(&seq.to_be_bytes());
    body.extend_from_slice(payload);
    icmpv6(src, dst, kind, &body)
}

/// The solicited-node address of `ip` (RFC 4291 section 2.7.1) and the Ethernet group that carries it (RFC 2464).
pub fn solicited_node(ip: Ipv6Addr) -> (Ipv6Addr, Mac) {
    let [.., a, b, c] = ip.octets();
    let group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(a), u16::from_be_bytes([b, c]));
    (group, [0x33, 0x33, 0xff, a, b, c])
}

/// A whole frame that asks for the Ethernet address of `to` (RFC 4861 section 4.3).
pub fn neighbour_solicitation(mac: Mac, from: Ipv6Addr, to: Ipv6Addr) -> Vec<u8> {
    let (group, group_mac) = solicited_node(to);
    let mut body = vec![0; 4];
    body.extend_from_slice(&to.octets());
    body.extend_from_slice(&[1, 1]); // source link-layer address, in units of 8 bytes
    body.extend_from_slice(&mac);
    let message = icmpv6(from, group, 135, &body);
    ethernet(
        group_mac,
        mac,
        ethertype::IPV6,
        &ipv6(from, group, protocol::ICMPV6, 255, &message),
    )
}

/// A whole frame that tells `to` the Ethernet address of `ip` (RFC 4861 section 4.4), overriding; solicited, unless it goes
/// to a group.
pub fn neighbour_advertisement(mac: Mac, ip: Ipv6Addr, to: (Mac, Ipv6Addr)) -> Vec<u8> {
    let mut body = vec![if to.1.is_multicast() { 0x20 } else { 0x60 }, 0, 0, 0];
    body.extend_from_slice(&ip.octets());
    body.extend_from_slice(&[2, 1]); // target link-layer address
    body.extend_from_slice(&mac);
    let message = icmpv6(ip, to.1, 136, &body);
    ethernet(
        to.0,
        mac,
        ethertype::IPV6,
        &ipv6(ip, to.1, protocol::ICMPV6, 255, &message),
    )
}

/// A UDP frame of exactly `len` bytes without FCS; the payload counts up from 0.
///
/// # Panics
/// When `len` is below the headers (42 bytes for IPv4, 62 for IPv6), or the addresses are of two families.
pub fn udp_frame(len: usize, dst: Mac, src: Mac, from: (IpAddr, u16), to: (IpAddr, u16)) -> Vec<u8> {
    let headers = ETHER_LEN + UDP_LEN + if from.0.is_ipv4() { IPV4_LEN } else { IPV6_LEN };
    let payload: Vec<u8> = (0..len - headers).map(|i| i as u8).collect();
    let datagram = udp(from, to, &payload);
    let (kind, packet) = match (from.0, to.0) {
        (IpAddr::V4(s), IpAddr::V4(d)) => (ethertype::IPV4, ipv4(s, d, protocol::UDP, 0, &datagram)),
        (IpAddr::V6(s), IpAddr::V6(d)) => (ethertype::IPV6, ipv6(s, d, protocol::UDP, 64, &datagram)),
        _ => panic!("addresses of two families in one packet"),
    };
    let mut frame = ethernet(dst, src, kind, &packet);
    frame.truncate(len);
    frame
}

/// Exchanges source and destination Ethernet addresses; does nothing to fewer than 12 bytes.
pub fn swap_macs(frame: &mut [u8]) {
    if let Some(addresses) = frame.first_chunk_mut::<12>() {
        let (dst, src) = addresses.split_at_mut(6);
        dst.swap_with_slice(src);
    }
}

/// The EtherType of an untagged frame.
pub fn ethertype_of(frame: &[u8]) -> Option<u16> {
    frame.get(12..14).map(|b| u16::from_be_bytes([b[0], b[1]]))
}

/// Bytes of the VLAN tags behind the addresses of a frame: none, one or two (IEEE 802.1Q, 802.1ad), so far as they are whole
/// and an EtherType follows.
pub fn tags(frame: &[u8]) -> usize {
    let mut len = 0;
    while len < 8
        && matches!(
            frame.get(12 + len..14 + len),
            Some([0x81, 0x00] | [0x88, 0xa8] | [0x91, 0x00])
        )
        && frame.len() >= ETHER_LEN + len + 4
    {
        len += 4;
    }
    len
}

/// Whether every checksum in an untagged IPv4 or IPv6 frame of UDP, TCP, ICMP or ICMPv6 is right.
///
/// `None` when the frame holds nothing that this function knows, or is cut short.
pub fn checksums_hold(frame: &[u8]) -> Option<bool> {
    let (src, dst, next, payload, header_good) = match ethertype_of(frame)? {
        ethertype::IPV4 => {
            let packet = frame.get(ETHER_LEN..)?;
            let header = usize::from(packet.first()? & 15) * 4;
            let total = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
            let good = checksum(packet.get(..header)?, 0) == 0;
            let src: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
            let dst: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
            (
                IpAddr::from(src),
                IpAddr::from(dst),
                *packet.get(9)?,
                packet.get(header..total)?,
                good,
            )
        }
        ethertype::IPV6 => {
            let packet = frame.get(ETHER_LEN..)?;
            let len = usize::from(u16::from_be_bytes([*packet.get(4)?, *packet.get(5)?]));
            let src: [u8; 16] = packet.get(8..24)?.try_into().ok()?;
            let dst: [u8; 16] = packet.get(24..40)?.try_into().ok()?;
            let payload = packet.get(IPV6_LEN..IPV6_LEN + len)?;
            (IpAddr::from(src), IpAddr::from(dst), *packet.get(6)?, payload, true)
        }
        _ => return None,
    };
    let initial = match next {
        protocol::ICMP => 0,
        protocol::UDP | protocol::TCP | protocol::ICMPV6 => pseudo(src, dst, next, payload.len()),
        _ => return None,
    };
    Some(header_good && checksum(payload, initial) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Mac = [2, 0, 0, 0, 0, 1];
    const B: Mac = [2, 0, 0, 0, 0, 2];

    #[test]
    fn the_example_of_rfc_1071() {
        // Section 3: 0001 f203 f4f5 f6f7 sums to ddf2.
        assert_eq!(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7], 0), 0xddf2);
        assert_eq!(sum(&[0xab], 0), 0xab00);
        assert_eq!(checksum(&[], 0), 0xffff);
    }

    #[test]
    fn an_ipv4_header_in_bytes() {
        // A header with a checksum that is known from elsewhere: 10.0.0.1 to 10.0.0.2, UDP, 28 bytes, DF, TTL 64.
        let packet = ipv4([10, 0, 0, 1].into(), [10, 0, 0, 2].into(), 17, 0, &[0; 8]);
        let literal = [
            0x45, 0x00, 0x00, 0x1c, 0x00, 0x00, 0x40, 0x00, 0x40, 0x11, 0x26, 0xcf, 0x0a, 0x00, 0x00, 0x01, 0x0a, 0x00,
            0x00, 0x02,
        ];
        assert_eq!(packet[..20], literal);
    }

    #[test]
    fn an_arp_request_in_bytes() {
        let request = arp(
            ArpOp::Request,
            (A, [192, 0, 2, 1].into()),
            ([0; 6], [192, 0, 2, 2].into()),
        );
        let literal = [
            0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 1, 192, 0, 2, 1, 0, 0, 0, 0, 0, 0, 192, 0, 2, 2,
        ];
        assert_eq!(request, literal);
        let frame = ethernet(BROADCAST, A, ethertype::ARP, &request);
        assert_eq!(frame.len(), 60);
        assert_eq!(frame[..14], [255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 1, 8, 6]);
    }

    #[test]
    fn an_icmp_echo_in_bytes() {
        // 08 00 cs cs 00 01 00 02 "ab": 0800 + 0001 + 0002 + 6162 = 6965, complement 969a.
        assert_eq!(icmp_echo(8, 1, 2, b"ab"), [8, 0, 0x96, 0x9a, 0, 1, 0, 2, b'a', b'b']);
    }

    #[test]
    fn a_udp_datagram_in_bytes() {
        // Pseudo header c000 0201 c000 0202 0011 000a, datagram 0035 0036 000a 6869 sum to ecf6 + carries.
        let d = udp(([192, 0, 2, 1].into(), 53), ([192, 0, 2, 2].into(), 54), b"hi");
        let words = [0xc000u32, 0x0201, 0xc000, 0x0202, 0x11, 0x0a, 0x35, 0x36, 0x0a, 0x6869];
        let total: u32 = words.iter().sum();
        let expected = !(((total & 0xffff) + (total >> 16)) as u16);
        assert_eq!(
            d,
            [0, 53, 0, 54, 0, 10, (expected >> 8) as u8, expected as u8, b'h', b'i']
        );
    }

    #[test]
    fn a_zero_udp_checksum_is_sent_as_ones() {
        // Choose the payload so that the sum is ffff: the complement of what the rest sums to.
        let (s, d) = ((IpAddr::from([10, 0, 0, 1]), 1), (IpAddr::from([10, 0, 0, 2]), 2));
        let zero = udp(s, d, &[0, 0]);
        let d = udp(s, d, &zero[6..8]);
        assert_eq!(d[6..8], [0xff, 0xff]);
    }

    #[test]
    fn a_neighbour_solicitation_in_bytes() {
        let frame = neighbour_solicitation(A, "2001:db8::1".parse().unwrap(), "2001:db8::1:2:3".parse().unwrap());
        assert_eq!(frame[..14], [0x33, 0x33, 0xff, 2, 0, 3, 2, 0, 0, 0, 0, 1, 0x86, 0xdd]);
        assert_eq!(frame[38..54], [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, 2, 0, 3]);
        assert_eq!((frame[20], frame[21], frame[54]), (58, 255, 135));
        assert_eq!(frame.len(), 86);
        assert_eq!(checksums_hold(&frame), Some(true));
    }

    #[test]
    fn every_builder_makes_valid_checksums() {
        let (a4, b4) = (IpAddr::from([198, 51, 100, 1]), IpAddr::from([203, 0, 113, 9]));
        let (a6, b6): (IpAddr, IpAddr) = ("2001:db8::1".parse().unwrap(), "2001:db8::2".parse().unwrap());
        for (a, b) in [(a4, b4), (a6, b6)] {
            for len in [62, 63, 64, 1514] {
                let frame = udp_frame(len, B, A, (a, 1000), (b, 9));
                assert_eq!(frame.len(), len);
                assert_eq!(checksums_hold(&frame), Some(true), "{len}");
                let mut wrong = frame.clone();
                wrong[len - 1] ^= 1;
                assert_eq!(checksums_hold(&wrong), Some(false), "{len}");
            }
        }
        let segment = tcp((a4, 80), (b4, 1025), 7, 8, tcp_flags::SYN, &[]);
        assert_eq!(segment.len(), 24);
        let packet = ipv4(
            [198, 51, 100, 1].into(),
            [203, 0, 113, 9].into(),
            protocol::TCP,
            1,
            &segment,
        );
        assert_eq!(checksums_hold(&ethernet(B, A, ethertype::IPV4, &packet)), Some(true));
    }

    #[test]
    fn addresses_are_read_and_written() {
        assert_eq!(parse_mac("02:00:00:00:00:fe"), Ok([2, 0, 0, 0, 0, 0xfe]));
        assert_eq!(format_mac([2, 0, 0, 0, 0, 0xfe]), "02:00:00:00:00:fe");
        for bad in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:01:02",
            "2:0:0:0:0:1",
            "zz:00:00:00:00:00",
        ] {
            assert!(parse_mac(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn swapping_twice_changes_nothing_and_once_does() {
        let mut frame = udp_frame(64, B, A, ([192, 0, 2, 1].into(), 1), ([192, 0, 2, 2].into(), 2));
        let before = frame.clone();
        swap_macs(&mut frame);
        assert_eq!((&frame[..6], &frame[6..12]), (&A[..], &B[..]));
        swap_macs(&mut frame);
        assert_eq!(frame, before);
        swap_macs(&mut frame[..11]);
        assert_eq!(frame, before);
    }
}
