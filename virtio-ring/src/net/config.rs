//! `struct virtio_net_config` (virtio 1.3 §5.1.4), by value.

use crate::Features;
use bitflags::bitflags;

// Fields, little-endian, and where each lies.
const MAC: usize = 0;
const STATUS: usize = 6;
const MAX_VIRTQUEUE_PAIRS: usize = 8;
const MTU: usize = 10;
const SPEED: usize = 12;
const DUPLEX: usize = 16;
const RSS_MAX_KEY_SIZE: usize = 17;
const RSS_MAX_INDIRECTION_TABLE_LENGTH: usize = 18;
const SUPPORTED_HASH_TYPES: usize = 20;
const SUPPORTED_TUNNEL_TYPES: usize = 24;

/// `speed` when the device does not know (§5.1.4).
pub const SPEED_UNKNOWN: u32 = u32::MAX;

bitflags! {
    /// `status`: exists with STATUS.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    #[repr(transparent)]
    pub struct Status: u16 {
        /// `VIRTIO_NET_S_LINK_UP`.
        const LINK_UP = 1;
        /// `VIRTIO_NET_S_ANNOUNCE`: the driver is asked for gratuitous packets.
        const ANNOUNCE = 2;

        const _ = !0;
    }

    /// Packets over which a hash can be calculated (§5.1.6.4.3.1).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    #[repr(transparent)]
    pub struct HashTypes: u32 {
        /// `VIRTIO_NET_HASH_TYPE_IPv4`.
        const IPV4 = 1 << 0;
        /// `VIRTIO_NET_HASH_TYPE_TCPv4`.
        const TCPV4 = 1 << 1;
        /// `VIRTIO_NET_HASH_TYPE_UDPv4`.
        const UDPV4 = 1 << 2;
        /// `VIRTIO_NET_HASH_TYPE_IPv6`.
        const IPV6 = 1 << 3;
        /// `VIRTIO_NET_HASH_TYPE_TCPv6`.
        const TCPV6 = 1 << 4;
        /// `VIRTIO_NET_HASH_TYPE_UDPv6`.
        const UDPV6 = 1 << 5;
        /// `VIRTIO_NET_HASH_TYPE_IP_EX`.
        const IP_EX = 1 << 6;
        /// `VIRTIO_NET_HASH_TYPE_TCP_EX`.
        const TCP_EX = 1 << 7;
        /// `VIRTIO_NET_HASH_TYPE_UDP_EX`.
        const UDP_EX = 1 << 8;

        const _ = !0;
    }
}

/// `duplex` (§5.1.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Duplex(pub u8);

impl Duplex {
    /// Half duplex.
    pub const HALF: Self = Self(0);
    /// Full duplex.
    pub const FULL: Self = Self(1);
    /// Not known.
    pub const UNKNOWN: Self = Self(0xff);
}

/// The configuration space. Which fields mean something depends on the features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// The MAC address (MAC).
    pub mac: [u8; 6],
    /// Link state (STATUS).
    pub status: Status,
    /// 1 to 0x8000 (MQ or RSS).
    pub max_virtqueue_pairs: u16,
    /// The largest MTU that the driver is to use (MTU).
    pub mtu: u16,
    /// Mbit/s, 0 to 2^31 - 1, or [`SPEED_UNKNOWN`] (SPEED_DUPLEX).
    pub speed: u32,
    /// Duplex (SPEED_DUPLEX).
    pub duplex: Duplex,
    /// Bytes of the longest hash key, 40 or more (RSS or HASH_REPORT).
    pub rss_max_key_size: u8,
    /// Entries of the longest indirection table, 128 or more (RSS).
    pub rss_max_indirection_table_length: u16,
    /// What can be hashed (RSS or HASH_REPORT).
    pub supported_hash_types: HashTypes,
    /// `VIRTIO_NET_HASH_TUNNEL_TYPE_*`: encapsulations whose inner header can be hashed (HASH_TUNNEL).
    pub supported_tunnel_types: u32,
}

impl Default for Config {
    /// A link that is up, one queue pair, nothing else known.
    fn default() -> Self {
        Self {
            mac: [0; 6],
            status: Status::LINK_UP,
            max_virtqueue_pairs: 1,
            mtu: 0,
            speed: SPEED_UNKNOWN,
            duplex: Duplex::UNKNOWN,
            rss_max_key_size: 0,
            rss_max_indirection_table_length: 0,
            supported_hash_types: HashTypes::empty(),
            supported_tunnel_types: 0,
        }
    }
}

impl Config {
    /// Bytes of the whole configuration space.
    pub const LEN: usize = 28;

