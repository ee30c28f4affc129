//! The receive filter of a port: which frames are for it (virtio 1.3, 5.1.6.5.1 to 5.1.6.5.3).
//!
//! A switch floods what it does not know, so that a port sees frames for others. A fresh filter lets everything in, and
//! costs one branch a burst as long as it does.
//!
//! ```
//! use usernic::filter::Filter;
//! use virtio_ring::net::RxMode;
//!
//! let mut filter = Filter::new([2, 0, 0, 0, 0, 1]);
//! let frame_for = |mac: [u8; 6]| [&mac[..], &[2, 0, 0, 0, 0, 9, 8, 0]].concat();
//! assert!(!filter.is_active() && filter.accepts(&frame_for([2, 0, 0, 0, 0, 7])));
//!
//! filter.set_mode(RxMode::Promiscuous, false);
//! assert!(filter.accepts(&frame_for([2, 0, 0, 0, 0, 1])));
//! assert!(!filter.accepts(&frame_for([2, 0, 0, 0, 0, 7])));
//! assert!(filter.accepts(&frame_for([0xff; 6])));
//! ```

use virtio_ring::Features;
use virtio_ring::net::{Ack, Command, Request, RxMode, VLANS};

use crate::offload::headers::be16;

/// A receive filter.
///
/// Promiscuous mode goes before all else. Without it: broadcast frames come in unless they are turned off; frames for
/// groups come in if the group is listed or all are let in, unless they are turned off; frames for stations come in if
/// the station is this port or is listed or all are let in, unless they are turned off. Of those, tagged frames come in
/// only if their VLAN is listed, once there is a VLAN filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    own: u64,
    modes: u8,
    unicast: List,
    multicast: List,
    vlans: Option<Box<[u64; VLANS as usize / 64]>>,
}

const BROADCAST: u64 = 0xffff_ffff_ffff;

/// Addresses, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct List {
    addresses: Vec<u64>,
    /// There were more than are kept: all count as listed.
    all: bool,
}

impl List {
    fn new(addresses: &[[u8; 6]]) -> Self {
        let all = addresses.len() > Filter::MAX_ADDRESSES;
        let mut addresses: Vec<u64> = addresses
            .iter()
            .take(Filter::MAX_ADDRESSES)
            .map(|address| number(*address))
            .collect();
        addresses.sort_unstable();
        List { addresses, all }
    }

    /// The bytes of one of the two tables of VIRTIO_NET_CTRL_MAC_TABLE_SET.
    fn table(&self) -> Vec<u8> {
        let mut bytes = (self.addresses.len() as u32).to_le_bytes().to_vec();
        for address in &self.addresses {
            bytes.extend(&address.to_be_bytes()[2..]);
        }
        bytes
    }

    fn listed(&self) -> Option<Vec<[u8; 6]>> {
        (!self.all).then(|| self.addresses.iter().map(|number| address(*number)).collect())
    }

    fn has(&self, address: u64) -> bool {
        self.all || self.addresses.binary_search(&address).is_ok()
    }
}

fn address(number: u64) -> [u8; 6] {
    let [_, _, a, b, c, d, e, f] = number.to_be_bytes();
    [a, b, c, d, e, f]
}

fn number(address: [u8; 6]) -> u64 {
    let [a, b, c, d, e, f] = address;
    u64::from_be_bytes([0, 0, a, b, c, d, e, f])
}

const fn bit(mode: RxMode) -> u8 {
    match mode {
        RxMode::Promiscuous => 1,
        RxMode::AllMulticast => 2,
        RxMode::AllUnicast => 4,
        RxMode::NoMulticast => 8,
        RxMode::NoUnicast => 16,
        RxMode::NoBroadcast => 32,
    }
}

impl Filter {
    /// Addresses of each list that are kept. With more, every address counts as listed.
    pub const MAX_ADDRESSES: usize = 64;

    /// A filter for the port of this address, in promiscuous mode.
    pub fn new(mac: [u8; 6]) -> Self {
        Filter {
            own: number(mac),
            modes: bit(RxMode::Promiscuous),
            unicast: List::default(),
            multicast: List::default(),
            vlans: None,
        }
    }

    /// Whether there may be frames that it keeps out.
    #[inline]
    pub fn is_active(&self) -> bool {
        !self.mode(RxMode::Promiscuous)
    }

    /// Whether a mode is on.
    #[inline]
    pub fn mode(&self, mode: RxMode) -> bool {
        self.modes & bit(mode) != 0
    }

    /// The port's own address, as the filter has it.
    pub(crate) fn mac(&self) -> [u8; 6] {
        address(self.own)
    }

