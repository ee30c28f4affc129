//! Feature bits (virtio 1.3 §6 for all devices, §5.1.3 for the network device).

use bitflags::bitflags;

bitflags! {
    /// Feature bits by the specification's names, without `VIRTIO_F_` (and `VIRTIO_`, so that those of the network
    /// device begin with `NET_`). Bits that have no name here are kept as they are.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    #[repr(transparent)]
    pub struct Features: u64 {
        // §5.1.3: network device.
        /// The device handles packets with partial checksum.
        const NET_CSUM = 1 << 0;
        /// The driver handles packets with partial checksum.
        const NET_GUEST_CSUM = 1 << 1;
        /// Offloads can be changed over the control queue.
        const NET_CTRL_GUEST_OFFLOADS = 1 << 2;
        /// The device reports its maximum MTU.
        const NET_MTU = 1 << 3;
        /// The device has a MAC address.
        const NET_MAC = 1 << 5;
        /// The driver can receive TSOv4.
        const NET_GUEST_TSO4 = 1 << 7;
        /// The driver can receive TSOv6.
        const NET_GUEST_TSO6 = 1 << 8;
        /// The driver can receive TSO with ECN.
        const NET_GUEST_ECN = 1 << 9;
        /// The driver can receive UFO.
        const NET_GUEST_UFO = 1 << 10;
        /// The device can receive TSOv4.
        const NET_HOST_TSO4 = 1 << 11;
        /// The device can receive TSOv6.
        const NET_HOST_TSO6 = 1 << 12;
        /// The device can receive TSO with ECN.
        const NET_HOST_ECN = 1 << 13;
        /// The device can receive UFO.
        const NET_HOST_UFO = 1 << 14;
        /// The driver can merge receive buffers.
        const NET_MRG_RXBUF = 1 << 15;
        /// The configuration's status field is available.
        const NET_STATUS = 1 << 16;
        /// There is a control queue.
        const NET_CTRL_VQ = 1 << 17;
        /// Receive modes over the control queue.
        const NET_CTRL_RX = 1 << 18;
        /// VLAN filtering over the control queue.
        const NET_CTRL_VLAN = 1 << 19;
        /// More receive modes over the control queue.
        const NET_CTRL_RX_EXTRA = 1 << 20;
        /// The driver can send gratuitous packets.
        const NET_GUEST_ANNOUNCE = 1 << 21;
        /// Several queue pairs, with automatic receive steering.
        const NET_MQ = 1 << 22;
        /// The MAC address can be set over the control queue.
        const NET_CTRL_MAC_ADDR = 1 << 23;
        /// Device-level statistics.
        const NET_DEVICE_STATS = 1 << 50;
        /// Hash of the inner header of encapsulated packets.
        const NET_HASH_TUNNEL = 1 << 51;
        /// Notification coalescing of each queue.
        const NET_VQ_NOTF_COAL = 1 << 52;
        /// Notification coalescing.
        const NET_NOTF_COAL = 1 << 53;
        /// The driver can receive USOv4.
        const NET_GUEST_USO4 = 1 << 54;
        /// The driver can receive USOv6.
        const NET_GUEST_USO6 = 1 << 55;
        /// The device can receive USO.
        const NET_HOST_USO = 1 << 56;
        /// The device reports a hash with each packet.
        const NET_HASH_REPORT = 1 << 57;
        /// The driver gives the exact header length.
        const NET_GUEST_HDRLEN = 1 << 59;
        /// Receive-side scaling.
        const NET_RSS = 1 << 60;
        /// The device reports coalesced segments and duplicated ACKs.
        const NET_RSC_EXT = 1 << 61;
        /// The device may stand by for a primary one of the same MAC address.
        const NET_STANDBY = 1 << 62;
        /// The device reports speed and duplex.
        const NET_SPEED_DUPLEX = 1 << 63;

        // §6.3: legacy, which a device of today must not offer without being a transitional one.
        /// Legacy: notify when the ring runs empty even if suppressed.
        const NOTIFY_ON_EMPTY = 1 << 24;
        /// Legacy (§2.6.2 of old): vhost logs the pages that it writes (`VHOST_F_LOG_ALL`, vhost-user.rst).
        const LOG_ALL = 1 << 26;
        /// Legacy: any framing of a buffer's descriptors is accepted.
        const ANY_LAYOUT = 1 << 27;

        // §6: all devices.
        /// Indirect descriptors (`VIRTIO_F_INDIRECT_DESC`, also called `VIRTIO_RING_F_INDIRECT_DESC`).
        const RING_INDIRECT_DESC = 1 << 28;
        /// Suppression by event index (`VIRTIO_F_EVENT_IDX`, also called `VIRTIO_RING_F_EVENT_IDX`).
        const RING_EVENT_IDX = 1 << 29;
        /// Not virtio's: vhost-user negotiates protocol features (`VHOST_USER_F_PROTOCOL_FEATURES`, vhost-user.rst).
        const PROTOCOL_FEATURES = 1 << 30;
        /// The device keeps to the specification from version 1 on.
        const VERSION_1 = 1 << 32;
        /// Addresses may be translated or restricted by the platform.
        const ACCESS_PLATFORM = 1 << 33;
        /// Packed virtqueues (§2.8).
        const RING_PACKED = 1 << 34;
        /// Buffers are used in the order in which they were made available.
        const IN_ORDER = 1 << 35;
        /// Accesses are ordered as the platform orders its devices'.
        const ORDER_PLATFORM = 1 << 36;
        /// Single-root I/O virtualisation.
        const SR_IOV = 1 << 37;
        /// The driver passes extra data in its notifications.
        const NOTIFICATION_DATA = 1 << 38;
        /// The driver passes what the device gave it as a virtqueue's identifier in its notifications.
        const NOTIF_CONFIG_DATA = 1 << 39;
        /// Single queues can be reset.
        const RING_RESET = 1 << 40;
        /// Administration virtqueues.
        const ADMIN_VQ = 1 << 41;

        const _ = !0;
    }
}

