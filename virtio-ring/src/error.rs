//! What can go wrong, and what was seen to go wrong.

use core::fmt;

/// Why a call was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The size of a split queue is not a power of two from 2 to 32768 (§2.7).
    QueueSize(u16),
    /// The size of a packed queue is not 2 to 32768 (§2.8).
    PackedQueueSize(u16),
    /// A part of the ring does not lie where [virtio 1.3 §2.7] wants it.
    ///
    /// [virtio 1.3 §2.7]: https://docs.oasis-open.org/virtio/virtio/v1.3/virtio-v1.3.html
    Misaligned {
        /// Where the part is.
        address: usize,
        /// What it must be a multiple of.
        align: usize,
    },
    /// The caller's shadow has fewer slots than the queue has entries.
    Slots {
        /// The queue size.
        needed: usize,
        /// The length of the slice.
        given: usize,
    },
    /// The ring's indices in memory contradict the base given, so that some buffers would be completed twice.
    Base {
        /// The base given.
        base: u16,
        /// `used.idx` as it was found.
        used: u16,
    },
    /// A base of a packed ring with an offset outside it.
    PackedBase {
        /// The base given, as [`packed::Base`](crate::packed::Base) encodes it.
        base: u32,
        /// The queue size.
        size: u16,
    },
    /// A packed ring does not tell where the device before stopped ([`packed::recover`](crate::packed::recover)).
    NoBase,
    /// Not enough free descriptors now; poll for completions and try again.
    Full,
    /// A chain needs at least one segment, and none may be empty.
    EmptySegment,
    /// A chain with more segments than the queue (or the indirect table) has entries, or with 2^32 bytes or more
    /// (§2.7.5.1, §2.7.5.3.1).
    TooLong,
    /// Indirect tables were not negotiated.
    NotNegotiated,
    /// The other side jumped its index beyond what is possible, or named a chain that cannot be: nothing it says can
    /// be trusted any more. Only a reset helps.
    Broken,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::QueueSize(size) => {
                write!(f, "queue size {size}: a power of two from 2 to 32768 is needed")
            }
            Error::PackedQueueSize(size) => {
                write!(f, "packed queue size {size}: 2 to 32768 is needed")
            }
            Error::PackedBase { base, size } => {
                write!(
                    f,
                    "base {base:#010x} of a packed ring is outside its {size} descriptors"
                )
            }
            Error::Misaligned { address, align } => {
                write!(f, "ring part at {address:#x} is not aligned to {align} bytes")
            }
            Error::Slots { needed, given } => {
                write!(f, "the shadow has {given} slots, the queue needs {needed}")
            }
            Error::Base { base, used } => {
                write!(
                    f,
                    "available base {base} is more than a queue ahead of used index {used}"
                )
            }
            Error::NoBase => f.write_str("the packed ring does not tell where the device before stopped: reset it"),
            Error::Full => f.write_str("no free descriptors: poll for completions first"),
            Error::EmptySegment => f.write_str("a chain needs at least one segment and no segment may be empty"),
            Error::TooLong => f.write_str("the chain has more segments than the queue or table, or 2^32 bytes or more"),
            Error::NotNegotiated => f.write_str("indirect descriptors were not negotiated"),
            Error::Broken => f.write_str("the other side broke the ring: reset it"),
        }
    }
}

impl core::error::Error for Error {}

/// What is wrong with a chain that the driver side made available. The device hands such a chain out empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// `next` names a descriptor outside the table.
    NextOutOfRange,
    /// More descriptors than the queue has entries, which is what a loop looks like too (§2.7.5.1).
    TooManyDescriptors,
    /// More parts than the caller's storage holds: segments, and borders between regions inside of them.
    TooManySegments,
    /// 2^32 bytes or more (§2.7.5.1).
    TooManyBytes,
    /// An indirect descriptor although the feature was not negotiated (§2.7.5.3.1).
    IndirectNotNegotiated,
    /// An indirect descriptor inside an indirect table (§2.7.5.3.1).
    IndirectInIndirect,
    /// Both INDIRECT and NEXT (§2.7.5.3.1); packed: an indirect table among other descriptors (§2.8.5).
    IndirectWithNext,
    /// An indirect table whose length is zero or not a multiple of 16.
    IndirectSize,
    /// An indirect table with more entries than the queue (§2.7.5.3.1).
    IndirectTooLarge,
    /// A device-readable segment behind a device-writable one (§2.7.4.2).
    ReadableAfterWritable,
    /// A segment of no bytes.
    ZeroLength,
    /// An address that the caller's [`Translate`](crate::Translate) does not know, of a segment or of an indirect table.
    Untranslated,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Fault::NextOutOfRange => "next is outside the descriptor table",
            Fault::TooManyDescriptors => "chain is longer than the queue, or loops",
            Fault::TooManySegments => "chain has more segments than the storage",
            Fault::TooManyBytes => "chain has 2^32 bytes or more",
            Fault::IndirectNotNegotiated => "indirect descriptor without the feature",
            Fault::IndirectInIndirect => "indirect descriptor in an indirect table",
            Fault::IndirectWithNext => "descriptor is both indirect and chained",
            Fault::IndirectSize => "indirect table's length is zero or not a multiple of 16",
            Fault::IndirectTooLarge => "indirect table is larger than the queue",
            Fault::ReadableAfterWritable => "device-readable segment after a device-writable one",
            Fault::ZeroLength => "segment of zero length",
            Fault::Untranslated => "address outside the memory that was shared",
        })
    }
}

impl core::error::Error for Fault {}

/// How often the other side did what it must not. Each is a count since the queue was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Anomalies {
    /// Driver: a used id outside the table. Split: the element was dropped. Packed: the ring is broken.
    pub id_out_of_range: u64,
    /// Driver: a used id that is not the head of a chain in flight. Split: the element was dropped. Packed: the ring is
    /// broken.
    pub id_not_in_flight: u64,
    /// Driver, IN_ORDER: a used id that is not among the chains completed now (§2.7.9) or in flight (§2.8.8). The ring is
    /// broken.
    pub out_of_order: u64,
    /// Driver: a used length above what was posted for writing. The buffer was handed back with length 0.
    pub length: u64,
    /// Either side: the other's index moved by more than it can; packed device: more descriptors are available than the
    /// ring has. The ring is broken.
    pub index_jump: u64,
    /// Device: a head in the available ring that is outside the table. The ring is broken: the chain has no name
    /// under which to complete it.
    pub head_out_of_range: u64,
    /// Device: chains handed out empty, for any [`Fault`].
    pub chain: u64,
}

impl Anomalies {
    /// The sum of all counts.
    pub const fn total(&self) -> u64 {
        self.id_out_of_range
            + self.id_not_in_flight
            + self.out_of_order
            + self.length
            + self.index_jump
            + self.head_out_of_range
            + self.chain
    }
}
