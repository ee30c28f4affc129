//! The back-end: messages in, events out.

use zerocopy::IntoBytes;

use crate::Error;
use crate::frontend::{Region, RingAddr};
use crate::message::{Answer, F_PROTOCOL_FEATURES, Header, MAX_FDS, ProtocolFeatures, Request};
use crate::payload::{ConfigHead, Inflight, Number, RING_MASK, SingleRegion, TableHead, VringAddr, VringState};
use crate::stream::{Assembler, Message, Outgoing, check_fds, check_size};

/// Rings that a connection can have: their number is a byte in kick, call and error messages.
pub const MAX_RINGS: usize = 256;

/// Bytes of a configuration space (vhost-user.rst: VHOST_USER_MAX_CONFIG_SIZE of its implementations).
const CONFIG_SPACE: u32 = 256;

/// VIRTIO_F_RING_PACKED (virtio 1.3, 6).
const F_RING_PACKED: u64 = 1 << 34;

/// Where a new packed ring begins: at descriptor 0 with both wrap counters 1 (virtio 1.3, 2.8.1), as SET_VRING_BASE
/// writes it.
const PACKED_START: u32 = 0x8000_8000;

/// What the back-end offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Virtio features. Bit 30 (protocol features) is added.
    pub features: u64,
    /// Protocol features.
    pub protocol: ProtocolFeatures,
    /// Rings, at most [`MAX_RINGS`].
    pub rings: u16,
    /// Answer to GET_QUEUE_NUM: for a network device queue pairs.
    pub queue_num: u16,
    /// Regions that are taken one by one.
    pub mem_slots: u16,
}

/// A ring, as the front-end describes it when it starts it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingSetup {
    /// Descriptors.
    pub num: u32,
    /// Where it begins. Of a packed ring with wrap counters and, from some front-ends, the used index in bits 16 to 31.
    /// Without SET_VRING_BASE the ring begins where a new ring does: 0, of a packed ring with both wrap counters 1.
    pub base: u32,
    /// Where it is, in the front-end's process.
    pub addr: RingAddr,
}

/// What a front-end wants. After each event the owner calls [`Backend::finish`], once, before it receives again.
#[allow(
    clippy::large_enum_variant,
    reason = "there is no allocator to box with, and it lives for one message"
)]
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<F> {
    /// These virtio features are used. Without [`F_PROTOCOL_FEATURES`] among them all rings are enabled from now on
    /// (vhost-user.rst, Ring states). While a ring runs they differ from those of before in that bit alone.
    Features(u64),
    /// This is all of the memory: regions, and as many descriptors.
    Memory([Option<(Region, F)>; MAX_FDS]),
    /// One more region.
    AddRegion(Region, F),
    /// One region less.
    RemoveRegion(Region),
    /// The ring starts (or, when it runs, has a new kick: size, base and addresses are those of before then). Without a descriptor it is to be polled.
    RingStart {
        /// The ring.
        index: u16,
        /// Where it is.
        setup: RingSetup,
        /// What the front-end signals.
        kick: Option<F>,
        /// Whether buffers may be processed.
        enabled: bool,
    },
    /// The ring stops: finish with [`Outcome::Base`].
    RingStop(u16),
    /// What to signal when buffers were used. Without a descriptor nobody wants to know.
    RingCall(u16, Option<F>),
    /// What to signal when the ring is broken.
    RingErr(u16, Option<F>),
    /// Whether buffers of the ring may be processed.
    RingEnable(u16, bool),
    /// A kick in the socket (INBAND_NOTIFICATIONS).
    RingKick(u16),
    /// The device status. 0 is a reset: all rings are stopped and have to be set up anew.
    Status(u8),
    /// The MTU, 68 to 65535.
    Mtu(u16),
    /// Announce this address.
    Rarp([u8; 6]),
    /// The socket for the back-end's own requests.
    BackendChannel(F),
    /// Make the memory for buffers in flight: finish with [`Outcome::Inflight`] and send its descriptor along.
    GetInflight(Inflight),
    /// The memory for buffers in flight, of an earlier connection.
    SetInflight(Inflight, F),
    /// A piece of the configuration space is wanted: finish with [`Outcome::Config`].
    GetConfig {
        /// The first byte.
        offset: u32,
        /// Bytes, at most 256.
        size: u32,
    },
    /// A piece of the configuration space is written: first byte, bytes, how many.
    SetConfig(u32, [u8; 256], usize),
    /// RESET_DEVICE: no features are negotiated any more, the status is 0, and all rings are stopped and disabled and have
    /// to be set up anew. Protocol features and memory belong to the connection and stay.
    Reset,
}

