//! Ports over memory of the application: rings of ours, buffers of its own.
//!
//! A [`LentPort`] allocates no packet. The application lends regions of memory, and posts and sends buffers that lie there,
//! by address, length and cookie, on a [`LentPair`] of rings. The rings are in a small segment of the port. It is a front-end
//! (`virtio-user`), or drives a virtual function (`vf`).
//!
//! It does less than a [`Port`](crate::Port): no thread of its own, no reconnection, no offloads, no frames in several
//! buffers. A link that is lost stays lost: close the port, and open it anew.

mod vf;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hugemem::Segment;
use rustix::event::{EventfdFlags, epoll, eventfd};
use virtio_ring::any::{Driver, Format, Layout};
use virtio_ring::{Features, Options, Slot};

use super::front::file_of;
use crate::error::{Error, Tried};
use crate::memory::{MemorySource, Request};
use crate::queue::{Buffer, NET_HEADER, RawQueue, RawRing, SHORTEST, TAG, closed, drain, longest, poll_readable};
use crate::spec::{Kind, PortSpec};
use crate::vhost_user::{FrontendSession, Region, RingSetup};

/// A piece of shared memory that the application lends to a port: `len` bytes of a file, mapped at `address`.
#[derive(Debug)]
pub struct LentRegion {
    /// The file: a memfd, or one of hugetlbfs or tmpfs.
    pub fd: OwnedFd,
    /// Where the region begins in the file.
    pub offset: u64,
    /// Where it is mapped.
    pub address: NonNull<u8>,
    /// Bytes of it.
    pub len: usize,
    /// Bytes of a page: offset, address and length are multiples of it.
    pub page: usize,
}

/// Who is on the other side of a [`LentPort`].
#[expect(clippy::large_enum_variant, reason = "a port has one, and it does not move")]
enum Far {
    /// A back-end, behind its socket.
    BackEnd(Box<FrontendSession>),
    /// A device. None once it is gone.
    Device(Option<vf::Device>),
}

/// A port over lent memory. Dropping it stops the rings: the other side touches the memory no more.
pub struct LentPort {
    far: Far,
    up: bool,
    features: Features,
    mtu: u16,
    pairs: Vec<Option<LentPair>>,
    /// Of each pair.
    wakers: Vec<Arc<OwnedFd>>,
    open: Arc<AtomicBool>,
}

/// A pair of rings of a [`LentPort`], for one thread.
pub struct LentPair {
    rings: Rings,
    /// Readable when frames have come, and once the port is closed. Its members are edge-triggered: the other side holds one
    /// of them, so nobody reads it.
    events: OwnedFd,
    /// The other member: ours.
    waker: Arc<OwnedFd>,
    memory: LentMemory,
    open: Arc<AtomicBool>,
    lengths: Lengths,
    /// Keeps the rings mapped.
    _rings: Arc<Segment>,
}

/// How long frames are that are received, and how many were not.
#[derive(Debug)]
struct Lengths {
    /// Bytes of the longest frame beyond those of the shortest.
    spread: u32,
    runts: u64,
    oversize: u64,
}

impl Lengths {
    /// For frames of packets of up to `mtu` bytes, with up to two VLAN tags.
    fn of(mtu: u16) -> Self {
        Lengths {
            spread: longest(mtu) + TAG - SHORTEST as u32,
            runts: 0,
            oversize: 0,
        }
    }

    /// The frame's length; 0 for one that is too short or too long.
    #[inline(always)]
    fn judge(&mut self, len: u32) -> u32 {
        match len.wrapping_sub(SHORTEST as u32) <= self.spread {
            true => len,
            false => self.refuse(len),
        }
    }

    #[cold]
    fn refuse(&mut self, len: u32) -> u32 {
        match len < SHORTEST as u32 {
            true => self.runts += 1,
            false => self.oversize += 1,
        }
        0
    }
}

enum Rings {
    Virtio(RawQueue),
    Device(vf::Rings),
}

/// The addresses of all regions that were lent to a port.
#[derive(Clone, Debug)]
pub struct LentMemory(Arc<[std::ops::Range<u64>]>);

impl LentMemory {
    /// Whether the `len` bytes at `address`, and those of the header before them, are in one region.
    #[inline]
    pub fn holds(&self, address: u64, len: u32) -> bool {
        let Some(start) = address.checked_sub(NET_HEADER as u64) else {
            return false;
        };
        let Some(end) = address.checked_add(len.into()) else {
            return false;
        };
        self.0.iter().any(|range| range.start <= start && end <= range.end)
    }
}

