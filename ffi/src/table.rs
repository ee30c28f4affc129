//! Handles: what C holds of an object is a number in a pointer's clothes.
//!
//! It says the kind, a place in the kind's table, and how often that place was given out before. Every call checks all
//! three, so that a handle that was closed, copied, mixed up or made up is found out; it is never followed. In a call, the
//! object is that thread's alone: another thread that comes meanwhile is told so. Looking up a handle takes no lock.
//!
//! | bits | what |
//! |---|---|
//! | 63..48 | 0x5553: no address of any process |
//! | 47..18 | generation, from 1; a place that had 2^30 - 1 is not used again |
//! | 17..4 | place |
//! | 3..0 | kind |

use std::cell::UnsafeCell;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::status::{Fault, Outcome, Status};

#[cfg(not(target_pointer_width = "64"))]
compile_error!("handles are numbers of 64 bits in pointers");

const TAG: u64 = 0x5553;
const GENERATIONS: u64 = 1 << 30;
const CHUNK: usize = 256;
const CHUNKS: usize = 64;

/// States of a place, below its generation.
const FREE: u64 = 0;
const IDLE: u64 = 1;
const BUSY: u64 = 2;
/// A call panicked while it had the object.
const BROKEN: u64 = 3;

/// All objects of a kind.
pub(crate) struct Table<T> {
    kind: u64,
    name: &'static str,
    chunks: [OnceLock<Box<[Place<T>]>>; CHUNKS],
    free: Mutex<Free>,
}

struct Free {
    /// Places that were given back, the longest unused first.
    places: VecDeque<usize>,
    /// Places from here on were never used.
    next: usize,
}

struct Place<T> {
    /// Generation << 2 | state.
    state: AtomicU64,
    value: UnsafeCell<Option<T>>,
}

// SAFETY: a place's value is reached only by who moved its state to BUSY, with Acquire, and is left with Release.
unsafe impl<T: Send> Sync for Place<T> {}

/// The object is this thread's. Dropped on the way of a panic, it is nobody's any more.
struct Held<'a> {
    state: &'a AtomicU64,
    generation: u64,
}

impl Held<'_> {
    #[inline(always)]
    fn leave(self, state: u64) {
        self.state.store(self.generation << 2 | state, Ordering::Release);
        std::mem::forget(self);
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.state.store(self.generation << 2 | BROKEN, Ordering::Release);
    }
}

impl<T: Send> Table<T> {
    /// An empty table. Kinds are numbers from 1 to 15, each for one table.
    pub(crate) const fn new(kind: u8, name: &'static str) -> Self {
        Table {
            kind: kind as u64,
            name,
            chunks: [const { OnceLock::new() }; CHUNKS],
            free: Mutex::new(Free {
                places: VecDeque::new(),
                next: 0,
            }),
        }
    }

    /// Takes an object in; its handle.
    pub(crate) fn insert(&self, value: T) -> Outcome<u64> {
        let index = {
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            match free.places.pop_front() {
                Some(index) => index,
                None if free.next < CHUNK * CHUNKS => {
                    free.next += 1;
                    free.next - 1
                }
                None => {
                    return Err(Fault::new(
                        Status::Room,
                        format_args!("{} {}s are open: close some", CHUNK * CHUNKS, self.name),
                    ));
                }
            }
        };
        let chunk = self.chunks[index / CHUNK].get_or_init(|| {
            (0..CHUNK)
                .map(|_| Place {
                    state: AtomicU64::new(1 << 2 | FREE),
                    value: UnsafeCell::new(None),
                })
                .collect()
        });
        let place = &chunk[index % CHUNK];
        let generation = place.state.load(Ordering::Acquire) >> 2;
        // SAFETY: the place was free, and the free list gave it to this call alone.
        unsafe { *place.value.get() = Some(value) };
        place.state.store(generation << 2 | IDLE, Ordering::Release);
        Ok(TAG << 48 | generation << 18 | (index as u64) << 4 | self.kind)
    }

    #[inline(always)]
    fn place(&self, handle: u64) -> Option<(&Place<T>, u64, usize)> {
        let index = (handle >> 4) as usize & (CHUNK * CHUNKS - 1);
        if handle >> 48 != TAG || handle & 0xF != self.kind {
            return None;
        }
        let place = &self.chunks[index / CHUNK].get()?[index % CHUNK];
        Some((place, handle >> 18 & (GENERATIONS - 1), index))
    }

