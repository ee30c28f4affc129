//! The receive engine: a small packet buffer for each queue, descriptors, write-back (datasheet 7.1).

use std::collections::VecDeque;

use crate::complaint::{Complaint, Complaints};
use crate::dma::Windows;
use crate::frame::{Check, Ip, Layers, SCTP, TCP, UDP, check_transport};
use crate::kind::Kind;
use crate::register::{rxdctl, srrctl};
use crate::ring::Ring;
use crate::rss::{HashType, KEY_BYTES, hash};
use crate::stats::{Counters, Drops};
use crate::switch::remove_tag;

/// Bytes that wait for descriptors, at most.
const WAITING_BYTES: usize = 128 * 1024;
/// The same for tests that must lose nothing: more than all rings of a driver can have under way.
const HELD_BYTES: usize = 64 * 1024 * 1024;

/// Bits of the status dword.
mod status {
    pub const DONE: u32 = 1 << 0;
    pub const END: u32 = 1 << 1;
    pub const TAG: u32 = 1 << 3;
    pub const UDP_CHECKED: u32 = 1 << 4;
    pub const TRANSPORT_CHECKED: u32 = 1 << 5;
    pub const IP_CHECKED: u32 = 1 << 6;
    pub const LOOPBACK: u32 = 1 << 18;
    pub const TRANSPORT_ERROR: u32 = 1 << 30;
    pub const IP_ERROR: u32 = 1 << 31;
}

/// Bits of the packet type, in the first dword.
mod packet_type {
    pub const IPV4: u32 = 0x10;
    pub const IPV4_OPTIONS: u32 = 0x20;
    pub const IPV6: u32 = 0x40;
    pub const IPV6_EXTENSIONS: u32 = 0x80;
    pub const TCP: u32 = 0x100;
    pub const UDP: u32 = 0x200;
    pub const SCTP: u32 = 0x400;
}

/// A frame in the packet buffer, with what its last descriptor will say.
#[derive(Clone, Debug)]
struct Waiting {
    bytes: Vec<u8>,
    packet_type: u32,
    hash: u32,
    status: u32,
    tag: u16,
}

/// One receive queue.
#[derive(Clone, Debug, Default)]
pub(crate) struct RxQueue {
    pub ring: Ring,
    pub dca: u32,
    pub srrctl: u32,
    pub rsc: u32,
    waiting: VecDeque<Waiting>,
    waiting_bytes: usize,
}

/// How frames are spread over queues.
pub(crate) struct Spread<'a> {
    /// Types of MRQC; 0: everything goes to queue 0.
    pub types: u32,
    pub key: &'a [u8; KEY_BYTES],
    pub table: &'a [u8],
    /// Bits of a table's entry that count.
    pub mask: u8,
}

impl Spread<'_> {
    /// The queue of a frame, and what the descriptor says of the hash.
    pub fn queue(&self, frame: &[u8], layers: &Layers) -> (usize, Option<(HashType, u32)>) {
        let hash = if self.types == 0 {
            None
        } else {
            hash(frame, layers, self.types, self.key)
        };
        let queue = hash.map_or(0, |(_, hash)| self.table[hash as usize % self.table.len()] & self.mask);
        (usize::from(queue), hash)
    }
}

/// A frame on its way in.
pub(crate) struct Arriving {
    pub frame: Vec<u8>,
    /// It comes from another VF.
    pub loopback: bool,
    /// The tag is the PF's business: off, and not a word of it.
    pub hide_tag: bool,
}

impl RxQueue {
    /// A reset of the VF.
    pub fn reset_vf(&mut self) {
        self.ring.reset_vf();
        self.waiting.clear();
        self.waiting_bytes = 0;
    }

    /// The PF has reset: nothing is left.
    pub fn reset_all(&mut self) {
        *self = Self {
            srrctl: srrctl::RESET,
            ..Self::default()
        };
    }

