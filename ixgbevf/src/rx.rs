//! The receive queue: buffers are posted in bursts, filled by the device in the same order, and polled by their DD bit.

use crate::access::{RW, Reg, Registers, Regs};
use crate::dma::{Memory, Rest, Ring, Step, trace};
use crate::received::{Received, Status};
use crate::regs::{VFRDT, srrctl};
use crate::ring::{Segment, Shadow, Slot, advance, after, check, clear};
use crate::{Anomalies, Error, MAX_FRAME};

/// Buffers of one size at least: what is posted to an [`RxQueue`], and how frames arrive in it.
#[derive(Clone, Copy, Debug)]
pub struct RxOptions {
    /// Bytes that every buffer holds at least. The device knows whole KiB, up to 16: 2,047 bytes are used as 1,024.
    pub buffer_len: u32,
    /// Take VLAN tags out of frames, and tell them in [`Received::vlan`].
    pub vlan_strip: bool,
}

impl Default for RxOptions {
    fn default() -> Self {
        Self {
            buffer_len: 2048,
            vlan_strip: false,
        }
    }
}

/// `open`: the rest of a frame that was ended as bad is still to come.
const SKIPPING: u32 = u32::MAX;

const DD: u32 = Status::DD.bits();
const EOP: u32 = Status::EOP.bits();
const RXE: u32 = Status::RXE.bits();

/// One receive queue. `S` is the private shadow, one [`Slot`] a descriptor: `&mut [Slot]`, `[Slot; N]`, `Box<[Slot]>`.
///
/// What the device writes is read once, status first, and checked against private state: a descriptor that was not posted
/// is not looked at, lengths are those of posted buffers, and no cookie comes twice.
#[derive(Debug)]
pub struct RxQueue<R, S> {
    regs: Regs<R>,
    tail: Reg<RW>,
    memory: Memory,
    slots: S,
    options: RxOptions,
    state: State,
}

#[derive(Debug)]
struct State {
    ring: Ring,
    size: usize,
    /// What the device takes a buffer to hold.
    buffer_len: u32,
    /// The oldest descriptor that the device has.
    next: usize,
    /// The next descriptor to post.
    post: usize,
    /// How many the device has.
    posted: usize,
    /// Bytes so far of a frame whose end did not come yet, or [`SKIPPING`].
    open: u32,
    /// Posted since the tail was written.
    unpublished: bool,
    running: bool,
    used: bool,
    index: u8,
    anomalies: Anomalies,
}

impl<R: Registers, S: AsMut<[Slot]>> RxQueue<R, S> {
    /// A queue over descriptor memory, which it clears. It runs from [`Vf::start_rx`](crate::Vf::start_rx) on; buffers may
    /// be posted before.
    ///
    /// # Errors
    /// [`Error::QueueIndex`], [`Error::RingSize`], [`Error::Misaligned`], [`Error::Slots`], [`Error::BufferLen`].
    ///
    /// # Safety
    /// `memory` is [`ring_len`](crate::ring_len)`(size)` bytes, valid for reads and writes for as long as the queue lives
    /// and the device may use it, the same for the device by its address, and nobody else in this process uses them. The
    /// device may use a queue from its start on, until it was stopped with success, reset or removed: dropping the queue
    /// does not end that. `regs` are those of the VF that the queue is started on, and no other queue has its index.
    pub unsafe fn new(
        regs: R,
        index: u8,
        memory: Memory,
        size: u16,
        options: RxOptions,
        mut slots: S,
    ) -> Result<Self, Error> {
        check(index, memory, size, slots.as_mut())?;
        let units = (options.buffer_len / srrctl::PACKET_UNIT).min(16);
        if units == 0 {
            return Err(Error::BufferLen(options.buffer_len));
        }
        let size = usize::from(size);
        // SAFETY: this function's contract; the alignment was checked.
        let ring = unsafe { Ring::new(memory.ptr, size) };
        clear(&ring, size);
        Ok(Self {
            regs: Regs(regs),
            tail: VFRDT.at(index.into()),
            memory,
            slots,
            options,
            state: State {
                ring,
                size,
                buffer_len: units * srrctl::PACKET_UNIT,
                next: 0,
                post: 0,
                posted: 0,
                open: 0,
                unpublished: false,
                running: false,
                used: false,
                index,
                anomalies: Anomalies::default(),
            },
        })
    }

