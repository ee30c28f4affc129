//! A ring of either format, told apart once a burst.
//!
//! What the formats have in common is the same function in both; this module chooses by `match`, so that the loops inside
//! are those of the one or of the other.

use crate::{
    Anomalies, Chain, Completion, Direction, Error, Features, Head, Options, Part, Popped, Segment, Single, Slot,
    Table, Translate, Vectors, Verdict, packed, split,
};

/// How a ring lies in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// §2.7: a table of descriptors, an available and a used ring.
    #[default]
    Split,
    /// §2.8: one ring of descriptors.
    Packed,
}

impl Format {
    /// The format that was negotiated.
    pub const fn from_features(features: Features) -> Self {
        if features.contains(Features::RING_PACKED) {
            Self::Packed
        } else {
            Self::Split
        }
    }

    /// The base of a ring that nobody was on: where a device begins if it is told nothing (no VHOST_USER_SET_VRING_BASE).
    /// For a split ring index 0, for a packed ring [`packed::Base::START`], which is not 0.
    pub const fn start_base(self) -> u32 {
        match self {
            Self::Split => 0,
            Self::Packed => packed::Base::START.encode(),
        }
    }
}

impl From<Features> for Format {
    fn from(features: Features) -> Self {
        Self::from_features(features)
    }
}

/// Sizes, and one good arrangement in one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Of a split ring.
    Split(split::Layout),
    /// Of a packed ring.
    Packed(packed::Layout),
}

impl Layout {
    /// What a block must be aligned to.
    pub const ALIGN: usize = split::Layout::ALIGN;

    /// The layout for `size` entries.
    ///
    /// # Errors
    /// [`Error::QueueSize`] or [`Error::PackedQueueSize`].
    pub const fn new(format: Format, size: u16) -> Result<Self, Error> {
        match format {
            Format::Split => match split::Layout::new(size) {
                Ok(layout) => Ok(Self::Split(layout)),
                Err(error) => Err(error),
            },
            Format::Packed => match packed::Layout::new(size) {
                Ok(layout) => Ok(Self::Packed(layout)),
                Err(error) => Err(error),
            },
        }
    }

    /// The format that it is of.
    pub const fn format(&self) -> Format {
        match self {
            Self::Split(_) => Format::Split,
            Self::Packed(_) => Format::Packed,
        }
    }

    /// Bytes of the block.
    pub const fn block_len(&self) -> usize {
        match self {
            Self::Split(layout) => layout.len,
            Self::Packed(layout) => layout.len,
        }
    }

    /// Entries.
    pub const fn size(&self) -> u16 {
        match self {
            Self::Split(layout) => layout.size,
            Self::Packed(layout) => layout.size,
        }
    }

    /// Where in the block the descriptor area, the driver area and the device area begin (§2.6).
    pub const fn areas(&self) -> [usize; 3] {
        match self {
            Self::Split(layout) => [layout.desc, layout.avail, layout.used],
            Self::Packed(layout) => [layout.desc, layout.driver, layout.device],
        }
    }

    /// Bytes of the descriptor area, the driver area and the device area, for a ring of any size that the format has.
    pub const fn area_lens(format: Format, size: u16) -> [usize; 3] {
        match format {
            Format::Split => [
                split::Layout::desc_len(size),
                split::Layout::avail_len(size),
                split::Layout::used_len(size),
            ],
            Format::Packed => [
                packed::Layout::desc_len(size),
                packed::Layout::EVENT_LEN,
                packed::Layout::EVENT_LEN,
            ],
        }
    }

    /// The parts in a block.
    ///
    /// # Safety
    /// `block` is the start of [`Layout::block_len`] bytes of one allocation or mapping, aligned to [`Layout::ALIGN`].
    #[cfg(not(loom))]
    pub const unsafe fn place(&self, block: core::ptr::NonNull<u8>) -> Memory {
        // SAFETY: passed on.
        unsafe {
            match self {
                Self::Split(layout) => Memory::Split(layout.place(block)),
                Self::Packed(layout) => Memory::Packed(layout.place(block)),
            }
        }
    }
}

