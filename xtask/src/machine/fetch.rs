//! QEMU, the guest's kernel and its programs, in a cache.
//!
//! A folder of the cache is written beside its place and renamed when it is whole, under a lock: whoever finds it
//! finds all of it.

use std::ffi::OsString;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::fs::FlockOperation;

use super::apt::{Apt, Mirror};
use crate::peers::which;
use crate::process;

/// The oldest QEMU that will do: the first with `vfio-user-pci`.
const OLDEST: (u32, u32) = (10, 1);

/// The Debian release whose backports have such a QEMU.
const QEMU_RELEASE: &str = "trixie";

/// What the guest's root file system is made of, beside the kernel.
const TOOLS: [&str; 3] = ["busybox-static", "ethtool", "iperf3"];

/// The package that depends on the release's newest kernel for virtual machines.
const KERNEL: &str = "linux-image-cloud-amd64";

/// The file that says what a folder of the cache is made of.
const STAMP: &str = ".usernic-machine";

/// Changed when folders that were made before will not do any more.
const FORMAT: &str = "1";

/// A QEMU that runs here.
#[derive(Clone, Debug)]
pub struct Qemu {
    /// The program, or the loader of a private folder with what it needs to start the program.
    start: Vec<OsString>,
    /// Arguments that say where its firmware is, if not where it was built for.
    firmware: Vec<OsString>,
    /// Its version.
    pub version: (u32, u32),
    /// The program itself.
    pub path: PathBuf,
}

impl Qemu {
    fn on_path() -> Option<Self> {
        let path = which("qemu-system-x86_64")?;
        Self::new(path.clone(), vec![path.into()], Vec::new()).ok()
    }

    /// Of packages that were unpacked into `root`: with their own loader, since the system's C library may be older.
    fn unpacked(root: &Path) -> Result<Self> {
        let path = root.join("usr/bin/qemu-system-x86_64");
        let mut start = loader(root)?;
        start.extend(["--argv0", "qemu-system-x86_64"].map(OsString::from));
        start.push(path.clone().into());
        let folders = ["qemu", "seabios"].map(|d| root.join("usr/share").join(d));
        let firmware = folders.into_iter().chain([root.join("usr/lib/ipxe/qemu")]);
        let firmware = firmware.flat_map(|d| [OsString::from("-L"), d.into()]).collect();
        Self::new(path, start, firmware)
    }

    fn new(path: PathBuf, start: Vec<OsString>, firmware: Vec<OsString>) -> Result<Self> {
        let mut qemu = Qemu {
            start,
            firmware,
            version: (0, 0),
            path,
        };
        let mut command = qemu.command();
        command.arg("--version");
        let answer = process::run("qemu-system-x86_64 --version", command, Duration::from_secs(20))?;
        qemu.version = version(&answer).with_context(|| format!("QEMU says of its version: {answer}"))?;
        let (path, (major, minor)) = (qemu.path.display(), qemu.version);
        ensure!(
            qemu.version >= OLDEST,
            "{path} is QEMU {major}.{minor}: {}.{} is the oldest that will do",
            OLDEST.0,
            OLDEST.1
        );
        Ok(qemu)
    }

    /// A command that starts it.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.start[0]);
        command.args(&self.start[1..]).args(&self.firmware);
        command
    }
}

/// Major and minor of "QEMU emulator version 11.1.3 (Debian ...)".
fn version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split("version ").nth(1)?.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The beginning of a command line that runs a program of `root` with the loader and the libraries of `root`.
pub fn loader(root: &Path) -> Result<Vec<OsString>> {
    let folders = library_folders(root);
    let loader = folders
        .iter()
        .map(|d| d.join("ld-linux-x86-64.so.2"))
        .find(|p| p.is_file());
    let loader = loader.with_context(|| format!("no loader in {}", root.display()))?;
    let path = std::env::join_paths(&folders)?;
    Ok(vec![loader.into(), "--library-path".into(), path])
}

fn library_folders(root: &Path) -> Vec<PathBuf> {
    let names = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];
    names.map(|d| root.join(d)).into_iter().filter(|d| d.is_dir()).collect()
}

/// What a guest is made of.
#[derive(Clone, Debug)]
pub struct Guest {
    /// The unpacked packages: programs and their libraries.
    pub root: PathBuf,
    /// The kernel image.
    pub kernel: PathBuf,
    /// Its modules: the folder that has the kernel's version as its name.
    pub modules: PathBuf,
}

