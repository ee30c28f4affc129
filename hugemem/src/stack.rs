//! The free buffers: a stack that moves whole chains.
//!
//! Treiber's stack, on numbers in place of pointers. `links[id]` names the buffer below `id`. To put a bulk, link its
//! buffers to each other and swing the head once; to get one, walk down as many links and swing the head once. So a
//! bulk of 32 costs one compare-and-swap, and a thread that is preempted in the middle of either holds up nobody:
//! with a lock, on as few CPUs as threads, it would hold up everybody for a time slice.
//!
//! The head carries a tag that changes with every swing, so that a walk over links that others changed meanwhile fails
//! its swing, even if the same buffer is on top again. 40 bits of tag: a thread would have to sleep through exactly
//! a multiple of 2^40 swings, hours of nothing else, to be fooled.
//!
//! Links are always numbers of buffers, or [`NIL`]: a walk that races sees old ones, never wild ones.

#[cfg(loom)]
use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering};

#[cfg(not(loom))]
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Bits of the head that name a buffer; the rest is the tag.
const ID_BITS: u32 = 24;
const ID_MASK: u64 = (1 << ID_BITS) - 1;

/// No buffer.
pub(crate) const NIL: u32 = ID_MASK as u32;

/// The place below a buffer.
pub(crate) type Link = AtomicU32;

/// The top of a stack, on lines of its own: two, because the neighbour line is prefetched with each.
#[repr(align(128))]
pub(crate) struct Stack {
    head: AtomicU64,
    /// Buffers in the stack. Never less than there are: raised before a put, lowered after a get.
    len: AtomicU32,
}

impl Stack {
    /// A stack of the buffers `0..count`, 0 on top, once [`initial_link`] is in each of the links.
    pub(crate) fn full(count: u32) -> Self {
        Stack {
            head: AtomicU64::new(if count == 0 { NIL.into() } else { 0 }),
            len: AtomicU32::new(count),
        }
    }

    /// How many buffers are in the stack; while others get and put, about how many.
    pub(crate) fn len(&self) -> u32 {
        self.len.load(Ordering::Relaxed)
    }

    /// Takes buffers off the top, as many as `out` has places and the stack has buffers; how many it took.
    pub(crate) fn get(&self, links: &[Link], out: &mut [u32]) -> usize {
        if out.is_empty() {
            return 0;
        }
        // Acquire: the links below were written before the head came to be.
        let mut head = self.head.load(Ordering::Acquire);
        loop {
            let mut id = top(head);
            let mut got = 0;
            while id != NIL && got < out.len() {
                out[got] = id;
                got += 1;
                id = links[id as usize].load(Ordering::Relaxed);
            }
            if got == 0 {
                return 0;
            }
            // Acquire on success as well: whoever put these buffers is done with their bytes. The release of a put
            // reaches through later swings, which are read-modify-writes and so continue its release sequence.
            match self
                .head
                .compare_exchange_weak(head, next(head, id), Ordering::Acquire, Ordering::Acquire)
            {
                Ok(_) => {
                    self.len.fetch_sub(got as u32, Ordering::Relaxed);
                    return got;
                }
                Err(now) => head = now,
            }
        }
    }

    /// Puts buffers on the top, so that the last of them is taken first.
    ///
    /// The caller owns them, and each is less than `links.len()`, which is at most [`NIL`].
    pub(crate) fn put(&self, links: &[Link], ids: &[u32]) {
        let (Some(&bottom), Some(&above)) = (ids.first(), ids.last()) else {
            return;
        };
        for pair in ids.windows(2) {
            links[pair[1] as usize].store(pair[0], Ordering::Relaxed);
        }
        self.len.fetch_add(ids.len() as u32, Ordering::Relaxed);
        let mut head = self.head.load(Ordering::Relaxed);
        loop {
            links[bottom as usize].store(top(head), Ordering::Relaxed);
            // Release: the links, and what the caller did with the bytes, come before.
            match self
                .head
                .compare_exchange_weak(head, next(head, above), Ordering::Release, Ordering::Relaxed)
            {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }
}

/// The link of `id` in a stack that is full.
pub(crate) fn initial_link(id: u32, count: u32) -> u32 {
    if id + 1 < count { id + 1 } else { NIL }
}

fn top(head: u64) -> u32 {
    (head & ID_MASK) as u32
}

/// The head that follows `head` with `id` on top: the next tag.
fn next(head: u64, id: u32) -> u64 {
    ((head >> ID_BITS).wrapping_add(1) << ID_BITS) | u64::from(id)
}
