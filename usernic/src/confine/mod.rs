//! Least privilege inside: what a program on this library gives up once it has what it needs.
//!
//! | step | when | what is left |
//! |---|---|---|
//! | [`Files`] (Landlock) | before ports are opened, in the first thread | reading the system's files; the folders of the ports' sockets; what is named |
//! | [`calls`] (seccomp) | when they are open | packets, reconnection, threads, Unix sockets, files by the rule above |
//!
//! After both there is no way to run another program, to open another file, to reach another network, or to have memory
//! that is executable. Ports still reconnect. Neither step needs a privilege, and neither can be undone.
//!
//! ```no_run
//! use usernic::confine::{Files, calls};
//! use usernic::spec::PortSpec;
//!
//! let spec: PortSpec = "virtio-user,path=/run/usernic/a/port.sock".parse()?;
//! let files = Files::new().port(&spec).apply()?;
//! let port = usernic::Port::open_spec(spec)?;
//! calls()?;
//! println!("files: {files}, system calls: a list");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod calls;
mod filter;

use std::fmt;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetStatus, Scope, path_beneath_rules,
};

pub use calls::{RUNNING, RUNNING_OLD, STARTING};
pub use filter::calls;

use crate::memory::mounts::huge_mounts;
use crate::needs::{Memory, Needs};
use crate::spec::PortSpec;

/// The newest rules that are asked for; an older kernel enforces those that it knows. With a later one, rules would be
/// needed for sockets that are connected to.
const RULES: ABI = ABI::V6;

/// Why a program could not be confined. It goes on as it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The kernel, or a container's filter, refuses Landlock's rules.
    #[error("Landlock: {0}: a container's seccomp profile may forbid it (landlock_create_ruleset and the others)")]
    Files(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The kernel, or a container's filter, refuses the filter.
    #[error("seccomp: {0}: a container's seccomp profile may forbid it (seccomp, prctl)")]
    Calls(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// How much of [`Files`] the kernel enforces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Enforced {
    /// All that was asked for.
    Fully,
    /// What it knows.
    Partly,
    /// Nothing: it has no Landlock.
    No,
}

impl fmt::Display for Enforced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Enforced::Fully => "confined by Landlock",
            Enforced::Partly => "confined by Landlock as far as this kernel knows it",
            Enforced::No => "not confined, this kernel has no Landlock",
        })
    }
}

/// Which files a program may open from now on.
#[derive(Clone, Debug)]
pub struct Files {
    read: Vec<PathBuf>,
    write: Vec<PathBuf>,
}

impl Default for Files {
    fn default() -> Self {
        Self::new()
    }
}

/// What the library, the C library and the standard library read while they run: limits, topology, devices, time zones.
const SYSTEM: [&str; 5] = ["/proc", "/sys", "/dev", "/etc", "/usr/share/zoneinfo"];

impl Files {
    /// The files of the system, to read.
    pub fn new() -> Self {
        Files {
            read: SYSTEM.iter().map(PathBuf::from).collect(),
            write: vec!["/dev/null".into(), "/dev/vfio".into(), "/dev/iommu".into()],
        }
    }

    /// What this port needs: its socket's folder if it listens, its mount of hugetlbfs. A spec that cannot be opened
    /// needs nothing.
    #[must_use]
    pub fn port(self, spec: &PortSpec) -> Self {
        self.port_below(Path::new("/"), spec)
    }

    fn port_below(mut self, root: &Path, spec: &PortSpec) -> Self {
        if let Ok(needs) = Needs::of(spec)
            && needs.socket.listens
        {
            self.write.push(or_here(&needs.socket.folder));
        }
        // A virtual function's port has memory, too.
        if let Ok(memory) = Memory::of(spec)
            && memory.huge
        {
            match memory.mount {
                Some(mount) => self.write.push(mount),
                // Any mount may be chosen.
                None => self
                    .write
                    .extend(huge_mounts(root, memory.bytes).into_iter().map(|m| m.path)),
            }
        }
        self
    }

    /// A file or a folder, to read.
    #[must_use]
    pub fn read(mut self, path: impl Into<PathBuf>) -> Self {
        self.read.push(path.into());
        self
    }

    /// A file or a folder, to read, write, make and remove.
    #[must_use]
    pub fn write(mut self, path: impl Into<PathBuf>) -> Self {
        self.write.push(path.into());
        self
    }

    /// The folder of a file that is to be made.
    #[must_use]
    pub fn create(self, path: &Path) -> Self {
        let folder = or_here(path.parent().unwrap_or(path));
        self.write(folder)
    }

    /// From now on this thread, and those that it starts, open nothing else. Paths that are not there are left out. Signals
    /// and abstract sockets of others, and TCP, are out of reach, too.
    ///
    /// # Errors
    /// [`Error::Files`]; a kernel without Landlock is no error, but [`Enforced::No`].
    pub fn apply(&self) -> Result<Enforced, Error> {
        let all = AccessFs::from_all(RULES);
        // Not to run anything.
        let read: BitFlags<AccessFs> = AccessFs::from_read(RULES) & !BitFlags::from(AccessFs::Execute);
        let write = all & !BitFlags::from(AccessFs::Execute);
        let status = (|| {
            Ruleset::default()
                .set_compatibility(CompatLevel::BestEffort)
                .handle_access(all)?
                .handle_access(AccessNet::from_all(RULES))?
                .scope(Scope::from_all(RULES))?
                .create()?
                .add_rules(path_beneath_rules(&self.read, read))?
                .add_rules(path_beneath_rules(&self.write, write))?
                .restrict_self()
        })()
        .map_err(|error: landlock::RulesetError| Error::Files(error.into()))?;
        Ok(match status.ruleset {
            RulesetStatus::FullyEnforced => Enforced::Fully,
            RulesetStatus::PartiallyEnforced => Enforced::Partly,
            RulesetStatus::NotEnforced => Enforced::No,
        })
    }
}

/// The folder of a bare name is that which the program is in.
fn or_here(folder: &Path) -> PathBuf {
    if folder.as_os_str().is_empty() {
        PathBuf::from(".")
    } else {
        folder.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mount_that_open_may_choose_is_let_in() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("proc/self")).unwrap();
        let info = "31 20 0:27 / /dev/hugepages rw - hugetlbfs none rw,pagesize=2M,size=2M\n\
                    32 20 0:28 / /mnt/huge rw - hugetlbfs none rw,pagesize=2M\n\
                    33 20 0:29 / /mnt/ro ro - hugetlbfs none rw,pagesize=2M\n";
        std::fs::write(root.path().join("proc/self/mountinfo"), info).unwrap();
        let before = Files::new().write.len();
        let written = |spec: &str| -> Vec<PathBuf> {
            let files = Files::new().port_below(root.path(), &spec.parse().unwrap());
            files.write[before..].to_vec()
        };
        let both = ["/dev/hugepages", "/mnt/huge"].map(PathBuf::from);
        for spec in ["memory=hugetlbfs", "memory=auto"] {
            assert_eq!(written(&format!("virtio-user,path=/r/s,{spec}")), both, "{spec}");
            assert_eq!(written(&format!("vf,{spec}")), both, "{spec}");
        }
        assert_eq!(
            written("virtio-user,path=/r/s,huge_dir=/mnt/huge"),
            [PathBuf::from("/mnt/huge")]
        );
        assert_eq!(written("virtio-user,path=/r/s,memory=memfd"), Vec::<PathBuf>::new());
        assert_eq!(written("vhost,path=/r/s"), [PathBuf::from("/r")]);
    }
}
