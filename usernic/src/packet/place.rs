//! Packets for code that cannot hold a [`Packet`]: where the bytes are, as plain values.

use std::ptr::NonNull;

use super::{Marks, Packet, PacketError};

/// Where a packet's bytes are, as it was when this was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The frame's first byte. The other side of the port may write it and those behind it at any moment.
    pub data: NonNull<u8>,
    /// Bytes of the frame.
    pub len: u32,
    /// Bytes from `data` on that are in one piece. For a frame of one segment, what it can grow to; for one of several,
    /// what is in the first.
    pub room: u32,
    /// Bytes before `data` by which the frame can grow at its front.
    pub headroom: u16,
    /// The frame is in one segment.
    pub whole: bool,
    /// Nothing is asked for the packet, and nothing is known of its checksum.
    pub plain: bool,
}

impl Packet {
    /// Where the packet's bytes are: for handing it to another language, burst by burst.
    ///
    /// Reading or writing there takes raw pointers, and the care that [`as_slice`](Packet::as_slice) tells of.
    #[inline(always)]
    pub fn place(&self) -> Place {
        let meta = self.meta();
        let whole = meta.is_last();
        Place {
            // SAFETY: inside a mapped buffer.
            data: unsafe { NonNull::new_unchecked(meta.data()) },
            len: if whole {
                meta.len
            } else {
                u32::try_from(self.len()).unwrap_or(u32::MAX)
            },
            room: if whole {
                (self.end_of_room() - usize::from(meta.offset)) as u32
            } else {
                meta.len
            },
            headroom: self.headroom() as u16,
            whole,
            plain: meta.marks == Marks::NONE,
        }
    }

    /// Moves the frame's first byte: forward, which takes bytes off, or, with `by` below 0, back into the headroom. What
    /// is new at the front is whatever was there before: write it.
    ///
    /// # Errors
    /// [`PacketError::NoHeadroom`], [`PacketError::OutOfRange`] if the first segment has fewer bytes; nothing is changed.
    pub fn move_start(&mut self, by: isize) -> Result<(), PacketError> {
        if by >= 0 {
            return self.trim_front(by as usize);
        }
        let asked = by.unsigned_abs();
        let left = self.headroom();
        if asked > left {
            return Err(PacketError::NoHeadroom { asked, left });
        }
        self.grow_front(asked as u16);
        Ok(())
    }
}
