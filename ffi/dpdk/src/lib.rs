//! The Rust half of `librte_net_usernic.so`: rings, connections, devices. `net_usernic.h` has the interface to the C half, which
//! is DPDK's side: ethdev operations, memory, mempools.
//!
//! A burst is one call from DPDK to [`usernic_pmd_rx`](rx::usernic_pmd_rx) or [`usernic_pmd_tx`](tx::usernic_pmd_tx):
//! there is no C between. mbufs go into the rings as they are, by the offsets of their fields. Calls back into C are made
//! for mbufs by the dozen ([`abi::Calls::get`], [`abi::Calls::put`]), and for frames that are anything but plain.
#![deny(clippy::unwrap_used, clippy::expect_used)]

pub mod abi;
mod control;
mod counts;
mod log;
mod mbuf;
mod port;
pub mod rx;
mod setup;
mod socket;
pub mod tx;
mod vf;
mod wake;

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may end so")]
mod tests;
