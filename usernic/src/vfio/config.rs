//! Configuration space. PCI Express Base Specification, chapter 7.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;

use super::Error;

/// Offsets of the header that all functions have (7.5.1).
const COMMAND: u64 = 0x04;
const STATUS: u64 = 0x06;
const CAPABILITIES: u64 = 0x34;

/// Bits of the command register.
const MEMORY_SPACE: u16 = 1 << 1;
const BUS_MASTER: u16 = 1 << 2;
/// Bit of the status register: there is a list of capabilities.
const CAPABILITIES_LIST: u16 = 1 << 4;

/// The configuration space of an open device: a part of the device's file.
#[derive(Clone, Copy)]
pub struct Config<'a> {
    pub(super) device: BorrowedFd<'a>,
    pub(super) name: &'a str,
    /// In the file.
    pub(super) offset: u64,
    pub(super) size: u64,
}

impl Config<'_> {
    /// Vendor and device id.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn ids(&self) -> Result<(u16, u16), Error> {
        Ok((self.read_u16(0)?, self.read_u16(2)?))
    }

    /// Reads two bytes at `offset`.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn read_u16(&self, offset: u64) -> Result<u16, Error> {
        let mut bytes = [0; 2];
        self.access("read", offset, 2, || {
            rustix::io::pread(self.device, &mut bytes, self.offset + offset)
        })?;
        Ok(u16::from_le_bytes(bytes))
    }

    /// Writes two bytes at `offset`.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn write_u16(&self, offset: u64, value: u16) -> Result<(), Error> {
        let bytes = value.to_le_bytes();
        self.access("write", offset, 2, || {
            rustix::io::pwrite(self.device, &bytes, self.offset + offset)
        })
    }

    fn access(
        &self,
        verb: &'static str,
        offset: u64,
        len: usize,
        call: impl FnOnce() -> Result<usize, Errno>,
    ) -> Result<(), Error> {
        let problem = |source: Errno| Error::Config {
            device: self.name.to_owned(),
            verb,
            offset,
            source: source.into(),
        };
        if offset.saturating_add(len as u64) > self.size {
            return Err(problem(Errno::RANGE));
        }
        match call().map_err(problem)? {
            n if n == len => Ok(()),
            _ => Err(problem(Errno::IO)),
        }
    }

    /// Lets the device reach memory (and be reached), or no longer reach memory.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn set_bus_master(&self, on: bool) -> Result<(), Error> {
        let before = self.read_u16(COMMAND)?;
        let after = if on {
            before | BUS_MASTER | MEMORY_SPACE
        } else {
            before & !BUS_MASTER
        };
        self.write_u16(COMMAND, after)
    }

    /// Whether the device may reach memory.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn bus_master(&self) -> Result<bool, Error> {
        Ok(self.read_u16(COMMAND)? & BUS_MASTER != 0)
    }

    /// Where the capability `id` is, if there is one.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn capability(&self, id: u8) -> Result<Option<u64>, Error> {
        if self.read_u16(STATUS)? & CAPABILITIES_LIST == 0 {
            return Ok(None);
        }
        let mut at = self.read_u16(CAPABILITIES)? as u8 & !3;
        // 48 capabilities of four bytes fill the space after the header: a list that is longer goes in a circle.
        for _ in 0..48 {
            if at < 0x40 {
                return Ok(None);
            }
            let [found, next] = self.read_u16(u64::from(at))?.to_le_bytes();
            if found == id {
                return Ok(Some(u64::from(at)));
            }
            at = next & !3;
        }
        Ok(None)
    }
}
