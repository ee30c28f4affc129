//! librte_net_usernic.so in applications that nobody here wrote: testpmd, l2fwd, l3fwd, OVS. Frames go through them from
//! and to ports of ours in this process, and are compared byte for byte.

mod apps;
mod exercise;
mod frames;
mod limits;
mod modes;
mod newer;
mod ovs;
mod testpmd;
mod vhost;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::wire::End;
use super::{Case, Ctx, Need, Outcome, passed};
use crate::peers::testpmd::{Config, Testpmd};
use crate::plugin;
use crate::plugin::sdk::Dpdk;
use crate::process::{Process, Surroundings};

/// What building the plugin takes.
pub const BUILD: [Need; 2] = [Need::Tool("gcc"), Need::Tool("pkg-config")];

/// mbufs of a pool in which each holds a whole frame.
const JUMBO: u32 = 16384;

pub fn cases() -> Vec<Case> {
    let needs = [&BUILD[..], &[Need::Testpmd]].concat();
    let mut cases = vec![Case::new("pmd/hint", &needs, hint)];
    cases.extend(testpmd::cases());
    cases.extend(modes::cases());
    cases.extend(vhost::cases());
    cases.extend(apps::cases());
    cases.extend(exercise::cases());
    cases.extend(limits::cases());
    cases.extend(newer::cases());
    cases.extend(ovs::cases());
    cases
}

/// The plugin, built once a run.
pub fn plugin(ctx: &Ctx) -> Result<PathBuf> {
    let out = ctx.scratch.subdir("plugin")?;
    let file = out.join(plugin::NAME);
    if file.is_file() {
        return Ok(file);
    }
    plugin::build(&ctx.root, &out, &Dpdk::find(None, true)?, ctx.verbose)
}

/// What `cargo xtask plugin` says to try works in the plugin's own folder.
fn hint(ctx: &Ctx) -> Result<Outcome> {
    let file = plugin(ctx)?;
    let socket = ctx.dir.join("s");
    let _back = back(&socket, "")?;
    let (line, why) = plugin::hint(&file)?;
    ensure!(why.is_some(), "everybody can write to /tmp");
    // What it leaves to the reader: the socket, and memory without hugepages.
    let line = line.replace("SOCKET", &socket.display().to_string());
    let line = line.replace("--vdev", "--no-pci --no-telemetry --no-huge -m 192 --vdev");
    let mut command = Command::new("sh");
    command.args([
        "-c",
        &format!("exec {line} --total-num-mbufs=2048 --disable-link-check"),
    ]);
    command.current_dir(file.parent().context("a folder")?);
    command
        .env("XDG_RUNTIME_DIR", &ctx.dir)
        .env("RUNTIME_DIRECTORY", &ctx.dir);
    let mut process = Process::spawn("testpmd", command, &Surroundings::default())?;
    process.command("show port summary all")?;
    process.close_stdin();
    process.wait_success(Duration::from_secs(60))?;
    let said = process.output();
    ensure!(said.contains("net_usernic"), "{said}");
    passed()
}

/// Kinds of rings: a name, and the keys of the plugin's device that ask for them.
#[derive(Clone, Copy)]
struct Rings {
    name: &'static str,
    keys: &'static str,
    packed: bool,
    mergeable: bool,
    in_order: bool,
}

const fn rings(name: &'static str, keys: &'static str, [packed, mergeable, in_order]: [bool; 3]) -> Rings {
    Rings {
        name,
        keys,
        packed,
        mergeable,
        in_order,
    }
}

/// All of them.
const RINGS: [Rings; 6] = [
    rings("split", "", [false, false, true]),
    rings("packed", ",packed_vq=1", [true, false, true]),
    rings("split-out-of-order", ",in_order=0", [false, false, false]),
    rings("packed-out-of-order", ",packed_vq=1,in_order=0", [true, false, false]),
    rings("split-mergeable", ",mrg_rxbuf=1", [false, true, true]),
    rings("packed-mergeable", ",packed_vq=1,mrg_rxbuf=1", [true, true, true]),
];

/// The usual two.
const BOTH: [Rings; 2] = [RINGS[0], RINGS[1]];

/// A back-end of ours on which a port of the plugin comes.
fn back(socket: &Path, keys: &str) -> Result<End> {
    End::open(&format!("vhost,path={},mtu=9710{keys}", socket.display()))
}

/// A front-end of ours.
fn front(socket: &Path, keys: &str) -> Result<End> {
    End::open(&format!(
        "virtio-user,path={},mtu=9710,memory=memfd{keys}",
        socket.display()
    ))
}

/// Starts a testpmd with the plugin's devices.
pub fn start(ctx: &Ctx, config: &mut Config) -> Result<Testpmd> {
    config.plugin = Some(plugin(ctx)?);
    let program = ctx.found.testpmd.as_ref().context("testpmd is gone")?;
    Testpmd::start(program, config)
}

/// `--vdev` of the plugin's port.
pub fn vdev(index: usize, socket: &Path, keys: &str) -> String {
    format!("net_usernic{index},path={}{keys}", socket.display())
}
