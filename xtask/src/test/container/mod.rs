//! Containers by crun and podman, with exactly what `usernic container` printed: two of them exchange a capture, through
//! our switch and through OVS-DPDK. While they do, the kernel is asked what their processes may do.

mod beside;

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use super::link::path;
use super::{Case, Ctx, Need, Outcome, Usernic};
use crate::pcap;
use crate::peers::engine::{Engine, Kind, lacking, root_file_system, status_has};
use crate::peers::ovs::Ovs;
use crate::process::{self, Process};

const LIMIT: Duration = Duration::from_secs(30);

/// Frames a second: the peers, two containers and their control threads share two CPUs.
const RATE: &str = "2000";

/// The user inside.
const NOBODY: u32 = 65534;

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, kind) in [("crun", Kind::Crun), ("podman", Kind::Podman)] {
        let base = [Need::Root, Need::Usernic, Need::Hugepages, Need::Tool(name)];
        cases.push(Case::new(format!("container/{name}/our-switch"), &base, move |ctx| {
            checked(|| through_our_switch(ctx, kind))
        }));
        cases.push(Case::new(format!("container/{name}/doctor"), &base, move |ctx| {
            checked(|| doctor_inside(ctx, kind))
        }));
        let needs = [&base[..], &[Need::Ovs]].concat();
        cases.push(Case::new(format!("container/{name}/ovs"), &needs, move |ctx| {
            checked(|| through_ovs(ctx, kind))
        }));
    }
    let needs = [Need::Root, Need::Usernic, Need::Hugepages, Need::Tool("crun")];
    let both = [&needs[..], &[Need::Testpmd]].concat();
    cases.push(Case::new("container/beside-dpdk", &both, |ctx| {
        checked(|| beside::beside(ctx))
    }));
    cases.push(Case::new("container/crun/hugetlb-limit", &needs, |ctx| {
        checked(|| limit_too_small(ctx))
    }));
    cases
}

fn checked(run: impl FnOnce() -> Result<Outcome>) -> Result<Outcome> {
    match lacking()? {
        Some(reason) => Ok(Outcome::Skipped(reason)),
        None => run(),
    }
}

/// Two containers' surroundings: an engine, a root file system, a folder for each port.
struct Stage {
    engine: Engine,
    kind: Kind,
    rootfs: PathBuf,
    sent: Vec<Vec<u8>>,
    folders: [PathBuf; 2],
}

impl Stage {
    fn new(ctx: &Ctx, kind: Kind) -> Result<Self> {
        let sent = pcap::frames((0..1000).map(|i| 60 + i * 1455 / 1000));
        let input = ctx.dir.join("in.pcap");
        pcap::write(&input, &sent)?;
        let rootfs = ctx.subdir("rootfs")?;
        root_file_system(&rootfs, &ctx.usernic, &[&input])?;
        let folders = ["a", "b"].map(|name| ctx.dir.join(name));
        for folder in &folders {
            fs::create_dir_all(folder)?;
            chown(folder, Some(NOBODY), Some(NOBODY))?;
            fs::set_permissions(folder, fs::Permissions::from_mode(0o755))?;
        }
        let engine = Engine::start(kind, &ctx.subdir("engine")?)?;
        Ok(Stage {
            engine,
            kind,
            rootfs,
            sent,
            folders,
        })
    }

