//! Where a device side stood that is gone, by what it left in the ring.
//!
//! A front-end whose back-end died has nobody to ask for the base (VHOST_USER_GET_VRING_BASE), and for a packed ring it
//! cannot look it up as for a split one, where the used index lies in memory. QEMU then sends the base of a new ring. But
//! the flags of the descriptors tell. From the descriptor on that the driver makes available next, in ring order, lie:
//!
//! 1. descriptors that the driver has written and not published, behind the one that it holds back;
//! 2. used descriptors, which the driver may write again;
//! 3. chains that the device had pushed and not published. It holds the first descriptor of the first chain back, and
//!    writes the further descriptors of a chain, the last one first, before the chain's first. The device was lost
//!    between any two of these stores, so that the last of these chains may be written in part;
//! 4. available descriptors, up to the driver again.

#[cfg(all(test, not(loom)))]
mod tests;

use super::Base;
use crate::shared::DESC_F_NEXT;
use crate::shared::packed::{Cursor, DESC_F_AVAIL, DESC_F_USED, Memory, Meta, Ring};
use crate::{Error, Options};

/// How often the ring is read again when the driver adds to it meanwhile.
const TRIES: u32 = 16;

/// The base from which a [`Device`](super::Device) goes on where another one was lost: killed, perhaps, between any two
/// stores of a burst. [`Base::START`] if the ring is new. Chains that were popped and not published are popped again,
/// unless the lost device had overwritten a descriptor of them: these, and the chains before them, are completed with
/// length 0, so that the driver gets them back.
///
/// The device side that is gone was one of this crate's, and pushed chains in the order in which it had popped them. Other
/// devices leave the further descriptors of a chain as they were: what is used cannot be told from what is not, then. Of a
/// ring of two descriptors, a driver that has written both and published none looks like a device that was lost; it must
/// not be halfway then.
///
/// With IN_ORDER one used descriptor stands for several chains, and cannot be told either. There the base is
/// [`Base::START`] unless the ring shows that no device can be there.
///
/// # Errors
/// [`Error::NoBase`]: no such device side leaves a ring so. [`Error::PackedQueueSize`], [`Error::Misaligned`].
///
/// # Safety
/// As for [`Device::new`](super::Device::new). No device side uses the ring during the call; the driver may.
pub unsafe fn recover(memory: Memory, size: u16, options: Options) -> Result<Base, Error> {
    // SAFETY: passed on.
    let ring = unsafe { Ring::new(memory, size)? };
    let left = Left { ring, size };
    for _ in 0..TRIES {
        // A driver that adds between two looks leaves what makes no sense. The next look is at what it has added.
        let base = match options.in_order {
            false => left.base(),
            true => left.is_at_start().then_some(Base::START),
        };
        if let Some(base) = base {
            return Ok(base);
        }
        core::hint::spin_loop();
    }
    Err(Error::NoBase)
}

/// The wrap counter of the lap that a descriptor was last made available or used in.
fn lap(meta: Meta) -> bool {
    meta.flags() & DESC_F_AVAIL != 0
}

/// Whether a descriptor is with the driver: used, or never touched.
fn is_used(meta: Meta) -> bool {
    (meta.flags() & DESC_F_AVAIL != 0) == (meta.flags() & DESC_F_USED != 0)
}

/// Whether the chain goes on behind this available descriptor.
fn goes_on(meta: Meta) -> bool {
    meta.flags() & DESC_F_NEXT != 0
}

/// Where the driver makes descriptors available.
struct Front {
    /// The next descriptor, in the lap that lies there still.
    next: Cursor,
    /// The descriptors that the driver has written and not published, from `next` on, or 0 if that is none or one: the
    /// one at `next` is held back.
    unpublished: u16,
}

/// Descriptors by their distance from [`Front::next`].
struct Torn {
    /// The first that is not used, and so the next one that the driver waits for.
    from: u16,
    /// The first of those that the lost device had not begun to use. `from` if nothing is torn.
    to: u16,
    /// What the chain at `from` is named by.
    id: u16,
}

/// The ring as the device left it.
struct Left {
    ring: Ring,
    size: u16,
}

impl Left {
    /// Where to go on, once what was torn is completed.
    fn base(&self) -> Option<Base> {
        let found = self.fronts().find_map(|front| Some((self.torn(&front)?, front)));
        let (torn, front) = found?;
        self.complete(&front, &torn);
        let base = front.next.advance(torn.to, self.size).off_wrap();
        Some(Base {
            available: base,
            used: base,
        })
    }

    /// Whether a device may be at the beginning of a lap with wrap counter 1, whatever it has used before: the driver is in
    /// that lap, and nothing of it is used.
    fn is_at_start(&self) -> bool {
        self.fronts().any(|front| {
            let ahead = match (front.next.position() as u16, front.next.wrap()) {
                (ahead, false) => ahead,
                // The whole lap.
                (0, true) => self.size,
                _ => return false,
            };
            // A ring that the driver is about to publish as a whole may as well be one that was used as a whole.
            front.unpublished < self.size && (0..ahead).all(|at| !is_used(self.load(at)))
        })
    }

