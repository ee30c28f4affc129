//! `struct virtio_net_hdr` (virtio 1.3 §5.1.6), by value.

use crate::Features;
use bitflags::bitflags;

// Fields, little-endian, and where each lies. The short forms end earlier.
const FLAGS: usize = 0;
const GSO_TYPE: usize = 1;
const HDR_LEN: usize = 2;
const GSO_SIZE: usize = 4;
const CSUM_START: usize = 6;
const CSUM_OFFSET: usize = 8;
const NUM_BUFFERS: usize = 10;
const HASH_VALUE: usize = 12;
const HASH_REPORT: usize = 16;
const PADDING: usize = 18;

/// Bytes of the header before each packet: 20 with HASH_REPORT, 12 with VERSION_1 or MRG_RXBUF, else 10 (§5.1.6,
/// §5.1.6.1).
#[inline]
pub const fn header_len(features: Features) -> usize {
    if features.contains(Features::NET_HASH_REPORT) {
        Header::LEN_HASH
    } else if features.intersects(Features::VERSION_1.union(Features::NET_MRG_RXBUF)) {
        Header::LEN
    } else {
        Header::LEN_LEGACY
    }
}

bitflags! {
    /// `flags` of the header.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    #[repr(transparent)]
    pub struct HeaderFlags: u8 {
        /// `VIRTIO_NET_HDR_F_NEEDS_CSUM`: the checksum from `csum_start` on is to be completed at `csum_offset`.
        const NEEDS_CSUM = 1;
        /// `VIRTIO_NET_HDR_F_DATA_VALID`: the checksum was verified.
        const DATA_VALID = 2;
        /// `VIRTIO_NET_HDR_F_RSC_INFO`: `csum_start` and `csum_offset` count coalesced segments and duplicated ACKs.
        const RSC_INFO = 4;

        const _ = !0;
    }
}

/// `gso_type` of the header: how a large packet is to be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct GsoType(pub u8);

impl GsoType {
    /// `VIRTIO_NET_HDR_GSO_NONE`: not at all.
    pub const NONE: Self = Self(0);
    /// `VIRTIO_NET_HDR_GSO_TCPV4`.
    pub const TCPV4: Self = Self(1);
    /// `VIRTIO_NET_HDR_GSO_UDP`: by IP fragmentation.
    pub const UDP: Self = Self(3);
    /// `VIRTIO_NET_HDR_GSO_TCPV6`.
    pub const TCPV6: Self = Self(4);
    /// `VIRTIO_NET_HDR_GSO_UDP_L4`: into UDP packets.
    pub const UDP_L4: Self = Self(5);
    /// `VIRTIO_NET_HDR_GSO_ECN`, a bit beside the TCP types: the congestion flag is set.
    pub const ECN: u8 = 0x80;

    /// The type without [`GsoType::ECN`].
    #[inline]
    pub const fn kind(self) -> Self {
        Self(self.0 & !Self::ECN)
    }

    /// Whether [`GsoType::ECN`] is set.
    #[inline]
    pub const fn has_ecn(self) -> bool {
        self.0 & Self::ECN != 0
    }
}

/// `hash_report` of the header: over what the hash was calculated (§5.1.6.4.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct HashReport(pub u16);

impl HashReport {
    /// `VIRTIO_NET_HASH_REPORT_NONE`: there is no hash.
    pub const NONE: Self = Self(0);
    /// `VIRTIO_NET_HASH_REPORT_IPv4`.
    pub const IPV4: Self = Self(1);
    /// `VIRTIO_NET_HASH_REPORT_TCPv4`.
    pub const TCPV4: Self = Self(2);
    /// `VIRTIO_NET_HASH_REPORT_UDPv4`.
    pub const UDPV4: Self = Self(3);
    /// `VIRTIO_NET_HASH_REPORT_IPv6`.
    pub const IPV6: Self = Self(4);
    /// `VIRTIO_NET_HASH_REPORT_TCPv6`.
    pub const TCPV6: Self = Self(5);
    /// `VIRTIO_NET_HASH_REPORT_UDPv6`.
    pub const UDPV6: Self = Self(6);
    /// `VIRTIO_NET_HASH_REPORT_IPv6_EX`.
    pub const IPV6_EX: Self = Self(7);
    /// `VIRTIO_NET_HASH_REPORT_TCPv6_EX`.
    pub const TCPV6_EX: Self = Self(8);
    /// `VIRTIO_NET_HASH_REPORT_UDPv6_EX`.
    pub const UDPV6_EX: Self = Self(9);
}

/// `struct virtio_net_hdr`. The default is what a packet without offloads carries: all zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Header {
    /// What the checksum fields mean.
    pub flags: HeaderFlags,
    /// How to cut the packet.
    pub gso_type: GsoType,
    /// Bytes of the packet's own headers: a hint, unless GUEST_HDRLEN was negotiated.
    pub hdr_len: u16,
    /// Payload bytes of each piece.
    pub gso_size: u16,
    /// Where the checksum begins, from the start of the packet.
    pub csum_start: u16,
    /// Where it goes, from `csum_start`.
    pub csum_offset: u16,
    /// Buffers that the packet fills (receive with MRG_RXBUF), 1 without; 0 for transmit. Not in the 10-byte form.
    pub num_buffers: u16,
    /// The hash. Only in the 20-byte form.
    pub hash_value: u32,
    /// What it is of. Only in the 20-byte form.
    pub hash_report: HashReport,
}

