//! Mounts, from `/proc/self/mountinfo`, and files in those of hugetlbfs.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use hugemem::PageSize;
use rustix::fs::{AtFlags, Mode, OFlags, open, openat, statfs, unlinkat};
use rustix::io::Errno;

use super::limits::read;

/// A line of mountinfo, as far as it matters here. See `proc_pid_mountinfo(5)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    /// The directory of the file system that is mounted.
    pub(super) root: PathBuf,
    /// Where.
    pub(crate) path: PathBuf,
    pub(crate) kind: String,
    /// Options of the mount, then of the file system, separated by commas.
    options: String,
}

impl Mount {
    /// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`
    fn parse(line: &[u8]) -> Option<Mount> {
        let mut fields = line.split(|&byte| byte == b' ');
        let mut next = || fields.next();
        let (_id, _parent, _device) = (next()?, next()?, next()?);
        let (root, path, own) = (next()?, next()?, next()?);
        // Optional fields, then a dash.
        while next()? != b"-" {}
        let (kind, _source, of_fs) = (next()?, next()?, next()?);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Some(Mount {
            root: unescape(root),
            path: unescape(path),
            kind: text(kind),
            options: format!("{},{}", text(own), text(of_fs)),
        })
    }

    /// Whether it has this option.
    pub(crate) fn has(&self, option: &str) -> bool {
        self.options.split(',').any(|o| o == option)
    }

    /// The page size of a hugetlbfs, from its options: `pagesize=2M`.
    pub(crate) fn page(&self) -> Option<PageSize> {
        PageSize::huge(usize::try_from(self.bytes("pagesize=")?).ok()?)
    }

    /// The `size=` of a hugetlbfs in bytes, if it has one.
    pub(crate) fn size(&self) -> Option<u64> {
        self.bytes("size=")
    }

    /// The value of an option that is a number of bytes, with a suffix or without: `2M`.
    fn bytes(&self, option: &str) -> Option<u64> {
        let value = self.options.split(',').find_map(|o| o.strip_prefix(option))?;
        let digits = value.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let shift = match &value[digits.len()..] {
            "" => 0,
            "K" | "k" => 10,
            "M" | "m" => 20,
            "G" | "g" => 30,
            _ => return None,
        };
        digits.parse::<u64>().ok()?.checked_mul(1 << shift)
    }
}

