//! What can go wrong, and what was seen to go wrong.

use crate::message::{Api, Request};
use crate::regs::{MAX_QUEUES, MAX_VECTORS};
use core::fmt;

/// Why a call was refused or failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// Not a virtual function that this driver knows.
    UnknownDevice {
        /// The PCI vendor.
        vendor: u16,
        /// The PCI device.
        device: u16,
    },
    /// A variant that only guests of Hyper-V see, without a mailbox.
    HyperV {
        /// The PCI device.
        device: u16,
        /// Its name.
        name: &'static str,
    },
    /// Registers read as all ones: the device was removed, or its BAR is not enabled.
    Gone,
    /// The reset did not end: 10,000 looks at VFMAILBOX showed neither RSTI nor RSTD.
    ResetTimeout,
    /// The PF was reset, is in reset, or forgot this VF: nothing moves until [`Vf::reset`](crate::Vf::reset).
    PfReset,
    /// The PF did not let go of the mailbox.
    MailboxBusy(Request),
    /// The PF did not read the request.
    NoAck(Request),
    /// The PF did not answer the request.
    NoReply(Request),
    /// The PF answered with something else.
    BadReply {
        /// What was asked.
        request: Request,
        /// The first word of what came.
        word: u32,
    },
    /// The PF said no.
    Refused(Request),
    /// Not on this device, or not with this PF.
    Unsupported(Reason),
    /// Not a unicast address that an interface may have.
    Mac([u8; 6]),
    /// More addresses than fit.
    TooManyAddresses {
        /// How many were given.
        given: usize,
        /// How many there may be.
        limit: usize,
    },
    /// Not a VLAN: 0 to 4095.
    Vlan(u16),
    /// Not a maximum frame length: 64 to 9,728 bytes with the CRC.
    MaxFrame(u16),
    /// Not a number of queues that can be had: a power of two up to what the PF gives.
    QueueCount {
        /// How many were asked for.
        asked: usize,
        /// How many the PF gives.
        limit: u8,
    },
    /// No such queue.
    QueueIndex(u8),
    /// An entry of the RSS table names a queue that does not receive.
    RssTable {
        /// The index of the entry.
        entry: u8,
        /// The queue that it names.
        queue: u8,
    },
    /// Not a ring size: 64 to 8,192 descriptors, a multiple of 8.
    RingSize(u16),
    /// Descriptor memory must be aligned to 128 bytes, here and for the device.
    Misaligned(u64),
    /// The caller's shadow has fewer slots than the ring has descriptors.
    Slots {
        /// The ring size.
        needed: usize,
        /// The length of the slice.
        given: usize,
    },
    /// Not a length for receive buffers: 1,024 bytes or more.
    BufferLen(u32),
    /// Not a vector: 0 to 2.
    Vector(u8),
    /// A queue did not start or stop within 10 ms.
    QueueTimeout(u8),
    /// The queue was used before: [`detach_each`](crate::RxQueue::detach_each) it before it is started again.
    NotDetached(u8),
    /// Not enough free descriptors now; poll for completions and try again.
    Full,
    /// A frame needs at least one segment, and none may be empty.
    EmptySegment,
    /// A segment of more than 16,384 bytes.
    SegmentLen(u32),
    /// More segments than the device takes.
    TooManySegments(usize),
    /// Not a length that can be sent: 17 to 9,728 bytes, or 262,143 with segmentation.
    FrameLen(u64),
    /// Header lengths or fields of an [`Offload`](crate::Offload) that do not go together.
    Offload(&'static str),
}

