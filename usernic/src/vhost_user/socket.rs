//! Unix stream sockets that carry file descriptors, with a limit to every wait.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, CWD, Gid, Mode, Uid, chmodat, chownat};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect,
    listen, recvmsg, sendmsg, shutdown, socket_with,
};

use super::Error;
use super::bind_lock::BindLock;
use super::peer_fd::Closer;

/// The longest path of a Unix socket, in bytes: `sun_path` has 108, the last is NUL (unix(7)).
pub const MAX_PATH: usize = 107;

/// Descriptors that one message can carry. The specification's largest table has 8 regions; Linux allows 253.
pub const MAX_FDS: usize = 32;

/// Descriptors that one read can give (Linux: SCM_MAX_FD). The kernel closes what there is no room for in the middle of
/// recvmsg(2), and closing what the other side chose can block.
const SCM_MAX_FD: usize = 253;

/// What a read gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Read {
    /// So many bytes, at least 1.
    Bytes(usize),
    /// Nothing is there now.
    Nothing,
    /// The other side closed.
    Closed,
}

fn address(path: &Path) -> Result<SocketAddrUnix, Error> {
    let len = path.as_os_str().len();
    if len > MAX_PATH {
        return Err(Error::PathTooLong {
            path: path.to_owned(),
            len,
        });
    }
    SocketAddrUnix::new(path).map_err(|e| Error::socket("naming", path, e))
}

fn new_socket(path: &Path) -> Result<OwnedFd, Error> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(|e| Error::socket("making a socket for", path, e))
}

/// Connects to the socket at `path`.
pub(super) fn connect_to(path: &Path, timeout: Duration) -> Result<OwnedFd, Error> {
    connect_until(path, crate::deadline(timeout), None)
}

/// Connects to the socket at `path` before `deadline`, and before `stop` is readable.
pub(super) fn connect_until(path: &Path, deadline: Instant, stop: Option<BorrowedFd<'_>>) -> Result<OwnedFd, Error> {
    // Nothing tells when a backlog has room.
    const AGAIN: Duration = Duration::from_millis(2);
    let address = address(path)?;
    let socket = new_socket(path)?;
    loop {
        match connect(&socket, &address) {
            Ok(()) => return Ok(socket),
            Err(Errno::INTR) => {}
            // The listener's backlog is full (unix(7)).
            Err(Errno::AGAIN) if Instant::now() < deadline => {
                let Some(stop) = stop else {
                    std::thread::sleep(AGAIN);
                    continue;
                };
                let stopped = wait(stop, false, Instant::now() + AGAIN);
                if stopped.map_err(|e| Error::socket("waiting for", path, e))? {
                    return Err(Error::Stopped { path: path.to_owned() });
                }
            }
            Err(Errno::AGAIN) => return Err(Error::NobodyAccepts { path: path.to_owned() }),
            Err(Errno::NOENT) => return Err(Error::NoSocket { path: path.to_owned() }),
            Err(Errno::CONNREFUSED) => return Err(Error::NobodyListens { path: path.to_owned() }),
            Err(e) => return Err(Error::socket("connecting to", path, e)),
        }
    }
}

/// Waits until `fd` is readable (or writable), the other side is gone, or `deadline` has come; whether it is.
pub(super) fn wait(fd: BorrowedFd<'_>, write: bool, deadline: Instant) -> Result<bool, Errno> {
    wait_beside(fd, write, deadline, None)
}

/// The same, or until `stop` is readable: [`Errno::CANCELED`].
pub(crate) fn wait_beside(
    fd: BorrowedFd<'_>,
    write: bool,
    deadline: Instant,
    stop: Option<BorrowedFd<'_>>,
) -> Result<bool, Errno> {
    let flags = if write { PollFlags::OUT } else { PollFlags::IN };
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: left.as_secs().min(i64::MAX as u64) as i64,
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut fds = [
            PollFd::from_borrowed_fd(fd, flags),
            PollFd::from_borrowed_fd(stop.unwrap_or(fd), if stop.is_some() { PollFlags::IN } else { flags }),
        ];
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) if left.is_zero() => return Ok(false),
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) if stop.is_some() && !fds[1].revents().is_empty() => return Err(Errno::CANCELED),
            Ok(_) => return Ok(true),
            Err(e) => return Err(e),
        }
    }
}

