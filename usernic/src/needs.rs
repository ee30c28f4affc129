//! What a port needs of the container that it is in, and nothing more.
//!
//! ```
//! use usernic::needs::Needs;
//!
//! let needs = Needs::of(&"virtio-user,path=/run/usernic/a/port.sock".parse()?)?;
//! assert_eq!(needs.socket.folder, std::path::Path::new("/run/usernic/a"));
//! assert!(!needs.socket.listens);
//! assert_eq!(needs.memory.in_pages_of(2 << 20), 2 << 20);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::path::PathBuf;

use crate::error::Error;
use crate::memory::Automatic;
use crate::pci::{Error as PciError, Function};
use crate::port::segment_len;
use crate::spec::{Kind, MemoryKind, PortSpec};
use crate::vfio::Host;
use crate::vhost_user::MAX_PATH;

/// What a port needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Needs {
    /// Its socket.
    pub socket: Socket,
    /// Its packet memory.
    pub memory: Memory,
}

/// Where a port meets its other side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Socket {
    /// The folder that holds the socket. All of it is needed: a socket that its listener makes anew, after a restart, is
    /// another file.
    pub folder: PathBuf,
    /// The port makes the socket, so that it must be able to write to the folder.
    pub listens: bool,
}

/// Memory for rings and packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Bytes.
    pub bytes: usize,
    /// The pages it is made of, by the spec.
    pub kind: MemoryKind,
    /// The mount of a hugetlbfs that the spec names. With [`MemoryKind::Hugetlbfs`] and none named, any mount will do.
    pub mount: Option<PathBuf>,
    /// Whether huge pages are of use.
    pub huge: bool,
}

impl Needs {
    /// What the port of this spec needs.
    ///
    /// # Errors
    /// Those of a spec that [`Port::open`](crate::Port::open) would refuse, whatever the machine: sizes that do not fit,
    /// [`Error::VhostUser`] for a path that is too long or is no path of a socket.
    pub fn of(spec: &PortSpec) -> Result<Self, Error> {
        let len = spec.path.as_os_str().len();
        if len > MAX_PATH {
            let path = spec.path.clone();
            return Err(crate::vhost_user::Error::PathTooLong { path, len }.into());
        }
        let folder = spec.path.parent().map(PathBuf::from).unwrap_or_default();
        if spec.kind == Kind::Vf {
            return Err(Error::NotGranted {
                why: "a vf port has no socket: ask for the needs of its function instead",
            });
        }
        let memory = Memory::of(spec)?;
        let listens = (spec.kind == Kind::VirtioUser) == spec.reversed;
        Ok(Needs {
            socket: Socket { folder, listens },
            memory,
        })
    }
}

impl Memory {
    /// What the port of this spec needs, whatever its kind.
    ///
    /// # Errors
    /// Those of [`Needs::of`] that are about memory.
    pub fn of(spec: &PortSpec) -> Result<Self, Error> {
        // The front-end of a vhost port brings rings and shared memory; the port's own is private.
        let (kind, mount) = match spec.kind {
            Kind::VirtioUser | Kind::Vf => (spec.memory, spec.huge_dir.clone()),
            Kind::Vhost => (MemoryKind::Memfd, None),
        };
        if spec.kind != Kind::Vhost {
            Automatic::from_spec(spec).check()?;
        }
        Ok(Memory {
            bytes: segment_len(spec)?,
            kind,
            mount,
            huge: kind != MemoryKind::Memfd,
        })
    }

    /// Whether it must be in a mount of hugetlbfs.
    pub fn is_mounted(&self) -> bool {
        self.kind == MemoryKind::Hugetlbfs || self.mount.is_some()
    }

    /// Its size in whole pages of so many bytes, 0 being taken for 1.
    pub fn in_pages_of(&self, page: usize) -> usize {
        self.bytes.next_multiple_of(page.max(1))
    }
}

/// The nodes in `/dev` through which a container gets a virtual function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nodes {
    /// The function.
    pub function: Function,
    /// Paths: the container of groups, and the function's group.
    pub paths: Vec<PathBuf>,
}

