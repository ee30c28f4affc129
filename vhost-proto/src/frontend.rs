//! The front-end: commands out, replies in.

use zerocopy::IntoBytes;

use crate::Error;
use crate::message::{Answer, F_PROTOCOL_FEATURES, Fds, HEADER, Header, ProtocolFeatures, Request, Shape};
use crate::payload::{
    ConfigHead, Inflight, MemoryRegion, NO_FD, Number, SingleRegion, TableHead, VringAddr, VringState,
};
use crate::stream::{Assembler, Outgoing, check_size};

/// A region of memory that is shared. Its descriptor goes with the message, in the order of the regions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// The address that descriptors use.
    pub guest_addr: u64,
    /// Bytes.
    pub size: u64,
    /// The address that ring addresses use.
    pub user_addr: u64,
    /// Where it begins in the file.
    pub offset: u64,
}

impl From<Region> for MemoryRegion {
    fn from(region: Region) -> Self {
        MemoryRegion {
            guest_addr: region.guest_addr.into(),
            size: region.size.into(),
            user_addr: region.user_addr.into(),
            mmap_offset: region.offset.into(),
        }
    }
}

impl From<MemoryRegion> for Region {
    fn from(region: MemoryRegion) -> Self {
        Region {
            guest_addr: region.guest_addr.get(),
            size: region.size.get(),
            user_addr: region.user_addr.get(),
            offset: region.mmap_offset.get(),
        }
    }
}

/// Where a ring is, in the front-end's process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingAddr {
    /// Descriptor table.
    pub desc: u64,
    /// Available ring.
    pub avail: u64,
    /// Used ring.
    pub used: u64,
}

/// What a front-end asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Command<'a> {
    /// SET_OWNER
    SetOwner,
    /// GET_FEATURES
    GetFeatures,
    /// SET_FEATURES
    SetFeatures(u64),
    /// GET_PROTOCOL_FEATURES
    GetProtocolFeatures,
    /// SET_PROTOCOL_FEATURES
    SetProtocolFeatures(ProtocolFeatures),
    /// GET_QUEUE_NUM
    GetQueueNum,
    /// GET_MAX_MEM_SLOTS
    GetMaxMemSlots,
    /// SET_MEM_TABLE: at most 8 regions, a descriptor each.
    SetMemTable(&'a [Region]),
    /// ADD_MEM_REG, one descriptor.
    AddMemReg(Region),
    /// REM_MEM_REG
    RemMemReg(Region),
    /// SET_VRING_NUM: ring, descriptors.
    SetVringNum(u32, u32),
    /// SET_VRING_ADDR
    SetVringAddr(u32, RingAddr),
    /// SET_VRING_BASE: ring, base.
    SetVringBase(u32, u32),
    /// GET_VRING_BASE
    GetVringBase(u32),
    /// SET_VRING_KICK: ring, and whether a descriptor goes with it.
    SetVringKick(u32, bool),
    /// SET_VRING_CALL: ring, and whether a descriptor goes with it.
    SetVringCall(u32, bool),
    /// SET_VRING_ERR: ring, and whether a descriptor goes with it.
    SetVringErr(u32, bool),
    /// SET_VRING_ENABLE
    SetVringEnable(u32, bool),
    /// SET_STATUS
    SetStatus(u8),
    /// GET_STATUS
    GetStatus,
    /// NET_SET_MTU
    NetSetMtu(u16),
    /// SEND_RARP
    SendRarp([u8; 6]),
    /// SET_BACKEND_REQ_FD, one descriptor.
    SetBackendReqFd,
    /// GET_CONFIG: first byte, bytes.
    GetConfig(u32, u32),
    /// SET_CONFIG: first byte, bytes.
    SetConfig(u32, &'a [u8]),
    /// GET_INFLIGHT_FD: rings, descriptors of each.
    GetInflightFd(u16, u16),
    /// SET_INFLIGHT_FD, one descriptor.
    SetInflightFd(Inflight),
    /// RESET_DEVICE
    ResetDevice,
}

/// What a back-end answered.
#[allow(
    clippy::large_enum_variant,
    reason = "there is no allocator to box with, and it lives for one message"
)]
#[derive(Debug)]
#[non_exhaustive]
pub enum Reply<F> {
    /// Of GET_FEATURES.
    Features(u64),
    /// Of GET_PROTOCOL_FEATURES.
    ProtocolFeatures(ProtocolFeatures),
    /// Of GET_QUEUE_NUM.
    QueueNum(u64),
    /// Of GET_MAX_MEM_SLOTS.
    MaxMemSlots(u64),
    /// Of GET_VRING_BASE: ring, base.
    VringBase(u32, u32),
    /// Of GET_STATUS.
    Status(u8),
    /// Of GET_CONFIG: the bytes asked for, and how many. 0: the back-end has no such piece.
    Config([u8; 256], usize),
    /// Of GET_INFLIGHT_FD, with the memory's descriptor.
    Inflight(Inflight, Option<F>),
    /// It was done (REPLY_ACK).
    Ack,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    request: Request,
    /// For an acknowledgement, not for an answer of the message's own.
    ack: bool,
    index: u32,
    config: (u32, u32),
}

