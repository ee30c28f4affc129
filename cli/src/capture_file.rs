//! Capture files: libpcap's format, both byte orders, microseconds and nanoseconds.
//!
//! A capture is read whole: frames are ranges of one buffer, so that a replay touches nothing but memory.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use pcap_file::pcap::{PcapHeader, PcapParser};
use pcap_file::{DataLink, Endianness, PcapError, TsResolution};

/// Why a file is no capture that can be replayed.
#[derive(Debug)]
pub enum CaptureError {
    /// The file cannot be read.
    Io(std::io::Error),
    /// The first bytes are those of no capture format.
    NotACapture {
        /// What they are.
        found: String,
    },
    /// It ends inside a record.
    Truncated {
        /// The frame that is cut, from 1; 0: the file header.
        frame: usize,
        /// Where its record begins, in bytes.
        offset: usize,
        /// Bytes that follow.
        found: usize,
        /// Bytes that should.
        needed: usize,
    },
    /// A record header says what cannot be.
    Record {
        /// The frame, from 1.
        frame: usize,
        /// Where its record begins, in bytes.
        offset: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// Not Ethernet.
    LinkType(u32),
    /// A frame that was cut when it was captured.
    Cut {
        /// The frame, from 1.
        frame: usize,
        /// Bytes in the file.
        captured: u32,
        /// Bytes on the wire.
        original: u32,
    },
    /// There is no frame in it.
    Empty,
}

impl std::fmt::Display for CaptureError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            CaptureError::Io(e) => write!(f, "cannot read it: {e}"),
            CaptureError::NotACapture { found } => write!(f, "not a capture: {found}"),
            CaptureError::Truncated {
                frame: 0,
                found,
                needed,
                ..
            } => {
                write!(f, "truncated: {found} bytes, and the file header alone has {needed}")
            }
            CaptureError::Truncated {
                frame,
                offset,
                found,
                needed,
            } => write!(
                f,
                "truncated in frame {frame}: its record at offset {offset} needs {needed} bytes, {found} are there"
            ),
            CaptureError::Record { frame, offset, reason } => {
                write!(f, "frame {frame} at offset {offset}: {reason}")
            }
            CaptureError::LinkType(link) => {
                write!(
                    f,
                    "its link type is {link}, not Ethernet (1): there are no Ethernet frames to send"
                )
            }
            CaptureError::Cut {
                frame,
                captured,
                original,
            } => write!(
                f,
                "frame {frame} was cut when it was captured: {captured} of {original} bytes \
                 (capture with -s 0, or pass --allow-cut to send what is there)"
            ),
            CaptureError::Empty => write!(f, "there is no frame in it"),
        }
    }
}

impl std::error::Error for CaptureError {}

/// A capture in memory.
#[derive(Debug)]
pub struct Capture {
    bytes: Vec<u8>,
    frames: Vec<(Range<usize>, Duration)>,
}

/// Bytes of the file header and of each record header.
const FILE_HEADER: usize = 24;
const RECORD_HEADER: usize = 16;

impl Capture {
    /// Reads the file at `path`; `allow_cut` takes frames that the capture's snapshot length cut.
    pub fn open(path: &Path, allow_cut: bool) -> Result<Self, CaptureError> {
        let mut bytes = Vec::new();
        File::open(path)
            .and_then(|mut f| f.read_to_end(&mut bytes))
            .map_err(CaptureError::Io)?;
        Self::from_bytes(bytes, allow_cut)
    }

