//! What both halves know: `net_usernic.h` in Rust. What each thing means is written there.

use std::ffi::c_void;

/// Queue pairs of a port, at the most.
pub const MAX_PAIRS: usize = 128;

/// Addresses that a port filters by besides its own, at the most.
pub const MAX_ADDRESSES: usize = 64;

/// `USERNIC_RX_VLAN_STRIP`.
pub const RX_VLAN_STRIP: u32 = 2;

/// `USERNIC_VF`, `USERNIC_VF_OWN_RSS`: of `Info::vf`.
pub const VF: u8 = 1;
/// With an RSS key and table of its own.
pub const VF_OWN_RSS: u8 = 2;

/// `USERNIC_OFFLOAD_*`.
#[allow(missing_docs, reason = "written in net_usernic.h")]
pub mod offload {
    pub const VLAN: u16 = 1;
    pub const IPV4: u16 = 2;
    pub const IP_CHECKSUM: u16 = 4;
    pub const TCP: u16 = 8;
    pub const UDP: u16 = 16;
    pub const SCTP: u16 = 32;
    pub const SEGMENT: u16 = 64;
}

/// `struct usernic_region`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs, reason = "written in net_usernic.h")]
pub struct Region {
    pub address: u64,
    pub length: u64,
    pub offset: u64,
    pub fd: i32,
    pub grain: u32,
}

/// `struct usernic_piece`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs, reason = "written in net_usernic.h")]
pub struct Piece {
    pub address: u64,
    pub length: u32,
    pub reserved: u32,
}

/// `struct usernic_offload`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs, reason = "written in net_usernic.h")]
pub struct Offload {
    pub what: u16,
    pub l2: u16,
    pub l3: u16,
    pub l4: u16,
    pub mss: u16,
    pub tag: u16,
}

/// `struct usernic_rss`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "written in net_usernic.h")]
pub struct Rss {
    pub key: [u8; 40],
    pub table: [u8; 64],
    pub fields: u32,
}

/// `struct usernic_calls`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "written in net_usernic.h")]
pub struct Calls {
    pub get: unsafe extern "C" fn(*mut c_void, *mut *mut u8, u32) -> i32,
    pub put: unsafe extern "C" fn(*mut c_void, *mut *mut u8, u32),
    pub release: unsafe extern "C" fn(*mut u8),
    pub append: unsafe extern "C" fn(*mut u8, *mut u8, *mut u8),
    pub received: unsafe extern "C" fn(*mut u8, *const u8, u32) -> i32,
    pub pieces: unsafe extern "C" fn(*mut *mut u8, u32, *mut u8, *mut Piece) -> u32,
    pub describe: unsafe extern "C" fn(*mut u8, *mut Offload, *mut Piece) -> u32,
    pub regions: unsafe extern "C" fn(*mut Region, u32, u32) -> i32,
    pub log: unsafe extern "C" fn(u32, *const u8, usize),
}

/// `struct usernic_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs, reason = "written in net_usernic.h")]
pub struct Info {
    pub features: u64,
    pub speed: u32,
    pub pairs: u16,
    pub queue_size: u16,
    pub mac: [u8; 6],
    pub connected: u8,
    pub server: u8,
    pub mrg_rxbuf: i8,
    pub packed: u8,
    pub in_order: u8,
    pub vf: u8,
}

/// `struct usernic_rx_setup`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "written in net_usernic.h")]
pub struct RxSetup {
    pub pool: *mut c_void,
    pub flags: u64,
    pub shift: u32,
    pub room: u32,
    pub size: u16,
    pub batch: u16,
    pub headroom: u16,
    pub reserved: u16,
}

/// `struct usernic_tx_setup`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "written in net_usernic.h")]
pub struct TxSetup {
    pub odd: u64,
    pub size: u16,
    pub keep: u16,
    pub fast_free: u8,
    pub reserved: [u8; 3],
}

/// `struct usernic_config`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "written in net_usernic.h")]
pub struct Config {
    pub features: u64,
    pub pairs: u16,
    pub mtu: u16,
    pub port: u16,
    pub mergeable: u8,
    pub extras: u8,
    pub hash: u32,
    pub rx_pairs: u16,
    pub reserved: u16,
}

/// `struct usernic_filter`.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs, reason = "written in net_usernic.h")]
pub struct FilterSetup {
    pub mac: [u8; 6],
    pub promiscuous: u8,
    pub all_multicast: u8,
    pub vlan: u8,
    pub stations: u8,
    pub groups: u16,
    pub vlans: [u64; 64],
    pub addresses: [[u8; 6]; 2 * MAX_ADDRESSES],
}

/// `struct usernic_counts`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs, reason = "written in net_usernic.h")]
pub struct Counts {
    pub packets: u64,
    pub bytes: u64,
    pub errors: u64,
    pub runts: u64,
    pub oversize: u64,
    pub filtered: u64,
    pub empty: u64,
    pub chains: u64,
    pub kicks: u64,
    pub anomalies: u64,
}

// As the C half asserts.
const _: () = assert!(size_of::<Region>() == 32 && size_of::<Piece>() == 16 && size_of::<Calls>() == 72);
const _: () = assert!(size_of::<Info>() == 32 && size_of::<RxSetup>() == 32 && size_of::<TxSetup>() == 16);
const _: () = assert!(size_of::<Offload>() == 12 && size_of::<Rss>() == 108);
const _: () = assert!(size_of::<Config>() == 24 && size_of::<FilterSetup>() == 1296 && size_of::<Counts>() == 80);
