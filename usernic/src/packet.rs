//! Packets, and bursts of them.

mod offload;
mod place;

use std::fmt;
use std::mem;
use std::ptr::NonNull;

use crate::copy::copy;
use crate::pool::{self, Meta, RESERVED};

pub use offload::{Checksum, OffloadError, Segmentation};
pub(crate) use offload::{Handled, Marks, emit_header, handle};
pub use place::Place;

/// One frame in a port's packet memory, of one or more segments.
///
/// A packet owns its buffers; dropping it gives them back to their pool, from any thread.
///
/// The bytes may be shared with the other side of the port, which can write them at any moment, whatever the protocol
/// says. So there is no `Deref<[u8]>`: bytes are read and written by copy. Check a header on a copy of it
/// ([`header`](Packet::header), [`read_at`](Packet::read_at)), not in place. Where a plain slice is needed:
/// [`bytes`](Packet::bytes) for packets of a port with private memory (a `vhost` port),
/// [`into_private`](Packet::into_private) for all others, or [`as_slice`](Packet::as_slice) for who trusts the peer.
pub struct Packet(NonNull<Meta>);

// SAFETY: a packet is the only way to its buffers and their Metas; sending it sends them.
unsafe impl Send for Packet {}
// SAFETY: methods on &Packet only read the Meta, and copy bytes out.
unsafe impl Sync for Packet {}

/// A frame that does not fit: into the packet's bounds, or into the buffers that are left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PacketError {
    /// The place is outside the packet.
    #[error("bytes {offset}..{end} of a packet of {len} bytes")]
    OutOfRange {
        /// First byte asked for.
        offset: usize,
        /// The byte after the last.
        end: usize,
        /// The packet's length.
        len: usize,
    },
    /// No headroom for it.
    #[error("{asked} bytes of headroom asked for, {left} left")]
    NoHeadroom {
        /// Bytes asked for.
        asked: usize,
        /// Bytes left.
        left: usize,
    },
    /// The pool ran out of buffers for further segments.
    #[error("{len} bytes do not fit: the port's buffers are all in use (raise buffers= in the port spec)")]
    NoBuffers {
        /// The length asked for.
        len: usize,
    },
}

impl Packet {
    /// Takes over a buffer, with the segments behind it.
    ///
    /// # Safety
    /// The caller owns them and gives them up.
    #[inline(always)]
    pub(crate) unsafe fn from_meta(meta: NonNull<Meta>) -> Self {
        Packet(meta)
    }

    /// Gives up the buffers to the caller.
    #[inline(always)]
    pub(crate) fn into_meta(self) -> NonNull<Meta> {
        let meta = self.0;
        mem::forget(self);
        meta
    }

    #[inline(always)]
    pub(crate) fn meta_ptr(&self) -> NonNull<Meta> {
        self.0
    }

    #[inline(always)]
    pub(crate) fn meta(&self) -> &Meta {
        // SAFETY: owned by self.
        unsafe { self.0.as_ref() }
    }

    #[inline(always)]
    pub(crate) fn meta_mut(&mut self) -> &mut Meta {
        // SAFETY: owned by self, borrowed mutably.
        unsafe { self.0.as_mut() }
    }

    fn segments(&self) -> impl Iterator<Item = &Meta> {
        std::iter::successors(Some(self.meta()), |meta| {
            // SAFETY: the segments behind the first are owned by self too.
            meta.next().map(|next| unsafe { &*next.as_ptr() })
        })
    }

    /// Bytes of the frame, without FCS.
    #[inline]
    pub fn len(&self) -> usize {
        let meta = self.meta();
        match meta.is_last() {
            true => meta.len as usize,
            false => self.segments().map(|m| m.len as usize).sum(),
        }
    }

    /// Whether the frame has no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Buffers that the frame is in, at least 1.
    pub fn segment_count(&self) -> usize {
        self.segments().count()
    }

