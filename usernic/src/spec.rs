//! Port specs: a kind, then `key=value` pairs, as DPDK's devargs are typed.
//!
//! ```
//! use usernic::spec::{PortSpec, Kind};
//!
//! let spec: PortSpec = "virtio-user,path=/run/vhost.sock,queues=2,queue_size=512".parse()?;
//! assert_eq!(spec.kind, Kind::VirtioUser);
//! assert_eq!(spec.queues, 2);
//! assert!("virtio-user,path=/run/vhost.sock,queue=2".parse::<PortSpec>().is_err());
//! # Ok::<(), usernic::spec::SpecError>(())
//! ```
//!
//! `auto` stands for the port that an orchestrator gave this container: see [`auto`].
//!
//! | key | kind | default | meaning |
//! |---|---|---|---|
//! | `path` (or `iface` for `vhost`, as net_vhost has it) | both | | the vhost-user socket |
//! | `server` | virtio-user | 0 | 1: listen on `path` and wait for the back-end |
//! | `client` | vhost | 0 | 1: connect to `path`, where the front-end listens |
//! | `socket_mode` | both, where it listens | what the umask leaves | permissions of the socket file, in octal: `0660` |
//! | `socket_owner` | both, where it listens | this process's | user and group of the socket file, by number: `1000:1000`, `1000`, `:1000` |
//! | `queues` | both | 1 | queue pairs, 1 to 128; for `vhost` the most that are offered |
//! | `queue_size` | virtio-user | 256 | descriptors of each ring, 2 to 32768; of a split ring a power of two |
//! | `mac` | both | random, locally administered | the port's address |
//! | `mtu` | both | 1500 | 68 to 9710 (a frame of 9728 with VLAN tag and without FCS) |
//! | `mrg_rxbuf` | virtio-user | 1 if a frame of `mtu` does not fit `buffer_size` | 1: a received frame may take several buffers |
//! | `in_order` | both | 1 | buffers are used in the order in which they were made available |
//! | `event_idx` | both | 0 for virtio-user, 1 for vhost | suppress notifications by index; pays for ports that sleep |
//! | `indirect` | both | 1 | indirect descriptors |
//! | `packed_vq` | both | 0 for virtio-user, 1 for vhost | virtio-user: 1 for packed rings, which the back-end must offer. vhost: 1 offers them |
//! | `vectorized` | vhost | 1 | 0: no vector instructions (AVX-512 or AVX2, where the processor has them) |
//! | `csum` | both | 0 for virtio-user, 1 for vhost | the back-end completes checksums of what the front-end sends, and the front-end takes frames with verified or open checksums |
//! | `tso` | both | 0 for virtio-user, 1 for vhost | the back-end takes TCP and UDP packets of up to 64 KiB that are to be cut (TSO, USO); 1 implies `csum=1` |
//! | `lro` | both | 0 for virtio-user, 1 for vhost | the front-end takes such packets; 1 implies `csum=1` and, where it is not given, `mrg_rxbuf=1` |
//! | `rss` | both | 0 | receive-side scaling and hash reports. vhost: 1 offers them, to front-ends whose control queue and configuration space are this port's: ours, or QEMU's generic vhost-user device. virtio-user: 1 asks for them; the queues get the frames by the hash, and [`Packet::received_hash`](crate::Packet::received_hash) has it |
//! | `speed` | both | 0 | link speed to report, in Mb/s; 0 says unknown |
//! | `buffers` | both | what the rings need | packet buffers of the port |
//! | `buffer_size` | both | 2048 | bytes of a frame that one buffer holds: 1024 to 16384 |
//! | `mem` | virtio-user | what rings and buffers need | size of the port's one segment: `4M`, `2097152` |
//! | `memory` | virtio-user | auto | `auto`, `hugetlbfs`, `memfd-huge` or `memfd` |
//! | `huge_dir` | virtio-user | first that fits | the hugetlbfs mount to use |
//! | `numa` | virtio-user | any | the node that the segment comes from |
//! | `cpus` | both | those of the thread | one CPU for each queue pair: `2-3+6`. Must be among those that the process may use; without `numa=` the memory comes from their node |
//! | `timeout` | both | 5000 | milliseconds for each answer of the other side |
//! | `reconnect` | virtio-user | 1 | 0: a lost back-end is not looked for again |
//!
//! A `vf` port drives a virtual function of an 82599, X540 or X550 that is bound to vfio-pci. Of the keys above it has `mac`,
//! `mtu`, `buffers`, `mem`, `memory`, `huge_dir`, `numa`, `timeout`; and:
//!
//! | key | default | meaning |
//! |---|---|---|
//! | `pci` | the one device that this container was given | the function's address, as `0000:81:10.0` |
//! | `queues` | 1 | queue pairs: 1, 2, 4 or 8, as many as the PF gives |
//! | `queue_size` | 512 | descriptors of each ring, 64 to 8192, a multiple of 8 |
//! | `mac` | the PF's, else a random one | the port's address |
//! | `buffer_size` | 2048 | bytes of a frame that one buffer holds: whole KiB up to 16384 |
//! | `vlan` | none | VLANs to receive, as `100` or `100+200`; tags stay in the frames |
//! | `vlan_strip` | 0 | 1: tags are taken out of the frames: [`Packet::vlan_tag`](crate::Packet::vlan_tag) |
//! | `csum`, `tso` | 1 | 0: checksums are made, and packets cut, in software |
//! | `moderation` | 20 | microseconds from one interrupt of a vector to the next, at least; 0 to 1046 |
//! | `interface` | auto | `container`, `iommufd`, or `auto` for the one that the kernel has |
//! | `noiommu` | 0 | 1: without an IOMMU, which gives this process all memory of the machine |