/// Reads what is there, with the descriptors that came along.
pub(super) fn read(fd: BorrowedFd<'_>, bytes: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<Read, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SCM_MAX_FD))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let result = loop {
        match recvmsg(
            fd,
            &mut [IoSliceMut::new(bytes)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
        ) {
            Err(Errno::INTR) => {}
            other => break other,
        }
    };
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    match result {
        Ok(message) if message.bytes == 0 => Ok(Read::Closed),
        // There was room for all of them: this process has no descriptor left.
        Ok(message) if message.flags.contains(ReturnFlags::CTRUNC) => Err(Errno::MFILE),
        Ok(message) => Ok(Read::Bytes(message.bytes)),
        Err(Errno::AGAIN) => Ok(Read::Nothing),
        Err(Errno::CONNRESET) => Ok(Read::Closed),
        Err(e) => Err(e),
    }
}

/// Reads what is there of a side that has no descriptors to send. Those that it sends all the same never become this
/// process's: closing one can block for as long as whoever made it likes (the FLUSH of a FUSE file).
pub(super) fn read_bytes(fd: BorrowedFd<'_>, bytes: &mut [u8]) -> Result<Read, Errno> {
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    loop {
        match recvmsg(
            fd,
            &mut [IoSliceMut::new(bytes)],
            &mut RecvAncillaryBuffer::default(),
            flags,
        ) {
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(Read::Nothing),
            Err(Errno::CONNRESET) => return Ok(Read::Closed),
            Err(e) => return Err(e),
            Ok(message) if message.flags.contains(ReturnFlags::CTRUNC) => return Err(Errno::BADMSG),
            Ok(message) if message.bytes == 0 => return Ok(Read::Closed),
            Ok(message) => return Ok(Read::Bytes(message.bytes)),
        }
    }
}

