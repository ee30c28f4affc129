//! The network device that the front-end of a `vhost` port sees: its configuration space, and what it was told over the
//! control queue.

use std::sync::Arc;

use virtio_ring::Features;
use virtio_ring::net::{Ack, Config, Duplex, HashTypes, Request, RssConfig, SPEED_UNKNOWN, Status};

use crate::filter::Filter;
use crate::offload::hash::{Indirection, KEY, KEY_LEN};
use crate::offload::{Hasher, Steering};
use crate::spec::PortSpec;

/// Bytes of a configuration space that a front-end may ask for; behind the last field they are 0.
const SPACE: usize = 256;

/// What can be hashed: all that the specification has.
const HASH_TYPES: HashTypes = HashTypes::from_bits_truncate(0x1ff);

/// The device.
pub(super) struct Net {
    features: Features,
    config: Config,
    /// The configuration space as it is shown.
    space: [u8; SPACE],
    filter: Filter,
    /// Queue pairs that the driver uses, where it says so.
    active: u16,
    types: HashTypes,
    key: [u8; KEY_LEN],
    hasher: Option<Arc<Hasher>>,
    steering: Option<Arc<Steering>>,
    offloads: Features,
}

impl Net {
    /// The device of a port with this spec and address, not negotiated.
    pub(super) fn new(spec: &PortSpec, mac: [u8; 6]) -> Self {
        let mut config = Config {
            mac,
            max_virtqueue_pairs: spec.queues,
            mtu: spec.mtu,
            ..Config::default()
        };
        (config.speed, config.duplex) = match spec.speed {
            0 => (SPEED_UNKNOWN, Duplex::UNKNOWN),
            speed => (speed, Duplex::FULL),
        };
        if spec.rss {
            config.rss_max_key_size = KEY_LEN as u8;
            config.rss_max_indirection_table_length = Indirection::MAX as u16;
            config.supported_hash_types = HASH_TYPES;
        }
        let mut net = Net {
            features: Features::empty(),
            config,
            space: [0; SPACE],
            filter: Filter::new(mac),
            active: 1,
            types: HashTypes::empty(),
            key: KEY,
            hasher: None,
            steering: None,
            offloads: Features::empty(),
        };
        net.show();
        net
    }

    /// The features that come with a configuration space and a control queue.
    pub(super) fn offer(spec: &PortSpec) -> Features {
        let mut features = Features::NET_MAC
            | Features::NET_STATUS
            | Features::NET_SPEED_DUPLEX
            | Features::NET_CTRL_VQ
            | Features::NET_CTRL_RX
            | Features::NET_CTRL_RX_EXTRA
            | Features::NET_CTRL_VLAN
            | Features::NET_CTRL_MAC_ADDR
            | Features::NET_GUEST_ANNOUNCE;
        let guest = spec.offloads().contains(Features::NET_GUEST_CSUM);
        features.set(Features::NET_CTRL_GUEST_OFFLOADS, guest);
        features.set(Features::NET_HASH_REPORT, spec.rss);
        features.set(Features::NET_RSS, spec.rss && spec.queues > 1);
        features
    }

    /// Begins anew with the features of a driver (virtio 1.3, 5.1.5), at the address that the port has.
    pub(super) fn reset(&mut self, features: Features, mac: [u8; 6]) {
        self.features = features;
        self.config.mac = mac;
        self.config.status.remove(Status::ANNOUNCE);
        self.filter = Filter::new(mac);
        let control = features.contains(Features::NET_CTRL_VQ);
        self.filter
            .set_vlan_filter(control && features.contains(Features::NET_CTRL_VLAN));
        self.active = 1;
        self.types = HashTypes::empty();
        self.key = KEY;
        self.hasher = None;
        self.steering = None;
        self.offloads = features;
        self.show();
    }

    /// The virtqueue of the control queue (5.1.2), if there is one.
    pub(super) fn control_index(&self) -> Option<usize> {
        let scaled = self.features.intersects(Features::NET_MQ | Features::NET_RSS);
        let pairs = if scaled { self.config.max_virtqueue_pairs } else { 1 };
        self.features
            .contains(Features::NET_CTRL_VQ)
            .then_some(2 * usize::from(pairs))
    }

    /// Queue pairs that a driver with a control queue uses.
    pub(super) fn active(&self) -> u16 {
        self.active
    }

    /// What the driver lets in; `None`: everything.
    pub(super) fn admits(&self) -> Option<Box<Filter>> {
        self.filter.is_active().then(|| Box::new(self.filter.clone()))
    }

    /// What to report with each packet.
    pub(super) fn hasher(&self) -> Option<Arc<Hasher>> {
        let report = self.features.contains(Features::NET_HASH_REPORT);
        self.hasher.clone().filter(|_| report)
    }

