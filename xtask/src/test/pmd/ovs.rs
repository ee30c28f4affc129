//! The plugin and OVS-DPDK: testpmd with the plugin's ports through OVS, and OVS itself with the plugin's port.

use anyhow::Result;

use super::testpmd::frames;
use super::{BOTH, Rings, back, front, plugin, start, vdev};
use crate::peers::ovs::{Ovs, PortKind};
use crate::peers::testpmd::Config;
use crate::test::wire::{exchange, prove};
use crate::test::{Case, Ctx, Need, Outcome, passed};

const GROUP: &str = "pmd-ovs";

struct Peer {
    _ovs: Ovs,
    sockets: Vec<std::path::PathBuf>,
}

pub fn cases() -> Vec<Case> {
    let needs = [&super::BUILD[..], &[Need::Testpmd, Need::Ovs, Need::Root]].concat();
    let mut cases: Vec<Case> = BOTH
        .into_iter()
        .map(|rings| {
            Case::new(format!("pmd/ovs/{}", rings.name), &needs, move |ctx| {
                through(ctx, rings)
            })
            .sharing(GROUP)
        })
        .collect();
    cases.push(Case::new("pmd/ovs/type-dpdk", &needs, as_port));
    cases
}

/// Ours, OVS, testpmd with the plugin, ours.
fn through(ctx: &Ctx, rings: Rings) -> Result<Outcome> {
    let peer = ctx.shared(GROUP, |dir| {
        let run = dir.join("ovs");
        std::fs::create_dir_all(&run)?;
        let mut ovs = Ovs::start(&ctx.found, &run, ctx.hugetlbfs_in(dir, "ovs")?)?;
        let mut sockets = Vec::new();
        // A pool of frames of 9,000 bytes for each port: for more than two there is no memory.
        for name in ["a", "p"] {
            sockets.push(ovs.add_port(name, PortKind::VhostUser, 9000)?);
        }
        ovs.connect(1, 2)?;
        ovs.connect(2, 1)?;
        Ok(Peer { _ovs: ovs, sockets })
    })?;
    let socket = ctx.dir.join("b");
    let mut b = back(&socket, "")?;
    let mut config = Config::new("pmd", &ctx.dir);
    config.huge_dir = ctx.hugetlbfs("pmd")?;
    config.jumbo = true;
    config.mbufs = 8192;
    config.vdevs = vec![vdev(0, &peer.sockets[1], rings.keys), vdev(1, &socket, rings.keys)];
    // The switch polls on CPU 1.
    config.cpus = (1, 0);
    let mut testpmd = start(ctx, &mut config)?;
    testpmd.forward("io")?;
    let mut a = front(&peer.sockets[0], "")?;
    prove(&mut a, &mut b)?;
    exchange(&mut a, &mut b, &frames(100, 9000), 64)?;
    passed()
}

/// A port of OVS that is a device of the plugin's.
fn as_port(ctx: &Ctx) -> Result<Outcome> {
    let file = plugin(ctx)?;
    let sockets = ["a", "b"].map(|name| ctx.dir.join(name));
    let mut a = back(&sockets[0], "")?;
    let mut b = back(&sockets[1], "")?;
    let mut ovs = Ovs::start_with(&ctx.found, &ctx.subdir("ovs")?, ctx.hugetlbfs("ovs")?, Some(&file))?;
    for (index, socket) in sockets.iter().enumerate() {
        let keys = if index == 0 { "" } else { ",packed_vq=1" };
        ovs.add_device(&format!("p{index}"), &vdev(index, socket, keys), 9000)?;
    }
    ovs.connect(1, 2)?;
    ovs.connect(2, 1)?;
    prove(&mut a, &mut b)?;
    exchange(&mut a, &mut b, &frames(100, 9000), 64)?;
    passed()
}