    /// What `usernic container` prints for this engine.
    fn printed(&self, ctx: &Ctx, name: &str, port: &str, command: &[&str]) -> Result<String> {
        let format = match self.kind {
            Kind::Crun => "oci",
            Kind::Podman => "podman",
        };
        let mut usernic = Usernic::command(ctx, &["container", "--format", format, "--port", port, "--name", name]);
        usernic.arg("--rootfs").arg(&self.rootfs).arg("--").args(command);
        let output = usernic.output()?;
        let text = String::from_utf8(output.stdout)?;
        ensure!(
            output.status.success(),
            "usernic container: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(text.trim().to_owned())
    }

    /// One container replays, the other captures; `up` when both may come up. Gives what the kernel says of them.
    fn exchange(&mut self, ctx: &Ctx, ports: [&str; 2], between: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let run = std::process::id();
        let names = [format!("xt{run}-replay"), format!("xt{run}-capture")];
        let out = ctx.dir.join("out.pcap");
        let count = self.sent.len().to_string();
        let capture = [
            "usernic", "-v", "capture", "--wait", "30", "--port", ports[1], "--pcap", "-", "--count", &count,
        ];
        let printed = self.printed(ctx, &names[1], ports[1], &capture)?;
        let mut receiver = self.engine.spawn(&names[1], &printed, &out)?;
        between()?;
        receiver.wait_for("link up", 0, LIMIT)?;
        self.prove_isolated(&names[1], &self.folders[1], ports[1])?;
        let replay = [
            "usernic", "replay", "--wait", "30", "--port", ports[0], "--pcap", "/in.pcap", "--rate", RATE, "--burst",
            "8",
        ];
        let printed = self.printed(ctx, &names[0], ports[0], &replay)?;
        let mut sender = self.engine.spawn(&names[0], &printed, &ctx.dir.join("replay.out"))?;
        sender.wait_success(LIMIT)?;
        if let Err(late) = receiver.wait_success(LIMIT) {
            let arrived = pcap::read(&out).map_or(0, |frames| frames.len());
            return Err(late.context(format!("{arrived} frames of {count} arrived")));
        }
        pcap::same(&self.sent, &pcap::read(&out)?)
    }

    /// What the kernel says of a container's process.
    fn prove_isolated(&self, name: &str, folder: &Path, port: &str) -> Result<()> {
        let pid = self.engine.pid(name)?;
        let read = |file: &str| {
            let path = format!("/proc/{pid}/{file}");
            fs::read_to_string(&path).context(path)
        };
        let status = read("status")?;
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            status_has(&status, set, "0000000000000000")?;
        }
        status_has(&status, "Uid", "65534 65534 65534 65534")?;
        status_has(&status, "Gid", "65534 65534 65534 65534")?;
        status_has(&status, "NoNewPrivs", "1")?;
        // 2: a filter. The engine's, and the program's own two.
        status_has(&status, "Seccomp", "2")?;
        let filters = status.lines().find_map(|line| line.strip_prefix("Seccomp_filters:"));
        let filters: Option<u32> = filters.and_then(|count| count.trim().parse().ok());
        ensure!(filters.is_none_or(|count| count >= 3), "{name} has {filters:?} filters");
        // The file has two lines of headings.
        let interfaces = read("net/dev")?;
        let others: Vec<&str> = interfaces
            .lines()
            .skip(2)
            .filter(|line| !line.trim_start().starts_with("lo:"))
            .collect();
        ensure!(others.is_empty(), "{name} has interfaces: {others:?}");
        let listens = port.contains("server=1");
        for line in read("mountinfo")?.lines() {
            let fields: Vec<&str> = line.split(' ').collect();
            let (at, options) = (fields[4], fields[5]);
            // What each engine needs for /proc and /dev; all else is read-only.
            let engines = ["/proc", "/dev"]
                .iter()
                .any(|own| at == *own || at.starts_with(&format!("{own}/")));
            let own = listens && Path::new(at) == folder;
            let read_only = options.split(',').any(|option| option == "ro");
            ensure!(engines || own || read_only, "{name} may write to {at}: {line}");
            ensure!(
                at != path(&self.folders[0])? || folder == self.folders[0],
                "{name} sees the other's port: {line}"
            );
        }
        let cgroup = read("cgroup")?;
        if self.kind == Kind::Crun {
            let own = cgroup.lines().find_map(|line| line.strip_prefix("0::/"));
            let own = own.filter(|own| !own.is_empty()).with_context(|| cgroup.clone())?;
            let most = self.engine.cgroup(&format!("{own}/hugetlb.2MB.max"))?;
            ensure!(most.trim() == "2097152", "the limit of huge pages is {most}");
        }
        Ok(())
    }
}

