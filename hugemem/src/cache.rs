//! One thread's own free buffers.

use core::ops::Deref;

use crate::{Pool, PutError};

/// A stack of up to `N` free buffers in front of a [`Pool`], for one thread or one queue.
///
/// The buffer that was put last, whose bytes are likely still in the CPU's cache, is got first. When the cache runs
/// empty or over, half of it moves from or to the pool at once.
///
/// It holds the pool: `P` is `&Pool`, or an `Arc<Pool>` where the cache must live by itself. Dropping the cache gives
/// its buffers back. Forgetting it loses them for the pool's life, up to `N`.
///
/// The numbers are in the cache itself, 4 bytes each: with the default of 256 it is one KiB large.
pub struct Cache<P: Deref<Target = Pool>, const N: usize = 256> {
    /// Never more than `N`: the unsafe blocks here rely on it.
    len: usize,
    pool: P,
    ids: [u32; N],
}

impl<P: Deref<Target = Pool>, const N: usize> Cache<P, N> {
    /// An empty cache of a pool. `N` is at least 2.
    pub const fn new(pool: P) -> Self {
        const { assert!(N >= 2, "half of a cache must be a buffer") };
        Cache {
            len: 0,
            pool,
            ids: [0; N],
        }
    }

    /// Takes a buffer; `None` if neither the cache nor the pool has any.
    #[inline]
    pub fn get(&mut self) -> Option<u32> {
        if self.len == 0 {
            self.refill();
        }
        // The last place that is used; none if there is none.
        let last = self.len.checked_sub(1)?;
        // SAFETY: len <= N, so last < N.
        let id = unsafe { *self.ids.get_unchecked(last) };
        self.len = last;
        self.pool.take(id);
        Some(id)
    }

    /// Gives a buffer back.
    ///
    /// # Errors
    /// If it is not the pool's, or free already; the cache is as before.
    #[inline]
    pub fn put(&mut self, id: u32) -> Result<(), PutError> {
        self.pool.release(id)?;
        self.keep(id);
        Ok(())
    }

    /// Gives a buffer back without a look at its state.
    ///
    /// # Safety
    /// The buffer is the pool's, and the caller has it: it got it from this pool and has not put it since. `P` gives the
    /// same pool at every call.
    #[inline]
    pub unsafe fn put_unchecked(&mut self, id: u32) {
        // SAFETY: a buffer of the pool, as the caller says.
        unsafe { self.pool.release_unchecked(id) };
        self.keep(id);
    }

    #[inline(always)]
    fn keep(&mut self, id: u32) {
        if self.len == N {
            self.flush_half();
        }
        // SAFETY: len <= N, and after half of it was flushed len < N.
        unsafe { *self.ids.get_unchecked_mut(self.len) = id };
        self.len += 1;
    }

    /// Gives all buffers of the cache back to the pool, as before a thread rests for long.
    pub fn flush(&mut self) {
        let len = core::mem::take(&mut self.len);
        self.pool.push(&self.ids[..len]);
    }

    /// Free buffers in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the next `get` goes to the pool.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pool behind the cache.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    #[cold]
    #[inline(never)]
    fn refill(&mut self) {
        self.len = self.pool.pop(&mut self.ids[..N / 2]);
    }

    /// Gives the half that was put first back.
    #[cold]
    #[inline(never)]
    fn flush_half(&mut self) {
        let half = N / 2;
        self.pool.push(&self.ids[..half]);
        self.ids.copy_within(half.., 0);
        self.len = N - half;
    }
}

impl<P: Deref<Target = Pool>, const N: usize> Drop for Cache<P, N> {
    fn drop(&mut self) {
        self.flush();
    }
}
