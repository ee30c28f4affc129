//! The transmit engine: descriptors, contexts, write-back (datasheet 7.2).

use crate::complaint::{Complaint, Complaints};
use crate::dma::Windows;
use crate::offload::{Context, Wanted, frames};
use crate::pf::LONGEST_FRAME;
use crate::register::tdwba;
use crate::ring::{Halt, Ring};
use crate::stats::Offloads;

/// Data descriptors that one packet may have.
const SEGMENTS: usize = 40;
/// Frames on the wire are no shorter, CRC apart.
const SHORTEST: usize = 60;
/// Packets in memory are no shorter.
const SHORTEST_IN_MEMORY: usize = 17;

/// Bits of the command dword of an advanced descriptor.
mod command {
    pub const TYPE: u32 = 0xf << 20;
    pub const CONTEXT: u32 = 2 << 20;
    pub const DATA: u32 = 3 << 20;
    pub const END: u32 = 1 << 24;
    pub const CRC: u32 = 1 << 25;
    pub const REPORT: u32 = 1 << 27;
    pub const EXTENDED: u32 = 1 << 29;
    pub const TAG: u32 = 1 << 30;
    pub const SEGMENT: u32 = 1 << 31;
}

/// Bits of the status dword.
mod olinfo {
    pub const CHECK_CONTEXT: u32 = 1 << 7;
    pub const IP_CHECKSUM: u32 = 1 << 8;
    pub const TRANSPORT_CHECKSUM: u32 = 1 << 9;
}

/// DD, in the second quadword of what is written back.
const DONE: u64 = 1 << 32;

/// One transmit queue.
#[derive(Clone, Debug, Default)]
pub(crate) struct TxQueue {
    pub ring: Ring,
    pub dca: u32,
    pub writeback: u64,
    contexts: [Option<Context>; 2],
}

/// What the engine needs of the rest of the device.
pub(crate) struct TxWorld<'a> {
    pub dma: &'a mut Windows,
    pub complaints: &'a mut Complaints,
    pub offloads: &'a mut Offloads,
    pub malicious_detection: bool,
    /// Descriptors and frames that may still be handled in this step.
    pub budget: usize,
    pub no_crc: u64,
}

/// One packet as it was gathered.
struct Packet {
    bytes: Vec<u8>,
    command: u32,
    olinfo: u32,
    next: u32,
    pieces: usize,
    reports: Vec<u32>,
}

enum Gathered {
    /// A context was loaded.
    Context,
    Packet(Packet),
    /// The tail comes before the end of the packet, or the queue has been halted.
    Nothing,
}

impl TxQueue {
    /// A reset of the VF.
    pub fn reset_vf(&mut self) {
        self.ring.reset_vf();
        self.contexts = [None; 2];
        self.writeback = 0;
    }

    /// Sends what can be sent: the frames, and whether something was reported as done.
    pub fn run(&mut self, world: &mut TxWorld<'_>) -> (Vec<Vec<u8>>, bool) {
        let mut sent = Vec::new();
        let mut reported = false;
        while world.budget > 0 && self.ring.can_run(world.complaints) && self.ring.head != self.ring.tail {
            match self.gather(world) {
                Gathered::Nothing => break,
                Gathered::Context => world.budget -= 1,
                Gathered::Packet(packet) => {
                    let (next, reports) = (packet.next, packet.reports.clone());
                    let Some(frames) = self.finish(packet, world) else {
                        break;
                    };
                    world.budget = world.budget.saturating_sub(1 + frames.len());
                    sent.extend(frames);
                    self.ring.head = next;
                    if !reports.is_empty() {
                        if self.report(&reports, world.dma).is_none() {
                            break;
                        }
                        reported = true;
                    }
                }
            }
        }
        (sent, reported)
    }

    fn halt(&mut self, complaint: Complaint, halt: Halt, complaints: &mut Complaints) {
        complaints.add(complaint);
        self.ring.halted = Some(halt);
    }

    fn malformed(&mut self, world: &mut TxWorld<'_>) {
        let halt = if world.malicious_detection {
            Halt::Malicious
        } else {
            Halt::Malformed
        };
        self.halt(Complaint::BadTxDescriptor, halt, world.complaints);
    }

