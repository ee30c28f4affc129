//! `cargo xtask plugin`: librte_net_usernic.so, the poll-mode driver for DPDK.
//!
//! Its C half is compiled against DPDK's driver headers ([`sdk`]), its Rust half is linked in: one file, which needs DPDK's
//! own libraries and nothing of ours.

pub mod sdk;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::install_c::PRIVATE;
use crate::process::{self, Process, Surroundings};
use sdk::Dpdk;

/// The file.
pub const NAME: &str = "librte_net_usernic.so";

const LIMIT: Duration = Duration::from_secs(120);

/// A build from an empty target directory on two cores, with room to spare.
const BUILD: Duration = Duration::from_secs(1200);

/// What the plugin exports: nothing. EAL runs its constructors.
const EXPORTS: &str = "{ local: *; };\n";

/// `cargo xtask plugin`.
pub fn command(root: &Path, out: &Path, prefix: Option<&Path>) -> Result<bool> {
    let dpdk = Dpdk::find(prefix, true)?;
    let plugin = build(root, out, &dpdk, true)?;
    println!("built for DPDK {}: {}", dpdk.version, plugin.display());
    let (line, why) = hint(&plugin)?;
    if let Some(why) = why {
        println!("{why}");
    }
    println!("try: {line}");
    Ok(true)
}

/// A command that loads the plugin, whatever the current folder is, and why it names no path if it does not.
pub fn hint(plugin: &Path) -> Result<(String, Option<String>)> {
    const DEVICE: &str = "--vdev=net_usernic0,path=SOCKET -- -i";
    Ok(match argument(plugin) {
        Ok(argument) => (format!("dpdk-testpmd -d {argument} {DEVICE}"), None),
        Err(why) => {
            let path = fs::canonicalize(plugin).with_context(|| plugin.display().to_string())?;
            let folder = path.parent().unwrap_or(&path).display();
            // Where the name is a file of the current folder EAL takes it for a path: so from another folder.
            let line = format!("env -C / LD_LIBRARY_PATH={folder} dpdk-testpmd -d {NAME} {DEVICE}");
            (line, Some(format!("{why:#}")))
        }
    })
}

/// Where a build goes by itself.
pub fn default_out(root: &Path) -> PathBuf {
    target(root).join("plugin")
}

fn target(root: &Path) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from)
}

/// Builds the plugin into a folder; its path.
pub fn build(root: &Path, out: &Path, dpdk: &Dpdk, verbose: bool) -> Result<PathBuf> {
    let library = rust_half(root, verbose)?;
    fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    let dir = tempfile::Builder::new().prefix(".plugin").tempdir_in(out)?;
    let mut objects = Vec::new();
    let mut sources: Vec<PathBuf> = fs::read_dir(root.join("ffi/dpdk"))?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|e| e == "c"))
        .collect();
    sources.sort();
    let flags = dpdk.flags()?;
    for source in &sources {
        let name = source.file_stem().context("a source without a name")?;
        let object = dir.path().join(name).with_extension("o");
        let mut command = Command::new("gcc");
        command.args(["-std=gnu11", "-O3", "-g", "-fPIC", "-Wall", "-Wextra", "-Werror"]);
        command.args(&flags).arg("-c").arg(source).arg("-o").arg(&object);
        process::run("gcc", command, LIMIT)?;
        objects.push(object);
    }
    let map = dir.path().join("plugin.map");
    fs::write(&map, EXPORTS)?;
    let linked = dir.path().join(NAME);
    let mut command = Command::new("gcc");
    command.arg("-shared").arg("-o").arg(&linked);
    command.args([
        &format!("-Wl,-soname,{NAME}"),
        "-Wl,--gc-sections",
        "-Wl,--no-undefined",
    ]);
    command.arg(format!("-Wl,--version-script={}", map.display()));
    command.args(&objects).arg(&library).args(dpdk.libraries()?);
    command.args(PRIVATE.split_whitespace());
    process::run("gcc -shared", command, LIMIT)?;
    // In one step: a program may have the old one mapped.
    let plugin = out.join(NAME);
    fs::rename(&linked, &plugin).with_context(|| plugin.display().to_string())?;
    Ok(plugin)
}

fn rust_half(root: &Path, verbose: bool) -> Result<PathBuf> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root);
    command.args(["build", "--release", "--package", "usernic-dpdk", "--lib"]);
    // What `cargo xtask` set for us is not for other packages' builds.
    for (key, _) in std::env::vars_os() {
        let name = key.to_string_lossy();
        if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") || name == "CARGO_BIN_NAME" {
            command.env_remove(&key);
        }
    }
    let surroundings = Surroundings {
        no_stdin: true,
        echo: verbose,
        ..Default::default()
    };
    let mut process = Process::spawn("cargo build -p usernic-dpdk", command, &surroundings)?;
    process.wait_success(BUILD)?;
    Ok(target(root).join("release/libusernic_dpdk.a"))
}

/// What `-d` is given: the path, which EAL refuses where others can write to a folder above the file.
pub fn argument(plugin: &Path) -> Result<String> {
    let path = fs::canonicalize(plugin).with_context(|| plugin.display().to_string())?;
    for folder in path.ancestors().skip(1) {
        let mode = fs::metadata(folder)?.permissions().mode();
        if mode & 0o002 != 0 {
            bail!(
                "EAL refuses to load it by its path, since everybody can write to {}: take another folder with --out, or name \
                 the file without its path",
                folder.display()
            );
        }
    }
    Ok(path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_that_others_write_to_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let plugin = dir.path().join(NAME);
        fs::write(&plugin, "").unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let error = argument(&plugin).unwrap_err().to_string();
        let folder = fs::canonicalize(dir.path()).unwrap();
        assert!(error.contains(&folder.display().to_string()), "{error}");
        assert!(argument(&dir.path().join("missing")).is_err());
    }
}