impl LentPair {
    /// Bytes before each buffer that the virtio-net header takes.
    pub const HEADER: usize = NET_HEADER;

    /// Where the lent regions are.
    pub fn memory(&self) -> LentMemory {
        self.memory.clone()
    }

    /// Whether the port is open. Once it is not, all buffers are the application's again.
    #[inline]
    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    /// Bytes that a buffer to receive into must hold.
    pub fn least_room(&self) -> u32 {
        match &self.rings {
            Rings::Virtio(_) => 1,
            Rings::Device(rings) => rings.buffer_len(),
        }
    }

    /// Whether a device can send a frame of so many bytes: 17 to 9,728. Virtio rings take any but 0.
    #[inline]
    pub fn device_takes(len: u32) -> bool {
        vf::Rings::takes(len)
    }

    /// Buffers that can be posted now.
    pub fn rx_free(&self) -> usize {
        match &self.rings {
            Rings::Virtio(raw) => raw.rx.free(),
            Rings::Device(rings) => rings.rx_free(),
        }
    }

    /// Frames that can be sent now.
    pub fn tx_free(&self) -> usize {
        match &self.rings {
            Rings::Virtio(raw) => raw.tx.free(),
            Rings::Device(rings) => rings.tx_free(),
        }
    }

    /// Posts buffers to receive into, one descriptor each, while there is room and `buffers` yields, and makes that visible;
    /// how many. It stops at one that has not [`least_room`](LentPair::least_room).
    #[inline]
    pub fn post<B: Buffer>(&mut self, buffers: impl Iterator<Item = B>) -> usize {
        match &mut self.rings {
            Rings::Virtio(raw) => {
                let posted = raw.rx.post(buffers);
                if posted > 0 {
                    raw.rx.publish();
                }
                posted
            }
            Rings::Device(rings) => rings.post(buffers),
        }
    }

    /// Sends frames of one segment, while there is room and `frames` yields, and makes that visible; how many, and their
    /// bytes. On a device it stops at one that that [does not take](LentPair::device_takes).
    #[inline]
    pub fn send<B: Buffer>(&mut self, frames: impl Iterator<Item = B>) -> (usize, u64) {
        match &mut self.rings {
            Rings::Virtio(raw) => {
                let (sent, bytes) = raw.tx.send(frames);
                if sent > 0 {
                    raw.tx.publish();
                }
                (sent, bytes)
            }
            Rings::Device(rings) => rings.send(frames),
        }
    }

    /// Takes up to `max` buffers that frames have come into: cookie, and bytes of the frame; 0: it was none, or one that is
    /// too short or too long for the port. How many.
    #[inline]
    pub fn receive(&mut self, max: usize, mut each: impl FnMut(u64, u32)) -> usize {
        let lengths = &mut self.lengths;
        match &mut self.rings {
            Rings::Virtio(raw) => raw.rx.complete(max, |cookie, len| {
                // With less than a header it was none.
                let len = match len.checked_sub(NET_HEADER as u32) {
                    Some(len) => lengths.judge(len),
                    None => 0,
                };
                each(cookie, len);
            }),
            Rings::Device(rings) => rings.receive(max, |cookie, len| {
                let len = if len == 0 { 0 } else { lengths.judge(len) };
                each(cookie, len);
            }),
        }
    }

    /// Frames that were received with fewer bytes than an Ethernet header has, and were none therefore.
    pub fn runts(&self) -> u64 {
        self.lengths.runts
    }

    /// Frames that were received with more bytes than the port's MTU allows, and were none therefore.
    pub fn oversize(&self) -> u64 {
        self.lengths.oversize
    }

    /// Takes the cookies of up to `max` frames that the other side has taken; how many.
    #[inline]
    pub fn sent(&mut self, max: usize, mut each: impl FnMut(u64)) -> usize {
        match &mut self.rings {
            Rings::Virtio(raw) => raw.tx.complete(max, |cookie, _| each(cookie)),
            Rings::Device(rings) => rings.sent(max, each),
        }
    }

    /// Kicks so far: system calls that told the other side of something.
    pub fn kicks(&self) -> u64 {
        match &self.rings {
            Rings::Virtio(raw) => raw.rx.kicks() + raw.tx.kicks(),
            Rings::Device(_) => 0,
        }
    }

