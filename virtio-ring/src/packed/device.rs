//! The device side of a packed ring: it takes what was made available and marks it used in place.

use super::Base;
use super::walk::{Walked, Wanted, is_single, is_writable, part_of, walk};
use crate::shared::DESC_F_WRITE;
use crate::shared::packed::{Cursor, Desc, Event, Memory, Meta, Ring, check_size};
#[cfg(not(loom))]
use crate::vectors::{GROUP, Pattern};
use crate::{Anomalies, Chain, Direction, Error, Head, Options, Part, Popped, Single, Translate, Vectors, Verdict};
use core::slice;

/// The device side. It keeps two cursors only.
///
/// What the driver side writes (descriptors, indirect tables) is read once and checked. A chain that cannot be used comes
/// out empty, with its [`Fault`](crate::Fault), and is counted; it is completed like any other, with length 0. More
/// descriptors available than the ring has break the ring: [`Error::Broken`] from then on.
///
/// Every chain that was popped is to be pushed, or given back by [`Device::undo`]. With IN_ORDER, chains are to be
/// pushed in the order in which they were popped.
#[derive(Debug)]
pub struct Device {
    ring: Ring,
    state: State,
}

#[derive(Debug)]
struct State {
    options: Options,
    /// Of the next chain to pop.
    avail: Cursor,
    /// Where the next used descriptor goes.
    used: Cursor,
    /// Descriptors, and chains, popped and not pushed.
    out: u16,
    chains: u16,
    /// Descriptors pushed and not published. The first of the used descriptors waits for it, so that none is seen before.
    unpublished: u16,
    held: Cursor,
    held_meta: Meta,
    /// Descriptors published since a call was last decided: more than the ring has if that cannot be told.
    unasked: u32,
    /// What the driver was told last.
    wish: Event,
    vectors: Vectors,
    broken: bool,
    anomalies: Anomalies,
}

impl Device {
    /// Takes the device side of a ring over. `base` is where to begin, from VHOST_USER_SET_VRING_BASE; [`Base::START`]
    /// for a new ring. What had been popped and not pushed is popped again.
    ///
    /// Kicks are wanted at first, whatever a device before this one said. The first [`Device::needs_call`] is true unless
    /// the driver wants none at all: a device that was lost may have used buffers and not said so.
    ///
    /// # Errors
    /// [`Error::PackedQueueSize`], [`Error::Misaligned`], [`Error::PackedBase`].
    ///
    /// # Safety
    /// The parts of `memory` are valid for reads and writes of [`Layout::desc_len`] and [`Layout::EVENT_LEN`] bytes for
    /// `size`, for as long as the device lives; in this process nothing accesses them but this device and the driver
    /// side, atomically. No other device side uses the ring.
    ///
    /// [`Layout::desc_len`]: super::Layout::desc_len
    /// [`Layout::EVENT_LEN`]: super::Layout::EVENT_LEN
    pub unsafe fn new(memory: Memory, size: u16, options: Options, base: Base) -> Result<Self, Error> {
        let size = check_size(size)?;
        let (avail, used) = base.cursors(size)?;
        // SAFETY: passed on.
        let ring = unsafe { Ring::new(memory, size)? };
        let state = State {
            options,
            avail,
            used,
            out: 0,
            chains: 0,
            unpublished: 0,
            held: used,
            held_meta: Meta(0),
            unasked: u32::from(size) + 1,
            wish: Event::Enable,
            vectors: Vectors::NONE,
            broken: false,
            anomalies: Anomalies::default(),
        };
        ring.store_device_event(state.wish);
        // Either the driver sees the wish, or we see its descriptor.
        ring.fence();
        Ok(Self { ring, state })
    }

    /// Has bursts use vector instructions.
    pub fn set_vectors(&mut self, vectors: Vectors) {
        self.state.vectors = vectors;
    }

    /// Whether chains wait.
    #[inline]
    pub fn has_available(&mut self) -> bool {
        let Self { ring, state } = self;
        !state.broken && state.avail.matches(ring.load_meta(state.avail))
    }

