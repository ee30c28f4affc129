//! What a driver did that hardware would let pass or leave undefined, and no driver should do.

use std::collections::BTreeMap;
use std::fmt;

/// Something that the datasheet forbids or gives no meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Complaint {
    /// An access to an offset without a register, or not of 4 aligned bytes.
    UnknownRegister,
    /// A write to a register that can only be read.
    ReadOnlyRegister,
    /// A register that this kind of device has not (RSS of a VF's own before X550).
    AbsentRegister,
    /// Mailbox memory written, or a request sent, without owning the mailbox.
    MailboxNotOwned,
    /// Base, length or head of a ring written while the queue works.
    RunningQueueChanged,
    /// A queue was enabled that the PF has not given to this VF.
    ForeignQueue,
    /// A ring whose base or length is not a multiple of 128 bytes, or that was enabled without a length or with more
    /// than 128 KiB.
    BadRing,
    /// Head or tail outside of the ring.
    BadIndex,
    /// A tail was written while the queue did not work.
    TailOfStoppedQueue,
    /// A transmit descriptor of a kind or with lengths that the datasheet forbids.
    BadTxDescriptor,
    /// A transmit packet without a context (CC clear, or none loaded): what malicious-driver detection stops.
    NoContext,
    /// A transmit packet of fewer than 17 bytes.
    ShortTxPacket,
    /// A receive queue works with a descriptor kind other than advanced, one buffer.
    BadRxDescriptorKind,
    /// A vector that does not exist, in VTIVAR.
    BadVector,
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::UnknownRegister => "access to no register",
            Self::ReadOnlyRegister => "write to a read-only register",
            Self::AbsentRegister => "access to a register that this device has not",
            Self::MailboxNotOwned => "mailbox used without owning it",
            Self::RunningQueueChanged => "ring changed while its queue works",
            Self::ForeignQueue => "queue enabled that belongs to another",
            Self::BadRing => "bad base or length of a ring",
            Self::BadIndex => "head or tail outside of the ring",
            Self::TailOfStoppedQueue => "tail written while the queue does not work",
            Self::BadTxDescriptor => "bad transmit descriptor",
            Self::NoContext => "transmit packet without context",
            Self::ShortTxPacket => "transmit packet too short",
            Self::BadRxDescriptorKind => "unknown kind of receive descriptor",
            Self::BadVector => "interrupt vector that does not exist",
        })
    }
}

/// Complaints, counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Complaints(BTreeMap<Complaint, u64>);

impl Complaints {
    pub(crate) fn add(&mut self, complaint: Complaint) {
        *self.0.entry(complaint).or_default() += 1;
    }

    /// How often.
    #[must_use]
    pub fn count(&self, complaint: Complaint) -> u64 {
        self.0.get(&complaint).copied().unwrap_or(0)
    }

    /// There are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Each kind that occurred, and how often.
    pub fn iter(&self) -> impl Iterator<Item = (Complaint, u64)> + '_ {
        self.0.iter().map(|(complaint, count)| (*complaint, *count))
    }
}

impl fmt::Display for Complaints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for (complaint, count) in self.iter() {
            write!(f, "{separator}{complaint}: {count}")?;
            separator = "; ";
        }
        Ok(())
    }
}
