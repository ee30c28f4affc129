//! Where a device side stood that is gone, by what it left in the ring.
//!
//! A front-end whose back-end died has nobody to ask for the base (VHOST_USER_GET_VRING_BASE), and for a packed ring it
//! cannot look it up as for a split one, where the used index lies in memory. QEMU then sends the base of a new ring. But
//! the flags of the descriptors tell: in the order of the ring they are, from where the driver adds next, some that are
//! used, then those that are not, up to the driver again.

use super::Base;
use crate::Error;
use crate::shared::DESC_F_NEXT;
use crate::shared::packed::{Cursor, DESC_F_AVAIL, DESC_F_USED, Memory, Meta, Ring};

/// How often the ring is read again when the driver adds to it meanwhile.
const TRIES: u32 = 16;

/// What there was to see.
enum Seen {
    Base(Base),
    /// The driver has gone on since.
    Moved,
    /// No device side that is meant here leaves a ring so.
    Strange,
}

/// The base from which a [`Device`](super::Device) goes on where another one was lost: killed, perhaps, in the middle of
/// a burst. [`Base::START`] if the ring is new. Chains that were popped and not published are popped again; those that
/// were pushed and not published are completed with length 0, so that the driver gets them back.
///
/// The device side that is gone was one of this crate's, without IN_ORDER, and pushed chains in the order in which it had
/// popped them. With IN_ORDER one used descriptor stands for several chains, and other devices leave the further
/// descriptors of a chain as they were: what is used cannot be told from what is not, then.
///
/// `None`: no such device side leaves a ring so.
///
/// # Errors
/// [`Error::PackedQueueSize`], [`Error::Misaligned`].
///
/// # Safety
/// As for [`Device::new`](super::Device::new). No device side uses the ring during the call; the driver may.
pub unsafe fn recover(memory: Memory, size: u16) -> Result<Option<Base>, Error> {
    // SAFETY: passed on.
    let ring = unsafe { Ring::new(memory, size)? };
    for _ in 0..TRIES {
        match look(&ring) {
            Seen::Base(base) => return Ok(Some(base)),
            Seen::Moved => {}
            Seen::Strange => return Ok(None),
        }
    }
    Ok(None)
}

/// The wrap counter of the lap that a descriptor was last made available or used in.
fn lap(meta: Meta) -> bool {
    meta.flags() & DESC_F_AVAIL != 0
}

/// Whether a descriptor is with the driver: used, or never touched.
fn is_used(meta: Meta) -> bool {
    (meta.flags() & DESC_F_AVAIL != 0) == (meta.flags() & DESC_F_USED != 0)
}

fn look(ring: &Ring) -> Seen {
    let size = ring.size();
    let load = |at: u16| ring.load_meta(Cursor::available(at, true, size));
    // The driver's lap ends where it adds next.
    let first = lap(load(0));
    let next = (0..size).find(|&at| lap(load(at)) != first);
    let (next, wrap) = next.map_or((0, !first), |at| (at, first));

    // From the oldest descriptor on: used ones, the first that is not, used ones again if a burst was not published, and
    // from there on none that is used.
    let (mut used, mut torn) = (None::<(u16, bool)>, 0);
    let mut open = false;
    for step in 0..size {
        let (at, wrap) = match next.checked_add(step) {
            Some(at) if at < size => (at, !wrap),
            _ => ((u32::from(next) + u32::from(step) - u32::from(size)) as u16, wrap),
        };
        let meta = load(at);
        if lap(meta) != wrap {
            return Seen::Moved;
        }
        match (is_used(meta), used) {
            (true, None) => {}
            (false, None) => used = Some((at, wrap)),
            (true, Some(_)) if open => return Seen::Strange,
            (true, Some(_)) => torn += 1,
            (false, Some(_)) => open = true,
        }
    }
    let (at, wrap) = used.unwrap_or((next, wrap));
    let mut cursor = Cursor::used(at, wrap, size);
    if torn > 0 {
        cursor = complete(ring, cursor, torn);
    }
    let base = cursor.off_wrap();
    Seen::Base(Base {
        available: base,
        used: base,
    })
}

/// Completes the descriptor at `start`, which its device held back, and the `torn` ones behind it, which the device had
/// written already: nothing is known to be in any of them. Gives the cursor behind them.
fn complete(ring: &Ring, start: Cursor, torn: u16) -> Cursor {
    let first = ring.load_meta(start);
    let mut cursor = start.next(ring.size());
    // A chain's ID is in its last descriptor (§2.8.6), and the device put it into those behind its first.
    let id = if first.flags() & DESC_F_NEXT != 0 {
        ring.load_meta(cursor).id()
    } else {
        first.id()
    };
    for _ in 0..torn {
        let id = ring.load_meta(cursor).id();
        ring.store_meta(cursor, Meta::new(0, id, 0).at(cursor));
        cursor = cursor.next(ring.size());
    }
    ring.publish(start, Meta::new(0, id, 0).at(start));
    cursor
}
