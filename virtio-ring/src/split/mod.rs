//! The split virtqueue (virtio 1.3 §2.7): a descriptor table and an available ring, which the driver side writes, and a
//! used ring, which the device side writes.

mod device;
mod driver;
mod walk;

pub use crate::shared::Memory;
pub use crate::{Options, Table, Verdict};
pub use device::Device;
pub use driver::Driver;

use crate::Error;
use crate::shared::{check_size, wire};
use core::mem::{align_of, size_of};

/// Sizes, and one good arrangement in one block: descriptors, available ring, used ring, the last on cache lines of its
/// own (128 bytes: processors fetch lines in pairs), since the device side writes it and the driver side the others.
///
/// ```
/// let layout = virtio_ring::split::Layout::new(256)?;
/// assert_eq!((layout.desc, layout.avail, layout.used), (0, 4096, 4736));
/// assert_eq!(layout.len, 6912); // with 128-byte alignment
/// # Ok::<(), virtio_ring::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Layout {
    /// Entries.
    pub size: u16,
    /// Offset of the descriptor table: 0.
    pub desc: usize,
    /// Offset of the available ring.
    pub avail: usize,
    /// Offset of the used ring.
    pub used: usize,
    /// Bytes of the block, a multiple of [`Layout::ALIGN`].
    pub len: usize,
}

impl Layout {
    /// What the block must be aligned to.
    pub const ALIGN: usize = 128;
    /// What the descriptor table must be aligned to (§2.7).
    pub const DESC_ALIGN: usize = align_of::<wire::Desc>();
    /// What the available ring must be aligned to (§2.7).
    pub const AVAIL_ALIGN: usize = align_of::<wire::AvailHead>();
    /// What the used ring must be aligned to (§2.7).
    pub const USED_ALIGN: usize = align_of::<wire::UsedHead>();

    /// The layout for `size` entries.
    ///
    /// # Errors
    /// [`Error::QueueSize`] unless `size` is a power of two from 2 to 32768.
    pub const fn new(size: u16) -> Result<Self, Error> {
        match check_size(size) {
            Err(error) => Err(error),
            Ok(size) => {
                let avail = Self::desc_len(size).next_multiple_of(Self::ALIGN);
                let used = (avail + Self::avail_len(size)).next_multiple_of(Self::ALIGN);
                let len = (used + Self::used_len(size)).next_multiple_of(Self::ALIGN);
                Ok(Self {
                    size,
                    desc: 0,
                    avail,
                    used,
                    len,
                })
            }
        }
    }

    /// Bytes of a descriptor table of `size` entries: 16 each (§2.7).
    pub const fn desc_len(size: u16) -> usize {
        size_of::<wire::Desc>() * size as usize
    }

    /// Bytes of an available ring of `size` entries: 6, and 2 each (§2.7). The last two are `used_event`.
    pub const fn avail_len(size: u16) -> usize {
        size_of::<wire::AvailHead>() + 2 * size as usize + 2
    }

    /// Bytes of a used ring of `size` entries: 6, and 8 each (§2.7). The last two are `avail_event`.
    pub const fn used_len(size: u16) -> usize {
        size_of::<wire::UsedHead>() + size_of::<wire::UsedElem>() * size as usize + 2
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
                avail: block.add(self.avail),
                used: block.add(self.used),
            }
        }
    }
}

/// §2.7.7.2 and §2.7.10: was `event` passed when the index went from `old` to `new`? Modulo 2^16 throughout, and so
/// right across the wrap and for steps of more than one.
#[inline(always)]
pub(crate) const fn event_passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_the_specification() {
        // §2.7: descriptor table 16 * size, available ring 6 + 2 * size, used ring 6 + 8 * size.
        for size in (1..=15).map(|shift| 1u16 << shift) {
            assert_eq!(Layout::desc_len(size), 16 * usize::from(size));
            assert_eq!(Layout::avail_len(size), 6 + 2 * usize::from(size));
            assert_eq!(Layout::used_len(size), 6 + 8 * usize::from(size));
            let layout = Layout::new(size).unwrap();
            assert!(layout.avail >= Layout::desc_len(size));
            assert!(layout.used >= layout.avail + Layout::avail_len(size));
            assert!(layout.len >= layout.used + Layout::used_len(size));
            assert_eq!((layout.used % 128, layout.avail % 128, layout.len % 128), (0, 0, 0));
        }
        assert_eq!(
            (Layout::DESC_ALIGN, Layout::AVAIL_ALIGN, Layout::USED_ALIGN),
            (16, 2, 4)
        );
    }

    #[test]
    fn sizes_that_are_refused() {
        for size in [0, 1, 3, 6, 100, 257, 32767, 32769, 65535] {
            assert_eq!(Layout::new(size), Err(Error::QueueSize(size)));
        }
    }

    #[test]
    fn event_rule_is_modular() {
        // One step: exactly the event's index notifies.
        assert!(event_passed(7, 8, 7));
        assert!(!event_passed(6, 8, 7));
        assert!(!event_passed(8, 8, 7));
        // Several steps at once, across the wrap: 65534, 65535, 0, 1 were added.
        for event in [65534, 65535, 0, 1] {
            assert!(event_passed(event, 2, 65534), "{event}");
        }
        for event in [65533, 2, 3, 30000] {
            assert!(!event_passed(event, 2, 65534), "{event}");
        }
        // Nothing was added.
        assert!(!event_passed(5, 5, 5));
        // The rule of the specification, over every distance, against counting.
        for old in [0u16, 1, 65530, 65535] {
            for step in 0..40u16 {
                let new = old.wrapping_add(step);
                for event in (0..60u16).map(|d| old.wrapping_sub(10).wrapping_add(d)) {
                    let counted = (0..step).any(|i| old.wrapping_add(i) == event);
                    assert_eq!(event_passed(event, new, old), counted, "{event} {new} {old}");
                }
            }
        }
    }
}
