//! Capture files: libpcap's format ([`pcap`]), and pcapng ([`pcapng`]).
//!
//! ```text
//!    a file, a pipe --- Reader: one Record after the other, and why others were left out --- replay
//!                          |
//!                       Capture: all frames in memory --------------------------------- demo
//!    capture --- Writer: whole records only, whatever the disk does --- a file, a pipe
//! ```

mod pcap;
mod pcapng;
mod read;
mod write;

use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

pub use read::{Input, Oddities, Options, Reader};
pub use write::{Format, Output, Writer};

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
    /// It ends inside its header.
    Truncated {
        /// Bytes that are there.
        found: usize,
        /// Bytes of the header.
        needed: usize,
    },
    /// Not Ethernet.
    LinkType(u16),
    /// Something was left out, or changed, and that is not wanted.
    Record(Left),
    /// There is no frame in it.
    Empty,
}

/// What was wrong with a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left {
    /// The record, from 1.
    pub frame: u64,
    /// Where it begins, in bytes.
    pub offset: u64,
    /// What is wrong with it.
    pub why: Why,
}

/// Kinds of records that are no whole Ethernet frames.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// Its header contradicts itself, or the frame is none. The record is left out unless its frame is whole.
    Odd(String),
    /// The snapshot length of the capture cut the frame.
    Cut {
        /// Bytes in the file.
        captured: u32,
        /// Bytes on the wire.
        original: u32,
    },
    /// The file ends in the middle of it, or nothing that follows can be read.
    Truncated {
        /// Bytes that follow.
        found: u64,
        /// Bytes that should.
        needed: u64,
    },
    /// An interface of another link type.
    LinkType(u16),
}

impl std::fmt::Display for Left {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Left { frame, offset, why } = self;
        match why {
            Why::Odd(reason) => write!(f, "frame {frame} at offset {offset}: {reason}"),
            Why::Cut { captured, original } => write!(
                f,
                "frame {frame} was cut when it was captured: {captured} of {original} bytes \
                 (capture with -s 0, or pass --allow-cut to send what is there)"
            ),
            Why::Truncated { found, needed } => write!(
                f,
                "truncated in frame {frame}: its record at offset {offset} needs {needed} bytes, {found} are there"
            ),
            Why::LinkType(link) => write!(
                f,
                "frame {frame} at offset {offset}: its link type is {link}, not Ethernet (1)"
            ),
        }
    }
}

impl std::fmt::Display for CaptureError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            CaptureError::Io(e) => write!(f, "cannot read it: {e}"),
            CaptureError::NotACapture { found } => write!(f, "not a capture: {found}"),
            CaptureError::Truncated { found, needed } => {
                write!(f, "truncated: {found} bytes, and the file header alone has {needed}")
            }
            CaptureError::LinkType(link) => {
                write!(
                    f,
                    "its link type is {link}, not Ethernet (1): there are no Ethernet frames to send"
                )
            }
            CaptureError::Record(left) => left.fmt(f),
            CaptureError::Empty => write!(f, "there is no frame in it"),
        }
    }
}

impl std::error::Error for CaptureError {}

/// A capture in memory.
#[derive(Debug)]
pub struct Capture {
    bytes: Vec<u8>,
    frames: Vec<Box<[u8]>>,
}

impl Capture {
    /// Reads the file at `path`, `-` being the standard input. Everything in it must be a whole frame; `allow_cut` takes
    /// those that the capture's snapshot length cut.
    pub fn open(path: &Path, allow_cut: bool) -> Result<Self, CaptureError> {
        let mut bytes = Vec::new();
        let mut input = Input::open(path, &Arc::default())?;
        input.read_to_end(&mut bytes).map_err(CaptureError::Io)?;
        Self::from_bytes(bytes, allow_cut)
    }

