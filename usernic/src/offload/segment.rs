//! Cutting a large TCP or UDP packet into packets that fit a link (TSO, USO), as a device does for a header with a
//! `gso_type` (virtio 1.3, 5.1.6.2).
//!
//! ```
//! use usernic::offload::segment::Segmenter;
//! use virtio_ring::net::GsoType;
//!
//! // Ethernet, IPv4, UDP; lengths and checksums are made anew for each packet.
//! let mut frame = [0u8; 42 + 250];
//! frame[12..24].copy_from_slice(&[8, 0, 0x45, 0, 0, 0, 0, 1, 0, 0, 64, 17]);
//! let mut segmenter = Segmenter::new(&frame, frame.len(), GsoType::UDP_L4, 100)?;
//! let mut packets = Vec::new();
//! while let Some(cut) = segmenter.next() {
//!     let payload = &frame[cut.payload()];
//!     packets.push([cut.headers_with(payload), payload].concat());
//! }
//! assert_eq!(packets.iter().map(Vec::len).collect::<Vec<_>>(), [142, 142, 92]);
//! # Ok::<(), usernic::offload::segment::Uncuttable>(())
//! ```

use std::ops::Range;

use virtio_ring::net::GsoType;

use super::checksum::{Sum, pseudo, set_ipv4};
use super::headers::{Headers, MAX_HEADERS, Network, Transport, be16};

/// Packets that one is cut into at the most: 64 bytes each of the largest there is. Whoever asks for more wants to keep
/// this side busy.
pub const MAX_PACKETS: usize = 1024;

/// Why a packet cannot be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Uncuttable {
    /// The GSO type is none that is known here (UDP fragmentation is not).
    #[error("gso_type {0} is not TCPv4 (1), TCPv6 (4) or UDP_L4 (5)")]
    Kind(u8),
    /// The packet is not what the GSO type says.
    #[error("the packet is not of its gso_type: {network:?}, {transport:?}")]
    Headers {
        /// Its network header.
        network: Network,
        /// Its transport header.
        transport: Transport,
    },
    /// A size of 0, one for which packets would be longer than 65535 bytes, or one that makes more packets than
    /// [`MAX_PACKETS`].
    #[error("gso_size {size} for {payload} bytes of payload behind {headers} of headers")]
    Size {
        /// Bytes of payload for each packet.
        size: u16,
        /// Bytes of payload that there are.
        payload: usize,
        /// Bytes of the network and transport headers.
        headers: usize,
    },
}

/// A packet on its way to be cut: its headers, and how far it is.
#[derive(Clone, Debug)]
pub struct Segmenter {
    bytes: [u8; MAX_HEADERS],
    headers: Headers,
    size: usize,
    /// The next packet's payload begins here.
    at: usize,
    end: usize,
    /// Packets that were cut off.
    count: usize,
    flags: u8,
}

/// TCP's flags (RFC 9293, 3.1; RFC 3168).
mod flag {
    /// FIN, PSH: what the sender says at the end.
    pub(super) const LAST: u8 = 0x01 | 0x08;
    /// CWR: what it says once.
    pub(super) const FIRST: u8 = 0x80;
}

impl Segmenter {
    /// Prepares a frame of `frame_len` bytes, which begins with `bytes` (all of it, or its headers). Each packet has
    /// `size` bytes of payload, the last one maybe fewer.
    ///
    /// # Errors
    /// [`Uncuttable`].
    pub fn new(bytes: &[u8], frame_len: usize, kind: GsoType, size: u16) -> Result<Self, Uncuttable> {
        let expected = match kind.kind() {
            GsoType::TCPV4 => (Some(Network::Ipv4), Transport::Tcp),
            GsoType::TCPV6 => (Some(Network::Ipv6), Transport::Tcp),
            GsoType::UDP_L4 => (None, Transport::Udp),
            _ => return Err(Uncuttable::Kind(kind.0)),
        };
        let other = Uncuttable::Headers {
            network: Network::Other,
            transport: Transport::Other(u8::MAX),
        };
        let headers = Headers::parse(bytes, frame_len).ok_or(other)?;
        if expected.0.is_some_and(|network| network != headers.network)
            || expected.1 != headers.transport
            || headers.routed
        {
            return Err(Uncuttable::Headers {
                network: headers.network,
                transport: headers.transport,
            });
        }
        let payload = frame_len - headers.payload_at;
        let lengths = headers.payload_at - headers.network_at;
        if size == 0
            || payload.div_ceil(size.into()) > MAX_PACKETS
            || lengths + payload.min(size.into()) > usize::from(u16::MAX)
        {
            return Err(Uncuttable::Size {
                size,
                payload,
                headers: lengths,
            });
        }
        let mut kept = [0; MAX_HEADERS];
        kept[..headers.payload_at].copy_from_slice(&bytes[..headers.payload_at]);
        Ok(Segmenter {
            // Of TCP.
            flags: kept.get(headers.transport_at + 13).copied().unwrap_or(0),
            bytes: kept,
            headers,
            size: size.into(),
            at: headers.payload_at,
            end: frame_len,
            count: 0,
        })
    }

