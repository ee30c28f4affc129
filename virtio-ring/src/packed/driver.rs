//! The driver side of a packed ring: it makes buffers available and takes them back.

use crate::shared::packed::{Cursor, Desc, Event, Memory, Meta, Ring, check_size, wire};
use crate::shared::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, store_table_entry};
use crate::{Anomalies, Completion, Direction, Error, Options, Segment, Slot, Table};

/// The driver side. `S` is the private shadow, one [`Slot`] an entry: `&mut [Slot]`, `[Slot; N]`, `Box<[Slot]>`.
///
/// What the device side writes (used descriptors) is read once and checked against the shadow; it never causes a panic,
/// an access outside, or a cookie handed out twice. A used descriptor that names no chain in flight breaks the ring:
/// nobody could tell where the next one is.
///
/// With IN_ORDER, the ID of a chain is the position of its first descriptor. Without it, free IDs queue
/// first-in-first-out.
#[derive(Debug)]
pub struct Driver<S> {
    ring: Ring,
    slots: S,
    state: State,
}

/// Everything private but the slots: apart, so that a burst can borrow both.
#[derive(Debug)]
struct State {
    options: Options,
    size: u16,
    /// IN_ORDER: a chain of several descriptors may be in flight.
    chained: bool,
    /// Where the next descriptor goes, and where the next used one is awaited.
    avail: Cursor,
    used: Cursor,
    /// Free descriptors.
    free: u16,
    /// Chains in flight.
    in_flight: u16,
    /// Descriptors added and not published. The first of them waits for its second word, so that none is seen before.
    unpublished: u16,
    held: Cursor,
    held_meta: Meta,
    /// Descriptors published since a kick was last decided: more than the ring has where the ring was just taken over.
    unasked: u32,
    /// Not IN_ORDER: the entries of the queue of free IDs (it goes round the slots) to take from and to give to.
    take: u16,
    give: u16,
    /// IN_ORDER: chains of the device's batch that are not handed out yet, and the length of the last.
    batch: u16,
    last: Meta,
    /// What the device was told last.
    wish: Event,
    broken: bool,
    anomalies: Anomalies,
}

impl<S: AsMut<[Slot]>> Driver<S> {
    /// Takes a ring over and brings it to its initial state: both wrap counters 1, notifications wanted. The first
    /// [`Driver::needs_kick`] is true unless the device wants none at all.
    ///
    /// # Errors
    /// [`Error::PackedQueueSize`], [`Error::Misaligned`], [`Error::Slots`] if `slots` has fewer than `size`.
    ///
    /// # Safety
    /// The parts of `memory` are valid for reads and writes of [`Layout::desc_len`] and [`Layout::EVENT_LEN`] bytes for
    /// `size`, for as long as the driver lives or a device uses the ring: dropping the driver stops no device. In this
    /// process nothing accesses them but this driver and the device side, atomically. No device uses the ring during the
    /// call.
    ///
    /// [`Layout::desc_len`]: super::Layout::desc_len
    /// [`Layout::EVENT_LEN`]: super::Layout::EVENT_LEN
    pub unsafe fn new(memory: Memory, size: u16, options: Options, mut slots: S) -> Result<Self, Error> {
        let size = check_size(size)?;
        let given = slots.as_mut().len();
        if given < usize::from(size) {
            return Err(Error::Slots {
                needed: size.into(),
                given,
            });
        }
        // SAFETY: passed on.
        let ring = unsafe { Ring::new(memory, size)? };
        let mut driver = Self {
            ring,
            slots,
            state: State::new(size, options),
        };
        driver.reset();
        Ok(driver)
    }

    fn reset(&mut self) {
        let Self { ring, slots, state } = self;
        let size = ring.size();
        *state = State {
            anomalies: state.anomalies,
            ..State::new(size, state.options)
        };
        let mut cursor = state.avail;
        for i in 0..size {
            // All flags 0: neither available nor used in the first lap (§2.8.1).
            ring.store(cursor, Desc { addr: 0, meta: Meta(0) });
            cursor = cursor.next(size);
            if let Some(slot) = slots.as_mut().get_mut(usize::from(i)) {
                *slot = Slot {
                    free: i,
                    ..Slot::default()
                };
            }
        }
        ring.store_driver_event(Event::Enable);
        ring.store_device_event(Event::Enable);
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
        if chain.len() > usize::from(self.ring.size()) {
            return Err(Error::TooLong);
        }
        if chain.len() > usize::from(self.state.free) {
            return Err(Error::Full);
        }
        let descs = chain.iter().enumerate().map(|(i, segment)| {
            let next = if i + 1 == chain.len() { 0 } else { DESC_F_NEXT };
            let write = if i < readable { 0 } else { DESC_F_WRITE };
            (*segment, next | write)
        });
        let Self { ring, slots, state } = self;
        state.post(ring, slots.as_mut(), descs, cookie, writable);
        Ok(())
    }

