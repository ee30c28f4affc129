//! The VF's counters (datasheet 8.3.5.12): they count on through resets, wrap at their widths and cannot be cleared.

/// Octet counters have 36 bits.
const OCTETS: u64 = (1 << 36) - 1;

/// VFGPRC, VFGORC, VFMPRC, VFGPTC, VFGOTC. Octets are those of the frames in memory, without CRC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames received.
    pub packets_rx: u32,
    /// Octets received, 36 bits.
    pub octets_rx: u64,
    /// Multicast frames received; broadcast does not count.
    pub multicast_rx: u32,
    /// Frames sent.
    pub packets_tx: u32,
    /// Octets sent, 36 bits.
    pub octets_tx: u64,
}

impl Counters {
    pub(crate) fn received(&mut self, frame: &[u8]) {
        self.packets_rx = self.packets_rx.wrapping_add(1);
        self.octets_rx = (self.octets_rx + frame.len() as u64) & OCTETS;
        if frame[0] & 1 == 1 && frame[..6] != [0xff; 6] {
            self.multicast_rx = self.multicast_rx.wrapping_add(1);
        }
    }

    pub(crate) fn sent(&mut self, frame: &[u8]) {
        self.packets_tx = self.packets_tx.wrapping_add(1);
        self.octets_tx = (self.octets_tx + frame.len() as u64) & OCTETS;
    }
}

/// What hardware does not tell a VF, and a test wants to know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drops {
    /// No descriptor, and DROP_EN or a full packet buffer.
    pub no_descriptor: u64,
    /// The queue did not work.
    pub queue_off: u64,
    /// The PF has not enabled receive for this VF.
    pub receive_off: u64,
    /// Longer than the device's or the queue's limit.
    pub too_long: u64,
    /// Sent with a source address or VLAN that is not the VF's (anti-spoofing).
    pub spoofed: u64,
    /// Sent without IFCS: a frame without CRC.
    pub no_crc: u64,
}

/// What a driver had the device do for it: whether an offload was really used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Packets that were cut into segments.
    pub segmented: u64,
    /// Packets whose transport checksum was inserted.
    pub checksums: u64,
    /// Packets that got a VLAN tag.
    pub tagged: u64,
    /// Packets of more than one buffer.
    pub gathered: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_wrap_at_their_widths() {
        let mut counters = Counters {
            packets_rx: u32::MAX,
            octets_rx: OCTETS,
            octets_tx: u64::from(u32::MAX),
            ..Counters::default()
        };
        counters.received(&[1; 60]);
        counters.sent(&[0; 60]);
        assert_eq!((counters.packets_rx, counters.octets_rx), (0, 59));
        assert_eq!(counters.octets_tx, (1 << 32) + 59);
        assert_eq!(counters.multicast_rx, 1);
        counters.received(&[0xff; 60]);
        assert_eq!(counters.multicast_rx, 1, "broadcast");
    }
}
