//! The same ring made of loom's cells.

use super::{Cursor, Desc, Event, Meta, check_size};
use crate::Error;
use loom::sync::Arc;
use loom::sync::atomic::{
    AtomicU32, AtomicU64,
    Ordering::{Acquire, Relaxed, Release, SeqCst},
    fence,
};
extern crate std;
use std::vec::Vec;

struct Cells {
    desc: Vec<Place>,
    driver: AtomicU32,
    device: AtomicU32,
}

/// The ring of one queue, in loom's memory.
#[derive(Clone)]
pub struct Memory(Arc<Cells>);

impl core::fmt::Debug for Memory {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Memory(loom)")
    }
}

impl Memory {
    /// A zeroed ring of `size` entries.
    pub fn new(size: u16) -> Self {
        Self(Arc::new(Cells {
            desc: (0..size)
                .map(|_| Place([AtomicU64::new(0), AtomicU64::new(0)]))
                .collect(),
            driver: AtomicU32::new(0),
            device: AtomicU32::new(0),
        }))
    }
}

#[derive(Clone)]
pub(crate) struct Ring {
    cells: Arc<Cells>,
    size: u16,
}

impl core::fmt::Debug for Ring {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Ring(loom)")
    }
}

impl Ring {
    pub(crate) unsafe fn new(memory: Memory, size: u16) -> Result<Self, Error> {
        let size = check_size(size)?;
        Ok(Self { cells: memory.0, size })
    }
    pub(crate) fn size(&self) -> u16 {
        self.size
    }
    fn at(&self, cursor: Cursor) -> &[AtomicU64; 2] {
        &self.cells.desc[cursor.position()].0
    }
    pub(crate) fn span(&self, cursor: Cursor, n: usize) -> &[Place] {
        let rest = &self.cells.desc[cursor.position()..];
        &rest[..n.min(rest.len())]
    }
    pub(crate) fn load_meta(&self, cursor: Cursor) -> Meta {
        Meta(self.at(cursor)[1].load(Acquire))
    }
    pub(crate) fn load_addr(&self, cursor: Cursor) -> u64 {
        self.at(cursor)[0].load(Relaxed)
    }
    pub(crate) fn store_addr(&self, cursor: Cursor, addr: u64) {
        self.at(cursor)[0].store(addr, Relaxed);
    }
    pub(crate) fn store(&self, cursor: Cursor, desc: Desc) {
        self.store_addr(cursor, desc.addr);
        self.store_meta(cursor, desc.meta);
    }
    pub(crate) fn store_meta(&self, cursor: Cursor, meta: Meta) {
        self.at(cursor)[1].store(meta.0, Relaxed);
    }
    pub(crate) fn publish(&self, cursor: Cursor, meta: Meta) {
        self.at(cursor)[1].store(meta.0, Release);
    }
    pub(crate) fn load_driver_event(&self) -> Event {
        Event::from_word(self.cells.driver.load(Relaxed))
    }
    pub(crate) fn store_driver_event(&self, event: Event) {
        self.cells.driver.store(event.word(), Relaxed);
    }
    pub(crate) fn load_device_event(&self) -> Event {
        Event::from_word(self.cells.device.load(Relaxed))
    }
    pub(crate) fn store_device_event(&self, event: Event) {
        self.cells.device.store(event.word(), Relaxed);
    }
    pub(crate) fn fence(&self) {
        fence(SeqCst);
    }
}

/// One descriptor.
pub(crate) struct Place([AtomicU64; 2]);

impl Place {
    pub(crate) fn load_meta(&self) -> Meta {
        Meta(self.0[1].load(Acquire))
    }
    pub(crate) fn load_meta_again(&self) -> Meta {
        Meta(self.0[1].load(Relaxed))
    }
    pub(crate) fn store(&self, desc: Desc) {
        self.0[0].store(desc.addr, Relaxed);
        self.0[1].store(desc.meta.0, Relaxed);
    }
}
