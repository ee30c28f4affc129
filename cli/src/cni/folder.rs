//! The folders of attachments, and the plugin's records of them.
//!
//! ```text
//! /run/usernic-cni/                root's
//!   .attachments/                  root's alone, and mounted into no container
//!     3fa0...:net1                 the record of the folder below: whose it is, and which addresses it was given
//!   3fa0.../                       a pod, by its number, or a container: what is mounted at /run/usernic
//!     net1/                        the user's that the container runs as, and the switch's group may write
//!       port.json                  what `auto` finds
//!       sock                       the switch's socket, or the container's
//! ```
//!
//! The record is there before its folder and goes after it, so that whoever finds a record knows what to undo, whenever
//! the call that made it was killed.
//!
//! The container owns its folder, and may be root itself: it can put anything there. So the plugin believes nothing that
//! it finds in the folder, opens no file in it, and follows no link there: all is done by the folder's descriptor.

use std::ffi::CString;
use std::fs;
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, fchmod, fchown, mkdirat, open, openat, renameat, unlinkat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use usernic::auto::{FILE, PortConfig};
use usernic::vhost_user::MAX_PATH;

use super::config::Attachment;

/// The socket's name.
pub const SOCKET: &str = "sock";
/// The folder of records. No pod is called so: names begin with a letter or a digit.
const RECORDS: &str = ".attachments";

/// What is known of a folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Whose the folder is.
    #[serde(flatten)]
    pub attachment: Attachment,
    /// What the address plugin gave.
    pub given: Option<Value>,
}

/// An attachment's folder, there or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folder {
    dir: PathBuf,
    pod: String,
    interface: String,
}

/// Every folder below `dir` that is recorded.
pub fn all(dir: &Path) -> Result<Vec<(Folder, Record)>> {
    let records = dir.join(RECORDS);
    let read = match fs::read_dir(&records) {
        Ok(read) => read,
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(Vec::new()),
        Err(e) => return Err(e).with_context(|| records.display().to_string()),
    };
    let folder = |entry: fs::DirEntry| {
        let name = entry.file_name().into_string().ok()?;
        let (pod, interface) = name.split_once(':')?;
        let folder = Folder {
            dir: dir.to_owned(),
            pod: pod.to_owned(),
            interface: interface.to_owned(),
        };
        // One that is being written has a dot before its name.
        let record = folder.record().filter(|_| !pod.starts_with('.'))?;
        Some((folder, record))
    };
    Ok(read.flatten().filter_map(folder).collect())
}

impl Folder {
    /// Where an interface of a pod has its folder. An error if its socket could not be named.
    pub fn of(dir: &Path, pod: &str, attachment: &Attachment) -> Result<Self> {
        let folder = Folder {
            dir: dir.to_owned(),
            pod: pod.to_owned(),
            interface: attachment.to.interface.clone(),
        };
        let (socket, len) = (folder.socket(), folder.socket().as_os_str().len());
        if len > MAX_PATH {
            bail!(
                "the port's socket would be {}, of {len} bytes; a socket's path has at most {MAX_PATH}: take a shorter dir",
                socket.display()
            );
        }
        Ok(folder)
    }

    fn pod(&self) -> PathBuf {
        self.dir.join(&self.pod)
    }

    fn path(&self) -> PathBuf {
        self.pod().join(&self.interface)
    }

    /// The socket.
    pub fn socket(&self) -> PathBuf {
        self.path().join(SOCKET)
    }

    /// What the container's `auto` reads.
    pub fn config(&self) -> PathBuf {
        self.path().join(FILE)
    }

    /// What is known of it.
    pub fn record(&self) -> Option<Record> {
        serde_json::from_slice(&fs::read(self.record_path("")).ok()?).ok()
    }

    fn record_path(&self, prefix: &str) -> PathBuf {
        let name = format!("{prefix}{}:{}", self.pod, self.interface);
        self.dir.join(RECORDS).join(name)
    }