    /// Bytes that can be [`prepend`](Packet::prepend)ed.
    pub fn headroom(&self) -> usize {
        usize::from(self.meta().offset - RESERVED)
    }

    /// Bytes by which a frame of one segment can grow before it takes another.
    pub fn tailroom(&self) -> usize {
        let meta = self.meta();
        self.end_of_room() - usize::from(meta.offset) - meta.len as usize
    }

    fn end_of_room(&self) -> usize {
        // SAFETY: owned by self.
        usize::from(pool::HEADROOM) + unsafe { pool::room_of(self.meta()) }.0 as usize
    }

    fn check(&self, offset: usize, count: usize) -> Result<(), PacketError> {
        let len = self.len();
        match offset.checked_add(count) {
            Some(end) if end <= len => Ok(()),
            end => Err(PacketError::OutOfRange {
                offset,
                end: end.unwrap_or(usize::MAX),
                len,
            }),
        }
    }

    /// Calls `f` with each piece of `offset..offset + count`: where it is, and its place in the range.
    fn pieces(&self, mut offset: usize, count: usize, mut f: impl FnMut(*mut u8, usize, usize)) {
        let mut done = 0;
        if count == 0 {
            return;
        }
        for meta in self.segments() {
            let len = meta.len as usize;
            if offset >= len {
                offset -= len;
                continue;
            }
            let n = (len - offset).min(count - done);
            // SAFETY: offset < len, inside the segment.
            f(unsafe { meta.data().add(offset) }, done, n);
            done += n;
            offset = 0;
            if done == count {
                break;
            }
        }
    }

    /// Copies `dst.len()` bytes from `offset` on out of the frame.
    ///
    /// # Errors
    /// [`PacketError::OutOfRange`]; nothing is copied.
    #[inline]
    pub fn read_at(&self, offset: usize, dst: &mut [u8]) -> Result<(), PacketError> {
        let meta = self.meta();
        if meta.is_last() && offset.saturating_add(dst.len()) <= meta.len as usize {
            // SAFETY: in bounds of the segment, as just checked; dst is ours.
            unsafe { copy(meta.data().add(offset), dst.as_mut_ptr(), dst.len()) };
            return Ok(());
        }
        self.check(offset, dst.len())?;
        // SAFETY: `pieces` gives parts of the frame, and places below dst.len().
        self.pieces(offset, dst.len(), |src, at, n| unsafe {
            copy(src, dst.as_mut_ptr().add(at), n)
        });
        Ok(())
    }

    /// Copies `src` into the frame, from `offset` on.
    ///
    /// # Errors
    /// [`PacketError::OutOfRange`]; nothing is copied. To make a frame longer: [`copy_from`](Packet::copy_from) or
    /// [`set_len`](Packet::set_len).
    #[inline]
    pub fn write_at(&mut self, offset: usize, src: &[u8]) -> Result<(), PacketError> {
        let meta = self.meta();
        if meta.is_last() && offset.saturating_add(src.len()) <= meta.len as usize {
            // SAFETY: in bounds of the segment, as just checked.
            unsafe { copy(src.as_ptr(), meta.data().add(offset), src.len()) };
            return Ok(());
        }
        self.check(offset, src.len())?;
        // SAFETY: `pieces` gives parts of the frame, and places below src.len().
        self.pieces(offset, src.len(), |dst, at, n| unsafe {
            copy(src.as_ptr().add(at), dst, n)
        });
        Ok(())
    }

    /// The first `N` bytes by value, if the frame has so many.
    ///
    /// ```no_run
    /// # fn example(packet: &usernic::Packet) {
    /// if let Some(ethernet) = packet.header::<14>() {
    ///     println!("EtherType {:02x}{:02x}", ethernet[12], ethernet[13]);
    /// }
    /// # }
    /// ```
    #[inline]
    pub fn header<const N: usize>(&self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.read_at(0, &mut bytes).ok().map(|()| bytes)
    }

