//! The PF: its administrator's settings, and how it answers what a VF asks for through the mailbox.
//!
//! The rules are those of PF drivers that people run: what they refuse is refused here.

use std::collections::BTreeSet;

use crate::kind::Kind;
use crate::mailbox::Message;
use crate::message::{Api, CTS, FAILURE, INFO_SHIFT, Request, SUCCESS, Xcast};
use crate::register::{links, mrqc};
use crate::rss::KEY_BYTES;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// The longest frame that the hardware takes, CRC included.
pub const LONGEST_FRAME: u32 = 9728;
/// Multicast hashes in one message.
const HASHES: usize = 30;
/// Filters of VLANs, shared by all VFs (VLVF).
const VLAN_FILTERS: usize = 64;
/// Filters of unicast addresses, shared by all (RAL, RAH).
const ADDRESS_FILTERS: usize = 128;
/// Entries of the PF's redirection table.
const RETA_ENTRIES: usize = 128;

/// How fast the link is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speed {
    /// 100 Mb/s.
    M100,
    /// 1 Gb/s.
    G1,
    /// 2.5 Gb/s, X550.
    G2_5,
    /// 5 Gb/s, X550.
    G5,
    /// 10 Gb/s.
    G10,
}

impl Speed {
    /// As VFLINKS tells it.
    #[must_use]
    pub fn bits(self) -> u32 {
        match self {
            Self::M100 => links::SPEED_100M,
            Self::G1 => links::SPEED_1G,
            Self::G2_5 => links::SPEED_10G | links::NON_STANDARD,
            Self::G5 => links::SPEED_100M | links::NON_STANDARD,
            Self::G10 => links::SPEED_10G,
        }
    }
}

/// What the PF keeps of one VF.
#[derive(Clone, Debug)]
pub struct Policy {
    /// The VF's address; all zero where none is assigned.
    pub mac: Mac,
    /// The administrator has set the address: an untrusted VF must not change it.
    pub mac_is_set: bool,
    /// A VLAN that all of the VF's frames are in, unseen by the VF, and its priority.
    pub port_vlan: Option<(u16, u8)>,
    /// The VF may do more: its own address, all multicast, promiscuous mode.
    pub trusted: bool,
    /// Frames with a foreign source address or VLAN are dropped.
    pub spoof_check: bool,
    /// The VF may read the PF's RSS table and key.
    pub rss_query: bool,
    /// The administrator lets the VF have the link.
    pub link_enabled: bool,
    /// The PF does not answer.
    pub deaf: bool,

    pub(crate) clear_to_send: bool,
    pub(crate) api: Api,
    pub(crate) receive_enabled: bool,
    pub(crate) transmit_enabled: bool,
    pub(crate) vlans: BTreeSet<u16>,
    pub(crate) hashes: Vec<u16>,
    pub(crate) more_macs: Vec<Mac>,
    pub(crate) xcast: Xcast,
    pub(crate) max_frame: u32,
    refusals: Vec<(Request, u32)>,
}

impl Policy {
    fn new(mac: Mac) -> Self {
        Self {
            mac,
            mac_is_set: false,
            port_vlan: None,
            trusted: false,
            spoof_check: true,
            rss_query: false,
            link_enabled: true,
            deaf: false,
            clear_to_send: false,
            api: Api::V10,
            receive_enabled: false,
            transmit_enabled: false,
            vlans: BTreeSet::new(),
            hashes: Vec::new(),
            more_macs: Vec::new(),
            xcast: Xcast::Multi,
            max_frame: 0,
            refusals: Vec::new(),
        }
    }

    /// The VF has been reset: what it asked for before is forgotten.
    pub(crate) fn forget(&mut self) {
        self.clear_to_send = false;
        self.api = Api::V10;
        self.receive_enabled = false;
        self.transmit_enabled = false;
        self.vlans = BTreeSet::from([self.port_vlan.map_or(0, |(vlan, _)| vlan)]);
        self.hashes.clear();
        self.more_macs.clear();
        self.xcast = Xcast::Multi;
        self.max_frame = 0;
    }

    /// Refuses the next `count` requests of this kind.
    pub fn refuse(&mut self, request: Request, count: u32) {
        self.refusals.push((request, count));
    }

