//! What it costs to have a port: time from exec to the first packet received back, memory, system calls.
//!
//! Both front-ends run against OUR back-end, which sends back what it gets: net_vhost answers its first connection only
//! after a poll of up to a second, and that second is nobody's start-up.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::protocol::Worker;
use super::worker::monotonic;
use crate::peers::{Program, testpmd};
use crate::process::{self, Process, Surroundings};

const LIMIT: Duration = Duration::from_secs(30);

/// What one start cost.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// From before fork and exec to the first packet, in milliseconds.
    pub first_packet_ms: f64,
    /// Resident memory without hugepages, in MiB: VmRSS.
    pub resident_mib: f64,
    /// Hugepages in use, in MiB.
    pub huge_mib: f64,
}

/// Who starts.
#[derive(Clone)]
pub enum Who {
    /// Our worker, with one queue pair of 256.
    Ours,
    /// The DPDK program, and where it may mount its hugetlbfs.
    Dpdk(PathBuf, Option<PathBuf>),
}

/// Compiles the DPDK program against the installed libraries.
pub fn build_probe(dir: &Path) -> Result<PathBuf> {
    let source = dir.join("dpdk_probe.c");
    std::fs::write(&source, include_str!("dpdk_probe.c"))?;
    let flags = |what: &str| -> Result<Vec<String>> {
        let mut command = Command::new("pkg-config");
        command.args([what, "libdpdk"]);
        let text = process::run("pkg-config", command, LIMIT).context("libdpdk-dev is missing: cargo xtask peers")?;
        Ok(text.split_whitespace().map(str::to_owned).collect())
    };
    let program = dir.join("dpdk_probe");
    let mut command = Command::new("gcc");
    command
        .args(["-O3", "-march=native"])
        .args(flags("--cflags")?)
        .arg(&source)
        .arg("-o")
        .arg(&program);
    command.args(flags("--libs")?);
    process::run("gcc", command, Duration::from_secs(120))?;
    Ok(program)
}

/// EAL's arguments for a front-end on `socket`.
pub fn probe_command(
    program: &Path,
    dir: &Path,
    huge: Option<&Path>,
    socket: &Path,
    cpu: usize,
    mode: &str,
) -> Command {
    let mut command = Command::new(program);
    command.env("XDG_RUNTIME_DIR", dir).env("RUNTIME_DIRECTORY", dir);
    command.args(["--lcores", &format!("0@{cpu}"), "--no-pci", "--no-telemetry"]);
    command.arg(format!("--file-prefix=xt{}probe{mode}", std::process::id()));
    match huge {
        Some(mount) => command
            .arg(format!("--huge-dir={}", mount.display()))
            .arg("--single-file-segments"),
        None => command.args(["--no-huge", "-m", "64"]),
    };
    command
        .arg(format!("--vdev={}", testpmd::virtio_user(0, socket, 256, "")))
        .args(["--", mode]);
    command
}

/// The same in a container of uid 65534 that has huge pages and nothing writable: what makes EAL start there.
pub fn contained_probe_command(program: &Path, socket: &Path, cpu: usize) -> Command {
    let mut command = Command::new(program);
    command.args(["--lcores", &format!("0@{cpu}"), "--no-pci", "--no-telemetry"]);
    command.args(["--in-memory", "--single-file-segments", "-m", "64"]);
    command
        .arg(format!("--vdev={}", testpmd::virtio_user(0, socket, 256, "")))
        .args(["--", "first"]);
    command
}

/// The back-end that all starts use, and its socket.
pub struct Reflector {
    _worker: Worker,
    socket: PathBuf,
    dir: PathBuf,
    cpus: (usize, usize),
}

