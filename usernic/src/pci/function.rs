//! What sysfs tells of a PCI function. `Documentation/ABI/testing/sysfs-bus-pci`.

use iova::vfio::Host;

use super::{Address, Error};

/// A PCI function as the kernel sees it at the moment.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Function {
    /// Where it is.
    pub address: Address,
    /// Vendor id, 0x8086 for Intel.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Class code: class, subclass, interface.
    pub class: u32,
    /// The driver that has it.
    pub driver: Option<String>,
    /// Its IOMMU group.
    pub iommu_group: Option<u32>,
    /// Whether that is a group of noiommu mode.
    pub noiommu: bool,
    /// Its NUMA node.
    pub numa_node: Option<u32>,
    /// Its network interfaces in this namespace.
    pub interfaces: Vec<String>,
    /// The physical function, if it is a virtual one.
    pub physical: Option<Address>,
    /// Its virtual functions, by their numbers, if it is a physical one.
    pub virtuals: Vec<Address>,
    /// How many virtual functions it can have, if it can have any.
    pub total_vfs: Option<u16>,
}

/// Base class 02: network controllers.
const NETWORK: u32 = 0x02;
/// Drivers that hand a function to user space, without and with an IOMMU.
const USER_SPACE: [&str; 3] = ["vfio-pci", "uio_pci_generic", "igb_uio"];

/// The device ids that the driver of this project knows, and the functions they belong to: 82599, X540 and X550 datasheets,
/// "PCI configuration space".
const NAMES: [(u16, &str); 14] = [
    (0x10ed, "82599 VF"),
    (0x152e, "82599 VF (Hyper-V)"),
    (0x1515, "X540 VF"),
    (0x1530, "X540 VF (Hyper-V)"),
    (0x1565, "X550 VF"),
    (0x1564, "X550 VF (Hyper-V)"),
    (0x15a8, "X552 VF"),
    (0x15a9, "X552 VF (Hyper-V)"),
    (0x15c5, "X553 VF"),
    (0x15b4, "X553 VF (Hyper-V)"),
    (0x57ad, "E610 VF"),
    (0x10fb, "82599"),
    (0x1528, "X540"),
    (0x1563, "X550"),
];

impl Function {
    /// Reads a function.
    ///
    /// # Errors
    /// [`Error::NoDevice`].
    pub fn read(host: &Host, address: Address) -> Result<Self, Error> {
        let folder = address.sysfs();
        if !host.exists(&folder) {
            return Err(Error::NoDevice { address });
        }
        let hex = |file: &str| {
            let text = host.read(format!("{folder}/{file}")).unwrap_or_default();
            u32::from_str_radix(text.trim().trim_start_matches("0x"), 16).unwrap_or(0)
        };
        let number = |file: &str| host.read(format!("{folder}/{file}")).ok()?.trim().parse::<i64>().ok();
        let linked = |link: &str| host.link(format!("{folder}/{link}"))?.parse::<Address>().ok();
        let iommu_group = host.iommu_group(&folder);
        let mut virtuals: Vec<(u32, Address)> = host
            .names(&folder)
            .iter()
            .filter_map(|name| Some((name.strip_prefix("virtfn")?.parse().ok()?, linked(name)?)))
            .collect();
        virtuals.sort();
        Ok(Function {
            address,
            vendor: hex("vendor") as u16,
            device: hex("device") as u16,
            class: hex("class"),
            driver: host.link(format!("{folder}/driver")),
            iommu_group,
            noiommu: iommu_group.is_some_and(|group| host.is_noiommu(group)),
            // -1: there is no such thing here.
            numa_node: number("numa_node").and_then(|n| u32::try_from(n).ok()),
            interfaces: host.names(format!("{folder}/net")),
            physical: linked("physfn"),
            virtuals: virtuals.into_iter().map(|(_, address)| address).collect(),
            total_vfs: number("sriov_totalvfs").and_then(|n| u16::try_from(n).ok()),
        })
    }

    /// All functions, by their addresses.
    pub fn list(host: &Host) -> Vec<Self> {
        let addresses = host
            .names("sys/bus/pci/devices")
            .into_iter()
            .filter_map(|n| n.parse().ok());
        let mut all: Vec<_> = addresses.filter_map(|a| Self::read(host, a).ok()).collect();
        all.sort_by_key(|f| f.address);
        all
    }

    /// The function behind an address, or behind a network interface.
    ///
    /// # Errors
    /// [`Error::NoDevice`], [`Error::NoInterface`].
    pub fn named(host: &Host, name: &str) -> Result<Self, Error> {
        if let Ok(address) = name.parse() {
            return Self::read(host, address);
        }
        // A name is one component: it must not lead elsewhere.
        let device = Some(name)
            .filter(|name| !name.contains('/'))
            .and_then(|name| host.link(format!("sys/class/net/{name}/device"))?.parse().ok());
        match device {
            Some(address) => Self::read(host, address),
            None => Err(Error::NoInterface { name: name.to_owned() }),
        }
    }

    /// Whether it is a network controller.
    pub fn is_network(&self) -> bool {
        self.class >> 16 == NETWORK
    }

    /// Whether a process of this project could drive it: a virtual function of an 82599, X540, X550 or a relative.
    pub fn is_supported(&self) -> bool {
        self.name().is_some_and(|name| name.contains("VF"))
    }

    /// What it is, if it is one of those that this project is about.
    pub fn name(&self) -> Option<&'static str> {
        let known = |(id, _): &&(u16, &str)| self.vendor == 0x8086 && *id == self.device;
        NAMES.iter().find(known).map(|(_, name)| *name)
    }

    /// Whether its driver hands it to user space.
    pub fn is_given_away(&self) -> bool {
        let driver = self.driver.as_deref();
        driver.is_some_and(|d| USER_SPACE.contains(&d) || d.ends_with("-vfio-pci") || d.ends_with("_vfio_pci"))
    }

    /// The nodes in `/dev` through which a process gets it, once it is bound to vfio-pci: of its group, and its own.
    pub fn nodes(&self, host: &Host) -> Vec<String> {
        let mut nodes = Vec::new();
        if let Some(group) = self.iommu_group {
            nodes.push(host.group_node(group));
        }
        let own = host.names(format!("{}/vfio-dev", self.address.sysfs()));
        nodes.extend(own.iter().map(|name| format!("/dev/vfio/devices/{name}")));
        nodes.retain(|node| host.exists(node));
        nodes
    }
}