    /// Copies the frame to `dst`, as much as fits; how much that was.
    pub fn copy_to(&self, dst: &mut [u8]) -> usize {
        let n = self.len().min(dst.len());
        match self.read_at(0, &mut dst[..n]) {
            Ok(()) => n,
            Err(_) => 0,
        }
    }

    /// Makes the frame equal to `src`, with as many segments as that takes.
    ///
    /// # Errors
    /// [`PacketError::NoBuffers`]; the frame is then empty.
    #[inline]
    pub fn copy_from(&mut self, src: &[u8]) -> Result<(), PacketError> {
        self.clear_offloads();
        self.set_len(src.len())?;
        self.write_at(0, src)
    }

    /// Makes the frame `len` bytes long. It keeps the bytes it has; what is new is whatever was there before: write it.
    ///
    /// # Errors
    /// [`PacketError::NoBuffers`]; the frame is then empty.
    #[inline]
    pub fn set_len(&mut self, len: usize) -> Result<(), PacketError> {
        let end = self.end_of_room();
        let meta = self.meta_mut();
        // The offset is never behind the end; a sum with `len` could wrap.
        if meta.is_last() && len <= end - usize::from(meta.offset) {
            meta.len = len as u32;
            return Ok(());
        }
        self.set_len_slow(len)
    }

    /// Makes the frame empty: its first segment without a byte, and no other.
    fn clear(&mut self) {
        let first = self.meta_mut();
        first.len = 0;
        if let Some(rest) = first.take_next() {
            // SAFETY: cut off from self, and so owned here.
            unsafe { pool::free([rest]) };
        }
    }

    #[inline(never)]
    fn set_len_slow(&mut self, len: usize) -> Result<(), PacketError> {
        // More than the pool has in all its buffers would take them all from the port, to give them back again.
        // SAFETY: owned by self.
        if len > unsafe { pool::capacity_of(self.meta()) } {
            self.clear();
            return Err(PacketError::NoBuffers { len });
        }
        let mut left = len;
        let mut at = self.0;
        let end = self.end_of_room();
        loop {
            // SAFETY: a segment of self, reached through &mut self.
            let meta = unsafe { at.as_mut() };
            // Only the last segment grows: the bytes of those before it are followed by the next segment's.
            let most = match meta.is_last() {
                true => end - usize::from(meta.offset),
                false => meta.len as usize,
            };
            let n = left.min(most);
            meta.len = n as u32;
            left -= n;
            if left == 0 {
                if let Some(rest) = meta.take_next() {
                    // SAFETY: cut off from self, and so owned here.
                    unsafe { pool::free([rest]) };
                }
                return Ok(());
            }
            if meta.is_last()
                // SAFETY: owned by self.
                && let Some(next) = unsafe { pool::sibling(at) }
            {
                meta.set_next(next);
            }
            match meta.next() {
                Some(next) => at = next,
                None => {
                    self.clear();
                    return Err(PacketError::NoBuffers { len });
                }
            }
        }
    }

    /// Makes the frame equal to `other`, which may be of another port, with all that is known of it and asked for it.
    ///
    /// # Errors
    /// [`PacketError::NoBuffers`]; the frame is then empty.
    pub fn copy_packet(&mut self, other: &Packet) -> Result<(), PacketError> {
        self.set_len(other.len())?;
        let mut at = 0;
        for segment in other.segments() {
            let n = segment.len as usize;
            // SAFETY: `pieces` gives parts of this frame, and places below n in a segment of the other, which is
            // another packet and so other memory.
            self.pieces(at, n, |dst, from, n| unsafe { copy(segment.data().add(from), dst, n) });
            at += n;
        }
        self.copy_offloads(other);
        Ok(())
    }

