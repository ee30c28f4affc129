//! Notifications: signalling an eventfd that the other side holds too, without ever sleeping on it.
//!
//! `O_NONBLOCK` is a flag of the open file description (fcntl(2)), and the other side shares the description. It can clear
//! the flag and fill the counter, and then write(2) sleeps for as long as it likes. The kernel's own eventfd_signal() never
//! sleeps: it adds to the counter and stops at the largest value (eventfd(2)). User space reaches that function by
//! asynchronous input and output: a request with `IOCB_FLAG_RESFD` signals an eventfd when it is complete (io_submit(2)).
//! The request here reads nothing from a private memfd, so it is complete when io_submit(2) returns.
//!
//! The same holds for read(2), which sleeps while the counter is 0. Nothing here reads a shared eventfd: whoever waits for
//! one has it in an edge-triggered epoll instance, where each signal is an edge.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::fs::{MemfdFlags, memfd_create};

use crate::error::{Error, Tried};

/// `struct iocb` of linux/aio_abi.h. `aio_key` and `aio_rw_flags` change places with the byte order; both are 0 here.
#[repr(C)]
#[derive(Default)]
struct Iocb {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    reqprio: i16,
    fildes: u32,
    buf: u64,
    nbytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    resfd: u32,
}

const _: () = assert!(size_of::<Iocb>() == 64);

/// `IOCB_CMD_PREAD` and `IOCB_FLAG_RESFD` of linux/aio_abi.h.
const IOCB_CMD_PREAD: u16 = 0;
const IOCB_FLAG_RESFD: u32 = 1;

/// `struct io_event` of linux/aio_abi.h.
type IoEvent = [u64; 4];

/// Completions that are taken out of the context's ring at once.
const REAP: usize = 64;

/// How often a full ring is emptied for one signal. Each time at least one thread gets its request in.
const ATTEMPTS: usize = 1000;

/// The process's context of io_setup(2); 0: none yet. A child of fork(2) has none of its parent's.
static CONTEXT: AtomicU64 = AtomicU64::new(0);

/// Only one thread makes a context.
static SETUP: Mutex<()> = Mutex::new(());

/// What the requests read nothing from.
static FILE: OnceLock<OwnedFd> = OnceLock::new();

/// Makes what [`signal`] needs, once a process: a memfd and a context of asynchronous input and output, which counts as
/// one of `/proc/sys/fs/aio-max-nr`. Every port does this while it opens; whoever drives a [`RawRing`](crate::RawRing)
/// without a port calls it before, to learn of an error.
///
/// # Errors
/// [`Error::System`]: memfd_create(2) or io_setup(2) failed; the latter where a filter of system calls forbids it, or
/// the system's limit is used up.
pub fn prepare() -> Result<(), Error> {
    context(0).map(drop)
}

/// The context and the file. `stale` is a context that is not ours (the parent's, after fork(2)), or 0.
fn context(stale: u64) -> Result<(u64, &'static OwnedFd), Error> {
    if FILE.get().is_none() {
        let file = memfd_create("usernic-notify", MemfdFlags::CLOEXEC).tried("memfd_create(2)")?;
        // Another thread may have been faster: its file serves as well.
        let _ = FILE.set(file);
    }
    let file = FILE
        .get()
        .ok_or(io::Error::from(io::ErrorKind::NotFound))
        .tried("memfd_create(2)")?;
    let current = CONTEXT.load(Ordering::Acquire);
    if current != stale {
        return Ok((current, file));
    }
    let _guard = SETUP.lock().unwrap_or_else(PoisonError::into_inner);
    let current = CONTEXT.load(Ordering::Acquire);
    if current != stale {
        return Ok((current, file));
    }
    // The type of aio_context_t: unsigned long.
    let mut context: libc::c_ulong = 0;
    // SAFETY: io_setup(2) writes the context's number there and nothing else.
    let result = unsafe { libc::syscall(libc::SYS_io_setup, 1, &raw mut context) };
    if result != 0 {
        return Err(io::Error::last_os_error())
            .tried("io_setup(2), which notifications need (its limit: /proc/sys/fs/aio-max-nr)");
    }
    CONTEXT.store(context, Ordering::Release);
    Ok((context, file))
}

/// Signals an eventfd, as `write` of 1 does, without ever sleeping. A counter that is full stays full, which is a signal
/// to see all the same.
///
/// # Errors
/// As of [`prepare`] where that was not called before; `EINVAL` for what is not an eventfd.
pub fn signal(eventfd: impl AsFd) -> Result<(), Error> {
    let fd = eventfd.as_fd().as_raw_fd();
    let (mut context_id, file) = context(0)?;
    let mut renewed = false;
    let request = Iocb {
        opcode: IOCB_CMD_PREAD,
        fildes: file.as_raw_fd() as u32,
        flags: IOCB_FLAG_RESFD,
        resfd: fd as u32,
        ..Iocb::default()
    };
    let requests = [&raw const request];
    for _ in 0..ATTEMPTS {
        // SAFETY: one request, which io_submit(2) copies before it returns; it reads no byte into its buffer.
        let result = unsafe { libc::syscall(libc::SYS_io_submit, context_id, 1, requests.as_ptr()) };
        if result == 1 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            // The ring of completions is full: nobody else takes them out.
            Some(libc::EAGAIN) => reap(context_id),
            // After fork(2) the number is that of the parent's context.
            Some(libc::EINVAL) if !renewed => {
                renewed = true;
                (context_id, _) = context(context_id)?;
            }
            Some(libc::EINTR) => {}
            _ => return Err(error).tried("io_submit(2)"),
        }
    }
    Err(io::Error::from_raw_os_error(libc::EAGAIN)).tried("io_submit(2)")
}

/// Takes completions out of the context's ring. Does not wait.
#[cold]
fn reap(context: u64) {
    let mut events = [IoEvent::default(); REAP];
    let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: room for that many events, and a time limit of zero.
    unsafe {
        libc::syscall(
            libc::SYS_io_getevents,
            context,
            0,
            REAP,
            events.as_mut_ptr(),
            &raw const now,
        );
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    fn count(fd: &OwnedFd) -> u64 {
        let mut bytes = [0; 8];
        rustix::io::read(fd, &mut bytes).unwrap();
        u64::from_ne_bytes(bytes)
    }

    #[test]
    fn a_signal_adds_one() {
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        for _ in 0..1000 {
            signal(&event).unwrap();
        }
        assert_eq!(count(&event), 1000);
    }

    /// A blocking eventfd whose counter is full: write(2) would sleep for ever.
    #[test]
    fn a_full_counter_does_not_block() {
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&event, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        for _ in 0..1000 {
            signal(&event).unwrap();
        }
        assert!(count(&event) >= u64::MAX - 1);
    }

    #[test]
    fn many_threads_lose_no_signal() {
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..5000).for_each(|_| signal(&event).unwrap()));
            }
        });
        assert_eq!(count(&event), 20_000);
    }

    #[test]
    fn what_is_no_eventfd_is_an_error() {
        let file = memfd_create("x", MemfdFlags::CLOEXEC).unwrap();
        assert!(signal(&file).is_err());
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        signal(&event).unwrap();
        assert_eq!(count(&event), 1);
    }
}