/// The front-end's half of a connection. One command at a time: while a reply is awaited no other command goes out.
#[derive(Debug)]
pub struct Frontend<F> {
    assembler: Assembler<F>,
    waiting: Option<Waiting>,
    offered: u64,
    features: u64,
    protocol_offered: ProtocolFeatures,
    protocol: ProtocolFeatures,
    dead: bool,
}

impl<F> Default for Frontend<F> {
    fn default() -> Self {
        Self::new()
    }
}

impl<F> Frontend<F> {
    /// A connection that was just made.
    pub const fn new() -> Self {
        Frontend {
            assembler: Assembler::new(),
            waiting: None,
            offered: 0,
            features: 0,
            protocol_offered: ProtocolFeatures::empty(),
            protocol: ProtocolFeatures::empty(),
            dead: false,
        }
    }

    /// The protocol features that were agreed on.
    pub const fn protocol_features(&self) -> ProtocolFeatures {
        self.protocol
    }

    /// The virtio features that the back-end offered, bit 30 (protocol features) among them.
    pub const fn offered(&self) -> u64 {
        self.offered
    }

    /// The message whose reply is awaited.
    pub fn awaiting(&self) -> Option<Request> {
        self.waiting.map(|w| w.request)
    }

    /// The message for a command. With `ack`, an acknowledgement is asked for if that was negotiated and the message
    /// has no answer of its own. `true`: a reply will come, and has to be received before the next command.
    ///
    /// # Errors
    /// [`Error::NotNegotiated`], [`Error::Features`] (of what was not offered), [`Error::Value`],
    /// [`Error::Untimely`] while a reply is awaited, [`Error::Dead`]. The connection is as before.
    pub fn command(&mut self, command: Command<'_>, ack: bool) -> Result<(Outgoing, bool), Error> {
        let request = command.request();
        let name = request.name();
        if self.dead {
            return Err(Error::Dead);
        }
        if let Some(waiting) = &self.waiting {
            return Err(Error::Untimely {
                name,
                before: waiting.request.name(),
            });
        }
        self.allowed(&command)?;
        let answered = request.answer() == Answer::Always;
        let ack = ack && !answered && self.protocol.contains(ProtocolFeatures::REPLY_ACK);
        let out = command.encode(ack)?;
        if answered || ack {
            let config = if let Command::GetConfig(offset, size) = command {
                (offset, size)
            } else {
                (0, 0)
            };
            self.waiting = Some(Waiting {
                request,
                ack,
                index: command.index(),
                config,
            });
        }
        match command {
            Command::SetFeatures(features) => self.features = features,
            Command::SetProtocolFeatures(features) => self.protocol = features,
            _ => {}
        }
        Ok((out, answered || ack))
    }

    /// Descriptors that go with a command.
    pub fn fds_of(command: &Command<'_>) -> usize {
        match command {
            Command::SetMemTable(regions) => regions.len(),
            Command::SetVringKick(_, fd) | Command::SetVringCall(_, fd) | Command::SetVringErr(_, fd) => {
                usize::from(*fd)
            }
            other => usize::from(other.request().fds() == Fds::One),
        }
    }

