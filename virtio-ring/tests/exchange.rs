#![cfg(not(loom))]
//! A driver and a device over the same memory, against a plain model: queues of what was added, popped and pushed, and
//! the words of §2.7.7 and §2.7.10 applied by counting.

mod common;

use common::{Arena, Posting, Ring};
use proptest::prelude::*;
use std::collections::VecDeque;
use virtio_ring::any::{self, Device, Driver, Format};
use virtio_ring::{Chain, Direction, Error, Head, Options, Part, Popped, Segment, Slot, Table, Verdict, split};

/// Bytes of the arena behind each chain: one table of 64 entries, then data.
const ARENA: usize = 1 << 20;
const DATA: u64 = 1 << 19;

#[derive(Clone, Debug)]
enum Step {
    Add { readable: Vec<u16>, writable: Vec<u16> },
    AddIndirect { readable: Vec<u16>, writable: Vec<u16> },
    AddEach { writable: bool, count: u16, len: u16 },
    Publish,
    Poll(u16),
    Pop,
    PopEach { max: u16, keep: u16, stop: u16 },
    Undo(u16),
    Push { which: u16, len: u16 },
    PushBatch(u16),
    DevicePublish,
    DriverNotify(bool),
    DeviceNotify(bool),
    Detach,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let lens = || prop::collection::vec(1u16..2000, 0..4);
    let shapes = || (lens(), lens()).prop_filter("a chain has segments", |(r, w)| !r.is_empty() || !w.is_empty());
    let step = prop_oneof![
        24 => shapes().prop_map(|(readable, writable)| Step::Add { readable, writable }),
        16 => shapes().prop_map(|(readable, writable)| Step::AddIndirect { readable, writable }),
        24 => (any::<bool>(), 0u16..40, 1u16..2000)
            .prop_map(|(writable, count, len)| Step::AddEach { writable, count, len }),
        32 => Just(Step::Publish),
        32 => (0u16..40).prop_map(Step::Poll),
        24 => Just(Step::Pop),
        24 => (0u16..40, 0u16..8, 1u16..40).prop_map(|(max, keep, stop)| Step::PopEach { max, keep, stop }),
        8 => (0u16..4).prop_map(Step::Undo),
        48 => (any::<u16>(), any::<u16>()).prop_map(|(which, len)| Step::Push { which, len }),
        8 => (0u16..8).prop_map(Step::PushBatch),
        32 => Just(Step::DevicePublish),
        8 => any::<bool>().prop_map(Step::DriverNotify),
        8 => any::<bool>().prop_map(Step::DeviceNotify),
        1 => Just(Step::Detach),
    ];
    prop::collection::vec(step, 1..300)
}

/// One chain, as the model keeps it.
#[derive(Clone, Debug, PartialEq)]
struct Posted {
    cookie: u64,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
    descriptors: u16,
}

impl Posted {
    fn units(&self, format: Format) -> u64 {
        match format {
            Format::Split => 1,
            Format::Packed => self.descriptors.into(),
        }
    }

    fn writable_len(&self) -> u32 {
        self.writable.iter().map(|segment| segment.len).sum()
    }
}

/// What each side asked of the other, and what it was told: by flag, or by event against a count of everything: of chains
/// for a split ring, of descriptors for a packed one.
struct Wish {
    /// After how many the same event comes again.
    period: u64,
    by_event: bool,
    on: bool,
    event: u64,
    asked: u64,
    /// Nothing was decided yet: whoever had the ring before may have owed a notification.
    first: bool,
    /// A split ring's event index knows no "never".
    knows_never: bool,
}

impl Wish {
    fn new(format: Format, size: u16, event_idx: bool) -> Self {
        Self {
            period: match format {
                Format::Split => u64::MAX,
                Format::Packed => 2 * u64::from(size),
            },
            // A packed ring begins with everything wanted.
            by_event: event_idx && format == Format::Split,
            on: true,
            event: 0,
            asked: 0,
            first: true,
            knows_never: !(event_idx && format == Format::Split),
        }
    }

