//! mbufs, by the offsets of their fields.
//!
//! DPDK's header cannot be read here, so that the offsets are written a second time: `net_usernic.h` asserts each of them
//! against `struct rte_mbuf` when the C half is compiled. Fields of the second cache line are left to C, where they are
//! needed rarely: `next` is in the one or the other line, by how DPDK was built.

use std::ptr::NonNull;

/// `buf_addr`: where the buffer begins.
const BUF_ADDR: usize = 0;
/// `rearm_data`: `data_off`, `refcnt`, `nb_segs`, `port`, 16 bits each.
const REARM: usize = 16;
/// `ol_flags`.
const OL_FLAGS: usize = 24;
/// `packet_type`, 32 bits; `pkt_len` behind it, 32 bits.
const PACKET_TYPE: usize = 32;
/// `pkt_len`.
const PKT_LEN: usize = 36;
/// `data_len`, 16 bits; `vlan_tci`, 16 bits, and the hash, 32 bits, behind it.
const DATA_LEN: usize = 40;
/// `pool`.
const POOL: usize = 56;

/// `refcnt` and `nb_segs` in the word at [`REARM`], of an mbuf that is nobody else's and the only one of its frame.
const ALONE: u32 = 0x0001_0001;

/// What is said of received frames (RTE_MBUF_F_RX_*).
pub(crate) mod flag {
    pub(crate) const VLAN: u64 = 1 << 0;
    pub(crate) const RSS_HASH: u64 = 1 << 1;
    pub(crate) const L4_BAD: u64 = 1 << 3;
    pub(crate) const IP_BAD: u64 = 1 << 4;
    pub(crate) const VLAN_STRIPPED: u64 = 1 << 6;
    pub(crate) const IP_GOOD: u64 = 1 << 7;
    pub(crate) const L4_GOOD: u64 = 1 << 8;
}

/// Headers of a frame (RTE_PTYPE_*).
pub(crate) mod ptype {
    pub(crate) const L2_ETHER: u32 = 0x1;
    pub(crate) const L3_IPV4: u32 = 0x10;
    pub(crate) const L3_IPV4_EXT: u32 = 0x30;
    pub(crate) const L3_IPV6: u32 = 0x40;
    pub(crate) const L3_IPV6_EXT: u32 = 0xc0;
    pub(crate) const L4_TCP: u32 = 0x100;
    pub(crate) const L4_UDP: u32 = 0x200;
    pub(crate) const L4_SCTP: u32 = 0x400;
}

/// RTE_MBUF_F_INDIRECT and RTE_MBUF_F_EXTERNAL: the buffer is another mbuf's, or nobody's.
pub(crate) const ATTACHED: u64 = 1 << 62 | 1 << 61;

/// An mbuf that belongs to the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Mbuf(NonNull<u8>);

impl Mbuf {
    /// # Safety
    /// It is an mbuf, and the caller's.
    #[inline(always)]
    pub(crate) unsafe fn new(mbuf: *mut u8) -> Self {
        // SAFETY: by the caller.
        Mbuf(unsafe { NonNull::new_unchecked(mbuf) })
    }

    /// The mbuf that a cookie of a ring stands for.
    ///
    /// # Safety
    /// The cookie is of [`cookie`](Mbuf::cookie), and the ring gave it back.
    #[inline(always)]
    pub(crate) unsafe fn of(cookie: u64) -> Self {
        // SAFETY: by the caller.
        unsafe { Self::new(cookie as *mut u8) }
    }

    #[inline(always)]
    pub(crate) fn cookie(self) -> u64 {
        self.0.as_ptr() as u64
    }

    #[inline(always)]
    pub(crate) fn pointer(self) -> *mut u8 {
        self.0.as_ptr()
    }

    #[inline(always)]
    fn field<T: Copy>(self, offset: usize) -> T {
        // SAFETY: the fields are inside the mbuf, aligned to their size, and the mbuf is ours.
        unsafe { self.0.add(offset).cast::<T>().read() }
    }

