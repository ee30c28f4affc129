//! A command of the control queue as the device side reads it (virtio 1.3 §5.1.6.5): from bytes that the driver wrote,
//! checked, to a value; and the byte to answer with.
//!
//! The bytes are the device-readable part of a chain, copied to private memory: class, command, data. The device-writable
//! part takes the [`Ack`].
//!
//! ```
//! use virtio_ring::Features;
//! use virtio_ring::net::{Ack, Config, Refused, Request};
//!
//! let features = Features::NET_CTRL_VQ | Features::NET_CTRL_VLAN;
//! let config = Config::default();
//! // Class VLAN, command ADD, VLAN 100.
//! assert_eq!(Request::parse(&[2, 0, 100, 0], features, &config), Ok(Request::VlanAdd(100)));
//! // There is no VLAN 5000.
//! let refused = Request::parse(&[2, 0, 0x88, 0x13], features, &config).unwrap_err();
//! assert_eq!((refused, refused.ack()), (Refused::Value, Ack::ERR));
//! ```

use super::config::{Config, HashTypes};
use super::control::{Ack, Class, Command, MQ_VQ_PAIRS_MAX, MQ_VQ_PAIRS_MIN};
use crate::Features;
use core::fmt;

/// VLAN ids, 0 to 4095 (§5.1.6.5.3; IEEE 802.1Q has 12 bits).
pub const VLANS: u16 = 4096;

/// What may be changed with [`Request::GuestOffloads`] (§5.1.6.5.8).
pub const GUEST_OFFLOADS: Features = Features::NET_GUEST_CSUM
    .union(Features::NET_GUEST_TSO4)
    .union(Features::NET_GUEST_TSO6)
    .union(Features::NET_GUEST_ECN)
    .union(Features::NET_GUEST_UFO)
    .union(Features::NET_GUEST_USO4)
    .union(Features::NET_GUEST_USO6);

/// A mode of the receive filter (§5.1.6.5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RxMode {
    /// Receive every packet.
    Promiscuous,
    /// Receive every multicast packet.
    AllMulticast,
    /// Receive every unicast packet.
    AllUnicast,
    /// Receive no multicast packet.
    NoMulticast,
    /// Receive no unicast packet.
    NoUnicast,
    /// Receive no broadcast packet.
    NoBroadcast,
}

/// Addresses of a filter table, in the driver's order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct MacList<'a>(&'a [[u8; 6]]);

impl<'a> MacList<'a> {
    /// The addresses.
    pub const fn as_slice(self) -> &'a [[u8; 6]] {
        self.0
    }

    /// How many there are.
    pub const fn len(self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub const fn is_empty(self) -> bool {
        self.0.is_empty()
    }
}

/// Receive-side scaling (§5.1.6.5.7.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RssConfig<'a> {
    /// What is hashed.
    pub hash_types: HashTypes,
    /// The queue pair, from 0, of packets without a hash.
    pub unclassified: u16,
    /// The highest transmit virtqueue that is used: the number of its pair, from 1.
    pub max_tx_vq: u16,
    table: &'a [[u8; 2]],
    key: &'a [u8],
}

impl<'a> RssConfig<'a> {
    /// The queue pairs, from 0, by the hash's lowest bits. The number of entries is a power of two.
    pub fn table(&self) -> impl ExactSizeIterator<Item = u16> + 'a {
        self.table.iter().map(|entry| u16::from_le_bytes(*entry))
    }

    /// The hash key. Empty: the one there is, is kept.
    pub const fn key(&self) -> &'a [u8] {
        self.key
    }
}

/// What is hashed for the report with each packet (§5.1.6.5.6.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HashConfig<'a> {
    /// What is hashed.
    pub hash_types: HashTypes,
    /// The hash key. Empty: the one there is, is kept.
    pub key: &'a [u8],
}