    fn set(&mut self, by_event: bool, on: bool, at: u64) {
        self.by_event = by_event;
        self.on = on;
        // "Not" by a split ring's event index is 65535 away: beyond what these tests count to.
        self.event = if on { at } else { u64::MAX - 1 };
    }

    /// What publishing up to `total` must answer.
    fn expect(&mut self, total: u64) -> bool {
        let from = std::mem::replace(&mut self.asked, total);
        if std::mem::take(&mut self.first) {
            self.on || !self.knows_never
        } else if from == total || !self.on {
            false
        } else if self.by_event {
            (from..total).any(|i| i % self.period == self.event % self.period)
        } else {
            true
        }
    }
}

struct World {
    format: Format,
    ring: Ring,
    arena: Arena,
    options: Options,
    size: u16,
    driver: Driver<Vec<Slot>>,
    device: Device,
    storage: Chain<Vec<Part>>,
    next: u64,
    free: u16,
    added: VecDeque<Posted>,
    visible: usize,
    popped: VecDeque<(Head, Posted)>,
    pushed: VecDeque<(Posted, u32)>,
    shown: usize,
    /// Totals since the start, as [`Wish`] counts: published, popped, pushed and published, taken.
    published: u64,
    total_popped: u64,
    completed: u64,
    taken: u64,
    kick: Wish,
    call: Wish,
}

impl World {
    /// `index` is where a split ring begins.
    fn new(format: Format, size: u16, options: Options, index: u16) -> Self {
        let ring = Ring::new(format, size);
        let slots = vec![Slot::default(); size.into()];
        let (driver, base) = match ring.memory() {
            // SAFETY: the ring lives as long as the world, and only atomics touch it.
            any::Memory::Split(memory) => unsafe {
                let driver = split::Driver::starting_at(memory, size, options, slots, index).unwrap();
                (Driver::Split(driver), index.into())
            },
            // SAFETY: as above.
            memory => unsafe {
                let driver = Driver::new(memory, size, options, slots).unwrap();
                (driver, format.start_base())
            },
        };
        // SAFETY: as above.
        let device = unsafe { Device::new(ring.memory(), size, options, base).unwrap() };
        Self {
            format,
            arena: Arena::new(ARENA),
            options,
            size,
            driver,
            device,
            storage: Chain::new(vec![Part::default(); size.into()]),
            next: 0,
            free: size,
            added: VecDeque::new(),
            visible: 0,
            popped: VecDeque::new(),
            pushed: VecDeque::new(),
            shown: 0,
            published: 0,
            total_popped: 0,
            completed: 0,
            taken: 0,
            kick: Wish::new(format, size, options.event_idx),
            call: Wish::new(format, size, options.event_idx),
            ring,
        }
    }

    fn segments(&self, lens: &[u16], cookie: u64) -> Vec<Segment> {
        lens.iter()
            .enumerate()
            .map(|(i, len)| {
                let addr = Arena::START + DATA + (cookie * 7919 + i as u64 * 131) % (DATA - 2000);
                Segment {
                    addr,
                    len: (*len).into(),
                }
            })
            .collect()
    }

