//! Queues: what one thread drives.

mod back;
mod front;
mod raw;
#[cfg(test)]
pub(crate) mod tests;
mod vf;
#[cfg(test)]
mod wrong_tests;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, epoll};

pub(crate) use back::{BackPair, BackRing};
pub(crate) use front::{Offloads, Pair as FrontPair};
pub use raw::{Buffer, MAX_SEGMENTS, RawQueue, RawRing, TooManySegments};
pub(crate) use raw::{LONG_HEADER, NET_HEADER};
pub(crate) use vf::Pair as VfPair;

use crate::copy::prefetch_write;
use crate::filter::Filter;
use crate::gate::DataSide;
use crate::packet::{Burst, Handled, Packet, handle};
use crate::pool::{self, BULK, Cache};
use crate::port::Shelf;
use crate::stats::{Counters, Stats};

/// A sending side whose other side may not do all that packets ask for.
trait Asking {
    /// Sends what it can, packets that ask for something among it; how many, and whether the next one asks for what the other
    /// side does not do.
    fn send_offloads(&mut self, cache: &mut Cache, burst: &mut Burst, counters: &Counters) -> (usize, bool);

    /// Sends what packets were cut into; whether nothing of that is left.
    fn flush(&mut self, cache: &mut Cache, counters: &Counters) -> bool;

    /// What a packet was cut into.
    fn cut(&mut self) -> &mut Burst;
}

/// Sends packets that may ask for something. What the other side does not do is done here.
#[inline(never)]
fn send_asking(side: &mut impl Asking, cache: &mut Cache, burst: &mut Burst, counters: &Counters) -> usize {
    let (mut sent, mut beyond) = side.send_offloads(cache, burst, counters);
    while beyond {
        match handle(&mut burst[0], cache, side.cut()) {
            Handled::Ready => {}
            Handled::NoBuffers => break,
            Handled::Never => {
                counters.tx_errors.add(1);
                burst.remove(0);
            }
            Handled::Cut => {
                sent += 1;
                burst.remove(0);
                if !side.flush(cache, counters) {
                    break;
                }
            }
        }
        let (n, more) = side.send_offloads(cache, burst, counters);
        sent += n;
        beyond = more;
    }
    sent
}

/// Bytes of the shortest frame: an Ethernet header.
pub(crate) const SHORTEST: usize = 14;

/// Bytes of the longest frame of a port with this MTU, with one VLAN tag. A second one is allowed for where it is there.
pub(crate) const fn longest(mtu: u16) -> u32 {
    mtu as u32 + 14 + TAG
}

/// Bytes of a VLAN tag.
pub(crate) const TAG: u32 = 4;

/// Whether a received packet is of a length that a port with this longest frame takes. If not, it is counted. A packet
/// that is to be cut, or was joined, is judged by its pieces.
#[cold]
#[inline(never)]
fn fits(packet: &Packet, longest: u32, counters: &Counters) -> bool {
    if packet.len() < SHORTEST {
        counters.rx_runts.add(1);
        return false;
    }
    let (len, tags) = packet.longest_frame();
    let fits = len <= (longest - TAG) as usize + tags.max(TAG as usize);
    if !fits {
        counters.rx_oversize.add(1);
    }
    fits
}

/// What became of packets of other pools.
enum Copied {
    /// The first one is a copy now; maybe others are, too.
    First,
    /// There are too few buffers for a copy of the first one.
    NoBuffers,
    /// This port's buffers never hold it.
    Never,
}

/// Puts copies in buffers of this queue's port in the place of packets whose buffers are another port's, or of a port that
/// is gone: the other side of a ring knows no other memory. As far as there are buffers; the first packet is such a one.
#[cold]
#[inline(never)]
fn copy_foreign(packets: &mut [Packet], cache: &mut Cache) -> Copied {
    let room = cache.pool().room() as usize;
    let mut done = Copied::NoBuffers;
    for packet in packets {
        if packet.meta().is_of(cache.own()) {
            continue;
        }
        let needed = packet.len().div_ceil(room).max(1);
        if needed > cache.most() {
            return match done {
                Copied::First => done,
                _ => Copied::Never,
            };
        }
        if cache.reserve(needed) < needed {
            break;
        }
        // From the cache, all of them: the pool may be empty.
        let mut chain: Option<Packet> = None;
        for _ in 0..needed {
            let Some(mut meta) = cache.pop() else { return done };
            if let Some(behind) = chain {
                // SAFETY: just taken from the cache; what follows is a chain that was taken from it, too.
                unsafe { meta.as_mut() }.set_next(behind.into_meta());
            }
            // SAFETY: just taken from the cache.
            chain = Some(unsafe { Packet::from_meta(meta) });
        }
        let Some(mut copy) = chain else { return done };
        if copy.fill_from(packet).is_err() {
            return done;
        }
        *packet = copy;
        done = Copied::First;
    }
    done
}

