//! What a port is set up from: its memory, what is negotiated, DPDK's memory as regions, and what can be wrong with it.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use usernic::RawRing;
use usernic::spec::PortSpec;
use usernic::vhost_user::{self, Region as Shared};
use virtio_ring::any::{Driver, Format, Layout};
use virtio_ring::{Features, Options, Slot};

use crate::abi::{Calls, Config, Region, RxSetup, TxSetup};
use crate::rx::HEADER;
use crate::tx::SLOT;

/// Regions that are looked at, at the most: what CONFIGURE_MEM_SLOTS could take.
const REGIONS: usize = 512;

/// What the data path is aligned to.
const ALIGN: usize = 128;

/// What went wrong.
#[derive(Debug)]
pub(crate) struct Fault {
    pub(crate) errno: rustix::io::Errno,
    pub(crate) text: String,
}

impl Fault {
    pub(crate) fn new(errno: rustix::io::Errno, text: impl Into<String>) -> Self {
        Fault {
            errno,
            text: text.into(),
        }
    }
}

impl From<vhost_user::Error> for Fault {
    fn from(error: vhost_user::Error) -> Self {
        use rustix::io::Errno;
        let errno = match &error {
            vhost_user::Error::NoSocket { .. } => Errno::NOENT,
            vhost_user::Error::NobodyListens { .. } => Errno::CONNREFUSED,
            vhost_user::Error::Timeout { .. } => Errno::TIMEDOUT,
            vhost_user::Error::Closed { .. } => Errno::CONNRESET,
            vhost_user::Error::SocketInUse { .. } => Errno::ADDRINUSE,
            _ => Errno::IO,
        };
        Fault::new(errno, error.to_string())
    }
}

pub(crate) type Outcome<T> = Result<T, Fault>;

/// Sizes of what a started port has in memory: for each pair both rings and the headers of the transmit ring.
pub(crate) struct Plan {
    pub(crate) layouts: Vec<[Layout; 2]>,
    /// Where each ring and each pair's headers are.
    pub(crate) at: Vec<[usize; 3]>,
    pub(crate) len: usize,
}

impl Plan {
    pub(crate) fn new(spec: &PortSpec, config: &Config, rx: &[RxSetup], tx: &[TxSetup]) -> Outcome<Self> {
        let format = if spec.packed { Format::Packed } else { Format::Split };
        let mut plan = Plan {
            layouts: Vec::new(),
            at: Vec::new(),
            len: 0,
        };
        let mut take = |len: usize| {
            let at = plan.len;
            plan.len = (at + len).next_multiple_of(ALIGN);
            at
        };
        for index in 0..usize::from(config.pairs) {
            let sizes = [rx[index].size, tx[index].size];
            let mut layouts = [Layout::new(format, 2); 2];
            for (layout, size) in layouts.iter_mut().zip(sizes) {
                // A queue that the application does not have needs a ring all the same.
                *layout = Layout::new(format, size.max(2));
            }
            let [Ok(rx), Ok(tx)] = layouts else {
                return Err(Fault::new(
                    rustix::io::Errno::INVAL,
                    format!("queue {index}: rings of {sizes:?} descriptors: a power of two, 2 to 32768"),
                ));
            };
            let at = [
                take(rx.block_len()),
                take(tx.block_len()),
                take(usize::from(tx.size()) * SLOT),
            ];
            plan.layouts.push([rx, tx]);
            plan.at.push(at);
        }
        plan.len = plan.len.next_multiple_of(4096);
        Ok(plan)
    }
}

/// What is agreed on with a back-end, if that has all that is needed.
pub(crate) fn negotiate(spec: &PortSpec, config: &Config, offered: &vhost_user::Offered) -> Outcome<Features> {
    let there = Features::from_bits_retain(offered.features);
    let mut needed = Features::VERSION_1 | Features::from_bits_retain(config.features);
    needed.set(Features::RING_PACKED, spec.packed);
    let mut wanted = needed | Features::NET_MTU;
    wanted.set(Features::NET_MQ, config.pairs > 1);
    wanted.set(Features::NET_MRG_RXBUF, config.mergeable != 0);
    wanted.set(Features::IN_ORDER, spec.in_order);
    wanted.set(Features::RING_INDIRECT_DESC, spec.indirect);
    let lacking = needed.difference(there);
    if !lacking.is_empty() {
        return Err(Fault::new(
            rustix::io::Errno::OPNOTSUPP,
            format!(
                "{}: the back-end does not offer {lacking:?} (features {:#x}): leave out what needs that (packed_vq=1, an offload)",
                spec.path.display(),
                offered.features
            ),
        ));
    }
    if config.pairs > offered.queue_pairs {
        return Err(Fault::new(
            rustix::io::Errno::INVAL,
            format!(
                "{}: {} queue pairs are configured, the back-end has {}: give it more (net_vhost: queues=)",
                spec.path.display(),
                config.pairs,
                offered.queue_pairs
            ),
        ));
    }
    Ok(wanted & there)
}

/// A ring in its initial state.
///
/// # Safety
/// The block is as long as the layout says, and stays while the ring lives; no other driver and no device is on it.
pub(crate) unsafe fn ring(
    layout: Layout,
    block: NonNull<u8>,
    options: Options,
    kick: &Arc<OwnedFd>,
) -> Outcome<RawRing> {
    let slots = vec![Slot::default(); usize::from(layout.size())].into_boxed_slice();
    // SAFETY: by the caller.
    let driver = unsafe { Driver::new(layout.place(block), layout.size(), options, slots) };
    let driver = driver.map_err(|e| Fault::new(rustix::io::Errno::INVAL, e.to_string()))?;
    Ok(RawRing::new(driver, Arc::clone(kick), HEADER))
}

/// DPDK's memory: all of it, or what lies in `files`, which all of it must then.
pub(crate) fn regions(calls: &Calls, files: bool) -> Outcome<Vec<Region>> {
    let mut regions = vec![Region::default(); REGIONS];
    // SAFETY: there is room for so many.
    let n = unsafe { (calls.regions)(regions.as_mut_ptr(), REGIONS as u32, files.into()) };
    if n < 0 {
        return Err(Fault::new(
            rustix::io::Errno::from_raw_os_error(-n),
            "DPDK's memory cannot be shared: its pages are in no files. Start it with --huge-dir, with --in-memory on a kernel \
             that has memfds of huge pages, or with --no-huge",
        ));
    }
    if n as usize > REGIONS {
        return Err(Fault::new(
            rustix::io::Errno::NOSPC,
            format!("DPDK's memory is in {n} files or pieces of them: start it with --single-file-segments"),
        ));
    }
    regions.truncate(n as usize);
    Ok(regions)
}

/// As the session takes them. The descriptors are DPDK's, which keeps them open while the memory is there.
pub(crate) fn borrow(regions: &[Region]) -> Vec<Shared<'_>> {
    regions
        .iter()
        .map(|region| Shared {
            guest_addr: region.address,
            user_addr: region.address,
            size: region.length,
            offset: region.offset,
            // SAFETY: DPDK's memory is locked during the call that this is for: nothing of it is closed.
            fd: unsafe { BorrowedFd::borrow_raw(region.fd) },
        })
        .collect()
}

/// The error of a memory table, with what to do about it.
pub(crate) fn too_many(error: vhost_user::Error, regions: usize) -> Fault {
    match error {
        vhost_user::Error::Setup { .. } if regions > 8 => Fault::new(
            rustix::io::Errno::NOSPC,
            format!("{error}: start DPDK with --single-file-segments"),
        ),
        error => error.into(),
    }
}
