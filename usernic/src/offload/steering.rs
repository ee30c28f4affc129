//! Which queue pair a frame belongs on, by the hash that the receiver of the frame asked for (virtio 1.3, 5.1.6.5.7).

use virtio_ring::net::{HashReport, HashTypes};

use super::hash::{Indirection, KEY_LEN, Toeplitz};
use crate::packet::Packet;

/// A hash key, and what to hash with it.
#[derive(Clone)]
pub struct Hasher {
    toeplitz: Toeplitz,
    types: HashTypes,
}

impl Hasher {
    /// Hashes packets of these types with this key.
    pub fn new(key: &[u8; KEY_LEN], types: HashTypes) -> Self {
        Hasher {
            toeplitz: Toeplitz::new(key),
            types,
        }
    }

    /// The hash of a packet, and over what it is.
    #[inline]
    pub fn of(&self, packet: &Packet) -> (u32, HashReport) {
        packet.hash(&self.toeplitz, self.types)
    }
}

/// Receive-side scaling as the front-end of a `vhost` port set it up: see [`Port::steering`](crate::Port::steering).
#[derive(Clone)]
pub struct Steering {
    hasher: Hasher,
    table: Indirection,
}

impl Steering {
    /// Steers by this hash and this table.
    pub fn new(hasher: Hasher, table: Indirection) -> Self {
        Steering { hasher, table }
    }

    /// The queue pair that a packet belongs on.
    #[inline]
    pub fn pair(&self, packet: &Packet) -> u16 {
        let (hash, report) = self.hasher.of(packet);
        self.table.pair(hash, report)
    }
}
