//! Packet buffers for all threads.

use core::ptr::NonNull;
use core::sync::atomic::{AtomicU8, Ordering};

use crate::stack::{Link, NIL, Stack, initial_link};
use crate::{Error, PutError, sys};

/// Buffers that one pool can have: 16,777,215.
pub const MAX_BUFFERS: u32 = NIL;

/// Memory, cut into buffers of the same size.
#[derive(Debug, Clone, Copy)]
pub struct Slab {
    /// The first byte of the first buffer.
    pub base: NonNull<u8>,
    /// Bytes from one buffer to the next, headroom included. At least 2.
    pub buffer_size: u32,
    /// Buffers, 1 to [`MAX_BUFFERS`].
    pub count: u32,
    /// Bytes at a buffer's start that are left for what comes before a packet; less than `buffer_size`.
    pub headroom: u32,
}

impl Slab {
    /// Bytes of all buffers. `None` if that is no size.
    pub fn bytes(&self) -> Option<usize> {
        (self.buffer_size as usize)
            .checked_mul(self.count as usize)
            .filter(|&bytes| bytes <= isize::MAX as usize)
    }
}

/// The free buffers of a slab, shared by all threads.
///
/// Buffers are named by numbers, dense from 0, so that a user can keep an array of its own beside the pool. The pool
/// never touches their bytes. What it must know of them is in private memory, 5 bytes a buffer: the link of the free
/// list and the state. A peer that writes all of the shared segment changes none of it.
///
/// Getting and putting is lock-free, and costs one compare-and-swap for a whole bulk. For single buffers there is the
/// [`Cache`](crate::Cache).
///
/// # What is checked
///
/// [`put_bulk`](Self::put_bulk) refuses numbers that are not the pool's, and buffers that are free already. The state of
/// a buffer is a byte that is read, then written: two threads that put the same buffer in the same instant may both
/// pass. The pool stays sound, but would hand that buffer out twice, and later puts tell.
pub struct Pool {
    stack: Stack,
    meta: Meta,
    slab: Slab,
    /// 2^64 / buffer_size, rounded up: division by multiplication.
    reciprocal: u64,
}

// SAFETY: the slab's pointer is only given out, never followed; the rest is atomics in memory that the pool owns.
unsafe impl Send for Pool {}
// SAFETY: as above.
unsafe impl Sync for Pool {}

/// A buffer that is in the pool or in a cache. Zero, so that fresh memory says it.
const FREE: u8 = 0;
/// A buffer that somebody has.
const TAKEN: u8 = 1;

/// The private memory: the links, then the states.
struct Meta {
    links: NonNull<Link>,
    states: NonNull<AtomicU8>,
    count: usize,
    bytes: usize,
}

impl Meta {
    fn new(count: u32) -> Result<Self, Error> {
        let bytes = (count as usize * (size_of::<Link>() + 1)).next_multiple_of(sys::base_page());
        let base = sys::mmap(
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE,
            -1,
        )
        .map_err(|errno| Error::Map { errno })?;
        let (links, count) = (base.cast::<Link>(), count as usize);
        // SAFETY: the links and then the states are inside of the mapping.
        let states = unsafe { links.add(count) }.cast();
        Ok(Meta {
            links,
            states,
            count,
            bytes,
        })
    }

    #[inline(always)]
    fn links(&self) -> &[Link] {
        // SAFETY: the mapping begins with `count` links; zero is a value of theirs, and a page's alignment suffices.
        unsafe { core::slice::from_raw_parts(self.links.as_ptr(), self.count) }
    }

    #[inline(always)]
    fn states(&self) -> &[AtomicU8] {
        // SAFETY: after the links the mapping has `count` bytes, which are only used as atomics.
        unsafe { core::slice::from_raw_parts(self.states.as_ptr(), self.count) }
    }
}

