//! The packed ring's memory: one ring of descriptors that both sides write, and an event suppression structure of each.

#[cfg(not(loom))]
mod memory;
#[cfg(loom)]
mod modelled;

#[cfg(not(loom))]
pub use memory::Memory;
#[cfg(not(loom))]
pub(crate) use memory::Ring;
#[cfg(loom)]
pub use modelled::Memory;
#[cfg(loom)]
pub(crate) use modelled::Ring;

use crate::Error;

/// `VIRTQ_DESC_F_AVAIL` (§2.8.1): equal to the driver's wrap counter in a descriptor that is available.
pub(crate) const DESC_F_AVAIL: u16 = 1 << 7;
/// `VIRTQ_DESC_F_USED` (§2.8.1): the inverse of it there; equal to AVAIL in a descriptor that is used.
pub(crate) const DESC_F_USED: u16 = 1 << 15;

/// Both, where a descriptor's second word has them.
const STATE: u64 = ((DESC_F_AVAIL | DESC_F_USED) as u64) << 48;

/// One descriptor by value (§2.8.13): `addr`, and `len | id << 32 | flags << 48` as it lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Desc {
    pub(crate) addr: u64,
    pub(crate) meta: Meta,
}

/// The second word of a descriptor: all that a used descriptor consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Meta(pub(crate) u64);

impl Meta {
    #[inline(always)]
    pub(crate) const fn new(len: u32, id: u16, flags: u16) -> Self {
        Self(len as u64 | (id as u64) << 32 | (flags as u64) << 48)
    }

    #[inline(always)]
    pub(crate) const fn len(self) -> u32 {
        self.0 as u32
    }

    #[inline(always)]
    pub(crate) const fn id(self) -> u16 {
        (self.0 >> 32) as u16
    }

    #[inline(always)]
    pub(crate) const fn flags(self) -> u16 {
        (self.0 >> 48) as u16
    }

    /// The same with the state that `cursor` stands for. `self` has none.
    #[inline(always)]
    pub(crate) const fn at(self, cursor: Cursor) -> Self {
        Self(self.0 | cursor.state)
    }
}

/// A position in a ring and the wrap counter there (§2.8.1), as the flags that a descriptor has in that lap: those of an
/// available one or those of a used one, by how the cursor began.
///
/// Invariant: `at` is below the size of the ring that the cursor was made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cursor {
    at: usize,
    state: u64,
}

impl Cursor {
    /// For descriptors that become available: `at` is taken modulo `size`, which is not 0.
    pub(crate) const fn available(at: u16, wrap: bool, size: u16) -> Self {
        let flags = if wrap { DESC_F_AVAIL } else { DESC_F_USED };
        Self {
            at: (at % size) as usize,
            state: (flags as u64) << 48,
        }
    }

    /// For descriptors that become used.
    pub(crate) const fn used(at: u16, wrap: bool, size: u16) -> Self {
        Self {
            at: (at % size) as usize,
            state: if wrap { STATE } else { 0 },
        }
    }

    #[inline(always)]
    pub(crate) const fn position(self) -> usize {
        self.at
    }

    #[inline(always)]
    pub(crate) const fn wrap(self) -> bool {
        self.state & (DESC_F_AVAIL as u64) << 48 != 0
    }

    /// Position and wrap counter as the event suppression structures and vhost-user have them: the counter is bit 15.
    #[inline(always)]
    pub(crate) const fn off_wrap(self) -> u16 {
        self.at as u16 | (self.wrap() as u16) << 15
    }

    /// Is a descriptor with this word in the state that the cursor stands for?
    #[inline(always)]
    pub(crate) const fn matches(self, meta: Meta) -> bool {
        (meta.0 ^ self.state) & STATE == 0
    }

    /// The second words of the descriptors from here to the end of the lap, each with its position as ID, without length
    /// and other flags.
    #[inline(always)]
    pub(crate) fn words(self) -> impl Iterator<Item = Word> {
        let first = self.state | (self.at as u64) << 32;
        // Positions are below 2^15.
        (0..).map(move |i| Word(first + (i << 32)))
    }