/// How an event went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome<'a> {
    /// Well.
    Done,
    /// Not at all; the front-end is told, if it asked to be.
    Failed,
    /// Of [`Event::RingStop`]: where the ring was.
    Base(u32),
    /// Of [`Event::GetConfig`]: the bytes that were asked for; none if there are none such.
    Config(&'a [u8]),
    /// Of [`Event::GetInflight`].
    Inflight(Inflight),
}

/// What came of bytes.
#[allow(
    clippy::large_enum_variant,
    reason = "there is no allocator to box with, and it lives for one message"
)]
#[derive(Debug)]
pub enum Step<F> {
    /// The message is not whole yet.
    More,
    /// A message that needs nobody but, perhaps, an answer to send.
    Quiet(Option<Outgoing>),
    /// An event: handle it, and [`Backend::finish`] it.
    Event(Event<F>),
}

#[derive(Clone, Copy, Default)]
struct Ring {
    num: u32,
    /// As SET_VRING_BASE or the last GET_VRING_BASE said.
    base: Option<u32>,
    addr: Option<RingAddr>,
    /// As SET_VRING_ENABLE said.
    enabled: Option<bool>,
    started: bool,
}

impl Ring {
    const NEW: Self = Ring {
        num: 0,
        base: None,
        addr: None,
        enabled: None,
        started: false,
    };

    /// A reset: the ring is stopped, and its next life begins with new addresses. Its size is the front-end's choice and
    /// no state of the device.
    fn reset(&mut self) {
        *self = Ring {
            num: self.num,
            enabled: self.enabled,
            ..Ring::NEW
        };
    }
}

#[derive(Clone, Copy)]
struct Owed {
    request: Request,
    ack: bool,
    index: u32,
    config: (u32, u32),
}

/// The back-end's half of a connection.
pub struct Backend<F> {
    assembler: Assembler<F>,
    offer: Offer,
    /// `None`: not negotiated yet.
    features: Option<u64>,
    protocol: ProtocolFeatures,
    status: u8,
    rings: [Ring; MAX_RINGS],
    owed: Option<Owed>,
    dead: bool,
}

impl<F> Backend<F> {
    /// A connection that was just made.
    pub const fn new(offer: Offer) -> Self {
        Backend {
            assembler: Assembler::new(),
            offer,
            features: None,
            protocol: ProtocolFeatures::empty(),
            status: 0,
            rings: [Ring::NEW; MAX_RINGS],
            owed: None,
            dead: false,
        }
    }

    /// The protocol features that were agreed on.
    pub const fn protocol_features(&self) -> ProtocolFeatures {
        self.protocol
    }

    /// The virtio features that were agreed on; `None`: not yet, or not since the last RESET_DEVICE.
    pub const fn features(&self) -> Option<u64> {
        self.features
    }

    /// Bytes that have come of a message that is not whole yet.
    pub const fn pending(&self) -> usize {
        self.assembler.pending()
    }

    /// How many bytes to read next, at the most.
    pub fn wants(&self) -> usize {
        self.assembler.wants()
    }

    /// Takes bytes that came, at most [`wants`](Backend::wants), with the descriptors that came along.
    ///
    /// # Errors
    /// See [`Error`]; the connection is dead then, and every descriptor dropped. [`Error::Untimely`] if the last event
    /// was not finished.
    pub fn receive(&mut self, bytes: &[u8], fds: impl IntoIterator<Item = F>) -> Result<Step<F>, Error> {
        if self.dead {
            return Err(Error::Dead);
        }
        let result = self.take(bytes, fds.into_iter());
        if result.is_err() {
            self.dead = true;
            self.assembler.clear();
        }
        result
    }

