//! What is done to a packet on its way out: checksums, segmentation, the VLAN tag (datasheet 7.2.3 to 7.2.5).

use crate::frame::{crc32c, fold, sum};
use crate::switch::insert_tag;

/// A transmit context: where the headers lie, and the numbers for segmentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Context {
    pub mac_length: usize,
    pub ip_length: usize,
    pub transport_length: usize,
    pub vlan: u16,
    pub mss: usize,
    pub ipv4: bool,
    pub transport: Transport,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Udp,
    Tcp,
    Sctp,
    Reserved,
}

impl Context {
    /// From the descriptor (datasheet 7.2.3.2.3).
    pub fn new([low, high]: [u64; 2]) -> Self {
        Self {
            ip_length: (low & 0x1ff) as usize,
            mac_length: (low >> 9 & 0x7f) as usize,
            vlan: (low >> 16) as u16,
            ipv4: high & 1 << 10 != 0,
            transport: match high >> 11 & 3 {
                0 => Transport::Udp,
                1 => Transport::Tcp,
                2 => Transport::Sctp,
                _ => Transport::Reserved,
            },
            transport_length: (high >> 40 & 0xff) as usize,
            mss: (high >> 48) as usize,
        }
    }

    /// Which of the two contexts a descriptor loads.
    pub fn index([_, high]: [u64; 2]) -> usize {
        (high >> 36 & 7) as usize
    }

    fn transport_at(&self) -> usize {
        self.mac_length + self.ip_length
    }

    /// Bytes of all headers.
    pub fn headers(&self) -> usize {
        self.transport_at() + self.transport_length
    }
}

/// What a packet's first descriptor wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub ip_checksum: bool,
    pub transport_checksum: bool,
    pub segment: bool,
    pub tag: bool,
}

/// The frames that a packet becomes; none if the context does not fit it.
pub(crate) fn frames(packet: Vec<u8>, wanted: Wanted, context: Option<&Context>) -> Option<Vec<Vec<u8>>> {
    if wanted == Wanted::default() {
        return Some(vec![packet]);
    }
    let context = context?;
    let mut frames = if wanted.segment {
        segments(&packet, wanted, context)?
    } else {
        let mut packet = packet;
        if wanted.ip_checksum {
            insert_ip_checksum(&mut packet, context)?;
        }
        if wanted.transport_checksum {
            insert_transport_checksum(&mut packet, context, 0)?;
        }
        vec![packet]
    };
    if wanted.tag {
        for frame in &mut frames {
            if frame.len() < 14 {
                return None;
            }
            insert_tag(frame, context.vlan);
        }
    }
    Some(frames)
}

/// The checksum over the IP header. The driver has left the field zero.
fn insert_ip_checksum(packet: &mut [u8], context: &Context) -> Option<()> {
    if !context.ipv4 || context.ip_length < 20 {
        return None;
    }
    let header = packet.get_mut(context.mac_length..context.transport_at())?;
    let checksum = !fold(sum(0, header));
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
    Some(())
}

/// The checksum over everything from the transport header on. The driver has left the sum of the pseudo header in the
/// field, without the length when the packet is segmented: that comes as `extra`.
fn insert_transport_checksum(packet: &mut [u8], context: &Context, extra: u64) -> Option<()> {
    let bytes = packet.get_mut(context.transport_at()..)?;
    let field = match context.transport {
        Transport::Udp => 6,
        Transport::Tcp => 16,
        Transport::Sctp => {
            let checksum = crc32c(bytes);
            bytes.get_mut(8..12)?.copy_from_slice(&checksum.to_le_bytes());
            return Some(());
        }
        Transport::Reserved => return None,
    };
    let mut checksum = !fold(sum(extra, bytes));
    if checksum == 0 && context.transport == Transport::Udp {
        checksum = 0xffff;
    }
    bytes
        .get_mut(field..field + 2)?
        .copy_from_slice(&checksum.to_be_bytes());
    Some(())
}

/// TCP or UDP segmentation.
fn segments(packet: &[u8], wanted: Wanted, context: &Context) -> Option<Vec<Vec<u8>>> {
    const FIN_PSH: u8 = 0x09;
    const CWR: u8 = 0x80;
    let tcp = match context.transport {
        Transport::Tcp if context.transport_length >= 20 => true,
        Transport::Udp if context.transport_length == 8 => false,
        _ => return None,
    };
    let shortest_ip = if context.ipv4 { 20 } else { 40 };
    if context.mss == 0 || context.ip_length < shortest_ip || packet.len() <= context.headers() {
        return None;
    }
    let (headers, payload) = packet.split_at(context.headers());
    let pieces = payload.chunks(context.mss);
    let last = pieces.len() - 1;
    let mut frames = Vec::with_capacity(last + 1);
    for (i, piece) in pieces.enumerate() {
        let mut frame = [headers, piece].concat();
        let (ip, transport) = (context.mac_length, context.transport_at());
        let transport_bytes = context.transport_length + piece.len();
        if context.ipv4 {
            put16(&mut frame, ip + 2, (context.ip_length + transport_bytes) as u16);
            let id = u16::from_be_bytes([frame[ip + 4], frame[ip + 5]]);
            put16(&mut frame, ip + 4, id.wrapping_add(i as u16));
            if wanted.ip_checksum {
                insert_ip_checksum(&mut frame, context)?;
            }
        } else {
            put16(&mut frame, ip + 4, (context.ip_length - 40 + transport_bytes) as u16);
        }
        if tcp {
            let sequence = u32::from_be_bytes(frame[transport + 4..transport + 8].try_into().ok()?);
            let sequence = sequence.wrapping_add((i * context.mss) as u32);
            frame[transport + 4..transport + 8].copy_from_slice(&sequence.to_be_bytes());
            if i != last {
                frame[transport + 13] &= !FIN_PSH;
            }
            if i != 0 {
                frame[transport + 13] &= !CWR;
            }
        } else {
            put16(&mut frame, transport + 4, transport_bytes as u16);
        }
        if wanted.transport_checksum {
            insert_transport_checksum(&mut frame, context, transport_bytes as u64)?;
        }
        frames.push(frame);
    }
    Some(frames)
}

fn put16(frame: &mut [u8], at: usize, value: u16) {
    frame[at..at + 2].copy_from_slice(&value.to_be_bytes());
}