    /// `n` descriptors on, at most once round.
    #[inline(always)]
    pub(crate) const fn advance(self, n: u16, size: u16) -> Self {
        let (at, size) = (self.at + n as usize, size as usize);
        if at >= size {
            let over = at - size;
            Self {
                // The invariant holds whatever `n` is.
                at: if over < size { over } else { 0 },
                state: self.state ^ STATE,
            }
        } else {
            Self { at, state: self.state }
        }
    }

    /// One descriptor on.
    #[inline(always)]
    pub(crate) const fn next(self, size: u16) -> Self {
        let at = self.at + 1;
        if at == size as usize {
            self.next_lap()
        } else {
            Self { at, state: self.state }
        }
    }

    /// Apart, so that the loops have a jump that is hardly ever taken instead of two selections.
    #[cold]
    const fn next_lap(self) -> Self {
        Self {
            at: 0,
            state: self.state ^ STATE,
        }
    }

    /// `n` descriptors back, at most once round.
    pub(crate) const fn retreat(self, n: u16, size: u16) -> Self {
        let (n, size) = (n as usize, size as usize);
        if n > self.at {
            Self {
                at: (self.at + size).saturating_sub(n) % size,
                state: self.state ^ STATE,
            }
        } else {
            Self {
                at: self.at - n,
                state: self.state,
            }
        }
    }
}

/// The state and the ID of a descriptor's second word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Word(u64);

impl Word {
    /// Does a descriptor's word have that state and that ID?
    #[inline(always)]
    pub(crate) const fn is_in(self, meta: Meta) -> bool {
        const ID: u64 = (u16::MAX as u64) << 32;
        (meta.0 ^ self.0) & (STATE | ID) == 0
    }

    /// With a length and flags. The flags are none of the state's.
    #[inline(always)]
    pub(crate) const fn with(self, len: u32, flags: u16) -> Meta {
        Meta(self.0 | len as u64 | (flags as u64) << 48)
    }
}

/// What an event suppression structure says (§2.8.10, §2.8.14).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// `RING_EVENT_FLAGS_ENABLE`.
    Enable,
    /// `RING_EVENT_FLAGS_DISABLE`.
    Disable,
    /// `RING_EVENT_FLAGS_DESC`: for the descriptor at this offset, with this wrap counter in bit 15.
    Desc(u16),
}

impl Event {
    const DISABLE: u32 = 1;
    const DESC: u32 = 2;

    /// As `desc | flags << 16`. The reserved value counts as "enable": a notification too many does no harm.
    #[inline(always)]
    pub(crate) const fn from_word(word: u32) -> Self {
        match word >> 16 & 3 {
            Self::DISABLE => Self::Disable,
            Self::DESC => Self::Desc(word as u16),
            _ => Self::Enable,
        }
    }

    #[inline(always)]
    pub(crate) const fn word(self) -> u32 {
        match self {
            Self::Enable => 0,
            Self::Disable => Self::DISABLE << 16,
            Self::Desc(off_wrap) => off_wrap as u32 | Self::DESC << 16,
        }
    }

    /// Is a notification wanted, now that the `count` descriptors before `cursor` changed?
    #[inline(always)]
    pub(crate) const fn wants(self, cursor: Cursor, count: u32, size: u16) -> bool {
        match self {
            Self::Enable => true,
            Self::Disable => false,
            Self::Desc(off_wrap) => {
                // In descriptors from the start of the cursor's lap: the other counter means the lap before.
                let lap = if (off_wrap >> 15 != 0) == cursor.wrap() {
                    0
                } else {
                    size as i32
                };
                let event = (off_wrap & 0x7fff) as i32 - lap;
                let new = cursor.at as i32;
                // More than a lap says nothing about one descriptor any more.
                count > size as u32 || (event < new && event >= new - count as i32)
            }
        }
    }
}

/// The structures as they lie in memory (§2.8.13, §2.8.14). Never instantiated: sizes and offsets only.
pub(crate) mod wire {
    use core::mem::{align_of, offset_of, size_of};
    use static_assertions::const_assert_eq;