    /// How packets are spread over the queue pairs, if the driver said so.
    pub(super) fn steering(&self) -> Option<Arc<Steering>> {
        self.steering.clone()
    }

    /// The features, less the receive offloads that the driver turned off.
    pub(super) fn offloads(&self) -> Features {
        self.features & (self.offloads | !virtio_ring::net::GUEST_OFFLOADS)
    }

    /// A piece of the configuration space, if there is such a one.
    pub(super) fn piece(&self, offset: u32, size: u32) -> Option<&[u8]> {
        self.space.get(offset as usize..)?.get(..size as usize)
    }

    /// Says whether the link is up; whether that is news, and the driver reads it.
    pub(super) fn set_link(&mut self, up: bool) -> bool {
        let news = self.config.status.contains(Status::LINK_UP) != up;
        self.config.status.set(Status::LINK_UP, up);
        self.show();
        news && self.features.contains(Features::NET_STATUS)
    }

    /// Asks the driver to tell the network where it is; whether it can (5.1.6.5.4).
    pub(super) fn ask_announce(&mut self) -> bool {
        let can = self
            .features
            .contains(Features::NET_STATUS | Features::NET_GUEST_ANNOUNCE | Features::NET_CTRL_VQ);
        self.config.status.set(Status::ANNOUNCE, can);
        self.show();
        can
    }

    /// Does what the driver's command says. `true`: something changed.
    pub(super) fn obey(&mut self, bytes: &[u8]) -> (Ack, bool) {
        let request = match Request::parse(bytes, self.features, &self.config) {
            Ok(request) => request,
            Err(refused) => {
                tracing::debug!("{refused}: {:02x?}", &bytes[..bytes.len().min(16)]);
                return (refused.ack(), false);
            }
        };
        match request {
            Request::AnnounceAck => self.config.status.remove(Status::ANNOUNCE),
            Request::QueuePairs(pairs) => {
                // Automatic steering from now on (5.1.6.5.5).
                self.active = pairs;
                self.steering = None;
            }
            Request::Rss(rss) => return (self.scale(rss), true),
            Request::Hash(hash) => {
                self.set_key(hash.key);
                self.types = hash.hash_types;
                self.make_hasher();
            }
            Request::GuestOffloads(offloads) => self.offloads = offloads,
            request => {
                if let Request::MacAddr(mac) = request {
                    self.config.mac = mac;
                }
                let ack = self.filter.apply(&request);
                self.show();
                return (ack, ack == Ack::OK);
            }
        }
        self.show();
        (Ack::OK, true)
    }

    fn scale(&mut self, rss: RssConfig<'_>) -> Ack {
        // Not larger than the table: the request was checked against what the configuration says.
        let Some(table) = Indirection::new(rss.table(), rss.unclassified) else {
            return Ack::ERR;
        };
        self.set_key(rss.key());
        self.types = rss.hash_types;
        self.make_hasher();
        let last = rss.table().max().unwrap_or(0).max(rss.unclassified);
        self.active = rss.max_tx_vq.max(last + 1);
        let hasher = Hasher::new(&self.key, self.types);
        self.steering = Some(Arc::new(Steering::new(hasher, table)));
        Ack::OK
    }

    /// A new key; an empty one is none. What a short one leaves is 0.
    fn set_key(&mut self, key: &[u8]) {
        if !key.is_empty() {
            let n = key.len().min(KEY_LEN);
            self.key = [0; KEY_LEN];
            self.key[..n].copy_from_slice(&key[..n]);
        }
    }

    fn make_hasher(&mut self) {
        self.hasher = (!self.types.is_empty()).then(|| Arc::new(Hasher::new(&self.key, self.types)));
    }