    fn allowed(&self, command: &Command<'_>) -> Result<(), Error> {
        let name = command.request().name();
        let protocol = |feature: ProtocolFeatures, what| {
            if self.protocol.contains(feature) {
                Ok(())
            } else {
                Err(Error::NotNegotiated { name, feature: what })
            }
        };
        let bit30 = || match self.offered & F_PROTOCOL_FEATURES {
            0 => Err(Error::NotNegotiated {
                name,
                feature: "VHOST_USER_F_PROTOCOL_FEATURES",
            }),
            _ => Ok(()),
        };
        let offered = |surplus: u64| {
            if surplus == 0 {
                Ok(())
            } else {
                Err(Error::Features { name, surplus })
            }
        };
        match command {
            Command::SetFeatures(features) => offered(features & !self.offered),
            Command::GetProtocolFeatures => bit30(),
            Command::SetProtocolFeatures(features) => {
                bit30()?;
                offered(features.difference(self.protocol_offered).bits())
            }
            Command::SetVringEnable(..) => bit30(),
            Command::GetQueueNum => protocol(ProtocolFeatures::MQ, "MQ"),
            Command::GetMaxMemSlots | Command::AddMemReg(_) | Command::RemMemReg(_) => {
                protocol(ProtocolFeatures::CONFIGURE_MEM_SLOTS, "CONFIGURE_MEM_SLOTS")
            }
            Command::SetStatus(_) | Command::GetStatus => protocol(ProtocolFeatures::STATUS, "STATUS"),
            Command::NetSetMtu(_) => protocol(ProtocolFeatures::MTU, "MTU"),
            Command::SendRarp(_) => protocol(ProtocolFeatures::RARP, "RARP"),
            Command::SetBackendReqFd => protocol(ProtocolFeatures::BACKEND_REQ, "BACKEND_REQ"),
            Command::GetConfig(..) | Command::SetConfig(..) => protocol(ProtocolFeatures::CONFIG, "CONFIG"),
            Command::GetInflightFd(..) | Command::SetInflightFd(_) => {
                protocol(ProtocolFeatures::INFLIGHT_SHMFD, "INFLIGHT_SHMFD")
            }
            Command::ResetDevice => protocol(ProtocolFeatures::RESET_DEVICE, "RESET_DEVICE"),
            _ => Ok(()),
        }
    }

    /// How many bytes to read next, at the most: a whole answer where its length is known before it comes.
    pub fn wants(&self) -> usize {
        match self.waiting {
            Some(Waiting { request, ack, .. }) if self.assembler.pending() == 0 => match reply_shape(request, ack) {
                Shape::Exact(len) => HEADER + len as usize,
                Shape::AtLeast(_) => HEADER,
            },
            _ => self.assembler.wants(),
        }
    }

    /// Takes bytes that came, at most [`wants`](Frontend::wants), with the descriptors that came along.
    ///
    /// # Errors
    /// See [`Error`]; the connection is dead then, and every descriptor dropped. But not so after [`Error::Refused`] of a
    /// command that a device works without ([`Request::is_advisory`]): the connection is as good as before.
    pub fn receive(&mut self, bytes: &[u8], fds: impl IntoIterator<Item = F>) -> Result<Option<Reply<F>>, Error> {
        if self.dead {
            return Err(Error::Dead);
        }
        let advisory = self.awaiting().is_some_and(Request::is_advisory);
        let result = self.take(bytes, fds.into_iter());
        let dead = match result {
            Ok(_) => false,
            Err(Error::Refused { .. }) => !advisory,
            Err(_) => true,
        };
        if dead {
            self.dead = true;
            self.assembler.clear();
        }
        result
    }

