//! A device side, a driver, and `recover` itself, stopped between any two of their stores.

extern crate std;

use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::boxed::Box;
use std::vec;
use std::vec::Vec;

use super::recover;
use crate::packed::{Base, Device, Driver, Layout, Memory};
use crate::shared::raw::journal;
use crate::{Chain, Direction, Error, Options, Part, Segment, Slot, Table, Translate, Verdict};

/// An address is an address.
struct Same;

// SAFETY: the tests post addresses of their own memory only.
unsafe impl Translate for Same {
    fn translate(&self, addr: u64, _len: u32) -> Option<NonNull<u8>> {
        NonNull::new(addr as *mut u8)
    }
}

#[repr(C, align(128))]
struct Block([AtomicU64; 64]);

/// Memory for a table, and for what is sent.
#[repr(C, align(16))]
struct Buffer([u8; 256]);

/// A ring, its driver, and what the driver has in flight.
struct World {
    block: Box<Block>,
    size: u16,
    options: Options,
    memory: Memory,
    driver: Driver<Vec<Slot>>,
    device: Option<Device>,
    buffer: Box<Buffer>,
    next: u64,
}

impl World {
    /// `ago` descriptors were used before.
    fn new(size: u16, ago: u16) -> Self {
        let block = Box::new(Block([const { AtomicU64::new(0) }; 64]));
        let layout = Layout::new(size).unwrap();
        assert!(layout.len <= size_of::<Block>());
        // SAFETY: the block is long enough and aligned.
        let memory = unsafe { layout.place(NonNull::from(&block.0).cast()) };
        let options = Options {
            indirect: true,
            ..Options::default()
        };
        let slots = vec![Slot::default(); size.into()];
        // SAFETY: the block lives as long as the world, and only atomics touch it.
        let driver = unsafe { Driver::new(memory, size, options, slots).unwrap() };
        // SAFETY: as above.
        let device = unsafe { Device::new(memory, size, options, Base::START).unwrap() };
        let mut world = Self {
            block,
            size,
            options,
            memory,
            driver,
            device: Some(device),
            buffer: Box::new(Buffer([0; 256])),
            next: 0,
        };
        for _ in 0..ago {
            world.add(1);
            world.driver.publish();
            world.all();
        }
        world
    }

    fn segment(&self) -> Segment {
        Segment {
            addr: self.buffer.0.as_ptr() as u64,
            len: 64,
        }
    }

    /// One chain of `count` descriptors; with 0 one descriptor that names a table.
    fn add(&mut self, count: u16) {
        let chain = vec![self.segment(); count.max(2).into()];
        if count == 0 {
            let table = Table {
                ptr: NonNull::from(&mut self.buffer.0).cast(),
                addr: self.buffer.0.as_ptr() as u64,
                entries: 4,
            };
            // SAFETY: the buffer is as long, and nothing else is done with it.
            unsafe { self.driver.add_indirect(table, &chain, 1, self.next).unwrap() };
        } else {
            // SAFETY: as above.
            unsafe { self.driver.add(&chain[..count.into()], 0, self.next).unwrap() };
        }
        self.next += 1;
    }

    /// The device uses everything, and the driver takes it back.
    fn all(&mut self) -> Vec<(u64, u32)> {
        let mut chain = Chain::new(vec![Part::default(); 8]);
        let device = self.device.as_mut().unwrap();
        device
            .pop_each(&Same, &mut chain, usize::MAX, |popped| {
                assert_eq!(popped.fault, None);
                Verdict::Done(5)
            })
            .unwrap();
        device.publish();
        let mut done = vec![];
        self.driver
            .poll_each(usize::MAX, |completion| done.push((completion.cookie, completion.len)));
        done
    }

    fn words(&self) -> Vec<u64> {
        self.block.0.iter().map(|word| word.load(SeqCst)).collect()
    }

    fn restore(&self, words: &[u64]) {
        for (to, word) in self.block.0.iter().zip(words) {
            to.store(*word, SeqCst);
        }
    }

    /// What `f` stores into the ring: which word, and what.
    fn journal(&mut self, f: impl FnOnce(&mut Self)) -> Vec<(usize, u64)> {
        let base = self.block.0.as_ptr() as usize;
        let stores = journal::of(|| f(self)).into_iter();
        let inside = |at: &usize| (base..base + size_of::<Block>()).contains(at);
        stores
            .map(|(ptr, value)| (ptr as usize, value))
            // A table is elsewhere.
            .filter(|(at, _)| inside(at))
            .map(|(at, value)| ((at - base) / 8, value))
            .collect()
    }

    fn replay(&self, stores: &[(usize, u64)]) {
        for (at, value) in stores {
            self.block.0[*at].store(value.to_le(), SeqCst);
        }
    }

    fn recover(&self) -> Result<Base, Error> {
        // SAFETY: the block lives as long as the world, whose device is gone.
        unsafe { recover(self.memory, self.size, self.options) }
    }

    /// Another device goes on, and everything comes back once, in order, with a length from one device or none.
    fn goes_on(&mut self, first: u64, what: &str) {
        let base = self.recover().unwrap_or_else(|error| panic!("{what}: {error}"));
        self.goes_on_from(base, first, what);
    }

    fn goes_on_from(&mut self, base: Base, first: u64, what: &str) {
        // SAFETY: as above.
        self.device = Some(unsafe { Device::new(self.memory, self.size, self.options, base).unwrap() });
        let done = self.all();
        let cookies: Vec<_> = done.iter().map(|done| done.0).collect();
        assert_eq!(cookies, (first..self.next).collect::<Vec<_>>(), "{what}");
        // Once a chain is used by the new device, all behind it are.
        let lens: Vec<_> = done.iter().map(|done| done.1).collect();
        assert!(
            lens.is_sorted() && lens.iter().all(|len| [0, 5].contains(len)),
            "{what}: {lens:?}"
        );
        assert_eq!(
            (self.driver.in_flight(), self.driver.anomalies().total()),
            (0, 0),
            "{what}"
        );
    }
}

