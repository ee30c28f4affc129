//! The driver side of a split ring: it makes buffers available and takes them back.

mod state;

use super::event_passed;
use crate::shared::{
    AVAIL_F_NO_INTERRUPT, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Desc, Memory, Ring, USED_F_NO_NOTIFY, check_size,
    store_table_entry, wire,
};
use crate::{Anomalies, Completion, Direction, Error, Options, Segment, Slot, Table};
use state::{Shadow, State, cookie_of};

/// The driver side. `S` is the private shadow, one [`Slot`] an entry: `&mut [Slot]`, `[Slot; N]`, `Box<[Slot]>`.
///
/// What the device side writes (the used ring) is read once, checked against the shadow and counted in
/// [`Driver::anomalies`] if it cannot be; it never causes a panic, an access outside, or a cookie handed out twice.
///
/// With IN_ORDER, descriptors are taken round the table and `avail.ring[i] = i`, written once, never changes as long as
/// every chain is a single descriptor. Without it, free descriptors queue first-in-first-out, which comes to the same
/// for a device that happens to work in order.
#[derive(Debug)]
pub struct Driver<S> {
    ring: Ring,
    slots: S,
    state: State,
}

impl<S: AsMut<[Slot]>> Driver<S> {
    /// Takes a ring over and brings it to its initial state: both indices 0, notifications wanted. The first
    /// [`Driver::needs_kick`] is true unless the device wants none at all.
    ///
    /// # Errors
    /// [`Error::QueueSize`], [`Error::Misaligned`], [`Error::Slots`] if `slots` has fewer than `size`.
    ///
    /// # Safety
    /// The parts of `memory` are valid for reads and writes of [`Layout::desc_len`], [`Layout::avail_len`] and
    /// [`Layout::used_len`] bytes for `size`, for as long as the driver lives or a device uses the ring: dropping the driver
    /// stops no device. In this process nothing accesses them but this driver and the device side, atomically. No device
    /// uses the ring during the call.
    ///
    /// [`Layout::desc_len`]: super::Layout::desc_len
    /// [`Layout::avail_len`]: super::Layout::avail_len
    /// [`Layout::used_len`]: super::Layout::used_len
    pub unsafe fn new(memory: Memory, size: u16, options: Options, slots: S) -> Result<Self, Error> {
        // SAFETY: passed on.
        unsafe { Self::starting_at(memory, size, options, slots, 0) }
    }

    /// [`Driver::new`] with both indices at `index`: for tests of their wrap. A device must start there too.
    ///
    /// # Errors
    /// As [`Driver::new`].
    ///
    /// # Safety
    /// As [`Driver::new`].
    #[doc(hidden)]
    pub unsafe fn starting_at(
        memory: Memory,
        size: u16,
        options: Options,
        mut slots: S,
        index: u16,
    ) -> Result<Self, Error> {
        let size = check_size(size)?;
        let given = slots.as_mut().len();
        if given < usize::from(size) {
            return Err(Error::Slots {
                needed: usize::from(size),
                given,
            });
        }
        // SAFETY: passed on.
        let ring = unsafe { Ring::new(memory, size)? };
        let mut driver = Self {
            ring,
            slots,
            state: State::new(size - 1, options, index),
        };
        driver.reset(index);
        Ok(driver)
    }

    fn reset(&mut self, index: u16) {
        let Self { ring, slots, state } = self;
        let anomalies = state.anomalies;
        *state = State {
            anomalies,
            ..State::new(state.mask, state.options, index)
        };
        let mut slots = Shadow::new(slots.as_mut(), ring);
        for i in 0..=state.mask {
            *slots.at(usize::from(i)) = Slot {
                cookie: 0,
                writable: 0,
                free: i,
                count: 0,
            };
            ring.store_avail_entry(usize::from(i), i);
        }
        ring.store_avail_flags(0);
        ring.store_used_flags(0);
        if state.options.event_idx {
            ring.store_used_event(index);
            ring.store_avail_event(index);
        }
        ring.store_used_idx(index);
        ring.store_avail_idx(index);
    }

    /// Makes one chain available: the first `readable` of its segments for the device to read, the rest for it to write
    /// (mergeable receive into a chain, transmit of several segments). The device sees it after [`Driver::publish`].
    ///
    /// # Errors
    /// [`Error::Full`] if fewer descriptors are free than the chain has segments; [`Error::EmptySegment`],
    /// [`Error::TooLong`], [`Error::Broken`]. Nothing was changed then.
    ///
    /// # Safety
    /// From the time that the device can see the chain until it comes back by [`Driver::poll_each`], or no device uses the
    /// ring any more, the device may read and write what the segments name: all of it is memory that is meant for that,
    /// stays valid, and is not used otherwise. Dropping the driver or forgetting it does not end that.
    pub unsafe fn add(&mut self, chain: &[Segment], readable: usize, cookie: u64) -> Result<(), Error> {
        let writable = self.check(chain, readable)?;
        if chain.len() > usize::from(self.state.mask) + 1 {
            return Err(Error::TooLong);
        }
        if chain.len() > usize::from(self.state.free) {
            return Err(Error::Full);
        }
        let Self { ring, slots, state } = self;
        let mut slots = Shadow::new(slots.as_mut(), ring);
        let head = state.following(&mut slots);
        let mut holder = head;
        for (i, segment) in chain.iter().enumerate() {
            let id = state.take(&mut slots);
            let last = i + 1 == chain.len();
            let next = if last { 0 } else { state.following(&mut slots) };
            let flags = if i < readable { 0 } else { DESC_F_WRITE } | if last { 0 } else { DESC_F_NEXT };
            ring.store_desc(usize::from(id), Desc::new(segment.addr, segment.len, flags, next));
            if !state.options.in_order {
                slots.at(usize::from(holder)).cookie = id.into();
                holder = id;
            }
        }
        slots.at(usize::from(holder)).cookie = cookie;
        state.post(ring, &mut slots, head, chain.len() as u16, writable);
        Ok(())
    }

