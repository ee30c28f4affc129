//! Packets that were dropped, on their way home to their pool: a magazine for each thread.
//!
//! A thread may sleep, or do something else, for ever with buffers in its magazine. Each magazine is behind a
//! [gate](crate::gate), whose control sides are known to all: a pool that closes takes home what is its own in any of them.

use std::cell::RefCell;
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{BULK, Inner, Meta};
use crate::gate::{self, ControlSide, DataSide};
use crate::port::lock;

/// Buffers of one pool.
struct Magazine {
    inner: Option<NonNull<Inner>>,
    ids: Vec<u32>,
}

const MAGAZINE: usize = 2 * BULK;

impl Magazine {
    /// Takes a buffer, which the caller owned.
    #[inline(always)]
    fn put(&mut self, inner: NonNull<Inner>, id: u32) {
        if self.inner != Some(inner) {
            self.flush();
            self.inner = Some(inner);
        }
        self.ids.push(id);
        // SAFETY: alive: this very buffer is a reference.
        if self.ids.len() == MAGAZINE || unsafe { inner.as_ref() }.closed.load(Ordering::Relaxed) {
            self.flush();
        }
    }

    /// Sends home what is of this pool.
    fn flush_of(&mut self, inner: NonNull<Inner>) {
        if self.inner == Some(inner) {
            self.flush();
        }
    }

    fn flush(&mut self) {
        if let Some(inner) = self.inner
            && !self.ids.is_empty()
        {
            // SAFETY: the magazine owned these buffers, and is emptied right below.
            unsafe { Inner::give(inner, &self.ids) };
            self.ids.clear();
        }
        self.inner = None;
    }
}

// SAFETY: the buffers are the magazine's own, and its pool is alive while they are out.
unsafe impl Send for Magazine {}

/// The control sides of all threads' magazines, by their numbers.
static MAGAZINES: Mutex<Vec<(u64, ControlSide<Magazine>)>> = Mutex::new(Vec::new());

/// A thread's side of its magazine.
struct OwnMagazine {
    number: u64,
    gate: RefCell<DataSide<Magazine>>,
}

impl OwnMagazine {
    fn new() -> Self {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        let (data, mut control) = gate::pair(Magazine {
            inner: None,
            ids: Vec::with_capacity(MAGAZINE),
        });
        control.open();
        lock(&MAGAZINES).push((number, control));
        OwnMagazine {
            number,
            gate: RefCell::new(data),
        }
    }
}

impl Drop for OwnMagazine {
    fn drop(&mut self) {
        let control = {
            let mut all = lock(&MAGAZINES);
            let at = all.iter().position(|(number, _)| *number == self.number);
            at.map(|at| all.swap_remove(at).1)
        };
        if let Some(mut control) = control {
            control.close().flush();
        }
    }
}

/// Sends home what is of this pool, in whatever thread's magazine. What is freed later goes home at once if the pool says
/// that it is closed.
pub(super) fn flush_all_of(inner: NonNull<Inner>) {
    for (_, magazine) in lock(&MAGAZINES).iter_mut() {
        magazine.change(|magazine| magazine.flush_of(inner));
    }
}

thread_local! {
    static MAGAZINE_OF_THREAD: OwnMagazine = OwnMagazine::new();
}

pub(crate) fn flush_this_thread() {
    // At thread exit the magazine may be gone already, and is then flushed.
    let _ = MAGAZINE_OF_THREAD.try_with(|own| {
        let mut gate = own.gate.borrow_mut();
        loop {
            if let Some(mut magazine) = gate.enter() {
                return magazine.flush();
            }
            // A pool that closes is at it, for as long as that takes.
            std::thread::yield_now();
        }
    });
}

/// Frees packets: all segments of them.
///
/// # Safety
/// The caller owns the buffers and gives them up.
#[inline]
pub(crate) unsafe fn free(packets: impl IntoIterator<Item = NonNull<Meta>>) {
    let mut packets = packets.into_iter();
    // Of an ending thread the magazine is gone.
    let _ = MAGAZINE_OF_THREAD.try_with(|own| {
        if let Some(mut magazine) = own.gate.borrow_mut().enter() {
            for meta in &mut packets {
                // SAFETY: by the caller.
                unsafe { each_segment(meta, |inner, id| magazine.put(inner, id)) };
            }
        }
    });
    for meta in packets {
        // SAFETY: by the caller; the buffers are given up here.
        unsafe { each_segment(meta, |inner, id| Inner::give(inner, &[id])) };
    }
}

/// Takes a packet apart: the pool and the number of each of its buffers.
///
/// # Safety
/// The caller owns the chain and gives it up.
#[inline(always)]
unsafe fn each_segment(meta: NonNull<Meta>, mut each: impl FnMut(NonNull<Inner>, u32)) {
    let mut next = Some(meta);
    while let Some(mut meta) = next {
        // SAFETY: the caller owns the chain.
        let m = unsafe { meta.as_mut() };
        next = m.detach();
        // SAFETY: a buffer's pool is alive while the buffer is out.
        each(unsafe { NonNull::new_unchecked(m.pool.cast_mut()) }, m.id);
    }
}