    #[inline(always)]
    fn hold<'a>(&self, place: &'a Place<T>, generation: u64, from: u64) -> Result<Held<'a>, u64> {
        let (old, new) = (generation << 2 | from, generation << 2 | BUSY);
        let state = &place.state;
        state
            .compare_exchange(old, new, Ordering::Acquire, Ordering::Relaxed)
            .map(|_| Held { state, generation })
            .map_err(|found| if found >> 2 == generation { found & 3 } else { FREE })
    }

    #[cold]
    #[inline(never)]
    fn refuse(&self, handle: u64, state: u64) -> Fault {
        let name = self.name;
        match state {
            BUSY => Fault::new(
                Status::Busy,
                format_args!("another thread is in a call with this {name}: one thread at a time"),
            ),
            BROKEN => Fault::new(
                Status::Internal,
                format_args!("an earlier call failed inside the library: this {name} can only be closed"),
            ),
            _ if handle == 0 => Fault::new(Status::Handle, format_args!("the {name} is null")),
            _ => Fault::new(
                Status::Handle,
                format_args!("{handle:#x} is no open {name}: closed, or of another kind"),
            ),
        }
    }

    /// Runs a call on an object, which is its own meanwhile.
    #[inline(always)]
    pub(crate) fn with<R>(&self, handle: u64, call: impl FnOnce(&mut T) -> Outcome<R>) -> Outcome<R> {
        let Some((place, generation, _)) = self.place(handle) else {
            return Err(self.refuse(handle, FREE));
        };
        let held = self
            .hold(place, generation, IDLE)
            .map_err(|state| self.refuse(handle, state))?;
        // SAFETY: the state is BUSY, by us, and so the value is ours.
        let result = match unsafe { &mut *place.value.get() } {
            Some(value) => call(value),
            None => Err(self.refuse(handle, FREE)),
        };
        held.leave(IDLE);
        result
    }

    /// A copy of an object that is kept for no longer than the copying takes: waits for other threads that do the same.
    pub(crate) fn copy(&self, handle: u64) -> Outcome<T>
    where
        T: Clone,
    {
        loop {
            match self.with(handle, |value| Ok(value.clone())) {
                Err(fault) if fault.status() == Status::Busy => std::thread::yield_now(),
                other => return other,
            }
        }
    }

    /// Takes an object out: its handle is dead from now on.
    pub(crate) fn remove(&self, handle: u64) -> Outcome<Option<T>> {
        let Some((place, generation, index)) = self.place(handle) else {
            return Err(self.refuse(handle, FREE));
        };
        let held = match self.hold(place, generation, IDLE) {
            Err(BROKEN) => self.hold(place, generation, BROKEN),
            other => other,
        };
        let mut held = held.map_err(|state| self.refuse(handle, state))?;
        // SAFETY: the state is BUSY, by us, and so the value is ours.
        let value = unsafe { (*place.value.get()).take() };
        held.generation += 1;
        let again = held.generation < GENERATIONS;
        held.leave(FREE);
        if again {
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            free.places.push_back(index);
        }
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn handles_die_with_their_objects_and_places_live_on() {
        let table = Table::new(1, "thing");
        let other = Table::new(2, "other thing");
        let first = table.insert(1).unwrap_or_else(|_| panic!());
        assert_eq!(table.with(first, |v| Ok(*v)).ok(), Some(1));
        assert_eq!(
            other.with(first, |v: &mut i32| Ok(*v)).err().unwrap().status(),
            Status::Handle
        );
        assert_eq!(table.remove(first).ok(), Some(Some(1)));
        for _ in 0..1000 {
            let next = table.insert(2).unwrap_or_else(|_| panic!());
            assert_ne!(next, first);
            assert_eq!(table.with(first, |_| Ok(())).err().unwrap().status(), Status::Handle);
            assert_eq!(table.remove(first).err().unwrap().status(), Status::Handle);
            assert_eq!(table.remove(next).ok(), Some(Some(2)));
        }
        // Every number that differs in one bit is no handle.
        let last = table.insert(3).unwrap_or_else(|_| panic!());
        for bit in 0..64 {
            let forged = last ^ (1 << bit);
            assert_eq!(
                table.with(forged, |_| Ok(())).err().unwrap().status(),
                Status::Handle,
                "{bit}"
            );
        }
    }

    #[test]
    fn a_place_is_not_used_beyond_its_last_generation() {
        let table = Table::new(1, "thing");
        let handle = table.insert(()).unwrap_or_else(|_| panic!());
        let (place, _, _) = table.place(handle).unwrap();
        place.state.store((GENERATIONS - 1) << 2 | IDLE, Ordering::Relaxed);
        let last = handle | (GENERATIONS - 1) << 18;
        assert!(table.remove(last).is_ok());
        let next = table.insert(()).unwrap_or_else(|_| panic!());
        assert_ne!(next & 0x3FFF0, handle & 0x3FFF0);
    }

    #[test]
    fn who_panics_leaves_a_thing_that_can_only_be_closed() {
        let table = Table::new(1, "thing");
        let handle = table.insert(5).unwrap_or_else(|_| panic!());
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            table.with(handle, |_| -> Outcome<()> { panic!("on purpose") })
        }));
        assert!(result.is_err());
        assert_eq!(table.with(handle, |_| Ok(())).err().unwrap().status(), Status::Internal);
        assert_eq!(table.remove(handle).ok(), Some(Some(5)));
        assert_eq!(table.with(handle, |_| Ok(())).err().unwrap().status(), Status::Handle);
    }

    #[test]
    fn one_thread_at_a_time() {
        let table = &Table::new(1, "thing");
        let handle = table.insert(0_u32).unwrap_or_else(|_| panic!());
        assert_eq!(
            table
                .with(handle, |_| table.with(handle, |_| Ok(())))
                .err()
                .unwrap()
                .status(),
            Status::Busy
        );
        let done = &AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(move || {
                    for _ in 0..10_000 {
                        let add = |v: &mut u32| {
                            *v += 1;
                            Ok(())
                        };
                        if table.with(handle, add).is_ok() {
                            done.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        assert_eq!(
            table.with(handle, |v| Ok(*v as usize)).ok(),
            Some(done.load(Ordering::Relaxed))
        );
    }

    #[test]
    fn a_full_table_says_so() {
        let table = Table::new(1, "thing");
        for _ in 0..CHUNK * CHUNKS {
            assert!(table.insert(()).is_ok());
        }
        assert_eq!(table.insert(()).err().unwrap().status(), Status::Room);
    }
}