    /// `struct pvirtq_desc`.
    #[repr(C, align(16))]
    pub(crate) struct Desc {
        pub(crate) addr: u64,
        pub(crate) len: u32,
        pub(crate) id: u16,
        pub(crate) flags: u16,
    }

    /// `struct pvirtq_event_suppress`.
    #[repr(C, align(4))]
    pub(crate) struct Event {
        pub(crate) desc: u16,
        pub(crate) flags: u16,
    }

    const_assert_eq!(size_of::<Desc>(), 16);
    const_assert_eq!(align_of::<Desc>(), 16);
    const_assert_eq!(offset_of!(Desc, addr), 0);
    const_assert_eq!(offset_of!(Desc, len), 8);
    const_assert_eq!(offset_of!(Desc, id), 12);
    const_assert_eq!(offset_of!(Desc, flags), 14);
    const_assert_eq!(size_of::<Event>(), 4);
    const_assert_eq!(align_of::<Event>(), 4);
    const_assert_eq!(offset_of!(Event, desc), 0);
    const_assert_eq!(offset_of!(Event, flags), 2);
}

/// Checks what §2.8 asks of a queue size and returns it: 2 to 32768, any number.
pub(crate) const fn check_size(size: u16) -> Result<u16, Error> {
    // A queue of one entry is legal in the specification, but a chain of two descriptors would never fit.
    if size >= 2 && size <= 1 << 15 {
        Ok(size)
    } else {
        Err(Error::PackedQueueSize(size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_goes_round() {
        for size in [2, 3, 7, 256, 32768u16] {
            let start = Cursor::available(0, true, size);
            let mut cursor = start;
            for i in 0..2 * u32::from(size) {
                assert_eq!(cursor.position() as u32, i % u32::from(size));
                assert_eq!(cursor.wrap(), i < u32::from(size));
                let flags = Meta(cursor.state).flags();
                assert_eq!(flags, if cursor.wrap() { DESC_F_AVAIL } else { DESC_F_USED });
                assert_eq!(cursor.next(size), cursor.advance(1, size));
                assert_eq!(cursor.next(size).retreat(1, size), cursor);
                cursor = cursor.next(size);
            }
            assert_eq!(cursor, start);
            assert_eq!(start.advance(size, size).wrap(), !start.wrap());
            assert_eq!(start.advance(size, size).retreat(size, size), start);
        }
    }

    #[test]
    fn states_are_told_apart() {
        for wrap in [false, true] {
            let (available, used) = (Cursor::available(3, wrap, 8), Cursor::used(3, wrap, 8));
            assert_eq!((available.wrap(), used.wrap()), (wrap, wrap));
            let [a, u] = [available, used].map(|cursor| Meta::new(7, 5, 2).at(cursor));
            assert_eq!((a.len(), a.id(), a.flags() & 2), (7, 5, 2));
            assert!(available.matches(a) && !available.matches(u) && used.matches(u) && !used.matches(a));
            // The same descriptor a lap later is in neither state of that lap.
            let (later, used_later) = (available.advance(8, 8), used.advance(8, 8));
            assert!(!later.matches(a) && !later.matches(u) && !used_later.matches(a) && !used_later.matches(u));
        }
    }

    #[test]
    fn the_event_is_in_the_span_or_not() {
        // Against counting, over two laps from every start, for every event of these laps.
        for size in [2u16, 5, 8] {
            let laps = 2 * u32::from(size);
            for to in laps..2 * laps {
                for count in 1..=u32::from(size) {
                    let cursor = (0..to).fold(Cursor::used(0, true, size), |cursor, _| cursor.next(size));
                    for event in 0..laps {
                        let off = (event % u32::from(size)) as u16 | u16::from(event < u32::from(size)) << 15;
                        let counted = (to - count..to).any(|i| i % laps == event);
                        assert_eq!(
                            Event::Desc(off).wants(cursor, count, size),
                            counted,
                            "{size} {to} {count} {event}"
                        );
                    }
                }
            }
        }
        for event in [Event::Enable, Event::Disable, Event::Desc(0x8007)] {
            assert_eq!(Event::from_word(event.word()), event);
        }
        assert_eq!(Event::from_word(3 << 16), Event::Enable);
    }
}