    /// Takes the next chain: reads its descriptors once, checks and translates them into `chain`. `None` if there is
    /// nothing. A chain that cannot be used comes empty, with [`Chain::fault`] set; push it with length 0.
    ///
    /// # Errors
    /// [`Error::Broken`] if the driver made more available than the ring has, now or before.
    #[inline]
    pub fn pop<T, S>(&mut self, translate: &T, chain: &mut Chain<S>) -> Result<Option<Head>, Error>
    where
        T: Translate,
        S: AsRef<[Part]> + AsMut<[Part]>,
    {
        let Self { ring, state } = self;
        if state.broken {
            return Err(Error::Broken);
        }
        let first = ring.load_meta(state.avail);
        if !state.avail.matches(first) {
            return Ok(None);
        }
        let most = state.free(ring.size());
        let indirect = state.options.indirect;
        let walked = if most == 0 {
            None
        } else {
            let addr = ring.load_addr(state.avail);
            let first = Desc { addr, meta: first };
            walk(ring, state.avail, first, most, indirect, translate, chain.storage())
        };
        let Some(Walked { head, shape }) = walked else {
            return Err(state.overrun());
        };
        if shape.is_err() {
            state.unusable();
        }
        chain.set(shape);
        state.avail = state.avail.advance(head.count, ring.size());
        state.out += head.count;
        state.chains += 1;
        Ok(Some(head))
    }