    fn post(&mut self, readable: &[u16], writable: &[u16], indirect: bool) {
        let cookie = self.next;
        let (readable, writable) = (self.segments(readable, cookie), self.segments(writable, cookie + 1));
        let chain: Vec<_> = readable.iter().chain(&writable).copied().collect();
        let (result, descriptors) = if indirect {
            // A table for each chain in flight: twice as many places as the largest queue of these tests.
            let offset = (cookie % 256) * 128;
            // SAFETY: inside the arena's first half, and used by this chain alone while it is in flight.
            let ptr = unsafe { self.arena.0.base().add(offset as usize) };
            let table = Table {
                ptr,
                addr: Arena::START + offset,
                entries: 8,
            };
            // SAFETY: as above.
            (
                unsafe { self.driver.add_indirect(table, &chain, readable.len(), cookie) },
                1,
            )
        } else {
            (self.driver.post(&chain, readable.len(), cookie), chain.len() as u16)
        };
        let expected = if indirect && !self.options.indirect {
            Err(Error::NotNegotiated)
        } else if chain.len() > self.size.into() {
            Err(Error::TooLong)
        } else if descriptors > self.free {
            Err(Error::Full)
        } else {
            Ok(())
        };
        assert_eq!(result, expected);
        if result.is_ok() {
            self.next += 1;
            self.free -= descriptors;
            self.added.push_back(Posted {
                cookie,
                readable,
                writable,
                descriptors,
            });
        }
    }

    fn post_each(&mut self, writable: bool, count: u16, len: u16) {
        let first = self.next;
        let buffers: Vec<_> = (0..u64::from(count))
            .map(|i| (self.segments(&[len], first + i)[0], first + i))
            .collect();
        let direction = if writable {
            Direction::Writable
        } else {
            Direction::Readable
        };
        let mut rest = buffers.iter().copied();
        let added = self.driver.post_each(direction, rest.by_ref());
        assert_eq!(added, usize::from(count.min(self.free)));
        // Nothing was taken that did not fit.
        assert_eq!(rest.len(), buffers.len() - added);
        for (segment, cookie) in &buffers[..added] {
            let (readable, writable) = if writable {
                (vec![], vec![*segment])
            } else {
                (vec![*segment], vec![])
            };
            self.added.push_back(Posted {
                cookie: *cookie,
                readable,
                writable,
                descriptors: 1,
            });
        }
        self.next += added as u64;
        self.free -= added as u16;
    }

    fn units(&self, posted: &Posted) -> u64 {
        posted.units(self.format)
    }

    fn publish(&mut self) {
        let new = self.added.range(self.visible..);
        self.published += new.map(|posted| self.units(posted)).sum::<u64>();
        self.visible = self.added.len();
        assert_eq!(self.driver.publish(), self.kick.expect(self.published));
    }

    fn check_parts(arena: &Arena, posted: &Posted, readable: &[Part], writable: &[Part]) {
        for (parts, segments) in [(readable, &posted.readable), (writable, &posted.writable)] {
            let parts: Vec<_> = parts.iter().map(|part| (part.ptr.as_ptr(), part.len)).collect();
            let at = |segment: &Segment| (arena.0.at((segment.addr - Arena::START) as usize), segment.len);
            assert_eq!(parts, segments.iter().map(at).collect::<Vec<_>>());
        }
    }

    fn take_visible(&mut self) -> Option<Posted> {
        self.visible = self.visible.checked_sub(1)?;
        self.added.pop_front()
    }

    fn pop(&mut self) {
        let head = self.device.pop(&self.arena, &mut self.storage).unwrap();
        let posted = self.take_visible();
        assert_eq!(head.is_some(), posted.is_some());
        if let (Some(head), Some(posted)) = (head, posted) {
            assert_eq!(self.storage.fault(), None);
            Self::check_parts(&self.arena, &posted, self.storage.readable(), self.storage.writable());
            assert_eq!(self.storage.writable_len(), posted.writable_len());
            self.total_popped += self.units(&posted);
            self.popped.push_back((head, posted));
        }
    }