    /// [`Driver::add`] by way of an indirect table (§2.8.7): the chain takes one descriptor of the ring.
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
        if chain.len() > usize::from(table.entries).min(self.ring.size().into()) {
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
            let flags = if i < readable { 0 } else { DESC_F_WRITE };
            let words = [segment.addr, Meta::new(segment.len, 0, flags).0];
            // SAFETY: `i` is below `table.entries`, all of which this function's contract makes writable; aligned to 16.
            unsafe { store_table_entry(table.ptr.as_ptr().add(i * size_of::<wire::Desc>()), words) };
        }
        let whole = Segment {
            addr: table.addr,
            len: (chain.len() * size_of::<wire::Desc>()) as u32,
        };
        let Self { ring, slots, state } = self;
        state.post(ring, slots.as_mut(), [(whole, DESC_F_INDIRECT)], cookie, writable);
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
    #[inline(always)]
    pub unsafe fn add_each<I>(&mut self, direction: Direction, buffers: I) -> usize
    where
        I: IntoIterator<Item = (Segment, u64)>,
    {
        let Self { ring, slots, state } = self;
        if state.broken {
            return 0;
        }
        let (buffers, slots) = (buffers.into_iter(), slots.as_mut());
        if state.options.in_order {
            state.add_ordered(ring.clone(), slots, direction, buffers)
        } else {
            state.add_named(ring.clone(), slots, direction, buffers)
        }
    }

    /// Shows the device all that was added, by one Release store of the first descriptor's flags (§2.8.21), and tells
    /// whether it wants to be notified: [`Driver::commit`] and [`Driver::needs_kick`].
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
        if state.unpublished != 0 {
            self.ring.publish(state.held, state.held_meta);
            state.unasked = state.unasked.saturating_add(state.unpublished.into());
            state.unpublished = 0;
        }
    }

    /// The second half of [`Driver::publish`]: does the device want a notification for what was committed since the
    /// last call?
    #[inline]
    pub fn needs_kick(&mut self) -> bool {
        let state = &mut self.state;
        let count = core::mem::take(&mut state.unasked);
        if count == 0 {
            return false;
        }
        // §2.8.21.3.1: a full barrier between the store of the flags and the load of what suppresses.
        self.ring.fence();
        let published = if state.unpublished == 0 {
            state.avail
        } else {
            state.held
        };
        self.ring.load_device_event().wants(published, count, self.ring.size())
    }

    /// Takes up to `max` completed chains back, in the order of the device's completions, and returns how many.
    ///
    /// Each completion is checked: a length above what was posted becomes 0, and is counted. If `each` panics, the chain
    /// it was called with counts as handed out.
    #[inline]
    pub fn poll_each(&mut self, max: usize, each: impl FnMut(Completion)) -> usize {
        let Self { ring, slots, state } = self;
        if state.options.in_order {
            state.poll_round(ring.clone(), slots.as_mut(), max, each)
        } else {
            state.poll_named(ring.clone(), slots.as_mut(), max, each)
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
        let slots = slots.as_mut();
        if state.options.in_order {
            while state.in_flight > 0
                && let Some(&Slot { cookie, count, .. }) = slots.get(state.used.position())
            {
                state.used = state.used.advance(count, ring.size());
                state.in_flight -= 1;
                each(cookie);
            }
        } else {
            for slot in slots.iter_mut().take(ring.size().into()) {
                if core::mem::take(&mut slot.count) != 0 {
                    state.in_flight = state.in_flight.saturating_sub(1);
                    each(slot.cookie);
                }
            }
        }
        self.reset();
    }
}

