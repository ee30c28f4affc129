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
//! | key | kind | default | meaning |
//! |---|---|---|---|
//! | `path` (or `iface` for `vhost`, as net_vhost has it) | both | | the vhost-user socket |
//! | `server` | virtio-user | 0 | 1: listen on `path` and wait for the back-end |
//! | `client` | vhost | 0 | 1: connect to `path`, where the front-end listens |
//! | `queues` | both | 1 | queue pairs, 1 to 128; for `vhost` the most that are offered |
//! | `queue_size` | virtio-user | 256 | descriptors of each ring: a power of two, 2 to 32768 |
//! | `mac` | both | random, locally administered | the port's address |
//! | `mtu` | both | 1500 | 68 to 9710 (a frame of 9728 with VLAN tag and without FCS) |
//! | `mrg_rxbuf` | virtio-user | 1 if a frame of `mtu` does not fit `buffer_size` | 1: a received frame may take several buffers |
//! | `in_order` | both | 1 | buffers are used in the order in which they were made available |
//! | `event_idx` | both | 0 for virtio-user, 1 for vhost | suppress notifications by index; pays for ports that sleep |
//! | `indirect` | both | 1 | indirect descriptors |
//! | `packed_vq` | virtio-user | 0 | only 0 in this version |
//! | `speed` | virtio-user | 0 | link speed to report, in Mb/s; 0 says unknown |
//! | `buffers` | both | what the rings need | packet buffers of the port |
//! | `buffer_size` | both | 2048 | bytes of a frame that one buffer holds: 1024 to 16384 |
//! | `mem` | virtio-user | what rings and buffers need | size of the port's one segment: `4M`, `2097152` |
//! | `memory` | virtio-user | auto | `auto`, `hugetlbfs`, `memfd-huge` or `memfd` |
//! | `huge_dir` | virtio-user | first that fits | the hugetlbfs mount to use |
//! | `numa` | virtio-user | any | the node that the segment comes from |
//! | `timeout` | both | 5000 | milliseconds for each answer of the other side |
//! | `reconnect` | virtio-user | 1 | 0: a lost back-end is not looked for again |

use std::path::PathBuf;
use std::str::FromStr;

/// What is on the other side of the port, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The front-end of a vhost-user socket: our rings, a switch on the other side.
    VirtioUser,
    /// The back-end of a vhost-user socket: the other side's rings.
    Vhost,
}

impl Kind {
    const ALL: [(&'static str, Kind); 4] = [
        ("virtio-user", Kind::VirtioUser),
        ("virtio_user", Kind::VirtioUser),
        ("vhost", Kind::Vhost),
        ("net_vhost", Kind::Vhost),
    ];

    /// The name that specs use.
    pub fn name(self) -> &'static str {
        match self {
            Kind::VirtioUser => "virtio-user",
            Kind::Vhost => "vhost",
        }
    }

