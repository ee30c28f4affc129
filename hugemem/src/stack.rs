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
            for place in out.iter_mut() {
                if id == NIL {
                    break;
                }
                *place = id;
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

#[cfg(all(test, loom))]
mod model {
    //! All interleavings of a few threads: `RUSTFLAGS="--cfg loom" cargo test -p hugemem --release --lib model`.

    use std::vec::Vec;

    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::thread;

    use super::*;

    /// A stack, and bytes behind each buffer that loom watches: two threads in one buffer at a time are a failure.
    struct Shared {
        stack: Stack,
        links: Vec<Link>,
        bytes: Vec<UnsafeCell<u32>>,
    }

    impl Shared {
        fn new(count: u32) -> Arc<Self> {
            Arc::new(Shared {
                stack: Stack::full(count),
                links: (0..count).map(|id| Link::new(initial_link(id, count))).collect(),
                bytes: (0..count).map(|_| UnsafeCell::new(0)).collect(),
            })
        }

        fn get(&self, out: &mut [u32]) -> usize {
            let got = self.stack.get(&self.links, out);
            for &id in &out[..got] {
                // SAFETY: the buffer is this thread's alone, which is what loom checks here.
                self.bytes[id as usize].with_mut(|bytes| unsafe { *bytes += 1 });
            }
            got
        }

        fn put(&self, ids: &[u32]) {
            for &id in ids {
                // SAFETY: as above.
                self.bytes[id as usize].with_mut(|bytes| unsafe { *bytes += 1 });
            }
            self.stack.put(&self.links, ids);
        }

        /// Takes everything: each buffer must be there once.
        fn check(&self, count: u32) {
            let mut all = [NIL; 8];
            let got = self.get(&mut all);
            all[..got].sort_unstable();
            assert!(all[..got].iter().copied().eq(0..count), "{:?} of {count}", &all[..got]);
            assert_eq!(self.stack.len(), 0);
        }
    }

    /// Runs `bodies` at the same time on a full stack of `count`, in all ways with up to `preemptions` preemptions.
    fn explore(count: u32, preemptions: usize, bodies: &'static [fn(&Shared)]) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(preemptions);
        model.check(move || {
            let shared = Shared::new(count);
            let threads: Vec<_> = bodies
                .iter()
                .map(|body| {
                    let shared = Arc::clone(&shared);
                    thread::spawn(move || body(&shared))
                })
                .collect();
            for thread in threads {
                thread.join().unwrap();
            }
            shared.check(count);
        });
    }

    fn one_by_one(shared: &Shared) {
        for _ in 0..2 {
            let mut id = [NIL];
            if shared.get(&mut id) == 1 {
                shared.put(&id);
            }
        }
    }

    fn in_bulk(shared: &Shared) {
        let mut ids = [NIL; 2];
        let got = shared.get(&mut ids);
        shared.put(&ids[..got]);
    }

    /// Takes two and puts the first while it keeps the second: the same on top again, with another below, which is what
    /// fools a stack without a tag.
    fn keeps_the_second(shared: &Shared) {
        let (mut first, mut second) = ([NIL], [NIL]);
        let got = (shared.get(&mut first), shared.get(&mut second));
        shared.put(&first[..got.0]);
        shared.put(&second[..got.1]);
    }

    #[test]
    fn bulks_and_singles() {
        explore(3, 3, &[in_bulk, one_by_one]);
    }

    #[test]
    fn the_same_on_top_again() {
        explore(3, 3, &[keeps_the_second, in_bulk]);
    }

    #[test]
    fn three_threads_on_two_buffers() {
        explore(2, 2, &[one_by_one, keeps_the_second, in_bulk]);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    fn full(count: u32) -> (Stack, Vec<Link>) {
        (
            Stack::full(count),
            (0..count).map(|id| Link::new(initial_link(id, count))).collect(),
        )
    }

    #[test]
    fn it_is_a_stack() {
        let (stack, links) = full(5);
        let mut out = [NIL; 8];
        assert_eq!(stack.get(&links, &mut out[..2]), 2);
        assert_eq!(out[..2], [0, 1]);
        stack.put(&links, &[1, 0]);
        assert_eq!(stack.get(&links, &mut []), 0);
        stack.put(&links, &[]);
        assert_eq!(stack.len(), 5);
        assert_eq!(stack.get(&links, &mut out), 5);
        assert_eq!(out[..5], [0, 1, 2, 3, 4]);
        assert_eq!(stack.get(&links, &mut out), 0);
        stack.put(&links, &[3]);
        assert_eq!((stack.get(&links, &mut out), out[0], stack.len()), (1, 3, 0));
    }

    #[test]
    fn the_tag_wraps() {
        let head = (u64::MAX << ID_BITS) | 7;
        assert_eq!(next(head, 9), 9);
        assert_eq!(top(next(head, NIL)), NIL);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Against a Vec, with the top at its end.
        #[test]
        fn as_a_vec(count in 1u32..40, steps in prop::collection::vec((any::<bool>(), 0usize..12, any::<u64>()), 0..120)) {
            let (stack, links) = full(count);
            let mut model: Vec<u32> = (0..count).rev().collect();
            let mut held: Vec<u32> = Vec::new();
            for (put, n, seed) in steps {
                if put {
                    let n = n.min(held.len());
                    if !held.is_empty() {
                        let turn = seed as usize % held.len();
                        held.rotate_left(turn);
                    }
                    let ids: Vec<u32> = held.drain(..n).collect();
                    stack.put(&links, &ids);
                    model.extend(&ids);
                } else {
                    let mut out = std::vec![NIL; n];
                    let got = stack.get(&links, &mut out);
                    let expected: Vec<u32> = model.split_off(model.len() - n.min(model.len())).into_iter().rev().collect();
                    prop_assert_eq!(&out[..got], &expected[..]);
                    held.extend(&out[..got]);
                }
                prop_assert_eq!(stack.len() as usize, model.len());
            }
        }
    }
}
