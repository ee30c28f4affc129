//! A mapping that somebody truncates dies, the process does not.
//!
//! Whoever has the descriptor of a shared file can truncate it, unless it is a sealed memfd. The next access to the
//! lost pages raises SIGBUS, and its default is the end of the process. With [`install`] and [`register`], the handler
//! puts a private page of zeroes where the access went and marks the mapping dead: the access succeeds, and whoever
//! drives the mapping finds [`Registration::is_dead`] at its next look and closes it.
//!
//! Any number of mappings can be watched. The table of them grows by chunks that are never given back, since the handler
//! may be reading them at any moment.
//!
//! The handler is async-signal-safe: it reads atomics and calls `mmap(2)`. It handles `BUS_ADRERR` inside of registered
//! mappings and passes everything else on to the handler that was there before, or to the default.
//!
//! A library should not install handlers behind its program's back, hence opt-in. A program that installs its own
//! handler for SIGBUS afterwards replaces this one and should call it as this one would.

use core::cell::UnsafeCell;
use core::ffi::c_void;
use core::mem::MaybeUninit;
use core::ptr::{NonNull, null, null_mut};
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering, fence};

use libc::{c_int, siginfo_t};

use crate::{Error, Segment, sys};

/// Slots by which the table grows.
const CHUNK: usize = 1024;

/// One mapping. Its three numbers are read by the handler while they may change, so a version tells whether they did.
#[derive(Debug)]
struct Slot {
    /// 0 free, odd while it changes hands, else even.
    version: AtomicUsize,
    taken: AtomicBool,
    start: AtomicUsize,
    len: AtomicUsize,
    page: AtomicUsize,
    dead: AtomicBool,
}

impl Slot {
    const fn new() -> Self {
        Slot {
            version: AtomicUsize::new(0),
            taken: AtomicBool::new(false),
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            page: AtomicUsize::new(0),
            dead: AtomicBool::new(false),
        }
    }

    /// Sets the numbers. Only the slot's owner does.
    fn set(&self, start: usize, len: usize, page: usize) {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        self.start.store(start, Ordering::Relaxed);
        self.len.store(len, Ordering::Relaxed);
        self.page.store(page, Ordering::Relaxed);
        self.version.store(version.wrapping_add(2), Ordering::Release);
    }

    /// The mapping, if the slot watches one that has `address`: start, length and page. A slot that changes hands now does
    /// not watch a mapping in use.
    fn mapping_of(&self, address: usize) -> Option<(usize, usize, usize)> {
        let version = self.version.load(Ordering::Acquire);
        let start = self.start.load(Ordering::Relaxed);
        let len = self.len.load(Ordering::Relaxed);
        let page = self.page.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let same = version.is_multiple_of(2) && self.version.load(Ordering::Relaxed) == version;
        (same && address.wrapping_sub(start) < len).then_some((start, len, page))
    }
}

/// A part of the table. All bytes zero are an empty one.
struct Chunk {
    slots: [Slot; CHUNK],
    /// No slot from here on was ever used, so that the handler need not look there.
    used: AtomicUsize,
    next: AtomicPtr<Chunk>,
}

impl Chunk {
    /// The chunk behind this one, as far as there is one.
    fn next(&self) -> Option<&'static Chunk> {
        // SAFETY: null, or a chunk that `grow` made, which stays for ever.
        unsafe { self.next.load(Ordering::Acquire).as_ref() }
    }

    /// The chunk behind this one, the last, which is made if need be.
    fn grow(&self) -> Result<&'static Chunk, Error> {
        let (prot, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        );
        let fresh = sys::mmap(size_of::<Chunk>(), prot, flags, -1).map_err(|_| Error::GuardFull)?;
        let made = fresh.cast::<Chunk>().as_ptr();
        match (self.next).compare_exchange(null_mut(), made, Ordering::AcqRel, Ordering::Acquire) {
            // SAFETY: zeroes, which are an empty chunk, aligned to a page, and never unmapped.
            Ok(_) => Ok(unsafe { &*made }),
            Err(theirs) => {
                // SAFETY: ours, and nobody knows of it.
                unsafe { sys::munmap(fresh, size_of::<Chunk>()) };
                // SAFETY: not null, so another thread made it in this way.
                Ok(unsafe { &*theirs })
            }
        }
    }

    /// A free slot for a mapping.
    fn take(&'static self, start: usize, len: usize, page: usize) -> Option<&'static Slot> {
        let free = |slot: &Slot| !slot.taken.load(Ordering::Relaxed) && !slot.taken.swap(true, Ordering::Acquire);
        let index = self.slots.iter().position(free)?;
        let slot = &self.slots[index];
        slot.dead.store(false, Ordering::Relaxed);
        slot.set(start, len, page);
        self.used.fetch_max(index + 1, Ordering::Release);
        Some(slot)
    }
}

/// The first part of the table.
static TABLE: Chunk = Chunk {
    slots: [const { Slot::new() }; CHUNK],
    used: AtomicUsize::new(0),
    next: AtomicPtr::new(null_mut()),
};

/// The handler from before ours.
struct Previous(UnsafeCell<MaybeUninit<libc::sigaction>>);

// SAFETY: written once, by the thread that wins INSTALLED, before the handler that reads it is in place.
unsafe impl Sync for Previous {}

static PREVIOUS: Previous = Previous(UnsafeCell::new(MaybeUninit::uninit()));
static INSTALLED: AtomicBool = AtomicBool::new(false);

