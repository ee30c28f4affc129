//! What getting and putting buffers costs: `cargo bench -p hugemem`.
//!
//! Each line is the median of 31 runs on one thread, in nanoseconds a buffer, for a get and a put together. With an
//! argument, `cargo bench -p hugemem -- CASE COUNT`, it runs that one case COUNT times and prints nothing, for counting
//! instructions: `valgrind --tool=callgrind` with two COUNTs, and the difference.

use std::hint::black_box;
use std::time::Instant;

use hugemem::{Cache, PageSize, Pool, Segment, Slab};

const BURST: usize = 32;

/// A burst got and put, `count` times.
type Case = fn(&Pool, usize);

fn cache(pool: &Pool, count: usize) {
    let mut cache: Cache<&Pool> = Cache::new(pool);
    let mut ids = [0u32; BURST];
    for _ in 0..count {
        for id in &mut ids {
            *id = cache.get().expect("there are enough");
        }
        for &id in black_box(&ids) {
            cache.put(id).expect("it is ours");
        }
    }
}

fn cache_unchecked(pool: &Pool, count: usize) {
    let mut cache: Cache<&Pool> = Cache::new(pool);
    let mut ids = [0u32; BURST];
    for _ in 0..count {
        for id in &mut ids {
            *id = cache.get().expect("there are enough");
        }
        for &id in black_box(&ids) {
            // SAFETY: just taken, once.
            unsafe { cache.put_unchecked(id) };
        }
    }
}

fn bulk(pool: &Pool, count: usize) {
    let mut ids = [0u32; BURST];
    for _ in 0..count {
        let got = pool.get_bulk(&mut ids);
        pool.put_bulk(black_box(&ids[..got])).expect("they are ours");
    }
}

fn bulk_unchecked(pool: &Pool, count: usize) {
    let mut ids = [0u32; BURST];
    for _ in 0..count {
        let got = pool.get_bulk(&mut ids);
        // SAFETY: just taken, all different.
        unsafe { pool.put_bulk_unchecked(black_box(&ids[..got])) };
    }
}

const CASES: [(&str, Case); 4] = [
    ("cache", cache),
    ("cache_unchecked", cache_unchecked),
    ("bulk", bulk),
    ("bulk_unchecked", bulk_unchecked),
];

fn main() {
    let segment = Segment::anonymous(1024 * 2048, PageSize::BASE, None).expect("2 MiB of memory");
    let slab = Slab {
        base: segment.base(),
        buffer_size: 2048,
        count: 1024,
        headroom: 128,
    };
    // SAFETY: the slab is the segment, which outlives the pool.
    let pool = unsafe { Pool::new(slab) }.expect("a pool of 1024 buffers");
    let mut args = std::env::args().skip(1).filter(|arg| !arg.starts_with("--"));
    if let (Some(name), Some(count)) = (args.next(), args.next().and_then(|n| n.parse().ok())) {
        let case = CASES
            .iter()
            .find(|case| case.0 == name)
            .expect("one of the cases' names");
        return case.1(&pool, count);
    }
    for (name, case) in CASES {
        let mut runs: Vec<f64> = (0..31)
            .map(|_| {
                let start = Instant::now();
                case(&pool, 10_000);
                start.elapsed().as_nanos() as f64 / (10_000 * BURST) as f64
            })
            .collect();
        runs.sort_by(f64::total_cmp);
        println!(
            "{name:15} {:6.2} ns a buffer, got and put (fastest {:.2}, slowest {:.2})",
            runs[15], runs[0], runs[30]
        );
    }
}