    fn take(&mut self, bytes: &[u8], fds: impl Iterator<Item = F>) -> Result<Step<F>, Error> {
        if let Some(owed) = &self.owed {
            return Err(Error::Untimely {
                name: "a message",
                before: owed.request.name(),
            });
        }
        let whole = self.assembler.push(bytes, fds, |header| {
            if !header.version_is_known() {
                return Err(Error::Version { flags: header.flags() });
            }
            if header.is_reply() {
                return Err(Error::ReplyToNothing { code: header.code() });
            }
            let request = Request::from_code(header.code()).ok_or(Error::Unknown { code: header.code() })?;
            check_size(request.name(), request.shape(), header.size())
        })?;
        let Some(message) = whole else { return Ok(Step::More) };
        let request = Request::from_code(message.header.code()).ok_or(Error::Unknown {
            code: message.header.code(),
        })?;
        check_fds(request.name(), request.fds(), &message.payload, &message.fds)?;
        self.allowed(request)?;
        let ack = message.header.needs_reply()
            && self.protocol.contains(ProtocolFeatures::REPLY_ACK)
            && request.answer() == Answer::None;
        self.handle(request, ack, message)
    }

    fn allowed(&self, request: Request) -> Result<(), Error> {
        use ProtocolFeatures as P;
        let name = request.name();
        let (needed, feature) = match request {
            Request::GetQueueNum => (P::MQ, "MQ"),
            Request::SendRarp => (P::RARP, "RARP"),
            Request::NetSetMtu => (P::MTU, "MTU"),
            Request::SetBackendReqFd => (P::BACKEND_REQ, "BACKEND_REQ"),
            Request::GetConfig | Request::SetConfig => (P::CONFIG, "CONFIG"),
            Request::GetInflightFd | Request::SetInflightFd => (P::INFLIGHT_SHMFD, "INFLIGHT_SHMFD"),
            Request::ResetDevice => (P::RESET_DEVICE, "RESET_DEVICE"),
            Request::VringKick => (P::INBAND_NOTIFICATIONS, "INBAND_NOTIFICATIONS"),
            Request::GetMaxMemSlots | Request::AddMemReg | Request::RemMemReg => {
                (P::CONFIGURE_MEM_SLOTS, "CONFIGURE_MEM_SLOTS")
            }
            Request::SetStatus | Request::GetStatus => (P::STATUS, "STATUS"),
            Request::SetVringEndian => (P::CROSS_ENDIAN, "CROSS_ENDIAN"),
            Request::CreateCryptoSession | Request::CloseCryptoSession => (P::CRYPTO_SESSION, "CRYPTO_SESSION"),
            Request::PostcopyAdvise | Request::PostcopyListen | Request::PostcopyEnd => (P::PAGEFAULT, "PAGEFAULT"),
            Request::GetSharedObject => (P::SHARED_OBJECT, "SHARED_OBJECT"),
            Request::SetDeviceStateFd | Request::CheckDeviceState => (P::DEVICE_STATE, "DEVICE_STATE"),
            Request::GetShmemConfig => (P::SHMEM, "SHMEM"),
            Request::SetLogBase | Request::SetLogFd => (P::LOG_SHMFD, "LOG_SHMFD"),
            _ => return Ok(()),
        };
        if self.protocol.contains(needed) {
            Ok(())
        } else {
            Err(Error::NotNegotiated { name, feature })
        }
    }

    fn ring(&mut self, name: &'static str, index: u64) -> Result<(u16, &mut Ring), Error> {
        let error = Error::Ring {
            name,
            index: u32::try_from(index).unwrap_or(u32::MAX),
        };
        if index >= u64::from(self.offer.rings) {
            return Err(error);
        }
        let ring = self.rings.get_mut(index as usize).ok_or(error)?;
        Ok((index as u16, ring))
    }

    /// Whether a ring may be processed: as the front-end said last, or, until it says, at once if features without
    /// VHOST_USER_F_PROTOCOL_FEATURES were negotiated (vhost-user.rst, Ring states).
    fn enabled(&self, ring: &Ring) -> bool {
        let without_bit_30 = |features| features & F_PROTOCOL_FEATURES == 0;
        ring.enabled.unwrap_or(self.features.is_some_and(without_bit_30))
    }

