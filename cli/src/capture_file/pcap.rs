//! libpcap's format (draft-ietf-opsawg-pcap): both byte orders, microseconds and nanoseconds.

use std::io::Read;

use super::read::{Bytes, LONGEST, Next, Raw};
use super::{CaptureError, Why, time};

/// LINKTYPE_ETHERNET.
pub const ETHERNET: u16 = 1;

/// Bytes of the file header and of each record header.
const FILE_HEADER: usize = 24;
const RECORD_HEADER: usize = 16;

/// What the file header says.
#[derive(Debug)]
pub struct Header {
    big_endian: bool,
    /// Parts of a second in timestamps.
    parts: u32,
    /// Bytes of an FCS at the end of each frame.
    fcs: u32,
}

impl Header {
    /// Reads what follows the magic number; `None` if the magic number is none of this format's.
    pub fn read<R: Read>(magic: [u8; 4], bytes: &mut Bytes<R>) -> Result<Option<Self>, CaptureError> {
        let (big_endian, parts) = match magic {
            [0xa1, 0xb2, 0xc3, 0xd4] => (true, 1_000_000),
            [0xd4, 0xc3, 0xb2, 0xa1] => (false, 1_000_000),
            [0xa1, 0xb2, 0x3c, 0x4d] => (true, 1_000_000_000),
            [0x4d, 0x3c, 0xb2, 0xa1] => (false, 1_000_000_000),
            _ => return Ok(None),
        };
        let mut rest = [0; FILE_HEADER - 4];
        if let Err(short) = bytes.fill(&mut rest)? {
            return Err(CaptureError::Truncated {
                found: 4 + short.found as usize,
                needed: FILE_HEADER,
            });
        }
        let mut header = Header {
            big_endian,
            parts,
            fcs: 0,
        };
        // Section 4: the link type's 16 bits; above them bit 26 says that bits 28 to 31 count the FCS's 16-bit words.
        let word = header.word(&rest, 16);
        if word >> 26 & 1 == 1 {
            header.fcs = 2 * (word >> 28);
        }
        match word as u16 {
            ETHERNET => Ok(Some(header)),
            other => Err(CaptureError::LinkType(other)),
        }
    }

    fn word(&self, bytes: &[u8], at: usize) -> u32 {
        let word = [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
        if self.big_endian {
            u32::from_be_bytes(word)
        } else {
            u32::from_le_bytes(word)
        }
    }

    /// Bytes of the record that begins with these, if they are enough to tell.
    pub fn size(&self, bytes: &[u8]) -> Option<usize> {
        let header = bytes.get(..RECORD_HEADER)?;
        RECORD_HEADER.checked_add(self.word(header, 8) as usize)
    }

    /// The next record, its bytes in `frame`.
    pub fn next<R: Read>(&mut self, bytes: &mut Bytes<R>, frame: &mut Vec<u8>) -> Result<Next, CaptureError> {
        let offset = bytes.offset;
        let mut header = [0; RECORD_HEADER];
        if let Err(short) = bytes.fill(&mut header)? {
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
        let [seconds, parts, captured, original] = [0, 4, 8, 12].map(|at| self.word(&header, at));
        let needed = RECORD_HEADER as u64 + u64::from(captured);
        if captured > LONGEST {
            // Where the next record begins cannot be known.
            let why = match bytes.skip(captured.into())? {
                Ok(()) => Why::Odd(format!(
                    "{captured} bytes, and no frame has more than {LONGEST}: the rest is not read"
                )),
                Err(short) => Why::Truncated {
                    found: RECORD_HEADER as u64 + short.found,
                    needed,
                },
            };
            return Ok(Next::Broken { offset, why });
        }
        frame.resize(captured as usize, 0);
        if let Err(short) = bytes.fill(frame)? {
            let found = RECORD_HEADER as u64 + short.found;
            let why = Why::Truncated { found, needed };
            return Ok(Next::Broken { offset, why });
        }
        let odd =
            (parts >= self.parts).then(|| format!("a timestamp with {parts} of {} parts of a second", self.parts));
        let per_second = u128::from(self.parts);
        Ok(Next::Record(Raw {
            offset,
            at: time(u128::from(seconds) * per_second + u128::from(parts), per_second),
            original,
            fcs: self.fcs,
            odd,
            foreign: None,
        }))
    }
}
