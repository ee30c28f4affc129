//! The front-end's connection.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vhost_proto::channel::{Channel, Notice};
use vhost_proto::{Command, F_PROTOCOL_FEATURES, Frontend, ProtocolFeatures, Reply, RingAddr};
use virtio_ring::Features;
use virtio_ring::net::Config;

use super::socket::{Read, connect_until, read_bytes, wait, wait_beside, write_beside};
use super::{Error, Region, RingSetup};

/// Device status bits (virtio 1.3, 2.1).
const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;

/// Regions of a memory table; more go one by one (CONFIGURE_MEM_SLOTS).
const TABLE: usize = 8;

/// Protocol features that are used where they are offered.
const WANTED: ProtocolFeatures = ProtocolFeatures::MQ
    .union(ProtocolFeatures::REPLY_ACK)
    .union(ProtocolFeatures::RARP)
    .union(ProtocolFeatures::MTU)
    .union(ProtocolFeatures::STATUS)
    .union(ProtocolFeatures::CONFIG)
    .union(ProtocolFeatures::BACKEND_REQ)
    .union(ProtocolFeatures::CONFIGURE_MEM_SLOTS);

/// Requests of the back-end that are handled at a time.
const REQUESTS: usize = 64;

/// What a back-end offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offered {
    /// Virtio features.
    pub features: u64,
    /// Protocol features; none if it has no such.
    pub protocol: ProtocolFeatures,
    /// Queue pairs.
    pub queue_pairs: u16,
    /// Regions of memory that it takes.
    pub regions: usize,
}

/// How long a back-end may be silent while another connection waits.
const PATIENCE: Duration = Duration::from_millis(200);

/// The longest that a port waits for its rings to be stopped when it is closed. A back-end that takes longer sees that the
/// connection is gone.
const GOODBYE: Duration = Duration::from_millis(500);

/// A connection to a back-end, driven by whoever holds it: every call sends, and waits for the answers. It has one time
/// limit, however many messages it takes.
#[derive(Debug)]
pub struct FrontendSession {
    socket: OwnedFd,
    path: PathBuf,
    timeout: Duration,
    /// The end of the call that runs, and of the operation of several calls that runs, if one does.
    until: Instant,
    operation: Option<Instant>,
    /// An eventfd that ends every wait once it is readable.
    stop: Option<Arc<OwnedFd>>,
    /// Readable when another connection waits for this one to end.
    rival: Option<OwnedFd>,
    /// The first questions are asked.
    asked: bool,
    machine: Frontend<OwnedFd>,
    offered: Option<Offered>,
    rings: Vec<u32>,
    /// Our end of the socket for requests of the back-end.
    channel: Option<(OwnedFd, Channel<OwnedFd>)>,
    /// The message that was sent last.
    step: &'static str,
    /// Messages without descriptors that go with the next one, in one call.
    unsent: Vec<u8>,
    /// What the back-end has of our memory.
    shared: Vec<Shared>,
    /// Regions that it takes, once it was asked.
    slots: Option<usize>,
}

/// A region that a back-end has, and the file behind it: another file at the same addresses is another region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shared {
    region: vhost_proto::Region,
    file: (u64, u64),
}

impl FrontendSession {
    /// Connects to the back-end that listens at `path`. `timeout` is for each call, this one included.
    ///
    /// # Errors
    /// [`Error::PathTooLong`], [`Error::NoSocket`], [`Error::NobodyListens`], [`Error::Socket`].
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, Error> {
        Self::connect_beside(path, timeout, None)
    }

    /// The same, until `stop` is readable. That ends later waits, too, except that of [`stop`](FrontendSession::stop).
    pub(crate) fn connect_beside(path: &Path, timeout: Duration, stop: Option<Arc<OwnedFd>>) -> Result<Self, Error> {
        let deadline = crate::deadline(timeout);
        let socket = connect_until(path, deadline, stop.as_deref().map(AsFd::as_fd))?;
        let mut session = Self::new(socket, path, timeout);
        session.stop_by(stop);
        Ok(session)
    }