use std::path::PathBuf;
use std::str::FromStr;

use virtio_ring::Features;

use crate::auto::{self, AutoError, Surroundings};
use crate::pci::Address;
use crate::vfio::Interface;
use crate::vhost_user::SocketAccess;

/// What a back-end does with packets that it is sent, all of which needs NET_CSUM (virtio 1.3, 5.1.3.1).
pub(crate) const HOST_OFFLOADS: Features = Features::NET_HOST_TSO4
    .union(Features::NET_HOST_TSO6)
    .union(Features::NET_HOST_ECN)
    .union(Features::NET_HOST_USO);

/// What a front-end takes, all of which needs NET_GUEST_CSUM.
pub(crate) const GUEST_OFFLOADS: Features = Features::NET_GUEST_TSO4
    .union(Features::NET_GUEST_TSO6)
    .union(Features::NET_GUEST_ECN)
    .union(Features::NET_GUEST_USO4)
    .union(Features::NET_GUEST_USO6);

/// What is on the other side of the port, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The front-end of a vhost-user socket: our rings, a switch on the other side.
    VirtioUser,
    /// The back-end of a vhost-user socket: the other side's rings.
    Vhost,
    /// A virtual function of a network card, through VFIO.
    Vf,
}

impl Kind {
    const ALL: [(&'static str, Kind); 5] = [
        ("virtio-user", Kind::VirtioUser),
        ("virtio_user", Kind::VirtioUser),
        ("vhost", Kind::Vhost),
        ("net_vhost", Kind::Vhost),
        ("vf", Kind::Vf),
    ];

    /// The name that specs use.
    pub fn name(self) -> &'static str {
        match self {
            Kind::VirtioUser => "virtio-user",
            Kind::Vhost => "vhost",
            Kind::Vf => "vf",
        }
    }

    fn keys(self) -> &'static [&'static str] {
        match self {
            Kind::VirtioUser => &[
                "path",
                "server",
                "socket_mode",
                "socket_owner",
                "queues",
                "queue_size",
                "mac",
                "mtu",
                "mrg_rxbuf",
                "in_order",
                "event_idx",
                "indirect",
                "packed_vq",
                "csum",
                "tso",
                "lro",
                "rss",
                "speed",
                "buffers",
                "buffer_size",
                "mem",
                "memory",
                "huge_dir",
                "numa",
                "cpus",
                "timeout",
                "reconnect",
            ],
            Kind::Vhost => &[
                "path",
                "iface",
                "client",
                "socket_mode",
                "socket_owner",
                "queues",
                "mac",
                "mtu",
                "packed_vq",
                "in_order",
                "event_idx",
                "indirect",
                "vectorized",
                "csum",
                "tso",
                "lro",
                "rss",
                "speed",
                "buffers",
                "buffer_size",
                "cpus",
                "timeout",
            ],
            Kind::Vf => &[
                "pci",
                "queues",
                "queue_size",
                "mac",
                "mtu",
                "vlan",
                "vlan_strip",
                "csum",
                "tso",
                "moderation",
                "buffers",
                "buffer_size",
                "mem",
                "memory",
                "huge_dir",
                "numa",
                "timeout",
                "interface",
                "noiommu",
            ],
        }
    }
}

/// Where a port's segment comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MemoryKind {
    /// Huge pages where there are enough, plain pages otherwise.
    #[default]
    Auto,
    /// A file in a hugetlbfs mount, or an error.
    Hugetlbfs,
    /// A memfd with huge pages, or an error.
    MemfdHuge,
    /// A memfd with plain pages.
    Memfd,
}