    /// Records whose it is, before it is made.
    pub fn keep(&self, record: &Record) -> Result<()> {
        let (new, path) = (self.record_path("."), self.record_path(""));
        let write = || -> io::Result<()> {
            let text = serde_json::to_vec(record)?;
            // Its own mode is for the last of the folders alone.
            within(&self.dir, 0o755, || Ok(()))?;
            within(&self.dir.join(RECORDS), 0o700, || {
                let mut options = fs::OpenOptions::new();
                let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&new)?;
                file.write_all(&text)?;
                fs::rename(&new, &path)
            })
        };
        let written = write().inspect_err(|_| {
            // Nothing is left where there was nothing.
            let _ = fs::remove_file(&new);
            let _ = fs::remove_dir(self.dir.join(RECORDS));
        });
        written.with_context(|| format!("writing {}", path.display()))
    }

    /// Makes it, or opens the one that is there.
    pub fn make(&self) -> Result<Opened> {
        let path = self.path();
        let make = || loop {
            match mkdirat(CWD, &path, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
            match open(&path, FOLDER, Mode::empty()) {
                // A file or a link that somebody put in its place.
                Err(Errno::NOTDIR | Errno::LOOP) => unlinkat(CWD, &path, AtFlags::empty())?,
                result => return Ok(Opened(result?)),
            }
        };
        within(&self.pod(), 0o755, make).with_context(|| format!("making {}", path.display()))
    }

    /// Whether the file of this name in it is what it should be, without a look into it.
    pub fn has(&self, path: &Path, socket: bool) -> bool {
        fs::symlink_metadata(path).is_ok_and(|data| {
            let kind = data.file_type();
            if socket { kind.is_socket() } else { kind.is_file() }
        })
    }

    /// Removes it, the pod's folder with the last of its interfaces, and its record.
    pub fn remove(&self) -> Result<()> {
        let path = self.path();
        remove_tree(&path).with_context(|| format!("removing {}", path.display()))?;
        // Other interfaces may be in it.
        let _ = fs::remove_dir(self.pod());
        self.forget()
    }

    /// Removes its record, also one that was being written.
    pub fn forget(&self) -> Result<()> {
        for path in [self.record_path("."), self.record_path("")] {
            match fs::remove_file(&path) {
                Err(e) if e.kind() != ErrorKind::NotFound && e.kind() != ErrorKind::NotADirectory => {
                    return Err(e).with_context(|| format!("removing {}", path.display()));
                }
                _ => {}
            }
        }
        // Other records may be in it.
        let _ = fs::remove_dir(self.dir.join(RECORDS));
        Ok(())
    }
}

/// A folder's descriptor: no link leads elsewhere.
const FOLDER: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// A folder that is open.
pub struct Opened(OwnedFd);

impl Opened {
    /// Writes what `auto` finds, whole or not at all.
    pub fn write_config(&self, config: &PortConfig) -> Result<()> {
        let new = format!(".{FILE}");
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let write = || -> io::Result<()> {
            match unlinkat(&self.0, &new, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
            let mut file = fs::File::from(openat(&self.0, &new, flags, Mode::from_raw_mode(0o644))?);
            file.write_all(&serde_json::to_vec_pretty(config)?)?;
            Ok(renameat(&self.0, &new, &self.0, FILE)?)
        };
        write().with_context(|| format!("writing {FILE}"))
    }

    /// Gives it to the container's user; the switch, whose group it gets, may make its socket in it. With `writable`
    /// the container may, too.
    pub fn hand_over(&self, uid: u32, gid: u32, writable: bool) -> Result<()> {
        let mode = Mode::from_raw_mode(if writable { 0o770 } else { 0o570 });
        let (user, group) = (rustix::fs::Uid::from_raw(uid), rustix::fs::Gid::from_raw(gid));
        let give = || fchown(&self.0, Some(user), Some(group)).and_then(|()| fchmod(&self.0, mode));
        give().with_context(|| format!("giving the port's folder to user {uid} and group {gid}"))
    }
}

fn make_folder(path: &Path, mode: u32) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(mode).create(path)
}

/// Makes a folder unless it is there, and then something in it. Another call may remove the folder, still empty, before.
fn within<T>(folder: &Path, mode: u32, mut make: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let mut tries = 0;
    loop {
        // A folder that was there, and is removed before it is looked at, counts as some other file that is in the way.
        let gone = |e: &io::Error| matches!(e.kind(), ErrorKind::NotFound | ErrorKind::AlreadyExists);
        match make_folder(folder, mode).and_then(|()| make()) {
            Err(e) if gone(&e) && tries < 1000 => tries += 1,
            result => return result,
        }
    }
}

/// How long the removal of a folder may take, whatever its owner put into it.
const LIMIT: Duration = Duration::from_secs(20);