/// A command that makes sense for a device of these features and this configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Request<'a> {
    /// A mode of the receive filter, on or off.
    RxMode(RxMode, bool),
    /// Both tables of the receive filter, in place of those before (§5.1.6.5.2).
    MacTable {
        /// Addresses of single stations.
        unicast: MacList<'a>,
        /// Addresses of groups.
        multicast: MacList<'a>,
    },
    /// The port's own address.
    MacAddr([u8; 6]),
    /// Let a VLAN's packets in: 0 to 4095.
    VlanAdd(u16),
    /// Keep a VLAN's packets out: 0 to 4095.
    VlanDel(u16),
    /// The driver has sent its gratuitous packets: take [`Status::ANNOUNCE`](super::config::Status::ANNOUNCE) away
    /// (§5.1.6.5.4).
    AnnounceAck,
    /// Queue pairs to use, 1 to what the configuration has, with automatic steering (§5.1.6.5.5).
    QueuePairs(u16),
    /// Receive-side scaling.
    Rss(RssConfig<'a>),
    /// Hash reports.
    Hash(HashConfig<'a>),
    /// Receive offloads to use from now on, of those that were negotiated (§5.1.6.5.8).
    GuestOffloads(Features),
}

/// Why a command is not carried out. All are answered alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refused {
    /// Fewer than two bytes.
    Short,
    /// No such class or command, or one that is not supported.
    Unknown,
    /// The feature that it belongs to was not negotiated.
    NotNegotiated,
    /// The data are shorter or longer than the command's.
    Length,
    /// The data are out of range.
    Value,
}

impl Refused {
    /// What to answer.
    pub const fn ack(self) -> Ack {
        Ack::ERR
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Refused::Short => "a control command of less than two bytes",
            Refused::Unknown => "an unknown control command",
            Refused::NotNegotiated => "a control command whose feature was not negotiated",
            Refused::Length => "a control command with too little or too much data",
            Refused::Value => "a control command whose data are out of range",
        })
    }
}

impl core::error::Error for Refused {}

/// Data of a command, read from the front.
struct Data<'a>(&'a [u8]);

impl<'a> Data<'a> {
    fn bytes(&mut self, count: usize) -> Result<&'a [u8], Refused> {
        let (head, rest) = self.0.split_at_checked(count).ok_or(Refused::Length)?;
        self.0 = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Refused> {
        self.bytes(N)?.try_into().map_err(|_| Refused::Length)
    }

    fn u8(&mut self) -> Result<u8, Refused> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Result<u16, Refused> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, Refused> {
        self.array().map(u32::from_le_bytes)
    }

    /// `count` items of `N` bytes.
    fn items<const N: usize>(&mut self, count: usize) -> Result<&'a [[u8; N]], Refused> {
        let bytes = self.bytes(count.checked_mul(N).ok_or(Refused::Length)?)?;
        Ok(bytes.as_chunks().0)
    }

    fn macs(&mut self) -> Result<MacList<'a>, Refused> {
        let count = usize::try_from(self.u32()?).map_err(|_| Refused::Length)?;
        Ok(MacList(self.items(count)?))
    }

    fn key(&mut self, config: &Config) -> Result<&'a [u8], Refused> {
        let len = self.u8()?;
        let key = self.bytes(len.into())?;
        if len > config.rss_max_key_size {
            return Err(Refused::Value);
        }
        Ok(key)
    }

    fn hash_types(&mut self, config: &Config) -> Result<HashTypes, Refused> {
        let types = HashTypes::from_bits_retain(self.u32()?);
        if !config.supported_hash_types.contains(types) {
            return Err(Refused::Value);
        }
        Ok(types)
    }

    fn vlan(&mut self) -> Result<u16, Refused> {
        Some(self.u16()?).filter(|id| *id < VLANS).ok_or(Refused::Value)
    }
}

