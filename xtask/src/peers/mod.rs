//! The programs that nobody here wrote: where they are, how they are started and stopped.

pub mod engine;
pub mod install;
pub mod newer;
pub mod ovs;
pub mod testpmd;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::process;

/// Where programs for this architecture look for their loader.
pub const LOADER: &str = "/lib64/ld-linux-x86-64.so.2";

/// The paths in the output of the loader's `--list`: "libc.so.6 => /x/libc.so.6 (0x...)".
pub fn listed(list: &str) -> Vec<PathBuf> {
    list.lines()
        // What was named by its path has no arrow.
        .filter_map(|l| {
            l.split_once(" => ")
                .map_or(l.trim(), |(_, path)| path)
                .split(" (0x")
                .next()
        })
        .filter(|path| path.starts_with('/') && *path != LOADER)
        .map(PathBuf::from)
        .collect()
}

/// A program of another project, as found.
#[derive(Clone, Debug)]
pub struct Program {
    /// Its path.
    pub path: PathBuf,
    /// Folders for LD_LIBRARY_PATH, where it was unpacked rather than installed.
    pub libraries: Vec<PathBuf>,
    /// The loader that starts it, if the system's C library is too old for it.
    pub loader: Option<PathBuf>,
    /// Drivers of DPDK's that it needs, by their names, where it does not find them by itself.
    pub drivers: Vec<String>,
}

impl Program {
    /// A program that is installed, or that was unpacked with folders of libraries.
    pub fn new(path: PathBuf, libraries: Vec<PathBuf>) -> Self {
        Program {
            path,
            libraries,
            loader: None,
            drivers: Vec::new(),
        }
    }

    /// A command that starts it.
    pub fn command(&self) -> Command {
        let mut command = Command::new(self.loader.as_ref().unwrap_or(&self.path));
        self.apply(&mut command);
        command
    }

    /// A command that starts it with its standard output buffered by lines (testpmd's is not, on a pipe).
    pub fn line_buffered(&self) -> Command {
        let mut command = Command::new("stdbuf");
        command.arg("-oL").arg(self.loader.as_ref().unwrap_or(&self.path));
        self.apply(&mut command);
        command
    }

    /// The folder of DPDK's drivers, if it is not the one that the program has built in: for EAL's `-d`.
    pub fn plugins(&self) -> Option<&Path> {
        let is_pmds = |d: &&PathBuf| d.file_name().is_some_and(|n| n.to_string_lossy().starts_with("pmds"));
        self.libraries.iter().find(is_pmds).map(PathBuf::as_path)
    }

    /// The files of the shared libraries that it is linked with, and of `more` that it loads by name, as far as they are
    /// there.
    pub fn linked(&self, more: &[&str]) -> Result<Vec<PathBuf>> {
        let mut list = Command::new(LOADER);
        if !self.libraries.is_empty() {
            list.arg("--library-path").arg(std::env::join_paths(&self.libraries)?);
        }
        if !more.is_empty() {
            list.arg("--preload").arg(more.join(" "));
        }
        list.arg("--list").arg(&self.path);
        Ok(listed(&process::run("ld.so --list", list, Duration::from_secs(20))?))
    }

    fn apply(&self, command: &mut Command) {
        if self.loader.is_some() {
            let path = std::env::join_paths(&self.libraries).unwrap_or_default();
            command.arg("--library-path").arg(path).arg(&self.path);
        } else if !self.libraries.is_empty() {
            command.env(
                "LD_LIBRARY_PATH",
                std::env::join_paths(&self.libraries).unwrap_or_default(),
            );
        }
    }
}

/// What is there.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// DPDK's dpdk-testpmd.
    pub testpmd: Option<Program>,
    /// ovs-vswitchd, built with DPDK.
    pub vswitchd: Option<Program>,
    /// ovsdb-server.
    pub ovsdb_server: Option<Program>,
    /// ovsdb-tool.
    pub ovsdb_tool: Option<Program>,
    /// ovs-vsctl.
    pub vsctl: Option<Program>,
    /// ovs-ofctl.
    pub ofctl: Option<Program>,
    /// ovs-appctl.
    pub appctl: Option<Program>,
    /// The database schema of Open vSwitch.
    pub schema: Option<PathBuf>,
    /// The folder that packages were unpacked into, if any of the above is from there.
    pub unpacked: Option<PathBuf>,
}

impl Found {
    /// Looks in the system's folders, then in the folder that `cargo xtask peers` unpacks packages into.
    pub fn search(root: &Path) -> Self {
        let unpacked = Some(install::unpack_dir(root)).filter(|d| d.is_dir());
        let find = |names: &[&str]| -> Option<Program> {
            for base in [Some(Path::new("/")), unpacked.as_deref()].into_iter().flatten() {
                for name in names {
                    let path = base.join(name.trim_start_matches('/'));
                    if path.is_file() {
                        let libraries = if base == Path::new("/") {
                            Vec::new()
                        } else {
                            library_dirs(base)
                        };
                        return Some(Program::new(path, libraries));
                    }
                }
            }
            None
        };
        let vswitchd = find(&[
            "/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk",
            "/usr/lib/openvswitch-dpdk/ovs-vswitchd-dpdk",
        ]);
        let schema = "usr/share/openvswitch/vswitch.ovsschema";
        Found {
            testpmd: find(&["/usr/bin/dpdk-testpmd", "/usr/local/bin/dpdk-testpmd"]),
            vswitchd,
            ovsdb_server: find(&["/usr/sbin/ovsdb-server"]),
            ovsdb_tool: find(&["/usr/bin/ovsdb-tool"]),
            vsctl: find(&["/usr/bin/ovs-vsctl"]),
            ofctl: find(&["/usr/bin/ovs-ofctl"]),
            appctl: find(&["/usr/bin/ovs-appctl"]),
            schema: [Some(PathBuf::from("/")), unpacked.clone()]
                .into_iter()
                .flatten()
                .map(|base| base.join(schema))
                .find(|p| p.is_file()),
            unpacked,
        }
    }
}

fn library_dirs(base: &Path) -> Vec<PathBuf> {
    let mut dirs = Vec::new();
    for lib in ["usr/lib", "lib"] {
        for entry in std::fs::read_dir(base.join(lib)).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() && entry.file_name().to_string_lossy().contains("-linux-gnu") {
                // DPDK's drivers are in a folder of their own below.
                for plugin in std::fs::read_dir(path.join("dpdk")).into_iter().flatten().flatten() {
                    dirs.push(plugin.path());
                }
                dirs.push(path);
            }
        }
    }
    dirs
}

/// Whether a program is on the PATH, and where.
pub fn which(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let sbin = ["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(sbin)
        .map(|dir| dir.join(name))
        .find(|p| p.is_file())
}

/// Effective user id is 0.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The command line, for messages.
pub fn shown(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|s| s.to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(" ")
}

/// `cargo xtask peers`; `full`: with a kernel of our own making.
pub fn command(root: &Path, check: bool, full: bool) -> Result<bool> {
    install::command(root, check, full)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_loader_lists() {
        let list = "\tlinux-vdso.so.1 (0x00007fff)\n\tlibc.so.6 => /x/lib/libc.so.6 (0x00007f00)\n\
                    \t/lib64/ld-linux-x86-64.so.2 => /x/lib/ld-linux-x86-64.so.2 (0x00007f01)\n";
        assert_eq!(
            listed(list),
            [PathBuf::from("/x/lib/libc.so.6"), "/x/lib/ld-linux-x86-64.so.2".into()]
        );
        assert!(listed("\tstatically linked\n").is_empty());
    }
}
