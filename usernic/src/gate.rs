//! One thread drives a queue's rings; another, now and then, must stop it to change what it stands on.
//!
//! A back-end may vanish, a front-end may replace its memory table, and a `GET_VRING_BASE` wants a ring stopped before
//! it is answered. The thread that polls must not pay a lock for that: it pays two plain stores a burst.
//!
//! [`pair`] splits a value into a [`DataSide`] and a [`ControlSide`], one of each, neither of which can be cloned:
//!
//! - the data side [`enter`](DataSide::enter)s for the length of a burst: it says that it is busy, then looks whether
//!   the gate is closed;
//! - the control side [`close`](ControlSide::close)s: it says that the gate is closed, then looks whether the data side
//!   is busy, and waits until it is not. From then on the value is its own until [`open`](ControlSide::open).
//!
//! Everything that the polling thread can look at changes behind the closed gate: the value, and the memory that the value
//! points to, such as a ring that another device is to find in its initial state. [`change`](ControlSide::change) is the
//! order: close, change, open, and then wake the thread that sleeps, since what it asked of the other side before it went to
//! sleep may be forgotten. A gate [with a waker](pair_with_waker) does the last.
//!
//! Both sides store one flag and read the other, so each needs a full barrier between its store and its load. The data
//! side's is a compiler barrier only: the control side issues `membarrier(2)`, which runs a full barrier on every CPU
//! that runs a thread of this process. Where the kernel refuses that (before 4.14, or under a tight seccomp filter),
//! the data side pays for a fence of its own.

use std::cell::UnsafeCell;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

#[cfg(loom_gate)]
use loom::sync::atomic::{AtomicBool, Ordering, fence};
#[cfg(not(loom_gate))]
use std::sync::atomic::{AtomicBool, Ordering, fence};

/// The flags on lines of their own: the data side writes one of them every burst.
#[repr(align(128))]
struct Flag(AtomicBool);

struct Shared<T> {
    closed: Flag,
    busy: Flag,
    /// The data side fences by itself, since `membarrier(2)` is not to be had.
    fenced: bool,
    /// There is no control side any more: the gate stays closed.
    abandoned: AtomicBool,
    /// A private eventfd that ends the data side's sleep.
    waker: Option<Arc<OwnedFd>>,
    value: UnsafeCell<T>,
}

impl<T> Shared<T> {
    fn wake(&self) {
        if let Some(waker) = &self.waker {
            // Full: the data side has not seen the wake-ups before this one, either.
            let _ = rustix::io::write(&**waker, &1u64.to_ne_bytes());
        }
    }
}

// SAFETY: the value is reached by one side at a time (the protocol of this module), so it moves between the two
// threads but is never shared by them: `T: Send` is enough.
unsafe impl<T: Send> Sync for Shared<T> {}
// SAFETY: as above; owning the last `Arc` drops the value on that thread.
unsafe impl<T: Send> Send for Shared<T> {}

/// The polling thread's half.
pub struct DataSide<T>(Arc<Shared<T>>);

/// The controlling thread's half.
pub struct ControlSide<T> {
    shared: Arc<Shared<T>>,
    closed: bool,
}

/// The data side, inside. The control side waits for its end, so it is held for a burst and never across a wait.
pub struct Entered<'a, T> {
    shared: &'a Shared<T>,
}

/// Makes a closed gate around `value`.
pub fn pair<T: Send>(value: T) -> (DataSide<T>, ControlSide<T>) {
    pair_with(value, None, !membarrier_registered())
}

/// The same for a data side that may sleep. `waker`, an eventfd that does not block and that nobody outside this process
/// holds, becomes readable whenever the gate was opened, and when the control side is gone. Nobody reads it: it is watched
/// edge-triggered.
pub fn pair_with_waker<T: Send>(value: T, waker: Arc<OwnedFd>) -> (DataSide<T>, ControlSide<T>) {
    pair_with(value, Some(waker), !membarrier_registered())
}