    /// Takes the bytes of a capture file.
    pub fn from_bytes(bytes: Vec<u8>, allow_cut: bool) -> Result<Self, CaptureError> {
        let found = match bytes.first_chunk::<4>() {
            None if bytes.is_empty() => Some("the file is empty".to_owned()),
            None => Some(format!("{} bytes are too few", bytes.len())),
            Some([0x0a, 0x0d, 0x0d, 0x0a]) => {
                Some("this is pcapng; convert it with `editcap -F pcap IN OUT` or `tcpdump -r IN -w OUT`".to_owned())
            }
            Some([0x1f, 0x8b, ..]) => Some("this is gzip; unpack it first".to_owned()),
            Some(
                [0xa1, 0xb2, 0xc3, 0xd4]
                | [0xd4, 0xc3, 0xb2, 0xa1]
                | [0xa1, 0xb2, 0x3c, 0x4d]
                | [0x4d, 0x3c, 0xb2, 0xa1],
            ) => None,
            Some(magic) => Some(format!("it begins with {magic:02x?}, and no pcap file does")),
        };
        if let Some(found) = found {
            return Err(CaptureError::NotACapture { found });
        }
        if bytes.len() < FILE_HEADER {
            return Err(CaptureError::Truncated {
                frame: 0,
                offset: 0,
                found: bytes.len(),
                needed: FILE_HEADER,
            });
        }
        let (mut rest, parser) = PcapParser::new(&bytes).map_err(|e| CaptureError::NotACapture {
            found: format!("its file header is wrong: {e}"),
        })?;
        let header = parser.header();
        if header.datalink != DataLink::ETHERNET {
            return Err(CaptureError::LinkType(header.datalink.into()));
        }
        let nanos = header.ts_resolution == TsResolution::NanoSecond;
        let mut frames = Vec::new();
        while !rest.is_empty() {
            let frame = frames.len() + 1;
            let offset = bytes.len() - rest.len();
            // Raw: the checks of the cooked form know neither frame number nor offset.
            let (after, packet) = match parser.next_raw_packet(rest) {
                Ok(next) => next,
                Err(PcapError::IncompleteBuffer) => {
                    return Err(truncated(frame, offset, rest, header.endianness));
                }
                Err(e) => {
                    return Err(CaptureError::Record {
                        frame,
                        offset,
                        reason: e.to_string(),
                    });
                }
            };
            let limit = if nanos { 1_000_000_000 } else { 1_000_000 };
            let reason = if packet.ts_frac >= limit {
                Some(format!(
                    "a timestamp with {} of {limit} parts of a second",
                    packet.ts_frac
                ))
            } else if packet.incl_len > packet.orig_len {
                Some(format!(
                    "{} bytes captured of {} on the wire",
                    packet.incl_len, packet.orig_len
                ))
            } else if packet.incl_len < 14 {
                Some(format!("{} bytes are no Ethernet frame", packet.incl_len))
            } else {
                None
            };
            if let Some(reason) = reason {
                return Err(CaptureError::Record { frame, offset, reason });
            }
            if packet.incl_len < packet.orig_len && !allow_cut {
                return Err(CaptureError::Cut {
                    frame,
                    captured: packet.incl_len,
                    original: packet.orig_len,
                });
            }
            let at = Duration::new(packet.ts_sec.into(), packet.ts_frac * if nanos { 1 } else { 1000 });
            let start = offset + RECORD_HEADER;
            frames.push((start..start + packet.incl_len as usize, at));
            rest = after;
        }
        if frames.is_empty() {
            return Err(CaptureError::Empty);
        }
        Ok(Capture { bytes, frames })
    }

    /// How many frames.
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    /// The frame with this index, from 0.
    ///
    /// # Panics
    /// When there is none.
    pub fn frame(&self, index: usize) -> &[u8] {
        &self.bytes[self.frames[index].0.clone()]
    }

    /// When the frame with this index was captured, since the first frame; 0 for one that claims to be earlier.
    ///
    /// # Panics
    /// When there is no such frame.
    pub fn at(&self, index: usize) -> Duration {
        self.frames[index].1.saturating_sub(self.frames[0].1)
    }

    /// All frames in order.
    pub fn frames(&self) -> impl Iterator<Item = &[u8]> {
        self.frames.iter().map(|(range, _)| &self.bytes[range.clone()])
    }

    /// The longest frame: its number from 1, and its bytes.
    pub fn longest(&self) -> (usize, usize) {
        let longest = self
            .frames
            .iter()
            .enumerate()
            .max_by_key(|(i, (range, _))| (range.len(), usize::MAX - i));
        longest.map_or((0, 0), |(i, (range, _))| (i + 1, range.len()))
    }

    /// The file's bytes.
    pub fn file_bytes(&self) -> &[u8] {
        &self.bytes
    }
}

