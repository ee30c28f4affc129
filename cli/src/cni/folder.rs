//! The folders of attachments: what containers mount, and the plugin's only memory.
//!
//! ```text
//! /run/usernic-cni/                    root's
//!   3fa0.../                           a pod, by its number, or a container: what is mounted at /run/usernic
//!     net1/                            the user's that the container runs as, and the switch's group may write
//!       attachment.json                whose it is: there since the folder has this name
//!       port.json                      what `auto` finds
//!       sock                           the switch's socket, or the container's
//! ```
//!
//! A folder is made under another name, and gets its own when it knows whose it is. So whoever finds a folder knows what
//! to undo, whenever the one who made it was killed.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use usernic::vhost_user::MAX_PATH;

use super::config::Attachment;
use crate::cmd::switch::service::replace;

/// The socket's name.
const SOCKET: &str = "sock";
const WHOSE: &str = "attachment.json";

/// An attachment's folder, there or not.
#[derive(Clone, Debug)]
pub struct Folder {
    path: PathBuf,
}

/// Whose a folder is.
fn whose(folder: &Path) -> Option<Attachment> {
    serde_json::from_slice(&fs::read(folder.join(WHOSE)).ok()?).ok()
}

/// Every folder below `dir`, with whose it is.
pub fn all(dir: &Path) -> Result<Vec<(Folder, Attachment)>> {
    let mut found = Vec::new();
    for pod in entries(dir)? {
        for path in entries(&pod)? {
            if let Some(attachment) = whose(&path) {
                found.push((Folder { path }, attachment));
            }
        }
    }
    Ok(found)
}

/// The folders in a folder; none if it is not there.
fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let read = match fs::read_dir(dir) {
        Ok(read) => read,
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(Vec::new()),
        Err(e) => return Err(e).with_context(|| dir.display().to_string()),
    };
    let folder = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    Ok(read.flatten().filter(folder).map(|entry| entry.path()).collect())
}

impl Folder {
    /// Where an interface of a pod has its folder. An error if its socket could not be named.
    pub fn of(dir: &Path, pod: &str, attachment: &Attachment) -> Result<Self> {
        let path = dir.join(pod).join(&attachment.to.interface);
        let len = path.join(SOCKET).as_os_str().len();
        if len > MAX_PATH {
            bail!(
                "the port's socket would be {}, of {len} bytes; a socket's path has at most {MAX_PATH}: take a shorter dir",
                path.join(SOCKET).display()
            );
        }
        Ok(Folder { path })
    }

    /// Makes it; whose it is stands in it from the beginning.
    pub fn make(&self, attachment: &Attachment) -> Result<()> {
        if whose(&self.path).as_ref() == Some(attachment) {
            return Ok(());
        }
        let pod = self.path.parent().context("a folder in a pod's")?;
        let new = pod.join(new_name(attachment));
        let make = || -> Result<()> {
            fs::DirBuilder::new().recursive(true).mode(0o755).create(pod)?;
            remove_all(&new)?;
            fs::DirBuilder::new().mode(0o700).create(&new)?;
            fs::write(new.join(WHOSE), serde_json::to_vec(attachment)?)?;
            fs::rename(&new, &self.path)?;
            Ok(())
        };
        make().with_context(|| format!("making {}", self.path.display()))
    }

    /// Gives it to the container's user; the switch, whose group it gets, may make its socket in it. With `writable`
    /// the container may, too.
    pub fn hand_over(&self, uid: u32, gid: u32, writable: bool) -> Result<()> {
        let mode = if writable { 0o770 } else { 0o570 };
        let give = || -> std::io::Result<()> {
            std::os::unix::fs::chown(&self.path, Some(uid), Some(gid))?;
            fs::set_permissions(&self.path, fs::Permissions::from_mode(mode))
        };
        give().with_context(|| format!("giving {} to user {uid} and group {gid}", self.path.display()))
    }

    /// The socket.
    pub fn socket(&self) -> PathBuf {
        self.path.join(SOCKET)
    }

    /// What `auto` finds, if it was written.
    pub fn config(&self) -> Option<usernic::auto::PortConfig> {
        serde_json::from_slice(&fs::read(self.path.join(usernic::auto::FILE)).ok()?).ok()
    }

    /// Writes what `auto` finds.
    pub fn write_config(&self, config: &usernic::auto::PortConfig) -> Result<()> {
        let path = self.path.join(usernic::auto::FILE);
        replace(&path, &serde_json::to_vec_pretty(config)?)?;
        let readable = fs::Permissions::from_mode(0o644);
        fs::set_permissions(&path, readable).with_context(|| path.display().to_string())
    }

    /// Whose it is.
    pub fn whose(&self) -> Option<Attachment> {
        whose(&self.path)
    }

    /// Removes it, and the pod's folder with the last of its interfaces.
    pub fn remove(&self) -> Result<()> {
        remove_all(&self.path)?;
        if let Some(pod) = self.path.parent() {
            // Other interfaces may be in it.
            let _ = fs::remove_dir(pod);
        }
        Ok(())
    }
}

fn new_name(attachment: &Attachment) -> String {
    format!(".new-{:014x}", attachment.number())
}

/// Removes all folders of an attachment, made or half made.
pub fn remove(dir: &Path, attachment: &Attachment) -> Result<()> {
    for pod in entries(dir)? {
        remove_all(&pod.join(new_name(attachment)))?;
        for path in entries(&pod)? {
            match whose(&path) {
                Some(other) if other != *attachment => {}
                Some(_) => remove_all(&path)?,
                // Somebody was killed at the end of removing it. Only an empty one goes: those that are being made have
                // another name.
                None if path.ends_with(&attachment.to.interface) => drop(fs::remove_dir(&path)),
                None => {}
            }
        }
        let _ = fs::remove_dir(pod);
    }
    Ok(())
}

/// Removes what somebody who was killed left without a word whose it was. What is being made now is younger.
pub fn remove_abandoned(dir: &Path) -> Result<()> {
    const OLD: Duration = Duration::from_secs(600);
    for pod in entries(dir)? {
        for path in entries(&pod)? {
            let age = fs::metadata(&path)
                .and_then(|data| data.modified())
                .map(|time| time.elapsed());
            if whose(&path).is_none() && age.is_ok_and(|age| age.is_ok_and(|age| age > OLD)) {
                remove_all(&path)?;
                let _ = fs::remove_dir(&pod);
            }
        }
    }
    Ok(())
}

/// The file that says whose it is goes last: who is killed before has left something that is found again.
fn remove_all(path: &Path) -> Result<()> {
    let remove = || -> std::io::Result<()> {
        let entries = match fs::read_dir(path) {
            Ok(entries) => entries,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(e),
        };
        for entry in entries {
            let entry = entry?;
            if entry.file_name() == WHOSE {
                continue;
            }
            if entry.file_type()?.is_dir() {
                fs::remove_dir_all(entry.path())?;
            } else {
                fs::remove_file(entry.path())?;
            }
        }
        fs::remove_dir_all(path)
    };
    match remove() {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(e).with_context(|| format!("removing {}", path.display())),
        _ => Ok(()),
    }
}
