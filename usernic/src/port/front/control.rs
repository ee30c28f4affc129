//! What a front-end asks of a back-end's network device: its configuration space, and commands over its control queue.
//!
//! A back-end without them is asked nothing: filters and queue pairs are then this side's own affair.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hugemem::Segment;
use rustix::event::{EventfdFlags, epoll, eventfd};
use virtio_ring::any::{Driver, Layout};
use virtio_ring::net::{Ack, Command, Config, HashTypes, Status};
use virtio_ring::{Features, Options, Segment as Piece, Slot};

use super::super::plan::COMMAND;
use super::super::watch;
use super::Control;
use crate::copy::copy;
use crate::error::{Error, Tried};
use crate::filter::Filter;
use crate::offload::hash::{Indirection, KEY};
use crate::packet::{Burst, Packet};
use crate::pool::Cache;
use crate::queue::drain;
use crate::spec::PortSpec;
use crate::vhost_user::{FrontendSession, wait_beside};

/// Features that are used of a back-end that has a configuration space. Its VLAN filter is not: it begins with no VLAN
/// listed, where a port begins with all.
const WANTED: Features = Features::NET_MAC
    .union(Features::NET_STATUS)
    .union(Features::NET_SPEED_DUPLEX)
    .union(Features::NET_GUEST_ANNOUNCE)
    .union(Features::NET_CTRL_VQ)
    .union(Features::NET_CTRL_RX)
    .union(Features::NET_CTRL_RX_EXTRA)
    .union(Features::NET_CTRL_MAC_ADDR);

/// Those of them that are nothing without a control queue (virtio 1.3, 5.1.3.1).
const CONTROLLED: Features = Features::NET_CTRL_VQ
    .union(Features::NET_RSS)
    .union(Features::NET_HASH_REPORT)
    .union(Features::NET_GUEST_ANNOUNCE)
    .union(Features::NET_CTRL_RX)
    .union(Features::NET_CTRL_RX_EXTRA)
    .union(Features::NET_CTRL_MAC_ADDR);

/// How long an answer is looked for before a sleep: a device that polls has it within microseconds.
const SPIN: Duration = Duration::from_micros(50);

/// Virtqueues that the protocol can name (vhost-user.rst: bits 0 to 7 of a kick or call message).
const RINGS: u32 = 256;

/// What is known of a back-end's network device.
#[derive(Default)]
pub(super) struct Device {
    pub(super) features: Features,
    config: Option<Config>,
    ring: Option<ControlQueue>,
    /// Which virtqueue that is.
    pub(super) index: u32,
}

impl Device {
    /// Reads the configuration space: what to add to the features that are asked for.
    ///
    /// # Errors
    /// Those of a connection.
    pub(super) fn look(
        session: &mut FrontendSession,
        offered: Features,
        spec: &PortSpec,
    ) -> Result<(Self, Features), Error> {
        let pairs = spec.queues;
        let config = session.config(offered)?;
        let Some(found) = config else {
            return Ok((Device::default(), Features::empty()));
        };
        let mut wanted = WANTED;
        // Each costs a look at the header of every frame.
        wanted.set(Features::NET_HASH_REPORT, spec.rss && hashes(&found));
        wanted.set(Features::NET_RSS, spec.rss && pairs > 1 && hashes(&found));
        // Behind all pairs that the back-end has, if there are to be several (virtio 1.3, 5.1.2).
        let most = if pairs > 1 { found.max_virtqueue_pairs } else { 1 };
        let index = 2 * u32::from(most);
        let mq = pairs == 1 || offered.contains(Features::NET_MQ);
        if !mq || most < pairs || index >= RINGS || !offered.contains(Features::NET_CTRL_VQ) {
            wanted.remove(CONTROLLED);
        }
        let device = Device {
            config,
            index,
            ..Device::default()
        };
        Ok((device, wanted))
    }

    /// Whether the back-end says that the link is up; who does not say has none that could be down.
    fn link_up(&self) -> bool {
        let says = self.features.contains(Features::NET_STATUS);
        !says || self.config.is_none_or(|config| config.status.contains(Status::LINK_UP))
    }

    /// The link's speed, 0 if unknown.
    fn speed(&self) -> u32 {
        let config = self
            .config
            .filter(|_| self.features.contains(Features::NET_SPEED_DUPLEX));
        // Above 2^31 - 1: not known (virtio 1.3, 5.1.4).
        config.map_or(0, |config| config.speed).min(1 << 31) & 0x7fff_ffff
    }
}