    fn refuses(&mut self, request: Request) -> bool {
        self.refusals.retain(|(_, count)| *count > 0);
        let refusal = self.refusals.iter_mut().find(|(what, _)| *what == request);
        refusal.map(|(_, count)| *count -= 1).is_some()
    }

    /// What the VF and its PF have agreed on, for tests to look at.
    #[must_use]
    pub fn agreed(&self) -> Agreed {
        Agreed {
            clear_to_send: self.clear_to_send,
            api: self.api,
            xcast: self.xcast,
            max_frame: self.max_frame,
            vlans: self.vlans.iter().copied().collect(),
            hashes: self.hashes.clone(),
            more_macs: self.more_macs.clone(),
        }
    }
}

/// What a VF has asked for and was given since its last reset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// The VF has sent RESET since it or the PF was reset.
    pub clear_to_send: bool,
    /// The version negotiated.
    pub api: Api,
    /// Broadcast, multicast, promiscuous.
    pub xcast: Xcast,
    /// Longest frame, CRC included; 0: not asked for.
    pub max_frame: u32,
    /// VLANs, 0 (no tag) among them.
    pub vlans: Vec<u16>,
    /// Multicast hashes of 12 bits.
    pub hashes: Vec<u16>,
    /// More unicast addresses.
    pub more_macs: Vec<Mac>,
}

/// The PF's RSS, which VFs before X550 share.
#[derive(Clone, Debug)]
pub struct Rss {
    /// Types of MRQC; 0: off.
    pub types: u32,
    /// Key.
    pub key: [u8; KEY_BYTES],
    /// Table.
    pub table: [u8; RETA_ENTRIES],
}

/// The PF and what it keeps of its VFs.
#[derive(Clone, Debug)]
pub struct Pf {
    /// The chip.
    pub kind: Kind,
    /// Queue pairs of each VF: 1, 2, 4 or 8.
    pub queues: u32,
    /// The newest mailbox version that it speaks.
    pub newest_api: Api,
    /// Which 12 bits of a multicast address are hashed: 0 to 3 (MCSTCTRL.MO).
    pub multicast_filter: u32,
    /// The PF's own MTU.
    pub mtu: u32,
    /// The PF is promiscuous itself, without which no VF may be.
    pub promiscuous: bool,
    /// Malicious-driver detection.
    pub malicious_detection: bool,
    /// Traffic classes; 0: none.
    pub traffic_classes: u32,
    /// The PF's RSS.
    pub rss: Rss,
    pub(crate) link: Option<Speed>,
    pub(crate) vfs: Vec<Policy>,
}

/// What the PF says to a request: the message, and how many words of it.
pub(crate) type Reply = (Message, usize);

impl Pf {
    pub(crate) fn new(kind: Kind, vfs: usize, queues: u32) -> Self {
        let mac = |vf: usize| [0x02, 0x82, 0x59, 0x90, 0, vf as u8 + 1];
        let mut key = [0; KEY_BYTES];
        for (i, byte) in key.iter_mut().enumerate() {
            *byte = (i as u8).wrapping_mul(0x9d).wrapping_add(0x6d);
        }
        Self {
            kind,
            queues,
            newest_api: Api::V13,
            multicast_filter: 0,
            mtu: 1500,
            promiscuous: false,
            malicious_detection: false,
            traffic_classes: 0,
            rss: Rss {
                types: mrqc::IPV4 | mrqc::IPV4_TCP | mrqc::IPV6 | mrqc::IPV6_TCP,
                key,
                table: std::array::from_fn(|i| (i as u32 % queues) as u8),
            },
            link: Some(Speed::G10),
            vfs: (0..vfs).map(|vf| Policy::new(mac(vf))).collect(),
        }
    }

    /// Bytes of frames that are let in, CRC included: one limit for all.
    pub(crate) fn longest_frame(&self) -> u32 {
        let own = self.mtu + 18;
        self.vfs.iter().map(|vf| vf.max_frame).fold(own, u32::max)
    }

    fn has_jumbo(&self) -> bool {
        self.mtu > 1500
    }