impl<'a> Request<'a> {
    /// Reads a command: class, command and data, all of the chain's device-readable bytes but none more.
    ///
    /// `features` are those that were negotiated, `config` is what the device shows: its limits are checked.
    ///
    /// # Errors
    /// [`Refused`]: nothing is to change, and the answer is [`Refused::ack`].
    pub fn parse(bytes: &'a [u8], features: Features, config: &Config) -> Result<Self, Refused> {
        let (command, data) = bytes.split_first_chunk().ok_or(Refused::Short)?;
        let command = Command::from_bytes(*command);
        if !features.contains(needed(command)?) {
            return Err(Refused::NotNegotiated);
        }
        let mut data = Data(data);
        let request = match command {
            Command {
                class: Class::RX,
                command,
            } => {
                let mode = mode(command).ok_or(Refused::Unknown)?;
                match data.u8()? {
                    on @ (0 | 1) => Self::RxMode(mode, on == 1),
                    _ => return Err(Refused::Value),
                }
            }
            Command::MAC_TABLE_SET => Self::MacTable {
                unicast: data.macs()?,
                multicast: data.macs()?,
            },
            Command::MAC_ADDR_SET => match data.array()? {
                // A group is nobody's own address.
                mac if mac[0] & 1 == 1 => return Err(Refused::Value),
                mac => Self::MacAddr(mac),
            },
            Command::VLAN_ADD => Self::VlanAdd(data.vlan()?),
            Command::VLAN_DEL => Self::VlanDel(data.vlan()?),
            Command::ANNOUNCE_ACK => Self::AnnounceAck,
            Command::MQ_VQ_PAIRS_SET => {
                let most = config.max_virtqueue_pairs.min(MQ_VQ_PAIRS_MAX);
                match data.u16()? {
                    pairs if (MQ_VQ_PAIRS_MIN..=most).contains(&pairs) => Self::QueuePairs(pairs),
                    _ => return Err(Refused::Value),
                }
            }
            Command::MQ_RSS_CONFIG => Self::Rss(rss(&mut data, config)?),
            Command::MQ_HASH_CONFIG => {
                let hash_types = data.hash_types(config)?;
                // le16 reserved[4]
                data.bytes(8)?;
                let key = data.key(config)?;
                Self::Hash(HashConfig { hash_types, key })
            }
            Command::GUEST_OFFLOADS_SET => {
                let offloads = Features::from_bits_retain(u64::from_le_bytes(data.array()?));
                if !(features & GUEST_OFFLOADS).contains(offloads) {
                    return Err(Refused::Value);
                }
                Self::GuestOffloads(offloads)
            }
            _ => return Err(Refused::Unknown),
        };
        if !data.0.is_empty() {
            return Err(Refused::Length);
        }
        Ok(request)
    }
}

/// The features that a command belongs to.
fn needed(command: Command) -> Result<Features, Refused> {
    Ok(Features::NET_CTRL_VQ.union(match command {
        Command::RX_PROMISC | Command::RX_ALLMULTI | Command::MAC_TABLE_SET => Features::NET_CTRL_RX,
        Command {
            class: Class::RX,
            command: 2..=5,
        } => Features::NET_CTRL_RX_EXTRA,
        Command::MAC_ADDR_SET => Features::NET_CTRL_MAC_ADDR,
        Command::VLAN_ADD | Command::VLAN_DEL => Features::NET_CTRL_VLAN,
        Command::ANNOUNCE_ACK => Features::NET_GUEST_ANNOUNCE,
        Command::MQ_VQ_PAIRS_SET => Features::NET_MQ,
        Command::MQ_RSS_CONFIG => Features::NET_RSS,
        Command::MQ_HASH_CONFIG => Features::NET_HASH_REPORT,
        Command::GUEST_OFFLOADS_SET => Features::NET_CTRL_GUEST_OFFLOADS,
        _ => return Err(Refused::Unknown),
    }))
}

fn mode(command: u8) -> Option<RxMode> {
    Some(match command {
        0 => RxMode::Promiscuous,
        1 => RxMode::AllMulticast,
        2 => RxMode::AllUnicast,
        3 => RxMode::NoMulticast,
        4 => RxMode::NoUnicast,
        5 => RxMode::NoBroadcast,
        _ => return None,
    })
}