    /// As [`copy_packet`](Packet::copy_packet), into fresh buffers, of which there are as many as it takes already.
    pub(crate) fn fill_from(&mut self, other: &Packet) -> Result<(), PacketError> {
        let (mut left, room) = (other.len(), self.end_of_room() - usize::from(pool::HEADROOM));
        let mut at = Some(self.0);
        while let Some(mut meta) = at {
            // SAFETY: a segment of self, reached through &mut self.
            let meta = unsafe { meta.as_mut() };
            let n = left.min(room);
            meta.len = n as u32;
            left -= n;
            at = meta.next();
        }
        self.copy_packet(other)
    }

    /// Copies a part of another packet to `at`. `false`, and nothing copied: it is not there, or does not fit.
    pub(crate) fn copy_part(&mut self, at: usize, other: &Packet, part: std::ops::Range<usize>) -> bool {
        if self.check(at, part.len()).is_err() || other.check(part.start, part.len()).is_err() {
            return false;
        }
        other.pieces(part.start, part.len(), |src, from, n| {
            // SAFETY: both are in bounds, as just checked; the packets are different ones.
            self.pieces(at + from, n, |dst, more, n| unsafe { copy(src.add(more), dst, n) });
        });
        true
    }

    /// Puts `src` before the frame.
    ///
    /// # Errors
    /// [`PacketError::NoHeadroom`]; nothing is changed.
    pub fn prepend(&mut self, src: &[u8]) -> Result<(), PacketError> {
        let left = self.headroom();
        if src.len() > left {
            return Err(PacketError::NoHeadroom { asked: src.len(), left });
        }
        self.grow_front(src.len() as u16);
        let meta = self.meta_mut();
        // SAFETY: inside the headroom, as just checked.
        unsafe { copy(src.as_ptr(), meta.data(), src.len()) };
        Ok(())
    }

    /// Moves the first byte back, by no more than the headroom.
    fn grow_front(&mut self, by: u16) {
        let meta = self.meta_mut();
        meta.offset -= by;
        meta.len += u32::from(by);
        // What was a zeroed header may be packet bytes now.
        meta.zeroed_at = 0;
        self.shift_offloads(by as isize);
    }

    /// Takes `count` bytes off the front.
    ///
    /// # Errors
    /// [`PacketError::OutOfRange`] if the first segment has fewer; nothing is changed.
    pub fn trim_front(&mut self, count: usize) -> Result<(), PacketError> {
        let meta = self.meta_mut();
        if count > meta.len as usize {
            return Err(PacketError::OutOfRange {
                offset: 0,
                end: count,
                len: meta.len as usize,
            });
        }
        meta.offset += count as u16;
        meta.len -= count as u32;
        // The bytes before the frame are those that were taken off: no header, wherever one was zeroed before.
        meta.zeroed_at = 0;
        self.shift_offloads(-(count as isize));
        Ok(())
    }

    /// The frame as a plain slice, if nobody else can reach its bytes and it is of one segment: so it is on `vhost`
    /// ports for every frame up to `buffer_size`.
    pub fn bytes(&self) -> Option<&[u8]> {
        let meta = self.meta();
        // SAFETY: owned by self.
        let (_, private) = unsafe { pool::room_of(meta) };
        if private && meta.is_last() {
            // SAFETY: private memory, owned by self, initialised (mapped pages are).
            Some(unsafe { std::slice::from_raw_parts(meta.data(), meta.len as usize) })
        } else {
            None
        }
    }

    /// The frame's first segment as a slice, in place.
    ///
    /// # Safety
    /// For as long as the slice lives nobody writes these bytes. That is a statement about the other side of the port:
    /// the memory is mapped there too.
    pub unsafe fn as_slice(&self) -> &[u8] {
        let meta = self.meta();
        // SAFETY: in bounds, initialised, owned by self; unchanged by the caller's promise.
        unsafe { std::slice::from_raw_parts(meta.data(), meta.len as usize) }
    }