impl<S> Driver<S> {
    /// Asks for used-buffer notifications (calls) or not (§2.8.10). Returns true if completions are already there: then
    /// no notification will come for them, so poll instead of sleeping.
    #[inline]
    pub fn set_notify(&mut self, on: bool) -> bool {
        let Self { ring, state, .. } = self;
        let wish = match (on, state.options.event_idx) {
            (false, _) => Event::Disable,
            (true, false) => Event::Enable,
            (true, true) => Event::Desc(state.used.off_wrap()),
        };
        if wish != state.wish {
            ring.store_driver_event(wish);
            state.wish = wish;
        }
        if on {
            // Either the device sees the wish, or we see its descriptor.
            ring.fence();
        }
        state.batch != 0 || (state.published(ring.size()) != 0 && state.used.matches(ring.load_meta(state.used)))
    }

    /// Entries of the queue.
    #[inline]
    pub fn size(&self) -> u16 {
        self.ring.size()
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

    /// The device's used descriptors cannot be trusted any more: nothing is added or completed until
    /// [`Driver::detach_each`].
    #[inline]
    pub fn is_broken(&self) -> bool {
        self.state.broken
    }
}

impl State {
    fn new(size: u16, options: Options) -> Self {
        let (avail, used) = (Cursor::available(0, true, size), Cursor::used(0, true, size));
        Self {
            options,
            size,
            chained: false,
            avail,
            used,
            free: size,
            in_flight: 0,
            unpublished: 0,
            held: avail,
            held_meta: Meta(0),
            unasked: u32::from(size) + 1,
            take: 0,
            give: 0,
            batch: 0,
            last: Meta(0),
            wish: Event::Enable,
            broken: false,
            anomalies: Anomalies::default(),
        }
    }

    /// Descriptors that the device has, or had.
    #[inline(always)]
    fn published(&self, size: u16) -> u16 {
        size - self.free - self.unpublished
    }

    /// Writes a chain that fits.
    fn post(
        &mut self,
        ring: &Ring,
        slots: &mut [Slot],
        descs: impl IntoIterator<Item = (Segment, u16)>,
        cookie: u64,
        writable: u32,
    ) {
        let size = ring.size();
        let position = self.avail.position();
        let id = if self.options.in_order {
            position
        } else {
            let id = slots.get(usize::from(self.take)).map_or(0, |slot| slot.free.into());
            self.take = following(self.take, size);
            id
        };
        let mut count = 0;
        for (segment, flags) in descs {
            let meta = Meta::new(segment.len, id as u16, flags).at(self.avail);
            if self.unpublished == 0 {
                self.held = self.avail;
                self.held_meta = meta;
                ring.store_addr(self.avail, segment.addr);
            } else {
                ring.store(
                    self.avail,
                    Desc {
                        addr: segment.addr,
                        meta,
                    },
                );
            }
            self.avail = self.avail.next(size);
            self.unpublished += 1;
            self.free -= 1;
            count += 1;
        }
        self.chained |= count > 1;
        if let Some(slot) = slots.get_mut(id) {
            slot.cookie = cookie;
            slot.writable = writable;
            slot.count = count;
        }
        self.in_flight += 1;
    }

    /// IN_ORDER: the position is the ID.
    #[inline(always)]
    fn add_ordered<I>(&mut self, ring: Ring, slots: &mut [Slot], direction: Direction, mut buffers: I) -> usize
    where
        I: Iterator<Item = (Segment, u64)>,
    {
        let (flags, mask) = flags_and_mask(direction);
        let size = usize::from(ring.size());
        let slots = &mut slots[..size];
        let mut filling = Filling::new(self);
        if filling.room() == 0 {
            return 0;
        }
        if filling.state.unpublished == 0 {
            // The first waits for its second word.
            let Some((segment, cookie)) = buffers.next() else {
                return 0;
            };
            debug_assert_ne!(segment.len, 0, "a segment is empty");
            let at = filling.avail;
            let id = at.position();
            filling.state.held = at;
            filling.state.held_meta = Meta::new(segment.len, id as u16, flags).at(at);
            ring.store_addr(at, segment.addr);
            slots[id] = Slot::ordered(cookie, segment.len & mask);
            filling.avail = at.next(ring.size());
            filling.added = 1;
        }
        // Up to the end of the lap, and again from the beginning.
        for _ in 0..2 {
            let start = filling.avail;
            let most = filling.room().min(size - start.position());
            let places = ring.span(start, most).iter().zip(&mut slots[start.position()..]);
            let mut added = 0;
            for (((place, slot), word), (segment, cookie)) in places.zip(start.words()).zip(buffers.by_ref()) {
                debug_assert_ne!(segment.len, 0, "a segment is empty");
                place.store(Desc {
                    addr: segment.addr,
                    meta: word.with(segment.len, flags),
                });
                *slot = Slot::ordered(cookie, segment.len & mask);
                added += 1;
                filling.span = added;
            }
            filling.end_span(ring.size());
            if added < most {
                break;
            }
        }
        filling.added
    }