/// Writes all of `bytes`, the descriptors with the first of them, before `deadline`, and before `stop` is readable:
/// [`Errno::CANCELED`].
pub(super) fn write_beside(
    fd: BorrowedFd<'_>,
    mut bytes: &[u8],
    fds: &[BorrowedFd<'_>],
    deadline: Instant,
    stop: Option<BorrowedFd<'_>>,
) -> Result<(), Errno> {
    let mut fds = fds;
    while !bytes.is_empty() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Errno::TOOMANYREFS);
        }
        match sendmsg(
            fd,
            &[IoSlice::new(bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
        ) {
            Ok(n) => {
                bytes = &bytes[n..];
                fds = &[];
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                if !wait_beside(fd, true, deadline, stop)? {
                    return Err(Errno::TIMEDOUT);
                }
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Who may connect to a listening socket: what chmod(2) and chown(2) do to its file. `None` leaves it as it is.
///
/// Connecting takes write permission (unix(7)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketAccess {
    /// Permissions, at most 0o777.
    pub mode: Option<u32>,
    /// The number of the user that owns it.
    pub user: Option<u32>,
    /// The number of the group that owns it.
    pub group: Option<u32>,
}

/// A listening socket. It is removed from the file system when this is dropped.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    path: PathBuf,
    /// Device and inode: only our own file is removed.
    file: (u64, u64),
}

impl Listener {
    /// Listens at `path`. A socket file that nobody listens on any more is replaced; one that somebody does is not.
    ///
    /// # Errors
    /// [`Error::PathTooLong`], [`Error::SocketInUse`], [`Error::NotASocket`], [`Error::Socket`].
    pub fn bind(path: &Path) -> Result<Self, Error> {
        Self::bind_for(path, SocketAccess::default())
    }

    /// Listens at `path`, as [`bind`](Self::bind) does. Nobody can connect before the file's owner and mode are set.
    ///
    /// # Errors
    /// As of [`bind`](Self::bind).
    pub fn bind_for(path: &Path, access: SocketAccess) -> Result<Self, Error> {
        let address = address(path)?;
        let socket = new_socket(path)?;
        // Until it listens.
        let _lock = BindLock::take(path);
        match bind(&socket, &address) {
            Ok(()) => {}
            Err(Errno::ADDRINUSE) => {
                Self::remove_stale(path, &address)?;
                bind(&socket, &address).map_err(|e| match e {
                    Errno::ADDRINUSE => Error::SocketInUse { path: path.to_owned() },
                    e => Error::socket("listening at", path, e),
                })?;
            }
            Err(e) => return Err(Error::socket("listening at", path, e)),
        }
        let file = rustix::fs::lstat(path)
            .map(|stat| (stat.st_dev, stat.st_ino))
            .unwrap_or((0, 0));
        let listener = Listener {
            socket,
            path: path.to_owned(),
            file,
        };
        access.apply(path)?;
        // One peer at a time; the backlog is for one that comes back before its old connection was seen to be gone.
        listen(&listener.socket, 4).map_err(|e| Error::socket("listening at", path, e))?;
        Ok(listener)
    }

    fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), Error> {
        let stat = rustix::fs::lstat(path).map_err(|e| Error::socket("looking at", path, e))?;
        if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::Socket {
            return Err(Error::NotASocket { path: path.to_owned() });
        }
        let probe = new_socket(path)?;
        match connect(&probe, address) {
            Err(Errno::CONNREFUSED) => match rustix::fs::unlink(path) {
                Ok(()) | Err(Errno::NOENT) => Ok(()),
                Err(e) => Err(Error::socket("removing the stale socket", path, e)),
            },
            Err(Errno::NOENT) => Ok(()),
            _ => Err(Error::SocketInUse { path: path.to_owned() }),
        }
    }

    /// Accepts a connection that is waiting; `None`: there is none.
    ///
    /// # Errors
    /// [`Error::Socket`]. While the process or the system has no descriptor or no memory left, connections wait in the
    /// backlog, where they keep the listener readable: whoever sleeps on it has to rest.
    pub fn accept(&self) -> Result<Option<OwnedFd>, Error> {
        match accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(stream) => Ok(Some(stream)),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
            Err(e) => Err(Error::socket("accepting at", &self.path, e)),
        }
    }

    /// Closes it, and the connections in its backlog first: `closer` knows how.
    pub(crate) fn close_by(self, closer: &Closer) {
        // While it listens: then the file at the path is not stale for anybody.
        self.unlink();
        // From here on nobody connects.
        let _ = shutdown(&self.socket, Shutdown::Both);
        while let Ok(stream) = accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            closer.close_connection(stream);
        }
    }

    /// Removes its file, if that is still there.
    fn unlink(&self) {
        let ours = rustix::fs::lstat(&self.path).is_ok_and(|stat| (stat.st_dev, stat.st_ino) == self.file);
        if ours {
            let _ = rustix::fs::unlink(&self.path);
        }
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl SocketAccess {
    fn apply(self, path: &Path) -> Result<(), Error> {
        // The mode first: who gave the file away may not set it any more.
        if let Some(mode) = self.mode {
            chmodat(CWD, path, Mode::from_raw_mode(mode), AtFlags::empty())
                .map_err(|e| Error::socket("setting the mode (socket_mode=) of", path, e))?;
        }
        if self.user.is_some() || self.group.is_some() {
            let (user, group) = (self.user.map(Uid::from_raw), self.group.map(Gid::from_raw));
            chownat(CWD, path, user, group, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(|e| Error::socket("giving away (socket_owner=)", path, e))?;
        }
        Ok(())
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.unlink();
    }
}