/// A parsed port spec. The fields are the keys of the module's table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortSpec {
    /// The kind.
    pub kind: Kind,
    /// The vhost-user socket.
    pub path: PathBuf,
    /// Listen on `path` (a front-end) or connect to it (a back-end), the reverse of what its kind does by itself.
    pub reversed: bool,
    /// Who may connect, where the port listens.
    pub access: SocketAccess,
    /// Queue pairs.
    pub queues: u16,
    /// Descriptors of each ring.
    pub queue_size: u16,
    /// The port's address; `None`: a random one.
    pub mac: Option<[u8; 6]>,
    /// The largest packet without its Ethernet header, in bytes.
    pub mtu: u16,
    /// Ask for VIRTIO_NET_F_MRG_RXBUF; `None`: if a frame of `mtu` does not fit `buffer_size`.
    pub mrg_rxbuf: Option<bool>,
    /// Packed rings: to insist on, or (`vhost`) to offer.
    pub packed: bool,
    /// Offer VIRTIO_F_IN_ORDER.
    pub in_order: bool,
    /// Offer VIRTIO_F_EVENT_IDX.
    pub event_idx: bool,
    /// Offer VIRTIO_F_INDIRECT_DESC.
    pub indirect: bool,
    /// Use vector instructions where the processor has them.
    pub vectorized: bool,
    /// Checksums may be left open, either way; `None`: for `vhost`, and where `tso` or `lro` need it.
    pub csum: Option<bool>,
    /// The back-end takes packets that are to be cut.
    pub tso: bool,
    /// The front-end takes packets that are to be cut, or were joined.
    pub lro: bool,
    /// Offer VIRTIO_NET_F_RSS and VIRTIO_NET_F_HASH_REPORT, or ask for them.
    pub rss: bool,
    /// Link speed to report in Mb/s, 0 when unknown.
    pub speed: u32,
    /// Packet buffers; `None`: what the rings need.
    pub buffers: Option<u32>,
    /// Bytes of a frame that one buffer holds.
    pub buffer_size: u32,
    /// Bytes of the segment; `None`: what rings and buffers need.
    pub mem: Option<usize>,
    /// Where the segment comes from.
    pub memory: MemoryKind,
    /// The hugetlbfs mount to use.
    pub huge_dir: Option<PathBuf>,
    /// The NUMA node of the segment.
    pub numa: Option<u32>,
    /// The CPU of each queue pair's thread; empty: whatever the threads find.
    pub cpus: Vec<u32>,
    /// Milliseconds for each answer of the other side.
    pub timeout_ms: u32,
    /// Look for a lost back-end again.
    pub reconnect: bool,
    /// The virtual function; `None`: the one that this container was given.
    pub pci: Option<Address>,
    /// VLANs that a virtual function receives.
    pub vlans: Vec<u16>,
    /// Tags are taken out of what a virtual function receives.
    pub vlan_strip: bool,
    /// Microseconds from one interrupt to the next, at least.
    pub moderation: u16,
    /// How the kernel is asked for a virtual function.
    pub interface: Interface,
    /// A virtual function without an IOMMU will do.
    pub noiommu: bool,
}

/// Why a text is no port spec. Each message says what to write instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// The text before the first comma is no kind.
    #[error(
        "unknown port kind {found:?}: write virtio-user (front-end), vhost (back-end), vf (virtual function) or auto{hint}"
    )]
    Kind {
        /// What was written.
        found: String,
        /// The nearest kind, as a phrase, or nothing.
        hint: String,
    },
    /// There is no port that `auto` stands for.
    #[error("auto: {0}")]
    Auto(#[from] AutoError),
    /// A key that this kind does not have.
    #[error("unknown key {key:?} for a {kind} port{hint}; its keys are {keys}")]
    Key {
        /// What was written.
        key: String,
        /// The kind of port.
        kind: &'static str,
        /// The nearest key, as a phrase, or nothing.
        hint: String,
        /// All keys of the kind.
        keys: String,
    },
    /// A key without a value.
    #[error("key {key:?} has no value: write {key}=VALUE")]
    Missing {
        /// The key.
        key: String,
    },
    /// A key that stands twice.
    #[error("key {key:?} is given twice")]
    Twice {
        /// The key.
        key: String,
    },
    /// A key that must be there and is not.
    #[error("a {kind} port needs {key}=: {example}")]
    Required {
        /// The kind of port.
        kind: &'static str,
        /// The key.
        key: &'static str,
        /// A spec that has it.
        example: &'static str,
    },
    /// A value that the key does not take.
    #[error("{key}={value}: {expected}")]
    Value {
        /// The key.
        key: String,
        /// What was written.
        value: String,
        /// What it takes.
        expected: String,
    },
}

impl PortSpec {
    /// A front-end port on the socket at `path`, all else as by default.
    pub fn virtio_user(path: impl Into<PathBuf>) -> Self {
        Self::new(Kind::VirtioUser, path.into())
    }

    /// A back-end port on the socket at `path`, all else as by default.
    pub fn vhost(path: impl Into<PathBuf>) -> Self {
        Self::new(Kind::Vhost, path.into())
    }

    /// A port on the virtual function at `pci`, all else as by default.
    pub fn vf(pci: Address) -> Self {
        PortSpec {
            pci: Some(pci),
            ..Self::new(Kind::Vf, PathBuf::new())
        }
    }

    fn new(kind: Kind, path: PathBuf) -> Self {
        PortSpec {
            kind,
            path,
            reversed: false,
            access: SocketAccess::default(),
            queues: 1,
            queue_size: if kind == Kind::Vf { 512 } else { 256 },
            mac: None,
            mtu: 1500,
            mrg_rxbuf: None,
            packed: kind == Kind::Vhost,
            in_order: true,
            event_idx: kind == Kind::Vhost,
            indirect: true,
            vectorized: true,
            csum: None,
            tso: kind != Kind::VirtioUser,
            lro: kind == Kind::Vhost,
            rss: false,
            speed: 0,
            buffers: None,
            buffer_size: 2048,
            mem: None,
            memory: MemoryKind::Auto,
            huge_dir: None,
            numa: None,
            cpus: Vec::new(),
            timeout_ms: 5000,
            reconnect: true,
            pci: None,
            vlans: Vec::new(),
            vlan_strip: false,
            moderation: 20,
            interface: Interface::Auto,
            noiommu: false,
        }
    }

