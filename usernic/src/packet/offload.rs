//! What a packet asks for when it is sent, and what is known of it when it was received: checksum and segmentation.
//!
//! An application asks whether or not the other side of the port can do it: what it cannot is done here, in software,
//! when the packet is sent.

use virtio_ring::Features;
use virtio_ring::net::{GsoType, HashReport, HashTypes, Header, HeaderFlags};

use super::{Burst, Packet};
use crate::offload::checksum::{Check, Partial, Sum, Verdict, set_ipv4};
use crate::offload::hash::Toeplitz;
use crate::offload::headers::{Headers, MAX_HEADERS, Network, Transport};
use crate::offload::segment::{MAX_PACKETS, Segmenter, Uncuttable};
use crate::pool::{Cache, Meta};
use crate::queue::NET_HEADER;

/// Which fields of a [`Meta`] mean something: what the packet asks for, a bit each, and what is known of it.
///
/// What a packet asks for beyond what the other side takes is one `and` away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Marks(u16);

impl Marks {
    pub(crate) const NONE: Self = Self(0);
    /// The checksum is open.
    pub(crate) const CHECKSUM: Self = Self(1);
    const TCP4: Self = Self(2);
    const TCP6: Self = Self(4);
    const UDP4: Self = Self(8);
    const UDP6: Self = Self(16);
    /// Beside a TCP type: the congestion flag is set.
    const ECN: Self = Self(32);
    /// Any kind of segmentation.
    pub(crate) const SEGMENTATION: Self = Self(2 | 4 | 8 | 16);
    /// What a virtio-net header can ask for.
    const HEADER: Self = Self(63);
    /// The VLAN tag is not in the frame, but in [`Meta::tag`].
    pub(crate) const TAG: Self = Self(256);
    /// All that can be asked for.
    pub(crate) const ASKED: Self = Self(63 | 256);
    /// The checksums were found right.
    pub(crate) const RIGHT: Self = Self(64);
    /// The other side reported a hash.
    pub(crate) const HASH: Self = Self(128);

    /// What a device with TCP segmentation of its own does: with `segmentation`, it cuts; without, only checksums and
    /// tags. Whether it is right about the congestion flag is the device's configuration, which a function does not know.
    pub(crate) const fn device(checksum: bool, segmentation: bool) -> Self {
        let marks = Self::TAG;
        match (checksum, segmentation) {
            (false, _) => marks,
            (true, false) => marks.with(Self::CHECKSUM),
            (true, true) => marks.with(Self::CHECKSUM).with(Self::TCP4).with(Self::TCP6),
        }
    }

    #[inline(always)]
    pub(crate) const fn has(self, any_of: Self) -> bool {
        self.0 & any_of.0 != 0
    }

    #[inline(always)]
    pub(crate) const fn with(self, more: Self) -> Self {
        Self(self.0 | more.0)
    }

    #[inline(always)]
    const fn without(self, these: Self) -> Self {
        Self(self.0 & !these.0)
    }

    /// Whether there is something to be done that is not among `takes`.
    #[inline(always)]
    pub(crate) const fn beyond(self, takes: Self) -> bool {
        self.0 & Self::ASKED.0 & !takes.0 != 0
    }

    fn of(features: Features, bits: [(Features, Self); 6]) -> Self {
        let taken = bits.into_iter().filter(|(feature, _)| features.contains(*feature));
        taken.fold(Self::NONE, |marks, (_, bit)| marks.with(bit))
    }

    /// What a back-end does for its front-end (virtio 1.3, 5.1.3).
    pub(crate) fn host(features: Features) -> Self {
        // Without CSUM none of the others may be (5.1.3.1).
        if !features.contains(Features::NET_CSUM) {
            return Self::NONE;
        }
        let uso = features.contains(Features::NET_HOST_USO);
        let bits = [
            (Features::NET_CSUM, Self::CHECKSUM),
            (Features::NET_HOST_TSO4, Self::TCP4),
            (Features::NET_HOST_TSO6, Self::TCP6),
            (Features::NET_HOST_ECN, Self::ECN),
            (Features::NET_HOST_USO, Self::UDP4),
            (Features::NET_HOST_USO, if uso { Self::UDP6 } else { Self::NONE }),
        ];
        Self::of(features, bits)
    }

