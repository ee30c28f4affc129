//! Who would miss a function: the machine's routes, a bond, a bridge, a process.

use std::fmt;

use iova::vfio::Host;

use super::Function;

/// Why a network interface is needed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum InterfaceUse {
    /// A default route goes through it, or through one on top of it.
    DefaultRoute {
        /// The interface.
        interface: String,
        /// The one that the route names, if it is another.
        through: Option<String>,
    },
    /// It is a port of a bond or a bridge.
    Port {
        /// The interface.
        interface: String,
        /// The bond or bridge.
        master: String,
    },
}

impl fmt::Display for InterfaceUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            InterfaceUse::DefaultRoute {
                interface,
                through: None,
            } => write!(f, "the default route goes through its interface {interface}"),
            InterfaceUse::DefaultRoute {
                interface,
                through: Some(through),
            } => write!(
                f,
                "the default route goes through {through}, which is on its interface {interface}"
            ),
            InterfaceUse::Port { interface, master } => write!(f, "its interface {interface} is a port of {master}"),
        }
    }
}

/// Why one of a function's interfaces is needed, if one is.
pub fn interface_use(host: &Host, function: &Function) -> Option<InterfaceUse> {
    let routes = default_routes(host);
    function.interfaces.iter().find_map(|interface| {
        let folder = format!("sys/class/net/{interface}");
        let names = host.names(&folder);
        // VLANs and the like on top of it.
        let uppers = names.iter().filter_map(|name| name.strip_prefix("upper_"));
        let through = uppers
            .chain([interface.as_str()])
            .find(|name| routes.iter().any(|r| r == name));
        match (through, host.link(format!("{folder}/master"))) {
            (Some(through), _) => Some(InterfaceUse::DefaultRoute {
                interface: interface.clone(),
                through: (through != interface).then(|| through.to_owned()),
            }),
            (None, Some(master)) => Some(InterfaceUse::Port {
                interface: interface.clone(),
                master,
            }),
            (None, None) => None,
        }
    })
}

/// The interfaces of default routes, from `/proc/net`: the calling process's network namespace, the main table.
fn default_routes(host: &Host) -> Vec<String> {
    let mut interfaces = Vec::new();
    // Iface Destination Gateway Flags RefCnt Use Metric Mask ...
    for line in host.read("proc/net/route").unwrap_or_default().lines().skip(1) {
        let fields: Vec<_> = line.split_whitespace().collect();
        if fields.get(1) == Some(&"00000000") && fields.get(7) == Some(&"00000000") {
            interfaces.push(fields[0].to_owned());
        }
    }
    // Destination and its prefix length, source and its prefix length, ..., interface.
    for line in host.read("proc/net/ipv6_route").unwrap_or_default().lines() {
        let fields: Vec<_> = line.split_whitespace().collect();
        if let [destination, "00", .., interface] = fields[..]
            && destination.bytes().all(|b| b == b'0')
        {
            interfaces.push(interface.to_owned());
        }
    }
    interfaces
}

/// A process that has a function open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Its id.
    pub pid: u32,
    /// Its name.
    pub name: String,
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (process {})", self.name, self.pid)
    }
}

/// The processes that have a function open through VFIO: those that can be seen, which for root are all.
pub fn users(host: &Host, function: &Function) -> Vec<User> {
    let nodes = function.nodes(host);
    let opened = |pid: u32| {
        let folder = format!("proc/{pid}/fd");
        host.names(&folder).iter().any(|fd| {
            let to = std::fs::read_link(host.path(format!("{folder}/{fd}")));
            to.is_ok_and(|to| nodes.iter().any(|node| to.as_os_str() == node.as_str()))
        })
    };
    let pids = host
        .names("proc")
        .into_iter()
        .filter_map(|name| name.parse::<u32>().ok());
    pids.filter(|pid| !nodes.is_empty() && opened(*pid))
        .map(|pid| User {
            pid,
            name: host
                .read(format!("proc/{pid}/comm"))
                .unwrap_or_default()
                .trim()
                .to_owned(),
        })
        .collect()
}