    /// Whether to ask for VIRTIO_NET_F_MRG_RXBUF.
    ///
    /// Mergeable buffers cost a look at the header of each frame, which the other side has just written. So they are
    /// asked for only where they are needed.
    pub fn mergeable(&self) -> bool {
        // A frame is longer than the MTU by the Ethernet header and a VLAN tag.
        self.mrg_rxbuf
            .unwrap_or(u32::from(self.mtu) + 18 > self.buffer_size || self.lro)
    }

    /// The features of checksums and segmentation to offer, or to ask for.
    ///
    /// A front-end asks for none by itself: each of them has one side look at the header of every frame, which the other
    /// side has just written. What an application asks for is done in software then.
    pub fn offloads(&self) -> Features {
        let csum = self
            .csum
            .unwrap_or(self.kind != Kind::VirtioUser || self.tso || self.lro);
        let mut features = Features::empty();
        features.set(Features::NET_CSUM | Features::NET_GUEST_CSUM, csum);
        features.set(HOST_OFFLOADS, csum && self.tso);
        features.set(GUEST_OFFLOADS, csum && self.lro);
        features
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), SpecError> {
        match key {
            "path" | "iface" => self.path = PathBuf::from(value),
            "server" | "client" => self.reversed = flag(key, value)?,
            "socket_mode" => self.access.mode = Some(mode(key, value)?),
            "socket_owner" => (self.access.user, self.access.group) = owner(key, value)?,
            "queues" => self.queues = number(key, value, QUEUES)?,
            "queue_size" => self.queue_size = number(key, value, QUEUE_SIZE)?,
            "mac" => self.mac = Some(mac(key, value)?),
            "mtu" => self.mtu = number(key, value, MTU)?,
            "mrg_rxbuf" => self.mrg_rxbuf = Some(flag(key, value)?),
            "in_order" => self.in_order = flag(key, value)?,
            "event_idx" => self.event_idx = flag(key, value)?,
            "indirect" => self.indirect = flag(key, value)?,
            "packed_vq" => self.packed = flag(key, value)?,
            "vectorized" => self.vectorized = flag(key, value)?,
            "csum" => self.csum = Some(flag(key, value)?),
            "tso" => self.tso = flag(key, value)?,
            "lro" => self.lro = flag(key, value)?,
            "rss" => self.rss = flag(key, value)?,
            "speed" => self.speed = speed(key, value)?,
            "buffers" => self.buffers = Some(number(key, value, BUFFERS)?),
            "buffer_size" => self.buffer_size = number(key, value, BUFFER_SIZE)?,
            "mem" => self.mem = Some(size(key, value)?),
            "memory" => {
                self.memory = match value {
                    "auto" => MemoryKind::Auto,
                    "hugetlbfs" => MemoryKind::Hugetlbfs,
                    "memfd-huge" => MemoryKind::MemfdHuge,
                    "memfd" => MemoryKind::Memfd,
                    _ => return Err(bad(key, value, "write auto, hugetlbfs, memfd-huge or memfd")),
                }
            }
            "huge_dir" => self.huge_dir = Some(PathBuf::from(value)),
            "numa" => self.numa = Some(number(key, value, NODE)?),
            "cpus" => self.cpus = cpus(key, value)?,
            "timeout" => self.timeout_ms = number(key, value, TIMEOUT)?,
            "reconnect" => self.reconnect = flag(key, value)?,
            "pci" => {
                let address = value.parse::<Address>();
                self.pci = Some(address.map_err(|e| bad(key, value, e.to_string()))?);
            }
            "vlan" => {
                let ids = value.split('+').map(|id| number(key, id.trim(), VLAN));
                self.vlans = ids.collect::<Result<_, _>>()?;
            }
            "vlan_strip" => self.vlan_strip = flag(key, value)?,
            "moderation" => self.moderation = number(key, value, MODERATION)?,
            "interface" => {
                self.interface = match value {
                    "auto" => Interface::Auto,
                    "container" => Interface::Container,
                    "iommufd" => Interface::Iommufd,
                    _ => return Err(bad(key, value, "write auto, container or iommufd")),
                }
            }
            "noiommu" => self.noiommu = flag(key, value)?,
            _ => unreachable!("keys() lists a key that set() does not know: {key}"),
        }
        Ok(())
    }
}

