//! The device side of a split ring: it takes what was made available and gives it back used.

use super::event_passed;
use super::walk::{Rules, is_single, is_writable, part_of, walk};
use crate::segment::Shape;
use crate::shared::{
    AVAIL_F_NO_INTERRUPT, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Desc, Memory, Ring, USED_F_NO_NOTIFY, check_size,
};
use crate::{Anomalies, Chain, Direction, Error, Head, Options, Part, Popped, Single, Translate, Verdict};
use core::slice;

/// The device side. It keeps indices only.
///
/// What the driver side writes (descriptors, indirect tables, the available ring) is read once and checked. A chain that
/// cannot be used comes out empty, with its [`Fault`](crate::Fault), and is counted; it is completed like any other, with length 0. A
/// head outside the table, and an index that jumps, break the ring: [`Error::Broken`] from then on.
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
    mask: u16,
    /// Chains taken, and known to exist.
    popped: u16,
    seen: u16,
    /// The used index with all that was pushed, as the driver sees it, and as it was when a call was last decided.
    pushed: u16,
    published: u16,
    asked: u16,
    /// More was published without asking than an index can tell, or whoever had the ring before may not have asked.
    overdue: bool,
    broken: bool,
    anomalies: Anomalies,
}

impl Device {
    /// Takes the device side of a ring over. `base` is the available index to begin at, from VHOST_USER_SET_VRING_BASE;
    /// 0 for a new ring. `used.idx` is taken from memory.
    ///
    /// Kicks are wanted at first, whatever a device before this one said. The first [`Device::needs_call`] is true unless
    /// the driver wants none at all: a device that was lost may have used buffers and not said so.
    ///
    /// # Errors
    /// [`Error::QueueSize`], [`Error::Misaligned`]; [`Error::Base`] if `base` is not 0 to `size` ahead of `used.idx`.
    ///
    /// # Safety
    /// The parts of `memory` are valid for reads and writes of [`Layout::desc_len`], [`Layout::avail_len`] and
    /// [`Layout::used_len`] bytes for `size`, for as long as the device lives; in this process nothing accesses them but
    /// this device and the driver side, atomically. No other device side uses the ring.
    ///
    /// [`Layout::desc_len`]: super::Layout::desc_len
    /// [`Layout::avail_len`]: super::Layout::avail_len
    /// [`Layout::used_len`]: super::Layout::used_len
    pub unsafe fn new(memory: Memory, size: u16, options: Options, base: u16) -> Result<Self, Error> {
        let size = check_size(size)?;
        // SAFETY: passed on.
        let ring = unsafe { Ring::new(memory, size)? };
        let used = ring.load_used_idx();
        if base.wrapping_sub(used) > size {
            return Err(Error::Base { base, used });
        }
        let state = State {
            options,
            mask: size - 1,
            popped: base,
            seen: base,
            pushed: used,
            published: used,
            asked: used,
            overdue: true,
            broken: false,
            anomalies: Anomalies::default(),
        };
        let mut device = Self { ring, state };
        device.set_notify(true);
        Ok(device)
    }

    /// Whether chains wait. The driver's index is read only when all that is known of has been popped.
    #[inline]
    pub fn has_available(&mut self) -> bool {
        self.state.available(&self.ring) != 0
    }

    /// Takes the next chain: reads its descriptors once, checks and translates them into `chain`. `None` if there is
    /// nothing. A chain that cannot be used comes empty, with [`Chain::fault`] set; push it with length 0.
    ///
    /// # Errors
    /// [`Error::Broken`] if the driver's index jumped or it named a head outside the table, now or before.
    #[inline]
    pub fn pop<T, S>(&mut self, translate: &T, chain: &mut Chain<S>) -> Result<Option<Head>, Error>
    where
        T: Translate,
        S: AsRef<[Part]> + AsMut<[Part]>,
    {
        let Self { ring, state } = self;
        if state.available(ring) == 0 {
            return if state.broken { Err(Error::Broken) } else { Ok(None) };
        }
        let head = state.head(ring, usize::from(state.popped))?;
        let first = ring.load_desc(usize::from(head.index));
        let parts = chain.storage();
        let lone = is_single(first).then(|| part_of(first, translate));
        let walked = match (parts.first_mut(), lone) {
            (Some(part), Some(Ok(only))) => {
                *part = only;
                Ok(Shape {
                    count: 1,
                    readable: usize::from(!is_writable(first)),
                })
            }
            _ => walk(ring, state.rules(), first, translate, parts),
        };
        if walked.is_err() {
            state.unusable();
        }
        chain.set(walked);
        state.popped = state.popped.wrapping_add(1);
        Ok(Some(head))
    }

