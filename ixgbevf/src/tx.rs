//! The transmit queue: frames are posted in bursts, and come back when a descriptor that was to be reported has its DD bit.

use crate::access::{RW, Reg, Registers, Regs};
use crate::dma::{Memory, Ring, Step, trace};
use crate::offload::{Context, Encoded, MIN_FRAME, Offload, command, olinfo};
use crate::regs::VFTDT;
use crate::ring::{Mark, Segment, Shadow, Slot, advance, after, check, clear};
use crate::{Error, MAX_FRAME};

/// Segments of a frame at most.
pub const MAX_SEGMENTS: usize = 40;

/// Bytes of a segment at most.
pub const MAX_SEGMENT: u32 = 16 * 1024;

/// The command of a frame in one segment that nothing is done to.
const PLAIN: u32 = command::DATA | command::EOP;

/// How a transmit queue reports.
#[derive(Clone, Copy, Debug)]
pub struct TxOptions {
    /// The device reports a frame when this many descriptors were posted since the last that it is to report. Each report
    /// is a write of the device to memory, so every descriptor (1) is dear. At most half of the ring, less in the smallest.
    pub report_every: u16,
    /// The last frame of each burst is reported too, so that everything comes back without more being sent. Without it the
    /// last frames of a silence stay until something is sent behind them, as with other drivers.
    pub report_last: bool,
}

impl Default for TxOptions {
    fn default() -> Self {
        Self {
            report_every: 32,
            report_last: true,
        }
    }
}

/// One transmit queue. `S` is the private shadow, one [`Slot`] a descriptor: `&mut [Slot]`, `[Slot; N]`, `Box<[Slot]>`.
///
/// Every data descriptor has CC set and names a context that was loaded before it: two contexts are kept on the device, and
/// a third replaces the one that was not used last.
#[derive(Debug)]
pub struct TxQueue<R, S> {
    regs: Regs<R>,
    tail: Reg<RW>,
    memory: Memory,
    slots: S,
    state: State,
}

#[derive(Debug)]
struct State {
    ring: Ring,
    size: usize,
    options: TxOptions,
    /// The next descriptor to post.
    post: usize,
    free: usize,
    /// The queue of cookies, in the slots: the oldest, the next, and how many.
    oldest: usize,
    newest: usize,
    frames: usize,
    /// The queue of marks, in the slots too.
    first_mark: usize,
    next_mark: usize,
    marks: usize,
    /// What was posted since the last mark, and where and as what its last frame ended.
    since: Mark,
    last_command: u32,
    /// Frames that are done and not handed out, and descriptors that are free after them.
    ready: usize,
    ready_descriptors: usize,
    contexts: [Option<Context>; 2],
    recent: usize,
    /// The offload of the frame before, and what it comes to.
    offload: Offload,
    encoded: Encoded,
    unpublished: bool,
    running: bool,
    used: bool,
    index: u8,
}

impl State {
    fn new(ring: Ring, size: usize, options: TxOptions, index: u8) -> Self {
        Self {
            ring,
            size,
            options,
            post: 0,
            free: size - 1,
            oldest: 0,
            newest: 0,
            frames: 0,
            first_mark: 0,
            next_mark: 0,
            marks: 0,
            since: Mark::default(),
            last_command: 0,
            ready: 0,
            ready_descriptors: 0,
            contexts: [None; 2],
            recent: 0,
            offload: Offload::NONE,
            encoded: Encoded::PLAIN,
            unpublished: false,
            running: false,
            used: false,
            index,
        }
    }
}

