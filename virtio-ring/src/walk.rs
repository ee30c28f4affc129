//! What the walks of both ring formats share: the parts of a chain, and indirect tables. A descriptor and a table lie where
//! the driver put them, over the border between two regions if it likes: the driver knows its own addresses only.

use crate::segment::Shape;
use crate::shared::{load_table_bytes, load_table_entry, wire, words_of};
use crate::{Fault, Part, Translate};

/// Bytes of a descriptor, of either format.
const ENTRY: u32 = size_of::<wire::Desc>() as u32;

/// Collects the parts of a chain: one for each region that a descriptor's bytes are in.
pub(crate) struct Parts<'a> {
    parts: &'a mut [Part],
    pub(crate) shape: Shape,
    bytes: u64,
}

impl<'a> Parts<'a> {
    pub(crate) fn new(parts: &'a mut [Part]) -> Self {
        Self {
            parts,
            shape: Shape::default(),
            bytes: 0,
        }
    }

    /// The bytes of one descriptor.
    pub(crate) fn push(
        &mut self,
        mut addr: u64,
        len: u32,
        writable: bool,
        translate: &impl Translate,
    ) -> Result<(), Fault> {
        if !writable && self.shape.count > self.shape.readable {
            return Err(Fault::ReadableAfterWritable);
        }
        self.bytes += u64::from(len);
        if self.bytes > u64::from(u32::MAX) {
            return Err(Fault::TooManyBytes);
        }
        if len == 0 {
            return Err(Fault::ZeroLength);
        }
        let mut left = len;
        while left > 0 {
            let (ptr, n) = prefix(translate, addr, left)?;
            *self.parts.get_mut(self.shape.count).ok_or(Fault::TooManySegments)? = Part { ptr, len: n };
            self.shape.count += 1;
            self.shape.readable += usize::from(!writable);
            left -= n;
            if left > 0 {
                addr = addr.checked_add(n.into()).ok_or(Fault::Untranslated)?;
            }
        }
        Ok(())
    }
}

/// [`Translate::prefix`], of which at least one byte is there.
fn prefix(translate: &impl Translate, addr: u64, len: u32) -> Result<(core::ptr::NonNull<u8>, u32), Fault> {
    match translate.prefix(addr, len) {
        Some((ptr, n)) if n > 0 => Ok((ptr, n.min(len))),
        _ => Err(Fault::Untranslated),
    }
}

/// An indirect table. Invariant: it has at least one entry, and `whole` are all of them if they are in one region.
pub(crate) struct Table<'a, T> {
    translate: &'a T,
    addr: u64,
    whole: Option<core::ptr::NonNull<u8>>,
    pub(crate) entries: u16,
}

impl<'a, T: Translate> Table<'a, T> {
    /// The table that a descriptor describes, of a queue of `size` entries.
    pub(crate) fn new(addr: u64, len: u32, size: u16, translate: &'a T) -> Result<Self, Fault> {
        if len == 0 || !len.is_multiple_of(ENTRY) {
            return Err(Fault::IndirectSize);
        }
        let entries = len / ENTRY;
        if entries > u32::from(size) {
            return Err(Fault::IndirectTooLarge);
        }
        addr.checked_add(u64::from(len) - 1).ok_or(Fault::Untranslated)?;
        Ok(Self {
            translate,
            addr,
            whole: translate.translate(addr, len),
            entries: entries as u16,
        })
    }

    /// The two words of entry `i`, which the table has.
    pub(crate) fn entry(&self, i: u16) -> Result<[u64; 2], Fault> {
        debug_assert!(i < self.entries);
        let offset = u32::from(i) * ENTRY;
        if let Some(base) = self.whole
            && i < self.entries
        {
            // SAFETY: inside the entries of the table, all of which `Translate` vouched for.
            return Ok(unsafe { load_table_entry(base.as_ptr().add(offset as usize)) });
        }
        self.piecewise(self.addr.wrapping_add(offset.into()))
    }

    /// An entry of a table that is in several regions, as the entry itself may be.
    #[cold]
    fn piecewise(&self, mut addr: u64) -> Result<[u64; 2], Fault> {
        let mut bytes = [0; ENTRY as usize];
        let mut at = 0;
        while at < bytes.len() {
            let (ptr, n) = prefix(self.translate, addr, ENTRY - at as u32)?;
            let n = n as usize;
            if n == bytes.len() {
                // SAFETY: `Translate` vouched for these 16 bytes.
                return Ok(unsafe { load_table_entry(ptr.as_ptr()) });
            }
            // SAFETY: and for these.
            unsafe { load_table_bytes(ptr.as_ptr(), &mut bytes[at..at + n]) };
            at += n;
            // Does not wrap before the end of the table, as `new` saw.
            addr = addr.wrapping_add(n as u64);
        }
        Ok(words_of(bytes))
    }
}