    /// Over a connection that was made already. `path` is for messages.
    pub fn new(socket: OwnedFd, path: &Path, timeout: Duration) -> Self {
        FrontendSession {
            socket,
            path: path.to_owned(),
            timeout,
            until: crate::deadline(timeout),
            operation: None,
            stop: None,
            rival: None,
            asked: false,
            machine: Frontend::new(),
            offered: None,
            rings: Vec::new(),
            channel: None,
            step: "the connection",
            unsent: Vec::new(),
            shared: Vec::new(),
            slots: None,
        }
    }

    /// Ends every wait once `stop` is readable: [`Error::Stopped`].
    pub(crate) fn stop_by(&mut self, stop: Option<Arc<OwnedFd>>) {
        self.stop = stop;
    }

    /// Gives way to another connection, which makes `rival` readable, when the back-end is silent: [`Error::GaveWay`].
    pub(crate) fn give_way_to(&mut self, rival: Option<OwnedFd>) {
        self.rival = rival;
    }

    /// Begins an operation of several calls: they have one time limit together, until [`end`](FrontendSession::end).
    pub fn begin(&mut self) {
        self.operation = Some(crate::deadline(self.timeout));
    }

    /// Ends the operation: each call has a time limit of its own again.
    pub fn end(&mut self) {
        self.operation = None;
    }

    /// A call begins.
    fn call(&mut self) {
        self.until = self.operation.unwrap_or_else(|| crate::deadline(self.timeout));
    }

    /// Becomes the owner, and asks what the back-end offers. Does not wait for the answer.
    pub(crate) fn hello(&mut self) -> Result<(), Error> {
        if !self.asked {
            self.asked = true;
            self.call();
            self.tell(Command::SetOwner)?;
            self.send(Command::GetFeatures, &[], true)?;
        }
        Ok(())
    }

    /// Whether the back-end has said something, or is gone.
    pub(crate) fn is_readable(&self) -> bool {
        wait(self.socket.as_fd(), false, Instant::now()).unwrap_or(true)
    }

    /// Becomes the owner, and asks what the back-end offers.
    ///
    /// # Errors
    /// Those of a connection: [`Error::Timeout`], [`Error::Closed`], [`Error::Protocol`], [`Error::Socket`].
    pub fn offer(&mut self) -> Result<Offered, Error> {
        self.hello()?;
        self.call();
        let features = match self.answer().map_err(both_ends)? {
            Reply::Features(features) => features,
            _ => return Err(self.confused()),
        };
        let mut offered = Offered {
            features,
            protocol: ProtocolFeatures::empty(),
            queue_pairs: 1,
            regions: TABLE,
        };
        if features & F_PROTOCOL_FEATURES != 0 {
            let protocol = match self.ask(Command::GetProtocolFeatures, &[])? {
                Some(Reply::ProtocolFeatures(protocol)) => protocol,
                _ => return Err(self.confused()),
            };
            let mut wanted = WANTED;
            // All that a back-end is heard about is its configuration space.
            wanted.set(
                ProtocolFeatures::BACKEND_REQ,
                protocol.contains(ProtocolFeatures::CONFIG),
            );
            self.tell(Command::SetProtocolFeatures(protocol & wanted))?;
            offered.protocol = protocol;
            if protocol.contains(ProtocolFeatures::MQ)
                && let Some(Reply::QueueNum(pairs)) = self.ask(Command::GetQueueNum, &[])?
            {
                // Of network devices the number is of pairs.
                offered.queue_pairs = u16::try_from(pairs).unwrap_or(u16::MAX).max(1);
            }
        }
        self.offered = Some(offered);
        Ok(offered)
    }

    /// Sets the features, shares the memory, starts and enables all rings.
    ///
    /// # Errors
    /// Those of a connection; [`Error::Protocol`] with `Refused` if the back-end says that it could not.
    pub fn start(&mut self, features: u64, regions: &[Region<'_>], rings: &[RingSetup<'_>]) -> Result<(), Error> {
        let rings: Vec<_> = (0..).zip(rings.iter().copied()).collect();
        self.start_rings(features, regions, &rings)
    }

