//! The private state of a driver, and its bursts.

use crate::shared::{DESC_F_WRITE, Desc, Ring};
use crate::{Anomalies, Completion, Direction, Options, Segment, Slot};

/// Everything private but the slots: apart, so that a burst can borrow both.
#[derive(Debug)]
pub(super) struct State {
    pub(super) options: Options,
    pub(super) mask: u16,
    /// IN_ORDER: the next descriptor to take. Else: the entry of the queue of free ones that names it.
    pub(super) cursor: u16,
    /// IN_ORDER: the first descriptor of the oldest chain in flight. Else: where the next one that is freed will queue.
    pub(super) tail: u16,
    /// Free descriptors.
    pub(super) free: u16,
    /// Chains in flight.
    pub(super) in_flight: u16,
    /// The available index with all that was added, as the device sees it, and as it was when a kick was last decided.
    pub(super) avail: u16,
    pub(super) published: u16,
    pub(super) asked: u16,
    /// More was published without asking than an index can tell, or the ring was just taken over.
    pub(super) overdue: bool,
    /// Completions consumed, and known to exist.
    pub(super) used: u16,
    pub(super) seen: u16,
    /// Every `avail.ring[i]` holds `i`.
    pub(super) identity: bool,
    /// IN_ORDER: something device-writable was posted, so that used elements say something (lengths).
    pub(super) elements: bool,
    /// IN_ORDER: completions of the time before `elements`, to be taken without looking at their elements.
    pub(super) skim: u16,
    /// IN_ORDER: the device's batch being handed out: its last chain and that one's length.
    pub(super) batch: Option<(u32, u32)>,
    pub(super) broken: bool,
    pub(super) anomalies: Anomalies,
}

/// The slots of one burst. Invariant: exactly `mask + 1` slots.
pub(super) struct Shadow<'a> {
    slots: &'a mut [Slot],
    mask: usize,
}

impl<'a> Shadow<'a> {
    /// Panics if the caller's `AsMut` gives fewer slots than it did to [`Driver::new`].
    #[inline(always)]
    pub(super) fn new(slots: &'a mut [Slot], ring: &Ring) -> Self {
        // The ring's own mask, so that one masked index serves both.
        let mask = ring.mask();
        Self {
            slots: &mut slots[..=mask],
            mask,
        }
    }

    #[inline(always)]
    pub(super) fn at(&mut self, i: usize) -> &mut Slot {
        // SAFETY: masked, so below `mask + 1`, the length by this type's invariant.
        unsafe { self.slots.get_unchecked_mut(i & self.mask) }
    }
}

impl State {
    pub(super) fn new(mask: u16, options: Options, index: u16) -> Self {
        Self {
            options,
            mask,
            // Nothing is in flight, and all descriptors are queued as free, in the order of the table.
            cursor: 0,
            tail: 0,
            free: mask + 1,
            in_flight: 0,
            avail: index,
            published: index,
            asked: index,
            overdue: true,
            used: index,
            seen: index,
            identity: true,
            elements: false,
            skim: 0,
            batch: None,
            broken: false,
            anomalies: Anomalies::default(),
        }
    }

    /// The free descriptor that [`State::take`] takes next.
    #[inline(always)]
    pub(super) fn following(&self, slots: &mut Shadow<'_>) -> u16 {
        if self.options.in_order {
            self.cursor & self.mask
        } else {
            slots.at(usize::from(self.cursor)).free
        }
    }

    /// Takes a free descriptor. There is one.
    #[inline(always)]
    pub(super) fn take(&mut self, slots: &mut Shadow<'_>) -> u16 {
        let id = self.following(slots);
        self.cursor = self.cursor.wrapping_add(1);
        id
    }

    /// Enters a chain, whose descriptors are taken and written, into the available ring and the shadow.
    pub(super) fn post(&mut self, ring: &Ring, slots: &mut Shadow<'_>, head: u16, count: u16, writable: u32) {
        let slot = slots.at(usize::from(head));
        slot.writable = writable;
        slot.count = count;
        enter(ring, usize::from(self.avail), usize::from(head));
        self.identity &= (self.avail ^ head) & self.mask == 0;
        self.posted(count, 1, writable > 0);
    }

    #[inline(always)]
    fn posted(&mut self, descriptors: u16, chains: u16, writable: bool) {
        if writable && !self.elements {
            self.elements = true;
            // Batches end where an index was published (§2.7.9), so the elements up to here need not be read.
            self.skim = self.seen.wrapping_sub(self.used);
        }
        self.free -= descriptors;
        self.in_flight += chains;
        self.avail = self.avail.wrapping_add(chains);
    }