/// `struct virtio_net_rss_config`. Its queues are the `vq_index_1_16` of receive virtqueues, and so numbers of pairs.
fn rss<'a>(data: &mut Data<'a>, config: &Config) -> Result<RssConfig<'a>, Refused> {
    let hash_types = data.hash_types(config)?;
    let mask = data.u16()?;
    let unclassified = data.u16()?;
    let length = usize::from(mask) + 1;
    if !length.is_power_of_two() || length > usize::from(config.rss_max_indirection_table_length) {
        return Err(Refused::Value);
    }
    let table = data.items(length)?;
    let max_tx_vq = data.u16()?;
    let key = data.key(config)?;
    let rss = RssConfig {
        hash_types,
        unclassified,
        max_tx_vq,
        table,
        key,
    };
    let pairs = config.max_virtqueue_pairs;
    let queues = rss.table().all(|pair| pair < pairs) && unclassified < pairs;
    if !queues || !(1..=pairs).contains(&max_tx_vq) {
        return Err(Refused::Value);
    }
    Ok(rss)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: Features = Features::all();

    fn config() -> Config {
        Config {
            max_virtqueue_pairs: 4,
            rss_max_key_size: 40,
            rss_max_indirection_table_length: 128,
            supported_hash_types: HashTypes::from_bits_retain(0x3f),
            ..Config::default()
        }
    }

    fn parse(bytes: &[u8]) -> Result<Request<'_>, Refused> {
        Request::parse(bytes, ALL, &config())
    }

    #[test]
    fn receive_modes() {
        for (command, mode) in [
            (0, RxMode::Promiscuous),
            (1, RxMode::AllMulticast),
            (2, RxMode::AllUnicast),
            (3, RxMode::NoMulticast),
            (4, RxMode::NoUnicast),
            (5, RxMode::NoBroadcast),
        ] {
            assert_eq!(parse(&[0, command, 1]), Ok(Request::RxMode(mode, true)));
            assert_eq!(parse(&[0, command, 0]), Ok(Request::RxMode(mode, false)));
            assert_eq!(parse(&[0, command, 2]), Err(Refused::Value));
            assert_eq!(parse(&[0, command]), Err(Refused::Length));
            assert_eq!(parse(&[0, command, 1, 0]), Err(Refused::Length));
        }
        assert_eq!(parse(&[0, 6, 1]), Err(Refused::Unknown));
        // Extra modes have a feature of their own.
        let plain = Features::NET_CTRL_VQ | Features::NET_CTRL_RX;
        assert!(Request::parse(&[0, 1, 1], plain, &config()).is_ok());
        assert_eq!(
            Request::parse(&[0, 2, 1], plain, &config()),
            Err(Refused::NotNegotiated)
        );
    }

    #[test]
    fn address_tables() {
        let bytes = [
            1, 0, // MAC, TABLE_SET
            1, 0, 0, 0, 2, 0, 0, 0, 0, 1, // one unicast address
            2, 0, 0, 0, 1, 0, 0x5e, 0, 0, 1, 0x33, 0x33, 0, 0, 0, 2, // two multicast addresses
        ];
        let Ok(Request::MacTable { unicast, multicast }) = parse(&bytes) else {
            panic!("{:?}", parse(&bytes));
        };
        assert_eq!(unicast.as_slice(), [[2, 0, 0, 0, 0, 1]]);
        assert_eq!(multicast.as_slice(), [[1, 0, 0x5e, 0, 0, 1], [0x33, 0x33, 0, 0, 0, 2]]);
        for len in 2..bytes.len() {
            assert_eq!(parse(&bytes[..len]), Err(Refused::Length), "{len}");
        }
        // More addresses than bytes could have.
        assert_eq!(parse(&[1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]), Err(Refused::Length));
        assert_eq!(
            parse(&[1, 1, 2, 3, 4, 5, 6, 7]),
            Ok(Request::MacAddr([2, 3, 4, 5, 6, 7]))
        );
        assert_eq!(parse(&[1, 1, 1, 3, 4, 5, 6, 7]), Err(Refused::Value));
    }

    #[test]
    fn vlans_pairs_announcements_offloads() {
        assert_eq!(parse(&[2, 0, 0xff, 0x0f]), Ok(Request::VlanAdd(4095)));
        assert_eq!(parse(&[2, 1, 1, 0]), Ok(Request::VlanDel(1)));
        assert_eq!(parse(&[2, 1, 0, 0x10]), Err(Refused::Value));
        assert_eq!(parse(&[3, 0]), Ok(Request::AnnounceAck));
        assert_eq!(parse(&[4, 0, 4, 0]), Ok(Request::QueuePairs(4)));
        assert_eq!(parse(&[4, 0, 5, 0]), Err(Refused::Value));
        assert_eq!(parse(&[4, 0, 0, 0]), Err(Refused::Value));
        let tso4 = Features::NET_GUEST_CSUM | Features::NET_GUEST_TSO4;
        assert_eq!(
            parse(&[5, 0, 0x82, 0, 0, 0, 0, 0, 0, 0]),
            Ok(Request::GuestOffloads(tso4))
        );
        // NET_CSUM is no offload of the receiving side.
        assert_eq!(parse(&[5, 0, 1, 0, 0, 0, 0, 0, 0, 0]), Err(Refused::Value));
        assert_eq!(
            Request::parse(
                &[5, 0, 0x82, 0, 0, 0, 0, 0, 0, 0],
                Features::NET_CTRL_VQ | Features::NET_CTRL_GUEST_OFFLOADS | Features::NET_GUEST_CSUM,
                &config()
            ),
            Err(Refused::Value)
        );
    }

    #[test]
    fn scaling_and_hashes() {
        let mut bytes = [0u8; 2 + 4 + 2 + 2 + 8 + 2 + 1 + 40];
        bytes[..2].copy_from_slice(&[4, 1]);
        bytes[2] = 0x3f; // hash_types
        bytes[6] = 3; // indirection_table_mask: four entries
        bytes[8] = 2; // unclassified_queue
        for (entry, pair) in [3u8, 1, 2, 0].into_iter().enumerate() {
            bytes[10 + 2 * entry] = pair;
        }
        bytes[18] = 4; // max_tx_vq
        bytes[20] = 40; // hash_key_length
        bytes[21..].fill(0x6d);
        let Ok(Request::Rss(rss)) = parse(&bytes) else {
            panic!("{:?}", parse(&bytes));
        };
        assert_eq!((rss.hash_types.bits(), rss.unclassified, rss.max_tx_vq), (0x3f, 2, 4));
        assert!(rss.table().eq([3, 1, 2, 0]));
        assert_eq!(rss.key(), [0x6d; 40]);
        for (at, wrong) in [(6, 2), (7, 1), (8, 4), (10, 4), (18, 5), (18, 0), (20, 41), (3, 1)] {
            let mut bytes = bytes;
            bytes[at] = wrong;
            assert!(parse(&bytes).is_err(), "{wrong} at {at}");
        }
        let mut bytes = [0u8; 2 + 4 + 8 + 1 + 40];
        bytes[..3].copy_from_slice(&[4, 2, 0x09]);
        bytes[14] = 40;
        let Ok(Request::Hash(hash)) = parse(&bytes) else {
            panic!("{:?}", parse(&bytes));
        };
        assert_eq!(
            (hash.hash_types, hash.key),
            (HashTypes::IPV4 | HashTypes::IPV6, &[0; 40][..])
        );
    }

    #[test]
    fn every_refusal_is_an_error_to_the_driver() {
        assert_eq!(parse(&[]), Err(Refused::Short));
        assert_eq!(parse(&[3]), Err(Refused::Short));
        assert_eq!(parse(&[9, 0]), Err(Refused::Unknown));
        assert_eq!(parse(&[6, 0, 0, 0, 0, 0, 0, 0, 0, 0]), Err(Refused::Unknown));
        assert_eq!(
            Request::parse(&[3, 0], Features::NET_GUEST_ANNOUNCE, &config()),
            Err(Refused::NotNegotiated)
        );
        assert_eq!(Refused::Value.ack(), Ack::ERR);
    }

    fn some_bytes() -> impl Strategy<Value = [u8; 2]> {
        (0..10u8, 0..7u8).prop_map(|(class, command)| [class, command])
    }

    proptest! {
        /// Whatever the driver writes: what is accepted is inside the device's limits, and says so only of all bytes.
        #[test]
        fn any_bytes(head in some_bytes(), small in any::<bool>(), mut data in prop::collection::vec(any::<u8>(), 0..200)) {
            if small {
                data.iter_mut().for_each(|byte| *byte &= 3);
            }
            let bytes = [&head[..], &data].concat();
            if let Ok(request) = parse(&bytes) {
                match request {
                    Request::VlanAdd(id) | Request::VlanDel(id) => prop_assert!(id < VLANS),
                    Request::QueuePairs(n) => prop_assert!((1..=4).contains(&n)),
                    Request::MacAddr(mac) => prop_assert_eq!(mac[0] & 1, 0),
                    Request::MacTable { unicast, multicast } => {
                        prop_assert_eq!(bytes.len(), 10 + 6 * (unicast.len() + multicast.len()));
                    }
                    Request::Rss(rss) => {
                        prop_assert!(rss.table().len().is_power_of_two() && rss.table().len() <= 128);
                        prop_assert!(rss.table().all(|pair| pair < 4) && rss.key().len() <= 40);
                    }
                    Request::Hash(hash) => prop_assert!(hash.key.len() <= 40 && hash.hash_types.bits() <= 0x3f),
                    Request::GuestOffloads(offloads) => prop_assert!(GUEST_OFFLOADS.contains(offloads)),
                    Request::RxMode(..) | Request::AnnounceAck => {}
                }
                // One byte less, or one more, is another command or none.
                prop_assert_ne!(parse(&bytes[..bytes.len() - 1]), Ok(request));
                let longer = [&bytes[..], &[0]].concat();
                prop_assert_eq!(parse(&longer), Err(Refused::Length));
            }
            prop_assert!(Request::parse(&bytes, Features::empty(), &config()).is_err());
        }
    }
}
