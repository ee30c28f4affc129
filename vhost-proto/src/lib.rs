#![no_std]
#![forbid(unsafe_code)]
#![doc = include_str!("../README.md")]

mod backend;
pub mod channel;
mod error;
mod frontend;
pub mod message;
pub mod payload;
mod stream;

pub use backend::{Backend, Event, MAX_RINGS, Offer, Outcome, RingSetup, Step};
pub use error::Error;
pub use frontend::{Command, Frontend, Region, Reply, RingAddr};
pub use message::{F_PROTOCOL_FEATURES, ProtocolFeatures, Request};
pub use stream::Outgoing;