impl Reflector {
    /// Starts it: its polling thread on the second CPU.
    pub fn start(dir: &Path, cpus: (usize, usize)) -> Result<Self> {
        let socket = dir.join("first.sock");
        let mut worker = super::ours::back_end("our back-end", &socket, cpus)?;
        worker.load("io")?;
        Ok(Reflector {
            _worker: worker,
            socket,
            dir: dir.to_owned(),
            cpus,
        })
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    fn command(&self, who: &Who) -> Result<(Command, Surroundings)> {
        let spec = format!("virtio-user,path={},queue_size=256", self.socket.display());
        let mut surroundings = Surroundings {
            cpus: vec![self.cpus.0],
            ..Default::default()
        };
        Ok(match who {
            Who::Ours => (super::ours::worker_command("first", &spec, self.cpus)?, surroundings),
            Who::Dpdk(program, huge) => {
                surroundings.hugetlbfs = huge.clone();
                (
                    probe_command(program, &self.dir, huge.as_deref(), &self.socket, self.cpus.0, "first"),
                    surroundings,
                )
            }
        })
    }

    /// One start and its end.
    pub fn once(&self, who: &Who) -> Result<Start> {
        let (command, surroundings) = self.command(who)?;
        let before = monotonic();
        let mut process = Process::spawn("front-end", command, &surroundings)?;
        let at = process.wait_for("first ", 0, LIMIT)?;
        process.wait_for("\n", at, LIMIT)?;
        let text = process.output_since(at);
        let first: u64 = text
            .split_whitespace()
            .next()
            .unwrap_or_default()
            .parse()
            .context("the time")?;
        let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid().as_raw_nonzero()))?;
        let kib = |key: &str| -> f64 {
            let line = status.lines().find_map(|l| l.strip_prefix(key));
            line.and_then(|l| l.split_whitespace().next())
                .and_then(|n| n.parse().ok())
                .unwrap_or(0.0)
        };
        process.close_stdin();
        process.wait_success(LIMIT)?;
        Ok(Start {
            first_packet_ms: (first - before) as f64 / 1e6,
            resident_mib: kib("VmRSS:") / 1024.0,
            huge_mib: kib("HugetlbPages:") / 1024.0,
        })
    }

    /// System calls of one start and its end, all threads, as strace counts them.
    pub fn syscalls(&self, who: &Who, tag: &str) -> Result<u64> {
        let text = self.traced(who, tag, &["-c", "-U", "calls,name"])?;
        total_calls(&text).with_context(|| format!("no total in strace's report: {text}"))
    }

    /// The files that our start looks at: what is between quotation marks in calls that take a path.
    pub fn files(&self) -> Result<Vec<String>> {
        let text = self.traced(&Who::Ours, "files", &["-e", "trace=%file"])?;
        let paths = text.lines().filter_map(|line| line.split('"').nth(1));
        Ok(paths.map(str::to_owned).collect())
    }

    /// One start and its end, all threads, under strace: what it reports.
    fn traced(&self, who: &Who, tag: &str, options: &[&str]) -> Result<String> {
        let (plain, surroundings) = self.command(who)?;
        let report = self.dir.join(format!("strace-{tag}"));
        let mut command = Command::new("strace");
        command
            .arg("-f")
            .args(options)
            .arg("-o")
            .arg(&report)
            .arg(plain.get_program())
            .args(plain.get_args());
        for (key, value) in plain.get_envs() {
            if let Some(value) = value {
                command.env(key, value);
            }
        }
        let mut process = Process::spawn("strace", command, &surroundings)?;
        process.wait_for("first ", 0, LIMIT)?;
        process.close_stdin();
        process.wait_success(LIMIT)?;
        std::fs::read_to_string(&report).with_context(|| report.display().to_string())
    }
}

/// The count in strace's line of totals: of the columns "calls" and "name".
fn total_calls(report: &str) -> Option<u64> {
    let line = report.lines().rev().find(|l| l.trim_end().ends_with(" total"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// That a DPDK front-end can be started at all, by what there is.
pub fn dpdk(dir: &Path, huge: Option<PathBuf>, testpmd: Option<&Program>) -> Result<Who> {
    if testpmd.is_none() {
        bail!("DPDK is missing: cargo xtask peers");
    }
    Ok(Who::Dpdk(build_probe(dir)?, huge))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_are_read() {
        let report = "    calls syscall\n--------- ----------------\n       12 read\n        3 write\n--------- ----------------\n       15 total\n";
        assert_eq!(total_calls(report), Some(15));
        assert_eq!(total_calls("nothing"), None);
    }
}
