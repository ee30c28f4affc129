//! Descriptors that came from the other side, which may be anything.
//!
//! The other side chooses what is behind a descriptor: a file of a FUSE file system that it serves itself, a TCP socket
//! with unsent bytes and `SO_LINGER`, a terminal. Any system call on such a descriptor can block for as long as the other
//! side likes, close(2) among them (the flush of a FUSE file, lingering). So a descriptor is asked what it is without its
//! file system taking part, and what is not of a kind that is needed is closed by a thread that nobody waits for.

use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use rustix::net::sockopt::{socket_domain, socket_type};
use rustix::net::{AddressFamily, RecvFlags, Shutdown, SocketType};

/// Closes descriptors whose close(2) may block. One for all connections of a port: a clone is the same one.
#[derive(Clone, Debug, Default)]
pub struct Closer(Arc<Mutex<Queue>>);

#[derive(Debug, Default)]
struct Queue {
    fds: Vec<OwnedFd>,
    /// A thread is at work. It ends when there is nothing left.
    running: bool,
    /// Descriptors that are not closed yet, the one that the thread is at among them.
    pending: usize,
}

impl Closer {
    /// Closes a descriptor, sooner or later; does not wait for it.
    pub fn close(&self, fd: OwnedFd) {
        let mut queue = self.lock();
        queue.fds.push(fd);
        queue.pending += 1;
        if !queue.running {
            let closer = self.clone();
            let thread = std::thread::Builder::new()
                .name("usernic-closer".into())
                .stack_size(64 << 10);
            // Without a thread the descriptors stay here until the next one comes.
            queue.running = thread.spawn(move || closer.run()).is_ok();
        }
    }

    /// Closes a connection. What the other side sent and nobody read may have descriptors, which close(2) closes with it:
    /// where nothing is left it does not block.
    pub fn close_connection(&self, socket: OwnedFd) {
        // The other side learns of it at once, and sends no more.
        let _ = rustix::net::shutdown(&socket, Shutdown::Both);
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        match rustix::net::recv(&socket, &mut [0u8; 1], flags) {
            Ok((_, 0)) | Err(Errno::CONNRESET) => drop(socket),
            _ => self.close(socket),
        }
    }

    /// Descriptors that wait for being closed.
    pub fn pending(&self) -> usize {
        self.lock().pending
    }

    /// A descriptor that came from the other side.
    pub fn own(&self, fd: OwnedFd) -> PeerFd {
        PeerFd {
            fd: ManuallyDrop::new(fd),
            closer: self.clone(),
        }
    }