    fn pop_each(&mut self, max: u16, keep: u16, stop: u16) {
        // With IN_ORDER nothing may be completed before what is still kept.
        let mut done = (!self.options.in_order || self.popped.is_empty()).then_some(keep);
        let mut seen: Vec<(Head, bool, u32)> = vec![];
        let (arena, added, mut n) = (&self.arena, &self.added, 0);
        let popped = self
            .device
            .pop_each(arena, &mut self.storage, max.into(), |popped: Popped<'_>| {
                assert_eq!(popped.fault, None);
                let posted = &added[n];
                Self::check_parts(arena, posted, popped.readable, popped.writable);
                n += 1;
                if n > usize::from(stop) {
                    return Verdict::Stop;
                }
                match done {
                    Some(left) if n <= usize::from(left) => {
                        let len = posted.writable_len() / 2;
                        seen.push((popped.head, true, len));
                        Verdict::Done(len)
                    }
                    _ => {
                        done = None;
                        seen.push((popped.head, false, 0));
                        Verdict::Keep
                    }
                }
            });
        let popped = popped.unwrap();
        assert_eq!(popped, seen.len());
        assert!(popped <= usize::from(max.min(stop)) && popped <= self.visible);
        // All that was known is taken; at least something if there is something.
        assert!(popped > 0 || self.visible == 0 || max == 0);
        for (head, done, len) in seen {
            let posted = self.take_visible().unwrap();
            self.total_popped += self.units(&posted);
            if done {
                self.pushed.push_back((posted, len));
            } else {
                self.popped.push_back((head, posted));
            }
        }
    }

    fn undo(&mut self, n: u16) {
        // Only as many as were popped last and are all still here: whoever pushes in between may not undo across it.
        let undone = n.min(self.popped.len() as u16);
        let newest = self
            .popped
            .iter()
            .rev()
            .take(undone.into())
            .map(|(_, posted)| posted.cookie);
        let contiguous = newest.clone().zip(newest.skip(1)).all(|(a, b)| a == b + 1);
        let before_next = self
            .popped
            .back()
            .is_none_or(|(_, last)| last.cookie + 1 == self.oldest_waiting());
        if !contiguous || !before_next {
            return;
        }
        for _ in 0..undone {
            let (head, posted) = self.popped.pop_back().unwrap();
            assert!(self.device.undo(head));
            self.total_popped -= self.units(&posted);
            self.added.push_front(posted);
            self.visible += 1;
        }
    }

    fn oldest_waiting(&self) -> u64 {
        self.added.front().map_or(self.next, |posted| posted.cookie)
    }

    fn push(&mut self, which: u16, len: u16) {
        if self.popped.is_empty() {
            return;
        }
        let i = if self.options.in_order {
            0
        } else {
            usize::from(which) % self.popped.len()
        };
        let (head, posted) = self.popped.remove(i).unwrap();
        let len = u32::from(len).min(posted.writable_len());
        self.device.push(head, len);
        self.pushed.push_back((posted, len));
    }

    fn push_batch(&mut self, n: u16) {
        // What has nothing to write, from the oldest on.
        let n = self
            .popped
            .iter()
            .take(n.into())
            .take_while(|(_, posted)| posted.writable.is_empty())
            .count();
        let (heads, posted): (Vec<_>, Vec<_>) = self.popped.drain(..n).unzip();
        self.device.push_batch(&heads);
        self.pushed.extend(posted.into_iter().map(|posted| (posted, 0)));
    }

    fn device_publish(&mut self) {
        let new = self.pushed.range(self.shown..);
        self.completed += new.map(|(posted, _)| self.units(posted)).sum::<u64>();
        self.shown = self.pushed.len();
        assert_eq!(self.device.publish(), self.call.expect(self.completed));
    }

    fn poll(&mut self, max: u16) {
        let mut seen = vec![];
        let polled = self
            .driver
            .poll_each(max.into(), |completion| seen.push((completion.cookie, completion.len)));
        assert_eq!(polled, seen.len());
        assert!(polled <= usize::from(max));
        assert!(polled > 0 || self.shown == 0 || max == 0);
        for seen in seen {
            assert!(self.shown > 0);
            self.shown -= 1;
            let (posted, len) = self.pushed.pop_front().unwrap();
            assert_eq!(seen, (posted.cookie, len));
            self.free += posted.descriptors;
            self.taken += self.units(&posted);
        }
    }

    fn detach(self) -> Self {
        let Self { mut driver, ring, .. } = self;
        let mut left: Vec<u64> = self.added.iter().map(|posted| posted.cookie).collect();
        left.extend(self.popped.iter().map(|(_, posted)| posted.cookie));
        left.extend(self.pushed.iter().map(|(posted, _)| posted.cookie));
        left.sort_unstable();
        let mut seen = vec![];
        driver.detach(|cookie| seen.push(cookie));
        if self.options.in_order {
            assert!(seen.is_sorted());
        }
        seen.sort_unstable();
        assert_eq!(seen, left);
        assert_eq!((driver.in_flight(), driver.free()), (0, self.size));
        let base = self.format.start_base();
        // SAFETY: as in `new`; the old device is used no more.
        let device = unsafe { Device::new(ring.memory(), self.size, self.options, base).unwrap() };
        let next = Self::new(self.format, self.size, self.options, 0);
        Self {
            driver,
            device,
            ring,
            ..next
        }
    }

    fn run(mut self, steps: Vec<Step>) {
        for step in steps {
            match step {
                Step::Add { readable, writable } => self.post(&readable, &writable, false),
                Step::AddIndirect { readable, writable } => self.post(&readable, &writable, true),
                Step::AddEach { writable, count, len } => self.post_each(writable, count, len),
                Step::Publish => self.publish(),
                Step::Poll(max) => self.poll(max),
                Step::Pop => self.pop(),
                Step::PopEach { max, keep, stop } => self.pop_each(max, keep, stop),
                Step::Undo(n) => self.undo(n),
                Step::Push { which, len } => self.push(which, len),
                Step::PushBatch(n) => self.push_batch(n),
                Step::DevicePublish => self.device_publish(),
                Step::DriverNotify(on) => {
                    let there = self.driver.set_notify(on);
                    self.call.set(self.options.event_idx, on, self.taken);
                    assert!(!on || there == (self.shown > 0));
                }
                Step::DeviceNotify(on) => {
                    let there = self.device.set_notify(on);
                    self.kick.set(self.options.event_idx, on, self.total_popped);
                    assert!(!on || there == (self.visible > 0));
                }
                Step::Detach => self = self.detach(),
            }
            assert_eq!(self.driver.free(), self.free);
            let in_flight = self.added.len() + self.popped.len() + self.pushed.len();
            assert_eq!(usize::from(self.driver.in_flight()), in_flight);
            assert_eq!(usize::from(self.device.outstanding()), self.popped.len());
            assert_eq!(self.driver.anomalies().total() + self.device.anomalies().total(), 0);
        }
        // Everything comes back in the end.
        self.publish();
        while self.visible > 0 {
            self.pop();
        }
        while !self.popped.is_empty() {
            self.push(0, 9);
        }
        self.device_publish();
        while !self.pushed.is_empty() {
            self.poll(u16::MAX);
        }
        assert_eq!((self.driver.free(), self.driver.in_flight()), (self.size, 0));
    }
}

