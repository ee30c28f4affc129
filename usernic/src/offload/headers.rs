//! Where the headers of a frame begin and end.
//!
//! [`Headers::parse`] takes any bytes. It looks at the first [`MAX_HEADERS`] at the most: what lies behind is payload to
//! it. Bytes that another process can write are to be copied first ([`Packet::read_at`](crate::Packet::read_at)).

/// How far into a frame headers are looked for. More than the longest of all that ordinary stacks send: Ethernet with
/// two tags (22), IPv6 (40) with 128 bytes of extensions, TCP with options (60).
pub const MAX_HEADERS: usize = 256;

/// EtherTypes (IEEE 802 numbers).
mod ether_type {
    pub(super) const IPV4: u16 = 0x0800;
    pub(super) const IPV6: u16 = 0x86dd;
    /// 802.1Q, 802.1ad, and what came before 802.1ad.
    pub(super) const TAGS: [u16; 3] = [0x8100, 0x88a8, 0x9100];
}

/// Protocol numbers and IPv6 extension headers (IANA).
mod protocol {
    pub(super) const HOP_BY_HOP: u8 = 0;
    pub(super) const TCP: u8 = 6;
    pub(super) const UDP: u8 = 17;
    pub(super) const ROUTING: u8 = 43;
    pub(super) const FRAGMENT: u8 = 44;
    pub(super) const AUTHENTICATION: u8 = 51;
    pub(super) const NOTHING: u8 = 59;
    pub(super) const DESTINATION: u8 = 60;
    pub(super) const MOBILITY: u8 = 135;
    pub(super) const HIP: u8 = 139;
    pub(super) const SHIM6: u8 = 140;
}

/// Bytes of the headers that have a fixed length.
pub(crate) const ETHERNET: usize = 14;
const TAG: usize = 4;
const IPV4: usize = 20;
const IPV6: usize = 40;
const TCP: usize = 20;
const UDP: usize = 8;

/// The network header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// Neither IPv4 nor IPv6, or one that contradicts itself.
    Other,
    /// IPv4 (RFC 791), options included.
    Ipv4,
    /// IPv6 (RFC 8200), extension headers included.
    Ipv6,
}

/// What the network header carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// Nothing that is known, of this protocol number; or TCP or UDP whose header is cut short.
    Other(u8),
    /// A piece of a packet: its checksum covers bytes that are not here.
    Fragment(u8),
    /// TCP (RFC 9293), options included.
    Tcp,
    /// UDP (RFC 768).
    Udp,
}

/// Where the headers of a frame begin and end: offsets from its first byte.
///
/// `network_at <= transport_at <= payload_at <= end <= the frame's length`, and `payload_at <= MAX_HEADERS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    /// Tag control information of the outermost VLAN tag, if there is a tag: the VLAN's id is its lowest 12 bits.
    pub tag: Option<u16>,
    /// The EtherType behind all tags.
    pub ether_type: u16,
    /// The network header's kind.
    pub network: Network,
    /// Where it begins.
    pub network_at: usize,
    /// The transport header's kind.
    pub transport: Transport,
    /// Where it begins: behind all options and extension headers.
    pub transport_at: usize,
    /// Where the transport header ends. Of one that is not known: where it begins.
    pub payload_at: usize,
    /// Where the packet ends by the network header's length field: bytes behind it are padding.
    pub end: usize,
    /// The network header's length field names less than its header, or more than the frame has; `end` is then the
    /// frame's. A frame that is to be cut may be so.
    pub wrong_length: bool,
    /// Where the sender's IP address is: in the network header. With a home address option (RFC 6275, 6.3): there.
    pub source_at: usize,
    /// Where the receiver's IP address is: in the network header. With a routing header of type 2 (RFC 6275, 6.4): there.
    pub destination_at: usize,
    /// There are IPv6 extension headers.
    pub extended: bool,
    /// The last receiver is one that a routing header names and that is not found out here: the transport header's
    /// checksum is over an address that is not known.
    pub routed: bool,
}

/// Big-endian, at `at`, if it is there.
#[inline]
pub(crate) fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

impl Headers {
    /// Reads the headers of a frame of `frame_len` bytes, which begins with `bytes` (all of it, or at least its
    /// headers). `None`: it is shorter than an Ethernet header.
    #[inline]
    pub fn parse(bytes: &[u8], frame_len: usize) -> Option<Self> {
        let bytes = &bytes[..bytes.len().min(frame_len).min(MAX_HEADERS)];
        let mut network_at = ETHERNET;
        let mut ether_type = be16(bytes, ETHERNET - 2)?;
        let mut tag = None;
        // QinQ has two tags. A third one is somebody's payload.
        for _ in 0..2 {
            if !ether_type::TAGS.contains(&ether_type) {
                break;
            }
            let (Some(control), Some(inner)) = (be16(bytes, network_at), be16(bytes, network_at + 2)) else {
                break;
            };
            tag = tag.or(Some(control));
            ether_type = inner;
            network_at += TAG;
        }
        let mut headers = Headers {
            tag,
            ether_type,
            network: Network::Other,
            network_at,
            transport: Transport::Other(u8::MAX),
            transport_at: network_at,
            payload_at: network_at,
            end: frame_len,
            wrong_length: false,
            source_at: network_at,
            destination_at: network_at,
            extended: false,
            routed: false,
        };
        let network = match ether_type {
            ether_type::IPV4 => headers.ipv4(bytes),
            ether_type::IPV6 => headers.ipv6(bytes),
            _ => None,
        };
        if let Some(protocol) = network {
            headers.transport(bytes, protocol);
        }
        Some(headers)
    }

