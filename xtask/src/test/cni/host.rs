//! A host for the CNI plugin: a switch, a folder, and calls as a container runtime makes them.

use std::cell::{Cell, RefCell};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use crate::peers::ovs::Ovs;
use crate::process::{Process, Surroundings, sleep};
use crate::test::Ctx;

/// Who our switch runs as: nobody of this machine.
pub const SWITCH: &str = "5511";
/// Who containers run as.
pub const USER: u32 = 6622;

pub const LIMIT: Duration = Duration::from_secs(30);

/// Which switch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Switch,
    Ovs,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Switch => "switch",
            Kind::Ovs => "ovs",
        }
    }
}

/// What has the ports.
enum Back<'a> {
    Ours(RefCell<Process>),
    Ovs(std::cell::RefMut<'a, Ovs>),
}

/// A host.
pub struct Host<'a> {
    ctx: &'a Ctx,
    back: Back<'a>,
    /// Where ports have their folders.
    pub dir: PathBuf,
    plugin: PathBuf,
    /// Where the plugin lives: in the switch's mounts, if they are its own.
    inside: Option<String>,
    calls: Cell<usize>,
}

/// A call's answer.
#[derive(Debug)]
pub struct Answer {
    /// It ended well.
    pub good: bool,
    /// It was killed.
    pub killed: bool,
    /// What it wrote, if that was JSON.
    pub json: Value,
    text: String,
}

/// OVS, for all cases that need it.
const GROUP: &str = "cni-ovs";

impl<'a> Host<'a> {
    /// Starts a switch, or takes the shared OVS.
    pub fn start(ctx: &'a Ctx, kind: Kind) -> Result<Self> {
        let back = match kind {
            Kind::Switch => Back::Ours(RefCell::new(switch(ctx, None)?)),
            Kind::Ovs => Back::Ovs(ctx.shared(GROUP, |dir| {
                let mut ovs = Ovs::start(&ctx.found, dir, ctx.hugetlbfs_in(dir, "ovs")?)?;
                ovs.learn()?;
                Ok(ovs)
            })?),
        };
        Self::with(ctx, back, ctx.dir.join("cni"), None)
    }

    /// A host whose folder of ports is a tmpfs with so many inodes, that only the switch and the plugin see.
    pub fn small(ctx: &'a Ctx, options: &str) -> Result<Self> {
        let dir = ctx.subdir("small")?;
        let switch = switch(ctx, Some(format!("mount -t tmpfs -o {options} none {}", dir.display())))?;
        let inside = switch.pid().as_raw_nonzero().to_string();
        Self::with(ctx, Back::Ours(RefCell::new(switch)), dir, Some(inside))
    }

    fn with(ctx: &'a Ctx, back: Back<'a>, dir: PathBuf, inside: Option<String>) -> Result<Self> {
        // Runtimes call plugins by name.
        let plugin = ctx.dir.join("usernic-cni");
        if !plugin.exists() {
            std::os::unix::fs::symlink(&ctx.usernic, &plugin)?;
        }
        Ok(Host {
            ctx,
            back,
            dir,
            plugin,
            inside,
            calls: Cell::new(0),
        })
    }

