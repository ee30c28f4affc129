//! What a NIC sees in an Ethernet frame: tag, headers, checksums. Everything comes from outside and is checked.

/// EtherType of a VLAN tag.
pub const VLAN: u16 = 0x8100;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;

/// Protocol number of TCP.
pub const TCP: u8 = 6;
/// Protocol number of UDP.
pub const UDP: u8 = 17;
/// Protocol number of SCTP.
pub const SCTP: u8 = 132;

/// The network layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ip {
    /// IPv4.
    V4 {
        /// There are options.
        options: bool,
        /// The header's checksum is right.
        checksum_ok: bool,
    },
    /// IPv6.
    V6 {
        /// There are extension headers.
        extensions: bool,
    },
}

/// Where things lie in a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layers {
    /// The VLAN tag.
    pub tag: Option<u16>,
    /// The network layer, and where its header begins.
    pub ip: Option<(Ip, usize)>,
    /// A fragment other than a whole datagram.
    pub fragment: bool,
    /// Protocol above IP, where it begins, and where it ends. Not for fragments.
    pub transport: Option<(u8, usize, usize)>,
}

/// Two bytes, big endian.
#[must_use]
pub fn be16(frame: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(frame.get(at..at + 2)?.try_into().ok()?))
}

/// Finds the layers of a frame, as far as they are there.
#[must_use]
pub fn parse(frame: &[u8]) -> Layers {
    let mut layers = Layers {
        tag: None,
        ip: None,
        fragment: false,
        transport: None,
    };
    let mut at = 12;
    if be16(frame, at) == Some(VLAN) {
        layers.tag = be16(frame, 14);
        at = 16;
    }
    match be16(frame, at) {
        Some(IPV4) => parse_v4(frame, at + 2, &mut layers),
        Some(IPV6) => parse_v6(frame, at + 2, &mut layers),
        _ => None,
    };
    layers
}

fn parse_v4(frame: &[u8], start: usize, layers: &mut Layers) -> Option<()> {
    let first = *frame.get(start)?;
    let header = usize::from(first & 0xf) * 4;
    let bytes = frame.get(start..start + header)?;
    if first >> 4 != 4 || header < 20 {
        return None;
    }
    let ip = Ip::V4 {
        options: header > 20,
        checksum_ok: fold(sum(0, bytes)) == 0xffff,
    };
    layers.ip = Some((ip, start));
    let end = start + usize::from(be16(frame, start + 2)?);
    layers.fragment = be16(frame, start + 6)? & 0x3fff != 0;
    if !layers.fragment && end <= frame.len() && end >= start + header {
        layers.transport = Some((frame[start + 9], start + header, end));
    }
    Some(())
}

fn parse_v6(frame: &[u8], start: usize, layers: &mut Layers) -> Option<()> {
    let fixed = frame.get(start..start + 40)?;
    if fixed[0] >> 4 != 6 {
        return None;
    }
    let end = start + 40 + usize::from(be16(fixed, 4)?);
    let (mut next, mut at, mut extensions) = (fixed[6], start + 40, false);
    // Each header is at least 8 bytes long, so that the frame's length bounds this.
    let transport = loop {
        match next {
            0 | 43 | 60 => {
                let Some(&[following, units]) = frame.get(at..at + 2).and_then(|two| two.first_chunk()) else {
                    break None;
                };
                extensions = true;
                next = following;
                at += 8 + usize::from(units) * 8;
            }
            44 => {
                extensions = true;
                layers.fragment = true;
                break None;
            }
            protocol => break Some((protocol, at, end)),
        }
    };
    layers.ip = Some((Ip::V6 { extensions }, start));
    layers.transport = transport.filter(|(_, at, end)| *end <= frame.len() && at <= end);
    Some(())
}

/// Adds big-endian words to a one's-complement sum.
#[must_use]
pub fn sum(start: u64, bytes: &[u8]) -> u64 {
    let mut words = bytes.chunks_exact(2);
    let mut total = start;
    for word in &mut words {
        total += u64::from(u16::from_be_bytes([word[0], word[1]]));
    }
    match words.remainder() {
        [last] => total + (u64::from(*last) << 8),
        _ => total,
    }
}

