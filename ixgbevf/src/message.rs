//! The mailbox messages of API 1.0 to 1.3, as dwords. Word 0 is the number, `MSGINFO` in bits 23:16, and in answers
//! SUCCESS or FAILURE and CTS in the highest bits.

use crate::Error;
use core::fmt;

/// Dwords of the mailbox.
pub(crate) const WORDS: usize = 16;

pub(crate) const SUCCESS: u32 = 1 << 31;
pub(crate) const FAILURE: u32 = 1 << 30;
/// Clear to send: the PF knows this VF since its last reset.
pub(crate) const CTS: u32 = 1 << 29;
pub(crate) const INFO_SHIFT: u32 = 16;
/// The number of a message, without flags and MSGINFO.
pub(crate) const NUMBER: u32 = 0xffff;

/// From the PF, unasked. Without CTS: it was reset. With CTS: a ping, as when the link changes.
pub(crate) const PF_CONTROL: u32 = 0x0100;

/// Hashes that a multicast message holds: two in each word but the first.
pub(crate) const MAX_MULTICAST: usize = 2 * (WORDS - 1);

/// A version of the mailbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Api {
    /// 1.0: RESET, MAC addresses, multicast, VLAN, LPE.
    V1_0,
    /// 1.1: GET_QUEUES.
    V1_1,
    /// 1.2: GET_RETA, GET_RSS_KEY, UPDATE_XCAST_MODE, GET_LINK_STATE.
    V1_2,
    /// 1.3: promiscuous mode.
    V1_3,
}

impl Api {
    /// The newest first. 2.0, which is 1 on the wire, has other messages under the same numbers: it is never offered.
    pub(crate) const OFFERED: [Api; 4] = [Api::V1_3, Api::V1_2, Api::V1_1, Api::V1_0];

    /// Its number in API_NEGOTIATE, which is not in order.
    pub(crate) const fn wire(self) -> u32 {
        match self {
            Api::V1_0 => 0,
            Api::V1_1 => 2,
            Api::V1_2 => 3,
            Api::V1_3 => 4,
        }
    }
}

impl fmt::Display for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Api::V1_0 => "1.0",
            Api::V1_1 => "1.1",
            Api::V1_2 => "1.2",
            Api::V1_3 => "1.3",
        })
    }
}

/// What the VF asks its PF for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[repr(u32)]
pub enum Request {
    /// The VF was reset; who am I?
    Reset = 0x01,
    /// This is my address.
    SetMac = 0x02,
    /// These hashes of multicast addresses.
    SetMulticast = 0x03,
    /// This VLAN, or not any more.
    SetVlan = 0x04,
    /// Frames up to this length.
    SetLpe = 0x05,
    /// Unicast addresses beside the first.
    SetMacVlan = 0x06,
    /// This version of the mailbox?
    NegotiateApi = 0x08,
    /// How many queues?
    GetQueues = 0x09,
    /// The PF's RSS table.
    GetReta = 0x0a,
    /// The PF's RSS key.
    GetRssKey = 0x0b,
    /// What beyond my addresses I want to receive.
    UpdateXcastMode = 0x0c,
    /// Does the administrator let me have a link?
    GetLinkState = 0x10,
}

impl Request {
    pub(crate) const fn word(self) -> u32 {
        self as u32
    }

    pub(crate) const fn with_info(self, info: u32) -> u32 {
        self.word() | info << INFO_SHIFT
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Request::Reset => "VF_RESET",
            Request::SetMac => "SET_MAC_ADDR",
            Request::SetMulticast => "SET_MULTICAST",
            Request::SetVlan => "SET_VLAN",
            Request::SetLpe => "SET_LPE",
            Request::SetMacVlan => "SET_MACVLAN",
            Request::NegotiateApi => "API_NEGOTIATE",
            Request::GetQueues => "GET_QUEUES",
            Request::GetReta => "GET_RETA",
            Request::GetRssKey => "GET_RSS_KEY",
            Request::UpdateXcastMode => "UPDATE_XCAST_MODE",
            Request::GetLinkState => "GET_LINK_STATE",
        })
    }
}