fn cases() -> u32 {
    std::env::var("VIRTIO_RING_CASES").map_or(300, |cases| cases.parse().expect("VIRTIO_RING_CASES is a number"))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn as_the_model(
        shift in 1u32..8,
        event_idx: bool,
        in_order: bool,
        indirect: bool,
        index in prop_oneof![Just(0u16), 65400u16..=65535, any::<u16>()],
        steps in steps(),
    ) {
        World::new(Format::Split, 1 << shift, Options { event_idx, in_order, indirect }, index).run(steps);
    }

    #[test]
    fn packed_as_the_model(
        size in 2u16..130,
        event_idx: bool,
        in_order: bool,
        indirect: bool,
        steps in steps(),
    ) {
        World::new(Format::Packed, size, Options { event_idx, in_order, indirect }, 0).run(steps);
    }
}

#[test]
fn round_and_round_the_index() {
    // Three times round the 16-bit index, in bursts that do not divide it, both kinds, every option.
    for (format, size) in [(Format::Split, 64), (Format::Packed, 64), (Format::Packed, 61)] {
        round_and_round(format, size);
    }
}

fn round_and_round(format: Format, size: u16) {
    for in_order in [false, true] {
        for event_idx in [false, true] {
            for direction in [Direction::Readable, Direction::Writable] {
                let mut world = World::new(
                    format,
                    size,
                    Options {
                        event_idx,
                        in_order,
                        indirect: false,
                    },
                    0,
                );
                let segment = Segment {
                    addr: Arena::START,
                    len: 100,
                };
                let (mut sent, mut back) = (0u64, 0u64);
                while back < 200_000 {
                    let burst = 1 + sent % 61;
                    sent += world
                        .driver
                        .post_each(direction, (sent..sent + burst).map(|i| (segment, i)))
                        as u64;
                    assert!(world.driver.publish());
                    let done = |popped: Popped<'_>| Verdict::Done(popped.writable_len());
                    world
                        .device
                        .pop_each(&world.arena, &mut world.storage, 64, done)
                        .unwrap();
                    assert!(!world.device.set_notify(true));
                    assert!(world.device.publish());
                    world.driver.poll_each(64, |done| {
                        assert_eq!(done.cookie, back);
                        back += 1;
                    });
                    assert_eq!(back, sent);
                    assert!(!world.driver.set_notify(true));
                }
                assert_eq!(world.driver.anomalies().total() + world.device.anomalies().total(), 0);
            }
        }
    }
}