impl Header {
    /// Bytes without `num_buffers`: legacy devices without MRG_RXBUF.
    pub const LEN_LEGACY: usize = 10;
    /// Bytes with `num_buffers`.
    pub const LEN: usize = 12;
    /// Bytes with hash, with HASH_REPORT.
    pub const LEN_HASH: usize = 20;

    /// Reads a header from `bytes`, whose length is that of the form: 10, 12 or 20. `None` for any other length. Every
    /// content is representable; what makes sense is for the caller to decide.
    #[inline]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        if !matches!(bytes.len(), Self::LEN_LEGACY | Self::LEN | Self::LEN_HASH) {
            return None;
        }
        let u16_at = |at: usize| Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
        let u32_at = |at: usize| Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
        Some(Self {
            flags: HeaderFlags::from_bits_retain(bytes[FLAGS]),
            gso_type: GsoType(bytes[GSO_TYPE]),
            hdr_len: u16_at(HDR_LEN)?,
            gso_size: u16_at(GSO_SIZE)?,
            csum_start: u16_at(CSUM_START)?,
            csum_offset: u16_at(CSUM_OFFSET)?,
            num_buffers: u16_at(NUM_BUFFERS).unwrap_or_default(),
            hash_value: u32_at(HASH_VALUE).unwrap_or_default(),
            hash_report: HashReport(u16_at(HASH_REPORT).unwrap_or_default()),
        })
    }

    /// Writes the header into `bytes`, whose length is that of the form: 10, 12 or 20. False, and nothing written, for
    /// any other length. What the form does not have is left out.
    #[inline]
    pub fn emit(&self, bytes: &mut [u8]) -> bool {
        let form = bytes.len();
        if !matches!(form, Self::LEN_LEGACY | Self::LEN | Self::LEN_HASH) {
            return false;
        }
        bytes[FLAGS] = self.flags.bits();
        bytes[GSO_TYPE] = self.gso_type.0;
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(HDR_LEN, &self.hdr_len.to_le_bytes());
        put(GSO_SIZE, &self.gso_size.to_le_bytes());
        put(CSUM_START, &self.csum_start.to_le_bytes());
        put(CSUM_OFFSET, &self.csum_offset.to_le_bytes());
        if form >= Self::LEN {
            put(NUM_BUFFERS, &self.num_buffers.to_le_bytes());
        }
        if form >= Self::LEN_HASH {
            put(HASH_VALUE, &self.hash_value.to_le_bytes());
            put(HASH_REPORT, &self.hash_report.0.to_le_bytes());
            put(PADDING, &[0, 0]);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: [u8; 20] = [
        0x01, // flags: NEEDS_CSUM
        0x84, // gso_type: TCPV6 | ECN
        0x4a, 0x00, // hdr_len 74
        0xa0, 0x05, // gso_size 1440
        0x36, 0x00, // csum_start 54
        0x10, 0x00, // csum_offset 16
        0x03, 0x00, // num_buffers 3
        0x78, 0x56, 0x34, 0x12, // hash_value
        0x05, 0x00, // hash_report: TCPv6
        0x00, 0x00, // padding
    ];

    const HEADER: Header = Header {
        flags: HeaderFlags::NEEDS_CSUM,
        gso_type: GsoType(0x84),
        hdr_len: 74,
        gso_size: 1440,
        csum_start: 54,
        csum_offset: 16,
        num_buffers: 3,
        hash_value: 0x1234_5678,
        hash_report: HashReport::TCPV6,
    };

    #[test]
    fn parses_the_three_forms() {
        assert_eq!(Header::parse(&BYTES), Some(HEADER));
        let short = Header {
            hash_value: 0,
            hash_report: HashReport::NONE,
            ..HEADER
        };
        assert_eq!(Header::parse(&BYTES[..12]), Some(short));
        assert_eq!(
            Header::parse(&BYTES[..10]),
            Some(Header {
                num_buffers: 0,
                ..short
            })
        );
        assert_eq!(
            (HEADER.gso_type.kind(), HEADER.gso_type.has_ecn()),
            (GsoType::TCPV6, true)
        );
    }

    #[test]
    fn emits_the_three_forms() {
        for len in [10, 12, 20] {
            let mut bytes = [0xff; 20];
            assert!(HEADER.emit(&mut bytes[..len]));
            assert_eq!(bytes[..len], BYTES[..len]);
            assert!(bytes[len..].iter().all(|byte| *byte == 0xff));
        }
    }

    #[test]
    fn refuses_other_lengths() {
        for len in (0..20).filter(|len| ![10, 12].contains(len)) {
            assert_eq!(Header::parse(&BYTES[..len]), None);
            let mut bytes = [0xff; 20];
            assert!(!HEADER.emit(&mut bytes[..len]));
            assert_eq!(bytes, [0xff; 20]);
        }
    }

    #[test]
    fn any_bytes_survive() {
        let mut bytes = [0; 20];
        assert!(Header::parse(&[0xff; 20]).unwrap().emit(&mut bytes));
        assert_eq!(bytes[..18], [0xff; 18]);
        assert_eq!(bytes[18..], [0, 0]);
    }

    #[test]
    fn length_follows_the_features() {
        assert_eq!(header_len(Features::empty()), 10);
        assert_eq!(header_len(Features::NET_MRG_RXBUF), 12);
        assert_eq!(header_len(Features::VERSION_1), 12);
        assert_eq!(header_len(Features::VERSION_1 | Features::NET_HASH_REPORT), 20);
    }
}