impl Nodes {
    /// Those of a function that is bound to vfio-pci.
    ///
    /// # Errors
    /// [`Needless::NotBound`] and [`Needless::NoIommu`]; [`Needless::Pci`] if there is no such function.
    pub fn of(host: &Host, name: &str) -> Result<Self, Needless> {
        let function = Function::named(host, name)?;
        let address = function.address.to_string();
        if !function.is_given_away() {
            let driver = function.driver.clone().unwrap_or_else(|| "no driver".into());
            return Err(Needless::NotBound { address, driver });
        }
        if function.noiommu {
            return Err(Needless::NoIommu { address });
        }
        let group = function.iommu_group.ok_or_else(|| Needless::NoIommu {
            address: address.clone(),
        })?;
        Ok(Nodes {
            function,
            paths: vec!["/dev/vfio/vfio".into(), host.group_node(group).into()],
        })
    }
}

/// Why a function cannot be given to a container without privileges.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Needless {
    /// Its driver is another.
    #[error("{address} is with {driver}, not with vfio-pci: usernic bind {address}")]
    NotBound {
        /// The function.
        address: String,
        /// The driver.
        driver: String,
    },
    /// There is nothing that keeps the device from all of memory.
    #[error(
        "{address} has no IOMMU group: without an IOMMU a device reaches all memory, and its process needs \
         CAP_SYS_RAWIO: switch the IOMMU on in firmware and kernel (intel_iommu=on)"
    )]
    NoIommu {
        /// The function.
        address: String,
    },
    /// It cannot be found.
    #[error(transparent)]
    Pci(#[from] PciError),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn needs(spec: &str) -> Needs {
        Needs::of(&spec.parse().unwrap()).unwrap()
    }

    #[test]
    fn who_makes_the_socket_writes_to_its_folder() {
        for (spec, listens) in [
            ("virtio-user,path=/r/s", false),
            ("virtio-user,path=/r/s,server=1", true),
            ("vhost,path=/r/s", true),
            ("vhost,path=/r/s,client=1", false),
        ] {
            let socket = needs(spec).socket;
            assert_eq!(
                (socket.folder.to_str(), socket.listens),
                (Some("/r"), listens),
                "{spec}"
            );
        }
    }

    #[test]
    fn memory_is_what_open_asks_for() {
        let memory = needs("virtio-user,path=/r/s,memory=memfd-huge").memory;
        assert!(memory.huge && memory.mount.is_none());
        assert_eq!(memory.in_pages_of(2 << 20), 2 << 20);
        assert_eq!(memory.in_pages_of(1 << 30), 1 << 30);
        let memory = needs("virtio-user,path=/r/s,memory=hugetlbfs,mem=6M").memory;
        assert!(memory.is_mounted() && memory.mount.is_none(), "any mount will do");
        assert_eq!(memory.bytes, 6 << 20);
        let memory = needs("virtio-user,path=/r/s,huge_dir=/mnt/huge").memory;
        assert_eq!(memory.mount, Some("/mnt/huge".into()));
        assert!(!needs("virtio-user,path=/r/s,memory=memfd").memory.huge);
        assert!(!needs("vhost,path=/r/s").memory.huge);
        let function = |spec: &str| Memory::of(&spec.parse().unwrap()).unwrap();
        assert!(function("vf,buffers=65536").bytes > 128 << 20);
        assert!(function("vf,buffers=64,queue_size=64").bytes < 1 << 20);
        assert_eq!(function("vf,huge_dir=/mnt/huge").mount, Some("/mnt/huge".into()));
    }

    #[test]
    fn what_open_would_refuse_is_refused() {
        let long = format!("virtio-user,path=/{}", "x".repeat(MAX_PATH));
        let error = Needs::of(&long.parse().unwrap()).unwrap_err().to_string();
        assert!(error.contains("108 bytes"), "{error}");
        let error = Needs::of(&"virtio-user,path=/s,mem=64K".parse().unwrap()).unwrap_err();
        assert!(matches!(error, Error::TooSmall { .. }), "{error}");
        let spec = "virtio-user,path=/s,memory=memfd,huge_dir=/dev/hugepages";
        let error = Needs::of(&spec.parse().unwrap()).unwrap_err();
        assert!(matches!(error, Error::Memory(_)), "{error}");
    }
}