/// All sequences of chains that have `most` descriptors at the most; 0 stands for a table.
fn sequences(most: u16) -> Vec<Vec<u16>> {
    let mut all = vec![vec![]];
    for count in 0..=most {
        let Some(left) = most.checked_sub(count.max(1)) else {
            continue;
        };
        for mut rest in sequences(left) {
            rest.push(count);
            all.push(rest);
        }
    }
    all
}

fn descriptors(chains: &[u16]) -> u16 {
    chains.iter().map(|count| (*count).max(1)).sum()
}

/// How a device uses what is there.
#[derive(Clone, Copy, Debug)]
enum How {
    Burst,
    OneByOne,
    /// Only chains of one descriptor.
    Peeked,
}

fn use_chains(device: &mut Device, how: How, n: usize) {
    let mut chain = Chain::new(vec![Part::default(); 8]);
    match how {
        How::Burst => {
            assert_eq!(device.pop_each(&Same, &mut chain, n, |_| Verdict::Done(5)), Ok(n));
        }
        How::OneByOne => {
            let heads: Vec<_> = (0..n)
                .map(|_| device.pop(&Same, &mut chain).unwrap().unwrap())
                .collect();
            heads.iter().for_each(|head| device.push(*head, 5));
        }
        How::Peeked => {
            let mut singles = vec![crate::Single::default(); n];
            assert_eq!(device.peek_singles(&Same, Direction::Writable, &mut singles), n);
            singles.iter_mut().for_each(|single| single.len = 5);
            assert_eq!(device.use_written(&singles), n);
        }
    }
}

/// A ring as a scenario left it: who was on it is not on it any more.
struct Scenario {
    size: u16,
    ago: u16,
    chains: Vec<u16>,
}

impl Scenario {
    fn world(&self) -> World {
        let mut world = World::new(self.size, self.ago);
        self.chains.iter().for_each(|count| world.add(*count));
        world.driver.publish();
        world
    }

    /// All of one size.
    fn all(size: u16) -> impl Iterator<Item = Self> {
        (0..2 * size).flat_map(move |ago| {
            sequences(size)
                .into_iter()
                .map(move |chains| Self { size, ago, chains })
        })
    }
}

#[test]
fn a_device_lost_between_any_two_stores_of_a_burst_has_a_successor() {
    let mut cut_short = 0;
    for scenario in (2..=5).flat_map(Scenario::all) {
        let Scenario { size, ago, chains } = &scenario;
        for used in 1..=chains.len() {
            for how in [How::Burst, How::OneByOne, How::Peeked] {
                if matches!(how, How::Peeked) && chains[..used].iter().any(|count| *count != 1) {
                    continue;
                }
                let mut world = scenario.world();
                let mut device = world.device.take().unwrap();
                let stores = world.journal(|_| {
                    use_chains(&mut device, how, used);
                    device.commit();
                });
                assert!(stores.len() >= used);
                for n in 0..=stores.len() {
                    let what =
                        std::format!("{size} from {ago}: {used} of {chains:?}, {how:?}, {n} stores of {stores:x?}");
                    let mut world = scenario.world();
                    world.replay(&stores[..n]);
                    // `recover` writes too, and may be lost as well.
                    let mending = world.journal(|world| assert!(world.recover().is_ok(), "{what}"));
                    for m in 0..mending.len() {
                        let mut world = scenario.world();
                        world.replay(&stores[..n]);
                        world.replay(&mending[..m]);
                        world.goes_on((*ago).into(), &std::format!("{what}, recovered {m} of {mending:x?}"));
                    }
                    world.goes_on((*ago).into(), &what);
                    cut_short += usize::from(n > 0 && n < stores.len());
                }
            }
        }
    }
    assert!(cut_short > 1000);
}

#[test]
fn a_driver_in_the_middle_of_a_burst_is_not_in_the_way() {
    let mut halfway = 0;
    for scenario in (2..=5).flat_map(Scenario::all) {
        let Scenario { size, ago, chains } = &scenario;
        for more in sequences(size - descriptors(chains)) {
            for used in 0..=chains.len() {
                let mut world = scenario.world();
                let mut device = world.device.take().unwrap();
                let stores = world.journal(|_| {
                    if used > 0 {
                        use_chains(&mut device, How::Burst, used);
                        device.commit();
                    }
                });
                for n in 0..=stores.len() {
                    let adding = scenario
                        .world()
                        .journal(|world| more.iter().for_each(|count| world.add(*count)));
                    for m in 0..=adding.len() {
                        let what = std::format!(
                            "{size} from {ago}: {n} stores of {stores:x?}, of {used} of {chains:?}, {m} of {more:?}"
                        );
                        let mut world = scenario.world();
                        world.replay(&stores[..n]);
                        let before = world.words();
                        let adding = world.journal(|world| more.iter().for_each(|count| world.add(*count)));
                        world.restore(&before);
                        world.replay(&adding[..m]);
                        // Two descriptors: see `recover`.
                        if *size == 2 && descriptors(&more) == 2 {
                            continue;
                        }
                        let base = world.recover().unwrap_or_else(|error| panic!("{what}: {error}"));
                        world.replay(&adding[m..]);
                        world.driver.publish();
                        world.goes_on_from(base, (*ago).into(), &what);
                        halfway += usize::from(m > 1 && m < adding.len());
                    }
                }
            }
        }
    }
    assert!(halfway > 1000);
}
