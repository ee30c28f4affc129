//! Pools and caches, by their public interface.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use hugemem::{Cache, Error, MAX_BUFFERS, PageSize, Pool, PutError, Segment, Slab};
use proptest::prelude::*;

/// A pool, and the memory under it.
struct Fixture {
    pool: Pool,
    _segment: Segment,
}

fn slab(segment: &Segment, buffer_size: u32, count: u32) -> Slab {
    Slab {
        base: segment.base(),
        buffer_size,
        count,
        headroom: 0,
    }
}

fn fixture(buffer_size: u32, count: u32) -> Fixture {
    let segment = Segment::anonymous(buffer_size as usize * count as usize, PageSize::BASE, None).unwrap();
    // SAFETY: the slab fills the segment, which lives as long as the pool.
    let pool = unsafe { Pool::new(slab(&segment, buffer_size, count)) }.unwrap();
    Fixture {
        pool,
        _segment: segment,
    }
}

#[test]
fn addresses_and_numbers() {
    for size in [2, 3, 64, 1000, 2048, 2240, 16448] {
        let Fixture { pool, _segment } = fixture(size, 300);
        let base = _segment.base().as_ptr();
        for id in 0..300 {
            let ptr = pool.ptr(id).unwrap().as_ptr();
            assert_eq!(ptr as usize - base as usize, id as usize * size as usize);
            assert_eq!(pool.id_of(ptr), Some(id));
            assert_eq!(pool.id_of(ptr.wrapping_add(1)), None, "not a buffer's first byte");
        }
        assert_eq!(pool.ptr(300), None);
        assert_eq!(pool.id_of(base.wrapping_add(300 * size as usize)), None);
        assert_eq!(pool.id_of(base.wrapping_sub(size as usize)), None);
        assert_eq!(pool.id_of(std::ptr::null()), None);
        assert_eq!(pool.id_of(usize::MAX as *const u8), None);
        assert_eq!((pool.capacity(), pool.buffer_size(), pool.headroom()), (300, size, 0));
    }
}

#[test]
fn slabs_that_are_none() {
    let segment = Segment::anonymous(4096, PageSize::BASE, None).unwrap();
    let good = slab(&segment, 1024, 4);
    for bad in [
        Slab { count: 0, ..good },
        Slab {
            count: MAX_BUFFERS + 1,
            buffer_size: 2,
            ..good
        },
        Slab { buffer_size: 0, ..good },
        Slab { buffer_size: 1, ..good },
        Slab { headroom: 1024, ..good },
        Slab {
            buffer_size: u32::MAX,
            count: MAX_BUFFERS,
            ..good
        },
    ] {
        // SAFETY: such a slab is refused before its memory matters.
        assert_eq!(unsafe { Pool::new(bad) }.unwrap_err(), Error::Slab, "{bad:?}");
    }
}

#[test]
fn foreign_and_double_frees_are_found() {
    let Fixture { pool, _segment } = fixture(64, 8);
    let mut ids = [0; 4];
    assert_eq!(pool.get_bulk(&mut ids), 4);
    assert_eq!(pool.available(), 4);

    assert_eq!(pool.put_bulk(&[ids[0], 8]), Err(PutError::Foreign(8)));
    assert_eq!(pool.put_bulk(&[ids[0], u32::MAX]), Err(PutError::Foreign(u32::MAX)));
    assert_eq!(pool.put_bulk(&[ids[1], ids[0], ids[1]]), Err(PutError::Double(ids[1])));
    assert_eq!(
        pool.put_bulk(&[ids[0], 7]),
        Err(PutError::Double(7)),
        "7 was never taken"
    );
    assert_eq!(pool.available(), 4, "an error puts nothing");
    pool.put_bulk(&ids).unwrap();
    assert_eq!(pool.put_bulk(&ids), Err(PutError::Double(ids[0])));

    let mut cache: Cache<&Pool, 4> = Cache::new(&pool);
    let id = cache.get().unwrap();
    assert_eq!(cache.put(8), Err(PutError::Foreign(8)));
    // In the cache itself, and in the pool.
    let (cached, pooled) = (1, 7);
    assert_eq!(cache.len(), 1);
    assert_eq!(cache.put(cached), Err(PutError::Double(cached)));
    assert_eq!(cache.put(pooled), Err(PutError::Double(pooled)));
    cache.put(id).unwrap();
    assert_eq!(cache.put(id), Err(PutError::Double(id)));
    drop(cache);
    assert_eq!(pool.available(), 8);
}

