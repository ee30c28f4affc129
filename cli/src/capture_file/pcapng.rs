//! pcapng (draft-ietf-opsawg-pcapng): sections, interfaces and their packets; other blocks are gone over.

use std::io::Read;

use super::pcap::ETHERNET;
use super::read::{Bytes, LONGEST, Next, Raw};
use super::{CaptureError, Why, time};

/// The type of a Section Header Block, the same in both byte orders.
pub const MAGIC: [u8; 4] = [0x0a, 0x0d, 0x0d, 0x0a];

/// Block types (section 4).
pub const SECTION: u32 = 0x0a0d_0d0a;
pub const INTERFACE: u32 = 1;
const OLD_PACKET: u32 = 2;
const SIMPLE_PACKET: u32 = 3;
pub const ENHANCED_PACKET: u32 = 6;

/// The byte-order magic of a section, as numbers are to be read.
pub const ORDER: u32 = 0x1a2b_3c4d;

/// The longest block that is read: a packet of the longest snapshot length with generous options.
const LONGEST_BLOCK: u32 = LONGEST + (64 << 10);

/// What an Interface Description Block says.
#[derive(Debug)]
struct Interface {
    link: u16,
    snaplen: u32,
    /// Parts of a second in timestamps.
    parts: u128,
    /// Seconds to add to them.
    shift: i64,
    fcs: u32,
}

/// A section, and its interfaces so far.
#[derive(Debug)]
pub struct Section {
    big_endian: bool,
    interfaces: Vec<Interface>,
}

/// More interfaces than this are no capture's.
const INTERFACES: usize = 1 << 16;

impl Section {
    /// Reads the first section's header, its block type being read already.
    pub fn first<R: Read>(bytes: &mut Bytes<R>) -> Result<Self, CaptureError> {
        let mut section = Section {
            big_endian: false,
            interfaces: Vec::new(),
        };
        let mut head = [0; 8];
        if let Err(short) = bytes.fill(&mut head)? {
            return Err(CaptureError::Truncated {
                found: 4 + short.found as usize,
                needed: 28,
            });
        }
        match section.begin(head, bytes)? {
            Ok(()) => Ok(section),
            Err(Why::Truncated { found, needed }) => Err(CaptureError::Truncated {
                found: found as usize,
                needed: needed as usize,
            }),
            Err(_) => Err(CaptureError::NotACapture {
                found: "its section header is wrong".to_owned(),
            }),
        }
    }

    /// Begins a section: `head` is its header's length and byte-order magic.
    fn begin<R: Read>(&mut self, head: [u8; 8], bytes: &mut Bytes<R>) -> Result<Result<(), Why>, CaptureError> {
        self.interfaces.clear();
        self.big_endian = match &head[4..] {
            [0x1a, 0x2b, 0x3c, 0x4d] => true,
            [0x4d, 0x3c, 0x2b, 0x1a] => false,
            _ => {
                return Ok(Err(Why::Odd(
                    "a section header without its byte-order magic".to_owned(),
                )));
            }
        };
        let length = self.u32(&head, 0);
        // Section 4.1: 28 bytes without options; a multiple of 4 is not insisted on.
        if !(28..=LONGEST_BLOCK).contains(&length) {
            return Ok(Err(Why::Odd(format!("a section header of {length} bytes"))));
        }
        let rest = bytes.skip(u64::from(length) - 12)?;
        Ok(rest.map_err(|short| Why::Truncated {
            found: 12 + short.found,
            needed: length.into(),
        }))
    }

    fn u32(&self, bytes: &[u8], at: usize) -> u32 {
        let word = bytes
            .get(at..at + 4)
            .and_then(|b| b.try_into().ok())
            .unwrap_or_default();
        if self.big_endian {
            u32::from_be_bytes(word)
        } else {
            u32::from_le_bytes(word)
        }
    }

    fn u16(&self, bytes: &[u8], at: usize) -> u16 {
        let word = bytes
            .get(at..at + 2)
            .and_then(|b| b.try_into().ok())
            .unwrap_or_default();
        if self.big_endian {
            u16::from_be_bytes(word)
        } else {
            u16::from_le_bytes(word)
        }
    }