    /// What a front-end takes from its back-end.
    pub(crate) fn guest(features: Features) -> Self {
        if !features.contains(Features::NET_GUEST_CSUM) {
            return Self::NONE;
        }
        let bits = [
            (Features::NET_GUEST_CSUM, Self::CHECKSUM),
            (Features::NET_GUEST_TSO4, Self::TCP4),
            (Features::NET_GUEST_TSO6, Self::TCP6),
            (Features::NET_GUEST_ECN, Self::ECN),
            (Features::NET_GUEST_USO4, Self::UDP4),
            (Features::NET_GUEST_USO6, Self::UDP6),
        ];
        Self::of(features, bits)
    }

    fn segmentation(network: Network, transport: Transport) -> Option<Self> {
        Some(match (network, transport) {
            (Network::Ipv4, Transport::Tcp) => Self::TCP4,
            (Network::Ipv6, Transport::Tcp) => Self::TCP6,
            (Network::Ipv4, Transport::Udp) => Self::UDP4,
            (Network::Ipv6, Transport::Udp) => Self::UDP6,
            _ => return None,
        })
    }

    fn gso_type(self) -> GsoType {
        let kind = match self.without(Self(!Self::SEGMENTATION.0)) {
            Self::TCP4 => GsoType::TCPV4,
            Self::TCP6 => GsoType::TCPV6,
            Self::NONE => GsoType::NONE,
            _ => GsoType::UDP_L4,
        };
        GsoType(kind.0 | if self.has(Self::ECN) { GsoType::ECN } else { 0 })
    }
}

/// What is known of a packet's TCP or UDP checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// Nothing.
    Unknown,
    /// It was found right by the other side.
    Right,
    /// It is open: to be completed, by whoever sends the packet to a wire. A packet that was received so never was on
    /// one, and is right.
    Open(Partial),
}

/// How a packet is to be cut, or was joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segmentation {
    /// Into what.
    pub kind: GsoType,
    /// Bytes of payload of each packet.
    pub size: u16,
}

/// What a packet cannot be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OffloadError {
    /// Its checksum.
    #[error("no TCP or UDP header whose checksum could be made: {network:?}, {transport:?}")]
    NoChecksum {
        /// Its network header.
        network: Network,
        /// Its transport header.
        transport: Transport,
    },
    /// To be cut.
    #[error(transparent)]
    Uncuttable(#[from] Uncuttable),
}

impl Packet {
    /// The first bytes, by value: all headers.
    fn head(&self) -> ([u8; MAX_HEADERS], usize) {
        let mut bytes = [0; MAX_HEADERS];
        let n = self.copy_to(&mut bytes);
        (bytes, n)
    }

    fn headers(&self) -> Option<Headers> {
        let (bytes, n) = self.head();
        Headers::parse(&bytes[..n], self.len())
    }

    fn sum_from(&self, start: usize) -> Sum {
        let mut sum = Sum::new();
        let len = self.len();
        if start < len {
            // SAFETY: `pieces` gives parts of the frame.
            self.pieces(start, len - start, |bytes, _, n| unsafe { sum.add_raw(bytes, n) });
        }
        sum
    }

    /// Asks for the checksums of the IPv4 header, if there is one, and of the TCP or UDP header. Where the other side of
    /// the port can, it makes the latter; where not, it is made when the packet is sent.
    ///
    /// The fields of the headers are to be in place. Asked once, it is to be asked again after they were changed.
    ///
    /// # Errors
    /// [`OffloadError::NoChecksum`]: nothing is changed.
    pub fn request_checksum(&mut self) -> Result<(), OffloadError> {
        let (mut bytes, n) = self.head();
        let len = self.len();
        let none = |headers: Option<Headers>| OffloadError::NoChecksum {
            network: headers.map_or(Network::Other, |h| h.network),
            transport: headers.map_or(Transport::Other(u8::MAX), |h| h.transport),
        };
        let headers = Headers::parse(&bytes[..n], len);
        let Some(headers) = headers.filter(|h| h.checksum_offset().is_some() && !h.routed) else {
            return Err(none(headers));
        };
        // Padding is no part of what is summed, and a header says only where to begin: with padding it is made at once.
        let Some(partial) = Partial::open(&Headers { end: len, ..headers }, &mut bytes[..n], len) else {
            return Err(none(Some(headers)));
        };
        if headers.end != len {
            let end = headers.end - headers.transport_at;
            let Some(mut sum) = crate::offload::checksum::pseudo(&headers, &bytes[..n], end) else {
                return Err(none(Some(headers)));
            };
            bytes[partial.field()..][..2].fill(0);
            let _ = self.write_at(partial.field(), &[0, 0]);
            // SAFETY: `pieces` gives parts of the frame.
            self.pieces(headers.transport_at, end, |bytes, _, n| unsafe {
                sum.add_raw(bytes, n)
            });
            bytes[partial.field()..][..2].copy_from_slice(&sum.checksum_not_zero());
        }
        set_ipv4(&headers, &mut bytes[..n]);
        let range = headers.network_at..headers.payload_at;
        // In the frame: it was read from there.
        let _ = self.write_at(headers.network_at, &bytes[range]);
        let meta = self.meta_mut();
        meta.marks = if meta.marks.has(Marks::TAG) {
            Marks::TAG
        } else {
            Marks::NONE
        };
        if headers.end == len {
            self.set_checksum(partial);
        }
        Ok(())
    }

