//! What DPDK's drivers are compiled with: headers that distributions do not install.
//!
//! A DPDK that was installed with enable_driver_sdk has them beside its others. For Debian's, they are taken from the
//! source package of the same version, with some of its examples, and kept in the cache.

use std::fs;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::machine::apt::{Apt, Mirror};
use crate::machine::cache_for;
use crate::process;

const LIMIT: Duration = Duration::from_secs(120);

/// Where Debian's packages have DPDK's pkg-config files.
const UNPACKED: &str = "usr/lib/x86_64-linux-gnu/pkgconfig";

/// The headers, as they lie in DPDK's source.
const HEADERS: [&str; 5] = [
    "drivers/bus/vdev/bus_vdev_driver.h",
    "lib/eal/include/bus_driver.h",
    "lib/eal/include/dev_driver.h",
    "lib/ethdev/ethdev_driver.h",
    "lib/ethdev/ethdev_vdev.h",
];

/// Folders of examples that tests run.
const EXAMPLES: [&str; 3] = ["examples/common", "examples/l2fwd", "examples/l3fwd"];

/// The variable that names a git repository of DPDK's, for releases of which the package mirror has no source.
pub const REPOSITORY: &str = "USERNIC_DPDK_REPOSITORY";

/// A DPDK to build against.
#[derive(Clone, Debug)]
pub struct Dpdk {
    /// For pkg-config, if it is not this system's.
    prefix: Option<PathBuf>,
    /// Its version.
    pub version: String,
    /// Where the driver headers are, if not among its own.
    pub headers: Option<PathBuf>,
    /// Its examples' sources, if those are there.
    pub examples: Option<PathBuf>,
}

impl Dpdk {
    /// This system's, or the one that was installed below `prefix`; `fetch`: with the driver headers, if they must be had
    /// from elsewhere.
    pub fn find(prefix: Option<&Path>, fetch: bool) -> Result<Self> {
        let mut dpdk = Dpdk {
            prefix: prefix.map(Path::to_owned),
            version: String::new(),
            headers: None,
            examples: None,
        };
        dpdk.version = dpdk
            .pkg_config(&["--modversion"])
            .context(match prefix {
                Some(_) => "no libdpdk.pc below that prefix",
                None => "DPDK's development files are missing: cargo xtask peers",
            })?
            .concat();
        let complete = dpdk.flags()?.iter().any(|flag| {
            let folder = flag.strip_prefix("-I").map(Path::new);
            folder.is_some_and(|f| HEADERS.iter().all(|h| name(h).is_some_and(|h| f.join(h).is_file())))
        });
        if complete {
            return Ok(dpdk);
        }
        if prefix.is_some() {
            bail!(
                "DPDK {} was installed without its driver headers: meson setup -Denable_driver_sdk=true, and install it again",
                dpdk.version
            );
        }
        let source = match source() {
            Ok(source) => source,
            Err(missing) if !fetch => return Err(missing),
            Err(_) => fetch_source()?,
        };
        dpdk.headers = Some(source.join("include"));
        dpdk.examples = Some(source.join("examples"));
        Ok(dpdk)
    }

    fn pkg_config(&self, arguments: &[&str]) -> Result<Vec<String>> {
        let mut command = Command::new("pkg-config");
        command.args(arguments);
        match &self.prefix {
            // Packages that were unpacked: all paths are below the folder. What libdpdk.pc requires is for static linking.
            Some(root) if root.join(UNPACKED).is_dir() => {
                command
                    .env("PKG_CONFIG_LIBDIR", root.join(UNPACKED))
                    .env("PKG_CONFIG_SYSROOT_DIR", root)
                    .env("PKG_CONFIG_ALLOW_SYSTEM_CFLAGS", "1")
                    .env("PKG_CONFIG_ALLOW_SYSTEM_LIBS", "1");
                command.arg("libdpdk-libs");
            }
            Some(prefix) => {
                let lib = ["lib", "lib64", "lib/x86_64-linux-gnu"].map(|d| prefix.join(d).join("pkgconfig"));
                command.env("PKG_CONFIG_PATH", std::env::join_paths(lib)?);
                command.arg("libdpdk");
            }
            None => {
                command.arg("libdpdk");
            }
        }
        let output = process::run("pkg-config", command, LIMIT)?;
        Ok(output.split_whitespace().map(str::to_owned).collect())
    }

    /// What a driver is compiled with.
    pub fn flags(&self) -> Result<Vec<String>> {
        let mut flags = self.pkg_config(&["--cflags"])?;
        flags.extend(self.headers.iter().map(|dir| format!("-I{}", dir.display())));
        flags.extend(["-DALLOW_INTERNAL_API", "-DALLOW_EXPERIMENTAL_API"].map(String::from));
        Ok(flags)
    }

