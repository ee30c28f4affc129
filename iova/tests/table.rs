//! The table against a list that is searched the slow and obvious way.

use iova::{Error, Hint, Range, Region, Table};
use proptest::prelude::*;

fn range(start: u64, len: u64) -> Range {
    Range::new(start, len).unwrap()
}

#[test]
fn ranges_are_never_empty_and_never_wrap() {
    assert_eq!(Range::new(5, 0), None);
    assert_eq!(Range::new(u64::MAX, 2), None);
    assert_eq!(Range::new(1, u64::MAX).unwrap().last(), u64::MAX);
    assert_eq!(Range::new(2, u64::MAX), None);
    let last = range(u64::MAX, 1);
    assert_eq!((last.start(), last.len(), last.last()), (u64::MAX, 1, u64::MAX));
    assert!(last.contains(u64::MAX) && !last.contains(0));
    assert_eq!(format!("{:?}", range(0x1000, 0x1000)), "0x1000..=0x1fff");
}

#[test]
fn offsets_need_all_the_bytes() {
    let r = range(100, 10);
    assert_eq!(r.offset_of(100, 10), Some(0));
    assert_eq!(r.offset_of(109, 1), Some(9));
    assert_eq!(r.offset_of(109, 0), Some(9));
    assert_eq!(r.offset_of(110, 0), None);
    assert_eq!(r.offset_of(99, 1), None);
    assert_eq!(r.offset_of(100, 11), None);
    assert_eq!(r.offset_of(109, u64::MAX), None);
}

#[test]
fn an_empty_table_knows_nothing() {
    let table = Table::<4>::new();
    assert!(table.is_empty());
    // Not even address 0, where an unused slot could seem to be.
    for addr in [0, 1, u64::MAX] {
        for len in [0, 1, u64::MAX] {
            assert_eq!(table.translate(addr, len), None);
            assert_eq!(table.translate_near(&mut Hint::default(), addr, len), None);
            assert_eq!(table.reverse(addr, len), None);
            assert_eq!(table.prefix(addr, len), None);
        }
    }
}

#[test]
fn what_is_refused_changes_nothing() {
    let mut table = Table::<2>::new();
    table.insert(range(100, 100), 1000).unwrap();
    let region = Region {
        theirs: range(100, 100),
        ours: range(1000, 100),
    };
    for theirs in [
        range(100, 1),
        range(199, 1),
        range(50, 51),
        range(50, 500),
        range(150, 10),
        range(0, u64::MAX),
    ] {
        assert_eq!(table.insert(theirs, 0), Err(Error::Overlap(region)), "{theirs:?}");
    }
    assert_eq!(table.insert(range(300, 10), u64::MAX - 8), Err(Error::Overflow));
    table.insert(range(200, 10), u64::MAX - 9).unwrap();
    assert_eq!(table.translate(209, 1), Some(u64::MAX), "up to the last address");
    assert_eq!(table.insert(range(300, 1), 0), Err(Error::Full));
    assert_eq!(table.remove(range(100, 99)), Err(Error::Missing));
    assert_eq!(table.remove(range(101, 99)), Err(Error::Missing));
    assert_eq!(table.len(), 2);
    assert_eq!(table.remove(range(100, 100)), Ok(region));
    assert_eq!(table.translate(100, 1), None);
    assert_eq!(table.translate(200, 10), Some(u64::MAX - 9));
    table.clear();
    assert!(table.is_empty() && table.translate(200, 1).is_none());
}

#[test]
fn regions_that_touch_are_two() {
    let mut table = Table::<4>::new();
    table.insert(range(0x1000, 0x1000), 0x10_0000).unwrap();
    table.insert(range(0x2000, 0x1000), 0x50_0000).unwrap();
    assert_eq!(table.translate(0x1fff, 2), None);
    assert_eq!(table.prefix(0x1fff, 2), Some((0x10_0fff, 1)));
    assert_eq!(table.prefix(0x2000, 1), Some((0x50_0000, 1)));
    assert_eq!(table.prefix(0x2fff, 100), Some((0x50_0fff, 1)));
    assert_eq!(table.prefix(0x3000, 1), None);
    assert_eq!(table.prefix(0xfff, 2), None, "not from outside into a region");
}

#[test]
fn two_names_for_the_same_memory() {
    let mut table = Table::<4>::new();
    table.insert(range(0x9000, 0x1000), 0x10_0000).unwrap();
    table.insert(range(0x1000, 0x1000), 0x10_0000).unwrap();
    assert_eq!(table.translate(0x9010, 16), table.translate(0x1010, 16));
    assert_eq!(table.reverse(0x10_0010, 16), Some(0x1010), "the lowest");
}

#[test]
fn as_many_regions_as_vhost_user_can_name() {
    let mut table = Table::<512>::new();
    for index in (0..512u64).rev() {
        table.insert(range(index * 0x20_0000, 0x10_0000), index << 32).unwrap();
    }
    assert_eq!(table.insert(range(u64::MAX, 1), 0), Err(Error::Full));
    let mut hint = Hint::default();
    for index in 0..512u64 {
        let addr = index * 0x20_0000 + 0xf_ffff;
        assert_eq!(table.translate(addr, 1), Some((index << 32) + 0xf_ffff));
        assert_eq!(table.translate_near(&mut hint, addr, 1), Some((index << 32) + 0xf_ffff));
        assert_eq!(table.translate_near(&mut hint, addr, 2), None);
        assert_eq!(table.translate_near(&mut hint, addr, 1), Some((index << 32) + 0xf_ffff));
    }
    assert!(table.iter().map(|region| region.theirs.start()).is_sorted());
}