    /// Bytes of the block that begins with these, if they are enough to tell.
    pub fn size(&self, bytes: &[u8]) -> Option<usize> {
        let header = bytes.get(..8)?;
        Some(self.u32(header, 4) as usize)
    }

    /// The next packet, its bytes in `frame`.
    pub fn next<R: Read>(&mut self, bytes: &mut Bytes<R>, frame: &mut Vec<u8>) -> Result<Next, CaptureError> {
        loop {
            let offset = bytes.offset;
            let mut head = [0; 8];
            if let Err(short) = bytes.fill(&mut head)? {
                let why = Why::Truncated {
                    found: short.found,
                    needed: short.needed,
                };
                return Ok(if short.found == 0 {
                    Next::End
                } else {
                    Next::Broken { offset, why }
                });
            }
            if head[..4] == MAGIC {
                let mut order = [0; 4];
                let begun = match bytes.fill(&mut order)? {
                    Ok(()) => {
                        let [.., a, b, c, d] = head;
                        let [e, f, g, h] = order;
                        self.begin([a, b, c, d, e, f, g, h], bytes)?
                    }
                    Err(short) => Err(Why::Truncated {
                        found: 8 + short.found,
                        needed: 12,
                    }),
                };
                match begun {
                    Ok(()) => continue,
                    Err(why) => return Ok(Next::Broken { offset, why }),
                }
            }
            let (kind, length) = (self.u32(&head, 0), self.u32(&head, 4));
            if length < 12 {
                let why = Why::Odd(format!("a block of {length} bytes: the rest is not read"));
                return Ok(Next::Broken { offset, why });
            }
            let body = length - 12;
            let cut = |found: u64| Why::Truncated {
                found: 8 + found,
                needed: length.into(),
            };
            let wanted = matches!(kind, INTERFACE | OLD_PACKET | SIMPLE_PACKET | ENHANCED_PACKET);
            if !wanted || length > LONGEST_BLOCK {
                if let Err(short) = bytes.skip(u64::from(body) + 4)? {
                    return Ok(Next::Broken {
                        offset,
                        why: cut(short.found),
                    });
                }
                if wanted {
                    frame.clear();
                    return Ok(Next::Record(Raw::odd(offset, format!("a block of {length} bytes"))));
                }
                continue;
            }
            frame.resize(body as usize + 4, 0);
            if let Err(short) = bytes.fill(frame)? {
                return Ok(Next::Broken {
                    offset,
                    why: cut(short.found),
                });
            }
            // The length stands at both ends of a block, for readers that go backwards: here it is a check.
            let end = self.u32(frame, body as usize);
            frame.truncate(body as usize);
            if end != length {
                let why = Why::Odd(format!(
                    "a block of {length} bytes that ends with length {end}: the rest is not read"
                ));
                return Ok(Next::Broken { offset, why });
            }
            if kind == INTERFACE {
                match self.interface(frame) {
                    Ok(interface) => self.interfaces.push(interface),
                    Err(odd) => {
                        return Ok(Next::Broken {
                            offset,
                            why: Why::Odd(odd),
                        });
                    }
                }
                continue;
            }
            let raw = match self.packet(kind, offset, frame) {
                Ok((raw, range)) => {
                    frame.copy_within(range.clone(), 0);
                    frame.truncate(range.len());
                    raw
                }
                Err(odd) => {
                    frame.clear();
                    Raw::odd(offset, odd)
                }
            };
            return Ok(Next::Record(raw));
        }
    }