    /// Loads a context, or gathers one packet from the head on.
    fn gather(&mut self, world: &mut TxWorld<'_>) -> Gathered {
        let mut packet: Option<Packet> = None;
        let mut at = self.ring.head;
        while at != self.ring.tail {
            let Some(descriptor) = self.ring.read_descriptor(at, world.dma, "transmit descriptor") else {
                return Gathered::Nothing;
            };
            let next = self.ring.next(at);
            let command = descriptor[1] as u32;
            let kind = command & command::TYPE;
            if command & command::EXTENDED == 0 || !matches!(kind, command::CONTEXT | command::DATA) {
                self.malformed(world);
                return Gathered::Nothing;
            }
            if kind == command::CONTEXT {
                let slot = Context::index(descriptor);
                if packet.is_some() || slot >= self.contexts.len() {
                    self.malformed(world);
                    return Gathered::Nothing;
                }
                self.contexts[slot] = Some(Context::new(descriptor));
                self.ring.head = next;
                return Gathered::Context;
            }
            let packet = packet.get_or_insert_with(|| Packet {
                bytes: Vec::new(),
                command,
                olinfo: (descriptor[1] >> 32) as u32,
                next,
                pieces: 0,
                reports: Vec::new(),
            });
            let length = (command & 0xffff) as usize;
            packet.pieces += 1;
            if length == 0 || packet.pieces > SEGMENTS {
                self.malformed(world);
                return Gathered::Nothing;
            }
            let before = packet.bytes.len();
            packet.bytes.resize(before + length, 0);
            let read = world
                .dma
                .read(descriptor[0], &mut packet.bytes[before..], "transmit buffer");
            if self.ring.or_halt(read).is_none() {
                return Gathered::Nothing;
            }
            if command & command::REPORT != 0 {
                packet.reports.push(at);
            }
            at = next;
            packet.next = at;
            if command & command::END != 0 {
                break;
            }
            if at == self.ring.tail {
                return Gathered::Nothing;
            }
        }
        packet.map_or(Gathered::Nothing, Gathered::Packet)
    }

    /// The frames of a packet; none if the queue has been halted.
    fn finish(&mut self, packet: Packet, world: &mut TxWorld<'_>) -> Option<Vec<Vec<u8>>> {
        let Packet {
            bytes,
            command,
            olinfo,
            pieces,
            ..
        } = packet;
        let wanted = Wanted {
            ip_checksum: olinfo & olinfo::IP_CHECKSUM != 0,
            transport_checksum: olinfo & olinfo::TRANSPORT_CHECKSUM != 0,
            segment: command & command::SEGMENT != 0,
            tag: command & command::TAG != 0,
        };
        let context = self.contexts.get((olinfo >> 4 & 7) as usize).copied().flatten();
        let usable = context.filter(|context| context.mac_length >= 14);
        if olinfo & olinfo::CHECK_CONTEXT == 0 || usable.is_none() {
            world.complaints.add(Complaint::NoContext);
            if world.malicious_detection {
                self.ring.halted = Some(Halt::Malicious);
                return None;
            }
        }
        let headers = if wanted.segment {
            context.map_or(0, |context| context.headers())
        } else {
            0
        };
        let short = bytes.len() < SHORTEST_IN_MEMORY;
        if headers + (olinfo >> 14) as usize != bytes.len() {
            self.malformed(world);
            return None;
        }
        let Some(mut frames) = frames(bytes, wanted, context.as_ref()) else {
            self.malformed(world);
            return None;
        };
        if frames.iter().any(|frame| frame.len() > LONGEST_FRAME as usize) {
            self.malformed(world);
            return None;
        }
        let offloads = &mut *world.offloads;
        offloads.segmented += u64::from(wanted.segment);
        offloads.checksums += u64::from(wanted.transport_checksum);
        offloads.tagged += u64::from(wanted.tag);
        offloads.gathered += u64::from(pieces > 1);
        if short {
            world.complaints.add(Complaint::ShortTxPacket);
        }
        if command & command::CRC == 0 {
            world.no_crc += frames.len() as u64;
            frames.clear();
        }
        for frame in &mut frames {
            if frame.len() < SHORTEST {
                frame.resize(SHORTEST, 0);
            }
        }
        Some(frames)
    }

    /// Tells the driver what is done: the head in memory, or DD in each descriptor that asked for it.
    fn report(&mut self, reports: &[u32], dma: &mut Windows) -> Option<()> {
        if self.writeback & u64::from(tdwba::ENABLE) != 0 {
            let address = self.writeback & !3;
            let written = dma.write(address, &self.ring.head.to_le_bytes(), "head write-back");
            return self.ring.or_halt(written);
        }
        for index in reports {
            let written = dma.write_descriptor(self.ring.address(*index), [0, DONE], "transmit write-back");
            self.ring.or_halt(written)?;
        }
        Some(())
    }
}