/// Installs the handler for the whole process, once; later calls do nothing.
///
/// # Errors
/// [`Error::Signal`].
pub fn install() -> Result<(), Error> {
    if INSTALLED.swap(true, Ordering::AcqRel) {
        return Ok(());
    }
    // SAFETY: the old action is written to memory that is large enough, before any handler reads it.
    let mut result = unsafe { libc::sigaction(libc::SIGBUS, null(), (*PREVIOUS.0.get()).as_mut_ptr()) };
    if result == 0 {
        // SAFETY: all-zero is a valid sigaction, whose fields are set next.
        let mut action: libc::sigaction = unsafe { core::mem::zeroed() };
        action.sa_sigaction = handler as extern "C" fn(c_int, *mut siginfo_t, *mut c_void) as usize;
        // On the alternate stack where a thread has one: the fault may be by code that is short of stack.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        // SAFETY: a handler with the signature that SA_SIGINFO asks for; the mask is empty.
        result = unsafe { libc::sigaction(libc::SIGBUS, &action, null_mut()) };
    }
    if result < 0 {
        let errno = sys::errno();
        INSTALLED.store(false, Ordering::Release);
        return Err(Error::Signal { errno });
    }
    Ok(())
}

/// A mapping that is watched, until this is dropped.
#[derive(Debug)]
#[must_use = "dropping it ends the watch"]
pub struct Registration(&'static Slot);

/// Watches the `len` bytes from `base` on, made of pages of `page` bytes, a power of two.
///
/// # Errors
/// [`Error::GuardFull`] without memory for a larger table; [`Error::Length`] if `page` is no power of two, or base or length
/// are no multiples of it.
///
/// # Safety
/// The range is a mapping of the caller's, and stays so until the [`Registration`] is dropped. On a SIGBUS inside of it, a
/// page of it, or all of it, is replaced by zeroes.
pub unsafe fn register(base: NonNull<u8>, len: usize, page: usize) -> Result<Registration, Error> {
    let start = base.as_ptr() as usize;
    if !page.is_power_of_two()
        || !start.is_multiple_of(page)
        || !len.is_multiple_of(page)
        || start.checked_add(len).is_none()
    {
        return Err(Error::Length);
    }
    let mut chunk = &TABLE;
    loop {
        if let Some(slot) = chunk.take(start, len, page) {
            return Ok(Registration(slot));
        }
        chunk = match chunk.next() {
            Some(next) => next,
            None => chunk.grow()?,
        };
    }
}

impl Segment {
    /// Watches this segment; see [`guard`](crate::guard). Drop what this returns before the segment.
    ///
    /// # Errors
    /// [`Error::GuardFull`].
    ///
    /// # Safety
    /// The segment outlives the [`Registration`].
    pub unsafe fn guard(&self) -> Result<Registration, Error> {
        // SAFETY: the segment's own mapping, which outlives the watch, as the caller says.
        unsafe { register(self.base(), self.len(), self.page_size().bytes()) }
    }
}

impl Registration {
    /// Whether pages of the mapping were lost. It does not come back to life: unmap it.
    pub fn is_dead(&self) -> bool {
        self.0.dead.load(Ordering::Acquire)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.0.set(0, 0, 1);
        self.0.taken.store(false, Ordering::Release);
    }
}

/// Replaces the page, if it is one that is watched.
fn mend(address: usize) -> bool {
    let mut chunk = Some(&TABLE);
    while let Some(part) = chunk {
        let used = part.used.load(Ordering::Acquire);
        for slot in part.slots.iter().take(used) {
            let Some((start, len, page)) = slot.mapping_of(address) else {
                continue;
            };
            slot.dead.store(true, Ordering::Release);
            // Plain pages in place of a huge one, since there may be no other of those. A page in the middle makes three
            // mappings of one, of which a process has a limited number (vm.max_map_count). At the limit the whole mapping
            // goes, which is dead anyway.
            return replace(address & !(page - 1), page) || replace(start, len);
        }
        chunk = part.next();
    }
    false
}

/// Puts zeroes in place of a part of a watched mapping.
fn replace(at: usize, len: usize) -> bool {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    NonNull::new(at as *mut u8)
        // SAFETY: pages of a mapping that its owner registered for this.
        .is_some_and(|at| unsafe { sys::mmap_at(at, len, prot, flags, -1) }.is_ok())
}

extern "C" fn handler(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: errno is this thread's own; the interrupted code must find it as it was.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let saved = unsafe { *errno };
    // SAFETY: with SA_SIGINFO the kernel gives a siginfo, and for SIGBUS from a fault it has an address.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    if code != libc::BUS_ADRERR || !mend(address) {
        pass_on(signal, info, context);
    }
    // SAFETY: as above.
    unsafe { *errno = saved };
}

/// Calls the handler from before, or makes the fault that comes again upon return the end of the process.
fn pass_on(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: filled before this handler was installed, and not written since.
    let previous = unsafe { (*PREVIOUS.0.get()).assume_init_ref() };
    match previous.sa_sigaction {
        // A fault cannot be ignored: the kernel would force the default.
        libc::SIG_DFL | libc::SIG_IGN => {
            // SAFETY: sets a default action.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
            // A signal that was sent, unlike a fault, does not come again by itself.
            // SAFETY: info is the kernel's.
            if unsafe { (*info).si_code } <= 0 {
                // SAFETY: raise is async-signal-safe.
                unsafe { libc::raise(signal) };
            }
        }
        action if previous.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: with SA_SIGINFO the action is a function of this signature.
            let action: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) = unsafe { core::mem::transmute(action) };
            action(signal, info, context);
        }
        action => {
            // SAFETY: without SA_SIGINFO the action is a function of this signature.
            let action: extern "C" fn(c_int) = unsafe { core::mem::transmute(action) };
            action(signal);
        }
    }
}
