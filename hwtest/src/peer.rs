//! The other end: an interface of the kernel's, by a packet socket.

use std::io::{Error, ErrorKind};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

/// All protocols, in network order: `ETH_P_ALL` of packet(7).
const ALL: u16 = (libc::ETH_P_ALL as u16).to_be();

/// A packet socket on an interface: whole frames, both ways.
pub struct Peer {
    socket: OwnedFd,
    mac: [u8; 6],
}

impl Peer {
    /// On this interface. It takes CAP_NET_RAW.
    pub fn open(interface: &str) -> Result<Self> {
        let file = |what: &str| {
            let path = format!("/sys/class/net/{interface}/{what}");
            std::fs::read_to_string(&path).with_context(|| format!("no interface {interface}: {path}"))
        };
        let index: i32 = file("ifindex")?.trim().parse()?;
        let address = file("address")?;
        let mut mac = [0; 6];
        let mut digits = address.trim().split(':');
        for byte in &mut mac {
            *byte = u8::from_str_radix(digits.next().unwrap_or_default(), 16).context(address.clone())?;
        }
        let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // SAFETY: socket(2) takes numbers. Protocol 0: nothing comes before it is bound.
        let fd = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
        if fd < 0 {
            return Err(Error::last_os_error()).context("a packet socket (it takes CAP_NET_RAW)");
        }
        // SAFETY: just opened, and nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let (on, bytes) = (1i32, 8 << 20);
        for (level, option, value) in [
            // Not what we send ourselves.
            (libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, on),
            (libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, bytes),
        ] {
            let len = size_of::<i32>() as libc::socklen_t;
            // SAFETY: a whole i32 and its size.
            let done = unsafe { libc::setsockopt(fd, level, option, (&raw const value).cast(), len) };
            ensure!(done == 0, "a packet socket's option: {}", Error::last_os_error());
        }
        let mut address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: ALL,
            sll_ifindex: index,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: a whole sockaddr_ll and its size.
        let done = unsafe { libc::bind(fd, (&raw mut address).cast(), len) };
        ensure!(done == 0, "binding to {interface}: {}", Error::last_os_error());
        Ok(Peer { socket, mac })
    }

    /// The interface's address.
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Sends a frame; it waits while the interface's queue is full.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        let end = Instant::now() + crate::LIMIT;
        loop {
            match rustix::net::send(&self.socket, frame, rustix::net::SendFlags::empty()) {
                Ok(n) if n == frame.len() => return Ok(()),
                Ok(n) => bail!("{n} bytes of {} were sent", frame.len()),
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::NOBUFS | rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e).context("sending from the peer"),
            }
            ensure!(Instant::now() < end, "the peer's interface takes no frame");
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// The next frame from this source, if one has come. What came from others is left out.
    pub fn receive(&self, from: [u8; 6]) -> Result<Option<Vec<u8>>> {
        let mut bytes = vec![0u8; 16384];
        loop {
            // SAFETY: the buffer is as long as is said.
            let n = unsafe { libc::recv(self.socket.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), 0) };
            if n < 0 {
                let error = Error::last_os_error();
                match error.kind() {
                    ErrorKind::WouldBlock => return Ok(None),
                    ErrorKind::Interrupted => continue,
                    _ => return Err(error).context("receiving at the peer"),
                }
            }
            let frame = &bytes[..n as usize];
            if frame.get(6..12) == Some(&from[..]) {
                return Ok(Some(frame.to_vec()));
            }
        }
    }
}
