//! A part of the last-level cache for polling threads alone: Intel's cache allocation and its kin, through resctrl.
//!
//! A group gets the upper ways of the caches that its CPUs have, all others keep the lower ones.
//! `Documentation/arch/x86/resctrl.rst`.

use std::fs;
use std::io;
use std::path::PathBuf;

use crate::cpu;
use crate::vfio::Host;

/// Where the file system is mounted.
const MOUNT: &str = "sys/fs/resctrl";

/// A group and what is left to the rest.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Partition {
    /// The group's name, a folder.
    pub group: String,
    /// Its CPUs.
    pub cpus: Vec<u32>,
    /// Its `schemata`: the ways, a mask for each cache.
    pub schemata: String,
    /// The `schemata` of all others.
    pub rest: String,
}

/// Why there is no such group.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Not mounted, or not there.
    #[error(
        "there is no cache allocation at /{MOUNT}: mount -t resctrl resctrl /{MOUNT}; if that fails, the processor or the \
         virtual machine has none"
    )]
    Absent,
    /// It cannot be divided so.
    #[error("{ways} ways: this cache has {total}, a group at least {least}, and one must be left to all others")]
    Ways {
        /// Asked for.
        ways: u32,
        /// Of the cache.
        total: u32,
        /// The least of a group.
        least: u32,
    },
    /// A CPU without such a cache.
    #[error("CPU {cpu} has no last-level cache that can be divided")]
    NoCache {
        /// The CPU.
        cpu: u32,
    },
    /// No CPUs.
    #[error("name the CPUs of the polling threads: --cpu 2,3")]
    NoCpus,
    /// The group is there.
    #[error("there is a group {group} already: usernic cat --undo takes it away")]
    Exists {
        /// Its name.
        group: String,
    },
    /// A file could not be written.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl Partition {
    /// The upper `ways` ways of the caches of `cpus`.
    ///
    /// # Errors
    /// [`Error::Absent`], [`Error::NoCpus`], [`Error::Ways`], [`Error::NoCache`].
    pub fn plan(host: &Host, group: &str, cpus: &[u32], ways: u32) -> Result<Self, Error> {
        let number = |file: &str, radix: u32| {
            let text = host.read(format!("{MOUNT}/info/L3/{file}")).ok()?;
            u64::from_str_radix(text.trim(), radix).ok()
        };
        let (Some(mask), Some(least)) = (number("cbm_mask", 16), number("min_cbm_bits", 10)) else {
            return Err(Error::Absent);
        };
        if cpus.is_empty() {
            return Err(Error::NoCpus);
        }
        let (total, least) = (mask.count_ones(), least as u32);
        if ways < least.max(1) || ways.saturating_add(least.max(1)) > total {
            return Err(Error::Ways { ways, total, least });
        }
        let lower = mask & ((1 << (total - ways)) - 1);
        let mut own = Vec::new();
        for &cpu in cpus {
            let id = host
                .read(format!("sys/devices/system/cpu/cpu{cpu}/cache/index3/id"))
                .ok();
            let id: Option<u32> = id.and_then(|text| text.trim().parse().ok());
            own.push(id.ok_or(Error::NoCache { cpu })?);
        }
        let all: Vec<u32> = host
            .read(format!("{MOUNT}/schemata"))
            .unwrap_or_default()
            .lines()
            .find_map(|line| line.trim().strip_prefix("L3:"))
            .into_iter()
            .flat_map(|line| line.split(';'))
            .filter_map(|part| part.split_once('=')?.0.trim().parse().ok())
            .collect();
        let line = |of: &dyn Fn(u32) -> u64| {
            let parts: Vec<String> = all.iter().map(|id| format!("{id}={:x}", of(*id))).collect();
            format!("L3:{}", parts.join(";"))
        };
        Ok(Partition {
            group: group.to_owned(),
            cpus: cpus.to_vec(),
            // In caches of other CPUs a group needs some ways, too, and uses none.
            schemata: line(&|id| if own.contains(&id) { mask & !lower } else { mask }),
            rest: line(&|id| if own.contains(&id) { lower } else { mask }),
        })
    }

    /// The commands that do the same.
    pub fn commands(&self) -> Vec<String> {
        let group = &self.group;
        vec![
            format!("mkdir /{MOUNT}/{group}"),
            format!("echo '{}' > /{MOUNT}/{group}/schemata", self.schemata),
            format!("echo {} > /{MOUNT}/{group}/cpus_list", cpu::format_list(&self.cpus)),
            format!("echo '{}' > /{MOUNT}/schemata", self.rest),
        ]
    }

    /// Makes the group. After an error it is gone again.
    ///
    /// # Errors
    /// [`Error::Exists`], [`Error::File`].
    pub fn apply(&self, host: &Host) -> Result<(), Error> {
        let folder = host.path(format!("{MOUNT}/{}", self.group));
        match fs::create_dir(&folder) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(Error::Exists {
                    group: self.group.clone(),
                });
            }
            Err(source) => return Err(Error::File { path: folder, source }),
        }
        let written = write(folder.join("schemata"), &self.schemata)
            .and_then(|()| write(folder.join("cpus_list"), &cpu::format_list(&self.cpus)))
            .and_then(|()| write(host.path(format!("{MOUNT}/schemata")), &self.rest));
        if written.is_err() {
            let _ = undo(host, &self.group);
        }
        written
    }
}

