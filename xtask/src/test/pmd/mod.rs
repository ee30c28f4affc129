//! librte_net_usernic.so in applications that nobody here wrote: testpmd, l2fwd, l3fwd, OVS. Frames go through them from
//! and to ports of ours in this process, and are compared byte for byte.

mod apps;
mod exercise;
mod frames;
mod limits;
mod modes;
mod ovs;
mod testpmd;
mod vhost;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::wire::End;
use super::{Case, Ctx, Need};
use crate::peers::testpmd::{Config, Testpmd};
use crate::plugin;
use crate::plugin::sdk::Dpdk;

/// What building the plugin takes.
pub const BUILD: [Need; 2] = [Need::Tool("gcc"), Need::Tool("pkg-config")];

/// mbufs of a pool in which each holds a whole frame.
const JUMBO: u32 = 16384;

pub fn cases() -> Vec<Case> {
    let mut cases = testpmd::cases();
    cases.extend(modes::cases());
    cases.extend(vhost::cases());
    cases.extend(apps::cases());
    cases.extend(exercise::cases());
    cases.extend(limits::cases());
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
fn start(ctx: &Ctx, config: &mut Config) -> Result<Testpmd> {
    config.plugin = Some(plugin(ctx)?);
    let program = ctx.found.testpmd.as_ref().context("testpmd is gone")?;
    Testpmd::start(program, config)
}

/// `--vdev` of the plugin's port.
fn vdev(index: usize, socket: &Path, keys: &str) -> String {
    format!("net_usernic{index},path={}{keys}", socket.display())
}