    /// Reads what `bytes` has of the configuration space, from its start. Fields that it does not have keep their
    /// defaults, as for a device that is older than they are.
    pub fn parse(bytes: &[u8]) -> Self {
        let u16_at = |at: usize| Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
        let u32_at = |at: usize| Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
        let u8_at = |at: usize| bytes.get(at).copied();
        let default = Self::default();
        Self {
            mac: bytes
                .get(MAC..)
                .and_then(<[u8]>::first_chunk)
                .copied()
                .unwrap_or(default.mac),
            status: u16_at(STATUS).map_or(default.status, Status::from_bits_retain),
            max_virtqueue_pairs: u16_at(MAX_VIRTQUEUE_PAIRS).unwrap_or(default.max_virtqueue_pairs),
            mtu: u16_at(MTU).unwrap_or(default.mtu),
            speed: u32_at(SPEED).unwrap_or(default.speed),
            duplex: u8_at(DUPLEX).map_or(default.duplex, Duplex),
            rss_max_key_size: u8_at(RSS_MAX_KEY_SIZE).unwrap_or(default.rss_max_key_size),
            rss_max_indirection_table_length: u16_at(RSS_MAX_INDIRECTION_TABLE_LENGTH)
                .unwrap_or(default.rss_max_indirection_table_length),
            supported_hash_types: u32_at(SUPPORTED_HASH_TYPES)
                .map_or(default.supported_hash_types, HashTypes::from_bits_retain),
            supported_tunnel_types: u32_at(SUPPORTED_TUNNEL_TYPES).unwrap_or(default.supported_tunnel_types),
        }
    }

    /// The configuration space as bytes.
    pub fn to_bytes(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(MAC, &self.mac);
        put(STATUS, &self.status.bits().to_le_bytes());
        put(MAX_VIRTQUEUE_PAIRS, &self.max_virtqueue_pairs.to_le_bytes());
        put(MTU, &self.mtu.to_le_bytes());
        put(SPEED, &self.speed.to_le_bytes());
        put(DUPLEX, &[self.duplex.0]);
        put(RSS_MAX_KEY_SIZE, &[self.rss_max_key_size]);
        put(
            RSS_MAX_INDIRECTION_TABLE_LENGTH,
            &self.rss_max_indirection_table_length.to_le_bytes(),
        );
        put(SUPPORTED_HASH_TYPES, &self.supported_hash_types.bits().to_le_bytes());
        put(SUPPORTED_TUNNEL_TYPES, &self.supported_tunnel_types.to_le_bytes());
        bytes
    }

    /// Bytes of the configuration space that exist with these features (§5.1.4): up to the last field that one of them
    /// brings.
    pub const fn len(features: Features) -> usize {
        if features.contains(Features::NET_HASH_TUNNEL) {
            Self::LEN
        } else if features.intersects(Features::NET_RSS.union(Features::NET_HASH_REPORT)) {
            SUPPORTED_TUNNEL_TYPES
        } else if features.contains(Features::NET_SPEED_DUPLEX) {
            RSS_MAX_KEY_SIZE
        } else if features.contains(Features::NET_MTU) {
            SPEED
        } else if features.contains(Features::NET_MQ) {
            MTU
        } else if features.contains(Features::NET_STATUS) {
            MAX_VIRTQUEUE_PAIRS
        } else if features.contains(Features::NET_MAC) {
            STATUS
        } else {
            0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: [u8; 28] = [
        0x52, 0x54, 0x00, 0x12, 0x34, 0x56, // mac
        0x01, 0x00, // status: LINK_UP
        0x04, 0x00, // max_virtqueue_pairs 4
        0x28, 0x23, // mtu 9000
        0x10, 0x27, 0x00, 0x00, // speed 10000
        0x01, // duplex: full
        0x28, // rss_max_key_size 40
        0x80, 0x00, // rss_max_indirection_table_length 128
        0x3f, 0x00, 0x00, 0x00, // supported_hash_types: IP, TCP, UDP
        0x10, 0x00, 0x00, 0x00, // supported_tunnel_types: VXLAN
    ];

    #[test]
    fn parses_and_emits() {
        let config = Config::parse(&BYTES);
        assert_eq!(config.mac, [0x52, 0x54, 0, 0x12, 0x34, 0x56]);
        assert_eq!(
            (config.status, config.max_virtqueue_pairs, config.mtu),
            (Status::LINK_UP, 4, 9000)
        );
        assert_eq!((config.speed, config.duplex), (10000, Duplex::FULL));
        assert_eq!(
            (config.rss_max_key_size, config.rss_max_indirection_table_length),
            (40, 128)
        );
        assert_eq!(
            (config.supported_hash_types.bits(), config.supported_tunnel_types),
            (0x3f, 0x10)
        );
        assert_eq!(config.to_bytes(), BYTES);
    }

    #[test]
    fn a_short_space_leaves_defaults() {
        let config = Config::parse(&BYTES[..12]);
        assert_eq!(
            (config.mtu, config.speed, config.duplex),
            (9000, SPEED_UNKNOWN, Duplex::UNKNOWN)
        );
        assert_eq!(Config::parse(&[]), Config::default());
        for len in 0..=28 {
            Config::parse(&BYTES[..len]);
        }
    }

    #[test]
    fn length_follows_the_features() {
        for (features, len) in [
            (Features::empty(), 0),
            (Features::NET_MAC, 6),
            (Features::NET_MAC | Features::NET_STATUS, 8),
            (Features::NET_MQ, 10),
            (Features::NET_MTU, 12),
            (Features::NET_SPEED_DUPLEX, 17),
            (Features::NET_RSS, 24),
            (Features::NET_HASH_TUNNEL, 28),
        ] {
            assert_eq!(Config::len(features), len);
        }
    }
}