/// What was negotiated for the ring. The default is none of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// `VIRTIO_F_EVENT_IDX`: suppression by index instead of flags (§2.7.7, §2.7.10, §2.8.10).
    pub event_idx: bool,
    /// `VIRTIO_F_IN_ORDER`: buffers are used in the order in which they were made available (§2.7.9, §2.8.8).
    pub in_order: bool,
    /// `VIRTIO_F_INDIRECT_DESC`: tables of descriptors in buffers of their own (§2.7.5.3, §2.8.7).
    pub indirect: bool,
}

impl Options {
    /// What a set of negotiated features means for the ring.
    pub const fn from_features(features: Features) -> Self {
        Self {
            event_idx: features.contains(Features::RING_EVENT_IDX),
            in_order: features.contains(Features::IN_ORDER),
            indirect: features.contains(Features::RING_INDIRECT_DESC),
        }
    }
}

impl From<Features> for Options {
    fn from(features: Features) -> Self {
        Self::from_features(features)
    }
}

#[cfg(test)]
mod tests {
    use super::Features;
    use bitflags::Flags;

    #[test]
    fn bits_are_where_the_specification_has_them() {
        for (bit, feature) in [
            (0, Features::NET_CSUM),
            (15, Features::NET_MRG_RXBUF),
            (17, Features::NET_CTRL_VQ),
            (22, Features::NET_MQ),
            (28, Features::RING_INDIRECT_DESC),
            (29, Features::RING_EVENT_IDX),
            (32, Features::VERSION_1),
            (34, Features::RING_PACKED),
            (35, Features::IN_ORDER),
            (57, Features::NET_HASH_REPORT),
            (60, Features::NET_RSS),
            (63, Features::NET_SPEED_DUPLEX),
        ] {
            assert_eq!(feature.bits(), 1u64 << bit);
        }
        // Each name is one bit of its own.
        let named = Features::FLAGS.iter().filter(|flag| flag.is_named());
        assert_eq!(
            named.clone().map(|flag| flag.value().bits().count_ones()).sum::<u32>(),
            named.count() as u32
        );
    }

    #[test]
    fn what_dpdk_acknowledges_has_names() {
        // As its virtio_user port does by default.
        let seen = Features::from_bits_retain(0x9_5000_8000);
        let named = Features::NET_MRG_RXBUF
            | Features::RING_INDIRECT_DESC
            | Features::PROTOCOL_FEATURES
            | Features::VERSION_1
            | Features::IN_ORDER;
        assert_eq!(seen, named);
    }

    #[test]
    fn unknown_bits_survive() {
        assert_eq!(Features::from_bits_truncate(1 << 58).bits(), 1 << 58);
    }
}