/// Removes a folder and all that is in it, or a file or link of this name. No link is followed, and depth costs neither
/// descriptors nor stack: folders inside move up, one level at a time.
fn remove_tree(path: &Path) -> io::Result<()> {
    let top = match open(path, FOLDER, Mode::empty()) {
        Ok(top) => top,
        Err(Errno::NOENT) => return Ok(()),
        Err(Errno::NOTDIR | Errno::LOOP) => return Ok(unlinkat(CWD, path, AtFlags::empty())?),
        Err(error) => return Err(error.into()),
    };
    let end = Instant::now() + LIMIT;
    let mut moved = 0u64;
    loop {
        match unlinkat(CWD, path, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::NOTEMPTY | Errno::EXIST) if Instant::now() < end => {}
            Err(error) => return Err(error.into()),
        }
        freeze(top.as_fd());
        for name in names(top.as_fd())? {
            if !is_folder(top.as_fd(), &name)? || unlinkat(&top, &name, AtFlags::REMOVEDIR).is_ok() {
                continue;
            }
            let Ok(folder) = openat(&top, &name, FOLDER, Mode::empty()) else {
                continue;
            };
            freeze(folder.as_fd());
            for child in names(folder.as_fd())? {
                if is_folder(folder.as_fd(), &child)? {
                    moved += 1;
                    // If the name is taken the next round has another.
                    let _ = renameat(&folder, &child, &top, format!("{moved}"));
                }
            }
        }
    }
}

/// Whether it is a folder; whatever else is removed.
fn is_folder(at: BorrowedFd<'_>, name: &CString) -> io::Result<bool> {
    match unlinkat(at, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(false),
        Err(Errno::ISDIR | Errno::PERM) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// From now on its owner adds nothing: it is ours. Where that is not allowed it stays as it is.
fn freeze(folder: BorrowedFd<'_>) {
    let _ = fchown(folder, Some(rustix::process::geteuid()), None);
    let _ = fchmod(folder, Mode::RWXU);
}

/// Names in a folder, of very many the first.
fn names(folder: BorrowedFd<'_>) -> io::Result<Vec<CString>> {
    const MOST: usize = 4096;
    let entries = Dir::read_from(folder)?.filter_map(|entry| entry.ok());
    let names = entries.map(|entry| entry.file_name().to_owned());
    let real = names.filter(|name| name.as_bytes() != b"." && name.as_bytes() != b"..");
    Ok(real.take(MOST).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn entries(path: &Path) -> Vec<String> {
        let names = fs::read_dir(path).unwrap().flatten();
        names.map(|entry| entry.file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn whatever_is_in_a_folder_goes_and_nothing_outside_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("file"), "x").unwrap();
        let folder = dir.path().join("net1");
        fs::create_dir_all(folder.join("a/b")).unwrap();
        symlink(&outside, folder.join("link")).unwrap();
        symlink(&outside, folder.join("a/b/link")).unwrap();
        for name in ["1", "2", ".1"] {
            fs::create_dir_all(folder.join(name).join("1/2")).unwrap();
            fs::write(folder.join(name).join("1/file"), "").unwrap();
        }
        for number in 0..5000 {
            fs::write(folder.join(format!("a/{number}")), "").unwrap();
        }
        remove_tree(&folder).unwrap();
        remove_tree(&folder).unwrap();
        // A link in the folder's own place.
        symlink(&outside, &folder).unwrap();
        remove_tree(&folder).unwrap();
        assert_eq!(entries(dir.path()), ["outside"]);
        assert_eq!(entries(&outside), ["file"]);
    }

    #[test]
    fn depth_costs_no_descriptors() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("net1");
        fs::create_dir(&top).unwrap();
        // Deeper than a path can be, and than descriptors go.
        let mut at = open(&top, FOLDER, Mode::empty()).unwrap();
        for _ in 0..1500 {
            mkdirat(&at, "d", Mode::RWXU).unwrap();
            at = openat(&at, "d", FOLDER, Mode::empty()).unwrap();
        }
        drop(at);
        remove_tree(&top).unwrap();
        assert_eq!(entries(dir.path()), [""; 0]);
    }

    #[test]
    fn calls_at_the_same_time_do_not_remove_each_others_folders() {
        let dir = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for number in 0..8 {
                let dir = dir.path();
                scope.spawn(move || {
                    let text = format!(r#"{{"network":"n","containerID":"c{number}","ifname":"net{number}"}}"#);
                    let attachment: Attachment = serde_json::from_str(&text).unwrap();
                    // Interfaces of one pod.
                    let folder = Folder::of(dir, "pod", &attachment).unwrap();
                    let given = None;
                    for _ in 0..50 {
                        let attachment = attachment.clone();
                        folder
                            .keep(&Record {
                                attachment,
                                given: given.clone(),
                            })
                            .unwrap();
                        folder.make().unwrap();
                        assert!(folder.record().is_some() && folder.path().is_dir());
                        folder.remove().unwrap();
                    }
                });
            }
        });
        assert_eq!(entries(dir.path()), [""; 0]);
    }
}