impl Drop for Meta {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`; the slices borrow self.
        unsafe { sys::munmap(self.links.cast(), self.bytes) };
    }
}

impl Pool {
    /// A pool of all the buffers of `slab`; all are free, and the lowest numbers go first.
    ///
    /// # Errors
    /// [`Error::Slab`] for a slab that is none, [`Error::Map`] without private memory.
    ///
    /// # Safety
    /// As long as the pool lives, the slab's memory is mapped, and it is one allocation. That nobody else uses it while
    /// the pool hands it out is the condition of those who use the pointers.
    pub unsafe fn new(slab: Slab) -> Result<Self, Error> {
        let Slab {
            buffer_size,
            count,
            headroom,
            ..
        } = slab;
        if slab.bytes().is_none() || count == 0 || count > MAX_BUFFERS || buffer_size < 2 || headroom >= buffer_size {
            return Err(Error::Slab);
        }
        // The reciprocal is exact for offsets below 2^64 / buffer_size.
        if u128::from(buffer_size) * u128::from(buffer_size) * u128::from(count) > 1 << 64 {
            return Err(Error::Slab);
        }
        let meta = Meta::new(count)?;
        for (id, link) in (0..).zip(meta.links()) {
            link.store(initial_link(id, count), Ordering::Relaxed);
        }
        let reciprocal = u64::MAX / u64::from(buffer_size) + 1;
        Ok(Pool {
            stack: Stack::full(count),
            meta,
            slab,
            reciprocal,
        })
    }

    /// Takes up to `out.len()` buffers; how many, which is less only if the pool ran empty. Their numbers are in the
    /// first places of `out`; what is in the others is not said.
    pub fn get_bulk(&self, out: &mut [u32]) -> usize {
        let got = self.pop(out);
        for &id in &out[..got] {
            self.take(id);
        }
        got
    }

    /// Gives buffers back: all of them or, with an error, none. The last of them is the first to be taken again.
    ///
    /// # Errors
    /// The first that is [`Foreign`](PutError::Foreign), or free already, perhaps because it is in `ids` twice.
    pub fn put_bulk(&self, ids: &[u32]) -> Result<(), PutError> {
        for (done, &id) in ids.iter().enumerate() {
            if let Err(error) = self.release(id) {
                for &id in &ids[..done] {
                    self.take(id);
                }
                return Err(error);
            }
        }
        self.push(ids);
        Ok(())
    }

    /// Like [`put_bulk`](Self::put_bulk), without a look at the buffers' states.
    ///
    /// # Safety
    /// The buffers are this pool's, all different, and the caller has them: it got them from this pool and has not put
    /// them since.
    pub unsafe fn put_bulk_unchecked(&self, ids: &[u32]) {
        for &id in ids {
            // SAFETY: a buffer of this pool.
            unsafe { self.release_unchecked(id) };
        }
        self.push(ids);
    }

    /// A buffer's first byte, headroom included. `None` if the pool has no such buffer.
    #[inline]
    pub fn ptr(&self, id: u32) -> Option<NonNull<u8>> {
        // SAFETY: less than count.
        (id < self.slab.count).then(|| unsafe { self.ptr_unchecked(id) })
    }

    /// A buffer's first byte, headroom included.
    ///
    /// # Safety
    /// `id` is less than [`capacity`](Self::capacity).
    #[inline]
    pub unsafe fn ptr_unchecked(&self, id: u32) -> NonNull<u8> {
        // SAFETY: inside the slab, which is one allocation (the condition of `new`).
        unsafe { self.slab.base.add(id as usize * self.slab.buffer_size as usize) }
    }

    /// The buffer that begins at `ptr`; `None` if none does.
    #[inline]
    pub fn id_of(&self, ptr: *const u8) -> Option<u32> {
        let offset = (ptr as usize).wrapping_sub(self.slab.base.as_ptr() as usize) as u64;
        let id = ((u128::from(offset) * u128::from(self.reciprocal)) >> 64) as u64;
        let exact = id < u64::from(self.slab.count) && id * u64::from(self.slab.buffer_size) == offset;
        exact.then_some(id as u32)
    }

    /// Buffers that are free and in no cache; while others get and put, about so many.
    pub fn available(&self) -> u32 {
        self.stack.len().min(self.slab.count)
    }

    /// All buffers.
    pub fn capacity(&self) -> u32 {
        self.slab.count
    }

    /// Bytes of a buffer, headroom included.
    pub fn buffer_size(&self) -> u32 {
        self.slab.buffer_size
    }

    /// Bytes at a buffer's start that are left for what comes before a packet.
    pub fn headroom(&self) -> u32 {
        self.slab.headroom
    }

    /// Takes buffers off the stack that stay free: a cache's.
    pub(crate) fn pop(&self, out: &mut [u32]) -> usize {
        self.stack.get(self.meta.links(), out)
    }

    /// Puts buffers on the stack that are free already. Each is this pool's.
    pub(crate) fn push(&self, ids: &[u32]) {
        self.stack.put(self.meta.links(), ids);
    }

    /// Notes that somebody has the buffer. A number that is not the pool's changes nothing.
    #[inline(always)]
    pub(crate) fn take(&self, id: u32) {
        if let Some(state) = self.meta.states().get(id as usize) {
            state.store(TAKEN, Ordering::Relaxed);
        }
    }

    /// Notes that the buffer is free, if it is not so already.
    #[inline(always)]
    pub(crate) fn release(&self, id: u32) -> Result<(), PutError> {
        let Some(state) = self.meta.states().get(id as usize) else {
            return Err(PutError::Foreign(id));
        };
        if state.load(Ordering::Relaxed) == FREE {
            return Err(PutError::Double(id));
        }
        state.store(FREE, Ordering::Relaxed);
        Ok(())
    }

    /// Notes that the buffer is free.
    ///
    /// # Safety
    /// `id` is less than the pool's count.
    #[inline(always)]
    pub(crate) unsafe fn release_unchecked(&self, id: u32) {
        debug_assert!(id < self.slab.count);
        // SAFETY: a buffer of this pool, so it has a state.
        unsafe { self.meta.states().get_unchecked(id as usize) }.store(FREE, Ordering::Relaxed);
    }
}

impl core::fmt::Debug for Pool {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Pool")
            .field("slab", &self.slab)
            .field("available", &self.available())
            .finish()
    }
}