    fn run(&self) {
        loop {
            let fd = {
                let mut queue = self.lock();
                let fd = queue.fds.pop();
                queue.running = fd.is_some();
                fd
            };
            let Some(fd) = fd else { return };
            drop(fd);
            self.lock().pending -= 1;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A descriptor that came from the other side, of a kind that is not known yet. Dropping it does not block.
#[derive(Debug)]
pub struct PeerFd {
    fd: ManuallyDrop<OwnedFd>,
    closer: Closer,
}

impl PeerFd {
    /// Takes it as an eventfd, which is closed without blocking.
    ///
    /// # Errors
    /// It is something else; it is dropped.
    pub fn into_eventfd(self) -> Result<OwnedFd, NotOfThatKind> {
        self.take_if(is_eventfd)
    }

    /// Takes it as a file in memory (of tmpfs or hugetlbfs, memfds among them), on which fstat(2), mmap(2) and close(2) do
    /// not block.
    ///
    /// # Errors
    /// It is something else; it is dropped.
    pub fn into_memory(self) -> Result<OwnedFd, NotOfThatKind> {
        // Only these have seals; fcntl(2) says EINVAL for everything else, and asks no file system.
        self.take_if(|fd| rustix::fs::fcntl_get_seals(fd).is_ok())
    }

    /// Whether it is a stream socket of the Unix family: send(2) with `MSG_DONTWAIT` does not block on one, while on
    /// those of other families it may wait for a lock that the other side can hold.
    pub fn is_unix_stream(&self) -> bool {
        socket_domain(self).is_ok_and(|domain| domain == AddressFamily::UNIX)
            && socket_type(self).is_ok_and(|kind| kind == SocketType::STREAM)
    }

    /// Ends a connection that is used as one, and closes it (see [`Closer::close_connection`]).
    pub fn close_connection(self) {
        let closer = self.closer.clone();
        if let Ok(socket) = self.take_if(|_| true) {
            closer.close_connection(socket);
        }
    }

    fn take_if(self, is: impl FnOnce(&OwnedFd) -> bool) -> Result<OwnedFd, NotOfThatKind> {
        if !is(&self.fd) {
            return Err(NotOfThatKind);
        }
        let mut this = ManuallyDrop::new(self);
        // SAFETY: `this` is not dropped, so each of its fields is taken or dropped once.
        unsafe {
            std::ptr::drop_in_place(&raw mut this.closer);
            Ok(ManuallyDrop::take(&mut this.fd))
        }
    }
}

/// A descriptor is something else than what was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a descriptor of another kind")]
pub struct NotOfThatKind;

impl AsFd for PeerFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for PeerFd {
    fn drop(&mut self) {
        // SAFETY: taken once: `take_if` forgets the value that it takes the descriptor out of.
        self.closer.close(unsafe { ManuallyDrop::take(&mut self.fd) });
    }
}

fn is_eventfd(fd: &OwnedFd) -> bool {
    // A link of procfs, which asks no file system. Names of files begin with a slash.
    match std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())) {
        Ok(name) => name.as_os_str() == "anon_inode:[eventfd]",
        // Without /proc: only an eventfd can be signalled, and one signal too many is no harm.
        Err(_) => crate::notify::signal(fd).is_ok(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::{UnixDatagram, UnixStream};
    use std::time::{Duration, Instant};

    use super::*;

    fn until(mut what: impl FnMut() -> bool) {
        let end = Instant::now() + Duration::from_secs(10);
        while !what() {
            assert!(Instant::now() < end);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// A TCP socket with bytes that nobody reads, which lingers for so long when it is closed.
    fn lingering(time: Duration) -> (OwnedFd, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let theirs = listener.accept().unwrap().0;
        ours.set_nonblocking(true).unwrap();
        let bytes = [0u8; 1 << 16];
        while ours.write(&bytes).is_ok() {}
        rustix::net::sockopt::set_socket_linger(&ours, Some(time)).unwrap();
        ours.set_nonblocking(false).unwrap();
        (ours.into(), theirs)
    }

    #[test]
    fn kinds() {
        let closer = Closer::default();
        let own = |fd: OwnedFd| closer.own(fd);
        let event = || rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        let memfd = || rustix::fs::memfd_create("anon_inode:[eventfd]", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let stream = || OwnedFd::from(UnixStream::pair().unwrap().0);
        let datagram = || OwnedFd::from(UnixDatagram::pair().unwrap().0);
        let disk = || OwnedFd::from(tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap());
        let folder = || OwnedFd::from(std::fs::File::open("/dev/shm").unwrap());

        assert!(own(event()).into_eventfd().is_ok() && own(event()).into_memory().is_err());
        assert!(own(memfd()).into_memory().is_ok() && own(memfd()).into_eventfd().is_err());
        assert!(own(stream()).is_unix_stream() && !own(datagram()).is_unix_stream());
        for other in [stream(), datagram(), folder(), rustix::pipe::pipe().unwrap().0] {
            assert!(!own(event()).is_unix_stream());
            let other = own(other);
            assert!(other.into_memory().is_err());
        }
        for other in [stream(), disk(), folder()] {
            assert!(own(other).into_eventfd().is_err());
        }
        until(|| closer.pending() == 0);
    }

    /// Whoever drops such a socket is not held, nor is another port.
    #[test]
    fn a_close_that_blocks_holds_nobody() {
        let closer = Closer::default();
        let (socket, peer) = lingering(Duration::from_secs(600));
        let begin = Instant::now();
        drop(closer.own(socket));
        assert!(begin.elapsed() < Duration::from_secs(60));
        // The thread is held by the first one.
        std::thread::sleep(Duration::from_millis(50));
        drop(closer.own(UnixStream::pair().unwrap().0.into()));
        assert!(closer.pending() > 0);
        drop(peer);
        until(|| closer.pending() == 0);
    }
}
