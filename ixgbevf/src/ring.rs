//! What receive and transmit queues share: sizes, slots, segments.

use crate::dma::{DESCRIPTOR_LEN, Memory, Ring};
use crate::{Error, MAX_QUEUES};
use static_assertions::const_assert_eq;

/// One contiguous piece of a buffer: a device address and a length in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The address that the device understands.
    pub addr: u64,
    /// Bytes, not 0.
    pub len: u32,
}

/// The private shadow of one descriptor. The caller provides one for each descriptor of a ring (16 bytes each) and never
/// looks inside.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Slot {
    /// Receive: the cookie of the buffer at this descriptor. Transmit: an entry of the queue of cookies, oldest first.
    pub(crate) cookie: u64,
    /// Transmit: an entry of the queue of marks.
    pub(crate) mark: Mark,
}

const_assert_eq!(size_of::<Slot>(), 16);

/// A transmit descriptor that the device reports: when it is done, so is all that was posted since the mark before.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Mark {
    /// Its index.
    pub(crate) at: u16,
    /// Frames up to it.
    pub(crate) frames: u16,
    /// Descriptors up to it.
    pub(crate) descriptors: u16,
}

/// The fewest descriptors of a ring.
pub const MIN_RING: u16 = 64;
/// The most descriptors of a ring.
pub const MAX_RING: u16 = 8192;

/// Bytes of descriptor memory for a ring of `size`, to be aligned to 128.
pub const fn ring_len(size: u16) -> usize {
    size as usize * DESCRIPTOR_LEN
}

/// Checks what both kinds of queue ask of their parts.
pub(crate) fn check(index: u8, memory: Memory, size: u16, slots: &mut [Slot]) -> Result<(), Error> {
    if usize::from(index) >= MAX_QUEUES {
        return Err(Error::QueueIndex(index));
    }
    // VFRDLEN and VFTDLEN count whole blocks of 128 bytes.
    if !(MIN_RING..=MAX_RING).contains(&size) || !size.is_multiple_of(8) {
        return Err(Error::RingSize(size));
    }
    for address in [memory.ptr.as_ptr() as u64, memory.addr] {
        if !address.is_multiple_of(128) {
            return Err(Error::Misaligned(address));
        }
    }
    if slots.len() < usize::from(size) {
        return Err(Error::Slots {
            needed: size.into(),
            given: slots.len(),
        });
    }
    Ok(())
}

/// `i + count`, which is not beyond the end of a ring of `size`, and its beginning if it is the end.
#[inline(always)]
pub(crate) fn advance(i: usize, count: usize, size: usize) -> usize {
    let next = i + count;
    if next == size { 0 } else { next }
}

/// `i + 1`, round a ring of `size`.
#[inline(always)]
pub(crate) fn after(i: usize, size: usize) -> usize {
    advance(i, 1, size)
}

/// The slots of one burst. Invariant: exactly `size` slots.
pub(crate) struct Shadow<'a>(&'a mut [Slot]);

impl<'a> Shadow<'a> {
    /// Panics if the caller's `AsMut` gives fewer slots than it did at first.
    #[inline(always)]
    pub(crate) fn new(slots: &'a mut [Slot], size: usize) -> Self {
        Self(&mut slots[..size])
    }

    /// # Safety
    /// `i` is below the size given to [`Shadow::new`].
    #[inline(always)]
    pub(crate) unsafe fn at(&mut self, i: usize) -> &mut Slot {
        debug_assert!(i < self.0.len());
        // SAFETY: below the length, by this function's contract.
        unsafe { self.0.get_unchecked_mut(i) }
    }
}

/// Zeroes a ring, which the device does not use.
pub(crate) fn clear(ring: &Ring, size: usize) {
    for i in 0..size {
        // SAFETY: `i` is below the size.
        unsafe { ring.offer(i, 0) };
    }
}
