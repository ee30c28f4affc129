//! From a chain's first descriptor to its checked parts, on the device side. Every descriptor is read once, into a local
//! copy.

use crate::segment::Shape;
use crate::shared::packed::{Cursor, DESC_F_AVAIL, DESC_F_USED, Desc, Meta, Ring};
use crate::shared::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE};
use crate::walk::{Parts, Table};
use crate::{Direction, Fault, Head, Part, Translate};

/// What a walk found: the chain's name and extent, and its parts if it is a good one.
pub(super) struct Walked {
    pub(super) head: Head,
    pub(super) shape: Result<Shape, Fault>,
}

/// The part that a lone descriptor describes, if one region has it: [`walk`] knows what else it is.
#[inline(always)]
pub(super) fn part_of(desc: Desc, translate: &impl Translate) -> Result<Part, Fault> {
    let len = desc.meta.len();
    if len == 0 {
        return Err(Fault::ZeroLength);
    }
    match translate.translate(desc.addr, len) {
        Some(ptr) => Ok(Part { ptr, len }),
        None => Err(Fault::Untranslated),
    }
}

#[inline(always)]
pub(super) const fn is_single(meta: Meta) -> bool {
    meta.flags() & (DESC_F_NEXT | DESC_F_INDIRECT) == 0
}

#[inline(always)]
pub(super) const fn is_writable(meta: Meta) -> bool {
    meta.flags() & DESC_F_WRITE != 0
}

/// A lone descriptor of one direction, told by one comparison.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    flags: u64,
}

impl Wanted {
    pub(super) const MASK: u64 =
        ((DESC_F_AVAIL | DESC_F_USED | DESC_F_NEXT | DESC_F_INDIRECT | DESC_F_WRITE) as u64) << 48;

    pub(super) const fn new(direction: Direction) -> Self {
        let flags = match direction {
            Direction::Readable => 0,
            Direction::Writable => DESC_F_WRITE,
        };
        Self {
            flags: (flags as u64) << 48,
        }
    }

    /// The second word of such a descriptor, under the mask.
    #[inline(always)]
    pub(super) const fn word(self, cursor: Cursor) -> u64 {
        Meta(self.flags).at(cursor).0
    }

    #[inline(always)]
    pub(super) const fn matches(self, cursor: Cursor, meta: Meta) -> bool {
        (meta.0 ^ self.word(cursor)) & Self::MASK == 0
    }
}

/// Follows the chain that begins with `first`, which was read at `cursor`. `None`: it goes on for more than
/// `most` descriptors, so that nobody can tell where the next one begins.
///
/// A faulty chain is followed to its end for its extent and for its ID, which the last descriptor has (§2.8.6).
pub(super) fn walk(
    ring: &Ring,
    mut cursor: Cursor,
    first: Desc,
    most: u16,
    indirect: bool,
    translate: &impl Translate,
    parts: &mut [Part],
) -> Option<Walked> {
    let mut parts = Parts::new(parts);
    let mut found = Ok(());
    let mut desc = first;
    let mut count = 0;
    loop {
        let meta = desc.meta;
        count += 1;
        found = found.and_then(|()| {
            if meta.flags() & DESC_F_INDIRECT == 0 {
                parts.push(desc.addr, meta.len(), is_writable(meta), translate)
            } else if count > 1 || meta.flags() & DESC_F_NEXT != 0 {
                // §2.8.5: a table is not mixed with direct descriptors.
                Err(Fault::IndirectWithNext)
            } else if !indirect {
                Err(Fault::IndirectNotNegotiated)
            } else {
                table(desc, ring.size(), translate, &mut parts)
            }
        });
        if meta.flags() & DESC_F_NEXT == 0 {
            let head = Head {
                index: meta.id(),
                count,
            };
            return Some(Walked {
                head,
                shape: found.map(|()| parts.shape),
            });
        }
        if count == most {
            return None;
        }
        cursor = cursor.next(ring.size());
        let meta = ring.load_meta(cursor);
        desc = Desc {
            addr: ring.load_addr(cursor),
            meta,
        };
    }
}

/// The parts of an indirect table (§2.8.7): its descriptors in sequence, of which only WRITE counts.
fn table(desc: Desc, size: u16, translate: &impl Translate, parts: &mut Parts<'_>) -> Result<(), Fault> {
    let table = Table::new(desc.addr, desc.meta.len(), size, translate)?;
    for i in 0..table.entries {
        let [addr, meta] = table.entry(i)?;
        let meta = Meta(meta);
        if !is_writable(meta) {
            // DPDK's driver leaves WRITE on entries of what it sends: that of the header, and others in its first slots.
            // Nothing writable comes before what is readable (§2.8.4), so the entries before this one are readable.
            parts.shape.readable = parts.shape.count;
        }
        parts.push(addr, meta.len(), is_writable(meta), translate)?;
    }
    Ok(())
}