    /// Answers a request; none to what is no request, or when the PF is deaf.
    pub(crate) fn answer(&mut self, vf: usize, mut message: Message) -> Option<Reply> {
        let word = message[0];
        if self.vfs[vf].deaf || word & (SUCCESS | FAILURE) != 0 {
            return None;
        }
        let request = Request::of(word);
        if request == Some(Request::Reset) {
            return Some(self.reset(vf, message));
        }
        if !self.vfs[vf].clear_to_send {
            message[0] |= FAILURE;
            return Some((message, 1));
        }
        let agreed = match request {
            Some(request) if !self.vfs[vf].refuses(request) => self.grant(vf, request, &mut message),
            _ => None,
        };
        message[0] |= CTS | if agreed.is_some() { SUCCESS } else { FAILURE };
        Some((message, message.len()))
    }

    /// VF_RESET: four words, without CTS.
    fn reset(&mut self, vf: usize, mut message: Message) -> Reply {
        let refused = self.vfs[vf].refuses(Request::Reset);
        let has_jumbo = self.has_jumbo();
        let policy = &mut self.vfs[vf];
        policy.forget();
        policy.clear_to_send = true;
        policy.transmit_enabled = true;
        // An 82599 cannot mix long and short frames: receive waits for SET_LPE.
        policy.receive_enabled = !(self.kind == Kind::I82599 && has_jumbo);
        let none = policy.mac == [0; 6] || refused;
        message[0] |= if none { FAILURE } else { SUCCESS };
        let mac = policy.mac;
        message[1] = u32::from_le_bytes([mac[0], mac[1], mac[2], mac[3]]);
        message[2] = u32::from_le_bytes([mac[4], mac[5], 0, 0]);
        message[3] = self.multicast_filter;
        (message, 4)
    }

    /// Does what is asked for; none: refused.
    fn grant(&mut self, vf: usize, request: Request, message: &mut Message) -> Option<()> {
        let info = message[0] >> INFO_SHIFT & 0xff;
        let api = self.vfs[vf].api;
        match request {
            Request::Reset => None,
            Request::Negotiate => {
                let wanted = Api::of(message[1]).filter(|api| *api <= self.newest_api)?;
                self.vfs[vf].api = wanted;
                Some(())
            }
            Request::SetMac => self.set_mac(vf, mac_of(message)),
            Request::SetMulticast => self.set_multicast(vf, info as usize, message),
            Request::SetVlan => self.set_vlan(vf, info != 0, (message[1] & 0xfff) as u16),
            Request::SetMaxFrame => self.set_max_frame(vf, message[1]),
            Request::SetMacVlan => self.set_more_mac(vf, info, mac_of(message)),
            Request::GetQueues if api >= Api::V11 => {
                let policy = &self.vfs[vf];
                message[1] = self.queues;
                message[2] = self.queues;
                message[3] = match self.traffic_classes {
                    0 | 1 => u32::from(policy.port_vlan.is_some()),
                    classes => classes,
                };
                message[4] = 0;
                Some(())
            }
            // Only devices whose VFs have no table of their own: two bits of each entry, sixteen entries a word.
            Request::GetReta if api >= Api::V12 && !self.kind.has_own_rss() && self.vfs[vf].rss_query => {
                for (word, entries) in message[1..].iter_mut().zip(self.rss.table.chunks(16)) {
                    let place = |word, (i, entry): (usize, &u8)| word | u32::from(entry & 3) << (2 * i);
                    *word = entries.iter().enumerate().fold(0, place);
                }
                Some(())
            }
            Request::GetRssKey if api >= Api::V12 && !self.kind.has_own_rss() && self.vfs[vf].rss_query => {
                for (word, bytes) in message[1..].iter_mut().zip(self.rss.key.chunks(4)) {
                    *word = u32::from_le_bytes(bytes.try_into().expect("4 bytes"));
                }
                Some(())
            }
            Request::UpdateXcast if api >= Api::V12 => self.update_xcast(vf, api, message),
            Request::GetLinkState if api >= Api::V12 => {
                message[1] = u32::from(self.vfs[vf].link_enabled);
                Some(())
            }
            Request::GetQueues
            | Request::GetReta
            | Request::GetRssKey
            | Request::UpdateXcast
            | Request::GetLinkState => None,
        }
    }