    /// Not IN_ORDER: IDs come from the queue of free ones.
    #[inline(always)]
    fn add_named<I>(&mut self, ring: Ring, slots: &mut [Slot], direction: Direction, buffers: I) -> usize
    where
        I: Iterator<Item = (Segment, u64)>,
    {
        let (flags, mask) = flags_and_mask(direction);
        let size = ring.size();
        // As many as positions, so that one check here serves for all.
        let slots = &mut slots[..usize::from(size)];
        let mut first = self.unpublished == 0;
        let mut filling = Filling::new(self);
        let room = filling.room();
        buffers.take(room).for_each(|(segment, cookie)| {
            debug_assert_ne!(segment.len, 0, "a segment is empty");
            let at = filling.avail;
            let id = slots[usize::from(filling.take)].free;
            filling.take = following(filling.take, size);
            let meta = Meta::new(segment.len, id, flags).at(at);
            if first {
                first = false;
                filling.state.held = at;
                filling.state.held_meta = meta;
                ring.store_addr(at, segment.addr);
            } else {
                ring.store(
                    at,
                    Desc {
                        addr: segment.addr,
                        meta,
                    },
                );
            }
            let slot = &mut slots[usize::from(id)];
            slot.cookie = cookie;
            slot.writable = segment.len & mask;
            slot.count = 1;
            filling.avail = at.next(size);
            filling.added += 1;
        });
        filling.added
    }

    /// IN_ORDER: the used descriptor of a batch names its last chain and lies where its first began; those before the
    /// last were used completely (§2.8.8). A device that marks every chain makes batches of one.
    #[inline(always)]
    fn poll_round(&mut self, ring: Ring, slots: &mut [Slot], max: usize, mut each: impl FnMut(Completion)) -> usize {
        if self.chained {
            let mut taken = 0;
            while taken < max
                && let Some(completion) = self.poll_chain(&ring, slots)
            {
                taken += 1;
                each(completion);
            }
            return taken;
        }
        // Every chain in flight is one descriptor, so that positions count chains.
        let size = ring.size();
        let slots = &slots[..usize::from(size)];
        let mut burst = Burst::new(self, size);
        loop {
            let start = burst.used;
            let room = usize::from(size) - start.position();
            let most = room.min(usize::from(burst.published)).min(max - burst.taken);
            if most == 0 {
                break;
            }
            // What the device marked one by one, up to the end of the lap.
            let mut odd = None;
            if burst.batch == 0 {
                let span = ring.span(start, most);
                let run = span.iter().zip(&slots[start.position()..]).zip(start.words());
                let n = run
                    .map(|((place, slot), word)| (place.load_meta(), word, slot.writable))
                    .position(|(meta, word, posted)| {
                        let plain = word.is_in(meta) && meta.len() <= posted;
                        if !plain {
                            odd = start.matches(meta).then_some(meta);
                        }
                        !plain
                    })
                    .unwrap_or(span.len());
                // Apart from the loop above: what was seen there holds here, and these loads wait for nothing.
                for (place, slot) in span[..n].iter().zip(&slots[start.position()..]) {
                    burst.run += 1;
                    each(Completion {
                        cookie: slot.cookie,
                        // The other side may have written it again.
                        len: place.load_meta_again().len().min(slot.writable),
                    });
                }
            }
            let ended = burst.batch == 0 && odd.is_none() && burst.run < most;
            burst.end_run(size);
            if ended {
                break;
            }
            if let Some(meta) = odd {
                let distance = usize::from(meta.id())
                    + if usize::from(meta.id()) < burst.used.position() {
                        usize::from(size)
                    } else {
                        0
                    }
                    - burst.used.position();
                if meta.id() >= size || distance >= usize::from(burst.published) {
                    burst.state.strange(meta.id(), size);
                    break;
                }
                burst.batch = distance as u16 + 1;
                burst.last = meta;
            }
            if burst.batch != 0 {
                // The chains of a batch, up to the end of the lap; its last one has the length.
                let start = burst.used.position();
                let n = usize::from(burst.batch)
                    .min(usize::from(size) - start)
                    .min(max - burst.taken);
                let last = n == usize::from(burst.batch);
                let run = &slots[start..start + n];
                for slot in &run[..n - usize::from(last)] {
                    burst.run += 1;
                    each(Completion {
                        cookie: slot.cookie,
                        len: slot.writable,
                    });
                }
                if let (true, Some(slot)) = (last, run.last()) {
                    burst.run += 1;
                    let len = burst.state.length(burst.last, slot.writable);
                    each(Completion {
                        cookie: slot.cookie,
                        len,
                    });
                }
                burst.end_run(size);
            }
        }
        burst.taken
    }

