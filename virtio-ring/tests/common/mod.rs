//! What the tests share: rings in memory of their own, an arena with device addresses, random numbers.
#![allow(dead_code, reason = "each test uses its part")]

use std::alloc::{Layout as Alloc, alloc_zeroed, dealloc};
use std::cell::Cell;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering::SeqCst};
use virtio_ring::any::{self, Format};
use virtio_ring::split::{Layout, Memory};
use virtio_ring::{Direction, Error, Segment, Slot, Translate, Vectors, Window, packed, split};

/// Zeroed memory at 128 bytes.
pub struct Block {
    ptr: NonNull<u8>,
    alloc: Alloc,
}

// SAFETY: owned memory, accessed through raw pointers and atomics only.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Block {
    pub fn new(len: usize) -> Self {
        let alloc = Alloc::from_size_align(len.max(1), 128).unwrap();
        // SAFETY: the size is not 0.
        let ptr = NonNull::new(unsafe { alloc_zeroed(alloc) }).expect("memory");
        Self { ptr, alloc }
    }

    pub fn base(&self) -> NonNull<u8> {
        self.ptr
    }

    pub fn len(&self) -> usize {
        self.alloc.size()
    }

    pub fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset < self.len());
        // SAFETY: inside the block.
        unsafe { self.ptr.as_ptr().add(offset) }
    }

    pub fn byte(&self, offset: usize) -> &AtomicU8 {
        // SAFETY: inside the block, which lives as long as the reference.
        unsafe { AtomicU8::from_ptr(self.at(offset)) }
    }

    pub fn u16(&self, offset: usize) -> &AtomicU16 {
        assert!(offset.is_multiple_of(2) && offset + 2 <= self.len());
        // SAFETY: inside the block and aligned.
        unsafe { AtomicU16::from_ptr(self.at(offset).cast()) }
    }

    pub fn u32(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4) && offset + 4 <= self.len());
        // SAFETY: inside the block and aligned.
        unsafe { AtomicU32::from_ptr(self.at(offset).cast()) }
    }

    pub fn u64(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.len());
        // SAFETY: inside the block and aligned.
        unsafe { AtomicU64::from_ptr(self.at(offset).cast()) }
    }

    pub fn bytes(&self, offset: usize, len: usize) -> Vec<u8> {
        (offset..offset + len).map(|at| self.byte(at).load(SeqCst)).collect()
    }

    pub fn fill(&self, offset: usize, bytes: &[u8]) {
        for (i, byte) in bytes.iter().enumerate() {
            self.byte(offset + i).store(*byte, SeqCst);
        }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.ptr.as_ptr(), self.alloc) }
    }
}

/// A ring of either format.
pub struct Ring {
    pub block: Block,
    pub layout: any::Layout,
}

impl Ring {
    pub fn new(format: Format, size: u16) -> Self {
        let layout = any::Layout::new(format, size).unwrap();
        Self {
            block: Block::new(layout.block_len()),
            layout,
        }
    }

    pub fn memory(&self) -> any::Memory {
        // SAFETY: the block has the layout's length and alignment.
        unsafe { self.layout.place(self.block.base()) }
    }
}

/// One split ring, with the accesses of whoever does not keep to the rules.
pub struct Rings {
    pub block: Block,
    pub layout: Layout,
}

impl Rings {
    pub fn new(size: u16) -> Self {
        let layout = Layout::new(size).unwrap();
        Self {
            block: Block::new(layout.len),
            layout,
        }
    }

    pub fn memory(&self) -> Memory {
        // SAFETY: the block has the layout's length and alignment.
        unsafe { self.layout.place(self.block.base()) }
    }

    pub fn desc(&self, i: u16) -> (u64, u32, u16, u16) {
        let at = self.layout.desc + 16 * usize::from(i);
        (
            self.block.u64(at).load(SeqCst),
            self.block.u32(at + 8).load(SeqCst),
            self.block.u16(at + 12).load(SeqCst),
            self.block.u16(at + 14).load(SeqCst),
        )
    }