    /// Asks for the packet to be cut into packets of `size` bytes of payload each, and for their checksums. Where the
    /// other side of the port can, it does that; where not, it is done when the packet is sent.
    ///
    /// Of the headers, lengths and checksums need not be in place. A packet of no more payload is only asked a checksum
    /// for.
    ///
    /// # Errors
    /// [`OffloadError`]: nothing is changed.
    pub fn request_segmentation(&mut self, size: u16) -> Result<(), OffloadError> {
        let (mut bytes, n) = self.head();
        let len = self.len();
        let no_headers = Uncuttable::Headers {
            network: Network::Other,
            transport: Transport::Other(u8::MAX),
        };
        let headers = Headers::parse(&bytes[..n], len).ok_or(no_headers)?;
        let mark = Marks::segmentation(headers.network, headers.transport).ok_or(Uncuttable::Headers {
            network: headers.network,
            transport: headers.transport,
        })?;
        let segmenter = Segmenter::new(&bytes[..n], len, mark.gso_type(), size)?;
        let total = len - headers.network_at;
        if total > usize::from(u16::MAX) {
            return Err(OffloadError::Uncuttable(Uncuttable::Size {
                size,
                payload: len - headers.payload_at,
                headers: headers.payload_at - headers.network_at,
            }));
        }
        let mut put = |at: usize, value: usize| bytes[at..at + 2].copy_from_slice(&(value as u16).to_be_bytes());
        match headers.network {
            Network::Ipv6 => put(headers.network_at + 4, total - 40),
            _ => put(headers.network_at + 2, total),
        }
        if headers.transport == Transport::Udp {
            put(headers.transport_at + 4, len - headers.transport_at);
        }
        let range = headers.network_at..headers.payload_at;
        let _ = self.write_at(headers.network_at, &bytes[range]);
        self.request_checksum()?;
        if segmenter.packets() > 1 {
            let cwr = headers.transport == Transport::Tcp && bytes[headers.transport_at + 13] & 0x80 != 0;
            let meta = self.meta_mut();
            meta.gso_size = size;
            meta.hdr_len = headers.payload_at as u16;
            meta.marks = meta.marks.with(mark).with(if cwr { Marks::ECN } else { Marks::NONE });
            meta.set_asks();
        }
        Ok(())
    }

    /// Says that a checksum is open: the sum of what it covers besides the packet's bytes stands in its place already.
    /// [`request_checksum`](Packet::request_checksum) finds out where that is by itself.
    pub fn set_checksum(&mut self, partial: Partial) {
        let meta = self.meta_mut();
        meta.partial = partial;
        meta.set_asks();
        meta.marks = meta.marks.without(Marks::RIGHT).with(Marks::CHECKSUM);
        // The header is not to be taken for zero.
        meta.zeroed_at = 0;
    }

    /// The VLAN tag that is not in the frame's bytes, if there is one: priority, DEI and id. A port that takes tags out of
    /// what it receives (`vlan_strip=1`) puts it here, and every port that sends the packet puts it into the frame.
    #[inline]
    pub fn vlan_tag(&self) -> Option<u16> {
        let meta = self.meta();
        meta.marks.has(Marks::TAG).then_some(meta.tag)
    }

    /// Has a VLAN tag put into the frame when it is sent: by the device, where it can, else here. `None`: no tag, also if
    /// one was taken out of it.
    pub fn set_vlan_tag(&mut self, tag: Option<u16>) {
        let meta = self.meta_mut();
        match tag {
            Some(tag) => {
                meta.tag = tag;
                meta.marks = meta.marks.with(Marks::TAG);
                meta.set_asks();
                // The header is not to be taken for zero.
                meta.zeroed_at = 0;
            }
            None => meta.marks = meta.marks.without(Marks::TAG),
        }
    }