    /// [`Driver::add`] by way of an indirect table (§2.7.5.3): the chain takes one descriptor of the ring.
    ///
    /// # Errors
    /// As [`Driver::add`], with [`Error::TooLong`] if the table or the queue has fewer entries than the chain segments;
    /// [`Error::NotNegotiated`] and [`Error::Misaligned`].
    ///
    /// # Safety
    /// As [`Driver::add`]. `table.ptr` is valid for writes of `16 * table.entries` bytes during the call, and nothing else
    /// uses that memory as long as the device may use the chain.
    pub unsafe fn add_indirect(
        &mut self,
        table: Table,
        chain: &[Segment],
        readable: usize,
        cookie: u64,
    ) -> Result<(), Error> {
        if !self.state.options.indirect {
            return Err(Error::NotNegotiated);
        }
        let writable = self.check(chain, readable)?;
        if chain.len() > usize::from(table.entries).min(usize::from(self.state.mask) + 1) {
            return Err(Error::TooLong);
        }
        let (address, align) = (table.ptr.as_ptr() as usize, core::mem::align_of::<wire::Desc>());
        if !address.is_multiple_of(align) {
            return Err(Error::Misaligned { address, align });
        }
        if self.state.free == 0 {
            return Err(Error::Full);
        }
        for (i, segment) in chain.iter().enumerate() {
            let last = i + 1 == chain.len();
            let flags = if i < readable { 0 } else { DESC_F_WRITE } | if last { 0 } else { DESC_F_NEXT };
            // In sequence, as IN_ORDER demands and everybody likes (§2.7.5.3).
            let next = if last { 0 } else { i as u16 + 1 };
            let desc = Desc::new(segment.addr, segment.len, flags, next);
            // SAFETY: `i` is below `table.entries`, all of which this function's contract makes writable; aligned to 16.
            unsafe { store_table_entry(table.ptr.as_ptr().add(i * size_of::<wire::Desc>()), desc.words()) };
        }
        let Self { ring, slots, state } = self;
        let mut slots = Shadow::new(slots.as_mut(), ring);
        let head = state.take(&mut slots);
        let bytes = (chain.len() * size_of::<wire::Desc>()) as u32;
        ring.store_desc(usize::from(head), Desc::new(table.addr, bytes, DESC_F_INDIRECT, 0));
        slots.at(usize::from(head)).cookie = cookie;
        state.post(ring, &mut slots, head, 1, writable);
        Ok(())
    }

    /// Checks a chain; returns its bytes for writing.
    fn check(&self, chain: &[Segment], readable: usize) -> Result<u32, Error> {
        if self.state.broken {
            return Err(Error::Broken);
        }
        crate::segment::check(chain, readable)
    }

    /// The fast path: makes a burst of single-segment buffers available, as many as there are free descriptors, and
    /// returns how many. An item that does not fit is not taken from the iterator. No segment may be empty (a device
    /// refuses that). The device sees them after [`Driver::publish`].
    ///
    /// # Safety
    /// From the time that the device can see a buffer until it comes back by [`Driver::poll_each`], or no device uses the
    /// ring any more, the device may read and write what its segment names: all of it is memory that is meant for that,
    /// stays valid, and is not used otherwise. Dropping the driver or forgetting it does not end that.
    #[inline]
    pub unsafe fn add_each<I>(&mut self, direction: Direction, buffers: I) -> usize
    where
        I: IntoIterator<Item = (Segment, u64)>,
    {
        let buffers = buffers.into_iter();
        let Self { ring, slots, state } = self;
        if state.broken {
            return 0;
        }
        let slots = Shadow::new(slots.as_mut(), ring);
        if !state.options.in_order {
            state.add_linked(ring.clone(), slots, direction, buffers)
        } else if state.identity && (state.cursor ^ state.avail) & state.mask == 0 {
            state.add_round::<true, _>(ring.clone(), slots, direction, buffers)
        } else {
            state.add_round::<false, _>(ring.clone(), slots, direction, buffers)
        }
    }

    /// Shows the device all that was added, by one Release store of the index (§2.7.13.3), and tells whether it wants
    /// to be notified (§2.7.13.4): [`Driver::commit`] and [`Driver::needs_kick`].
    #[inline]
    pub fn publish(&mut self) -> bool {
        self.commit();
        self.needs_kick()
    }

