//! Reading a capture as a stream, record by record, in memory that does not grow with the file.

use std::fs::File;
use std::io::{BufReader, ErrorKind, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{CaptureError, Left, Why, pcap, pcapng};
use crate::packets::ETHER_LEN;

/// What to do about records that are no whole frames.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// The first of them is an error. Otherwise each is counted, and left out unless its frame is whole.
    pub strict: bool,
    /// Those that the snapshot length cut are frames.
    pub allow_cut: bool,
}

/// A frame of a capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    /// Its number in the file, from 1; records that were left out have numbers, too.
    pub number: u64,
    /// When it was captured, since the epoch.
    pub at: Duration,
    /// Without an FCS.
    pub frame: &'a [u8],
}

/// A record as a format's reader finds it, before it is judged.
pub(super) struct Raw {
    /// Where it begins.
    pub offset: u64,
    pub at: Duration,
    /// Bytes on the wire, as it says.
    pub original: u32,
    /// Bytes of an FCS at the end of the frame.
    pub fcs: u32,
    /// What is odd about it, without any harm to its frame.
    pub odd: Option<String>,
    /// The link type, if it is not Ethernet.
    pub foreign: Option<u16>,
}

/// The longest record that is taken: the widest snapshot length that libpcap takes (MAXIMUM_SNAPLEN).
pub(super) const LONGEST: u32 = 262_144;

/// The bytes of a file, counted, and read whole or not at all.
pub(super) struct Bytes<R> {
    inner: BufReader<R>,
    pub offset: u64,
}

/// The file ended before `needed` bytes; `found` were there.
pub(super) struct Short {
    pub found: u64,
    pub needed: u64,
}

impl<R: Read> Bytes<R> {
    /// Fills `room`, or says how many bytes were left.
    pub fn fill(&mut self, room: &mut [u8]) -> Result<Result<(), Short>, CaptureError> {
        let mut found = 0;
        while found < room.len() {
            match self.inner.read(&mut room[found..]) {
                Ok(0) => break,
                Ok(n) => found += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(CaptureError::Io(e)),
            }
        }
        self.offset += found as u64;
        let (found, needed) = (found as u64, room.len() as u64);
        Ok(if found == needed {
            Ok(())
        } else {
            Err(Short { found, needed })
        })
    }

    /// Goes over `count` bytes.
    pub fn skip(&mut self, count: u64) -> Result<Result<(), Short>, CaptureError> {
        let found =
            std::io::copy(&mut (&mut self.inner).take(count), &mut std::io::sink()).map_err(CaptureError::Io)?;
        self.offset += found;
        Ok(if found == count {
            Ok(())
        } else {
            Err(Short { found, needed: count })
        })
    }
}

/// What the next record is.
pub(super) enum Next {
    /// A record; its frame is in the buffer.
    Record(Raw),
    /// The end.
    End,
    /// A record from which on nothing can be read.
    Broken { offset: u64, why: Why },
}

enum Format {
    Pcap(pcap::Header),
    Pcapng(pcapng::Section),
}

/// Reads records from a stream.
pub struct Reader<R> {
    bytes: Bytes<R>,
    format: Format,
    options: Options,
    frame: Vec<u8>,
    number: u64,
    ended: bool,
    oddities: Oddities,
    first: Option<Left>,
}

/// Records that were not what they should be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Oddities {
    /// No whole Ethernet frames: left out.
    pub left_out: u64,
    /// Cut by the snapshot length: left out, too.
    pub cut: u64,
    /// Odd headers of whole frames: read.
    pub odd: u64,
}

/// A file, or a pipe that may have nothing for a while: reading ends when a signal has come.
pub struct Input {
    file: File,
    /// Where it begins, if it can be read again.
    begin: Option<u64>,
    stop: Arc<AtomicBool>,
}

impl Input {
    /// The file at `path`; `-` is the standard input.
    pub fn open(path: &Path, stop: &Arc<AtomicBool>) -> Result<Self, CaptureError> {
        let mut file = open(path).map_err(CaptureError::Io)?;
        let begin = file.stream_position().ok();
        Ok(Input {
            file,
            begin,
            stop: Arc::clone(stop),
        })
    }

    /// Whether it can be read more than once.
    pub fn is_file(&self) -> bool {
        self.begin.is_some()
    }

    /// The same from its beginning, if it can be read more than once.
    pub fn again(&self) -> Result<Self, CaptureError> {
        let mut file = self.file.try_clone().map_err(CaptureError::Io)?;
        if let Some(begin) = self.begin {
            file.seek(SeekFrom::Start(begin)).map_err(CaptureError::Io)?;
        }
        Ok(Input {
            file,
            begin: self.begin,
            stop: Arc::clone(&self.stop),
        })
    }

    /// Whether there is something to read, or the end, within `limit`.
    fn has_more(&self, limit: Duration) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(self.file.as_fd(), PollFlags::IN)];
        let limit = Timespec::try_from(limit).ok();
        // Who cannot be asked is read.
        poll(&mut fds, limit.as_ref()).map_or_else(|e| e != rustix::io::Errno::INTR, |n| n > 0)
    }
}

impl Read for Input {
    fn read(&mut self, room: &mut [u8]) -> std::io::Result<usize> {
        loop {
            while !self.has_more(Duration::from_millis(20)) {
                if self.stop.load(Ordering::Relaxed) {
                    return Err(std::io::Error::other("ended by a signal"));
                }
            }
            match self.file.read(room) {
                // Another reader of a FIFO was faster.
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                other => return other,
            }
        }
    }
}