    /// The fast path: pops up to `max` chains and asks `each` what to do with them; `chain` is storage for those that
    /// have more than one segment. Returns how many were popped.
    ///
    /// With IN_ORDER, runs of chains that have nothing to write and are [`Verdict::Done`] are completed by one used
    /// descriptor (§2.8.8).
    ///
    /// # Errors
    /// [`Error::Broken`] if the driver made more available than the ring has, now or before. Chains popped by this call
    /// before that was found were handled and stay so.
    #[inline]
    pub fn pop_each<T, S>(
        &mut self,
        translate: &T,
        chain: &mut Chain<S>,
        max: usize,
        mut each: impl FnMut(Popped<'_>) -> Verdict,
    ) -> Result<usize, Error>
    where
        T: Translate,
        S: AsRef<[Part]> + AsMut<[Part]>,
    {
        let Self { ring, state } = self;
        if state.broken {
            return Err(Error::Broken);
        }
        // The driver cannot have made more available than this: of what is pushed it knows when that is published.
        let free = state.free(ring.size());
        if free == 0 {
            return if state.avail.matches(ring.load_meta(state.avail)) {
                Err(state.overrun())
            } else {
                Ok(0)
            };
        }
        let (indirect, in_order) = (state.options.indirect, state.options.in_order);
        let mut burst = Burst::new(ring.clone(), state);
        let mut most = max.min(free.into());
        while burst.popped < most {
            let at = burst.avail;
            let meta = burst.ring.load_meta(at);
            if !at.matches(meta) {
                break;
            }
            let addr = burst.ring.load_addr(at);
            let desc = Desc { addr, meta };
            if is_single(meta)
                && let Ok(part) = part_of(desc, translate)
            {
                let head = Head::new(meta.id());
                burst.avail = at.next(burst.ring.size());
                burst.popped += 1;
                let verdict = if is_writable(meta) {
                    let verdict = each(Popped {
                        head,
                        readable: &[],
                        writable: slice::from_ref(&part),
                        fault: None,
                    });
                    if let Verdict::Done(len) = verdict {
                        burst.push_one(head.index, len);
                    }
                    verdict
                } else {
                    let verdict = each(Popped {
                        head,
                        readable: slice::from_ref(&part),
                        writable: &[],
                        fault: None,
                    });
                    match verdict {
                        Verdict::Done(_) if in_order => {
                            burst.run += 1;
                            burst.last = head.index;
                        }
                        Verdict::Done(len) => burst.push_one(head.index, len),
                        _ => {}
                    }
                    verdict
                };
                if verdict == Verdict::Stop {
                    burst.avail = at;
                    burst.popped -= 1;
                    break;
                }
                continue;
            }
            let left = free - burst.taken();
            let Some(head) = follow(&burst.ring, at, desc, left, indirect, translate, chain) else {
                return Err(burst.state.overrun());
            };
            burst.take(head);
            most = most.min(max).min(burst.popped + usize::from(free - burst.taken()));
            let fault = chain.fault();
            if fault.is_some() {
                burst.state.unusable();
            }
            let verdict = each(Popped {
                head,
                readable: chain.readable(),
                writable: chain.writable(),
                fault,
            });
            match verdict {
                Verdict::Done(_) if in_order && fault.is_none() && chain.writable().is_empty() => burst.run_on(head),
                Verdict::Done(len) => burst.push(head, len),
                Verdict::Keep => {}
                Verdict::Stop => {
                    burst.untake(at, head);
                    break;
                }
            }
        }
        Ok(burst.popped)
    }

    /// The fast path of a burst, first half: looks at the chains that wait, as long as they are one descriptor each of the
    /// direction asked for, in good memory, and `singles` has room. They are not popped:
    /// [`Device::use_read`] and [`Device::use_written`] do that, with as many of them, from the first on, as the caller
    /// got done. Whatever else comes next is for [`Device::pop_each`].
    #[inline]
    pub fn peek_singles<T: Translate>(&mut self, translate: &T, direction: Direction, singles: &mut [Single]) -> usize {
        let Self { ring, state } = self;
        if state.broken {
            return 0;
        }
        let size = ring.size();
        let most = singles.len().min(state.free(size).into());
        let wanted = Wanted::new(direction);
        let singles = &mut singles[..most];
        let mut at = state.avail;
        let mut n = 0;
        while n < most {
            #[cfg(not(loom))]
            if state.vectors.peeks() && at.position().is_multiple_of(GROUP) && most - n >= GROUP {
                let done = peek_groups(ring, state.vectors, wanted, at, translate, &mut singles[n..]);
                at = at.advance(done as u16, size);
                n += done;
                if n == most {
                    break;
                }
            }
            let meta = ring.load_meta(at);
            if !wanted.matches(at, meta) {
                break;
            }
            let addr = ring.load_addr(at);
            let Ok(Part { ptr, len }) = part_of(Desc { addr, meta }, translate) else {
                break;
            };
            singles[n] = Single {
                ptr,
                len,
                id: meta.id(),
            };
            at = at.next(size);
            n += 1;
        }
        n
    }

    /// The second half for what the device has read: pops the chains that [`peek_singles`] returned and completes them;
    /// with IN_ORDER by one used descriptor for all (§2.8.8). Nothing may be popped in between. Returns how many that was: all,
    /// unless they are more than were waiting.
    ///
    /// [`peek_singles`]: Device::peek_singles
    #[inline]
    pub fn use_read(&mut self, singles: &[Single]) -> usize {
        let (n, in_order, mut burst) = self.popped(singles.len());
        match singles[..n].last() {
            Some(last) if in_order => {
                burst.run = n;
                burst.last = last.id;
            }
            _ => {
                for single in &singles[..n] {
                    burst.push_one(single.id, 0);
                }
            }
        }
        n
    }

    /// The second half for what the device wrote to: pops the chains that [`peek_singles`] returned and completes them,
    /// with `len` bytes written to each. Nothing may be popped in between. Returns how many that was: all, unless they
    /// are more than were waiting.
    ///
    /// [`peek_singles`]: Device::peek_singles
    #[inline]
    pub fn use_written(&mut self, singles: &[Single]) -> usize {
        let (n, _, mut burst) = self.popped(singles.len());
        if let Some((first, others)) = singles[..n].split_first() {
            // This one may have to wait until it is published. Those behind it do not.
            burst.push_one(first.id, first.len);
            let mut others = others;
            while let Some((single, rest)) = others.split_first() {
                #[cfg(not(loom))]
                if burst.state.vectors.marks() && burst.used.position().is_multiple_of(GROUP) && others.len() >= GROUP {
                    let done = burst.mark_groups(others);
                    others = &others[done..];
                    if done != 0 {
                        continue;
                    }
                }
                burst.push_next(single.id, single.len);
                others = rest;
            }
        }
        n
    }

    /// Pops `n` chains of one descriptor each, or as many as there may be.
    #[inline(always)]
    fn popped(&mut self, n: usize) -> (usize, bool, Burst<'_>) {
        let Self { ring, state } = self;
        let size = ring.size();
        let n = n.min(state.free(size).into());
        let in_order = state.options.in_order;
        state.avail = state.avail.advance(n as u16, size);
        let mut burst = Burst::new(ring.clone(), state);
        burst.popped = n;
        (n, in_order, burst)
    }

    /// Gives the chain popped last back, which was not pushed: it will be popped again. For several, the last first.
    /// Without a chain outstanding nothing happens, and the answer is false.
    #[inline]
    pub fn undo(&mut self, last: Head) -> bool {
        let state = &mut self.state;
        if state.chains == 0 {
            return false;
        }
        let count = last.count.min(state.out);
        state.avail = state.avail.retreat(count, self.ring.size());
        state.out -= count;
        state.chains -= 1;
        true
    }

    /// Completes a chain, with `len` bytes written to its writable parts from the first on. The driver sees it after
    /// [`Device::publish`]. Without a chain outstanding (a head pushed twice) nothing happens.
    #[inline]
    pub fn push(&mut self, head: Head, len: u32) {
        debug_assert_ne!(self.state.chains, 0, "pushed more than popped");
        if let Some(head) = head.within(self.state.out) {
            Burst::new(self.ring.clone(), &mut self.state).push(head, len);
        }
    }

    /// Completes chains that have nothing to write, in the order popped: with IN_ORDER by one used descriptor (§2.8.8).
    #[inline]
    pub fn push_batch(&mut self, heads: &[Head]) {
        debug_assert!(heads.len() <= usize::from(self.state.chains), "pushed more than popped");
        let heads = &heads[..heads.len().min(self.state.chains.into())];
        let in_order = self.state.options.in_order;
        let mut left = self.state.out;
        let mut burst = Burst::new(self.ring.clone(), &mut self.state);
        for head in heads {
            let Some(head) = head.within(left) else { break };
            left -= head.count;
            if in_order {
                burst.run_on(head);
            } else {
                burst.push(head, 0);
            }
        }
    }

    /// Shows the driver all that was pushed, by one Release store of the first descriptor's flags, and tells whether it
    /// wants to be notified (§2.8.22): [`Device::commit`] and [`Device::needs_call`].
    #[inline]
    pub fn publish(&mut self) -> bool {
        self.commit();
        self.needs_call()
    }

    /// The first half of [`Device::publish`]: no fence, and no look at the driver's cache line. Whoever uses it owes a
    /// [`Device::needs_call`] before it sleeps.
    #[inline]
    pub fn commit(&mut self) {
        let state = &mut self.state;
        if state.unpublished != 0 {
            self.ring.publish(state.held, state.held_meta);
            state.unasked = state.unasked.saturating_add(state.unpublished.into());
            state.unpublished = 0;
        }
    }

    /// The second half of [`Device::publish`]: does the driver want a notification for what was committed since the
    /// last call?
    #[inline]
    pub fn needs_call(&mut self) -> bool {
        let state = &mut self.state;
        let count = core::mem::take(&mut state.unasked);
        if count == 0 {
            return false;
        }
        // §2.8.22: a full barrier between the store of the flags and the load of what suppresses.
        self.ring.fence();
        let published = if state.unpublished == 0 { state.used } else { state.held };
        self.ring.load_driver_event().wants(published, count, self.ring.size())
    }

    /// Asks for available-buffer notifications (kicks) or not (§2.8.10). Returns true if chains already wait: then no
    /// notification will come for them, so go on instead of sleeping.
    #[inline]
    pub fn set_notify(&mut self, on: bool) -> bool {
        let state = &mut self.state;
        let wish = match (on, state.options.event_idx) {
            (false, _) => Event::Disable,
            (true, false) => Event::Enable,
            (true, true) => Event::Desc(state.avail.off_wrap()),
        };
        if wish != state.wish {
            self.ring.store_device_event(wish);
            state.wish = wish;
        }
        if on {
            // Either the driver sees the wish, or we see its descriptor.
            self.ring.fence();
        }
        self.has_available()
    }

    /// Where it stands: what VHOST_USER_GET_VRING_BASE returns. What is outstanding will be popped again by whoever
    /// begins there.
    #[inline]
    pub fn base(&self) -> Base {
        Base {
            available: self.state.avail.off_wrap(),
            used: self.state.used.off_wrap(),
        }
    }

    /// Chains popped and not pushed.
    #[inline]
    pub fn outstanding(&self) -> u16 {
        self.state.chains
    }

    /// Entries of the queue.
    #[inline]
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// What the driver did wrong so far.
    #[inline]
    pub fn anomalies(&self) -> Anomalies {
        self.state.anomalies
    }

    /// The driver's descriptors cannot be trusted any more: nothing is popped any more.
    #[inline]
    pub fn is_broken(&self) -> bool {
        self.state.broken
    }
}

impl Head {
    /// The same, if there are descriptors outstanding, and of no more than these: a head that is not of this ring.
    #[inline(always)]
    fn within(self, out: u16) -> Option<Self> {
        let count = self.count.min(out);
        (count != 0).then_some(Self { count, ..self })
    }
}

impl State {
    /// Descriptors that the driver may have made available.
    #[inline(always)]
    fn free(&self, size: u16) -> u16 {
        // What is pushed and not published is not the driver's yet.
        size.saturating_sub(self.out).saturating_sub(self.unpublished)
    }

