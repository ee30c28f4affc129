//! The guest's root file system: a cpio archive that the kernel unpacks into memory.
//!
//! Format: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst, "newc".

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::fetch::{Guest, loader};
use super::kernel::Modules;
use crate::peers::{LOADER, Program, listed};
use crate::process;

/// What runs as process 1: it loads the modules and then runs the scripts that come over the second serial line.
const INIT: &str = include_str!("init.sh");

/// The line of the module list; see [`INIT`].
const MODULES: &str = "etc/modules";

enum Entry {
    Folder,
    File { mode: u32, bytes: Vec<u8> },
    Link(String),
    Console,
}

/// A root file system in the making: busybox under all its names, and what is added.
pub struct Initramfs {
    guest: Guest,
    entries: BTreeMap<String, Entry>,
    modules: Vec<String>,
}

impl Initramfs {
    /// One that starts, answers and has nothing more than busybox.
    pub fn new(guest: &Guest) -> Result<Self> {
        let mut all = Initramfs {
            guest: guest.clone(),
            entries: BTreeMap::new(),
            modules: Vec::new(),
        };
        for folder in ["dev", "proc", "root", "sbin", "sys", "tmp", "usr/bin", "usr/sbin"] {
            all.insert(&format!("{folder}/"), Entry::Folder)?;
        }
        all.insert("dev/console", Entry::Console)?;
        all.file("init", 0o755, INIT.as_bytes())?;
        let busybox = ["bin/busybox", "usr/bin/busybox"].map(|p| guest.root.join(p));
        let busybox = busybox
            .iter()
            .find(|p| p.is_file())
            .context("no busybox in the guest's packages")?;
        all.file("bin/busybox", 0o755, &fs::read(busybox)?)?;
        Ok(all)
    }

    /// Adds a file; the folders that it needs come along. `path` has no / at its beginning.
    pub fn file(&mut self, path: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        let bytes = bytes.to_vec();
        self.insert(path, Entry::File { mode, bytes })
    }

    fn insert(&mut self, path: &str, entry: Entry) -> Result<()> {
        let path = path.trim_end_matches('/');
        ensure!(
            !path.is_empty() && !path.starts_with('/'),
            "{path:?} is no path in an archive"
        );
        for (at, _) in path.match_indices('/') {
            let folder = self.entries.entry(path[..at].to_owned()).or_insert(Entry::Folder);
            ensure!(
                !matches!(folder, Entry::File { .. }),
                "{path}: {} is a file",
                &path[..at]
            );
        }
        self.entries.insert(path.to_owned(), entry);
        Ok(())
    }

    /// Adds modules with all that they need; the guest loads them in this order.
    pub fn modules(&mut self, names: &[&str]) -> Result<()> {
        for (name, bytes) in Modules::new(&self.guest.modules)?.closure(names)? {
            if !self.modules.contains(&name) {
                self.file(&format!("lib/modules/{name}.ko"), 0o644, &bytes)?;
                self.modules.push(name);
            }
        }
        Ok(())
    }

    /// Adds a program of the guest's packages with the libraries that it needs, by its name.
    pub fn tool(&mut self, name: &str) -> Result<()> {
        let root = self.guest.root.clone();
        let places = ["usr/bin", "bin", "usr/sbin", "sbin"].map(|d| root.join(d).join(name));
        let path = places.iter().find(|p| p.is_file());
        let path = path.with_context(|| format!("no {name} in the guest's packages"))?;
        let start = loader(&root)?;
        let mut list = Command::new(&start[0]);
        list.args(&start[1..]).arg("--list").arg(path);
        let list = process::run("ld.so --list", list, Duration::from_secs(20))?;
        for library in listed(&list) {
            ensure!(
                library.starts_with(&root),
                "{name} needs {}, which is not a guest's",
                library.display()
            );
            let soname = library.file_name().unwrap_or_default().to_string_lossy().into_owned();
            self.file(&format!("usr/lib/{soname}"), 0o755, &fs::read(&library)?)?;
        }
        // Where every program for this architecture looks for its loader.
        let ld = Path::new(&start[0])
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        self.file(&format!("usr/lib/{ld}"), 0o755, &fs::read(&start[0])?)?;
        self.insert(&format!("lib64/{ld}"), Entry::Link(format!("/usr/lib/{ld}")))?;
        self.file(&format!("usr/bin/{name}"), 0o755, &fs::read(path)?)
    }