fn pair_with<T: Send>(value: T, waker: Option<Arc<OwnedFd>>, fenced: bool) -> (DataSide<T>, ControlSide<T>) {
    let shared = Arc::new(Shared {
        closed: Flag(AtomicBool::new(true)),
        busy: Flag(AtomicBool::new(false)),
        fenced,
        abandoned: AtomicBool::new(false),
        waker,
        value: UnsafeCell::new(value),
    });
    (DataSide(Arc::clone(&shared)), ControlSide { shared, closed: true })
}

impl<T> DataSide<T> {
    /// Goes in, unless the gate is closed. Costs two stores and a load.
    #[inline]
    pub fn enter(&mut self) -> Option<Entered<'_, T>> {
        let shared = &*self.0;
        shared.busy.0.store(true, Ordering::Relaxed);
        if shared.fenced {
            fence(Ordering::SeqCst);
        } else {
            std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
        }
        // Dropped again, and so not busy, when closed.
        let entered = Entered { shared };
        if shared.closed.0.load(Ordering::Acquire) {
            None
        } else {
            Some(entered)
        }
    }
}

impl<T> DataSide<T> {
    /// Whether the control side is gone, so that the gate stays closed.
    pub fn is_abandoned(&self) -> bool {
        self.0.abandoned.load(Ordering::Acquire)
    }

    /// Takes the wake-ups that have come, by `take`. That the control side is gone stays to be seen: it is told again.
    pub fn take_wakeups(&self, take: impl FnOnce()) {
        take();
        if self.is_abandoned() {
            self.0.wake();
        }
    }
}

impl<T> std::ops::Deref for Entered<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: busy was stored before closed was read as false, with a full barrier between (ours or the control
        // side's membarrier), so the control side will see busy and wait. There is one data side, borrowed mutably.
        unsafe { &*self.shared.value.get() }
    }
}