    pub fn set_desc(&self, i: u16, (addr, len, flags, next): (u64, u32, u16, u16)) {
        set_desc(
            &self.block,
            self.layout.desc + 16 * usize::from(i),
            (addr, len, flags, next),
        );
    }

    pub fn avail_flags(&self) -> &AtomicU16 {
        self.block.u16(self.layout.avail)
    }

    pub fn avail_idx(&self) -> &AtomicU16 {
        self.block.u16(self.layout.avail + 2)
    }

    pub fn avail_ring(&self, position: u16) -> &AtomicU16 {
        self.block
            .u16(self.layout.avail + 4 + 2 * usize::from(position & (self.layout.size - 1)))
    }

    pub fn used_event(&self) -> &AtomicU16 {
        self.block
            .u16(self.layout.avail + 4 + 2 * usize::from(self.layout.size))
    }

    pub fn used_flags(&self) -> &AtomicU16 {
        self.block.u16(self.layout.used)
    }

    pub fn used_idx(&self) -> &AtomicU16 {
        self.block.u16(self.layout.used + 2)
    }

    pub fn used_ring(&self, position: u16) -> (u32, u32) {
        let at = self.layout.used + 4 + 8 * usize::from(position & (self.layout.size - 1));
        (self.block.u32(at).load(SeqCst), self.block.u32(at + 4).load(SeqCst))
    }

    pub fn set_used_ring(&self, position: u16, (id, len): (u32, u32)) {
        let at = self.layout.used + 4 + 8 * usize::from(position & (self.layout.size - 1));
        self.block.u32(at).store(id, SeqCst);
        self.block.u32(at + 4).store(len, SeqCst);
    }

    pub fn avail_event(&self) -> &AtomicU16 {
        self.block.u16(self.layout.used + 4 + 8 * usize::from(self.layout.size))
    }
}

pub fn set_desc(block: &Block, at: usize, (addr, len, flags, next): (u64, u32, u16, u16)) {
    block.u64(at).store(addr, SeqCst);
    block.u32(at + 8).store(len, SeqCst);
    block.u16(at + 12).store(flags, SeqCst);
    block.u16(at + 14).store(next, SeqCst);
}

/// Memory that the device side may reach, at device addresses from `START` on: one region, or several side by side.
pub struct Arena(pub Block, u64);

impl Arena {
    pub const START: u64 = 0x10_0000_0000;

    pub fn new(len: usize) -> Self {
        Self::of_regions(len, u64::MAX)
    }

    /// Regions of so many bytes each.
    pub fn of_regions(len: usize, region: u64) -> Self {
        Self(Block::new(len), region)
    }

    pub fn contains(&self, ptr: NonNull<u8>, len: u32) -> bool {
        let (from, base) = (ptr.as_ptr() as usize, self.0.base().as_ptr() as usize);
        from >= base && from + len as usize <= base + self.0.len()
    }
}

// SAFETY: only memory of the block, all of which is valid, is given out.
unsafe impl Translate for Arena {
    fn translate(&self, addr: u64, len: u32) -> Option<NonNull<u8>> {
        let (ptr, n) = self.prefix(addr, len)?;
        (n == len).then_some(ptr)
    }

    fn prefix(&self, addr: u64, len: u32) -> Option<(NonNull<u8>, u32)> {
        let offset = addr.checked_sub(Self::START)?;
        let left = (self.0.len() as u64).checked_sub(offset)?.min(self.1 - offset % self.1);
        let n = u64::from(len).min(left) as u32;
        (n > 0).then(|| (NonNull::new(self.0.at(offset as usize)).unwrap(), n))
    }

    fn window(&self, addr: u64) -> Option<Window> {
        let offset = addr.checked_sub(Self::START)?;
        let len = self.0.len() as u64;
        let start = offset - offset % self.1;
        (offset < len).then(|| Window {
            theirs: Self::START + start,
            len: self.1.min(len - start),
            ours: NonNull::new(self.0.at(start as usize)).unwrap(),
        })
    }
}

