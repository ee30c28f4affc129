//! From a chain's first descriptor to its checked parts, on the device side. Every descriptor is read once, into a local
//! copy.

use crate::segment::Shape;
use crate::shared::packed::{Cursor, DESC_F_AVAIL, DESC_F_USED, Desc, Meta, Ring, wire};
use crate::shared::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, load_table_entry};
use crate::{Direction, Fault, Head, Part, Translate};

/// What a walk found: the chain's name and extent, and its parts if it is a good one.
pub(super) struct Walked {
    pub(super) head: Head,
    pub(super) shape: Result<Shape, Fault>,
}

/// The part that a lone descriptor describes.
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

/// Collects parts.
struct Parts<'a> {
    parts: &'a mut [Part],
    shape: Shape,
    bytes: u64,
}

impl Parts<'_> {
    fn push(&mut self, desc: Desc, translate: &impl Translate) -> Result<(), Fault> {
        let writable = is_writable(desc.meta);
        if !writable && self.shape.count > self.shape.readable {
            return Err(Fault::ReadableAfterWritable);
        }
        self.bytes += u64::from(desc.meta.len());
        if self.bytes > u64::from(u32::MAX) {
            return Err(Fault::TooManyBytes);
        }
        let part = part_of(desc, translate)?;
        *self.parts.get_mut(self.shape.count).ok_or(Fault::TooManySegments)? = part;
        self.shape.count += 1;
        self.shape.readable += usize::from(!writable);
        Ok(())
    }
}

/// Follows the chain whose first descriptor, at `cursor`, has the second word `first`. `None`: it goes on for more than
/// `most` descriptors, so that nobody can tell where the next one begins.
///
/// A faulty chain is followed to its end for its extent and for its ID, which the last descriptor has (§2.8.6).
pub(super) fn walk(
    ring: &Ring,
    mut cursor: Cursor,
    first: Meta,
    most: u16,
    indirect: bool,
    translate: &impl Translate,
    parts: &mut [Part],
) -> Option<Walked> {
    let mut parts = Parts {
        parts,
        shape: Shape::default(),
        bytes: 0,
    };
    let mut found = Ok(());
    let mut meta = first;
    let mut count = 0;
    loop {
        let desc = Desc {
            addr: ring.load_addr(cursor),
            meta,
        };
        count += 1;
        found = found.and_then(|()| {
            if meta.flags() & DESC_F_INDIRECT == 0 {
                parts.push(desc, translate)
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
        meta = ring.load_meta(cursor);
    }
}

/// The parts of an indirect table (§2.8.7): its descriptors in sequence, of which only WRITE counts.
fn table(desc: Desc, size: u16, translate: &impl Translate, parts: &mut Parts<'_>) -> Result<(), Fault> {
    let (len, entry) = (desc.meta.len(), size_of::<wire::Desc>() as u32);
    if len == 0 || !len.is_multiple_of(entry) {
        return Err(Fault::IndirectSize);
    }
    let entries = len / entry;
    if entries > u32::from(size) {
        return Err(Fault::IndirectTooLarge);
    }
    let base = translate.translate(desc.addr, len).ok_or(Fault::Untranslated)?;
    for i in 0..entries as usize {
        // SAFETY: `i` is below the entries of the table, all of which `Translate` vouched for.
        let [addr, meta] = unsafe { load_table_entry(base.as_ptr().add(i * size_of::<wire::Desc>())) };
        let meta = Meta(meta);
        if !is_writable(meta) {
            // DPDK's driver leaves WRITE on entries of what it sends: that of the header, and others in its first slots.
            // Nothing writable comes before what is readable (§2.8.4), so the entries before this one are readable.
            parts.shape.readable = parts.shape.count;
        }
        parts.push(Desc { addr, meta }, translate)?;
    }
    Ok(())
}