/// What a VF receives beyond its own addresses (UPDATE_XCAST_MODE).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum XcastMode {
    /// Nothing: no broadcast either.
    None = 0,
    /// Broadcasts, and multicasts by their hashes.
    #[default]
    Multicast = 1,
    /// All multicasts.
    AllMulticast = 2,
    /// Everything: API 1.3, a VF that the PF trusts, a promiscuous PF, and no 82599.
    Promiscuous = 3,
}

/// An address as words 1 and 2 carry it: the first byte is the lowest of word 1.
pub(crate) const fn mac_words(mac: [u8; 6]) -> [u32; 2] {
    let [a, b, c, d, e, f] = mac;
    [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, 0, 0])]
}

/// [`mac_words`] read back.
pub(crate) const fn mac_from(words: [u32; 2]) -> [u8; 6] {
    let [a, b, c, d] = words[0].to_le_bytes();
    let [e, f, ..] = words[1].to_le_bytes();
    [a, b, c, d, e, f]
}

/// Whether an interface may have this address: unicast, not zero.
pub(crate) fn check_mac(mac: [u8; 6]) -> Result<[u8; 6], Error> {
    if mac[0] & 1 == 0 && mac != [0; 6] {
        Ok(mac)
    } else {
        Err(Error::Mac(mac))
    }
}

/// An address made of `seed`, any number that two interfaces of one network are not likely to share: unicast, locally
/// administered. Which one is taken when the PF assigned none.
pub const fn local_mac(seed: u64) -> [u8; 6] {
    // SplitMix64's finaliser: neighbouring seeds give unlike addresses.
    let mut x = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    let [a, b, c, d, e, f, ..] = (x ^ x >> 31).to_le_bytes();
    [a & 0xfc | 0x02, b, c, d, e, f]
}

/// The 12 bits of a multicast address that the device hashes by, which the PF tells in its answer to VF_RESET (0: bits
/// 47:36, 1: 46:35, 2: 45:34, 3: 43:32).
pub(crate) const fn multicast_hash(kind: u8, mac: [u8; 6]) -> u16 {
    let high = u16::from_le_bytes([mac[4], mac[5]]);
    let shift = match kind {
        0 => 4,
        1 => 3,
        2 => 2,
        _ => 0,
    };
    high >> shift & 0xfff
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_byte_is_the_lowest() {
        let mac = [0x02, 0x11, 0x22, 0x33, 0x44, 0x55];
        assert_eq!(mac_words(mac), [0x3322_1102, 0x5544]);
        assert_eq!(mac_from([0x3322_1102, 0xffff_5544]), mac);
    }

    #[test]
    fn numbers() {
        assert_eq!(Api::OFFERED.map(Api::wire), [4, 3, 2, 0]);
        assert_eq!(Request::SetVlan.with_info(1), 0x0001_0004);
        assert_eq!(Request::GetLinkState.word(), 16);
        assert_eq!(XcastMode::Promiscuous as u32, 3);
        assert_eq!(MAX_MULTICAST, 30);
    }

    #[test]
    fn made_up_addresses_are_local_and_unicast() {
        for seed in 0..1000 {
            let mac = local_mac(seed);
            assert_eq!(mac[0] & 3, 2);
            assert_eq!(check_mac(mac), Ok(mac));
            assert_ne!(mac, local_mac(seed + 1));
        }
        assert_eq!(check_mac([0; 6]), Err(Error::Mac([0; 6])));
        assert!(check_mac([0xff; 6]).is_err());
    }

    #[test]
    fn hashes_of_every_kind() {
        // 01:00:5e:01:ab:cd: bits 47:32 are 0xcdab.
        let mac = [0x01, 0x00, 0x5e, 0x01, 0xab, 0xcd];
        assert_eq!(multicast_hash(0, mac), 0xcda);
        assert_eq!(multicast_hash(1, mac), 0x9b5);
        assert_eq!(multicast_hash(2, mac), 0x36a);
        assert_eq!(multicast_hash(3, mac), 0xdab);
    }
}
