//! Sets of ranges and the allocator against one flag for each address.

use iova::{Allocator, AllocatorError, Range, Ranges, TooManyRanges};
use proptest::prelude::*;

fn range(start: u64, len: u64) -> Range {
    Range::new(start, len).unwrap()
}

/// Where the flags are set, as ranges.
fn runs(flags: &[bool]) -> Vec<Range> {
    let mut all = Vec::new();
    let mut start = None;
    for (at, set) in flags.iter().copied().chain([false]).enumerate() {
        match (set, start) {
            (true, None) => start = Some(at),
            (false, Some(from)) => {
                all.push(range(from as u64, (at - from) as u64));
                start = None;
            }
            _ => {}
        }
    }
    all
}

#[test]
fn the_ends_of_the_address_space() {
    let mut set = Ranges::<2>::new();
    set.insert(range(u64::MAX, 1)).unwrap();
    set.insert(range(0, 1)).unwrap();
    assert_eq!(set.len(), 2);
    assert_eq!(set.insert(range(5, 1)), Err(TooManyRanges));
    assert!(set.contains(range(u64::MAX, 1)) && !set.contains(range(u64::MAX - 1, 2)));
    set.insert(range(0, u64::MAX)).unwrap();
    // 2^64 addresses do not fit a length: the last one is left out.
    assert_eq!(set.iter().collect::<Vec<_>>(), [range(0, u64::MAX)]);
    set.remove(range(1, u64::MAX)).unwrap();
    assert_eq!(set.iter().collect::<Vec<_>>(), [range(0, 1)]);
}

#[test]
fn pages_side_by_side_become_one_range() {
    let mut set = Ranges::<2>::new();
    for page in [3, 2, 9, 1, 0] {
        set.insert(range(page * 0x1000, 0x1000)).unwrap();
    }
    assert_eq!(
        set.iter().collect::<Vec<_>>(),
        [range(0, 0x4000), range(0x9000, 0x1000)]
    );
    assert_eq!(set.remove(range(0x1000, 0x1000)), Err(TooManyRanges));
    assert!(set.contains(range(0, 0x4000)), "what is refused changes nothing");
}

#[test]
fn the_allocator_leaves_a_hole_alone() {
    let mut usable = Ranges::<4>::new();
    usable.insert(range(0, 0xfee0_0000)).unwrap();
    usable.insert(range(0xfef0_0000, 1 << 32)).unwrap();
    let mut allocator = Allocator::<4, 4>::new(usable);
    let below = allocator.allocate(0xfec0_0000, 0x20_0000).unwrap();
    assert_eq!(below.start(), 0);
    // 2 MiB are left below the window, 4 MiB are not.
    assert_eq!(allocator.allocate(4 << 20, 2 << 20).unwrap().start(), 0xff00_0000);
    assert_eq!(allocator.allocate(2 << 20, 4096).unwrap().start(), 0xfec0_0000);
    assert_eq!(allocator.claim(range(0xfee0_0000, 4096)), Err(AllocatorError::Unusable));
    assert_eq!(allocator.claim(range(4096, 4096)), Err(AllocatorError::Taken(below)));
    assert_eq!(allocator.allocate(1 << 40, 1), Err(AllocatorError::Exhausted));
    assert_eq!(allocator.allocate(0, 1), Err(AllocatorError::Invalid));
    assert_eq!(allocator.allocate(1, 3), Err(AllocatorError::Invalid));
    assert_eq!(allocator.release(range(0, 4096)), Err(AllocatorError::Missing));
    allocator.claim(range(1 << 32, 4096)).unwrap();
    assert_eq!(allocator.allocate(1, 1), Err(AllocatorError::Full));
    assert_eq!(allocator.claim(range((1 << 32) + 4096, 1)), Err(AllocatorError::Full));
    allocator.release(below).unwrap();
    assert_eq!(allocator.release(below), Err(AllocatorError::Missing), "only once");
}