/// Why something is not supported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reason {
    /// RSS key and table of an 82599 or X540 VF are the PF's: ask for them, or let the PF's administrator set them.
    RssIsThePfs,
    /// The VF has an RSS key and table of its own: the PF's say nothing about it.
    RssIsTheVfs,
    /// An 82599 PF never lets a VF be promiscuous.
    Promiscuous82599,
    /// The mailbox version does not have the message.
    Api {
        /// The first version that has it.
        needed: Api,
        /// What was negotiated.
        negotiated: Api,
    },
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::RssIsThePfs => {
                f.write_str("the RSS key and table of an 82599 or X540 VF are those of its PF and cannot be set")
            }
            Reason::RssIsTheVfs => f.write_str("this VF has an RSS key and table of its own"),
            Reason::Promiscuous82599 => f.write_str("an 82599 PF lets no VF be promiscuous"),
            Reason::Api { needed, negotiated } => {
                write!(f, "mailbox API {needed} is needed, the PF speaks {negotiated}")
            }
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::UnknownDevice { vendor, device } => {
                write!(
                    f,
                    "{vendor:04x}:{device:04x} is not a virtual function of an 82599, X540 or X550"
                )
            }
            Error::HyperV { device, name } => {
                write!(
                    f,
                    "8086:{device:04x} is an {name}, which has no mailbox and is not supported"
                )
            }
            Error::Gone => f.write_str("registers read as all ones: device removed, or memory access not enabled"),
            Error::ResetTimeout => f.write_str("the reset did not end within its limit: is the PF's driver loaded?"),
            Error::PfReset => f.write_str("the PF was reset or is in reset: reset the VF"),
            Error::MailboxBusy(request) => write!(f, "{request}: the PF keeps the mailbox"),
            Error::NoAck(request) => write!(f, "{request}: the PF did not read it: is its link or driver down?"),
            Error::NoReply(request) => write!(f, "{request}: the PF did not answer"),
            Error::BadReply { request, word } => write!(f, "{request}: unexpected answer {word:#010x}"),
            Error::Refused(request) => write!(f, "{request}: refused by the PF"),
            Error::Unsupported(reason) => reason.fmt(f),
            Error::Mac([a, b, c, d, e, g]) => {
                write!(
                    f,
                    "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x} is not a unicast address"
                )
            }
            Error::TooManyAddresses { given, limit } => write!(f, "{given} addresses: {limit} fit"),
            Error::Vlan(id) => write!(f, "VLAN {id}: 0 to 4095"),
            Error::MaxFrame(len) => write!(f, "frames of {len} bytes: 64 to 9728, with the CRC"),
            Error::QueueCount { asked, limit } => {
                write!(f, "{asked} queues: a power of two up to {limit} is needed")
            }
            Error::QueueIndex(index) => write!(f, "queue {index}: there are {MAX_QUEUES}"),
            Error::RssTable { entry, queue } => write!(f, "RSS table entry {entry}: queue {queue} does not receive"),
            Error::RingSize(size) => write!(f, "ring of {size}: 64 to 8192, a multiple of 8"),
            Error::Misaligned(address) => write!(f, "ring at {address:#x}: must be aligned to 128"),
            Error::Slots { needed, given } => write!(f, "the shadow has {given} slots, the ring needs {needed}"),
            Error::BufferLen(len) => write!(f, "receive buffers of {len} bytes: 1024 or more are needed"),
            Error::Vector(vector) => write!(f, "vector {vector}: there are {MAX_VECTORS}"),
            Error::QueueTimeout(index) => write!(f, "queue {index} did not start or stop within 10 ms"),
            Error::NotDetached(index) => write!(f, "queue {index} still has the state of its last run"),
            Error::Full => f.write_str("no free descriptors: poll for completions first"),
            Error::EmptySegment => f.write_str("a frame needs at least one segment and no segment may be empty"),
            Error::SegmentLen(len) => write!(f, "a segment of {len} bytes: 1 to 16384"),
            Error::TooManySegments(n) => write!(f, "{n} segments: the device takes 40"),
            Error::FrameLen(len) => write!(f, "a frame of {len} bytes cannot be sent"),
            Error::Offload(what) => f.write_str(what),
        }
    }
}

impl core::error::Error for Error {}

/// How often the device or the PF did what it must not, or nobody expected. Counts since the value was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Anomalies {
    /// Receive: a length above the buffer's, or 0. The buffer came back with length 0, as a bad frame.
    pub length: u64,
    /// Receive: a piece that is not the frame's last and does not fill its buffer. The frame was ended there, as bad.
    pub short_piece: u64,
    /// Receive: a frame of more than 9,728 bytes. It was ended there, as bad.
    pub overlong: u64,
    /// Mailbox: messages that were no answer to what was asked, pings among them.
    pub stray_message: u64,
    /// Mailbox: answers whose contents cannot be.
    pub answer: u64,
}
