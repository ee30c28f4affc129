//! crun and podman as they are installed, with what they write kept to a directory of ours.
//!
//! They run in a mount namespace of their own in which `/sys/fs/cgroup` is the cgroup2 hierarchy alone: on a machine
//! that mounts both versions they would not know which to use. `/run` is an empty one.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::process::{self, Process, Surroundings};

const LIMIT: Duration = Duration::from_secs(20);

/// Where the hierarchy is mounted in the engines' namespace.
const CGROUP: &str = "/sys/fs/cgroup";

/// Which of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Crun,
    Podman,
}

/// An engine with its namespace.
pub struct Engine {
    kind: Kind,
    dir: PathBuf,
    /// Names of containers that may be there.
    started: BTreeSet<String>,
    /// Whether the hugetlb controller was off for children of the root.
    enabled: bool,
    // Holds the mount namespace; last, so that it is there for the cleaning.
    keeper: Process,
}

impl Engine {
    /// The engine, with its files below `dir`; an error says what this machine does not let us do.
    pub fn start(kind: Kind, dir: &Path) -> Result<Self> {
        let script = format!(
            "mount --make-rprivate / && {{ umount -l {CGROUP} || true; }} && mount -t cgroup2 none {CGROUP} \
             && mount -t tmpfs none /run && echo ready && exec sleep infinity"
        );
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", &script]);
        let no_stdin = Surroundings {
            no_stdin: true,
            ..Default::default()
        };
        let mut keeper = Process::spawn("mount namespace", command, &no_stdin)?;
        keeper.wait_for("ready", 0, LIMIT)?;
        let mut engine = Engine {
            kind,
            dir: dir.to_owned(),
            started: BTreeSet::new(),
            enabled: false,
            keeper,
        };
        if kind == Kind::Podman {
            engine.configure_podman()?;
        }
        let now = engine.shell("cgroup", &format!("cat {CGROUP}/cgroup.subtree_control"))?;
        engine.enabled = now.split_whitespace().any(|c| c == "hugetlb");
        Ok(engine)
    }

    fn configure_podman(&self) -> Result<()> {
        let dir = self.dir.display();
        // Its rules for devices are a program that the kernel only loads for those who may raise their own limits, and its
        // own numbers of processes and files may be above root's: neither is what is tested. crun's containers show
        // cgroups.
        fs::write(
            self.dir.join("containers.conf"),
            "[containers]\ncgroups = \"disabled\"\nlog_driver = \"none\"\n\
             default_ulimits = [\"nproc=4096:4096\", \"nofile=1024:1024\"]\n[engine]\ncgroup_manager = \"cgroupfs\"\n\
             events_logger = \"none\"\nruntime = \"crun\"\n",
        )?;
        fs::write(
            self.dir.join("storage.conf"),
            format!("[storage]\ndriver = \"vfs\"\nrunroot = \"{dir}/runroot\"\ngraphroot = \"{dir}/graph\"\n"),
        )?;
        Ok(())
    }

