//! The back-end's connection.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vhost_proto::{Backend, Event, Offer, Outcome, Outgoing, Step};

use super::Error;
use super::socket::{Read, connect_to, read, write};

/// What a back-end does about the events of its connection.
pub trait Handler {
    /// Handles one event. The answer of [`Event::RingStop`] is [`Outcome::Base`], that of [`Event::GetConfig`] is
    /// [`Outcome::Config`].
    ///
    /// # Errors
    /// A text that says what is wrong ends the connection.
    fn handle(&mut self, event: Event<OwnedFd>) -> Result<Outcome<'_>, String>;
}

/// A connection to a front-end, driven by whoever holds it.
#[derive(Debug)]
pub struct BackendSession {
    socket: OwnedFd,
    path: PathBuf,
    timeout: Duration,
    machine: Backend<OwnedFd>,
}

impl BackendSession {
    /// Connects to the front-end that listens at `path`. `timeout` is for an answer of ours to be taken.
    ///
    /// # Errors
    /// [`Error::PathTooLong`], [`Error::NoSocket`], [`Error::NobodyListens`], [`Error::Socket`].
    pub fn connect(path: &Path, offer: Offer, timeout: Duration) -> Result<Self, Error> {
        Ok(Self::new(connect_to(path, timeout)?, path, offer, timeout))
    }

    /// Over a connection that was made already. `path` is for messages.
    pub fn new(socket: OwnedFd, path: &Path, offer: Offer, timeout: Duration) -> Self {
        BackendSession {
            socket,
            path: path.to_owned(),
            timeout,
            machine: Backend::new(offer),
        }
    }

    /// Handles all that has come, and returns when there is no more, or a bound number of messages was handled.
    ///
    /// # Errors
    /// [`Error::Closed`] when the front-end is gone, and those of a connection. The session is over then.
    pub fn service(&mut self, handler: &mut impl Handler) -> Result<(), Error> {
        let mut bytes = [0u8; 1024];
        let mut fds = Vec::new();
        // Bound, so that a front-end that never stops talking does not keep the caller here.
        for _ in 0..1024 {
            let wants = self.machine.wants().min(bytes.len());
            let n = match read(self.socket.as_fd(), &mut bytes[..wants], &mut fds) {
                Ok(Read::Bytes(n)) => n,
                Ok(Read::Nothing) => return Ok(()),
                Ok(Read::Closed) => {
                    let mid = self.machine.closed().is_err();
                    return Err(Error::Closed {
                        path: self.path.clone(),
                        step: "the end",
                        mid,
                    });
                }
                Err(e) => return Err(Error::socket("reading from", &self.path, e)),
            };
            match self
                .machine
                .receive(&bytes[..n], fds.drain(..))
                .map_err(|e| self.protocol(e))?
            {
                Step::More => {}
                Step::Quiet(answer) => self.send(answer)?,
                Step::Event(event) => match handler.handle(event) {
                    Ok(outcome) => {
                        let answer = self.machine.finish(outcome).map_err(|e| self.protocol(e))?;
                        self.send(answer)?;
                    }
                    Err(what) => {
                        // Told that it failed, if it wants to know; the connection ends all the same.
                        if let Ok(answer) = self.machine.finish(Outcome::Failed) {
                            let _ = self.send(answer);
                        }
                        return Err(Error::Setup {
                            path: self.path.clone(),
                            what,
                        });
                    }
                },
            }
        }
        Ok(())
    }

    fn send(&mut self, message: Option<Outgoing>) -> Result<(), Error> {
        let Some(message) = message else { return Ok(()) };
        write(self.socket.as_fd(), message.bytes(), &[], Instant::now() + self.timeout).map_err(|e| match e {
            rustix::io::Errno::TIMEDOUT => {
                let ms = self.timeout.as_millis() as u64;
                Error::Timeout {
                    path: self.path.clone(),
                    step: "our answer",
                    ms,
                }
            }
            rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET => Error::Closed {
                path: self.path.clone(),
                step: "our answer",
                mid: false,
            },
            e => Error::socket("sending to", &self.path, e),
        })
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