impl PortSpec {
    /// Whether a port can be opened with these values: also for specs that a program put together field by field.
    ///
    /// # Errors
    /// [`SpecError::Value`] or [`SpecError::Required`] for the first that cannot be.
    pub fn check(&self) -> Result<(), SpecError> {
        let kind = self.kind;
        within("queues", self.queues, QUEUES)?;
        if kind != Kind::Vhost {
            within("queue_size", self.queue_size, QUEUE_SIZE)?;
        }
        within("mtu", self.mtu, MTU)?;
        within("buffer_size", self.buffer_size, BUFFER_SIZE)?;
        within("timeout", self.timeout_ms, TIMEOUT)?;
        within("moderation", self.moderation, MODERATION)?;
        for &id in &self.vlans {
            within("vlan", id, VLAN)?;
        }
        if let Some(buffers) = self.buffers {
            within("buffers", buffers, BUFFERS)?;
        }
        if let Some(node) = self.numa {
            within("numa", node, NODE)?;
        }
        speed("speed", &self.speed.to_string())?;
        if let Some(bytes) = self.mem {
            size("mem", &bytes.to_string())?;
        }
        if let Some(address) = self.mac {
            let [a, b, c, d, e, f] = address;
            let text = format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
            own_address("mac", &text, address)?;
        }
        if let Some(bits) = self.access.mode {
            mode("socket_mode", &format!("{bits:o}"))?;
        }
        let ids = [self.access.user, self.access.group];
        if ids.contains(&Some(u32::MAX)) {
            return Err(bad(
                "socket_owner",
                &u32::MAX.to_string(),
                "that number means nobody to chown(2)",
            ));
        }
        if kind == Kind::VirtioUser && !self.packed && !self.queue_size.is_power_of_two() {
            return Err(bad(
                "queue_size",
                &self.queue_size.to_string(),
                "a split ring has a power of two of descriptors, 2 to 32768 (virtio 1.3, 2.7); with packed_vq=1 any number",
            ));
        }
        if kind == Kind::VirtioUser {
            for (key, on) in [("tso", self.tso), ("lro", self.lro)] {
                if on && self.csum == Some(false) {
                    return Err(bad(
                        key,
                        "1",
                        "a packet that is cut has a new checksum: leave csum=0 out",
                    ));
                }
            }
            if self.lro && self.mrg_rxbuf == Some(false) {
                return Err(bad(
                    "lro",
                    "1",
                    "packets of up to 64 KiB take several buffers: leave mrg_rxbuf=0 out",
                ));
            }
        }
        if !self.cpus.is_empty() && self.cpus.len() != usize::from(self.queues) {
            let list = self.cpus.len().to_string();
            let expected = format!("one CPU for each of the {} queue pairs (queues=)", self.queues);
            return Err(bad("cpus", &list, &expected));
        }
        for (at, cpu) in self.cpus.iter().enumerate() {
            if *cpu >= CPUS || self.cpus[..at].contains(cpu) {
                return Err(bad("cpus", &cpu.to_string(), CPU_LIST));
            }
        }
        if kind == Kind::Vf {
            self.check_vf()?;
        }
        if self.path.as_os_str().is_empty() && kind != Kind::Vf {
            let example = match kind {
                Kind::Vhost => "vhost,path=/run/vhost.sock",
                _ => "virtio-user,path=/run/vhost.sock",
            };
            return Err(SpecError::Required {
                kind: kind.name(),
                key: "path",
                example,
            });
        }
        Ok(())
    }

    /// What a virtual function's queues and buffers cannot be.
    pub(crate) fn check_vf(&self) -> Result<(), SpecError> {
        if !self.queues.is_power_of_two() || self.queues > 8 {
            return Err(bad(
                "queues",
                &self.queues.to_string(),
                "a virtual function has 1, 2, 4 or 8",
            ));
        }
        if !(ixgbevf::MIN_RING..=ixgbevf::MAX_RING).contains(&self.queue_size) || !self.queue_size.is_multiple_of(8) {
            let expected = "a ring of a virtual function has 64 to 8192 descriptors, a multiple of 8";
            return Err(bad("queue_size", &self.queue_size.to_string(), expected));
        }
        if !self.buffer_size.is_multiple_of(1024) {
            let expected = "a virtual function knows buffers of whole KiB: 1024, 2048 and so on";
            return Err(bad("buffer_size", &self.buffer_size.to_string(), expected));
        }
        if self.tso && self.csum == Some(false) {
            return Err(bad(
                "csum",
                "0",
                "a packet that is cut has a new checksum: pass tso=0 as well",
            ));
        }
        Ok(())
    }
}

impl FromStr for PortSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        if auto::is_auto(text) {
            return auto::find(text, &Surroundings::here())?.parse();
        }
        let mut parts = text.split(',');
        let name = parts.next().unwrap_or_default().trim();
        // DPDK numbers its devices: virtio_user0, net_virtio_user1, net_vhost0.
        let plain = name
            .strip_prefix("net_virtio")
            .map_or(name.to_owned(), |rest| format!("virtio{rest}"));
        let plain = plain.trim_end_matches(|c: char| c.is_ascii_digit());
        let Some((_, kind)) = Kind::ALL.into_iter().find(|(n, _)| *n == plain) else {
            let hint = nearest(name, Kind::ALL.iter().map(|(n, _)| *n));
            return Err(SpecError::Kind {
                found: name.to_owned(),
                hint,
            });
        };
        let mut spec = PortSpec::new(kind, PathBuf::new());
        let mut seen: Vec<&str> = Vec::new();
        for part in parts {
            let (key, value) = match part.split_once('=') {
                Some((key, value)) => (key.trim(), Some(value.trim())),
                None => (part.trim(), None),
            };
            if !kind.keys().contains(&key) {
                let hint = nearest(key, kind.keys().iter().copied());
                let keys = kind.keys().join(", ");
                return Err(SpecError::Key {
                    key: key.to_owned(),
                    kind: kind.name(),
                    hint,
                    keys,
                });
            }
            let Some(value) = value.filter(|v| !v.is_empty()) else {
                return Err(SpecError::Missing { key: key.to_owned() });
            };
            if seen.contains(&key) {
                return Err(SpecError::Twice { key: key.to_owned() });
            }
            seen.push(key);
            spec.set(key, value)?;
        }
        spec.check()?;
        Ok(spec)
    }
}

