//! The words that both sides and every ring format share: segments, completions, slots, chains.

use crate::{Error, Fault};
use core::ptr::NonNull;
use static_assertions::const_assert_eq;

/// One contiguous piece of a buffer, as the driver side names it: a device address and a length in bytes (not 0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The address that the device side understands.
    pub addr: u64,
    /// Bytes, 1 to 2^32 - 1.
    pub len: u32,
}

/// Checks what both ring formats ask of a chain; returns its bytes for writing.
pub(crate) fn check(chain: &[Segment], readable: usize) -> Result<u32, Error> {
    if chain.is_empty() || chain.iter().any(|segment| segment.len == 0) {
        return Err(Error::EmptySegment);
    }
    let bytes = |part: &[Segment]| part.iter().map(|segment| u64::from(segment.len)).sum::<u64>();
    u32::try_from(bytes(chain)).map_err(|_| Error::TooLong)?;
    // Not above the sum just checked.
    Ok(bytes(chain.get(readable..).unwrap_or_default()) as u32)
}

/// What the device may do with a buffer (§2.7.5: `VIRTQ_DESC_F_WRITE`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Device-readable: what is sent to it.
    Readable,
    /// Device-writable: what it fills.
    Writable,
}

/// A chain that came back to the driver side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// What the caller gave with the chain.
    pub cookie: u64,
    /// Bytes that the device says it wrote, never more than were posted for writing.
    pub len: u32,
}

/// The private shadow of one descriptor. The caller provides one for each entry of a driver's queue (16 bytes each) and
/// never looks inside.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Slot {
    /// Of a chain's last descriptor: the caller's cookie. Of the others: which one follows. (IN_ORDER, where that is
    /// known: of a head, the caller's cookie.)
    pub(crate) cookie: u64,
    /// Of a head: the bytes posted for writing.
    pub(crate) writable: u32,
    /// Not of this descriptor, but an entry of the queue of free ones, which goes round the slots.
    pub(crate) free: u16,
    /// Of a head in flight: the descriptors of its chain. Else 0.
    pub(crate) count: u16,
}

const_assert_eq!(core::mem::size_of::<Slot>(), 16);

impl Slot {
    /// Of a chain of one descriptor, with IN_ORDER.
    #[inline(always)]
    pub(crate) const fn ordered(cookie: u64, writable: u32) -> Self {
        Self {
            cookie,
            writable,
            free: 0,
            count: 1,
        }
    }
}

/// The device side's way from the driver side's addresses to memory.
///
/// # Safety
/// `translate` returns only pointers to `len` bytes, and `prefix` to as many as it says, that are valid for reads and writes for as long as the chains made
/// from them are in use. They may be changed by the other side at any moment: nothing may hold a reference to them.
pub unsafe trait Translate {
    /// Where the `len` bytes at `addr` are, or `None` if any of them is outside the memory that was shared.
    fn translate(&self, addr: u64, len: u32) -> Option<NonNull<u8>>;

    /// Where the first of the `len` bytes at `addr` are, and how many of them from there on are in one piece: at least 1.
    /// `None` if not even the first is inside the memory that was shared.
    ///
    /// A descriptor over the border between two regions comes out as two parts where this says where the border is. As it
    /// is, all bytes are in one piece or nowhere.
    fn prefix(&self, addr: u64, len: u32) -> Option<(NonNull<u8>, u32)> {
        self.translate(addr, len).map(|ptr| (ptr, len))
    }

    /// The region that `addr` is in: what may be translated by one addition. `None`: ask for each.
    #[inline(always)]
    fn window(&self, _addr: u64) -> Option<Window> {
        None
    }
}

/// A region of memory that was shared. All that [`Translate`] demands holds for each range inside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Its first address, as the driver side names it.
    pub theirs: u64,
    /// Its bytes.
    pub len: u64,
    /// Where it is here.
    pub ours: NonNull<u8>,
}

// SAFETY: the same function, behind a reference.
unsafe impl<T: Translate + ?Sized> Translate for &T {
    #[inline(always)]
    fn translate(&self, addr: u64, len: u32) -> Option<NonNull<u8>> {
        (**self).translate(addr, len)
    }

    fn prefix(&self, addr: u64, len: u32) -> Option<(NonNull<u8>, u32)> {
        (**self).prefix(addr, len)
    }

    #[inline(always)]
    fn window(&self, addr: u64) -> Option<Window> {
        (**self).window(addr)
    }
}

/// One contiguous piece of a chain, as the device side sees it: translated and checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// The first byte. Valid for reads and writes of `len` bytes as long as the translation holds; the other side may
    /// change them at any moment.
    pub ptr: NonNull<u8>,
    /// Bytes, not 0.
    pub len: u32,
}

impl Default for Part {
    fn default() -> Self {
        Self {
            ptr: NonNull::dangling(),
            len: 0,
        }
    }
}

/// Names a chain that was popped, until it is pushed. Opaque but for [`Head::index`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Head {
    pub(crate) index: u16,
    /// Packed: descriptors of the ring that the chain takes. Split: 1.
    pub(crate) count: u16,
}

impl Head {
    #[inline(always)]
    pub(crate) const fn new(index: u16) -> Self {
        Self { index, count: 1 }
    }