/// Takes a group away, and gives all ways to all.
///
/// # Errors
/// [`Error::Absent`], [`Error::File`].
pub fn undo(host: &Host, group: &str) -> Result<(), Error> {
    let Ok(mask) = host.read(format!("{MOUNT}/info/L3/cbm_mask")) else {
        return Err(Error::Absent);
    };
    let folder = host.path(format!("{MOUNT}/{group}"));
    // In resctrl the files of a group go with its folder, and cannot be removed one by one.
    let gone = fs::remove_dir(&folder).or_else(|error| match error.kind() {
        io::ErrorKind::NotFound => Ok(()),
        io::ErrorKind::DirectoryNotEmpty => fs::remove_dir_all(&folder),
        _ => Err(error),
    });
    gone.map_err(|source| Error::File { path: folder, source })?;
    let schemata = host.read(format!("{MOUNT}/schemata")).unwrap_or_default();
    let line = schemata.lines().find_map(|line| line.trim().strip_prefix("L3:"));
    let parts: Vec<String> = line
        .into_iter()
        .flat_map(|line| line.split(';'))
        .filter_map(|part| Some(format!("{}={}", part.split_once('=')?.0.trim(), mask.trim())))
        .collect();
    write(
        host.path(format!("{MOUNT}/schemata")),
        &format!("L3:{}", parts.join(";")),
    )
}

fn write(path: PathBuf, text: &str) -> Result<(), Error> {
    fs::write(&path, format!("{text}\n")).map_err(|source| Error::File { path, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two caches of eleven ways, CPUs 0 and 1 on the first, 2 on the second.
    fn host() -> (tempfile::TempDir, Host) {
        let root = tempfile::tempdir().unwrap();
        let file = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        file("sys/fs/resctrl/info/L3/cbm_mask", "7ff\n");
        file("sys/fs/resctrl/info/L3/min_cbm_bits", "1\n");
        file("sys/fs/resctrl/schemata", "    MB:0=100;1=100\n    L3:0=7ff;1=7ff\n");
        for (cpu, id) in [(0, 0), (1, 0), (2, 1)] {
            file(
                &format!("sys/devices/system/cpu/cpu{cpu}/cache/index3/id"),
                &format!("{id}\n"),
            );
        }
        let host = Host::new(root.path(), crate::vfio::Kernel);
        (root, host)
    }

    #[test]
    fn a_group_gets_its_ways_and_gives_them_back() {
        let (root, host) = host();
        let partition = Partition::plan(&host, "usernic", &[0, 1], 3).unwrap();
        assert_eq!(partition.schemata, "L3:0=700;1=7ff");
        assert_eq!(partition.rest, "L3:0=ff;1=7ff");
        partition.apply(&host).unwrap();
        let read = |file: &str| fs::read_to_string(root.path().join("sys/fs/resctrl").join(file)).unwrap();
        assert_eq!(read("usernic/schemata"), "L3:0=700;1=7ff\n");
        assert_eq!(read("usernic/cpus_list"), "0-1\n");
        assert_eq!(read("schemata"), "L3:0=ff;1=7ff\n");
        assert!(matches!(partition.apply(&host), Err(Error::Exists { .. })));
        undo(&host, "usernic").unwrap();
        assert_eq!(read("schemata"), "L3:0=7ff;1=7ff\n");
        assert!(!root.path().join("sys/fs/resctrl/usernic").exists());
    }

    #[test]
    fn what_cannot_be_divided_is_refused() {
        let (_root, host) = host();
        for ways in [0, 11, 12, u32::MAX] {
            assert!(matches!(
                Partition::plan(&host, "g", &[0], ways),
                Err(Error::Ways { total: 11, .. })
            ));
        }
        assert!(matches!(Partition::plan(&host, "g", &[], 1), Err(Error::NoCpus)));
        assert!(matches!(
            Partition::plan(&host, "g", &[9], 1),
            Err(Error::NoCache { cpu: 9 })
        ));
        let empty = tempfile::tempdir().unwrap();
        let host = Host::new(empty.path(), crate::vfio::Kernel);
        assert!(matches!(Partition::plan(&host, "g", &[0], 1), Err(Error::Absent)));
        assert!(matches!(undo(&host, "g"), Err(Error::Absent)));
    }
}