impl<R: Registers, S: AsMut<[Slot]>> TxQueue<R, S> {
    /// A queue over descriptor memory, which it clears. It runs from [`Vf::start_tx`](crate::Vf::start_tx) on.
    ///
    /// # Errors
    /// [`Error::QueueIndex`], [`Error::RingSize`], [`Error::Misaligned`], [`Error::Slots`].
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
        options: TxOptions,
        mut slots: S,
    ) -> Result<Self, Error> {
        check(index, memory, size, slots.as_mut())?;
        let size = usize::from(size);
        // SAFETY: this function's contract; the alignment was checked.
        let ring = unsafe { Ring::new(memory.ptr, size) };
        clear(&ring, size);
        // What waits for a report must leave room for the largest frame and its context, or neither would ever come.
        let most = (size - 2 - MAX_SEGMENTS).min(size / 2) as u16;
        let options = TxOptions {
            report_every: options.report_every.clamp(1, most),
            ..options
        };
        Ok(Self {
            regs: Regs(regs),
            tail: VFTDT.at(index.into()),
            memory,
            slots,
            state: State::new(ring, size, options, index),
        })
    }

    /// The fast path: posts frames of one segment that nothing is done to, while there are free descriptors, and returns how
    /// many. An item that does not fit is not taken from the iterator. The device sees them after [`TxQueue::publish`].
    ///
    /// # Panics
    /// If a frame has fewer than 17 bytes or more than 9,728: see [`TxQueue::takes`].
    ///
    /// # Safety
    /// From [`Vf::start_tx`](crate::Vf::start_tx) on, or at once if the queue runs, the device may read the segments' bytes
    /// until their cookie comes back by [`TxQueue::poll_each`], or the device does not use the queue any more: stopped (with
    /// success), reset or removed. Until then they are memory that may be read, valid by these addresses for the device, and
    /// not written. Dropping the queue or forgetting it does not end that.
    #[inline]
    pub unsafe fn add_each<I>(&mut self, frames: I) -> usize
    where
        I: IntoIterator<Item = (Segment, u64)>,
    {
        let mut frames = frames.into_iter();
        let before = usize::from(!self.state.has_loaded(Context::PLAIN));
        if before > 0 {
            // The context and the first frame.
            if self.state.free < 2 {
                return 0;
            }
            let Some((segment, cookie)) = frames.next() else {
                return 0;
            };
            assert!(takes(segment.len), "a frame has 17 to 9,728 bytes");
            // SAFETY: passed on.
            let added = unsafe { self.add(&[segment], &Offload::NONE, cookie) };
            debug_assert_eq!(added, Ok(()));
        }
        let state = &mut self.state;
        let mut added = before;
        let Some(context) = state.context(Context::PLAIN, 0) else {
            return added;
        };
        let (ring, size) = (state.ring, state.size);
        let every = usize::from(state.options.report_every);
        let olinfo = olinfo::CC | (context as u32) << olinfo::IDX_SHIFT;
        let mut slots = Shadow::new(self.slots.as_mut(), size);
        loop {
            let (post, newest) = (state.post, state.newest);
            // Up to the next report, and up to the ends of ring and queue, so that nothing wraps within.
            let to_report = every.saturating_sub(state.since.descriptors.into()).max(1);
            let limit = state.free.min(to_report).min(size - post).min(size - newest);
            let mut run = Filling {
                state,
                count: 0,
                last_len: 0,
            };
            frames.by_ref().take(limit).for_each(|(segment, cookie)| {
                let len = segment.len;
                assert!(takes(len), "a frame has 17 to 9,728 bytes");
                // SAFETY: `limit` keeps both below the size.
                unsafe {
                    ring.post(
                        post + run.count,
                        segment.addr,
                        PLAIN | len,
                        olinfo | len << olinfo::PAYLEN_SHIFT,
                    );
                    slots.at(newest + run.count).cookie = cookie;
                }
                run.last_len = len;
                run.count += 1;
            });
            let count = run.count;
            drop(run);
            added += count;
            if usize::from(state.since.descriptors) >= every && count > 0 {
                state.report(&mut slots);
            }
            if count < limit || limit == 0 {
                return added;
            }
        }
    }

    /// Posts one frame of up to 40 segments, with what the device is to do to it. The device sees it after
    /// [`TxQueue::publish`].
    ///
    /// # Errors
    /// [`Error::Full`] if fewer descriptors are free than it takes, one for each segment and one for a context that is not
    /// loaded; [`Error::EmptySegment`], [`Error::SegmentLen`], [`Error::TooManySegments`], [`Error::FrameLen`],
    /// [`Error::Offload`]. Nothing was changed then.
    ///
    /// # Safety
    /// As for [`TxQueue::add_each`].
    #[inline]
    pub unsafe fn add(&mut self, frame: &[Segment], offload: &Offload, cookie: u64) -> Result<(), Error> {
        let state = &mut self.state;
        // Frames of one connection mostly want the same.
        if state.offload != *offload {
            state.encoded = offload.encode()?;
            state.offload = *offload;
        }
        let encoded = state.encoded;
        let payload = encoded.payload(measure(frame)?)?;
        let Some(context) = state.context(encoded.context, frame.len()) else {
            return Err(Error::Full);
        };
        let Encoded { command, olinfo, .. } = encoded;
        let olinfo = olinfo | (context as u32) << olinfo::IDX_SHIFT | payload << olinfo::PAYLEN_SHIFT;
        let (ring, size) = (state.ring, state.size);
        let mut slots = Shadow::new(self.slots.as_mut(), size);
        for (i, segment) in frame.iter().enumerate() {
            let mut command = command | segment.len;
            if i + 1 == frame.len() {
                command |= command::EOP;
            }
            // SAFETY: `post` is an index of the ring, from its first value on.
            unsafe { ring.post(state.post, segment.addr, command, olinfo) };
            state.since.at = state.post as u16;
            state.last_command = command;
            state.post = after(state.post, size);
        }
        // SAFETY: `newest` is an index of the ring, from its first value on.
        unsafe { slots.at(state.newest) }.cookie = cookie;
        state.newest = after(state.newest, size);
        state.frames += 1;
        state.free -= frame.len();
        state.since.frames += 1;
        state.since.descriptors += frame.len() as u16;
        state.unpublished = true;
        if state.since.descriptors >= state.options.report_every {
            state.report(&mut slots);
        }
        Ok(())
    }

    /// Gives the device what was posted: one write of the tail, or none if there is nothing new.
    #[inline]
    pub fn publish(&mut self) {
        let state = &mut self.state;
        if !(state.unpublished && state.running) {
            return;
        }
        state.unpublished = false;
        if state.since.frames > 0 && state.options.report_last {
            state.report(&mut Shadow::new(self.slots.as_mut(), state.size));
        }
        state.ring.release();
        trace(Step::Tail);
        self.regs.write(self.tail, state.post as u32);
    }

    /// Takes up to `max` frames back that are sent, oldest first, by their cookies, and returns how many. To be called
    /// lazily: it reads one descriptor for each report.
    ///
    /// If `each` panics, the frame it was called with counts as handed out.
    #[inline]
    pub fn poll_each(&mut self, max: usize, mut each: impl FnMut(u64)) -> usize {
        let state = &mut self.state;
        let size = state.size;
        let mut slots = Shadow::new(self.slots.as_mut(), size);
        let mut taken = 0;
        while taken < max && (state.ready > 0 || state.next_report(&mut slots)) {
            let oldest = state.oldest;
            // Up to the queue's end, so that nothing wraps within.
            let limit = state.ready.min(max - taken).min(size - oldest);
            let mut run = Taking { state, count: 0 };
            while run.count < limit {
                // SAFETY: `limit` keeps it below the size.
                let cookie = unsafe { slots.at(oldest + run.count) }.cookie;
                run.count += 1;
                each(cookie);
            }
            taken += limit;
        }
        taken
    }

    /// Whether something is sent: [`TxQueue::poll_each`] would yield it.
    #[inline]
    pub fn has_done(&mut self) -> bool {
        let state = &mut self.state;
        state.ready > 0 || state.next_report(&mut Shadow::new(self.slots.as_mut(), state.size))
    }

    /// Hands back the cookie of every frame that is posted, oldest first, and brings the queue to its initial state.
    ///
    /// # Safety
    /// The device does not use the queue any more: it never ran, was stopped with success, reset or removed.
    pub unsafe fn detach_each(&mut self, mut each: impl FnMut(u64)) {
        let state = &mut self.state;
        let mut slots = Shadow::new(self.slots.as_mut(), state.size);
        state.running = false;
        // Should `each` panic, nothing comes the usual way any more.
        state.marks = 0;
        state.ready = 0;
        while state.frames > 0 {
            // SAFETY: `oldest` is an index of the ring.
            let cookie = unsafe { slots.at(state.oldest) }.cookie;
            state.oldest = after(state.oldest, state.size);
            state.frames -= 1;
            each(cookie);
        }
        clear(&state.ring, state.size);
        *state = State::new(state.ring, state.size, state.options, state.index);
    }
}

