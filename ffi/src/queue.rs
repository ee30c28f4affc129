//! Queues: what one thread at a time drives, a burst a call.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Weak};

use usernic::{Burst, Port, Queue};

use crate::burst::{BURSTS, Bundle, BurstHandle};
use crate::check;
use crate::port::{Counts, Open, time};
use crate::status::{Fault, Outcome, Status, shield};
use crate::table::Table;

/// A queue pair, as a handle: not to be followed.
pub struct QueueHandle(());

struct Taken {
    queue: Queue,
    home: u64,
    port: Weak<Port>,
    /// For packets of other ports: they are sent as copies.
    copies: Option<Burst>,
}

static QUEUES: Table<Taken> = Table::new(2, "queue");

/// Packets that are copied at a time.
const COPIES: usize = 32;

pub(crate) fn take(open: &Open, index: u16) -> Outcome<u64> {
    QUEUES.insert(Taken {
        queue: open.port.queue(index)?,
        home: open.home,
        port: Arc::downgrade(&open.port),
        copies: None,
    })
}

impl Taken {
    /// Sends copies of packets of another port.
    #[cold]
    #[inline(never)]
    fn send_copies(&mut self, bundle: &mut Bundle) -> usize {
        let queue = &mut self.queue;
        let copies = self.copies.get_or_insert_with(|| Burst::new(COPIES));
        let mut sent = 0;
        while !bundle.burst.is_empty() {
            queue.alloc(copies, bundle.burst.len().min(COPIES));
            let mut pairs = copies.iter_mut().zip(bundle.burst.iter());
            let all = pairs.len();
            let failed = pairs.position(|(copy, packet)| copy.copy_packet(packet).is_err());
            let made = failed.unwrap_or(all);
            copies.truncate(made);
            sent += queue.tx(copies);
            // What left is the front: sent, or such as can never be.
            let gone = made - copies.len();
            queue.free(copies);
            bundle.drop_front(gone);
            if gone == 0 || gone < made {
                break;
            }
        }
        sent
    }
}

fn id(queue: *const QueueHandle) -> u64 {
    queue as u64
}

fn both<R>(
    queue: *mut QueueHandle,
    burst: *mut BurstHandle,
    call: impl FnOnce(&mut Taken, &mut Bundle) -> Outcome<R>,
) -> Outcome<R> {
    QUEUES.with(id(queue), |taken| {
        BURSTS.with(burst as u64, |bundle| call(taken, bundle))
    })
}

/// Gives a queue back to its port.
#[unsafe(no_mangle)]
pub extern "C" fn usernic_queue_close(queue: *mut QueueHandle) -> i32 {
    shield(|| QUEUES.remove(id(queue)).map(|_| 0))
}

/// Appends frames that have come to `burst`, as many as there is room for; how many. Never blocks.
#[unsafe(no_mangle)]
pub extern "C" fn usernic_queue_rx(queue: *mut QueueHandle, burst: *mut BurstHandle) -> i32 {
    shield(|| {
        both(queue, burst, |taken, bundle| {
            bundle.admit(taken.home)?;
            let start = bundle.burst.len();
            let count = taken.queue.rx(&mut bundle.burst);
            bundle.refresh(start);
            Ok(count as i32)
        })
    })
}

/// Sends the frames of `burst`, from the front; how many. They leave the burst, what there was no room for stays. Frames
/// that the other side can never take leave it, too, and are counted. Frames of another port are sent as copies. With an
/// error nothing is sent. Never blocks.
#[unsafe(no_mangle)]
pub extern "C" fn usernic_queue_tx(queue: *mut QueueHandle, burst: *mut BurstHandle) -> i32 {
    shield(|| {
        both(queue, burst, |taken, bundle| {
            bundle.settle()?;
            let sent = if bundle.home == taken.home {
                taken.queue.tx(&mut bundle.burst)
            } else {
                taken.send_copies(bundle)
            };
            bundle.refresh(0);
            Ok(sent as i32)
        })
    })
}