fn nearest<'a>(word: &str, among: impl Iterator<Item = &'a str>) -> String {
    among
        .map(|candidate| (strsim::damerau_levenshtein(word, candidate), candidate))
        .filter(|(distance, candidate)| *distance <= candidate.len().max(4) / 2)
        .min()
        .map_or(String::new(), |(_, candidate)| format!(" (did you mean {candidate}?)"))
}

fn bad(key: &str, value: &str, expected: impl Into<String>) -> SpecError {
    SpecError::Value {
        key: key.to_owned(),
        value: value.to_owned(),
        expected: expected.into(),
    }
}

fn flag(key: &str, value: &str) -> Result<bool, SpecError> {
    match value {
        "0" => Ok(false),
        "1" => Ok(true),
        _ => Err(bad(key, value, "write 0 or 1")),
    }
}

/// What numbers may be: of a text, and of a spec that a program put together.
type Range = std::ops::RangeInclusive<u64>;

const QUEUES: Range = 1..=128;
const QUEUE_SIZE: Range = 2..=32768;
const MTU: Range = 68..=9710;
const BUFFERS: Range = 64..=1 << 20;
const BUFFER_SIZE: Range = 1024..=16384;
const NODE: Range = 0..=1023;
const TIMEOUT: Range = 1..=3_600_000;
const VLAN: Range = 0..=4095;
const MODERATION: Range = 0..=1046;

/// CPUs have numbers below this.
const CPUS: u32 = 1 << 16;
const CPU_LIST: &str = "CPUs as in 2-3+6, each once";

fn number<T: TryFrom<u64>>(key: &str, value: &str, range: Range) -> Result<T, SpecError> {
    value
        .parse::<u64>()
        .ok()
        .filter(|n| range.contains(n))
        .and_then(|n| T::try_from(n).ok())
        .ok_or_else(|| {
            bad(
                key,
                value,
                format!("a whole number from {} to {}", range.start(), range.end()),
            )
        })
}

fn within(key: &str, value: impl Into<u64>, range: Range) -> Result<(), SpecError> {
    number::<u64>(key, &value.into().to_string(), range).map(|_| ())
}

/// Permissions in octal.
fn mode(key: &str, value: &str) -> Result<u32, SpecError> {
    u32::from_str_radix(value, 8)
        .ok()
        .filter(|mode| *mode <= 0o777 && !value.starts_with('+'))
        .ok_or_else(|| bad(key, value, "permissions in octal, as in 0660"))
}

/// `user`, `user:group` or `:group`, by number.
fn owner(key: &str, value: &str) -> Result<(Option<u32>, Option<u32>), SpecError> {
    // The last number means nobody to chown(2).
    let id = |text: &str| {
        let id = text.parse::<u32>().ok().filter(|id| *id != u32::MAX);
        id.ok_or_else(|| bad(key, value, "numbers of a user, a group or both: 1000, :1000, 1000:1000"))
    };
    match value.split_once(':') {
        None => Ok((Some(id(value)?), None)),
        Some(("", group)) => Ok((None, Some(id(group)?))),
        Some((user, group)) => Ok((Some(id(user)?), Some(id(group)?))),
    }
}

/// The speeds that virtio_user takes.
const SPEEDS: [u32; 10] = [
    10_000, 20_000, 25_000, 40_000, 50_000, 56_000, 100_000, 200_000, 400_000, 800_000,
];

fn speed(key: &str, value: &str) -> Result<u32, SpecError> {
    match value.parse::<u32>() {
        Ok(n) if n == 0 || SPEEDS.contains(&n) => Ok(n),
        _ => Err(bad(key, value, format!("in Mb/s, one of {SPEEDS:?}, or 0 for unknown"))),
    }
}

fn size(key: &str, value: &str) -> Result<usize, SpecError> {
    let (digits, shift) = match value.as_bytes().last() {
        Some(b'k' | b'K') => (&value[..value.len() - 1], 10),
        Some(b'm' | b'M') => (&value[..value.len() - 1], 20),
        Some(b'g' | b'G') => (&value[..value.len() - 1], 30),
        _ => (value, 0),
    };
    digits
        .parse::<usize>()
        .ok()
        .and_then(|n| n.checked_mul(1usize << shift))
        .filter(|n| (1 << 16..=1 << 40).contains(n))
        .ok_or_else(|| bad(key, value, "a size in bytes, or with K, M or G: 64K to 1024G"))
}

/// CPUs in their order, a comma being taken already: `2-3+6`.
fn cpus(key: &str, value: &str) -> Result<Vec<u32>, SpecError> {
    let wrong = || bad(key, value, CPU_LIST);
    let mut all = Vec::new();
    for part in value.split('+') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| text.parse::<u32>().ok().filter(|cpu| *cpu < CPUS);
        let (first, last) = (number(first).ok_or_else(wrong)?, number(last).ok_or_else(wrong)?);
        for cpu in first..=last {
            if all.contains(&cpu) || all.len() >= 128 {
                return Err(wrong());
            }
            all.push(cpu);
        }
        if last < first {
            return Err(wrong());
        }
    }
    Ok(all)
}