    /// Posts buffers while there are free descriptors, and returns how many. An item that does not fit is not taken from
    /// the iterator. The device sees them after [`RxQueue::publish`].
    ///
    /// # Panics
    /// If a segment is shorter than [`RxQueue::buffer_len`]: the device would write beyond it.
    ///
    /// # Safety
    /// From [`Vf::start_rx`](crate::Vf::start_rx) on, or at once if the queue runs, the device may write a segment's bytes
    /// until its cookie comes back by [`RxQueue::poll_each`], or the device does not use the queue any more: stopped (with
    /// success), reset or removed. Until then they are memory that is meant for that, valid by these addresses for the
    /// device, and not used otherwise. Dropping the queue or forgetting it does not end that.
    #[inline]
    pub unsafe fn add_each<I>(&mut self, buffers: I) -> usize
    where
        I: IntoIterator<Item = (Segment, u64)>,
    {
        let state = &mut self.state;
        let (ring, size, buffer_len) = (state.ring, state.size, state.buffer_len);
        let mut slots = Shadow::new(self.slots.as_mut(), size);
        let mut buffers = buffers.into_iter();
        let mut added = 0;
        loop {
            let post = state.post;
            // Up to the ring's end, so that nothing wraps within.
            let limit = (size - 1 - state.posted).min(size - post);
            let mut run = Filling { state, count: 0 };
            buffers.by_ref().take(limit).for_each(|(segment, cookie)| {
                assert!(segment.len >= buffer_len, "a receive buffer is too short");
                let at = post + run.count;
                // SAFETY: `limit` keeps it below the size.
                unsafe {
                    ring.offer(at, segment.addr);
                    slots.at(at).cookie = cookie;
                }
                run.count += 1;
            });
            let count = run.count;
            drop(run);
            added += count;
            if count < limit || limit == 0 {
                return added;
            }
        }
    }

    /// Gives the device what was posted: one write of the tail, or none if there is nothing new.
    #[inline]
    pub fn publish(&mut self) {
        let state = &mut self.state;
        if state.unpublished && state.running {
            state.unpublished = false;
            state.ring.release();
            trace(Step::Tail);
            self.regs.write(self.tail, state.post as u32);
        }
    }

    /// Takes up to `max` buffers back that the device has filled, oldest first, and returns how many.
    ///
    /// A length that cannot be makes a bad frame of length 0, and is counted. If `each` panics, the buffer it was called
    /// with counts as handed out.
    #[inline]
    pub fn poll_each(&mut self, max: usize, mut each: impl FnMut(Received)) -> usize {
        let state = &mut self.state;
        let (ring, size, buffer_len) = (state.ring, state.size, state.buffer_len);
        // VP says that there is a tag, also if it was left in the frame (§7.1.6.2).
        let told = Status::from_bits_retain(if self.options.vlan_strip {
            !0
        } else {
            !Status::VP.bits()
        });
        let mut slots = Shadow::new(self.slots.as_mut(), size);
        let mut taken = 0;
        loop {
            let next = state.next;
            // Up to the ring's end, so that nothing wraps within.
            let limit = state.posted.min(max - taken).min(size - next);
            let mut run = Taking {
                count: 0,
                open: state.open,
                state,
            };
            while run.count < limit {
                let at = next + run.count;
                // SAFETY: `limit` keeps it below the size.
                let status = unsafe { ring.status(at) };
                if status & DD == 0 {
                    break;
                }
                ring.acquire();
                // SAFETY: as above.
                let (
                    Rest {
                        packet_hash,
                        length_vlan,
                    },
                    slot,
                ) = unsafe { (ring.rest(at), slots.at(at)) };
                let cookie = slot.cookie;
                run.count += 1;
                let len = length_vlan & 0xffff;
                // A frame is whole, sound and the first of its buffers: all in one comparison.
                let odd = (status & (EOP | RXE)) ^ EOP | run.open;
                let received = |piece: Piece| Received {
                    cookie,
                    len: piece.len,
                    first: piece.first,
                    last: piece.last,
                    bad: piece.bad,
                    status: Status::from_bits_retain(status).intersection(told),
                    packet: packet_hash as u32,
                    hash: (packet_hash >> 32) as u32,
                    vlan: (length_vlan >> 16) as u16,
                };
                // Two calls, so that the first one's closure is compiled for what a whole frame is.
                if odd == 0 && len.wrapping_sub(1) < buffer_len {
                    each(received(Piece {
                        len,
                        first: true,
                        last: true,
                        bad: false,
                        open: 0,
                    }));
                } else {
                    let piece = piece(run.open, &mut run.state.anomalies, buffer_len, status, len);
                    // By value: what a function could reach would be kept in memory.
                    run.open = piece.open;
                    each(received(piece));
                }
            }
            let count = run.count;
            drop(run);
            taken += count;
            if count < limit || limit == 0 {
                return taken;
            }
        }
    }