fn wait_for_socket(socket: &Path, by: &mut Process) -> Result<()> {
    let end = std::time::Instant::now() + LIMIT;
    while !socket.exists() {
        ensure!(std::time::Instant::now() < end, "no {}{}", socket.display(), by.tail());
        process::sleep(Duration::from_millis(5))?;
    }
    // Else only root could connect.
    chown(socket, Some(NOBODY), Some(NOBODY))?;
    Ok(())
}

fn through_our_switch(ctx: &Ctx, kind: Kind) -> Result<Outcome> {
    let mut stage = Stage::new(ctx, kind)?;
    // The switch names a port by its socket's file name.
    let sockets = [stage.folders[0].join("a.sock"), stage.folders[1].join("b.sock")];
    let listen = format!("{},{}", path(&sockets[0])?, path(&sockets[1])?);
    let mut switch = Usernic::spawn(ctx, &["switch", "--listen", &listen, "--connect", "0:1"])?;
    for socket in &sockets {
        wait_for_socket(socket, &mut switch)?;
    }
    // A mount of its own for one engine, huge pages without any for the other.
    let memory = match kind {
        Kind::Crun => "hugetlbfs",
        Kind::Podman => "memfd-huge",
    };
    let ports = sockets.map(|socket| format!("virtio-user,path={},memory={memory}", socket.display()));
    stage.exchange(ctx, [&ports[0], &ports[1]], &mut || Ok(()))?;
    switch.signal(rustix::process::Signal::INT)?;
    switch.wait_success(LIMIT)?;
    Ok(Outcome::Passed(format!("{} frames", stage.sent.len())))
}

fn through_ovs(ctx: &Ctx, kind: Kind) -> Result<Outcome> {
    let mut stage = Stage::new(ctx, kind)?;
    let run = ctx.subdir("ovs")?;
    let mut ovs = Ovs::start(&ctx.found, &run, ctx.hugetlbfs("ovs")?)?;
    // OVS connects: each container makes its socket in a folder of its own.
    let sockets = stage.folders.clone().map(|folder| folder.join("port.sock"));
    for (name, socket) in ["p1", "p2"].into_iter().zip(&sockets) {
        ovs.add_client_port(name, socket, 1500)?;
    }
    ovs.connect(1, 2)?;
    ovs.connect(2, 1)?;
    let ports = sockets.map(|socket| format!("virtio-user,path={},server=1,memory=memfd-huge", socket.display()));
    let result = stage.exchange(ctx, [&ports[0], &ports[1]], &mut || Ok(()));
    result.with_context(|| {
        format!(
            "p1: {} p2: {}",
            ovs.statistics("p1").trim(),
            ovs.statistics("p2").trim()
        )
    })?;
    Ok(Outcome::Passed(format!("{} frames", stage.sent.len())))
}