    #[inline(always)]
    fn set<T: Copy>(self, offset: usize, value: T) {
        // SAFETY: as in `field`.
        unsafe { self.0.add(offset).cast::<T>().write(value) };
    }

    #[inline(always)]
    pub(crate) fn buffer(self) -> u64 {
        self.field(BUF_ADDR)
    }

    /// `data_off`, `refcnt`, `nb_segs`, `port`.
    #[inline(always)]
    pub(crate) fn rearm(self) -> u64 {
        self.field(REARM)
    }

    #[inline(always)]
    pub(crate) fn flags(self) -> u64 {
        self.field(OL_FLAGS)
    }

    /// Whether nobody else refers to it and it is a whole frame.
    #[inline(always)]
    pub(crate) fn is_alone(self) -> bool {
        (self.rearm() >> 16) as u32 == ALONE
    }

    /// Bytes before the data.
    #[inline(always)]
    pub(crate) fn headroom(self) -> u16 {
        self.rearm() as u16
    }

    #[inline(always)]
    pub(crate) fn address(self) -> u64 {
        self.buffer() + u64::from(self.headroom())
    }

    #[inline(always)]
    pub(crate) fn data_len(self) -> u16 {
        self.field(DATA_LEN)
    }

    #[inline(always)]
    pub(crate) fn pkt_len(self) -> u32 {
        self.field(PKT_LEN)
    }

    #[inline(always)]
    pub(crate) fn pool(self) -> *mut u8 {
        self.field(POOL)
    }

    /// What `rte_pktmbuf_reset()` and a received frame of `len` bytes make of it, without a look at what was there.
    #[inline(always)]
    pub(crate) fn received(self, rearm: u64, flags: u64, len: u32) {
        self.set(REARM, [rearm, flags]);
        // packet_type: not known. pkt_len. data_len, vlan_tci, hash.
        self.set(PACKET_TYPE, [u64::from(len) << 32, u64::from(len as u16)]);
    }

    /// The same with what a device says of the frame: headers, VLAN tag, hash.
    #[inline(always)]
    pub(crate) fn arrived(self, rearm: u64, flags: u64, ptype: u32, len: u32, tag: u16, hash: u32) {
        self.set(REARM, [rearm, flags]);
        let lens = u64::from(len as u16) | u64::from(tag) << 16 | u64::from(hash) << 32;
        self.set(PACKET_TYPE, [u64::from(ptype) | u64::from(len) << 32, lens]);
    }

    /// Takes over what was said in the last segment of its frame: all that [`arrived`](Mbuf::arrived) sets but lengths.
    pub(crate) fn said_in(self, last: Mbuf) {
        self.set(OL_FLAGS, last.flags());
        self.set(PACKET_TYPE, last.field::<u32>(PACKET_TYPE));
        self.set(DATA_LEN + 2, last.field::<u16>(DATA_LEN + 2));
        self.set(DATA_LEN + 4, last.field::<u32>(DATA_LEN + 4));
    }

    /// Asks for its first line, to be written.
    #[inline(always)]
    pub(crate) fn prefetch(self) {
        prefetch(self.0.as_ptr());
    }
}

/// Asks for the line at an address.
#[inline(always)]
pub(crate) fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, which faults at no address.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(align(64))]
    struct Memory([u8; 128]);

    #[test]
    fn a_received_frame_is_where_it_is_said_to_be() {
        let mut memory = Memory([0xee; 128]);
        // SAFETY: as large as an mbuf, and aligned as one.
        let mbuf = unsafe { Mbuf::new(memory.0.as_mut_ptr()) };
        mbuf.received(0x0007_0001_0001_0080, 0, 0x0001_2345);
        assert_eq!(
            (mbuf.headroom(), mbuf.pkt_len(), mbuf.data_len()),
            (128, 0x0001_2345, 0x2345)
        );
        assert!(mbuf.is_alone());
        mbuf.set(REARM, 0x0007_0001_0002_0080u64);
        assert!(!mbuf.is_alone());
        assert_eq!(mbuf.flags(), 0);
        // What is before and behind was left alone.
        assert_eq!((memory.0[15], memory.0[48]), (0xee, 0xee));
    }
}
