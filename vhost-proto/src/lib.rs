#![no_std]
#![forbid(unsafe_code)]
//! The vhost-user protocol, without sockets.
//!
//! [vhost-user](https://www.qemu.org/docs/master/interop/vhost-user.html) hands virtio rings in shared memory from a
//! front-end, which owns them, to a back-end, which processes them, over a Unix socket that carries file descriptors.
//! This crate knows every message in both directions, what must be in it and when it may come. It reads and writes
//! nothing by itself: bytes and descriptors go in, bytes and events come out.
//!
//! | module | what it is |
//! |---|---|
//! | [`message`] | numbers, names, lengths, descriptors and answers of all messages; protocol features |
//! | [`payload`] | what is on the wire |
//! | [`Frontend`] | commands out, replies in |
//! | [`Backend`] | messages in, events out |
//! | [`channel`] | the second socket, on which the back-end asks |
//!
//! The descriptor type `F` is the caller's: `OwnedFd`, or a number in a test. Dropping it must close it. Whatever goes
//! wrong, the machine drops every descriptor that it holds and takes nothing more.
//!
//! # Example
//!
//! A front-end and a back-end, and a wire of bytes between them:
//!
//! ```
//! use vhost_proto::{Backend, Command, Frontend, Offer, ProtocolFeatures, Reply, Step};
//!
//! let offer = Offer { features: 1 << 32, protocol: ProtocolFeatures::MQ, rings: 4, queue_num: 2, mem_slots: 8 };
//! let (mut front, mut back) = (Frontend::<u32>::new(), Backend::<u32>::new(offer));
//!
//! let (question, answered) = front.command(Command::GetFeatures, false)?;
//! assert!(answered);
//! let mut bytes = question.bytes();
//! let answer = loop {
//!     let (piece, rest) = bytes.split_at(back.wants().min(bytes.len()));
//!     bytes = rest;
//!     if let Step::Quiet(Some(answer)) = back.receive(piece, [])? {
//!         break answer;
//!     }
//! };
//! let mut bytes = answer.bytes();
//! let reply = loop {
//!     let (piece, rest) = bytes.split_at(front.wants().min(bytes.len()));
//!     bytes = rest;
//!     if let Some(reply) = front.receive(piece, [])? {
//!         break reply;
//!     }
//! };
//! assert!(matches!(reply, Reply::Features(features) if features == 1 << 32 | 1 << 30));
//! # Ok::<(), vhost_proto::Error>(())
//! ```

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
