//! Offloads in software: what a port whose other side cannot do them does itself, so that an application may always ask.
//!
//! Nothing here touches a ring. Each module works on plain bytes and takes whatever stands in them:
//!
//! | module | what |
//! |---|---|
//! | [`headers`] | where the headers of a frame begin and end |
//! | [`checksum`] | sums, completing and verifying checksums |
//! | [`segment`] | cutting a large packet into packets |
//! | [`hash`] | the hash of receive-side scaling, the indirection table |
//!
//! [`Hasher`] and [`Steering`] put the last to work on packets.

pub mod checksum;
pub mod hash;
pub mod headers;
pub mod segment;
mod steering;

pub use steering::{Hasher, Steering};
