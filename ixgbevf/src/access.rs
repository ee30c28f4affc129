//! How registers are reached: a mapped BAR, a model, a region of another process.

use core::marker::PhantomData;
use core::ptr::NonNull;
use volatile::VolatilePtr;

/// Bytes of BAR 0 of a virtual function: 16 KiB.
pub const BAR_LEN: u32 = 0x4000;

/// Access to the 32-bit registers of one virtual function, by their offset in BAR 0.
///
/// Offsets are multiples of 4 below [`BAR_LEN`]. A write need not have arrived when `write` returns, but it has when a
/// later `read` does, as on PCI. A device that is gone reads as all ones.
pub trait Registers {
    /// Reads the register at `offset`.
    fn read(&self, offset: u32) -> u32;

    /// Writes the register at `offset`.
    fn write(&self, offset: u32, value: u32);
}

impl<T: Registers + ?Sized> Registers for &T {
    #[inline(always)]
    fn read(&self, offset: u32) -> u32 {
        (**self).read(offset)
    }

    #[inline(always)]
    fn write(&self, offset: u32, value: u32) {
        (**self).write(offset, value);
    }
}

/// A mapped BAR 0: an access is one load or store, and the bounds fold away where the offset is a constant.
#[derive(Clone, Copy, Debug)]
pub struct Bar {
    base: NonNull<u32>,
}

// SAFETY: an address; every access is a volatile one of its own, and `Bar::new` makes the mapping's owner promise that
// all threads may make them.
unsafe impl Send for Bar {}
// SAFETY: as above.
unsafe impl Sync for Bar {}

impl Bar {
    /// # Safety
    /// `base` is aligned to 4 and the [`BAR_LEN`] bytes there are the device's registers (or memory that stands for
    /// them), mapped for as long as the value or a copy of it is used, by any thread.
    pub const unsafe fn new(base: NonNull<u8>) -> Self {
        Self { base: base.cast() }
    }

    #[inline(always)]
    fn at(&self, offset: u32) -> VolatilePtr<'_, u32> {
        // A wrong offset must not leave the mapping: it wraps instead.
        let index = (offset & (BAR_LEN - 4)) as usize / 4;
        // SAFETY: inside the mapping, by the mask; aligned as `base` is. Registers have no other rule of aliasing.
        unsafe { VolatilePtr::new(self.base.add(index)) }
    }
}

impl Registers for Bar {
    #[inline(always)]
    fn read(&self, offset: u32) -> u32 {
        u32::from_le(self.at(offset).read())
    }

    #[inline(always)]
    fn write(&self, offset: u32, value: u32) {
        self.at(offset).write(value.to_le());
    }
}

/// Read-only: reading has no effect.
#[derive(Clone, Copy, Debug)]
pub struct RO;
/// Read and write: reading has no effect.
#[derive(Clone, Copy, Debug)]
pub struct RW;
/// Write-only.
#[derive(Clone, Copy, Debug)]
pub struct WO;
/// Reading clears, so that only its own accessor reads it: never [`Regs::read`].
#[derive(Clone, Copy, Debug)]
pub struct RC;

/// What a register's access letters allow.
pub(crate) trait Letters {
    const ACCESS: Access;
}

/// The access letters of a row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Access {
    /// Read-only.
    ReadOnly,
    /// Read and write.
    ReadWrite,
    /// Write-only.
    WriteOnly,
    /// Some or all bits clear when it is read.
    ReadClears,
}

impl Letters for RO {
    const ACCESS: Access = Access::ReadOnly;
}
impl Letters for RW {
    const ACCESS: Access = Access::ReadWrite;
}
impl Letters for WO {
    const ACCESS: Access = Access::WriteOnly;
}
impl Letters for RC {
    const ACCESS: Access = Access::ReadClears;
}

pub(crate) trait Readable {}
impl Readable for RO {}
impl Readable for RW {}

pub(crate) trait Writable {}
impl Writable for RW {}
impl Writable for WO {}
impl Writable for RC {}

/// One register.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reg<A> {
    offset: u32,
    letters: PhantomData<A>,
}

impl<A> Reg<A> {
    pub(crate) const fn new(offset: u32) -> Self {
        Self {
            offset,
            letters: PhantomData,
        }
    }

    #[inline(always)]
    pub(crate) const fn offset(self) -> u32 {
        self.offset
    }
}

/// Equal registers at equal distances: the one helper for all of them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Array<A> {
    first: Reg<A>,
    stride: u32,
    count: u32,
}

impl<A: Copy> Array<A> {
    pub(crate) const fn new(offset: u32, stride: u32, count: u32) -> Self {
        Self {
            first: Reg::new(offset),
            stride,
            count,
        }
    }

    /// # Panics
    /// If there is no such register: indices are checked where they come in.
    #[inline(always)]
    pub(crate) const fn at(self, i: usize) -> Reg<A> {
        assert!(i < self.count as usize, "no such register");
        Reg::new(self.first.offset + self.stride * i as u32)
    }

    pub(crate) const fn len(self) -> usize {
        self.count as usize
    }
}

/// Registers by their row of the table: what the letters forbid does not compile.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Regs<R>(pub(crate) R);

impl<R: Registers> Regs<R> {
    #[inline(always)]
    pub(crate) fn read<A: Readable>(&self, register: Reg<A>) -> u32 {
        self.0.read(register.offset)
    }

    /// The accessor of registers that clear when they are read.
    #[inline(always)]
    pub(crate) fn take(&self, register: Reg<RC>) -> u32 {
        self.0.read(register.offset)
    }

    #[inline(always)]
    pub(crate) fn write<A: Writable>(&self, register: Reg<A>, value: u32) {
        self.0.write(register.offset, value);
    }

    pub(crate) fn update<A: Readable + Writable + Copy>(&self, register: Reg<A>, clear: u32, set: u32) {
        self.write(register, self.read(register) & !clear | set);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_memory_that_no_offset_leaves() {
        let mut words = [0u32; BAR_LEN as usize / 4];
        // SAFETY: the array has the length and the alignment, and outlives the value.
        let bar = unsafe { Bar::new(NonNull::from(&mut words).cast()) };
        bar.write(0x1018, 7);
        bar.write(BAR_LEN - 4, 9);
        assert_eq!((bar.read(0x1018), bar.read(BAR_LEN - 4)), (7, 9));
        // Beyond the end, and between two registers.
        assert_eq!((bar.read(BAR_LEN + 0x1018), bar.read(0x101a)), (7, 7));
        assert_eq!(words[0x1018 / 4], 7);
    }

    #[test]
    #[should_panic = "no such register"]
    fn an_array_has_an_end() {
        Array::<RW>::new(0x1000, 0x40, 8).at(8);
    }
}
