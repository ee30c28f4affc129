//! Bytes and descriptors in, messages out.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::Error;
use crate::message::{Fds, HEADER, Header, MAX_FDS, MAX_PAYLOAD, Shape};
use crate::payload::Inflight;

/// Descriptors that belong together: at most [`MAX_FDS`]. Dropping it closes them.
#[derive(Debug)]
pub(crate) struct FdSet<F>([Option<F>; MAX_FDS], usize);

impl<F> FdSet<F> {
    /// None.
    pub(crate) const fn new() -> Self {
        FdSet([const { None }; MAX_FDS], 0)
    }

    /// How many.
    pub(crate) const fn len(&self) -> usize {
        self.1
    }

    pub(crate) fn push(&mut self, fd: F) -> Result<(), F> {
        match self.0.get_mut(self.1) {
            Some(place) => {
                *place = Some(fd);
                self.1 += 1;
                Ok(())
            }
            None => Err(fd),
        }
    }

    /// Takes the descriptor at `at`.
    pub(crate) fn take(&mut self, at: usize) -> Option<F> {
        self.0.get_mut(at).and_then(Option::take)
    }
}

impl<F> Default for FdSet<F> {
    fn default() -> Self {
        Self::new()
    }
}

/// The payload of one message.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Payload {
    bytes: [u8; MAX_PAYLOAD],
    len: usize,
}

impl Payload {
    pub(crate) fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }

    /// The payload's first bytes as a `T`. Its length was checked against the message's shape.
    pub(crate) fn read<T: FromBytes + KnownLayout + Immutable>(&self, name: &'static str) -> Result<T, Error> {
        T::read_from_prefix(self.bytes())
            .map(|(value, _)| value)
            .map_err(|_| Error::Size {
                name,
                size: self.len as u32,
            })
    }
}

impl Payload {
    /// An inflight description, with or without the padding at its end.
    pub(crate) fn inflight(&self) -> Inflight {
        let mut padded = [0; size_of::<Inflight>()];
        for (to, from) in padded.iter_mut().zip(self.bytes()) {
            *to = *from;
        }
        zerocopy::transmute!(padded)
    }
}

/// One message, whole.
#[derive(Debug)]
pub(crate) struct Message<F> {
    pub(crate) header: Header,
    pub(crate) payload: Payload,
    pub(crate) fds: FdSet<F>,
}

/// Puts messages together from pieces of any size.
#[derive(Debug)]
pub(crate) struct Assembler<F> {
    header: [u8; HEADER],
    have: usize,
    payload: Payload,
    fds: FdSet<F>,
}

/// How long the payload of a message of this header may be.
pub(crate) fn check_size(name: &'static str, shape: Shape, size: u32) -> Result<(), Error> {
    if size as usize > MAX_PAYLOAD {
        return Err(Error::Oversized { name, size });
    }
    let fits = match shape {
        Shape::Exact(exact) => size == exact,
        Shape::AtLeast(least) => size >= least,
    };
    if fits { Ok(()) } else { Err(Error::Size { name, size }) }
}

/// How many descriptors a message of this payload has.
pub(crate) fn check_fds<F>(name: &'static str, rule: Fds, payload: &Payload, fds: &FdSet<F>) -> Result<(), Error> {
    let given = fds.len();
    let number = || payload.read::<crate::payload::Number>(name).map(|n| n.value.get());
    let (least, most) = match rule {
        Fds::None => (0, 0),
        Fds::One => (1, 1),
        Fds::AtMostOne => (0, 1),
        Fds::Vring if number()? & crate::payload::NO_FD == 0 => (1, 1),
        Fds::Vring => (0, 0),
        Fds::Table => {
            let count = payload.read::<crate::payload::TableHead>(name)?.count.get() as usize;
            (count, count)
        }
    };
    if given < least {
        Err(Error::MissingFd {
            name,
            given,
            needed: least,
        })
    } else if given > most {
        Err(Error::SurplusFd {
            name,
            given,
            taken: most,
        })
    } else {
        Ok(())
    }
}

impl<F> Assembler<F> {
    pub(crate) const fn new() -> Self {
        Assembler {
            header: [0; HEADER],
            have: 0,
            payload: Payload {
                bytes: [0; MAX_PAYLOAD],
                len: 0,
            },
            fds: FdSet::new(),
        }
    }

    /// How many bytes are wanted next: to read no further than the message, so that descriptors stay with theirs.
    pub(crate) fn wants(&self) -> usize {
        if self.have < HEADER {
            HEADER - self.have
        } else {
            HEADER + self.payload.len - self.have
        }
    }

    /// Bytes of a message that is not whole yet.
    pub(crate) const fn pending(&self) -> usize {
        self.have
    }

    /// Takes bytes, at most `wants()` of them, with the descriptors that came along. `check` looks at a header as soon
    /// as it is there.
    pub(crate) fn push(
        &mut self,
        bytes: &[u8],
        fds: impl Iterator<Item = F>,
        check: impl FnOnce(&Header) -> Result<(), Error>,
    ) -> Result<Option<Message<F>>, Error> {
        let begins = self.have == 0 && !bytes.is_empty();
        for fd in fds {
            // They come with the first byte of a message (unix(7): ancillary data is a barrier).
            if !begins || self.fds.push(fd).is_err() {
                return Err(Error::StrayFd);
            }
        }
        let take = bytes.len().min(self.wants());
        debug_assert_eq!(take, bytes.len(), "more bytes than were wanted");
        let bytes = &bytes[..take];
        if self.have < HEADER {
            self.header[self.have..self.have + take].copy_from_slice(bytes);
            self.have += take;
            if self.have < HEADER {
                return Ok(None);
            }
            let header = self.parsed();
            check(&header)?;
            // `check` refused what is longer than the buffer; this keeps it inside whatever `check` does.
            self.payload.len = (header.size() as usize).min(MAX_PAYLOAD);
        } else {
            let at = self.have - HEADER;
            self.payload.bytes[at..at + take].copy_from_slice(bytes);
            self.have += take;
        }
        if self.wants() > 0 {
            return Ok(None);
        }
        self.have = 0;
        let payload = self.payload;
        self.payload.len = 0;
        Ok(Some(Message {
            header: self.parsed(),
            payload,
            fds: core::mem::take(&mut self.fds),
        }))
    }

    fn parsed(&self) -> Header {
        match Header::read_from_bytes(&self.header) {
            Ok(header) => header,
            Err(_) => Header::request(0, 0, false),
        }
    }

    /// Drops what was held.
    pub(crate) fn clear(&mut self) {
        *self = Self::new();
    }
}

/// A message to send: bytes, and which descriptors go with the first of them.
#[derive(Clone, Copy, Debug)]
pub struct Outgoing {
    bytes: [u8; HEADER + MAX_PAYLOAD],
    len: usize,
}

impl Outgoing {
    /// A message of a header and the pieces of a payload.
    pub(crate) fn new(header: impl FnOnce(u32) -> Header, pieces: &[&[u8]]) -> Self {
        let mut bytes = [0; HEADER + MAX_PAYLOAD];
        let mut len = HEADER;
        for piece in pieces {
            let n = piece.len().min(bytes.len() - len);
            debug_assert_eq!(n, piece.len(), "a payload that is too long");
            bytes[len..len + n].copy_from_slice(&piece[..n]);
            len += n;
        }
        bytes[..HEADER].copy_from_slice(header((len - HEADER) as u32).as_bytes());
        Outgoing { bytes, len }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}