#[test]
fn a_closure_that_panics_loses_nothing_twice() {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    let formats = [Format::Split, Format::Packed];
    for (format, in_order) in formats.into_iter().flat_map(|f| [(f, false), (f, true)]) {
        let mut world = World::new(
            format,
            8,
            Options {
                in_order,
                ..Options::default()
            },
            0,
        );
        let segment = Segment {
            addr: Arena::START,
            len: 100,
        };
        world
            .driver
            .post_each(Direction::Writable, (0..8).map(|i| (segment, i)));
        world.driver.publish();
        let mut popped = 0;
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            world.device.pop_each(&world.arena, &mut world.storage, 8, |_| {
                popped += 1;
                assert!(popped < 4, "the third is the last");
                Verdict::Done(1)
            })
        }));
        assert!(panicked.is_err());
        // Three were pushed, the fourth is out.
        let base = match format {
            Format::Split => 4,
            // The next to become available is the fifth, the next to be used the fourth; both in the first lap.
            Format::Packed => 0x8003_8004,
        };
        assert_eq!((world.device.outstanding(), world.device.base()), (1, base));
        world.device.publish();
        let mut seen = vec![];
        for _ in 0..3 {
            let panicked = catch_unwind(AssertUnwindSafe(|| {
                world.driver.poll_each(8, |done| {
                    seen.push(done.cookie);
                    panic!("each time");
                })
            }));
            assert!(panicked.is_err());
        }
        assert_eq!(world.driver.poll_each(8, |done| seen.push(done.cookie)), 0);
        assert_eq!(seen, [0, 1, 2]);
        assert_eq!((world.driver.free(), world.driver.in_flight()), (3, 5));
        // An iterator that panics: what it gave before is added.
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            world.driver.post_each(
                Direction::Writable,
                (10..13).map(|i| {
                    assert!(i < 12, "the third");
                    (segment, i)
                }),
            )
        }));
        assert!(panicked.is_err());
        assert_eq!((world.driver.free(), world.driver.in_flight()), (1, 7));
        let mut left = vec![];
        world.driver.detach(|cookie| left.push(cookie));
        left.sort_unstable();
        assert_eq!(left, [3, 4, 5, 6, 7, 10, 11]);
    }
}