    /// The frame in memory of its own; the buffers go back to their pool.
    pub fn into_private(self) -> Vec<u8> {
        let mut bytes = vec![0; self.len()];
        self.copy_to(&mut bytes);
        bytes
    }
}

impl Drop for Packet {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: owned by self, which is gone after this.
        unsafe { pool::free([self.0]) }
    }
}

impl fmt::Debug for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packet")
            .field("len", &self.len())
            .field("segments", &self.segment_count())
            .finish()
    }
}

/// Packets that move together: an array of a capacity that is given once.
///
/// ```no_run
/// # fn example(queue: &mut usernic::Queue) {
/// let mut burst = usernic::Burst::new(32);
/// queue.rx(&mut burst);          // appends what has come, up to the capacity
/// for packet in &mut burst { /* ... */ }
/// queue.tx(&mut burst);          // what was sent leaves the burst
/// burst.clear();                 // what was not is dropped
/// # }
/// ```
pub struct Burst {
    packets: Vec<Packet>,
}

impl Burst {
    /// An empty burst for up to `capacity` packets (at least 1).
    ///
    /// # Panics
    /// If no memory has room for so many pointers.
    pub fn new(capacity: usize) -> Self {
        Burst {
            packets: Vec::with_capacity(capacity.max(1)),
        }
    }

    /// A burst for no packet, which owns no memory.
    pub(crate) const fn empty() -> Self {
        Burst { packets: Vec::new() }
    }

    /// Packets that it holds at the most.
    #[inline]
    pub fn capacity(&self) -> usize {
        self.packets.capacity()
    }

    /// Packets that can be added.
    #[inline(always)]
    pub fn room(&self) -> usize {
        self.packets.capacity() - self.packets.len()
    }

    /// Adds a packet; `Err` gives it back when the burst is full.
    #[inline]
    pub fn push(&mut self, packet: Packet) -> Result<(), Packet> {
        if self.room() == 0 {
            return Err(packet);
        }
        self.packets.push(packet);
        Ok(())
    }

    /// Takes the last packet.
    pub fn pop(&mut self) -> Option<Packet> {
        self.packets.pop()
    }

