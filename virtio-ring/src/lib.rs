#![doc = include_str!("../README.md")]
#![cfg_attr(not(loom), no_std)]

mod error;
mod features;
pub mod net;
mod segment;
mod shared;
pub mod split;

pub use error::{Anomalies, Error, Fault};
pub use features::Features;
pub use segment::{Chain, Completion, Direction, Head, Part, Popped, Segment, Slot, Translate};