    /// The first half of [`Driver::publish`]: no fence, and no look at the device's cache line. Whoever uses it owes a
    /// [`Driver::needs_kick`] before it sleeps.
    #[inline]
    pub fn commit(&mut self) {
        let state = &mut self.state;
        if state.avail != state.published {
            self.ring.store_avail_idx(state.avail);
            state.published = state.avail;
            state.overdue |= state.published.wrapping_sub(state.asked) >= 1 << 15;
        }
    }

    /// The second half of [`Driver::publish`]: does the device want a notification for what was committed since the
    /// last call?
    #[inline]
    pub fn needs_kick(&mut self) -> bool {
        let state = &mut self.state;
        let old = core::mem::replace(&mut state.asked, state.published);
        if old == state.published && !state.overdue {
            return false;
        }
        // §2.7.13.4.1: a full barrier between the store of idx and the load of what suppresses.
        self.ring.fence();
        if state.options.event_idx {
            core::mem::take(&mut state.overdue) || event_passed(self.ring.load_avail_event(), state.published, old)
        } else {
            state.overdue = false;
            self.ring.load_used_flags() & USED_F_NO_NOTIFY == 0
        }
    }

    /// Takes up to `max` completed chains back, oldest first, and returns how many. The device's index is read only
    /// when all that is known of has been taken.
    ///
    /// Each completion is checked: an id that is out of range or not in flight is dropped, a length above what was
    /// posted becomes 0, and both are counted. If `each` panics, the chain it was called with counts as handed out.
    #[inline]
    pub fn poll_each(&mut self, max: usize, each: impl FnMut(Completion)) -> usize {
        let Self { ring, slots, state } = self;
        let pending = state.pending(ring);
        let count = usize::from(pending).min(max);
        if count == 0 {
            return 0;
        }
        let slots = Shadow::new(slots.as_mut(), ring);
        if !state.options.in_order {
            state.poll_linked(ring.clone(), slots, count, each)
        } else if !state.elements {
            state.poll_skim(slots, count, each)
        } else if state.skim > 0 {
            let count = count.min(usize::from(state.skim));
            state.skim -= count as u16;
            state.poll_skim(slots, count, each)
        } else {
            state.poll_round(ring.clone(), slots, count, each)
        }
    }

    /// Hands back the cookie of every chain in flight and brings the ring to its initial state, as [`Driver::new`] did:
    /// for a device that is gone, before another one comes or the driver is dropped. With IN_ORDER oldest first. Anomalies
    /// stay counted.
    ///
    /// # Safety
    /// No device uses the ring, or the buffers in flight, any more: it is disconnected, or reset and done.
    pub unsafe fn detach_each(&mut self, mut each: impl FnMut(u64)) {
        let Self { ring, slots, state } = self;
        let mut slots = Shadow::new(slots.as_mut(), ring);
        if state.options.in_order {
            while state.in_flight > 0 {
                let Slot { cookie, count, .. } = *slots.at(usize::from(state.tail));
                state.tail = state.tail.wrapping_add(count);
                state.in_flight -= 1;
                each(cookie);
            }
        } else {
            for i in 0..=usize::from(state.mask) {
                let count = core::mem::take(&mut slots.at(i).count);
                if count != 0 {
                    state.in_flight = state.in_flight.saturating_sub(1);
                    each(cookie_of(&mut slots, i, count));
                }
            }
        }
        self.reset(0);
    }
}

impl<S> Driver<S> {
    /// Asks for used-buffer notifications (calls) or not (§2.7.7). Returns true if completions are already there: then
    /// no notification will come for them, so poll instead of sleeping.
    #[inline]
    pub fn set_notify(&mut self, on: bool) -> bool {
        let state = &mut self.state;
        if state.options.event_idx {
            // There is no "never": an index that was just passed is 65535 completions away.
            self.ring
                .store_used_event(if on { state.used } else { state.used.wrapping_sub(1) });
        } else {
            self.ring.store_avail_flags(if on { 0 } else { AVAIL_F_NO_INTERRUPT });
        }
        if on {
            // Either the device sees the wish, or we see its index.
            self.ring.fence();
            state.seen != state.used || self.ring.load_used_idx() != state.used
        } else {
            state.seen != state.used
        }
    }

    /// Entries of the queue.
    #[inline]
    pub fn size(&self) -> u16 {
        self.state.mask + 1
    }

    /// Free descriptors.
    #[inline]
    pub fn free(&self) -> u16 {
        self.state.free
    }

    /// Chains in flight: added and not yet taken back, published or not.
    #[inline]
    pub fn in_flight(&self) -> u16 {
        self.state.in_flight
    }

    /// What the device did wrong so far.
    #[inline]
    pub fn anomalies(&self) -> Anomalies {
        self.state.anomalies
    }

    /// The device's index cannot be trusted any more: nothing is added or completed until [`Driver::detach_each`].
    #[inline]
    pub fn is_broken(&self) -> bool {
        self.state.broken
    }
}