    #[cold]
    fn overrun(&mut self) -> Error {
        self.broken = true;
        self.anomalies.index_jump += 1;
        Error::Broken
    }

    #[cold]
    fn unusable(&mut self) {
        self.anomalies.chain += 1;
    }
}

/// [`Device::peek_singles`] for as many whole groups as are simple and in the region of the first; how many descriptors.
#[cfg(not(loom))]
#[inline(always)]
fn peek_groups<T: Translate>(
    ring: &Ring,
    vectors: Vectors,
    wanted: Wanted,
    at: Cursor,
    translate: &T,
    singles: &mut [Single],
) -> usize {
    let Some(window) = translate.window(ring.load_addr(at)) else {
        return 0;
    };
    let theirs = window.theirs;
    let pattern = Pattern {
        mask: Wanted::MASK,
        word: wanted.word(at),
        theirs,
        // Addresses are not negative anywhere; a larger region is one of which the lower half is used here.
        len: window.len.min(i64::MAX as u64),
        delta: (window.ours.as_ptr() as u64).wrapping_sub(theirs),
    };
    let (src, most) = ring.run(at, singles.len());
    // SAFETY: descriptors up to the end of the lap, and as many singles. What comes out are pointers into the window,
    // which are not null, lengths and IDs.
    let groups = unsafe { vectors.peek(src, singles.as_mut_ptr().cast(), most / GROUP, &pattern) };
    // What was read is not read again, and nothing that follows was read before.
    core::sync::atomic::compiler_fence(core::sync::atomic::Ordering::Acquire);
    groups * GROUP
}

/// §2.8.3: of a used descriptor's flags, WRITE says that the length means something.
#[inline(always)]
const fn written(len: u32) -> u16 {
    if len == 0 { 0 } else { DESC_F_WRITE }
}

/// The slow path, into `chain`: a chain of several descriptors, or one that is in several regions or cannot be used.
#[inline(never)]
fn follow<T, S>(
    ring: &Ring,
    at: Cursor,
    first: Desc,
    most: u16,
    indirect: bool,
    translate: &T,
    chain: &mut Chain<S>,
) -> Option<Head>
where
    T: Translate,
    S: AsRef<[Part]> + AsMut<[Part]>,
{
    let Walked { head, shape } = walk(ring, at, first, most, indirect, translate, chain.storage())?;
    chain.set(shape);
    Some(head)
}

/// The progress of one burst, entered when it ends: also when the caller's closure panics, which leaves the chain that
/// it was called with popped and not pushed.
struct Burst<'a> {
    ring: Ring,
    state: &'a mut State,
    avail: Cursor,
    /// Where the next used descriptor goes, or, in a run, the one that completes it.
    used: Cursor,
    /// No used descriptor waits to be published: the next one will.
    first: bool,
    /// Chains popped, and pushed, by this burst.
    popped: usize,
    pushed: usize,
    /// The descriptors that those have beyond one each.
    more_popped: u16,
    more_pushed: u16,
    /// IN_ORDER: chains, and descriptors beyond one each, that wait for the one used descriptor that completes them all,
    /// which names the last.
    run: usize,
    more_run: u16,
    last: u16,
}