    /// Puts the tag into the frame. `false`: there is no room before it, or no Ethernet header.
    fn insert_tag(&mut self) -> bool {
        let Some(tag) = self.vlan_tag() else { return true };
        let Some(addresses) = self.header::<12>() else {
            return false;
        };
        if self.prepend(&addresses[..4]).is_err() {
            return false;
        }
        let mut header = [0; 16];
        header[..12].copy_from_slice(&addresses);
        header[12..14].copy_from_slice(&[0x81, 0x00]);
        header[14..].copy_from_slice(&tag.to_be_bytes());
        let meta = self.meta_mut();
        meta.marks = meta.marks.without(Marks::TAG);
        self.write_at(0, &header).is_ok()
    }

    /// Where the headers are, for a device that makes checksums by the headers' kind. `None`: the checksum that is open is
    /// none of those.
    pub(crate) fn device_headers(&self) -> Option<Headers> {
        let headers = self.headers()?;
        let marks = self.meta().marks;
        let partial = self.meta().partial;
        let fits = !marks.has(Marks::CHECKSUM)
            || usize::from(partial.start) == headers.transport_at
                && headers.checksum_offset() == Some(usize::from(partial.offset));
        fits.then_some(headers)
    }

    /// Makes the headers of a packet that a device cuts what it wants to find (82599 datasheet, 7.2.4): no length and no
    /// checksum in an IPv4 header, no length in that of IPv6, the sum of the pseudo header without a length in that of TCP.
    /// Doing it twice changes nothing more.
    pub(crate) fn prepare_for_device(&mut self, headers: &Headers) -> bool {
        let (mut bytes, n) = self.head();
        let Some(sum) = crate::offload::checksum::pseudo(headers, &bytes[..n], 0) else {
            return false;
        };
        let (network, length) = match headers.network {
            Network::Ipv4 => (headers.network_at, 2),
            Network::Ipv6 => (headers.network_at, 4),
            Network::Other => return false,
        };
        bytes[network + length..][..2].fill(0);
        if headers.network == Network::Ipv4 {
            bytes[network + 10..][..2].fill(0);
        }
        bytes[headers.transport_at + 16..][..2].copy_from_slice(&sum.partial());
        self.write_at(network, &bytes[network..headers.payload_at]).is_ok()
    }

    /// Takes back all that was asked for, and all that is known.
    #[inline]
    pub fn clear_offloads(&mut self) {
        let meta = self.meta_mut();
        meta.marks = Marks::NONE;
        meta.clear_asks();
    }

    /// What is known of the checksum, without a look at the bytes. See [`verify_checksum`](Packet::verify_checksum).
    #[inline]
    pub fn checksum(&self) -> Checksum {
        let meta = self.meta();
        if meta.marks.has(Marks::CHECKSUM) {
            Checksum::Open(meta.partial)
        } else if meta.marks.has(Marks::RIGHT) {
            Checksum::Right
        } else {
            Checksum::Unknown
        }
    }

    /// Whether the checksums are right, as the other side said or else by summing.
    pub fn verify_checksum(&self) -> Verdict {
        if self.checksum() != Checksum::Unknown {
            return Verdict::Right;
        }
        let (bytes, n) = self.head();
        let Some(headers) = Headers::parse(&bytes[..n], self.len()) else {
            return Verdict::Unknown;
        };
        let Some(mut check) = Check::new(&headers, &bytes[..n]) else {
            return Verdict::Wrong;
        };
        // SAFETY: `pieces` gives parts of the frame.
        self.pieces(0, self.len(), |bytes, _, n| unsafe { check.add_raw(bytes, n) });
        check.verdict()
    }

    /// Makes the checksum now, if it is open: for whoever hands the bytes on, elsewhere than to a port. `false`: its place
    /// is not in the packet.
    pub fn complete_checksum(&mut self) -> bool {
        let Checksum::Open(partial) = self.checksum() else {
            return true;
        };
        if !partial.fits(self.len()) {
            return false;
        }
        let checksum = self.sum_from(partial.start.into()).checksum_not_zero();
        let meta = self.meta_mut();
        meta.marks = meta.marks.without(Marks::CHECKSUM);
        self.write_at(partial.field(), &checksum).is_ok()
    }

