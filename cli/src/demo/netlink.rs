//! Just enough rtnetlink for a veth pair: create it across two namespaces, give it addresses, bring it up.
//!
//! Formats: rtnetlink(7), include/uapi/linux/{netlink,rtnetlink,if_link,if_addr,neighbour,veth}.h.

use std::ffi::CStr;
use std::io::{Error, ErrorKind, Result};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};

use crate::packets::Mac;

/// A netlink socket in the calling thread's network namespace.
pub struct Netlink {
    socket: OwnedFd,
    seq: u32,
}

/// A request under construction: header, fixed part, attributes.
struct Request(Vec<u8>);

/// Bytes of `struct nlmsghdr`.
const HEADER: usize = 16;

impl Request {
    fn new(kind: u16, flags: i32, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&((libc::NLM_F_REQUEST | libc::NLM_F_ACK | flags) as u16).to_ne_bytes());
        bytes.extend_from_slice(fixed);
        Request(bytes)
    }

    /// Appends `struct rtattr` with `data`, padded to four bytes.
    fn attribute(&mut self, kind: u16, data: &[u8]) {
        self.nested(kind, |r| r.0.extend_from_slice(data));
    }

    /// Appends an attribute of what `fill` appends.
    fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Request)) {
        let start = self.0.len();
        self.0.extend_from_slice(&[0, 0]);
        self.0.extend_from_slice(&kind.to_ne_bytes());
        fill(self);
        let len = (self.0.len() - start) as u16;
        self.0[start..start + 2].copy_from_slice(&len.to_ne_bytes());
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}

/// `struct ifinfomsg`: family, type, index, flags and which of them to change.
fn ifinfomsg(index: u32, flags: u32) -> [u8; 16] {
    let mut m = [0; 16];
    m[4..8].copy_from_slice(&index.to_ne_bytes());
    m[8..12].copy_from_slice(&flags.to_ne_bytes());
    m[12..16].copy_from_slice(&flags.to_ne_bytes());
    m
}

/// VETH_INFO_PEER of linux/veth.h.
const VETH_INFO_PEER: u16 = 1;

impl Netlink {
    /// Opens it.
    pub fn open() -> Result<Self> {
        // No protocol is protocol 0, which is NETLINK_ROUTE.
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        Ok(Netlink { socket, seq: 0 })
    }

    /// Creates a veth pair: `name` here with `mac`, `peer` in the namespace behind `peer_ns` with `peer_mac`.
    pub fn create_veth(
        &mut self,
        name: &CStr,
        mac: Mac,
        peer: &CStr,
        peer_mac: Mac,
        peer_ns: BorrowedFd<'_>,
    ) -> Result<()> {
        let mut r = Request::new(
            libc::RTM_NEWLINK,
            libc::NLM_F_CREATE | libc::NLM_F_EXCL,
            &ifinfomsg(0, 0),
        );
        r.attribute(libc::IFLA_IFNAME, name.to_bytes_with_nul());
        r.attribute(libc::IFLA_ADDRESS, &mac);
        r.nested(libc::IFLA_LINKINFO, |r| {
            r.attribute(libc::IFLA_INFO_KIND, b"veth");
            r.nested(libc::IFLA_INFO_DATA, |r| {
                r.nested(VETH_INFO_PEER, |r| {
                    r.0.extend_from_slice(&ifinfomsg(0, 0));
                    r.attribute(libc::IFLA_IFNAME, peer.to_bytes_with_nul());
                    r.attribute(libc::IFLA_ADDRESS, &peer_mac);
                    r.attribute(libc::IFLA_NET_NS_FD, &(peer_ns.as_raw_fd() as u32).to_ne_bytes());
                });
            });
        });
        self.request(r)
    }

    /// Gives the interface the address `ip`/24.
    pub fn add_address(&mut self, index: u32, ip: Ipv4Addr) -> Result<()> {
        // struct ifaddrmsg: family, prefix length, flags, scope, index.
        let mut fixed = [libc::AF_INET as u8, 24, 0, 0, 0, 0, 0, 0];
        fixed[4..8].copy_from_slice(&index.to_ne_bytes());
        let mut r = Request::new(libc::RTM_NEWADDR, libc::NLM_F_CREATE | libc::NLM_F_EXCL, &fixed);
        r.attribute(libc::IFA_LOCAL, &ip.octets());
        r.attribute(libc::IFA_ADDRESS, &ip.octets());
        self.request(r)
    }