/// A queue pair of a port, driven by the thread that holds it. Taken by [`Port::queue`](crate::Port::queue); dropping it
/// puts it back there.
///
/// Receiving and sending never block, never allocate and never call the system, but for a kick that the other side asked
/// for. While the port's link is down nothing is sent, and what came before can still be received.
pub struct Queue {
    parts: Option<Parts>,
    shelf: Weak<Shelf>,
}

/// What a queue is, while it is taken or on its port's shelf.
pub(crate) struct Parts {
    pub(crate) index: u16,
    pub(crate) side: Side,
    pub(crate) cache: Cache,
    pub(crate) counters: Arc<Counters>,
    /// Becomes readable when the other side notifies, or when the link changes.
    pub(crate) epoll: Arc<OwnedFd>,
}

/// Which rings: chosen once a burst.
pub(crate) enum Side {
    Front(DataSide<FrontPair>),
    Back(DataSide<BackPair>),
    Vf(DataSide<VfPair>),
}

/// What [`Queue::drain`] waits for.
pub(crate) struct Unsent {
    /// Frames that were sent and that the other side has not taken.
    frames: usize,
    /// The other side is there to take them.
    up: bool,
}

impl Side {
    /// Whether the port is gone.
    fn is_abandoned(&self) -> bool {
        match self {
            Side::Front(gate) => gate.is_abandoned(),
            Side::Back(gate) => gate.is_abandoned(),
            Side::Vf(gate) => gate.is_abandoned(),
        }
    }

    /// Takes the events of the queue's epoll instance. That the port is gone stays to be seen.
    fn take_events(&self, epoll: &OwnedFd) {
        let take = || drain(epoll);
        match self {
            Side::Front(gate) => gate.take_wakeups(take),
            Side::Back(gate) => gate.take_wakeups(take),
            Side::Vf(gate) => gate.take_wakeups(take),
        }
    }

    /// `None`: the control thread is at the rings, or the port is gone.
    fn unsent(&mut self, cache: &mut Cache, counters: &Counters) -> Option<Unsent> {
        Some(match self {
            Side::Front(gate) => gate.enter()?.unsent(cache, counters),
            Side::Back(gate) => gate.enter()?.unsent(cache, counters),
            Side::Vf(gate) => gate.enter()?.unsent(cache, counters),
        })
    }
}

impl Queue {
    pub(crate) fn new(parts: Parts, shelf: Weak<Shelf>) -> Self {
        Queue {
            parts: Some(parts),
            shelf,
        }
    }

    #[inline(always)]
    fn parts(&mut self) -> &mut Parts {
        // SAFETY: `parts` is Some from `new` until `drop`.
        unsafe { self.parts.as_mut().unwrap_unchecked() }
    }

    fn parts_ref(&self) -> &Parts {
        // SAFETY: `parts` is Some from `new` until `drop`.
        unsafe { self.parts.as_ref().unwrap_unchecked() }
    }

    /// The queue pair's number, from 0.
    pub fn index(&self) -> u16 {
        self.parts_ref().index
    }

    /// Appends frames that have come to `burst`, up to its capacity; how many.
    #[inline]
    pub fn rx(&mut self, burst: &mut Burst) -> usize {
        let Parts {
            side, cache, counters, ..
        } = self.parts();
        match side {
            Side::Front(gate) => gate.enter().map_or(0, |mut pair| pair.rx(cache, burst, counters)),
            Side::Back(gate) => gate.enter().map_or(0, |mut pair| pair.rx(cache, burst, counters)),
            Side::Vf(gate) => gate.enter().map_or(0, |mut pair| pair.rx(cache, burst, counters)),
        }
    }

    /// Sends the frames of `burst`, from the front; how many. They leave the burst; what there was no room for stays.
    ///
    /// Frames of other ports, or of ports that are closed, are sent as well. Where the other side reads them in this
    /// port's memory, which is so on all ports but `vhost` ones, they are copied into buffers of this port.
    ///
    /// A frame that the other side can never take (longer than its buffers, of too many segments) leaves the burst too,
    /// and is counted in [`Stats::tx_errors`].
    #[inline]
    pub fn tx(&mut self, burst: &mut Burst) -> usize {
        if burst.is_empty() {
            return 0;
        }
        let Parts {
            side, cache, counters, ..
        } = self.parts();
        match side {
            Side::Front(gate) => gate.enter().map_or(0, |mut pair| pair.tx(cache, burst, counters)),
            Side::Back(gate) => gate.enter().map_or(0, |mut pair| pair.tx(cache, burst, counters)),
            Side::Vf(gate) => gate.enter().map_or(0, |mut pair| pair.tx(cache, burst, counters)),
        }
    }