    /// The stations that are listed; `None`: more than are kept, so that all are.
    pub(crate) fn stations(&self) -> Option<Vec<[u8; 6]>> {
        self.unicast.listed()
    }

    /// The groups that are listed; `None`: more than are kept, so that all are.
    pub(crate) fn groups(&self) -> Option<Vec<[u8; 6]>> {
        self.multicast.listed()
    }

    /// Whether a VLAN is listed.
    pub(crate) fn has_vlan(&self, id: u16) -> bool {
        let vlans = self.vlans.as_ref();
        vlans.is_some_and(|vlans| {
            vlans
                .get(usize::from(id / 64))
                .is_some_and(|word| word >> (id % 64) & 1 == 1)
        })
    }

    /// Turns a mode on or off.
    pub fn set_mode(&mut self, mode: RxMode, on: bool) {
        self.modes = if on {
            self.modes | bit(mode)
        } else {
            self.modes & !bit(mode)
        };
    }

    /// The port's own address.
    pub fn set_mac(&mut self, mac: [u8; 6]) {
        self.own = number(mac);
    }

    /// The stations and the groups that are let in besides the port's own address, in place of those before.
    pub fn set_addresses(&mut self, unicast: &[[u8; 6]], multicast: &[[u8; 6]]) {
        self.unicast = List::new(unicast);
        self.multicast = List::new(multicast);
    }

    /// Turns the VLAN filter on, with no VLAN listed, or off. Frames without a tag always pass it; one with a priority
    /// tag is of VLAN 0.
    pub fn set_vlan_filter(&mut self, on: bool) {
        match (on, &self.vlans) {
            (false, _) => self.vlans = None,
            (true, None) => self.vlans = Some(Box::new([0; _])),
            (true, Some(_)) => {}
        }
    }

    /// Whether VLANs are filtered.
    pub fn vlan_filter(&self) -> bool {
        self.vlans.is_some()
    }

    /// Lists a VLAN, or takes it off the list; turns the VLAN filter on. `false`, and nothing done: no VLAN has this id.
    pub fn set_vlan(&mut self, id: u16, listed: bool) -> bool {
        if id >= VLANS {
            return false;
        }
        self.set_vlan_filter(true);
        if let Some(vlans) = &mut self.vlans {
            let (word, bit) = (&mut vlans[usize::from(id / 64)], 1 << (id % 64));
            *word = if listed { *word | bit } else { *word & !bit };
        }
        true
    }

    /// Carries out a command of the control queue, if it is one for the filter.
    pub fn apply(&mut self, request: &Request<'_>) -> Ack {
        match *request {
            Request::RxMode(mode, on) => self.set_mode(mode, on),
            Request::MacTable { unicast, multicast } => self.set_addresses(unicast.as_slice(), multicast.as_slice()),
            Request::MacAddr(mac) => self.set_mac(mac),
            Request::VlanAdd(id) if self.set_vlan(id, true) => {}
            Request::VlanDel(id) if self.set_vlan(id, false) => {}
            _ => return Ack::ERR,
        }
        Ack::OK
    }

    /// The commands that have a device let in what this filter does, but for VLANs: those it is to look at itself
    /// ([`vlan_filter`](Filter::vlan_filter)). `None`: a device of these features cannot.
    pub(crate) fn commands(&self, features: Features) -> Option<Vec<Vec<u8>>> {
        let command = |command: Command, data: &[u8]| [&command.to_bytes()[..], data].concat();
        if !features.contains(Features::NET_CTRL_VQ | Features::NET_CTRL_RX) {
            return None;
        }
        let promiscuous = |on: bool| command(Command::RX_PROMISC, &[on.into()]);
        if !self.is_active() {
            return Some(vec![promiscuous(true)]);
        }
        let all_unicast = self.mode(RxMode::AllUnicast) || self.unicast.all;
        let extra = [
            (Command::RX_ALLUNI, all_unicast),
            (Command::RX_NOMULTI, self.mode(RxMode::NoMulticast)),
            (Command::RX_NOUNI, self.mode(RxMode::NoUnicast)),
            (Command::RX_NOBCAST, self.mode(RxMode::NoBroadcast)),
        ];
        let has_extra = features.contains(Features::NET_CTRL_RX_EXTRA);
        if !has_extra && extra.iter().any(|(_, on)| *on) {
            return None;
        }
        let tables = [self.unicast.table(), self.multicast.table()].concat();
        let all_multicast = self.mode(RxMode::AllMulticast) || self.multicast.all;
        let mut commands = vec![
            command(Command::MAC_TABLE_SET, &tables),
            command(Command::RX_ALLMULTI, &[all_multicast.into()]),
        ];
        if has_extra {
            commands.extend(extra.map(|(code, on)| command(code, &[on.into()])));
        }
        // Last: until then nothing is kept out.
        commands.push(promiscuous(false));
        Some(commands)
    }