    /// What the used ring, and vhost-user's inflight region, name the chain by. Split: the index of its first
    /// descriptor. Packed: the buffer ID that the driver gave it.
    #[inline(always)]
    pub const fn index(self) -> u16 {
        self.index
    }
}

/// What a closure decided about a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Used: push it, with so many bytes written.
    Done(u32),
    /// Popped; the caller pushes it later. With IN_ORDER everything after it has to be kept as well.
    Keep,
    /// Not popped after all: it stays available, and the burst ends.
    Stop,
}

/// Memory for one indirect table: where it is here, where it is for the device, and for how many descriptors.
#[derive(Clone, Copy, Debug)]
pub struct Table {
    /// The table in this process, aligned to 16.
    pub ptr: NonNull<u8>,
    /// The same for the device side.
    pub addr: u64,
    /// 16-byte entries.
    pub entries: u16,
}

/// A chain of one descriptor, as the device side sees it while it works on a burst of such: the fast path. See
/// [`split::Device::peek_singles`](crate::split::Device::peek_singles).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Single {
    /// The first byte, translated and checked.
    pub ptr: NonNull<u8>,
    /// Bytes, not 0. To be replaced by the bytes written, or 0, before the chain is used.
    pub len: u32,
    /// What the chain is named by: see [`Head::index`].
    pub(crate) id: u16,
}

impl Default for Single {
    fn default() -> Self {
        Self {
            ptr: NonNull::dangling(),
            len: 0,
            id: 0,
        }
    }
}

// As `vectors` writes it, four at a time: pointer, length, ID.
const_assert_eq!(core::mem::size_of::<Single>(), 16);
const_assert_eq!(core::mem::offset_of!(Single, ptr), 0);
const_assert_eq!(core::mem::offset_of!(Single, len), 8);
const_assert_eq!(core::mem::offset_of!(Single, id), 12);

/// A popped chain by reference: what it is called and what it consists of.
///
/// A chain that cannot be used ([`Popped::fault`]) comes without parts. It is to be completed as any other, with
/// length 0, so that the order of completions and the count of buffers hold.
#[derive(Clone, Copy, Debug)]
pub struct Popped<'a> {
    /// What to complete it by.
    pub head: Head,
    /// What the device may read, in order.
    pub readable: &'a [Part],
    /// What the device may write, in order.
    pub writable: &'a [Part],
    /// Why there are no parts, if so.
    pub fault: Option<Fault>,
}

impl Popped<'_> {
    /// Bytes to read, of all parts.
    #[inline]
    pub fn readable_len(&self) -> u32 {
        sum(self.readable)
    }

    /// Bytes to write, of all parts.
    #[inline]
    pub fn writable_len(&self) -> u32 {
        sum(self.writable)
    }
}

/// Below 2^32 for every chain that was popped, and so without overflow.
#[inline]
fn sum(parts: &[Part]) -> u32 {
    parts.iter().fold(0u32, |sum, part| sum.wrapping_add(part.len))
}

/// Storage for the parts of one chain, which the caller provides: `&mut [Part]`, `[Part; N]` or `Box<[Part]>`. A chain
/// with more parts than it holds counts as [`Fault::TooManySegments`]: one part a segment, and one more for each border
/// between regions that a segment lies over.
#[derive(Clone, Debug)]
pub struct Chain<S> {
    parts: S,
    count: usize,
    readable: usize,
    fault: Option<Fault>,
}

impl<S: AsRef<[Part]> + AsMut<[Part]>> Chain<S> {
    /// An empty chain over `parts`.
    pub const fn new(parts: S) -> Self {
        Self {
            parts,
            count: 0,
            readable: 0,
            fault: None,
        }
    }

    /// What the device may read, in order.
    #[inline]
    pub fn readable(&self) -> &[Part] {
        self.parts.as_ref().get(..self.readable).unwrap_or_default()
    }

    /// What the device may write, in order.
    #[inline]
    pub fn writable(&self) -> &[Part] {
        self.parts.as_ref().get(self.readable..self.count).unwrap_or_default()
    }

    /// Bytes to read, of all parts.
    #[inline]
    pub fn readable_len(&self) -> u32 {
        sum(self.readable())
    }

    /// Bytes to write, of all parts.
    #[inline]
    pub fn writable_len(&self) -> u32 {
        sum(self.writable())
    }

    /// Why the chain came without parts, if it cannot be used.
    #[inline]
    pub fn fault(&self) -> Option<Fault> {
        self.fault
    }

    /// The storage given to [`Chain::new`].
    pub fn into_inner(self) -> S {
        self.parts
    }

    #[inline]
    pub(crate) fn storage(&mut self) -> &mut [Part] {
        self.parts.as_mut()
    }

    #[inline]
    pub(crate) fn set(&mut self, walked: Result<Shape, Fault>) {
        let (shape, fault) = match walked {
            Ok(shape) => (shape, None),
            Err(fault) => (Shape::default(), Some(fault)),
        };
        self.count = shape.count;
        self.readable = shape.readable;
        self.fault = fault;
    }
}

/// How many parts were stored, and how many of them, from the first, are readable.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Shape {
    pub(crate) count: usize,
    pub(crate) readable: usize,
}