    /// Appends `count` fresh, empty packets to `burst`, as far as it has room and the port has buffers; how many.
    #[inline]
    pub fn alloc(&mut self, burst: &mut Burst, count: usize) -> usize {
        let count = count.min(burst.room());
        let parts = self.parts();
        let mut done = 0;
        let mut reclaimed = false;
        while done < count {
            let want = (count - done).min(BULK);
            let have = parts.cache.reserve(want).min(want);
            if have == 0 {
                if reclaimed {
                    break;
                }
                reclaimed = true;
                parts.reclaim();
            }
            let mut appending = burst.appending();
            for mut meta in parts.cache.last(have).rev() {
                // SAFETY: the cache's buffer, which is given up below; no more than the room.
                unsafe {
                    let m = meta.as_mut();
                    m.reset();
                    // The other side had these lines last, and they are about to be written.
                    prefetch_write(m.data());
                    appending.push(Packet::from_meta(meta));
                }
            }
            drop(appending);
            parts.cache.forget_first(have, have);
            done += have;
        }
        done
    }

    /// Waits until the other side has taken all that was sent, or `timeout` is over, or the link is down; whether
    /// nothing is left in the ring. To be called before a port is closed: what is in its rings then is lost.
    ///
    /// A `vhost` port's frames are in the front-end's memory when they are sent; it waits only for the rest of packets
    /// that it cut.
    pub fn drain(&mut self, timeout: Duration) -> bool {
        let deadline = crate::deadline(timeout);
        let mut turns = 0u32;
        loop {
            let Parts {
                side, cache, counters, ..
            } = self.parts();
            match side.unsent(cache, counters) {
                Some(Unsent { frames: 0, .. }) => return true,
                Some(Unsent { up: false, .. }) => return false,
                // What was in the rings is lost.
                None if side.is_abandoned() => return false,
                _ => {}
            }
            if Instant::now() >= deadline {
                return false;
            }
            turns += 1;
            if turns < 100 {
                std::thread::yield_now()
            } else {
                std::thread::sleep(Duration::from_micros(100))
            }
        }
    }

    /// Takes back the buffers of what the other side has sent on, and gives all that this queue keeps for itself to the
    /// port's pool: for when a frame did not get the buffers it needs.
    pub fn reclaim(&mut self) {
        let parts = self.parts();
        parts.reclaim();
        parts.cache.flush(0);
    }

    /// A fresh, empty packet, if the port has a buffer.
    pub fn packet(&mut self) -> Option<Packet> {
        let parts = self.parts();
        if parts.cache.reserve(1) == 0 {
            parts.reclaim();
            parts.cache.reserve(1);
        }
        // SAFETY: the buffer is ours.
        parts.cache.pop().map(|meta| unsafe { Packet::from_meta(meta) })
    }

    /// Drops the packets of `burst`, to this queue's own stack of free buffers: the cheapest way.
    #[inline]
    pub fn free(&mut self, burst: &mut Burst) {
        let cache = &mut self.parts().cache;
        let mut returning = cache.returning();
        for packet in burst.iter() {
            // SAFETY: forgotten right below, all of them.
            unsafe { returning.put(packet.meta_ptr()) };
        }
        let n = burst.len();
        // SAFETY: the cache owns their buffers now.
        unsafe { burst.forget_front(n) };
    }

    /// Whether the queue's port is open. Once it is not, the queue moves nothing any more.
    pub fn is_open(&self) -> bool {
        !self.parts_ref().side.is_abandoned()
    }

    /// Sleeps until frames have come, the link or a setting of the port has changed, or `timeout` is over (`None`: no
    /// limit). `true`: frames are there.
    ///
    /// # Errors
    /// [`NotConnected`](std::io::ErrorKind::NotConnected), at once and each time, if the port is closed or dead; those of
    /// poll(2), but for EINTR, which ends the wait early with `false`.
    pub fn wait(&mut self, timeout: Option<Duration>) -> std::io::Result<bool> {
        if self.arm() {
            self.disarm();
            return Ok(true);
        }
        self.still_open()?;
        let deadline = timeout.and_then(|t| Instant::now().checked_add(t));
        // While the control thread was at the rings nothing was armed. It wakes this thread when it is done.
        let woken = poll_readable(self.as_fd(), deadline);
        let there = self.disarm();
        self.still_open()?;
        woken.map(|_| there)
    }

