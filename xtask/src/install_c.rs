//! `cargo xtask install-c`: libusernic as C packagers expect it, for where there is no cargo-c.
//!
//! What it installs is what `cargo cinstall -p usernic-ffi` installs: the header, the shared library with its soname and
//! links, the static library, the pkg-config file.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::process::{Process, Surroundings};

/// Where things go.
pub struct Layout {
    /// What paths in the pkg-config file begin with.
    pub prefix: PathBuf,
    /// Below the prefix.
    pub libdir: PathBuf,
    /// What all is put below, for packages: not in the pkg-config file.
    pub destdir: Option<PathBuf>,
}

/// The libraries that Rust's standard library needs of a static link, on Linux with glibc.
pub const PRIVATE: &str = "-lgcc_s -lutil -lrt -lpthread -lm -ldl -lc";

/// A build from an empty target directory on two cores, with room to spare.
const LIMIT: Duration = Duration::from_secs(1200);

/// Builds and installs.
pub fn install(root: &Path, layout: &Layout, verbose: bool) -> Result<()> {
    if !layout.prefix.is_absolute() || layout.libdir.is_absolute() {
        bail!("--prefix is an absolute path, --libdir one below it");
    }
    let version = env!("CARGO_PKG_VERSION");
    let mut parts = version.split('.');
    let (Some(major), Some(minor)) = (parts.next(), parts.next()) else {
        bail!("version {version}");
    };
    // Before 1.0 a minor version may break.
    let soname = if major == "0" {
        format!("libusernic.so.{major}.{minor}")
    } else {
        format!("libusernic.so.{major}")
    };
    let target = build(root, &soname, verbose)?;

    let place = |below: &Path| match &layout.destdir {
        Some(destdir) => destdir.join(below.strip_prefix("/").unwrap_or(below)),
        None => below.to_owned(),
    };
    let lib = place(&layout.prefix.join(&layout.libdir));
    let include = place(&layout.prefix.join("include"));
    for dir in [&lib.join("pkgconfig"), &include] {
        fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    }
    let copy = |from: &Path, to: &Path| {
        // Not through what is there: a program may have it mapped.
        let _ = fs::remove_file(to);
        fs::copy(from, to).with_context(|| format!("{} to {}", from.display(), to.display()))
    };
    copy(&root.join("ffi/include/usernic.h"), &include.join("usernic.h"))?;
    copy(&target.join("libusernic_ffi.a"), &lib.join("libusernic.a"))?;
    let file = format!("libusernic.so.{version}");
    copy(&target.join("libusernic_ffi.so"), &lib.join(&file))?;
    for (link, to) in [(soname.as_str(), file.as_str()), ("libusernic.so", soname.as_str())] {
        let link = lib.join(link);
        let _ = fs::remove_file(&link);
        symlink(to, &link).with_context(|| link.display().to_string())?;
    }
    let path = lib.join("pkgconfig/usernic.pc");
    fs::write(&path, pkg_config(layout, version)?).with_context(|| path.display().to_string())
}

fn pkg_config(layout: &Layout, version: &str) -> Result<String> {
    let mut text = String::new();
    writeln!(text, "prefix={}", layout.prefix.display())?;
    writeln!(text, "libdir=${{prefix}}/{}", layout.libdir.display())?;
    writeln!(text, "includedir=${{prefix}}/include\n")?;
    writeln!(text, "Name: usernic")?;
    writeln!(text, "Description: User-space network ports for containers")?;
    writeln!(text, "Version: {version}")?;
    writeln!(text, "Libs: -L${{libdir}} -lusernic")?;
    writeln!(text, "Libs.private: {PRIVATE}")?;
    writeln!(text, "Cflags: -I${{includedir}}")?;
    Ok(text)
}

/// Builds both libraries; where they are.
fn build(root: &Path, soname: &str, verbose: bool) -> Result<PathBuf> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root);
    command.args(["rustc", "--release", "--package", "usernic-ffi", "--lib"]);
    command.args(["--crate-type", "cdylib,staticlib", "--", "-C"]);
    command.arg(format!("link-arg=-Wl,-soname,{soname}"));
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
    let mut process = Process::spawn("cargo rustc -p usernic-ffi", command, &surroundings)?;
    process.wait_success(LIMIT)?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    Ok(target.join("release"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pkg_config_file_names_the_prefix_alone() {
        let layout = Layout {
            prefix: "/usr".into(),
            libdir: "lib/x86_64-linux-gnu".into(),
            destdir: Some("/tmp/package".into()),
        };
        let text = pkg_config(&layout, "1.2.3").unwrap();
        assert!(
            text.starts_with("prefix=/usr\nlibdir=${prefix}/lib/x86_64-linux-gnu\n"),
            "{text}"
        );
        assert!(text.contains("\nVersion: 1.2.3\n") && !text.contains("/tmp"), "{text}");
    }

    #[test]
    fn paths_are_as_they_must_be() {
        let layout = Layout {
            prefix: "usr".into(),
            libdir: "lib".into(),
            destdir: None,
        };
        assert!(install(Path::new("/nonexistent"), &layout, false).is_err());
    }
}