    /// Where a ring begins.
    fn base(&self, ring: &Ring) -> u32 {
        let packed = self.features.is_some_and(|features| features & F_RING_PACKED != 0);
        ring.base.unwrap_or(if packed { PACKED_START } else { 0 })
    }

    /// A ring to set up. What a ring is made of cannot change while it runs; saying the same once more is no change.
    fn set(&mut self, name: &'static str, index: u64, change: impl FnOnce(&mut Ring) -> bool) -> Result<(), Error> {
        let (index, ring) = self.ring(name, index)?;
        let started = ring.started;
        if change(ring) && started {
            return Err(Error::Running { name, index });
        }
        Ok(())
    }

    fn handle(&mut self, request: Request, ack: bool, message: Message<F>) -> Result<Step<F>, Error> {
        let Message { payload, mut fds, .. } = message;
        let name = request.name();
        let number = || payload.read::<Number>(name).map(|n| n.value.get());
        let state = || {
            payload
                .read::<VringState>(name)
                .map(|s| (u64::from(s.index.get()), s.num.get()))
        };
        let reply = |value: u64| {
            let value = Number { value: value.into() };
            Ok(Step::Quiet(Some(Outgoing::new(
                |size| Header::reply(request.code(), size),
                &[value.as_bytes()],
            ))))
        };
        let mut owed = Owed {
            request,
            ack,
            index: 0,
            config: (0, 0),
        };
        let event = match request {
            Request::GetFeatures => return reply(self.offer.features | F_PROTOCOL_FEATURES),
            Request::GetProtocolFeatures => return reply(self.offer.protocol.bits()),
            Request::GetQueueNum => return reply(self.offer.queue_num.into()),
            Request::GetMaxMemSlots => return reply(self.offer.mem_slots.into()),
            Request::GetStatus => return reply(self.status.into()),
            Request::SetOwner | Request::ResetOwner => return Ok(self.quiet(request, ack)),
            Request::SetProtocolFeatures => {
                let features = ProtocolFeatures::from_bits_retain(number()?);
                let surplus = features.difference(self.offer.protocol).bits();
                if surplus != 0 {
                    return Err(Error::Features { name, surplus });
                }
                self.protocol = features;
                return Ok(self.quiet(request, ack));
            }
            Request::SetFeatures => {
                let features = number()?;
                let surplus = features & !(self.offer.features | F_PROTOCOL_FEATURES);
                if surplus != 0 {
                    return Err(Error::Features { name, surplus });
                }
                // Like DPDK, which lets only the log change while rings run; and bit 30 is no property of a ring.
                let changed = self.features.unwrap_or(0) ^ features;
                if changed & !F_PROTOCOL_FEATURES != 0
                    && let Some(index) = self.rings.iter().position(|ring| ring.started)
                {
                    let index = index as u16;
                    return Err(Error::Running { name, index });
                }
                self.features = Some(features);
                if features & F_PROTOCOL_FEATURES == 0 {
                    self.rings.iter_mut().for_each(|ring| ring.enabled = None);
                }
                Event::Features(features)
            }
            Request::SetMemTable => {
                let count = payload.read::<TableHead>(name)?.count.get() as usize;
                let bytes = payload.bytes().get(size_of::<TableHead>()..).unwrap_or_default();
                let all: [Option<(Region, F)>; MAX_FDS] = core::array::from_fn(|at| {
                    if at >= count {
                        return None;
                    }
                    let bytes = bytes.get(at * 32..at * 32 + 32)?;
                    let region = zerocopy::FromBytes::read_from_bytes(bytes).ok();
                    let region: crate::payload::MemoryRegion = region?;
                    Some((region.into(), fds.take(at)?))
                });
                // The table may be padded to 8 regions; it may not be shorter than it says.
                if all.iter().flatten().count() != count {
                    return Err(Error::Size {
                        name,
                        size: payload.bytes().len() as u32,
                    });
                }
                Event::Memory(all)
            }
            Request::AddMemReg => {
                let single: SingleRegion = payload.read(name)?;
                let fd = fds.take(0).ok_or(Error::MissingFd {
                    name,
                    given: 0,
                    needed: 1,
                })?;
                Event::AddRegion(single.region.into(), fd)
            }
            Request::RemMemReg => Event::RemoveRegion(payload.read::<SingleRegion>(name)?.region.into()),
            Request::SetVringNum => {
                let (index, num) = state()?;
                if num == 0 || num > 32768 {
                    return Err(Error::Value {
                        name,
                        value: num.into(),
                    });
                }
                self.set(name, index, |ring| core::mem::replace(&mut ring.num, num) != num)?;
                return Ok(self.quiet(request, ack));
            }
            Request::SetVringBase => {
                let (index, base) = state()?;
                self.set(name, index, |ring| {
                    ring.base = Some(base);
                    true
                })?;
                return Ok(self.quiet(request, ack));
            }
            Request::SetVringAddr => {
                let addr: VringAddr = payload.read(name)?;
                let new = Some(RingAddr {
                    desc: addr.descriptor.get(),
                    avail: addr.available.get(),
                    used: addr.used.get(),
                });
                // A front-end that switches the log on or off says the same addresses again.
                self.set(name, addr.index.get().into(), |ring| {
                    core::mem::replace(&mut ring.addr, new) != new
                })?;
                return Ok(self.quiet(request, ack));
            }
            Request::SetVringKick => {
                let number = number()?;
                let (index, ring) = self.ring(name, number & RING_MASK)?;
                let ring = *ring;
                let Some(addr) = ring.addr else {
                    return Err(Error::Untimely {
                        name,
                        before: "SET_VRING_ADDR",
                    });
                };
                if ring.num == 0 {
                    return Err(Error::Untimely {
                        name,
                        before: "SET_VRING_NUM",
                    });
                }
                let setup = RingSetup {
                    num: ring.num,
                    base: self.base(&ring),
                    addr,
                };
                owed.index = index.into();
                Event::RingStart {
                    index,
                    setup,
                    kick: fds.take(0),
                    enabled: self.enabled(&ring),
                }
            }
            Request::SetVringCall => Event::RingCall(self.ring(name, number()? & RING_MASK)?.0, fds.take(0)),
            Request::SetVringErr => Event::RingErr(self.ring(name, number()? & RING_MASK)?.0, fds.take(0)),
            Request::VringKick => Event::RingKick(self.ring(name, state()?.0)?.0),
            Request::SetVringEnable => {
                let (index, on) = state()?;
                if on > 1 {
                    return Err(Error::Value { name, value: on.into() });
                }
                let (index, ring) = self.ring(name, index)?;
                ring.enabled = Some(on == 1);
                Event::RingEnable(index, on == 1)
            }
            Request::GetVringBase => {
                let (index, _) = state()?;
                let index = self.ring(name, index)?.0;
                owed.index = index.into();
                Event::RingStop(index)
            }
            Request::SetStatus => {
                let value = number()?;
                self.status = u8::try_from(value).map_err(|_| Error::Value { name, value })?;
                if self.status == 0 {
                    self.rings.iter_mut().for_each(Ring::reset);
                }
                Event::Status(self.status)
            }
            Request::NetSetMtu => {
                let value = number()?;
                match u16::try_from(value) {
                    Ok(mtu) if mtu >= 68 => Event::Mtu(mtu),
                    // Nonzero where the MTU is not valid; without an answer there is no other way to say so.
                    _ if ack => return Ok(Step::Quiet(Some(Self::acknowledge(request, false)))),
                    _ => return Err(Error::Value { name, value }),
                }
            }
            Request::SendRarp => {
                let [a, b, c, d, e, f, ..] = number()?.to_le_bytes();
                Event::Rarp([a, b, c, d, e, f])
            }
            Request::SetBackendReqFd => Event::BackendChannel(fds.take(0).ok_or(Error::MissingFd {
                name,
                given: 0,
                needed: 1,
            })?),
            Request::GetInflightFd => Event::GetInflight(payload.inflight()),
            Request::SetInflightFd => {
                let fd = fds.take(0).ok_or(Error::MissingFd {
                    name,
                    given: 0,
                    needed: 1,
                })?;
                Event::SetInflight(payload.inflight(), fd)
            }
            Request::GetConfig => {
                let head: ConfigHead = payload.read(name)?;
                owed.config = (head.offset.get(), head.size.get());
                if owed.config.1 > CONFIG_SPACE {
                    return Err(Error::Value {
                        name,
                        value: owed.config.1.into(),
                    });
                }
                Event::GetConfig {
                    offset: owed.config.0,
                    size: owed.config.1,
                }
            }
            Request::SetConfig => {
                let head: ConfigHead = payload.read(name)?;
                let bytes = payload.bytes().get(size_of::<ConfigHead>()..).unwrap_or_default();
                let mut copy = [0; 256];
                match copy.get_mut(..bytes.len()) {
                    Some(place) if bytes.len() == head.size.get() as usize => place.copy_from_slice(bytes),
                    _ => {
                        return Err(Error::Size {
                            name,
                            size: payload.bytes().len() as u32,
                        });
                    }
                }
                Event::SetConfig(head.offset.get(), copy, bytes.len())
            }
            Request::ResetDevice => {
                self.features = None;
                self.status = 0;
                for ring in &mut self.rings {
                    ring.reset();
                    ring.enabled = None;
                }
                Event::Reset
            }
            // The features that these need are refused above unless they were offered, and nobody should offer them.
            _ => return Err(Error::Unsupported { name }),
        };
        self.owed = Some(owed);
        Ok(Step::Event(event))
    }

