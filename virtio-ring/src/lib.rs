#![doc = include_str!("../README.md")]
#![cfg_attr(not(loom), no_std)]

pub mod any;
mod error;
mod features;
pub mod net;
pub mod packed;
mod segment;
mod shared;
pub mod split;
#[cfg_attr(loom, allow(dead_code, reason = "loom models scalar accesses"))]
mod vectors;
mod walk;

pub use error::{Anomalies, Error, Fault};
pub use features::{Features, Options};
pub use segment::{
    Chain, Completion, Direction, Head, Part, Popped, Segment, Single, Slot, Table, Translate, Verdict, Window,
};
pub use vectors::Vectors;