    /// What the other side did wrong, so far.
    pub fn anomalies(&self) -> u64 {
        match &self.rings {
            Rings::Virtio(raw) => raw.rx.anomalies().total() + raw.tx.anomalies().total(),
            Rings::Device(rings) => rings.anomalies(),
        }
    }

    /// Asks the other side to notify at the next frame. `true`: frames are there already.
    pub fn arm(&mut self) -> bool {
        match &mut self.rings {
            Rings::Virtio(raw) => raw.rx.set_notify(true),
            Rings::Device(rings) => rings.arm(),
        }
    }

    /// Asks for no more notifications, and takes those that came. `true`: frames are there.
    pub fn disarm(&mut self) -> bool {
        drain(&self.events);
        if !self.is_open() {
            // Stays to be seen.
            wake(&self.waker);
        }
        match &mut self.rings {
            Rings::Virtio(raw) => raw.rx.set_notify(false),
            Rings::Device(rings) => rings.has_done(),
        }
    }

    /// Sleeps until frames have come or `timeout` is over (`None`: no limit). `true`: frames are there. A link that is lost
    /// does not wake it.
    ///
    /// # Errors
    /// [`NotConnected`](std::io::ErrorKind::NotConnected), at once and each time, if the port is closed; those of poll(2), but
    /// for EINTR, which ends the wait early.
    pub fn wait(&mut self, timeout: Option<Duration>) -> std::io::Result<bool> {
        if self.arm() {
            self.disarm();
            return Ok(true);
        }
        let deadline = timeout.and_then(|t| Instant::now().checked_add(t));
        let woken = match self.is_open() {
            true => poll_readable(self.as_fd(), deadline),
            false => Ok(true),
        };
        let there = self.disarm();
        if !self.is_open() {
            return Err(closed());
        }
        woken.map(|_| there)
    }
}

impl AsFd for LentPair {
    /// An epoll instance, readable when the other side has notified of frames (see [`arm`](LentPair::arm)), and once the port
    /// is closed. Do not read it: [`disarm`](LentPair::disarm) does.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}

fn wake(waker: &OwnedFd) {
    let _ = rustix::io::write(waker, &1u64.to_ne_bytes());
}

/// An epoll instance for a pair, and the waker in it, beside `event`.
fn events(event: &impl AsFd) -> Result<(OwnedFd, Arc<OwnedFd>), Error> {
    let waker = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).tried("eventfd(2)")?;
    let events = epoll::create(epoll::CreateFlags::CLOEXEC).tried("epoll_create1(2)")?;
    super::watch(&events, event)?;
    super::watch(&events, &waker)?;
    Ok((events, Arc::new(waker)))
}