#[test]
fn unchecked_puts_are_seen_by_checked_ones() {
    let Fixture { pool, _segment } = fixture(64, 4);
    let mut ids = [0; 3];
    assert_eq!(pool.get_bulk(&mut ids), 3);
    // SAFETY: just taken, all different.
    unsafe { pool.put_bulk_unchecked(&ids[..2]) };
    assert_eq!(pool.put_bulk(&ids[..1]), Err(PutError::Double(ids[0])));
    pool.put_bulk(&ids[2..]).unwrap();
    assert_eq!(pool.available(), 4);
}

#[test]
fn a_cache_is_a_stack_and_gives_all_back() {
    let Fixture { pool, _segment } = fixture(64, 100);
    let mut cache: Cache<&Pool, 16> = Cache::new(&pool);
    let ids: Vec<u32> = std::iter::from_fn(|| cache.get()).collect();
    assert_eq!(ids.iter().collect::<HashSet<_>>().len(), 100, "all of them, none twice");
    assert!(cache.is_empty() && cache.get().is_none() && pool.available() == 0);
    for &id in &ids {
        cache.put(id).unwrap();
        assert!(cache.len() <= 16);
    }
    assert_eq!(cache.len() + pool.available() as usize, 100);
    assert_eq!(cache.get(), ids.last().copied(), "the last put is the first got");
    cache.put(ids[99]).unwrap();
    cache.flush();
    assert_eq!((cache.len(), pool.available()), (0, 100));
    cache.get().unwrap();
    drop(cache);
    assert_eq!(pool.available(), 99, "all but the one that is still held");
}

#[test]
fn a_cache_lives_by_itself_with_an_arc() {
    let Fixture { pool, _segment } = fixture(64, 10);
    let pool = Arc::new(pool);
    let mut cache: Cache<Arc<Pool>> = Cache::new(Arc::clone(&pool));
    let id = std::thread::spawn(move || cache.get()).join().unwrap().unwrap();
    assert_eq!(pool.available(), 9);
    pool.put_bulk(&[id]).unwrap();
}

#[test]
fn what_the_peer_writes_changes_nothing() {
    let Fixture { pool, _segment } = fixture(64, 50);
    let mut cache: Cache<&Pool, 8> = Cache::new(&pool);
    let mut seen = HashSet::new();
    for round in 0..10u8 {
        // SAFETY: inside of the segment; whoever has a buffer does not look at its bytes.
        unsafe { std::ptr::write_bytes(_segment.base().as_ptr(), round.wrapping_mul(31), _segment.len()) };
        seen.extend((0..5).map(|_| cache.get().unwrap()));
    }
    assert_eq!(seen.len(), 50);
    assert!(seen.iter().all(|&id| id < 50));
}