impl<'a> Burst<'a> {
    #[inline(always)]
    fn new(ring: Ring, state: &'a mut State) -> Self {
        Self {
            ring,
            avail: state.avail,
            used: state.used,
            first: state.unpublished == 0,
            popped: 0,
            pushed: 0,
            more_popped: 0,
            more_pushed: 0,
            run: 0,
            more_run: 0,
            last: 0,
            state,
        }
    }

    /// Descriptors popped.
    fn taken(&self) -> u16 {
        self.popped as u16 + self.more_popped
    }

    fn take(&mut self, head: Head) {
        self.avail = self.avail.advance(head.count, self.ring.size());
        self.popped += 1;
        self.more_popped += head.count - 1;
    }

    fn untake(&mut self, at: Cursor, head: Head) {
        self.avail = at;
        self.popped -= 1;
        self.more_popped -= head.count - 1;
    }

    /// A used descriptor, of a chain or of a run.
    #[inline(always)]
    fn write(&mut self, len: u32, id: u16) {
        let meta = Meta::new(len, id, written(len)).at(self.used);
        if self.first {
            self.first = false;
            self.state.held = self.used;
            self.state.held_meta = meta;
        } else {
            self.ring.store_meta(self.used, meta);
        }
    }

    /// A chain of one descriptor.
    #[inline(always)]
    fn push_one(&mut self, id: u16, len: u32) {
        if self.run != 0 {
            self.end_run();
        }
        self.write(len, id);
        self.used = self.used.next(self.ring.size());
        self.pushed += 1;
    }

