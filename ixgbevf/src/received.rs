//! What the device says of a frame that it received (82599 datasheet §7.1.6.2).

use crate::Model;
use bitflags::bitflags;

bitflags! {
    /// Status and errors of a descriptor. Bits without a name here are kept.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Status: u32 {
        /// The descriptor was written back.
        const DD = 1 << 0;
        /// The last piece of a frame.
        const EOP = 1 << 1;
        /// A VLAN tag was taken out of the frame.
        const VP = 1 << 3;
        /// A UDP checksum was there.
        const UDPCS = 1 << 4;
        /// The TCP, UDP or SCTP checksum was looked at.
        const L4CS = 1 << 5;
        /// The IPv4 checksum was looked at.
        const IPCS = 1 << 6;
        /// The frame is broken on the wire's level.
        const RXE = 1 << 29;
        /// The TCP, UDP or SCTP checksum is wrong.
        const TCPE = 1 << 30;
        /// The IPv4 checksum is wrong.
        const IPE = 1 << 31;
        const _ = !0;
    }
}

bitflags! {
    /// The headers that the device recognised.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct PacketType: u16 {
        /// IPv4 without options.
        const IPV4 = 1 << 4;
        /// IPv4 with options.
        const IPV4_EX = 1 << 5;
        /// IPv6 without extension headers.
        const IPV6 = 1 << 6;
        /// IPv6 with extension headers.
        const IPV6_EX = 1 << 7;
        /// TCP.
        const TCP = 1 << 8;
        /// UDP.
        const UDP = 1 << 9;
        /// SCTP.
        const SCTP = 1 << 10;
        /// By its Ethernet type, not by headers: the other bits then have other meanings.
        const ETHERTYPE = 1 << 15;
        const _ = !0;
    }
}

/// Which fields a hash is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HashType {
    /// TCP over IPv4.
    Ipv4Tcp,
    /// IPv4.
    Ipv4,
    /// TCP over IPv6.
    Ipv6Tcp,
    /// IPv6 with extension headers.
    Ipv6Ex,
    /// IPv6.
    Ipv6,
    /// TCP over IPv6 with extension headers.
    Ipv6ExTcp,
    /// UDP over IPv4.
    Ipv4Udp,
    /// UDP over IPv6.
    Ipv6Udp,
    /// UDP over IPv6 with extension headers.
    Ipv6ExUdp,
}

/// What a checksum was found to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// Nobody looked, or what was found cannot be relied on.
    Unknown,
    /// Right.
    Good,
    /// Wrong.
    Bad,
}

/// A buffer that came back with one piece of a frame, mostly with all of it.
///
/// Pieces of a frame come one after another: the first with [`first`](Received::first), the last with
/// [`last`](Received::last), never more than 10, nor more than 9,728 bytes in all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// What the caller gave with the buffer.
    pub cookie: u64,
    /// Bytes in this buffer, without CRC, never more than it holds.
    pub len: u32,
    /// A frame begins with this piece.
    pub first: bool,
    /// A frame ends with this piece. What the device says of a frame is in its last piece.
    pub last: bool,
    /// With `last`: the frame is to be dropped, all pieces of it. The device says that it is broken, or lied about it.
    pub bad: bool,
    /// Status and errors.
    pub status: Status,
    pub(crate) packet: u32,
    pub(crate) hash: u32,
    pub(crate) vlan: u16,
}

impl Received {
    /// The whole frame is in this buffer, and may be used.
    #[inline(always)]
    pub const fn is_whole(&self) -> bool {
        self.first && self.last && !self.bad
    }

    /// The VLAN tag that was taken out: priority, DEI and id.
    #[inline(always)]
    pub const fn vlan(&self) -> Option<u16> {
        if self.status.contains(Status::VP) {
            Some(self.vlan)
        } else {
            None
        }
    }

    /// The RSS hash, if the device made one.
    #[inline(always)]
    pub const fn hash(&self) -> Option<u32> {
        if self.packet & 0xf != 0 { Some(self.hash) } else { None }
    }

    /// What the hash is of.
    pub const fn hash_type(&self) -> Option<HashType> {
        Some(match self.packet & 0xf {
            1 => HashType::Ipv4Tcp,
            2 => HashType::Ipv4,
            3 => HashType::Ipv6Tcp,
            4 => HashType::Ipv6Ex,
            5 => HashType::Ipv6,
            6 => HashType::Ipv6ExTcp,
            7 => HashType::Ipv4Udp,
            8 => HashType::Ipv6Udp,
            9 => HashType::Ipv6ExUdp,
            _ => return None,
        })
    }

    /// The headers that the device recognised.
    #[inline(always)]
    pub const fn packet_type(&self) -> PacketType {
        PacketType::from_bits_retain((self.packet & 0xfff0) as u16)
    }

    /// The IPv4 header's checksum.
    #[inline(always)]
    pub const fn ip_checksum(&self) -> Checksum {
        match (self.status.contains(Status::IPCS), self.status.contains(Status::IPE)) {
            (false, _) => Checksum::Unknown,
            (true, false) => Checksum::Good,
            (true, true) => Checksum::Bad,
        }
    }

    /// The checksum of TCP, UDP or SCTP. An 82599 calls UDP datagrams over IPv4 bad that have none (erratum 44): what it
    /// calls bad there is unknown.
    #[inline(always)]
    pub const fn l4_checksum(&self, model: Model) -> Checksum {
        match (self.status.contains(Status::L4CS), self.status.contains(Status::TCPE)) {
            (false, _) => Checksum::Unknown,
            (true, false) => Checksum::Good,
            (true, true) => {
                if matches!(model, Model::I82599) && self.packet_type().contains(PacketType::UDP) {
                    Checksum::Unknown
                } else {
                    Checksum::Bad
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(packet: u32, status: u32) -> Received {
        Received {
            cookie: 0,
            len: 64,
            first: true,
            last: true,
            bad: false,
            status: Status::from_bits_retain(status),
            packet,
            hash: 0xdead_beef,
            vlan: 0x2064,
        }
    }

    #[test]
    fn checksums() {
        let tcp = |status| received(0x0110, status);
        assert_eq!(tcp(0x3).ip_checksum(), Checksum::Unknown);
        assert_eq!(tcp(0x43).ip_checksum(), Checksum::Good);
        assert_eq!(tcp(0x8000_0043).ip_checksum(), Checksum::Bad);
        assert_eq!(tcp(0x23).l4_checksum(Model::I82599), Checksum::Good);
        assert_eq!(tcp(0x4000_0023).l4_checksum(Model::I82599), Checksum::Bad);
        assert_eq!(tcp(0x4000_0003).l4_checksum(Model::X550), Checksum::Unknown);
        let udp = received(0x0210, 0x4000_0033);
        assert_eq!(udp.l4_checksum(Model::I82599), Checksum::Unknown);
        assert_eq!(udp.l4_checksum(Model::X540), Checksum::Bad);
    }

    #[test]
    fn tags_hashes_and_types() {
        let plain = received(0x0110, 0x3);
        assert_eq!((plain.vlan(), plain.hash(), plain.hash_type()), (None, None, None));
        let all = received(0xabcd_0251, 0xb);
        assert_eq!((all.vlan(), all.hash()), (Some(0x2064), Some(0xdead_beef)));
        assert_eq!(all.hash_type(), Some(HashType::Ipv4Tcp));
        assert_eq!(all.packet_type(), PacketType::UDP | PacketType::IPV6 | PacketType::IPV4);
        let types: Vec<_> = (1..16).filter_map(|t| received(t, 3).hash_type()).collect();
        assert_eq!(types.len(), 9);
    }
}