    /// [`State::poll_round`] where chains of several descriptors are in flight: one of them. Not generic, so that what the
    /// caller's closure refers to stays in registers where this is not called.
    #[inline(never)]
    fn poll_chain(&mut self, ring: &Ring, slots: &[Slot]) -> Option<Completion> {
        let size = ring.size();
        let slots = &slots[..usize::from(size)];
        let mut burst = Burst::new(self, size);
        if burst.batch == 0 {
            if burst.published == 0 {
                return None;
            }
            let meta = ring.load_meta(burst.used);
            if !burst.used.matches(meta) {
                return None;
            }
            burst.batch = burst.chains_to(slots, meta.id(), size);
            burst.last = meta;
            if burst.batch == 0 {
                burst.state.strange(meta.id(), size);
                return None;
            }
        }
        let Slot {
            cookie,
            writable: posted,
            count,
            ..
        } = slots[burst.used.position()];
        burst.batch -= 1;
        burst.retire(count, size);
        let len = if burst.batch == 0 {
            burst.state.length(burst.last, posted)
        } else {
            posted
        };
        Some(Completion { cookie, len })
    }

    /// Not IN_ORDER: each used descriptor names its chain.
    #[inline(always)]
    fn poll_named(&mut self, ring: Ring, slots: &mut [Slot], max: usize, mut each: impl FnMut(Completion)) -> usize {
        let size = ring.size();
        let slots = &mut slots[..usize::from(size)];
        let mut burst = Burst::new(self, size);
        while burst.taken < max && burst.published != 0 {
            let meta = ring.load_meta(burst.used);
            if !burst.used.matches(meta) {
                break;
            }
            let id = meta.id();
            let known = slots
                .get_mut(usize::from(id))
                .filter(|slot| (1..=burst.published).contains(&slot.count));
            let Some(slot) = known else {
                burst.state.strange(id, size);
                break;
            };
            let Slot {
                cookie,
                writable: posted,
                count,
                ..
            } = *slot;
            slot.count = 0;
            burst.retire(count, size);
            slots[usize::from(burst.give)].free = id;
            burst.give = following(burst.give, size);
            let len = burst.state.length(meta, posted);
            each(Completion { cookie, len });
        }
        burst.taken
    }

    /// What a used descriptor says was written, of `posted` bytes.
    #[inline(always)]
    fn length(&mut self, used: Meta, posted: u32) -> u32 {
        if used.len() <= posted {
            used.len()
        } else {
            self.lie(used)
        }
    }

    #[cold]
    fn lie(&mut self, used: Meta) -> u32 {
        // §2.8.4: without WRITE the length is reserved, and may be anything.
        if used.flags() & DESC_F_WRITE != 0 {
            self.anomalies.length += 1;
        }
        0
    }