    /// A message that is done with: its acknowledgement, if one is wanted.
    fn quiet(&self, request: Request, ack: bool) -> Step<F> {
        Step::Quiet(ack.then(|| Self::acknowledge(request, true)))
    }

    fn acknowledge(request: Request, done: bool) -> Outgoing {
        let value = Number {
            value: u64::from(!done).into(),
        };
        Outgoing::new(|size| Header::reply(request.code(), size), &[value.as_bytes()])
    }

    /// Ends an event: what to send for it, if anything.
    ///
    /// # Errors
    /// [`Error::Untimely`] without an event; [`Error::Value`] for an outcome that is not this event's.
    pub fn finish(&mut self, outcome: Outcome<'_>) -> Result<Option<Outgoing>, Error> {
        let Some(owed) = self.owed.take() else {
            return Err(Error::Untimely {
                name: "an outcome",
                before: "an event",
            });
        };
        let Owed {
            request,
            ack,
            index,
            config,
        } = owed;
        let name = request.name();
        let answer = |pieces: &[&[u8]]| Ok(Some(Outgoing::new(|size| Header::reply(request.code(), size), pieces)));
        match (request, outcome) {
            (Request::GetVringBase, Outcome::Base(base)) => {
                if let Some(ring) = self.rings.get_mut(index as usize) {
                    ring.base = Some(base);
                    ring.started = false;
                }
                answer(&[VringState {
                    index: index.into(),
                    num: base.into(),
                }
                .as_bytes()])
            }
            (Request::GetConfig, Outcome::Config(bytes)) if bytes.len() == config.1 as usize && bytes.len() <= 256 => {
                let head = ConfigHead {
                    offset: config.0.into(),
                    size: config.1.into(),
                    flags: 0.into(),
                };
                answer(&[head.as_bytes(), bytes])
            }
            // An empty answer says that there is no such piece.
            (Request::GetConfig, _) => answer(&[]),
            (Request::GetInflightFd, Outcome::Inflight(inflight)) => answer(&[inflight.as_bytes()]),
            (_, Outcome::Done | Outcome::Failed) if request.answer() == Answer::None => {
                if request == Request::SetVringKick
                    && let Some(ring) = self.rings.get_mut(index as usize)
                {
                    ring.started |= outcome == Outcome::Done;
                }
                Ok(ack.then(|| Self::acknowledge(request, outcome == Outcome::Done)))
            }
            _ => Err(Error::Value { name, value: 0 }),
        }
    }

    /// The other side closed the connection: in the middle of a message, or between two.
    ///
    /// # Errors
    /// [`Error::Truncated`]
    pub fn closed(&mut self) -> Result<(), Error> {
        let have = self.assembler.pending();
        self.dead = true;
        self.assembler.clear();
        if have > 0 {
            Err(Error::Truncated { have })
        } else {
            Ok(())
        }
    }
}

impl<F> core::fmt::Debug for Backend<F> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Backend")
            .field("offer", &self.offer)
            .field("features", &self.features)
            .field("protocol", &self.protocol)
            .field("status", &self.status)
            .finish_non_exhaustive()
    }
}