    fn take(&mut self, bytes: &[u8], fds: impl Iterator<Item = F>) -> Result<Option<Reply<F>>, Error> {
        let waiting = self.waiting;
        let check = |header: &Header| {
            if !header.version_is_known() {
                return Err(Error::Version { flags: header.flags() });
            }
            let Some(Waiting { request, ack, .. }) = waiting else {
                return Err(Error::ReplyToNothing { code: header.code() });
            };
            let name = request.name();
            if !header.is_reply() {
                return Err(Error::NotAReply { name });
            }
            if header.code() != request.code() {
                return Err(Error::OtherReply {
                    name,
                    code: header.code(),
                });
            }
            check_size(name, reply_shape(request, ack), header.size())
        };
        let (head, payload) = bytes.split_at(bytes.len().min(self.assembler.wants()));
        let mut whole = self.assembler.push(head, fds, check)?;
        if whole.is_none() && !payload.is_empty() {
            whole = self.assembler.push(payload, core::iter::empty(), check)?;
        }
        let Some(message) = whole else { return Ok(None) };
        let Some(Waiting {
            request,
            ack,
            index,
            config,
        }) = self.waiting.take()
        else {
            return Err(Error::Dead);
        };
        let (name, payload, mut fds) = (request.name(), message.payload, message.fds);
        let takes = usize::from(request == Request::GetInflightFd);
        if fds.len() > takes {
            return Err(Error::SurplusFd {
                name,
                given: fds.len(),
                taken: takes,
            });
        }
        let number = || payload.read::<Number>(name).map(|n| n.value.get());
        if ack {
            return match number()? {
                0 => Ok(Some(Reply::Ack)),
                code => Err(Error::Refused { name, code }),
            };
        }
        Ok(Some(match request {
            Request::GetFeatures => {
                self.offered = number()?;
                Reply::Features(self.offered)
            }
            Request::GetProtocolFeatures => {
                self.protocol_offered = ProtocolFeatures::from_bits_retain(number()?);
                Reply::ProtocolFeatures(self.protocol_offered)
            }
            Request::GetQueueNum => Reply::QueueNum(number()?),
            Request::GetMaxMemSlots => Reply::MaxMemSlots(number()?),
            Request::GetStatus => {
                let value = number()?;
                Reply::Status(u8::try_from(value).map_err(|_| Error::Value { name, value })?)
            }
            Request::GetVringBase => {
                let state: VringState = payload.read(name)?;
                if state.index.get() != index {
                    return Err(Error::Ring {
                        name,
                        index: state.index.get(),
                    });
                }
                Reply::VringBase(index, state.num.get())
            }
            Request::GetConfig if payload.bytes().is_empty() => Reply::Config([0; 256], 0),
            Request::GetConfig => {
                let head: ConfigHead = payload.read(name)?;
                let bytes = payload.bytes().get(size_of::<ConfigHead>()..).unwrap_or_default();
                if (head.offset.get(), head.size.get()) != config || bytes.len() != config.1 as usize {
                    return Err(Error::Value {
                        name,
                        value: head.size.get().into(),
                    });
                }
                let mut copy = [0; 256];
                let place = copy.get_mut(..bytes.len()).ok_or(Error::Size {
                    name,
                    size: bytes.len() as u32,
                })?;
                place.copy_from_slice(bytes);
                Reply::Config(copy, bytes.len())
            }
            Request::GetInflightFd => Reply::Inflight(payload.inflight(), fds.take(0)),
            _ => return Err(Error::Unsupported { name }),
        }))
    }

    /// The other side closed the connection: which error that is. `None`: between messages, with nothing awaited.
    pub fn closed(&mut self) -> Option<Error> {
        let have = self.assembler.pending();
        self.dead = true;
        self.assembler.clear();
        if have > 0 || self.waiting.take().is_some() {
            Some(Error::Truncated { have })
        } else {
            None
        }
    }
}

/// The payload of the reply to a request.
fn reply_shape(request: Request, ack: bool) -> Shape {
    use Shape::{AtLeast, Exact};
    match request {
        _ if ack => Exact(8),
        // Empty: there is no such piece.
        Request::GetConfig => AtLeast(0),
        // Some peers leave the padding out.
        Request::GetInflightFd => AtLeast(20),
        _ => Exact(8),
    }
}