    /// Whether the frame that begins with `header` is let in. 16 bytes of it are enough; a frame of less than 14 is not
    /// for anybody.
    #[inline]
    pub fn accepts(&self, header: &[u8]) -> bool {
        if !self.is_active() {
            return true;
        }
        let (Some(address), Some(ether_type)) = (header.first_chunk(), be16(header, 12)) else {
            return false;
        };
        let address = number(*address);
        let listed = if address == BROADCAST {
            !self.mode(RxMode::NoBroadcast)
        } else if address >> 40 & 1 == 1 {
            !self.mode(RxMode::NoMulticast) && (self.mode(RxMode::AllMulticast) || self.multicast.has(address))
        } else {
            !self.mode(RxMode::NoUnicast)
                && (address == self.own || self.mode(RxMode::AllUnicast) || self.unicast.has(address))
        };
        match &self.vlans {
            // 802.1Q and 802.1ad.
            Some(vlans) if listed && matches!(ether_type, 0x8100 | 0x88a8) => be16(header, 14).is_some_and(|control| {
                let id = control & (VLANS - 1);
                vlans[usize::from(id / 64)] >> (id % 64) & 1 == 1
            }),
            _ => listed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use virtio_ring::net::Config;

    const OWN: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 2];
    const GROUP: [u8; 6] = [1, 0, 0x5e, 0, 0, 1];
    const ALL: [u8; 6] = [0xff; 6];

    fn frame(to: [u8; 6], vlan: Option<u16>) -> Vec<u8> {
        let mut frame = [&to[..], &OTHER].concat();
        if let Some(id) = vlan {
            frame.extend([0x81, 0]);
            frame.extend((id | 0xe000).to_be_bytes());
        }
        frame.extend([8, 0]);
        frame
    }

    fn accepted(filter: &Filter) -> Vec<[u8; 6]> {
        let all = [OWN, OTHER, GROUP, ALL];
        all.into_iter().filter(|to| filter.accepts(&frame(*to, None))).collect()
    }

    #[test]
    fn the_modes() {
        let mut filter = Filter::new(OWN);
        assert_eq!(accepted(&filter), [OWN, OTHER, GROUP, ALL]);
        // Promiscuous mode goes before the others.
        for mode in [RxMode::NoMulticast, RxMode::NoUnicast, RxMode::NoBroadcast] {
            filter.set_mode(mode, true);
            assert_eq!(accepted(&filter), [OWN, OTHER, GROUP, ALL]);
            filter.set_mode(mode, false);
        }
        filter.set_mode(RxMode::Promiscuous, false);
        assert_eq!(accepted(&filter), [OWN, ALL]);
        for (mode, expected) in [
            (RxMode::AllMulticast, &[OWN, GROUP, ALL][..]),
            (RxMode::AllUnicast, &[OWN, OTHER, GROUP, ALL]),
            (RxMode::NoMulticast, &[OWN, OTHER, ALL]),
            (RxMode::NoBroadcast, &[OWN, OTHER]),
            (RxMode::NoUnicast, &[]),
        ] {
            filter.set_mode(mode, true);
            assert_eq!(accepted(&filter), expected, "{mode:?}");
        }
    }

    #[test]
    fn lists_and_their_overflow() {
        let mut filter = Filter::new(OWN);
        filter.set_mode(RxMode::Promiscuous, false);
        filter.set_addresses(&[[4; 6], OTHER], &[]);
        assert_eq!(accepted(&filter), [OWN, OTHER, ALL]);
        filter.set_addresses(&[], &[[3; 6], GROUP]);
        assert_eq!(accepted(&filter), [OWN, GROUP, ALL]);
        let many = |n: usize| (0..n).map(|i| [3, 1, 1, 1, 1, i as u8]).collect::<Vec<_>>();
        filter.set_addresses(&[], &many(Filter::MAX_ADDRESSES));
        assert_eq!(accepted(&filter), [OWN, ALL]);
        filter.set_addresses(&[], &many(Filter::MAX_ADDRESSES + 1));
        assert_eq!(accepted(&filter), [OWN, GROUP, ALL]);
        filter.set_mac(OTHER);
        assert_eq!(accepted(&filter), [OTHER, GROUP, ALL]);
    }

    #[test]
    fn vlans() {
        let mut filter = Filter::new(OWN);
        filter.set_mode(RxMode::Promiscuous, false);
        let accepted = |filter: &Filter| {
            [None, Some(0), Some(1), Some(63), Some(64), Some(4095)].map(|vlan| filter.accepts(&frame(OWN, vlan)))
        };
        assert_eq!(accepted(&filter), [true; 6]);
        filter.set_vlan_filter(true);
        assert_eq!(accepted(&filter), [true, false, false, false, false, false]);
        for id in [63, 4095] {
            assert!(filter.set_vlan(id, true));
        }
        assert!(!filter.set_vlan(4096, true));
        assert_eq!(accepted(&filter), [true, false, false, true, false, true]);
        assert!(!filter.accepts(&frame(OTHER, Some(63))));
        filter.set_vlan(63, false);
        assert_eq!(accepted(&filter), [true, false, false, false, false, true]);
        // A tag that is cut off is none that is listed.
        assert!(!filter.accepts(&frame(OWN, Some(4095))[..15]));
        filter.set_vlan_filter(false);
        assert_eq!(accepted(&filter), [true; 6]);
    }

    #[test]
    fn by_the_control_queue() {
        let features = Features::all();
        let config = Config::default();
        let mut filter = Filter::new(OWN);
        let mut command = |bytes: &[u8]| filter.apply(&Request::parse(bytes, features, &config).unwrap());
        assert_eq!(command(&[0, 0, 0]), Ack::OK);
        assert_eq!(
            command(&[&[1, 0, 1, 0, 0, 0][..], &OTHER, &[1, 0, 0, 0], &GROUP].concat()),
            Ack::OK
        );
        assert_eq!(command(&[2, 0, 7, 0]), Ack::OK);
        assert_eq!(command(&[2, 0, 8, 0]), Ack::OK);
        assert_eq!(command(&[2, 1, 8, 0]), Ack::OK);
        assert_eq!(command(&[0, 5, 1]), Ack::OK);
        // Of the queue pairs it knows nothing.
        assert_eq!(command(&[4, 0, 1, 0]), Ack::ERR);
        assert_eq!(accepted(&filter), [OWN, OTHER, GROUP]);
        assert!(filter.accepts(&frame(OWN, Some(7))) && !filter.accepts(&frame(OWN, Some(8))));
        assert_eq!(filter.apply(&Request::MacAddr([6; 6])), Ack::OK);
        assert_eq!(accepted(&filter), [OTHER, GROUP]);
    }

    #[test]
    fn as_commands() {
        let all = Features::NET_CTRL_VQ | Features::NET_CTRL_RX | Features::NET_CTRL_RX_EXTRA;
        let mut filter = Filter::new(OWN);
        assert_eq!(filter.commands(all), Some(vec![vec![0, 0, 1]]));
        filter.set_mode(RxMode::Promiscuous, false);
        filter.set_mode(RxMode::NoBroadcast, true);
        filter.set_addresses(&[OTHER, [4; 6]], &[GROUP]);
        let expected = vec![
            [&[1, 0, 2, 0, 0, 0][..], &OTHER, &[4; 6], &[1, 0, 0, 0], &GROUP].concat(),
            vec![0, 1, 0],
            vec![0, 2, 0],
            vec![0, 3, 0],
            vec![0, 4, 0],
            vec![0, 5, 1],
            vec![0, 0, 0],
        ];
        assert_eq!(filter.commands(all), Some(expected.clone()));
        // Applied to a fresh filter they make this one.
        let mut other = Filter::new(OWN);
        for command in &expected {
            let request = Request::parse(command, all, &Config::default()).unwrap();
            assert_eq!(other.apply(&request), Ack::OK);
        }
        assert_eq!(other, filter);
        assert_eq!(filter.commands(all.difference(Features::NET_CTRL_RX_EXTRA)), None);
        assert_eq!(filter.commands(all.difference(Features::NET_CTRL_VQ)), None);
        filter.set_mode(RxMode::NoBroadcast, false);
        let plain = filter.commands(all.difference(Features::NET_CTRL_RX_EXTRA)).unwrap();
        assert_eq!(plain, [&expected[..2], &expected[6..]].concat());
    }

    proptest! {
        #[test]
        fn any_header(bytes in prop::collection::vec(any::<u8>(), 0..20), modes: u8, vlan in prop::option::of(0..4096u16)) {
            let mut filter = Filter::new(OWN);
            filter.modes = modes & 63;
            if let Some(id) = vlan {
                filter.set_vlan(id, true);
            }
            let accepted = filter.accepts(&bytes);
            prop_assert!(!accepted || bytes.len() >= 14 || !filter.is_active());
            filter.set_mode(RxMode::Promiscuous, true);
            prop_assert!(filter.accepts(&bytes));
        }
    }
}
