//! Releases of DPDK that are newer than this system's: Debian's packages of them, unpacked into the cache, with the loader
//! and the C library that they want.
//!
//! Debian's binary packages lack the headers that drivers are compiled with. They come from the source package of the same
//! version, or, where the mirror does not have that, from a repository of DPDK's that `USERNIC_DPDK_REPOSITORY` names.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use super::Program;
use crate::machine::apt::{Apt, Mirror};
use crate::machine::{Folder, cache_for, install, loader, locked, whole};
use crate::plugin::sdk::{self, Dpdk};

/// A release of Debian's that has another DPDK.
pub struct Newer {
    folder: Folder,
}

const SIZE: &str = "115 MB of downloads, 90 MB on disk";

/// They, by the DPDK that they had first.
pub const RELEASES: [Newer; 2] = [
    Newer {
        folder: Folder {
            name: "trixie",
            what: "DPDK of Debian trixie (24.11)",
            size: SIZE,
        },
    },
    Newer {
        folder: Folder {
            name: "sid",
            what: "DPDK of Debian sid (25.11 or newer)",
            size: SIZE,
        },
    },
];

/// Drivers that testpmd loads, and needs for the plugin's ports.
const DRIVERS: [&str; 2] = ["librte_bus_vdev.so.", "librte_mempool_ring.so."];

/// What is kept of the packages, below `usr`.
const KEPT: [&str; 3] = ["bin", "lib", "include"];

impl Newer {
    /// Debian's name of it.
    pub fn name(&self) -> &'static str {
        self.folder.name
    }

    /// For messages.
    pub fn what(&self) -> &'static str {
        self.folder.what
    }

    /// What was fetched before.
    pub fn find(&self) -> Result<Unpacked> {
        Unpacked::new(whole(&cache_for("dpdk")?, &self.folder)?)
    }

    /// Gets it, if it is not there.
    pub fn fetch(&self) -> Result<Unpacked> {
        if let Ok(found) = self.find() {
            return Ok(found);
        }
        ensure!(cfg!(target_arch = "x86_64"), "these packages are for x86_64");
        let cache = cache_for("dpdk")?;
        let _lock = locked(&cache)?;
        let mirror = Mirror::of_this_machine()?;
        let suite = self.folder.name;
        install(&cache, &self.folder, |into| {
            let apt = Apt::new(&mirror, &[suite])?;
            let version = apt.version("libdpdk-dev")?;
            // First, since a mirror may lack it.
            let source = tempfile::Builder::new().prefix("xt-dpdk").tempdir()?;
            let headers = source.path().join("include");
            if let Err(missing) = sdk::unpack_source(&mirror, &[suite], &version, source.path()) {
                sdk::headers_of_repository(&version, &headers)
                    .with_context(|| format!("the driver headers of DPDK {version} are not to be had: {missing:#}"))?;
            }
            let libraries = apt.depends("libdpdk-dev")?;
            let pool = libraries.iter().find(|name| name.starts_with("librte-mempool-ring"));
            apt.download(
                &[
                    "dpdk-dev",
                    pool.context("libdpdk-dev depends on no librte-mempool-ring")?,
                ],
                None,
            )?;
            apt.download_alone("libdpdk-dev")?;
            let packages = apt.unpack(into)?;
            for header in fs::read_dir(&headers)?.flatten() {
                fs::copy(header.path(), into.join("usr/include/dpdk").join(header.file_name()))?;
            }
            prune(into)?;
            Unpacked::new(into.to_owned())?;
            Ok(packages)
        })?;
        self.find()
    }
}

/// Removes what testpmd and a build of the plugin do without: documents, other programs, static libraries, interpreters.
fn prune(root: &Path) -> Result<()> {
    let remove = |path: &Path| {
        if path.is_dir() && !path.is_symlink() {
            fs::remove_dir_all(path)
        } else {
            fs::remove_file(path)
        }
    };
    for (folder, keep) in [
        (root.to_owned(), &["usr"][..]),
        (root.join("usr"), &KEPT),
        (root.join("usr/lib"), &["x86_64-linux-gnu"]),
    ] {
        for entry in fs::read_dir(folder)?.flatten() {
            if !keep.iter().any(|kept| entry.file_name() == **kept) {
                remove(&entry.path())?;
            }
        }
    }
    for entry in fs::read_dir(root.join("usr/bin"))?.flatten() {
        if entry.file_name() != "dpdk-testpmd" {
            remove(&entry.path())?;
        }
    }
    for entry in fs::read_dir(root.join("usr/lib/x86_64-linux-gnu"))?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.contains(".so") && name != "dpdk" && name != "pkgconfig" {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

/// An unpacked DPDK.
pub struct Unpacked {
    /// To build the plugin against.
    pub dpdk: Dpdk,
    /// To run it in.
    pub testpmd: Program,
    /// Where it is.
    pub root: PathBuf,
}

impl Unpacked {
    fn new(root: PathBuf) -> Result<Self> {
        let start = loader(&root)?;
        let libraries = root.join("usr/lib/x86_64-linux-gnu");
        // One folder, named by the ABI: pmds-25.0.
        let drivers = fs::read_dir(libraries.join("dpdk"))?.flatten().next();
        let drivers = drivers.context("DPDK has no folder of drivers")?.path();
        let mut names = Vec::new();
        for driver in DRIVERS {
            let there = fs::read_dir(&drivers)?.flatten();
            let names_there = there.map(|entry| entry.file_name().to_string_lossy().into_owned());
            let name = names_there.filter(|name| name.starts_with(driver)).min();
            names.push(name.with_context(|| format!("no {driver} in {}", drivers.display()))?);
        }
        let path = root.join("usr/bin/dpdk-testpmd");
        ensure!(path.is_file(), "no {}", path.display());
        Ok(Unpacked {
            dpdk: Dpdk::find(Some(&root), false)?,
            testpmd: Program {
                path,
                libraries: vec![libraries, drivers],
                loader: Some(PathBuf::from(&start[0])),
                drivers: names,
            },
            root,
        })
    }
}