    /// Frames that wait for descriptors.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    fn buffer_bytes(&self) -> usize {
        (self.srrctl & srrctl::PACKET_SIZE) as usize * 1024
    }

    /// Whether there are descriptors for a frame behind those that came in the same step and are not placed yet.
    fn has_room_for(&self, len: usize) -> bool {
        let size = self.buffer_bytes().max(1);
        let waiting = self.waiting.iter().map(|frame| frame.bytes.len().div_ceil(size));
        waiting.sum::<usize>() + len.div_ceil(size) <= self.ring.available() as usize
    }

    /// Takes a frame into the packet buffer, or drops it.
    pub fn accept(
        &mut self,
        arriving: Arriving,
        layers: &Layers,
        hashed: Option<(HashType, u32)>,
        kind: Kind,
        hold: bool,
        drops: &mut Drops,
    ) {
        let Arriving {
            mut frame,
            loopback,
            hide_tag,
        } = arriving;
        if !self.ring.works() {
            drops.queue_off += 1;
            return;
        }
        let limit = (self.ring.control & rxdctl::RLPML) as usize;
        if kind.limits_queue_frames() && self.ring.control & rxdctl::RLPML_ENABLE != 0 && frame.len() > limit {
            drops.too_long += 1;
            return;
        }
        let (mut status, packet_type) = describe(&frame, layers, kind);
        if loopback {
            status |= status::LOOPBACK;
        }
        let mut tag = 0;
        if hide_tag {
            remove_tag(&mut frame);
        } else if layers.tag.is_some() {
            status |= status::TAG;
            if self.ring.control & rxdctl::VLAN_STRIP != 0 {
                tag = remove_tag(&mut frame).unwrap_or(0);
            }
        }
        let drop_now = self.srrctl & srrctl::DROP != 0 && !hold && !self.has_room_for(frame.len());
        let limit = if hold { HELD_BYTES } else { WAITING_BYTES };
        if drop_now || self.waiting_bytes + frame.len() > limit {
            drops.no_descriptor += 1;
            return;
        }
        self.waiting_bytes += frame.len();
        self.waiting.push_back(Waiting {
            bytes: frame,
            packet_type: packet_type | hashed.map_or(0, |(kind, _)| kind as u32),
            hash: hashed.map_or(0, |(_, hash)| hash),
            status,
            tag,
        });
    }

    /// Moves waiting frames to memory: how many.
    pub fn run(
        &mut self,
        dma: &mut Windows,
        complaints: &mut Complaints,
        counters: &mut Counters,
        drops: &mut Drops,
    ) -> usize {
        let mut moved = 0;
        while !self.waiting.is_empty() && self.ring.can_run(complaints) {
            let size = self.buffer_bytes();
            let advanced = self.srrctl & srrctl::DESCRIPTOR == srrctl::ADVANCED_ONE_BUFFER;
            let Some(frame) = self.waiting.front() else {
                break;
            };
            let needed = if size == 0 {
                u32::MAX
            } else {
                frame.bytes.len().div_ceil(size) as u32
            };
            if !advanced || size == 0 {
                complaints.add(Complaint::BadRxDescriptorKind);
                drops.no_descriptor += 1;
            } else if needed >= self.ring.count() {
                drops.too_long += 1;
            } else if needed > self.ring.available() {
                break;
            }
            let fits = advanced && needed < self.ring.count();
            let Some(frame) = self.waiting.pop_front() else {
                break;
            };
            self.waiting_bytes -= frame.bytes.len();
            if !fits {
                continue;
            }
            if self.place(&frame, size, dma).is_none() {
                break;
            }
            counters.received(&frame.bytes);
            moved += 1;
        }
        moved
    }

    /// Writes one frame, and its descriptors.
    fn place(&mut self, frame: &Waiting, size: usize, dma: &mut Windows) -> Option<()> {
        let pieces = frame.bytes.chunks(size);
        let last = pieces.len() - 1;
        for (i, piece) in pieces.enumerate() {
            let at = self.ring.head;
            let [address, _] = self.ring.read_descriptor(at, dma, "receive descriptor")?;
            let written = dma.write(address, piece, "receive buffer");
            self.ring.or_halt(written)?;
            let halves = if i == last {
                let status = frame.status | status::DONE | status::END;
                [
                    u64::from(frame.packet_type) | u64::from(frame.hash) << 32,
                    u64::from(status) | (piece.len() as u64) << 32 | u64::from(frame.tag) << 48,
                ]
            } else {
                [0, u64::from(status::DONE) | (piece.len() as u64) << 32]
            };
            let written = dma.write_descriptor(self.ring.address(at), halves, "receive write-back");
            self.ring.or_halt(written)?;
            self.ring.head = self.ring.next(at);
        }
        Some(())
    }
}

/// Status, errors and packet type of a frame.
fn describe(frame: &[u8], layers: &Layers, kind: Kind) -> (u32, u32) {
    let mut status = 0;
    let mut packet_type = 0;
    match layers.ip {
        Some((Ip::V4 { options, checksum_ok }, _)) => {
            packet_type |= if options {
                packet_type::IPV4_OPTIONS
            } else {
                packet_type::IPV4
            };
            status |= status::IP_CHECKED;
            if !checksum_ok {
                status |= status::IP_ERROR;
            }
        }
        Some((Ip::V6 { extensions }, _)) => {
            packet_type |= if extensions {
                packet_type::IPV6_EXTENSIONS
            } else {
                packet_type::IPV6
            };
        }
        None => {}
    }
    packet_type |= match layers.transport {
        Some((TCP, ..)) => packet_type::TCP,
        Some((UDP, ..)) => packet_type::UDP,
        Some((SCTP, ..)) => packet_type::SCTP,
        _ => 0,
    };
    let udp = matches!(layers.transport, Some((UDP, ..)));
    let udp_bit = if udp { status::UDP_CHECKED } else { 0 };
    status |= match check_transport(frame, layers) {
        Check::None => 0,
        // Erratum 44 of the 82599: UDP over IPv4 without a checksum is taken for wrong.
        Check::Absent if kind == Kind::I82599 => status::TRANSPORT_CHECKED | udp_bit | status::TRANSPORT_ERROR,
        Check::Absent => 0,
        Check::Right => status::TRANSPORT_CHECKED | udp_bit,
        Check::Wrong => status::TRANSPORT_CHECKED | udp_bit | status::TRANSPORT_ERROR,
    };
    (status, packet_type)
}