/// The doctor in a container that is fit, and in one that is not, in ways that a prepared folder could only claim.
fn doctor_inside(ctx: &Ctx, kind: Kind) -> Result<Outcome> {
    let mut stage = Stage::new(ctx, kind)?;
    let socket = stage.folders[0].join("port.sock");
    let mut switch = Usernic::spawn(ctx, &["switch", "--listen", path(&socket)?])?;
    wait_for_socket(&socket, &mut switch)?;
    let port = format!("virtio-user,path={},memory=memfd-huge", socket.display());
    let mut run =
        |tag: &str, command: &[&str], change: &dyn Fn(&mut serde_json::Value)| -> Result<(bool, Vec<String>)> {
            let name = format!("xt{}-{tag}", std::process::id());
            let mut printed = stage.printed(ctx, &name, &port, command)?;
            if kind == Kind::Crun {
                let mut config = serde_json::from_str(&printed)?;
                change(&mut config);
                printed = config.to_string();
            }
            let out = ctx.dir.join(tag);
            let mut process = stage.engine.spawn(&name, &printed, &out)?;
            let fit = process.wait(LIMIT)?.success();
            let text = fs::read_to_string(&out)?;
            let report: serde_json::Value =
                serde_json::from_str(text.trim()).with_context(|| format!("{text}{}", process.tail()))?;
            ensure!(report["fit"] == fit, "the status is not what is told: {text}");
            let findings = report["findings"].as_array().context("no findings")?;
            let faults = findings
                .iter()
                .filter(|f| f["level"] == "fault")
                .filter_map(|f| f["check"].as_str());
            Ok((fit, faults.map(str::to_owned).collect()))
        };
    let command = ["usernic", "--json", "doctor", "--port", &port];
    let (fit, faults) = run("fit", &command, &|_| ())?;
    ensure!(fit, "in a container as printed there are faults: {faults:?}");
    if kind == Kind::Podman {
        return Ok(Outcome::Passed("fit".into()));
    }
    let mut expect = |tag: &str, wanted: &str, change: &dyn Fn(&mut serde_json::Value)| -> Result<()> {
        let (_, faults) = run(tag, &command, change)?;
        ensure!(faults == [wanted], "{tag}: {faults:?}, not {wanted}");
        Ok(())
    };
    expect("cgroup", "cgroup-limit", &|config| {
        config["linux"]["resources"]["hugepageLimits"][0]["limit"] = 0.into();
    })?;
    expect("seccomp", "seccomp-too-tight", &|config| {
        let names = config["linux"]["seccomp"]["syscalls"][0]["names"].as_array_mut();
        if let Some(names) = names {
            names.retain(|name| name != "eventfd2");
        }
    })?;
    chown(&socket, Some(0), Some(0))?;
    expect("mode", "socket-mode", &|_| ())?;
    switch.kill();
    chown(&socket, Some(NOBODY), Some(NOBODY))?;
    expect("stale", "stale-socket", &|_| ())?;
    fs::remove_file(&socket)?;
    expect("gone", "no-back-end", &|_| ())?;
    Ok(Outcome::Passed("fit, and five faults by name".into()))
}

/// A port that needs several pages, in a container that may have one less: an error with the cgroup's name, a status of
/// 1, and no SIGBUS.
fn limit_too_small(ctx: &Ctx) -> Result<Outcome> {
    let mut stage = Stage::new(ctx, Kind::Crun)?;
    let socket = stage.folders[0].join("port.sock");
    let mut switch = Usernic::spawn(ctx, &["switch", "--listen", path(&socket)?])?;
    wait_for_socket(&socket, &mut switch)?;
    let mut last = String::new();
    for memory in ["memfd-huge", "hugetlbfs"] {
        let port = format!("virtio-user,path={},queue_size=1024,memory={memory}", socket.display());
        let name = format!("xt{}-{memory}", std::process::id());
        let command = ["usernic", "replay", "--port", &port, "--pcap", "/in.pcap"];
        let printed = stage.printed(ctx, &name, &port, &command)?;
        let mut config: serde_json::Value = serde_json::from_str(&printed)?;
        let limit = &mut config["linux"]["resources"]["hugepageLimits"][0]["limit"];
        let needed = limit.as_i64().context("no limit of huge pages")?;
        ensure!(needed >= 4 << 20, "the port needs {needed} bytes: this says nothing");
        *limit = (needed - (2 << 20)).into();
        let mut process = stage.engine.spawn(&name, &config.to_string(), &ctx.dir.join("out"))?;
        let status = process.wait(LIMIT)?;
        let output = process.output();
        if status.code() != Some(1) {
            bail!("{memory}: {}{}", process::describe(status), process.tail());
        }
        let pages = needed / (2 << 20);
        for text in [
            "the cgroup limit /sys/fs/cgroup",
            "hugetlb.2MB.",
            &format!("{pages} needed"),
        ] {
            ensure!(output.contains(text), "{memory}: no \"{text}\" in: {output}");
        }
        last = output.trim().to_owned();
    }
    Ok(Outcome::Passed(last))
}