    /// The same for rings of any numbers.
    ///
    /// # Errors
    /// As [`start`](FrontendSession::start).
    pub fn start_rings(
        &mut self,
        features: u64,
        regions: &[Region<'_>],
        rings: &[(u32, RingSetup<'_>)],
    ) -> Result<(), Error> {
        self.call();
        let protocol = self.machine.protocol_features();
        // Some back-ends make the ring's state when its call descriptor comes, so it comes first.
        for &(index, ring) in rings {
            self.tell_with(Command::SetVringCall(index, true), &[ring.call])?;
        }
        let bit30 = self.machine.offered() & F_PROTOCOL_FEATURES;
        self.tell(Command::SetFeatures(features | bit30))?;
        if protocol.contains(ProtocolFeatures::STATUS) {
            self.tell(Command::SetStatus(ACKNOWLEDGE | DRIVER | FEATURES_OK))?;
            match self.ask(Command::GetStatus, &[])? {
                Some(Reply::Status(status)) if status & FEATURES_OK != 0 => {}
                Some(Reply::Status(status)) => {
                    return Err(self.setup(format!(
                        "the back-end does not accept features {features:#x}: it cleared FEATURES_OK (status {status:#x})"
                    )));
                }
                _ => return Err(self.confused()),
            }
        }
        self.share_regions(regions)?;
        for &(index, ring) in rings {
            self.tell(Command::SetVringNum(index, ring.num.into()))?;
            self.tell(Command::SetVringBase(index, ring.base))?;
            let addr = RingAddr {
                desc: ring.desc,
                avail: ring.avail,
                used: ring.used,
            };
            self.tell(Command::SetVringAddr(index, addr))?;
            self.tell_with(Command::SetVringKick(index, true), &[ring.kick])?;
        }
        self.rings = rings.iter().map(|(index, _)| *index).collect();
        if bit30 != 0 {
            for &(index, _) in rings {
                self.tell(Command::SetVringEnable(index, true))?;
            }
        }
        let status = Command::SetStatus(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        let known = protocol.contains(ProtocolFeatures::STATUS) && self.ask(status, &[])?.is_some();
        if !known {
            // An answer to anything says that all before it was taken.
            self.ask(Command::GetFeatures, &[])?;
        }
        self.flush()
    }

    /// Enables the first `active` of `pairs` queue pairs, and disables the others. `false`, and nothing done: without
    /// VHOST_USER_F_PROTOCOL_FEATURES rings are always enabled.
    ///
    /// # Errors
    /// Those of a connection.
    pub fn enable(&mut self, active: u16, pairs: u16) -> Result<bool, Error> {
        if self.machine.offered() & F_PROTOCOL_FEATURES == 0 {
            return Ok(false);
        }
        self.call();
        for ring in 0..2 * u32::from(pairs) {
            self.tell(Command::SetVringEnable(ring, ring < 2 * u32::from(active)))?;
        }
        // An answer to anything says that all before it was taken.
        self.ask(Command::GetFeatures, &[])?;
        Ok(true)
    }

    /// Says which MTU the port has, if the back-end wants to know that; `false`: it refuses that MTU. After
    /// [`start`](FrontendSession::start), with VIRTIO_NET_F_MTU among the features. A back-end that refuses it is as good as
    /// one that does not want to know.
    ///
    /// # Errors
    /// Those of a connection.
    pub fn set_mtu(&mut self, mtu: u16) -> Result<bool, Error> {
        if !self.machine.protocol_features().contains(ProtocolFeatures::MTU) {
            return Ok(true);
        }
        self.call();
        match self.ask(Command::NetSetMtu(mtu), &[]) {
            Err(Error::Protocol {
                source: vhost_proto::Error::Refused { .. },
                ..
            }) => Ok(false),
            other => other.map(|_| true),
        }
    }

    /// The configuration space, as far as it exists with these features; `None`: the back-end has none.
    ///
    /// # Errors
    /// Those of a connection.
    pub fn config(&mut self, features: Features) -> Result<Option<Config>, Error> {
        let len = Config::len(features);
        if len == 0 || !self.machine.protocol_features().contains(ProtocolFeatures::CONFIG) {
            return Ok(None);
        }
        self.call();
        match self.ask(Command::GetConfig(0, len as u32), &[])? {
            Some(Reply::Config(bytes, count)) if count == len => Ok(Some(Config::parse(&bytes[..len]))),
            Some(Reply::Config(..)) => Ok(None),
            _ => Err(self.confused()),
        }
    }

    /// Gives the back-end a socket for requests of its own, if it wants one.
    ///
    /// # Errors
    /// Those of a connection.
    pub fn open_channel(&mut self) -> Result<(), Error> {
        if !self.machine.protocol_features().contains(ProtocolFeatures::BACKEND_REQ) {
            return Ok(());
        }
        self.call();
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(|e| Error::socket("making a socket for", &self.path, e))?;
        self.tell_with(Command::SetBackendReqFd, &[theirs.as_fd()])?;
        self.channel = Some((ours, Channel::new()));
        Ok(())
    }

    /// What becomes readable when the back-end has a request, for [`requests`](FrontendSession::requests).
    pub fn channel(&self) -> Option<BorrowedFd<'_>> {
        self.channel.as_ref().map(|(socket, _)| socket.as_fd())
    }

    /// Takes the back-end's requests; whether its configuration space changed. Anything else is refused.
    ///
    /// # Errors
    /// Those of a connection.
    pub fn requests(&mut self) -> Result<bool, Error> {
        let mut changed = false;
        self.call();
        let Some((socket, mut channel)) = self.channel.take() else {
            return Ok(false);
        };
        let stop = self.stop.clone();
        let stop = stop.as_deref().map(AsFd::as_fd);
        let mut bytes = [0u8; 1024];
        for _ in 0..REQUESTS {
            let wants = channel.wants().min(bytes.len());
            let n = match read_bytes(socket.as_fd(), &mut bytes[..wants]) {
                Ok(Read::Bytes(n)) => n,
                Ok(Read::Nothing) => break,
                // It has no more requests; what is wrong with it shows on the connection itself.
                Ok(Read::Closed) => return Ok(changed),
                Err(e) => return Err(Error::socket("reading requests of", &self.path, e)),
            };
            let asked = channel.receive(&bytes[..n], []).map_err(|e| self.protocol(e))?;
            let Some((notice, pending)) = asked else { continue };
            let known = matches!(notice, Notice::ConfigChange);
            changed |= known;
            if let Some(pending) = pending {
                let answer = pending.answer(known);
                write_beside(socket.as_fd(), answer.bytes(), &[], self.until, stop)
                    .map_err(|e| Error::socket("answering a request of", &self.path, e))?;
            }
        }
        self.channel = Some((socket, channel));
        Ok(changed)
    }

    /// When a wait for an answer that comes by other ways ends, what ends it early, and the error then.
    pub(crate) fn limit_of(&self, step: &'static str) -> (Instant, Option<BorrowedFd<'_>>, Error) {
        let error = Error::Timeout {
            path: self.path.clone(),
            step,
            ms: u64::try_from(self.timeout.as_millis()).unwrap_or(u64::MAX),
        };
        let until = self.operation.unwrap_or_else(|| crate::deadline(self.timeout));
        (until, self.stop.as_deref().map(AsFd::as_fd), error)
    }

    /// Has the back-end announce an address; whether it can.
    ///
    /// # Errors
    /// Those of a connection.
    pub fn announce(&mut self, address: [u8; 6]) -> Result<bool, Error> {
        if !self.machine.protocol_features().contains(ProtocolFeatures::RARP) {
            return Ok(false);
        }
        self.call();
        self.tell(Command::SendRarp(address))?;
        self.flush()?;
        Ok(true)
    }

    /// Shares memory: what was shared before and is not among `regions` is not shared any more.
    ///
    /// A back-end that takes regions one by one (CONFIGURE_MEM_SLOTS) is told what is gone and what is new; it keeps the
    /// rest mapped. If nothing stays, or it does not, it gets a table.
    ///
    /// # Errors
    /// Those of a connection; [`Error::Setup`] if there are more regions than the back-end takes.
    pub fn share(&mut self, regions: &[Region<'_>]) -> Result<(), Error> {
        self.call();
        self.share_regions(regions)
    }

    fn share_regions(&mut self, regions: &[Region<'_>]) -> Result<(), Error> {
        let mut wanted = Vec::with_capacity(regions.len());
        for r in regions {
            let stat = rustix::fs::fstat(r.fd).map_err(|e| Error::socket("fstat(2) of memory for", &self.path, e))?;
            wanted.push(Shared {
                region: vhost_proto::Region {
                    guest_addr: r.guest_addr,
                    size: r.size,
                    user_addr: r.user_addr,
                    offset: r.offset,
                },
                file: (stat.st_dev as u64, stat.st_ino as u64),
            });
        }
        let one_by_one = self
            .machine
            .protocol_features()
            .contains(ProtocolFeatures::CONFIGURE_MEM_SLOTS);
        let stays = one_by_one && self.shared.iter().any(|old| wanted.contains(old));
        if regions.len() <= TABLE && !stays {
            let described: Vec<vhost_proto::Region> = wanted.iter().map(|w| w.region).collect();
            let fds: Vec<BorrowedFd<'_>> = regions.iter().map(|region| region.fd).collect();
            self.ask(Command::SetMemTable(&described), &fds)?;
            self.shared = wanted;
            return Ok(());
        }
        let slots = self.slots(one_by_one, regions.len())?;
        if regions.len() > slots {
            return Err(self.setup(format!(
                "{} regions of memory, and the back-end takes {slots}: use larger pages, or one file",
                regions.len()
            )));
        }
        // What is gone first: it may be in the way of what is new, and holds a slot.
        while let Some(at) = self.shared.iter().position(|old| !wanted.contains(old)) {
            self.ask(Command::RemMemReg(self.shared[at].region), &[])?;
            self.shared.remove(at);
        }
        for (new, region) in wanted.into_iter().zip(regions) {
            if !self.shared.contains(&new) {
                self.ask(Command::AddMemReg(new.region), &[region.fd])?;
                self.shared.push(new);
            }
        }
        Ok(())
    }

    /// Regions that the back-end takes. It is asked once, and only where there are more than any back-end takes.
    fn slots(&mut self, one_by_one: bool, wanted: usize) -> Result<usize, Error> {
        if !one_by_one || wanted <= TABLE {
            return Ok(TABLE);
        }
        if let Some(slots) = self.slots {
            return Ok(slots);
        }
        let slots = match self.ask(Command::GetMaxMemSlots, &[])? {
            Some(Reply::MaxMemSlots(most)) => usize::try_from(most).unwrap_or(usize::MAX),
            _ => TABLE,
        };
        self.slots = Some(slots);
        Ok(slots)
    }

    /// Disables and stops all rings: when this returns the back-end touches them no more. It waits half a second at the
    /// most.
    ///
    /// # Errors
    /// Those of a connection.
    pub fn stop(&mut self) -> Result<(), Error> {
        self.until = Instant::now() + self.timeout.min(GOODBYE);
        // It ends waits so that there is time for this one.
        self.stop = None;
        let rings = std::mem::take(&mut self.rings);
        if self.machine.offered() & F_PROTOCOL_FEATURES != 0 {
            for &index in &rings {
                self.tell(Command::SetVringEnable(index, false))?;
            }
        }
        for index in rings {
            self.ask(Command::GetVringBase(index), &[])?;
        }
        self.flush()
    }

    /// To be called when the connection is readable between calls: the back-end has nothing to say there, so either it
    /// is gone, or it broke the protocol.
    ///
    /// # Errors
    /// Those of a connection; [`Error::Closed`] above all.
    pub fn service(&mut self) -> Result<(), Error> {
        self.step = "";
        match self.take()? {
            None => Ok(()),
            Some(_) => Err(self.confused()),
        }
    }

    /// Queues a command that has no answer of its own: it goes with the next one.
    fn tell(&mut self, command: Command<'_>) -> Result<(), Error> {
        self.step = command.request().name();
        let (out, _) = self.machine.command(command, false).map_err(|e| self.protocol(e))?;
        self.unsent.extend_from_slice(out.bytes());
        Ok(())
    }

    /// Sends a command with descriptors that has no answer of its own.
    fn tell_with(&mut self, command: Command<'_>, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        self.send(command, fds, false).map(|_| ())
    }

    /// Sends a command and waits for its answer, or its acknowledgement where that was negotiated.
    fn ask(&mut self, command: Command<'_>, fds: &[BorrowedFd<'_>]) -> Result<Option<Reply<OwnedFd>>, Error> {
        if !self.send(command, fds, true)? {
            return Ok(None);
        }
        self.answer().map(Some)
    }

    /// Waits for the answer to what was asked.
    fn answer(&mut self) -> Result<Reply<OwnedFd>, Error> {
        let patience = Instant::now() + PATIENCE;
        loop {
            if let Some(reply) = self.take()? {
                return Ok(reply);
            }
            let now = Instant::now();
            let mut turn = self.until;
            if let Some(rival) = &self.rival {
                if now >= patience && wait(rival.as_fd(), false, now) == Ok(true) {
                    return Err(Error::GaveWay {
                        path: self.path.clone(),
                        step: self.step,
                    });
                }
                turn = patience.max(now + PATIENCE / 10).min(self.until);
            }
            let stop = self.stop.as_deref().map(AsFd::as_fd);
            match wait_beside(self.socket.as_fd(), false, turn, stop) {
                Ok(true) => {}
                Ok(false) if Instant::now() < self.until => {}
                Ok(false) => return Err(self.timeout()),
                Err(rustix::io::Errno::CANCELED) => return Err(self.stopped()),
                Err(e) => return Err(Error::socket("waiting for", &self.path, e)),
            }
        }
    }

    fn send(&mut self, command: Command<'_>, fds: &[BorrowedFd<'_>], ack: bool) -> Result<bool, Error> {
        debug_assert_eq!(Frontend::<OwnedFd>::fds_of(&command), fds.len());
        // Descriptors belong to the first byte of a call, so what was queued goes before them by itself.
        if !fds.is_empty() {
            self.flush()?;
        }
        self.step = command.request().name();
        let (out, answered) = self.machine.command(command, ack).map_err(|e| self.protocol(e))?;
        self.unsent.extend_from_slice(out.bytes());
        self.flush_with(fds)?;
        Ok(answered)
    }

    fn flush(&mut self) -> Result<(), Error> {
        self.flush_with(&[])
    }

    fn flush_with(&mut self, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        let stop = self.stop.as_deref().map(AsFd::as_fd);
        let result = write_beside(self.socket.as_fd(), &self.unsent, fds, self.until, stop);
        self.unsent.clear();
        result.map_err(|e| match e {
            rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET => self.closed(false),
            rustix::io::Errno::TIMEDOUT => self.timeout(),
            rustix::io::Errno::CANCELED => self.stopped(),
            e => Error::socket("sending to", &self.path, e),
        })
    }

    fn stopped(&self) -> Error {
        Error::Stopped {
            path: self.path.clone(),
        }
    }

    fn timeout(&self) -> Error {
        Error::Timeout {
            path: self.path.clone(),
            step: self.step,
            ms: u64::try_from(self.timeout.as_millis()).unwrap_or(u64::MAX),
        }
    }

    /// Takes what has come, up to one reply.
    fn take(&mut self) -> Result<Option<Reply<OwnedFd>>, Error> {
        let mut bytes = [0u8; 1024];
        loop {
            let wants = self.machine.wants().min(bytes.len());
            match read_bytes(self.socket.as_fd(), &mut bytes[..wants]) {
                Ok(Read::Bytes(n)) => {
                    let reply = self.machine.receive(&bytes[..n], []).map_err(|e| self.protocol(e))?;
                    if reply.is_some() {
                        return Ok(reply);
                    }
                }
                Ok(Read::Nothing) => return Ok(None),
                Ok(Read::Closed) => {
                    let mid = matches!(self.machine.closed(), Some(vhost_proto::Error::Truncated { have: 1.. }));
                    return Err(self.closed(mid));
                }
                Err(e) => return Err(Error::socket("reading from", &self.path, e)),
            }
        }
    }

    fn protocol(&self, source: vhost_proto::Error) -> Error {
        Error::Protocol {
            path: self.path.clone(),
            source,
        }
    }

    fn closed(&self, mid: bool) -> Error {
        Error::Closed {
            path: self.path.clone(),
            step: self.step,
            mid,
        }
    }

    fn setup(&self, what: String) -> Error {
        Error::Setup {
            path: self.path.clone(),
            what,
        }
    }

    /// An answer of another kind than the question: the machine lets none such through.
    fn confused(&self) -> Error {
        match self.step {
            "" => self.setup("an answer that nothing was asked for".into()),
            step => self.setup(format!("an answer that does not belong to {step}")),
        }
    }
}

/// A front-end at the other end asks what this one does: it has a name.
fn both_ends(error: Error) -> Error {
    match error {
        Error::Protocol {
            path,
            source: source @ vhost_proto::Error::NotAReply { .. },
        } => Error::Setup {
            path,
            what: format!(
                "{source}: the other side is a front-end, too: one of the two must be a back-end, as switches are"
            ),
        },
        error => error,
    }
}

impl AsFd for FrontendSession {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