    /// Takes packets out, from the front.
    pub fn drain(&mut self) -> impl Iterator<Item = Packet> + '_ {
        self.packets.drain(..)
    }

    /// Keeps the packets for which `keep` says so, in their order, and drops the others.
    pub fn retain(&mut self, mut keep: impl FnMut(&mut Packet) -> bool) {
        self.packets.retain_mut(|packet| keep(packet));
    }

    /// Drops all packets.
    #[inline]
    pub fn clear(&mut self) {
        self.truncate(0);
    }

    /// Drops all packets but the first `count`.
    pub fn truncate(&mut self, count: usize) {
        let len = self.packets.len();
        let count = count.min(len);
        // SAFETY: no more than there are; those behind are freed right below, and are nobody's if that panics.
        unsafe { self.packets.set_len(count) };
        let rest = self.packets.spare_capacity_mut()[..len - count].iter();
        // SAFETY: so many were initialised, and they are given up.
        unsafe { pool::free(rest.map(|packet| packet.assume_init_ref().meta_ptr())) };
    }

    /// Moves packets from the front of `self` to `other`, as many as fit.
    pub fn move_to(&mut self, other: &mut Burst) -> usize {
        let n = self.packets.len().min(other.room());
        other.packets.extend(self.packets.drain(..n));
        n
    }

    /// To add packets by where the caller knows that there is room.
    #[inline(always)]
    pub(crate) fn appending(&mut self) -> Appending<'_> {
        let len = self.packets.len();
        Appending {
            // SAFETY: within the capacity, or just behind it.
            at: unsafe { self.packets.as_mut_ptr().add(len) },
            count: 0,
            burst: self,
        }
    }

    /// Adds a packet where the caller knows that there is room.
    ///
    /// # Safety
    /// `room() > 0`.
    #[inline(always)]
    pub(crate) unsafe fn push_unchecked(&mut self, packet: Packet) {
        let len = self.packets.len();
        debug_assert!(len < self.packets.capacity());
        // SAFETY: len < capacity, by the caller; the place is uninitialised.
        unsafe {
            self.packets.as_mut_ptr().add(len).write(packet);
            self.packets.set_len(len + 1);
        }
    }

    /// Drops a packet; those behind it move up.
    pub(crate) fn remove(&mut self, index: usize) {
        drop(self.packets.remove(index));
    }

    /// Passes the packets from `start` on through `f`, in order, and keeps what it returns.
    pub(crate) fn rewrite(&mut self, start: usize, mut f: impl FnMut(Packet) -> Option<Packet>) {
        let len = self.packets.len();
        debug_assert!(start <= len);
        let mut out = start;
        // SAFETY: nothing counts as held from `start` on (what is not yet passed leaks if `f` panics); each place is
        // read once, and written only at or before the place read last.
        unsafe {
            self.packets.set_len(start);
            let base = self.packets.as_mut_ptr();
            for at in start..len {
                if let Some(packet) = f(base.add(at).read()) {
                    base.add(out).write(packet);
                    out += 1;
                }
            }
            self.packets.set_len(out);
        }
    }

    /// Forgets the first `count` packets, whose buffers somebody else owns now.
    ///
    /// # Safety
    /// The first `count` packets' buffers were given up.
    #[inline(always)]
    pub(crate) unsafe fn forget_front(&mut self, count: usize) {
        let len = self.packets.len();
        debug_assert!(count <= len);
        // SAFETY: the rest moves to the front; the first `count` are forgotten, as the caller says.
        unsafe {
            let base = self.packets.as_mut_ptr();
            if count < len {
                std::ptr::copy(base.add(count), base, len - count);
            }
            self.packets.set_len(len - count);
        }
    }
}

impl std::ops::Deref for Burst {
    type Target = [Packet];

    #[inline(always)]
    fn deref(&self) -> &[Packet] {
        &self.packets
    }
}

impl std::ops::DerefMut for Burst {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [Packet] {
        &mut self.packets
    }
}

impl IntoIterator for Burst {
    type Item = Packet;
    type IntoIter = std::vec::IntoIter<Packet>;

    /// The packets, from the front.
    fn into_iter(self) -> Self::IntoIter {
        self.packets.into_iter()
    }
}

impl<'a> IntoIterator for &'a Burst {
    type Item = &'a Packet;
    type IntoIter = std::slice::Iter<'a, Packet>;

    fn into_iter(self) -> Self::IntoIter {
        self.packets.iter()
    }
}

impl<'a> IntoIterator for &'a mut Burst {
    type Item = &'a mut Packet;
    type IntoIter = std::slice::IterMut<'a, Packet>;

    fn into_iter(self) -> Self::IntoIter {
        self.packets.iter_mut()
    }
}

/// Packets on their way into a burst: where the next one goes, in registers.
pub(crate) struct Appending<'a> {
    at: *mut Packet,
    count: usize,
    burst: &'a mut Burst,
}

impl Appending<'_> {
    /// Adds a packet.
    ///
    /// # Safety
    /// The burst had room for one more than were added so far.
    #[inline(always)]
    pub(crate) unsafe fn push(&mut self, packet: Packet) {
        // SAFETY: within the capacity, by the caller; the place is uninitialised.
        unsafe { self.at.add(self.count).write(packet) };
        self.count += 1;
    }
}

impl Drop for Appending<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        let len = self.burst.packets.len();
        // SAFETY: so many were written behind the first `len`.
        unsafe { self.burst.packets.set_len(len + self.count) };
    }
}

impl fmt::Debug for Burst {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Burst")
            .field("len", &self.len())
            .field("capacity", &self.capacity())
            .finish()
    }
}

#[cfg(test)]
mod tests;