    fn load(&self, at: u16) -> Meta {
        self.ring.load_meta(Cursor::used(at, true, self.size))
    }

    fn following(&self, at: u16) -> u16 {
        if at + 1 == self.size { 0 } else { at + 1 }
    }

    /// Where the driver may be. A lap ends there and an older one begins; if the driver has written more than the
    /// descriptor that it holds back, a newer lap begins behind that one and ends behind the last.
    fn fronts(&self) -> impl Iterator<Item = Front> {
        let (mut changes, mut count) = ([0u16; 3], 0);
        // At the end of the ring the wrap counter changes, and the lap goes on.
        let mut before = !lap(self.load(self.size - 1));
        for at in 0..self.size {
            let here = lap(self.load(at));
            if here != before {
                if let Some(change) = changes.get_mut(count) {
                    *change = at;
                }
                count += 1;
            }
            before = here;
        }
        let front = |at: u16, unpublished| Front {
            next: Cursor::used(at, lap(self.load(at)), self.size),
            unpublished,
        };
        let found = match (changes, count) {
            // Or the driver has written the whole ring: then the descriptor that it holds back is two laps behind.
            ([at, ..], 1) => {
                let before = if at == 0 { self.size - 1 } else { at - 1 };
                [Some(front(at, 0)), Some(front(before, self.size))]
            }
            (_, 3) => {
                // The flags tell which is the first, if all three lie side by side.
                let first = (0..3).find(|&i| {
                    let (at, behind) = (changes[i], self.following(changes[i]));
                    changes[(i + 1) % 3] == behind && is_used(self.load(at)) && !is_used(self.load(behind))
                });
                [
                    first.map(|i| {
                        let (at, end) = (changes[i], changes[(i + 2) % 3]);
                        front(at, if end > at { end - at } else { self.size - at + end })
                    }),
                    None,
                ]
            }
            _ => [None, None],
        };
        found.into_iter().flatten()
    }

    /// What the lost device had begun to use. `None`: the driver is not there, or has gone on, or no device side that is
    /// meant here leaves a ring so.
    fn torn(&self, front: &Front) -> Option<Torn> {
        let size = self.size;
        let load = |step: u16| {
            let at = front.next.advance(step, size);
            let meta = self.ring.load_meta(at);
            (lap(meta) == at.wrap()).then_some(meta)
        };
        let mut from = front.unpublished;
        if from > 0 && !is_used(load(0)?) {
            return None;
        }
        for step in 1..from {
            let at = front.next.advance(step, size);
            let meta = self.ring.load_meta(at);
            if lap(meta) == at.wrap() || is_used(meta) {
                return None;
            }
        }
        while from < size && is_used(load(from)?) {
            from += 1;
        }
        let mut to = from;
        for step in from..size {
            if is_used(load(step)?) {
                to = step + 1;
            }
        }
        let mut first_id = 0;
        let mut start = from;
        while start < to {
            let head = load(start)?;
            // The chain's descriptors that are not used, and the first that is.
            let (mut last, mut end) = (head, start + 1);
            while !is_used(last) && goes_on(last) && end < to {
                last = load(end)?;
                end += 1;
            }
            let missing = end - start - u16::from(is_used(last));
            let id = last.id();
            if is_used(last) {
                // The device writes a chain's ID into all of its descriptors.
                while end < to && is_used(load(end)?) && load(end)?.id() == id {
                    end += 1;
                }
            } else if start > from || end > from + 1 {
                // Nothing of this chain is used, but something behind it.
                return None;
            }
            // Only the descriptor that is held back may be missing, except of the last chain.
            let held_back = u16::from(start == from);
            if missing > held_back && end < to {
                return None;
            }
            if start == from {
                first_id = id;
            }
            start = end;
        }
        Some(Torn { from, to, id: first_id })
    }

    /// Completes what is torn: nothing is known to be in these chains. The stores come in an order in which a device makes
    /// them, so that the ring can be recovered again if this process is lost among them.
    fn complete(&self, front: &Front, torn: &Torn) {
        if torn.from == torn.to {
            return;
        }
        let mut id = torn.id;
        for step in (torn.from + 1..torn.to).rev() {
            let at = front.next.advance(step, self.size);
            let meta = self.ring.load_meta(at);
            if is_used(meta) {
                id = meta.id();
            }
            self.ring.store_meta(at, Meta::new(0, id, 0).at(at));
        }
        let first = front.next.advance(torn.from, self.size);
        self.ring.publish(first, Meta::new(0, torn.id, 0).at(first));
    }
}
