//! vhost-user connections: sockets under the state machines of `vhost-proto`.
//!
//! Every wait has a limit. After an error a connection is closed and all descriptors that came over it are dropped.

mod backend;
mod bind_lock;
mod candidates;
mod frontend;
mod peer_fd;
mod socket;

use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

pub use backend::{BackendSession, Handler};
pub use candidates::Candidates;
pub use frontend::{FrontendSession, Offered};
pub use peer_fd::{Closer, NotOfThatKind, PeerFd};
pub(crate) use socket::wait_beside;
pub use socket::{Listener, MAX_FDS, MAX_PATH, SocketAccess};

/// A region of memory to share.
#[derive(Clone, Copy, Debug)]
pub struct Region<'a> {
    /// The address that descriptors use.
    pub guest_addr: u64,
    /// The address that ring addresses use.
    pub user_addr: u64,
    /// Bytes.
    pub size: u64,
    /// Where it begins in the file.
    pub offset: u64,
    /// The file.
    pub fd: BorrowedFd<'a>,
}

/// A ring to start.
#[derive(Clone, Copy, Debug)]
pub struct RingSetup<'a> {
    /// Descriptors.
    pub num: u16,
    /// Where it begins.
    pub base: u32,
    /// Its descriptor table, an address of this process.
    pub desc: u64,
    /// Its available ring, likewise.
    pub avail: u64,
    /// Its used ring, likewise.
    pub used: u64,
    /// What we signal.
    pub kick: BorrowedFd<'a>,
    /// What the back-end signals.
    pub call: BorrowedFd<'a>,
}

/// What went wrong with a connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The path does not fit a socket address.
    #[error("socket path of {len} bytes, {MAX_PATH} at the most (unix(7)): {}: use a shorter one, or a symbolic link to its folder", path.display())]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
    },
    /// There is no such file.
    #[error("no socket at {}: start the back-end first, or listen there yourself with server=1", path.display())]
    NoSocket {
        /// The path.
        path: PathBuf,
    },
    /// The socket file is left over.
    #[error("nobody listens at {}: its back-end is gone; start it again", path.display())]
    NobodyListens {
        /// The path.
        path: PathBuf,
    },
    /// The listener's backlog is full, and stayed so.
    #[error("nobody accepts connections at {}: its back-end hangs, or serves another front-end while more of them wait", path.display())]
    NobodyAccepts {
        /// The path.
        path: PathBuf,
    },
    /// The port is being closed.
    #[error("{}: given up, since the port is being closed", path.display())]
    Stopped {
        /// The socket.
        path: PathBuf,
    },
    /// Another connection came while this one was silent.
    #[error("{}: no answer to {step}, and another one has come: the silent connection is closed", path.display())]
    GaveWay {
        /// The socket.
        path: PathBuf,
        /// The message.
        step: &'static str,
    },
    /// Somebody listens there.
    #[error("somebody listens at {} already: take another path, or end that program", path.display())]
    SocketInUse {
        /// The path.
        path: PathBuf,
    },
    /// A file of another kind is in the way.
    #[error("{} is there and is no socket: take another path, or remove it", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("{tried} {}: {source}", path.display())]
    Socket {
        /// What was tried.
        tried: &'static str,
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// No answer came in time.
    #[error("{}: no answer to {step} within {ms} ms: is the other side alive? (timeout= in the port spec is the limit){}", path.display(), one_at_a_time(step))]
    Timeout {
        /// The socket.
        path: PathBuf,
        /// The message.
        step: &'static str,
        /// The limit: of the operation that the message belongs to.
        ms: u64,
    },
    /// The other side closed the connection.
    #[error("{}: the other side closed the connection{}{}{}", path.display(), at(step), if *mid { ", in the middle of a message" } else { "" }, one_at_a_time(step))]
    Closed {
        /// The socket.
        path: PathBuf,
        /// The message that was to be answered; empty: none was.
        step: &'static str,
        /// Part of a message had come.
        mid: bool,
    },
    /// The other side broke the protocol, or refused.
    #[error("{}: {source}", path.display())]
    Protocol {
        /// The socket.
        path: PathBuf,
        /// How.
        source: vhost_proto::Error,
    },
    /// What the other side set up cannot be used.
    #[error("{}: {what}", path.display())]
    Setup {
        /// The socket.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
}

/// Where a connection ended.
fn at(step: &str) -> String {
    match step {
        "" => String::new(),
        step => format!(" at {step}"),
    }
}

/// The hint for a front-end whose first question is not answered.
fn one_at_a_time(step: &str) -> &'static str {
    match step {
        "GET_FEATURES" => {
            ": does it serve another front-end already? A back-end serves one at a time; its log says more"
        }
        _ => "",
    }
}

impl Error {
    fn socket(tried: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Error::Socket {
            tried,
            path: path.to_owned(),
            source: source.into(),
        }
    }
}