#[test]
fn the_last_addresses_there_are() {
    let mut usable = Ranges::<1>::new();
    usable.insert(range(u64::MAX - 0xfff, 0x1000)).unwrap();
    let mut allocator = Allocator::<2, 1>::new(usable);
    assert_eq!(allocator.allocate(0x1000, 0x1000).unwrap().last(), u64::MAX);
    assert_eq!(allocator.allocate(1, 1), Err(AllocatorError::Exhausted));
    assert_eq!(allocator.allocate(1, 1 << 63), Err(AllocatorError::Exhausted));
}

const SPACE: usize = 96;

fn some_range() -> impl Strategy<Value = Range> {
    (0..SPACE as u64).prop_flat_map(|start| (Just(start), 1..=SPACE as u64 - start).prop_map(|(s, l)| range(s, l)))
}

proptest! {
    #[test]
    fn a_set_is_its_flags(steps in prop::collection::vec((any::<bool>(), some_range()), 1..40), probe in some_range()) {
        let mut set = Ranges::<6>::new();
        let mut flags = [false; SPACE];
        for (insert, r) in steps {
            let mut after = flags;
            after[r.start() as usize..=r.last() as usize].fill(insert);
            let done = if insert { set.insert(r) } else { set.remove(r) };
            prop_assert_eq!(done.is_ok(), runs(&after).len() <= 6);
            if done.is_ok() {
                flags = after;
            }
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), runs(&flags));
            let all = flags[probe.start() as usize..=probe.last() as usize].iter().all(|set| *set);
            prop_assert_eq!(set.contains(probe), all);
        }
    }

    #[test]
    fn the_lowest_that_fits(
        usable in prop::collection::vec(some_range(), 1..5),
        steps in prop::collection::vec((0..3u8, 1..20u64, 0..5u32, some_range()), 1..60),
    ) {
        let mut set = Ranges::<8>::new();
        let mut free = [false; SPACE];
        for r in usable {
            set.insert(r).unwrap();
            free[r.start() as usize..=r.last() as usize].fill(true);
        }
        let windows: Vec<Range> = set.iter().collect();
        let mut allocator = Allocator::<6, 8>::new(set);
        let mut out: Vec<Range> = Vec::new();
        for (step, len, align, r) in steps {
            let full = out.len() == 6;
            let is_free = |r: Range, free: &[bool; SPACE]| {
                r.last() < SPACE as u64 && free[r.start() as usize..=r.last() as usize].iter().all(|f| *f)
            };
            match step {
                0 => {
                    let expected = (0..SPACE as u64)
                        .filter(|start| start % (1 << align) == 0)
                        .map(|start| range(start, len))
                        .find(|r| is_free(*r, &free));
                    match allocator.allocate(len, 1 << align) {
                        Ok(given) => {
                            prop_assert_eq!(Some(given), expected);
                            free[given.start() as usize..=given.last() as usize].fill(false);
                            out.push(given);
                        }
                        Err(AllocatorError::Full) => prop_assert!(full),
                        Err(error) => prop_assert!(error == AllocatorError::Exhausted && expected.is_none()),
                    }
                }
                1 => {
                    let usable = windows.iter().any(|w| w.offset_of(r.start(), r.len()).is_some());
                    match allocator.claim(r) {
                        Ok(()) => {
                            prop_assert!(is_free(r, &free) && !full);
                            free[r.start() as usize..=r.last() as usize].fill(false);
                            out.push(r);
                        }
                        Err(AllocatorError::Unusable) => prop_assert!(!usable),
                        Err(AllocatorError::Taken(by)) => prop_assert!(out.contains(&by) && by.overlaps(r)),
                        Err(error) => prop_assert!(error == AllocatorError::Full && full && is_free(r, &free)),
                    }
                }
                _ => match out.pop() {
                    Some(given) => {
                        prop_assert_eq!(allocator.release(given), Ok(()));
                        free[given.start() as usize..=given.last() as usize].fill(true);
                    }
                    None => prop_assert_eq!(allocator.release(r), Err(AllocatorError::Missing)),
                },
            }
            let mut sorted = out.clone();
            sorted.sort();
            prop_assert_eq!(allocator.used(), &sorted[..]);
        }
    }
}
