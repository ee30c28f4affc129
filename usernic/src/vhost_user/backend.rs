//! The back-end's connection.

use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::SendFlags;
use vhost_proto::{Backend, Event, Offer, Outcome, Outgoing, Step};

use super::Error;
use super::peer_fd::{Closer, PeerFd};
use super::socket::{Read, connect_to, read};

/// What a back-end does about the events of its connection.
pub trait Handler {
    /// Handles one event. The answer of [`Event::RingStop`] is [`Outcome::Base`], that of [`Event::GetConfig`] is
    /// [`Outcome::Config`].
    ///
    /// # Errors
    /// A text that says what is wrong ends the connection.
    fn handle(&mut self, event: Event<PeerFd>) -> Result<Outcome<'_>, String>;
}

/// Messages that are handled before the caller looks at other things again: a front-end that never stops talking does not
/// keep it.
const MESSAGES: usize = 64;

/// A connection to a front-end, driven by whoever holds it. No call waits for the front-end.
#[derive(Debug)]
pub struct BackendSession {
    /// Taken when it is dropped.
    socket: ManuallyDrop<OwnedFd>,
    path: PathBuf,
    timeout: Duration,
    machine: Backend<PeerFd>,
    closer: Closer,
    /// An event that came while the connection was only [negotiated](BackendSession::negotiate).
    held: Option<Event<PeerFd>>,
    /// Of an answer, what the front-end has not taken yet. Nothing is read before it has.
    unsent: Vec<u8>,
    /// Since when the front-end owes the rest of a message.
    incomplete: Option<Instant>,
    /// Since when it does not take an answer.
    stuck: Option<Instant>,
    spoken: bool,
}

/// What one look at the socket gave.
#[expect(clippy::large_enum_variant, reason = "lives on the stack of its one caller")]
enum Progress {
    /// Nothing is there, or an answer waits to be taken.
    Idle,
    /// A part of a message, or a message that needed nobody.
    Quiet,
    /// An event, which has to be finished.
    Event(Event<PeerFd>),
}

impl BackendSession {
    /// Connects to the front-end that listens at `path`. `timeout` is for each message of the front-end to be complete, and
    /// for each answer to be taken.
    ///
    /// # Errors
    /// [`Error::PathTooLong`], [`Error::NoSocket`], [`Error::NobodyListens`], [`Error::Socket`].
    pub fn connect(path: &Path, offer: Offer, timeout: Duration, closer: &Closer) -> Result<Self, Error> {
        // A full backlog is an error: the caller tries again later.
        let socket = connect_to(path, Duration::ZERO)?;
        Ok(Self::new(socket, path, offer, timeout, closer))
    }

    /// Over a connection that was made already. `path` is for messages.
    pub fn new(socket: OwnedFd, path: &Path, offer: Offer, timeout: Duration, closer: &Closer) -> Self {
        BackendSession {
            socket: ManuallyDrop::new(socket),
            path: path.to_owned(),
            timeout,
            machine: Backend::new(offer),
            closer: closer.clone(),
            held: None,
            unsent: Vec::new(),
            incomplete: None,
            stuck: None,
            spoken: false,
        }
    }

    /// Whether the front-end has said a whole message.
    pub fn has_spoken(&self) -> bool {
        self.spoken
    }

    /// Whether virtio features are agreed on.
    pub fn has_features(&self) -> bool {
        self.machine.features().is_some()
    }

    /// Whether a message is kept for [`service`](BackendSession::service): until then nothing more is read.
    pub fn is_held(&self) -> bool {
        self.held.is_some()
    }

    /// What to wait for before [`service`](BackendSession::service) is called again.
    pub fn interest(&self) -> PollFlags {
        match self.unsent.is_empty() {
            true => PollFlags::IN,
            false => PollFlags::OUT,
        }
    }

    /// When [`service`](BackendSession::service) is to be called whatever happens: a limit is over then.
    pub fn deadline(&self) -> Option<Instant> {
        let since = [self.incomplete, self.stuck].into_iter().flatten().min();
        since.and_then(|since| since.checked_add(self.timeout))
    }

    /// Answers what needs no handler, such as which features there are, until the front-end says something that does.
    /// Whether it has; that is kept for [`service`](BackendSession::service).
    ///
    /// # Errors
    /// As of [`service`](BackendSession::service).
    pub fn negotiate(&mut self) -> Result<bool, Error> {
        for _ in 0..MESSAGES {
            if self.held.is_some() {
                return Ok(true);
            }
            match self.step()? {
                Progress::Idle => break,
                Progress::Quiet => {}
                Progress::Event(event) => self.held = Some(event),
            }
        }
        self.check_limits()?;
        Ok(self.held.is_some())
    }