/// Folds a sum into 16 bits.
#[must_use]
pub fn fold(mut total: u64) -> u16 {
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}

/// The sum over the pseudo header of the packet in `frame`, with a length of `length`.
fn pseudo_header(frame: &[u8], ip: (Ip, usize), protocol: u8, length: usize) -> u64 {
    let addresses = match ip {
        (Ip::V4 { .. }, at) => &frame[at + 12..at + 20],
        (Ip::V6 { .. }, at) => &frame[at + 8..at + 40],
    };
    sum(u64::from(protocol) + length as u64, addresses)
}

/// What a receiver finds when it checks the transport checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// Nothing to check: no TCP, UDP or SCTP, or a fragment.
    None,
    /// UDP over IPv4 with a checksum of zero: the sender has not computed any.
    Absent,
    /// Right.
    Right,
    /// Wrong.
    Wrong,
}

/// Checks the transport checksum.
#[must_use]
pub fn check_transport(frame: &[u8], layers: &Layers) -> Check {
    let (Some(ip), Some((protocol, start, end))) = (layers.ip, layers.transport) else {
        return Check::None;
    };
    let payload = &frame[start..end];
    let least = match protocol {
        TCP => 20,
        UDP => 8,
        SCTP => 12,
        _ => return Check::None,
    };
    if payload.len() < least {
        return Check::None;
    }
    if protocol == SCTP {
        let mut copy = payload.to_vec();
        copy[8..12].fill(0);
        return if crc32c(&copy).to_le_bytes() == payload[8..12] {
            Check::Right
        } else {
            Check::Wrong
        };
    }
    if protocol == UDP && payload[6..8] == [0, 0] && matches!(ip.0, Ip::V4 { .. }) {
        return Check::Absent;
    }
    let total = sum(pseudo_header(frame, ip, protocol, payload.len()), payload);
    if fold(total) == 0xffff {
        Check::Right
    } else {
        Check::Wrong
    }
}

/// CRC-32C, bit by bit: SCTP's checksum.
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 10.0.0.1:1234 to 10.0.0.2:5678, UDP "abc"; both checksums by hand (RFC 1071).
    const UDP_FRAME: [u8; 45] = [
        0x02, 0, 0, 0, 0, 2, 0x02, 0, 0, 0, 0, 1, 0x08, 0x00, 0x45, 0, 0, 31, 0, 1, 0, 0, 64, 17, 0x66, 0xcb, 10, 0, 0,
        1, 10, 0, 0, 2, 0x04, 0xd2, 0x16, 0x2e, 0, 11, 0x0c, 0x73, b'a', b'b', b'c',
    ];

    #[test]
    fn udp_is_found_and_checked() {
        let layers = parse(&UDP_FRAME);
        let ip = Ip::V4 {
            options: false,
            checksum_ok: true,
        };
        assert_eq!(layers.ip, Some((ip, 14)));
        assert_eq!(layers.transport, Some((UDP, 34, 45)));
        assert_eq!(check_transport(&UDP_FRAME, &layers), Check::Right);
        let mut bad = UDP_FRAME;
        bad[44] ^= 1;
        assert_eq!(check_transport(&bad, &parse(&bad)), Check::Wrong);
        bad[40..42].fill(0);
        assert_eq!(check_transport(&bad, &parse(&bad)), Check::Absent);
    }

    #[test]
    fn a_tag_shifts_everything() {
        let mut frame = UDP_FRAME[..12].to_vec();
        frame.extend([0x81, 0, 0x20, 5]);
        frame.extend(&UDP_FRAME[12..]);
        let layers = parse(&frame);
        assert_eq!(layers.tag, Some(0x2005));
        assert_eq!(check_transport(&frame, &layers), Check::Right);
    }

    #[test]
    fn cut_frames_have_fewer_layers() {
        for length in 0..UDP_FRAME.len() {
            let layers = parse(&UDP_FRAME[..length]);
            assert_eq!(layers.transport, None, "{length}");
            assert_eq!(layers.ip.is_some(), length >= 34, "{length}");
        }
    }

    #[test]
    fn crc32c_of_the_digits() {
        // The check value of the CRC catalogue.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }
}
