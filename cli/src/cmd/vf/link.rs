//! What a port allows its virtual functions, by rtnetlink: IFLA_VFINFO_LIST of `include/uapi/linux/if_link.h`.

use std::fmt;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::OwnedFd;
use std::time::Duration;

use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    LinkAttribute, LinkMessage, LinkVfInfo, VfInfo, VfInfoLinkState, VfInfoMac, VfInfoRate, VfInfoSpoofCheck,
    VfInfoTrust, VfInfoVlan, VfLinkState,
};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};

use crate::packets::{Mac, format_mac};

/// A virtual function's link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LinkState {
    /// As the port's.
    Auto,
    /// Up, whatever the port's is: virtual functions of one port reach each other.
    On,
    /// Down.
    Off,
}

/// One thing to change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Mac(Mac),
    Vlan {
        id: u32,
        priority: u32,
    },
    Trust(bool),
    SpoofCheck(bool),
    /// Mb/s sent at most; 0: no limit.
    Rate(u32),
    Link(LinkState),
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let on = |on: bool| if on { "on" } else { "off" };
        match *self {
            Change::Mac(mac) => write!(f, "mac {}", format_mac(mac)),
            Change::Vlan { id: 0, .. } => f.write_str("no vlan"),
            Change::Vlan { id, priority: 0 } => write!(f, "vlan {id}"),
            Change::Vlan { id, priority } => write!(f, "vlan {id} priority {priority}"),
            Change::Trust(trust) => write!(f, "trust {}", on(trust)),
            Change::SpoofCheck(check) => write!(f, "spoof check {}", on(check)),
            Change::Rate(0) => f.write_str("no rate limit"),
            Change::Rate(rate) => write!(f, "rate {rate} Mb/s"),
            Change::Link(state) => write!(f, "link {}", format!("{state:?}").to_lowercase()),
        }
    }
}

impl Change {
    fn info(self, number: u32) -> VfInfo {
        match self {
            Change::Mac(mac) => VfInfo::Mac(VfInfoMac::new(number, &mac)),
            Change::Vlan { id, priority } => VfInfo::Vlan(VfInfoVlan::new(number, id, priority)),
            Change::Trust(trust) => VfInfo::Trust(VfInfoTrust::new(number, trust)),
            Change::SpoofCheck(check) => VfInfo::SpoofCheck(VfInfoSpoofCheck::new(number, check)),
            Change::Rate(most) => VfInfo::Rate(VfInfoRate::new(number, 0, most)),
            Change::Link(state) => VfInfo::LinkState(VfInfoLinkState::new(
                number,
                match state {
                    LinkState::Auto => VfLinkState::Auto,
                    LinkState::On => VfLinkState::Enable,
                    LinkState::Off => VfLinkState::Disable,
                },
            )),
        }
    }
}

/// The request for a change, as it is sent.
fn request(seq: u32, index: u32, number: u32, change: Change) -> Vec<u8> {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.attributes = vec![LinkAttribute::VfInfoList(vec![LinkVfInfo(vec![change.info(number)])])];
    let mut message = NetlinkMessage::from(RouteNetlinkMessage::SetLink(link));
    message.header.flags = NLM_F_REQUEST | NLM_F_ACK;
    message.header.sequence_number = seq;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

/// A netlink socket in this process's network namespace.
pub struct Socket {
    fd: OwnedFd,
    seq: u32,
}

impl Socket {
    /// Opens it.
    pub fn open() -> Result<Self> {
        // No protocol is protocol 0, which is NETLINK_ROUTE.
        let fd = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        // A driver asks its firmware, and some take their time.
        set_socket_timeout(&fd, Timeout::Recv, Some(Duration::from_secs(10)))?;
        Ok(Socket { fd, seq: 0 })
    }

    /// Changes one thing of virtual function `number` of the port with the interface `index`.
    pub fn set(&mut self, index: u32, number: u32, change: &Change) -> Result<()> {
        self.seq += 1;
        let bytes = request(self.seq, index, number, *change);
        rustix::net::sendto(
            &self.fd,
            &bytes,
            SendFlags::empty(),
            &netlink::SocketAddrNetlink::new(0, 0),
        )?;
        let mut answer = [0u8; 4096];
        let (n, _) = rustix::net::recv(&self.fd, &mut answer[..], RecvFlags::empty())?;
        let invalid = |_| Error::new(ErrorKind::InvalidData, "the kernel's answer is no netlink message");
        let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer[..n]).map_err(invalid)?;
        match answer.payload {
            NetlinkPayload::Error(error) if answer.header.sequence_number == self.seq => match error.code {
                None => Ok(()),
                Some(code) => Err(Error::from_raw_os_error(-code.get())),
            },
            _ => Err(Error::new(
                ErrorKind::InvalidData,
                "the kernel's answer is no acknowledgement",
            )),
        }
    }
}