    fn still_open(&self) -> std::io::Result<()> {
        match self.is_open() {
            true => Ok(()),
            false => Err(closed()),
        }
    }

    /// Asks the other side to notify at the next frame, for a wait on [`as_fd`](AsFd::as_fd). `true`: frames are there
    /// already, do not sleep. Undone by [`disarm`](Queue::disarm).
    pub fn arm(&mut self) -> bool {
        let Parts {
            side, cache, counters, ..
        } = self.parts();
        match side {
            Side::Front(gate) => gate.enter().is_some_and(|mut pair| pair.arm(cache, counters)),
            Side::Back(gate) => gate.enter().is_some_and(|mut pair| pair.arm()),
            Side::Vf(gate) => gate.enter().is_some_and(|mut pair| pair.arm(cache, counters)),
        }
    }

    /// Asks for no more notifications, and takes those that came. `true`: frames are there.
    pub fn disarm(&mut self) -> bool {
        let Parts {
            side, counters, epoll, ..
        } = self.parts();
        side.take_events(epoll);
        match side {
            Side::Front(gate) => gate.enter().is_some_and(|mut pair| {
                pair.publish_counts(counters);
                pair.disarm()
            }),
            Side::Back(gate) => gate.enter().is_some_and(|mut pair| {
                pair.publish_counts(counters);
                pair.disarm()
            }),
            Side::Vf(gate) => gate.enter().is_some_and(|mut pair| {
                pair.publish_counts(counters);
                pair.disarm()
            }),
        }
    }

    /// This queue's counters, for the thread that drives it to add to.
    pub(crate) fn counters(&self) -> &Counters {
        &self.parts_ref().counters
    }

    /// What this queue has done.
    pub fn stats(&self) -> Stats {
        self.parts_ref().counters.snapshot()
    }
}

/// Whether a filter lets a packet in.
fn passes(filter: &Option<Box<Filter>>, packet: &Packet) -> bool {
    let Some(filter) = filter else { return true };
    let mut header = [0; 16];
    let n = packet.copy_to(&mut header);
    filter.accepts(&header[..n])
}

impl Parts {
    /// Gets buffers back from wherever they can be had.
    #[cold]
    #[inline(never)]
    fn reclaim(&mut self) {
        pool::flush_this_thread();
        match &mut self.side {
            Side::Front(gate) => {
                if let Some(mut pair) = gate.enter() {
                    pair.reclaim(&mut self.cache);
                }
            }
            Side::Vf(gate) => {
                if let Some(mut pair) = gate.enter() {
                    pair.reclaim(&mut self.cache);
                }
            }
            Side::Back(_) => {}
        }
    }
}

impl AsFd for Queue {
    /// Readable when the other side has notified since [`arm`](Queue::arm), or when the link or a setting of the port has
    /// changed, which may have undone the arming: disarm and arm again. It stays readable once the port is
    /// [closed](Queue::is_open). Do not read it: [`disarm`](Queue::disarm) does.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.parts_ref().epoll.as_fd()
    }
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue")
            .field("index", &self.index())
            .finish_non_exhaustive()
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        if let Some(mut parts) = self.parts.take() {
            parts.cache.flush(0);
            if let Some(shelf) = self.shelf.upgrade() {
                shelf.put_back(parts);
            }
        }
    }
}

/// The answer of queues without a port.
pub(crate) fn closed() -> std::io::Error {
    std::io::Error::new(
        std::io::ErrorKind::NotConnected,
        "the port of this queue is closed: drop the queue",
    )
}

/// Waits until `fd` is readable or the deadline has come; whether it is. An interruption counts as the deadline.
pub(crate) fn poll_readable(fd: BorrowedFd<'_>, deadline: Option<Instant>) -> std::io::Result<bool> {
    let timeout = deadline.map(|d| d.saturating_duration_since(Instant::now()));
    let timeout = timeout.and_then(|t| rustix::event::Timespec::try_from(t).ok());
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    match rustix::event::poll(&mut fds, timeout.as_ref()) {
        Ok(n) => Ok(n > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Takes the events of an epoll instance: its members are edge-triggered, so that taking is all there is to do.
pub(crate) fn drain(epoll_fd: &OwnedFd) {
    let mut events = [std::mem::MaybeUninit::<epoll::Event>::uninit(); 8];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    let _ = epoll::wait(epoll_fd, &mut events, Some(&now));
}
