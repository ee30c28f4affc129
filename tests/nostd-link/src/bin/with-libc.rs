//! No std, no alloc, but the C library, for the system calls of `hugemem`.
#![no_std]
#![no_main]

use hugemem::{Arena, Cache, PageSize, Pool, Segment, Slab};
use nostd_link::{Outcome, check};

unsafe extern "C" {
    fn abort() -> !;
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: abort(3) takes nothing and does not return.
    unsafe { abort() }
}

/// # Safety
/// Called once, by the C library's start code.
#[unsafe(no_mangle)]
extern "C" fn main(argc: i32, _: *const *const u8) -> i32 {
    match nostd_link::run(argc as u64).and_then(|()| memory()) {
        Ok(()) => 0,
        Err(number) => i32::from(number),
    }
}

/// Checks 60 to 79: a segment, a ring's place in it, buffers in the rest.
fn memory() -> Outcome {
    let segment = Segment::memfd(c"nostd-link", 1 << 20, PageSize::BASE, None).map_err(|_| 60u8)?;
    check(segment.len() == 1 << 20 && segment.fd().is_some(), 61)?;
    let mut arena = Arena::new(0..segment.len());
    let ring = arena.alloc(8192, 4096).ok_or(62)?;
    check(ring.start % 4096 == 0, 63)?;
    let buffers = arena.alloc(128 * 2048, 64).ok_or(64)?;
    // SAFETY: the range is inside of the segment, which outlives the pool, and nobody else uses it.
    let pool = unsafe {
        let base = segment.base().add(buffers.start);
        Pool::new(Slab {
            base,
            buffer_size: 2048,
            count: 128,
            headroom: 128,
        })
    }
    .map_err(|_| 65u8)?;
    let mut cache: Cache<&Pool> = Cache::new(&pool);
    let id = cache.get().ok_or(66)?;
    let ptr = pool.ptr(id).ok_or(67)?;
    check(pool.id_of(ptr.as_ptr()) == Some(id), 68)?;
    // SAFETY: the buffer is ours and 2048 bytes long.
    unsafe { ptr.as_ptr().write_volatile(1) };
    check(cache.put(id).is_ok(), 69)?;
    check(cache.put(id).is_err(), 70)
}
