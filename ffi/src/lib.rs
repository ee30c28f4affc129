//! libusernic: ports, queues and bursts for C. The header is made from this crate: `include/usernic.h`.
//!
//! Nothing of the logic is here. What is: handles, checks of what C hands in, errors as numbers with a text, and frames
//! as C sees them.
//!
//! # The layers
//!
//! | file | what it is |
//! |---|---|
//! | `status` | error codes, the calling thread's message, the shield that no panic passes |
//! | `check` | pointers, texts and sizes that C hands in |
//! | `table` | handles: numbers with a generation, checked at each call, one user at a time |
//! | `frame` | a packet as C sees it, and what C made of it |
//! | `port`, `queue`, `burst` | the calls |
//! | `lent` | ports over the caller's memory |
//!
//! # What is checked
//!
//! Handles: null, never made, closed, of another kind, in use by another thread. Pointers: null and misaligned ones.
//! Lengths, indices, texts, and every field of a frame. What cannot be checked is whether a pointer that is neither null
//! nor misaligned leads to as much memory of the caller as was said.

mod burst;
mod check;
mod frame;
mod lent;
mod port;
mod queue;
mod status;
mod table;

pub use burst::*;
pub use frame::*;
pub use lent::*;
pub use port::*;
pub use queue::*;
pub use status::*;