impl Command<'_> {
    /// The message.
    pub fn request(&self) -> Request {
        match self {
            Command::SetOwner => Request::SetOwner,
            Command::GetFeatures => Request::GetFeatures,
            Command::SetFeatures(_) => Request::SetFeatures,
            Command::GetProtocolFeatures => Request::GetProtocolFeatures,
            Command::SetProtocolFeatures(_) => Request::SetProtocolFeatures,
            Command::GetQueueNum => Request::GetQueueNum,
            Command::GetMaxMemSlots => Request::GetMaxMemSlots,
            Command::SetMemTable(_) => Request::SetMemTable,
            Command::AddMemReg(_) => Request::AddMemReg,
            Command::RemMemReg(_) => Request::RemMemReg,
            Command::SetVringNum(..) => Request::SetVringNum,
            Command::SetVringAddr(..) => Request::SetVringAddr,
            Command::SetVringBase(..) => Request::SetVringBase,
            Command::GetVringBase(_) => Request::GetVringBase,
            Command::SetVringKick(..) => Request::SetVringKick,
            Command::SetVringCall(..) => Request::SetVringCall,
            Command::SetVringErr(..) => Request::SetVringErr,
            Command::SetVringEnable(..) => Request::SetVringEnable,
            Command::SetStatus(_) => Request::SetStatus,
            Command::GetStatus => Request::GetStatus,
            Command::NetSetMtu(_) => Request::NetSetMtu,
            Command::SendRarp(_) => Request::SendRarp,
            Command::SetBackendReqFd => Request::SetBackendReqFd,
            Command::GetConfig(..) => Request::GetConfig,
            Command::SetConfig(..) => Request::SetConfig,
            Command::GetInflightFd(..) => Request::GetInflightFd,
            Command::SetInflightFd(_) => Request::SetInflightFd,
            Command::ResetDevice => Request::ResetDevice,
        }
    }

    fn index(&self) -> u32 {
        match *self {
            Command::GetVringBase(index) => index,
            _ => 0,
        }
    }

    fn encode(&self, ack: bool) -> Result<Outgoing, Error> {
        let request = self.request();
        let name = request.name();
        let message = |pieces: &[&[u8]]| Outgoing::new(|size| Header::request(request.code(), size, ack), pieces);
        let number = |value: u64| message(&[Number { value: value.into() }.as_bytes()]);
        let state = |index: u32, num: u32| {
            message(&[VringState {
                index: index.into(),
                num: num.into(),
            }
            .as_bytes()])
        };
        let vring = |index: u32, fd: bool| match index {
            0..=255 => Ok(number(u64::from(index) | if fd { 0 } else { NO_FD })),
            _ => Err(Error::Ring { name, index }),
        };
        let single = |region: Region| {
            message(&[SingleRegion {
                padding: 0.into(),
                region: region.into(),
            }
            .as_bytes()])
        };
        Ok(match *self {
            Command::SetOwner
            | Command::GetFeatures
            | Command::GetProtocolFeatures
            | Command::GetQueueNum
            | Command::GetMaxMemSlots
            | Command::GetStatus
            | Command::SetBackendReqFd
            | Command::ResetDevice => message(&[]),
            Command::SetFeatures(features) => number(features),
            Command::SetProtocolFeatures(features) => number(features.bits()),
            Command::SetMemTable(regions) => {
                let mut table = [MemoryRegion::from(Region::default()); crate::message::MAX_FDS];
                let used = table.get_mut(..regions.len()).ok_or(Error::Value {
                    name,
                    value: regions.len() as u64,
                })?;
                for (place, region) in used.iter_mut().zip(regions) {
                    *place = (*region).into();
                }
                let head = TableHead {
                    count: (regions.len() as u32).into(),
                    padding: 0.into(),
                };
                message(&[head.as_bytes(), used.as_bytes()])
            }
            Command::AddMemReg(region) | Command::RemMemReg(region) => single(region),
            Command::SetVringNum(index, num) | Command::SetVringBase(index, num) => state(index, num),
            Command::SetVringAddr(index, addr) => message(&[VringAddr {
                index: index.into(),
                flags: 0.into(),
                descriptor: addr.desc.into(),
                used: addr.used.into(),
                available: addr.avail.into(),
                log: 0.into(),
            }
            .as_bytes()]),
            Command::GetVringBase(index) => state(index, 0),
            Command::SetVringKick(index, fd) | Command::SetVringCall(index, fd) | Command::SetVringErr(index, fd) => {
                vring(index, fd)?
            }
            Command::SetVringEnable(index, on) => state(index, on.into()),
            Command::SetStatus(status) => number(status.into()),
            Command::NetSetMtu(mtu) => number(mtu.into()),
            Command::SendRarp([a, b, c, d, e, f]) => number(u64::from_le_bytes([a, b, c, d, e, f, 0, 0])),
            Command::GetConfig(offset, size) => {
                let zeroes = [0u8; 256];
                let space = zeroes.get(..size as usize).ok_or(Error::Value {
                    name,
                    value: size.into(),
                })?;
                let head = ConfigHead {
                    offset: offset.into(),
                    size: size.into(),
                    flags: 0.into(),
                };
                message(&[head.as_bytes(), space])
            }
            Command::SetConfig(offset, bytes) => {
                if bytes.len() > 256 {
                    return Err(Error::Value {
                        name,
                        value: bytes.len() as u64,
                    });
                }
                let head = ConfigHead {
                    offset: offset.into(),
                    size: (bytes.len() as u32).into(),
                    flags: 0.into(),
                };
                message(&[head.as_bytes(), bytes])
            }
            Command::GetInflightFd(num_queues, queue_size) => message(&[Inflight {
                mmap_size: 0.into(),
                mmap_offset: 0.into(),
                num_queues: num_queues.into(),
                queue_size: queue_size.into(),
                padding: 0.into(),
            }
            .as_bytes()]),
            Command::SetInflightFd(inflight) => message(&[inflight.as_bytes()]),
        })
    }
}
