//! A front-end whose packets lie in several regions of memory, on the layers below a port.
//!
//! A port of ours has one region. Others have many (a DPDK process without single-file segments, a guest), and a
//! back-end has to find the right one for each descriptor. Packets are taken from the regions in turn, so that no two
//! neighbours are in the same one. It speaks the lines of [`protocol`](super::protocol) and knows the loads `tx` and
//! `rx`.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use hugemem::{PageSize, Segment};
use rustix::event::EventfdFlags;
use usernic::spec::PortSpec;
use usernic::vhost_user::{FrontendSession, Region, RingSetup};
use usernic::{Buffer, RawRing};
use virtio_ring::any::{Driver, Format, Layout};
use virtio_ring::{Features, Options, Slot};

use super::cores::pin;
use super::drive::{HEADERS, Load, Shared, headers};
use super::worker;

/// Bytes of a virtio-net header of virtio 1 (1.3, 5.1.6).
const NET_HEADER: usize = 12;

/// Bytes of a buffer: a header, a frame, and what makes it whole cache lines.
const STRIDE: usize = 2048 + 128;

/// Where the frame begins in a buffer.
const HEADROOM: usize = 128;

/// A packet in one of the regions.
#[derive(Clone, Copy)]
struct Packet {
    at: NonNull<u8>,
    len: u32,
    cookie: u64,
}

// SAFETY: buffers are handed out by cookie, and each cookie is either in the ring or in a list of free ones; nothing of
// this program touches the memory of one that is in the ring.
unsafe impl Buffer for Packet {
    #[inline(always)]
    fn address(&self) -> u64 {
        self.at.as_ptr() as u64
    }

    #[inline(always)]
    fn len(&self) -> u32 {
        self.len
    }

    #[inline(always)]
    fn write_header(&mut self, len: usize) {
        // SAFETY: `HEADROOM` bytes before the frame are the buffer's, and `len` is the header's length.
        unsafe { self.at.as_ptr().sub(len).write_bytes(0, len) };
    }

    #[inline(always)]
    fn next(&self) -> Option<Self> {
        None
    }

    #[inline(always)]
    fn cookie(&self) -> u64 {
        self.cookie
    }
}

/// All buffers, by their cookies.
struct Buffers(Vec<NonNull<u8>>);

// SAFETY: addresses in segments, which the thread that uses them keeps mapped.
unsafe impl Send for Buffers {}

impl Buffers {
    #[inline(always)]
    fn packet(&self, cookie: u64, len: usize) -> Packet {
        Packet {
            at: self.0[cookie as usize],
            len: len as u32,
            cookie,
        }
    }
}

/// One side of the memory: the segments, the buffers, and the rings in the first segment.
struct Plan {
    layout: Layout,
    segments: Vec<Segment>,
    buffers: Buffers,
}

fn plan(regions: usize, size: u16, format: Format, count: usize) -> Result<Plan> {
    let layout = Layout::new(format, size)?;
    let rings = (2 * layout.block_len()).next_multiple_of(4096);
    let of_each = count.div_ceil(regions);
    let mut segments = Vec::new();
    for index in 0..regions {
        let first = if index == 0 { rings } else { 0 };
        let len = first + of_each * STRIDE;
        segments.push(Segment::memfd(c"usernic bench", len, PageSize::BASE, None)?);
    }
    let at = |cookie: usize| {
        let (region, place) = (cookie % regions, cookie / regions);
        let first = if region == 0 { rings } else { 0 };
        // SAFETY: the segment has `of_each` places of `STRIDE` bytes behind `first`.
        unsafe { segments[region].base().add(first + place * STRIDE + HEADROOM) }
    };
    let buffers = Buffers((0..count).map(at).collect());
    Ok(Plan {
        layout,
        segments,
        buffers,
    })
}

fn eventfd() -> Result<OwnedFd> {
    Ok(rustix::event::eventfd(
        0,
        EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK,
    )?)
}

