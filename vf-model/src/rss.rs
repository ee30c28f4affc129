//! Receive-side scaling: the Toeplitz hash, and which fields it is taken over.

use crate::frame::{Ip, Layers, TCP, UDP};
use crate::register::mrqc;

/// Bytes of a key.
pub const KEY_BYTES: usize = 40;

/// What the hash was taken over, as the receive descriptor says (datasheet table 7-16).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum HashType {
    /// TCP over IPv4.
    Ipv4Tcp = 1,
    /// IPv4.
    Ipv4 = 2,
    /// TCP over IPv6.
    Ipv6Tcp = 3,
    /// IPv6 with extension headers.
    Ipv6Ex = 4,
    /// IPv6.
    Ipv6 = 5,
    /// TCP over IPv6 with extension headers.
    Ipv6ExTcp = 6,
    /// UDP over IPv4.
    Ipv4Udp = 7,
    /// UDP over IPv6.
    Ipv6Udp = 8,
    /// UDP over IPv6 with extension headers.
    Ipv6ExUdp = 9,
}

/// The hash of a frame, if one of the types in `enabled` (bits of MRQC) fits.
#[must_use]
pub fn hash(frame: &[u8], layers: &Layers, enabled: u32, key: &[u8; KEY_BYTES]) -> Option<(HashType, u32)> {
    let (ip, at) = layers.ip?;
    let transport = layers.transport.filter(|(_, start, end)| end - start >= 4);
    let ports = |wanted| {
        transport
            .filter(|(protocol, ..)| *protocol == wanted)
            .map(|(_, start, _)| &frame[start..start + 4])
    };
    let (addresses, candidates) = match ip {
        Ip::V4 { .. } => (
            &frame[at + 12..at + 20],
            [
                (mrqc::IPV4_TCP, Some(TCP), HashType::Ipv4Tcp),
                (mrqc::IPV4_UDP, Some(UDP), HashType::Ipv4Udp),
                (mrqc::IPV4, None, HashType::Ipv4),
            ]
            .as_slice(),
        ),
        Ip::V6 { extensions: false } => (
            &frame[at + 8..at + 40],
            [
                (mrqc::IPV6_TCP, Some(TCP), HashType::Ipv6Tcp),
                (mrqc::IPV6_UDP, Some(UDP), HashType::Ipv6Udp),
                (mrqc::IPV6, None, HashType::Ipv6),
                (mrqc::IPV6_EX, None, HashType::Ipv6Ex),
            ]
            .as_slice(),
        ),
        Ip::V6 { extensions: true } => (
            &frame[at + 8..at + 40],
            [
                (mrqc::IPV6_EX_TCP, Some(TCP), HashType::Ipv6ExTcp),
                (mrqc::IPV6_EX_UDP, Some(UDP), HashType::Ipv6ExUdp),
                (mrqc::IPV6_EX, None, HashType::Ipv6Ex),
                (mrqc::IPV6, None, HashType::Ipv6),
            ]
            .as_slice(),
        ),
    };
    for (bit, protocol, kind) in candidates {
        if enabled & bit == 0 {
            continue;
        }
        match protocol {
            None => return Some((*kind, toeplitz(key, addresses.iter().copied()))),
            Some(protocol) => {
                if let Some(ports) = ports(*protocol) {
                    return Some((*kind, toeplitz(key, addresses.iter().chain(ports).copied())));
                }
            }
        }
    }
    None
}

/// The Toeplitz hash: for each bit set, the 32 bits of the key that begin there.
#[must_use]
pub fn toeplitz(key: &[u8; KEY_BYTES], input: impl Iterator<Item = u8>) -> u32 {
    let mut window = u32::from_be_bytes([key[0], key[1], key[2], key[3]]);
    let mut result = 0;
    for (i, byte) in input.enumerate() {
        let next = key.get(i + 4).copied().unwrap_or(0);
        for bit in (0..8).rev() {
            if byte >> bit & 1 == 1 {
                result ^= window;
            }
            window = window << 1 | u32::from(next >> bit & 1);
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The key of Microsoft's "Verifying the RSS Hash Calculation".
    const KEY: [u8; KEY_BYTES] = [
        0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0, 0xd0, 0xca,
        0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c, 0x6a, 0x42, 0xb7, 0x3b,
        0xbe, 0xac, 0x01, 0xfa,
    ];

    #[test]
    fn the_published_vectors() {
        // 66.9.149.187:2794 to 161.142.100.80:1766.
        let input = [66, 9, 149, 187, 161, 142, 100, 80, 0x0a, 0xea, 0x06, 0xe6];
        assert_eq!(toeplitz(&KEY, input[..8].iter().copied()), 0x323e_8fc2);
        assert_eq!(toeplitz(&KEY, input.iter().copied()), 0x51cc_c178);
    }

    #[test]
    fn the_most_specific_enabled_type_wins() {
        let mut frame = vec![0; 14];
        frame[12] = 8;
        frame.extend([
            0x45, 0, 0, 40, 0, 0, 0, 0, 64, TCP, 0, 0, 66, 9, 149, 187, 161, 142, 100, 80,
        ]);
        frame.extend([0x0a, 0xea, 0x06, 0xe6]);
        frame.extend([0; 16]);
        let layers = crate::frame::parse(&frame);
        let of = |enabled| hash(&frame, &layers, enabled, &KEY);
        assert_eq!(of(mrqc::IPV4 | mrqc::IPV4_TCP), Some((HashType::Ipv4Tcp, 0x51cc_c178)));
        assert_eq!(of(mrqc::IPV4 | mrqc::IPV4_UDP), Some((HashType::Ipv4, 0x323e_8fc2)));
        assert_eq!(of(mrqc::IPV6), None);
    }
}