    /// Takes the bytes of a capture file.
    pub fn from_bytes(bytes: Vec<u8>, allow_cut: bool) -> Result<Self, CaptureError> {
        let options = Options {
            strict: true,
            allow_cut,
        };
        let mut reader = Reader::new(&bytes[..], options)?;
        let mut frames = Vec::new();
        while let Some(record) = reader.next()? {
            frames.push(record.frame.into());
        }
        if frames.is_empty() {
            return Err(CaptureError::Empty);
        }
        drop(reader);
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
        &self.frames[index]
    }

    /// All frames in order.
    pub fn frames(&self) -> impl Iterator<Item = &[u8]> {
        self.frames.iter().map(AsRef::as_ref)
    }

    /// The longest frame: its number from 1, and its bytes.
    pub fn longest(&self) -> (usize, usize) {
        let longest = self.frames.iter().enumerate();
        let longest = longest.max_by_key(|(i, frame)| (frame.len(), usize::MAX - i));
        longest.map_or((0, 0), |(i, frame)| (i + 1, frame.len()))
    }

    /// The file's bytes.
    pub fn file_bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// A time since the epoch from `parts` of a second, of which there are `per_second`.
fn time(parts: u128, per_second: u128) -> Duration {
    let (seconds, rest) = (parts / per_second, parts % per_second);
    // Past the end of what can be told: as late as can be.
    let seconds = u64::try_from(seconds).unwrap_or(u64::MAX / 2);
    Duration::new(seconds, (rest * 1_000_000_000 / per_second) as u32)
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

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
            let mut reader = Reader::new(&bytes[..], Options::default()).unwrap();
            let first = reader.next().unwrap().unwrap().at;
            let second = reader.next().unwrap().unwrap();
            assert_eq!((second.number, second.frame), (2, &data[..]));
            let gap = if nanos {
                Duration::new(1, 2000)
            } else {
                Duration::new(1, 2_000_000)
            };
            assert_eq!(second.at - first, gap);
            assert_eq!(reader.next().unwrap(), None);
            assert_eq!(reader.oddities(), Oddities::default());
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
        assert!(error(vec![0x0a, 0x0d, 0x0d, 0x0a, 0, 0]).contains("file header alone has 28"));
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

    /// Records that were left out, cut, and odd.
    type Counts = (u64, u64, u64);

    /// What is left out and what is sent, of a file of records with these headers.
    fn lenient(bytes: &[u8]) -> (Vec<Vec<u8>>, Counts, Option<String>) {
        let options = Options {
            strict: false,
            allow_cut: false,
        };
        let mut reader = Reader::new(bytes, options).unwrap();
        let mut frames = Vec::new();
        while let Some(record) = reader.next().unwrap() {
            frames.push(record.frame.to_vec());
        }
        let first = reader.first().map(ToString::to_string);
        let Oddities { left_out, cut, odd } = reader.oddities();
        (frames, (left_out, cut, odd), first)
    }

    #[test]
    fn odd_records_are_counted_and_the_others_read() {
        let data = [7u8; 60];
        let good = ([6, 0, 60, 60], &data[..]);
        for (record, frames, oddities, word) in [
            (([5, 0, 60, 40], &data[..]), 2, (0, 0, 1), "60 bytes captured of 40"),
            (([5, 1_500_000, 60, 60], &data[..]), 2, (0, 0, 1), "timestamp"),
            (
                ([5, 0, 7, 7], &data[..7]),
                1,
                (1, 0, 0),
                "7 bytes are no Ethernet frame",
            ),
            (
                ([5, 0, 0, 0], &data[..0]),
                1,
                (1, 0, 0),
                "0 bytes are no Ethernet frame",
            ),
            (([5, 0, 60, 90], &data[..]), 1, (0, 1, 0), "60 of 90 bytes"),
        ] {
            let bytes = file(LE, false, &[record, good]);
            let found = lenient(&bytes);
            assert_eq!((found.0.len(), found.1), (frames, oddities), "{word}");
            assert!(found.2.unwrap().contains(word), "{word}");
        }
        let whole = file(LE, false, &[good, good]);
        for cut in [1, 59, 60, 61, 75] {
            let found = lenient(&whole[..whole.len() - cut]);
            assert_eq!((found.0.len(), found.1), (1, (1, 0, 0)), "{cut}");
            assert!(found.2.unwrap().contains("truncated in frame 2"), "{cut}");
        }
        assert_eq!(lenient(&whole).1, (0, 0, 0));
    }

    #[test]
    fn a_time_past_the_end_of_the_second_is_carried() {
        let bytes = file(LE, false, &[([5, 1_500_000, 60, 60], &[7; 60])]);
        let mut reader = Reader::new(&bytes[..], Options::default()).unwrap();
        assert_eq!(reader.next().unwrap().unwrap().at, Duration::from_millis(6500));
    }

    #[test]
    fn the_fcs_is_cut_off() {
        let data = [7u8; 64];
        for (word, big, captured, original, left) in [
            (2u32 << 28 | 1 << 26 | 1, false, 64, 64, 60),
            (2 << 28 | 1 << 26 | 1, true, 64, 64, 60),
            (1 << 28 | 1 << 26 | 1, false, 64, 64, 62),
            // Without bit 26 nothing is said.
            (2 << 28 | 1, false, 64, 64, 64),
            (1 << 26 | 1, false, 64, 64, 64),
            // Of an FCS of 4 bytes the snapshot length left 1: the frame is whole.
            (2 << 28 | 1 << 26 | 1, false, 61, 64, 60),
        ] {
            let magic = if big { [0xa1, 0xb2, 0xc3, 0xd4] } else { LE };
            let mut bytes = file(magic, big, &[([5, 0, captured, original], &data[..captured as usize])]);
            let word = if big { word.to_be_bytes() } else { word.to_le_bytes() };
            bytes[20..24].copy_from_slice(&word);
            let (frames, oddities, _) = lenient(&bytes);
            assert_eq!((frames[0].len(), oddities), (left, (0, 0, 0)), "{word:02x?}");
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        for (name, format) in [("x.pcap", Format::Pcap), ("x.pcapng", Format::Pcapng)] {
            let path = dir.path().join(name);
            let mut writer = Writer::create(&path, Format::of(&path), &AtomicBool::new(false)).unwrap();
            writer.write(Duration::new(10, 999_999_999), &[1; 42]).unwrap();
            writer.write(Duration::new(11, 1), &[2; 1514]).unwrap();
            writer.write(Duration::new(1 << 32, 7), &[3; 61]).unwrap();
            assert_eq!(writer.frames(), 3);
            writer.flush().unwrap();
            let capture = Capture::open(&path, false).unwrap();
            let frames: Vec<&[u8]> = capture.frames().collect();
            assert_eq!(frames, [&[1; 42][..], &[2; 1514], &[3; 61]]);
            assert_eq!(capture.longest(), (2, 1514));
            let mut reader = Reader::new(capture.file_bytes(), Options::default()).unwrap();
            assert_eq!(reader.next().unwrap().unwrap().at, Duration::new(10, 999_999_999));
            assert_eq!(reader.next().unwrap().unwrap().at, Duration::new(11, 1));
            // Seconds have 32 bits in pcap, nanoseconds 64 in pcapng.
            let last = reader.next().unwrap().unwrap().at;
            let seconds = if format == Format::Pcap { 0 } else { 1 << 32 };
            assert_eq!(last, Duration::new(seconds, 7));
        }
    }

    /// An implementation that is not ours reads what we write, and writes what we read.
    #[test]
    fn pcapng_is_that_of_the_crate_pcap_file() {
        use pcap_file::pcapng::blocks::enhanced_packet::EnhancedPacketBlock;
        use pcap_file::pcapng::blocks::interface_description::{InterfaceDescriptionBlock, InterfaceDescriptionOption};
        use pcap_file::pcapng::blocks::simple_packet::SimplePacketBlock;
        use pcap_file::pcapng::{Block, PcapNgBlock, PcapNgReader, PcapNgWriter};
        use pcap_file::{DataLink, Endianness};

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.pcapng");
        let mut writer = Writer::create(&path, Format::Pcapng, &AtomicBool::new(false)).unwrap();
        for (n, len) in [60, 61, 62, 63].into_iter().enumerate() {
            writer.write(Duration::new(5, n as u32), &vec![n as u8; len]).unwrap();
        }
        writer.flush().unwrap();
        let mut reader = PcapNgReader::new(std::fs::File::open(&path).unwrap()).unwrap();
        let mut count = 0;
        while let Some(block) = reader.next_block() {
            let block = block.unwrap().into_owned();
            match block {
                Block::InterfaceDescription(interface) => {
                    assert_eq!((interface.linktype, interface.snaplen), (DataLink::ETHERNET, 262_144));
                    assert!(interface.options.contains(&InterfaceDescriptionOption::IfTsResol(9)));
                }
                Block::EnhancedPacket(packet) => {
                    assert_eq!(packet.data.len(), 60 + count);
                    assert_eq!(packet.timestamp, Duration::new(5, count as u32));
                    count += 1;
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(count, 4);

        for endianness in [Endianness::Big, Endianness::Little] {
            let mut writer = PcapNgWriter::with_endianness(Vec::new(), endianness).unwrap();
            let interface = |link, options| {
                InterfaceDescriptionBlock {
                    linktype: link,
                    snaplen: 0,
                    options,
                }
                .into_block()
            };
            writer.write_block(&interface(DataLink::ETHERNET, vec![])).unwrap();
            writer.write_block(&interface(DataLink::RAW, vec![])).unwrap();
            let nanoseconds = InterfaceDescriptionOption::IfTsResol(9);
            let fcs = InterfaceDescriptionOption::IfFcsLen(4);
            writer
                .write_block(&interface(DataLink::ETHERNET, vec![nanoseconds, fcs]))
                .unwrap();
            let packet = |interface_id, original_len: u32, data: &'static [u8]| EnhancedPacketBlock {
                interface_id,
                timestamp: Duration::from_nanos(7),
                original_len,
                data: data.into(),
                options: vec![],
            };
            writer.write_block(&packet(0, 61, &[1; 61]).into_block()).unwrap();
            writer.write_block(&packet(1, 61, &[2; 61]).into_block()).unwrap();
            writer.write_block(&packet(2, 64, &[3; 64]).into_block()).unwrap();
            writer.write_block(&packet(0, 7, &[4; 7]).into_block()).unwrap();
            let simple = SimplePacketBlock {
                original_len: 62,
                data: [5; 62][..].into(),
            };
            writer.write_block(&simple.into_block()).unwrap();
            let bytes = writer.into_inner();
            let (frames, oddities, first) = lenient(&bytes);
            assert_eq!(frames, [vec![1; 61], vec![3; 60], vec![5; 62]], "{endianness:?}");
            assert_eq!(oddities, (2, 0, 0));
            assert!(first.unwrap().contains("link type is 101"));
            // Two sections in one file, of either byte order.
            let mut twice = bytes.clone();
            twice.extend_from_slice(&std::fs::read(&path).unwrap());
            assert_eq!(lenient(&twice).0.len(), 7);
            // Every prefix and every single-byte change: an answer, never a panic.
            for len in 0..bytes.len() {
                let _ = Capture::from_bytes(bytes[..len].to_vec(), true);
            }
            for at in 0..bytes.len() {
                for value in [0, 1, 0x7f, 0x80, 0xff] {
                    let mut changed = bytes.clone();
                    changed[at] = value;
                    let Ok(mut reader) = Reader::new(&changed[..], Options::default()) else {
                        continue;
                    };
                    while let Ok(Some(record)) = reader.next() {
                        assert!(record.frame.len() >= 14);
                    }
                }
            }
        }
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
