//! Payloads, as they are on the wire. All are copied: nothing here points into a buffer.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

macro_rules! wire {
    ($(#[$meta:meta])* $name:ident, $size:literal { $($(#[$doc:meta])* $field:ident: $type:ty),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
        #[repr(C)]
        pub struct $name { $($(#[$doc])* pub $field: $type),* }

        static_assertions::const_assert_eq!(size_of::<$name>(), $size);
    };
}

wire! {
    /// A number: features, status, MTU, address, or a ring's index with flags.
    Number, 8 {
        /// The number.
        value: U64,
    }
}

wire! {
    /// A ring and a number (vring state description).
    VringState, 8 {
        /// The ring.
        index: U32,
        /// Size, base, or 1 for enabled.
        num: U32,
    }
}

wire! {
    /// Where a ring is (vring address description): addresses in the front-end's process.
    VringAddr, 40 {
        /// The ring.
        index: U32,
        /// Bit 0: log writes to the used ring.
        flags: U32,
        /// Descriptor table, or packed descriptors.
        descriptor: U64,
        /// Used ring, or the device's event suppression.
        used: U64,
        /// Available ring, or the driver's event suppression.
        available: U64,
        /// Where the used ring is for the log.
        log: U64,
    }
}

wire! {
    /// A region of memory (memory region description).
    MemoryRegion, 32 {
        /// The address that descriptors use.
        guest_addr: U64,
        /// Bytes.
        size: U64,
        /// The address that ring addresses use.
        user_addr: U64,
        /// Where it begins in the file.
        mmap_offset: U64,
    }
}

wire! {
    /// One region, behind padding (single memory region description).
    SingleRegion, 40 {
        /// Not used.
        padding: U64,
        /// The region.
        region: MemoryRegion,
    }
}

wire! {
    /// How many regions follow.
    TableHead, 8 {
        /// Regions, at most 8.
        count: U32,
        /// Not used.
        padding: U32,
    }
}

wire! {
    /// The memory of the dirty log (log description).
    Log, 16 {
        /// Bytes.
        size: U64,
        /// Where it begins in the file.
        offset: U64,
    }
}

wire! {
    /// A piece of the configuration space (virtio device config space); its bytes follow.
    ConfigHead, 12 {
        /// The first byte.
        offset: U32,
        /// Bytes.
        size: U32,
        /// 0: writable fields, 1: migration.
        flags: U32,
    }
}

wire! {
    /// The memory in which buffers in flight are tracked (inflight description): 20 bytes in the specification, padded to
    /// 24 by peers that send a C structure. Both are taken; 24 are sent.
    Inflight, 24 {
        /// Bytes.
        mmap_size: U64,
        /// Where it begins in the file.
        mmap_offset: U64,
        /// Rings.
        num_queues: U16,
        /// Descriptors of each.
        queue_size: U16,
        /// Not used.
        padding: U32,
    }
}

wire! {
    /// An entry of the I/O translation buffer.
    Iotlb, 32 {
        /// Device address.
        iova: U64,
        /// Bytes.
        size: U64,
        /// Address in the front-end's process.
        user_addr: U64,
        /// 1 read, 2 write, 3 both.
        permissions: u8,
        /// 1 miss, 2 update, 3 invalidate, 4 access failed.
        kind: u8,
        /// Not used.
        padding: [u8; 6],
    }
}

wire! {
    /// Where a guest can notify the device itself (vring area description).
    VringArea, 24 {
        /// The ring in bits 0 to 7; bit 8: there is no descriptor.
        ring: U64,
        /// Bytes.
        size: U64,
        /// Where the area begins in the file.
        offset: U64,
    }
}

wire! {
    /// An object that devices share (VhostUserShared).
    SharedObject, 16 {
        /// Its UUID.
        uuid: [u8; 16],
    }
}

wire! {
    /// A mapping in a shared memory region of the device (VhostUserMMap).
    Mmap, 40 {
        /// The shared memory region.
        shmid: u8,
        /// Not used.
        padding: [u8; 7],
        /// Where the mapping begins in the file.
        fd_offset: U64,
        /// Where it begins in the region.
        shm_offset: U64,
        /// Bytes.
        len: U64,
        /// Bit 0: writable.
        flags: U64,
    }
}

/// Bit 8 of a kick, call or error message: no descriptor comes with it.
pub const NO_FD: u64 = 1 << 8;

/// Bits 0 to 7: the ring.
pub const RING_MASK: u64 = 0xFF;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_on_the_wire() {
        let region = MemoryRegion {
            guest_addr: 0x1122.into(),
            size: 0x20_0000.into(),
            user_addr: 0x7f00_0000_0000.into(),
            mmap_offset: 0x1000.into(),
        };
        let bytes = [
            0x22, 0x11, 0, 0, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x7f, 0, 0, 0, 0x10, 0, 0, 0, 0, 0,
            0,
        ];
        assert_eq!(region.as_bytes(), bytes);
        assert_eq!(MemoryRegion::read_from_bytes(&bytes), Ok(region));
    }

    #[test]
    fn a_ring_address_on_the_wire() {
        let addr = VringAddr {
            index: 1.into(),
            flags: 0.into(),
            descriptor: 2.into(),
            used: 3.into(),
            available: 4.into(),
            log: 5.into(),
        };
        let mut bytes = [0u8; 40];
        (bytes[0], bytes[8], bytes[16], bytes[24], bytes[32]) = (1, 2, 3, 4, 5);
        assert_eq!(addr.as_bytes(), bytes);
    }
}
