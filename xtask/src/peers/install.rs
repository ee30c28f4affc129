//! `cargo xtask peers`: gets the peers from this machine's own package manager.
//!
//! As root they are installed. Otherwise their packages are downloaded and unpacked into a folder of the target
//! directory, from where they run with LD_LIBRARY_PATH. What the machine in software is made of goes to a cache of its
//! own, whoever runs this.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::newer::RELEASES;
use super::{Found, is_root, which};
use crate::machine::{self, Machine};
use crate::plugin::sdk::Dpdk;
use crate::process;

/// A program that the tests or benches use, and the Debian package that brings it.
struct Wanted {
    what: &'static str,
    /// The file that shows that it is there, searched on the PATH if it has no slash.
    probe: &'static [&'static str],
    package: &'static str,
    /// What needs it.
    used_by: &'static str,
}

const WANTED: &[Wanted] = &[
    Wanted {
        what: "DPDK testpmd",
        probe: &["/usr/bin/dpdk-testpmd"],
        package: "dpdk-dev",
        used_by: "test, bench",
    },
    Wanted {
        what: "DPDK libraries",
        probe: &["/usr/bin/dpdk-devbind.py", "/usr/sbin/dpdk-devbind.py"],
        package: "dpdk",
        used_by: "test, bench",
    },
    Wanted {
        what: "DPDK headers",
        probe: &["/usr/include/dpdk/rte_ethdev.h", "/usr/include/rte_ethdev.h"],
        package: "libdpdk-dev",
        used_by: "test, bench",
    },
    Wanted {
        what: "OVS-DPDK",
        probe: &["/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk"],
        package: "openvswitch-switch-dpdk",
        used_by: "test",
    },
    Wanted {
        what: "OVS tools",
        probe: &["/usr/sbin/ovsdb-server"],
        package: "openvswitch-switch",
        used_by: "test",
    },
    Wanted {
        what: "gcc",
        probe: &["gcc"],
        package: "gcc",
        used_by: "test, bench",
    },
    Wanted {
        what: "g++",
        probe: &["g++"],
        package: "g++",
        used_by: "test",
    },
    Wanted {
        what: "make",
        probe: &["make"],
        package: "make",
        used_by: "test",
    },
    Wanted {
        what: "flex",
        probe: &["flex"],
        package: "flex",
        used_by: "kernel",
    },
    Wanted {
        what: "bison",
        probe: &["bison"],
        package: "bison",
        used_by: "kernel",
    },
    Wanted {
        what: "bc",
        probe: &["bc"],
        package: "bc",
        used_by: "kernel",
    },
    Wanted {
        what: "xz",
        probe: &["xz"],
        package: "xz-utils",
        used_by: "kernel",
    },
    Wanted {
        what: "libelf headers",
        probe: &["/usr/include/libelf.h"],
        package: "libelf-dev",
        used_by: "kernel",
    },
    Wanted {
        what: "pkg-config",
        probe: &["pkg-config"],
        package: "pkg-config",
        used_by: "test, bench",
    },
    Wanted {
        what: "valgrind",
        probe: &["valgrind"],
        package: "valgrind",
        used_by: "test, bench",
    },
    Wanted {
        what: "strace",
        probe: &["strace"],
        package: "strace",
        used_by: "bench",
    },
    Wanted {
        what: "ip",
        probe: &["ip"],
        package: "iproute2",
        used_by: "bench",
    },
    Wanted {
        what: "crun",
        probe: &["crun"],
        package: "crun",
        used_by: "test",
    },
    Wanted {
        what: "podman",
        probe: &["podman"],
        package: "podman",
        used_by: "test",
    },
    Wanted {
        what: "nsenter",
        probe: &["nsenter"],
        package: "util-linux",
        used_by: "test",
    },
    Wanted {
        what: "setpriv",
        probe: &["setpriv"],
        package: "util-linux",
        used_by: "test",
    },
    Wanted {
        what: "stdbuf",
        probe: &["stdbuf"],
        package: "coreutils",
        used_by: "test, bench",
    },
];

/// Where packages are unpacked for a user who may not install them.
pub fn unpack_dir(root: &Path) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| root.join("target"), PathBuf::from)
        .join("xtask-peers")
}

fn present(wanted: &Wanted, root: &Path) -> Option<PathBuf> {
    let unpacked = unpack_dir(root);
    wanted.probe.iter().find_map(|probe| {
        if !probe.contains('/') {
            return which(probe);
        }
        [PathBuf::from(probe), unpacked.join(&probe[1..])]
            .into_iter()
            .find(|p| p.exists())
    })
}

