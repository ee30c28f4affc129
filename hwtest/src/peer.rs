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
    index: u32,
}

impl Peer {
    /// On this interface. It takes CAP_NET_RAW.
    pub fn open(interface: &str) -> Result<Self> {
        let name = std::ffi::CString::new(interface)?;
        // SAFETY: a string that ends. In the network namespace that we are in, which /sys need not show.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        ensure!(index > 0, "no interface {interface}: {}", Error::last_os_error());
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
            sll_ifindex: index as i32,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: a whole sockaddr_ll and its size.
        let done = unsafe { libc::bind(fd, (&raw mut address).cast(), len) };
        ensure!(done == 0, "binding to {interface}: {}", Error::last_os_error());
        let mut len = len;
        // SAFETY: a whole sockaddr_ll and its size.
        let done = unsafe { libc::getsockname(fd, (&raw mut address).cast(), &raw mut len) };
        ensure!(
            done == 0 && address.sll_halen == 6,
            "the address of {interface}: {}",
            Error::last_os_error()
        );
        let mut mac = [0; 6];
        mac.copy_from_slice(&address.sll_addr[..6]);
        Ok(Peer { socket, mac, index })
    }

    /// Joins a group of Ethernet's, as long as this lives: what `ip maddr add` does.
    pub fn join(&self, group: [u8; 6]) -> Result<()> {
        let mut request = libc::packet_mreq {
            mr_ifindex: self.index as i32,
            mr_type: libc::PACKET_MR_MULTICAST as u16,
            mr_alen: 6,
            mr_address: [0; 8],
        };
        request.mr_address[..6].copy_from_slice(&group);
        let len = size_of::<libc::packet_mreq>() as libc::socklen_t;
        let (level, option) = (libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP);
        // SAFETY: a whole packet_mreq and its size.
        let done =
            unsafe { libc::setsockopt(self.socket.as_raw_fd(), level, option, (&raw const request).cast(), len) };
        ensure!(done == 0, "joining {group:x?}: {}", Error::last_os_error());
        Ok(())
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