/// Packets so far, on a line of their own.
#[derive(Default)]
#[repr(align(128))]
struct Counts {
    rx: AtomicU64,
    tx: AtomicU64,
}

/// The driving thread's.
struct Raw {
    rx: RawRing,
    tx: RawRing,
    buffers: Buffers,
    /// Cookies of buffers to send that the back-end does not have.
    free: Vec<u64>,
    burst: usize,
}

/// The program: `path`, `queue_size` and `packed_vq` of `spec` count.
pub fn main(spec: &str, cpus: (usize, usize), burst: usize, timed: bool, regions: usize) -> Result<()> {
    pin(cpus.0)?;
    let spec: PortSpec = spec.parse()?;
    let size = usize::from(spec.queue_size);
    let format = if spec.packed { Format::Packed } else { Format::Split };
    let count = 2 * size + 2 * burst;
    let Plan {
        layout,
        segments,
        buffers,
    } = plan(regions, spec.queue_size, format, count)?;

    let timeout = Duration::from_millis(spec.timeout_ms.into());
    let mut session = FrontendSession::connect(&spec.path, timeout)?;
    let offer = session.offer()?;
    let mut wanted = Features::VERSION_1 | Features::IN_ORDER;
    wanted.set(Features::RING_PACKED, spec.packed);
    let features = wanted & Features::from_bits_retain(offer.features);
    if spec.packed != features.contains(Features::RING_PACKED) {
        bail!("the back-end has no packed rings");
    }
    let kicks = [Arc::new(eventfd()?), Arc::new(eventfd()?)];
    let calls = [eventfd()?, eventfd()?];
    let mut rings = Vec::new();
    let mut setups = Vec::new();
    for which in 0..2 {
        let offset = which * layout.block_len();
        // SAFETY: the first segment begins with room for both rings, and its base is aligned to a page.
        let memory = unsafe { layout.place(segments[0].base().add(offset)) };
        let slots = vec![Slot::default(); size].into_boxed_slice();
        // SAFETY: the segments live as long as the process; this is the only driver on the ring, and no device is yet.
        let driver = unsafe { Driver::new(memory, spec.queue_size, Options::from_features(features), slots) }?;
        rings.push(RawRing::new(driver, Arc::clone(&kicks[which]), NET_HEADER));
        let block = segments[0].base().as_ptr() as u64 + offset as u64;
        let [desc, avail, used] = layout.areas().map(|area| block + area as u64);
        setups.push(RingSetup {
            num: spec.queue_size,
            base: layout.format().start_base(),
            desc,
            avail,
            used,
            kick: std::os::fd::AsFd::as_fd(&*kicks[which]),
            call: std::os::fd::AsFd::as_fd(&calls[which]),
        });
    }
    let mut table = Vec::new();
    for segment in &segments {
        let fd = segment.fd().context("a memfd has a descriptor")?;
        let base = segment.base().as_ptr() as u64;
        table.push(Region {
            guest_addr: base,
            user_addr: base,
            size: segment.len() as u64,
            offset: 0,
            // SAFETY: the segment owns it, and outlives the table.
            fd: unsafe { BorrowedFd::borrow_raw(fd) },
        });
    }
    session.start(features.bits(), &table, &setups)?;

    let shared = Arc::new(Shared::new()?);
    let counts = Arc::new(Counts::default());
    let (Some(tx), Some(rx)) = (rings.pop(), rings.pop()) else {
        bail!("two rings were made");
    };
    let mut raw = Raw {
        rx,
        tx,
        buffers,
        free: (size as u64..count as u64).collect(),
        burst,
    };
    // The receive ring has the first ones.
    raw.rx
        .post((0..size as u64).map(|cookie| raw.buffers.packet(cookie, STRIDE - HEADROOM)));
    raw.rx.publish();
    std::thread::spawn({
        let (shared, counts) = (Arc::clone(&shared), Arc::clone(&counts));
        move || {
            if let Err(error) = pin(cpus.1).and_then(|()| raw.run(&shared, &counts, timed)) {
                println!("error: {error:#}");
                std::process::exit(1);
            }
        }
    });
    let outcome = worker::commands(&shared, || {
        (counts.rx.load(Ordering::Relaxed), counts.tx.load(Ordering::Relaxed))
    });
    // The driving thread has no end of its own, and uses the segments until the process ends.
    if let Err(error) = outcome {
        println!("error: {error:#}");
        std::process::exit(1);
    }
    std::process::exit(0)
}