impl<T> std::ops::DerefMut for Entered<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`; `&mut self` makes it the only reference.
        unsafe { &mut *self.shared.value.get() }
    }
}

impl<T> Drop for Entered<'_, T> {
    #[inline]
    fn drop(&mut self) {
        self.shared.busy.0.store(false, Ordering::Release);
    }
}

impl<T> ControlSide<T> {
    /// Closes the gate, waits until the data side is out (a burst at the most, and for the time in which its thread
    /// has no CPU), and gives the value.
    pub fn close(&mut self) -> &mut T {
        if !self.closed {
            self.shared.closed.0.store(true, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            if !self.shared.fenced {
                membarrier();
            }
            let mut turns = 0u32;
            while self.shared.busy.0.load(Ordering::Acquire) {
                turns += 1;
                pause(turns);
            }
            self.closed = true;
        }
        // SAFETY: closed, and the data side was seen outside after it could see that: it cannot come in until `open`.
        // There is one control side, borrowed mutably.
        unsafe { &mut *self.shared.value.get() }
    }

    /// Whether the data side can come in.
    pub fn is_open(&self) -> bool {
        !self.closed
    }

    /// Opens the gate, and wakes the data side: what it asked for before the gate was closed may be forgotten.
    pub fn open(&mut self) {
        self.closed = false;
        self.shared.closed.0.store(false, Ordering::Release);
        self.shared.wake();
    }

    /// Changes the value, and what it points to, with the data side outside. The gate is open afterwards if it was before.
    pub fn change<R>(&mut self, change: impl FnOnce(&mut T) -> R) -> R {
        let was_open = self.is_open();
        let result = change(self.close());
        if was_open {
            self.open();
        }
        result
    }
}

impl<T> Drop for ControlSide<T> {
    /// With nobody left to control it, the gate stays closed, and a data side that sleeps is told.
    fn drop(&mut self) {
        self.shared.closed.0.store(true, Ordering::Release);
        self.shared.abandoned.store(true, Ordering::Release);
        self.shared.wake();
    }
}

/// Between two looks at a data side that is inside.
#[cfg(not(loom_gate))]
fn pause(turns: u32) {
    if turns < 64 {
        std::thread::yield_now()
    } else {
        std::thread::sleep(std::time::Duration::from_micros(50))
    }
}

#[cfg(loom_gate)]
fn pause(_turns: u32) {
    loom::thread::yield_now();
}

const MEMBARRIER_CMD_PRIVATE_EXPEDITED: libc::c_int = 1 << 3;
const MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED: libc::c_int = 1 << 4;

fn membarrier_call(command: libc::c_int) -> bool {
    // SAFETY: membarrier(2) takes plain integers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) == 0 }
}

/// Registers this process once; whether membarrier can be used.
///
/// A process of one thread registers at once; one of many waits for a grace period of the kernel (some milliseconds),
/// which is one reason to open ports early.
fn membarrier_registered() -> bool {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    *REGISTERED.get_or_init(|| membarrier_call(MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED))
}

fn membarrier() {
    // A process that is registered is not refused (membarrier(2), ERRORS), but for a seccomp filter put on since.
    // Then nothing else gives the barrier, and going on would be unsound.
    if !membarrier_call(MEMBARRIER_CMD_PRIVATE_EXPEDITED) {
        tracing::error!(
            "membarrier(2) worked when the port was opened and is refused now: a seccomp filter must allow it"
        );
        std::process::abort();
    }
}

/// Run with `RUSTFLAGS="--cfg loom_gate" cargo test -p usernic --release --lib gate::model`. The flag is not `loom`,
/// under which the rings are models too. Loom knows no membarrier: this is the gate with a fence on both sides.
#[cfg(all(test, loom_gate))]
mod model {
    use super::*;
    use loom::cell::UnsafeCell as Watched;

    /// Loom fails the model when two sides are at the watched cell at once, or without an order between them.
    #[test]
    fn the_sides_are_never_in_together() {
        loom::model(|| {
            let (mut data, mut control) = pair_with(Watched::new(0u32), None, true);
            control.open();
            let thread = loom::thread::spawn(move || {
                let mut entered = 0;
                for _ in 0..2 {
                    if let Some(value) = data.enter() {
                        // SAFETY: what the gate is for.
                        value.with_mut(|v| unsafe { *v += 1 });
                        entered += 1;
                    }
                }
                entered
            });
            // SAFETY: what the gate is for.
            control.close().with_mut(|v| unsafe { *v += 10 });
            control.open();
            let entered = thread.join().unwrap();
            // SAFETY: what the gate is for.
            let sum = control.close().with(|v| unsafe { *v });
            assert_eq!(sum, 10 + entered);
        });
    }

    /// Once closed it stays so: nothing that is done behind it is seen half done.
    #[test]
    fn what_is_done_behind_the_gate_is_seen_whole() {
        loom::model(|| {
            let (mut data, mut control) = pair_with((Watched::new(0u32), Watched::new(0u32)), None, true);
            control.open();
            let thread = loom::thread::spawn(move || {
                if let Some(both) = data.enter() {
                    // SAFETY: what the gate is for.
                    let (a, b) = (both.0.with(|v| unsafe { *v }), both.1.with(|v| unsafe { *v }));
                    assert_eq!(a, b);
                }
            });
            let both = control.close();
            // SAFETY: what the gate is for.
            both.0.with_mut(|v| unsafe { *v = 1 });
            // SAFETY: as above.
            both.1.with_mut(|v| unsafe { *v = 1 });
            control.open();
            thread.join().unwrap();
        });
    }

    /// A ring as both sides of the gate see it: memory that everybody can reach, and what the driver makes of it.
    struct Ring {
        flags: loom::sync::Arc<AtomicBool>,
        wrap: Watched<bool>,
    }

    /// A packed ring's flags say "used" by comparison with the driver's wrap counter (virtio 1.3, 2.8.1). In its second lap
    /// the counter is 0, and so are the flags of a ring in its initial state: a driver that sees them before its own counter
    /// is back at 1 takes a buffer for used that no device has used.
    fn reset_under_a_poller(reset: impl Fn(&mut ControlSide<Ring>, &AtomicBool) + Send + Sync + 'static) {
        loom::model(move || {
            let flags = loom::sync::Arc::new(AtomicBool::new(true));
            let ring = Ring {
                flags: loom::sync::Arc::clone(&flags),
                wrap: Watched::new(false),
            };
            let (mut data, mut control) = pair_with(ring, None, true);
            control.open();
            let thread = loom::thread::spawn(move || {
                for _ in 0..2 {
                    if let Some(ring) = data.enter() {
                        // SAFETY: what the gate is for.
                        let wrap = ring.wrap.with(|wrap| unsafe { *wrap });
                        let used = ring.flags.load(Ordering::Relaxed) == wrap;
                        assert!(!used, "a frame that nobody sent");
                    }
                }
            });
            reset(&mut control, &flags);
            thread.join().unwrap();
        });
    }

    #[test]
    fn a_ring_that_is_reset_behind_the_gate_shows_no_frame() {
        reset_under_a_poller(|control, flags| {
            control.change(|ring| {
                flags.store(false, Ordering::Relaxed);
                // SAFETY: what the gate is for.
                ring.wrap.with_mut(|wrap| unsafe { *wrap = true });
            });
        });
    }

    /// The same order the other way round, so that the test above is known to see it.
    #[test]
    #[should_panic(expected = "a frame that nobody sent")]
    fn a_ring_that_is_reset_before_the_gate_closes_shows_frames() {
        reset_under_a_poller(|control, flags| {
            flags.store(false, Ordering::Relaxed);
            control.change(|ring| {
                // SAFETY: what the gate is for.
                ring.wrap.with_mut(|wrap| unsafe { *wrap = true });
            });
        });
    }
}

#[cfg(all(test, not(loom_gate)))]
mod tests {
    use super::*;
    use std::time::Duration;

    fn exclusive(fenced: bool) {
        let (mut data, mut control) = pair_with((0u64, 0u64), None, fenced);
        let stop = Arc::new(AtomicBool::new(false));
        let begun = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let (stop, begun) = (Arc::clone(&stop), Arc::clone(&begun));
            move || {
                let mut entered = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    if let Some(mut value) = data.enter() {
                        // Two plain writes: torn between the sides if they ever overlap.
                        value.0 += 1;
                        value.1 += 1;
                        entered += 1;
                        begun.store(true, Ordering::Relaxed);
                    }
                }
                entered
            }
        });
        let mut closed = 0u64;
        control.open();
        // On a busy machine the other thread may begin late.
        while !begun.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
        while closed < 2_000 {
            let value = control.close();
            assert_eq!(value.0, value.1);
            value.0 += 1;
            assert_eq!(value.0, value.1 + 1, "the data side was inside a closed gate");
            value.1 += 1;
            control.open();
            closed += 1;
            if closed.is_multiple_of(16) {
                std::thread::sleep(Duration::from_micros(20));
            }
        }
        stop.store(true, Ordering::Relaxed);
        let entered = thread.join().unwrap();
        let value = control.close();
        assert_eq!(value.0, closed + entered);
    }

    #[test]
    fn one_side_at_a_time_with_membarrier() {
        if !membarrier_registered() {
            eprintln!("SKIPPED one_side_at_a_time_with_membarrier: the kernel refuses membarrier(2)");
            return;
        }
        exclusive(false);
    }

    #[test]
    fn one_side_at_a_time_with_a_fence() {
        exclusive(true);
    }

    #[test]
    fn starts_closed_and_stays_closed_without_control() {
        let (mut data, mut control) = pair(1u8);
        assert!(data.enter().is_none());
        control.open();
        assert_eq!(data.enter().map(|v| *v), Some(1));
        assert!(!data.is_abandoned());
        drop(control);
        assert!(data.enter().is_none() && data.is_abandoned());
    }

    #[test]
    fn a_sleeper_is_woken_when_the_gate_opens_and_when_nobody_is_left_to_open_it() {
        use rustix::event::{EventfdFlags, eventfd};
        let event = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap());
        let (data, mut control) = pair_with_waker(0u8, Arc::clone(&event));
        let woken = || rustix::io::read(&*event, &mut [0; 8]).is_ok();
        control.close();
        assert!(!woken(), "the gate is still closed");
        control.open();
        assert!(woken() && !woken());
        control.change(|value| *value = 1);
        assert!(woken() && control.is_open());
        control.close();
        control.change(|value| *value = 2);
        assert!(!woken() && !control.is_open());
        drop(control);
        for _ in 0..3 {
            let mut taken = false;
            data.take_wakeups(|| taken = woken());
            assert!(taken, "the end is told again and again");
        }
    }
}