/// Threads that take and give in all the ways there are. Each buffer has an owner's mark outside of the pool, so that
/// one that is handed out twice is noticed at once.
#[test]
fn threads_never_share_a_buffer() {
    const COUNT: u32 = 512;
    let rounds: u32 = std::env::var("HUGEMEM_ROUNDS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(60_000);
    let Fixture { pool, _segment } = fixture(64, COUNT);
    let owners: Vec<AtomicU32> = (0..COUNT).map(|_| AtomicU32::new(0)).collect();
    std::thread::scope(|scope| {
        for me in 1..=4u32 {
            let (pool, owners) = (&pool, &owners);
            scope.spawn(move || {
                let own = |id: u32| assert_eq!(owners[id as usize].swap(me, Ordering::Relaxed), 0, "buffer {id}");
                let disown = |id: u32| assert_eq!(owners[id as usize].swap(0, Ordering::Relaxed), me, "buffer {id}");
                let mut random = me.wrapping_mul(0x9E37_79B9);
                let mut cache: Cache<&Pool, 32> = Cache::new(pool);
                let mut held = Vec::new();
                for _ in 0..rounds {
                    random ^= random << 13;
                    random ^= random >> 17;
                    random ^= random << 5;
                    let n = (random >> 8) as usize % 40;
                    match random % 4 {
                        0 => {
                            let mut ids = [0; 40];
                            let got = pool.get_bulk(&mut ids[..n]);
                            ids[..got].iter().for_each(|&id| own(id));
                            held.extend_from_slice(&ids[..got]);
                        }
                        1 => {
                            let ids = held.split_off(held.len().saturating_sub(n));
                            ids.iter().for_each(|&id| disown(id));
                            pool.put_bulk(&ids).unwrap();
                        }
                        2 => held.extend((0..n).map_while(|_| cache.get()).inspect(|&id| own(id))),
                        _ => {
                            for id in held.drain(..n.min(held.len())) {
                                disown(id);
                                cache.put(id).unwrap();
                            }
                        }
                    }
                    assert!(pool.available() <= COUNT);
                }
                held.iter().for_each(|&id| disown(id));
                pool.put_bulk(&held).unwrap();
            });
        }
    });
    assert_eq!(pool.available(), COUNT);
    let mut all = vec![0; COUNT as usize + 1];
    assert_eq!(pool.get_bulk(&mut all), COUNT as usize);
    assert_eq!(
        all[..COUNT as usize].iter().collect::<HashSet<_>>().len(),
        COUNT as usize
    );
}

#[derive(Debug, Clone)]
enum Step {
    CacheGet(usize),
    CachePut(usize),
    PoolGet(usize),
    PoolPut(usize),
    /// A number that may be anything.
    Bad(u32),
    Flush,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0usize..20).prop_map(Step::CacheGet),
        (0usize..20).prop_map(Step::CachePut),
        (0usize..20).prop_map(Step::PoolGet),
        (0usize..20).prop_map(Step::PoolPut),
        prop_oneof![0u32..40, any::<u32>()].prop_map(Step::Bad),
        Just(Step::Flush),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Against the set of numbers that are held.
    #[test]
    fn as_a_set(count in 1u32..32, steps in prop::collection::vec(step(), 0..80)) {
        let Fixture { pool, _segment } = fixture(64, count);
        let mut cache: Cache<&Pool, 6> = Cache::new(&pool);
        let mut held: Vec<u32> = Vec::new();
        for step in steps {
            match step {
                Step::CacheGet(n) => for _ in 0..n {
                    match cache.get() {
                        Some(id) => {
                            prop_assert!(id < count && !held.contains(&id));
                            held.push(id);
                        }
                        None => prop_assert_eq!(held.len(), count as usize, "none, but some are free"),
                    }
                },
                Step::CachePut(n) => for _ in 0..n.min(held.len()) {
                    cache.put(held.swap_remove(0)).unwrap();
                },
                Step::PoolGet(n) => {
                    let mut ids = vec![0; n];
                    let free = pool.available() as usize;
                    let got = pool.get_bulk(&mut ids);
                    prop_assert_eq!(got, n.min(free));
                    for &id in &ids[..got] {
                        prop_assert!(id < count && !held.contains(&id));
                        held.push(id);
                    }
                }
                Step::PoolPut(n) => {
                    let ids: Vec<u32> = held.drain(..n.min(held.len())).collect();
                    pool.put_bulk(&ids).unwrap();
                }
                Step::Bad(id) if held.contains(&id) => {}
                Step::Bad(id) => {
                    let error = if id < count { PutError::Double(id) } else { PutError::Foreign(id) };
                    prop_assert_eq!(cache.put(id), Err(error));
                    prop_assert_eq!(pool.put_bulk(&[id]), Err(error));
                }
                Step::Flush => cache.flush(),
            }
            prop_assert_eq!(held.len() + cache.len() + pool.available() as usize, count as usize);
        }
    }
}
