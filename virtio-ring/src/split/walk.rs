//! From a head to the checked parts of its chain, on the device side. Every descriptor is read once, into a local copy.

use crate::segment::Shape;
use crate::shared::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Desc, Ring};
use crate::walk::{Parts, Table};
use crate::{Fault, Part, Translate};

/// What a walk needs to know of its queue.
#[derive(Clone, Copy)]
pub(super) struct Rules {
    /// Entries of the queue: the limit of every chain (§2.7.5.1, §2.7.5.3.1).
    pub(super) size: u16,
    pub(super) indirect: bool,
}

/// The part that a lone descriptor describes, if one region has it: [`walk`] knows what else it is.
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

/// Follows the chain that begins with `first`. Ends: at most `size` descriptors and one change into a table are accepted.
pub(super) fn walk(
    ring: &Ring,
    rules: Rules,
    first: Desc,
    translate: &impl Translate,
    parts: &mut [Part],
) -> Result<Shape, Fault> {
    let mut parts = Parts::new(parts);
    // The indirect table once we are in it, and the entries of the table we are in.
    let mut table = None;
    let mut entries = rules.size;
    let mut left = rules.size;
    let mut desc = first;
    loop {
        if desc.flags() & DESC_F_INDIRECT != 0 {
            if table.is_some() {
                return Err(Fault::IndirectInIndirect);
            }
            let entered = enter_table(rules, desc, translate)?;
            entries = entered.entries;
            desc = Desc::from_words(entered.entry(0)?);
            table = Some(entered);
            continue;
        }
        left = left.checked_sub(1).ok_or(Fault::TooManyDescriptors)?;
        parts.push(desc.addr, desc.len(), is_writable(desc), translate)?;
        if desc.flags() & DESC_F_NEXT == 0 {
            return Ok(parts.shape);
        }
        let next = desc.next();
        if next >= entries {
            return Err(Fault::NextOutOfRange);
        }
        desc = match &table {
            None => ring.load_desc(usize::from(next)),
            Some(table) => Desc::from_words(table.entry(next)?),
        };
    }
}

/// Checks the descriptor of an indirect table (§2.7.5.3). Its WRITE flag is to be ignored (§2.7.5.3.2), and it may follow
/// direct descriptors.
fn enter_table<T: Translate>(rules: Rules, desc: Desc, translate: &T) -> Result<Table<'_, T>, Fault> {
    if !rules.indirect {
        return Err(Fault::IndirectNotNegotiated);
    }
    if desc.flags() & DESC_F_NEXT != 0 {
        return Err(Fault::IndirectWithNext);
    }
    Table::new(desc.addr, desc.len(), rules.size, translate)
}