    /// Packets that are still to be cut off.
    pub fn packets(&self) -> usize {
        let left = (self.end - self.at).div_ceil(self.size);
        // One without payload is one packet, too.
        left.max(usize::from(self.count == 0))
    }

    /// Bytes of the headers that each packet begins with.
    pub fn header_len(&self) -> usize {
        self.headers.payload_at
    }

    /// Bytes of the longest packet.
    pub fn longest(&self) -> usize {
        self.headers.payload_at + self.size.min(self.end - self.headers.payload_at)
    }

    /// Cuts off the next packet.
    #[expect(clippy::should_implement_trait, reason = "what it returns borrows the headers")]
    pub fn next(&mut self) -> Option<Cut<'_>> {
        if self.packets() == 0 {
            return None;
        }
        let payload = self.at..self.end.min(self.at + self.size);
        let last = payload.end == self.end;
        let Headers {
            network,
            network_at,
            transport,
            transport_at,
            payload_at,
            ..
        } = self.headers;
        let bytes = &mut self.bytes[..payload_at];
        let mut put = |at: usize, value: usize| bytes[at..at + 2].copy_from_slice(&(value as u16).to_be_bytes());
        let len = payload_at + payload.len();
        match network {
            Network::Ipv6 => put(network_at + 4, len - network_at - 40),
            _ => put(network_at + 2, len - network_at),
        }
        if transport == Transport::Udp {
            put(transport_at + 4, len - transport_at);
        }
        if network == Network::Ipv4 {
            if self.count > 0 {
                let id = be16(bytes, network_at + 4).unwrap_or_default().wrapping_add(1);
                bytes[network_at + 4..][..2].copy_from_slice(&id.to_be_bytes());
            }
            set_ipv4(&self.headers, bytes);
        }
        if transport == Transport::Tcp {
            if self.count > 0
                && let Some(sequence) = bytes[transport_at + 4..].first_chunk_mut()
            {
                *sequence = u32::from_be_bytes(*sequence)
                    .wrapping_add(self.size as u32)
                    .to_be_bytes();
            }
            let mut flags = self.flags;
            if !last {
                flags &= !flag::LAST;
            }
            if self.count > 0 {
                flags &= !flag::FIRST;
            }
            bytes[transport_at + 13] = flags;
        }
        self.at = payload.end;
        self.count += 1;
        Some(Cut {
            bytes,
            headers: &self.headers,
            payload,
        })
    }
}

/// One packet: its headers, which lack only the checksum, and where its payload is.
#[derive(Debug)]
pub struct Cut<'a> {
    bytes: &'a mut [u8],
    headers: &'a Headers,
    payload: Range<usize>,
}

impl<'a> Cut<'a> {
    /// Where its payload is in the large packet.
    pub fn payload(&self) -> Range<usize> {
        self.payload.clone()
    }

    /// Bytes of the packet.
    pub fn packet_len(&self) -> usize {
        self.bytes.len() + self.payload.len()
    }

    /// Its headers, all checksums made, with the sum of its payload.
    pub fn headers(self, payload: Sum) -> &'a [u8] {
        let Cut {
            bytes,
            headers,
            payload: range,
        } = self;
        let at = headers.transport_at;
        if let (Some(offset), Some(mut sum)) = (
            headers.checksum_offset(),
            pseudo(headers, bytes, bytes.len() - at + range.len()),
        ) {
            bytes[at + offset..][..2].fill(0);
            // Both headers have an even length.
            sum.add(&bytes[at..]);
            sum.join(payload);
            let checksum = sum.checksum_not_zero();
            bytes[at + offset..][..2].copy_from_slice(&checksum);
        }
        bytes
    }

    /// Its headers, all checksums made, with its payload in one piece.
    pub fn headers_with(self, payload: &[u8]) -> &'a [u8] {
        self.headers(Sum::of(payload))
    }
}

#[cfg(test)]
#[path = "segment_tests.rs"]
mod tests;