    /// IN_ORDER: descriptors round the table. `ALIGNED`: each lies at its own position of the available ring already.
    #[inline(always)]
    pub(super) fn add_round<const ALIGNED: bool, I>(
        &mut self,
        ring: Ring,
        mut slots: Shadow<'_>,
        direction: Direction,
        buffers: I,
    ) -> usize
    where
        I: Iterator<Item = (Segment, u64)>,
    {
        let (flags, mask) = wording(direction);
        let (avail, free, cursor) = (
            usize::from(self.avail),
            usize::from(self.free),
            usize::from(self.cursor),
        );
        let mut filling = Filling {
            state: self,
            added: 0,
            scattered: 0,
            writable: mask != 0,
        };
        buffers.take(free).for_each(|(segment, cookie)| {
            debug_assert_ne!(segment.len, 0, "a segment is empty");
            let id = (cursor + filling.added) & ring.mask();
            let desc = Desc::new(segment.addr, segment.len, flags, 0);
            if mask != 0 {
                // Buffers to receive into often come back to where they were.
                ring.update_desc(id, desc);
            } else {
                ring.store_desc(id, desc);
            }
            *slots.at(id) = Slot {
                cookie,
                writable: segment.len & mask,
                free: 0,
                count: 1,
            };
            if !ALIGNED {
                enter(&ring, avail + filling.added, id);
                filling.scattered |= (avail + filling.added) ^ id;
            }
            filling.added += 1;
        });
        filling.added
    }

    /// Not IN_ORDER: descriptors from the list of free ones.
    #[inline(always)]
    pub(super) fn add_linked<I>(&mut self, ring: Ring, mut slots: Shadow<'_>, direction: Direction, buffers: I) -> usize
    where
        I: Iterator<Item = (Segment, u64)>,
    {
        let (flags, mask) = wording(direction);
        let (avail, free, cursor) = (
            usize::from(self.avail),
            usize::from(self.free),
            usize::from(self.cursor),
        );
        let mut filling = Filling {
            state: self,
            added: 0,
            scattered: 0,
            writable: mask != 0,
        };
        buffers.take(free).for_each(|(segment, cookie)| {
            debug_assert_ne!(segment.len, 0, "a segment is empty");
            let id = usize::from(slots.at(cursor + filling.added).free) & ring.mask();
            ring.store_desc(id, Desc::new(segment.addr, segment.len, flags, 0));
            let slot = slots.at(id);
            slot.cookie = cookie;
            slot.writable = segment.len & mask;
            slot.count = 1;
            enter(&ring, avail + filling.added, id);
            filling.added += 1;
        });
        filling.added
    }

    /// How many completions are known of; looks at the index if none.
    #[inline(always)]
    pub(super) fn pending(&mut self, ring: &Ring) -> u16 {
        let known = self.seen.wrapping_sub(self.used);
        if known != 0 {
            return known;
        }
        let idx = ring.load_used_idx();
        let moved = idx.wrapping_sub(self.used);
        if moved == 0 {
            return 0;
        }
        // The device can complete what was published, and nothing else.
        if self.broken || moved > self.published.wrapping_sub(self.used) {
            self.index_jump();
            return 0;
        }
        self.seen = idx;
        moved
    }

    #[cold]
    fn index_jump(&mut self) {
        if !self.broken {
            self.broken = true;
            self.anomalies.index_jump += 1;
        }
    }

    /// IN_ORDER, nothing device-writable: the index alone says all (§2.7.9), the used elements stay unread.
    #[inline(always)]
    pub(super) fn poll_skim(&mut self, mut slots: Shadow<'_>, count: usize, mut each: impl FnMut(Completion)) -> usize {
        let mut burst = Burst::new(self);
        while burst.positions < count {
            let (cookie, _) = burst.retire_oldest(&mut slots);
            each(Completion { cookie, len: 0 });
        }
        count
    }

    /// IN_ORDER with lengths: the used element of a batch names its last chain and lies at the position of its first;
    /// those before the last were used completely (§2.7.9). A device that writes every element makes batches of one.
    #[inline(always)]
    pub(super) fn poll_round(
        &mut self,
        ring: Ring,
        mut slots: Shadow<'_>,
        count: usize,
        mut each: impl FnMut(Completion),
    ) -> usize {
        let used = usize::from(self.used);
        let mut burst = Burst::new(self);
        while burst.positions < count {
            let oldest = burst.tail & ring.mask();
            let (last, len) = match burst.batch {
                None => ring.load_element(used + burst.positions),
                Some(batch) => batch,
            };
            let len = if last as usize == oldest {
                burst.batch = None;
                Some(len)
            } else if burst.batch.is_some() || burst.state.is_batch(&mut slots, oldest, burst.positions, last) {
                burst.batch = Some((last, len));
                None
            } else {
                break;
            };
            let (cookie, posted) = burst.retire_oldest(&mut slots);
            let len = match len {
                Some(len) if len > posted => burst.state.lie(),
                Some(len) => len,
                None => posted,
            };
            each(Completion { cookie, len });
        }
        burst.chains
    }

    /// Not IN_ORDER: each element names its chain.
    #[inline(always)]
    pub(super) fn poll_linked(
        &mut self,
        ring: Ring,
        mut slots: Shadow<'_>,
        count: usize,
        mut each: impl FnMut(Completion),
    ) -> usize {
        let used = usize::from(self.used);
        let mut burst = Burst::new(self);
        while burst.positions < count {
            let (id, len) = ring.load_element(used + burst.positions);
            burst.positions += 1;
            let id = id as usize;
            if id > ring.mask() {
                burst.state.unknown_id();
                continue;
            }
            let slot = slots.at(id);
            let Slot {
                cookie,
                writable: posted,
                count: descriptors,
                ..
            } = *slot;
            if descriptors == 0 {
                burst.state.idle_id();
                continue;
            }
            slot.count = 0;
            slots.at(burst.tail).free = id as u16;
            burst.tail += usize::from(descriptors);
            burst.chains += 1;
            let cookie = if descriptors == 1 {
                cookie
            } else {
                free_rest(&mut slots, burst.tail, id, descriptors)
            };
            let len = if len > posted { burst.state.lie() } else { len };
            each(Completion { cookie, len });
        }
        burst.chains
    }

    /// IN_ORDER: is `id` one of the chains completed now, behind the oldest? Then all up to it are a batch.
    #[cold]
    fn is_batch(&mut self, slots: &mut Shadow<'_>, oldest: usize, taken: usize, id: u32) -> bool {
        let completed = usize::from(self.seen.wrapping_sub(self.used)) - taken;
        let mut head = oldest;
        for _ in 0..completed {
            if id as usize == head {
                return true;
            }
            head = (head + usize::from(slots.at(head).count)) & slots.mask;
        }
        self.anomalies.out_of_order += 1;
        self.broken = true;
        false
    }

    #[cold]
    fn unknown_id(&mut self) {
        self.anomalies.id_out_of_range += 1;
    }

    #[cold]
    fn idle_id(&mut self) {
        self.anomalies.id_not_in_flight += 1;
    }

    #[cold]
    fn lie(&mut self) -> u32 {
        self.anomalies.length += 1;
        0
    }
}

/// The flags of a descriptor, and what of its length may be written.
#[inline(always)]
fn wording(direction: Direction) -> (u16, u32) {
    match direction {
        Direction::Readable => (0, 0),
        Direction::Writable => (DESC_F_WRITE, u32::MAX),
    }
}

/// `avail.ring[position] = head`, unless it says so already: an unchanged line stays in both caches.
#[inline(always)]
fn enter(ring: &Ring, position: usize, head: usize) {
    // What is read back here decides about this store alone: whoever forges it harms its own ring.
    if usize::from(ring.load_avail_entry(position)) != head {
        ring.store_avail_entry(position, head as u16);
    }
}

/// Not IN_ORDER: queues the descriptors of a chain behind its head as free, up to the entry before `end`; its cookie.
#[cold]
fn free_rest(slots: &mut Shadow<'_>, end: usize, head: usize, count: u16) -> u64 {
    let mut cookie = slots.at(head).cookie;
    for left in (1..usize::from(count)).rev() {
        let id = cookie as u16;
        slots.at(end - left).free = id;
        cookie = slots.at(usize::from(id)).cookie;
    }
    cookie
}

/// Not IN_ORDER: the cookie of a chain, from its last descriptor.
pub(super) fn cookie_of(slots: &mut Shadow<'_>, head: usize, count: u16) -> u64 {
    (1..count).fold(slots.at(head).cookie, |id, _| slots.at(usize::from(id as u16)).cookie)
}

/// The progress of one burst of buffers, entered when it ends: also when the caller's iterator panics.
struct Filling<'a> {
    state: &'a mut State,
    added: usize,
    /// Not 0 under the mask if a head went to another position than its own.
    scattered: usize,
    writable: bool,
}