impl Guest {
    pub(super) fn unpacked(root: &Path) -> Result<Self> {
        let kernel = only(&root.join("boot"), "vmlinuz-")?;
        let modules = ["lib/modules", "usr/lib/modules"].map(|d| root.join(d));
        let modules = modules
            .iter()
            .find(|d| d.is_dir())
            .context("the kernel has no modules")?;
        Ok(Guest {
            root: root.to_owned(),
            kernel,
            modules: only(modules, "")?,
        })
    }

    /// The kernel's version, as in "6.1.0-50-cloud-amd64".
    pub fn version(&self) -> String {
        self.modules
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    }
}

/// The one entry of a folder whose name begins so.
fn only(folder: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut found = entries
        .flatten()
        .filter(|e| e.file_name().to_string_lossy().starts_with(prefix));
    match (found.next(), found.next()) {
        (Some(entry), None) => Ok(entry.path()),
        _ => bail!("{} has not one {prefix}*", folder.display()),
    }
}

/// All that a machine in software needs.
#[derive(Clone, Debug)]
pub struct Machine {
    /// The emulator.
    pub qemu: Qemu,
    /// What it boots.
    pub guest: Guest,
}

impl Machine {
    /// What is there already.
    pub fn find() -> Result<Self> {
        let cache = cache()?;
        let qemu = match Qemu::on_path() {
            Some(qemu) => qemu,
            None => Qemu::unpacked(&whole(&cache, &QEMU)?)?,
        };
        let guest = Guest::unpacked(&whole(&cache, &GUEST)?)?;
        Ok(Machine { qemu, guest })
    }
}

/// A folder of a cache.
pub struct Folder {
    /// Its name.
    pub name: &'static str,
    /// What is in it.
    pub what: &'static str,
    /// What it takes.
    pub size: &'static str,
}

const QEMU: Folder = Folder {
    name: "qemu",
    what: "QEMU",
    size: "55 MB of downloads, 175 MB on disk",
};

const GUEST: Folder = Folder {
    name: "guest",
    what: "the guest's kernel and programs",
    size: "60 MB of downloads, 200 MB on disk",
};

/// `$USERNIC_CACHE`, or `usernic` in `$XDG_CACHE_HOME` or in `~/.cache`.
pub(super) fn cache() -> Result<PathBuf> {
    cache_for("machine")
}

/// The folder for what is fetched for one purpose.
pub fn cache_for(purpose: &str) -> Result<PathBuf> {
    let var = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let base = var("USERNIC_CACHE").or_else(|| {
        var("XDG_CACHE_HOME")
            .or_else(|| var("HOME").map(|h| h.join(".cache")))
            .map(|c| c.join("usernic"))
    });
    let base = base.context("no place for a cache: set USERNIC_CACHE, XDG_CACHE_HOME or HOME")?;
    Ok(std::path::absolute(base)?.join(purpose))
}

/// The folder of the cache, if it is whole.
pub fn whole(cache: &Path, folder: &Folder) -> Result<PathBuf> {
    let path = cache.join(folder.name);
    let stamp = fs::read_to_string(path.join(STAMP)).unwrap_or_default();
    ensure!(
        stamp.lines().next() == Some(&format!("format {FORMAT}")),
        "{} is not in {}: cargo xtask peers gets it",
        folder.what,
        cache.display()
    );
    Ok(path)
}

/// Gets what is missing.
pub fn fetch() -> Result<Machine> {
    if let Ok(machine) = Machine::find() {
        return Ok(machine);
    }
    ensure!(
        cfg!(target_arch = "x86_64"),
        "the machine in software is made of programs for x86_64"
    );
    let cache = cache()?;
    let _lock = locked(&cache)?;
    let mirror = Mirror::of_this_machine();
    let mirror = || match &mirror {
        Ok(mirror) => Ok(mirror),
        Err(e) => bail!(
            "{e:#}; put a qemu-system-x86_64 of {}.{} or newer on the PATH, or run this on Debian",
            OLDEST.0,
            OLDEST.1
        ),
    };
    if Qemu::on_path().is_none() && whole(&cache, &QEMU).is_err() {
        install(&cache, &QEMU, |into| {
            let backports = format!("{QEMU_RELEASE}-backports");
            let apt = Apt::new(mirror()?, &[QEMU_RELEASE, &backports])?;
            apt.download(&["qemu-system-x86"], Some(&backports))?;
            let packages = apt.unpack(into)?;
            Qemu::unpacked(into)?;
            Ok(packages)
        })?;
    }
    if whole(&cache, &GUEST).is_err() {
        install(&cache, &GUEST, |into| {
            let mirror = mirror()?;
            let apt = Apt::new(mirror, &[&mirror.release])?;
            let kernel = apt.depends(KERNEL)?;
            let kernel = kernel.iter().find(|p| p.starts_with("linux-image-"));
            // What it depends on installs kernels, which nobody does here.
            apt.download_alone(kernel.with_context(|| format!("{KERNEL} depends on no kernel"))?)?;
            apt.download(&TOOLS, None)?;
            let packages = apt.unpack(into)?;
            Guest::unpacked(into)?;
            Ok(packages)
        })?;
    }
    Machine::find()
}