    /// Makes `mac` the permanent neighbour `ip`, so that no ARP disturbs a measurement.
    pub fn add_neighbour(&mut self, index: u32, ip: Ipv4Addr, mac: Mac) -> Result<()> {
        // struct ndmsg: family, 3 of padding, index, state, flags, type.
        let mut fixed = [0u8; 12];
        fixed[0] = libc::AF_INET as u8;
        fixed[4..8].copy_from_slice(&index.to_ne_bytes());
        fixed[8..10].copy_from_slice(&libc::NUD_PERMANENT.to_ne_bytes());
        let mut r = Request::new(libc::RTM_NEWNEIGH, libc::NLM_F_CREATE | libc::NLM_F_REPLACE, &fixed);
        r.attribute(libc::NDA_DST, &ip.octets());
        r.attribute(libc::NDA_LLADDR, &mac);
        self.request(r)
    }

    /// Brings the interface up.
    pub fn set_up(&mut self, index: u32) -> Result<()> {
        self.request(Request::new(
            libc::RTM_NEWLINK,
            0,
            &ifinfomsg(index, libc::IFF_UP as u32),
        ))
    }

    /// The number of the interface called `name` in this socket's namespace.
    pub fn index(&self, name: &str) -> Result<u32> {
        Ok(rustix::net::netdevice::name_to_index(&self.socket, name)?)
    }

    /// Sends a request and takes its acknowledgement (`struct nlmsgerr`: an errno, negated, 0 for success).
    fn request(&mut self, mut request: Request) -> Result<()> {
        self.seq += 1;
        let len = request.0.len() as u32;
        request.0[..4].copy_from_slice(&len.to_ne_bytes());
        request.0[8..12].copy_from_slice(&self.seq.to_ne_bytes());
        let kernel = netlink::SocketAddrNetlink::new(0, 0);
        rustix::net::sendto(&self.socket, &request.0, SendFlags::empty(), &kernel)?;
        let mut answer = [0u8; 4096];
        let (n, _) = rustix::net::recv(&self.socket, &mut answer[..], RecvFlags::empty())?;
        let kind = answer
            .get(4..6)
            .filter(|_| n >= HEADER + 4)
            .map(|k| u16::from_ne_bytes([k[0], k[1]]));
        let code = i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]);
        match (kind.map(i32::from), code) {
            (Some(libc::NLMSG_ERROR), 0) => Ok(()),
            (Some(libc::NLMSG_ERROR), code) => Err(Error::from_raw_os_error(-code)),
            _ => Err(Error::new(
                ErrorKind::InvalidData,
                "the kernel's answer over netlink is no acknowledgement",
            )),
        }
    }
}

/// The names of all network interfaces of the calling thread's namespace.
pub fn interfaces() -> Result<Vec<String>> {
    // SAFETY: no argument; the result is freed below.
    let list = unsafe { libc::if_nameindex() };
    if list.is_null() {
        return Err(Error::last_os_error());
    }
    let mut names = Vec::new();
    let mut entry = list;
    loop {
        // SAFETY: the array ends with an entry of index 0 and a null name; we stop there.
        let (index, name) = unsafe { ((*entry).if_index, (*entry).if_name) };
        if index == 0 || name.is_null() {
            break;
        }
        // SAFETY: a C string that lives until the list is freed.
        names.push(unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned());
        // SAFETY: the last entry has not been reached.
        entry = unsafe { entry.add(1) };
    }
    // SAFETY: from if_nameindex above, freed once.
    unsafe { libc::if_freenameindex(list) };
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_nested() {
        let mut r = Request::new(16, 0, &[]);
        r.nested(18, |r| r.attribute(1, b"veth!"));
        // Outer: 4 + inner (4 + 5 and 3 of padding); lengths do not count the padding of the attribute itself.
        assert_eq!(r.0.len(), HEADER + 16);
        assert_eq!(
            r.0[16..20],
            [&16u16.to_ne_bytes()[..], &18u16.to_ne_bytes()].concat()[..]
        );
        assert_eq!(r.0[20..24], [&9u16.to_ne_bytes()[..], &1u16.to_ne_bytes()].concat()[..]);
        assert_eq!(r.0[24..32], *b"veth!\0\0\0");
    }

    #[test]
    fn the_loopback_is_there() {
        assert!(interfaces().unwrap().contains(&"lo".to_owned()));
        assert_eq!(Netlink::open().unwrap().index("lo").unwrap(), 1);
        let refused = Netlink::open().unwrap().set_up(0x7fff_fff0);
        assert!(refused.is_err(), "the kernel's error comes back");
    }
}
