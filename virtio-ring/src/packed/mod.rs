//! The packed virtqueue (virtio 1.3 §2.8): one ring of descriptors, which the driver side makes available and the device
//! side marks used in place, and a small structure of each side that says when it wants to be notified.

mod device;
mod driver;
mod recover;
mod walk;

pub use crate::shared::packed::Memory;
pub use crate::{Options, Table, Verdict};
pub use device::Device;
pub use driver::Driver;
pub use recover::recover;

use crate::Error;
use crate::shared::packed::{Cursor, check_size, wire};
use core::mem::{align_of, size_of};

/// Sizes, and one good arrangement in one block: descriptors, the driver's and the device's event suppression structure,
/// each on cache lines of its own (128 bytes: processors fetch lines in pairs).
///
/// ```
/// let layout = virtio_ring::packed::Layout::new(256)?;
/// assert_eq!((layout.desc, layout.driver, layout.device), (0, 4096, 4224));
/// assert_eq!(layout.len, 4352);
/// # Ok::<(), virtio_ring::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Layout {
    /// Entries.
    pub size: u16,
    /// Offset of the descriptor ring: 0.
    pub desc: usize,
    /// Offset of the driver's event suppression structure.
    pub driver: usize,
    /// Offset of the device's event suppression structure.
    pub device: usize,
    /// Bytes of the block, a multiple of [`Layout::ALIGN`].
    pub len: usize,
}

impl Layout {
    /// What the block must be aligned to.
    pub const ALIGN: usize = 128;
    /// What the descriptor ring must be aligned to (§2.8).
    pub const DESC_ALIGN: usize = align_of::<wire::Desc>();
    /// What an event suppression structure must be aligned to (§2.8).
    pub const EVENT_ALIGN: usize = align_of::<wire::Event>();
    /// Bytes of an event suppression structure (§2.8).
    pub const EVENT_LEN: usize = size_of::<wire::Event>();

    /// The layout for `size` entries.
    ///
    /// # Errors
    /// [`Error::PackedQueueSize`] unless `size` is 2 to 32768.
    pub const fn new(size: u16) -> Result<Self, Error> {
        match check_size(size) {
            Err(error) => Err(error),
            Ok(size) => {
                let driver = Self::desc_len(size).next_multiple_of(Self::ALIGN);
                Ok(Self {
                    size,
                    desc: 0,
                    driver,
                    device: driver + Self::ALIGN,
                    len: driver + 2 * Self::ALIGN,
                })
            }
        }
    }

    /// Bytes of a descriptor ring of `size` entries: 16 each (§2.8).
    pub const fn desc_len(size: u16) -> usize {
        size_of::<wire::Desc>() * size as usize
    }

    /// The three parts in a block.
    ///
    /// # Safety
    /// `block` is the start of [`Layout::len`] bytes of one allocation or mapping, aligned to [`Layout::ALIGN`].
    #[cfg(not(loom))]
    pub const unsafe fn place(&self, block: core::ptr::NonNull<u8>) -> Memory {
        // SAFETY: the offsets are below `len`, which this function's contract says is inside one allocation.
        unsafe {
            Memory {
                desc: block.add(self.desc),
                driver: block.add(self.driver),
                device: block.add(self.device),
            }
        }
    }
}

/// Where a device side begins, or has stopped: what vhost-user's SET_VRING_BASE and GET_VRING_BASE carry for a packed
/// ring. Bits 0 to 14 are the next descriptor to become available, bit 15 the driver's wrap counter there; bits 16 to 31
/// are the same of the next descriptor to be used.
///
/// Some front-ends (DPDK's) leave the upper half 0, with a wrap counter of 0 that cannot be. [`Base::decode`] takes the
/// lower half for both then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    /// The next descriptor to become available: offset, and the wrap counter in bit 15.
    pub available: u16,
    /// The next descriptor to be used, likewise.
    pub used: u16,
}

impl Base {
    /// Of a new ring: offset 0 and wrap counter 1, twice (§2.8.1).
    pub const START: Self = Self {
        available: 1 << 15,
        used: 1 << 15,
    };

    /// The base that a message carries.
    pub const fn decode(num: u32) -> Self {
        let (available, used) = (num as u16, (num >> 16) as u16);
        Self {
            available,
            used: if used == 0 { available } else { used },
        }
    }

    /// What a message carries.
    pub const fn encode(self) -> u32 {
        self.available as u32 | (self.used as u32) << 16
    }
}

impl Base {
    /// Offset and wrap counter.
    const fn split(off_wrap: u16) -> (u16, bool) {
        (off_wrap & 0x7fff, off_wrap >> 15 != 0)
    }

    /// The cursor of what is used next. What was taken and not used since is taken again.
    fn cursors(self, size: u16) -> Result<(Cursor, Cursor), Error> {
        let (at, wrap) = Self::split(self.used);
        if at >= size || self.available & 0x7fff >= size {
            return Err(Error::PackedBase {
                base: self.encode(),
                size,
            });
        }
        Ok((Cursor::available(at, wrap, size), Cursor::used(at, wrap, size)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_the_specification() {
        // §2.8: descriptor ring 16 * size, each event suppression structure 4.
        for size in [2u16, 3, 7, 100, 256, 1000, 32768] {
            let layout = Layout::new(size).unwrap();
            assert_eq!(Layout::desc_len(size), 16 * usize::from(size));
            assert!(layout.driver >= Layout::desc_len(size) && layout.len >= layout.device + Layout::EVENT_LEN);
            assert_eq!((layout.driver % 128, layout.device % 128, layout.len % 128), (0, 0, 0));
        }
        assert_eq!((Layout::DESC_ALIGN, Layout::EVENT_ALIGN, Layout::EVENT_LEN), (16, 4, 4));
        for size in [0, 1, 32769, 65535] {
            assert_eq!(Layout::new(size), Err(Error::PackedQueueSize(size)));
        }
    }

    #[test]
    fn bases_as_peers_send_them() {
        // The specification's, and what QEMU sends, for a new ring.
        assert_eq!(Base::decode(0x8000_8000), Base::START);
        // What DPDK sends.
        assert_eq!(Base::decode(0x0000_8000), Base::START);
        assert_eq!(Base::decode(0x0000_0005), Base { available: 5, used: 5 });
        assert_eq!(
            Base::decode(
                Base {
                    available: 7,
                    used: 0x8003
                }
                .encode()
            ),
            Base {
                available: 7,
                used: 0x8003
            }
        );
    }
}