/// Where the parts of a ring lie in this process.
#[derive(Clone, Debug)]
#[cfg_attr(not(loom), derive(Copy, PartialEq, Eq))]
pub enum Memory {
    /// Of a split ring.
    Split(split::Memory),
    /// Of a packed ring.
    Packed(packed::Memory),
}

#[cfg(not(loom))]
impl Memory {
    /// From the descriptor area, the driver area and the device area (§2.6).
    pub const fn from_areas(format: Format, [desc, driver, device]: [core::ptr::NonNull<u8>; 3]) -> Self {
        match format {
            Format::Split => Self::Split(split::Memory {
                desc,
                avail: driver,
                used: device,
            }),
            Format::Packed => Self::Packed(packed::Memory { desc, driver, device }),
        }
    }

    /// Whether no device has completed a buffer on a ring of `size` entries yet. A device that takes a used ring over
    /// owes its driver a notification; on an unused one there is nothing to tell of. To be asked before [`Device::new`],
    /// which writes into the device area.
    ///
    /// # Safety
    /// The areas are valid for reads of [`Layout::area_lens`] bytes.
    pub unsafe fn is_unused(&self, size: u16) -> bool {
        match self {
            // SAFETY: passed on.
            Self::Split(ring) => unsafe { ring.is_unused(size) },
            // SAFETY: passed on.
            Self::Packed(ring) => unsafe { ring.is_unused(size) },
        }
    }
}

#[cfg(loom)]
impl Memory {
    /// A zeroed ring of `size` entries, in loom's memory.
    pub fn new(format: Format, size: u16) -> Self {
        match format {
            Format::Split => Self::Split(split::Memory::new(size)),
            Format::Packed => Self::Packed(packed::Memory::new(size)),
        }
    }
}

/// The driver side of a ring of either format.
#[derive(Debug)]
pub enum Driver<S> {
    /// Of a split ring.
    Split(split::Driver<S>),
    /// Of a packed ring.
    Packed(packed::Driver<S>),
}

/// The device side of a ring of either format.
#[derive(Debug)]
pub enum Device {
    /// Of a split ring.
    Split(split::Device),
    /// Of a packed ring.
    Packed(packed::Device),
}

/// The same expression of whichever it is.
macro_rules! either {
    ($side:ident, $self:expr, $ring:ident => $value:expr) => {
        match $self {
            $side::Split($ring) => $value,
            $side::Packed($ring) => $value,
        }
    };
}

impl<S: AsMut<[Slot]>> Driver<S> {
    /// As [`split::Driver::new`] and [`packed::Driver::new`].
    ///
    /// # Errors
    /// As those.
    ///
    /// # Safety
    /// As those.
    pub unsafe fn new(memory: Memory, size: u16, options: Options, slots: S) -> Result<Self, Error> {
        // SAFETY: passed on.
        unsafe {
            match memory {
                Memory::Split(memory) => split::Driver::new(memory, size, options, slots).map(Self::Split),
                Memory::Packed(memory) => packed::Driver::new(memory, size, options, slots).map(Self::Packed),
            }
        }
    }

    /// As [`split::Driver::add`] and [`packed::Driver::add`].
    ///
    /// # Errors
    /// As those.
    ///
    /// # Safety
    /// As those.
    pub unsafe fn add(&mut self, chain: &[Segment], readable: usize, cookie: u64) -> Result<(), Error> {
        // SAFETY: passed on.
        unsafe { either!(Driver, self, ring => ring.add(chain, readable, cookie)) }
    }

    /// As [`split::Driver::add_indirect`] and [`packed::Driver::add_indirect`].
    ///
    /// # Errors
    /// As those.
    ///
    /// # Safety
    /// As those.
    pub unsafe fn add_indirect(
        &mut self,
        table: Table,
        chain: &[Segment],
        readable: usize,
        cookie: u64,
    ) -> Result<(), Error> {
        // SAFETY: passed on.
        unsafe { either!(Driver, self, ring => ring.add_indirect(table, chain, readable, cookie)) }
    }