/// Spaces, tabs, newlines and backslashes are written as `\040`, in octal.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail
            .get(..3)
            .filter(|digits| first == b'\\' && digits.iter().all(|d| (b'0'..=b'7').contains(d)));
        match octal {
            Some(digits) => {
                bytes.push(
                    digits
                        .iter()
                        .fold(0, |value: u8, digit| value.wrapping_mul(8).wrapping_add(digit - b'0')),
                );
                rest = &tail[3..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

/// All mounts of this process. Lines that are none are left out.
pub(crate) fn mounts(root: &Path) -> Vec<Mount> {
    let text = read(&root.join("proc/self/mountinfo")).unwrap_or_default();
    text.split(|&byte| byte == b'\n').filter_map(Mount::parse).collect()
}

/// The mounts of hugetlbfs that are not read-only, those first that waste least on `len` bytes; among equals, that with
/// the larger pages.
pub(crate) fn huge_mounts(root: &Path, len: usize) -> Vec<Mount> {
    let mut found = mounts(root);
    found.retain(|mount| mount.kind == "hugetlbfs" && !mount.has("ro") && mount.page().is_some());
    found.sort_by_key(|mount| {
        let page = mount.page().unwrap_or(PageSize::BASE).bytes();
        (
            len.checked_next_multiple_of(page).unwrap_or(usize::MAX),
            std::cmp::Reverse(page),
        )
    });
    found
}

/// What a directory's file system says of itself.
pub(crate) struct HugeStat {
    pub(crate) page: PageSize,
    /// Pages that a `size=` still allows; `None` without one.
    pub(crate) free: Option<u64>,
}

/// `statfs(2)`.
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// Asks a directory; `None` if it is not on a hugetlbfs.
pub(crate) fn huge_stat(dir: &Path) -> io::Result<Option<HugeStat>> {
    let stat = statfs(dir)?;
    if stat.f_type as u64 & 0xffff_ffff != HUGETLBFS_MAGIC {
        return Ok(None);
    }
    let Some(page) = PageSize::huge(stat.f_bsize as usize) else {
        return Ok(None);
    };
    // Without a limit the kernel says 0 of 0; with a min_size= alone, -1.
    let limited = stat.f_blocks != 0 && (stat.f_blocks as i64) > 0;
    Ok(Some(HugeStat {
        page,
        free: limited.then_some(stat.f_bfree as u64),
    }))
}

/// A new file in `dir` that has no name.
pub(super) fn unnamed_file(dir: &Path) -> io::Result<OwnedFd> {
    let mode = Mode::RUSR | Mode::WUSR;
    match open(dir, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, mode) {
        // hugetlbfs has O_TMPFILE since Linux 5.6; before, it is as if it were not given.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => named_file(dir, mode),
        other => Ok(other?),
    }
}

/// A new file in `dir` whose name is gone at once.
fn named_file(dir: &Path, mode: Mode) -> io::Result<OwnedFd> {
    let dir = open(dir, OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    for _ in 0..16 {
        let name = format!(".usernic-{:016x}", crate::random_u64());
        match openat(
            &dir,
            &name,
            OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC,
            mode,
        ) {
            Ok(file) => {
                unlinkat(&dir, &name, AtFlags::empty())?;
                return Ok(file);
            }
            Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(Errno::EXIST.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFO: &str = "\
22 28 0:21 / /proc rw,nosuid - proc proc rw\n\
31 28 0:27 / /dev/hugepages rw,relatime shared:5 - hugetlbfs hugetlbfs rw,pagesize=2M\n\
32 28 0:28 / /mnt/1g rw,relatime - hugetlbfs none rw,pagesize=1024M,size=4294967296\n\
33 28 0:29 / /mnt/with\\040space\\134 rw - hugetlbfs none rw,uid=1000,pagesize=2M,size=8388608\n\
34 28 0:30 / /mnt/ro ro - hugetlbfs none rw,pagesize=2M\n\
35 28 0:31 /docker/x /sys/fs/cgroup/hugetlb ro master:9 master:10 - cgroup cgroup rw,hugetlb\n\
garbage\n\
36 28 0:32 / /mnt/odd rw - hugetlbfs none rw,pagesize=3M\n\
37 28 0:33 / /mnt/cut rw";

    fn root() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("proc/self")).unwrap();
        std::fs::write(root.path().join("proc/self/mountinfo"), INFO).unwrap();
        root
    }

    #[test]
    fn mountinfo_is_read_with_escapes_and_optional_fields() {
        let root = root();
        let all = mounts(root.path());
        assert_eq!(all.len(), 7, "{all:#?}");
        assert_eq!(all[3].path, Path::new("/mnt/with space\\"));
        assert_eq!(all[5].root, Path::new("/docker/x"));
        assert!(all[5].has("hugetlb") && all[5].has("ro") && !all[5].has("huge"));
        assert_eq!(mounts(Path::new("/nowhere")), []);
    }

    #[test]
    fn the_mount_that_wastes_least_comes_first() {
        let root = root();
        let paths = |len| -> Vec<_> { huge_mounts(root.path(), len).into_iter().map(|m| m.path).collect() };
        let two = ["/dev/hugepages", "/mnt/with space\\"].map(PathBuf::from);
        assert_eq!(
            paths(3 << 20),
            [&two[0], &two[1], &PathBuf::from("/mnt/1g")].map(PathBuf::clone)
        );
        // Nothing is wasted either way, so fewer pages win.
        assert_eq!(paths(1 << 30)[0], Path::new("/mnt/1g"));
    }

    #[test]
    fn files_have_no_name() {
        let dir = tempfile::tempdir().unwrap();
        let mode = Mode::RUSR | Mode::WUSR;
        for file in [unnamed_file(dir.path()).unwrap(), named_file(dir.path(), mode).unwrap()] {
            assert_eq!(rustix::fs::fstat(&file).unwrap().st_nlink, 0);
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(unnamed_file(Path::new("/nowhere")).is_err());
        assert!(huge_stat(dir.path()).unwrap().is_none());
    }

    proptest::proptest! {
        #[test]
        fn no_mountinfo_panics(line in "[ -~\\\\]{0,60}", bytes in proptest::collection::vec(0u8.., 0..80)) {
            let _ = Mount::parse(line.as_bytes()).map(|mount| mount.page());
            let _ = Mount::parse(&bytes);
            unescape(&bytes);
        }
    }
}