fn truncated(frame: usize, offset: usize, rest: &[u8], endianness: Endianness) -> CaptureError {
    let Some(length) = rest
        .get(8..12)
        .and_then(|b| b.try_into().ok())
        .filter(|_| rest.len() >= RECORD_HEADER)
    else {
        return CaptureError::Truncated {
            frame,
            offset,
            found: rest.len(),
            needed: RECORD_HEADER,
        };
    };
    let length = match endianness {
        Endianness::Big => u32::from_be_bytes(length),
        Endianness::Little => u32::from_le_bytes(length),
    };
    CaptureError::Truncated {
        frame,
        offset,
        found: rest.len(),
        needed: RECORD_HEADER + length as usize,
    }
}

/// A hash over the frames of a stream in their order: FNV-1a of 64 bits over each frame's length and bytes.
///
/// It tells streams apart that differ by accident (loss, order, corruption); it is no defence against forgery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chain(u64);

impl Default for Chain {
    fn default() -> Self {
        Chain(0xcbf2_9ce4_8422_2325)
    }
}

impl Chain {
    /// Adds the next frame.
    pub fn add(&mut self, frame: &[u8]) {
        for byte in (frame.len() as u32).to_le_bytes().iter().chain(frame) {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    /// The hash so far.
    pub fn value(self) -> u64 {
        self.0
    }
}

/// The widest snapshot length that readers take (libpcap's MAXIMUM_SNAPLEN).
const SNAPLEN: u32 = 262_144;

/// Writes a capture file with nanosecond timestamps, little-endian.
pub struct Writer {
    out: BufWriter<Box<dyn Write>>,
    frames: u64,
}

impl Writer {
    /// Begins a capture file at `path`; `-` is the standard output.
    pub fn create(path: &Path) -> std::io::Result<Self> {
        let out: Box<dyn Write> = match path.to_str() {
            Some("-") => Box::new(std::io::stdout()),
            _ => Box::new(File::create(path)?),
        };
        Self::new(out)
    }

    /// Begins a capture in `out`.
    pub fn new(out: Box<dyn Write>) -> std::io::Result<Self> {
        let header = PcapHeader {
            version_major: 2,
            version_minor: 4,
            ts_correction: 0,
            ts_accuracy: 0,
            snaplen: SNAPLEN,
            datalink: DataLink::ETHERNET,
            ts_resolution: TsResolution::NanoSecond,
            endianness: Endianness::Little,
        };
        let mut out = BufWriter::with_capacity(1 << 18, out);
        header.write_to(&mut out).map_err(|e| match e {
            PcapError::IoError(e) => e,
            other => std::io::Error::other(other),
        })?;
        out.flush()?;
        Ok(Writer { out, frames: 0 })
    }

    /// Appends a frame that was seen at `at` since the epoch.
    pub fn write(&mut self, at: Duration, frame: &[u8]) -> std::io::Result<()> {
        // The crate's own writer takes its `Write` and gives no way to flush it; the record header is four words.
        let words = [
            at.as_secs() as u32,
            at.subsec_nanos(),
            frame.len() as u32,
            frame.len() as u32,
        ];
        for word in words {
            self.out.write_all(&word.to_le_bytes())?;
        }
        self.out.write_all(frame)?;
        self.frames += 1;
        Ok(())
    }

    /// How many frames were written.
    pub fn frames(&self) -> u64 {
        self.frames
    }

    /// Hands everything written to the operating system.
    pub fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(magic: [u8; 4], big: bool, records: &[([u32; 4], &[u8])]) -> Vec<u8> {
        let word = |w: u32| if big { w.to_be_bytes() } else { w.to_le_bytes() };
        let mut bytes = magic.to_vec();
        bytes.extend_from_slice(if big { &[0, 2, 0, 4] } else { &[2, 0, 4, 0] });
        for w in [0, 0, 65535, 1] {
            bytes.extend_from_slice(&word(w));
        }
        for (header, data) in records {
            for w in header {
                bytes.extend_from_slice(&word(*w));
            }
            bytes.extend_from_slice(data);
        }
        bytes
    }

    #[test]
    fn all_four_magics_are_read() {
        let data = [7u8; 60];
        for (magic, big, nanos) in [
            ([0xa1, 0xb2, 0xc3, 0xd4], true, false),
            ([0xd4, 0xc3, 0xb2, 0xa1], false, false),
            ([0xa1, 0xb2, 0x3c, 0x4d], true, true),
            ([0x4d, 0x3c, 0xb2, 0xa1], false, true),
        ] {
            let bytes = file(magic, big, &[([5, 1000, 60, 60], &data), ([6, 3000, 60, 60], &data)]);
            let capture = Capture::from_bytes(bytes, false).unwrap();
            assert_eq!((capture.len(), capture.frame(1)), (2, &data[..]));
            let gap = if nanos {
                Duration::new(1, 2000)
            } else {
                Duration::new(1, 2_000_000)
            };
            assert_eq!(capture.at(1), gap);
        }
    }

    fn error(bytes: Vec<u8>) -> String {
        Capture::from_bytes(bytes, false).unwrap_err().to_string()
    }

    const LE: [u8; 4] = [0xd4, 0xc3, 0xb2, 0xa1];

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        let data = [7u8; 60];
        let good = file(LE, false, &[([5, 0, 60, 60], &data), ([6, 0, 60, 60], &data)]);
        assert_eq!(good.len(), 24 + 76 * 2);
        assert!(
            error(good[..good.len() - 1].to_vec()).contains("frame 2: its record at offset 100 needs 76 bytes, 75")
        );
        assert!(error(good[..110].to_vec()).contains("frame 2: its record at offset 100 needs 16 bytes, 10"));
        assert!(error(good[..20].to_vec()).contains("file header alone"));
        assert!(error(good[..24].to_vec()).contains("no frame"));
        assert!(error(Vec::new()).contains("empty"));
        assert!(error(b"PK\x03\x04 and more".to_vec()).contains("begins with"));
        assert!(error(vec![0x0a, 0x0d, 0x0d, 0x0a, 0, 0]).contains("pcapng"));
        assert!(error(file(LE, false, &[([5, 0, 60, 90], &data)])).contains("frame 1 was cut"));
        assert!(Capture::from_bytes(file(LE, false, &[([5, 0, 60, 90], &data)]), true).is_ok());
        assert!(error(file(LE, false, &[([5, 2_000_000, 60, 60], &data)])).contains("timestamp"));
        assert!(error(file(LE, false, &[([5, 0, 60, 20], &data)])).contains("60 bytes captured of 20"));
        assert!(error(file(LE, false, &[([5, 0, 4, 4], &data[..4])])).contains("no Ethernet frame"));
        let mut link = good.clone();
        link[20] = 101;
        assert!(error(link).contains("link type is 101"));
        let huge = file(LE, false, &[([5, 0, u32::MAX, u32::MAX], &data)]);
        assert!(error(huge).contains("needs 4294967311 bytes"));
    }

    #[test]
    fn no_bytes_panic() {
        // Every prefix and every single-byte change of a small capture: an answer, never a panic.
        let good = file(LE, false, &[([5, 0, 60, 60], &[1; 60]), ([6, 0, 20, 20], &[2; 20])]);
        for len in 0..good.len() {
            let _ = Capture::from_bytes(good[..len].to_vec(), true);
        }
        for at in 0..good.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut bytes = good.clone();
                bytes[at] = value;
                if let Ok(capture) = Capture::from_bytes(bytes, true) {
                    assert!(capture.frames().all(|f| f.len() >= 14));
                }
            }
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.pcap");
        let mut writer = Writer::create(&path).unwrap();
        writer.write(Duration::new(10, 999_999_999), &[1; 42]).unwrap();
        writer.write(Duration::new(11, 1), &[2; 1514]).unwrap();
        assert_eq!(writer.frames(), 2);
        writer.flush().unwrap();
        let capture = Capture::open(&path, false).unwrap();
        assert_eq!((capture.frame(0), capture.frame(1)), (&[1; 42][..], &[2; 1514][..]));
        assert_eq!(capture.at(1), Duration::new(0, 2));
        assert_eq!(capture.longest(), (2, 1514));
        drop(writer);
    }

    #[test]
    fn the_chain_sees_order_and_boundaries() {
        let chain = |frames: &[&[u8]]| {
            let mut c = Chain::default();
            frames.iter().for_each(|f| c.add(f));
            c.value()
        };
        // FNV-1a of four zero bytes (the length of an empty frame).
        assert_eq!(chain(&[&[]]), 0x4d25_767f_9dce_13f5);
        assert_ne!(chain(&[b"ab", b"c"]), chain(&[b"a", b"bc"]));
        assert_ne!(chain(&[b"a", b"b"]), chain(&[b"b", b"a"]));
    }
}
