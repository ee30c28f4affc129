//! A run's own directory and hugepages, given back however the run ends.
//!
//! A second process, the sentinel, reserves the pages and waits for the end of its standard input, which comes when we
//! end: by return, by a signal, or by SIGKILL. Then it gives the pages back and removes the directory.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};

use anyhow::{Context as _, Result, bail};
use rustix::fs::FlockOperation;

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Directory and pages of one run.
pub struct Scratch {
    dir: PathBuf,
    pages: usize,
    sentinel: Child,
    stdin: Option<ChildStdin>,
}

impl Scratch {
    /// Makes the directory (short, so that socket paths fit in 107 bytes) and reserves `pages` hugepages of 2 MiB, as
    /// many of them as the machine lets us: see [`Scratch::pages`].
    pub fn new(pages: usize) -> Result<Self> {
        // What is made from here on is for other users, too, whatever the caller's shell has set.
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
        let dir = tempfile::Builder::new()
            .prefix("xt")
            .tempdir_in("/tmp")
            .context("a directory below /tmp")?
            .keep();
        // Other users' processes (the unprivileged suite, OVS) reach their sockets through it.
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755))?;
        let mut command = Command::new(std::env::current_exe()?);
        command
            .arg("sentinel")
            .arg("--pages")
            .arg(pages.to_string())
            .arg("--remove")
            .arg(&dir);
        // A group of its own: a Ctrl-C on the terminal is not for the sentinel.
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut sentinel = command.spawn().context("the sentinel does not start")?;
        let stdin = sentinel.stdin.take();
        let mut line = String::new();
        if let Some(stdout) = sentinel.stdout.take() {
            BufReader::new(stdout).read_line(&mut line)?;
        }
        let pages = line
            .trim()
            .parse()
            .with_context(|| format!("the sentinel answered {line:?}"))?;
        Ok(Scratch {
            dir,
            pages,
            sentinel,
            stdin,
        })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Makes a directory in it.
    pub fn subdir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.dir.join(name);
        fs::create_dir_all(&dir)?;
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755))?;
        Ok(dir)
    }

    /// Hugepages of 2 MiB that are reserved for us.
    pub fn pages(&self) -> usize {
        self.pages
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        self.stdin = None;
        let _ = self.sentinel.wait();
    }
}

/// The sentinel's own main: reserves, answers with the number, waits for the end of standard input, cleans up.
pub fn sentinel(pages: usize, remove: &Path) -> Result<()> {
    // Whatever ends our parent must not end us first.
    let _signals = signal_hook::iterator::Signals::new([libc::SIGINT, libc::SIGTERM, libc::SIGHUP])?;
    if !(remove.starts_with("/tmp/") && remove.components().count() == 3) {
        bail!("{} is not a run's directory", remove.display());
    }
    let got = if pages == 0 {
        0
    } else {
        change_pool(Path::new(POOL), pages as i64).unwrap_or(0)
    };
    println!("{got}");
    std::io::stdout().flush()?;
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    if got > 0 {
        change_pool(Path::new(POOL), -got)?;
    }
    match fs::remove_dir_all(remove) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).context(remove.display().to_string()),
        _ => Ok(()),
    }
}

/// Adds pages to the pool in this folder of /sys, or takes some away, and says how many it was. Others may do the same: we
/// add to what is there, under a lock, rather than to write what we once saw. Pages in use at that time leave the pool when
/// they are freed; until then nr_hugepages counts them, as surplus. Writing them back would make them stay.
fn change_pool(pool: &Path, by: i64) -> Result<i64> {
    let path = pool.join("nr_hugepages");
    let mut file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .with_context(|| path.display().to_string())?;
    rustix::fs::flock(&file, FlockOperation::LockExclusive)?;
    let number = |name: &str| -> Result<i64> { Ok(fs::read_to_string(pool.join(name))?.trim().parse()?) };
    let persistent = || Ok::<_, anyhow::Error>(number("nr_hugepages")? - number("surplus_hugepages")?);
    let before = persistent()?;
    file.write_all((before + by).max(0).to_string().as_bytes())?;
    Ok(persistent()? - before)
}

/// Hugepages of 2 MiB that nobody uses.
pub fn free_pages() -> usize {
    fs::read_to_string(format!("{POOL}/free_hugepages"))
        .ok()
        .and_then(|s| s.trim().parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A page that is in use when its owner gives it back belongs to nobody: the next run does not keep it.
    #[test]
    fn pages_that_are_leaving_the_pool_leave_it() {
        let pool = tempfile::tempdir().expect("a folder");
        let number = |name: &str| fs::read_to_string(pool.path().join(name)).expect("a file");
        for (name, value) in [("nr_hugepages", "1"), ("surplus_hugepages", "1")] {
            fs::write(pool.path().join(name), value).expect("a file");
        }
        let _ = change_pool(pool.path(), 8);
        assert_eq!(number("nr_hugepages"), "8");
    }
}
