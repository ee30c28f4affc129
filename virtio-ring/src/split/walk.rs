//! From a head to the checked parts of its chain, on the device side. Every descriptor is read once, into a local copy.

use crate::segment::Shape;
use crate::shared::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Desc, Ring, load_table_entry, wire};
use crate::{Fault, Part, Translate};

/// What a walk needs to know of its queue.
#[derive(Clone, Copy)]
pub(super) struct Rules {
    /// Entries of the queue: the limit of every chain (§2.7.5.1, §2.7.5.3.1).
    pub(super) size: u16,
    pub(super) indirect: bool,
}

/// The part that a lone descriptor describes.
#[inline(always)]
pub(super) fn part_of(desc: Desc, translate: &impl Translate) -> Result<Part, Fault> {
    if desc.len() == 0 {
        return Err(Fault::ZeroLength);
    }
    match translate.translate(desc.addr, desc.len()) {
        Some(ptr) => Ok(Part { ptr, len: desc.len() }),
        None => Err(Fault::Untranslated),
    }
}

#[inline(always)]
pub(super) const fn is_single(desc: Desc) -> bool {
    desc.flags() & (DESC_F_NEXT | DESC_F_INDIRECT) == 0
}

#[inline(always)]
pub(super) const fn is_writable(desc: Desc) -> bool {
    desc.flags() & DESC_F_WRITE != 0
}

/// Follows the chain that begins with `first`. Ends: at most `size` segments and one change into a table are accepted.
pub(super) fn walk(
    ring: &Ring,
    rules: Rules,
    first: Desc,
    translate: &impl Translate,
    parts: &mut [Part],
) -> Result<Shape, Fault> {
    let mut shape = Shape::default();
    let mut bytes = 0u64;
    // The indirect table once we are in it, and the entries of the table we are in.
    let mut table = None;
    let mut entries = rules.size;
    let mut desc = first;
    loop {
        if desc.flags() & DESC_F_INDIRECT != 0 {
            if table.is_some() {
                return Err(Fault::IndirectInIndirect);
            }
            let (base, count) = enter_table(rules, desc, translate)?;
            table = Some(base);
            entries = count;
            // SAFETY: `enter_table` returned a table of at least one entry, valid by the contract of `Translate`.
            desc = Desc::from_words(unsafe { load_table_entry(base) });
            continue;
        }
        if shape.count == usize::from(rules.size) {
            return Err(Fault::TooManyDescriptors);
        }
        let writable = is_writable(desc);
        if !writable && shape.count > shape.readable {
            return Err(Fault::ReadableAfterWritable);
        }
        bytes += u64::from(desc.len());
        if bytes > u64::from(u32::MAX) {
            return Err(Fault::TooManyBytes);
        }
        let part = part_of(desc, translate)?;
        *parts.get_mut(shape.count).ok_or(Fault::TooManySegments)? = part;
        shape.count += 1;
        shape.readable += usize::from(!writable);
        if desc.flags() & DESC_F_NEXT == 0 {
            return Ok(shape);
        }
        let next = desc.next();
        if next >= entries {
            return Err(Fault::NextOutOfRange);
        }
        desc = match table {
            None => ring.load_desc(usize::from(next)),
            Some(base) => {
                // SAFETY: `next` is below the entries of the table, all of which `Translate` vouched for.
                Desc::from_words(unsafe { load_table_entry(base.add(usize::from(next) * size_of::<wire::Desc>())) })
            }
        };
    }
}

/// Checks the descriptor of an indirect table (§2.7.5.3); where the table is, and its entries. Its WRITE flag is to be
/// ignored (§2.7.5.3.2), and it may follow direct descriptors.
fn enter_table(rules: Rules, desc: Desc, translate: &impl Translate) -> Result<(*const u8, u16), Fault> {
    if !rules.indirect {
        return Err(Fault::IndirectNotNegotiated);
    }
    if desc.flags() & DESC_F_NEXT != 0 {
        return Err(Fault::IndirectWithNext);
    }
    let entry = size_of::<wire::Desc>() as u32;
    if desc.len() == 0 || !desc.len().is_multiple_of(entry) {
        return Err(Fault::IndirectSize);
    }
    let entries = desc.len() / entry;
    if entries > u32::from(rules.size) {
        return Err(Fault::IndirectTooLarge);
    }
    let base = translate.translate(desc.addr, desc.len()).ok_or(Fault::Untranslated)?;
    Ok((base.as_ptr(), entries as u16))
}
