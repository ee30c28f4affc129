//! The same rings made of loom's cells. Values are kept in native order: a model has one byte order.

use super::{Desc, check_size};
use crate::Error;
use loom::sync::Arc;
use loom::sync::atomic::{
    AtomicU16, AtomicU32, AtomicU64,
    Ordering::{Acquire, Relaxed, Release, SeqCst},
    fence,
};
extern crate std;
use std::vec::Vec;

struct Cells {
    desc: Vec<[AtomicU64; 2]>,
    avail_flags: AtomicU16,
    avail_idx: AtomicU16,
    avail_ring: Vec<AtomicU16>,
    used_event: AtomicU16,
    used_flags: AtomicU16,
    used_idx: AtomicU16,
    used_ring: Vec<[AtomicU32; 2]>,
    avail_event: AtomicU16,
}

/// The rings of one queue, in loom's memory.
#[derive(Clone)]
pub struct Memory(Arc<Cells>);

impl core::fmt::Debug for Memory {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Memory(loom)")
    }
}

impl Memory {
    /// Zeroed rings for `size` entries.
    pub fn new(size: u16) -> Self {
        Self(Arc::new(Cells {
            desc: (0..size).map(|_| [AtomicU64::new(0), AtomicU64::new(0)]).collect(),
            avail_flags: AtomicU16::new(0),
            avail_idx: AtomicU16::new(0),
            avail_ring: (0..size).map(|_| AtomicU16::new(0)).collect(),
            used_event: AtomicU16::new(0),
            used_flags: AtomicU16::new(0),
            used_idx: AtomicU16::new(0),
            used_ring: (0..size).map(|_| [AtomicU32::new(0), AtomicU32::new(0)]).collect(),
            avail_event: AtomicU16::new(0),
        }))
    }
}

#[derive(Clone)]
pub(crate) struct Ring {
    cells: Arc<Cells>,
    mask: usize,
}

impl core::fmt::Debug for Ring {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Ring(loom)")
    }
}

impl Ring {
    pub(crate) unsafe fn new(memory: Memory, size: u16) -> Result<Self, Error> {
        let size = check_size(size)?;
        Ok(Self {
            cells: memory.0,
            mask: usize::from(size) - 1,
        })
    }
    pub(crate) fn mask(&self) -> usize {
        self.mask
    }
    fn at(&self, i: usize) -> usize {
        i & self.mask
    }
    pub(crate) fn load_desc(&self, i: usize) -> Desc {
        let cell = &self.cells.desc[self.at(i)];
        Desc {
            addr: cell[0].load(Relaxed),
            meta: cell[1].load(Relaxed),
        }
    }
    pub(crate) fn store_desc(&self, i: usize, desc: Desc) {
        let cell = &self.cells.desc[self.at(i)];
        cell[0].store(desc.addr, Relaxed);
        cell[1].store(desc.meta, Relaxed);
    }
    pub(crate) fn update_desc(&self, i: usize, desc: Desc) {
        if self.load_desc(i) != desc {
            self.store_desc(i, desc);
        }
    }
    pub(crate) fn load_avail_entry(&self, position: usize) -> u16 {
        self.cells.avail_ring[self.at(position)].load(Relaxed)
    }
    pub(crate) fn store_avail_entry(&self, position: usize, head: u16) {
        self.cells.avail_ring[self.at(position)].store(head, Relaxed);
    }
    pub(crate) fn load_avail_idx(&self) -> u16 {
        self.cells.avail_idx.load(Acquire)
    }
    pub(crate) fn store_avail_idx(&self, idx: u16) {
        self.cells.avail_idx.store(idx, Release);
    }
    pub(crate) fn load_avail_flags(&self) -> u16 {
        self.cells.avail_flags.load(Relaxed)
    }
    pub(crate) fn store_avail_flags(&self, flags: u16) {
        self.cells.avail_flags.store(flags, Relaxed);
    }
    pub(crate) fn load_used_event(&self) -> u16 {
        self.cells.used_event.load(Relaxed)
    }
    pub(crate) fn store_used_event(&self, idx: u16) {
        self.cells.used_event.store(idx, Relaxed);
    }
    pub(crate) fn load_element(&self, position: usize) -> (u32, u32) {
        let cell = &self.cells.used_ring[self.at(position)];
        (cell[0].load(Relaxed), cell[1].load(Relaxed))
    }
    pub(crate) fn store_element(&self, position: usize, id: u32, len: u32) {
        let cell = &self.cells.used_ring[self.at(position)];
        cell[0].store(id, Relaxed);
        cell[1].store(len, Relaxed);
    }
    pub(crate) fn load_used_idx(&self) -> u16 {
        self.cells.used_idx.load(Acquire)
    }
    pub(crate) fn store_used_idx(&self, idx: u16) {
        self.cells.used_idx.store(idx, Release);
    }
    pub(crate) fn load_used_flags(&self) -> u16 {
        self.cells.used_flags.load(Relaxed)
    }
    pub(crate) fn store_used_flags(&self, flags: u16) {
        self.cells.used_flags.store(flags, Relaxed);
    }
    pub(crate) fn load_avail_event(&self) -> u16 {
        self.cells.avail_event.load(Relaxed)
    }
    pub(crate) fn store_avail_event(&self, idx: u16) {
        self.cells.avail_event.store(idx, Relaxed);
    }
    pub(crate) fn fence(&self) {
        fence(SeqCst);
    }
}
