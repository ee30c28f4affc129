//! The PCI configuration space of a VF behind vfio-user.
//!
//! QEMU keeps BARs and the MSI-X table to itself; what it asks for is the identity, the capabilities, and that a
//! function-level reset is noticed.

use crate::kind::Kind;
use crate::register::VECTORS;

/// Bytes of configuration space.
pub const BYTES: usize = 4096;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const BAR3: usize = 0x1c;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const MSIX: usize = 0x70;
const EXPRESS: usize = 0xa0;
const DEVICE_CONTROL: usize = EXPRESS + 8;

/// Memory, 64 bits wide.
const BAR_64: u32 = 0x4;
/// Status: there is a list of capabilities.
const HAS_CAPABILITIES: u16 = 0x10;
/// Device capabilities: function-level reset, 256 bytes of payload.
const DEVICE_CAPABILITIES: u32 = 1 << 28 | 1;
/// Device control: do it.
const FLR: u8 = 0x80;

/// The bytes, and which of them can be written.
pub struct ConfigSpace {
    bytes: Box<[u8; BYTES]>,
    writable: Box<[u8; BYTES]>,
}

impl ConfigSpace {
    /// As after power-on.
    #[must_use]
    pub fn new(kind: Kind) -> Self {
        let mut space = Self {
            bytes: Box::new([0; BYTES]),
            writable: Box::new([0; BYTES]),
        };
        space.put(0x00, &0x8086_u16.to_le_bytes());
        space.put(0x02, &kind.device_id().to_le_bytes());
        space.put(STATUS, &HAS_CAPABILITIES.to_le_bytes());
        // Revision 1, Ethernet controller.
        space.put(0x08, &[1, 0, 0, 2]);
        space.put(BAR0, &BAR_64.to_le_bytes());
        space.put(BAR3, &BAR_64.to_le_bytes());
        space.put(0x2c, &0x8086_u16.to_le_bytes());
        space.put(CAPABILITIES, &[MSIX as u8]);
        // MSI-X: vectors less one; the table at the begin of BAR 3, pending bits in its second half.
        space.put(MSIX, &[0x11, EXPRESS as u8, VECTORS as u8 - 1, 0]);
        space.put(MSIX + 4, &3_u32.to_le_bytes());
        space.put(MSIX + 8, &(0x2000_u32 | 3).to_le_bytes());
        // PCI Express, version 2, endpoint; x8 at 5 GT/s.
        space.put(EXPRESS, &[0x10, 0, 2, 0]);
        space.put(EXPRESS + 4, &DEVICE_CAPABILITIES.to_le_bytes());
        space.put(EXPRESS + 0x0c, &0x82_u32.to_le_bytes());
        space.put(EXPRESS + 0x12, &0x82_u16.to_le_bytes());
        space.allow(COMMAND, &[0x07, 0x04]);
        space.allow(0x0c, &[0xff]);
        space.allow(INTERRUPT_LINE, &[0xff]);
        for bar in [BAR0, BAR3] {
            // 16 KiB each.
            space.allow(bar, &[0, 0xc0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
        }
        space.allow(MSIX + 3, &[0xc0]);
        space.allow(DEVICE_CONTROL, &[0xff, 0x7f]);
        space
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    /// Reads; zeros beyond the end.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (i, byte) in data.iter_mut().enumerate() {
            let at = start.saturating_add(i);
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// Writes what can be written: true if a function-level reset was asked for.
    #[must_use]
    pub fn write(&mut self, offset: u64, data: &[u8]) -> bool {
        let mut reset = false;
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (i, byte) in data.iter().enumerate() {
            let at = start.saturating_add(i);
            if let (Some(old), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *old = *old & !mask | byte & mask;
            }
            reset |= at == DEVICE_CONTROL + 1 && byte & FLR != 0;
        }
        reset
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<const N: usize>(space: &ConfigSpace, at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        space.read(at as u64, &mut bytes);
        bytes
    }

    #[test]
    fn capabilities_form_a_list() {
        let space = ConfigSpace::new(Kind::X550);
        assert_eq!(read(&space, 0), [0x86, 0x80, 0x65, 0x15]);
        let [first] = read(&space, 0x34);
        let [id, next] = read(&space, first.into());
        assert_eq!(id, 0x11);
        let [id, next] = read(&space, next.into());
        assert_eq!((id, next), (0x10, 0));
    }

    #[test]
    fn a_reset_is_noticed_and_not_kept() {
        let mut space = ConfigSpace::new(Kind::I82599);
        assert!(!space.write(0xa8, &[0x10, 0x28]));
        assert!(space.write(0xa8, &[0x10, 0xa8]));
        assert_eq!(read(&space, 0xa8), [0x10, 0x28]);
        assert!(!space.write(0, &[0xff; 4]));
        assert_eq!(read(&space, 0), [0x86, 0x80]);
        assert!(!space.write(u64::MAX - 1, &[1]));
    }
}