impl Reader<Input> {
    /// Whether [`Reader::next`] has something to begin with.
    pub fn is_ready(&self) -> bool {
        !self.bytes.inner.buffer().is_empty() || self.bytes.inner.get_ref().has_more(Duration::ZERO)
    }

    /// Whether [`Reader::next`] will not sleep for the rest of a record.
    pub fn is_whole(&self) -> bool {
        let there = self.bytes.inner.buffer();
        let size = match &self.format {
            Format::Pcap(header) => header.size(there),
            Format::Pcapng(section) => section.size(there),
        };
        self.bytes.inner.get_ref().is_file() || size.is_some_and(|size| size <= there.len())
    }
}

/// The file at `path`; `-` is the standard input. A FIFO is opened without waiting for its writer, which no signal would end.
fn open(path: &Path) -> std::io::Result<File> {
    match path.to_str() {
        Some("-") => Ok(std::io::stdin().as_fd().try_clone_to_owned()?.into()),
        _ => File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path),
    }
}

impl<R: Read> Reader<R> {
    /// Reads the file header.
    pub fn new(input: R, options: Options) -> Result<Self, CaptureError> {
        let mut bytes = Bytes {
            inner: BufReader::with_capacity(1 << 18, input),
            offset: 0,
        };
        let mut magic = [0; 4];
        if let Err(short) = bytes.fill(&mut magic)? {
            let found = match short.found {
                0 => "the file is empty".to_owned(),
                n => format!("{n} bytes are too few"),
            };
            return Err(CaptureError::NotACapture { found });
        }
        let format = match magic {
            pcapng::MAGIC => Format::Pcapng(pcapng::Section::first(&mut bytes)?),
            [0x1f, 0x8b, ..] => {
                let found = "this is gzip; unpack it first".to_owned();
                return Err(CaptureError::NotACapture { found });
            }
            _ => match pcap::Header::read(magic, &mut bytes)? {
                Some(header) => Format::Pcap(header),
                None => {
                    let found = format!("it begins with {magic:02x?}, and no capture does");
                    return Err(CaptureError::NotACapture { found });
                }
            },
        };
        Ok(Reader {
            bytes,
            format,
            options,
            frame: Vec::new(),
            number: 0,
            ended: false,
            oddities: Oddities::default(),
            first: None,
        })
    }

    /// The next frame; `None` at the end.
    ///
    /// # Errors
    /// The file cannot be read; or a record is not what it should be and that was asked for.
    pub fn next(&mut self) -> Result<Option<Record<'_>>, CaptureError> {
        loop {
            if self.ended {
                return Ok(None);
            }
            let next = match &mut self.format {
                Format::Pcap(header) => header.next(&mut self.bytes, &mut self.frame)?,
                Format::Pcapng(section) => section.next(&mut self.bytes, &mut self.frame)?,
            };
            self.number += 1;
            let raw = match next {
                Next::Record(raw) => raw,
                Next::End => {
                    self.ended = true;
                    return Ok(None);
                }
                Next::Broken { offset, why } => {
                    self.ended = true;
                    self.leave(offset, why)?;
                    return Ok(None);
                }
            };
            let captured = self.frame.len() as u32;
            // An FCS is the end of the frame on the wire: where the frame was cut, less of it is there, or none.
            let wire = raw.original.max(captured).saturating_sub(raw.fcs);
            self.frame.truncate(wire as usize);
            if let Some(link) = raw.foreign {
                self.leave(raw.offset, Why::LinkType(link))?;
                continue;
            }
            if self.frame.len() < ETHER_LEN {
                let reason = || format!("{} bytes are no Ethernet frame", self.frame.len());
                let why = Why::Odd(raw.odd.unwrap_or_else(reason));
                self.leave(raw.offset, why)?;
                continue;
            }
            if self.frame.len() < wire as usize && !self.options.allow_cut {
                let why = Why::Cut {
                    captured,
                    original: raw.original,
                };
                self.leave(raw.offset, why)?;
                continue;
            }
            let odd = raw.odd.or_else(|| {
                (captured > raw.original).then(|| format!("{captured} bytes captured of {} on the wire", raw.original))
            });
            if let Some(odd) = odd {
                self.oddities.odd += 1;
                self.note(raw.offset, Why::Odd(odd))?;
            }
            return Ok(Some(Record {
                number: self.number,
                at: raw.at,
                frame: &self.frame,
            }));
        }
    }

    /// The frame that [`Reader::next`] gave last.
    pub fn frame(&self) -> &[u8] {
        &self.frame
    }

    /// What was not as it should be so far.
    pub fn oddities(&self) -> Oddities {
        self.oddities
    }

    /// The first record that was left out, or was odd.
    pub fn first(&self) -> Option<&Left> {
        self.first.as_ref()
    }

    fn leave(&mut self, offset: u64, why: Why) -> Result<(), CaptureError> {
        match why {
            Why::Cut { .. } => self.oddities.cut += 1,
            _ => self.oddities.left_out += 1,
        }
        self.note(offset, why)
    }

    fn note(&mut self, offset: u64, why: Why) -> Result<(), CaptureError> {
        let left = Left {
            frame: self.number,
            offset,
            why,
        };
        if self.options.strict {
            self.ended = true;
            return Err(CaptureError::Record(left));
        }
        tracing::debug!("{left}");
        self.first.get_or_insert(left);
        Ok(())
    }
}
