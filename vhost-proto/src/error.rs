//! What can be wrong with a message, or with when it comes.

use core::fmt;

/// Why a connection is dead. The machine that returned it takes nothing more, and has dropped every descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The header's version is not 1.
    Version {
        /// Its flags.
        flags: u32,
    },
    /// No message has this number.
    Unknown {
        /// The number.
        code: u32,
    },
    /// The payload is longer than any message's.
    Oversized {
        /// The message.
        name: &'static str,
        /// Bytes announced.
        size: u32,
    },
    /// The payload does not have the message's length.
    Size {
        /// The message.
        name: &'static str,
        /// Bytes announced.
        size: u32,
    },
    /// Fewer descriptors came than the message needs.
    MissingFd {
        /// The message.
        name: &'static str,
        /// How many came.
        given: usize,
        /// How many it needs.
        needed: usize,
    },
    /// More descriptors came than the message takes.
    SurplusFd {
        /// The message.
        name: &'static str,
        /// How many came.
        given: usize,
        /// How many it takes.
        taken: usize,
    },
    /// Descriptors came with bytes in the middle of a message, or more than any message takes.
    StrayFd,
    /// The connection ended in the middle of a message.
    Truncated {
        /// Bytes of it that came.
        have: usize,
    },
    /// A reply came where a request belongs.
    ReplyToNothing {
        /// The number in it.
        code: u32,
    },
    /// A request came where a reply belongs.
    NotAReply {
        /// The message that waits for its reply.
        name: &'static str,
    },
    /// The reply is for another message.
    OtherReply {
        /// The message that waits for its reply.
        name: &'static str,
        /// The number in the reply.
        code: u32,
    },
    /// The message needs a feature that was not negotiated.
    NotNegotiated {
        /// The message.
        name: &'static str,
        /// The feature.
        feature: &'static str,
    },
    /// Features that were not offered.
    Features {
        /// The message.
        name: &'static str,
        /// The features that were not offered.
        surplus: u64,
    },
    /// The message is not one for now.
    Untimely {
        /// The message.
        name: &'static str,
        /// What was to come before it.
        before: &'static str,
    },
    /// There is no such ring.
    Ring {
        /// The message.
        name: &'static str,
        /// The ring.
        index: u32,
    },
    /// What the message changes cannot change while the ring runs.
    Running {
        /// The message.
        name: &'static str,
        /// The ring.
        index: u16,
    },
    /// A value that the message does not take.
    Value {
        /// The message.
        name: &'static str,
        /// The value.
        value: u64,
    },
    /// The other side answered that it could not do what was asked.
    Refused {
        /// The message.
        name: &'static str,
        /// Its answer, not 0.
        code: u64,
    },
    /// The message is of a device or feature that this back-end does not have.
    Unsupported {
        /// The message.
        name: &'static str,
    },
    /// The connection was dead already.
    Dead,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Error::Version { flags } => write!(f, "message flags {flags:#x}: the version is not 1"),
            Error::Unknown { code } => write!(f, "message {code} is unknown"),
            Error::Oversized { name, size } => write!(f, "{name} announces {size} bytes, more than any message has"),
            Error::Size { name, size } => write!(f, "{name} announces {size} bytes, which is not its length"),
            Error::MissingFd { name, given, needed } => {
                write!(f, "{name} came with {given} of {needed} file descriptors")
            }
            Error::SurplusFd { name, given, taken } => {
                write!(f, "{name} came with {given} file descriptors and takes {taken}")
            }
            Error::StrayFd => f.write_str("file descriptors came with no message that takes them"),
            Error::Truncated { have } => write!(f, "the connection ended {have} bytes into a message"),
            Error::ReplyToNothing { code } => write!(f, "a reply to message {code} came, which nobody waits for"),
            Error::NotAReply { name } => write!(f, "a request came in place of the reply to {name}"),
            Error::OtherReply { name, code } => {
                write!(f, "the reply to message {code} came in place of that to {name}")
            }
            Error::NotNegotiated { name, feature } => write!(f, "{name} came although {feature} was not negotiated"),
            Error::Features { name, surplus } => write!(f, "{name} has features that were not offered: {surplus:#x}"),
            Error::Untimely { name, before } => write!(f, "{name} came before {before}"),
            Error::Ring { name, index } => write!(f, "{name} names ring {index}, which there is not"),
            Error::Running { name, index } => write!(
                f,
                "{name} changes ring {index} while it runs: it has to be stopped first (GET_VRING_BASE)"
            ),
            Error::Value { name, value } => write!(f, "{name} has the value {value:#x}, which it does not take"),
            Error::Refused { name, code } => write!(f, "the other side refused {name} (it answered {code})"),
            Error::Unsupported { name } => write!(f, "{name} is for a device or feature that is not here"),
            Error::Dead => f.write_str("the connection is dead"),
        }
    }
}

impl core::error::Error for Error {}