    /// A chain of one descriptor, behind another one that was just pushed.
    #[inline(always)]
    fn push_next(&mut self, id: u16, len: u32) {
        let meta = Meta::new(len, id, written(len)).at(self.used);
        self.ring.store_meta(self.used, meta);
        self.used = self.used.next(self.ring.size());
        self.pushed += 1;
    }

    /// [`Burst::push_next`] for as many of `singles` as vectors do; how many.
    #[cfg(not(loom))]
    #[inline(always)]
    fn mark_groups(&mut self, singles: &[Single]) -> usize {
        let (dst, most) = self.ring.run(self.used, singles.len());
        let flags = Meta::new(0, 0, DESC_F_WRITE).at(self.used).0;
        let src = singles.as_ptr().cast();
        // SAFETY: `most` singles, and descriptors up to the end of the lap. None of these is looked at before the one held
        // back, or one before it, is published.
        let groups = unsafe { self.state.vectors.mark(src, dst, most / GROUP, flags) };
        let done = groups * GROUP;
        self.used = self.used.advance(done as u16, self.ring.size());
        self.pushed += done;
        done
    }

    fn push(&mut self, head: Head, len: u32) {
        self.end_run();
        // Nobody looks at the further descriptors of the chain but `recover`: they say that they are done with, the last
        // one first, so that the second says it for all.
        for further in (1..head.count).rev() {
            let at = self.used.advance(further, self.ring.size());
            self.ring.store_meta(at, Meta::new(0, head.index, 0).at(at));
        }
        self.write(len, head.index);
        self.used = self.used.advance(head.count, self.ring.size());
        self.pushed += 1;
        self.more_pushed += head.count - 1;
    }

    #[inline(always)]
    fn run_on(&mut self, head: Head) {
        self.last = head.index;
        self.run += 1;
        self.more_run += head.count - 1;
    }

    #[inline(always)]
    fn end_run(&mut self) {
        if self.run != 0 {
            self.write(0, self.last);
            self.used = self.used.advance(self.run as u16 + self.more_run, self.ring.size());
            self.pushed += self.run;
            self.more_pushed += self.more_run;
            self.run = 0;
            self.more_run = 0;
        }
    }
}

impl Drop for Burst<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        self.end_run();
        let (popped, pushed) = (self.popped as u16, self.pushed as u16);
        let (taken, given) = (popped + self.more_popped, pushed + self.more_pushed);
        let state = &mut *self.state;
        state.avail = self.avail;
        state.used = self.used;
        state.out = (state.out + taken).saturating_sub(given);
        state.chains = (state.chains + popped).saturating_sub(pushed);
        state.unpublished += given;
    }
}