    /// As [`split::Driver::add_each`] and [`packed::Driver::add_each`].
    ///
    /// # Safety
    /// As those.
    #[inline(always)]
    pub unsafe fn add_each<I>(&mut self, direction: Direction, buffers: I) -> usize
    where
        I: IntoIterator<Item = (Segment, u64)>,
    {
        // SAFETY: passed on.
        unsafe { either!(Driver, self, ring => ring.add_each(direction, buffers)) }
    }

    /// As [`split::Driver::publish`] and [`packed::Driver::publish`].
    #[inline(always)]
    pub fn publish(&mut self) -> bool {
        either!(Driver, self, ring => ring.publish())
    }

    /// As [`split::Driver::commit`] and [`packed::Driver::commit`].
    #[inline(always)]
    pub fn commit(&mut self) {
        either!(Driver, self, ring => ring.commit());
    }

    /// As [`split::Driver::needs_kick`] and [`packed::Driver::needs_kick`].
    #[inline(always)]
    pub fn needs_kick(&mut self) -> bool {
        either!(Driver, self, ring => ring.needs_kick())
    }

    /// As [`split::Driver::poll_each`] and [`packed::Driver::poll_each`].
    #[inline(always)]
    pub fn poll_each(&mut self, max: usize, each: impl FnMut(Completion)) -> usize {
        either!(Driver, self, ring => ring.poll_each(max, each))
    }

    /// As [`split::Driver::detach_each`] and [`packed::Driver::detach_each`].
    ///
    /// # Safety
    /// As those.
    pub unsafe fn detach_each(&mut self, each: impl FnMut(u64)) {
        // SAFETY: passed on.
        unsafe { either!(Driver, self, ring => ring.detach_each(each)) };
    }
}

impl<S> Driver<S> {
    /// As [`split::Driver::set_notify`] and [`packed::Driver::set_notify`].
    #[inline]
    pub fn set_notify(&mut self, on: bool) -> bool {
        either!(Driver, self, ring => ring.set_notify(on))
    }

    /// Entries of the queue.
    #[inline]
    pub fn size(&self) -> u16 {
        either!(Driver, self, ring => ring.size())
    }

    /// Free descriptors.
    #[inline(always)]
    pub fn free(&self) -> u16 {
        either!(Driver, self, ring => ring.free())
    }

    /// Chains in flight: added and not yet taken back, published or not.
    #[inline]
    pub fn in_flight(&self) -> u16 {
        either!(Driver, self, ring => ring.in_flight())
    }

    /// What the device did wrong so far.
    #[inline]
    pub fn anomalies(&self) -> Anomalies {
        either!(Driver, self, ring => ring.anomalies())
    }

    /// What the device says cannot be trusted any more: nothing is added or completed until [`Driver::detach_each`].
    #[inline]
    pub fn is_broken(&self) -> bool {
        either!(Driver, self, ring => ring.is_broken())
    }
}

impl Device {
    /// As [`split::Device::new`] and [`packed::Device::new`]. `base` is what VHOST_USER_SET_VRING_BASE carries: for a split
    /// ring the available index, for a packed ring a [`packed::Base`]. [`Format::start_base`] if there was no such message.
    ///
    /// # Errors
    /// As those.
    ///
    /// # Safety
    /// As those.
    pub unsafe fn new(memory: Memory, size: u16, options: Options, base: u32) -> Result<Self, Error> {
        // SAFETY: passed on.
        unsafe {
            match memory {
                Memory::Split(memory) => split::Device::new(memory, size, options, base as u16).map(Self::Split),
                Memory::Packed(memory) => {
                    packed::Device::new(memory, size, options, packed::Base::decode(base)).map(Self::Packed)
                }
            }
        }
    }

    /// As [`packed::Device::set_vectors`]. A split ring has no use for them.
    pub fn set_vectors(&mut self, vectors: Vectors) {
        if let Self::Packed(ring) = self {
            ring.set_vectors(vectors);
        }
    }

    /// As [`split::Device::has_available`] and [`packed::Device::has_available`].
    #[inline]
    pub fn has_available(&mut self) -> bool {
        either!(Device, self, ring => ring.has_available())
    }

