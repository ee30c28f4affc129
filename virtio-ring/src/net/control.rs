//! The control queue's vocabulary (virtio 1.3 §5.1.6.5): a command is a class byte, a command byte, data for the device to
//! read, and an ack byte for it to write.

/// `VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MIN` (§5.1.6.5.5).
pub const MQ_VQ_PAIRS_MIN: u16 = 1;
/// `VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MAX` (§5.1.6.5.5).
pub const MQ_VQ_PAIRS_MAX: u16 = 0x8000;

/// `class` of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Class(pub u8);

impl Class {
    /// `VIRTIO_NET_CTRL_RX` (§5.1.6.5.1).
    pub const RX: Self = Self(0);
    /// `VIRTIO_NET_CTRL_MAC` (§5.1.6.5.2).
    pub const MAC: Self = Self(1);
    /// `VIRTIO_NET_CTRL_VLAN` (§5.1.6.5.3).
    pub const VLAN: Self = Self(2);
    /// `VIRTIO_NET_CTRL_ANNOUNCE` (§5.1.6.5.4).
    pub const ANNOUNCE: Self = Self(3);
    /// `VIRTIO_NET_CTRL_MQ` (§5.1.6.5.5).
    pub const MQ: Self = Self(4);
    /// `VIRTIO_NET_CTRL_GUEST_OFFLOADS` (§5.1.6.5.8).
    pub const GUEST_OFFLOADS: Self = Self(5);
    /// `VIRTIO_NET_CTRL_NOTF_COAL` (§5.1.6.5.9).
    pub const NOTF_COAL: Self = Self(6);
    /// `VIRTIO_NET_CTRL_HASH_TUNNEL` (§5.1.6.4.3.4).
    pub const HASH_TUNNEL: Self = Self(7);
    /// `VIRTIO_NET_CTRL_STATS` (§5.1.6.5.10).
    pub const STATS: Self = Self(8);
}

/// A class and its command: the first two bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    /// What it is about.
    pub class: Class,
    /// Which command of the class.
    pub command: u8,
}

impl Command {
    const fn of(class: Class, command: u8) -> Self {
        Self { class, command }
    }