    /// The protocol behind the network header; `None` if that is none.
    fn ipv4(&mut self, bytes: &[u8]) -> Option<Transport> {
        let at = self.network_at;
        let header: &[u8; IPV4] = bytes.get(at..)?.first_chunk()?;
        let len = usize::from(header[0] & 0xf) * 4;
        if header[0] >> 4 != 4 || len < IPV4 || at + len > bytes.len() {
            return None;
        }
        self.network = Network::Ipv4;
        self.transport_at = at + len;
        self.payload_at = at + len;
        self.set_end(at + usize::from(be16(header, 2)?));
        self.source_at = at + 12;
        self.destination_at = at + 16;
        // More fragments, or an offset.
        let fragment = be16(header, 6)? & 0x3fff != 0;
        Some(if fragment {
            Transport::Fragment(header[9])
        } else {
            Transport::Other(header[9])
        })
    }

    fn ipv6(&mut self, bytes: &[u8]) -> Option<Transport> {
        let at = self.network_at;
        let header: &[u8; IPV6] = bytes.get(at..)?.first_chunk()?;
        if header[0] >> 4 != 6 {
            return None;
        }
        self.network = Network::Ipv6;
        self.transport_at = at + IPV6;
        match (usize::from(be16(header, 4)?), header[6]) {
            // A jumbogram (RFC 2675), which no port here carries, or one that is to be cut.
            (0, next) if next != protocol::NOTHING => self.wrong_length = true,
            (len, _) => self.set_end(at + IPV6 + len),
        }
        self.source_at = at + 8;
        self.destination_at = at + 24;
        let mut next = header[6];
        let mut fragment = false;
        // Each header is 8 bytes or more, so that the bytes end this.
        while let Some((after, len)) = self.extension(bytes, next, &mut fragment) {
            self.extended = true;
            self.transport_at += len;
            next = after;
            if fragment {
                break;
            }
        }
        self.payload_at = self.transport_at;
        Some(if fragment {
            Transport::Fragment(next)
        } else {
            Transport::Other(next)
        })
    }

    /// The extension header of kind `kind` at `transport_at`: what follows it, and its length.
    fn extension(&mut self, bytes: &[u8], kind: u8, fragment: &mut bool) -> Option<(u8, usize)> {
        let at = self.transport_at;
        let &[next, units, ..] = bytes.get(at..)?.first_chunk::<8>()?;
        let len = match kind {
            // Units of 8 bytes, the first not counted (RFC 8200, 4.3, 4.4, 4.6; RFC 6275, 7401, 5533).
            protocol::HOP_BY_HOP
            | protocol::ROUTING
            | protocol::DESTINATION
            | protocol::MOBILITY
            | protocol::HIP
            | protocol::SHIM6 => (usize::from(units) + 1) * 8,
            protocol::FRAGMENT => 8,
            // Units of 4 bytes, the first two not counted (RFC 4302, 2.2).
            protocol::AUTHENTICATION => (usize::from(units) + 2) * 4,
            _ => return None,
        };
        let end = at + len;
        if end > bytes.len() || end > self.end {
            return None;
        }
        match kind {
            // An offset, or more fragments. One that is the whole packet is none (RFC 6946).
            protocol::FRAGMENT => *fragment = be16(bytes, at + 2)? & 0xfff9 != 0,
            // Type 2 holds one address, behind 8 bytes.
            protocol::ROUTING if bytes[at + 2] == 2 && len == 24 => self.destination_at = at + 8,
            // Segments are left.
            protocol::ROUTING if bytes[at + 3] != 0 => self.routed = true,
            protocol::DESTINATION => {
                if let Some(home) = home_address(&bytes[..end], at + 2) {
                    self.source_at = home;
                }
            }
            _ => {}
        }
        Some((next, len))
    }

    fn set_end(&mut self, end: usize) {
        if end < self.transport_at || end > self.end {
            self.wrong_length = true;
        } else {
            self.end = end;
        }
    }

    fn transport(&mut self, bytes: &[u8], transport: Transport) {
        self.transport = transport;
        let at = self.transport_at;
        let bytes = &bytes[..bytes.len().min(self.end)];
        match transport {
            Transport::Other(protocol::TCP) => {
                let len = bytes.get(at + 12).map_or(0, |byte| usize::from(byte >> 4) * 4);
                if len >= TCP && at + len <= bytes.len() {
                    self.transport = Transport::Tcp;
                    self.payload_at = at + len;
                }
            }
            Transport::Other(protocol::UDP) if at + UDP <= bytes.len() => {
                self.transport = Transport::Udp;
                self.payload_at = at + UDP;
            }
            _ => {}
        }
    }

    /// Where the transport header's checksum is, from the header's first byte, if it has one that is known here.
    #[inline]
    pub fn checksum_offset(&self) -> Option<usize> {
        match self.transport {
            Transport::Tcp => Some(16),
            Transport::Udp => Some(6),
            _ => None,
        }
    }

    /// Bytes of an IP address: 4 or 16, and 0 where there is none.
    #[inline]
    pub fn address_len(&self) -> usize {
        match self.network {
            Network::Ipv4 => 4,
            Network::Ipv6 => 16,
            Network::Other => 0,
        }
    }
}

/// The home address option (RFC 6275, 6.3: type 201, an address of 16 bytes) among the options from `at` on.
fn home_address(bytes: &[u8], mut at: usize) -> Option<usize> {
    // Each turn goes on by a byte at least.
    loop {
        match *bytes.get(at)? {
            // Pad1 is the one option without a length.
            0 => at += 1,
            kind => {
                let len = usize::from(*bytes.get(at + 1)?);
                if kind == 201 && len == 16 && at + 18 <= bytes.len() {
                    return Some(at + 2);
                }
                at += 2 + len;
            }
        }
    }
}

#[cfg(test)]
#[path = "headers_tests.rs"]
pub(crate) mod tests;
