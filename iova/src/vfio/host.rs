//! Where the kernel is asked: files below a root, and ioctls.

use std::ffi::{c_int, c_void};
use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Error, Ioctl, Kernel, Request};

/// The machine: its `/dev`, `/sys` and `/proc`, and its ioctls. A test prepares a folder and a kernel of its own.
#[derive(Clone)]
pub struct Host {
    root: Arc<Path>,
    ioctl: Arc<dyn Ioctl>,
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host").field("root", &self.root).finish_non_exhaustive()
    }
}

impl Default for Host {
    fn default() -> Self {
        Self::new("/", Kernel)
    }
}

impl Host {
    /// A machine whose files are below `root`.
    pub fn new(root: impl AsRef<Path>, ioctl: impl Ioctl + 'static) -> Self {
        Host {
            root: root.as_ref().into(),
            ioctl: Arc::new(ioctl),
        }
    }

    /// A path of the machine, as `sys/bus/pci`, with or without a slash at its front.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The text of a small file.
    ///
    /// # Errors
    /// Those of open(2) and read(2).
    pub fn read(&self, path: impl AsRef<Path>) -> io::Result<String> {
        fs::read(self.path(path)).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The last component of what a link points to, as sysfs names a driver or a group.
    pub fn link(&self, path: impl AsRef<Path>) -> Option<String> {
        let to = fs::read_link(self.path(path)).ok()?;
        Some(to.file_name()?.to_string_lossy().into_owned())
    }

    /// The names in a folder, sorted; none if there is no such folder.
    pub fn names(&self, path: impl AsRef<Path>) -> Vec<String> {
        let entries = fs::read_dir(self.path(path)).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// Whether there is such a file.
    pub fn exists(&self, path: impl AsRef<Path>) -> bool {
        self.path(path).exists()
    }

    /// Opens a device node to read and write. `missing` says what to do when it is not there.
    pub(super) fn open(&self, path: impl AsRef<Path>, missing: &'static str) -> Result<OwnedFd, Error> {
        let path = self.path(path);
        let error = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => return Ok(file.into()),
            Err(error) => error,
        };
        Err(match (error.kind(), error.raw_os_error()) {
            (ErrorKind::NotFound, _) => Error::NoNode { path, mend: missing },
            (ErrorKind::PermissionDenied, _) => {
                let (uid, gid, mode) =
                    fs::metadata(&path).map_or((0, 0, 0), |meta| (meta.uid(), meta.gid(), meta.mode() & 0o777));
                Error::NodeRefused {
                    path,
                    uid,
                    gid,
                    mode,
                    user: rustix::process::geteuid().as_raw(),
                    source: error,
                }
            }
            (_, Some(libc::EBUSY)) => Error::NodeBusy { path },
            _ => Error::System {
                tried: format!("open {}", path.display()),
                source: error,
            },
        })
    }

    /// An ioctl with a structure.
    ///
    /// # Safety
    /// `T` is the structure of `request`, or begins with it, and its `argsz` or `size` is no more than the size of `T`.
    /// What it points to (an address, a descriptor) is as the request says.
    ///
    /// # Errors
    /// Those of the call.
    pub unsafe fn call<T: ?Sized>(&self, fd: BorrowedFd<'_>, request: Request, arg: &mut T) -> io::Result<c_int> {
        // SAFETY: the caller's promise.
        unsafe { self.ioctl.ioctl(fd, request, (&raw mut *arg).cast::<c_void>()) }
    }

    /// An ioctl with a number.
    ///
    /// # Safety
    /// `request` takes a number, or nothing.
    ///
    /// # Errors
    /// Those of the call.
    pub unsafe fn call_number(&self, fd: BorrowedFd<'_>, request: Request, arg: u32) -> io::Result<c_int> {
        let arg = std::ptr::without_provenance_mut(arg as usize);
        // SAFETY: the caller's promise.
        unsafe { self.ioctl.ioctl(fd, request, arg) }
    }
}