    /// As [`split::Device::pop`] and [`packed::Device::pop`].
    ///
    /// # Errors
    /// As those.
    #[inline]
    pub fn pop<T, S>(&mut self, translate: &T, chain: &mut Chain<S>) -> Result<Option<Head>, Error>
    where
        T: Translate,
        S: AsRef<[Part]> + AsMut<[Part]>,
    {
        either!(Device, self, ring => ring.pop(translate, chain))
    }

    /// As [`split::Device::pop_each`] and [`packed::Device::pop_each`].
    ///
    /// # Errors
    /// As those.
    #[inline(always)]
    pub fn pop_each<T, S>(
        &mut self,
        translate: &T,
        chain: &mut Chain<S>,
        max: usize,
        each: impl FnMut(Popped<'_>) -> Verdict,
    ) -> Result<usize, Error>
    where
        T: Translate,
        S: AsRef<[Part]> + AsMut<[Part]>,
    {
        either!(Device, self, ring => ring.pop_each(translate, chain, max, each))
    }

    /// As [`split::Device::peek_singles`] and [`packed::Device::peek_singles`].
    #[inline(always)]
    pub fn peek_singles<T: Translate>(&mut self, translate: &T, direction: Direction, singles: &mut [Single]) -> usize {
        either!(Device, self, ring => ring.peek_singles(translate, direction, singles))
    }

    /// As [`split::Device::use_read`] and [`packed::Device::use_read`].
    #[inline(always)]
    pub fn use_read(&mut self, singles: &[Single]) -> usize {
        either!(Device, self, ring => ring.use_read(singles))
    }

    /// As [`split::Device::use_written`] and [`packed::Device::use_written`].
    #[inline(always)]
    pub fn use_written(&mut self, singles: &[Single]) -> usize {
        either!(Device, self, ring => ring.use_written(singles))
    }

    /// As [`split::Device::undo`] and [`packed::Device::undo`].
    #[inline]
    pub fn undo(&mut self, last: Head) -> bool {
        either!(Device, self, ring => ring.undo(last))
    }

    /// As [`split::Device::push`] and [`packed::Device::push`].
    #[inline]
    pub fn push(&mut self, head: Head, len: u32) {
        either!(Device, self, ring => ring.push(head, len));
    }

    /// As [`split::Device::push_batch`] and [`packed::Device::push_batch`].
    #[inline]
    pub fn push_batch(&mut self, heads: &[Head]) {
        either!(Device, self, ring => ring.push_batch(heads));
    }

    /// As [`split::Device::publish`] and [`packed::Device::publish`].
    #[inline(always)]
    pub fn publish(&mut self) -> bool {
        either!(Device, self, ring => ring.publish())
    }

    /// As [`split::Device::commit`] and [`packed::Device::commit`].
    #[inline(always)]
    pub fn commit(&mut self) {
        either!(Device, self, ring => ring.commit());
    }

    /// As [`split::Device::needs_call`] and [`packed::Device::needs_call`].
    #[inline(always)]
    pub fn needs_call(&mut self) -> bool {
        either!(Device, self, ring => ring.needs_call())
    }

    /// As [`split::Device::set_notify`] and [`packed::Device::set_notify`].
    #[inline]
    pub fn set_notify(&mut self, on: bool) -> bool {
        either!(Device, self, ring => ring.set_notify(on))
    }

    /// What VHOST_USER_GET_VRING_BASE returns, once nothing is outstanding. See [`Device::new`].
    #[inline]
    pub fn base(&self) -> u32 {
        match self {
            Self::Split(ring) => ring.base().into(),
            Self::Packed(ring) => ring.base().encode(),
        }
    }

    /// Chains popped and not pushed.
    #[inline]
    pub fn outstanding(&self) -> u16 {
        either!(Device, self, ring => ring.outstanding())
    }

    /// Entries of the queue.
    #[inline]
    pub fn size(&self) -> u16 {
        either!(Device, self, ring => ring.size())
    }

    /// What the driver did wrong so far.
    #[inline]
    pub fn anomalies(&self) -> Anomalies {
        either!(Device, self, ring => ring.anomalies())
    }

    /// What the driver says cannot be trusted any more: nothing is popped any more.
    #[inline]
    pub fn is_broken(&self) -> bool {
        either!(Device, self, ring => ring.is_broken())
    }
}