impl Raw {
    fn run(mut self, shared: &Shared, counts: &Counts, timed: bool) -> Result<()> {
        shared.each_load(|load, generation| {
            let same = || shared.is(generation);
            match (load, timed) {
                (Load::Rx, false) => shared.meter.rounds::<false>(same, || Ok(self.receive(counts))),
                (Load::Rx, true) => shared.meter.rounds::<true>(same, || Ok(self.receive(counts))),
                (Load::Tx { size }, timed) => {
                    let headers = headers(size);
                    let turn = || Ok(self.transmit(size, &headers, counts));
                    if timed {
                        shared.meter.rounds::<true>(same, turn)
                    } else {
                        shared.meter.rounds::<false>(same, turn)
                    }
                }
                (other, _) => bail!("{other:?} is not for a raw front-end"),
            }
        })
    }

    fn receive(&mut self, counts: &Counts) -> usize {
        let Raw { rx, buffers, burst, .. } = self;
        let mut cookies = [0; 256];
        let mut n = 0;
        rx.complete((*burst).min(cookies.len()), |cookie, _| {
            cookies[n] = cookie;
            n += 1;
        });
        if n > 0 {
            rx.post(cookies[..n].iter().map(|&c| buffers.packet(c, STRIDE - HEADROOM)));
            rx.publish();
            counts
                .rx
                .store(counts.rx.load(Ordering::Relaxed) + n as u64, Ordering::Relaxed);
        }
        n
    }

    fn transmit(&mut self, size: usize, headers: &[u8; HEADERS], counts: &Counts) -> usize {
        let Raw {
            tx,
            buffers,
            free,
            burst,
            ..
        } = self;
        if free.len().min(tx.free()) < *burst {
            tx.complete(tx.size(), |cookie, _| free.push(cookie));
        }
        let from = free.len() - free.len().min(*burst).min(tx.free());
        let packets = free[from..].iter().map(|&cookie| {
            let packet = buffers.packet(cookie, size);
            // SAFETY: a buffer that is free is ours, and longer than the headers.
            unsafe { packet.at.as_ptr().copy_from_nonoverlapping(headers.as_ptr(), HEADERS) };
            packet
        });
        let (sent, _) = tx.send(packets);
        if sent > 0 {
            tx.publish();
            free.drain(from..from + sent);
            counts
                .tx
                .store(counts.tx.load(Ordering::Relaxed) + sent as u64, Ordering::Relaxed);
        }
        sent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_apart_and_in_their_regions() {
        for (regions, count) in [(1, 20), (3, 20), (32, 64)] {
            let plan = plan(regions, 64, Format::Split, count).unwrap();
            assert_eq!((plan.segments.len(), plan.buffers.0.len()), (regions, count));
            let mut at: Vec<usize> = plan.buffers.0.iter().map(|b| b.as_ptr() as usize).collect();
            for (cookie, &start) in at.iter().enumerate() {
                let segment = &plan.segments[cookie % regions];
                let base = segment.base().as_ptr() as usize;
                let rings = if cookie % regions == 0 {
                    2 * plan.layout.block_len()
                } else {
                    0
                };
                assert!(start - HEADROOM >= base + rings && start + STRIDE - HEADROOM <= base + segment.len());
            }
            at.sort_unstable();
            assert!(at.windows(2).all(|w| w[1] - w[0] >= STRIDE));
        }
    }
}