    /// How the packet is to be cut; if it was received so, how it was joined.
    #[inline]
    pub fn segmentation(&self) -> Option<Segmentation> {
        let meta = self.meta();
        meta.marks.has(Marks::SEGMENTATION).then(|| Segmentation {
            kind: meta.marks.gso_type(),
            size: meta.gso_size,
        })
    }

    /// Bytes of the longest frame that the packet is, or is to be cut into; and how many of those are VLAN tags, of which
    /// at most two count.
    pub(crate) fn longest_frame(&self) -> (usize, usize) {
        let len = self.len();
        let cut = self.segmentation().and_then(|how| {
            let headers = self.headers()?;
            Some(len.min(headers.payload_at + usize::from(how.size)))
        });
        let tag = |at: usize| {
            let mut kind = [0; 2];
            self.read_at(at, &mut kind)
                .is_ok_and(|()| matches!(kind, [0x81, 0x00] | [0x88, 0xa8]))
        };
        let tags = match (tag(12), tag(16)) {
            (false, _) => 0,
            (true, false) => 4,
            (true, true) => 8,
        };
        (cut.unwrap_or(len), tags)
    }

    /// The hash of receive-side scaling, made now, and over what it is: the most of `types` that the packet has.
    pub fn hash(&self, toeplitz: &Toeplitz, types: HashTypes) -> (u32, HashReport) {
        let (bytes, n) = self.head();
        match Headers::parse(&bytes[..n], self.len()) {
            Some(headers) => toeplitz.report(&headers, &bytes[..n], types),
            None => (0, HashReport::NONE),
        }
    }

    /// The hash that the other side of the port made of the packet, and over what it is; `None`: it reported none. With
    /// `rss=1` in the spec of a `virtio-user` port whose back-end offers VIRTIO_NET_F_HASH_REPORT, and on `vf` ports. Where it does not,
    /// [`hash`](Packet::hash) makes one. The other side can say what it likes: check where it matters.
    #[inline]
    pub fn received_hash(&self) -> Option<(u32, HashReport)> {
        let meta = self.meta();
        meta.marks
            .has(Marks::HASH)
            .then_some((meta.hash, HashReport(meta.hash_report)))
    }

    /// Takes over the hash of a long header.
    pub(crate) fn take_hash(&mut self, header: &Header) {
        if header.hash_report != HashReport::NONE {
            let meta = self.meta_mut();
            (meta.hash, meta.hash_report) = (header.hash_value, header.hash_report.0);
            meta.marks = meta.marks.with(Marks::HASH);
        }
    }

    /// After the frame's first byte moved: `by` bytes are before it now that were not, or, below 0, are no more.
    pub(super) fn shift_offloads(&mut self, by: isize) {
        let meta = self.meta_mut();
        if !meta.marks.has(Marks::HEADER) {
            return;
        }
        let shift = |value: u16| u16::try_from(value as isize + by).ok();
        let start = shift(meta.partial.start);
        match (start, shift(meta.hdr_len)) {
            (Some(start), Some(hdr_len)) => {
                meta.partial.start = start;
                meta.hdr_len = hdr_len;
            }
            (Some(start), None) if !meta.marks.has(Marks::SEGMENTATION) => meta.partial.start = start,
            // The headers are gone.
            _ => meta.marks = Marks::NONE,
        }
        meta.zeroed_at = 0;
    }

    pub(super) fn copy_offloads(&mut self, other: &Packet) {
        let from = other.meta();
        let meta = self.meta_mut();
        meta.marks = from.marks;
        if from.marks != Marks::NONE {
            (meta.partial, meta.gso_size, meta.hdr_len) = (from.partial, from.gso_size, from.hdr_len);
            (meta.hash, meta.hash_report) = (from.hash, from.hash_report);
            meta.tag = from.tag;
            meta.zeroed_at = 0;
            if from.marks.has(Marks::ASKED) {
                meta.set_asks();
            }
        }
    }

    /// Takes over what the header that came with the packet says, if it says only what is among `may`: what was
    /// negotiated. `false`: it makes no sense.
    #[inline]
    pub(crate) fn take_header(&mut self, bytes: &[u8; NET_HEADER], may: Marks) -> bool {
        // `flags` and `gso_type`: of nearly all packets, nothing.
        if bytes[0] == 0 && bytes[1] == 0 {
            return true;
        }
        self.take_header_slow(bytes, may)
    }