    fn keys(self) -> &'static [&'static str] {
        match self {
            Kind::VirtioUser => &[
                "path",
                "server",
                "queues",
                "queue_size",
                "mac",
                "mtu",
                "mrg_rxbuf",
                "in_order",
                "event_idx",
                "indirect",
                "packed_vq",
                "speed",
                "buffers",
                "buffer_size",
                "mem",
                "memory",
                "huge_dir",
                "numa",
                "timeout",
                "reconnect",
            ],
            Kind::Vhost => &[
                "path",
                "iface",
                "client",
                "queues",
                "mac",
                "mtu",
                "in_order",
                "event_idx",
                "indirect",
                "buffers",
                "buffer_size",
                "timeout",
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
    /// Offer VIRTIO_F_IN_ORDER.
    pub in_order: bool,
    /// Offer VIRTIO_F_EVENT_IDX.
    pub event_idx: bool,
    /// Offer VIRTIO_F_INDIRECT_DESC.
    pub indirect: bool,
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
    /// Milliseconds for each answer of the other side.
    pub timeout_ms: u32,
    /// Look for a lost back-end again.
    pub reconnect: bool,
}

/// Why a text is no port spec. Each message says what to write instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// The text before the first comma is no kind.
    #[error("unknown port kind {found:?}: write virtio-user (front-end) or vhost (back-end){hint}")]
    Kind {
        /// What was written.
        found: String,
        /// The nearest kind, as a phrase, or nothing.
        hint: String,
    },
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

    fn new(kind: Kind, path: PathBuf) -> Self {
        PortSpec {
            kind,
            path,
            reversed: false,
            queues: 1,
            queue_size: 256,
            mac: None,
            mtu: 1500,
            mrg_rxbuf: None,
            in_order: true,
            event_idx: kind == Kind::Vhost,
            indirect: true,
            speed: 0,
            buffers: None,
            buffer_size: 2048,
            mem: None,
            memory: MemoryKind::Auto,
            huge_dir: None,
            numa: None,
            timeout_ms: 5000,
            reconnect: true,
        }
    }

    /// Whether to ask for VIRTIO_NET_F_MRG_RXBUF.
    ///
    /// Mergeable buffers cost a look at the header of each frame, which the other side has just written. So they are
    /// asked for only where they are needed.
    pub fn mergeable(&self) -> bool {
        // A frame is longer than the MTU by the Ethernet header and a VLAN tag.
        self.mrg_rxbuf.unwrap_or(u32::from(self.mtu) + 18 > self.buffer_size)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), SpecError> {
        match key {
            "path" | "iface" => self.path = PathBuf::from(value),
            "server" | "client" => self.reversed = flag(key, value)?,
            "queues" => self.queues = number(key, value, 1, 128)?,
            "queue_size" => self.queue_size = queue_size(key, value)?,
            "mac" => self.mac = Some(mac(key, value)?),
            "mtu" => self.mtu = number(key, value, 68, 9710)?,
            "mrg_rxbuf" => self.mrg_rxbuf = Some(flag(key, value)?),
            "in_order" => self.in_order = flag(key, value)?,
            "event_idx" => self.event_idx = flag(key, value)?,
            "indirect" => self.indirect = flag(key, value)?,
            "packed_vq" => {
                if flag(key, value)? {
                    return Err(bad(
                        key,
                        value,
                        "packed rings are not in this version; write packed_vq=0 or leave it out",
                    ));
                }
            }
            "speed" => self.speed = speed(key, value)?,
            "buffers" => self.buffers = Some(number(key, value, 64, 1 << 20)?),
            "buffer_size" => self.buffer_size = number(key, value, 1024, 16384)?,
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
            "numa" => self.numa = Some(number(key, value, 0, 1023)?),
            "timeout" => self.timeout_ms = number(key, value, 1, 3_600_000)?,
            "reconnect" => self.reconnect = flag(key, value)?,
            _ => unreachable!("keys() lists a key that set() does not know: {key}"),
        }
        Ok(())
    }
}

impl FromStr for PortSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
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
        if spec.path.as_os_str().is_empty() {
            let example = match kind {
                Kind::VirtioUser => "virtio-user,path=/run/vhost.sock",
                Kind::Vhost => "vhost,path=/run/vhost.sock",
            };
            return Err(SpecError::Required {
                kind: kind.name(),
                key: "path",
                example,
            });
        }
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

fn number<T: TryFrom<u64>>(key: &str, value: &str, least: u64, most: u64) -> Result<T, SpecError> {
    value
        .parse::<u64>()
        .ok()
        .filter(|n| (least..=most).contains(n))
        .and_then(|n| T::try_from(n).ok())
        .ok_or_else(|| bad(key, value, format!("a whole number from {least} to {most}")))
}

fn queue_size(key: &str, value: &str) -> Result<u16, SpecError> {
    match number::<u16>(key, value, 2, 32768) {
        Ok(n) if n.is_power_of_two() => Ok(n),
        _ => Err(bad(
            key,
            value,
            "a split ring has a power of two of descriptors, 2 to 32768 (virtio 1.3, 2.7)",
        )),
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
        for kind in [Kind::VirtioUser, Kind::Vhost] {
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
        for size in ["0", "3", "65536", "1", "x", "-2"] {
            assert!(
                error(&format!("virtio-user,path=/s,queue_size={size}")).contains("power of two"),
                "{size}"
            );
        }
        assert!(error("virtio-user,path=/s,packed_vq=1").contains("packed_vq=0"));
        assert!(error("virtio-user,path=/s,mac=01:00:00:00:00:01").contains("multicast"));
        assert!(error("virtio-user,path=/s,mac=02:00:00:00:00").contains("six bytes"));
        assert!(error("vhost,path=/s,server=1").contains("unknown key"));
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