/// Numbers where mistakes are: around a few borders and the ends of the address space.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0u64..200,
        1 => any::<u64>(),
        1 => (0u64..200).prop_map(|n| u64::MAX - n),
    ]
}

#[derive(Debug, Clone)]
enum Step {
    Insert(u64, u64, u64),
    Remove(usize),
    RemoveOther(u64, u64),
    Ask(u64, u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (number(), prop_oneof![4 => 1u64..40, 1 => number()], number()).prop_map(|(a, b, c)| Step::Insert(a, b, c)),
        1 => (0usize..16).prop_map(Step::Remove),
        1 => (number(), number()).prop_map(|(a, b)| Step::RemoveOther(a, b)),
        8 => (number(), prop_oneof![4 => 0u64..40, 1 => number()]).prop_map(|(a, b)| Step::Ask(a, b)),
    ]
}

/// `(theirs, len, ours)`, in 128 bits, so that nothing overflows.
type Model = Vec<(u128, u128, u128)>;
const SPACE: u128 = 1 << 64;

fn look(model: &Model, addr: u64, len: u64) -> Option<u64> {
    let (addr, len) = (u128::from(addr), u128::from(len));
    let (theirs, _, ours) = model
        .iter()
        .find(|(theirs, all, _)| *theirs <= addr && addr < theirs + all && addr + len <= theirs + all)?;
    Some((ours + addr - theirs) as u64)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn as_a_list(steps in prop::collection::vec(step(), 0..60)) {
        const N: usize = 7;
        let mut table = Table::<N>::new();
        let mut model = Model::new();
        let mut hint = Hint::default();
        for step in steps {
            match step {
                Step::Insert(theirs, len, ours) => {
                    let Some(range) = Range::new(theirs, len) else {
                        prop_assert!(len == 0 || u128::from(theirs) + u128::from(len) > SPACE);
                        continue;
                    };
                    let (t, l, o) = (u128::from(theirs), u128::from(len), u128::from(ours));
                    let overlaps = model.iter().any(|(start, all, _)| t < start + all && *start < t + l);
                    match table.insert(range, ours) {
                        Ok(()) => {
                            prop_assert!(!overlaps && o + l <= SPACE && model.len() < N);
                            model.push((t, l, o));
                        }
                        Err(Error::Overlap(with)) => prop_assert!(overlaps && with.theirs.overlaps(range)),
                        Err(Error::Overflow) => prop_assert!(o + l > SPACE),
                        Err(Error::Full) => prop_assert_eq!(model.len(), N),
                        Err(other) => prop_assert!(false, "{}", other),
                    }
                }
                Step::Remove(index) if index < model.len() => {
                    let (theirs, len, ours) = model.swap_remove(index);
                    let region = table.remove(Range::new(theirs as u64, len as u64).unwrap()).unwrap();
                    prop_assert_eq!(u128::from(region.ours.start()), ours);
                }
                Step::Remove(_) => {}
                Step::RemoveOther(start, len) => {
                    let Some(range) = Range::new(start, len) else { continue };
                    let known = model.iter().position(|m| (m.0, m.1) == (u128::from(start), u128::from(len)));
                    match (table.remove(range), known) {
                        (Ok(_), Some(index)) => drop(model.swap_remove(index)),
                        (result, known) => prop_assert!(result == Err(Error::Missing) && known.is_none()),
                    }
                }
                Step::Ask(addr, len) => {
                    let expected = look(&model, addr, len);
                    prop_assert_eq!(table.translate(addr, len), expected);
                    prop_assert_eq!(table.translate_near(&mut hint, addr, len), expected);
                    let whole = table.prefix(addr, len).filter(|(_, have)| *have == len).map(|(ours, _)| ours);
                    prop_assert_eq!(whole, expected);
                    // The way back, among all regions that it could have come from.
                    let mut turned: Model = model.iter().map(|&(theirs, all, ours)| (ours, all, theirs)).collect();
                    turned.sort_by_key(|&(_, _, theirs)| theirs);
                    prop_assert_eq!(table.reverse(addr, len), look(&turned, addr, len));
                }
            }
            prop_assert_eq!(table.len(), model.len());
            prop_assert!(table.iter().map(|region| region.theirs.start()).is_sorted());
        }
    }

    /// The same hint for tables that have nothing in common.
    #[test]
    fn hints_of_other_tables_are_harmless(addrs in prop::collection::vec(0u64..2000, 1..40)) {
        let mut small = Table::<1>::new();
        small.insert(range(0, 1000), 5000).unwrap();
        let mut large = Table::<20>::new();
        for index in 0..20 {
            large.insert(range(index * 100, 50), index * 1000).unwrap();
        }
        let mut hint = Hint::default();
        for addr in addrs {
            prop_assert_eq!(large.translate_near(&mut hint, addr, 10), large.translate(addr, 10));
            prop_assert_eq!(small.translate_near(&mut hint, addr, 10), small.translate(addr, 10));
        }
    }
}
