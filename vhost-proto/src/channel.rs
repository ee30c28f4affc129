//! The second socket: requests of the back-end to the front-end (BACKEND_REQ).

use zerocopy::IntoBytes;

use crate::Error;
use crate::message::{Answer, BackendRequest, Header};
use crate::payload::{Iotlb, Mmap, Number, SharedObject, VringArea, VringState};
use crate::stream::{Assembler, Outgoing, Payload, check_fds, check_size};

/// What a back-end asks for.
#[derive(Debug)]
#[non_exhaustive]
pub enum Notice<F> {
    /// The configuration space changed: read it again.
    ConfigChange,
    /// A miss or fault of the I/O translation buffer.
    Iotlb(Iotlb),
    /// A call in the socket (INBAND_NOTIFICATIONS).
    VringCall(u32),
    /// A ring is broken (INBAND_NOTIFICATIONS).
    VringErr(u32),
    /// Anything else that the specification has: the message, its payload, and its descriptor.
    Other(BackendRequest, Details, Option<F>),
}

/// The payload of a [`Notice::Other`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Details {
    /// Of VRING_HOST_NOTIFIER_MSG.
    Area(VringArea),
    /// Of SHARED_OBJECT_ADD, SHARED_OBJECT_REMOVE and SHARED_OBJECT_LOOKUP.
    Object(SharedObject),
    /// Of SHMEM_MAP and SHMEM_UNMAP.
    Mmap(Mmap),
}

/// A notice and, if the back-end waits for an answer, what makes it.
pub type Asked<F> = (Notice<F>, Option<Pending>);

/// The front-end's end of the channel.
#[derive(Debug)]
pub struct Channel<F> {
    assembler: Assembler<F>,
    dead: bool,
}

impl<F> Default for Channel<F> {
    fn default() -> Self {
        Self::new()
    }
}

impl<F> Channel<F> {
    /// A channel that was just made.
    pub const fn new() -> Self {
        Channel {
            assembler: Assembler::new(),
            dead: false,
        }
    }

    /// How many bytes to read next, at the most.
    pub fn wants(&self) -> usize {
        self.assembler.wants()
    }

    /// Takes bytes that came, at most [`wants`](Channel::wants), with the descriptors that came along. With a notice
    /// comes, if the back-end waits for one, the [`Pending`] answer.
    ///
    /// # Errors
    /// See [`Error`]; the channel is dead then, and every descriptor dropped.
    pub fn receive(&mut self, bytes: &[u8], fds: impl IntoIterator<Item = F>) -> Result<Option<Asked<F>>, Error> {
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

    fn take(&mut self, bytes: &[u8], fds: impl Iterator<Item = F>) -> Result<Option<Asked<F>>, Error> {
        let whole = self.assembler.push(bytes, fds, |header| {
            if !header.version_is_known() {
                return Err(Error::Version { flags: header.flags() });
            }
            if header.is_reply() {
                return Err(Error::ReplyToNothing { code: header.code() });
            }
            let request = BackendRequest::from_code(header.code()).ok_or(Error::Unknown { code: header.code() })?;
            check_size(request.name(), request.shape(), header.size())
        })?;
        let Some(mut message) = whole else { return Ok(None) };
        let code = message.header.code();
        let request = BackendRequest::from_code(code).ok_or(Error::Unknown { code })?;
        let name = request.name();
        check_fds(name, request.fds(), &message.payload, &message.fds)?;
        let index = || message.payload.read::<VringState>(name).map(|state| state.index.get());
        let notice = match request {
            BackendRequest::ConfigChangeMsg => Notice::ConfigChange,
            BackendRequest::IotlbMsg => Notice::Iotlb(message.payload.read(name)?),
            BackendRequest::VringCall => Notice::VringCall(index()?),
            BackendRequest::VringErr => Notice::VringErr(index()?),
            other => Notice::Other(other, details(other, &message.payload)?, message.fds.take(0)),
        };
        let waits = message.header.needs_reply() || request.answer() == Answer::Always;
        Ok(Some((notice, waits.then_some(Pending(request)))))
    }
}

/// The payload of one of the messages that [`Notice::Other`] stands for.
fn details(request: BackendRequest, payload: &Payload) -> Result<Details, Error> {
    use BackendRequest as R;
    let name = request.name();
    match request {
        R::VringHostNotifierMsg => payload.read(name).map(Details::Area),
        R::SharedObjectAdd | R::SharedObjectRemove | R::SharedObjectLookup => payload.read(name).map(Details::Object),
        R::ShmemMap | R::ShmemUnmap => payload.read(name).map(Details::Mmap),
        R::IotlbMsg | R::ConfigChangeMsg | R::VringCall | R::VringErr => Err(Error::Unsupported { name }),
    }
}

/// An answer that the back-end waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "the back-end waits for it"]
pub struct Pending(BackendRequest);

impl Pending {
    /// The answer.
    pub fn answer(self, done: bool) -> Outgoing {
        let value = Number {
            value: u64::from(!done).into(),
        };
        Outgoing::new(|size| Header::reply(self.0.code(), size), &[value.as_bytes()])
    }
}

/// A message of the back-end for the channel: of those that have no descriptor, and a ring or nothing as payload.
pub fn notice(request: BackendRequest, ring: Option<u32>, need_reply: bool) -> Outgoing {
    let header = |size| Header::request(request.code(), size, need_reply);
    match ring {
        Some(index) => Outgoing::new(
            header,
            &[VringState {
                index: index.into(),
                num: 0.into(),
            }
            .as_bytes()],
        ),
        None => Outgoing::new(header, &[]),
    }
}