fn mac(key: &str, value: &str) -> Result<[u8; 6], SpecError> {
    let mut address = [0u8; 6];
    let mut parts = value.split(':');
    let complete = address.iter_mut().all(|byte| {
        parts
            .next()
            .filter(|p| p.len() == 2)
            .and_then(|p| u8::from_str_radix(p, 16).ok())
            .map(|b| *byte = b)
            .is_some()
    });
    if !complete || parts.next().is_some() {
        return Err(bad(key, value, "six bytes as in 02:00:00:00:00:01"));
    }
    own_address(key, value, address)
}

fn own_address(key: &str, value: &str, address: [u8; 6]) -> Result<[u8; 6], SpecError> {
    if address[0] & 1 == 1 || address == [0; 6] {
        return Err(bad(key, value, "a port's own address is neither multicast nor zero"));
    }
    Ok(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        text.parse::<PortSpec>().unwrap_err().to_string()
    }

    #[test]
    fn every_key_is_known_to_set() {
        for kind in [Kind::VirtioUser, Kind::Vhost, Kind::Vf] {
            for key in kind.keys() {
                // Any answer but a panic: the value may be refused.
                let _ = PortSpec::new(kind, PathBuf::new()).set(key, "1");
            }
        }
    }

    #[test]
    fn dpdk_names_and_keys_are_taken() {
        let spec: PortSpec =
            "net_virtio_user0,path=/tmp/s,queues=2,queue_size=1024,mrg_rxbuf=0,in_order=0,packed_vq=0,server=1,speed=10000,mac=02:11:22:33:44:55"
                .parse()
                .unwrap();
        assert_eq!(spec.kind, Kind::VirtioUser);
        assert_eq!(
            (spec.queues, spec.queue_size, spec.reversed, spec.speed),
            (2, 1024, true, 10_000)
        );
        assert_eq!((spec.mrg_rxbuf, spec.in_order), (Some(false), false));
        assert_eq!(spec.mac, Some([2, 0x11, 0x22, 0x33, 0x44, 0x55]));
        let spec: PortSpec = "net_vhost0,iface=/tmp/s,queues=4,client=1".parse().unwrap();
        assert_eq!((spec.kind, spec.queues, spec.reversed), (Kind::Vhost, 4, true));
    }

    #[test]
    fn mistakes_are_named() {
        assert!(error("virtio-usr,path=/s").contains("did you mean virtio-user"));
        assert!(error("").contains("unknown port kind"));
        assert!(error("virtio-user,path=/s,queue_siz=256").contains("did you mean queue_size"));
        assert!(error("virtio-user,path=/s,queues").contains("queues=VALUE"));
        assert!(error("virtio-user,path=").contains("path=VALUE"));
        assert!(error("virtio-user").contains("needs path="));
        assert!(error("virtio-user,path=/s,path=/t").contains("twice"));
        for size in ["3", "1000"] {
            assert!(error(&format!("virtio-user,path=/s,queue_size={size}")).contains("power of two"));
        }
        for size in ["0", "65536", "1", "x", "-2"] {
            for packed in [0, 1] {
                let text = format!("virtio-user,path=/s,queue_size={size},packed_vq={packed}");
                assert!(error(&text).contains("from 2 to 32768"), "{text}");
            }
        }
        assert!(error("virtio-user,path=/s,packed_vq=2").contains("0 or 1"));
        assert!(error("virtio-user,path=/s,queue_size=1000").contains("packed_vq=1"));
        assert!(
            "virtio-user,path=/s,queue_size=1000,packed_vq=1"
                .parse::<PortSpec>()
                .unwrap()
                .packed
        );
        assert!(error("virtio-user,path=/s,mac=01:00:00:00:00:01").contains("multicast"));
        assert!(error("virtio-user,path=/s,mac=02:00:00:00:00").contains("six bytes"));
        assert!(error("vhost,path=/s,server=1").contains("unknown key"));
    }

    #[test]
    fn who_may_connect() {
        let access = |keys: &str| format!("vhost,path=/s,{keys}").parse::<PortSpec>().unwrap().access;
        let (mode, user, group) = (Some(0o660), Some(1000), Some(7));
        assert_eq!(
            access("socket_mode=0660,socket_owner=1000:7"),
            SocketAccess { mode, user, group }
        );
        assert_eq!(access("socket_owner=1000").user, user);
        assert_eq!(
            access("socket_owner=:7"),
            SocketAccess {
                mode: None,
                user: None,
                group
            }
        );
        for bad in ["1000", "888", "+7", "-1", "rw"] {
            assert!(
                error(&format!("vhost,path=/s,socket_mode={bad}")).contains("octal"),
                "{bad}"
            );
        }
        for bad in [":", "root", "1:2:3", "4294967295", "-1", "1:"] {
            assert!(
                error(&format!("vhost,path=/s,socket_owner={bad}")).contains("numbers"),
                "{bad}"
            );
        }
    }

    #[test]
    fn cpus_are_one_a_queue() {
        let spec: PortSpec = "virtio-user,path=/s,queues=3,cpus=200-201+6".parse().unwrap();
        assert_eq!(spec.cpus, [200, 201, 6]);
        assert!(error("virtio-user,path=/s,queues=2,cpus=1").contains("one CPU for each of the 2 queue pairs"));
        for bad in ["x", "1+1", "3-1", "1-", "+", "70000", "0-65535"] {
            assert!(
                error(&format!("virtio-user,path=/s,cpus={bad}")).contains("as in 2-3+6"),
                "{bad}"
            );
        }
    }

    #[test]
    fn virtual_functions() {
        let spec: PortSpec = "vf,pci=81:10.0,queues=4,vlan=100+200,vlan_strip=1".parse().unwrap();
        assert_eq!(spec.pci.unwrap().to_string(), "0000:81:10.0");
        assert_eq!((spec.kind, spec.queues, spec.queue_size), (Kind::Vf, 4, 512));
        assert_eq!((spec.vlans, spec.vlan_strip), (vec![100, 200], true));
        assert_eq!("vf".parse::<PortSpec>().unwrap().pci, None);
        assert!(error("vf,pci=eth0").contains("is no PCI address"));
        assert!(error("vf,queues=3").contains("1, 2, 4 or 8"));
        assert!(error("vf,queues=16").contains("1, 2, 4 or 8"));
        for size in ["32", "100", "8200"] {
            assert!(error(&format!("vf,queue_size={size}")).contains("64 to 8192"), "{size}");
        }
        assert!(error("vf,buffer_size=1500").contains("whole KiB"));
        assert!(error("vf,vlan=4096").contains("from 0 to 4095"));
        assert!(error("vf,csum=0").contains("tso=0"));
        assert!(error("vf,path=/s").contains("unknown key"));
    }

    /// A spec that a program put together is as good as one that was written, or refused with the same words.
    #[test]
    fn what_a_text_cannot_say_a_program_cannot_either() {
        type Change = fn(&mut PortSpec);
        let changes: [(&str, Change); 22] = [
            ("queues=0", |s| s.queues = 0),
            ("queues=129", |s| s.queues = 129),
            ("queues=65535", |s| s.queues = u16::MAX),
            ("queue_size=0", |s| s.queue_size = 0),
            ("queue_size=65535", |s| s.queue_size = u16::MAX),
            ("queue_size=1000", |s| s.queue_size = 1000),
            ("mtu=0", |s| s.mtu = 0),
            ("mtu=65535", |s| s.mtu = u16::MAX),
            ("buffers=0", |s| s.buffers = Some(0)),
            ("buffers=4294967295", |s| s.buffers = Some(u32::MAX)),
            ("buffer_size=0", |s| s.buffer_size = 0),
            ("buffer_size=70000", |s| s.buffer_size = 70_000),
            ("buffer_size=4294967295", |s| s.buffer_size = u32::MAX),
            ("mem=18446744073709551615", |s| s.mem = Some(usize::MAX)),
            ("numa=4294967295", |s| s.numa = Some(u32::MAX)),
            ("timeout=0", |s| s.timeout_ms = 0),
            ("timeout=4294967295", |s| s.timeout_ms = u32::MAX),
            ("speed=7", |s| s.speed = 7),
            ("socket_mode=7777", |s| s.access.mode = Some(0o7777)),
            ("mac=01:00:00:00:00:00", |s| s.mac = Some([1, 0, 0, 0, 0, 0])),
            ("tso=1,csum=0", |s| (s.tso, s.csum) = (true, Some(false))),
            ("lro=1,mrg_rxbuf=0", |s| (s.lro, s.mrg_rxbuf) = (true, Some(false))),
        ];
        for (text, change) in changes {
            let mut spec = PortSpec::virtio_user("/s");
            change(&mut spec);
            let parsed = format!("virtio-user,path=/s,{text}").parse::<PortSpec>();
            assert_eq!(spec.check().unwrap_err(), parsed.unwrap_err(), "{text}");
            assert!(crate::Port::open_spec(spec).is_err(), "{text}");
        }
        let mut spec = PortSpec::virtio_user("/s");
        spec.cpus = vec![1, 1];
        spec.queues = 2;
        assert!(spec.check().is_err());
        assert!(PortSpec::vhost("").check().is_err());
        let address = "0000:01:00.0".parse().unwrap();
        for size in [1000, 0, u32::MAX] {
            let spec = PortSpec {
                buffer_size: size,
                ..PortSpec::vf(address)
            };
            assert!(spec.check().is_err(), "{size}");
        }
        for spec in [
            PortSpec::virtio_user("/s"),
            PortSpec::vhost("/s"),
            PortSpec::vf(address),
        ] {
            assert_eq!(spec.check(), Ok(()));
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(size("mem", "4M"), Ok(4 << 20));
        assert_eq!(size("mem", "65536"), Ok(65536));
        assert!(size("mem", "99999999999G").is_err());
        assert!(size("mem", "M").is_err());
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(text in "\\PC{0,80}") {
            let _ = text.parse::<PortSpec>();
            let _ = format!("virtio-user,{text}").parse::<PortSpec>();
        }
    }
}