/// Appends `count` fresh, empty frames to `burst`, as far as there is room and the port has buffers; how many.
#[unsafe(no_mangle)]
pub extern "C" fn usernic_queue_alloc(queue: *mut QueueHandle, burst: *mut BurstHandle, count: u32) -> i32 {
    shield(|| {
        both(queue, burst, |taken, bundle| {
            bundle.admit(taken.home)?;
            let start = bundle.burst.len();
            let made = taken.queue.alloc(&mut bundle.burst, count as usize);
            bundle.refresh(start);
            Ok(made as i32)
        })
    })
}

/// Frees all frames of `burst`: the cheapest way, if they are of this queue's port.
#[unsafe(no_mangle)]
pub extern "C" fn usernic_queue_free(queue: *mut QueueHandle, burst: *mut BurstHandle) -> i32 {
    shield(|| {
        both(queue, burst, |taken, bundle| {
            if bundle.home == taken.home {
                taken.queue.free(&mut bundle.burst);
            } else {
                bundle.burst.clear();
            }
            bundle.refresh(0);
            Ok(0)
        })
    })
}

/// Sleeps until frames have come, the link has changed, or `milliseconds` are over (below 0: without end). 1: frames are
/// there. 0: none; a signal ends the sleep early, too.
#[unsafe(no_mangle)]
pub extern "C" fn usernic_queue_wait(queue: *mut QueueHandle, milliseconds: i64) -> i32 {
    shield(|| {
        QUEUES.with(id(queue), |taken| {
            let there = taken
                .queue
                .wait(time(milliseconds))
                .map_err(|error| match error.kind() {
                    std::io::ErrorKind::NotConnected => Fault::fixed(Status::Closed, "the queue's port was closed"),
                    _ => Fault::new(Status::System, format_args!("waiting for frames: {error}")),
                })?;
            if !there && taken.port.strong_count() == 0 {
                return Err(Fault::fixed(Status::Closed, "the queue's port was closed"));
            }
            Ok(there.into())
        })
    })
}

/// A file descriptor that is readable when the other side has notified since usernic_queue_arm(), or when the link has
/// changed: for poll(2) and its kin, together with others. It is the queue's: neither read nor close it.
#[unsafe(no_mangle)]
pub extern "C" fn usernic_queue_fd(queue: *mut QueueHandle) -> i32 {
    shield(|| QUEUES.with(id(queue), |taken| Ok(taken.queue.as_fd().as_raw_fd())))
}

/// Asks the other side to notify at the next frame. 1: frames are there already, do not sleep. Undone by
/// usernic_queue_disarm().
#[unsafe(no_mangle)]
pub extern "C" fn usernic_queue_arm(queue: *mut QueueHandle) -> i32 {
    shield(|| QUEUES.with(id(queue), |taken| Ok(taken.queue.arm().into())))
}

/// Asks for no more notifications, and takes those that came. 1: frames are there.
#[unsafe(no_mangle)]
pub extern "C" fn usernic_queue_disarm(queue: *mut QueueHandle) -> i32 {
    shield(|| QUEUES.with(id(queue), |taken| Ok(taken.queue.disarm().into())))
}

/// Waits until the other side has taken all that was sent, or `milliseconds` are over, or the link is down. 1: nothing is
/// left. To be called before a port is closed.
#[unsafe(no_mangle)]
pub extern "C" fn usernic_queue_drain(queue: *mut QueueHandle, milliseconds: i64) -> i32 {
    shield(|| {
        QUEUES.with(id(queue), |taken| {
            // A limit that the clock can still add.
            let limit = i64::from(u32::MAX);
            let asked = if milliseconds < 0 {
                limit
            } else {
                milliseconds.min(limit)
            };
            Ok(taken.queue.drain(time(asked).unwrap_or_default()).into())
        })
    })
}

/// What this queue has done, in a struct of `size` bytes (sizeof *out).
///
/// # Safety
/// `out` has `size` bytes that can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_queue_counts(queue: *mut QueueHandle, out: *mut Counts, size: usize) -> i32 {
    shield(|| {
        QUEUES.with(id(queue), |taken| {
            // SAFETY: by the caller; the struct has no padding.
            unsafe { check::put(taken.queue.stats().into(), out, size, "usernic_queue_counts") }?;
            Ok(0)
        })
    })
}