    /// What it is linked with.
    pub fn libraries(&self) -> Result<Vec<String>> {
        let mut libraries = self.pkg_config(&["--libs"])?;
        libraries.push("-lrte_bus_vdev".into());
        Ok(libraries)
    }
}

fn name(path: &str) -> Option<&str> {
    path.rsplit('/').next()
}

/// The version of Debian's package that is installed.
fn package() -> Result<String> {
    let mut command = Command::new("dpkg-query");
    command.args(["-W", "-f", "${Version}", "libdpdk-dev"]);
    let version = process::run("dpkg-query", command, LIMIT);
    let version = version.context("DPDK's driver headers are missing, and it is no package of Debian's: install a DPDK with -Denable_driver_sdk=true, and name it with --dpdk")?;
    Ok(version.trim().to_owned())
}

/// The folder of the installed version.
fn place() -> Result<PathBuf> {
    Ok(cache_for("dpdk")?.join(package()?.replace(['/', ':'], "_")))
}

/// What was fetched before.
fn source() -> Result<PathBuf> {
    let place = place()?;
    ensure!(
        place.is_dir(),
        "DPDK's driver headers are missing: cargo xtask peers fetches them"
    );
    Ok(place)
}

/// Fetches headers and examples.
fn fetch_source() -> Result<PathBuf> {
    let place = place()?;
    let version = package()?;
    eprintln!("fetching the source of dpdk {version} for its driver headers");
    let mirror = Mirror::of_this_machine()?;
    let updates = format!("{}-updates", mirror.release);
    let parent = place.parent().context("a cache without a folder")?;
    fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
    let new = tempfile::Builder::new().prefix(".new").tempdir_in(parent)?;
    unpack_source(&mirror, &[&mirror.release, &updates], &version, new.path())?;
    fs::set_permissions(new.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    // Whole, or not there. Somebody else may have been faster.
    match fs::rename(new.path(), &place) {
        Err(_) if place.is_dir() => {}
        result => {
            result.with_context(|| place.display().to_string())?;
            let _ = new.keep();
        }
    }
    Ok(place)
}

/// Takes the driver headers and the examples from the source of a version that one of these suites has: `include` and
/// `examples` of a folder.
pub fn unpack_source(mirror: &Mirror, suites: &[&str], version: &str, into: &Path) -> Result<()> {
    let apt = Apt::for_sources(mirror, suites)?;
    let archive = apt.download_source("dpdk", version)?;
    let tar = into.join("dpdk.tar");
    let mut packed = BufReader::new(fs::File::open(&archive)?);
    lzma_rs::xz_decompress(&mut packed, &mut fs::File::create(&tar)?)
        .map_err(|e| anyhow::anyhow!("{}: {e:?}", archive.display()))?;
    let source = into.join("source");
    fs::create_dir_all(&source)?;
    let mut command = Command::new("tar");
    command
        .arg("--extract")
        .arg("--file")
        .arg(&tar)
        .arg("--directory")
        .arg(&source);
    command.args(["--strip-components=1", "--wildcards"]);
    command.args(HEADERS.iter().chain(&EXAMPLES).map(|what| format!("*/{what}")));
    process::run("tar", command, LIMIT)?;
    fs::remove_file(&tar)?;
    let include = into.join("include");
    fs::create_dir_all(&include)?;
    for header in HEADERS {
        let to = include.join(name(header).context("a header without a name")?);
        fs::rename(source.join(header), to).with_context(|| format!("{header} of dpdk {version}"))?;
    }
    fs::rename(source.join("examples"), into.join("examples"))?;
    fs::remove_dir_all(&source)?;
    Ok(())
}

/// The driver headers of a version, from the repository that [`REPOSITORY`] names, by the tag of its release ("24.11" of
/// "24.11.8"): they do not change within one.
pub fn headers_of_repository(version: &str, into: &Path) -> Result<()> {
    let repository =
        std::env::var_os(REPOSITORY).with_context(|| format!("{REPOSITORY} names no repository of DPDK's"))?;
    let release: Vec<&str> = version.split('.').take(2).collect();
    fs::create_dir_all(into)?;
    for header in HEADERS {
        let mut command = Command::new("git");
        command.arg("-C").arg(&repository);
        command.arg("show").arg(format!("v{}:{header}", release.join(".")));
        let text = process::run("git show", command, LIMIT)?;
        fs::write(into.join(name(header).context("a header without a name")?), text)?;
    }
    Ok(())
}