/// What to do about a refusal.
pub fn advice(error: &Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM) => " (this needs CAP_NET_ADMIN on the host)",
        Some(libc::EOPNOTSUPP) => {
            " (the port's driver does not offer it: it must be the physical function's own, as ixgbe)"
        }
        Some(libc::EINVAL) => {
            " (the driver does not take this value now: a rate needs a link, an 82599 a rate above 10 Mb/s, and the virtual \
             function must exist)"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_byte_by_byte() {
        let bytes = request(5, 3, 2, Change::Vlan { id: 100, priority: 4 });
        let words: Vec<u32> = bytes
            .chunks(4)
            .map(|w| u32::from_ne_bytes(w.try_into().unwrap()))
            .collect();
        // nlattr and nlmsghdr: length and kind are 16 bits each, little-endian here as on the host.
        let pair = |len: u16, kind: u16| {
            u32::from_ne_bytes([len.to_ne_bytes(), kind.to_ne_bytes()].concat().try_into().unwrap())
        };
        // nlmsghdr: length, RTM_SETLINK with NLM_F_REQUEST and NLM_F_ACK, sequence, port; ifinfomsg: family, index, flags,
        // changes; IFLA_VFINFO_LIST of IFLA_VF_INFO of IFLA_VF_VLAN: function, id, priority.
        let expected = [
            56,
            pair(19, 5),
            5,
            0,
            0,
            3,
            0,
            0,
            pair(24, 22),
            pair(20, 1),
            pair(16, 2),
            2,
            100,
            4,
        ];
        assert_eq!(words, expected);
    }

    #[test]
    fn every_change_has_its_attribute() {
        // IFLA_VF_*, bytes of the structure, and what follows the function's number.
        let cases: [(Change, u16, usize, &[u8]); 6] = [
            (Change::Mac([2, 0, 0, 0, 0, 9]), 1, 36, &[2, 0, 0, 0, 0, 9]),
            (Change::SpoofCheck(true), 4, 8, &[1]),
            (Change::Link(LinkState::Off), 5, 8, &[2]),
            (Change::Link(LinkState::On), 5, 8, &[1]),
            (Change::Rate(1000), 6, 12, &[0, 0, 0, 0, 0xe8, 3]),
            (Change::Trust(true), 9, 8, &[1]),
        ];
        for (change, kind, len, value) in cases {
            let bytes = request(1, 1, 7, change);
            assert_eq!(bytes[42..44], kind.to_ne_bytes(), "{change}");
            assert_eq!(bytes[40..42], (len as u16 + 4).to_ne_bytes(), "{change}");
            assert_eq!(bytes[44..48], 7u32.to_ne_bytes(), "{change}");
            assert_eq!(&bytes[48..48 + value.len()], value, "{change}");
        }
    }

    #[test]
    fn the_kernel_answers() {
        // No interface has this number; the loopback has no virtual functions, which only root is told.
        let mut socket = Socket::open().unwrap();
        let error = socket.set(0x7fff_fff0, 0, &Change::Trust(true)).unwrap_err();
        let expected = [libc::ENODEV, libc::EPERM];
        assert!(expected.contains(&error.raw_os_error().unwrap()), "{error}");
        let error = socket.set(1, 0, &Change::Trust(true)).unwrap_err();
        assert!(!advice(&error).is_empty(), "{error}");
    }
}
