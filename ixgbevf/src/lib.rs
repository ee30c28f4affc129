#![doc = include_str!("../README.md")]
#![cfg_attr(not(test), no_std)]

mod access;
mod dma;
mod error;
mod interrupt;
mod mailbox;
mod message;
mod model;
mod offload;
mod received;
mod regs;
mod ring;
mod rx;
mod stats;
#[cfg(test)]
mod tests;
mod time;
mod tx;
mod vf;

pub use access::{Access, BAR_LEN, Bar, Registers};
pub use dma::Memory;
pub use error::{Anomalies, Error, Reason};
pub use interrupt::{Cause, Interrupts};
pub use message::{Api, Request, XcastMode, local_mac};
pub use model::{Model, VENDOR};
pub use offload::{L4, MIN_FRAME, Offload, Segmentation};
pub use received::{Checksum, HashType, PacketType, Received, Status};
pub use regs::{MAX_QUEUES, MAX_VECTORS, Row, TABLE};
pub use ring::{MAX_RING, MIN_RING, Segment, Slot, ring_len};
pub use rx::{RxOptions, RxQueue};
pub use stats::Statistics;
pub use time::Delay;
pub use tx::{MAX_SEGMENT, MAX_SEGMENTS, TxOptions, TxQueue};
pub use vf::{Event, HashFields, Limits, Link, Rss, Setup, Speed, Vf};

/// The longest frame.
pub const MAX_FRAME: u16 = 9728;