/// What is to be hashed, of what the device can.
fn hash_types(config: &Config) -> HashTypes {
    config.supported_hash_types & HashTypes::from_bits_truncate(0x1ff)
}

/// Whether a device can make the hashes that are wanted.
fn hashes(config: &Config) -> bool {
    usize::from(config.rss_max_key_size) >= KEY.len() && !hash_types(config).is_empty()
}

/// The RARP frame by which a station that moved tells all bridges where it is: it asks everybody for its own address
/// (RFC 903), and nobody need answer.
fn reverse_request(mac: [u8; 6]) -> [u8; 60] {
    let mut frame = [0; 60];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&mac);
    // EtherType; Ethernet, IPv4, lengths of their addresses, reverse request.
    frame[12..22].copy_from_slice(&[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    frame[22..28].copy_from_slice(&mac);
    frame[32..38].copy_from_slice(&mac);
    frame
}

fn put_key(bytes: &mut Vec<u8>) {
    bytes.push(KEY.len() as u8);
    bytes.extend(KEY);
}

/// The control queue's ring.
pub(super) struct ControlQueue {
    driver: Driver<Box<[Slot]>>,
    kick: OwnedFd,
    call: OwnedFd,
    /// The call is its only member, edge-triggered: the back-end holds the call too, so nobody reads it.
    called: OwnedFd,
    /// Where commands are written.
    buffer: NonNull<u8>,
    /// Keeps ring and buffer mapped.
    _segment: Arc<Segment>,
}

// SAFETY: ring and buffer are reached through this value alone on our side.
unsafe impl Send for ControlQueue {}

impl ControlQueue {
    /// A ring in its initial state at `at` in the segment, where the plan has room for it and for a command.
    pub(super) fn new(segment: &Arc<Segment>, layout: Layout, at: usize, options: Options) -> Result<Self, Error> {
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        let slots = vec![Slot::default(); usize::from(layout.size())].into_boxed_slice();
        // SAFETY: the plan has room there, for the ring and for a command behind it, at an aligned place; the segment stays
        // mapped while this value lives, which is the only driver on the ring; no device is: the session is not up yet.
        let (driver, buffer) = unsafe {
            let block = segment.base().add(at);
            let driver = Driver::new(layout.place(block), layout.size(), options, slots);
            (driver, block.add(layout.block_len()))
        };
        let call = eventfd(0, flags).tried("eventfd(2)")?;
        let called = epoll::create(epoll::CreateFlags::CLOEXEC).tried("epoll_create1(2)")?;
        watch(&called, &call)?;
        Ok(ControlQueue {
            driver: driver.map_err(|source| Error::Ring { index: 0, source })?,
            kick: eventfd(0, flags).tried("eventfd(2)")?,
            call,
            called,
            buffer,
            _segment: Arc::clone(segment),
        })
    }

    pub(super) fn events(&self) -> [BorrowedFd<'_>; 2] {
        [self.kick.as_fd(), self.call.as_fd()]
    }

    /// Has the device obey a command; its answer. `None`: none came in time, or none that makes sense.
    fn command(&mut self, bytes: &[u8], deadline: Instant, stop: Option<BorrowedFd<'_>>) -> Option<Ack> {
        // The last byte is for the answer.
        let end = COMMAND - 1;
        if bytes.len() > end {
            return Some(Ack::ERR);
        }
        // SAFETY: the buffer has COMMAND bytes, and the device has none of them: one command at a time.
        let answer = unsafe {
            copy(bytes.as_ptr(), self.buffer.as_ptr(), bytes.len());
            self.buffer.add(end)
        };
        // SAFETY: in the buffer.
        unsafe { answer.as_ptr().write_volatile(Ack::ERR.0) };
        let base = self.buffer.as_ptr() as u64;
        let piece = |at: usize, len: usize| Piece {
            addr: base + at as u64,
            len: len as u32,
        };
        // SAFETY: in the buffer, which is this queue's alone and lies in the port's segment with it.
        unsafe { self.driver.add(&[piece(0, bytes.len()), piece(end, 1)], 1, 0) }.ok()?;
        if self.driver.publish() {
            // Where that fails the answer does not come in time.
            let _ = crate::notify::signal(&self.kick);
        }
        let begin = Instant::now();
        while self.driver.poll_each(1, |_| {}) == 0 {
            if self.driver.is_broken() {
                return None;
            }
            if begin.elapsed() < SPIN {
                std::hint::spin_loop();
                continue;
            }
            // Taken before the ring is looked at once more: a call that comes behind that look ends the sleep.
            drain(&self.called);
            if !self.driver.set_notify(true) && wait_beside(self.called.as_fd(), false, deadline, stop).is_err() {
                return None;
            }
            if Instant::now() >= deadline {
                if self.driver.poll_each(1, |_| {}) == 0 {
                    return None;
                }
                break;
            }
        }
        // SAFETY: in the buffer.
        Some(Ack(unsafe { answer.as_ptr().read_volatile() }))
    }
}

impl Control {
    /// The control queue's ring, if that was negotiated.
    pub(super) fn make_control(&mut self, features: Features, mut device: Device) -> Result<(), Error> {
        // One driver at a time is on the ring.
        self.device = Device::default();
        device.features = features;
        if features.contains(Features::NET_CTRL_VQ) {
            let (layout, at) = self.control_place;
            let options = Options::from_features(features);
            device.ring = Some(ControlQueue::new(&self.segment, layout, self.area_at + at, options)?);
        }
        self.device = device;
        Ok(())
    }

    pub(super) fn control_ring(&self) -> Option<&ControlQueue> {
        self.device.ring.as_ref()
    }

    /// Has the device obey a command; whether it did. `None`: there is no control queue.
    ///
    /// # Errors
    /// [`Error::VhostUser`]: no answer came.
    fn command(&mut self, session: &FrontendSession, bytes: &[u8]) -> Result<Option<bool>, Error> {
        let Some(ring) = &mut self.device.ring else {
            return Ok(None);
        };
        let (until, stop, timeout) = session.limit_of("a command of the control queue");
        match ring.command(bytes, until, stop) {
            Some(ack) => Ok(Some(ack == Ack::OK)),
            None => Err(timeout.into()),
        }
    }

    /// Tells a fresh device what this port is: its address, its queue pairs, what it lets in.
    pub(super) fn introduce(&mut self, session: &FrontendSession) -> Result<(), Error> {
        let features = self.device.features;
        if features.contains(Features::NET_CTRL_MAC_ADDR) {
            let mac = [&Command::MAC_ADDR_SET.to_bytes()[..], &self.inner.mac()].concat();
            self.command(session, &mac)?;
        }
        self.use_pairs(session, self.active)?;
        self.report_hashes(session)?;
        self.use_filter(Some(session))
    }

    /// Has the device use so many queue pairs. `None`: it has no say in that.
    pub(super) fn use_pairs(&mut self, session: &FrontendSession, count: u16) -> Result<Option<bool>, Error> {
        if !self.device.features.contains(Features::NET_MQ) {
            return Ok(None);
        }
        let [class, command] = Command::MQ_VQ_PAIRS_SET.to_bytes();
        let [low, high] = count.to_le_bytes();
        let granted = self.command(session, &[class, command, low, high])?;
        if granted == Some(true) && self.device.features.contains(Features::NET_RSS) {
            // The number of pairs ended what scaling there was (virtio 1.3, 5.1.6.5.5).
            return self.scale(session, count);
        }
        Ok(granted)
    }

    /// Spreads frames evenly over so many queue pairs, by the hash that most drivers use.
    fn scale(&mut self, session: &FrontendSession, count: u16) -> Result<Option<bool>, Error> {
        let Some(config) = self.device.config else {
            return Ok(None);
        };
        // At least 1, and a power of two (5.1.6.5.7).
        let most = config
            .rss_max_indirection_table_length
            .clamp(1, Indirection::MAX as u16);
        let len = 1u16 << most.ilog2();
        let mut bytes = Command::MQ_RSS_CONFIG.to_bytes().to_vec();
        bytes.extend(hash_types(&config).bits().to_le_bytes());
        bytes.extend((len - 1).to_le_bytes());
        // What has no hash goes to the first.
        bytes.extend([0, 0]);
        bytes.extend((0..len).flat_map(|entry| (entry % count).to_le_bytes()));
        bytes.extend(count.to_le_bytes());
        put_key(&mut bytes);
        self.command(session, &bytes)
    }

    /// Asks for hashes with each frame, where no scaling has done so.
    fn report_hashes(&mut self, session: &FrontendSession) -> Result<(), Error> {
        let features = self.device.features;
        if let Some(config) = self.device.config
            && features.contains(Features::NET_HASH_REPORT)
            && !features.contains(Features::NET_RSS)
        {
            let mut bytes = Command::MQ_HASH_CONFIG.to_bytes().to_vec();
            bytes.extend(hash_types(&config).bits().to_le_bytes());
            bytes.extend([0; 8]);
            put_key(&mut bytes);
            self.command(session, &bytes)?;
        }
        Ok(())
    }

    /// Lets in what the filter says: by the device where it can, else, and with VLANs, by the queues. These keep to it also
    /// when the device is lost meanwhile.
    pub(super) fn use_filter(&mut self, session: Option<&FrontendSession>) -> Result<(), Error> {
        let by_device = match session {
            Some(session) => self.filter_by_device(session),
            None => Ok(false),
        };
        let done = *by_device.as_ref().unwrap_or(&false);
        for pair in &mut self.pairs {
            let filter = self.filter.clone().filter(|filter| !done || filter.vlan_filter());
            pair.gate.change(|pair| pair.set_filter(filter));
        }
        by_device.map(drop)
    }

    /// Has the device let in what the filter says; whether it does.
    fn filter_by_device(&mut self, session: &FrontendSession) -> Result<bool, Error> {
        let everything = Filter::new(self.inner.mac());
        let features = self.device.features;
        let Some(commands) = self.filter.as_deref().unwrap_or(&everything).commands(features) else {
            self.filter_nothing(session, &everything)?;
            return Ok(false);
        };
        for command in commands {
            if self.command(session, &command)? != Some(true) {
                self.filter_nothing(session, &everything)?;
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// What the device was told before, or did not take, must keep nothing out.
    fn filter_nothing(&mut self, session: &FrontendSession, everything: &Filter) -> Result<(), Error> {
        for command in everything.commands(self.device.features).into_iter().flatten() {
            self.command(session, &command)?;
        }
        Ok(())
    }

    /// The configuration space is another one: takes the link up or down with it, and announces the port if asked to.
    pub(super) fn config_changed(&mut self) -> Result<(), Error> {
        let Some(mut session) = self.session.take() else {
            return Ok(());
        };
        let result = self.read_config(&mut session);
        self.session = Some(session);
        result
    }

    fn read_config(&mut self, session: &mut FrontendSession) -> Result<(), Error> {
        if self.device.config.is_some() {
            self.device.config = session.config(self.device.features)?.or(self.device.config);
        }
        self.show_link();
        self.announce_if_asked(session)
    }

    /// Tells the network where the port's address is, if the device asks for that (virtio 1.3, 5.1.6.5.4).
    pub(super) fn announce_if_asked(&mut self, session: &FrontendSession) -> Result<(), Error> {
        let able = self.device.features.contains(Features::NET_GUEST_ANNOUNCE);
        let asked = self
            .device
            .config
            .is_some_and(|config| config.status.contains(Status::ANNOUNCE));
        if !(able && asked) {
            return Ok(());
        }
        let mut cache = Cache::new(Arc::clone(&self.pool));
        let mut burst = Burst::new(1);
        if cache.reserve(1) > 0
            && let Some(meta) = cache.pop()
        {
            // SAFETY: the buffer is ours.
            let mut packet = unsafe { Packet::from_meta(meta) };
            if packet.copy_from(&reverse_request(self.inner.mac())).is_ok() {
                let _ = burst.push(packet);
            }
        }
        if let Some(pair) = self.pairs.first_mut() {
            let counters = &self.inner.counters[0];
            // If the ring is full, or no buffer is left, then what is on its way tells the network as much.
            pair.gate.change(|pair| pair.tx(&mut cache, &mut burst, counters));
        }
        self.command(session, &Command::ANNOUNCE_ACK.to_bytes()).map(drop)
    }

    /// Says what the link is, of a session that is up.
    pub(super) fn show_link(&mut self) {
        let up = self.device.link_up();
        self.use_active(up);
        self.inner.set_speed(self.device.speed());
        let queues = if up { self.active } else { 0 };
        self.inner.set_link(queues, self.device.features.bits());
    }
}