impl Drop for Filling<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        let state = &mut *self.state;
        let added = self.added as u16;
        state.cursor = state.cursor.wrapping_add(added);
        state.identity &= self.scattered as u16 & state.mask == 0;
        state.posted(added, added, self.writable && added > 0);
    }
}

/// The progress of one burst of completions, entered when it ends: also when the caller's closure panics, so that no
/// cookie is handed out twice.
struct Burst<'a> {
    state: &'a mut State,
    /// As the state's, but not wrapped: what it moves by is the descriptors freed.
    tail: usize,
    chains: usize,
    positions: usize,
    batch: Option<(u32, u32)>,
}

impl<'a> Burst<'a> {
    #[inline(always)]
    fn new(state: &'a mut State) -> Self {
        let (tail, batch) = (usize::from(state.tail), state.batch);
        Self {
            state,
            tail,
            chains: 0,
            positions: 0,
            batch,
        }
    }

    /// IN_ORDER: takes the oldest chain out of flight; its cookie, and its bytes posted for writing.
    #[inline(always)]
    fn retire_oldest(&mut self, slots: &mut Shadow<'_>) -> (u64, u32) {
        let Slot {
            cookie,
            writable,
            count,
            ..
        } = *slots.at(self.tail);
        self.tail += usize::from(count);
        self.positions += 1;
        self.chains += 1;
        (cookie, writable)
    }
}

impl Drop for Burst<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        let state = &mut *self.state;
        state.free += (self.tail as u16).wrapping_sub(state.tail);
        state.tail = self.tail as u16;
        state.batch = self.batch;
        state.in_flight -= self.chains as u16;
        state.used = state.used.wrapping_add(self.positions as u16);
        if state.broken {
            // Nothing that the index announced is taken any more.
            state.seen = state.used;
        }
    }
}