    /// Section 4.2: link type, reserved, snapshot length, options.
    fn interface(&self, body: &[u8]) -> Result<Interface, String> {
        if body.len() < 8 || self.interfaces.len() >= INTERFACES {
            return Err("an interface description that is none".to_owned());
        }
        let mut interface = Interface {
            link: self.u16(body, 0),
            snaplen: self.u32(body, 4),
            parts: 1_000_000,
            shift: 0,
            fcs: 0,
        };
        for (code, value) in self.options(&body[8..]) {
            match (code, value) {
                // if_tsresol: a power of 10, or with the top bit set of 2.
                (9, &[resolution]) => {
                    let base: u128 = if resolution & 0x80 == 0 { 10 } else { 2 };
                    let parts = base.checked_pow((resolution & 0x7f).into());
                    // No more than fits a calculation of time with it.
                    interface.parts = parts
                        .filter(|parts| *parts < 1 << 64)
                        .ok_or_else(|| format!("timestamps of resolution {resolution:#x}"))?;
                }
                // if_fcslen: bits by the specification, bytes in Wireshark's files.
                (13, &[length]) => interface.fcs = u32::from(if length >= 16 { length / 8 } else { length }),
                // if_tsoffset.
                (14, value) if value.len() == 8 => {
                    let (first, second) = (self.u32(value, 0), self.u32(value, 4));
                    let (high, low) = if self.big_endian {
                        (first, second)
                    } else {
                        (second, first)
                    };
                    interface.shift = (u64::from(high) << 32 | u64::from(low)) as i64;
                }
                _ => {}
            }
        }
        Ok(interface)
    }

    /// Options (section 3.5): code, length, value, padded to 4 bytes; the end option or the end of the block ends them.
    fn options<'a>(&self, bytes: &'a [u8]) -> Vec<(u16, &'a [u8])> {
        let (mut at, mut all) = (0, Vec::new());
        while at + 4 <= bytes.len() {
            let (code, length) = (self.u16(bytes, at), usize::from(self.u16(bytes, at + 2)));
            let Some(value) = bytes.get(at + 4..at + 4 + length).filter(|_| code != 0) else {
                break;
            };
            all.push((code, value));
            at += 4 + length.next_multiple_of(4);
        }
        all
    }

    /// What a packet's block says, and where in its body the frame is.
    fn packet(&self, kind: u32, offset: u64, body: &[u8]) -> Result<(Raw, std::ops::Range<usize>), String> {
        let head = if kind == SIMPLE_PACKET { 4 } else { 20 };
        if body.len() < head {
            return Err(format!("a packet block with {} bytes", body.len()));
        }
        let number = match kind {
            SIMPLE_PACKET => 0,
            OLD_PACKET => self.u16(body, 0).into(),
            _ => self.u32(body, 0),
        };
        let Some(interface) = self.interfaces.get(number as usize) else {
            return Err(format!("interface {number}, which is described nowhere"));
        };
        let (stamp, captured, original) = if kind == SIMPLE_PACKET {
            // Section 4.4: no time; the shorter of the frame and the snapshot length, which is 0 for none.
            let original = self.u32(body, 0);
            let limit = if interface.snaplen == 0 {
                u32::MAX
            } else {
                interface.snaplen
            };
            (0, original.min(limit), original)
        } else {
            let stamp = u128::from(self.u32(body, 4)) << 32 | u128::from(self.u32(body, 8));
            (stamp, self.u32(body, 12), self.u32(body, 16))
        };
        let end = head.checked_add(captured as usize).filter(|end| *end <= body.len());
        let end = end.ok_or_else(|| {
            format!(
                "{captured} bytes captured in a block with room for {}",
                body.len() - head
            )
        })?;
        let mut fcs = interface.fcs;
        let options = body.get(end.next_multiple_of(4)..).unwrap_or_default();
        if kind != SIMPLE_PACKET {
            for (code, value) in self.options(options) {
                // epb_flags: bits 5 to 8 are the FCS's length in bytes, 0 if unknown.
                if code == 2 && value.len() == 4 {
                    let own = self.u32(value, 0) >> 5 & 15;
                    fcs = if own > 0 { own } else { fcs };
                }
            }
        }
        let at = time(stamp, interface.parts);
        let shift = std::time::Duration::from_secs(interface.shift.unsigned_abs());
        let at = if interface.shift < 0 {
            at.saturating_sub(shift)
        } else {
            at.saturating_add(shift)
        };
        let raw = Raw {
            offset,
            at,
            original,
            fcs,
            odd: None,
            foreign: Some(interface.link).filter(|link| *link != ETHERNET),
        };
        Ok((raw, head..end))
    }
}

impl Raw {
    /// A record without a frame.
    fn odd(offset: u64, reason: String) -> Self {
        Raw {
            offset,
            at: std::time::Duration::ZERO,
            original: 0,
            fcs: 0,
            odd: Some(reason),
            foreign: None,
        }
    }
}