    /// A command line in the engines' namespace.
    fn command(&self, line: &str) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--mount=/proc/{}/ns/mnt", self.keeper.pid()))
            .args(["--", "sh", "-c", line]);
        command
            .env("CONTAINERS_CONF", self.dir.join("containers.conf"))
            .env("CONTAINERS_STORAGE_CONF", self.dir.join("storage.conf"));
        command
    }

    /// Starts a command line there, with a standard input that stays open.
    pub fn run(&self, name: &str, line: &str) -> Result<Process> {
        Process::spawn(name, self.command(line), &Surroundings::default())
    }

    /// Runs a command line there to its end.
    pub fn shell(&self, name: &str, line: &str) -> Result<String> {
        process::run(name, self.command(line), LIMIT)
    }

    /// Runs a container from what `usernic container` printed, until it ends; its standard output goes to `output`.
    pub fn spawn(&mut self, name: &str, printed: &str, output: &Path) -> Result<Process> {
        self.started.insert(name.to_owned());
        let line = match self.kind {
            Kind::Podman => format!("exec {printed} > {}", output.display()),
            Kind::Crun => {
                let bundle = self.dir.join(name);
                fs::create_dir_all(&bundle)?;
                fs::write(bundle.join("config.json"), printed)?;
                format!(
                    "exec {} run --bundle {} {name} > {}",
                    self.crun(),
                    bundle.display(),
                    output.display()
                )
            }
        };
        let no_stdin = Surroundings {
            no_stdin: true,
            ..Default::default()
        };
        Process::spawn(name, self.command(&line), &no_stdin).context(line)
    }

    fn crun(&self) -> String {
        format!(
            "crun --cgroup-manager=cgroupfs --root {}",
            self.dir.join("state").display()
        )
    }

    /// The first process of a running container.
    pub fn pid(&self, name: &str) -> Result<u32> {
        let text = match self.kind {
            Kind::Crun => self.shell("crun state", &format!("{} state {name}", self.crun()))?,
            Kind::Podman => self.shell(
                "podman inspect",
                &format!("podman inspect --format '{{{{json .State}}}}' {name}"),
            )?,
        };
        let state: serde_json::Value = serde_json::from_str(text.trim()).with_context(|| text.clone())?;
        let pid = state["pid"].as_u64().or(state["Pid"].as_u64());
        let pid = pid.filter(|pid| *pid > 0).with_context(|| text.clone())?;
        Ok(u32::try_from(pid)?)
    }

    /// What the hierarchy's file says.
    pub fn cgroup(&self, file: &str) -> Result<String> {
        self.shell("cgroup", &format!("cat {CGROUP}/{file}"))
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        for name in &self.started {
            let line = match self.kind {
                Kind::Crun => format!("{} delete --force {name}", self.crun()),
                Kind::Podman => format!("podman rm --force --time 0 {name}"),
            };
            let _ = self.shell("cleaning", &line);
        }
        if !self.enabled {
            let _ = self.shell("cleaning", &format!("echo -hugetlb > {CGROUP}/cgroup.subtree_control"));
        }
        self.keeper.kill();
    }
}

/// A root file system of a program and the libraries that it needs.
pub fn root_file_system(dir: &Path, program: &Path, files: &[&Path]) -> Result<()> {
    fs::create_dir_all(dir.join("usr/bin"))?;
    fs::copy(program, dir.join("usr/bin/usernic"))?;
    let mut ldd = Command::new("ldd");
    ldd.arg(program);
    let libraries = process::run("ldd", ldd, LIMIT)?;
    let mut count = 0;
    for path in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
        let to = dir.join(&path[1..]);
        fs::create_dir_all(to.parent().context("a library has a folder")?)?;
        fs::copy(path, &to).with_context(|| path.to_owned())?;
        count += 1;
    }
    ensure!(count > 1, "ldd named no libraries: {libraries}");
    for file in files {
        fs::copy(file, dir.join(file.file_name().context("a file has a name")?))?;
    }
    for folder in ["proc", "dev", "sys", "run", "etc"] {
        fs::create_dir_all(dir.join(folder))?;
    }
    Ok(())
}

/// Why no engine can run here, if so.
pub fn lacking() -> Result<Option<String>> {
    let probe = Command::new("unshare")
        .args(["--mount", "true"])
        .output()
        .context("unshare")?;
    if !probe.status.success() {
        return Ok(Some("this machine allows no mount namespace".into()));
    }
    let kinds = fs::read_to_string("/proc/filesystems")?;
    if !kinds.lines().any(|line| line.ends_with("cgroup2")) {
        return Ok(Some("this kernel has no cgroup2".into()));
    }
    // name, hierarchy (0: that of version 2, or none), cgroups, enabled
    let controllers = fs::read_to_string("/proc/cgroups")?;
    let hugetlb = controllers.lines().find(|line| line.starts_with("hugetlb\t"));
    let fields: Vec<&str> = hugetlb.unwrap_or_default().split('\t').collect();
    if fields.get(1) != Some(&"0") || fields.get(3) != Some(&"1") {
        return Ok(Some("cgroup2 has no hugetlb controller here".into()));
    }
    Ok(None)
}

/// Fails if `text` has no line of this key with this value, as in `/proc/PID/status`.
pub fn status_has(text: &str, key: &str, value: &str) -> Result<()> {
    let found = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    match found.map(|found| found.split_whitespace().collect::<Vec<_>>().join(" ")) {
        Some(found) if found == value => Ok(()),
        found => bail!("{key} is {found:?}, not {value}"),
    }
}