impl<R, S> TxQueue<R, S> {
    /// Whether a frame of `len` bytes can be sent as it is.
    #[inline(always)]
    pub const fn takes(len: u32) -> bool {
        takes(len)
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

    /// Free descriptors.
    #[inline]
    pub fn free(&self) -> u16 {
        self.state.free as u16
    }

    /// Frames that were posted and not taken back.
    #[inline]
    pub fn in_flight(&self) -> u16 {
        self.state.frames as u16
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

#[inline(always)]
const fn takes(len: u32) -> bool {
    len.wrapping_sub(MIN_FRAME as u32) <= (MAX_FRAME - MIN_FRAME) as u32
}

/// The bytes of a frame whose segments can be sent.
#[inline]
fn measure(frame: &[Segment]) -> Result<u64, Error> {
    if frame.is_empty() {
        return Err(Error::EmptySegment);
    }
    if frame.len() > MAX_SEGMENTS {
        return Err(Error::TooManySegments(frame.len()));
    }
    let mut sum = 0;
    for segment in frame {
        match segment.len {
            0 => return Err(Error::EmptySegment),
            1..=MAX_SEGMENT => sum += u64::from(segment.len),
            len => return Err(Error::SegmentLen(len)),
        }
    }
    Ok(sum)
}

impl State {
    #[inline(always)]
    fn has_loaded(&self, context: Context) -> bool {
        self.contexts.contains(&Some(context))
    }

    /// Which of the two has `context`, after loading it if none does; nothing if it does not fit before `descriptors` more.
    #[inline(always)]
    fn context(&mut self, context: Context, descriptors: usize) -> Option<usize> {
        let wanted = Some(context);
        let recent = if self.contexts[self.recent] == wanted {
            self.recent
        } else if self.contexts[self.recent ^ 1] == wanted {
            self.recent ^ 1
        } else {
            return self.load(context, descriptors);
        };
        if self.free < descriptors {
            return None;
        }
        self.recent = recent;
        Some(recent)
    }

    #[cold]
    fn load(&mut self, context: Context, descriptors: usize) -> Option<usize> {
        if self.free <= descriptors {
            return None;
        }
        let index = self.recent ^ 1;
        let Context {
            headers,
            kind,
            segments,
        } = context;
        // SAFETY: `post` is an index of the ring.
        unsafe {
            self.ring.post(
                self.post,
                headers.into(),
                kind,
                segments | (index as u32) << olinfo::IDX_SHIFT,
            );
        }
        self.post = after(self.post, self.size);
        self.free -= 1;
        self.since.descriptors += 1;
        self.contexts[index] = Some(context);
        self.recent = index;
        Some(index)
    }

    /// Has the device report the frame posted last, which it cannot have looked at: the tail does not say so yet.
    #[inline(always)]
    fn report(&mut self, slots: &mut Shadow<'_>) {
        // SAFETY: both are indices of the ring.
        unsafe {
            self.ring.amend(self.since.at.into(), self.last_command | command::RS);
            slots.at(self.next_mark).mark = self.since;
        }
        self.next_mark = after(self.next_mark, self.size);
        self.marks += 1;
        self.since = Mark::default();
    }

    /// Looks at the oldest mark; whether it is done.
    #[inline(always)]
    fn next_report(&mut self, slots: &mut Shadow<'_>) -> bool {
        if self.marks == 0 {
            return false;
        }
        // SAFETY: `first_mark` and what was entered as a mark are indices of the ring.
        let (mark, status) = unsafe {
            let mark = slots.at(self.first_mark).mark;
            (mark, self.ring.sent_status(mark.at.into()))
        };
        if status & olinfo::DD == 0 {
            return false;
        }
        self.ring.acquire();
        self.first_mark = after(self.first_mark, self.size);
        self.marks -= 1;
        self.ready = mark.frames.into();
        self.ready_descriptors = mark.descriptors.into();
        true
    }
}

/// A run of frames being posted, one descriptor each, entered when it ends: also when the caller's iterator panics.
struct Filling<'a> {
    state: &'a mut State,
    count: usize,
    last_len: u32,
}

impl Drop for Filling<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        let Self { state, count, last_len } = self;
        if *count > 0 {
            state.since.at = (state.post + *count - 1) as u16;
            state.since.frames += *count as u16;
            state.since.descriptors += *count as u16;
            state.last_command = PLAIN | *last_len;
            state.post = advance(state.post, *count, state.size);
            state.newest = advance(state.newest, *count, state.size);
            state.frames += *count;
            state.free -= *count;
            state.unpublished = true;
        }
    }
}

/// A run of frames being taken back, entered when it ends: also when the caller's closure panics, so that no cookie is
/// handed out twice.
struct Taking<'a> {
    state: &'a mut State,
    count: usize,
}

impl Drop for Taking<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        let state = &mut *self.state;
        state.oldest = advance(state.oldest, self.count, state.size);
        state.frames -= self.count;
        state.ready -= self.count;
        if state.ready == 0 {
            // Not before: as long as a cookie is there, so is its slot.
            state.free += state.ready_descriptors;
        }
    }
}
