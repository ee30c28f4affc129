//! The ten paths of DPDK's test plans: split and packed rings, each mergeable, not mergeable, the same in order, and
//! vectorized. Cases carry the names of DTS's suites.
//!
//! Frames go both ways through each path and are compared byte for byte ([`wire`](super::wire)); what the peer says of
//! itself, and the features that were negotiated, show that the path was the one that the name says.

mod dpdk_vhost;
mod ovs;
mod server_mode;
mod virtio_user;

use std::path::Path;

use anyhow::Result;

use super::{Case, Outcome};
use crate::pcap;

/// Feature bits: virtio 1.3, 5.1.3 and 6. Written a second time, so
/// that a wrong constant of ours cannot hide.
const MRG_RXBUF: u64 = 1 << 15;
const RING_INDIRECT_DESC: u64 = 1 << 28;
const RING_EVENT_IDX: u64 = 1 << 29;
const RING_PACKED: u64 = 1 << 34;
const IN_ORDER: u64 = 1 << 35;

/// A path: which rings, and which of the driver's ways to serve them.
#[derive(Clone, Copy, Debug)]
pub struct DataPath {
    /// As cases have it in their names.
    name: &'static str,
    packed: bool,
    mergeable: bool,
    in_order: bool,
    vectorized: bool,
    queue_size: u16,
    /// What DPDK's virtio driver says of its receive function.
    rx: &'static str,
}

const fn data_path(
    name: &'static str,
    [packed, mergeable, in_order, vectorized]: [bool; 4],
    rx: &'static str,
) -> DataPath {
    DataPath {
        name,
        packed,
        mergeable,
        in_order,
        vectorized,
        queue_size: 256,
        rx,
    }
}

const N: bool = false;
const Y: bool = true;

/// The ten, and packed vectorized with a ring that is no power of two.
#[rustfmt::skip]
pub const PATHS: [DataPath; 11] = [
    data_path("split-mergeable",               [N, Y, N, N], "using mergeable buffer Rx path"),
    data_path("split-non-mergeable",           [N, N, N, N], "using standard Rx path"),
    data_path("split-in-order-mergeable",      [N, Y, Y, N], "using inorder Rx path"),
    data_path("split-in-order-non-mergeable",  [N, N, Y, N], "using inorder Rx path"),
    data_path("split-vectorized",              [N, N, N, Y], "using vectorized Rx path"),
    data_path("packed-mergeable",              [Y, Y, N, N], "using packed ring mergeable buffer Rx path"),
    data_path("packed-non-mergeable",          [Y, N, N, N], "using packed ring standard Rx path"),
    data_path("packed-in-order-mergeable",     [Y, Y, Y, N], "using packed ring mergeable buffer Rx path"),
    data_path("packed-in-order-non-mergeable", [Y, N, Y, N], "using packed ring standard Rx path"),
    data_path("packed-vectorized",             [Y, N, Y, Y], "using packed ring vectorized Rx path"),
    DataPath {
        queue_size: 255,
        ..data_path("packed-vectorized-ring-of-255", [Y, N, Y, Y], "using packed ring vectorized Rx path")
    },
];

impl DataPath {
    /// The keys that DPDK's virtio_user and our front-ends share.
    fn keys(&self) -> String {
        format!(
            ",packed_vq={},mrg_rxbuf={},in_order={}",
            u8::from(self.packed),
            u8::from(self.mergeable),
            u8::from(self.in_order)
        )
    }

    /// Keys of a front-end of ours that takes frames of up to 9,728 bytes.
    fn ours(&self) -> String {
        // What is not mergeable has to fit one buffer.
        let room = if self.mergeable { 2048 } else { 10_240 };
        format!(
            ",queue_size={},mtu=9710,buffer_size={room}{}",
            self.queue_size,
            self.keys()
        )
    }

    /// Keys of DPDK's front-end.
    fn theirs(&self) -> String {
        format!("{},vectorized={}", self.keys(), u8::from(self.vectorized))
    }

    /// The features that tell paths apart, and those of them that this path has.
    fn features(&self) -> (u64, u64) {
        let mut wanted = 0;
        for (bit, on) in [
            (MRG_RXBUF, self.mergeable),
            (RING_PACKED, self.packed),
            (IN_ORDER, self.in_order),
        ] {
            wanted |= if on { bit } else { 0 };
        }
        (MRG_RXBUF | RING_PACKED | IN_ORDER, wanted)
    }

    /// Descriptors that may be under way: what is posted at the least of the times is three quarters of a ring.
    fn window(&self) -> usize {
        usize::from(self.queue_size) / 2
    }

    /// The same where DPDK's virtio_user receives. Its packed vectorized receive takes four at a time without setting
    /// where their data begins, and its send had moved that by the length of a header: there, one at a time.
    fn window_theirs(&self) -> usize {
        if self.packed && self.vectorized && !self.falls_back() {
            1
        } else {
            self.window().min(64)
        }
    }

    /// Whether DPDK serves this path by another one here: packed vectorized needs AVX-512.
    fn falls_back(&self) -> bool {
        let has = || std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains(" avx512f"));
        self.packed && self.vectorized && cfg!(target_arch = "x86_64") && !has()
    }

    /// What DPDK's virtio driver says on this machine of its receive function.
    fn rx_here(&self) -> &'static str {
        if self.falls_back() {
            "using packed ring standard Rx path"
        } else {
            self.rx
        }
    }

    /// Passed, with what this CPU made of the path.
    fn passed(&self) -> Result<Outcome> {
        Ok(Outcome::Passed(if self.falls_back() {
            format!("no AVX-512 here: DPDK is {}", self.rx_here())
        } else {
            String::new()
        }))
    }
}

/// Frames of `least` to `most` bytes: the edges of buffers and of sizes, and some between.
fn frames(count: usize, most: usize) -> Vec<Vec<u8>> {
    let edges = [
        60, 61, 63, 64, 65, 127, 128, 129, 1514, 1518, 2035, 2036, 2037, 2048, 2049, 4084, 4095, 4096, 4097, 8999,
        9000, 9600, 9601, 9728,
    ];
    let mut random = pcap::Random(count as u64);
    let some = (0..count).map(|i| match i % 3 {
        0 => 60 + random.draw() as usize % (most - 59),
        1 => 60 + random.draw() as usize % 200,
        _ => 60 + random.draw() as usize % 1455.min(most - 59),
    });
    pcap::frames(edges.into_iter().filter(|&l| l <= most).chain(some))
}

/// Small frames, as for rings that hold little.
fn small_frames(count: usize) -> Vec<Vec<u8>> {
    let mut random = pcap::Random(count as u64);
    pcap::frames((0..count).map(|_| 60 + random.draw() as usize % 1455))
}

/// A front-end of ours.
fn front(path: &Path, keys: &str) -> String {
    format!("virtio-user,path={}{keys}", path.display())
}

/// A back-end of ours.
fn back(path: &Path, keys: &str) -> String {
    format!("vhost,path={},mtu=9710{keys}", path.display())
}

pub fn cases() -> Vec<Case> {
    let mut cases = dpdk_vhost::cases();
    cases.extend(virtio_user::cases());
    cases.extend(server_mode::cases());
    cases.extend(ovs::cases());
    cases
}
