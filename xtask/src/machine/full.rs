//! A kernel of our own making, for the guest: Debian's source of one, with what no kernel of Debian's has (iommufd, VFIO's
//! character devices, noiommu mode), with vhost-net, and with no modules.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use super::apt::{Apt, Mirror};
use super::fetch::{Folder, Guest, cache, install, locked, whole};
use crate::peers::which;
use crate::process;

/// The source, and the release that has it.
const PACKAGE: &str = "linux-source-6.12";
const RELEASE: &str = "trixie";

/// What is switched on, beyond `make tinyconfig`.
const OPTIONS: &str = include_str!("full.config");

/// Where the options that a kernel was made with are kept beside it.
const MADE_WITH: &str = "options";

const FOLDER: Folder = Folder {
    name: "kernel-full",
    what: "a kernel with iommufd",
    size: "150 MB of downloads, some minutes of building, 2 GB on disk meanwhile, 5 MB afterwards",
};

const STEP: Duration = Duration::from_secs(600);
const BUILD: Duration = Duration::from_secs(3600);

/// Programs and headers that it takes to make a kernel: cargo xtask peers installs them.
const TOOLS: [&str; 6] = ["make", "gcc", "flex", "bison", "bc", "xz"];

/// The guest with this kernel in place of the stock one, if it was made.
pub fn find(stock: &Guest) -> Result<Guest> {
    let folder = whole(&cache()?, &FOLDER).context("cargo xtask peers --kernel full makes it")?;
    let made_with = fs::read_to_string(folder.join(MADE_WITH)).unwrap_or_default();
    ensure!(
        made_with == OPTIONS,
        "the kernel in {} was made with other options: cargo xtask peers --kernel full makes it anew",
        folder.display()
    );
    let guest = Guest::unpacked(&folder)?;
    Ok(Guest {
        root: stock.root.clone(),
        ..guest
    })
}

/// Makes it, unless that was done.
pub fn make(stock: &Guest) -> Result<Guest> {
    if let Ok(guest) = find(stock) {
        return Ok(guest);
    }
    let missing: Vec<_> = TOOLS.into_iter().filter(|tool| which(tool).is_none()).collect();
    ensure!(
        missing.is_empty() && Path::new("/usr/include/libelf.h").exists(),
        "to make a kernel it takes {} and libelf's headers, of which {} are missing: cargo xtask peers as root installs them",
        TOOLS.join(", "),
        if missing.is_empty() {
            "the headers".into()
        } else {
            missing.join(", ")
        }
    );
    let cache = cache()?;
    let _lock = locked(&cache)?;
    if find(stock).is_err() {
        install(&cache, &FOLDER, |into| build(&cache, into))?;
    }
    find(stock)
}

fn build(cache: &Path, into: &Path) -> Result<Vec<String>> {
    let work = tempfile::Builder::new().prefix(".new-kernel").tempdir_in(cache)?;
    let apt = Apt::new(&Mirror::of_this_machine()?, &[RELEASE])?;
    apt.download_alone(PACKAGE)?;
    let packages = apt.unpack(work.path())?;
    let archive = work.path().join("usr/src").join(format!("{PACKAGE}.tar.xz"));
    let mut tar = Command::new("tar");
    tar.arg("-xJf").arg(&archive).arg("-C").arg(work.path());
    process::run("tar", tar, STEP)?;
    fs::remove_file(&archive)?;
    let tree = work.path().join(PACKAGE);
    let make = |arguments: &[&str], limit| -> Result<String> {
        let mut command = Command::new("make");
        command.arg("-s").args(arguments).current_dir(&tree);
        process::run(&format!("make {}", arguments.join(" ")), command, limit)
    };
    make(&["tinyconfig"], STEP)?;
    let mut config = Command::new("scripts/config");
    config.current_dir(&tree);
    for option in OPTIONS.split_whitespace() {
        config.args(["--enable", option]);
    }
    process::run("scripts/config", config, STEP)?;
    make(&["olddefconfig"], STEP)?;
    let made = fs::read_to_string(tree.join(".config"))?;
    let lost: Vec<_> = OPTIONS
        .split_whitespace()
        .filter(|option| !made.contains(&format!("CONFIG_{option}=y\n")))
        .collect();
    if !lost.is_empty() {
        bail!("the kernel's configuration does not take {}", lost.join(" "));
    }
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    make(&[&format!("-j{jobs}"), "bzImage"], BUILD)?;
    let release = make(&["kernelrelease"], STEP)?;
    let release = release.trim();
    fs::create_dir_all(into.join("boot"))?;
    fs::copy(
        tree.join("arch/x86/boot/bzImage"),
        into.join(format!("boot/vmlinuz-{release}")),
    )?;
    // What is built in, by the names that modules would have.
    let modules = into.join("lib/modules").join(release);
    fs::create_dir_all(modules.join("kernel"))?;
    make(&["modules.builtin"], STEP)?;
    fs::copy(tree.join("modules.builtin"), modules.join("modules.builtin"))?;
    fs::write(into.join(MADE_WITH), OPTIONS)?;
    Guest::unpacked(into)?;
    Ok(packages)
}