/// xorshift64*: the same numbers for the same seed, everywhere.
pub struct Random(Cell<u64>);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(Cell::new(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1))
    }

    pub fn next(&self) -> u64 {
        let mut x = self.0.get();
        x ^= x >> 12;
        x ^= x << 25;
        x ^= x >> 27;
        self.0.set(x);
        x.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// 0 to `n - 1`.
    pub fn below(&self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }

    /// True once in `n`.
    pub fn one_in(&self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// Steps of the hostile tests in total, from VIRTIO_RING_STEPS.
pub fn steps(default: u64) -> u64 {
    std::env::var("VIRTIO_RING_STEPS").map_or(default, |steps| steps.parse().expect("VIRTIO_RING_STEPS is a number"))
}

/// The seed of the hostile tests, from VIRTIO_RING_SEED.
pub fn seed() -> u64 {
    std::env::var("VIRTIO_RING_SEED").map_or(0x5eed, |seed| seed.parse().expect("VIRTIO_RING_SEED is a number"))
}

/// What vector instructions this processor has.
pub fn vectors() -> Vec<Vectors> {
    let mut kinds = vec![Vectors::NONE];
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx2") {
            // SAFETY: just detected.
            kinds.push(unsafe { Vectors::avx2() });
        }
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: just detected.
            kinds.push(unsafe { Vectors::avx512() });
        }
    }
    kinds
}

/// What a driver posts in these tests. It may well be no memory: the device sides of the tests, which are all of this
/// process, look before they touch anything, and none is used while a driver detaches.
pub trait Posting {
    fn post(&mut self, chain: &[Segment], readable: usize, cookie: u64) -> Result<(), Error>;
    fn post_each(&mut self, direction: Direction, buffers: impl IntoIterator<Item = (Segment, u64)>) -> usize;
    fn detach(&mut self, each: impl FnMut(u64));
}

macro_rules! posting {
    ($($driver:ty),*) => {$(
        impl<S: AsMut<[Slot]>> Posting for $driver {
            fn post(&mut self, chain: &[Segment], readable: usize, cookie: u64) -> Result<(), Error> {
                // SAFETY: no device of the tests touches what is not the test's.
                unsafe { self.add(chain, readable, cookie) }
            }

            fn post_each(&mut self, direction: Direction, buffers: impl IntoIterator<Item = (Segment, u64)>) -> usize {
                // SAFETY: as above.
                unsafe { self.add_each(direction, buffers) }
            }

            fn detach(&mut self, each: impl FnMut(u64)) {
                // SAFETY: no device of the tests runs meanwhile.
                unsafe { self.detach_each(each) }
            }
        }
    )*};
}

posting!(any::Driver<S>, split::Driver<S>, packed::Driver<S>);

/// One packed ring, with the accesses of whoever does not keep to the rules.
pub struct Packed {
    pub block: Block,
    pub layout: packed::Layout,
}

impl Packed {
    pub fn new(size: u16) -> Self {
        let layout = packed::Layout::new(size).unwrap();
        Self {
            block: Block::new(layout.len),
            layout,
        }
    }

    pub fn memory(&self) -> packed::Memory {
        // SAFETY: the block has the layout's length and alignment.
        unsafe { self.layout.place(self.block.base()) }
    }

    /// Address, length, ID, flags.
    pub fn desc(&self, i: u16) -> (u64, u32, u16, u16) {
        let at = self.layout.desc + 16 * usize::from(i);
        (
            self.block.u64(at).load(SeqCst),
            self.block.u32(at + 8).load(SeqCst),
            self.block.u16(at + 12).load(SeqCst),
            self.block.u16(at + 14).load(SeqCst),
        )
    }

    pub fn set_desc(&self, i: u16, desc: (u64, u32, u16, u16)) {
        // The fields lie as those of a split ring's descriptor, whose last two are flags and next.
        set_desc(&self.block, self.layout.desc + 16 * usize::from(i), desc);
    }

    /// `desc` and `flags` of the driver's event suppression structure.
    pub fn driver_event(&self) -> [&AtomicU16; 2] {
        [
            self.block.u16(self.layout.driver),
            self.block.u16(self.layout.driver + 2),
        ]
    }

    /// The same of the device's.
    pub fn device_event(&self) -> [&AtomicU16; 2] {
        [
            self.block.u16(self.layout.device),
            self.block.u16(self.layout.device + 2),
        ]
    }
}
