//! One process at a time makes, replaces or removes a socket file.
//!
//! A socket file is stale if nobody listens on it. Between that look and the removal another process may have put its own
//! socket there, and a socket that is bound but not yet listening looks stale, too. A lock on a file beside the socket
//! covers all these steps.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags, fstat, lstat, open, unlink};
use rustix::io::Errno;

/// The longest wait for the lock. Its owner needs it for microseconds; whoever holds it for longer may be hostile, and can
/// write to the socket's folder.
const LIMIT: Duration = Duration::from_secs(2);

/// Between two attempts.
const AGAIN: Duration = Duration::from_millis(1);

/// The lock of a socket's path. Dropping it removes the file.
pub(super) struct BindLock {
    path: PathBuf,
    _file: OwnedFd,
}

impl BindLock {
    /// Takes the lock. `None`: there is none to be had, because the folder cannot be written, because the file system has
    /// no locks, or because another process holds it all the time.
    pub(super) fn take(socket: &Path) -> Option<Self> {
        let mut name = OsString::from(".");
        name.push(socket.file_name()?);
        name.push(".lock");
        let path = socket.with_file_name(name);
        let end = Instant::now() + LIMIT;
        loop {
            match Self::attempt(&path) {
                Ok(lock) => return Some(lock),
                // Another user's lock is a file that may not be opened.
                Err(Errno::ACCESS) if lstat(&path).is_err() => return None,
                Err(Errno::ACCESS | Errno::AGAIN | Errno::INTR) if Instant::now() < end => std::thread::sleep(AGAIN),
                Err(_) => return None,
            }
        }
    }

    /// [`Errno::AGAIN`]: another process holds the lock.
    fn attempt(path: &Path) -> Result<Self, Errno> {
        // Whatever a hostile process has put there, opening it does not wait.
        let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = open(path, flags, Mode::RUSR | Mode::WUSR)?;
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        // The previous owner may have removed this file between the two calls.
        let (ours, there) = (fstat(&file)?, lstat(path).map_err(|_| Errno::AGAIN)?);
        if (ours.st_dev, ours.st_ino) != (there.st_dev, there.st_ino) {
            return Err(Errno::AGAIN);
        }
        Ok(BindLock {
            path: path.to_owned(),
            _file: file,
        })
    }
}

impl Drop for BindLock {
    fn drop(&mut self) {
        // Still locked: whoever has opened this file meanwhile sees that it is gone.
        let _ = unlink(&self.path);
    }
}