    #[inline(never)]
    fn take_header_slow(&mut self, bytes: &[u8; NET_HEADER], may: Marks) -> bool {
        let Some(header) = Header::parse(bytes) else {
            return false;
        };
        let len = self.len();
        let partial = Partial {
            start: header.csum_start,
            offset: header.csum_offset,
        };
        let open = header.flags.contains(HeaderFlags::NEEDS_CSUM);
        if open && (!may.has(Marks::CHECKSUM) || !partial.fits(len)) {
            return false;
        }
        let mut marks = Marks::NONE;
        if header.gso_type != GsoType::NONE {
            let headers = self.headers();
            let Some(mark) = headers.and_then(|h| Marks::segmentation(h.network, h.transport)) else {
                return false;
            };
            let ecn = header.gso_type.has_ecn();
            let asks = mark.with(if ecn { Marks::ECN } else { Marks::NONE });
            // A packet that is cut has a new checksum for each (5.1.6.2.1, 5.1.6.4.1).
            if mark.gso_type() != header.gso_type.kind() || asks.beyond(may) || !open || header.gso_size == 0 {
                return false;
            }
            marks = asks;
        }
        if !open && header.flags.contains(HeaderFlags::DATA_VALID) {
            marks = Marks::RIGHT;
        }
        if open {
            self.set_checksum(partial);
        }
        let meta = self.meta_mut();
        meta.marks = meta.marks.with(marks);
        meta.gso_size = header.gso_size;
        meta.hdr_len = header.hdr_len.min(u16::try_from(len).unwrap_or(u16::MAX));
        true
    }
}

/// The virtio-net header of a packet that asks for something. `buffers` is 0 to a device and the number of buffers to a
/// driver.
pub(crate) fn emit_header(meta: &Meta, buffers: u16) -> [u8; NET_HEADER] {
    let mut header = Header {
        num_buffers: buffers,
        ..Header::default()
    };
    if meta.marks.has(Marks::CHECKSUM) {
        header.flags = HeaderFlags::NEEDS_CSUM;
        (header.csum_start, header.csum_offset) = (meta.partial.start, meta.partial.offset);
    }
    if meta.marks.has(Marks::SEGMENTATION) {
        header.gso_type = meta.marks.gso_type();
        (header.gso_size, header.hdr_len) = (meta.gso_size, meta.hdr_len);
    }
    let mut bytes = [0; NET_HEADER];
    header.emit(&mut bytes);
    bytes
}

/// What became of a packet that asked for more than the other side takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Handled {
    /// It asks for nothing any more: send it.
    Ready,
    /// It was cut: send what it was cut into.
    Cut,
    /// Not now: there are too few buffers.
    NoBuffers,
    /// It cannot be.
    Never,
}

/// Does in software what `packet` asks for. Packets that it is cut into are added to `cut`.
pub(crate) fn handle(packet: &mut Packet, cache: &mut Cache, cut: &mut Burst) -> Handled {
    if !packet.insert_tag() {
        return Handled::Never;
    }
    let Some(Segmentation { kind, size }) = packet.segmentation() else {
        if !packet.complete_checksum() {
            return Handled::Never;
        }
        packet.meta_mut().clear_asks();
        return Handled::Ready;
    };
    let (bytes, n) = packet.head();
    let Ok(mut segmenter) = Segmenter::new(&bytes[..n], packet.len(), kind, size) else {
        return Handled::Never;
    };
    let needed = segmenter.packets() * segmenter.longest().div_ceil(cache.pool().room() as usize);
    if needed > cache.most() {
        return Handled::Never;
    }
    if cut.capacity() < MAX_PACKETS {
        // The first one.
        *cut = Burst::new(MAX_PACKETS);
    }
    if segmenter.packets() > cut.room() || cache.reserve(needed) < needed {
        return Handled::NoBuffers;
    }
    while let Some(next) = segmenter.next() {
        let Some(meta) = cache.pop() else {
            return Handled::Cut;
        };
        // SAFETY: just taken from the cache.
        let mut piece = unsafe { Packet::from_meta(meta) };
        let (at, payload) = (next.packet_len() - next.payload().len(), next.payload());
        // The bytes are summed where they were put: nobody else has that memory yet.
        if piece.set_len(next.packet_len()).is_ok() && piece.copy_part(at, packet, payload) {
            let _ = piece.write_at(0, next.headers(piece.sum_from(at)));
            let _ = cut.push(piece);
        }
    }
    Handled::Cut
}

#[cfg(test)]
#[path = "offload_tests.rs"]
mod tests;