    /// A used descriptor that names no chain in flight.
    #[cold]
    fn strange(&mut self, id: u16, size: u16) {
        self.broken = true;
        if id >= size {
            self.anomalies.id_out_of_range += 1;
        } else if self.options.in_order {
            self.anomalies.out_of_order += 1;
        } else {
            self.anomalies.id_not_in_flight += 1;
        }
    }
}

/// A descriptor's flags, and which bytes of it the device may write.
#[inline(always)]
fn flags_and_mask(direction: Direction) -> (u16, u32) {
    match direction {
        Direction::Readable => (0, 0),
        Direction::Writable => (DESC_F_WRITE, u32::MAX),
    }
}

/// The next entry of the queue of free IDs.
#[inline(always)]
fn following(entry: u16, size: u16) -> u16 {
    if entry + 1 == size { 0 } else { entry + 1 }
}

/// The progress of one burst of buffers, entered when it ends: also when the caller's iterator panics.
struct Filling<'a> {
    state: &'a mut State,
    avail: Cursor,
    take: u16,
    added: usize,
    /// Descriptors from `avail` on that were written, and are not in the counts yet.
    span: usize,
}

impl<'a> Filling<'a> {
    #[inline(always)]
    fn new(state: &'a mut State) -> Self {
        Self {
            avail: state.avail,
            take: state.take,
            added: 0,
            span: 0,
            state,
        }
    }

    /// Free descriptors.
    #[inline(always)]
    fn room(&self) -> usize {
        usize::from(self.state.free) - self.added
    }

    #[inline(always)]
    fn end_span(&mut self, size: u16) {
        let span = core::mem::take(&mut self.span);
        self.avail = self.avail.advance(span as u16, size);
        self.added += span;
    }
}

impl Drop for Filling<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        let size = self.state.size;
        self.end_span(size);
        let state = &mut *self.state;
        let added = self.added as u16;
        state.avail = self.avail;
        state.take = self.take;
        state.unpublished += added;
        state.free -= added;
        state.in_flight += added;
    }
}

/// The progress of one burst of completions, entered when it ends: also when the caller's closure panics, so that no
/// cookie is handed out twice.
struct Burst<'a> {
    state: &'a mut State,
    used: Cursor,
    /// Chains of one descriptor each from `used` on that were handed out, and are not in the counts below yet.
    run: usize,
    /// Descriptors that the device has, or had.
    published: u16,
    freed: u16,
    taken: usize,
    batch: u16,
    last: Meta,
    give: u16,
}

impl<'a> Burst<'a> {
    #[inline(always)]
    fn new(state: &'a mut State, size: u16) -> Self {
        Self {
            used: state.used,
            run: 0,
            // Nothing more is taken from a ring that is broken.
            published: if state.broken { 0 } else { state.published(size) },
            freed: 0,
            taken: 0,
            batch: if state.broken { 0 } else { state.batch },
            last: state.last,
            give: state.give,
            state,
        }
    }

    /// Takes the chain at the cursor, of `count` descriptors, out of flight.
    #[inline(always)]
    fn retire(&mut self, count: u16, size: u16) {
        self.used = if count == 1 {
            self.used.next(size)
        } else {
            self.used.advance(count, size)
        };
        self.published -= count;
        self.freed += count;
        self.taken += 1;
    }

    /// Takes what was handed out as a run out of flight.
    #[inline(always)]
    fn end_run(&mut self, size: u16) {
        let run = core::mem::take(&mut self.run);
        let count = run as u16;
        self.used = self.used.advance(count, size);
        self.published -= count;
        self.freed += count;
        self.taken += run;
        self.batch = self.batch.saturating_sub(count);
    }

    /// IN_ORDER: how many chains it is to the one that begins at `id`, itself included; 0 if none does.
    fn chains_to(&self, slots: &[Slot], id: u16, size: u16) -> u16 {
        let (mut cursor, mut left, mut chains) = (self.used, self.published, 0);
        while let Some(slot) = slots.get(cursor.position())
            && left != 0
        {
            chains += 1;
            if cursor.position() == usize::from(id) {
                return chains;
            }
            left = left.saturating_sub(slot.count);
            cursor = cursor.advance(slot.count, size);
        }
        0
    }
}

impl Drop for Burst<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        let size = self.state.size;
        self.end_run(size);
        let state = &mut *self.state;
        state.used = self.used;
        state.free += self.freed;
        state.in_flight -= self.taken as u16;
        state.batch = self.batch;
        state.last = self.last;
        state.give = self.give;
        // With nothing in flight, no chain is.
        state.chained &= state.in_flight != 0;
    }
}