    /// Hands back the cookie of every buffer that is posted, oldest first, and brings the queue to its initial state.
    /// Anomalies stay counted.
    ///
    /// # Safety
    /// The device does not use the queue any more: it never ran, was stopped with success, reset or removed.
    pub unsafe fn detach_each(&mut self, mut each: impl FnMut(u64)) {
        let state = &mut self.state;
        let mut slots = Shadow::new(self.slots.as_mut(), state.size);
        state.running = false;
        while state.posted > 0 {
            // SAFETY: `next` is an index of the ring.
            let cookie = unsafe { slots.at(state.next) }.cookie;
            state.next = after(state.next, state.size);
            state.posted -= 1;
            each(cookie);
        }
        clear(&state.ring, state.size);
        state.next = 0;
        state.post = 0;
        state.open = 0;
        state.unpublished = false;
        state.used = false;
    }
}

impl<R, S> RxQueue<R, S> {
    /// Whether the device has filled the oldest buffer: [`RxQueue::poll_each`] would yield it.
    #[inline]
    pub fn has_done(&self) -> bool {
        // SAFETY: `next` is an index of the ring.
        self.state.posted > 0 && unsafe { self.state.ring.status(self.state.next) } & DD != 0
    }

    /// How many buffers of those posted are filled, in a row from the oldest, looking at `max` at most.
    pub fn done(&self, max: usize) -> usize {
        let state = &self.state;
        let mut at = state.next;
        let mut done = 0;
        while done < state.posted.min(max) {
            // SAFETY: `at` is an index of the ring, from its first value on.
            if unsafe { state.ring.status(at) } & DD == 0 {
                break;
            }
            at = after(at, state.size);
            done += 1;
        }
        done
    }

    /// The queue's number.
    #[inline]
    pub fn index(&self) -> u8 {
        self.state.index
    }

    /// Descriptors of the ring. One of them always stays free.
    #[inline]
    pub fn size(&self) -> u16 {
        self.state.size as u16
    }

    /// Bytes that every buffer must hold: whole KiB.
    #[inline]
    pub fn buffer_len(&self) -> u32 {
        self.state.buffer_len
    }

    /// Buffers that can be posted now.
    #[inline]
    pub fn free(&self) -> u16 {
        (self.state.size - 1 - self.state.posted) as u16
    }

    /// Buffers that are posted, published or not.
    #[inline]
    pub fn in_flight(&self) -> u16 {
        self.state.posted as u16
    }

    /// What the device did wrong so far.
    #[inline]
    pub fn anomalies(&self) -> Anomalies {
        self.state.anomalies
    }

    pub(crate) fn set_vlan_strip(&mut self, on: bool) {
        self.options.vlan_strip = on;
    }

    pub(crate) fn is_running(&self) -> bool {
        self.state.running
    }

    pub(crate) fn options(&self) -> RxOptions {
        self.options
    }

    pub(crate) fn address(&self) -> u64 {
        self.memory.addr
    }

    /// That it may start: it has not run since it was made or detached.
    pub(crate) fn check_unused(&self) -> Result<(), Error> {
        if self.state.used {
            return Err(Error::NotDetached(self.state.index));
        }
        Ok(())
    }

    pub(crate) fn set_running(&mut self, running: bool) {
        self.state.running = running;
        self.state.used |= running;
    }
}

/// A piece of a frame, after it was checked.
struct Piece {
    len: u32,
    first: bool,
    last: bool,
    bad: bool,
    /// The frame, as it stands after this piece.
    open: u32,
}

/// Anything but a frame in one buffer. Pieces that are not the last fill their buffers, so that a frame has 10 of them at
/// most.
#[cold]
fn piece(open: u32, anomalies: &mut Anomalies, buffer_len: u32, status: u32, len: u32) -> Piece {
    let end = status & EOP != 0;
    let dropped = Piece {
        len: 0,
        first: open == 0 || open == SKIPPING,
        last: true,
        bad: true,
        open: if end { 0 } else { SKIPPING },
    };
    if open == SKIPPING {
        return dropped;
    }
    if len == 0 || len > buffer_len {
        anomalies.length += 1;
        return dropped;
    }
    if !end && len != buffer_len {
        anomalies.short_piece += 1;
        return dropped;
    }
    if open + len > u32::from(MAX_FRAME) {
        anomalies.overlong += 1;
        return dropped;
    }
    Piece {
        len,
        first: open == 0,
        last: end,
        bad: end && status & RXE != 0,
        open: if end { 0 } else { open + len },
    }
}

/// A run of buffers being posted, entered when it ends: also when the caller's iterator panics.
struct Filling<'a> {
    state: &'a mut State,
    count: usize,
}

impl Drop for Filling<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        let state = &mut *self.state;
        state.post = advance(state.post, self.count, state.size);
        state.posted += self.count;
        state.unpublished |= self.count > 0;
    }
}

/// A run of buffers being taken back, entered when it ends: also when the caller's closure panics, so that no cookie is
/// handed out twice.
struct Taking<'a> {
    state: &'a mut State,
    count: usize,
    open: u32,
}

impl Drop for Taking<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        let state = &mut *self.state;
        state.next = advance(state.next, self.count, state.size);
        state.posted -= self.count;
        state.open = self.open;
    }
}