    /// Handles all that has come, and returns when there is no more, or a bound number of messages was handled.
    ///
    /// # Errors
    /// [`Error::Closed`] when the front-end is gone, and those of a connection. The session is over then.
    pub fn service(&mut self, handler: &mut impl Handler) -> Result<(), Error> {
        for _ in 0..MESSAGES {
            let event = match self.held.take() {
                Some(event) => event,
                None => match self.step()? {
                    Progress::Idle => break,
                    Progress::Quiet => continue,
                    Progress::Event(event) => event,
                },
            };
            match handler.handle(event) {
                Ok(outcome) => {
                    let answer = self.machine.finish(outcome).map_err(|e| self.protocol(e))?;
                    self.send(answer)?;
                }
                Err(what) => {
                    // Told that it failed, if it wants to know; the connection ends all the same.
                    if let Ok(answer) = self.machine.finish(Outcome::Failed) {
                        let _ = self.send(answer);
                    }
                    return Err(self.setup(what));
                }
            }
        }
        self.check_limits()
    }

    fn step(&mut self) -> Result<Progress, Error> {
        self.flush()?;
        if !self.unsent.is_empty() {
            return Ok(Progress::Idle);
        }
        let mut bytes = [0u8; 1024];
        let mut fds = Vec::new();
        let wants = self.machine.wants().min(bytes.len());
        let n = match read(self.socket.as_fd(), &mut bytes[..wants], &mut fds) {
            Ok(Read::Bytes(n)) => n,
            Ok(Read::Nothing) => return Ok(Progress::Idle),
            Ok(Read::Closed) => {
                let mid = self.machine.closed().is_err();
                return Err(self.closed("the end", mid));
            }
            Err(e) => return Err(Error::socket("reading from", &self.path, e)),
        };
        let fds: Vec<PeerFd> = fds.into_iter().map(|fd| self.closer.own(fd)).collect();
        let step = self.machine.receive(&bytes[..n], fds);
        let step = step.map_err(|e| self.protocol(e))?;
        if self.machine.pending() == 0 {
            self.incomplete = None;
            self.spoken = true;
        } else if self.incomplete.is_none() {
            self.incomplete = Some(Instant::now());
        }
        Ok(match step {
            Step::More => Progress::Quiet,
            Step::Quiet(answer) => {
                self.send(answer)?;
                Progress::Quiet
            }
            Step::Event(event) => Progress::Event(event),
        })
    }

    fn send(&mut self, message: Option<Outgoing>) -> Result<(), Error> {
        if let Some(message) = message {
            self.unsent.extend_from_slice(message.bytes());
        }
        self.flush()
    }

    fn flush(&mut self) -> Result<(), Error> {
        while !self.unsent.is_empty() {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::send(&*self.socket, &self.unsent, flags) {
                Ok(n) => drop(self.unsent.drain(..n)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.stuck.get_or_insert_with(Instant::now);
                    return Ok(());
                }
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(self.closed("our answer", false)),
                Err(e) => return Err(Error::socket("sending to", &self.path, e)),
            }
        }
        self.stuck = None;
        Ok(())
    }

    fn check_limits(&self) -> Result<(), Error> {
        let over = |since: Option<Instant>| since.is_some_and(|since| since.elapsed() >= self.timeout);
        let what = match (over(self.incomplete), over(self.stuck)) {
            (false, false) => return Ok(()),
            (true, _) => "did not finish a message",
            (_, true) => "did not take an answer",
        };
        let ms = self.timeout.as_millis();
        Err(self.setup(format!(
            "the front-end {what} within {ms} ms (timeout= in the port spec is the limit)"
        )))
    }

    fn closed(&self, step: &'static str, mid: bool) -> Error {
        Error::Closed {
            path: self.path.clone(),
            step,
            mid,
        }
    }

    pub(crate) fn setup(&self, what: String) -> Error {
        Error::Setup {
            path: self.path.clone(),
            what,
        }
    }

    fn protocol(&self, source: vhost_proto::Error) -> Error {
        Error::Protocol {
            path: self.path.clone(),
            source,
        }
    }
}

impl AsFd for BackendSession {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for BackendSession {
    fn drop(&mut self) {
        // SAFETY: taken once, here.
        let socket = unsafe { ManuallyDrop::take(&mut self.socket) };
        self.closer.close_connection(socket);
    }
}