    fn show(&mut self) {
        self.space[..Config::LEN].copy_from_slice(&self.config.to_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

    fn device(keys: &str, without: Features) -> Net {
        let spec: PortSpec = format!("vhost,path=/s,{keys}").parse().unwrap();
        let mut net = Net::new(&spec, MAC);
        let all = Net::offer(&spec) | spec.offloads() | Features::NET_MQ | Features::NET_MTU | Features::VERSION_1;
        net.reset(all.difference(without), MAC);
        net
    }

    #[test]
    fn the_configuration_space() {
        let net = device("queues=4,mtu=9000,speed=10000,rss=1", Features::empty());
        let expected = [
            2, 0, 0, 0, 0, 9, // mac
            1, 0, // status: LINK_UP
            4, 0, // max_virtqueue_pairs
            0x28, 0x23, // mtu 9000
            0x10, 0x27, 0, 0, 1, // speed 10000, full duplex
            40, 128, 0, // longest key and table
            0xff, 1, 0, 0, // hash types
        ];
        assert_eq!(net.piece(0, 24), Some(&expected[..]));
        assert_eq!(net.piece(6, 2), Some(&[1, 0][..]));
        assert_eq!(net.piece(0, 256).map(|bytes| &bytes[24..]), Some(&[0; 232][..]));
        assert_eq!(net.piece(250, 7), None);
        assert_eq!(net.piece(257, 0), None);
        assert_eq!(net.piece(u32::MAX, u32::MAX), None);
        let plain = device("queues=1", Features::empty());
        let unknown = [0xff; 5];
        assert_eq!(plain.piece(12, 12), Some(&[&unknown[..], &[0; 7]].concat()[..]));
    }

    #[test]
    fn where_the_control_queue_is() {
        let all = Features::empty();
        let (mq, rss, control) = (Features::NET_MQ, Features::NET_RSS, Features::NET_CTRL_VQ);
        for (keys, without, expected) in [
            ("queues=4,rss=1", all, Some(8)),
            ("queues=4,rss=1", mq, Some(8)),
            ("queues=4,rss=1", rss, Some(8)),
            ("queues=4,rss=1", mq | rss, Some(2)),
            ("queues=4,rss=1", control, None),
        ] {
            assert_eq!(device(keys, without).control_index(), expected);
        }
    }

    #[test]
    fn what_commands_change() {
        let mut net = device("queues=4,rss=1", Features::empty());
        assert!(net.admits().is_none());
        // Promiscuous mode off: the filter is on, with the VLANs that were listed.
        assert_eq!(net.obey(&[0, 0, 0]), (Ack::OK, true));
        let filter = net.admits().unwrap();
        assert!(filter.vlan_filter() && filter.accepts(&[&MAC[..], &[0; 10]].concat()));
        assert_eq!(net.obey(&[1, 1, 2, 0, 0, 0, 0, 7]), (Ack::OK, true));
        assert_eq!(net.piece(0, 6), Some(&[2, 0, 0, 0, 0, 7][..]));
        assert_eq!(net.obey(&[1, 1, 1, 0, 0, 0, 0, 7]), (Ack::ERR, false));
        assert_eq!(net.obey(&[4, 0, 3, 0]), (Ack::OK, true));
        assert_eq!(net.active(), 3);
        assert_eq!(net.obey(&[4, 0, 5, 0]), (Ack::ERR, false));
        assert_eq!(net.obey(&[]), (Ack::ERR, false));
        let tso4 = Features::NET_GUEST_TSO4;
        assert!(net.offloads().contains(tso4));
        assert_eq!(net.obey(&[5, 0, 2, 0, 0, 0, 0, 0, 0, 0]), (Ack::OK, true));
        assert!(!net.offloads().contains(tso4) && net.offloads().contains(Features::NET_HOST_TSO4));
        // All of it is gone with the next driver.
        net.reset(net.features, MAC);
        assert!(net.admits().is_none() && net.active() == 1 && net.offloads().contains(tso4));
        assert_eq!(net.piece(0, 6), Some(&MAC[..]));
    }

    #[test]
    fn scaling_and_reports() {
        let mut net = device("queues=4,rss=1", Features::empty());
        let mut command = vec![4, 1, 0x3f, 0, 0, 0, 1, 0, 0, 0, 2, 0, 1, 0, 4, 0, 40];
        command.extend([7; 40]);
        assert!(net.hasher().is_none() && net.steering().is_none());
        assert_eq!(net.obey(&command), (Ack::OK, true));
        assert!(net.hasher().is_some() && net.steering().is_some());
        assert_eq!((net.active(), net.key), (4, [7; 40]));
        // A pair that is not there.
        command[12] = 4;
        assert_eq!(net.obey(&command), (Ack::ERR, false));
        assert_eq!(net.obey(&[4, 0, 2, 0]), (Ack::OK, true));
        assert!(net.steering().is_none() && net.hasher().is_some());
        // Nothing to hash: no report.
        assert_eq!(
            net.obey(&[4, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            (Ack::OK, true)
        );
        assert!(net.hasher().is_none());
        let mut silent = device("queues=4,rss=1", Features::NET_HASH_REPORT);
        command[12] = 1;
        assert_eq!(silent.obey(&command), (Ack::OK, true));
        assert!(silent.hasher().is_none() && silent.steering().is_some());
    }

    #[test]
    fn link_and_announcement() {
        let mut net = device("queues=1", Features::empty());
        assert!(!net.set_link(true) && net.set_link(false) && !net.set_link(false));
        assert_eq!(net.piece(6, 2), Some(&[0, 0][..]));
        assert!(net.set_link(true) && net.ask_announce());
        assert_eq!(net.piece(6, 2), Some(&[3, 0][..]));
        assert_eq!(net.obey(&[3, 0]), (Ack::OK, true));
        assert_eq!(net.piece(6, 2), Some(&[1, 0][..]));
        let mut deaf = device("queues=1", Features::NET_STATUS);
        assert!(!deaf.set_link(false) && !deaf.ask_announce());
    }
}