    /// For the case's group.
    pub fn group(kind: Kind) -> Option<&'static str> {
        (kind == Kind::Ovs).then_some(GROUP)
    }

    /// The file that Multus would tell of.
    pub fn device_info(&self) -> PathBuf {
        self.ctx.dir.join("devinfo/net")
    }

    /// The network's configuration.
    pub fn config(&self) -> Value {
        let mut config = json!({
            "cniVersion": "1.1.0", "name": "fast", "type": "usernic-cni",
            "dir": self.dir, "uid": USER, "mtu": 1500,
            "runtimeConfig": { "CNIDeviceInfoFile": self.device_info() },
        });
        match &self.back {
            Back::Ours(_) => config["control"] = json!(control(self.ctx)),
            Back::Ovs(ovs) => {
                config["backend"] = "ovs".into();
                config["ovsdb"] = json!(ovs.database());
            }
        }
        config
    }

    /// Calls the plugin for a container's interface.
    pub fn call(&self, command: &str, container: &str, config: &Value) -> Result<Answer> {
        self.call_under(&[], command, container, config)
    }

    /// The same, under another program.
    pub fn call_under(&self, under: &[&str], command: &str, container: &str, config: &Value) -> Result<Answer> {
        let mut words: Vec<String> = Vec::new();
        if let Some(pid) = &self.inside {
            words.extend(["nsenter", "--mount", "--target", pid].map(String::from));
        }
        words.extend(under.iter().map(|word| word.to_string()));
        words.push(self.plugin.display().to_string());
        let mut line = Command::new(&words[0]);
        line.args(&words[1..]).current_dir(&self.ctx.dir);
        line.env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", container)
            .env("CNI_IFNAME", "net1");
        line.env("CNI_NETNS", "/proc/self/ns/net")
            .env("CNI_PATH", &self.ctx.dir)
            .env_remove("CNI_ARGS");
        self.calls.set(self.calls.get() + 1);
        let mut process = Process::spawn(&format!("usernic-cni {command}"), line, &Surroundings::default())?;
        // One that is killed may not have read it.
        let _ = process.command(&config.to_string());
        process.close_stdin();
        let status = process.wait(LIMIT)?;
        let text = process.output();
        let json = text
            .lines()
            .rev()
            .find_map(|line| serde_json::from_str(line).ok())
            .unwrap_or_default();
        Ok(Answer {
            good: status.success(),
            killed: std::os::unix::process::ExitStatusExt::signal(&status).is_some(),
            json,
            text,
        })
    }

    /// The same; an error unless it ends well.
    pub fn good(&self, command: &str, container: &str) -> Result<Value> {
        self.call(command, container, &self.config())?.good()
    }

    /// The ports that the switch has.
    pub fn ports(&self) -> Result<Vec<String>> {
        match &self.back {
            Back::Ovs(ovs) => ovs.names(),
            Back::Ours(_) => {
                let mut line = Command::new(&self.ctx.usernic);
                line.args(["switch", "ctl", "--control"])
                    .arg(control(self.ctx))
                    .arg("list");
                let list: Value = serde_json::from_str(&crate::process::run("usernic switch ctl", line, LIMIT)?)?;
                let ports = list["ports"].as_array().context("no list")?;
                Ok(ports.iter().map(|port| port["name"].to_string()).collect())
            }
        }
    }

    /// An error if anything is left of any attachment.
    pub fn nothing_left(&self) -> Result<()> {
        let ports = self.ports()?;
        ensure!(ports.is_empty(), "ports are left: {}", ports.join(" "));
        let mut find = self.command("find");
        find.arg(&self.dir).args(["-mindepth", "1"]);
        if self.inside.is_some() || self.dir.exists() {
            let files = crate::process::run("find", find, LIMIT)?;
            ensure!(files.trim().is_empty(), "files are left:\n{files}");
        }
        ensure!(!self.device_info().exists(), "the device information is left");
        Ok(())
    }

    /// A program that sees what the plugin sees.
    pub fn command(&self, program: &str) -> Command {
        match &self.inside {
            None => Command::new(program),
            Some(pid) => {
                let mut command = Command::new("nsenter");
                command.args(["--mount", "--target", pid, program]);
                command
            }
        }
    }

    /// Starts `usernic` as a container would: mounts and network of its own, no capability, the user that the
    /// configuration names, nothing but its folder at /run/usernic.
    pub fn container(&self, name: &str, args: &[&str]) -> Result<Process> {
        let folder = self.dir.join(name);
        let script = format!(
            "mount -t tmpfs none /run && mkdir /run/usernic && mount --bind {} /run/usernic && \
             exec setpriv --reuid {USER} --regid {USER} --clear-groups --no-new-privs --inh-caps=-all \
             --bounding-set=-all \"$@\"",
            folder.display()
        );
        let mut line = Command::new("unshare");
        line.args(["--mount", "--net", "sh", "-c", &script, "sh"])
            .arg(&self.ctx.usernic)
            .args(args);
        line.current_dir("/");
        let surroundings = Surroundings {
            cpus: vec![0],
            no_stdin: true,
            ..Default::default()
        };
        Process::spawn(&format!("container {name}"), line, &surroundings)
    }

    /// Ends our switch and starts another.
    pub fn restart(&self) -> Result<()> {
        let Back::Ours(process) = &self.back else {
            bail!("only ours")
        };
        process.borrow_mut().stop(LIMIT);
        *process.borrow_mut() = switch(self.ctx, None)?;
        Ok(())
    }
}

fn control(ctx: &Ctx) -> PathBuf {
    ctx.dir.join("run/control")
}

/// Our switch, as a service of a user of its own without any capability.
fn switch(ctx: &Ctx, mount: Option<String>) -> Result<Process> {
    let run = ctx.subdir("run")?;
    let owner: u32 = SWITCH.parse()?;
    std::os::unix::fs::chown(&run, Some(owner), Some(owner))?;
    let prepare = mount.map_or(String::new(), |mount| format!("{mount} && "));
    let script = format!(
        "{prepare}exec setpriv --reuid {SWITCH} --regid {SWITCH} --clear-groups --no-new-privs --inh-caps=-all \
         --bounding-set=-all \"$@\""
    );
    let mut line = Command::new("unshare");
    line.args(["--mount", "sh", "-c", &script, "sh"])
        .arg(&ctx.usernic)
        .arg("switch");
    line.arg("--control")
        .arg(control(ctx))
        .arg("--state")
        .arg(run.join("state"))
        .current_dir("/");
    let surroundings = Surroundings {
        cpus: vec![1],
        no_stdin: true,
        ..Default::default()
    };
    let mut process = Process::spawn("usernic switch", line, &surroundings)?;
    until_served(&mut process, &control(ctx))?;
    Ok(process)
}

/// A file of a switch that was killed may be there before.
fn until_served(process: &mut Process, path: &Path) -> Result<()> {
    let end = Instant::now() + LIMIT;
    while UnixStream::connect(path).is_err() {
        ensure!(
            process.exited()?.is_none(),
            "{} ended{}",
            process.name(),
            process.tail()
        );
        ensure!(Instant::now() < end, "no control socket{}", process.tail());
        sleep(Duration::from_millis(5))?;
    }
    Ok(())
}

impl Answer {
    /// Its JSON, if it ended well.
    pub fn good(self) -> Result<Value> {
        ensure!(self.good, "{}", self.text.trim());
        Ok(self.json)
    }

    /// An error unless it failed with this code.
    pub fn expect(&self, code: u64) -> Result<()> {
        ensure!(
            !self.good && self.json["code"] == code && self.json["cniVersion"] == "1.1.0",
            "expected code {code}, and found: {}",
            self.text.trim()
        );
        Ok(())
    }
}