impl LentPort {
    /// Connects to the back-end at the spec's socket, or opens the spec's device, lends it `regions`, and starts the rings.
    ///
    /// # Errors
    /// [`Error::Region`] for regions that cannot be lent, [`Error::NotGranted`] for keys that such a port does not have,
    /// and those of [`Port::open`](crate::Port::open).
    ///
    /// # Safety
    /// The regions are mapped as they say, from now until the port is dropped.
    pub unsafe fn open(spec: &PortSpec, regions: &[LentRegion], memory: &mut dyn MemorySource) -> Result<Self, Error> {
        spec.check()?;
        if spec.kind == Kind::Vf {
            // SAFETY: by the caller.
            return unsafe { Self::open_vf(spec, crate::vf::hardware(spec)?, regions, memory) };
        }
        if spec.kind != Kind::VirtioUser || spec.reversed {
            return Err(Error::NotGranted {
                why: "memory is lent by front-ends that connect, and to devices: virtio-user without server=1, or vf",
            });
        }
        if spec.mrg_rxbuf == Some(true) || !spec.offloads().is_empty() {
            return Err(Error::NotGranted {
                why: "with lent memory there are no mergeable buffers and no offloads: leave mrg_rxbuf, csum, tso, lro out",
            });
        }
        let mut spec = spec.clone();
        super::place(&crate::vfio::Host::default(), &mut spec)?;
        let spec = &spec;
        let lent = check(regions)?;
        let format = if spec.packed { Format::Packed } else { Format::Split };
        let layout = Layout::new(format, spec.queue_size).map_err(|source| Error::Ring { index: 0, source })?;
        let mut session = FrontendSession::connect(&spec.path, Duration::from_millis(spec.timeout_ms.into()))?;
        session.begin();
        let features = negotiate(spec, &mut session)?;

        let request = Request {
            len: 2 * usize::from(spec.queues) * layout.block_len(),
            name: "usernic-rings",
            numa: spec.numa,
        };
        let rings = Arc::new(crate::memory::allocate(memory, &request)?.segment);
        let open = Arc::new(AtomicBool::new(true));
        let mut made = Vec::new();
        for index in 0..usize::from(spec.queues) {
            made.push(pair(index, &rings, layout, features, &lent, &open, spec.mtu)?);
        }
        let base = rings.base().as_ptr() as u64;
        let mut setups = Vec::new();
        for (index, (_, kicks, calls)) in made.iter().enumerate() {
            for (which, kick) in kicks.iter().enumerate() {
                let at = base + ((2 * index + which) * layout.block_len()) as u64;
                let [desc, avail, used] = layout.areas().map(|area| at + area as u64);
                setups.push(RingSetup {
                    num: layout.size(),
                    base: layout.format().start_base(),
                    desc,
                    avail,
                    used,
                    kick: kick.as_fd(),
                    call: calls[which].as_fd(),
                });
            }
        }
        let mut shared = vec![Region {
            guest_addr: base,
            user_addr: base,
            size: rings.len() as u64,
            offset: 0,
            fd: file_of(&rings)?,
        }];
        shared.extend(regions.iter().map(|region| Region {
            guest_addr: region.address.as_ptr() as u64,
            user_addr: region.address.as_ptr() as u64,
            size: region.len as u64,
            offset: region.offset,
            fd: region.fd.as_fd(),
        }));
        session.start(features.bits(), &shared, &setups)?;
        if features.contains(Features::NET_MTU) {
            let mtu = spec.mtu;
            if !session.set_mtu(mtu)? {
                tracing::warn!("the back-end refuses an MTU of {mtu}: larger frames than its own may be lost");
            }
        }
        session.end();
        drop(setups);
        Ok(LentPort {
            far: Far::BackEnd(Box::new(session)),
            up: true,
            features,
            mtu: spec.mtu,
            wakers: made.iter().map(|(pair, ..)| Arc::clone(&pair.waker)).collect(),
            pairs: made.into_iter().map(|(pair, ..)| Some(pair)).collect(),
            open,
        })
    }

    /// Takes a pair of rings.
    ///
    /// # Errors
    /// [`Error::NoSuchQueue`], [`Error::QueueTaken`].
    pub fn queue(&mut self, index: u16) -> Result<LentPair, Error> {
        let count = self.pairs.len() as u16;
        let place = self
            .pairs
            .get_mut(usize::from(index))
            .ok_or(Error::NoSuchQueue { index, count })?;
        place.take().ok_or(Error::QueueTaken { index })
    }

    /// Pairs of rings.
    pub fn queue_count(&self) -> u16 {
        self.pairs.len() as u16
    }

    /// The largest packet, in bytes, without its Ethernet header.
    pub fn mtu(&self) -> u16 {
        self.mtu
    }

    /// The virtio features that were negotiated.
    pub fn features(&self) -> u64 {
        self.features.bits()
    }

    /// Whether the other side is there: a look at the connection, or at the device. To be called a few times a second on a
    /// device.
    pub fn link(&mut self) -> bool {
        match &mut self.far {
            Far::BackEnd(session) => {
                if self.up
                    && let Err(error) = session.service()
                {
                    tracing::warn!("link down: {error}");
                    self.up = false;
                }
                self.up
            }
            Far::Device(device) => device.as_mut().is_some_and(vf::Device::link),
        }
    }
}

impl Drop for LentPort {
    fn drop(&mut self) {
        match &mut self.far {
            Far::BackEnd(session) if self.up => {
                if let Err(error) = session.stop() {
                    tracing::debug!("the back-end did not stop its rings: {error}");
                }
            }
            Far::BackEnd(_) => {}
            Far::Device(device) => *device = None,
        }
        self.open.store(false, Ordering::Release);
        for waker in &self.wakers {
            wake(waker);
        }
    }
}