    /// Adds a program of the host that needs no libraries, under a name.
    pub fn program(&mut self, name: &str, path: &Path) -> Result<()> {
        let bytes = fs::read(path).with_context(|| path.display().to_string())?;
        self.file(&format!("usr/bin/{name}"), 0o755, &bytes)
    }

    /// Adds a program of the host's with the libraries that it needs, and with `more` libraries, which it loads by name.
    pub fn host_program(&mut self, program: &Program, more: &[&str]) -> Result<()> {
        for library in program.linked(more)? {
            let soname = library.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let bytes = fs::read(&library).with_context(|| library.display().to_string())?;
            self.file(&format!("usr/lib/{soname}"), 0o755, &bytes)?;
        }
        let ld = Path::new(LOADER).file_name().unwrap_or_default().to_string_lossy();
        self.file(&format!("usr/lib/{ld}"), 0o755, &fs::read(LOADER)?)?;
        self.insert(&format!("lib64/{ld}"), Entry::Link(format!("/usr/lib/{ld}")))?;
        let name = program
            .path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        self.program(&name, &program.path)
    }

    /// Writes the archive.
    pub fn write(mut self, path: &Path) -> Result<()> {
        let list = self.modules.iter().map(|m| format!("{m}\n")).collect::<String>();
        self.file(MODULES, 0o644, list.as_bytes())?;
        fs::write(path, archive(&self.entries)).with_context(|| path.display().to_string())
    }
}

/// Entries in the order of their paths: a folder comes before what is in it.
fn archive(entries: &BTreeMap<String, Entry>) -> Vec<u8> {
    let mut out = Vec::new();
    for (number, (path, entry)) in entries.iter().enumerate() {
        let (mode, device, bytes): (u32, (u32, u32), &[u8]) = match entry {
            Entry::Folder => (libc::S_IFDIR | 0o755, (0, 0), b""),
            Entry::File { mode, bytes } => (libc::S_IFREG | mode, (0, 0), bytes),
            Entry::Link(target) => (libc::S_IFLNK | 0o777, (0, 0), target.as_bytes()),
            Entry::Console => (libc::S_IFCHR | 0o600, (5, 1), b""),
        };
        record(&mut out, number as u32 + 1, path, mode, device, bytes);
    }
    record(&mut out, 0, "TRAILER!!!", 0, (0, 0), b"");
    out
}

fn record(out: &mut Vec<u8>, inode: u32, path: &str, mode: u32, device: (u32, u32), bytes: &[u8]) {
    let links = if mode & libc::S_IFMT == libc::S_IFDIR { 2 } else { 1 };
    // Inode, mode, uid, gid, links, time, size, device (major, minor), special (major, minor), length of the name with
    // its NUL, checksum (of another format).
    let (size, name) = (bytes.len() as u32, path.len() as u32 + 1);
    let fields = [inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name, 0];
    out.extend(b"070701");
    fields
        .iter()
        .for_each(|field| out.extend(format!("{field:08X}").as_bytes()));
    out.extend(path.as_bytes());
    out.push(0);
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend(bytes);
    out.resize(out.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_of_an_archive() {
        let mut entries = BTreeMap::new();
        entries.insert("a".to_owned(), Entry::Folder);
        let bytes = b"hello".to_vec();
        entries.insert("a/b".to_owned(), Entry::File { mode: 0o755, bytes });
        let text = String::from_utf8(archive(&entries)).unwrap();
        let folder = "070701000000010000\
                      41ED00000000000000000000000200000000000000000000000000000000000000000000000000000002\
                      00000000a\0";
        assert!(text.starts_with(folder), "{text}");
        // 110 bytes of header and 2 of name are 112, a multiple of 4.
        let file = "070701000000020000\
                    81ED00000000000000000000000100000000000000050000000000000000000000000000000000000004\
                    00000000a/b\0\0\0hello\0\0\x00070701";
        assert_eq!(&text[112..112 + file.len()], file);
        assert!(text.ends_with("TRAILER!!!\0\0\0\0"), "{text}");
        assert_eq!(text.len() % 4, 0);
    }
}
