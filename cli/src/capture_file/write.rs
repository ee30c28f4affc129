//! Writing a capture file: whole records only, whatever becomes of the disk.

use std::fs::File;
use std::io::{ErrorKind, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::pcap::ETHERNET;
use super::pcapng;
use super::read::LONGEST;
use crate::output;

/// The format of a file that is written, with nanoseconds, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// libpcap's
    Pcap,
    /// pcapng: a section with one interface
    Pcapng,
}

impl Format {
    /// By the file's extension.
    pub fn of(path: &Path) -> Self {
        let is_ng = path.extension().is_some_and(|extension| {
            extension.eq_ignore_ascii_case("pcapng") || extension.eq_ignore_ascii_case("ntar")
        });
        if is_ng { Format::Pcapng } else { Format::Pcap }
    }
}

/// The file at `path`, empty. A FIFO is waited for until it has a reader, or `stop` is set: open(2) by itself would go on
/// after a signal.
fn create(path: &Path, stop: &AtomicBool) -> std::io::Result<File> {
    let mut options = File::options();
    let options = options.write(true).create(true).truncate(true);
    loop {
        match options.custom_flags(libc::O_NONBLOCK).open(path) {
            Ok(file) => {
                rustix::io::ioctl_fionbio(&file, false)?;
                return Ok(file);
            }
            Err(e) if e.raw_os_error() != Some(libc::ENXIO) => return Err(e),
            Err(_) if stop.load(Ordering::Relaxed) => {
                return Err(std::io::Error::other("ended by a signal before the FIFO had a reader"));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Bytes that are collected before they are written.
const BUFFER: usize = 1 << 18;

/// What can be written to, and cut back to a record's end if it is a file.
pub trait Output: Write {
    /// Takes back the last `count` bytes, if it can.
    fn cut(&mut self, _count: u64) -> std::io::Result<()> {
        Ok(())
    }
}

impl Output for File {
    fn cut(&mut self, count: u64) -> std::io::Result<()> {
        let (meta, at) = (self.metadata()?, self.stream_position());
        // A pipe or a terminal has no position; somebody else's bytes behind ours stay.
        if meta.is_file() && at.is_ok_and(|at| at == meta.len()) {
            let end = meta.len() - count.min(meta.len());
            self.set_len(end)?;
            self.seek(SeekFrom::Start(end))?;
        }
        Ok(())
    }
}

/// Writes a capture file.
pub struct Writer {
    out: Box<dyn Output>,
    format: Format,
    buffer: Vec<u8>,
    /// Where in the buffer each record ends, the file header being one.
    ends: Vec<usize>,
    /// Frames that were given to the operating system whole.
    frames: u64,
    /// The next record that is written ends the file header.
    begun: bool,
}

impl Writer {
    /// Begins a capture file at `path`; `-` is the standard output.
    pub fn create(path: &Path, format: Format, stop: &AtomicBool) -> std::io::Result<Self> {
        let file = match path.to_str() {
            Some("-") => output::stdout_file()?,
            _ => create(path, stop)?,
        };
        let mut writer = Self::new(Box::new(file), format);
        // Readers wait for a capture whose header is there.
        writer.flush()?;
        Ok(writer)
    }

    /// Begins a capture in `out`.
    pub fn new(out: Box<dyn Output>, format: Format) -> Self {
        let mut buffer = Vec::with_capacity(BUFFER);
        let mut words = |words: &[u32]| {
            words
                .iter()
                .for_each(|word| buffer.extend_from_slice(&word.to_le_bytes()))
        };
        match format {
            Format::Pcap => words(&[0xa1b2_3c4d, 4 << 16 | 2, 0, 0, LONGEST, ETHERNET.into()]),
            Format::Pcapng => {
                // A section of version 1.0 and unknown length; an interface whose timestamps are nanoseconds (if_tsresol 9).
                words(&[pcapng::SECTION, 28, pcapng::ORDER, 1, u32::MAX, u32::MAX, 28]);
                words(&[pcapng::INTERFACE, 32, ETHERNET.into(), LONGEST, 1 << 16 | 9, 9, 0, 32]);
            }
        }
        let ends = vec![buffer.len()];
        Writer {
            out,
            format,
            buffer,
            ends,
            frames: 0,
            begun: false,
        }
    }

    /// Adds a frame that was received at `at` (since the epoch).
    ///
    /// # Errors
    /// Those of [`Writer::flush`].
    pub fn write(&mut self, at: Duration, frame: &[u8]) -> std::io::Result<()> {
        let size = frame.len() as u32;
        let padded = size.next_multiple_of(4);
        if self.buffer.len() + frame.len() + 64 > BUFFER {
            self.flush()?;
        }
        let buffer = &mut self.buffer;
        let mut words = |words: &[u32]| {
            words
                .iter()
                .for_each(|word| buffer.extend_from_slice(&word.to_le_bytes()))
        };
        match self.format {
            Format::Pcap => {
                words(&[at.as_secs() as u32, at.subsec_nanos(), size, size]);
                buffer.extend_from_slice(frame);
            }
            Format::Pcapng => {
                let (stamp, length) = (at.as_nanos() as u64, padded + 32);
                words(&[
                    pcapng::ENHANCED_PACKET,
                    length,
                    0,
                    (stamp >> 32) as u32,
                    stamp as u32,
                    size,
                    size,
                ]);
                buffer.extend_from_slice(frame);
                buffer.resize(buffer.len() + (padded - size) as usize, 0);
                buffer.extend_from_slice(&length.to_le_bytes());
            }
        }
        self.ends.push(self.buffer.len());
        Ok(())
    }

    /// How many frames were added, as far as they are not lost.
    pub fn frames(&self) -> u64 {
        self.frames + (self.ends.len() as u64).saturating_sub(u64::from(!self.begun))
    }

    /// Gives everything to the operating system.
    ///
    /// # Errors
    /// What it says. Then the file ends with the last record of which it has every byte, and [`Writer::frames`] counts up
    /// to that one.
    pub fn flush(&mut self) -> std::io::Result<()> {
        let (mut done, mut result) = (0, Ok(()));
        while done < self.buffer.len() && result.is_ok() {
            match self.out.write(&self.buffer[done..]) {
                Ok(0) => result = Err(ErrorKind::WriteZero.into()),
                Ok(n) => done += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => result = Err(e),
            }
        }
        let whole = self.ends.iter().take_while(|end| **end <= done).count();
        if result.is_err() {
            let end = whole.checked_sub(1).map_or(0, |last| self.ends[last]);
            // The error to tell is the first.
            let _ = self.out.cut((done - end) as u64);
        }
        self.frames += (whole as u64).saturating_sub(u64::from(!self.begun));
        self.begun |= whole > 0;
        self.buffer.clear();
        self.ends.clear();
        result
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Options, Reader};
    use super::*;

    /// A disk with so much room.
    struct Small {
        file: File,
        room: usize,
    }

    impl Write for Small {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            if self.room == 0 {
                return Err(ErrorKind::StorageFull.into());
            }
            let n = self.file.write(&bytes[..bytes.len().min(self.room)])?;
            self.room -= n;
            Ok(n)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Output for Small {
        fn cut(&mut self, count: u64) -> std::io::Result<()> {
            self.file.cut(count)
        }
    }

    #[test]
    fn a_full_disk_leaves_whole_records() {
        for format in [Format::Pcap, Format::Pcapng] {
            for room in [500, 501, 24, 30, 60, 92, 200, 563] {
                let file = tempfile::NamedTempFile::new().unwrap();
                let out = Small {
                    file: file.reopen().unwrap(),
                    room,
                };
                let mut writer = Writer::new(Box::new(out), format);
                if writer.flush().is_err() {
                    let meta = file.reopen().unwrap().metadata().unwrap();
                    assert_eq!((meta.len(), writer.frames()), (0, 0), "no half header");
                    continue;
                }
                for n in 0..20u8 {
                    writer.write(Duration::from_secs(1), &[n; 61]).unwrap();
                }
                assert_eq!(writer.frames(), 20);
                assert!(writer.flush().is_err(), "{room}");
                let strict = Options {
                    strict: true,
                    allow_cut: false,
                };
                let mut count = 0;
                let mut reader = Reader::new(file.reopen().unwrap(), strict).unwrap();
                while let Some(record) = reader.next().expect("whole records only") {
                    assert_eq!(record.frame, [count; 61]);
                    count += 1;
                }
                assert_eq!(writer.frames(), u64::from(count), "{room}");
                assert!(room < 300 || count >= 4, "{format:?} {room}: {count}");
            }
        }
    }

    #[test]
    fn the_format_is_in_the_name() {
        assert_eq!(Format::of(Path::new("x.pcap")), Format::Pcap);
        assert_eq!(Format::of(Path::new("-")), Format::Pcap);
        assert_eq!(Format::of(Path::new("a/b.PcapNg")), Format::Pcapng);
    }
}
