//! Start-up in a container: from the exec of its process to the first packet received back, ours and DPDK's on the same
//! back-end, each in a container that crun makes of what `usernic container` printed. The runtime's own share, from its
//! start to that exec, is told apart.
//!
//! DPDK gets what it needs beyond that: 512 MiB of huge pages in place of 2, and no system call filter.

use std::fs;
use std::os::unix::fs::{chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::startup::{self, Reflector};
use super::worker::monotonic;
use crate::peers::engine::{self, Engine, Kind};
use crate::peers::{is_root, which};
use crate::process;

const LIMIT: Duration = Duration::from_secs(30);

/// The user inside.
const NOBODY: u32 = 65534;

/// What a start took, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// From the engine's start to the exec of the container's process.
    pub runtime_ms: f64,
    /// From that exec to the first packet that came back.
    pub first_packet_ms: f64,
}

/// Who starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// Our worker.
    Ours,
    /// The DPDK program.
    Dpdk,
}

/// The engine, the back-end and what containers are made of.
pub struct Contained {
    engine: Engine,
    reflector: Reflector,
    dir: PathBuf,
    probe: PathBuf,
    printed: Value,
    cpus: (usize, usize),
    count: usize,
}

/// Why no container can be had here, if so.
pub fn lacking() -> Result<Option<String>> {
    if !is_root() || which("crun").is_none() {
        return Ok(Some("containers need root and crun: cargo xtask peers".into()));
    }
    engine::lacking()
}

/// The `usernic` program, which prints what a container is made of.
pub fn usernic(root: &Path) -> Result<PathBuf> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(["build", "--release", "--quiet", "--package", "usernic-cli"]);
    command.current_dir(root);
    process::run("cargo build", command, Duration::from_secs(900))?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    Ok(target.join("release/usernic"))
}

/// What a container runs first: says when, and becomes the program. Both have it before them.
pub fn stamp(cpu: usize, command: &[String]) -> Result<()> {
    let [program, arguments @ ..] = command else {
        bail!("no program to become")
    };
    super::cores::pin(cpu)?;
    println!("exec {}", monotonic());
    Err(Command::new(program).args(arguments).exec()).with_context(|| program.clone())
}

impl Contained {
    /// Starts the back-end and makes what containers need below `dir`; `usernic` is the built program, `probe` DPDK's.
    pub fn new(dir: &Path, cpus: (usize, usize), usernic: &Path, probe: PathBuf) -> Result<Self> {
        let folder = dir.join("port");
        fs::create_dir_all(&folder)?;
        chown(&folder, Some(NOBODY), Some(NOBODY))?;
        let reflector = Reflector::start(&folder, cpus)?;
        // Else only root could connect.
        chown(reflector.socket(), Some(NOBODY), Some(NOBODY))?;
        let rootfs = dir.join("rootfs");
        for name in ["usr", "etc", "proc", "dev", "sys", "run"] {
            fs::create_dir_all(rootfs.join(name))?;
        }
        for link in ["lib", "lib64", "bin", "sbin"] {
            symlink(format!("usr/{link}"), rootfs.join(link))?;
        }
        let port = format!(
            "virtio-user,path={},memory=memfd-huge,queue_size=256",
            reflector.socket().display()
        );
        let mut command = Command::new(usernic);
        command.args(["container", "--format", "oci", "--port", &port, "--rootfs"]);
        command.arg(&rootfs).args(["--", "usernic"]);
        let printed = process::run("usernic container", command, LIMIT)?;
        let mut printed: Value = serde_json::from_str(&printed).with_context(|| printed.clone())?;
        let mounts = printed["mounts"].as_array_mut().context("no mounts")?;
        let own = std::env::current_exe()?;
        let mut shown = vec![Path::new("/usr"), Path::new("/etc")];
        shown.extend([own.as_path(), probe.as_path()].iter().filter_map(|p| p.parent()));
        for path in shown {
            mounts.push(json!({"destination": path, "type": "bind", "source": path, "options": ["rbind", "ro"]}));
        }
        let engine = dir.join("engine");
        fs::create_dir_all(&engine)?;
        Ok(Contained {
            engine: Engine::start(Kind::Crun, &engine)?,
            reflector,
            dir: dir.to_owned(),
            probe,
            printed,
            cpus,
            count: 0,
        })
    }

    fn config(&self, who: Who) -> Result<Value> {
        let mut config = self.printed.clone();
        let socket = self.reflector.socket();
        let command = match who {
            Who::Ours => {
                let spec = format!("virtio-user,path={},memory=memfd-huge,queue_size=256", socket.display());
                super::ours::worker_command("first", &spec, self.cpus)?
            }
            Who::Dpdk => {
                config["linux"]["resources"]["hugepageLimits"][0]["limit"] = json!(512u64 << 20);
                config["linux"].as_object_mut().context("no linux")?.remove("seccomp");
                startup::contained_probe_command(&self.probe, socket, self.cpus.0)
            }
        };
        let text = |text: &std::ffi::OsStr| text.to_str().map(str::to_owned).context("a path is not UTF-8");
        let own = std::env::current_exe()?;
        let mut line = vec![text(own.as_os_str())?];
        line.extend(["bench-worker", "stamp", "--cpu", &self.cpus.0.to_string(), "--"].map(str::to_owned));
        line.push(text(command.get_program())?);
        for argument in command.get_args() {
            line.push(text(argument)?);
        }
        config["process"]["args"] = json!(line);
        Ok(config)
    }

    /// One container, to its end.
    pub fn once(&mut self, who: Who) -> Result<Start> {
        self.count += 1;
        let name = format!("xt{}-start{}", std::process::id(), self.count);
        let out = self.dir.join("out");
        let config = self.config(who)?.to_string();
        let before = monotonic();
        let mut process = self.engine.spawn(&name, &config, &out)?;
        let status = process.wait(LIMIT)?;
        let text = fs::read_to_string(&out)?;
        ensure!(
            status.success(),
            "{who:?} in a container: {}: {text}{}",
            process::describe(status),
            process.tail()
        );
        let at = |word: &str| -> Result<u64> {
            let number = text.lines().find_map(|line| line.strip_prefix(word));
            let number = number.with_context(|| format!("{who:?} in a container says no \"{word}\": {text}"))?;
            Ok(number.trim().parse()?)
        };
        let (exec, first) = (at("exec ")?, at("first ")?);
        Ok(Start {
            runtime_ms: (exec - before) as f64 / 1e6,
            first_packet_ms: (first - exec) as f64 / 1e6,
        })
    }
}
