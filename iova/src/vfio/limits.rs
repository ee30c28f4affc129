//! Limits, looked at before they bite: what a device reaches, how many mappings there may be, locked memory.

use super::{Host, Reserved};
use crate::{Range, Ranges};

/// What a mapping must keep to.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Addresses that the devices can use: within the IOMMU's width, without the MSI window and what else is reserved.
    pub usable: Ranges,
    /// Sizes of the IOMMU's pages, a bit each.
    pub page_sizes: u64,
    /// Mappings that there may still be; `None` if they are not counted.
    pub entries: Option<u32>,
    /// Who is charged for the pages that a mapping locks.
    pub charge: Charge,
}

impl Limits {
    /// Bytes of the smallest page.
    pub fn page(&self) -> u64 {
        match self.page_sizes {
            0 => 4096,
            sizes => 1 << sizes.trailing_zeros(),
        }
    }
}

/// Who is charged for locked pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Charge {
    /// The process: `VmLck` in its status.
    Process,
    /// The user, over all of its processes, which the kernel does not tell: what we mapped ourselves is known.
    User,
    /// Nobody.
    Nobody,
}

/// How much memory the process may lock, and has locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memlock {
    /// RLIMIT_MEMLOCK in bytes; `None`: no limit, or one that this process is above (CAP_IPC_LOCK).
    pub limit: Option<u64>,
    /// Bytes that are locked.
    pub locked: u64,
}

impl Memlock {
    /// The calling process's, from `/proc/self`.
    pub fn read(host: &Host) -> Self {
        let limits = host.read("proc/self/limits").unwrap_or_default();
        let status = host.read("proc/self/status").unwrap_or_default();
        let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).map(str::trim);
        let limit = limits
            .lines()
            .find_map(|l| l.strip_prefix("Max locked memory"))
            .and_then(|l| l.split_whitespace().next()?.parse().ok());
        let locked = field("VmLck:").and_then(|v| v.split_whitespace().next()?.parse::<u64>().ok());
        let capabilities = field("CapEff:").and_then(|v| u64::from_str_radix(v, 16).ok());
        // Only the capability in the first user namespace counts (`capable`, not `ns_capable`).
        // A kernel without user namespaces has one, and no such file.
        let first_namespace = host.read("proc/self/uid_map").map_or_else(
            |error| error.kind() == std::io::ErrorKind::NotFound,
            |map| map.split_whitespace().eq(["0", "0", "4294967295"]),
        );
        let exempt = first_namespace && capabilities.is_some_and(|c| c & (1 << CAP_IPC_LOCK) != 0);
        Memlock {
            limit: limit.filter(|_| !exempt),
            locked: locked.unwrap_or(0).saturating_mul(1024),
        }
    }
}

/// `include/uapi/linux/capability.h`.
const CAP_IPC_LOCK: u32 = 14;

/// What is left of the `usable` addresses without those reserved.
pub(super) fn without(mut usable: Ranges, reserved: &[Reserved]) -> Ranges {
    for region in reserved {
        // No room for another hole: then everything from the reserved addresses on is given up.
        if usable.remove(region.range).is_err()
            && let Some(rest) = Range::new(region.range.start(), u64::MAX - region.range.start())
        {
            let _ = usable.remove(rest);
        }
    }
    usable
}

/// Kernels before 5.4 do not tell what is usable. This is what an IOMMU of the shortest width reaches, without the
/// interrupt window of x86.
pub(super) fn cautious(reserved: &[Reserved]) -> Ranges {
    let mut usable = Ranges::new();
    for range in [
        Range::new(0, 0xfee0_0000),
        Range::new(0xfef0_0000, (1 << 39) - 0xfef0_0000),
    ] {
        // An empty set has room for two.
        let _ = range.map(|range| usable.insert(range));
    }
    without(usable, reserved)
}

/// Collects ranges of `first..=last`; those for which there is no room are left out.
pub(super) fn collect(ranges: impl IntoIterator<Item = (u64, u64)>) -> Ranges {
    let mut usable = Ranges::new();
    for (first, last) in ranges {
        let len = last.checked_sub(first).map(|len| len.saturating_add(1));
        if let Some(range) = len.and_then(|len| Range::new(first, len)) {
            let _ = usable.insert(range);
        }
    }
    usable
}