/// The regions' addresses, if all can be lent.
fn check(regions: &[LentRegion]) -> Result<LentMemory, Error> {
    let mut ranges: Vec<std::ops::Range<u64>> = Vec::new();
    for (index, region) in regions.iter().enumerate() {
        let refuse = |why: String| Err(Error::Region { index, why });
        let LentRegion { offset, len, page, .. } = *region;
        let address = region.address.as_ptr() as u64;
        if len == 0 || !page.is_power_of_two() || page < 4096 {
            return refuse(format!("{len} bytes in pages of {page}"));
        }
        if !len.is_multiple_of(page) || !address.is_multiple_of(page as u64) || !offset.is_multiple_of(page as u64) {
            return refuse(format!(
                "{len} bytes at {address:#x}, offset {offset:#x}: not all multiples of its page of {page} bytes"
            ));
        }
        let Some(end) = address.checked_add(len as u64) else {
            return refuse(format!("{len} bytes at {address:#x} wrap around"));
        };
        let size = rustix::fs::fstat(&region.fd)
            .tried("fstat(2) of a lent region")?
            .st_size;
        if offset.checked_add(len as u64).is_none_or(|end| end > size as u64) {
            return refuse(format!("{len} bytes from {offset:#x} on, of a file of {size} bytes"));
        }
        if let Some(other) = ranges.iter().position(|r| address < r.end && r.start < end) {
            return refuse(format!("it overlaps region {other}"));
        }
        ranges.push(address..end);
    }
    if ranges.is_empty() {
        return Err(Error::Region {
            index: 0,
            why: "there is none: lend at least one".into(),
        });
    }
    Ok(LentMemory(ranges.into()))
}

fn negotiate(spec: &PortSpec, session: &mut FrontendSession) -> Result<Features, Error> {
    let offer = session.offer()?;
    let offered = Features::from_bits_retain(offer.features);
    let mut wanted = Features::VERSION_1 | Features::NET_MTU;
    wanted.set(Features::NET_MQ, spec.queues > 1);
    wanted.set(Features::RING_PACKED, spec.packed);
    wanted.set(Features::IN_ORDER, spec.in_order);
    wanted.set(Features::RING_EVENT_IDX, spec.event_idx);
    let lacks = |feature, advice| {
        Err(Error::Feature {
            path: spec.path.clone(),
            feature,
            offered: offer.features,
            advice,
        })
    };
    if !offered.contains(Features::VERSION_1) {
        return lacks(
            "VIRTIO_F_VERSION_1",
            "legacy devices are not supported: use a back-end of virtio 1.0 or later",
        );
    }
    if spec.packed && !offered.contains(Features::RING_PACKED) {
        return lacks(
            "VIRTIO_F_RING_PACKED",
            "leave packed_vq=1 out, and the port has split rings",
        );
    }
    if spec.queues > offer.queue_pairs {
        return Err(Error::TooManyQueues {
            path: spec.path.clone(),
            asked: spec.queues,
            most: offer.queue_pairs,
        });
    }
    Ok(wanted & offered)
}

/// A pair of rings, with their kicks and calls.
type Made = (LentPair, [Arc<OwnedFd>; 2], [Arc<OwnedFd>; 2]);

fn pair(
    index: usize,
    rings: &Arc<Segment>,
    layout: Layout,
    features: Features,
    memory: &LentMemory,
    open: &Arc<AtomicBool>,
    mtu: u16,
) -> Result<Made, Error> {
    let event = || {
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        eventfd(0, flags).tried("eventfd(2)").map(Arc::new)
    };
    let (kicks, calls) = ([event()?, event()?], [event()?, event()?]);
    let ring = |which: usize| {
        let size = layout.size();
        let slots = vec![Slot::default(); usize::from(size)].into_boxed_slice();
        let at = (2 * index + which) * layout.block_len();
        // SAFETY: the segment was asked for with room for all rings; the mapping's base is page-aligned.
        let memory = unsafe { layout.place(rings.base().add(at)) };
        // SAFETY: the pair keeps the segment mapped, and is the only driver of this fresh ring.
        let driver = unsafe { Driver::new(memory, size, Options::from_features(features), slots) };
        let driver = driver.map_err(|source| Error::Ring {
            index: 2 * index + which,
            source,
        })?;
        let mut ring = RawRing::new(driver, Arc::clone(&kicks[which]), NET_HEADER);
        ring.set_notify(false);
        Ok::<_, Error>(ring)
    };
    let raw = RawQueue {
        rx: ring(0)?,
        tx: ring(1)?,
    };
    let (events, waker) = events(&*calls[0])?;
    let pair = LentPair {
        rings: Rings::Virtio(raw),
        events,
        waker,
        memory: memory.clone(),
        open: Arc::clone(open),
        lengths: Lengths::of(mtu),
        _rings: Arc::clone(rings),
    };
    Ok((pair, kicks, calls))
}