const NEW: &str = ".new-";

/// Locks others out of the cache, until this is dropped, and cleans it.
pub fn locked(cache: &Path) -> Result<fs::File> {
    fs::create_dir_all(cache).with_context(|| format!("{} cannot be made", cache.display()))?;
    let lock = fs::File::create(cache.join("lock")).with_context(|| cache.display().to_string())?;
    lock_file(&lock, cache)?;
    // Others are locked out, so what is here by such a name was left by one who was killed.
    for entry in fs::read_dir(cache)?.flatten() {
        if entry.file_name().to_string_lossy().starts_with(NEW) {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(lock)
}

fn lock_file(lock: &fs::File, cache: &Path) -> Result<()> {
    let mut told = false;
    loop {
        match rustix::fs::flock(lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::WOULDBLOCK) if told => process::sleep(Duration::from_millis(200))?,
            Err(rustix::io::Errno::WOULDBLOCK) => {
                eprintln!("waiting for another process that fills {}", cache.display());
                told = true;
            }
            Err(e) => return Err(e).with_context(|| format!("locking {}", cache.display())),
        }
    }
}

/// Makes a folder beside its place and moves it there when it is whole.
pub fn install(cache: &Path, folder: &Folder, make: impl FnOnce(&Path) -> Result<Vec<String>>) -> Result<()> {
    let start = Instant::now();
    let Folder { name, what, size } = folder;
    let place = cache.join(name);
    eprintln!("getting {what} into {} ({size})", place.display());
    let new = tempfile::Builder::new().prefix(NEW).tempdir_in(cache)?;
    let packages = make(new.path()).with_context(|| format!("getting {what}"))?;
    let mut stamp = fs::File::create(new.path().join(STAMP))?;
    writeln!(stamp, "format {FORMAT}\n{}", packages.join("\n"))?;
    stamp.sync_all()?;
    // Readable for every user, as what packages install is; the temporary directory is not.
    fs::set_permissions(new.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    if place.exists() {
        fs::remove_dir_all(&place)?;
    }
    fs::rename(new.path(), &place).with_context(|| place.display().to_string())?;
    // It is where it belongs now, no more a temporary directory.
    let _ = new.keep();
    let seconds = start.elapsed().as_secs_f64();
    eprintln!("{what}: {} packages in {seconds:.1} s", packages.len());
    Ok(())
}

/// What is there, for a table: version and place of QEMU and of the guest's kernel.
pub fn shown(machine: &Machine) -> [(&'static str, String, String); 2] {
    let (major, minor) = machine.qemu.version;
    [
        (
            "QEMU",
            format!("{major}.{minor}"),
            machine.qemu.path.display().to_string(),
        ),
        (
            "guest kernel",
            machine.guest.version(),
            machine.guest.root.display().to_string(),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        assert_eq!(
            version("QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1~bpo13+1)\n"),
            Some((11, 1))
        );
        assert_eq!(version("QEMU emulator version 10.1\n"), Some((10, 1)));
        assert_eq!(version("something else"), None);
    }

    #[test]
    fn a_folder_that_failed_leaves_nothing_and_one_that_went_well_is_whole() {
        let cache = tempfile::tempdir().unwrap();
        let entries = || fs::read_dir(cache.path()).unwrap().count();
        let error = install(cache.path(), &GUEST, |into| {
            fs::write(into.join("half"), "")?;
            bail!("no network")
        });
        assert!(format!("{:#}", error.unwrap_err()).contains("no network"));
        assert!(whole(cache.path(), &GUEST).is_err());
        assert_eq!(entries(), 0);

        for _ in 0..2 {
            install(cache.path(), &GUEST, |_| Ok(vec!["busybox-static_1".into()])).unwrap();
            assert_eq!(whole(cache.path(), &GUEST).unwrap(), cache.path().join("guest"));
            assert_eq!(entries(), 1);
        }
        fs::write(cache.path().join("guest").join(STAMP), "format 0\n").unwrap();
        assert!(whole(cache.path(), &GUEST).is_err());
    }
}