    fn set_mac(&mut self, vf: usize, mac: Mac) -> Option<()> {
        let policy = &mut self.vfs[vf];
        if !is_unicast(mac) || (policy.mac_is_set && !policy.trusted && policy.mac != mac) {
            return None;
        }
        policy.mac = mac;
        Some(())
    }

    fn set_multicast(&mut self, vf: usize, count: usize, message: &Message) -> Option<()> {
        let halves = message[1..]
            .iter()
            .flat_map(|word| [*word as u16, (*word >> 16) as u16]);
        self.vfs[vf].hashes = halves.take(count.min(HASHES)).map(|hash| hash & 0xfff).collect();
        Some(())
    }

    fn set_vlan(&mut self, vf: usize, on: bool, vlan: u16) -> Option<()> {
        if self.vfs[vf].port_vlan.is_some() || self.traffic_classes > 1 {
            return None;
        }
        if on {
            let used: BTreeSet<u16> = self.vfs.iter().flat_map(|vf| vf.vlans.iter().copied()).collect();
            if !used.contains(&vlan) && used.len() >= VLAN_FILTERS {
                return None;
            }
            self.vfs[vf].vlans.insert(vlan);
        } else if vlan != 0 {
            self.vfs[vf].vlans.remove(&vlan);
        }
        Some(())
    }

    fn set_max_frame(&mut self, vf: usize, bytes: u32) -> Option<()> {
        let pf_has_jumbo = self.has_jumbo();
        let policy = &mut self.vfs[vf];
        if self.kind == Kind::I82599 {
            let knows_jumbo = policy.api >= Api::V11 && pf_has_jumbo;
            let allowed = knows_jumbo || !(pf_has_jumbo || bytes > 1518);
            policy.receive_enabled = allowed;
            if !allowed {
                return None;
            }
        }
        if bytes > LONGEST_FRAME {
            return None;
        }
        policy.max_frame = bytes;
        Some(())
    }

    fn set_more_mac(&mut self, vf: usize, index: u32, mac: Mac) -> Option<()> {
        let policy = &mut self.vfs[vf];
        if index > 0 {
            if policy.mac_is_set && !policy.trusted || !is_unicast(mac) {
                return None;
            }
            // Who may use more addresses is not held to one.
            policy.spoof_check = false;
        }
        if index <= 1 {
            policy.more_macs.clear();
        }
        if index == 0 {
            return Some(());
        }
        let used: usize = self.vfs.iter().map(|vf| 1 + vf.more_macs.len()).sum();
        if used + 1 >= ADDRESS_FILTERS {
            return None;
        }
        self.vfs[vf].more_macs.push(mac);
        Some(())
    }

    fn update_xcast(&mut self, vf: usize, api: Api, message: &mut Message) -> Option<()> {
        let mut mode = Xcast::of(message[1])?;
        if mode == Xcast::Promiscuous && api < Api::V13 {
            return None;
        }
        let policy = &mut self.vfs[vf];
        // Granted in part, and said so.
        if !policy.trusted {
            mode = mode.min(Xcast::Multi);
        }
        if mode == Xcast::Promiscuous && (self.kind == Kind::I82599 || !self.promiscuous) {
            return None;
        }
        policy.xcast = mode;
        message[1] = mode as u32;
        Some(())
    }

    /// The hash of a multicast address, as the VF is told to compute it.
    pub(crate) fn hash(&self, mac: &[u8]) -> u16 {
        let top = u16::from(mac[5]) << 8 | u16::from(mac[4]);
        match self.multicast_filter {
            0 => top >> 4,
            1 => top >> 3 & 0xfff,
            2 => top >> 2 & 0xfff,
            _ => top & 0xfff,
        }
    }
}

fn mac_of(message: &Message) -> Mac {
    let low = message[1].to_le_bytes();
    let high = message[2].to_le_bytes();
    [low[0], low[1], low[2], low[3], high[0], high[1]]
}

fn is_unicast(mac: Mac) -> bool {
    mac != [0; 6] && mac[0] & 1 == 0
}