    /// The fast path: pops up to `max` chains and asks `each` what to do with them; `chain` is storage for those that
    /// have more than one segment. Returns how many were popped. The driver's index is read only when nothing is known.
    ///
    /// With IN_ORDER, runs of chains that have nothing to write and are [`Verdict::Done`] are completed by one used
    /// element (§2.7.9).
    ///
    /// # Errors
    /// [`Error::Broken`] if the driver's index jumped or it named a head outside the table, now or before. Chains popped
    /// by this call before that was found were handled and stay so.
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
        let count = usize::from(state.available(ring)).min(max);
        if count == 0 {
            return if state.broken { Err(Error::Broken) } else { Ok(0) };
        }
        let (rules, mask, first) = (state.rules(), state.mask, usize::from(state.popped));
        let batches = state.options.in_order;
        let mut burst = Burst::new(ring.clone(), state);
        while burst.popped < count {
            let head = burst.ring.load_avail_entry(first + burst.popped);
            if head > mask {
                return Err(burst.state.nameless());
            }
            let head = Head::new(head);
            let desc = burst.ring.load_desc(usize::from(head.index));
            burst.popped += 1;
            // What may be skipped in the used ring: chains that surely have nothing to write.
            let (verdict, skip) = if is_single(desc)
                && let Ok(part) = part_of(desc, translate)
            {
                let (part, writable) = (slice::from_ref(&part), is_writable(desc));
                let (readable, writable) = if writable { (&[][..], part) } else { (part, &[][..]) };
                (
                    each(Popped {
                        head,
                        readable,
                        writable,
                        fault: None,
                    }),
                    writable.is_empty(),
                )
            } else {
                follow(&burst.ring, rules, desc, translate, chain);
                let (readable, writable, fault) = (chain.readable(), chain.writable(), chain.fault());
                if fault.is_some() {
                    burst.state.unusable();
                }
                (
                    each(Popped {
                        head,
                        readable,
                        writable,
                        fault,
                    }),
                    writable.is_empty() && fault.is_none(),
                )
            };
            match verdict {
                Verdict::Done(_) if batches && skip => {
                    burst.last = head;
                    burst.run += 1;
                    burst.pushed += 1;
                }
                Verdict::Done(len) => {
                    burst.end_run();
                    burst.push(head, len);
                }
                Verdict::Keep => {}
                Verdict::Stop => {
                    burst.popped -= 1;
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
        let most = singles.len().min(state.available(ring).into());
        let first = usize::from(state.popped);
        let flags = match direction {
            Direction::Readable => 0,
            Direction::Writable => DESC_F_WRITE,
        };
        let mut n = 0;
        for single in &mut singles[..most] {
            let head = ring.load_avail_entry(first.wrapping_add(n));
            let desc = ring.load_desc(usize::from(head));
            if head > state.mask || desc.flags() & (DESC_F_NEXT | DESC_F_INDIRECT | DESC_F_WRITE) != flags {
                break;
            }
            let Ok(Part { ptr, len }) = part_of(desc, translate) else {
                break;
            };
            *single = Single { ptr, len, id: head };
            n += 1;
        }
        n
    }

    /// The second half for what the device has read: pops the chains that [`peek_singles`] returned and completes them;
    /// with IN_ORDER by one used element for all (§2.7.9). Nothing may be popped in between. Returns how many that was: all,
    /// unless they are more than were waiting.
    ///
    /// [`peek_singles`]: Device::peek_singles
    #[inline]
    pub fn use_read(&mut self, singles: &[Single]) -> usize {
        let Self { ring, state } = self;
        let n = singles.len().min(state.seen.wrapping_sub(state.popped).into());
        let in_order = state.options.in_order;
        let mut burst = Burst::new(ring.clone(), state);
        burst.popped = n;
        match singles[..n].last() {
            Some(last) if in_order => {
                burst.run = n;
                burst.last = Head::new(last.id);
                burst.pushed += n;
            }
            _ => {
                for single in &singles[..n] {
                    burst.push(Head::new(single.id), 0);
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
        let Self { ring, state } = self;
        let n = singles.len().min(state.seen.wrapping_sub(state.popped).into());
        let mut burst = Burst::new(ring.clone(), state);
        burst.popped = n;
        for single in &singles[..n] {
            burst.push(Head::new(single.id), single.len);
        }
        n
    }

    /// Gives the chain popped last back, which was not pushed: it will be popped again. For several, the last first.
    /// Without a chain outstanding nothing happens, and the answer is false.
    #[inline]
    pub fn undo(&mut self, _last: Head) -> bool {
        let any = self.outstanding() != 0;
        self.state.popped = self.state.popped.wrapping_sub(any.into());
        any
    }

    /// Completes a chain, with `len` bytes written to its writable parts from the first on. The driver sees it after
    /// [`Device::publish`]. Without a chain outstanding (a head pushed twice) nothing happens.
    #[inline]
    pub fn push(&mut self, head: Head, len: u32) {
        let state = &mut self.state;
        debug_assert_ne!(state.popped, state.pushed, "pushed more than popped");
        if state.popped != state.pushed {
            self.ring
                .store_element(usize::from(state.pushed), u32::from(head.index), len);
            state.pushed = state.pushed.wrapping_add(1);
        }
    }

    /// Completes chains that have nothing to write, in the order popped: with IN_ORDER by one used element (§2.7.9).
    #[inline]
    pub fn push_batch(&mut self, heads: &[Head]) {
        let outstanding = usize::from(self.outstanding());
        debug_assert!(heads.len() <= outstanding, "pushed more than popped");
        let heads = &heads[..heads.len().min(outstanding)];
        if self.state.options.in_order {
            if let Some(last) = heads.last() {
                self.ring
                    .store_element(usize::from(self.state.pushed), u32::from(last.index), 0);
                self.state.pushed = self.state.pushed.wrapping_add(heads.len() as u16);
            }
        } else {
            for head in heads {
                self.push(*head, 0);
            }
        }
    }

    /// Shows the driver all that was pushed, by one Release store of the index (§2.7.8), and tells whether it wants to
    /// be notified (§2.7.7.2): [`Device::commit`] and [`Device::needs_call`].
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
        if state.pushed != state.published {
            self.ring.store_used_idx(state.pushed);
            state.published = state.pushed;
            state.overdue |= state.published.wrapping_sub(state.asked) >= 1 << 15;
        }
    }

    /// The second half of [`Device::publish`]: does the driver want a notification for what was committed since the
    /// last call?
    #[inline]
    pub fn needs_call(&mut self) -> bool {
        let state = &mut self.state;
        let old = core::mem::replace(&mut state.asked, state.published);
        if old == state.published && !state.overdue {
            return false;
        }
        // §2.7.7.2: a full barrier between the store of idx and the load of what suppresses.
        self.ring.fence();
        if state.options.event_idx {
            core::mem::take(&mut state.overdue) || event_passed(self.ring.load_used_event(), state.published, old)
        } else {
            state.overdue = false;
            self.ring.load_avail_flags() & AVAIL_F_NO_INTERRUPT == 0
        }
    }

    /// Asks for available-buffer notifications (kicks) or not (§2.7.10). Returns true if chains already wait: then no
    /// notification will come for them, so go on instead of sleeping.
    #[inline]
    pub fn set_notify(&mut self, on: bool) -> bool {
        let state = &mut self.state;
        if state.options.event_idx {
            // There is no "never": an index that was just passed is 65535 chains away.
            self.ring
                .store_avail_event(if on { state.popped } else { state.popped.wrapping_sub(1) });
        } else {
            self.ring.store_used_flags(if on { 0 } else { USED_F_NO_NOTIFY });
        }
        if on {
            // Either the driver sees the wish, or we see its index.
            self.ring.fence();
            state.seen != state.popped || self.ring.load_avail_idx() != state.popped
        } else {
            state.seen != state.popped
        }
    }

    /// The available index of the next chain to pop: what VHOST_USER_GET_VRING_BASE returns, once nothing is
    /// outstanding.
    #[inline]
    pub fn base(&self) -> u16 {
        self.state.popped
    }

    /// Chains popped and not pushed.
    #[inline]
    pub fn outstanding(&self) -> u16 {
        self.state.popped.wrapping_sub(self.state.pushed)
    }

    /// Entries of the queue.
    #[inline]
    pub fn size(&self) -> u16 {
        self.state.mask + 1
    }

    /// What the driver did wrong so far.
    #[inline]
    pub fn anomalies(&self) -> Anomalies {
        self.state.anomalies
    }

    /// The driver's index or heads cannot be trusted any more: nothing is popped any more.
    #[inline]
    pub fn is_broken(&self) -> bool {
        self.state.broken
    }
}

impl State {
    #[inline(always)]
    fn rules(&self) -> Rules {
        Rules {
            size: self.mask + 1,
            indirect: self.options.indirect,
        }
    }

    #[inline(always)]
    fn available(&mut self, ring: &Ring) -> u16 {
        if self.broken {
            return 0;
        }
        let known = self.seen.wrapping_sub(self.popped);
        if known != 0 {
            return known;
        }
        let idx = ring.load_avail_idx();
        let moved = idx.wrapping_sub(self.popped);
        if moved == 0 {
            return 0;
        }
        // The driver has as many descriptors as the queue has entries, and those outstanding are in use.
        let outstanding = u32::from(self.popped.wrapping_sub(self.pushed));
        if u32::from(moved) + outstanding > u32::from(self.mask) + 1 {
            self.index_jump();
            return 0;
        }
        self.seen = idx;
        moved
    }

    #[cold]
    fn index_jump(&mut self) {
        self.broken = true;
        self.anomalies.index_jump += 1;
    }

    #[inline(always)]
    fn head(&mut self, ring: &Ring, position: usize) -> Result<Head, Error> {
        let head = ring.load_avail_entry(position);
        if head > self.mask {
            Err(self.nameless())
        } else {
            Ok(Head::new(head))
        }
    }

    #[cold]
    fn nameless(&mut self) -> Error {
        self.anomalies.head_out_of_range += 1;
        self.broken = true;
        Error::Broken
    }

    #[cold]
    fn unusable(&mut self) {
        self.anomalies.chain += 1;
    }
}

/// The slow path, into `chain`: a chain of several descriptors, or one that is in several regions or cannot be used.
#[inline(never)]
fn follow<T, S>(ring: &Ring, rules: Rules, first: Desc, translate: &T, chain: &mut Chain<S>)
where
    T: Translate,
    S: AsRef<[Part]> + AsMut<[Part]>,
{
    let walked = walk(ring, rules, first, translate, chain.storage());
    chain.set(walked);
}

/// The progress of one burst, entered when it ends: also when the caller's closure panics, which leaves the chain that
/// it was called with popped and not pushed.
struct Burst<'a> {
    ring: Ring,
    state: &'a mut State,
    /// Chains popped by this burst.
    popped: usize,
    /// The used index, with what this burst pushed.
    pushed: usize,
    /// IN_ORDER: how many of those, at the end, still wait for the one element that completes them all, which names the
    /// last.
    run: usize,
    last: Head,
}

impl<'a> Burst<'a> {
    #[inline(always)]
    fn new(ring: Ring, state: &'a mut State) -> Self {
        let pushed = usize::from(state.pushed);
        Self {
            ring,
            state,
            popped: 0,
            pushed,
            run: 0,
            last: Head::new(0),
        }
    }

    #[inline(always)]
    fn push(&mut self, head: Head, len: u32) {
        self.ring.store_element(self.pushed, u32::from(head.index), len);
        self.pushed += 1;
    }

    #[inline(always)]
    fn end_run(&mut self) {
        if self.run != 0 {
            self.ring
                .store_element(self.pushed.wrapping_sub(self.run), u32::from(self.last.index), 0);
            self.run = 0;
        }
    }
}

impl Drop for Burst<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        self.end_run();
        self.state.popped = self.state.popped.wrapping_add(self.popped as u16);
        self.state.pushed = self.pushed as u16;
    }
}