/// Installs what is missing (unless `check`), prints the table, and says whether all is there.
pub fn command(root: &Path, check: bool, full: bool) -> Result<bool> {
    let missing: Vec<&str> = WANTED
        .iter()
        .filter(|w| present(w, root).is_none())
        .map(|w| w.package)
        .collect();
    let mut trouble = None;
    if !missing.is_empty() && !check {
        let got = if which("apt-get").is_none() {
            Err(anyhow::anyhow!(
                "no apt-get here: install these by this system's own means: {}",
                missing.join(" ")
            ))
        } else if is_root() {
            install(&missing)
        } else {
            eprintln!(
                "not root: unpacking {} into {}",
                missing.join(" "),
                unpack_dir(root).display()
            );
            unpack(&missing, &unpack_dir(root))
        };
        trouble = got.err();
    }
    println!(
        "{:<16} {:<24} {:<52} {:<9} used by",
        "peer", "version", "where", "state"
    );
    let mut all = true;
    for wanted in WANTED {
        let path = present(wanted, root);
        all &= path.is_some();
        let version = if path.is_some() {
            version(wanted.package).unwrap_or_else(|| "?".into())
        } else {
            "-".into()
        };
        let place = path
            .as_ref()
            .map_or_else(|| format!("(package {})", wanted.package), |p| p.display().to_string());
        let state = if path.is_some() { "ready" } else { "missing" };
        println!(
            "{:<16} {:<24} {:<52} {:<9} {}",
            wanted.what, version, place, state, wanted.used_by
        );
    }
    let machine = if check { Machine::find() } else { machine::fetch() };
    match &machine {
        Ok(machine) => {
            for (what, version, place) in machine::shown(machine) {
                println!("{what:<16} {version:<24} {place:<52} {:<9} test", "ready");
            }
        }
        Err(_) => println!("{:<16} {:<24} {:<52} {:<9} test", "QEMU, guest", "-", "-", "missing"),
    }
    all &= machine.is_ok();
    if full && let Ok(machine) = &machine {
        let kernel = if check {
            machine::full::find(&machine.guest)
        } else {
            machine::full::make(&machine.guest)
        };
        let (version, place, state) = match &kernel {
            Ok(guest) => (guest.version(), guest.kernel.display().to_string(), "ready"),
            Err(_) => ("-".into(), "-".into(), "missing"),
        };
        println!("{:<16} {version:<24} {place:<52} {state:<9} test", "full kernel");
        all &= kernel.is_ok();
        trouble = trouble.or(kernel.err());
    }
    let sdk = Dpdk::find(None, !check);
    match &sdk {
        Ok(dpdk) => {
            let place = dpdk
                .headers
                .as_ref()
                .map_or("beside the others".into(), |p| p.display().to_string());
            println!(
                "{:<16} {:<24} {place:<52} {:<9} test, bench",
                "driver headers", dpdk.version, "ready"
            );
        }
        Err(_) => println!(
            "{:<16} {:<24} {:<52} {:<9} test, bench",
            "driver headers", "-", "-", "missing"
        ),
    }
    all &= sdk.is_ok();
    // Not every mirror has all of them: what it lacks is said, and is no failure.
    let mut lacking = Vec::new();
    for newer in &RELEASES {
        match if check { newer.find() } else { newer.fetch() } {
            Ok(found) => println!(
                "{:<16} {:<24} {:<52} {:<9} test",
                "newer DPDK",
                found.dpdk.version,
                found.root.display(),
                "ready"
            ),
            Err(why) => {
                println!(
                    "{:<16} {:<24} {:<52} {:<9} test",
                    "newer DPDK",
                    "-",
                    newer.what(),
                    "not had"
                );
                lacking.push(why);
            }
        }
    }
    for why in lacking {
        eprintln!("\nno pmd/newer case without it: {why:#}");
    }
    for trouble in trouble.into_iter().chain(machine.err()).chain(sdk.err()) {
        eprintln!("\n{trouble:#}");
    }
    let found = Found::search(root);
    if let (Some(testpmd), Some(dir)) = (&found.testpmd, &found.unpacked)
        && testpmd.path.starts_with(dir)
    {
        println!(
            "\nunpacked programs run with LD_LIBRARY_PATH, and without hugepages where they may not mount hugetlbfs"
        );
    }
    Ok(all)
}

fn version(package: &str) -> Option<String> {
    let mut command = Command::new("dpkg-query");
    command.args(["-W", "-f", "${Version}", package]);
    let output = command.output().ok().filter(|o| o.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned()).filter(|v| !v.is_empty())
}

/// apt-get with a temporary directory of its own: an unpacking run was seen to lose its files in a shared one.
fn apt_get(tmp: &Path, args: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command
        .args(args)
        .env("TMPDIR", tmp)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .current_dir(tmp);
    eprintln!("$ apt-get {}", args.join(" "));
    process::run("apt-get", command, Duration::from_secs(600)).map(drop)
}

fn install(packages: &[&str]) -> Result<()> {
    let tmp = tempfile::Builder::new().prefix("xt-apt").tempdir()?;
    let mut args = vec!["install", "-y", "--no-install-recommends"];
    args.extend(packages);
    if apt_get(tmp.path(), &args).is_ok() {
        return Ok(());
    }
    // The lists may be missing or old; and the unpacking may have failed once.
    process::check_interrupted()?;
    eprintln!("that failed; once more with new package lists");
    apt_get(tmp.path(), &["update"])?;
    apt_get(tmp.path(), &args).context("the peers cannot be installed")
}

/// Downloads the packages with all that they depend on and this system lacks, and unpacks them.
fn unpack(packages: &[&str], into: &Path) -> Result<()> {
    let tmp = tempfile::Builder::new().prefix("xt-apt").tempdir()?;
    let mut simulate = Command::new("apt-get");
    simulate
        .args(["install", "--simulate", "--no-install-recommends"])
        .args(packages);
    let plan = process::run("apt-get install --simulate", simulate, Duration::from_secs(60))
        .context("apt-get cannot plan the installation (are there package lists? root can run apt-get update)")?;
    let names: Vec<&str> = plan
        .lines()
        .filter_map(|l| l.strip_prefix("Inst "))
        .filter_map(|l| l.split_whitespace().next())
        .collect();
    if names.is_empty() {
        bail!("apt-get plans to install nothing of {}", packages.join(" "));
    }
    let mut args = vec!["download"];
    args.extend(&names);
    apt_get(tmp.path(), &args)
        .or_else(|_| apt_get(tmp.path(), &args))
        .context("the packages cannot be downloaded")?;
    fs::create_dir_all(into)?;
    for entry in fs::read_dir(tmp.path())? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "deb") {
            let mut command = Command::new("dpkg-deb");
            command.arg("-x").arg(&path).arg(into);
            process::run("dpkg-deb", command, Duration::from_secs(120))?;
        }
    }
    Ok(())
}