    /// `VIRTIO_NET_CTRL_RX_PROMISC`: one byte, on or off.
    pub const RX_PROMISC: Self = Self::of(Class::RX, 0);
    /// `VIRTIO_NET_CTRL_RX_ALLMULTI`: one byte, on or off.
    pub const RX_ALLMULTI: Self = Self::of(Class::RX, 1);
    /// `VIRTIO_NET_CTRL_RX_ALLUNI`: one byte, on or off.
    pub const RX_ALLUNI: Self = Self::of(Class::RX, 2);
    /// `VIRTIO_NET_CTRL_RX_NOMULTI`: one byte, on or off.
    pub const RX_NOMULTI: Self = Self::of(Class::RX, 3);
    /// `VIRTIO_NET_CTRL_RX_NOUNI`: one byte, on or off.
    pub const RX_NOUNI: Self = Self::of(Class::RX, 4);
    /// `VIRTIO_NET_CTRL_RX_NOBCAST`: one byte, on or off.
    pub const RX_NOBCAST: Self = Self::of(Class::RX, 5);
    /// `VIRTIO_NET_CTRL_MAC_TABLE_SET`: two tables, unicast and multicast, each a le32 count and so many addresses.
    pub const MAC_TABLE_SET: Self = Self::of(Class::MAC, 0);
    /// `VIRTIO_NET_CTRL_MAC_ADDR_SET`: six bytes.
    pub const MAC_ADDR_SET: Self = Self::of(Class::MAC, 1);
    /// `VIRTIO_NET_CTRL_VLAN_ADD`: le16 VLAN id.
    pub const VLAN_ADD: Self = Self::of(Class::VLAN, 0);
    /// `VIRTIO_NET_CTRL_VLAN_DEL`: le16 VLAN id.
    pub const VLAN_DEL: Self = Self::of(Class::VLAN, 1);
    /// `VIRTIO_NET_CTRL_ANNOUNCE_ACK`: no data.
    pub const ANNOUNCE_ACK: Self = Self::of(Class::ANNOUNCE, 0);
    /// `VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET`: le16 number of pairs.
    pub const MQ_VQ_PAIRS_SET: Self = Self::of(Class::MQ, 0);
    /// `VIRTIO_NET_CTRL_MQ_RSS_CONFIG`: `struct virtio_net_rss_config`.
    pub const MQ_RSS_CONFIG: Self = Self::of(Class::MQ, 1);
    /// `VIRTIO_NET_CTRL_MQ_HASH_CONFIG`: `struct virtio_net_hash_config`.
    pub const MQ_HASH_CONFIG: Self = Self::of(Class::MQ, 2);
    /// `VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET`: le64 of feature bits.
    pub const GUEST_OFFLOADS_SET: Self = Self::of(Class::GUEST_OFFLOADS, 0);
    /// `VIRTIO_NET_CTRL_NOTF_COAL_TX_SET`: le32 max_packets, le32 max_usecs.
    pub const NOTF_COAL_TX_SET: Self = Self::of(Class::NOTF_COAL, 0);
    /// `VIRTIO_NET_CTRL_NOTF_COAL_RX_SET`: le32 max_packets, le32 max_usecs.
    pub const NOTF_COAL_RX_SET: Self = Self::of(Class::NOTF_COAL, 1);
    /// `VIRTIO_NET_CTRL_NOTF_COAL_VQ_SET`: le16 queue, le16 reserved, then as for all.
    pub const NOTF_COAL_VQ_SET: Self = Self::of(Class::NOTF_COAL, 2);
    /// `VIRTIO_NET_CTRL_NOTF_COAL_VQ_GET`: as for setting; the device writes the values.
    pub const NOTF_COAL_VQ_GET: Self = Self::of(Class::NOTF_COAL, 3);
    /// `VIRTIO_NET_CTRL_HASH_TUNNEL_SET`: le32 of enabled tunnel types.
    pub const HASH_TUNNEL_SET: Self = Self::of(Class::HASH_TUNNEL, 0);
    /// `VIRTIO_NET_CTRL_STATS_QUERY`: the device writes what it supports.
    pub const STATS_QUERY: Self = Self::of(Class::STATS, 0);
    /// `VIRTIO_NET_CTRL_STATS_GET`: the device writes counters.
    pub const STATS_GET: Self = Self::of(Class::STATS, 1);

    /// The two bytes that a command begins with.
    pub const fn to_bytes(self) -> [u8; 2] {
        [self.class.0, self.command]
    }

    /// From the two bytes that a command begins with.
    pub const fn from_bytes(bytes: [u8; 2]) -> Self {
        Self::of(Class(bytes[0]), bytes[1])
    }
}

/// `ack`, the byte with which the device answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Ack(pub u8);

impl Ack {
    /// `VIRTIO_NET_OK`.
    pub const OK: Self = Self(0);
    /// `VIRTIO_NET_ERR`.
    pub const ERR: Self = Self(1);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_as_bytes() {
        for (command, bytes) in [
            (Command::RX_PROMISC, [0, 0]),
            (Command::RX_NOBCAST, [0, 5]),
            (Command::MAC_ADDR_SET, [1, 1]),
            (Command::VLAN_DEL, [2, 1]),
            (Command::ANNOUNCE_ACK, [3, 0]),
            (Command::MQ_HASH_CONFIG, [4, 2]),
            (Command::GUEST_OFFLOADS_SET, [5, 0]),
            (Command::NOTF_COAL_VQ_GET, [6, 3]),
            (Command::HASH_TUNNEL_SET, [7, 0]),
            (Command::STATS_GET, [8, 1]),
        ] {
            assert_eq!(command.to_bytes(), bytes);
            assert_eq!(Command::from_bytes(bytes), command);
        }
    }
}
